"""Drawing that starts from a picture is what diffusers' own pipelines draw from it."""

from __future__ import annotations

import shutil

import numpy as np
import pytest
import torch
from diffusers import (
    AutoencoderTiny,
    DDIMScheduler,
    EulerAncestralDiscreteScheduler,
    EulerDiscreteScheduler,
    LatentConsistencyModelImg2ImgPipeline,
    LCMScheduler,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionInpaintPipeline,
    StableDiffusionPipeline,
    TCDScheduler,
    UNet2DConditionModel,
)
from PIL import Image

from tiue_export import ExportOptions, Pipeline, export_onnx, load_student
from tiue_export.benchmarks.synthetic import fill
from tiue_export.drawing.source_picture import source_picture
from tiue_export.errors import UsageError
from tiue_export.export.contract import export_contract
from tiue_export.graphs.build import build_graphs, taking_pictures
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.runtimes.torch_reference import TorchRuntime
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.specs import VAE_ENCODER

PROMPT = "a red fox"
SIZE = 64
SHAPE = (1, 4, 8, 8)
PICTURES = ExportOptions(with_vae_encoder=True)


def picture_of_stripes() -> np.ndarray:
    """(64, 64, 3) uint8, which no axis or channel leaves as it is."""
    y, x = np.mgrid[0:SIZE, 0:SIZE]
    stripes = np.stack([x * 4, y * 3, (x + y) % 16 * 15], axis=-1)
    return stripes.astype(np.uint8)


def left_half() -> np.ndarray:
    """(64, 64) uint8, white where is drawn anew: a rectangle whose sides latents share."""
    mask = np.zeros((SIZE, SIZE), np.uint8)
    mask[8:40, :32] = 255
    return mask


@pytest.fixture(scope="module")
def lcm_model(ordinary_model, tmp_path_factory):
    """With a guidance embedding, as full LCMs have."""
    folder = shutil.copytree(ordinary_model, tmp_path_factory.mktemp("pictures") / "lcm")
    config = UNet2DConditionModel.load_config(folder / "unet")
    unet = UNet2DConditionModel.from_config({**config, "time_cond_proj_dim": 32})
    fill(unet, torch.Generator().manual_seed(3))
    shutil.rmtree(folder / "unet")
    unet.save_pretrained(folder / "unet")
    return folder


def opened(folder, place, method=None, **options) -> Pipeline:
    """A checkpoint as a bundle that takes pictures, drawn by PyTorch."""
    request = CheckpointRequest(str(folder))
    student = load_for_method(request, method, SamplingOptions(**options))
    bundle = export_contract(student, place, PICTURES)
    graphs = build_graphs(taking_pictures(student, PICTURES), PICTURES)
    return Pipeline.open(bundle, TorchRuntime(bundle, graphs, "cpu"))


def stream(seed: int, count: int) -> np.ndarray:
    """Noises (N, 4, H, W), as a generator of torch gives them to a pipeline and its scheduler."""
    generator = torch.Generator().manual_seed(seed)
    return torch.cat([torch.randn(SHAPE, generator=generator) for _ in range(count)]).numpy()


def diffusers_latents(folder, kind, scheduler, picture, **call) -> np.ndarray:
    """What diffusers' own pipeline draws from latents of a picture, or from a picture."""
    # Not from_pretrained: of inpainting it reads diffusers' version, which our folders do not tell.
    without = {"safety_checker": None, "requires_safety_checker": False}
    parts = StableDiffusionPipeline.from_pretrained(folder, **without).components
    pipe = kind(**parts, requires_safety_checker=False)
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = scheduler.from_config(pipe.scheduler.config, timestep_spacing="trailing")
    drawn = pipe(
        PROMPT,
        image=picture,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
        **call,
    )
    return drawn.images.numpy()


def mean_latents(folder, pixels: np.ndarray) -> torch.Tensor:
    """What diffusers' VAE makes of a picture, scaled as the UNet's."""
    vae = AutoencoderTiny.from_pretrained(folder / "vae")
    with torch.no_grad():
        latents = vae.encode(torch.from_numpy(pixels[None])).latents
    return latents * vae.config.scaling_factor


