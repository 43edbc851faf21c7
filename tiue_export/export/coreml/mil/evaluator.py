"""Run a saved Core ML package in torch, on any OS, as a proof of what was written to disk.

It executes the ML Program of the package op by op and checks every result against the type and
shape that the program declares. What it proves is the package: names, shapes, weights as they were
compressed, ops as they were lowered, and what rounding to half precision costs. It does not prove
how a GPU or a Neural Engine rounds within an op.

A tensor is kept in the type that the program declares and let go after its last use; a compressed
weight is opened when an op needs it.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, cast

import numpy as np
import torch
from torch import Tensor

from tiue_export.errors import BundleError, RuntimeFailure, first_line, unknown_name
from tiue_export.export.coreml.mil.ops import OPS
from tiue_export.export.coreml.mil.package import MilPackage, TensorType, tensor_type
from tiue_export.export.coreml.mil.weights import CONSTEXPR_OPS
from tiue_export.specs import Array, Feeds

Precision = Literal["fp32", "fp16"]
PRECISIONS = ("fp32", "fp16")
Progress = Callable[[int, int], None]

# How a value of a declared type is kept. torch's unsigned types beyond 8 bits cannot compute.
_STORED = {
    "float16": torch.float16, "float32": torch.float32, "bool": torch.bool,
    "int8": torch.int8, "uint8": torch.uint8, "int16": torch.int16, "uint16": torch.int32,
    "int32": torch.int32, "int64": torch.int64, "uint32": torch.int64,
    "int4": torch.int8, "uint1": torch.uint8, "uint2": torch.uint8, "uint3": torch.uint8,
    "uint4": torch.uint8, "uint6": torch.uint8,
}  # fmt: skip


@dataclass(frozen=True)
class OpRecord:
    """What one op wrote to the output `name`: its range of finite values, and how many are not.

    A function's inputs are recorded first, as the op "input". Only floats are recorded.
    """

    op: str
    name: str
    minimum: float
    maximum: float
    nonfinite: int

    @property
    def max_abs(self) -> float:
        """The largest finite |value|; 0 where there is none."""
        return max(abs(self.minimum), abs(self.maximum))


@dataclass(frozen=True)
class Evaluation:
    """One run: `outputs` in their declared types (float32 for floats in fp32), and every op."""

    outputs: dict[str, Array]
    records: tuple[OpRecord, ...]

    @property
    def max_abs(self) -> float:
        """The largest finite |value| that any op wrote."""
        return max((record.max_abs for record in self.records), default=0.0)

    @property
    def first_nonfinite(self) -> OpRecord | None:
        """The first op that wrote a NaN or an infinity."""
        return next((record for record in self.records if record.nonfinite), None)


@dataclass(frozen=True)
class _Op:
    """One op of the block. An argument is the name of a value, or a value of the protobuf."""

    kind: str
    name: str
    arguments: Mapping[str, tuple[Any, ...]]
    outputs: Mapping[str, TensorType]
    frees: tuple[str, ...] = ()


@dataclass(frozen=True)
class MilProgram:
    """One function of a saved package, ready to run."""

    package: Path
    function: str
    inputs: Mapping[str, TensorType]
    outputs: Mapping[str, TensorType]
    metadata: Mapping[str, str]
    functions: tuple[str, ...]
    _package: MilPackage = field(repr=False)
    _ops: tuple[_Op, ...] = field(repr=False)
    _constants: Mapping[str, _Op] = field(repr=False)

    @staticmethod
    def open(package: Path, function: str | None = None) -> MilProgram:
        """Read the program of a .mlpackage folder; `function` None takes the default one.

        Raises `BundleError` for a damaged package, `UsageError` for a function that it lacks, and
        `RuntimeFailure` naming every op, or input of an op, that has no semantics here.
        """
        opened = MilPackage.open(Path(package))
        chosen = function or opened.default_function()
        block = opened.block(chosen)
        ops = [_read(operation) for operation in block.operations]
        _require_known(Path(package), ops)
        computing = [op for op in ops if not _is_constant(op.kind)]
        return MilProgram(
            package=Path(package),
            function=chosen,
            inputs=opened.inputs(chosen),
            outputs=opened.outputs(chosen),
            metadata=opened.metadata(),
            functions=opened.functions(),
            _package=opened,
            _ops=_with_last_uses(computing, set(block.outputs)),
            _constants={name: op for op in ops if _is_constant(op.kind) for name in op.outputs},
        )

    @property
    def precision(self) -> Precision:
        """The coarsest type that floats are computed in."""
        halves = any(kind.dtype == "float16" for op in self._ops for kind in op.outputs.values())
        return "fp16" if halves else "fp32"

    @property
    def op_counts(self) -> Mapping[str, int]:
        """How many ops of each kind it runs, the most frequent first; constants are left out."""
        return dict(Counter(op.kind for op in self._ops).most_common())

    @torch.no_grad()
    def run(
        self, feeds: Feeds, precision: Precision = "fp16", on_op: Progress | None = None
    ) -> Evaluation:
        """Run on `feeds`, name to array. `on_op(done, total)` is called after each op.

        "fp16": what is declared as half is rounded to half after every op; sums within an op are
        single. "fp32": every float is single, so overflow of half shows as a large `max_abs`.
        """
        if precision not in PRECISIONS:
            raise unknown_name("precision", precision, PRECISIONS)
        stored = {**_STORED, "float16": _STORED["float16" if precision == "fp16" else "float32"]}
        values = self._feed(feeds, stored)
        records = [_record("input", name, value) for name, value in values.items()]
        for done, op in enumerate(self._ops, 1):
            for name, value in zip(op.outputs, self._call(op, values, stored), strict=True):
                values[name] = value
                records.append(_record(op.kind, name, value))
            for name in op.frees:
                values.pop(name, None)
            if on_op is not None:
                on_op(done, len(self._ops))
        # Copies: an output may lie in a feed's memory.
        outputs = {name: self._value(name, values).numpy().copy() for name in self.outputs}
        return Evaluation(outputs, tuple(r for r in records if r is not None))

    def _feed(self, feeds: Feeds, stored: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
        missing = [name for name in self.inputs if name not in feeds]
        if missing:
            raise RuntimeFailure(
                f"{self.package}: no value for input {', '.join(missing)}; got {', '.join(feeds)}"
            )
        values = {}
        for name, kind in self.inputs.items():
            array = np.asarray(feeds[name])
            where = f'{self.package}: input "{name}"'
            if not _fits(array.shape, kind.shape):
                raise RuntimeFailure(
                    f"{where} has shape {array.shape}; the package expects {kind.shape}"
                )
            if (array.dtype.kind == "f") != kind.dtype.startswith("float"):
                raise RuntimeFailure(f"{where} is {array.dtype}; the package expects {kind.dtype}")
            values[name] = torch.from_numpy(np.array(array, order="C")).to(stored[kind.dtype])
        return values

    def _call(
        self, op: _Op, values: Mapping[str, Tensor], stored: Mapping[str, torch.dtype]
    ) -> list[Tensor]:
        semantics = OPS[op.kind]
        where = f'{self.package}: op {op.kind} "{op.name}"'
        arguments = {}
        for name, bound in op.arguments.items():
            found = [self._value(item, values) for item in bound]
            if not semantics.moves:
                found = [_wide(item) for item in found]
            arguments[name] = found if name == "values" else found[0]
        try:
            made = semantics.function(**arguments)
        except (RuntimeError, ValueError, IndexError, KeyError, TypeError) as error:
            raise RuntimeFailure(f"{where} fails: {first_line(error)}") from error
        results = [made] if isinstance(made, Tensor) else list(made)
        if len(results) != len(op.outputs):
            raise RuntimeFailure(f"{where} gives {len(results)} outputs, not {len(op.outputs)}")
        return [
            _narrow(result, kind, stored, where)
            for result, kind in zip(results, op.outputs.values(), strict=True)
        ]

    def _value(self, item: Any, values: Mapping[str, Tensor]) -> Any:
        """A computed value, a constant, or a value that stands in the op itself."""
        if isinstance(item, str) and item in values:
            return values[item]
        constant = self._constant(item)
        return constant if isinstance(constant, str) else _tensor(constant)

    def _constant(self, item: Any) -> Array | str:
        if not isinstance(item, str):
            return self._package.value(item)
        op = self._constants.get(item)
        if op is None:
            raise BundleError(f"{self.package}: nothing gives the value {item!r}")
        if op.kind == "const":
            return self._package.value(op.arguments["val"][0])
        arguments = {name: self._constant(bound[0]) for name, bound in op.arguments.items()}
        try:
            made = CONSTEXPR_OPS[op.kind](**arguments)
        except (ValueError, IndexError, KeyError, TypeError) as error:
            raise BundleError(
                f'{self.package}: the weight {op.kind} "{op.name}" is inconsistent: '
                f"{first_line(error)}"
            ) from error
        made = made[list(op.outputs).index(item)] if isinstance(made, tuple) else made
        if not _fits(made.shape, op.outputs[item].shape):
            raise BundleError(
                f'{self.package}: the weight "{item}" has shape {made.shape}; it is declared as '
                f"{op.outputs[item].shape}"
            )
        return cast(Array, made)


def set_threads(threads: int) -> None:
    """How many threads evaluate; torch's own number, so for the whole process."""
    torch.set_num_threads(threads)


