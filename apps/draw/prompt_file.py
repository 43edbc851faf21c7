"""Prompts from a text file, one a line."""

from __future__ import annotations

from pathlib import Path

from tiue_export.errors import UsageError


def prompts_in(path: Path | None, option: str = "--prompts") -> list[str]:
    """The lines that are not blank; none without a file. `option` names it in errors."""
    if path is None:
        return []
    try:
        lines = path.read_text("utf-8-sig").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UsageError(
            f"{option} {path} cannot be read as UTF-8 text: {error}", "Write one prompt a line."
        ) from error
    prompts = [line.strip() for line in lines if line.strip()]
    if not prompts:
        raise UsageError(f"{option} {path} holds no prompt", "Write one prompt a line.")
    return prompts
