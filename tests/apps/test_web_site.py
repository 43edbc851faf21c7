"""`tiue-export web`: what the site holds, and what is refused before anything is written.

No npm and no browser are needed: what comes from npm is files that are copied.
"""

from __future__ import annotations

import hashlib
import json
import os
import shlex
import shutil
import signal
import socket
import struct
import subprocess
import sys
import threading
import urllib.request
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from tiue_export.apps.browser import npm_packages, site
from tiue_export.apps.browser.local_server import LOOPBACK, site_server
from tiue_export.apps.browser.npm_packages import VENDORED, vendored_files
from tiue_export.apps.browser.site import check_drawable, largest_tensor_bytes, write_site
from tiue_export.apps.web.listening import bound
from tiue_export.bundle.read import Bundle, open_bundle
from tiue_export.checkpoint.tokenizer_files import write_with_tokens
from tiue_export.errors import MissingExtraError, ResourceError, UsageError


@pytest.fixture
def packages(tmp_path) -> Path:
    """A node_modules folder whose files say their names."""
    folder = tmp_path / "node_modules"
    for name in VENDORED:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name, "utf-8")
    return folder


def filled(root: Path, name: str) -> object:
    """What stands for a constant of the written service worker."""
    line = next(
        line
        for line in (root / "sw.js").read_text("utf-8").splitlines()
        if line.startswith(f"const {name} = ")
    )
    return json.loads(line.removeprefix(f"const {name} = ").removesuffix(";"))


def test_every_file_of_the_bundle_comes_back_from_its_parts(
    tiny_bundle, packages, tmp_path, monkeypatch
):
    monkeypatch.setattr(site, "PART_BYTES", 100_000)
    written = write_site(tiny_bundle, tmp_path / "site", vendored_files(packages))
    described = json.loads((written.root / "site.json").read_text("utf-8"))
    assert max(len(file["parts"]) for file in described["files"].values()) > 2
    for name, file in described["files"].items():
        contents = [(written.root / part["path"]).read_bytes() for part in file["parts"]]
        for part, content in zip(file["parts"], contents, strict=True):
            assert len(content) == part["size_bytes"] <= 100_000
            assert hashlib.sha256(content).hexdigest() == part["sha256"]
        assert b"".join(contents) == (tiny_bundle.root / name).read_bytes()
        assert file["size_bytes"] == sum(map(len, contents))
    paths = [part["path"] for file in described["files"].values() for part in file["parts"]]
    assert filled(written.root, "PARTS") == paths
    assert written.size_bytes == sum(
        path.stat().st_size for path in written.root.rglob("*") if path.is_file()
    )


def test_the_page_is_kept_whole_but_for_the_runtime_that_does_not_draw(
    tiny_bundle, packages, tmp_path
):
    root = write_site(tiny_bundle, tmp_path / "site", vendored_files(packages)).root
    page = filled(root, "PAGE")
    assert isinstance(page, dict)
    there = {
        path.relative_to(root).as_posix()
        for path in root.rglob("*")
        if path.is_file() and "bundle" not in path.relative_to(root).parts
    }
    kept = {name for name in page["files"] if name != "./"}
    assert kept | set(page["lazy"]) | {"sw.js"} == there
    assert all(name.startswith("vendor/") for name in page["lazy"])
    assert not [name for name in kept if name.endswith(".wasm") or "jsep" in name]


def test_a_page_that_changed_has_another_version_and_the_same_parts(
    tiny_bundle, packages, tmp_path
):
    files = vendored_files(packages)
    one, same, other = (
        write_site(tiny_bundle, tmp_path / name, files, site.SiteText(title)).root
        for name, title in (("one", "Foxes"), ("same", "Foxes"), ("other", "Owls"))
    )
    assert (one / "sw.js").read_text() == (same / "sw.js").read_text()
    assert filled(one, "PARTS") == filled(other, "PARTS")
    assert filled(one, "PAGE")["version"] != filled(other, "PAGE")["version"]


