"""Bulk runs: tables of prompts, shards, workers, kills, and what goes on after them."""

from __future__ import annotations

import importlib
import io
import json
import os
import re
import signal
import subprocess
import sys
import tarfile
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image

from tiue_export import Pipeline, RuntimeOptions
from tiue_export.drawing.picture import METADATA_KEY, parameters_from_png
from tiue_export.drawing.pipeline import Job
from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.system.install import install_line
from tiue_export.system.lock import sole_process

BULK = "tiue_export.apps.draw.bulk"
plan_module = importlib.import_module(f"{BULK}.plan")
table_module = importlib.import_module(f"{BULK}.prompt_table")
prompts_in = importlib.import_module("tiue_export.apps.draw.prompt_file").prompts_in
drawing = importlib.import_module(f"{BULK}.drawing")
progress = importlib.import_module(f"{BULK}.progress")
png_folder = importlib.import_module(f"{BULK}.png_folder")
ray_pool = importlib.import_module(f"{BULK}.ray_pool")
tar_shards = importlib.import_module(f"{BULK}.tar_shards")
BulkPlan, TableJob = plan_module.BulkPlan, plan_module.TableJob
read_rows, PromptRow = table_module.read_rows, table_module.PromptRow


def jobs_named(count: int) -> tuple:
    return tuple(TableJob(f"k{i:03d}", Job(f"thing {i}", i)) for i in range(count))


def samples_of(jobs) -> list:
    """Files of a picture's shape without a picture."""
    end = b"\0\0\0\0IEND\xaeB`\x82"
    return [
        drawing.Sample(
            each.key, bytes(100 + each.job.seed * 37) + end, each.job.prompt, f'{{"{each.key}": 1}}'
        )
        for each in jobs
    ]


def table(folder: Path, count: int) -> Path:
    """A table of `count` prompts with ids and a column of its own."""
    path = folder / "prompts.tsv"
    rows = [f"c{i:03d}\ta picture of thing {i}\tkind {i % 3}" for i in range(count)]
    path.write_text("\n".join(["id\tPrompt\tkind", *rows]) + "\n", "utf-8")
    return path


def tar_files(folder: Path) -> dict[str, bytes]:
    return {path.name: path.read_bytes() for path in sorted(folder.glob("*.tar"))}


def members(folder: Path) -> list[str]:
    names = []
    for path in sorted(folder.glob("*.tar")):
        with tarfile.open(path) as tar:
            names += tar.getnames()
    return names


def test_a_tsv_has_a_header_in_any_case_and_no_quoting(tmp_path: Path) -> None:
    path = tmp_path / "p.tsv"
    path.write_bytes('\ufeffID\tPrompt\tNote\r\na1\tsay "hi"\tx\r\na2\tzwei\t\r\n\n'.encode())
    assert read_rows(path) == [
        PromptRow("a1", 'say "hi"', None, {"Note": "x"}),
        PromptRow("a2", "zwei", None, {"Note": ""}),
    ]


def test_jsonl_and_parquet_give_the_same_rows_as_tsv(tmp_path: Path) -> None:
    import pyarrow
    import pyarrow.parquet

    records = [{"caption": f"thing {i}", "seed": 10 * i, "kind": f"k{i}"} for i in range(3)]
    (tmp_path / "p.jsonl").write_text("\n".join(map(json.dumps, records)) + "\n\n")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(records), tmp_path / "p.parquet")
    lines = ["caption\tseed\tkind", *("\t".join(map(str, r.values())) for r in records)]
    (tmp_path / "p.tsv").write_text("\n".join(lines))
    expected = [PromptRow(f"{i:09d}", f"thing {i}", 10 * i, {"kind": f"k{i}"}) for i in range(3)]
    for name in ("p.tsv", "p.jsonl", "p.parquet"):
        assert read_rows(tmp_path / name, "caption") == expected


