"""What two or more models share: norm, attention, residual block, stage, time embedding.

Shape letters, here and everywhere: B batch, C channels, H W height and width, L query tokens,
S context tokens, D width, N heads, K head size.

Modules carry the names of the Hugging Face checkpoints, so a file loads without a translation.
This is the one file of the library that decides how an operator is computed: by a Triton kernel or by PyTorch
(kernels/switch.py).

Explained in the book (docs/book): chapter 5.
"""

import importlib
import importlib.util
import math
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError
from nanodiff.device import block_attention, onednn

# ---------------------------------------------------------------------------------------------------------
# Which operator


def _kernels():
    """The package kernels/ beside nanodiff/; installed it is nanodiff._kernels, since a public package has the name `kernels`."""
    found = importlib.util.find_spec("kernels")
    ours = found and found.origin and Path(found.origin).parent == Path(__file__).parents[2] / "kernels"
    return importlib.import_module("kernels" if ours else "nanodiff._kernels")


kernels = _kernels()
# the models take them from here
attention, geglu, swiglu, linear_cross_entropy = (
    kernels.attention,
    kernels.geglu,
    kernels.swiglu,
    kernels.linear_cross_entropy,
)
layer_norm, rms_norm, residual_norm, qk_norm_rope = (
    kernels.layer_norm,
    kernels.rms_norm,
    kernels.residual_norm,
    kernels.qk_norm_rope,
)


def use_kernels(mode):
    """`--kernels auto | triton | torch` for the rest of the process. Raises UserError where "triton" cannot be had."""
    try:
        kernels.set_backend(mode)
    except RuntimeError as e:
        raise UserError(f"`kernels` triton: {e}") from None


def computed_by():
    """What decides how operators are computed: the switch of the kernels, and how fp32 is multiplied on a GPU."""
    return kernels.switch.mode(), torch.backends.cuda.matmul.fp32_precision


# ---------------------------------------------------------------------------------------------------------
# Functions


def timestep_embedding(t, dim, max_period=10000.0):
    """Sinusoids of the timestep: [B] -> [B, dim], cosines first (Vaswani et al. 2017 §3.5; DDPM appendix B).

    Computed in fp32 whatever the model's type: t up to 999 times a phase does not fit bf16's 8 bits.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    phase = t.float().unsqueeze(1) * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def guidance_embedding(scale, dim, device):
    """Sinusoids of the guidance scale [1, dim], sines first, by which a model distilled from guidance is told it (Meng et al. 2023, arXiv 2210.03142
    §3.1; as latent consistency models have it: of 1000 (scale - 1))."""
    half = dim // 2
    frequencies = torch.exp(-math.log(10000.0) / (half - 1) * torch.arange(half, dtype=torch.float32, device=device))
    phase = 1000 * (scale - 1) * frequencies
    return F.pad(torch.cat([phase.sin(), phase.cos()]), (0, dim % 2)).unsqueeze(0)


def timesteps(t, x):
    """A timestep, a number or a tensor [1 or B], as a tensor [B] on the device of x. A number is written by a kernel: copied
    there, the host would wait for the device."""
    if isinstance(t, torch.Tensor):
        return t.to(x.device).expand(len(x))
    return torch.full((len(x),), t, device=x.device)


def attend(q, k, v, heads, causal=False, bias=None, scale=None, key_mask=None):
    """softmax(q kᵀ / √K + bias) v over `heads` heads: q [B, L, N·K], k v [B, S, N·K] -> [B, L, N·K].

    bias: [1 or B, N, L, S], added to the scores. scale: in place of 1/√K. key_mask: [B, S], true where a key may be seen.

    Scores and softmax are accumulated in fp32 by our kernel and by every backend of scaled_dot_product_attention,
    which is all that the configs' `upcast_attention` asks for.
    """
    B, L, D = q.shape
    q, k, v = (x.unflatten(-1, (heads, D // heads)) for x in (q, k, v))  # [B, L|S, N, K]
    if bias is None and key_mask is None and not causal and block_attention.attends(q, k, v):
        return block_attention.attention(q, k, v, scale).reshape(B, L, D)
    return kernels.attention(q, k, v, causal=causal, scale=scale, bias=bias, key_mask=key_mask).reshape(B, L, D)


# ---------------------------------------------------------------------------------------------------------
# What surrounds the products, on a GPU: a bias, a GELU or a residual of its own is one more pass over memory


def _lean(x):
    """Whether x is on a GPU, where what surrounds the products may take other forms (kernels.lean)."""
    return x.is_cuda and kernels.lean(x)


def _plain(layer, kind):
    """Is this layer nothing but its weights? (A LoRA hangs on its call, and may be silent, at scale 0; packed for a CPU, it is of another class.)"""
    heard = any(not getattr(hook, "silent", bool)() for hook in layer._forward_hooks.values())
    hooked = heard or layer._forward_pre_hooks or hasattr(layer, "parametrizations")
    return type(layer) is kind and not hooked and getattr(layer, "padding_mode", "zeros") == "zeros"


def without_bias(conv, x):
    """(conv(x) without its bias, the bias) on a GPU, where what follows adds it for nothing and the convolution in a pass of its
    own; (conv(x), None) elsewhere."""
    if _lean(x) and conv.bias is not None and _plain(conv, nn.Conv2d):
        return F.conv2d(x, conv.weight, None, conv.stride, conv.padding), conv.bias
    return conv(x), None


def pointwise(conv, x):
    """conv(x) for a 1×1 convolution: on a GPU a product over channels, which adds the bias itself."""
    if _lean(x) and _plain(conv, nn.Conv2d) and x.movedim(1, -1).is_contiguous():
        return F.linear(x.movedim(1, -1), conv.weight.flatten(1), conv.bias).movedim(-1, 1)
    return conv(x)


def linear_gelu(layer, x):
    """gelu(layer(x)) in its tanh form: at the end of the product itself, where PyTorch has that (a private operator)."""
    if _plain(layer, onednn.DirectLinear) or _plain(layer, onednn.PackedLinear):
        return layer.gelu(x)
    if _lean(x) and _plain(layer, nn.Linear) and hasattr(torch, "_addmm_activation"):
        rows = torch._addmm_activation(layer.bias, x.flatten(0, -2), layer.weight.t(), use_gelu=True)
        return rows.view(*x.shape[:-1], -1)
    return F.gelu(layer(x), approximate="tanh")


def linear_geglu(layer, x):
    """value · gelu(gate) of a projection to both, [B, L, D] -> [B, L, H]; at the end of the products by oneDNN."""
    if _plain(layer, onednn.DirectLinear) or _plain(layer, onednn.PackedLinear):
        return layer.geglu(x)
    return kernels.geglu(layer(x))


def bias_before(layer, x):
    """The bias of `layer` where add_product() follows: on a GPU, whatever comes before it adds it. Else None."""
    return layer.bias if _lean(x) and _plain(layer, nn.Linear) else None


def add_product(x, layer, y, biased):
    """x + layer(y), [B, L, D]; biased: x has the layer's bias already, and the product itself adds x."""
    if not biased:
        return x + layer(y)
    return torch.addmm(x.flatten(0, 1), y.flatten(0, 1), layer.weight.t()).view(x.shape)


