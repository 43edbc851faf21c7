"""The command line as a user meets it: real processes' arguments, messages and exit codes."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from sealed_manifest import sealed_text

from tiue_export import open_bundle
from tiue_export.drawing.picture import parameters_from_png
from tiue_export.errors import BundleError
from tiue_export.registry import backends
from tiue_export.registry.backends import BackendEntry
from tiue_export.system.install import install_line

draw_line = importlib.import_module("tiue_export.apps.report.next_line").draw_line


def test_without_arguments_and_with_help_it_lists_the_commands(run):
    for arguments in ([], ["--help"], ["-h"]):
        _, out, err = run(*arguments)
        for command in ("onnx", "generate", "parity", "inspect", "doctor", "distill", "demo"):
            assert command in out + err


def test_version_is_printed(run):
    code, out, _ = run("--version")
    assert (code, out.split()[0]) == (0, "tiue-export")


def test_onnx_exports_prints_tables_and_the_next_command(run, micro_pipeline):
    code, out, err = run("onnx", "--ckpt", micro_pipeline, "--out", "fox")
    assert code == 0
    assert "unet_decoder" in out
    assert "passed" in out
    assert "FAILED" not in out
    assert 'tiue-export generate fox "a red fox" --time' in out
    assert re.search(r"export unet_decoder +\d+\.\d s +\d.* peak memory", err)
    assert open_bundle("fox").manifest.precision == "fp32"


def test_onnx_json_is_one_object_with_the_manifest_and_an_open_batch_needs_no_other_option(
    run, micro_folder
):
    arguments = ["onnx", "--ckpt", micro_folder, "--out", "fox", "--dynamic-batch", "--json"]
    code, out, err = run(*arguments)
    assert (code, err.count("\n")) == (0, 1)
    assert err.startswith("warning: the bundle will not draw: ")
    data = json.loads(out)
    assert data["missing"] == ["text_encoder", "vae_decoder"]
    assert data["manifest"]["plan"]["steps"] == 2
    assert {stage["stage"] for stage in data["stages"]} >= {"load student", "export unet_decoder"}
    assert open_bundle("fox").manifest.batch is None


def test_dry_run_prints_the_plan_and_writes_nothing(run, tiny_pipeline, tmp_path):
    code, out, _ = run("onnx", "--ckpt", tiny_pipeline, "--dry-run")
    assert code == 0
    assert "nothing was written" in out
    assert "751, 501, 251, 1" in out
    assert list(tmp_path.iterdir()) == []


def test_generate_writes_pngs_with_their_parameters(run, tiny_bundle, tmp_path):
    code, out, _ = run(
        "generate", tiny_bundle.root, "a red fox", "an owl", "--seed", 5, "--count", 2, "--time"
    )
    assert code == 0
    files = sorted((tmp_path / "pictures").iterdir())
    assert [f.name for f in files] == [
        "0000-a-red-fox-seed5.png",
        "0000-a-red-fox-seed6.png",
        "0001-an-owl-seed5.png",
        "0001-an-owl-seed6.png",
    ]
    parameters = parameters_from_png(files[3])
    assert (parameters["prompt"], parameters["seed"], parameters["steps"]) == ("an owl", 6, 4)
    assert "unet_decoder" in out
    assert "median ms" in out


def test_a_bundle_after_its_prompt_is_noticed(run, tiny_bundle):
    code, _, err = run("generate", "a red fox", tiny_bundle.root, "an owl")
    assert code == 2
    assert f"{tiny_bundle.root} is a bundle and stands where a prompt is expected" in err
    line = f"tiue-export generate {tiny_bundle.root} 'a red fox' 'an owl'"
    assert f"next: The bundle comes first: {line}" in " ".join(err.split())


def test_generate_json_lists_pictures_and_latencies(run, tiny_bundle):
    code, out, _ = run("generate", tiny_bundle.root, "an owl", "--out", "owl.png", "--json")
    assert code == 0
    data = json.loads(out)
    assert data["pictures"] == [{"path": "owl.png", "prompt": "an owl", "seed": 0}]
    assert set(data["stage_latency_ms"]) == set(tiny_bundle.manifest.graphs)


def test_generate_reads_prompts_from_a_file_and_noise_from_another(run, tiny_bundle, tmp_path):
    (tmp_path / "prompts.txt").write_text("\ufeffa cat\n\n  a dog \n", "utf-8")
    np.save("noise.npy", np.zeros((4, 8, 8), np.float32))
    code, out, _ = run(
        "generate", tiny_bundle.root, "--prompts", "prompts.txt", "--latents", "noise.npy"
    )
    assert code == 0
    assert [Path(line).name[5:10] for line in out.splitlines()] == ["a-cat", "a-dog"]


def test_runtimes_draw_the_same_picture(run, tiny_bundle, tiny_pipeline):
    from PIL import Image

    base = ["generate", tiny_bundle.root, "a red fox", "--seed", 1]
    assert run(*base, "--out", "ort.png")[0] == 0
    assert run(*base, "--out", "torch.png", "--runtime", "torch", "--ckpt", tiny_pipeline)[0] == 0
    difference = np.asarray(Image.open("ort.png")).astype(int) - np.asarray(Image.open("torch.png"))
    assert abs(difference).max() <= 1


def test_parity_holds_a_runtime_against_the_stored_reference(run, tiny_bundle):
    code, out, _ = run("parity", tiny_bundle.root, "--json")
    assert code == 0
    assert [r["subject"] for r in json.loads(out)] == [
        "latents / VAE scaling factor",
        "encoder_hidden_states",
        "latents",
        "picture",
    ]
    assert all(record["passed"] for record in json.loads(out))


def test_parity_fails_with_exit_code_7_when_a_runtime_draws_something_else(
    run, tiny_bundle, monkeypatch
):
    other = BackendEntry("None", "draws anything", "fake_runtime:open_runtime")
    monkeypatch.setitem(backends.BACKENDS, "fake", other)
    code, out, err = run("parity", tiny_bundle.root, "--runtime", "fake")
    assert code == 7
    assert "FAILED" in out
    assert "parity checks failed" in err


def test_inspect_shows_graphs_constants_and_parity(run, tiny_bundle):
    code, out, _ = run("inspect", tiny_bundle.root)
    assert code == 0
    for text in ("+4.234611528", "-2.491944646", "751", "unet_decoder", "passed", "SHA-256"):
        assert text in out
    code, out, _ = run("inspect", tiny_bundle.root, "--json")
    assert json.loads(out)["latent_shape"] == [1, 4, 8, 8]


def test_doctor_names_backends_and_remedies(run):
    code, out, _ = run("doctor", "--json")
    assert code == 0
    backends = {b["name"]: b for b in json.loads(out)["backends"]}
    assert backends["run: ort on cpu"]["usable"]
    assert all(b["usable"] or b["remedy"] for b in backends.values())
    assert run("doctor")[0] == 0


def test_any_command_removes_the_temporary_folders_of_killed_ones(run, monkeypatch, tmp_path):
    code = (
        "import os, signal; from tiue_export.system.owned_path import temporary_folder\n"
        "with temporary_folder(): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    subprocess.run(
        [sys.executable, "-c", code], env={**os.environ, "TMPDIR": str(tmp_path)}, check=False
    )
    assert len(list(tmp_path.glob(".tiue-export.work-*"))) == 1
    assert run("cache")[0] == 0
    assert list(tmp_path.glob(".tiue-export.work-*")) == []


def test_a_cache_that_cannot_be_written_is_one_line_and_the_picture_is_drawn(tiny_bundle, tmp_path):
    (tmp_path / "file").write_text("in the way")
    done = subprocess.run(
        [sys.executable, "-m", "tiue_export", "generate", str(tiny_bundle.root), "a red fox"]
        + ["--runtime", "auto", "--out", "fox.png"],
        env={**os.environ, "XDG_CACHE_HOME": str(tmp_path / "file")},
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (0, "fox.png\n"), done.stderr
    (warning,) = (line for line in done.stderr.splitlines() if "cannot be written" in line)
    assert warning.startswith("warning: ")
    assert warning.endswith(" (Not a directory): the next start measures again")


def test_doctor_tells_how_much_the_cache_holds(run, monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    kept = tmp_path / "tiue-export" / "openvino" / "1.blob"
    kept.parent.mkdir(parents=True)
    kept.write_bytes(bytes(3_000_000))
    _, out, _ = run("doctor", "--json")
    told = json.loads(out)["machine"]["cache"]
    assert told == (
        f"{tmp_path / 'tiue-export'}, 3.00 MB of at most 8.00 GB; can be deleted at any time "
        "(tiue-export cache)"
    )


def test_demo_refuses_to_overwrite_what_it_did_not_make(run, tmp_path):
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "file").touch()
    code, _, err = run("demo", "--out", "mine", "--force")
    assert (code, "was not made by the demo" in err) == (6, True)


# --- failures: exit code, what was got, what to type next


def failing(run, code: int, *parts: str, arguments: list[object]) -> str:
    got, _, err = run(*arguments)
    assert got == code, err
    assert re.search(r"^error: ", err, re.M), err
    assert "Traceback" not in err
    for part in parts:
        assert part in err, err
    return str(err)


def test_a_height_that_does_not_fit_names_the_nearest(run, tiny_pipeline):
    arguments = ["onnx", "--ckpt", tiny_pipeline, "--out", "b", "--height", "100"]
    failing(run, 2, "--height is 100", "multiple of 32", "--height 96", arguments=arguments)


def test_existing_output_is_refused_before_any_work(run, tiny_pipeline, bundle_copy):
    arguments = ["onnx", "--ckpt", tiny_pipeline, "--out", bundle_copy]
    failing(run, 6, "already holds a bundle", "--force", arguments=arguments)


@pytest.mark.parametrize(
    ("arguments", "code", "part"),
    [
        (["onnx", "--ckpt", "nothing.safetensors"], 2, "nothing.safetensors does not exist"),
        (["generate", "nothing", "a fox"], 6, "nothing does not exist"),
        (["inspect", "."], 6, "is no bundle: it has no tiue.json"),
        (["onnx", "--ckpt", "x.ckpt"], 3, "is a pickle"),
    ],
)
def test_wrong_paths_are_explained(run, tmp_path, arguments, code, part):
    (tmp_path / "x.ckpt").write_bytes(b"\x80\x02")
    failing(run, code, part, arguments=arguments)


def test_generate_refuses_bad_requests(run, tiny_bundle, tmp_path):
    root = tiny_bundle.root
    (tmp_path / "binary.txt").write_bytes(b"\xff\xfe\x00\x01")
    (tmp_path / "empty.txt").write_text("\n\n")
    Path("pictures").mkdir()
    Path("pictures/0000-an-owl-seed0.png").touch()
    for extra, code, part in (
        ([], 2, "no prompt was given"),
        (["a red fox", " "], 2, "a prompt is empty"),
        (["a red fox", "--count", "10000000"], 2, "10,000,000 pictures in one run; expected at"),
        (["an owl"], 2, "exists already"),
        (["a", "b", "--out", "x.png"], 2, "names one picture, the request makes 2"),
        (["a", "--seed", "-1"], 2, "seed -1 is out of range"),
        (["a", "--count", "0"], 2, "count is 0"),
        (["a", "--runtime", "orr"], 2, "Did you mean 'ort'?"),
        (["a", "--device", "tpu"], 2, "unknown device 'tpu'"),
        (["a", "--device", "cuda"], 9, "has no CUDAExecutionProvider"),
        (["a", "--threads", "0"], 2, "--threads is 0"),
        (["a", "--runtime", "torch"], 2, "needs its checkpoint"),
        (["--prompts", "binary.txt"], 2, "cannot be read as UTF-8"),
        (["--prompts", "empty.txt"], 2, "holds no prompt"),
        (["a", "--latents", "empty.txt"], 2, "cannot be read as an .npy array"),
    ):
        failing(run, code, part, arguments=["generate", root, *extra])


def test_square_brackets_are_text_not_markup(run, tiny_bundle, tmp_path):
    folder = Path(shutil.copytree(tiny_bundle.root, tmp_path / "[/bold]"))
    code, _, err = run("generate", folder, "[/b] [cat:dog] " * 60, "--out", "[red].png")
    assert code == 0
    assert "[/b] [cat:dog]" in err
    for command in ("inspect", "parity"):
        assert run(command, folder)[0] == 0


def test_the_current_folder_is_refused_as_output_at_once(run, tiny_pipeline):
    arguments = ["onnx", "--ckpt", tiny_pipeline, "--out", "."]
    failing(run, 6, "is the current folder", "bundle", arguments=arguments)


def test_noise_is_either_seeded_or_given(run, tiny_bundle, tmp_path):
    np.save(tmp_path / "noise.npy", np.zeros((4, 8, 8), np.float32))
    arguments = ["generate", tiny_bundle.root, "a", "--latents", "noise.npy", "--seed", "1"]
    failing(run, 2, "both say what the noise is", arguments=arguments)
    assert run(*arguments[:-2], "--json")[0] == 0
    parameters = parameters_from_png(Path("pictures/0000-a-noise.png"))
    assert (parameters["latents"], "seed" in parameters) == ("noise.npy", False)


def test_a_file_that_the_manifest_does_not_list_is_not_trusted(run, bundle_copy):
    manifest = bundle_copy / "tiue.json"
    data = json.loads(manifest.read_text())
    del data["files"]["tokenizer/tokenizer.json"]
    manifest.write_text(sealed_text(data))
    arguments = ["generate", bundle_copy, "a fox"]
    failing(run, 6, "the manifest lists no tokenizer/tokenizer.json", arguments=arguments)


def test_a_missing_extra_names_the_pip_line(run, tiny_pipeline, monkeypatch):
    registry = importlib.import_module("tiue_export.registry.packages")
    found = importlib.util.find_spec
    monkeypatch.setattr(
        registry.importlib.util,
        "find_spec",
        lambda n, *a: None if n == "onnxscript" else found(n, *a),
    )
    arguments = ["onnx", "--ckpt", tiny_pipeline]
    failing(run, 8, "needs onnxscript", install_line("export"), arguments=arguments)


def test_an_internal_error_is_reported_without_a_traceback(run, monkeypatch, tiny_bundle):
    inspection = importlib.import_module("tiue_export.apps.inspection")
    monkeypatch.setattr(inspection, "graph_table", lambda manifest: 1 / 0)
    arguments = ["inspect", tiny_bundle.root]
    failing(run, 1, "internal error: ZeroDivisionError", "please report it", arguments=arguments)


def test_a_prompt_that_is_too_long_is_cut_with_a_note(run, tiny_bundle):
    code, _, err = run("generate", tiny_bundle.root, "word " * 200, "--out", "long.png")
    assert code == 0
    assert re.search(r"the prompt has \d+ tokens, the last \d+ are cut", err)


# For each line (arguments, and a file for what is said) a copy of itself runs the command: its
# number, then how it ended.
COPIES = """
import functools, importlib, json, os, sys
main = importlib.import_module("tiue_export.apps.cli").main
for module in ("apps.export.onnx", "export.onnx.bundle", "methods.load"):
    importlib.import_module("tiue_export." + module)
