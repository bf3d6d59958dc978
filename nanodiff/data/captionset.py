"""Captioned pictures in the captioner's form, and what is done to them before training.

    rows = read("titles.csv")                                     # [Row(name, captions, …)], of Image_Name and Title
    dataset = pictures(located(rows, ["data/images"]), "titles.csv")    # a data.Dataset, for the loader
    parts, counts = split(original, synthetic, seed=42)           # {"train": rows, "val": rows, "test": rows}

CSV: `Image_Name` is a picture's file name without its suffix, `Title` a text or a list of texts (["…"]); several rows of one name are
several captions of one picture. Synthetic rows also name the row that they vary (`Source_Name`). Files are UTF-8, a mark at their
beginning is ignored.

    python -m nanodiff.captionset export assets/emoji/emoji.tar out/emoji    # any data set as titles.csv and images/
"""

import argparse
import csv
import filecmp
import hashlib
import io
import json
import os
import re
import sys
from collections import Counter
from pathlib import Path
from typing import NamedTuple

import numpy as np

from nanodiff.commandline import tool
from nanodiff.config import UserError, printable, short, spreadsheet
from nanodiff.data import sources, tables
from nanodiff.device import dist
from nanodiff.files import append, claim, write_bytes
from nanodiff.output import images

COLUMNS = ("Image_Name", "Title")
NAMES = ("Image_Name", *(n for n in tables.NAMES if n != "Image_Name"))
CAPTIONS = ("Title", *(n for n in tables.CAPTIONS if n != "Title"))
SOURCE = "Source_Name"
UNKNOWN = "?"  # the source of a synthetic row that names none
# a line of a job's .out
LOGGED = re.compile(r"(?P<name>[^,|/\\]+?)\.(?:jpe?g|png|webp)\s*(?:[:,|\t]|->|=>)\s*(?P<title>.+)$", re.I)


# what stands before a picture's name, which may have spaces: a time, a count, a word of the program that wrote the log
PREFIX = re.compile(
    r"^\s*(?:(?:\[[^\]]*\]|\(?\d+/\d+\)?|[\d:.,T-]{8,}|(?:saved?|saving|generated?|generating|wr(?:ote|iting)|written|done|info|images?|pictures?"
    r"|files?|captions?|for|to|as|of|in|at|the)\b)[\s:=-]*)*", re.I
)  # fmt: skip


class Row(NamedTuple):
    """One picture and its captions. path: its file, when known; source: the name of the original that it varies, "" for originals."""

    name: str
    captions: tuple
    path: str = ""
    source: str = ""


def read(path, clean=False, skip=False, captions=True):
    """[Row] of a CSV, or of a job's `.out` log (lines `name.jpg: caption`); rows of one name become one. clean: see cleaned(). skip: leave
    out, counted and said, what has no caption. captions=False: they may be missing. Raises UserError naming the file, and the line, of everything else that is wrong."""
    path = Path(path)
    found = _logged(path) if path.suffix in (".out", ".log") else _table(path, captions)
    empty, rows = [], {}
    for name, titles, source, where in found:
        titles = tuple(t for t in (cleaned(t) if clean else t.replace("\0", "").strip() for t in titles) if t)
        if not titles and captions:
            empty.append(f"{where} ({printable(name)})")
            continue
        known = rows.get(name, Row(name, (), "", source))
        if source != known.source:
            raise UserError(
                f"{where}: {printable(name)} varies {short(source)}, an earlier row says {short(known.source)}"
            )
        rows[name] = known._replace(captions=tuple(dict.fromkeys(known.captions + titles)))
    if empty:
        what = f"{path}: {len(empty)} captions are empty: {', '.join(empty[:5])}"
        if not skip or not rows:
            raise UserError(f"{what} (`skip_bad` leaves them out)" if rows else what)
        dist.say(f"warning: {what}; they are left out")
    if not rows:
        raise UserError(f"{path}: has no rows")
    return list(rows.values())


def _table(path, captions=True):
    """(name, titles, source, where) of every row of a table."""
    header, rows = tables.rows(path)
    name = tables.column(None, NAMES, header, path)
    title = tables.column(None, CAPTIONS, header, path) if captions or set(CAPTIONS) & set(header) else None
    suffixes = {}
    for where, row in rows:
        if not row[name].strip():
            raise UserError(f"{where}: no {name}")
        found = tables.captions_in(row[title], where) if title else ()
        stem, source = _stem(row[name], where), row.get(SOURCE, "").strip()
        suffix = row[name].strip()[len(stem) :].lower()
        if suffix and suffixes.setdefault(stem, suffix) != suffix:
            raise UserError(
                f"{where}: {printable(stem)} is a {suffixes[stem]} in an earlier row and a {suffix} here: one name for two pictures"
            )
        yield stem, found, images.bare(source), where


