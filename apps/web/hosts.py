"""Whom a server on this machine answers: requests to its own names, from its own pages."""

from __future__ import annotations

from collections.abc import Collection
from urllib.parse import urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from .addresses import ANY, is_address
from .api_error import ApiError


class TrustedHosts:
    """Refuses what is addressed to a name that is not in `hosts`; `*.a.b` stands for all of a.b.

    A page in a browser could reach a loopback server through a name of its own that resolves to
    127.0.0.1 (DNS rebinding); the Host header gives it away. An address is no such name, so every
    address is answered. `own_pages_only` refuses requests of pages of other origins too.
    """

    def __init__(
        self, app: ASGIApp, hosts: Collection[str], *, own_pages_only: bool = False
    ) -> None:
        self._app = app
        self._hosts = [host.strip("[]").lower() for host in hosts]
        self._own_pages_only = own_pages_only

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        refusal = self._refusal(Headers(scope=scope)) if scope["type"] == "http" else None
        if refusal is None:
            await self._app(scope, receive, send)
        else:
            await refusal.response()(scope, receive, send)

    def _refusal(self, headers: Headers) -> ApiError | None:
        host, origin = headers.get("host", ""), headers.get("origin")
        if not self._is_trusted(_name(host)):
            return ApiError(
                400,
                f"Host is {host[:80]!r}; expected an address or {' or '.join(self._hosts)}. "
                "Start with --allowed-host NAME to answer another",
                code="unknown_host",
            )
        if self._own_pages_only and origin is not None and urlsplit(origin).netloc != host:
            return ApiError(
                403,
                f"the page that asks is of {origin[:80]!r}; expected one of {host!r}",
                code="other_origin",
            )
        return None

    def _is_trusted(self, name: str) -> bool:
        return (
            ANY in self._hosts
            or name in self._hosts
            or is_address(name)
            or any(host[:2] == "*." and name.endswith(host[1:]) for host in self._hosts)
        )


def _name(host: str) -> str:
    """A Host header without its port; empty for one that is none."""
    try:
        return urlsplit(f"//{host}").hostname or ""
    except ValueError:
        return ""
