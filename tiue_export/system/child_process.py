"""Processes of our own that end with this one, however it ends.

A killed parent (the kernel's out-of-memory killer) cannot tell its children, which would go on to
hold memory, cores and its caller's pipe. So each child watches its parent, from before it imports
anything large: `python -m tiue_export.system.child_process PARENT MODULE ARGUMENT...`.
"""

from __future__ import annotations

import ctypes
import os
import runpy
import signal
import sys
import threading
import time

_PR_SET_PDEATHSIG = 1  # linux/prctl.h
_POLL_S = 0.25


def child_command(module: str, *arguments: str) -> list[str]:
    """The command that runs `python -m module arguments` for as long as this process lives."""
    return [sys.executable, "-m", __name__, str(os.getpid()), module, *arguments]


def end_with_parent(parent: int) -> None:
    """Leave this process without a word as soon as process `parent` is gone.

    Linux kills us when the thread that started us ends: start children in the main thread, or in
    one that lives as long. Elsewhere a thread watches; Windows tells nothing, and nothing happens.
    """
    if sys.platform == "linux":  # without a thread, whose stack a small board would have to hold
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        if os.getppid() != parent:  # it was gone before
            os._exit(1)
    else:
        threading.Thread(target=_watch, args=(parent,), daemon=True).start()


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        time.sleep(_POLL_S)
    os._exit(1)


def _main(parent: str, module: str, *arguments: str) -> None:
    end_with_parent(int(parent))
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    _main(*sys.argv[1:])