def _logged(path):
    """(name, titles, source, where) of the lines of a job's log that name a picture and its caption; says how many others there are."""
    others = 0
    for i, line in enumerate(re.split(r"\r\n|\n|\r", tables.text_of(path)), 1):
        match = LOGGED.search(line)
        if match:
            yield _stem(PREFIX.sub("", match["name"]), path), [match["title"].strip().strip("'\"")], "", f"{path}:{i}"
        else:
            others += bool(line.strip())
    if others:
        dist.say(f"note: {path}: {others} lines name no picture with a caption and are not used")


def _stem(name, where):
    """A picture's name without its suffix, which stays inside its folder."""
    name = images.bare(tables.name_in(name.strip(), where))
    if not name or any(len(p.encode()) > 200 for p in Path(name).parts):
        raise UserError(f"{where}: {short(name)} is no picture's name")
    return name


def cleaned(text):
    """Lower case, single spaces."""
    return " ".join(text.replace("\0", "").lower().split())


def find(name, folders, known=None):
    """The file of a picture among some folders, or None. Raises UserError when two folders have different pictures of that name. known: a dict that keeps
    what is in the folders, for many names."""
    known, found = {} if known is None else known, []
    for path in (Path(folder) / name for folder in folders):
        if path.parent not in known:
            known[path.parent] = _pictures(path.parent)
        found += known[path.parent].get(path.name, ())
    if different := [p for p in found[1:] if not filecmp.cmp(p, found[0], shallow=False)]:
        raise UserError(f"{found[0]} and {different[0]} are different pictures of one name; rename one")
    return found[0] if found else None


def _pictures(folder):
    """{name without suffix: [picture's file]} of a folder."""
    found = {}
    for entry in sorted(os.scandir(folder), key=lambda e: e.name) if folder.is_dir() else ():
        if Path(entry.name).suffix.lower() in sources.SUFFIXES and entry.is_file():
            found.setdefault(images.bare(entry.name), []).append(folder / entry.name)
    return found


def located(rows, folders, skip=False):
    """The rows with their files. skip: leave out, counted and said, those without. Raises UserError."""
    for folder in folders:
        if not Path(folder).is_dir():
            raise UserError(f"`image_path` {folder}: no such folder")
    known = {}
    found = [row._replace(path=str(path) if (path := find(row.name, folders, known)) else "") for row in rows]
    absent = [row.name for row in found if not row.path]
    if absent:
        what = f"{len(absent)} of {len(rows)} pictures are not in {', '.join(map(str, folders))}: {', '.join(map(printable, absent[:5]))}"
        if not skip or len(absent) == len(rows):
            raise UserError(f"{what} (`skip_bad` leaves them out)" if len(absent) < len(rows) else what)
        dist.say(f"warning: {what}; they are left out")
    return [row for row in found if row.path]


def pictures(rows, where):
    """A data.Dataset of located rows."""
    items = [sources.Item(row.name, row.path, 0, Path(row.path).stat().st_size, row.captions) for row in rows]
    return sources.Dataset(items, str(where))


def table(rows, more=()):
    """Bytes of a CSV with Image_Name and Title, a list of texts. more: {column: value of a Row}."""
    return _encoded([[*COLUMNS, *dict(more)]]) + b"".join(line(row, more) for row in rows)


def line(row, more=()):
    """A Row's line of table()."""
    return _encoded(
        [[row.name, json.dumps(list(row.captions), ensure_ascii=False), *(f(row) for f in dict(more).values())]]
    )


