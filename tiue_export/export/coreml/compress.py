"""A Core ML package with its weights, and for W8A8 its activations, in fewer bits. Runs on Linux.

Weights are compressed by coremltools' own public functions. Activation ranges come from our
evaluator: coremltools measures them by running the model on a Mac, and 9.0 keeps the range of the
last sample alone (apple/coremltools#2724).
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from tiue_export.errors import RuntimeFailure, TiueError, UsageError, first_line
from tiue_export.export.coreml.convert import quiet_coremltools, save, silently
from tiue_export.export.coreml.mil.evaluator import MilProgram, OpRecord
from tiue_export.export.coreml.profiles import Compression
from tiue_export.specs import Feeds

# coremltools' own threshold: smaller weights are not worth a palette.
LEAST_WEIGHTS = 2048
Range = tuple[float, float]
Bits = Mapping[str, int]


@silently
def compress(
    source: Path,
    target: Path,
    compression: Compression,
    *,
    bits: Bits | None = None,
    ranges: Mapping[str, Range] | None = None,
) -> dict[str, int]:
    """Write `source` compressed to `target`; returns how many operations of each type it has.

    `bits` names the bits of each weight for a recipe (16: left as it is), `ranges` every value's
    range for W8A8. Raises `RuntimeFailure` when coremltools refuses.
    """
    with quiet_coremltools() as ct:
        model = ct.models.MLModel(str(source), skip_model_load=True)
        try:
            if compression.kind == "palettize":
                model = _palettized(ct, model, compression)
            elif compression.kind == "linear":
                model = _quantized(ct, model, compression)
            elif compression.kind == "w8a8":
                model = _quantized_activations(ct, model, dict(ranges or {}))
                model = _quantized(ct, model, compression)
            elif compression.kind == "recipe":
                model = _mixed(ct, model, dict(bits or {}))
        except TiueError:
            raise
        except Exception as error:  # coremltools raises ValueError, AssertionError, ...
            raise RuntimeFailure(
                f"coremltools {ct.__version__} cannot compress {source.stem} with "
                f"{compression.name}: {first_line(error)}",
                "Choose another --compress.",
            ) from error
        return save(model, target)


def activation_ranges(package: Path, samples: Iterable[Feeds]) -> dict[str, Range]:
    """The smallest and largest value of every float tensor over all samples, in float32.

    The evaluator's names are those of the package's operations, as the quantization needs them.
    """
    ranges: dict[str, Range] = {}
    program = MilProgram.open(package)
    for feeds in samples:
        for record in program.run(feeds, "fp32").records:
            ranges[record.name] = _widened(ranges.get(record.name), record)
    return ranges


def palette(weight: Any, bits: int) -> tuple[Any, Any]:
    """The best palette for a weight: 2**bits values float16, and each number's place, flat uint8.

    k-means in one dimension has an exact solution (Groenlund et al. 2017, arXiv 1701.07204), which
    coremltools brings along but uses for weights of 10,000 numbers and more only.
    """
    with quiet_coremltools():
        from coremltools._deps import _kmeans1d

    size = 2**bits
    values, places, counts = np.unique(weight, return_inverse=True, return_counts=True)
    found = _kmeans1d.cluster(values.astype(np.float64), min(size, len(values)), weights=counts)
    colours = np.zeros(size, np.float16)
    colours[: len(found.centroids)] = found.centroids
    return colours, np.asarray(found.clusters, np.uint8)[places.reshape(-1)]


def _widened(known: Range | None, record: OpRecord) -> Range:
    if known is None:
        return record.minimum, record.maximum
    return min(known[0], record.minimum), max(known[1], record.maximum)


def _palettizer(ct: Any, bits: int, group: int = 0) -> Any:
    settings: dict[str, Any] = {"weight_threshold": LEAST_WEIGHTS}
    if group:
        settings |= {"mode": "kmeans", "nbits": bits}
        settings |= {"granularity": "per_grouped_channel", "group_size": group}
    else:
        settings |= {"mode": "custom", "lut_function": functools.partial(palette, bits=bits)}
    return ct.optimize.coreml.OpPalettizerConfig(**settings)


def _palettized(ct: Any, model: Any, compression: Compression) -> Any:
    config = ct.optimize.coreml.OptimizationConfig(
        global_config=_palettizer(ct, compression.bits, compression.group),
        op_type_configs={"gather": None},
    )
    return ct.optimize.coreml.palettize_weights(model, config)


def _mixed(ct: Any, model: Any, bits: dict[str, int]) -> Any:
    optimize = ct.optimize.coreml
    known = optimize.get_weights_metadata(model, weight_threshold=LEAST_WEIGHTS)
    # coremltools would pass over a name that it does not find.
    if unknown := sorted(set(bits) - set(known)):
        raise UsageError(
            f"the recipe names {len(unknown)} weights that the package has not, such as "
            f"{unknown[0]}",
            "A recipe is for one student and one form: use the --profile, --attention and --linear "
            "it was found with.",
        )
    by_name = {
        name: None if number >= 16 else _palettizer(ct, number) for name, number in bits.items()
    }
    config = optimize.OptimizationConfig(global_config=None, op_name_configs=by_name)
    return optimize.palettize_weights(model, config)


def _quantized(ct: Any, model: Any, compression: Compression) -> Any:
    optimize = ct.optimize.coreml
    settings: dict[str, Any] = {"mode": "linear_symmetric", "weight_threshold": LEAST_WEIGHTS}
    if compression.bits == 4:
        settings |= {"dtype": "int4", "granularity": "per_block", "block_size": compression.group}
    config = optimize.OptimizationConfig(
        global_config=optimize.OpLinearQuantizerConfig(**settings), op_type_configs={"gather": None}
    )
    return optimize.linear_quantize_weights(model, config)


def _ops_of_outputs(model: Any) -> list[str]:
    """The operations that give the model's outputs, by their own names."""
    names = []
    for function in model.get_spec().mlProgram.functions.values():
        block = function.block_specializations[function.opset]
        for operation in block.operations:
            if {value.name for value in operation.outputs} & set(block.outputs):
                name = operation.attributes["name"].immediateValue.tensor
                names.append(str(name.strings.values[0]))
    return names


