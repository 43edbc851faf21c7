"""Tiny real models, made once per session: a pipeline on disk, its student, its bundle."""

from __future__ import annotations

import contextlib
import fcntl
import functools
import gc
import importlib
import json
import os
import shutil
import signal
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import settings

# Time belongs to benchmarks/: beside other work an example takes what it takes.
settings.register_profile("unhurried", deadline=None)
settings.load_profile("unhurried")

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("TIUE_EXPORT_DEBUG", None)


def pytest_collection_finish() -> None:
    """Make exports cheaper: what was imported is looked at, and looked up, once."""
    gc.collect()
    # coremltools collects often, and millions of objects are torch's and its own for good.
    gc.freeze()
    gc.set_threshold(50_000, 20, 100)
    with contextlib.suppress(ImportError):
        from torch.onnx._internal import _lazy_import

        # torch parses its whole library of ONNX functions again for every graph.
        operators = _lazy_import.onnxscript_apis
        operators.get_torchlib_ops = functools.cache(operators.get_torchlib_ops)


@pytest.fixture(autouse=True)
def ctrl_c():
    """Ctrl-C does after every test what it did before it: one that is lost kills a later worker."""
    # A shell hands "ignore it" on to what it starts in the background.
    signal.signal(signal.SIGINT, signal.default_int_handler)
    before = signal.getsignal(signal.SIGINT)
    yield
    after = signal.getsignal(signal.SIGINT)
    signal.signal(signal.SIGINT, before)
    assert after is before, f"the test left Ctrl-C to {after}"


@pytest.fixture(scope="session")
def made_once(tmp_path_factory: pytest.TempPathFactory):
    """`made_once(name, make)`: a folder that `make(folder)` fills, one for all workers."""
    own = tmp_path_factory.getbasetemp()
    base = own.parent if "PYTEST_XDIST_WORKER" in os.environ else own

    def folder_of(name: str, make: Callable[[Path], object]) -> Path:
        whole = base / name
        with (base / f"{name}.lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not whole.is_dir():
                partial = base / f"{name}-unfinished"
                shutil.rmtree(partial, ignore_errors=True)
                make(partial)
                partial.rename(whole)
        return whole

    return folder_of


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder of the tiny family, fp32, seeded."""
    from tiue_export.benchmarks.synthetic import write_synthetic_pipeline

    return write_synthetic_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", "tiny")


@pytest.fixture(scope="session")
def tiny_student(tiny_pipeline: Path):
    """The student of `tiny_pipeline`. Shared: do not change it."""
    from tiue_export import load_student

    return load_student(tiny_pipeline)


@pytest.fixture(scope="session")
def sdxl_folder(made_once) -> Path:
    """A small SDXL as a diffusers pipeline folder, an ordinary model. Shared."""
    from tiue_export.benchmarks.synthetic import write_synthetic_pipeline

    return made_once(
        "tiny-sdxl", lambda folder: write_synthetic_pipeline(folder, "tiny-sdxl", steps=None)
    )


@pytest.fixture(scope="session")
def teacher_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline as an ordinary model: it records no K."""
    from tiue_export.benchmarks.synthetic import write_synthetic_pipeline

    folder = tmp_path_factory.mktemp("teacher") / "tiny"
    return write_synthetic_pipeline(folder, "tiny", steps=None)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_student, made_once):
    """A verified fp32 bundle. Shared: copy it before damaging it."""
    from tiue_export import export_onnx, open_bundle

    return open_bundle(made_once("tiny-fp32", lambda folder: export_onnx(tiny_student, folder)))


@pytest.fixture(scope="session")
def half_bundle(tiny_student, made_once):
    """The same in half precision. Shared."""
    from tiue_export import ExportOptions, export_onnx, open_bundle

    half = ExportOptions(precision="fp16")
    return open_bundle(
        made_once("tiny-fp16", lambda folder: export_onnx(tiny_student, folder, half))
    )


