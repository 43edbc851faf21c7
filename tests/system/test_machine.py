"""The machine as the system tells it: Linux's files, other systems without them, GPUs."""

from __future__ import annotations

import os
import re

import pytest
from test_layering import ROOT

from tiue_export.system import machine
from tiue_export.system.onnx_runtime import import_onnx_runtime

X86 = "processor\t: 0\nmodel name\t: Fast CPU\nflags\t\t: fpu avx2 avx512_bf16\n"
ARM = "processor\t: 0\nFeatures\t: fp asimd i8mm\n"
_TWO = "RTX 4090, 24 GB, 570.1\nT4, 16 GB, 570.1"
MEMORY = "MemTotal:       1000 kB\nMemFree:         100 kB\nMemAvailable:    400 kB\n"


@pytest.fixture
def files(monkeypatch):
    """The texts that stand in for /proc's; a file that is not among them is not there."""
    texts: dict[str, str] = {}
    monkeypatch.setattr(machine, "text_of", texts.get)
    return texts


def test_linux_tells_name_instruction_sets_and_memory(files):
    files |= {"/proc/cpuinfo": X86, "/proc/meminfo": MEMORY}
    assert machine.cpu_name() == "Fast CPU"
    assert machine.cpu_flags() == ("fpu", "avx2", "avx512_bf16")
    assert (machine.memory_bytes(), machine.available_memory_bytes()) == (1000 * 1024, 400 * 1024)
    assert machine.describe_machine()["cpu"].endswith(" cores, avx2 avx512_bf16")


def test_arm_lists_its_instruction_sets_as_features_and_no_name(files, monkeypatch):
    monkeypatch.setattr(machine.platform, "processor", lambda: "")
    monkeypatch.setattr(machine.platform, "machine", lambda: "aarch64")
    files["/proc/cpuinfo"] = ARM
    assert (machine.cpu_name(), machine.cpu_flags()) == ("aarch64", ("fp", "asimd", "i8mm"))


@pytest.mark.usefixtures("files")
def test_without_proc_nothing_is_guessed():
    assert machine.cpu_name()
    assert machine.cpu_flags() == ()
    assert machine.available_memory_bytes() is None
    assert machine.describe_machine()["memory"] == "unknown"


@pytest.mark.skipif(not hasattr(os, "sched_setaffinity"), reason="not Linux")
def test_cores_are_those_that_this_process_may_use():
    every = os.sched_getaffinity(0)
    os.sched_setaffinity(0, {min(every)})
    try:
        assert machine.usable_cores() == 1
    finally:
        os.sched_setaffinity(0, every)


@pytest.mark.parametrize(
    ("script", "gpus"),
    [
        ("echo 'RTX 4090, 24 GB, 570.1'; echo 'T4, 16 GB, 570.1'", _TWO),
        ("echo failed >&2; exit 9", None),
    ],
)
def test_gpus_are_the_lines_of_nvidia_smi(tmp_path, monkeypatch, script, gpus):
    program = tmp_path / "nvidia-smi"
    program.write_text(f"#!/bin/sh\n{script}\n")
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    assert machine.nvidia_gpus() == gpus


def test_without_nvidia_smi_there_is_no_gpu(tmp_path, monkeypatch):
    monkeypatch.setenv("PATH", str(tmp_path))
    assert machine.nvidia_gpus() is None


def test_onnx_runtime_is_imported_by_one_door_which_switches_its_telemetry_off(monkeypatch):
    module = import_onnx_runtime()
    calls: list[bool] = []
    monkeypatch.setattr(module, "disable_telemetry_events", lambda: calls.append(True))
    assert import_onnx_runtime() is module
    assert calls == [True]
    imports = re.compile(r"^\s*(import|from) onnxruntime\b", re.MULTILINE)
    folders = ("tiue_export", "apps", "runtimes", "calibration", "benchmarks")
    sources = [path for folder in folders for path in (ROOT / folder).rglob("*.py")]
    assert [path.name for path in sources if imports.search(path.read_text("utf-8"))] == []
