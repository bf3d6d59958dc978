"""Studies: the same prompts and noise under every combination of some settings, as one labelled sheet.

    axes = parse("scheduler=ddpm,ddim;guidance_scale=1,3,5", Config)
    for cell in cells(axes): ...                                # {"scheduler": "ddpm", "guidance_scale": 1.0}, …

A study is a grid; its last axis runs across the sheet, all others down. What is finished stands in study.json, so that a
study that was stopped goes on where it was; study.csv has one line a picture.
"""

import csv
import dataclasses
import hashlib
import io
import itertools
import json
import re
import sys
import typing
from pathlib import Path

from nanodiff.commandline import by_names, from_mapping
from nanodiff.config import UserError, nearest, printable, spreadsheet
from nanodiff.diffusion import samplers
from nanodiff.files import write_bytes, write_json
from nanodiff.output import images

FIXED = {  # settings that do not change the picture, or that a study sets itself
    "study", "output_dir", "output", "base_dir", "nrow", "named", "overwrite", "txt", "labels", "save_latents", "progress_strip", "metadata",
    "from_image", "prompts_file", "num_images", "batch_size", "device", "token", "dry_run", "preview",
}  # fmt: skip
# settings that change how a picture is made, not the picture
SAME = {"offload", "vae_tiling", "compile", "cuda_graph", "kernels"}
NONE = ("", "none", "None")


def parse(text, cls):
    """[(field, [values])] of "a=1,2;b=x,y": fields and aliases of the dataclass `cls`, values of its types.

    A value with a comma or semicolon stands in double quotes; an empty one or `none` is None where the field allows it.
    Raises UserError naming what is unknown.
    """
    fields = {f.name: f for f in dataclasses.fields(cls)}
    names = by_names(cls)
    hints, axes = typing.get_type_hints(cls), []
    for part in re.findall(r'(?:[^;"]|"[^"]*")+', text):
        key, equals, values = part.strip().partition("=")
        name = names.get(key.strip().lstrip("-").replace("-", "_").replace(" ", "_"))
        if not equals or name is None or name in FIXED:
            known = sorted(n for n in fields if n not in FIXED)
            what = "does not change the picture" if name in FIXED else "is no setting"
            what = what if equals else "has no values (name=value,value)"
            raise UserError(f"--study: {printable(key)!r} {what}{nearest(key, known)}")
        if name in dict(axes):
            raise UserError(f"--study: {name} is there twice")
        row = next(csv.reader([values.strip()], skipinitialspace=True), [""]) or [""]
        axes.append((name, [_value(cls, name, hints[name], v.strip()) for v in row]))
    if not axes:
        raise UserError('--study is empty; write it like "guidance_scale=1,3,5;scheduler=ddpm,ddim"')
    return axes


def _value(cls, name, hint, text):
    options = [t for t in typing.get_args(hint) if t is not type(None)] or [hint]
    kind, optional = options[0], type(None) in typing.get_args(hint)
    if typing.get_origin(hint) is list:
        return [] if text in NONE else [text]
    if text in NONE and optional:
        return None
    try:
        if kind is bool:
            value = {"true": True, "yes": True, "1": True, "false": False, "no": False, "0": False}[text.lower()]
        else:
            value = kind(text)
    except (ValueError, KeyError):
        raise UserError(f"--study: {name}: {printable(text)!r} is not of type {kind.__name__}") from None
    if name == "scheduler":
        samplers.check_name(value)
    return from_mapping(cls, {name: value}, "--study")[name]


def _as_now(key):
    """What a picture was known by before --ddim-steps became --steps."""
    facts = json.loads(key)
    if facts.get("ddim_steps"):
        facts |= {"steps": facts["ddim_steps"], "ddim_steps": None}
    return json.dumps(facts, sort_keys=True)


def _held(path):
    """What a picture's file holds, as a short text."""
    return hashlib.sha256(path.read_bytes()).hexdigest()[:16]


def cells(axes):
    """[{field: value}] of all combinations, the last axis fastest."""
    return [dict(zip(dict(axes), values, strict=True)) for values in itertools.product(*(v for _, v in axes))]


def label(cell):
    """What stands above a picture of the sheet."""
    shown = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in cell.items()}
    shown = {k: f"{v:g}" if isinstance(v, float) else v if v not in (None, []) else "none" for k, v in shown.items()}
    return ", ".join(f"{k.replace('_', ' ')} {printable(v)}" for k, v in shown.items())


