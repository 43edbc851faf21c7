"""The evaluator of Core ML packages: every op against coremltools' own constant folding or torch.

One package holds all the ops of the table, so what is tested was written to disk and read again.
"""

from __future__ import annotations

import gc
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from tiue_export.errors import RuntimeFailure, UsageError

logging.getLogger("coremltools").setLevel(logging.ERROR)
ct = pytest.importorskip("coremltools", reason="coremltools is not installed")

from coremltools.converters.mil.mil import Builder as mb  # noqa: E402
from coremltools.converters.mil.mil import Function, types  # noqa: E402
from mil_cases import CASES, TARGET, Case, save_function  # noqa: E402

from tiue_export.export.coreml.mil.evaluator import MilProgram  # noqa: E402
from tiue_export.export.coreml.mil.ops import OPS  # noqa: E402

# coremltools leaves its temporary folders to the garbage collector.
pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
IDS = [f"{case.op}-{index}" for index, case in enumerate(CASES)]


def placeholder(array: np.ndarray) -> Any:
    """An input of a program; Core ML has none of bool or of short integers."""
    kinds = {"float32": types.fp32, "float16": types.fp16}
    return mb.placeholder(shape=array.shape, dtype=kinds.get(str(array.dtype), types.int32))


def as_declared(var: Any, array: np.ndarray) -> Any:
    narrow = str(array.dtype) in ("bool", "int16", "int8")
    return mb.cast(x=var, dtype=str(array.dtype)) if narrow else var


def as_output(var: Any, name: str) -> Any:
    if var.dtype in (types.fp32, types.fp16, types.int32):
        return mb.identity(x=var, name=name)
    return mb.cast(x=var, dtype="int32", name=name)


def one_op(path: Path, arrays: dict[str, np.ndarray], build: Any) -> Path:
    """A package with the given inputs and the ops that `build(inputs)` makes, called "out"."""
    inputs = {name: placeholder(array) for name, array in arrays.items()}
    with Function(inputs, opset_version=TARGET) as function:
        function.set_outputs([as_output(build(function.inputs), "out")])
    return save_function(function, path)


@pytest.fixture(scope="module")
def all_ops(tmp_path_factory) -> Path:
    inputs = {
        f"case{index}_{name}": placeholder(array)
        for index, case in enumerate(CASES)
        for name, array in case.live.items()
    }
    with Function(inputs, opset_version=TARGET) as function:
        outputs = []
        for index, case in enumerate(CASES):
            given = {
                name: as_declared(function.inputs[f"case{index}_{name}"], array)
                for name, array in case.live.items()
            }
            results = enumerate(case.build(given))
            outputs += [as_output(var, f"case{index}_out{n}") for n, var in results]
        function.set_outputs(outputs)
    return save_function(function, tmp_path_factory.mktemp("mil") / "all_ops.mlpackage")


@pytest.fixture(scope="module")
def results(all_ops) -> dict[str, np.ndarray]:
    feeds = {
        f"case{index}_{name}": array.astype(np.int32) if array.dtype.kind in "bi" else array
        for index, case in enumerate(CASES)
        for name, array in case.live.items()
    }
    return MilProgram.open(all_ops).run(feeds, "fp32").outputs


def expected(case: Case) -> list[np.ndarray]:
    if case.torch is not None:
        result = case.torch(*(torch.from_numpy(array) for array in case.live.values()))
        return [result.numpy()]
    with Function({}, opset_version=TARGET):
        return [np.asarray(var.val) for var in case.build(case.live)]


@pytest.mark.parametrize("index", range(len(CASES)), ids=IDS)
def test_an_op_means_what_coremltools_or_torch_makes_of_it(results, index):
    case = CASES[index]
    for number, wanted in enumerate(expected(case)):
        assert wanted.dtype != object, "coremltools folds this op to nothing: give the case a torch"
        got = results[f"case{index}_out{number}"]
        assert got.shape == wanted.shape
        assert got.dtype.kind == ("f" if wanted.dtype.kind == "f" else "i")
        np.testing.assert_allclose(got, wanted.astype(got.dtype), rtol=2e-5, atol=2e-6)


def test_every_op_of_the_semantics_file_is_in_the_table():
    assert set(OPS) == {case.op for case in CASES}


def test_the_program_says_what_it_takes_gives_and_computes(all_ops):
    program = MilProgram.open(all_ops)
    assert program.function == "main"
    assert program.functions == ("main",)
    assert program.precision == "fp32"
    assert program.inputs["case0_x"] == ("float32", (2, 3, 4))
    assert program.outputs["case0_out0"] == ("float32", (2, 3, 4))
    assert program.op_counts["conv"] == sum(case.op == "conv" for case in CASES)
    assert "const" not in program.op_counts


