"""What of Gradio's interface the page needs; everything else is refused before Gradio fails at it.

Gradio prints a traceback for a call of a function that is not there, for too few values and for
values of another kind, and serves ways in that this page has no use for.
"""

from __future__ import annotations

import json
from typing import Any

from gradio.context import LocalContext
from gradio.helpers import special_args
from starlette.datastructures import QueryParams
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from tiue_export.errors import first_line

from ..web.api_error import ApiError

PREFIX = "/gradio_api/"
_JOIN = "queue/join"
_USED = (
    *("app_id", "cancel", "info", _JOIN, "queue/data", "reset", "startup-events", "theme.css"),
    *("upload", "upload_progress"),
)
_USED_BEFORE = ("file=", "heartbeat/")
# What Gradio's ways in raise at a request that they do not expect.
UNEXPECTED = (LookupError, TypeError, ValueError)
# What the page says of an event; other keys change how Gradio reads the rest.
_KEYS = ("data", "event_data", "event_id", "fn_index", "session_hash", "trigger_id")
_OF_JSON = (_JOIN, "cancel", "reset")
_LARGEST_EVENT = 1 << 20


class EventGate:
    """Lets the page's own requests to the Gradio application `app` of `page` through."""

    def __init__(self, app: ASGIApp, page: Any) -> None:
        self._app, self._page = app, page

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if scope["type"] != "http" or not path.startswith(PREFIX):
            await self._app(scope, receive, send)
            return
        asked = path.removeprefix(PREFIX).rstrip("/")
        try:
            if asked not in _USED and not asked.startswith(_USED_BEFORE):
                raise ApiError(
                    404,
                    f"the page has no use for {path[:80]}, so it is not served; a program draws "
                    "with: tiue-export serve BUNDLE",
                )
            if asked == "queue/data":
                self._check_session(scope)
            if asked in _OF_JSON and scope["method"] == "POST":
                event = _event(await _body(receive))
                if asked == _JOIN:
                    await self._check_event(event)
                receive = _received(json.dumps(event).encode(), receive)
                headers = [pair for pair in scope["headers"] if pair[0] != b"content-length"]
                scope = {**scope, "headers": headers}
        except ApiError as error:
            error.headers["Connection"] = "close"
            await error.response()(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _check_session(self, scope: Scope) -> None:
        session = QueryParams(scope["query_string"]).get("session_hash")
        if session not in self._page._queue.pending_messages_per_session:
            raise ApiError(404, "no events of this session", param="session_hash")

    async def _check_event(self, event: dict[str, Any]) -> None:
        """Raise `ApiError` for an event that the page could not have sent."""
        session, number, data = (event.get(key) for key in ("session_hash", "fn_index", "data"))
        if not isinstance(session, str) or not 0 < len(session) <= 64:
            raise ApiError(
                400, "session_hash is none; expected the page's own", param="session_hash"
            )
        function = self._page.fns.get(number) if isinstance(number, int) else None
        if function is None:
            raise ApiError(404, f"no event {str(number)[:80]} here", param="fn_index")
        trigger = event.get("trigger_id")
        # The page as a whole is the trigger of what happens when it is loaded.
        if trigger is not None and trigger not in [self._page._id, *self._page.blocks]:
            raise ApiError(404, "trigger_id names no part of the page", param="trigger_id")
        if special_args(function.fn)[2] is not None and not _is_selection(event.get("event_data")):
            raise ApiError(422, "event_data has no index and value", param="event_data")
        if not isinstance(data, list):
            raise ApiError(422, "data is no list of values", param="data")
        await self._check_values(function, data, session)

    async def _check_values(self, function: Any, data: list[Any], session: str) -> None:
        """As Gradio takes them, but before it queues the event."""
        LocalContext.blocks.set(self._page)
        try:
            if not all(isinstance(given, str) for given in _choices(function, data)):
                raise ValueError("a choice is no text")
            state = self._page.state_holder.session_data.get(session)
            await self._page.preprocess_data(function, list(data), state)
        except Exception as error:  # whatever a value of the wrong kind makes a component raise
            raise ApiError(422, f"data: {first_line(error)[:200]}", param="data") from None


def _event(body: bytes) -> dict[str, Any]:
    """What the page says of an event, with finite numbers."""
    try:
        given = json.loads(body)
        json.dumps(given, allow_nan=False)
    except (ValueError, RecursionError):
        raise ApiError(400, "the event is not JSON") from None
    if not isinstance(given, dict):
        raise ApiError(400, "the event is no JSON object")
    return {key: given[key] for key in _KEYS if key in given}


async def refused(request: Any, error: Exception) -> Response:
    """What a request made Gradio itself fail at, as its fault and not the page's."""
    return ApiError(400, f"the request is not understood: {first_line(error)[:200]}").response()


def _choices(function: Any, data: list[Any]) -> list[Any]:
    """The values that are chosen from a list."""
    pairs = zip(function.inputs, data, strict=False)
    return [value for block, value in pairs if block.get_block_name() == "dropdown"]


def _is_selection(data: Any) -> bool:
    return isinstance(data, dict) and isinstance(data.get("index"), int) and "value" in data


async def _body(receive: Receive) -> bytes:
    body, more = b"", True
    while more:
        message = await receive()
        body += bytes(message.get("body", b""))
        if len(body) > _LARGEST_EVENT:
            raise ApiError(413, f"the event has more than {_LARGEST_EVENT} bytes")
        more = message.get("more_body", False)
    return body


def _received(body: bytes, receive: Receive) -> Receive:
    """`receive`, after a body that was read already."""
    waiting: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def received() -> Message:
        return waiting.pop() if waiting else await receive()

    return received
