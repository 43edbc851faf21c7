"""A distillation's configuration: TOML -> one frozen object, with the paper's presets."""

from __future__ import annotations

import math
import sys
from collections.abc import Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from importlib import resources
from pathlib import Path
from typing import Any, get_type_hints

from tiue_export.checkpoint.container import is_hub_id
from tiue_export.errors import UsageError, first_line, unknown_name
from tiue_export.sampling.fan_out import FanOut

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

METHODS = ("tiue", "one-step", "lcm")
PRECISIONS = ("fp32", "fp16", "bf16")
_TIMESTEPS = 1000


@dataclass(frozen=True)
class Backbone:
    """What a student keeps of its teacher's UNet, beside one resnet a level."""

    mid_block: bool
    levels_less: int


# BK-SDM's three shapes (arXiv 2305.15798), of whatever teacher.
BACKBONES = {
    "bk-sdm-base": Backbone(mid_block=True, levels_less=0),
    "bk-sdm-small": Backbone(mid_block=False, levels_less=0),
    "bk-sdm-tiny": Backbone(mid_block=False, levels_less=1),
}


@dataclass(frozen=True)
class DistillConfig:
    """Everything that decides a run's outcome. The defaults are the paper's (method B.5).

    `batch` is the whole batch of one step over all processes and accumulation; `micro_batch` is
    what one process holds at a time. Sides are in pixels.
    """

    teacher: str
    prompts: str
    out: str
    prompt_column: str | None = None
    # tiue: one encoder pass, K decoder rows, KL. one-step: SwiftBrush, one pass at t=999, no KL.
    # lcm: latent consistency, any number of passes; `steps` of them draw the samples.
    method: str = "tiue"
    steps: int = 4
    # tiue: where the K rows part, "2" behind two up blocks; None: as `student` does, else at once.
    fan_out: str | None = None
    # Start from this student instead of from the teacher: how K = 2, 8, 16, 32 are trained.
    student: str | None = None
    # The student's UNet: None, as the teacher's; else a smaller one, which starts as its copy.
    backbone: str | None = None
    iterations: int = 66_500
    batch: int = 64
    micro_batch: int = 8
    # None: the teacher's own. Another size is recorded in the student, which then draws at it.
    height: int | None = None
    width: int | None = None
    precision: str = "fp16"
    student_learning_rate: float = 1e-6
    lora_learning_rate: float = 1e-3
    warmup_steps: int = 0
    final_rate: float = 1.0
    adam_beta1: float = 0.9
    adam_beta2: float = 0.999
    gradient_clip: float = 1.0
    guidance: float = 4.5
    lora_rank: int = 64
    lora_alpha: float = 108.0
    lora_targets: tuple[str, ...] = ("to_q", "to_v")
    lora_warmup_steps: int = 0
    null_share: float = 0.1
    # Per sample, summed over the K predictions: 0.1 x the published code's device batch of 8.
    kl_weight: float = 0.8
    clip_model: str | None = None
    clip_decoder: str | None = None
    clip_threshold: float = 0.35
    clip_weight: float = 0.1
    clip_decay_steps: int = 177_341
    # tiue, one-step: how much a picture is pulled to the teacher's own of the same noise (DMD's
    # regression, arXiv 2311.18828). Off in the paper.
    regression_weight: float = 0.0
    # Of lcm and of regression: the teacher's DDIM steps (lcm skips one: 1000 / the paper's k), how
    # many pictures it draws to learn on, and where the loss goes from squares to distances.
    solver_steps: int = 50
    teacher_pictures: int = 20_000
    huber_width: float = 0.001
    ema_decay: float = 0.9999
    gradient_checkpointing: bool = True
    channels_last: bool = True
    # Unfused attention: a fifth faster to train on CPUs at small resolutions, slower on GPUs.
    plain_attention: bool = False
    seed: int = 0
    log_every: int = 20
    save_every: int = 500
    sample_every: int = 500
    sample_prompts: tuple[str, ...] = ()
    samples_per_prompt: int = 4

    def __post_init__(self) -> None:
        for kind, value, legal in (
            ("method", self.method, METHODS),
            ("precision", self.precision, PRECISIONS),
            ("backbone", self.backbone, BACKBONES),
        ):
            if value is not None and value not in legal:
                raise unknown_name(kind, value, legal)
        self._check_numbers()
        if self.method == "one-step":
            self._check_one_step()
        if self.fan_out is not None:
            FanOut.parse(self.fan_out, "fan_out")
            if self.method != "tiue":
                raise UsageError(f"method {self.method} has no fan_out", "Remove fan_out.")
        self._check_own()
        for name, other in (("save_every", "log_every"), ("sample_every", "save_every")):
            if getattr(self, name) % getattr(self, other):
                raise UsageError(
                    f"{name} is {getattr(self, name)}; expected a multiple of {other} "
                    f"({getattr(self, other)})"
                )
        if (self.clip_model is None) != (self.clip_decoder is None):
            raise UsageError(
                "the CLIP term needs both clip_model (a CLIPModel folder) and clip_decoder "
                "(an AutoencoderTiny folder); one is missing"
            )

    def _check_numbers(self) -> None:
        sides = [name for name in ("height", "width") if getattr(self, name) is not None]
        for name, legal, expected in (
            *((name, getattr(self, name) > 0, "more than 0") for name in (*_POSITIVE, *sides)),
            *((name, getattr(self, name) >= 0, "0 or more") for name in _NOT_NEGATIVE),
            *((name, 0 <= getattr(self, name) <= 1, "0 to 1") for name in _SHARES),
            *((name, 0 <= getattr(self, name) < 1, "0 or more, below 1") for name in _BELOW_ONE),
        ):
            if not legal or not math.isfinite(getattr(self, name)):
                raise UsageError(f"{name} is {getattr(self, name)}; expected {expected}")

    def _check_one_step(self) -> None:
        for name, wanted in (("steps", 1), ("kl_weight", 0)):
            if getattr(self, name) != wanted:
                raise UsageError(
                    f"method one-step has {name} {getattr(self, name)}; expected {wanted}",
                    'Set it, or start from preset = "swiftbrush".',
                )

    def _check_own(self) -> None:
        for name in self._foreign:
            if getattr(self, name) == _DEFAULTS[name]:
                continue
            if name in _PICTURES:
                raise UsageError(
                    f"method {self.method} has no {name} without regression_weight",
                    f"Remove {name}, or set regression_weight = 0.25.",
                )
            raise UsageError(f"method {self.method} has no {name}", f"Remove {name}.")
        if not self.learns_on_pictures:
            return
        # An LCM skips steps of the solver, and cannot draw in more than there are.
        least, what = (self.steps, "steps (%d)") if self.method == "lcm" else (1, "%d")
        if not least <= self.solver_steps <= _TIMESTEPS:
            raise UsageError(
                f"solver_steps is {self.solver_steps}; expected {what % least} or more, up to "
                f"{_TIMESTEPS}"
            )

    @property
    def has_fake_score(self) -> bool:
        """Whether a fake score learns beside the student."""
        return self.method != "lcm"

    @property
    def learns_on_pictures(self) -> bool:
        """Whether the teacher draws pictures to learn on before the first step."""
        return self.method == "lcm" or self.regression_weight > 0

    @property
    def _foreign(self) -> tuple[str, ...]:
        """The settings that mean nothing to the method."""
        if not self.has_fake_score:
            return _SCORES
        return () if self.regression_weight else _PICTURES

    @property
    def outcome(self) -> dict[str, Any]:
        """The settings that decide the weights: a run may only be resumed with equal ones.

        Of files and folders, what is in them decides, not where they lie.
        """
        free = {*_PLACES, "prompt_column", "log_every", "save_every", "sample_every"}
        free |= {"sample_prompts", "samples_per_prompt", "gradient_checkpointing", "channels_last"}
        free |= {*self._foreign}
        if self.method == "lcm":
            free.add("steps")
        if self.clip_model is None:
            # The CLIP term alone is not a mean over samples: see `losses.clip_loss`.
            free.add("micro_batch")
        if self.fan_out is None:
            free.add("fan_out")  # it follows from the student, whose hash is compared
        if self.final_rate == 1:
            # The learning rate does not look ahead, so a run may be made longer.
            free.add("iterations")
        return {key: value for key, value in asdict(self).items() if key not in free}


