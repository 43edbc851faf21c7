"""The content of tiue.json as frozen types, and their strict JSON form."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import sys
import types
import typing
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tiue_export.errors import BundleError
from tiue_export.sampling.plan import Plan
from tiue_export.specs import (
    NEAREST,
    TEXT_ENCODER,
    UNET_ENCODER,
    UPSAMPLINGS,
    VAE_DECODER,
    GraphSpec,
    TensorSpec,
)
from tiue_export.system.json_file import parse_json

FORMAT_VERSION = 2
_DIGEST = "sha256"
_LARGEST_NUMBER = 2**64


@dataclass(frozen=True)
class FileRecord:
    """Size and SHA-256 of one file of the bundle."""

    size_bytes: int
    sha256: str


@dataclass(frozen=True)
class Source:
    """Where the weights came from.

    `sha256` is the UNet's, `part_sha256` those of text encoder and VAE; `parts` says which folder
    each component was read from.
    """

    name: str
    sha256: str
    family: str
    layout: str
    dtype: str
    part_sha256: Mapping[str, str] = field(default_factory=dict)
    ema: bool = False
    parts: Mapping[str, str] = field(default_factory=dict)
    licence: str | None = None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True)
class GraphRecord:
    """One graph: `path` is its ONNX file; `files` are all it needs, relative paths.

    `path` and `opset` are None and `files` empty where it was never written as ONNX, for backends
    that make their form from the student itself. `float32_modules` are the module paths that
    compute in float32 in a half-precision graph beside the norms; `max_abs_in_half` is the largest
    |value| left in half that an overflow audit saw. `omitted`: the bundle was packed for a runtime
    with its own form of the graph, without these files; their records stay, as the identity of
    compiled forms rests on them.
    """

    path: str | None
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    precision: str
    opset: int | None
    files: Mapping[str, FileRecord]
    omitted: bool = False
    float32_modules: tuple[str, ...] = ()
    max_abs_in_half: float | None = None

    def spec(self, name: str) -> GraphSpec:
        """The graph's contract under its name."""
        return GraphSpec(name, self.inputs, self.outputs)

    @property
    def has_onnx(self) -> bool:
        """Whether the bundle holds its ONNX files."""
        return self.path is not None and not self.omitted

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(record.size_bytes for record in self.files.values())


@dataclass(frozen=True)
class ParityRecord:
    """One measured hop. `gate` None means the loss is reported, not judged."""

    hop: str
    subject: str
    metric: str
    value: float
    gate: float | None
    max_abs_error: float
    inputs: str

    @property
    def passed(self) -> bool:
        return self.gate is None or self.value >= self.gate


@dataclass(frozen=True)
class CompiledGraph:
    """One compiled graph: `path` is the file a runtime opens, `files` all it needs.

    `identity` is a SHA-256 over all that decides the result: the graph's files, shapes, flags,
    compiler version and target. `report` holds figures of the build, units in their names.
    """

    path: str
    identity: str
    files: Mapping[str, FileRecord]
    report: Mapping[str, str | int | float] = field(default_factory=dict)

    @property
    def size_bytes(self) -> int:
        """Of all its files."""
        return sum(record.size_bytes for record in self.files.values())


@dataclass(frozen=True)
class Compiled:
    """The graphs in one backend's own form, for one target; `version` is the compiler's."""

    backend: str
    version: str
    target: Mapping[str, str]
    flags: Mapping[str, str | bool | int | float]
    graphs: Mapping[str, CompiledGraph]
    parity: tuple[ParityRecord, ...] = ()

    @property
    def size_bytes(self) -> int:
        """Of all its graphs."""
        return sum(graph.size_bytes for graph in self.graphs.values())


