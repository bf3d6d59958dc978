"""What may be said about a picture, in three groups: its words, how it is drawn, what it starts from.

Explained in the book (docs/book): chapter 4.
"""

import dataclasses
import math
from dataclasses import dataclass
from typing import NamedTuple

import torch

from nanodiff.config import UserError, nearest, short
from nanodiff.models.freeu import FreeU


class SkipLayers(NamedTuple):
    """Skip-layer guidance, for SD 3.5 medium: out += scale · (out with text - out of the model without `layers`), from
    `start` to `stop` of the steps (the model card's settings: layers 7, 8, 9, scale 2.8, 0.01 to 0.2)."""

    layers: tuple
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def active(self, i: int, n: int) -> bool:
        """Is it at work at step i of n?"""
        return n * self.start < i < n * self.stop


class Perturbed(NamedTuple):
    """Perturbed-attention guidance, for UNets (Ahn et al. 2024, arXiv 2403.17377): out += scale · (out with text - out of the model whose
    self-attentions in `layers` let everything look at itself alone). layers: patterns of modules' names, such as "mid" or "up_blocks.1"."""

    scale: float = 3.0
    layers: tuple = ("mid",)

    def active(self, i: int, n: int) -> bool:
        return self.scale != 0


class Churn(NamedTuple):
    """Euler's stochastic steps (Karras et al. 2022, arXiv 2206.00364 Alg. 2): where σ is between `low` and `high`, noise is added before a step, up
    to σ (1 + min(amount / steps, √2 - 1)), times `noise`. amount: the paper's S_churn, 0 or more."""

    amount: float
    low: float = 0.0
    high: float = math.inf
    noise: float = 1.0


@dataclass(frozen=True)
class Words:
    """How prompts become a condition. A text for all pictures, or a list of as many as there are prompts."""

    prompt_2: str | list[str] | None = None  # for the second text encoder (SDXL, SD 3); None: the prompt
    prompt_3: str | list[str] | None = None  # for the third (SD 3)
    negative_prompt_2: str | list[str] | None = None
    negative_prompt_3: str | list[str] | None = None
    # no limit of 75 tokens: chunks; a batch's shorter prompts are filled up to its longest with empty ones
    long_prompts: bool = False
    weighted: bool | str = False  # (word:1.2) and the like mean something; "comfyui": by ComfyUI's rule
    syntax: bool = False  # [a:b:0.5], [a|b] and AND mean something (text/syntax.py), as in AUTOMATIC1111's web UI
    earlier: int = 0  # steps of a pass before this one, from which `syntax` counts on
    # of a run that goes on from another model's (`denoising_start`): the step at which that one began, from which `syntax` counts
    first: int = 0
    max_sequence_length: int | None = None  # tokens of T5, 1 to 512; None: 256
    clip_skip: int = 0  # layers of the CLIPs that are left out, counted from the end


@dataclass(frozen=True)
class Drawing:
    """How noise becomes a picture. None: what the model was made for (Pipeline.settings, Pipeline.size)."""

    steps: int | None = None
    guidance_scale: float | None = None  # 1 or less: none
    guidance_rescale: float = 0.0  # 0 to 1
    height: int | None = None  # pixels
    width: int | None = None
    eta: float = 0.0  # DDIM's and TCD's noise, 0 to 1
    churn: Churn | None = None  # Euler's
    quirks: bool = False  # see samplers.ddim
    tiled: bool = False  # the VAE decodes in tiles: less memory, the same picture
    sizes: dict | None = None  # SDXL's, see its size_ids
    skip_layers: SkipLayers | None = None  # SD 3's
    perturbed: Perturbed | None = None
    freeu: object | None = None  # models.freeu.FreeU, for UNets
    controls: tuple = ()  # ControlNets at work, control.Control
    pictures: tuple = ()  # as prompts, pictures.ImagePrompt
    denoising_end: float | None = None  # stop when this part of the timesteps is behind, between 0 and 1


@dataclass(frozen=True)
class Start:
    """What image-to-image and inpainting begin with."""

    image: torch.Tensor | None = None  # [B or 1, 3, H, W] in [-1, 1]
    strength: float = 0.8  # how much of it is repainted, above 0 to 1
    mask: torch.Tensor | None = None  # [B or 1, 1, H, W] in [0, 1]: repainted from 0.5 on, as in diffusers
    latents: torch.Tensor | None = None  # [B, C, h, w], in place of an image
    # the latents are what another model left at this part of the timesteps (its denoising_end), and nothing is added to them
    denoising_start: float | None = None

    @property
    def begun(self) -> bool:
        """Is there a picture, or what another model left of one?"""
        return self.image is not None or self.latents is not None


