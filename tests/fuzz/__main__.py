"""`python -m tests.fuzz --cases 10000`: damaged files by the thousand, counted by kind."""

from __future__ import annotations

import argparse
import collections
import json
import multiprocessing
import re
import resource
import sys
import tempfile
import warnings
from collections.abc import Iterator
from multiprocessing.connection import Connection
from pathlib import Path

import torch

# The suite finds its own modules in tests/, a command does not.
sys.path.insert(0, str(Path(__file__).parents[1]))

from tiue_export.checkpoint.parts import quiet_libraries

from .inputs import INPUTS, Input, write_valid
from .outcome import Outcome, explore

# For one kind's process, on top of what the program has loaded.
_MEMORY_BYTES = 8 << 30
_FORK = multiprocessing.get_context("fork")


def main(arguments: list[str] | None = None) -> int:
    """Print what was counted; 1 where a file was neither opened nor refused."""
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("--cases", type=int, default=10_000, help="Cases over all kinds.")
    parser.add_argument("--kind", default="", help="A regular expression that finds kinds.")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", action="store_true", help="Print one JSON object.")
    asked = parser.parse_args(arguments)
    chosen = [each for each in INPUTS if re.search(asked.kind, each.kind)]
    if not chosen:
        parser.error(f"no kind is {asked.kind!r}; there are: {', '.join(i.kind for i in INPUTS)}")
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    warnings.simplefilter("error", RuntimeWarning)  # such as numpy gives for 0 / 0
    counts: dict[str, collections.Counter[str]] = {}
    others: collections.Counter[str] = collections.Counter()
    with tempfile.TemporaryDirectory() as folder, quiet_libraries():
        write_valid(Path(folder))
        for number, each in enumerate(chosen):
            cases = asked.cases * (number + 1) // len(chosen) - asked.cases * number // len(chosen)
            counts[each.kind] = collections.Counter()
            for outcome in _explored(each, Path(folder), cases, asked.seed):
                counts[each.kind][outcome.what] += 1
                if outcome.what == "other":
                    others[f"{each.kind}: {outcome.detail}"] += 1
            if not asked.json:
                print(f"{each.kind:<36}{_told(counts[each.kind])}", flush=True)
    total = sum(counts.values(), collections.Counter[str]())
    if asked.json:
        print(json.dumps({"total": total, "kinds": counts, "others": others}, indent=1))
    else:
        print(f"{total.total():,} cases: {_told(total)}")
        for text, times in others.most_common():
            print(f"{times:>6}  {text}")
    return 1 if others else 0


def _told(counts: collections.Counter[str]) -> str:
    return ", ".join(f"{counts[what]:,} {what}" for what in ("refused", "opened", "other"))


def _explored(each: Input, root: Path, cases: int, seed: int) -> Iterator[Outcome]:
    """In a process of its own, which a library may take down with it."""
    path = root / each.file
    valid = path.read_bytes()
    receiving, sending = _FORK.Pipe(duplex=False)
    process = _FORK.Process(target=_explore, args=(each, root, cases, seed, sending))
    process.start()
    sending.close()
    try:
        while True:
            yield receiving.recv()
    except EOFError:
        process.join()
    if process.exitcode:
        path.write_bytes(valid)
        yield Outcome("other", f"the process ended with {process.exitcode}")


def _explore(each: Input, root: Path, cases: int, seed: int, sending: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_DATA, (_MEMORY_BYTES, _MEMORY_BYTES))
    explore(each, root, cases, sending.send, seed=seed)


if __name__ == "__main__":
    sys.exit(main())
