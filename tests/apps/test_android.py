"""The Android sample: its constants are the program's, and on a JVM it draws the same pictures.

All of it but `QnnGraphs.kt` and `MainActivity.kt` is plain Kotlin. `android/Answers.kt` runs that
on a JVM; the graphs it asks for are run here, so whatever differs is the sample's.
"""

from __future__ import annotations

import dataclasses
import re
import shutil
import struct
import subprocess
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from nasty_prompts import PROMPTS

from tiue_export import Pipeline, export_onnx
from tiue_export.bundle import chain
from tiue_export.bundle.manifest import (
    FORMAT_VERSION,
    Compiled,
    CompiledGraph,
    FileRecord,
    GraphRecord,
    Manifest,
)
from tiue_export.bundle.read import Bundle, file_records, open_bundle
from tiue_export.checkpoint.clip_tokenizer import OPENAI_PAD, OPENCLIP_PAD, write_clip_tokenizer
from tiue_export.checkpoint.tokenizer_files import write_tokenizer, write_with_tokens
from tiue_export.drawing.tokenizer import open_tokenizer
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.registry.backends import open_runtime
from tiue_export.runtimes import qnn
from tiue_export.runtimes.qnn import QnnRuntime
from tiue_export.sampling.noise import MAX_SEED, noises_from_seed
from tiue_export.sampling.plan import Combination, Pass, Plan
from tiue_export.specs import (
    CONTROLNET,
    GRAPH_NAMES,
    TEXT_ENCODER,
    UNET_DECODER,
    UNET_ENCODER,
    VAE_DECODER,
    Array,
    Feeds,
    RuntimeOptions,
    TensorSpec,
)
from tiue_export.system import qnn_provider
from tiue_export.system.snapdragon import SOCS

ROOT = Path(__file__).resolve().parents[2]
APP = ROOT / "apps/android/app"
SOURCES = APP / "src/main/kotlin/tiue/sample"
ON_A_JVM = Path(__file__).parent / "android"
LENGTH = 77


def source(name: str) -> str:
    """One file of the sample without its comments."""
    text = (SOURCES / name).read_text("utf-8")
    return re.sub(r"/\*.*?\*/|//[^\n]*", "", text, flags=re.DOTALL)


def fields(*kinds: type) -> set[str]:
    """The names that dataclasses have in a manifest."""
    return {field.name for kind in kinds for field in dataclasses.fields(kind)}


def read_from_json(name: str) -> set[str]:
    """The keys that a file of the sample looks up in JSON."""
    return set(re.findall(r'\["(\w+)"\]', source(name)))


def test_the_graphs_have_the_programs_names() -> None:
    named = dict(re.findall(r'const val (\w+) = "(\w+)"', source("Drawing.kt")))
    assert named == {name.upper(): name for name in (*GRAPH_NAMES, CONTROLNET)}


def test_the_tensors_have_the_chains_names() -> None:
    text = re.sub(r"const val .*|Failure\(.*", "", source("Drawing.kt"))
    assert set(re.findall(r'"(\w+)"', text)) == {
        chain.TOKENS, "last_hidden_state", chain.TEXT, chain.NOISE, chain.LATENTS,
        chain.SCALED_LATENTS, "timestep", "timesteps", "outputs",
    }  # fmt: skip
    of_text, of_vae = (TEXT_ENCODER, "last_hidden_state"), (VAE_DECODER, "sample")
    # Of the graphs that the app runs: it starts from no picture.
    renamed = {key: value for key, value in chain.ONE_PASS.renamed.items() if key[0] in GRAPH_NAMES}
    assert renamed == {of_text: chain.TEXT, of_vae: chain.PICTURE}


def test_what_is_read_of_a_plan_are_its_fields() -> None:
    read = read_from_json("Plan.kt")
    assert read <= fields(Plan, Pass, Combination)
    assert read > fields(Pass, Combination)  # all of these, and what of the plan decides drawing
    assert read >= {"passes", "latents", "guidance", "max_decoder_rows", "open_time"}


