"""Causal language models on shared parts: LLaMA 3.2 and Gemma 3 (text): token ids [B, L] -> hidden states [B, L, D] -> logits.

Pre-norm decoder blocks: RMSNorm, attention with grouped key-value heads (Ainslie et al. 2023, arXiv 2305.13245) and rotary positions (Su et
al. 2021, arXiv 2104.09864; the two halves of a head are rotated, not neighbours), gated feed-forward (Shazeer 2020, arXiv 2002.05202).
The embedding is also the output layer, unless the config says otherwise.

| | LLaMA 3.2 (arXiv 2407.21783) | Gemma 3 (arXiv 2503.19786) |
|---|---|---|
| RMSNorm's gain | w | 1 + w |
| norms of a block | before each part | before and after each part |
| queries, keys | as they are | RMSNorm of each head |
| scale of the scores | 1/√K | 1/√query_pre_attn_scalar |
| layers | all see everything before | all but every 6th see a window (with a RoPE base of their own) |
| gate | SiLU | tanh GELU |
| embeddings | as they are | times √D, rounded to the model's type |
| RoPE | frequencies below a wavelength stretched by 32 (llama3) | base 1e6 |

LLaMA 3.2 1B: 16 layers of 61 million weights and an embedding of 263 million, 2.5 GB in bf16. A text is read in one pass,
which is bound by multiplication; each token written after it is a pass of one row, which reads every weight once and is
bound by memory. Of what was read, only keys and values are needed again (Cache): 8 groups of 64, not 32 heads, are 32 KB a
token in bf16 over all layers.

Modules carry the names of the Hugging Face checkpoints.

Explained in the book (docs/book): chapter 15.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.device import onednn
from nanodiff.models.layers import attention, linear_cross_entropy, qk_norm_rope, rms_norm, swiglu

# Fields of config.json that released models leave at these values; any other is refused: it may be another network.
FIXED = {
    "attention_bias": [False],
    "attention_dropout": [0.0],
    "attn_logit_softcapping": [None],
    "cache_implementation": ["hybrid", None],
    "final_logit_softcapping": [None],
    "hidden_act": ["silu"],
    "hidden_activation": ["gelu_pytorch_tanh"],
    "mlp_bias": [False],
    "pretraining_tp": [1],
    "use_bidirectional_attention": [False],
    "use_cache": [True, False],
}
# what a config.json stands for that does not say it, where it is not Config's own value (transformers' LlamaConfig and Gemma3TextConfig)
ABSENT = {
    "llama": {"rms_norm_eps": 1e-6, "tie_word_embeddings": False},
    "gemma3_text": {"rms_norm_eps": 1e-6, "head_dim": 256, "query_pre_attn_scalar": 256, "rope_theta": 1e6, "sliding_window": 4096,
                    "sliding_window_pattern": 6},
}  # fmt: skip
LOGITS = 256  # rows of logits of a quantized output layer that are in memory at a time
STRETCH = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")  # see frequencies()
ROPE = {"rope_type": ["llama3", "default"], "type": ["llama3", "default"]}


@dataclass
class Config:
    """Fields of config.json; of a file that leaves some out, see ABSENT. rope_scaling's are flattened."""

    model_type: str = "llama"
    vocab_size: int = 128256
    hidden_size: int = 2048
    intermediate_size: int = 8192
    num_hidden_layers: int = 16
    num_attention_heads: int = 32
    num_key_value_heads: int = 8  # each serves four heads of queries
    head_dim: int = 64  # Gemma's 256 is not hidden_size / heads
    max_position_embeddings: int = 131072
    rms_norm_eps: float = 1e-5
    rope_theta: float = 10000.0
    rope_type: str = "default"  # this and the next four: see frequencies()
    factor: float = 1.0
    low_freq_factor: float = 1.0
    high_freq_factor: float = 4.0
    original_max_position_embeddings: int = 8192  # tokens of a text in pre-training
    tie_word_embeddings: bool = True
    bos_token_id: int | None = None
    eos_token_id: tuple[int, ...] = ()
    pad_token_id: int | None = None
    query_pre_attn_scalar: float = 0.0  # 0: head_dim
    sliding_window: int = 0  # 0: none
    sliding_window_pattern: int = 0  # every n-th layer sees everything
    rope_local_base_freq: float = 10000.0

    @classmethod
    def from_json(cls, raw, where="config.json"):
        """Raises UserError for what is neither LLaMA 3 nor Gemma 3, by name."""
        raw = dict(raw)
        kind = raw.get("model_type")
        if kind == "gemma3" and isinstance(raw.get("text_config"), dict):
            raise UserError(f"{where}: is Gemma 3 with a vision tower; only the text models (1B) are supported")
        if kind not in ("llama", "gemma3_text"):
            raise UserError(f"{where}: model_type {kind!r} is not supported (only llama and gemma3_text)")
        raw.pop("initializer_range", None)  # of a training from scratch
        for name in ("num_key_value_heads", "head_dim"):
            if raw.get(name, 0) is None:  # as if it were not there
                del raw[name]
        scaling = raw.pop("rope_scaling", None) or raw.pop("rope_parameters", None) or {}
        if isinstance(scaling, dict) and isinstance(scaling.get("full_attention"), dict):
            # one for each kind of layer, as transformers 5 writes it
            local, scaling = scaling.get("sliding_attention") or {}, scaling["full_attention"]
            if not isinstance(local, dict) or local.get("rope_type", "default") != "default":
                raise UserError(
                    f"{where}: rope_parameters of sliding_attention are of no type that is supported (only default)"
                )
            if "rope_theta" in local:
                raw["rope_local_base_freq"] = local["rope_theta"]
        if not isinstance(scaling, dict):
            raise UserError(f"{where}: rope_scaling is no object")
        name = scaling.get("rope_type", scaling.get("type", "default"))
        if name not in ("llama3", "default"):
            raise UserError(f"{where}: rope_scaling of type {name!r} is not supported (only llama3)")
        if name == "llama3" and (lacking := [k for k in STRETCH if k not in scaling]):
            raise UserError(f"{where}: rope_scaling of type 'llama3' lacks {' and '.join(lacking)}")
        raw |= {k: v for k, v in scaling.items() if k != "type"} | {"rope_type": name}
        end = raw.get("eos_token_id")
        raw["eos_token_id"] = [] if end is None else end if isinstance(end, list) else [end]
        types = raw.pop("layer_types", None)
        if types is not None:
            full = [i + 1 for i, t in enumerate(types) if t == "full_attention"]
            raw.setdefault("sliding_window_pattern", full[0] if full else len(types) + 1)
        heads = raw.get("num_attention_heads")
        if kind == "llama" and isinstance(heads, int) and heads > 0:
            raw.setdefault("num_key_value_heads", heads)
            if isinstance(raw.get("hidden_size"), int):
                raw.setdefault("head_dim", raw["hidden_size"] // heads)
        raw = ABSENT[kind] | raw
        if raw.get("sliding_window") is None:
            raw.pop("sliding_window", None)
        self = from_json(cls, {k: v for k, v in raw.items() if k != "model_type"}, FIXED, where)
        self.model_type = kind
        if self.num_key_value_heads < 1 or self.num_attention_heads % self.num_key_value_heads or self.head_dim % 2:
            raise UserError(
                f"{where}: {self.num_attention_heads} heads of {self.head_dim} do not share {self.num_key_value_heads} keys"
            )
        if types is not None and [self.window(i) == 0 for i in range(len(types))] != [
            t == "full_attention" for t in types
        ]:
            raise UserError(f"{where}: layer_types is no pattern of every {self.sliding_window_pattern}th layer")
        return self

    def to_json(self):
        """The fields of config.json, as the Hub's files have them."""
        scaling = ("rope_type", *STRETCH)
        local = ("query_pre_attn_scalar", "sliding_window", "sliding_window_pattern", "rope_local_base_freq")
        raw = {k: v for k, v in vars(self).items() if k not in scaling and (self.gemma or k not in local)}
        raw["eos_token_id"] = list(self.eos_token_id)
        raw["architectures"] = ["Gemma3ForCausalLM" if self.gemma else "LlamaForCausalLM"]
        raw |= {"hidden_activation": "gelu_pytorch_tanh"} if self.gemma else {"hidden_act": "silu"}
        if self.rope_type == "llama3":
            raw["rope_scaling"] = {k: getattr(self, k) for k in scaling}
        return raw

    @property
    def gemma(self):
        """Which column of the table above."""
        return self.model_type == "gemma3_text"

    def window(self, layer):
        """How many tokens a layer sees, itself included; 0: all."""
        local = self.sliding_window and self.sliding_window_pattern and (layer + 1) % self.sliding_window_pattern
        return self.sliding_window if local else 0


def frequencies(cfg, local=False):
    """[K/2] angles per position, fp32: base^(-2i/K); of llama3, those with a wavelength beyond original_max_position_embeddings /
    low_freq_factor are divided by `factor`, and between that and / high_freq_factor blended (LLaMA 3's own code)."""
    base = cfg.rope_local_base_freq if local else cfg.rope_theta
    turn = 1.0 / base ** (torch.arange(0, cfg.head_dim, 2, dtype=torch.float32) / cfg.head_dim)
    if cfg.rope_type != "llama3" or local:
        return turn
    length = cfg.original_max_position_embeddings * turn / (2 * math.pi)  # turns within the length of pre-training
    smooth = ((length - cfg.low_freq_factor) / (cfg.high_freq_factor - cfg.low_freq_factor)).clamp(0, 1)
    return (1 - smooth) * turn / cfg.factor + smooth * turn


class RMSNorm(nn.Module):
    """Root-mean-square norm (Zhang & Sennrich 2019, arXiv 1910.07467); plus_one: Gemma's gain 1 + w. Computed in fp32."""

    def __init__(self, dim, eps, plus_one):
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(dim) if plus_one else torch.ones(dim))
        self.eps, self.plus_one = eps, plus_one

    def forward(self, x):
        return rms_norm(x, self.weight, self.eps, self.plus_one)


