"""The machine a measurement was made on, and how busy it was with other things.

Reads /proc and /sys where they are there; what a system does not tell is None.
"""

from __future__ import annotations

import os
import platform
import re
import sys
from datetime import datetime, timezone
from pathlib import Path

from tiue_export._version import __version__
from tiue_export.proof.latency_record import Environment
from tiue_export.registry.backends import BACKENDS
from tiue_export.system.machine import (
    available_memory_bytes,
    cpu_flags,
    cpu_name,
    installed_versions,
    memory_bytes,
    text_of,
    usable_cores,
)

_PACKAGES = ("numpy", "torch", "diffusers", "transformers", "stable-diffusion-cpp-python")
# Instruction sets that decide which kernels a library takes.
_CPU_FLAGS = re.compile(r"(avx|amx|fma|f16c|sse4_2|asimd|sve|bf16|i8mm|vnni)\w*")
_VARIABLES = re.compile(r"(OMP|GOMP|KMP|MKL|OPENBLAS|ORT|OV|TBB|DNNL|ONEDNN|TORCH|ATEN)_\w+")


def describe_environment() -> Environment:
    """Look now: before any contender was started."""
    named = dict.fromkeys(name for entry in BACKENDS.values() for name in entry.packages)
    versions = installed_versions((*_PACKAGES, *named))
    return Environment(
        started_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        program=f"tiue-export {__version__}",
        system=f"{platform.system()} {platform.release()} ({platform.machine()})",
        python=platform.python_version(),
        cpu=cpu_name(),
        cpu_flags=tuple(flag for flag in cpu_flags() if _CPU_FLAGS.fullmatch(flag)),
        cores=usable_cores(),
        governor=text_of("/sys/devices/system/cpu/cpu0/cpufreq/scaling_governor"),
        memory_bytes=memory_bytes(),
        memory_available_bytes=available_memory_bytes(),
        load_average=tuple(round(load, 2) for load in _load_average()),
        packages={name: version for name, version in versions.items() if version is not None},
        variables={k: v for k, v in sorted(os.environ.items()) if _VARIABLES.fullmatch(k)},
    )


def busy_core_seconds() -> float | None:
    """CPU time that all processes of the machine have used so far, stolen time included."""
    line = (text_of("/proc/stat") or "").partition("\n")[0].split()
    if len(line) < 9 or line[0] != "cpu":
        return None
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, line[1:9])
    ticks = user + nice + system + interrupts + soft_interrupts + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


def process_memory_bytes() -> tuple[int, int]:
    """Resident memory of this process: now, and its peak since the last `forget_peak`."""
    status = text_of("/proc/self/status")
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
    found = re.search(r"^RssFile:\s+(\d+) kB", text_of(f"/proc/{pid}/status") or "", re.MULTILINE)
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
