"""What export commands refuse before any work, plan without writing, and take from a bundle."""

from __future__ import annotations

import importlib
import json
import shutil
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from tiue_export import ExportOptions, export_onnx, load_student, open_bundle
from tiue_export.registry.support import OPTION_REFUSALS, VERBS
from tiue_export.sampling.fan_out import FanOut

refit = importlib.import_module("tiue_export.apps.export.refit")
ExportRequest = importlib.import_module("tiue_export.apps.options.graphs").ExportRequest


def refused(run, folder: Path, *arguments: object) -> str:
    """The message of a usage error, after which the folder is as it was."""
    before = sorted(folder.rglob("*"))
    code, out, err = run(*arguments)
    assert (code, out) == (2, ""), err
    assert "Traceback" not in err
    assert sorted(folder.rglob("*")) == before
    return " ".join(err.split())


# --- beside --bundle


@pytest.mark.parametrize(
    ("command", "needs"), [("openvino", ()), ("trt", ()), ("coreml", ("--ckpt",))]
)
def test_what_only_an_export_can_use_is_refused_beside_a_bundle_by_name(
    run, bundle_copy, tiny_pipeline, tmp_path, command, needs
):
    ckpt = [word for flag in needs for word in (flag, tiny_pipeline)]
    arguments = [command, "--bundle", bundle_copy, *ckpt]
    for flag, value in (
        ("--out", "fox2"),
        ("--family", "tiny"),
        ("--steps", "4"),
        ("--merge-below", "0.02"),
        ("--hoist-into", "decoder"),
        ("--no-audit", None),
    ):
        err = refused(run, tmp_path, *arguments, flag, *([value] if value else []))
        assert f"{flag} is for the export of a checkpoint; {bundle_copy} has its graphs" in err
        assert "next: Leave it out, or export anew" in err


def test_openvino_never_changes_another_bundle_than_the_one_it_was_told_to(
    run, bundle_copy, tmp_path
):
    arguments = ["openvino", "--bundle", bundle_copy, "--out", "fox2", "--vae", "tiny:X"]
    assert "--vae, --out are for the export of a checkpoint" in refused(run, tmp_path, *arguments)
    assert open_bundle(bundle_copy).manifest.compiled == {}


# --- before the export


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--weights", "fp8"], "unknown weights 'fp8'"),
        (["--precision", "fp61"], "unknown precision 'fp61'"),
        (["--batch", "1:2:4"], "--batch 1:2:4 is a range, which is for TensorRT engines"),
        (["--batch", "two"], "--batch is 'two'; expected one number"),
        (["--vae-precision", "fp8"], "unknown VAE precision 'fp8'"),
        (["--hoist-into", "decoder", "--no-hoist"], "--no-hoist and --hoist-into were both given"),
        (["--audit-prompts", "p.txt"], "--audit-prompts is for graphs in half precision"),
        (["--no-audit"], "the ONNX graphs made here are fp32"),
        (["--controlnet", "edges"], "--controlnet is for --method faster"),
        (["--method", "faster", "--allow-other-steps"], "--allow-other-steps is for --method tiue"),
        (["--method", "faster", "--budget", "0.7"], "--budget is for --key-steps auto"),
    ],
)
def test_wrong_words_are_refused_before_anything_is_loaded(
    run, tiny_pipeline, tmp_path, monkeypatch, options, message
):
    loader = importlib.import_module("tiue_export.export.load")
    monkeypatch.setattr(loader, "load_to_export", lambda *_: pytest.fail("it was loaded"))
    assert message in refused(run, tmp_path, "openvino", "--ckpt", tiny_pipeline, *options)


# What makes a feature of the table, and each of its options, as they would be typed.
_TYPED_FOR = {
    "passes": ("--method", "faster"),
    "long-prompts": ("--max-prompt-tokens", "150"),
}
_TYPED = {
    "--upsampling": ("--upsampling", "nearest"),
    "--vae-precision": ["--vae-precision", "fp32"],
    "--no-audit": ["--no-audit"],
    "--audit-prompts": ["--audit-prompts", "{prompts}"],
    "--dynamic-batch": ["--dynamic-batch"],
    "--max-decoder-rows": ["--max-decoder-rows", "4"],
    "several --size": ["--size", "64x64", "--size", "64x128"],
    "--compress w8a8": ["--compress", "w8a8", "--calibration-prompts", "{prompts}"],
    "--target-psnr": ["--target-psnr", "40"],
    "--target-mb": ["--target-mb", "1"],
    "--swift-bundle": ["--swift-bundle"],
}


