"""The checkpoint's tokenizer -> the three files that light, Swift and C++ runtimes read."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, NamedTuple

from transformers import CLIPTokenizer

from tiue_export.drawing.tokenizer import Tokenizer, open_tokenizer
from tiue_export.errors import CheckpointError, UnsupportedModelError, UsageError, first_line
from tiue_export.system.json_file import read_object
from tiue_export.system.owned_path import temporary_folder

# CLIP has 49,408.
_LARGEST_VOCABULARY = 1_000_000


def write_tokenizer(source: Path, folder: Path, length: int) -> None:
    """Write tokenizer.json (padding and truncation to `length` inside), vocab.json, merges.txt.

    The pad token differs between families (SD 1.x pads with end-of-text, SD 2.x with "!"), so it is
    read from the checkpoint. transformers 5 saves only tokenizer.json, which Apple's Swift code
    and stable-diffusion.cpp cannot read.
    """
    with _readable(source):
        tokenizer: Any = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        backend = tokenizer.backend_tokenizer
        backend.enable_truncation(max_length=length)
        backend.enable_padding(
            length=length, pad_id=tokenizer.pad_token_id, pad_token=tokenizer.pad_token
        )
    folder.mkdir(parents=True, exist_ok=True)
    backend.save(str(folder / "tokenizer.json"), pretty=False)
    model = json.loads((folder / "tokenizer.json").read_text("utf-8"))["model"]
    vocab = dict(sorted(model["vocab"].items(), key=lambda item: item[1]))
    (folder / "vocab.json").write_text(json.dumps(vocab, ensure_ascii=False), "utf-8")
    merges = [pair if isinstance(pair, str) else " ".join(pair) for pair in model["merges"]]
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges, ""]), "utf-8")
    config = {
        "tokenizer_class": "CLIPTokenizer",
        "model_max_length": length,
        "bos_token": tokenizer.bos_token,
        "eos_token": tokenizer.eos_token,
        "unk_token": tokenizer.unk_token,
        "pad_token": tokenizer.pad_token,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(config, indent=2) + "\n", "utf-8")


class SpecialTokens(NamedTuple):
    """The ids of a tokenizer's end of text and of its padding."""

    end: int
    pad: int


def special_tokens(source: Path) -> SpecialTokens:
    """Of the CLIP tokenizer in a folder."""
    with _readable(source):
        tokenizer: Any = CLIPTokenizer.from_pretrained(source, local_files_only=True)
    return SpecialTokens(int(tokenizer.eos_token_id), int(tokenizer.pad_token_id))


def write_with_pad(source: Path, folder: Path, pad: int) -> None:
    """Write the tokenizer of `source` with this token for padding."""
    with _readable(source):
        tokenizer: Any = CLIPTokenizer.from_pretrained(source, local_files_only=True)
        tokenizer.pad_token = tokenizer.convert_ids_to_tokens(pad)
    tokenizer.save_pretrained(folder)


def check_same_words(first: Path, second: Path) -> None:
    """Raise `UnsupportedModelError` unless two tokenizers differ in their padding alone."""
    own, other = (_words(folder) for folder in (first, second))
    if own != other:
        raise UnsupportedModelError(
            f"{first} and {second} give other tokens for the same words; expected tokenizers that "
            "differ in their padding alone, as SDXL's do",
            "Restore the tokenizers that belong to this model.",
        )


def _words(folder: Path) -> tuple[dict[str, int], list[str]]:
    """A tokenizer's vocabulary and merges."""
    with _readable(folder):
        tokenizer: Any = CLIPTokenizer.from_pretrained(folder, local_files_only=True)
        model = json.loads(tokenizer.backend_tokenizer.to_str())["model"]
    return tokenizer.get_vocab(), [str(pair) for pair in model["merges"]]


def write_with_tokens(source: Path, folder: Path, tokens: Sequence[str]) -> list[int]:
    """Write the tokenizer of `source` with more tokens, as transformers does; their ids.

    Raises `UsageError` for a token that it has already.
    """
    with _readable(source):
        tokenizer: Any = CLIPTokenizer.from_pretrained(source, local_files_only=True)
    known = {name.lower() for name in tokenizer.added_tokens_encoder} | set(tokenizer.get_vocab())
    taken = [token for token in tokens if token in known or token.lower() in known]
    if taken:
        raise UsageError(
            f"the token {taken[0]!r} is in the vocabulary already",
            "Give it another name: --embedding FILE:TOKEN",
        )
    tokenizer.add_tokens(list(tokens))
    tokenizer.save_pretrained(folder)
    ids: list[int] = tokenizer.convert_tokens_to_ids(list(tokens))
    return ids


@contextmanager
def _readable(source: Path) -> Iterator[None]:
    """Raise `CheckpointError` for a folder that is no CLIP tokenizer."""
    if not any((source / name).is_file() for name in ("tokenizer.json", "vocab.json")):
        # transformers would make up an empty vocabulary.
        raise CheckpointError(
            f"{source} cannot be read as a CLIP tokenizer: it holds no vocabulary",
            "It needs tokenizer.json, or vocab.json and merges.txt.",
        )
    _check_ids(source)
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"{source} cannot be read as a CLIP tokenizer: {str(error) or type(error).__name__}",
            "It needs tokenizer.json, or vocab.json and merges.txt.",
        ) from error


def _check_ids(source: Path) -> None:
    """Refuse token ids that the library would make a table for, up to 17 GB, and die of."""
    tables: list[tuple[Path, Any]] = []
    if (path := source / "vocab.json").is_file():
        tables.append((path, _object_in(path)))
    if (path := source / "tokenizer.json").is_file():
        whole = _object_in(path)
        model, added = whole.get("model"), whole.get("added_tokens")
        tables.append((path, model.get("vocab") if isinstance(model, dict) else None))
        ids = [each.get("id") for each in added or () if isinstance(each, dict)]
        tables.append((path, dict(enumerate(ids))))
    for path, table in tables:
        for token, number in (table if isinstance(table, dict) else {}).items():
            if type(number) is not int or not 0 <= number < _LARGEST_VOCABULARY:
                raise CheckpointError(
                    f"{path}: token {token!r} has the id {str(number)[:40]!r}; expected a whole "
                    f"number below {_LARGEST_VOCABULARY:,}",
                    "Restore the tokenizer that belongs to this text encoder.",
                )


def _object_in(path: Path) -> dict[str, Any]:
    try:
        return read_object(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(
            f"{path.parent} cannot be read as a CLIP tokenizer: {path.name}: {first_line(error)}",
            "It needs tokenizer.json, or vocab.json and merges.txt.",
        ) from error


def tokenizer_of(source: Path, length: int, chunks: int = 1) -> Tokenizer:
    """The checkpoint's tokenizer giving the very ids that an exported bundle gives.

    `source` is the tokenizer's folder, `length` the text's: `chunks` times the text encoder's
    number of positions.
    """
    with temporary_folder() as folder:
        write_tokenizer(source, folder, length // chunks)
        return open_tokenizer(folder / "tokenizer.json", length, chunks)
