"""Weight-only quantization of linear layers, for models that are larger than the card.

int8: w ≈ absmax/127 · code, one absmax a row (output), symmetric.
nf4: w ≈ absmax · NF4[code], one absmax for every 64 weights, two codes a byte; the sixteen levels are the quantiles of
N(0, 1), so that each is used equally often by normally distributed weights (Dettmers et al. 2023, "QLoRA", arXiv
2305.14314 §3 and appendix E). 4.5 bits a weight.
Weights are turned back into the computing type layer by layer; activations are never quantized.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError

BLOCK = 64
NF4 = (
    -1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453, -0.28444138169288635, -0.18477343022823334,
    -0.09105003625154495, 0.0, 0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224,
    0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0,
)  # fmt: skip
KINDS = ("int8", "nf4")
INSIDE = {"TransformerBlock", "JointBlock", "Block"}  # the repeated blocks of UNet, MMDiT and T5


def to_int8(weight):
    """[out, in] -> (codes int8 [out, in], absmax fp32 [out, 1])"""
    weight = weight.float()
    absmax = weight.abs().amax(dim=1, keepdim=True).clamp(min=1e-30)
    return (weight * (127 / absmax)).round().to(torch.int8), absmax


def from_int8(codes, absmax, dtype):
    return codes.to(dtype) * (absmax / 127).to(dtype)


def to_nf4(weight):
    """[out, in] -> (codes uint8 [out, in/2], absmax fp32 [out, in/64]); in is a multiple of 64."""
    out, width = weight.shape
    blocks = weight.float().view(out, width // BLOCK, BLOCK)
    absmax = blocks.abs().amax(dim=-1).clamp(min=1e-30)
    levels = torch.tensor(NF4, device=weight.device)
    codes = torch.bucketize(blocks / absmax[..., None], (levels[1:] + levels[:-1]) / 2, out_int32=True).to(torch.uint8)
    codes = codes.view(out, width)
    return codes[:, ::2] << 4 | codes[:, 1::2], absmax


def from_nf4(codes, absmax, dtype):
    levels = torch.tensor(NF4, device=codes.device, dtype=dtype)
    out, half = codes.shape
    # Both levels of a byte by one lookup in a table of 256 pairs.
    pairs = torch.stack([levels.repeat_interleave(16), levels.repeat(16)], dim=-1)
    values = pairs[codes.int()].view(out, -1, BLOCK)
    return (values * absmax[..., None].to(dtype)).view(out, 2 * half)


class QuantizedLinear(nn.Module):
    """A linear layer whose weight is kept as codes. `weight` gives it back in fp32."""

    def __init__(self, linear, kind):
        super().__init__()
        self.kind = kind
        self.out_features, self.in_features = linear.weight.shape
        self.stands_for = linear.weight.numel()
        codes, absmax = (to_int8 if kind == "int8" else to_nf4)(linear.weight.data)
        self.register_buffer("codes", codes)
        self.register_buffer("absmax", absmax)
        self.bias = linear.bias

    def dequantized(self, dtype):
        return (from_int8 if self.kind == "int8" else from_nf4)(self.codes, self.absmax, dtype)

    @property
    def weight(self):
        return self.dequantized(torch.float32)

    def forward(self, x):
        return F.linear(x, self.dequantized(x.dtype), None if self.bias is None else self.bias.to(x.dtype))


def apply(model, kind, device="cpu", home=None):
    """Quantize every linear layer inside the repeated blocks of `model`, in place: computed on `device`, kept at `home`
    (default: there too).

    Raises UserError when nothing is large enough: a width that is no multiple of 64 stays as it is in nf4.
    """
    layers = _layers(model, kind)
    if not layers:
        raise UserError(f"`quantize` {kind}: {model.class_name} has no linear layer that it can hold")
    for parent, name, child in layers:
        setattr(parent, name, QuantizedLinear(child.to(device), kind).to(home or device))
    return model


def _layers(model, kind):
    """[(parent, name, linear layer)] of what apply() quantizes."""
    blocks = [m for m in model.modules() if type(m).__name__ in INSIDE]
    found = [(p, name, c) for b in blocks for p in b.modules() for name, c in p.named_children()]
    return [f for f in found if isinstance(f[2], nn.Linear) and (kind == "int8" or f[2].in_features % BLOCK == 0)]


def sizes(model, kind):
    """{id of a weight: bytes it takes} of what apply() would quantize."""
    per = {"int8": lambda w: w.numel() + 4 * w.shape[0], "nf4": lambda w: w.numel() / 2 + 4 * w.numel() / BLOCK}[kind]
    return {id(c.weight): per(c.weight) for _, _, c in _layers(model, kind)}


def rest(model, dtype, device):
    """Bring everything that is not quantized to its device and computing type."""
    for key, tensor in [*model.named_parameters(), *model.named_buffers()]:
        exact = key.endswith((".codes", ".absmax"))
        layout = torch.channels_last if tensor.dim() == 4 else torch.preserve_format
        tensor.data = tensor.data.to(device, tensor.dtype if exact else dtype, memory_format=layout)
