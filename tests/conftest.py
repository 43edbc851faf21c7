"""Tiny real models, made once per session: a pipeline on disk, its student, its bundle."""

from __future__ import annotations

import importlib
import os
import shutil
from pathlib import Path

import pytest

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.pop("TIUE_EXPORT_DEBUG", None)


@pytest.fixture(scope="session")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A diffusers pipeline folder of the tiny family, fp32, seeded."""
    from tiue_export.synthetic import write_synthetic_pipeline

    return write_synthetic_pipeline(tmp_path_factory.mktemp("tiny") / "pipeline", "tiny")


@pytest.fixture(scope="session")
def tiny_student(tiny_pipeline: Path):
    """The student of `tiny_pipeline`. Shared: do not change it."""
    from tiue_export import load_student

    return load_student(tiny_pipeline)


@pytest.fixture(scope="session")
def tiny_bundle(tiny_student, tmp_path_factory: pytest.TempPathFactory):
    """A verified fp32 bundle. Shared: copy it before damaging it."""
    from tiue_export import export_onnx

    return export_onnx(tiny_student, tmp_path_factory.mktemp("bundles") / "tiny-fp32")


@pytest.fixture(scope="session")
def compiled_bundle(tiny_bundle, tmp_path_factory: pytest.TempPathFactory):
    """A copy of the tiny bundle with every compiled form that runs here. Shared."""
    from tiue_export.bundle import open_bundle
    from tiue_export.export.openvino_ir import compile_openvino

    root = tmp_path_factory.mktemp("compiled") / "tiny-fp32"
    shutil.copytree(tiny_bundle.root, root)
    return compile_openvino(open_bundle(root))


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
    """Call the command line in this process, in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")
    cli = importlib.import_module("tiue_export.apps.cli")

    def call(*arguments: object) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as stopped:
            cli.main([str(argument) for argument in arguments])
        captured = capsys.readouterr()
        return int(stopped.value.code or 0), captured.out, captured.err

    return call
