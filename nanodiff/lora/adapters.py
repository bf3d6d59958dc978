"""Adapters that are trained: fp32 matrices beside a frozen model's layers.

adapt(unet, rank=16); …train…; trained({"unet": unet})          # then writing.write()

Explained in the book (docs/book): chapter 12.
"""

import contextlib
import fnmatch
import functools
from collections.abc import Iterator, Sequence

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError, printable
from nanodiff.lora.format import Delta, Lora

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj",
             "add_q_proj", "add_k_proj", "add_v_proj", "to_add_out")  # fmt: skip


def adapt(
    model: nn.Module,
    rank: int = 4,
    alpha: float | None = None,
    targets: Sequence[str] = ATTENTION,
    component: str = "model",
    rank_pattern: dict[str, int] | None = None,
    alpha_pattern: dict[str, float] | None = None,
    dropout: float = 0.0,
    rslora: bool = False,
) -> int:
    """Freeze `model` and put trainable adapters beside the layers that `targets` name: y = W x + s · B (A drop(x)), A drawn as a
    linear layer's weights are, B zero, both in fp32 (an fp16 adapter could not be unscaled). The base keeps its names; the
    adapters are `….lora_A.weight` and `….lora_B.weight`.

    targets: the end of a layer's name (`to_q`, `attn2.to_k`), or a pattern with * for all of it (`down_blocks.*.conv1`).
    s = alpha / rank (rslora: alpha / √rank, Kalajdzievski 2023, arXiv 2312.03732 eq. 8); alpha: default rank. rank_pattern,
    alpha_pattern: {target: another rank, alpha}. dropout: of the adapter's input, while training. Returns the number of
    adapted layers. Raises UserError when a target or pattern matches no layer.
    """
    if rank < 1:
        raise UserError(f"`lora_rank` {rank} must be at least 1")
    model.requires_grad_(False)
    layers = {name: m for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    found = {name: m for name, m in layers.items() if any(matches(name, t) for t in targets)}
    if not found:
        ends = sorted({n.rpartition(".")[2] for n in layers})
        raise UserError(
            f"`lora_targets` {','.join(targets)}: no layer of the {component} has such a name; it has {', '.join(ends)}"
        )
    ranks, alphas = (_by_name(found, p or {}, f) for p, f in ((rank_pattern, "rank"), (alpha_pattern, "alpha")))
    if bad := [r for r in ranks.values() if r < 1 or int(r) != r]:
        raise UserError(f"`lora_rank_pattern`: {bad[0]:g} is no rank")
    for name, given in (("lora_alpha", [] if alpha is None else [alpha]), ("lora_alpha_pattern", alphas.values())):
        if bad := [a for a in given if not a > 0]:
            raise UserError(f"`{name}`: {bad[0]:g} is no alpha; it is above 0")
    if twice := [name for name, layer in found.items() if hasattr(layer, "lora_scale")]:
        raise UserError(f"{component}.{twice[0]}: has an adapter already; two would run, and one be written")
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


def matches(name: str, target: str) -> bool:
    """Does `target` name a layer? See adapt()."""
    return fnmatch.fnmatchcase(name, target) if "*" in target else name == target or name.endswith(f".{target}")


def _by_name(found, patterns, what):
    """{layer: value} of {target: value}. Raises UserError for a target that matches none of the adapted layers."""
    values = {}
    for target, value in patterns.items():
        mine = [name for name in found if matches(name, target)]
        if not mine:
            raise UserError(
                f"`lora_{what}_pattern` {printable(target)}: matches none of the {len(found)} adapted layers"
            )
        values |= dict.fromkeys(mine, value)
    return values


@contextlib.contextmanager
def without(model: nn.Module) -> Iterator[None]:
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


def trained(
    models: dict[str, nn.Module],
    states: dict[str, dict[str, torch.Tensor]] | None = None,
    dtype: torch.dtype = torch.float32,
    name: str = "adapters",
) -> Lora:
    """The Lora of adapt()ed models ({component: module}). states: {component: state_dict} in place of the models' own."""
    deltas = []
    for component, model in models.items():
        state = states[component] if states else model.state_dict()
        for path, layer in model.named_modules():
            if hasattr(layer, "lora_scale"):
                down, up = (state[f"{path}.{part}.weight"].detach().to("cpu", dtype) for part in ("lora_A", "lora_B"))
                deltas.append(Delta(component, path, down, up, layer.lora_scale))
    return Lora(name, deltas, [])
