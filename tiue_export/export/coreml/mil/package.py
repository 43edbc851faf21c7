"""A saved .mlpackage, read on any OS: the program as its protobuf, the weights on demand.

The folder's Manifest.json names the protobuf of the model, com.apple.CoreML/model.mlmodel, and
weights lie beside that in weights/weight.bin. The protobuf is read with coremltools' own classes.
A weights file begins with a header of 64 bytes; a value names the offset of a record of 64 bytes,
which gives type, size and offset of the data (coremltools: mlmodel/src/MILBlob/Blob/
StorageFormat.hpp). Files are mapped, not read: a weight takes memory while it is looked at.
"""

from __future__ import annotations

import importlib.util
import math
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from tiue_export.errors import BundleError, first_line, unknown_name
from tiue_export.registry.packages import require
from tiue_export.specs import Array
from tiue_export.system.json_file import read_json
from tiue_export.system.quiet import errors_only

_RECORD = struct.Struct("<IIQQQ")  # sentinel, type, size in bytes, offset, bits of padding
_SENTINEL = 0xDEADBEEF
# MIL's type, as the protobuf spells it: NumPy's name. The last ones are packed, low bits first.
_TYPES = {
    "BOOL": "bool", "STRING": "str", "FLOAT16": "float16", "FLOAT32": "float32",
    "INT8": "int8", "INT16": "int16", "INT32": "int32", "INT64": "int64",
    "UINT8": "uint8", "UINT16": "uint16", "UINT32": "uint32", "UINT64": "uint64",
    "INT4": "int4", "UINT1": "uint1", "UINT2": "uint2", "UINT3": "uint3", "UINT4": "uint4",
    "UINT6": "uint6",
}  # fmt: skip
_PACKED_BITS = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
# Numbers of the types in a weights file.
_BLOB_TYPES = {
    1: "float16", 2: "float32", 3: "uint8", 4: "int8", 6: "int16", 7: "uint16", 8: "int4",
    9: "uint1", 10: "uint2", 11: "uint4", 12: "uint3", 13: "uint6", 14: "int32", 15: "uint32",
}  # fmt: skip
_AGAIN = "Convert it again, or copy it again from where it was made."


class TensorType(NamedTuple):
    """`dtype` in NumPy's words (uint4 and the like for packed ones); "?" is a side left open."""

    dtype: str
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class MilPackage:
    """An ML Program on disk: `spec` is its protobuf (coremltools.proto.Model_pb2.Model)."""

    path: Path
    spec: Any = field(repr=False)
    _weights: Path = field(repr=False)
    _mapped: dict[str, Array] = field(default_factory=dict, repr=False, compare=False)

    @staticmethod
    def open(path: Path) -> MilPackage:
        """Read the program; weights are only looked at when a value is asked for.

        Raises `BundleError` when this is no package, is damaged, or holds no ML Program.
        """
        require("reading Core ML packages", ("coremltools",), "coreml")
        model_file = _model_file(path)
        spec = model_class()()
        try:
            spec.ParseFromString(model_file.read_bytes())
        except Exception as error:  # OSError, or protobuf's own DecodeError
            raise BundleError(
                f"{path}: {model_file.name} cannot be read: {first_line(error)}", _AGAIN
            ) from error
        kind = spec.WhichOneof("Type")
        if kind != "mlProgram":
            raise BundleError(
                f"{path} holds {kind or 'no model'}; expected an ML Program",
                "Convert with a deployment target of iOS15/macOS12 or later.",
            )
        return MilPackage(path, spec, model_file.parent / "weights")

    def functions(self) -> tuple[str, ...]:
        """Names of the program's functions, sorted."""
        return tuple(sorted(self.spec.mlProgram.functions))

    def default_function(self) -> str:
        """The function that runs when none is named."""
        # A package with one function has no list of them in its description.
        return str(self.spec.description.defaultFunctionName or "main")

    def block(self, function: str) -> Any:
        """The protobuf's `Block` of a function; `UsageError` when there is no such function."""
        if function not in self.functions():
            raise unknown_name(f"function of {self.path}", function, self.functions())
        body = self.spec.mlProgram.functions[function]
        return body.block_specializations[body.opset]

    def inputs(self, function: str) -> dict[str, TensorType]:
        """What a function takes, by name."""
        body = self.spec.mlProgram.functions[function]
        return {item.name: tensor_type(item.type) for item in body.inputs}

    def outputs(self, function: str) -> dict[str, TensorType]:
        """What a function gives, by name."""
        block = self.block(function)
        wanted = set(block.outputs)
        given = {
            output.name: output.type
            for operation in block.operations
            for output in operation.outputs
            if output.name in wanted
        }
        inputs = self.inputs(function)
        return {n: tensor_type(given[n]) if n in given else inputs[n] for n in block.outputs}

    def metadata(self) -> dict[str, str]:
        """What whoever made the package wrote into it, by key."""
        return dict(self.spec.description.metadata.userDefined)

    def value(self, value: Any) -> Array | str:
        """A `Value` of the protobuf: an array (a view of the file where it lies there) or a text.

        Packed integers come unpacked, one to a byte. Raises `BundleError` naming the file when a
        weight is not where the program says.
        """
        kind = tensor_type(value.type)
        if value.WhichOneof("value") == "blobFileValue":
            return self._blob(value.blobFileValue, kind)
        return _immediate(value.immediateValue.tensor, kind)

    def _blob(self, place: Any, kind: TensorType) -> Array:
        name = place.fileName.rpartition("/")[2]
        data = self._file(name)
        where = f"{self.path}: {name} is damaged: at {place.offset} "
        if place.offset + _RECORD.size > data.size:
            raise BundleError(f"{where}it should hold a weight, but it ends at {data.size}", _AGAIN)
        record = _RECORD.unpack(data[place.offset : place.offset + _RECORD.size].tobytes())
        sentinel, type_number, size_bytes, offset, _ = record
        count = math.prod(int(side) for side in kind.shape)
        if sentinel != _SENTINEL or _BLOB_TYPES.get(type_number) != kind.dtype:
            raise BundleError(f"{where}there is no weight of type {kind.dtype}", _AGAIN)
        expected = _size_bytes(kind.dtype, count)
        if size_bytes != expected or offset + size_bytes > data.size:
            raise BundleError(
                f"{where}a weight of {size_bytes} bytes from {offset} does not fit; expected "
                f"{expected} within {data.size}",
                _AGAIN,
            )
        return _from_bytes(data[offset : offset + size_bytes], kind)

    def _file(self, name: str) -> Array:
        if name not in self._mapped:
            file = self._weights / name
            try:
                # Copy-on-write: torch takes no read-only memory, and the file must stay as it is.
                self._mapped[name] = np.memmap(file, np.uint8, mode="c")
            except (OSError, ValueError) as error:  # ValueError: the file is empty
                raise BundleError(f"{file} cannot be read: {first_line(error)}", _AGAIN) from error
        return self._mapped[name]