def check_kinds(drawing: Drawing, start: Start, words: Words) -> None:
    """Raise UserError for a setting of another kind than it is: a text for a number, NaN, a tuple for FreeU."""
    for name in ("steps", "height", "width"):
        value = getattr(drawing, name)
        if value is not None and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise UserError(f"`{name}` {short(value)}: expected a whole number")
    for group, name, optional in ((drawing, "guidance_scale", True), (drawing, "guidance_rescale", False), (drawing, "eta", False),
                                  (drawing, "denoising_end", True), (start, "strength", False), (start, "denoising_start", True)):  # fmt: skip
        value = getattr(group, name)
        if not (optional and value is None) and not _is_number(value):
            raise UserError(f"`{name}` {short(value)}: expected a number")
    if not 0 <= drawing.guidance_rescale <= 1:
        raise UserError(f"`guidance_rescale` {drawing.guidance_rescale:g} must be between 0 and 1")
    for name, kind in (("skip_layers", SkipLayers), ("perturbed", Perturbed), ("freeu", FreeU)):
        value = getattr(drawing, name)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"`{name}` {short(value)}: expected a {kind.__name__}")
    for group, name, kind in ((drawing, "churn", Churn), (drawing, "sizes", dict)):
        value = getattr(group, name)
        if value is not None and not isinstance(value, kind):
            raise UserError(f"`{name}` {short(value)}: expected a {kind.__name__}")
    if not 0 <= drawing.eta <= 1:
        raise UserError(f"`eta` {drawing.eta:g} must be between 0 and 1")
    if drawing.churn and not (
        all(map(_is_number, (drawing.churn.amount, drawing.churn.low, drawing.churn.noise))) and min(drawing.churn) >= 0
    ):
        raise UserError(f"`churn` {short(drawing.churn)}: expected numbers, 0 or more")
    if (skip := drawing.skip_layers) and not (
        isinstance(skip.layers, list | tuple) and all(map(_is_number, (*skip.layers, *skip[1:])))
    ):
        raise UserError(f"`skip_layers` {short(skip)}: expected a tuple of layers, and numbers")
    for name in ("controls", "pictures"):
        if not isinstance(getattr(drawing, name), list | tuple):
            raise UserError(f"`{name}` {short(getattr(drawing, name))}: expected a tuple")
    for name, optional in (("clip_skip", False), ("max_sequence_length", True)):
        value = getattr(words, name)
        if not (optional and value is None) and (isinstance(value, bool) or not hasattr(value, "__index__")):
            raise UserError(f"`{name}` {short(value)}: expected a whole number")
    if words.weighted not in (None, False, True, "comfyui"):
        raise UserError(f"`weighted` {short(words.weighted)}: is none of False, True, 'comfyui'")
    if not isinstance(words.syntax, bool):
        raise UserError(f"`syntax` {short(words.syntax)}: is none of False, True")


def _is_number(value):
    try:
        return not isinstance(value, str | bool) and math.isfinite(float(value))
    except (TypeError, ValueError, RuntimeError):
        return False


def check_pixels(start: Start, rows: int, height: int, width: int) -> None:
    """Raise UserError for an `image` or a `mask` of another kind, size or scale than Start says. A picture that was decoded leaves [-1, 1] a
    little; 0 to 255 is another scale."""
    if not start.begun and start.strength not in (Start.strength, 1):
        raise UserError("`strength` is how much of `image` is repainted, and there is none")
    latents = start.latents
    if latents is not None and not (isinstance(latents, torch.Tensor) and latents.is_floating_point()):
        raise UserError(f"`latents` {short(latents)}: expected a tensor of floats, [B, C, h, w]")
    if latents is not None and not torch.isfinite(latents).all():
        raise UserError("`latents` are not finite (NaN or infinity)")
    for name, channels, low, room in (("image", 3, -1.0, 3.0), ("mask", 1, 0.0, 0.01)):
        value = getattr(start, name)
        if value is None:
            continue
        known = isinstance(value, torch.Tensor) and (
            value.is_floating_point() or (name == "mask" and value.dtype == torch.bool)
        )
        if not known:
            made = {
                "image": "output.images.to_pixels(picture)[None] makes one of a PIL picture",
                "mask": "1 where it is repainted",
            }
            raise UserError(
                f"`{name}`: expected a tensor of floats in [{low:g}, 1], {[rows, channels, height, width]}; {made[name]}"
            )
        if value.dim() != 4 or value.shape[0] not in (1, rows) or tuple(value.shape[1:]) != (channels, height, width):
            raise UserError(
                f"`{name}` of {list(value.shape)}: expected [{rows}, {channels}, {height}, {width}], the size that is drawn"
            )
        least, most = value.amin().item(), value.amax().item()
        if not (low - room <= least and most <= 1 + room):
            raise UserError(f"`{name}`: values from {least:g} to {most:g}, expected [{low:g}, 1]")


ALIASES = {"num_inference_steps": "steps", "cfg_scale": "guidance_scale"}  # other programs' names


def grouped(settings: dict, *groups) -> list:
    """The groups (instances of the classes above) with the settings that are theirs. Raises TypeError for one that is nobody's."""
    settings = {ALIASES.get(name, name): value for name, value in settings.items()}
    owner = {f.name: i for i, group in enumerate(groups) for f in dataclasses.fields(group)}
    if strange := [name for name in settings if name not in owner]:
        raise TypeError(
            f"generate() has no setting {strange[0]!r}{nearest(strange[0], [*owner, 'seeds', 'generators', 'prompts'])}"
        )
    mine = [{k: v for k, v in settings.items() if owner[k] == i} for i in range(len(groups))]
    return [dataclasses.replace(group, **some) for group, some in zip(groups, mine, strict=True)]
