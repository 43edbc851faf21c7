"""Captured calibration data: what is to be captured, and on disk what the UNet was fed, by run.

    calibration.json            what was captured from which bundle, and every shard with its hash
    shard-00000.safetensors     tensors "RUN.NAME": sample, text embedding, encoder features

A run is one pass of the plan; the runs of a drawing, which makes a batch of pictures, follow each
other.

A shard is written beside its place and renamed, then listed: a kill leaves what was finished.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path

import numpy as np

from tiue_export._version import __version__
from tiue_export.bundle.chain import TEXT
from tiue_export.bundle.manifest import FileRecord, structured
from tiue_export.bundle.read import Bundle, file_records
from tiue_export.errors import BundleError, UsageError
from tiue_export.proof.quantization_plan import student_identity
from tiue_export.sampling.noise import noises_from_seed
from tiue_export.specs import BATCH, UNET_ENCODER, UNET_GRAPHS, Array, RuntimeOptions, axis_size
from tiue_export.system.atomic_file import write_atomically
from tiue_export.system.command_line import command_line
from tiue_export.system.file_name import is_file_name
from tiue_export.system.json_file import read_json

FORMAT_VERSION = 1
INDEX_FILE = "calibration.json"
SHARD_BYTES = 256 << 20
_AGAIN = "Capture again: tiue-export calibrate BUNDLE --out FOLDER --force"


@dataclass(frozen=True)
class CaptureOptions:
    """What to capture, on which runtime; picture i uses seed + i.

    `count` prompts are taken from the front of `prompts`; None: as many as quantizing usually
    takes. `prompts` None: the list that comes with the program.
    """

    prompts: tuple[str, ...] | None = None
    count: int | None = None
    seed: int = 0
    runtime: str = "ort"
    runtime_options: RuntimeOptions = field(default_factory=RuntimeOptions)
    shard_bytes: int = SHARD_BYTES


@dataclass(frozen=True)
class CapturePlan:
    """What a capture will hold: `prompts` in `runs` runs, each a pass of the bundle's batch."""

    prompts: tuple[str, ...]
    runs: int
    size_bytes: int


@dataclass(frozen=True)
class Shard:
    """One file: runs `first` to `first + runs - 1`."""

    file: str
    first: int
    runs: int
    record: FileRecord