class KeyValues:
    """Keys and values [B, S, M, K] of one layer that are kept while a text grows. window: only the last so many are; 0: all.

    The buffers are allocated once: `limit` positions, or for a window twice its size, of which the younger half moves to the front when
    they are full."""

    def __init__(self, window, limit):
        self.window = window
        self.size = min(limit, 2 * window) if window else limit
        self.k = self.v = None
        self.used = 0

    def add(self, k, v):
        """(keys, values) that the new tokens may look at, oldest first, the new ones last."""
        B, L, M, K = k.shape
        if self.k is None:
            self.k, self.v = (torch.empty(B, self.size, M, K, dtype=k.dtype, device=k.device) for _ in range(2))
        if self.used + L <= self.size:
            for buffer, new in ((self.k, k), (self.v, v)):
                buffer[:, self.used : self.used + L] = new
            self.used += L
            first = max(0, self.used - L - self.window + 1) if self.window else 0
            return self.k[:, first : self.used], self.v[:, first : self.used]
        if not self.window:
            raise UserError(f"the text is longer than the {self.size} tokens that were made room for")
        # what is kept of a window: all that a next token can see; the rest is gone
        seen = [
            torch.cat([buffer[:, max(0, self.used - self.window + 1) : self.used], new], 1)
            for buffer, new in ((self.k, k), (self.v, v))
        ]
        left = [x[:, -min(self.window - 1, self.size) :] if self.window > 1 else x[:, :0] for x in seen]
        for buffer, x in zip((self.k, self.v), left, strict=True):
            buffer[:, : x.shape[1]] = x
        self.used = left[0].shape[1]
        return seen


