"""Addresses that a setting may name, and the keys that go there. Imports nothing heavy.

A key is never a setting: a setting names the variable of the environment that holds it.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from urllib.parse import urlsplit

_LOCAL = ("localhost", "127.0.0.1", "::1")


def is_http_address(value: str) -> bool:
    """True for an address that questions can be sent to, without a query or a user in it."""
    try:
        parts = urlsplit(value)
        _ = parts.port
    except ValueError:
        return False
    plain = not (parts.query or parts.fragment or "@" in parts.netloc)
    return parts.scheme in ("http", "https") and bool(parts.hostname) and plain


def key_problems(
    *, address_key: str, address: str | None, variable_key: str, variable: str | None
) -> Iterator[str]:
    """Yields what is wrong with a key that goes to an address, one clause each.

    Args:
        address_key: The setting of the address.
        address: Its value.
        variable_key: The setting of the variable.
        variable: Its value; None: no key is sent.
    """
    if variable is None:
        return
    if not os.environ.get(variable):
        yield (
            f"{variable_key}={variable}: the environment has no such variable, or it is empty; "
            "set it there, or leave it out where the server takes no key"
        )
    if address is not None and _is_open(address):
        yield (
            f"{address_key}={address}: a key would be sent over an open line; use https, or leave "
            f"{variable_key} out"
        )


def _is_open(address: str) -> bool:
    parts = urlsplit(address)
    return parts.scheme == "http" and parts.hostname not in _LOCAL
