"""What a distillation is made of: its draws, its scores, its networks, the CLIP term."""

from __future__ import annotations

import importlib
import json
import math
import shutil
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from accelerate import Accelerator
from diffusers import AutoencoderTiny, DDPMScheduler, UNet2DConditionModel
from torch import Tensor
from transformers import CLIPConfig, CLIPModel, CLIPTextConfig, CLIPTokenizer, CLIPVisionConfig

from tiue_export import load_student
from tiue_export.benchmarks.synthetic import write_synthetic_pipeline
from tiue_export.checkpoint.family import load_family
from tiue_export.errors import (
    CheckpointError,
    ScheduleError,
    UnsupportedModelError,
    UsageError,
)
from tiue_export.graphs.shapes import shapes_of
from tiue_export.train.clip_term import load_clip_term
from tiue_export.train.config import DistillConfig
from tiue_export.train.distill import distill
from tiue_export.train.learner import learning_rate_factor
from tiue_export.train.losses import add_noise
from tiue_export.train.networks import Networks, load_networks
from tiue_export.train.sample_grid import draw_grid
from tiue_export.train.score_distillation import draw
from tiue_export.train.score_networks import (
    adapter_parameters,
    add_adapters,
    guided_scores,
    without_adapters,
)

CPU = torch.device("cpu")
PROMPTS = ["a red fox", "an owl", "a cat", "a dog", "a blue house", "two boats"]


@pytest.fixture(scope="module")
def networks(tiny_distillation: DistillConfig) -> Networks:
    """What `tiny_distillation` starts from. Shared: do not change it."""
    return load_networks(tiny_distillation, CPU)


# Pictures and attention


def test_pictures_come_from_fixed_noise_whatever_the_batch(networks):
    def sample(noises: Tensor, text: Tensor) -> Tensor:
        return networks.student.sample(noises[0], text)

    grid = draw_grid(networks, sample, ["an owl", "a cat"], seeds=3, batch=2)
    assert (tuple(grid.shape), grid.dtype) == ((2, 3, 64, 64, 3), torch.uint8)
    alone = draw_grid(networks, sample, ["a cat"], seeds=3, batch=8)
    assert int((grid[1].int() - alone[0].int()).abs().max()) <= 1


def test_plain_attention_computes_what_the_fused_one_does(networks, tiny_distillation):
    plain = load_networks(replace(tiny_distillation, plain_attention=True), CPU)
    noise = torch.randn(1, *networks.latent_shape, generator=torch.Generator().manual_seed(0))
    text = networks.embed(["an owl"])
    with torch.no_grad():
        torch.testing.assert_close(
            plain.student.sample(noise, text),
            networks.student.sample(noise, text),
            atol=1e-4,
            rtol=0,
        )


# What a step draws


def test_processes_share_one_draw_and_micro_batches_cut_it(tiny_distillation):
    config = replace(tiny_distillation, batch=6)
    whole = draw(config, PROMPTS, (4, 8, 8), step=3)
    halves = [draw(config, PROMPTS, (4, 8, 8), 3, rank, 2) for rank in (0, 1)]
    assert halves[0].prompts + halves[1].prompts == whole.prompts
    assert torch.equal(torch.cat([half.vsd_noise for half in halves]), whole.vsd_noise)
    parts = list(whole.slices(4, CPU))
    assert [len(part.prompts) for part in parts] == [4, 2]
    assert torch.equal(torch.cat([part.fake_timesteps for part in parts]), whole.fake_timesteps)


def test_a_draw_depends_on_seed_and_step_alone(tiny_distillation):
    first, again = (draw(tiny_distillation, PROMPTS, (4, 8, 8), step=5) for _ in range(2))
    assert torch.equal(first.noise, again.noise)
    for other in (
        draw(tiny_distillation, PROMPTS, (4, 8, 8), 6),
        draw(replace(tiny_distillation, seed=1), PROMPTS, (4, 8, 8), 5),
    ):
        assert not torch.equal(first.noise, other.noise)
    assert not torch.equal(first.noise, first.vsd_noise)
    assert not torch.equal(first.vsd_noise, first.fake_noise)


