"""Order, augmentation, workers, buckets, bad pictures, cached encodings."""

import gc
import itertools
import json
import subprocess
import sys
import time
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from util import ROOT, error_line

from nanodiff import config, data
from nanodiff.config import UserError
from nanodiff.training import loader


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (20 + i, 24, 3), np.uint8)).save(root / f"{i:02d}.png")
    return root


def feed(root, size=8, **more):
    transform = more.pop("transform", loader.Transform(size))
    return loader.Feed(
        data.load(root, captions=False), transform, more.pop("seed", 3), more.pop("batch_size", 4), **more
    )


def seen(f, first, last):
    return [b for step in range(first, last) for b in f.update(step)]


@settings(max_examples=60, deadline=None)
@given(
    n=st.integers(1, 40),
    batch=st.integers(1, 9),
    accum=st.integers(1, 4),
    world=st.integers(1, 4),
    epoch=st.integers(0, 3),
)
def test_every_picture_once_an_epoch_on_any_number_of_ranks(n, batch, accum, world, epoch):
    plan = loader.Plan(n, 5, batch * accum * world)
    steps = range(epoch * plan.per_epoch, (epoch + 1) * plan.per_epoch)
    drawn, weights = [], []
    for step in steps:
        shares = [s for rank in range(world) for s in plan.shares(step, accum, world, rank)]
        drawn += [(i, int(p)) for indices, positions, _ in shares for i, p in zip(indices, positions, strict=True)]
        weights.append(sum(len(p) / total for _, p, total in shares))
    assert sorted(p for _, p in drawn) == list(range(n)) and sorted(i for i, _ in drawn) == list(
        range(epoch * n, (epoch + 1) * n)
    )
    assert weights == pytest.approx([1.0] * len(weights)), "the samples of an update weigh alike, and 1 in all"
    alone = loader.Plan(n, 5, batch * accum * world)
    flat = [(i, int(p)) for s in steps for i, p in zip(*_indexed(alone, s), strict=True)]
    assert sorted(flat) == sorted(drawn), "the same samples in the same updates as with one process"


def _indexed(plan, step):
    first, positions = plan.update(step)
    return range(first, first + len(positions)), positions


def test_epochs_differ_and_seeds_differ():
    plan, other = loader.Plan(30, 1, 30), loader.Plan(30, 2, 30)
    first, second = plan.update(0)[1].tolist(), plan.update(1)[1].tolist()
    assert first != second and sorted(first) == sorted(second) and other.update(0)[1].tolist() != first


def test_a_resumed_feed_goes_on_where_the_other_stopped(pictures):
    jitter = loader.Transform(8, center_crop=False, flip=True, jitter=0.2, rotate=20)
    whole = seen(feed(pictures, transform=jitter), 0, 6)
    again = seen(feed(pictures, transform=jitter), 0, 2) + seen(feed(pictures, transform=jitter), 2, 6)
    for a, b in zip(whole, again, strict=True):
        assert a.positions == b.positions and torch.equal(a.pixels, b.pixels) and torch.equal(a.flips, b.flips)


def test_workers_change_nothing(pictures):
    jitter = loader.Transform(8, center_crop=False, flip=True, jitter=0.2, rotate=20)
    before = torch.get_rng_state()
    none, two = (seen(feed(pictures, transform=jitter, workers=w, accum=2, batch_size=2), 0, 5) for w in (0, 2))
    assert len(none) == len(two)
    for a, b in zip(none, two, strict=True):
        assert (
            a.positions == b.positions and torch.equal(a.pixels, b.pixels) and (a.weight, a.last) == (b.weight, b.last)
        )
    assert torch.equal(torch.get_rng_state(), before), "the loader draws nothing from the global generator"


