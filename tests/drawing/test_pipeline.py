"""Prompt to picture: seeds, order, batches, overrides, and failures that name the graph."""

from __future__ import annotations

import re
import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from fake_runtime import FakeRuntime

from tiue_export import Pipeline
from tiue_export._version import __version__
from tiue_export.bundle.read import Bundle
from tiue_export.drawing.picture import parameters_from_png, pixels_from_sample
from tiue_export.drawing.text_memory import TextMemory
from tiue_export.errors import BundleError, RuntimeFailure, TiueError, UsageError
from tiue_export.proof.gates import psnr_db
from tiue_export.proof.parity import PROMPTS, load_reference
from tiue_export.sampling.noise import MAX_SEED, noise_from_seed
from tiue_export.specs import BATCH, GRAPH_NAMES

SHAPE = (1, 4, 8, 8)
FOX = "a red fox"
HORSE = "an astronaut riding a horse"


@pytest.fixture(scope="module")
def pipeline(tiny_bundle):
    with Pipeline.open(tiny_bundle) as pipeline:
        yield pipeline


def assert_same(left, right):
    assert (left.prompt, left.seed) == (right.prompt, right.seed)
    np.testing.assert_array_equal(left.latents, right.latents)
    assert left.image.tobytes() == right.image.tobytes()


def test_a_picture_has_the_size_of_the_bundle_and_knows_what_made_it(pipeline):
    result = pipeline(FOX, seed=3)
    (picture,) = result.pictures
    assert (picture.prompt, picture.seed) == (FOX, 3)
    assert (picture.image.mode, picture.image.size) == ("RGB", (64, 64))
    assert (picture.latents.dtype, picture.latents.shape) == (np.float32, SHAPE[1:])
    assert result.images == [picture.image]


def test_the_seed_is_zero_unless_given(pipeline):
    assert_same(pipeline(FOX).pictures[0], pipeline(FOX, seed=0).pictures[0])


def test_equal_seeds_draw_equal_pictures_and_zero_is_a_seed(pipeline):
    zero = pipeline(FOX, seed=0).pictures[0]
    assert_same(zero, pipeline(FOX, seed=0).pictures[0])
    assert not np.array_equal(zero.latents, pipeline(FOX, seed=1).pictures[0].latents)


def test_another_prompt_draws_another_picture_from_the_same_noise(pipeline):
    fox, horse = pipeline([FOX, HORSE], seed=0).pictures
    assert not np.array_equal(fox.latents, horse.latents)


def test_several_prompts_come_in_order_each_with_its_own_run_of_seeds(pipeline):
    result = pipeline([FOX, HORSE, FOX], seed=4, count=2)
    drawn = [(picture.prompt, picture.seed) for picture in result.pictures]
    assert drawn == [(FOX, 4), (FOX, 5), (HORSE, 4), (HORSE, 5), (FOX, 4), (FOX, 5)]
    assert_same(result.pictures[0], result.pictures[4])
    assert_same(result.pictures[3], pipeline(HORSE, seed=5).pictures[0])


def test_a_tuple_of_prompts_is_as_good_as_a_list(pipeline):
    assert [p.prompt for p in pipeline((FOX, HORSE)).pictures] == [FOX, HORSE]


def test_on_picture_hears_each_picture_in_order_as_it_is_finished(pipeline):
    heard = []
    result = pipeline([FOX, HORSE], count=2, on_picture=heard.append)
    assert len(heard) == 4
    assert all(one is other for one, other in zip(heard, result.pictures, strict=True))


def test_on_picture_hears_the_first_before_the_second_is_drawn(tiny_bundle):
    runtime = FakeRuntime(tiny_bundle)
    events = []

    class Listening(FakeRuntime):
        def run(self, graph, feeds):
            events.append(graph)
            return runtime.run(graph, feeds)

    pipeline = Pipeline.open(tiny_bundle, Listening(tiny_bundle))
    pipeline(FOX, count=2, on_picture=lambda picture: events.append(picture.seed))
    assert events == [*GRAPH_NAMES, 0, *GRAPH_NAMES[1:], 1]


def test_an_error_in_on_picture_stops_the_drawing(pipeline):
    heard = []

    def full_disk(picture):
        heard.append(picture)
        raise OSError("disk full")

    with pytest.raises(OSError, match="disk full"):
        pipeline(FOX, count=3, on_picture=full_disk)
    assert len(heard) == 1


