"""`optimum-cli export tiue`: optimum finds our plugin in an installed wheel, and it exports."""

from __future__ import annotations

import json
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

from tiue_export.bundle.read import open_bundle
from tiue_export.errors import UsageError

if TYPE_CHECKING:
    from packaging_fixtures import Installation

pytest_plugins = ["packaging_fixtures"]
OPTIMUM_CLI = ("-m", "optimum.commands.optimum_cli")


@pytest.fixture(autouse=True)
def _needs_optimum() -> None:
    pytest.importorskip("optimum.commands.optimum_cli", reason="optimum is not installed")


def test_optimum_lists_our_command_once(installation: Installation, tmp_path: Path) -> None:
    done = installation.run(*OPTIMUM_CLI, "export", "--help", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    rows = [line.split(None, 1) for line in done.stdout.splitlines() if line.startswith("    ")]
    assert ["tiue", "Export a TiUE student to a verified ONNX bundle."] in rows
    assert "conflicting" not in done.stderr


def test_optimum_loads_the_plugin_of_the_wheel_without_torch(
    installation: Installation, tmp_path: Path
) -> None:
    code = (
        "import json, sys\n"
        "from optimum.commands.optimum_cli import load_optimum_namespace_cli_commands\n"
        "load_optimum_namespace_cli_commands()\n"
        "from optimum.commands.register import register_tiue\n"
        "print(json.dumps([register_tiue.__file__, sorted(sys.modules)]))"
    )
    done = installation.run("-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    file, loaded = json.loads(done.stdout.splitlines()[-1])
    assert file.startswith(str(installation.site))
    assert not {"tiue_export", "diffusers", "onnx"} & set(loaded)


@pytest.mark.slow
def test_optimum_writes_a_bundle_that_opens(
    installation: Installation, micro_pipeline: Path, tmp_path: Path
) -> None:
    arguments = ["--model", str(micro_pipeline), "--dtype", "fp32", "out"]
    done = installation.run(*OPTIMUM_CLI, "export", "tiue", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    bundle = open_bundle(tmp_path / "out")
    assert set(bundle.manifest.graphs) == {
        "text_encoder",
        "unet_encoder",
        "unet_decoder",
        "vae_decoder",
    }
    assert all(record.passed for record in bundle.manifest.parity)


def test_optimum_passes_our_errors_on_without_a_traceback(
    installation: Installation, tmp_path: Path
) -> None:
    arguments = ["--model", str(tmp_path / "absent"), "out"]
    done = installation.run(*OPTIMUM_CLI, "export", "tiue", *arguments, cwd=tmp_path)
    assert done.returncode == UsageError.exit_code
    assert "absent" in done.stderr
    assert "Traceback" not in done.stderr
    assert not (tmp_path / "out").exists()


def test_doctor_does_not_take_our_own_plugin_file_for_optimum(
    installation: Installation, tmp_path: Path
) -> None:
    without_optimum = tmp_path / "dependencies"
    without_optimum.mkdir()
    for package in Path(sysconfig.get_path("purelib")).iterdir():
        if not package.name.startswith(("optimum", "tiue_export", "__")):
            (without_optimum / package.name).symlink_to(package)
    paths = [str(installation.site), str(without_optimum)]
    code = (
        f"import sys; sys.path += {paths!r}\n"
        "from tiue_export.registry.spokes import run_command_line\n"
        "run_command_line(['doctor', '--json'])"
    )
    done = installation.run("-S", "-c", code, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    backends = {backend["name"]: backend for backend in json.loads(done.stdout)["backends"]}
    assert backends["export to ONNX"]["usable"]
    assert not backends["optimum-cli export tiue"]["usable"]


def test_diffusers_does_not_remark_on_the_plugin_in_any_process() -> None:
    done = subprocess.run(
        [sys.executable, "-c", "import tiue_export, diffusers"], capture_output=True, text=True
    )
    assert done.returncode == 0
    assert "optimum" not in done.stderr
