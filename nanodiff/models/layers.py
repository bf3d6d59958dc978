"""What two or more models share: norm, attention, residual block, stage, time embedding.

Shape letters, here and everywhere: B batch, C channels, H W height and width, L query tokens,
S context tokens, D width, N heads, K head size.

Modules carry the names of the Hugging Face checkpoints, so a file loads without a translation.
This is the one file of the library that decides how an operator is computed: by a Triton kernel or by PyTorch
(kernels/switch.py), and how a picture is enlarged.
"""

import itertools
import math

import torch
import torch.nn.functional as F
from torch import nn

import kernels
from kernels import (  # noqa: F401  the models take them from here
    attention,
    geglu,
    layer_norm,
    linear_cross_entropy,
    qk_norm_rope,
    rms_norm,
    swiglu,
)
from nanodiff.config import UserError


def use_kernels(mode):
    """`--kernels auto | triton | torch` for the rest of the process. Raises UserError where "triton" cannot be had."""
    try:
        kernels.set_backend(mode)
    except RuntimeError as e:
        raise UserError(f"--kernels triton: {e}") from None


def timestep_embedding(t, dim, max_period=10000.0):
    """Sinusoids of the timestep: [B] -> [B, dim], cosines first (Vaswani et al. 2017 §3.5; DDPM appendix B).

    Computed in fp32 whatever the model's type: t up to 999 times a phase does not fit bf16's 8 bits.
    """
    half = dim // 2
    frequencies = torch.exp(-math.log(max_period) / half * torch.arange(half, dtype=torch.float32, device=t.device))
    phase = t.float()[:, None] * frequencies
    return torch.cat([phase.cos(), phase.sin()], dim=-1)


def attend(q, k, v, heads, causal=False, bias=None, scale=None):
    """softmax(q kᵀ / √K + bias) v over `heads` heads: q [B, L, N·K], k v [B, S, N·K] -> [B, L, N·K].

    bias: [1 or B, N, L, S], added to the scores. scale: in place of 1/√K.

    Scores and softmax are accumulated in fp32 by our kernel and by every backend of scaled_dot_product_attention,
    which is all that the configs' `upcast_attention` asks for.
    """
    B, L, D = q.shape
    q, k, v = (x.view(B, -1, heads, D // heads) for x in (q, k, v))  # [B, L|S, N, K]
    return kernels.attention(q, k, v, causal=causal, scale=scale, bias=bias).reshape(B, L, D)


class TimeEmbedding(nn.Module):
    """Two linear layers with a SiLU between: how sinusoids and pooled texts become a condition."""

    def __init__(self, dim_in, dim):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class LayerNorm(nn.LayerNorm):
    """nn.LayerNorm by our kernel where there is a GPU."""

    def forward(self, x):
        return layer_norm(x, self.weight, self.bias, self.eps)


class GroupNorm(nn.GroupNorm):
    """GroupNorm (Wu & He 2018), optionally of x + shift [B, C] and followed by SiLU."""

    def __init__(self, groups, channels, eps, silu=False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x, shift=None):
        return kernels.group_norm(x, self.num_groups, self.weight, self.bias, self.eps, self.silu, shift)


class ResnetBlock(nn.Module):
    """x + conv(act(norm(conv(act(norm(x))) + temb))); the skip is a 1×1 convolution when channels change.

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

    def forward(self, x, temb=None):
        h = self.conv1(self.norm1(x))
        h = self.conv2(self.norm2(h, shift=None if temb is None else self.time_emb_proj(temb)))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample(nn.Module):
    """3×3 convolution with stride 2. The VAE pads right and bottom only, the UNet all around."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


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
            return self._by_phases(x)
        x = F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")
        return self.conv(x)

    def _by_phases(self, x):
        B, C, H, W = x.shape
        weight, bias = self.conv.weight, self.conv.bias
        state = (
            weight.data_ptr(),
            weight._version,
            bias.data_ptr(),
            bias._version,
            weight.dtype,
            weight.device,
            type(self.conv),
        )
        if not self.phases or self.phases[0] != state:
            conv = type(self.conv)(C, 4 * C, 2, padding=1, device="meta")
            sums = weight.new_empty(4 * C, 2, 2, C).permute(0, 3, 1, 2)  # channels last
            taken = ((slice(0, 1), slice(1, 3)), (slice(0, 2), slice(2, 3)))
            wide = torch.promote_types(weight.dtype, torch.float32)  # summed in fp32, rounded once
            for a, b, i, j in itertools.product(range(2), repeat=4):
                part = weight[:, :, taken[a][i], taken[b][j]].sum((2, 3), dtype=wide)
                sums[(2 * a + b) * C : (2 * a + b + 1) * C, :, i, j] = part
            conv.weight = nn.Parameter(sums, requires_grad=False)
            conv.bias = nn.Parameter(self.conv.bias.repeat(4), requires_grad=False)
            self.phases = (state, [conv])
        y = self.phases[1][0](x).unflatten(1, (4, C))  # [B, 4, C, H + 1, W + 1]
        channels_last = x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()
        out = (
            y.new_empty((B, 2 * H, 2 * W, C)).permute(0, 3, 1, 2) if channels_last else y.new_empty(B, C, 2 * H, 2 * W)
        )
        for a, b in ((0, 0), (0, 1), (1, 0), (1, 1)):
            out[:, :, a::2, b::2] = y[:, 2 * a + b, :, a : a + H, b : b + W]
        return out


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

    def forward(self, x):  # the VAE's stages: no time, no text, no skips
        for resnet in self.resnets:
            x = resnet(x)
        y = self.resample(x)
        return x if y is None else y
