"""Captioned pictures from disk, in every common layout.

    FOLDER                      pictures, with metadata.jsonl or metadata.csv (file_name, text), captions.json
                                ({file: caption or captions}), or a .txt of the same name beside each; the first folder of
                                a path is the picture's label
    table.csv                   a row a picture: Image_Name,Title or other columns (--image-column, --caption-column)
    captions_train.json         COCO annotations; the pictures are searched beside it
    shards-{000..009}.tar       webdataset shards (name.png, name.txt | name.json, name.cls), read in place, never extracted
    data.parquet, data.arrow    Hugging Face tables, or a folder of them (extra `parquet`)

A tar member or a listed file name is only ever a key: nothing outside the data root is opened.

    python -m nanodiff.data check PATH                counts, sizes, missing captions, duplicates, unreadable files
    python -m nanodiff.data pack PATH OUT.tar         any layout as one webdataset shard
    python -m nanodiff.data prepare-corel …           the Corel layout (corel.py)
"""

import csv
import functools
import hashlib
import io
import json
import os
import re
import sys
import tarfile
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanodiff.config import UserError, nearest, printable
from nanodiff.output.images import fit, open_image

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
TABLES = {".parquet", ".arrow"}
JUNK = {".ds_store", "thumbs.db"}
LISTINGS = ("metadata.jsonl", "metadata.csv", "captions.json")
IMAGE_COLUMNS = ("file_name", "image", "Image_Name", "image_name", "file", "path")
CAPTION_COLUMNS = ("text", "caption", "captions", "Title", "title", "prompt")
MEMBER_LIMIT = 64 << 20
CAPTION_LIMIT = 16_384
JSON_LIMIT = 1 << 30


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
        self.known_labels = known_labels or sorted(
            {label for label in self.labels if label}
        )  # a part's: the whole set's

    def __len__(self):
        return len(self.items)

    def data(self, i):
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

    def image(self, i):
        """Picture i as an RGB PIL image. Raises UserError naming the file."""
        item = self.items[i]
        return open_image(
            io.BytesIO(self.data(i)), item.path if item.path.endswith(item.key) else f"{item.path}: {item.key}"
        )

    def fingerprint(self):
        """A hash of keys, captions and labels."""
        parts = zip(self.keys, self.texts, self.labels, strict=True)
        return hashlib.blake2b(json.dumps(list(parts)).encode("utf-8", "replace"), digest_size=12).hexdigest()

    def subset(self, positions):
        return Dataset([self.items[i] for i in positions], self.root, self.image_column, self.known_labels)


def load(path, captions=True, image_column=None, caption_column=None, skip=False):
    """A Dataset from any layout of the module docstring.

    captions=False allows pictures without one (VAE training). image_column, caption_column: names in jsonl, csv and
    tables; default: the usual ones. skip: leave out, counted and said, what has no caption or no picture, instead of
    raising UserError.
    """
    path, columns = str(path), (image_column, caption_column)
    if path.endswith(".tar") or ".tar{" in path or re.search(r"\{\d+\.\.\d+\}", path):
        items = [item for shard in _expand(path) for item in _tar_items(shard)]
    elif Path(path).is_dir():
        items = _folder_items(Path(path), columns, skip)
    elif Path(path).suffix == ".csv" and Path(path).is_file():
        items = _listed(Path(path), list(_csv_rows(Path(path), columns)), skip)
    elif Path(path).suffix == ".json" and Path(path).is_file():
        items = _listed(Path(path), _coco_rows(Path(path)), skip)
    elif Path(path).suffix in TABLES and Path(path).is_file():
        items = _table_items(Path(path), columns)
    else:
        raise UserError(
            f"{path}: no such folder, .tar, .csv, .json or .parquet file"
            + (" (a Hub data set must be here as files: an image folder, or its parquet files)" if "/" in path else "")
        )
    if path.endswith((".tar", ".json")):
        _no_columns(path, columns)
    silent = [item.key for item in items if not item.captions]
    if captions and silent:
        listed = ", ".join(printable(k) for k in silent[:5])
        if not skip or len(silent) == len(items):
            raise UserError(f"{path}: {len(silent)} of {len(items)} pictures have no caption: {listed}")
        print(f"warning: {path}: {len(silent)} pictures without a caption are left out: {listed}", file=sys.stderr)
        items = [item for item in items if item.captions]
    return Dataset(items, path, image_column)


