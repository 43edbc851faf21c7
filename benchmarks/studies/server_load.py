"""`tiue-export serve` under load: several clients at once on this machine, and what each waited.

    python -m tiue_export.benchmarks.studies.server_load BUNDLE --clients 8 --requests 200

Starts a server of its own on a free port of loopback, sends every request with a seed of its own,
decodes every picture, and asks for some again: equal seeds must give equal pictures. A request that
is refused with 429 is sent again after Retry-After, as the openai client does; time waited counts.
With --idle N so many connections are open meanwhile that never send anything, and are opened again
when the server closes them; /healthz is asked on a connection of its own every 0.1 s all the while.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import http.client
import io
import json
import select
import socket
import statistics
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from rich.console import Console
from rich.table import Table

from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.registry.spokes import run_explained
from tiue_export.system.child_process import child_command
from tiue_export.system.disk_errors import disk_errors

_PATH = "/v1/images/generations"
_STOP_S = 60


@dataclass(frozen=True)
class Load:
    """How much is asked for, and of what. Request i of client c has seed c * requests + i."""

    bundle: Path
    clients: int = 8
    requests: int = 200
    runtime: str = "ort"
    threads: int | None = None
    queue: int = 64
    again: int = 8
    idle: int = 0


@dataclass(frozen=True)
class LoadResult:
    """What came back. `lost` were answered with something other than their picture.

    `healthy` of `health_checks` were answered with 200.
    """

    sent: int
    drawn: int
    lost: int
    refused_429: int
    differing_again: int
    wall_s: float
    pictures_per_s: float
    latency_ms: dict[str, float]
    health_checks: int
    healthy: int


@dataclass
class _Answer:
    seed: int
    picture: bytes
    latency_ms: float
    refused: int


def run_load(load: Load) -> LoadResult:
    """Start a server, load it, stop it."""
    if load.clients < 1 or load.requests < 1:
        raise UsageError(
            f"--clients is {load.clients} and --requests {load.requests}; expected 1 or more"
        )
    with _server(load) as address:
        start = time.perf_counter()
        with _idle(address, load.idle), _health(address) as health:
            with ThreadPoolExecutor(load.clients) as pool:
                parts = list(pool.map(lambda c: _client(address, load, c), range(load.clients)))
            wall_s = time.perf_counter() - start
        answers = [answer for part in parts for answer in part]
        differing = _differing(address, answers[: load.again])
    drawn = [answer for answer in answers if answer.picture]
    latencies = sorted(answer.latency_ms for answer in drawn)
    return LoadResult(
        sent=load.clients * load.requests,
        drawn=len(drawn),
        lost=load.clients * load.requests - len(drawn),
        refused_429=sum(answer.refused for answer in answers),
        differing_again=differing,
        wall_s=wall_s,
        pictures_per_s=len(drawn) / wall_s,
        latency_ms=percentiles(latencies),
        health_checks=len(health),
        healthy=health.count(200),
    )


def percentiles(latencies_ms: Sequence[float]) -> dict[str, float]:
    """p50, p90, p99 and the largest, of sorted values; the value that so many do not exceed."""
    if not latencies_ms:
        return {}
    last = len(latencies_ms) - 1
    named = {f"p{q}": latencies_ms[-(-last * q // 100)] for q in (50, 90, 99)}
    return {"mean": statistics.fmean(latencies_ms), **named, "max": latencies_ms[-1]}


@contextlib.contextmanager
def _server(load: Load) -> Iterator[tuple[str, int]]:
    command = child_command("tiue_export", "serve", str(load.bundle), "--port", "0")
    command += ["--json", "--runtime", load.runtime, "--queue", str(load.queue)]
    command += ["--max-pictures", str(min(10, load.queue))]
    if load.threads is not None:
        command += ["--threads", str(load.threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout
            told = ""
            for line in process.stdout:
                told += line
                if line == "}\n":
                    break
            if not told:
                raise RuntimeFailure("the server did not start; its reason stands above")
            url = urlsplit(json.loads(told)["url"])
            yield str(url.hostname), int(url.port or 0)
        finally:
            process.terminate()
            try:
                process.wait(_STOP_S)
            except subprocess.TimeoutExpired:
                process.kill()
                raise RuntimeFailure(f"the server did not stop within {_STOP_S} s") from None


@contextlib.contextmanager
def _meanwhile(step: Callable[[], None], pause_s: float) -> Iterator[None]:
    """Something done again and again, in a thread, until the block ends."""
    done = threading.Event()

    def repeat() -> None:
        while not done.is_set():
            step()
            done.wait(pause_s)

    thread = threading.Thread(target=repeat)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()


@contextlib.contextmanager
def _idle(address: tuple[str, int], count: int) -> Iterator[None]:
    """So many connections that say nothing; each that the server closes is opened anew."""
    held = [socket.create_connection(address) for _ in range(count)]

    def open_again() -> None:
        polled = select.poll()
        numbers = {one.fileno(): place for place, one in enumerate(held)}
        for number in numbers:
            polled.register(number, select.POLLIN)
        for number, _ in polled.poll(0):
            held[numbers[number]].close()
            held[numbers[number]] = socket.create_connection(address)

    with _meanwhile(open_again, 1.0):
        yield
    for one in held:
        one.close()


@contextlib.contextmanager
def _health(address: tuple[str, int]) -> Iterator[list[int]]:
    """The status of each health check that was made until the block ends."""
    seen: list[int] = []

    def check() -> None:
        connection = http.client.HTTPConnection(*address, timeout=60)
        connection.request("GET", "/healthz")
        seen.append(connection.getresponse().status)
        connection.close()

    with _meanwhile(check, 0.1):
        yield seen


def _client(address: tuple[str, int], load: Load, number: int) -> list[_Answer]:
    connection = http.client.HTTPConnection(*address, timeout=600)
    first = number * load.requests
    answers = [_ask(connection, first + i) for i in range(load.requests)]
    connection.close()
    return answers


def _ask(connection: http.client.HTTPConnection, seed: int) -> _Answer:
    """One request, again and again while it is refused for want of room."""
    body = json.dumps({"prompt": f"a picture with seed {seed}", "seed": seed})
    start, refused = time.perf_counter(), 0
    while True:
        connection.request("POST", _PATH, body, {"Content-Type": "application/json"})
        answer = connection.getresponse()
        content = answer.read()
        if answer.status != 429:
            break
        refused += 1
        time.sleep(int(answer.headers["Retry-After"]))
    latency_ms = (time.perf_counter() - start) * 1e3
    return _Answer(seed, _picture(answer.status, content, seed), latency_ms, refused)


def _picture(status: int, content: bytes, seed: int) -> bytes:
    """The PNG file, proven to decode; empty when the answer is anything else."""
    from PIL import Image

    if status != 200:
        return b""
    (image,) = json.loads(content)["data"]
    png = base64.b64decode(image["b64_json"])
    with Image.open(io.BytesIO(png)) as opened:
        opened.load()
    return png if image["seed"] == seed else b""


def _differing(address: tuple[str, int], answers: Sequence[_Answer]) -> int:
    """How many pictures come out differently when asked for alone."""
    connection = http.client.HTTPConnection(*address, timeout=600)
    again = [_ask(connection, answer.seed).picture for answer in answers]
    connection.close()
    return sum(new != old.picture for new, old in zip(again, answers, strict=True))


def result_table(load: Load, result: LoadResult) -> Table:
    """One row."""
    title = f"{load.clients} clients x {load.requests} requests"
    if load.idle:
        title += f", {load.idle} idle connections"
    table = Table(title=title, title_justify="left")
    cells: dict[str, Any] = {
        "drawn": result.drawn,
        "lost": result.lost,
        "429": result.refused_429,
        "healthy": f"{result.healthy}/{result.health_checks}",
        "wall s": f"{result.wall_s:.1f}",
        "images/s": f"{result.pictures_per_s:.1f}",
        **{f"{name} ms": f"{value:.0f}" for name, value in result.latency_ms.items()},
    }
    for name in cells:
        table.add_column(name, justify="right")
    table.add_row(*map(str, cells.values()))
    return table


def main(arguments: Sequence[str] | None = None) -> None:
    """Parse, load, print; fails when a request was lost or a picture came out differently."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200, help="of each client")
    parser.add_argument("--runtime", default="ort")
    parser.add_argument("--threads", type=int)
    parser.add_argument("--queue", type=int, default=64, help="small: shows 429 and coming back")
    parser.add_argument("--idle", type=int, default=0, help="connections that say nothing")
    parser.add_argument("--out", type=Path, help="record to write (.json)")
    given = parser.parse_args(arguments)
    load = Load(
        given.bundle,
        given.clients,
        given.requests,
        given.runtime,
        given.threads,
        given.queue,
        idle=given.idle,
    )
    result = run_load(load)
    Console(width=None if sys.stdout.isatty() else 120).print(result_table(load, result))
    if given.out is not None:
        with disk_errors(given.out):
            record = {**asdict(load), **asdict(result)}
            given.out.write_text(json.dumps(record, indent=1, default=str) + "\n", "utf-8")
    unhealthy = result.health_checks - result.healthy
    if result.lost or result.differing_again or unhealthy:
        raise RuntimeFailure(
            f"{result.lost} requests were lost, {result.differing_again} pictures came out "
            f"differently when asked for again, {unhealthy} health checks failed"
        )


if __name__ == "__main__":
    run_explained(main)
