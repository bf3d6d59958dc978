"""SD3ControlNetModel: some first blocks of an MMDiT that are shown a picture, and add what they see to the blocks of SD 3's.

    residuals = net(noisy latents [B, 16, H, W], timestep [B], text [B, S, D], net.look(latents of the picture), pooled [B, P])
    velocity = mmdit(noisy latents, timestep, text, pooled, control=residuals)

As controlnet.py's, with a transformer's blocks in place of the way down (Zhang et al. 2023, arXiv 2302.05543 §3): what they give passes a linear
layer that begins with zeros. The picture comes as the VAE's latents, in patches. Those for SD 3.5 large (8b) have blocks of the picture alone,
without a text, and take the transformer's own patches and positions.

Explained in the book (docs/book): chapter 11.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import nn

from nanodiff.config import UserError
from nanodiff.models import mmdit
from nanodiff.models.layers import residual_norm, timesteps


class Residuals(NamedTuple):
    """What is added to the image's stream [B, L, D] behind the blocks of the transformer: of each ControlNet one tensor for each block of its own, the first
    ones first."""

    nets: list

    def __add__(self, other):
        """Those of two ControlNets together."""
        return Residuals([*self.nets, *other.nets])

    def map(self, f):
        return Residuals([[f(x) for x in net] for net in self.nets])

    def behind(self, i, blocks):
        """What is added behind block i of a transformer that has so many: each tensor serves several blocks in turn, by diffusers' division."""
        first, *others = [net[int(i / (blocks / len(net)))] for net in self.nets]
        return sum(others, first)


@dataclass
class Config(mmdit.Config):
    """Fields of its config.json."""

    joint_attention_dim: int | None = 4096  # None: blocks without a text
    pos_embed_max_size: int | None = 96
    pos_embed_type: str | None = "sincos"
    use_pos_embed: bool = True  # its own patches and positions; else the transformer's
    force_zeros_for_pooled_projection: bool = True  # no pooled text, and latents that are not shifted

    conditioning_channels = 3  # of the picture, before the VAE
    global_pool_conditions = False

    @classmethod
    def from_json(cls, raw, where="controlnet/config.json"):
        cfg = super().from_json({k: v for k, v in raw.items() if k != "extra_conditioning_channels"}, where)
        if raw.get("extra_conditioning_channels"):
            raise UserError(
                f"{where}: extra_conditioning_channels: ControlNets that are also given a mask are not supported"
            )
        if cfg.use_pos_embed and (cfg.pos_embed_type != "sincos" or cfg.pos_embed_max_size is None):
            raise UserError(f"{where}: positions of its own need pos_embed_type 'sincos' and a pos_embed_max_size")
        return cfg


class ImageBlock(nn.Module):
    """A block of the image's stream alone."""

    def __init__(self, cfg):
        super().__init__()
        self.norm1, self.attn, self.ff = mmdit.AdaLN(cfg.width, 6), mmdit.Attention(cfg), mmdit.FeedForward(cfg.width)

    def forward(self, x, emb):
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp = self.norm1(emb)  # [B, D] each
        image, _ = self.attn(mmdit.modulate(x, shift, scale))  # [B, L, D]
        x, h = residual_norm(x, image, gate, eps=mmdit.EPS, scale=scale_mlp, shift=shift_mlp)
        return torch.addcmul(x, gate_mlp.unsqueeze(1), self.ff(h))


class Patches(nn.Module):
    """Patches by a strided convolution, without positions: [B, C, H, W] -> [B, L, D]."""

    def __init__(self, cfg):
        super().__init__()
        self.proj = nn.Conv2d(cfg.in_channels, cfg.width, cfg.patch_size, stride=cfg.patch_size)

    def forward(self, x):
        return self.proj(x).flatten(2).transpose(1, 2)


class SD3ControlNetModel(nn.Module):
    """See the module docstring."""

    Config = Config
    class_name = "SD3ControlNetModel"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        reads = cfg.joint_attention_dim is not None
        if cfg.use_pos_embed:
            self.pos_embed = mmdit.PatchEmbed(cfg)
        self.time_text_embed = mmdit.TimeTextEmbed(cfg)
        if reads:
            self.context_embedder = nn.Linear(cfg.joint_attention_dim, cfg.width)
        self.transformer_blocks = nn.ModuleList(
            [
                mmdit.JointBlock(cfg, i in cfg.dual_attention_layers, last=False) if reads else ImageBlock(cfg)
                for i in range(cfg.num_layers)
            ]
        )
        self.controlnet_blocks = nn.ModuleList([nn.Linear(cfg.width, cfg.width) for _ in range(cfg.num_layers)])
        self.pos_embed_input = Patches(cfg)

    def look(self, latents):
        """The picture's latents [B, C, H, W] -> what forward() adds to the patches [B, L, D]; once a run."""
        return self.pos_embed_input(latents)

    def forward(self, x, t, context, seen, pooled, patches=None):
        """x, t, context, pooled: as SD3Transformer2DModel.forward() takes them. seen: look(latents). patches: the transformer's `pos_embed`, for those
        without their own -> Residuals."""
        if self.cfg.force_zeros_for_pooled_projection:
            pooled = torch.zeros_like(pooled)
        emb = self.time_text_embed(timesteps(t, x), pooled)  # [B, D]
        x = (self.pos_embed if self.cfg.use_pos_embed else patches)(x) + seen  # [B, L, D]
        text = self.context_embedder(context) if hasattr(self, "context_embedder") else None  # [B, S, D]
        found = []
        for block, out in zip(self.transformer_blocks, self.controlnet_blocks, strict=True):
            x, text = (block(x, emb), None) if text is None else block(x, text, emb, emb)
            found.append(out(x))
        return Residuals([found])
