"""The page's modules in Node, held against Python: noise, tokens, the loop, pixels, the backend.

Skipped, with the reason, where Node or npm's packages are not at hand.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from nasty_prompts import PROMPTS as NASTY
from npm_at_hand import npm_files
from PIL import Image

from tiue_export import export_onnx, open_bundle
from tiue_export.apps.browser.npm_packages import HERE
from tiue_export.bundle.read import REFERENCE_FILE, Bundle
from tiue_export.checkpoint.clip_tokenizer import OPENAI_PAD, OPENCLIP_PAD, write_clip_tokenizer
from tiue_export.checkpoint.tokenizer_files import write_tokenizer
from tiue_export.drawing.picture import pixels_from_sample
from tiue_export.drawing.tokenizer import open_tokenizer
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import load_reference
from tiue_export.sampling.noise import MAX_SEED, noises_from_seed
from tiue_export.specs import Array

NODE, NPM = shutil.which("node"), shutil.which("npm")
ON_NODE = "onnxruntime-node@1.30.0"
PAGE = HERE / "page"
ANSWERS = Path(__file__).parent / "web_page" / "answers.mjs"
# Known to differ: the mark of byte order is a space to JavaScript's patterns.
PROMPTS = tuple(prompt.replace("\ufeff", "") for prompt in NASTY)

pytestmark = pytest.mark.skipif(NODE is None, reason="Node is not installed")


def answer(work: str, **question: Any) -> Any:
    """What the page's modules make of a question."""
    vendor = npm_files()["tokenizers.min.mjs"] if work == "tokens" else ""
    done = subprocess.run(
        [str(NODE), str(ANSWERS), str(PAGE), str(vendor)],
        input=json.dumps({"work": work, **question}),
        capture_output=True,
        text=True,
        check=True,
        timeout=120,
    )
    said = json.loads(done.stdout.splitlines()[-1])
    if "error" in said:
        raise AssertionError(said["error"])
    return said["value"]


def as_hex(array: Array) -> str:
    return np.ascontiguousarray(array, np.float32).tobytes().hex()


def from_hex(text: str) -> Array:
    return np.frombuffer(bytes.fromhex(text), np.float32)


# Noise and words


@pytest.mark.parametrize("seed", [0, 1, 42, 1234567, MAX_SEED])
def test_a_seed_draws_numpys_noise_to_the_last_bit(seed):
    draws = answer("normals", seed=seed, sizes=[6144, 6144, 1])
    expected = noises_from_seed(seed, 2, (1, 4, 32, 48))
    assert np.array_equal(from_hex(draws[0]), expected[0].ravel())
    assert np.array_equal(from_hex(draws[1]), expected[1].ravel())
    assert len(from_hex(draws[2])) == 1


@pytest.mark.parametrize("seed", [-1, 2**32, 0.5])
def test_a_seed_out_of_range_is_told(seed):
    with pytest.raises(AssertionError, match="expected 0 to 4294967295"):
        answer("normals", seed=seed, sizes=[1])


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("pad", [OPENAI_PAD, OPENCLIP_PAD])
def test_prompts_become_the_tokens_of_python(tmp_path, pad, chunks):
    (tmp_path / "clip").mkdir()
    write_clip_tokenizer(tmp_path / "clip", pad)
    folder = tmp_path / "tokenizer"
    write_tokenizer(tmp_path / "clip", folder, 77)
    expected = open_tokenizer(folder / "tokenizer.json", 77 * chunks, chunks)(PROMPTS)
    question = {"folder": str(folder), "length": 77 * chunks, "chunks": chunks}
    for prompt, ids, own in zip(
        PROMPTS, answer("tokens", prompts=PROMPTS, **question), expected, strict=True
    ):
        assert ids == own.tolist(), prompt


# Pixels and proof


def test_pixels_are_rounded_as_python_does():
    edges = [-1.2, -1, -0.999, -1e-8, 0, 1e-8, 0.00393, 0.5, 0.999, 1, 1.2, np.nextafter(0.5, 1)]
    values = np.concatenate([edges, np.random.default_rng(0).normal(size=3 * 64 - len(edges))])
    sample = values.astype(np.float32).reshape(1, 3, 8, 8)
    rgba = np.frombuffer(bytes.fromhex(answer("pixels", sample=as_hex(sample))), np.uint8)
    assert np.array_equal(rgba.reshape(8, 8, 4)[..., :3], pixels_from_sample(sample)[0])
    assert (rgba.reshape(-1, 4)[:, 3] == 255).all()