@dataclass(frozen=True)
class CalibrationIndex:
    """The content of calibration.json.

    A drawing makes `batch` pictures in `passes` runs: drawing i has prompts[i * batch :
    (i + 1) * batch], the noises of seeds seed + i * batch and up, and runs i * passes and up.
    `tensors` has the names of a run's tensors with the first one's shapes. `student` says which
    bundles the data fit; `graphs_sha256` is of the graphs that made them.
    """

    format_version: int
    created_by: str
    student: str
    graphs_sha256: str
    precision: str
    runtime: str
    seed: int
    batch: int
    prompts_sha256: str
    prompts: tuple[str, ...]
    shards: tuple[Shard, ...] = ()
    tensors: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    passes: int = 1

    @property
    def wanted_runs(self) -> int:
        return -(-len(self.prompts) // self.batch) * self.passes

    @property
    def captured_runs(self) -> int:
        return sum(shard.runs for shard in self.shards)

    @property
    def captured_drawings(self) -> int:
        return self.captured_runs // self.passes

    @property
    def size_bytes(self) -> int:
        return sum(shard.record.size_bytes for shard in self.shards)


@dataclass(frozen=True)
class CalibrationData:
    """Captured runs in a folder, every shard verified."""

    root: Path
    index: CalibrationIndex

    @property
    def sha256(self) -> str:
        """Of the index, which has the hash of every shard."""
        return hashlib.sha256(index_text(self.index).encode()).hexdigest()

    def runs(self, numbers: Sequence[int] | None = None) -> Iterator[dict[str, Array]]:
        """The tensors of each run by name, (B, ...) float32; one run in memory at a time."""
        from safetensors import safe_open

        wanted = range(self.index.captured_runs) if numbers is None else numbers
        for number in wanted:
            shard = next(s for s in self.index.shards if s.first <= number < s.first + s.runs)
            with safe_open(self.root / shard.file, framework="np") as file:
                yield {
                    name: np.array(file.get_tensor(f"{number:05d}.{name}"))
                    for name in self.index.tensors
                }

    def drawing_runs(self, drawing: int) -> range:
        """The numbers of a drawing's runs, in the order of the passes."""
        first = drawing * self.index.passes
        return range(first, first + self.index.passes)

    def drawings(self, bundle: Bundle, numbers: Sequence[int]) -> Iterator[tuple[Array, Array]]:
        """What drawings start from: noises (N, B, 4, H, W) and text (B, L, D), float32."""
        for number in numbers:
            (run,) = self.runs(self.drawing_runs(number)[:1])
            yield drawing_noises(bundle, self.index, number), run[TEXT]


def shipped_prompts() -> tuple[str, ...]:
    """The list that comes with the program: varied scenes, one a line, in a mixed order."""
    text = resources.files(__package__).joinpath("prompts.txt").read_text("utf-8")
    return tuple(text.splitlines())


def run_bytes(bundle: Bundle) -> int:
    """The size of one captured run: the encoder's inputs and outputs in float32."""
    batch, spec = bundle.manifest.batch or 1, bundle.spec(UNET_ENCODER)
    tensors = {tensor.name: tensor for tensor in (*spec.inputs, *spec.outputs)}
    shapes = ([axis_size(side, {BATCH: batch}) for side in t.shape] for t in tensors.values())
    return sum(4 * math.prod(shape) for shape in shapes)


def drawing_noises(bundle: Bundle, index: CalibrationIndex, number: int) -> Array:
    """The noises that a bundle's plan draws for drawing `number`, (N, B, 4, H, W) float32."""
    shape = (index.batch, *(int(side) for side in bundle.manifest.latent_shape[1:]))
    return noises_from_seed(index.seed + number * index.batch, bundle.manifest.plan.noises, shape)


def new_index(bundle: Bundle, prompts: Sequence[str], seed: int, runtime: str) -> CalibrationIndex:
    """The index of a capture that has not begun."""
    manifest = bundle.manifest
    return CalibrationIndex(
        format_version=FORMAT_VERSION,
        created_by=f"tiue-export {__version__}",
        student=student_identity(manifest),
        graphs_sha256=graphs_sha256(bundle),
        precision=manifest.precision,
        runtime=runtime,
        seed=seed,
        batch=manifest.batch or 1,
        prompts_sha256=prompts_sha256(prompts),
        prompts=tuple(prompts),
        passes=len(manifest.plan.passes),
    )


def prompts_sha256(prompts: Sequence[str]) -> str:
    """Of the prompts, one a line."""
    return hashlib.sha256("\n".join(prompts).encode()).hexdigest()


def graphs_sha256(bundle: Bundle) -> str:
    """Of the files of the text encoder and the UNet's graphs."""
    graphs = bundle.manifest.graphs
    files = {
        name: record.sha256
        for graph in ("text_encoder", *UNET_GRAPHS)
        if graph in graphs
        for name, record in graphs[graph].files.items()
    }
    return hashlib.sha256(json.dumps(files, sort_keys=True).encode()).hexdigest()


def index_text(index: CalibrationIndex) -> str:
    """The text of calibration.json."""
    return json.dumps(dataclasses.asdict(index), indent=1) + "\n"


def write_index(root: Path, index: CalibrationIndex) -> None:
    """Replace calibration.json in one step."""
    write_atomically(root / INDEX_FILE, index_text(index).encode())


def write_shard(
    root: Path, index: CalibrationIndex, runs: Sequence[Mapping[str, Array]]
) -> CalibrationIndex:
    """Write the next shard and list it; the index with it."""
    from safetensors.numpy import save

    first = index.captured_runs
    name = f"shard-{len(index.shards):05d}.safetensors"
    tensors = {
        f"{first + offset:05d}.{key}": np.ascontiguousarray(array)
        for offset, run in enumerate(runs)
        for key, array in run.items()
    }
    write_atomically(root / name, save(tensors))
    (record,) = file_records(root, [name]).values()
    shapes = {key: array.shape for key, array in runs[0].items()}
    shards = (*index.shards, Shard(name, first, len(runs), record))
    grown = replace(index, shards=shards, tensors=shapes)
    write_index(root, grown)
    return grown


def read_index(root: Path) -> CalibrationIndex:
    """The index of a folder, checked field by field."""
    path = root / INDEX_FILE
    if not path.is_file():
        raise UsageError(
            f"{root} holds no calibration data: it has no {INDEX_FILE}",
            "Capture some: tiue-export calibrate BUNDLE --out FOLDER",
        )
    try:
        data = read_json(path)
        version = data.get("format_version") if isinstance(data, dict) else None
    except (OSError, ValueError) as error:
        raise BundleError(f"{path} cannot be read: {error}", _AGAIN) from error
    if version != FORMAT_VERSION:
        raise BundleError(
            f"{path} has format version {version!r}; this program reads {FORMAT_VERSION}", _AGAIN
        )
    index: CalibrationIndex = structured(CalibrationIndex, data, str(path))
    for name, number in (("batch", index.batch), ("passes", index.passes)):
        if number < 1:
            raise BundleError(f"{path}: {name} is {number}; expected 1 or more", _AGAIN)
    for shard in index.shards:
        if not is_file_name(shard.file):
            raise BundleError(
                f"{path} names {shard.file!r} as a shard; expected a file beside it", _AGAIN
            )
    return index


def open_calibration(root: Path, bundle: Bundle | None = None) -> CalibrationData:
    """Open captured data, every hash checked; with `bundle` only if they fit it.

    Raises `UsageError` for data of another student, schedule, hoisting, upsampling or size,
    `BundleError` for an unfinished capture or an altered shard.
    """
    index = read_index(root)
    if bundle is not None and index.student != student_identity(bundle.manifest):
        raise UsageError(
            f"{root} was captured from another student, schedule, hoisting, upsampling or size "
            f"than {bundle.root}",
            "Capture from this one: " + command_line("calibrate", bundle.root, "--out", "FOLDER"),
        )
    verify_shards(root, index)
    if index.captured_runs < index.wanted_runs:
        raise BundleError(
            f"{root} is an unfinished capture: {index.captured_runs} of {index.wanted_runs} runs",
            "Type the line that began it again: it goes on from there.",
        )
    return CalibrationData(root, index)


def verify_shards(root: Path, index: CalibrationIndex) -> None:
    """Refuse shards that are missing or were altered."""
    for shard in index.shards:
        if not (root / shard.file).is_file():
            raise BundleError(f"{root}: {shard.file} is missing", _AGAIN)
    found = file_records(root, [shard.file for shard in index.shards])
    for shard in index.shards:
        if found[shard.file] != shard.record:
            raise BundleError(f"{root}: {shard.file} was altered after the capture", _AGAIN)
