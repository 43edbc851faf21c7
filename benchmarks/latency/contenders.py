"""Who takes part: from the names on the command line to what each worker process is to open.

A name is METHOD/RUNTIME/PRECISION; for a bundle its folder stands for the method. Two measurements
that carry the same name mean the same thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, TypedDict

from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.latency_request import ContenderRequest
from tiue_export.registry.backends import BACKENDS, native_precisions
from tiue_export.registry.packages import missing_modules
from tiue_export.specs import CONTROLNET

from .faster_session import LOOPS, plan_of
from .made_bundle import MadeBundle
from .settings import (
    FasterSettings,
    GraphSettings,
    SdCppSettings,
    SessionSettings,
    TorchSettings,
)

if TYPE_CHECKING:
    from tiue_export.bundle.read import Bundle

BUNDLES = "bundles"
TORCH = "torch"
COMPILED_TORCH = "torch-compile"
SD_CPP = "sd-cpp"
NAIVE = "naive"
_ROWS = re.compile(r"rows-(\d+)")
_TORCH_PRECISIONS = ("fp32", "bf16", "fp16")
_SD_CPP_PRECISIONS = ("f16", "q8_0", "f32")
_GUIDED_TIMED_PASSES = 3
# DeepCache's own example: the whole UNet at every third step, its outermost layers between.
_CACHE_INTERVAL = 3
_WITHOUT_FORM = "ort"  # runs the ONNX graphs as they are


@dataclass(frozen=True)
class Passes:
    """A sampler that takes `total` ordinary UNet passes, of which `timed` are really run.

    `guided`: every pass runs on two rows, with and without the prompt. `cache_interval`: DeepCache
    runs the whole UNet at every so many passes; 0 is without.
    """

    total: int
    timed: int
    guided: bool
    what: str
    cache_interval: int = 0


SAMPLERS: Mapping[str, Passes] = {
    "one-step": Passes(1, 1, False, "1-step model (SD-Turbo, SwiftBrush): 1 UNet pass"),
    "four-step": Passes(4, 4, False, "4-step model (SD-Turbo, LCM): 4 UNet passes"),
    "fifty-step": Passes(
        50,
        _GUIDED_TIMED_PASSES,
        True,
        f"50 steps with guidance: {_GUIDED_TIMED_PASSES} passes timed at batch 2, scaled to 50",
    ),
    "deepcache": Passes(
        50,
        _CACHE_INTERVAL,
        True,
        f"50 steps with guidance by DeepCache, interval {_CACHE_INTERVAL}: "
        f"{_CACHE_INTERVAL} passes timed at batch 2, scaled to 50",
        _CACHE_INTERVAL,
    ),
}
# What people say for METHOD/RUNTIME/PRECISION.
ALIASES: Mapping[str, tuple[str, ...]] = {
    "official": ("naive/torch/fp32",),
    "torch-bf16": ("naive/torch/bf16",),
    "torch-compile": ("naive/torch-compile/bf16",),
    "sd-cpp": ("one-step/sd-cpp/f16", "one-step/sd-cpp/q8_0"),
}
WITHOUT_CHECKPOINT = (BUNDLES,)
USUAL = ("official", "torch-bf16", BUNDLES, "one-step", "four-step", "sd-cpp")
EVERY = (
    "official",
    "torch-bf16",
    "torch-compile",
    BUNDLES,
    "rows-2",
    "rows-8",
    "rows-16",
    "one-step",
    "four-step",
    "fifty-step/torch/fp32",
    "deepcache/torch/fp32",
    "sd-cpp",
)


@dataclass(frozen=True)
class Contender:
    """One row of the table, not yet started.

    `settings` are what the worker opens. `made` are bundles to be made first, by the setting that
    gets their path. `missing` says why it cannot take part.
    """

    name: str
    what: str
    settings: SessionSettings
    made: Mapping[str, MadeBundle] = field(default_factory=dict)
    missing: str | None = None


@dataclass(frozen=True)
class Lane:
    """A runtime and the arithmetic it computes in."""

    runtime: str
    precision: str


def expand(asked: ContenderRequest) -> list[Contender]:
    """All contenders, in the order they were asked for; the first is what ratios are taken to."""
    chosen = asked.contenders
    if not chosen:
        chosen = USUAL if asked.checkpoint is not None else WITHOUT_CHECKPOINT
    if "all" in chosen:
        chosen = EVERY
    found: dict[str, Contender] = {}
    for name in chosen:
        for contender in _named(name, asked):
            found.setdefault(contender.name, contender)
    if not found:
        raise UsageError(
            "there is nothing to measure", "Give a bundle, or --ckpt with --contenders."
        )
    return _sharing_graphs(list(found.values()))


def _sharing_graphs(contenders: Sequence[Contender]) -> list[Contender]:
    """Of bundles that differ only in the forms they have, one with all: an export takes minutes."""
    forms: dict[MadeBundle, set[str]] = {}
    for bundle in (bundle for entry in contenders for bundle in entry.made.values()):
        forms.setdefault(replace(bundle, forms=()), set()).update(bundle.forms)

    def whole(bundle: MadeBundle) -> MadeBundle:
        return replace(bundle, forms=tuple(sorted(forms[replace(bundle, forms=())])))

    return [
        replace(entry, made={name: whole(bundle) for name, bundle in entry.made.items()})
        for entry in contenders
    ]


def bundle_lanes(asked: ContenderRequest, bundle: Bundle) -> list[Lane]:
    """The runtimes and precisions that a bundle is to be measured in."""
    runtimes = asked.runtimes or _usable_runtimes(bundle)
    return [
        Lane(runtime, precision)
        for runtime in runtimes
        for precision in _precisions(runtime, bundle, asked)
    ]


def _named(name: str, asked: ContenderRequest) -> list[Contender]:
    if name == BUNDLES:
        return _bundle_contenders(asked)
    if name in ALIASES:
        return [contender for full in ALIASES[name] for contender in _named(full, asked)]
    method, *lane = name.split("/")
    if method not in SAMPLERS and method != NAIVE and not _ROWS.fullmatch(method):
        known = {BUNDLES, "all", NAIVE, "rows-K", *ALIASES, *SAMPLERS}
        raise unknown_name("contender", name, known)
    if len(lane) > 2:
        raise UsageError(f"contender {name!r} has too many parts; expected {_FULL_NAME}")
    return [_one(method, chosen, asked) for chosen in _lanes(method, lane, asked)]


_FULL_NAME = "METHOD/RUNTIME/PRECISION, such as one-step/torch/fp32"


def _lanes(method: str, parts: Sequence[str], asked: ContenderRequest) -> list[Lane]:
    """The lanes that METHOD, METHOD/RUNTIME or METHOD/RUNTIME/PRECISION stands for."""
    if len(parts) == 2:
        return [Lane(*parts)]
    if parts:
        (runtime,) = parts
        if runtime in (TORCH, COMPILED_TORCH):
            return [Lane(runtime, "fp32")]
        if runtime == SD_CPP:
            return [Lane(runtime, "f16")]
        precisions = [_precisions(runtime, bundle, asked) for bundle in asked.bundles[:1]]
        return [Lane(runtime, p) for p in (precisions[0] if precisions else ("fp32",))]
    lanes = [Lane(TORCH, "fp32")]
    if method in SAMPLERS and not SAMPLERS[method].cache_interval:
        lanes += [lane for bundle in asked.bundles for lane in bundle_lanes(asked, bundle)]
    return list(dict.fromkeys(lanes))


def _one(method: str, lane: Lane, asked: ContenderRequest) -> Contender:
    """The contender of one method in one lane."""
    name = f"{method}/{lane.runtime}/{lane.precision}"
    if lane.runtime in (TORCH, COMPILED_TORCH):
        return _torch(name, method, lane, asked)
    if lane.runtime == SD_CPP:
        return _sd_cpp(name, method, lane, asked)
    if lane.runtime not in BACKENDS:
        raise unknown_name("runtime", lane.runtime, {*BACKENDS, COMPILED_TORCH, SD_CPP})
    return _sampler_on_graphs(name, method, lane, asked)


def _bundle_contenders(asked: ContenderRequest) -> list[Contender]:
    titles = bundle_titles(asked.bundles)
    return [
        contender
        for title, bundle in zip(titles, asked.bundles, strict=True)
        for lane in bundle_lanes(asked, bundle)
        for contender in (
            [_student_bundle(title, bundle, lane, asked)]
            if bundle.manifest.plan.one_pass
            else _looped_bundle(title, bundle, lane, asked)
        )
    ]


def _student_bundle(title: str, bundle: Bundle, lane: Lane, asked: ContenderRequest) -> Contender:
    return Contender(
        name=f"{title}/{lane.runtime}/{lane.precision}",
        what=_bundle_what(bundle),
        settings=GraphSettings(
            bundle=str(bundle.root),
            runtime=lane.runtime,
            precision=_asked_precision(lane),
            checkpoint=asked.checkpoint if lane.runtime == TORCH else None,
            base=asked.base if lane.runtime == TORCH else None,
            vae=asked.vae if lane.runtime == TORCH else None,
            **_common(asked),
        ),
    )


def _looped_bundle(
    title: str, bundle: Bundle, lane: Lane, asked: ContenderRequest
) -> list[Contender]:
    """A model in a loop: its own groups, the same one step at a time, and ordinary sampling."""
    plan, steps = plan_of(bundle), bundle.manifest.plan.rows
    missing = None
    if lane.runtime == TORCH:
        missing = "a bundle with a plan is measured on its graphs: use fifty-step/torch/fp32"
    elif CONTROLNET in bundle.manifest.graphs:
        missing = "it follows a picture, which is not measured"
    return [
        Contender(
            name=f"{title}{'' if loop == 'plan' else f'-{loop}'}/{lane.runtime}/{lane.precision}",
            what=f"Faster Diffusion, {steps} steps, {len(plan.passes)} key steps: {what}"
            if loop != "every-step"
            else f"{steps} steps with guidance: {what}",
            settings=FasterSettings(
                bundle=str(bundle.root),
                runtime=lane.runtime,
                loop=loop,
                precision=_asked_precision(lane),
                **_common(asked),
            ),
            missing=missing,
        )
        for loop, what in LOOPS.items()
    ]


def bundle_titles(bundles: Sequence[Bundle]) -> list[str]:
    """Each bundle's folder name, with its parent's where two are alike."""
    names = [bundle.root.name for bundle in bundles]
    titles = [
        name if names.count(name) == 1 else f"{bundle.root.parent.name}-{name}"
        for name, bundle in zip(names, bundles, strict=True)
    ]
    looped = [
        f"{title}-{loop}"
        for title, bundle in zip(titles, bundles, strict=True)
        if not bundle.manifest.plan.one_pass
        for loop in LOOPS
        if loop != "plan"
    ]
    taken = [*titles, *looped]
    if len(set(taken)) < len(taken) or set(taken) & {NAIVE, *SAMPLERS}:
        raise UsageError(
            f"the bundles would be called {', '.join(titles)}; expected names that tell them "
            "apart from each other and from the other contenders",
            "Give each bundle once, or rename its folder.",
        )
    return titles


def _bundle_what(bundle: Bundle) -> str:
    manifest = bundle.manifest
    hoisted = "naive decoder" if manifest.hoisted == "none" else f"hoisted ({manifest.hoisted})"
    merged = len(manifest.plan.merged_timesteps)
    rows = f"{manifest.plan.rows} rows" + (f" ({merged} merged)" if merged else "")
    return f"TiUE K={manifest.plan.steps}, {rows}, {hoisted}"


def _torch(name: str, method: str, lane: Lane, asked: ContenderRequest) -> Contender:
    rows = _ROWS.fullmatch(method)
    passes = SAMPLERS.get(method)
    if lane.precision not in _TORCH_PRECISIONS:
        raise unknown_name("precision of PyTorch", lane.precision, _TORCH_PRECISIONS)
    how = "PyTorch " + ("compiled" if lane.runtime == COMPILED_TORCH else "eager")
    what = f"TiUE K={rows[1]}, naive" if rows else "TiUE as the official code runs it"
    height, width = _size(asked)
    settings = TorchSettings(
        checkpoint=asked.checkpoint,
        base=asked.base,
        vae=asked.vae,
        precision=lane.precision,
        compiled=lane.runtime == COMPILED_TORCH,
        steps=int(rows[1]) if rows else None,
        height=height,
        width=width,
        batch=_batch(asked),
        **_common(asked),
    )
    if passes is not None:
        settings = replace(
            settings, cache_interval=passes.cache_interval, **_counted_passes(passes)
        )
    return Contender(
        name=name,
        what=f"{what if passes is None else passes.what}, {how}",
        settings=settings,
        missing=_no_checkpoint(asked) or _no_deepcache(passes),
    )


def _sd_cpp(name: str, method: str, lane: Lane, asked: ContenderRequest) -> Contender:
    if method not in SAMPLERS or SAMPLERS[method].cache_interval:
        raise UsageError(
            f"stable-diffusion.cpp cannot run {method!r}: it knows ordinary UNet passes only",
            f"Use one of {', '.join(n for n, p in SAMPLERS.items() if not p.cache_interval)}.",
        )
    if lane.precision not in _SD_CPP_PRECISIONS:
        raise unknown_name("weights of stable-diffusion.cpp", lane.precision, _SD_CPP_PRECISIONS)
    missing = _no_checkpoint(asked)
    if asked.device not in ("auto", "cpu"):
        missing = f"stable-diffusion.cpp is measured on the CPU only, not on {asked.device}"
    elif missing_modules(("stable_diffusion_cpp",)):
        missing = (
            "stable-diffusion.cpp is not installed (pip install stable-diffusion-cpp-python "
            "builds it from source)"
        )
    height, width = _size(asked)
    return Contender(
        name=name,
        what=f"{SAMPLERS[method].what}, stable-diffusion.cpp",
        settings=SdCppSettings(
            checkpoint=asked.checkpoint,
            vae=asked.vae,
            weights=lane.precision,
            height=height,
            width=width,
            **_counted_passes(SAMPLERS[method]),
            **_common(asked),
        ),
        missing=missing,
    )


def _sampler_on_graphs(name: str, method: str, lane: Lane, asked: ContenderRequest) -> Contender:
    """Ordinary UNet passes as graphs: a bundle whose decoder has a single row, run several times.

    A student's encoder with one decoder row is the UNet itself, so a one-step bundle is an
    ordinary bundle, made by the ordinary export (`MadeBundle`).
    """
    if method not in SAMPLERS:
        raise UsageError(
            f"{name}: {method} is measured in PyTorch only",
            f"Use {method}/torch/fp32, or export a bundle and give it.",
        )
    passes = SAMPLERS[method]
    if passes.cache_interval:
        raise UsageError(f"{name}: DeepCache runs in PyTorch only", "Use deepcache/torch/fp32.")
    return Contender(
        name=name,
        what=f"{passes.what}, as graphs",
        settings=GraphSettings(
            bundle=None,
            runtime=lane.runtime,
            precision=_asked_precision(lane),
            **_counted_passes(passes),
            **_common(asked),
        ),
        made=_one_step_bundles(passes, lane, asked),
        missing=_no_checkpoint(asked) or _no_graphs(lane),
    )


def _one_step_bundles(passes: Passes, lane: Lane, asked: ContenderRequest) -> dict[str, MadeBundle]:
    if asked.checkpoint is None:
        return {}
    height, width = _size(asked)
    chooses = BACKENDS[lane.runtime].chooses_precision
    whole = MadeBundle(
        checkpoint=asked.checkpoint,
        base=asked.base,
        vae=asked.vae,
        one_step=True,
        precision="fp32" if chooses else lane.precision,
        height=height,
        width=width,
        batch=_batch(asked),
        unet_only=asked.unet_only,
        forms=(lane.runtime,) if BACKENDS[lane.runtime].exporter else (),
    )
    if not passes.guided:
        return {"bundle": whole}
    pairs = replace(whole, batch=2 * whole.batch, unet_only=True)
    return {"bundle": whole, "unet_bundle": pairs}


def _no_checkpoint(asked: ContenderRequest) -> str | None:
    return None if asked.checkpoint is not None else "it needs the weights: give --ckpt"


def _no_deepcache(passes: Passes | None) -> str | None:
    if passes is None or not passes.cache_interval or not missing_modules(("DeepCache",)):
        return None
    return "DeepCache is not installed (pip install DeepCache)"


def _no_graphs(lane: Lane) -> str | None:
    made_for = [name for name, entry in BACKENDS.items() if entry.made_by_bench]
    if lane.runtime in made_for:
        return None
    return f"ordinary UNet passes are made for {' and '.join(made_for)}, not for {lane.runtime}"


class _Common(TypedDict):
    device: str
    threads: int | None
    unet_only: bool


def _common(asked: ContenderRequest) -> _Common:
    return {"device": asked.device, "threads": asked.threads, "unet_only": asked.unet_only}


class _Counted(TypedDict):
    passes: int
    timed_passes: int
    guided: bool


def _counted_passes(passes: Passes) -> _Counted:
    return {"passes": passes.total, "timed_passes": passes.timed, "guided": passes.guided}


def _size(asked: ContenderRequest) -> tuple[int | None, int | None]:
    """Height and width in pixels: as asked, or the first bundle's."""
    if not asked.bundles:
        return asked.height, asked.width
    manifest = asked.bundles[0].manifest
    return asked.height or manifest.height_px, asked.width or manifest.width_px


