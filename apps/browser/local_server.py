"""The site on this machine alone, with the headers that threads need."""

from __future__ import annotations

import contextlib
import functools
import socket
import sys
import webbrowser
from collections.abc import Callable
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from ..web.listening import bound

LOOPBACK = "127.0.0.1"
HEADERS = {
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Embedder-Policy": "require-corp",
}


class SiteHandler(SimpleHTTPRequestHandler):
    """Files of one folder, in silence."""

    extensions_map = {  # noqa: RUF012 -- the base class has it so
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".webmanifest": "application/manifest+json",
    }

    def end_headers(self) -> None:
        """With those that isolate a page."""
        for name, value in HEADERS.items():
            self.send_header(name, value)
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def log_message(self, format: str, *arguments: Any) -> None:
        """Nothing: a picture asks for many files."""


class SiteServer(ThreadingHTTPServer):
    """In silence where a visitor leaves while a file is on its way."""

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Tell of what is not a connection that broke."""
        if not isinstance(sys.exc_info()[1], ConnectionError):
            super().handle_error(request, client_address)


def site_server(root: Path, listener: socket.socket) -> SiteServer:
    """A server of the site on a socket that is bound already."""
    handler = functools.partial(SiteHandler, directory=str(root))
    server = SiteServer(listener.getsockname(), handler, bind_and_activate=False)
    server.socket.close()
    server.socket = listener
    server.server_activate()
    return server


def serve_until_interrupted(root: Path, port: int, on_address: Callable[[str], None]) -> None:
    """Serve on loopback, open the user's browser there, and tell the address."""
    with bound(LOOPBACK, port) as listener:
        server = site_server(root, listener)
        address = f"http://{LOOPBACK}:{listener.getsockname()[1]}/"
        on_address(address)
        webbrowser.open(address)
        with contextlib.suppress(KeyboardInterrupt):
            server.serve_forever()
