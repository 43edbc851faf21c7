"""The torch reference runs a bundle's own model: with the adapters that the export merged."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from diffusers import ControlNetModel
from safetensors.numpy import save_file

from tiue_export import RuntimeOptions, export_onnx, load_student
from tiue_export.benchmarks.synthetic import fill
from tiue_export.errors import CheckpointError
from tiue_export.methods.load import CheckpointRequest, load_for_method
from tiue_export.methods.method import SamplingOptions
from tiue_export.proof.parity import load_reference, measure_runtime
from tiue_export.registry.backends import open_runtime
from tiue_export.student.lora import lora_options, merge_lora


@pytest.fixture(scope="module")
def lora(micro_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An adapter of rank 2 for one layer of the UNet."""
    unet, random = load_student(micro_folder).unet, np.random.default_rng(0)
    layers = ((n, m) for n, m in unet.named_modules() if n.endswith("attn1.to_q"))
    name, layer = next(layers)
    file = tmp_path_factory.mktemp("lora") / "style.safetensors"
    sides = {"lora_A": (2, layer.in_features), "lora_B": (layer.out_features, 2)}
    save_file(
        {
            f"unet.{name}.{side}.weight": random.standard_normal(shape).astype(np.float32)
            for side, shape in sides.items()
        },
        file,
    )
    return file


@pytest.fixture(scope="module")
def styled(micro_folder: Path, lora: Path, tmp_path_factory: pytest.TempPathFactory):
    """The bundle of the student with the adapter at half strength."""
    request = CheckpointRequest(str(micro_folder), lora=(f"{lora}:0.5",))
    student = load_for_method(request, "tiue", SamplingOptions())
    return export_onnx(student, tmp_path_factory.mktemp("styled") / "bundle")


def worst_db(bundle, options: RuntimeOptions) -> float:
    """The least of the records of a runtime that is opened so."""
    runtime = open_runtime("torch", bundle, options)
    records = measure_runtime(bundle, runtime, load_reference(bundle))
    assert all(record.passed for record in records)
    return min(record.value for record in records)


def test_with_its_adapter_the_model_of_a_bundle_opens_and_is_exact(styled, micro_folder, lora):
    given = RuntimeOptions(checkpoint=str(micro_folder), lora=(f"{lora}:0.5",))
    assert worst_db(styled, given) >= 120


@pytest.mark.parametrize("scales", [(), (":0.25",), (":0.5", ":0.5")])
def test_without_its_adapter_or_at_another_scale_it_says_what_to_add(
    styled, micro_folder, lora, scales
):
    given = RuntimeOptions(
        checkpoint=str(micro_folder), lora=tuple(f"{lora}{scale}" for scale in scales)
    )
    with pytest.raises(CheckpointError) as caught:
        open_runtime("torch", styled, given)
    assert "is not the student of this bundle: the SHA-256 of its unet is" in caught.value.message
    assert caught.value.next_step == (
        f"Give the checkpoint named {styled.manifest.source.name} with --lora "
        "style.safetensors:0.5 as at the export, or export this one."
    )


def test_a_bundle_without_adapters_takes_none(micro_bundle, micro_folder, lora):
    given = RuntimeOptions(checkpoint=str(micro_folder), lora=(str(lora),))
    with pytest.raises(CheckpointError) as caught:
        open_runtime("torch", micro_bundle, given)
    name = micro_bundle.manifest.source.name
    assert caught.value.next_step == f"Give the checkpoint named {name}, or export this one."


def test_several_adapters_are_named_in_their_order(micro_folder, lora, tmp_path):
    other = tmp_path / "ink and wash.safetensors"
    other.write_bytes(lora.read_bytes())
    student = merge_lora(merge_lora(load_student(micro_folder), lora), other, 0.3)
    assert lora_options(student.source) == (
        "--lora style.safetensors:1",
        "--lora 'ink and wash.safetensors:0.3'",
    )
    noted = replace(student.source, notes=("the weights are an average",))
    assert lora_options(noted) == ()


def test_parity_on_the_command_line_takes_the_adapter(run, styled, micro_folder, lora):
    line = ("parity", styled.root, "--runtime", "torch", "--ckpt", micro_folder)
    code, _, err = run(*line)
    assert code == 3
    assert "with --lora style.safetensors:0.5 as at the export" in err.replace("\n", " ")
    code, out, err = run(*line, "--lora", f"{lora}:0.5", "--json")
    assert code == 0, err
    assert all(record["passed"] for record in json.loads(out))


@pytest.mark.parametrize("option", ["--lora", "--controlnet"])
def test_another_runtime_takes_neither(run, styled, option):
    code, _, err = run("parity", styled.root, option, "x")
    assert code == 2
    assert f"{option} is for --runtime torch" in err.replace("\n", " ")


# With a ControlNet


@pytest.fixture(scope="module")
def edges(bare_teacher: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A ControlNet for it."""
    unet = load_student(bare_teacher).unet
    net = ControlNetModel.from_unet(unet, conditioning_embedding_out_channels=(4, 8, 8, 8))
    fill(net, torch.Generator().manual_seed(5))
    folder = tmp_path_factory.mktemp("control") / "edges"
    net.save_pretrained(folder)
    return folder


def test_a_loop_with_adapter_and_controlnet_opens_with_both_and_names_both(
    bare_teacher, edges, lora, tmp_path
):
    request = CheckpointRequest(str(bare_teacher), lora=(str(lora),), controlnet=str(edges))
    options = SamplingOptions(steps=3, key_steps=(0, 1))
    bundle = export_onnx(load_for_method(request, "faster", options), tmp_path / "bundle")
    both = RuntimeOptions(checkpoint=str(bare_teacher), lora=(str(lora),), controlnet=str(edges))
    assert worst_db(bundle, both) >= 110

    with pytest.raises(CheckpointError) as caught:
        open_runtime("torch", bundle, replace(both, lora=()))
    assert "with --lora style.safetensors:1 --controlnet edges as" in str(caught.value.next_step)
    with pytest.raises(CheckpointError) as caught:
        open_runtime("torch", bundle, replace(both, controlnet=None))
    assert caught.value.message == f"{bare_teacher} comes without the ControlNet of this bundle"
    assert caught.value.next_step == "Add the one of the export: --controlnet edges"