def test_time_is_told_for_the_four_stages_of_every_run(pipeline):
    stages = pipeline([f"{FOX} once", f"{FOX} twice"]).stage_latency_ms
    assert list(stages) == list(GRAPH_NAMES)
    for latencies in stages.values():
        assert len(latencies) == 2
        assert all(0 < latency < 60_000 for latency in latencies)


@pytest.mark.parametrize("shape", [SHAPE, SHAPE[1:]])
def test_latents_replace_the_noise_of_the_seed(pipeline, shape):
    noise = noise_from_seed(7, SHAPE)
    kept = noise.copy()
    drawn = pipeline(FOX, latents=noise.reshape(shape)).pictures[0]
    np.testing.assert_array_equal(drawn.latents, pipeline(FOX, seed=7).pictures[0].latents)
    np.testing.assert_array_equal(noise, kept)


def test_latents_serve_every_prompt(pipeline):
    noise = noise_from_seed(7, SHAPE)
    for picture, prompt in zip(
        pipeline([FOX, HORSE], latents=noise).pictures, [FOX, HORSE], strict=True
    ):
        expected = pipeline(prompt, seed=7).pictures[0]
        np.testing.assert_array_equal(picture.latents, expected.latents)


@pytest.mark.parametrize(
    "shape", [(4, 8, 7), (2, 4, 8, 8), (8, 8, 4), (256,), (1, 8, 8, 4), (1, 1, 4, 8, 8), ()]
)
def test_latents_of_a_wrong_shape_are_refused_naming_both(pipeline, shape):
    with pytest.raises(TiueError) as caught:
        pipeline(FOX, latents=np.zeros(shape, np.float32))
    assert "(" + ", ".join(map(str, shape)) in caught.value.message
    assert "4, 8, 8)" in caught.value.message


def test_latents_with_a_count_are_refused(pipeline):
    with pytest.raises(UsageError) as caught:
        pipeline(FOX, latents=noise_from_seed(0, SHAPE), count=2)
    assert caught.value.message == "latents fix the noise, so count must be 1"


@pytest.mark.parametrize("prompts", [[], ()])
def test_no_prompt_is_refused(pipeline, prompts):
    with pytest.raises(UsageError) as caught:
        pipeline(prompts)
    assert caught.value.message == "no prompt was given"


def test_the_empty_prompt_is_a_prompt(pipeline):
    assert len(pipeline("").images) == 1


@pytest.mark.parametrize("count", [0, -1])
def test_a_count_below_one_is_refused(pipeline, count):
    with pytest.raises(UsageError) as caught:
        pipeline(FOX, count=count)
    assert caught.value.message == f"count is {count}; expected 1 or more"


@pytest.mark.parametrize(("seed", "count"), [(-1, 1), (MAX_SEED + 1, 1), (MAX_SEED, 2)])
def test_a_seed_out_of_range_is_refused_before_anything_is_drawn(pipeline, seed, count):
    heard = []
    with pytest.raises(UsageError, match="is out of range"):
        pipeline(FOX, seed=seed, count=count, on_picture=heard.append)
    assert heard == []


def test_the_picture_is_that_of_the_stored_reference(pipeline, tiny_bundle):
    reference = load_reference(tiny_bundle).arrays
    picture = pipeline(PROMPTS[0], seed=0).pictures[0]
    assert psnr_db(reference["latents"][0], picture.latents) >= 100
    difference = pixels_from_sample(reference["picture"])[0].astype(int) - np.asarray(picture.image)
    assert np.abs(difference).max() <= 1


def test_the_stages_called_one_by_one_give_the_same_picture(pipeline):
    text = pipeline.embed([FOX])
    latents = pipeline.latents_from_noise(noise_from_seed(2, SHAPE), text)
    pixels = pixels_from_sample(pipeline.decode(latents))
    drawn = pipeline(FOX, seed=2).pictures[0]
    np.testing.assert_array_equal(latents[0], drawn.latents)
    np.testing.assert_array_equal(pixels[0], np.asarray(drawn.image))


