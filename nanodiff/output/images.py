"""PIL images and tensors: pixels are [B, 3, H, W] in [-1, 1]; grids, labels, metadata, safe names."""

import bisect
import io
import json
import math
import re
import struct
import sys
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont, ImageOps, PngImagePlugin, UnidentifiedImageError, features

from nanodiff.config import UserError, check_regular, printable
from nanodiff.files import out_dir, write_bytes
from nanodiff.output import infotext

MAX_PIXELS = 89_478_485  # Pillow's own warning threshold; beyond it an image is a decompression bomb
FORMATS = ["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF", "PPM", *(["AVIF"] if features.check("avif") else [])]
# of picture files, those that FORMATS read, in the order in which they are looked for
SUFFIXES = (".jpg", ".png", ".jpeg", ".webp", ".bmp", ".gif", ".tif", ".tiff", ".jfif", ".jpe", ".ppm", ".pgm", ".pnm",
            *([".avif"] if "AVIF" in FORMATS else []))  # fmt: skip
LARGEST = {"JPEG": 65500, "WEBP": 16383, "GIF": 65535, "AVIF": 65536}  # pixels of a side
CHUNK = "nanodiff"  # our PNG text chunk: the truth; "parameters" beside it is for display in other tools
ORIENTATION, BITS, PHOTOMETRIC = 0x0112, 258, 262  # EXIF's and TIFF's numbers
TURNS = dict(enumerate((Image.Transpose.FLIP_LEFT_RIGHT, Image.Transpose.ROTATE_180, Image.Transpose.FLIP_TOP_BOTTOM, Image.Transpose.TRANSPOSE,
                        Image.Transpose.ROTATE_270, Image.Transpose.TRANSVERSE, Image.Transpose.ROTATE_90), 2))  # fmt: skip
FAULTS = (OSError, ValueError, SyntaxError, Image.DecompressionBombError)


def bare(name):
    """A picture's name without its suffix; one that ends otherwise, as "a dish.v2" does, is whole."""
    suffix = Path(name).suffix
    return name[: -len(suffix)] if suffix.lower() in SUFFIXES else name


def suffix_of(data):
    """The usual suffix of encoded picture bytes; of a phone's JPEG with more pictures behind it, too. Raises UserError for what is no picture."""
    try:
        with Image.open(io.BytesIO(data), formats=FORMATS) as image:
            kind = image.format
    except FAULTS as e:
        raise UserError(f"no picture that can be read: {e}") from None
    return {"JPEG": ".jpg", "MPO": ".jpg", "TIFF": ".tif"}.get(kind, f".{kind.lower()}")


def open_image(source, name=None, background="white"):
    """A file (path or binary stream) as an RGB PIL image: EXIF orientation applied, transparency on `background`, of an animation the
    first frame. Raises UserError naming the file."""
    name = name or source
    try:
        if isinstance(source, str | Path):
            check_regular(source)
        image = Image.open(source, formats=FORMATS)
        if image.width * image.height > MAX_PIXELS:
            raise UserError(f"{name}: {image.width}x{image.height} pixels are too many")
        tags = getattr(image, "tag_v2", {})  # a TIFF's
        image = _upright(image)
        clear = image.info.get("transparency")
        if image.mode.startswith("I;16") or image.mode == "I":
            image = _of_16_bits(image, clear, (tags.get(BITS) or (16,))[0], tags.get(PHOTOMETRIC) == 0)
        elif image.mode == "F":
            raise UserError(f"{name}: has floating-point pixels, whose range nobody knows; save it with 8 or 16 bits")
        elif image.mode == "RGB" and isinstance(clear, tuple) and max(clear) > 255:
            raise UserError(
                f"{name}: has 16 bits a colour and a transparent one, which is read as another; save it with 8 bits"
            )
        if image.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in image.info:
            image = image.convert("RGBA")
            image = Image.alpha_composite(Image.new("RGBA", image.size, background), image)
        return image.convert("RGB")
    except UnidentifiedImageError:
        raise UserError(f"{name}: not a readable image: of no known format ({', '.join(FORMATS)})") from None
    except FAULTS as e:
        reason = e.strerror if isinstance(e, OSError) and e.strerror else str(e) or type(e).__name__
        raise UserError(f"{name}: not a readable image: {reason}") from None