@pytest.mark.parametrize(
    ("refusal", "verb"),
    [(refusal, verb) for refusal in OPTION_REFUSALS for verb in refusal.verbs],
    ids=lambda value: getattr(value, "option", value),
)
def test_an_option_that_means_nothing_to_a_form_is_refused_by_name(
    run, tiny_pipeline, tmp_path, refusal, verb
):
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("a red fox")
    words = [word.format(prompts=prompts) for word in _TYPED[refusal.option]]
    having = [word for feature in refusal.features for word in _TYPED_FOR[feature]]
    err = refused(run, tmp_path, verb, "--ckpt", tiny_pipeline, *having, *words)
    assert f"{refusal.option} is not for {VERBS[verb]}" in err
    assert refusal.reason in err


@pytest.mark.parametrize("command", ["onnx", "openvino", "trt", "coreml", "coreai"])
def test_a_file_that_fits_two_families_is_told_apart_by_the_option_the_message_names(
    run, tiny_pipeline, tmp_path, monkeypatch, command
):
    """SD 2.1-base and SD 2.1 have equal weights: every command takes the option it asks for."""
    loading = importlib.import_module("tiue_export.student.load")
    parts = importlib.import_module("tiue_export.export.load")
    monkeypatch.setattr(loading, "families_of", lambda shapes: ("tiny", "sd21-v"))
    real, asked = parts.load_to_export, []

    def load(request, *rest):
        asked.append(request.prediction)
        return real(request, *rest)

    monkeypatch.setattr(parts, "load_to_export", load)
    file = tiny_pipeline / "unet" / "diffusion_pytorch_model.safetensors"
    single = Path(shutil.copy(file, tmp_path / "student.safetensors"))
    arguments = [command, "--ckpt", single, "--dry-run", *_on_rtx(command)]
    err = refused(run, tmp_path, *arguments)
    assert "Say which: --prediction epsilon" in err
    code, out, err = run(*arguments, "--prediction", "epsilon")
    assert code == 0, err
    assert "nothing was written" in out
    assert asked == [None, "epsilon"]


def _on_rtx(command: str) -> list[str]:
    """What lets the command plan where there is no GPU."""
    if command != "trt":
        return []
    flavors = importlib.import_module("tiue_export.system.tensorrt_flavor").installed_flavors()
    if "rtx" not in flavors:
        pytest.skip("TensorRT-RTX is not installed")
    return ["--flavor", "rtx", "--sm", "86"]


@pytest.mark.parametrize("command", ["openvino", "trt", "coreml", "coreai"])
def test_other_steps_are_planned_by_every_command_that_tells_of_the_option(
    run, tiny_pipeline, command
):
    arguments = [command, "--ckpt", tiny_pipeline, "--steps", 2, "--dry-run", *_on_rtx(command)]
    code, _, err = run(*arguments)
    assert (code, "or pass --allow-other-steps" in err) == (5, True)
    code, out, err = run(*arguments, "--allow-other-steps")
    assert code == 0, err
    assert "K=2" in out


# --- dry runs


@pytest.mark.parametrize("told", [(), ("--json",)])
@pytest.mark.parametrize("command", ["openvino", "trt", "coreml"])
def test_a_dry_run_beside_an_earlier_export_prints_the_plan(
    run, tiny_bundle, tiny_pipeline, tmp_path, command, told
):
    kind = {"openvino": "fp32", "trt": "fp16", "coreml": "coreml"}[command]
    earlier = tmp_path / f"{tiny_pipeline.name}-{kind}"
    earlier.mkdir()
    (earlier / "tiue.json").write_text(tiny_bundle.manifest.to_json())
    arguments = [command, "--ckpt", tiny_pipeline, *_on_rtx(command)]
    code, out, err = run(*arguments, "--dry-run", *told)
    assert code == 0, err
    assert json.loads(out)["bundle"] == earlier.name if told else "nothing was written" in out
    code, _, err = run(*arguments, *told)
    assert (code, f"{earlier.name} already holds a bundle" in err) == (6, True)
    assert f"next: Use it: tiue-export {command}" in err


def test_a_dry_run_of_a_bundle_says_what_would_be_made_and_makes_nothing(
    run, bundle_copy, tiny_pipeline
):
    arguments = ["openvino", "--bundle", bundle_copy, "--weights", "fp16", "--dry-run"]
    code, out, _ = run(*arguments)
    assert code == 0
    for part in ("nothing was made", "unet_decoder", "to make", "weights fp16"):
        assert part in out
    code, out, _ = run(*arguments, "--json")
    plan = json.loads(out)
    assert (plan["form"], plan["exists"]) == ("openvino", False)
    assert plan["settings"]["weights"] == "fp16"
    assert open_bundle(bundle_copy).manifest.compiled == {}


