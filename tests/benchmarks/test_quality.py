"""Quality measures against values worked out by hand, and the comparison from end to end."""

from __future__ import annotations

import importlib
import io
import json
import shutil
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import LCMScheduler
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from PIL import Image
from rich.console import Console

from tiue_export import Pipeline
from tiue_export.benchmarks.quality.yardstick import (
    FEATURE_WIDTH,
    Alignment,
    FeatureNetwork,
    Prompt,
    QualityData,
    load_quality_data,
    save_quality_data,
)
from tiue_export.errors import CheckpointError, UsageError

metrics = importlib.import_module("tiue_export.benchmarks.quality.metrics")
quality = importlib.import_module("tiue_export.benchmarks.quality.judge")
checkpoints = importlib.import_module("tiue_export.benchmarks.quality.checkpoints")
bundles = importlib.import_module("tiue_export.benchmarks.quality.bundles")
report = importlib.import_module("tiue_export.benchmarks.quality.report")
front = importlib.import_module("tiue_export.benchmarks.quality.__main__")

GROUNDS = {"white": (255, 255, 255), "black": (18, 18, 20), "pink": (250, 196, 214)}
POINTS = arrays(np.float64, (12, 3), elements=st.floats(-3, 3))


# Retrieval


def test_a_picture_counts_when_its_own_prototype_is_the_nearest():
    prototypes = np.eye(3)
    embeddings = np.array([[1.0, 0.0, 0.0], [0.8, 0.6, 0.0], [0.0, 0.6, 0.8]])
    names = np.array([0, 1, 2])
    assert metrics.retrieval_share(embeddings, prototypes, names, 1) == pytest.approx(2 / 3)
    assert metrics.retrieval_share(embeddings, prototypes, names, 2) == 1.0


def test_a_network_that_sees_no_difference_retrieves_nothing():
    same = np.ones((6, 4)) / 2
    assert metrics.retrieval_share(same, same, np.arange(6), 1) == 0
    assert metrics.retrieval_share(same, same, np.arange(6), 5) == 0


@given(POINTS, st.integers(1, 5))
@settings(max_examples=30)
def test_more_guesses_never_retrieve_less(points, top):
    names = np.arange(12) % 5
    shares = [metrics.retrieval_share(points, points[:5], names, k) for k in (top, top + 1)]
    assert 0 <= shares[0] <= shares[1] <= 1
    assert metrics.retrieval_share(points, points[:5], names, 5) == 1


# Distances of distributions


def test_frechet_distance_of_two_gaussians_is_the_closed_form():
    # One dimension each: (m1 - m2)^2 + (s1 - s2)^2, with s the unbiased standard deviations.
    real = np.array([[-1.0, 0.0], [1.0, 0.0]])  # variance 2 in x
    drawn = np.array([[1.0, 3.0], [7.0, 3.0]])  # mean (4, 3), variance 18 in x
    expected = 4**2 + 3**2 + (np.sqrt(18) - np.sqrt(2)) ** 2
    assert metrics.frechet_distance(real, drawn) == pytest.approx(expected)


@pytest.mark.parametrize("count", [4, 40])  # fewer pictures than features, and more
def test_frechet_distance_is_that_of_torchmetrics(count):
    from torchmetrics.image.fid import FrechetInceptionDistance

    random = np.random.default_rng(0)
    real, drawn = random.standard_normal((2, count, 8)) * [[[1.0]], [[1.5]]] + [[[0.0]], [[0.3]]]
    metric = FrechetInceptionDistance(feature=metrics._Given(8)).set_dtype(torch.float64)
    metric.update(metrics._wide(real), real=True)
    metric.update(metrics._wide(drawn), real=False)
    expected = float(metric.compute())
    assert metrics.frechet_distance(real, drawn) == pytest.approx(expected, abs=1e-5)


@given(POINTS, st.floats(-2, 2))
@settings(max_examples=20)
def test_a_shift_costs_its_square_whatever_the_points(points, shift):
    assert metrics.frechet_distance(points, points + shift) == pytest.approx(3 * shift**2, abs=1e-3)