def _upright(image):
    """A picture turned and mirrored as its EXIF says. Pillow's own exif_transpose() also writes the EXIF anew, which fails for some."""
    try:
        image.load()
        turn = TURNS.get(image.getexif().get(ORIENTATION))
    except (struct.error, TypeError, AttributeError) as e:  # Pillow's own, of EXIF of another type than it should be
        raise ValueError(f"its EXIF is broken ({e})") from None
    return image if turn is None else image.transpose(turn)


def _of_16_bits(image, clear, bits=16, inverted=False):
    """A grey picture of up to 16 bits as one of 8, with alpha where a value is said to be transparent (a PNG's tRNS). inverted: 0 is white."""
    if bits > 16:
        raise ValueError(f"{bits} bits a pixel, whose range nobody knows; save it with 8 or 16")
    values, most = np.asarray(image).astype(np.int64), (1 << bits) - 1
    if values.min() < 0 or values.max() > most:
        raise ValueError(f"values from {values.min()} to {values.max()}, expected 0 to {most}")
    values = most - values if inverted else values
    grey = Image.fromarray(np.rint(values * (255 / most)).astype(np.uint8))
    if isinstance(clear, int):
        grey.putalpha(Image.fromarray(np.where(values == clear, 0, 255).astype(np.uint8)))
    return grey


def fit(image, width, height):
    """Resize so that the image covers width × height, then crop the centre."""
    return ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS)


def to_pixels(image):
    """A PIL picture, taken as RGB -> [3, H, W] in [-1, 1]."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1).float() / 127.5 - 1


# of CLIP's pictures, by which they are normed
CLIP_MEAN, CLIP_STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)


def clip_pixels(image, side, mean=CLIP_MEAN, std=CLIP_STD):
    """A PIL picture as CLIP's vision tower takes it: its shortest side resized to `side` (bicubic), cut to the middle square, normed [3, side, side]."""
    image = image.convert("RGB")
    w, h = image.size
    short = min(w, h)
    w, h = (side if d == short else int(side * d / short) for d in (w, h))
    image = image.resize((w, h), Image.Resampling.BICUBIC)
    left, top = (w - side) // 2, (h - side) // 2
    planes = torch.from_numpy(np.asarray(image.crop((left, top, left + side, top + side))).transpose(2, 0, 1).copy())
    mean, std = (torch.tensor(value, dtype=torch.float32)[:, None, None] for value in (mean, std))
    return (planes.float() / 255 - mean) / std


