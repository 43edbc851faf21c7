"""Connections with a time for everything the client has to do, and a place for the next one.

uvicorn counts connections that say nothing like requests, never closes one that sent no whole
header, and then answers everybody 503, health checks included.
"""

from __future__ import annotations

import asyncio
import resource
import sys
from functools import partial
from typing import Any

import h11
import uvicorn
from starlette.types import ASGIApp
from uvicorn.protocols.http.h11_impl import H11Protocol

from tiue_export.errors import UsageError, first_line

from .api_error import ApiError

# What a client may have to do, and how long it has for that.
_ASK, _ASK_AGAIN, _READ = "ask", "ask again", "read"
TURN_S = {_ASK: 10.0, _ASK_AGAIN: 30.0, _READ: 30.0}
# Files beside connections: libraries, graphs, the bundle, pipes.
_OTHER_FILES = 256


class BoundedConnection(H11Protocol):
    """A connection of at most `most`; a further one closes the one that its client left longest.

    A client has 10 s for its first whole header, 30 s for each later one, and 30 s to read on when
    its answer does not fit into the socket. h11 bounds a header to 64 KiB.
    """

    def __init__(self, *arguments: Any, most: int, **named: Any) -> None:
        super().__init__(*arguments, **named)
        self._most = most
        self._turn: str | None = None
        self._turn_since_s = 0.0
        self._timer: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._watch()
        if len(self.connections) > self._most:
            self._make_room()

    def connection_lost(self, exc: Exception | None) -> None:
        super().connection_lost(exc)
        if self._timer is not None:
            self._timer.cancel()

    def handle_events(self) -> None:
        super().handle_events()
        self._watch()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        self._watch()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._watch()

    def resume_writing(self) -> None:
        super().resume_writing()
        self._watch()

    def send_400_response(self, msg: str) -> None:
        """What is no HTTP is told in the API's form, with h11's reason."""
        fault = sys.exc_info()[1]
        status, reason = 400, msg
        if isinstance(fault, h11.RemoteProtocolError):
            status, reason = fault.error_status_hint, first_line(fault)
        self._refuse(ApiError(status, f"the request is no HTTP that is understood: {reason}"))

    def _watch(self) -> None:
        """Start the client's time when its turn comes, not again at each byte of it."""
        turn = self._clients_turn()
        if turn == self._turn or self.transport.is_closing():
            return
        self._turn, self._turn_since_s = turn, self.loop.time()
        if self._timer is not None:
            self._timer.cancel()
        self._timer = None
        if turn is not None:
            self._timer = self.loop.call_later(TURN_S[turn], self._time_is_up)

    def _clients_turn(self) -> str | None:
        """What the client has to do; None while we have to answer."""
        if self.flow.write_paused:
            return _READ
        if self.cycle is None:
            return _ASK
        return _ASK_AGAIN if self.cycle.response_complete else None

    def _time_is_up(self) -> None:
        if self._turn != _READ and self.conn.trailing_data[0]:
            limit_s = TURN_S[str(self._turn)]
            self._refuse(ApiError(408, f"no whole header arrived within {limit_s:g} s"))
        else:
            self.transport.abort()

    def _refuse(self, error: ApiError) -> None:
        """Answer where no answer has begun, and close."""
        if self.conn.our_state in (h11.IDLE, h11.SEND_RESPONSE):
            error.headers["Connection"] = "close"
            answer = error.response()
            head = h11.Response(status_code=error.status, headers=answer.raw_headers)
            for event in (head, h11.Data(data=bytes(answer.body)), h11.EndOfMessage()):
                self.transport.write(self.conn.send(event) or b"")
        self.transport.close()

    def _make_room(self) -> None:
        """Close the connection whose client has kept us waiting longest, if one does."""
        waiting = [c for c in self.connections if isinstance(c, BoundedConnection) and c._waits()]
        if waiting:
            longest = min(waiting, key=lambda connection: connection._turn_since_s)
            self.connections.discard(longest)
            longest.transport.abort()

    def _waits(self) -> bool:
        """Whether it is the client's turn: to ask, to send the rest of its body, or to read."""
        return self._turn is not None or self.cycle.more_body


def uvicorn_config(app: ASGIApp, most: int, reason: str) -> uvicorn.Config:
    """How uvicorn serves `app` over at most so many connections, which `reason` asks for."""
    allow_open_files(most, reason)
    return uvicorn.Config(
        app,
        http=partial(BoundedConnection, most=most),  # type: ignore[arg-type]
        ws="none",  # an upgrade is answered as the request that it is
        log_level="error",  # what clients do wrong is answered, not logged
        access_log=False,
        server_header=False,
        timeout_keep_alive=int(TURN_S[_ASK_AGAIN]),
    )


def allow_open_files(connections: int, reason: str) -> None:
    """Raise this process's limit of open files to what so many connections need.

    Raises `UsageError` naming `reason` where the system does not allow it.
    """
    needed = connections + _OTHER_FILES
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    if soft == resource.RLIM_INFINITY or soft >= needed:
        return
    if hard != resource.RLIM_INFINITY and hard < needed:
        raise UsageError(
            f"{reason} needs {needed} open files; this system allows {hard}",
            f"Raise the limit, as root: ulimit -n {needed}; or ask for less.",
        )
    resource.setrlimit(resource.RLIMIT_NOFILE, (needed, hard))
