"""Core ML packages behind the runtime interface: the evaluator here, Core ML itself on a Mac.

What is macOS's own (compiling, loading, planning) is stood in for by a small library that runs the
packages in the evaluator; tests marked `mac` do it for real.
"""

from __future__ import annotations

import errno
import importlib
import json
import logging
import platform
import shutil
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from tiue_export.bundle.read import Bundle, file_records, open_bundle
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import BundleError, RuntimeFailure, TiueWarning, UsageError
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.runtimes.coreml import device as coreml_device
from tiue_export.runtimes.coreml import runtime as coreml
from tiue_export.runtimes.coreml.device import CoremlDevice, MacSystem
from tiue_export.runtimes.coreml.runtime import (
    CoremlRuntime,
    EvaluatorEngine,
    NativeEngine,
    package_of,
)
from tiue_export.specs import GRAPH_NAMES, TEXT_ENCODER, UNET_ENCODER, VAE_DECODER, RuntimeOptions
from tiue_export.system import kept_folder
from tiue_export.system.install import install_line

logging.getLogger("coremltools").setLevel(logging.ERROR)
ct = pytest.importorskip("coremltools", reason="coremltools is not installed")

from mil_cases import save_function  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore:Implicitly cleaning up:ResourceWarning")
on_mac = platform.system() == "Darwin"
elsewhere = pytest.mark.skipif(on_mac, reason="on a Mac these packages run on Core ML")
SEQUOIA = MacSystem((15, 1), "24B83")


@pytest.fixture(autouse=True)
def cache(monkeypatch, tmp_path_factory) -> Path:
    """Compiled models of a test stay out of the user's cache."""
    folder = tmp_path_factory.mktemp("cache")
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder))
    return folder / "tiue-export" / "coreml"


@pytest.fixture
def own(coreml_bundle, tmp_path) -> Bundle:
    """A copy to damage."""
    return open_bundle(shutil.copytree(coreml_bundle.root, tmp_path / "own"))


def pool_of(bundle: Bundle) -> dict[str, np.ndarray]:
    return dict(load_reference(bundle).arrays)


def weights_of(bundle: Bundle, graph: str) -> Path:
    inside = "Data/com.apple.CoreML/weights/weight.bin"
    return bundle.root / "coreml" / f"{graph}.mlpackage" / inside


# ---- the evaluator


@elsewhere
def test_elsewhere_than_on_a_mac_it_is_the_evaluator_and_says_so(coreml_bundle):
    runtime = open_runtime("coreml", coreml_bundle, RuntimeOptions())
    assert (runtime.name, runtime.device, runtime.precision) == (
        "coreml",
        "evaluator fp32",
        "fp32",
    )
    assert runtime.batch_range() == (1, 1)
    assert runtime.placement() == {}


def test_it_draws_the_picture_that_onnx_runtime_draws(coreml_bundle):
    pictures = []
    for name, device in (("ort", "cpu"), ("coreml", "evaluator")):
        with Pipeline.open(coreml_bundle, name, RuntimeOptions(device=device)) as pipeline:
            pictures.append(np.asarray(pipeline("a red fox", seed=3).images[0], np.float32))
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_generate_says_that_the_evaluator_drew(coreml_bundle, run):
    code, out, err = run(
        "generate", coreml_bundle.root, "a red fox", "--runtime", "coreml",
        "--device", "evaluator", "--json",
    )  # fmt: skip
    assert (code, err) == (0, "")
    assert json.loads(out)["runtime"] == "coreml evaluator fp32"


@pytest.mark.parametrize("low_memory", [False, True])
def test_models_are_kept_or_given_back_and_the_result_is_the_same(coreml_bundle, low_memory):
    options = RuntimeOptions(device="evaluator", low_memory=low_memory)
    runtime = open_runtime("coreml", coreml_bundle, options)
    first = runtime.run(TEXT_ENCODER, pool_of(coreml_bundle))
    assert bool(runtime._models) is not low_memory
    second = runtime.run(TEXT_ENCODER, pool_of(coreml_bundle))
    np.testing.assert_array_equal(first["last_hidden_state"], second["last_hidden_state"])


