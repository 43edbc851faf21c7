"""The ways in which this machine can draw with the given bundles, and why not the others."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from tiue_export.bundle.read import Bundle
from tiue_export.errors import TiueError, UsageError, unknown_name
from tiue_export.registry.backends import BACKENDS, open_runtime
from tiue_export.specs import RuntimeOptions

_PRECISIONS = ("fp32", "bf16", "fp16")


@dataclass(frozen=True)
class Choice:
    """One way to draw; `label` tells it from the others, `precision` is the coarsest on its way."""

    label: str
    bundle: Bundle
    runtime: str
    options: RuntimeOptions
    device: str
    precision: str

    @property
    def size(self) -> str:
        """Width and height of its pictures in pixels, as "512x512"."""
        manifest = self.bundle.manifest
        return f"{manifest.width_px}x{manifest.height_px}"


@dataclass(frozen=True)
class Refusal:
    """A runtime that cannot draw with a bundle here, and what would change that."""

    runtime: str
    bundle: str
    reason: str
    remedy: str = ""


@dataclass(frozen=True)
class Offer:
    """All choices of a studio, and what it cannot offer."""

    choices: tuple[Choice, ...]
    refusals: tuple[Refusal, ...]

    def choice(self, label: str) -> Choice:
        """The choice of that label; raises `UsageError` naming those there are."""
        for choice in self.choices:
            if choice.label == label:
                return choice
        raise unknown_name("way to draw", label, [choice.label for choice in self.choices])

    def of_size(self, size: str) -> list[str]:
        """Labels of the choices that draw in `size`."""
        return [choice.label for choice in self.choices if choice.size == size]


def find_choices(
    bundles: Sequence[Bundle], runtimes: Sequence[str], options: RuntimeOptions
) -> Offer:
    """Open every runtime on every bundle once, to see that it can; weights are not loaded yet.

    `runtimes` empty: all that a device would run. Raises the first refusal when nothing can draw.
    """
    for name in runtimes:
        if name not in BACKENDS or name == "torch":
            raise unknown_name("runtime", name, [name for name in BACKENDS if name != "torch"])
    names = tuple(dict.fromkeys(runtimes)) or tuple(n for n, e in BACKENDS.items() if e.automatic)
    choices: list[Choice] = []
    refusals: list[Refusal] = []
    for bundle, title in zip(bundles, _titles(bundles), strict=True):
        for name in names:
            for found in _tried(bundle, title, name, options):
                if isinstance(found, Choice):
                    choices.append(found)
                else:
                    refusals.append(found)
    if not choices:
        reasons = "; ".join(f"{refusal.runtime}: {refusal.reason}" for refusal in refusals)
        remedy = next((refusal.remedy for refusal in refusals if refusal.remedy), None)
        raise UsageError(f"nothing here can draw with this bundle ({reasons})", remedy)
    return Offer(tuple(choices), tuple(refusals))


def _titles(bundles: Sequence[Bundle]) -> list[str]:
    """What to call each bundle in a label: nothing when alone, else the shortest distinct path."""
    if len(bundles) == 1:
        return [""]
    names = [bundle.root.resolve().name for bundle in bundles]
    return [
        name if names.count(name) == 1 else str(bundle.root)
        for bundle, name in zip(bundles, names, strict=True)
    ]


def _tried(
    bundle: Bundle, title: str, name: str, options: RuntimeOptions
) -> Iterator[Choice | Refusal]:
    """A runtime on a bundle: one choice for each precision it has, or the refusal."""
    several = BACKENDS[name].chooses_precision and options.precision == "auto"
    refusals = []
    refused = True
    for precision in _PRECISIONS if several else (options.precision,):
        wanted = replace(options, precision=precision)
        try:
            runtime = open_runtime(name, bundle, wanted)
        except TiueError as error:
            refusals.append(Refusal(name, str(bundle.root), error.message, error.next_step or ""))
            continue
        refused = False
        label = f"{name} {runtime.precision}"
        if several and runtime.precision != precision:
            label += f", {precision} arithmetic"
        yield Choice(
            f"{title}: {label}" if title else label,
            bundle,
            name,
            wanted,
            runtime.device,
            runtime.precision,
        )
        runtime.close()
    if refused:
        yield refusals[0]
