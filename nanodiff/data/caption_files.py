"""Captions of named pictures from the files that hold them: JSON {id: captions}, COCO annotations and results, JSON lines, CSV."""

from pathlib import Path

from nanodiff.config import UserError, parse_json, printable, short
from nanodiff.data import tables
from nanodiff.device import dist

SUFFIXES = (".json", ".jsonl", *tables.SUFFIXES)


def read(path, by_file=False):
    """{id: [captions]} of a JSON file ({id: caption or captions}, COCO results or annotations), JSON lines (metadata.jsonl) or a table (Image_Name,
    Title).

    by_file: the ids of COCO annotations are the pictures' file names, where the file has them. Raises UserError naming the file for anything else, and for an empty one."""
    path = Path(path)
    if path.suffix.lower() in tables.SUFFIXES:
        found = _from_table(path)
    elif path.suffix.lower() == ".jsonl":
        found = _from_lines(path)
    else:
        found = _from_json(path, parse_json(tables.text_of(path), path), by_file)
    if not found:
        raise UserError(f"{path}: no captions in it")
    return found


def _from_json(path, value, by_file):
    names = {}
    if isinstance(value, dict) and isinstance(value.get("annotations"), list):
        if by_file and isinstance(value.get("images"), list):
            images = [v for v in value["images"] if isinstance(v, dict) and {"id", "file_name"} <= set(v)]
            for v in images:
                if names.setdefault(str(v["id"]), str(v["file_name"])) != str(v["file_name"]):
                    raise UserError(f"{path}: two images have the id {short(v['id'])}")
            ids = {str(v.get("image_id")) for v in value["annotations"] if isinstance(v, dict)}
            if names and (strange := sorted(ids - set(names))):
                dist.say(
                    f"note: {path}: {len(strange)} annotated pictures are not in its list of images, such as {short(strange[0])}"
                )
        value = value["annotations"]
    if isinstance(value, dict):
        found = {str(k): list(_texts(v, f"{path}: {printable(k)}")) for k, v in value.items()}
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


def _texts(value, where):
    """The captions of a JSON value, an empty one among them: a model that says nothing is judged for that."""
    if isinstance(value, list) and all(isinstance(v, str) for v in value):
        return value
    if isinstance(value, str):
        return (tables.captions_in(value, where) if value.strip().endswith("]") else [value]) or [""]
    raise UserError(f"{where}: expected a caption or a list of captions")


def _from_lines(path):
    found, columns = {}, None
    for n, line in enumerate(tables.text_of(path).split("\n"), 1):
        if not line.strip():
            continue
        row, where = parse_json(line, f"{path}:{n}"), f"{path}:{n}"
        if not isinstance(row, dict):
            raise UserError(f"{where}: no JSON object")
        if columns is None or not set(columns) <= row.keys():
            columns = [tables.column(None, usual, row, where) for usual in (tables.NAMES, tables.CAPTIONS)]
        key, caption = columns
        name = str(row[key]) if type(row[key]) is int else row[key]  # COCO's ids
        found.setdefault(tables.name_in(name, where), []).extend(tables.captions_in(row[caption], where) or [""])
    return found


def _from_table(path):
    header, rows = tables.rows(path)
    key = tables.column(None, tables.NAMES, header, path)
    caption = tables.column(None, tables.CAPTIONS, header, path)
    found = {}
    for where, row in rows:
        found.setdefault(row[key], []).extend(tables.captions_in(row[caption], where) or [""])
    return found
