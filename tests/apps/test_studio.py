"""The studio without its page: what can draw here, drafts and history, comparisons, recovery."""

from __future__ import annotations

import importlib
import shutil
import socket
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from tiue_export.bundle.read import open_bundle
from tiue_export.drawing.picture import parameters_from_png, save_png
from tiue_export.errors import UsageError
from tiue_export.proof.gates import IDENTICAL_DB
from tiue_export.specs import RuntimeOptions


def part(name: str):
    """A module of the studio: a spoke, so reached by name."""
    return importlib.import_module(f"tiue_export.apps.studio.{name}")


choices, drawing, stoppable, turns = map(part, ("choices", "drawing", "stoppable", "turns"))
comparison, recovery, serving = map(part, ("comparison", "recovery", "serving"))


@pytest.fixture(scope="module")
def offer(compiled_bundle):
    return choices.find_choices([compiled_bundle], (), RuntimeOptions())


@pytest.fixture
def drawer(tmp_path: Path):
    (tmp_path / "drafts").mkdir()
    made = drawing.Drawer(tmp_path / "drafts", tmp_path / "kept")
    yield made
    made.close()


def test_what_can_draw_is_offered_once_for_each_precision(offer):
    labels = [choice.label for choice in offer.choices]
    assert labels[0] == "ort fp32"
    assert "openvino fp32" in labels
    assert len(labels) == len(set(labels))
    assert offer.of_size("64x64") == labels


def test_what_cannot_draw_is_refused_with_what_would_change_that(tiny_bundle):
    found = choices.find_choices([tiny_bundle], ("ort", "openvino"), RuntimeOptions())
    assert [choice.label for choice in found.choices] == ["ort fp32"]
    (refusal,) = found.refusals
    assert refusal.reason.endswith("has no OpenVINO graphs")
    assert "tiue-export openvino --bundle" in refusal.remedy


def test_when_nothing_can_draw_the_reason_is_told(tiny_bundle):
    with pytest.raises(UsageError, match="has no OpenVINO graphs") as caught:
        choices.find_choices([tiny_bundle], ("openvino",), RuntimeOptions())
    assert "tiue-export openvino --bundle" in caught.value.next_step


def test_a_runtime_that_does_not_exist_is_corrected(tiny_bundle):
    with pytest.raises(UsageError, match="unknown runtime 'openvin'") as caught:
        choices.find_choices([tiny_bundle], ("openvin",), RuntimeOptions())
    assert caught.value.next_step == "Did you mean 'openvino'?"


def test_several_bundles_are_told_apart_by_name(tiny_bundle, bundle_copy):
    bundles = [tiny_bundle, open_bundle(bundle_copy)]
    found = choices.find_choices(bundles, ("ort",), RuntimeOptions())
    assert [choice.label for choice in found.choices] == ["tiny-fp32: ort fp32", "bundle: ort fp32"]


def test_bundles_of_one_name_are_told_apart_by_path(tiny_bundle, tmp_path):
    other = shutil.copytree(tiny_bundle.root, tmp_path / tiny_bundle.root.name)
    found = choices.find_choices([tiny_bundle, open_bundle(other)], ("ort",), RuntimeOptions())
    assert len({choice.label for choice in found.choices}) == 2


def test_pictures_carry_their_parameters_and_follow_the_seeds(offer, drawer):
    drawn = list(drawer.draw(offer.choices[0], "a red fox", 7, 2))
    assert [picture.parameters["seed"] for picture in drawn] == [7, 8]
    assert parameters_from_png(drawn[1].path) == drawn[1].parameters
    assert list(drawn[0].stage_latency_ms) == list(offer.choices[0].bundle.manifest.graphs)


def test_what_was_drawn_before_is_not_drawn_again(offer, drawer):
    first = list(drawer.draw(offer.choices[0], "an owl", 1, 3))
    again = list(drawer.draw(offer.choices[0], "an owl", 2, 2))
    assert again == first[1:]
    other = next(drawer.draw(offer.choice("openvino fp32"), "an owl", 2))
    assert other.path != again[0].path


def test_guidance_and_negative_prompt_are_drawn_with_and_brought_back(faster_bundle, drawer):
    offer = choices.find_choices([faster_bundle], ("ort",), RuntimeOptions())
    steering = drawing.Steering("blue", 2.0)
    (choice,) = offer.choices
    plain = next(drawer.draw(choice, "a red fox", 7))
    steered = next(drawer.draw(choice, "a red fox", 7, steering=steering))
    assert steered.path != plain.path  # a draft of other steering is another picture
    assert (steered.parameters["guidance"], steered.parameters["negative_prompt"]) == (2.0, "blue")
    assert recovery.recover(steered.path, offer).steering == steering
    assert recovery.recover(plain.path, offer).steering == drawing.Steering("", 5.0)


@pytest.mark.parametrize("given", [True, "7", None, [7]])
def test_a_guidance_that_is_no_number_is_not_brought_back(offer, drawer, tmp_path, given):
    drawn = next(drawer.draw(offer.choices[0], "a red fox", 7))
    with Image.open(drawn.path) as picture:
        save_png(picture, tmp_path / "x.png", {**drawn.parameters, "guidance": given})
    assert recovery.recover(tmp_path / "x.png", offer).steering == drawing.NOT_STEERED


