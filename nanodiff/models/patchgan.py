"""A patch discriminator: pixels [B, 3, H, W] -> a logit for every overlapping patch of 70 pixels [B, 1, h, w].

Isola et al. 2017, arXiv 1611.07004 §3.2, with group in place of batch norm, so that a picture's score does not depend on
its neighbours in the batch. Trained with the hinge loss (Lim & Ye 2017, arXiv 1705.02894 eq. 1), as VQGAN's
(Esser et al. 2021, arXiv 2012.09841 §3.2).
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.models.layers import GroupNorm


class PatchDiscriminator(nn.Module):
    """Strided convolutions: each logit is made of its patch (and of the norms' statistics), so texture is judged, and what the whole
    shows is left to the other losses. levels: how many times beyond the first; 3 see 70 pixels."""

    def __init__(self, width=64, levels=3, groups=16):
        super().__init__()
        layers, c = [nn.Conv2d(3, width, 4, stride=2, padding=1), nn.LeakyReLU(0.2)], width
        for i in range(1, levels + 1):
            out = width * 2 ** min(i, 3)
            stride = 2 if i < levels else 1
            layers += [
                nn.Conv2d(c, out, 4, stride=stride, padding=1, bias=False),
                GroupNorm(groups, out, 1e-5),
                nn.LeakyReLU(0.2),
            ]
            c = out
        self.layers = nn.Sequential(*layers, nn.Conv2d(c, 1, 4, padding=1))

    def forward(self, pixels):
        return self.layers(pixels)


def generator_loss(discriminator, fake):
    """-E[D(fake)], whose gradient reaches the picture but not the discriminator."""
    frozen = {k: v.detach() for k, v in discriminator.named_parameters()}
    return -torch.func.functional_call(discriminator, frozen, (fake,)).float().mean()


def discriminator_loss(call, real, fake):
    """½ E[max(0, 1 - D(real))] + ½ E[max(0, 1 + D(fake))]. call: the discriminator, in one pass over both."""
    on_real, on_fake = call(torch.cat([real, fake.detach()])).float().chunk(2)
    return 0.5 * (F.relu(1 - on_real).mean() + F.relu(1 + on_fake).mean())