# ---------------------------------------------------------------------------------------------------------
# Tar shards


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
                suffix = f".{suffix.lower()}"
                skipped += suffix not in SUFFIXES | {".txt", ".json", ".cls"}
                entry = found.setdefault(f"{folder}/{stem}" if folder else stem, {})
                if suffix in SUFFIXES:
                    entry["image"] = (shard, member.offset_data, member.size)
                elif suffix in (".txt", ".cls"):
                    entry[suffix] = _clean(tar.extractfile(member).read(CAPTION_LIMIT))
                elif suffix == ".json":
                    entry[suffix] = _json_caption(tar.extractfile(member).read(MEMBER_LIMIT), f"{shard}: {member.name}")
    except (tarfile.TarError, OSError, EOFError) as e:
        raise UserError(f"{shard}: not a readable tar file: {e}") from None
    if skipped:
        print(f"note: {shard}: {skipped} members are no pictures or captions, or too large: not used", file=sys.stderr)
    return [
        Item(key, *e["image"], _texts(e.get(".txt") or e.get(".json")), e.get(".cls"))
        for key, e in found.items()
        if "image" in e
    ]


def _json_caption(data, where):
    """The caption in a shard's .json member, if it has one under a usual name."""
    try:
        value = json.loads(data)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: {e}") from None
    if not isinstance(value, dict):
        return None
    return next((value[c] for c in CAPTION_COLUMNS if isinstance(value.get(c), str | list)), None)


def _clean(data):
    """Caption bytes -> text: UTF-8, byte-order mark stripped, bad bytes replaced; None when empty."""
    text = data.decode("utf-8-sig", errors="replace").strip() if isinstance(data, bytes) else str(data).strip()
    return text.replace("\0", "")[:CAPTION_LIMIT].encode("utf-8", errors="replace").decode() or None


def _texts(value):
    """A caption, a list of captions or None -> a tuple without empty ones."""
    values = value if isinstance(value, list | tuple) else [value]
    return tuple(t for t in (_clean(v) for v in values if v is not None) if t)


# ---------------------------------------------------------------------------------------------------------
# Folders and listings


def _pictures(root):
    """Sorted picture files under a folder."""
    files = (p for p in root.rglob("*") if p.suffix.lower() in SUFFIXES and p.name.lower() not in JUNK)
    return sorted(p for p in files if not p.name.startswith("._") and p.is_file())


def _folder_items(root, columns, skip):
    files = _pictures(root)
    tables = sorted(p for p in root.rglob("*") if p.suffix in TABLES)
    if tables and not files:
        return [item for table in tables for item in _table_items(table, columns)]
    captions = _listed_captions(root, columns)
    if not captions:
        _no_columns(root, columns)
    items = []
    for path in files:
        key = path.relative_to(root).as_posix()
        texts = captions.pop(key, ())
        if not texts and (text := path.with_suffix(".txt")).is_file():
            texts = _texts(text.read_bytes()[:CAPTION_LIMIT])
        label = key.split("/")[0] if "/" in key else None
        items.append(Item(key, str(path), 0, path.stat().st_size, texts, label))
    if captions:
        _absent(root, list(captions), skip)
    return items


def _no_columns(where, columns):
    """Raise UserError for a column (but the usual ones) that is asked of a layout without columns."""
    for given, usual, flag in zip(columns, (IMAGE_COLUMNS, CAPTION_COLUMNS), ("image", "caption"), strict=True):
        if given and given not in usual:
            raise UserError(
                f"{where}: `{flag}_column` {printable(given)}: there is no metadata.jsonl or table to have it"
            )


