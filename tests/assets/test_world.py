"""The small world: its grammar, what is held out, and the reader that says what is in a picture."""

import itertools
import json
import sys
import tarfile
from collections import Counter
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image, ImageFilter
from util import run

from assets.world import reader, scenes
from assets.world.scenes import KINDS, SHAPES, Kind, Thing, Told
from nanodiff.config import UserError


def scene(i, task=None, held=None, seed=3):
    return scenes.random_scene(np.random.default_rng((seed, i)), task, held)


@pytest.mark.parametrize("part", range(4))
def test_no_held_out_combination_in_100_000_drawn_scenes(part):
    """By the lists of the file, not by the generator's own rule; 25,000 in each part."""
    raw = json.loads((scenes.Path(scenes.__file__).parent / "held_out.json").read_text())
    kinds = {tuple(k) for k in raw["kinds"]}
    pairs = {frozenset(map(tuple, p)) for p in raw["pairs"]}
    relations = {tuple(r) for r in raw["relations"]}
    rng = np.random.default_rng((11, part))
    seen, together = set(), set()
    for _ in range(25_000):
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


@pytest.mark.parametrize("task", ["binding", "relation"])
def test_captions_in_order_name_the_left_or_upper_one_first(task):
    """In each of the three ways to tell a relation; and they are true of their pictures, the same scenes as in any order."""
    ways = Counter()
    for i in range(300):
        drawn = lambda share, i=i: scenes.random_scene(np.random.default_rng((5, i)), task, in_order=share)  # noqa: E731
        s = drawn(1.0)
        told = scenes.parse(s.caption)
        first = min(told.objects, key=lambda o: min(s.caption.index(w) for w in nouns(o[0]) if w in s.caption))
        a, b = s.things
        assert scenes.relation(a, b) in ("left", "above") and {a, b} == set(drawn(0.0).things)
        assert a.kind.shape == b.kind.shape or first[0] == a.kind, s.caption
        assert reader.true_of(reader.Reading(s.things, s.ground), told) is None, s.caption
        ways[told.relation, s.caption.split()[0] in ("a", "an"), " with " in s.caption] += 1
    assert min(ways.values()) > 30 and len(ways) == (6 if task == "relation" else 1), ways


def nouns(kind):
    return scenes.WORDS.get(kind.shape, (kind.shape,))


def test_a_share_of_captions_in_order():
    """Half of them, and of the others half by chance."""
    some = [scenes.random_scene(np.random.default_rng((6, i)), "relation", in_order=0.5) for i in range(600)]
    count = sum(scenes.relation(*s.things) in ("left", "above") for s in some)
    assert abs(count / 600 - 0.75) < 0.07, count


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


def test_parts_are_told_apart():
    """Each part alone: a wrong colour is no wrong shape."""
    two = reader.read(scenes.draw(TWO, "mint"))
    told = Told("relation", ((RED, None), (Kind("pink", "heart"), None)), "mint", "left")
    assert reader.parts_of(two, told) == {
        "count": True,
        "ground": True,
        "colour": False,
        "shape": True,
        "relation": False,
    }
    told = Told("relation", ((RED, None), (BLUE, None)), "white", "right")
    assert reader.parts_of(two, told) == {
        "count": True,
        "ground": False,
        "colour": True,
        "shape": True,
        "relation": False,
    }
    one = reader.read(scenes.draw(TWO[:1], "white"))
    assert reader.parts_of(one, Told("size", ((RED, "large"),)))["size"] is False
    assert reader.parts_of(one, Told("size", ((RED, "small"),)))["size"] is True
    bar = np.full((64, 64, 3), 255, np.uint8)
    bar[30:34, 10:50] = scenes.COLOURS["blue"]
    assert reader.read(bar).things[0].kind == Kind("blue", None), "what can be read of it is"


class Painter:
    """A pipeline that draws scenes exactly, but for a share of them, which it leaves blank."""

    def __init__(self, known, blank=0.0):
        self.known, self.blank, self.asked = {s.caption: s for s in known}, blank, []

    def generate(self, captions, seeds, **settings):
        self.asked.append((list(seeds), settings))
        rows = [np.asarray(self.known[c].picture()) for c in captions]
        for seed, row in zip(seeds, rows, strict=True):
            if (seed * 7919 % 100) / 100 < self.blank:
                rows[seeds.index(seed)] = np.full_like(row, 255)
        pixels = torch.from_numpy(np.stack(rows)).permute(0, 3, 1, 2).float() / 127.5 - 1
        return SimpleNamespace(pixels=pixels)


