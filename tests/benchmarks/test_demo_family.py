"""The demo family's data, and the network and text side that its quality is measured with."""

from __future__ import annotations

import importlib
import json
import re
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import AutoencoderTiny
from emoji_family import feature_network, quality_files, text_alignment
from emoji_family.autoencoder import build_autoencoder, reconstruction_psnr_db
from emoji_family.build import Family
from emoji_family.corpus import (
    FONT,
    GROUPS,
    NAMES,
    PACKAGES,
    Emoji,
    demo_corpus,
    demo_names,
    fingerprint,
    load_corpus,
    told_apart,
)
from emoji_family.drawing import BACKGROUNDS, caption, compose, directed, draw
from emoji_family.feature_network import FeatureSettings
from emoji_family.teacher import Teacher
from emoji_family.text_alignment import AlignmentSettings, Maps, Pairs
from teachers import load_teacher

from tiue_export.benchmarks.quality.yardstick import (
    FeatureNetwork,
    load_quality_data,
    save_quality_data,
)
from tiue_export.checkpoint.family import load_family
from tiue_export.errors import MissingExtraError, UsageError
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.student.pipeline_folder import write_pipeline

metrics = importlib.import_module("tiue_export.benchmarks.quality.metrics")
quality = importlib.import_module("tiue_export.benchmarks.quality.judge")

WANTED = (
    "red apple",
    "hot beverage",
    "rocket",
    "owl",
    "left arrow",
    "sunflower",
    "key",
    "umbrella",
)
EMOJI_TEACHER = Path(__file__).parents[2] / "examples" / "emoji-teacher"
SETTINGS = FeatureSettings(steps=6, batch=4)


@pytest.fixture(scope="session")
def whole_corpus() -> tuple[Emoji, ...]:
    missing = [str(path) for path in (FONT, NAMES, GROUPS) if not path.is_file()]
    if missing:
        pytest.skip(
            f"no {', '.join(missing)}: the demo's pictures come from the Debian packages "
            f"{', '.join(PACKAGES)}"
        )
    return load_corpus()


@pytest.fixture(scope="session")
def corpus(whole_corpus: tuple[Emoji, ...]) -> tuple[Emoji, ...]:
    """Eight emoji."""
    found = tuple(emoji for emoji in whole_corpus if emoji.name in WANTED)
    assert len(found) == len(WANTED)
    return found


# The pictures


def test_every_emoji_has_a_name_of_its_own_and_a_coloured_picture(whole_corpus):
    assert len(whole_corpus) > 1000
    assert len({emoji.name for emoji in whole_corpus}) == len(whole_corpus)
    assert all(emoji.sprite.shape == (128, 136, 4) for emoji in whole_corpus)
    assert all(emoji.sprite[..., 3].any() for emoji in whole_corpus)


def test_the_demo_draws_32_emoji_that_the_feature_network_tells_apart(whole_corpus):
    names = demo_names()
    assert len(names) == 32
    assert {emoji.name for emoji in demo_corpus()} == names
    assert names <= {emoji.name for emoji in told_apart()}


def test_missing_sources_name_the_packages_to_install(monkeypatch, tmp_path):
    monkeypatch.setattr("emoji_family.corpus.FONT", tmp_path / "no.ttf")
    with pytest.raises(MissingExtraError, match=r"no\.ttf, which is not there") as caught:
        load_corpus()
    assert caught.value.next_step == f"Run: apt-get install {' '.join(PACKAGES)}"


def test_the_same_generator_state_draws_the_same_picture(corpus):
    first, second = (draw(corpus[0], np.random.default_rng(3)) for _ in range(2))
    np.testing.assert_array_equal(first.picture, second.picture)
    assert first.caption == second.caption
    assert first.picture.shape == (128, 128, 3)
    assert first.picture.dtype == np.uint8


def test_what_a_caption_says_of_the_ground_is_true(corpus):
    generator = np.random.default_rng(0)
    drawn = [draw(emoji, generator) for emoji in corpus for _ in range(12)]
    named = [
        next((g for g in BACKGROUNDS if item.caption.endswith(f" {g} background")), None)
        for item in drawn
    ]
    assert metrics.ground_share(np.stack([d.picture for d in drawn]), named, BACKGROUNDS) == 1
    assert 0.4 < np.mean([name is not None for name in named]) < 0.8


