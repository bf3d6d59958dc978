"""Text files that say something about pictures: tables, JSON, lists of lines. One reader for training, the captioner and evaluation.

    header, found = rows("titles.csv")
    for where, row in found: row["Title"]                       # {column: text}, strict
    lines("prompts.txt")                                        # split at line ends alone

What is ambiguous is refused with its line, because a wrong caption trains as well as a right one: a text with commas and no quotes,
a quote that swallows the rows after it, a name that stands twice in a JSON object, bytes that are no UTF-8.
"""

import ast
import csv
import io
import json
import re
import tokenize
from itertools import pairwise
from pathlib import Path

from nanodiff.config import UserError, check_regular, clipped, nearest, printable, short
from nanodiff.device import dist

NAMES = ("file_name", "Image_Name", "image_name", "image", "file", "path", "image_id", "id")
CAPTIONS = ("text", "caption", "captions", "Title", "title", "prompt", "prompts", "prediction")
SUFFIXES = (".csv", ".tsv")
LIMIT = 1 << 30  # bytes of a listing
FIELD_LIMIT = 1 << 24  # of a cell
CAPTION_LIMIT = 16_384  # characters
STRAY = ("__macosx", "@eadir", "thumbs.db", "desktop.ini", "$recycle.bin", "lost+found")
# what begins a row: a picture's file, or its name without the suffix, which has a number
PICTURE, NUMBERED = re.compile(r"\S+\.(?:png|jpe?g|webp|bmp|gif|tiff?)", re.I), re.compile(r"[\w./-]*\d[\w./-]*")


def is_data(path):
    """Is this relative path somebody's data? Not what editors, cameras and operating systems leave beside it: names that begin with a
    dot, and STRAY."""
    parts = [part for part in Path(path).parts if part != ".."]
    return not any(part.startswith(".") or part.lower() in STRAY for part in parts)


def decoded(data, where):
    """Bytes -> text: UTF-8, a mark at its beginning left out. Raises UserError that says where it is something else."""
    if data[:2] in (b"\xff\xfe", b"\xfe\xff"):
        raise UserError(f"{where}: is UTF-16; save the file as UTF-8")
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as e:
        line = data[: e.start].count(b"\n") + 1
        raise UserError(f"{where}:{line}: is not UTF-8 (byte {e.start}); save the file as UTF-8") from None


def text_of(path, limit=LIMIT):
    """The text of a file. Raises UserError for one that is not there, too large, or no UTF-8."""
    path = Path(path)
    try:
        check_regular(path)
        if path.stat().st_size > limit:
            raise UserError(f"{path}: {path.stat().st_size >> 20} MB is too large for a text")
        return decoded(path.read_bytes(), path)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None


def lines(path):
    """The lines of a text file that are not empty, stripped. Only line ends divide them (str.splitlines() also cuts at U+2028 or a form feed)."""
    return [line for line in (part.strip() for part in re.split(r"\r\n|\n|\r", text_of(path))) if line]


def by_number(name):
    """The key of a sort in which 2.png comes before 10.png."""
    return re.sub(r"\d+", lambda m: m[0].zfill(24), name)


def name_in(value, where):
    """A listed file name: relative, without steps upwards, one that a file can have. Raises UserError."""
    if not isinstance(value, str) or not value.strip():
        raise UserError(f"{where}: no file_name")
    if (
        "\0" in value
        or any("\ud800" <= c <= "\udfff" for c in value)
        or max(len(p.encode()) for p in value.split("/")) > 255
        or len(value.encode()) > 2000  # with its folder, less than any system's longest path
    ):
        raise UserError(f"{where}: {short(value)} is no file's name")
    if Path(value).is_absolute() or ".." in Path(value).parts:
        raise UserError(f"{where}: {short(value)} is outside the data folder")
    return value


