"""Who takes part: from the names on the command line to what each worker process is to open.

A name is METHOD/RUNTIME/PRECISION; for a bundle its folder stands for the method. Two measurements
that carry the same name mean the same thing.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from tiue_export.errors import UsageError, unknown_name
from tiue_export.proof.latency_request import ContenderRequest
from tiue_export.registry.backends import BACKENDS, native_precisions
from tiue_export.registry.packages import missing_modules
from tiue_export.specs import CONTROLNET
from tiue_export.system.command_line import command_line

from .loop_session import LOOPS, plan_of
from .made_bundle import MadeBundle
from .settings import (
    GraphSettings,
    LoopSettings,
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
# DeepCache's own example: the whole UNet at every third step, its outermost layers between.
_CACHE_INTERVAL = 3
_WITHOUT_FORM = "ort"  # runs the ONNX graphs as they are
_FULL_NAME = "METHOD/RUNTIME/PRECISION, such as one-step/torch/fp32"
# What METHOD/RUNTIME means without a precision, where no bundle decides it.
_USUAL_PRECISION = {TORCH: "fp32", COMPILED_TORCH: "fp32", SD_CPP: "f16"}


@dataclass(frozen=True)
class Passes:
    """A sampler of ordinary UNet passes; `settings` are those of `PassSettings`.

    `cache_interval`: DeepCache runs the whole UNet at every so many passes; 0 is without.
    """

    what: str
    settings: Mapping[str, Any]
    cache_interval: int = 0


_GUIDED = {"passes": 50, "timed_passes": 3, "guided": True}
SAMPLERS: Mapping[str, Passes] = {
    "one-step": Passes(
        "1-step model (SD-Turbo, SwiftBrush): 1 UNet pass", {"passes": 1, "timed_passes": 1}
    ),
    "four-step": Passes(
        "4-step model (SD-Turbo, LCM): 4 UNet passes", {"passes": 4, "timed_passes": 4}
    ),
    "fifty-step": Passes(
        "50 steps with guidance: 3 passes timed at batch 2, scaled to 50", _GUIDED
    ),
    "deepcache": Passes(
        f"50 steps with guidance by DeepCache, interval {_CACHE_INTERVAL}: "
        "3 passes timed at batch 2, scaled to 50",
        _GUIDED,
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
    "official", "torch-bf16", "torch-compile", BUNDLES, "rows-2", "rows-8", "rows-16", "one-step",
    "four-step", "fifty-step/torch/fp32", "deepcache/torch/fp32", "sd-cpp",
)  # fmt: skip


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

    def name(self, method: str) -> str:
        """The full name of a method in this lane."""
        return f"{method}/{self.runtime}/{self.precision}"


def expand(asked: ContenderRequest) -> list[Contender]:
    """All contenders, in the order they were asked for; the first is what ratios are taken to."""
    chosen = asked.contenders or (WITHOUT_CHECKPOINT if asked.checkpoint is None else USUAL)
    found: dict[str, Contender] = {}
    for name in EVERY if "all" in chosen else chosen:
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


def _lanes(method: str, parts: Sequence[str], asked: ContenderRequest) -> list[Lane]:
    """The lanes that METHOD, METHOD/RUNTIME or METHOD/RUNTIME/PRECISION stands for."""
    if len(parts) == 2:
        return [Lane(*parts)]
    if parts:
        (runtime,) = parts
        precisions: tuple[str, ...] = (_USUAL_PRECISION.get(runtime, "fp32"),)
        if runtime not in _USUAL_PRECISION and asked.bundles:
            precisions = _precisions(runtime, asked.bundles[0], asked)
        return [Lane(runtime, precision) for precision in precisions]
    lanes = [Lane(TORCH, "fp32")]
    if method in SAMPLERS and not SAMPLERS[method].cache_interval:
        lanes += [lane for bundle in asked.bundles for lane in bundle_lanes(asked, bundle)]
    return list(dict.fromkeys(lanes))


def _one(method: str, lane: Lane, asked: ContenderRequest) -> Contender:
    """The contender of one method in one lane."""
    if lane.runtime in (TORCH, COMPILED_TORCH):
        return _torch(method, lane, asked)
    if lane.runtime == SD_CPP:
        return _sd_cpp(method, lane, asked)
    if lane.runtime not in BACKENDS:
        raise unknown_name("runtime", lane.runtime, {*BACKENDS, COMPILED_TORCH, SD_CPP})
    return _sampler_on_graphs(method, lane, asked)


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
    weights = _weights(asked) if lane.runtime == TORCH else {}
    settings = GraphSettings(bundle=str(bundle.root), **weights, **_on_graphs(lane, asked))
    return Contender(lane.name(title), _bundle_what(bundle), settings)


def _looped_bundle(
    title: str, bundle: Bundle, lane: Lane, asked: ContenderRequest
) -> list[Contender]:
    """A model in a loop: its own groups, the same one step at a time, and ordinary sampling.

    A few-step student is drawn as it is, and no other way.
    """
    plan, steps = plan_of(bundle), bundle.manifest.plan.rows
    missing = None
    if lane.runtime == TORCH:
        missing = "a bundle with a plan is measured on its graphs: use fifty-step/torch/fp32"
    elif CONTROLNET in bundle.manifest.graphs:
        missing = "it follows a picture, which is not measured"
    head = f"Faster Diffusion, {steps} steps, {len(plan.passes)} key steps"
    if plan.recipe:
        head = f"{plan.recipe}, {steps} steps, {len(plan.passes)} encoder runs"
    heads = {"every-step": f"{steps} steps with guidance"}
    on_graphs = _on_graphs(lane, asked)
    return [
        Contender(
            name=lane.name(_loop_title(title, loop)),
            what=f"{heads.get(loop, head)}: {what}",
            settings=LoopSettings(bundle=str(bundle.root), loop=loop, **on_graphs),
            missing=missing,
        )
        for loop, what in _loops_of(bundle).items()
    ]


def _loops_of(bundle: Bundle) -> Mapping[str, str]:
    plan = bundle.manifest.plan
    if plan.one_pass or plan.recipe:
        return {"plan": "every step drawn"}
    return LOOPS


def _loop_title(title: str, loop: str) -> str:
    return title if loop == "plan" else f"{title}-{loop}"


def bundle_titles(bundles: Sequence[Bundle]) -> list[str]:
    """Each bundle's folder name, with its parent's where two are alike."""
    names = [bundle.root.name for bundle in bundles]
    titles = [
        name if names.count(name) == 1 else f"{bundle.root.parent.name}-{name}"
        for name, bundle in zip(names, bundles, strict=True)
    ]
    taken = [
        _loop_title(title, loop)
        for title, bundle in zip(titles, bundles, strict=True)
        for loop in _loops_of(bundle)
    ]
    if len(set(taken)) < len(taken) or set(taken) & {NAIVE, *SAMPLERS}:
        raise UsageError(
            f"the bundles would be called {', '.join(titles)}; expected names that tell them "
            "apart from each other and from the other contenders",
            "Give each bundle once, or rename its folder.",
        )
    return titles


def _bundle_what(bundle: Bundle) -> str:
    manifest = bundle.manifest
    if manifest.plan.recipe:
        return f"{manifest.plan.recipe}, one pass, {manifest.plan.rows} rows"
    hoisted = "naive decoder" if manifest.hoisted == "none" else f"hoisted ({manifest.hoisted})"
    merged = len(manifest.plan.merged_timesteps)
    rows = f"{manifest.plan.rows} rows" + (f" ({merged} merged)" if merged else "")
    parts = f", fan-out {manifest.plan.fan_out}" if manifest.plan.fan_out else ""
    return f"TiUE K={manifest.plan.steps}, {rows}{parts}, {hoisted}"


def _torch(method: str, lane: Lane, asked: ContenderRequest) -> Contender:
    if lane.precision not in _TORCH_PRECISIONS:
        raise unknown_name("precision of PyTorch", lane.precision, _TORCH_PRECISIONS)
    what = "TiUE as the official code runs it"
    counted: dict[str, Any] = {}
    missing = _no_checkpoint(asked)
    if rows := _ROWS.fullmatch(method):
        what, counted = f"TiUE K={rows[1]}, naive", {"steps": int(rows[1])}
    elif passes := SAMPLERS.get(method):
        what, counted = passes.what, {**passes.settings, "cache_interval": passes.cache_interval}
        if passes.cache_interval and missing_modules(("DeepCache",)):
            missing = missing or "DeepCache is not installed (pip install DeepCache)"
    compiled = lane.runtime == COMPILED_TORCH
    return Contender(
        name=lane.name(method),
        what=f"{what}, PyTorch {'compiled' if compiled else 'eager'}",
        settings=TorchSettings(
            precision=lane.precision,
            compiled=compiled,
            **counted,
            **_weights(asked),
            **_shape(asked),
            **_common(asked),
        ),
        missing=missing,
    )


def _sd_cpp(method: str, lane: Lane, asked: ContenderRequest) -> Contender:
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
    shape = _shape(asked)
    settings = SdCppSettings(
        checkpoint=asked.checkpoint,
        vae=asked.vae,
        weights=lane.precision,
        height=shape["height"],
        width=shape["width"],
        **SAMPLERS[method].settings,
        **_common(asked),
    )
    what = f"{SAMPLERS[method].what}, stable-diffusion.cpp"
    return Contender(lane.name(method), what, settings, missing=missing)


def _sampler_on_graphs(method: str, lane: Lane, asked: ContenderRequest) -> Contender:
    """Ordinary UNet passes as graphs: a few-step bundle of these weights (`MadeBundle`).

    Fifty steps with guidance are the one-step bundle's graphs, run several times.
    """
    name = lane.name(method)
    if method not in SAMPLERS:
        raise UsageError(
            f"{name}: {method} is measured in PyTorch only",
            f"Use {method}/torch/fp32, or export a bundle and give it.",
        )
    passes = SAMPLERS[method]
    if passes.cache_interval:
        raise UsageError(f"{name}: DeepCache runs in PyTorch only", "Use deepcache/torch/fp32.")
    missing = _no_checkpoint(asked)
    made_for = [runtime for runtime, entry in BACKENDS.items() if entry.made_by_bench]
    if missing is None and lane.runtime not in made_for:
        listed = " and ".join(made_for)
        missing = f"ordinary UNet passes are made for {listed}, not for {lane.runtime}"
    on_graphs, settings = _on_graphs(lane, asked), dict(passes.settings)
    if not settings.get("guided") and settings["passes"] > 1:
        opened: SessionSettings = LoopSettings(bundle=None, loop="plan", **on_graphs)
    else:
        opened = GraphSettings(bundle=None, **settings, **on_graphs)
    return Contender(
        name=name,
        what=f"{passes.what}, as graphs",
        settings=opened,
        made=_made_bundles(passes, lane, asked),
        missing=missing,
    )


def _made_bundles(passes: Passes, lane: Lane, asked: ContenderRequest) -> dict[str, MadeBundle]:
    if asked.checkpoint is None:
        return {}
    backend, guided = BACKENDS[lane.runtime], passes.settings.get("guided")
    whole = MadeBundle(
        turbo_steps=1 if guided else passes.settings["passes"],
        precision="fp32" if backend.chooses_precision else lane.precision,
        unet_only=asked.unet_only,
        forms=(lane.runtime,) if backend.exporter else (),
        **_weights(asked),
        **_shape(asked),
    )
    if not guided:
        return {"bundle": whole}
    return {"bundle": whole, "unet_bundle": replace(whole, batch=2 * whole.batch, unet_only=True)}


def _no_checkpoint(asked: ContenderRequest) -> str | None:
    return None if asked.checkpoint is not None else "it needs the weights: give --ckpt"


def _common(asked: ContenderRequest) -> dict[str, Any]:
    """What every session's settings have."""
    return {"device": asked.device, "threads": asked.threads, "unet_only": asked.unet_only}


