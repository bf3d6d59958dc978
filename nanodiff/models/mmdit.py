"""SD3Transformer2DModel: the denoiser of SD 3 and SD 3.5 (medium, large, large-turbo).

    velocity [B, C, H, W] = mmdit(noisy latents [B, C, H, W], timestep [B], text [B, S, D], pooled text [B, P])

Image patches and text tokens are two streams with their own weights that attend to each other jointly
(Esser et al. 2024, arXiv 2403.03206 §4, fig. 2). Time and pooled text enter by adaptive layer norms (adaLN-Zero,
Peebles & Xie 2023, arXiv 2212.09748 §3.2). SD 3.5 normalises q and k per head; medium adds, in its first blocks, a
second attention of the image to itself ("MMDiT-X").

How it differs from the UNet: one resolution, no skips, no convolutions but the patches; the text is not looked up but
carried along, changed by every block as the image is; position is told by a table. A picture of 1024 × 1024 is latents of
128 × 128, 4,096 patches of 2 × 2, beside 333 tokens of text (77 of CLIP, 256 of T5).

| | blocks | N | D = 64 N | weights | q, k normed | second attention |
|---|---|---|---|---|---|---|
| SD 3 medium | 24 | 24 | 1536 | 2,028 M | no | none |
| SD 3.5 medium | 24 | 24 | 1536 | 2,243 M | yes | blocks 0 to 12 |
| SD 3.5 large, large-turbo | 38 | 38 | 2432 | 8,057 M | yes | none |

A third of the weights turns the condition into shifts, scales and gates (AdaLN), which are the same at every place of
the picture. Not counted: the table of positions, which is no weight (57 million numbers in SD 3, 226 in SD 3.5 medium).

Explained in the book (docs/book): chapter 11.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import (
    TimeEmbedding,
    attend,
    layer_norm,
    linear_gelu,
    project,
    qk_norm_rope,
    residual_norm,
    timestep_embedding,
    timesteps,
)

FIXED = {}
EPS = 1e-6
TIME_CHANNELS = 256


@dataclass
class Config:
    """Fields of config.json, with the defaults of the original file format."""

    sample_size: int = 128  # latents along a side in training
    patch_size: int = 2  # latents along a side of a patch
    in_channels: int = 16
    num_layers: int = 18
    attention_head_dim: int = 64  # here it really is the head size
    num_attention_heads: int = 18
    joint_attention_dim: int = 4096  # width of the text as T5 gives it; CLIP's states are filled up with zeros
    caption_projection_dim: int = 1152  # width of its stream: D
    pooled_projection_dim: int = 2048  # pooled vectors of both CLIPs: 768 + 1280
    out_channels: int | None = 16
    pos_embed_max_size: int = 96  # the largest picture, in patches along a side: 384 in SD 3.5 medium, 192 in large
    dual_attention_layers: tuple[int, ...] = ()  # blocks in which the image also attends to itself alone
    # "rms_norm": scores stay within √K times its gains: large pictures no longer diverge in mixed precision (§5.3.2)
    qk_norm: str | None = None

    @property
    def width(self):
        """D."""
        return self.num_attention_heads * self.attention_head_dim

    @classmethod
    def from_json(cls, raw, where="transformer/config.json"):
        """Raises UserError, naming `where` and the field, for another network."""
        cfg = from_json(cls, raw, FIXED, where)
        cfg.out_channels = cfg.out_channels or cfg.in_channels
        if cfg.qk_norm not in (None, "rms_norm"):
            raise UserError(f"{where}: qk_norm = {cfg.qk_norm!r} is not supported (only 'rms_norm' or null)")
        if cfg.joint_attention_dim is not None and cfg.caption_projection_dim != cfg.width:
            raise UserError(
                f"{where}: caption_projection_dim = {cfg.caption_projection_dim}, but the two streams need the width "
                f"{cfg.width} (heads times head size) to attend jointly"
            )
        return cfg


def modulate(x, shift, scale):
    """LayerNorm without weights, then scale and shift from the condition: x [B, L, D], shift, scale [B, D]."""
    return layer_norm(x, eps=EPS, scale=scale, shift=shift)


class AdaLN(nn.Module):
    """The linear layer that turns the condition, through SiLU, into `n` vectors [B, D] of shifts, scales and gates.

    "Zero" (adaLN-Zero) is its start: weights of zero, so that every gate is shut and every block hands its input on; what a
    block adds is let in as training finds it of use."""

    def __init__(self, dim, n):
        super().__init__()
        self.n = n
        self.linear = nn.Linear(dim, n * dim)

    def vectors(self, emb):
        """[B, D] -> its n vectors side by side [B, nD]."""
        return self.linear(F.silu(emb))

    def forward(self, emb):
        """The condition [B, D], or its vectors side by side as shifts() made them [B, nD] -> n of [B, D]."""
        made = self.vectors(emb) if emb.shape[-1] == self.linear.in_features else emb
        return made.chunk(self.n, dim=-1)


class Attention(nn.Module):
    """Attention of the image to itself, or (joint) of image and text to both, with q and k normalised per head."""

    def __init__(self, cfg, joint=False, text_out=False):
        super().__init__()
        D, K, self.heads = cfg.width, cfg.attention_head_dim, cfg.num_attention_heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(D, D) for _ in range(3))
        self.to_out = nn.ModuleList([nn.Linear(D, D)])
        norms = ["norm_q", "norm_k"] + (["norm_added_q", "norm_added_k"] if joint else [])
        for name in norms if cfg.qk_norm else ():
            setattr(self, name, nn.RMSNorm(K, EPS))
        if joint:
            self.add_q_proj, self.add_k_proj, self.add_v_proj = (nn.Linear(D, D) for _ in range(3))
        if text_out:
            self.to_add_out = nn.Linear(D, D)

    def _normed(self, name, x):
        """x [B, L, N·K] through the RMS norm `name` over each head's K (or as it is)."""
        if not hasattr(self, name):
            return x
        return qk_norm_rope(x.unflatten(-1, (self.heads, -1)), getattr(self, name).weight, eps=EPS).flatten(-2)

    def projections(self):
        """Linear layers of one input, see layers.join()."""
        text = [(self.add_q_proj, self.add_k_proj, self.add_v_proj)] if hasattr(self, "add_q_proj") else []
        return [(self.to_q, self.to_k, self.to_v), *text]

    def forward(self, x, text=None):
        """x [B, L, D], text [B, S, D] -> (image [B, L, D], text [B, S, D] or None)."""
        of_image, *of_text = self.projections()
        q, k, v = project(of_image, x)  # [B, L, D] each
        q, k = self._normed("norm_q", q), self._normed("norm_k", k)
        if text is None:
            return self.to_out[0](attend(q, k, v, self.heads)), None
        text_q, text_k, text_v = project(*of_text, text)  # [B, S, D] each
        q = torch.cat([q, self._normed("norm_added_q", text_q)], dim=1)
        k = torch.cat([k, self._normed("norm_added_k", text_k)], dim=1)
        v = torch.cat([v, text_v], dim=1)  # [B, L + S, D], as q and k
        image, text = attend(q, k, v, self.heads).split([x.shape[1], text.shape[1]], dim=1)  # [B, L, D], [B, S, D]
        return self.to_out[0](image), self.to_add_out(text) if hasattr(self, "to_add_out") else None


