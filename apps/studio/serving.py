"""`tiue-export studio`: bundles opened, the page served on this machine until Ctrl-C."""

from __future__ import annotations

import errno
import importlib
import os
import socket
import tempfile
import webbrowser
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from tiue_export.bundle.read import open_bundle
from tiue_export.errors import UsageError
from tiue_export.registry.packages import require
from tiue_export.specs import RuntimeOptions

from ..options.group import picked
from ..options.studio import StudioOptions
from ..report.tables import console, print_json
from .choices import Offer, find_choices
from .drawing import Drawer
from .turns import Turns

_LOOPBACK = ("127.0.0.1", "::1", "localhost")
_MAX_UPLOAD = "64mb"


def run(request: StudioOptions) -> None:
    """Serve until interrupted. Drafts lie in a temporary folder that goes with the program."""
    require("the studio", ("gradio", "fastapi", "uvicorn"), "studio")
    if not request.bundles:
        raise UsageError(
            "no bundle was given", "Type its folder: tiue-export studio BUNDLE [BUNDLE ...]"
        )
    bundles = [open_bundle(path) for path in dict.fromkeys(request.bundles)]
    offer = find_choices(bundles, request.runtimes, picked(RuntimeOptions, request))
    listener = bound_socket(request.host, request.port)
    with listener, tempfile.TemporaryDirectory(prefix="tiue-studio-") as folder:
        drafts = Path(folder)
        # Gradio reads these when it serves; it neither phones home nor leaves copies behind.
        os.environ["GRADIO_TEMP_DIR"] = str(drafts / "served")
        os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
        drawer = Drawer(drafts, (request.out or drafts / "kept").resolve())
        application = _application(offer, drawer, drafts)
        _announce(request, offer, listener)
        try:
            _serve(application, listener)
        finally:
            drawer.close()


def bound_socket(host: str, port: int) -> socket.socket:
    """A listening socket; port 0 takes a free one. Raises `UsageError` for one in use."""
    if not 0 <= port <= 65535:
        raise UsageError(f"--port is {port}; expected 0 to 65535")
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    listener = socket.socket(family, socket.SOCK_STREAM)
    try:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listener.bind((host, port))
        listener.listen(128)
    except OSError as error:
        listener.close()
        if error.errno == errno.EADDRINUSE:
            raise UsageError(
                f"port {port} is in use", "Pass --port 0 for a free one, or another number."
            ) from error
        raise UsageError(
            f"cannot listen on {host}, port {port}: {error.strerror or error}",
            "Leave --host out to serve this machine alone.",
        ) from error
    return listener


def _announce(request: StudioOptions, offer: Offer, listener: socket.socket) -> None:
    """Where to look, and what can be chosen there."""
    port = listener.getsockname()[1]
    local = request.host in _LOOPBACK
    named = request.host if local or request.host not in ("0.0.0.0", "::") else socket.gethostname()
    url = f"http://[{named}]:{port}/" if ":" in named else f"http://{named}:{port}/"
    if request.as_json:
        print_json(
            {
                "url": url,
                "choices": [
                    {"label": c.label, "bundle": str(c.bundle.root), "device": c.device}
                    for c in offer.choices
                ],
                "refusals": [asdict(refusal) for refusal in offer.refusals],
            }
        )
    else:
        console.print(f"[bold]Studio:[/] {url}   (Ctrl-C ends it)", highlight=False)
        for choice in offer.choices:
            console.print(f"  {choice.label}  on {choice.device}", markup=False, highlight=False)
        for refusal in offer.refusals:
            console.print(
                f"  not {refusal.runtime}: {refusal.reason}", markup=False, highlight=False
            )
        if not local:
            console.print("[yellow]note:[/] everyone who reaches this address can draw and look.")
    # Whoever started us waits for this line.
    print(end="", flush=True)
    if request.open_browser:
        webbrowser.open(url)


def _application(offer: Offer, drawer: Drawer, drafts: Path) -> Any:
    """The page as an ASGI application."""
    gradio: Any = importlib.import_module("gradio")
    fastapi: Any = importlib.import_module("fastapi")
    from .draw_tab import Studio
    from .page import appearance, build_page

    return gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        build_page(Studio(offer, drawer, Turns())),
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[str(drafts.resolve()), str(drawer.kept)],
        max_file_size=_MAX_UPLOAD,
        **appearance(),
    )


def _serve(application: Any, listener: socket.socket) -> None:
    """Until Ctrl-C, which is the ordinary way to end it."""
    uvicorn: Any = importlib.import_module("uvicorn")
    # Open pages hold a connection for good: they are not waited for.
    config = uvicorn.Config(
        application, log_level="warning", access_log=False, timeout_graceful_shutdown=1
    )
    with suppress(KeyboardInterrupt):
        uvicorn.Server(config).run(sockets=[listener])
