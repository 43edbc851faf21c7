"""Faster Diffusion is exact where it must be: plans, sums, graphs and loop against diffusers."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionPipeline
from hypothesis import given
from hypothesis import strategies as st
from teachers import load_teacher

from tiue_export.checkpoint.family import load_family
from tiue_export.errors import ScheduleError, TiueError, UsageError
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.scheduler import diffusers_scheduler, plan_from_config
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.ddim import alphas_cumprod
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.key_step_plan import (
    ddim_trajectory,
    injection_from,
    key_steps_from,
    make_plan,
)
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.sampling.plan import Combination, Injection
from tiue_export.sampling.plan_change import PlanChange, changed_plan
from tiue_export.sampling.sampler import combined, guidance_rows, sample
from tiue_export.specs import UNET_DECODER, UNET_ENCODER, UNET_GRAPHS

SD = load_family("tiny").scheduler
EXACT_DB = 110.0
STEPS = 8
KEYS = (0, 1, 3, 6)
SCHEDULERS = ("ddim", "dpmpp", "pndm")


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path):
    """Eight DDIM steps, four of them key. Shared: do not change it."""
    return load_teacher(teacher_folder, options=FasterOptions(steps=STEPS, key_steps=KEYS))


def planned(teacher, **options):
    """The plan of other options."""
    return plan_from_config(teacher.scheduler_config, FasterOptions(steps=STEPS, **options))


def run_in_torch(teacher, batch: int = 1, hoist: str = "decoder"):
    """Runs a model's UNet graphs by name, and keeps what passed: (run, log)."""
    options = ExportOptions(hoist=hoist, batch=batch)
    graphs = {g.spec.name: g for g in build_graphs(teacher, options, only=UNET_GRAPHS)}
    log = []

    def run(name, pool):
        feeds, outputs = run_graph(graphs[name], pool)
        log.append((name, feeds, outputs))
        return outputs

    return run, log


def request(batch: int = 1):
    """Noise (B, 4, 8, 8) and text (2B, 77, 32)."""
    random = np.random.RandomState(batch)
    text = random.standard_normal((2 * batch, 77, 32)).astype(np.float32)
    return noise_from_seed(0, (batch, 4, 8, 8)), text


def draw(plan, run, noise, text, *rest, **options):
    """Latents of a plan without fresh noise."""
    return sample(plan, run, noise[None], text, *rest, **options)