def test_every_epoch_takes_each_prompt_once_in_an_order_of_its_own(tiny_distillation):
    config = replace(tiny_distillation, batch=4)
    drawn = [p for step in range(9) for p in draw(config, PROMPTS, (4, 2, 2), step).prompts]
    epochs = [drawn[first : first + 6] for first in range(0, 36, 6)]
    assert all(sorted(epoch) == sorted(PROMPTS) for epoch in epochs)
    assert len({tuple(epoch) for epoch in epochs}) > 1


def test_timesteps_and_null_prompts_have_the_published_ranges(tiny_distillation):
    config = replace(tiny_distillation, batch=4000)
    drawn = draw(config, PROMPTS, (4, 1, 1), 0)
    assert (int(drawn.vsd_timesteps.min()), int(drawn.vsd_timesteps.max())) == (20, 980)
    assert int(drawn.fake_timesteps.min()) < 5
    assert 994 < int(drawn.fake_timesteps.max()) <= 999
    assert float(drawn.null.float().mean()) == pytest.approx(0.1, abs=0.02)
    assert not draw(replace(config, null_share=0.0), PROMPTS, (4, 1, 1), 0).null.any()


def test_noise_is_added_as_diffusers_adds_it(networks):
    settings = {k: v for k, v in load_family("tiny").scheduler.items() if k.startswith("beta")}
    scheduler = DDPMScheduler(**settings)
    latents, noise = torch.randn(2, 3, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    timesteps = torch.tensor([0, 500, 999])
    torch.testing.assert_close(
        add_noise(latents, noise, networks.alphas[timesteps]),
        scheduler.add_noise(latents, noise, timesteps),
        atol=1e-5,
        rtol=1e-5,
    )


def test_the_learning_rate_is_constant_unless_it_is_told_to_warm_up_and_fall(tiny_distillation):
    assert [learning_rate_factor(tiny_distillation, step) for step in (0, 2, 3)] == [1, 1, 1]
    config = replace(tiny_distillation, iterations=100, warmup_steps=3, final_rate=0.2)
    assert learning_rate_factor(config, 0) == pytest.approx(0.25, rel=1e-3)
    assert learning_rate_factor(config, 50) == pytest.approx(0.2 + 0.8 * 0.5)
    assert learning_rate_factor(config, 100) == pytest.approx(0.2)


# Teacher and fake score


def test_adapters_start_as_the_identity_and_off_they_are_the_teacher_bit_for_bit(tiny_distillation):
    unet = load_student(tiny_distillation.teacher).unet
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, 4, 8, 8, generator=generator)
    text = torch.randn(2, 77, 32, generator=generator)
    timesteps = torch.tensor([20, 980])
    with torch.no_grad():
        teacher = unet(noisy, timesteps, text).sample
        scores = add_adapters(unet, rank=4, alpha=7, targets=("to_q", "to_v"), seed=0)
        assert torch.equal(scores(noisy, timesteps, text).sample, teacher)
        for parameter in adapter_parameters(scores):
            parameter.add_(0.1)
        assert not torch.equal(scores(noisy, timesteps, text).sample, teacher)
        with without_adapters(scores):
            assert torch.equal(scores(noisy, timesteps, text).sample, teacher)
        assert not torch.equal(scores(noisy, timesteps, text).sample, teacher)


def test_adapters_are_on_all_attentions_and_all_that_is_trainable(networks):
    names = [name for name, p in networks.teacher.named_parameters() if p.requires_grad]
    assert names
    assert all(".to_q.lora_" in name or ".to_v.lora_" in name for name in names)
    attentions = {name.split(".to_")[0] for name in names}
    assert {name.rpartition(".")[2] for name in attentions} == {"attn1", "attn2"}
    assert len(names) == 4 * len(attentions)


def test_adapters_are_seeded_and_scaled_by_alpha_over_rank(tiny_distillation):
    drawn = []
    for seed in (0, 0, 1):
        torch.manual_seed(99)
        unet = load_student(tiny_distillation.teacher).unet
        add_adapters(unet, rank=4, alpha=6, targets=("to_q",), seed=seed)
        drawn.append(torch.cat([p.flatten() for p in adapter_parameters(unet)]).detach())
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])
    layer = next(m for m in unet.modules() if hasattr(m, "scaling"))
    assert layer.scaling == {"fake_score": 1.5}


