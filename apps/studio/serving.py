"""`tiue-export studio`: bundles opened, the page served on this machine until Ctrl-C."""

from __future__ import annotations

import importlib
import logging
import os
import socket
import webbrowser
from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_export.bundle.read import open_bundle
from tiue_export.errors import UsageError
from tiue_export.registry.packages import require
from tiue_export.registry.support import require_support
from tiue_export.specs import RuntimeOptions
from tiue_export.system.owned_path import temporary_folder

from ..options.group import picked
from ..options.studio import StudioOptions
from ..report.tables import console, print_json
from ..web.addresses import is_loopback
from ..web.listening import BACKLOG, bound, stopped_quietly
from .choices import Offer, find_choices
from .drawing import Drawer
from .turns import Turns

if TYPE_CHECKING:
    from starlette.types import ASGIApp

# Open pages hold a few connections each, for good.
_CONNECTIONS = 512
_MAX_UPLOAD = "64mb"


def run(request: StudioOptions) -> None:
    """Serve until SIGINT or SIGTERM. Drafts lie in a temporary folder that goes with it."""
    require("the studio", ("gradio", "fastapi", "uvicorn"), "studio")
    if not request.bundles:
        raise UsageError(
            "no bundle was given", "Type its folder: tiue-export studio BUNDLE [BUNDLE ...]"
        )
    bundles = [open_bundle(path) for path in dict.fromkeys(request.bundles)]
    for bundle in bundles:
        require_support("studio", bundle)
    offer = find_choices(bundles, request.runtimes, picked(RuntimeOptions, request))
    with (
        bound(request.host, request.port) as listener,
        temporary_folder() as folder,
    ):
        # Apart from each other: what visitors upload never lies where our pictures do.
        drafts, uploads = folder / "drafts", folder / "uploads"
        drafts.mkdir()
        drawer = Drawer(drafts, (request.out or folder / "kept").resolve())
        hosts = request.allowed_host or _own_names(request.host)
        server = build_server(build_application(offer, drawer, uploads, hosts))
        try:
            with stopped_quietly(server):
                listener.listen(BACKLOG)  # who reads the announcement may connect at once
                _announce(request, offer, listener)
                server.run(sockets=[listener])
        finally:
            drawer.close()
    if not request.as_json:
        console.print("stopped")


def _own_names(host: str) -> tuple[str, ...]:
    """Names that lead here; addresses are answered anyway."""
    named = socket.gethostname()
    return ("localhost",) if is_loopback(host) else ("localhost", named, f"{named}.local")


def _announce(request: StudioOptions, offer: Offer, listener: socket.socket) -> None:
    """Where to look, and what can be chosen there."""
    port = listener.getsockname()[1]
    local = is_loopback(request.host)
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
        for line in dict.fromkeys(f"not {r.runtime}: {r.reason}" for r in offer.refusals):
            console.print(f"  {line}", markup=False, highlight=False)
        if not local:
            console.print("[yellow]note:[/] everyone who reaches this address can draw and look.")
    # Whoever started us waits for this line.
    print(end="", flush=True)
    if request.open_browser:
        webbrowser.open(url)


def build_application(offer: Offer, drawer: Drawer, uploads: Path, hosts: Sequence[str]) -> ASGIApp:
    """The page as an ASGI application that answers requests of its own pages to `hosts` alone."""
    # Gradio reads these when it serves; it neither phones home nor leaves copies behind.
    os.environ["GRADIO_TEMP_DIR"] = str(uploads)
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    gradio: Any = importlib.import_module("gradio")
    fastapi: Any = importlib.import_module("fastapi")
    from ..web.hosts import TrustedHosts
    from .draw_tab import Studio
    from .event_gate import UNEXPECTED, EventGate, refused
    from .file_gate import FileGate
    from .page import appearance, build_page

    page = build_page(Studio(offer, drawer, Turns()))
    mounted = gradio.mount_gradio_app(
        fastapi.FastAPI(openapi_url=None),
        page,
        path="/",
        footer_links=[],
        run_history=False,
        ssr_mode=False,
        pwa=False,
        mcp_server=False,
        allowed_paths=[str(drawer.drafts), str(drawer.kept)],
        max_file_size=_MAX_UPLOAD,
        **appearance(),
    )
    # Where it is not set, Gradio takes any file of this machine for one that was uploaded.
    page.has_launched = True
    for kind in UNEXPECTED:
        mounted.routes[-1].app.add_exception_handler(kind, refused)
    gated = FileGate(EventGate(mounted, page), [drawer.drafts, drawer.kept], uploads)
    return TrustedHosts(gated, hosts, own_pages_only=True)


def build_server(application: ASGIApp) -> Any:
    """uvicorn, which does not wait for open pages when it is told to stop."""
    uvicorn: Any = importlib.import_module("uvicorn")
    from ..web.connections import uvicorn_config

    # It logs each upload that is none; the answer says so.
    logging.getLogger("python_multipart").setLevel(logging.ERROR)

    class Server(uvicorn.Server):  # type: ignore[misc]
        async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
            for connection in list(self.server_state.connections):
                connection.transport.abort()
            await super().shutdown(sockets)

    return Server(uvicorn_config(application, _CONNECTIONS, "the studio"))
