"""Packages on disk: every way that weights are stored, and what is said when a file is damaged."""

from __future__ import annotations

import json
import logging
import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tiue_export.errors import BundleError

logging.getLogger("coremltools").setLevel(logging.ERROR)
ct = pytest.importorskip("coremltools", reason="coremltools is not installed")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import types  # noqa: E402
from coremltools.converters.mil.mil.ops.defs import iOS16, iOS18  # noqa: E402
from coremltools.libmilstoragepython import _BlobStorageWriter as BlobWriter  # noqa: E402
from coremltools.optimize import coreml as optimize  # noqa: E402
from coremltools.optimize._utils import pack_elements_into_bits  # noqa: E402

from tiue_export.export.coreml.mil import weights as mil_weights  # noqa: E402
from tiue_export.export.coreml.mil.evaluator import MilProgram  # noqa: E402
from tiue_export.export.coreml.mil.package import MilPackage, model_class, unpack_bits  # noqa: E402

# coremltools leaves its temporary folders to the garbage collector.
pytestmark = pytest.mark.filterwarnings(
    "ignore:Implicitly cleaning up:ResourceWarning",
    # Of k-means in scikit-learn, on weights with fewer distinct values than the palette has.
    "ignore:Number of distinct clusters",
)
RNG = np.random.default_rng(1)
X = RNG.standard_normal((1, 64, 5, 4)).astype(np.float32)
CONV = (RNG.standard_normal((64, 64, 3, 3)) / 24).astype(np.float16)
LINEAR = (RNG.standard_normal((64, 64)) / 8).astype(np.float16)


def model_of(target: Any) -> Any:
    """A convolution and a linear layer, in half precision."""

    @mb.program(input_specs=[mb.TensorSpec(shape=X.shape, dtype=types.fp16)], opset_version=target)
    def program(x: Any) -> Any:
        y = mb.conv(x=x, weight=CONV, bias=CONV[:, 0, 0, 0].copy(), pad_type="same")
        y = mb.transpose(x=y, perm=[0, 2, 3, 1])
        return mb.linear(x=y, weight=LINEAR, name="out")

    return ct.convert(
        program,
        convert_to="mlprogram",
        minimum_deployment_target=target,
        outputs=[ct.TensorType(name="out")],
        skip_model_load=True,
    )


@pytest.fixture(scope="module")
def models() -> dict[str, Any]:
    return {name: model_of(getattr(ct.target, name)) for name in ("iOS16", "iOS18")}


