"""UNet2DConditionModel: the denoiser of SD 1.x, SD 2.x and SDXL.

    prediction [B, C, H, W] = unet(noisy latents [B, C, H, W], timestep [B], text [B, S, D])

A pyramid of residual blocks with skips (Ronneberger et al. 2015), time added in every residual block
(Ho et al. 2020), text by cross-attention in transformer blocks (Rombach et al. 2022, arXiv 2112.10752 §3.3).
SDXL (arXiv 2307.01952) is a configuration: no attention at the top level, deeper transformers below, and a
vector condition (pooled text and image sizes) added to the time embedding.

What a picture of 512 × 512 passes through in SD 1.5 (latents of 64 × 64), R a residual block, A attention over all
places and over the text, and where its 860 million weights are:

    level   channels    down                     up                        weights down + up, millions
    64 × 64      320    R A  R A  ↓              R A  R A  R A             11 + 19
    32 × 32      640    R A  R A  ↓              R A  R A  R A  ↑          37 + 71
    16 × 16     1280    R A  R A  ↓              R A  R A  R A  ↑         140 + 258
     8 × 8      1280    R    R      ->  R A R -> R    R    R    ↑          62 + 97 + 162

What comes out of the first convolution, of every R (behind its A) and of every ↓ is kept as a skip, and read by an R of
that size on the way up: twelve of them. With half the side and twice the channels a level's residual blocks cost as much
as those above (down to 16 × 16) and have four times their weights; its attention costs less. 63 % of all weights are in
residual blocks here; in SDXL (2,567 million) 86 % are in transformers, ten blocks deep at the lowest level.

Explained in the book (docs/book): chapters 5, 6 and 9.
"""

import contextlib
import itertools
import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json, printable, short, typed
from nanodiff.models.layers import (
    Downsample,
    GroupNorm,
    LayerNorm,
    ResnetBlock,
    Stage,
    TimeEmbedding,
    add_product,
    attend,
    bias_before,
    guidance_embedding,
    linear_geglu,
    pointwise,
    project,
    size_after,
    timestep_embedding,
    timesteps,
)
from nanodiff.models.upsample import Upsample

# Names of stages in the files, and whether they have attention.
DOWN_TYPES = {"DownBlock2D": False, "CrossAttnDownBlock2D": True}
UP_TYPES = {"UpBlock2D": False, "CrossAttnUpBlock2D": True}

# Fields of config.json that released models leave at one value. Any other value is another network. (Two of them a UNet's Config reads, a ControlNet's not.)
FIXED = {
    "act_fn": ["silu", "swish"],
    "addition_embed_type_num_heads": [64],
    "attention_type": ["default"],
    "center_input_sample": [False],
    "class_embed_type": [None],
    "class_embeddings_concat": [False],
    "conv_in_kernel": [3],
    "conv_out_kernel": [3],
    "cross_attention_norm": [None],
    "downsample_padding": [1],
    "dropout": [0.0],
    "dual_cross_attention": [False],
    "encoder_hid_dim": [None],
    "encoder_hid_dim_type": [None],
    "flip_sin_to_cos": [True],
    "freq_shift": [0],
    "mid_block_only_cross_attention": [None, False],
    "mid_block_scale_factor": [1],
    "num_class_embeds": [None],
    "only_cross_attention": [False, [False] * 3, [False] * 4],
    "resnet_out_scale_factor": [1.0],
    "resnet_skip_time_act": [False],
    "resnet_time_scale_shift": ["default"],
    "reverse_transformer_layers_per_block": [None],
    "time_cond_proj_dim": [None],
    "time_embedding_act_fn": [None],
    "time_embedding_dim": [None],
    "time_embedding_type": ["positional"],
    "timestep_post_act": [None],
}
# `attention_head_dim` of these files is the *number of heads*; it becomes `num_heads` here and nowhere else.
HEADS = ("attention_head_dim", "num_attention_heads")


