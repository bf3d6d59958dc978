"""The Corel pictures as training folders: `XXXX_YYYY.png` (class, number) + `classes.txt` become

    training_data/corel/corel_all/   class_XXXX/      each with *.png and captions.json {file: "a photo of a NAME"}

    python -m nanodiff.data prepare-corel --data-dir data/corel --base-dir .
    python -m nanodiff.corel stand-in FOLDER          a small drawn data set in the same layout, to try the workflow with

classes.txt has a line a class: `0001 african people`, or just the names, in the order of their numbers.
"""

import argparse
import json
import re
import shutil
import sys
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw

from nanodiff.commandline import tool
from nanodiff.config import UserError, printable
from nanodiff.data import tables
from nanodiff.files import write_bytes
from nanodiff.output import images

NAME = re.compile(r"(\d+)_(\d+)\.(png|jpe?g|bmp|gif|tiff?|webp|jfif)", re.IGNORECASE)
SHOWN = 6  # pictures of a class in the overview


def arguments(parser):
    parser.add_argument(
        "--data-dir", "--data_dir", default="data/corel", help="where XXXX_YYYY.png and classes.txt are"
    )
    parser.add_argument("--base-dir", "--base_dir", default=".", help="folder that relative paths start from")
    parser.add_argument("--output-dir", "--output_dir", default="training_data/corel", help="where the folders go")
    parser.add_argument("--figs-dir", "--figs_dir", default="figs", help="where the overview goes")
    parser.add_argument("--no-visualize", "--no_visualize", action="store_true", help="draw no overview")


def prepare(data_dir, base_dir=".", output_dir="training_data/corel", figs_dir="figs", visualize=True):
    """Write the folders of the module docstring; returns nothing. Raises UserError when there is nothing to prepare."""
    source, target, figs = (Path(base_dir) / p for p in (data_dir, output_dir, figs_dir))
    if not source.is_dir():
        raise UserError(f"{source}: no such folder")
    # of an earlier run, when they lie in the source
    made = [p.resolve() for p in (target, figs) if p.resolve() != source.resolve()]
    here = [p for p in source.rglob("*") if tables.is_data(p.relative_to(source)) and p.is_file()]
    here = [p for p in here if not set(made) & set(p.resolve().parents)]
    found = sorted((m[1], p) for p in here if (m := NAME.fullmatch(p.name)))
    if not found:
        raise UserError(f"{source}: No images found (names must be CLASS_NUMBER.png, such as 0001_0042.png)")
    others = [p for p in here if p.suffix.lower() in images.SUFFIXES and not NAME.fullmatch(p.name)]
    if others:
        print(
            f"note: {len(others)} pictures are not called CLASS_NUMBER, and left out, such as {printable(others[0])}",
            file=sys.stderr,
        )
    places = {}
    for _, path in found:
        if (other := places.setdefault(path.name, path)) != path:
            raise UserError(f"{other} and {path} have one name, so one would be lost; rename one")
    names = _classes(source / "classes.txt", sorted({c for c, _ in found}))
    captions = {}
    for code, path in found:
        images.open_image(path)  # a broken picture stops here, by name
        for folder in ("corel_all", f"class_{code}"):
            try:
                (target / folder).mkdir(parents=True, exist_ok=True)
                shutil.copyfile(path, target / folder / path.name)
            except OSError as e:
                raise UserError(f"{target / folder / path.name}: cannot be written: {e.strerror}") from None
            captions.setdefault(folder, {})[path.name] = f"a photo of a {names[code]}"
    for folder, texts in captions.items():
        write_bytes(target / folder / "captions.json", json.dumps(texts, indent=1, ensure_ascii=False).encode())
    print(f"{target}: {len(found)} pictures in {len(names)} classes")
    if visualize:
        _overview(found, names, figs / "corel_dataset_samples.png")