def test_what_is_read_of_a_manifest_are_its_fields() -> None:
    parts = (Manifest, GraphRecord, Compiled, CompiledGraph, FileRecord, TensorSpec)
    assert read_from_json("Bundle.kt") <= fields(*parts) | {"htp", "decoder_steps"}
    assert f"if (format != {FORMAT_VERSION})" in source("Bundle.kt")
    assert f'PREFIX = "{qnn._PREFIX}"' in source("Bundle.kt")


def test_the_chips_are_those_that_contexts_are_compiled_for() -> None:
    listed = dict(re.findall(r'"(sm\d+)" to "(v\d+)"', source("Bundle.kt")))
    assert listed == {name: soc.htp for name, soc in SOCS.items() if name.startswith("sm")}


def test_sessions_are_opened_as_the_program_opens_them(monkeypatch: pytest.MonkeyPatch) -> None:
    entries: dict[str, str] = {}
    settings: dict[str, str] = {}

    class Options:
        def add_session_config_entry(self, key: str, value: str) -> None:
            entries[key] = value

        def add_provider_for_devices(
            self, devices: list[object], chosen: Mapping[str, str]
        ) -> None:
            settings.update(chosen)

    npu = SimpleNamespace(device=SimpleNamespace(type="NPU"))
    ort = SimpleNamespace(
        OrtHardwareDeviceType=SimpleNamespace(NPU="NPU"),
        SessionOptions=Options,
        InferenceSession=lambda *args, **options: None,
    )
    plugin = SimpleNamespace(get_qnn_htp_path=lambda: "libQnnHtp.so")
    monkeypatch.setattr(qnn_provider, "import_onnx_runtime", lambda: ort)
    monkeypatch.setattr(qnn_provider, "_devices", lambda ort: [npu])
    monkeypatch.setattr(qnn_provider.importlib, "import_module", lambda name: plugin)
    form = SimpleNamespace(
        target={"htp": "v75"},
        flags={"precision": "fp16"},
        graphs={"g": SimpleNamespace(path="g.onnx")},
    )
    bundle = SimpleNamespace(root=Path())
    QnnRuntime(bundle, form, emulated=False, keep=True)._session("g")

    text = source("QnnGraphs.kt").replace("$libraries/", "")
    assert dict(re.findall(r'addConfigEntry\("(.+?)", "(.+?)"\)', text)) == entries
    listed = re.search(r"val settings = mapOf\((.*)\)", text)
    assert listed is not None
    assert dict(re.findall(r'"(.+?)" to "(.+?)"', listed[1])) == settings


def test_the_plug_in_goes_by_its_own_name() -> None:
    plugin = pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    text = source("QnnGraphs.kt")
    assert f'PROVIDER = "{plugin.get_ep_name()}"' in text
    assert f'"{Path(plugin.get_library_path()).name}"' in text
    assert f'/{Path(plugin.get_qnn_htp_path()).name}"' in text


def test_the_app_is_built_with_what_compiled_and_emulated_the_contexts() -> None:
    text = (APP / "build.gradle.kts").read_text("utf-8")
    built = dict(re.findall(r'val (\w+) = "([\d.]+)"', text))
    pinned = re.findall(r"^([\w-]+)==([\d.]+)", (ROOT / "constraints.txt").read_text("utf-8"), re.M)
    pins = dict(pinned)
    assert built["onnxRuntime"] == pins["onnxruntime"]
    assert built["qnnPlugin"] == pins["onnxruntime-qnn"]
    pytest.importorskip("onnxruntime_qnn", reason="onnxruntime-qnn is not installed")
    if qnn_provider.qnn_versions()[0] == built["qnnPlugin"]:
        assert built["qnnRuntime"] == qnn_provider.qnn_versions()[1]


# On a JVM.
needs_kotlin = pytest.mark.skipif(
    not (shutil.which("kotlinc") and shutil.which("java")),
    reason="kotlinc (npm: kotlin-compiler) or java (Debian: default-jre-headless) is not installed",
)
Run = Callable[[str, Feeds], Mapping[str, Array]]


def number(value: int, code: str = "i") -> bytes:
    return struct.pack(f">{code}", value)


def text_of(words: str | Path) -> bytes:
    raw = str(words).encode()
    return number(len(raw)) + raw


