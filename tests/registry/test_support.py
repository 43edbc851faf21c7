"""The support table: every refusal is heard before any work, its page is true, nothing else is."""

from __future__ import annotations

import importlib.util
import shutil
from dataclasses import replace
from itertools import combinations
from pathlib import Path

import pytest

from tiue_export import open_bundle
from tiue_export.bundle.manifest import GraphRecord, Manifest
from tiue_export.bundle.read import Bundle
from tiue_export.bundle.write import write_manifest
from tiue_export.errors import UsageError
from tiue_export.registry.backends import open_runtime
from tiue_export.registry.support import (
    FEATURES,
    REFUSALS,
    VERBS,
    Refusal,
    check_support,
    features_of,
    refusal_of,
)
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.plan import Combination, Pass
from tiue_export.specs import (
    CONTROLNET,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    RuntimeOptions,
)

ROOT = Path(__file__).resolve().parents[2]
CELLS = [(refusal, verb) for refusal in REFUSALS for verb in refusal.verbs]


def with_open_time(manifest: Manifest) -> dict[str, GraphRecord]:
    """Its graphs, the decoder's output called as where the sum is the device's."""
    decoder = manifest.graphs[UNET_DECODER]
    outputs = tuple(replace(spec, name="outputs") for spec in decoder.outputs)
    return {**manifest.graphs, UNET_DECODER: replace(decoder, outputs=outputs)}


def with_feature(manifest: Manifest, feature: str) -> Manifest:
    """The manifest of a bundle that has a feature; its files stay what they are."""
    graphs, plan = dict(manifest.graphs), manifest.plan
    if feature == "passes":
        passes = tuple(
            Pass(t, (t,), Combination(1.0, (0.0,) * row)) for row, t in enumerate(plan.timesteps)
        )
        return replace(manifest, plan=replace(plan, passes=passes), graphs=with_open_time(manifest))
    if feature == "pieces":
        return replace(manifest, plan=plan.in_pieces(1), graphs=with_open_time(manifest))
    if feature == "guidance":
        looped = with_feature(manifest, "passes")
        return replace(looped, plan=replace(looped.plan, guidance=7.5))
    if feature == "fresh-noise":
        latents = replace(plan.latents, fresh=(0.5,))
        return replace(manifest, plan=replace(plan, latents=latents))
    if feature == "controlnet":
        (picture,) = graphs[VAE_DECODER].outputs
        steering = replace(picture, name="controlnet_cond")
        encoder = graphs[UNET_ENCODER]
        graphs[CONTROLNET] = replace(encoder, inputs=(*encoder.inputs, steering))
    if feature == "merged":
        return replace(manifest, plan=replace(plan, merged_timesteps=(1,)))
    if feature == "fan-out":
        return replace(manifest, plan=replace(plan, fan_out=FanOut(1)))
    if feature in ("naive", "hoisted-into-encoder"):
        return replace(manifest, hoisted={"naive": "none"}.get(feature, "encoder"))
    if feature == "dynamic-batch":
        return replace(manifest, latent_shape=("batch", *manifest.latent_shape[1:]))
    if feature == "tiles":
        (latents,) = graphs[VAE_DECODER].inputs
        tile = replace(latents, shape=(*latents.shape[:2], 2, 2))
        (picture,) = graphs[VAE_DECODER].outputs
        pixels = replace(picture, shape=(*picture.shape[:2], 16, 16))
        graphs[VAE_DECODER] = replace(graphs[VAE_DECODER], inputs=(tile,), outputs=(pixels,))
    if feature == "vae-encoder":
        decoder = graphs[VAE_DECODER]
        (latents,), (picture,) = decoder.inputs, decoder.outputs
        ends = {"inputs": (picture,), "outputs": (replace(latents, name="latent_parameters"),)}
        graphs[VAE_ENCODER] = replace(decoder, **ends)
    if feature == "long-prompts":
        batch, length, width = manifest.text_shape
        text = (batch, 2 * length, width)
        return replace(manifest, text_shape=text, text_chunks=2)
    if feature == "islands":
        graphs[UNET_DECODER] = replace(graphs[UNET_DECODER], float32_modules=("up_blocks.0",))
    if feature == "bf16":
        graphs[VAE_DECODER] = replace(graphs[VAE_DECODER], precision="bf16")
    if feature == "int8":
        graphs[UNET_DECODER] = replace(graphs[UNET_DECODER], precision="w8a8")
    if feature == "without-onnx":
        graphs = {name: replace(graph, omitted=True) for name, graph in graphs.items()}
    return replace(manifest, graphs=graphs)