def with_batch(bundle: Bundle, batch: int | str) -> Bundle:
    """The same contract for another batch."""

    def batched(tensors):
        return tuple(replace(t, shape=(batch, *t.shape[1:])) for t in tensors)

    manifest = bundle.manifest
    graphs = {
        name: replace(record, inputs=batched(record.inputs), outputs=batched(record.outputs))
        for name, record in manifest.graphs.items()
    }
    latents = (batch, *manifest.latent_shape[1:])
    return Bundle(bundle.root, replace(manifest, latent_shape=latents, graphs=graphs))


class RowByRow(FakeRuntime):
    """A fake whose rows do not depend on their neighbours; it keeps the batch sizes it saw."""

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(with_batch(bundle, 1))
        self.sizes = []

    def run(self, graph, feeds):
        size = len(next(iter(feeds.values())))
        self.sizes.append(size)
        rows = [
            super(RowByRow, self).run(graph, {k: v[row : row + 1] for k, v in feeds.items()})
            for row in range(size)
        ]
        return {name: np.concatenate([row[name] for row in rows]) for name in rows[0]}


@pytest.mark.parametrize(
    ("batch", "sizes"), [(1, [1] * 7), (3, [3, 3, 3]), (8, [8]), (BATCH, [4, 3])]
)
def test_the_batch_of_the_bundle_changes_no_picture(tiny_bundle, batch, sizes):
    prompts = [f"prompt {number}" for number in range(7)]
    single = Pipeline.open(with_batch(tiny_bundle, 1), RowByRow(tiny_bundle))(prompts, seed=9)
    runtime = RowByRow(tiny_bundle)
    result = Pipeline.open(with_batch(tiny_bundle, batch), runtime)(prompts, seed=9)
    assert [picture.prompt for picture in result.pictures] == prompts
    for one, other in zip(result.pictures, single.pictures, strict=True):
        assert_same(one, other)
    assert runtime.sizes[:: len(GRAPH_NAMES)] == sizes
    assert all(len(latencies) == len(sizes) for latencies in result.stage_latency_ms.values())


@pytest.mark.parametrize("bad", [np.nan, np.inf])
@pytest.mark.parametrize("graph", GRAPH_NAMES)
def test_a_non_finite_output_stops_the_drawing_and_names_the_graph(tiny_bundle, graph, bad):
    class Broken(FakeRuntime):
        def run(self, name, feeds):
            outputs = super().run(name, feeds)
            if name == graph:
                next(reversed(outputs.values())).flat[0] = bad
            return outputs

    heard = []
    with pytest.raises(RuntimeFailure) as caught:
        Pipeline.open(tiny_bundle, Broken(tiny_bundle))(FOX, on_picture=heard.append)
    spec = tiny_bundle.spec(graph).outputs[-1]
    assert caught.value.message == (
        f'{graph}: output "{spec.name}" holds 1 non-finite values of {np.prod(spec.shape)}'
    )
    assert heard == []


def test_the_context_manager_closes_the_runtime_even_after_an_error(tiny_bundle):
    closed = []

    class Closing(FakeRuntime):
        def close(self):
            closed.append(self)

    runtime = Closing(tiny_bundle)
    with Pipeline.open(tiny_bundle, runtime) as pipeline:
        pipeline(FOX)
        assert closed == []
    assert closed == [runtime]
    with pytest.raises(UsageError), Pipeline.open(tiny_bundle, runtime) as pipeline:
        pipeline([])
    assert closed == [runtime, runtime]


def test_a_picture_saves_itself_with_what_made_it(tiny_bundle, tmp_path):
    with Pipeline.open(tiny_bundle, "ort") as pipeline:
        (picture,) = pipeline(FOX, seed=3).pictures
        picture.save(tmp_path / "fox.png")
    assert parameters_from_png(tmp_path / "fox.png") == picture.parameters
    manifest, parameters = tiny_bundle.manifest, dict(picture.parameters)
    assert re.fullmatch("[0-9a-f]{10}", parameters.pop("graphs_hash"))
    assert parameters == {
        "prompt": FOX,
        "seed": 3,
        "steps": manifest.plan.steps,
        "size": "64x64",
        "model": manifest.source.name,
        "model_hash": manifest.source.sha256[:10],
        "precision": "fp32",
        "runtime": "ort cpu",
        "version": f"tiue-export {__version__}",
    }
    with pytest.raises(UsageError) as caught:
        picture.save(tmp_path / "fox.jpg")
    assert caught.value.message.endswith(
        "fox.jpg is no .png file, which carries how a picture was made"
    )
    assert "picture.image.save(PATH)" in caught.value.next_step