def test_a_csv_has_a_header_and_quotes_its_cells(tmp_path: Path) -> None:
    path = tmp_path / "p.CSV"
    path.write_bytes(
        b'\xef\xbb\xbfId,Prompt,note\r\na1,"a ""red"" fox, asleep",x\r\n\r\nb2,"two\nlines",\r\n'
    )
    assert read_rows(path) == [
        PromptRow("a1", 'a "red" fox, asleep', None, {"note": "x"}),
        PromptRow("b2", "two\nlines", None, {"note": ""}),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("p.csv", "prompt\na fox\n"),
        ("p.tsv", "prompt\na fox\n"),
        ("p.jsonl", '{"prompt": "a fox"}\n'),
        ("p.txt", "a fox\n"),
    ],
)
def test_the_header_of_a_table_is_a_prompt_nowhere(name: str, text: str, tmp_path: Path) -> None:
    (tmp_path / name).write_text(text)
    assert prompts_in(tmp_path / name) == ["a fox"]
    assert [row.prompt for row in read_rows(tmp_path / name)] == ["a fox"]


def test_a_text_file_has_a_prompt_a_line(tmp_path: Path) -> None:
    (tmp_path / "p.txt").write_text("a fox\n\nan owl\n")
    rows = read_rows(tmp_path / "p.txt")
    assert [(row.key, row.prompt) for row in rows] == [
        ("000000000", "a fox"),
        ("000000001", "an owl"),
    ]


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("p.tsv", "caption\na fox\n", "no column 'prompt'; there are: caption"),
        ("p.tsv", "prompt\tid\na fox\n", "line 2 has 1 cells; the header has 2"),
        ("p.tsv", "prompt\tid\n \tx\n", "line 2: prompt is ' '; expected a text"),
        ("p.tsv", "prompt\tid\na\t../x\n", "id is '../x'; expected 1 to 80 letters"),
        ("p.tsv", "prompt\tid\na\tx\nb\tx\n", "line 3: the id 'x' was used before, in"),
        ("p.tsv", "prompt\tseed\na\t-1\n", "seed is '-1'; expected a whole number"),
        ("p.tsv", "prompt\n", "holds no prompt"),
        ("p.tsv", b"prompt\n\xff\n", "cannot be read"),
        ("p.csv", 'prompt,id\n"a fox', "cannot be read: unexpected end of data"),
        ("p.csv", "prompt,id\na fox\n", "line 2 has 1 cells; the header has 2"),
        ("p.txt", "\n \n", "holds no prompt"),
        ("p.jsonl", "{", "line 1 is not JSON"),
        ("p.jsonl", '{"prompt": "a"}\n["b"]\n', "line 2 is ['b']; expected an object"),
        ("p.jsonl", '{"prompt": null}', "prompt is None; expected a text"),
        ("p.jsonl", '{"prompt": "a", "seed": 1.5}', "seed is 1.5; expected a whole number"),
        ("p.parquet", "PAR1", "is no Parquet file"),
        ("missing.jsonl", None, "cannot be read"),
    ],
)
def test_a_table_that_cannot_be_drawn_is_told_with_its_line(tmp_path, name, content, says) -> None:
    if content is not None:
        data = content if isinstance(content, bytes) else content.encode()
        (tmp_path / name).write_bytes(data)
    with pytest.raises(UsageError, match=re.escape(says)):
        read_rows(tmp_path / name)


def test_each_picture_of_a_table_has_a_seed_of_its_own() -> None:
    rows = [PromptRow("a", "x"), PromptRow("b", "y", 100), PromptRow("c", "z")]
    jobs = plan_module.plan_jobs(rows, count=2, seed=5)
    assert [(each.key, each.job.seed) for each in jobs] == [
        ("a-0", 5),
        ("a-1", 6),
        ("b-0", 100),
        ("b-1", 101),
        ("c-0", 9),
        ("c-1", 10),
    ]


