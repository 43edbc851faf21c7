"""config.pbtxt of NVIDIA Triton: a model's inputs and outputs, or the steps of an ensemble.

Field names are those of inference.ModelConfig (model_config.proto of triton-inference-server).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field

from tiue_export.errors import UsageError
from tiue_export.specs import TensorSpec

_TYPES: Mapping[str, str] = {
    "float32": "TYPE_FP32",
    "float16": "TYPE_FP16",
    "bfloat16": "TYPE_BF16",
    "int64": "TYPE_INT64",
    "int32": "TYPE_INT32",
}


@dataclass(frozen=True)
class TritonTensor:
    """`dims` leave out the batch axis where the model has a `max_batch`; -1 is any size."""

    name: str
    data_type: str
    dims: tuple[int, ...]


@dataclass(frozen=True)
class EnsembleStep:
    """One model of an ensemble; both maps go from its tensors to the ensemble's."""

    model: str
    inputs: Mapping[str, str]
    outputs: Mapping[str, str]


@dataclass(frozen=True)
class TritonModel:
    """One folder of the repository. `max_batch` 0: the batch axis is in `dims`, as it is fixed.

    `steps` make it an ensemble, which has neither a `backend` nor a `file`.
    """

    name: str
    max_batch: int
    inputs: tuple[TritonTensor, ...]
    outputs: tuple[TritonTensor, ...]
    backend: str = ""
    file: str = ""
    steps: tuple[EnsembleStep, ...] = field(default=())

    def pbtxt(self) -> str:
        """The text of config.pbtxt."""
        return "\n".join(self._lines()) + "\n"

    def _lines(self) -> Iterator[str]:
        yield f"name: {_quoted(self.name)}"
        if self.steps:
            yield 'platform: "ensemble"'
        else:
            yield f"backend: {_quoted(self.backend)}"
            yield f"default_model_filename: {_quoted(self.file)}"
        yield f"max_batch_size: {self.max_batch}"
        for kind, tensors in (("input", self.inputs), ("output", self.outputs)):
            for tensor in tensors:
                dims = ", ".join(map(str, tensor.dims))
                yield f"{kind} {{"
                yield f"  name: {_quoted(tensor.name)}"
                yield f"  data_type: {tensor.data_type}"
                yield f"  dims: [{dims}]"
                yield "}"
        if self.max_batch > 1 and not self.steps:
            yield "dynamic_batching {}"
        if self.steps:
            yield "ensemble_scheduling {"
            for step in self.steps:
                yield from _step_lines(step)
            yield "}"


def _step_lines(step: EnsembleStep) -> Iterator[str]:
    yield "  step {"
    yield f"    model_name: {_quoted(step.model)}"
    yield "    model_version: -1"
    for kind, names in (("input_map", step.inputs), ("output_map", step.outputs)):
        for own, shared in names.items():
            yield f"    {kind} {{ key: {_quoted(own)} value: {_quoted(shared)} }}"
    yield "  }"


def triton_tensor(spec: TensorSpec, *, batched: bool) -> TritonTensor:
    """A tensor of a graph as Triton names it."""
    if spec.dtype not in _TYPES:
        raise UsageError(f"{spec.name} is {spec.dtype}; Triton takes {', '.join(_TYPES)} here")
    shape = spec.shape[1:] if batched else spec.shape
    dims = tuple(-1 if isinstance(side, str) else side for side in shape)
    return TritonTensor(spec.name, _TYPES[spec.dtype], dims)


def _quoted(text: str) -> str:
    """A string in protobuf's text format; names here are ASCII without quotes."""
    return f'"{text}"'
