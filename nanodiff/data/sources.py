"""Captioned pictures from disk, in every common layout.

    FOLDER                      pictures, with metadata.jsonl or metadata.csv (file_name, text), captions.json
                                ({file: caption or captions}), or a .txt (else a .json) of the same name beside each; the first folder of
                                a path is the picture's label
    table.csv                   a row a picture: Image_Name,Title or other columns (--image-column, --caption-column)
    captions_train.json         COCO annotations; the pictures are searched beside it
    shards-{000..009}.tar       webdataset shards (name.png, name.txt | name.json, name.cls), read in place, never extracted
    data.parquet, data.arrow    Hugging Face tables, or a folder of them (extra `parquet`)

A tar member or a listed file name is only ever a key: nothing outside the data root is opened, but for what folders hold that are linked there.

    python -m nanodiff.data check PATH                counts, sizes, missing captions, duplicates, unreadable files
    python -m nanodiff.data pack PATH OUT.tar         any layout as one webdataset shard
    python -m nanodiff.data prepare-corel …           the Corel layout (corel.py)
"""

import functools
import hashlib
import io
import json
import os
import re
import tarfile
import threading
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from PIL import Image

from nanodiff.config import UserError, clipped, parse_json, printable
from nanodiff.data import tables
from nanodiff.device import dist
from nanodiff.output.images import SUFFIXES, fit, open_image

TABLES = {".parquet", ".arrow"}
LISTINGS = ("metadata.jsonl", "metadata.csv", "metadata.tsv", "captions.json")
# suffixes of what stands beside pictures and says something about them
BESIDE = {".txt", ".json", ".jsonl", ".csv", ".tsv"}
IMAGE_COLUMNS, CAPTION_COLUMNS = tables.NAMES, tables.CAPTIONS
MEMBER_LIMIT = 64 << 20
SPLITS = {"train": ("train", "training"), "test": ("test", "testing", "valid", "validation", "val", "dev", "eval")}
CAPTIONED = re.compile(r"(?<![a-z])cap(?:tion)?s?(?![a-z])", re.I)  # a name of captions
# what caption.py writes beside its pictures
OWN = ("synthetic_captions.csv", "augmented_captions.csv", "augmented_shortfall.csv")
GROUPS = 512 << 20  # bytes of row groups that a process keeps


class Columns(NamedTuple):
    """Columns that somebody named, None: the usual ones; and whether captions are wanted."""

    image: str | None = None
    caption: str | None = None
    wanted: bool = True


class Item(NamedTuple):
    """One picture: a key, where its bytes are, its captions (none: ()), its label."""

    key: str
    path: str
    offset: int  # bytes into the file; in a table: the row
    size: int  # bytes; -1: a row of a table
    captions: tuple = ()
    label: str | None = None


class Dataset:
    """A list of Items. `image(i)` decodes one picture; captions are in memory.

    captions: the first caption of each picture (None without); texts: all of them; labels: one each, or None.
    """

    def __init__(self, items, root, image_column=None, known_labels=None):
        if not items:
            raise UserError(f"{root}: No images found (looked for {', '.join(sorted(SUFFIXES))} in it and its folders)")
        self.items, self.root, self.image_column = items, root, image_column
        self.keys = [item.key for item in items]
        self.texts = [item.captions for item in items]
        self.captions = [texts[0] if texts else None for texts in self.texts]
        self.labels = [item.label for item in items]
        # a part has those of the whole set
        self.known_labels = known_labels or sorted({label for label in self.labels if label})

    def __len__(self):
        return len(self.items)

    def data(self, i: int) -> bytes:
        """The encoded bytes of picture i."""
        item = self.items[i]
        try:
            if item.size < 0:
                return _row_bytes(item, self.image_column)
            with open(item.path, "rb") as f:
                f.seek(item.offset)
                data = f.read(item.size)
        except OSError as e:
            raise UserError(f"{item.path}: {e.strerror}") from None
        if len(data) < item.size:
            raise UserError(f"{item.path}: {printable(item.key)}: the file became shorter")
        return data

    def image(self, i: int) -> Image.Image:
        """Picture i as an RGB PIL image. Raises UserError naming the file."""
        item = self.items[i]
        return open_image(
            io.BytesIO(self.data(i)), item.path if item.path.endswith(item.key) else f"{item.path}: {item.key}"
        )

    def fingerprint(self) -> str:
        """A hash of keys, captions and labels."""
        return _hashed(list(zip(self.keys, self.texts, self.labels, strict=True)))

    def weight(self) -> str:
        """A hash of the pictures' sizes in bytes (of a table's rows: of the table's), by which one that was replaced is nearly always known
        without reading it."""
        weigh = functools.cache(os.path.getsize)
        return _hashed([weigh(item.path) if item.size < 0 else item.size for item in self.items])

    def subset(self, positions: Sequence[int]) -> "Dataset":
        return Dataset([self.items[i] for i in positions], self.root, self.image_column, self.known_labels)