def test_the_last_group_is_smaller_and_weighs_right(pictures):
    batches = seen(feed(pictures, accum=2), 0, 2)
    assert [b.count for b in batches] == [4, 4, 2, 1] and [b.last for b in batches] == [False, True, False, True]
    assert [b.weight for b in batches] == pytest.approx([0.5, 0.5, 2 / 3, 1 / 3])


def test_ranks_share_an_update(pictures, monkeypatch):
    alone = seen(feed(pictures, batch_size=8), 0, 2)
    parts = []
    for rank in range(3):
        monkeypatch.setattr(loader.dist, "world", lambda rank=rank: loader.dist.World(rank, 3, rank))
        parts.append(seen(feed(pictures, batch_size=2, accum=1), 0, 2))
    monkeypatch.undo()
    assert sum(b.count for part in parts for b in part) == 11
    six = seen(feed(pictures, batch_size=6), 0, 2)
    for update in range(2):
        assert [p for part in parts for p in part[update].positions if part[update].count] == six[update].positions
        assert sum(part[update].weight for part in parts) == pytest.approx(3.0), "gradients are averaged over 3"
    assert len(alone) == 2


def test_an_empty_share_counts_nothing(pictures, monkeypatch):
    monkeypatch.setattr(loader.dist, "world", lambda: loader.dist.World(3, 4, 3))
    (batch,) = seen(feed(pictures, batch_size=16), 0, 1)
    assert batch.count == 2 or batch.weight == 0
    monkeypatch.setattr(loader.dist, "world", lambda: loader.dist.World(7, 8, 7))
    (batch,) = seen(feed(pictures, batch_size=16), 0, 1)
    assert (batch.count, batch.weight, batch.keys, len(batch.pixels)) == (0, 0.0, [], 1)


