"""What the first step of a run begins with: noise, or a picture with noise on it (SDEdit: Meng et al. 2021, arXiv 2108.01073)."""

import torch
import torch.nn.functional as F

from nanodiff.config import UserError
from nanodiff.diffusion import samplers


def begin(sd, start, steps, noise, shift):
    """(first x, first step, known) of a run of `sd` from a settings.Start. known(x, i), or None: x before step i with everything outside
    the mask replaced by the original at that noise level, which is inpainting with an ordinary model."""
    schedule, strength = sd.schedule, start.strength
    if start.image is None:
        return samplers.begin(schedule, steps, noise(), **shift), 0, None
    if not 0 < strength <= 1:
        raise UserError(f"`strength` {strength} must be above 0 and at most 1")
    first = sd.first_step(steps, strength)
    if first >= steps:
        raise UserError(f"`strength` {strength} with {steps} steps leaves no step to take; raise one of them")
    pixels = start.image.expand(noise.shape[0], *start.image.shape[1:])
    clean = sd.encode_pixels(pixels, noise).float()
    drawn = noise()
    if start.mask is None:
        return samplers.begin(schedule, steps, drawn, clean, first, **shift), first, None
    if sd.vae is not None:
        # diffusers samples the posterior of the masked picture here; a 4-channel UNet does not use it, but the
        # generator moves on, and with it every later draw.
        noise()
    mask = F.interpolate(start.mask.to(sd.device, torch.float32), size=clean.shape[-2:])

    def known(x, i):
        done = i >= samplers.calls(schedule, steps)
        original = clean if done else samplers.begin(schedule, steps, drawn, clean, i, **shift)
        return (1 - mask) * original + mask * x

    # at full strength nothing of the picture is kept under the mask
    begun = samplers.begin(schedule, steps, drawn, None if strength == 1 else clean, first, **shift)
    return begun, first, known