def _classes(path, codes):
    """{code: name} of classes.txt; where it is missing, it is written with generic names, and said."""
    if not path.exists():
        names = {c: f"class {c}" for c in codes}
        write_bytes(path, "".join(f"{c} {n}\n" for c, n in names.items()).encode())
        print(
            f"WARNING: {path} was missing and has been written with generic names ({names[codes[0]]}, …); "
            "captions made from it say nothing: put the real names in and run this again",
            file=sys.stderr,
        )
        return names
    lines = tables.lines(path)
    numbered = [re.fullmatch(r"(\d+)[\s:,;]+(.+)", line) for line in lines]
    if lines and all(numbered):
        names = {m[1].zfill(len(codes[0])): m[2] for m in numbered}
        if len(names) < len(lines):
            raise UserError(f"{path}: names a class twice")
    elif len(lines) == len(codes):
        names = dict(zip(codes, lines, strict=True))
    else:
        raise UserError(f"{path}: {len(lines)} names for {len(codes)} classes: write the class number before each name")
    if missing := [c for c in codes if c not in names]:
        raise UserError(f"{path}: no name for class {', '.join(missing[:5])}")
    return {c: printable(names[c]) for c in codes}


def _overview(found, names, target):
    """A sheet with the first pictures of every class."""
    chosen = {}
    for code, path in found:
        chosen.setdefault(code, []).append(path)
    rows = [(images.fit(images.open_image(p), 96, 96), names[c]) for c, ps in chosen.items() for p in ps[:SHOWN]]
    target.parent.mkdir(parents=True, exist_ok=True)
    images.save_png(images.grid([i for i, _ in rows], SHOWN, [n for _, n in rows]), target)
    print(target)


def stand_in(folder, classes=4, each=12, size=128, seed=0):
    """Draw a data set in the Corel layout: `classes` kinds of simple scenes, `each` pictures of a kind."""
    folder, rng = Path(folder), np.random.default_rng(seed)
    folder.mkdir(parents=True, exist_ok=True)
    kinds = ["sunset", "meadow", "beach", "night sky", "mountain", "forest"][:classes]
    for k, kind in enumerate(kinds):
        for i in range(each):
            images.save_png(_scene(kind, size, rng), folder / f"{k + 1:04d}_{i:04d}.png")
    (folder / "classes.txt").write_text(
        "".join(f"{k + 1:04d} {kind}\n" for k, kind in enumerate(kinds)), encoding="utf-8"
    )
    print(f"{folder}: {len(kinds) * each} pictures in {len(kinds)} classes")


def _scene(kind, size, rng):
    """One picture: a sky, a ground, and a few things at random places."""
    skies = {"sunset": (255, 140, 60), "meadow": (150, 200, 255), "beach": (120, 190, 250), "night sky": (15, 15, 50),
             "mountain": (190, 215, 240), "forest": (170, 200, 190)}  # fmt: skip
    grounds = {"sunset": (90, 40, 60), "meadow": (70, 160, 60), "beach": (235, 210, 150), "night sky": (20, 30, 30),
               "mountain": (110, 100, 90), "forest": (40, 90, 50)}  # fmt: skip
    shift = rng.integers(-15, 16, 3)
    image = Image.new("RGB", (size, size), tuple(np.clip(np.array(skies[kind]) + shift, 0, 255).tolist()))
    pen, horizon = ImageDraw.Draw(image), int(size * rng.uniform(0.5, 0.7))
    pen.rectangle((0, horizon, size, size), fill=tuple(np.clip(np.array(grounds[kind]) + shift, 0, 255).tolist()))
    x, y, r = rng.uniform(0.2, 0.8) * size, rng.uniform(0.1, 0.35) * size, size * rng.uniform(0.06, 0.12)
    if kind in ("sunset", "meadow", "beach"):
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(255, 240, 150))
    elif kind == "night sky":
        for sx, sy in rng.uniform(0, 1, (25, 2)):
            pen.point((sx * size, sy * horizon), fill="white")
        pen.ellipse((x - r, y - r, x + r, y + r), fill=(230, 230, 220))
    else:
        for _ in range(3 if kind == "mountain" else 9):
            w, h = size * rng.uniform(0.1, 0.3), size * rng.uniform(0.2, 0.45)
            at, colour = rng.uniform(0, size), (95, 95, 110) if kind == "mountain" else (25, 70, 35)
            pen.polygon([(at - w, horizon), (at, horizon - h), (at + w, horizon)], fill=colour)
    return image


def main():
    parser = argparse.ArgumentParser(prog="python -m nanodiff.corel", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    commands.add_parser("stand-in", help="draw a small data set in the Corel layout").add_argument("folder")
    args = parser.parse_args()
    return tool(lambda: stand_in(args.folder))


if __name__ == "__main__":
    sys.exit(main())