def bundle_with(features: tuple[str, ...], bundle: Bundle, place: Path) -> Bundle:
    """A copy of a bundle that says of itself that it has these features."""
    shutil.copytree(bundle.root, place, copy_function=shutil.copy)
    manifest = bundle.manifest
    for feature in features:
        manifest = with_feature(manifest, feature)
    write_manifest(place, manifest)
    return open_bundle(place)


@pytest.mark.parametrize("feature", FEATURES)
def test_a_feature_is_seen_in_a_manifest_that_has_it_and_in_no_other(feature, tiny_bundle):
    assert feature not in features_of(tiny_bundle.manifest)
    assert feature in features_of(with_feature(tiny_bundle.manifest, feature))


@pytest.mark.parametrize(
    ("refusal", "verb"), CELLS, ids=lambda value: getattr(value, "features", value)
)
def test_every_refusal_says_what_the_bundle_is_why_not_and_what_to_do(refusal: Refusal, verb):
    with pytest.raises(UsageError) as caught:
        check_support(verb, refusal.features, "fox")
    for feature in refusal.features:
        assert FEATURES[feature].phrase in caught.value.message
    assert caught.value.message.startswith("fox ")
    assert refusal.reason in caught.value.message
    assert caught.value.next_step == refusal.next_step


COMMANDS = {
    "openvino": ("openvino", "--bundle", "{bundle}"),
    "trt": ("trt", "--bundle", "{bundle}", "--flavor", "rtx", "--sm", "89"),
    "coreml": ("coreml", "--ckpt", "{ckpt}", "--bundle", "{bundle}"),
    "coreai": ("coreai", "--ckpt", "{ckpt}", "--bundle", "{bundle}"),
    "qnn": ("qnn", "--bundle", "{bundle}"),
    "triton": ("triton", "{bundle}", "--out", "{out}"),
    "calibrate": ("calibrate", "{bundle}", "--out", "{out}", "--count", "1"),
    "serve": ("serve", "{bundle}", "--port", "0"),
    "studio": ("studio", "{bundle}", "--port", "0"),
    "bulk": ("generate", "{bundle}", "--prompts", "{table}", "--out", "{out}"),
    "quantize": ("quantize", "{bundle}", "--calibration", "{out}", "--out", "{out}"),
}


@pytest.mark.parametrize(
    ("refusal", "verb"),
    [(refusal, verb) for refusal, verb in CELLS if verb in COMMANDS],
    ids=lambda value: getattr(value, "features", value),
)
def test_a_command_refuses_before_any_work_and_leaves_all_as_it_was(
    refusal: Refusal, verb, tiny_bundle, tiny_pipeline, tmp_path, run
):
    bundle = bundle_with(refusal.features, tiny_bundle, tmp_path / "fox")
    before = (bundle.root / "tiue.json").read_bytes()
    places = {
        "bundle": bundle.root,
        "ckpt": tiny_pipeline,
        "out": tmp_path / "out",
        "plan": tmp_path / "plan.json",
        "table": tmp_path / "prompts.tsv",
    }
    places["table"].write_text("prompt\na red fox\n")
    code, out, error = run(*(part.format(**places) for part in COMMANDS[verb]))
    said = " ".join(error.split())
    assert code == 2, error
    assert refusal.reason in said
    assert (out, (bundle.root / "tiue.json").read_bytes()) == ("", before)
    assert not (tmp_path / "out").exists()


def test_a_cuda_graph_of_several_passes_is_refused_before_a_runtime_opens(tiny_bundle):
    manifest = with_feature(tiny_bundle.manifest, "passes")
    with pytest.raises(UsageError, match="does not go with recording a CUDA graph"):
        open_runtime(
            "trt", replace(tiny_bundle, manifest=manifest), RuntimeOptions(cuda_graph=True)
        )


def test_what_no_row_refuses_is_taken():
    pairs = [pair for size in (1, 2) for pair in combinations(FEATURES, size)]
    for verb in VERBS:
        for features in pairs:
            refused = [r for r in REFUSALS if verb in r.verbs and set(r.features) <= set(features)]
            assert (refusal_of(verb, features) is None) == (not refused)


def test_the_manuals_page_is_the_table():
    spec = importlib.util.spec_from_file_location("support_page", ROOT / "docs/support_page.py")
    page = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(page)
    assert page.PAGE.read_text("utf-8") == page.support_page(), (
        "the table changed: python docs/support_page.py"
    )