def test_feeds_are_checked_against_the_manifest(coreml_bundle):
    runtime = open_runtime("coreml", coreml_bundle, RuntimeOptions(device="evaluator"))
    pool = pool_of(coreml_bundle)
    with pytest.raises(RuntimeFailure, match=r'unet_encoder: input "sample" has shape \(1, 4, 8'):
        runtime.run(UNET_ENCODER, {**pool, "sample": pool["sample"][..., :4]})
    with pytest.raises(RuntimeFailure, match="no value for input encoder_hidden_states"):
        runtime.run(UNET_ENCODER, {"sample": pool["sample"]})


def test_a_closed_runtime_says_so(coreml_bundle):
    runtime = open_runtime("coreml", coreml_bundle, RuntimeOptions(device="evaluator"))
    runtime.close()
    with pytest.raises(RuntimeFailure, match="the coreml runtime is closed"):
        runtime.run(TEXT_ENCODER, pool_of(coreml_bundle))


def test_a_bundle_without_packages_says_how_to_make_them(tiny_bundle):
    with pytest.raises(BundleError) as caught:
        open_runtime("coreml", tiny_bundle, RuntimeOptions())
    assert caught.value.message == f"{tiny_bundle.root} has no Core ML packages"
    line = f"tiue-export coreml --ckpt STUDENT --bundle {tiny_bundle.root}"
    assert caught.value.next_step == f"Make them: {line}"


@elsewhere
@pytest.mark.parametrize("device", ["gpu", "ane", "CPU_AND_NE", "all"])
def test_a_compute_unit_needs_a_mac(coreml_bundle, device):
    with pytest.raises(RuntimeFailure) as caught:
        open_runtime("coreml", coreml_bundle, RuntimeOptions(device=device))
    assert caught.value.message == (
        f"no --device {device} here: Core ML is part of macOS, and this is {platform.system()}"
    )
    assert "--device evaluator" in (caught.value.next_step or "")


def test_half_precision_cannot_be_asked_of_packages_in_single(coreml_bundle):
    with pytest.raises(UsageError, match="these packages compute in fp32; there is nothing"):
        open_runtime("coreml", coreml_bundle, RuntimeOptions(device="evaluator", precision="fp16"))
    with pytest.raises(UsageError, match="unknown precision 'int8'; there are: auto, fp16, fp32"):
        open_runtime("coreml", coreml_bundle, RuntimeOptions(device="evaluator", precision="int8"))


@pytest.mark.parametrize("flags", [{}, {"precision": "fp16", "gate": "lut99"}])
def test_a_manifest_without_a_known_precision_is_refused(coreml_bundle, flags):
    compiled = replace(coreml_bundle.manifest.compiled["coreml"], flags=flags)
    manifest = replace(coreml_bundle.manifest, compiled={"coreml": compiled})
    with pytest.raises(BundleError, match="gives its Core ML packages no precision that is known"):
        open_runtime("coreml", Bundle(coreml_bundle.root, manifest), RuntimeOptions())


@pytest.mark.parametrize(
    ("flags", "precision"),
    [
        ({"precision": "fp16"}, "fp16"),
        ({"precision": "fp16", "gate": "lut6"}, "lut6"),
        ({"precision": "fp16", "gate": "w8a8"}, "w8a8"),
    ],
)
def test_the_gate_that_applies_is_that_of_the_compressed_weights(coreml_bundle, flags, precision):
    compiled = replace(coreml_bundle.manifest.compiled["coreml"], flags=flags)
    bundle = Bundle(
        coreml_bundle.root, replace(coreml_bundle.manifest, compiled={"coreml": compiled})
    )
    runtime = open_runtime("coreml", bundle, RuntimeOptions(device="evaluator"))
    assert (runtime.precision, runtime.device) == (precision, "evaluator fp16")


