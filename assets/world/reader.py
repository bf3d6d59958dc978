"""Reading a scene off its pixels: which objects are where, and is a caption true of them?

    read = reader.read(pixels)               # uint8 [64, 64, 3] -> Reading(things, ground, why)
    reader.true_of(read, scene.told)         # None when the caption is true, else what is wrong: "count", "colour", "shape", …
    python -m assets.world.reader            # its accuracy on real scenes, also blurred

No network and nothing learned. What differs from the ground falls into connected components; a component's colour is the nearest of the
palette; its shape is the one which, drawn with the same area in the same place, differs least from it. What fits nothing is not guessed:
the reading then says why, and no caption is true of it.
"""

import argparse
import math
import sys
from collections import Counter
from functools import lru_cache
from itertools import permutations
from typing import NamedTuple

import numpy as np
from PIL import ImageFilter
from scipy import ndimage
from tqdm import tqdm

from assets.world.scenes import GROUNDS, PAINTS, RADII, SHAPES, SIDE, Kind, Thing, coverage, random_scene, relation
from nanodiff.commandline import at_least, numbers, tool
from nanodiff.config import UserError

DIFFERS = 60.0  # from the ground, as a Euclidean distance of RGB bytes, beyond which a pixel belongs to an object
SPECK = 10  # pixels; less is no object
FAR = 75.0  # a colour further than this from all of the palette is none
MISFIT = 0.42  # of an object's area that may differ from its shape's
SIZES = (5.2, 13.0)  # radii that are a size at all
MIDDLE = (RADII["small"][1] + RADII["large"][0]) / 2
SEED = 2_000_000  # of the scenes that main() reads

PALETTE = np.array(list(PAINTS.values()), np.float32)
GROUND = np.array(list(GROUNDS.values()), np.float32)


class Reading(NamedTuple):
    """things: what was read, with None for what could not be; ground: its name, or None; why: None, or the first thing that could not be read:
    "ground", "colour", "shape", "size"."""

    things: tuple
    ground: str | None
    why: str | None = None


def _nearest(colour, palette, names, far):
    distance = np.linalg.norm(palette - colour, axis=1)
    return names[distance.argmin()] if distance.min() <= far else None


@lru_cache
def _area(shape):
    """Of radius 1: r² times this is what coverage() sums to."""
    return float(coverage(Thing(Kind("black", shape), "large", 16.0, 32.0, 32.0))[2].sum()) / 256


@lru_cache
def _middle(shape):
    """Where the centre of mass of radius 1 is from the middle: (x, y)."""
    left, top, cover = coverage(Thing(Kind("black", shape), "large", 16.0, 0.0, 0.0))
    ys, xs = np.mgrid[: cover.shape[0], : cover.shape[1]]
    return tuple(
        float((grid + 0.5 + first) @ cover.ravel() / cover.sum()) / 16
        for grid, first in ((xs.ravel(), left), (ys.ravel(), top))
    )


@lru_cache(maxsize=1 << 14)
def _template(shape, radius, x, y):
    return coverage(Thing(Kind("black", shape), "large", radius, x, y))


