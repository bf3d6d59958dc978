"""From a data set to the micro-batches of one process: order, augmentation, workers, buckets, cached encodings.

Order and every random draw are functions of (seed, global sample index): the same for any number of workers and
processes, and a run that is resumed at update k sees what an uninterrupted one saw. An epoch is every picture once; its
last update is smaller when the numbers do not divide, and weighs its samples right.

Explained in the book (docs/book): chapter 16.
"""

import contextlib
import functools
import hashlib
import io
import itertools
import json
import math
import signal
import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image, ImageEnhance
from tqdm import tqdm

from nanodiff import system
from nanodiff.config import Stopped, UserError, printable
from nanodiff.device import dist
from nanodiff.files import write_bytes
from nanodiff.output import images
from nanodiff.weights import load_tensors, save_tensors

RESAMPLING = {"lanczos": Image.Resampling.LANCZOS, "bilinear": Image.Resampling.BILINEAR}
POLL = 2  # seconds between two looks at workers that are waited for
MEMORY = 2 << 30  # bytes of decoded pictures that are kept


# ---------------------------------------------------------------------------------------------------------
# Order


class Plan:
    """Which samples every update sees. buckets: {(width, height): positions}, whose pictures never share an update."""

    def __init__(self, n, seed, group, buckets=None):
        self.n, self.seed, self.group = n, seed, group
        self.buckets = [np.arange(n)] if buckets is None else [np.asarray(v) for v in buckets.values()]
        self.per_epoch = sum(-(-len(b) // group) for b in self.buckets)

    def update(self, step):
        """(global index of its first sample, positions) of update number `step`."""
        epoch, i = divmod(step, self.per_epoch)
        groups, firsts = _epoch(self, epoch)
        return epoch * self.n + firsts[i], groups[i]

    def shares(self, step, accum, world, rank):
        """[(global indices, positions, number in the whole update)] of a rank's micro-batches; a share may be empty."""
        first, positions = self.update(step)
        size = -(-len(positions) // (accum * world))
        out = []
        for micro in range(accum):
            begin = (micro * world + rank) * size
            part = positions[begin : begin + size]
            out.append((range(first + begin, first + begin + len(part)), part, len(positions)))
        return out


@functools.lru_cache(maxsize=4)
def _epoch(plan, epoch):
    """(groups of positions, their first places in the epoch): every bucket shuffled and cut, the pieces shuffled."""
    rng = np.random.default_rng([plan.seed, epoch])
    groups = []
    for bucket in plan.buckets:
        order = bucket[rng.permutation(len(bucket))]
        groups += [order[i : i + plan.group] for i in range(0, len(order), plan.group)]
    if len(plan.buckets) > 1:
        groups = [groups[i] for i in rng.permutation(len(groups))]
    return groups, [0, *itertools.accumulate(map(len, groups))][:-1]


def aspect_buckets(dataset, resolution, multiple):
    """{(width, height): positions}: each picture goes to the size of about resolution² pixels, sides multiples of
    `multiple` and no more than 2:1, whose aspect ratio is nearest to its own (NovelAI's bucketing)."""
    sizes, area = [], resolution * resolution
    for w in range(multiple, 2 * resolution + 1, multiple):
        h = area // w // multiple * multiple
        if h and 0.5 <= w / h <= 2:
            sizes.append((w, h))
    if not sizes:
        raise UserError(f"`aspect_buckets`: no size of about {resolution}x{resolution} in steps of {multiple}")
    found, unread = {}, []
    for i in range(len(dataset)):
        if (shown := _header(dataset, i)) is None:
            unread.append(i)
            continue
        width, height = shown
        best = min(sizes, key=lambda s: (abs(math.log(s[0] / s[1]) - math.log(width / height)), -s[0] * s[1]))
        found.setdefault(best, []).append(i)
    if unread:  # where most are, one of which may stand for it
        most = max(found, key=lambda size: len(found[size]), default=(resolution, resolution))
        found[most] = sorted(found.get(most, []) + unread)
    return dict(sorted(found.items()))


def _size(dataset, i):
    """(width, height) of a picture as it is shown; of what cannot be read (1, 1): it will be met, and named, when it is decoded."""
    return _header(dataset, i) or (1, 1)


def _header(dataset, i):
    """(width, height) from a picture's header, as it is shown (EXIF orientation); None for what cannot be read."""
    try:
        with Image.open(io.BytesIO(dataset.data(i)), formats=images.FORMATS) as image:
            # Pillow itself turns a TIFF
            turned = image.format != "TIFF" and image.getexif().get(images.ORIENTATION, 1) >= 5
            return image.size[::-1] if turned else image.size
    except images.FAULTS:
        return None


# ---------------------------------------------------------------------------------------------------------
# Augmentation


@dataclass(frozen=True)
class Transform:
    """A picture -> uint8 [3, H, W]. Random parts are drawn by the generator of its global sample index.

    center_crop: else the crop is drawn. flip: mirror half of the pictures. jitter: brightness, contrast and saturation
    times 1 ± jitter. rotate: up to so many degrees, corners filled with the picture's mirrored border. squash: all of the picture,
    its sides brought to the size each for itself, in place of a crop (as ViT's processor does).
    """

    resolution: int
    center_crop: bool = True
    flip: bool = False
    jitter: float = 0.0
    rotate: float = 0.0
    interpolation: str = "lanczos"
    squash: bool = False

    @property
    def fixed(self):
        """Is it the same every time, but for the mirroring?"""
        return self.center_crop and not self.jitter and not self.rotate

    @property
    def key(self):
        return f"{self.interpolation}-{'squash' if self.squash else 'center'}" if self.fixed else None

    def __call__(self, image, size, rng):
        image = image if not self.rotate else _rotated(image, rng.uniform(-self.rotate, self.rotate))
        image = image.resize(size, RESAMPLING[self.interpolation]) if self.squash else self._cropped(image, size, rng)
        if self.jitter:
            for kind in (ImageEnhance.Brightness, ImageEnhance.Contrast, ImageEnhance.Color):
                image = kind(image).enhance(rng.uniform(1 - self.jitter, 1 + self.jitter))
        return np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))

    def _place(self, original, size, rng):
        """(scale, left, top) of the crop, left and top in the original's pixels. original, size: (width, height)."""
        scale = max(s / o for s, o in zip(size, original, strict=True))
        place = (0.5, 0.5) if self.center_crop else (rng.uniform(), rng.uniform())
        return scale, *((o - s / scale) * p for o, s, p in zip(original, size, place, strict=True))

    def told(self, original, size, rng, mirrored):
        """What SDXL is told of a picture (Podell et al. 2023, arXiv 2307.01952 §2.2): (height, width) of the original, (top, left) of the crop in the
        resized picture (of the mirrored one where it was), (height, width) of what it is brought to. rng: as for the picture itself."""
        if self.rotate:
            rng.uniform(-self.rotate, self.rotate)
        left = top = 0
        if not self.squash:
            scale, left, top = self._place(original, size, rng)
            if mirrored:
                left = original[0] - size[0] / scale - left
            left, top = max(round(left * scale), 0), max(round(top * scale), 0)
        return (*original[::-1], top, left, *size[::-1])

    def _cropped(self, image, size, rng):
        """Resized so that it covers `size`, then cropped."""
        w, h = size
        scale, left, top = self._place(image.size, size, rng)
        box = (max(left, 0.0), max(top, 0.0), min(left + w / scale, image.width), min(top + h / scale, image.height))
        if box == (0, 0, w, h) == (0, 0, *image.size):
            return image
        return image.resize((w, h), RESAMPLING[self.interpolation], box=box)


def _rotated(image, degrees):
    """Turned about its centre; what comes in at the corners is the mirrored picture, not black."""
    array = np.asarray(image)
    pad = int(0.25 * max(image.size)) + 1
    pads = [(min(pad, array.shape[0] - 1),) * 2, (min(pad, array.shape[1] - 1),) * 2, (0, 0)]
    wide = Image.fromarray(np.pad(array, pads, mode="reflect" if min(array.shape[:2]) > 1 else "edge"))
    turned = wide.rotate(degrees, Image.Resampling.BICUBIC)
    top, left = pads[0][0], pads[1][0]
    return turned.crop((left, top, left + image.width, top + image.height))


def generator(seed, index):
    """The augmentation's generator of one global sample index."""
    digest = hashlib.blake2b(f"{seed}/augment/{index}".encode(), digest_size=16).digest()
    return np.random.default_rng(int.from_bytes(digest, "little"))


# ---------------------------------------------------------------------------------------------------------
# Micro-batches


class Batch(NamedTuple):
    """One micro-batch of one process."""

    indices: list  # global sample indices
    positions: list  # in the data set (where a bad picture was replaced: the other's)
    flips: torch.Tensor  # bool [B]: mirrored?
    pixels: torch.Tensor | None  # [B, 3, H, W] in [-1, 1]; None when the feed has no pictures (cached encodings)
    told: torch.Tensor | None  # [B, 6], see Transform.told; None where the feed does not say it
    count: int  # samples that count: 0 where another rank has this micro-batch alone
    weight: float  # share of the update's samples, times the number of ranks
    last: bool  # the last micro-batch of the update?
    keys: list  # names of the samples
    waited: float  # seconds in which the loader was waited for


class Feed:
    """The micro-batches of this process, update by update. See Plan for the order.

    policy: "stop" at a picture that cannot be read, or "skip": another one takes its place, the same in every run, up to
    `limit` of all pictures. pictures=False: only positions (encodings are cached).
    """

    def __init__(self, dataset, transform, seed, batch_size, accum=1, workers=0, policy="stop", limit=0.01,
                 buckets=None, pictures=True, timeout=600):  # fmt: skip
        self.rank, self.world = dist.world().rank, dist.world().size
        self.dataset, self.seed, self.accum, self.workers, self.timeout = dataset, seed, accum, workers, timeout
        self.plan = Plan(len(dataset), seed, batch_size * accum * self.world, buckets)
        self.requests = Requests(self.plan, accum, self.rank, self.world)
        self.per_epoch = self.plan.per_epoch
        self.decoder = Decoder(dataset, transform, seed, policy, buckets, pictures, max(workers, 1))
        self.limit, self.bad, self.reported = limit, {}, 0
        self.interrupted = lambda: False  # asked while a worker is waited for: must the run end?
        self.failing = lambda: None  # called before an error of the data ends the run
        self.stream, self.at = None, None

    def serve(self, run):
        """Be the training data of a Run: end with it, and let it keep what it has before an error ends it."""
        self.interrupted, self.failing = run.interrupted, run.keep

    def update(self, step):
        """The micro-batches of update `step` on this rank."""
        if self.at != step:
            self._open(step)
        shares = self.requests.of(step)
        for i, (indices, _positions, total, count) in enumerate(shares):
            began = time.monotonic()
            found = self._next(began)
            waited = time.monotonic() - began
            if isinstance(found, UserError):
                self.failing()
                try:
                    raise found
                finally:
                    del found  # or the error, its traceback and this frame would hold each other, and the workers
            positions, flips, pixels, told, bad = found
            self.bad |= bad
            if len(self.bad) > self.limit * len(self.dataset):
                self.failing()
                raise self._too_many()
            if pixels is not None:
                pixels = pixels.float() / 127.5 - 1
            keys = [self.dataset.keys[p] for p in positions] if count else []
            yield Batch(indices, positions, flips, pixels, told, count, count / total * self.world,
                        i == len(shares) - 1, keys, waited)  # fmt: skip
        self.at = step + 1

    def _next(self, began):
        """What the workers have next. They are asked every POLL seconds, so that a signal is not left waiting for them."""
        while True:
            try:
                return next(self.stream)
            except (RuntimeError, OSError, EOFError) as e:  # a worker that was killed, or does not answer
                reason = (str(e) or type(e).__name__).splitlines()[0]
                if "timed out" not in reason or time.monotonic() - began > self.timeout:
                    raise UserError(f"a data worker was lost ({reason}); try `num_workers` 0") from None
                if self.interrupted():
                    raise Stopped from None

    def _too_many(self):
        key, reason = next(iter(self.bad.values()))
        return UserError(
            f"{len(self.bad)} of {len(self.dataset)} pictures cannot be read, more than `bad_image_limit` {self.limit:g} "
            f"allows; the first: {reason if key in reason else f'{key}: {reason}'}"
        )

    def _open(self, step):
        """Begin at an update (a resumed run begins in the middle)."""
        self.at = step
        if not self.workers:
            self.stream = map(self.decoder.__getitem__, self.requests.since(step))
            return
        loader = torch.utils.data.DataLoader(
            self.decoder, batch_size=None, sampler=_Sampler(functools.partial(self.requests.since, step)),
            num_workers=self.workers, worker_init_fn=_quiet, timeout=min(POLL, self.timeout), pin_memory=torch.cuda.is_available(),
            generator=torch.Generator(),  # its own, so that the global one is not drawn from
        )  # fmt: skip
        self.stream = iter(loader)

    def report_bad(self, out, name="bad_images.jsonl"):
        """Write the replaced pictures of all ranks to a file of this name and say how many. Every rank must call it."""
        self.bad = {k: v for part in dist.gathered(self.bad) for k, v in part.items()}
        if len(self.bad) == self.reported:
            return
        self.reported = len(self.bad)
        if dist.is_main():
            lines = [json.dumps({"file": key, "reason": reason}) for _, (key, reason) in sorted(self.bad.items())]
            write_bytes(Path(out, name), "".join(f"{line}\n" for line in lines).encode())
        dist.say(f"warning: {self.reported} pictures cannot be read and were replaced; see {name}")
        if self.reported > self.limit * len(self.dataset):
            raise self._too_many()


class Requests(NamedTuple):
    """What a rank asks its decoder for. Not the Feed's own methods: its workers end cleanly when the Feed is dropped, but if the two held each
    other, the garbage collector would end them after five seconds each, or the end of the process by a signal, with a traceback."""

    plan: Plan
    accum: int
    rank: int
    world: int

    def of(self, step):
        """[(indices, positions, total, count)] of an update. An empty share among several ranks stands in with the update's first sample,
        which counts 0."""
        out = []
        for indices, positions, total in self.plan.shares(step, self.accum, self.world, self.rank):
            count = len(positions)
            if not count and self.world > 1:
                first, whole = self.plan.update(step)
                indices, positions = range(first, first + 1), whole[:1]
            if len(positions):
                out.append((list(indices), [int(p) for p in positions], total, count))
        return out

    def since(self, step):
        """(indices, positions) of an update and of all that follow."""
        while True:
            for indices, positions, *_ in self.of(step):
                yield indices, positions
            step += 1


class _Sampler:
    """What a DataLoader iterates over for its requests."""

    def __init__(self, make):
        self.make = make

    def __iter__(self):
        return self.make()


def _quiet(worker):
    """A worker must not run the main process's signal handlers: it dies with it, and leaves Ctrl-C to it."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    system.ignore("SIGUSR1", "SIGBREAK")


class Decoder(torch.utils.data.Dataset):
    """(global indices, positions) -> (positions, flips, pixels uint8 or None, sizes [B, 6] or None, {position: (key, reason)} of bad ones).

    tells: are the sizes wanted (Transform.told)?"""

    tells = False

    def __init__(self, dataset, transform, seed, policy="stop", buckets=None, pictures=True, sharers=1):
        self.dataset, self.transform, self.seed, self.policy, self.pictures = dataset, transform, seed, policy, pictures
        self.sizes = {i: size for size, members in (buckets or {}).items() for i in members}
        self.room, self.kept, self.known_bad = MEMORY // sharers, {}, {}
        self.originals = {}  # {position: (width, height)} of those that were asked for

    def __getitem__(self, request):
        indices, positions = request
        try:
            return self._batch(indices, positions)
        except UserError as e:  # a value, because a worker's exception would come with its traceback
            return e

    def _batch(self, indices, positions):
        arrays, used, bad, flips, told = [], [], {}, [], []
        for index, position in zip(indices, positions, strict=True):
            rng = generator(self.seed, index)
            flips.append(bool(self.transform.flip and rng.uniform() < 0.5))
            position = self.known_bad.get(position, position)
            size = self.size(position)  # the batch's, also where another picture stands for a bad one
            if self.pictures:
                position, array = self.some(position, rng, bad, size)
                arrays.append(array[:, :, ::-1] if flips[-1] else array)
            used.append(position)
            if self.tells:
                told.append(self._told(index, position, size, flips[-1]))
        pixels = torch.from_numpy(np.stack(arrays)) if arrays else None
        return used, torch.tensor(flips), pixels, torch.tensor(told, dtype=torch.float32) if told else None, bad

    def _told(self, index, position, size, mirrored):
        """Transform.told() of the sample `index`, from the picture's header and the draws that its crop was made with."""
        if position not in self.originals:
            self.originals[position] = _size(self.dataset, position)
        rng = generator(self.seed, index)
        if self.transform.flip:
            rng.uniform()
        return self.transform.told(self.originals[position], size, rng, mirrored)

    def size(self, position):
        """(width, height) that a picture is brought to."""
        return self.sizes.get(position, (self.transform.resolution, self.transform.resolution))

    def some(self, position, rng, bad, size):
        """(position, array) of a picture, or of the one that stands for it."""
        for k in itertools.count():
            other = position if k == 0 else replacement(len(self.dataset), self.seed, position, k)
            try:
                return other, self.one(other, rng, size)
            except UserError as e:
                if self.policy != "skip" or k > 100:
                    raise
                bad[other] = (self.dataset.keys[other], printable(e))

    def one(self, position, rng, size):
        """One picture as uint8 [3, H, W], not mirrored."""
        key = (position, size)
        if key in self.kept:
            return self.kept[key]
        array = self.transform(self.dataset.image(position), size, rng)
        if self.transform.fixed and array.nbytes <= self.room:
            self.kept[key] = array
            self.room -= array.nbytes
        return array


def replacement(n, seed, position, k):
    """The k-th candidate in place of a picture that cannot be read: a function of the seed and its position."""
    return int(np.random.default_rng([seed, position, k]).integers(n))


# ---------------------------------------------------------------------------------------------------------
# Cached encodings


class Cache:
    """Tensors by the content they were made from, in one safetensors file, so that they can never be stale.

    The file's name holds the hash of the network that made them; a row's name the hash of its input. folder None: in
    memory only.
    """

    def __init__(self, folder, kind, network):
        self.path = Path(folder) / f"{kind}-{network[:24]}.safetensors" if folder else None
        self.rows = {}
        if self.path and self.path.exists():
            try:
                self.rows = load_tensors(self.path)
            except UserError as e:
                dist.say(f"warning: {e}; it is made again")

    def fill(self, wanted, make, batch, what):
        """Make the rows that are missing. wanted: {row name: input}; make([inputs]) -> [tensors], computed in turns by the
        ranks. Every rank must call it."""
        lacking = {name for names in dist.gathered([n for n in wanted if n not in self.rows]) for name in names}
        missing = [name for name in wanted if name in lacking]  # the same on all ranks, whatever each one's disk holds
        if not missing:
            return
        fresh, world = {}, dist.world()
        bar = tqdm(total=len(missing), desc=what, disable=not dist.is_main() or not _terminal())
        began = said = time.monotonic()
        try:
            for i in range(0, len(missing), batch * world.size):
                names = missing[i : i + batch * world.size]
                mine = names[world.rank * batch : (world.rank + 1) * batch]
                made = dist.together(self._made, make, mine, wanted)
                for part in dist.gathered(made):
                    fresh |= part
                bar.update(len(names))
                now = time.monotonic()
                if now - said > 30 and not _terminal():
                    dist.say(f"{what}: {len(fresh)}/{len(missing)}, {len(fresh) / (now - began):.1f}/s")
                    said = now
        except BaseException:  # a bad picture, Ctrl-C: the next run goes on from what there is
            if self.path and fresh and dist.is_main():
                self._write(fresh)
            raise
        finally:
            bar.close()
        self.rows |= fresh
        if self.path:
            dist.on_main(self._write, fresh)

    def _made(self, make, names, wanted):
        return (
            dict(zip(names, (t.cpu().clone() for t in make([wanted[n] for n in names])), strict=True)) if names else {}
        )

    def _write(self, fresh):
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            there = {}
            with contextlib.suppress(UserError):  # broken, which was said when it was read
                there = load_tensors(self.path) if self.path.exists() else {}  # another run may have written since
            save_tensors(self.path, there | self.rows | fresh)
        except OSError as e:
            raise UserError(f"{self.path}: cannot be written: {e.strerror}") from None

    def __getitem__(self, name):
        return self.rows[name]


def _terminal():
    return sys.stderr.isatty()


def fingerprint(*modules, without=None):
    """SHA-256 over names, types and values of everything in some modules.

    without: modules that learn, of which nothing counts but parameters that do not; large tensors then by a million of their numbers or two,
    spread over them: training changes them all."""
    learn = [id(m) for m in without or ()]
    digest = hashlib.sha256()
    for module in modules:
        for name, tensor in module.state_dict(keep_vars=True).items():
            if id(module) in learn and (tensor.requires_grad or not isinstance(tensor, torch.nn.Parameter)):
                continue
            flat = tensor.detach().reshape(-1)
            flat = (flat if without is None else flat[:: max(1, flat.numel() >> 20)]).cpu().contiguous()
            digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)};".encode())
            digest.update(flat.view(torch.uint8).numpy().data)
        known = hasattr(module, "cfg") and id(module) not in learn
        digest.update(repr(sorted(vars(module.cfg).items(), key=str)).encode() if known else b"")
    return digest.hexdigest()


def content(*parts):
    """A row name: hash of bytes and texts."""
    digest = hashlib.blake2b(digest_size=20)
    for part in parts:
        part = part if isinstance(part, bytes) else str(part).encode("utf-8", "surrogateescape")
        digest.update(len(part).to_bytes(8, "little") + part)
    return digest.hexdigest()
