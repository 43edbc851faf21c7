"""Build the demo family from nothing: pictures -> autoencoder -> teacher -> students -> demo.

    python -m emoji_family.build --out RUN                  (from examples/; hours of two cores)
    python -m emoji_family.build --out RUN --stage teacher  (one stage; it needs those before it)
    python -m emoji_family.build --out RUN --start-from emoji-teacher  (train on from that teacher)

Every stage resumes where it was stopped, and a finished stage is only read.
"""

from __future__ import annotations

import argparse
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from diffusers import DDIMScheduler, StableDiffusionPipeline
from transformers import CLIPTokenizer

from tiue_export.benchmarks.quality.yardstick import FeatureNetwork, save_quality_data
from tiue_export.benchmarks.vocabulary import write_tokenizer
from tiue_export.checkpoint.demo_student import demo_student
from tiue_export.checkpoint.family import load_family
from tiue_export.checkpoint.parts import load_vae, quiet_libraries
from tiue_export.student.pipeline_folder import write_pipeline
from tiue_export.train.config import read_config
from tiue_export.train.cpu_precision import cpu_precision
from tiue_export.train.distill import distill

from .autoencoder import AutoencoderSettings, reconstruction_psnr_db, train_autoencoder
from .corpus import demo_corpus, demo_names, load_corpus, told_apart
from .drawing import BACKGROUNDS, PICTURE_SIZE, caption
from .feature_network import FeatureSettings, train_feature_network
from .latents import LatentSet, encode_pictures
from .quality_files import aligned, quality_data
from .teacher import AGAIN, LARGE, SMALL, Teacher, TeacherSettings, train_teacher

_HERE = Path(__file__).parent
_DRAWS_PER_EMOJI = 192
_SMALL_SIZE = 64
_SAMPLE_EVERY = 600
_SHOWN_PROMPTS = (
    "a red apple",
    "a red apple on a light blue background",
    "a fox on a dark green background",
    "an owl",
    "a birthday cake on a pink background",
    "a rocket on a dark blue background",
    "a grinning face on a white background",
    "a penguin on a lavender background",
)


class Family:
    """The stages and where each keeps its files below `out`."""

    def __init__(self, out: Path, start_from: Path | None = None) -> None:
        """`start_from`: a teacher in a pipeline folder; autoencoder and vocabulary stay its own."""
        self.out, self.start_from = out, start_from
        self.corpus = demo_corpus()
        out.mkdir(parents=True, exist_ok=True)
        if start_from is not None:
            shutil.copytree(start_from / "tokenizer", out / "tokenizer", dirs_exist_ok=True)

    def tokenizer(self) -> CLIPTokenizer:
        """A vocabulary over the names of all emoji, drawn or not, and the grounds."""
        folder = self.out / "tokenizer"
        if not (folder / "tokenizer_config.json").is_file():
            texts = [caption(emoji.name) for emoji in load_corpus()]
            # As often as names, so that every word of a ground is one piece.
            texts += [caption("thing", ground) for ground in BACKGROUNDS] * len(texts)
            write_tokenizer(folder, texts, load_family("demo").text_encoder)
        with quiet_libraries():
            return CLIPTokenizer.from_pretrained(folder)

    def autoencoder(self) -> Any:
        """Encoder and decoder."""
        if self.start_from is not None:
            return load_vae(self.start_from / "vae").float()
        return train_autoencoder(self.corpus, self.out / "autoencoder", AutoencoderSettings())

    def report_autoencoder(self) -> None:
        """Print how well it draws what it encoded."""
        psnr_db = reconstruction_psnr_db(self.autoencoder(), self.corpus)
        print(f"autoencoder: {psnr_db:.1f} dB, mean over a new drawing of each emoji")

    def latents(self, size: int) -> LatentSet:
        """Latents of drawn pictures at `size` px."""
        return encode_pictures(
            self.autoencoder(),
            self.corpus,
            self.out / f"latents-{size}.safetensors",
            size=size,
            draws=_DRAWS_PER_EMOJI,
            seed=0,
        )

    def teacher(self) -> Path:
        """At 64 px, then at 128 px: "teacher" is distilled from, "emoji-teacher" (fp16) ships."""
        if self.start_from is not None:
            start = Teacher.from_pipeline(self.start_from)
        else:
            small = self._teacher("teacher-64", SMALL, _SMALL_SIZE, None)
            start = self._teacher("teacher-128", LARGE, PICTURE_SIZE, small)
        large = self._teacher("teacher-128-again", AGAIN, PICTURE_SIZE, start)
        vae = self.autoencoder()
        vae.register_to_config(scaling_factor=self.latents(PICTURE_SIZE).scaling_factor)
        self._write_teacher("emoji-teacher", large, vae, torch.float16)
        return self._write_teacher("teacher", large, vae, torch.float32)

    def student(self) -> Path:
        """The TiUE student."""
        return self._distill("student.toml", "student")

    def one_step(self) -> Path:
        """The one-step baseline, same teacher and budget."""
        return self._distill("one-step.toml", "one-step")

    def lcm(self) -> Path:
        """The latent consistency student of the same teacher, for few steps."""
        return self._distill("lcm.toml", "lcm")

    def fan_outs(self) -> list[Path]:
        """The student that ships, trained on with rows that part behind 0 to 3 up blocks."""
        shipped = {
            "teacher": str(_HERE.parent / "emoji-teacher"),
            "student": str(demo_student()),
        }
        return [
            self._distill("fan-out.toml", f"fan-out-{blocks}", fan_out=str(blocks), **shipped)
            for blocks in range(4)
        ]

    def feature_network(self) -> FeatureNetwork:
        """What pictures are measured with; it sees drawings only."""
        return train_feature_network(told_apart(), self.out / "feature-network", FeatureSettings())

    def demo(self) -> Path:
        """What ships in tiue_export/demo: the student, and the data of benchmarks/quality."""
        folder = self.out / "demo"
        shutil.copytree(self.student(), folder / "emoji-student", dirs_exist_ok=True)
        corpus = told_apart()
        data = quality_data(corpus, self.feature_network(), demo_names())
        data = aligned(data, corpus, self.out / "teacher", self.out / "alignment")
        save_quality_data(data, folder / "quality")
        return folder

    def _write_teacher(self, name: str, teacher: Teacher, vae: Any, dtype: torch.dtype) -> Path:
        return write_pipeline(
            self.out / name,
            unet=teacher.unet,
            text_encoder=teacher.text_encoder,
            vae=vae,
            tokenizer=self.out / "tokenizer",
            scheduler_config=load_family("demo").scheduler,
            dtype=dtype,
            force=True,
        )

    def _teacher(
        self, name: str, settings: TeacherSettings, size: int, start_from: Teacher | None
    ) -> Teacher:
        """One phase of the teacher, in the folder `name`."""
        tokenizer, vae, data = self.tokenizer(), self.autoencoder(), self.latents(size)
        vae.register_to_config(scaling_factor=data.scaling_factor)

        def after_save(step: int, teacher: Teacher) -> None:
            if step % _SAMPLE_EVERY and step != settings.steps:
                return
            file = self.out / name / "samples" / f"step-{step:06d}.png"
            _save_samples(teacher, vae, tokenizer, size, file)

        folder = self.out / name
        return train_teacher(data, tokenizer, folder, settings, start_from, after_save)

    def _distill(self, config: str, name: str, **changes: str) -> Path:
        prompts = self.out / "prompts.txt"
        grounds = [None, *BACKGROUNDS]
        lines = [caption(name, ground) for name in sorted(demo_names()) for ground in grounds]
        prompts.write_text("\n".join(lines) + "\n", "utf-8")
        settings = {
            "teacher": str(self.out / "teacher"),
            "prompts": str(prompts),
            "out": str(self.out / name),
            "sample_prompts": _SHOWN_PROMPTS,
            "precision": cpu_precision(),
            **changes,
        }
        return distill(replace(read_config(_HERE / config, settings)), print)


