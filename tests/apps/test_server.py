"""The images server: real clients over loopback, its bounds, its queue, and how it stops."""

from __future__ import annotations

import base64
import contextlib
import importlib
import io
import json
import os
import re
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import httpx
import numpy as np
import openai
import pytest
import uvicorn
from fake_runtime import FakeRuntime
from open_batch import with_open_batch
from PIL import Image

from tiue_export import Pipeline, RuntimeOptions
from tiue_export.drawing.picture import METADATA_KEY
from tiue_export.errors import RuntimeFailure, UsageError
from tiue_export.system.install import install_line

SERVER = "tiue_export.apps.server"
images_api = importlib.import_module(f"{SERVER}.images_api")
serving = importlib.import_module(f"{SERVER}.serving")
settings_module = importlib.import_module(f"{SERVER}.settings")
picture_store = importlib.import_module(f"{SERVER}.picture_store")
worker_module = importlib.import_module(f"{SERVER}.worker")
guard = importlib.import_module(f"{SERVER}.guard")
connections = importlib.import_module("tiue_export.apps.web.connections")
addresses = importlib.import_module("tiue_export.apps.web.addresses")
Limits = importlib.import_module("tiue_export.apps.commands.serve").ServerLimits
Settings = settings_module.ServerSettings
GENERATIONS = "/v1/images/generations"
ONE_THREAD = RuntimeOptions(threads=1)


class GatedRuntime:
    """The fake runtime behind a gate: a test holds a run as long as it needs to."""

    def __init__(self, bundle) -> None:
        self._inner = FakeRuntime(bundle)
        self.name, self.device, self.precision = "fake", "none", self._inner.precision
        self.gate, self.entered, self.broken_tokens = threading.Event(), threading.Event(), None
        self.gate.set()
        self.batches: list[int] = []
        self.closed = False

    def run(self, graph, feeds):
        if graph == "text_encoder":
            self.entered.set()
            assert self.gate.wait(30)
            tokens = feeds["input_ids"]
            self.batches.append(len(tokens))
            if self.broken_tokens is not None and (tokens == self.broken_tokens).all(axis=1).any():
                raise RuntimeFailure("this prompt breaks the runtime")
        return self._inner.run(graph, feeds)

    def close(self) -> None:
        self.closed = True


@contextlib.contextmanager
def served(opener, settings=None) -> Iterator[httpx.Client]:
    """A server on a free port of this machine, in a thread, and a client of it."""
    settings = settings or Settings()
    worker = worker_module.DrawingWorker(opener, settings.limits)
    worker.start()
    app = images_api.create_app(worker, settings)
    server = uvicorn.Server(serving.server_config(app, settings.limits))
    with socket.create_server(("127.0.0.1", 0)) as listener:
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]})
        thread.start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        try:
            with httpx.Client(base_url=url, timeout=60) as client:
                client.get("/healthz")
                yield client
        finally:
            server.should_exit = True
            thread.join()


@pytest.fixture(scope="module")
def live(tiny_bundle) -> Iterator[httpx.Client]:
    """The tiny bundle on ONNX Runtime. Shared."""
    settings = Settings(model_names=("dall-e-2",), urls=True)
    with served(lambda: Pipeline.open(tiny_bundle, "ort", ONE_THREAD), settings) as client:
        yield client


@pytest.fixture(scope="module")
def dynamic_bundle(tiny_bundle):
    """The tiny bundle with an open batch axis, for the fake runtime. Shared."""
    return with_open_batch(tiny_bundle)


@pytest.fixture
def gated(dynamic_bundle):
    """A runtime with a gate, and how to open a pipeline on it."""
    runtime = GatedRuntime(dynamic_bundle)
    return runtime, lambda: Pipeline.open(dynamic_bundle, runtime)


CLIENTS: list[openai.OpenAI] = []


def openai_client(client: httpx.Client, key: str = "-", retries: int = 0) -> openai.OpenAI:
    url = str(client.base_url).rstrip("/")
    made = openai.OpenAI(base_url=f"{url}/v1", api_key=key, max_retries=retries)
    CLIENTS.append(made)
    return made


@pytest.fixture(autouse=True)
def _clients_closed() -> Iterator[None]:
    yield
    while CLIENTS:
        CLIENTS.pop().close()


def pixels(png: bytes) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(png)))


def figure(client: httpx.Client, line: str) -> float:
    """One sample of /metrics; 0 while there is none."""
    found = re.search(rf"^{re.escape(line)} (\S+)$", client.get("/metrics").text, re.MULTILINE)
    return float(found[1]) if found else 0.0


