"""What a picture is drawn from: its size, a picture and a mask to begin with, what ControlNets are shown; and the drawing itself, once or twice."""

import dataclasses
import itertools
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F

from nanodiff.commandline import flagged
from nanodiff.config import UserError
from nanodiff.data import edges
from nanodiff.diffusion import samplers
from nanodiff.output import images, repaint
from nanodiff.output.repaint import LANCZOS
from nanodiff.pipeline import Drawing, Start, control
from nanodiff.pipeline.settings import grouped
from nanodiff.stories.drawing import least_steps, options, strength_of
from nanodiff.stories.wording import worded

STRETCHED = 0.05  # logarithm of proportions: so much is rounding to the VAE's multiple


def inputs(cfg, sd):
    """({height, width}, {image, strength, mask, pictures, controls} for generate(), what is to be done with each picture that was drawn)."""
    picture, sizing = sizing_of(cfg)
    height, width = canvas(cfg, sizing, sd.size, sd.multiple, sd.keeps_size)
    mask, box, start = opened_mask(cfg, picture), None, {}
    if cfg.mask_padding is not None:
        box = repaint.region(mask, width, height, cfg.mask_padding)
    elif picture and abs(math.log(picture.width / picture.height * height / width)) > STRETCHED:
        print(f"note: --init-image {cfg.init_image} is {picture.width}x{picture.height}, drawn as {width}x{height}: its proportions change "
              f"(--height and --width set the size{', --mask-padding repaints a part' if mask else ''})", file=sys.stderr)  # fmt: skip

    def fitted(image):
        return repaint.enlarged(image, box, width, height) if box else image.resize((width, height), LANCZOS)

    if picture:
        start["image"] = images.to_pixels(fitted(picture))[None].to(sd.device)
        start["strength"] = strength_of(cfg, sd)
    if mask:
        pixels = torch.frombuffer(bytearray(fitted(mask).tobytes()), dtype=torch.uint8)
        start["mask"] = (pixels.view(1, 1, height, width) >= 128).float()
        small = F.interpolate(start["mask"], (height // sd.downscale, width // sd.downscale))  # as the sampler sees it
        if not small.any():
            blur = f", blurred over {cfg.mask_blur}" if cfg.mask_blur else ""
            raise UserError(f"--mask {cfg.mask}: marks nothing to repaint at {width}x{height}{blur}: what it marks is too small; enlarge it, or repaint that part alone "
                            "(--mask-padding)")  # fmt: skip
    if cfg.ip_adapter:
        start["pictures"] = sd.pictures
    if cfg.control:
        same = lambda p: fitted(p) if box and p.size == picture.size else p.resize((width, height), LANCZOS)  # noqa: E731
        start["controls"] = controls(cfg, sd, same)
    if box:
        return {"height": height, "width": width}, start, lambda drawn: repaint.pasted(drawn, picture, mask, box)
    if cfg.mask_blur:
        whole = (0, 0, width, height)
        kept, soft = fitted(picture), fitted(mask)
        return {"height": height, "width": width}, start, lambda drawn: repaint.pasted(drawn, kept, soft, whole)
    return {"height": height, "width": width}, start, lambda drawn: drawn


def sizing_of(cfg):
    """(--init-image or None, the picture whose size is drawn or None)"""
    picture = images.open_image(cfg.init_image) if cfg.init_image else None
    return picture, picture or (control_image(cfg.control_image[0])[0] if cfg.control_image else None)


def canvas(cfg, sizing, own, multiple, keeps_size):
    """(height, width) of what is drawn. Sizes as in diffusers: an --init-image, else the first --control-image, sets the size (down to a multiple
    of the VAE's); a mask without a ControlNet, or a family that does not keep sizes (SD 3), brings the model's own; --height and --width win.
    --mask-padding always enlarges to the model's own, where diffusers' ControlNet pipelines keep the picture's.

    sizing: PIL picture or None. own: (height, width) of the model. multiple: of pixels.
    """
    height, width = own
    if sizing and keeps_size and (not cfg.mask or (cfg.control and cfg.mask_padding is None)):
        height, width = (max(side // multiple, 1) * multiple for side in (sizing.height, sizing.width))
    return cfg.height or height, cfg.width or width


def opened_mask(cfg, picture):
    """--mask as a PIL picture ("L"), with the edge that --mask-blur asks for; None without."""
    if not cfg.mask:
        return None
    mask = images.open_image(cfg.mask, background="black").convert("L")  # what is transparent is not masked
    if mask.size != picture.size:
        raise UserError(
            f"--mask {cfg.mask} is {mask.width}x{mask.height}, --init-image is {picture.width}x{picture.height}"
        )
    if mask.getextrema()[1] < 128:  # what counts as marked
        lit = (
            f"its brightest value is {mask.getextrema()[1]} of 255" if mask.getbbox() else "it is black, or transparent"
        )
        raise UserError(f"--mask {cfg.mask}: marks nothing to repaint: {lit}")
    return repaint.blurred(mask, cfg.mask_blur) if cfg.mask_blur else mask


def control_image(text):
    """(picture, are its edges meant?) that --control-image names: a file, or canny:FILE. Lines and poses are drawn on black: so is what is
    transparent in them."""
    kind, _, path = text.partition(":")
    if kind != "canny" or Path(text).exists():
        return images.open_image(text, background="black"), False
    return images.open_image(path), True


def controls(cfg, sd, fitted):
    """The ControlNets of --control at work, as generate() takes them. fitted(picture): in the size of what is drawn, in which edges are looked for,
    as in training."""
    found = []
    for net, text, shown in zip(sd.controls, cfg.control, cfg.control_image, strict=True):
        picture, outlined = control_image(shown)
        picture = fitted(picture)
        picture = images.Image.fromarray(edges.canny(picture)).convert("RGB") if outlined else picture
        pixels = images.to_pixels(picture)[None] / 2 + 0.5
        found.append(control.Control(net, pixels, *control.parse(text)[1:], cfg.control_guess, outlined))
    return tuple(found)


def against(batch):
    """The negative prompts of a batch of Jobs: None where there are none."""
    return None if batch[0].negative is None else [job.negative for job in batch]


def draw(cfg, sd, batch, steps, scale, size, start, **more):
    """A Result of sd.generate() for the Jobs `batch`, and with --hires of a second pass over it, larger: from the same seeds, as AUTOMATIC1111's
    hires fix."""
    texts, negative = [job.text for job in batch], against(batch)
    settings = options(cfg, sd) | {"guidance_scale": scale, "seeds": [job.seed for job in batch], "decode": sd.decoder}
    settings["words"] = worded(settings["words"], batch)
    if sd.refiner:
        return refined(cfg, sd, texts, negative, steps, size, start, settings, **more)
    result = sd.generate(texts, negative, steps=steps, **size, **start, **settings, **more)
    if not cfg.hires:
        return result
    height, width = larger(cfg, sd, size)
    if cfg.hires_latent:
        shape = height // sd.downscale, width // sd.downscale
        again = {"latents": F.interpolate(result.latents.float(), size=shape, mode="bicubic")}
    else:
        pictures = [p.resize((width, height), LANCZOS) for p in images.to_pil(result.pixels)]
        again = {"image": torch.stack([images.to_pixels(p) for p in pictures]).to(sd.device)}
    if cfg.ip_adapter:
        again["pictures"] = start["pictures"]
    if cfg.control:
        again["controls"] = controls(cfg, sd, lambda p: p.resize((width, height), LANCZOS))
    settings["words"] = dataclasses.replace(settings["words"], earlier=steps)
    steps = second_steps(cfg, sd, steps)
    return sd.generate(
        texts,
        negative,
        steps=steps,
        height=height,
        width=width,
        strength=cfg.hires_strength,
        **again,
        **settings,
        **more,
    )


def one_text(words, first=0):
    """pipeline.Words for a refiner, which has one text encoder: the prompt's own text, as diffusers takes it. first: the base model's first step."""
    return dataclasses.replace(words, prompt_2=None, negative_prompt_2=None, first=first)


def refined(cfg, sd, texts, negative, steps, size, start, settings, on_step, keep_steps=False):
    """A Result of two models: the first stops at the part --refiner-start of the noise, the refiner goes on from there with the same settings."""
    taken, settings = itertools.count(1), dict(settings)
    # one generator a picture for both: with the seeds given twice the refiner's fresh noise would be the base model's
    settings["generators"] = [torch.Generator().manual_seed(seed) for seed in settings.pop("seeds")]
    skipped = begun(sd, steps, start)
    whole = len(samplers.times(sd.schedule, steps)) - skipped

    def count(i, n, step):
        on_step(next(taken), whole, step)

    first = sd.generate(texts, negative, steps=steps, **size, **start, on_step=count, keep_steps=keep_steps, output_type="latent",
                        **settings | {"denoising_end": cfg.refiner_start})  # fmt: skip
    last = sd.refiner.generate(texts, negative, steps=steps, **size, latents=first.latents, denoising_start=cfg.refiner_start,
                               on_step=count, keep_steps=keep_steps,
                               **settings | options(cfg, sd.refiner) | {"words": one_text(settings["words"], skipped)})  # fmt: skip
    return dataclasses.replace(last, history=first.history + last.history)


def begun(sd, steps, start):
    """Steps that a run from a picture leaves out."""
    return sd.first_step(steps, start["strength"]) if "image" in start else 0


def larger(cfg, sd, size):
    """(height, width) of the second pass."""
    return tuple(max(round(size[side] * cfg.hires / sd.multiple), 1) * sd.multiple for side in ("height", "width"))


def second_steps(cfg, sd, steps):
    """Steps of the second pass: --hires-steps, else as many as the first has, or where nobody said how many as few more as leave one to take."""
    if cfg.hires_steps or cfg.steps:
        return cfg.hires_steps or steps
    return least_steps(sd, steps, cfg.hires_strength)


def check(cfg, sd, steps, scale, size, start):
    """Raise UserError for what cannot be drawn, also in the second pass, before anything is drawn or makes room for it. Says what will do nothing."""
    settings = options(cfg, sd) | size | start | {"steps": steps, "guidance_scale": scale}
    words = settings.pop("words")
    if sd.refiner:
        before = sd.steps_before(cfg.refiner_start, samplers.times(sd.schedule, steps))
        skipped = begun(sd, steps, start)
        if not skipped < before < len(samplers.times(sd.schedule, steps)):
            side = "the refiner" if before > skipped else "the base model"
            raise UserError(f"--refiner-start {cfg.refiner_start:g} leaves {side} no step of {steps}")
        settings["denoising_end"] = cfg.refiner_start
        own = {k: v for k, v in options(cfg, sd.refiner).items() if k != "words"}
        drawing, *_ = grouped(settings | own, Drawing(), Start(), words)
        going_on = Start(latents=torch.zeros(0), denoising_start=cfg.refiner_start)
        sd.refiner.checked(
            1, dataclasses.replace(drawing, denoising_end=None, controls=(), pictures=()), going_on, one_text(words)
        )
    drawing, begin, words = grouped(settings, Drawing(), Start(), words)
    sd.checked(1, drawing, begin, words)
    for what in sd.idle(steps, drawing, begun(sd, steps, start)):
        print(
            f"note: {flagged(what)}: does nothing in {steps} steps, none of which lies in its part of them",
            file=sys.stderr,
        )
    if not cfg.hires:
        return
    steps = second_steps(cfg, sd, steps)
    samplers.check_steps(sd.schedule, steps)
    if sd.first_step(steps, cfg.hires_strength) >= steps:
        raise UserError(
            f"--hires-strength {cfg.hires_strength:g} of {steps} steps leaves none to take; raise it or --hires-steps"
        )
    sd.check_size(*larger(cfg, sd, size))
