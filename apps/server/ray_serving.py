"""`tiue-export serve --ray`: the same application on Ray Serve, one runtime per replica."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_export.bundle.read import open_bundle
from tiue_export.errors import UsageError
from tiue_export.registry.support import require_support
from tiue_export.specs import RuntimeOptions

from ..ray_cluster import connected
from .settings import ServerSettings

if TYPE_CHECKING:
    from ..options.serve import ServeOptions

_NAME = "tiue-export"
# Ray holds requests back beyond this; refusing with 429 is the application's part.
_BESIDE_THE_QUEUE = 64


def serve_on_ray(
    request: ServeOptions, settings: ServerSettings, announce: Callable[[], None]
) -> None:
    """Serve on the Ray cluster at RAY_ADDRESS, or on one of this machine's own, until stopped."""
    replicas = 1 if request.replicas is None else request.replicas
    if replicas < 1:
        raise UsageError(f"--replicas is {replicas}; expected 1 or more")
    if request.port == 0:
        raise UsageError("--ray needs a port of its own", "Pass --port 8000.")
    # What is damaged or cannot be served is told here, not in a replica's log.
    require_support("serve", open_bundle(request.bundle))
    with connected("ray.serve"):
        from ray import serve

        serve.start(
            http_options={"host": request.host, "port": request.port}, logging_config=_quiet()
        )
        try:
            serve.run(_deployment(request, settings, replicas), name=_NAME, route_prefix="/")
            _wait_for_a_signal(announce)
        finally:
            serve.shutdown()


def build_app(bundle: Path, runtime: str, options: RuntimeOptions, settings: ServerSettings) -> Any:
    """A replica's application over a worker of its own, opened where the replica runs."""
    from .images_api import create_app
    from .worker import DrawingWorker, pipeline_opener

    worker = DrawingWorker(pipeline_opener(bundle, runtime, options), settings.limits)
    worker.start()
    return create_app(worker, settings)


def _deployment(request: ServeOptions, settings: ServerSettings, replicas: int) -> Any:
    from ray import serve

    # Ray sends this function to its replicas: it carries plain values only.
    bundle, runtime, options = request.bundle.resolve(), request.runtime, request.runtime_options()

    def build() -> Any:
        return build_app(bundle, runtime, options, settings)

    wrapped = serve.deployment(
        num_replicas=replicas,
        max_ongoing_requests=settings.limits.queue_pictures + _BESIDE_THE_QUEUE,
        ray_actor_options={"num_cpus": 0 if options.threads is None else options.threads},
        graceful_shutdown_timeout_s=settings.limits.timeout_s,
    )(serve.ingress(build)())
    return wrapped.bind()


def _wait_for_a_signal(announce: Callable[[], None]) -> None:
    stopped = threading.Event()
    before = {
        number: signal.signal(number, lambda *_: stopped.set())
        for number in (signal.SIGINT, signal.SIGTERM)
    }
    try:
        announce()
        while not stopped.wait(3600):
            pass
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def _quiet() -> dict[str, str]:
    return {"log_level": os.environ.get("RAY_SERVE_LOG_LEVEL", "WARNING")}