@pytest.fixture(scope="session")
def compiled_bundle(tiny_bundle, made_once, tmp_path_factory: pytest.TempPathFactory):
    """A copy of the tiny bundle, of its name, with every compiled form that runs here. Shared."""
    from tiue_export.bundle.read import open_bundle
    from tiue_export.export.openvino import compile_openvino

    def make(folder: Path) -> None:
        compile_openvino(open_bundle(shutil.copytree(tiny_bundle.root, folder)))

    made = made_once("compiled", make)
    named = tmp_path_factory.mktemp("compiled") / "tiny-fp32"
    return open_bundle(shutil.copytree(made, named))


@pytest.fixture(scope="session")
def demo_run(made_once) -> Path:
    """Where `tiue-export demo --json` was typed; its output is in `stdout` and `stderr`. Shared."""

    def make(folder: Path) -> None:
        folder.mkdir()
        command = [sys.executable, "-m", "tiue_export", "demo", "--json"]
        with (folder / "stdout").open("w") as out, (folder / "stderr").open("w") as err:
            subprocess.run(command, cwd=folder, stdout=out, stderr=err, check=True)

    return made_once("demo", make)


@pytest.fixture(scope="session")
def demo_bundle(demo_run, made_once):
    """The student that ships, as a verified fp32 bundle with OpenVINO graphs. Shared."""
    from tiue_export import open_bundle
    from tiue_export.export.openvino import compile_openvino
    from tiue_export.registry.packages import missing_modules

    def make(folder: Path) -> None:
        bundle = open_bundle(shutil.copytree(demo_run / "demo" / "bundle", folder))
        if not missing_modules(("openvino",)):
            compile_openvino(bundle)

    return open_bundle(made_once("emoji-fp32", make))


@pytest.fixture(scope="session")
def coreml_bundle(compiled_bundle, tiny_student, made_once):
    """A copy of the compiled bundle with Core ML packages in fp32 too. Shared."""
    pytest.importorskip("coremltools", reason="coremltools is not installed")
    from tiue_export.bundle.read import open_bundle
    from tiue_export.export.coreml.bundle import compile_coreml
    from tiue_export.export.coreml.profiles import CoremlOptions

    def make(folder: Path) -> None:
        bundle = open_bundle(shutil.copytree(compiled_bundle.root, folder))
        with warnings.catch_warnings():
            # coremltools leaves its temporary folders to the garbage collector, with a warning.
            warnings.simplefilter("ignore")
            compile_coreml(bundle, tiny_student, CoremlOptions(precision="fp32"))
            gc.collect()

    return open_bundle(made_once("coreml-fp32", make))


@pytest.fixture(scope="session")
def coreai_bundle(coreml_bundle, tiny_student, made_once):
    """A copy of that with Core AI assets in fp32 too: every form that runs here. Shared."""
    pytest.importorskip("coreai", reason="coreai-core is not installed")
    from tiue_export.bundle.read import open_bundle
    from tiue_export.export.coreai import CoreaiOptions, compile_coreai

    def make(folder: Path) -> None:
        bundle = open_bundle(shutil.copytree(coreml_bundle.root, folder))
        compile_coreai(bundle, tiny_student, CoreaiOptions("fp32"))

    return open_bundle(made_once("coreai-fp32", make))


@pytest.fixture(scope="session")
def micro_folder(tmp_path_factory):
    """A UNet of one level with K=2: what converts quickly in every form."""
    from micro_models import write_micro_unet

    return write_micro_unet(tmp_path_factory.mktemp("micro") / "student")


@pytest.fixture(scope="session")
def bare_teacher(micro_folder, tmp_path_factory) -> Path:
    """The same UNet as an ordinary model: it records no K."""
    from tiue_export.checkpoint.family import load_family
    from tiue_export.student.pipeline_folder import write_scheduler

    folder = Path(shutil.copytree(micro_folder, tmp_path_factory.mktemp("bare") / "teacher"))
    write_scheduler(folder, load_family("tiny").scheduler, None)
    return folder


@pytest.fixture(scope="session")
def micro_pipeline(micro_folder, tiny_pipeline, tmp_path_factory):
    """The same UNet with K=4 and all other parts, as small: for what needs a whole student once."""
    from micro_models import write_micro_pipeline

    folder = tmp_path_factory.mktemp("micro") / "pipeline"
    return write_micro_pipeline(folder, micro_folder, tiny_pipeline / "tokenizer")


