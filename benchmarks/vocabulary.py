"""Train a CLIP-type byte-level BPE vocabulary and write it as a tokenizer folder.

The tokenizers library's trainer breaks ties in another order in each process. A vocabulary decides
every token id, so here equal texts give equal files: ties go to the alphabetically first pair.
"""

from __future__ import annotations

import itertools
import json
import re
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Any

from tokenizers import pre_tokenizers

_END = "</w>"
# CLIP's pre-tokenizer: contractions, runs of letters, single digits, runs of anything else.
_PIECES = re.compile(r"'s|'t|'re|'ve|'m|'ll|'d|[^\W\d_]+|\d|[^\s\w]+|_+")


def write_tokenizer(
    folder: Path, texts: Iterable[str], text_config: dict[str, Any], *, of_openclip: bool = False
) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, as CLIPTokenizer reads them.

    `text_config` is the CLIP text encoder's: vocab_size pieces at most, its begin and end ids, its
    number of positions. OpenCLIP's (SD 2.x, SDXL's second) pads with "!", OpenAI's with
    end-of-text.
    """
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + _END for letter in alphabet)]
    merges = learn_merges(texts, int(text_config["vocab_size"]) - 2 - len(pieces))
    pieces += ["".join(pair) for pair in merges]
    vocabulary = {piece: number for number, piece in enumerate(dict.fromkeys(pieces))}
    vocabulary["<|startoftext|>"] = text_config["bos_token_id"]
    vocabulary["<|endoftext|>"] = text_config["eos_token_id"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    lines = ["#version: 0.2", *(" ".join(pair) for pair in merges), ""]
    (folder / "merges.txt").write_text("\n".join(lines), "utf-8")
    pad = "!" if of_openclip else "<|endoftext|>"
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": text_config["max_position_embeddings"],
        "bos_token": "<|startoftext|>",
        "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


def learn_merges(texts: Iterable[str], count: int) -> list[tuple[str, str]]:
    """Up to `count` merges of the most frequent neighbouring pieces (Sennrich et al. 2016)."""
    encoder = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    words: Counter[tuple[str, ...]] = Counter()
    for text in texts:
        for piece in _PIECES.findall(text.lower()):
            ((letters, _),) = encoder.pre_tokenize_str(piece)
            words[(*letters[:-1], letters[-1] + _END)] += 1
    merges: list[tuple[str, str]] = []
    while len(merges) < count:
        pairs: Counter[tuple[str, str]] = Counter()
        for word, times in words.items():
            for pair in itertools.pairwise(word):
                pairs[pair] += times
        if not pairs:
            break
        best = min(pairs, key=lambda pair: (-pairs[pair], pair))
        merges.append(best)
        merged: Counter[tuple[str, ...]] = Counter()
        for word, times in words.items():
            merged[_joined(word, best)] += times
        words = merged
    return merges


def _joined(word: tuple[str, ...], pair: tuple[str, str]) -> tuple[str, ...]:
    joined: list[str] = []
    for piece in word:
        if joined and (joined[-1], piece) == pair:
            joined[-1] += piece
        else:
            joined.append(piece)
    return tuple(joined)
