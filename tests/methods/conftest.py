"""Models that methods are tried on."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def ordinary_model(micro_pipeline, tmp_path_factory) -> Path:
    """The micro pipeline as an ordinary model: it records no K, and its scheduler is SD 1.5's."""
    folder = shutil.copytree(micro_pipeline, tmp_path_factory.mktemp("ordinary") / "model")
    file = folder / "scheduler" / "scheduler_config.json"
    kept = {k: v for k, v in json.loads(file.read_text()).items() if k != "tiue_steps"}
    file.write_text(json.dumps({**kept, "_class_name": "PNDMScheduler", "clip_sample": False}))
    return folder