def test_psnr_is_pythons():
    rng = np.random.default_rng(1)
    reference = rng.normal(size=500).astype(np.float32)
    for error in (1e-6, 1e-2, 10):
        value = (reference + error * rng.normal(size=500)).astype(np.float32)
        got = answer("psnr", reference=as_hex(reference), value=as_hex(value))
        assert got == pytest.approx(psnr_db(reference, value), abs=1e-6)
    assert answer("psnr", reference=as_hex(reference), value=as_hex(reference)) == 300
    broken = np.full(500, np.nan, np.float32)
    assert answer("psnr", reference=as_hex(reference), value=as_hex(broken)) == 0


def test_the_reference_is_read_whole(micro_bundle):
    tensors = answer("tensors", file=str(micro_bundle.root / REFERENCE_FILE))
    known = load_reference(micro_bundle).arrays
    assert {name for name, _, _ in tensors} == set(known)
    for name, dims, values in tensors:
        assert tuple(dims) == known[name].shape
        assert bytes.fromhex(values) == known[name].tobytes()


# Which part of a machine draws


GPU = {"features": ["shader-f16"], "largest": 2**31, "info": {"isFallbackAdapter": False}}


@pytest.mark.parametrize(
    ("wanted", "adapter", "half", "name", "why"),
    [
        ("auto", GPU, True, "webgpu", ""),
        ("auto", None, True, "wasm", "this browser offers no WebGPU"),
        ("webgpu", {"features": None}, False, "wasm", "this browser offers no WebGPU"),
        ("wasm", GPU, True, "wasm", "as chosen"),
        ("webgpu", {**GPU, "features": []}, True, "wasm", "does not compute in half precision"),
        ("webgpu", {**GPU, "features": []}, False, "webgpu", ""),
        ("webgpu", {**GPU, "largest": 1000}, False, "wasm", "larger than this GPU's buffers"),
        ("auto", {**GPU, "info": {"isFallbackAdapter": True}}, False, "wasm", "emulated"),
        ("auto", {**GPU, "info": {"architecture": "swiftshader"}}, False, "wasm", "emulated"),
        ("webgpu", {**GPU, "info": {"isFallbackAdapter": True}}, False, "webgpu", ""),
    ],
)
def test_the_gpu_draws_where_the_graphs_fit_it_and_else_the_reason_is_told(
    wanted, adapter, half, name, why
):
    question = {"wanted": wanted, "adapter": adapter, "half": half, "largestTensorBytes": 10**6}
    chosen = answer("backend", **question)
    assert chosen["name"] == name
    assert why in chosen["why"]
    assert bool(why) == bool(chosen["why"])


# Half precision


def test_all_halves_are_read_exactly():
    halves = np.arange(2**16, dtype=np.uint16)
    read = from_hex(answer("from_half", halves=halves.tolist()))
    expected = halves.view(np.float16).astype(np.float32)
    assert np.array_equal(read, expected, equal_nan=True)
    assert np.array_equal(np.signbit(read[:-1024]), np.signbit(expected[:-1024]))


def test_halves_are_rounded_as_numpy_rounds_them():
    halves = np.arange(2**16, dtype=np.uint16).view(np.float16).astype(np.float32)
    finite = np.sort(halves[np.isfinite(halves)])
    ties = (finite[:-1] + finite[1:]) / 2
    beside = [np.nextafter(ties, np.float32(side)) for side in (-np.inf, np.inf)]
    random = np.random.RandomState(0).standard_normal(20000) * 10.0 ** np.arange(-9, 7).repeat(1250)
    special = np.array([np.inf, -np.inf, np.nan, -0.0, 65519.99, 65520, 1e-8, 3e38], np.float32)
    values = np.concatenate([halves, ties, *beside, random.astype(np.float32), special])
    bits = np.array(answer("to_half", values=as_hex(values)), np.uint16)
    with np.errstate(over="ignore"):
        expected = values.astype(np.float16)
    assert np.array_equal(bits.view(np.float16), expected, equal_nan=True)
    known = ~np.isnan(values)
    assert np.array_equal(bits[known], expected.view(np.uint16)[known])


# Text


