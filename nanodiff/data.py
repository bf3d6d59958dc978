"""Captioned pictures from disk: folders and webdataset tar shards, in an order that depends on the seed alone.

Layouts (first match wins): `*.tar` or `shard-{000..009}.tar` (members `name.png` + `name.txt`, read in place and
never extracted); a folder with `metadata.jsonl` (file_name, text) or `captions.json` ({file: caption}); a folder of
pictures with a `.txt` of the same name beside each. A tar member or a file name is only ever a key: nothing outside
the data root is opened.

    python -m nanodiff.data check PATH      counts, sizes, missing captions, duplicates, unreadable files
"""

import functools
import hashlib
import io
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch

from nanodiff.config import UserError, printable, tool
from nanodiff.images import fit, open_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
JUNK = {".ds_store", "thumbs.db"}
MEMBER_LIMIT = 64 << 20
CAPTION_LIMIT = 16_384


class Dataset:
    """A list of (key, where the bytes are, caption). `image(i)` decodes one picture; captions are in memory."""

    def __init__(self, items, root):
        if not items:
            raise UserError(f"{root}: No images found")
        self.items, self.root = items, root
        self.captions = [caption for _, _, caption in items]
        self.keys = [key for key, _, _ in items]

    def __len__(self):
        return len(self.items)

    def data(self, i):
        """The encoded bytes of picture i."""
        path, offset, size = self.items[i][1]
        try:
            with open(path, "rb") as f:
                f.seek(offset)
                return f.read(size)
        except OSError as e:
            raise UserError(f"{path}: {e.strerror}") from None

    def image(self, i):
        """Picture i as an RGB PIL image. Raises UserError naming the file."""
        return open_image(io.BytesIO(self.data(i)), f"{self.items[i][1][0]}: {self.keys[i]}")


def load(path, captions=True):
    """A Dataset from a folder or tar shards. captions=False allows pictures without one (VAE training)."""
    path = str(path)
    if path.endswith(".tar") or ".tar{" in path:
        items = [item for shard in _expand(path) for item in _tar_items(shard)]
    elif Path(path).is_dir():
        items = _folder_items(Path(path))
    else:
        raise UserError(f"{path}: no such folder or .tar file")
    silent = [key for key, _, caption in items if caption is None]
    if captions and silent:
        listed = ", ".join(printable(k) for k in silent[:5])
        raise UserError(f"{path}: {len(silent)} of {len(items)} pictures have no caption: {listed}")
    return Dataset(items, path)


def _expand(pattern):
    """name-{000..009}.tar -> the ten names."""
    match = re.search(r"\{(\d+)\.\.(\d+)\}", pattern)
    names = [pattern]
    if match:
        first, last = match.groups()
        names = [
            pattern[: match.start()] + str(i).zfill(len(first)) + pattern[match.end() :]
            for i in range(int(first), int(last) + 1)
        ]
    for name in names:
        if not Path(name).is_file():
            raise UserError(f"{name}: no such file")
    return names


def _tar_items(shard):
    """Group the members of one shard by the name up to the first dot of its base name."""
    found, skipped = {}, 0
    try:
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                if not member.isreg() or member.size > MEMBER_LIMIT:
                    skipped += not member.isdir()
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                skipped += f".{suffix.lower()}" not in SUFFIXES | {".txt", ".json", ".cls"}
                entry = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if f".{suffix.lower()}" in SUFFIXES:
                    entry["image"] = (shard, member.offset_data, member.size)
                elif suffix.lower() == "txt":
                    entry["caption"] = _clean(tar.extractfile(member).read(CAPTION_LIMIT))
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"{shard}: not a readable tar file: {e}") from None
    if skipped:
        print(f"note: {shard}: {skipped} members are no pictures or captions, or too large: not used", file=sys.stderr)
    return [(key, e["image"], e.get("caption")) for key, e in found.items() if "image" in e]


def _clean(data):
    """Caption bytes -> text: UTF-8, byte-order mark stripped, bad bytes replaced; None when empty."""
    text = data.decode("utf-8-sig", errors="replace").strip() if isinstance(data, bytes) else str(data).strip()
    return text.replace("\0", "")[:CAPTION_LIMIT] or None


