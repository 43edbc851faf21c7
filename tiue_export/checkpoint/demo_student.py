"""The student that ships with the package: every command takes it as `--ckpt demo`."""

from __future__ import annotations

from importlib import resources
from pathlib import Path

from tiue_export.errors import CheckpointError

NAME = "demo"


def demo_student() -> Path:
    """The pipeline folder of the student that ships: K = 4, 128 px, fp16 (demo/MODEL_CARD.md).

    Raises `CheckpointError` when the installation lacks it.
    """
    folder = Path(str(resources.files("tiue_export"))) / "demo" / "emoji-student"
    if not (folder / "model_index.json").is_file():
        raise CheckpointError(
            f"the student that ships with the package is not there: {folder}",
            "Install tiue-export again, or give a checkpoint of yours.",
        )
    return folder


def checkpoint_place(given: str | Path) -> Path:
    """Where a checkpoint lies: the word "demo" means the one that ships, anything else is a path.

    A folder of that name in the current one is `./demo`, or any `Path` object; where it is a model,
    the bare word could mean either and raises `CheckpointError`.
    """
    if given != NAME:
        return Path(given)
    if (Path(NAME) / "model_index.json").is_file():
        raise CheckpointError(
            f'"{NAME}" is the student that ships, and also a model folder here',
            f"Type ./{NAME} for the folder here, or run this in another folder.",
        )
    return demo_student()
