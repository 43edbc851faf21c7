"""Weights in a prompt: read and applied as Stable Diffusion web UI does, off unless asked for."""

from __future__ import annotations

import importlib
from pathlib import Path

import numpy as np
import pytest

from tiue_export import Pipeline
from tiue_export.drawing.picture import parameters_from_png
from tiue_export.drawing.pipeline import Job
from tiue_export.drawing.prompt_weights import (
    parse_weights,
    weighted_text,
    weighted_tokens,
    without_weights,
)
from tiue_export.errors import UsageError
from tiue_export.sampling.noise import noise_from_seed

PROMPT = "a (red:1.5) fox, [snow]"
WORDS = "a red fox, snow"

# The examples of parse_prompt_attention in web UI's modules/prompt_parser.py, and further ones.
READ = {
    "normal text": [("normal text", 1.0)],
    "an (important) word": [("an ", 1.0), ("important", 1.1), (" word", 1.0)],
    "(unbalanced": [("unbalanced", 1.1)],
    "\\(literal\\]": [("(literal]", 1.0)],
    "(unnecessary)(parens)": [("unnecessaryparens", 1.1)],
    "a (((house:1.3)) [on] a (hill:0.5), sun, (((sky))).": [
        ("a ", 1.0),
        ("house", 1.573),
        (" ", 1.1),
        ("on", 1.0),
        (" a ", 1.1),
        ("hill", 0.55),
        (", sun, ", 1.1),
        ("sky", 1.4641),
        (".", 1.1),
    ],
    "": [],
    "12:30, a) b] c:2)": [("12:30, a) b] c:2)", 1.0)],
    "(a: .5)": [("a", 0.5)],
    "(a:-1)": [("a", -1.0)],
    "(a:1.2.3)": [("a:1.2.3", 1.1)],
    "a\\b \\\\ \\": [("a\\b \\ \\", 1.0)],
    "(a\nb)": [("a\nb", 1.1)],
}


@pytest.mark.parametrize("prompt", READ)
def test_a_prompt_is_read_as_web_ui_reads_it(prompt):
    read = parse_weights(prompt)
    assert [text for text, _ in read] == [text for text, _ in READ[prompt]]
    assert [weight for _, weight in read] == pytest.approx([w for _, w in READ[prompt]])
    assert without_weights(prompt) == "".join(text for text, _ in READ[prompt])


@pytest.mark.parametrize("prompt", ["(a:21)", "(a:-99)", "(" * 40 + "a", "(" * 9_000 + "a"])
def test_a_weight_beyond_all_sense_is_refused(prompt):
    with pytest.raises(UsageError, match="expected at most 20"):
        parse_weights(prompt)


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with Pipeline.open(tiny_bundle) as pipeline:
        yield pipeline


def test_the_tokens_are_those_of_the_words_each_with_its_weight(pipeline):
    tokens, weights = weighted_tokens(pipeline.tokenizer, [PROMPT, WORDS])
    assert tokens[0].tolist() == tokens[1].tolist() == pipeline.tokenizer([WORDS])[0].tolist()
    assert (weights[1] == 1).all()
    red, snow = (pipeline.tokenizer.words(word) for word in ("red", "snow"))
    heavy, light = (tokens[0, weights[0] == w].tolist() for w in np.float32([1.5, 1 / 1.1]))
    assert (heavy, light) == (red, snow)
    assert (weights[0] == 1).sum() == 77 - len(red) - len(snow)


def test_a_long_prompt_with_weights_is_cut_like_one_without(pipeline):
    tokens, weights = weighted_tokens(pipeline.tokenizer, ["(fox:2) " + "fox " * 200])
    assert tokens[0].tolist() == pipeline.tokenizer(["fox " * 200])[0].tolist()
    assert np.count_nonzero(weights == 2) == len(pipeline.tokenizer.words("fox"))


def test_weights_multiply_the_words_and_leave_the_mean():
    rng = np.random.RandomState(0)
    text = rng.randn(2, 77, 32).astype(np.float16)
    weights = np.ones((2, 77), np.float32)
    weights[0, 2:4] = 1.5, 0.5
    weighted = weighted_text(text, weights)
    assert weighted.dtype == np.float16
    np.testing.assert_array_equal(weighted[1], text[1])
    assert weighted[0].astype(float).mean() == pytest.approx(text[0].astype(float).mean(), rel=2e-3)
    ratio = weighted[0].astype(float) / text[0].astype(float)
    np.testing.assert_allclose(ratio[2] / ratio[0], 1.5, rtol=0.01)
    np.testing.assert_allclose(ratio[3] / ratio[0], 0.5, rtol=0.01)


def test_a_picture_is_drawn_from_the_weighted_words(pipeline):
    drawn = pipeline(PROMPT, seed=3, prompt_weights=True).pictures[0]
    _, weights = weighted_tokens(pipeline.tokenizer, [PROMPT])
    text = weighted_text(pipeline.embed([WORDS]), weights)
    noise = noise_from_seed(3, (1, 4, 8, 8))
    np.testing.assert_array_equal(drawn.latents, pipeline.latents_from_noise(noise, text)[0])
    assert drawn.parameters["prompt_weights"] is True
    plain = pipeline(WORDS, seed=3).pictures[0]
    assert not np.allclose(drawn.latents, plain.latents, atol=1e-3)
    without_any = pipeline(WORDS, seed=3, prompt_weights=True).pictures[0]
    np.testing.assert_array_equal(without_any.latents, plain.latents)


def test_brackets_are_letters_unless_asked(pipeline):
    asked, plain = (
        pipeline.draw([Job("(fox)", 0, weighted=weighted)]).pictures[0]
        for weighted in (True, False)
    )
    assert not np.allclose(asked.latents, plain.latents, atol=1e-3)
    assert "prompt_weights" not in plain.parameters


def test_a_weight_that_is_refused_is_refused_before_anything_is_drawn(pipeline):
    drawn = []
    with pytest.raises(UsageError, match="expected at most 20"):
        pipeline(["a fox", "(a:99)"], prompt_weights=True, on_picture=drawn.append)
    assert drawn == []


def test_a_negative_prompt_has_weights_too(faster_bundle):
    with Pipeline.open(faster_bundle) as pipeline:
        heavy, plain = (
            pipeline("a fox", negative_prompt=text, prompt_weights=True).pictures[0].latents
            for text in ("(red:1.9) owl", "red owl")
        )
    assert not np.allclose(heavy, plain, atol=1e-3)


def test_generate_reads_weights_where_it_is_asked_to(run, tiny_bundle):
    line = ("generate", tiny_bundle.root, PROMPT, "--out", "fox.png")
    code, _, err = run(*line, "--prompt-weights")
    assert code == 0, err
    assert parameters_from_png(Path("fox.png"))["prompt_weights"] is True
    code, _, err = run(*line)
    assert (code, "its prompt_weights is True, here none" in err) == (2, True)


def test_a_table_is_drawn_with_weights_and_is_then_another_run():
    plan = importlib.import_module("tiue_export.apps.draw.bulk.plan")
    table = importlib.import_module("tiue_export.apps.draw.bulk.prompt_table")
    rows = [table.PromptRow("a", PROMPT, None, {})]
    plans = [plan.BulkPlan(plan.plan_jobs(rows, 1, 0, "", None, w), 8, 8) for w in (False, True)]
    assert [each.jobs[0].job.weighted for each in plans] == [False, True]
    assert plans[0].sha256() != plans[1].sha256()
    with pytest.raises(UsageError, match="expected at most 20"):
        plan.plan_jobs([table.PromptRow("a", "(a:99)", None, {})], 1, 0, weighted=True)