def _hashed(value):
    return hashlib.blake2b(json.dumps(value).encode("utf-8", "replace"), digest_size=12).hexdigest()


def load(
    path: str | Path,
    captions: bool = True,
    image_column: str | None = None,
    caption_column: str | None = None,
    skip: bool = False,
) -> Dataset:
    """A Dataset from any layout of the module docstring.

    captions=False allows pictures without one (VAE training). image_column, caption_column: names in jsonl, csv and
    tables; default: the usual ones. skip: leave out, counted and said, what has no caption or no picture, instead of
    raising UserError.
    """
    path, columns = str(path), Columns(image_column, caption_column, captions)
    suffix = Path(path).suffix.lower()
    if suffix == ".tar" or ".tar{" in path or re.search(r"\{\d+\.\.\d+\}", path):
        items = [item for shard in _expand(path) for item in _tar_items(shard)]
    elif Path(path).is_dir():
        items = _folder_items(Path(path), columns, skip)
    elif suffix in tables.SUFFIXES and Path(path).is_file():
        items = _listed(Path(path), list(_csv_rows(Path(path), columns)), skip)
    elif suffix == ".json" and Path(path).is_file():
        items = _listed(Path(path), _coco_rows(Path(path)), skip)
    elif suffix in TABLES and Path(path).is_file():
        items = _table_items(Path(path), columns)
    elif Path(path).is_file():
        _check_plain(path)
        raise UserError(
            f"{path}: is no .tar, {', '.join(sorted(tables.SUFFIXES))}, .json, {' or '.join(sorted(TABLES))} file"
        )
    else:
        raise UserError(
            f"{path}: no such folder, .tar, .csv, .json or .parquet file"
            + (" (a Hub data set must be here as files: an image folder, or its parquet files)" if "/" in path else "")
        )
    if suffix in (".tar", ".json"):
        _no_columns(path, columns)
    silent = [item.key for item in items if not item.captions]
    if captions and silent:
        listed = ", ".join(printable(k) for k in silent[:5])
        if not skip or len(silent) == len(items):
            raise UserError(f"{path}: {len(silent)} of {len(items)} pictures have no caption: {listed}")
        dist.say(f"warning: {path}: {len(silent)} pictures without a caption are left out: {listed}")
        items = [item for item in items if item.captions]
    return Dataset(items, path, image_column)


# ---------------------------------------------------------------------------------------------------------
# Tar shards


def _expand(pattern):
    """name-{000..009}.tar -> the ten names."""
    match = re.search(r"\{(\d{1,18})\.\.(\d{1,18})\}", pattern)
    first, last = match.groups() if match else ("0", "0")
    names = []
    for i in range(int(first), int(last) + 1):
        names.append(pattern[: match.start()] + str(i).zfill(len(first)) + pattern[match.end() :] if match else pattern)
        if not Path(names[-1]).is_file():  # at once: a range may be of a hundred million
            raise UserError(f"{printable(names[-1])}: no such file")
    return names