@dataclass(frozen=True)
class Manifest:
    """Everything a runner or a reader must know of a bundle (design: the bundle contract)."""

    format_version: int
    created_by: str
    source: Source
    plan: Plan
    latent_shape: tuple[int | str, ...]
    text_shape: tuple[int | str, ...]
    vae_scale: int
    vae_scaling_factor: float
    precision: str
    hoisted: str
    graphs: Mapping[str, GraphRecord]
    files: Mapping[str, FileRecord]
    parity: tuple[ParityRecord, ...] = ()
    parity_loss_allowed: bool = False
    # How many times the text encoder's positions a prompt may fill (`--max-prompt-tokens`).
    text_chunks: int = 1
    # Rows of the text that are no tokens but SDXL's pooled text (`student/added_conditions.py`).
    pooled_rows: int = 0
    # One of `UPSAMPLINGS`; bundles of earlier versions, which do not say, have the model's own.
    upsampling: str = NEAREST
    tools: Mapping[str, str] = field(default_factory=dict)
    # By the name of the folder that holds them, such as "trt" or "openvino".
    compiled: Mapping[str, Compiled] = field(default_factory=dict)

    @property
    def has_onnx(self) -> bool:
        """Whether the bundle holds the ONNX files of all its graphs."""
        return all(record.has_onnx for record in self.graphs.values())

    @property
    def text_tokens(self) -> int:
        """Tokens of a prompt, L: what the text encoder takes."""
        return int(self.text_shape[1]) - self.pooled_rows

    @property
    def max_prompt_tokens(self) -> int | None:
        """`--max-prompt-tokens` of the export; None: what the text encoder reads at once."""
        tokens = self.text_tokens - 2 * self.text_chunks  # without start and end
        return tokens if self.text_chunks > 1 else None

    @property
    def height_px(self) -> int:
        return int(self.latent_shape[2]) * self.vae_scale

    @property
    def width_px(self) -> int:
        return int(self.latent_shape[3]) * self.vae_scale

    @property
    def batch(self) -> int | None:
        """Images per run, or None when the batch axis is dynamic."""
        size = self.latent_shape[0]
        return None if isinstance(size, str) else size

    def to_json(self) -> str:
        """The text of tiue.json: readable, stable order, strict JSON (no NaN), its digest last."""
        content = dataclasses.asdict(self)
        sealed = {**content, _DIGEST: digest_of(content)}
        return json.dumps(sealed, indent=1, allow_nan=False) + "\n"

    @staticmethod
    def from_json(text: str, where: str, *, sealed: bool = True) -> Manifest:
        """Parse and check every field; `where` names the file in errors.

        `sealed`: its digest must be that of its content, as nothing else protects its constants.
        """
        try:
            data = parse_json(text)
        except ValueError as error:
            raise BundleError(f"{where} is not JSON: {error}", _REEXPORT) from error
        version = data.get("format_version") if isinstance(data, dict) else None
        digest = data.pop(_DIGEST, None) if isinstance(data, dict) else None
        altered = sealed and digest != digest_of(data)
        if type(version) is int and version == 1:  # which had no digest
            data, version, altered = upgraded(data), FORMAT_VERSION, False
        if version != FORMAT_VERSION:
            raise BundleError(
                f"{where} has format version {version!r}; this program reads 1 and "
                f"{FORMAT_VERSION}",
                "Export the bundle again, or install the tiue-export that wrote it"
                + (
                    f" ({data['created_by']})."
                    if isinstance(data, dict) and "created_by" in data
                    else "."
                ),
            )
        manifest: Manifest = structured(Manifest, data, where)
        for name, length in (("latent_shape", 4), ("text_shape", 3)):
            shape = getattr(manifest, name)
            if len(shape) != length or any(isinstance(side, str) for side in shape[1:]):
                raise _wrong(f"{where}: {name}", shape, f"{length} sides")
        problem = manifest.plan.problem()
        if problem:
            raise BundleError(f"{where}: the plan contradicts itself: {problem}", _REEXPORT)
        problem = manifest.problem()
        if problem:
            raise BundleError(f"{where} contradicts itself: {problem}", _REEXPORT)
        if altered:
            raise BundleError(
                f"{where} was altered: its content is not that of its {_DIGEST}",
                "Copy the bundle again. If it was you, on purpose: tiue-export bundle seal BUNDLE",
            )
        return manifest

    def problem(self) -> str | None:
        """What cannot be, or does not fit together; None where all agrees."""
        for name in ("vae_scale", "vae_scaling_factor"):
            if getattr(self, name) <= 0:
                return f"{name} is {getattr(self, name)}; expected more than 0"
        sides = (*self.latent_shape, *self.text_shape)
        if any(side < 1 for side in sides if isinstance(side, int)):
            return f"latents {self.latent_shape} and text {self.text_shape} need sides of 1 or more"
        if self.upsampling not in UPSAMPLINGS:
            return f"upsampling is {self.upsampling}; expected {' or '.join(UPSAMPLINGS)}"
        if self.pooled_rows not in (0, 1):
            return f"pooled_rows is {self.pooled_rows}; expected 0 or 1"
        if self.text_chunks < 1 or self.text_tokens < 1 or self.text_tokens % self.text_chunks:
            return f"text {self.text_shape} cannot be {self.text_chunks} chunks"
        for graph, tensor, own in (
            (UNET_ENCODER, "sample", self.latent_shape),
            (TEXT_ENCODER, "last_hidden_state", self.text_shape),
        ):
            for shape in self._shapes(graph, tensor):
                if shape[1:] != own[1:]:
                    return f"{graph} has {tensor} {shape}, the bundle {own}"
        for latents in self._shapes(VAE_DECODER, "latent_sample"):
            pixels = [side * self.vae_scale for side in latents[2:] if isinstance(side, int)]
            for picture in self._shapes(VAE_DECODER, "sample"):
                if list(picture[2:]) != pixels:
                    return f"{VAE_DECODER} draws {picture} of {latents}, {self.vae_scale} px each"
        return None

    def _shapes(self, graph: str, tensor: str) -> list[tuple[int | str, ...]]:
        """The shape of a tensor, where a graph has one of this name."""
        record = self.graphs.get(graph)
        tensors = () if record is None else (*record.inputs, *record.outputs)
        return [spec.shape for spec in tensors if spec.name == tensor and len(spec.shape) > 1]


