"""The models of a repository and the ensemble of them: a step for each run of a graph.

An ensemble may name a model any number of times. So a plan in passes is written out as
`sampling/sampler.py` would run it: for each pass a model that computes what it is fed, then the
encoder and the decoder, the same two models every time.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace

import numpy as np

from tiue_export.bundle.chain import (
    LATENTS,
    NOISE,
    ONE_PASS,
    PICTURE,
    PROMPT_TEXT,
    TEXT,
    TOKENS,
)
from tiue_export.bundle.manifest import Manifest
from tiue_export.export.triton.between import (
    Between,
    combined,
    guided,
    latent_scale,
    pass_feeds,
    text_rows,
)
from tiue_export.export.triton.config import EnsembleStep, TritonModel, triton_tensor
from tiue_export.sampling.sampler import pieces
from tiue_export.specs import (
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    GraphSpec,
    TensorSpec,
)

# What clients see under names of their own.
_NOISE, _IMAGE, _NEGATIVE, _GUIDANCE = "noise", "image", "negative_input_ids", "guidance"
_NEGATIVE_TEXT = "negative_prompt_embeds"
_PUBLIC = {NOISE: _NOISE, PICTURE: _IMAGE}


@dataclass(frozen=True)
class Part:
    """A model and where its file comes from: a graph of the bundle, or nodes of our own.

    The ensemble, which has no file, has neither.
    """

    model: TritonModel
    graph: str = ""
    between: Between | None = None


@dataclass(frozen=True)
class _Run:
    """One run of a graph or of what is between them; `names` are values not called as tensors."""

    spec: GraphSpec
    between: Between | None = None
    names: Mapping[str, str] = field(default_factory=dict)

    def places(self, tensors: tuple[TensorSpec, ...]) -> dict[str, str]:
        """Where the ensemble keeps each tensor's value."""
        return {tensor.name: self.names.get(tensor.name, tensor.name) for tensor in tensors}


def ensemble_parts(
    manifest: Manifest,
    specs: Mapping[str, GraphSpec],
    prefix: str,
    max_batch: int,
    backend: str,
    files: Mapping[str, str],
) -> tuple[Part, ...]:
    """Every model, once each in the order they run first; the ensemble, called `prefix`, is last.

    `max_batch` 0: the batch is fixed. `backend` runs the bundle's graphs, whose files' names are
    `files`.
    """
    drawing = _one_pass if manifest.plan.one_pass else _in_passes
    runs = (*drawing(manifest, specs), *_picture(manifest, specs))
    parts: dict[str, Part] = {}
    for run in runs:
        name = run.spec.name
        parts[name] = Part(
            TritonModel(
                name=f"{prefix}_{name}",
                max_batch=max_batch,
                inputs=tuple(triton_tensor(t, batched=max_batch > 0) for t in run.spec.inputs),
                outputs=tuple(triton_tensor(t, batched=max_batch > 0) for t in run.spec.outputs),
                backend="onnxruntime" if run.between else backend,
                file="model.onnx" if run.between else files[name],
            ),
            "" if run.between else name,
            run.between,
        )
    return (*parts.values(), Part(_ensemble(prefix, max_batch, runs)))


def _ensemble(prefix: str, max_batch: int, runs: tuple[_Run, ...]) -> TritonModel:
    """The runs by name: what no run makes is asked for, latents and picture are given."""
    asked: dict[str, TensorSpec] = {}
    made: dict[str, TensorSpec] = {}
    for run in runs:
        for tensor, value in zip(
            run.spec.inputs, run.places(run.spec.inputs).values(), strict=True
        ):
            if value not in made:
                asked.setdefault(value, replace(tensor, name=value))
        for tensor, value in zip(
            run.spec.outputs, run.places(run.spec.outputs).values(), strict=True
        ):
            made[value] = replace(tensor, name=value)
    return TritonModel(
        name=prefix,
        max_batch=max_batch,
        inputs=tuple(triton_tensor(t, batched=max_batch > 0) for t in asked.values()),
        outputs=tuple(triton_tensor(made[v], batched=max_batch > 0) for v in (LATENTS, _IMAGE)),
        steps=tuple(
            EnsembleStep(
                f"{prefix}_{run.spec.name}",
                run.places(run.spec.inputs),
                run.places(run.spec.outputs),
            )
            for run in runs
        ),
    )


