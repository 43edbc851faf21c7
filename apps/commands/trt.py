"""`tiue-export trt`."""

from __future__ import annotations

from ..options.group import command
from ..options.trt import EngineExportRequest, EngineOptions, EngineSource, RefitOptions


@command
def trt(
    source: EngineSource, engine: EngineOptions, refit: RefitOptions, export: EngineExportRequest
) -> None:
    """Build TensorRT engines: on the device, or for RTX cards anywhere, without a GPU.

    Engines that are valid already are kept; precision is proven layer by layer.

    Example:  tiue-export trt --ckpt student.safetensors --base sd21-base/

    Example:  tiue-export trt --bundle fox --flavor rtx --sm 86,89,120

    Example:  tiue-export trt --ckpt sd21-base/ --method faster --max-decoder-rows 10 --out fox

    Example:  tiue-export trt --bundle fox --refit-from tuned.safetensors --out tuned
    """
    from ..export.refit import run as run_refit
    from ..export.trt import run

    if refit.refit_from is not None:
        run_refit(source, engine, refit.refit_from, export)
    else:
        run(source, engine, export)
