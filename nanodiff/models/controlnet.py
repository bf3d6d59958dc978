"""ControlNetModel: a copy of a UNet's way down that is shown a picture, and adds what it sees to the UNet's skips.

    residuals = net(noisy latents [B, C, H, W], timestep [B], text [B, S, D], net.look(picture [B, 3, 8H, 8W] in [0, 1]))
    prediction = unet(noisy latents, timestep, text, control=residuals)

Every residual passes a 1×1 convolution that begins with zeros, so that training begins with the UNet as it was
(Zhang et al. 2023, arXiv 2302.05543 §3.1 eq. 2 and 3).

Explained in the book (docs/book): chapter 5.
"""

import itertools
from dataclasses import dataclass
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError
from nanodiff.models.unet import DownConfig, Downward

ORDERS = ("rgb", "bgr")


class Residuals(NamedTuple):
    """What is added to the UNet: to each skip [B, Cᵢ, h, w], the largest first, and to the middle [B, Cₙ, h, w]."""

    skips: list
    middle: torch.Tensor

    def __add__(self, other):
        """Those of two ControlNets together."""
        return Residuals([a + b for a, b in zip(self.skips, other.skips, strict=True)], self.middle + other.middle)

    def map(self, f):
        return Residuals([f(skip) for skip in self.skips], f(self.middle))


@dataclass
class Config(DownConfig):
    """Fields of a ControlNet's config.json."""

    conditioning_channels: int = 3
    controlnet_conditioning_channel_order: str = "rgb"
    conditioning_embedding_out_channels: tuple[int, ...] = (16, 32, 96, 256)
    global_pool_conditions: bool = False  # the residuals' means over the picture alone ("shuffle")

    @classmethod
    def from_json(cls, raw, where="controlnet/config.json"):
        cfg = super().from_json(raw, where)
        order = cfg.controlnet_conditioning_channel_order
        if order not in ORDERS:
            raise UserError(f"{where}: controlnet_conditioning_channel_order: {order!r} is none of {', '.join(ORDERS)}")
        return cfg

    @classmethod
    def of(cls, unet, **fields):
        """That of a ControlNet for the UNet with the Config `unet`; fields: of a ControlNet's alone."""
        common = {name: getattr(unet, name) for name in DownConfig.__dataclass_fields__}
        # one of its own, where the UNet has none
        common["mid_block_type"] = unet.mid_block_type or DownConfig.mid_block_type
        return cls(**common | fields)

    @property
    def downscale(self):
        """Pixels of the picture per latent along one side: every width but the first comes with a stride of 2."""
        return 2 ** (len(self.conditioning_embedding_out_channels) - 1)


class Eye(nn.Module):
    """The picture in the size of the latents: 3×3 convolutions with SiLU, every second with a stride of 2."""

    def __init__(self, cfg):
        super().__init__()
        widths = cfg.conditioning_embedding_out_channels
        self.conv_in = nn.Conv2d(cfg.conditioning_channels, widths[0], 3, padding=1)
        self.blocks = nn.ModuleList()
        for c_in, c_out in itertools.pairwise(widths):
            self.blocks.append(nn.Conv2d(c_in, c_in, 3, padding=1))
            self.blocks.append(nn.Conv2d(c_in, c_out, 3, padding=1, stride=2))
        self.conv_out = nn.Conv2d(widths[-1], cfg.block_out_channels[0], 3, padding=1)

    def forward(self, picture):
        x = F.silu(self.conv_in(picture))  # [B, C₁, 8H, 8W]
        for conv in self.blocks:
            x = F.silu(conv(x))
        return self.conv_out(x)  # [B, C, H, W]


class ControlNetModel(Downward):
    """See the module docstring."""

    Config = Config
    class_name = "ControlNetModel"

    def __init__(self, cfg):
        super().__init__(cfg)
        self.controlnet_cond_embedding = Eye(cfg)
        self.controlnet_down_blocks = nn.ModuleList([nn.Conv2d(c, c, 1) for c in self.widths])
        self.controlnet_mid_block = nn.Conv2d(self.widths[-1], self.widths[-1], 1)

    def look(self, picture):
        """The picture [B, 3, 8H, 8W] in [0, 1] -> what forward() adds to the latents [B, C, H, W]. It does not depend on the
        noise or the timestep, so a sampler calls this once a run."""
        if self.cfg.controlnet_conditioning_channel_order == "bgr":
            picture = picture.flip(1)
        return self.controlnet_cond_embedding(picture)

    def forward(self, x, t, context, seen, added=None):
        """x, t, context, added: as the UNet's forward() takes them. seen: look(picture) [B or 1, C, H, W], or the picture -> Residuals."""
        temb, shifts, kvs = self.conditioned(x, t, context, added)
        if seen.shape[1] == self.cfg.conditioning_channels:  # in training, where each picture is seen once
            seen = self.look(seen)

        x = self.conv_in(x) + seen  # [B, C₁, H, W]
        x, skips = self.down(x, temb, shifts, kvs)  # [B, Cₙ, h, w], the smallest
        skips = [zero(skip) for zero, skip in zip(self.controlnet_down_blocks, skips, strict=True)]
        residuals = Residuals(skips, self.controlnet_mid_block(x))
        if self.cfg.global_pool_conditions:
            return residuals.map(lambda r: r.mean((2, 3), keepdim=True))  # [B, Cᵢ, 1, 1]
        return residuals


def guessed(residuals):
    """Residuals for a UNet without a prompt to go by ("guess mode"): from a tenth for the largest to all of the middle
    (lllyasviel/ControlNet, cldm.py and gradio_*2image.py: strength · 0.825^(12 - i); diffusers: a row from 10⁻¹ to 10⁰)."""
    scales = torch.logspace(-1, 0, len(residuals.skips) + 1).tolist()
    skips = [skip * s for skip, s in zip(residuals.skips, scales, strict=False)]
    return Residuals(skips, residuals.middle * scales[-1])


def steered(control, unet, picture):
    """f(x, t, context, added=None) -> the prediction of `unet` with what the ControlNet says of the picture [B, 3, 8H, 8W] in [0, 1]."""

    def predict(x, t, context, added=None):
        return unet(x, t, context, added, control(x, t, context, picture, added))

    return predict


def copy_of(unet, downscale=8, **fields):
    """A ControlNet to be trained for `unet`: a copy of its way down, an eye with weights drawn anew, and zeros between them and the UNet.

    downscale: pixels a latent, a power of 2. fields: of the Config. Its weights are in the type and on the device of the UNet's.
    """
    strides = downscale.bit_length() - 1
    widths = (*(16, 32, 96)[:strides], *[256] * (strides - 3), 256)  # the released ones' for 8
    fields = {"conditioning_embedding_out_channels": widths} | fields
    weight = unet.conv_in.weight
    with torch.device(weight.device):
        net = ControlNetModel(Config.of(unet.cfg, **fields)).to(weight.dtype)
    own = net.state_dict()
    net.load_state_dict({k: v for k, v in unet.state_dict().items() if k in own}, strict=False)
    for zero in (*net.controlnet_down_blocks, net.controlnet_mid_block, net.controlnet_cond_embedding.conv_out):
        nn.init.zeros_(zero.weight)
        nn.init.zeros_(zero.bias)
    return net
