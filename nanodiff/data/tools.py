"""A data set as a whole: what is wrong with it, and all of it as one webdataset shard."""

import contextlib
import hashlib
import io
import json
import sys
import tarfile
from pathlib import Path

from tqdm import tqdm

from nanodiff.config import UserError, printable
from nanodiff.data.sources import load
from nanodiff.output.images import suffix_of


def check(path, image_column=None, caption_column=None):
    """The report of `python -m nanodiff.data check`, as (lines, number of faults)."""
    data = load(path, captions=False, image_column=image_column, caption_column=caption_column)
    sizes, faults, hashes = {}, [], {}
    for i, key in enumerate(tqdm(data.keys, desc="pictures", disable=not sys.stderr.isatty())):
        try:
            image = data.image(i)
        except UserError as e:
            faults.append(f"unreadable: {e}")
            continue
        sizes[image.size] = sizes.get(image.size, 0) + 1
        digest = hashlib.sha256(f"{image.size}".encode() + image.tobytes()).hexdigest()
        if digest in hashes:
            faults.append(f"duplicate: {key} has the pixels of {hashes[digest]}")
        hashes.setdefault(digest, key)
        if not data.texts[i]:
            faults.append(f"no caption: {key}")
    common = sorted(sizes.items(), key=lambda kv: -kv[1])[:5]
    labels = {label for label in data.labels if label}
    lines = [f"pictures: {len(data)}", f"captions: {sum(len(t) for t in data.texts)}", f"labels: {len(labels)}"]
    lines += [f"size {w}x{h}: {n}" for (w, h), n in common]
    return lines + [printable(f) for f in faults[:50]], len(faults)


def pack(path, target, image_column=None, caption_column=None):
    """Write any layout as one webdataset shard: 000000.png, 000000.txt (first caption) or 000000.json (all of them)."""
    data = load(path, captions=False, image_column=image_column, caption_column=caption_column)
    target = Path(target)
    if target.resolve() in {Path(p).resolve() for p in (path, *(item.path for item in data.items))}:
        raise UserError(f"{target}: is a part of what is packed; take another name")
    if target.suffix.lower() != ".tar":
        raise UserError(f"{target}: is to be a webdataset shard, whose name ends in .tar")
    partial = target.with_name(f"{target.name}.partial")
    try:
        with tarfile.open(partial, "w", format=tarfile.PAX_FORMAT) as tar:
            for i, (item, texts) in enumerate(zip(data.items, data.texts, strict=True)):
                data.image(i)  # what cannot be read is not packed
                members = {suffix_of(data.data(i)): data.data(i)}
                if len(texts) > 1:
                    members[".json"] = json.dumps({"caption": list(texts)}, ensure_ascii=False).encode()
                elif texts:
                    members[".txt"] = texts[0].encode()
                if item.label:
                    members[".cls"] = item.label.encode("utf-8", "replace")
                for suffix, content in members.items():
                    info = tarfile.TarInfo(f"{i:06d}{suffix}")
                    info.size, info.mode = len(content), 0o644
                    tar.addfile(info, io.BytesIO(content))
        partial.replace(target)
    except OSError as e:
        raise UserError(f"{target}: cannot be written: {e.strerror}") from None
    finally:
        with contextlib.suppress(NotADirectoryError):  # it was to lie beneath a file
            partial.unlink(missing_ok=True)
    print(f"{target}: {len(data)} pictures")
