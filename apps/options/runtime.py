"""What draws, and on what."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from tiue_export.errors import UsageError
from tiue_export.registry.backends import BACKENDS

from ..completion import runtime_names
from .group import OptionGroup, option, picked, refuse

if TYPE_CHECKING:
    from tiue_export.specs import RuntimeOptions

_NAMES = ", ".join(BACKENDS)
_OF_BUNDLES = ", ".join(name for name in BACKENDS if name != "torch")
_OF_THE_STUDENT = ("base", "vae", "lora", "embedding", "controlnet")


@dataclass(frozen=True)
class ThreadOptions(OptionGroup):
    """How much of a processor is used."""

    panel = "Runtime"
    threads: int | None = option(None, "CPU threads \\[default: the runtime's choice].")


@dataclass(frozen=True)
class DeviceOptions(ThreadOptions):
    """Where a runtime computes."""

    panel = "Runtime"
    device: str = option(
        "auto",
        "auto, cpu; "
        + "; ".join(
            f"with {name} {', '.join(entry.device_words)}"
            for name, entry in BACKENDS.items()
            if entry.device_words
        )
        + ".",
    )


@dataclass(frozen=True)
class MemoryOptions(OptionGroup):
    """What a runtime may keep."""

    panel = "Runtime"
    low_memory: bool = option(
        False, "Give memory back between operations (trt: one graph at a time); slower."
    )


@dataclass(frozen=True)
class RuntimeName(OptionGroup):
    """Which runtime draws."""

    panel = "Runtime"
    runtime: str = option("ort", f"{_OF_BUNDLES}.", completion=runtime_names)

    def check_runtime(self) -> None:
        """Raise `UsageError` for the runtime that needs a student: only some commands take one."""
        if self.runtime == "torch":
            raise UsageError(
                "the torch runtime draws with the student itself, which this command does not take",
                f"Pass --runtime with one that draws with the bundle: {_OF_BUNDLES}.",
            )


@dataclass(frozen=True)
class RuntimeOrTorch(RuntimeName):
    """The same, for a command that takes the student too."""

    runtime: str = option("ort", f"{_NAMES}; torch needs --ckpt.", completion=runtime_names)


@dataclass(frozen=True)
class RuntimeOrAuto(RuntimeName):
    """The same, for a command that can look for the fastest."""

    runtime: str = option(
        "ort",
        f"{_NAMES}, or auto: the fastest here, measured once and remembered; torch needs --ckpt.",
        completion=runtime_names,
    )


@dataclass(frozen=True)
class PrecisionOptions(OptionGroup):
    """The arithmetic of a runtime that can choose."""

    panel = "Runtime"
    precision: str = option(
        "auto",
        "auto, fp32, bf16 or fp16, for runtimes that can choose "
        f"({', '.join(name for name, entry in BACKENDS.items() if entry.chooses_precision)}).",
    )


@dataclass(frozen=True)
class ArithmeticOptions(PrecisionOptions):
    """How a runtime computes."""

    panel = "Runtime"
    provider: str | None = option(
        None, "With ort: cpu, cuda or rtx (plug-in) \\[default: by --device]."
    )
    cuda_graph: bool | None = option(
        None,
        "All in one launch on a GPU \\[default: trt yes, if it can be; ort no].",
        "--cuda-graph/--no-cuda-graph",
    )


@dataclass(frozen=True)
class ReferenceOptions(OptionGroup):
    """The student itself, which `--runtime torch` draws with."""

    panel = "Runtime"
    ckpt: str | None = option(None, "Student for --runtime torch.")
    base: str | None = option(None, "torch: pipeline for what the student lacks.")
    vae: str | None = option(None, "torch: folder of another VAE.")
    lora: tuple[str, ...] = option((), "torch: FILE[:SCALE] merged at the export; repeatable.")
    embedding: tuple[str, ...] = option((), "torch: FILE[:TOKEN] of the export; repeatable.")
    controlnet: str | None = option(None, "torch: the bundle's ControlNet folder.")


@dataclass(frozen=True)
class RuntimeChoice(MemoryOptions, ArithmeticOptions, DeviceOptions, RuntimeName):
    """All that opens a runtime."""

    def runtime_options(self, reference: ReferenceOptions | None = None) -> RuntimeOptions:
        """What the registry opens the runtime with."""
        from tiue_export.specs import RuntimeOptions

        if reference is None:
            self.check_runtime()
        torch = reference or ReferenceOptions()
        if self.runtime not in ("torch", "auto"):
            refuse(
                f"for --runtime torch; {self.runtime} draws with the bundle's own graphs",
                "Leave it out, or add --runtime torch.",
                torch,
                only=("ckpt", *_OF_THE_STUDENT),
            )
        student = {name: getattr(torch, name) for name in _OF_THE_STUDENT}
        return picked(RuntimeOptions, self, checkpoint=torch.ckpt, **student)


@dataclass(frozen=True)
class RuntimeOrAutoChoice(RuntimeOrAuto, RuntimeChoice):
    """The same, of a command that draws for a person: the fastest may be looked for."""
