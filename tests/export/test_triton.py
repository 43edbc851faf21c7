"""The model repository for Triton: what its configurations say is what the graphs are."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import re
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import pytest
from open_batch import with_open_batch

from tiue_export import Pipeline, RuntimeOptions
from tiue_export.bundle.manifest import Compiled, CompiledGraph
from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.errors import UsageError
from tiue_export.export.triton.repository import (
    TritonOptions,
    TritonRepository,
    plan_models,
    write_triton_repository,
)
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.specs import GRAPH_NAMES


@pytest.fixture(scope="module")
def dynamic_bundle(tiny_bundle: Bundle) -> Bundle:
    """The tiny bundle with an open batch axis in its manifest. Shared."""
    return with_open_batch(tiny_bundle)


@pytest.fixture(scope="module", params=["dynamic", "static"])
def repository(request, dynamic_bundle, tiny_bundle, tmp_path_factory) -> TritonRepository:
    """The repository of a bundle of either kind. Shared."""
    bundle = dynamic_bundle if request.param == "dynamic" else tiny_bundle
    return write_triton_repository(bundle, tmp_path_factory.mktemp("triton") / "repo")


def model_config(path: Path) -> Any:
    """config.pbtxt as Triton's own schema reads it; unknown fields and wrong types are errors."""
    from google.protobuf import text_format

    return text_format.Parse(path.read_text("utf-8"), schema().ModelConfig())