FREE = {"guidance_scale": 0.0}
FEW_STEPS = [
    ("sd-turbo", 1, 2, 0.5, EulerDiscreteScheduler, FREE),
    ("sd-turbo", 4, 4, 0.8, EulerDiscreteScheduler, FREE),
    ("euler-ancestral", 4, 4, 0.6, EulerAncestralDiscreteScheduler, FREE),
    ("hyper-sd-4", 4, 4, 0.5, DDIMScheduler, FREE),
    ("tcd", 4, 4, 0.75, TCDScheduler, FREE | {"eta": 0.3}),
    ("pcm-cfg", 4, 4, 0.5, TCDScheduler, {"guidance_scale": 7.5}),
]


@pytest.mark.parametrize(("recipe", "steps", "of", "strength", "scheduler", "call"), FEW_STEPS)
def test_few_steps_from_a_picture_are_those_of_diffusers(
    ordinary_model, tmp_path, recipe, steps, of, strength, scheduler, call
):
    source = source_picture(picture_of_stripes(), (SIZE, SIZE))
    latents = mean_latents(ordinary_model, source.pixels)
    how = {"num_inference_steps": of, "strength": strength, **call}
    expected = diffusers_latents(
        ordinary_model, StableDiffusionImg2ImgPipeline, scheduler, latents, **how
    )
    with opened(ordinary_model, tmp_path / "b", recipe=recipe, steps=steps) as pipeline:
        started = pipeline.starting_at(source, strength=strength)
        assert started.bundle.manifest.plan.steps == of
        noises = stream(7, started.bundle.manifest.plan.noises)
        drawn = started(PROMPT, latents=noises).pictures[0]
    assert psnr_db(expected[0], drawn.latents) > 105


def test_an_lcm_does_all_its_steps_below_the_strength_as_in_its_own_pipeline(lcm_model, tmp_path):
    source = source_picture(picture_of_stripes(), (SIZE, SIZE))
    latents = mean_latents(lcm_model, source.pixels)
    how = {"num_inference_steps": 4, "strength": 0.6, "guidance_scale": 8.0}
    expected = diffusers_latents(
        lcm_model, LatentConsistencyModelImg2ImgPipeline, LCMScheduler, latents, **how
    )
    with opened(lcm_model, tmp_path / "b") as pipeline:
        started = pipeline.starting_at(source, strength=0.6)
        noises = stream(7, started.bundle.manifest.plan.noises)
        drawn = started(PROMPT, latents=noises).pictures[0]
    assert psnr_db(expected[0], drawn.latents) > 105


@pytest.mark.parametrize("strength", [0.3, 0.75])
def test_faster_diffusion_at_every_step_is_ddims_img2img(ordinary_model, tmp_path, strength):
    source = source_picture(picture_of_stripes(), (SIZE, SIZE))
    latents = mean_latents(ordinary_model, source.pixels)
    pipe = StableDiffusionImg2ImgPipeline.from_pretrained(
        ordinary_model, safety_checker=None, requires_safety_checker=False
    )
    pipe.set_progress_bar_config(disable=True)
    pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
    expected = pipe(
        PROMPT,
        image=latents,
        strength=strength,
        num_inference_steps=10,
        guidance_scale=5.0,
        generator=torch.Generator().manual_seed(7),
        output_type="latent",
    ).images.numpy()
    options = {"steps": 10, "key_steps": "uniform:1", "guidance": 5.0}
    with opened(ordinary_model, tmp_path / "b", "faster", **options) as pipeline:
        drawn = pipeline(PROMPT, image=source, strength=strength, latents=stream(7, 1)).pictures[0]
    assert drawn.parameters["inject"] == "off"
    assert psnr_db(expected[0], drawn.latents) > 100


INPAINTED = [
    ("sd-turbo", 4, 1.0, EulerDiscreteScheduler, FREE),
    ("euler-ancestral", 4, 0.75, EulerAncestralDiscreteScheduler, FREE),
    ("hyper-sd-4", 4, 1.0, DDIMScheduler, FREE),
    ("tcd", 4, 0.5, TCDScheduler, FREE | {"eta": 0.3}),
]


