"""Draw the embedded data set: colour emoji at 64 px on white, captioned with their Unicode names.

    python assets/emoji/make.py                    # writes assets/emoji/emoji.tar

Needs the font of the Debian package fonts-noto-color-emoji (SIL Open Font License 1.1); no network. The tar is a
webdataset shard: `1f34e.png` and `1f34e.txt` for every emoji, in code point order, with fixed metadata, so the
same font gives the same bytes.

Left out: regional indicators and skin tones (parts, not pictures), enclosed letters and ideographs, keyboard-like
symbols outside the pictograph blocks, and the 24 clock faces, which differ by the position of one hand only.
"""

import io
import sys
import tarfile
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109  # the font's only bitmap size
SIZE = 64
BLOCKS = [range(0x2600, 0x27C0), range(0x1F300, 0x1FB00)]
HERE = Path(__file__).parent


def wanted(cp):
    name = unicodedata.name(chr(cp), "")
    return bool(name) and not 0x1F3FB <= cp <= 0x1F3FF and not name.startswith("CLOCK FACE")


def draw(font, character):
    """The emoji centred on a white SIZE × SIZE square, or None when the font has no picture for it."""
    canvas = Image.new("RGBA", (2 * STRIKE, 2 * STRIKE), (255, 255, 255, 0))
    ImageDraw.Draw(canvas).text((STRIKE // 2, STRIKE // 4), character, font=font, embedded_color=True)
    box = canvas.getbbox()
    if box is None:
        return None
    picture = canvas.crop(box)
    side = max(picture.size) + 8
    square = Image.new("RGBA", (side, side), "white")
    square.alpha_composite(picture, ((side - picture.width) // 2, (side - picture.height) // 2))
    return square.convert("RGB").resize((SIZE, SIZE), Image.Resampling.LANCZOS)


def add(tar, name, data):
    info = tarfile.TarInfo(name)
    info.size, info.mode = len(data), 0o644
    tar.addfile(info, io.BytesIO(data))


def main(target=HERE / "emoji.tar"):
    try:
        font = ImageFont.truetype(FONT, STRIKE)
    except OSError:
        sys.exit(f"error: {FONT} is missing; install the Debian package fonts-noto-color-emoji")
    count = 0
    with tarfile.open(target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for cp in (cp for block in BLOCKS for cp in block if wanted(cp)):
            picture = draw(font, chr(cp))
            if picture is None:
                continue
            data = io.BytesIO()
            picture.save(data, "PNG", optimize=True)
            add(tar, f"{cp:x}.png", data.getvalue())
            add(tar, f"{cp:x}.txt", unicodedata.name(chr(cp)).lower().encode())
            count += 1
    print(f"{target}: {count} captioned pictures, {target.stat().st_size >> 10} kB")


if __name__ == "__main__":
    main()