@dataclass
class DownConfig:
    """Fields of config.json about the way down, with the defaults of the original file format; per-level fields are tuples."""

    in_channels: int = 4  # 9 for inpainting: latents, mask, latents of what is kept
    block_out_channels: tuple[int, ...] = (320, 640, 1280, 1280)  # one a level, the largest picture first
    layers_per_block: int = 2  # residual blocks a level; one more on the way up
    down_block_types: tuple[str, ...] = ("CrossAttnDownBlock2D",) * 3 + ("DownBlock2D",)
    mid_block_type: str | None = "UNetMidBlock2DCrossAttn"
    cross_attention_dim: int = 1280  # width of the text: 768 in SD 1.x, 1024 in SD 2.x, 2048 in SDXL
    num_heads: int | tuple[int, ...] = 8  # SD 1.x: 8 at each level (40, 80, 160 wide); since SD 2 heads of 64
    # SDXL: 1, 2, 10; a level may have a number for each of its attentions (Gupta et al. 2024, arXiv 2401.02677)
    transformer_layers_per_block: int | tuple[int | tuple[int, ...], ...] = 1
    norm_num_groups: int = 32
    norm_eps: float = 1e-5
    use_linear_projection: bool = False  # see Transformer2D
    upcast_attention: bool | None = False  # scores in fp32: they always are (layers.attend)
    addition_embed_type: str | None = None  # "text_time": SDXL's vector condition
    addition_time_embed_dim: int | None = None  # channels for each of its six sizes
    projection_class_embeddings_input_dim: int | None = None  # pooled text and those together: 1280 + 6 · 256

    # not fields of the file, but what it may say:
    types = {"down_block_types": tuple(DOWN_TYPES)}  # per-level names of classes, and those that there are
    middles = ("UNetMidBlock2DCrossAttn", "UNetMidBlock2D")  # the latter has no attention
    # diffusers' ControlNet takes num_attention_heads before attention_head_dim; its UNet refuses the former
    heads_agree = False

    def __post_init__(self):
        levels = len(self.block_out_channels)
        for name in ("num_heads", "transformer_layers_per_block"):
            value = getattr(self, name)
            each = (value,) * levels if isinstance(value, int) else value
            setattr(self, name, tuple(tuple(v) if isinstance(v, list) else v for v in each))

    def depth(self, level, j):
        """Transformer blocks of the j-th attention of a level."""
        return _each(self.transformer_layers_per_block[level], j)

    @classmethod
    def from_json(cls, raw, where="unet/config.json"):
        """Raises UserError, naming `where` and the field, for another network and for levels that do not fit together."""
        raw = dict(raw)
        heads = [typed(raw.pop(name, None), int | tuple[int, ...] | None, f"{where}: {name}") for name in HEADS]
        cfg = from_json(cls, raw | {"num_heads": next((h for h in heads[::-1] if h is not None), 8)}, FIXED, where)
        levels = len(cfg.block_out_channels)
        alike = len({(h,) * levels if isinstance(h, int) else h for h in heads}) == 1
        if cls.heads_agree and None not in heads and not alike:
            raise UserError(f"{where}: {HEADS[0]} {short(heads[0])} and {HEADS[1]} {short(heads[1])} disagree")
        for name in (*cls.types, "num_heads", "transformer_layers_per_block"):
            if len(getattr(cfg, name)) != levels:
                raise UserError(f"{where}: {name} has {len(getattr(cfg, name))} entries for {levels} levels")
        middle = [(cfg.block_out_channels[-1], cfg.num_heads[-1], cfg.mid_block_type)]
        for width, n, kind in [*zip(cfg.block_out_channels, cfg.num_heads, cfg.down_block_types, strict=True), *middle]:
            if "CrossAttn" in str(kind) and (n < 1 or width % n):
                raise UserError(f"{where}: {width} channels cannot be divided among {n} heads ({HEADS[0]})")
        for name, known in (*cls.types.items(), ("mid_block_type", cls.middles)):
            kinds = getattr(cfg, name)
            for kind in kinds if isinstance(kinds, tuple) else (kinds,):
                if kind not in known:
                    raise UserError(f"{where}: {name}: {kind!r} is not supported (only {', '.join(map(str, known))})")
        cfg.check_depths(where)
        if cfg.addition_embed_type not in (None, "text_time"):
            raise UserError(f"{where}: addition_embed_type = {cfg.addition_embed_type!r} is not supported")
        return cfg

    def check_depths(self, where):
        """Raise UserError where a level's list of depths is shorter than the level."""
        kinds, depths = self.down_block_types, self.transformer_layers_per_block
        _check_long_enough(f"{where}: transformer_layers_per_block", kinds, depths, self.layers_per_block)
        _check_long_enough(f"{where}: transformer_layers_per_block", [str(self.mid_block_type)], depths[-1:], 1)

    def to_json(self):
        """The config.json dict that other tools read."""
        raw = {k: v for k, v in vars(self).items() if v is not None} | {
            "act_fn": "silu",
            "mid_block_type": self.mid_block_type,
        }
        raw["attention_head_dim"] = list(raw.pop("num_heads"))
        return raw