@pytest.fixture(scope="session")
def ordinary_model(micro_pipeline, tmp_path_factory) -> Path:
    """The micro pipeline as an ordinary model: it records no K, and its scheduler is SD 1.5's."""
    folder = shutil.copytree(micro_pipeline, tmp_path_factory.mktemp("ordinary") / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k != "tiue_steps"}
    file.write_text(json.dumps({**kept, "_class_name": "PNDMScheduler", "clip_sample": False}))
    return folder


@pytest.fixture(scope="session")
def few_step_bundle(ordinary_model, made_once):
    """That model drawn by LCM in three steps, with fresh noise between them. Shared."""
    from tiue_export import export_onnx, load_student, open_bundle

    student = load_student(ordinary_model, recipe="lcm-lora", steps=3)
    return open_bundle(made_once("few-step", lambda folder: export_onnx(student, folder)))


@pytest.fixture(scope="session")
def picture_bundle(teacher_folder: Path, made_once):
    """One step of SD-Turbo with a full VAE, which starts from pictures too. Shared."""
    from tiue_export import ExportOptions, export_onnx, load_student, open_bundle

    student = load_student(teacher_folder, recipe="sd-turbo")
    pictures = ExportOptions(with_vae_encoder=True)
    return open_bundle(made_once("pictures", lambda folder: export_onnx(student, folder, pictures)))


@pytest.fixture(scope="session")
def micro_bundle(micro_folder, made_once):
    """Its ONNX bundle: both UNet graphs. Shared."""
    from tiue_export import export_onnx, load_student, open_bundle

    student = load_student(micro_folder)
    return open_bundle(made_once("micro-unet", lambda folder: export_onnx(student, folder)))


@pytest.fixture(scope="session")
def faster_bundle(teacher_folder: Path, made_once):
    """Six DDIM steps, the encoder at 0, 1 and 3; with OpenVINO graphs where it is installed."""
    from teachers import load_teacher

    from tiue_export import export_onnx, open_bundle
    from tiue_export.export.openvino import compile_openvino
    from tiue_export.registry.packages import missing_modules
    from tiue_export.sampling.key_step_options import FasterOptions

    options = FasterOptions(steps=6, key_steps=(0, 1, 3), guidance=5.0)

    def make(folder: Path) -> None:
        bundle = export_onnx(load_teacher(teacher_folder, options=options), folder)
        if not missing_modules(("openvino",)):
            compile_openvino(bundle)

    return open_bundle(made_once("faster", make))


@pytest.fixture
def faster_copy(faster_bundle, tmp_path: Path):
    """The same in a folder of one's own."""
    from tiue_export import open_bundle

    return open_bundle(shutil.copytree(faster_bundle.root, tmp_path / "faster"))


@pytest.fixture
def bundle_copy(tiny_bundle, tmp_path: Path) -> Path:
    """A bundle folder of one's own."""
    return Path(shutil.copytree(tiny_bundle.root, tmp_path / "bundle"))


@pytest.fixture(scope="session")
def tiny_distillation(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory):
    """Distils `tiny_pipeline` in four steps of four samples. Give it a folder of its own."""
    from tiue_export.train.config import DistillConfig

    folder = tmp_path_factory.mktemp("distill")
    prompts = ("a red fox", "an owl", "a cat", "a dog", "a blue house", "two boats")
    (folder / "prompts.txt").write_text("\n".join(prompts), "utf-8")
    return DistillConfig(
        teacher=str(tiny_pipeline),
        prompts=str(folder / "prompts.txt"),
        out=str(folder / "unbroken"),
        iterations=4,
        batch=4,
        micro_batch=4,
        height=64,
        width=64,
        precision="fp32",
        student_learning_rate=1e-3,
        lora_rank=4,
        log_every=1,
        save_every=2,
        sample_every=2,
        sample_prompts=("a red fox", "an owl"),
        samples_per_prompt=2,
    )


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Call the command line in this process, in an empty folder: (exit code, stdout, stderr).

    What it says to type next must be there to be typed.
    """
    from next_lines import printed_mistakes

    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    cli = importlib.import_module("tiue_export.apps.cli")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        words = [str(argument) for argument in arguments]
        assert printed_mistakes(words, captured.out, captured.err) == []
        return int(stopped.value.code or 0), captured.out, captured.err

    return call
