"""The student's own modules in PyTorch, as a contender: the official path and its neighbours.

Nothing is prepared for export here: diffusers' modules run as they are, features are repeated K
times and the decoder runs on K*B rows, as the official code does it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any

import diffusers
import torch
import transformers
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from tiue_export.errors import CheckpointError, RuntimeFailure
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.latency_record import END_TO_END, UNET, Facts
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, VAE_DECODER
from tiue_export.student.model import Features, Student

from .made_bundle import measured_student
from .session import StageClock
from .settings import TorchSettings

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}
_FIRST_TIMESTEP = 999


@dataclass(frozen=True)
class Functions:
    """The four heavy steps, compiled or not."""

    encode: Callable[[Tensor, Tensor], Features]
    decode: Callable[[Features, Tensor], Tensor]
    unet: Callable[[Tensor, Tensor, Tensor], Any]
    vae: Callable[[Tensor], Any] | None


# Entered around each part of a drawing with its name and whether it is one of many passes.
Stage = Callable[[str, bool], AbstractContextManager[None]]


class TorchSession:
    """A student in memory, with the inputs of one drawing."""

    def __init__(self, settings: TorchSettings) -> None:
        self._settings = settings
        self._device = _device(settings.device)
        if settings.threads is not None:
            torch.set_num_threads(settings.threads)
        self._student = _loaded(settings).to(self._device)
        self._eager = _functions(self._student)
        self._functions = _compiled(self._eager) if settings.compiled else self._eager
        if settings.cache_interval:
            _cache_layers(self._student.unet, settings)
        options = ExportOptions(height=settings.height, width=settings.width, batch=settings.batch)
        shapes = shapes_of(self._student, options)
        self._shape = shapes.latents  # (B, 4, H, W)
        self._noise = torch.from_numpy(noise_from_seed(0, self._shape)).to(self._device)
        self._ids, self._text = _text_inputs(self._student, shapes.text)
        self._scaling_factor = shapes.vae_scaling_factor

    @property
    def facts(self) -> Facts:
        """What is loaded, and how it computes."""
        scale, (height, width) = shapes_of(self._student).vae_scale, self._shape[2:]
        modules = (torch, diffusers, transformers)
        return Facts(
            device=str(self._device),
            precision=self._settings.precision,
            versions={module.__name__: str(module.__version__) for module in modules},
            size_px=(width * scale, height * scale),
            batch=self._settings.batch,
            threads=torch.get_num_threads(),
            weights_sha256=self._student.source.sha256,
            text_tokens=shapes_of(self._student).tokens,
        )

    def run(self) -> dict[str, float]:
        """One drawing; milliseconds by stage."""
        settings = self._settings
        clock = StageClock(max(1, settings.timed_passes), max(1, settings.passes))

        @contextmanager
        def timed(stage: str, scaled: bool) -> Iterator[None]:
            with clock.stage(stage, scaled=scaled):
                yield
                _wait_for(self._device)

        start = time.perf_counter()
        with torch.inference_mode():
            result = self._draw(self._functions, timed)
        clock.whole_s = time.perf_counter() - start
        if not bool(torch.isfinite(result).all()):
            raise RuntimeFailure(f"it draws non-finite numbers in {settings.precision}")
        return clock.latency_ms(whole=None if settings.unet_only else END_TO_END)

    def count(self) -> dict[str, float]:
        """Operations by stage, counted while the uncompiled modules run."""
        settings = self._settings
        scale = settings.passes / settings.timed_passes if settings.passes else 1.0
        flops: dict[str, float] = {}

        @contextmanager
        def counted(stage: str, scaled: bool) -> Iterator[None]:
            # torch counts no attention on CPUs by itself (2.13): its kernel has no formula.
            kernel = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
            formulas = {kernel: _attention_flops}
            with FlopCounterMode(display=False, custom_mapping=formulas) as counter:
                yield
            total = counter.get_total_flops() * (scale if scaled else 1.0)
            flops[stage] = flops.get(stage, 0.0) + total

        with torch.inference_mode():
            self._draw(self._eager, counted)
        parts = [flops[name] for name in (UNET_ENCODER, UNET_DECODER) if name in flops]
        return {**flops, UNET: flops.get(UNET, sum(parts))}

    def close(self) -> None:
        """The process ends next."""

    def _draw(self, functions: Functions, stage: Stage) -> Tensor:
        """One drawing; `stage(name, scaled)` is entered around each part."""
        settings, text = self._settings, self._text
        if not settings.unet_only:
            text = self._embedded(stage)
        if settings.passes:
            result = self._passes(functions, text, stage)
        else:
            with stage(UNET_ENCODER, False):
                features = functions.encode(self._noise, text)
            with stage(UNET_DECODER, False):
                outputs = functions.decode(features, text)
                result = self._student.combine(self._noise, outputs)
        if settings.unet_only or functions.vae is None:
            return result
        with stage(VAE_DECODER, False):
            scaled = (result / self._scaling_factor).to(text.dtype)
            picture: Tensor = functions.vae(scaled).sample
        return picture

    def _embedded(self, stage: Stage) -> Tensor:
        ids = self._ids.repeat(2, 1) if self._settings.guided else self._ids
        encoder = self._student.text_encoder
        assert encoder is not None
        with stage(TEXT_ENCODER, False):
            embedded: Tensor = encoder(ids).last_hidden_state
        return embedded

    def _passes(self, functions: Functions, text: Tensor, stage: Stage) -> Tensor:
        """Ordinary UNet passes; the scheduler's few multiplications between them are left out."""
        settings = self._settings
        noise = self._noise.to(text.dtype)
        rows = noise.repeat(2, 1, 1, 1) if settings.guided else noise
        if settings.guided and len(text) == len(noise):
            text = text.repeat(2, 1, 1)
        for number in range(settings.timed_passes):
            timestep = torch.tensor(_FIRST_TIMESTEP - number, device=self._device)
            with stage(UNET, True):
                output: Tensor = functions.unet(rows, timestep, text).sample
        return output[: len(noise)].float()


