"""`tiue-export web`: writes the site, tells its size, and opens it where asked."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path

from tiue_export.bundle.read import open_bundle
from tiue_export.errors import UsageError
from tiue_export.registry.packages import require
from tiue_export.system.command_line import command_line
from tiue_export.system.progress import stage

from ..options.output import WriteOptions
from ..options.web import SiteOptions
from ..report.next_line import print_next
from ..report.stages import stage_bar
from ..report.tables import console, megabytes, print_json
from ..web.listening import check_port


def run(path: Path, options: SiteOptions, output: WriteOptions) -> None:
    """Write the site of a bundle."""
    require("writing a page", ("onnx",), "export")
    from .npm_packages import vendored_files
    from .site import SiteText, check_drawable, write_site

    check_port(options.port)
    if options.open_page and output.as_json:
        raise UsageError("--open serves until it is stopped; --json prints once", "Leave one out.")
    bundle = open_bundle(path)
    check_drawable(bundle)
    with stage_bar(quiet=output.as_json) as bar:
        observer = bar.observer()
        with stage(observer, "fetch packages"):
            vendored = vendored_files(options.packages)
        text = SiteText(options.title, options.prompt)
        site = write_site(
            bundle, options.out, vendored, text, force=output.force, observer=observer
        )
    if output.as_json:
        print_json({**asdict(site), "root": str(site.root)})
        return
    console.print(
        f"{options.out}: {site.files} files, {megabytes(site.size_bytes)}; a visitor loads "
        f"{megabytes(site.first_visit_bytes)} once, to draw by WASM.",
        markup=False, highlight=False,
    )  # fmt: skip
    if not options.open_page:
        print_next(_open_line(path, options))
        return
    from .local_server import serve_until_interrupted

    serve_until_interrupted(site.root, options.port, _told)


def _open_line(path: Path, options: SiteOptions) -> str:
    """The same site again, opened: with all that it was asked for."""
    words: list[object] = ["web", path, "--out", options.out]
    for name, value in (("--title", options.title), ("--prompt", options.prompt),
                        ("--packages", options.packages)):  # fmt: skip
        words += [name, value] if value else []
    return command_line(*words, "--force", "--open")


def _told(address: str) -> None:
    console.print(f"Open at {address} on this machine alone; Ctrl+C ends.", markup=False)
