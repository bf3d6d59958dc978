"""T5EncoderModel: token ids [B, S] -> hidden states [B, S, D]; the third text encoder of SD 3 (T5 v1.1 XXL, 4.8 B).

A pre-norm encoder without biases: RMS norms, attention without the 1/√K scale but with a learned bias by relative
distance, gated-GELU feed-forward (Raffel et al. 2020, arXiv 1910.10683 §2.1; Shazeer 2020, arXiv 2002.05202). SD 3
gives no attention mask: padding is attended to.

XXL: 24 blocks, D = 4096, 64 heads of 64, 9.5 GB in bf16, twice the denoiser of SD 3.5 medium (4.9 GB); a run without
it draws too, with zeros in its place, and loses written words above all (Esser et al. 2024, arXiv 2403.03206).
Three habits of T5 differ from all other models here. Positions: no vectors are added; each head adds to its scores a
number that depends on the distance, so a text may be longer than those of training. Scale: 1/√K is in the initial weights
of q instead of the scores. Residuals grow to many thousands, so they are summed in fp32, and in fp16 the product that is
added to them is, too.

Explained in the book (docs/book): chapter 9.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import attend, swiglu

# Fields of config.json that released models leave at these values; any other is refused: it may be another network.
FIXED = {
    "classifier_dropout": [0.0],
    "decoder_start_token_id": [0],
    "dense_act_fn": ["gelu_new"],
    "dropout_rate": [0.0, 0.1],  # training only
    "feed_forward_proj": ["gated-gelu"],
    "initializer_factor": [1.0],
    "is_encoder_decoder": [True, False],
    "is_decoder": [False],
    "is_gated_act": [True],
    "num_decoder_layers": [None, *range(1000)],
    "output_past": [True, False],
    "tie_word_embeddings": [True, False],
    "use_cache": [True, False],
    "n_positions": [512],
    "task_specific_params": [None],
    "scale_decoder_outputs": [True, False],
}


@dataclass
class Config:
    """Fields of config.json, with the defaults of the original file format."""

    vocab_size: int = 32128  # 32,000 pieces of SentencePiece, 100 sentinels, up to a multiple of 128
    d_model: int = 512
    d_kv: int = 64  # K, a head's size; heads times this need not be d_model
    d_ff: int = 2048
    num_layers: int = 6
    num_heads: int = 8
    relative_attention_num_buckets: int = 32  # see buckets()
    relative_attention_max_distance: int = 128  # all that is farther is in the last bucket of its direction
    layer_norm_epsilon: float = 1e-6
    pad_token_id: int = 0
    eos_token_id: int = 1

    @classmethod
    def from_json(cls, raw, where="text_encoder_3/config.json"):
        """Raises UserError, naming `where` and the field, for another network."""
        cfg = from_json(cls, raw, FIXED, where)
        exact = cfg.relative_attention_num_buckets // 4
        if exact < 1 or cfg.relative_attention_max_distance <= exact:
            raise UserError(f"{where}: relative_attention_max_distance {cfg.relative_attention_max_distance} with "
                            f"{cfg.relative_attention_num_buckets} buckets, of which {exact} are for exact distances")  # fmt: skip
        return cfg

    def to_json(self):
        facts = {"architectures": ["T5EncoderModel"], "model_type": "t5", "feed_forward_proj": "gated-gelu"}
        return dict(vars(self)) | facts | {"is_gated_act": True, "dense_act_fn": "gelu_new", "is_encoder_decoder": True}


def buckets(length, n, far, device=None):
    """[length, length] bucket of the distance key - query: half for each direction, the first half of those exact, the
    rest logarithmic up to `far` (§2.1)."""
    position = torch.arange(length, device=device)
    distance = position[None, :] - position[:, None]
    n = n // 2  # 16 for keys before the query and the query itself, 16 for those behind it
    exact = n // 2  # distances 0 … 7 have a bucket each; all from 8 on share the other eight
    size = distance.abs()
    log = exact + (torch.log(size.clamp(min=1).float() / exact) / math.log(far / exact) * (n - exact)).long()
    return (distance > 0).long() * n + torch.where(size < exact, size, log.clamp(max=n - 1))


class SelfAttention(nn.Module):
    """softmax(q kᵀ + bias) v: [B, S, D] -> [B, S, D], every word seeing every other."""

    def __init__(self, cfg, with_bias):
        super().__init__()
        self.heads, inner = cfg.num_heads, cfg.num_heads * cfg.d_kv
        self.q, self.k, self.v = (nn.Linear(cfg.d_model, inner, bias=False) for _ in range(3))
        self.o = nn.Linear(inner, cfg.d_model, bias=False)
        if with_bias:  # the first block's serves all
            self.relative_attention_bias = nn.Embedding(cfg.relative_attention_num_buckets, cfg.num_heads)

    def bias(self, where):
        """The table's values for buckets(): [1, N, S, S]."""
        return self.relative_attention_bias(where).permute(2, 0, 1)[None]

    def forward(self, x, bias):
        return self.o(attend(self.q(x), self.k(x), self.v(x), self.heads, bias=bias, scale=1.0))