class Cache:
    """What a model has read so far. limit: tokens that there is room for; mask: bool [B, S] of the tokens that are no padding."""

    def __init__(self, cfg, limit):
        self.layers = [KeyValues(cfg.window(i), limit) for i in range(cfg.num_hidden_layers)]
        self.mask, self.length, self.limit = None, 0, limit

    def read(self, B, L, mask, device):
        """Take in the mask of L new tokens; returns the mask of all, or None without padding, and the new tokens' positions [1 or B, L]."""
        if mask is None and self.mask is None:
            positions = torch.arange(self.length, self.length + L, device=device)[None]
        else:
            new = torch.ones(B, L, dtype=torch.bool, device=device) if mask is None else mask.bool()
            old = torch.ones(B, self.length, dtype=torch.bool, device=device) if self.mask is None else self.mask
            self.mask = torch.cat([old, new], 1)
            positions = (self.mask.cumsum(1) - 1).clamp(min=0)[:, -L:]  # of the real tokens
        self.length += L
        return self.mask, positions

    def select(self, rows):
        """Go on with these rows of the batch, some perhaps more than once."""
        for layer in self.layers:
            if layer.k is not None:
                layer.k, layer.v = layer.k[rows], layer.v[rows]
        self.mask = self.mask if self.mask is None else self.mask[rows]


