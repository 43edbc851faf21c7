"""One graph's module -> one Core ML package (ML Program), through torch.export and coremltools."""

from __future__ import annotations

import contextlib
import functools
import gc
import io
import json
import shutil
import tempfile
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ParamSpec, TypeVar

import numpy as np
import torch
from torch import Tensor, nn

from tiue_export._version import __version__
from tiue_export.errors import ResourceError, RuntimeFailure, first_line
from tiue_export.export.coreml.profiles import CoremlPlan
from tiue_export.specs import UNET_DECODER, VAE_DECODER, VAE_ENCODER, GraphSpec, TensorSpec
from tiue_export.system.quiet import errors_only

P = ParamSpec("P")
R = TypeVar("R")
METADATA_KEY = "com.tiue-export"
_FULL_BYTES = 100_000_000
# coremltools appends this to an operation that it turns into half precision.
_HALF = "_cast_fp16"
# Torch operations that coremltools lacks, each with an equivalent that it has. 9.0 lacks `alias`,
# which torch.export writes since 2.9; 9.1 has it (apple/coremltools#2659).
_SHIMS = {"alias": "alias_copy"}
# Modules that stay in float32: Eq. 11, whose coefficients amplify rounding fivefold, and a loop's
# time embedding, which takes sines of up to 999 radians.
_EXACT = ("combine", "time")
# Inputs and outputs that are float32 at any precision.
_FLOAT32 = ("sample", "latents", "latent_sample", "timestep", "timesteps", "outputs")


@dataclass(frozen=True)
class Conversion:
    """What one package is made of: module, contract, example inputs, and what stays in float32.

    `float32_ops` are names of Core ML operations, as the evaluator reports them.
    """

    spec: GraphSpec
    module: nn.Module
    example: tuple[Tensor, ...]
    plan: CoremlPlan
    metadata: Mapping[str, Any]
    float32_ops: frozenset[str] = frozenset()


def silently(function: Callable[P, R]) -> Callable[P, R]:
    """For functions that hold a model: coremltools leaves its temporary folder to the garbage
    collector, which warns of it; here it is collected, and the warning dropped, on return."""

    @functools.wraps(function)
    def called(*args: P.args, **kwargs: P.kwargs) -> R:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", ResourceWarning)
            result = function(*args, **kwargs)
            gc.collect()
        return result

    return called


@silently
def convert(conversion: Conversion, package: Path) -> dict[str, int]:
    """Write `package`; returns how many operations of each type it has.

    Inputs and outputs keep the names of the contract. Token ids are int32, features half precision
    as the plan is, noise, latents and pictures float32. Raises `RuntimeFailure` when coremltools
    cannot convert the graph.
    """
    with quiet_coremltools() as ct:
        add_missing_operations()
        program, exact = _exported(conversion)
        try:
            model = ct.convert(
                program,
                convert_to="mlprogram",
                inputs=[
                    ct.TensorType(spec.name, spec.shape, _io_dtype(spec, conversion))
                    for spec in conversion.spec.inputs
                ],
                outputs=[
                    ct.TensorType(spec.name, dtype=_io_dtype(spec, conversion))
                    for spec in conversion.spec.outputs
                ],
                minimum_deployment_target=getattr(ct.target, conversion.plan.target),
                compute_precision=_precision(ct, conversion, exact),
                compute_units=ct.ComputeUnit.CPU_ONLY,  # said by whoever loads the package
                skip_model_load=True,
                pass_pipeline=_passes(ct, conversion),
            )
        except Exception as error:  # coremltools raises NotImplementedError, ValueError, ...
            _refuse_full_disk(error)
            raise RuntimeFailure(
                f"coremltools {ct.__version__} cannot convert {conversion.spec.name}: "
                f"{first_line(error)}",
                f"Tested with coremltools 9.0 and torch 2.13; this is torch {torch.__version__}.",
            ) from error
        del program
        describe(model, conversion)
        return save(model, package)


def _refuse_full_disk(error: Exception) -> None:
    """coremltools writes weights to the temporary folder, and does not say that it was full."""
    folder = Path(tempfile.gettempdir())
    if "writing data to the file" in str(error) and shutil.disk_usage(folder).free < _FULL_BYTES:
        raise ResourceError(
            f"the disk of {folder} is full; coremltools writes its weights there first",
            "Free some space, or set TMPDIR to a folder on another disk.",
        ) from error


def op_counts(model: Any) -> dict[str, int]:
    """Operations of each type in a model that coremltools has just made, constants left out."""
    counts: dict[str, int] = {}
    for function in model._mil_program.functions.values():
        for op in function.operations:
            if op.op_type != "const":
                counts[op.op_type] = counts.get(op.op_type, 0) + 1
    return dict(sorted(counts.items(), key=lambda item: (-item[1], item[0])))


def save(model: Any, package: Path) -> dict[str, int]:
    """Write a model that coremltools has just made as .mlpackage; returns its `op_counts`."""
    package.parent.mkdir(parents=True, exist_ok=True)
    model.save(str(package))
    # Our numbering of torch's nodes, which coremltools takes for ExecuTorch's.
    (package / "executorch_debug_handle_mapping.json").unlink(missing_ok=True)
    return op_counts(model)


