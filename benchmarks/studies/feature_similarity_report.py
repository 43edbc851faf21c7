"""What a feature-similarity measurement says: summary, verdict, table and plot beside the paper's.

The numbers come from `feature_similarity`; nothing here runs a model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from tiue_export.sampling.plan import Timestep

from ..figure import new_figure, save_figure

PARTS = {"down_blocks": "encoder", "mid_block": "mid", "up_blocks": "decoder"}
# A curve has saturated where it stays this close to its value at the largest step count.
SATURATION_TOLERANCE = 0.02


@dataclass(frozen=True)
class Similarity:
    """Mean cosine similarities of one feature over the steps of a run, each in [-1, 1].

    `all_pairs`: every two different steps; `first_vs_rest`: the first (noisiest) step against each
    later one; `adjacent`: each step against the next.
    """

    all_pairs: float
    first_vs_rest: float
    adjacent: float


@dataclass(frozen=True)
class StepRun:
    """All prompts at one step count: `blocks[name][i]` belongs to block `name` and prompt i."""

    steps: int
    timesteps: tuple[Timestep, ...]
    duration_s: float
    blocks: Mapping[str, tuple[Similarity, ...]]


@dataclass(frozen=True)
class PartSummary(Similarity):
    """Encoder, mid block or decoder: means over its blocks and all prompts.

    `all_pairs_std` is the standard deviation of `all_pairs` over prompts.
    """

    all_pairs_std: float


@dataclass(frozen=True)
class StepSummary:
    """One row of the table; `prompts_ordered` is the share of prompts with encoder > decoder.

    `mid` is None for a UNet without a mid block.
    """

    steps: int
    encoder: PartSummary
    mid: PartSummary | None
    decoder: PartSummary
    prompts_ordered: float


def part_of(block: str) -> str:
    """Which part a UNet's block belongs to: "down_blocks.2" -> "encoder"."""
    return PARTS[block.partition(".")[0]]


def summarise(run: StepRun) -> StepSummary:
    """Average over blocks and prompts, part by part."""
    pairs: dict[str, Any] = {}
    parts: dict[str, Any] = {"mid": None}
    for part in dict.fromkeys(map(part_of, run.blocks)):
        blocks = [prompts for name, prompts in run.blocks.items() if part_of(name) == part]
        kinds = np.array([[astuple(prompt) for prompt in block] for block in blocks]).mean(0)
        pairs[part] = kinds[:, 0]  # of (prompts, 3)
        means = [*kinds.mean(0), pairs[part].std()]
        parts[part] = PartSummary(*map(float, means))
    ordered = float((pairs["encoder"] > pairs["decoder"]).mean())
    return StepSummary(run.steps, **parts, prompts_ordered=ordered)


@dataclass(frozen=True)
class Curves:
    """Mean similarity over all pairs of steps against the number of steps, ascending."""

    steps: tuple[int, ...]
    encoder: tuple[float, ...]
    decoder: tuple[float, ...]

    @property
    def difference(self) -> tuple[float, ...]:
        """Encoder - decoder."""
        return tuple(e - d for e, d in zip(self.encoder, self.decoder, strict=True))

    @property
    def violations(self) -> tuple[int, ...]:
        """The step counts where the encoder is not the more similar."""
        pairs = zip(self.steps, self.difference, strict=True)
        return tuple(steps for steps, delta in pairs if not delta > 0)

    @property
    def flat_from(self) -> tuple[int, int]:
        """The step count from which encoder and decoder stay within `SATURATION_TOLERANCE` of
        their last value."""
        return _flat_from(self.steps, self.encoder), _flat_from(self.steps, self.decoder)

    @property
    def saturates(self) -> bool | None:
        """Whether both are flat over at least the upper half of the range of step counts; None
        where the largest is less than twice the smallest."""
        first, last = self.steps[0], self.steps[-1]
        return None if last < 2 * first else max(self.flat_from) <= (first + last) / 2

    @property
    def verdict(self) -> dict[str, Any]:
        """What they say, for JSON."""
        return {
            "ordering_holds": not self.violations,
            "violations": self.violations,
            "smallest_difference": min(self.difference),
            "largest_difference": max(self.difference),
            "flat_from": self.flat_from,
            "saturates": self.saturates,
        }


