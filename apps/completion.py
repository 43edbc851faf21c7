"""What the shell offers after Tab: bundle folders, names of runtimes and of recipes."""

from __future__ import annotations

from pathlib import Path


def bundle_folders(incomplete: str) -> list[str]:
    """Bundles that begin with what was typed; folders on the way to one end with a slash."""
    typed = Path(incomplete)
    parent = typed if incomplete.endswith("/") else typed.parent
    prefix = "" if incomplete.endswith("/") else typed.name
    base = incomplete[: len(incomplete) - len(prefix)]
    try:
        folders = sorted(path for path in parent.iterdir() if path.is_dir())
    except OSError:
        return []
    matching = [path for path in folders if path.name.startswith(prefix)]
    if not prefix.startswith("."):
        matching = [path for path in matching if not path.name.startswith(".")]
    bundles = [base + path.name for path in matching if (path / "tiue.json").is_file()]
    return bundles or [f"{base}{path.name}/" for path in matching]


def runtime_names(incomplete: str) -> list[tuple[str, str]]:
    """Runtimes with what each is."""
    from tiue_export.registry.backends import BACKENDS

    return [
        (name, entry.summary) for name, entry in BACKENDS.items() if name.startswith(incomplete)
    ]


def recipe_names(incomplete: str) -> list[tuple[str, str]]:
    """Recipes of few-step students with what each is."""
    from tiue_export.sampling.recipes import recipes

    return [(name, one.title) for name, one in recipes().items() if name.startswith(incomplete)]
