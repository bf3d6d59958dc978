"""A small world of coloured shapes: what is in it, how it is drawn at 64 px, and how it is told in words.

    scene = scenes.random_scene(numpy.random.default_rng(7))     # what is there, and a caption that is true of it
    scene.picture()                                              # a PIL picture, drawn with anti-aliasing
    scene.caption                                                # "a small blue star above a large red heart"

Five tasks: `one` object, `size` (one object whose size is told), `binding` (two objects and their own attributes), `relation`
(two objects and where the one is of the other), `count` (two to four of a kind). Some combinations are never drawn for training
(held_out.json, see HeldOut): a model that draws them all the same has understood the parts they are made of.

Words name a thing in more than one way (a "disc" is a circle), and a relation is told from either side and in three orders. A size
that is not told is any; a ground that is not told is white.
"""

import json
import math
import re
from dataclasses import dataclass, replace
from functools import lru_cache
from itertools import combinations
from pathlib import Path
from typing import NamedTuple

import numpy as np
from PIL import Image, ImageDraw

SIDE = 64
FINE = 8  # sub-pixels along a side of a pixel, from which its coverage is taken
REACH = 1.2  # radii of the circle around an object, which every shape fits into
GAP = 2.5  # pixels between the circles around two objects, at least
MARGIN = 1.5  # and to the edge
RADII = {"small": (6.2, 6.8), "large": (9.6, 10.4)}  # pixels

COLOURS = {"red": (220, 38, 38), "orange": (249, 130, 20), "yellow": (247, 209, 23), "green": (28, 150, 62), "blue": (37, 84, 219),
           "purple": (125, 45, 165), "pink": (250, 120, 185), "black": (28, 28, 32)}  # fmt: skip
NINTH = {"cyan": (0, 185, 200)}  # in no training scene and no word of the grammar: what a LoRA can add
GROUNDS = {"white": (255, 255, 255), "grey": (196, 200, 208), "cream": (250, 232, 196), "mint": (186, 236, 212)}
PAINTS = COLOURS | NINTH
SHAPES = ("circle", "square", "triangle", "diamond", "star", "heart", "moon", "cross")
RELATIONS = ("left", "right", "above", "below")
OPPOSITE = {"left": "right", "right": "left", "above": "below", "below": "above"}
TASKS = ("one", "size", "binding", "relation", "count")

WORDS = {  # every way to say a thing; the first is the plain one
    "circle": ("circle", "disc"), "square": ("square", "box"), "triangle": ("triangle",), "diamond": ("diamond", "rhombus"),
    "star": ("star",), "heart": ("heart",), "moon": ("moon", "crescent"), "cross": ("cross", "plus"),
    "purple": ("purple", "violet"), "small": ("small", "little", "tiny"), "large": ("large", "big", "huge"),
    "left": ("left of", "to the left of"), "right": ("right of", "to the right of"), "above": ("above", "over"),
    "below": ("below", "under"), 2: ("two", "a pair of"), 3: ("three",), 4: ("four",),
}  # fmt: skip
PLURALS = {"box": "boxes", "cross": "crosses", "plus": "pluses", "rhombus": "rhombuses"}


class Kind(NamedTuple):
    """What an object is, wherever and however large it is."""

    colour: str
    shape: str


@dataclass(frozen=True)
class Thing:
    """An object in a scene: its kind, its size's name, its radius and the place of its middle in pixels."""

    kind: Kind
    size: str
    radius: float
    x: float
    y: float


@dataclass(frozen=True)
class Told:
    """What a caption says of a scene. objects: (kind, size or None) of each; relation: of the first to the second, or None."""

    task: str
    objects: tuple
    ground: str = "white"
    relation: str | None = None


@dataclass(frozen=True)
class Scene:
    things: tuple
    ground: str
    told: Told
    caption: str

    def picture(self):
        """A PIL picture, RGB, SIDE × SIDE."""
        return Image.fromarray(draw(self.things, self.ground))


# -- shapes --------------------------------------------------------------------------------------------------


def _arc(cx, cy, r, start, end, n=24):
    """Points of a circle's arc, angles in turns."""
    turns = (start + (end - start) * i / n for i in range(n + 1))
    return [(cx + r * math.cos(2 * math.pi * t), cy + r * math.sin(2 * math.pi * t)) for t in turns]


