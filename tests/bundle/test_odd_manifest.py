"""A sealed tiue.json that says odd things is refused by field, or shown as it is."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from pathlib import Path

import pytest
from sealed_manifest import sealed_text

from tiue_export.bundle.archive import pack_bundle, unpack_bundle
from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import MANIFEST_FILE, open_bundle
from tiue_export.errors import BundleError

FORMAT1 = Path(__file__).parent / "format1" / "bundle"


@pytest.fixture
def bundle(tmp_path) -> Path:
    return Path(shutil.copytree(FORMAT1, tmp_path / "bundle"))


def seal(bundle: Path, change) -> None:
    """Change what tiue.json says, in today's format, under a digest that fits."""
    path = bundle / MANIFEST_FILE
    text = path.read_text("utf-8")
    data = json.loads(Manifest.from_json(text, "tiue.json").to_json())
    change(data)
    path.write_text(sealed_text(data), "utf-8")


def put(*keys, value):
    def change(data) -> None:
        for key in keys[:-1]:
            data = data[key]
        data[keys[-1]] = value

    return change


def renamed(old: str, new: str):
    def change(data) -> None:
        graphs = data["graphs"]
        graphs[new] = graphs.pop(old)

    return change


LATENTS = ("graphs", "vae_decoder", "inputs", 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            put("graphs", "text_encoder", "inputs", 0, "shape", value=[1, 77, 1]),
            "text_encoder takes input_ids (1, 77, 1); expected 2 sides",
        ),
        (put(*LATENTS, "shape", value=[]), "vae_decoder takes latent_sample (); expected 4 sides"),
        (
            put(*LATENTS, "dtype", value="[bold]"),
            "vae_decoder takes latent_sample as '[bold]'; expect",
        ),
        (put("graphs", "vae_decoder", "inputs", value=[]), "vae_decoder takes nothing"),
        (put("graphs", "unet_decoder", "outputs", value=[]), "unet_decoder gives nothing"),
        (
            put("graphs", "unet_encoder", "outputs", 0, "shape", value=[1, 32, -8, 8]),
            "unet_encoder gives mid_sample (1, 32, -8, 8); a side is 1 to 1,048,576",
        ),
        (
            put("graphs", "text_encoder", "inputs", 0, "shape", value=["[/red]", 77]),
            "text_encoder takes input_ids ('[/red]', 77); a side is 1 to 1,048,576",
        ),
        (
            put("graphs", "unet_decoder", "outputs", 0, "name", value="[/red]"),
            "unet_decoder gives [/red]; expected one 'latents'",
        ),
        (renamed("unet_encoder", ""), "there is no graph ''; there are: text_encoder, "),
        (renamed("unet_encoder", "."), "there is no graph '.'; there are: text_encoder, "),
    ],
)
def test_graphs_that_nothing_can_be_drawn_with_are_told(bundle, change, message):
    seal(bundle, change)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert f"tiue.json cannot be drawn from: {message}" in caught.value.message


@pytest.mark.parametrize(
    ("outputs", "said"),
    [
        (lambda own: [*own, *own], "latent_sample (1, 4, 8, 8), latent_sample (1, 4, 8, 8)"),
        (lambda own: [{**own[0], "shape": [1, 4]}], "latent_sample (1, 4)"),
    ],
)
def test_what_encodes_pictures_gives_one_tensor(bundle, outputs, said):
    def change(data) -> None:
        graphs = data["graphs"]
        decoder = graphs["vae_decoder"]
        ends = {"inputs": decoder["outputs"], "outputs": outputs(decoder["inputs"])}
        graphs["vae_encoder"] = {**decoder, **ends}

    seal(bundle, change)
    with pytest.raises(BundleError) as caught:
        open_bundle(bundle)
    assert f"vae_encoder gives {said}; expected one tensor of 4 sides" in caught.value.message


