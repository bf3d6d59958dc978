"""What the first step of a run begins with: noise, or a picture with noise on it (SDEdit: Meng et al. 2021, arXiv 2108.01073)."""

from collections.abc import Callable
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanodiff.config import UserError
from nanodiff.diffusion import samplers


class Beginning(NamedTuple):
    """Where a run begins, and what of the picture it keeps."""

    x: torch.Tensor  # [B, C, h, w], before the first step
    first: int = 0  # the first step
    # known(x, i): x before step i, what is outside the mask replaced by the original at that noise level
    known: Callable | None = None
    # [B, 1 + C, h, w], what an inpainting model is given with x: the mask and what is outside it
    beside: torch.Tensor | None = None


def begin(sd, start, steps, noise, shift):
    """The Beginning of a run of `sd` from a settings.Start. With a mask: an ordinary model repaints under it by `known`, an
    inpainting model is told by `beside`. Noise is drawn in diffusers' order."""
    schedule, strength = sd.schedule, start.strength
    if not start.begun:
        return Beginning(samplers.begin(schedule, steps, noise(), **shift))
    if start.denoising_start is not None:
        first = sd.first_after(start.denoising_start, samplers.times(schedule, steps, **shift))
    else:
        first = sd.first_step(steps, strength)
    if start.latents is not None:
        if tuple(start.latents.shape) != tuple(noise.shape):
            raise UserError(f"`latents` of {list(start.latents.shape)}, this run's are {list(noise.shape)}")
        clean = start.latents.to(sd.device, torch.float32)
        if start.denoising_start is not None:
            return Beginning(clean, first)
        return Beginning(samplers.begin(schedule, steps, noise(), clean, first, **shift), first)
    pixels = start.image.expand(noise.shape[0], *start.image.shape[1:])
    # an inpainting model begins with noise alone at full strength, without a look at the picture
    clean = None if sd.inpaints and strength == 1 else sd.encode_pixels(pixels, noise).float()
    drawn = noise()
    if start.mask is None:
        return Beginning(samplers.begin(schedule, steps, drawn, clean, first, **shift), first)
    mask = (start.mask.to(sd.device, torch.float32) >= 0.5).float()
    # at full strength nothing of the picture is kept under the mask
    x = samplers.begin(schedule, steps, drawn, None if strength == 1 else clean, first, **shift)
    small = F.interpolate(mask, size=drawn.shape[-2:])
    if sd.inpaints:
        outside = sd.encode_pixels(pixels.to(sd.device) * (mask < 0.5), noise).float()
        return Beginning(x, first, None, torch.cat([small.expand(len(x), -1, -1, -1), outside], dim=1))
    if sd.vae is not None:
        # diffusers samples the posterior of the masked picture here; a 4-channel UNet does not use it, but the
        # generator moves on, and with it every later draw.
        noise()

    def known(x, i):
        done = i >= samplers.calls(schedule, steps)
        original = clean if done else samplers.begin(schedule, steps, drawn, clean, i, **shift)
        return (1 - small) * original + small * x

    return Beginning(x, first, known)
