"""What a Core ML export is made for: profiles of devices, compressions, targets, and the plan.

Data and its checks only, nothing heavy is imported: a wrong word is refused before any work.
`docs/apple.md` tells the same table in prose.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from tiue_export.errors import UsageError, unknown_name
from tiue_export.registry.support import check_options
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, UNET_GRAPHS

# Oldest first. coremltools calls a deployment target by its iOS release; macOS ships the same.
TARGETS = ("iOS16", "iOS17", "iOS18")
_MACOS = {"macos13": "iOS16", "macos14": "iOS17", "macos15": "iOS18"}
ATTENTIONS = ("sdpa", "split", "split-chunked")
LINEARS = ("linear", "conv")
DECODER_BATCHES = (1, 2, 4)
PRECISIONS = ("fp16", "fp32")
COMPUTE_UNITS = ("ALL", "CPU_AND_GPU", "CPU_AND_NE", "CPU_ONLY")
RECIPE = "recipe"
# After these the next step up is weights in half precision.
_EIGHT_BITS = ("palettize-8", "palettize-8-grouped", "int8")
# coremltools' guide, "Bisect Model": on iPhone's Neural Engine a model cannot exceed 1 GB.
NEURAL_ENGINE_LIMIT_BYTES = 1_000_000_000


@dataclass(frozen=True)
class Compression:
    """One way of storing weights. `gate` is a key of `GATES_PSNR_DB` (proof/gates.py).

    `group` is the number of output channels that share a palette, or of input weights that share a
    scale; 0 for a palette per tensor or a scale per channel.
    """

    name: str
    kind: str  # none, palettize, linear, w8a8 or recipe
    bits: int
    gate: str
    least_target: str = "iOS16"
    group: int = 0


COMPRESSIONS: Mapping[str, Compression] = {
    each.name: each
    for each in (
        Compression("none", "none", 16, "fp16"),
        Compression("palettize-8", "palettize", 8, "int8-weights"),
        Compression("palettize-6", "palettize", 6, "lut6"),
        Compression("palettize-4", "palettize", 4, "4-bit"),
        Compression("palettize-8-grouped", "palettize", 8, "int8-weights", "iOS18", group=16),
        Compression("palettize-6-grouped", "palettize", 6, "lut6", "iOS18", group=16),
        Compression("palettize-4-grouped", "palettize", 4, "4-bit", "iOS18", group=16),
        Compression("int8", "linear", 8, "int8-weights"),
        Compression("int4", "linear", 4, "4-bit", "iOS18", group=32),
        Compression("w8a8", "w8a8", 8, "w8a8", "iOS17"),
        # Bits per layer, from a file or searched for; a chosen target replaces the gate.
        Compression(RECIPE, "recipe", 6, "4-bit"),
    )
}


@dataclass(frozen=True)
class Profile:
    """Settings that belong together on one kind of device, each with its reason.

    `limit_bytes` is the most that one graph's weights may take there.
    """

    name: str
    devices: str
    target: str
    attention: str
    linear: str
    decoder_batch: int
    compress: str
    compute_unit: str
    reasons: Mapping[str, str]
    limit_bytes: int | None = None


PROFILES: Mapping[str, Profile] = {
    "mac-gpu": Profile(
        "mac-gpu",
        "Macs with a Pro, Max or Ultra chip",
        target="iOS18",
        attention="sdpa",
        linear="linear",
        decoder_batch=4,
        compress="none",
        compute_unit="CPU_AND_GPU",
        reasons={
            "target": "fused attention exists from macOS 15 on",
            "attention": "fused: the scores of 4 rows (0.7 to 1.1 GB a layer) are never stored",
            "linear": "the GPU multiplies matrices as they are",
            "decoder_batch": "all rows at once fill a large GPU",
            "compress": "a GPU gains no speed from palettes, and a Mac has the memory",
            "compute_unit": "measured by others faster than the Neural Engine on large GPUs",
        },
    ),
    "mac-ane": Profile(
        "mac-ane",
        "Macs with a base chip: Air, mini",
        target="iOS17",
        attention="split",
        linear="conv",
        decoder_batch=2,
        compress="palettize-8",
        compute_unit="CPU_AND_NE",
        reasons={
            "target": "the newest without reported faults on the Neural Engine",
            "attention": "one head at a time, as the Neural Engine has no fused attention",
            "linear": "channels-first 1x1 convolutions are what the Neural Engine computes",
            "decoder_batch": "Apple ships batch 2 on the Neural Engine; larger ones are unproven",
            "compress": "half the memory traffic for no visible loss",
            "compute_unit": "the Neural Engine needs a fraction of the GPU's energy",
        },
    ),
    "ipad": Profile(
        "ipad",
        "iPads with an M chip",
        target="iOS17",
        attention="split",
        linear="conv",
        decoder_batch=2,
        compress="palettize-6",
        compute_unit="CPU_AND_NE",
        limit_bytes=NEURAL_ENGINE_LIMIT_BYTES,
        reasons={
            "target": "palettes are decompressed while running, not at load, from iOS 17 on",
            "attention": "one head at a time, as the Neural Engine has no fused attention",
            "linear": "channels-first 1x1 convolutions are what the Neural Engine computes",
            "decoder_batch": "Apple ships batch 2 on the Neural Engine",
            "compress": "6 bits is the least that Apple recommends for Stable Diffusion",
            "compute_unit": "the GPU is the screen's, and the Neural Engine spares the battery",
        },
    ),
    "iphone": Profile(
        "iphone",
        "iPhone 12 and newer",
        target="iOS17",
        attention="split-chunked",
        linear="conv",
        decoder_batch=2,
        compress="palettize-6",
        compute_unit="CPU_AND_NE",
        limit_bytes=NEURAL_ENGINE_LIMIT_BYTES,
        reasons={
            "target": "palettes are decompressed while running, not at load, from iOS 17 on",
            "attention": "512 queries at a time: 10 to 30 % faster on phones by Apple's measure",
            "linear": "channels-first 1x1 convolutions are what the Neural Engine computes",
            "decoder_batch": "what guidance runs in Apple's own app; 1 if memory is short",
            "compress": "a half-precision decoder is larger than the Neural Engine's 1 GB",
            "compute_unit": "the GPU is the screen's, and the Neural Engine spares the battery",
        },
    ),
}


@dataclass(frozen=True)
class CoremlOptions:
    """What the user asked for; None is the profile's own setting.

    `sizes` are (height, width) in pixels, the bundle's own size when empty. `target_psnr_db` or
    `target_mb` (of both UNet graphs) asks for a recipe to be searched for; `recipe` is one, as
    `MixedRecipe` writes it: bits by graph and weight. `prompts` calibrate activations (w8a8).
    """

    profile: str = "mac-gpu"
    target: str | None = None
    attention: str | None = None
    linear: str | None = None
    decoder_batch: int | None = None
    precision: str = "fp16"
    compress: str | None = None
    compute_unit: str | None = None
    sizes: tuple[tuple[int, int], ...] = ()
    target_psnr_db: float | None = None
    target_mb: float | None = None
    recipe: Mapping[str, Mapping[str, int]] = field(default_factory=dict)
    prompts: tuple[str, ...] = ()
    swift_bundle: bool = False


@dataclass(frozen=True)
class CoremlPlan:
    """What will be made: every choice named and checked. `target` is coremltools' iOS name."""

    profile: str
    target: str
    attention: str
    linear: str
    decoder_batch: int
    precision: str
    compress: str
    compute_unit: str
    limit_bytes: int | None = None

    def compression_of(self, graph: str) -> Compression:
        """The VAE is never compressed, and only the UNet's activations are ever quantized.

        The VAE is small and its errors are seen directly; Apple's converter leaves it too. The
        text encoder keeps 8 bits: at 6, 23 layers of SD 2.1's shape came to 38.5 dB, gate 40.
        """
        whole = COMPRESSIONS[self.compress]
        if graph not in (TEXT_ENCODER, *UNET_GRAPHS):
            return COMPRESSIONS["none"]
        if graph == TEXT_ENCODER and (whole.kind in ("w8a8", "recipe") or whole.bits < 8):
            return COMPRESSIONS["palettize-8"]
        return whole

    def gate_of(self, graph: str) -> str:
        """The parity gate (a key of `GATES_PSNR_DB` (proof/gates.py)) of one graph."""
        compression = self.compression_of(graph)
        return self.precision if compression.kind == "none" else compression.gate


