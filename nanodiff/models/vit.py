"""Vision Transformer (Dosovitskiy et al. 2021, arXiv 2010.11929): pixels [B, 3, R, R] -> a class token and a token for each patch
[B, 1 + (R/P)², D].

Pre-norm blocks with LayerNorm, attention with biases, exact GELU. Modules carry the names of ViTForImageClassification's checkpoints
(google/vit-base-patch16-224) without the prefix `vit.`; its classifier and pooler are not loaded.

A picture is read as a text is: cut into squares of P × P pixels, each flattened and projected to D numbers (a convolution
whose stride is its size), told its place by a learned vector, and then a plain transformer in which every patch sees every
other from the first layer on. Nothing of it knows that neighbours belong together; it is learned from much data, which is
why a small one trained from scratch lags behind a convolutional network. B/16 at 224 px: 196 patches, 12 layers, D = 768,
86 million weights.

Explained in the book (docs/book): chapter 15.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import LayerNorm, attend

# Fields of config.json that released models leave at these values; any other is refused: it may be another network.
FIXED = {
    "attention_probs_dropout_prob": [0.0],
    "hidden_dropout_prob": [0.0],
    "hidden_act": ["gelu"],
    "qkv_bias": [True],
    "initializer_range": [0.02],
    "pooler_act": ["tanh"],
    "problem_type": [None],
}
# of the heads that are not loaded
UNREAD = {"encoder_stride", "id2label", "label2id", "num_labels", "pooler_output_size"}


@dataclass
class Config:
    """Fields of config.json, with the defaults of ViT-B/16."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 16
    layer_norm_eps: float = 1e-12

    @classmethod
    def from_json(cls, raw, where="config.json"):
        """Raises UserError for what is no ViT, and for one that we do not have."""
        if raw.get("model_type", "vit") != "vit":
            raise UserError(f"{where}: model_type {raw['model_type']!r} is no ViT (only vit)")
        self = from_json(cls, {k: v for k, v in raw.items() if k not in UNREAD}, FIXED, where)
        if (
            self.patch_size < 1
            or self.image_size % self.patch_size
            or self.hidden_size % max(self.num_attention_heads, 1)
        ):
            raise UserError(
                f"{where}: {self.image_size} pixels are no whole number of patches of {self.patch_size}, or {self.hidden_size} "
                f"channels of {self.num_attention_heads} heads"
            )
        return self

    def to_json(self):
        """The fields of config.json, as the Hub's files have them."""
        fixed = {k: v[0] for k, v in FIXED.items() if k not in ("pooler_act", "problem_type")}
        return {"architectures": ["ViTModel"], "model_type": "vit", **fixed, **vars(self)}

    @property
    def tokens(self):
        """The class token and one a patch."""
        return 1 + (self.image_size // self.patch_size) ** 2


class PatchEmbeddings(nn.Module):
    """Each square of P × P pixels through one linear layer."""

    def __init__(self, cfg):
        super().__init__()
        self.projection = nn.Conv2d(cfg.num_channels, cfg.hidden_size, cfg.patch_size, cfg.patch_size)

    def forward(self, pixels):
        return self.projection(pixels).flatten(2).mT  # [B, D, h, w] -> [B, h w, D]


class Embeddings(nn.Module):
    """The class token and the patches, with what is learned of each position."""

    def __init__(self, cfg):
        super().__init__()
        self.cls_token = nn.Parameter(torch.zeros(1, 1, cfg.hidden_size))
        self.position_embeddings = nn.Parameter(torch.randn(1, cfg.tokens, cfg.hidden_size) * 0.02)
        self.patch_embeddings = PatchEmbeddings(cfg)

    def forward(self, pixels):
        x = self.patch_embeddings(pixels)  # [B, h·w, D]
        return torch.cat([self.cls_token.to(x.dtype).expand(len(x), -1, -1), x], 1) + self.position_embeddings.to(
            x.dtype
        )


class SelfAttention(nn.Module):
    """The three projections under the name that the files have for them; Attention uses them."""

    def __init__(self, cfg):
        super().__init__()
        self.query, self.key, self.value = (nn.Linear(cfg.hidden_size, cfg.hidden_size) for _ in range(3))


class Dense(nn.Module):
    """A linear layer under the name that the files have for it."""

    def __init__(self, d_in, d_out):
        super().__init__()
        self.dense = nn.Linear(d_in, d_out)

    def forward(self, x):
        return self.dense(x)


class Attention(nn.Module):
    """Multi-head attention of all tokens to all, [B, L, D] -> [B, L, D], L = 1 + h·w."""

    def __init__(self, cfg):
        super().__init__()
        self.heads = cfg.num_attention_heads
        self.attention, self.output = SelfAttention(cfg), Dense(cfg.hidden_size, cfg.hidden_size)

    def forward(self, x):
        a = self.attention
        return self.output(attend(a.query(x), a.key(x), a.value(x), self.heads))


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg):
        super().__init__()
        self.layernorm_before, self.layernorm_after = (LayerNorm(cfg.hidden_size, cfg.layer_norm_eps) for _ in range(2))
        self.attention = Attention(cfg)
        self.intermediate = Dense(cfg.hidden_size, cfg.intermediate_size)
        self.output = Dense(cfg.intermediate_size, cfg.hidden_size)

    def forward(self, x):
        x = x + self.attention(self.layernorm_before(x))  # [B, L, D]
        return x + self.output(F.gelu(self.intermediate(self.layernorm_after(x))))


class Encoder(nn.Module):
    """The layers under the name that the files have for them."""

    def __init__(self, cfg):
        super().__init__()
        self.layer = nn.ModuleList([Layer(cfg) for _ in range(cfg.num_hidden_layers)])


class ViT(nn.Module):
    """See the module docstring."""

    Config = Config
    class_name = "ViT"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.embeddings, self.encoder = Embeddings(cfg), Encoder(cfg)
        self.layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

    def forward(self, pixels, keep=None):
        """pixels [B, 3, R, R], normalised as the model's preprocessor_config.json says. keep: a list that gets the embeddings and what
        follows each layer. Raises ValueError for another size than the model's."""
        if pixels.shape[-2:] != (self.cfg.image_size,) * 2:
            raise ValueError(
                f"pixels {list(pixels.shape)}, but the ViT sees {self.cfg.image_size}x{self.cfg.image_size}"
            )
        x = self.embeddings(pixels.to(self.embeddings.patch_embeddings.projection.weight.dtype))  # [B, 1 + h·w, D]
        for layer in self.encoder.layer:
            if keep is not None:
                keep.append(x)
            x = layer(x)  # [B, L, D]
        if keep is not None:
            keep.append(x)
        return self.layernorm(x)
