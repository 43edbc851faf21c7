"""Plans of Faster Diffusion judged on one bundle: the loops they are, the files they leave."""

from __future__ import annotations

import importlib
import json
import shutil
from pathlib import Path

import pytest
from PIL import Image
from teachers import load_teacher
from test_quality import made_up_data

from tiue_export import Pipeline, export_onnx
from tiue_export.benchmarks.quality.yardstick import save_quality_data
from tiue_export.errors import UsageError
from tiue_export.graphs.options import ExportOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.key_step_options import FasterOptions

bundles = importlib.import_module("tiue_export.benchmarks.quality.bundles")
checkpoints = importlib.import_module("tiue_export.benchmarks.quality.checkpoints")
front = importlib.import_module("tiue_export.benchmarks.quality.__main__")
yardstick = importlib.import_module("tiue_export.benchmarks.quality.yardstick")
GUIDANCE = 3.0


@pytest.fixture(scope="module")
def teacher_128px(micro_pipeline, tmp_path_factory) -> Path:
    """The micro model, ordinary and with pictures of 128 px."""
    folder = tmp_path_factory.mktemp("judged") / "teacher"
    shutil.copytree(micro_pipeline, folder)
    for part, changes in (
        ("unet/config.json", {"sample_size": 16}),
        ("scheduler/scheduler_config.json", {"tiue_steps": None}),
    ):
        config = {**json.loads((folder / part).read_text("utf-8")), **changes}
        kept = {key: value for key, value in config.items() if value is not None}
        (folder / part).write_text(json.dumps(kept), "utf-8")
    return folder


@pytest.fixture(scope="module")
def judged(teacher_128px, tmp_path_factory):
    """Its bundle of four steps, two pictures at a time. Shared."""
    options = FasterOptions(steps=4, key_steps=(0, 2), guidance=GUIDANCE)
    folder = tmp_path_factory.mktemp("judged") / "bundle"
    return export_onnx(load_teacher(teacher_128px, options=options), folder, ExportOptions(batch=2))


@pytest.fixture(scope="module")
def data_folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("judged") / "data"
    save_quality_data(made_up_data("custom"), folder)
    return folder


def test_plans_are_the_reference_the_shorter_ones_and_each_list_with_and_without_injection():
    names = [planned.name for planned in bundles.plans(3.0, [("auto", (0, 1, 9))])]
    lists = ["uniform 2", "uniform 4", "uniform 6", "published", "auto"]
    without = [f"{name}, no injection" for name in lists]
    assert names == ["DDIM 50", "DDIM 25", "DDIM 9", *lists, *without]


@pytest.mark.parametrize("number", [0, 2])  # 50 and 9 steps
def test_ordinary_sampling_on_the_graphs_is_diffusers_own(teacher_128px, judged, number):
    planned = bundles.plans(GUIDANCE, [])[number]
    prompts, seeds = ["a red fox", "an owl"], [3, 9]
    with Pipeline.open(judged) as pipeline:
        ours = bundles.planned_contender(planned, pipeline).draw(prompts, seeds)
    checkpoint = checkpoints.open_checkpoint(teacher_128px)
    steps = planned.options.asked_steps
    theirs = checkpoints.teacher_contender(checkpoint, steps, GUIDANCE).draw(prompts, seeds)
    assert psnr_db(theirs.latents, ours.latents) > 100


def test_a_bundle_with_a_plan_is_drawn_with_its_guidance(judged):
    with Pipeline.open(judged) as pipeline:
        drawn = bundles.pipeline_contender("x", pipeline).draw(["a red fox"], [3])
        expected = pipeline("a red fox", seed=3).pictures[0].latents
    assert psnr_db(expected, drawn.latents[0]) > 100


def test_the_command_prints_a_table_and_writes_json_and_plot(
    judged, data_folder, tmp_path, monkeypatch, capsys
):
    monkeypatch.setattr(bundles, "PLAIN_STEPS", (6, 3, 2))
    monkeypatch.setattr(bundles, "_STEPS", 6)
    monkeypatch.setattr(bundles, "UNIFORM", (2,))
    files = {"--json": tmp_path / "q.json", "--plot": tmp_path / "new" / "q.png"}
    where = ["plans", judged.root, "--data", data_folder, "--prompts", 6]
    arguments = [part for pair in files.items() for part in pair]
    front.main([*map(str, (*where, "--key-steps", "auto=0,1,4", *arguments))])
    assert "ms a picture" in capsys.readouterr().out
    scores = json.loads(files["--json"].read_text("utf-8"))["scores"]
    assert [entry["name"] for entry in scores][:4] == [
        "real pictures", "DDIM 6", "DDIM 3", "DDIM 2",
    ]  # fmt: skip
    assert all(entry["picture_ms"] > 0 for entry in scores[1:])
    with Image.open(files["--plot"]) as image:
        assert min(image.size) > 300


def test_a_distilled_bundle_has_no_plans(tiny_bundle, tmp_path, monkeypatch, capsys):
    save_quality_data(made_up_data("tiny"), tmp_path)
    monkeypatch.setattr(yardstick, "PICTURE_SIZE_PX", 64)
    where = ["plans", tiny_bundle.root, "--data", tmp_path, "--prompts", 6]
    with pytest.raises(SystemExit) as stopped:
        front.main([*map(str, where)])
    assert stopped.value.code == UsageError.exit_code
    assert "is a distilled student: it has no key steps" in capsys.readouterr().err


@pytest.mark.parametrize("text", ["auto", "=0,1", "auto=", "auto=0,x"])
def test_key_steps_that_are_no_named_list_are_refused(text):
    with pytest.raises(UsageError, match="expected NAME=LIST"):
        bundles.named_list(text)
