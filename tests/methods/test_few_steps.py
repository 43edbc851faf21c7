"""A plan with fresh noise is exact in torch, ONNX and drawing: an LCM of three steps.

Each step predicts x_0 and adds fresh noise up to the next timestep.
"""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiue_export import Pipeline, RuntimeOptions, export_onnx, load_student
from tiue_export.errors import UsageError
from tiue_export.graphs.build import build_graphs, gaussian_text, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.reference.capture import capture
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.ddim import alphas_cumprod
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.sampling.sampler import sample
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, UNET_GRAPHS

TIMESTEPS = (999, 679, 339)
SEED, PROMPT = 5, "a red fox"


def lcm_step(alphas, k: int, sample, output, fresh):
    """x_0 by the prediction, noised again to the next timestep; the last one stays."""
    a = alphas[TIMESTEPS[k]]
    x0 = (sample - (1 - a) ** 0.5 * output) / a**0.5
    if k == len(TIMESTEPS) - 1:
        return x0
    following = alphas[TIMESTEPS[k + 1]]
    return following**0.5 * x0 + (1 - following) ** 0.5 * fresh


@pytest.fixture(scope="module")
def student(ordinary_model):
    return load_student(ordinary_model, recipe="lcm-lora", steps=3)


@pytest.fixture(scope="module")
def bundle(few_step_bundle):
    return few_step_bundle


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


@torch.no_grad()
def unsplit_loop(student, noises, text) -> np.ndarray:
    """The sampler's own loop over diffusers' whole UNet: noises (3, B, 4, H, W) -> latents."""
    drawn = torch.from_numpy(noises).double()
    alphas, sample = alphas_cumprod(student.scheduler_config), drawn[0]
    for k, timestep in enumerate(TIMESTEPS):
        output = student.unet(sample.float(), timestep, torch.from_numpy(text)).sample.double()
        sample = lcm_step(alphas, k, sample, output, drawn[k + 1] if k < 2 else None)
    return sample.numpy()


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
@pytest.mark.parametrize("batch", [1, 2])
def test_its_torch_graphs_are_the_loop_of_an_unsplit_unet(student, hoist, batch):
    options = ExportOptions(hoist=hoist, batch=batch)
    graphs = {g.spec.name: g for g in build_graphs(student, options, only=UNET_GRAPHS)}
    noises, text = noises_from_seed(SEED, 3, (batch, 4, 8, 8)), gaussian_text((batch, 77, 32))
    latents = sample(
        student.plan, lambda name, pool: run_graph(graphs[name], pool)[1], noises, text
    )
    assert psnr_db(unsplit_loop(student, noises, text), latents) > 110


def test_a_drawing_is_the_loop_of_an_unsplit_unet(student, bundle):
    with Pipeline.open(bundle) as pipeline:
        drawn = pipeline(PROMPT, seed=SEED).pictures[0]
        text = pipeline.embed([PROMPT])
    noises = noises_from_seed(SEED, 3, (1, 4, 8, 8))
    assert psnr_db(unsplit_loop(student, noises, text)[0], drawn.latents) > 100
    assert drawn.guidance is None


def test_pictures_of_a_batch_have_their_own_streams(bundle):
    with Pipeline.open(bundle) as pipeline:
        together = [picture.latents for picture in pipeline(PROMPT, seed=SEED, count=2).pictures]
        alone = pipeline(PROMPT, seed=SEED + 1).pictures[0].latents
    np.testing.assert_array_equal(together[1], alone)
    assert psnr_db(together[0], together[1]) < 40


def test_a_plan_that_claims_another_sampler_is_held_against_it(ordinary_model):
    student = load_student(ordinary_model, recipe="lcm-lora", steps=3, without=["vae"])
    student.plan = replace(student.plan, scheduler="euler")
    lost = [record for record in capture(student, ExportOptions(), None).hops if not record.passed]
    assert [record.subject for record in lost] == [
        "latents / euler loop",
        "latents / its euler loop, unsplit UNet",
    ]


def test_its_rows_do_not_merge(student, tmp_path):
    with pytest.raises(UsageError, match="merge"):
        export_onnx(student, tmp_path / "bundle", ExportOptions(merge_below=0.02))


def test_commands_read_and_draw_it(run, bundle):
    code, out, err = run("inspect", bundle.root)
    assert code == 0, err
    assert "3 encoder runs" in out.replace("\n", " ")
    code, out, err = run("generate", bundle.root, PROMPT, "--seed", SEED, "--json")
    assert code == 0, err
    runs = json.loads(out)["stage_latency_ms"]
    assert (len(runs["unet_encoder"]), len(runs["unet_decoder"])) == (3, 3)


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