@pytest.mark.parametrize(
    ("seed", "count", "message"),
    [(0, 0, "count is 0"), (0, 17, "expected 1 to 16"), (2**32, 1, "out of range")],
)
def test_requests_beyond_the_limits_are_refused(offer, drawer, seed, count, message):
    with pytest.raises(UsageError, match=message):
        list(drawer.draw(offer.choices[0], "an owl", seed, count))


def test_a_stale_drawing_stops_between_two_graphs(offer, drawer):
    answers = iter([False, False, False, True])
    with pytest.raises(stoppable.Stale):
        list(drawer.draw(offer.choices[0], "an owl", 0, 1, lambda: next(answers)))
    assert next(answers, "all were asked") == "all were asked"
    assert list(drawer.draw(offer.choices[0], "an owl", 0))  # the device is free again


def test_one_who_waits_for_the_device_leaves_when_stale(offer, drawer):
    with drawer._pipeline(offer.choices[0], drawing.never):
        start = time.monotonic()
        stale = lambda: time.monotonic() > start + 0.15  # noqa: E731
        with pytest.raises(stoppable.Stale):
            list(drawer.draw(offer.choices[0], "an owl", 0, 1, stale))
    assert time.monotonic() - start < 5


def test_two_runtimes_are_kept_open_and_the_longest_unused_is_closed(offer, drawer):
    third = replace(offer.choices[0], label="a third")
    for choice in (offer.choices[0], offer.choice("openvino fp32"), third):
        next(drawer.draw(choice, "an owl", 0))
    assert list(drawer._pipelines) == ["openvino fp32", "a third"]


def test_old_drafts_are_removed(offer, drawer, monkeypatch):
    monkeypatch.setattr(drawing, "_DRAFTS", 2)
    drawn = list(drawer.draw(offer.choices[0], "an owl", 0, 3))
    assert [picture.path.exists() for picture in drawn] == [False, True, True]


def test_the_history_holds_what_was_kept_once_and_newest_first(offer, drawer):
    drawn = list(drawer.draw(offer.choices[0], "A red fox!", 7, 2))
    assert drawer.history() == []
    drawer.keep(drawn[:1])
    time.sleep(0.01)
    paths = drawer.keep(drawn)
    assert drawer.history() == paths[::-1]
    assert paths[0].name.endswith("-a-red-fox-seed7.png")
    assert parameters_from_png(paths[0])["prompt"] == "A red fox!"


def test_prompts_too_long_for_the_encoder_are_noticed(offer, drawer):
    assert drawer.tokens_cut(offer.choices[0], "fox") == 0
    assert drawer.tokens_cut(offer.choices[0], "fox " * 200) > 100


def test_the_newest_request_of_a_window_makes_the_older_ones_stale():
    counted = turns.Turns()
    first, other = counted.take("window"), counted.take("another")
    assert not first()
    second = counted.take("window")
    assert (first(), second(), other()) == (True, False, False)


def test_a_request_that_was_overtaken_on_its_way_is_stale_at_once():
    counted = turns.Turns()
    newer = counted.take("window", sent=2)
    older = counted.take("window", sent=1)
    assert (older(), newer()) == (True, False)


def test_a_pause_in_the_typing_is_waited_for():
    assert turns.still_wanted(lambda: False, 0.03)
    assert not turns.still_wanted(lambda: True, 10.0)


def test_two_runtimes_are_compared_with_gate_difference_and_latency(offer, drawer):
    left, right = offer.choice("ort fp32"), offer.choice("openvino fp32")
    found = list(comparison.compare(drawer, left, right, "a red fox", 3, 2))
    assert len(found) == 3
    last = found[-1]
    assert last.gate_db == 100
    assert last.latents_psnr_db >= last.gate_db
    assert last.picture_psnr_db > 40
    assert last.max_levels <= 1
    assert last.difference.size == (64, 64)
    stages = set(left.bundle.manifest.graphs)
    for side in last.latency_ms:
        assert {stage: len(times) for stage, times in side.items()} == dict.fromkeys(stages, 2)
    page = part("markup").comparison_page(last)
    assert "passed" in page
    assert "decoder" in page


def test_other_weights_are_compared_without_a_gate(offer, drawer):
    left = offer.choice("ort fp32")
    manifest = left.bundle.manifest
    source = replace(manifest.source, sha256="0" * 64)
    bundle = replace(left.bundle, manifest=replace(manifest, source=source))
    right = replace(left, label="other", bundle=bundle)
    (found,) = comparison.compare(drawer, left, right, "a red fox", 3, 0)
    assert (found.gate_db, found.latents_psnr_db) == (None, IDENTICAL_DB)
    assert "identical" in part("markup").comparison_page(found)