def _folder_items(root):
    captions = _listed_captions(root)
    items = []
    files = sorted(p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.name.lower() not in JUNK)
    for path in files:
        if path.name.startswith("._") or not path.is_file():
            continue
        key = path.relative_to(root).as_posix()
        caption = captions.pop(key, None)
        if caption is None and (text := path.with_suffix(".txt")).is_file():
            caption = _clean(text.read_bytes()[:CAPTION_LIMIT])
        items.append((key, (str(path), 0, path.stat().st_size), caption))
    if captions:
        listed = ", ".join(printable(k) for k in list(captions)[:5])
        raise UserError(f"{root}: {len(captions)} captions name a picture that is not there: {listed}")
    return items


def _listed_captions(root):
    """{relative file name: caption} from metadata.jsonl or captions.json, anywhere under the root."""
    found = {}
    for listing in sorted([*root.rglob("metadata.jsonl"), *root.rglob("captions.json")]):
        base = listing.parent.relative_to(root)
        try:
            text = listing.read_text(encoding="utf-8-sig")
            if listing.name == "captions.json":
                rows = [(None, {"file_name": k, "text": v}) for k, v in json.loads(text).items()]
            else:
                rows = [(n, json.loads(line)) for n, line in enumerate(text.splitlines(), 1) if line.strip()]
        except (ValueError, AttributeError) as e:
            raise UserError(f"{listing}: {e}") from None
        for n, row in rows:
            where = f"{listing}:{n}" if n else str(listing)
            name = row.get("file_name") if isinstance(row, dict) else None
            if not isinstance(name, str):
                raise UserError(f"{where}: no file_name")
            if Path(name).is_absolute() or ".." in Path(name).parts:
                raise UserError(f"{where}: {printable(name)} is outside the data folder")
            key = (base / name).as_posix()
            if key in found:
                raise UserError(f"{where}: {printable(name)} is listed twice")
            found[key] = _clean(row.get("text") or "")
    return found


class Pictures:
    """Decoded pictures at one size, [3, R, R] uint8, kept in memory up to `limit` bytes."""

    def __init__(self, dataset, resolution, limit=2 << 30):
        self.dataset, self.resolution = dataset, resolution
        self.room, self.kept = limit // (3 * resolution * resolution), {}

    def one(self, i):
        if i in self.kept:
            return self.kept[i]
        image = fit(self.dataset.image(i), self.resolution, self.resolution)
        array = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        if len(self.kept) < self.room:
            self.kept[i] = array
        return array

    def batch(self, positions, flips=None):
        """Pixels [B, 3, R, R] in [-1, 1] of the given dataset positions; flips: a bool each, mirror left to right."""
        pixels = torch.from_numpy(np.stack([self.one(i) for i in positions])).float() / 127.5 - 1
        if flips is not None:
            pixels = torch.where(torch.tensor(flips)[:, None, None, None], pixels.flip(-1), pixels)
        return pixels


def order(n, seed, first, count):
    """Dataset positions of the global samples first … first+count-1: each epoch is its own permutation of 0..n-1.

    A function of (seed, global index) only, so a resumed run or another number of processes sees the same order.
    """
    places = (divmod(index, n) for index in range(first, first + count))
    return [int(_permutation(n, seed, epoch)[position]) for epoch, position in places]


@functools.lru_cache(maxsize=4)
def _permutation(n, seed, epoch):
    return np.random.default_rng([seed, epoch]).permutation(n)


def check(path):
    """The report of `python -m nanodiff.data check`, as (lines, number of faults)."""
    data = load(path, captions=False)
    sizes, faults, hashes = {}, [], {}
    for i, key in enumerate(data.keys):
        try:
            image = data.image(i)
        except UserError as e:
            faults.append(f"unreadable: {e}")
            continue
        sizes[image.size] = sizes.get(image.size, 0) + 1
        digest = hashlib.sha256(image.tobytes()).hexdigest()
        if digest in hashes:
            faults.append(f"duplicate: {key} has the pixels of {hashes[digest]}")
        hashes.setdefault(digest, key)
        if data.captions[i] is None:
            faults.append(f"no caption: {key}")
    common = sorted(sizes.items(), key=lambda kv: -kv[1])[:5]
    lines = [f"pictures: {len(data)}", f"captions: {sum(c is not None for c in data.captions)}"]
    lines += [f"size {w}x{h}: {n}" for (w, h), n in common]
    return lines + [printable(f) for f in faults[:50]], len(faults)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nanodiff.data", description=__doc__.split("\n\n")[0])
    parser.add_argument("command", choices=["check"])
    parser.add_argument("path")
    args = parser.parse_args()

    def main():
        report, bad = check(args.path)
        print("\n".join(report))
        print(f"faults: {bad}")
        return 1 if bad else 0

    sys.exit(tool(main))
