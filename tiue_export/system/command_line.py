"""The command lines that messages print: quoted, so that they can be typed as they stand."""

from __future__ import annotations

import shlex


def command_line(*words: object) -> str:
    """`tiue-export WORDS`, each word quoted where a shell would not take it as one."""
    return shlex.join(("tiue-export", *map(str, words)))