def _batch(asked: ContenderRequest) -> int:
    return (asked.bundles[0].manifest.batch or 1) if asked.bundles else 1


def _usable_runtimes(bundle: Bundle) -> tuple[str, ...]:
    """Every runtime that a bundle has a form for and that a machine like this one draws with.

    ONNX Runtime where there is none, for the reason's sake.
    """
    found = [
        name
        for name, entry in BACKENDS.items()
        if entry.automatic and _has_form(bundle, name) and not missing_modules(entry.needs)
    ]
    return tuple(found) or (_WITHOUT_FORM,)


def _has_form(bundle: Bundle, runtime: str) -> bool:
    """Whether it holds what a runtime draws with: a compiled form, or its ONNX files."""
    folders = BACKENDS[runtime].folders
    if not folders:
        return bundle.manifest.has_onnx
    return any(folder in bundle.manifest.compiled for folder in folders)


def _precisions(runtime: str, bundle: Bundle, asked: ContenderRequest) -> tuple[str, ...]:
    if runtime == TORCH:
        return ("fp32",)
    if runtime not in BACKENDS:
        raise unknown_name("runtime", runtime, BACKENDS)
    if not BACKENDS[runtime].chooses_precision:
        return (bundle.manifest.precision,)
    return asked.precisions or _native_precisions(runtime, asked.device)


def _native_precisions(runtime: str, device: str) -> tuple[str, ...]:
    """What this processor computes in: OpenVINO's bf16 is native on some; else the form's own."""
    if device not in ("auto", "cpu") or missing_modules(BACKENDS[runtime].needs):
        return ("auto",)
    return native_precisions(runtime)


def _asked_precision(lane: Lane) -> str:
    """What `RuntimeOptions.precision` must be: only some runtimes can be told."""
    return lane.precision if BACKENDS[lane.runtime].chooses_precision else "auto"
