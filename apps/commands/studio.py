"""`tiue-export studio`."""

from __future__ import annotations

from ..options.group import command
from ..options.studio import StudioOptions


@command
def studio(request: StudioOptions) -> None:
    """Try a student in the browser: draw while typing, compare runtimes, read the bundle.

    Example:  tiue-export studio fox --open

    Example:  tiue-export studio fox-fp32 fox-fp16 --out pictures
    """
    from ..studio.serving import run

    run(request)
