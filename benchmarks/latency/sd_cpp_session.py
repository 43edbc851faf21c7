"""stable-diffusion.cpp on the same weights, through its Python package, as a contender.

It reads a diffusers pipeline folder or a whole checkpoint file, and knows ordinary UNet passes
only. It tells the time of each stage in its log; end to end is timed here.
"""

from __future__ import annotations

import ctypes
import re
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiue_export.errors import CheckpointError, RuntimeFailure
from tiue_export.proof.latency_record import END_TO_END, UNET, Facts
from tiue_export.proof.parity import PROMPTS
from tiue_export.specs import TEXT_ENCODER, VAE_DECODER
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.machine import usable_cores
from tiue_export.system.owned_path import temporary_folder

from .settings import SdCppSettings

_STAGE_LINES = {
    TEXT_ENCODER: "get_learned_condition completed",
    UNET: "sampling completed",
    VAE_DECODER: "decode_first_stage completed",
}
_TAKING = re.compile(r"taking\s+([0-9.]+)\s*(ms|s)\b")
_GUIDANCE = 7.5
_OLD_PREFIX = "text_model."
# SD_LOG_ERROR of its enum.
_ERROR_LEVEL = 3


class SdCppSession:
    """A loaded model; every drawing goes through `generate_image`."""

    def __init__(self, settings: SdCppSettings) -> None:
        # Deferred, so that the log's reader below can be used without the package.
        import stable_diffusion_cpp

        assert settings.checkpoint is not None
        self._settings = settings
        self._version = str(getattr(stable_diffusion_cpp, "__version__", "unknown"))
        # By default it takes half of the cores.
        self._threads = settings.threads or usable_cores()
        self._size_px = (settings.width or 512, settings.height or 512)
        self._lines: list[str] = []
        self._errors: list[str] = []
        # ctypes keeps no reference to a callback: it must live as long as the model.
        self._callback = stable_diffusion_cpp.sd_log_callback(self._heard)
        stable_diffusion_cpp.sd_set_log_callback(self._callback, ctypes.c_void_p(0))
        with readable_checkpoint(settings.checkpoint) as model_path:
            self._model = stable_diffusion_cpp.StableDiffusion(
                model_path=str(model_path),
                taesd_path=_taesd_file(settings.vae),
                vae_decode_only=True,
                n_threads=self._threads,
                wtype=settings.weights,
            )
        if not self._model.model:  # a null pointer, which its package lets pass
            raise RuntimeFailure(
                f"stable-diffusion.cpp cannot load {settings.checkpoint}{self._said()}"
            )

    @property
    def facts(self) -> Facts:
        """What is loaded."""
        return Facts(
            device="cpu",
            precision=self._settings.weights,
            versions={"stable-diffusion-cpp-python": self._version},
            size_px=self._size_px,
            batch=1,
            threads=self._threads,
            notes=("stages as its own log tells them, to 10 ms",),
        )

    def run(self) -> dict[str, float]:
        """One drawing; milliseconds by stage."""
        settings = self._settings
        self._lines.clear()
        self._errors.clear()
        start = time.perf_counter()
        try:
            images = self._model.generate_image(
                prompt=PROMPTS[0],
                width=self._size_px[0],
                height=self._size_px[1],
                cfg_scale=_GUIDANCE if settings.guided else 1.0,
                sample_method="euler",
                sample_steps=settings.timed_passes,
                seed=0,
            )
        except ValueError:  # what its package makes of a null pointer
            images = []
        whole_ms = (time.perf_counter() - start) * 1e3
        if not images:
            raise RuntimeFailure(f"stable-diffusion.cpp drew nothing{self._said()}")
        times = stage_times_ms(self._lines)
        if UNET not in times:
            raise RuntimeFailure("stable-diffusion.cpp's log does not tell how long sampling took")
        left_out = times[UNET] * (settings.passes / settings.timed_passes - 1)
        times[UNET] += left_out
        if settings.unet_only:
            return {UNET: times[UNET]}
        return {**times, END_TO_END: whole_ms + left_out}

    def count(self) -> dict[str, float]:
        """It does not tell."""
        return {}

    def close(self) -> None:
        """The process ends next."""

    def _said(self) -> str:
        """ ": " and what its log called an error, or its last line; empty if it said nothing."""
        lines = [" ".join(line.split()) for line in self._errors or self._lines[-1:]]
        return ": " + "; ".join(lines) if lines else ""

    def _heard(self, level: int, text: bytes, data: Any) -> None:
        line = text.decode("utf-8", "replace")
        self._lines.append(line)
        if level >= _ERROR_LEVEL:
            self._errors.append(line)


def stage_times_ms(lines: list[str]) -> dict[str, float]:
    """Milliseconds by stage from the log's "... completed, taking 9.55s" lines."""
    times: dict[str, float] = {}
    for line in lines:
        taking = _TAKING.search(line)
        for stage, mark in _STAGE_LINES.items():
            if taking is not None and mark in line:
                scale = 1.0 if taking[2] == "ms" else 1e3
                times[stage] = times.get(stage, 0.0) + float(taking[1]) * scale
    return times


@contextmanager
def readable_checkpoint(path: str) -> Iterator[Path]:
    """A pipeline folder or a file that it can read; a UNet alone has nothing to read prompts with.

    It knows the text encoder's tensors as "text_model.*", which transformers 5 leaves out when it
    saves: such a folder is lent under the old names until the weights are loaded.
    """
    place = Path(path)
    if place.is_file():
        yield place
        return
    if not (place / "model_index.json").is_file():
        raise CheckpointError(
            f"stable-diffusion.cpp needs a whole pipeline; {path} is none",
            "Give a diffusers pipeline folder, or one file with UNet, text encoder and VAE.",
        )
    encoder = place / "text_encoder" / "model.safetensors"
    if not encoder.is_file() or _has_old_names(encoder):
        yield place
        return
    from safetensors.torch import load_file, save_file

    with temporary_folder() as lent:
        for part in place.iterdir():
            if part.name != "text_encoder":
                (lent / part.name).symlink_to(part.resolve())
        renamed = lent / "text_encoder" / "model.safetensors"
        with disk_errors(renamed):
            renamed.parent.mkdir()
            tensors = load_file(encoder)
            save_file({_OLD_PREFIX + name: tensors[name] for name in tensors}, renamed)
        yield lent


def _has_old_names(encoder: Path) -> bool:
    from safetensors import safe_open

    with safe_open(encoder, "numpy") as tensors:
        return any(name.startswith(_OLD_PREFIX) for name in tensors.keys())  # noqa: SIM118


def _taesd_file(vae: str | None) -> str:
    """AutoencoderTiny's file where `--vae tiny:FOLDER` was given."""
    if vae is None or not vae.startswith("tiny:"):
        return ""
    return str(Path(vae.removeprefix("tiny:")) / "diffusion_pytorch_model.safetensors")