def _graph(spec: GraphSpec, names: Mapping[str, str] = _PUBLIC) -> _Run:
    """A graph of the bundle. Its tensors' values are those of the chain, but for `names`."""
    values = {t.name: ONE_PASS.value(spec.name, t.name) for t in (*spec.inputs, *spec.outputs)}
    return _Run(spec, names={tensor: names.get(value, value) for tensor, value in values.items()})


def _one_pass(manifest: Manifest, specs: Mapping[str, GraphSpec]) -> Iterator[_Run]:
    """Token ids and noise -> latents, all of it in the graphs."""
    for name in (TEXT_ENCODER, UNET_ENCODER, UNET_DECODER):
        yield _graph(specs[name])


def _picture(manifest: Manifest, specs: Mapping[str, GraphSpec]) -> Iterator[_Run]:
    """Latents -> picture."""
    (scaled,) = specs[VAE_DECODER].inputs
    latents = replace(scaled, name=LATENTS)
    scale = latent_scale(latents, scaled, manifest.vae_scaling_factor)
    yield _Run(scale.spec, scale)
    yield _graph(specs[VAE_DECODER])


def _in_passes(manifest: Manifest, specs: Mapping[str, GraphSpec]) -> Iterator[_Run]:
    """Token ids and every noise -> latents, pass by pass."""
    plan = manifest.plan
    batch, *latent = (int(side) for side in manifest.latent_shape)
    encoder, decoder = specs[UNET_ENCODER], specs[UNET_DECODER]
    guidance = TensorSpec(_GUIDANCE, "float32", (batch,))
    noise = TensorSpec(_NOISE, "float32", (plan.noises * batch, *latent))
    total = TensorSpec(LATENTS, "float32", (batch, *latent))
    yield from _text(specs[TEXT_ENCODER], with_negative=plan.guidance is not None)
    outputs: list[TensorSpec] = []  # of every decoder run so far, after guidance
    for number, one in enumerate(plan.passes):
        own = {t.name: f"{t.name}_{number}" for t in (*encoder.inputs, *encoder.outputs)}
        own.pop(TEXT, None)
        groups = list(pieces(one, plan.max_decoder_rows, plan.copies * batch))
        runs = range(len(outputs), len(outputs) + len(groups))
        feeds = pass_feeds(
            combined(f"pass_{number}", one.input, noise, outputs, total),
            plan.copies,
            TensorSpec(own[NOISE], "float32", (plan.copies * batch, *latent)),
            {
                own["timestep"]: np.array([one.encoder_timestep], np.float32),
                **{f"timesteps_{run}": group for run, group in zip(runs, groups, strict=True)},
            },
        )
        yield _Run(feeds.spec, feeds)
        yield _graph(encoder, own)
        for run, group in zip(runs, groups, strict=True):
            value = f"outputs_{run}"
            yield _graph(decoder, {**own, "timesteps": f"timesteps_{run}", "outputs": value})
            if plan.guidance is not None:
                (rows,) = decoder.outputs
                mixed = guided(rows, guidance, replace(rows, name="guided"))
                yield _Run(mixed.spec, mixed, {"outputs": value, "guided": f"guided_{run}"})
                value = f"guided_{run}"
            outputs.append(TensorSpec(value, "float32", (len(group) * batch, *latent)))
    latents = combined(LATENTS, plan.latents, noise, outputs, total)
    yield _Run(latents.spec, latents)


def _text(encoder: GraphSpec, *, with_negative: bool) -> Iterator[_Run]:
    """Token ids -> text; with guidance of both prompts, by the one text encoder."""
    if not with_negative:
        yield _graph(encoder)
        return
    yield _graph(encoder, {TOKENS: _NEGATIVE, TEXT: _NEGATIVE_TEXT})
    yield _graph(encoder, {TEXT: PROMPT_TEXT})
    (text,) = encoder.outputs
    rows = text_rows(
        replace(text, name=_NEGATIVE_TEXT),
        replace(text, name=PROMPT_TEXT),
        replace(text, name=TEXT, shape=(2 * int(text.shape[0]), *text.shape[1:])),
    )
    yield _Run(rows.spec, rows)