def _quantized_activations(ct: Any, model: Any, ranges: dict[str, Range]) -> Any:
    """The three passes behind coremltools' `linear_quantize_activations`, given our ranges.

    They and `_apply_graph_pass` are private; tests/export/test_coreml_export.py holds them to 9.0.
    """
    from coremltools.converters.mil.frontend.milproto.load import load as load_program
    from coremltools.converters.mil.mil.passes.graph_pass import PassOption
    from coremltools.converters.mil.mil.passes.pass_registry import PASS_REGISTRY
    from coremltools.models.utils import _apply_graph_pass

    optimize = ct.optimize.coreml
    activation = optimize.experimental.OpActivationLinearQuantizerConfig(mode="linear_symmetric")
    # coremltools 9.0 cannot quantize behind an operation whose result is an output of the model.
    whole = dict.fromkeys(_ops_of_outputs(model))
    config = optimize.OptimizationConfig(global_config=activation, op_name_configs=whole)
    stats = {name: {"rmin": low, "rmax": high} for name, (low, high) in ranges.items()}
    passes = []
    for place in ("prefix", "suffix"):
        inserted = PASS_REGISTRY[f"compression::insert_{place}_quantize_dequantize_pair"]
        inserted.set_options([PassOption("config", config), PassOption("activation_stats", stats)])
        passes.append(inserted)
    passes.append(PASS_REGISTRY["common::dequantize_quantize_pair_elimination"])
    return _apply_graph_pass(
        model,
        passes,
        spec_version=ct.target.iOS17.value,
        pymil_load_func=load_program,
        skip_model_load=True,
    )
