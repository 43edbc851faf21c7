"""Doors to the spokes: typed functions whose work lies in calibration, benchmarks or apps.

A door gives the name, signature and types; the spoke is imported on the first call, by the string
beside it. tests/test_spokes.py holds every door against the function behind it.
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, ParamSpec, TypeVar, cast

if TYPE_CHECKING:
    from rich.table import Table

    from tiue_export.bundle.read import Bundle
    from tiue_export.proof.calibration import CalibrationData, CaptureOptions, CapturePlan
    from tiue_export.proof.fan_out_curve import FanOutCurve
    from tiue_export.proof.key_step_results import Candidate, PromptResult
    from tiue_export.proof.latency_change import Change, Comparison
    from tiue_export.proof.latency_record import Record
    from tiue_export.proof.latency_request import LatencyOutcome, LatencyPlan
    from tiue_export.proof.quantization import MeasuredPlan, Point, Quantized, QuantizeOptions
    from tiue_export.proof.quantization_plan import QuantizationPlan
    from tiue_export.system.progress import Observer

P = ParamSpec("P")
R = TypeVar("R")

# Door -> "module:function" of what it opens.
DOORS: dict[str, str] = {}


def _door(target: str) -> Callable[[Callable[P, R]], Callable[P, R]]:
    """Make a declaration, whose own body never runs, the door to "module:function" of a spoke."""
    module, _, name = target.partition(":")

    def opened_by(declaration: Callable[P, R]) -> Callable[P, R]:
        DOORS[declaration.__name__] = target

        @functools.wraps(declaration)
        def call(*args: P.args, **kwargs: P.kwargs) -> R:
            work = getattr(importlib.import_module(f"tiue_export.{module}"), name)
            return cast(R, work(*args, **kwargs))

        return call

    return opened_by


@_door("apps.cli:main")
def run_command_line(arguments: list[str] | None = None) -> None:
    """The `tiue-export` command."""
    raise NotImplementedError


@_door("apps.report.failures:run_explained")
def run_explained(command: Callable[[], None]) -> None:
    """Run a benchmark's own command line as those of the program are run."""
    raise NotImplementedError


@_door("calibration.capture:plan_capture")
def plan_capture(bundle: Bundle, options: CaptureOptions) -> CapturePlan:
    """What a capture will hold; what cannot be captured is refused here, before any work."""
    raise NotImplementedError


@_door("calibration.capture:capture")
def capture(
    bundle: Bundle,
    root: Path,
    options: CaptureOptions,
    *,
    force: bool = False,
    on_run: Callable[[int, int], None] = lambda done, wanted: None,
) -> CalibrationData:
    """Capture what prompts feed the UNet into `root`, or go on where an earlier capture stopped."""
    raise NotImplementedError


@_door("benchmarks.studies.fan_out_plot:save_fan_out_plot")
def save_fan_out_plot(curve: FanOutCurve, path: Path, name: str) -> None:
    """PSNR of the latents over the UNet's operations; whole up blocks are marked and named."""
    raise NotImplementedError


@_door("calibration.quantize:check_quantize")
def check_quantize(bundle: Bundle, options: QuantizeOptions) -> None:
    """Refuse what cannot be made of a bundle, before the captured data are read."""
    raise NotImplementedError


@_door("calibration.quantize:make_plan")
def make_plan(
    bundle: Bundle, data: CalibrationData, options: QuantizeOptions, observer: Observer
) -> MeasuredPlan:
    """The plan alone, without writing a bundle."""
    raise NotImplementedError


@_door("calibration.quantize:quantize")
def quantize(
    bundle: Bundle,
    data: CalibrationData,
    out: Path,
    options: QuantizeOptions,
    *,
    force: bool = False,
    observer: Observer | None = None,
) -> Quantized:
    """Make `out` from `bundle`, or raise why it is not worth having and leave nothing."""
    raise NotImplementedError


@_door("calibration.plots:save_quantization_plots")
def save_quantization_plots(
    plan: QuantizationPlan, curve: Sequence[Point], folder: Path
) -> list[Path]:
    """Write sensitivity.png into `folder`, and int8-share.png where sets were measured."""
    raise NotImplementedError


@_door("benchmarks.latency.bench:measure_latency")
def measure_latency(
    plan: LatencyPlan, tell: Callable[[str], None] = lambda line: None
) -> LatencyOutcome:
    """Time contenders in turn and write the files; `tell` hears a line for each step."""
    raise NotImplementedError


@_door("benchmarks.latency.report:rich_table")
def latency_table(record: Record, ratios_to: Sequence[str]) -> Table:
    """The table of a record for a terminal."""
    raise NotImplementedError


@_door("benchmarks.latency.comparison:compare_records")
def compare_records(before: Record, now: Record) -> Comparison:
    """Every contender of either record, by name, and what else differs."""
    raise NotImplementedError


@_door("benchmarks.latency.comparison:change_table")
def change_table(changes: Sequence[Change]) -> Table:
    """Changes for a terminal, one row per contender."""
    raise NotImplementedError


@_door("benchmarks.latency.comparison:change_markdown")
def change_markdown(compared: Comparison) -> str:
    """The same as markdown, with what else differs."""
    raise NotImplementedError


@_door("benchmarks.studies.key_steps_plot:save_key_step_plots")
def save_key_step_plots(
    results: Sequence[PromptResult], found: Sequence[Candidate], folder: Path, name: str
) -> list[Path]:
    """Write blocks.png and key_steps.png into `folder`; `name` is the model's."""
    raise NotImplementedError
