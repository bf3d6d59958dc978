"""TAESD: the tiny autoencoder for previews and drafts (madebyollin, https://github.com/madebyollin/taesd, MIT).

    pixels = decoder(latents)          a hundredth of the VAE's work, latents scaled as the denoiser has them

A distilled stand-in for the VAE of a model family: plain 3×3 convolutions and ReLUs at 64 channels, no norms, no
attention. Its latents have the denoiser's scale, so there is no scaling_factor here. Files are sequential: the layer at position n is stored as `n.…`; the layers are read from those names.
"""

import re

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError

PREFIXES = ("decoder.layers.", "encoder.layers.", "decoder.", "encoder.", "")  # diffusers' AutoencoderTiny, and bare


class Block(nn.Module):
    """ReLU(conv ReLU conv ReLU conv (x) + x)"""

    def __init__(self, channels):
        super().__init__()
        convs = [nn.Conv2d(channels, channels, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])

    def forward(self, x):
        return F.relu(self.conv(x) + x)


class Clamp(nn.Module):
    """A soft limit to ±3: latents beyond it are errors of the sampler."""

    def forward(self, x):
        return torch.tanh(x / 3) * 3


def decoder(latent_channels, channels=64):
    """latents [B, C, h, w] -> pictures [B, 3, 8h, 8w] in [0, 1]."""

    def stage():
        return (
            *(Block(channels) for _ in range(3)),
            nn.Upsample(scale_factor=2),
            nn.Conv2d(channels, channels, 3, 1, 1, bias=False),
        )

    first = nn.Conv2d(latent_channels, channels, 3, padding=1)
    last = nn.Conv2d(channels, 3, 3, padding=1)
    return nn.Sequential(Clamp(), first, nn.ReLU(), *stage(), *stage(), *stage(), Block(channels), last)


def encoder(latent_channels, channels=64):
    """pictures [B, 3, H, W] in [0, 1] -> latents [B, C, H/8, W/8]."""

    def stage():
        return nn.Conv2d(channels, channels, 3, 2, 1, bias=False), *(Block(channels) for _ in range(3))

    first = nn.Conv2d(3, channels, 3, padding=1)
    last = nn.Conv2d(channels, latent_channels, 3, padding=1)
    return nn.Sequential(first, Block(channels), *stage(), *stage(), *stage(), last)


def from_state(state, which, where):
    """The decoder or encoder (`which`) whose tensors are in `state`. Raises UserError."""
    state = {k.removeprefix("taesd_"): v for k, v in state.items()}
    for prefix in PREFIXES:
        mine = {k.removeprefix(prefix): v for k, v in state.items() if k.startswith(prefix)}
        mine = {k: v for k, v in mine.items() if re.match(r"\d+\.", k)}
        if mine and (prefix.startswith(which) or not prefix or prefix.endswith("layers.")) and _is(which, mine):
            break
    else:
        raise UserError(f"{where}: has no TAESD {which}")
    if prefix == "decoder.layers." and "0.weight" in mine:  # diffusers counts without the clamp, which has no weights
        mine = {re.sub(r"^\d+", lambda m: str(int(m[0]) + 1), k): v for k, v in mine.items()}
    last = max(int(k.split(".")[0]) for k in mine)
    channels = mine["1.weight"].shape[1] if which == "decoder" else mine[f"{last}.weight"].shape[0]
    model = (decoder if which == "decoder" else encoder)(channels)
    wanted = {k: v.shape for k, v in model.state_dict().items()}
    if wanted != {k: v.shape for k, v in mine.items()}:
        raise UserError(f"{where}: is not TAESD's {which}: other layers or sizes")
    model.load_state_dict(mine, assign=True)
    return model.eval().requires_grad_(False)


def _is(which, state):
    """Does a sequential state begin like a decoder (latents in) or like an encoder (pictures in)?"""
    first = state.get("1.weight" if "0.weight" not in state else "0.weight")
    return first is not None and first.dim() == 4 and (first.shape[1] == 3) == (which == "encoder")