def test_both_scores_are_guided_with_the_null_prompt(networks):
    generator = torch.Generator().manual_seed(0)
    noisy = torch.randn(2, *networks.latent_shape, generator=generator)
    text, null = networks.embed(["an owl", "a cat"]), networks.embed([""])
    timesteps = torch.tensor([100, 700])
    both = guided_scores(networks.teacher, noisy, timesteps, text, null, 4.5)
    with torch.no_grad():
        conditional, unconditional = (
            networks.teacher(noisy, timesteps, embedded).sample
            for embedded in (text, null.expand_as(text))
        )
    wanted = unconditional + 4.5 * (conditional - unconditional)
    for score in both:
        torch.testing.assert_close(score, wanted, atol=1e-4, rtol=1e-4)
        assert not score.requires_grad
    assert all(p.grad is None for p in networks.teacher.parameters())
    assert len(adapter_parameters(networks.teacher)) > 0


def test_an_error_inside_leaves_the_adapters_on(networks):
    with pytest.raises(ZeroDivisionError), without_adapters(networks.teacher):
        _ = 1 / 0
    layer = next(m for m in networks.teacher.modules() if hasattr(m, "lora_A"))
    assert layer.disable_adapters is False


def test_unknown_adapter_targets_are_refused(tiny_distillation):
    with pytest.raises(UsageError, match=r"lora_targets to_z cannot be adapted: .*to_z") as caught:
        load_networks(replace(tiny_distillation, lora_targets=("to_z",)), CPU)
    assert caught.value.next_step == "The paper adapts to_q and to_v."


def test_a_teacher_in_half_precision_trains_in_float32_on_a_cpu(tiny_distillation, tmp_path):
    half = write_synthetic_pipeline(tmp_path / "half", "tiny", dtype=torch.float16)
    loaded = load_networks(replace(tiny_distillation, teacher=str(half)), CPU)
    for model in (loaded.student, loaded.teacher, loaded.text_encoder, loaded.vae):
        assert {p.dtype for p in model.parameters()} == {torch.float32}
    assert loaded.embed(["an owl"]).dtype == torch.float32


def test_prompts_become_the_ids_that_the_teachers_own_tokenizer_gives(networks):
    prompts = ["a red fox", "", "An OWL; two cafés!", "house " * 100]
    own = CLIPTokenizer.from_pretrained(networks.tokenizer_folder)
    wanted = own(prompts, padding="max_length", truncation=True, max_length=77)["input_ids"]
    assert networks.tokenizer(prompts).tolist() == wanted


# The one-step student and the CLIP term


def test_the_one_step_student_is_swiftbrushs_formula(tiny_distillation):
    loaded = load_networks(
        replace(tiny_distillation, method="one-step", steps=1, kl_weight=0.0), CPU
    )
    schedule = loaded.student.plan
    alpha = float(loaded.alphas[999])
    assert schedule.timesteps == (999,)
    assert alpha == pytest.approx(0.004660, abs=1e-6)
    assert schedule.latents.noise == pytest.approx(1 / math.sqrt(alpha), rel=1e-4)
    (weight,) = schedule.latents.outputs
    assert weight == pytest.approx(-math.sqrt(1 - alpha) / math.sqrt(alpha), rel=1e-4)
    # The published code has 0.0047 in place of alpha: S = 14.586, E = -14.552.
    assert schedule.latents.noise == pytest.approx(14.586, rel=0.005)
    assert weight == pytest.approx(-14.552, rel=0.005)
    noise = torch.randn(1, *loaded.latent_shape, generator=torch.Generator().manual_seed(0))
    text = loaded.embed(["an owl"])
    with torch.no_grad():
        whole = loaded.student.unet(noise, torch.tensor([999]), text).sample
        wanted = (noise - math.sqrt(1 - alpha) * whole) / math.sqrt(alpha)
        torch.testing.assert_close(loaded.student.sample(noise, text), wanted, atol=1e-3, rtol=1e-3)