def titles(text, where):
    """A list of strings as CSVs hold it, ["…"] (JSON) or ['…'] (Python). Raises UserError for a broken one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    try:
        value = _literal(text.strip()) if value is None else value
    except (ValueError, SyntaxError, RecursionError, MemoryError, tokenize.TokenError):
        raise UserError(f"{where}: {short(text)} is no list of captions") from None
    if not isinstance(value, list) or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where}: {short(text)} is no list of captions")
    return value


def _literal(text):
    """A Python list. Raises ValueError for two texts with no comma between them, as arrays are printed: Python would join them."""
    tokens = [t.type for t in tokenize.generate_tokens(io.StringIO(text).readline) if t.type != tokenize.NL]
    if any(a == b == tokenize.STRING for a, b in pairwise(tokens)):
        raise ValueError("no comma between two texts")
    return ast.literal_eval(text)


def captions_in(value, where):
    """The captions of a cell or a JSON value, as a tuple without empty ones: a text, a list of texts, a list written as text (["…"]), None."""
    if isinstance(value, str):
        text = value.strip()
        listed = text == "[]" or (text[:1] == "[" and text[1:].lstrip()[:1] in ("'", '"'))
        value = titles(text, where) if listed else text
    values = value if isinstance(value, list | tuple) else [] if value is None else [value]
    if strange := [v for v in values if not isinstance(v, str)]:
        raise UserError(f"{where}: {short(strange[0])} is no caption")
    values = [v.replace("\0", "").strip().encode("utf-8", errors="replace").decode() for v in values]
    if long := [v for v in values if len(v) > CAPTION_LIMIT]:
        raise UserError(f"{where}: a caption of {len(long[0])} characters (at most {CAPTION_LIMIT})")
    return tuple(v for v in values if v)


def column(given, usual, there, where, flag=None):
    """The column to read: `given`, or the first of the `usual` ones that is there, said when there are others. Raises UserError naming those
    that are there."""
    found = [given] if given in there else [c for c in usual if c in there] if given in (None, *usual) else []
    if not found:
        wanted = printable(given) if given else f"{usual[0]} (nor {', '.join(usual[1:])})"
        listed = ", ".join(clipped(c) for c in list(there)[:20] if c) or "none"
        hint = f" (`{flag}`)" if flag else ""
        if len(there) == 1 and (apart := next((c for c in ";\t|" if c in next(iter(there))), None)):
            hint = f"; its columns are parted by {apart!r}, where a comma is expected (a tab in .tsv)"
        raise UserError(f"{where}: no column {wanted}; it has {listed}{hint}{nearest(given or usual[0], there)}")
    if given not in there and len(found) > 1:
        dist.say(f"note: {where}: reading the column {found[0]}, not {', '.join(found[1:])}")
    return found[0]


def like_a_row(parts, columns):
    """Do the parts of a line inside a cell look like a row of a table of so many columns? "surely": it begins with a picture's name, or with a number or a word with
    a digit and is written as a row; "perhaps": it begins with another word. Written as a row: it has the number of columns and, unlike most sentences ("4k, sharp"),
    no space after its commas."""
    if len(parts) < 2:
        return ""
    if PICTURE.fullmatch(parts[0]):
        return "surely"
    if len(parts) != columns or any(p[:1].isspace() for p in parts[1:]):
        return ""
    return "surely" if NUMBERED.fullmatch(parts[0]) else "perhaps" if re.fullmatch(r"[\w./-]+", parts[0]) else ""


def rows(path):
    """(header, iterator of (where, {column: text})) of a CSV, or of a TSV by its suffix: strict, see the module docstring."""
    path = Path(path)
    csv.field_size_limit(FIELD_LIMIT)
    text, mark = io.StringIO(text_of(path), newline=""), "\t" if path.suffix.lower() == ".tsv" else ","
    reader = csv.reader(text, strict=True, delimiter=mark)

    def read():
        """(line on which it begins, cells) of every row."""
        while True:
            first = reader.line_num + 1
            try:
                cells = next(reader)
            except StopIteration:
                return
            except csv.Error as e:
                last = f" (read up to line {reader.line_num})" if reader.line_num > first else ""
                raise UserError(
                    f"{path}:{first}: {e}{last}; a text with quotes or commas stands in double quotes, its own quotes doubled"
                ) from None
            for cell in cells:
                looks = {like_a_row(n.split(mark), len(cells)): n for n in re.split(r"\r\n|\n|\r", cell)[:0:-1]}
                if "surely" in looks:
                    raise UserError(
                        f"{path}:{first}: a quote that is opened here swallows what looks like rows ({short(looks['surely'])})"
                    )
                if "perhaps" in looks:
                    dist.say(
                        f"note: {path}:{first}: a cell of several lines, of which one may be a row ({short(looks['perhaps'])})"
                    )
            if cells:
                yield first, cells

    found = read()
    _, header = next(found, (1, []))
    header = [name.strip() for name in header]
    if twice := [name for name in header if name and header.count(name) > 1]:
        raise UserError(f"{path}: has two columns {clipped(twice[0])}")

    def checked():
        for line, cells in found:
            if len(cells) != len(header):
                more = "; a text with commas needs double quotes around it" if len(cells) > len(header) else ""
                raise UserError(f"{path}:{line}: has {len(cells)} columns, the first line has {len(header)}{more}")
            yield f"{path}:{line}", dict(zip(header, cells, strict=True))

    return header, checked()
