"""Rows of a file of prompts as pictures to draw: keys, seeds, and columns that go with them."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiue_export.errors import UsageError

from ..prompt_file import PROMPT_COLUMN, prompt_in, records_in, shown

# WebDataset takes everything before a name's first dot as the key.
_KEY = re.compile(r"[A-Za-z0-9_-]{1,80}")
_KEY_DIGITS = 9


@dataclass(frozen=True)
class PromptRow:
    """One row: `key` names its pictures, `columns` are those that mean nothing to us."""

    key: str
    prompt: str
    seed: int | None = None
    columns: Mapping[str, Any] = field(default_factory=dict)


def read_rows(path: Path, prompt_column: str = PROMPT_COLUMN) -> list[PromptRow]:
    """Every row, checked: a column for the prompt, `seed` and `id` if there, keys that are unique.

    Column names count in any case. Without an `id` the row's number from 0 is the key.
    """
    rows: list[PromptRow] = []
    first_use: dict[str, str] = {}
    for where, record in records_in(path, prompt_column):
        row = _row(where, record, len(rows), prompt_column)
        if row.key in first_use:
            raise UsageError(
                f"{where}: the id {row.key!r} was used before, in {first_use[row.key]}",
                "Give each row an id of its own, or leave the column out.",
            )
        first_use[row.key] = where
        rows.append(row)
    return rows


def _row(where: str, record: Mapping[str, Any], number: int, prompt_column: str) -> PromptRow:
    names = {name.lower(): name for name in record}
    column, prompt = prompt_in(where, record, prompt_column)
    used = {column}
    key, seed = f"{number:0{_KEY_DIGITS}d}", None
    if "id" in names and names["id"] != column:
        used.add(names["id"])
        key = str(record[names["id"]])
        if not _KEY.fullmatch(key):
            raise UsageError(
                f"{where}: id is {shown(key)}; expected 1 to 80 letters, digits, _ or -",
                "It becomes a file name and a WebDataset key.",
            )
    if "seed" in names and names["seed"] != column:
        used.add(names["seed"])
        seed = _seed(where, record[names["seed"]])
    others = {name: value for name, value in record.items() if name not in used}
    return PromptRow(key, prompt, seed, others)


def _seed(where: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UsageError(f"{where}: seed is {shown(value)}; expected a whole number from 0")
