"""A socket to listen on, and signals that end a server quietly."""

from __future__ import annotations

import errno
import signal
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from tiue_export.errors import ResourceError, UsageError

BACKLOG = 2048


def check_port(port: int) -> None:
    """Raise `UsageError` for what is no port."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port is {port}; expected 0 to 65535 (0: any free one)")


@contextmanager
def bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound before the bundle is read: a port that is taken is told at once."""
    check_port(port)
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
    except OSError as error:
        raise UsageError(f"--host {host} is no address of this machine: {error}") from error
    with socket.socket(family, kind, protocol) as listener:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            listener.bind(address)
        except OSError as error:
            next_step = None
            if error.errno == errno.EADDRINUSE:
                next_step = "Pass another --port; 0 takes any free one."
            raise ResourceError(
                f"cannot listen on {host}:{port}: {error.strerror}", next_step
            ) from error
        yield listener


@contextmanager
def stopped_quietly(server: Any) -> Iterator[None]:
    """Signals stop the uvicorn server, also before it has handlers of its own.

    It raises the signals that stopped it again; a server that was told to stop is done.
    """

    def stop(*_: object) -> None:
        server.should_exit = True

    before = {number: signal.signal(number, stop) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
