"""The paper's figure (c): the right features, the right mean, honest words, clear refusals."""

from __future__ import annotations

import importlib
import itertools
import json
import math
import shutil
import sys
from dataclasses import asdict, astuple, replace
from pathlib import Path

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel, CLIPTokenizer

from tiue_export.bundle.manifest import structured
from tiue_export.errors import CheckpointError, UsageError
from tiue_export.sampling.noise import noise_from_seed

bench = importlib.import_module("tiue_export.benchmarks.studies.feature_similarity")
features = importlib.import_module("tiue_export.reference.unet_blocks")
words = importlib.import_module("tiue_export.benchmarks.studies.feature_similarity_report")

PROMPT = "a red fox in the snow"
ENCODER = ["down_blocks.0", "down_blocks.1", "down_blocks.2"]
DECODER = ["up_blocks.0", "up_blocks.1", "up_blocks.2"]


@pytest.fixture(scope="module")
def loaded(tiny_pipeline: Path):
    return bench.load_pipeline(tiny_pipeline)


@pytest.fixture
def pipeline(tiny_pipeline: Path, tmp_path: Path) -> Path:
    """A pipeline folder of one's own."""
    return Path(shutil.copytree(tiny_pipeline, tmp_path / "pipeline"))


@pytest.fixture
def run(capsys, monkeypatch, tmp_path):
    """Call the benchmark's command line in an empty folder: (exit code, stdout, stderr)."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("NO_COLOR", "1")

    def call(*arguments: object) -> tuple[int, str, str]:
        code = 0
        try:
            bench.main([str(argument) for argument in arguments])
        except SystemExit as stopped:
            code = int(stopped.code or 0)
        captured = capsys.readouterr()
        return code, captured.out, captured.err

    return call


# --- the mean


@given(st.lists(st.floats(-50, 50).filter(lambda x: abs(x) > 1e-3), min_size=1, max_size=20))
@settings(max_examples=30, deadline=None)
def test_identical_features_have_similarity_1_whatever_their_length(values) -> None:
    row = torch.tensor(values)
    same = torch.stack([row, 3 * row, 0.5 * row])
    assert astuple(bench.similarity_over_steps(same)) == pytest.approx((1.0, 1.0, 1.0), abs=1e-5)


def test_three_vectors_by_hand() -> None:
    rows = torch.tensor([[2.0, 0.0], [1.0, 1.0], [0.0, 5.0]])  # at 0, 45 and 90 degrees
    half = math.sqrt(0.5)
    expected = (2 * half / 3, half / 2, half)
    assert astuple(bench.similarity_over_steps(rows)) == pytest.approx(expected, abs=1e-6)


@given(st.integers(2, 7), st.integers(1, 30), st.integers(0, 1000))
@settings(max_examples=30, deadline=None)
def test_the_mean_is_the_plain_loop_over_pairs_of_steps(steps, width, seed) -> None:
    rows = torch.from_numpy(np.random.RandomState(seed).standard_normal((steps, width)))
    cosines = {
        (i, j): float(F.cosine_similarity(rows[i], rows[j], dim=0))
        for i, j in itertools.combinations(range(steps), 2)
    }
    expected = (
        np.mean(list(cosines.values())),
        np.mean([value for (i, _), value in cosines.items() if i == 0]),
        np.mean([value for (i, j), value in cosines.items() if j == i + 1]),
    )
    assert astuple(bench.similarity_over_steps(rows)) == pytest.approx(expected, abs=1e-5)


# --- the features


def test_blocks_are_split_into_encoder_mid_and_decoder(loaded) -> None:
    blocks = features.named_blocks(loaded.student.unet)
    assert list(blocks) == [*ENCODER, "mid_block", *DECODER]
    assert [blocks[name] for name in ENCODER] == list(loaded.student.unet.down_blocks)
    assert [blocks[name] for name in DECODER] == list(loaded.student.unet.up_blocks)
    parts = [words.part_of(name) for name in blocks]
    assert parts == ["encoder"] * 3 + ["mid"] + ["decoder"] * 3


def test_a_block_is_taken_with_its_down_or_upsampler(loaded) -> None:
    rows = bench.block_outputs(loaded, torch.zeros(1, 4, 8, 8), loaded.embed([PROMPT]), steps=2)
    sizes = {name: tuple(matrix.shape) for name, matrix in rows.items()}
    channels_times_side = {
        "down_blocks.0": (24, 4),
        "down_blocks.1": (48, 2),
        "down_blocks.2": (48, 2),
        "mid_block": (48, 2),
        "up_blocks.0": (48, 4),
        "up_blocks.1": (48, 8),
        "up_blocks.2": (24, 8),
    }
    assert sizes == {name: (2, c * side**2) for name, (c, side) in channels_times_side.items()}


def reference_features(folder: Path, seed: int, steps: int, guidance: float):
    """Block outputs (T, N) from diffusers' own pipeline, VAE and all; conditional rows."""
    config = json.loads((folder / "scheduler" / "scheduler_config.json").read_text())
    unet = UNet2DConditionModel.from_pretrained(folder / "unet")
    drawing = StableDiffusionPipeline(
        vae=AutoencoderKL.from_pretrained(folder / "vae"),
        text_encoder=CLIPTextModel.from_pretrained(folder / "text_encoder"),
        tokenizer=CLIPTokenizer.from_pretrained(folder / "tokenizer"),
        unet=unet,
        scheduler=DDIMScheduler(
            beta_start=config["beta_start"],
            beta_end=config["beta_end"],
            beta_schedule="scaled_linear",
            clip_sample=False,
            set_alpha_to_one=False,
            steps_offset=1,
        ),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    drawing.set_progress_bar_config(disable=True)
    kept: dict[str, list[torch.Tensor]] = {}
    blocks = [*zip(ENCODER, unet.down_blocks, strict=True), ("mid_block", unet.mid_block)]
    for name, block in [*blocks, *zip(DECODER, unet.up_blocks, strict=True)]:
        block.register_forward_hook(
            lambda _, inputs, output, name=name: kept.setdefault(name, []).append(
                (output[0] if isinstance(output, tuple) else output)[-1].reshape(-1)
            )
        )
    latents = torch.from_numpy(noise_from_seed(seed, (1, 4, 8, 8)))
    drawing(
        PROMPT,
        latents=latents,
        num_inference_steps=steps,
        guidance_scale=guidance,
        output_type="latent",
    )
    return {name: torch.stack(rows) for name, rows in kept.items()}


@pytest.mark.parametrize("guidance", [1.0, 5.0])
def test_features_and_means_are_those_of_diffusers_own_pipeline(
    tiny_pipeline, loaded, guidance
) -> None:
    steps, seed = 3, 11
    expected = reference_features(tiny_pipeline, seed, steps, guidance)
    request = bench.Settings((PROMPT,), (seed,), guidance)
    measured = bench.measure(loaded, request, steps)
    assert measured.timesteps == (667, 334, 1)
    assert set(measured.blocks) == set(expected)
    for name, rows in expected.items():
        cosines = F.cosine_similarity(rows[:, None], rows[None], dim=-1)  # (T, T)
        all_pairs = (cosines.sum() - steps) / (steps * (steps - 1))
        (similarity,) = measured.blocks[name]
        assert similarity.all_pairs == pytest.approx(float(all_pairs), abs=1e-5)
        assert similarity.first_vs_rest == pytest.approx(float(cosines[0, 1:].mean()), abs=1e-5)
    summary = words.summarise(measured)
    by_hand = np.mean([measured.blocks[name][0].all_pairs for name in DECODER])
    assert summary.decoder.all_pairs == pytest.approx(by_hand)


def test_guidance_changes_the_run_and_its_features(loaded) -> None:
    plain, guided = (
        bench.measure(loaded, bench.Settings((PROMPT,), (0,), g), 3).blocks for g in (1.0, 7.5)
    )
    assert plain["up_blocks.2"] != guided["up_blocks.2"]


def test_the_hooks_leave_the_unet_even_after_an_interruption(loaded) -> None:
    def stop() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        bench.measure(loaded, bench.Settings((PROMPT,), (0,)), 2, stop)
    blocks = features.named_blocks(loaded.student.unet).values()
    assert all(not block._forward_hooks for block in blocks)


# --- loading


def test_the_vae_is_neither_needed_nor_read(tiny_pipeline, pipeline, loaded) -> None:
    (pipeline / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(b"damaged")
    assert bench.load_pipeline(pipeline).sha256 == loaded.sha256
    shutil.rmtree(pipeline / "vae")
    assert bench.load_pipeline(pipeline).sha256 == loaded.sha256


def test_another_scheduler_or_vocabulary_is_another_pipeline(pipeline, loaded) -> None:
    config = pipeline / "scheduler" / "scheduler_config.json"
    config.write_text(json.dumps({**json.loads(config.read_text()), "beta_end": 0.013}))
    changed = bench.load_pipeline(pipeline)
    assert changed.sha256 != loaded.sha256
    assert changed.scheduler["beta_end"] == 0.013


def test_a_pndm_configuration_is_not_given_ddims_clipping(loaded) -> None:
    assert loaded.scheduler["clip_sample"] is False
    assert loaded.scheduler["set_alpha_to_one"] is False
    assert loaded.scheduler["timestep_spacing"] == "leading"


@pytest.mark.parametrize("part", ["unet", "text_encoder", "tokenizer", "scheduler"])
def test_a_folder_without_a_needed_part_is_refused_by_name(pipeline, part) -> None:
    shutil.rmtree(pipeline / part)
    with pytest.raises(CheckpointError, match=f"lacks {part}/"):
        bench.load_pipeline(pipeline)


# --- what the numbers say


def curves(encoder, decoder, steps=(4, 8, 16, 32)):
    return words.Curves(tuple(steps), tuple(encoder), tuple(decoder))


def test_the_papers_own_curves_are_ordered_and_saturate() -> None:
    paper = words.PAPER
    assert len(paper.steps) == len(paper.encoder) == len(paper.decoder) == 13
    assert paper.violations == ()
    assert (min(paper.difference), max(paper.difference)) == pytest.approx((0.016, 0.031))
    assert paper.flat_from == (15, 20)
    assert paper.saturates


def test_a_broken_order_is_said_with_its_step_counts() -> None:
    broken = curves((0.5, 0.6, 0.7, 0.7), (0.4, 0.6, 0.71, 0.6))
    assert broken.violations == (8, 16)
    ordering, _ = words.statements(broken)
    assert "at 2 of 4 step counts (not at T=8, T=16)" in ordering


def test_curves_that_still_rise_or_a_short_range_do_not_saturate() -> None:
    rising, flat = (0.2, 0.3, 0.4, 0.5), (0.5, 0.5, 0.5, 0.5)
    assert curves(rising, flat).saturates is False
    assert curves(flat, flat).saturates is True
    short = curves((0.5, 0.5), (0.4, 0.4), steps=(4, 5))
    assert short.saturates is None
    assert "too short" in words.statements(short)[1]


def step_run(steps: int, **blocks: list[tuple[float, float, float]]):
    names = {name.replace("__", "."): values for name, values in blocks.items()}
    made = {n: tuple(words.Similarity(*v) for v in values) for n, values in names.items()}
    return words.StepRun(steps, tuple(range(steps)), 1.5, made)


def test_a_summary_averages_over_blocks_and_prompts_by_hand() -> None:
    measured = step_run(
        2,
        down_blocks__0=[(0.9, 0.8, 0.7), (0.5, 0.4, 0.3)],
        down_blocks__1=[(0.7, 0.6, 0.5), (0.3, 0.2, 0.1)],
        mid_block=[(0.1, 0.1, 0.1), (0.3, 0.3, 0.3)],
        up_blocks__0=[(0.7, 0.0, 0.0), (0.6, 0.0, 0.0)],
    )
    summary = words.summarise(measured)
    assert summary.encoder.all_pairs == pytest.approx(0.6)  # (0.8 + 0.4) / 2
    assert summary.encoder.all_pairs_std == pytest.approx(0.2)
    assert summary.encoder.first_vs_rest == pytest.approx(0.5)
    assert summary.encoder.adjacent == pytest.approx(0.4)
    assert summary.mid.all_pairs == pytest.approx(0.2)
    assert summary.decoder.all_pairs == pytest.approx(0.65)
    assert summary.prompts_ordered == 0.5


def test_a_unet_without_a_mid_block_has_none_in_table_and_plot(tmp_path) -> None:
    low, high = [(0.2, 0.2, 0.2)], [(0.4, 0.4, 0.4)]
    runs = [step_run(steps, down_blocks__0=high, up_blocks__0=low) for steps in (4, 8)]
    summary = [words.summarise(measured) for measured in runs]
    assert [row.mid for row in summary] == [None, None]
    assert list(words.similarity_table(summary).columns[3].cells) == ["-", "-"]
    words.save_plot(summary, tmp_path / "plot.png", "BK-SDM", "made up")
    assert (tmp_path / "plot.png").stat().st_size > 10_000


def test_a_run_survives_its_json() -> None:
    measured = step_run(2, down_blocks__0=[(0.25, 0.5, 1.0)], mid_block=[(0.1, 0.2, 0.3)])
    data = json.loads(json.dumps(asdict(measured)))
    assert structured(words.StepRun, data, "a run") == measured


# --- the command


def test_the_command_writes_numbers_table_words_and_plot(run, tiny_pipeline, tmp_path) -> None:
    arguments = (tiny_pipeline, "--steps", 2, 4, "--count", 2, "--seed", 5)
    code, out, _ = run(*arguments, "--json", "new/out.json", "--plot", "new/out.png")
    assert code == 0
    assert "first vs rest" in out
    assert "Ordering: the encoder's features are more alike" in out
    assert "Saturation:" in out
    data = json.loads((tmp_path / "new" / "out.json").read_text())
    assert [run["steps"] for run in data["runs"]] == [2, 4]
    assert data["runs"][1]["timesteps"] == [751, 501, 251, 1]
    assert data["request"]["seeds"] == [5, 6]
    assert data["request"]["prompts"] == list(bench.DEFAULT_PROMPTS[:2])
    assert set(data["runs"][0]["blocks"]) == {*ENCODER, "mid_block", *DECODER}
    assert data["paper"]["encoder"] == list(words.PAPER.encoder)
    assert data["environment"]["packages"]["torch"]
    assert str(Path.home()) not in json.dumps(data["environment"])
    blocks = data["runs"][1]["blocks"]
    encoder = [np.mean([prompt["all_pairs"] for prompt in blocks[name]]) for name in ENCODER]
    assert data["summary"][1]["encoder"]["all_pairs"] == pytest.approx(np.mean(encoder), abs=1e-6)
    assert str(tmp_path) not in json.dumps(data)
    with Image.open(tmp_path / "new" / "out.png") as picture:
        assert picture.format == "PNG"
        assert picture.width > 1200
        assert len(picture.convert("RGB").getcolors(1 << 24)) > 100


def test_prompts_repeat_with_other_seeds_when_there_are_too_few(
    run, tiny_pipeline, tmp_path
) -> None:
    (tmp_path / "prompts.txt").write_text("a cat\n\n  a dog \n")
    arguments = ("--prompts", "prompts.txt", "--steps", 2, "--count", 3, "--json", "out.json")
    assert run(tiny_pipeline, *arguments)[0] == 0
    request = json.loads((tmp_path / "out.json").read_text())["request"]
    assert request["prompts"] == ["a cat", "a dog", "a cat"]
    assert request["seeds"] == [0, 1, 2]


def test_measured_step_counts_are_kept_and_only_new_ones_added(
    run, tiny_pipeline, tmp_path
) -> None:
    def runs() -> dict[int, object]:
        return {r["steps"]: r for r in json.loads((tmp_path / "o.json").read_text())["runs"]}

    common = (tiny_pipeline, "--count", 1, "--json", "o.json", "--steps")
    assert run(*common, 4)[0] == 0
    first = runs()
    assert run(*common, 2, 4)[0] == 0
    second = runs()
    assert list(second) == [2, 4]
    assert second[4] == first[4]  # with its duration: it was not measured again
    assert run(*common, 4, "--force")[0] == 0
    assert list(runs()) == [4]


def test_another_request_does_not_mix_with_a_file(run, tiny_pipeline, tmp_path) -> None:
    common = (tiny_pipeline, "--steps", 2, "--json", "o.json", "--count")
    assert run(*common, 1)[0] == 0
    code, _, err = run(*common, 1, "--guidance", 3, "--seed", 4)
    assert code == UsageError.exit_code
    assert "another guidance, another seeds" in err
    assert "--force" in err


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"request": {}, "runs": [{"steps": 2}]}'])
def test_a_foreign_json_file_is_never_replaced_unasked(
    run, tiny_pipeline, tmp_path, content
) -> None:
    (tmp_path / "mine.json").write_text(content)
    code, _, err = run(tiny_pipeline, "--steps", 2, "--count", 1, "--json", "mine.json")
    assert code == UsageError.exit_code
    assert "no result of this benchmark" in err
    assert (tmp_path / "mine.json").read_text() == content


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--steps", 4, 1), "--steps is 1; expected 2 or more"),
        (("--steps", 1001), "--steps is 1001; expected 1 to 1000"),
        (("--count", 0), "--count is 0; expected 1 or more"),
        (("--seed", -1), "seed -1 is out of range"),
        (("--guidance", 0.5), "--guidance is 0.5; expected 1"),
        (("--guidance", "nan"), "--guidance is nan"),
        (("--plot", "out.pdf"), "--plot out.pdf is no .png file"),
        (("--plot", "."), "--plot . is a folder"),
        (("--json", "."), "--json . is a folder"),
        (("--prompts", "none.txt"), "--prompts none.txt cannot be read"),
        (("--prompts", "empty.txt"), "--prompts empty.txt holds no prompt"),
    ],
)
def test_a_wrong_option_is_explained(run, tiny_pipeline, tmp_path, arguments, message) -> None:
    (tmp_path / "empty.txt").write_text("\n  \n")
    code, _, err = run(tiny_pipeline, *arguments)
    assert code == UsageError.exit_code
    assert message in err