def _absent(where, names, skip):
    listed = ", ".join(printable(k) for k in names[:5])
    if not skip:
        raise UserError(f"{where}: {len(names)} captions name a picture that is not there: {listed}")
    print(f"warning: {where}: {len(names)} captions without a picture are left out: {listed}", file=sys.stderr)


def _listed_captions(root, columns):
    """{relative file name: captions} from metadata.jsonl, metadata.csv or captions.json, anywhere under the root."""
    found = {}
    for listing in sorted(p for name in LISTINGS for p in root.rglob(name)):
        base = listing.parent.relative_to(root)
        rows = {".csv": _csv_rows, ".jsonl": _jsonl_rows, ".json": _json_rows}[listing.suffix]
        for where, name, texts in rows(listing, columns):
            key = (base / name).as_posix()
            if key in found:
                raise UserError(f"{where}: {printable(name)} is listed twice")
            _inside(root, root / key, where)
            found[key] = texts
    return found


def _inside(root, path, where):
    """Raise UserError when a path leaves the data root, by its name or by a link."""
    real, top = os.path.realpath(path), os.path.realpath(root)
    if os.path.commonpath([real, top]) != top:
        raise UserError(f"{where}: {printable(path)} is outside the data folder")


def _name(value, where):
    """A listed file name, relative and without steps upwards."""
    if not isinstance(value, str) or not value:
        raise UserError(f"{where}: no file_name")
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise UserError(f"{where}: {printable(value)} is outside the data folder")
    return value


def _text_of(path):
    try:
        if path.stat().st_size > JSON_LIMIT:
            raise UserError(f"{path}: {path.stat().st_size >> 20} MB is too large for a listing")
        return path.read_text(encoding="utf-8-sig", errors="replace")
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def _column(given, usual, there, where, what):
    """The column to read. Raises UserError naming those that are there."""
    found = [given] if given in there else [c for c in usual if c in there] if given in (None, *usual) else []
    if not found:
        wanted = printable(given) if given else " or ".join(usual)
        flag = f"--{what}-column"
        raise UserError(
            f"{where}: no column {wanted}; it has {', '.join(map(printable, there))} ({flag}){nearest(wanted, there)}"
        )
    return found[0]


def _csv_rows(path, columns):
    """(where, file name, captions) of every row."""
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(io.StringIO(_text_of(path)))
    there = [c for c in reader.fieldnames or () if c]
    image = _column(columns[0], IMAGE_COLUMNS, there, path, "image")
    caption = _column(columns[1], CAPTION_COLUMNS, there, path, "caption")
    try:
        for row in reader:
            where = f"{path}:{reader.line_num}"
            yield where, _name(row[image], where), _texts(row[caption])
    except csv.Error as e:
        raise UserError(f"{path}:{reader.line_num}: {e}") from None


def _jsonl_rows(path, columns):
    for n, line in enumerate(_text_of(path).split("\n"), 1):
        where = f"{path}:{n}"
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{where}: {e}") from None
        if not isinstance(row, dict):
            raise UserError(f"{where}: no JSON object")
        if columns[0] and columns[0] not in (*row, *IMAGE_COLUMNS):
            raise UserError(f"{where}: no {columns[0]}; it has {', '.join(map(printable, row))} (`image_column`)")
        image = next((c for c in ((columns[0],) if columns[0] else ()) + IMAGE_COLUMNS if c in row), None)
        caption = next((c for c in ((columns[1],) if columns[1] else CAPTION_COLUMNS) if c in row), None)
        if columns[1] and caption is None:
            raise UserError(f"{where}: no {columns[1]}; it has {', '.join(map(printable, row))} (`caption_column`)")
        yield where, _name(row.get(image), where), _texts(row.get(caption) if caption else None)