@lru_cache
def outline(shape):
    """The polygon of a shape of radius 1 around its middle; y points down. Their areas lie within a factor of two."""
    if shape == "circle":
        return _arc(0, 0, 1, 0, 1, 48)
    if shape == "square":
        return [(-0.84, -0.84), (0.84, -0.84), (0.84, 0.84), (-0.84, 0.84)]
    if shape == "triangle":
        return [(0, -1.05), (1.0, 0.66), (-1.0, 0.66)]
    if shape == "diamond":
        return [(0, -1.14), (1.0, 0), (0, 1.14), (-1.0, 0)]
    if shape == "star":
        radii = (1.15, 0.5)
        return [
            (radii[i % 2] * math.sin(math.pi * i / 5), -radii[i % 2] * math.cos(math.pi * i / 5)) for i in range(10)
        ]
    if shape == "heart":  # two half discs on a point
        return _arc(-0.5, -0.4, 0.52, 0.42, 1.0, 16) + _arc(0.5, -0.4, 0.52, 0.5, 1.08, 16) + [(0, 1.02)]
    if shape == "moon":  # a disc without another one to its right
        inner, shift = 0.8, 0.62
        x = (shift**2 + 1 - inner**2) / (2 * shift)  # where the two circles meet
        outer_turn = math.acos(x) / (2 * math.pi)
        inner_turn = math.acos((x - shift) / inner) / (2 * math.pi)
        outer = _arc(0, 0, 1, outer_turn, 1 - outer_turn, 40)
        hollow = _arc(shift, 0, inner, 1 - inner_turn, inner_turn, 32)
        return [(px + 0.12, py) for px, py in outer + hollow]
    if shape == "cross":
        a, b = 0.36, 1.02
        corner = [(a, -b), (a, -a), (b, -a)]  # of the first quarter; the others are it, turned
        turned = [(1, 0, 0, 1), (0, -1, 1, 0), (-1, 0, 0, -1), (0, 1, -1, 0)]
        return [(p * x + q * y, r * x + s * y) for p, q, r, s in turned for x, y in corner]
    raise ValueError(f"no shape {shape!r}")


def coverage(thing):
    """(left, top, share of each pixel [h, w] in [0, 1] that a thing covers)"""
    reach = REACH * thing.radius + 1
    left, top = math.floor(thing.x - reach), math.floor(thing.y - reach)
    side = math.ceil(2 * reach) + 2
    mask = Image.new("L", (side * FINE, side * FINE))
    place = lambda px, py: (  # noqa: E731
        (thing.x - left + thing.radius * px) * FINE - 0.5,
        (thing.y - top + thing.radius * py) * FINE - 0.5,
    )
    ImageDraw.Draw(mask).polygon([place(*p) for p in outline(thing.kind.shape)], fill=255)
    return left, top, np.asarray(mask.reduce(FINE), np.float32) / 255


def draw(things, ground):
    """RGB bytes [SIDE, SIDE, 3]."""
    canvas = np.empty((SIDE, SIDE, 3), np.float32)
    canvas[:] = GROUNDS[ground]
    for thing in things:
        left, top, cover = coverage(thing)
        x0, y0, x1, y1 = max(left, 0), max(top, 0), min(left + cover.shape[1], SIDE), min(top + cover.shape[0], SIDE)
        a = cover[y0 - top : y1 - top, x0 - left : x1 - left, None]
        canvas[y0:y1, x0:x1] += a * (np.asarray(PAINTS[thing.kind.colour], np.float32) - canvas[y0:y1, x0:x1])
    return np.rint(canvas).astype(np.uint8)


# -- what is held out ----------------------------------------------------------------------------------------


KINDS = tuple(Kind(c, s) for c in COLOURS for s in SHAPES)


class HeldOut(NamedTuple):
    """Combinations that are in no training scene. kinds: an eighth of all colours with shapes, each colour and each shape once;
    pairs: a tenth of the pairs of the other kinds, in no scene together; relations: (colour, relation): no object of this colour
    stands in this relation to another, whether the caption tells it or not."""

    kinds: frozenset
    pairs: frozenset
    relations: frozenset

    def why(self, things):
        """What of a scene's things is held out: "kind", "pair", "relation", or None. things: two or more of one kind, or two kinds."""
        kinds = {t.kind for t in things}
        if kinds & self.kinds:
            return "kind"
        if len(kinds) == 2:
            if frozenset(kinds) in self.pairs:
                return "pair"
            a, b = things
            if any((x.kind.colour, relation(x, y)) in self.relations for x, y in ((a, b), (b, a))):
                return "relation"
        return None


