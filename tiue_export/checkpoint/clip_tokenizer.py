"""CLIP's own tokenizer, which single files do not hold; Stable Diffusion 1.x and 2.x share it."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path

VOCABULARY_SIZE = 49_408
_START, _END = "<|startoftext|>", "<|endoftext|>"
# OpenAI's tokenizer (SD 1.x) pads with end-of-text, OpenCLIP's (SD 2.x) with token 0.
OPENAI_PAD, OPENCLIP_PAD = _END, "!"


def write_clip_tokenizer(folder: Path, pad: str) -> None:
    """Write vocab.json, merges.txt and tokenizer_config.json, as CLIPTokenizer reads them."""
    from tokenizers import pre_tokenizers

    merges = (resources.files("tiue_export.checkpoint") / "clip" / "merges.txt").read_text("utf-8")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    pieces += [line.replace(" ", "") for line in merges.splitlines()[1:]]
    vocabulary = {piece: number for number, piece in enumerate((*pieces, _START, _END))}
    (folder / "vocab.json").write_text(json.dumps(vocabulary, ensure_ascii=False), "utf-8")
    (folder / "merges.txt").write_text(merges, "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": 77,
        "bos_token": _START,
        "eos_token": _END,
        "unk_token": _END,
        "pad_token": pad,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")