class Attention(nn.Module):
    """Causal attention in which several heads of queries share a head of keys and values: [B, L, D] -> [B, L, D]."""

    def __init__(self, cfg, layer):
        super().__init__()
        self.heads, self.groups, self.size = cfg.num_attention_heads, cfg.num_key_value_heads, cfg.head_dim
        self.q_proj = nn.Linear(cfg.hidden_size, self.heads * self.size, bias=False)
        self.k_proj, self.v_proj = (nn.Linear(cfg.hidden_size, self.groups * self.size, bias=False) for _ in range(2))
        self.o_proj = nn.Linear(self.heads * self.size, cfg.hidden_size, bias=False)
        self.window, self.eps = cfg.window(layer), cfg.rms_norm_eps
        self.scale = (cfg.query_pre_attn_scalar or self.size) ** -0.5
        if cfg.gemma:
            self.q_norm, self.k_norm = (RMSNorm(self.size, cfg.rms_norm_eps, True) for _ in range(2))

    def forward(self, x, angles, mask, kept):
        """x [B, L, D]; angles: (cos, sin) [1 or B, L, K/2]; mask: bool [B, S] of tokens that are no padding, or None; kept: KeyValues or None."""
        B, L, _ = x.shape  # x [B, L, D]
        q, k, v = (
            p(x).view(B, L, n, self.size)
            for p, n in ((self.q_proj, self.heads), (self.k_proj, self.groups), (self.v_proj, self.groups))
        )
        q, k = (self.q_norm(q), self.k_norm(k)) if hasattr(self, "q_norm") else (q, k)
        q, k = (qk_norm_rope(t, None, *angles) for t in (q, k))
        if kept is not None:
            k, v = kept.add(k, v)
        S = k.shape[1]  # k v [B, S, groups, K], S with what the cache holds
        bias = hidden(L, S, self.window, mask[:, -S:], x.dtype) if mask is not None and L > 1 else None
        seen = mask[:, -S:] if mask is not None and bias is None else None
        out = attention(
            q,
            k,
            v,
            causal=bias is None,
            scale=self.scale,
            bias=bias,
            key_mask=seen,
            window=self.window if bias is None else 0,
        )
        return self.o_proj(out.reshape(B, L, -1))  # [B, L, N·K] -> [B, L, D]


def hidden(L, S, window, mask, dtype):
    """[B, 1, L, S] of 0 and -inf for a text with padding on the left, where padding sees itself: a query that saw nothing would give NaN,
    and NaN times a weight of 0 is NaN for all."""
    # key j lies so far back
    back = torch.arange(L, device=mask.device)[:, None] + (S - L) - torch.arange(S, device=mask.device)
    seen = (back >= 0) & (back < window) if window else back >= 0
    seen = (seen & mask[:, None]) | (back == 0)
    return torch.zeros(seen.shape, dtype=dtype, device=mask.device).masked_fill(~seen, -torch.inf)[:, None]


