"""A backend is two files and one entry: all of the program then knows it (toy_backend.py)."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from tiue_export.bundle.read import open_bundle
from tiue_export.export import backend

HERE = Path(__file__).parent
PROGRAM = (
    "import sys; import toy_backend; from tiue_export.registry.spokes import run_command_line\n"
    "run_command_line(sys.argv[1:])\n"
)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def toys(cache):
    """Run the program with the toy's entry in its table; (exit code, output, errors)."""

    def program(*arguments: object) -> tuple[int, str, str]:
        environment = {
            **os.environ,
            "PYTHONPATH": str(HERE),
            "XDG_CACHE_HOME": str(cache),
            "COLUMNS": "200",
            "NO_COLOR": "1",
        }
        done = subprocess.run(
            [sys.executable, "-c", PROGRAM, *map(str, arguments)],
            capture_output=True,
            text=True,
            check=False,
            env=environment,
        )
        return done.returncode, done.stdout, done.stderr

    return program


@pytest.fixture(scope="module")
def boxed(micro_pipeline, toys, tmp_path_factory):
    """A bundle whose toy form the program's own command has made."""
    from tiue_export import export_onnx, load_student

    root = tmp_path_factory.mktemp("toys") / "fox"
    export_onnx(load_student(micro_pipeline), root)
    code, out, err = toys("toy", "--bundle", root)
    assert code == 0, err
    assert "Toy 1 against the student" in out
    assert "--runtime toy" in out
    assert err.count("convert ") == 4
    assert "verify" in err
    return open_bundle(root)


def test_its_form_is_listed_proven_and_measured(boxed):
    compiled = boxed.manifest.compiled["toy"]
    assert list(compiled.graphs) == list(boxed.manifest.graphs)
    assert {"encoder_hidden_states", "latents", "picture"} == {r.subject for r in compiled.parity}
    assert all(record.passed and record.gate == 100 for record in compiled.parity)
    for graph, form in compiled.graphs.items():
        assert form.path == f"toy/{graph}.toy"
        assert list(form.files) == [form.path]
        assert form.report["convert_s"] >= 0
        assert form.report["peak_memory_bytes"] > 1e6


def test_the_same_form_is_not_made_twice_unless_forced(boxed, toys):
    code, _, err = toys("toy", "--bundle", boxed.root)
    assert code == 6
    assert f"{boxed.root} has toy graphs already" in err
    assert "Pass --force to make them again." in err
    assert toys("toy", "--bundle", boxed.root, "--force", "--json")[0] == 0
    assert list(open_bundle(boxed.root).manifest.compiled) == ["toy"]


def test_a_failing_gate_leaves_the_bundle_as_it_was_unless_the_loss_is_allowed(
    micro_bundle, toys, tmp_path
):
    own = shutil.copytree(micro_bundle.root, tmp_path / "own")
    before = (own / "tiue.json").read_text()
    hard = "from tiue_export.proof.gates import GATES_PSNR_DB as g; g['fp32'] = 290.0\n"
    command = [sys.executable, "-c", hard + PROGRAM, "toy", "--bundle", str(own)]
    environment = {**os.environ, "PYTHONPATH": str(HERE)}

    def run(*more: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*command, *more], capture_output=True, text=True, check=False, env=environment
        )

    done = run()
    assert done.returncode == 7
    assert "Accept the loss with --allow-parity-loss" in done.stderr
    assert (own / "tiue.json").read_text() == before
    assert not [path for path in own.iterdir() if "toy" in path.name]
    assert run("--allow-parity-loss").returncode == 0
    assert not all(r.passed for r in open_bundle(own).manifest.compiled["toy"].parity)


def test_it_draws(boxed, toys, tmp_path):
    pixels = []
    for runtime in ("toy", "ort"):
        file = tmp_path / f"{runtime}.png"
        command = ("generate", boxed.root, "a red fox", "--runtime", runtime, "--out", file)
        code, _, err = toys(*command)
        assert code == 0, err
        pixels.append(np.asarray(Image.open(file)))
    np.testing.assert_array_equal(*pixels)


def test_doctor_knows_it(toys):
    code, out, err = toys("doctor", "--json")
    assert code == 0, err
    told = json.loads(out)
    (check,) = (each for each in told["backends"] if "toy" in each["name"])
    assert check["name"] == "convert to Toy, run: toy"
    assert check["usable"]
    assert "tiue-export" in told["packages"]


def test_cache_knows_what_it_keeps(toys, cache):
    kept = next(cache.rglob("tiue*"), None) or cache / "tiue-export"
    (kept / "toy" / "one").mkdir(parents=True, exist_ok=True)
    code, out, err = toys("cache", "--kind", "toy")
    assert code == 0, err
    assert "toys put away" in out


def test_bench_measures_it(boxed, toys):
    script = (
        "import sys, toy_backend; from tiue_export.bundle.read import open_bundle\n"
        "from tiue_export.benchmarks.latency.contenders import ContenderRequest, bundle_lanes\n"
        "bundle = open_bundle(sys.argv[1])\n"
        "print(bundle_lanes(ContenderRequest(bundles=(bundle,)), bundle))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script, str(boxed.root)],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": str(HERE)},
    )
    assert done.returncode == 0, done.stderr
    assert "Lane(runtime='toy', precision='fp32')" in done.stdout


def test_help_and_the_first_steps_name_it(toys):
    _, listed, _ = toys("--help")
    assert "toy" in listed
    _, shown, _ = toys("generate", "--help")
    assert "with toy box" in " ".join(shown.split())
    _, command, _ = toys("toy", "--help")
    assert "toys in a box" in " ".join(command.split())
    code, steps, err = toys("init", "--device", "toybox", "--ckpt", "demo")
    assert code == 0, err
    assert "Box of toys: Toy" in steps
    assert "tiue-export toy --bundle" in steps


@pytest.mark.parametrize(("gigabytes", "crowded"), [(24, True), (32, False), (None, False)])
def test_graphs_are_proven_in_turn_where_all_would_crowd_the_memory(
    gigabytes, crowded, monkeypatch
):
    sizes = {"unet_encoder": (6_800_000_000, "fp16"), "vae_decoder": (200_000_000, "fp32")}
    graphs = {n: SimpleNamespace(size_bytes=s, precision=p) for n, (s, p) in sizes.items()}
    bundle = SimpleNamespace(manifest=SimpleNamespace(graphs=graphs))
    total = None if gigabytes is None else gigabytes * 10**9
    monkeypatch.setattr(backend, "memory_bytes", lambda: total)
    assert backend.crowds_memory(bundle) == crowded


def test_a_backend_stays_small():
    text = (HERE / "toy_backend.py").read_text("utf-8")
    assert len([line for line in text.splitlines() if line.strip()]) <= 70
