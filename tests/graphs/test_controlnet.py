"""A ControlNet that runs at key steps only: diffusers' sums, a picture to follow, its limits."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel, StableDiffusionControlNetPipeline
from fake_runtime import FakeRuntime
from PIL import Image
from teachers import load_teacher

from tiue_export import Pipeline, export_onnx
from tiue_export.benchmarks.synthetic import fill
from tiue_export.bundle.manifest import GraphRecord
from tiue_export.bundle.read import Bundle
from tiue_export.checkpoint.family import load_family
from tiue_export.errors import CheckpointError, UnsupportedModelError, UsageError
from tiue_export.graphs.build import build_graphs, run_graph
from tiue_export.graphs.options import ExportOptions
from tiue_export.methods.faster import with_controlnet
from tiue_export.methods.load import load_student
from tiue_export.methods.scheduler import diffusers_scheduler, plan_from_config
from tiue_export.proof.gates import psnr_db
from tiue_export.reference.capture import capture
from tiue_export.reference.half_audit import control_to_check
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.sampling.sampler import sample
from tiue_export.specs import CONTROLNET, UNET_GRAPHS
from tiue_export.student.pipeline_folder import write_scheduler

STEPS, KEYS = 5, (0, 2)
EXACT_DB = 110.0


def write_controlnet(teacher: Path, folder: Path) -> Path:
    """A ControlNet of its family with random weights, zero convolutions included."""
    unet = load_teacher(teacher).unet
    channels = (4, 8, 8, 8)  # halves the picture three times, as the VAE does
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=channels)
    fill(net, torch.Generator().manual_seed(5))
    net.save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def control_folder(teacher_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_controlnet(teacher_folder, tmp_path_factory.mktemp("control") / "tiny")


@pytest.fixture(scope="module")
def teacher(teacher_folder: Path, control_folder: Path):
    """The tiny model with its ControlNet. Shared: do not change it."""
    options = FasterOptions(steps=STEPS, key_steps=KEYS)
    return with_controlnet(load_teacher(teacher_folder, options=options), control_folder)


@pytest.fixture(scope="module")
def run_graphs(teacher):
    """Runs its graphs by name in torch."""
    graphs = {g.spec.name: g for g in build_graphs(teacher, ExportOptions(), only=UNET_GRAPHS)}
    assert list(graphs) == [CONTROLNET, *UNET_GRAPHS]
    return lambda name, pool: run_graph(graphs[name], pool)[1]


def request():
    text = np.random.RandomState(1).standard_normal((2, 77, 32)).astype(np.float32)
    return noise_from_seed(0, (1, 4, 8, 8)), text


def control(scale: float = 0.8):
    return control_to_check((1, 3, 64, 64)) | {"conditioning_scale": np.array([scale], np.float32)}


def planned(teacher, **options):
    return plan_from_config(teacher.scheduler_config, FasterOptions(steps=STEPS, **options))


def test_with_every_step_a_key_step_it_is_diffusers_own_pipeline(teacher, run_graphs):
    noise, text = request()
    plan = planned(teacher, key_steps="uniform:1", inject="off")
    ours = sample(plan, run_graphs, noise[None], text, 7.5, control=control())
    pipeline = StableDiffusionControlNetPipeline(
        vae=teacher.vae,
        text_encoder=teacher.text_encoder,
        tokenizer=None,
        unet=teacher.unet,
        controlnet=teacher.controlnet,
        scheduler=diffusers_scheduler(teacher.scheduler_config, "ddim", STEPS),
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )
    pipeline.set_progress_bar_config(disable=True)
    theirs = pipeline(
        prompt_embeds=torch.from_numpy(text[1:]),
        negative_prompt_embeds=torch.from_numpy(text[:1]),
        image=torch.from_numpy(control()["controlnet_cond"]),
        controlnet_conditioning_scale=0.8,
        latents=torch.from_numpy(noise),
        num_inference_steps=STEPS,
        guidance_scale=7.5,
        output_type="latent",
    ).images.numpy()
    assert psnr_db(theirs, ours) >= EXACT_DB


@torch.no_grad()
def test_at_key_steps_only_it_equals_kept_features_and_kept_residuals(teacher, run_graphs):
    noise, text = request()
    plan = planned(teacher, key_steps=KEYS, inject="off")
    ours = sample(plan, run_graphs, noise[None], text, 7.5, control=control())
    unet, kept, is_key = teacher.unet, {}, [True]

    def keep(part, inputs, output):
        if is_key[0]:
            kept[part] = output
        return kept[part]

    parts = [unet.conv_in, *unet.down_blocks, unet.mid_block]
    hooks = [part.register_forward_hook(keep) for part in parts]
    scheduler = diffusers_scheduler(teacher.scheduler_config, "ddim", STEPS)
    latents, embedding = torch.from_numpy(noise), torch.from_numpy(text)
    picture = torch.from_numpy(control()["controlnet_cond"]).repeat(2, 1, 1, 1)
    for step, timestep in enumerate(scheduler.timesteps):
        is_key[0], pair = step in KEYS, torch.cat([latents, latents])
        if is_key[0]:
            down, mid = teacher.controlnet(
                pair, timestep, embedding, picture, conditioning_scale=0.8, return_dict=False
            )
        without, conditioned = unet(
            pair,
            timestep,
            embedding,
            down_block_additional_residuals=down,
            mid_block_additional_residual=mid,
        ).sample.chunk(2)
        output = without + 7.5 * (conditioned - without)
        latents = scheduler.step(output, timestep, latents).prev_sample
    for hook in hooks:
        hook.remove()
    assert psnr_db(latents.numpy(), ours) >= EXACT_DB


def test_its_strength_matters_and_none_is_no_controlnet(teacher, run_graphs):
    noise, text = request()
    plan = planned(teacher, key_steps=KEYS)
    drawn = [
        sample(plan, run_graphs, noise[None], text, control=c)
        for c in (None, control(0.0), control(1.0))
    ]
    assert psnr_db(drawn[0], drawn[1]) >= EXACT_DB
    assert psnr_db(drawn[0], drawn[2]) < 60


def test_the_capture_holds_it_against_diffusers(teacher):
    captured = capture(teacher, ExportOptions(), None)
    (hop,) = [h for h in captured.hops if "ControlNet" in h.subject]
    assert hop.passed
    assert hop.gate == 120
    assert CONTROLNET in captured.graph_io
    assert {"controlnet_cond", "conditioning_scale"} <= set(captured.reference.arrays)


def test_features_that_are_shared_inside_the_encoder_take_no_controlnet(teacher):
    with pytest.raises(UsageError, match="a ControlNet adds to features"):
        build_graphs(teacher, ExportOptions(hoist="encoder"), only=UNET_GRAPHS)


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("cross_attention_dim", 768),
        ("controlnet_conditioning_channel_order", "bgr"),
        ("addition_embed_type", "text_time"),
        ("_class_name", "UNet2DConditionModel"),
    ],
)
def test_another_family_or_kind_is_refused(teacher_folder, control_folder, tmp_path, key, value):
    folder = Path(shutil.copytree(control_folder, tmp_path / "other"))
    config = json.loads((folder / "config.json").read_text("utf-8")) | {key: value}
    (folder / "config.json").write_text(json.dumps(config), "utf-8")
    with pytest.raises(UnsupportedModelError) as caught:
        with_controlnet(load_teacher(teacher_folder), folder)
    assert str(value) in caught.value.message


def test_a_folder_that_is_none_is_refused(teacher_folder, tmp_path):
    with pytest.raises(CheckpointError, match=r"no ControlNet folder, it has no config\.json"):
        with_controlnet(load_teacher(teacher_folder), tmp_path)


# Pipeline and command line


@pytest.fixture
def controlled(faster_bundle, teacher) -> Bundle:
    """The contract of a bundle with a ControlNet, for the fake runtime."""
    graph = build_graphs(teacher, ExportOptions(), only=UNET_GRAPHS)[0]
    record = GraphRecord("", graph.spec.inputs, graph.spec.outputs, "fp32", 19, {})
    graphs = {**faster_bundle.manifest.graphs, CONTROLNET: record}
    return replace(faster_bundle, manifest=replace(faster_bundle.manifest, graphs=graphs))


def test_the_pipeline_follows_a_picture(controlled):
    picture = control()["controlnet_cond"][0]
    with Pipeline.open(controlled, FakeRuntime(controlled)) as pipeline:
        drawn = pipeline("fox", control=picture)
        weaker = pipeline("fox", control=picture, control_scale=0.5)
    assert len(drawn.stage_latency_ms[CONTROLNET]) == 3
    assert not np.array_equal(drawn.pictures[0].latents, weaker.pictures[0].latents)


@pytest.mark.parametrize(
    ("picture", "message"),
    [
        (None, "needs a picture to follow"),
        (np.zeros((3, 8, 8), np.float32), "control has shape (3, 8, 8); expected (3, 64, 64)"),
        (np.full((3, 64, 64), 2.0, np.float32), "control has values outside of [0, 1]"),
    ],
)
def test_a_picture_that_cannot_be_followed_is_refused(controlled, picture, message):
    with (
        Pipeline.open(controlled, FakeRuntime(controlled)) as pipeline,
        pytest.raises(UsageError) as caught,
    ):
        pipeline("fox", control=picture)
    assert message in caught.value.message


def test_runtime_auto_tries_every_runtime_with_the_picture(
    run, micro_pipeline, tmp_path, tmp_path_factory, monkeypatch
):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    place = tmp_path_factory.mktemp("controlled")
    small = shutil.copytree(micro_pipeline, place / "teacher")
    write_scheduler(small, load_family("tiny").scheduler, None)
    teacher = load_teacher(small, options=FasterOptions(steps=3, key_steps=(0, 1)))
    control_net = write_controlnet(small, place / "edges")
    bundle = export_onnx(with_controlnet(teacher, control_net), place / "fox")
    Image.new("RGB", (64, 64)).save(tmp_path / "edges.png")
    line = ("generate", bundle.root, "fox", "--runtime", "auto", "--json", "--out", "fox.png")
    code, _, err = run(*line)
    assert code == 2
    assert "draws by a ControlNet and needs a picture to follow" in err.replace("\n", " ")
    code, out, err = run(*line, "--control", "edges.png")
    assert code == 0, err
    choice = json.loads(out)["runtime_choice"]
    assert choice["runtime"] == "ort"
    assert choice["latency_ms"]["ort"] > 0
    assert "openvino" in choice["reasons"]
    assert not any("picture" in reason for reason in choice["reasons"].values())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--control", "edges.png"), "has no ControlNet"),
        (("--control", "none.png"), "none.png cannot be read as a picture"),
        (("--control", "small.png"), "small.png is 8x8 px; the bundle draws 64x64"),
        (("--control-scale", "0.5"), "how strongly a picture is followed; none was given"),
    ],
)
def test_generate_refuses_a_wrong_picture_and_any_without_a_controlnet(
    run, faster_bundle, tmp_path, arguments, message
):
    Image.new("RGB", (64, 64)).save(tmp_path / "edges.png")
    Image.new("RGB", (8, 8)).save(tmp_path / "small.png")
    code, _, err = run("generate", faster_bundle.root, "fox", *arguments)
    assert code == 2
    assert message in err.replace("\n", " ")


def test_a_student_without_guidance_takes_no_controlnet_in_silence(micro_folder):
    student = load_student(micro_folder)
    student.controlnet = torch.nn.Identity()
    with pytest.raises(UsageError, match="has its guidance distilled in; a ControlNet steers"):
        build_graphs(student, ExportOptions())