import diffusers.models, torch.onnx, transformers
from torch.onnx._internal import _lazy_import
operators = _lazy_import.onnxscript_apis
operators.get_torchlib_ops = functools.cache(operators.get_torchlib_ops)  # as in conftest.py
operators.get_torchlib_ops()
for line in sys.stdin:
    arguments, said = json.loads(line)
    copy = os.fork()
    if copy == 0:
        os.dup2(os.open(said, os.O_WRONLY | os.O_CREAT), 2)
        sys.stdout = sys.stderr
        main(arguments)
    print(copy, flush=True)
    print(os.waitpid(copy, 0)[1], flush=True)
"""


class Copies:
    """Runs commands in copies of a process that has imported everything, one at a time."""

    def __init__(self, process: subprocess.Popen[str]) -> None:
        self._process = process

    def start(self, *arguments: object, said: Path = Path(os.devnull)) -> int:
        """The number of the process that runs the command; its stderr goes to `said`."""
        line = json.dumps([[str(argument) for argument in arguments], str(said)])
        print(line, file=self._process.stdin, flush=True)
        return int(self._process.stdout.readline())

    def ended(self) -> int:
        """Wait for it: its exit code, or minus the signal that killed it."""
        return os.waitstatus_to_exitcode(int(self._process.stdout.readline()))


@pytest.fixture(scope="module")
def copies():
    """Exports as processes of their own, which spend their seconds on the export. Shared."""
    with subprocess.Popen(
        [sys.executable, "-c", COPIES],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
    ) as process:
        yield Copies(process)
        process.stdin.close()


def test_a_terminated_export_cleans_up(copies, micro_folder, tmp_path):
    out, said = tmp_path / "out", tmp_path / "said"
    out.mkdir()
    export = copies.start("onnx", "--ckpt", micro_folder, "--out", out / "fox", said=said)
    while not any(out.iterdir()):
        time.sleep(0.05)
    os.kill(export, signal.SIGTERM)
    assert copies.ended() == 143, said.read_text()
    assert list(out.iterdir()) == []


@pytest.mark.slow
def test_an_export_killed_at_any_moment_leaves_nothing_that_opens(copies, micro_folder, tmp_path):
    """kill -9 at moments spread over the export; then a whole export cleans up after them."""
    command = ("onnx", "--ckpt", micro_folder, "--out", tmp_path / "fox")
    for delay in (0.5, 1.5, 2.5, 3.5):
        export = copies.start(*command)
        time.sleep(delay)
        with contextlib.suppress(ProcessLookupError):  # it had ended
            os.kill(export, signal.SIGKILL)
        copies.ended()
        for path in tmp_path.iterdir():
            if path.name == "fox":  # it had ended before the kill: then it must be whole
                open_bundle(path)
                shutil.rmtree(path)
                continue
            with pytest.raises(BundleError):
                open_bundle(path)
    copies.start(*command)
    assert copies.ended() == 0
    assert [path.name for path in tmp_path.iterdir()] == ["fox"]


@pytest.mark.slow
def test_a_full_disk_keeps_the_old_bundle_and_nothing_else_and_says_so(
    copies, micro_folder, tmp_path
):
    """A real file system of 256 kB; needs root for the mount."""
    small, said = tmp_path / "small", tmp_path / "said"
    small.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", str(small)]
    if os.geteuid() != 0 or subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a small tmpfs needs root")
    try:
        old = small / "fox"
        old.mkdir()
        (old / "tiue.json").write_text("old")
        copies.start("onnx", "--ckpt", micro_folder, "--out", old, "--force", said=said)
        assert copies.ended() == 10, said.read_text()
        assert "is full" in said.read_text()
        assert list(small.rglob("*")) == [old, old / "tiue.json"]
        assert (old / "tiue.json").read_text() == "old"
    finally:
        subprocess.run(["umount", str(small)], check=True)


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (
            ["onnx", "--audit-prompts", "none.txt", "--precision", "fp16", "--dry-run"],
            2,
            "none.txt",
        ),
        (["onnx", "--steps", 2, "--dry-run"], 5, "or pass --allow-other-steps to export K=2"),
        (
            ["onnx", "--steps", 1, "--allow-other-steps"],
            5,
            "K=1 on a 'leading' schedule has the single timestep 1, where the formula returns the "
            "input noise",
        ),
        (["onnx", "--merge-below", "nan"], 2, "--merge-below is nan; expected 0 or more"),
        (["coreml", "--attention", "NONE"], 2, "unknown attention 'NONE'"),
        (["coreml", "--precision", "int3"], 2, "unknown precision 'int3'"),
    ],
)
def test_an_option_reaches_what_refuses_its_value(run, tiny_pipeline, arguments, code, message):
    command, *rest = arguments
    found, _, err = run(command, "--ckpt", tiny_pipeline, *rest)
    assert found == code
    assert message in " ".join(err.split())


def test_other_steps_are_planned_when_allowed(run, tiny_pipeline):
    arguments = ["--ckpt", tiny_pipeline, "--steps", 2, "--allow-other-steps", "--dry-run"]
    code, out, _ = run("onnx", *arguments)
    assert (code, "K=2" in out) == (0, True)


def test_low_memory_frees_graphs_between_stages_and_draws_the_same(
    run, tiny_bundle, tmp_path, monkeypatch
):
    seen = []
    real = importlib.import_module("tiue_export.registry.backends").open_runtime

    def opened(name, bundle, options):
        seen.append(options.low_memory)
        return real(name, bundle, options)

    monkeypatch.setattr(
        importlib.import_module("tiue_export.drawing.pipeline"), "open_runtime", opened
    )
    for name, more in (("a.png", []), ("b.png", ["--low-memory"])):
        assert run("generate", tiny_bundle.root, "a fox", "--seed", 1, "--out", name, *more)[0] == 0
    assert seen == [False, True]
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("a.png", "b.png")]
    np.testing.assert_array_equal(*pictures)


def test_the_line_to_type_next_names_something_that_the_demo_can_draw(tiny_bundle):
    assert draw_line(tiny_bundle, "--time").endswith('"a red fox" --time')
    source = replace(tiny_bundle.manifest.source, family="demo")
    demo = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, source=source))
    assert draw_line(demo).endswith('"a red apple"')


def test_the_line_to_type_next_quotes_a_folder_with_a_space(tiny_bundle):
    spaced = replace(tiny_bundle, root=Path("my fox"))
    assert draw_line(spaced) == "tiue-export generate 'my fox' \"a red fox\""