def tensor_type(value_type: Any) -> TensorType:
    """The protobuf's `ValueType` of a tensor, a scalar or a text."""
    tensor = value_type.tensorType
    name = type(tensor).DESCRIPTOR.fields_by_name["dataType"].enum_type
    spelled = name.values_by_number[tensor.dataType].name
    shape = tuple(
        int(side.constant.size) if side.WhichOneof("dimension") == "constant" else "?"
        for side in tensor.dimensions
    )
    return TensorType(_TYPES.get(spelled, spelled.lower()), shape)


def unpack_bits(packed: Array, bits: int, count: int) -> Array:
    """`count` unsigned numbers of `bits` each, packed low bits first: uint8 (count,)."""
    if bits == 8:
        return packed[:count]
    # The shortest run of whole bytes that holds whole numbers: 3 bytes of four 6-bit numbers.
    run_bytes = math.lcm(bits, 8) // 8
    per_run = run_bytes * 8 // bits
    runs = -(-count // per_run)
    padded = np.zeros((runs, run_bytes), np.uint8)
    padded.reshape(-1)[: packed.size] = packed[: padded.size]
    word = np.zeros(runs, np.uint32)
    for index in range(run_bytes):
        word |= padded[:, index].astype(np.uint32) << np.uint32(8 * index)
    numbers = np.empty((runs, per_run), np.uint8)
    mask = np.uint32((1 << bits) - 1)
    for index in range(per_run):
        numbers[:, index] = (word >> np.uint32(bits * index)) & mask
    return numbers.reshape(-1)[:count]


def model_class() -> Any:
    """coremltools' protobuf class of a model."""
    with errors_only("coremltools"):  # it warns of libraries that only macOS has
        from coremltools.proto import Model_pb2
    return Model_pb2.Model


def has_native_library(name: str) -> bool:
    """Whether the installed coremltools has one of its compiled libraries; nothing is imported.

    libcoremlpython is Core ML itself, on macOS alone; libmilstoragepython writes weights. Where pip
    found no wheel it built a package without either.
    """
    found = importlib.util.find_spec("coremltools")
    if found is None or found.origin is None:
        return False
    return any(Path(found.origin).parent.glob(f"{name}*.so"))


def _model_file(path: Path) -> Path:
    try:
        manifest = read_json(path / "Manifest.json")
        root = manifest["itemInfoEntries"][manifest["rootModelIdentifier"]]["path"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BundleError(
            f"{path} is no Core ML package: its Manifest.json is missing or unreadable"
            if path.exists()
            else f"{path} does not exist",
            _AGAIN,
        ) from error
    return path / "Data" / str(root)


def _immediate(tensor: Any, kind: TensorType) -> Array | str:
    held = tensor.WhichOneof("value")
    if held is None:
        return np.zeros(_sides(kind), _numpy_dtype(kind.dtype))
    values = getattr(tensor, held).values
    if kind.dtype == "str":
        return str(values[0])
    if held == "bytes":
        return _from_bytes(np.frombuffer(bytearray(values), np.uint8), kind)
    return np.array(values, _numpy_dtype(kind.dtype)).reshape(_sides(kind))


def _from_bytes(data: Array, kind: TensorType) -> Array:
    bits = _PACKED_BITS.get(kind.dtype)
    if bits is None:
        return data.view(_numpy_dtype(kind.dtype)).reshape(_sides(kind))
    numbers = unpack_bits(data, bits, math.prod(_sides(kind)))
    if kind.dtype.startswith("int"):
        half = 1 << (bits - 1)
        return ((numbers.astype(np.int8) ^ half) - half).reshape(_sides(kind))
    return numbers.reshape(_sides(kind))


def _size_bytes(dtype: str, count: int) -> int:
    bits = _PACKED_BITS.get(dtype)
    return count * _numpy_dtype(dtype).itemsize if bits is None else -(-count * bits // 8)


def _sides(kind: TensorType) -> tuple[int, ...]:
    return tuple(int(side) for side in kind.shape)


def _numpy_dtype(dtype: str) -> np.dtype[Any]:
    if dtype in _PACKED_BITS:
        return np.dtype("int8" if dtype.startswith("int") else "uint8")
    return np.dtype(dtype)