def test_a_dry_run_tells_of_a_form_that_is_there(run, compiled_bundle):
    code, out, _ = run("openvino", "--bundle", compiled_bundle.root, "--dry-run")
    assert (code, "there; --force anew" in out) == (0, True)


# --- refitting


@pytest.fixture
def refittable(tiny_bundle, tmp_path, monkeypatch):
    """A bundle whose engines could be given other weights here, were there a GPU."""
    root = Path(shutil.copytree(tiny_bundle.root, tmp_path / "fox"))
    engines = SimpleNamespace(backend="tensorrt", graphs=dict.fromkeys(tiny_bundle.manifest.graphs))
    monkeypatch.setattr(refit, "check_refittable", lambda bundle: (engines, {}))
    monkeypatch.setattr(refit, "refit_from", lambda *_: pytest.fail("it was refitted"))
    return root


def test_a_dry_run_of_a_refit_writes_nothing(run, refittable, tiny_pipeline, bundle_copy, tmp_path):
    before = sorted(tmp_path.rglob("*"))
    arguments = ["trt", "--bundle", refittable, "--refit-from", tiny_pipeline, "--dry-run"]
    code, out, err = run(*arguments)
    assert code == 0, err
    assert "nothing was written" in out
    assert f"then its weights go into the engines of {refittable}" in out.replace("\n", " ")
    code, out, err = run(*arguments, "--json")
    assert json.loads(out)["latent_shape"] == [1, 4, 8, 8]
    code, out, err = run("trt", "--bundle", refittable, "--refit-from", bundle_copy, "--dry-run")
    assert (code, "(nothing was written)" in out.replace("\n", " ")) == (0, True), err
    assert sorted(tmp_path.rglob("*")) == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--sm", "86"], "--sm is no part of --refit-from"),
        (["--flavor", "rtx", "--rebuild"], "--flavor, --rebuild are no part of --refit-from"),
        (["--precision", "fp16"], "--precision is no part of --refit-from"),
        (["--optimization-level", "1"], "--optimization-level is no part of --refit-from"),
        (["--batch", "2"], "--batch is decided by"),
        (["--vae-tile", "64"], "--vae-tile is decided by"),
        (["--max-prompt-tokens", "150"], "--max-prompt-tokens is decided by"),
        (["--method", "faster"], "--method is decided by"),
    ],
)
def test_a_refit_refuses_what_it_would_not_honour(
    run, refittable, tiny_pipeline, tmp_path, options, message
):
    arguments = ["trt", "--bundle", refittable, "--refit-from", tiny_pipeline, *options]
    assert message in refused(run, tmp_path, *arguments)


def test_a_refit_from_a_bundle_takes_it_as_it_is(run, refittable, bundle_copy, tmp_path):
    arguments = ["trt", "--bundle", refittable, "--refit-from", bundle_copy, "--out", "x"]
    err = refused(run, tmp_path, *arguments)
    assert f"--out is for a checkpoint, and {bundle_copy} is a bundle" in err


@pytest.mark.parametrize(
    "options",
    [
        ExportOptions(vae_tile=32, height=64, width=96, hoist="encoder"),
        ExportOptions(vae_precision="fp16", hoist="none", batch=2, fan_out=FanOut(0, 1)),
        ExportOptions(dynamic_batch=True, max_prompt_tokens=150),
    ],
)
def test_graphs_for_a_refit_are_exported_as_those_of_the_engines_were(
    micro_pipeline, tmp_path, options
):
    student = load_student(micro_pipeline)
    if options.vae_tile is not None:
        options = replace(options, vae_tile=64, height=128, width=192)
    manifest = export_onnx(student, tmp_path / "fox", options, allow_parity_loss=True).manifest
    asked = refit.options_of(manifest, ExportRequest())
    ours = importlib.import_module("tiue_export.apps.export.onnx").graph_options(asked, "fp32")
    known = replace(options, height=manifest.height_px, width=manifest.width_px)
    assert ours == known


@pytest.mark.parametrize(("typed", "again"), [({}, False), ({"force": True}, True)])
def test_force_means_the_same_to_engines_as_to_every_other_form(tmp_path, typed, again):
    options = importlib.import_module("tiue_export.apps.options.trt")
    trt = importlib.import_module("tiue_export.apps.export.trt")
    source = options.EngineSource(bundle=tmp_path)
    request = options.EngineExportRequest(**typed)
    assert trt._trt_options(source, options.EngineOptions(), request).rebuild is again
    trt.check_source(trt.FORM, source, request, batch_range=True)