def test_a_path_that_is_no_pipeline_folder_is_explained(run, tmp_path) -> None:
    (tmp_path / "file").write_text("")
    (tmp_path / "empty").mkdir()
    for path, said in (
        ("nowhere", "nowhere is not there; expected a diffusers pipeline folder"),
        ("file", "file is a file; expected a diffusers pipeline folder"),
        ("empty", "lacks unet/, text_encoder/, tokenizer/, scheduler/"),
    ):
        code, _, err = run(path)
        assert code != 0
        assert said in err
        assert "model_index.json" in err


def test_a_plot_without_matplotlib_names_the_extra_before_anything_is_measured(
    run, monkeypatch, tmp_path
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)  # how Python marks what it cannot import
    code, _, err = run("nowhere", "--plot", "out.png")
    assert code == 8
    assert "matplotlib" in err
    assert "tiue-export[bench]" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_a_missing_cuda_device_is_explained(run, tiny_pipeline) -> None:
    code, _, err = run(tiny_pipeline, "--device", "cuda")
    assert (code, "--device cpu" in err) == (UsageError.exit_code, True)


def test_weights_that_overflow_are_explained(run, pipeline) -> None:
    file = pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(file)
    tensors["conv_in.weight"] *= 1e30
    save_file(tensors, file)
    code, _, err = run(pipeline, "--steps", 2, "--count", 1)
    assert code == 9
    assert "gave non-finite features at T=2" in err


def test_a_broken_order_is_plotted_too_and_pyplot_is_left_alone(tmp_path) -> None:
    before = "matplotlib.pyplot" in sys.modules
    low, high = (0.2, 0.2, 0.2), (0.9, 0.9, 0.9)
    broken = step_run(4, down_blocks__0=[low], mid_block=[low], up_blocks__0=[high])
    summary = [words.summarise(broken), words.summarise(replace(broken, steps=9))]
    words.save_plot(summary, tmp_path / "broken.png", "a name", "how it was measured")
    assert (tmp_path / "broken.png").read_bytes().startswith(b"\x89PNG")
    assert ("matplotlib.pyplot" in sys.modules) == before
