"""Sub-pixel upsampling gives what doubling and a convolution give, with fewer operations."""

from __future__ import annotations

import dataclasses

import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderTiny
from diffusers.models.upsampling import Upsample2D
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from tiue_export.benchmarks.synthetic import fill
from tiue_export.bundle.manifest import Manifest
from tiue_export.errors import BundleError, UsageError
from tiue_export.export.onnx.write import onnx_from_graph
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.flops import count_flops
from tiue_export.graphs.options import HOISTS, ExportOptions
from tiue_export.graphs.upsampling import SubPixelConvolution, with_subpixel_upsampling
from tiue_export.proof.gates import psnr_db
from tiue_export.specs import NEAREST, SUBPIXEL, UNET_GRAPHS, VAE_DECODER

EXACT_DB = 120.0


@settings(max_examples=25, deadline=None)
@given(
    st.integers(1, 9),
    st.integers(1, 9),
    st.integers(1, 7),
    st.integers(1, 7),
    st.integers(1, 3),
    st.booleans(),
)
@torch.no_grad()
def test_four_small_convolutions_give_what_one_gives_on_the_doubled_picture(
    inputs, outputs, height, width, batch, bias
):
    torch.manual_seed(inputs * outputs + height * width)
    conv = nn.Conv2d(inputs, outputs, 3, padding=1, bias=bias).double()
    x = torch.randn(batch, inputs, height, width, dtype=torch.float64)
    small = SubPixelConvolution(conv).double()
    # The weights were rounded to float32; all else is exact.
    expected = conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))
    torch.testing.assert_close(small(x), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("side", [2, 4])
def test_no_kernel_is_as_large_as_its_picture_without_padding_before_it(tmp_path, side):
    """WebGPU of onnxruntime-web 1.30 would leave out the padding behind it."""
    module = SubPixelConvolution(nn.Conv2d(3, 3, 3, padding=1)).eval()
    x = torch.randn(1, 3, side, side)
    program = torch.onnx.export(module, (x,), dynamo=True, verbose=False)
    convolutions = [n for n in program.model_proto.graph.node if n.op_type == "Conv"]
    assert len(convolutions) == 4
    pads = [next(a.ints for a in n.attribute if a.name == "pads") for n in convolutions]
    assert [list(each)[:2] == [0, 0] for each in pads].count(True) == (0 if side == 2 else 1)


@torch.no_grad()
def test_weights_that_float32_holds_sum_up_without_any_loss():
    conv = nn.Conv2d(3, 5, 3, padding=1)
    for parameter in conv.parameters():
        parameter.copy_((parameter * 64).round() / 64)
    x = torch.randint(-8, 8, (2, 3, 4, 6)).float()
    doubled = F.interpolate(x, scale_factor=2.0, mode="nearest")
    assert torch.equal(SubPixelConvolution(conv)(x), conv(doubled))


@torch.no_grad()
def test_weights_stored_in_half_are_summed_before_they_are_rounded():
    conv = nn.Conv2d(1, 1, 3, padding=1, bias=False).half()
    conv.weight.fill_(1.0)
    conv.weight[0, 0, 0, 1] = 2.0**-11  # 1 + 2**-11 is no half
    summed = SubPixelConvolution(conv).weight_10
    assert summed.dtype == torch.float32
    assert (summed == 2.0 + 1.0 + 2.0**-11).any()


@pytest.mark.parametrize("hoist", HOISTS)
@pytest.mark.parametrize("batch", [1, 2])
def test_graphs_of_either_upsampling_draw_the_same(tiny_student, hoist, batch):
    pools = []
    for upsampling in (NEAREST, SUBPIXEL):
        options = ExportOptions(hoist=hoist, batch=batch, upsampling=upsampling)
        generator = torch.Generator().manual_seed(1)
        pool = {}
        for graph in build_graphs(tiny_student, options, only=UNET_GRAPHS):
            for spec, example in zip(graph.spec.inputs, graph.example, strict=True):
                if spec.name not in pool:
                    pool[spec.name] = torch.randn(example.shape, generator=generator).numpy()
            pool.update(run_graph(graph, pool)[1])
        pools.append(pool)
    assert psnr_db(pools[0]["latents"], pools[1]["latents"]) >= EXACT_DB


def vaes(tiny_pipeline):
    tiny = AutoencoderTiny(
        encoder_block_out_channels=(8, 8, 8, 8),
        decoder_block_out_channels=(8, 8, 8, 8),
        num_encoder_blocks=(1, 1, 1, 1),
        num_decoder_blocks=(1, 1, 1, 1),
    )
    fill(tiny, torch.Generator().manual_seed(3))
    return {"AutoencoderKL": tiny_pipeline.vae, "AutoencoderTiny": tiny.eval()}


@pytest.mark.parametrize("kind", ["AutoencoderKL", "AutoencoderTiny"])
@torch.no_grad()
def test_every_vae_upsamples_that_way_and_draws_the_same(tiny_student, kind):
    vae = vaes(tiny_student)[kind]
    twin = with_subpixel_upsampling(vae)
    kinds = [type(module) for module in twin.modules()]
    levels = vae.config.get("block_out_channels") or vae.config.decoder_block_out_channels
    assert kinds.count(SubPixelConvolution) == len(levels) - 1
    assert nn.Upsample not in kinds
    assert Upsample2D not in kinds
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    expected = vae.decode(latents).sample.numpy()
    assert psnr_db(expected, twin.decode(latents).sample.numpy()) >= EXACT_DB


def test_the_model_itself_keeps_its_layers_and_shares_all_other_weights(tiny_student):
    unet = tiny_student.unet
    own = {p.untyped_storage().data_ptr() for p in unet.parameters()}
    twin = with_subpixel_upsampling(unet)
    assert any(isinstance(module, Upsample2D) for module in unet.modules())
    new = [n for n, p in twin.named_parameters() if p.untyped_storage().data_ptr() not in own]
    assert new
    assert all(".upsamplers.0.conv.weight_" in name for name in new)


@pytest.mark.parametrize(
    "layer",
    [
        nn.Sequential(nn.Upsample(scale_factor=2, mode="bilinear"), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(nn.Upsample(scale_factor=3), nn.Conv2d(4, 4, 3, padding=1)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 1)),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, groups=2)),
        nn.Sequential(
            nn.Upsample(scale_factor=2), nn.Conv2d(4, 4, 3, padding=1, padding_mode="reflect")
        ),
        nn.Sequential(nn.Upsample(scale_factor=2), nn.ReLU()),
        Upsample2D(4, use_conv=False),
        Upsample2D(4, use_conv=True, kernel_size=1, padding=0),
    ],
    ids=["bilinear", "times 3", "1x1", "groups", "reflect", "no convolution", "bare", "bare 1x1"],
)
@torch.no_grad()
def test_other_upsampling_layers_stay_as_they_are(layer):
    twin = with_subpixel_upsampling(nn.ModuleList([layer]))
    assert not any(isinstance(module, SubPixelConvolution) for module in twin.modules())