def test_another_seed_of_a_prompt_runs_no_text_encoder():
    drawn = [["", "fox"], ["", "fox"], ["red", "fox"], ["", "fox"]]
    told = answer("texts", drawn=drawn)
    assert told["runs"] == 2 * 3  # with and without the prompt; the last picture's alone are known
    assert from_hex(told["texts"][1]).tolist() == [float(ord(letter)) for letter in "    fox "]
    assert told["texts"][0] == told["texts"][1] == told["texts"][3] != told["texts"][2]


# Sessions


def sessions(budget: int, *asked: str) -> list[str]:
    sizes = {"text": 2, "encoder": 3, "decoder": 4, "vae": 1}
    log: list[str] = answer("sessions", sizes=sizes, budget=budget, asked=asked)
    return [line for line in log if not line.startswith("run ")]


def test_sessions_that_fit_stay_open():
    once = ["open text", "open encoder", "open decoder", "open vae"]
    assert sessions(10, *["text", "encoder", "decoder", "vae"] * 2) == once


def test_what_was_used_longest_ago_is_closed_for_the_next():
    asked = ("text", "encoder", "decoder", "encoder", "vae", "text")
    assert sessions(8, *asked) == [
        "open text", "open encoder",
        "close text", "open decoder",  # 3 + 4
        "open vae",  # 8 in all
        "close decoder", "open text",
    ]  # fmt: skip


def test_a_session_larger_than_the_budget_is_alone():
    assert sessions(1, "text", "decoder", "decoder", "vae") == [
        "open text", "close text", "open decoder", "close decoder", "open vae",
    ]  # fmt: skip


# Whole pictures, by onnxruntime-node


@pytest.fixture(scope="session")
def node_folder(made_once) -> Path:
    """draw.mjs as a user has it, its packages beside it. Shared."""

    def install(folder: Path) -> None:
        shutil.copytree(HERE, folder, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
        options = ["--ignore-scripts", "--no-audit", "--no-fund", "--omit=optional"]
        line = [str(NPM), "install", *options, ON_NODE]
        done = subprocess.run(line, cwd=folder, capture_output=True, text=True, timeout=600)
        if done.returncode != 0:
            pytest.skip(f"npm cannot fetch {ON_NODE}: {done.stderr.splitlines()[:1]}")

    npm_files()  # skips without a network
    return made_once("draw-in-node", install)


@pytest.fixture(scope="session")
def bundle_in_parts(micro_pipeline, made_once) -> Bundle:
    """A student whose four rows run one after another, so that the sum is the page's. Shared."""
    request = CheckpointRequest(str(micro_pipeline))
    student = load_for_method(request, "tiue", SamplingOptions(max_decoder_rows=1))
    return open_bundle(made_once("in-parts", lambda folder: export_onnx(student, folder)))


@pytest.mark.parametrize("kind", ["tiny", "half", "parts", "few_step", "faster"])
def test_node_draws_the_pictures_of_generate(kind, request, node_folder, run, tmp_path):
    """In one pass, in half precision too; in pieces; in passes with fresh noise; with guidance."""
    name = {"parts": "bundle_in_parts"}.get(kind, f"{kind}_bundle")
    bundle = request.getfixturevalue(name)
    prompt, seed = "a red fox, in the SNOW", 7
    drawn = tmp_path / "node.png"
    line = [str(NODE), "draw.mjs", str(bundle.root), prompt, str(drawn), str(seed)]
    done = subprocess.run(line, cwd=node_folder, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "UNet" in done.stdout
    own = tmp_path / "own.png"
    code, _, err = run(
        "generate", bundle.root, prompt, "--seed", seed, "--runtime", "ort", "--device", "cpu",
        "--out", own,
    )  # fmt: skip
    assert code == 0, err
    pictures = [np.asarray(Image.open(path).convert("RGB"), np.int16) for path in (drawn, own)]
    # Two builds of ONNX Runtime: the last bit of a float may round a pixel to its neighbour.
    assert np.abs(pictures[0] - pictures[1]).max() <= 1


def test_node_says_how_it_is_used(node_folder):
    done = subprocess.run(
        [str(NODE), "draw.mjs"], cwd=node_folder, capture_output=True, text=True, check=False
    )
    assert done.returncode == 2
    assert done.stderr.startswith("usage: node draw.mjs BUNDLE")
