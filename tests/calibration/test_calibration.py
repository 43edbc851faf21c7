"""Calibration data: captured from real prompts, resumed after a kill, refused if unfit."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tiue_export.calibration import capture, histogram, observe
from tiue_export.drawing.pipeline import Pipeline
from tiue_export.errors import BundleError, ResourceError, RuntimeFailure, UsageError
from tiue_export.proof import calibration as dataset
from tiue_export.proof.calibration import shipped_prompts
from tiue_export.proof.quantization import RANGE_METHODS, RangeMethod
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.specs import UNET_DECODER, UNET_ENCODER

PROMPTS = ("a red fox", "an owl in a tree", "two boats", "a blue house", "a cat", "rain")


def options(count: int = 6, **changes):
    return dataset.CaptureOptions(prompts=PROMPTS, count=count, **changes)


@pytest.fixture(scope="module")
def data(tiny_bundle, tmp_path_factory):
    """Six captured runs. Shared: copy before changing."""
    return capture.capture(tiny_bundle, tmp_path_factory.mktemp("data") / "data", options())


@pytest.fixture
def own(data, tmp_path) -> Path:
    """Captured data of one's own."""
    return Path(shutil.copytree(data.root, tmp_path / "own"))


def test_a_run_holds_what_the_pipeline_feeds_the_decoder(data, tiny_bundle):
    with Pipeline.open(tiny_bundle) as pipeline:
        expected = pipeline("two boats", seed=2).pictures[0].latents
        (run,) = data.runs([2])
        feeds = tiny_bundle.spec(UNET_DECODER).select(run)
        latents = pipeline.runtime.run(UNET_DECODER, feeds)["latents"]
    np.testing.assert_array_equal(run["sample"], noise_from_seed(2, (1, 4, 8, 8)))
    np.testing.assert_allclose(latents[0], expected, atol=1e-4)


def test_the_index_says_from_what_it_was_captured_and_its_size_is_as_planned(data, tiny_bundle):
    index = data.index
    assert (index.wanted_runs, index.captured_runs, index.batch) == (6, 6, 1)
    assert index.prompts == PROMPTS
    assert index.prompts_sha256 == dataset.prompts_sha256(PROMPTS)
    assert index.graphs_sha256 == dataset.graphs_sha256(tiny_bundle)
    planned = 6 * dataset.run_bytes(tiny_bundle)
    assert planned < index.size_bytes < 1.1 * planned


def test_a_capture_that_stopped_goes_on_and_ends_with_the_same_data(data, tiny_bundle, tmp_path):
    runs = dataset.run_bytes(tiny_bundle)
    small = options(shard_bytes=2 * runs)

    def stop(done: int, wanted: int) -> None:
        if done == 5:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        capture.capture(tiny_bundle, tmp_path / "d", small, on_run=stop)
    assert dataset.read_index(tmp_path / "d").captured_runs == 4
    with pytest.raises(BundleError, match="is an unfinished capture: 4 of 6 runs") as caught:
        dataset.open_calibration(tmp_path / "d")
    assert "it goes on from there" in caught.value.next_step
    seen = []
    whole = capture.capture(tiny_bundle, tmp_path / "d", small, on_run=lambda d, w: seen.append(d))
    assert seen == [4, 5, 6]
    assert [shard.runs for shard in whole.index.shards] == [2, 2, 2]
    for mine, theirs in zip(whole.runs(), data.runs(), strict=True):
        assert all(np.array_equal(mine[name], theirs[name]) for name in theirs)


def test_a_killed_capture_leaves_whole_shards_only(tiny_bundle, tmp_path):
    out = tmp_path / "killed"
    code = (
        "import time\n"
        "from pathlib import Path\n"
        "from tiue_export.bundle.read import open_bundle\n"
        "from tiue_export.calibration import capture as c\n"
        f"o = c.CaptureOptions(prompts={PROMPTS!r}, count=6, shard_bytes=1)\n"
        f"c.capture(open_bundle({str(tiny_bundle.root)!r}), Path({str(out)!r}), o,"
        " on_run=lambda done, wanted: time.sleep(0.2))\n"
    )
    process = subprocess.Popen([sys.executable, "-c", code])
    deadline = time.monotonic() + 60
    while not list(out.glob("shard-*")) and time.monotonic() < deadline:
        time.sleep(0.02)
    process.send_signal(signal.SIGKILL)
    process.wait()
    stopped = dataset.read_index(out)
    assert stopped.captured_runs < 6
    dataset.verify_shards(out, stopped)
    finished = capture.capture(tiny_bundle, out, options(shard_bytes=1))
    assert finished.index.captured_runs == 6
    assert not list(out.glob(".*"))


