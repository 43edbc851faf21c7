"""What each kind of session is opened with, one frozen description a kind.

`contenders.py` writes them, a worker process gets their values as JSON, and a record keeps those.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar


@dataclass(frozen=True, kw_only=True)
class SessionSettings:
    """What every kind has. `threads` None: what the backend takes by itself."""

    kind: ClassVar[str]
    device: str = "cpu"
    threads: int | None = None
    unet_only: bool = False


@dataclass(frozen=True, kw_only=True)
class PassSettings(SessionSettings):
    """`passes` ordinary UNet passes, of which `timed_passes` are run and the rest scaled; on two
    rows, with and without the prompt, if `guided`."""

    passes: int = 1
    timed_passes: int = 1
    guided: bool = False


@dataclass(frozen=True, kw_only=True)
class GraphSettings(PassSettings):
    """A bundle on a runtime; `bundle` None is made first. Guided passes run on `unet_bundle`, whose
    batch is twice the other's. `checkpoint`, `base` and `vae` are for the runtime "torch" alone."""

    kind: ClassVar[str] = "graphs"
    bundle: str | None
    runtime: str
    precision: str = "auto"
    unet_bundle: str | None = None
    checkpoint: str | None = None
    base: str | None = None
    vae: str | None = None


@dataclass(frozen=True, kw_only=True)
class LoopSettings(SessionSettings):
    """A bundle with a plan, and one of `LOOPS`; `max_decoder_rows` replaces the plan's own.

    `bundle` None is made first.
    """

    kind: ClassVar[str] = "loop"
    bundle: str | None
    runtime: str
    loop: str
    precision: str = "auto"
    max_decoder_rows: int | None = None


@dataclass(frozen=True, kw_only=True)
class TorchSettings(PassSettings):
    """Modules in PyTorch: `passes` 0 runs the student. `cache_interval`: by DeepCache, 0 without.
    `checkpoint` None is never opened. `steps` is K, None the checkpoint's own. Sizes in pixels."""

    kind: ClassVar[str] = "torch"
    checkpoint: str | None
    base: str | None = None
    vae: str | None = None
    precision: str = "fp32"
    compiled: bool = False
    steps: int | None = None
    passes: int = 0
    timed_passes: int = 0
    cache_interval: int = 0
    height: int | None = None
    width: int | None = None
    batch: int = 1


@dataclass(frozen=True, kw_only=True)
class SdCppSettings(PassSettings):
    """`weights` is how ggml stores them (f16, q8_0, f32). `checkpoint` None is never opened.
    Sizes in pixels, None for 512."""

    kind: ClassVar[str] = "sd-cpp"
    checkpoint: str | None
    vae: str | None = None
    weights: str = "f16"
    height: int | None = None
    width: int | None = None
