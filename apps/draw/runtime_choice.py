"""Which runtime draws a bundle fastest on this machine: measured once, kept with its evidence.

Every runtime that needs only the bundle draws the same picture; the fastest is chosen. The
measurement lies in the user's cache folder and is made again when the bundle, the machine, a
library or what the user asked for differs.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import platform
import time
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from datetime import datetime, timezone
from pathlib import Path

from tiue_export._version import __version__
from tiue_export.bundle.manifest import structured
from tiue_export.bundle.read import MANIFEST_FILE, Bundle
from tiue_export.drawing.pipeline import Pipeline, picture_to_follow
from tiue_export.errors import BundleError, RuntimeFailure, TiueError, TiueWarning, first_line
from tiue_export.proof.parity import PROMPTS
from tiue_export.registry.backends import BACKENDS
from tiue_export.specs import CONTROLNET, Array, RuntimeOptions
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.cache_folder import user_cache_folder
from tiue_export.system.json_file import parse_json
from tiue_export.system.machine import cpu_name, installed_versions, usable_cores
from tiue_export.system.tensorrt_flavor import this_device

AUTO = "auto"
# Options of the torch reference alone, which is never chosen.
_OF_THE_STUDENT = ("checkpoint", "base", "vae", "lora", "embedding", "controlnet")
_TIMED_DRAWINGS = 2
# A drawing this long says enough by itself; loops of many steps are not drawn three times.
_LONG_S = 20.0


@dataclass(frozen=True)
class Trial:
    """One runtime: the time of a whole picture once everything is loaded, or why there is none.

    `device` and `precision` are what the runtime says of itself; `open_s` is loading with the first
    picture; `stage_latency_ms` is by graph, or by part where a runtime runs several as one.
    """

    runtime: str
    latency_ms: float | None = None
    device: str = ""
    precision: str = ""
    open_s: float | None = None
    stage_latency_ms: Mapping[str, float] = field(default_factory=dict)
    reason: str = ""


@dataclass(frozen=True)
class RuntimeChoice:
    """The fastest runtime of one bundle under `circumstances`, with all trials, fastest first."""

    runtime: str
    trials: tuple[Trial, ...]
    bundle: str
    bundle_identity: str
    circumstances: Mapping[str, str]
    measured_at: str

    def to_json(self) -> str:
        """The text of its file."""
        return json.dumps(dataclasses.asdict(self), indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str) -> RuntimeChoice:
        """Parse and check every field; `where` names the file in errors."""
        try:
            data = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{where} is not JSON: {error}", "Delete it.") from None
        choice: RuntimeChoice = structured(RuntimeChoice, data, where)
        return choice

    def outdated(self, options: RuntimeOptions | None = None) -> str:
        """What differs now from when it was measured; "" if nothing does."""
        root = Path(self.bundle)
        if not (root / MANIFEST_FILE).is_file():
            return "the bundle is gone"
        if _identity(root) != self.bundle_identity:
            return "the bundle changed"
        now = _circumstances() if options is None else {**_circumstances(), **_asked(options)}
        for name, value in now.items():
            before = self.circumstances.get(name, "none")
            if before != value:
                return f"{name}: {before} then, {value} now"
        return ""


@dataclass(frozen=True)
class Chosen:
    """A choice with where it came from: `why` it was measured now, "" if it was remembered."""

    choice: RuntimeChoice
    file: Path
    why: str


def choose_runtime(
    bundle: Bundle,
    options: RuntimeOptions | None = None,
    *,
    control: Array | None = None,
    on_start: Callable[[str], None] = lambda runtime: None,
    on_trial: Callable[[Trial], None] = lambda trial: None,
) -> Chosen:
    """The fastest runtime for `bundle` here, measured unless that is known already.

    `control` (3, 8H, 8W) in [0, 1] is the picture that a bundle with a ControlNet follows in every
    trial; its content decides no time, so it is not remembered. Runtimes are opened one after the
    other and closed again: no two need fit in memory.

    Raises `RuntimeFailure`, with every runtime's reason, when none can draw, and `UsageError` for a
    bundle with a ControlNet and no picture.
    """
    if control is None and CONTROLNET in bundle.manifest.graphs:
        raise picture_to_follow(bundle)
    options = options or RuntimeOptions()
    file = _file(bundle.root, options)
    known, why = _remembered(file, options)
    if known is not None and not why:
        return Chosen(known, file, "")
    trials = []
    for name in [name for name, entry in BACKENDS.items() if entry.automatic]:
        on_start(name)
        trials.append(_try(bundle, name, options, control))
        on_trial(trials[-1])
    trials.sort(key=lambda t: float("inf") if t.latency_ms is None else t.latency_ms)
    if trials[0].latency_ms is None:
        raise RuntimeFailure(
            f"no runtime here can draw {bundle.root}: "
            + "; ".join(f"{trial.runtime}: {trial.reason}" for trial in trials),
            "See what is missing: tiue-export doctor",
        )
    choice = RuntimeChoice(
        runtime=trials[0].runtime,
        trials=tuple(trials),
        bundle=str(bundle.root.resolve()),
        bundle_identity=_identity(bundle.root),
        circumstances={**_circumstances(), **_asked(options)},
        measured_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
    )
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(file, choice.to_json().encode())
    except OSError as error:
        warnings.warn(
            f"{file} cannot be written ({error.strerror}): the next start measures again",
            TiueWarning,
            stacklevel=2,
        )
    return Chosen(choice, file, why)


def remembered_choices() -> list[tuple[Path, RuntimeChoice | None]]:
    """Every remembered choice with its file, the latest first; None for one that cannot be read."""
    found: list[tuple[Path, RuntimeChoice | None]] = []
    for file in _folder().glob("*.json"):
        try:
            found.append((file, RuntimeChoice.from_json(file.read_text("utf-8"), str(file))))
        except (OSError, UnicodeError, BundleError):
            found.append((file, None))
    return sorted(found, key=lambda pair: "" if pair[1] is None else pair[1].measured_at)[::-1]


def _remembered(file: Path, options: RuntimeOptions) -> tuple[RuntimeChoice | None, str]:
    """What the file holds, and why it is to be measured (again)."""
    if not file.is_file():
        return None, "not measured before"
    try:
        choice = RuntimeChoice.from_json(file.read_text("utf-8"), str(file))
    except (OSError, UnicodeError, BundleError) as error:
        return None, f"what was remembered cannot be read: {first_line(error)}"
    if choice.runtime not in BACKENDS:
        return None, f"there is no runtime {choice.runtime} any more"
    return choice, choice.outdated(options)


def _try(bundle: Bundle, name: str, options: RuntimeOptions, control: Array | None) -> Trial:
    """Draw one picture to load everything, then `_TIMED_DRAWINGS`; the faster of them counts."""
    start = time.perf_counter()
    try:
        with Pipeline.open(bundle, name, options) as pipeline:
            first_start = time.perf_counter()
            best = pipeline(PROMPTS[0], control=control).stage_latency_ms
            now = time.perf_counter()
            best_s, open_s = now - first_start, now - start
            if best_s <= _LONG_S:
                best_s = float("inf")
                for _ in range(_TIMED_DRAWINGS):
                    whole = pipeline.forgetful()
                    start = time.perf_counter()
                    stages = whole(PROMPTS[0], control=control).stage_latency_ms
                    if time.perf_counter() - start < best_s:
                        best_s, best = time.perf_counter() - start, stages
            return Trial(
                name,
                round(best_s * 1e3, 3),
                pipeline.runtime.device,
                pipeline.runtime.precision,
                round(open_s, 3),
                {stage: round(sum(runs), 3) for stage, runs in best.items()},
            )
    except TiueError as error:
        return Trial(name, reason=error.message)
    except Exception as error:
        # One library's broken installation must not keep the others from being used.
        return Trial(name, reason=f"{type(error).__name__}: {first_line(error)}")


def _libraries() -> tuple[str, ...]:
    """Distributions whose version decides how fast a runtime that may be chosen is."""
    chosen = (entry.packages for entry in BACKENDS.values() if entry.automatic)
    return tuple(sorted({"numpy", *(name for packages in chosen for name in packages)}))


def _circumstances() -> dict[str, str]:
    """The machine and the libraries, as far as they decide which runtime is fastest."""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "cpu": cpu_name(),
        "cores": str(usable_cores()),
        "gpu": _gpu_name(),
        "python": platform.python_version(),
        "tiue-export": __version__,
        **{name: version or "none" for name, version in installed_versions(_libraries()).items()},
    }


def _asked(options: RuntimeOptions) -> dict[str, str]:
    """The options that decide between runtimes; those of the torch reference do not."""
    return {
        "asked": ", ".join(
            f"{name} {value}"
            for name, value in dataclasses.asdict(options).items()
            if name not in _OF_THE_STUDENT and value not in (None, "auto", False)
        )
        or "nothing"
    }


def _gpu_name() -> str:
    try:
        device = this_device()
    except TiueError:
        return "unknown"
    return "none" if device is None else f"{device.name}, driver {device.driver}"


def _folder() -> Path:
    return user_cache_folder() / "runtime-choice"


def _file(root: Path, options: RuntimeOptions) -> Path:
    key = json.dumps([str(root.resolve()), _asked(options)])
    return _folder() / f"{hashlib.sha256(key.encode()).hexdigest()[:16]}.json"


def _identity(root: Path) -> str:
    """Of all files of a bundle: its manifest holds their hashes."""
    return hashlib.sha256((root / MANIFEST_FILE).read_bytes()).hexdigest()
