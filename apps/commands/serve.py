"""`tiue-export serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

import typer

from tiue_export.errors import UsageError

from ..options.bundle import BundleOptions
from ..options.group import OptionGroup, command, flag_of
from ..options.output import JsonOptions
from ..options.runtime import RuntimeChoice


@dataclass(frozen=True)
class AddressOptions(OptionGroup):
    """Where the server listens, and whom it answers."""

    panel = "Address"
    host: Annotated[
        str, typer.Option("--host", help="Address to bind; the default is this machine only.")
    ] = "127.0.0.1"
    port: Annotated[int, typer.Option("--port", help="0 takes any free one.")] = 8000
    token_file: Annotated[
        Path | None,
        typer.Option("--token-file", help="Token to ask for \\[default: TIUE_EXPORT_TOKEN]."),
    ] = None
    model_name: Annotated[
        tuple[str, ...],
        typer.Option("--model-name", help="Further names that clients may ask for."),
    ] = ()
    allowed_host: Annotated[
        tuple[str, ...],
        typer.Option(
            "--allowed-host", help="Host header to answer \\[default: all; on loopback, its own]."
        ),
    ] = ()
    urls: Annotated[
        bool, typer.Option("--urls", help="Allow response_format url: keep pictures for an hour.")
    ] = False


@dataclass(frozen=True)
class ServerLimits(OptionGroup):
    """Bounds of one request and of the queue; all are checked before a picture is drawn.

    `queue_pictures` may wait beside those being drawn. `batch_wait_ms` is how long a run of a
    bundle that takes several pictures waits for the next request to fill it.
    """

    panel = "Limits"
    queue_pictures: Annotated[
        int, typer.Option("--queue", help="Pictures that may wait; more are refused with 429.")
    ] = 64
    pictures_per_request: Annotated[
        int, typer.Option("--max-pictures", help="Pictures per request.")
    ] = 10
    prompt_characters: Annotated[
        int, typer.Option("--max-prompt", help="Characters of a prompt.")
    ] = 1000
    request_bytes: Annotated[
        int, typer.Option("--max-request-bytes", help="Size of a request's body.")
    ] = 65536
    timeout_s: Annotated[
        float, typer.Option("--timeout", help="Seconds from a request to its pictures.")
    ] = 120.0
    body_timeout_s: float = 10.0
    batch_wait_ms: Annotated[
        float,
        typer.Option("--batch-wait", help="Milliseconds a run waits for company, batch above 1."),
    ] = 5.0

    def check(self) -> None:
        """Raise `UsageError` for a bound that nothing could keep."""
        for name, least in (
            ("queue_pictures", 1),
            ("pictures_per_request", 1),
            ("prompt_characters", 1),
            ("request_bytes", 256),
        ):
            if getattr(self, name) < least:
                flag = flag_of(ServerLimits, name)
                raise UsageError(f"{flag} is {getattr(self, name)}; expected {least} or more")
        if not 0 < self.timeout_s < float("inf"):
            raise UsageError(f"--timeout is {self.timeout_s:g}; expected seconds above 0")
        if not 0 <= self.batch_wait_ms <= 10_000:
            raise UsageError(f"--batch-wait is {self.batch_wait_ms:g}; expected 0 to 10000 ms")
        if self.pictures_per_request > self.queue_pictures:
            raise UsageError(
                f"--max-pictures is {self.pictures_per_request}, more than --queue "
                f"{self.queue_pictures} can hold",
                f"Pass --queue {self.pictures_per_request} or more.",
            )

    @property
    def max_seed(self) -> int:
        """The largest seed that leaves room for every picture of a request."""
        from tiue_export.sampling.noise import MAX_SEED

        return MAX_SEED + 1 - self.pictures_per_request


@dataclass(frozen=True)
class RayOptions(OptionGroup):
    """Several copies of the runtime, on a cluster."""

    panel = "Ray"
    ray: Annotated[bool, typer.Option("--ray", help="Serve on Ray Serve.")] = False
    replicas: Annotated[
        int | None, typer.Option("--replicas", help="With --ray: copies of the runtime.")
    ] = None


@dataclass(frozen=True)
class ServeOptions(JsonOptions, RayOptions, RuntimeChoice, AddressOptions, BundleOptions):
    """A server of one bundle."""


@command
def serve(request: ServeOptions, limits: ServerLimits) -> None:
    """Serve a bundle over HTTP, as OpenAI's images API: existing clients draw from it.

    Example:  tiue-export serve fox --port 8000

    Example:  tiue-export serve fox --runtime trt --host 0.0.0.0 --token-file token.txt
    """
    from ..server.serving import run

    run(request, limits)
