"""`--runtime auto`: measured once, remembered with its evidence, measured again when it must be."""

from __future__ import annotations

import json
import shutil

import pytest

from tiue_export.apps.draw import runtime_choice
from tiue_export.apps.draw.runtime_choice import RuntimeChoice, choose_runtime, remembered_choices
from tiue_export.bundle.read import open_bundle
from tiue_export.errors import BundleError, RuntimeFailure
from tiue_export.registry.backends import BACKENDS
from tiue_export.specs import RuntimeOptions


@pytest.fixture(autouse=True)
def own_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("LOCALAPPDATA", str(tmp_path / "cache"))


@pytest.fixture(scope="module")
def measured_once(compiled_bundle, tmp_path_factory):
    """The tiny bundle with its choice, and the file's text."""
    cache = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(cache))
        patch.setenv("LOCALAPPDATA", str(cache))
        told: list[str] = []
        chosen = choose_runtime(
            compiled_bundle, on_start=told.append, on_trial=lambda t: told.append(t.runtime)
        )
        return chosen, chosen.file.read_text("utf-8"), told


def remember(bundle, text: str, options: RuntimeOptions | None = None):
    """Put a remembered choice where `choose_runtime` looks for it."""
    file = runtime_choice._file(bundle.root, options or RuntimeOptions())
    file.parent.mkdir(parents=True)
    file.write_text(text, "utf-8")
    return file


def counted_trials(monkeypatch) -> list[str]:
    """Names of the runtimes that are really tried from here on."""
    tried: list[str] = []
    real = runtime_choice._try
    monkeypatch.setattr(
        runtime_choice, "_try", lambda *args: (tried.append(args[1]), real(*args))[1]
    )
    return tried


def test_the_fastest_that_can_draw_is_chosen_and_the_others_keep_their_reason(measured_once):
    chosen, _, told = measured_once
    trials = {trial.runtime: trial for trial in chosen.choice.trials}
    assert set(trials) == {name for name, entry in BACKENDS.items() if entry.automatic}
    assert "torch" not in trials
    able = [trial for trial in chosen.choice.trials if trial.latency_ms is not None]
    assert {"ort", "openvino"} <= {trial.runtime for trial in able}
    assert chosen.choice.runtime == able[0].runtime
    assert able[0].latency_ms == min(trial.latency_ms for trial in able)
    for trial in able:
        assert trial.device
        assert trial.open_s > 0
        assert sum(trial.stage_latency_ms.values()) <= trial.latency_ms
    assert "TensorRT" in trials["trt"].reason
    assert chosen.why == "not measured before"
    assert told[:2] == ["ort", "ort"]


def test_a_choice_is_remembered(measured_once, compiled_bundle, monkeypatch):
    remember(compiled_bundle, measured_once[1])
    tried = counted_trials(monkeypatch)
    chosen = choose_runtime(compiled_bundle)
    assert tried == []
    assert chosen.why == ""
    assert chosen.choice == measured_once[0].choice
    assert [choice for _, choice in remembered_choices()] == [chosen.choice]


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("openvino", "2020.1", "openvino: 2020.1 then, "),
        ("cpu", "another one", "cpu: another one then, "),
        ("tiue-export", "0.0.1", "tiue-export: 0.0.1 then, "),
        ("gpu", "a card", "gpu: a card then, "),
    ],
)
def test_another_machine_or_library_means_measuring_again(
    measured_once, compiled_bundle, monkeypatch, field, value, why
):
    data = json.loads(measured_once[1])
    data["circumstances"][field] = value
    remember(compiled_bundle, json.dumps(data))
    tried = counted_trials(monkeypatch)
    assert choose_runtime(compiled_bundle).why.startswith(why)
    assert "ort" in tried


def test_a_changed_bundle_means_measuring_again(measured_once, compiled_bundle, tmp_path):
    root = tmp_path / "copy"
    shutil.copytree(compiled_bundle.root, root)
    data = json.loads(measured_once[1])
    data["bundle"] = str(root)
    choice = RuntimeChoice.from_json(json.dumps(data), "here")
    assert choice.outdated() == ""
    manifest = root / "tiue.json"
    manifest.write_text(manifest.read_text("utf-8").replace("\n", " \n", 1), "utf-8")
    assert choice.outdated() == "the bundle changed"
    shutil.rmtree(root)
    assert choice.outdated() == "the bundle is gone"


