"""VAE: recorded outputs, both spellings of old and new files, manifests, tiling, refusals."""

import json

import pytest
import torch
from util import TINY, built, golden, manifest, max_error, rms_ratio

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models.vae import AutoencoderKL, Config
from nanodiff.output import images


@pytest.fixture(
    scope="module", params=["sd15", "sd21-v", "sd-turbo", "sdxl", "sdxl-turbo", "sd35-medium", "sd35-large-turbo"]
)
def vae(request):
    return request.param, weights.load(AutoencoderKL, TINY / request.param / "vae", torch.float32)


def test_golden(vae):
    name, model = vae
    tensors, _ = golden(f"{name}.vae")
    mean, logvar = model.encode_moments(tensors["image"])
    assert max_error(mean, tensors["moments.mean"]) < 1e-5
    assert max_error(logvar, tensors["moments.logvar"]) < 1e-5
    assert max_error(model.decode_raw(tensors["latents"]), tensors["decoded"]) < 1e-5
    noise = torch.randn(mean.shape, generator=torch.Generator().manual_seed(11))
    got = model.encode(tensors["image"], noise) / model.cfg.scaling_factor + (model.cfg.shift_factor or 0)
    assert max_error(got, tensors["sample_seed11"]) < 1e-5


def test_encode_and_decode_are_scaled_and_shifted():
    cfg = Config.from_json(
        json.loads((TINY / "sd15" / "vae" / "config.json").read_text()) | {"shift_factor": 0.5, "scaling_factor": 2.0}
    )
    model = AutoencoderKL(cfg).eval()
    pixels = torch.rand(1, 3, 16, 24) * 2 - 1
    with torch.no_grad():
        latents = model.encode(pixels)
        assert max_error(latents, (model.encode_moments(pixels)[0] - 0.5) * 2) < 1e-6
        assert max_error(model.decode(latents), model.decode_raw(latents / 2 + 0.5)) < 1e-6


@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21", "sd-turbo", "sdxl", "sdxl-turbo", "sd35-medium"])
def test_manifest(name):
    """The real model's config builds exactly its file's parameters."""
    config, parameters = manifest(f"{name}.vae")
    names = {weights.renamed(k, "AutoencoderKL"): v for k, v in parameters.items()}
    weights.check_names(built(AutoencoderKL, config), names, name)


@pytest.mark.parametrize(("size", "tile"), [((40, 27), 16), ((16, 33), 8), ((9, 9), 64), ((21, 20), 7)])
def test_tiled_is_the_whole_picture(vae, size, tile):
    """No seams, also at the borders of tiles and picture: every value is that of decode()."""
    model = vae[1]
    latents = torch.randn(2, model.cfg.latent_channels, *size)
    whole, tiled = model.decode(latents), model.decode_tiled(latents, tile)
    assert max_error(tiled, whole) < 1e-5
    assert (images.to_uint8(tiled).int() - images.to_uint8(whole).int()).abs().max() <= 1


def test_tiled_in_half_precision(vae):
    model = weights.load(AutoencoderKL, TINY / vae[0] / "vae", torch.bfloat16)
    latents = torch.randn(1, model.cfg.latent_channels, 24, 24).bfloat16()
    want = vae[1].decode(latents.float())
    assert rms_ratio(model.decode_tiled(latents, 8), want) < 1.2 * rms_ratio(model.decode(latents), want)


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"latents_mean": [0.1]}, "latents_mean"),
        ({"down_block_types": ["AttnDownEncoderBlock2D"] * 4}, "down_block_types"),
        ({"act_fn": "relu"}, "act_fn"),
        ({"latent_channel": 4}, "latent_channels"),
    ],
)
def test_unsupported_config_is_named(change, says):
    raw = json.loads((TINY / "sd15" / "vae" / "config.json").read_text())
    with pytest.raises(UserError, match=says):
        Config.from_json(raw | change)