def _encoded(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows(rows)
    return out.getvalue().encode("utf-8", "replace")


def write(path, rows, more=()):
    """A whole table() at once."""
    write_bytes(path, table(rows, more))


# ---------------------------------------------------------------------------------------------------------
# Variations

KIND = r"(?:variations?|options?|captions?|versions?|alternatives?|ideas?|suggestions?|rephras\w+)"
MARK = re.compile(  # what stands before an item of a list: a bullet, a number, a letter, "Option 2 (Simple):"
    rf"^\s*(?:[-*•–—+▪◦●]+\s+|[-•▪◦●]\s*(?=\S)|\(?\d{{1,2}}\s?[.):\]、．）：]\s*(?!\d)|[\[(]\d{{1,2}}[\])]\s*|\(?[a-z][.)]\s+|{KIND}\s*(?:\#?\d+|[a-z]\b)?\s*(?:\([^)]*\))?\s*[:.)–—-]\s*)",
    re.I,
)
LABEL = re.compile(r"^\*\*[^*]{1,40}?(?::\*\*|\*\*\s*[:–—-])\s*")  # **Simple:** …
TAG = re.compile(r"<[/|]?\w[^<>]{0,30}>")
THOUGHT = re.compile(r"<(think|thinking|thought|reasoning)>.*?(?:</\1>|\Z)", re.I | re.S)
BREAK = re.compile(r"<br\s*/?>|</?(?:li|p|div|tr)>", re.I)
ABOUT = r"(?:this|adds|adding|changes|changing|emphasi[sz]\w*|rephras\w*|more\s+(?:detail\w*|descriptive|formal|specific|concise|casual|vivid)|shorter|longer)\b"
REMARK = re.compile(  # behind a caption: what the model says of it, in brackets to the end or behind a dash
    rf"\s+(?:\({ABOUT}[^()]*\)|\[{ABOUT}[^\[\]]*\]|[-–—]+\s+{ABOUT}.*)\s*$", re.I
)  # fmt: skip
QUOTES = "\"'“”‘’"
OPENING, CLOSING = re.compile(r"(?<!\w)[\"'“‘](?=\w)"), re.compile(r"(?<=\w)[\"'”’](?!\w)")
PERSONAL = re.compile(  # words of somebody who talks to somebody
    r"(?<![\w-])(?:i|i'm|i'll|i've|i'd|me|my|you|you'd|you're|your|let's|let me|feel free|hope|please|thanks?|sure|certainly|of course|absolutely|okay|here are|here is"
    r"|here's|below are|as requested|these captions?|these variations?|would like|want me to|note that|note:|explanation)(?![\w-])",
    re.I,
)
SKIPPED = re.compile(rf"^(?:original(?:\s+{KIND})?|input|prompt|assistant|model|user|output|json)\b\s*(?::|$)", re.I)


def _listed(body):
    """The list of a reply that is JSON: [captions], or an object with such a list; None for text, which may begin with a bracket, too."""
    try:
        value = json.loads(body) if body[:1] in ("[", "{") else None
    except (ValueError, RecursionError):
        return None
    return next((v for v in value.values() if isinstance(v, list)), None) if isinstance(value, dict) else value


def _items(text):
    """Lines of a reply, (line, was it an item of a list?); a JSON list is its texts."""
    body = BREAK.sub("\n", THOUGHT.sub("", text))
    body = re.sub(r"^```\w*$", "", body, flags=re.M).strip()
    if (value := _listed(body)) is not None:
        return [(v if isinstance(v, str) else "", True) for v in value]
    lines = []
    for line in re.split(r"\r\n|\n|\r", body):
        line = TAG.sub(" ", line).strip().strip("|").strip()
        # 1. … 2. … 3. … on one
        parts = re.split(r"\s+(?=\(?\d{1,2}[.)]\s)", line) if re.match(r"\(?1[.)]\s", line) else [line]
        lines += [part.lstrip("> ").strip() for part in parts]
    return [
        (line, any((m := MARK.match(form)) and m.end() < len(form) for form in (line, line.replace("*", ""))))
        for line in lines
    ]


def _caption(line):
    """A line without what marks it as an item: bullet, number, label, quotes, markup, a remark behind a quoted caption."""
    for _ in range(2):
        line = LABEL.sub("", MARK.sub("", line).strip())
    line = MARK.sub("", line.replace("**", "").strip())
    line = re.sub(r"(?<!\w)[*_`]+(\S.*?\S|\S)[*_`]+(?!\w)", r"\1", line)
    if quoted := re.match(r"[\"“]([^\"”]+)[\"”](?:\s*[-–—:(].*|[.,;!]*)?$", line):
        line = quoted[1]
    line = _unquoted(REMARK.sub("", line.replace("*", "")).strip(" `").rstrip(".,; ")).rstrip(".,; ")
    return "".join(c for c in " ".join(line.split()) if c.isprintable())


def _unquoted(line):
    """A line without quotes around it, or at an end of it alone; those around a word of it are its own."""
    if len(line) > 1 and line[0] in QUOTES and line[-1] in QUOTES:
        inner = line[1:-1]
        opened, closed = OPENING.search(inner), CLOSING.search(inner)
        # 'The Classic' with 'more': the first is closed before the last is opened
        if not (opened and closed and closed.start() < opened.start()):
            return _unquoted(inner.strip())
    if line[-1:] in QUOTES and line and not OPENING.search(line[:-1]):
        line = line[:-1].rstrip()
    if line[:1] in QUOTES and line and not CLOSING.search(line[1:]):
        line = line[1:].lstrip()
    return line


def variations(text, original, low=2, high=10, known=(), cut=False):
    """Captions of a language model's reply, one a line: without bullets, numbers, labels, quotes and markup; `low` to `high` words each; each
    once, and none that is the original or in `known`, however they are written. What the model says about them is none: where a reply has a
    list, only its items count. cut: the reply was ended by the limit of its tokens, so its last line is not whole."""
    items = _items(text)
    items = items[:-1] if cut and items and not text.endswith("\n") else items
    listed = any(marked for _, marked in items)
    seen, out = {cleaned(t) for t in (original, *known)}, []
    for raw, marked in items:
        line = _caption(raw)
        chatter = (
            line.endswith((":", "?"))
            or PERSONAL.search(line if marked else raw)
            or SKIPPED.match(raw.replace("*", ""))
            or raw.startswith("#")
        )
        if chatter or (listed and not marked) or not low <= len(line.split()) <= high or cleaned(line) in seen:
            continue
        if not any(c.isalpha() for c in line) or "\N{REPLACEMENT CHARACTER}" in line:
            continue
        seen.add(cleaned(line))
        out.append(line)
    return out


def seed_of(seed, *parts):
    """A random seed for something by its name: the same whatever else is drawn."""
    digest = hashlib.blake2b("/".join(map(str, (seed, *parts))).encode("utf-8", "replace"), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 33


class Journal:
    """The variations that a run has made so far, in a folder: NAME.jsonl, a line for each original, flushed; beside it the table for
    people, NAME_captions.csv, which grows with it, and NAME_shortfall.csv, the originals with fewer variations than were asked for.

    Every process writes lines of its own into NAME-RANK.jsonl. A run that was killed loses at most the lines that it was writing.
    anew: one that was begun with other settings or captions is begun again, which otherwise raises UserError."""

    def __init__(self, folder, kind, rows, settings, anew=False):
        self.folder, self.name, self.rows = Path(folder), kind, rows
        self.csv, self.shortfall = self.tables(folder, kind)
        self.names, taken = [], set()  # file names as they will be on disk
        for i, row in enumerate(rows):
            name = images.slug(row.name)
            while name in taken:
                name += f"_{i}"
            taken.add(name)
            self.names.append(name)
        digest = hashlib.blake2b(json.dumps([[r.name, *r.captions] for r in rows]).encode(), digest_size=12).hexdigest()
        self.settings = json.loads(json.dumps(settings | {"captions": digest}))
        self.lock, self.anew = None, anew  # rank 0's lock
        dist.on_main(self._claim)
        try:
            self.done = dist.on_main(self._begin)
        except UserError:
            self.close()
            raise
        self.own = self.folder / f"{kind}-{dist.world().rank}.jsonl"
        append(self.own, (json.dumps({"settings": self.settings}) + "\n").encode("utf-8", "replace"))

    @staticmethod
    def tables(folder, kind):
        """The files of captions, and of what is lacking."""
        return [Path(folder) / f"{kind}_{what}.csv" for what in ("captions", "shortfall")]

    def _claim(self):
        self.lock = claim(self.folder, "captions")

    def close(self):
        """Let go of the folder."""
        if self.lock:
            self.lock.close()
            self.lock = None

    def _files(self):
        """The journal of all, and those of the processes."""
        return [
            p
            for p in sorted(self.folder.glob(f"{self.name}*.jsonl"))
            if re.fullmatch(rf"{self.name}(-\d+)?\.jsonl", p.name)
        ]

    def _begin(self):
        """{index: (variations, replies)} of what is there."""
        whole, done = self.folder / f"{self.name}.jsonl", {}
        for path in self._files():
            # the last one was not finished
            for text in path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1]:
                try:
                    record = json.loads(text)
                except ValueError as e:
                    raise UserError(f"{path}: not a record of variations: {e}") from None
                if "settings" in record:
                    if not self._same(path, record["settings"]):
                        done = {}
                        break
                else:
                    done[record["row"]] = (record["variations"], record["replies"])
        self._rewrite(whole, done)
        return done

    def _same(self, path, before):
        """Is what was written under `before` of this run? Otherwise it is to be begun again, or UserError."""
        for key, value in self.settings.items():
            if key == "model_sha256" and key not in before:
                continue  # of a version that did not write it down
            if before.get(key) != value:
                if self.anew:
                    return False
                raise UserError(f"{path}: was begun with another {key} ({printable(before.get(key))}, not {printable(value)}); take another `output_dir` "
                                "(or `overwrite_output_dir`)")  # fmt: skip
        return True

    def _rewrite(self, whole, done):
        """One file of everything, in the order of the rows; the processes' own are gone."""
        lines = [
            {"settings": self.settings},
            *({"row": i, "variations": v, "replies": n} for i, (v, n) in sorted(done.items())),
        ]
        write_bytes(whole, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in lines).encode("utf-8", "replace"))
        for path in self._files():
            if path != whole:
                path.unlink()
        write(self.csv, [row for i in sorted(done) for row in self._made(i, done[i][0])], self._columns)

    _columns = {SOURCE: lambda row: row.source}

    def _made(self, i, found):
        return [Row(f"{self.names[i]}_v{k}", (text,), "", self.rows[i].name) for k, text in enumerate(found, 1)]

    def add(self, i, found, replies):
        """Write down the variations of row i, and after how many replies there were so many."""
        text = json.dumps({"row": i, "variations": found, "replies": replies}, ensure_ascii=False) + "\n"
        append(self.own, text.encode("utf-8", "replace"))
        if i not in self.done:
            append(self.csv, b"".join(line(row, self._columns) for row in self._made(i, found)))

    def finish(self, wanted):
        """Every process calls it at the end. wanted: variations of each. Returns {what: count}."""
        dist.gathered(None)  # all have written
        done = dist.on_main(self._begin)
        few = [
            (spreadsheet(self.rows[i].name), spreadsheet(self.rows[i].captions[0]), len(v), n)
            for i, (v, n) in sorted(done.items())
            if len(v) < wanted
        ]
        listed = _encoded([["Image_Name", "Title", "variations", "replies"], *few])
        dist.on_main(write_bytes, self.shortfall, listed)
        self.close()
        return {
            "captions": len(done),
            "variations": sum(len(v) for v, _ in done.values()),
            "captions_with_fewer": len(few),
        }


