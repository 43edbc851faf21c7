"""Bytes that are no text, typed or in a table: refused with code 2 by the real command line."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiue_export.errors import UsageError

BUNDLE = Path(__file__).parents[1] / "bundle" / "format1" / "bundle"


def typed(folder: Path, *words: str | bytes) -> subprocess.CompletedProcess[str]:
    """The command line in a process of its own, whose words may be any bytes."""
    command = [os.fsencode(word) for word in (sys.executable, "-m", "tiue_export", *words)]
    environment = {**os.environ, "NO_COLOR": "1"}
    done = subprocess.run(command, cwd=folder, capture_output=True, env=environment)
    return subprocess.CompletedProcess(
        command, done.returncode, done.stdout.decode(), done.stderr.decode()
    )


def test_a_prompt_that_is_no_utf8_is_refused_by_the_real_command(tmp_path):
    done = typed(tmp_path, "generate", str(BUNDLE), b"caf\xe9")
    assert (done.returncode, done.stdout) == (UsageError.exit_code, "")
    assert done.stderr == (
        r"error: PROMPTS is 'caf\udce9', which is no UTF-8 text"
        "\n  next: Type it in UTF-8 (LC_ALL=C.UTF-8); prompts may also come from a file: "
        "--prompts FILE\n"
    )


def test_a_path_may_be_any_bytes_and_is_told_escaped(tmp_path):
    done = typed(tmp_path, "inspect", b"caf\xe9")
    assert done.returncode == 6
    assert done.stderr.startswith(r"error: caf\udce9 does not exist")


@pytest.mark.parametrize("option", ["--negative", "--key-steps"])
def test_so_is_every_option_that_is_text(run, option):
    code, _, err = run("generate", BUNDLE, "a fox", option, "caf\udce9")
    assert code == UsageError.exit_code
    assert rf"{option} is 'caf\udce9', which is no UTF-8 text" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("p.txt", b"caf\xe9\n", "p.txt cannot be read as UTF-8 text: 'utf-8' codec can't decode"),
        ("p.tsv", b"prompt\ncaf\xe9\n", "p.tsv cannot be read: 'utf-8' codec can't decode"),
        (
            "p.jsonl",
            b'{"prompt": "fox", "note": "\\ud800"}\n',
            r"p.jsonl, line 1 is not JSON: '\ud800' is no text: it holds half a character",
        ),
        (
            "p.jsonl",
            b'{"prompt": "fox", "seed": NaN}\n',
            "p.jsonl, line 1 is not JSON: NaN is no number that JSON knows",
        ),
        (
            "p.jsonl",
            b'{"prompt": "fox", "prompt": "owl"}\n',
            "p.jsonl, line 1 is not JSON: the key 'prompt' stands twice in one object",
        ),
        ("p.jsonl", b"[" * 100_000, "p.jsonl, line 1 is not JSON: maximum recursion depth"),
    ],
)
def test_a_table_that_is_no_text_is_told_by_its_line(run, tmp_path, name, content, message):
    (tmp_path / name).write_bytes(content)
    code, out, err = run("generate", BUNDLE, "--prompts", name)
    assert (code, out) == (UsageError.exit_code, "")
    assert message in err