def test_kernel_distance_of_two_points_each_is_the_formula():
    # Kernel (x.y/D + 1)^3, D = 1: MMD^2 = k(x1,x2) + k(y1,y2) - 2 mean k(x,y), unbiased.
    real, drawn = np.array([[0.0], [1.0]]), np.array([[2.0], [3.0]])
    expected = 1 + 7**3 - 2 * (1 + 1 + 27 + 64) / 4
    mean, deviation = metrics.kernel_distance(real, drawn)
    assert mean == pytest.approx(expected)
    assert deviation == pytest.approx(0, abs=1e-9)


def test_kernel_distance_is_repeatable_and_leaves_the_random_state_alone():
    rows = np.random.RandomState(0).standard_normal((2, 500, 8))
    torch.manual_seed(5)
    expected = torch.rand(1)
    torch.manual_seed(5)
    first = metrics.kernel_distance(rows[0], rows[1])
    assert torch.equal(torch.rand(1), expected)
    assert metrics.kernel_distance(rows[0], rows[1]) == first
    assert abs(first[0]) < 3 * first[1]


def test_manifold_scores_of_a_set_against_itself_and_against_a_far_one():
    real = np.random.RandomState(0).standard_normal((40, 4)).astype(np.float32)
    same = metrics.manifold_scores(real, real)
    assert (same.precision, same.recall, same.coverage) == (1, 1, 1)
    far = metrics.manifold_scores(real, real + 100)
    assert (far.precision, far.recall, far.density, far.coverage) == (0, 0, 0, 0)


def test_one_picture_again_and_again_is_precise_but_covers_nothing():
    real = np.random.RandomState(0).standard_normal((40, 4)).astype(np.float32)
    noise = np.random.RandomState(1).standard_normal((40, 4)).astype(np.float32)
    scores = metrics.manifold_scores(real, real[:1] + 1e-4 * noise)
    assert scores.precision == 1
    assert scores.coverage < 0.2
    assert scores.recall < 0.2


def test_manifold_scores_print_nothing(capsys):
    metrics.manifold_scores(np.eye(8, dtype=np.float32), np.eye(8, dtype=np.float32))
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("measure", "count", "least"),
    [("frechet_distance", 1, 2), ("kernel_distance", 1, 2), ("manifold_scores", 4, 5)],
)
def test_too_few_pictures_for_a_distribution_are_refused(measure, count, least):
    rows = np.zeros((count, 3), np.float32)
    with pytest.raises(UsageError, match=f"on {count} pictures; it takes at least {least}"):
        getattr(metrics, measure)(rows, rows)


# Diversity, alignment, ground, decoder rows


def test_diversity_is_the_mean_distance_of_pairs_per_root_of_dimension():
    groups = np.array([[[0.0, 0.0], [3.0, 4.0], [0.0, 0.0]]])  # distances 5, 0, 5
    assert metrics.diversity(groups) == pytest.approx(10 / 3 / np.sqrt(2))


def test_one_seed_has_no_diversity():
    assert metrics.diversity(np.zeros((4, 1, 3))) is None


@given(arrays(np.float64, (3, 4, 2), elements=st.floats(-5, 5)))
@settings(max_examples=20)
def test_the_order_of_the_seeds_does_not_matter(groups):
    assert metrics.diversity(groups[:, ::-1]) == pytest.approx(metrics.diversity(groups))


def test_alignment_is_the_mean_cosine_of_pairs():
    texts, pictures = np.eye(2), np.array([[1.0, 0.0], [0.6, 0.8]])
    assert metrics.mean_cosine(texts, pictures) == pytest.approx(0.9)


def framed(colour, inside=(0, 255, 0), side=12):
    picture = np.full((side, side, 3), colour, np.uint8)
    picture[4:-4, 4:-4] = inside
    return picture


def test_the_ground_is_read_off_the_frame_even_where_something_crosses_it():
    picture = framed((250, 190, 210))
    picture[:, 4:7] = 0
    assert metrics.ground_colours(picture[None]).tolist() == [[250, 190, 210]]


def test_the_share_of_right_grounds_counts_only_prompts_that_name_one():
    pictures = np.stack([framed((250, 190, 210)), framed((240, 240, 240)), framed((0, 0, 0))])
    assert metrics.ground_share(pictures, ["pink", "black", None], GROUNDS) == 0.5
    assert metrics.ground_share(pictures, [None] * 3, GROUNDS) is None


@given(arrays(np.float64, (5, 4), elements=st.floats(0.01, 9)))
@settings(max_examples=20)
def test_the_shares_of_the_decoder_rows_add_up_to_one(norms):
    assert sum(metrics.row_shares(norms)) == pytest.approx(1)


