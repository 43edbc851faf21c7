"""stable-diffusion.cpp on the same weights, through its Python package, as a contender.

It reads a diffusers pipeline folder or a whole checkpoint file, and knows ordinary UNet passes
only. It tells the time of each stage in its log; end to end is timed here.
"""

from __future__ import annotations

import ctypes
import re
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tiue_export.errors import CheckpointError, RuntimeFailure
from tiue_export.parity import PROMPTS
from tiue_export.specs import TEXT_ENCODER, VAE_DECODER

from .environment import usable_cores
from .record import END_TO_END, UNET, Facts

_STAGE_LINES = {
    TEXT_ENCODER: "get_learned_condition completed",
    UNET: "sampling completed",
    VAE_DECODER: "decode_first_stage completed",
}
_TAKING = re.compile(r"taking\s+([0-9.]+)\s*(ms|s)\b")
_GUIDANCE = 7.5


@dataclass(frozen=True)
class SdCppSettings:
    """`weights` is how ggml stores them (f16, q8_0, f32). Sizes in pixels, None for 512."""

    checkpoint: str
    vae: str | None = None
    weights: str = "f16"
    passes: int = 1
    timed_passes: int = 1
    guided: bool = False
    height: int | None = None
    width: int | None = None
    threads: int | None = None
    unet_only: bool = False


class SdCppSession:
    """A loaded model; every drawing goes through `generate_image`."""

    def __init__(self, settings: SdCppSettings) -> None:
        # Deferred, so that the log's reader below can be used without the package.
        import stable_diffusion_cpp

        self._settings = settings
        self._version = str(getattr(stable_diffusion_cpp, "__version__", "unknown"))
        # By default it takes half of the cores.
        self._threads = settings.threads or usable_cores()
        self._size_px = (settings.width or 512, settings.height or 512)
        self._lines: list[str] = []
        # ctypes keeps no reference to a callback: it must live as long as the model.
        self._callback = stable_diffusion_cpp.sd_log_callback(self._heard)
        self._model = stable_diffusion_cpp.StableDiffusion(
            model_path=str(_whole_checkpoint(settings.checkpoint)),
            taesd_path=_taesd_file(settings.vae),
            vae_decode_only=True,
            n_threads=self._threads,
            wtype=settings.weights,
        )
        stable_diffusion_cpp.sd_set_log_callback(self._callback, ctypes.c_void_p(0))

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
        start = time.perf_counter()
        images = self._model.generate_image(
            prompt=PROMPTS[0],
            width=self._size_px[0],
            height=self._size_px[1],
            cfg_scale=_GUIDANCE if settings.guided else 1.0,
            sample_method="euler",
            sample_steps=settings.timed_passes,
            seed=0,
        )
        whole_ms = (time.perf_counter() - start) * 1e3
        if not images:
            raise RuntimeFailure("stable-diffusion.cpp drew nothing")
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

    def _heard(self, level: int, text: bytes, data: Any) -> None:
        self._lines.append(text.decode("utf-8", "replace"))


def open_session(settings: dict[str, Any]) -> SdCppSession:
    """Load the model."""
    return SdCppSession(SdCppSettings(**settings))


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


def _whole_checkpoint(path: str) -> Path:
    """A pipeline folder or a file; a UNet alone has nothing to read prompts with."""
    place = Path(path)
    if place.is_file() or (place / "model_index.json").is_file():
        return place
    raise CheckpointError(
        f"stable-diffusion.cpp needs a whole pipeline; {path} is none",
        "Give a diffusers pipeline folder, or one file with UNet, text encoder and VAE.",
    )


def _taesd_file(vae: str | None) -> str:
    """AutoencoderTiny's file where `--vae tiny:FOLDER` was given."""
    if vae is None or not vae.startswith("tiny:"):
        return ""
    return str(Path(vae.removeprefix("tiny:")) / "diffusion_pytorch_model.safetensors")