def plan_coreml(options: CoremlOptions) -> CoremlPlan:
    """Fill in the profile's settings and check that all of them go together."""
    profile = PROFILES[_named("profile", options.profile, PROFILES)]
    searched = options.target_psnr_db is not None or options.target_mb is not None
    compress = options.compress or (RECIPE if searched or options.recipe else profile.compress)
    if options.precision == "fp32" and options.compress is None and not searched:
        compress = "none"
    batch = profile.decoder_batch if options.decoder_batch is None else options.decoder_batch
    unit = options.compute_unit or profile.compute_unit
    plan = CoremlPlan(
        profile=profile.name,
        target=target_named(options.target or profile.target),
        attention=_named("attention", options.attention or profile.attention, ATTENTIONS),
        linear=_named("linear form", options.linear or profile.linear, LINEARS),
        decoder_batch=batch,
        precision=_named("precision", options.precision, PRECISIONS),
        compress=_named("compression", compress, COMPRESSIONS),
        compute_unit=_named("compute unit", unit.upper().replace("-", "_"), COMPUTE_UNITS),
        limit_bytes=profile.limit_bytes,
    )
    if batch not in DECODER_BATCHES:
        raise UsageError(f"--decoder-batch is {batch}; expected 1, 2 or 4")
    _check_together(plan, options)
    return plan