def test_a_flipped_bit_in_the_weights_is_refused_on_opening(own):
    file = weights_of(own, VAE_DECODER)
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)
    with pytest.raises(BundleError, match=r"vae_decoder\.mlpackage.*weight\.bin was altered"):
        open_bundle(own.root)


def test_a_weights_file_cut_short_while_it_is_open_is_one_clear_message(own, run):
    runtime = open_runtime("coreml", own, RuntimeOptions(device="evaluator"))
    file = weights_of(own, TEXT_ENCODER)
    file.write_bytes(file.read_bytes()[:200])
    with pytest.raises(BundleError, match=r"text_encoder\.mlpackage: weight\.bin is damaged: at"):
        runtime.run(TEXT_ENCODER, pool_of(own))
    code, out, err = run("generate", own.root, "a red fox", "--runtime", "coreml")
    assert (code, out) == (BundleError.exit_code, "")
    assert "weight.bin" in err.replace("\n", "")
    assert "Traceback" not in err


def replaced(bundle: Bundle, graph: str, package: Path) -> Bundle:
    """The bundle with another package in the place of one graph's."""
    target = bundle.root / "coreml" / f"{graph}.mlpackage"
    shutil.rmtree(target)
    shutil.copytree(package, target)
    names = [p.relative_to(bundle.root).as_posix() for p in target.rglob("*") if p.is_file()]
    compiled = bundle.manifest.compiled["coreml"]
    form = replace(compiled.graphs[graph], files=file_records(bundle.root, names))
    compiled = replace(compiled, graphs={**compiled.graphs, graph: form})
    return Bundle(bundle.root, replace(bundle.manifest, compiled={"coreml": compiled}))


def text_package(path: Path, spec: Any, build: Any, length: int | None = None) -> Path:
    """A package with the text encoder's names, made of what `build(builder, ids)` says."""
    from coremltools.converters.mil.mil import Builder as mb
    from coremltools.converters.mil.mil import Function, types

    sides = (1, length or int(spec.inputs[0].shape[1]))
    inputs = {"input_ids": mb.placeholder(shape=sides, dtype=types.int32)}
    with Function(inputs, opset_version=ct.target.iOS18) as function:
        function.set_outputs([build(mb, function.inputs["input_ids"])])
    return save_function(function, path)


def test_an_overflow_is_blamed_on_the_graph_and_on_the_op_where_it_began(own, tmp_path):
    spec = own.spec(TEXT_ENCODER)
    width = int(spec.outputs[0].shape[2])

    def overflowing(mb: Any, ids: Any) -> Any:
        half = mb.cast(x=mb.expand_dims(x=ids, axes=[2]), dtype="fp16")
        wide = mb.tile(x=mb.mul(x=half, y=np.float16(60000), name="large"), reps=[1, 1, width])
        return mb.cast(x=wide, dtype="fp32", name="last_hidden_state")

    bundle = replaced(own, TEXT_ENCODER, text_package(tmp_path / "o.mlpackage", spec, overflowing))
    runtime = CoremlRuntime(bundle, EvaluatorEngine("fp16"), "fp16", False)
    ids = np.zeros(spec.inputs[0].shape, np.int64)
    ids[0, :3] = 2
    with pytest.raises(RuntimeFailure) as caught:
        runtime.run(TEXT_ENCODER, {"input_ids": ids})
    assert caught.value.message == (
        'text_encoder: output "last_hidden_state" holds non-finite values; they begin at op mul '
        '"large" with 3 of them'
    )
    exact = CoremlRuntime(bundle, EvaluatorEngine("fp32"), "fp16", False)
    assert exact.run(TEXT_ENCODER, {"input_ids": ids})["last_hidden_state"].max() == 120000


