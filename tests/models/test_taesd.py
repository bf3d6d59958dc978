"""TAESD: the real weights against their recordings where they are there, its layout, refusals."""

import json

import pytest
import torch
from safetensors.torch import load_file
from util import ROOT, max_error

from nanodiff.config import UserError
from nanodiff.models import taesd

REAL = ROOT.parent / "shared" / "real" / "taesd"


@pytest.mark.skipif(not REAL.exists(), reason="the real weights are not here")
@pytest.mark.parametrize("name", ["taesd", "taesdxl", "taesd3"])
@pytest.mark.parametrize("picture", ["astronaut", "chelsea"])
def test_real_weights(name, picture):
    tensors, facts = load_file(REAL / "goldens.safetensors"), json.loads((REAL / "goldens.json").read_text())
    encode, decode = (
        taesd.from_state(load_file(REAL / f"{name}_{w}.safetensors"), w, w).float() for w in ("encoder", "decoder")
    )
    pixels = tensors[f"input_u8.{picture}"].permute(2, 0, 1)[None].float() / 255
    latents = encode(pixels)
    assert max_error(latents[0], tensors[f"{name}.{picture}.latent"].float()) < 1e-4  # 2e-5 seen without AVX-512
    got = decode(latents).clamp(0, 1)
    off = (got[0] * 255).round().permute(1, 2, 0) - tensors[f"{name}.{picture}.recon_u8"].float()
    assert off.abs().max() <= 1
    psnr = -10 * ((got - pixels) ** 2).mean().log10().item()
    assert psnr == pytest.approx(facts[f"{name}.{picture}"]["psnr"], abs=0.01)


@pytest.mark.parametrize("channels", [4, 16])
def test_layouts(channels):
    """Bare sequential names, ours with a prefix, and diffusers' AutoencoderTiny, which does not count the clamp."""
    for which, make in (("decoder", taesd.decoder), ("encoder", taesd.encoder)):
        model = make(channels)
        state = model.state_dict()
        off = 1 if which == "decoder" else 0
        tiny = {f"{which}.layers.{int(k.split('.')[0]) - off}.{k.split('.', 1)[1]}": v for k, v in state.items()}
        x = torch.randn(1, channels, 4, 6) if which == "decoder" else torch.rand(1, 3, 32, 48)
        for form in (state, {f"{which}.{k}": v for k, v in state.items()}, tiny):
            got = taesd.from_state(form, which, "file")
            assert torch.equal(got(x), model(x))
    assert taesd.decoder(channels)(torch.randn(1, channels, 4, 6)).shape == (1, 3, 32, 48)


def test_latents_are_limited_softly():
    assert taesd.Clamp()(torch.tensor([100.0, 0.1])).tolist() == pytest.approx([3.0, 0.1], abs=1e-3)


@pytest.mark.parametrize(
    ("state", "says"),
    [
        ({"x": torch.zeros(1)}, "no TAESD decoder"),
        (taesd.encoder(4).state_dict(), "no TAESD decoder"),
        ({k: v for k, v in taesd.decoder(4).state_dict().items() if k != "3.conv.0.bias"}, "other layers"),
    ],
)
def test_refusals(state, says):
    with pytest.raises(UserError, match=says):
        taesd.from_state(state, "decoder", "file")