def test_more_prompts_are_added_to_what_is_there(tiny_bundle, tmp_path):
    capture.capture(tiny_bundle, tmp_path / "d", options(2))
    seen = []
    grown = capture.capture(
        tiny_bundle, tmp_path / "d", options(3), on_run=lambda d, w: seen.append(d)
    )
    assert seen == [2, 3]
    assert grown.index.prompts == PROMPTS[:3]


def test_other_data_in_the_way_are_named_and_replaced_only_by_force(own, tiny_bundle):
    with pytest.raises(BundleError, match="holds calibration data of seed 0, not 7"):
        capture.capture(tiny_bundle, own, options(seed=7))
    with pytest.raises(BundleError, match="holds calibration data of other prompts"):
        capture.capture(tiny_bundle, own, dataset.CaptureOptions(prompts=("x",), count=1))
    replaced = capture.capture(tiny_bundle, own, options(1, seed=7), force=True)
    assert replaced.index.captured_runs == 1
    assert sorted(path.name for path in own.iterdir()) == ["calibration.json", *_shards(replaced)]


def _shards(data) -> list[str]:
    return [shard.file for shard in data.index.shards]


def test_a_folder_that_is_no_calibration_is_never_replaced(tiny_bundle, tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "thesis.txt").write_text("mine")
    with pytest.raises(BundleError, match="is no calibration folder; it is never replaced"):
        capture.capture(tiny_bundle, tmp_path / "d", options(), force=True)


def test_data_of_another_student_are_refused(data, tiny_bundle):
    source = replace(tiny_bundle.manifest.source, sha256="0" * 64)
    other = replace(tiny_bundle, manifest=replace(tiny_bundle.manifest, source=source))
    with pytest.raises(UsageError, match="was captured from another student") as caught:
        dataset.open_calibration(data.root, other)
    assert caught.value.next_step.startswith("Capture from this one: tiue-export calibrate")


def test_a_flipped_bit_and_a_missing_shard_are_named(own, tiny_bundle):
    shard = own / "shard-00000.safetensors"
    content = bytearray(shard.read_bytes())
    content[-1] ^= 1
    shard.write_bytes(content)
    with pytest.raises(BundleError, match=r"shard-00000\.safetensors was altered"):
        dataset.open_calibration(own, tiny_bundle)
    shard.unlink()
    with pytest.raises(BundleError, match=r"shard-00000\.safetensors is missing"):
        dataset.open_calibration(own, tiny_bundle)


def test_an_index_of_another_version_or_with_a_wrong_field_is_refused(own):
    index = json.loads((own / "calibration.json").read_text())
    (own / "calibration.json").write_text(json.dumps({**index, "format_version": 9}))
    with pytest.raises(BundleError, match="has format version 9; this program reads 1"):
        dataset.open_calibration(own)
    (own / "calibration.json").write_text(json.dumps({**index, "seed": "one"}))
    with pytest.raises(BundleError, match="seed is 'one'; expected int"):
        dataset.open_calibration(own)
    (own / "calibration.json").write_text(json.dumps({**index, "batch": 0}))
    with pytest.raises(BundleError, match="batch is 0; expected 1 or more"):
        dataset.open_calibration(own)
    (own / "calibration.json").write_text(json.dumps({**index, "passes": 0}))
    with pytest.raises(BundleError, match="passes is 0; expected 1 or more"):
        dataset.open_calibration(own)
    shards = [{**index["shards"][0], "file": "/etc/passwd"}]
    (own / "calibration.json").write_text(json.dumps({**index, "shards": shards}))
    with pytest.raises(BundleError, match="names '/etc/passwd' as a shard; expected a file beside"):
        dataset.open_calibration(own)


