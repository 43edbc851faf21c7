"""A VAE graph smaller than the picture: tiles cover it, are blended, and every runtime draws it."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from hypothesis import given, settings
from hypothesis import strategies as st

from tiue_export import Pipeline, export_onnx, load_student
from tiue_export.drawing.vae_tiles import decode_in_tiles, tile_size, tile_starts
from tiue_export.errors import UsageError
from tiue_export.export.openvino import compile_openvino
from tiue_export.graphs.build import build_graphs
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import shapes_of
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference
from tiue_export.specs import UNET_DECODER, VAE_DECODER, RuntimeOptions

FEW = settings(max_examples=60, deadline=None)
TILE_PX = 64


@FEW
@given(st.integers(1, 200), st.integers(1, 80))
def test_tiles_cover_every_latent_and_overlap_by_a_quarter(length, tile):
    starts = tile_starts(length, tile)
    if length <= tile:
        assert starts == [0]
        return
    assert starts[0] == 0
    assert starts[-1] + tile == length
    overlap = min(-(-tile // 4), tile - 1)
    for before, after in itertools.pairwise(starts):
        assert before < after <= before + tile - overlap
    # One tile fewer would not reach.
    assert tile + (len(starts) - 2) * (tile - overlap) < length


@FEW
@given(
    st.integers(1, 3), st.integers(1, 40), st.integers(1, 40), st.integers(1, 12), st.integers(1, 3)
)
def test_a_decoder_that_looks_at_single_latents_is_put_together_exactly(
    batch, height, width, side, scale
):
    random = np.random.default_rng(height * width)
    latents = random.standard_normal((batch, 4, height, width)).astype(np.float32)
    size = min(side, height), min(side, width)

    def decode(tile):
        assert tile.shape[2:] == size
        return tile[:, :3].repeat(scale, 2).repeat(scale, 3)

    picture = decode_in_tiles(decode, latents, size)
    whole = latents[:, :3].repeat(scale, 2).repeat(scale, 3)
    np.testing.assert_allclose(picture, whole, rtol=1e-5, atol=1e-5)


def test_seams_are_blended():
    """Tiles that disagree by a constant meet without a step."""
    values = iter(range(100))

    def decode(tile):
        return np.full((1, 3, 8, 8), next(values), np.float32)

    picture = decode_in_tiles(decode, np.zeros((1, 4, 8, 14), np.float32), (8, 8))
    row = picture[0, 0, 0]
    assert (row[0], row[-1]) == (0, 1)
    assert np.abs(np.diff(row)).max() < 0.6
    assert np.all(np.diff(row) >= 0)


@torch.no_grad()
def test_taesd_in_tiles_is_the_whole_decode_where_tiles_overlap_by_what_it_sees():
    """No norms and no attention: only what lies near a tile's edge can differ."""
    torch.manual_seed(0)
    vae = AutoencoderTiny(
        decoder_block_out_channels=(8, 8), encoder_block_out_channels=(8, 8),
        num_encoder_blocks=(1, 1), num_decoder_blocks=(1, 1),
    ).eval()  # fmt: skip
    latents = np.random.default_rng(0).standard_normal((1, 4, 48, 48)).astype(np.float32)

    def decode(tile):
        return vae.decode(torch.from_numpy(tile)).sample.numpy()

    picture = decode_in_tiles(decode, latents, (32, 32))
    whole = decode(latents)
    assert psnr_db(whole, picture) > 30
    # In the middle of the upper left corner no other tile takes part.
    np.testing.assert_allclose(picture[..., :20, :20], whole[..., :20, :20], atol=1e-5)


@pytest.fixture(scope="module")
def tiled_bundle(micro_pipeline, tiny_student, tmp_path_factory):
    """Pictures of 128 px, decoded in tiles of 64 px by a VAE with norms and attention."""
    student = load_student(micro_pipeline)
    student.vae = tiny_student.vae
    options = ExportOptions(height=2 * TILE_PX, width=2 * TILE_PX, vae_tile=TILE_PX)
    root = tmp_path_factory.mktemp("tiled") / "bundle"
    return compile_openvino(export_onnx(student, root, options))


def test_only_the_vae_graph_knows_of_tiles(tiled_bundle):
    assert tiled_bundle.manifest.latent_shape == (1, 4, 16, 16)
    assert tiled_bundle.spec(UNET_DECODER).outputs[0].shape == (1, 4, 16, 16)
    spec = tiled_bundle.spec(VAE_DECODER)
    assert tile_size(spec) == (8, 8)
    assert spec.outputs[0].shape == (1, 3, TILE_PX, TILE_PX)


def test_the_reference_holds_one_tile_and_the_cost_is_recorded(tiled_bundle):
    manifest, known = tiled_bundle.manifest, load_reference(tiled_bundle).arrays
    scaled = known["latents"] / manifest.vae_scaling_factor
    np.testing.assert_allclose(known["latent_sample"], scaled[:, :, :8, :8], rtol=1e-6)
    assert known["picture"].shape == (1, 3, TILE_PX, TILE_PX)
    (record,) = (r for r in manifest.parity if r.hop.startswith("tiled"))
    assert (record.hop, record.subject) == ("tiled 64x64 px", "picture / whole decode")
    assert record.gate is None
    assert 5 < record.value < 200


@pytest.mark.parametrize("runtime", ["ort", "openvino"])
def test_a_tiled_bundle_draws_the_whole_picture(tiled_bundle, tiny_student, runtime):
    options = RuntimeOptions(precision="auto" if runtime == "ort" else "fp32")
    with Pipeline.open(tiled_bundle, runtime, options) as pipeline:
        result = pipeline("a red fox", seed=3)
        latents = result.pictures[0].latents[None]
        picture = pipeline.decode(latents)
    assert result.images[0].size == (2 * TILE_PX, 2 * TILE_PX)
    assert [len(runs) for runs in result.stage_latency_ms.values()] == [1, 1, 1, 1]
    scaled = torch.from_numpy(latents / tiled_bundle.manifest.vae_scaling_factor)
    with torch.no_grad():
        whole = tiny_student.vae.decode(scaled).sample.numpy()
    record = next(r for r in tiled_bundle.manifest.parity if r.hop.startswith("tiled"))
    assert psnr_db(whole, picture) == pytest.approx(record.value, abs=6)


@pytest.mark.parametrize("tile", [0, 32, 68, 128, 4096])
def test_a_tile_that_does_not_fit_is_refused_with_what_fits(tiny_student, tile):
    with pytest.raises(UsageError, match=rf"--vae-tile is {tile}; expected a multiple of") as error:
        shapes_of(tiny_student, ExportOptions(height=128, width=128, vae_tile=tile))
    assert "whole" in error.value.next_step


def test_a_tile_may_be_as_high_as_the_picture(tiny_student):
    options = ExportOptions(vae_tile=TILE_PX, height=TILE_PX, width=2 * TILE_PX)
    (graph,) = build_graphs(tiny_student, options, only=(VAE_DECODER,))
    assert graph.spec.outputs[0].shape == (1, 3, TILE_PX, TILE_PX)


def test_the_command_line_takes_a_tile(run, tiny_pipeline):
    code, _, err = run("onnx", "--ckpt", tiny_pipeline, "--vae-tile", 1000, "--dry-run")
    assert code == 2
    assert "--vae-tile is 1000; expected a multiple of" in err
    size = ("--height", 2 * TILE_PX, "--width", 2 * TILE_PX)
    options = ("--ckpt", tiny_pipeline, *size, "--vae-tile", TILE_PX, "--dry-run")
    code, _, err = run("onnx", *options)
    assert code == 0, err
