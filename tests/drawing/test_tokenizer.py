"""The bundle's torch-free tokenizer: the same ids as transformers, whatever is typed."""

from __future__ import annotations

import itertools
import json
import shutil
from pathlib import Path
from typing import NamedTuple

import numpy as np
import pytest
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from transformers import CLIPTokenizer

from tiue_export.benchmarks.synthetic import PROMPT_WORDS
from tiue_export.benchmarks.vocabulary import write_tokenizer as train_tokenizer
from tiue_export.checkpoint.tokenizer_files import write_tokenizer
from tiue_export.drawing.tokenizer import Tokenizer, open_tokenizer
from tiue_export.errors import BundleError, CheckpointError, TiueError

LENGTH = 77
BOS, EOS, BANG = 1022, 1023, 0
WIDTHS = {"sd15": 768, "sd21": 1024}
PADS = {"sd15": EOS, "sd21": BANG}
SETTINGS = settings(
    database=None,
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.function_scoped_fixture],
)
NASTY = {
    "empty": "",
    "space": " ",
    "spaces": " \t \n ",
    "plain": "a red fox in fresh snow",
    "emoji": "a 🦊 and 👩‍👩‍👧‍👦 🏳️‍🌈 🇺🇦",
    "cjk": "雪の中の赤い狐、写真",
    "arabic": "ثعلب أحمر في الثلج",
    "500 words": "a red fox " * 167,
    "newlines": "a red\nfox\r\nin\tthe\u00a0snow\u2028now",
    "control": "a\x00red\x07fox\x1b[31m\x7f\u200b\ufeff",
    "html": "<b>a red</b> fox &amp; <br/> &#39;snow&#39;",
    "3000 letters": "A" * 3000,
    "mixed case": "A ReD FOX İstanbul STRASSE ẞ ǅ",
    "accents": "e\u0301 é n\u0303 ñ Å Å ﬁ ½ Z\u0351\u036b\u0343",
    "end inside": "a red<|endoftext|>fox",
    "start inside": "<|startoftext|>a fox<|startoftext|><|endoftext|>",
    "almost special": "<|endoftext| > <|END|> <|EndOfText|>",
    "bangs": "wow! a fox!! !",
    "punctuation": "don't, can't: f/1.8 (((masterpiece))) [x] #1 @me 100% $5 a_b-c",
    "digits": "1234567890 ½ ² ٣ Ⅷ",
    "exactly full": "a " * 75,
    "one too many": "a " * 76,
}


class Pair(NamedTuple):
    source: Path
    folder: Path
    ours: Tokenizer
    theirs: CLIPTokenizer
    pad_id: int

    def expected(self, prompt: str) -> list[int]:
        kind = {"padding": "max_length", "truncation": True, "max_length": LENGTH}
        return self.theirs(prompt, **kind).input_ids


@pytest.fixture(scope="module", params=["sd15", "sd21"])
def pair(request, tmp_path_factory) -> Pair:
    """Our tokenizer beside transformers' own, in both padding conventions."""
    folder = tmp_path_factory.mktemp(request.param)
    config = {
        "bos_token_id": BOS,
        "eos_token_id": EOS,
        "max_position_embeddings": LENGTH,
        "hidden_size": WIDTHS[request.param],
    }
    of_openclip = request.param == "sd21"
    shape = {**config, "vocab_size": 1024}
    train_tokenizer(folder / "source", [PROMPT_WORDS], shape, of_openclip=of_openclip)
    write_tokenizer(folder / "source", folder / "written", LENGTH)
    return Pair(
        folder / "source",
        folder / "written",
        open_tokenizer(folder / "written" / "tokenizer.json", LENGTH),
        CLIPTokenizer.from_pretrained(folder / "source", local_files_only=True),
        PADS[request.param],
    )


@pytest.mark.parametrize("prompt", NASTY.values(), ids=NASTY.keys())
def test_nasty_prompts_get_the_ids_of_transformers(pair, prompt):
    ids = pair.ours([prompt])
    assert (ids.dtype, ids.shape) == (np.int64, (1, LENGTH))
    assert ids[0].tolist() == pair.expected(prompt)


@settings(SETTINGS, max_examples=500)
@given(st.text())
@example("<|endoftext|>" * 100)
@example("!" * 100)
def test_any_text_gets_the_ids_of_transformers(pair, prompt):
    assert pair.ours([prompt])[0].tolist() == pair.expected(prompt)