def test_a_full_disk_keeps_what_was_captured_and_says_how_to_go_on(
    tiny_bundle, tmp_path, monkeypatch
):
    disk = tmp_path / "disk"
    disk.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=96k", "tmpfs", str(disk)], capture_output=True
    )
    if mounted.returncode:
        pytest.skip("mounting a small tmpfs needs root")
    small = options(shard_bytes=1)
    try:
        with pytest.raises(ResourceError, match="the capture needs 0 MB more; the disk of") as soon:
            capture.capture(tiny_bundle, disk / "d", small)
        assert "a smaller --count" in soon.value.next_step
        monkeypatch.setattr(capture, "_check_space", lambda root, needed: None)
        with pytest.raises(ResourceError, match=r"is full after \d of 6 runs; those are kept"):
            capture.capture(tiny_bundle, disk / "d", small)
        index = dataset.read_index(disk / "d")
        assert 0 < index.captured_runs < 6
        dataset.verify_shards(disk / "d", index)
        subprocess.run(["mount", "-o", "remount,size=1m", str(disk)], check=True)
        assert capture.capture(tiny_bundle, disk / "d", small).index.captured_runs == 6
    finally:
        subprocess.run(["umount", str(disk)], check=True)


@pytest.mark.parametrize(
    ("content", "arguments", "message"),
    [
        (b"", [], "holds no prompt"),
        (b"\xff\xfe\x00\x01", [], "cannot be read"),
        (b"a\x00b\n", [], "holds control characters: the file is no text"),
        (b"a fox\n", ["--count", "2"], "--count is 2; expected 1 to 1, the number of prompts"),
        (b"a fox\n", ["--count", "0"], "--count is 0; expected 1 to 1"),
    ],
)
def test_prompts_that_cannot_be_used_are_refused_before_any_work(
    run, tiny_bundle, tmp_path, content, arguments, message
):
    (tmp_path / "p.txt").write_bytes(content)
    code, _, err = run(
        "calibrate", tiny_bundle.root, "--prompts", "p.txt", "--out", "d", *arguments
    )
    assert code == UsageError.exit_code
    assert message in err
    assert not (tmp_path / "d").exists()


def test_the_command_captures_resumes_for_free_and_prints_json(run, tiny_bundle, tmp_path):
    (tmp_path / "p.tsv").write_text("Prompt\tKind\na fox\tx\nan owl\ty\n")
    line = ("calibrate", tiny_bundle.root, "--prompts", "p.tsv", "--out", "d", "--json")
    code, out, _ = run(*line, "--dry-run")
    assert (code, json.loads(out)["runs"], (tmp_path / "d").exists()) == (0, 2, False)
    code, out, _ = run(*line)
    first = json.loads(out)
    assert (code, first["runs"], first["shards"]) == (0, 2, 1)
    assert run(*line)[0] == 0
    assert dataset.open_calibration(tmp_path / "d", tiny_bundle).sha256 == first["sha256"]


def test_a_column_without_prompts_is_refused(run, tiny_bundle):
    code, _, err = run("calibrate", tiny_bundle.root, "--column", "text")
    assert (code, "--column names a field of --prompts" in err) == (2, True)


def test_the_shipped_prompts_are_a_few_hundred_different_printable_lines():
    prompts = shipped_prompts()
    assert 200 <= len(prompts) == len(set(prompts))
    assert all(prompt.isprintable() and 8 < len(prompt) < 160 for prompt in prompts)


def test_a_last_run_that_was_filled_up_is_captured_anew_when_prompts_are_added(tiny_bundle):
    def index(count: int):
        fresh = dataset.new_index(tiny_bundle, PROMPTS[:count], 0, "ort")
        return replace(fresh, batch=2)

    record = dataset.FileRecord(1, "0" * 64)
    shards = tuple(dataset.Shard(f"s{i}", i, 1, record) for i in range(2))
    three = replace(index(3), shards=shards, tensors={"sample": (2, 4, 8, 8)})
    assert (three.wanted_runs, three.captured_runs) == (2, 2)
    assert capture._continued(three, index(3)).shards == shards
    assert capture._continued(three, index(4)).shards == shards[:1]
    four = replace(three, prompts=PROMPTS[:4])
    assert capture._continued(four, index(6)).shards == shards
    assert capture._continued(four, index(2)) is None


# Ranges