@pytest.mark.parametrize(
    ("rows", "count", "seed", "says"),
    [
        ([PromptRow("a", "x")], 0, 0, "--count is 0"),
        ([PromptRow("a", "x", 2**32)], 1, 0, "would need seed 4294967296"),
        ([PromptRow("a", "x"), PromptRow("b", "y")], 1, 2**32 - 1, "row 2 would need seed"),
        ([PromptRow("a", "x"), PromptRow("A", "y")], 1, 0, "two pictures would be named 'A'"),
    ],
)
def test_a_plan_that_cannot_be_kept_is_refused(rows, count, seed, says) -> None:
    with pytest.raises(UsageError, match=re.escape(says)):
        plan_module.plan_jobs(rows, count, seed)


@given(count=st.integers(1, 60), chunk=st.integers(1, 9), shard=st.integers(1, 25))
def test_chunks_hold_every_job_once_in_order_and_stay_within_their_shard(
    count: int, chunk: int, shard: int
) -> None:
    plan = BulkPlan(jobs_named(count), chunk, shard)
    chunks = list(plan.chunks())
    assert tuple(job for part in chunks for job in part.jobs) == plan.jobs
    assert [part.index for part in chunks] == list(range(len(chunks)))
    shards = plan.shards()
    for part in chunks:
        assert 1 <= len(part.jobs) <= chunk
        assert all(job in shards[part.shard] for job in part.jobs)


