"""What the documents say to type is typed, in their order, in one folder."""

from __future__ import annotations

import re
import shlex
import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
from next_lines import refused
from test_docs import DOCUMENTS, FENCE, invocations, read

# They wait for a browser, a terminal or minutes of a quiet machine.
NOT_RUN = ("studio", "serve", "bench", "init", "doctor")
PLACEHOLDER = re.compile(r"[A-Z.…]+|\[.*|\d.*|--?\w.*|")


def commands(document: str) -> Iterator[list[str]]:
    """The words of each `tiue-export` in the blocks of a document."""
    for block in FENCE.finditer(read(document)):
        yield from invocations(f"```\n{block.group(2)}\n```")


@pytest.mark.parametrize("document", DOCUMENTS)
def test_the_program_takes_every_command_of_a_document(document: str) -> None:
    lines = [shlex.join(["tiue-export", *words]) for words in commands(document) if words]
    typed = [line for line in lines if not PLACEHOLDER.fullmatch(shlex.split(line)[1])]
    assert [problem for line in typed for problem in refused(line)] == []


@pytest.fixture
def folder(tmp_path, tiny_pipeline) -> Path:
    """Where a reader types: a student in a file, and the pipeline that it was distilled from."""
    from tiue_export.benchmarks.synthetic import write_ldm_file

    write_ldm_file(tiny_pipeline, tmp_path / "student.safetensors")
    shutil.copytree(tiny_pipeline, tmp_path / "sd21-base")
    return tmp_path


def test_the_readme_and_the_quickstart_work_as_typed(run, folder, demo_run, tiny_bundle) -> None:
    """An export is planned, and a bundle made before stands for what it would write."""
    made = {"demo": demo_run / "demo" / "bundle"}
    done = []
    for words in [*commands("README.md"), *commands("docs/quickstart.md")]:
        if words[0] in NOT_RUN:
            continue
        if words[0] == "onnx":
            checkpoint, out = (words[words.index(flag) + 1] for flag in ("--ckpt", "--out"))
            if "/" not in checkpoint:  # ids of the hub
                code, _, err = run(*words, "--dry-run")
                assert code == 0, err
            if not (folder / out).exists():
                shutil.copytree(made.get(checkpoint, tiny_bundle.root), folder / out)
        elif any((folder / word / "tiue.json").exists() for word in words):
            code, out, err = run(*words)
            assert code == 0, f"{shlex.join(words)}: {err}"
            done.append((words[0], "already there" in out))
    assert {name for name, _ in done} >= {"generate", "openvino", "inspect", "parity"}
    assert ("generate", True) in done  # the quickstart draws what the README has drawn
