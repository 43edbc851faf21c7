"""What a server allows: sizes, counts, times, names and the token."""

from __future__ import annotations

from dataclasses import dataclass, field

from ..options.serve import ServerLimits


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