def test_arrows_are_never_mirrored_and_apples_may_be(corpus):
    by_name = {emoji.name: emoji for emoji in corpus}
    assert directed(by_name["left arrow"])
    assert not directed(by_name["red apple"])


def test_a_mirrored_upright_picture_is_the_flipped_one(corpus):
    # An even rest of 16 px: an odd one would shift the mirror image by a pixel.
    plain, mirrored = (compose(corpus[0], 0, 112 / 128, mirrored=m) for m in (False, True))
    difference = np.abs(plain[:, ::-1].astype(int) - mirrored)
    assert np.quantile(difference, 0.99) < 64
    assert difference.mean() < 3


@pytest.mark.parametrize(
    ("name", "ground", "bare", "expected"),
    [
        ("red apple", None, False, "a red apple"),
        ("owl", "light blue", False, "an owl on a light blue background"),
        ("owl", "orange", True, "owl on an orange background"),
        ("compass", None, False, "a compass"),
        ("Saturn", None, False, "Saturn"),
        ("chopsticks", None, False, "chopsticks"),
    ],
)
def test_captions_read_as_people_write(name, ground, bare, expected):
    assert caption(name, ground, bare=bare) == expected


# The teacher


def test_the_teacher_in_the_repository_is_an_ordinary_model_of_the_family():
    teacher = load_teacher(EMOJI_TEACHER, options=FasterOptions(steps=5, key_steps=(0, 2)))
    assert (teacher.source.family, teacher.source.dtype) == ("demo", "float16")
    files = [file for file in EMOJI_TEACHER.rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) < 40_000_000


def test_a_teacher_is_read_back_from_its_pipeline_folder_to_the_bit(tmp_path):
    teacher = Teacher.from_pipeline(EMOJI_TEACHER)
    assert {parameter.dtype for parameter in teacher.parameters()} == {torch.float32}
    folder = write_pipeline(
        tmp_path / "again",
        unet=teacher.unet,
        text_encoder=teacher.text_encoder,
        vae=AutoencoderTiny.from_pretrained(EMOJI_TEACHER / "vae"),
        tokenizer=EMOJI_TEACHER / "tokenizer",
        scheduler_config=load_family("demo").scheduler,
        dtype=torch.float32,
    )
    assert Teacher.from_pipeline(folder).sha256 == teacher.sha256
    # diffusers notes where a model was loaded from; a folder that is passed on must not say it.
    for config in folder.rglob("config.json"):
        assert str(EMOJI_TEACHER.parent) not in config.read_text("utf-8")
    with torch.no_grad():
        next(teacher.parameters()).add_(1e-3)
    assert Teacher.from_pipeline(folder).sha256 != teacher.sha256


def test_a_run_that_starts_from_a_teacher_keeps_its_vocabulary_and_autoencoder(
    whole_corpus, tmp_path, capsys
):
    family = Family(tmp_path, EMOJI_TEACHER)
    words = EMOJI_TEACHER / "tokenizer" / "vocab.json"
    assert (tmp_path / "tokenizer" / "vocab.json").read_bytes() == words.read_bytes()
    family.report_autoencoder()
    psnr_db = float(re.search(r"autoencoder: ([\d.]+) dB", capsys.readouterr().out)[1])
    assert psnr_db > 24
    assert reconstruction_psnr_db(build_autoencoder(), family.corpus[:2]) < 15  # untrained


# The feature network


def test_a_training_step_sees_the_same_pictures_each_time(corpus):
    first, again = (feature_network.training_batch(corpus, SETTINGS, 5) for _ in range(2))
    other = feature_network.training_batch(corpus, SETTINGS, 6)
    assert torch.equal(first.seen, again.seen)
    assert torch.equal(first.blur_px, again.blur_px)
    assert not torch.equal(first.seen, other.seen)
    assert first.seen.shape == (4, 3, 128, 128)


def test_blur_leaves_out_the_pictures_it_is_not_meant_for(corpus):
    pictures = list(feature_network.held_out_pictures(corpus, 0))[:2]
    blurred = feature_network.blurred(pictures, np.array([0.0, 2.0]))
    np.testing.assert_array_equal(blurred[0], pictures[0])

    def edges(picture: np.ndarray) -> float:
        return float(np.abs(np.diff(picture.astype(int), axis=0)).mean())

    assert edges(blurred[1]) < 0.7 * edges(pictures[1])


