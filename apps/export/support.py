"""Which options of an export a backend cannot honour, with the reason: refused before any work."""

from __future__ import annotations

from collections.abc import Mapping

from ..options.graphs import ExportRequest
from ..options.group import refuse

_OWN_PRECISION = "for ONNX graphs; these have one precision, that of --precision"
_ONE_BATCH = "not possible here: these graphs are made for one batch"
# Backend -> field of an option -> why it cannot be. What is absent is possible.
REFUSED: Mapping[str, Mapping[str, str]] = {
    "coreml": {
        "max_decoder_rows": "not possible here: --decoder-batch bounds a Core ML decoder",
        "vae_precision": _OWN_PRECISION,
        "dynamic_batch": _ONE_BATCH,
    },
    "coreai": {
        "vae_precision": _OWN_PRECISION,
        "dynamic_batch": _ONE_BATCH,
    },
}


def refuse_unsupported(backend: str, export: ExportRequest) -> None:
    """Raise `UsageError` naming an option of `export` that `backend` cannot honour, and why."""
    for name, why in REFUSED.get(backend, {}).items():
        refuse(why, "Leave it out, or run the model with ort or openvino.", export, only=(name,))
