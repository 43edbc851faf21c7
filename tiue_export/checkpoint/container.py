"""What can be told of a checkpoint without torch: that it is absent, pickled, cut or foreign."""

from __future__ import annotations

import re
import shlex
import zipfile
from pathlib import Path

from tiue_export.checkpoint.demo_student import checkpoint_place
from tiue_export.errors import CheckpointError, UsageError
from tiue_export.system.json_file import parse_json

_HUB_ID = re.compile(r"[\w-][\w.-]*/[\w-][\w.-]*")
_PICKLE_SUFFIXES = {".ckpt", ".pt", ".pth", ".bin", ".pkl", ".pickle"}
_DOWNLOAD = "Download the weights themselves again; the file's page on a hub is none."
# How files begin that are often given for weights: what they are, what to do.
_FOREIGN = (
    (
        b"GGUF",
        "a GGUF file, quantized for llama.cpp and its like",
        "Give the weights it was made of.",
    ),
    (b"<", "a web page or XML, such as a failed download", _DOWNLOAD),
    (b"version https://git-lfs", "a git-lfs pointer, not the file", "Fetch it: git lfs pull"),
    (b"\x1f\x8b", "a gzip archive", "Unpack it first."),
)


def check_checkpoint_path(path: str | Path) -> None:
    """Refuse at once what no loader could use: nothing there, a pickle, a damaged container."""
    place = checkpoint_place(path)
    if place.is_file():
        check_container(place)
    elif not place.exists():
        if not is_hub_id(str(path)):
            refuse_pickle(place)
            raise UsageError(
                f"{path} does not exist", "Give a .safetensors file or a diffusers folder."
            )


def is_hub_id(path: str) -> bool:
    """Whether "owner/name" can mean the hub: it is no path, and `owner` is no folder here."""
    known_kind = Path(path).suffix in {".safetensors", *_PICKLE_SUFFIXES}
    return _HUB_ID.fullmatch(path) is not None and not known_kind and not Path(path).parent.exists()


def refuse_pickle(path: Path, converted: str | None = None) -> None:
    """Refuse pickled checkpoints by suffix or content: opening one can run any code.

    `converted` is the file name that the loader looks for beside it.
    """
    if path.suffix in _PICKLE_SUFFIXES:
        raise _pickle_error(path, converted)
    if not path.is_file():
        return
    with path.open("rb") as file:
        head = file.read(9)
    # A safetensors header of 640 bytes has a size that begins like a pickle; "{" follows it.
    begins = (b"\x80\x02", b"\x80\x03", b"\x80\x04", b"\x80\x05", b"PK\x03\x04")
    if head.startswith(begins) and head[8:] != b"{":
        raise _pickle_error(path, converted)


def check_container(path: Path) -> None:
    """Tell a pickle, a truncated file and a foreign file apart before safetensors sees them."""
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist")
    _refuse_foreign(path)
    refuse_pickle(path)
    size_bytes = path.stat().st_size
    with path.open("rb") as file:
        header_bytes = int.from_bytes(file.read(8), "little")
        if size_bytes < 8 or header_bytes > 100_000_000:
            raise CheckpointError(
                f"{path} is no safetensors file ({size_bytes} bytes; its header would be "
                f"{header_bytes} bytes)",
                _DOWNLOAD,
            )
        raw = file.read(header_bytes)
    try:
        header = parse_json(raw.decode("utf-8"))
        ends = [
            entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"
        ]
        promised = 8 + header_bytes + max((int(end) for end in ends), default=0)
    except (ValueError, LookupError, TypeError, AttributeError) as error:
        if len(raw) < header_bytes:
            raise _truncated(path, size_bytes, 8 + header_bytes) from error
        raise CheckpointError(
            f"{path} is no safetensors file: its header is not the JSON that it should be",
            "Download or convert the file again.",
        ) from error
    if size_bytes < promised:
        raise _truncated(path, size_bytes, promised)


def _refuse_foreign(path: Path) -> None:
    """Call by its name what is often given for weights; the table's own beginnings decide."""
    with path.open("rb") as file:
        head = file.read(64)
    for beginning, kind, next_step in _FOREIGN:
        # As the size of a header the same bytes would be enormous: no safetensors file has them.
        if head.lstrip().lower().startswith(beginning.lower()) and head[8:9] != b"{":
            raise CheckpointError(f"{path} is {kind}; expected .safetensors", next_step)
    if path.suffix == ".onnx":
        raise CheckpointError(
            f"{path} is an ONNX graph; expected the weights, as .safetensors",
            "Give the checkpoint that it was exported from.",
        )
    if head.startswith(b"PK\x03\x04") and not _holds_pickle(path):
        raise CheckpointError(
            f"{path} is a zip archive; expected .safetensors or a diffusers folder",
            "Unpack it, then name the folder.",
        )


def _holds_pickle(path: Path) -> bool:
    """Whether a zip is one of torch's, or cannot be looked into."""
    try:
        with zipfile.ZipFile(path) as archive:
            return any(name.endswith(".pkl") for name in archive.namelist())
    except (OSError, ValueError, zipfile.BadZipFile, NotImplementedError):
        return True


def _truncated(path: Path, size_bytes: int, promised_bytes: int) -> CheckpointError:
    return CheckpointError(
        f"{path} is truncated: it has {size_bytes:,} bytes, its header promises {promised_bytes:,}",
        "Download or copy it again.",
    )


def _pickle_error(path: Path, converted: str | None) -> CheckpointError:
    target = path.with_name(converted) if converted else path.with_suffix(".safetensors")
    if target == path:
        target = path.with_name(f"{path.stem}-converted.safetensors")
    code = (
        "import sys, torch, safetensors.torch as s; "
        "d = torch.load(open(sys.argv[1], 'rb'), map_location='cpu', weights_only=True); "
        "d = d.get('state_dict', d); "
        # A1111's textual inversion, whose file is named like its token.
        "d = {'emb_params': d['string_to_param']['*']} if 'string_to_param' in d else d; "
        "d = {k: v.contiguous().clone() for k, v in d.items() if hasattr(v, 'shape')}; "
        "s.save_file(d, sys.argv[2])"
    )
    return CheckpointError(
        f"{path} is a pickle, which can run any code when opened; expected .safetensors",
        "Convert it once, where you trust the file:\n"
        f'  python -c "{code}" {shlex.quote(str(path))} {shlex.quote(str(target))}',
    )
