"""AutoencoderKL: pixels [B, 3, H, W] in [-1, 1]  ⇄  latents [B, 4 or 16, H/8, W/8].

A convolutional encoder gives the mean and log-variance of q(z|x), a decoder gives p(x|z)
(Kingma & Welling 2014, arXiv 1312.6114; Rombach et al. 2022, arXiv 2112.10752 §3.1).
Three names for three things: `pixels` in [-1, 1]; `moments`, what the encoder puts out; `latents`, scaled to
about unit variance, what the denoiser sees:  latents = (z - shift_factor) · scaling_factor.

A picture of 512 × 512 in Stable Diffusion's VAE (84 million weights), R a residual block, A attention over all places:

    encoder (34)   512²  128  R R ↓     decoder (49)    64²  512  R A R
                   256²  256  R R ↓                     64²  512  R R R ↑
                   128²  512  R R ↓                    128²  512  R R R ↑
                    64²  512  R R                      256²  256  R R R ↑
                    64²  512  R A R                    512²  128  R R R
                  -> 8 channels, mean and logvar      -> 3 channels

786,432 numbers become 16,384 (65,536 in SD 3), 48 (12) times fewer. Decoding takes as many operations as three
calls of SD 1.5's denoiser, and far more memory: one tensor of 128 channels at 512² is 64 MiB in bf16, and the levels near the picture are the
dear ones. KL is weighted by 1e-6, so q(z|x) is nearly a point: this is an autoencoder with a smooth latent space, not a
generative model, and the denoiser is its prior.

Explained in the book (docs/book): chapter 8.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import Downsample, GroupNorm, ResnetBlock, Stage, attend
from nanodiff.models.upsample import Upsample

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

    block_out_channels: tuple[int, ...] = (64,)  # one a level; each but the last halves the picture
    layers_per_block: int = 1  # residual blocks a level of the encoder; the decoder has one more
    latent_channels: int = 4  # SD 3: 16
    norm_num_groups: int = 32
    sample_size: int | tuple[int, ...] = 32  # pixels along a side in training
    # one over the standard deviation of z over the training pictures; SDXL 0.13025, SD 3 1.5305
    scaling_factor: float = 0.18215
    shift_factor: float | None = None  # their mean; SD 3: 0.0609
    force_upcast: bool | None = True  # fp16 overflows in this decoder (SDXL's original): compute in fp32
    use_quant_conv: bool = True  # 1×1 convolutions around the latents, a relic of VQ; SD 3 has none
    use_post_quant_conv: bool = True
    down_block_types: tuple[str, ...] = ("DownEncoderBlock2D",)
    up_block_types: tuple[str, ...] = ("UpDecoderBlock2D",)

    @classmethod
    def from_json(cls, raw, where="vae/config.json"):
        """Raises UserError, naming `where` and the field, for another network."""
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
    """Single-head self-attention over all H·W positions, with its own GroupNorm and residual. One head of 512: at 64 × 64 its
    scores are 4096 × 4096, the reason why the VAE has it at the smallest level only."""

    def __init__(self, channels, groups):
        super().__init__()
        self.group_norm = GroupNorm(groups, channels, EPS)
        self.to_q, self.to_k, self.to_v = (nn.Linear(channels, channels) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(channels, channels)])

    def forward(self, x):
        B, C, H, W = x.shape
        h = self.group_norm(x).flatten(2).transpose(1, 2)  # [B, H·W, C]
        h = self.to_out[0](attend(self.to_q(h), self.to_k(h), self.to_v(h), heads=1))
        return x + h.transpose(1, 2).reshape(B, C, H, W)  # [B, C, H, W]


class MidBlock(nn.Module):
    """Residual block, attention, residual block: [B, C, h, w] -> [B, C, h, w]."""

    def __init__(self, channels, groups):
        super().__init__()
        self.resnets = nn.ModuleList([ResnetBlock(channels, channels, groups, EPS) for _ in range(2)])
        self.attentions = nn.ModuleList([Attention(channels, groups)])

    def forward(self, x):
        return self.resnets[1](self.attentions[0](self.resnets[0](x)))


class Encoder(nn.Module):
    """pixels [B, 3, H, W] -> moments [B, 2C, h, w]: halved at every level but the last."""

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
        x = self.conv_in(x)  # [B, C₁, H, W]
        for step in (step for block in self.down_blocks for step in block.steps()):
            x = step(x)  # halved at the end of each block but the last
        return self.conv_out(self.conv_norm_out(self.mid_block(x)))  # [B, 2C, h, w], mean and logvar


class Decoder(nn.Module):
    """z [B, C, h, w] -> pixels [B, 3, H, W]: the encoder mirrored, one residual block more a level."""

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
        x = self.mid_block(self.conv_in(z))  # [B, Cₙ, h, w]
        for step in (step for block in self.up_blocks for step in block.steps()):
            x = step(x)  # doubled at the end of each block but the last
        return self.conv_out(self.conv_norm_out(x))  # [B, 3, H, W]


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
        moments = self.encoder(pixels)  # [B, 2C, h, w]
        if self.quant_conv is not None:
            moments = self.quant_conv(moments)
        mean, logvar = moments.chunk(2, dim=1)  # [B, C, h, w] each
        return mean, logvar.clamp(-30.0, 20.0)

    def decode_raw(self, z):
        """z [B, C, h, w], not scaled -> pixels [B, 3, H, W]."""
        return self.decoder(z if self.post_quant_conv is None else self.post_quant_conv(z))

    def forward(self, pixels, noise):
        """(reconstruction, mean, logvar) with a sample of the posterior, noise ~ N(0, I): what training needs."""
        mean, logvar = self.encode_moments(pixels)
        return self.decode_raw(mean + (0.5 * logvar).exp() * noise), mean, logvar

    def encode(self, pixels, noise=None):
        """pixels -> latents: a sample of the posterior when `noise` ~ N(0, I) is given, else its mean."""
        mean, logvar = self.encode_moments(pixels)
        z = mean if noise is None else mean + (0.5 * logvar).exp() * noise  # [B, C, h, w]
        return (z - (self.cfg.shift_factor or 0.0)) * self.cfg.scaling_factor

    def decode(self, latents):
        """latents -> pixels, about [-1, 1] (not clamped)."""
        return self.decode_raw(latents / self.cfg.scaling_factor + (self.cfg.shift_factor or 0.0))

    def decode_tiled(self, latents, tile=64):
        """decode() with the memory of one tile of `tile` latents on the computing device, and the same picture.

        Not tiles of a picture that are blended, whose norms and attention would each see a tile alone: every
        convolution is taken tile by tile over the whole image with a border of one pixel, and every GroupNorm's
        statistics are those of the whole image. Between two layers the image waits in host memory.
        """
        decoder = self.decoder
        z = latents / self.cfg.scaling_factor + (self.cfg.shift_factor or 0.0)
        x = decoder.conv_in(z if self.post_quant_conv is None else self.post_quant_conv(z))
        x = decoder.mid_block(x).cpu()
        for block in decoder.up_blocks:
            for resnet in block.resnets:
                x = _resnet_tiled(resnet, x, tile, latents.device)
            if hasattr(block, "upsamplers"):
                x = _upsample_tiled(block.upsamplers[0], x, tile, latents.device)
            tile = tile * 2 if tile < 256 else tile  # as large in pixels, until the channels have become few
        return _conv_tiled(decoder.conv_out, x, tile, latents.device, norm=decoder.conv_norm_out).to(latents.device)


def _tiles(height, width, size):
    """(rows, columns) as slices: squares of `size` that cover a picture, the last ones smaller."""
    for top in range(0, height, size):
        for left in range(0, width, size):
            yield slice(top, min(top + size, height)), slice(left, min(left + size, width))


def _bordered(part, limit):
    """A slice with one pixel more on each side that has one, and how many zeros stand for the missing ones."""
    start, stop = max(part.start - 1, 0), min(part.stop + 1, limit)
    return slice(start, stop), (1 - (part.start - start), 1 - (stop - part.stop))


def _normed(norm, x, device):
    """f(piece of x) -> that piece through GroupNorm and SiLU, with the statistics of the whole x [B, C, H, W]."""
    per_group = [torch.var_mean(g.to(device).float(), dim=(1, 2, 3), correction=0) for g in x.chunk(norm.num_groups, 1)]
    width = x.shape[1] // norm.num_groups
    var, mean = (
        torch.stack(v, dim=1).repeat_interleave(width, dim=1)[..., None, None] for v in zip(*per_group, strict=True)
    )
    scale = norm.weight.float()[:, None, None] * (var + norm.eps).rsqrt()
    shift = norm.bias.float()[:, None, None] - mean * scale
    return lambda piece: F.silu(piece.float() * scale + shift).to(piece.dtype)


def _conv_tiled(conv, x, size, device, norm=None, add=None, out=None):
    """conv(norm(x)) + add(…) of an image in host memory, tile by tile. add(ys, xs): what is added to one tile."""
    B, _, H, W = x.shape
    if out is None:
        out = torch.empty(B, conv.out_channels, H, W, dtype=x.dtype)
    before = _normed(norm, x, device) if norm is not None else lambda piece: piece
    for ys, xs in _tiles(H, W, size):
        (gy, (top, bottom)), (gx, (left, right)) = _bordered(ys, H), _bordered(xs, W)
        piece = F.pad(before(x[..., gy, gx].to(device)), (left, right, top, bottom))
        y = F.conv2d(piece, conv.weight, conv.bias)
        out[..., ys, xs] = y if add is None else y + add(ys, xs)
    return out


def _resnet_tiled(resnet, x, size, device):
    """ResnetBlock.forward() tile by tile. Where the block has no shortcut, the result is written over x: each tile of x is read,
    for the residual, right before it is written, and the convolutions read h."""
    h = _conv_tiled(resnet.conv1, x, size, device, resnet.norm1)
    shortcut = resnet.conv_shortcut

    def skip(ys, xs):
        piece = x[..., ys, xs].to(device)
        return piece if shortcut is None else shortcut(piece)

    return _conv_tiled(resnet.conv2, h, size, device, resnet.norm2, skip, out=None if shortcut else x)


def _upsample_tiled(up, x, size, device):
    """Upsample.forward() tile by tile: nearest neighbours twice as large, then the 3×3 convolution."""
    B, C, H, W = x.shape
    out = torch.empty(B, C, 2 * H, 2 * W, dtype=x.dtype)
    for ys, xs in _tiles(H, W, size):
        (gy, (top, bottom)), (gx, (left, right)) = _bordered(ys, H), _bordered(xs, W)
        piece = F.interpolate(x[..., gy, gx].to(device), scale_factor=2.0, mode="nearest")
        # of the doubled border only the inner half is needed, and zeros outside the image
        piece = piece[..., 1 - top : piece.shape[-2] - (1 - bottom), 1 - left : piece.shape[-1] - (1 - right)]
        piece = F.pad(piece, (left, right, top, bottom))
        y = F.conv2d(piece, up.conv.weight, up.conv.bias)
        out[..., 2 * ys.start : 2 * ys.stop, 2 * xs.start : 2 * xs.stop] = y
    return out
