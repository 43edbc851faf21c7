"""tiue.json is protected as its files are: by a digest, by what must agree, and by parity."""

from __future__ import annotations

import json
import random
import re

import pytest
from sealed_manifest import sealed_text

from tiue_export.bundle.manifest import Manifest
from tiue_export.bundle.read import MANIFEST_FILE, open_bundle
from tiue_export.errors import BundleError, ParityError


def test_no_flipped_bit_opens(tiny_bundle):
    """Those that leave the content as it was, such as a space for a line's end, may open."""
    text = tiny_bundle.manifest.to_json().encode()
    chance = random.Random(0)
    for _ in range(2000):
        flipped, at = bytearray(text), chance.randrange(len(text))
        flipped[at] ^= 1 << chance.randrange(8)
        try:
            manifest = Manifest.from_json(flipped.decode("utf-8"), "tiue.json")
        except (BundleError, UnicodeDecodeError):
            continue
        assert manifest == tiny_bundle.manifest


def test_another_scaling_factor_is_told_as_an_altered_manifest(run, bundle_copy):
    path = bundle_copy / MANIFEST_FILE
    text = path.read_text("utf-8")
    factor = re.compile(r'"vae_scaling_factor": [\d.]+')
    assert factor.search(text)
    path.write_text(factor.sub('"vae_scaling_factor": 0.38215', text), "utf-8")
    for command in (["inspect"], ["generate"], ["parity"]):
        code, _, err = run(*command, bundle_copy, *(["fox"] if command == ["generate"] else []))
        assert code == BundleError.exit_code
        assert "tiue.json was altered: its content is not that of its sha256" in err
        assert "tiue-export bundle seal BUNDLE" in err


def test_an_edit_on_purpose_is_sealed_and_parity_judges_what_it_draws(run, bundle_copy):
    path = bundle_copy / MANIFEST_FILE
    data = json.loads(path.read_text("utf-8"))
    data["vae_scaling_factor"] = 0.38215
    path.write_text(json.dumps(data), "utf-8")
    code, out, err = run("bundle", "seal", bundle_copy)
    assert (code, err) == (0, "")
    assert f"tiue-export parity {bundle_copy}" in out
    bundle = open_bundle(bundle_copy)
    assert bundle.manifest.vae_scaling_factor == 0.38215
    code, _, err = run("parity", bundle_copy)
    assert code == ParityError.exit_code
    assert "manifest, latents / VAE scaling factor" in err


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"vae_scaling_factor": -0.2}, "vae_scaling_factor is -0.2; expected more than 0"),
        ({"vae_scale": 0}, "vae_scale is 0; expected more than 0"),
        ({"vae_scale": 4}, "vae_decoder draws"),
        ({"latent_shape": [1, 4, 8, 16]}, "unet_encoder has sample"),
        (
            {"latent_shape": [1, 4, 0, 8]},
            "latents (1, 4, 0, 8) and text (1, 77, 32) need sides of 1 or more",
        ),
        ({"text_shape": [1, 77, 31]}, "text_encoder has last_hidden_state"),
    ],
)
def test_what_does_not_fit_together_is_refused_even_when_sealed(tiny_bundle, change, message):
    data = {**json.loads(tiny_bundle.manifest.to_json()), **change}
    with pytest.raises(BundleError, match=f"tiue.json contradicts itself: {re.escape(message)}"):
        Manifest.from_json(sealed_text(data), "tiue.json")


def test_sealing_refuses_what_cannot_be(run, bundle_copy):
    path = bundle_copy / MANIFEST_FILE
    data = json.loads(path.read_text("utf-8"))
    path.write_text(json.dumps({**data, "vae_scale": -8}), "utf-8")
    code, _, err = run("bundle", "seal", bundle_copy)
    assert code == BundleError.exit_code
    assert "vae_scale is -8; expected more than 0" in err
