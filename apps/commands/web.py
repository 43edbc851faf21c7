"""`tiue-export web`."""

from __future__ import annotations

from ..options.bundle import BundleOptions
from ..options.group import command
from ..options.output import WriteOptions
from ..options.web import SiteOptions


@command
def web(what: BundleOptions, site: SiteOptions, output: WriteOptions) -> None:
    """Write a page that draws on its visitors' machines: a folder for any web server.

    Example:  tiue-export web fox --out site/

    Example:  tiue-export web fox --out site/ --title "Foxes" --prompt "a red fox" --open
    """
    from ..browser.command import run

    run(what.bundle, site, output)
