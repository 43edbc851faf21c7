"""Captured reference tensors, and how a runtime's outputs are held against them.

A bundle carries a small reference (real prompt, its text embedding, noise, latents, picture) made
by the fp32 student, so that any device can prove a runtime without the checkpoint.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from tiue_export.bundle.chain import (
    LATENTS,
    PICTURE,
    SCALED_LATENTS,
    SOURCE_PICTURE,
    chain_of,
    scaled_latents,
)
from tiue_export.bundle.manifest import Manifest, ParityRecord
from tiue_export.bundle.read import REFERENCE_FILE, Bundle
from tiue_export.errors import BundleError, ParityError
from tiue_export.proof.gates import GATES_PSNR_DB, gain_db, max_abs_error, psnr_db, weakest
from tiue_export.sampling.plan import Plan
from tiue_export.sampling.sampler import OnStep, added, sample
from tiue_export.specs import (
    CONTROLNET,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    VAE_ENCODER,
    Array,
    Feeds,
    GraphSpec,
    Runtime,
    check_finite,
    step_limit,
)

# Two everyday prompts of different length; row b of a batch takes prompt b modulo their number.
PROMPTS = (
    "a red fox sitting in fresh snow, soft morning light, photograph",
    "an astronaut riding a green horse on the moon",
)
# The values that a chain of all graphs is judged by.
JUDGED_VALUES = (LATENTS, PICTURE)
CHECKED_ROWS = 8
# How much of a drawing a proof runs: all of it, or the text encoder and one run of the UNet's
# graphs, where an emulator would take hours for the rest.
WHOLE, UNET = "whole", "unet"
SCOPES = (WHOLE, UNET)


def reference_prompts(batch: int, chunks: int) -> list[str]:
    """A prompt for each row; where a text is several chunks long, repeated until all have words."""
    # The shorter one is of 10 tokens with its comma: 8 of them are more than a chunk's 75.
    repeated = 1 if chunks == 1 else 8 * chunks
    return [", ".join([PROMPTS[row % len(PROMPTS)]] * repeated) for row in range(batch)]


@dataclass(frozen=True)
class Reference:
    """What the fp32 student made of real prompts; keys are tensor names, `inputs` describes them.

    input_ids (B, L), encoder_hidden_states (B, L, D), sample = noise (B, 4, H, W),
    latents (B, 4, H, W), latent_sample (B, 4, H, W), picture (B, 3, 8H, 8W). A part that the
    checkpoint lacked is absent. Of a plan in passes: noise (B, 4, H, W), fresh_noise
    (F, B, 4, H, W) where it draws some, prompt_embeds (B, L, D), and of one pass sample
    (N, 4, H, W), timestep, timesteps, outputs (g*N, 4, H, W); N is B, or with guidance 2B. With a
    VAE encoder: source_picture (B, 3, 8H, 8W), the picture that was drawn, and latent_parameters.
    """

    arrays: Mapping[str, Array]
    inputs: str

    def save(self, path: Path) -> None:
        """Write as one safetensors file."""
        from safetensors.numpy import save

        path.parent.mkdir(parents=True, exist_ok=True)
        contiguous = {name: np.ascontiguousarray(array) for name, array in self.arrays.items()}
        # Not save_file: it makes files that only their owner can read.
        path.write_bytes(save(contiguous, metadata={"inputs": self.inputs}))


def load_reference(bundle: Bundle) -> Reference:
    """The reference stored in a bundle."""
    from safetensors import SafetensorError, safe_open

    path = bundle.file(REFERENCE_FILE)
    try:
        with safe_open(path, framework="np") as file:
            arrays = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            return Reference(arrays, (file.metadata() or {}).get("inputs", ""))
    except (OSError, SafetensorError) as error:
        raise BundleError(f"{path} cannot be read: {error}", "Export the bundle again.") from error


def parity_record(
    hop: str, subject: str, reference: Array, value: Array, kind: str | None, inputs: str
) -> ParityRecord:
    """Compare two arrays under the gate of `kind` (a key of GATES_PSNR_DB), or ungated."""
    return ParityRecord(
        hop=hop,
        subject=subject,
        metric="psnr_db",
        value=round(psnr_db(reference, value), 2),
        gate=None if kind is None else GATES_PSNR_DB[kind],
        max_abs_error=max_abs_error(reference, value),
        inputs=inputs,
    )


def for_gain(record: ParityRecord, plan: Plan) -> ParityRecord:
    """A record of a plan's latents, or of what follows from them, with the gate for its gain.

    Gates of float32 leave room for it.
    """
    if record.gate is None:
        return record
    return replace(record, gate=_for_gain_db(record.gate, plan))


def _for_gain_db(gate_db: float, plan: Plan) -> float:
    return gate_db if gate_db >= GATES_PSNR_DB["fp32"] else round(gate_db - gain_db(plan), 1)


def stage_gate_db(manifest: Manifest, graph: str, precision: str) -> float:
    """What a runtime of this precision has to reach in one of a bundle's graphs, in dB."""
    gate_db = GATES_PSNR_DB[weakest(precision, manifest.graphs[graph].precision)]
    return _for_gain_db(gate_db, manifest.plan) if graph == UNET_DECODER else gate_db