def test_the_decoders_graph_needs_fewer_operations(tiny_student, tmp_path):
    """An upsampling layer needs 16 products where it needed 36; nothing else changes."""
    flops = {}
    for upsampling in (NEAREST, SUBPIXEL):
        folder = tmp_path / upsampling
        folder.mkdir()
        (graph,) = build_graphs(
            tiny_student, ExportOptions(upsampling=upsampling), only=(VAE_DECODER,)
        )
        onnx_from_graph(graph, folder)
        (path,) = folder.rglob("*.onnx")
        flops[upsampling] = count_flops(path).by_operator["Conv"]
    layers = [m for m in tiny_student.vae.decoder.modules() if isinstance(m, Upsample2D)]
    side, saved = tiny_student.unet.config.sample_size, 0
    for layer in layers:
        side *= 2
        saved += 2 * layer.conv.in_channels * layer.conv.out_channels * side * side * (9 - 4)
    assert flops[NEAREST] - flops[SUBPIXEL] == saved > 0


def test_unknown_upsampling_lists_the_legal_ones():
    with pytest.raises(UsageError, match=r"bicubic.*subpixel"):
        ExportOptions(upsampling="bicubic")


def test_a_manifest_says_how_its_graphs_upsample(tiny_bundle):
    manifest = tiny_bundle.manifest
    assert manifest.upsampling == SUBPIXEL
    wrong = dataclasses.replace(manifest, upsampling="bicubic").to_json()
    with pytest.raises(BundleError, match="bicubic; expected subpixel or nearest"):
        Manifest.from_json(wrong, "tiue.json")
