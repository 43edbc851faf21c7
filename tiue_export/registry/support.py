"""What works with what: verb x feature, with the reason wherever something does not.

One table. Every refusal of a bundle or of an export for what it *is* comes from here, before any
work; docs/support.md is made of it, and one test walks it. What an option's own value cannot be
(a batch of 0) is refused where the option is.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import Bundle, vae_tile_px
from tiue_export.errors import UsageError
from tiue_export.specs import CONTROLNET, VAE_ENCODER

# What a bundle can be given to, beside the runtimes it draws on.
VERBS: Mapping[str, str] = {
    "onnx": "exporting",
    "openvino": "OpenVINO graphs",
    "trt": "TensorRT engines",
    "coreml": "Core ML packages",
    "coreai": "Core AI assets",
    "qnn": "Snapdragon contexts",
    "triton": "a Triton ensemble",
    "web": "a web page",
    "calibrate": "capturing for int8",
    "quantize": "int8 graphs",
    "cuda-graph": "recording a CUDA graph",
    "serve": "the server",
    "studio": "the studio",
    "bulk": "drawing a table of prompts",
}


@dataclass(frozen=True)
class Feature:
    """Something that a bundle may have. `phrase` follows the bundle's name: "NAME is tiled ..."."""

    title: str
    phrase: str
    of: Callable[[Manifest], bool]


def _is_quantized(manifest: Manifest) -> bool:
    float_precisions = ("fp32", "fp16", "bf16")
    return any(graph.precision not in float_precisions for graph in manifest.graphs.values())


FEATURES: Mapping[str, Feature] = {
    "passes": Feature(
        "several passes (Faster Diffusion, few steps)",
        "draws in a loop",
        lambda manifest: not manifest.plan.one_pass,
    ),
    "guidance": Feature(
        "guidance when drawing",
        "draws with guidance",
        lambda manifest: manifest.plan.guidance is not None,
    ),
    "fresh-noise": Feature(
        "fresh noise between passes",
        "draws fresh noise on the way",
        lambda manifest: manifest.plan.noises > 1,
    ),
    "controlnet": Feature(
        "ControlNet", "has a ControlNet", lambda manifest: CONTROLNET in manifest.graphs
    ),
    "merged": Feature(
        "merged rows (--merge-below)",
        "has merged rows",
        lambda manifest: bool(manifest.plan.merged_timesteps),
    ),
    "fan-out": Feature(
        "rows that part late (--fan-out)",
        "has rows that part late",
        lambda manifest: bool(manifest.plan.fan_out),
    ),
    "pieces": Feature(
        "a student's rows in pieces (--max-decoder-rows)",
        "runs its decoder in pieces",
        lambda manifest: manifest.plan.open_time and manifest.plan.max_decoder_rows is not None,
    ),
    "naive": Feature(
        "naive decoder (--no-hoist)",
        "was exported with --no-hoist",
        lambda manifest: manifest.hoisted == "none",
    ),
    "hoisted-into-encoder": Feature(
        "shared part in the encoder (--hoist-into encoder)",
        "has the shared part in its encoder",
        lambda manifest: manifest.hoisted == "encoder",
    ),
    "dynamic-batch": Feature(
        "open batch (--dynamic-batch)",
        "leaves its batch open",
        lambda manifest: manifest.batch is None,
    ),
    "tiles": Feature(
        "VAE in tiles (--vae-tile)",
        "decodes its pictures in tiles",
        lambda manifest: vae_tile_px(manifest) is not None,
    ),
    "vae-encoder": Feature(
        "VAE encoder beside the other graphs (--with-vae-encoder)",
        "has a VAE encoder",
        lambda manifest: VAE_ENCODER in manifest.graphs,
    ),
    "long-prompts": Feature(
        "long prompts (--max-prompt-tokens)",
        "takes long prompts",
        lambda manifest: manifest.text_chunks > 1,
    ),
    "islands": Feature(
        "float32 islands of an fp16 audit",
        "keeps modules in float32, which half precision cannot hold",
        lambda manifest: any(graph.float32_modules for graph in manifest.graphs.values()),
    ),
    "bf16": Feature(
        "VAE in bf16 (--vae-precision bf16)",
        "has a graph in bf16",
        lambda manifest: any(graph.precision == "bf16" for graph in manifest.graphs.values()),
    ),
    "int8": Feature("int8 graphs (quantize)", "is quantized already", _is_quantized),
    "without-onnx": Feature(
        "no ONNX files (pack --runtime, coreml --ckpt, coreai --ckpt)",
        "has no ONNX files",
        lambda manifest: not manifest.has_onnx,
    ),
}