_DEFAULTS = {field.name: field.default for field in fields(DistillConfig)}
_PICTURES = ("solver_steps", "teacher_pictures", "huber_width")
_SCORES = (
    "lora_learning_rate",
    "lora_rank",
    "lora_alpha",
    "lora_targets",
    "lora_warmup_steps",
    "null_share",
    "kl_weight",
    "clip_model",
    "clip_decoder",
    "clip_threshold",
    "clip_weight",
    "clip_decay_steps",
    "regression_weight",
)
_PLACES = ("teacher", "prompts", "out", "student", "clip_model", "clip_decoder")
_POSITIVE = (
    "steps",
    "iterations",
    "batch",
    "micro_batch",
    "student_learning_rate",
    "lora_learning_rate",
    "lora_rank",
    "lora_alpha",
    "gradient_clip",
    "clip_decay_steps",
    *_PICTURES,
    "log_every",
    "save_every",
    "sample_every",
    "samples_per_prompt",
)
_NOT_NEGATIVE = (
    "warmup_steps",
    "lora_warmup_steps",
    "guidance",
    "kl_weight",
    "clip_weight",
    "clip_threshold",
    "regression_weight",
    "seed",
)
_SHARES = ("null_share", "final_rate", "ema_decay")
_BELOW_ONE = ("adam_beta1", "adam_beta2")


