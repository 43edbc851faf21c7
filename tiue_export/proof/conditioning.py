"""Whether a prompt moves a runtime's latents as much as it should.

Converted models have been published whose text conditioning was 19 times too weak
(qualcomm/ai-hub-apps issue 155): pictures come out, of nothing that was asked for. A PSNR of
latents would show it, but not say it; this compares the error with what the prompt is worth.
"""

from __future__ import annotations

import math

import numpy as np

from tiue_export.bundle.chain import LATENTS, NOISE, TOKENS, chain_of
from tiue_export.bundle.manifest import ParityRecord
from tiue_export.bundle.read import Bundle
from tiue_export.proof.gates import IDENTICAL_DB
from tiue_export.proof.parity import Reference, with_dtypes
from tiue_export.sampling.sampler import sample
from tiue_export.specs import (
    TEXT_ENCODER,
    Array,
    Feeds,
    Runtime,
)

SUBJECT = "prompt's effect on latents"
# An error of a tenth of the effect. A text 19 times too weak loses all but 0.5 dB of it; half
# precision on an HTP was measured at 44 dB on the student that ships, at 32 on random weights.
_GATE_DB = 20.0


def measure_conditioning(
    bundle: Bundle, exact: Runtime, latents: ParityRecord, reference: Reference
) -> ParityRecord | None:
    """The reference's prompt against the empty one, over the error that `latents` recorded, in dB.

    `exact` is a float32 runtime of the same bundle; it draws once more, without the prompt. None
    where there is no prompt to leave out (a UNet alone), and of plans with guidance, which draw
    without it in every step.
    """
    plan = bundle.manifest.plan
    if plan.guidance is not None or TEXT_ENCODER not in bundle.manifest.graphs:
        return None
    known, chain = reference.arrays, chain_of(plan)

    def run(graph: str, pool: Feeds) -> dict[str, Array]:
        return exact.run(graph, with_dtypes(bundle.spec(graph), pool))

    tokens = {TOKENS: empty_prompt(known[TOKENS], bundle.manifest.text_chunks)}
    (text,) = chain.values(TEXT_ENCODER, run(TEXT_ENCODER, tokens)).values()
    # Of a plan in passes the reference's "sample" is that of one of them.
    noise = known[NOISE] if plan.one_pass else known["noise"]
    noises = np.concatenate([noise[None], known.get("fresh_noise", noise[None][:0])])
    without = sample(plan, run, noises, text)
    effect = known[LATENTS].astype(np.float64) - without.astype(np.float64)
    effect_db = 20 * math.log10(max(_rms(effect), 1e-30) / float(np.abs(known[LATENTS]).max()))
    return ParityRecord(
        hop=latents.hop,
        subject=SUBJECT,
        metric="psnr_db",
        value=round(min(IDENTICAL_DB, latents.value + effect_db), 2),
        gate=_GATE_DB,
        max_abs_error=latents.max_abs_error,
        inputs=f"{latents.inputs}, and the empty prompt",
    )


def empty_prompt(tokens: Array, chunks: int) -> Array:
    """Tokens (B, L) of the empty prompt, by those of any: start, end, padding in each chunk."""
    rows = tokens.reshape(len(tokens) * chunks, -1)  # (B*n, 77)
    empty = np.empty_like(rows)
    empty[:] = rows[:, -1:]  # padding: the end again, or 0
    empty[:, 0] = rows[:, 0]
    empty[:, 1] = rows.max(axis=1)  # CLIP's end of text is its largest token
    return empty.reshape(tokens.shape)


def _rms(values: Array) -> float:
    return math.sqrt(float(np.mean(np.square(values))))
