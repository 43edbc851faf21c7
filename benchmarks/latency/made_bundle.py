"""Bundles that exist for measuring alone: one ordinary UNet pass, other K, sizes and batches.

    python -m tiue_export.benchmarks.latency.made_bundle FOLDER --ckpt X --turbo-steps 1

A checkpoint's own weights, drawn as SD-Turbo is (recipe sd-turbo): a few-step student of this
architecture takes as long. It is exported, proven and run by the same code as any other.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tiue_export.bundle.read import MANIFEST_FILE
from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.registry.backends import open_exporter
from tiue_export.registry.spokes import run_explained
from tiue_export.specs import SUBPIXEL, UPSAMPLINGS
from tiue_export.system.child_process import child_command

from .settings import TorchSettings

_RECIPE = "sd-turbo"
_MODULE = "tiue_export.benchmarks.latency.made_bundle"

if TYPE_CHECKING:
    from tiue_export.student.model import Student


@dataclass(frozen=True)
class MadeBundle:
    """What decides such a bundle. `steps` is K, None the checkpoint's own; `forms` of backends.

    `turbo_steps` replaces the student's plan by SD-Turbo's in so many steps. Rows part at `fan_out`
    as in a student that was trained so: what that costs untrained weights is not measured. Sizes in
    pixels.
    """

    checkpoint: str
    base: str | None = None
    vae: str | None = None
    turbo_steps: int | None = None
    steps: int | None = None
    precision: str = "fp32"
    hoist: str = "decoder"
    upsampling: str = SUBPIXEL
    merge_below: float = 0.0
    fan_out: str = "0"
    height: int | None = None
    width: int | None = None
    batch: int = 1
    unet_only: bool = False
    forms: tuple[str, ...] = ()


def made(asked: MadeBundle, work: Path) -> Path:
    """The bundle below `work`, made in a process of its own unless it is there already.

    Raises `RuntimeFailure` with what that process said.
    """
    folder = _folder(asked, work)
    if is_made(asked, work):
        return folder
    work.mkdir(parents=True, exist_ok=True)
    command = child_command(_MODULE, str(folder), "--json", json.dumps(asdict(asked)))
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        lines = done.stderr.strip().splitlines() or [f"exit code {done.returncode}"]
        explained = [line for line in lines if line.startswith("error: ")]
        said = (explained or lines)[-1].removeprefix("error: ")
        raise RuntimeFailure(f"its graphs could not be made: {said}")
    return folder


def is_made(asked: MadeBundle, work: Path) -> bool:
    """Whether `made` has nothing left to do."""
    return (_folder(asked, work) / MANIFEST_FILE).is_file()


def make(asked: MadeBundle, folder: Path) -> None:
    """Export and prove the bundle in this process; `folder` is replaced if it is a bundle."""
    from tiue_export.export.onnx.bundle import export_onnx
    from tiue_export.graphs.options import ExportOptions

    options = ExportOptions(
        precision=asked.precision,
        height=asked.height,
        width=asked.width,
        batch=asked.batch,
        hoist=asked.hoist if asked.turbo_steps is None else "none",
        upsampling=asked.upsampling,
        merge_below=asked.merge_below,
    )
    # Times do not depend on what is drawn: a bundle that loses precision is measured all the same,
    # and its manifest says what it lost.
    bundle = export_onnx(_student(asked), folder, options, force=True, allow_parity_loss=True)
    for name in asked.forms:
        bundle = open_exporter(name)(bundle, force=True, allow_parity_loss=True)


def measured_student(checkpoint: str, asked: MadeBundle | TorchSettings) -> Student:
    """The checkpoint at the K that is asked for, with no more parts than are measured.

    Its rows part at once, wherever it learned to part: that is the official path.
    """
    from tiue_export.methods.load import load_student
    from tiue_export.sampling.fan_out import FanOut

    student = load_student(
        checkpoint,
        asked.base,
        steps=asked.steps,
        allow_other_steps=asked.steps is not None,
        vae=None if asked.unet_only else asked.vae,
        without=("text_encoder", "vae") if asked.unet_only else (),
    )
    return student.by_plan(student.plan.parting_at(FanOut()))


def _student(asked: MadeBundle) -> Student:
    from tiue_export.sampling.fan_out import FanOut
    from tiue_export.sampling.few_step import FewStepOptions, few_step_plan
    from tiue_export.sampling.recipes import recipe_named

    student = measured_student(asked.checkpoint, asked)
    fan_out = FanOut.parse(asked.fan_out)
    if asked.turbo_steps is not None:
        if fan_out:
            raise UsageError(
                f"--fan-out is {fan_out} with --turbo-steps: an ordinary pass has one row, which "
                "parts from nothing",
                "Leave one of the two out.",
            )
        options = FewStepOptions(steps=asked.turbo_steps)
        student.plan = few_step_plan(student.scheduler_config, recipe_named(_RECIPE), options)
        return student
    return student.by_plan(student.plan.parting_at(fan_out))


def _folder(asked: MadeBundle, work: Path) -> Path:
    return work / f"made-{_identity(asked)}"


def _identity(asked: MadeBundle) -> str:
    """Of the settings, and of the weights' files by name, size and time."""
    sources = [asked.checkpoint, asked.base, (asked.vae or "").removeprefix("tiny:")]
    files = [entry for source in sources if source for entry in _files(Path(source))]
    return hashlib.sha256(json.dumps([asdict(asked), files]).encode()).hexdigest()[:16]


def _files(path: Path) -> Iterator[tuple[str, int, int]]:
    for file in sorted(path.rglob("*")) if path.is_dir() else [path]:
        if file.is_file():
            facts = file.stat()
            yield str(file.resolve()), facts.st_size, facts.st_mtime_ns


def main() -> None:
    """Make one bundle."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", help=argparse.SUPPRESS)  # all settings at once, from `made`
    parser.add_argument("--ckpt", dest="checkpoint")
    parser.add_argument("--base")
    parser.add_argument("--vae")
    parser.add_argument("--turbo-steps", type=int, help="1 to 4: as SD-Turbo is drawn")
    parser.add_argument("--steps", type=int, help="K; default: the checkpoint's own")
    parser.add_argument("--precision", default="fp32")
    parser.add_argument("--hoist", default="decoder", choices=("decoder", "encoder", "none"))
    parser.add_argument("--upsampling", default=SUBPIXEL, choices=UPSAMPLINGS)
    parser.add_argument("--merge-below", type=float, default=0.0)
    parser.add_argument("--fan-out", default="0", help="where rows part, such as 2 or 1.2")
    parser.add_argument("--height", type=int)
    parser.add_argument("--width", type=int)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--unet-only", action="store_true")
    parser.add_argument("--forms", nargs="*", default=[], help="compiled forms, such as openvino")
    arguments = parser.parse_args()
    if arguments.json is None and arguments.checkpoint is None:
        parser.error("--ckpt is needed")
    run_explained(lambda: make(_asked(arguments), arguments.folder))


def _asked(arguments: argparse.Namespace) -> MadeBundle:
    given: dict[str, Any] = (
        vars(arguments) if arguments.json is None else json.loads(arguments.json)
    )
    values = {entry.name: given[entry.name] for entry in fields(MadeBundle)}
    return MadeBundle(**{**values, "forms": tuple(values["forms"])})


if __name__ == "__main__":
    main()