def _each(depths, j):
    return depths if isinstance(depths, int) else depths[j]


def _check_long_enough(where, kinds, levels, blocks):
    for kind, depths in zip(kinds, levels, strict=True):
        if "CrossAttn" in kind and not isinstance(depths, int) and len(depths) < blocks:
            raise UserError(f"{where}: {list(depths)} has {len(depths)} entries for {blocks} blocks")


@dataclass
class Config(DownConfig):
    """Fields of a UNet's config.json."""

    heads_agree = True

    out_channels: int = 4
    sample_size: int | tuple[int, ...] | None = None  # latents along a side in training: 64 for pictures of 512 px
    up_block_types: tuple[str, ...] = ("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 3
    # of the way up, where it is no mirror
    reverse_transformer_layers_per_block: tuple[int | tuple[int, ...], ...] | None = None
    time_cond_proj_dim: int | None = None  # channels in which a model distilled from guidance is told its scale

    types = DownConfig.types | {"up_block_types": tuple(UP_TYPES)}
    middles = (*DownConfig.middles, None)  # None: no middle at all (Kim et al. 2023, arXiv 2305.15798)

    def depth_up(self, i, j):
        """Transformer blocks of the j-th attention of the i-th level on the way up, the lowest first."""
        return _each((self.reverse_transformer_layers_per_block or self.transformer_layers_per_block[::-1])[i], j)

    def check_depths(self, where):
        super().check_depths(where)
        name, up = "reverse_transformer_layers_per_block", self.reverse_transformer_layers_per_block
        if up is None and not all(isinstance(d, int) for d in self.transformer_layers_per_block):
            raise UserError(f"{where}: transformer_layers_per_block with lists in it needs a {name}")
        if up is not None:
            if len(up) != len(self.block_out_channels):
                raise UserError(f"{where}: {name} has {len(up)} entries for {len(self.block_out_channels)} levels")
            _check_long_enough(f"{where}: {name}", self.up_block_types, up, self.layers_per_block + 1)
        if self.time_cond_proj_dim is not None and self.time_cond_proj_dim < 4:
            raise UserError(f"{where}: time_cond_proj_dim = {self.time_cond_proj_dim} is out of range")


class Attention(nn.Module):
    """Multi-head attention (Vaswani et al. 2017, arXiv 1706.03762 §3.2.2); q from x, k and v from x (self) or from the text
    (cross). Self-attention lets distant places of the picture agree, at a cost of L²; cross-attention asks the text: each place
    gets a mixture of the S words' values, weighted by how its query answers to their keys."""

    perturbed = False  # everything looks at itself alone (Ahn et al. 2024, arXiv 2403.17377)

    def __init__(self, dim, heads, context_dim=None):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(dim, dim, bias=False)
        self.to_k = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_v = nn.Linear(context_dim or dim, dim, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(dim, dim)])

    def projections(self):
        """Linear layers of one input, see layers.join()."""
        return [(self.to_q, self.to_k, self.to_v)]

    def kv(self, context):
        """The text's keys and values, [B, S, D] each."""
        return self.to_k(context), self.to_v(context)

    def forward(self, x, kv=None):
        """x [B, L, D] -> [B, L, D]. kv: keys and values of the text, and behind them those of pictures (ipadapter.py), each looked at by itself; None: x's own."""
        if self.perturbed:
            return self.to_out[0](self.to_v(x))
        q, *kv = project((self.to_q, self.to_k, self.to_v), x) if kv is None else (self.to_q(x), *kv)
        out = attend(q, kv[0], kv[1], self.heads)  # [B, L, D], over L or S keys
        for k, v in zip(kv[2::2], kv[3::2], strict=True):
            out = out + attend(q, k, v, self.heads)
        return self.to_out[0](out)