def preset_names() -> tuple[str, ...]:
    """Names of the presets that ship with the package."""
    folder = resources.files("tiue_export.train").joinpath("presets")
    return tuple(sorted(e.name[:-5] for e in folder.iterdir() if e.name.endswith(".toml")))


def read_config(file: Path, overrides: Mapping[str, object] | None = None) -> DistillConfig:
    """The configuration in `file`; `preset = "..."` in it fills what the file leaves open.

    Relative paths are relative to the file; a hub id of teacher or student stays one. `overrides`
    win over the file. Unknown keys and values of another type raise `UsageError` naming the
    nearest key.
    """
    try:
        given = tomllib.loads(file.read_text("utf-8"))
    except FileNotFoundError as error:
        raise UsageError(f"{file} is not there") from error
    except (OSError, ValueError, RecursionError) as error:
        raise UsageError(f"{file} is not TOML: {first_line(error)}") from error
    for key in _PLACES:
        if isinstance(given.get(key), str):
            hub = key in ("teacher", "student")
            given[key] = _place(file.parent, given[key], hub=hub)
    name = given.pop("preset", None)
    settings = {**({} if name is None else _preset(name)), **given, **(overrides or {})}
    return _checked(file, settings)


def _place(folder: Path, value: str, *, hub: bool) -> str:
    place = folder / value
    return value if hub and is_hub_id(value) and not place.parent.exists() else str(place)


def _preset(name: object) -> dict[str, Any]:
    if not isinstance(name, str) or name not in preset_names():
        raise unknown_name("preset", str(name), preset_names())
    text = resources.files("tiue_export.train").joinpath(f"presets/{name}.toml").read_text("utf-8")
    return tomllib.loads(text)


def _checked(file: Path, settings: dict[str, Any]) -> DistillConfig:
    known = {field.name: field for field in fields(DistillConfig)}
    hints = get_type_hints(DistillConfig)
    for key, value in settings.items():
        if key not in known:
            raise unknown_name(f"setting in {file}", key, known)
        settings[key] = _typed(file, key, value, hints[key])
    for key, field in known.items():
        if field.default is MISSING and key not in settings:
            raise UsageError(f"{file} has no {key}", f'Add {key} = "...".')
    return DistillConfig(**settings)


def _typed(file: Path, key: str, value: Any, wanted: Any) -> Any:
    if wanted == tuple[str, ...]:
        if isinstance(value, (list, tuple)) and all(isinstance(item, str) for item in value):
            return tuple(value)
        raise UsageError(f"{file} has {key} = {value!r}; expected a list of strings")
    if isinstance(value, int) and abs(value) > _LARGEST_NUMBER:
        raise UsageError(f"{file} has {key} = {str(value)[:40]}...; expected a number of 64 bits")
    if wanted is float and isinstance(value, int) and not isinstance(value, bool):
        return float(value)
    kinds = {bool: bool, int: int, int | None: int, float: float}
    kind = kinds.get(wanted, str)
    if not isinstance(value, kind) or (isinstance(value, bool) and kind is not bool):
        raise UsageError(f"{file} has {key} = {value!r}; expected {_KIND_NAMES[kind]}")
    return value


_LARGEST_NUMBER = 2**63
_KIND_NAMES = {bool: "true or false", int: "a whole number", float: "a number", str: "text"}