@dataclass(frozen=True)
class Refusal:
    """Why some verbs cannot take a bundle that has all of `features`; `next_step` leads out."""

    verbs: tuple[str, ...]
    features: tuple[str, ...]
    reason: str
    next_step: str


REFUSALS: tuple[Refusal, ...] = (
    Refusal(
        ("onnx",),
        ("passes", "dynamic-batch"),
        "there the decoder's rows are the open axis",
        "Give --batch N, without --dynamic-batch.",
    ),
    Refusal(
        ("onnx",),
        ("passes", "merged"),
        "between passes every row counts",
        "Leave --merge-below out.",
    ),
    Refusal(
        ("onnx",),
        ("passes", "fan-out"),
        "between passes every row counts",
        "Leave --fan-out out.",
    ),
    Refusal(
        ("onnx",),
        ("controlnet", "hoisted-into-encoder"),
        "a ControlNet adds to features that --hoist-into encoder does not hand out",
        "Leave --hoist-into out.",
    ),
    Refusal(
        ("triton",),
        ("controlnet",),
        "nothing there adds its residuals to the encoder's features",
        'Draw one by one: tiue-export generate BUNDLE "a red fox" --control PICTURE',
    ),
    Refusal(
        ("calibrate", "quantize"),
        ("guidance",),
        "guidance doubles the rows, and each scale feeds them another distribution; ranges are "
        "captured from students, which draw without",
        "Quantize the bundle of a student, in one pass or in a few.",
    ),
    Refusal(
        ("cuda-graph",),
        ("passes",),
        "one recording is one pass, and its batches differ",
        "Leave --cuda-graph out.",
    ),
    Refusal(
        ("coreml", "coreai"),
        ("controlnet",),
        "packages of a loop come without one",
        "ONNX Runtime, OpenVINO and TensorRT run it.",
    ),
    Refusal(
        ("serve", "studio", "bulk"),
        ("controlnet",),
        "each picture follows another, and there is no way to hand that over",
        'Draw one by one: tiue-export generate BUNDLE "a red fox" --control PICTURE',
    ),
    Refusal(
        ("web",),
        ("controlnet",),
        "a page has no way to hand its picture over",
        'Draw one by one: tiue-export generate BUNDLE "a red fox" --control PICTURE',
    ),
    Refusal(
        ("triton", "web"),
        ("tiles",),
        "nothing there puts tiles together",
        "Export again without --vae-tile.",
    ),
    Refusal(
        ("triton",),
        ("bf16",),
        "ONNX Runtime does not compute in bf16",
        "Export with --vae-precision fp16 or fp32, or pass --backend tensorrt.",
    ),
    Refusal(
        ("calibrate", "quantize"),
        ("int8",),
        "ranges are those of float graphs",
        "Quantize the float bundle it was made from.",
    ),
    Refusal(
        ("coreml", "coreai", "triton", "calibrate", "quantize"),
        ("pieces",),
        "that is for compilers that cannot take all rows at once",
        "Export again without --max-decoder-rows.",
    ),
    Refusal(
        ("web",),
        ("dynamic-batch",),
        "it draws one by one, and a graph of one size is the faster one",
        "Export again without --dynamic-batch.",
    ),
    Refusal(
        ("web",),
        ("bf16",),
        "no browser computes in bf16",
        "Export with --vae-precision fp16 or fp32.",
    ),
    Refusal(
        ("qnn",),
        ("dynamic-batch",),
        "an HTP has no open axes",
        "Export again without --dynamic-batch.",
    ),
    Refusal(
        ("qnn",),
        ("bf16",),
        "an HTP does not compute in bf16",
        "Export with --vae-precision fp16 or fp32.",
    ),
    Refusal(
        ("qnn",),
        ("int8",),
        "contexts are made of float graphs, and --precision w8a16 quantizes those",
        "Compile the float bundle it was made from.",
    ),
    Refusal(
        ("openvino", "trt", "qnn", "triton", "web", "calibrate", "quantize"),
        ("without-onnx",),
        "ONNX files are what it starts from",
        "Take the bundle it was packed from, or make one: tiue-export onnx --ckpt STUDENT --out "
        "BUNDLE",
    ),
)


