"""Weights in oneDNN's own blocked layout: what makes a denoiser faster on a CPU.

PyTorch hands oneDNN plain weights, and oneDNN reorders them at every call of a layer; with a 3×3 convolution of 1280
channels on an 8×8 picture that takes longer than the convolution. Here the reordering is done once, at a layer's first
call (when the size of its input, on which the layout depends, is known), and the plain weights are given back to the
system. It costs a second or two for a large UNet, so it pays from about four steps on.

These are the operators that torch.compile uses on a CPU (torch._inductor's mkldnn passes); they are private to PyTorch,
so `usable()` tries them on a small layer first, and says why when it cannot.
"""

import ctypes
import functools
import mmap
import sys

import torch
from torch import nn

FEWEST_STEPS = 4  # of a run for which packing pays
LEAST = 1 << 14  # weights of a layer below which nothing is gained


class PackedConv2d(nn.Conv2d):
    """A convolution whose weight is in oneDNN's layout after the first call; `packed` is None until then."""

    packed = None

    def forward(self, x):
        if self.packed is None:
            self.packed = torch._C._nn.mkldnn_reorder_conv2d_weight(
                self.weight.detach().to_mkldnn(), self.padding, self.stride, self.dilation, self.groups, tuple(x.shape)
            )
            release(self)
        return torch.ops.mkldnn._convolution_pointwise(
            x, self.packed, self.bias, self.padding, self.stride, self.dilation, self.groups, "none", [], ""
        )


class PackedLinear(nn.Linear):
    """A linear layer whose weight is in oneDNN's layout after the first call; `packed` is None until then."""

    packed = None

    def forward(self, x):
        if self.packed is None:
            self.packed = torch._C._nn.mkldnn_reorder_linear_weight(
                self.weight.detach().to_mkldnn(), x.numel() // x.shape[-1]
            )
            release(self)
        return torch.ops.mkldnn._linear_pointwise(x, self.packed, self.bias, "none", [], "")


KINDS = {nn.Conv2d: PackedConv2d, nn.Linear: PackedLinear}


def release(module):
    """Give the memory of a plain weight that has been packed back to the system; an empty tensor stays in its place.

    Weights of a model lie in one large mapping, of which pieces cannot be freed, but their pages can.
    """
    weight = module.weight.data
    module.shape, module.layout = weight.shape, weight.stride()
    page = mmap.PAGESIZE
    start = -(-weight.data_ptr() // page) * page
    end = weight.data_ptr() + weight.untyped_storage().nbytes() - weight.storage_offset() * weight.element_size()
    end = min(end, weight.data_ptr() + weight.numel() * weight.element_size()) // page * page
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        ctypes.CDLL(None).madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    module.weight.data = weight.new_empty(0)


@functools.cache
def usable(dtype=torch.float32):
    """None where these operators work as meant, else the reason why not. Tried on one layer of each kind."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    if dtype not in (torch.float32, torch.bfloat16):
        return f"oneDNN's layouts are for fp32 and bf16, not {dtype}"
    try:
        for layer, x in (
            (nn.Conv2d(16, 32, 3, padding=1), torch.randn(2, 16, 5, 5)),
            (nn.Linear(16, 32), torch.randn(2, 3, 16)),
        ):
            layer, x = layer.to(dtype).requires_grad_(False), x.to(dtype)
            want = layer(x)
            layer.__class__ = KINDS[type(layer)]
            got = layer(x)
            if not torch.allclose(got.float(), want.float(), rtol=2e-2, atol=2e-2):
                return "oneDNN's packed layers give other numbers here"
    except (AttributeError, RuntimeError, TypeError) as e:
        return f"this PyTorch packs no weights ({str(e).splitlines()[0][:100]})"
    return None


def pack(model):
    """Let the plain convolutions and linear layers of `model`, fp32 or bf16 on a CPU, be packed at their first call.

    For inference: a packed layer has no gradient, and its weight is empty until unpack(). Layers with a LoRA or with
    quantized weights stay as they are. Returns how many layers it took; says why when it takes none.
    """
    layers = [
        m for m in model.modules() if type(m) in KINDS and m.weight.device.type == "cpu" and m.weight.numel() >= LEAST
    ]
    layers = [m for m in layers if m.weight.dtype in (torch.float32, torch.bfloat16)]
    if layers and (reason := usable(layers[0].weight.dtype)):
        print(f"note: weights are not packed for the CPU: {reason}", file=sys.stderr)
        return 0
    for m in layers:
        m.__class__ = KINDS[type(m)]
    return len(layers)


def unpack(model):
    """Undo pack(): plain layers with their weights."""
    for m in model.modules():
        plain = next((k for k, packed in KINDS.items() if type(m) is packed), None)
        if plain is None:
            continue
        if m.packed is not None:
            dense = m.packed.to_dense().view(m.shape)
            m.weight.data = torch.empty_strided(m.shape, m.layout, dtype=dense.dtype).copy_(dense)
            m.packed = None
        m.__class__ = plain
