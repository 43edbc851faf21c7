"""Prompts to CLIP token ids, from the bundle's own tokenizer.json, without transformers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
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
        rows = [encoding.ids for encoding in self.backend.encode_batch(list(prompts))]
        return np.asarray(rows, dtype=np.int64).reshape(len(rows), self.length)

    def token_count(self, prompt: str) -> int:
        """Tokens of the whole prompt with start and end, before any cut or padding."""
        check_prompt(prompt)
        encoding = self.backend.encode(prompt)
        overflow = sum(sum(part.attention_mask) - 2 for part in encoding.overflowing)
        count: int = sum(encoding.attention_mask) + overflow
        return count


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
