"""`tiue-export serve`: open the bundle, bind, tell where, and serve until told to stop."""

from __future__ import annotations

import os
import socket
import sys
from pathlib import Path
from typing import Any

from rich.console import Console

from tiue_export.errors import UsageError
from tiue_export.registry.packages import SERVER_NEEDS, require

from ..options.serve import ServeOptions, ServerLimits
from ..report.tables import print_json
from ..web.addresses import ANY, is_loopback
from ..web.listening import BACKLOG, bound, check_port, stopped_quietly
from .settings import ServerSettings

TOKEN_VARIABLE = "TIUE_EXPORT_TOKEN"
_LEAST_TOKEN = 8
# Clients that keep a connection between their requests.
_IDLE_CONNECTIONS = 256


def run(request: ServeOptions, limits: ServerLimits) -> None:
    """Serve until SIGINT or SIGTERM; then finish what was accepted."""
    require("the server", SERVER_NEEDS, "app")
    settings = _settings(request, limits)
    if request.replicas is not None and not request.ray:
        raise UsageError("--replicas is for --ray", "Add --ray, or leave it out.")
    request.runtime_options()  # what they refuse is said before anything is started
    if request.ray:
        from .ray_serving import serve_on_ray

        serve_on_ray(request, settings, lambda: _announce(request, settings, request.port))
        return
    with bound(request.host, request.port) as listener:
        _serve(request, settings, listener)


def _serve(request: ServeOptions, settings: ServerSettings, listener: socket.socket) -> None:
    import uvicorn

    from .images_api import create_app
    from .worker import DrawingWorker, pipeline_opener

    opener = pipeline_opener(request.bundle, request.runtime, request.runtime_options())
    worker = DrawingWorker(opener, settings.limits)
    worker.start()
    try:
        server = uvicorn.Server(server_config(create_app(worker, settings), settings.limits))
        with stopped_quietly(server):
            listener.listen(BACKLOG)  # who reads the announcement may connect at once
            _announce(request, settings, listener.getsockname()[1])
            server.run(sockets=[listener])
    finally:
        worker.close()
    if not request.as_json:
        Console(stderr=True).print("stopped; every accepted request was answered")


def server_config(app: Any, limits: ServerLimits) -> Any:
    """How uvicorn serves the application: over connections that never crowd out requests."""
    from ..web.connections import uvicorn_config
    from .guard import most_in_flight

    most = most_in_flight(limits) + _IDLE_CONNECTIONS
    return uvicorn_config(app, most, f"--queue {limits.queue_pictures}")


def _settings(request: ServeOptions, limits: ServerLimits) -> ServerSettings:
    """Everything that can be wrong with the options, said before the bundle is opened."""
    limits.check()
    check_port(request.port)
    hosts = request.allowed_host
    if not hosts:
        hosts = ("localhost",) if is_loopback(request.host) else (ANY,)
    return ServerSettings(
        limits=limits,
        model_names=request.model_name,
        allowed_hosts=hosts,
        urls=request.urls,
        token=_token(request.token_file),
    )


def _token(file: Path | None) -> str | None:
    """The token of the file or of the environment; never of an option, which `ps` would show."""
    token, where = os.environ.get(TOKEN_VARIABLE), TOKEN_VARIABLE
    if file is not None:
        where = str(file)
        try:
            token = file.read_text("utf-8").strip()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--token-file {file} cannot be read: {error}") from error
    if token is None:
        return None
    if len(token) < _LEAST_TOKEN or not token.isascii() or not token.isprintable():
        raise UsageError(
            f"the token in {where} has {len(token)} characters; expected {_LEAST_TOKEN} or more, "
            "all of them printable ASCII",
            "Make one: openssl rand -hex 32",
        )
    return token


def _announce(request: ServeOptions, settings: ServerSettings, port: int) -> None:
    host = f"[{request.host}]" if ":" in request.host else request.host
    url = f"http://{host}:{port}"
    name = request.bundle.resolve().name
    if request.as_json:
        print_json({"url": url, "model": name, "pid": os.getpid(), "docs": f"{url}/docs"})
        sys.stdout.flush()
        return
    stderr = Console(stderr=True)
    if settings.token is None and not is_loopback(request.host):
        stderr.print(
            "[bold yellow]warning:[/] anyone who reaches this machine can draw; set "
            f"{TOKEN_VARIABLE} or --token-file to ask for a token",
            highlight=False,
        )
    stderr.print(f"[bold green]serving[/] {name} at {url}   (API page: {url}/docs)")
    key = '"-"' if settings.token is None else f'os.environ["{TOKEN_VARIABLE}"]'
    stderr.print(
        f'  client = openai.OpenAI(base_url="{url}/v1", api_key={key})\n'
        f'  client.images.generate(model="{name}", prompt="a red fox").data[0].b64_json\n'
        "Ctrl-C stops; what was accepted is finished.",
        markup=False,
        highlight=False,
    )