def _check_together(plan: CoremlPlan, options: CoremlOptions) -> None:
    compression = COMPRESSIONS[plan.compress]
    if TARGETS.index(plan.target) < TARGETS.index(compression.least_target):
        raise UsageError(
            f"{plan.compress} needs {compression.least_target} "
            f"({_macos_of(compression.least_target)}); the target is {plan.target}",
            f"Add --min-deployment-target {compression.least_target}, or choose another "
            "--compress.",
        )
    if len(options.sizes) > 1 and plan.target != "iOS18":
        raise UsageError(
            f"several sizes in one package need iOS18 (macOS 15); the target is {plan.target}",
            "Add --min-deployment-target iOS18, or export one size at a time.",
        )
    if plan.precision == "fp32" and compression.kind != "none":
        raise UsageError(
            f"{plan.compress} is for half precision; --precision is fp32",
            "Leave one of them out.",
        )
    if compression.kind == "w8a8" and not options.prompts:
        raise UsageError(
            "w8a8 quantizes activations and must see some: it got no calibration prompts",
            "Add --calibration-prompts FILE, a text file with one prompt a line (4 or more).",
        )
    if compression.kind != "w8a8" and options.prompts:
        raise UsageError(
            f"--calibration-prompts is for --compress w8a8; here it is {plan.compress}",
            "Leave it out.",
        )
    if options.target_psnr_db is not None and options.target_mb is not None:
        raise UsageError(
            "--target-psnr and --target-mb were both given; a recipe is searched for one of them"
        )
    goals = (options.target_psnr_db, options.target_mb, options.recipe or None)
    has_goal = any(goal is not None for goal in goals)
    if compression.kind == "recipe" and not has_goal:
        raise UsageError(
            "--compress recipe says nothing of what the recipe should be",
            "Add --target-psnr DB, --target-mb MB or --bits FILE.",
        )
    if compression.kind != "recipe" and has_goal:
        raise UsageError(
            f"a recipe sets the bits of each layer, and --compress is {plan.compress}",
            "Leave --compress out.",
        )


