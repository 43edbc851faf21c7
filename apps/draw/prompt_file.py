"""Files of prompts: .tsv, .csv, .jsonl or .parquet with a prompt column, else one prompt a line."""

from __future__ import annotations

import csv
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any

from tiue_export.errors import UsageError, first_line
from tiue_export.registry.packages import require
from tiue_export.system.json_file import parse_json

PROMPT_COLUMN = "prompt"
Record = tuple[str, Mapping[str, Any]]  # where it stands, for messages; what it holds


def prompts_in(path: Path | None, option: str = "--prompts") -> list[str]:
    """Every prompt of a file, none without one. `option` names it in errors."""
    if path is None:
        return []
    records = records_in(path, PROMPT_COLUMN, option)
    return [prompt_in(where, record, PROMPT_COLUMN)[1] for where, record in records]


def records_in(path: Path, prompt_column: str, option: str = "--prompts") -> Iterator[Record]:
    """Each record of a file that has one; a line's only column is `prompt_column`."""
    reader = TABLES.get(path.suffix.lower())
    records = reader(path) if reader else _lines(path, prompt_column, option)
    found = False
    try:
        for record in records:
            found = True
            yield record
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{option} {path} cannot be read: {first_line(error)}") from error
    if not found:
        raise UsageError(
            f"{option} {path} holds no prompt",
            "Write one prompt a line, in a table below a header.",
        )


def prompt_in(where: str, record: Mapping[str, Any], prompt_column: str) -> tuple[str, str]:
    """The name that a record gives the column, in any case, and its prompt."""
    column = next((name for name in record if name.lower() == prompt_column.lower()), None)
    if column is None:
        raise UsageError(
            f"{where}: no column {prompt_column!r}; there are: {', '.join(record) or 'none'}",
            f"Call it {prompt_column}; generate also takes --prompt-column NAME.",
        )
    prompt = record[column]
    if not isinstance(prompt, str) or not prompt.strip():
        raise UsageError(f"{where}: {column} is {shown(prompt)}; expected a text")
    return column, prompt.strip()


def shown(value: Any) -> str:
    """A value of a record in a message."""
    return repr(value)[:60]


def _lines(path: Path, column: str, option: str) -> Iterator[Record]:
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option} {path} cannot be read as UTF-8 text: {error}", "Write one prompt a line."
        ) from error
    prompts = (line.strip() for line in lines if line.strip())
    for number, prompt in enumerate(prompts, 1):
        yield f"{path}, prompt {number}", {column: prompt}


def _table(path: Path) -> Iterator[Record]:
    """A header, then cells: between tabs without quoting (IANA's), or RFC 4180's CSV."""
    header: list[str] | None = None
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, cells in _cells(file) if path.suffix.lower() == ".tsv" else _quoted(file):
            if header is None:
                header = cells
            elif cells:
                where = f"{path}, line {number}"
                if len(cells) != len(header):
                    raise UsageError(
                        f"{where} has {len(cells)} cells; the header has {len(header)}"
                    )
                yield where, dict(zip(header, cells, strict=True))


def _cells(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    for number, line in enumerate(file, 1):
        text = line.rstrip("\r\n")
        yield number, text.split("\t") if text else []


def _quoted(file: Iterable[str]) -> Iterator[tuple[int, list[str]]]:
    rows = csv.reader(file, strict=True)
    for cells in rows:
        yield rows.line_num, cells


def _jsonl(path: Path) -> Iterator[Record]:
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
                    f"{where} is {shown(record)}; expected an object",
                    'Write one {"prompt": "..."} a line.',
                )
            yield where, record


def _parquet(path: Path) -> Iterator[Record]:
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
        raise UsageError(f"{path} is no Parquet file: {first_line(error)}") from error


TABLES = {".tsv": _table, ".csv": _table, ".jsonl": _jsonl, ".parquet": _parquet}
