"""The options of `tiue-export serve`."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from tiue_export.errors import UsageError

from .bundle import BundleOptions
from .group import OptionGroup, flag_of, option
from .output import JsonOptions
from .runtime import RuntimeChoice


@dataclass(frozen=True)
class AddressOptions(OptionGroup):
    """Where the server listens, and whom it answers."""

    panel = "Address"
    host: str = option("127.0.0.1", "Address to bind; the default is this machine only.")
    port: int = option(8000, "0 takes any free one.")
    token_file: Path | None = option(None, "Token to ask for \\[default: TIUE_EXPORT_TOKEN].")
    model_name: tuple[str, ...] = option((), "Further names that clients may ask for.")
    allowed_host: tuple[str, ...] = option(
        (), "Host header to answer \\[default: all; on loopback, its own]."
    )
    urls: bool = option(False, "Allow response_format url: keep pictures for an hour.")


@dataclass(frozen=True)
class ServerLimits(OptionGroup):
    """Bounds of one request and of the queue; all are checked before a picture is drawn.

    `queue_pictures` may wait beside those being drawn. `batch_wait_ms` is how long a run of a
    bundle that takes several pictures waits for the next request to fill it.
    """

    panel = "Limits"
    queue_pictures: int = option(
        64, "Pictures that may wait; more are refused with 429.", "--queue"
    )
    pictures_per_request: int = option(10, "Pictures per request.", "--max-pictures")
    prompt_characters: int = option(1000, "Characters of a prompt.", "--max-prompt")
    request_bytes: int = option(65536, "Size of a request's body.", "--max-request-bytes")
    timeout_s: float = option(120.0, "Seconds from a request to its pictures.", "--timeout")
    body_timeout_s: float = 10.0
    batch_wait_ms: float = option(
        5.0, "Milliseconds a run waits for company, batch above 1.", "--batch-wait"
    )

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
    ray: bool = option(False, "Serve on Ray Serve.")
    replicas: int | None = option(None, "With --ray: copies of the runtime.")


@dataclass(frozen=True)
class ServeOptions(JsonOptions, RayOptions, RuntimeChoice, AddressOptions, BundleOptions):
    """A server of one bundle."""
