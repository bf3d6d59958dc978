"""LoRA files: reading every common dialect, running beside the weights or fused into them.

    W' = W + scale · (alpha / rank) · up @ down          (Hu et al. 2022, arXiv 2106.09685 §4.1)

    for lora in (read("style.safetensors", models), read("subject.safetensors", models)):
        attach(models, lora, 0.8)                       # beside the weights; or fuse(models, lora, 0.8)

Dialects: PEFT (`lora_A`), diffusers new (`lora.down`) and old (`processor.to_q_lora.down`), kohya (`lora_unet_…`, with our
block names or sgm's or SD 3's), a PEFT folder. Names are never parsed: underscored ones are ambiguous. Instead every name that a
dialect could give to each of *our* modules is generated, and a file's keys are looked up among those.

    adapt(unet, rank=16); …train…; trained({"unet": unet})          # fp32 adapters on a frozen model; then lorafile.write()

alpha: the `.alpha` tensor, else the metadata's or adapter_config.json's, else alpha = rank.

    python -m nanodiff.lora inspect|convert|merge|extract|verify …        (lorafile.py)
"""

import contextlib
import fnmatch
import functools
import importlib
import json
import math
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff import onednn, singlefile, weights
from nanodiff.config import UserError, nearest, printable, read_json

DIFFUSERS_NAME = "pytorch_lora_weights.safetensors"
DOWN, UP = "down", "up"
SUFFIXES = {  # the end of a key -> what the tensor is
    ".lora_down.weight": DOWN,
    ".lora_up.weight": UP,
    ".lora_A.weight": DOWN,
    ".lora_B.weight": UP,
    ".lora_A.default.weight": DOWN,
    ".lora_B.default.weight": UP,
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
    r"oft_": "OFT",
    r"lora_mid": "LoCon with a Tucker core",
    r"\.diff(_b)?$": "a full weight difference",
    r"glora": "GLoRA",
}
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

    def matrix(self, shape):
        """scale · up @ down in fp32, shaped like the weight it changes."""
        return (self.up.float().flatten(1) @ self.down.float().flatten(1)).reshape(shape) * self.scale


@dataclass
class Lora:
    name: str
    deltas: list
    skipped: list


# ---------------------------------------------------------------------------------------------------------
# Names


def names_of(models):
    """{every name that a dialect may use: [(component, module path)]}; a fused q-k-v stands for three modules."""
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
            bare = [path] if component in ("unet", "transformer") else []
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
                original = singlefile.original(f"{path}.weight", component, family, model.cfg)
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


# ---------------------------------------------------------------------------------------------------------
# Reading


