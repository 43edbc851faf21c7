"""tiue.json: what is written is read back equal, and whatever does not fit is named."""

from __future__ import annotations

import json
import math
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from plan_cases import plans
from sealed_manifest import sealed_text

from tiue_export.bundle.manifest import (
    FORMAT_VERSION,
    FileRecord,
    GraphRecord,
    Manifest,
    ParityRecord,
    Source,
)
from tiue_export.errors import BundleError
from tiue_export.sampling.plan import Combination, single_pass
from tiue_export.specs import BATCH, GRAPH_NAMES, GraphSpec, TensorSpec

WHERE = "bundle/tiue.json"
CHANGED = "The file was changed after the export; export the bundle again."
QUICK = settings(database=None, deadline=None, suppress_health_check=[HealthCheck.too_slow])

TEXT = st.text(max_size=12)
FINITE = st.floats(allow_nan=False, allow_infinity=False)
SIZE = st.integers(1, 4096)
SIDE = st.one_of(st.just(BATCH), SIZE)
SHAPE = st.builds(
    lambda batch, rest: (batch, *rest),
    SIDE,
    st.lists(SIZE, max_size=3),
)
TENSOR = st.builds(
    TensorSpec, TEXT, st.sampled_from(["float32", "float16", "int64"]), SHAPE, meaning=TEXT
)
FILE = st.builds(FileRecord, st.integers(0, 2**63), TEXT)
FILES = st.dictionaries(TEXT, FILE, max_size=3)
TEXTS = st.dictionaries(TEXT, TEXT, max_size=3)


def tuples(items, **sizes):
    return st.lists(items, max_size=3, **sizes).map(tuple)


MANIFEST = st.builds(
    Manifest,
    format_version=st.just(FORMAT_VERSION),
    created_by=TEXT,
    source=st.builds(
        Source,
        name=TEXT,
        sha256=TEXT,
        family=TEXT,
        layout=TEXT,
        dtype=TEXT,
        ema=st.booleans(),
        parts=TEXTS,
        licence=st.one_of(st.none(), TEXT),
        notes=tuples(TEXT),
    ),
    plan=plans(),
    latent_shape=st.tuples(SIDE, SIZE, SIZE, SIZE),
    text_shape=st.tuples(SIDE, SIZE, SIZE),
    vae_scale=SIZE,
    vae_scaling_factor=st.floats(1e-6, 1e6),
    precision=TEXT,
    hoisted=TEXT,
    graphs=st.dictionaries(
        st.sampled_from(GRAPH_NAMES),
        st.builds(
            GraphRecord,
            path=TEXT,
            inputs=tuples(TENSOR),
            outputs=tuples(TENSOR),
            precision=TEXT,
            opset=SIZE,
            files=FILES,
        ),
        max_size=2,
    ),
    files=FILES,
    parity=tuples(
        st.builds(
            ParityRecord,
            hop=TEXT,
            subject=TEXT,
            metric=TEXT,
            value=FINITE,
            gate=st.one_of(st.none(), FINITE),
            max_abs_error=FINITE,
            inputs=TEXT,
        )
    ),
    parity_loss_allowed=st.booleans(),
    tools=TEXTS,
)


def sample() -> Manifest:
    latents = TensorSpec("latents", "float32", (BATCH, 4, 8, 16), "image latents")
    record = FileRecord(12, "ab" * 32)
    return Manifest(
        format_version=FORMAT_VERSION,
        created_by="tiue-export 9.9.9",
        source=Source("student.safetensors", "cd" * 32, "tiny", "diffusers", "float32"),
        plan=single_pass("tiue", 2, (501, 1), Combination(4.25, (-2.5, -0.5)), "epsilon"),
        latent_shape=(BATCH, 4, 8, 16),
        text_shape=(BATCH, 77, 32),
        vae_scale=8,
        vae_scaling_factor=0.18215,
        precision="fp32",
        hoisted="decoder",
        graphs={
            "unet_decoder": GraphRecord(
                "unet_decoder/model.onnx",
                (latents,),
                (latents,),
                "fp32",
                19,
                {"unet_decoder/model.onnx": record},
            )
        },
        files={"model_index.json": record},
        parity=(ParityRecord("split", "latents", "psnr_db", 130.0, None, 1e-6, "one prompt"),),
    )


def with_latents(manifest: Manifest, latents: Combination) -> Manifest:
    return replace(manifest, plan=replace(manifest.plan, latents=latents))


def parsed() -> dict:
    return json.loads(sample().to_json())


def refusal(text: str) -> BundleError:
    with pytest.raises(BundleError) as caught:
        Manifest.from_json(text, WHERE)
    return caught.value


@QUICK
@given(MANIFEST)
def test_what_is_written_is_read_back_equal(manifest):
    text = manifest.to_json()
    assert Manifest.from_json(text, WHERE) == manifest
    assert Manifest.from_json(text, WHERE).to_json() == text


