"""The JSON configurations of a checkpoint: objects, read strictly."""

from __future__ import annotations

from pathlib import Path

from tiue_export.checkpoint.family import Config
from tiue_export.errors import CheckpointError, first_line
from tiue_export.system.json_file import parse_json


def read_config(path: Path) -> Config:
    """A JSON object from a file of the checkpoint."""
    if path.exists() and not path.is_file():  # a named pipe would be waited for without end
        raise CheckpointError(f"{path} is no file")
    try:
        text = path.read_text("utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise CheckpointError(f"{path} cannot be read: {first_line(error)}") from error
    return config_from(text, str(path))


def config_from(text: str, where: str) -> Config:
    """A JSON object from text; `where` names it in errors."""
    try:
        data = parse_json(text)
    except ValueError as error:
        raise CheckpointError(f"{where} is not JSON: {first_line(error)}") from error
    if not isinstance(data, dict):
        raise CheckpointError(f"{where} is not a JSON object")
    return data
