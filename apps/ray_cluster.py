"""A Ray cluster for the length of a command: the one at RAY_ADDRESS, or one on this machine."""

from __future__ import annotations

import importlib
import logging
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from tiue_export.errors import MissingExtraError, RuntimeFailure, first_line
from tiue_export.registry.packages import require
from tiue_export.system.install import install_line

_LOGGERS = ("ray", "ray.serve", "ray.data")


@contextmanager
def connected(part: str) -> Iterator[None]:
    """Connect, and disconnect when the block ends. `part` is the Ray library that must be there."""
    require("--ray", ("ray",), "ray")
    # Ray reports usage over the network unless told otherwise; nothing leaves the machine here.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    try:
        importlib.import_module(part)
    except ImportError as error:
        raise MissingExtraError(
            f"--ray needs {part}, which cannot be imported: {first_line(error)}",
            install_line("ray"),
        ) from error
    import ray

    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(include_dashboard=False, logging_level=logging.CRITICAL, log_to_driver=False)
    except Exception as error:  # Ray's errors share no base class
        raise RuntimeFailure(
            f"no Ray cluster could be reached or started: {first_line(error)}",
            "Check RAY_ADDRESS, or unset it to start one on this machine.",
        ) from error
    # Ray's own handler of SIGTERM prints a stack and aborts.
    for number, handler in handlers.items():
        signal.signal(number, handler)
    try:
        yield
    finally:
        ray.shutdown()