def test_shares_are_averaged_over_pictures():
    assert metrics.row_shares(np.array([[3.0, 1.0], [2.0, 2.0]])) == pytest.approx((0.625, 0.375))


# The quality data


def made_up_data(family: str = "tiny") -> QualityData:
    """Random landmarks for an untrained network; 12 names, 12 prompts."""
    random = np.random.RandomState(0)
    torch.manual_seed(0)
    prompts = tuple(
        Prompt(f"thing {i} on a {ground} background" if ground else f"thing {i}", i, ground)
        for i, ground in enumerate(["white", None, "black", "pink"] * 3)
    )

    def rows(*shape: int) -> np.ndarray:
        values = random.standard_normal((*shape, FEATURE_WIDTH)).astype(np.float16)
        return values.astype(np.float32)

    return QualityData(
        network=FeatureNetwork().half().float().eval().requires_grad_(False),
        names=tuple(f"thing {i}" for i in range(12)),
        prompts=prompts,
        grounds=GROUNDS,
        prototypes=rows(12),
        reference=rows(4, 12),
        real=rows(2, 12),
        corpus_sha256="0" * 64,
        held_out={"top1_blur_0px": 0.5},
        alignment=Alignment(rows(12), rows(FEATURE_WIDTH), {"text_to_picture_top1": 0.25}),
        family=family,
    )


@pytest.fixture(scope="module")
def data() -> QualityData:
    return made_up_data()


@pytest.fixture(scope="module")
def data_folder(data: QualityData, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quality") / "data"
    save_quality_data(data, folder)
    return folder


@pytest.fixture
def damaged(data: QualityData, tmp_path: Path) -> Path:
    save_quality_data(data, tmp_path)
    return tmp_path


def test_quality_data_come_back_as_they_were_written(data, data_folder):
    again = load_quality_data(data_folder)
    assert again.prompts == data.prompts
    assert again.names == data.names
    assert again.grounds == data.grounds
    assert (again.family, again.corpus_sha256) == (data.family, data.corpus_sha256)
    for name in ("prototypes", "reference", "real"):
        np.testing.assert_array_equal(getattr(again, name), getattr(data, name))
    np.testing.assert_array_equal(again.alignment.text, data.alignment.text)
    pictures = np.random.RandomState(1).randint(0, 255, (3, 128, 128, 3), np.uint8)
    ours, theirs = data.network.features_of(pictures), again.network.features_of(pictures)
    np.testing.assert_array_equal(ours, theirs)


def test_quality_data_without_a_text_side_load_too(data, tmp_path):
    save_quality_data(replace(data, alignment=None), tmp_path)
    assert load_quality_data(tmp_path).alignment is None


def test_a_folder_without_quality_data_says_what_to_give(tmp_path):
    with pytest.raises(UsageError, match="holds no quality data") as caught:
        load_quality_data(tmp_path)
    assert "--data" in caught.value.next_step


@pytest.mark.parametrize("name", ["network.safetensors", "landmarks.safetensors"])
def test_a_cut_file_is_named_as_damage(damaged, name):
    (damaged / name).write_bytes((damaged / name).read_bytes()[:100])
    with pytest.raises(CheckpointError, match="is damaged: SafetensorError"):
        load_quality_data(damaged)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format_version": 99}, "format version 99"),
        ({"names": ["only one"]}, "prototypes holds 12 rows; expected 1"),
        ({"prompts": []}, "real holds 12 rows; expected 0"),
        ({"family": None, "prompts": [["short"]]}, "TypeError"),
    ],
)
def test_a_description_that_does_not_fit_is_damage(damaged, change, message):
    file = damaged / "quality.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(CheckpointError, match=message):
        load_quality_data(damaged)


def test_features_have_zero_mean_and_unit_variance_and_do_not_depend_on_the_batch(data):
    pictures = np.random.RandomState(1).randint(0, 255, (5, 128, 128, 3), np.uint8)
    features = data.network.features_of(pictures)
    assert features.shape == (5, FEATURE_WIDTH)
    np.testing.assert_allclose(features.mean(1), 0, atol=1e-5)
    np.testing.assert_allclose(features.std(1), 1, atol=1e-3)
    alone = data.network.features_of(pictures[3:4])
    np.testing.assert_allclose(features[3:4], alone, atol=1e-4)
    np.testing.assert_allclose(
        np.linalg.norm(data.network.embeddings_of(features), axis=1), 1, atol=1e-5
    )


