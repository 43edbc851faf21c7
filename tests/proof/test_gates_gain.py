"""Gates of half precision leave room for what a plan's own sum amplifies."""

from __future__ import annotations

import pytest

from tiue_export.bundle.manifest import ParityRecord
from tiue_export.checkpoint.family import load_family
from tiue_export.proof.gates import gain_db
from tiue_export.proof.parity import for_gain
from tiue_export.sampling.ddim import one_pass_plan
from tiue_export.sampling.few_step import FewStepOptions, few_step_plan
from tiue_export.sampling.recipes import recipe_named

SCHEDULER = load_family("sd21-base").scheduler
TIUE = one_pass_plan(SCHEDULER, 4)


def turbo(steps: int):
    """SD-Turbo in so many steps."""
    return few_step_plan(SCHEDULER, recipe_named("sd-turbo"), FewStepOptions(steps=steps))


def test_a_tiue_student_has_no_gain_and_one_step_of_turbo_has_fourteen_and_a_half_db():
    assert gain_db(TIUE) == pytest.approx(0, abs=0.01)
    assert gain_db(turbo(1)) == pytest.approx(14.55, abs=0.01)
    assert gain_db(turbo(4)) == 0  # its graphs give outputs, not their sum


@pytest.mark.parametrize(
    ("plan", "gate", "expected"),
    [(TIUE, 60.0, 60.0), (turbo(1), 60.0, 45.5), (turbo(1), 100.0, 100.0), (turbo(1), None, None)],
)
def test_only_gates_of_rounding_arithmetic_give_way(plan, gate, expected):
    record = ParityRecord("fp16", "latents", "psnr_db", 50.0, gate, 0.1, "noise")
    assert for_gain(record, plan).gate == expected
