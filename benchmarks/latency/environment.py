"""The machine a measurement was made on, and how busy it was with other things.

Reads /proc and /sys where they are there; what a system does not tell is None.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from dataclasses import dataclass
from datetime import datetime, timezone
from importlib import metadata
from pathlib import Path

from tiue_export._version import __version__

# A load average above this share of the cores before anything started disturbs what follows.
BUSY_LOAD_SHARE = 0.25

_PACKAGES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "torch", "diffusers", "transformers",
    "tensorrt-cu12", "tensorrt-rtx-cu13", "stable-diffusion-cpp-python",
)  # fmt: skip
# Instruction sets that decide which kernels a library takes.
_CPU_FLAGS = re.compile(r"(avx|amx|fma|f16c|sse4_2|asimd|sve|bf16|i8mm|vnni)\w*")
_VARIABLES = re.compile(r"(OMP|GOMP|KMP|MKL|OPENBLAS|ORT|OV|TBB|DNNL|ONEDNN|TORCH|ATEN)_\w+")


@dataclass(frozen=True)
class Environment:
    """Machine, versions and load at the start. `cores` are those this process may use."""

    started_at: str
    program: str
    system: str
    python: str
    cpu: str
    cpu_flags: tuple[str, ...]
    cores: int
    governor: str | None
    memory_bytes: int | None
    memory_available_bytes: int | None
    load_average: tuple[float, ...]
    packages: dict[str, str]
    variables: dict[str, str]

    @property
    def is_busy(self) -> bool:
        """Whether the machine had other work when the measurement began."""
        return bool(self.load_average) and self.load_average[0] > BUSY_LOAD_SHARE * self.cores


def describe_environment() -> Environment:
    """Look now: before any contender was started."""
    memory = _memory_bytes()
    return Environment(
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        program=f"tiue-export {__version__}",
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        cpu=_cpu_lines().get("model name") or platform.processor() or platform.machine(),
        cpu_flags=_cpu_flags(),
        cores=usable_cores(),
        governor=_text("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_bytes=memory.get("MemTotal") or _physical_memory_bytes(),
        memory_available_bytes=memory.get("MemAvailable"),
        load_average=tuple(round(load, 2) for load in _load_average()),
        packages=_versions(),
        variables={k: v for k, v in sorted(os.environ.items()) if _VARIABLES.fullmatch(k)},
    )


def usable_cores() -> int:
    """Cores that the scheduler may give to this process."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def available_memory_bytes() -> int | None:
    """What could be allocated now without swapping."""
    return _memory_bytes().get("MemAvailable")


def busy_core_seconds() -> float | None:
    """CPU time that all processes of the machine have used so far, stolen time included."""
    line = (_text("/proc/stat") or "").partition("\n")[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, line[1:9])
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def process_memory_bytes() -> tuple[int, int]:
    """Resident memory of this process: now, and its peak since the last `forget_peak`."""
    status = _text("/proc/self/status")
    if status is not None:
        found = dict(re.findall(r"^(VmRSS|VmHWM):\s+(\d+) kB", status, re.MULTILINE))
        if len(found) == 2:
            return int(found["VmRSS"]) * 1024, int(found["VmHWM"]) * 1024
    # On Linux getrusage would count what the parent process held when it forked.
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    peak_bytes = peak if sys.platform == "darwin" else peak * 1024
    return peak_bytes, peak_bytes


def mapped_file_bytes(pid: int) -> int:
    """Resident memory of a process that is pages of files, such as weights it has mapped (Linux).

    The system counts them as available: it may drop them at any time, and the process then waits
    for the disk.
    """
    found = re.search(r"^RssFile:\s+(\d+) kB", _text(f"/proc/{pid}/status") or "", re.MULTILINE)
    return 0 if found is None else int(found[1]) * 1024


def forget_peak() -> bool:
    """Let the peak memory begin anew (Linux); whether that was possible."""
    try:
        Path("/proc/self/clear_refs").write_text("5")
    except OSError:
        return False
    return True


def _load_average() -> tuple[float, ...]:
    try:
        return os.getloadavg()
    except (AttributeError, OSError):  # Windows
        return ()


def _memory_bytes() -> dict[str, int]:
    found = re.findall(r"^(\w+):\s+(\d+) kB", _text("/proc/meminfo") or "", re.MULTILINE)
    return {name: int(size) * 1024 for name, size in found}


def _physical_memory_bytes() -> int | None:
    try:
        return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # Windows
        return None


def _cpu_lines() -> dict[str, str]:
    pairs = (line.partition(":") for line in (_text("/proc/cpuinfo") or "").splitlines())
    return {key.strip(): value.strip() for key, _, value in pairs}


def _cpu_flags() -> tuple[str, ...]:
    lines = _cpu_lines()
    flags = (lines.get("flags") or lines.get("Features") or "").split()
    return tuple(flag for flag in flags if _CPU_FLAGS.fullmatch(flag))


def _versions() -> dict[str, str]:
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def _text(path: str) -> str | None:
    try:
        return Path(path).read_text("utf-8").strip()
    except (OSError, UnicodeDecodeError):
        return None
