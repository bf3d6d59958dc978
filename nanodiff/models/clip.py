"""CLIP (Radford et al. 2021, arXiv 2103.00020 §2.4): two pre-norm transformers.

Text: token ids [B, S] -> hidden states [B, S, D] and a pooled vector; causal. ViT-L/14 with the quick GELU in SD 1.x, OpenCLIP
ViT-H/14 with the exact GELU in SD 2.x, bigG in SDXL. Padding is attended to: the diffusion models were trained without an
attention mask. A config.json that says `use_attention_mask`, as diffusers reads it, is that of a model trained with one.
Vision: pixels [B, 3, R, R] -> one token a patch and a class token, whose state stands for the picture. `CLIPModel` is both,
projected into the space where a picture and its caption are near each other (B/32, B/16, L/14).

| text encoder of | layers | D | weights | what the denoiser is given |
|---|---|---|---|---|
| SD 1.x: ViT-L/14 | 12 | 768 | 123 M | last state, normed |
| SD 2.x: OpenCLIP ViT-H/14 | 23 of 24 | 1024 | 340 M | last state, normed: the 24th layer is not in the files |
| SDXL and SD 3: ViT-L/14 and bigG | 12, 32 | 768, 1280 | 123 M, 695 M | last state but one of both side by side, bigG's pooled vector (SD 3: both's) |

Why the last state but one (`clip_skip`): the contrastive loss looks at the end token alone, so the last layer has nothing
to keep of the other words; SDXL (Podell et al. 2023, arXiv 2307.01952 §2.1) is trained on the states before it.

Explained in the book (docs/book): chapter 9.
"""

import re
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, from_json
from nanodiff.models.layers import LayerNorm, attend

# Fields of config.json that released models leave at these values; any other is refused: it may be another network.
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
QUICK_GELU = 1.702  # x·σ(1.702 x) is within 0.021 of the exact GELU; weights are of use with the one they were trained with alone


def _quick_gelu(x):  # by name, so that a model can be pickled
    return x * torch.sigmoid(QUICK_GELU * x)


ACTIVATIONS = {"quick_gelu": _quick_gelu, "gelu": F.gelu}


@dataclass
class Config:
    """Fields of config.json, with the defaults of the original file format."""

    vocab_size: int = 49408  # 256 bytes, 256 bytes that end a word, 48,894 merges, start and end
    hidden_size: int = 512
    intermediate_size: int = 2048
    projection_dim: int = 512  # of the pooled vector
    num_hidden_layers: int = 12
    num_attention_heads: int = 8
    max_position_embeddings: int = 77  # start, 75 tokens, end
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5
    bos_token_id: int | None = 49406
    eos_token_id: int | None = 49407
    pad_token_id: int | None = 1
    use_attention_mask: bool = False  # diffusers' field: no token attends to the padding behind the end token
    with_projection: bool = False  # not in the file's fields: told by its `architectures`

    @classmethod
    def from_json(cls, raw, where="text_encoder/config.json"):
        """Raises UserError, naming `where` and the field, for another network."""
        cfg = from_json(cls, raw, FIXED, where)
        if cfg.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"{where}: hidden_act = {cfg.hidden_act!r} is not supported (only {', '.join(ACTIVATIONS)})"
            )
        if cfg.hidden_size % max(cfg.num_attention_heads, 1):
            raise UserError(
                f"{where}: hidden_size {cfg.hidden_size} cannot be divided among {cfg.num_attention_heads} heads (num_attention_heads)"
            )
        cfg.with_projection = "CLIPTextModelWithProjection" in (raw.get("architectures") or ())
        return cfg

    def to_json(self):
        raw = {k: v for k, v in vars(self).items() if k != "with_projection"}
        if not self.use_attention_mask:
            del raw["use_attention_mask"]
        name = "CLIPTextModelWithProjection" if self.with_projection else "CLIPTextModel"
        return raw | {"architectures": [name], "model_type": "clip_text_model"}


@dataclass
class VisionConfig:
    """Fields of `vision_config`, with the defaults of the file format."""

    hidden_size: int = 768
    intermediate_size: int = 3072
    projection_dim: int = 512
    num_hidden_layers: int = 12
    num_attention_heads: int = 12
    num_channels: int = 3
    image_size: int = 224
    patch_size: int = 32
    hidden_act: str = "quick_gelu"
    layer_norm_eps: float = 1e-5

    @classmethod
    def from_json(cls, raw, where="image_encoder/config.json"):
        """Raises UserError, naming `where` and the field, for another network."""
        cfg = from_json(cls, _without_generation(raw), FIXED, where)
        if cfg.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"{where}: hidden_act = {cfg.hidden_act!r} is not supported (only {', '.join(ACTIVATIONS)})"
            )
        if cfg.image_size % max(cfg.patch_size, 1) or cfg.hidden_size % max(cfg.num_attention_heads, 1):
            raise UserError(f"{where}: patch_size does not divide image_size, or num_attention_heads hidden_size")
        return cfg

    def to_json(self):
        return vars(self) | {"architectures": ["CLIPVisionModelWithProjection"], "model_type": "clip_vision_model"}