def test_statistics_inside_the_graph_are_those_of_the_tensors_themselves(data, tiny_bundle):
    path = tiny_bundle.graph_path(UNET_ENCODER)
    shape = tiny_bundle.spec(UNET_ENCODER).inputs[0].shape
    tensor = observe.Watched("sample", tuple(map(int, shape)), 1)
    halved = replace(tensor, divide=np.full(4, 2.0))
    runs = list(data.runs())
    values = np.abs(np.concatenate([run["sample"] for run in runs]))  # (6, 4, 8, 8)
    (found,) = observe.observe(path, [tensor], runs).values()
    np.testing.assert_allclose(found.channels, values.max((0, 2, 3)))
    assert found.histogram.counts.sum() == values.size
    (small,) = observe.observe(path, [halved], runs).values()
    np.testing.assert_allclose(small.channels, values.max((0, 2, 3)) / 2)


def test_a_non_finite_activation_is_named(data, tiny_bundle):
    (run,) = data.runs([0])
    broken = {**run, "sample": np.full_like(run["sample"], np.inf)}
    tensor = observe.Watched("sample", run["sample"].shape, 1)
    with pytest.raises(RuntimeFailure, match="sample holds non-finite values"):
        observe.observe(tiny_bundle.graph_path(UNET_ENCODER), [tensor], [broken])


def test_large_tensors_are_sampled_evenly_over_rows_and_channels():
    watched = observe.Watched("x", (4, 320, 64, 64), 1)
    step = observe._stride(watched)
    index = np.arange(0, 4 * 320 * 64 * 64, step)
    channels = np.bincount(index // (64 * 64) % 320, minlength=320)
    assert len(index) <= observe.SAMPLE
    assert channels.min() > 0.8 * channels.mean()


@settings(max_examples=60, deadline=None)
@given(st.lists(st.lists(st.floats(-1e4, 1e4, width=32), min_size=1, max_size=50), min_size=1))
def test_a_histogram_that_grows_loses_no_value_and_knows_the_largest(batches):
    found = histogram.Histogram()
    for batch in batches:
        found.add(np.array(batch))
    flat = np.abs(np.concatenate([np.array(batch) for batch in batches]))
    assert found.counts.sum() == flat.size
    assert found.largest == flat.max()
    assert found.threshold(RangeMethod("min-max")) == flat.max()
    everything = found.threshold(RangeMethod("percentile", 100))
    assert everything <= flat.max()
    half = found.threshold(RangeMethod("percentile", 50))
    assert half <= everything
    # Exact to one bin.
    assert np.mean(flat <= half + found.width) >= 0.5


def test_entropy_clips_a_lone_outlier_and_keeps_a_flat_distribution():
    random = np.random.RandomState(0)
    peaked, flat = histogram.Histogram(), histogram.Histogram()
    peaked.add(np.append(random.standard_normal(200_000), 40.0))
    flat.add(random.uniform(-1, 1, 200_000))
    method = RangeMethod("entropy")
    assert 2.5 < peaked.threshold(method) < 12
    assert flat.threshold(method) > 0.95


def test_a_tensor_of_zeros_has_a_range_of_zero():
    empty = histogram.Histogram()
    empty.add(np.zeros(10))
    assert {empty.threshold(RangeMethod(name)) for name in RANGE_METHODS} == {0.0}


def test_unknown_methods_and_percentiles_are_refused():
    with pytest.raises(UsageError, match="unknown range method 'max'; there are: entropy, min-max"):
        RangeMethod("max")
    with pytest.raises(UsageError, match="--percentile is 20; expected 50 to 100"):
        RangeMethod("percentile", 20)


def test_memory_of_a_capture_does_not_grow_with_the_number_of_prompts(tiny_bundle, tmp_path):
    """Two shards of one run each, and never more than one run's tensors alive."""
    held = []
    original = dataset.write_shard

    def counted(root, index, runs):
        held.append(len(runs))
        return original(root, index, runs)

    capture_module = sys.modules[capture.__name__]
    capture_module.write_shard = counted
    try:
        capture.capture(tiny_bundle, tmp_path / "d", options(4, shard_bytes=1))
    finally:
        capture_module.write_shard = original
    assert held == [1, 1, 1, 1]
    assert os.path.getsize(tmp_path / "d" / "shard-00003.safetensors") < 2 * dataset.run_bytes(
        tiny_bundle
    )