@pytest.fixture(scope="module")
def halves(tmp_path_factory) -> Path:
    """Half precision: out = (x * x) + 1 - and a sum, both of (4096,)."""
    with Function({"x": placeholder(np.zeros(4096, np.float16))}, opset_version=TARGET) as f:
        x = f.inputs["x"]
        squared = mb.mul(x=x, y=x, name="squared")
        total = mb.reduce_sum(x=x, axes=[0], keep_dims=True, name="total")
        f.set_outputs([mb.add(x=squared, y=np.float16(1), name="out"), total])
    return save_function(f, tmp_path_factory.mktemp("mil") / "halves.mlpackage")


def test_half_tensors_are_rounded_after_each_op_and_sums_within_an_op_are_single(halves):
    program = MilProgram.open(halves)
    x = np.full(4096, 1.0009765625, np.float16)  # 1 + 2^-10
    half = program.run({"x": x}, "fp16").outputs
    single = program.run({"x": x}, "fp32").outputs
    assert program.precision == "fp16"
    assert half["out"].dtype == np.float16
    assert single["out"].dtype == np.float32
    # x * x = 1 + 2^-9 + 2^-20, of which half keeps all but the last; adding 1 drops 2^-9's half.
    assert float(single["out"][0]) == np.float32(2 + 2**-9 + 2**-20)
    assert float(half["out"][0]) == float(np.float16(np.float16(1 + 2**-9) + np.float16(1)))
    # A sum kept in half would stay at 2048, where adding 1 changes nothing.
    assert float(half["total"][0]) == 4100


def test_a_feed_in_single_precision_is_rounded_where_the_program_takes_halves(halves):
    program, x = MilProgram.open(halves), np.full(4096, 0.1, np.float32)
    rounded = program.run({"x": x}).outputs["total"]
    np.testing.assert_array_equal(
        rounded, program.run({"x": x.astype(np.float16)}).outputs["total"]
    )
    assert program.run({"x": x}, "fp32").outputs["total"] == pytest.approx(409.6)


def test_overflow_of_half_is_recorded_at_its_op_and_shows_as_a_large_number_in_fp32(halves):
    program = MilProgram.open(halves)
    x = np.zeros(4096, np.float32)
    x[:3] = 300
    half, single = (program.run({"x": x}, mode) for mode in ("fp16", "fp32"))
    first = half.first_nonfinite
    assert first is not None
    assert (first.op, first.name, first.nonfinite) == ("mul", "squared", 3)
    assert single.first_nonfinite is None
    assert single.max_abs == 90001
    by_name = {record.name: record for record in single.records}
    assert by_name["x"].op == "input"
    assert (by_name["squared"].minimum, by_name["squared"].maximum) == (0, 90000)
    assert list(by_name) == ["x", "squared", "total", "out"]


def test_a_nan_is_counted_and_the_range_is_that_of_the_others(halves):
    x = np.linspace(-2, 1, 4096, dtype=np.float32)
    x[5] = np.nan
    record = MilProgram.open(halves).run({"x": x}, "fp32").records[0]
    assert (record.minimum, record.maximum, record.nonfinite) == (-2, 1, 1)
    assert record.max_abs == 2


def test_tensors_are_let_go_after_their_last_use(tmp_path):
    side = 1_234_567

    def chain(inputs: Any) -> Any:
        value = inputs["x"]
        for _ in range(4):
            value = mb.add(x=value, y=1.0)
        return value

    program = MilProgram.open(one_op(tmp_path / "c.mlpackage", {"x": np.zeros(side, "f4")}, chain))
    alive = []

    def count(done: int, total: int) -> None:
        tensors = (o for o in gc.get_objects() if type(o) is torch.Tensor)
        alive.append((done, total, sum(tensor.shape == (side,) for tensor in tensors)))

    assert program.run({"x": np.zeros(side, np.float32)}, on_op=count).outputs["out"][0] == 4
    assert [done for done, _, _ in alive] == list(range(1, 6))
    assert max(number for _, _, number in alive) <= 2


def test_feeds_are_left_alone_and_outputs_own_their_memory(tmp_path):
    array = np.arange(6, dtype=np.float32)
    array.setflags(write=False)
    package = one_op(tmp_path / "i.mlpackage", {"x": array}, lambda inputs: inputs["x"])
    program = MilProgram.open(package)
    first = program.run({"x": array}).outputs["out"]
    first[:] = 7
    assert array[1] == 1
    assert program.run({"x": array}).outputs["out"][1] == 1


@pytest.mark.parametrize(
    ("feeds", "message"),
    [
        ({}, "no value for input x; got "),
        ({"x": np.zeros(3, np.float32)}, 'input "x" has shape (3,); the package expects (4096,)'),
        ({"x": np.zeros(4096, np.int32)}, 'input "x" is int32; the package expects float16'),
    ],
)
def test_a_feed_that_does_not_fit_is_refused_by_name(halves, feeds, message):
    with pytest.raises(RuntimeFailure) as caught:
        MilProgram.open(halves).run(feeds)
    assert caught.value.message == f"{halves}: {message}"


def test_an_unknown_precision_is_refused_by_name(halves):
    with pytest.raises(UsageError, match="unknown precision 'bf16'; there are: fp16, fp32"):
        MilProgram.open(halves).run({"x": np.zeros(4096, np.float32)}, "bf16")