def measure_graph(
    runtime: Runtime,
    spec: GraphSpec,
    feeds: Feeds,
    expected: Feeds,
    hop: str,
    kind: str,
    inputs: str,
) -> ParityRecord:
    """Run one graph on captured feeds; the record of its worst output."""
    outputs = runtime.run(spec.name, spec.select(feeds))
    check_finite(spec.name, outputs)
    records = [
        parity_record(hop, spec.name, expected[key], outputs[key].astype(np.float32), kind, inputs)
        for key in expected
    ]
    return min(records, key=lambda record: record.value)


def measure_runtime(
    bundle: Bundle,
    runtime: Runtime,
    reference: Reference,
    on_step: OnStep = lambda done, total: None,
    scope: str = WHOLE,
) -> list[ParityRecord]:
    """Hold a runtime against the bundle's reference: each stage on the reference's own inputs.

    `on_step` hears of the steps of a model in a loop. `scope` is one of `SCOPES`.
    """
    kind, hop = runtime.precision, f"{runtime.name} {runtime.device}"
    chain = chain_of(bundle.manifest.plan)
    known, graphs, records = reference.arrays, bundle.manifest.graphs, []

    def measure(graph: str, feeds: Feeds) -> None:
        spec = bundle.spec(graph)
        values = {tensor.name: chain.value(graph, tensor.name) for tensor in spec.outputs}
        expected = {tensor: known[value] for tensor, value in values.items()}
        typed = with_dtypes(spec, feeds)
        record = measure_graph(runtime, spec, typed, expected, hop, kind, reference.inputs)
        gate_db = stage_gate_db(bundle.manifest, graph, kind)
        records.append(replace(record, subject=" ".join(values.values()), gate=gate_db))

    in_passes, limit = not bundle.manifest.plan.one_pass, step_limit(runtime)
    if in_passes and limit is not None:
        # The reference decodes three steps at once; a device's engine may take fewer.
        rows = limit * len(known["encoder_hidden_states"])
        shorter = {"timesteps": known["timesteps"][:limit], "outputs": known["outputs"][:rows]}
        known = {**known, **shorter}
    if TEXT_ENCODER in graphs:
        measure(TEXT_ENCODER, known)
    encoder = bundle.spec(UNET_ENCODER)
    features = runtime.run(UNET_ENCODER, encoder.select(with_dtypes(encoder, known)))
    check_finite(UNET_ENCODER, features)
    if CONTROLNET in graphs:
        control = bundle.spec(CONTROLNET)
        features = added(features, runtime.run(CONTROLNET, with_dtypes(control, known)))
        check_finite(CONTROLNET, features)
    measure(UNET_DECODER, {**known, **features})
    if in_passes and scope == WHOLE:
        records.append(measure_loop(bundle, runtime, reference, hop, on_step))
    if VAE_DECODER in graphs and scope == WHOLE:
        measure(VAE_DECODER, known)
    if VAE_ENCODER in graphs and scope == WHOLE:
        measure(VAE_ENCODER, {"sample": known[SOURCE_PICTURE]})
    return records