@QUICK
@given(MANIFEST)
def test_what_is_written_is_strict_json_that_ends_with_a_newline(manifest):
    def refuse(constant):
        raise AssertionError(constant)

    text = manifest.to_json()
    assert text.endswith("}\n")
    json.loads(text, parse_constant=refuse)


def test_shapes_and_lists_come_back_as_tuples():
    manifest = Manifest.from_json(sample().to_json(), WHERE)
    assert manifest.latent_shape == (BATCH, 4, 8, 16)
    assert manifest.graphs["unet_decoder"].inputs[0].shape == (BATCH, 4, 8, 16)
    assert manifest.plan.timesteps == (501, 1)


def test_a_whole_number_is_read_as_a_float_where_a_float_belongs():
    manifest = Manifest.from_json(sealed_text({**parsed(), "vae_scaling_factor": 1}), WHERE)
    assert isinstance(manifest.vae_scaling_factor, float)


def test_fields_that_have_a_default_may_be_absent():
    data = parsed()
    for name in ("parity", "parity_loss_allowed", "tools"):
        del data[name]
    del data["source"]["licence"]
    manifest = Manifest.from_json(sealed_text(data), WHERE)
    assert (manifest.parity, manifest.parity_loss_allowed, manifest.tools) == ((), False, {})
    assert manifest.source.licence is None


def test_pixels_and_batch_follow_from_the_latent_shape():
    manifest = sample()
    assert (manifest.height_px, manifest.width_px, manifest.batch) == (64, 128, None)
    assert replace(manifest, latent_shape=(3, 4, 8, 16)).batch == 3


def test_a_graph_record_gives_the_contract_under_its_name():
    record = sample().graphs["unet_decoder"]
    assert record.spec("unet_decoder") == GraphSpec("unet_decoder", record.inputs, record.outputs)


@pytest.mark.parametrize(
    ("value", "gate", "passed"),
    [(1.0, None, True), (100.0, 100.0, True), (99.99, 100.0, False), (130.0, 100.0, True)],
)
def test_a_parity_record_passes_at_its_gate_or_without_one(value, gate, passed):
    assert replace(sample().parity[0], value=value, gate=gate).passed is passed


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize(
    "place",
    [
        lambda m, bad: replace(m, vae_scaling_factor=bad),
        lambda m, bad: replace(m, parity=(replace(m.parity[0], value=bad),)),
        lambda m, bad: replace(m, parity=(replace(m.parity[0], gate=bad),)),
        lambda m, bad: replace(m, parity=(replace(m.parity[0], max_abs_error=bad),)),
        lambda m, bad: with_latents(m, Combination(bad, (1.0, 1.0))),
        lambda m, bad: with_latents(m, Combination(1.0, (bad, 1.0))),
    ],
    ids=["factor", "value", "gate", "error", "noise", "outputs"],
)
def test_a_non_finite_number_can_never_be_written(place, bad):
    with pytest.raises(ValueError, match="not JSON compliant"):
        place(sample(), bad).to_json()


@pytest.mark.parametrize("number", ["NaN", "Infinity", "-Infinity", "1e999"])
def test_a_non_finite_number_is_refused_when_read(number):
    text = sample().to_json().replace("0.18215", number)
    assert number in text
    assert refusal(text).message.startswith(WHERE)


@pytest.mark.parametrize(
    "text", ["", "not json", "{", '{"format_version": 1,}', "\x00", "\ufeff{}"]
)
def test_a_text_that_is_not_json_is_refused_with_the_parsers_reason(text):
    error = refusal(text)
    assert error.message.startswith(f"{WHERE} is not JSON: ")
    assert "line 1 column" in error.message
    assert error.next_step == CHANGED


@pytest.mark.parametrize("version", [0, 3, -1, "1", None, [1], 1.5])
def test_another_format_version_is_refused_naming_both_and_the_writer(version):
    error = refusal(json.dumps({**parsed(), "format_version": version}))
    assert error.message == (
        f"{WHERE} has format version {version!r}; this program reads 1 and {FORMAT_VERSION}"
    )
    assert error.next_step.endswith("install the tiue-export that wrote it (tiue-export 9.9.9).")


@pytest.mark.parametrize("text", ["{}", "[]", "3", '"text"', "null", "[1]"])
def test_json_that_is_no_manifest_has_no_format_version(text):
    error = refusal(text)
    assert (
        error.message
        == f"{WHERE} has format version None; this program reads 1 and {FORMAT_VERSION}"
    )
    assert error.next_step.endswith("install the tiue-export that wrote it.")


def test_a_newer_format_is_told_from_a_damaged_file_even_with_unknown_fields():
    data = {"format_version": FORMAT_VERSION + 1, "something": "new"}
    assert f"has format version {FORMAT_VERSION + 1}" in refusal(json.dumps(data)).message