def test_score_of_a_model_that_draws_exactly_and_of_one_that_does_not():
    from assets.world import score

    known = [s for task in scenes.TASKS for held in (False, True) for s in score.asked(task, held, 60)]
    exact = Painter(known)
    got = score.score(exact, 60, steps=3)
    assert set(got) == {"seen", "held-out"} and all(set(g) == set(scenes.TASKS) for g in got.values())
    for group in got.values():
        for s in group.values():
            assert (s["right"], s["of"], s["share"], s["high"]) == (60, 60, 1.0, 1.0) and 0.9 < s["low"] < 1
            assert set(s["parts"].values()) == {1.0} and not s["wrong"]
    assert exact.asked[0] == (list(range(50)), {"steps": 3}) and exact.asked[1][0] == list(range(50, 60))
    half = score.score(Painter(known, 0.5), 60)
    assert half["seen"]["one"]["right"] == 30 and half["seen"]["one"]["wrong"] == {"count": 30}
    assert half["seen"]["one"]["parts"]["ground"] > 0.5 == half["seen"]["one"]["parts"]["colour"]
    assert score.mean(half["seen"]) == 0.5
    assert "| relation | 0.500 (0.377–0.623) | 0.500 (0.377–0.623) | 30 count |" in score.table(half)
    picture, wrong = score.sheet(Painter(s for s, _ in score.mixed(10)), 10)
    assert picture.width > 8 * 128 and all(w is None for _, w in wrong) and len(wrong) == 10


def test_a_ninth_colour_is_drawn_and_read_and_in_no_training_scene():
    assert not set(scenes.NINTH) & {*scenes.COLOURS, *scenes.vocabulary()}
    for task in scenes.TASKS:
        for i in range(40):
            scene = scenes.random_scene(np.random.default_rng((9, i)), task, colour="cyan")
            colours = [t.kind.colour for t in scene.things]
            assert colours[0] == "cyan" and (task != "count" or set(colours) == {"cyan"}) and "cyan" in scene.caption
            assert len({t.kind for t in scene.things}) == (2 if task in ("binding", "relation") else 1)
            assert reader.true_of(reader.read(np.asarray(scene.picture())), scene.told) is None, scene.caption
            assert scenes.parse(scene.caption) is None  # no word of the grammar
    with pytest.raises(ValueError, match="in no scene"):  # it would look for one for ever
        scenes.random_scene(np.random.default_rng(0), "one", True, "cyan")


def test_make_refuses_a_ninth_colour_that_is_held_out(tmp_path, monkeypatch, capsys):
    from assets.world import make

    monkeypatch.setattr("sys.argv", ["make", str(tmp_path / "a.tar"), "--colour", "cyan", "--held-out"])
    assert make.main() == 2 and "--held-out: nothing of cyan" in capsys.readouterr().err


def test_score_of_a_colour_and_with_a_lora(tmp_path, monkeypatch, capsys):
    from assets.world import score
    from nanodiff import lora, pipeline

    known = [s for task in scenes.TASKS for s in score.asked(task, False, 4, colour="cyan")]
    known += [s for s, _ in score.mixed(64, (False,), "cyan")]
    painter, given = Painter(known), []
    painter.models = dict
    monkeypatch.setattr(pipeline, "load", lambda name, device: painter)
    monkeypatch.setattr(lora, "read", lambda path, models: path)
    monkeypatch.setattr(lora, "attach", lambda models, found: given.append(found))
    argv = ["score", "--captions", "4", "--colour", "cyan", "--lora", "a.safetensors", "--output-dir", str(tmp_path)]
    monkeypatch.setattr("sys.argv", argv)
    assert score.main() == 0 and given == ["a.safetensors"]
    out = capsys.readouterr().out
    assert out.splitlines()[-1] == "world-score: cyan 1.000" and "| task | cyan | wrong in cyan |" in out
    assert set(json.loads((tmp_path / "score.json").read_text())) == {"cyan"}


