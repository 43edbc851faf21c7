"""`tiue-export inspect`: a verified bundle as a page a person reads, or its manifest as JSON."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from rich.markup import escape
from rich.table import Table

from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.proof.half_range import load_audit
from tiue_export.sampling.plan import Plan

from .report.tables import (
    console,
    graph_table,
    megabytes,
    overflow_table,
    parity_table,
    print_json,
)


def run(path: Path, as_json: bool) -> None:
    """Open (which verifies every file) and print."""
    bundle = open_bundle(path)
    if as_json:
        print_json(dataclasses.asdict(bundle.manifest))
        return
    console.print(_facts(bundle))
    plan = bundle.manifest.plan
    console.print(_constants(plan) if plan.one_pass else _passes(plan))
    console.print(graph_table(bundle.manifest))
    audit = load_audit(bundle)
    if audit is not None:
        console.print(overflow_table(audit.graphs, rows=3))
    if bundle.manifest.compiled:
        console.print(_compiled(bundle))
    console.print(parity_table(bundle.manifest.parity))


def _facts(bundle: Bundle) -> Table:
    table = Table(
        title=escape(str(bundle.root)), title_justify="left", title_style="bold", show_header=False
    )
    table.add_column(style="dim", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in bundle_facts(bundle):
        table.add_row(name, escape(value))
    return table


def bundle_facts(bundle: Bundle) -> list[tuple[str, str]]:
    """What a bundle is, as pairs of name and value; what is not known is left out."""
    manifest, source = bundle.manifest, bundle.manifest.source
    weights = f"{source.dtype}, {source.layout} names" + (", EMA" if source.ema else "")
    batch = "any" if manifest.batch is None else str(manifest.batch)
    hoisting = {"none": "none (naive decoder)"}.get(
        manifest.hoisted, f"into the {manifest.hoisted}"
    )
    rows = [
        ("student", f"{source.name} ({source.family}; {weights})"),
        ("weights sha256", source.sha256),
        ("picture", f"{manifest.width_px}x{manifest.height_px} px, batch {batch}"),
        ("precision", manifest.precision),
        ("hoisting", hoisting),
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


def _compiled(bundle: Bundle) -> Table:
    table = Table(title="Compiled forms", title_justify="left", title_style="bold")
    table.add_column("form", no_wrap=True)
    table.add_column("built by", no_wrap=True)
    for column in ("for", "with", "graphs"):
        table.add_column(column, overflow="fold")
    table.add_column("size", justify="right", no_wrap=True)
    for name, compiled in bundle.manifest.compiled.items():
        files = [file for graph in compiled.graphs.values() for file in graph.files.values()]
        flags = ", ".join(f"{key} {value}" for key, value in compiled.flags.items() if value)
        table.add_row(
            escape(name),
            escape(f"{compiled.backend} {compiled.version}"),
            escape(", ".join(f"{key} {value}" for key, value in compiled.target.items())),
            escape(flags),
            escape("\n".join(compiled.graphs)),
            megabytes(sum(file.size_bytes for file in files)),
        )
    return table


def _passes(plan: Plan) -> Table:
    """One row for each run of the encoder; the coefficients are in tiue.json."""
    chosen = f" ({plan.chosen_by})" if plan.chosen_by else ""
    guidance = "" if plan.guidance is None else f", guidance {plan.guidance:g}"
    title = (
        f"{plan.method}: {plan.rows} {plan.scheduler} steps, {len(plan.passes)} encoder runs"
        f"{chosen}{guidance}"
    )
    table = Table(title=title, title_justify="left", title_style="bold")
    for column in ("key step", "timestep", "decoder steps", "down to t"):
        table.add_column(column, justify="right")
    for one in plan.passes:
        cells = (one.first_row, one.encoder_timestep, one.rows, one.timesteps[-1])
        table.add_row(*map(str, cells))
    injection = plan.injection
    if injection is None:
        table.caption = "no noise injected"
    else:
        table.caption = (
            f"{injection.strength:g} of the initial noise injected below t = "
            f"{injection.below * 1000:g}, {injection.placement}"
        )
    return table


def _constants(plan: Plan) -> Table:
    title = f"Eq. 11, K={plan.steps}, {plan.prediction_type}, {plan.timestep_spacing}"
    table = Table(title=title, title_justify="left", title_style="bold")
    table.add_column("term")
    table.add_column("timestep", justify="right")
    table.add_column("coefficient", justify="right")
    table.add_row("noise", "", f"{plan.latents.noise:+.9f}")
    rows = zip(plan.timesteps, plan.latents.outputs, strict=True)
    for row, (timestep, weight) in enumerate(rows):
        table.add_row(f"decoder row {row}", str(timestep), f"{weight:+.9f}")
    for timestep in plan.merged_timesteps:
        table.add_row("merged", str(timestep), "into its neighbour")
    return table
