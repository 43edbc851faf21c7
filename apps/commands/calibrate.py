"""`tiue-export calibrate`."""

from __future__ import annotations

from ..options.calibrate import CalibrateRequest
from ..options.group import command


@command
def calibrate(request: CalibrateRequest) -> None:
    """Capture what real prompts feed the UNet, for `quantize`. Run the same line again to resume.

    Example:  tiue-export calibrate fox --prompts prompts.txt --out fox-calibration
    """
    from ..calibrate import run

    run(request)
