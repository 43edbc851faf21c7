"""What a page loads from npm, for tests that open one."""

from __future__ import annotations

import functools
from pathlib import Path

import pytest

from tiue_export.apps.browser.npm_packages import vendored_files
from tiue_export.errors import TiueError


@functools.cache
def npm_files() -> dict[str, Path]:
    """Fetched once; without npm or a network the test is skipped, with the reason."""
    try:
        return vendored_files()
    except TiueError as error:
        pytest.skip(str(error))
