"""Few-step students from checkpoint to picture: against diffusers' own unmodified pipelines."""

from __future__ import annotations

import json
import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    LCMScheduler,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from transformers import CLIPTokenizer

from tiue_export import load_student, open_bundle
from tiue_export.benchmarks.synthetic import fill
from tiue_export.errors import ScheduleError, UnsupportedModelError, UsageError
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.recipes import recipes
from tiue_export.sampling.sampler import sample
from tiue_export.student.guidance_embedding import guidance_embedding

PROMPT = "a red fox"
SIZE = 64


@pytest.fixture(scope="module")
def model(ordinary_model):
    return ordinary_model


@pytest.fixture(scope="module")
def lcm_model(model, tmp_path_factory):
    """The same with a guidance embedding, as full LCMs have."""
    folder = shutil.copytree(model, tmp_path_factory.mktemp("recipes") / "lcm")
    config = UNet2DConditionModel.load_config(folder / "unet")
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 32})
    fill(unet, torch.Generator().manual_seed(3))
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    return folder


def student_of(folder, recipe, **options):
    """A checkpoint by a recipe."""
    given = SamplingOptions(recipe=recipe, **options)
    return load_for_method(CheckpointRequest(str(folder)), None, given)


def diffusers_latents(folder, kind, scheduler, **call) -> tuple[np.ndarray, np.ndarray]:
    """What diffusers' pipeline draws, and the noises that it drew: (N, 4, H, W), latents."""
    torch.manual_seed(0)
    pipe = kind.from_pretrained(folder, safety_checker=None, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    shape = (1, 4, 8, 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    drawn, steps = torch.Generator().manual_seed(7), call["num_inference_steps"]
    fresh = [torch.randn(shape, generator=drawn) for _ in range(steps)]
    latents = pipe(
        PROMPT,
        height=SIZE,
        width=SIZE,
        latents=noise.clone(),
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **call,
    ).images
    return np.concatenate([noise, *fresh]), latents.numpy()


CASES = [
    ("sd-turbo", 1, EulerDiscreteScheduler, {"guidance_scale": 0.0}),
    ("sd-turbo", 4, EulerDiscreteScheduler, {"guidance_scale": 0.0}),
    ("euler-ancestral", 2, EulerAncestralDiscreteScheduler, {"guidance_scale": 0.0}),
    ("lcm-lora", 4, LCMScheduler, {"guidance_scale": 1.0}),
    ("hyper-sd-2", 2, DDIMScheduler, {"guidance_scale": 0.0}),
    ("hyper-sd-1", 1, TCDScheduler, {"guidance_scale": 0.0, "eta": 1.0}),
    ("tcd", 3, TCDScheduler, {"guidance_scale": 0.0, "eta": 0.3}),
    ("pcm-cfg", 4, TCDScheduler, {"guidance_scale": 7.5}),
]


@pytest.mark.parametrize(("recipe", "steps", "scheduler", "call"), CASES)
def test_its_graphs_draw_what_diffusers_own_pipeline_draws(model, recipe, steps, scheduler, call):
    noises, expected = diffusers_latents(
        model, StableDiffusionPipeline, scheduler, num_inference_steps=steps, **call
    )
    student = student_of(model, recipe, steps=steps)
    assert (student.plan.recipe, student.plan.one_pass) == (recipe, steps == 1)
    assert psnr_db(expected, latents_of(student, noises)) > 110


def latents_of(student, noises) -> np.ndarray:
    """A student's graphs in torch, drawn by our loop: noises (N, 4, H, W) -> (1, 4, H, W)."""
    graphs = {graph.spec.name: graph for graph in build_graphs(student, ExportOptions())}

    def run(name, pool):
        return run_graph(graphs[name], pool)[1]

    plan = student.plan
    tokenizer = CLIPTokenizer.from_pretrained(student.tokenizer_folder)
    prompts = ["", PROMPT] if plan.copies == 2 else [PROMPT]
    tokens = tokenizer(prompts, padding="max_length", max_length=77).input_ids
    text = np.concatenate(
        [run("text_encoder", {"input_ids": np.array([row])})["last_hidden_state"] for row in tokens]
    )
    return sample(plan, run, noises[: plan.noises, None], text)


def test_an_lcms_guidance_is_folded_into_its_time_embedding(lcm_model):
    noises, expected = diffusers_latents(
        lcm_model,
        LatentConsistencyModelPipeline,
        LCMScheduler,
        num_inference_steps=2,
        guidance_scale=5.0,
    )
    student = student_of(lcm_model, None, steps=2, guidance=5.0)
    assert (student.plan.recipe, student.plan.embedded_guidance) == ("lcm", 5.0)
    assert "by its guidance embedding" in student.source.notes[0]
    assert psnr_db(expected, latents_of(student, noises)) > 110


@pytest.mark.parametrize("width", [32, 33])
def test_the_guidance_embedding_is_diffusers_own(width):
    own = LatentConsistencyModelPipeline.get_guidance_scale_embedding
    expected = own(None, torch.tensor([7.0]), embedding_dim=width)[0]
    np.testing.assert_allclose(guidance_embedding(8.0, width), expected, atol=2e-3)


def test_a_half_precision_lcm_becomes_float32_to_hold_the_sum(lcm_model, tmp_path):
    half = shutil.copytree(lcm_model, tmp_path / "half")
    UNet2DConditionModel.from_pretrained(half / "unet").half().save_pretrained(half / "unet")
    assert student_of(half, "lcm").unet.dtype == torch.float32


@pytest.mark.parametrize("method", ["tiue", "faster"])
def test_other_methods_refuse_a_guidance_embedding_they_would_leave_out(lcm_model, method):
    with pytest.raises(UnsupportedModelError, match="takes a guidance embedding"):
        load_for_method(CheckpointRequest(str(lcm_model)), method, SamplingOptions())


def test_recipes_of_other_students_refuse_a_guidance_embedding(lcm_model):
    with pytest.raises(ScheduleError, match="for which recipe sd-turbo has no scale"):
        student_of(lcm_model, "sd-turbo")


def test_a_guidance_scale_needs_an_embedding_to_be_folded_into(model):
    with pytest.raises(UsageError, match="has no guidance embedding, into which recipe lcm"):
        student_of(model, "lcm", guidance=5.0)
    assert student_of(model, "lcm").plan.embedded_guidance is None


def test_an_adapters_recipe_without_an_adapter_is_told(model):
    (note,) = student_of(model, "hyper-sd-4").source.notes
    assert note == (
        "recipe hyper-sd-4 is of an adapter: none was given by --lora, so model must hold it "
        "merged already"
    )
    assert student_of(model, "sd-turbo").source.notes == ()


def test_an_encoder_that_is_shared_across_fresh_noise_is_warned_of(model):
    shared = student_of(model, "dmd2", key_steps="0,2")
    assert "share an encoder that never saw it" in shared.source.notes[0]
    assert not any("share" in note for note in student_of(model, "dmd2").source.notes)
    without = student_of(model, "tcd", eta=0.0, key_steps="0,2").source.notes
    assert not any("share" in note for note in without)


def test_it_loads_in_python_by_its_recipe(model):
    plan = load_student(model, recipe="sd-turbo", steps=2).plan
    assert (plan.recipe, plan.steps) == ("sd-turbo", 2)


def test_a_checkpoint_without_marks_needs_its_recipe(model):
    with pytest.raises(ScheduleError, match="nothing in model says which few-step student"):
        load_for_method(CheckpointRequest(str(model)), "few-step", SamplingOptions())


def test_a_tiue_student_has_no_recipe(micro_pipeline):
    with pytest.raises(ScheduleError, match=r"is a TiUE student \(it records K=4\)"):
        student_of(micro_pipeline, "sd-turbo")


def test_a_student_without_a_middle_block_and_with_a_tiny_vae_is_sdxs(model):
    from tiue_export.methods.recognition import recipe_of
    from tiue_export.student.load import CheckpointFacts

    config = {"mid_block_type": None}
    assert recipe_of(CheckpointFacts("x", {}, config, None, vae_class="AutoencoderTiny")) == "sdxs"
    assert recipe_of(CheckpointFacts("x", {}, config, None, vae_class="AutoencoderKL")) is None


def test_a_bundle_is_drawn_in_other_steps_and_says_what_it_is(run, model):
    code, _, err = run("onnx", "--ckpt", model, "--recipe", "lcm-lora", "--out", "lcm")
    assert code == 0, err
    plan = open_bundle("lcm").manifest.plan
    assert (plan.steps, plan.noises) == (4, 4)
    hops = {record.hop for record in open_bundle("lcm").manifest.parity}
    assert {"closed form", "diffusers", "ONNX fp32 loop"} <= hops
    code, out, err = run("inspect", "lcm")
    assert (code, "lcm-lora" in out) == (0, True), err
    code, out, err = run("generate", "lcm", PROMPT, "--steps", 2, "--json", "--out", "two.png")
    assert code == 0, err
    assert len(json.loads(out)["stage_latency_ms"]["unet_encoder"]) == 2
    code, _, err = run("generate", "lcm", PROMPT, "--steps", 9, "--out", "nine.png")
    assert (code, "recipe lcm-lora is for 2, 3, 4, 5, 6, 7, 8" in " ".join(err.split())) == (
        2,
        True,
    )


def test_recipes_are_listed(run):
    code, out, _ = run("recipes")
    assert code == 0
    assert all(name in out for name in recipes())
    listed = json.loads(run("recipes", "--json")[1])
    assert [one["name"] for one in listed] == list(recipes())
    assert all(one["licence"] and one["source"] for one in listed)


def test_an_unknown_recipe_is_told_its_neighbour(run, model):
    code, _, err = run("onnx", "--ckpt", model, "--recipe", "hyper-sd4", "--out", "b")
    assert (code, "hyper-sd-4" in err) == (2, True)


def test_options_of_other_methods_are_refused_before_anything_is_read(run):
    code, _, err = run("onnx", "--ckpt", "none/", "--recipe", "lcm", "--inject", "on")
    assert (code, "--inject is for --method faster" in " ".join(err.split())) == (2, True)
