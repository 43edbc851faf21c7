"""Prompts to CLIP token ids, from the bundle's own tokenizer.json, without transformers."""

from __future__ import annotations

import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.bundle.read import Bundle
from tiue_export.errors import BundleError, MissingExtraError, UsageError
from tiue_export.specs import Array

_SHORTEST = 3  # start, a word, end
MAX_CHUNKS = 20  # 1500 tokens; prompts are limited elsewhere to fewer letters than that takes


@dataclass(frozen=True)
class Tokenizer:
    """A CLIP tokenizer whose file carries padding to one chunk: what a text encoder reads at once.

    `length` is the text length L, of all chunks.
    """

    backend: Any
    length: int
    chunks: int = 1

    def __call__(self, prompts: Sequence[str]) -> Array:
        """Token ids (B, L) int64: chunks of start, words, end, padding; what is too long is cut."""
        rows = [self.framed(self.words(prompt)) for prompt in prompts]
        return np.asarray(rows, dtype=np.int64).reshape(len(rows), self.length)

    @property
    def capacity(self) -> int:
        """The most words' tokens of a prompt, without start and end: 75 in each chunk of 77."""
        return self.length - 2 * self.chunks

    @cached_property
    def word_positions(self) -> Array:
        """Where words lie in a row of ids, (capacity,): all but each chunk's first and last."""
        return np.arange(self.length).reshape(self.chunks, -1)[:, 1:-1].ravel()

    def framed(self, words: Sequence[int]) -> Array:
        """The row of ids (L,) int64 of these words, in chunks as Stable Diffusion web UI cuts them.

        A chunk without words is an empty prompt.
        """
        rows = np.tile(self._empty, (self.chunks, 1))
        size = self.capacity // self.chunks
        for number, row in enumerate(rows):
            part = words[number * size : (number + 1) * size]
            row[1 : len(part) + 2] = [*part, row[1]]  # which is the end
        return rows.ravel()

    @cached_property
    def _empty(self) -> Array:
        """The chunk of an empty prompt: start, end, padding."""
        return np.array(self.backend.encode("").ids, np.int64)

    def words(self, text: str) -> list[int]:
        """The ids of a whole text alone, without start, end and padding."""
        check_prompt(text)
        encoding = self.backend.encode(self._written_out(text), add_special_tokens=False)
        return [
            number
            for part in (encoding, *encoding.overflowing)
            for number, real in zip(part.ids, part.attention_mask, strict=True)
            if real
        ]

    def cut_note(self, prompt: str) -> str | None:
        """What of a prompt is cut, and how to keep it; None where it fits."""
        tokens, size = len(self.words(prompt)), self.capacity // self.chunks
        if tokens <= self.capacity:
            return None
        enough = min(-(-tokens // size), MAX_CHUNKS) * size
        more = f"; exported with --max-prompt-tokens {enough} it takes more"
        return (
            f"the prompt has {tokens} tokens, the last {tokens - self.capacity} are cut: the "
            f"bundle takes {self.capacity}{more if enough > self.capacity else ''}"
        )

    @cached_property
    def _several(self) -> dict[str, str]:
        """Tokens of several vectors, as diffusers names them: "cat" is "cat cat_1 cat_2"."""
        names = {str(each.content) for each in self.backend.get_added_tokens_decoder().values()}
        found = {}
        for name in names:
            rest = itertools.takewhile(names.__contains__, (f"{name}_{i}" for i in count(1)))
            if len(whole := [name, *rest]) > 1:
                found[name.lower()] = " ".join(whole)
        return found

    def _written_out(self, prompt: str) -> str:
        """The prompt with every vector of its textual inversions named."""
        if not self._several:
            return prompt
        longest_first = sorted(self._several, key=len, reverse=True)
        pattern = rf"({'|'.join(map(re.escape, longest_first))})(?!_\d)"
        return re.sub(pattern, lambda m: self._several[m[0].lower()], prompt, flags=re.IGNORECASE)


def check_prompt(prompt: str) -> None:
    """Refuse bytes of a terminal that are no UTF-8, and half characters, which no file holds."""
    try:
        prompt.encode()
    except UnicodeEncodeError as error:
        raise UsageError(
            f"the prompt {prompt[:50]!r} is no valid text: {error.reason}",
            "Set the terminal's locale to UTF-8, or put the prompt in a UTF-8 file.",
        ) from error


def open_tokenizer(path: Path, length: int, chunks: int = 1) -> Tokenizer:
    """Read tokenizer.json and check that it pads and cuts to a chunk of `length` tokens."""
    try:
        import tokenizers
    except ImportError as error:
        raise MissingExtraError("tokenizers is not installed", "pip install tokenizers") from error
    if not path.is_file():
        raise BundleError(
            f"the bundle has no {path.name}: it was exported without a tokenizer",
            "Export again with --base and the pipeline folder that holds one.",
        )
    try:
        backend = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # tokenizers raises a bare Exception for every fault
        raise BundleError(f"{path} cannot be read as a tokenizer: {error}") from error
    padding, truncation = backend.padding or {}, backend.truncation or {}
    size = length // chunks
    if padding.get("length") != size or truncation.get("max_length") != size or size < _SHORTEST:
        raise BundleError(
            f"{path} pads to {padding.get('length')} and cuts at {truncation.get('max_length')}; "
            f"the text encoder takes {size} tokens",
            "Export the bundle again.",
        )
    return Tokenizer(backend, length, chunks)


def tokenizer_of_bundle(bundle: Bundle) -> Tokenizer:
    """The tokenizer that a bundle holds. Raises `BundleError` where it has none."""
    manifest = bundle.manifest
    path = bundle.file("tokenizer/tokenizer.json")
    return open_tokenizer(path, manifest.text_tokens, manifest.text_chunks)