def _flat_from(steps: tuple[int, ...], curve: tuple[float, ...]) -> int:
    far = [i for i, value in enumerate(curve) if abs(value - curve[-1]) > SATURATION_TOLERANCE]
    return steps[far[-1] + 1 if far else 0]


PAPER_SOURCE = (
    "TiUE (Loopfree) paper, figure (c): 'Mean of Cosine Similarity' against the number of steps, "
    "Stable Diffusion 2.1; digitised to +-0.0005. The paper defines neither the features nor the "
    "mean, so the order of the curves can be compared, not their height."
)
PAPER = Curves(
    steps=(4, 5, 6, 8, 10, 15, 20, 25, 30, 35, 40, 45, 49),
    encoder=(
        0.578, 0.587, 0.596, 0.607, 0.617, 0.632, 0.636, 0.638, 0.642, 0.645, 0.643, 0.645, 0.647,
    ),
    decoder=(
        0.553, 0.556, 0.566, 0.578, 0.586, 0.603, 0.612, 0.616, 0.621, 0.625, 0.624, 0.628, 0.631,
    ),
)  # fmt: skip


def curves_of(summary: Sequence[StepSummary]) -> Curves:
    """The two curves of a measurement."""
    return Curves(
        tuple(row.steps for row in summary),
        tuple(row.encoder.all_pairs for row in summary),
        tuple(row.decoder.all_pairs for row in summary),
    )


def statements(curves: Curves) -> tuple[str, str]:
    """The verdict in two sentences, with the paper's beside it."""
    counts, broken = len(curves.steps), curves.violations
    where = f"all {counts} step counts"
    if broken:
        listed = ", ".join(f"T={steps}" for steps in broken)
        where = f"{counts - len(broken)} of {counts} step counts (not at {listed})"
    own, paper = (f"{min(c.difference):+.3f} to {max(c.difference):+.3f}" for c in (curves, PAPER))
    ordering = (
        f"Ordering: the encoder's features are more alike than the decoder's at {where}; encoder - "
        f"decoder is {own} (paper: {paper}, at all {len(PAPER.steps)})."
    )
    conclusion = {
        True: "both saturate",
        False: "they do not both saturate",
        None: "the range is too short to speak of saturation",
    }[curves.saturates]
    encoder, decoder = curves.flat_from
    saturation = (
        f"Saturation: the encoder's curve stays within {SATURATION_TOLERANCE} of its value at "
        f"T={curves.steps[-1]} from T={encoder} on, the decoder's from T={decoder} on (paper: "
        f"{PAPER.flat_from[0]} and {PAPER.flat_from[1]}): {conclusion}."
    )
    return ordering, saturation


def report(summary: Sequence[StepSummary]) -> dict[str, Any]:
    """Everything derived from the runs, for JSON."""
    curves = curves_of(summary)
    return {
        "summary": [asdict(row) for row in summary],
        "verdict": {**curves.verdict, "statements": statements(curves)},
        "paper": {"source": PAPER_SOURCE, **asdict(PAPER), "verdict": PAPER.verdict},
    }


