"""`tiue-export analyze`: which steps of a model need its encoder, by measurement, with pictures."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence

from rich.table import Table

from tiue_export.checkpoint.container import check_checkpoint_path
from tiue_export.errors import UsageError
from tiue_export.proof.key_step_results import (
    RESULT_FILE,
    AnalysisRequest,
    Candidate,
    read_results,
    write_results,
)
from tiue_export.registry.packages import EXPORT_NEEDS, require
from tiue_export.registry.spokes import save_key_step_plots
from tiue_export.sampling.plan import DEFAULT_GUIDANCE
from tiue_export.system.command_line import command_line
from tiue_export.system.disk_errors import disk_errors
from tiue_export.system.lock import sole_process

from .draw.prompt_file import prompts_in
from .options.analyze import AnalyzeRequest
from .options.group import picked, typed
from .report.next_line import print_next
from .report.stages import stage_bar
from .report.tables import console, fixed, numbers, print_json, titled


def run(request: AnalyzeRequest) -> None:
    """Measure what is missing, choose, draw what was chosen, and print."""
    require("analysing", EXPORT_NEEDS, "export")
    require("plots", ("matplotlib",), "bench")
    check_checkpoint_path(request.ckpt)
    prompts = _prompts(request)
    from tiue_export.methods.load import CheckpointRequest, load_for_method
    from tiue_export.methods.method import SamplingOptions
    from tiue_export.reference.key_step_analysis import candidates, measure_prompt
    from tiue_export.reference.sharing_cost import torch_model

    with disk_errors(request.out):
        request.out.mkdir(parents=True, exist_ok=True)
    alone = sole_process(request.out / ".lock", f"analysing into {request.out}")
    with alone, stage_bar(quiet=request.as_json) as bar:
        bar.begin("load model")
        teacher = load_for_method(
            picked(CheckpointRequest, request),
            "faster",
            # The budget is for choosing here, not for loading.
            picked(SamplingOptions, request, budget=None),
            lambda part: bar.begin(f"load {part}"),
        )
        model = torch_model(teacher, request.height, request.width)
        described = AnalysisRequest(
            sha256=teacher.source.sha256,
            scheduler=teacher.plan.scheduler,
            steps=teacher.plan.steps,
            guidance=request.guidance or DEFAULT_GUIDANCE,
            reach=request.reach or teacher.plan.rows,
        )
        _check_budget(request, model.encoder_share, teacher.plan.rows)
        file = request.out / RESULT_FILE
        results = [] if request.force else read_results(file, described)
        bar.expect(request.count + 1)
        for number in range(request.count):
            prompt = prompts[number % len(prompts)]
            bar.begin(f"prompt {number + 1}")
            if any((r.prompt, r.seed) == (prompt, number) for r in results):
                continue
            told = _within(bar.within, f"prompt {number + 1}")
            results.append(measure_prompt(model, described, prompt, number, told))
            write_results(file, described, results, (), model.encoder_share)
            bar.note(f"prompt {number + 1} of {request.count} is measured")
        held_out = [
            (prompts[n % len(prompts)], n)
            for n in range(request.count, request.count + request.check)
        ]
        measured = results[: request.count]
        told = _within(bar.within, "draw by key steps")
        found = candidates(model, described, measured, request.budget, held_out, told)
        write_results(file, described, results, found, model.encoder_share)
        plots = save_key_step_plots(measured, found, request.out, teacher.source.name)
    best = found[-1]
    line = ",".join(map(str, best.key_steps))
    if request.as_json:
        print_json(
            {
                "result": str(file),
                "plots": [str(plot) for plot in plots],
                "encoder_share": model.encoder_share,
                "candidates": [dataclasses.asdict(candidate) for candidate in found],
                "key_steps": line,
            }
        )
        return
    console.print(_table(found))
    console.print(_verdict(found), highlight=False)
    for path in (file, *plots):
        console.print(str(path), markup=False, highlight=False)
    print_next(_export_line(request, line))


def _export_line(request: AnalyzeRequest, key_steps: str) -> str:
    """The export of what was analyzed: the same model, sampled the same way."""
    names = ("base", "vae", "family", "prediction", "lora", "embedding", "steps", "scheduler")
    sizes = ("guidance", "height", "width")
    words = ["--ckpt", request.ckpt, *typed(request, (*names, *sizes)), "--key-steps", key_steps]
    return command_line("onnx", "--method", "faster", *words)


def _prompts(request: AnalyzeRequest) -> Sequence[str]:
    for name, value, least in (("--count", request.count, 1), ("--check", request.check, 1)):
        if value < least:
            raise UsageError(f"{name} is {value}; expected {least} or more")
    if request.reach is not None and request.reach < 1:
        raise UsageError(f"--reach is {request.reach}; expected 1 or more")
    given = prompts_in(request.prompts)
    if given:
        return given
    from tiue_export.reference.key_step_analysis import DEFAULT_PROMPTS

    return DEFAULT_PROMPTS


def _check_budget(request: AnalyzeRequest, encoder_share: float, steps: int) -> None:
    """Before an hour is spent on measuring."""
    if request.budget is not None:
        from tiue_export.sampling.key_steps import encoder_runs_within

        encoder_runs_within(request.budget, steps, encoder_share)


def _within(show: Callable[[float, str], None], what: str) -> Callable[[int, int], None]:
    return lambda done, total: show(done / total, f"{what}: {done} of {total}")


def _table(found: Sequence[Candidate]) -> Table:
    measured = numbers("operations", "predicted", "deviation")
    table = titled("Key steps", *fixed("list"), "key steps", *measured)
    for candidate in found:
        mean = sum(candidate.deviation) / len(candidate.deviation)
        table.add_row(
            candidate.name,
            ",".join(map(str, candidate.key_steps)),
            f"{candidate.flops_share:.1%}",
            f"{candidate.predicted:.4f}",
            f"{mean:.4f}",
        )
    table.caption = "deviation: RMS of the latents against plain sampling, on prompts held out"
    return table


def _verdict(found: Sequence[Candidate]) -> str:
    """Whether choosing beat the published list at the same cost, on prompts held out."""
    published, chosen = found[0], found[2]
    means = [sum(c.deviation) / len(c.deviation) for c in (published, chosen)]
    if means[1] < means[0]:
        return f"Chosen key steps deviate {means[0] / means[1]:.2f} times less than the published."
    if means[1] == means[0]:
        return "The chosen key steps are as good as the published ones."
    return f"The published key steps deviate {means[1] / means[0]:.2f} times less than the chosen."
