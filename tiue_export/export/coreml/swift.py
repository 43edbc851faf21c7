"""What a Swift program needs beside the packages: vocabulary, constants, and how to compile.

File and model names are those that Apple's own Swift package looks for (apple/ml-stable-diffusion:
TextEncoder.mlmodelc, VAEDecoder.mlmodelc, vocab.json, merges.txt).
"""

from __future__ import annotations

import json
import shutil
import warnings
from pathlib import Path

from tiue_export.bundle.read import Bundle
from tiue_export.errors import BundleError, TiueWarning
from tiue_export.export.coreml.profiles import CoremlPlan
from tiue_export.registry.support import check_options, features_of
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, VAE_DECODER, VAE_ENCODER

RESOURCES = "Resources"
SCRIPT = "compile.sh"
CONSTANTS = "tiue.json"
COMPILED_NAMES = {
    TEXT_ENCODER: "TextEncoder",
    UNET_ENCODER: "UnetEncoder",
    UNET_DECODER: "UnetDecoder",
    VAE_ENCODER: "VAEEncoder",
    VAE_DECODER: "VAEDecoder",
}
_VOCABULARY = ("vocab.json", "merges.txt")


def write_swift_resources(
    bundle: Bundle, graphs: list[str], plan: CoremlPlan, folder: Path
) -> list[str]:
    """Write Resources/ and compile.sh into `folder`; the files written, relative to it.

    Warns of words that the Swift program will not know.
    """
    _warn_of_added_words(bundle)
    resources = folder / RESOURCES
    resources.mkdir()
    for name in _VOCABULARY:
        shutil.copyfile(bundle.root / "tokenizer" / name, resources / name)
    constants = json.dumps(_constants(bundle, plan), indent=1) + "\n"
    (resources / CONSTANTS).write_text(constants, "utf-8")
    (folder / SCRIPT).write_text(_script(graphs), "utf-8")
    return [f"{RESOURCES}/{name}" for name in (*_VOCABULARY, CONSTANTS)] + [SCRIPT]


def check_swift(bundle: Bundle) -> None:
    """Refuse a bundle without a vocabulary, and what the Swift program does not know."""
    check_options("coreml", ("--swift-bundle",), features_of(bundle.manifest))
    for name in _VOCABULARY:
        if f"tokenizer/{name}" not in bundle.manifest.files:
            raise BundleError(
                f"{bundle.root} has no tokenizer/{name}, which a Swift program needs",
                "Export the bundle with --base and the pipeline folder that holds the tokenizer.",
            )


def _warn_of_added_words(bundle: Bundle) -> None:
    """Apple's tokenizer knows merges of letters alone.

    A word that was added whole has none, and merges that led to it would cut other words otherwise.
    """
    known = bundle.json_object("tokenizer/vocab.json")
    added = bundle.json_object("tokenizer/tokenizer.json").get("added_tokens") or []
    if words := [token["content"] for token in added if token["content"] not in known]:
        warnings.warn(
            f"Swift programs read {' and '.join(_VOCABULARY)}, which cannot hold the added "
            f"{'words' if len(words) > 1 else 'word'} {', '.join(words)}: there they are read as "
            "letters",
            TiueWarning,
            stacklevel=2,
        )


def _constants(bundle: Bundle, plan: CoremlPlan) -> dict[str, object]:
    """All that is not in the models. Eq. 11 is applied inside the decoder; its coefficients are
    given for readers."""
    manifest, schedule = bundle.manifest, bundle.manifest.plan
    tokenizer = bundle.json_object("tokenizer/tokenizer.json")
    padding = tokenizer.get("padding") or {}
    return {
        "height": manifest.height_px,
        "width": manifest.width_px,
        "latentHeight": manifest.height_px // manifest.vae_scale,
        "latentWidth": manifest.width_px // manifest.vae_scale,
        "tokenCount": manifest.text_tokens,
        "padToken": int(padding.get("pad_id", 0)),
        "vaeScalingFactor": manifest.vae_scaling_factor,
        "timesteps": list(schedule.timesteps),
        "noiseCoefficient": schedule.latents.noise,
        "outputCoefficients": list(schedule.latents.outputs),
        "computeUnit": plan.compute_unit,
    }


def _script(graphs: list[str]) -> str:
    lines = [
        "#!/bin/sh",
        "# Compiles the packages for a Swift program. Needs a Mac with Xcode.",
        "set -eu",
        'cd "$(dirname "$0")"',
    ]
    for graph in graphs:
        name = COMPILED_NAMES[graph]
        lines += [
            f"rm -rf {RESOURCES}/{name}.mlmodelc",
            f"xcrun coremlcompiler compile {graph}.mlpackage {RESOURCES}",
            f"mv {RESOURCES}/{graph}.mlmodelc {RESOURCES}/{name}.mlmodelc",
        ]
    return "\n".join([*lines, ""])
