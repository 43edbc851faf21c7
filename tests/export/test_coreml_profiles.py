"""Core ML settings: profiles fill in what goes together, and wrong words are refused by name."""

from __future__ import annotations

import dataclasses

import pytest

from tiue_export.errors import UsageError
from tiue_export.export.coreml.profiles import (
    COMPRESSIONS,
    NEURAL_ENGINE_LIMIT_BYTES,
    PROFILES,
    CoremlOptions,
    check_limit,
    check_whole_decoder,
    function_named,
    plan_coreml,
    size_named,
    target_named,
)
from tiue_export.proof.gates import GATES_PSNR_DB
from tiue_export.specs import TEXT_ENCODER, UNET_DECODER, UNET_ENCODER, VAE_DECODER

REASONED = ("target", "attention", "linear", "decoder_batch", "compress", "compute_unit")


@pytest.mark.parametrize("name", PROFILES)
def test_every_profile_makes_a_plan_and_gives_a_reason_for_each_setting(name):
    profile = PROFILES[name]
    plan = plan_coreml(CoremlOptions(profile=name))
    assert {setting: getattr(plan, setting) for setting in REASONED} == {
        setting: getattr(profile, setting) for setting in REASONED
    }
    assert set(profile.reasons) == set(REASONED)


@pytest.mark.parametrize("name", COMPRESSIONS)
def test_every_compression_has_a_gate(name):
    assert COMPRESSIONS[name].gate in GATES_PSNR_DB


def test_what_is_asked_for_goes_before_the_profile():
    asked = CoremlOptions(
        "iphone", target="macOS15", attention="sdpa", linear="linear", decoder_batch=4,
        compress="int4", compute_unit="cpu-and-gpu",
    )  # fmt: skip
    plan = plan_coreml(asked)
    assert (plan.target, plan.attention, plan.linear) == ("iOS18", "sdpa", "linear")
    assert (plan.decoder_batch, plan.compress, plan.compute_unit) == (4, "int4", "CPU_AND_GPU")


@pytest.mark.parametrize("word", ["ORIGINAL", "SPLIT_EINSUM"])
def test_an_attention_has_one_name(word):
    with pytest.raises(UsageError, match=f"unknown attention '{word}'; there are: sdpa, split"):
        plan_coreml(CoremlOptions(attention=word))


@pytest.mark.parametrize(
    ("word", "ours"),
    [("iOS17", "iOS17"), ("ios16", "iOS16"), ("macOS14", "iOS17"), ("MACOS15", "iOS18")],
)
def test_targets_are_named_by_ios_or_macos(word, ours):
    assert target_named(word) == ours


def test_an_unknown_target_is_refused_with_those_there_are():
    with pytest.raises(UsageError, match="unknown deployment target 'iOS15'; there are: iOS16"):
        plan_coreml(CoremlOptions(target="iOS15"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"profile": "watch"}, "unknown profile 'watch'"),
        ({"attention": "flash"}, "unknown attention 'flash'"),
        ({"linear": "dense"}, "unknown linear form 'dense'"),
        ({"compress": "palettize-5"}, "unknown compression 'palettize-5'"),
        ({"precision": "bf16"}, "unknown precision 'bf16'"),
        ({"compute_unit": "NPU"}, "unknown compute unit 'NPU'"),
        ({"decoder_batch": 3}, "--decoder-batch is 3; expected 1, 2 or 4"),
        ({"decoder_batch": 0}, "--decoder-batch is 0; expected 1, 2 or 4"),
        ({"compress": "int4", "target": "iOS17"}, r"int4 needs iOS18 \(macOS 15\)"),
        ({"compress": "w8a8", "target": "iOS16", "prompts": ("a",)}, "w8a8 needs iOS17"),
        ({"compress": "w8a8"}, "it got no calibration prompts"),
        ({"compress": "recipe"}, "says nothing of what the recipe should be"),
        ({"target_mb": 1.0, "target_psnr_db": 40.0}, "were both given"),
        ({"target_mb": 1.0, "compress": "int8"}, "a recipe sets the bits of each layer"),
        ({"precision": "fp32", "compress": "int8"}, "int8 is for half precision"),
        ({"profile": "iphone", "sizes": ((64, 64), (64, 128))}, "several sizes .* need iOS18"),
    ],
)
def test_settings_that_do_not_go_together_are_refused(changed, message):
    with pytest.raises(UsageError, match=message) as caught:
        plan_coreml(CoremlOptions(**changed))
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("rows", "way_out"),
    [(4, "Export it without --no-hoist, or pass --decoder-batch 4."),
     (8, "Export it without --no-hoist.")],
)  # fmt: skip
def test_a_decoder_that_cannot_be_cut_is_refused_with_a_line_that_leads_out(rows, way_out):
    with pytest.raises(UsageError) as caught:
        check_whole_decoder(2, rows)
    assert f"--decoder-batch 2 cuts the decoder's {rows} rows in groups" in caught.value.message
    assert caught.value.next_step == way_out
    check_whole_decoder(4, 4)


def test_float32_needs_no_word_about_the_profiles_compression():
    plan = plan_coreml(CoremlOptions("iphone", precision="fp32"))
    assert (plan.compress, plan.gate_of(UNET_DECODER)) == ("none", "fp32")


def test_the_vae_is_never_compressed_and_text_gets_no_quantized_activations():
    plan = plan_coreml(CoremlOptions("iphone"))
    assert plan.compression_of(VAE_DECODER).kind == "none"
    assert plan.gate_of(VAE_DECODER) == "fp16"
    assert plan.gate_of(UNET_ENCODER) == "lut6"
    assert plan.compression_of(TEXT_ENCODER).name == "palettize-8"
    whole = plan_coreml(CoremlOptions(compress="w8a8", prompts=("a fox",)))
    assert whole.compression_of(TEXT_ENCODER).name == "palettize-8"
    assert whole.compression_of(UNET_DECODER).name == "w8a8"


def test_a_half_precision_decoder_of_full_size_is_refused_for_a_phone_with_the_reason():
    weights = 511_000_000  # an SD 1.5 decoder
    check_limit(plan_coreml(CoremlOptions("iphone")), UNET_DECODER, weights)
    check_limit(plan_coreml(CoremlOptions("mac-gpu")), UNET_DECODER, weights)
    half = plan_coreml(CoremlOptions("iphone", compress="none"))
    with pytest.raises(UsageError) as caught:
        check_limit(half, UNET_DECODER, weights)
    assert "unet_decoder would take 1022 MB in 16 bits" in caught.value.message
    assert "is limited to 1000 MB" in caught.value.message
    assert "--compress palettize-8 or palettize-6" in str(caught.value.next_step)
    assert NEURAL_ENGINE_LIMIT_BYTES == 10**9


def test_sizes_are_height_by_width_and_name_functions():
    assert size_named("512x768") == (512, 768)
    assert function_named(*size_named("512X768")) == "size_512x768"
    with pytest.raises(UsageError, match="--size is '512'; expected HEIGHTxWIDTH"):
        size_named("512")


def test_a_plan_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        plan_coreml(CoremlOptions()).target = "iOS16"