def test_the_network_is_small_enough_to_ship():
    assert sum(weight.numel() for weight in FeatureNetwork().parameters()) <= 1_000_000


@pytest.mark.parametrize(
    "pictures",
    [np.zeros((2, 64, 64, 3), np.uint8), np.zeros((2, 128, 128, 3)), np.zeros((128, 128, 3))],
)
def test_pictures_of_another_kind_are_refused(data, pictures):
    with pytest.raises(UsageError, match=r"takes uint8 \(N, 128, 128, 3\)"):
        data.network.features_of(pictures)


# The comparison


def test_a_smaller_set_of_prompts_is_part_of_a_larger_one_with_the_same_seeds(data):
    small, large = (quality.choose_prompts(data, n, seeds) for n, seeds in ((5, 1), (9, 3)))
    assert set(small.jobs) <= set(large.jobs)
    assert len(large.jobs) == 27
    assert len({seed for _, seed in large.jobs}) == 27


@pytest.mark.parametrize(("count", "seeds"), [(0, 1), (13, 1), (1, 0), (1, 1001)])
def test_impossible_requests_are_refused(data, count, seeds):
    with pytest.raises(UsageError, match="expected 1 to"):
        quality.choose_prompts(data, count, seeds)


class Painter:
    """Draws the ground that the prompt names, and noise on it; counts its pictures."""

    def __init__(self) -> None:
        self.drawn = 0

    def __call__(self, prompts: Sequence[str], seeds: Sequence[int]) -> quality.Draws:
        self.drawn += len(prompts)
        pictures = []
        for prompt, seed in zip(prompts, seeds, strict=True):
            ground = next((colour for name, colour in GROUNDS.items() if name in prompt), (0, 0, 0))
            picture = framed(ground, side=128)
            picture[40:88, 40:88] = np.random.RandomState(seed).randint(0, 255, (48, 48, 3))
            pictures.append(picture)
        latents = np.stack([np.full((4, 16, 16), seed, np.float32) for seed in seeds])
        norms = np.tile([3.0, 1.0], (len(seeds), 1))
        return quality.Draws(np.stack(pictures), latents, norms)


def test_a_contender_is_drawn_scored_and_held_against_the_first(data):
    request = quality.choose_prompts(data, 8, 2)
    contenders = [
        quality.Contender("first", Painter(), "first", batch=5),
        quality.Contender("second", Painter(), "second", batch=16),
    ]
    real, first, second = quality.compare(contenders, request, data)
    assert real.name == "real pictures"
    assert (real.latents_psnr_db, real.row_shares, real.ground) == (None, None, None)
    assert (first.pictures, first.ground, first.latents_psnr_db) == (16, 1.0, None)
    assert first.row_shares == pytest.approx((0.75, 0.25))
    assert first.picture_ms > 0
    same = {"name": "second", "latents_psnr_db": 300.0, "picture_ms": second.picture_ms}
    assert second == replace(first, **same)
    assert 0 <= first.top1 <= first.top5 <= 1
    assert first.feature_diversity > 0
    assert first.pixel_diversity > 0


def test_mistaken_names_are_counted_and_are_what_top1_lacks(data, tmp_path):
    request = quality.choose_prompts(data, 8, 2)
    names = report.MistakenNames(tmp_path / "names.json", request, data)
    contender = quality.Contender("a painter", Painter(), "weights 1")
    _, scored = quality.compare([contender], request, data, on_draws=names.add)
    names.write()
    found = json.loads((tmp_path / "names.json").read_text())["a painter"]
    wrong = sum(sum(taken.values()) for taken in found.values())
    assert wrong == round((1 - scored.top1) * 16) > 0
    assert all(name not in taken for name, taken in found.items())


def test_kept_draws_are_not_drawn_again(data, tmp_path):
    request = quality.choose_prompts(data, 8)
    painter = Painter()
    contender = quality.Contender("a painter", painter, "weights 1")
    first = quality.compare([contender], request, data, keep=tmp_path)
    again = quality.compare([contender], request, data, keep=tmp_path)
    assert first == again
    assert painter.drawn == 8
    quality.compare([replace(contender, identity="weights 2")], request, data, keep=tmp_path)
    quality.compare([contender], quality.choose_prompts(data, 9), data, keep=tmp_path)
    assert painter.drawn == 8 + 8 + 9