def _loaded(settings: TorchSettings) -> Student:
    assert settings.checkpoint is not None
    student = measured_student(settings.checkpoint, settings)
    parts = {"text encoder": student.text_encoder, "VAE": student.vae}
    missing = [name for name, part in parts.items() if part is None]
    if missing and not settings.unet_only:
        raise CheckpointError(
            f"{settings.checkpoint} has no {' and no '.join(missing)}",
            "Add --base, or measure its UNet alone: --unet-only.",
        )
    student = student.to(_DTYPES[settings.precision]).eval()
    if settings.precision != "fp32":
        # Half-precision convolutions (oneDNN, cuDNN) take channels last without reordering.
        for part in (student.unet, student.vae):
            if part is not None:
                part.to(memory_format=torch.channels_last)
    return student


def _cache_layers(unet: Any, settings: TorchSettings) -> None:
    """Let DeepCache's package wrap the UNet's blocks: it looks the timestep up in a scheduler."""
    from DeepCache import DeepCacheSDHelper

    timesteps = torch.arange(_FIRST_TIMESTEP, _FIRST_TIMESTEP - settings.timed_passes, -1)
    scheduler = SimpleNamespace(timesteps=timesteps)
    helper = DeepCacheSDHelper(SimpleNamespace(unet=unet, scheduler=scheduler))
    helper.set_params(cache_interval=settings.cache_interval, cache_branch_id=0)
    helper.enable()


def _functions(student: Student) -> Functions:
    unet, vae = student.unet, student.vae
    return Functions(student.encode, student.decode, unet, None if vae is None else vae.decode)


def _compiled(eager: Functions) -> Functions:
    return Functions(
        torch.compile(eager.encode),
        torch.compile(eager.decode),
        torch.compile(eager.unet),
        None if eager.vae is None else torch.compile(eager.vae),
    )


def _text_inputs(student: Student, shape: tuple[int, int, int]) -> tuple[Tensor, Tensor]:
    """Token ids (B, L) and an embedding (B, L, D): time does not depend on what they mean."""
    batch, length, width = shape
    device, dtype = student.unet.device, student.unet.dtype
    vocabulary = 1 if student.text_encoder is None else student.text_encoder.config.vocab_size
    ids = (torch.arange(length, device=device) + 1).remainder(vocabulary).repeat(batch, 1)
    generator = torch.Generator().manual_seed(0)
    text = torch.randn(batch, length, width, generator=generator)
    return ids, text.to(device, dtype)


def _attention_flops(query: Any, key: Any, value: Any, *rest: Any, **more: Any) -> int:
    """Two matrix products, from the shapes (B, heads, T, d)."""
    batch, heads, length, width = map(int, query)
    return 2 * batch * heads * length * int(key[2]) * (width + int(value[3]))


def _wait_for(device: torch.device) -> None:
    """GPU work is queued: a stage ends when it is done."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _device(asked: str) -> torch.device:
    if asked == "auto":
        asked = "cuda" if torch.cuda.is_available() else "cpu"
    if asked == "cuda" and not torch.cuda.is_available():
        raise RuntimeFailure(f"this torch ({torch.__version__}) finds no cuda device")
    return torch.device(asked)
