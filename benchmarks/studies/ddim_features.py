"""DDIM runs of a diffusers pipeline folder, with the outputs of every UNet block kept.

Reads unet, text_encoder, tokenizer and scheduler; the VAE is left alone, so none is needed.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from inspect import signature
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from diffusers import DDIMScheduler
from torch import Tensor

from tiue_export.checkpoint.tensors import sha256_of_files
from tiue_export.checkpoint.tokenizer_files import write_tokenizer
from tiue_export.drawing.tokenizer import Tokenizer, open_tokenizer
from tiue_export.errors import CheckpointError, UsageError
from tiue_export.reference.key_step_analysis import named_blocks
from tiue_export.sampling.schedule import ddim_settings
from tiue_export.student.load import load_student
from tiue_export.student.model import Student

_NEEDED = ("unet", "text_encoder", "tokenizer", "scheduler")


@dataclass(frozen=True)
class LoadedPipeline:
    """What a sampling run needs, float32 on one device, without the VAE.

    `scheduler` holds DDIMScheduler's arguments, `latent_shape` is (1, 4, H, W), and `sha256`
    covers weights, configurations and vocabulary.
    """

    name: str
    sha256: str
    unet: Any
    text_encoder: Any
    tokenizer: Tokenizer
    scheduler: Mapping[str, Any]
    latent_shape: tuple[int, int, int, int]

    @property
    def device(self) -> torch.device:
        device: torch.device = self.unet.device
        return device

    @torch.inference_mode()
    def embed(self, prompts: Sequence[str]) -> Tensor:
        """Prompts -> text embeddings (B, L, D), float32."""
        ids = torch.from_numpy(self.tokenizer(prompts)).to(self.device)
        embedding: Tensor = self.text_encoder(ids).last_hidden_state
        return embedding


def load_pipeline(folder: Path, device: str = "cpu") -> LoadedPipeline:
    """Read unet, text_encoder, tokenizer and scheduler of a diffusers pipeline folder.

    Raises `UsageError` for a path that is no folder, `CheckpointError` for an incomplete one, and
    whatever `load_student` raises for weights that fit no Stable Diffusion 1.x/2.x UNet.
    """
    if not folder.is_dir():
        raise UsageError(
            f"{folder} is {'a file' if folder.exists() else 'not there'}; expected a diffusers "
            "pipeline folder",
            "Give the folder that holds model_index.json.",
        )
    missing = [part for part in _NEEDED if not (folder / part).is_dir()]
    if missing:
        raise CheckpointError(
            f"{folder} is no diffusers pipeline folder: it lacks "
            f"{', '.join(part + '/' for part in missing)}",
            "Give the folder that holds model_index.json, with all its parts.",
        )
    student = load_student(folder, without=("vae",))
    with TemporaryDirectory() as scratch:
        length = int(student.text_encoder.config.max_position_embeddings)  # type: ignore[union-attr]
        write_tokenizer(folder / "tokenizer", Path(scratch), length)
        tokenizer = open_tokenizer(Path(scratch) / "tokenizer.json", length)
    networks = student.to(torch.device(device), torch.float32)
    return LoadedPipeline(
        name=folder.resolve().name,
        sha256=_sha256(folder, student),
        unet=networks.unet,
        text_encoder=networks.text_encoder,
        tokenizer=tokenizer,
        scheduler=_scheduler_arguments(student.scheduler_config),
        latent_shape=_latent_shape(student.unet.config.sample_size),
    )


def _sha256(folder: Path, student: Student) -> str:
    """One digest over the weights' digests and every small file beside them."""
    small = sorted(
        path
        for part in _NEEDED
        for path in (folder / part).iterdir()
        if path.suffix in {".json", ".txt"}
    )
    parts = [student.source.sha256, *student.source.part_sha256.values()]
    return hashlib.sha256("\n".join([*parts, sha256_of_files(small, folder)]).encode()).hexdigest()


def _scheduler_arguments(config: Mapping[str, Any]) -> dict[str, Any]:
    """DDIMScheduler's arguments for a configuration that any scheduler class saved.

    `DDIMScheduler.from_config` would take its own defaults (clipping!) for keys that a PNDM
    configuration never has. Spacing is "leading", as in the paper's figure (method C.2).
    """
    known = signature(DDIMScheduler.__init__).parameters
    settings = {key: value for key, value in ddim_settings(config).items() if key in known}
    return {**settings, "timestep_spacing": "leading"}


def _latent_shape(sample_size: Any) -> tuple[int, int, int, int]:
    size = sample_size or 64
    height, width = size if isinstance(size, (list, tuple)) else (size, size)
    return 1, 4, int(height), int(width)


class BlockOutputs:
    """The outputs of a UNet's down, mid and up blocks over one sampling run.

    A context manager: forward hooks are on the UNet inside it. Each block has one float32 matrix
    (T, C*h*w), filled row by row; a UNet call of several rows keeps the last one, the conditional
    half of a guided call. At 512 px (SD 2.1) a row of all blocks takes 25 MB.
    """

    def __init__(self, unet: Any, steps: int) -> None:
        self.steps = steps
        self.rows: dict[str, Tensor] = {}
        self._step = 0
        self._blocks = named_blocks(unet)
        self._hooks = ExitStack()

    def __enter__(self) -> BlockOutputs:
        for name, block in self._blocks.items():
            self._hooks.callback(block.register_forward_hook(self._keep(name)).remove)
        return self

    def __exit__(self, *exc: object) -> None:
        self._hooks.close()

    def next_step(self) -> None:
        """Say that what comes belongs to the next step."""
        self._step += 1

    def _keep(self, name: str) -> Callable[[Any, Any, Any], None]:
        def keep(block: Any, inputs: Any, output: Any) -> None:
            hidden = output[0] if isinstance(output, tuple) else output  # a down block adds skips
            row = hidden[-1].flatten().float()  # (C*h*w,)
            if name not in self.rows:
                self.rows[name] = row.new_empty(self.steps, len(row))
            self.rows[name][self._step] = row

        return keep


@torch.inference_mode()
def block_outputs(
    pipeline: LoadedPipeline,
    noise: Tensor,
    text: Tensor,
    steps: int,
    guidance: float = 1.0,
    on_step: Callable[[], None] = lambda: None,
) -> dict[str, Tensor]:
    """One DDIM run (eta 0) of `steps` steps; each block's outputs, float32 (steps, C*h*w).

    `noise` (1, 4, H, W); `text` (1, L, D), or (2, L, D) with the unconditional row first, which
    `guidance` other than 1 needs. `on_step` is called after each step.
    """
    scheduler = DDIMScheduler(**pipeline.scheduler)
    scheduler.set_timesteps(steps)
    sample = noise * scheduler.init_noise_sigma
    with BlockOutputs(pipeline.unet, steps) as outputs:
        for timestep in scheduler.timesteps:
            batch = sample.expand(len(text), -1, -1, -1)  # (1 or 2, 4, H, W)
            predicted = pipeline.unet(batch, timestep, encoder_hidden_states=text).sample
            if len(text) == 2:
                unconditional, conditional = predicted.chunk(2)
                predicted = unconditional + guidance * (conditional - unconditional)
            sample = scheduler.step(predicted, timestep, sample, eta=0.0).prev_sample
            outputs.next_step()
            on_step()
    return outputs.rows