def test_a_broken_comparison_goes_on_with_the_pictures_it_broke_at(data, tmp_path, monkeypatch):
    monkeypatch.setattr(quality, "_SAVE_EVERY_S", 0.0)
    request = quality.choose_prompts(data, 8)
    painter = Painter()

    def broken(prompts, seeds):
        if painter.drawn >= 4:
            raise KeyboardInterrupt
        return painter(prompts, seeds)

    breaking = quality.Contender("a painter", broken, "weights 1", batch=2)
    with pytest.raises(KeyboardInterrupt):
        quality.compare([breaking], request, data, keep=tmp_path)
    (file,) = tmp_path.iterdir()
    assert file.name.endswith(".unfinished.npz")
    contender = replace(breaking, draw=painter)
    resumed = quality.compare([contender], request, data, keep=tmp_path)
    assert painter.drawn == 8
    assert not file.exists()
    (_, whole) = quality.compare([replace(contender, identity="again")], request, data)
    assert replace(resumed[1], picture_ms=0) == replace(whole, picture_ms=0)


def test_damaged_kept_draws_are_named(data, tmp_path):
    request = quality.choose_prompts(data, 8)
    contender = quality.Contender("a painter", Painter(), "weights 1")
    quality.compare([contender], request, data, keep=tmp_path)
    (file,) = tmp_path.iterdir()
    file.write_bytes(b"not a zip")
    with pytest.raises(UsageError, match=f"{file.name} holds no draws"):
        quality.compare([contender], request, data, keep=tmp_path)


def test_the_table_shows_every_measure_of_every_contender(data):
    request = quality.choose_prompts(data, 8)
    scores = quality.compare([quality.Contender("p[x]", Painter(), "p")], request, data)
    console = Console(width=160, record=True, file=io.StringIO())
    console.print(report.quality_table(scores, request))
    text = console.export_text()
    assert "8 prompts" in text
    assert "p[x]" in text
    assert "75.0 25.0" in text
    assert "100.0" in text