@dataclass
class BothConfig:
    """config.json of a whole CLIP: its two towers and the width of their common space."""

    text: Config
    vision: VisionConfig
    projection_dim: int = 512

    @classmethod
    def from_json(cls, raw, where="config.json"):
        if not isinstance(raw.get("text_config"), dict) or not isinstance(raw.get("vision_config"), dict):
            raise UserError(f"{where}: has no text_config and vision_config, so it is not a whole CLIP")
        text = from_json(Config, _without_generation(raw["text_config"]), FIXED, f"{where}: text_config")
        vision = VisionConfig.from_json(raw["vision_config"], f"{where}: vision_config")
        if text.hidden_act not in ACTIVATIONS:
            raise UserError(
                f"{where}: hidden_act = {text.hidden_act!r} is not supported (only {', '.join(ACTIVATIONS)})"
            )
        return cls(text, vision, int(raw.get("projection_dim", 512)))

    @property
    def num_hidden_layers(self):
        return max(self.text.num_hidden_layers, self.vision.num_hidden_layers)


# What old files carry from a class that could also generate text; it has no meaning for CLIP.
_GENERATION = re.compile(
    r"max_length|min_length|do_sample|early_stopping|num_beams|num_beam_groups|diversity_penalty|temperature|top_[kp]|typical_p|"
    r"repetition_penalty|length_penalty|no_repeat_ngram_size|encoder_no_repeat_ngram_size|bad_words_ids|num_return_sequences|"
    r"chunk_size_feed_forward|output_scores|return_dict_in_generate|forced_[be]os_token_id|remove_invalid_values|"
    r"exponential_decay_length_penalty|suppress_tokens|begin_suppress_tokens|finetuning_task|id2label|label2id|"
    r"tokenizer_class|prefix|sep_token_id|decoder_start_token_id|task_specific_params|problem_type|pruned_heads|"
    r"cross_attention_hidden_size|tf_legacy_loss"
)


def _without_generation(raw):
    return {k: v for k, v in raw.items() if not _GENERATION.fullmatch(k)}


class SelfAttention(nn.Module):
    """Multi-head attention [B, S, D] -> [B, S, D]: causal in the text tower, so that a language model could have been its beginning (§2.4),
    of all patches to all in the vision tower."""

    def __init__(self, cfg):
        super().__init__()
        D = cfg.hidden_size
        self.heads, self.causal = cfg.num_attention_heads, isinstance(cfg, Config)
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(D, D) for _ in range(4))

    def forward(self, x, seen=None):
        """seen: [B, S], true where a key may be seen; None: all."""
        q, k, v = self.q_proj(x), self.k_proj(x), self.v_proj(x)  # [B, S, D] each
        return self.out_proj(attend(q, k, v, self.heads, causal=self.causal, key_mask=seen))


class MLP(nn.Module):
    """Two layers at each place by itself, wider between: [B, S, D] -> [B, S, D]."""

    def __init__(self, cfg):
        super().__init__()
        self.fc1 = nn.Linear(cfg.hidden_size, cfg.intermediate_size)
        self.fc2 = nn.Linear(cfg.intermediate_size, cfg.hidden_size)
        self.act = ACTIVATIONS[cfg.hidden_act]

    def forward(self, x):
        return self.fc2(self.act(self.fc1(x)))


class Layer(nn.Module):
    """x + attention(norm x), then x + mlp(norm x)."""

    def __init__(self, cfg):
        super().__init__()
        self.layer_norm1 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.self_attn = SelfAttention(cfg)
        self.layer_norm2 = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)
        self.mlp = MLP(cfg)

    def forward(self, x, seen=None):
        x = x + self.self_attn(self.layer_norm1(x), seen)  # [B, S, D]
        return x + self.mlp(self.layer_norm2(x))


class Embeddings(nn.Module):
    """A learned vector for each token, and one for each position."""

    def __init__(self, cfg):
        super().__init__()
        self.token_embedding = nn.Embedding(cfg.vocab_size, cfg.hidden_size)
        self.position_embedding = nn.Embedding(cfg.max_position_embeddings, cfg.hidden_size)

    def forward(self, ids):
        return self.token_embedding(ids) + self.position_embedding.weight[: ids.shape[1]]  # [B, S] -> [B, S, D]


class Encoder(nn.Module):
    """The layers under the name that the files have for them; the towers call them one by one, to keep their states."""

    def __init__(self, cfg):
        super().__init__()
        self.layers = nn.ModuleList([Layer(cfg) for _ in range(cfg.num_hidden_layers)])