def _fit(cover, shape):
    """(share of the area that differs, radius, x, y) of a shape drawn in place of an object. cover [SIDE, SIDE]."""
    area = cover.sum()
    ys, xs = np.nonzero(cover)
    mass = cover[ys, xs] / area
    radius = (area / _area(shape)) ** 0.5
    dx, dy = _middle(shape)
    x, y = (xs + 0.5) @ mass - radius * dx, (ys + 0.5) @ mass - radius * dy
    if not 2 <= radius <= 24:
        return np.inf, radius, x, y
    near = lambda v: round(4 * v) / 4  # noqa: E731
    left, top, drawn = _template(shape, near(radius), near(x % 1), near(y % 1))
    left, top = left + int(x // 1), top + int(y // 1)
    canvas = np.zeros((SIDE + 64, SIDE + 64), np.float32)  # a shape may reach over the edge
    if not (left >= -32 and top >= -32 and left + drawn.shape[1] <= SIDE + 32 and top + drawn.shape[0] <= SIDE + 32):
        return np.inf, radius, x, y
    canvas[top + 32 : top + 32 + drawn.shape[0], left + 32 : left + 32 + drawn.shape[1]] = drawn
    canvas[32:-32, 32:-32] -= cover
    return np.abs(canvas).sum() / area, radius, x, y


def _object(pixels, ground, mine):
    """(Thing, None or the first of "colour", "shape", "size" that cannot be read of it and is None there). mine: its pixels [SIDE, SIDE]."""
    away = np.linalg.norm(pixels - ground, axis=2)
    inside = mine & (away >= np.quantile(away[mine], 0.5))
    found = np.median(pixels[inside], axis=0)
    colour = _nearest(found, PALETTE, tuple(PAINTS), FAR)
    direction = (np.asarray(PAINTS[colour], np.float32) if colour else found) - ground
    cover = ((pixels - ground) @ direction / (direction @ direction)).clip(0, 1)
    cover = np.where(ndimage.binary_dilation(mine, iterations=2), cover, 0)
    cover[cover < 0.06] = 0
    misfit, radius, x, y, shape = min((*_fit(cover, s), s) for s in SHAPES)
    shape = shape if misfit <= MISFIT else None
    size = ("small" if radius < MIDDLE else "large") if SIZES[0] <= radius <= SIZES[1] else None
    why = next((name for name, part in (("colour", colour), ("shape", shape), ("size", size)) if part is None), None)
    return Thing(Kind(colour, shape), size, float(radius), float(x), float(y)), why


def read(pixels):
    """pixels: uint8 [SIDE, SIDE, 3] -> Reading."""
    pixels = np.asarray(pixels, np.float32)
    rim = np.concatenate([pixels[0], pixels[-1], pixels[1:-1, 0], pixels[1:-1, -1]])
    ground = np.median(rim, axis=0)
    name = _nearest(ground, GROUND, tuple(GROUNDS), 30.0)
    if name is None:
        return Reading((), None, "ground")
    labels, count = ndimage.label(np.linalg.norm(pixels - ground, axis=2) > DIFFERS, np.ones((3, 3)))
    things, why = [], None
    for i in range(1, count + 1):
        mine = labels == i
        if mine.sum() >= SPECK:
            thing, unread = _object(pixels, ground, mine)
            things.append(thing)
            why = why or unread
    return Reading(tuple(things), name, why)


def parts_of(read, told):
    """{"count", "ground", "colour", "shape", "size", "relation": is it as told?}: each part alone, whatever the others are; "colour" and "shape"
    as sets over all objects, "size" of one object and "relation" of two where they are told."""
    things, kinds = read.things, [k for k, _ in told.objects]
    alike = lambda name: Counter(getattr(t.kind, name) for t in things) == Counter(getattr(k, name) for k in kinds)  # noqa: E731
    out = {
        "count": len(things) == len(kinds),
        "ground": read.ground == told.ground,
        "colour": alike("colour"),
        "shape": alike("shape"),
    }
    if told.task == "size":
        out["size"] = [t.size for t in things] == [told.objects[0][1]]
    if told.relation:
        order = [[t for t in things if t.kind == k] for k in kinds]
        out["relation"] = all(len(o) == 1 for o in order) and relation(*(o[0] for o in order)) == told.relation
    return out


def true_of(read, told):
    """None when what was read is what the caption says, else the first thing that is wrong: what the reader could not read, "count",
    "ground", "colour", "shape", "size", "binding" (the parts are there, on other objects), "relation"."""
    if read.why:
        return read.why
    if len(read.things) != len(told.objects):
        return "count"
    if read.ground != told.ground:
        return "ground"
    sized = lambda thing, size: size in (None, thing.size)  # noqa: E731
    wrong = None
    for order in permutations(read.things):
        pairs = list(zip(order, told.objects, strict=True))
        if all(t.kind == kind for t, (kind, _) in pairs):
            if not all(sized(t, size) for t, (_, size) in pairs):
                wrong = wrong or "size"
            elif told.relation and relation(*order) != told.relation:
                wrong = "relation"
            else:
                return None
    if wrong:
        return wrong
    for part in ("colour", "shape"):
        if sorted(getattr(t.kind, part) for t in read.things) != sorted(getattr(k, part) for k, _ in told.objects):
            return part
    return "binding"


def main():
    """How many real scenes are read right, also blurred."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--scenes", type=at_least(1), default=5000)
    parser.add_argument(
        "--blur",
        type=numbers(float),
        default=[0, 0.5, 0.8, 1, 1.2, 1.5],
        help="standard deviations of a Gaussian blur in pixels, comma-separated",
    )
    args = parser.parse_args()
    return tool(lambda: run(args))


def run(args):
    if odd := [blur for blur in args.blur if not 0 <= blur < math.inf]:
        raise UserError(f"--blur {odd[0]:g}: is no standard deviation")
    print("| blur | right | wrong |\n|---|---|---|")
    for blur in args.blur:
        wrong = Counter()
        for i in tqdm(range(args.scenes), desc=f"blur {blur:g}", disable=None, leave=False):
            scene = random_scene(np.random.default_rng((SEED, i)), held=None)
            pixels = np.asarray(scene.picture().filter(ImageFilter.GaussianBlur(blur)) if blur else scene.picture())
            wrong[true_of(read(pixels), scene.told)] += 1
        right = wrong.pop(None, 0)
        print(
            f"| {blur:g} | {right / args.scenes:.4f} | {', '.join(f'{n} {what}' for what, n in wrong.most_common()) or 'none'} |",
            flush=True,
        )


if __name__ == "__main__":
    sys.exit(main())
