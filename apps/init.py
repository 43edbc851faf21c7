"""`tiue-export init`: a device and a checkpoint, and the exact commands from one to the other."""

from __future__ import annotations

import functools
import json
import platform
import shlex
import shutil
import sys
from collections.abc import Callable, Collection, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TypeVar

from rich.console import Console

from tiue_export.checkpoint.clip_tokenizer import VOCABULARY_SIZE
from tiue_export.checkpoint.container import check_checkpoint_path, is_hub_id, refuse_pickle
from tiue_export.checkpoint.demo_student import NAME, checkpoint_place
from tiue_export.errors import TiueError, UsageError, unknown_name
from tiue_export.registry.backends import BACKENDS
from tiue_export.system.install import PACKAGE, WHEEL, install_line, wheel_line

from .draw.generate import slug
from .report.tables import print_json

# Those of backends with a form of their own first: they are the faster ones.
DEVICES: Mapping[str, str] = {
    device: label
    for _, entry in sorted(BACKENDS.items(), key=lambda item: not item[1].folders)
    for device, label in entry.devices.items()
}
# Names in single files of whole pipelines, and of OpenCLIP's text encoder among them (SD 2.x).
_TEXT, _VAE = ("cond_stage_model.", "conditioner.embedders.0."), "first_stage_model."
_OPEN_CLIP = tuple(f"{place}model." for place in _TEXT)
_UNET_ALONE = "It holds a UNet alone: text encoder, VAE and tokenizer come from a pipeline folder."
_VAE_ALONE = "It holds no text encoder: that and its tokenizer come from a pipeline folder."
_NO_VAE = "It holds no VAE: that comes from a pipeline folder."
_OTHER_WORDS = "Its text encoder is not CLIP's: the tokenizer comes from a pipeline folder."
_EITHER = (
    "Stable Diffusion 2.1 comes in two kinds that weights do not tell apart: what the network "
    "predicts is read from a pipeline folder (or pass --prediction to the commands)."
)
_SUFFIX = ".safetensors"
_DEMO_BUNDLE = "emoji"
_PHONES = ("iphone", "ipad")
T = TypeVar("T")
_PROMPT = '"a red fox in the snow"'


@dataclass(frozen=True)
class Step:
    """One command, where it is typed and what it gives."""

    command: str
    meaning: str
    where: str = "here"


@dataclass(frozen=True)
class Checkpoint:
    """What `--ckpt` and `--base` will be; `whole` when no base is needed, else `lacks` says why.

    `there`: it could be looked at; else `whole` goes by its name.
    """

    ckpt: str
    base: str | None
    whole: bool
    lacks: str = ""
    there: bool = True


def run(
    device: str | None,
    ckpt: str | None,
    base: str | None,
    commands: Collection[str],
    as_json: bool,
) -> None:
    """Ask for what was not given, again where an answer cannot be; then print the commands."""
    device = device_named(device) if device is not None else _asked(device_named, _ask_device)
    if ckpt is not None:
        found = look_at(ckpt, base)
    else:
        found = _asked(lambda typed: look_at(typed, base), _ask_ckpt)
    if not found.whole and base is None and _can_ask():
        print(found.lacks)
        known = found.ckpt
        found = _asked(lambda typed: look_at(known, typed), _ask_base)
    steps = steps_for(device, found, commands)
    if as_json:
        print_json(
            {"device": device, "checkpoint": asdict(found), "steps": list(map(asdict, steps))}
        )
        return
    _show(device, found, steps)


def look_at(ckpt: str, base: str | None) -> Checkpoint:
    """Whether a checkpoint brings everything; pickles and damaged files are refused."""
    place = checkpoint_place(ckpt)
    for each in filter(None, (str(place), base)):
        if Path(each).exists():
            check_checkpoint_path(each)
        else:
            refuse_pickle(Path(each))
    if not (place.exists() or is_hub_id(str(place))):
        whole = base is not None or place.suffix != _SUFFIX
        return Checkpoint(ckpt, base, whole, "" if whole else _UNET_ALONE, there=False)
    if base is not None or is_hub_id(str(place)) or (place / "model_index.json").is_file():
        return Checkpoint(ckpt, base, whole=True)
    lacks = _lacks(place)
    return Checkpoint(ckpt, None, whole=not lacks, lacks=lacks)


