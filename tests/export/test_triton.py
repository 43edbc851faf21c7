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
from tiue_export.export.triton.between import Between, guided
from tiue_export.export.triton.between import combined as combination
from tiue_export.export.triton.config import TritonModel, TritonTensor
from tiue_export.export.triton.repository import (
    TritonOptions,
    TritonRepository,
    plan_parts,
    write_triton_repository,
)
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.noise import noise_from_seed, noises_from_seed
from tiue_export.sampling.plan import Combination
from tiue_export.sampling.sampler import by_step
from tiue_export.sampling.sampler import combined as sampler_sum
from tiue_export.specs import GRAPH_NAMES, TensorSpec


@pytest.fixture(scope="module")
def dynamic_bundle(tiny_bundle: Bundle) -> Bundle:
    """The tiny bundle with an open batch axis in its manifest. Shared."""
    return with_open_batch(tiny_bundle)


# Open and fixed batch; fresh noise between the passes; guidance, and passes of several rows.
KINDS = ("dynamic_bundle", "tiny_bundle", "few_step_bundle", "faster_bundle")


@pytest.fixture(scope="module", params=KINDS)
def repository(request, tmp_path_factory) -> TritonRepository:
    """The repository of a bundle of each kind. Shared."""
    bundle = request.getfixturevalue(request.param)
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


def plan_of(bundle: Bundle, options: TritonOptions) -> list[TritonModel]:
    return [part.model for part in plan_parts(bundle, options)]