def test_a_broken_training_ends_with_the_weights_of_an_unbroken_one(corpus, tmp_path, monkeypatch):
    def train(out: Path) -> FeatureNetwork:
        return feature_network.train_feature_network(corpus, out, SETTINGS, save_every=2)

    unbroken = train(tmp_path / "unbroken").state_dict()
    batch = feature_network.training_batch

    def interrupted(corpus, settings, step):
        if step == 3:
            raise KeyboardInterrupt
        return batch(corpus, settings, step)

    monkeypatch.setattr(feature_network, "training_batch", interrupted)
    with pytest.raises(KeyboardInterrupt):
        train(tmp_path / "broken")
    monkeypatch.undo()
    resumed = train(tmp_path / "broken").state_dict()
    assert all(torch.equal(unbroken[name], resumed[name]) for name in unbroken)
    journals = [(tmp_path / name / "journal.jsonl").read_text() for name in ("unbroken", "broken")]
    losses = [[json.loads(line)["loss"] for line in text.splitlines()] for text in journals]
    assert losses[0] == losses[1]


def test_an_unfinished_run_is_not_taken_for_a_network(corpus, tmp_path):
    with pytest.raises(UsageError, match="has done 0 of 6 steps"):
        feature_network.load_feature_network(corpus, tmp_path, SETTINGS)


def test_a_run_of_other_settings_is_refused(corpus, tmp_path):
    feature_network.open_run(corpus, tmp_path, SETTINGS)
    with pytest.raises(UsageError, match="batch was 4, is 5"):
        feature_network.open_run(corpus, tmp_path, replace(SETTINGS, batch=5))


@pytest.mark.slow
def test_the_network_learns_eight_emoji_in_a_minute(corpus, tmp_path):
    settings = FeatureSettings(steps=100, batch=16)
    network = feature_network.train_feature_network(corpus, tmp_path, settings, save_every=20)
    features = feature_network.held_out_features(network, corpus, feature_network.PROTOTYPE_STREAMS)
    prototypes = feature_network.prototypes_of(network.embeddings_of(features), len(corpus))
    accuracy = feature_network.held_out_accuracy(network, corpus, prototypes)
    assert accuracy["top1_blur_0px"] >= 7 / 8
    assert accuracy["top1_blur_2px"] >= 6 / 8


def test_prototypes_are_unit_means_and_name_their_own():
    embeddings = np.array([[1.0, 0.0], [0.0, 1.0], [0.6, 0.8], [0.0, 1.0]])
    prototypes = feature_network.prototypes_of(embeddings, 2)
    np.testing.assert_allclose(prototypes, [[0.8944, 0.4472], [0, 1]], atol=1e-4)
    assert feature_network.named_share(embeddings, prototypes) == 1
    assert feature_network.named_share(embeddings[[1, 1, 2, 3]], prototypes) == 0.75


# The text side


def test_a_text_fits_pictures_of_its_emoji_on_its_ground_or_on_any_when_it_names_none():
    pairs = Pairs(
        features=torch.zeros(4, 1),
        texts=torch.zeros(4, 1),
        grounds=torch.tensor([0, 1, 1, 0]),
        named=torch.tensor([True, True, False, True]),
        names=2,
    )
    fits = text_alignment.fitting(pairs, torch.tensor([0, 1, 0, 1]))
    assert fits.tolist() == [
        [True, False, False, False],
        [False, True, False, False],
        [True, False, True, False],
        [False, False, False, True],
    ]


def perfect_pairs() -> tuple[Maps, Pairs]:
    """Four rows whose texts and pictures the maps take to the same unit vectors."""
    maps = Maps(4)
    identity = torch.zeros(128, 4)
    identity[:4] = torch.eye(4)
    features = torch.zeros(4, 128)
    features[:, :4] = torch.eye(4)
    with torch.no_grad():
        maps.text.weight.copy_(identity)
        maps.picture.weight.copy_(torch.eye(128))
    named = torch.ones(4, dtype=torch.bool)
    return maps, Pairs(features, torch.eye(4), torch.tensor([0, 0, 1, 1]), named, 4)