@contextlib.contextmanager
def perturbed(unet, layers):
    """Inside, the self-attentions of a UNet whose names have one of the patterns `layers` in them let everything look at itself alone.
    Raises UserError for a pattern that is in none."""
    names = {name: m for name, m in unet.named_modules() if name.endswith("attn1")}
    chosen = []
    for layer in (layers,) if isinstance(layers, str) else layers:
        try:
            mine = [m for name, m in names.items() if layer and re.search(layer, name)]
        except re.error as e:
            raise UserError(f"`perturbed_layers` {printable(layer)!r} is no pattern: {e}") from None
        if not mine:
            raise UserError(
                f"`perturbed_layers`: no self-attention's name has {printable(layer)!r} in it; they are {', '.join(names)}"
            )
        chosen += mine
    try:
        for attention in chosen:
            attention.perturbed = True
        yield
    finally:
        for attention in chosen:
            attention.perturbed = False


class GEGLU(nn.Module):
    """value · gelu(gate) of one double-width projection (Shazeer 2020, arXiv 2002.05202 eq. 6). [B, L, D] -> [B, L, 4D]; the
    first half of the projection is the value, as in the files."""

    def __init__(self, dim, hidden):
        super().__init__()
        self.proj = nn.Linear(dim, 2 * hidden)
        self.proj.halves = 2  # how it is packed for a CPU

    def forward(self, x):
        return linear_geglu(self.proj, x)


class FeedForward(nn.Module):
    """The widening half and the narrowing one, which its block adds to what it has. Between them the files have a dropout of
    zero, whose place the Identity keeps."""

    def __init__(self, dim):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(dim, 4 * dim), nn.Identity(), nn.Linear(4 * dim, dim)])


class TransformerBlock(nn.Module):
    """Self-attention, cross-attention to the text, feed-forward; pre-norm, residual:

        x = x + attn1(norm1 x);   x = x + attn2(norm2 x, text);   x = x + ff(norm3 x)

    Written below so that each residual and the norm behind it are one operator (LayerNorm.after), which reads x once."""

    def __init__(self, dim, heads, context_dim):
        super().__init__()
        self.norm1, self.norm2, self.norm3 = (LayerNorm(dim) for _ in range(3))
        self.attn1 = Attention(dim, heads)
        self.attn2 = Attention(dim, heads, context_dim)
        self.ff = FeedForward(dim)

    def after_norm(self):
        """(layer, size of its input's channels) of those whose input comes out of a norm (device/int8.py); the keys and values of attn2 are the text's."""
        own = [(layer, size_after(self.norm1)) for layer in (self.attn1.to_q, self.attn1.to_k, self.attn1.to_v)]
        return *own, (self.attn2.to_q, size_after(self.norm2)), (self.ff.net[0].proj, size_after(self.norm3))

    def forward(self, x, context):
        """context: the text [B, S, D], or its keys and values from text_kv() and those of pictures."""
        kv = self.attn2.kv(context) if isinstance(context, torch.Tensor) else context
        x, h = self.norm2.after(x, self.attn1(self.norm1(x)))  # [B, L, D] each
        bias = bias_before(self.ff.net[2], x)
        x, h = self.norm3.after(x, self.attn2(h, kv), more=bias)  # [B, L, D] each
        return add_product(x, self.ff.net[2], self.ff.net[0](h), bias is not None)