def _adjacent(tensors):
    """Tensors that follow each other in one piece of memory as one, joined along the first axis; else None."""
    first, step = tensors[0], tensors[0].numel() * tensors[0].element_size()
    storage = first.untyped_storage().data_ptr()
    for i, t in enumerate(tensors):
        if (
            t.data_ptr() != first.data_ptr() + i * step
            or t.untyped_storage().data_ptr() != storage
            or t.shape != first.shape
        ):
            return None
    return first.as_strided((len(tensors) * len(first), *first.shape[1:]), first.stride())


def join(model):
    """Bring the weights of what project() takes together into one piece of memory, under the names they have."""
    for module in model.modules():
        for layers in module.projections() if hasattr(module, "projections") else ():
            if not all(_plain(layer, nn.Linear) for layer in layers):
                continue
            for kind in ("weight", "bias"):
                tensors = [getattr(layer, kind, None) for layer in layers]
                if any(t is None or t.requires_grad or type(t) is not nn.Parameter for t in tensors):
                    continue
                if len({(t.shape, t.dtype, t.device) for t in tensors}) == 1 and _adjacent(tensors) is None:
                    for t, part in zip(tensors, torch.cat([t.data for t in tensors]).chunk(len(tensors)), strict=True):
                        t.data = part


def project(layers, x):
    """What several linear layers of one width make of x: by one product where join() has been, and there are no gradients."""
    if _lean(x) and all(_plain(layer, nn.Linear) for layer in layers):
        weight = _adjacent([layer.weight for layer in layers])
        biased = layers[0].bias is not None
        bias = _adjacent([layer.bias for layer in layers]) if biased else None
        if weight is not None and (bias is not None) == biased:
            return F.linear(x, weight, bias).chunk(len(layers), dim=-1)
    return [layer(x) for layer in layers]


# ---------------------------------------------------------------------------------------------------------
# Modules