def choose_held_out(seed=2024):
    """The lists of held_out.json."""
    rng = np.random.default_rng(seed)
    kinds = [Kind(c, SHAPES[i]) for c, i in zip(COLOURS, rng.permutation(len(SHAPES)), strict=True)]
    pairs = list(combinations([k for k in KINDS if k not in kinds], 2))
    chosen = sorted(rng.choice(len(pairs), len(pairs) // 10, replace=False).tolist())
    return {"kinds": [list(k) for k in kinds], "pairs": [[list(k) for k in pairs[i]] for i in chosen],
            "relations": [["orange", "above"], ["blue", "left"]]}  # fmt: skip


@lru_cache
def held_out():
    raw = json.loads((Path(__file__).parent / "held_out.json").read_text())
    return HeldOut(
        frozenset(Kind(*k) for k in raw["kinds"]),
        frozenset(frozenset(Kind(*k) for k in pair) for pair in raw["pairs"]),
        frozenset(map(tuple, raw["relations"])),
    )


# -- scenes --------------------------------------------------------------------------------------------------


def relation(a, b):
    """Where a is of b: along the axis on which their middles are further apart."""
    dx, dy = a.x - b.x, a.y - b.y
    if abs(dx) > abs(dy):
        return "left" if dx < 0 else "right"
    return "above" if dy < 0 else "below"


def _places(rng, radii, clear):
    """Middles [N, 2] of objects of these radii that do not touch, or None. clear: two, one of them clearly beside or above the other."""
    reach = REACH * np.asarray(radii)
    low, high = reach + MARGIN, SIDE - reach - MARGIN
    many = (64, 64, 512, 4096)[len(radii) - 1]
    for _ in range(20):
        tries = low[:, None] + (high - low)[:, None] * rng.random((many, len(radii), 2))
        for i, j in combinations(range(len(radii)), 2):
            apart = np.abs(tries[:, i] - tries[:, j])
            good = np.hypot(*apart.T) >= reach[i] + reach[j] + GAP
            if clear:
                good &= apart.min(1) <= 0.5 * apart.max(1)
            tries = tries[good]
        if len(tries):
            return tries[0]
    return None


def random_things(rng, task):
    """The things of a scene and their ground, at random, held out or not."""
    kind = lambda: KINDS[rng.integers(len(KINDS))]  # noqa: E731
    size = lambda: ("small", "large")[rng.integers(2)]  # noqa: E731
    ground = "white" if rng.random() < 0.5 else tuple(GROUNDS)[1 + rng.integers(3)]
    while True:
        if task == "count":
            same, how, many = kind(), size(), 2 + rng.integers(3)
            what = [(same, how)] * many
        elif task in ("one", "size"):
            what = [(kind(), size())]
        else:
            what = [(kind(), size()), (kind(), size())]
            if what[0][0] == what[1][0]:
                continue
        radii = [rng.uniform(*RADII[how]) for _, how in what]
        places = _places(rng, radii, task == "relation")
        if places is not None:
            return tuple(
                Thing(k, how, float(r), float(x), float(y))
                for (k, how), r, (x, y) in zip(what, radii, places, strict=True)
            ), ground


def random_scene(rng, task=None, held=False, colour=None, in_order=0.0):
    """A scene and a caption of it. task: of TASKS, default any; held: False, for training (nothing held out), True (something
    is), None (as it comes). colour: of PAINTS, that the first object has (each, where they are of a kind); default any. in_order:
    share of the captions of two objects that name the one on the left, or above, first; the others name either."""
    if held and colour in NINTH:
        raise ValueError(f"{colour} is in no scene at all, so nothing of it is held out")
    task = task or str(rng.choice(TASKS, p=(0.1, 0.1, 0.15, 0.4, 0.25)))
    while True:
        things, ground = random_things(rng, task)
        if colour:
            what = Kind(colour, things[0].kind.shape)
            things = tuple(replace(t, kind=what) if i == 0 or task == "count" else t for i, t in enumerate(things))
            if len({t.kind for t in things}) < len(things) and task != "count":  # two became alike
                continue
        if held is None or held == bool(held_out().why(things)):
            break
    ordered = bool(in_order) and rng.random() < in_order and task in ("binding", "relation")
    if ordered and relation(*things) in ("right", "below"):
        things = things[::-1]
    told = Told(task, tuple((t.kind, t.size if task == "size" or rng.random() < 0.4 else None) for t in things), ground,
                relation(*things) if task == "relation" else None)  # fmt: skip
    if task == "count":
        told = Told(task, (told.objects[0],) * len(things), ground)
    return Scene(things, ground, told, caption(told, rng, ordered))


# -- words ---------------------------------------------------------------------------------------------------


def vocabulary():
    """Every word of the captions."""
    told = [w for ways in WORDS.values() for way in ways for w in way.split()]
    shapes = [w for s in SHAPES for w in WORDS[s]]
    return sorted(
        {*told, *COLOURS, *GROUNDS, *map(plural, shapes), *["a", "an", "and", "background", "is", "it", "on", "with"]}
    )


def plural(word):
    return PLURALS.get(word, word + "s")


def say(thing, rng=None):
    """One of the ways to say it; without rng the plain one."""
    ways = WORDS.get(thing, (thing,))
    return ways[rng.integers(len(ways))] if rng is not None else ways[0]


def caption(told, rng=None, in_order=False):
    """A sentence that says what `told` holds. rng: draws synonyms and word order; without it the plain way. in_order: the first object of
    `told` is named first, whichever way it is said."""
    pick = lambda *ways: ways[rng.integers(len(ways))] if rng is not None else ways[0]  # noqa: E731

    def words(thing, many=False):
        kind, size = thing
        shape = say(kind.shape, rng)
        adjectives = ([say(size, rng)] if size else []) + [say(kind.colour, rng)]
        return " ".join([*adjectives, plural(shape) if many else shape])

    def one(thing):
        text = words(thing)
        return ("an " if text[0] in "aeiou" else "a ") + text

    if told.task == "count":
        text = f"{say(len(told.objects), rng)} {words(told.objects[0], many=True)}"
    elif told.task == "relation":
        a, b = told.objects
        rel = told.relation
        way = pick(0, 1, 2) if in_order else None  # all but the first begin with the other object
        if way if in_order else pick(False, True):
            a, b, rel = b, a, OPPOSITE[rel]
        where = say(rel, rng)
        ways = (f"{one(a)} {where} {one(b)}", f"{one(b)} with {one(a)} {where} it", f"{where} {one(b)} is {one(a)}")
        text = ways[way] if in_order else pick(*ways)
    else:
        text = " and ".join(one(t) for t in told.objects)
    if told.ground != "white":
        text += pick(f" on {told.ground}", f" on a {told.ground} background")
    elif pick(False, False, False, True):
        text += pick(" on white", " on a white background")
    return text


@lru_cache
def _grammar():
    """[(task, regular expression, what its groups are)] of the sentences of caption(), without the ground; {word: thing} beside it."""
    ways = lambda things: {way: thing for thing in things for way in WORDS.get(thing, (thing,))}  # noqa: E731
    shapes, colours, sizes, relations, counts = map(ways, (SHAPES, COLOURS, ("small", "large"), RELATIONS, (2, 3, 4)))
    many = {plural(word): shape for word, shape in shapes.items()}
    either = lambda words: "(" + "|".join(sorted(words, reverse=True)) + ")"  # noqa: E731
    kind = f"(?:{either(sizes)} )?{either(colours)} "
    one, where = f"an? {kind}{either(shapes)}", either(relations)
    forms = [("one", one, "a"), ("binding", f"{one} and {one}", "ab"), ("relation", f"{one} {where} {one}", "arb"),
             ("relation", f"{one} with {one} {where} it", "bar"), ("relation", f"{where} {one} is {one}", "rba"),
             ("count", f"{either(counts)} {kind}{either(many)}", "na")]  # fmt: skip
    named = shapes | many | colours | sizes | relations | counts
    return [(task, re.compile(form), parts) for task, form, parts in forms], named


def parse(text):
    """What a sentence of caption()'s grammar says, or None for any other text. "a" may stand for "an", and "background" be left out."""
    text = " ".join(text.lower().split()).rstrip(".")
    ground = re.search(rf" on (?:a )?({'|'.join(GROUNDS)})(?: background)?$", text)
    text = text[: ground.start()] if ground else text
    forms, named = _grammar()
    for task, form, parts in forms:
        if found := form.fullmatch(text):
            groups = iter(found.groups())
            got = {part: next(groups) if part in "rn" else [next(groups) for _ in range(3)] for part in parts}
            things = [(Kind(named[c], named[s]), named.get(size)) for size, c, s in (got[p] for p in "ab" if p in got)]
            if task == "count":
                things *= named[got["n"]]
            elif task == "one" and things[0][1]:
                task = "size"
            return Told(task, tuple(things), ground[1] if ground else "white", named[got["r"]] if "r" in got else None)
    return None