def measure_constants(bundle: Bundle, reference: Reference) -> list[ParityRecord]:
    """What the manifest alone decides: its scaling factor, by what the student's VAE was given.

    Plans in several passes are proven by drawing them; those of one pass are constants of graphs.
    """
    if VAE_DECODER not in bundle.manifest.graphs:
        return []
    known, expected = reference.arrays, reference.arrays[SCALED_LATENTS]
    height, width = expected.shape[2:]  # of the first tile, where pictures are decoded in tiles
    scaled = scaled_latents(known[LATENTS], bundle.manifest.vae_scaling_factor)
    scaled = scaled[:, :, :height, :width]
    record = parity_record(
        "manifest", "latents / VAE scaling factor", expected, scaled, "split", reference.inputs
    )
    return [record]


def measure_loop(
    bundle: Bundle,
    runtime: Runtime,
    reference: Reference,
    hop: str,
    on_step: OnStep = lambda done, total: None,
) -> ParityRecord:
    """All passes of a plan against the reference's latents; gated in fp32 alone.

    Guidance and the sum over all steps amplify what each graph rounds.
    """
    manifest, known = bundle.manifest, reference.arrays

    def run(graph: str, pool: Feeds) -> dict[str, Array]:
        outputs = runtime.run(graph, with_dtypes(bundle.spec(graph), pool))
        check_finite(graph, outputs)
        return outputs

    text = known["encoder_hidden_states"]
    plan = loop_to_check(manifest.plan, len(text)).bounded(step_limit(runtime), len(text))
    control = None
    if CONTROLNET in manifest.graphs:
        control = {name: known[name] for name in ("controlnet_cond", "conditioning_scale")}
    noises = known["noise"][None]  # (N, B, 4, H, W)
    if plan.noises > 1:
        noises = np.concatenate([noises, known["fresh_noise"]])
    latents = sample(plan, run, noises, text, on_step=on_step, control=control)
    exact = weakest(runtime.precision, manifest.precision) == "fp32"
    return parity_record(
        f"{hop} loop",
        "latents",
        known["latents"],
        latents,
        loop_gate(manifest.plan) if exact else None,
        reference.inputs,
    )


def loop_gate(plan: Plan) -> str:
    """The gate of a whole drawing in float32: guidance amplifies what each graph rounds."""
    return "fp32" if plan.guidance is None else "fp32-loop"


def loop_to_check(plan: Plan, rows_per_step: int) -> Plan:
    """The same plan in small pieces, which is exact: a check must not need a device's memory."""
    return replace(plan, max_decoder_rows=max(CHECKED_ROWS, rows_per_step))


def with_dtypes(spec: GraphSpec, pool: Feeds) -> dict[str, Array]:
    """The graph's inputs out of float32 captures, in the dtypes it takes."""
    missing = [tensor.name for tensor in spec.inputs if tensor.name not in pool]
    if missing:
        raise BundleError(f"the reference lacks {', '.join(missing)}", "Export the bundle again.")
    return {tensor.name: pool[tensor.name].astype(tensor.dtype) for tensor in spec.inputs}


def require_passed(records: list[ParityRecord], next_step: str) -> None:
    """Raise `ParityError` that lists every record below its gate, with what to type next."""
    failed = [record for record in records if not record.passed]
    if failed:
        lines = "; ".join(
            f"{record.hop}, {record.subject}: {record.value:.1f} dB, gate {record.gate:.0f} dB"
            for record in failed
        )
        raise ParityError(
            f"{len(failed)} of {len(records)} parity checks failed: {lines}",
            next_step,
            tuple(record.hop for record in failed),
        )