@pytest.fixture(scope="module")
def clip_folders(tiny_pipeline: Path, tmp_path_factory) -> dict[str, str]:
    """A CLIPModel and a small decoder, with random weights."""
    folder = tmp_path_factory.mktemp("clip")
    sizes = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    sizes |= {"num_attention_heads": 2, "projection_dim": 8}
    text = {
        **sizes,
        "vocab_size": 1024,
        "bos_token_id": 1022,
        "eos_token_id": 1023,
        "pad_token_id": 1,
    }
    config = CLIPConfig(
        text_config=CLIPTextConfig(**text).to_dict(),
        vision_config=CLIPVisionConfig(**sizes, image_size=32, patch_size=16).to_dict(),
        projection_dim=8,
    )
    torch.manual_seed(0)
    CLIPModel(config).save_pretrained(folder / "clip")
    for name in ("vocab.json", "merges.txt", "tokenizer_config.json"):
        shutil.copy(tiny_pipeline / "tokenizer" / name, folder / "clip")
    channels = {"encoder_block_out_channels": (8,) * 4, "decoder_block_out_channels": (8,) * 4}
    AutoencoderTiny(**channels).save_pretrained(folder / "taesd")
    return {"clip_model": str(folder / "clip"), "clip_decoder": str(folder / "taesd")}


def test_the_clip_terms_weight_falls_linearly_to_zero(tiny_distillation, clip_folders):
    term = load_clip_term(replace(tiny_distillation, clip_decay_steps=100, **clip_folders), CPU)
    assert [term.weight(step) for step in (0, 50, 100, 1000)] == [0.1, 0.05, 0.0, 0.0]
    # The paper's: over three epochs of 22,168 steps it reaches 0.0625.
    term = load_clip_term(replace(tiny_distillation, **clip_folders), CPU)
    assert term.weight(66_504) == pytest.approx(0.0625, abs=1e-4)
    assert load_clip_term(tiny_distillation, CPU) is None