@pytest.mark.parametrize("kind", [True, 1.0])
def test_a_format_version_that_only_compares_equal_to_the_old_one_is_refused(kind):
    message = refusal(json.dumps({**parsed(), "format_version": kind})).message
    assert message == f"{WHERE} has format version {kind}; this program reads 1 and 2"


def test_a_format_version_that_only_compares_equal_is_refused():
    message = refusal(json.dumps({**parsed(), "format_version": float(FORMAT_VERSION)})).message
    assert message == f"{WHERE}: format_version is '2.0'; expected int"


def test_a_plan_that_contradicts_itself_is_refused_with_the_reason():
    manifest = with_latents(sample(), Combination(4.25, (-2.5,)))
    error = refusal(manifest.to_json())
    assert error.message == (
        f"{WHERE}: the plan contradicts itself: the latents have 1 coefficients for 2 rows"
    )
    assert error.next_step == CHANGED


def test_unknown_fields_are_all_named():
    error = refusal(json.dumps({**parsed(), "zeta": 1, "alpha": 2}))
    assert error.message == f"{WHERE} has unknown fields: alpha, zeta"
    assert error.next_step == CHANGED


def test_an_unknown_field_deep_inside_is_named_with_its_place():
    data = parsed()
    data["graphs"]["unet_decoder"]["inputs"][0]["layout"] = "NCHW"
    message = refusal(json.dumps(data)).message
    assert message == f"{WHERE}: graphs.unet_decoder: inputs[0] has unknown fields: layout"


@pytest.mark.parametrize(
    "name", ["created_by", "source", "plan", "latent_shape", "vae_scaling_factor", "files"]
)
def test_a_missing_field_is_named(name):
    data = parsed()
    del data[name]
    error = refusal(json.dumps(data))
    assert error.message == f"{WHERE} lacks the field {name!r}"
    assert error.next_step == CHANGED


def test_a_missing_field_deep_inside_is_named_with_its_place():
    data = parsed()
    del data["files"]["model_index.json"]["sha256"]
    message = refusal(json.dumps(data)).message
    assert message == f"{WHERE}: files.model_index.json lacks the field 'sha256'"


@pytest.mark.parametrize(
    ("path", "wrong", "message"),
    [
        (["created_by"], 3, ": created_by is '3'; expected str"),
        (["vae_scale"], "8", ": vae_scale is '8'; expected int"),
        (["vae_scale"], 8.0, ": vae_scale is '8.0'; expected int"),
        (["vae_scale"], True, ": vae_scale is 'True'; expected int"),
        (["vae_scaling_factor"], "0.2", ": vae_scaling_factor is '0.2'; expected float"),
        (["vae_scaling_factor"], None, ": vae_scaling_factor is 'None'; expected float"),
        (["vae_scaling_factor"], False, ": vae_scaling_factor is 'False'; expected float"),
        (["parity_loss_allowed"], 0, ": parity_loss_allowed is '0'; expected bool"),
        (["source"], [], ": source is '[]'; expected an object"),
        (["source", "licence"], 3, ": source: licence is '3'; expected str | None"),
        (["source", "notes"], "a note", ": source: notes is 'a note'; expected a list"),
        (["source", "notes"], [1], ": source: notes[0] is '1'; expected str"),
        (["latent_shape"], 4, ": latent_shape is '4'; expected a list"),
        (["latent_shape", 1], 4.5, ": latent_shape[1] is '4.5'; expected int | str"),
        (["latent_shape", 0], None, ": latent_shape[0] is 'None'; expected int | str"),
        (
            ["plan", "passes", 0, "timesteps", 1],
            "1",
            ": plan: passes[0]: timesteps[1] is '1'; expected int | float",
        ),
        (["files"], [], ": files is '[]'; expected an object"),
        (["tools"], {"torch": 2}, ": tools.torch is '2'; expected str"),
        (["parity", 0, "gate"], "60", ": parity[0]: gate is '60'; expected float | None"),
        (
            ["graphs", "unet_decoder", "opset"],
            "19",
            ": graphs.unet_decoder: opset is '19'; expected int | None",
        ),
        (
            ["files", "model_index.json", "size_bytes"],
            -0.5,
            ": files.model_index.json: size_bytes is '-0.5'; expected int",
        ),
    ],
)
def test_a_value_of_the_wrong_type_is_named_with_what_was_expected(path, wrong, message):
    data = parsed()
    place = data
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = wrong
    error = refusal(json.dumps(data))
    assert error.message == WHERE + message
    assert error.next_step == CHANGED


def test_a_long_wrong_value_is_cut_in_the_message():
    message = refusal(json.dumps({**parsed(), "vae_scale": "x" * 10_000})).message
    assert message == f"{WHERE}: vae_scale is '{'x' * 60}'; expected int"
