"""Names and addresses: which of them lead to this machine alone."""

from __future__ import annotations

from ipaddress import ip_address

# As a trusted host: all of them.
ANY = "*"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach a server bound to `host`."""
    return host == "localhost" or (is_address(host) and ip_address(host).is_loopback)


def is_address(name: str) -> bool:
    """Whether it is an IP address, which no other name can be made to look like."""
    try:
        ip_address(name)
    except ValueError:
        return False
    return True