@pytest.mark.parametrize("name", ["", ".", "/etc/passwd", "../x", "a/./b", "a\\b", "\x1b[31m"])
def test_a_file_is_named_in_one_plain_way(bundle, name):
    seal(bundle, put("files", name, value={"size_bytes": 1, "sha256": "a"}))
    with pytest.raises(BundleError, match="the manifest points outside the bundle") as caught:
        open_bundle(bundle)
    assert caught.value.message.isprintable()


@pytest.mark.parametrize(
    ("text", "message"),
    [(b"[]", "it is no JSON object"), (b"\xff", "can't decode byte 0xff"), (b"NaN", "NaN is no")],
)
def test_a_json_file_of_a_bundle_is_read_strictly(bundle, text, message):
    opened = open_bundle(bundle)
    assert opened.json_object("model_index.json")["_class_name"] == "TiUEPipeline"
    (bundle / "model_index.json").write_bytes(text)
    with pytest.raises(BundleError, match=r"model_index\.json cannot be read: ") as caught:
        opened.json_object("model_index.json")
    assert message in caught.value.message


def test_a_number_of_a_thousand_digits_is_no_size(bundle):
    seal(bundle, put("graphs", "vae_decoder", "opset", value=10**1000))
    with pytest.raises(BundleError, match=r"opset is '1000+'; expected a number of 64 bits"):
        open_bundle(bundle)


@pytest.mark.parametrize("text", ["[/red]", "[bold]x", "[link=https://x]a[/link]", ":smile:"])
def test_markup_in_a_manifest_is_shown_as_it_stands(bundle, run, text):
    def change(data) -> None:
        data["source"]["name"] = data["source"]["family"] = data["precision"] = text
        data["source"]["notes"] = data["tools"]["torch"] = text
        data["source"]["notes"] = [text]
        data["parity"][0] |= {"hop": text, "subject": text}
        data["graphs"]["unet_encoder"]["precision"] = text
        data["graphs"]["unet_encoder"]["outputs"][0]["name"] = text

    seal(bundle, change)
    code, out, err = run("inspect", bundle)
    assert (code, err) == (0, "")
    assert out.count(text) >= 7


def test_control_characters_in_a_manifest_do_not_reach_the_terminal(bundle, run):
    seal(bundle, put("source", "name", value="a\x1b[31mred\x07"))
    code, out, _ = run("inspect", bundle)
    assert code == 0
    assert "\x1b" not in out
    assert r"a\x1b[31mred\x07" in out


def archive_with(bundle: Path, headers: dict[str, str]) -> Path:
    """The bundle packed, its second member behind an extended header of these values."""
    packed = pack_bundle(open_bundle(bundle), bundle.with_name("bundle.tar")).path
    with tarfile.open(packed) as tar:
        contents = [(member, tar.extractfile(member).read()) for member in tar]
    with tarfile.open(packed, "w", format=tarfile.PAX_FORMAT) as tar:
        for number, (member, body) in enumerate(contents):
            member.pax_headers = headers if number == 1 else {}
            tar.addfile(member, io.BytesIO(body))
    return packed


@pytest.mark.parametrize(
    "headers",
    [
        {"GNU.sparse.major": "1", "GNU.sparse.minor": "0", "GNU.sparse.realsize": "9" * 30},
        {"GNU.sparse.major": "0", "GNU.sparse.minor": "1", "GNU.sparse.map": "0,x,1"},
        {"GNU.sparse.map": "1,2,3", "GNU.sparse.size": "-1"},
        {"GNU.sparse.size": "x", "GNU.sparse.numblocks": "y"},
        {"size": "-1"},
        {"size": "9" * 40},
        {"path": ""},
        {"path": "."},
        {"path": "a/../b"},
    ],
    ids=str,
)
def test_an_archive_with_headers_that_cannot_be_is_refused(bundle, tmp_path, headers):
    packed = archive_with(bundle, headers)
    with pytest.raises(BundleError) as caught:
        unpack_bundle(packed, tmp_path / "out")
    assert str(packed) in caught.value.message
    assert not (tmp_path / "out").exists()
