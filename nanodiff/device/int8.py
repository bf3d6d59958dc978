"""Layers that a CPU multiplies in 8 bits: weights kept as codes in oneDNN's layout, times activations that become codes at every call.

w ≈ scale · code, one scale an output, symmetric; x ≈ scale · (code - zero), one scale and zero for all of a picture, so that it does not depend on
those beside it (Jacob et al. 2018, arXiv 1712.05877, eq. 1; the range is found at every call: "dynamic"). Products of codes are summed in 32-bit whole
numbers, so the only error is that of the two roundings.

A processor with VNNI or AMX multiplies codes twice as fast as bf16. It is done for layers behind a norm, which the models name in after_norm(), with the size
that the norm gives to each channel by its gain and bias. Trained gains differ much, and a few large channels would take the whole range; so channels are
divided, and the weights that read them multiplied, by √(size / largest weight): both are then of like sizes ("SmoothQuant", Xiao et al. 2022, arXiv 2211.10438, eq. 4
with α = ½; the sizes are the norms' in place of a sample's). Of what a residual stream or a gated unit holds no size is known, so the layers that read those
stay with quantize.QuantizedLinear: of SD 1.5's UNet (random weights) the shortcuts alone would add an error of 0.038, the narrowing half of the feed-forwards
0.032; all layers behind norms together add 0.022.

The operators are those that torch.compile uses on a CPU; usable() tries them. They have no gradient.
"""

import functools
import math

import torch
from torch import nn

from nanodiff.device import onednn

PIECE = 1 << 20  # weights that are in fp32 at a time: 4 MB, which stay in the caches
LEAST = 1 << 14  # weights of a layer below which nothing is gained


def balance(weight, size):
    """What the channels of a layer's input are divided by, and its weight [O, C, …] multiplied: [C]. size: of each channel, [C], about its RMS."""
    others = [0, *range(2, weight.dim())]
    pieces = weight.split(max(1, PIECE // weight[0].numel()))
    largest = functools.reduce(torch.maximum, (w.float().abs().amax(others) for w in pieces))
    one = lambda v: v.clamp(min=1e-4 * v.max().item() + 1e-30)  # noqa: E731 - an unused channel is no reason for extremes
    shares = (one(size.float()) / one(largest)).sqrt()
    return shares / shares.log().mean().exp()


def coded(x, shares=1.0):
    """(codes uint8 in the layout of x, scale, zero): x · shares ≈ scale · (codes - zero), zero among the numbers that are met exactly. A scale of NaN
    where x is not finite. x is left as it is."""
    steps = x.to(torch.float32, copy=True).mul_(shares)
    low, high = min(steps.amin().item(), 0.0), max(steps.amax().item(), 0.0)
    scale = max((high - low) / 254, 1e-30)  # of 255 steps one is left for the rounding of zero
    if not math.isfinite(high - low):
        return torch.zeros_like(x, dtype=torch.uint8), math.nan, 0
    zero = round(0.5 - low / scale)  # so that the smallest is at no less than 0, the largest at no more than 255
    signed = steps.mul_(1 / scale).add_(zero - 128).round_().to(torch.int8)  # to uint8 takes five times as long
    return signed.view(torch.uint8).bitwise_xor_(128), scale, zero


class _Int8:
    """What both kinds of layer share; `codes` are the packed weight, `scale` [O] one number for each output, `shares` what each input is
    multiplied by: 1 over balance()."""

    @property
    def weight(self):
        """Its shape alone: the numbers are in oneDNN's layout."""
        return torch.empty(self.shape, device="meta")

    def __reduce_ex__(self, protocol):
        raise TypeError(
            "layers in 8 bits (`quantize` int8 on a CPU) cannot be copied or pickled: their weights are in oneDNN's layout"
        )

    def _each(self, x, product):
        """product(codes, scale, zero, type) of each picture of x [B, …], together."""
        if torch.compiler.is_compiling():
            # it would look into the numbers, and has no form of its own for these products
            return torch._dynamo.disable(_Int8._each)(self, x, product)
        if (torch.is_grad_enabled() and x.requires_grad) or onednn.dual(x):
            raise RuntimeError("layers in 8 bits (`quantize` int8 on a CPU) have no gradient")
        exact = x.dtype if x.dtype == torch.bfloat16 else torch.float32
        made = [product(*coded(one, self.shares), exact).to(x.dtype) for one in x.split(1)]
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
    if not isinstance(layer, nn.Linear | nn.Conv2d) or isinstance(layer, _Int8) or layer.weight.numel() < LEAST:
        return False
    return isinstance(layer, nn.Linear) or (
        layer.padding_mode == "zeros" and not isinstance(layer.padding, str) and layer.groups == 1
    )


def pack(layer, codes, absmax, shares):
    """Let a plain layer compute in 8 bits, in place: codes int8 [O, …] and absmax fp32 [O] (quantize.to_int8) of its weight times `shares` [C]."""
    layer.scale, layer.shape, layer.stands_for = absmax / 127, layer.weight.shape, layer.weight.numel()
    layer.shares = 1 / shares.view(-1, *[1] * (layer.weight.dim() - 2))
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
    if not any(known.get(k) for k in onednn.EIGHT_BITS) or onednn.unusable(torch.float32):
        return False
    with torch.device("cpu"):
        exact = {"dtype": torch.float32}
        for layer in (
            nn.utils.skip_init(nn.Linear, 64, 32, **exact),
            nn.utils.skip_init(nn.Conv2d, 64, 32, 3, padding=1, **exact),
        ):
            layer.requires_grad_(False)
            layer.bias.data = torch.arange(32, **exact)
            codes = torch.full(layer.weight.shape, 127, dtype=torch.int8)
            codes[::2] = -127  # the largest sums of either sign
            layer.weight.data = codes.float()
            x = torch.linspace(-1, 254, 1600, **exact).view(
                (1, 64, 5, 5) if isinstance(layer, nn.Conv2d) else (1, 25, 64)
            )
            meant = layer(x.round())
            try:
                made = pack(layer, codes, torch.full((32,), 127.0, **exact), torch.ones(64, **exact))(x.round())
            except (AttributeError, RuntimeError, TypeError):
                return False
            if not torch.allclose(made, meant, rtol=1e-2, atol=0.01 * meant.abs().max().item()):
                return False
    return True
