"""Prompts with weights, "a (red:1.3) fox", read and applied as by Stable Diffusion web UI (A1111).

(words) are 1.1 times as heavy, [words] as light, brackets in brackets multiply, (words:1.3) says a
number; a backslash makes a bracket a letter. Each token's vector of the text encoder's output is
multiplied by its weight, then the whole by one number that restores its mean. That happens on the
host, so every runtime has it.
"""

from __future__ import annotations

import re
from collections.abc import Sequence

import numpy as np

from tiue_export.drawing.tokenizer import Tokenizer, check_prompt
from tiue_export.errors import UsageError
from tiue_export.specs import Array

_BRACKET = 1.1
_LARGEST_WEIGHT = 20.0
_TOKEN = re.compile(
    r"(?P<escaped>\\[()\[\]\\])|(?P<open>[(\[])"
    r"|:\s*(?P<weight>[+-]?(?:\d+\.?\d*|\.\d+))\s*\)|(?P<close>[)\]])|(?P<text>[^\\()\[\]:]+|.)",
    re.DOTALL,
)


def parse_weights(prompt: str) -> list[tuple[str, float]]:
    """A prompt's texts and their weights, in order; what is not closed reaches to the end.

    Raises `UsageError` for a weight beyond 20, where no picture is left.
    """
    pieces: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # each open bracket, and how many pieces lay before it
    for match in _TOKEN.finditer(prompt):
        closing = match["close"] or (")" if match["weight"] else "")
        if match["open"]:
            opened.append((match["open"], len(pieces)))
        elif closing and opened and opened[-1][0] == {")": "(", "]": "["}[closing]:
            bracket, first = opened.pop()
            pieces[first:] = _times(pieces[first:], bracket, match["weight"])
        else:
            pieces.append(((match["escaped"] or " ")[1:] or match[0], 1.0))
    for bracket, first in reversed(opened):
        pieces[first:] = _times(pieces[first:], bracket, None)
    heaviest = max((abs(weight) for _, weight in pieces), default=0.0)
    if not heaviest <= _LARGEST_WEIGHT:
        raise UsageError(
            f"the prompt {prompt[:50]!r} weighs a word by {heaviest:g}; expected at most "
            f"{_LARGEST_WEIGHT:g}",
            "Usual weights are 0.5 to 1.5, such as (word:1.3).",
        )
    merged: list[tuple[str, float]] = []
    for text, weight in pieces:
        if merged and merged[-1][1] == weight:
            text = merged.pop()[0] + text
        merged.append((text, weight))
    return merged


def _times(
    pieces: list[tuple[str, float]], bracket: str, weight: str | None
) -> list[tuple[str, float]]:
    usual = _BRACKET if bracket == "(" else 1 / _BRACKET
    return [(text, own * (float(weight) if weight else usual)) for text, own in pieces]


def without_weights(prompt: str) -> str:
    """The words alone."""
    return "".join(text for text, _ in parse_weights(prompt))


def weighted_tokens(tokenizer: Tokenizer, prompts: Sequence[str]) -> tuple[Array, Array]:
    """Token ids (B, L) int64 and the weight of each, (B, L) float32; what is too long is cut."""
    ids = tokenizer([""] * len(prompts))
    weights = np.ones(ids.shape, np.float32)
    for row, prompt in enumerate(prompts):
        check_prompt(prompt)
        pieces = parse_weights(prompt)
        if all(weight == 1 for _, weight in pieces):
            ids[row] = tokenizer(["".join(text for text, _ in pieces)])[0]
            continue
        words = [(token, w) for text, w in pieces for token in tokenizer.words(text)]
        words = words[: tokenizer.capacity]
        ids[row] = tokenizer.framed([token for token, _ in words])
        weights[row, tokenizer.word_positions[: len(words)]] = [weight for _, weight in words]
    return ids, weights


def weighted_text(text: Array, weights: Array) -> Array:
    """A text embedding (B, L, D) under weights (B, L), of the same mean and dtype as before.

    Rows behind the L tokens, which hold SDXL's pooled text, stay as they are.
    """
    tokens = weights.shape[1]
    text, pooled = text[:, :tokens], text[:, tokens:]
    wide = text.astype(np.float32)
    scaled = wide * weights[:, :, None]
    before, after = (each.mean(axis=(1, 2), keepdims=True) for each in (wide, scaled))
    ratio = np.divide(before, after, out=np.ones_like(before), where=after != 0)
    same = (weights == 1).all(axis=1)[:, None, None]
    weighted: Array = np.where(same, wide, scaled * ratio).astype(text.dtype)
    return np.concatenate([weighted, pooled], axis=1) if pooled.size else weighted