@pytest.fixture(scope="module")
def pipeline_128px(tiny_pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny pipeline with 16x16 latents: pictures of 128 px."""
    folder = Path(shutil.copytree(tiny_pipeline, tmp_path_factory.mktemp("px128") / "pipeline"))
    file = folder / "unet" / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "sample_size": 16}))
    return folder


@pytest.fixture(scope="module")
def bundle_128px(pipeline_128px: Path, tmp_path_factory: pytest.TempPathFactory):
    from tiue_export import ExportOptions, export_onnx, load_student

    options = ExportOptions(batch=2)
    out = tmp_path_factory.mktemp("px128-bundle") / "bundle"
    return export_onnx(load_student(pipeline_128px), out, options)


def test_a_bundle_draws_what_its_student_draws(bundle_128px, pipeline_128px, data):
    request = quality.choose_prompts(data, 5)
    student, merged = checkpoints.student_contenders(checkpoints.open_checkpoint(pipeline_128px))
    with Pipeline.open(bundle_128px) as pipeline:
        bundle = bundles.pipeline_contender("bundle", pipeline)
        assert bundle.batch == 2
        _, exact, fewer, exported = quality.compare([student, merged, bundle], request, data)
    assert exported.latents_psnr_db > 100
    assert sum(exact.row_shares) == pytest.approx(1)
    assert (len(exact.row_shares), len(fewer.row_shares)) == (4, 3)
    assert 20 < fewer.latents_psnr_db < 100
    assert exported.row_shares is None


def test_the_student_contender_is_the_students_own_sample(pipeline_128px):
    from tiue_export.sampling.noise import noise_from_seed

    checkpoint = checkpoints.open_checkpoint(pipeline_128px)
    contender = checkpoints.student_contenders(checkpoint)[0]
    draws = contender.draw(["a red fox", "a cup"], [3, 9])
    noise = np.concatenate([noise_from_seed(seed, (1, 4, 16, 16)) for seed in (3, 9)])
    with torch.no_grad():
        text = checkpoint.embed(["a red fox", "a cup"])
        expected = checkpoint.student.sample(torch.from_numpy(noise), text)
    np.testing.assert_allclose(draws.latents, expected.numpy(), atol=1e-5)
    assert draws.pictures.shape == (2, 128, 128, 3)


def test_guidance_moves_away_from_the_null_prompt(pipeline_128px):
    checkpoint = checkpoints.open_checkpoint(pipeline_128px)
    plain, almost, strong = (
        checkpoints.teacher_contender(checkpoint, 2, guidance).draw(["a red fox"], [0]).latents
        for guidance in (1.0, 1.0 + 1e-6, 3.0)
    )
    np.testing.assert_allclose(plain, almost, atol=1e-4)
    assert np.abs(plain - strong).max() > 1e-3


def test_the_one_step_student_follows_swiftbrush(pipeline_128px):
    from tiue_export.sampling.noise import noise_from_seed

    checkpoint = checkpoints.open_checkpoint(pipeline_128px, steps=2)
    draws = checkpoints.one_step_contender(checkpoint).draw(["a red fox"], [4])
    noise = torch.from_numpy(noise_from_seed(4, (1, 4, 16, 16)))
    with torch.no_grad():
        output = checkpoint.student.unet(noise, 999, checkpoint.embed(["a red fox"])).sample
    # alphas_cumprod[999] of Stable Diffusion's schedule (research: S = 14.6, E = -14.6).
    alpha = 0.0046600
    expected = (noise - (1 - alpha) ** 0.5 * output) / alpha**0.5
    np.testing.assert_allclose(draws.latents, expected.numpy(), rtol=1e-3, atol=1e-2)


@pytest.fixture(scope="module")
def lcm_128px(pipeline_128px: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same weights as a student that LCMScheduler draws with."""
    folder = Path(shutil.copytree(pipeline_128px, tmp_path_factory.mktemp("lcm") / "pipeline"))
    scheduler = LCMScheduler(set_alpha_to_one=False, original_inference_steps=20)
    scheduler.save_pretrained(folder / "scheduler")
    return folder


def test_a_few_step_student_is_drawn_by_its_scheduler_from_one_stream_of_noise(
    lcm_128px, monkeypatch
):
    checkpoint = checkpoints.open_few_step(lcm_128px)
    four, one = checkpoints.few_step_contenders(checkpoint, [4, 1])
    assert (four.name, one.name) == ("lcm, 4 steps", "lcm, 1 step")
    for contender, steps in ((four, 4), (one, 1)):
        scheduler = LCMScheduler.from_pretrained(lcm_128px / "scheduler")
        scheduler.set_timesteps(steps)
        stream = np.random.RandomState(7)
        noises = [
            torch.from_numpy(stream.standard_normal((1, 4, 16, 16)).astype(np.float32))
            for _ in range(steps)
        ]
        latents, fresh = noises[0], iter(noises[1:])
        monkeypatch.setattr(
            "diffusers.schedulers.scheduling_lcm.randn_tensor", lambda *a, f=fresh, **k: next(f)
        )
        with torch.no_grad():
            text = checkpoint.embed(["an owl"])
            for timestep in scheduler.timesteps:
                output = checkpoint.student.unet(latents, timestep, text).sample
                latents = scheduler.step(output, timestep, latents, return_dict=False)[0]
        drawn = contender.draw(["a cup", "an owl"], [3, 7]).latents[1:]
        np.testing.assert_allclose(drawn, latents.numpy(), rtol=1e-3, atol=1e-3)


def test_a_few_step_student_shares_its_encoder_and_takes_other_samplers(lcm_128px):
    checkpoint = checkpoints.open_few_step(lcm_128px)
    listed = checkpoints.few_step_contenders(checkpoint, [4], ["0,2"], ["lcm", "tcd:0"])
    assert [one.name for one in listed] == [
        "lcm, 4 steps",
        "lcm, 4 steps, encoder at 0,2",
        "tcd:0, 4 steps",
        "tcd:0, 4 steps, encoder at 0,2",
    ]
    latents = [one.draw(["an owl"], [7]).latents for one in listed]
    assert len({array.tobytes() for array in latents}) == 4
    named = checkpoints.open_few_step(lcm_128px, recipe="tcd")
    assert checkpoints.few_step_contenders(named, [1])[0].name == "tcd, 1 step"
    for wrong in ("tcd:x", "lcm:0.3"):
        with pytest.raises(UsageError, match=r"-step-sampler is tcd:x; expected|--eta is for rec"):
            checkpoints.few_step_contenders(checkpoint, [4], [], [wrong])


def test_half_precision_is_near_full_precision(pipeline_128px):
    latents = [
        checkpoints.student_contenders(checkpoints.open_checkpoint(pipeline_128px, precision))[0]
        .draw(["a red fox"], [0])
        .latents
        for precision in ("fp32", "bf16")
    ]
    assert np.abs(latents[0] - latents[1]).max() < 0.1 * np.abs(latents[0]).max()


def test_a_pipeline_of_another_size_is_refused(tiny_pipeline):
    with pytest.raises(UsageError, match=r"draws 64x64 px; the quality data judges 128x128 px"):
        checkpoints.open_checkpoint(tiny_pipeline)


def test_a_pipeline_without_a_text_encoder_is_refused(pipeline_128px, tmp_path):
    folder = Path(shutil.copytree(pipeline_128px, tmp_path / "pipeline"))
    shutil.rmtree(folder / "text_encoder")
    with pytest.raises(UsageError, match="lacks a text encoder, a tokenizer or a VAE"):
        checkpoints.open_checkpoint(folder)


def test_a_bundle_of_another_family_is_refused(tiny_bundle):
    with pytest.raises(UsageError, match="is of the family 'tiny'; this quality data judges"):
        bundles.require_family(tiny_bundle, made_up_data("demo"))


def test_a_bundle_of_another_size_is_refused(tiny_bundle, data):
    with pytest.raises(UsageError, match=r"draws 64x64 px; the quality data judges 128x128 px"):
        bundles.require_family(tiny_bundle, data)


def run_main(*arguments: object) -> None:
    front.main([*map(str, arguments)])


def test_bundles_are_held_against_the_first_in_table_json_and_picture(
    bundle_128px, data_folder, tmp_path, capsys
):
    out, plot = tmp_path / "scores.json", tmp_path / "q.png"
    options = ("--data", data_folder, "--prompts", 6, "--json", out, "--plot", plot)
    run_main("bundles", bundle_128px.root, bundle_128px.root, *options)
    assert "right emoji, top-1 %" in capsys.readouterr().out
    record = json.loads(out.read_text())
    assert [entry["name"] for entry in record["scores"]] == ["real pictures", "bundle", "bundle"]
    assert [entry["latents_psnr_db"] for entry in record["scores"]] == [None, None, 300.0]
    with Image.open(plot) as picture:
        assert picture.width > 1000
    assert (record["prompts"], record["data"]["family"]) == (6, "tiny")


def test_the_command_for_checkpoints_compares_all_kinds(
    pipeline_128px, lcm_128px, data_folder, tmp_path
):
    out = tmp_path / "scores.json"
    kinds = [("--teacher", pipeline_128px), ("--one-step", pipeline_128px)]
    kinds += [("--few-step", lcm_128px), ("--few-step-steps", 2)]
    kinds += [("--student", pipeline_128px), ("--teacher-steps", 2), ("--guidance", 1)]
    options = [word for pair in kinds for word in pair]
    run_main("checkpoints", *options, "--data", data_folder, "--prompts", 5, "--json", out)
    names = [entry["name"] for entry in json.loads(out.read_text())["scores"]]
    assert names == [
        "real pictures",
        "teacher, 2 steps, guidance 1",
        "one step",
        "lcm, 2 steps",
        "TiUE K=4",
        "TiUE K=4, 3 rows",
    ]


def test_the_student_at_another_k_is_that_k_of_its_own_schedule(pipeline_128px):
    checkpoint = checkpoints.open_checkpoint(pipeline_128px)
    two, four = checkpoints.other_rows(checkpoint, [2, 4])
    assert (two.name, four.name) == ("student, K=2", "student, K=4, as trained")
    other = checkpoints.open_checkpoint(pipeline_128px, steps=2).student
    drawn = two.draw(["a red apple"], [3])
    noise = torch.from_numpy(checkpoints.noises_from_seed(3, 1, (1, 4, 16, 16))[0])
    expected = other.sample(noise, checkpoint.embed(["a red apple"])).detach()
    np.testing.assert_allclose(drawn.latents, expected.numpy(), atol=1e-4)
    assert drawn.row_norms.shape == (1, 2)


def test_a_student_at_other_k_is_drawn_and_plotted_beside_the_teachers_steps(
    pipeline_128px, data_folder, tmp_path
):
    out, plot = tmp_path / "steps.json", tmp_path / "plots" / "steps.png"
    options = ["--student", pipeline_128px, "--student-rows", 2, 4]
    options += ["--teacher", pipeline_128px, "--teacher-steps", 2, "--guidance", 1]
    options += ["--data", data_folder, "--prompts", 5, "--json", out, "--plot", plot]
    run_main("checkpoints", *options)
    names = [entry["name"] for entry in json.loads(out.read_text())["scores"]]
    assert names == [
        "real pictures",
        "teacher, 2 steps, guidance 1",
        "student, K=2",
        "student, K=4, as trained",
    ]
    with Image.open(plot) as picture:
        assert picture.width > 1000


def test_an_impossible_k_is_refused_before_anything_is_drawn(pipeline_128px, data_folder, capsys):
    options = ["--student", pipeline_128px, "--student-rows", 4, 0, "--data", data_folder]
    with pytest.raises(SystemExit) as stopped:
        run_main("checkpoints", *options, "--prompts", 5)
    assert stopped.value.code != 0
    captured = capsys.readouterr()
    assert captured.err.startswith("error: ")
    assert "pictures in" not in captured.err


def test_a_teacher_without_a_step_is_refused(pipeline_128px):
    with pytest.raises(UsageError, match="--teacher-steps is 0; expected 1 or more"):
        checkpoints.teacher_contender(checkpoints.open_checkpoint(pipeline_128px), 0, 1.0)


@pytest.mark.parametrize(
    ("option", "name", "message"),
    [
        ("--plot", "curve.pdf", "curve.pdf is no .png file"),
        ("--plot", "", "is a folder"),
        ("--json", "", "is a folder"),
        ("--sheet", "", "is a folder"),
    ],
)
def test_what_could_not_be_written_at_the_end_is_refused_at_the_start(
    pipeline_128px, data_folder, tmp_path, capsys, option, name, message
):
    options = ["--student", pipeline_128px, "--data", data_folder, "--prompts", 5]
    with pytest.raises(SystemExit) as stopped:
        run_main("checkpoints", *options, option, tmp_path / name)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: {option} ")
    assert message in error
    assert "pictures in" not in error


def test_a_user_error_ends_with_its_code_and_no_traceback(tiny_bundle, data_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main("bundles", tiny_bundle.root, "--data", data_folder)
    assert stopped.value.code == 2
    error = capsys.readouterr().err
    assert error.startswith("error: --prompts is 400; expected 1 to 12")


def test_nothing_to_compare_is_refused(data_folder, capsys):
    with pytest.raises(SystemExit) as stopped:
        run_main("checkpoints", "--data", data_folder, "--prompts", 6)
    assert stopped.value.code == 2
    assert "Give --teacher, --one-step, --few-step or --student." in capsys.readouterr().err


def test_a_comparison_sheet_has_a_row_per_prompt_and_a_column_per_contender(data, tmp_path):
    def painter(value: int) -> quality.Contender:
        def draw(prompts, seeds):
            pictures = np.zeros((len(prompts), 128, 128, 3), np.uint8)
            pictures[..., 0] = value
            return quality.Draws(pictures, np.zeros((len(prompts), 4, 16, 16), np.float32))

        return quality.Contender(f"all {value}", draw, str(value))

    request = quality.choose_prompts(data, 9, seeds=2)
    sheet = report.ComparisonSheet(tmp_path / "new" / "sheet.png", request)
    quality.compare([painter(40), painter(200)], request, data, on_draws=sheet.add)
    sheet.write()
    with Image.open(tmp_path / "new" / "sheet.png") as image:
        pixels = np.asarray(image)
    first, second = ((pixels == (red, 0, 0)).all(-1) for red in (40, 200))
    assert first.sum() == second.sum() == 9 * 128 * 128
    assert np.nonzero(first)[1].max() < np.nonzero(second)[1].min()


def test_no_sheet_is_written_unless_asked_for(data, tmp_path):
    sheet = report.ComparisonSheet(None, quality.choose_prompts(data, 2))
    sheet.write()
    assert list(tmp_path.iterdir()) == []
