"""AutoencoderKL: pixels [B, 3, H, W] in [-1, 1]  ⇄  latents [B, 4 or 16, H/8, W/8].

A convolutional encoder gives the mean and log-variance of q(z|x), a decoder gives p(x|z)
(Kingma & Welling 2014, arXiv 1312.6114; Rombach et al. 2022, arXiv 2112.10752 §3.1).
Three names for three things: `pixels` in [-1, 1]; `moments`, what the encoder puts out; `latents`, scaled to
about unit variance, what the denoiser sees:  latents = (z - shift_factor) · scaling_factor.
"""

from dataclasses import dataclass

import torch
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import Downsample, GroupNorm, ResnetBlock, Stage, Upsample, attend

FIXED = {
    "act_fn": ["silu"],
    "latents_mean": [None],
    "latents_std": [None],
    "mid_block_add_attention": [True],
    "in_channels": [3],
    "out_channels": [3],
}
EPS = 1e-6


@dataclass
class Config:
    """Fields of config.json, with the defaults of the original file format."""

    block_out_channels: tuple[int, ...] = (64,)
    layers_per_block: int = 1
    latent_channels: int = 4
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32
    scaling_factor: float = 0.18215
    shift_factor: float | None = None
    force_upcast: bool | None = True
    use_quant_conv: bool = True
    use_post_quant_conv: bool = True
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)

    @classmethod
    def from_json(cls, raw, where="vae/config.json"):
        cfg = from_json(cls, raw, FIXED, where)
        for name, only in (("down_block_types", "DownEncoderBlock2D"), ("up_block_types", "UpDecoderBlock2D")):
            types = getattr(cfg, name)
            if set(types) != {only} or len(types) != len(cfg.block_out_channels):
                raise UserError(f"{where}: {name} = {list(types)} is not supported (only {only}, one a level)")
        return cfg

    @property
    def downscale(self):
        """Pixels per latent along one side."""
        return 2 ** (len(self.block_out_channels) - 1)


class Attention(nn.Module):
    """Single-head self-attention over all H·W positions, with its own GroupNorm and residual."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H·W, C]
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).reshape(B, C, H, W)


class MidBlock(nn.Module):
    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths, groups = cfg.block_out_channels, cfg.norm_num_groups
        self.conv_in = nn.Conv2d(3, widths[0], 3, padding=1)
        self.down_blocks = nn.ModuleList()
        for i, c in enumerate(widths):
            c_in = [widths[max(i - 1, 0)]] + [c] * (cfg.layers_per_block - 1)
            down = Downsample(c, padding=0) if i < len(widths) - 1 else None
            self.down_blocks.append(Stage([ResnetBlock(ci, c, groups, EPS) for ci in c_in], down=down))
        self.mid_block = MidBlock(widths[-1], groups)
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 2 * cfg.latent_channels, 3, padding=1)

    def forward(self, x):
        x = self.conv_in(x)
        for block in self.down_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))


class Decoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        widths, groups = cfg.block_out_channels[::-1], cfg.norm_num_groups
        self.conv_in = nn.Conv2d(cfg.latent_channels, widths[0], 3, padding=1)
        self.mid_block = MidBlock(widths[0], groups)
        self.up_blocks = nn.ModuleList()
        for i, c in enumerate(widths):
            c_in = [widths[max(i - 1, 0)]] + [c] * cfg.layers_per_block
            up = Upsample(c) if i < len(widths) - 1 else None
            self.up_blocks.append(Stage([ResnetBlock(ci, c, groups, EPS) for ci in c_in], up=up))
        self.conv_norm_out = GroupNorm(groups, widths[-1], EPS, silu=True)
        self.conv_out = nn.Conv2d(widths[-1], 3, 3, padding=1)

    def forward(self, z):
        x = self.mid_block(self.conv_in(z))
        for block in self.up_blocks:
            x = block(x)
        return self.conv_out(self.conv_norm_out(x))


class AutoencoderKL(nn.Module):
    """See the module docstring. `encode_moments` and `decode_raw` are the bare networks."""

    Config = Config
    class_name = "AutoencoderKL"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        c = cfg.latent_channels
        self.encoder, self.decoder = Encoder(cfg), Decoder(cfg)
        self.quant_conv = nn.Conv2d(2 * c, 2 * c, 1) if cfg.use_quant_conv else None
        self.post_quant_conv = nn.Conv2d(c, c, 1) if cfg.use_post_quant_conv else None

    def encode_moments(self, pixels):
        """pixels in [-1, 1] -> (mean, logvar) of q(z|x), each [B, C, h, w]; logvar clamped to [-30, 20]."""
        moments = self.encoder(pixels)
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_raw(self, z):
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def encode(self, pixels, noise=None):
        """pixels -> latents: a sample of the posterior when `noise` ~ N(0, I) is given, else its mean."""
        mean, logvar = self.encode_moments(pixels)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise
        return (z - (self.cfg.shift_factor or 0.0)) * self.cfg.scaling_factor

    def decode(self, latents):
        """latents -> pixels, about [-1, 1] (not clamped)."""
        return self.decode_raw(latents / self.cfg.scaling_factor + (self.cfg.shift_factor or 0.0))

    def decode_tiled(self, latents, tile=64, overlap=16):
        """decode() in square tiles of `tile` latents with linearly blended overlaps: bounded memory.

        The middle attention and the norms see one tile at a time, so the picture differs slightly from
        decode(); with overlap 16 the seams are not visible.
        """
        B, _, H, W = latents.shape
        if tile >= H and tile >= W:
            return self.decode(latents)
        f, stride = self.cfg.downscale, tile - overlap
        total = latents.new_zeros(B, 3, H * f, W * f)
        weight = latents.new_zeros(1, 1, H * f, W * f)
        for top in _tile_starts(H, tile, stride):
            for left in _tile_starts(W, tile, stride):
                pixels = self.decode(latents[:, :, top : top + tile, left : left + tile])
                h, w = pixels.shape[-2:]
                ramp = _ramp(h, overlap * f, pixels)[:, None] * _ramp(w, overlap * f, pixels)[None, :]
                y, x = top * f, left * f
                total[:, :, y : y + h, x : x + w] += pixels * ramp
                weight[:, :, y : y + h, x : x + w] += ramp
        return total / weight


def _tile_starts(length, tile, stride):
    """Starts of the tiles along one side; the last one ends exactly at the border."""
    last = max(length - tile, 0)
    return sorted({*range(0, last, stride), last})


def _ramp(length, overlap, like):
    """Weights of one tile along one side: rising over the overlap, 1 inside, falling over the overlap."""
    position = torch.arange(length, dtype=like.dtype, device=like.device) + 0.5
    return torch.minimum(position, length - position).clamp(max=overlap) / overlap