def _lacks(path: Path) -> str:
    """Why a base is needed; "": it is not, as a single file holds all that is not CLIP's."""
    if not path.is_file():
        return _UNET_ALONE
    with path.open("rb") as file:
        header = json.loads(file.read(int.from_bytes(file.read(8), "little")))
    said = header.pop("__metadata__", {})
    has_vae = any(name.startswith(_VAE) for name in header)
    words = [n for n in header if n.startswith(_TEXT) and n.endswith("token_embedding.weight")]
    if not words:
        return _VAE_ALONE if has_vae else _UNET_ALONE
    if header[words[0]].get("shape", [])[:1] != [VOCABULARY_SIZE]:
        return _OTHER_WORDS
    if not has_vae:
        return _NO_VAE
    told = "v_pred" in header or "modelspec.prediction_type" in said
    return _EITHER if words[0].startswith(_OPEN_CLIP) and not told else ""


def steps_for(device: str, found: Checkpoint, commands: Collection[str]) -> list[Step]:
    """The commands, in order; `commands` are those that this program has."""
    source = f"--ckpt {shlex.quote(found.ckpt)}"
    if found.base is not None:
        source += f" --base {shlex.quote(found.base)}"
    elif not found.whole:
        source += " --base PIPELINE_FOLDER"
    # `make demo` writes demo/.
    name = _DEMO_BUNDLE if found.ckpt == NAME else slug(Path(found.ckpt).name.removesuffix(_SUFFIX))
    if Path(name).exists():  # often the checkpoint's own folder
        name += "-bundle"
    ways: Mapping[str, Callable[[str, str], list[Step]]] = {
        "arm": _ort,
        "rtx": _rtx,
        "nvidia": _nvidia,
        "jetson": _jetson,
        "snapdragon": _snapdragon_phone,
        "snapdragon-pc": _snapdragon_pc,
        "mac": functools.partial(_coreml, "") if "coreml" in commands else _ort,
    }
    if device in ways:
        return ways[device](source, name)
    if device in _PHONES:
        return _coreml(f" --profile {device} --swift-bundle", source, name)
    return _by_exporter(next(n for n, e in BACKENDS.items() if device in e.devices), source, name)


def _by_exporter(backend: str, source: str, name: str) -> list[Step]:
    """Of a backend whose form needs a bundle and no more."""
    entry = BACKENDS[backend]
    extras = ",".join(filter(None, ("export", entry.extra)))
    return [
        Step(install_line(extras), "exporter and runtime"),
        Step(f"tiue-export onnx {source} --out {name}", "a bundle, every hop proven"),
        Step(f"tiue-export {backend} --bundle {name}", f"its {entry.title} form, proven"),
        *_draw(name, backend),
    ]


def _ort(source: str, name: str) -> list[Step]:
    return [
        Step(install_line("export"), "exporter and runtime"),
        Step(f"tiue-export onnx {source} --out {name}", "a bundle, every hop proven"),
        *_draw(name, "ort"),
    ]


def _coreml(options: str, source: str, name: str) -> list[Step]:
    made = "Core ML packages, proven" + (", and what Swift needs: docs/apple.md" if options else "")
    on_mac = [replace(step, where="on a Mac") for step in _draw(name, "coreml")]
    return [
        Step(install_line("export,coreml"), "exporter and runtime"),
        Step(f"tiue-export coreml {source}{options} --out {name}", made),
        *(on_mac if options else _draw(name, "coreml")),
    ]


def _rtx(source: str, name: str) -> list[Step]:
    return [
        Step(install_line("export,trt-rtx"), "exporter, builder and runtime"),
        Step(f"tiue-export trt {source} --flavor rtx --out {name}", "engines, also without a GPU"),
        *_draw(name, "trt"),
    ]


def _nvidia(source: str, name: str) -> list[Step]:
    return [
        Step(install_line("export,trt"), "exporter, builder and runtime"),
        Step(f"tiue-export trt {source} --flavor tensorrt --out {name}", "engines for this GPU"),
        *_draw(name, "trt"),
        Step(f"tiue-export serve {name} --runtime trt", "OpenAI's images API on port 8000"),
    ]


def _jetson(source: str, name: str) -> list[Step]:
    there, wheel = "on the Jetson", wheel_line()
    return [
        Step(install_line("export"), "exporter"),
        Step(f"tiue-export onnx {source} --precision fp16 --out {name}", "a bundle, proven"),
        Step(f"tiue-export bundle pack {name} --runtime trt --out {name}.tar", "one file"),
        *([Step(wheel, "the program itself, as one file")] if wheel else []),
        Step(f"scp {name}.tar {f'dist/{WHEEL} ' if wheel else ''}jetson:", "carry it over"),
        Step(
            f"pip install '{WHEEL if wheel else PACKAGE}[trt]'",
            "no torch; TensorRT comes with JetPack",
            there,
        ),
        Step(f"tiue-export bundle unpack {name}.tar --out {name}", "verified", there),
        Step(f"tiue-export trt --bundle {name}", "engines for this device", there),
        *(replace(step, where=there) for step in _draw(name, "trt")),
    ]


