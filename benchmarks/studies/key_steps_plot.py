"""Pictures of an analysis: block changes and norms, the cost of every group, and key steps."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.proof.key_step_results import Candidate, PromptResult, losses_of
from tiue_export.specs import Array

from ..figure import new_figure, save_figure

_INK = {"down": "#0072B2", "mid": "#7F7F7F", "up": "#D55E00"}  # Okabe-Ito
_DASHES = ("-", "--", "-.", ":")


def save_key_step_plots(
    results: Sequence[PromptResult], found: Sequence[Candidate], folder: Path, name: str
) -> list[Path]:
    """Write blocks.png and key_steps.png into `folder`; `name` is the model's."""
    paths = [folder / "blocks.png", folder / "key_steps.png"]
    _save_blocks_plot(results, paths[0], name)
    _save_key_steps_plot(results, found, paths[1], name)
    return paths


def _save_blocks_plot(results: Sequence[PromptResult], path: Path, name: str) -> None:
    """Change from step to step, norms of each block, and how far the norms spread over the run.

    Means over prompts. Needs matplotlib; leaves its global state alone.
    """
    figure = new_figure((14.5, 4.6))
    change, norm, spread = figure.subplots(1, 3)
    curves = {block: _curves(results, block) for block in results[0].blocks}
    for block, (changes, _) in curves.items():
        style = _style(block)
        change.plot(range(1, changes.shape[1] + 1), changes.mean(0), label=block, **style)
    change.set(xlabel="step", ylabel="mean squared change from the step before", yscale="log")
    change.set_title("Change between neighbouring steps")
    change.legend(fontsize=7.5)
    norms = [norms.mean(0) for _, norms in curves.values()]
    boxes = norm.boxplot(norms, patch_artist=True, whis=(0, 100))
    for box, block in zip(boxes["boxes"], curves, strict=True):
        box.set(facecolor=_INK[_part(block)], alpha=0.6)
    norm.set(ylabel="Frobenius norm of the mean channel")
    norm.set_title("Norms over the steps")
    spread.bar(
        range(1, len(norms) + 1),
        [values.std() for values in norms],
        color=[_INK[_part(block)] for block in curves],
    )
    spread.set(ylabel="standard deviation over the steps")
    spread.set_title("Spread of the norms")
    for panel in (norm, spread):
        panel.set_xticks(range(1, len(curves) + 1), [_short(b) for b in curves], rotation=60)
    for panel in (change, norm, spread):
        panel.grid(alpha=0.3)
    figure.suptitle(f"{name}: features along plain sampling, {len(results)} prompt(s)")
    save_figure(figure, path)


def _save_key_steps_plot(
    results: Sequence[PromptResult], found: Sequence[Candidate], path: Path, name: str
) -> None:
    """What every group costs, where each list has its key steps, and cost against deviation."""
    losses = losses_of(results)
    figure = new_figure((14.5, 4.8))
    table, steps, cost = figure.subplots(1, 3)
    _plot_losses(figure, table, losses)
    for row, candidate in enumerate(found):
        steps.scatter(candidate.key_steps, [row] * len(candidate.key_steps), marker="|", s=160)
    steps.set_yticks(range(len(found)), [c.name for c in found])
    steps.set(xlabel="step", ylim=(len(found) - 0.5, -0.5), xlim=(-0.5, len(losses) - 1.5))
    steps.set_title("Steps that run the encoder")
    for candidate in found:
        mean = float(np.mean(candidate.deviation))
        cost.plot([candidate.flops_share], [mean], "o", label=candidate.name)
    cost.set(xlabel="operations over plain sampling's", ylabel="RMS deviation of the latents")
    cost.set_title(f"On {len(found[0].deviation)} prompt(s) held out")
    cost.legend(fontsize=8)
    for panel in (steps, cost):
        panel.grid(alpha=0.3)
    figure.suptitle(f"{name}: which steps need the encoder")
    save_figure(figure, path)


def _plot_losses(figure: Any, panel: Any, losses: Array) -> None:
    shown = np.where(np.isfinite(losses) & (losses > 0), losses, np.nan)[:-1, 1:]
    image = panel.imshow(np.log10(shown), aspect="auto", cmap="viridis")
    figure.colorbar(image, ax=panel, label="log10 of relative RMS")
    panel.set(xlabel="last step of the group", ylabel="key step")
    panel.set_title("Loss of one group")


def _curves(results: Sequence[PromptResult], block: str) -> tuple[Array, Array]:
    """(prompts, T - 1) changes and (prompts, T) norms."""
    return (
        np.array([result.blocks[block].change for result in results]),
        np.array([result.blocks[block].norm for result in results]),
    )


def _part(block: str) -> str:
    return block.partition("_")[0]


def _short(block: str) -> str:
    return block.replace("_blocks.", " ").replace("_block", "")


def _style(block: str) -> Mapping[str, Any]:
    number = block.rpartition(".")[2]
    dash = _DASHES[int(number) % len(_DASHES)] if number.isdigit() else "-"
    return {"color": _INK[_part(block)], "linestyle": dash}
