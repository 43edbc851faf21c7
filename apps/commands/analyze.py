"""`tiue-export analyze`."""

from __future__ import annotations

from ..options.analyze import AnalyzeRequest
from ..options.group import command


@command
def analyze(request: AnalyzeRequest) -> None:
    """Measure which steps of a model need its encoder, and choose key steps for Faster Diffusion.

    Run the same line again to resume, or with another --budget to choose anew.

    Example:  tiue-export analyze --ckpt sd21-base/ --steps 50 --budget 0.7 --out analysis
    """
    from ..analyze import run

    run(request)
