"""make attack: mutated weights, configs, captions, shards and pictures, in one process: refused in one line, or read as they are.

    python tests/attack.py [--cases 2000] [--seed 0]

Each case has a seed of its own, printed when something is wrong: a traceback (any error but UserError), more than ten seconds, or a silent
difference (what was changed is neither refused nor honoured). Exit code 1 then.
"""

import argparse
import contextlib
import csv
import io
import json
import random
import shutil
import sys
import tarfile
import tempfile
import time
import traceback
from pathlib import Path

import torch
from PIL import Image

ROOT = Path(__file__).parent.parent
sys.path.insert(0, str(ROOT))

from nanodiff import data, pipeline, weights  # noqa: E402
from nanodiff.config import BOOKKEEPING, UserError  # noqa: E402
from nanodiff.data import caption_files, tables  # noqa: E402
from nanodiff.diffusion.schedule_config import DEFAULTS, FOREIGN, FORMER  # noqa: E402
from nanodiff.output import images  # noqa: E402
from nanodiff.pipeline import sources  # noqa: E402

TINY = ROOT / "tests" / "golden" / "tiny" / "sd15"
VALUES = [None, True, False, 0, -1, 1, 7, 1 << 40, -(1 << 70), 0.5, 1e30, -1e-30, float("nan"), float("inf"), "", "x", "x" * 5000, [], [0], [1, "a"],
          {}, {"a": 1}, [[1]], "../x", "\ud800", "a\0b"]  # fmt: skip
LIMIT = 10  # seconds


def flipped(rng, raw, first=0, last=None):
    """(bytes with one to four changed, offsets)"""
    raw, last = bytearray(raw), len(raw) if last is None else last
    places = [rng.randrange(first, last) for _ in range(rng.randint(1, 4))]
    for at in places:
        raw[at] = rng.choice([0, 255, raw[at] ^ 1 << rng.randrange(8), rng.randrange(256)])
    return bytes(raw), places


def attack_weights(rng, folder):
    """A header that is changed is refused, or says the same of every tensor."""
    state = {
        "a.weight": torch.arange(12.0).view(3, 4),
        "b.bias": torch.ones(4, dtype=torch.float16),
        "c": torch.zeros(2, 0),
        "d": torch.tensor(3),
    }
    path = folder / "w.safetensors"
    weights.save_tensors(path, state, {"k": "v"})
    raw = path.read_bytes()
    data_at = 8 + int.from_bytes(raw[:8], "little")
    changed, places = flipped(rng, raw if rng.random() < 0.8 else raw[: rng.randrange(len(raw))] or b"x", 0, None)
    path.write_bytes(changed)
    got = weights.load_tensors(path)
    weights.as_weights(got, path)
    for name, tensor in got.items():
        known = name in state and tensor.shape == state[name].shape and tensor.dtype == state[name].dtype
        if known and not torch.equal(tensor, state[name]) and all(at < data_at for at in places):
            return f"{name} has other numbers"
    return None  # another name, shape or type is found by whoever asks for the tensors (check_names, check_kind)


def attack_config(rng, folder):
    """A value of another kind is refused, or honoured; nothing else may happen to it."""
    model = folder / "m"
    if not model.exists():
        shutil.copytree(TINY, model)
    path = rng.choice(sorted(model.rglob("*.json")))
    if path.name in ("vocab.json", "tokenizer.json"):
        return None
    before = path.read_text()
    whole = json.loads(before)
    key = rng.choice([*whole, "strange"])
    value = rng.choice(VALUES)
    path.write_text(json.dumps(whole | {key: value}))
    try:
        src = sources.source(str(model))
        unet, scheduler = src.config("unet"), src.scheduler()[0]
        sd = pipeline.load(model)
    finally:
        path.write_text(before)
    if whole.get(key) == value or key.startswith("_") or key in BOOKKEEPING or value is None:
        return None
    told = {**vars(sd.net.cfg), **vars(sd.vae.cfg), **vars(sd.encoders[0].cfg), **vars(unet), **scheduler, **sd.index}
    every = [
        w
        for v in told.values()
        for w in (v, list(v) if isinstance(v, tuple) else v, v[0] if isinstance(v, tuple) and v else v)
    ]
    honoured = any(w == value for w in every)
    foreign = path.parent.name == "scheduler" and (
        key in FOREIGN
        or key in FORMER
        or (key not in DEFAULTS[sd.schedule.kind] and any(key in f for f in DEFAULTS.values()))
    )
    # fields that only transformers and diffusers read
    other = path.parent.name == "tokenizer" or path.name == "model_index.json"
    return (
        None
        if honoured or foreign or other
        else f"{path.relative_to(model)}: {key} = {value!r:.60} is neither refused nor honoured"
    )