def test_bad_pictures_stop_with_their_name(pictures):
    (pictures / "05.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"05\.png: not a readable image"):
        seen(feed(pictures), 0, 3)
    with pytest.raises(UserError, match=r"05\.png: not a readable image"):
        seen(feed(pictures, workers=1), 0, 3)


def test_skipped_pictures_shift_nobody(pictures, tmp_path, capsys):
    good = [b.positions for b in seen(feed(pictures), 0, 6)]
    whole = (pictures / "05.png").read_bytes()
    (pictures / "05.png").write_bytes(whole[: len(whole) // 2])
    f = feed(pictures, policy="skip", limit=0.2)
    got = [b.positions for b in seen(f, 0, 6)]
    for a, b in zip(good, got, strict=True):
        assert all(x == y for x, y in zip(a, b, strict=True) if x != 5) and 5 not in b
    assert got == [b.positions for b in seen(feed(pictures, policy="skip", limit=0.2, workers=2), 0, 6)]
    f.report_bad(tmp_path)
    line = json.loads((tmp_path / "bad_images.jsonl").read_text())
    assert line["file"] == "05.png" and "1 pictures cannot be read and were replaced" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"1 of 11 pictures cannot be read, more than `bad_image_limit` 0\.01"):
        seen(feed(pictures, policy="skip"), 0, 6)


def test_a_killed_worker_is_one_line(pictures):
    """In a process of its own: PyTorch's signal handler may raise anywhere."""
    code = (
        "import os, signal, sys; sys.path[:0] = ['.', 'tests', 'tests/training']\n"
        "from nanodiff import commandline; import test_loader as t\n"
        "def main():\n"
        "    f = t.feed(sys.argv[1], workers=1, timeout=20)\n"
        "    next(f.update(0))\n"
        "    os.kill(f.stream._workers[0].pid, signal.SIGKILL)\n"
        "    t.seen(f, 0, 400)\n"
        "commandline.parse = lambda *a: None\n"
        "sys.argv[1:] = sys.argv[1:]\n"
        "sys.exit(commandline.script({'': (None, lambda cfg: main())}, ''))"
    )
    done = subprocess.run([sys.executable, "-c", code, pictures], cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert "a data worker was lost" in error_line(done)


class Sleeper(loader.Decoder):
    """Blocks for 15 seconds, or until the test has seen enough."""

    def __getitem__(self, request):
        until = time.monotonic() + 15
        while time.monotonic() < until and not self.enough.exists():
            time.sleep(0.05)


@pytest.mark.parametrize(
    ("interrupted", "timeout", "error"), [(True, 50, config.Stopped), (False, 4, UserError)], ids=["signal", "timeout"]
)
def test_a_signal_does_not_wait_for_a_worker(pictures, tmp_path, interrupted, timeout, error):
    """SIGTERM while a worker blocks: out within seconds. And a worker that never answers is an error at the timeout."""
    f = feed(pictures, workers=1, timeout=timeout)
    f.decoder.__class__, f.interrupted, f.decoder.enough = Sleeper, lambda: interrupted, tmp_path / "enough"
    began = time.monotonic()
    with pytest.raises(error):
        next(f.update(0))
    assert time.monotonic() - began < 12
    f.decoder.enough.touch()  # or the worker's end would be waited for
    f.stream = None


def test_workers_end_with_their_feed(pictures):
    """By its last reference, not by the garbage collector, for which PyTorch waits five seconds a worker."""
    gc.disable()
    try:
        f = feed(pictures, workers=2)
        seen(f, 0, 3)
        workers = f.stream._workers
        del f
        assert [w.exitcode for w in workers] == [0, 0]
        (pictures / "05.png").write_bytes(b"no picture")
        f = feed(pictures, workers=2)
        with pytest.raises(UserError):
            seen(f, 0, 3)
        workers = f.stream._workers
        del f
        assert [w.exitcode for w in workers] == [0, 0]
    finally:
        gc.enable()


def test_center_crop_and_random_crop():
    wide = Image.new("RGB", (30, 10), "black")
    wide.paste("white", (10, 0, 20, 10))
    centre = loader.Transform(10)(wide, (10, 10), loader.generator(0, 0))
    assert centre.shape == (3, 10, 10) and centre.min() == 255
    crops = {loader.Transform(10, center_crop=False)(wide, (10, 10), loader.generator(0, i)).mean() for i in range(20)}
    assert len(crops) > 10


def test_center_crop_is_the_usual_fit():
    from nanodiff.output import images

    image = Image.fromarray(np.random.default_rng(1).integers(0, 256, (37, 53, 3), np.uint8))
    got = loader.Transform(16)(image, (16, 16), None).transpose(1, 2, 0)
    assert np.array_equal(got, np.asarray(images.fit(image, 16, 16)))


@pytest.mark.parametrize("center", [True, False])
@pytest.mark.parametrize("flip", [True, False])
@pytest.mark.parametrize("rotate", [0.0, 3.0])
def test_what_sdxl_is_told_is_what_was_done(tmp_path, center, flip, rotate):
    """Each pixel of these pictures says where it is: the crop's corner is read off the first of them."""
    rows, columns = np.mgrid[0:120, 0:40]
    Image.fromarray(np.stack([columns * 6, rows * 2, 0 * rows], axis=-1).astype(np.uint8)).save(tmp_path / "a.png")
    dataset = data.load(tmp_path, captions=False)
    feed = loader.Feed(dataset, loader.Transform(20, center, flip, 0.0, rotate), 5, 1)
    feed.decoder.tells, seen = True, set()
    for step in range(12):
        (batch,) = feed.update(step)
        told = [int(v) for v in batch.told[0]]
        assert told[:2] == [120, 40] and told[4:] == [20, 20]
        pixels = (batch.pixels[0] + 1) * 127.5
        first = pixels[:, :, -1] if batch.flips[0] else pixels[:, :, 0]
        top = round((first[1, 0].item() / 2 - 0.5) / 2)  # half as large as the original
        assert rotate or abs(top - told[2]) <= 1
        seen.add(told[2])
    assert seen == {20} if center else len(seen) > 3
    feed.decoder.tells = False
    assert next(iter(feed.update(0))).told is None


def test_squashed_pictures_are_whole():
    """As ViT's processor resizes: every side for itself, nothing cut."""
    image = Image.fromarray(np.random.default_rng(0).integers(0, 255, (70, 50, 3), dtype=np.uint8))
    got = loader.Transform(32, interpolation="bilinear", squash=True)(image, (32, 32), None)
    assert (got.transpose(1, 2, 0) == np.asarray(image.resize((32, 32), Image.Resampling.BILINEAR))).all()
    assert loader.Transform(32, squash=True).key != loader.Transform(32).key


def test_rotation_brings_no_black_corners():
    white = Image.new("RGB", (16, 16), "white")
    turned = loader.Transform(16, rotate=45)(white, (16, 16), loader.generator(0, 1))
    assert turned.min() > 250


def test_flip_mirrors(tmp_path):
    image = Image.new("RGB", (4, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png")
    batches = seen(feed(tmp_path, 4, transform=loader.Transform(4, flip=True)), 0, 20)
    for b in batches:
        corner = b.pixels[0, 0, 0]
        assert (corner[3] if b.flips[0] else corner[0]) == 1
    assert 4 < sum(bool(b.flips[0]) for b in batches) < 16


def test_buckets_take_turns():
    """An epoch goes through all pictures, bucket and bucket mixed, and another one in another order."""
    plan = loader.Plan(80, 3, 4, {(8, 8): range(40), (16, 8): range(40, 80)})
    one, two = ([plan.update(epoch * 20 + i)[1].tolist() for i in range(20)] for epoch in (0, 1))
    for groups in (one, two):
        assert sorted(p for g in groups for p in g) == list(range(80)) and all(
            len({p < 40 for p in g}) == 1 for g in groups
        )
        wide = [g[0] < 40 for g in groups]
        assert sum(a != b for a, b in itertools.pairwise(wide)) > 4
    assert one != two and [sorted(g) for g in one] != [sorted(g) for g in two]


@pytest.mark.parametrize("suffix", ["jpg", "tif", "png", "webp"])
def test_a_turned_picture_has_the_size_it_is_shown_in(tmp_path, suffix):
    """Whoever turns it: Pillow does a TIFF by itself."""
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (48, 16)).save(tmp_path / f"a.{suffix}", exif=exif)
    dataset = data.load(tmp_path, captions=False)
    assert loader._size(dataset, 0) == dataset.image(0).size == (16, 48)


def test_aspect_buckets(tmp_path):
    for i, size in enumerate([(64, 64), (128, 64), (64, 128), (120, 62), (65, 64)]):
        Image.new("RGB", size).save(tmp_path / f"{i}.png")
    dataset = data.load(tmp_path, captions=False)
    buckets = loader.aspect_buckets(dataset, 64, 8)
    at = {p: size for size, members in buckets.items() for p in members}
    assert at[0] == at[4] == (64, 64) and at[1][0] > at[1][1] and at[2] == at[1][::-1] and at[3] == at[1]
    assert all(w % 8 == 0 and h % 8 == 0 and w * h <= 64 * 64 for w, h in buckets)
    f = loader.Feed(dataset, loader.Transform(64), 0, 2, buckets=buckets)
    batches = seen(f, 0, f.per_epoch)
    assert sorted(p for b in batches for p in b.positions) == list(range(5))
    assert all(b.pixels.shape[-2:][::-1] == at[b.positions[0]] for b in batches)


def test_cache_is_by_content(tmp_path):
    calls = []

    def make(inputs):
        calls.append(list(inputs))
        return [torch.full((2,), float(i)) for i in inputs]

    first = loader.Cache(tmp_path, "x", "net1")
    first.fill({"a": 1, "b": 2, "c": 3}, make, 2, "test")
    assert calls == [[1, 2], [3]] and first["c"].tolist() == [3, 3]
    again = loader.Cache(tmp_path, "x", "net1")
    again.fill({"b": 2, "d": 4}, make, 2, "test")
    assert calls[2:] == [[4]], "what is there is not made again"
    loader.Cache(tmp_path, "x", "net2").fill({"a": 1}, make, 2, "test")
    assert calls[3:] == [[1]], "another network, another file"
    (path,) = tmp_path.glob("x-net1*")
    path.write_bytes(path.read_bytes()[:-5])
    loader.Cache(tmp_path, "x", "net1").fill({"a": 1}, make, 2, "test")
    assert calls[4:] == [[1]], "a damaged file is made again"


def test_fingerprint_sees_every_value():
    net = torch.nn.Conv2d(3, 4, 1).to(memory_format=torch.channels_last)
    before = loader.fingerprint(net)
    assert before == loader.fingerprint(net)
    net.weight.data[1, 2, 0, 0] += 1e-6
    assert loader.fingerprint(net) != before


def test_fingerprint_without_what_learns():
    """Nor what a network computes by itself: a buffer is no weight."""
    net, rest = torch.nn.BatchNorm2d(3), torch.nn.Linear(2, 2)
    net.bias.requires_grad_(False)
    net.cfg = SimpleNamespace(sample_size=8)
    before = loader.fingerprint(net, rest, without=[net])
    net.weight.data += 1
    net.running_mean += 1
    net.cfg.sample_size = 16
    assert loader.fingerprint(net, rest, without=[net]) == before
    for tensor in (net.bias, rest.weight):
        tensor.data += 1
        assert loader.fingerprint(net, rest, without=[net]) != before
        tensor.data -= 1


def test_a_wide_picture_is_told_its_corner_also_mirrored(tmp_path):
    """SDXL's training script tells the left edge of what is seen, so of a mirrored picture the other one."""
    rows, columns = np.mgrid[0:40, 0:120]
    Image.fromarray(np.stack([columns * 2, rows, 0 * rows], axis=-1).astype(np.uint8)).save(tmp_path / "a.png")
    feed = loader.Feed(data.load(tmp_path, captions=False), loader.Transform(20, False, True, 0.0, 0.0), 5, 1)
    feed.decoder.tells, lefts = True, {False: set(), True: set()}
    for step in range(24):
        (batch,) = feed.update(step)
        told, mirrored = [int(v) for v in batch.told[0]], bool(batch.flips[0])
        first = ((batch.pixels[0, 0, 10, 0] + 1) * 127.5).item() / 2 / 2 - 0.25  # the original's column, half as large
        want = 60 - 1 - first if mirrored else first
        assert told[2] == 0 and abs(told[3] - want) <= 1, (told, want, mirrored)
        lefts[mirrored].add(told[3])
    assert all(len(some) > 3 for some in lefts.values())


def test_what_stands_for_a_bad_picture_is_told_the_size_it_was_cut_to(tmp_path):
    for i in range(16):
        Image.new("RGB", (64, 64) if i < 8 else (128, 64)).save(tmp_path / f"{i:02d}.png")
    (tmp_path / "03.png").write_bytes((tmp_path / "03.png").read_bytes()[:60])
    (tmp_path / "12.png").write_bytes((tmp_path / "12.png").read_bytes()[:60])
    dataset = data.load(tmp_path, captions=False)
    sizes = {(64, 64): range(8), (96, 48): range(8, 16)}
    f = loader.Feed(dataset, loader.Transform(64), 0, 2, buckets=sizes, policy="skip", limit=0.9)
    f.decoder.tells, replaced = True, 0
    for step in range(3 * f.per_epoch):
        for batch in f.update(step):
            high, wide = batch.pixels.shape[-2:]
            assert batch.told[:, 4:].tolist() == [[high, wide]] * len(batch.told)
            replaced += sum((p < 8) != (wide == 64) for p in batch.positions)
    assert replaced, "no picture of the other bucket stood in"
