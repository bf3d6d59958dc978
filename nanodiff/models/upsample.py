"""How a picture is enlarged: doubled and convolved, as four small convolutions of what is there.

A 3x3 convolution of a picture whose pixels are all doubled reads each source pixel up to four times; for each of the four phases of the
result its nine weights fall on 2x2 source pixels. So the sums of weights are taken once and kept, until the weights change.
"""

import itertools

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.device import derived
from nanodiff.models.layers import _lean, _plain, kernels


class Upsample(nn.Module):
    """Nearest neighbour to twice the size (or to the `size` of a skip), then a 3×3 convolution.

    In the doubled picture a 3×3 window sees only 2×2 different pixels, so each of the four positions of a pixel among its
    copies ("phases") is a 2×2 convolution of the small picture, with sums of the 3×3 weights: 4/9 of the work. Row 2i
    sees rows i − 1, i, i and takes the weights w₀ and w₁ + w₂; row 2i + 1 sees i, i, i + 1 and takes w₀ + w₁ and w₂.
    """

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)
        self.phases = ()  # (what the weight was, [the convolution]), not in the checkpoint; None: do without

    def forward(self, x, size=None):
        H, W = x.shape[-2:]
        # A LoRA hangs on the convolution's call, and a weight that was packed (onednn.py) is empty.
        usable = self.phases is not None and not self.conv._forward_hooks and self.conv.weight.numel()
        doubled = size is None or tuple(size) == (2 * H, 2 * W)
        if usable and doubled and not torch.is_grad_enabled() and not torch.compiler.is_compiling():
            return self._by_phases(x)  # [B, C, H, W] -> [B, C, 2H, 2W]
        x = F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")
        return self.conv(x)

    def _by_phases(self, x):
        C = x.shape[1]
        weight, bias = self.conv.weight, self.conv.bias
        state = (
            weight.data_ptr(),
            derived.stamp(weight),
            bias.data_ptr(),
            derived.stamp(bias),
            weight.dtype,
            weight.device,
            type(self.conv),
        )
        if not self.phases or self.phases[0] != state:
            conv = type(self.conv)(C, 4 * C, 2, padding=1, device="meta")
            taken = (((0, 1), (1, 2)), ((0, 2), (2, 1)))  # first row (or column) and how many, for each phase
            wide = torch.promote_types(weight.dtype, torch.float32)  # summed in fp32, rounded once
            # the four of phase (0, 0), of (0, 1), …, each [C, C]
            sums = [
                weight.narrow(2, *rows).narrow(3, *columns).sum((2, 3), dtype=wide).to(weight.dtype)
                for a, b in itertools.product(range(2), repeat=2)
                for rows, columns in itertools.product(taken[a], taken[b])
            ]
            sums = torch.stack(sums).view(4, 2, 2, C, C).permute(0, 3, 4, 1, 2).flatten(0, 1)
            sums = sums.contiguous(memory_format=torch.channels_last)
            conv.weight = nn.Parameter(sums, requires_grad=False)
            conv.bias = nn.Parameter(self.conv.bias.repeat(4), requires_grad=False)
            self.phases = (state, [conv])
        conv = self.phases[1][0]
        if _lean(x) and _plain(conv, nn.Conv2d):
            return kernels.interleave(F.conv2d(x, conv.weight, None, padding=1), self.conv.bias)
        last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        return kernels.interleave(conv(x), last=last)