def schema() -> Any:
    """model_config_pb2 of tritonclient, whose other modules need packages that we do not."""
    try:
        files = importlib.metadata.files("tritonclient") or []
    except importlib.metadata.PackageNotFoundError:
        pytest.skip("tritonclient is not installed: pip install --no-deps tritonclient")
    (path,) = (f.locate() for f in files if f.parts[-2:] == ("grpc", "model_config_pb2.py"))
    spec = importlib.util.spec_from_file_location("model_config_pb2", path)
    assert spec
    assert spec.loader
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def run_ensemble(repository: TritonRepository, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Do what Triton does: run the ensemble's steps on ONNX Runtime, tensors by the maps' names."""
    models = {model.name: model for model in repository.models}
    ensemble = repository.models[-1]
    pool = dict(given)
    for step in ensemble.steps:
        model = models[step.model]
        file = repository.root / model.name / "1" / model.file
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = session.run(
            list(step.outputs), {own: pool[shared] for own, shared in step.inputs.items()}
        )
        pool.update(zip(step.outputs.values(), outputs, strict=True))
    return {tensor.name: pool[tensor.name] for tensor in ensemble.outputs}


def test_the_ensemble_draws_what_the_pipeline_draws(tiny_bundle, tmp_path) -> None:
    repository = write_triton_repository(tiny_bundle, tmp_path / "repo")
    with Pipeline.open(tiny_bundle, "ort", RuntimeOptions(threads=1)) as pipeline:
        tokens = pipeline.tokenizer(["a red fox"])
        noise = noise_from_seed(7, (1, 4, 8, 8))
        latents = pipeline.latents_from_noise(noise, pipeline.embed(["a red fox"]))
        image = pipeline.decode(latents)
    drawn = run_ensemble(repository, {"input_ids": tokens, "noise": noise})
    assert np.array_equal(drawn["latents"], latents)
    assert np.array_equal(drawn["image"], image)


def test_every_configuration_follows_tritons_own_schema(repository: TritonRepository) -> None:
    for model in repository.models:
        config = model_config(repository.root / model.name / "config.pbtxt")
        assert (config.name, config.max_batch_size) == (model.name, model.max_batch)
        for tensors, written in ((model.inputs, config.input), (model.outputs, config.output)):
            assert [(t.name, t.dims) for t in tensors] == [(t.name, tuple(t.dims)) for t in written]
            data_type = written[0].DESCRIPTOR.fields_by_name["data_type"].enum_type
            names = [data_type.values_by_number[t.data_type].name for t in written]
            assert names == [t.data_type for t in tensors]
        version = repository.root / model.name / "1"
        assert version.is_dir()
        if model.steps:
            steps = config.ensemble_scheduling.step
            assert [step.model_name for step in steps] == [step.model for step in model.steps]
            assert [dict(step.input_map) for step in steps] == [dict(s.inputs) for s in model.steps]
            assert config.platform == "ensemble"
        else:
            assert config.backend == "onnxruntime"
            assert (version / config.default_model_filename).is_file()
            assert config.HasField("dynamic_batching") == (model.max_batch > 1)


def test_every_configuration_is_what_onnx_runtime_finds_in_the_file(
    repository: TritonRepository,
) -> None:
    for model in repository.models[:-1]:
        if model.max_batch and "latent_scale" not in model.name:
            continue  # the files of this fixture have a fixed batch
        file = repository.root / model.name / "1" / model.file
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        for tensors, found in (
            (model.inputs, session.get_inputs()),
            (model.outputs, session.get_outputs()),
        ):
            shapes = {t.name: tuple(t.shape[1:] if model.max_batch else t.shape) for t in found}
            assert {t.name: t.dims for t in tensors} == shapes


def test_every_tensor_of_a_step_comes_from_somewhere(repository: TritonRepository) -> None:
    models = {model.name: model for model in repository.models}
    ensemble = repository.models[-1]
    known = {tensor.name: tensor for tensor in ensemble.inputs}
    for step in ensemble.steps:
        model = models[step.model]
        assert set(step.inputs) == {tensor.name for tensor in model.inputs}
        for tensor in model.inputs:
            source = known[step.inputs[tensor.name]]
            assert (source.data_type, source.dims) == (tensor.data_type, tensor.dims)
        known.update({step.outputs[t.name]: t for t in model.outputs if t.name in step.outputs})
    for tensor in ensemble.outputs:
        assert known[tensor.name].dims == tensor.dims


def test_the_batch_is_tritons_where_it_is_open_and_in_the_dims_where_it_is_not(
    tiny_bundle, dynamic_bundle
) -> None:
    fixed = plan_models(tiny_bundle, TritonOptions())
    open_ = plan_models(dynamic_bundle, TritonOptions(max_batch=8))
    assert {model.max_batch for model in fixed} == {0}
    assert {model.max_batch for model in open_} == {8}
    assert (fixed[0].inputs[0].dims, open_[0].inputs[0].dims) == ((1, 77), (77,))


def test_engines_take_the_place_of_onnx_files(dynamic_bundle, tmp_path: Path) -> None:
    bundle = with_engines(dynamic_bundle, tmp_path, batch="1:2:6")
    made = write_triton_repository(bundle, tmp_path / "repo", TritonOptions("tensorrt", "fox"))
    assert [model.name for model in made.models][-1] == "fox"
    decoder = made.models[2]
    assert (decoder.backend, decoder.file, decoder.max_batch) == (
        "tensorrt",
        "unet_decoder.plan",
        6,
    )
    plan = made.root / "fox_unet_decoder" / "1" / "unet_decoder.plan"
    assert plan.read_bytes() == b"unet_decoder"
    config = (made.root / "fox_unet_decoder" / "config.pbtxt").read_text()
    assert 'backend: "tensorrt"' in config


def with_engines(bundle: Bundle, folder: Path, batch: str) -> Bundle:
    """The bundle with files in the place of engines: what is in them is not read here."""
    root = Path(shutil.copytree(bundle.root, folder / "engines"))
    (root / "trt").mkdir()
    graphs = {}
    for graph in GRAPH_NAMES:
        name = f"trt/{graph}.plan"
        (root / name).write_bytes(graph.encode())
        graphs[graph] = CompiledGraph(
            name, "", {name: bundle.manifest.graphs[graph].files[f"{graph}/model.onnx"]}
        )
    compiled = Compiled("tensorrt", "10.3", {}, {"batch": batch}, graphs)
    return Bundle(root, replace(bundle.manifest, compiled={"trt": compiled}))


def test_engines_that_take_no_single_picture_are_refused(dynamic_bundle, tmp_path: Path) -> None:
    bundle = with_engines(dynamic_bundle, tmp_path, batch="2:2:4")
    with pytest.raises(UsageError, match="the engines take 2 pictures or more"):
        plan_models(bundle, TritonOptions("tensorrt"))


def test_what_no_ensemble_could_draw_is_refused(tiny_bundle) -> None:
    with pytest.raises(UsageError, match="holds no TensorRT engines"):
        plan_models(tiny_bundle, TritonOptions("tensorrt"))
    with pytest.raises(UsageError, match="unknown backend 'onnx'"):
        plan_models(tiny_bundle, TritonOptions("onnx"))
    with pytest.raises(UsageError, match="--max-batch is 0"):
        plan_models(tiny_bundle, TritonOptions(max_batch=0))
    with pytest.raises(UsageError, match=r"with an open batch; those of .* take 1") as fixed:
        plan_models(tiny_bundle, TritonOptions(max_batch=2))
    assert fixed.value.next_step == "Leave it out, or export again with --dynamic-batch."
    with pytest.raises(UsageError, match="--name is 'a b'"):
        plan_models(tiny_bundle, TritonOptions(name="a b"))


def test_the_command_writes_a_repository_and_never_over_something_else(
    run, bundle_copy, tmp_path
) -> None:
    code, out, _ = run("triton", bundle_copy, "--out", "repo", "--json")
    assert code == 0
    assert [model["name"] for model in json.loads(out)["models"]][-1] == "bundle"
    code, _, error = run("triton", bundle_copy, "--out", "repo")
    assert code == 2
    assert "holds these models already" in error
    code, out, _ = run("triton", bundle_copy, "--out", "repo", "--force")
    assert code == 0
    assert "tritonserver --model-repository" in out
    (tmp_path / "repo" / "other").mkdir()
    code, _, error = run("triton", bundle_copy, "--out", "repo", "--force")
    assert code == 2
    assert re.search(r"repo holds other, which is none of this repository's models", error)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["bundle", "repo"]
    (tmp_path / "file").write_text("")
    assert "is a file" in run("triton", bundle_copy, "--out", "file")[2]
    assert open_bundle(bundle_copy)
