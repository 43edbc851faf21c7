"""What we start ends with us, and what a kill leaves in the temporary folder goes."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from tiue_export.system import child_process
from tiue_export.system.child_process import child_command
from tiue_export.system.owned_path import is_owned, owned_path, temporary_folder

ROOT = Path(__file__).parents[2]
SOURCES = [
    path
    for folder in ("tiue_export", "apps", "runtimes", "calibration", "benchmarks")
    for path in sorted((ROOT / folder).rglob("*.py"))
]
# A parent that starts a child which sleeps, prints its number, and sleeps too.
PARENT = """
import subprocess, sys, time
from tiue_export.system import child_process
from tiue_export.system.child_process import child_command
child = subprocess.Popen(child_command("timeit", "-n1", "-r1", "import time; time.sleep(60)"))
print(child.pid, flush=True)
time.sleep(60)
"""


def is_running(pid: int) -> bool:
    try:
        return "State:\tZ" not in Path(f"/proc/{pid}/status").read_text()
    except FileNotFoundError:
        return False


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_ends_soon_after_its_parent_was_killed():
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True)
    assert parent.stdout is not None
    child = int(parent.stdout.readline())
    assert is_running(child)
    parent.send_signal(signal.SIGKILL)
    parent.wait()
    end = time.monotonic() + 10
    while is_running(child):
        assert time.monotonic() < end
        time.sleep(0.05)
    parent.stdout.close()


@pytest.mark.parametrize(
    ("text", "printed", "exit_code"), [('{"a": 1}', '{"a":1}\n', 0), ("{", "", 1)]
)
def test_a_child_has_its_arguments_its_input_and_its_exit_code(text, printed, exit_code):
    done = subprocess.run(
        child_command("json.tool", "--compact"),
        input=text,
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout, done.returncode) == (printed, exit_code)


def test_every_process_of_ours_is_started_as_a_child_that_watches_us():
    starters = [path.name for path in SOURCES if "sys.executable" in path.read_text("utf-8")]
    assert starters == ["child_process.py"]


def test_every_temporary_folder_is_named_by_its_process():
    unnamed = re.compile(r"TemporaryDirectory|mkdtemp")
    # Core ML's lies in the form that is being made, and goes with it.
    makers = {
        path.relative_to(ROOT).as_posix()
        for path in SOURCES
        if unnamed.search(path.read_text("utf-8"))
    }
    assert makers == {"tiue_export/export/coreml/bundle.py"}


def test_a_temporary_folder_is_private_and_gone_after_use(tmp_path):
    with temporary_folder(tmp_path) as folder:
        assert folder.is_dir()
        assert folder.stat().st_mode & 0o777 == 0o700
        (folder / "file").write_text("x")
    assert list(tmp_path.iterdir()) == []


def test_what_a_killed_process_left_goes_with_the_next_and_what_lives_stays(tmp_path):
    code = (
        "import os, signal, sys; from pathlib import Path\n"
        "from tiue_export.system.owned_path import temporary_folder\n"
        "with temporary_folder(Path(sys.argv[1])): os.kill(os.getpid(), signal.SIGKILL)\n"
    )
    subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False)
    (left,) = tmp_path.iterdir()
    foreign = tmp_path / re.sub(r"work-[^-]+-", "work-elsewhere-", left.name)
    foreign.mkdir()
    with temporary_folder(tmp_path) as first, temporary_folder(tmp_path) as second:
        assert set(tmp_path.iterdir()) == {first, second, foreign}


def test_an_owned_name_says_its_target_its_state_and_its_process(tmp_path):
    path = owned_path(tmp_path / "fox", "partial")
    assert path.parent == tmp_path
    assert re.fullmatch(rf"\.fox\.partial-[^-]+-{os.getpid()}-[0-9a-f]{{8}}", path.name)
    assert is_owned(path.name, "partial")
    assert not is_owned(path.name, "replaced")
    assert not is_owned("fox", "partial")


def test_where_no_signal_tells_of_it_a_child_asks_for_its_parent(monkeypatch):
    watched = threading.Event()
    monkeypatch.setattr(child_process.sys, "platform", "darwin")
    monkeypatch.setattr(child_process.os, "getppid", lambda: 1)
    monkeypatch.setattr(child_process.os, "_exit", lambda code: watched.set())
    child_process.end_with_parent(2)
    assert watched.wait(10)
