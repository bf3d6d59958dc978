"""IP-Adapter: a picture as a prompt, by a second cross-attention beside every one of a UNet's (Ye et al. 2023, arXiv 2308.06721 §3.2).

    tokens [B, T, D] = adapter.tokens(what CLIP's vision tower says of the pictures)
    output = softmax(q kᵀ/√K) v + scale · softmax(q k'ᵀ/√K) v',   k', v' = to_k_ip(tokens), to_v_ip(tokens)

The plain one makes a few tokens of the picture's one vector; "plus" asks the vision tower's last states but one with learned queries, as a
perceiver does. Modules carry the names of the published files.

Explained in the book (docs/book): chapter 9.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError
from nanodiff.models.layers import LayerNorm, attend

HEAD = 64  # size of a head of the resampler


@dataclass
class Config:
    """Sizes of an adapter, told by the shapes in its file (there is no config.json)."""

    context: int  # D, width of a token, as the UNet's text
    seen: int  # width of what the vision tower gives: its projection, or of "plus" its states
    tokens: int  # T, tokens a picture
    widths: tuple[int, ...]  # of the UNet's cross-attentions in the files' order: down, up, middle
    inner: int = 0  # width of the resampler of "plus"; 0: the plain one
    depth: int = 0  # its layers

    @classmethod
    def from_shapes(cls, shapes, where):
        """From a file's {name: shape}. Raises UserError for other kinds of adapters."""
        keys = sorted((int(m[1]), k) for k in shapes if (m := re.fullmatch(r"ip_adapter\.(\d+)\.to_k_ip\.weight", k)))
        widths = tuple(shapes[k][0] for _, k in keys)
        if any("lora" in k for k in shapes) and not any(k.startswith(("ip_adapter.", "image_proj.")) for k in shapes):
            raise UserError(f"{where}: is a LoRA, no IP-Adapter (`lora`)")
        if any("lora" in k for k in shapes):
            raise UserError(f"{where}: is an IP-Adapter FaceID, which is not supported (only the plain one and plus)")
        if widths and "image_proj.latents" in shapes:
            _, tokens, inner = shapes["image_proj.latents"]
            depth = len({k.split(".")[2] for k in shapes if k.startswith("image_proj.layers.")})
            out, seen = shapes["image_proj.proj_out.weight"][0], shapes["image_proj.proj_in.weight"][1]
            return cls(out, seen, tokens, widths, inner, depth)
        if widths and {"image_proj.norm.weight", "image_proj.proj.weight"} <= set(shapes):
            (context,), (rows, seen) = shapes["image_proj.norm.weight"], shapes["image_proj.proj.weight"]
            return cls(context, seen, rows // context, widths)
        kind = (
            "full-face adapter" if "image_proj.proj.0.weight" in shapes else f"IP-Adapter among {len(shapes)} tensors"
        )
        raise UserError(
            f"{where}: no IP-Adapter that is known here (plain or plus), but a {kind}"
            if widths
            else f"{where}: is no {kind}"
        )


class ImageProjection(nn.Module):
    """One vector [B, E] -> T tokens [B, T, D]."""

    def __init__(self, cfg):
        super().__init__()
        self.proj, self.norm = nn.Linear(cfg.seen, cfg.tokens * cfg.context), LayerNorm(cfg.context)

    def forward(self, x):
        return self.norm(self.proj(x).unflatten(-1, (-1, self.norm.normalized_shape[0])))


class PerceiverAttention(nn.Module):
    """Queries from the latents, keys and values from the picture's states and the latents together (Jaegle et al. 2021, arXiv 2103.03206)."""

    def __init__(self, dim):
        super().__init__()
        self.norm1, self.norm2 = LayerNorm(dim), LayerNorm(dim)
        self.to_q, self.to_kv = nn.Linear(dim, dim, bias=False), nn.Linear(dim, 2 * dim, bias=False)
        self.to_out = nn.Linear(dim, dim, bias=False)

    def forward(self, x, latents):
        x, latents = self.norm1(x), self.norm2(latents)
        k, v = self.to_kv(torch.cat([x, latents], dim=1)).chunk(2, dim=-1)  # [B, S + T, D]
        return self.to_out(attend(self.to_q(latents), k, v, latents.shape[-1] // HEAD))  # [B, T, D]


class Resampler(nn.Module):
    """States of the vision tower [B, S, E] -> T tokens [B, T, D]."""

    def __init__(self, cfg):
        super().__init__()
        self.latents = nn.Parameter(torch.zeros(1, cfg.tokens, cfg.inner))
        self.proj_in, self.proj_out = nn.Linear(cfg.seen, cfg.inner), nn.Linear(cfg.inner, cfg.context)
        self.norm_out = LayerNorm(cfg.context)
        feed = lambda: nn.ModuleList([LayerNorm(cfg.inner), nn.Linear(cfg.inner, 4 * cfg.inner, bias=False), nn.Identity(), nn.Linear(4 * cfg.inner, cfg.inner, bias=False)])  # fmt: skip  # noqa: E731
        self.layers = nn.ModuleList([nn.ModuleList([PerceiverAttention(cfg.inner), feed()]) for _ in range(cfg.depth)])

    def forward(self, x):
        x, latents = self.proj_in(x), self.latents.expand(len(x), -1, -1)  # [B, S, I], [B, T, I]
        for attention, (norm, widen, _, narrow) in self.layers:
            latents = latents + attention(x, latents)
            latents = latents + narrow(F.gelu(widen(norm(latents))))
        return self.norm_out(self.proj_out(latents))  # [B, T, D]


class Pair(nn.Module):
    """Keys and values of one cross-attention."""

    def __init__(self, context, width):
        super().__init__()
        self.to_k_ip, self.to_v_ip = nn.Linear(context, width, bias=False), nn.Linear(context, width, bias=False)


class IPAdapter(nn.Module):
    """See the module docstring."""

    class_name = "IPAdapter"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.image_proj = Resampler(cfg) if cfg.inner else ImageProjection(cfg)
        # numbered as the attentions of diffusers' UNet are, of which every second is one to the text
        self.ip_adapter = nn.ModuleDict({str(2 * i + 1): Pair(cfg.context, w) for i, w in enumerate(cfg.widths)})

    @property
    def plus(self):
        """Does it ask for the vision tower's states (all of them, the last but one), not for its one vector?"""
        return isinstance(self.image_proj, Resampler)

    def tokens(self, seen):
        """What the vision tower says of n pictures, [n, E] or [n, S, E] -> their tokens in one row [1, n · T, D]."""
        return self.image_proj(seen).flatten(0, 1)[None]

    def kv(self, tokens):
        """Keys and values [B, n · T, width] of every cross-attention for tokens [B, n · T, D], in the files' order."""
        return [(pair.to_k_ip(tokens), pair.to_v_ip(tokens)) for pair in self.ip_adapter.values()]
