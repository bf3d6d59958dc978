"""A LoRA in use: beside the weights, or fused into them.

for lora in (read("style.safetensors", models), read("subject.safetensors", models)):
    attach(models, lora, 0.8)                       # beside the weights; or fuse(models, lora, 0.8)

Explained in the book (docs/book): chapter 12.
"""

import torch
import torch.nn.functional as F
from torch import nn

from nanodiff.config import UserError
from nanodiff.device import derived, onednn
from nanodiff.lora.format import Lora, check_models


class Attached:
    """A LoRA that runs beside the weights. `scale` may be changed between runs; remove() takes it away."""

    def __init__(self, models, lora, scale):
        check_models(models)
        self.scale, self.handles = scale, []
        for d in lora.deltas:
            layer = models[d.component].get_submodule(d.module)
            self.handles.append(layer.register_forward_hook(Beside(self, d)))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Beside:
    """The part of an Attached that hangs on one layer's call."""

    def __init__(self, owner, delta):
        self.owner, self.delta, self.placed = owner, delta, {}

    scale = property(lambda self: self.owner.scale)

    def silent(self):
        """Then the layer may be taken for itself alone (layers._plain)."""
        return self.scale == 0

    def __call__(self, layer, args, out):
        x = args[0]
        key = (x.device, x.dtype)
        if key not in self.placed:
            self.placed = {key: (self.delta.down.to(*key), self.delta.up.to(*key))}
        down, up = self.placed[key]
        strength = self.scale * self.delta.scale
        if not isinstance(layer, nn.Conv2d):
            return out + F.linear(F.linear(x, down.flatten(1)), up.flatten(1)) * strength
        kernel = layer.kernel_size if down.dim() == 4 else (1, 1)
        h = F.conv2d(
            x, down.view(*down.shape[:2], *kernel), None, layer.stride, layer.padding if down.dim() == 4 else 0
        )
        return out + F.conv2d(h, up.flatten(1)[:, :, None, None]) * strength


def attach(models: dict[str, nn.Module], lora: Lora, scale: float = 1.0) -> Attached:
    """Run `lora` beside the weights of `models`; returns an Attached."""
    return Attached(models, lora, scale)


class Fused:
    """A LoRA added into the weights. remove() puts back the very weights that were there before, if they were kept; where the weights have become
    others since (another LoRA was fused over this one, they were trained or cast) it takes its own part out of them, within rounding."""

    def __init__(self, models, lora, scale, keep=True):
        check_models(models)
        self.before, self.models, self.scale = [], models, scale
        for model in models.values():
            onednn.undo(model)
        layers = [models[d.component].get_submodule(d.module) for d in lora.deltas]
        if any(hasattr(layer, "codes") for layer in layers):
            raise UserError(f"{lora.name}: cannot be fused into quantized weights; leave out `lora_fuse`")
        for d, layer in zip(lora.deltas, layers, strict=True):  # before any is changed
            made = layer.weight.data.float() + scale * d.matrix(layer.weight.shape).to(layer.weight.device)
            if not torch.isfinite(made.to(layer.weight.dtype)).all():
                kind = str(layer.weight.dtype).removeprefix("torch.")
                raise UserError(
                    f"{lora.name}: {d.component}.{d.module} is not finite in {kind} with it; is the scale {scale:g} meant?"
                )
        for d, layer in zip(lora.deltas, layers, strict=True):
            weight = layer.weight
            if keep:
                # such as with q and k (layers.join)
                shared = weight.data.untyped_storage().nbytes() > weight.data.nbytes
                self.before.append((weight.data.clone() if shared else weight.data, d))
            self._put(layer, self._with(d, weight.data, scale))
        for model in models.values():
            derived.weights_changed(model)

    @staticmethod
    def _put(layer, data):
        """Never in place: it may be a mapped file. What was loaded in inference mode takes no other data."""
        if layer.weight.is_inference():
            layer.weight = nn.Parameter(data, requires_grad=False)
        else:
            layer.weight.data = data

    @staticmethod
    def _with(delta, data, scale):
        return (data.float() + scale * delta.matrix(data.shape).to(data.device)).to(data.dtype)

    def remove(self) -> None:
        """Take it out again; a second time there is nothing to take."""
        for model in self.models.values():
            onednn.undo(model)
        layers = [self.models[delta.component].get_submodule(delta.module) for _, delta in self.before]
        if any(hasattr(layer, "codes") for layer in layers):
            raise UserError("a LoRA cannot be taken out of weights that were quantized since it was fused into them")
        for (data, delta), layer in reversed([*zip(self.before, layers, strict=True)]):
            weight = layer.weight
            data = data.to(weight.device)
            ours = data.dtype == weight.dtype and torch.equal(weight.data, self._with(delta, data, self.scale))
            self._put(layer, data if ours else self._with(delta, weight.data, -self.scale))
        self.before = []
        for model in self.models.values():
            derived.weights_changed(model)


def fuse(models: dict[str, nn.Module], lora: Lora, scale: float = 1.0, keep: bool = True) -> Fused:
    """Add `lora` into the weights of `models`; returns a Fused. keep: so that it can be taken out again, at the price of
    the changed weights' memory. Not while they are at work (memory.Resident)."""
    return Fused(models, lora, scale, keep)
