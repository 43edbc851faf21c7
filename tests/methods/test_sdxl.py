"""SDXL's few-step students from checkpoint to latents, against diffusers' own pipeline."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from diffusers import (
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LCMScheduler,
    StableDiffusionXLPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from sdxl_models import sdxl_unet, with_unet

from tiue_export import load_student
from tiue_export.checkpoint.tokenizer_files import tokenizer_of
from tiue_export.errors import ScheduleError
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.methods.recognition import recipe_of
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.fan_out import FanOut
from tiue_export.sampling.recipes import recipes
from tiue_export.sampling.sampler import sample
from tiue_export.student.load import CheckpointFacts
from tiue_export.student.model import text_embedding

PROMPT = "a red fox"
WIDTH_PX, HEIGHT_PX = 96, 64  # not square: what is told of the size must have its order


@pytest.fixture(scope="module", params=["sdxl", "ssd-1b", "vega"])
def model(request, sdxl_folder, tmp_path_factory):
    folder = tmp_path_factory.mktemp("sdxl") / request.param
    return with_unet(sdxl_folder, folder, sdxl_unet(request.param))


@pytest.fixture(scope="module")
def pipeline(model):
    return opened(model)


def opened(folder):
    pipe = StableDiffusionXLPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def student_of(folder, recipe, **options):
    given = SamplingOptions(recipe=recipe, **options)
    return load_for_method(CheckpointRequest(str(folder)), None, given)


def drawn_by_diffusers(pipe, scheduler, settings, **call) -> tuple[np.ndarray, np.ndarray]:
    """The noises (N, 4, H, W) and the latents of diffusers' unmodified pipeline."""
    own = {"prediction_type": "epsilon", "timestep_spacing": "trailing", **settings}
    pipe.scheduler = scheduler.from_config({**pipe.scheduler.config, **own})
    shape = (1, 4, HEIGHT_PX // 8, WIDTH_PX // 8)
    noise = torch.randn(shape, generator=torch.Generator().manual_seed(1))
    steps = call.get("num_inference_steps") or len(call["timesteps"])
    generator = torch.Generator().manual_seed(7)
    fresh = [torch.randn(shape, generator=generator) for _ in range(steps)]
    latents = pipe(
        PROMPT,
        height=HEIGHT_PX,
        width=WIDTH_PX,
        latents=noise.clone(),
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **call,
    ).images
    return np.concatenate([noise, *fresh]), latents.numpy()


def drawn_by_graphs(student, noises: np.ndarray, **options) -> np.ndarray:
    """A student's graphs in torch, drawn by our loop: noises (N, 4, H, W) -> (1, 4, H, W)."""
    chosen = ExportOptions(height=HEIGHT_PX, width=WIDTH_PX, **options)
    graphs = {graph.spec.name: graph for graph in build_graphs(student, chosen)}

    def run(name, pool):
        return run_graph(graphs[name], pool)[1]

    tokenizer = tokenizer_of(student.tokenizer_folder, 77)
    prompts = ["", PROMPT] if student.plan.copies == 2 else [PROMPT]
    rows = [run("text_encoder", {"input_ids": tokenizer([p])}) for p in prompts]
    text = np.concatenate([row["last_hidden_state"] for row in rows])
    return sample(student.plan, run, noises[: student.plan.noises, None], text)


FREE = {"guidance_scale": 0.0}
CASES = [
    ("sdxl-turbo", 1, EulerAncestralDiscreteScheduler, {}, FREE),
    ("sdxl-turbo", 3, EulerAncestralDiscreteScheduler, {}, FREE),
    ("lightning-1", 1, EulerDiscreteScheduler, {"prediction_type": "sample"}, FREE),
    ("lightning", 4, EulerDiscreteScheduler, {}, FREE),
    ("hyper-sdxl-1-unet", 1, LCMScheduler, {}, FREE | {"timesteps": [800]}),
    ("hyper-sd-1", 1, TCDScheduler, {}, FREE | {"eta": 1.0}),
    ("hyper-sd-2", 2, DDIMScheduler, {}, FREE),
    ("hyper-sd-4", 4, DDIMScheduler, {}, FREE),
    ("hyper-sd-8", 8, DDIMScheduler, {}, FREE),
    ("hyper-sd-8-cfg", 8, DDIMScheduler, {}, {"guidance_scale": 5.0}),
    ("hyper-sd-12-cfg", 12, DDIMScheduler, {}, {"guidance_scale": 5.0}),
    ("lcm-lora", 4, LCMScheduler, {}, {"guidance_scale": 1.0}),
    ("dmd2-sdxl", 4, LCMScheduler, {}, FREE | {"timesteps": [999, 749, 499, 249]}),
    ("dmd2-sdxl", 1, LCMScheduler, {}, FREE | {"timesteps": [399]}),
    ("tcd", 3, TCDScheduler, {}, FREE | {"eta": 0.3}),
    ("pcm", 2, TCDScheduler, {}, FREE | {"eta": 0.0}),
    ("pcm-cfg", 4, TCDScheduler, {}, {"guidance_scale": 7.5}),
    ("pcm-lcm", 4, LCMScheduler, {}, FREE),
    ("euler-ancestral", 2, EulerAncestralDiscreteScheduler, {}, FREE),
]


@pytest.mark.parametrize(("recipe", "steps", "scheduler", "settings", "call"), CASES)
def test_its_graphs_draw_what_diffusers_own_pipeline_draws(
    model, pipeline, recipe, steps, scheduler, settings, call
):
    counted = {} if "timesteps" in call else {"num_inference_steps": steps}
    noises, expected = drawn_by_diffusers(pipeline, scheduler, settings, **call, **counted)
    student = student_of(model, recipe, steps=steps)
    assert (student.plan.recipe, student.plan.one_pass) == (recipe, steps == 1)
    assert psnr_db(expected, drawn_by_graphs(student, noises)) > 105


def test_every_recipe_of_sdxl_is_held_against_diffusers():
    held = {case[0] for case in CASES} | {"lcm"}  # which needs a UNet of its own: the next test
    assert held == {recipe.name for recipe in recipes().values() if recipe.is_for(sdxl=True)}


def test_an_lcm_of_sdxl_has_its_guidance_folded_in(sdxl_folder, tmp_path):
    unet = sdxl_unet(time_cond_proj_dim=32)
    model = with_unet(sdxl_folder, tmp_path / "lcm", unet)
    call = {"num_inference_steps": 4, "guidance_scale": 8.0}
    noises, expected = drawn_by_diffusers(opened(model), LCMScheduler, {}, **call)
    student = student_of(model, None)
    assert student.plan.recipe == "lcm"
    assert psnr_db(expected, drawn_by_graphs(student, noises)) > 105


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
@pytest.mark.parametrize(("recipe", "steps"), [("lightning-1", 1), ("lightning", 2)])
def test_every_hoisting_draws_the_same(sdxl_folder, hoist, recipe, steps):
    student = student_of(sdxl_folder, recipe, steps=steps, allow_other_steps=True)
    noises = np.random.RandomState(0).standard_normal((1, 4, 8, 12)).astype(np.float32)
    naive = drawn_by_graphs(student, noises, hoist="none")
    assert psnr_db(naive, drawn_by_graphs(student, noises, hoist=hoist)) > 120


def test_the_pooled_text_is_told_to_the_network(sdxl_folder):
    student = student_of(sdxl_folder, "lightning-1")
    noise = torch.randn(1, 4, 8, 12)
    text = torch.randn(1, 78, 80)
    other = text.clone()
    other[:, -1] += 1
    with torch.no_grad():
        own, told = student.sample(noise, text), student.sample(noise, other)
    assert psnr_db(own.numpy(), told.numpy()) < 60


@pytest.mark.parametrize("prompt", ["", "a", PROMPT, "a red fox on a green river " * 20])
def test_both_encoders_read_a_prompt_as_diffusers_has_it(sdxl_folder, prompt):
    pipe = opened(sdxl_folder)
    with torch.no_grad():
        tokens, _, pooled, _ = pipe.encode_prompt(prompt, do_classifier_free_guidance=False)
    student = student_of(sdxl_folder, "lightning")
    ids = tokenizer_of(student.tokenizer_folder, 77)([prompt])
    with torch.no_grad():
        text = text_embedding(student.text_encoder, torch.from_numpy(ids))
    assert text.shape == (1, 78, 80)
    torch.testing.assert_close(text[:, :-1], tokens)
    torch.testing.assert_close(text[:, -1, :48], pooled)
    assert not text[:, -1, 48:].any()


def test_the_two_read_other_pads(sdxl_folder):
    encoder = student_of(sdxl_folder, "lightning").text_encoder
    assert encoder.second_pad != encoder.end_token


def test_guidance_leads_away_from_zeros_where_the_pipeline_says_so(sdxl_folder):
    ids = torch.tensor([[1022] + [1023] * 76])
    guided = student_of(sdxl_folder, "pcm-cfg").text_encoder
    plain = student_of(sdxl_folder, "pcm").text_encoder
    with torch.no_grad():
        assert not guided(ids).last_hidden_state.any()
        assert plain(ids).last_hidden_state.any()


def test_a_long_prompt_has_the_pooled_text_of_its_first_part(sdxl_folder):
    student = student_of(sdxl_folder, "lightning")
    tokenizer = tokenizer_of(student.tokenizer_folder, 154, 2)
    ids = torch.from_numpy(tokenizer(["fox " * 100]))
    with torch.no_grad():
        text = text_embedding(student.text_encoder, ids)
        first = text_embedding(student.text_encoder, ids[:, :77])
        second = text_embedding(student.text_encoder, ids[:, 77:])
    assert text.shape == (1, 155, 80)
    torch.testing.assert_close(text[:, :77], first[:, :77])
    torch.testing.assert_close(text[:, 77:154], second[:, :77])
    torch.testing.assert_close(text[:, -1], first[:, -1])


def test_a_student_in_one_pass_over_four_timesteps_is_cut_without_loss(model):
    student = load_student(model, steps=4)
    noise = torch.randn(2, 4, 8, 12, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 78, 80, generator=torch.Generator().manual_seed(1))
    with torch.no_grad():
        outputs = student.decode(student.encode(noise, text), text)
        whole = UNet2DConditionModel.forward(
            student.unet,
            noise,
            student.plan.timesteps[0],
            text[:, :-1],
            added_cond_kwargs={
                "text_embeds": text[:, -1, :48],
                "time_ids": torch.tensor([[64, 96, 0, 0, 64, 96]] * 2),
            },
        ).sample
    rows = outputs.numpy()
    assert psnr_db(whole.numpy(), rows[:2]) > 120
    assert psnr_db(rows[:2], rows[2:4]) < 90


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
@pytest.mark.parametrize("fan_out", [None, "1", "1.1", "3"])
def test_its_rows_part_late_as_well(sdxl_folder, hoist, fan_out):
    student = load_student(sdxl_folder, steps=4)
    place = None if fan_out is None else FanOut.parse(fan_out)
    options = ExportOptions(batch=2, hoist=hoist, fan_out=place)
    noise = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    text = torch.randn(2, 78, 80, generator=torch.Generator().manual_seed(1))
    graphs = build_graphs(student, options, ("unet_encoder", "unet_decoder"))
    pool = {"sample": noise.numpy(), "encoder_hidden_states": text.numpy()}
    for graph in graphs:
        pool |= run_graph(graph, pool)[1]
    plan = student.plan if place is None else student.plan.parting_at(place)
    with torch.no_grad():
        expected = student.by_plan(plan).sample(noise, text).numpy()
    assert psnr_db(expected, pool["latents"]) > 120


# --- what it is, and what it is not


@pytest.mark.parametrize(
    ("scheduler", "recipe", "of_sd"),
    [
        ("EulerDiscreteScheduler", "lightning", "sd-turbo"),
        ("EulerAncestralDiscreteScheduler", "sdxl-turbo", "euler-ancestral"),
        ("LCMScheduler", "lcm", "lcm"),
    ],
)
def test_its_scheduler_tells_which_student_it_is(scheduler, recipe, of_sd):
    config = {"_class_name": scheduler, "timestep_spacing": "trailing"}
    sdxl = dict(sdxl_unet().config)
    assert recipe_of(CheckpointFacts("x", config, sdxl)) == recipe
    assert recipe_of(CheckpointFacts("x", config, {})) == of_sd


def test_a_recipe_of_the_other_kind_is_refused(sdxl_folder, ordinary_model):
    with pytest.raises(ScheduleError, match="sd-turbo is for Stable Diffusion") as error:
        student_of(sdxl_folder, "sd-turbo")
    assert "lightning-1" in str(error.value.next_step)
    assert "instaflow" not in str(error.value.next_step)
    with pytest.raises(ScheduleError, match="dmd2-sdxl is for SDXL; model is a model of Stable"):
        student_of(ordinary_model, "dmd2-sdxl")


def test_it_trains_as_any_student(sdxl_folder):
    student = load_student(sdxl_folder, steps=4)
    latents = student.sample(torch.randn(1, 4, 8, 8), torch.randn(1, 78, 80))
    latents.square().mean().backward()
    assert student.unet.add_embedding.linear_1.weight.grad.abs().sum() > 0