class Transformer2D(nn.Module):
    """Transformer blocks over the H·W positions of an image.

    SD 1.x projects in and out by 1×1 convolutions, SD 2.x and SDXL by linear layers: the same map, other
    weight shapes. The places are told from each other by nothing here, there is no position embedding: what
    the convolutions around it wrote into each place (their zero padding marks the border) has to do.
    """

    def __init__(self, channels, heads, depth, context_dim, groups, linear):
        super().__init__()
        self.norm = GroupNorm(groups, channels, 1e-6)
        self.linear = linear
        projection = (lambda: nn.Linear(channels, channels)) if linear else lambda: nn.Conv2d(channels, channels, 1)
        self.proj_in = projection()
        self.transformer_blocks = nn.ModuleList([TransformerBlock(channels, heads, context_dim) for _ in range(depth)])
        self.proj_out = projection()

    def after_norm(self):
        """(layer, size of its input's channels) of those whose input comes out of a norm (device/int8.py)."""
        return ((self.proj_in, size_after(self.norm)),)

    def forward(self, x, kvs):
        """x [B, C, H, W]; kvs: an iterator of what each block sees of the text, from which it takes its own. -> [B, C, H, W]"""
        B, C, H, W = x.shape
        h = self.norm(x)  # [B, C, H, W]
        h = h if self.linear else pointwise(self.proj_in, h)
        h = h.permute(0, 2, 3, 1).reshape(B, H * W, C)  # [B, L, C], L = H·W
        h = self.proj_in(h) if self.linear else h  # [B, L, D]
        for block in self.transformer_blocks:
            h = block(h, next(kvs))  # [B, L, D]
        h = self.proj_out(h) if self.linear else h
        h = h.reshape(B, H, W, C).permute(0, 3, 1, 2)  # [B, C, H, W]
        h = h if self.linear else pointwise(self.proj_out, h)
        return x + h


class MidBlock(nn.Module):
    """Residual block, attention, residual block; without an attention one residual block."""

    def __init__(self, channels, attention, resnet):
        super().__init__()
        if attention is not None:
            self.attentions = nn.ModuleList([attention])
        self.resnets = nn.ModuleList([resnet(channels, channels) for _ in range(1 if attention is None else 2)])

    def forward(self, x, temb, shifts, kvs):
        """[B, C, h, w] -> [B, C, h, w], the smallest picture, where a place sees the most of the whole."""
        x = self.resnets[0](x, temb, next(shifts))
        if len(self.resnets) == 1:
            return x
        return self.resnets[1](self.attentions[0](x, kvs), temb, next(shifts))


def crosses(part):
    """The cross-attentions of a stage in the order of its forward()."""
    for transformer in getattr(part, "attentions", ()):
        for block in transformer.transformer_blocks:
            yield block.attn2


