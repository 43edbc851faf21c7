"""A plan agrees with itself or says why not; what is cut or merged still means the same."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from plan_cases import plans

from tiue_export.checkpoint.family import load_family
from tiue_export.errors import UsageError
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.plan import Combination, Pass, Plan, check_guidance, single_pass
from tiue_export.sampling.sampler import combined, pieces, sample
from tiue_export.specs import UNET_DECODER, UNET_ENCODER

SD = load_family("tiny").scheduler
START = Pass(900, (900, 600), Combination(1.0))
SECOND = Pass(300, (300,), Combination(0.5, (1.0, 2.0), (0.25,)))
LOOP = Plan("hand", 3, (START, SECOND), Combination(0.1, (1.0, 2.0, 3.0), (4.0, 5.0)), "epsilon")


@given(plans())
def test_a_drawn_plan_counts_its_rows_noises_and_passes_right(plan):
    assert plan.problem() is None
    assert plan.rows == len(plan.timesteps) == sum(one.rows for one in plan.passes)
    assert [plan.timesteps[row] for row in plan.key_steps] == [
        one.timesteps[0] for one in plan.passes
    ]
    assert plan.noises == 1 + max(len(one.fresh) for one in inputs(plan))
    assert plan.copies == (1 if plan.guidance is None else 2)
    if plan.one_pass:
        assert (plan.noises, plan.copies, plan.key_steps) == (1, 1, (0,))


def inputs(plan: Plan) -> list[Combination]:
    return [*(one.input for one in plan.passes), plan.latents]


@given(st.integers(2, 50), st.floats(0, 3))
def test_a_students_plan_agrees_with_itself_whatever_rows_merge(steps, below):
    plan = one_pass_plan(SD, steps)
    merged = plan.merged(below)
    assert plan.problem() is merged.problem() is None
    assert sorted((*merged.timesteps, *merged.merged_timesteps), reverse=True) == list(
        plan.timesteps
    )
    assert merged.timesteps[0] == plan.timesteps[0]
    assert sum(merged.latents.outputs) == pytest.approx(sum(plan.latents.outputs))
    assert merged.steps == steps
    assert merged.merged(0) == merged


@pytest.mark.parametrize("below", [-0.1, float("nan"), float("inf")])
def test_a_merge_threshold_that_is_no_size_is_refused(below):
    with pytest.raises(UsageError, match=r"--merge-below is .*; expected 0 or more"):
        one_pass_plan(SD, 4).merged(below)


def test_rows_of_several_passes_never_merge():
    assert LOOP.merged(0) == LOOP
    with pytest.raises(UsageError) as caught:
        LOOP.merged(0.02)
    assert caught.value.next_step == "Leave --merge-below out."


def single(**changes) -> Plan:
    plan = single_pass("hand", 2, (900, 600), Combination(1.0, (2.0, 3.0)), "epsilon")
    return replace(plan, **changes)


@pytest.mark.parametrize(
    ("plan", "problem"),
    [
        (replace(LOOP, passes=()), "it has no pass"),
        (
            replace(LOOP, passes=(replace(START, timesteps=()), SECOND)),
            "pass 0 has no timestep",
        ),
        (replace(LOOP, passes=(SECOND, START)), "pass 0 starts at row 2; expected 0"),
        (
            replace(LOOP, passes=(START, replace(SECOND, input=Combination(1.0, (1.0,))))),
            "pass 1 starts at row 1; expected 2",
        ),
        (
            replace(LOOP, passes=(*LOOP.passes, Pass(1, (1,), Combination(1.0, (1.0,) * 3)))),
            "pass 2 knows 0 fresh noises; expected 1",
        ),
        (
            replace(LOOP, latents=Combination(0.1, (1.0, 2.0), (4.0,))),
            "the latents have 2 coefficients for 3 rows",
        ),
        (
            replace(LOOP, latents=Combination(0.1, (1.0, 2.0, 3.0))),
            "the latents know 0 fresh noises; expected 1",
        ),
        (
            single(passes=(replace(START, encoder_timestep=899),)),
            "its only pass does not start at its first timestep",
        ),
    ],
)
def test_each_contradiction_is_named(plan, problem):
    assert plan.problem() == problem


def test_the_plans_that_contradictions_are_planted_in_have_none():
    assert LOOP.problem() is single().problem() is None


@given(plans(), st.data())
def test_any_lost_or_added_coefficient_is_noticed(plan, data):
    number = data.draw(st.integers(0, len(plan.passes)))
    terms = inputs(plan)[number]
    change = data.draw(st.sampled_from([(*terms.outputs, 1.0), terms.outputs[:-1]]))
    assume(change != terms.outputs)
    wrong = replace(terms, outputs=change)
    if number == len(plan.passes):
        changed = replace(plan, latents=wrong)
    else:
        passes = list(plan.passes)
        passes[number] = replace(passes[number], input=wrong)
        changed = replace(plan, passes=tuple(passes))
    assert changed.problem() is not None


@given(plans(), st.none() | st.integers(1, 8), st.integers(1, 4))
def test_a_bounded_plan_never_decodes_more_rows_and_leaves_no_step_out(plan, steps, batch):
    rows_per_step = plan.copies * batch
    assume(plan.max_decoder_rows is None or plan.max_decoder_rows >= rows_per_step)
    bounded = plan.bounded(steps, rows_per_step)
    assert replace(bounded, max_decoder_rows=plan.max_decoder_rows) == plan
    for one in bounded.passes:
        runs = list(pieces(one, bounded.max_decoder_rows, rows_per_step))
        assert tuple(float(t) for run in runs for t in run) == one.timesteps
        longest = max(map(len, runs))
        assert steps is None or longest <= steps
        assert plan.max_decoder_rows is None or longest * rows_per_step <= plan.max_decoder_rows


@pytest.mark.parametrize(
    ("plan", "open_rows"),
    [
        (LOOP, True),
        (replace(LOOP, passes=(replace(START, timesteps=(900,)), SECOND)), False),
        (replace(LOOP, passes=(replace(START, timesteps=(900,)), SECOND), guidance=7.5), True),
    ],
)
def test_only_a_student_of_single_rows_has_a_closed_axis(plan, open_rows):
    assert plan.open_rows is open_rows


@pytest.mark.parametrize("scale", [0.99, 1000.1, float("nan"), float("inf")])
def test_guidance_beyond_its_range_is_refused(scale):
    with pytest.raises(UsageError, match=r"expected 1 \(off\) to 1000, usually 7\.5"):
        check_guidance(scale)


# The loop, with a network that is a formula


def a_network(log: list[tuple[str, dict]]):
    """A network whose output is 10 * features + timestep + text; its features are the sample."""

    def run(name: str, pool):
        log.append((name, pool))
        if name == UNET_ENCODER:
            return {"mid_sample": pool["sample"]}
        rows = [10 * pool["mid_sample"] + t + pool["encoder_hidden_states"].mean()
                for t in pool["timesteps"]]  # fmt: skip
        return {"outputs": np.concatenate(rows).astype(np.float32)}

    return run


@pytest.mark.parametrize("max_rows", [None, 2])
def test_a_loop_without_guidance_feeds_every_pass_its_own_combination(max_rows):
    plan, log = replace(LOOP, max_decoder_rows=max_rows), []
    noises = np.random.RandomState(0).standard_normal((3, 2, 4, 2, 2)).astype(np.float32)
    text = np.full((2, 3, 5), 7.0, np.float32)
    latents = sample(plan, a_network(log), noises, text)
    first = noises[0].astype(np.float64)
    rows = [10 * first + 900 + 7, 10 * first + 600 + 7]
    second = 0.5 * first + 1.0 * rows[0] + 2.0 * rows[1] + 0.25 * noises[1]
    rows.append(10 * second + 300 + 7)
    expected = 0.1 * first + rows[0] + 2 * rows[1] + 3 * rows[2] + 4 * noises[1] + 5 * noises[2]
    np.testing.assert_allclose(latents, expected, rtol=1e-5)
    encoders = [pool for name, pool in log if name == UNET_ENCODER]
    assert [pool["timestep"].tolist() for pool in encoders] == [[900], [300]]
    np.testing.assert_allclose(encoders[1]["sample"], second, rtol=1e-5)
    assert sum(name == UNET_DECODER for name, _ in log) == (2 if max_rows is None else 3)


def test_the_encoder_runs_at_its_own_timestep_even_where_no_row_does():
    """Reusing features of another timestep is data of the plan, not of the loop."""
    log = []
    plan = replace(LOOP, passes=(replace(START, encoder_timestep=950), SECOND))
    assert plan.problem() is None
    sample(plan, a_network(log), np.zeros((3, 1, 4, 2, 2), np.float32), np.zeros((1, 3, 5)))
    assert log[0][1]["timestep"].tolist() == [950]


def test_a_combination_takes_only_the_noises_and_outputs_it_has_weights_for():
    noises = np.stack([np.full((1, 2), value, np.float32) for value in (1, 10, np.nan)])
    outputs = np.full((2, 1, 2), np.nan, np.float32)
    outputs[0] = 100
    terms = Combination(2.0, (3.0,), (4.0,))
    np.testing.assert_array_equal(combined(terms, noises, outputs), [[342, 342]])


def test_a_row_that_is_not_computed_yet_spoils_nothing_under_the_weight_zero():
    outputs = np.array([[[np.nan]], [[5.0]]], np.float32)
    terms = Combination(1.0, (0.0, 2.0))
    np.testing.assert_array_equal(combined(terms, np.ones((1, 1, 1), np.float32), outputs), [[11]])
