"""Learned words put into a model: tokens with vectors of their own, layers that go with them."""

from __future__ import annotations

import hashlib
import re
import shlex
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tiue_export.bundle.manifest import Source
from tiue_export.bundle.read import file_record
from tiue_export.checkpoint.embedding_file import Embedding, ReplacedWeights, read_embedding
from tiue_export.checkpoint.tokenizer_files import write_with_tokens
from tiue_export.errors import UnsupportedModelError, UsageError
from tiue_export.student.model import Student
from tiue_export.student.paired_text_encoder import PairedTextEncoder
from tiue_export.system.owned_path import session_folder

_NOTE = re.compile(r"embedding (?P<file>.+) added(?: as (?P<token>\S+), \d+ vectors?)?")


def add_embedding(student: Student, path: Path, token: str | None = None) -> Student:
    """Put a file of textual inversion or Custom Diffusion into a model; returns the same, changed.

    `token` None: the file's own. Several vectors make the tokens "cat", "cat_1", ..., as diffusers
    has it; the tokenizer writes them out for "cat". Raises `UsageError` for a token that is taken
    and a model without text encoder, `UnsupportedModelError` for a file of another family.
    """
    read = read_embedding(path, token)
    digest = file_record(path).sha256
    note = f"embedding {path.name} added"
    source, parts = student.source, dict(student.source.part_sha256)
    if isinstance(read, Embedding):
        _add_words(student, read, path)
        count = len(read.vectors)
        note += f" as {read.token}, {count} vector{'s' * (count > 1)}"
        parts["text_encoder"] = _digest(parts["text_encoder"], digest, read.token)
    else:
        _replace_layers(student.unet, read, path)
        source = replace(source, sha256=_digest(source.sha256, digest))
    student.source = replace(source, part_sha256=parts, notes=(*source.notes, note))
    return student


def embedding_options(source: Source) -> tuple[str, ...]:
    """What was added to a model, in order, as one types it: "--embedding cat.safetensors:cat"."""
    added = (_NOTE.fullmatch(note) for note in source.notes)
    return tuple(
        f"--embedding {shlex.quote(':'.join(filter(None, (note['file'], note['token']))))}"
        for note in added
        if note
    )


def _digest(*words: str) -> str:
    return hashlib.sha256(" ".join(words).encode()).hexdigest()


@torch.no_grad()
def _add_words(student: Student, read: Embedding, path: Path) -> None:
    if student.text_encoder is None or student.tokenizer_folder is None:
        raise UsageError(
            f"{path} adds words to the text encoder, and the checkpoint has none",
            "Pass --base with the pipeline folder that has it.",
        )
    encoder, vectors = student.text_encoder, [read.vectors]
    encoders = [encoder]
    if isinstance(encoder, PairedTextEncoder):
        encoders = [encoder.first, encoder.second]
    if read.second is not None:
        vectors.append(read.second)
    widths = [int(each.get_input_embeddings().embedding_dim) for each in encoders]
    given = [int(each.shape[1]) for each in vectors]
    if given != widths:
        raise UnsupportedModelError(
            f"{path} is of another family: its vectors are {_and(given)} wide, this text "
            f"encoder's {_and(widths)}",
            "Stable Diffusion 1.x has 768, 2.x has 1024, XL has 768 and 1280: give one of this "
            "family.",
        )
    tokens = [read.token, *(f"{read.token}_{i}" for i in range(1, len(read.vectors)))]
    folder = session_folder()
    ids = write_with_tokens(student.tokenizer_folder, folder, tokens)
    for each, own in zip(encoders, vectors, strict=True):
        _extend_table(each, ids, own)
    student.tokenizer_folder = folder


def _and(numbers: list[int]) -> str:
    return " and ".join(map(str, numbers))


def _extend_table(encoder: Any, ids: list[int], vectors: Tensor) -> None:
    """Put vectors (N, D) at these ids of an encoder's table of tokens, made longer for them."""
    table = encoder.get_input_embeddings()
    length = max(len(table.weight), max(ids) + 1)
    weight = table.weight.new_zeros(length, table.embedding_dim)
    weight[: len(table.weight)] = table.weight
    weight[ids] = vectors.to(weight)
    table.weight, table.num_embeddings = nn.Parameter(weight, requires_grad=False), length
    encoder.config.vocab_size = length


@torch.no_grad()
def _replace_layers(unet: Any, read: ReplacedWeights, path: Path) -> None:
    own = dict(unet.named_parameters())
    for name, weight in read.weights.items():
        if name not in own or own[name].shape != weight.shape:
            shape = tuple(own[name].shape) if name in own else "not there"
            raise UnsupportedModelError(
                f"{path} is of another family: its {name} is {tuple(weight.shape)}, this model's "
                f"{shape}",
                "Give Custom Diffusion weights that were trained on this model's own family.",
            )
    for name, weight in read.weights.items():
        owner, _, kind = name.rpartition(".")
        parameter = nn.Parameter(weight.to(own[name]), requires_grad=False)
        setattr(unet.get_submodule(owner), kind, parameter)