class MLP(nn.Module):
    """down(act(gate x) · up x): [B, L, D] -> [B, L, D]. Three matrices, 3.5 to 6 D wide between."""

    def __init__(self, cfg):
        super().__init__()
        self.gate_proj, self.up_proj = (nn.Linear(cfg.hidden_size, cfg.intermediate_size, bias=False) for _ in range(2))
        self.down_proj = nn.Linear(cfg.intermediate_size, cfg.hidden_size, bias=False)
        self.activation = "gelu_tanh" if cfg.gemma else "silu"

    def forward(self, x):
        return self.down_proj(swiglu(self.gate_proj(x), self.up_proj(x), self.activation))  # [B, L, D_ff] -> [B, L, D]


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x); Gemma norms what is added, too."""

    def __init__(self, cfg, layer):
        super().__init__()
        norm = lambda: RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.gemma)  # noqa: E731
        self.self_attn, self.mlp = Attention(cfg, layer), MLP(cfg)
        self.input_layernorm, self.post_attention_layernorm = norm(), norm()
        self.gemma = cfg.gemma
        if cfg.gemma:
            self.pre_feedforward_layernorm, self.post_feedforward_layernorm = norm(), norm()

    def forward(self, x, angles, mask=None, kept=None):
        """x [B, L, D] -> [B, L, D]; the others as in Attention.forward()."""
        h = self.self_attn(self.input_layernorm(x), angles, mask, kept)
        if not self.gemma:
            x = x + h
            return x + self.mlp(self.post_attention_layernorm(x))
        x = x + self.post_attention_layernorm(h)
        return x + self.post_feedforward_layernorm(self.mlp(self.pre_feedforward_layernorm(x)))


class Decoder(nn.Module):
    """Embedding, layers and final norm under the names that the files have for them."""

    def __init__(self, cfg):
        super().__init__()
        self.embed_tokens = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.layers = nn.ModuleList([Layer(cfg, i) for i in range(cfg.num_hidden_layers)])
        self.norm = RMSNorm(cfg.hidden_size, cfg.rms_norm_eps, cfg.gemma)


class CausalLM(nn.Module):
    """See the module docstring."""

    Config = Config
    class_name = "CausalLM"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.model = Decoder(cfg)
        if not cfg.tie_word_embeddings:
            self.lm_head = nn.Linear(cfg.hidden_size, cfg.vocab_size, bias=False)

    def embed(self, ids):
        """ids [B, L] -> [B, L, D]."""
        x = self.model.embed_tokens(ids)
        return x * torch.tensor(self.cfg.hidden_size**0.5, dtype=x.dtype, device=x.device) if self.cfg.gemma else x

    def forward(self, ids=None, mask=None, cache=None, embeds=None, keep=None):
        """Hidden states [B, L, D] through the final norm.

        ids [B, L], or embeds [B, L, D] in their place (which are not scaled). mask: bool [B, L], false for padding, which stands on the
        left. cache: a Cache, which the new tokens go on from. keep: a list that gets the embeddings and what follows each layer.
        Raises UserError for a text longer than the model's positions.
        """
        cfg = self.cfg
        x = self.embed(ids) if embeds is None else embeds  # [B, L, D]
        B, L, _ = x.shape
        book = cache or Cache(cfg, L)
        mask, positions = book.read(B, L, mask, x.device)
        if book.length > cfg.max_position_embeddings:
            raise UserError(
                f"{book.length} tokens are more than the {cfg.max_position_embeddings} that the model reads"
            )
        angles = {}  # cos and sin [1 or B, L, K/2], once for all layers, or for those with a window and those without
        for local in {bool(cfg.window(i)) for i in range(cfg.num_hidden_layers)}:
            turned = positions[..., None].float() * frequencies(cfg, local).to(x.device)
            angles[local] = turned.cos(), turned.sin()
        for i, layer in enumerate(self.model.layers):
            if keep is not None:
                keep.append(x)
            # [B, L, D]
            x = layer(x, angles[bool(cfg.window(i))], mask, cache.layers[i] if cache else None)
        x = self.model.norm(x)
        if keep is not None:
            keep.append(x)
        return x

    @property
    def output(self):
        """[V, D]: the last layer's weight."""
        return self.model.embed_tokens.weight if self.cfg.tie_word_embeddings else self.lm_head.weight

    def logits(self, states):
        """[..., D] -> [..., V]."""
        return self.head(states) if hasattr(self, "head") else onednn.linear(states, self.output)

    def loss(self, states, labels):
        """Mean cross-entropy of each token's successor, without storing the logits: states [B, L, D], labels [B, L], -100 does not count."""
        shifted = labels[:, 1:].reshape(-1)
        return self.cross_entropy(states[:, :-1].reshape(-1, states.shape[-1]), shifted)

    def cross_entropy(self, states, ids, reduction="mean"):
        """Of the output layer, which may be quantized: states [N, D], ids [N], of which -100 is none -> a number, in nats."""
        if not hasattr(self, "head"):
            return linear_cross_entropy(states, self.output, ids, reduction=reduction)
        parts = zip(states.split(LOGITS), ids.split(LOGITS), strict=True)
        total = sum(F.cross_entropy(self.head(x).float(), y, reduction="sum") for x, y in parts)
        return total if reduction == "sum" else total / (ids != -100).sum()