def test_the_embedded_model_draws_single_objects_seen_and_held_out():
    from assets.world import score
    from nanodiff import pipeline

    got = score.score(pipeline.load("assets/world"), 6, ("one", "size"))
    assert sum(s["right"] for group in got.values() for s in group.values()) >= 20, got  # of 24


def test_captions_of_the_score_are_different_and_of_their_group():
    from assets.world import score

    for task in scenes.TASKS:
        held, seen = score.asked(task, True, 40), score.asked(task, False, 40)
        assert len({s.caption for s in held}) == len({s.caption for s in seen}) == 40
        assert all(scenes.held_out().why(s.things) for s in held) and not any(
            scenes.held_out().why(s.things) for s in seen
        )
    assert {scenes.held_out().why(s.things) for s in score.asked("relation", True, 100)} == {"kind", "pair", "relation"}


def test_study_says_means_with_intervals():
    from assets.nano import captions

    assert captions.interval([0.5])[0] == 0.5 and np.isnan(captions.interval([0.5])[1])
    assert captions.said([0.5]) == "0.500" and captions.said([0.1, 0.2, 0.3], "+.2f") == "+0.20 ± 0.248"
    mean, half = captions.interval([0.1, 0.2, 0.3])
    assert abs(mean - 0.2) < 1e-12 and abs(half - 4.302653 * 0.1 / 3**0.5) < 1e-6


