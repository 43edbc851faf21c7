"""`tiue-export serve`: open the bundle, bind, tell where, and serve until told to stop."""

from __future__ import annotations

import errno
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from ipaddress import ip_address
from pathlib import Path
from typing import Any

from rich.console import Console

from tiue_export.errors import ResourceError, UsageError
from tiue_export.registry.packages import SERVER_NEEDS, require

from ..options.serve import ServeOptions, ServerLimits
from ..report.tables import print_json
from .settings import ServerSettings

TOKEN_VARIABLE = "TIUE_EXPORT_TOKEN"
_LEAST_TOKEN = 8
_CONNECTIONS = 512
_BACKLOG = 2048
_LOOPBACK_HOSTS = ("localhost", "127.0.0.1", "[::1]")


def run(request: ServeOptions, limits: ServerLimits) -> None:
    """Serve until SIGINT or SIGTERM; then finish what was accepted."""
    require("the server", SERVER_NEEDS, "app")
    settings = _settings(request, limits)
    if request.replicas is not None and not request.ray:
        raise UsageError("--replicas is for --ray", "Add --ray, or leave it out.")
    if request.ray:
        from .ray_serving import serve_on_ray

        serve_on_ray(request, settings, lambda: _announce(request, settings, request.port))
        return
    with _bound(request.host, request.port) as listener:
        _serve(request, settings, listener)


def _serve(request: ServeOptions, settings: ServerSettings, listener: socket.socket) -> None:
    import uvicorn

    from .images_api import create_app
    from .worker import DrawingWorker, pipeline_opener

    opener = pipeline_opener(request.bundle, request.runtime, request.runtime_options())
    worker = DrawingWorker(opener, settings.limits)
    worker.start()
    try:
        config = uvicorn.Config(
            create_app(worker, settings),
            log_level="warning",
            access_log=False,
            server_header=False,
            limit_concurrency=_CONNECTIONS,
            timeout_keep_alive=30,
        )
        server = uvicorn.Server(config)
        with _stopped_quietly(server):
            listener.listen(_BACKLOG)  # who reads the announcement may connect at once
            _announce(request, settings, listener.getsockname()[1])
            server.run(sockets=[listener])
    finally:
        worker.close()
    if not request.as_json:
        Console(stderr=True).print("stopped; every accepted request was answered")


def _settings(request: ServeOptions, limits: ServerLimits) -> ServerSettings:
    """Everything that can be wrong with the options, said before the bundle is opened."""
    limits.check()
    if not 0 <= request.port <= 65535:
        raise UsageError(f"--port is {request.port}; expected 0 to 65535 (0: any free one)")
    hosts = request.allowed_host
    if not hosts:
        # A page in a browser could reach a loopback server through a name of its own that
        # resolves to 127.0.0.1 (DNS rebinding); the Host header gives it away.
        hosts = (*_LOOPBACK_HOSTS, request.host) if is_loopback(request.host) else ("*",)
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


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    if host == "localhost":
        return True
    try:
        return ip_address(host).is_loopback
    except ValueError:
        return False


@contextmanager
def _bound(host: str, port: int) -> Iterator[socket.socket]:
    """A socket bound before the bundle is read: a port that is taken is told at once."""
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
def _stopped_quietly(server: Any) -> Iterator[None]:
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
