"""Few-step students are ready to be: a plan with fresh noise is exact in torch, ONNX and drawing.

The plan is an LCM's by hand: each step predicts x_0 and adds fresh noise up to the next timestep.
"""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

from tiue_export import Pipeline, RuntimeOptions, export_onnx, load_student
from tiue_export.errors import UsageError
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.ddim import alphas_cumprod
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.sampling.plan import Combination, Pass, Plan
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER

TIMESTEPS = (751, 501, 251)
SEED, PROMPT = 5, "a red fox"


def lcm_step(alphas, k: int, sample, output, fresh):
    """x_0 by the prediction, noised again to the next timestep; the last one stays."""
    a = alphas[TIMESTEPS[k]]
    x0 = (sample - (1 - a) ** 0.5 * output) / a**0.5
    if k == len(TIMESTEPS) - 1:
        return x0
    following = alphas[TIMESTEPS[k + 1]]
    return following**0.5 * x0 + (1 - following) ** 0.5 * fresh


def lcm_plan(config) -> Plan:
    """The same steps driven by unit vectors: noise, two fresh noises, three outputs."""
    alphas, basis = alphas_cumprod(config), np.eye(6)
    outputs, fresh, sample = basis[3:], basis[1:3], basis[0]

    def combination(vector, rows: int) -> Combination:
        weights = [float(weight) for weight in vector]
        return Combination(weights[0], tuple(weights[3 : 3 + rows]), tuple(weights[1 : 1 + rows]))

    passes = []
    for k, timestep in enumerate(TIMESTEPS):
        passes.append(Pass(timestep, (timestep,), combination(sample, k)))
        sample = lcm_step(alphas, k, sample, outputs[k], fresh[k] if k < 2 else None)
    latents = replace(combination(sample, 3), fresh=tuple(float(w) for w in sample[1:3]))
    return Plan("few-step", 3, tuple(passes), latents, "epsilon", scheduler="lcm")


@pytest.fixture(scope="module")
def student(micro_pipeline):
    student = load_student(micro_pipeline)
    student.plan = lcm_plan(student.scheduler_config)
    return student


@pytest.fixture(scope="module")
def bundle(student, tmp_path_factory):
    return export_onnx(student, tmp_path_factory.mktemp("few") / "bundle")


def test_the_plan_agrees_with_itself_and_draws_three_noises_of_one_stream(student):
    plan = student.plan
    assert plan.problem() is None
    assert (plan.one_pass, plan.open_rows, plan.copies, plan.noises) == (False, False, 1, 3)
    shape = (1, 4, 8, 8)
    whole = np.random.RandomState(SEED).standard_normal((3, *shape[1:])).astype(np.float32)
    np.testing.assert_array_equal(noises_from_seed(SEED, 3, shape)[:, 0], whole)


def test_its_graphs_take_one_timestep_and_as_many_rows_as_pictures(bundle):
    (timesteps,) = (t for t in bundle.spec(UNET_DECODER).inputs if t.name == "timesteps")
    (outputs,) = bundle.spec(UNET_DECODER).outputs
    assert timesteps.shape == (1,)
    assert outputs.shape == (1, 4, 8, 8)
    assert bundle.spec(UNET_ENCODER).inputs[0].shape == (1, 4, 8, 8)


def test_a_drawing_is_the_loop_of_an_unsplit_unet(student, bundle):
    with Pipeline.open(bundle) as pipeline:
        drawn = pipeline(PROMPT, seed=SEED).pictures[0]
        text = torch.from_numpy(pipeline.embed([PROMPT]))
    noises = torch.from_numpy(noises_from_seed(SEED, 3, (1, 4, 8, 8))).double()
    alphas, sample = alphas_cumprod(student.scheduler_config), noises[0]
    for k, timestep in enumerate(TIMESTEPS):
        with torch.no_grad():
            output = student.unet(sample.float(), timestep, text).sample.double()
        sample = lcm_step(alphas, k, sample, output, noises[k + 1] if k < 2 else None)
    assert psnr_db(sample[0].numpy(), drawn.latents) > 100
    assert drawn.guidance is None


def test_every_noise_can_be_given_and_each_of_them_counts(bundle):
    shape = (3, 4, 8, 8)
    noises = noises_from_seed(SEED, 3, (1, *shape[1:]))[:, 0]
    with Pipeline.open(bundle) as pipeline:
        seeded = pipeline(PROMPT, seed=SEED).pictures[0].latents
        same = pipeline(PROMPT, latents=noises).pictures[0].latents
        np.testing.assert_array_equal(seeded, same)
        for number in range(3):
            other = noises.copy()
            other[number] = -other[number]
            changed = pipeline(PROMPT, latents=other).pictures[0].latents
            assert psnr_db(seeded, changed) < 40
        with pytest.raises(UsageError, match=r"latents have shape \(4, 8, 8\); expected \(3, 4,"):
            pipeline(PROMPT, latents=noises[0])


def test_its_reference_proves_a_runtime_graph_by_graph_and_through_all_passes(bundle):
    runtime = open_runtime("ort", bundle, RuntimeOptions())
    records = measure_runtime(bundle, runtime, load_reference(bundle))
    assert all(record.passed for record in records)
    assert {"prompt_embeds", "outputs", "latents", "picture"} == {r.subject for r in records}
    assert TEXT_ENCODER in bundle.manifest.graphs


def test_what_is_distilled_in_is_not_asked_for(bundle):
    with Pipeline.open(bundle) as pipeline:
        with pytest.raises(UsageError, match="it takes no guidance"):
            pipeline(PROMPT, guidance=3.0)
        with pytest.raises(UsageError, match="it takes no negative prompt"):
            pipeline(PROMPT, negative_prompt="blue")
