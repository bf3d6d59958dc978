"""Layers that a CPU multiplies in 8 bits: weights kept as codes in oneDNN's layout, times activations that become codes at every call.

w ≈ scale · code, one scale an output, symmetric; x ≈ scale · (code - zero), one scale and zero for all of a picture, so that it does not depend on
those beside it (Jacob et al. 2018, arXiv 1712.05877, eq. 1; the range is found at every call: "dynamic"). Products of codes are summed in 32-bit whole
numbers, so the only error is that of the two roundings.

A processor with VNNI or AMX multiplies codes twice as fast as bf16. It is done for layers behind a norm, which the models name in after_norm(): what comes out
of a norm is of one size everywhere. What a residual stream or a gated unit holds is not: a few large numbers would take the whole range (Dettmers et al.
2022, "LLM.int8()", arXiv 2208.07339 §3.2), so the layers that read those stay with quantize.QuantizedLinear. Of SD 1.5's UNet (random weights) the shortcuts
alone would add an error of 0.038, the narrowing half of the feed-forwards 0.032; all layers behind norms together add 0.022.

The operators are those that torch.compile uses on a CPU; usable() tries them. They have no gradient.
"""

import functools
import math

import torch
from torch import nn

from nanodiff.device import onednn

INSTRUCTIONS = ("avx512_vnni", "avx_vnni", "amx_int8")
LEAST = 1 << 14  # weights of a layer below which nothing is gained


def coded(x):
    """(codes uint8 in the layout of x, scale, zero): x ≈ scale · (codes - zero), zero among the numbers that are met exactly. A scale of NaN where x is
    not finite."""
    low, high = min(x.amin().item(), 0.0), max(x.amax().item(), 0.0)
    scale = max((high - low) / 254, 1e-30)  # of 255 steps one is left for the rounding of zero
    if not math.isfinite(high - low):
        return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
    zero = round(-low / scale)
    steps = x.float().mul_(1 / scale) if x.dtype != torch.float32 else x * (1 / scale)
    return steps.add_(zero + 0.5).to(torch.uint8), scale, zero


class _Int8:
    """What both kinds of layer share; `codes` are the packed weight, `scale` [O] one number for each output."""

    @property
    def weight(self):
        """Its shape alone: the numbers are in oneDNN's layout."""
        return torch.empty(self.shape, device="meta")

    def _each(self, x, product):
        """product(codes, scale, zero, type) of each picture of x [B, …], together."""
        if torch.is_grad_enabled() and x.requires_grad:
            raise RuntimeError("layers in 8 bits (`quantize` int8 on a CPU) have no gradient")
        exact = torch.float32 if x.dtype == torch.float16 else x.dtype
        made = [product(*coded(one), exact).to(x.dtype) for one in x.split(1)]
        return made[0] if len(made) == 1 else torch.cat(made)

    def _bias(self):
        return None if self.bias is None else self.bias.float()


class Int8Linear(_Int8, nn.Linear):
    """A linear layer in 8 bits: [B, …, D] -> [B, …, O]."""

    def forward(self, x):
        bias, none = self._bias(), torch.zeros(len(self.scale), dtype=torch.int32)
        product = torch.ops.onednn.qlinear_pointwise
        return self._each(
            x,
            lambda codes, scale, zero, dtype: product(
                codes, scale, zero, self.codes, self.scale, none, bias, 1.0, 0, dtype, "none", [], ""
            ),
        )


class Int8Conv2d(_Int8, nn.Conv2d):
    """A convolution in 8 bits: [B, C, H, W] -> [B, C', H', W'], channels last."""

    def forward(self, x):
        bias, none = self._bias(), torch.zeros(len(self.scale), dtype=torch.int32)
        where = (self.stride, self.padding, self.dilation, self.groups)
        product = torch.ops.onednn.qconv2d_pointwise
        return self._each(
            x.contiguous(memory_format=torch.channels_last),
            lambda codes, scale, zero, dtype: product(
                codes, scale, zero, self.codes, self.scale, none, bias, *where, 1.0, 0, dtype, "none", [], ""
            ),
        )


def fits(layer):
    """Whether pack() takes a layer: an ordinary linear layer or convolution of some size."""
    plain = type(layer) in (nn.Linear, nn.Conv2d) and layer.weight.numel() >= LEAST
    return plain and (
        type(layer) is nn.Linear or (layer.padding_mode == "zeros" and not isinstance(layer.padding, str))
    )


def pack(layer, codes, absmax):
    """Let a plain layer compute in 8 bits, in place: codes int8 [O, …] and absmax fp32 [O] of its weight (quantize.to_int8)."""
    layer.scale, layer.shape, layer.stands_for = absmax / 127, layer.weight.shape, layer.weight.numel()
    if isinstance(layer, nn.Conv2d):
        where = (layer.stride, layer.padding, layer.dilation, layer.groups)
        codes = codes.contiguous(memory_format=torch.channels_last)
        # a zero that is not 0, for which the layout holds the sums of the codes
        layer.codes = torch.ops.onednn.qconv_prepack(codes, layer.scale, 1.0, 1, *where, None)
    else:
        layer.codes = torch.ops.onednn.qlinear_prepack(codes, None)
    del layer.weight
    layer.__class__ = Int8Conv2d if isinstance(layer, nn.Conv2d) else Int8Linear
    return layer


@functools.cache
def usable():
    """Whether this processor multiplies 8 bits by an instruction for it, and this PyTorch by operators that give what is meant: without the instruction
    sums of two products are cut at 16 bits."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    if not any(known.get(k) for k in INSTRUCTIONS) or onednn.unusable(torch.float32):
        return False
    with torch.device("cpu"):
        for layer in (nn.utils.skip_init(nn.Linear, 64, 32), nn.utils.skip_init(nn.Conv2d, 64, 32, 3, padding=1)):
            layer.requires_grad_(False)
            layer.bias.data = torch.arange(32.0)
            codes = torch.full(layer.weight.shape, 127, dtype=torch.int8)
            codes[::2] = -127  # the largest sums of either sign
            layer.weight.data = codes.float()
            x = torch.linspace(-1, 254, 1600).view((1, 64, 5, 5) if isinstance(layer, nn.Conv2d) else (1, 25, 64))
            meant = layer(x.round())
            try:
                made = pack(layer, codes, torch.full((32,), 127.0))(x.round())
            except (AttributeError, RuntimeError, TypeError):
                return False
            if not torch.allclose(made, meant, rtol=1e-2, atol=0.01 * meant.abs().max().item()):
                return False
    return True
