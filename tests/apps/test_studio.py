"""The studio without its page: what can draw here, drafts and history, comparisons, recovery."""

from __future__ import annotations

import contextlib
import importlib
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, replace
from pathlib import Path

import httpx
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
    assert drawer.cut_note(offer.choices[0], "fox") is None
    assert "the last 125 are cut" in drawer.cut_note(offer.choices[0], "fox " * 200)


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


JSON = {"Content-Type": "application/json"}


@dataclass(frozen=True)
class Page:
    """A studio in a process of its own: a client of it, its folders, and what it prints."""

    client: httpx.Client
    temporary: Path
    kept: Path
    printed: Path
    process: subprocess.Popen[bytes]


@contextlib.contextmanager
def studio_of(bundle, folder: Path) -> Iterator[Page]:
    """A studio as a user starts it, stopped at the end."""
    temporary, kept, printed = (folder / name for name in ("tmp", "kept", "printed"))
    temporary.mkdir()
    command = [sys.executable, "-m", "tiue_export", "studio", str(bundle.root), "--port", "0"]
    with (
        printed.open("wb") as out,
        subprocess.Popen(
            [*command, "--runtime", "ort", "--threads", "1", "--out", str(kept)],
            stdout=out,
            stderr=subprocess.STDOUT,
            env={**os.environ, "TMPDIR": str(temporary)},
        ) as process,
    ):
        try:
            while not (line := re.search(r"http://\S+", printed.read_text())):
                assert process.poll() is None, printed.read_text()
                time.sleep(0.05)
            with httpx.Client(base_url=line[0], timeout=30) as client:
                yield Page(client, temporary, kept, printed, process)
        finally:
            process.terminate()