def _tar_items(shard):
    """Group the members of one shard by the name up to the first dot of its base name. Raises UserError for two pictures, or two captions,
    of one name: one of them would be lost, or get the other's."""
    found, skipped = {}, Counter()
    try:
        _check_plain(shard)
        with tarfile.open(shard, "r:") as tar:
            for member in tar:
                folder, _, base = member.name.rpartition("/")
                stem, _, suffix = base.partition(".")
                suffix = f".{suffix.lower()}"
                if member.isdir() or not tables.is_data(member.name):
                    continue
                if not member.isreg() or member.issparse() or member.size > MEMBER_LIMIT:
                    skipped["too large, or no plain file"] += 1
                    continue
                kind = "picture" if suffix in SUFFIXES else suffix if suffix in (".txt", ".json", ".cls") else None
                if kind is None:
                    skipped[suffix] += 1
                    continue
                key = f"{folder}/{stem}" if folder else stem
                entry, where = found.setdefault(key, {}), f"{shard}: {member.name}"
                if kind in entry:
                    what = "pictures" if kind == "picture" else f"{kind} members"
                    raise UserError(
                        f"{shard}: two {what} are called {printable(key)}: {printable(entry['names'][kind])} and {printable(member.name)}"
                    )
                entry.setdefault("names", {})[kind] = member.name
                if kind == "picture":
                    entry[kind] = (shard, member.offset_data, member.size)
                elif kind == ".json":
                    entry[kind], others = _json_caption(tar.extractfile(member).read(), where)
                    skipped[others] += bool(others)
                else:
                    entry[kind] = tables.captions_in(tables.decoded(tar.extractfile(member).read(), where), where)
            _check_end(shard, tar.offset)
    except (tarfile.TarError, OSError, EOFError, ValueError, OverflowError) as e:
        raise UserError(f"{shard}: not a readable tar file: {e}") from None
    lost = [key for key, e in found.items() if "picture" not in e]
    skipped |= {f"captions or labels without a picture ({printable(lost[0])})": len(lost)} if lost else {}
    _say_left_out(shard, skipped)
    return [
        Item(key, *e["picture"], e.get(".txt") or e.get(".json") or (), "".join(e.get(".cls", ())[:1]) or None)
        for key, e in found.items()
        if "picture" in e
    ]


def _check_plain(shard):
    """Raise UserError for a compressed shard, whose members have no place of their own in the file."""
    with open(shard, "rb") as file:
        head = file.read(265)
    kinds = {b"\x1f\x8b\x08": "gzip", b"BZh": "bzip2", b"\xfd7zXZ\0": "xz", b"\x28\xb5\x2f\xfd": "zstd"}
    packed = next((kind for mark, kind in kinds.items() if head.startswith(mark) and head[257:262] != b"ustar"), None)
    if packed:
        raise UserError(f"{shard}: is compressed ({packed}); unpack it first")


def _check_end(shard, offset):
    """Raise UserError unless what stands at `offset`, where reading ended, is the end of a tar: a block of zeros, and no header of a member
    behind it. Python takes a broken or cut header for the end as well, and what lies behind it would be lost."""
    with open(shard, "rb") as file:
        file.seek(offset)
        block = file.read(tarfile.BLOCKSIZE)
        if not block:
            raise UserError(f"{shard}: cut off after {offset} bytes: it has no end mark")
        if any(block):
            raise UserError(f"{shard}: damaged: no header of a member at byte {offset}, and no end mark")
        while block and not any(block):
            block = file.read(tarfile.BLOCKSIZE)
        at = file.tell() - len(block)
    try:
        tarfile.TarInfo.frombuf(block, "utf-8", "surrogateescape")
    except tarfile.HeaderError:
        return  # the end, or what an older program left in the last record
    raise UserError(f"{shard}: several archives in one: behind the end of the first, another begins at byte {at}")


def _say_left_out(where, counts):
    if counts:
        listed = ", ".join(f"{n} {what}" for what, n in sorted(counts.items()))
        dist.say(f"note: {where}: not read: {listed}")