def _on_graphs(lane: Lane, asked: ContenderRequest) -> dict[str, Any]:
    """What the settings of sessions on a runtime have; only some can be told a precision."""
    entry = BACKENDS[lane.runtime]
    if entry.emulated:
        raise UsageError(
            f"bench measures time, and the {entry.title} is emulated here: {lane.runtime} takes "
            "many times as long as on the device",
            "Measure on the device. Here its numbers can be proven: "
            + command_line(
                "parity", *[b.root for b in asked.bundles[:1]], "--runtime", lane.runtime
            ),
        )
    precision = lane.precision if entry.chooses_precision else "auto"
    return {"runtime": lane.runtime, "precision": precision, **_common(asked)}


def _weights(asked: ContenderRequest) -> dict[str, Any]:
    return {"checkpoint": asked.checkpoint, "base": asked.base, "vae": asked.vae}


def _shape(asked: ContenderRequest) -> dict[str, Any]:
    """Height and width in pixels, as asked or the first bundle's, and the first bundle's batch."""
    if not asked.bundles:
        return {"height": asked.height, "width": asked.width, "batch": 1}
    manifest = asked.bundles[0].manifest
    height, width = asked.height or manifest.height_px, asked.width or manifest.width_px
    return {"height": height, "width": width, "batch": manifest.batch or 1}


def _usable_runtimes(bundle: Bundle) -> tuple[str, ...]:
    """Every runtime that a bundle has a form for and that a machine like this one draws with.

    ONNX Runtime where there is none, for the reason's sake.
    """
    manifest = bundle.manifest
    found = [
        name
        for name, entry in BACKENDS.items()
        if entry.automatic
        and (set(entry.folders) & set(manifest.compiled) if entry.folders else manifest.has_onnx)
        and not missing_modules(entry.needs)
    ]
    return tuple(found) or (_WITHOUT_FORM,)


def _precisions(runtime: str, bundle: Bundle, asked: ContenderRequest) -> tuple[str, ...]:
    """The bundle's, or those asked for, or what this processor computes in (OpenVINO's bf16 is
    native on some), where the runtime chooses; "auto" leaves it to the form."""
    if runtime == TORCH:
        return ("fp32",)
    if runtime not in BACKENDS:
        raise unknown_name("runtime", runtime, BACKENDS)
    entry = BACKENDS[runtime]
    if not entry.chooses_precision:
        return (bundle.manifest.precision,)
    if asked.precisions:
        return asked.precisions
    if asked.device not in ("auto", "cpu") or missing_modules(entry.needs):
        return ("auto",)
    return native_precisions(runtime)