def run_ensemble(repository: TritonRepository, given: dict[str, np.ndarray]) -> dict[str, Any]:
    """Do what Triton does: run the ensemble's steps on ONNX Runtime, tensors by the maps' names."""
    models = {model.name: model for model in repository.models}
    ensemble = repository.models[-1]
    pool = dict(given)
    opened: dict[str, ort.InferenceSession] = {}
    for step in ensemble.steps:
        if step.model not in opened:
            file = repository.root / step.model / "1" / models[step.model].file
            opened[step.model] = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        outputs = opened[step.model].run(
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


def sent(pipeline: Pipeline, batch: int = 1) -> dict[str, np.ndarray]:
    """What a client sends: every noise of a picture in the one axis, and what guidance needs."""
    plan = pipeline.bundle.manifest.plan
    noises = noises_from_seed(7, plan.noises, (batch, 4, 8, 8))
    given = {
        "input_ids": pipeline.tokenizer(["a red fox"] * batch),
        "noise": noises.reshape(-1, *noises.shape[2:]),
    }
    if plan.guidance is not None:
        given["negative_input_ids"] = pipeline.tokenizer(["blue"] * batch)
        given["guidance"] = np.full(batch, 3.0, np.float32)
    return given


@pytest.mark.parametrize("max_rows", [None, 4])
@pytest.mark.parametrize("kind", KINDS[2:])
def test_the_ensemble_of_a_plan_in_passes_draws_what_the_pipeline_draws(
    kind, max_rows, request, tmp_path
) -> None:
    bundle = request.getfixturevalue(kind)
    plan = replace(bundle.manifest.plan, max_decoder_rows=max_rows)
    bundle = replace(bundle, manifest=replace(bundle.manifest, plan=plan))
    steering = {} if plan.guidance is None else {"guidance": 3.0, "negative_prompt": "blue"}
    with Pipeline.open(bundle, "ort", RuntimeOptions(threads=1)) as pipeline:
        picture = pipeline("a red fox", seed=7, **steering).pictures[0]
        image = pipeline.decode(picture.latents[None])
        given = sent(pipeline)
    repository = write_triton_repository(bundle, tmp_path / "repo")
    drawn = run_ensemble(repository, given)
    assert psnr_db(picture.latents, drawn["latents"][0]) > 140
    assert psnr_db(image, drawn["image"]) > 140
    decoders = [step.model for step in repository.models[-1].steps if "decoder" in step.model]
    groups = sum(-(-one.rows // ((max_rows or 99) // plan.copies)) for one in plan.passes)
    assert decoders.count(f"{repository.models[-1].name}_unet_decoder") == groups


def ran(between: Between, feeds: dict[str, np.ndarray]) -> np.ndarray:
    """The one output of a model between graphs, on ONNX Runtime."""
    session = ort.InferenceSession(
        between.onnx_model().SerializeToString(), providers=["CPUExecutionProvider"]
    )
    return session.run(None, feeds)[0]


def test_sums_and_guidance_of_two_pictures_are_the_samplers() -> None:
    noises, outputs = noises_from_seed(7, 3, (2, 4, 8, 8)), noises_from_seed(9, 3, (2, 4, 8, 8))
    terms = Combination(0.3, (14.6, 0.0, -2.5), (0.7,))
    rows = [TensorSpec("one", "float32", (4, 4, 8, 8)), TensorSpec("two", "float32", (2, 4, 8, 8))]
    latents = TensorSpec("latents", "float32", (2, 4, 8, 8))
    flat = {"one": outputs[:2].reshape(4, 4, 8, 8), "two": outputs[2]}
    noise = TensorSpec("noise", "float32", (6, 4, 8, 8))
    total = ran(
        combination("latents", terms, noise, rows, latents),
        {"noise": noises.reshape(6, 4, 8, 8), **flat},
    )
    assert psnr_db(sampler_sum(terms, noises, outputs), total) > 140

    both = noises_from_seed(5, 6, (2, 4, 8, 8)).reshape(12, 4, 8, 8)  # 3 steps, 2 halves, B = 2
    scales = np.array((1.0, 7.5), np.float32)
    of = TensorSpec("outputs", "float32", ("2*steps", 4, 8, 8))
    mixed = ran(
        guided(of, TensorSpec("guidance", "float32", (2,)), replace(of, name="guided")),
        {"outputs": both, "guidance": scales},
    )
    assert np.array_equal(mixed.reshape(3, 2, 4, 8, 8), by_step(both, 3, scales))


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
        if model.max_batch and not model.name.endswith("latent_scale"):
            continue  # the files of this fixture have a fixed batch
        file = repository.root / model.name / "1" / model.file
        session = ort.InferenceSession(file, providers=["CPUExecutionProvider"])
        for tensors, found in (
            (model.inputs, session.get_inputs()),
            (model.outputs, session.get_outputs()),
        ):
            shapes = {
                t.name: tuple(
                    -1 if isinstance(side, str) else side
                    for side in (t.shape[1:] if model.max_batch else t.shape)
                )
                for t in found
            }
            assert {t.name: t.dims for t in tensors} == shapes


def test_every_tensor_of_a_step_is_made_once_before_it_and_used(
    repository: TritonRepository,
) -> None:
    """What Triton's core checks when it loads an ensemble (ensemble_utils.cc)."""
    models = {model.name: model for model in repository.models}
    ensemble = repository.models[-1]
    known = {tensor.name: tensor for tensor in ensemble.inputs}
    used = {tensor.name for tensor in ensemble.outputs}
    for step in ensemble.steps:
        model = models[step.model]
        assert set(step.inputs) == {tensor.name for tensor in model.inputs}
        for tensor in model.inputs:
            assert fits(known[step.inputs[tensor.name]], tensor)
        used.update(step.inputs.values())
        assert not known.keys() & set(step.outputs.values())
        known.update({step.outputs[t.name]: t for t in model.outputs})
    assert used == known.keys()
    for tensor in ensemble.outputs:
        assert fits(known[tensor.name], tensor)


def fits(source: TritonTensor, tensor: TritonTensor) -> bool:
    """Whether one may be handed on as the other; a side of -1 is any."""
    return source.data_type == tensor.data_type and all(
        -1 in sides or sides[0] == sides[1] for sides in zip(source.dims, tensor.dims, strict=True)
    )


def test_the_batch_is_tritons_where_it_is_open_and_in_the_dims_where_it_is_not(
    tiny_bundle, dynamic_bundle
) -> None:
    fixed = plan_of(tiny_bundle, TritonOptions())
    open_ = plan_of(dynamic_bundle, TritonOptions(max_batch=8))
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


def test_a_pass_is_cut_where_the_engine_of_the_decoder_takes_fewer_steps(
    faster_bundle, tmp_path: Path
) -> None:
    bundle = with_engines(faster_bundle, tmp_path, batch="1:1:1", decoder_steps="1:2:2")
    ensemble = plan_of(bundle, TritonOptions("tensorrt", "fox"))[-1]
    decoders = [step for step in ensemble.steps if step.model == "fox_unet_decoder"]
    assert [one.rows for one in bundle.manifest.plan.passes] == [1, 2, 3]
    assert len(decoders) == 4


def with_engines(bundle: Bundle, folder: Path, **flags: str) -> Bundle:
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
    compiled = Compiled("tensorrt", "10.3", {}, flags, graphs)
    return Bundle(root, replace(bundle.manifest, compiled={"trt": compiled}))


def test_engines_that_take_no_single_picture_are_refused(dynamic_bundle, tmp_path: Path) -> None:
    bundle = with_engines(dynamic_bundle, tmp_path, batch="2:2:4")
    with pytest.raises(UsageError, match="the engines take 2 pictures or more"):
        plan_of(bundle, TritonOptions("tensorrt"))


def test_what_no_ensemble_could_draw_is_refused(tiny_bundle) -> None:
    with pytest.raises(UsageError, match="holds no TensorRT engines"):
        plan_of(tiny_bundle, TritonOptions("tensorrt"))
    with pytest.raises(UsageError, match="unknown backend 'onnx'"):
        plan_of(tiny_bundle, TritonOptions("onnx"))
    with pytest.raises(UsageError, match="--max-batch is 0"):
        plan_of(tiny_bundle, TritonOptions(max_batch=0))
    with pytest.raises(UsageError, match=r"with an open batch; those of .* take 1") as fixed:
        plan_of(tiny_bundle, TritonOptions(max_batch=2))
    assert fixed.value.next_step == "Leave it out, or export again with --dynamic-batch."
    with pytest.raises(UsageError, match="--name is 'a b'"):
        plan_of(tiny_bundle, TritonOptions(name="a b"))


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
