"""The one place of the version; CHANGELOG.md must agree (tested)."""

__version__ = "0.1.0"
