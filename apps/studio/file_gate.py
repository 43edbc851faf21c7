"""Which files the page is given: pictures, as PNG and nothing else."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from starlette.datastructures import MutableHeaders
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from ..web.api_error import ApiError
from .event_gate import PREFIX

_FILE = f"{PREFIX}file="


class FileGate:
    """Refuses every file but the PNG files in `folders` themselves and anywhere below `cache`.

    Gradio would serve all that lies in a folder it is allowed, pages of HTML inline, and fetch any
    address for whoever asks.
    """

    def __init__(self, app: ASGIApp, folders: Sequence[Path], cache: Path) -> None:
        self._app = app
        self._folders, self._cache = [folder.resolve() for folder in folders], cache.resolve()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = str(scope.get("path", ""))
        if path.startswith(_FILE) and not self._is_picture(path.removeprefix(_FILE)):
            error = ApiError(403, "no picture of this studio; expected one of its PNG files")
            await error.response()(scope, receive, send)
            return

        async def sniffed_by_none(message: Message) -> None:
            if message["type"] == "http.response.start":
                MutableHeaders(scope=message)["X-Content-Type-Options"] = "nosniff"
            await send(message)

        await self._app(scope, receive, sniffed_by_none)

    def _is_picture(self, name: str) -> bool:
        if not name.startswith("/") or not name.lower().endswith(".png"):
            return False
        try:
            path = Path(name).resolve()
        except (OSError, ValueError):  # a name too long, or with a NUL
            return False
        ours = path.parent in self._folders or self._cache in path.parents
        return ours and path.suffix.lower() == ".png"  # a link may lead to something else
