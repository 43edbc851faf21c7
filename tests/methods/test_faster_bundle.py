"""A model in a loop as a bundle: exported, proven, opened, drawn from, its limits told."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from fake_runtime import FakeRuntime
from PIL import Image
from teachers import load_teacher

from tiue_export import Pipeline, export_onnx, open_bundle
from tiue_export.bundle.manifest import Manifest
from tiue_export.drawing.pipeline import Job
from tiue_export.errors import BundleError, UsageError
from tiue_export.graphs.build import build_graphs
from tiue_export.graphs.options import ExportOptions
from tiue_export.proof.gates import GATES_PSNR_DB, psnr_db
from tiue_export.proof.parity import PROMPTS, load_reference, measure_runtime
from tiue_export.reference.capture import capture, measure_half_arithmetic
from tiue_export.registry.backends import open_runtime
from tiue_export.sampling.key_step_options import FasterOptions
from tiue_export.sampling.plan_change import PlanChange
from tiue_export.specs import (
    GRAPH_NAMES,
    UNET_DECODER,
    UNET_ENCODER,
    UNET_GRAPHS,
    RuntimeOptions,
)
from tiue_export.system.progress import Observer

STEPS, KEYS = 6, (0, 1, 3)  # of the fixture
FOX = "a red fox"


@pytest.fixture(scope="module")
def pipeline(faster_bundle):
    with Pipeline.open(faster_bundle) as pipeline:
        yield pipeline


def test_the_manifest_names_method_plan_and_open_axis(faster_bundle):
    manifest = open_bundle(faster_bundle.root).manifest
    assert manifest.plan.method == "faster"
    assert manifest.plan.key_steps == KEYS
    assert manifest.plan.guidance == 5.0
    assert manifest.plan.chosen_by == "list"
    assert (manifest.plan.steps, len(manifest.plan.timesteps)) == (STEPS, STEPS)
    shapes = {t.name: t.shape for t in manifest.graphs[UNET_DECODER].inputs}
    assert shapes["timesteps"] == ("steps",)
    assert manifest.graphs[UNET_DECODER].outputs[0].shape == ("2*steps", 4, 8, 8)
    assert {t.name: t.shape for t in manifest.graphs[UNET_ENCODER].inputs} == {
        "sample": (2, 4, 8, 8),
        "timestep": (1,),
        "encoder_hidden_states": (2, 77, 32),
    }
    scheduler = json.loads((faster_bundle.root / "scheduler/scheduler_config.json").read_text())
    assert "tiue_steps" not in scheduler


def test_every_hop_is_measured_under_its_gate(faster_bundle):
    gates = {(r.hop, r.subject): r.gate for r in faster_bundle.manifest.parity}
    assert all(record.passed for record in faster_bundle.manifest.parity)
    assert gates["split", "first row / unsplit UNet"] == 120
    assert gates["closed form", "latents / ddim loop"] == 120
    assert gates["hoisted", "outputs / naive decoder"] == 120
    assert {gates["ONNX fp32", name] for name in GRAPH_NAMES} == {GATES_PSNR_DB["fp32"]}
    assert gates["ONNX fp32 loop", "latents"] == GATES_PSNR_DB["fp32-loop"]


def test_the_export_tells_how_far_its_long_loops_are(bare_teacher, tmp_path):
    heard: list[tuple[float, str]] = []
    observer = Observer(on_progress=lambda fraction, detail: heard.append((fraction, detail)))
    teacher = load_teacher(bare_teacher, options=FasterOptions(steps=3, key_steps=(0, 1)))
    export_onnx(teacher, tmp_path / "b", observer=observer)
    assert heard == [
        (step / 3, f"{stage}: {step} of 3")
        for stage in ("run student in fp32", "verify loop")
        for step in (1, 3)
    ]


def test_a_plan_that_contradicts_itself_does_not_open(faster_bundle):
    data = json.loads(faster_bundle.manifest.to_json())
    data["plan"]["passes"][1]["input"]["outputs"].append(0.5)
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(json.dumps(data), "tiue.json")
    assert caught.value.message == (
        "tiue.json: the plan contradicts itself: pass 1 starts at row 2; expected 1"
    )


def test_the_picture_is_that_of_the_stored_reference(pipeline, faster_bundle):
    reference = load_reference(faster_bundle).arrays
    picture = pipeline(PROMPTS[0], seed=0).pictures[0]
    assert psnr_db(reference["latents"][0], picture.latents) >= GATES_PSNR_DB["fp32-loop"]
    assert (picture.guidance, picture.negative_prompt) == (5.0, "")


def test_guidance_and_a_negative_prompt_change_the_picture_and_are_remembered(pipeline):
    plain = pipeline(FOX).pictures[0]
    strong = pipeline(FOX, guidance=9).pictures[0]
    unlike = pipeline(FOX, negative_prompt="blue").pictures[0]
    assert (strong.guidance, unlike.negative_prompt) == (9, "blue")
    assert not np.array_equal(plain.latents, strong.latents)
    assert not np.array_equal(plain.latents, unlike.latents)


def test_prompts_may_each_have_their_own(pipeline):
    pictures = pipeline([FOX, FOX], guidance=[5.0, 2.0], negative_prompt=["", "blue"]).pictures
    np.testing.assert_array_equal(pictures[0].latents, pipeline(FOX).pictures[0].latents)
    alone = pipeline(FOX, guidance=2.0, negative_prompt="blue").pictures[0]
    np.testing.assert_array_equal(pictures[1].latents, alone.latents)


def test_without_guidance_the_negative_prompt_has_no_say(pipeline):
    one, other = (pipeline(FOX, guidance=1, negative_prompt=n).pictures[0] for n in ("", "blue"))
    assert psnr_db(one.latents, other.latents) >= 100


def test_progress_and_times_tell_of_the_loop(pipeline):
    heard = []
    result = pipeline.forgetful()(
        FOX, count=2, on_step=lambda done, total: heard.append((done, total))
    )
    assert heard == 2 * [(1, STEPS), (3, STEPS), (STEPS, STEPS)]
    runs = {stage: len(latencies) for stage, latencies in result.stage_latency_ms.items()}
    assert runs == {
        "text_encoder": 2,  # of the prompt and of what it is steered away from, once
        "unet_encoder": 2 * len(KEYS),
        "unet_decoder": 2 * len(KEYS),
        "vae_decoder": 2,
    }


def test_an_error_in_on_step_stops_the_loop(pipeline):
    def stop(done, total):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        pipeline(FOX, on_step=stop)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"guidance": [1.0, 2.0]}, "guidance has 2 values for 1 prompts; expected 1 or 1"),
        ({"negative_prompt": ["a", "b"]}, "negative_prompt has 2 values"),
        ({"guidance": 0}, "guidance is 0; expected 1 (off) to 1000, usually 7.5"),
        ({"guidance": float("inf")}, "guidance is inf; expected 1"),
    ],
)
def test_steering_that_cannot_be_is_refused(pipeline, options, message):
    with pytest.raises(UsageError) as caught:
        pipeline(FOX, **options)
    assert caught.value.message.startswith(message)


@pytest.mark.parametrize("options", [{"guidance": 3.0}, {"negative_prompt": "blue"}])
def test_a_distilled_student_takes_neither(tiny_bundle, options):
    with (
        Pipeline.open(tiny_bundle, FakeRuntime(tiny_bundle)) as student,
        pytest.raises(UsageError) as caught,
    ):
        student(FOX, **options)
    assert "is a distilled student: it takes no" in caught.value.message


def test_pictures_drawn_together_are_each_steered_by_their_own_job(pipeline):
    jobs = [Job(FOX, 0), Job(FOX, 0, "blue", 2.0)]
    plain, steered = pipeline.draw(jobs).pictures
    assert (plain.guidance, steered.guidance, steered.negative_prompt) == (5.0, 2.0, "blue")
    alone = pipeline(FOX, guidance=2.0, negative_prompt="blue").pictures[0]
    assert psnr_db(alone.latents, steered.latents) > 100


def test_jobs_of_a_student_are_not_steered(tiny_bundle):
    with Pipeline.open(tiny_bundle, FakeRuntime(tiny_bundle)) as student:
        with pytest.raises(UsageError, match="it takes no negative prompt"):
            student.draw([Job(FOX, 0, "blue")])
        with pytest.raises(UsageError, match="it takes no guidance"):
            student.draw([Job(FOX, 0, "", 2.0)])


def test_the_fake_runtime_has_the_right_shapes(faster_bundle):
    with Pipeline.open(faster_bundle, FakeRuntime(faster_bundle)) as pipeline:
        assert pipeline(FOX).images[0].size == (64, 64)


def test_openvino_draws_the_same_and_is_proven(faster_bundle):
    pytest.importorskip("openvino", reason="OpenVINO is not installed")
    records = faster_bundle.manifest.compiled["openvino"].parity
    assert [r.subject for r in records] == ["prompt_embeds", "outputs", "latents", "picture"]
    assert all(r.passed and r.gate for r in records)
    drawn = []
    for name, precision in (("ort", "auto"), ("openvino", "fp32")):
        with Pipeline.open(faster_bundle, name, RuntimeOptions(precision=precision)) as pipeline:
            drawn.append(pipeline(FOX, seed=3).pictures[0].latents)
    assert psnr_db(drawn[0], drawn[1]) >= GATES_PSNR_DB["fp32-loop"]


def test_the_torch_runtime_runs_the_model_itself(faster_bundle, teacher_folder):
    options = RuntimeOptions(checkpoint=str(teacher_folder))
    runtime = open_runtime("torch", faster_bundle, options)
    records = measure_runtime(faster_bundle, runtime, load_reference(faster_bundle))
    assert min(record.value for record in records) >= 120


def test_coarse_loops_are_reported_but_not_judged(faster_bundle):
    runtime = open_runtime("ort", faster_bundle, RuntimeOptions())
    runtime.precision = "bf16"
    records = measure_runtime(faster_bundle, runtime, load_reference(faster_bundle))
    assert [r.gate for r in records if "loop" in r.hop] == [None]


@pytest.mark.parametrize("hoist", ["decoder", "encoder", "none"])
def test_half_precision_graphs_keep_time_exact_and_pass_the_fp16_gate(teacher_folder, hoist):
    teacher = load_teacher(teacher_folder, options=FasterOptions(steps=3, key_steps=(0,)))
    teacher.vae = None
    exact = capture(teacher, ExportOptions(hoist=hoist), None)
    half = build_graphs(teacher, ExportOptions(precision="fp16", hoist=hoist), only=UNET_GRAPHS)
    for graph in half:
        feeds, expected = exact.graph_io[graph.spec.name]
        record = measure_half_arithmetic(graph, feeds, expected, exact.reference.inputs)
        assert record.passed
        assert record.gate == GATES_PSNR_DB["fp16"]
        kept = {p.dtype for p in graph.module.time.parameters()} if hoist != "encoder" else set()
        assert kept <= {torch.float32}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (ExportOptions(merge_below=0.02), "tiny draws in a loop and has merged rows"),
        (
            ExportOptions(dynamic_batch=True),
            "tiny draws in a loop and leaves its batch open",
        ),
    ],
)
def test_options_of_students_are_refused(teacher_folder, tmp_path, options, message):
    teacher = load_teacher(teacher_folder, options=FasterOptions(steps=3, key_steps=(0,)))
    with pytest.raises(UsageError) as caught:
        export_onnx(teacher, tmp_path / "out", options)
    assert caught.value.message.startswith(message)


# The command line


def test_generate_tells_guidance_and_bounds_the_rows(run, faster_bundle):
    code, out, _ = run(
        "generate", faster_bundle.root, "fox", "--guidance", 3, "--negative", "blue",
        "--max-decoder-rows", 2, "--json",
    )  # fmt: skip
    assert code == 0
    shown = json.loads(out)
    assert len(shown["stage_latency_ms"]["unet_decoder"]) == STEPS
    with Image.open(shown["pictures"][0]["path"]) as picture:
        written = json.loads(picture.text["tiue"])
    assert (written["guidance"], written["negative_prompt"]) == (3.0, "blue")


def test_generate_draws_ordinary_sampling_from_the_same_bundle(run, faster_bundle, pipeline):
    code, out, _ = run(
        "generate", faster_bundle.root, FOX, "--steps", 4, "--key-steps", "uniform:1",
        "--inject", "off", "--json",
    )  # fmt: skip
    assert code == 0
    shown = json.loads(out)
    assert len(shown["stage_latency_ms"]["unet_encoder"]) == 4
    with Image.open(shown["pictures"][0]["path"]) as picture:
        written = json.loads(picture.text["tiue"])
        drawn = np.asarray(picture)
    told = {name: written[name] for name in ("steps", "scheduler", "key_steps", "inject")}
    assert told == {"steps": 4, "scheduler": "ddim", "key_steps": "0,1,2,3", "inject": "off"}
    change = PlanChange(steps=4, key_steps=(0, 1, 2, 3), inject="off")
    np.testing.assert_array_equal(drawn, pipeline.replanned(change)(FOX).images[0])
    assert not np.array_equal(drawn, pipeline(FOX).images[0])


def test_another_plan_leaves_the_bundle_as_it_is(pipeline, faster_bundle):
    before = pipeline(FOX).pictures[0]
    other = pipeline.replanned(PlanChange(steps=3, key_steps=(0,)))
    assert other.bundle.manifest.plan.steps == 3
    assert open_bundle(faster_bundle.root).manifest == faster_bundle.manifest
    np.testing.assert_array_equal(before.latents, pipeline(FOX).pictures[0].latents)


@pytest.mark.parametrize(
    "arguments", [("--max-decoder-rows", 2), ("--steps", 2), ("--key-steps", "uniform:1")]
)
def test_generate_refuses_another_plan_for_a_student(run, tiny_bundle, arguments):
    code, _, err = run("generate", tiny_bundle.root, "fox", *arguments)
    assert code == 2
    assert "is a distilled student: its steps are part of its weights and graphs" in err


@pytest.mark.parametrize(
    ("arguments", "message", "hint"),
    [
        (
            ("--steps", 5),
            "the bundle's key steps 0,1,3 were chosen for 6 steps, not for 5",
            "Add --key-steps nonuniform, uniform:N or a list.",
        ),
        (("--key-steps", "1,2"), "--key-steps 1,2 does not start at 0", "Type --key-steps 0,1,2"),
        (("--key-steps", "auto"), "--key-steps auto measures a checkpoint", "`analyze` chose"),
        (("--steps", 0, "--key-steps", "0"), "--steps is 0; expected 1 to 1000", ""),
        (("--inject", "often"), "injection", "parallel"),
    ],
)
def test_generate_refuses_a_plan_that_cannot_be(run, faster_bundle, arguments, message, hint):
    code, _, err = run("generate", faster_bundle.root, "fox", *arguments)
    assert code == 2
    assert message in err
    assert hint in err


def test_inspect_shows_the_groups(run, faster_bundle):
    code, out, _ = run("inspect", faster_bundle.root)
    assert code == 0
    assert f"{STEPS} ddim steps, {len(KEYS)} encoder runs" in out.replace("\n", " ")


def test_a_dry_run_shows_the_plan(run, teacher_folder):
    code, out, _ = run(
        "onnx", "--ckpt", teacher_folder, "--method", "faster", "--steps", 20, "--dry-run"
    )
    assert code == 0
    assert "20 steps, the encoder runs at steps 0, 1, 2, 3, 5, 10, 15" in out.replace("\n", " ")


@pytest.mark.parametrize(
    ("arguments", "code", "message"),
    [
        (("--scheduler", "ddim"), 2, "--scheduler is for --method faster"),
        (("--guidance", "3"), 2, "--guidance is for --method few-step and faster"),
        (("--method", "fast"), 2, "unknown method 'fast'"),
        (("--method", "faster", "--scheduler", "euler"), 5, "scales the network's input"),
        (("--method", "faster", "--key-steps", "3,5"), 2, "does not start at 0"),
        (("--method", "faster", "--max-decoder-rows", "0"), 2, "--max-decoder-rows is 0"),
        (("--method", "faster", "--max-decoder-rows", "1"), 2, "1 decoder rows were allowed; one"),
        (("--method", "faster", "--batch", "2", "--max-decoder-rows", "3"), 2, "one step takes 4"),
        (("--method", "faster", "--inject", "never"), 2, "unknown injection 'never'"),
    ],
)
def test_onnx_refuses_what_cannot_be(run, teacher_folder, arguments, code, message):
    found, _, err = run("onnx", "--ckpt", teacher_folder, "--dry-run", *arguments)
    assert found == code
    assert message in err.replace("\n", " ")


def test_onnx_refuses_a_student_for_the_loop(run, tiny_pipeline):
    code, _, err = run("onnx", "--ckpt", tiny_pipeline, "--method", "faster", "--dry-run")
    assert code == 5
    assert "is a distilled student" in err


def test_openvino_refuses_export_options_for_a_bundle(run, faster_bundle):
    code, _, err = run("openvino", "--bundle", faster_bundle.root, "--method", "faster")
    assert code == 2
    assert "--method is for the export of a checkpoint" in err.replace("\n", " ")


def test_a_lora_is_merged_on_the_way(run, teacher_folder, tmp_path):
    code, _, err = run("onnx", "--ckpt", teacher_folder, "--dry-run", "--lora", "no.safetensors")
    assert code == 3
    assert "no.safetensors does not exist" in err


def test_a_copy_of_the_bundle_opens_elsewhere(faster_bundle, tmp_path):
    copy = open_bundle(shutil.copytree(faster_bundle.root, tmp_path / "copy"))
    assert replace(copy, root=faster_bundle.root) == open_bundle(faster_bundle.root)