@dataclass(frozen=True)
class Sample:
    """The sample's process (`Answers.kt`): each method asks for one thing, and waits for it."""

    process: subprocess.Popen[bytes]

    def noise(self, seed: int, count: int, size: int) -> Array:
        """(count, size) float32."""
        self._ask(b"n", number(seed, "q"), number(count), number(size))
        return np.stack([self._floats() for _ in range(count)])

    def tokens(self, folder: Path, prompt: str) -> list[int]:
        self._ask(b"t", text_of(folder), text_of(prompt))
        return [int(value) for value in self._floats()]

    def htp(self, model: str) -> str:
        self._ask(b"c", text_of(model))
        return self._text()

    def form(self, folder: Path, htp: str, sdk: str) -> list[str]:
        self._ask(b"f", text_of(folder), text_of(htp), text_of(sdk))
        return self._text().split()

    def draw(
        self, folder: Path, run: Run, prompt: str, seed: int, negative: str = "", steps: int = 1
    ) -> tuple[Array, Array]:
        """Latents (n,) float32 and pixels (H, W, 3) uint8; `run` runs the graphs."""
        words = (text_of(folder), text_of(prompt), text_of(negative))
        self._ask(b"d", *words, number(steps), number(seed, "q"), run=run)
        latents = self._floats()
        width, height = self._number(), self._number()
        colours = np.frombuffer(self._exactly(4 * width * height), np.uint8)
        alpha, pixels = np.split(colours.reshape(height, width, 4), [1], axis=2)
        assert (alpha == 255).all()
        return latents, pixels

    def _ask(self, *parts: bytes, run: Run | None = None) -> None:
        """Send, answer what graphs are to be run, and return when the result comes."""
        self._send(*parts)
        while (kind := self._exactly(1)) != b"\1":
            if kind == b"\0":
                raise Refused(self._text())
            assert run is not None
            graph = self._text()
            outputs = run(graph, dict(self._tensor() for _ in range(self._number())))
            self._send(number(len(outputs)))
            for name, array in outputs.items():
                shape = b"".join(map(number, array.shape))
                values = array.astype(">f4").tobytes()
                self._send(text_of(name), number(array.ndim), shape, number(array.size), values)

    def _tensor(self) -> tuple[str, Array]:
        name = self._text()
        shape = [self._number() for _ in range(self._number())]
        array = self._floats().reshape(shape)
        return name, array.astype(np.int64) if name == chain.TOKENS else array

    def _send(self, *parts: bytes) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(b"".join(parts))
        self.process.stdin.flush()

    def _exactly(self, size: int) -> bytes:
        assert self.process.stdout is not None
        content = self.process.stdout.read(size)
        assert len(content) == size, "the sample ended"
        return content

    def _number(self) -> int:
        return int.from_bytes(self._exactly(4), "big")

    def _text(self) -> str:
        return self._exactly(self._number()).decode()

    def _floats(self) -> Array:
        return np.frombuffer(self._exactly(4 * self._number()), ">f4").astype(np.float32)


class Refused(Exception):
    """The sample's own words for why it does not go on."""


def write_signatures(folder: Path) -> Path:
    """The Java files of `signatures.txt`; returns `folder`."""
    text = (ON_A_JVM / "signatures.txt").read_text("utf-8")
    for part in re.split(r"^(?=package )", text, flags=re.MULTILINE)[1:]:
        package, kind = (
            re.search(pattern, part, re.MULTILINE)
            for pattern in (r"^package ([\w.]+);", r"^public .*?\b(?:class|interface|enum) (\w+)")
        )
        assert package is not None
        assert kind is not None
        file = folder / package[1].replace(".", "/") / f"{kind[1]}.java"
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(part, "utf-8")
    return folder