# ---------------------------------------------------------------------------------------------------------
# Splits


def content(path):
    """A hash of a picture's pixels, whatever its file's format or metadata. Raises UserError for one that cannot be read."""
    image = images.open_image(path)
    return hashlib.blake2b(f"{image.size}".encode() + image.tobytes(), digest_size=16).hexdigest()


def merged(rows, skip=False):
    """({content(): row}, {name of a copy: of the one that stays}) of located rows: copies give their captions to the first of them. skip:
    leave out, counted and said, what cannot be read."""
    out, copies, bad = {}, {}, []
    for row in dist.progress(rows, len(rows), "pictures"):
        try:
            key = content(row.path)
        except UserError as e:
            if not skip:
                raise UserError(f"{e} (`skip_bad` leaves it out)") from None
            bad.append(str(e))
            continue
        if key in out:
            copies[row.name] = out[key].name
            row = out[key]._replace(captions=tuple(dict.fromkeys(out[key].captions + row.captions)))
        out[key] = row
    if bad:
        dist.say(f"warning: {len(bad)} pictures cannot be read and are left out, such as {bad[0]}")
    return out, copies


def split(original, synthetic, seed=42, shares=(0.8, 0.1, 0.1), apart=False, skip=False):
    """({"train" | "val" | "test": [Row]}, {what: count}) of located rows. Of the total, by `shares`: the test part is of originals alone, the
    validation part half of each, the training part what remains.

    Beforehand: pictures with the same pixels become one with all their captions; a synthetic caption that an original or an earlier synthetic
    picture has is dropped, so is a synthetic picture that is an original's copy. So no picture is in two parts, and no synthetic caption
    is another part's. apart: also drop synthetic pictures from training and validation whose source is in the test part, and from training
    whose source is in the validation part. The same rows in any order give the same parts."""
    synthetic = [row._replace(source=row.source or UNKNOWN) for row in synthetic]
    if apart and (strangers := [row.name for row in synthetic if row.source == UNKNOWN]):
        raise UserError(f"`apart` needs to know what {len(strangers)} synthetic pictures vary, such as {printable(strangers[0])}: their CSV has no "
                        f"{SOURCE}")  # fmt: skip
    seen = Counter(row.name for row in (*original, *synthetic))
    if twice := [n for n, k in seen.items() if k > 1]:
        raise UserError(
            f"two different pictures are called {printable(twice[0])}; rename one, since Image_Name must tell them apart"
        )
    counts = Counter({"original rows": len(original), "synthetic rows": len(synthetic)})
    real, copies = merged(sorted(original), skip)
    synthetic = [row._replace(source=copies.get(row.source, row.source)) for row in synthetic]
    drawn, twins = merged(sorted(synthetic), skip)
    counts |= {"original copies merged": len(copies), "synthetic copies merged": len(twins)}
    taken, kept = {cleaned(t) for row in real.values() for t in row.captions}, []
    for key, row in drawn.items():
        if key in real:
            counts["synthetic pictures that are originals"] += 1
            continue
        captions = tuple(t for t in row.captions if cleaned(t) not in taken)
        counts["synthetic captions dropped"] += len(row.captions) - len(captions)
        if captions:
            taken |= {cleaned(t) for t in captions}
            kept.append(row._replace(captions=captions))
    real, total = list(real.values()), len(real) + len(kept)
    rng = np.random.default_rng(seed)
    real, kept = ([rows[i] for i in rng.permutation(len(rows))] for rows in (real, kept))
    n_test, n_val = (max(1, round(share * total)) for share in shares[:0:-1])
    n_drawn = min(n_val // 2, len(kept)) if kept else 0
    n_real = n_val - n_drawn
    if n_test + n_real >= len(real):
        raise UserError(
            f"{len(real)} different originals are too few: of {total} pictures in all the test part takes {n_test} and the validation part "
            f"{n_real} of them; give more originals, fewer synthetic pictures or smaller shares (`test_share`, `val_share`)"
        )
    test, val = real[:n_test], real[n_test : n_test + n_real]
    if apart:  # it is judged by no picture whose source is learned from, or tested
        learned = {row.name for row in [*real[n_test + n_real :], *test]}
        kept.sort(key=lambda row: row.source in learned)
        free = sum(row.source not in learned for row in kept)
        if free < n_drawn:
            counts["fewer validation pictures, as others' sources are learned from"] = n_drawn - free
            n_drawn = free
    val, train = val + kept[:n_drawn], real[n_test + n_real :] + kept[n_drawn:]
    if apart:
        named = {row.name for row in test}
        named |= {row.name for row in val if not row.source}
        rest = [row for row in train if row.source not in named]
        counts["left out for their source"] = len(train) - len(rest)
        train = rest
    held, known = {row.name for row in test}, {row.name for row in original} | {UNKNOWN}
    if strangers := sum(row.source not in known for row in synthetic):
        counts["synthetic pictures of no original here"] = strangers
    parts = {"train": sorted(train), "val": sorted(val), "test": sorted(test)}
    counts["training pictures whose source is tested"] = sum(row.source in held for row in train)
    for name, rows in parts.items():
        counts[f"{name} original"] = sum(not row.source for row in rows)
        counts[f"{name} synthetic"] = sum(bool(row.source) for row in rows)
    return parts, dict(counts)


# ---------------------------------------------------------------------------------------------------------
# Tool


def export(source, target):
    """Any data set with captions as TARGET/titles.csv and TARGET/images/, the pictures' bytes as they are."""
    dataset, target, rows, taken = sources.load(source), Path(target), [], set()
    read = {Path(p).resolve() for p in (source, *(item.path for item in dataset.items))}
    if any(p == (target / "titles.csv").resolve() or p.is_relative_to((target / "images").resolve()) for p in read):
        raise UserError(f"{target}: its titles.csv or images/ would replace what is read; take another folder")
    (target / "images").mkdir(parents=True, exist_ok=True)
    for i in range(len(dataset)):
        key = Path(dataset.keys[i])
        name = images.slug(images.bare(key.name))
        while name in taken:
            name += f"_{i}"
        taken.add(name)
        kept = dataset.data(i)
        # there may be thousands; the table, at the end, is synced
        write_bytes(target / "images" / f"{name}{images.suffix_of(kept)}", kept, sync=False)
        rows.append(Row(name, dataset.texts[i]))
    write_bytes(target / "titles.csv", table(rows))
    print(f"{len(rows)} pictures: {target / 'titles.csv'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="command", required=True)
    part = parts.add_parser("export", help="any data set as titles.csv and images/")
    part.add_argument("source")
    part.add_argument("target")
    given = parser.parse_args()
    return tool(lambda: export(given.source, given.target))


if __name__ == "__main__":
    sys.exit(main())