def read(path, models, allow_partial=False):
    """A Lora for `models` ({component: module}). Raises UserError for keys that none of them knows (unless
    allow_partial, then each is said), for shapes that do not fit, for methods that are no LoRA."""
    path = Path(path)
    if inside := [
        n for n in models if (path / n / "adapter_model.safetensors").exists()
    ]:  # a PEFT folder for each component
        parts = [read(path / n, {n: models[n]}, allow_partial) for n in inside]
        return Lora(path.name, [d for p in parts for d in p.deltas], [k for p in parts for k in p.skipped])
    file = file_of(path)
    if file.suffix in weights.PICKLES:
        raise UserError(
            f"{file}: is a pickle; convert it with `python -m nanodiff.weights convert {file.name} OUT --allow-pickle`"
        )
    tensors, metadata = weights.load_tensors(file), weights.metadata(file)
    for model in models.values():  # their layers' shapes are asked for
        onednn.undo(model)
    groups, strange = grouped(tensors, file)
    known, settings = names_of(models), _settings(file, metadata)
    deltas, absent = [], list(strange)
    for name, parts in groups.items():
        targets = known.get(name) or known.get(name.removeprefix("base_model.model."))
        if targets is None and len(models) == 1:  # PEFT's folder of one text encoder
            targets = known.get(f"{next(iter(models))}.{name.removeprefix('base_model.model.')}")
        if targets is None:
            absent.append(name)
            continue
        if DOWN not in parts or UP not in parts:
            raise UserError(f"{file}: {printable(name)} has only {', '.join(parts)}, a LoRA layer has down and up")
        fused = len(targets[0]) == 3 and targets[0][2] in (0, 1, 2)
        for target in targets if fused else targets[:1]:
            deltas.append(
                _delta(target, parts, models, _scale(f"{file}: {printable(name)}", target, parts, settings), file)
            )
    if absent and not allow_partial:
        few = ", ".join(printable(k) for k in absent[:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        hint = nearest(absent[0], known) if absent[0] in groups else ""
        raise UserError(
            f"{file}: {len(absent)} of {len(groups) + len(strange)} layers are not in this model, so it is for another family: "
            f"{few}{more}{hint} (--allow-partial goes on without them)"
        )
    if not deltas:
        raise UserError(f"{file}: no layer of it is in this model")
    if absent:
        print(
            f"warning: {file.name}: {len(absent)} layers left out: {', '.join(map(printable, absent))}", file=sys.stderr
        )
    return Lora(file.name, deltas, absent)


def file_of(path):
    """The safetensors file that a path means: itself, or the one in PEFT's, diffusers' or our training's folder."""
    path = Path(path)
    names = ("adapter_model.safetensors", DIFFUSERS_NAME)
    return next((path / n for n in names if (path / n).exists()), path / names[0]) if path.is_dir() else path


def grouped(tensors, file):
    """({layer name: {"down", "up", "alpha"}}, keys of no known form)"""
    groups, strange = {}, []
    for key, tensor in tensors.items():
        for mark, method in OTHERS.items():
            if re.search(mark, key):
                raise UserError(f"{file}: {printable(key)}: {method} is not supported (only plain LoRA)")
        if re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", key):
            raise UserError(
                f"{file}: is in the layout of cloneofsimo/lora, which numbers layers instead of naming them; not supported"
            )
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            strange.append(key)
        else:
            groups.setdefault(key.removesuffix(suffix), {})[SUFFIXES[suffix]] = tensor
    return groups, strange


def _settings(file, metadata):
    """{prefix: {"r", "lora_alpha", …}} of `lora_adapter_metadata` (JSON in the header), or of adapter_config.json."""
    settings = {}
    if text := metadata.get("lora_adapter_metadata"):
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}: lora_adapter_metadata is no JSON: {e}") from None
        if not isinstance(flat, dict):
            raise UserError(f"{file}: lora_adapter_metadata is no JSON object")
        for key, value in flat.items():
            prefix, _, name = key.partition(".")
            settings.setdefault(prefix, {})[name] = value
    config = file.parent / "adapter_config.json"
    if file.name == "adapter_model.safetensors" and config.exists():
        settings[""] = read_json(config)
    return settings


def _scale(name, target, parts, settings):
    """alpha / rank of a layer (rank-stabilised: alpha / √rank). name: of file and layer, for errors."""
    rank = parts[DOWN].shape[0] if parts[DOWN].dim() else 0
    told = settings.get(target[0], settings.get("", {}))
    alpha = told.get("lora_alpha", rank)
    patterns = told.get("alpha_pattern") or {}
    if not isinstance(patterns, dict):
        raise UserError(f"{name}: alpha_pattern is no JSON object")
    for pattern, value in patterns.items():
        if target[1] == pattern or target[1].endswith(f".{pattern}"):
            alpha = value
        elif not re.fullmatch(r"[\w.]+", pattern):
            raise UserError(
                f"{name}: alpha_pattern {printable(pattern)!r} is a regular expression; only names are supported"
            )
    stabilised = told.get("use_rslora") and "alpha" not in parts
    alpha = parts["alpha"].float() if "alpha" in parts else alpha
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.item() if alpha.numel() == 1 else None
    if not isinstance(alpha, int | float) or not math.isfinite(alpha) or rank < 1:
        raise UserError(f"{name}: alpha {alpha!r} with rank {rank} gives no strength")
    return alpha / rank**0.5 if stabilised else alpha / rank


def _delta(target, parts, models, scale, file):
    component, module = target[:2]
    down, up = parts[DOWN], parts[UP]
    layer = models[component].get_submodule(module)
    if min(down.dim(), up.dim()) < 2:
        raise UserError(
            f"{file}: {component}.{module}: down {list(down.shape)} and up {list(up.shape)} are no matrices"
        )
    if len(target) == 3:
        up = singlefile.ours(up, target[2])
    wanted = (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else tuple(layer.weight.shape)
    got = (up.shape[0], *down.shape[1:])
    flat = [shape[:2] if set(shape[2:]) <= {1} else shape for shape in (wanted, got)]  # a 1×1 convolution is linear
    if flat[0] != flat[1] or up.shape[1] != down.shape[0]:
        raise UserError(
            f"{file}: {component}.{module}: down {list(down.shape)} and up {list(up.shape)} do not fit a layer of shape "
            f"{list(wanted)}; it is for another family"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise UserError(f"{file}: {component}.{module}: not finite (NaN or infinity)")
    return Delta(component, module, down, up, scale)


# ---------------------------------------------------------------------------------------------------------
# Using


class Attached:
    """A LoRA that runs beside the weights. `scale` may be changed between runs; remove() takes it away."""

    def __init__(self, models, lora, scale):
        self.scale, self.handles = scale, []
        for d in lora.deltas:
            layer = models[d.component].get_submodule(d.module)
            self.handles.append(layer.register_forward_hook(functools.partial(self._add, d, {})))

    def _add(self, delta, placed, layer, args, out):
        x = args[0]
        key = (x.device, x.dtype)
        if key not in placed:
            placed.clear()
            placed[key] = delta.down.to(*key), delta.up.to(*key)
        down, up = placed[key]
        strength = self.scale * delta.scale
        if not isinstance(layer, nn.Conv2d):
            return out + F.linear(F.linear(x, down.flatten(1)), up.flatten(1)) * strength
        kernel = layer.kernel_size if down.dim() == 4 else (1, 1)
        h = F.conv2d(
            x, down.view(*down.shape[:2], *kernel), None, layer.stride, layer.padding if down.dim() == 4 else 0
        )
        return out + F.conv2d(h, up.flatten(1)[:, :, None, None]) * strength

    def remove(self):
        for handle in self.handles:
            handle.remove()


def attach(models, lora, scale=1.0):
    """Run `lora` beside the weights of `models`; returns an Attached."""
    return Attached(models, lora, scale)


class Fused:
    """A LoRA added into the weights. remove() puts back the very weights that were there before, if they were kept."""

    def __init__(self, models, lora, scale, keep=True):
        self.before, self.models = [], models
        for model in models.values():
            onednn.undo(model)
        layers = [models[d.component].get_submodule(d.module) for d in lora.deltas]
        if any(hasattr(layer, "codes") for layer in layers):
            raise UserError(f"{lora.name}: cannot be fused into quantized weights; leave out --lora-fuse")
        for d, layer in zip(lora.deltas, layers, strict=True):
            weight = layer.weight
            if keep:
                shared = (
                    weight.data.untyped_storage().nbytes() > weight.data.nbytes
                )  # such as with q and k (layers.join)
                self.before.append((weight, weight.data.clone() if shared else weight.data))
            delta = d.matrix(weight.shape).to(weight.device)
            # never in place: it may be a mapped file
            weight.data = (weight.data.float() + scale * delta).to(weight.dtype)
        self._weights_changed()

    def remove(self):
        for model in self.models.values():
            onednn.undo(model)
        for weight, data in reversed(self.before):
            weight.data = data
        self._weights_changed()

    def _weights_changed(self):
        """Let what was derived from the weights (layers.Upsample) be derived again."""
        for m in (m for model in self.models.values() for m in model.modules()):
            if getattr(m, "phases", None):
                m.phases = ()


def fuse(models, lora, scale=1.0, keep=True):
    """Add `lora` into the weights of `models`; returns a Fused. keep: so that it can be taken out again, at the price of
    the changed weights' memory. Not while they are at work (memory.Resident)."""
    return Fused(models, lora, scale, keep)


# ---------------------------------------------------------------------------------------------------------
# Training


ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj",
             "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # fmt: skip


def adapt(model, rank=4, alpha=None, targets=ATTENTION, component="model", rank_pattern=None, alpha_pattern=None, dropout=0.0,
          rslora=False):  # fmt: skip
    """Freeze `model` and put trainable adapters beside the layers that `targets` name: y = W x + s · B (A drop(x)), A drawn as a
    linear layer's weights are, B zero, both in fp32 (an fp16 adapter could not be unscaled). The base keeps its names; the
    adapters are `….lora_A.weight` and `….lora_B.weight`.

    targets: the end of a layer's name (`to_q`, `attn2.to_k`), or a pattern with * for all of it (`down_blocks.*.conv1`).
    s = alpha / rank (rslora: alpha / √rank, Kalajdzievski 2023, arXiv 2312.03732 eq. 8); alpha: default rank. rank_pattern,
    alpha_pattern: {target: another rank, alpha}. dropout: of the adapter's input, while training. Returns the number of
    adapted layers. Raises UserError when a target or pattern matches no layer.
    """
    if rank < 1:
        raise UserError(f"--lora-rank {rank} must be at least 1")
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    found = {name: m for name, m in layers.items() if any(matches(name, t) for t in targets)}
    if not found:
        ends = sorted({n.rpartition(".")[2] for n in layers})
        raise UserError(
            f"--lora-targets {','.join(targets)}: no layer of the {component} has such a name; it has {', '.join(ends)}"
        )
    ranks, alphas = (_by_name(found, p or {}, f) for p, f in ((rank_pattern, "rank"), (alpha_pattern, "alpha")))
    if bad := [r for r in ranks.values() if r < 1 or int(r) != r]:
        raise UserError(f"--lora-rank-pattern: {bad[0]:g} is no rank")
    for name, layer in found.items():
        r = int(ranks.get(name, rank))
        a = alphas.get(name, r if alpha is None else alpha)
        if isinstance(layer, nn.Conv2d):
            layer.lora_A = nn.Conv2d(layer.in_channels, r, layer.kernel_size, layer.stride, layer.padding, bias=False)
            layer.lora_B = nn.Conv2d(r, layer.out_channels, 1, bias=False)
        else:
            layer.lora_A = nn.Linear(layer.in_features, r, bias=False)
            layer.lora_B = nn.Linear(r, layer.out_features, bias=False)
        nn.init.kaiming_uniform_(layer.lora_A.weight, a=5**0.5)
        nn.init.zeros_(layer.lora_B.weight)
        layer.lora_scale = a / r**0.5 if rslora else a / r
        layer.register_forward_hook(functools.partial(_beside, dropout))
    return len(found)


def matches(name, target):
    """Does `target` name a layer? See adapt()."""
    return fnmatch.fnmatchcase(name, target) if "*" in target else name == target or name.endswith(f".{target}")


def _by_name(found, patterns, what):
    """{layer: value} of {target: value}. Raises UserError for a target that matches none of the adapted layers."""
    values = {}
    for target, value in patterns.items():
        mine = [name for name in found if matches(name, target)]
        if not mine:
            raise UserError(
                f"--lora-{what}-pattern {printable(target)}: matches none of the {len(found)} adapted layers"
            )
        values |= dict.fromkeys(mine, value)
    return values


@contextlib.contextmanager
def without(model):
    """Inside, an adapt()ed model is its base again: a teacher that costs no memory."""
    scales = {layer: layer.lora_scale for layer in model.modules() if hasattr(layer, "lora_scale")}
    try:
        for layer in scales:
            layer.lora_scale = None
        yield
    finally:
        for layer, scale in scales.items():
            layer.lora_scale = scale


def _beside(dropout, layer, args, out):
    if layer.lora_scale is None:
        return out
    x = args[0]
    # autocast casts by itself, without keeping another copy for the backward pass (a plan on the meta device does as it does)
    if not (x.is_meta or torch.is_autocast_enabled(x.device.type)):
        x = x.to(layer.lora_A.weight.dtype)
    if dropout and layer.training:
        x = F.dropout(x, dropout)
    return out + (layer.lora_B(layer.lora_A(x)) * layer.lora_scale).to(out.dtype)


def trained(models, states=None, dtype=torch.float32, name="adapters"):
    """The Lora of adapt()ed models ({component: module}). states: {component: state_dict} in place of the models' own."""
    deltas = []
    for component, model in models.items():
        state = states[component] if states else model.state_dict()
        for path, layer in model.named_modules():
            if hasattr(layer, "lora_scale"):
                down, up = (state[f"{path}.{part}.weight"].detach().to("cpu", dtype) for part in ("lora_A", "lora_B"))
                deltas.append(Delta(component, path, down, up, layer.lora_scale))
    return Lora(name, deltas, [])


def parse(text):
    """ "FILE" or "FILE:SCALE" of the command line -> (path, scale)."""
    path, colon, scale = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            return path, float(scale)
        except ValueError:
            raise UserError(
                f"--lora {printable(text)}: {printable(scale)!r} is no scale; use FILE or FILE:SCALE"
            ) from None
    return text, 1.0


if __name__ == "__main__":  # files as a whole are lorafile's business; this is only where people look for them
    sys.exit(importlib.import_module("nanodiff.lorafile").main())