@SETTINGS
@given(st.lists(st.sampled_from(list(NASTY.values())), max_size=5))
def test_a_batch_is_its_prompts_one_by_one(pair, prompts):
    ids = pair.ours(prompts)
    assert ids.shape == (len(prompts), LENGTH)
    assert ids.tolist() == [pair.ours([prompt])[0].tolist() for prompt in prompts]


def test_the_empty_prompt_is_start_end_and_the_familys_padding(pair):
    assert pair.ours([""])[0].tolist() == [BOS, EOS, *[pair.pad_id] * (LENGTH - 2)]


def test_a_cut_prompt_still_ends_with_end_of_text(pair):
    ids = pair.ours([NASTY["500 words"]])[0]
    assert (ids[0], ids[-1]) == (BOS, EOS)
    assert not np.isin(ids[1:-1], [BOS, EOS, pair.pad_id]).any()


def test_case_and_runs_of_space_do_not_matter(pair):
    plain = pair.ours(["a red fox"]).tolist()
    assert pair.ours(["  A RED \t\n Fox  "]).tolist() == plain


def merged(word: str, ranks: dict[tuple[str, str], int]) -> list[str]:
    """Byte-pair encoding as OpenAI's simple_tokenizer.py does it, for ASCII letters."""
    pieces = [*word[:-1], word[-1] + "</w>"]
    while len(pieces) > 1:
        best = min(itertools.pairwise(pieces), key=lambda p: ranks.get(p, len(ranks)))
        if best not in ranks:
            break
        joined = []
        while pieces:
            take = 2 if tuple(pieces[:2]) == best else 1
            joined.append("".join(pieces[:take]))
            pieces = pieces[take:]
        pieces = joined
    return pieces


@SETTINGS
@given(st.text("abcdefghijklmnopqrstuvwxyz", min_size=1, max_size=20))
@example("astronaut")
@example("foxfoxfox")
def test_vocabulary_and_merges_alone_give_a_plain_reader_the_same_ids(pair, word):
    vocabulary = json.loads((pair.folder / "vocab.json").read_text("utf-8"))
    lines = (pair.folder / "merges.txt").read_text("utf-8").splitlines()[1:]
    ranks = {tuple(line.split()): rank for rank, line in enumerate(lines)}
    ids = [vocabulary[piece] for piece in merged(word, ranks)]
    assert pair.ours([word])[0].tolist()[: len(ids) + 2] == [BOS, *ids, EOS]


def test_transformers_reads_vocabulary_and_merges_back_to_the_same_ids(pair, tmp_path):
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(pair.folder / name, tmp_path / name)
    plain = CLIPTokenizer.from_pretrained(tmp_path, local_files_only=True)
    for prompt in NASTY.values():
        ids = plain(prompt, padding="max_length", truncation=True, max_length=LENGTH).input_ids
        assert ids == pair.ours([prompt])[0].tolist()


def test_transformers_reads_the_written_folder_to_the_same_ids(pair):
    whole = CLIPTokenizer.from_pretrained(pair.folder, local_files_only=True)
    assert whole.model_max_length == LENGTH
    for prompt in NASTY.values():
        ids = whole(prompt, padding="max_length", truncation=True).input_ids
        assert ids == pair.ours([prompt])[0].tolist()


def test_vocabulary_and_merges_are_those_of_the_checkpoint(pair):
    ours, theirs = ((f / "vocab.json").read_text("utf-8") for f in (pair.folder, pair.source))
    assert json.loads(ours) == json.loads(theirs)
    ours, theirs = ((f / "merges.txt").read_text("utf-8") for f in (pair.folder, pair.source))
    assert ours == theirs


def test_the_written_tokenizer_can_be_written_again_unchanged(pair, tmp_path):
    write_tokenizer(pair.folder, tmp_path, LENGTH)
    for path in pair.folder.iterdir():
        assert (tmp_path / path.name).read_bytes() == path.read_bytes()


@SETTINGS
@given(st.one_of(st.text(), st.sampled_from(list(NASTY.values()))))
def test_the_words_are_those_of_the_whole_prompt_without_start_and_end(pair, prompt):
    assert pair.ours.words(prompt) == pair.theirs(prompt).input_ids[1:-1]


