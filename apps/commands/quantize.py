"""`tiue-export quantize`."""

from __future__ import annotations

from ..options.group import command
from ..options.quantize import QuantizeRequest


@command
def quantize(request: QuantizeRequest) -> None:
    """Quantize the UNet where it is proven: close enough, and faster on this machine.

    Example:  tiue-export quantize fox --calibration fox-calibration --out fox-int8

    Example:  tiue-export quantize fox --calibration fox-calibration --backend openvino

    Example:  tiue-export quantize half --calibration fox-calibration --plan plan.json --any-speed
    """
    from ..quantize import run

    run(request)
