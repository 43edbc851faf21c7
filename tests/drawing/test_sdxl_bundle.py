"""A bundle of SDXL from prompt to picture: its text is one value, as every model's."""

from __future__ import annotations

import json
from dataclasses import replace

import numpy as np
import pytest
import torch

from tiue_export import Pipeline, export_onnx, load_student, open_bundle
from tiue_export.errors import BundleError
from tiue_export.graphs.options import ExportOptions
from tiue_export.graphs.shapes import with_vae_precision
from tiue_export.proof.gates import psnr_db
from tiue_export.sampling.noise import noise_from_seed
from tiue_export.student.model import text_embedding

PROMPT = "a red fox"


@pytest.fixture(scope="module")
def student(sdxl_folder):
    return load_student(sdxl_folder, recipe="sdxl-turbo")


@pytest.fixture(scope="module")
def bundle(student, made_once):
    options = ExportOptions(max_prompt_tokens=150)
    return open_bundle(made_once("sdxl-bundle", lambda out: export_onnx(student, out, options)))


@pytest.fixture(scope="module")
def pipeline(bundle):
    with Pipeline.open(bundle) as opened:
        yield opened


def test_its_text_has_a_row_more_than_tokens(bundle):
    manifest = bundle.manifest
    assert (manifest.text_shape, manifest.text_tokens) == ((1, 155, 80), 154)
    assert (manifest.pooled_rows, manifest.max_prompt_tokens) == (1, 150)
    assert manifest.source.family == "tiny-sdxl"
    assert "text_encoder_2/config.json" in manifest.files  # hashed as every file is
    for part, width in (("text_encoder", 32), ("text_encoder_2", 48)):
        config = json.loads((bundle.root / part / "config.json").read_text("utf-8"))
        assert config["hidden_size"] == width


def test_a_bundle_draws_what_its_student_draws(pipeline, student):
    ids = torch.from_numpy(pipeline.tokenizer([PROMPT]))
    noise = noise_from_seed(3, (1, 4, 8, 8))
    with torch.no_grad():
        text = text_embedding(student.text_encoder, ids)
        expected = student.sample(torch.from_numpy(noise), text).numpy()
    drawn = pipeline(PROMPT, seed=3).pictures[0]
    assert psnr_db(expected[0], drawn.latents) > 100
    assert drawn.image.size == (64, 64)


def test_weights_of_words_leave_the_pooled_text_as_it_is(pipeline, monkeypatch):
    texts = []
    sample = type(pipeline)._sample

    def watched(self, noises, text, *rest):
        texts.append(text)
        return sample(self, noises, text, *rest)

    monkeypatch.setattr(type(pipeline), "_sample", watched)
    own = pipeline.embed([PROMPT])
    pipeline("a (red:1.5) fox", prompt_weights=True)
    assert not np.allclose(texts[0][:, :154], own[:, :154])
    np.testing.assert_array_equal(texts[0][:, 154:], own[:, 154:])


def test_a_manifest_of_another_number_of_rows_contradicts_itself(bundle, tmp_path):
    odd = replace(bundle.manifest, pooled_rows=2)
    with pytest.raises(BundleError, match="pooled_rows is 2; expected 0 or 1"):
        type(odd).from_json(odd.to_json(), "tiue.json")


@pytest.mark.parametrize(
    ("options", "precision"),
    [
        ({"precision": "fp16"}, "fp32"),
        ({"precision": "fp16", "vae_precision": "fp16"}, "fp16"),
        ({"precision": "fp32"}, "fp32"),
    ],
)
def test_a_vae_that_says_so_computes_in_float32(student, options, precision):
    chosen = with_vae_precision(student, ExportOptions(**options))
    assert chosen.precision_of("vae_decoder") == precision
    assert chosen.precision_of("unet_decoder") == options["precision"]


def test_the_fp16_fix_of_the_vae_is_left_to_the_audit(sdxl_folder):
    student = load_student(sdxl_folder, recipe="sdxl-turbo")
    student.vae.register_to_config(force_upcast=False)
    chosen = with_vae_precision(student, ExportOptions(precision="fp16"))
    assert chosen.precision_of("vae_decoder") == "fp16"
