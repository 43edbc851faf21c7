"""Bundle -> model repository for NVIDIA Triton: a model per graph, and an ensemble of them.

The ensemble takes token ids and noise and gives the picture. What `Pipeline` does between the
graphs is one division, before the VAE: it becomes a model of its own, a graph of one node.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath

import onnx
from onnx import TensorProto, helper

from tiue_export.bundle.chain import NOISE, ONE_PASS, PICTURE
from tiue_export.bundle.read import Bundle
from tiue_export.errors import UsageError, unknown_name
from tiue_export.export.triton.config import (
    EnsembleStep,
    TritonModel,
    TritonTensor,
    triton_tensor,
)
from tiue_export.registry.support import check_support, features_of
from tiue_export.specs import (
    GRAPH_NAMES,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    GraphSpec,
)
from tiue_export.system.command_line import command_line
from tiue_export.system.new_folder import new_folder
from tiue_export.system.tensorrt_flavor import FOLDERS

BACKENDS = ("onnxruntime", "tensorrt")
_VERSION = "1"  # the folder of a model's first version
_TENSORRT = FOLDERS["tensorrt"]
_SCALE = "latent_scale"
_OPSET = 19
_MAX_BATCH = 4
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")


@dataclass(frozen=True)
class TritonOptions:
    """`name` is the ensemble's and the prefix of its parts \\[default: the bundle's folder].

    `max_batch` is for ONNX graphs with an open batch \\[default: 4]; engines have a largest of
    their own.
    """

    backend: str = "onnxruntime"
    name: str | None = None
    max_batch: int | None = None


@dataclass(frozen=True)
class TritonRepository:
    """What was written; the ensemble is last."""

    root: Path
    models: tuple[TritonModel, ...]


def write_triton_repository(
    bundle: Bundle,
    out: str | Path,
    options: TritonOptions | None = None,
    *,
    force: bool = False,
) -> TritonRepository:
    """Write the repository whole or not at all.

    `force` replaces a folder that holds nothing but the models of an earlier one. Raises
    `UsageError` for a bundle that no ensemble can draw from, or an `out` that is in the way.
    """
    options = options or TritonOptions()
    models = plan_models(bundle, options)
    target = Path(out).resolve()

    def check() -> None:
        _check_target(target, {model.name for model in models}, force=force)

    with new_folder(target, check) as folder:
        for model in models:
            _write_model(bundle, model, folder / model.name)
    return TritonRepository(target, models)


def plan_models(bundle: Bundle, options: TritonOptions) -> tuple[TritonModel, ...]:
    """Every model of the repository; the ensemble is last."""
    _check(bundle, options)
    prefix = options.name or re.sub(r"[^A-Za-z0-9_.-]+", "-", bundle.root.resolve().name)
    if not _NAME.fullmatch(prefix):
        raise UsageError(f"--name is {prefix!r}; expected letters, digits, '.', '_' or '-'")
    specs = {graph: bundle.spec(graph) for graph in GRAPH_NAMES}
    batched = all(_has_batch(spec) for spec in specs.values())
    if options.max_batch is not None and (not batched or options.backend == "tensorrt"):
        raise UsageError(
            f"--max-batch is for ONNX graphs with an open batch; {_batch_of(bundle, options)}",
            "Leave it out" + ("." if batched else ", or export again with --dynamic-batch."),
        )
    max_batch = _max_batch(bundle, options) if batched else 0
    graphs = {
        graph: TritonModel(
            name=f"{prefix}_{graph}",
            max_batch=max_batch,
            inputs=tuple(triton_tensor(t, batched=batched) for t in spec.inputs),
            outputs=tuple(triton_tensor(t, batched=batched) for t in spec.outputs),
            backend=options.backend,
            file=PurePosixPath(_graph_path(bundle, graph, options.backend)).name,
        )
        for graph, spec in specs.items()
    }
    scale = TritonModel(
        name=f"{prefix}_{_SCALE}",
        max_batch=max_batch,
        inputs=_renamed(graphs[UNET_DECODER].outputs, "latents", "latents"),
        outputs=_renamed(graphs[VAE_DECODER].inputs, "latent_sample", "latent_sample"),
        backend="onnxruntime",
        file="model.onnx",
    )
    return (*graphs.values(), scale, _ensemble(prefix, max_batch, graphs, scale))


def _ensemble(
    prefix: str, max_batch: int, graphs: Mapping[str, TritonModel], scale: TritonModel
) -> TritonModel:
    """Tensors travel by name, as they do in `Pipeline`; the noise gets a name of its own."""
    text, encoder, decoder, vae = (graphs[graph] for graph in GRAPH_NAMES)
    names = {NOISE: "noise", PICTURE: "image"}  # values that clients see under other names

    def step(graph: str, model: TritonModel) -> EnsembleStep:
        def places(tensors: Iterable[TritonTensor]) -> dict[str, str]:
            values = {tensor.name: ONE_PASS.value(graph, tensor.name) for tensor in tensors}
            return {tensor: names.get(value, value) for tensor, value in values.items()}

        return EnsembleStep(model.name, places(model.inputs), places(model.outputs))

    steps = (
        step(TEXT_ENCODER, text),
        step(UNET_ENCODER, encoder),
        step(UNET_DECODER, decoder),
        step(_SCALE, scale),
        step(VAE_DECODER, vae),
    )
    return TritonModel(
        name=prefix,
        max_batch=max_batch,
        inputs=(
            *_renamed(text.inputs, "input_ids", "input_ids"),
            *_renamed(encoder.inputs, "sample", "noise"),
        ),
        outputs=(
            *_renamed(decoder.outputs, "latents", "latents"),
            *_renamed(vae.outputs, "sample", "image"),
        ),
        steps=steps,
    )


def _renamed(tensors: tuple[TritonTensor, ...], name: str, to: str) -> tuple[TritonTensor]:
    (found,) = (tensor for tensor in tensors if tensor.name == name)
    return (TritonTensor(to, found.data_type, found.dims),)


def _check(bundle: Bundle, options: TritonOptions) -> None:
    """Refuse what the repository could not draw with."""
    if options.backend not in BACKENDS:
        raise unknown_name("backend", options.backend, BACKENDS)
    if options.max_batch is not None and options.max_batch < 1:
        raise UsageError(f"--max-batch is {options.max_batch}; expected 1 or more")
    features = features_of(bundle.manifest)
    if options.backend == "tensorrt":
        features -= {"bf16", "without-onnx"}  # engines are there, whatever the ONNX files are
    check_support("triton", features, str(bundle.root))
    if options.backend == "tensorrt" and _TENSORRT not in bundle.manifest.compiled:
        raise UsageError(
            f"{bundle.root} holds no TensorRT engines",
            command_line("trt", "--bundle", bundle.root, "--flavor", "tensorrt")
            + ", with the TensorRT version of your Triton.",
        )


def _has_batch(spec: GraphSpec) -> bool:
    """Whether each tensor's first axis, and only that, is free: what Triton can batch."""
    tensors = (*spec.inputs, *spec.outputs)
    return all(isinstance(tensor.shape[0], str) for tensor in tensors)


