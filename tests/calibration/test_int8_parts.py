"""int8 beyond the UNet: the VAE decoder, judged by its pictures, and the text encoder's weights."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import onnx
import pytest
from int8_options import ANY_SPEED, BY_RULE, PROMPTS

from tiue_export import open_bundle
from tiue_export.bundle.chain import scaled_latents
from tiue_export.bundle.read import Bundle
from tiue_export.calibration import capture, parts, verdict
from tiue_export.calibration import quantize as quantizer
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import ParityError, UsageError
from tiue_export.export.openvino import compile_openvino
from tiue_export.proof import calibration as dataset
from tiue_export.proof.quantization import (
    BY_BLOCK,
)
from tiue_export.proof.quantization_plan import W8A8, WEIGHTS, read_plan
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_GRAPHS, VAE_DECODER

ALL = replace(ANY_SPEED, parts=("vae", "unet", "text"))
VAE_ALONE = replace(ALL, parts=("vae",))


@pytest.fixture(scope="module")
def data(tiny_bundle, tmp_path_factory):
    """Three captured drawings. Shared."""
    root = tmp_path_factory.mktemp("data") / "data"
    return capture.capture(tiny_bundle, root, dataset.CaptureOptions(prompts=PROMPTS))


@pytest.fixture(scope="module")
def made(tiny_bundle, data, tmp_path_factory):
    """All three parts, every layer that no rule keeps out. Shared."""
    return quantizer.quantize(tiny_bundle, data, tmp_path_factory.mktemp("int8") / "all", ALL)


def kinds_of_nodes(bundle: Bundle, graph: str) -> set[str]:
    model = onnx.load(str(bundle.graph_path(graph)), load_external_data=False)
    return {node.op_type for node in model.graph.node}


def test_every_part_is_int8_and_of_the_text_encoder_the_weights_alone(made):
    graphs = made.bundle.manifest.graphs
    assert {name: graph.precision for name, graph in graphs.items()} == {
        TEXT_ENCODER: WEIGHTS,
        **dict.fromkeys((*UNET_GRAPHS, VAE_DECODER), W8A8),
    }
    assert "QuantizeLinear" in kinds_of_nodes(made.bundle, VAE_DECODER)
    assert "QuantizeLinear" not in kinds_of_nodes(made.bundle, TEXT_ENCODER)
    assert "DequantizeLinear" in kinds_of_nodes(made.bundle, TEXT_ENCODER)
    with Pipeline.open(made.bundle) as pipeline:
        assert np.isfinite(pipeline("two boats", seed=2).pictures[0].latents).all()


def test_a_part_that_was_not_asked_for_keeps_its_very_files(made, tiny_bundle, data, tmp_path):
    alone = quantizer.quantize(tiny_bundle, data, tmp_path / "vae", VAE_ALONE)
    own, float_graphs = alone.bundle.manifest.graphs, tiny_bundle.manifest.graphs
    for graph in (TEXT_ENCODER, *UNET_GRAPHS):
        assert own[graph] == float_graphs[graph]
    assert own[VAE_DECODER].precision == W8A8
    assert alone.verdict.pictures == made.verdict.pictures
    assert "unet" not in alone.verdict.latency_ms["float"]
    assert alone.verdict.latents_psnr_db == 300


def test_the_vaes_ranges_are_those_of_latents_that_the_float_graphs_draw(made, tiny_bundle, data):
    with Pipeline.open(tiny_bundle) as pipeline:
        drawn = [pipeline(PROMPTS[i], seed=i).pictures[0].latents for i in range(2)]
    scaled = scaled_latents(np.stack(drawn), tiny_bundle.manifest.vae_scaling_factor)
    first = next(layer for layer in made.plan.layers if layer.graph == VAE_DECODER)
    assert first.mode == "float"
    assert first.activation_scale == pytest.approx(float(np.abs(scaled).max()) / 127, rel=1e-4)


def test_pictures_are_judged_on_float_latents_that_no_range_has_seen(made, tiny_bundle, data):
    part = parts.Part("vae", tiny_bundle, data)
    files = {VAE_DECODER: made.bundle.graph_path(VAE_DECODER)}
    probed = part.judge([2]).of_files(files)
    pictures = made.verdict.pictures
    assert pictures.psnr_db == pytest.approx(probed, abs=0.05)
    assert pictures.gate_psnr_db == 30
    assert part.judge([2]).of_files({}) == 300
    latents, picture = made.bundle.manifest.parity
    assert (latents.subject, picture.subject) == ("latents", "picture / float VAE")
    assert (picture.value, picture.gate, picture.passed) == (pictures.psnr_db, 30, True)


def test_what_the_text_encoder_loses_counts_in_the_latents(made, tiny_bundle, data, tmp_path):
    alone = replace(ALL, parts=("text",), any_speed=False)  # weights need not be faster
    text = quantizer.quantize(tiny_bundle, data, tmp_path / "text", alone)
    assert 30 < text.verdict.latents_psnr_db < 300
    assert (text.verdict.gate_psnr_db, text.verdict.must_be) == (45, "smaller")
    assert set(text.verdict.latency_ms["quantized"]) == {TEXT_ENCODER, "all"}
    assert text.verdict.size_bytes["quantized"] < text.verdict.size_bytes["float"]


def test_blocks_of_the_vae_are_measured_by_pictures_and_chosen_to_a_target(
    tiny_bundle, data, tmp_path
):
    by_block = replace(BY_RULE, sensitivity=BY_BLOCK, target_psnr_db=1000.0)
    strict = replace(VAE_ALONE, analysis=by_block)
    measured = quantizer.make_plan(tiny_bundle, data, strict, quantizer.Observer())
    vae = [layer for layer in measured.plan.layers if layer.psnr_db is not None]
    assert vae
    assert {layer.graph for layer in vae} == {VAE_DECODER}
    assert not measured.plan.of(VAE_DECODER)  # no set has such pictures
    with pytest.raises(UsageError, match="the plan quantizes no layer"):
        quantizer.quantize(tiny_bundle, data, tmp_path / "none", strict)


def test_bad_pictures_are_refused_with_the_vaes_layers_to_blame(made):
    blame = ("unet_decoder/a (20.0 dB alone)", "vae_decoder/b (21.0 dB alone)")
    bad = replace(made.verdict, pictures=replace(made.verdict.pictures, psnr_db=12.0), blame=blame)
    with pytest.raises(
        ParityError, match=r"the pictures of .* have 12\.0 dB, gate 30 dB; .*: vae_decoder/b"
    ) as caught:
        verdict.require_worth(bad, allow_loss=False, allow_slower=True)
    assert "unet_decoder" not in caught.value.message
    verdict.require_worth(bad, allow_loss=True, allow_slower=True)
    assert verdict.with_parity(made.bundle.manifest, bad).parity_loss_allowed


def test_latents_are_drawn_once_and_kept_with_the_data(tiny_bundle, data, monkeypatch):
    known = list(parts.drawn_latents(tiny_bundle, data, range(3)))

    def refuse(*ignored):
        raise AssertionError

    monkeypatch.setattr(parts, "OnnxSession", refuse)
    again = list(parts.drawn_latents(tiny_bundle, data, range(3)))
    assert all(np.array_equal(one, other) for one, other in zip(known, again, strict=True))


def test_a_vae_that_takes_tiles_is_fed_every_tile(tiny_bundle, data):
    manifest = tiny_bundle.manifest
    vae = manifest.graphs[VAE_DECODER]
    (taken,) = vae.inputs
    small = replace(vae, inputs=(replace(taken, shape=(1, 4, 4, 4)),))
    graphs = {**manifest.graphs, VAE_DECODER: small}
    tiled = Bundle(tiny_bundle.root, replace(manifest, graphs=graphs))
    part = parts.Part("vae", tiled, data)
    feeds = list(part.runs(VAE_DECODER, [0]))
    assert len(feeds) == part.run_count(VAE_DECODER, [0]) == 9
    assert {feed["latent_sample"].shape for feed in feeds} == {(1, 4, 4, 4)}


def test_openvinos_graphs_take_the_same_plan(made, tiny_bundle, data, tmp_path):
    root = shutil.copytree(tiny_bundle.root, tmp_path / "copy")
    copy = compile_openvino(open_bundle(root))
    plan = tmp_path / "plan.json"
    plan.write_text(made.plan.to_json())
    assert read_plan(plan) == made.plan
    judged = replace(ALL.judged, runtime="openvino", precision="fp32")
    options = replace(ALL, backend="openvino", plan=plan, judged=judged, allow_loss=True)
    result = quantizer.quantize(copy, data, tmp_path / "ov", options)
    graphs = result.bundle.manifest.graphs
    assert graphs[VAE_DECODER].precision == W8A8
    assert graphs[TEXT_ENCODER].precision == WEIGHTS
    forms = result.bundle.manifest.compiled["openvino"].graphs
    assert forms[VAE_DECODER].report["fake_quantize"] > 0
    assert forms[TEXT_ENCODER].report["fake_quantize"] == 0
    assert result.verdict.pictures.psnr_db > 30


def test_parts_that_are_not_there_are_refused(run, tiny_bundle, data, micro_bundle):
    words = ("quantize", tiny_bundle.root, "--calibration", data.root)
    code, _, err = run(*words, "--parts", "unet,ears")
    assert (code, "unknown part 'ears'; there are: text, unet, vae" in err) == (2, True), err
    with pytest.raises(UsageError, match="has no vae_decoder: there is nothing to quantize"):
        quantizer.check_quantize(micro_bundle, VAE_ALONE)
    code, _, err = run(*words, "--parts", "")
    assert (code, "--parts is empty; expected unet, vae, text or several" in err) == (2, True), err


def test_the_command_tells_both_losses_and_refuses_parts_beside_a_plan(
    run, tiny_bundle, data, made, tmp_path
):
    words = ("quantize", tiny_bundle.root, "--calibration", data.root)
    quick = ("--sensitivity", "none", "--held-out", 1, "--any-speed", "--rounds", 1)
    code, out, err = run(*words, "--parts", "vae,text", *quick, "--out", tmp_path / "out")
    assert code == 0, err
    assert "text encoder, VAE" in out
    assert "pictures, dB (gate)" in " ".join(out.split())
    code, out, err = run(*words, "--parts", "vae", *quick, "--out", tmp_path / "json", "--json")
    told = json.loads(out)["verdict"]
    assert (code, told["pictures"]["gate_psnr_db"], told["accurate"]) == (0, 30, True), err
    plan = made.bundle.root / "quantization" / "plan.json"
    code, _, err = run(*words, "--plan", plan, "--parts", "vae", "--out", tmp_path / "no")
    assert (code, "--parts has no say beside --plan" in err) == (2, True), err


def test_a_bundle_whose_vae_alone_is_int8_is_quantized_already(run, tiny_bundle, data, tmp_path):
    alone = quantizer.quantize(tiny_bundle, data, tmp_path / "vae", VAE_ALONE)
    assert UNET_DECODER in alone.bundle.manifest.graphs
    code, _, err = run("quantize", alone.bundle.root, "--calibration", data.root)
    assert (code, "is quantized already" in err) == (2, True), err
