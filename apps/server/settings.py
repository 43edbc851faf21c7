"""What a server allows: sizes, counts, times, names and the token."""

from __future__ import annotations

from dataclasses import dataclass, field

from tiue_export.errors import UsageError
from tiue_export.sampling.noise import MAX_SEED


@dataclass(frozen=True)
class ServerLimits:
    """Bounds of one request and of the queue; all are checked before a picture is drawn.

    `queue_pictures` may wait beside those being drawn. `batch_wait_ms` is how long a run of a
    bundle that takes several pictures waits for the next request to fill it.
    """

    queue_pictures: int = 64
    pictures_per_request: int = 10
    prompt_characters: int = 1000
    request_bytes: int = 64 * 1024
    timeout_s: float = 120.0
    body_timeout_s: float = 10.0
    batch_wait_ms: float = 5.0

    def check(self) -> None:
        """Raise `UsageError` for a bound that nothing could keep."""
        for name, least in (
            ("queue_pictures", 1),
            ("pictures_per_request", 1),
            ("prompt_characters", 1),
            ("request_bytes", 256),
        ):
            if getattr(self, name) < least:
                raise UsageError(
                    f"{_option(name)} is {getattr(self, name)}; expected {least} or more"
                )
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
        return MAX_SEED + 1 - self.pictures_per_request


@dataclass(frozen=True)
class ServerSettings:
    """How a server answers. `model_names` are further names clients may call the model by.

    `allowed_hosts` are the Host headers that are answered; ("*",) answers all. `urls` lets clients
    ask for links to pictures that the server keeps for a while.
    """

    limits: ServerLimits = field(default_factory=ServerLimits)
    model_names: tuple[str, ...] = ()
    allowed_hosts: tuple[str, ...] = ("*",)
    urls: bool = False
    token: str | None = field(default=None, repr=False)


_OPTIONS = {
    "queue_pictures": "--queue",
    "pictures_per_request": "--max-pictures",
    "prompt_characters": "--max-prompt",
    "request_bytes": "--max-request-bytes",
}


def _option(name: str) -> str:
    return _OPTIONS[name]