def test_the_contrastive_loss_of_perfect_maps_is_the_softmax_floor():
    maps, pairs = perfect_pairs()
    settings = AlignmentSettings(temperature=0.5)
    # Rows 0 and 2 show one emoji, 1 and 3 another, each on its own ground: all others are wrong.
    expected = np.log(1 + 3 * np.exp(-2))
    loss = text_alignment.contrastive_loss(maps, pairs, settings)
    assert loss.item() == pytest.approx(expected, rel=1e-5)


def test_another_right_picture_is_no_wrong_answer():
    maps, pairs = perfect_pairs()
    settings = AlignmentSettings(temperature=0.5)
    # Without a named ground, the other drawing of the same emoji is right too: two wrong ones left.
    open_prompts = replace(pairs, named=torch.zeros(4, dtype=torch.bool))
    loss = text_alignment.contrastive_loss(maps, open_prompts, settings)
    assert loss.item() == pytest.approx(np.log(1 + 2 * np.exp(-2)), rel=1e-5)


def test_a_text_whose_nearest_picture_fits_is_matched():
    maps, pairs = perfect_pairs()
    cosines = maps.cosines(pairs)
    assert text_alignment.matched_share(cosines, pairs) == 1
    assert text_alignment.matched_share(cosines.roll(1, 0), pairs) == 0


def test_a_pipeline_without_a_text_encoder_is_refused(tmp_path):
    with pytest.raises(UsageError, match="has no text_encoder/"):
        text_alignment.TextStates(tmp_path)


def test_an_alignment_can_be_trained_resumed_and_measured(corpus, tiny_pipeline, tmp_path):
    torch.manual_seed(0)
    network = FeatureNetwork().eval().requires_grad_(False)
    prompts = quality_files.fixed_prompts(corpus, WANTED)
    settings = AlignmentSettings(drawings=3, steps=40, names=8, learning_rate=1e-2)
    arguments = (corpus, network, tiny_pipeline, tmp_path / "run", settings, prompts)
    first = text_alignment.train_alignment(*arguments)
    assert first.text.shape == (len(WANTED) * quality_files.CAPTIONS_PER_NAME, 128)
    np.testing.assert_allclose(np.linalg.norm(first.text, axis=1), 1, atol=1e-5)
    again = text_alignment.train_alignment(*arguments)
    np.testing.assert_array_equal(first.text, again.text)
    journal = (tmp_path / "run" / "journal.jsonl").read_text().splitlines()
    losses = [json.loads(line)["loss"] for line in journal]
    assert losses[-1] < losses[0]


# The files that ship


def test_every_prompt_is_a_caption_of_its_emoji_and_real_pictures_keep_to_it(corpus):
    shown, count = WANTED[:5], quality_files.CAPTIONS_PER_NAME
    prompts = quality_files.fixed_prompts(corpus, shown)
    assert prompts == quality_files.fixed_prompts(corpus, shown)
    asked = [corpus[prompt.name].name for prompt in prompts]
    assert {name: asked.count(name) for name in asked} == dict.fromkeys(shown, count)
    assert len({prompt.text for prompt in prompts}) == 5 * count
    assert all(corpus[prompt.name].name in prompt.text for prompt in prompts)
    for prompt in prompts:
        pictures = quality_files.real_pictures(corpus, prompt, 2)
        assert pictures.shape == (2, 128, 128, 3)
        assert not np.array_equal(pictures[0], pictures[1])
        named = [prompt.ground] * 2
        assert metrics.ground_share(pictures, named, BACKGROUNDS) in (1, None)


def test_the_written_data_can_be_measured_with(corpus, tmp_path):
    torch.manual_seed(0)
    network = FeatureNetwork().eval().requires_grad_(False)
    save_quality_data(quality_files.quality_data(corpus, network, WANTED[:5]), tmp_path)
    data = load_quality_data(tmp_path)
    assert data.corpus_sha256 == fingerprint(corpus)
    assert data.grounds == BACKGROUNDS
    assert data.reference.shape[1:] == (8, 128)
    assert len(data.reference) > metrics.NEAREST
    request = quality.choose_prompts(data, 8, 2)
    real = quality.score_real(request, data)
    assert real.pictures == 16
    assert all(
        value is None or np.isfinite(value).all() for value in list(asdict(real).values())[1:]
    )