def _json_caption(data, where):
    """(the captions in a shard's .json member, if it has some under a usual name; what it has under others, in words)"""
    value = parse_json(tables.decoded(data, where), where)
    there = [c for c in CAPTION_COLUMNS if isinstance(value.get(c), str | list)] if isinstance(value, dict) else []
    if not there:
        return (), ""
    others = f"{', '.join(there[1:])} of .json, whose {there[0]} counts" if there[1:] else ""
    return tables.captions_in(value[there[0]], where), others


# ---------------------------------------------------------------------------------------------------------
# Folders and listings


def _pictures(root, wanted=True):
    """(sorted pictures, sorted tables, listings) under a folder, and a line for what is left out. wanted: are captions?"""
    pictures, found, listings, rest, nothing = [], [], [], [], Counter()
    for path in _files(root):
        suffix = path.suffix.lower()
        if not path.is_file():
            nothing[f"{suffix} that is no file, or a link to nothing ({printable(path)})"] += suffix in SUFFIXES
            continue
        kinds = (
            (pictures, suffix in SUFFIXES),
            (found, suffix in TABLES),
            (listings, path.name in LISTINGS),
            (rest, True),
        )
        next(kind for kind, is_it in kinds if is_it).append(path)
    stems = {p.with_suffix("") for p in pictures}
    left = Counter(
        f"{p.suffix.lower() or p.name}{' of no picture' * (p.suffix.lower() == '.txt')}"
        for p in rest
        if p.suffix.lower() not in BESIDE or (p.suffix.lower() == ".txt" and p.with_suffix("") not in stems)
    )
    # captions under a name that is not looked for; not what our own runs write
    named = [
        p.name
        for p in rest
        if p.suffix.lower() in BESIDE - {".txt"}
        and p.with_suffix("") not in stems
        and CAPTIONED.search(p.stem)
        and p.name not in OWN
    ]
    left.update(f"{printable(name)} (name it itself, or call it metadata.csv or .jsonl)" for name in named if wanted)
    whole, found = found, _of_a_set(found)
    if cached := len(whole) - len(found):
        nothing["tables of a cache"] += cached
    if pictures and found:
        left["tables beside pictures"] += len(found)
    _say_left_out(root, (left if pictures else Counter()) + nothing)
    return sorted(pictures), sorted(found), sorted(listings)


def _of_a_set(found):
    """Of the tables in folders those that are a set's: as state.json lists them where the `datasets` library saved it, else without what it cached."""
    kept = []
    for folder in dict.fromkeys(path.parent for path in found):
        here, state = [path for path in found if path.parent == folder], folder / "state.json"
        try:
            listed = parse_json(tables.text_of(state), state) if state.is_file() else {}
        except UserError:  # another program's
            listed = {}
        listed = listed.get("_data_files") if isinstance(listed, dict) else None
        names = {f.get("filename") for f in listed if isinstance(f, dict)} if isinstance(listed, list) else set()
        own = [path for path in here if path.name in names] or [p for p in here if not p.name.startswith("cache-")]
        kept += own or here
    return kept


def _files(root):
    """The paths under a folder that are somebody's data. Each folder is walked once, also where links lead to it: under its own name, else
    under the first link's. Raises UserError for a folder that cannot be read."""
    seen, folders, links = set(), [Path(root)], []
    while folders or links:
        here = folders.pop(0) if folders else links.pop(0)
        real = os.path.realpath(here)
        if real in seen:
            continue
        seen.add(real)
        try:
            there = sorted(path for path in here.iterdir() if tables.is_data(path.name))
        except OSError as e:
            raise UserError(f"{here}: {e.strerror}") from None
        for path in there:
            if path.is_dir():
                (links if path.is_symlink() else folders).append(path)
            else:
                yield path