def describe(model: Any, conversion: Conversion) -> None:
    """Write into the package what a person or a program without our manifest needs to know."""
    spec, metadata = conversion.spec, conversion.metadata
    model.author = f"tiue-export {__version__}"
    model.version = __version__
    model.license = str(metadata.get("licence") or "that of the weights")
    purposes = _LOOP_PURPOSES if metadata.get("key_steps") else _PURPOSES
    model.short_description = purposes.get(spec.name, spec.name)
    known_inputs = {feature.name for feature in model.get_spec().description.input}
    for tensor in spec.inputs:
        if tensor.name in known_inputs:
            model.input_description[tensor.name] = _described(tensor)
    for tensor in spec.outputs:
        model.output_description[tensor.name] = _described(tensor)
    model.user_defined_metadata[METADATA_KEY] = json.dumps(dict(metadata), sort_keys=True)


_PURPOSES = {
    "text_encoder": "CLIP text encoder: token ids to a text embedding.",
    "unet_encoder": "UNet encoder of a one-pass student: runs once, at the first timestep.",
    UNET_DECODER: "UNet decoder of a one-pass student: all timesteps at once, combined to latents.",
    VAE_ENCODER: "VAE encoder: a picture in [-1, 1] to what its latents are drawn from.",
    VAE_DECODER: "VAE decoder: scaled latents to a picture in [-1, 1].",
}
# Faster Diffusion's.
_LOOP_PURPOSES = {
    **_PURPOSES,
    "unet_encoder": "UNet encoder: runs at the key steps, for both halves of the guidance.",
    UNET_DECODER: "UNet decoder: some timesteps on the features of the last key step.",
}


def _described(tensor: TensorSpec) -> str:
    return f"{tensor.meaning or tensor.name}, {'x'.join(map(str, tensor.shape))}"


@contextlib.contextmanager
def quiet_coremltools() -> Iterator[Any]:
    """coremltools, without what it says of itself: progress bars, and warnings read as errors.

    It logs that native libraries of macOS are absent on Linux, and that the torch version was not
    tested by Apple (apple/coremltools#2465, #2220).
    """
    quiet = contextlib.redirect_stderr(io.StringIO())
    with errors_only("coremltools"), warnings.catch_warnings(), quiet:
        warnings.simplefilter("ignore")
        import coremltools

        yield coremltools


def add_missing_operations() -> None:
    """Teach coremltools the torch operations it lacks; those it has are left alone."""
    from coremltools.converters.mil.frontend.torch.torch_op_registry import (
        _TORCH_OPS_REGISTRY as REGISTRY,
    )

    for name, equivalent in _SHIMS.items():
        if REGISTRY.get_func(name) is None:
            REGISTRY.set_func_by_name(REGISTRY.get_func(equivalent), name)


def _exported(conversion: Conversion) -> tuple[Any, frozenset[int]]:
    """The exported program in the ATen dialect, and the numbers of the nodes to keep exact.

    Each node is numbered; coremltools hands the number on to every operation it makes of it.
    """
    with torch.no_grad():
        program: Any = torch.export.export(conversion.module, conversion.example, strict=False)
        # coremltools reads the ATen dialect only; an empty table keeps layers whole.
        program = program.run_decompositions({})
    exact = set()
    for number, node in enumerate(program.graph.nodes):
        node.meta["debug_handle"] = number
        stack = node.meta.get("nn_module_stack") or {}
        paths = [path for path, _ in stack.values()]
        if any(path.rpartition(".")[2] in _EXACT for path in paths):
            exact.add(number)
    return program, frozenset(exact)


def _precision(ct: Any, conversion: Conversion, exact: frozenset[int]) -> Any:
    if conversion.plan.precision == "fp32":
        return ct.precision.FLOAT32
    # Names as they were before coremltools marked them as half precision.
    large = frozenset(name.removesuffix(_HALF) for name in conversion.float32_ops)
    selector = _half_selector(exact, large)
    return ct.transform.FP16ComputePrecision(op_selector=selector)


def _passes(ct: Any, conversion: Conversion) -> Any:
    """coremltools' own passes; in float32 without one that is exact in half precision alone.

    It makes a group norm's scale and shift a batch_norm of variance 1, whose default epsilon of
    1e-5 divides the result by sqrt(1.00001): 106 dB a norm, which a deep network adds up.
    """
    passes = ct.PassPipeline.DEFAULT
    if conversion.plan.precision == "fp32":
        passes.remove_passes(["common::fuse_elementwise_to_batchnorm"])
    return passes


def _half_selector(exact: frozenset[int], large: frozenset[str]) -> Callable[[Any], bool]:
    """True for operations that compute in half precision.

    Not those of `exact`, and neither what produces a large value nor what reads one, as half cannot
    hold it.
    """
    from coremltools.converters.mil.mil.scope import ScopeSource

    def in_half(op: Any) -> bool:
        handles = op.scopes.get(ScopeSource.EXIR_DEBUG_HANDLE) or ()
        if any(handle in exact for handle in handles):
            return False
        touched = {var.name for var in (*_inputs(op), *op.outputs) if var is not None}
        return not touched & large

    return in_half


def _inputs(op: Any) -> Iterator[Any]:
    for value in op.inputs.values():
        yield from value if isinstance(value, (list, tuple)) else [value]


def _io_dtype(spec: TensorSpec, conversion: Conversion) -> Any:
    if spec.dtype.startswith("int"):
        return np.int32  # Core ML has no int64
    return (
        np.float32 if spec.name in _FLOAT32 or conversion.plan.precision == "fp32" else np.float16
    )
