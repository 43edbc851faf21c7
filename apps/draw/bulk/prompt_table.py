"""Prompts from a table: .tsv, .jsonl or .parquet with a prompt column, or .txt with none."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tiue_export.errors import UsageError, first_line
from tiue_export.registry.packages import require
from tiue_export.system.json_file import parse_json

from ..prompt_file import prompts_in

TABLES = (".tsv", ".jsonl", ".parquet")
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


def read_rows(path: Path, prompt_column: str = "prompt") -> list[PromptRow]:
    """Every row, checked: a column for the prompt, `seed` and `id` if there, keys that are unique.

    Column names count in any case. Without an `id` the row's number from 0 is the key.
    """
    rows: list[PromptRow] = []
    first_use: dict[str, str] = {}
    for where, record in _records(path, prompt_column):
        row = _row(where, record, len(rows), prompt_column)
        if row.key in first_use:
            raise UsageError(
                f"{where}: the id {row.key!r} was used before, in {first_use[row.key]}",
                "Give each row an id of its own, or leave the column out.",
            )
        first_use[row.key] = where
        rows.append(row)
    if not rows:
        raise UsageError(f"--prompts {path} holds no prompt")
    return rows


def _row(where: str, record: Mapping[str, Any], number: int, prompt_column: str) -> PromptRow:
    names = {name.lower(): name for name in record}
    column = names.get(prompt_column.lower())
    if column is None:
        raise UsageError(
            f"{where}: no column {prompt_column!r}; there are: {', '.join(record) or 'none'}",
            "Name the column of the prompts with --prompt-column.",
        )
    prompt = record[column]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{where}: {column} is {_shown(prompt)}; expected a text")
    used = {column}
    key, seed = f"{number:0{_KEY_DIGITS}d}", None
    if "id" in names and names["id"] != column:
        used.add(names["id"])
        key = str(record[names["id"]])
        if not _KEY.fullmatch(key):
            raise UsageError(
                f"{where}: id is {_shown(key)}; expected 1 to 80 letters, digits, _ or -",
                "It becomes a file name and a WebDataset key.",
            )
    if "seed" in names and names["seed"] != column:
        used.add(names["seed"])
        seed = _seed(where, record[names["seed"]])
    others = {name: value for name, value in record.items() if name not in used}
    return PromptRow(key, prompt.strip(), seed, others)


def _seed(where: str, value: Any) -> int:
    if isinstance(value, str) and re.fullmatch(r"\d{1,10}", value.strip()):
        return int(value)
    if isinstance(value, int) and not isinstance(value, bool) and value >= 0:
        return value
    raise UsageError(f"{where}: seed is {_shown(value)}; expected a whole number from 0")


def _records(path: Path, prompt_column: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Where each row stands, and the row."""
    reader = {".tsv": _tsv, ".jsonl": _jsonl, ".parquet": _parquet}.get(path.suffix.lower())
    if reader is None:
        for number, prompt in enumerate(prompts_in(path)):
            yield f"{path}, prompt {number + 1}", {prompt_column: prompt}
        return
    try:
        yield from reader(path)
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(f"--prompts {path} cannot be read: {first_line(error)}") from error


def _tsv(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """IANA's text/tab-separated-values: a header, no quoting."""
    header: list[str] | None = None
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            cells = line.rstrip("\r\n").split("\t")
            if header is None:
                header = cells
            elif cells != [""]:
                where = f"{path}, line {number}"
                if len(cells) != len(header):
                    raise UsageError(
                        f"{where} has {len(cells)} cells; the header has {len(header)}"
                    )
                yield where, dict(zip(header, cells, strict=True))


def _jsonl(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    with path.open(encoding="utf-8-sig") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            where = f"{path}, line {number}"
            try:
                record = parse_json(line)
            except ValueError as error:
                raise UsageError(f"{where} is not JSON: {first_line(error)}") from error
            if not isinstance(record, dict):
                raise UsageError(
                    f"{where} is {_shown(record)}; expected an object",
                    'Write one {"prompt": "..."} a line.',
                )
            yield where, record


def _parquet(path: Path) -> Iterator[tuple[str, Mapping[str, Any]]]:
    require("reading .parquet", ("pyarrow",), "app")
    import pyarrow
    import pyarrow.parquet

    number = 0
    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            for batch in file.iter_batches(1024):
                for record in batch.to_pylist():
                    number += 1
                    yield f"{path}, row {number}", record
    except pyarrow.ArrowException as error:
        raise UsageError(f"--prompts {path} is no Parquet file: {first_line(error)}") from error


def _shown(value: Any) -> str:
    return repr(value)[:60]