class Downward(nn.Module):
    """The way down and its end: what a UNet and its ControlNet (controlnet.py) have in common."""

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        widths, L = cfg.block_out_channels, cfg.layers_per_block
        temb_dim, last = 4 * widths[0], len(widths) - 1

        self.conv_in = nn.Conv2d(cfg.in_channels, widths[0], 3, padding=1)
        self.time_embedding = TimeEmbedding(widths[0], temb_dim, getattr(cfg, "time_cond_proj_dim", None))
        if cfg.addition_embed_type:
            self.add_embedding = TimeEmbedding(cfg.projection_class_embeddings_input_dim, temb_dim)

        self.down_blocks = nn.ModuleList()
        # L residual blocks a level; the first of a level changes the number of channels, and all but the last level halve the picture
        self.widths = [widths[0]]  # channels of every tensor that the way down hands to the way up
        for i, c in enumerate(widths):
            resnets = [self.resnet(self.widths[-1] if j == 0 else c, c) for j in range(L)]
            depths = [cfg.depth(i, j) for j in range(L)] if DOWN_TYPES[cfg.down_block_types[i]] else ()
            attentions = [self.attention(i, depth) for depth in depths]
            self.down_blocks.append(Stage(resnets, attentions, down=Downsample(c) if i < last else None))
            self.widths += [c] * (L + (i < last))

        self.mid_block = None
        if cfg.mid_block_type:
            attends = cfg.mid_block_type == "UNetMidBlock2DCrossAttn"
            attention = self.attention(last, cfg.depth(last, 0)) if attends else None
            self.mid_block = MidBlock(widths[-1], attention, self.resnet)

    def resnet(self, c_in, c_out):
        cfg = self.cfg
        return ResnetBlock(c_in, c_out, cfg.norm_num_groups, cfg.norm_eps, 4 * cfg.block_out_channels[0])

    def attention(self, level, depth):
        cfg = self.cfg
        return Transformer2D(
            cfg.block_out_channels[level],
            cfg.num_heads[level],
            depth,
            cfg.cross_attention_dim,
            cfg.norm_num_groups,
            cfg.use_linear_projection,
        )

    def parts(self):
        """The stages in the order of forward()."""
        return (*self.down_blocks, *self.middle())

    def middle(self):
        """The middle, if there is one."""
        return () if self.mid_block is None else (self.mid_block,)

    def text_kv(self, context):
        """Keys and values of every cross-attention for a text [B, S, D], in the order of forward().

        They do not depend on the noise or the timestep, so a sampler computes them once per run and passes
        the list in place of the text.
        """
        return [attention.kv(context) for part in self.parts() for attention in crosses(part)]

    def cross_attentions(self):
        """How many cross-attentions the way down, the middle and the way up have."""
        count = lambda parts: sum(len(list(crosses(part))) for part in parts)  # noqa: E731
        down, middle = count(self.down_blocks), count(self.middle())
        return down, middle, count(self.parts()) - down - middle

    def context_widths(self):
        """Width of every cross-attention's keys, in the order of forward()."""
        return [attention.to_k.out_features for part in self.parts() for attention in crosses(part)]

    def embed(self, t, added=None):
        """Time (and, for SDXL, vector) condition [B, 4·C], after the SiLU with which every resnet begins.

        t: [B]. added: (pooled text [B, D], size ids [B, 6]).
        """
        dtype = self.conv_in.weight.dtype  # the sinusoids are fp32, the layers that read them are not
        told = getattr(self.cfg, "time_cond_proj_dim", None)
        told = guidance_embedding(self.guidance, told, t.device).to(dtype) if told else None
        temb = self.time_embedding(timestep_embedding(t, self.cfg.block_out_channels[0]).to(dtype), told)
        if self.cfg.addition_embed_type:
            pooled, ids = added
            sizes = timestep_embedding(ids.flatten(), self.cfg.addition_time_embed_dim).to(dtype)
            temb = temb + self.add_embedding(torch.cat([pooled, sizes.view(len(pooled), -1)], dim=-1))
        return F.silu(temb)

    def resnets(self):
        """Every residual block in the order of forward()."""
        return [r for part in self.parts() for r in part.resnets]

    def shift_widths(self):
        """Channels of each residual block: how wide shifts() are."""
        return [resnet.conv1.out_channels for resnet in self.resnets()]

    def shifts(self, t, added=None):
        """What every residual block adds to its channels at the times t [T], side by side: [T, ΣC], or [T · B, ΣC] with an
        `added` of B rows, time after time. Times are known before a run, so a sampler computes them once and passes a row (or
        B rows) in place of the time."""
        if added is not None:
            rows = len(added[0])
            t, added = t.repeat_interleave(rows), tuple(part.repeat(len(t), 1) for part in added)
        temb = self.embed(t, added)
        return torch.cat([resnet.shift(temb) for resnet in self.resnets()], dim=1)

    def conditioned(self, x, t, context, added):
        """(temb, shifts, kvs): the time and the text as blocks take them, from what forward() is given."""
        if isinstance(t, torch.Tensor) and t.dim() == 2:
            temb, shifts = None, iter(t.expand(len(x), -1).split(self.shift_widths(), dim=1))
        else:
            temb, shifts = self.embed(timesteps(t, x), added), itertools.repeat(None)
        return temb, shifts, itertools.repeat(context) if isinstance(context, torch.Tensor) else iter(context)

    def down(self, x, temb, shifts, kvs):
        """x after its first convolution [B, C₁, H, W] -> (the smallest [B, Cₙ, h, w], the skips, the largest first)."""
        skips = [x]
        for stage in self.down_blocks:
            for resnet, attention in stage.layers():
                x = resnet(x, temb, next(shifts))  # [B, Cᵢ, h, w]
                x = attention(x, kvs) if attention is not None else x
                skips.append(x)
            if (down := stage.resample(x)) is not None:
                x = down  # [B, Cᵢ, h/2, w/2]
                skips.append(x)
        for block in self.middle():
            x = block(x, temb, shifts, kvs)
        return x, skips