def _snapdragon(source: str, name: str, soc: str) -> list[Step]:
    pack = f"tiue-export bundle pack {name} --runtime qnn --out {name}.tar"
    return [
        Step(install_line("export,qnn"), "exporter, Qualcomm's compiler and emulator"),
        Step(f"tiue-export qnn {source} --soc {soc} --out {name}", "contexts, proven"),
        Step(pack, "what the device needs, as one file: docs/snapdragon.md"),
    ]


def _snapdragon_phone(source: str, name: str) -> list[Step]:
    # Python's package of the provider is not made for Android: an app takes the packed contexts.
    draw = f"tiue-export generate {name} {_PROMPT} --runtime qnn --device emulator"
    return [
        *_snapdragon(source, name, "sm8650"),
        Step(draw, "what the phone will draw, by the emulator here: slow"),
    ]


def _snapdragon_pc(source: str, name: str) -> list[Step]:
    there, wheel = "on the PC", wheel_line()
    return [
        *_snapdragon(source, name, "x-elite"),
        *([Step(wheel, "the program itself, as one file")] if wheel else []),
        Step(f"pip install '{WHEEL if wheel else PACKAGE}[qnn]'", "no torch", there),
        Step(f"tiue-export bundle unpack {name}.tar --out {name}", "verified", there),
        *(replace(step, where=there) for step in _draw(name, "qnn")),
    ]


def _draw(name: str, runtime: str) -> list[Step]:
    return [
        Step(f"tiue-export parity {name} --runtime {runtime}", "proof on the device itself"),
        Step(f"tiue-export generate {name} {_PROMPT} --runtime {runtime} --time", "a picture"),
    ]


def _show(device: str, found: Checkpoint, steps: list[Step]) -> None:
    """Numbered steps; each command stands alone on its line, to be copied."""
    console = Console(highlight=False, soft_wrap=True)
    console.print(f"\n[bold]{DEVICES[device]}[/]")
    if not found.there:
        console.print(f"{found.ckpt} is not there yet; once it is:", markup=False)
    if not found.whole:
        console.print(f"{found.lacks}\nPIPELINE_FOLDER stands for it: a folder, or a hub id.")
    where = "here"
    for number, step in enumerate(steps, 1):
        if step.where != where:
            where = step.where
            console.print(f"\n[bold]{where}[/]")
        console.print(f"[dim]{number}. {step.meaning}[/]")
        console.print(f"   {step.command}", markup=False)


def guess_device() -> str:
    """What this machine looks like, as the default of the question."""
    if Path("/etc/nv_tegra_release").is_file():
        return "jetson"
    if platform.system() == "Darwin":
        return "mac"
    if shutil.which("nvidia-smi"):
        return "rtx"
    return "cpu" if platform.machine().lower() in ("x86_64", "amd64") else "arm"


def _can_ask() -> bool:
    return sys.stdin.isatty()


def device_named(answer: str) -> str:
    """A device by its name, or by its number in the question."""
    names, low = list(DEVICES), answer.strip().lower()
    if low.isdigit() and 1 <= int(low) <= len(names):
        return names[int(low) - 1]
    if low not in DEVICES:
        raise unknown_name("device", answer, DEVICES)
    return low


def _asked(understood: Callable[[str], T], ask: Callable[[], str]) -> T:
    """What an answer means; where it means nothing the reason is told, and asked again."""
    while True:
        answer = ask()
        try:
            return understood(answer)
        except TiueError as error:
            print(error)


def _ask_ckpt() -> str:
    return _ask("Checkpoint (.safetensors, diffusers folder or hub id)", "--ckpt")


def _ask_base() -> str:
    return _ask("Pipeline folder or hub id", "--base")


def _ask_device() -> str:
    default = guess_device()
    if _can_ask():
        print("Where will the student run?")
        for number, (name, meaning) in enumerate(DEVICES.items(), 1):
            print(f"  {number}  {name:<8} {meaning}")
    return _ask(f"Device [{default}]", "--device", default)


def _ask(question: str, option: str, default: str = "") -> str:
    """An answer from the terminal; without one, the option is asked for instead."""
    if not _can_ask():
        raise UsageError(
            f"nobody can be asked for {option}: this is no terminal",
            "Type: tiue-export init --device cpu --ckpt student.safetensors --base PIPELINE_FOLDER",
        )
    while True:
        answer = input(f"{question}: ").strip() or default
        if answer:
            return answer
