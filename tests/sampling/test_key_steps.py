"""Key steps chosen by measurement: the choice is optimal, the measurement is what happens."""

from __future__ import annotations

import json
from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from teachers import load_teacher

from tiue_export.errors import UsageError
from tiue_export.methods.scheduler import plan_from_config
from tiue_export.reference.sharing_cost import (
    auto_options,
    deviation,
    every_step,
    group_losses,
    torch_model,
)
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.key_steps import choose_key_steps, cost_of, encoder_runs_within, loss_of

STEPS = 6
OPTIONS = FasterOptions(steps=STEPS, inject="off")


@pytest.fixture(scope="module")
def model(teacher_folder):
    """The tiny model, run by torch. Shared."""
    return torch_model(load_teacher(teacher_folder, options=OPTIONS))


@pytest.fixture(scope="module")
def losses(model):
    """Of one prompt, every group."""
    plain = every_step(model.teacher, OPTIONS)
    return group_losses(model, plain, 0, model.text("a red fox"), 7.5, STEPS)


def random_losses(seed: int, count: int) -> np.ndarray:
    random = np.random.RandomState(seed)
    losses = np.full((count + 1, count + 1), np.inf)
    for start in range(count):
        losses[start, start + 1 :] = np.cumsum(random.uniform(0, 1, count - start)) ** 2
    return losses


@settings(deadline=None)
@given(st.integers(0, 999), st.integers(1, 8), st.integers(1, 8))
def test_the_choice_is_the_best_of_all_lists(seed, count, runs):
    losses = random_losses(seed, count)
    choice = choose_key_steps(losses, min(runs, count))
    lists = [
        (0, *rest)
        for size in range(min(runs, count))
        for rest in combinations(range(1, count), size)
    ]
    assert choice.loss == pytest.approx(min(loss_of(losses, keys) for keys in lists))
    assert loss_of(losses, choice.key_steps) == pytest.approx(choice.loss)
    assert choice.key_steps[0] == 0
    assert len(choice.key_steps) <= runs


def test_groups_that_were_not_measured_are_not_chosen():
    losses = random_losses(0, 6)
    for start in range(6):
        losses[start, start + 3 :] = np.inf
    keys = choose_key_steps(losses, 4).key_steps
    assert max(np.diff([*keys, 6])) <= 2
    with pytest.raises(UsageError, match="2 encoder runs cannot cover 6 steps"):
        choose_key_steps(losses, 2)


@given(st.integers(1, 100), st.floats(0.05, 0.95), st.floats(0, 1))
def test_a_budget_is_kept_and_used_up(steps, share, part):
    least = cost_of(1, steps, share)
    budget = least + part * (1 - least)
    runs = encoder_runs_within(budget, steps, share)
    assert 1 <= runs <= steps
    assert cost_of(runs, steps, share) <= budget + 1e-6
    assert runs == steps or cost_of(runs + 1, steps, share) > budget - 1e-6


def test_the_published_key_steps_of_sd_cost_what_the_paper_says():
    assert cost_of(9, 50, 0.326) == pytest.approx(0.733, abs=1e-3)
    assert encoder_runs_within(0.733, 50, 0.3262) == 9


@pytest.mark.parametrize("budget", [0.5, 1.1, float("nan")])
def test_a_budget_that_no_plan_can_meet_is_refused(budget):
    with pytest.raises(UsageError, match=r"--budget is .*; expected 0\.681 .* to 1"):
        encoder_runs_within(budget, 50, 0.326)


def test_a_step_with_its_own_features_loses_nothing(losses):
    assert [losses[s, s + 1] for s in range(STEPS)] == [0.0] * STEPS
    assert np.isinf(losses[np.tril_indices(STEPS + 1)]).all()
    assert (losses[np.triu_indices(STEPS + 1, 2)][:-1] > 0).all()


@pytest.mark.parametrize("last", [1, 3, 4])
def test_the_loss_of_a_last_group_is_exactly_what_the_latents_are_off_by(model, losses, last):
    """No encoder runs after it, so nothing reacts to it."""
    text = model.text("a red fox")
    reference = model.latents(every_step(model.teacher, OPTIONS), 0, text, 7.5)
    keys = FasterOptions(steps=STEPS, inject="off", key_steps=tuple(range(last + 1)))
    plan = plan_from_config(model.teacher.scheduler_config, keys)
    found = deviation(reference, model.latents(plan, 0, text, 7.5))
    assert found == pytest.approx(losses[last, STEPS], rel=1e-3)