class TextTransformer(nn.Module):
    """The text tower's parts; CLIPTextModel and CLIPModel run it."""

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
        """A state [B, S, D] through the tower's last norm: the last one always, an earlier one where a model asks for it."""
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
        states = [self.text_model.embeddings(ids)]  # [B, S, D]
        position = end_position(ids, self.cfg.eos_token_id)
        seen = None  # [B, S]: every token, or those up to the end token
        if self.cfg.use_attention_mask:
            seen = torch.arange(ids.shape[1], device=ids.device) <= position[:, None]
        for layer in self.text_model.encoder.layers:
            states.append(layer(states[-1], seen))
        pooled = self.final_norm(states[-1])[torch.arange(len(ids), device=ids.device), position]  # [B, D]
        return states, self.text_projection(pooled) if self.cfg.with_projection else pooled


class VisionEmbeddings(nn.Module):
    """Patches by a convolution whose stride is its size, a class token before them, a learned vector for each position."""

    def __init__(self, cfg):
        super().__init__()
        self.class_embedding = nn.Parameter(torch.zeros(cfg.hidden_size))
        self.patch_embedding = nn.Conv2d(cfg.num_channels, cfg.hidden_size, cfg.patch_size, cfg.patch_size, bias=False)
        self.position_embedding = nn.Embedding((cfg.image_size // cfg.patch_size) ** 2 + 1, cfg.hidden_size)

    def forward(self, pixels):
        patches = self.patch_embedding(pixels).flatten(2).mT  # B D H W -> B S D
        first = self.class_embedding.expand(len(pixels), 1, -1)
        return torch.cat([first, patches], 1) + self.position_embedding.weight  # [B, 1 + h·w, D]


class VisionTransformer(nn.Module):
    """pixels [B, 3, R, R], normalised -> (last hidden states [B, 1 + patches, D], normed class token [B, D])."""

    def __init__(self, cfg):
        super().__init__()
        self.embeddings = VisionEmbeddings(cfg)
        self.pre_layrnorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)  # the name in the files
        self.encoder = Encoder(cfg)
        self.post_layernorm = LayerNorm(cfg.hidden_size, cfg.layer_norm_eps)

    def states(self, pixels, without=0):
        """The hidden states [B, 1 + patches, D], the last `without` layers left out."""
        x = self.pre_layrnorm(self.embeddings(pixels))  # [B, 1 + h·w, D]
        for layer in self.encoder.layers[: len(self.encoder.layers) - without]:
            x = layer(x)
        return x

    def forward(self, pixels):
        x = self.states(pixels)
        return x, self.post_layernorm(x[:, 0])  # [B, 1 + h·w, D], [B, D]


class CLIPVisionModel(nn.Module):
    """The vision tower alone, with its projection (transformers' CLIPVisionModelWithProjection): pixels [B, 3, R, R] as images.clip_pixels() gives
    them -> a vector [B, P]."""

    Config = VisionConfig
    class_name = "CLIPVisionModelWithProjection"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.vision_model = VisionTransformer(cfg)
        self.visual_projection = nn.Linear(cfg.hidden_size, cfg.projection_dim, bias=False)

    @property
    def device(self):
        return self.visual_projection.weight.device

    @property
    def dtype(self):
        return self.visual_projection.weight.dtype

    def states(self, pixels):
        """The hidden states before the last layer [B, 1 + patches, D]."""
        return self.vision_model.states(pixels, 1)

    def forward(self, pixels):
        return self.visual_projection(self.vision_model(pixels)[1])


class CLIPModel(nn.Module):
    """Both towers. `image` and `text` give unit vectors [B, P], whose products are cosines."""

    Config = BothConfig
    class_name = "CLIPModel"

    def __init__(self, cfg):
        super().__init__()
        self.cfg = cfg
        self.text_model, self.vision_model = TextTransformer(cfg.text), VisionTransformer(cfg.vision)
        self.text_projection = nn.Linear(cfg.text.hidden_size, cfg.projection_dim, bias=False)
        self.visual_projection = nn.Linear(cfg.vision.hidden_size, cfg.projection_dim, bias=False)
        self.logit_scale = nn.Parameter(torch.tensor(2.6592))  # log of the inverse temperature, 1 / 0.07 at the start

    def image(self, pixels):
        """pixels [B, 3, R, R] -> unit vectors [B, P], fp32."""
        return F.normalize(self.visual_projection(self.vision_model(pixels)[1]).float(), dim=-1)

    def text(self, ids):
        """ids [B, S] -> unit vectors [B, P], fp32."""
        x = self.text_model.embeddings(ids)
        for layer in self.text_model.encoder.layers:
            x = layer(x)
        pooled = self.text_model.final_layer_norm(
            x[torch.arange(len(ids)), end_position(ids, self.cfg.text.eos_token_id)]
        )
        return F.normalize(self.text_projection(pooled).float(), dim=-1)


def end_position(ids, eos):
    """Where each text ends. Old configs say eos_token_id 2, which no tokenizer uses; there the end token is the largest id."""
    return ids.argmax(-1) if eos == 2 else (ids == eos).int().argmax(-1)