def _folder_items(root, columns, skip):
    files, found, listings = _pictures(root, columns.wanted)
    if found and not files:
        parts = {table: _split_in(table.relative_to(root)) for table in found}
        if {"train", "test"} <= set(parts.values()):  # as its own loaders do that are asked for a split
            rest = [table for table in found if parts[table] == "test"]
            dist.say(
                f"note: {root}: the part for training is read; not {len(rest)} files of others, such as {printable(rest[0].name)} (name them for those)"
            )
            found = [table for table in found if parts[table] != "test"]
        return [item for table in found for item in _table_items(table, columns)]
    if not files and (shards := sorted(p.name for p in root.glob("*.tar"))):
        raise UserError(
            f"{root}: holds no pictures but {len(shards)} .tar, such as {printable(shards[0])}: name them, as one file or as NAME-{{000..009}}.tar"
        )
    captions = _listed_captions(root, listings, columns)
    if not any(Path(where).name != "captions.json" for where in listings):
        _no_columns(root, columns)
    items, unused, left, broken, several = [], 0, Counter(), [], []
    for path in files:
        key = path.relative_to(root).as_posix()
        texts = captions.pop(key, ())
        if (text := next((p for p in map(path.with_suffix, (".txt", ".TXT")) if p.is_file()), None)) is not None:
            try:
                beside = tables.captions_in(tables.text_of(text, MEMBER_LIMIT), text)
                several += [text] if any("\n" in line for line in beside) else []
            except UserError as e:
                if not texts and columns.wanted:
                    raise
                broken += [] if texts else [clipped(str(e), 200)]
                beside = ("not readable",) if texts else ()
            unused += bool(texts and not set(beside) <= set(texts))
            texts = texts or beside
        elif not texts and (more := path.with_suffix(".json")).is_file():  # as in a tar
            try:
                texts, others = _json_caption(tables.text_of(more, MEMBER_LIMIT).encode(), more)
                left |= {others: left[others] + 1} if others else {}
            except UserError as e:  # of another program, perhaps, and no caption's
                broken.append(clipped(str(e), 200))
        label = key.split("/")[0] if "/" in key else None
        items.append(Item(key, str(path), 0, path.stat().st_size, texts, label))
    if captions:
        _absent(root, list(captions), skip)
    _say_left_out(root, left)
    if broken:
        dist.say(f"note: {len(broken)} .txt or .json beside pictures cannot be read, such as {broken[0]}")
    if several and columns.wanted:
        dist.say(
            f"note: {root}: {len(several)} .txt have several lines, which are one caption, such as {printable(several[0])}"
        )
    tops = sorted({item.label for item in items if item.label})
    repeated = [top for top in tops if re.fullmatch(r"\d+_.+", top)]
    if repeated and columns.wanted:
        dist.say(
            f"note: {root}: {len(repeated)} folders begin with a number, as kohya's repeats, such as {printable(repeated[0])}: every picture counts once"
        )
    if {split_of(top) for top in tops} >= {"train", "test"}:
        dist.say(
            f"note: {root}: its folders {', '.join(map(printable, tops[:5]))} are read as one set; name one of them for its part"
        )
    if unused:
        dist.say(f"note: {root}: {unused} .txt beside pictures say something else than the listing, which counts")
    return items


def split_of(word):
    """The kind ("train", or "test" for what is not to be trained on) that a folder's name or the beginning of a table's tells, as for the `datasets` library;
    None for any other word."""
    return next((kind for kind, names in SPLITS.items() if word.lower() in names), None)


def _split_in(path):
    words = [*path.parent.parts, re.split(r"[-_.]", path.name)[0]]
    return next((kind for word in reversed(words) if (kind := split_of(word))), None)


def _no_columns(where, columns):
    """Raise UserError for a column (but the usual ones) that is asked of a layout without columns."""
    for given, usual, flag in zip(columns[:2], (IMAGE_COLUMNS, CAPTION_COLUMNS), ("image", "caption"), strict=True):
        if given and given not in usual:
            raise UserError(
                f"{where}: `{flag}_column` {printable(given)}: there is no metadata.jsonl or table to have it"
            )


def _absent(where, names, skip):
    listed = ", ".join(printable(k) for k in names[:5])
    if not skip:
        raise UserError(f"{where}: {len(names)} captions name a picture that is not there: {listed}")
    dist.say(f"warning: {where}: {len(names)} captions without a picture are left out: {listed}")