def gentler(plan: CoremlPlan, hops: Sequence[str]) -> dict[str, str | None]:
    """What to ask for in place of what lost too much, by option; nothing if all is whole.

    `hops` are those of the failed records, which end in how the weights were stored. Of the demo
    student (128 px, iphone) palettize-6 leaves 33.1 dB of its latents, and palettize-8 45.1 dB.
    """
    ends = {hop.rpartition(" ")[2] for hop in hops}
    stored = [name for name, each in COMPRESSIONS.items() if name in ends and each.bits < 16]
    if stored and stored[0] not in _EIGHT_BITS:
        return {"compress": "palettize-8"}
    if stored:
        return {"compress": "none"}
    return {} if plan.precision == "fp32" else {"precision": "fp32", "compress": None}


def check_loop(options: CoremlOptions) -> None:
    """Refuse what packages of a model that draws in several passes cannot be."""
    typed = {
        "several --size": len(set(options.sizes)) > 1,
        f"--compress {options.compress}": True,
        "--target-psnr": options.target_psnr_db is not None,
        "--target-mb": options.target_mb is not None,
        "--swift-bundle": options.swift_bundle,
    }
    check_options("coreml", (option for option, given in typed.items() if given), ("passes",))


def check_whole_decoder(decoder_batch: int, rows: int) -> None:
    """Refuse to cut the `rows` of a decoder in groups where none of it is hoisted."""
    if decoder_batch >= rows:
        return
    enough = [batch for batch in DECODER_BATCHES if batch >= rows]
    raise UsageError(
        f"--decoder-batch {decoder_batch} cuts the decoder's {rows} rows in groups, which needs "
        "their time-independent part hoisted; this bundle was exported with --no-hoist",
        "Export it without --no-hoist"
        + (f", or pass --decoder-batch {enough[0]}." if enough else "."),
    )


def check_limit(plan: CoremlPlan, graph: str, weights: int) -> None:
    """Refuse a graph of `weights` numbers that the profile's device cannot hold."""
    bits = 32 if plan.precision == "fp32" else plan.compression_of(graph).bits
    size_bytes = weights * bits // 8
    if plan.limit_bytes is None or size_bytes <= plan.limit_bytes:
        return
    other = UNET_ENCODER if graph == UNET_DECODER else graph
    raise UsageError(
        f"{graph} would take {size_bytes / 1e6:.0f} MB in {bits} bits; a model on the Neural "
        f"Engine of an iPhone or iPad is limited to {plan.limit_bytes / 1e6:.0f} MB",
        "Use --compress palettize-8 or palettize-6"
        + (
            f", or export the bundle with --hoist-into encoder, which moves weights to {other}."
            if graph == UNET_DECODER
            else "."
        ),
    )


def target_named(name: str) -> str:
    """coremltools' name of a deployment target: iOS17, ios17, macOS14 -> iOS17."""
    low = name.lower().replace(" ", "")
    found = _MACOS.get(low) or next((each for each in TARGETS if each.lower() == low), None)
    if found is None:
        macos = tuple(f"macOS{key.removeprefix('macos')}" for key in _MACOS)
        raise unknown_name("deployment target", name, (*TARGETS, *macos))
    return found


def size_named(text: str) -> tuple[int, int]:
    """ "512x768" -> (height, width) in pixels, height first as everywhere here."""
    found = re.fullmatch(r"(\d{1,5})[xX](\d{1,5})", text)
    if not found:
        raise UsageError(
            f"--size is {text!r}; expected HEIGHTxWIDTH in pixels", "For example: --size 512x768"
        )
    return int(found[1]), int(found[2])


def function_named(height: int, width: int) -> str:
    """The function of a package with several sizes that draws this size, in pixels."""
    return f"size_{height}x{width}"


def _named(kind: str, name: str, legal: Collection[str]) -> str:
    if name not in legal:
        raise unknown_name(kind, name, legal)
    return name


def _macos_of(target: str) -> str:
    number = next(key for key, value in _MACOS.items() if value == target).removeprefix("macos")
    return f"macOS {number}"