@pytest.fixture(scope="module")
def plain(models, tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("plain") / "plain.mlpackage"
    models["iOS18"].save(str(path))
    return path


@pytest.fixture
def own(plain, tmp_path) -> Path:
    return Path(shutil.copytree(plain, tmp_path / "own.mlpackage"))


def palettize(model: Any, **how: Any) -> Any:
    joint = how.pop("joint_compression", False)
    config = optimize.OpPalettizerConfig(mode="kmeans", weight_threshold=1, **how)
    whole = optimize.OptimizationConfig(global_config=config)
    return optimize.palettize_weights(model, whole, joint_compression=joint)


def quantize(model: Any, joint_compression: bool = False, **how: Any) -> Any:
    config = optimize.OpLinearQuantizerConfig(weight_threshold=1, **how)
    whole = optimize.OptimizationConfig(global_config=config)
    return optimize.linear_quantize_weights(model, whole, joint_compression=joint_compression)


def prune(model: Any) -> Any:
    config = optimize.OpMagnitudePrunerConfig(target_sparsity=0.6, weight_threshold=1)
    return optimize.prune_weights(model, optimize.OptimizationConfig(global_config=config))


def grouped(model: Any) -> Any:
    return palettize(model, nbits=4, granularity="per_grouped_channel", group_size=16)


STORED = {
    "1 bit": ("iOS16", lambda m: palettize(m, nbits=1)),
    "2 bits": ("iOS16", lambda m: palettize(m, nbits=2)),
    "4 bits": ("iOS16", lambda m: palettize(m, nbits=4)),
    "6 bits": ("iOS16", lambda m: palettize(m, nbits=6)),
    "8 bits": ("iOS16", lambda m: palettize(m, nbits=8)),
    "3 bits, indices as such": ("iOS18", lambda m: palettize(m, nbits=3)),
    "6 bits, indices as such": ("iOS18", lambda m: palettize(m, nbits=6)),
    "palette of a group": ("iOS18", grouped),
    "palette of vectors": ("iOS18", lambda m: palettize(m, nbits=4, cluster_dim=4)),
    "int8": ("iOS16", lambda m: quantize(m, mode="linear_symmetric")),
    "int8, zero point": ("iOS16", lambda m: quantize(m, mode="linear")),
    "uint8": ("iOS16", lambda m: quantize(m, mode="linear", dtype="uint8")),
    "int8, one scale": ("iOS18", lambda m: quantize(m, granularity="per_tensor")),
    "int4 by block": (
        "iOS18",
        lambda m: quantize(m, dtype="int4", granularity="per_block", block_size=32),
    ),
    "uint4 by block, zero point": (
        "iOS18",
        lambda m: quantize(m, mode="linear", dtype="uint4", granularity="per_block", block_size=16),
    ),
    "sparse, mask in bytes": ("iOS16", prune),
    "sparse": ("iOS18", prune),
    "sparse palette": ("iOS18", lambda m: palettize(prune(m), nbits=4, joint_compression=True)),
    "sparse int8": ("iOS18", lambda m: quantize(prune(m), joint_compression=True)),
    "palette of int8": (
        "iOS18",
        lambda m: quantize(palettize(m, nbits=4), granularity="per_tensor", joint_compression=True),
    ),
}


@pytest.mark.parametrize("name", STORED)
def test_compressed_weights_are_what_coremltools_decompresses_them_to(models, tmp_path, name):
    target, compress = STORED[name]
    compressed = compress(models[target])
    outputs = []
    for each, model in (("small", compressed), ("dense", optimize.decompress_weights(compressed))):
        package = tmp_path / f"{each}.mlpackage"
        model.save(str(package))
        outputs.append(MilProgram.open(package).run({"x": X}, "fp32").outputs["out"])
    sizes = [
        (tmp_path / f"{each}.mlpackage/Data/com.apple.CoreML/weights/weight.bin").stat().st_size
        for each in ("small", "dense")
    ]
    assert sizes[0] < 0.65 * sizes[1]
    np.testing.assert_array_equal(*outputs)


def test_weights_are_not_read_before_they_are_needed(plain, tmp_path):
    package = MilPackage.open(plain)
    assert package._mapped == {}
    program = MilProgram.open(plain)
    assert program._package._mapped == {}
    program.run({"x": X})
    assert list(program._package._mapped) == ["weight.bin"]


def test_a_run_leaves_the_weights_file_as_it_was(own):
    file = own / "Data/com.apple.CoreML/weights/weight.bin"
    before = file.read_bytes()
    MilProgram.open(own).run({"x": X})
    assert file.read_bytes() == before


BLOBS = {
    "fp16": "float16", "float": "float32", "int8": "int8", "uint8": "uint8", "int16": "int16",
    "uint16": "uint16", "int32": "int32", "uint32": "uint32",
}  # fmt: skip
PACKED = {"int4": 4, "uint1": 1, "uint2": 2, "uint3": 3, "uint4": 4, "uint6": 6}
MIL_TYPES = {"fp16": "FLOAT16", "float": "FLOAT32"}


def read_back(folder: Path, method: str, written: np.ndarray, shape: tuple[int, ...]) -> Any:
    """What apple's writer stored by `method`, as our reader finds it."""
    weights = folder / "weights"
    weights.mkdir()
    writer = BlobWriter(str(weights / "weight.bin"))
    writer.write_int8_data(np.arange(3, dtype=np.int8))  # so that it is not the first
    offset = getattr(writer, f"write_{method}_data")(written)
    del writer
    spec = model_class()()
    value = spec.mlProgram.attributes["x"]
    value.blobFileValue.fileName = "@model_path/weights/weight.bin"
    value.blobFileValue.offset = offset
    kind = value.type.tensorType
    names = type(kind).DESCRIPTOR.fields_by_name["dataType"].enum_type.values_by_name
    kind.dataType = names[MIL_TYPES.get(method, method.upper())].number
    for side in shape:
        kind.dimensions.add().constant.size = side
    return MilPackage(folder, spec, weights).value(value)


@pytest.mark.parametrize("method", BLOBS)
def test_every_type_of_weight_is_read_as_apples_writer_writes_it(tmp_path, method):
    dtype = BLOBS[method]
    array = np.array([[1, 2, 3], [100, 0, 7]]).astype(dtype)
    flat = array.reshape(-1)
    # Halves are handed over as their bits.
    got = read_back(tmp_path, method, flat.view("uint16") if method == "fp16" else flat, (2, 3))
    assert got.dtype == dtype
    np.testing.assert_array_equal(got, array)


@pytest.mark.parametrize("method", PACKED)
def test_every_packed_type_is_read_as_apples_writer_writes_it(tmp_path, method):
    bits = PACKED[method]
    low, high = (-8, 8) if method == "int4" else (0, 1 << bits)
    array = RNG.integers(low, high, (3, 7)).astype("int8" if method == "int4" else "uint8")
    got = read_back(tmp_path, method, array.reshape(-1), (3, 7))
    assert got.dtype == array.dtype
    np.testing.assert_array_equal(got, array)


@given(st.sampled_from([1, 2, 3, 4, 6, 8]), st.integers(1, 99), st.integers(0, 2**32 - 1))
def test_unpacking_undoes_coremltools_packing(bits, count, seed):
    numbers = np.random.default_rng(seed).integers(0, 1 << bits, count).astype(np.uint8)
    packed = pack_elements_into_bits(numbers, bits)
    np.testing.assert_array_equal(unpack_bits(packed, bits, count), numbers)


sides = st.lists(st.tuples(st.integers(1, 3), st.integers(1, 3)), min_size=1, max_size=4)


@given(sides, st.sampled_from(["int8", "uint8"]), st.booleans(), st.integers(0, 2**32 - 1))
def test_blocks_of_any_shape_are_scaled_as_coremltools_does(blocks, dtype, shifted, seed):
    rng = np.random.default_rng(seed)
    shape, groups = [n * b for n, b in blocks], [n for n, _ in blocks]
    low, high = np.iinfo(dtype).min, np.iinfo(dtype).max + 1
    data = rng.integers(low, high, shape).astype(dtype)
    scale = rng.random(groups).astype(np.float16)
    offset = rng.integers(0, 100, groups).astype(dtype) if shifted else None
    ours = mil_weights.blockwise_shift_scale(data, scale, offset)
    theirs = iOS18.compression.constexpr_blockwise_shift_scale.decompress(data, scale, offset)
    assert ours.dtype == scale.dtype
    np.testing.assert_array_equal(ours, theirs)


@given(sides, st.sampled_from([1, 2, 3, 4]), st.sampled_from([1, 2, 3]), st.data())
def test_palettes_of_any_groups_and_vectors_are_looked_up_as_coremltools_does(
    blocks, bits, length, data
):
    rng = np.random.default_rng(data.draw(st.integers(0, 2**32 - 1)))
    axis = np.int32(data.draw(st.integers(-len(blocks), len(blocks) - 1)))
    indices = rng.integers(0, 1 << bits, [n * b for n, b in blocks]).astype(np.uint8)
    lut = rng.standard_normal([*(n for n, _ in blocks), 1 << bits, length]).astype(np.float16)
    ours = mil_weights.lut_to_dense(indices, lut, axis)
    theirs = iOS18.compression.constexpr_lut_to_dense.decompress(indices, lut, axis)
    np.testing.assert_array_equal(ours, theirs)


def test_half_constants_that_are_cast_become_single():
    half = np.array([0.1, 2], np.float16)
    cast = mil_weights.cast(half, "fp32")
    assert cast.dtype == np.float32
    np.testing.assert_array_equal(cast, half)
    assert "constexpr_cast" in dir(iOS16.constexpr_ops)


# ---- damage


def damaged(package: Path) -> BundleError:
    with pytest.raises(BundleError) as caught:
        MilProgram.open(package).run({"x": X})
    assert caught.value.exit_code == 6
    assert "\n" not in caught.value.message
    return caught.value


def test_a_weights_file_that_was_cut_short_is_named(own):
    file = own / "Data/com.apple.CoreML/weights/weight.bin"
    content = file.read_bytes()
    file.write_bytes(content[: len(content) // 2])
    error = damaged(own)
    assert error.message.startswith(f"{own}: weight.bin is damaged: at ")
    assert error.next_step == "Convert it again, or copy it again from where it was made."
    file.write_bytes(content[:100])
    # Which weight is read first, the one whose record is cut or the one whose values are, varies.
    assert re.search("ends at 100|within 100$", damaged(own).message)
    file.write_bytes(b"")
    assert damaged(own).message.startswith(f"{file} cannot be read: ")
    file.unlink()
    assert damaged(own).message.startswith(f"{file} cannot be read: ")


def test_a_weight_whose_record_was_overwritten_is_named(own):
    file = own / "Data/com.apple.CoreML/weights/weight.bin"
    file.write_bytes(b"\0" * file.stat().st_size)
    assert damaged(own).message.endswith("there is no weight of type float16")


def test_a_program_that_is_no_protobuf_is_named(own):
    (own / "Data/com.apple.CoreML/model.mlmodel").write_bytes(b"not a model")
    assert damaged(own).message.startswith(f"{own}: model.mlmodel cannot be read: ")


def test_another_kind_of_model_is_named(own):
    spec = model_class()()
    spec.neuralNetwork.SetInParent()
    (own / "Data/com.apple.CoreML/model.mlmodel").write_bytes(spec.SerializeToString())
    assert damaged(own).message == f"{own} holds neuralNetwork; expected an ML Program"


@pytest.mark.parametrize("content", [None, "", "{}", json.dumps({"rootModelIdentifier": "x"})])
def test_a_folder_that_is_no_package_is_named(own, content):
    manifest = own / "Manifest.json"
    manifest.unlink()
    if content is not None:
        manifest.write_text(content)
    assert damaged(own).message == (
        f"{own} is no Core ML package: its Manifest.json is missing or unreadable"
    )


def test_a_package_that_is_not_there_is_named(tmp_path):
    assert damaged(tmp_path / "x.mlpackage").message == f"{tmp_path / 'x.mlpackage'} does not exist"
