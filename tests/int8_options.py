"""The least that quantizing takes: three prompts, one to judge by, every layer that no rule keeps
out, one timed round of one thread."""

from __future__ import annotations

from tiue_export.proof.quantization import (
    AnalysisOptions,
    QuantizeOptions,
    RangeMethod,
    VerdictOptions,
)

PROMPTS = ("a red fox", "an owl in a tree", "two boats")
BY_RULE = AnalysisOptions(ranges=RangeMethod("min-max"), sensitivity="none", held_out=1, probed=1)
QUICK = VerdictOptions(rounds=1, threads=1)
# Whether int8 is faster on this machine is not what most tests are about.
ANY_SPEED = QuantizeOptions(analysis=BY_RULE, judged=QUICK, any_speed=True)