def test_the_loss_of_other_plans_is_predicted(model, losses):
    text = model.text("a red fox")
    reference = model.latents(every_step(model.teacher, OPTIONS), 0, text, 7.5)
    for keys in ((0,), (0, 2, 4), (0, 1, 3)):
        chosen = FasterOptions(steps=STEPS, inject="off", key_steps=keys)
        plan = plan_from_config(model.teacher.scheduler_config, chosen)
        found = deviation(reference, model.latents(plan, 0, text, 7.5))
        assert 0.5 < found / loss_of(losses, keys) < 1.5


def test_a_short_reach_measures_short_groups_the_same(model, losses):
    plain = every_step(model.teacher, OPTIONS)
    short = group_losses(model, plain, 0, model.text("a red fox"), 7.5, 2)
    for s in range(STEPS - 1):
        assert short[s, s + 2] == pytest.approx(losses[s, s + 2], rel=1e-3)
    assert np.isinf(short[0, 3])


def test_auto_fills_in_the_options_and_says_how(model):
    heard = []
    options = auto_options(
        model.teacher, OPTIONS, None, lambda done, total: heard.append((done, total))
    )
    assert options.key_steps[0] == 0
    assert options.chosen_by.startswith("auto, as many as published, 2 prompts, loss 0.")
    assert heard[0] == (1, 2 * STEPS)
    assert heard[-1] == (2 * STEPS, 2 * STEPS)


# The command line


def analyze(run, folder, *more):
    base = ("--ckpt", folder, "--steps", 4, "--count", 1, "--check", 1)
    return run("analyze", *base, *more)


def test_analyze_measures_draws_and_resumes(run, teacher_folder, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    code, out, _ = analyze(run, teacher_folder, "--out", "a", "--json")
    assert code == 0
    shown = json.loads(out)
    assert [c["name"] for c in shown["candidates"]] == ["published", "uniform:1", "chosen, 4 runs"]
    assert shown["candidates"][1]["deviation"] == [pytest.approx(0, abs=1e-5)]
    for plot in shown["plots"]:
        assert (tmp_path / plot).read_bytes()[:4] == b"\x89PNG"
    first = json.loads((tmp_path / "a" / "analysis.json").read_text("utf-8"))
    (prompt,) = first["prompts"]
    assert set(prompt["blocks"]) == {
        *(f"down_blocks.{i}" for i in range(3)), "mid_block", *(f"up_blocks.{i}" for i in range(3))
    }  # fmt: skip
    curves = prompt["blocks"]["mid_block"]
    assert (len(curves["change"]), len(curves["norm"])) == (3, 4)

    code, out, _ = analyze(run, teacher_folder, "--out", "a", "--budget", "0.85")
    assert code == 0
    assert "chosen, budget 0.85" in out
    again = json.loads((tmp_path / "a" / "analysis.json").read_text("utf-8"))
    assert again["prompts"] == first["prompts"]

    code, _, err = analyze(run, teacher_folder, "--out", "a", "--guidance", 3)
    assert code == 2
    assert "holds an analysis with another guidance" in err.replace("\n", " ")


@pytest.mark.parametrize(
    ("more", "message"),
    [
        (("--count", "0"), "--count is 0; expected 1 or more"),
        (("--reach", "0"), "--reach is 0; expected 1 or more"),
        (("--budget", "0.1"), "--budget is 0.1; expected"),
        (("--scheduler", "euler"), "scales the network's input"),
    ],
)
def test_analyze_refuses_what_cannot_be(run, teacher_folder, more, message):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    code, _, err = analyze(run, teacher_folder, *more)
    assert code in (2, 5)
    assert message in err.replace("\n", " ")


def test_a_file_that_is_no_analysis_is_refused(run, teacher_folder, tmp_path):
    pytest.importorskip("matplotlib", reason="matplotlib is not installed")
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "analysis.json").write_text("[]", "utf-8")
    code, _, err = analyze(run, teacher_folder, "--out", "a")
    assert code == 2
    assert "is no result of this analysis" in err.replace("\n", " ")


def test_a_budget_without_auto_is_refused(run, teacher_folder):
    code, _, err = run(
        "onnx", "--ckpt", teacher_folder, "--method", "faster", "--budget", "0.7", "--dry-run"
    )
    assert code == 2
    assert "--budget is for --key-steps auto" in err


def test_auto_on_the_command_line_shows_its_choice(run, teacher_folder):
    code, out, _ = run(
        "onnx", "--ckpt", teacher_folder, "--method", "faster", "--steps", 4,
        "--key-steps", "auto", "--budget", "0.9", "--dry-run", "--json",
    )  # fmt: skip
    assert code == 0
    assert len(json.loads(out)["key_steps"]) == 2