def test_more_pictures_than_one_run_plans_are_refused_at_once(tiny_bundle):
    with (
        Pipeline.open(tiny_bundle, FakeRuntime(tiny_bundle)) as pipeline,
        pytest.raises(UsageError) as caught,
    ):
        pipeline(FOX, count=10_000_000)
    assert caught.value.message == "10,000,000 pictures in one run; expected at most 1,000,000"
    assert caught.value.next_step == (
        "Draw them in several runs, each with its own --seed and --out."
    )


def test_a_path_is_opened_with_every_hash_checked(bundle_copy):
    assert len(Pipeline.open(str(bundle_copy), "ort")(FOX).images) == 1
    with (bundle_copy / "vae_decoder" / "model.onnx.data").open("r+b") as file:
        file.write(b"\xff\xff\xff\xff")
    with pytest.raises(BundleError, match=r"vae_decoder/model\.onnx\.data was altered"):
        Pipeline.open(bundle_copy, "ort")


@pytest.mark.parametrize("graph", ["text_encoder", "vae_decoder"])
def test_a_bundle_of_a_bare_unet_is_refused_before_a_runtime_opens(tiny_bundle, graph):
    graphs = {k: v for k, v in tiny_bundle.manifest.graphs.items() if k != graph}
    bare = Bundle(tiny_bundle.root, replace(tiny_bundle.manifest, graphs=graphs))
    with pytest.raises(BundleError, match=f"has no {graph}: it was exported from a checkpoint"):
        Pipeline.open(bare, "no such runtime")


def test_drawing_with_onnx_runtime_imports_neither_torch_nor_any_exporter(tiny_bundle):
    script = (
        "import sys\n"
        "from tiue_export import Pipeline\n"
        "with Pipeline.open(sys.argv[1]) as pipeline:\n"
        "    print(len(pipeline('a red fox', seed=0, count=2).images))\n"
        "heavy = {'torch', 'diffusers', 'transformers', 'onnx', 'onnxscript', 'psutil'}\n"
        "print(sorted(heavy & {name.partition('.')[0] for name in sys.modules}))\n"
    )
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", script, str(tiny_bundle.root)],
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.stdout.split("\n"), done.stderr) == (["2", "[]", ""], "")


def test_many_seeds_of_a_prompt_take_one_run_of_the_text_encoder(tiny_bundle):
    with Pipeline.open(tiny_bundle) as pipeline:
        result = pipeline(FOX, count=3)
        assert len(result.stage_latency_ms["text_encoder"]) == 1
        assert len(result.stage_latency_ms["unet_encoder"]) == 3
        assert "text_encoder" not in pipeline(FOX, seed=9).stage_latency_ms
        assert len(pipeline(HORSE).stage_latency_ms["text_encoder"]) == 1
    with Pipeline.open(tiny_bundle) as fresh:
        assert_same(result.pictures[2], fresh(FOX, seed=2).pictures[0])


def test_a_text_is_kept_though_its_runtime_uses_its_buffer_again(tiny_bundle):
    buffers: dict[str, np.ndarray] = {}

    class Reusing(FakeRuntime):
        def run(self, graph, feeds):
            for name, value in super().run(graph, feeds).items():
                buffers.setdefault(name, np.empty_like(value))[...] = value
            names = [spec.name for spec in tiny_bundle.spec(graph).outputs]
            return {name: buffers[name] for name in names}

    pipeline = Pipeline.open(tiny_bundle, Reusing(tiny_bundle))
    first = pipeline(FOX).pictures[0]
    pipeline(HORSE)
    assert_same(first, pipeline(FOX).pictures[0])


def test_the_text_that_was_not_asked_for_longest_is_forgotten():
    memory = TextMemory(kept=2)
    made = []

    def text_of(number):
        def embed():
            made.append(number)
            return np.full((1, 2, 3), number)

        return memory.embedding(np.full((1, 2), number), embed)[0, 0, 0]

    assert [text_of(number) for number in (1, 2, 1, 3, 1, 2)] == [1, 2, 1, 3, 1, 2]
    assert made == [1, 2, 3, 2]