def _json_rows(path, columns):
    try:
        pairs = json.loads(_text_of(path)).items()
    except (ValueError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: {e}") from None
    for name, value in pairs:
        yield str(path), _name(name, path), _texts(value)


def _coco_rows(path):
    """Rows of a COCO annotation file, or of a captions.json that is given by itself."""
    try:
        value = json.loads(_text_of(path))
        if "annotations" not in value:
            return list(_json_rows(path, None))
        names, texts = {i["id"]: i["file_name"] for i in value["images"]}, {}
        for note in value["annotations"]:
            texts.setdefault(note["image_id"], []).append(note["caption"])
    except (ValueError, KeyError, TypeError, AttributeError, RecursionError) as e:
        raise UserError(f"{path}: not a COCO annotation file: {type(e).__name__} {e}") from None
    if strange := [i for i in texts if i not in names]:
        raise UserError(f"{path}: {len(strange)} annotations are of pictures that are not in it: {strange[:5]}")
    return [(str(path), _name(name, path), _texts(texts.get(i))) for i, name in names.items()]


def _listed(listing, rows, skip):
    """Items of a listing whose pictures are searched beside it: by path, else by name or stem in any folder there."""
    root, by_name = listing.parent, {}
    for path in _pictures(root):
        for name in (path.relative_to(root).as_posix(), path.name, path.stem):
            by_name.setdefault(name, []).append(path)
    items, absent, seen = {}, [], {}
    for where, name, texts in rows:
        there = by_name.get(name) or by_name.get(Path(name).name, [])
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
        seen[key] = where
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
    arrow = _pyarrow(path)
    try:
        if path.endswith(".parquet"):
            return arrow.parquet.read_schema(path).names
        with arrow.memory_map(path) as source:
            return arrow.ipc.open_stream(source).schema.names
    except (arrow.ArrowException, OSError) as e:
        raise UserError(f"{path}: not readable: {str(e).splitlines()[0]}") from None


def _table_items(path, columns):
    """A row a picture; its bytes stay in the file until they are asked for."""
    there = _names(str(path))
    _column(columns[0], IMAGE_COLUMNS, there, path, "image")
    caption = next((c for c in ((columns[1],) if columns[1] else CAPTION_COLUMNS) if c in there), None)
    if columns[1] and caption is None:
        _column(columns[1], CAPTION_COLUMNS, there, path, "caption")
    if caption is None:
        rows = _count(str(path))
        return [Item(f"{path.name}:{i}", str(path), i, -1) for i in range(rows)]
    texts = _table(str(path), [caption]).column(caption).to_pylist()
    return [Item(f"{path.name}:{i}", str(path), i, -1, _texts(t)) for i, t in enumerate(texts)]


@functools.lru_cache(maxsize=8)
def _group(path, column, group):
    """(first row, values) of the image column in one row group, the piece in which such files are read."""
    if not path.endswith(".parquet"):
        return 0, _table(path, [column]).column(column)
    file = _pyarrow(path).parquet.ParquetFile(path)
    first = sum(file.metadata.row_group(i).num_rows for i in range(group))
    return first, file.read_row_group(group, columns=[column]).column(column)


def _count(path):
    if path.endswith(".parquet"):
        return _pyarrow(path).parquet.read_metadata(path).num_rows
    return len(_table(path, _names(path)[:1]))


@functools.lru_cache(maxsize=4096)
def _starts(path):
    """The first row of every row group."""
    if not path.endswith(".parquet"):
        return [0]
    meta = _pyarrow(path).parquet.ParquetFile(path).metadata
    return np.cumsum([0] + [meta.row_group(i).num_rows for i in range(meta.num_row_groups - 1)]).tolist()


def _row_bytes(item, column):
    column = _column(column, IMAGE_COLUMNS, _names(item.path), item.path, "image")
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

    def one(self, i):
        if i in self.kept:
            return self.kept[i]
        image = fit(self.dataset.image(i), self.resolution, self.resolution)
        array = np.ascontiguousarray(np.asarray(image).transpose(2, 0, 1))
        if len(self.kept) < self.room:
            self.kept[i] = array
        return array

    def batch(self, positions):
        """Pixels [B, 3, R, R] in [-1, 1] of the given dataset positions."""
        return torch.from_numpy(np.stack([self.one(i) for i in positions])).float() / 127.5 - 1