@pytest.fixture(scope="module")
def studio(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """The studio of the tiny bundle. Shared."""
    with studio_of(tiny_bundle, tmp_path_factory.mktemp("studio")) as started:
        yield started


@pytest.fixture
def page(studio: Page) -> httpx.Client:
    """A client of the shared studio."""
    return studio.client


def event_of(page: httpx.Client, target: str, name: str) -> dict:
    """How the page asks for an event of the component with that id, with its values as they are."""
    config = page.get("/config").json()
    ids = {part["props"].get("elem_id"): part["id"] for part in config["components"]}
    values = {part["id"]: part["props"].get("value") for part in config["components"]}
    found = next(d for d in config["dependencies"] if [ids[target], name] in d["targets"])
    return {
        "fn_index": found["id"],
        "data": [values[each] for each in found["inputs"]],
        "session_hash": f"{target}-{name}",
        "trigger_id": ids[target],
        "event_data": None,
    }


def outcome(page: httpx.Client, event: dict) -> list[dict]:
    """Every message of an event, to its end."""
    joined = page.post("/gradio_api/queue/join", json=event)
    assert joined.status_code == 200, joined.text
    asked = {"session_hash": event["session_hash"]}
    with page.stream("GET", "/gradio_api/queue/data", params=asked) as stream:
        lines = [line[6:] for line in stream.iter_lines() if line.startswith("data: ")]
    return [json.loads(line) for line in lines]


def test_the_page_draws_keeps_and_shows_its_pictures(page, studio) -> None:
    event = event_of(page, "tiue-prompt", "submit")
    event["data"][0] = "a red fox"
    done = [m for m in outcome(page, event) if m["msg"] == "process_completed"]
    assert [m["success"] for m in done] == [True]
    (kept,) = studio.kept.glob("*-a-red-fox-*.png")
    shown = page.get(f"/gradio_api/file={kept}")
    assert (shown.status_code, shown.headers["content-type"]) == (200, "image/png")
    assert shown.headers["x-content-type-options"] == "nosniff"
    assert shown.content == kept.read_bytes()


def test_what_loading_the_page_asks_for_is_answered(page) -> None:
    events = page.get("/config").json()["dependencies"]
    number, root = next(
        (event["id"], part) for event in events for part, name in event["targets"] if name == "load"
    )
    event = {"fn_index": number, "data": [], "session_hash": "load", "trigger_id": root}
    done = [message for message in outcome(page, event) if message["msg"] == "process_completed"]
    assert [message["success"] for message in done] == [True]


def test_the_page_loads_what_it_names(page) -> None:
    html = page.get("/").text
    named = set(re.findall(r'(?:src|href)="(\./[^"]+|/[^"]+)"', html)) - {"./"}
    assert named
    for each in named:
        assert (page.get(each.removeprefix(".")).status_code, each) == (200, each)


def test_a_picture_that_is_brought_back_fills_the_form(page, studio, tmp_path) -> None:
    draft = tmp_path / "own.png"
    parameters = {"prompt": "a brought fox", "seed": 3}
    save_png(Image.new("RGB", (8, 8)), draft, parameters)
    files = {"files": ("own.png", draft.read_bytes())}
    (uploaded,) = page.post("/gradio_api/upload", files=files).json()
    (drafts,) = studio.temporary.glob(".tiue-export.work-*/drafts")
    assert Path(uploaded).is_relative_to(drafts.with_name("uploads"))
    event = event_of(page, "tiue-drop", "upload")
    event["data"] = [{"path": uploaded, "meta": {"_type": "gradio.FileData"}}]
    done = outcome(page, event)[-2:]
    assert "a brought fox" in json.dumps(done)


@pytest.mark.parametrize(
    ("headers", "status", "says"),
    [
        ({"Host": "evil.example"}, 400, "Host is 'evil.example'; expected an address or localhost"),
        ({"Origin": "http://evil.example"}, 403, "the page that asks is of 'http://evil.example'"),
        ({"Origin": "null"}, 403, "the page that asks is of 'null'"),
        ({"Origin": "http://127.0.0.1:1"}, 403, "the page that asks is of 'http://127.0.0.1:1'"),
    ],
)
def test_other_names_and_pages_of_other_origins_are_refused(page, headers, status, says) -> None:
    answer = page.get("/config", headers=headers)
    assert answer.status_code == status
    assert says in answer.json()["error"]["message"]
    assert not [name for name in answer.headers if name.startswith("access-control")]


def test_own_pages_are_answered_by_address_and_by_name(page) -> None:
    port = page.base_url.port
    for host in (f"127.0.0.1:{port}", f"localhost:{port}", f"[::1]:{port}", "192.168.0.7:7860"):
        headers = {"Host": host, "Origin": f"http://{host}"}
        assert page.get("/config", headers=headers).status_code == 200


def test_nothing_is_served_but_pictures_of_the_studio(page, studio, tmp_path) -> None:
    html = ("x.html", "<script>alert(document.domain)</script>")
    (uploaded,) = page.post("/gradio_api/upload", files={"files": html}).json()
    studio.kept.mkdir(exist_ok=True)
    secret = studio.kept / "notes.html"
    secret.write_text("of the user")
    (studio.kept / "link.png").symlink_to(secret)
    save_png(Image.new("RGB", (8, 8)), tmp_path / "elsewhere.png", {})
    paths = [uploaded, secret, secret.with_name("link.png"), tmp_path / "elsewhere.png"]
    paths += ["/etc/passwd", "http://127.0.0.1/a.png", "a.png", f"/{'a' * 5000}.png", "/%00.png"]
    for path in paths:
        answer = page.get(f"/gradio_api/file={path}")
        assert (answer.status_code, str(path)) == (403, str(path))
        assert "expected one of its PNG files" in answer.json()["error"]["message"]
    (disguised,) = page.post("/gradio_api/upload", files={"files": ("x.png", html[1])}).json()
    answer = page.get(f"/gradio_api/file={disguised}")
    assert answer.headers["content-type"] == "image/png"
    assert answer.headers["x-content-type-options"] == "nosniff"


def test_junk_is_refused_by_4xx_and_prints_nothing(page, studio) -> None:
    before = studio.printed.read_text()
    good = event_of(page, "tiue-prompt", "submit")
    chosen = event_of(page, "tiue-bundle", "input")
    picked = event_of(page, "tiue-history", "select")
    dropped = event_of(page, "tiue-drop", "upload")
    file = {"meta": {"_type": "gradio.FileData"}, "path": "/etc/passwd"}
    events = [
        *("", "x", "[1]", "{}", "[" * 100_000, '{"data": NaN}', "x" * (1 << 21)),
        {**good, "session_hash": None},
        {**good, "session_hash": "x" * 100},
        {**good, "fn_index": 999},
        {**good, "fn_index": [1]},
        {**good, "trigger_id": 999},
        {**good, "trigger_id": {}},
        {**good, "data": None},
        {**good, "data": []},
        {**good, "data": [{}, {}, {}, {}, {}, {}, {}]},
        {**good, "data": ["a", 0, 99, *good["data"][3:]]},
        {**good, "data": ["a", 0, 1, None, *good["data"][4:]]},
        {**chosen, "data": ["p"]},
        {**chosen, "data": [[]]},
        {**picked, "event_data": {}},
        {**picked, "event_data": {"index": "a", "value": 0}},
        {**dropped, "data": [file]},
        {**dropped, "data": [{**file, "path": 7}]},
    ]
    told = []
    for event in events:
        content = event if isinstance(event, str) else json.dumps(event)
        told.append(page.post("/gradio_api/queue/join", content=content, headers=JSON))
    for asked in ("call/event", "run/predict", "api/predict", "component_server", "stream/x"):
        told.append(page.post(f"/gradio_api/{asked}", json=good))
    told.append(page.post("/gradio_api/cancel", content='{"fn_index": 1e999}', headers=JSON))
    told.append(page.post("/gradio_api/upload", files={"files": (None, "no file")}))
    for kind in ("a/b", "multipart/form-data; boundary=xx"):
        told.append(page.post("/gradio_api/upload", content=b"x", headers={"Content-Type": kind}))
    told.append(page.get("/gradio_api/queue/data", params={"session_hash": "nobody"}))
    assert [answer.status_code for answer in told if not 400 <= answer.status_code < 500] == []
    # In order: what was asked after the junk is answered as before it.
    assert outcome(page, {**good, "data": ["", *good["data"][1:]]})[-1]
    assert studio.printed.read_text() == before


def test_a_studio_that_is_stopped_with_a_page_open_ends_in_one_line(tiny_bundle, tmp_path) -> None:
    with studio_of(tiny_bundle, tmp_path) as studio:
        before = studio.printed.read_text()
        with studio.client.stream("GET", "/gradio_api/heartbeat/a") as heartbeat:
            beats = heartbeat.iter_text()  # held: the connection closes with it
            assert next(beats)
            studio.process.send_signal(signal.SIGINT)
            assert studio.process.wait(20) == 0
    assert studio.printed.read_text().removeprefix(before) == "stopped\n"
    assert list(studio.temporary.glob(".tiue-export*")) == []


def test_a_reason_that_holds_for_every_bundle_is_said_once(tiny_bundle, bundle_copy, capfd) -> None:
    options = importlib.import_module("tiue_export.apps.options.studio").StudioOptions
    bundles = [tiny_bundle, open_bundle(bundle_copy)]
    found = choices.find_choices(bundles, ("ort", "openvino", "trt"), RuntimeOptions())
    with socket.create_server(("127.0.0.1", 0)) as listener:
        serving._announce(options(), found, listener)
    printed = capfd.readouterr().out
    for reason in {f"not {refusal.runtime}: {refusal.reason}" for refusal in found.refusals}:
        assert printed.replace("\n", " ").count(reason) == 1


def test_a_port_in_use_is_told_before_the_page_is_built(run, tiny_bundle):
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        code, _, error = run("studio", tiny_bundle.root, "--runtime", "ort", "--port", port)
    assert code == 10
    assert "Pass another --port; 0 takes any free one." in error


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--port", "70000"], "expected 0 to 65535"),
        (["--host", "no.such.host.invalid"], "is no address of this machine"),
    ],
)
def test_addresses_that_cannot_be_listened_on_are_explained(run, tiny_bundle, arguments, message):
    code, _, error = run("studio", tiny_bundle.root, "--runtime", "ort", *arguments)
    assert (code, message in error) == (2, True)


def test_without_a_bundle_the_studio_says_what_to_type(run):
    code, _, err = run("studio")
    assert (code, "tiue-export studio BUNDLE" in err) == (2, True)


def test_a_folder_that_is_no_bundle_ends_with_exit_code_6(run, tmp_path):
    assert run("studio", tmp_path)[0] == 6