class UNet2DConditionModel(Downward):
    """See the module docstring."""

    Config = Config
    class_name = "UNet2DConditionModel"
    freeu = None  # freeu.FreeU of a run
    guidance = 1.0  # the scale of a run, which a model distilled from guidance is told

    def __init__(self, cfg):
        super().__init__(cfg)
        widths, L, last = cfg.block_out_channels, cfg.layers_per_block, len(cfg.block_out_channels) - 1
        # Up, in mirrored order: each residual block reads what came from below beside the skip that was laid down last, so a level
        # has one block more than on the way down, for the skip of its downsampling (or of conv_in).
        self.up_blocks = nn.ModuleList()
        c_in, skips = widths[-1], list(self.widths)
        for i, c in enumerate(reversed(widths)):
            resnets = [self.resnet((c_in if j == 0 else c) + skips.pop(), c) for j in range(L + 1)]
            depths = [cfg.depth_up(i, j) for j in range(L + 1)] if UP_TYPES[cfg.up_block_types[i]] else ()
            attentions = [self.attention(last - i, depth) for depth in depths]
            self.up_blocks.append(Stage(resnets, attentions, up=Upsample(c) if i < last else None))
            c_in = c

        self.conv_norm_out = GroupNorm(cfg.norm_num_groups, widths[0], cfg.norm_eps, silu=True)
        self.conv_out = nn.Conv2d(widths[0], cfg.out_channels, 3, padding=1)

    def parts(self):
        return (*super().parts(), *self.up_blocks)

    def forward(self, x, t, context, added=None, control=None):
        """x [B, C, H, W], t [B], a scalar, or 1 or B rows of shifts(), context [B, S, D] or text_kv(context) -> [B, C, H, W].

        control: what ControlNets add (controlnet.Residuals): to each skip, and to the middle.
        """
        temb, shifts, kvs = self.conditioned(x, t, context, added)

        x = self.conv_in(x)  # [B, C₁, H, W]
        x, skips = self.down(x, temb, shifts, kvs)  # [B, Cₙ, h, w], the smallest
        if control is not None:
            skips = [skip + more for skip, more in zip(skips, control.skips, strict=True)]
            x = x + control.middle

        for i, stage in enumerate(self.up_blocks):
            for resnet, attention in stage.layers():
                skip = skips.pop()
                if self.freeu is not None:
                    x, skip = self.freeu(x, skip, i)
                x = resnet(torch.cat([x, skip], dim=1), temb, next(shifts))  # [B, Cᵢ, h, w]
                x = attention(x, kvs) if attention is not None else x
            # An odd size was rounded up on the way down: come back to the size of the waiting skip.
            size = skips[-1].shape[-2:] if skips else None
            if (up := stage.resample(x, size)) is not None:
                x = up  # [B, Cᵢ, 2h, 2w]
        return self.conv_out(self.conv_norm_out(x))  # [B, C, H, W]
