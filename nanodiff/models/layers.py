"""What two or more models share: norm, attention, residual block, stage, time embedding.

Shape letters, here and everywhere: B batch, C channels, H W height and width, L query tokens,
S context tokens, D width, N heads, K head size.

Modules carry the names of the Hugging Face checkpoints, so a file loads without a translation.
This is the one file of the library that decides how an operator is computed.
"""

import math

import torch
import torch.nn.functional as F
from torch import nn


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

    Scores and softmax are accumulated in fp32 by every backend of scaled_dot_product_attention, which is
    all that the configs' `upcast_attention` asks for.
    """
    B, L, D = q.shape
    q, k, v = (x.view(B, -1, heads, D // heads).transpose(1, 2) for x in (q, k, v))  # [B, N, L|S, K]
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale)
    return out.transpose(1, 2).reshape(B, L, D)


class TimeEmbedding(nn.Module):
    """Two linear layers with a SiLU between: how sinusoids and pooled texts become a condition."""

    def __init__(self, dim_in, dim):
        super().__init__()
        self.linear_1, self.linear_2 = nn.Linear(dim_in, dim), nn.Linear(dim, dim)

    def forward(self, x):
        return self.linear_2(F.silu(self.linear_1(x)))


class GroupNorm(nn.GroupNorm):
    """GroupNorm, optionally followed by SiLU (Wu & He 2018)."""

    def __init__(self, groups, channels, eps, silu=False):
        super().__init__(groups, channels, eps)
        self.silu = silu

    def forward(self, x):
        x = super().forward(x)
        return F.silu(x, inplace=not torch.is_grad_enabled()) if self.silu else x


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
        if temb is not None:
            h = h + self.time_emb_proj(temb)[:, :, None, None]
        h = self.conv2(self.norm2(h))
        return (x if self.conv_shortcut is None else self.conv_shortcut(x)) + h


class Downsample(nn.Module):
    """3×3 convolution with stride 2. The VAE pads right and bottom only, the UNet all around."""

    def __init__(self, channels, padding=1):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, stride=2, padding=padding)

    def forward(self, x):
        return self.conv(x if self.conv.padding[0] else F.pad(x, (0, 1, 0, 1)))


class Upsample(nn.Module):
    """Nearest neighbour to twice the size (or to the `size` of a skip), then a 3×3 convolution."""

    def __init__(self, channels):
        super().__init__()
        self.conv = nn.Conv2d(channels, channels, 3, padding=1)

    def forward(self, x, size=None):
        x = F.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")
        return self.conv(x)


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
