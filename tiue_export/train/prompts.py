"""Training prompts from text, TSV, JSONL or parquet: cleaned, deduplicated, in a fixed order."""

from __future__ import annotations

import csv
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

from tiue_export.errors import MissingExtraError, UsageError, first_line
from tiue_export.system.install import install_line
from tiue_export.system.json_file import parse_json

# The paper's own preparation: drop empty ones and duplicates, sort, shuffle with this seed.
_SHUFFLE_SEED = 2023
_COLUMNS = ("prompt", "caption", "text")
# UTF-8, with or without the mark that Windows programs put in front.
_ENCODING = "utf-8-sig"


class _Tsv(csv.excel_tab):
    quoting = csv.QUOTE_NONE


def read_prompts(file: Path, column: str | None = None) -> list[str]:
    """All distinct prompts of `file`, stripped, sorted, then shuffled with the paper's seed.

    .txt holds one a line; .tsv and .csv have a header; .jsonl one object a line; .parquet a table.
    `column` names the field (dots reach into nested objects: Task2.Caption); without it the one
    named prompt, caption or text, in any case, is taken. Raises `UsageError`.
    """
    readers = {
        ".txt": _lines,
        ".tsv": _table,
        ".csv": _table,
        ".jsonl": _objects,
        ".parquet": _parquet,
    }
    if file.suffix not in readers:
        raise UsageError(f"{file} is not {', '.join(readers)}")
    try:
        found = {text.strip() for text in readers[file.suffix](file, column) if text}
    except FileNotFoundError as error:
        raise UsageError(f"{file} is not there") from error
    except (OSError, UnicodeDecodeError, csv.Error) as error:
        raise UsageError(f"{file} cannot be read: {first_line(error)}") from error
    prompts = sorted(found - {""})
    if not prompts:
        where = "" if column is None else f" in {column!r}"
        raise UsageError(f"{file} holds no prompt{where}")
    random.Random(_SHUFFLE_SEED).shuffle(prompts)
    return prompts


def _lines(file: Path, column: str | None) -> Iterator[str]:
    yield from file.read_text(_ENCODING).splitlines()


def _table(file: Path, column: str | None) -> Iterator[str]:
    # A quote sign in a TSV prompt is a quote sign; only CSV quotes its fields.
    dialect = _Tsv if file.suffix == ".tsv" else csv.excel
    with file.open(encoding=_ENCODING, newline="") as stream:
        rows = csv.DictReader(stream, dialect=dialect)
        name = _choose(file, rows.fieldnames or [], column)
        for row in rows:
            yield row[name] or ""


def _objects(file: Path, column: str | None) -> Iterator[str]:
    name = column
    with file.open(encoding=_ENCODING) as stream:
        for number, line in enumerate(stream, 1):
            if not line.strip():
                continue
            try:
                entry = parse_json(line)
            except ValueError as error:
                raise UsageError(f"{file}:{number} is not JSON: {first_line(error)}") from error
            if not isinstance(entry, dict):
                raise UsageError(f"{file}:{number} is not a JSON object")
            name = name or _choose(file, list(entry), None)
            value: object = entry
            for key in name.split("."):
                value = value.get(key) if isinstance(value, dict) else None
            if value is not None and not isinstance(value, str):
                raise UsageError(f"{file}:{number} has a {name} that is not text: {value!r}")
            yield value or ""


def _parquet(file: Path, column: str | None) -> Iterator[str]:
    try:
        from pyarrow import ArrowException, parquet
    except ImportError as error:
        raise MissingExtraError("reading parquet needs pyarrow", install_line("train")) from error
    try:
        table = parquet.ParquetFile(file)
        name = _choose(file, table.schema_arrow.names, column)
        for batch in table.iter_batches(columns=[name]):
            for text in batch.column(0).to_pylist():
                if text is not None and not isinstance(text, str):
                    raise UsageError(f"{file} has a {name} that is not text: {text!r}")
                yield text or ""
    except ArrowException as error:
        raise UsageError(f"{file} is not parquet: {first_line(error)}") from error


def _choose(file: Path, names: Sequence[str], wanted: str | None) -> str:
    listed = ", ".join(names) or "none"
    if wanted is not None:
        if wanted not in names:
            raise UsageError(f"{file} has no column {wanted!r}; it has: {listed}")
        return wanted
    for name in names:
        if name.lower() in _COLUMNS:
            return name
    raise UsageError(
        f"{file} has no column named {', '.join(_COLUMNS)}; it has: {listed}",
        'Name it: calibrate --column NAME, or prompt_column = "NAME" in a configuration.',
    )