def until(condition, seconds: float = 10.0) -> None:
    """Wait for a condition of the server's threads."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.01)


def test_the_openai_client_draws_the_picture_that_the_pipeline_draws(live, tiny_bundle) -> None:
    client = openai_client(live)
    answer = client.images.generate(
        model="tiny-fp32", prompt="a red fox", n=2, size="64x64", extra_body={"seed": 7}
    )
    with Pipeline.open(tiny_bundle, "ort", ONE_THREAD) as pipeline:
        expected = pipeline("a red fox", seed=7, count=2).images
    drawn = [base64.b64decode(image.b64_json) for image in answer.data]
    assert [np.array_equal(pixels(png), e) for png, e in zip(drawn, expected, strict=True)] == [
        True,
        True,
    ]
    assert [image.model_extra["seed"] for image in answer.data] == [7, 8]
    assert (answer.size, answer.output_format) == ("64x64", "png")
    inside = json.loads(Image.open(io.BytesIO(drawn[1])).text[METADATA_KEY])
    assert (inside["prompt"], inside["seed"], inside["steps"]) == ("a red fox", 8, 4)


def test_the_openai_client_finds_the_model_under_each_of_its_names(live) -> None:
    client = openai_client(live)
    assert [model.id for model in client.models.list()] == ["tiny-fp32", "dall-e-2"]
    assert client.models.retrieve("dall-e-2").object == "model"
    assert client.images.generate(model="dall-e-2", prompt="an owl").data[0].b64_json


def test_an_unknown_model_is_not_found_and_the_right_names_are_told(live) -> None:
    client = openai_client(live)
    with pytest.raises(openai.NotFoundError, match="expected tiny-fp32 or dall-e-2") as refused:
        client.images.generate(model="dall-e-3", prompt="an owl")
    assert (refused.value.code, refused.value.param) == ("model_not_found", "model")
    with pytest.raises(openai.NotFoundError, match="no model 'gpt'"):
        client.models.retrieve("gpt")


def test_without_a_seed_pictures_differ_and_each_says_its_seed(live) -> None:
    answers = [live.post(GENERATIONS, json={"prompt": "a cat"}).json() for _ in range(2)]
    first, second = (answer["data"][0] for answer in answers)
    assert first["seed"] != second["seed"]
    again = live.post(GENERATIONS, json={"prompt": "a cat", "seed": first["seed"]}).json()
    assert again["data"][0]["b64_json"] == first["b64_json"]


def test_a_whole_number_may_be_written_as_json_writes_numbers(live) -> None:
    whole = live.post(GENERATIONS, json={"prompt": "a cat", "seed": 3}).json()["data"]
    assert live.post(GENERATIONS, json={"prompt": "a cat", "seed": 3.0}).json()["data"] == whole


def test_a_prompt_that_was_cut_is_told(live) -> None:
    answer = live.post(GENERATIONS, json={"prompt": "fox " * 100}).json()
    assert answer["warnings"] == [
        "the prompt has 100 tokens, the last 25 are cut: the bundle takes 75; exported with "
        "--max-prompt-tokens 150 it takes more"
    ]
    assert "warnings" not in live.post(GENERATIONS, json={"prompt": "a fox"}).json()


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({}, "prompt", "required"),
        ({"prompt": ""}, "prompt", "at least 1"),
        ({"prompt": "x" * 1001}, "prompt", "at most 1000"),
        ({"prompt": 7}, "prompt", "valid string"),
        ({"prompt": "a", "n": 0}, "n", "greater than or equal to 1"),
        ({"prompt": "a", "n": 11}, "n", "less than or equal to 10"),
        ({"prompt": "a", "n": "2"}, "n", "valid integer"),
        ({"prompt": "a", "n": True}, "n", "valid integer"),
        ({"prompt": "a", "n": 1.5}, "n", "valid integer"),
        ({"prompt": "a", "seed": -1}, "seed", "greater than or equal to 0"),
        ({"prompt": "a", "seed": 2**32}, "seed", "less than or equal to 4294967286"),
        ({"prompt": "a", "size": "512x512"}, "size", "'64x64'"),
        ({"prompt": "a", "response_format": "jpeg"}, "response_format", "'b64_json' or 'url'"),
        ({"prompt": "a", "output_format": "webp"}, "output_format", "'png'"),
        ({"prompt": "a", "quality": "hd"}, "quality", "'auto' or 'standard'"),
        ({"prompt": "a", "colour": "red"}, "colour", "not permitted"),
    ],
)
def test_a_field_that_cannot_be_honoured_is_named(live, body, param, says) -> None:
    answer = live.post(GENERATIONS, json=body)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, param)
    assert error["type"] == "invalid_request_error"
    assert says in error["message"]


@pytest.mark.parametrize(
    "content", [b"{", b"\xff\xfe", b"[1]", b'{"prompt": "\\ud800"}', b"null", b""]
)
def test_a_body_that_is_no_request_gets_400_and_is_not_echoed(live, content) -> None:
    answer = live.post(GENERATIONS, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert set(answer.json()) == {"error"}


def test_a_page_in_a_browser_cannot_post_without_asking_first(live) -> None:
    # text/plain is what a page may send across origins without a preflight.
    answer = live.post(
        GENERATIONS, content='{"prompt": "a"}', headers={"Content-Type": "text/plain"}
    )
    assert answer.status_code == 400


def test_a_link_leads_to_the_picture(live) -> None:
    body = {"prompt": "a fox", "seed": 3}
    link = live.post(GENERATIONS, json={**body, "response_format": "url"}).json()["data"][0]
    data = live.post(GENERATIONS, json=body).json()["data"][0]["b64_json"]
    answer = live.get(link["url"])
    assert answer.headers["content-type"] == "image/png"
    assert answer.content == base64.b64decode(data)
    assert live.get(link["url"].replace(".png", "x.png")).status_code == 404


def test_kept_pictures_give_way_to_newer_ones_and_to_time() -> None:
    now = [0.0]
    store = picture_store.PictureStore(capacity=2, keep_s=10, clock=lambda: now[0])
    names = [store.add(bytes([i])) for i in range(3)]
    assert [store.get(name) for name in names] == [None, b"\x01", b"\x02"]
    now[0] = 11.0
    assert [store.get(name) for name in names] == [None, None, None]


def test_links_are_refused_unless_allowed(gated) -> None:
    with served(gated[1]) as client:
        answer = client.post(GENERATIONS, json={"prompt": "a", "response_format": "url"})
    assert (answer.status_code, answer.json()["error"]["param"]) == (400, "response_format")


def test_health_and_metrics_tell_what_happened(live) -> None:
    before = figure(live, "tiue_pictures_total")
    live.post(GENERATIONS, json={"prompt": "a fox", "n": 3})
    assert figure(live, "tiue_pictures_total") == before + 3
    assert figure(live, 'tiue_stage_seconds_count{stage="unet_decoder"}') >= before + 3
    assert figure(live, f'tiue_requests_total{{path="{GENERATIONS}",status="200"}}') >= 1
    health = live.get("/healthz")
    assert health.status_code == 200
    assert health.json() == {
        "status": "ok",
        "model": "tiny-fp32",
        "runtime": "ort cpu",
        "waiting_pictures": 0,
    }


def test_the_api_page_needs_no_other_machine(live) -> None:
    page = live.get("/docs").text
    sources = re.findall(r'(?:src|href)="([^"]+)"', page)
    assert sources
    for source in sources:
        assert source.startswith("/")
        assert live.get(source).status_code == 200


def test_a_path_or_method_that_is_not_there_is_told_in_the_same_form(live) -> None:
    assert live.get("/v1/nothing").json()["error"]["message"] == "Not Found"
    answer = live.get(GENERATIONS)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_only_a_client_with_the_token_draws(gated) -> None:
    with served(gated[1], Settings(token="correct-horse")) as client:
        name = client.get("/healthz").json()["model"]
        for key in ("correct-hors", "correct-horsee", "ä"):
            given = {"Authorization": f"Bearer {key}".encode()}
            assert client.post(GENERATIONS, headers=given, content=b"{").status_code == 401
        assert client.get("/metrics").status_code == 401
        assert client.get("/openapi.json").json()["components"]["securitySchemes"]["token"]
        with pytest.raises(openai.AuthenticationError, match="no or wrong token"):
            openai_client(client, "wrong").images.generate(model=name, prompt="a")
        right = openai_client(client, "correct-horse")
        assert right.images.generate(model=name, prompt="a").data[0].b64_json


def test_a_body_that_is_too_large_is_refused_whether_it_says_so_or_not(gated) -> None:
    with served(gated[1], Settings(Limits(request_bytes=500))) as client:
        large = b'{"prompt": "' + b"x" * 600 + b'"}'
        assert client.post(GENERATIONS, content=large).status_code == 413
        pieces = (large[i : i + 100] for i in range(0, len(large), 100))
        assert client.post(GENERATIONS, content=pieces).status_code == 413


def test_a_body_that_does_not_arrive_is_not_waited_for(gated) -> None:
    with served(gated[1], Settings(Limits(body_timeout_s=0.1))) as client:
        address = client.base_url.host, client.base_url.port
        head = f"POST {GENERATIONS} HTTP/1.1\r\nHost: x\r\nContent-Type: application/json\r\n"
        slow = socket.create_connection(address)
        slow.sendall(f"{head}Content-Length: 50\r\n\r\n{{".encode())
        assert slow.recv(100).startswith(b"HTTP/1.1 408")
        slow.close()


def test_another_host_name_is_refused_and_addresses_and_trusted_names_are_not(gated) -> None:
    with served(gated[1], Settings(allowed_hosts=("localhost", "*.here.example"))) as client:

        def asked_as(host: str) -> httpx.Response:
            return client.get("/healthz", headers={"Host": host})

        for host in ("rebound.example", "here.example.evil", "localhost.evil", "[", ""):
            assert (asked_as(host).status_code, host) == (400, host)
        for host in ("localhost:80", "a.here.example", "127.0.0.1", "[::1]:8000", "LOCALHOST"):
            assert (asked_as(host).status_code, host) == (200, host)
        error = asked_as("rebound.example").json()["error"]
    assert error["code"] == "unknown_host"
    assert "Host is 'rebound.example'; expected an address or localhost" in error["message"]
    assert "--allowed-host NAME" in error["message"]


@contextlib.contextmanager
def connected(client: httpx.Client, sent: bytes = b"") -> Iterator[socket.socket]:
    """A connection of its own, and what is sent on it at once."""
    with socket.create_connection((client.base_url.host, client.base_url.port), 10) as raw:
        raw.sendall(sent)
        yield raw


def all_of(raw: socket.socket) -> bytes:
    """What arrives until the server closes."""
    received = b""
    with contextlib.suppress(ConnectionResetError):
        while piece := raw.recv(65536):
            received += piece
    return received


def test_idle_connections_keep_no_request_and_no_health_check_out(gated, monkeypatch) -> None:
    """The load of benchmarks/studies/server_load.py --idle, small: 12 connections are the most."""
    monkeypatch.setattr(serving, "_IDLE_CONNECTIONS", 4)
    monkeypatch.setattr(guard, "_BESIDE_THE_QUEUE", 4)
    limits = Limits(queue_pictures=4, pictures_per_request=4, batch_wait_ms=0)
    with (
        served(gated[1], Settings(limits)) as client,
        contextlib.ExitStack() as idle,
        ThreadPoolExecutor(4) as pool,
    ):
        held: list[socket.socket] = []
        unfinished = b"POST /v1/images/generations HTTP/1.1\r\nHost: 127.0.0.1\r\n"
        for number in range(30):
            sent = (b"", unfinished, unfinished + b"Content-Length: 9\r\n\r\n{")[number % 3]
            held.append(idle.enter_context(connected(client, sent)))

        def ask(seed: int) -> list[int]:
            body, url = {"prompt": "a fox", "seed": seed}, client.base_url
            # Without certificates, which take longer to read than all of this.
            drawn = httpx.post(url.join(GENERATIONS), json=body, verify=False).status_code
            return [drawn, httpx.get(url.join("/healthz"), verify=False).status_code]

        assert list(pool.map(ask, range(24))) == [[200, 200]] * 24
        closed, _, _ = select.select(held, [], [], 0)
        assert len(held) - len(closed) <= 12


def test_a_client_that_does_not_do_its_part_is_not_waited_for(live, monkeypatch) -> None:
    for turn in connections.TURN_S:
        monkeypatch.setitem(connections.TURN_S, turn, 0.2)
    with connected(live) as silent:
        assert all_of(silent) == b""
    with connected(live, b"GET /healthz HTTP/1.1\r\n") as slow:
        answer = all_of(slow)
    assert answer.startswith(b"HTTP/1.1 408")
    assert b"no whole header arrived within 0.2 s" in answer
    whole = b"GET /healthz HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    with connected(live, whole + b"GET /") as second:
        answer = all_of(second)
    assert answer.startswith(b"HTTP/1.1 200")
    assert b"HTTP/1.1 408" in answer


def test_a_client_that_does_not_read_its_answer_is_not_waited_for(live, monkeypatch) -> None:
    page = live.get("/docs").text
    script = next(s for s in re.findall(r'src="([^"]+)"', page) if "bundle" in s)
    size_bytes = len(live.get(script).content)
    monkeypatch.setitem(connections.TURN_S, "read", 0.2)
    with socket.socket() as raw:
        raw.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        raw.connect((live.base_url.host, live.base_url.port))
        for _ in range(8):  # more than all buffers on the way hold
            raw.sendall(f"GET {script} HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n".encode())
        time.sleep(0.6)
        assert 0 < len(all_of(raw)) < 8 * size_bytes


@pytest.mark.parametrize(
    ("sent", "status", "says"),
    [
        (b"\x16\x03\x01 no HTTP\r\n\r\n", 400, "illegal request line"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nbroken\r\n\r\n", 400, "illegal header line"),
        (b"GET / HTTP/1.1\r\nHost: a\r\nX: " + b"x" * 70_000, 431, "Receive buffer too long"),
        (b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: x\r\n\r\n", 400, "Content-Length"),
        (
            b"POST / HTTP/1.1\r\nHost: a\r\nTransfer-Encoding: chunked\r\n\r\nzz\r\n",
            400,
            "illegal chunk header",
        ),
    ],
)
def test_what_is_no_http_is_told_in_the_same_form(live, sent, status, says) -> None:
    with connected(live, sent) as raw:
        head, _, body = all_of(raw).partition(b"\r\n\r\n")
    assert head.startswith(f"HTTP/1.1 {status} ".encode())
    error = json.loads(body)["error"]
    assert says in error["message"]
    assert error["type"] == "invalid_request_error"


def test_an_upgrade_is_answered_as_the_request_that_it_is(live) -> None:
    upgrade = {"Upgrade": "websocket", "Connection": "Upgrade", "Sec-WebSocket-Version": "13"}
    assert live.get("/healthz", headers=upgrade).json()["status"] == "ok"
    assert live.get("/ws", headers=upgrade).json()["error"]["message"] == "Not Found"


def test_beyond_its_room_the_server_says_503_and_is_healthy(gated, monkeypatch) -> None:
    monkeypatch.setattr(guard, "_BESIDE_THE_QUEUE", 0)
    limits = Limits(queue_pictures=1, pictures_per_request=1, batch_wait_ms=0)
    runtime, opener = gated
    with served(opener, Settings(limits)) as client, ThreadPoolExecutor(1) as pool:
        runtime.gate.clear()
        runtime.entered.clear()
        first = pool.submit(client.post, GENERATIONS, json={"prompt": "being drawn"})
        assert runtime.entered.wait(10)
        refused = client.get("/v1/models")
        health = client.get("/healthz")
        runtime.gate.set()
        assert first.result().status_code == 200
        assert client.get("/v1/models").status_code == 200
    assert (refused.status_code, refused.json()["error"]["code"]) == (503, "overloaded")
    assert refused.headers["retry-after"] == "1"
    assert health.status_code == 200


def test_more_connections_than_the_system_opens_files_are_refused_by_name(monkeypatch) -> None:
    monkeypatch.setattr(connections.resource, "getrlimit", lambda _: (1000, 2000))
    set_to = []
    monkeypatch.setattr(connections.resource, "setrlimit", lambda _, both: set_to.append(both))
    connections.allow_open_files(700, "--queue 64")
    connections.allow_open_files(1700, "--queue 1188")
    assert set_to == [(1956, 2000)]
    with pytest.raises(UsageError, match="--queue 1500 needs 2268 open files; this system allows"):
        serving.server_config(None, Limits(queue_pictures=1500))


def test_a_full_queue_is_told_with_429_and_when_to_come_back(gated) -> None:
    runtime, opener = gated
    limits = Limits(queue_pictures=4, pictures_per_request=4, batch_wait_ms=0)
    with served(opener, Settings(limits)) as client, ThreadPoolExecutor(2) as pool:
        runtime.gate.clear()
        runtime.entered.clear()
        first = pool.submit(client.post, GENERATIONS, json={"prompt": "being drawn"})
        assert runtime.entered.wait(10)
        second = pool.submit(client.post, GENERATIONS, json={"prompt": "waiting", "n": 4})
        until(lambda: client.get("/healthz").json()["waiting_pictures"] == 4)
        refused = client.post(GENERATIONS, json={"prompt": "too many"})
        with pytest.raises(openai.RateLimitError, match="the queue is full"):
            openai_client(client).images.generate(model="tiny-fp32", prompt="too many")
        runtime.gate.set()
        assert [first.result().status_code, second.result().status_code] == [200, 200]
        assert figure(client, 'tiue_requests_unserved_total{reason="queue_full"}') == 2
    assert (refused.status_code, refused.json()["error"]["code"]) == (429, "queue_full")
    assert int(refused.headers["retry-after"]) >= 1


def test_the_openai_client_comes_back_by_itself_when_there_is_room_again(gated) -> None:
    runtime, opener = gated
    limits = Limits(queue_pictures=1, pictures_per_request=1, batch_wait_ms=0)
    with served(opener, Settings(limits)) as client, ThreadPoolExecutor(3) as pool:
        runtime.gate.clear()
        runtime.entered.clear()
        first = pool.submit(client.post, GENERATIONS, json={"prompt": "being drawn"})
        assert runtime.entered.wait(10)
        second = pool.submit(client.post, GENERATIONS, json={"prompt": "waiting"})
        until(lambda: client.get("/healthz").json()["waiting_pictures"] == 1)
        patient = openai_client(client, retries=3)
        third = pool.submit(patient.images.generate, model="tiny-fp32", prompt="comes back")
        unserved = 'tiue_requests_unserved_total{reason="queue_full"}'
        until(lambda: figure(client, unserved) == 1)
        runtime.gate.set()
        assert third.result().data[0].b64_json
        assert first.result().status_code == second.result().status_code == 200


def test_requests_that_wait_together_share_a_run(gated, dynamic_bundle) -> None:
    runtime, opener = gated
    jobs = [("a fox", 1), ("an owl", 2), ("a cat", 3), ("a dog", 4), ("a hen", 5)]
    with served(opener) as client, ThreadPoolExecutor(5) as pool:
        runtime.gate.clear()
        runtime.entered.clear()
        held = pool.submit(client.post, GENERATIONS, json={"prompt": "x", "seed": 0})
        assert runtime.entered.wait(10)
        answers = []
        for number, (prompt, seed) in enumerate(jobs[:4], 1):
            body = {"prompt": prompt, "seed": seed}
            answers.append(pool.submit(client.post, GENERATIONS, json=body))
            until(lambda n=number: client.get("/healthz").json()["waiting_pictures"] == n)
        runtime.gate.set()
        drawn = [answer.result().json()["data"][0] for answer in answers]
        held.result()
    assert runtime.batches == [1, 1, 4]  # the warm-up, the one held, the four that waited
    with Pipeline.open(dynamic_bundle, FakeRuntime(dynamic_bundle)) as pipeline:
        expected = pipeline.draw(jobs[:4]).images
    for image, picture in zip(drawn, expected, strict=True):
        assert np.array_equal(pixels(base64.b64decode(image["b64_json"])), picture)


def test_a_prompt_that_breaks_the_runtime_fails_alone(gated) -> None:
    runtime, opener = gated
    with served(opener, Settings(Limits(batch_wait_ms=1000))) as client:
        bundle = opener().bundle
        with Pipeline.open(bundle, FakeRuntime(bundle)) as pipeline:
            runtime.broken_tokens = pipeline.tokenizer(["cursed"])
        with ThreadPoolExecutor(4) as pool:
            prompts = ["a fox", "cursed", "an owl", "a cat"]
            answers = pool.map(lambda p: client.post(GENERATIONS, json={"prompt": p}), prompts)
            status = [answer.status_code for answer in answers]
        assert status == [200, 500, 200, 200]
        assert client.get("/healthz").status_code == 200
        for _ in range(3):
            answer = client.post(GENERATIONS, json={"prompt": "cursed"})
        assert answer.json()["error"] == {
            "message": "this prompt breaks the runtime",
            "type": "server_error",
            "param": None,
            "code": "runtime_failure",
        }
        health = client.get("/healthz")
        assert (health.status_code, health.json()["status"]) == (503, "failing")


def test_nothing_is_drawn_for_a_client_that_went_away(gated) -> None:
    runtime, opener = gated
    with served(opener, Settings(Limits(batch_wait_ms=0))) as client:
        runtime.gate.clear()
        runtime.entered.clear()
        with ThreadPoolExecutor(1) as pool:
            first = pool.submit(client.post, GENERATIONS, json={"prompt": "stays"})
            assert runtime.entered.wait(10)
            with pytest.raises(httpx.ReadTimeout):
                client.post(GENERATIONS, json={"prompt": "leaves", "n": 3}, timeout=0.2)
            until(lambda: client.get("/healthz").json()["waiting_pictures"] == 0)
            runtime.gate.set()
            assert first.result().status_code == 200
        assert figure(client, 'tiue_requests_unserved_total{reason="client_gone"}') == 1
    assert runtime.batches == [1, 1]


def test_a_request_that_takes_too_long_is_told_and_dropped(gated) -> None:
    runtime, opener = gated
    with served(opener, Settings(Limits(timeout_s=0.2))) as client:
        runtime.gate.clear()
        answer = client.post(GENERATIONS, json={"prompt": "a"})
        assert (answer.status_code, answer.json()["error"]["code"]) == (504, "timeout")
        runtime.gate.set()
        until(lambda: client.get("/healthz").json()["waiting_pictures"] == 0)


def test_closing_draws_what_was_accepted_and_takes_nothing_more(gated) -> None:
    runtime, opener = gated
    worker = worker_module.DrawingWorker(opener, Limits(batch_wait_ms=0))
    worker.start()
    runtime.gate.clear()
    orders = [worker.submit([("a", seed), ("b", seed)]) for seed in range(3)]
    closing = threading.Thread(target=worker.close)
    closing.start()
    until(lambda: worker.fault == "closing")
    with pytest.raises(worker_module.Closing):
        worker.submit([("late", 0)])
    runtime.gate.set()
    closing.join()
    drawn = [[p.seed for p in order.future.result(timeout=0)] for order in orders]
    assert drawn == [[0, 0], [1, 1], [2, 2]]
    assert runtime.closed


def test_what_opening_raises_reaches_the_caller() -> None:
    def broken() -> Pipeline:
        raise RuntimeFailure("no such device")

    with pytest.raises(RuntimeFailure, match="no such device"):
        worker_module.DrawingWorker(broken).start()


def test_its_own_description_holds_against_generated_requests(live) -> None:
    """schemathesis makes up right and wrong requests from /openapi.json, and checks the answers."""
    done = subprocess.run(
        [
            *(sys.executable, "-m", "schemathesis.cli", "run", f"{live.base_url}/openapi.json"),
            *("--max-examples", "15", "--seed", "1", "--phases", "examples,coverage,fuzzing"),
            *("--generation-database", "none", "--no-color"),
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]


def test_a_server_told_to_stop_answers_what_it_accepted(tiny_bundle, tmp_path: Path) -> None:
    env = {**os.environ, "TIUE_EXPORT_TOKEN": "correct-horse"}
    command = [sys.executable, "-m", "tiue_export", "serve", str(tiny_bundle.root)]
    with subprocess.Popen(
        [*command, "--port", "0", "--json", "--threads", "1"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=env,
    ) as process:
        assert process.stdout
        lines = iter(process.stdout.readline, "}\n")
        told = json.loads("".join(lines) + "}")
        headers = {"Authorization": "Bearer correct-horse"}
        with (
            httpx.Client(base_url=told["url"], headers=headers) as watcher,
            ThreadPoolExecutor(4) as pool,
        ):
            client = openai_client(watcher, "correct-horse")
            answers = [
                pool.submit(client.images.generate, model=told["model"], prompt="a fox", n=10)
                for _ in range(4)
            ]
            until(lambda: figure(watcher, "tiue_waiting_pictures") >= 15)
            process.send_signal(signal.SIGTERM)
            assert [len(answer.result().data) for answer in answers] == [10] * 4
        assert process.wait(20) == 0
        assert process.stderr
        assert process.stderr.read() == ""


def printed_object(process: subprocess.Popen[str]) -> dict[str, object]:
    """The JSON object that a server prints when it listens."""
    lines = [""]
    assert process.stdout
    while lines[-1] != "}\n":
        lines.append(process.stdout.readline())
        assert lines[-1], "the server ended before it listened"
    return json.loads("".join(lines))


def test_whoever_reads_the_announcement_may_connect_or_stop_the_server_at_once(tiny_bundle) -> None:
    command = [sys.executable, "-m", "tiue_export", "serve", str(tiny_bundle.root), "--json"]
    with subprocess.Popen([*command, "--port", "0"], stdout=subprocess.PIPE, text=True) as process:
        told = printed_object(process)
        socket.create_connection(told["url"].removeprefix("http://").split(":")).close()
        process.send_signal(signal.SIGTERM)
        assert process.wait(20) == 0


def test_a_port_that_is_taken_is_told_before_the_bundle_is_read(run) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        code, _, error = run("serve", "no-bundle", "--port", taken.getsockname()[1])
    assert code == 10
    assert "Address already in use" in error
    assert "Pass another --port" in error


@pytest.mark.parametrize(
    ("arguments", "code", "says"),
    [
        (["--port", "70000"], 2, "--port is 70000; expected 0 to 65535"),
        (["--port", "0"], 6, "no-bundle"),
        (["--port", "0", "--host", "no.such.host.invalid"], 2, "is no address of this machine"),
        (["--queue", "0"], 2, "--queue is 0; expected 1 or more"),
        (["--queue", "4"], 2, "--max-pictures is 10, more than --queue 4 can hold"),
        (["--timeout", "0"], 2, "--timeout is 0; expected seconds above 0"),
        (["--batch-wait", "-1"], 2, "--batch-wait is -1"),
        (["--replicas", "2"], 2, "--replicas is for --ray"),
        (["--ray", "--replicas", "0"], 2, "--replicas is 0; expected 1 or more"),
        (["--ray", "--port", "0"], 2, "--ray needs a port of its own"),
        (["--runtime", "torch"], 2, "the torch runtime draws with the student itself, which this"),
        (["--token-file", "none.txt"], 2, "--token-file none.txt cannot be read"),
        (["--token-file", "short.txt"], 2, "the token in short.txt has 3 characters"),
    ],
)
def test_an_option_that_cannot_be_honoured_is_told(run, tmp_path, arguments, code, says) -> None:
    (tmp_path / "short.txt").write_text("abc\n")
    got, _, error = run("serve", "no-bundle", *arguments)
    assert got == code
    assert says in error


@pytest.mark.parametrize(
    ("host", "loopback"),
    [("127.0.0.1", True), ("localhost", True), ("::1", True), ("0.0.0.0", False), ("a.b", False)],
)
def test_only_loopback_addresses_count_as_this_machine(host, loopback) -> None:
    assert addresses.is_loopback(host) is loopback


def test_without_its_packages_the_server_says_what_to_install(run, monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "uvicorn", None)
    registry = importlib.import_module("tiue_export.registry.packages")
    monkeypatch.setattr(registry, "_found", lambda name: name != "uvicorn")
    code, _, error = run("serve", "no-bundle")
    assert code == 8
    assert "the server needs uvicorn, which is not installed" in error
    assert install_line("app") in error


def test_a_limit_that_nothing_could_keep_is_refused() -> None:
    with pytest.raises(UsageError, match="--max-request-bytes is 10; expected 256 or more"):
        Limits(request_bytes=10).check()


def test_a_bundle_with_a_plan_takes_guidance_and_a_negative_prompt(faster_bundle) -> None:
    steering = {"guidance": 2, "negative_prompt": "blue"}
    with served(lambda: Pipeline.open(faster_bundle, "ort", ONE_THREAD)) as client:
        body = {"prompt": "a red fox", "seed": 7}
        plain, steered = (
            client.post(GENERATIONS, json=asked).json() for asked in (body, {**body, **steering})
        )
        refused = client.post(GENERATIONS, json={**body, "guidance": 0.5}).json()["error"]
        fields = client.get("/openapi.json").json()["components"]["schemas"]["ImagesRequest"]
    assert (refused["param"], refused["code"]) == ("guidance", "invalid_value")
    assert "left out, 5." in fields["properties"]["guidance"]["description"]
    with Pipeline.open(faster_bundle, "ort", ONE_THREAD) as pipeline:
        expected = [pipeline("a red fox", seed=7, **how).images[0] for how in ({}, steering)]
    for answer, picture in zip((plain, steered), expected, strict=True):
        assert np.array_equal(pixels(base64.b64decode(answer["data"][0]["b64_json"])), picture)
    assert not np.array_equal(*map(np.asarray, expected))


def test_a_student_has_no_guidance_to_choose(live) -> None:
    error = live.post(GENERATIONS, json={"prompt": "a red fox", "guidance": 2}).json()["error"]
    assert (error["param"], error["code"]) == ("guidance", "unknown_parameter")


def test_prompt_weights_are_read_where_they_are_asked_for(live, tiny_bundle) -> None:
    body = {"prompt": "a (red:1.5) fox", "seed": 3, "prompt_weights": True}
    answer = live.post(GENERATIONS, json=body).json()
    with Pipeline.open(tiny_bundle, "ort", ONE_THREAD) as pipeline:
        picture = pipeline(body["prompt"], seed=3, prompt_weights=True).images[0]
    assert np.array_equal(pixels(base64.b64decode(answer["data"][0]["b64_json"])), picture)
    error = live.post(GENERATIONS, json={**body, "prompt": "(a:99)"}).json()["error"]
    assert (error["param"], error["code"]) == ("prompt", "invalid_value")
    assert "expected at most 20" in error["message"]


@pytest.mark.slow
def test_the_same_application_answers_on_ray_serve(tiny_bundle, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "tiue_export", "serve", str(tiny_bundle.root), "--json"]
    with subprocess.Popen(
        [*command, "--ray", "--replicas", "1", "--threads", "1", "--port", str(port)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        told = printed_object(process)
        with httpx.Client(base_url=told["url"], timeout=60) as client:
            body = {"prompt": "a red fox", "seed": 7}
            answers = [client.post(GENERATIONS, json=body).json() for _ in range(2)]
            refused = client.post(GENERATIONS, json={"prompt": ""})
        process.send_signal(signal.SIGTERM)
        error = process.communicate()[1]
    assert process.returncode == 0, error
    with Pipeline.open(tiny_bundle, "ort", ONE_THREAD) as pipeline:
        expected = pipeline("a red fox", seed=7).images[0]
    for answer in answers:
        assert np.array_equal(pixels(base64.b64decode(answer["data"][0]["b64_json"])), expected)
    assert (refused.status_code, refused.json()["error"]["param"]) == (400, "prompt")


def test_the_load_test_loses_nothing_and_prints_its_table(tiny_bundle, tmp_path, capfd) -> None:
    load = importlib.import_module("tiue_export.benchmarks.studies.server_load")
    record = tmp_path / "load.json"
    arguments = [
        "--clients",
        "3",
        "--requests",
        "4",
        "--threads",
        "1",
        "--queue",
        "1",
        "--idle",
        "5",
    ]
    load.main([str(tiny_bundle.root), *arguments, "--out", str(record)])
    result = json.loads(record.read_text())
    assert (result["sent"], result["drawn"], result["lost"]) == (12, 12, 0)
    assert result["differing_again"] == 0
    assert result["healthy"] == result["health_checks"] > 0
    assert "3 clients x 4 requests, 5 idle connections" in capfd.readouterr().out


def test_percentiles_are_values_that_so_many_do_not_exceed() -> None:
    load = importlib.import_module("tiue_export.benchmarks.studies.server_load")
    found = load.percentiles([float(i) for i in range(101)])
    assert found == {"mean": 50.0, "p50": 50.0, "p90": 90.0, "p99": 99.0, "max": 100.0}
    assert load.percentiles([3.0]) == dict.fromkeys(("mean", "p50", "p90", "p99", "max"), 3.0)