def test_ops_and_inputs_without_semantics_are_all_named_with_the_package(tmp_path):
    arrays = {"x": np.zeros((1, 2, 4, 4), np.float32)}

    def build(inputs: Any) -> Any:
        pooled = mb.max_pool(x=inputs["x"], kernel_sizes=[2, 2], pad_type="valid")
        return mb.upsample_bilinear(x=mb.atan(x=pooled), half_pixel_centers=True)

    package = one_op(tmp_path / "unknown.mlpackage", arrays, build)
    with pytest.raises(RuntimeFailure) as caught:
        MilProgram.open(package)
    assert caught.value.message == (
        f"{package}: the evaluator has no semantics for atan, max_pool, "
        "upsample_bilinear(half_pixel_centers=)"
    )
    assert "run the package on a Mac" in (caught.value.next_step or "")


def rewrite(package: Path, change: Any) -> None:
    """Change the program that a package holds: `change(operations)`."""
    from tiue_export.export.coreml.mil.package import model_class

    file = package / "Data" / "com.apple.CoreML" / "model.mlmodel"
    spec = model_class()()
    spec.ParseFromString(file.read_bytes())
    function = spec.mlProgram.functions["main"]
    change(function.block_specializations[function.opset].operations)
    file.write_bytes(spec.SerializeToString())


def test_a_result_that_is_not_what_the_program_declares_is_an_error(tmp_path):
    arrays = {"x": np.zeros((2, 3), np.float32)}
    package = one_op(tmp_path / "lie.mlpackage", arrays, lambda inputs: mb.relu(x=inputs["x"]))

    def declare_four(operations: Any) -> None:
        (relu,) = (op for op in operations if op.type == "relu")
        relu.outputs[0].type.tensorType.dimensions[1].constant.size = 4

    rewrite(package, declare_four)
    with pytest.raises(RuntimeFailure, match=r'op relu "relu_\d+" gives shape \(2, 3\); declared'):
        MilProgram.open(package).run(arrays)

    def declare_integers(operations: Any) -> None:
        declare_four(operations)
        (relu,) = (op for op in operations if op.type == "relu")
        relu.outputs[0].type.tensorType.dimensions[1].constant.size = 3
        relu.outputs[0].type.tensorType.dataType = 23

    rewrite(package, declare_integers)
    with pytest.raises(RuntimeFailure, match=r"gives torch.float32; declared is int32"):
        MilProgram.open(package).run(arrays)


def test_an_op_that_torch_refuses_is_named(tmp_path):
    arrays = {"x": np.zeros((2, 3), np.float32), "y": np.zeros((3, 2), np.float32)}
    package = one_op(
        tmp_path / "bad.mlpackage", arrays, lambda inputs: mb.matmul(x=inputs["x"], y=inputs["y"])
    )

    def same_twice(operations: Any) -> None:
        (matmul,) = (op for op in operations if op.type == "matmul")
        matmul.inputs["y"].arguments[0].name = "x"

    rewrite(package, same_twice)
    with pytest.raises(RuntimeFailure, match=r'op matmul "matmul_\d+" fails: mat1 and mat2'):
        MilProgram.open(package).run(arrays)


def test_a_package_of_several_functions_runs_the_one_that_is_asked_for(tmp_path):
    small, large = (
        one_op(
            tmp_path / f"{name}.mlpackage",
            {"x": np.zeros(side, np.float32)},
            lambda inputs, step=step: mb.add(x=inputs["x"], y=step),
        )
        for name, side, step in (("small", 2, 1.0), ("large", 4, 10.0))
    )
    parts = ct.utils.MultiFunctionDescriptor()
    parts.add_function(str(small), src_function_name="main", target_function_name="of_2")
    parts.add_function(str(large), src_function_name="main", target_function_name="of_4")
    parts.default_function_name = "of_4"
    both = tmp_path / "both.mlpackage"
    ct.utils.save_multifunction(parts, str(both))
    default = MilProgram.open(both)
    assert (default.function, default.functions) == ("of_4", ("of_2", "of_4"))
    assert default.inputs["x"] == ("float32", (4,))
    chosen = MilProgram.open(both, "of_2")
    np.testing.assert_array_equal(chosen.run({"x": np.zeros(2, "f4")}).outputs["out"], [1, 1])
    with pytest.raises(UsageError, match=r"unknown function of .*both\.mlpackage 'of_8'; there"):
        MilProgram.open(both, "of_8")


def test_metadata_of_the_package_is_read(tmp_path):
    package = one_op(tmp_path / "m.mlpackage", {"x": np.zeros(2, "f4")}, lambda i: i["x"])
    model = ct.models.MLModel(str(package), skip_model_load=True)
    model.user_defined_metadata["com.tiue_export.compute_unit"] = "CPU_AND_NE"
    model.save(str(tmp_path / "n.mlpackage"))
    assert MilProgram.open(tmp_path / "n.mlpackage").metadata["com.tiue_export.compute_unit"] == (
        "CPU_AND_NE"
    )
