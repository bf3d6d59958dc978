"""Only the masked part of a picture: cut out, enlarged to the model's size, and what was drawn pasted back under the mask, as diffusers
does it (its `padding_mask_crop`), to the pixel."""

from PIL import Image, ImageFilter, ImageOps

from nanodiff.config import UserError

LANCZOS = Image.Resampling.LANCZOS


def blurred(mask, radius):
    """The mask with a soft edge: a Gaussian of `radius` pixels."""
    return mask.filter(ImageFilter.GaussianBlur(radius))


def region(mask, width, height, pad):
    """(left, top, right, bottom) of the smallest part of the mask (PIL, "L") that holds all of it that is not black, and `pad` pixels
    around it, made as wide or as high as width : height asks for, inside the picture. Raises UserError for a black mask."""
    box = mask.getbbox()
    if box is None:
        raise UserError("the mask is black: nothing is to be repainted")
    left, top = (max(v - pad, 0) for v in box[:2])
    right, bottom = min(box[2] + pad, mask.width), min(box[3] + pad, mask.height)
    if (right - left) / (bottom - top) > width / height:
        top, bottom = _stretched(top, bottom, int((right - left) / (width / height) - (bottom - top)), mask.height)
    else:
        left, right = _stretched(left, right, int((bottom - top) * (width / height) - (right - left)), mask.width)
    return left, top, right, bottom


def _stretched(first, last, more, most):
    """An interval longer by `more`, half of it at each end, moved and then cut so that it lies in 0..most."""
    first, last = first - more // 2, last + more - more // 2
    if last >= most:
        first, last = first - (last - most), most
    if first < 0:
        first, last = 0, last - first
    return first, min(last, most)


def enlarged(picture, box, width, height):
    """The part `box` of a picture in width × height, its proportions kept; what that leaves free is filled with its edges' rows or columns."""
    part = picture.crop(box)
    wider = part.width / part.height > width / height  # than what is asked for
    w = width if wider else part.width * height // part.height
    h = part.height * width // part.width if wider else height
    part = part.resize((w, h), LANCZOS)
    out, left, top = Image.new(part.mode, (width, height)), width // 2 - w // 2, height // 2 - h // 2
    out.paste(part, (left, top))
    if wider and top > 0:
        out.paste(part.resize((width, top), box=(0, 0, width, 0)), (0, 0))
        out.paste(part.resize((width, top), box=(0, h, width, h)), (0, top + h))
    elif not wider and left > 0:
        out.paste(part.resize((left, height), box=(0, 0, 0, height)), (0, 0))
        out.paste(part.resize((left, height), box=(w, 0, w, height)), (left + w, 0))
    return out


def pasted(drawn, picture, mask, box):
    """`picture` (RGB) with what was drawn for its part `box` under the mask ("L", as large as the picture)."""
    width, height = box[2] - box[0], box[3] - box[1]
    wider = drawn.width / drawn.height > width / height
    w = drawn.width * height // drawn.height if wider else width
    h = height if wider else drawn.height * width // drawn.width
    fitted = Image.new("RGB", (width, height))
    fitted.paste(drawn.resize((w, h), LANCZOS), (width // 2 - w // 2, height // 2 - h // 2))
    out = Image.new("RGB", picture.size)
    out.paste(fitted, box[:2])
    kept = Image.new("RGBa", picture.size)
    kept.paste(picture.convert("RGBA").convert("RGBa"), mask=ImageOps.invert(mask))
    out = out.convert("RGBA")
    out.alpha_composite(kept.convert("RGBA"))
    return out.convert("RGB")