@pytest.mark.parametrize(("recipe", "steps", "strength", "scheduler", "call"), INPAINTED)
def test_what_a_mask_keeps_is_kept_as_in_diffusers_inpainting(
    ordinary_model, tmp_path, recipe, steps, strength, scheduler, call
):
    source = source_picture(picture_of_stripes(), (SIZE, SIZE), left_half())
    latents = mean_latents(ordinary_model, source.pixels)
    how = {"num_inference_steps": steps, "strength": strength, **call}
    expected = diffusers_latents(
        ordinary_model,
        StableDiffusionInpaintPipeline,
        scheduler,
        latents,
        mask_image=Image.fromarray(left_half()),
        masked_image_latents=torch.zeros(SHAPE),  # of UNets with 9 channels
        height=SIZE,
        width=SIZE,
        **how,
    )
    with opened(ordinary_model, tmp_path / "b", recipe=recipe, steps=steps) as pipeline:
        started = pipeline.starting_at(source, strength=strength)
        noises = stream(7, started.bundle.manifest.plan.noises)
        drawn = started(PROMPT, latents=noises).pictures[0]
    assert psnr_db(expected[0], drawn.latents) > 105


@pytest.fixture(scope="module")
def turbo(teacher_folder, tmp_path_factory):
    """One step of SD-Turbo with a full VAE, as a bundle of ONNX graphs that takes pictures."""
    student = load_student(teacher_folder, recipe="sd-turbo")
    bundle = export_onnx(student, tmp_path_factory.mktemp("turbo") / "bundle", PICTURES)
    with Pipeline.open(bundle) as pipeline:
        yield pipeline


def test_the_encoders_graph_is_proven_as_all_are(turbo):
    subjects = [record.subject for record in turbo.bundle.manifest.parity if record.passed]
    assert f"{VAE_ENCODER} / its own module" in subjects
    assert VAE_ENCODER in subjects
    (output,) = turbo.bundle.spec(VAE_ENCODER).outputs
    assert (output.name, output.shape) == ("latent_parameters", (1, 8, 8, 8))


def test_a_student_of_one_step_starts_anywhere(turbo):
    plan = turbo.bundle.manifest.plan
    assert (plan.rows, plan.one_pass, plan.open_time) == (1, False, True)
    source = source_picture(picture_of_stripes(), (SIZE, SIZE))
    starts = {
        strength: turbo.starting_at(source, strength=strength).bundle.manifest.plan.timesteps
        for strength in (0.2, 0.5, 1.0)
    }
    assert starts == {0.2: (199,), 0.5: (499,), 1.0: (999,)}


def test_without_a_picture_it_draws_what_the_plain_bundle_draws(turbo, teacher_folder, tmp_path):
    student = load_student(teacher_folder, recipe="sd-turbo")
    with Pipeline.open(export_onnx(student, tmp_path / "plain")) as plain:
        expected = plain(PROMPT, seed=3).pictures[0].latents
    assert psnr_db(expected, turbo(PROMPT, seed=3).pictures[0].latents) > 100


def test_less_strength_leaves_more_of_the_picture(turbo):
    source = source_picture(picture_of_stripes(), (SIZE, SIZE))
    own = turbo.encode(source.pixels[None])[0, :4] * turbo.bundle.manifest.vae_scaling_factor
    # The network's weights are random: what it adds is, too, and the less the lower its weight.
    distances = [
        np.abs(turbo(PROMPT, image=source, strength=s).pictures[0].latents - own).mean()
        for s in (0.05, 0.3, 0.9)
    ]
    assert distances == sorted(distances)


def test_outside_of_a_mask_the_pixels_are_the_pictures_own(turbo):
    source = source_picture(picture_of_stripes(), (SIZE, SIZE), left_half())
    drawn = np.asarray(turbo(PROMPT, image=source).pictures[0].image)
    far = np.ones((SIZE, SIZE), bool)
    far[:56, :48] = False  # further away than the border is soft
    np.testing.assert_array_equal(drawn[far], picture_of_stripes()[far])
    assert (drawn[16:32, 8:24] != picture_of_stripes()[16:32, 8:24]).any()