def attack_captions(rng, folder):
    """A table is refused, or read as the csv module reads it, a caption for every picture."""
    for i in range(6):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(folder / f"{i}.png")
    rows = [
        ["Image_Name", "Title"],
        *[
            [str(i), rng.choice(["a cat", "a cow, brown", 'a "big" dog', "[x] y", "eight\nlines", "é"])]
            for i in range(6)
        ],
    ]
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    text = list(out.getvalue())
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(text))
        text[at : at + rng.randint(0, 1)] = [rng.choice([",", '"', "\n", "'", "[", "\0", "\u2028", "\r", "x", "\t"])]
    text = "".join(text)
    (folder / "t.csv").write_bytes(text.encode())
    found = caption_files.read(folder / "t.csv")
    lines = [row for row in csv.reader(io.StringIO(text, newline="")) if row]
    if any(len(row) != 2 for row in lines):
        return "a row with another number of cells is read"
    want = {}
    for name, title in lines[1:]:
        want.setdefault(name, []).extend(tables.captions_in(title, "t") or [""])
    if found != want:
        return f"{found} is not {want}"
    dataset = data.load(folder / "t.csv")
    return None if len(dataset) == len(want) else f"{len(dataset)} pictures of {len(want)}"


def attack_shards(rng, folder):
    """A shard is refused, or every picture has the caption it had, but where the caption's own bytes were changed."""
    path, members, spans = folder / "s.tar", {}, {}
    with tarfile.open(path, "w") as t:
        for i in range(4):
            out = io.BytesIO()
            Image.new("RGB", (8, 8), (40 * i, 0, 0)).save(out, "PNG")
            for name, content in ((f"{i}.png", out.getvalue()), (f"{i}.txt", f"caption {i}".encode())):
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
                members[name] = content
    with tarfile.open(path) as t:
        spans = {m.name: range(m.offset_data, m.offset_data + m.size) for m in t}
    raw = path.read_bytes()
    changed, places = flipped(rng, raw, 0, max(s.stop for s in spans.values()))
    path.write_bytes(changed)
    dataset = data.load(path, captions=False)
    for key, captions in zip(dataset.keys, dataset.captions, strict=True):
        touched = any(at in spans.get(f"{key}.txt", ()) for at in places)
        if f"{key}.png" in members and captions not in (None, f"caption {key}") and not touched:
            return f"{key} has the caption {captions!r}"
    return None


def attack_pictures(rng, folder):
    """A picture is refused, or it is an RGB picture of a size."""
    kind = rng.choice(["PNG", "JPEG", "WEBP", "BMP", "GIF", "TIFF"])
    out = io.BytesIO()
    Image.frombytes("RGB", (24, 16), rng.randbytes(24 * 16 * 3)).save(out, kind)
    changed, _ = flipped(rng, out.getvalue() if rng.random() < 0.8 else out.getvalue()[: rng.randrange(1, 400)])
    (folder / "p.bin").write_bytes(changed)
    picture = images.open_image(folder / "p.bin")
    return None if picture.mode == "RGB" and picture.width > 0 else f"{picture.mode} {picture.size}"


ATTACKS = [attack_weights, attack_config, attack_captions, attack_shards, attack_pictures]


def one(seed, folder):
    """(outcome, what is wrong or None) of a case: "refused", "read" or "wrong"."""
    rng, attack = random.Random(seed), ATTACKS[seed % len(ATTACKS)]
    started = time.perf_counter()
    try:
        with contextlib.redirect_stderr(io.StringIO()):
            wrong = attack(rng, folder)
        outcome = "read"
    except UserError as e:
        outcome, wrong = "refused", "more than one line" if "\n" in str(e) else None
    except Exception:
        outcome, wrong = "wrong", traceback.format_exc().strip().splitlines()[-1][:200]
    seconds = time.perf_counter() - started
    return outcome, wrong or (f"{seconds:.0f} s" if seconds > LIMIT else None)


def main(cases=2000, seed=0):
    counts, wrong = {}, []
    with tempfile.TemporaryDirectory() as folder:
        for attack in ATTACKS:
            (Path(folder) / attack.__name__).mkdir()
        for i in range(seed, seed + cases):
            attack = ATTACKS[i % len(ATTACKS)]
            outcome, fault = one(i, Path(folder) / attack.__name__)
            counts[attack.__name__, outcome] = counts.get((attack.__name__, outcome), 0) + 1
            if fault:
                wrong.append(i)
                print(f"seed {i}: {attack.__name__}: {fault}")
    for (name, outcome), n in sorted(counts.items()):
        print(f"{name.removeprefix('attack_')}: {outcome} {n}")
    print(f"attack: {cases} cases from seed {seed}: {len(wrong)} wrong")
    return int(bool(wrong))


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--cases", type=int, default=2000)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    sys.exit(main(given.cases, given.seed))