def digest_of(content: Mapping[str, Any]) -> str:
    """SHA-256 over what a manifest says, however it is laid out."""
    text = json.dumps(content, sort_keys=True, separators=(",", ":"))
    return hashlib.sha256(text.encode()).hexdigest()


def upgraded(data: Mapping[str, Any]) -> dict[str, Any]:
    """Format 1, which had `schedule` and, in a loop, `faster`, in the words of format 2.

    Nothing is checked here: what does not fit is named when the result is read.
    """
    rest = {k: v for k, v in data.items() if k not in ("schedule", "faster")}
    schedule, loop = data.get("schedule"), data.get("faster")
    if not isinstance(schedule, Mapping):
        return {**rest, "format_version": FORMAT_VERSION}
    kept = ("steps", "prediction_type", "timestep_spacing", "merged_timesteps")
    plan: dict[str, Any] = {name: schedule[name] for name in kept if name in schedule}
    plan["latents"] = {
        "noise": schedule.get("noise_coefficient"),
        "outputs": schedule.get("output_coefficients"),
    }
    if isinstance(loop, Mapping):
        groups = loop.get("groups")
        groups = groups if isinstance(groups, list) else []
        plan |= {name: value for name, value in loop.items() if name != "groups"}
        plan |= {"method": "faster", "passes": [_upgraded_group(group) for group in groups]}
    else:
        timesteps = schedule.get("timesteps")
        first = timesteps[0] if isinstance(timesteps, list) and timesteps else None
        start = {"encoder_timestep": first, "timesteps": timesteps, "input": {"noise": 1.0}}
        plan |= {"method": "tiue", "passes": [start]}
    return {**rest, "format_version": FORMAT_VERSION, "plan": plan}


def _upgraded_group(group: Any) -> Any:
    if not isinstance(group, Mapping):
        return group
    timesteps = group.get("timesteps")
    return {
        "encoder_timestep": timesteps[0] if isinstance(timesteps, list) and timesteps else None,
        "timesteps": timesteps,
        "input": {
            "noise": group.get("noise_coefficient"),
            "outputs": group.get("output_coefficients"),
        },
    }


_REEXPORT = "The file was changed after the export; export the bundle again."


def structured(kind: Any, data: Any, where: str) -> Any:
    """Build a value of the annotated type `kind` from JSON data, or say which field is wrong."""
    origin, args = typing.get_origin(kind), typing.get_args(kind)
    if origin in (typing.Union, types.UnionType):
        for option in args:
            if option is type(None) and data is None:
                return None
        for option in args:
            if option is not type(None) and _matches(option, data):
                return structured(option, data, where)
        raise _wrong(where, data, kind)
    if dataclasses.is_dataclass(kind):
        return _structured_dataclass(kind, data, where)
    if origin is tuple:
        if not isinstance(data, list):
            raise _wrong(where, data, "a list")
        return tuple(structured(args[0], item, f"{where}[{i}]") for i, item in enumerate(data))
    if origin is not None and issubclass(origin, Mapping):
        if not isinstance(data, dict):
            raise _wrong(where, data, "an object")
        return {key: structured(args[1], item, f"{where}.{key}") for key, item in data.items()}
    if not _matches(kind, data):
        raise _wrong(where, data, kind.__name__)
    if kind is int and not abs(data) <= _LARGEST_NUMBER:
        raise _wrong(where, data, "a number of 64 bits")
    if kind is not float:
        return data
    if not abs(data) <= sys.float_info.max:
        raise _wrong(where, data, "a finite number")
    return float(data)


def _structured_dataclass(kind: Any, data: Any, where: str) -> Any:
    if not isinstance(data, dict):
        raise _wrong(where, data, "an object")
    hints = typing.get_type_hints(kind)
    fields = {f.name: f for f in dataclasses.fields(kind)}
    unknown = sorted(set(data) - set(fields))
    if unknown:
        raise BundleError(f"{where} has unknown fields: {', '.join(unknown)}", _REEXPORT)
    values = {}
    for name, definition in fields.items():
        if name in data:
            values[name] = structured(hints[name], data[name], f"{where}: {name}")
        elif (
            definition.default is dataclasses.MISSING
            and definition.default_factory is dataclasses.MISSING
        ):
            raise BundleError(f"{where} lacks the field {name!r}", _REEXPORT)
    return kind(**values)


def _matches(kind: Any, data: Any) -> bool:
    if kind is float:
        return isinstance(data, (int, float)) and not isinstance(data, bool)
    if kind is int:
        return isinstance(data, int) and not isinstance(data, bool)
    if dataclasses.is_dataclass(kind):
        return isinstance(data, dict)
    return isinstance(data, kind)


def _wrong(where: str, got: Any, expected: Any) -> BundleError:
    return BundleError(f"{where} is {str(got)[:60]!r}; expected {expected}", _REEXPORT)
