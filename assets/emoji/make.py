"""Draw the embedded data set: colour emoji at 64 px on white, captioned with their Unicode names.

    python assets/emoji/make.py                       # writes assets/emoji/emoji.tar: things one can point at
    python assets/emoji/make.py --all out/all.tar     # every pictograph of the font (the VAE was trained on these)

Needs the font of the Debian package fonts-noto-color-emoji (SIL Open Font License 1.1); no network. The tar is a
webdataset shard: `1f34e.png` and `1f34e.txt` for every emoji, in code point order, with fixed metadata, so the
same font gives the same bytes.

Left out everywhere: skin tones and regional indicators (parts, not pictures) and the 24 clock faces, which differ by
the position of one hand. Left out of the embedded set: signs, buttons, office supplies, hands and people, where many
pictures look alike.
"""

import argparse
import io
import sys
import tarfile
import unicodedata
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

FONT = "/usr/share/fonts/truetype/noto/NotoColorEmoji.ttf"
STRIKE = 109  # the font's only bitmap size
SIZE = 64
EVERY = [(0x2600, 0x27C0), (0x1F300, 0x1FB00)]
THEMES = [  # [first, end) code points
    (0x1F300, 0x1F311), (0x1F319, 0x1F321),  # weather and sky, without the phases of the moon
    (0x1F32D, 0x1F380), (0x1F950, 0x1F970), (0x1F9C0, 0x1F9CC), (0x1FAD0, 0x1FADA),  # plants and food
    (0x1F380, 0x1F394), (0x1F3A0, 0x1F3CA),  # celebrations, music, sport
    (0x1F400, 0x1F440), (0x1F980, 0x1F9AF),  # animals
    (0x1F451, 0x1F463), (0x1F479, 0x1F481), (0x1F493, 0x1F4A0), (0x1F525, 0x1F530),  # clothes, fantasy, hearts, tools
    (0x1F600, 0x1F645), (0x1F910, 0x1F918), (0x1F920, 0x1F930), (0x1F970, 0x1F97B),  # faces
    (0x1F680, 0x1F6A3), (0x1F7E0, 0x1F7EC),  # vehicles, coloured circles and squares
]  # fmt: skip


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


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", nargs="?", type=Path, default=Path(__file__).parent / "emoji.tar")
    parser.add_argument("--all", action="store_true", help="every pictograph, not only the themes")
    args = parser.parse_args()
    try:
        font = ImageFont.truetype(FONT, STRIKE)
    except OSError:
        sys.exit(f"error: {FONT} is missing; install the Debian package fonts-noto-color-emoji")
    count = 0
    with tarfile.open(args.target, "w", format=tarfile.USTAR_FORMAT) as tar:
        for cp in sorted(cp for block in (EVERY if args.all else THEMES) for cp in range(*block) if wanted(cp)):
            picture = draw(font, chr(cp))
            if picture is None:
                continue
            data = io.BytesIO()
            picture.save(data, "PNG", optimize=True)
            add(tar, f"{cp:x}.png", data.getvalue())
            add(tar, f"{cp:x}.txt", unicodedata.name(chr(cp)).lower().encode())
            count += 1
    print(f"{args.target}: {count} captioned pictures, {args.target.stat().st_size >> 10} kB")


if __name__ == "__main__":
    main()