@settings(deadline=None, max_examples=40)
@given(data=st.data())
def test_shards_cut_anywhere_by_a_kill_end_as_if_there_was_none(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    plan = BulkPlan(jobs_named(data.draw(st.integers(1, 20))), 3, data.draw(st.integers(1, 9)))
    chunks = list(plan.chunks())
    whole, cut = tmp_path_factory.mktemp("whole"), tmp_path_factory.mktemp("cut")
    writer = tar_shards.TarShards(whole, plan)
    for chunk in chunks:
        writer.write(chunk, samples_of(chunk.jobs))
    writer.finish()
    done = data.draw(st.integers(0, len(chunks)))
    killed = tar_shards.TarShards(cut, plan)
    for chunk in chunks[:done]:
        killed.write(chunk, samples_of(chunk.jobs))
    killed.close()
    for partial in cut.glob(".*.partial"):
        os.truncate(partial, data.draw(st.integers(0, partial.stat().st_size)))
    resumed = tar_shards.TarShards(cut, plan)
    written = resumed.written()
    assert written <= {chunk.index for chunk in chunks[:done]}
    for chunk in chunks:
        if chunk.index not in written:
            resumed.write(chunk, samples_of(chunk.jobs))
    resumed.finish()
    assert tar_files(cut) == tar_files(whole)
    assert list(cut.glob(".*")) == []
    assert members(cut) == [f"{j.key}{s}" for j in plan.jobs for s in (".png", ".txt", ".json")]


def test_a_shard_that_was_changed_is_told_and_not_drawn_over(tmp_path: Path) -> None:
    plan = BulkPlan(jobs_named(4), 2, 2)
    writer = tar_shards.TarShards(tmp_path, plan)
    for chunk in plan.chunks():
        writer.write(chunk, samples_of(chunk.jobs))
    os.truncate(tmp_path / "pictures-000001.tar", 700)
    with pytest.raises(RuntimeFailure, match=r"pictures-000001.tar holds 0 of its 2 pictures"):
        tar_shards.TarShards(tmp_path, plan).written()


def test_a_picture_that_is_there_in_part_is_drawn_again(tmp_path: Path) -> None:
    plan = BulkPlan(jobs_named(6), 2, 100)
    writer = png_folder.PngFolder(tmp_path, plan)
    chunks = list(plan.chunks())
    for chunk in chunks:
        writer.write(chunk, samples_of(chunk.jobs))
    (tmp_path / "k001.png").write_bytes(b"")  # as after a power cut
    (tmp_path / "k002.png").unlink()
    (tmp_path / ".k002.png.partial").write_bytes(b"x")
    resumed = png_folder.PngFolder(tmp_path, plan)
    assert resumed.written() == {2}
    with pytest.raises(RuntimeFailure, match=r"should hold 6 pictures and holds 5; k002.png is mi"):
        resumed.finish()
    for chunk in chunks[:2]:
        resumed.write(chunk, samples_of(chunk.jobs))
    resumed.finish()
    lines = [json.loads(line) for line in (tmp_path / "metadata.jsonl").read_text().splitlines()]
    assert lines[1] == {"file_name": "k001.png", "prompt": "thing 1", "seed": 1}
    assert len(list(tmp_path.glob("*.png"))) == len(lines) == 6
    assert list(tmp_path.glob(".*")) == []


def test_the_pace_counts_only_what_this_run_drew() -> None:
    now = [0.0]
    pace = progress.Pace(total=100, found=40, clock=lambda: now[0])
    assert (pace.pictures_per_s, pace.remaining_s) == (0.0, None)
    now[0] = 10.0
    pace.add(20)
    assert (pace.pictures_per_s, pace.remaining_s) == (2.0, 20.0)
    assert pace.line() == "60/100 pictures, 2.00 images/s, 20 s left"
    assert [progress.duration(s) for s in (41, 200, 7500)] == ["41 s", "3 min 20 s", "2 h 05 min"]


@pytest.fixture(scope="module")
def unbroken(tiny_bundle, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Eighty pictures in six shards, drawn by one worker without a break. Shared."""
    folder = tmp_path_factory.mktemp("unbroken")
    process = bulk(tiny_bundle.root, folder, "one")
    error = process.communicate()[1]
    assert process.returncode == 0, error
    return folder / "one"


def bulk(bundle: Path, folder: Path, out: str, *arguments: str, count: int = 80):
    """Start a bulk run in a process of its own."""
    return subprocess.Popen(
        [
            *(sys.executable, "-m", "tiue_export", "generate", str(bundle)),
            *("--prompts", str(table(folder, count)), "--out", str(folder / out)),
            *("--format", "tar", "--shard-size", "15", "--threads", "1", *arguments),
        ],
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )


def test_a_shard_holds_pictures_prompts_and_parameters(unbroken: Path, tiny_bundle) -> None:
    with tarfile.open(unbroken / "pictures-000001.tar") as tar:
        files = {name: tar.extractfile(name).read() for name in tar.getnames()}
    assert files["c017.txt"] == b"a picture of thing 17"
    record = json.loads(files["c017.json"])
    assert (record["key"], record["seed"], record["columns"]) == ("c017", 17, {"kind": "kind 2"})
    image = Image.open(io.BytesIO(files["c017.png"]))
    assert json.loads(image.text[METADATA_KEY])["columns"] == {"kind": "kind 2"}
    with Pipeline.open(tiny_bundle, "ort", RuntimeOptions(threads=1)) as pipeline:
        expected = pipeline("a picture of thing 17", seed=17).images[0]
    assert np.array_equal(image, expected)


def test_killed_three_times_and_resumed_nothing_is_missing_or_doubled(
    unbroken: Path, tiny_bundle, tmp_path: Path
) -> None:
    found = [0]
    for _ in range(3):
        process = bulk(tiny_bundle.root, tmp_path, "killed")
        wait_for_more(tmp_path / "killed", found[-1], process)
        process.send_signal(signal.SIGKILL)
        process.communicate()
        found.append(len(whole_members(tmp_path / "killed")))
    assert 0 < found[1] < found[2] < found[3] < 80 * 3
    process = bulk(tiny_bundle.root, tmp_path, "killed")
    assert "going on: " in process.communicate()[1]
    assert process.returncode == 0
    assert tar_files(tmp_path / "killed") == tar_files(unbroken)
    names = members(tmp_path / "killed")
    assert len(names) == len(set(names)) == 80 * 3


def wait_for_more(folder: Path, than: int, process) -> None:
    """Wait until the run has written more than it found."""
    end = time.monotonic() + 60
    while len(whole_members(folder)) <= than:
        assert process.poll() is None, process.stderr.read()
        assert time.monotonic() < end
        time.sleep(0.01)


def whole_members(folder: Path) -> list[str]:
    """Names in finished and unfinished shards."""
    names = []
    for path in [*folder.glob("*.tar"), *folder.glob(".*.tar.partial")]:
        try:
            with tarfile.open(path, "r:") as tar:
                for member in tar:
                    names.append(member.name)
        except (tarfile.ReadError, FileNotFoundError):
            continue
    return names


def test_two_workers_draw_the_same_bytes_and_die_with_their_parent(
    unbroken: Path, tiny_bundle, tmp_path: Path
) -> None:
    process = bulk(tiny_bundle.root, tmp_path, "two", "--workers", "2")
    wait_for_more(tmp_path / "two", 0, process)
    children = [
        int(pid)
        for pid in Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    ]
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert children
    end = time.monotonic() + 20
    while any(running(pid) for pid in children):
        assert time.monotonic() < end
        time.sleep(0.05)
    process = bulk(tiny_bundle.root, tmp_path, "two", "--workers", "2")
    process.communicate()
    assert process.returncode == 0
    assert tar_files(tmp_path / "two") == tar_files(unbroken)


def running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.slow
def test_two_actors_of_ray_draw_the_same_bytes(unbroken: Path, tiny_bundle, tmp_path: Path) -> None:
    process = bulk(tiny_bundle.root, tmp_path, "ray", "--ray", "--workers", "2")
    error = process.communicate()[1]
    assert process.returncode == 0, error
    assert tar_files(tmp_path / "ray") == tar_files(unbroken)


def test_a_cluster_without_room_is_told_instead_of_waited_for() -> None:
    with pytest.raises(UsageError, match=r"3 workers need 6 CPUs; the Ray cluster has 4") as told:
        ray_pool._check_room({"CPU": 4.0}, workers=3, cpus=2.0, gpus=0.0)
    assert told.value.next_step == "Pass --workers 2, or fewer --threads."
    with pytest.raises(UsageError, match="1 workers need 1 GPUs; the Ray cluster has 0"):
        ray_pool._check_room({"CPU": 4.0}, workers=1, cpus=1.0, gpus=1.0)


def test_png_files_carry_their_parameters_and_a_second_run_finds_them(
    run, tiny_bundle, tmp_path
) -> None:
    arguments = ["generate", tiny_bundle.root, "--prompts", table(tmp_path, 3), "--count", 2]
    code, out, _ = run(*arguments, "--json")
    assert code == 0
    told = json.loads(out)
    assert (told["pictures"], told["drawn"], told["found"]) == (6, 6, 0)
    parameters = parameters_from_png(tmp_path / "pictures" / "c001-1.png")
    assert (parameters["prompt"], parameters["seed"]) == ("a picture of thing 1", 3)
    told = json.loads(run(*arguments, "--json")[1])
    assert (told["drawn"], told["found"]) == (0, 6)
    code, out, error = run(*arguments)
    assert "6 pictures in pictures, none missing, none twice: 0 drawn" in out
    assert "going on: 6 of 6 pictures are there" in error


def test_a_run_that_draws_something_else_is_not_mixed_in(run, tiny_bundle, tmp_path) -> None:
    arguments = ["generate", tiny_bundle.root, "--prompts", table(tmp_path, 2)]
    assert run(*arguments)[0] == 0
    for other, says in (
        (["--seed", "1"], "other prompts, ids, seeds, guidance or shard sizes"),
        (["--format", "tar"], "format 'png' instead of 'tar'"),
        (["--runtime", "openvino"], "runtime 'ort' instead of 'openvino'"),
    ):
        code, _, error = run(*arguments, *other)
        assert code == 2
        assert f"pictures holds a run with {says}" in error


def test_guidance_and_a_negative_prompt_hold_for_the_whole_table(
    run, faster_bundle, tiny_bundle, tmp_path
) -> None:
    steering = ("--guidance", "2", "--negative", "blue")
    arguments = ["generate", faster_bundle.root, "--prompts", table(tmp_path, 2)]
    code, _, error = run(*arguments, *steering)
    assert code == 0, error
    code, _, error = run(*arguments, "--guidance", "3", "--negative", "blue")
    assert (code, "other prompts, ids, seeds, guidance" in error) == (2, True)
    with Pipeline.open(faster_bundle) as pipeline:
        how = {"guidance": 2.0, "negative_prompt": "blue"}
        prompts = [f"a picture of thing {i}" for i in range(2)]
        alone = [pipeline(text, seed=i, **how).images[0] for i, text in enumerate(prompts)]
    for number, expected in enumerate(alone):
        file = tmp_path / "pictures" / f"c{number:03d}.png"
        assert np.array_equal(np.asarray(Image.open(file)), np.asarray(expected))
        written = parameters_from_png(file)
        assert (written["guidance"], written["negative_prompt"]) == (2.0, "blue")
    student = ["generate", tiny_bundle.root, "--prompts", table(tmp_path, 2), "--out", "other"]
    for option, value, named in (
        ("--guidance", "2", "guidance"),
        ("--negative", "blue", "negative prompt"),
    ):
        code, _, error = run(*student, option, value)
        assert (code, f"it takes no {named}, its guidance is part of" in error) == (2, True)


def test_a_second_run_into_the_same_folder_hears_at_once_whose_it_is(
    run, tiny_bundle, tmp_path
) -> None:
    (tmp_path / "pictures").mkdir()
    with sole_process(tmp_path / "pictures" / ".lock", "drawing"):
        code, _, error = run("generate", tiny_bundle.root, "--prompts", table(tmp_path, 2))
    assert code == 2
    assert f", process {os.getpid()} on " in error
    assert " is drawing into pictures at this moment" in error
    assert "next: Wait until it has ended, or choose another output." in error


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--force"], "in bulk takes no --force"),
        (["--sheet", "s.png", "--time"], "in bulk takes no --sheet and no --time"),
        (["a fox"], "in bulk takes no PROMPTS"),
        (["--steps", "4"], "in bulk takes no --steps"),
        (["--out", "x.png"], "--out x.png is one file"),
        (["--out", "used"], "used holds notes.txt and is no bulk run's folder"),
        (["--out", "prompts.tsv"], "--out prompts.tsv is a file"),
        (["--shard-size", "5"], "--shard-size is for --format tar"),
        (["--format", "zip"], "unknown format 'zip'; there are: png, tar"),
        (["--workers", "0"], "--workers is 0; expected 1 or more"),
        (["--format", "tar", "--shard-size", "0"], "--shard-size is 0; expected 1 or more"),
    ],
)
def test_options_that_a_bulk_run_would_not_honour_are_refused(
    run, tiny_bundle, tmp_path, arguments, says
) -> None:
    table(tmp_path, 2)
    (tmp_path / "used").mkdir()
    (tmp_path / "used" / "notes.txt").write_text("mine")
    code, _, error = run("generate", tiny_bundle.root, "--prompts", "prompts.tsv", *arguments)
    assert code == 2
    assert says in error


def test_an_option_of_bulk_runs_needs_a_file_of_prompts(run, tiny_bundle) -> None:
    code, _, error = run("generate", tiny_bundle.root, "a fox", "--workers", "2")
    assert code == 2
    assert "Add --prompts prompts.tsv" in error


def test_without_ray_its_extra_is_named(run, tiny_bundle, tmp_path, monkeypatch) -> None:
    registry = importlib.import_module("tiue_export.registry.packages")
    monkeypatch.setattr(registry, "_found", lambda name: name != "ray")
    code, _, error = run("generate", tiny_bundle.root, "--prompts", table(tmp_path, 2), "--ray")
    assert code == 8
    assert "--ray needs ray, which is not installed" in error
    assert install_line("ray") in error