def _listed_captions(root, listings, columns):
    """{relative file name: captions} from the listings (LISTINGS) of a folder and those below it."""
    found = {}
    for listing in listings:
        base = listing.parent.relative_to(root)
        rows = {".csv": _csv_rows, ".tsv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}[listing.suffix]
        for where, name, texts in rows(listing, columns):
            key = (base / name).as_posix()
            if key in found:
                raise UserError(f"{where}: {printable(name)} is listed twice")
            _inside(root, root / key, where)
            found[key] = texts
    return found


def _inside(root, path, where):
    """Raise UserError when a listed name is a link that leads out of the data root. (Linked folders are followed, with a listing as without; and the root of what
    lies in the Hub's cache is its repository, whose snapshots are links to its blobs.)"""
    real, top = os.path.realpath(path), os.path.realpath(root)
    cached = next(
        (p.parent for p in (Path(top), *Path(top).parents) if p.name == "snapshots" and (p.parent / "blobs").is_dir()),
        None,
    )
    top = str(cached or top)
    if Path(path).is_symlink() and os.path.commonpath([real, top]) != top:
        raise UserError(f"{where}: {printable(path)} is outside the data folder")


def _csv_rows(path, columns):
    """(where, file name, captions) of every row."""
    there, rows = tables.rows(path)
    image = tables.column(columns[0], IMAGE_COLUMNS, there, path, "image_column")
    caption = None
    if columns.wanted or columns.caption or set(CAPTION_COLUMNS) & set(there):
        caption = tables.column(columns.caption, CAPTION_COLUMNS, there, path, "caption_column")
    for where, row in rows:
        yield where, tables.name_in(row[image], where), tables.captions_in(row[caption] if caption else None, where)


def _jsonl_rows(path, columns):
    for n, line in enumerate(tables.text_of(path).split("\n"), 1):
        where = f"{path}:{n}"
        if not line.strip():
            continue
        row = parse_json(line, where)
        if not isinstance(row, dict):
            raise UserError(f"{where}: no JSON object")
        if columns[0] and columns[0] not in (*row, *IMAGE_COLUMNS):
            raise UserError(f"{where}: no {columns[0]}; it has {', '.join(map(printable, row))} (`image_column`)")
        image = next((c for c in ((columns[0],) if columns[0] else ()) + IMAGE_COLUMNS if c in row), None)
        usual = [c for c in CAPTION_COLUMNS if c in row]
        if len(usual) > 1 and not columns[1] and n == 1:
            dist.say(f"note: {path}: reading the column {usual[0]}, not {', '.join(usual[1:])}")
        caption = next((c for c in ((columns[1],) if columns[1] else usual) if c in row), None)
        if columns[1] and caption is None:
            raise UserError(f"{where}: no {columns[1]}; it has {', '.join(map(printable, row))} (`caption_column`)")
        yield (
            where,
            tables.name_in(row.get(image), where),
            tables.captions_in(row.get(caption) if caption else None, where),
        )


def _json_rows(path, columns):
    value = parse_json(tables.text_of(path), path)
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected an object {{file: caption}}, found {type(value).__name__}")
    for name, captions in value.items():
        yield str(path), tables.name_in(name, path), tables.captions_in(captions, f"{path}: {printable(name)}")


def _coco_rows(path):
    """Rows of a COCO annotation file, or of a captions.json that is given by itself."""
    value = parse_json(tables.text_of(path), path)
    if not isinstance(value, dict) or "annotations" not in value:
        return list(_json_rows(path, None))
    try:
        names, texts = {i["id"]: i["file_name"] for i in value["images"]}, {}
        for note in value["annotations"]:
            texts.setdefault(note["image_id"], []).append(note["caption"])
    except (ValueError, KeyError, TypeError, AttributeError) as e:
        raise UserError(f"{path}: not a COCO annotation file: {type(e).__name__} {e}") from None
    if len(names) < len(value["images"]):
        twice = next(i for i, n in Counter(i["id"] for i in value["images"]).items() if n > 1)
        raise UserError(f"{path}: two images have the id {printable(twice)}")
    if strange := [i for i in texts if i not in names]:
        raise UserError(f"{path}: {len(strange)} annotations are of pictures that are not in it: {strange[:5]}")
    return [
        (str(path), tables.name_in(name, path), tables.captions_in(texts.get(i), f"{path}: {i}"))
        for i, name in names.items()
    ]


def _listed(listing, rows, skip):
    """Items of a listing whose pictures are searched beside it: by path, else by name or stem in any folder there."""
    root, by_name = listing.parent, {}
    for path in _pictures(root)[0]:
        relative = path.relative_to(root)
        # a/b.png, b.png: a folder that is named must be the one
        tails = [Path(*relative.parts[i:]) for i in range(len(relative.parts))]
        for name in {n.as_posix() for tail in tails for n in (tail, tail.with_suffix(""))}:
            by_name.setdefault(name, []).append(path)
    items, absent, seen = {}, [], {}
    for where, name, texts in rows:
        there = by_name.get(Path(name).as_posix(), [])
        if not there:  # the listing may lie inside the folder that its names begin with
            tails = [Path(*Path(name).parts[i:]) for i in range(1, len(Path(name).parts))]
            whole = lambda path, tail: path.relative_to(root) in (tail, tail.with_name(path.name))  # noqa: E731
            there = next(
                (some for t in tails if (some := [p for p in by_name.get(t.as_posix(), []) if whole(p, t)])), []
            )
        if not there:
            absent.append(name)
            continue
        if len(there) > 1 and root / name not in there:
            raise UserError(f"{where}: {printable(name)} could be {there[0]} or {there[1]}")
        path = root / name if root / name in there else there[0]
        _inside(root, path, where)
        key = path.relative_to(root).as_posix()
        if key in seen and not texts:
            raise UserError(f"{where}: {printable(name)} is listed twice")
        if Path(seen.setdefault(key, name)) != Path(name):
            raise UserError(f"{where}: {printable(seen[key])} and {printable(name)} would both be {path}")
        earlier = items[key].captions if key in items else ()
        items[key] = Item(key, str(path), 0, path.stat().st_size, earlier + texts)  # a row a caption: several captions
    if absent:
        _absent(listing, absent, skip)
    return list(items.values())


# ---------------------------------------------------------------------------------------------------------
# Tables


def _pyarrow(path):
    try:
        import pyarrow
        import pyarrow.parquet
    except ImportError:
        raise UserError(f'{path}: reading it needs pyarrow; pip install "pyarrow>=15" (extra `parquet`)') from None
    return pyarrow


def _table(path, columns):
    """Some columns of a parquet or arrow file."""
    arrow = _pyarrow(path)
    try:
        if path.endswith(".parquet"):
            return arrow.parquet.read_table(path, columns=columns)
        with arrow.memory_map(path) as source:
            return arrow.ipc.open_stream(source).read_all().select(columns)
    except (arrow.ArrowException, OSError, KeyError) as e:
        raise UserError(f"{path}: not readable: {str(e).splitlines()[0]}") from None


@functools.lru_cache(maxsize=4096)
def _names(path):
    """{column: may it hold pictures?}: bytes, or a structure with them."""
    arrow = _pyarrow(path)
    kinds = arrow.types
    try:
        if path.endswith(".parquet"):
            schema = arrow.parquet.read_schema(path)
        else:
            with arrow.memory_map(path) as source:
                schema = arrow.ipc.open_stream(source).schema
        return {
            f.name: any(is_it(f.type) for is_it in (kinds.is_struct, kinds.is_binary, kinds.is_large_binary))
            for f in schema
        }
    except (arrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not readable: {str(e).splitlines()[0]}") from None


@functools.lru_cache(maxsize=64)
def _said_column(given, there, where):
    return tables.column(given, IMAGE_COLUMNS, there, where, "image_column")


def _image_column(path, given):
    """The column with a table's pictures: `given`, else of the usual ones the first that may hold them. What is left is said once for all of a set's tables."""
    there = _names(path)
    usual = [name for name in IMAGE_COLUMNS if there.get(name)]
    if given is None and len(usual) == 1:
        return usual[0]
    shown = tuple(usual) if given is None and usual else tuple(there)
    return _said_column(given, shown, Path(path).parent)


def _table_items(path, columns):
    """A row a picture; its bytes stay in the file until they are asked for."""
    there = _names(str(path))
    _image_column(str(path), columns.image)
    caption = None
    if columns[1] or set(CAPTION_COLUMNS) & set(there):
        caption = tables.column(columns[1], CAPTION_COLUMNS, there, path, "caption_column")
    if caption is None:
        rows = _count(str(path))
        return [Item(f"{path.name}:{i}", str(path), i, -1) for i in range(rows)]
    texts = _table(str(path), [caption]).column(caption).to_pylist()
    return [
        Item(f"{path.name}:{i}", str(path), i, -1, tables.captions_in(t, f"{path}: row {i}"))
        for i, t in enumerate(texts)
    ]


_groups, _reading = {}, threading.Lock()  # {(path, column, number): (first row, values, bytes)}, those used last behind


def _group(path, column, group):
    """(first row, values) of the image column in one row group, the piece in which such files are read; as many of them are kept as fit."""
    key = path, column, group
    with _reading:
        if (found := _groups.pop(key, None)) is None:
            first, values = _read_group(path, column, group)
            # an Arrow file's are mapped, not read
            found = first, values, values.nbytes if path.endswith(".parquet") else 0
            held = found[2] + sum(size for *_, size in _groups.values())
            while held > GROUPS and _groups:
                held -= _groups.pop(next(iter(_groups)))[2]
        _groups[key] = found
    return found[:2]


def _read_group(path, column, group):
    if not path.endswith(".parquet"):
        return 0, _table(path, [column]).column(column)
    file = _pyarrow(path).parquet.ParquetFile(path)
    first = sum(file.metadata.row_group(i).num_rows for i in range(group))
    return first, file.read_row_group(group, columns=[column]).column(column)


def _count(path):
    if path.endswith(".parquet"):
        return _pyarrow(path).parquet.read_metadata(path).num_rows
    return len(_table(path, list(_names(path))[:1]))


@functools.lru_cache(maxsize=4096)
def _starts(path):
    """The first row of every row group."""
    if not path.endswith(".parquet"):
        return [0]
    meta = _pyarrow(path).parquet.ParquetFile(path).metadata
    return np.cumsum([0] + [meta.row_group(i).num_rows for i in range(meta.num_row_groups - 1)]).tolist()


def _row_bytes(item, column):
    column = _image_column(item.path, column)
    group = int(np.searchsorted(_starts(item.path), item.offset, side="right")) - 1
    first, values = _group(item.path, column, group)
    value = values[item.offset - first].as_py()
    data = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(data, bytes):
        raise UserError(f"{item.path}: row {item.offset}: column {column} holds no encoded picture")
    return data


# ---------------------------------------------------------------------------------------------------------
# Pictures in memory


class Pictures:
    """Decoded pictures at one size, [3, R, R] uint8, kept in memory up to `limit` bytes."""

    def __init__(self, dataset, resolution, limit=2 << 30):
        self.dataset, self.resolution = dataset, resolution
        self.room, self.kept = limit // (3 * resolution * resolution), {}

    def one(self, i: int) -> np.ndarray:
        if i in self.kept:
            return self.kept[i]
        image = fit(self.dataset.image(i), self.resolution, self.resolution)
        array = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        if len(self.kept) < self.room:
            self.kept[i] = array
        return array

    def batch(self, positions: Sequence[int]) -> torch.Tensor:
        """Pixels [B, 3, R, R] in [-1, 1] of the given dataset positions."""
        return torch.from_numpy(np.stack([self.one(i) for i in positions])).float() / 127.5 - 1
