"""Bundles whose VAE decodes tiles: forms made from the student hold the tile's graph too."""

from __future__ import annotations

import importlib.util
import shutil

import numpy as np
import pytest

from tiue_export import load_student
from tiue_export.bundle.read import open_bundle, vae_tile_px
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import UsageError
from tiue_export.export.onnx.bundle import export_onnx
from tiue_export.graphs.build import ExportOptions
from tiue_export.proof.gates import psnr_db

HEIGHT_PX, WIDTH_PX, TILE_PX = 64, 128, 96


@pytest.fixture(scope="module")
def tiled(micro_pipeline, tmp_path_factory):
    """Pictures of 64x128 px in tiles of 64x96: cut where the picture is lower than a tile."""
    options = ExportOptions(height=HEIGHT_PX, width=WIDTH_PX, vae_tile=TILE_PX)
    return export_onnx(
        load_student(micro_pipeline), tmp_path_factory.mktemp("tiled") / "b", options
    )


@pytest.fixture
def own(tiled, tmp_path):
    return open_bundle(shutil.copytree(tiled.root, tmp_path / "own"))


def needs(module: str) -> pytest.MarkDecorator:
    missing = importlib.util.find_spec(module) is None
    return pytest.mark.skipif(missing, reason=f"{module} is not installed")


def coreml(bundle, pipeline, **options):
    from tiue_export.export.coreml.bundle import compile_coreml
    from tiue_export.export.coreml.profiles import CoremlOptions

    own = CoremlOptions(precision="fp32", **options)
    return compile_coreml(bundle, load_student(pipeline), own)


def coreai(bundle, pipeline):
    from tiue_export.export.coreai import CoreaiOptions, compile_coreai

    return compile_coreai(bundle, load_student(pipeline), CoreaiOptions("fp32"))


@pytest.mark.parametrize(
    ("runtime", "compiled"),
    [
        pytest.param("coreml", coreml, marks=needs("coremltools")),
        pytest.param("coreai", coreai, marks=needs("coreai")),
    ],
)
def test_a_form_of_the_students_own_graphs_draws_the_same_tiles_as_onnx_runtime(
    own, micro_pipeline, runtime, compiled
):
    bundle = compiled(own, micro_pipeline)
    assert vae_tile_px(bundle.manifest) == TILE_PX
    records = bundle.manifest.compiled[runtime].parity
    assert "picture" in {record.subject for record in records}
    assert all(record.passed for record in records)
    with Pipeline.open(bundle, "ort") as reference, Pipeline.open(bundle, runtime) as pipeline:
        expected = reference("a red fox", seed=3).pictures[0]
        drawn = pipeline("a red fox", seed=3).pictures[0]
        latents = expected.latents[None]
        assert psnr_db(reference.decode(latents), pipeline.decode(latents)) > 100
    assert drawn.image.size == (WIDTH_PX, HEIGHT_PX)
    difference = np.asarray(expected.image, np.int16) - np.asarray(drawn.image, np.int16)
    assert np.abs(difference).max() <= 1


@needs("coremltools")
def test_core_ml_refuses_several_sizes_of_a_tiled_bundle_before_it_converts_anything(
    own, micro_pipeline
):
    sizes = ((HEIGHT_PX, WIDTH_PX), (WIDTH_PX, WIDTH_PX))
    with pytest.raises(UsageError) as caught:
        coreml(own, micro_pipeline, sizes=sizes)
    assert str(caught.value) == (
        f"several --size, and the VAE of {own.root} decodes tiles of one size\n"
        "Give one size, or export again without --vae-tile."
    )