def test_the_largest_tensor_is_told_be_it_a_weight_or_between_two_operations(bundle_copy):
    import onnx
    import onnxruntime as ort

    # A copy: other tests' bundles are hard links to the shared one, which onnx does not read.
    bundle = open_bundle(bundle_copy)
    sizes = []
    for graph in bundle.manifest.graphs:
        path = bundle.graph_path(graph)
        model = onnx.load(path)
        sizes += [onnx.numpy_helper.to_array(weight).nbytes for weight in model.graph.initializer]
        names = [name for node in model.graph.node for name in node.output]
        del model.graph.output[:]
        model.graph.output.extend(onnx.ValueInfoProto(name=name) for name in names)
        options = ort.SessionOptions()
        options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_DISABLE_ALL
        session = ort.InferenceSession(model.SerializeToString(), options)
        feeds = {
            tensor.name: np.zeros(tensor.shape, tensor.dtype)
            for tensor in bundle.spec(graph).inputs
        }
        sizes += [value.nbytes for value in session.run(None, feeds)]
    assert largest_tensor_bytes(bundle) == max(sizes)


def test_the_command_tells_the_size_and_a_line_that_opens_the_same_site(
    run, tiny_bundle, packages, tmp_path
):
    out = tmp_path / "site"
    asked = ["web", tiny_bundle.root, "--out", out, "--packages", packages,
             "--title", "My foxes", "--prompt", "a red fox"]  # fmt: skip
    code, printed, err = run(*asked)
    assert code == 0, err
    assert "a visitor loads" in printed
    line = shlex.split(printed.splitlines()[-1].removeprefix("next:  "))
    assert line[:2] == ["tiue-export", "web"]
    assert set(line[2:]) == {*map(str, asked[1:]), "--force", "--open"}
    code, printed, _ = run(*asked, "--force", "--json")
    assert code == 0
    told = json.loads(printed)
    assert told["root"] == str(out)
    assert 0 < told["first_visit_bytes"] < told["size_bytes"]


def test_open_serves_the_site_with_the_headers_that_threads_need(tiny_bundle, packages, tmp_path):
    command = [sys.executable, "-m", "tiue_export", "web", str(tiny_bundle.root)]
    options = ["--out", "site", "--packages", str(packages), "--open", "--port", "0"]
    with subprocess.Popen(
        [*command, *options],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.DEVNULL,
        text=True,
        env={**os.environ, "BROWSER": "true"},
    ) as process:
        assert process.stdout is not None
        address = next(line for line in process.stdout if line.startswith("Open at ")).split()[2]
        try:
            with urllib.request.urlopen(f"{address}vendor/ort.wasm.min.mjs") as answer:
                assert answer.headers["Content-Type"] == "text/javascript"
                assert answer.headers["Cross-Origin-Opener-Policy"] == "same-origin"
                assert answer.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
        finally:
            process.send_signal(signal.SIGINT)
        assert process.wait(60) == 0


# What is refused


def refused(run, *arguments: object) -> str:
    """The message of a command that fails."""
    code, _, err = run("web", *arguments)
    assert code != 0
    return " ".join(err.split())


def test_what_is_in_the_way_is_never_replaced_unasked(run, tiny_bundle, packages, tmp_path):
    own = ("--packages", packages)
    (tmp_path / "letters").mkdir()
    (tmp_path / "letters" / "dear.txt").write_text("x")
    told = refused(run, tiny_bundle.root, "--out", tmp_path / "letters", "--force", *own)
    assert "holds other things than a site of tiue-export; it is never replaced" in told
    (tmp_path / "file").write_text("x")
    assert "is a file" in refused(run, tiny_bundle.root, "--out", tmp_path / "file", *own)
    assert run("web", tiny_bundle.root, "--out", tmp_path / "site", *own)[0] == 0
    told = refused(run, tiny_bundle.root, "--out", tmp_path / "site", *own)
    assert "holds a site already" in told
    assert "Pass --force to replace it" in told


def test_options_that_mean_nothing_together_are_refused(run, tiny_bundle, packages, tmp_path):
    own = (tiny_bundle.root, "--out", tmp_path / "site", "--packages", packages, "--open")
    assert "--json prints once" in refused(run, *own, "--json")
    assert "--port is 70000; expected 0 to 65535" in refused(run, *own, "--port", 70000)
    assert not (tmp_path / "site").exists()


