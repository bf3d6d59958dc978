"""LoRA files: the names and shapes of every common dialect.

    W' = W + scale · (alpha / rank) · up @ down          (Hu et al. 2022, arXiv 2106.09685 §4.1)

Dialects: PEFT (`lora_A`), diffusers new (`lora.down`) and old (`processor.to_q_lora.down`), kohya (`lora_unet_…`, with our
block names or sgm's or SD 3's), a PEFT folder. Names are never parsed: underscored ones are ambiguous. Instead every name that a
dialect could give to each of *our* modules is generated, and a file's keys are looked up among those.

Explained in the book (docs/book): chapter 12.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import nn

from nanodiff.config import UserError, short
from nanodiff.weights import original_names

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
DOWN, UP = "down", "up"
SUFFIXES = {  # the end of a key -> what the tensor is
    ".lora_down.weight": DOWN,
    ".lora_up.weight": UP,
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora.down.weight": DOWN,
    ".lora.up.weight": UP,
    "_lora.down.weight": DOWN,
    "_lora.up.weight": UP,
    ".lora_linear_layer.down.weight": DOWN,
    ".lora_linear_layer.up.weight": UP,
    ".alpha": "alpha",
}
OTHERS = {  # pattern in a key: the method, which is no plain LoRA; refused by name, never half loaded
    r"dora_scale|lora_magnitude_vector": "DoRA",
    r"hada_": "LoHa",
    r"lokr_": "LoKr",
    r"(^|[._])oft_": "OFT",
    r"lora_mid": "LoCon with a Tucker core",
    r"\.diff(_b)?$": "a full weight difference",
    r"glora": "GLoRA",
}
# the encoders' names as ComfyUI saves them
COMFYUI = {"text_encoder": ("clip_l", "clip_h"), "text_encoder_2": ("clip_g",), "text_encoder_3": ("t5xxl",)}
KOHYA = {
    "unet": ("lora_unet_",),
    "transformer": ("lora_unet_", "lora_transformer_"),
    "text_encoder": ("lora_te_", "lora_te1_"),
    "text_encoder_2": ("lora_te2_",),
    "text_encoder_3": ("lora_te3_",),
}


class Delta(NamedTuple):
    """The change of one layer: scale · up @ down."""

    component: str
    module: str
    down: torch.Tensor  # [r, in, (kh, kw)]
    up: torch.Tensor  # [out, r, (1, 1)]
    scale: float  # alpha / rank

    def matrix(self, shape: Sequence[int]) -> torch.Tensor:
        """scale · up @ down in fp32, shaped like the weight it changes."""
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(shape) * self.scale


@dataclass
class Lora:
    name: str
    deltas: list
    skipped: list
    # {learned word that comes with it: {"clip_l", "clip_g" or "": vectors [n, D]}}
    words: dict = field(default_factory=dict)


def check_models(models: object) -> None:
    """Raise UserError for what is no {component: network}."""
    if not isinstance(models, dict):
        raise UserError(f"`models` {short(models)}: expected {{component: network}}, as Pipeline.models() gives")


def names_of(models: dict[str, nn.Module]) -> dict[str, list[tuple[str, ...]]]:
    """{every name that a dialect may use: [(component, module path)]}; a fused q-k-v stands for three modules, each with the
    form in which it is there as a third member."""
    found = {}

    def add(name, target):
        found.setdefault(name, []).append(target)

    for component, model in models.items():
        if component == "vae":
            continue
        family = _family(component, model)
        for path, module in model.named_modules():
            if not _is_layer(module):
                continue
            target = (component, path)
            short = path.removeprefix("text_model.") if component.startswith("text_encoder") else path
            bare = [path, f"diffusion_model.{path}"] if component in ("unet", "transformer") else []
            bare += [f"text_encoders.{name}.transformer.{path}" for name in COMFYUI.get(component, ())]
            for dotted in {
                f"{component}.{path}",
                f"{component}.{short}",
                f"{component}.base_model.model.{path}",
                *bare,
            }:
                add(dotted, target)
                if old := _processor_name(dotted):
                    add(old, target)
            if family:
                original = original_names.original(f"{path}.weight", component, family, model.cfg)
                name, form = original[0].removesuffix(".weight"), original[1]
                theirs = (*target, form)  # a third of a fused q-k-v, or exchanged halves
                for full in (f"diffusion_model.{name}", f"model.diffusion_model.{name}"):  # ComfyUI
                    add(full, theirs)
                for prefix in KOHYA[component] if name != path else ():
                    add(prefix + name.replace(".", "_"), theirs)
            for prefix in KOHYA.get(component, ()):
                add(prefix + path.replace(".", "_"), target)
    return found


def _family(component, model):
    """Whose original names kohya's trainers may have used for a model's layers."""
    if component == "unet":
        return "SDXL" if model.cfg.addition_embed_type else "SD 1"
    return "SD 3.5 medium" if component == "transformer" else None


def _is_layer(module):
    return isinstance(module, nn.Linear | nn.Conv2d) or hasattr(module, "codes")


def _processor_name(dotted):
    """What diffusers < 0.22 called an attention's layer: …attn1.to_out.0 -> …attn1.processor.to_out."""
    if match := re.fullmatch(r"(.*\.attn[12])\.(to_[qkv]|to_out\.0)", dotted):
        return f"{match[1]}.processor.{match[2].removesuffix('.0')}"
    if match := re.fullmatch(r"(text_encoder.*\.self_attn)\.(?:([qkv])_proj|out_proj)", dotted):
        return f"{match[1]}.to_{match[2] or 'out'}"
    return None