def _max_batch(bundle: Bundle, options: TritonOptions) -> int:
    if options.backend != "tensorrt":
        return options.max_batch or _MAX_BATCH
    smallest, *_, largest = str(bundle.manifest.compiled[_TENSORRT].flags["batch"]).split(":")
    if int(smallest) != 1:
        raise UsageError(
            f"the engines take {smallest} pictures or more; Triton also sends single ones",
            command_line("trt", "--bundle", bundle.root, "--batch", f"1:2:{largest}"),
        )
    return int(largest)


def _batch_of(bundle: Bundle, options: TritonOptions) -> str:
    if bundle.manifest.batch is not None:
        return f"those of {bundle.root} take {bundle.manifest.batch}"
    return f"engines have a largest batch of their own: --backend is {options.backend}"


def _graph_path(bundle: Bundle, graph: str, backend: str) -> str:
    if backend == "tensorrt":
        return bundle.manifest.compiled[_TENSORRT].graphs[graph].path
    return bundle.graph_path(graph).relative_to(bundle.root).as_posix()


def _write_model(bundle: Bundle, model: TritonModel, folder: Path) -> None:
    version = folder / _VERSION
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(model.pbtxt(), "utf-8")
    if model.steps:
        return  # an ensemble's version folder is empty
    graph = next((name for name in GRAPH_NAMES if model.name.endswith(f"_{name}")), None)
    if graph is None:
        onnx.save(_scale_graph(model, bundle.manifest.vae_scaling_factor), version / model.file)
        return
    for name in _files(bundle, graph, model.backend):
        place = version / PurePosixPath(name).name
        shutil.copyfile(bundle.root / name, place)


def _files(bundle: Bundle, graph: str, backend: str) -> list[str]:
    """The graph's file and the external weights beside it, by their paths in the bundle."""
    if backend == "tensorrt":
        return list(bundle.manifest.compiled[_TENSORRT].graphs[graph].files)
    files = bundle.manifest.graphs[graph].files
    return [name for name in files if not name.endswith(".json")]


def _scale_graph(model: TritonModel, scaling_factor: float) -> onnx.ModelProto:
    """latent_sample = latents / scaling_factor, in float32 as `Pipeline.decode` computes it."""
    (before,), (after,) = model.inputs, model.outputs
    batch = ("batch",) if model.max_batch else ()
    graph = helper.make_graph(
        [helper.make_node("Div", [before.name, "scaling_factor"], [after.name])],
        _SCALE,
        [helper.make_tensor_value_info(before.name, TensorProto.FLOAT, (*batch, *before.dims))],
        [helper.make_tensor_value_info(after.name, TensorProto.FLOAT, (*batch, *after.dims))],
        [helper.make_tensor("scaling_factor", TensorProto.FLOAT, (), (scaling_factor,))],
    )
    opset = helper.make_opsetid("", _OPSET)
    made = helper.make_model(graph, opset_imports=[opset], producer_name="tiue-export")
    made.ir_version = 9  # what ONNX Runtime 1.18 reads
    onnx.checker.check_model(made)
    return made


def _check_target(target: Path, names: set[str], *, force: bool) -> None:
    if not target.exists():
        target.parent.mkdir(parents=True, exist_ok=True)
        return
    if not target.is_dir():
        raise UsageError(f"--out {target} is a file", "Name a folder.")
    others = sorted({entry.name for entry in target.iterdir()} - names)
    if not any(target.iterdir()):
        return
    if others:
        raise UsageError(
            f"{target} holds {others[0]}, which is none of this repository's models; it is never "
            "replaced",
            "Choose another --out; folders of models can be moved into one repository.",
        )
    if not force:
        raise UsageError(
            f"{target} holds these models already",
            "Pass --force to replace them, or another --out.",
        )
