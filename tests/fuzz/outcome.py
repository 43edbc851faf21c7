"""What reading a damaged file may end with: it opens, or is refused in words people can read."""

from __future__ import annotations

import contextlib
import io
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hypothesis import HealthCheck, Phase, given, settings
from hypothesis import seed as seeded

from tiue_export.errors import TiueError

from .inputs import Input

DEADLINE_S = 5.0
MESSAGE_LENGTH = 10_000


class Waited(BaseException):
    """Reading took more than `DEADLINE_S` of the processor: other work does not count."""


@dataclass(frozen=True)
class Outcome:
    """`what` is opened, refused or other; `detail` says where the program failed."""

    what: str
    detail: str = ""


def outcome_of(read: Callable[[Path], object], root: Path) -> Outcome:
    """Read, with what is printed and how long it takes watched."""
    started = time.process_time()
    try:
        with _deadline():
            read(root)
    except TiueError as error:
        problem = _problem(error)
        return Outcome("refused", error.message) if problem is None else Outcome("other", problem)
    except MemoryError:  # which the command line tells as such
        return Outcome("refused", "memory ran out")
    except (Exception, Waited) as error:
        frames = traceback.extract_tb(error.__traceback__)
        own = [f for f in frames if "tiue" in f.filename or "/apps/" in f.filename] or frames
        own = [
            f for f in own if "tests" not in f.filename and "site-packages" not in f.filename
        ] or own
        place = f"{Path(own[-1].filename).name}:{own[-1].lineno}"
        return Outcome("other", f"{type(error).__name__} at {place}: {str(error)[:90]!r}")
    if time.process_time() - started > DEADLINE_S:
        return Outcome("other", "waited")
    return Outcome("opened")


def _problem(error: TiueError) -> str | None:
    text = str(error)
    shown = text.replace("\n", "")
    if error.exit_code == 1:
        return f"{type(error).__name__} has the exit code of a defect"
    if not error.message.strip():
        return f"{type(error).__name__} says nothing"
    if not shown.isprintable():
        return f"{type(error).__name__} cannot be printed: {error.message[-60:]!r}"
    if len(text) > MESSAGE_LENGTH:
        return f"{type(error).__name__} has {len(text):,} letters: {text[:60]!r}"
    return None


@contextlib.contextmanager
def _deadline() -> Iterator[None]:
    def stop(number: int, frame: Any) -> None:
        raise Waited(f"longer than {DEADLINE_S:g} s")

    before = signal.signal(signal.SIGPROF, stop)
    signal.setitimer(signal.ITIMER_PROF, DEADLINE_S, 1)  # again where a library swallows it
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, before)


def explore(
    each: Input, root: Path, cases: int, note: Callable[[Outcome], object], *, seed: int = 0
) -> None:
    """Change one file in `cases` ways and note what reading it ends with each time.

    Equal seeds give equal cases. Raises `AssertionError` where the valid file does not open.
    """
    path = root / each.file
    valid = path.read_bytes()
    unchanged = outcome_of(each.read, root)
    assert unchanged.what == "opened", f"{each.kind}: a valid file is refused: {unchanged.detail}"

    @seeded(seed)
    @settings(
        max_examples=cases,
        database=None,
        deadline=None,
        phases=[Phase.generate],
        suppress_health_check=list(HealthCheck),
    )
    @given(each.changes(valid))
    def case(content: bytes) -> None:
        path.write_bytes(content)
        with contextlib.redirect_stderr(io.StringIO()):
            note(outcome_of(each.read, root))

    try:
        case()
    finally:
        path.write_bytes(valid)
