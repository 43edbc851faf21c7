"""The vocabulary's trainer: merges worked out by hand, and the same files from every process."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiue_export.benchmarks.vocabulary import learn_merges, write_tokenizer
from tiue_export.checkpoint.family import load_family
from tiue_export.checkpoint.tokenizer_files import tokenizer_of

WORDS = st.text(st.sampled_from("abc"), min_size=1, max_size=6)
LIMITED = settings(max_examples=50, database=None, deadline=None)


def digests(folder: Path) -> dict[str, str]:
    return {
        file.relative_to(folder).as_posix(): hashlib.sha256(file.read_bytes()).hexdigest()
        for file in sorted(folder.rglob("*"))
        if file.is_file()
    }


def in_another_process(code: str, *arguments: object) -> None:
    """Run `code` where strings hash otherwise than here."""
    subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        env={**os.environ, "PYTHONHASHSEED": "4711"},
        check=True,
    )


# Merges


def test_the_merges_of_a_small_text_are_those_worked_out_by_hand():
    # Words: low x3, lower x2, new x1; "</w>" marks the last letter.
    #   l-o 5, o-w</w> 3, o-w 2, w-e 2, e-r</w> 2, n-e 1, e-w</w> 1        -> l o
    #   lo-w</w> 3, lo-w 2, w-e 2, e-r</w> 2, ...                          -> lo w</w>
    #   e-r</w> 2, lo-w 2, w-e 2: the alphabetically first of three equals -> e r</w>
    #   lo-w 2, w-er</w> 2                                                 -> lo w
    #   low-er</w> 2                                                       -> low er</w>
    #   e-w</w> 1, n-e 1                                                   -> e w</w>
    merges = learn_merges(["low low low", "Lower lower", "new"], 6)
    expected = ["l o", "lo w</w>", "e r</w>", "lo w", "low er</w>", "e w</w>"]
    assert [" ".join(pair) for pair in merges] == expected


def test_a_pair_inside_a_word_is_merged_from_the_left():
    # aaaa: a-a 2, a-a</w> 1 -> a a, giving aa-a-a</w>; then a-a</w> before aa-a.
    merges = learn_merges(["aaaa"], 3)
    assert [" ".join(pair) for pair in merges] == ["a a", "a a</w>", "aa aa</w>"]


def test_a_text_without_pairs_left_ends_the_learning():
    assert learn_merges(["ab", "c"], 100) == [("a", "b</w>")]
    assert learn_merges([], 100) == []
    assert learn_merges(["ab"], 0) == []


def test_letters_beyond_ascii_are_merged_as_bytes():
    # "é" is the bytes C3 A9, which the byte-level alphabet writes as two letters.
    assert learn_merges(["é é"], 1) == [("Ã", "©</w>")]


@given(st.lists(WORDS, max_size=8), st.integers(0, 12))
@LIMITED
def test_the_merges_do_not_depend_on_the_order_or_the_cut_of_the_texts(words, count):
    merges = learn_merges(words, count)
    assert learn_merges(words[::-1], count) == merges
    assert learn_merges([" ".join(words)], count) == merges
    assert learn_merges(words, count + 3)[: len(merges)] == merges


@given(st.lists(WORDS, min_size=1, max_size=8))
@LIMITED
def test_with_merges_enough_every_word_is_one_piece(words):
    merged = {"".join(pair) for pair in learn_merges(words, 1000)}
    assert {f"{word}</w>" for word in words if len(word) > 1} <= merged


# Files


def test_equal_texts_give_equal_files_in_another_process(tmp_path):
    config = load_family("tiny").text_encoder
    texts = ["a red fox", "a red fix", "an owl over an oak", "a café", "don't"]
    write_tokenizer(tmp_path / "here", texts, config)
    code = (
        "import json, sys; from pathlib import Path\n"
        "from tiue_export.benchmarks.vocabulary import write_tokenizer\n"
        "write_tokenizer(Path(sys.argv[1]), json.loads(sys.argv[2]), json.loads(sys.argv[3]))"
    )
    there = tmp_path / "there"
    in_another_process(code, there, json.dumps(texts), json.dumps(config))
    assert set(digests(there)) == {"vocab.json", "merges.txt", "tokenizer_config.json"}
    assert digests(there) == digests(tmp_path / "here")


@pytest.mark.slow
def test_a_synthetic_pipeline_is_the_same_bytes_in_another_process(tiny_pipeline, tmp_path):
    code = (
        "import sys; from pathlib import Path\n"
        "from tiue_export.benchmarks.synthetic import write_synthetic_pipeline\n"
        "write_synthetic_pipeline(Path(sys.argv[1]), 'tiny')"
    )
    in_another_process(code, tmp_path / "there")
    here = digests(tiny_pipeline)
    assert "unet/diffusion_pytorch_model.safetensors" in here
    assert digests(tmp_path / "there") == here


def test_words_of_the_text_become_single_tokens_between_start_and_end(tmp_path):
    config = load_family("tiny").text_encoder
    write_tokenizer(tmp_path / "t", ["a red fox", "a red owl"], config)
    tokenizer = tokenizer_of(tmp_path / "t", config["max_position_embeddings"])
    vocabulary = json.loads((tmp_path / "t" / "vocab.json").read_text("utf-8"))
    ids = tokenizer(["A red OWL"])[0].tolist()
    words = [vocabulary[f"{word}</w>"] for word in ("a", "red", "owl")]
    assert ids[:5] == [config["bos_token_id"], *words, config["eos_token_id"]]
    assert len(ids) == config["max_position_embeddings"]


@pytest.mark.parametrize(
    ("family", "of_openclip", "pad"),
    [("sd21-base", True, "!"), ("sd15", False, "<|endoftext|>")],
)
def test_openclip_pads_with_an_exclamation_mark(family, of_openclip, pad, tmp_path):
    config = load_family(family).text_encoder
    write_tokenizer(tmp_path / "t", ["an owl"], config, of_openclip=of_openclip)
    written = json.loads((tmp_path / "t" / "tokenizer_config.json").read_text("utf-8"))
    assert written["pad_token"] == pad
    ids = tokenizer_of(tmp_path / "t", 77)(["an owl"])[0].tolist()
    vocabulary = json.loads((tmp_path / "t" / "vocab.json").read_text("utf-8"))
    assert ids[-1] == vocabulary[pad]