def _read(operation: Any) -> _Op:
    """One op of the protobuf; constants, and weights up to iOS17, hold parts as attributes."""
    arguments = {
        name: tuple(
            binding.name if binding.WhichOneof("binding") == "name" else binding.value
            for binding in argument.arguments
        )
        for name, argument in operation.inputs.items()
    }
    names = [output.name for output in operation.outputs]
    if _is_constant(operation.type):
        parts = {name: (value,) for name, value in operation.attributes.items() if name != "name"}
        arguments = {**parts, **arguments}
    types = {output.name: tensor_type(output.type) for output in operation.outputs}
    return _Op(operation.type, names[0] if names else "", arguments, types)


def _is_constant(kind: str) -> bool:
    return kind == "const" or kind.startswith("constexpr_")


def _require_known(package: Path, ops: list[_Op]) -> None:
    """Refuse ops, and inputs of ops, that have no semantics here: all of them at once."""
    unknown = set()
    for op in ops:
        if op.kind == "const" or op.kind in CONSTEXPR_OPS:
            continue
        if op.kind not in OPS:
            unknown.add(op.kind)
        else:
            unknown |= {f"{op.kind}({name}=)" for name in set(op.arguments) - OPS[op.kind].inputs}
    if unknown:
        raise RuntimeFailure(
            f"{package}: the evaluator has no semantics for {', '.join(sorted(unknown))}",
            "Add them to tiue_export/export/coreml/mil/ops.py, or run the package on a Mac.",
        )