def test_a_comparison_needs_two_sides_of_one_size(offer, drawer):
    left = offer.choices[0]
    with pytest.raises(UsageError, match="both sides are 'ort fp32'"):
        next(comparison.compare(drawer, left, left, "fox", 0, 1))
    manifest = replace(left.bundle.manifest, latent_shape=(1, 4, 8, 16))
    wide = replace(left, label="wide", bundle=replace(left.bundle, manifest=manifest))
    with pytest.raises(UsageError, match="the sizes differ: 64x64 and 128x64"):
        next(comparison.compare(drawer, left, wide, "fox", 0, 1))


@pytest.mark.parametrize(
    ("largest", "factor"), [(0, 1), (1, 128), (3, 64), (100, 2), (128, 1), (255, 1)]
)
def test_a_difference_map_is_amplified_as_far_as_it_stays_in_range(largest, factor):
    left = np.zeros((2, 3, 3), np.uint8)
    right = left.copy()
    right[1, 2, 0] = largest
    image, amplified = comparison.difference_map(left, right)
    assert amplified == factor
    assert np.asarray(image).tolist() == [[0, 0, 0], [0, 0, largest * factor]]


def test_a_picture_brings_its_parameters_back(offer, drawer):
    choice = offer.choice("openvino fp32")
    drawn = next(drawer.draw(choice, "un renard rusé, 狐", 4_000_000_000))
    found = recovery.recover(drawn.path, offer)
    assert (found.prompt, found.seed) == ("un renard rusé, 狐", 4_000_000_000)
    assert (found.choice, found.notes) == (choice, ())


@pytest.mark.parametrize(
    ("change", "note"),
    [
        ({"model_hash": "0123456789", "model": "other"}, "drawn by other"),
        ({"size": "512x512"}, "none of the bundles here"),
        ({"precision": "fp16"}, "drawn in fp16, here in"),
        ({"seed": None}, "it has no seed"),
    ],
)
def test_why_a_picture_may_come_out_differently_is_told(offer, drawer, tmp_path, change, note):
    drawn = next(drawer.draw(offer.choices[0], "fox", 0))
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {**drawn.parameters, **change})
    assert note in "; ".join(recovery.recover(tmp_path / "a.png", offer).notes)


def test_files_without_our_parameters_are_refused(offer, tmp_path):
    Image.new("RGB", (8, 8)).save(tmp_path / "plain.png")
    (tmp_path / "text.png").write_text("no picture")
    save_png(Image.new("RGB", (8, 8)), tmp_path / "odd.png", {"prompt": 7})
    for name, message in (
        ("plain.png", "carries no parameters"),
        ("text.png", "cannot be read as a PNG"),
        ("gone.png", "cannot be read as a PNG"),
        ("odd.png", "but no prompt"),
    ):
        with pytest.raises(UsageError, match=message):
            recovery.recover(tmp_path / name, offer)


def test_nothing_from_a_bundle_or_a_picture_becomes_markup(offer, drawer, tmp_path):
    evil = '<img src=x onerror="alert(1)">'
    choice = offer.choices[0]
    source = replace(choice.bundle.manifest.source, name=evil, licence=evil, notes=(evil,))
    bundle = replace(choice.bundle, manifest=replace(choice.bundle.manifest, source=source))
    markup = part("markup")
    page = markup.bundle_page(replace(choice, bundle=bundle, label=evil), offer)
    drawn = next(drawer.draw(choice, "fox", 0))
    save_png(Image.new("RGB", (8, 8)), tmp_path / "a.png", {**drawn.parameters, "model": evil})
    line = markup.recovered_line(recovery.recover(tmp_path / "a.png", offer))
    assert evil not in page + line
    assert "&lt;img src=x" in page
    assert "&lt;img src=x" in line


def test_the_bundle_page_of_graphs_without_onnx_names_no_opset(offer):
    choice = offer.choices[0]
    manifest = choice.bundle.manifest
    graphs = {
        name: replace(record, path=None, opset=None, files={})
        for name, record in manifest.graphs.items()
    }
    bare = replace(choice.bundle, manifest=replace(manifest, graphs=graphs))
    page = part("markup").bundle_page(replace(choice, bundle=bare), offer)
    assert "no ONNX" in page
    assert "opset" not in page


def test_the_bundle_page_tells_graphs_constants_parity_and_runtimes(offer):
    page = part("markup").bundle_page(offer.choices[0], offer)
    for text in ("unet_decoder", "+4.234612", "passed", "Compiled forms", "openvino fp32"):
        assert text in page


def test_a_port_in_use_is_explained():
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(UsageError, match=f"port {port} is in use") as caught:
            serving.bound_socket("127.0.0.1", port)
    assert "--port 0" in caught.value.next_step


@pytest.mark.parametrize(
    ("host", "port", "message"),
    [("127.0.0.1", 70000, "expected 0 to 65535"), ("no such host", 0, "cannot listen on")],
)
def test_addresses_that_cannot_be_listened_on_are_explained(host, port, message):
    with pytest.raises(UsageError, match=message):
        serving.bound_socket(host, port)


def test_without_a_bundle_the_studio_says_what_to_type(run):
    code, _, err = run("studio")
    assert (code, "tiue-export studio BUNDLE" in err) == (2, True)


def test_a_folder_that_is_no_bundle_ends_with_exit_code_6(run, tmp_path):
    assert run("studio", tmp_path)[0] == 6