def test_a_bundle_that_no_page_draws_is_refused_with_its_reason(
    micro_bundle, tiny_bundle, tmp_path
):
    with pytest.raises(UsageError, match="has no text_encoder"):
        check_drawable(micro_bundle)
    several = replace(
        tiny_bundle.manifest, latent_shape=(2, *tiny_bundle.manifest.latent_shape[1:])
    )
    with pytest.raises(UsageError, match="draws 2 pictures at once") as told:
        check_drawable(Bundle(tiny_bundle.root, several))
    assert "without --batch" in told.value.next_step
    root = Path(shutil.copytree(tiny_bundle.root, tmp_path / "b"))
    write_with_tokens(tiny_bundle.root / "tokenizer", tmp_path / "more", ["<cat>"])
    shutil.copy(tmp_path / "more" / "tokenizer.json", root / "tokenizer" / "tokenizer.json")
    with pytest.raises(UsageError, match="knows <cat> of a textual inversion"):
        check_drawable(Bundle(root, tiny_bundle.manifest))


def test_a_damaged_bundle_makes_no_site(run, bundle_copy, packages, tmp_path):
    weights = bundle_copy / "unet_decoder" / "model.onnx.data"
    content = bytearray(weights.read_bytes())
    content[100] ^= 1
    weights.write_bytes(content)
    told = refused(run, bundle_copy, "--out", tmp_path / "site", "--packages", packages)
    assert "unet_decoder/model.onnx.data was altered" in told
    assert not (tmp_path / "site").exists()


def test_packages_that_are_not_whole_are_named(run, tiny_bundle, packages, tmp_path):
    (packages / VENDORED[0]).unlink()
    told = refused(run, tiny_bundle.root, "--out", tmp_path / "site", "--packages", packages)
    assert f"{VENDORED[0]} is missing" in told
    assert "bring its node_modules here, and pass --packages node_modules" in told


def test_without_npm_and_with_one_that_fails_the_way_by_hand_is_told(tmp_path, monkeypatch):
    monkeypatch.setattr(npm_packages, "user_cache_folder", lambda: tmp_path / "cache")
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(MissingExtraError, match="npm is not installed") as told:
        vendored_files()
    assert "Install Node.js; or run `npm ci` on another machine" in told.value.next_step
    npm = tmp_path / "npm"
    npm.write_text("#!/bin/sh\necho 'npm error network is down' >&2\nexit 1\n")
    npm.chmod(0o755)
    with pytest.raises(ResourceError, match=r"could not fetch .*: npm error network is down"):
        vendored_files()
    assert not list((tmp_path / "cache").rglob("*.mjs"))


def test_what_was_fetched_is_kept_whole_and_not_fetched_again(packages, tmp_path, monkeypatch):
    monkeypatch.setattr(npm_packages, "user_cache_folder", lambda: tmp_path / "cache")
    fetched: list[Path] = []

    def install(npm: str, folder: Path) -> None:
        fetched.append(folder)
        assert (folder / "package-lock.json").is_file()
        shutil.copytree(packages, folder / "node_modules")

    monkeypatch.setattr(npm_packages, "_install", install)
    monkeypatch.setattr(npm_packages.shutil, "which", lambda name: "npm")
    first = vendored_files()
    assert vendored_files() == first
    assert len(fetched) == 1
    assert [path.read_text("utf-8") for path in first.values()] == list(VENDORED)


def test_a_visitor_who_leaves_amid_a_file_is_passed_over_in_silence(tmp_path, capfd):
    (tmp_path / "large").write_bytes(bytes(64 << 20))
    with bound(LOOPBACK, 0) as listener:
        server = site_server(tmp_path, listener)
        thread = threading.Thread(target=server.serve_forever)
        thread.start()
        with socket.create_connection(listener.getsockname()) as visitor:
            visitor.sendall(b"GET /large HTTP/1.0\r\n\r\n")
            visitor.recv(1000)
            # Reset instead of an orderly end.
            visitor.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        server.shutdown()
        thread.join()
        server.server_close()
    assert capfd.readouterr().err == ""