def test_sampled_latents_are_drawn_by_the_seed_from_what_the_encoder_spreads(turbo):
    source = source_picture(picture_of_stripes(), (SIZE, SIZE))
    parameters = torch.from_numpy(turbo.encode(source.pixels[None]))
    mean, logarithm = parameters.chunk(2, dim=1)
    drawn = noises_from_seed(5, 2, SHAPE)[-1]
    expected = mean.numpy() + np.exp(0.5 * logarithm.numpy()) * drawn
    started = turbo.starting_at(source, strength=0.5, sampled=True)
    manifest = started.bundle.manifest
    noises = noises_from_seed(5, 1, SHAPE)[None][0]
    (first,), _ = started._start.apply(manifest.plan, noises, [5], manifest.vae_scale)
    (level,) = started._start.levels
    scaled = expected * manifest.vae_scaling_factor
    own = manifest.plan.passes[0].input.noise
    np.testing.assert_allclose(first, level.mix(scaled, noises[0]) / own, rtol=1e-4, atol=1e-5)
    plain = turbo(PROMPT, image=source, strength=0.5, seed=5).pictures[0]
    sampled = started(PROMPT, seed=5).pictures[0]
    assert sampled.parameters["sampled"] is True
    assert (plain.latents != sampled.latents).any()


def test_a_picture_tells_its_start(turbo):
    told = turbo(PROMPT, image=picture_of_stripes(), strength=0.5).pictures[0].parameters
    assert told["strength"] == 0.5
    source = source_picture(picture_of_stripes(), (SIZE, SIZE))
    assert told["image"] == source.digest
    masked = turbo(PROMPT, image=picture_of_stripes(), mask=left_half()).pictures[0].parameters
    assert (masked["mask"], masked["strength"]) == (True, 1.0)
    assert masked["image"] != source.digest


def test_encoding_it_is_a_stage_of_its_own(turbo):
    result = turbo(PROMPT, image=picture_of_stripes(), count=2)
    assert len(result.stage_latency_ms[VAE_ENCODER]) == 1


def test_a_tiue_student_has_the_strength_of_its_first_timestep(tiny_student, tmp_path):
    bundle = export_contract(tiny_student, tmp_path / "b", PICTURES)
    graphs = build_graphs(tiny_student, PICTURES)
    size = bundle.manifest.width_px
    picture = np.random.RandomState(0).randint(0, 256, (size, size, 3), np.uint8)
    with Pipeline.open(bundle, TorchRuntime(bundle, graphs, "cpu")) as pipeline:
        assert pipeline.bundle.manifest.plan.one_pass
        started = pipeline.starting_at(picture)
        plan, start = started.bundle.manifest.plan, started._start
        drawn = started(PROMPT, seed=1).pictures[0]
        noise = noises_from_seed(1, 1, drawn.latents[None].shape)[0]
        mixed = start.levels[0].mix(start.mean, noise).astype(np.float32)
        expected = tiny_student.sample(
            torch.from_numpy(mixed), torch.from_numpy(pipeline.embed([PROMPT]))
        )
        assert plan.timesteps[0] == tiny_student.plan.timesteps[0]
        assert psnr_db(expected.detach().numpy(), drawn.latents[None]) > 100
        with pytest.raises(UsageError, match=r"starts at t = \d+ alone"):
            pipeline.starting_at(picture, strength=0.5)
        with pytest.raises(UsageError, match="has no steps to choose"):
            pipeline.starting_at(picture, steps=4)


def test_a_bundle_without_the_graph_says_how_to_have_it(few_step_bundle):
    with (
        Pipeline.open(few_step_bundle) as pipeline,
        pytest.raises(UsageError, match="has no VAE encoder") as error,
    ):
        pipeline(PROMPT, image=picture_of_stripes())
    assert "--with-vae-encoder" in error.value.next_step


@pytest.mark.parametrize(
    "given", [{"mask": left_half()}, {"strength": 0.5}, {"steps": 4}, {"sampled": True}]
)
def test_what_says_how_to_start_needs_a_picture(turbo, given):
    (name,) = given
    with pytest.raises(UsageError, match=f"--{name} is of a drawing that starts from a picture"):
        turbo(PROMPT, **given)


def test_a_model_without_a_vae_cannot_take_pictures(ordinary_model, tmp_path):
    student = load_student(ordinary_model, recipe="sd-turbo", without=["vae"])
    with pytest.raises(UsageError, match="brings no VAE, whose encoder"):
        export_onnx(student, tmp_path / "b", PICTURES)
