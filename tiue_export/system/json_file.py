"""JSON as it comes from outside: read strictly, or refused as a `ValueError` that says why.

Python's own reader takes NaN and infinities, the last of two equal keys, half characters that no
file can be written with, and values nested deeper than its own writer can follow.
"""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

# What the program and its libraries write is nested ten deep at most.
MAX_DEPTH = 64


def read_json(path: Path) -> Any:
    """The value in a file. Raises `OSError` or `ValueError`; a named pipe is not waited for."""
    if path.exists() and not path.is_file():
        raise ValueError("it is no file")
    return parse_json(path.read_text("utf-8"))


def read_object(path: Path) -> dict[str, Any]:
    """The same for a file that holds an object."""
    data = read_json(path)
    if not isinstance(data, dict):
        raise ValueError("it is no JSON object")
    return data


def parse_json(text: str) -> Any:
    """The value in a text. Raises `ValueError`."""
    try:
        data = json.loads(text, parse_constant=_refuse_constant, object_pairs_hook=_once)
    except RecursionError as error:
        raise ValueError(str(error)) from error
    _check(data)
    return data


def _refuse_constant(name: str) -> None:
    raise ValueError(f"{name} is no number that JSON knows")


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) != len(pairs):
        keys = [key for key, _ in pairs]
        twice = next(key for key in keys if keys.count(key) > 1)
        raise ValueError(f"the key {twice!r} stands twice in one object")
    return found


def _check(data: Any) -> None:
    """Refuse nesting, infinite numbers and half characters, wherever they are."""
    left = [(data, 0)]
    while left:
        value, depth = left.pop()
        if depth > MAX_DEPTH:
            raise ValueError(f"it is nested more than {MAX_DEPTH} deep")
        if isinstance(value, dict):
            left += [(each, depth + 1) for pair in value.items() for each in pair]
        elif isinstance(value, list):
            left += [(each, depth + 1) for each in value]
        elif isinstance(value, float) and not math.isfinite(value):
            raise ValueError("a number is larger than any that a computer holds")
        elif isinstance(value, str) and not value.isascii():
            _check_text(value)


def _check_text(text: str) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(f"{text[:50]!r} is no text: it holds half a character") from error