def plain_sampling(teacher, scheduler: str, noise, text, guidance: float):
    """diffusers' own pipeline on the same weights: latents (B, 4, H, W)."""
    pipeline = StableDiffusionPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=None,
        unet=teacher.unet,
        scheduler=diffusers_scheduler(teacher.scheduler_config, scheduler, STEPS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    half = len(text) // 2
    return pipeline(
        prompt_embeds=torch.from_numpy(text[half:]),
        negative_prompt_embeds=torch.from_numpy(text[:half]),
        latents=torch.from_numpy(noise),
        num_inference_steps=STEPS,
        guidance_scale=guidance,
        output_type="latent",
    ).images.numpy()


class HookedUnet:
    """Faster Diffusion on an unmodified UNet, written the other way round: hooks and one by one.

    conv_in, down and mid blocks run at every step, but at other than key steps their outputs are
    replaced by those of the last key step.
    """

    def __init__(self, unet) -> None:
        self.unet, self.kept, self.key = unet, {}, True
        parts = [unet.conv_in, *unet.down_blocks, unet.mid_block]
        self.hooks = [part.register_forward_hook(self._hook) for part in parts]

    def _hook(self, part, inputs, output):
        if self.key:
            self.kept[part] = output
        return self.kept[part]

    @torch.no_grad()
    def sample(self, scheduler, keys, noise, text, guidance, injection: Injection | None):
        start = torch.from_numpy(noise)
        latents, text = start, torch.from_numpy(text)
        for step, timestep in enumerate(scheduler.timesteps):
            added = 0.0
            if injection is not None and int(timestep) / 1000 < injection.below:
                added = injection.strength * start
            if injection is not None and injection.placement == "sequential":
                latents, added = latents + added, 0.0
            self.key = step in keys
            output = self.unet(torch.cat([latents, latents]), timestep, text).sample
            without, conditioned = output.chunk(2)
            output = without + guidance * (conditioned - without)
            latents = scheduler.step(output, timestep, latents + added).prev_sample
        return latents.numpy()

    def close(self) -> None:
        for hook in self.hooks:
            hook.remove()


@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_with_every_step_a_key_step_it_is_diffusers_plain_sampling(teacher, scheduler):
    noise, text = request()
    plan = planned(teacher, scheduler=scheduler, key_steps="uniform:1", inject="off")
    run, _ = run_in_torch(teacher)
    ours = draw(plan, run, noise, text, 7.5)
    theirs = plain_sampling(teacher, scheduler, noise, text, 7.5)
    assert psnr_db(theirs, ours) >= EXACT_DB


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
def test_the_first_rows_of_each_group_are_the_ordinary_unet_at_its_key_step(teacher, hoist):
    noise, text = request()
    run, log = run_in_torch(teacher, hoist=hoist)
    draw(teacher.plan, run, noise, text)
    encoders = [feeds for name, feeds, _ in log if name == UNET_ENCODER]
    decoders = [outputs for name, _, outputs in log if name == UNET_DECODER]
    assert len(encoders) == len(decoders) == len(KEYS)
    for feeds, outputs, key in zip(encoders, decoders, KEYS, strict=True):
        assert feeds["timestep"][0] == teacher.plan.timesteps[key]
        tensors = (torch.from_numpy(feeds[k]) for k in ("sample", "encoder_hidden_states"))
        sample, embedding = tensors
        with torch.no_grad():
            whole = teacher.unet(sample, int(feeds["timestep"][0]), embedding).sample
        assert psnr_db(whole.numpy(), outputs["outputs"][:2]) >= EXACT_DB


@pytest.mark.parametrize("inject", ["off", "parallel", "sequential"])
@pytest.mark.parametrize("scheduler", SCHEDULERS)
def test_it_equals_an_independent_implementation_by_hooks(teacher, scheduler, inject):
    noise, text = request()
    plan = planned(teacher, scheduler=scheduler, key_steps=KEYS, inject=inject)
    run, _ = run_in_torch(teacher)
    ours = draw(plan, run, noise, text, 7.5)
    hooked = HookedUnet(teacher.unet)
    try:
        own = diffusers_scheduler(teacher.scheduler_config, scheduler, STEPS)
        theirs = hooked.sample(own, KEYS, noise, text, 7.5, injection_from(inject))
    finally:
        hooked.close()
    assert psnr_db(theirs, ours) >= EXACT_DB


def test_sharing_features_and_injection_do_change_the_picture(teacher):
    noise, text = request()
    run, _ = run_in_torch(teacher)
    latents = [
        draw(planned(teacher, key_steps=keys, inject=inject), run, noise, text)
        for keys, inject in (("uniform:1", "off"), (KEYS, "off"), (KEYS, "parallel"))
    ]
    assert psnr_db(latents[0], latents[1]) < 80
    assert psnr_db(latents[1], latents[2]) < 80


@pytest.mark.parametrize("rows", [2, 3, 4, 30])
def test_small_pieces_of_a_group_are_exact(teacher, rows):
    noise, text = request()
    run, log = run_in_torch(teacher)
    whole = draw(teacher.plan, run, noise, text)
    log.clear()
    plan = replace(teacher.plan, max_decoder_rows=rows)
    cut = draw(plan, run, noise, text)
    assert psnr_db(whole, cut) >= EXACT_DB
    sizes = [len(outputs["outputs"]) for name, _, outputs in log if name == UNET_DECODER]
    assert max(sizes) <= rows
    assert sum(sizes) == 2 * STEPS
    assert sum(name == UNET_ENCODER for name, _, _ in log) == len(KEYS)


def test_fewer_rows_than_one_step_has_are_refused(teacher):
    noise, text = request()
    plan = replace(teacher.plan, max_decoder_rows=1)
    with pytest.raises(UsageError) as caught:
        draw(plan, run_in_torch(teacher)[0], noise, text)
    assert caught.value.message == "at most 1 decoder rows were allowed; one step takes 2"


def test_rows_of_a_batch_have_their_own_guidance_and_text(teacher):
    noise, text = request(2)
    run, _ = run_in_torch(teacher, batch=2)
    together = draw(teacher.plan, run, noise, text, [7.5, 2.0])
    alone, _ = run_in_torch(teacher)
    for row, guidance in enumerate((7.5, 2.0)):
        own = text[[row, row + 2]]
        expected = draw(teacher.plan, alone, noise[row : row + 1], own, guidance)
        assert psnr_db(expected, together[row : row + 1]) >= EXACT_DB


def test_progress_is_told_after_every_piece(teacher):
    noise, text = request()
    heard = []
    draw(
        replace(teacher.plan, max_decoder_rows=4),
        run_in_torch(teacher)[0],
        noise,
        text,
        on_step=lambda done, total: heard.append((done, total)),
    )
    assert heard == [(done, STEPS) for done in (1, 3, 5, 6, 8)]


# Plans


@pytest.mark.parametrize("placement", ["parallel", "sequential"])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction", "sample"])
def test_the_sums_of_a_plan_are_the_ddim_loop(prediction, placement):
    config = {**SD, "prediction_type": prediction}
    injection = Injection(placement=placement)
    plan = plan_from_config(config, FasterOptions(inject=placement))
    random = np.random.RandomState(0)
    noise, outputs = random.standard_normal(64), random.standard_normal((50, 64))
    alphas = alphas_cumprod(config)
    sample, seen = noise, {}
    for k, timestep in enumerate(plan.timesteps):
        added = injection.strength * noise if timestep < 500 else 0.0
        seen[k] = sample + added if placement == "sequential" else sample
        a, target = alphas[timestep], alphas[max(timestep - 20, 0)]
        if prediction == "epsilon":
            eps = outputs[k]
            x0 = (sample + added - np.sqrt(1 - a) * eps) / np.sqrt(a)
        elif prediction == "v_prediction":
            x0 = np.sqrt(a) * (sample + added) - np.sqrt(1 - a) * outputs[k]
            eps = np.sqrt(a) * outputs[k] + np.sqrt(1 - a) * (sample + added)
        else:
            x0 = outputs[k]
            eps = (sample + added - np.sqrt(a) * x0) / np.sqrt(1 - a)
        sample = np.sqrt(target) * x0 + np.sqrt(1 - target) * eps
    ours = plan.latents.noise * noise + plan.latents.outputs @ outputs
    np.testing.assert_allclose(ours, sample, rtol=1e-10, atol=1e-10)
    for group in plan.passes:
        weights = np.array(group.input.outputs)
        start = group.input.noise * noise + weights @ outputs[: group.first_row]
        np.testing.assert_allclose(start, seen[group.first_row], rtol=1e-10, atol=1e-10)


def test_a_group_telescopes_to_the_published_closed_form():
    """z_out = sqrt(a_e/a_s) z_s + sum sqrt(a_e) g_k eps_k + 0.003 sum_{t<500} sqrt(a_e/a_k) z_T."""
    plan = plan_from_config(SD, FasterOptions())
    alphas = alphas_cumprod(SD)
    random = np.random.RandomState(1)
    noise, outputs = random.standard_normal(64), random.standard_normal((50, 64))
    times = [alphas[t] for t in plan.timesteps] + [alphas[0]]
    ends = [group.first_row for group in plan.passes[1:]] + [50]
    starts = [*plan.passes[1:], None]
    for group, end, following in zip(plan.passes, ends, starts, strict=True):
        s, last = group.first_row, times[end]
        z = group.input.noise * noise
        z = z + np.array(group.input.outputs) @ outputs[:s]
        z = np.sqrt(last / times[s]) * z
        for k in range(s, end):
            gap = np.sqrt(1 / times[k + 1] - 1) - np.sqrt(1 / times[k] - 1)
            z = z + np.sqrt(last) * gap * outputs[k]
            if plan.timesteps[k] < 500:
                z = z + 0.003 * np.sqrt(last / times[k]) * noise
        final = plan.latents if following is None else following.input
        ours = final.noise * noise + np.array(final.outputs) @ outputs[:end]
        np.testing.assert_allclose(ours, z, rtol=1e-10, atol=1e-10)


def test_the_noise_injected_weighs_what_was_computed_for_the_paper():
    plain, injected = (
        plan_from_config(SD, FasterOptions(inject=inject)).latents.noise for inject in ("off", "on")
    )
    assert injected - plain == pytest.approx(0.0957, abs=1e-4)


def test_with_one_group_and_no_injection_the_plan_is_the_students_formula():
    from tiue_export.sampling.ddim import one_pass_plan

    options = FasterOptions(steps=4, key_steps=(0,), inject="off")
    plan = plan_from_config(SD, options)
    expected = one_pass_plan(SD, 4)
    assert plan.timesteps == expected.timesteps
    assert plan.latents.noise == pytest.approx(expected.latents.noise, rel=1e-12)
    assert plan.latents.outputs == pytest.approx(expected.latents.outputs, rel=1e-12)
    assert [group.rows for group in plan.passes] == [4]


@pytest.mark.parametrize(
    ("scheduler", "steps", "keys", "sizes"),
    [
        ("ddim", 50, (0, 1, 2, 3, 5, 10, 15, 25, 35), [1, 1, 1, 2, 5, 5, 10, 10, 15]),
        ("dpmpp", 20, (0, 1, 2, 3, 5, 10, 15), [1, 1, 1, 2, 5, 5, 5]),
        ("pndm", 50, (0, 1, 2, 3, 5, 10, 15, 25, 35), [1, 1, 1, 2, 5, 5, 10, 10, 16]),
    ],
)
def test_the_published_key_steps_are_the_default(scheduler, steps, keys, sizes):
    plan = plan_from_config(SD, FasterOptions(scheduler=scheduler))
    assert (plan.steps, plan.key_steps) == (steps, keys)
    assert [group.rows for group in plan.passes] == sizes
    assert plan.problem() is None


def test_the_key_timesteps_of_50_ddim_steps_are_the_papers():
    plan = plan_from_config(SD, FasterOptions())
    assert [g.timesteps[0] for g in plan.passes] == [981, 961, 941, 921, 881, 781, 681, 481, 281]


@given(st.integers(1, 60), st.integers(1, 70))
def test_a_uniform_stride_covers_every_step(steps, stride):
    keys = key_steps_from(f"uniform:{stride}", steps)
    assert keys[0] == 0
    assert all(key % stride == 0 for key in keys)
    assert keys[-1] + stride >= steps


@given(st.data(), st.integers(2, 40))
def test_any_rising_list_makes_a_plan_that_does_not_contradict_itself(data, steps):
    rest = data.draw(st.sets(st.integers(1, steps - 1), max_size=steps))
    trajectory = ddim_trajectory(SD, steps)
    plan = make_plan(
        "ddim",
        trajectory,
        (0, *sorted(rest)),
        steps=steps,
        prediction_type="epsilon",
        timestep_spacing="leading",
    )
    assert plan.problem() is None
    assert plan.key_steps == (0, *sorted(rest))


@given(
    steps=st.integers(1, 60),
    key_steps=st.sampled_from(["nonuniform", "uniform:1", "uniform:4", (0,)]),
    inject=st.sampled_from(["off", "parallel", "sequential"]),
    guidance=st.floats(1, 20),
    chosen_by=st.sampled_from(["", "auto, 2 prompts"]),
)
def test_a_plan_asked_for_what_it_is_stays_itself(**options):
    plan = plan_from_config(SD, FasterOptions(**options))
    named = PlanChange(steps=plan.steps, inject=options["inject"])
    for change in (PlanChange(), named):
        assert changed_plan(SD, plan, change) == plan


@given(st.integers(1, 60), st.sampled_from(["nonuniform", "uniform:4"]))
def test_key_steps_by_a_rule_follow_the_number_of_steps(steps, rule):
    plan = plan_from_config(SD, FasterOptions(key_steps=rule))
    changed = changed_plan(SD, plan, PlanChange(steps=steps))
    assert changed == plan_from_config(SD, FasterOptions(steps=steps, key_steps=rule))


def test_the_plan_of_a_multistep_sampler_is_fixed_but_for_the_rows():
    plan = plan_from_config(SD, FasterOptions(scheduler="dpmpp"))
    with pytest.raises(UsageError) as caught:
        changed_plan(SD, plan, PlanChange(key_steps="uniform:1"))
    assert "the bundle draws by dpmpp, whose coefficients were found at its export" in str(
        caught.value
    )
    bounded = changed_plan(SD, plan, PlanChange(max_decoder_rows=4))
    assert bounded == replace(plan, max_decoder_rows=4)


def test_a_long_schedule_stretches_the_published_list():
    assert key_steps_from("nonuniform", 102) == (0, 2, 4, 6, 10, 20, 30, 50, 70)


@pytest.mark.parametrize(
    ("text", "message", "hint"),
    [
        (
            "1,5,9",
            "--key-steps 1,5,9 does not start at 0: the first step has no features to use",
            "Type --key-steps 0,1,5,9",
        ),
        ("0,9,5", "--key-steps 0,9,5 is not in rising order", "Type --key-steps 0,5,9"),
        ("0,5,5", "--key-steps 0,5,5 is not in rising order", "Type --key-steps 0,5"),
        (
            "0,5,50",
            "--key-steps ends at 50; there are 50 steps, 0 to 49",
            "Shorten the list, or raise --steps.",
        ),
        ("uniform:0", "--key-steps is uniform:0; expected a stride of 1 or more", None),
        (
            "early",
            "--key-steps is 'early'; expected nonuniform, uniform:N, auto or step numbers",
            "Such as --key-steps 0,1,2,3,5,10,15,25,35",
        ),
    ],
)
def test_key_steps_that_cannot_be_are_refused_with_what_to_type(text, message, hint):
    with pytest.raises(UsageError) as caught:
        key_steps_from(text, 50)
    assert (caught.value.message, caught.value.next_step) == (message, hint)


@pytest.mark.parametrize(
    ("name", "reason"),
    [
        ("euler", "--scheduler euler scales the network's input at every step"),
        ("euler-a", "--scheduler euler-a draws fresh noise at every step"),
        ("ddmp", "unknown scheduler 'ddmp'"),
    ],
)
def test_samplers_that_no_plan_can_hold_are_refused_by_name(name, reason):
    with pytest.raises(TiueError) as caught:
        plan_from_config(SD, FasterOptions(scheduler=name))
    assert caught.value.message.startswith(reason)


def test_a_stochastic_dpm_solver_in_the_checkpoint_is_refused():
    with pytest.raises(ScheduleError, match="algorithm_type sde-dpmsolver"):
        plan_from_config(
            {**SD, "algorithm_type": "sde-dpmsolver++"}, FasterOptions(scheduler="dpmpp")
        )


def test_a_wrong_injection_guidance_or_row_count_is_refused():
    with pytest.raises(UsageError, match="unknown injection 'onn'"):
        injection_from("onn")
    with pytest.raises(UsageError, match=r"guidance is 0\.5; expected 1 \(off\)"):
        plan_from_config(SD, FasterOptions(guidance=0.5))
    with pytest.raises(UsageError, match="--max-decoder-rows is 0"):
        plan_from_config(SD, FasterOptions(max_decoder_rows=0))
    with pytest.raises(UsageError, match="guidance has 3 scales for 2 pictures"):
        guidance_rows([1, 2, 3], 2)
    with pytest.raises(UsageError, match="guidance is nan"):
        guidance_rows(float("nan"), 2)


def test_a_combination_ignores_outputs_that_have_no_weight_yet():
    noise, outputs = np.ones((1, 2), np.float32), np.full((3, 1, 2), np.nan, np.float32)
    outputs[0] = 2
    terms = Combination(3.0, (0.5,))
    np.testing.assert_array_equal(combined(terms, noise[None], outputs), [[4, 4]])


# Checkpoints


def test_a_distilled_student_is_refused(tiny_pipeline):
    with pytest.raises(ScheduleError) as caught:
        load_teacher(tiny_pipeline)
    assert "is a distilled student (it records K=4)" in caught.value.message