def _save_samples(
    teacher: Teacher, vae: Any, tokenizer: CLIPTokenizer, size: int, file: Path
) -> None:
    """Two pictures of each shown prompt: 20 DDIM steps, guidance 3."""
    from tiue_export.drawing.picture import save_png

    scheduler = DDIMScheduler.from_config(load_family("demo").scheduler, clip_sample=False)
    with quiet_libraries():
        pipeline = StableDiffusionPipeline(
            vae=vae,
            text_encoder=teacher.text_encoder,
            tokenizer=tokenizer,
            unet=teacher.unet,
            scheduler=scheduler,
            safety_checker=None,
            feature_extractor=None,
            requires_safety_checker=False,
        )
    pipeline.set_progress_bar_config(disable=True)
    images = pipeline(
        [prompt for prompt in _SHOWN_PROMPTS for _ in range(2)],
        height=size,
        width=size,
        num_inference_steps=20,
        guidance_scale=3.0,
        generator=torch.Generator().manual_seed(0),
    ).images
    from PIL import Image

    sheet = Image.new("RGB", (8 * size, 2 * size))
    for number, image in enumerate(images):
        sheet.paste(image, ((number // 2) * size, (number % 2) * size))
    file.parent.mkdir(parents=True, exist_ok=True)
    save_png(sheet, file, {"prompt": " | ".join(_SHOWN_PROMPTS)})


_STAGES: dict[str, Callable[[Family], object]] = {
    "autoencoder": Family.report_autoencoder,
    "teacher": Family.teacher,
    "student": Family.student,
    "one-step": Family.one_step,
    "lcm": Family.lcm,
    "fan-out": Family.fan_outs,
    "feature-network": Family.feature_network,
    "demo": Family.demo,
}


def main() -> None:
    """Build one stage, or all of them in order."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--out", type=Path, required=True, help="folder for all runs")
    parser.add_argument("--stage", choices=_STAGES, help="only this one [default: all]")
    parser.add_argument("--start-from", type=Path, help="a teacher to train on, a pipeline folder")
    parser.add_argument("--threads", type=int, help="CPU threads [default: all cores]")
    arguments = parser.parse_args()
    if arguments.threads is not None:
        torch.set_num_threads(arguments.threads)
    family = Family(arguments.out, arguments.start_from)
    for stage in _STAGES if arguments.stage is None else (arguments.stage,):
        _STAGES[stage](family)


if __name__ == "__main__":
    main()