def test_other_wishes_are_measured_apart(measured_once, compiled_bundle):
    remember(compiled_bundle, measured_once[1])
    chosen = choose_runtime(compiled_bundle, RuntimeOptions(threads=1, precision="fp32"))
    assert chosen.why == "not measured before"
    assert chosen.choice.circumstances["asked"] == "threads 1, precision fp32"
    able = [trial for trial in chosen.choice.trials if trial.latency_ms is not None]
    assert {"ort", "openvino"} <= {trial.runtime for trial in able}
    assert {trial.precision for trial in able} == {"fp32"}


def test_a_damaged_memory_is_said_and_measured_again(compiled_bundle):
    file = remember(compiled_bundle, "{")
    assert [choice for _, choice in remembered_choices()] == [None]
    chosen = choose_runtime(compiled_bundle)
    assert chosen.why.startswith("what was remembered cannot be read")
    assert chosen.file == file
    with pytest.raises(BundleError, match=r"unknown fields|lacks|missing"):
        RuntimeChoice.from_json("{}", "here")


def test_a_broken_library_keeps_no_other_from_being_chosen(compiled_bundle, monkeypatch):
    def broken(name, bundle, options):
        if name == "ort":
            raise OSError("libonnxruntime.so: undefined symbol")
        return real(name, bundle, options)

    from tiue_export.drawing import pipeline

    real = pipeline.open_runtime
    monkeypatch.setattr(pipeline, "open_runtime", broken)
    chosen = choose_runtime(compiled_bundle)
    assert chosen.choice.runtime == "openvino"
    (ort,) = (trial for trial in chosen.choice.trials if trial.runtime == "ort")
    assert ort.reason == "OSError: libonnxruntime.so: undefined symbol"


def test_without_any_runtime_every_reason_is_told(tiny_bundle, monkeypatch):
    only = {name: entry for name, entry in BACKENDS.items() if name == "openvino"}
    monkeypatch.setattr(runtime_choice, "BACKENDS", only)
    with pytest.raises(RuntimeFailure, match=r"openvino: .* has no OpenVINO graphs") as raised:
        choose_runtime(tiny_bundle)
    assert "doctor" in raised.value.next_step
    assert remembered_choices() == []


def test_generate_says_what_it_chose_and_doctor_remembers(run, compiled_bundle, measured_once):
    remember(compiled_bundle, measured_once[1])
    name = measured_once[0].choice.runtime
    code, out, err = run(
        "generate", compiled_bundle.root, "a red fox", "--runtime", "auto", "--out", "one.png"
    )
    assert code == 0, err
    assert f"runtime {name} (" in err
    assert "a picture" in err
    assert "(measured 20" in err
    options = ("generate", compiled_bundle.root, "a red fox", "--runtime", "auto", "--json")
    code, out, err = run(*options, "--out", "two.png")
    assert code == 0, err
    told = json.loads(out)["runtime_choice"]
    assert (told["runtime"], told["remembered"], told["why_measured"]) == (name, True, None)
    assert told["latency_ms"]["ort"] > 0
    assert err == ""
    code, out, _ = run("doctor", "--json")
    (row,) = json.loads(out)["runtime_choices"]
    assert (row["bundle"], row["outdated"]) == (str(compiled_bundle.root.resolve()), "")
    assert row["runtime"].startswith(f"{name} (")
    code, out, _ = run("doctor")
    assert "--runtime auto" in out


def test_generate_measures_where_nothing_is_remembered(run, compiled_bundle):
    code, _, err = run(
        "generate", compiled_bundle.root, "a red fox", "--runtime", "auto", "--out", "one.png"
    )
    assert code == 0, err
    assert "trying ort" in err
    assert "measured now: not measured before" in err


def test_open_bundle_and_choice_agree_on_the_path(compiled_bundle, measured_once):
    assert open_bundle(measured_once[0].choice.bundle).manifest == compiled_bundle.manifest