class TimeEmbedding(nn.Module):
    """Two linear layers with a SiLU between: how sinusoids and pooled texts become a condition."""

    def __init__(self, dim_in, dim, told=None):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)
        self.cond_proj = nn.Linear(told, dim_in, bias=False) if told else None

    def forward(self, x, told=None):
        """[B, dim_in] -> [B, dim]. told: [1, `told`], what is said beside x."""
        x = x if told is None else x + self.cond_proj(told)
        return self.linear_2(F.silu(self.linear_1(x)))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm (Ba et al. 2016, arXiv 1607.06450) by our kernel where there is a GPU: [B, L, D] -> [B, L, D]."""

    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)

    def after(self, x, y, more=None):
        """(x + y, its norm): a residual and the norm that follows it. more: see kernels.residual_norm()."""
        return residual_norm(x, y, weight=self.weight, bias=self.bias, eps=self.eps, more=more)


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018, arXiv 1803.08494), optionally of x + shift [B, C] and followed by SiLU: [B, C, H, W] -> the same.

    Mean and variance of each group of channels over the whole picture, so every place hears of all others; not over the
    batch, so a picture does not depend on those that are drawn or learned beside it."""

    def __init__(self, groups, channels, eps, silu=False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x, shift=None):
        return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu, shift)


def size_after(norm):
    """RMS of each channel [C] behind a norm with gain and bias, whose input has a mean of 0 and a variance of 1."""
    return torch.hypot(norm.weight.float(), norm.bias.float())


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + temb))); the skip is a 1×1 convolution when channels change.

    The time is one number for each channel, the same at all places: it tells the block how much noise there is, not where.
    temb: [B, D] time embedding, already through SiLU; None in the VAE.
    """

    def __init__(self, c_in, c_out, groups, eps, temb_dim=None):
        super().__init__()
        self.norm1 = GroupNorm(groups, c_in, eps, silu=True)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        if temb_dim:
            self.time_emb_proj = nn.Linear(temb_dim, c_out)
        self.norm2 = GroupNorm(groups, c_out, eps, silu=True)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.conv_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None

    def after_norm(self):
        """(layer, size of its input's channels) of those whose input comes out of a norm (device/int8.py)."""
        return (self.conv1, size_after(self.norm1)), (self.conv2, size_after(self.norm2))

    def shift(self, temb):
        """What comes before norm2 beside the convolution's products, the time and the bias: [B, C']."""
        return self.time_emb_proj(temb) + self.conv1.bias

    def forward(self, x, temb=None, shift=None):
        """x [B, C, H, W], temb [B, D] -> [B, C', H, W]. shift [B, C']: what shift() made of temb, if that is known."""
        h, bias = without_bias(self.conv1, self.norm1(x))  # [B, C', H, W]
        if shift is not None:  # it has the bias
            shift = shift if bias is not None else shift - self.conv1.bias
        elif temb is not None:
            shift = self.time_emb_proj(temb) if bias is None else self.shift(temb)
        elif bias is not None:
            shift = bias.expand(len(x), -1)
        h = self.norm2(h, shift)  # in a line of its own, so that the one before it may go
        h, bias = without_bias(self.conv2, h)  # [B, C', H, W]
        x = x if self.conv_shortcut is None else pointwise(self.conv_shortcut, x)
        return x + h if bias is None else kernels.add_bias(h, bias, x)


class Downsample(nn.Module):
    """3×3 convolution with stride 2. The VAE pads right and bottom only, the UNet all around."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        # One pixel, padded to four, gives the same; without that, PyTorch's bf16 gradient for the weights that only ever see padding is
        # memory as it was found on some processors.
        one = x.shape[-2:] == (1, 1) and torch.is_grad_enabled()
        x = F.pad(x, (0, 1, 0, 1)) if one or not self.conv.padding[0] else x
        return self.conv(x)  # [B, C, H, W] -> [B, C, H/2, W/2]


class Stage(nn.Module):
    """One resolution of a UNet or VAE: resnets, an attention after each (or none), at most one re-sampler.

    attentions: list of modules or (). down, up: a Downsample / Upsample or None.
    """

    def __init__(self, resnets, attentions=(), down=None, up=None):
        super().__init__()
        self.resnets = nn.ModuleList(resnets)
        if attentions:
            self.attentions = nn.ModuleList(attentions)
        if down:
            self.downsamplers = nn.ModuleList([down])
        if up:
            self.upsamplers = nn.ModuleList([up])

    def layers(self):
        """(resnet, attention or None) in order."""
        return zip(self.resnets, getattr(self, "attentions", [None] * len(self.resnets)), strict=True)

    def resample(self, x, size=None):
        """The stage's down- or up-sampling; None when it has none (the last stage of a pyramid)."""
        if hasattr(self, "downsamplers"):
            return self.downsamplers[0](x)
        return self.upsamplers[0](x, size) if hasattr(self, "upsamplers") else None

    def steps(self):
        """What the VAE's stages, without time, text and skips, do one after the other. Called by the model itself: a stage that called them would
        have its own input, the largest tensor of a decoding, waiting with its caller until the end."""
        return (*self.resnets, *getattr(self, "downsamplers", ()), *getattr(self, "upsamplers", ()))
