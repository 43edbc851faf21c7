"""Drawing that starts from a picture is what diffusers' own pipelines draw from it."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from tiue_export import ExportOptions, Pipeline, export_onnx, load_student
from tiue_export.benchmarks.studies.picture_parity import (
    cases,
    drawn_latents,
    example_picture,
    expected_latents,
    options_of,
)
from tiue_export.benchmarks.studies.small_models import small_model
from tiue_export.drawing.source_picture import source_picture
from tiue_export.errors import UsageError
from tiue_export.export.contract import export_contract
from tiue_export.graphs.build import build_graphs, taking_pictures
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.half_range import load_audit
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
def models(tmp_path_factory):
    """Where small models of each shape lie, made once."""
    return tmp_path_factory.mktemp("models")


@pytest.mark.parametrize(
    "case", cases(), ids=lambda case: f"{case.recipe or 'faster'}-{case.kind}-{case.strength}"
)
def test_latents_are_those_of_diffusers_own_pipeline(case, models, tmp_path):
    folder = small_model(case.shape, models)
    method, options = options_of(case)
    student = load_for_method(CheckpointRequest(str(folder)), method, options)
    bundle = export_contract(student, tmp_path / "bundle", PICTURES)
    graphs = build_graphs(taking_pictures(student, PICTURES), PICTURES)
    source = example_picture(bundle.manifest.width_px, masked=case.masked)
    with Pipeline.open(bundle, TorchRuntime(bundle, graphs, "cpu")) as pipeline:
        latents, done = drawn_latents(case, pipeline, source)
    assert done == (case.steps if case.recipe == "lcm" else int(case.steps * case.strength))
    assert psnr_db(expected_latents(case, folder, source), latents) > 100


@pytest.fixture(scope="module")
def turbo(picture_bundle):
    """That bundle, opened."""
    with Pipeline.open(picture_bundle) as pipeline:
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


def test_sampled_latents_want_a_seed(turbo):
    with pytest.raises(UsageError, match="sampled by the seed, and latents were given"):
        turbo(PROMPT, image=picture_of_stripes(), sampled=True, latents=np.zeros(SHAPE, np.float32))


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


def test_in_half_precision_it_is_audited_and_proven(teacher_folder, tmp_path):
    student = load_student(teacher_folder, recipe="sd-turbo")
    half = ExportOptions(precision="fp16", with_vae_encoder=True)
    bundle = export_onnx(student, tmp_path / "half", half, audit_prompts=["an owl", "a cat"])
    audited = load_audit(bundle)
    assert audited is not None
    assert VAE_ENCODER in {graph.graph for graph in audited.graphs}
    record = bundle.manifest.graphs[VAE_ENCODER]
    assert record.precision == "fp16"
    assert record.max_abs_in_half is not None
    hops = {r.hop for r in bundle.manifest.parity if r.subject == VAE_ENCODER and r.passed}
    assert {"ONNX fp16", "fp16 arithmetic"} <= hops
    with Pipeline.open(bundle) as pipeline:
        assert pipeline(PROMPT, image=picture_of_stripes(), strength=0.5).pictures


def test_pictures_of_a_batch_start_as_alone_and_a_tiled_decoder_leaves_the_encoder_whole(
    turbo, teacher_folder, tmp_path
):
    student = load_student(teacher_folder, recipe="sd-turbo")
    options = ExportOptions(batch=2, vae_tile=64, height=128, width=64, with_vae_encoder=True)
    bundle = export_contract(student, tmp_path / "two", options)
    graphs = build_graphs(taking_pictures(student, options), options)
    assert bundle.spec(VAE_ENCODER).inputs[0].shape == (2, 3, 128, 64)
    tall = np.concatenate([picture_of_stripes(), 255 - picture_of_stripes()])
    with Pipeline.open(bundle, TorchRuntime(bundle, graphs, "cpu")) as pipeline:
        started = pipeline.starting_at(tall, strength=0.5, sampled=True)
        three = started(PROMPT, seed=4, count=3).pictures
        alone = started(PROMPT, seed=6).pictures[0]
    np.testing.assert_allclose(three[2].latents, alone.latents, atol=1e-5)
    assert psnr_db(three[0].latents, three[1].latents) < 60


def test_a_model_without_a_vae_cannot_take_pictures(ordinary_model, tmp_path):
    student = load_student(ordinary_model, recipe="sd-turbo", without=["vae"])
    with pytest.raises(UsageError, match="brings no VAE, whose encoder"):
        export_onnx(student, tmp_path / "b", PICTURES)
