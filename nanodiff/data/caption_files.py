"""Captions of named pictures from the files that hold them: JSON {id: captions}, COCO annotations and results, CSV."""

import ast
import csv
import io
import json
from pathlib import Path

from nanodiff.config import JSON_SIZE_LIMIT, UserError, printable


def read(path, by_file=False):
    """{id: [captions]} of a JSON file ({id: caption or captions}, COCO results or annotations) or a CSV (Image_Name, Title).

    by_file: the ids of COCO annotations are the pictures' file names, where the file has them. Raises UserError naming the file for anything else, and for an empty one."""
    path = Path(path)
    try:
        if path.stat().st_size > 16 * JSON_SIZE_LIMIT:
            raise UserError(f"{path}: {path.stat().st_size >> 20} MB is too large for captions")
        text = path.read_text(encoding="utf-8-sig", errors="replace")
        found = _from_csv(path, text) if path.suffix == ".csv" else _from_json(path, json.loads(text), by_file)
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    except (ValueError, RecursionError, csv.Error) as e:
        raise UserError(f"{path}: not readable as {'CSV' if path.suffix == '.csv' else 'JSON'}: {e}") from None
    if not found:
        raise UserError(f"{path}: no captions in it")
    return found


def _from_json(path, value, by_file):
    names = {}
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        if by_file and isinstance(value.get("images"), list):
            names = {
                str(v["id"]): str(v["file_name"])
                for v in value["images"]
                if isinstance(v, dict) and {"id", "file_name"} <= set(v)
            }
        value = value["annotations"]
    if isinstance(value, dict):
        found = {str(k): [v] if isinstance(v, str) else v for k, v in value.items()}
    elif isinstance(value, list):
        found = {}
        for i, row in enumerate(value):
            if not isinstance(row, dict) or "image_id" not in row or "caption" not in row:
                raise UserError(f"{path}: entry {i} has no image_id and caption")
            key = str(row["image_id"])
            found.setdefault(names.get(key, key), []).append(row["caption"])
    else:
        raise UserError(f"{path}: expected an object or a list, found {type(value).__name__}")
    for key, captions in found.items():
        if not isinstance(captions, list) or not captions or not all(isinstance(c, str) for c in captions):
            raise UserError(f"{path}: {printable(key)}: expected a caption or a list of captions")
    return found


def _from_csv(path, text):
    csv.field_size_limit(1 << 24)
    reader = csv.DictReader(io.StringIO(text))
    columns = list(reader.fieldnames or ())
    key = next((c for c in ("Image_Name", "image_id", "image", "file_name", "id") if c in columns), None)
    caption = next((c for c in ("Title", "caption", "text", "prediction") if c in columns), None)
    if not key or not caption:
        raise UserError(
            f"{path}: no columns Image_Name and Title; it has {', '.join(map(printable, columns)) or 'none'}"
        )
    found = {}
    for row in reader:
        title = row[caption] or ""
        if title.lstrip().startswith("["):
            title = titles(title, f"{path}:{reader.line_num}")
        found.setdefault(str(row[key]), []).extend([title] if isinstance(title, str) else title)
    return found


def titles(text, where):
    """A list of strings as CSVs hold it, ["…"] (JSON) or ['…'] (Python). Raises UserError for a broken one."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError):
        value = None
    try:
        value = ast.literal_eval(text.strip()) if value is None else value
    except (ValueError, SyntaxError, RecursionError, MemoryError):
        raise UserError(f"{where}: {printable(text[:60])!r} is no list of captions") from None
    if not isinstance(value, list) or not value or not all(isinstance(v, str) for v in value):
        raise UserError(f"{where}: {printable(text[:60])!r} is no list of captions")
    return value