def _with_last_uses(ops: list[_Op], kept: set[str]) -> tuple[_Op, ...]:
    """Each op with the values that no later one reads; also those of its own that none reads."""
    last: dict[str, int] = {}
    for index, op in enumerate(ops):
        read = (item for bound in op.arguments.values() for item in bound if isinstance(item, str))
        for name in (*op.outputs, *read):
            last[name] = index
    frees: list[list[str]] = [[] for _ in ops]
    for name, index in last.items():
        if name not in kept:
            frees[index].append(name)
    return tuple(
        _Op(op.kind, op.name, op.arguments, op.outputs, tuple(names))
        for op, names in zip(ops, frees, strict=True)
    )


def _tensor(array: Array) -> Tensor:
    if array.dtype == np.uint16 or array.dtype == np.uint32:
        array = array.astype(np.int64)
    return torch.from_numpy(array)


def _wide(value: Any) -> Any:
    return value.float() if isinstance(value, Tensor) and value.dtype == torch.float16 else value


def _narrow(
    value: Tensor, kind: TensorType, stored: Mapping[str, torch.dtype], where: str
) -> Tensor:
    """The result in its declared type; another shape, or another kind of number, is an error."""
    if not _fits(tuple(value.shape), kind.shape):
        raise RuntimeFailure(f"{where} gives shape {tuple(value.shape)}; declared is {kind.shape}")
    target = stored.get(kind.dtype)
    if target is None or _class(value.dtype) != _class(target):
        raise RuntimeFailure(f"{where} gives {value.dtype}; declared is {kind.dtype}")
    return value.to(target)


def _class(dtype: torch.dtype) -> str:
    return "float" if dtype.is_floating_point else "bool" if dtype == torch.bool else "int"


def _fits(got: tuple[int, ...], declared: tuple[int | str, ...]) -> bool:
    return len(got) == len(declared) and all(
        isinstance(side, str) or side == have for have, side in zip(got, declared, strict=True)
    )


def _record(kind: str, name: str, value: Tensor) -> OpRecord | None:
    """The range of a float tensor; None for others."""
    if not value.is_floating_point() or not value.numel():
        return None
    low, high = (float(bound) for bound in torch.aminmax(value))
    nonfinite = 0
    if not (np.isfinite(low) and np.isfinite(high)):  # a NaN makes both bounds NaN
        finite = value[torch.isfinite(value)]
        nonfinite = value.numel() - finite.numel()
        low, high = (
            (float(bound) for bound in torch.aminmax(finite)) if finite.numel() else (0.0, 0.0)
        )
    return OpRecord(kind, name, low, high, nonfinite)