def similarity_table(summary: Sequence[StepSummary]) -> Table:
    """One row a step count: the means of encoder and decoder, and the paper's values."""
    table = Table(
        title="Cosine similarity of UNet block outputs between DDIM steps (encoder, decoder)",
        caption="Means over blocks and prompts. d: encoder - decoder, over all pairs of steps.",
        title_justify="left",
        title_style="bold",
        caption_justify="left",
    )
    for title in ("T", "all pairs", "d", "mid block", "first vs rest", "adjacent", "paper"):
        table.add_column(title, justify="right", no_wrap=True)
    paper = dict(zip(PAPER.steps, map(_two, PAPER.encoder, PAPER.decoder), strict=True))
    for row, delta in zip(summary, curves_of(summary).difference, strict=True):
        pairs = [
            _two(getattr(row.encoder, kind), getattr(row.decoder, kind))
            for kind in ("all_pairs", "first_vs_rest", "adjacent")
        ]
        mid = "-" if row.mid is None else f"{row.mid.all_pairs:.3f}"
        middle = [f"[{'green' if delta > 0 else 'red'}]{delta:+.3f}[/]", mid]
        table.add_row(str(row.steps), pairs[0], *middle, *pairs[1:], paper.get(row.steps, "-"))
    return table


def _two(encoder: float, decoder: float) -> str:
    return f"{encoder:.3f}, {decoder:.3f}"


# Label, colour (Okabe-Ito), marker and line.
_LOOKS = {
    "encoder": ("encoder (down blocks)", "#0072B2", "o", "-"),
    "decoder": ("decoder (up blocks)", "#D55E00", "s", "-"),
    "mid": ("mid block", "#7F7F7F", "^", "--"),
    "own": ("", "black", "o", "-"),
    "paper": ("paper", "#CC79A7", "D", "--"),
}


def save_plot(summary: Sequence[StepSummary], path: Path, name: str, note: str) -> None:
    """Write a PNG of three panels: this model, the paper, and encoder - decoder of both.

    `name` is what was measured, `note` (one line) how. Needs matplotlib; leaves its global state
    alone.
    """

    def curve(panel: Any, of: Curves, values: Sequence[float], look: str) -> None:
        label, colour, marker, line = _LOOKS[look]
        panel.plot(of.steps, values, line, marker=marker, color=colour, markersize=4)
        panel.lines[-1].set_label(label or name)

    figure = new_figure((13.5, 4.9))
    figure.get_layout_engine().set(wspace=0.04)
    own, theirs, difference = panels = figure.subplots(1, 3)
    curves = curves_of(summary)
    for part in ("encoder", "decoder", "mid"):
        rows: list[PartSummary] = [row for s in summary if (row := getattr(s, part)) is not None]
        if not rows:
            continue
        curve(own, curves, [row.all_pairs for row in rows], part)
        if part != "mid":
            low = [row.all_pairs - row.all_pairs_std for row in rows]
            high = [row.all_pairs + row.all_pairs_std for row in rows]
            own.fill_between(curves.steps, low, high, color=_LOOKS[part][1], alpha=0.15)
            curve(theirs, PAPER, getattr(PAPER, part), part)
    curve(difference, curves, curves.difference, "own")
    curve(difference, PAPER, PAPER.difference, "paper")
    difference.axhline(0.0, color="#555555", linewidth=1)
    low_end, high_end = difference.get_ylim()
    difference.set_ylim(min(low_end, -0.1 * high_end), max(high_end, -0.1 * low_end))
    heads = (
        f"{name}: measured\n(band: 1 standard deviation over prompts)",
        "TiUE paper, figure (c): SD 2.1\n(digitised; features not defined)",
        "encoder - decoder\n(the paper's claim: above zero)",
    )
    axes = (
        "mean cosine similarity, all pairs of steps",
        "'Mean of Cosine Similarity' as printed",
        "difference of mean cosine similarity",
    )
    for panel, head, label in zip(panels, heads, axes, strict=True):
        panel.set_title(head, fontsize=10)
        panel.set(xlabel="number of DDIM steps T", ylabel=label)
        panel.grid(alpha=0.3)
        panel.legend(fontsize=8.5)
    figure.suptitle("Do encoder features change less than decoder features along the sampling run?")
    figure.supxlabel(note, fontsize=8.5, color="#555555")
    save_figure(figure, path)