def test_the_clip_term_pushes_the_latents_alone_and_pads_do_not_matter(
    tiny_distillation, clip_folders
):
    term = load_clip_term(replace(tiny_distillation, clip_threshold=2.0, **clip_folders), CPU)
    latents = torch.randn(2, 4, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loss = term(latents, ["a red fox", "an owl"])
    loss.backward()
    assert float(latents.grad.abs().max()) > 0
    assert all(p.grad is None for p in term._clip.parameters())
    clip = CLIPModel.from_pretrained(clip_folders["clip_model"])
    decoder = AutoencoderTiny.from_pretrained(clip_folders["clip_decoder"])
    ids = torch.from_numpy(term._tokenizer(["a red fox", "an owl"]))
    mask = (ids.cumsum(1) > -1) & ((ids == 1023).cumsum(1) - (ids == 1023).int() == 0)
    with torch.no_grad():
        pictures = (decoder.decode(latents).sample / 2 + 0.5).clamp(0, 1)
        small = torch.nn.functional.interpolate(pictures, (32, 32), mode="bicubic")
        out = clip(input_ids=ids, attention_mask=mask.long(), pixel_values=small)
        cosine = (out.image_embeds * out.text_embeds).sum(-1).mean()
    assert float(loss.detach()) == pytest.approx(2.0 - float(cosine), abs=1e-5)


def test_a_run_with_the_clip_term_reports_it_and_binds_to_its_weights(
    tiny_distillation, clip_folders, tmp_path
):
    config = replace(
        tiny_distillation,
        iterations=1,
        save_every=1,
        sample_every=1,
        out=str(tmp_path / "run"),
        **clip_folders,
    )
    distill(config)
    (line,) = (tmp_path / "run" / "journal.jsonl").read_text("utf-8").splitlines()
    assert json.loads(line)["clip"] >= 0
    settings = json.loads((tmp_path / "run" / "run.json").read_text("utf-8"))
    parts = ("clip_model", "clip_decoder", "teacher", "text_encoder", "student")
    assert {f"{part}_sha256" for part in parts} <= set(settings)
    assert settings["micro_batch"] == 4


def test_clip_folders_that_hold_something_else_are_named(
    tiny_distillation, clip_folders, tiny_pipeline, tmp_path
):
    for changed, error, message in (
        ({"clip_model": str(tmp_path)}, CheckpointError, f"{tmp_path} is not a CLIPModel folder"),
        ({"clip_decoder": str(tmp_path)}, CheckpointError, "config.json cannot be read"),
        ({"clip_decoder": str(tiny_pipeline / "unet")}, UnsupportedModelError, "holds a UNet2DC"),
    ):
        with pytest.raises(error, match=message):
            load_clip_term(replace(tiny_distillation, **{**clip_folders, **changed}), CPU)


# What cannot be trained


def test_a_teacher_that_predicts_velocity_is_refused(tiny_distillation, tmp_path):
    teacher = Path(shutil.copytree(tiny_distillation.teacher, tmp_path / "v"))
    file = teacher / "scheduler" / "scheduler_config.json"
    settings = json.loads(file.read_text("utf-8"))
    file.write_text(json.dumps({**settings, "prediction_type": "v_prediction"}), "utf-8")
    with pytest.raises(
        UnsupportedModelError, match="predicts v_prediction; the losses are defined"
    ):
        load_networks(replace(tiny_distillation, teacher=str(teacher)), CPU)


@pytest.mark.parametrize("part", ["vae", "text_encoder", "tokenizer"])
def test_a_teacher_that_lacks_a_part_is_refused(tiny_distillation, part, tmp_path):
    teacher = Path(shutil.copytree(tiny_distillation.teacher, tmp_path / "t"))
    shutil.rmtree(teacher / part)
    with pytest.raises(UsageError, match="lacks a text encoder, a tokenizer or a VAE") as caught:
        load_networks(replace(tiny_distillation, teacher=str(teacher)), CPU)
    assert caught.value.next_step == "Distillation needs a whole pipeline folder."


@pytest.mark.parametrize(
    ("height", "width", "named"), [(72, 64, "height is 72"), (64, 16, "width is 16")]
)
def test_a_size_that_the_unet_cannot_halve_is_refused(tiny_distillation, height, width, named):
    with pytest.raises(UsageError) as caught:
        load_networks(replace(tiny_distillation, height=height, width=width), CPU)
    assert caught.value.message == f"{named}; expected a multiple of 32 px for this student"
    assert caught.value.next_step.startswith(f"The nearest is {named.split()[0]} ")


def test_one_step_on_the_schedule_of_many_is_refused(tiny_distillation):
    with pytest.raises(ScheduleError, match="K=1 on a 'leading' schedule"):
        load_networks(replace(tiny_distillation, steps=1), CPU)


def test_a_student_of_another_family_than_its_teacher_is_refused(tiny_distillation, tmp_path):
    config = {**load_family("tiny").unet, "cross_attention_dim": 16}
    UNet2DConditionModel.from_config(config).save_pretrained(tmp_path / "other")
    with pytest.raises(UnsupportedModelError) as caught:
        load_networks(replace(tiny_distillation, student=str(tmp_path / "other")), CPU)
    assert caught.value.message == (
        f"{tmp_path}/other has cross_attention_dim 16, its teacher {tiny_distillation.teacher} 32"
    )


def test_a_batch_that_the_processes_cannot_share_is_refused(
    tiny_distillation, networks, monkeypatch
):
    score_distillation = importlib.import_module("tiue_export.train.score_distillation")
    accelerator = Accelerator(cpu=True)
    try:
        monkeypatch.setattr(type(accelerator), "num_processes", 3)
        with pytest.raises(UsageError) as caught:
            score_distillation.ScoreDistillation(tiny_distillation, networks, PROMPTS, accelerator)
    finally:
        monkeypatch.undo()
        accelerator.state._reset_state(reset_partial_state=True)
    assert caught.value.message == "batch is 4, which 3 processes cannot share evenly"
    assert caught.value.next_step == "Set batch to a multiple of 3."


# The size


def test_without_a_size_a_run_trains_at_the_teachers_own(tiny_distillation):
    networks = load_networks(replace(tiny_distillation, height=None, width=None), CPU)
    own = networks.teacher.config.sample_size
    assert networks.latent_shape == (4, own, own)
    scale = 2 ** (len(networks.vae.config.block_out_channels) - 1)
    assert networks.size_px == (scale * own, scale * own)
    assert networks.student.unet.config.sample_size == own


def test_a_student_trained_at_another_size_records_it_and_is_exported_at_it(tiny_distillation):
    networks = load_networks(replace(tiny_distillation, height=64, width=96), CPU)
    assert networks.size_px == (64, 96)
    assert networks.student.unet.config.sample_size == [8, 12]
    assert shapes_of(networks.student).latents == (1, 4, 8, 12)
