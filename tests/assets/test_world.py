"""The small world: its grammar, what is held out, and the reader that says what is in a picture."""

import json
import tarfile
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
from PIL import Image, ImageFilter

from assets.world import reader, scenes
from assets.world.scenes import KINDS, SHAPES, Kind, Thing, Told


def scene(i, task=None, held=None, seed=3):
    return scenes.random_scene(np.random.default_rng((seed, i)), task, held)


def test_no_held_out_combination_in_100_000_drawn_scenes():
    """By the lists of the file, not by the generator's own rule."""
    raw = json.loads((scenes.Path(scenes.__file__).parent / "held_out.json").read_text())
    kinds = {tuple(k) for k in raw["kinds"]}
    pairs = {frozenset(map(tuple, p)) for p in raw["pairs"]}
    relations = {tuple(r) for r in raw["relations"]}
    rng = np.random.default_rng(11)
    seen, together = set(), set()
    for _ in range(100_000):
        s = scenes.random_scene(rng)
        mine = {tuple(t.kind) for t in s.things}
        assert not mine & kinds and frozenset(mine) not in pairs
        if len(mine) == 2:
            a, b = s.things
            for x, y in ((a, b), (b, a)):
                dx, dy = x.x - y.x, x.y - y.y
                where = ("left" if dx < 0 else "right") if abs(dx) > abs(dy) else "above" if dy < 0 else "below"
                assert (x.kind.colour, where) not in relations
            together.add(frozenset(mine))
        seen |= mine
    assert len(seen) == len(KINDS) - len(kinds) == 56
    assert len(together) > 0.99 * (56 * 55 // 2 - len(pairs))  # nothing else is missing


def test_the_held_out_lists():
    """An eighth of the kinds, with each colour and each shape once; a tenth of the pairs of the others; they are written down."""
    raw = json.loads((scenes.Path(scenes.__file__).parent / "held_out.json").read_text())
    assert raw == scenes.choose_held_out()
    held = scenes.held_out()
    assert len(held.kinds) == 8 == len({k.colour for k in held.kinds}) == len({k.shape for k in held.kinds})
    assert len(held.pairs) == 154 and not any(k in held.kinds for pair in held.pairs for k in pair)
    assert held.relations


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_scene_is_drawn_again_from_its_seed_and_its_caption_is_true(task):
    for i in range(60):
        s = scene(i, task)
        assert s == scene(i, task)
        read = reader.read(s.picture())
        assert reader.true_of(read, s.told) is None, s.caption
        assert Counter((t.kind, t.size) for t in read.things) == Counter((t.kind, t.size) for t in s.things)
        words = s.caption.split()
        assert set(words) <= set(scenes.vocabulary()) and len(words) <= 18


def test_objects_do_not_touch_and_stay_inside():
    for i in range(300):
        s = scene(i)
        for a, b in combinations(s.things, 2):
            assert np.hypot(a.x - b.x, a.y - b.y) >= scenes.REACH * (a.radius + b.radius) + scenes.GAP
        for t in s.things:
            assert min(t.x, t.y, scenes.SIDE - t.x, scenes.SIDE - t.y) >= scenes.REACH * t.radius + scenes.MARGIN


@pytest.mark.parametrize("shape", SHAPES)
def test_shapes_fit_into_their_circle_and_are_drawn_where_they_are(shape):
    assert all(np.hypot(x, y) <= scenes.REACH for x, y in scenes.outline(shape))
    big = Thing(Kind("black", shape), "large", 11.0, 30.25, 33.5)
    left, top, cover = scenes.coverage(big)
    ys, xs = np.mgrid[: cover.shape[0], : cover.shape[1]]
    # twice the sub-pixels along a side change nothing that can be seen
    shifted = scenes.coverage(Thing(big.kind, "large", 11.0, 31.25, 33.5))
    assert shifted[0] == left + 1 and np.array_equal(shifted[2], cover)
    dx, dy = reader._middle(shape)
    assert abs((xs + 0.5 + left).ravel() @ cover.ravel() / cover.sum() - (30.25 + 11 * dx)) < 0.1
    assert abs((ys + 0.5 + top).ravel() @ cover.ravel() / cover.sum() - (33.5 + 11 * dy)) < 0.1


def test_every_kind_in_both_sizes_on_every_ground_is_read():
    for kind in KINDS:
        for size, radii in scenes.RADII.items():
            for ground in scenes.GROUNDS:
                for radius in radii:
                    thing = Thing(kind, size, radius, 31.3, 32.8)
                    read = reader.read(scenes.draw((thing,), ground))
                    assert (read.ground, read.why, len(read.things)) == (ground, None, 1)
                    found = read.things[0]
                    assert (found.kind, found.size) == (kind, size)
                    assert abs(found.radius - radius) < 0.5 and np.hypot(found.x - 31.3, found.y - 32.8) < 0.5


RED, BLUE = Kind("red", "star"), Kind("blue", "heart")
TWO = (Thing(RED, "small", 6.5, 16.0, 30.0), Thing(BLUE, "large", 10.0, 45.0, 34.0))


@pytest.mark.parametrize(
    ("told", "wrong"),
    [
        (Told("relation", ((RED, None), (BLUE, None)), "white", "left"), None),
        (Told("relation", ((BLUE, "large"), (RED, "small")), "white", "right"), None),
        (Told("relation", ((RED, None), (BLUE, None)), "white", "above"), "relation"),
        (Told("binding", ((RED, "large"), (BLUE, None))), "size"),
        (Told("binding", ((RED, None), (BLUE, None)), "grey"), "ground"),
        (Told("one", ((RED, None),)), "count"),
        (Told("binding", ((Kind("red", "heart"), None), (Kind("blue", "star"), None))), "binding"),
        (Told("binding", ((Kind("red", "moon"), None), (BLUE, None))), "shape"),
        (Told("binding", ((Kind("pink", "star"), None), (BLUE, None))), "colour"),
    ],
)
def test_what_is_wrong(told, wrong):
    assert reader.true_of(reader.read(scenes.draw(TWO, "white")), told) == wrong


def test_what_cannot_be_read_is_not_guessed():
    blank = np.full((64, 64, 3), 255, np.uint8)
    assert reader.read(blank) == reader.Reading((), "white")
    assert reader.read(np.full((64, 64, 3), (90, 0, 0), np.uint8)).why == "ground"
    brown = blank.copy()
    brown[20:40, 20:40] = (110, 80, 60)
    assert reader.read(brown).why == "colour"
    bar = blank.copy()
    bar[30:34, 10:50] = scenes.COLOURS["blue"]
    assert reader.read(bar).why == "shape"
    huge = scenes.draw((Thing(RED, "large", 18.0, 32.0, 32.0),), "white")
    assert reader.read(huge).why == "size"
    blurred = scene(1, "count").picture().filter(ImageFilter.GaussianBlur(4))
    assert reader.true_of(reader.read(np.asarray(blurred)), scene(1, "count").told)


def test_a_small_blur_is_read():
    some = [scene(i) for i in range(100)]
    read = [reader.read(np.asarray(s.picture().filter(ImageFilter.GaussianBlur(0.8)))) for s in some]
    assert sum(reader.true_of(r, s.told) is None for r, s in zip(read, some, strict=True)) >= 98


def test_words():
    told = Told("relation", ((Kind("blue", "star"), "small"), (Kind("red", "heart"), "large")), "white", "above")
    assert scenes.caption(told) == "a small blue star above a large red heart"
    assert scenes.caption(Told("count", ((Kind("yellow", "moon"), None),) * 3)) == "three yellow moons"
    assert scenes.caption(Told("one", ((Kind("orange", "cross"), None),), "mint")) == "an orange cross on mint"
    said = {scenes.caption(told, np.random.default_rng(i)) for i in range(4000)}
    assert (
        "a big red heart with a tiny blue star over it" in said
        and "under a little blue star is a huge red heart" in said
    )
    assert len(said) > 100


def test_the_shard(tmp_path):
    """make.py's pictures and captions, read as any data set."""
    from assets.world import make
    from nanodiff import data

    make.write(tmp_path / "w.tar", 5, seed=4)
    found = data.load(tmp_path / "w.tar")
    assert found.captions == [scene(i, held=False, seed=4).caption for i in range(5)]
    make.write(tmp_path / "v.tar", 3, seed=4)
    assert data.load(tmp_path / "v.tar").captions == found.captions[:3]
    with tarfile.open(tmp_path / "w.tar") as tar:
        picture = Image.open(tar.extractfile("000000.png"))
        assert np.array_equal(np.asarray(picture), np.asarray(scene(0, held=False, seed=4).picture()))
