"""What a request must pass before the application sees it: its token, its place, size and pace."""

from __future__ import annotations

import asyncio
import hmac

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..options.serve import ServerLimits
from ..web.api_error import ApiError

_HEALTH = "/healthz"
_OPEN_PATHS = (_HEALTH, "/docs", "/openapi.json", "/static-offline-docs")
# What the queue refuses itself, with 429, and all that draws nothing.
_BESIDE_THE_QUEUE = 256


class RequestGuard:
    """Reads each body whole within its bounds, then hands it on."""

    def __init__(self, app: ASGIApp, limits: ServerLimits, token: str | None) -> None:
        self._app = app
        self._limits = limits
        self._expected = None if token is None else f"Bearer {token}".encode()
        self._most, self._in_flight = most_in_flight(limits), 0

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        self._in_flight += 1
        try:
            await self._answer(scope, receive, send)
        finally:
            self._in_flight -= 1

    async def _answer(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            self._check_token(scope)
            self._check_place(scope)
            body = await self._body(scope, receive)
        except ApiError as error:
            # The rest of the body was not read: this connection is of no further use.
            error.headers.setdefault("Connection", "close")
            await error.response()(scope, receive, send)
            return
        if body is None:  # the client went away
            return
        await self._app(scope, _replayed(body, receive), send)

    def _check_token(self, scope: Scope) -> None:
        if self._expected is None or is_open(scope["path"]):
            return
        given = next((v for k, v in scope["headers"] if k == b"authorization"), b"")
        if not hmac.compare_digest(given, self._expected):
            raise ApiError(
                401,
                "no or wrong token; expected the header Authorization: Bearer TOKEN",
                code="invalid_api_key",
                headers={"WWW-Authenticate": "Bearer"},
            )

    def _check_place(self, scope: Scope) -> None:
        if self._in_flight > self._most and scope["path"] != _HEALTH:
            raise ApiError(
                503,
                f"{self._most} requests are being answered already; expected to have room soon",
                code="overloaded",
                headers={"Retry-After": "1"},
            )

    async def _body(self, scope: Scope, receive: Receive) -> bytes | None:
        limit = self._limits.request_bytes
        declared = next((v for k, v in scope["headers"] if k == b"content-length"), b"0")
        if declared.isdigit() and int(declared) > limit:
            raise _too_large(int(declared), limit)
        try:
            return await asyncio.wait_for(_read(receive, limit), self._limits.body_timeout_s)
        except asyncio.TimeoutError:
            raise ApiError(
                408, f"the body did not arrive within {self._limits.body_timeout_s:g} s"
            ) from None


def most_in_flight(limits: ServerLimits) -> int:
    """Requests that are answered at once; health checks come on top."""
    return limits.queue_pictures + _BESIDE_THE_QUEUE


def is_open(path: str) -> bool:
    """Whether a path is answered without a token: health, and the description of the API."""
    return any(path == open_path or path.startswith(f"{open_path}/") for open_path in _OPEN_PATHS)


async def _read(receive: Receive, limit: int) -> bytes | None:
    body = b""
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        body += bytes(message.get("body", b""))
        if len(body) > limit:
            raise _too_large(len(body), limit)
        if not message.get("more_body", False):
            return body


def _too_large(size_bytes: int, limit: int) -> ApiError:
    return ApiError(413, f"the body has {size_bytes} bytes or more; expected at most {limit}")


def _replayed(body: bytes, receive: Receive) -> Receive:
    replayed = False

    async def replay() -> Message:
        nonlocal replayed
        if replayed:
            return await receive()
        replayed = True
        return {"type": "http.request", "body": body, "more_body": False}

    return replay
