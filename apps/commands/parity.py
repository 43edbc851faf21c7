"""`tiue-export parity`."""

from __future__ import annotations

from ..options.group import command
from ..options.parity import ParityCheck


@command
def parity(check: ParityCheck) -> None:
    """Hold a runtime on this machine against the reference stored in the bundle.

    Example:  tiue-export parity fox --runtime ort --device cuda
    """
    from ..parity_check import run

    run(check.bundle, check.runtime, check.runtime_options(check), check.as_json)