def test_study_holds_out_each_colour_and_shape_as_often():
    from assets.world import study

    assert set(study.held(8)) == scenes.held_out().kinds
    for count in (8, 24, 40):
        kinds = study.held(count)
        assert len(set(kinds)) == count and set(study.held(8)) <= set(kinds)
        assert {sum(k.colour == c for k in kinds) for c in scenes.COLOURS} == {count // 8}
        assert {sum(k.shape == s for k in kinds) for s in scenes.SHAPES} == {count // 8}
    some = study.asked(set(kinds), 60)
    assert len({s.caption for s in some}) == 60
    assert all(len(s.things) == 1 and s.things[0].kind in kinds for s in some)


def test_close_ups_hold_all_of_their_object_and_are_read():
    """Anywhere in the window; what is drawn at its size is read as a scene whose ground goes on."""
    from assets.world import score, study

    some = list(itertools.islice(study.close_ups(set(scenes.KINDS), 3), 200))
    again = list(itertools.islice(study.close_ups(set(scenes.KINDS), 3), 200))
    assert [c.caption for c in some] == [c.caption for c in again] and some[7].picture() == again[7].picture()
    for close in some:
        (thing,) = close.scene.things
        for at, corner in ((thing.x, close.x), (thing.y, close.y)):
            assert 0 <= corner <= scenes.SIDE - study.SIDE
            assert (
                corner <= at - thing.radius * scenes.REACH and at + thing.radius * scenes.REACH <= corner + study.SIDE
            )
    middles = np.array([[c.scene.things[0].x - c.x, c.scene.things[0].y - c.y] for c in some])
    assert middles.min() < 13 and middles.max() > 19, "not in the middle of each"

    class Drawn:
        def generate(self, captions, seeds, height, width):
            assert height == width == study.SIDE
            rows = np.stack([np.asarray(known[c].picture()) for c in captions])
            return SimpleNamespace(pixels=torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 127.5 - 1)

    known = {c.caption: c for c in some}
    told = [c.scene.told for c in known.values()]
    pictures = study.draw(Drawn(), list(known))
    assert pictures.shape[1:] == (scenes.SIDE, scenes.SIDE, 3)
    wrong, parts = score.judge(pictures, told)
    assert wrong.count(None) >= 0.995 * len(wrong) and set(parts) >= set(study.PARTS), Counter(wrong)


def test_study_trains_without_what_it_asks_for(tmp_path, monkeypatch):
    """The runs of three seeds: what train.py is given, and a model that draws only what is in its shard."""
    from assets.world import study
    from nanodiff import data, pipeline

    began = []

    def trained(argv, cwd):
        flag = lambda name: argv[argv.index(name) + 1]  # noqa: E731
        began.append((Path(flag("--output-dir")).name, flag("--seed")))
        shown = {scenes.parse(text).objects[0][0] for text in data.load(flag("--data")).captions}
        assert not shown & set(study.held(24 if "held" in began[-1][0] else 8)), "held out, and shown"
        model = Path(flag("--output-dir")) / "model"
        model.mkdir(parents=True)
        (model / "model_index.json").write_text("{}")
        (model.parent / "metrics.jsonl").write_text('{"step": 1, "epoch": 1, "loss": 1.0}\n')
        return SimpleNamespace(returncode=0)

    known = study.asked(set(scenes.KINDS), 400)
    monkeypatch.setattr(study.subprocess, "run", trained)
    monkeypatch.setattr(pipeline, "load", lambda folder: Painter(known + study.asked(set(study.held(8)), 20) + study.asked(set(scenes.KINDS) - set(study.held(8)), 20) + study.asked(set(scenes.KINDS) - set(study.held(24)), 20)))  # fmt: skip
    monkeypatch.setattr("sys.argv", ["study", "runs", "--only", "recipe,held-24,guidance-1", "--seeds", "2", "--scenes", "60", "--captions", "20", "--output-dir", str(tmp_path)])  # fmt: skip
    assert study.main() == 0
    assert began == [("recipe-0", "0"), ("held-24-0", "0"), ("recipe-1", "1"), ("held-24-1", "1")], (
        "guidance has no run of its own"
    )
    found = json.loads((tmp_path / "results.json").read_text())
    assert len(found) == 6 and all(set(r.values()) == {1.0} for r in found.values())
    assert "| 24 kinds held out | 2 | 1.000 ± 0.000 |" in (tmp_path / "table.md").read_text()
    assert study.main() == 0 and len(began) == 4, "what is there is not made again"
    whole, argv = (
        (tmp_path / "results.json").read_bytes(),
        [a.replace(str(tmp_path), str(tmp_path / "shares")) for a in sys.argv],
    )
    for part in ("2/2", "1/2"):
        monkeypatch.setattr("sys.argv", [*argv, "--share", part])
        assert study.main() == 0
    assert began[4:] == [("held-24-0", "0"), ("held-24-1", "1"), ("recipe-0", "0"), ("recipe-1", "1")]
    assert (tmp_path / "shares" / "results.json").read_bytes() == whole
    monkeypatch.setattr("sys.argv", argv[:0] + ["study", "runs", "--share", "3/2"])
    with pytest.raises(SystemExit):
        study.main()
    monkeypatch.setattr("sys.argv", [a.replace(str(tmp_path / "shares"), str(tmp_path)) for a in argv])
    monkeypatch.setattr("sys.argv", [*sys.argv, "--updates", "5"])
    assert study.main() == 2, "nor taken for what other settings would have made"
    one = next(study.singles(set(scenes.KINDS), 0))
    monkeypatch.setattr(study, "singles", lambda kinds, seed: itertools.repeat(one))
    with pytest.raises(UserError, match="there are no 2 different captions of 64 kinds"):
        study.asked(set(scenes.KINDS), 2)


def test_synthetic_pictures_are_judged_and_said(tmp_path):
    from assets.world import score, synthetic
    from nanodiff.data.captionset import Row

    (known,), (held,) = (score.asked("one", held, 1) for held in (False, True))
    rows = [
        Row("a", (known.caption,)),
        Row("b", ("a red lion",)),
        Row("c", (known.caption,)),
        Row("d", (held.caption,)),
    ]
    for row, scene in zip(rows, (known, known, held, held), strict=True):
        scene.picture().save(tmp_path / f"{row.name}.png")
    judgements = synthetic.judged(rows, tmp_path)
    wrong = [w for _, w in judgements]
    assert wrong[0] is wrong[3] is None and wrong[1] == "grammar" and wrong[2] not in (None, "grammar")
    got = synthetic.facts(rows, judgements, [Row("x", (known.caption,))])
    assert got == {"synthetic": 4, "new captions": 0.5, "in the grammar": 0.75, "true": 0.5, "true and held out": 0.25}
    group = lambda share: {t: {"share": share} for t in scenes.TASKS}  # noqa: E731
    results = [({arm: {"pictures": 10 * i, "seen": group(0.1 * i + 0.1 * seed), "held-out": group(0.5)} for i, arm in enumerate(synthetic.ARMS)}, got)
               for seed in range(3)]  # fmt: skip
    text = synthetic.table(results)
    assert "| with synthetic, filtered | 20 | 0.300 ± 0.248 | 0.500 ± 0.000 | +0.200 ± 0.000 | +0.000 ± 0.000 |" in text
    assert (
        "| originals | 0 | 0.100 ± 0.248 | 0.500 ± 0.000 |  |  |" in text
        and "true 0.5, true and held out 0.25." in text
    )


@pytest.mark.parametrize("task", scenes.TASKS)
def test_a_caption_is_understood_again(task):
    for i in range(300):
        s = scene(i, task)
        told = scenes.parse(s.caption)
        assert told.task == task or {told.task, task} == {"one", "size"}, s.caption
        assert Counter(told.objects) == Counter(s.told.objects) and told.ground == s.ground
        assert reader.true_of(reader.Reading(s.things, s.ground), told) is None, s.caption


@pytest.mark.parametrize("text", ["", "a star", "red", "a red", "a red star above", "five red stars", "a red star and", "a red star above a green sky",
                                  "a small small red star", "a red star on a red background", "a red stars", "three red star"])  # fmt: skip
def test_what_is_no_caption(text):
    assert scenes.parse(text) is None


def test_sentences_about_scenes_are_judged():
    from assets.world import telling

    s = scenes.Scene(TWO, "white", Told("relation", ((RED, None), (BLUE, None)), "white", "left"), "")
    assert telling.judge("a red star left of a blue heart", s) == (
        None,
        {"count": True, "ground": True, "colour": True, "shape": True, "relation": True},
    )
    assert telling.judge("a tiny red star and a big blue heart", s)[0] is None
    assert telling.judge("a red star above a blue heart", s)[0] == "relation"
    assert telling.judge("a red heart and a blue star", s)[0] == "binding"
    assert telling.judge("a red star star", s) == ("grammar", {})

    class Net:
        def describe(self, pictures, tokens):
            return ["a red star"] * len(pictures)

    found = telling.scores(Net(), 30)["seen"]
    assert found["count"]["share"] == 0 and found["one"]["wrong"] and set(found["relation"]["wrong"]) == {"count"}


def test_what_is_in_a_folder(tmp_path):
    """Real scenes are all right and as different as they are drawn; the same scene again and again is not."""
    from assets.world import look, make
    from nanodiff import data

    make.write(tmp_path / "w.tar", 150, seed=4)
    found = look.look(data.load(tmp_path / "w.tar"))
    assert (found["pictures"], found["share"], found["read"]) == (150, 1.0, 1.0)
    assert (
        15 < found["places"] < 25 and found["radii"] < 0.05 and 2.8 < found["colours"] <= 3 and 5 < found["kinds"] < 6
    )
    s = scene(0, "one", held=False)
    for i in range(4):
        s.picture().save(tmp_path / f"{i}.png")
        (tmp_path / f"{i}.txt").write_text(s.caption if i else "three red stars")
    (tmp_path / "w.tar").unlink()
    found = look.look(data.load(tmp_path))
    assert found["share"] == 0.75 and found["places"] < 1e-6 and found["colours"] == found["kinds"] == 0
    (tmp_path / "0.txt").write_text("a pink hippo")
    found = look.look(data.load(tmp_path))
    assert (found["pictures"], found["told"], found["share"]) == (4, 3, 1.0)
    for i in range(4):
        (tmp_path / f"{i}.txt").write_text("a pink hippo")
    assert np.isnan(look.look(data.load(tmp_path))["share"])
    s.picture().resize((128, 128)).save(tmp_path / "3.png")
    with pytest.raises(UserError, match=r"3\.png is of 128x128 pixels|3 is of 128x128 pixels"):
        look.look(data.load(tmp_path))


def test_what_is_in_generations(tmp_path, monkeypatch, capsys):
    """Several data sets as a series each, one shorter than the other."""
    from assets.world import look, make
    from nanodiff.output import charts

    for i in range(3):
        make.write(tmp_path / f"{i}.tar", 4, seed=i)
    a, b, c = (str(tmp_path / f"{i}.tar") for i in range(3))
    argv = ["look", "--series", "alone", a, b, c, "--series", "half real", a, c, "--output-dir", str(tmp_path / "out")]
    monkeypatch.setattr("sys.argv", argv)
    drawn = []
    monkeypatch.setattr(charts, "lines", lambda path, x, panels, xlabel: drawn.append((x, panels, xlabel)))
    assert look.main() == 0
    ((x, panels, xlabel),) = drawn
    assert x == [0, 1, 2] and xlabel == "generation" and panels["captions true"]["alone"][1][0] == 1.0
    places, found = panels["places"], json.loads((tmp_path / "out/look.json").read_text())
    assert places["alone"] == [found[f]["places"] for f in (a, b, c)]
    assert places["half real"][:2] == [found[f]["places"] for f in (a, c)] and np.isnan(places["half real"][2])
    table = capsys.readouterr().out
    assert "| alone, 1.tar | 4 | 4 | 1.000 |" in table and "| half real, 2.tar | 4 | 4 | 1.000 |" in table
    assert set(json.loads((tmp_path / "out/look.json").read_text())) == {a, b, c}
    monkeypatch.setattr("sys.argv", ["look", "--series", "x", a, "--series", "x", b])
    assert look.main() == 2 and "two of one name" in capsys.readouterr().err


def test_shards_are_together_what_one_is(tmp_path):
    from assets.world import make

    make.write(tmp_path / "all.tar", 5, 1)
    make.write(tmp_path / "a.tar", 2, 1)
    make.write(tmp_path / "b.tar", 3, 1, first=2)

    def members(name):
        with tarfile.open(tmp_path / name) as tar:
            return {m.name: tar.extractfile(m).read() for m in tar}

    assert members("a.tar") | members("b.tar") == members("all.tar") and len(members("all.tar")) == 10


def test_a_shard_is_there_as_a_whole_or_not_at_all(tmp_path, monkeypatch):
    """make world takes the shard that is there for a whole one."""
    from assets.world import make

    drawn = scenes.random_scene

    def stopped(rng, *more):
        if next(countdown) == 3:
            raise KeyboardInterrupt
        return drawn(rng, *more)

    countdown = iter(range(10))
    monkeypatch.setattr(scenes, "random_scene", stopped)
    with pytest.raises(KeyboardInterrupt):
        make.write(tmp_path / "w.tar", 8, seed=1)
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("command", "line"),
    [
        (("score", "--model", "nowhere"), "error: model 'nowhere' not found"),
        (("steps", "--model", "a=b:c", "--output-dir", "{}"), "error: --model a=b:c: 'c' is no guidance scale"),
        (("steps", "--model", "a", "--steps", "1,x", "--output-dir", "{}"), "argument --steps: invalid list of int value: '1,x'"),
        (("study", "runs", "--only", "x", "--output-dir", "{}"), "error: --only x: is none of recipe, "),
        (("study", "emergence", "--run", "{}", "--tasks", "two", "--output-dir", "{}"), "error: --tasks two: is none of close-up, one, "),
        (("study", "emergence", "--run", "{}", "--output-dir", "{}"), "has no model-epoch-N"),
        (("make", "{}/w.tar", "--in-order", "2"), "error: --in-order 2: a share lies between 0 and 1"),
        (("look", "nowhere"), "error: nowhere: no such folder"),
        (("steps", "--model", "x=a", "--model", "x=b:2", "--model", "x=c", "--output-dir", "{}"), "error: --model x: two of one name"),
        (("graft", "--model", "{}", "--teacher", "a", "--data", "b", "--output-dir", "{}"), "this run writes to"),
        (("graft", "--model", "a", "--teacher", "a", "--data", "b", "--updates", "0", "--output-dir", "{}"), "argument --updates"),
        (("score", "--demo", "x.jpg"), "error: --demo x.jpg: is no name of a PNG"),
        (("score", "--captions", "0"), "argument --captions"),
        (("reader", "--blur=-1"), "error: --blur -1: is no standard deviation"),
        (("study", "runs", "--seeds", "0", "--output-dir", "{}"), "argument --seeds"),
        (("look", "--series", "alone"), "error: name the data: DATA …, or --series NAME DATA …"),
    ],
    ids=lambda p: p[0] if isinstance(p, tuple) else "",
)  # fmt: skip
def test_mistakes_end_with_one_line(tmp_path, command, line):
    name, *argv = command
    done = run("-m", f"assets.world.{name}", *(a.format(tmp_path) for a in argv))
    assert done.returncode == 2 and line in done.stderr and "Traceback" not in done.stderr, done.stderr
