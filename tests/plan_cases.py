"""Plans of every kind, drawn by hypothesis."""

from __future__ import annotations

from hypothesis import strategies as st

from tiue_export.sampling.plan import Combination, Injection, Pass, Plan

WEIGHT = st.floats(allow_nan=False, allow_infinity=False)
TIMESTEP = st.integers(0, 999) | st.floats(0, 1000, width=32)
NAME = st.text(max_size=12)


@st.composite
def combinations(draw, outputs: int, fresh: int) -> Combination:
    """Random weights of so many outputs and fresh noises."""
    return Combination(
        draw(WEIGHT),
        tuple(draw(WEIGHT) for _ in range(outputs)),
        tuple(draw(WEIGHT) for _ in range(fresh)),
    )


@st.composite
def plans(draw) -> Plan:
    """A plan of up to three passes that does not contradict itself."""
    sizes = draw(st.lists(st.integers(1, 3), min_size=1, max_size=3))
    guidance = draw(st.none() | st.floats(1, 1000))
    passes, rows, fresh = [], 0, 0
    for number, size in enumerate(sizes):
        timesteps = tuple(draw(TIMESTEP) for _ in range(size))
        fresh += draw(st.integers(0, 1)) if number else 0
        terms = draw(combinations(rows, fresh)) if number or guidance else Combination(1.0)
        passes.append(Pass(timesteps[0], timesteps, terms))
        rows += size
    return Plan(
        method=draw(NAME),
        steps=draw(st.integers(1, 50)),
        passes=tuple(passes),
        latents=draw(combinations(rows, fresh + draw(st.integers(0, 1)))),
        prediction_type=draw(NAME),
        scheduler=draw(NAME),
        timestep_spacing=draw(NAME),
        guidance=guidance,
        merged_timesteps=tuple(draw(st.lists(TIMESTEP, max_size=2))),
        injection=draw(st.none() | st.builds(Injection, WEIGHT, WEIGHT, NAME)),
        max_decoder_rows=draw(st.none() | st.integers(1, 64)),
        chosen_by=draw(NAME),
        recipe=draw(NAME),
        eta=draw(WEIGHT),
        embedded_guidance=draw(st.none() | WEIGHT),
    )