def test_a_package_that_does_not_fit_the_bundle_is_refused(own, tmp_path):
    spec = own.spec(TEXT_ENCODER)

    def ids_alone(mb: Any, ids: Any) -> Any:
        return mb.cast(x=ids, dtype="fp32", name="last_hidden_state")

    for length, problem in ((9, 'its input "input_ids" has shape (1, 9)'), (None, "no output")):
        package = text_package(tmp_path / f"{length}.mlpackage", spec, ids_alone, length)
        bundle = replaced(own, TEXT_ENCODER, package)
        runtime = open_runtime("coreml", bundle, RuntimeOptions(device="evaluator"))
        with pytest.raises(BundleError) as caught:
            runtime.run(TEXT_ENCODER, pool_of(own))
        assert "text_encoder.mlpackage does not fit the bundle: " in caught.value.message
        assert problem in caught.value.message


def test_of_several_functions_the_one_of_the_bundles_shapes_is_run(own, tmp_path):
    spec = own.spec(TEXT_ENCODER)
    width = int(spec.outputs[0].shape[2])

    def ones(mb: Any, ids: Any) -> Any:
        wide = mb.tile(x=mb.expand_dims(x=ids, axes=[2]), reps=[1, 1, width])
        return mb.cast(x=wide, dtype="fp32", name="last_hidden_state")

    parts = ct.utils.MultiFunctionDescriptor()
    for name, length in (("short", 9), ("right", None)):
        package = text_package(tmp_path / f"{name}.mlpackage", spec, ones, length)
        parts.add_function(str(package), "main", name)
    parts.default_function_name = "short"
    ct.utils.save_multifunction(parts, str(tmp_path / "both.mlpackage"))
    bundle = replaced(own, TEXT_ENCODER, tmp_path / "both.mlpackage")
    assert package_of(bundle, TEXT_ENCODER).function == "right"
    runtime = open_runtime("coreml", bundle, RuntimeOptions(device="evaluator"))
    assert runtime.run(TEXT_ENCODER, pool_of(own))["last_hidden_state"].max() > 1


# ---- Core ML itself, stood in for


class MLNeuralEngineComputeDevice:
    """Named like coremltools' class: the name says where an op runs."""


class MLCPUComputeDevice:
    """See above."""