class GELU(nn.Module):
    """The widening half of a feed-forward: [B, L, D] -> [B, L, 4D]."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, hidden)

    def forward(self, x):
        return linear_gelu(self.proj, x)


class FeedForward(nn.Module):
    """[B, L, D] -> [B, L, D], four times as wide between; the Identity keeps the place of a dropout of zero."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.ModuleList([GELU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])

    def forward(self, x):
        return self.net[2](self.net[0](x))


class JointBlock(nn.Module):
    """One block of both streams. last: the text only serves the image (context_pre_only) and goes no further.

    Each stream, with vectors of its own from the condition:

        x = x + gate · attn(scale, shift of norm x, with the other stream)
        x = x + gate_mlp · ff(scale_mlp, shift_mlp of norm x)
    """

    def __init__(self, cfg, dual, last):
        super().__init__()
        D = cfg.width
        self.norm1 = AdaLN(D, 9 if dual else 6)
        self.norm1_context = AdaLN(D, 2 if last else 6)
        self.attn = Attention(cfg, joint=True, text_out=not last)
        if dual:
            self.attn2 = Attention(cfg)
        self.ff = FeedForward(D)
        if not last:
            self.ff_context = FeedForward(D)

    def after_norm(self, emb):
        """(layer, size of its input's channels) of those whose input comes out of a norm (device/int8.py), for conditions emb [T, D]: the mean over them."""
        size = lambda shift, scale: ((1 + scale.float()) ** 2 + shift.float() ** 2).mean(0).sqrt()  # noqa: E731
        shift, scale, _, shift_mlp, scale_mlp, _, *second = self.norm1(emb)  # [T, D] each
        last = not hasattr(self, "ff_context")
        t_shift, t_scale, *rest = reversed(self.norm1_context(emb)) if last else self.norm1_context(emb)
        of_image, of_text = self.attn.projections()
        pairs = [(layer, size(shift, scale)) for layer in of_image] + [
            (layer, size(t_shift, t_scale)) for layer in of_text
        ]
        pairs += [(layer, size(*second[:2])) for layer in self.attn2.projections()[0]] if second else []
        pairs += [] if last else [(self.ff_context.net[0].proj, size(*rest[1:3]))]
        return [*pairs, (self.ff.net[0].proj, size(shift_mlp, scale_mlp))]

    def forward(self, x, text, of_image, of_text):
        """x [B, L, D], text [B, S, D] -> the same, or (x, None) from the last block. of_image, of_text: what norm1 and norm1_context take,
        the condition [B, D] or their vectors."""
        shift, scale, gate, shift_mlp, scale_mlp, gate_mlp, *second = self.norm1(of_image)  # [B, D] each
        if hasattr(self, "ff_context"):
            t_shift, t_scale, t_gate, t_shift_mlp, t_scale_mlp, t_gate_mlp = self.norm1_context(of_text)
        else:
            t_scale, t_shift = self.norm1_context(of_text)  # the last one is stored scale first

        image, words = self.attn(modulate(x, shift, scale), modulate(text, t_shift, t_scale))  # [B, L, D], [B, S, D]
        image2 = gate2 = None
        if second:  # it sees x as it was before this block
            shift2, scale2, gate2 = second
            image2, _ = self.attn2(modulate(x, shift2, scale2))
        x, h = residual_norm(x, image, gate, image2, gate2, eps=EPS, scale=scale_mlp, shift=shift_mlp)
        x = torch.addcmul(x, gate_mlp.unsqueeze(1), self.ff(h))  # [B, L, D]
        if words is None:
            return x, None
        text, h = residual_norm(text, words, t_gate, eps=EPS, scale=t_scale_mlp, shift=t_shift_mlp)
        return x, torch.addcmul(text, t_gate_mlp.unsqueeze(1), self.ff_context(h))