def sheet(rows, axes, folder, nrow=None):
    """{(cell, picture): row of study.csv} -> one PIL sheet: the last axis across, all others and the prompts down.

    Small pictures are enlarged to 192 pixels, so that their labels can be read. What is not there yet stays white.
    """
    across = len(axes[-1][1])
    pictures = max(j for _, j in rows) + 1
    outer = max(c for c, _ in rows) // across + 1
    places = [(o * across + k, j) for o in range(outer) for j in range(pictures) for k in range(across)]
    shown = [name for name, values in axes if len(values) > 1]
    found = {place: images.open_image(folder / row["file"]) for place, row in rows.items()}
    wide = max(192, *(p.width for p in found.values()))
    cells, labels = [], []
    for place in places:
        picture, row = found.get(place), rows.get(place)
        picture = picture or images.Image.new("RGB", (wide, wide), "white")
        cells.append(picture.resize((wide, round(picture.height * wide / picture.width))))
        about = label({name: row[name] for name in shown}) if row else ""
        labels.append(f"{row['prompt']}: {about}" if row and (pictures > 1 or not about) else about)
    return images.grid(cells, nrow or across, labels)


# of a study's pictures; and those that it counts on from (eight digits are a date)
NUMBER, COUNTED = r"\d{5,9}\.png", r"\d{5,7}\.png"


class Finished:
    """The finished pictures of a study, in study.json: {key: row of study.csv}."""

    def __init__(self, out, seed, anew=False):
        """seed: None takes the one the study was begun with. anew: what was finished is deleted once there is a new picture. Raises UserError for a
        record that is not ours."""
        self.out, self.rows, self.seed, self.old, self.new = Path(out), {}, seed, [], set()
        if (self.out / "study.json").exists():
            try:
                known = json.loads((self.out / "study.json").read_text(encoding="utf-8"))
                self.rows, before = {_as_now(k): v for k, v in dict(known["pictures"]).items()}, int(known["seed"])
                for row in self.rows.values():  # data, not paths
                    if not re.fullmatch(NUMBER, row["file"]):
                        raise ValueError(f"{row['file']!r} is no picture of a study")
            except (ValueError, KeyError, TypeError, OSError, RecursionError) as e:
                raise UserError(f"{self.out / 'study.json'}: not a study's record: {e}") from None
            if anew:
                self.old = [row["file"] for row in self.rows.values()]
                self.rows, before = {}, None
            self.seed = before if seed is None else seed

    def get(self, key, files):
        """The row of a picture that is finished and still there, and made of the same `files` (drawing.Marks; older records do not tell), or None."""
        row = self.rows.get(key)
        if not row or not (self.out / row["file"]).is_file():
            return None
        if row.get("holds", now := _held(self.out / row["file"])) != now:
            print(f"note: {row['file']}: is not the study's picture any more, which is drawn anew", file=sys.stderr)
            del self.rows[key]
            return None
        changed = [name for name, held in row.get("files", files).items() if held != files.get(name)]
        if changed:
            print(f"note: {changed[0]}: has changed since {row['file']} was made, which is drawn anew", file=sys.stderr)
            return None
        return row

    def is_old(self, key):
        """Was a picture finished before this run?"""
        return key in self.rows and key not in self.new

    def name(self, key):
        """The file of a picture: its own if it had one, else the next number."""
        if key in self.rows:
            return self.rows[key]["file"]
        there = {p.name for p in self.out.glob("[0-9]*.png")} - set(self.old)  # another run's, too
        there |= {row["file"] for row in self.rows.values()}
        return f"{max((int(n.partition('.')[0]) for n in there if re.fullmatch(COUNTED, n)), default=-1) + 1:05d}.png"

    def add(self, key, row):
        self.rows[key] = row | {"holds": _held(self.out / row["file"])}
        self.new.add(key)
        for name in set(self.old) - {row["file"]}:
            (self.out / name).unlink(missing_ok=True)
        self.old = []
        write_json(self.out / "study.json", {"seed": self.seed, "pictures": self.rows})

    def write_csv(self, rows, axes):
        """study.csv: a line a picture. Texts that a spreadsheet would take for a formula begin with a quote."""
        text = io.StringIO()
        columns = list(dict.fromkeys(["file", *axes, "prompt", "seed", "seconds"]))
        writer = csv.DictWriter(text, columns, extrasaction="ignore", lineterminator="\n")
        writer.writeheader()
        for row in rows:
            cells = {k: v[0] if isinstance(v, list) and len(v) == 1 else v for k, v in row.items()}
            writer.writerow({k: spreadsheet(v) for k, v in cells.items()})
        write_bytes(self.out / "study.csv", text.getvalue().encode())