class WideLinear(nn.Linear):
    """A linear layer without bias that computes in the type of its input, [B, S, D_in] -> [B, S, D_out]: its weight may be of
    fewer bits."""

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype))


class DenseReluDense(nn.Module):
    """wo(gelu(wi_0 x) · wi_1 x). XXL's result exceeds fp16's 65504, so in fp16 the last product is taken in fp32."""

    def __init__(self, cfg):
        super().__init__()
        self.wi_0, self.wi_1 = (nn.Linear(cfg.d_model, cfg.d_ff, bias=False) for _ in range(2))
        self.wo = WideLinear(cfg.d_ff, cfg.d_model, bias=False)

    def forward(self, x):
        h = swiglu(self.wi_0(x), self.wi_1(x), "gelu_tanh")  # [B, S, D_ff]
        return self.wo(h.float() if h.dtype == torch.float16 else h)


class Sublayer(nn.Module):
    """x + f(norm(x)); `name` is what the checkpoint calls f. The sum is kept in fp32 whatever the weights' type."""

    def __init__(self, cfg, name, f):
        super().__init__()
        self.name = name
        setattr(self, name, f)
        self.layer_norm = nn.RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)

    def forward(self, x, *more):
        h = F.rms_norm(x, x.shape[-1:], eps=self.layer_norm.eps).to(self.layer_norm.weight.dtype)
        return x + getattr(self, self.name)(h * self.layer_norm.weight, *more)


class Block(nn.Module):
    """Attention and feed-forward, each a residual with its norm."""

    def __init__(self, cfg, first):
        super().__init__()
        self.layer = nn.ModuleList(
            [
                Sublayer(cfg, "SelfAttention", SelfAttention(cfg, with_bias=first)),
                Sublayer(cfg, "DenseReluDense", DenseReluDense(cfg)),
            ]
        )

    def forward(self, x, where, bias=None):
        """x [B, S, D] -> (x, bias): the first block looks its bias up, the others are given it."""
        bias = self.layer[0].SelfAttention.bias(where) if bias is None else bias
        return self.layer[1](self.layer[0](x, bias)), bias


class Encoder(nn.Module):
    """The blocks and the final norm under the names that the files have for them."""

    def __init__(self, cfg):
        super().__init__()
        self.block = nn.ModuleList([Block(cfg, first=i == 0) for i in range(cfg.num_layers)])
        self.final_layer_norm = nn.RMSNorm(cfg.d_model, cfg.layer_norm_epsilon)


class T5EncoderModel(nn.Module):
    """See the module docstring."""

    Config = Config
    class_name = "T5EncoderModel"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.shared = nn.Embedding(cfg.vocab_size, cfg.d_model)
        self.encoder = Encoder(cfg)

    def forward(self, ids):
        """ids [B, S] -> [B, S, D], through the final norm."""
        cfg, dtype = self.cfg, self.shared.weight.dtype
        where = buckets(
            ids.shape[1], cfg.relative_attention_num_buckets, cfg.relative_attention_max_distance, ids.device
        )
        x, bias = self.shared(ids).float(), None  # [B, S, D]
        for block in self.encoder.block:
            x, bias = block(x, where, bias)  # [B, S, D] in fp32, [1, N, S, S]
        norm = self.encoder.final_layer_norm
        return F.rms_norm(x, x.shape[-1:], norm.weight.float(), norm.eps).to(dtype)