class StandIn:
    """The part of coremltools that talks to macOS; compiled models are copies of packages."""

    ComputeUnit = ct.ComputeUnit
    SpecializationStrategy = ct.SpecializationStrategy

    def __init__(self) -> None:
        self.compiled: list[str] = []
        self.loaded: list[tuple[str, str | None, Any]] = []
        self.predictions = 0
        self.fails: dict[str, str] = {}
        self.models = SimpleNamespace(
            utils=SimpleNamespace(compile_model=self._compile),
            CompiledMLModel=self._load,
            compute_plan=SimpleNamespace(MLComputePlan=SimpleNamespace(load_from_path=self._plan)),
        )

    def _fail(self, where: str) -> None:
        if where in self.fails:
            raise Exception(self.fails[where])

    def _compile(self, source: str, destination: str | None = None) -> str:
        self._fail("compile")
        self.compiled.append(source)
        place = destination or f"{tempfile.mkdtemp()}/model.mlmodelc"  # as coremltools does
        return str(shutil.copytree(source, place))

    def _load(self, path: str, compute_units: Any, function_name: Any, optimization_hints: Any):
        self._fail("load")
        from tiue_export.export.coreml.mil.evaluator import MilProgram

        assert path.endswith(".mlmodelc")
        self.loaded.append((compute_units.name, function_name, optimization_hints))
        program = MilProgram.open(Path(path), function_name)

        def predict(feeds: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
            self._fail("predict")
            self.predictions += 1
            for array in feeds.values():
                assert array.dtype in (np.float32, np.int32)
                assert array.flags.c_contiguous
            # As coremltools does: halves come back as singles.
            outputs = program.run(feeds).outputs
            return {name: array.astype(np.float32) for name, array in outputs.items()}

        return SimpleNamespace(predict=predict)

    def _plan(self, path: str, compute_units: Any) -> Any:
        self._fail("plan")
        devices = [MLNeuralEngineComputeDevice(), MLNeuralEngineComputeDevice(), None]
        devices += [MLCPUComputeDevice()] if compute_units.name == "CPU_AND_NE" else []

        def usage(device: Any) -> Any:
            return None if device is None else SimpleNamespace(preferred_compute_device=device)

        function = SimpleNamespace(block=SimpleNamespace(operations=devices))
        return SimpleNamespace(
            model_structure=SimpleNamespace(program=SimpleNamespace(functions={"main": function})),
            get_compute_device_usage_for_mlprogram_operation=usage,
        )


@pytest.fixture
def library() -> StandIn:
    return StandIn()


@pytest.fixture
def mac(monkeypatch, library, cache):
    """This machine, as if it ran macOS 15.1."""
    monkeypatch.setattr(platform, "system", lambda: "Darwin")
    monkeypatch.setattr(coreml, "missing_core_ml", lambda: None)
    monkeypatch.setattr(coreml, "open_device", lambda: CoremlDevice(library, SEQUOIA))
    return library


def native(bundle: Bundle, library: StandIn, system: MacSystem = SEQUOIA):
    units = dict.fromkeys(GRAPH_NAMES, "CPU_AND_NE")
    engine = NativeEngine(CoremlDevice(library, system), None, units)
    return CoremlRuntime(bundle, engine, "fp32", False)


def test_on_a_mac_each_package_runs_where_it_recommends_and_passes_its_gates(coreml_bundle, mac):
    runtime = open_runtime("coreml", coreml_bundle, RuntimeOptions())
    assert (runtime.device, runtime.precision) == ("CPU_AND_GPU", "fp32")
    records = measure_runtime(coreml_bundle, runtime, load_reference(coreml_bundle))
    assert all(record.passed for record in records)
    assert {unit for unit, _, _ in mac.loaded} == {"CPU_AND_GPU"}
    assert len(mac.loaded) == len(mac.compiled) == 4
    # One run each on zeros before the first real one.
    assert mac.predictions == 8


@pytest.mark.parametrize(
    ("device", "unit"),
    [("cpu", "CPU_ONLY"), ("gpu", "CPU_AND_GPU"), ("ane", "CPU_AND_NE"), ("ALL", "ALL")],
)
def test_a_device_is_a_compute_unit_for_all_packages(coreml_bundle, mac, device, unit):
    runtime = open_runtime("coreml", coreml_bundle, RuntimeOptions(device=device))
    runtime.run(TEXT_ENCODER, pool_of(coreml_bundle))
    assert runtime.device == unit
    assert mac.loaded[0][0] == unit


def test_on_a_mac_the_evaluator_can_be_asked_for(coreml_bundle, mac):
    runtime = open_runtime("coreml", coreml_bundle, RuntimeOptions(device="evaluator"))
    assert runtime.device == "evaluator fp32"


@pytest.mark.parametrize(("option", "value"), [("precision", "fp32"), ("threads", 2)])
def test_core_ml_takes_neither_precision_nor_threads(coreml_bundle, mac, option, value):
    with pytest.raises(UsageError, match=f"Core ML takes no --{option}: the package and"):
        open_runtime("coreml", coreml_bundle, RuntimeOptions(**{option: value}))


def test_a_package_is_compiled_once_for_each_content_and_system(own, library, cache):
    pool = pool_of(own)
    for _ in range(2):
        native(own, library).run(TEXT_ENCODER, pool)
    assert len(library.compiled) == 1
    native(own, library, MacSystem((15, 2), "24C101")).run(TEXT_ENCODER, pool)
    assert len(library.compiled) == 2
    compiled = own.manifest.compiled["coreml"]
    form = compiled.graphs[TEXT_ENCODER]
    changed = {
        name: replace(r, sha256="0" * 64) if name.endswith("weight.bin") else r
        for name, r in form.files.items()
    }
    graphs = {**compiled.graphs, TEXT_ENCODER: replace(form, files=changed)}
    forms = {"coreml": replace(compiled, graphs=graphs)}
    other = Bundle(own.root, replace(own.manifest, compiled=forms))
    native(other, library).run(TEXT_ENCODER, pool)
    assert len(library.compiled) == 3
    names = sorted(path.name for path in cache.iterdir())
    assert len(names) == 3
    assert all(name.startswith("text_encoder-") for name in names)
    assert sum(name.endswith("macos24B83") for name in names) == 2


def test_a_compiled_model_that_another_process_made_meanwhile_is_used(own, library, cache):
    runtime, compile_model = native(own, library), library._compile

    def slower_than_another(source: str, destination: str) -> str:
        compile_model(source, destination)
        name = next(iter(cache.iterdir())).name
        assert ".partial-" in name
        native(own, StandIn()).run(TEXT_ENCODER, pool_of(own))
        return destination

    library.models.utils.compile_model = slower_than_another
    runtime.run(TEXT_ENCODER, pool_of(own))
    assert [path.name.startswith("text_encoder-") for path in cache.iterdir()] == [True]


@pytest.mark.parametrize("when", ["at the start", "at the end"])
def test_a_model_that_cannot_be_kept_is_compiled_elsewhere_and_runs(
    own, library, cache, when, monkeypatch, tmp_path
):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    if when == "at the start":
        cache.parent.mkdir()
        cache.write_text("in the way")
    else:

        def full(folder: Path) -> None:
            raise OSError(errno.ENOSPC, "No space left on device")

        monkeypatch.setattr(kept_folder, "_seal", full)
    with pytest.warns(TiueWarning, match="cannot be written"):
        outputs = native(own, library).run(TEXT_ENCODER, pool_of(own))
    assert np.isfinite(outputs["last_hidden_state"]).all()
    assert len(list(tmp_path.glob("*/model.mlmodelc"))) == 1


def test_fast_prediction_is_asked_for_where_macos_knows_it(own, library, cache):
    for system in (SEQUOIA, MacSystem((14, 6), "23G80")):
        native(own, library, system).run(TEXT_ENCODER, pool_of(own))
    fast = {"specializationStrategy": ct.SpecializationStrategy.FastPrediction}
    assert [hints for _, _, hints in library.loaded] == [fast, None]


def test_the_compute_plan_says_how_many_ops_run_where(own, library, cache):
    planned = native(own, library).placement()
    assert planned == {graph: {"Neural Engine": 2, "CPU": 1} for graph in GRAPH_NAMES}
    assert native(own, library, MacSystem((14, 3), "23D56")).placement() == {}


def test_parity_prints_where_core_ml_would_run_each_graph(coreml_bundle, mac, run):
    code, out, err = run("parity", coreml_bundle.root, "--runtime", "coreml", "--device", "ane")
    assert (code, err) == (0, "")
    assert "coreml CPU_AND_NE" in out
    lines = [line for line in out.splitlines() if "Neural Engine 2, CPU 1" in line]
    assert len(lines) == 4
    assert "67%" in lines[0]


@pytest.mark.parametrize(
    ("where", "message"),
    [
        ("compile", "Core ML cannot compile text_encoder: no room"),
        ("load", "Core ML cannot load text_encoder for CPU_AND_NE: no room"),
        ("predict", "Core ML failed in text_encoder on CPU_AND_NE: no room"),
    ],
)
def test_what_core_ml_refuses_is_one_message_that_names_the_graph(
    own, library, cache, where, message
):
    library.fails[where] = "no room\nmore\nlines"
    with pytest.raises(RuntimeFailure) as caught:
        native(own, library).run(TEXT_ENCODER, pool_of(own))
    assert caught.value.message == message
    assert caught.value.next_step
    assert not [path for path in cache.iterdir() if ".partial-" in path.name]


def test_a_missing_compute_plan_is_one_message(own, library, cache):
    library.fails["plan"] = "no plan"
    with pytest.raises(RuntimeFailure, match="Core ML has no compute plan of text_encoder: no pl"):
        native(own, library).placement()


def test_a_nan_from_core_ml_is_an_error_that_names_graph_and_output(own, library, cache):
    runtime = native(own, library)
    runtime.run(TEXT_ENCODER, pool_of(own))
    outputs = {"last_hidden_state": np.full(own.spec(TEXT_ENCODER).outputs[0].shape, np.nan)}
    runtime._models[TEXT_ENCODER] = SimpleNamespace(run=lambda feeds: outputs)
    with pytest.raises(RuntimeFailure, match='text_encoder: output "last_hidden_state" holds'):
        runtime.run(TEXT_ENCODER, pool_of(own))


def test_a_coremltools_without_its_library_is_explained(monkeypatch):
    monkeypatch.setattr(coreml_device.sys, "platform", "darwin")
    monkeypatch.setattr(coreml_device, "has_native_library", lambda name: False)
    assert coreml_device.missing_core_ml() == (
        "this coremltools was installed without its library for Core ML, libcoremlpython"
    )
    with pytest.raises(RuntimeFailure, match="was installed without its library") as caught:
        coreml_device.open_device()
    assert "pip install --only-binary :all: coremltools" in (caught.value.next_step or "")


def test_doctor_tells_what_core_ml_can_do_here(monkeypatch):
    doctor = importlib.import_module("tiue_export.apps.doctor")
    monkeypatch.setattr(doctor.platform, "system", lambda: "Linux")
    converts, runs = doctor.check_core_ml()
    assert (converts.usable, runs.usable) == (True, True)
    assert converts.detail == f"coremltools {ct.__version__}"
    assert runs.detail == (
        f"coremltools {ct.__version__}: by the evaluator, slow; Core ML itself is part of macOS"
    )
    monkeypatch.setattr(doctor.platform, "system", lambda: "Darwin")
    monkeypatch.setattr(doctor, "has_native_library", lambda name: name == "libcoremlpython")
    converts, runs = doctor.check_core_ml()
    assert (converts.usable, runs.usable) == (False, True)
    assert "without libmilstoragepython" in converts.detail
    monkeypatch.setattr(doctor, "missing_modules", lambda names: ["coremltools"])
    assert {backend.remedy for backend in doctor.check_core_ml()} == {install_line("coreml")}


# ---- for real


@pytest.mark.mac
@pytest.mark.skipif(not on_mac, reason="needs macOS")
@pytest.mark.parametrize("device", ["auto", "cpu", "gpu", "ane"])
def test_core_ml_draws_what_the_student_draws(coreml_bundle, device):
    runtime = open_runtime("coreml", coreml_bundle, RuntimeOptions(device=device))
    records = measure_runtime(coreml_bundle, runtime, load_reference(coreml_bundle))
    assert all(record.value > 60 for record in records)
    assert sum(map(len, runtime.placement().values())) >= 0


@pytest.mark.mac
@pytest.mark.skipif(not on_mac, reason="needs macOS")
def test_core_ml_agrees_with_the_evaluator(coreml_bundle):
    pool = pool_of(coreml_bundle)
    ours, theirs = (
        open_runtime("coreml", coreml_bundle, RuntimeOptions(device=device)).run(TEXT_ENCODER, pool)
        for device in ("evaluator", "cpu")
    )
    np.testing.assert_allclose(
        ours["last_hidden_state"], theirs["last_hidden_state"], rtol=1e-3, atol=1e-3
    )
