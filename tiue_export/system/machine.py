"""The machine as its system tells of it: processor, cores, memory, GPU, installed packages.

Reads Linux's /proc where it is there; what a system does not tell is missing or None.
"""

from __future__ import annotations

import os
import platform
import re
import shutil
import subprocess
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

_CPU_FEATURES = ("avx2", "avx512f", "avx512_vnni", "avx512_bf16", "amx_tile", "asimd")


def cpu_name() -> str:
    """The processor's model as people know it, else what Python calls it."""
    return _cpu_facts().get("model name") or platform.processor() or platform.machine()


def cpu_flags() -> tuple[str, ...]:
    """Instruction sets by Linux's names, such as avx512_vnni; x86 and Arm."""
    facts = _cpu_facts()
    return tuple((facts.get("flags") or facts.get("Features") or "").split())


def usable_cores() -> int:
    """Cores that the scheduler may give to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def memory_bytes() -> int | None:
    """All of the machine's memory."""
    listed = _memory_facts().get("MemTotal")
    if listed is not None:
        return listed
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def available_memory_bytes() -> int | None:
    """What could be allocated now without swapping."""
    return _memory_facts().get("MemAvailable")


def nvidia_gpus() -> str | None:
    """Name, memory and driver of each GPU, a line each, as `nvidia-smi` lists them."""
    program = shutil.which("nvidia-smi")
    if program is None:
        return None
    query = [program, "--query-gpu=name,memory.total,driver_version", "--format=csv,noheader"]
    try:
        done = subprocess.run(query, capture_output=True, text=True, timeout=10, check=True)
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None


def installed_versions(packages: Iterable[str]) -> dict[str, str | None]:
    """Version of each package by its name on PyPI, None where it is not installed."""
    found: dict[str, str | None] = {}
    for name in packages:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            found[name] = None
    return found


def describe_machine() -> dict[str, str]:
    """Operating system, Python, CPU with the instruction sets that matter, memory, GPU.

    Goes into records that are passed on: nothing here names a user or a folder.
    """
    flags, total, available = cpu_flags(), memory_bytes(), available_memory_bytes()
    features = " ".join(name for name in _CPU_FEATURES if name in flags)
    memory = "unknown"
    if total is not None and available is not None:
        memory = f"{total / 1e9:.3g} GB, {available / 1e9:.3g} GB available"
    return {
        "system": f"{platform.system()} {platform.release()} ({platform.machine()})",
        "python": platform.python_version(),
        "cpu": f"{cpu_name()}, {os.cpu_count()} cores{features and f', {features}'}",
        "memory": memory,
        "gpu": nvidia_gpus() or "none found (nvidia-smi)",
    }


def text_of(path: str | Path) -> str | None:
    """A file of /proc or /sys, stripped; None where it cannot be read."""
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None


def _cpu_facts() -> dict[str, str]:
    pairs = (line.partition(":") for line in (text_of("/proc/cpuinfo") or "").splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _memory_facts() -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB", text_of("/proc/meminfo") or "", re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}
