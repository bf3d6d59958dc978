"""CLIP text towers: token ids [B, S] -> hidden states [B, S, D] and a pooled vector.

A causal pre-norm transformer (Radford et al. 2021, arXiv 2103.00020 §2.4): ViT-L/14 with the quick GELU in SD 1.x,
OpenCLIP ViT-H/14 with the exact GELU in SD 2.x, bigG in SDXL. Padding is attended to: the diffusion models were
trained without an attention mask.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import LayerNorm, attend

FIXED = {
    "attention_dropout": [0.0],
    "dropout": [0.0],
    "initializer_factor": [1.0],
    "initializer_range": [0.02],
    "use_cache": [True, False],
    "torchscript": [False],
    "use_bfloat16": [False],
    "is_decoder": [False],
    "add_cross_attention": [False],
    "is_encoder_decoder": [False],
    "tie_word_embeddings": [True, False],
    "tie_encoder_decoder": [False],
    "output_attentions": [False],
    "output_hidden_states": [False],
    "return_dict": [True],
}
QUICK_GELU = 1.702
ACTIVATIONS = {
    "quick_gelu": lambda x: x * torch.sigmoid(QUICK_GELU * x),
    "gelu": F.gelu,
}


@dataclass
class Config:
    """Fields of config.json, with the defaults of the original file format."""

    vocab_size: int = 49408
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1
    with_projection: bool = False  # not in the file's fields: told by its `architectures`

    @classmethod
    def from_json(cls, raw, where="text_encoder/config.json"):
        cfg = from_json(cls, raw, FIXED, where)
        if cfg.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"{where}: hidden_act = {cfg.hidden_act!r} is not supported (only {', '.join(ACTIVATIONS)})"
            )
        cfg.with_projection = "CLIPTextModelWithProjection" in (raw.get("architectures") or ())
        return cfg

    def to_json(self):
        raw = {k: v for k, v in vars(self).items() if k != "with_projection"}
        name = "CLIPTextModelWithProjection" if self.with_projection else "CLIPTextModel"
        return raw | {"architectures": [name], "model_type": "clip_text_model"}


class SelfAttention(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        D = cfg.hidden_size
        self.heads = cfg.num_attention_heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x):
        return self.out_proj(attend(self.q_proj(x), self.k_proj(x), self.v_proj(x), self.heads, causal=True))


class MLP(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)
        self.act = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x):
        x = x + self.self_attn(self.layer_norm1(x))
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]


class Encoder(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList([Layer(cfg) for _ in range(cfg.num_hidden_layers)])


class TextTransformer(nn.Module):
    def __init__(self, cfg):
        super().__init__()
        self.embeddings = Embeddings(cfg)
        self.encoder = Encoder(cfg)
        self.final_layer_norm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)


class CLIPTextModel(nn.Module):
    """See the module docstring."""

    Config = Config

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.text_model = TextTransformer(cfg)
        if cfg.with_projection:
            self.text_projection = nn.Linear(cfg.hidden_size, cfg.projection_dim, bias=False)

    @property
    def class_name(self):
        return "CLIPTextModelWithProjection" if self.cfg.with_projection else "CLIPTextModel"

    def final_norm(self, x):
        return self.text_model.final_layer_norm(x)

    def forward(self, ids):
        """ids [B, S] -> (hidden states, pooled).

        hidden states: list of L + 1 tensors [B, S, D], the embeddings first, none through the final norm.
        pooled: the normed last state at the end token [B, D], projected when the model has a projection.
        """
        if ids.shape[1] > self.cfg.max_position_embeddings:
            raise ValueError(
                f"{ids.shape[1]} tokens, but the text encoder has {self.cfg.max_position_embeddings} positions"
            )
        states = [self.text_model.embeddings(ids)]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1]))
        # Old configs say eos_token_id 2, which no tokenizer uses; there the end token is the largest id.
        eos = self.cfg.eos_token_id
        position = ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)
        pooled = self.final_norm(states[-1])[torch.arange(len(ids), device=ids.device), position]
        return states, self.text_projection(pooled) if self.cfg.with_projection else pooled
