"""A training run on disk: its configuration, one atomic state file, and a journal of its steps.

A run may be killed at any moment. The state file is replaced in one step, and on resuming the
journal loses what was logged after the last state, so that a broken run and an unbroken one end
with the same files.
"""

from __future__ import annotations

import json
import os
import pickle
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

from tiue_export.errors import CheckpointError, UsageError, first_line
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.json_file import parse_json, read_object
from tiue_export.system.lock import sole_process

CONFIG_FILE = "run.json"
STATE_FILE = "state.pt"
JOURNAL_FILE = "journal.jsonl"
LOCK_FILE = ".lock"


_DAMAGED = (
    OSError,
    EOFError,
    RuntimeError,
    LookupError,
    TypeError,
    ValueError,
    pickle.UnpicklingError,
)


class RunFolder:
    """One training run's files below `path`.

    `config` is all that decides the outcome. A folder that holds another configuration's run is
    refused with `UsageError`, naming the settings that differ.
    """

    def __init__(self, path: Path, config: Mapping[str, Any]) -> None:
        self.path = path
        wanted = json.loads(json.dumps(config))
        file = path / CONFIG_FILE
        with disk_errors(file):
            path.mkdir(parents=True, exist_ok=True)
            if file.is_file():
                _refuse_other(path, _read_json(file), wanted)
            else:
                write_atomically(file, (json.dumps(wanted, indent=1) + "\n").encode())

    @contextmanager
    def lock(self) -> Iterator[None]:
        """Hold the folder for this process until it ends, however it ends.

        Two trainings in one folder would replace each other's state: `UsageError` for the second.
        """
        file = self.path / LOCK_FILE
        with disk_errors(file), sole_process(file, f"training in {self.path}"):
            yield

    def load(self, *, truncate: bool = True) -> dict[str, Any] | None:
        """The last saved state, or None for a run that saved none yet.

        With `truncate`, what the journal holds beyond that state is dropped: those steps come
        again. Raises `CheckpointError` for a damaged file.
        """
        file = self.path / STATE_FILE
        state = _read_state(file) if file.is_file() else None
        if truncate:
            with disk_errors(self.path / JOURNAL_FILE):
                self._truncate_journal(0 if state is None else int(state["step"]))
        return state

    def save(self, step: int, **parts: Any) -> None:
        """Replace the state file; `parts` are state dicts, tensors and plain values."""
        file = self.path / STATE_FILE
        partial = file.with_suffix(".partial")
        with disk_errors(file):
            try:
                with partial.open("wb") as stream:
                    torch.save({"step": step, **parts}, stream)
                    stream.flush()
                    os.fsync(stream.fileno())
                partial.replace(file)
            except BaseException as error:
                partial.unlink(missing_ok=True)
                # torch reports a failed write (a full disk) as its own RuntimeError.
                reason = error.__cause__ or error.__context__
                if isinstance(error, RuntimeError) and isinstance(reason, OSError):
                    raise reason from error
                raise

    def log(self, step: int, **values: float | str) -> None:
        """Append one line to the journal."""
        with disk_errors(self.path / JOURNAL_FILE), (self.path / JOURNAL_FILE).open("a") as file:
            file.write(json.dumps({"step": step, **values}) + "\n")

    def journal(self) -> Iterator[dict[str, Any]]:
        """The logged lines in order; a line cut off by a kill is left out."""
        return self.lines_of(self.path)

    @staticmethod
    def lines_of(folder: Path) -> Iterator[dict[str, Any]]:
        """The same of a run that is only read."""
        file = folder / JOURNAL_FILE
        if not file.is_file():
            return
        for line in file.read_text("utf-8").splitlines():
            try:
                yield parse_json(line)
            except ValueError:
                return

    def _truncate_journal(self, step: int) -> None:
        kept = [json.dumps(entry) for entry in self.journal() if entry["step"] <= step]
        write_atomically(self.path / JOURNAL_FILE, "".join(f"{k}\n" for k in kept).encode())


def _read_state(file: Path) -> dict[str, Any]:
    try:
        state: dict[str, Any] = torch.load(file, map_location="cpu", weights_only=True)
        int(state["step"])
    except _DAMAGED as error:
        raise CheckpointError(
            f"{file} is not a state of a training run: {first_line(error)}",
            f"Remove {file.parent} to train from the start.",
        ) from error
    return state


def _refuse_other(path: Path, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    changed = sorted(key for key in {*found, *wanted} if found.get(key) != wanted.get(key))
    if changed:
        differences = ", ".join(
            f"{key} was {found.get(key)!r}, is {wanted.get(key)!r}" for key in changed[:4]
        )
        raise UsageError(
            f"{path} holds a run with other settings: {differences}",
            "Choose another output folder, or restore the settings to resume this run.",
        )


def _read_json(file: Path) -> dict[str, Any]:
    try:
        return read_object(file)
    except ValueError as error:
        raise CheckpointError(
            f"{file} is not JSON: {first_line(error)}", f"Remove {file.parent} to start anew."
        ) from error
