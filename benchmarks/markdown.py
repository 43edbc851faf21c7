"""Tables in markdown."""

from __future__ import annotations

from collections.abc import Iterable, Sequence


def table_lines(head: Sequence[str], rows: Iterable[Sequence[str]], words: int = 1) -> list[str]:
    """A table's lines; its first `words` columns hold words, the others numbers."""
    ruler = ["---"] * words + ["---:"] * (len(head) - words)
    first, *rest = (f"| {' | '.join(cells)} |" for cells in (head, *rows))
    return [first, f"|{'|'.join(ruler)}|", *rest]