@pytest.fixture(scope="module")
def sample(made_once) -> Iterator[Sample]:
    """The whole sample compiled, and its plain part running."""

    def compile_it(folder: Path) -> None:
        signatures = write_signatures(folder / "signatures")
        files = [*SOURCES.glob("*.kt"), ON_A_JVM / "Answers.kt", signatures]
        line = ["kotlinc", "-Werror", "-include-runtime", "-d", folder / "sample.jar", *files]
        done = subprocess.run(line, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stderr

    jar = made_once("android", compile_it) / "sample.jar"
    line = ["java", "-cp", jar, "tiue.sample.AnswersKt"]
    with subprocess.Popen(line, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        yield Sample(process)
        process.stdin.close()


@needs_kotlin
@pytest.mark.parametrize("seed", [0, 1, 42, 2**31, MAX_SEED])
def test_a_seed_draws_the_programs_noise(sample: Sample, seed: int) -> None:
    expected = noises_from_seed(seed, 3, (1, 4, 32, 32)).reshape(3, -1)
    np.testing.assert_array_equal(sample.noise(seed, 3, 4 * 32 * 32), expected)


@needs_kotlin
def test_a_seed_of_more_than_32_bits_is_refused(sample: Sample) -> None:
    with pytest.raises(Refused, match="seed 4294967296 is out of range; expected 0 to 4294967295"):
        sample.noise(MAX_SEED + 1, 1, 4)


def with_tokenizer(bundle: Bundle, tokens: Path, folder: Path) -> Path:
    """A bundle of this manifest and tokenizer, no more: what the sample reads."""
    write_tokenizer(tokens, folder / "tokenizer", LENGTH)
    (folder / "tiue.json").write_text(bundle.manifest.to_json(), "utf-8")
    return folder


@needs_kotlin
@pytest.mark.parametrize("pad", [OPENAI_PAD, OPENCLIP_PAD])
def test_prompts_become_the_programs_tokens(sample, tiny_bundle, tmp_path, pad) -> None:
    tokens = tmp_path / "clip"
    tokens.mkdir()
    write_clip_tokenizer(tokens, pad)
    folder = with_tokenizer(tiny_bundle, tokens, tmp_path / "bundle")
    expected = open_tokenizer(folder / "tokenizer/tokenizer.json", LENGTH)
    for prompt in PROMPTS:
        assert sample.tokens(folder, prompt) == expected([prompt])[0].tolist(), prompt


@needs_kotlin
def test_chunks_of_a_long_prompt_are_the_programs(sample, tiny_bundle, tmp_path) -> None:
    size = tiny_bundle.manifest.text_shape
    longer = replace(tiny_bundle.manifest, text_shape=(1, 2 * LENGTH, size[2]), text_chunks=2)
    folder = tmp_path / "long"
    shutil.copytree(tiny_bundle.root / "tokenizer", folder / "tokenizer")
    (folder / "tiue.json").write_text(longer.to_json(), "utf-8")
    expected = open_tokenizer(folder / "tokenizer/tokenizer.json", 2 * LENGTH, 2)
    for prompt in PROMPTS:
        assert sample.tokens(folder, prompt) == expected([prompt])[0].tolist(), prompt


@needs_kotlin
def test_words_of_textual_inversions_are_refused(sample, tiny_bundle, tmp_path) -> None:
    (tmp_path / "clip").mkdir()
    write_clip_tokenizer(tmp_path / "clip", OPENAI_PAD)
    write_with_tokens(tmp_path / "clip", tmp_path / "more", ["<cat>"])
    folder = with_tokenizer(tiny_bundle, tmp_path / "more", tmp_path / "bundle")
    with pytest.raises(Refused, match=r"textual inversions.*\nExport it without --embedding"):
        sample.tokens(folder, "a <cat>")


@pytest.fixture(scope="session")
def bundle_in_pieces(micro_pipeline, made_once) -> Bundle:
    """A student whose four rows run one after another, so that the sum is the device's. Shared."""
    request = CheckpointRequest(str(micro_pipeline))
    student = load_for_method(request, "tiue", SamplingOptions(max_decoder_rows=1))
    return open_bundle(made_once("in-pieces", lambda folder: export_onnx(student, folder)))


class OnCpu(QnnRuntime):
    """The Snapdragon's runtime, its contexts' runs done by ONNX Runtime's CPU kernels."""

    def __init__(self, bundle: Bundle, decoder_steps: int) -> None:
        flags = {"precision": "fp16", "decoder_steps": decoder_steps}
        form = Compiled("qnn", "", {"htp": "v75"}, flags, {})
        super().__init__(bundle, form, emulated=False, keep=True)
        self.exact = open_runtime("ort", bundle, RuntimeOptions(device="cpu"))
        self.steps: list[int] = []

    def _run(self, graph: str, feeds: Feeds) -> dict[str, Array]:
        if graph == UNET_DECODER:
            self.steps.append(len(feeds.get("timesteps", ())))
        return self.exact.run(graph, feeds)


# Ways to draw; the steps that the decoder's context takes, and those of its runs.
DRAWN = {
    "one pass": ("tiny_bundle", 1, [0]),
    "rows in pieces": ("bundle_in_pieces", 1, [1] * 4),
    "three passes, fresh noise between them": ("few_step_bundle", 1, [1] * 3),
    "guidance": ("faster_bundle", 1, [1] * 6),
    "guidance, and runs that are filled up": ("faster_bundle", 2, [2] * 4),
}


@needs_kotlin
@pytest.mark.parametrize("way", DRAWN)
def test_the_picture_is_the_programs_to_the_last_bit(sample: Sample, request, way: str) -> None:
    name, steps, taken = DRAWN[way]
    bundle = request.getfixturevalue(name)
    negative = "a blue cat" if bundle.manifest.plan.guidance is not None else None
    runtime = OnCpu(bundle, steps)
    with Pipeline.open(bundle, runtime) as pipeline:
        words = ("a red fox", 3, negative or "")
        latents, pixels = sample.draw(bundle.root, runtime._run, *words, steps)
        (expected,) = pipeline("a red fox", seed=3, negative_prompt=negative).pictures
    assert runtime.steps == taken * 2, "the sample's runs, and then the program's"
    np.testing.assert_array_equal(latents, expected.latents.ravel())
    np.testing.assert_array_equal(pixels, np.asarray(expected.image))


@needs_kotlin
def test_numbers_that_are_none_are_an_error_with_the_graphs_name(sample, tiny_bundle) -> None:
    def run(graph: str, feeds: Feeds) -> dict[str, Array]:
        shape = tiny_bundle.spec(graph).outputs[0].shape
        name = tiny_bundle.spec(graph).outputs[0].name
        return {name: np.full(shape, np.nan if graph == UNET_ENCODER else 0, np.float32)}

    with pytest.raises(Refused, match=r"unet_encoder: .* holds values that are no numbers"):
        sample.draw(tiny_bundle.root, run, "", 0)


# Contexts.


@pytest.fixture
def packed(tiny_bundle: Bundle, tmp_path: Path) -> Bundle:
    """A bundle with contexts for two chips that hold nothing but their names."""
    compiled = {}
    for htp, soc in (("v75", "sm8650"), ("v79", "sm8750")):
        graphs = {}
        for graph in tiny_bundle.manifest.graphs:
            names = [f"qnn-{htp}/{graph}.onnx", f"qnn-{htp}/{graph}_qnn.bin"]
            for name in names:
                (tmp_path / name).parent.mkdir(exist_ok=True)
                (tmp_path / name).write_text(name)
            graphs[graph] = CompiledGraph(names[0], "", file_records(tmp_path, names))
        flags = {"precision": "fp16", "optimization": 3, "decoder_steps": 2}
        compiled[f"qnn-{htp}"] = Compiled("qnn", "2.51.0", {"htp": htp, "soc": soc}, flags, graphs)
    bundle = Bundle(tmp_path, replace(tiny_bundle.manifest, compiled=compiled))
    return retold(bundle)


def retold(bundle: Bundle, **changes: object) -> Bundle:
    """The same files, of which tiue.json says something else."""
    told = replace(bundle.manifest, **changes)
    (bundle.root / "tiue.json").write_text(told.to_json(), "utf-8")
    return Bundle(bundle.root, told)


@needs_kotlin
def test_the_contexts_are_those_for_the_chip(sample: Sample, packed: Bundle) -> None:
    assert sample.htp("SM8750-AC") == "v79"
    assert sample.htp("MT6989") == ""
    htp, steps, *contexts = sample.form(packed.root, "v79", "2.51.0")
    assert (htp, steps) == ("v79", "2")
    assert contexts == [str(packed.root / f"qnn-v79/{graph}.onnx") for graph in GRAPH_NAMES]


@needs_kotlin
def test_for_a_chip_that_is_not_known_only_a_single_form_is_taken(sample, packed) -> None:
    with pytest.raises(Refused, match=r"for \[v75, v79\]; this chip's HTP is not known\nName its"):
        sample.form(packed.root, "", "2.51.0")
    retold(packed, compiled={"qnn-v75": packed.manifest.compiled["qnn-v75"]})
    assert sample.form(packed.root, "", "2.51.0")[0] == "v75"


@needs_kotlin
def test_contexts_for_other_chips_are_refused(sample, packed) -> None:
    with pytest.raises(Refused, match=r"HTP is v81\nMake them: tiue-export qnn .* --htp 81"):
        sample.form(packed.root, "v81", "2.51.0")


@needs_kotlin
def test_contexts_of_a_newer_sdk_are_refused_and_point_releases_are_not(sample, packed) -> None:
    with pytest.raises(
        Refused, match=r"SDK 2.51.0, the app has the older 2.50.0\nRaise qnnRuntime"
    ):
        sample.form(packed.root, "v75", "2.50.0")
    form = replace(packed.manifest.compiled["qnn-v75"], version="2.50.40")
    retold(packed, compiled={"qnn-v75": form})
    assert sample.form(packed.root, "v75", "2.50.0")[0] == "v75"


@needs_kotlin
def test_an_altered_or_missing_context_is_refused(sample, packed) -> None:
    binary = packed.root / "qnn-v75/vae_decoder_qnn.bin"
    binary.write_text("something else")
    with pytest.raises(Refused, match=r"vae_decoder_qnn.bin was altered.*\nCopy the bundle again"):
        sample.form(packed.root, "v75", "2.51.0")
    binary.unlink()
    with pytest.raises(Refused, match=r"has no qnn-v75/vae_decoder_qnn.bin"):
        sample.form(packed.root, "v75", "2.51.0")


def in_batches(told: Manifest) -> Manifest:
    return replace(told, latent_shape=(2, *told.latent_shape[1:]))


def with_controlnet(told: Manifest) -> Manifest:
    return replace(told, graphs={**told.graphs, CONTROLNET: told.graphs[VAE_DECODER]})


def in_tiles(told: Manifest) -> Manifest:
    record = told.graphs[VAE_DECODER]
    (spec,) = record.inputs
    tile = replace(record, inputs=(replace(spec, shape=(1, 4, 4, 4)),))
    return replace(told, graphs={**told.graphs, VAE_DECODER: tile})


@needs_kotlin
@pytest.mark.parametrize(
    ("change", "words"),
    [
        (
            in_batches,
            "in batches of 2, which this sample does not draw\nExport it again with --batch",
        ),
        (
            with_controlnet,
            "a ControlNet, which this sample .*\nExport it again without --controlnet",
        ),
        (in_tiles, "a VAE that decodes tiles, which .*\nExport it again without --vae-tile"),
    ],
)
def test_what_the_sample_does_not_draw_is_refused_with_the_way_out(
    sample, packed, change: Callable[[Manifest], Manifest], words: str
) -> None:
    (packed.root / "tiue.json").write_text(change(packed.manifest).to_json(), "utf-8")
    with pytest.raises(Refused, match=words):
        sample.form(packed.root, "v75", "2.51.0")


@needs_kotlin
@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "tiue.json is no JSON: it breaks at letter 0 of 0"),
        ('{"format_version": 2', "is no JSON: it breaks at letter 20 of 20"),
        (
            '{"format_version": "\\u00e9\\n"}',
            "tiue.json.format_version is \u00e9\n; expected a number",
        ),
        ('{"format_version": 1.5}', "tiue.json.format_version is 1.5; expected a whole number"),
        ('{"format_version": 3}', "tiue.json has format 3; expected 2"),
        ('{"graphs": [], "format_version": 2}', "tiue.json has no plan"),
        ("[1]", r"tiue.json is \[1.0\]; expected an object"),
    ],
)
def test_a_manifest_that_is_none_is_refused_with_its_place(sample, tmp_path, text, words) -> None:
    (tmp_path / "tiue.json").write_text(text, "utf-8")
    with pytest.raises(Refused, match=words):
        sample.form(tmp_path, "v75", "2.51.0")