def positions(dim, side, base):
    """The table [1, side², dim] of a new model: for each patch, sines and cosines of its column, then of its row, both
    counted so that a picture of base × base patches spans 0 to `base` (Peebles & Xie 2023's code; SD 3's files)."""
    frequencies = 10000.0 ** (-torch.arange(dim // 4, dtype=torch.float64) / (dim / 4))
    place = torch.arange(side, dtype=torch.float64) / (side / base)
    waves = place[:, None] * frequencies  # [side, dim/4]
    waves = torch.cat([waves.sin(), waves.cos()], dim=1)
    columns, rows = waves[None].expand(side, -1, -1), waves[:, None].expand(-1, side, -1)
    return torch.cat([columns, rows], dim=-1).reshape(1, side * side, dim).float()


class PatchEmbed(nn.Module):
    """Patches by a strided convolution, plus a stored table of positions cropped in its middle to the picture."""

    def __init__(self, cfg):
        super().__init__()
        p, self.side = cfg.patch_size, cfg.pos_embed_max_size
        self.proj = nn.Conv2d(cfg.in_channels, cfg.width, p, stride=p)
        self.register_buffer("pos_embed", torch.empty(1, self.side**2, cfg.width))
        if not self.pos_embed.is_meta:
            self.pos_embed.copy_(positions(cfg.width, self.side, cfg.sample_size // p))

    def forward(self, x):
        x = self.proj(x)  # [B, D, h, w], a patch a place
        h, w = x.shape[-2:]
        if h > self.side or w > self.side:
            raise ValueError(f"{h}x{w} patches, but the position table has {self.side}x{self.side}")
        top, left = (self.side - h) // 2, (self.side - w) // 2
        table = self.pos_embed.view(self.side, self.side, -1).narrow(0, top, h).narrow(1, left, w).flatten(0, 1)
        return x.flatten(2).transpose(1, 2) + table.to(x.dtype)  # [B, L, D], L = h·w


class TimeTextEmbed(nn.Module):
    """The condition [B, D]: what the time [B] and the pooled text [B, P] say, added."""

    def __init__(self, cfg):
        super().__init__()
        self.timestep_embedder = TimeEmbedding(TIME_CHANNELS, cfg.width)
        self.text_embedder = TimeEmbedding(cfg.pooled_projection_dim, cfg.width)

    def forward(self, t, pooled):
        return self.timestep_embedder(timestep_embedding(t, TIME_CHANNELS).to(pooled.dtype)) + self.text_embedder(
            pooled
        )


class SD3Transformer2DModel(nn.Module):
    """See the module docstring."""

    Config = Config
    class_name = "SD3Transformer2DModel"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        D, n, p = cfg.width, cfg.num_layers, cfg.patch_size
        self.pos_embed = PatchEmbed(cfg)
        self.time_text_embed = TimeTextEmbed(cfg)
        self.context_embedder = nn.Linear(cfg.joint_attention_dim, D)
        self.transformer_blocks = nn.ModuleList(
            [JointBlock(cfg, i in cfg.dual_attention_layers, last=i == n - 1) for i in range(n)]
        )
        self.norm_out = AdaLN(D, 2)
        self.proj_out = nn.Linear(D, p * p * cfg.out_channels)

    def after_norm(self):
        """What the blocks name, at eleven times and without a pooled text."""
        weight = self.time_text_embed.text_embedder.linear_1.weight
        t, pooled = torch.linspace(0, 1000, 11, device=weight.device), weight.new_zeros(11, weight.shape[1])
        emb = self.time_text_embed(t, pooled)  # [T, D]
        return [pair for block in self.transformer_blocks for pair in block.after_norm(emb)]

    def norms(self):
        """The AdaLNs: of every block the image's and the text's, then the last."""
        return [norm for b in self.transformer_blocks for norm in (b.norm1, b.norm1_context)] + [self.norm_out]

    def shift_widths(self):
        """nD of each AdaLN: how wide shifts() are."""
        return [norm.n * self.cfg.width for norm in self.norms()]

    def shifts(self, t, pooled):
        """What the AdaLNs make of the times t [T] with a pooled text [B, P], side by side: [T · B, ΣnD], time after time. Times are known before a
        run, so a sampler computes them once and passes B rows in place of the time: a third of the weights is read once, not at every step."""
        emb = self.time_text_embed(t.repeat_interleave(len(pooled)), pooled.repeat(len(t), 1))  # [T · B, D]
        made = emb.new_empty(len(emb), sum(self.shift_widths()))
        for norm, part in zip(self.norms(), made.split(self.shift_widths(), dim=-1), strict=True):
            part.copy_(norm.vectors(emb))  # one by one: side by side they may be large
        return made

    def conditioned(self, x, t, pooled):
        """What each AdaLN takes, in norms()' order: the condition [B, D], or of shifts()' rows its own [B, nD]."""
        if isinstance(t, torch.Tensor) and t.dim() == 2:
            return t.split(self.shift_widths(), dim=-1)
        return [self.time_text_embed(timesteps(t, x), pooled)] * len(self.norms())

    def forward(self, x, t, text, pooled, skip_layers=(), control=None):
        """x [B, C, H, W] with H and W multiples of the patch size, t [B] or a scalar in [0, 1000] (or rows of shifts()), text [B, S, D],
        pooled [B, P] -> [B, C, H, W]. skip_layers: blocks left out (skip-layer guidance). control: what ControlNets add
        (control_mmdit.Residuals), behind every block but the last."""
        H, W = x.shape[-2:]
        p = self.cfg.patch_size
        given = self.conditioned(x, t, pooled)
        text = self.context_embedder(text)  # [B, S, D]
        x = self.pos_embed(x)  # [B, L, D], L = H/p · W/p
        for i, block in enumerate(self.transformer_blocks):
            if i not in skip_layers:
                x, text = block(x, text, *given[2 * i : 2 * i + 2])
                if control is not None and text is not None:
                    x = x + control.behind(i, len(self.transformer_blocks))
        scale, shift = self.norm_out(given[-1])  # scale first, unlike in the blocks
        x = self.proj_out(modulate(x, shift, scale))  # [B, L, p·p·C]
        x = x.view(len(x), H // p, W // p, p, p, -1)  # [B, h, w, p, q, C]
        return x.permute(0, 5, 1, 3, 2, 4).reshape(len(x), -1, H, W)  # [B, C, H, W]