@dataclass(frozen=True)
class OptionRefusal:
    """Why an option, as it is typed, means nothing to some verbs; with all of `features` if any."""

    verbs: tuple[str, ...]
    option: str
    reason: str
    features: tuple[str, ...] = ()


_APPLE = ("coreml", "coreai")
OPTION_REFUSALS: tuple[OptionRefusal, ...] = (
    OptionRefusal(_APPLE, "--upsampling", "their graphs upsample as the model does"),
    OptionRefusal(_APPLE, "--vae-precision", "their graphs have one precision, --precision"),
    OptionRefusal(_APPLE, "--no-audit", "they are made of the float32 student"),
    OptionRefusal(_APPLE, "--audit-prompts", "they are made of the float32 student"),
    OptionRefusal(_APPLE, "--dynamic-batch", "they are made for one batch"),
    OptionRefusal(("coreml",), "--max-decoder-rows", "--decoder-batch bounds their decoder"),
    *(
        OptionRefusal(("coreml",), option, reason, ("passes",))
        for option, reason in (
            ("several --size", "those of a loop have one size"),
            ("--compress w8a8", "ranges are captured from distilled students"),
            ("--target-psnr", "bits are chosen by the latents of one pass"),
            ("--target-mb", "bits are chosen by the latents of one pass"),
            ("--swift-bundle", "the Swift program draws in one pass"),
        )
    ),
    OptionRefusal(
        ("coreml",),
        "--swift-bundle",
        "the Swift program lays a prompt out in one chunk",
        ("long-prompts",),
    ),
)


def features_of(manifest: Manifest) -> frozenset[str]:
    """Names of the features that a bundle has."""
    return frozenset(name for name, feature in FEATURES.items() if feature.of(manifest))


def refusal_of(verb: str, features: Iterable[str]) -> Refusal | None:
    """Why a verb cannot take a bundle with these features; None where it can."""
    present = set(features)
    for refusal in REFUSALS:
        if verb in refusal.verbs and present >= set(refusal.features):
            return refusal
    return None


def check_support(verb: str, features: Iterable[str], name: str) -> None:
    """Raise `UsageError` where a verb cannot take what `name` is."""
    refusal = refusal_of(verb, features)
    if refusal is not None:
        phrase = " and ".join(FEATURES[feature].phrase for feature in refusal.features)
        raise UsageError(
            f"{name} {phrase}, which does not go with {VERBS[verb]}: {refusal.reason}",
            refusal.next_step,
        )


def check_options(verb: str, options: Iterable[str], features: Iterable[str] = ()) -> None:
    """Raise `UsageError` for an option, as it was typed, that means nothing to a verb."""
    typed, present = set(options), set(features)
    for refusal in OPTION_REFUSALS:
        if verb in refusal.verbs and refusal.option in typed and present >= set(refusal.features):
            phrase = " and ".join(FEATURES[feature].phrase for feature in refusal.features)
            of_what = f" of what {phrase}" if phrase else ""
            raise UsageError(
                f"{refusal.option} is not for {VERBS[verb]}{of_what}: {refusal.reason}",
                "Leave it out.",
            )


def require_support(verb: str, bundle: Bundle) -> None:
    """Raise `UsageError` where a verb cannot take a bundle."""
    check_support(verb, features_of(bundle.manifest), str(bundle.root))
