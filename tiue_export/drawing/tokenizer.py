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

from tiue_export.errors import BundleError, MissingExtraError, UsageError
from tiue_export.specs import Array


@dataclass(frozen=True)
class Tokenizer:
    """A CLIP tokenizer whose file already carries truncation and padding to the text length."""

    backend: Any
    length: int

    def __call__(self, prompts: Sequence[str]) -> Array:
        """Token ids (B, L) int64: start, the words, end, padding; what is too long is cut."""
        for prompt in prompts:
            check_prompt(prompt)
        texts = [self._written_out(prompt) for prompt in prompts]
        rows = [encoding.ids for encoding in self.backend.encode_batch(texts)]
        return np.asarray(rows, dtype=np.int64).reshape(len(rows), self.length)

    def token_count(self, prompt: str) -> int:
        """Tokens of the whole prompt with start and end, before any cut or padding."""
        check_prompt(prompt)
        encoding = self.backend.encode(self._written_out(prompt))
        overflow = sum(sum(part.attention_mask) - 2 for part in encoding.overflowing)
        count: int = sum(encoding.attention_mask) + overflow
        return count

    def words(self, text: str) -> list[int]:
        """The ids of a text alone, without start, end and padding; at most `length`."""
        check_prompt(text)
        encoding = self.backend.encode(self._written_out(text), add_special_tokens=False)
        return [
            number
            for number, real in zip(encoding.ids, encoding.attention_mask, strict=True)
            if real
        ]

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


def open_tokenizer(path: Path, length: int) -> Tokenizer:
    """Read tokenizer.json and check that it pads and cuts to `length` tokens."""
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
    if padding.get("length") != length or truncation.get("max_length") != length:
        raise BundleError(
            f"{path} pads to {padding.get('length')} and cuts at {truncation.get('max_length')}; "
            f"the text encoder takes {length} tokens",
            "Export the bundle again.",
        )
    return Tokenizer(backend, length)
