"""What a picture is drawn from: its size, a picture and a mask to begin with, what ControlNets are shown; and the drawing itself, once or twice."""

import dataclasses
from pathlib import Path

import torch
import torch.nn.functional as F

from nanodiff.config import UserError
from nanodiff.data import edges
from nanodiff.output import images, repaint
from nanodiff.output.repaint import LANCZOS
from nanodiff.pipeline import control
from nanodiff.stories.drawing import options


def inputs(cfg, sd):
    """({height, width}, {image, strength, mask, controls} for generate(), what is to be done with each picture that was drawn).

    Sizes as in diffusers: an --init-image, else the first --control-image, sets the size (down to a multiple of the VAE's), a mask or SD 3
    brings the model's own size; --height and --width win.
    """
    picture = images.open_image(cfg.init_image) if cfg.init_image else None
    shown = [control_image(text) for text in cfg.control_image]
    sizing = picture or next(iter(shown), None)
    if sizing and not cfg.mask and sd.keeps_size:
        height, width = (max(side // sd.multiple, 1) * sd.multiple for side in (sizing.height, sizing.width))
    else:
        height, width = sd.size
    height, width = cfg.height or height, cfg.width or width
    mask, box, start = opened_mask(cfg, picture), None, {}
    if cfg.mask_padding is not None:
        box = repaint.region(mask, width, height, cfg.mask_padding)

    def fitted(image):
        return repaint.enlarged(image, box, width, height) if box else image.resize((width, height), LANCZOS)

    if picture:
        own = 1.0 if sd.inpaints else 0.8
        start["image"] = images.to_pixels(fitted(picture))[None].to(sd.device)
        start["strength"] = own if cfg.strength is None else cfg.strength
    if mask:
        pixels = torch.frombuffer(bytearray(fitted(mask).tobytes()), dtype=torch.uint8)
        start["mask"] = (pixels.view(1, 1, height, width) >= 128).float()
    if shown:
        start["controls"] = controls(
            cfg,
            sd,
            [fitted(p) if box and p.size == picture.size else p.resize((width, height), LANCZOS) for p in shown],
        )
    if box:
        return {"height": height, "width": width}, start, lambda drawn: repaint.pasted(drawn, picture, mask, box)
    if cfg.mask_blur:
        whole = (0, 0, width, height)
        kept, soft = fitted(picture), fitted(mask)
        return {"height": height, "width": width}, start, lambda drawn: repaint.pasted(drawn, kept, soft, whole)
    return {"height": height, "width": width}, start, lambda drawn: drawn


def opened_mask(cfg, picture):
    """--mask as a PIL picture ("L"), with the edge that --mask-blur asks for; None without."""
    if not cfg.mask:
        return None
    mask = images.open_image(cfg.mask, background="black").convert("L")  # what is transparent is not masked
    if mask.size != picture.size:
        raise UserError(
            f"--mask {cfg.mask} is {mask.width}x{mask.height}, --init-image is {picture.width}x{picture.height}"
        )
    return repaint.blurred(mask, cfg.mask_blur) if cfg.mask_blur else mask


def control_image(text):
    """A picture for a ControlNet, as --control-image names it: a file, or canny:FILE for its edges."""
    kind, _, path = text.partition(":")
    if kind != "canny" or Path(text).exists():
        return images.open_image(text)
    return images.Image.fromarray(edges.canny(images.open_image(path))).convert("RGB")


def controls(cfg, sd, pictures):
    """The ControlNets of --control at work, as generate() takes them."""
    said = [control.parse(text)[1:] for text in cfg.control]
    shown = [images.to_pixels(p)[None] / 2 + 0.5 for p in pictures]
    return tuple(
        control.Control(net, picture, *how, cfg.control_guess)
        for net, picture, how in zip(sd.controls, shown, said, strict=True)
    )


def draw(cfg, sd, texts, negative, steps, scale, seeds, size, start, **more):
    """A Result of sd.generate(), and with --hires of a second pass over it, larger: from the same seeds, as AUTOMATIC1111's hires fix."""
    settings = options(cfg) | {"guidance_scale": scale, "seeds": seeds, "decode": sd.decoder}
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
    if "controls" in start:
        again["controls"] = tuple(
            dataclasses.replace(c, picture=F.interpolate(c.picture, size=(height, width), mode="bicubic").clamp(0, 1))
            for c in start["controls"]
        )
    steps = cfg.hires_steps or steps
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


def larger(cfg, sd, size):
    """(height, width) of the second pass."""
    return tuple(max(round(size[side] * cfg.hires / sd.multiple), 1) * sd.multiple for side in ("height", "width"))
