"""`tiue-export inspect`: a verified bundle as a page a person reads, or its manifest as JSON."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.table import Column, Table

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.proof.half_range import load_audit
from tiue_export.sampling.plan import Plan
from tiue_export.specs import NEAREST, SUBPIXEL

from .report.tables import (
    console,
    facts_table,
    fixed,
    graph_table,
    megabytes,
    numbers,
    overflow_table,
    parity_table,
    print_json,
    titled,
)


@dataclass(frozen=True)
class Rows:
    """A table as data, which the terminal and the studio's page show in their ways."""

    title: str
    columns: Sequence[Column]
    rows: Sequence[tuple[str, ...]]
    note: str = ""

    def table(self) -> Table:
        """As the terminal shows it."""
        table = titled(self.title, *self.columns, note=self.note)
        for row in self.rows:
            table.add_row(*row)
        return table


def run(path: Path, as_json: bool) -> None:
    """Open (which verifies every file) and print."""
    bundle = open_bundle(path, anew=True)
    if as_json:
        print_json(dataclasses.asdict(bundle.manifest))
        return
    console.print(facts_table(str(bundle.root), bundle_facts(bundle)))
    console.print(plan_rows(bundle.manifest.plan).table())
    console.print(graph_table(bundle.manifest))
    audit = load_audit(bundle)
    if audit is not None:
        console.print(overflow_table(audit.graphs, rows=3))
    if bundle.manifest.compiled:
        console.print(compiled_rows(bundle.manifest).table())
    console.print(parity_table(bundle.manifest.parity))


def bundle_facts(bundle: Bundle) -> list[tuple[str, str]]:
    """What a bundle is, as pairs of name and value; what is not known is left out."""
    manifest, source = bundle.manifest, bundle.manifest.source
    weights = f"{source.dtype}, {source.layout} names" + (", EMA" if source.ema else "")
    batch = "any" if manifest.batch is None else str(manifest.batch)
    hoisting = {"none": "none (naive decoder)"}.get(
        manifest.hoisted, f"into the {manifest.hoisted}"
    )
    upsampling = {NEAREST: "nearest (as the model)", SUBPIXEL: "sub-pixel"}[manifest.upsampling]
    longest = manifest.max_prompt_tokens
    rows = [
        ("student", f"{source.name} ({source.family}; {weights})"),
        ("weights sha256", source.sha256),
        ("picture", f"{manifest.width_px}x{manifest.height_px} px, batch {batch}"),
        ("prompts", "" if longest is None else f"up to {longest} tokens"),
        ("precision", manifest.precision),
        ("hoisting", hoisting),
        ("upsampling", upsampling),
        ("VAE scaling", str(manifest.vae_scaling_factor)),
        ("parts from", ", ".join(f"{part}: {place}" for part, place in source.parts.items())),
        ("licence", source.licence or "not recorded in the checkpoint"),
        ("notes", "; ".join(source.notes)),
        ("size", f"{megabytes(bundle.size_bytes)}, every SHA-256 verified"),
        (
            "made by",
            ", ".join([manifest.created_by, *(f"{k} {v}" for k, v in manifest.tools.items())]),
        ),
    ]
    return [(name, value) for name, value in rows if value]


def compiled_rows(manifest: Manifest) -> Rows:
    """Each compiled form: by what it was built, for what and how, and its size."""
    rows = []
    for name, form in manifest.compiled.items():
        target = ", ".join(f"{key} {value}" for key, value in form.target.items())
        flags = ", ".join(f"{key} {value}" for key, value in form.flags.items() if value)
        built_by, graphs = f"{form.backend} {form.version}", ", ".join(form.graphs)
        rows.append((name, built_by, target, flags, graphs, megabytes(form.size_bytes)))
    folded = [Column(name, overflow="fold") for name in ("for", "with", "graphs")]
    columns = [*fixed("form", "built by"), *folded, *numbers("size")]
    return Rows("Compiled forms", columns, rows)


def _chosen(plan: Plan) -> str:
    return f" ({plan.chosen_by})" if plan.chosen_by else ""


def plan_rows(plan: Plan, digits: int = 9) -> Rows:
    """The terms of Eq. 11, or one row for each run of the encoder, whose terms are in tiue.json."""
    if plan.one_pass:
        name = f"{plan.recipe}, one pass" if plan.recipe else f"Eq. 11, K={plan.steps}"
        title = f"{name}, {plan.prediction_type}, {plan.timestep_spacing}"
        rows = [("noise", "", f"{plan.latents.noise:+.{digits}f}")]
        for row, timestep in enumerate(plan.timesteps):
            weight = f"{plan.latents.outputs[row]:+.{digits}f}"
            rows.append((f"decoder row {row}", str(timestep), weight))
        if plan.fan_out:
            rows.append(("fan-out", "", f"{plan.fan_out} up blocks{_chosen(plan)}"))
        rows += [("merged", str(t), "into its neighbour") for t in plan.merged_timesteps]
        return Rows(title, fixed("term") + numbers("timestep", "coefficient"), rows)
    guidance = "" if plan.guidance is None else f", guidance {plan.guidance:g}"
    if plan.embedded_guidance is not None:
        guidance = f", guidance {plan.embedded_guidance:g} folded in"
    if plan.noises > 1:
        guidance += f", {plan.noises - 1} fresh noises"
    title = (
        f"{plan.recipe or plan.method}: {plan.rows} {plan.scheduler} steps, "
        f"{len(plan.passes)} encoder runs{_chosen(plan)}{guidance}"
    )
    cells = [(p.first_row, p.encoder_timestep, p.rows, p.timesteps[-1]) for p in plan.passes]
    note = "no noise injected"
    if (injection := plan.injection) is not None:
        note = (
            f"{injection.strength:g} of the initial noise injected below t = "
            f"{injection.below * 1000:g}, {injection.placement}"
        )
    columns = numbers("key step", "timestep", "decoder steps", "down to t")
    return Rows(title, columns, [tuple(map(str, row)) for row in cells], note)
