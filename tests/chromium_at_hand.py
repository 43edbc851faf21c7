"""The Chromium that tests of pages run; `make setup-browser` installs Debian's."""

from __future__ import annotations

import shutil

import pytest

from tiue_export.benchmarks.studies.browser_latency import BROWSERS

CHROMIUM = next(filter(None, map(shutil.which, BROWSERS)), None)
needs_chromium = pytest.mark.skipif(
    CHROMIUM is None, reason=f"none of {', '.join(BROWSERS)} is on PATH; try: make setup-browser"
)
