"""Bundle -> model repository for NVIDIA Triton: a model per graph, and an ensemble of them.

The ensemble (`ensemble.py`) takes token ids and noise and gives the picture. What `Pipeline`
computes between the graphs becomes models of their own, of a few nodes (`between.py`).
"""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass, replace
from pathlib import Path, PurePosixPath

import onnx

from tiue_export.bundle.read import Bundle
from tiue_export.errors import UsageError, unknown_name
from tiue_export.export.triton.config import TritonModel
from tiue_export.export.triton.ensemble import Part, ensemble_parts
from tiue_export.registry.support import check_support, features_of
from tiue_export.sampling.plan import Plan
from tiue_export.specs import GRAPH_NAMES, GraphSpec
from tiue_export.system.command_line import command_line
from tiue_export.system.new_folder import new_folder
from tiue_export.system.tensorrt_flavor import FOLDERS

BACKENDS = ("onnxruntime", "tensorrt")
_VERSION = "1"  # the folder of a model's first version
_TENSORRT = FOLDERS["tensorrt"]
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
    parts = plan_parts(bundle, options)
    models = tuple(part.model for part in parts)
    target = Path(out).resolve()

    def check() -> None:
        _check_target(target, {model.name for model in models}, force=force)

    with new_folder(target, check) as folder:
        for part in parts:
            _write_model(bundle, part, folder / part.model.name)
    return TritonRepository(target, models)


def plan_parts(bundle: Bundle, options: TritonOptions) -> tuple[Part, ...]:
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
    files = {
        graph: PurePosixPath(_graph_path(bundle, graph, options.backend)).name
        for graph in GRAPH_NAMES
    }
    manifest = replace(bundle.manifest, plan=_plan(bundle, options))
    return ensemble_parts(manifest, specs, prefix, max_batch, options.backend, files)


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


def _plan(bundle: Bundle, options: TritonOptions) -> Plan:
    """The bundle's plan, its passes cut where the decoder's engine takes fewer steps at once."""
    plan, batch = bundle.manifest.plan, bundle.manifest.batch
    steps = None
    if options.backend == "tensorrt":
        steps = bundle.manifest.compiled[_TENSORRT].flags.get("decoder_steps")
    if steps is None or batch is None:
        return plan
    return plan.bounded(int(str(steps).rpartition(":")[2]), plan.copies * batch)


def _batch_of(bundle: Bundle, options: TritonOptions) -> str:
    if bundle.manifest.batch is not None:
        return f"those of {bundle.root} take {bundle.manifest.batch}"
    return f"engines have a largest batch of their own: --backend is {options.backend}"


def _graph_path(bundle: Bundle, graph: str, backend: str) -> str:
    if backend == "tensorrt":
        return bundle.manifest.compiled[_TENSORRT].graphs[graph].path
    return bundle.graph_path(graph).relative_to(bundle.root).as_posix()


def _write_model(bundle: Bundle, part: Part, folder: Path) -> None:
    version = folder / _VERSION  # an ensemble's stays empty
    version.mkdir(parents=True)
    (folder / "config.pbtxt").write_text(part.model.pbtxt(), "utf-8")
    if part.between is not None:
        onnx.save(part.between.onnx_model(), version / part.model.file)
    elif part.graph:
        for name in _files(bundle, part.graph, part.model.backend):
            shutil.copyfile(bundle.root / name, version / PurePosixPath(name).name)


def _files(bundle: Bundle, graph: str, backend: str) -> list[str]:
    """The graph's file and the external weights beside it, by their paths in the bundle."""
    if backend == "tensorrt":
        return list(bundle.manifest.compiled[_TENSORRT].graphs[graph].files)
    files = bundle.manifest.graphs[graph].files
    return [name for name in files if not name.endswith(".json")]


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