@pytest.mark.parametrize("words", [0, 1, 74, 75, 76, 150, 151, 5000])
def test_every_word_of_a_long_prompt_is_counted(pair, words):
    assert len(pair.ours.words("fox " * words)) == words


def test_the_bundle_of_an_export_tokenises_as_its_checkpoint_does(tiny_bundle, tiny_pipeline):
    ours = open_tokenizer(tiny_bundle.root / "tokenizer" / "tokenizer.json", LENGTH)
    theirs = CLIPTokenizer.from_pretrained(tiny_pipeline / "tokenizer", local_files_only=True)
    for prompt in NASTY.values():
        ids = theirs(prompt, padding="max_length", truncation=True, max_length=LENGTH).input_ids
        assert ours([prompt])[0].tolist() == ids


def test_a_prompt_that_is_no_valid_unicode_is_refused_as_such(pair):
    with pytest.raises(TiueError):
        pair.ours([b"caf\xe9".decode("utf-8", "surrogateescape")])


def test_a_missing_tokenizer_is_explained(tmp_path):
    with pytest.raises(BundleError) as caught:
        open_tokenizer(tmp_path / "tokenizer.json", LENGTH)
    assert caught.value.message == (
        "the bundle has no tokenizer.json: it was exported without a tokenizer"
    )
    assert "--base" in caught.value.next_step


@pytest.mark.parametrize("text", ["", "{", "[]", '{"model": {"type": "BPE"}}', "\x00"])
def test_a_corrupt_tokenizer_cannot_be_read(tmp_path, text):
    path = tmp_path / "tokenizer.json"
    path.write_text(text)
    with pytest.raises(BundleError) as caught:
        open_tokenizer(path, LENGTH)
    assert caught.value.message.startswith(f"{path} cannot be read as a tokenizer: ")


def test_a_tokenizer_of_another_length_is_refused_naming_both(pair):
    path = pair.folder / "tokenizer.json"
    with pytest.raises(BundleError) as caught:
        open_tokenizer(path, 64)
    assert caught.value.message == (
        f"{path} pads to 77 and cuts at 77; the text encoder takes 64 tokens"
    )


def test_a_tokenizer_that_neither_pads_nor_cuts_is_refused(pair, tmp_path):
    data = json.loads((pair.folder / "tokenizer.json").read_text("utf-8"))
    path = tmp_path / "tokenizer.json"
    path.write_text(json.dumps({**data, "padding": None, "truncation": None}), "utf-8")
    with pytest.raises(BundleError) as caught:
        open_tokenizer(path, LENGTH)
    assert caught.value.message == (
        f"{path} pads to None and cuts at None; the text encoder takes 77 tokens"
    )


def test_a_shorter_length_is_written_and_kept(pair, tmp_path):
    write_tokenizer(pair.source, tmp_path, 16)
    ours = open_tokenizer(tmp_path / "tokenizer.json", 16)
    for prompt in NASTY.values():
        ids = pair.theirs(prompt, padding="max_length", truncation=True, max_length=16).input_ids
        assert ours([prompt]).tolist() == [ids]


@pytest.mark.parametrize(
    "damage",
    [
        lambda folder: [path.unlink() for path in folder.iterdir()],
        lambda folder: [(folder / name).unlink() for name in ("vocab.json", "merges.txt")],
        lambda folder: (folder / "vocab.json").unlink(),
        lambda folder: (folder / "merges.txt").unlink(),
        lambda folder: (folder / "vocab.json").write_text("{"),
        lambda folder: (folder / "merges.txt").write_text("no such pair here"),
    ],
    ids=[
        "empty folder",
        "configuration only",
        "no vocabulary",
        "no merges",
        "cut vocabulary",
        "foreign merges",
    ],
)
def test_a_checkpoint_without_a_sound_tokenizer_is_refused(pair, tmp_path, damage):
    source = Path(shutil.copytree(pair.source, tmp_path / "source"))
    damage(source)
    with pytest.raises(CheckpointError) as caught:
        write_tokenizer(source, tmp_path / "written", LENGTH)
    assert caught.value.message.startswith(f"{source} cannot be read as a CLIP tokenizer: ")
    assert "vocab.json and merges.txt" in caught.value.next_step