def to_uint8(pixels):
    """[B, 3, H, W], about [-1, 1] -> uint8 [B, H, W, 3], clamped and rounded."""
    return ((pixels.float() / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8).permute(0, 2, 3, 1).cpu()


def as_uint8(image):
    """uint8 [H, W, 3] of a PIL picture, a uint8 array, or floats in [0, 1] ([H, W, 3] array or [3, H, W] tensor).

    Raises UserError for floats outside [0, 1], which would be another scale."""
    if isinstance(image, torch.Tensor):
        image = image.detach().cpu()
        image = (image.permute(1, 2, 0) if image.dim() == 3 and image.shape[0] == 3 else image).numpy()
    x = np.asarray(image)
    if x.dtype != np.uint8:
        x = x.astype(np.float64)
        if not np.isfinite(x).all() or x.min() < 0 or x.max() > 1:
            raise UserError(
                f"a picture of {np.asarray(image).dtype} must lie in [0, 1], found {x.min():.3g} to {x.max():.3g}"
            )
        x = np.rint(x * 255).astype(np.uint8)
    if x.ndim != 3 or x.shape[2] != 3:
        raise UserError(f"a picture has the shape {list(x.shape)}, expected [H, W, 3]")
    return x


def to_pil(pixels):
    """[B, 3, H, W] -> list of PIL images."""
    return [Image.fromarray(a.numpy()) for a in to_uint8(pixels)]


def grid(images, nrow=None, labels=None, pad=4, size=10):
    """PIL images -> one sheet, `nrow` a row (default: about square), a label above each, in letters of `size` pixels."""
    nrow = nrow or int(np.ceil(np.sqrt(len(images))))
    nrow = min(nrow, len(images))
    w, h = max(i.width for i in images), max(i.height for i in images)
    font, line_height = ImageFont.load_default(size), size + 4
    rows = [_wrapped(label, w, font) for label in labels] if labels else []
    text = line_height * max(map(len, rows), default=0)
    sheet = Image.new("RGB", (nrow * (w + pad) + pad, -(-len(images) // nrow) * (h + text + pad) + pad), "white")
    pen = ImageDraw.Draw(sheet)
    for i, image in enumerate(images):
        x, y = pad + i % nrow * (w + pad), pad + i // nrow * (h + text + pad)
        for j, line in enumerate(rows[i] if rows else ()):
            pen.text((x, y + line_height * j), line, fill="black", font=font)
        sheet.paste(image, (x, y + text))
    return sheet


def _wrapped(label, width, font, lines=4):
    """A label as lines that are at most `width` pixels wide; what does not fit into `lines` is cut."""
    pen = ImageDraw.Draw(Image.new("RGB", (1, 1)))
    rows = [""]
    for word in printable(label).split():
        if pen.textlength(f"{rows[-1]} {word}".strip(), font) <= width or not rows[-1]:
            rows[-1] = f"{rows[-1]} {word}".strip()
        else:
            rows.append(word)
    rows = rows[:lines]
    for i, row in enumerate(rows):
        if pen.textlength(row, font) > width:  # as many letters as fit, found by halving
            rows[i] = row[
                : max(
                    bisect.bisect(range(len(row) + 1), width, key=lambda n, r=row: pen.textlength(r[:n], font)) - 1, 1
                )
            ]
    return rows


def slug(text, limit=80):
    """A file-name part: letters, digits and _ only (requirement S3-13)."""
    return re.sub(r"[^A-Za-z0-9]+", "_", text).strip("_")[:limit].strip("_") or "empty"


def save_png(image, path, record=None):
    """Write a PNG with the record of how it was made: `parameters` for people, CHUNK (JSON) as the truth."""
    info = PngImagePlugin.PngInfo()
    if record is not None:
        clean = infotext.written(record).encode("utf-8", errors="replace").decode()
        info.add_itxt("parameters", clean)
        info.add_text(CHUNK, json.dumps(record))  # ASCII: lone surrogates survive as escapes
    save(image, path, "PNG", pnginfo=info)


def read_record(path):
    """The record inside a PNG that save_png() wrote. Raises UserError when there is none."""
    try:
        with Image.open(path, formats=["PNG"]) as image:
            image.load()
            text = getattr(image, "text", {}).get(CHUNK)
            record = json.loads(text) if text else None
    except (*FAULTS, RecursionError) as e:
        raise UserError(f"{path}: not a readable PNG: {e}") from None
    if not isinstance(record, dict):
        raise UserError(f"{path}: carries no settings of ours (was it made with `no_metadata` or by another tool?)")
    return record


def recorded(path):
    """What read_record() gives, without decoding the picture; None when it carries nothing. Raises UserError for an unreadable file."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            text = image.info.get(CHUNK)
            record = json.loads(text) if text else None
    except (*FAULTS, RecursionError) as e:
        raise UserError(f"{path}: not a readable image: {e}") from None
    return record if isinstance(record, dict) else None


def save_gif(frames, path, milliseconds=500):
    """PIL images of one size -> a looping GIF; the last frame stays three times as long."""
    times = [milliseconds] * (len(frames) - 1) + [3 * milliseconds]
    save(frames[0], path, "GIF", save_all=True, append_images=frames[1:], duration=times, loop=0)


def save(image, path, kind, **options):
    """Write a PIL image as a file of a kind of Pillow's, there as a whole or not at all. Raises UserError."""
    data = io.BytesIO()
    image.save(data, format=kind, **options)
    write_bytes(path, data.getbuffer())


def save_named(image, path):
    """Write a PIL image in the form that the file's name ends with, one of FORMATS; a PNG where it ends with none of them, or (which is said) where the
    image is larger than the form can be."""
    kind = Image.registered_extensions().get(Path(path).suffix.lower())
    kind = kind if kind in FORMATS else "PNG"
    if max(image.size) > LARGEST.get(kind, math.inf):
        print(
            f"note: {path}: is a PNG, for {image.width}x{image.height} pixels are more than {kind} can have ({LARGEST[kind]} a side)",
            file=sys.stderr,
        )
        kind = "PNG"
    save(image, path, kind, **({"quality": 95} if kind in ("JPEG", "WEBP", "AVIF") else {}))


def save_grid(pixels, path, nrow=None, labels=None):
    """[B, 3, H, W] -> a PNG sheet."""
    out_dir(Path(path).parent)
    save_png(grid(to_pil(pixels), nrow, labels), path)
