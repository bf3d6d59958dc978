"""Values of files and words for people: JSON and TOML, a Hub config.json as a dataclass, and the errors that a user can mend.

Nothing here imports torch, so `--help` answers at once.
"""

import difflib
import functools
import json
import os
import re
import stat
import subprocess
import sys
import types
import typing
from pathlib import Path

JSON_SIZE_LIMIT = 64 << 20  # a tokenizer.json of Gemma is 33 MB; anything larger than this is not a config
ASSETS = Path(__file__).parent / "_assets"  # what comes with the program: installed, it is inside the package
ASSETS = ASSETS if ASSETS.is_dir() else Path(__file__).parents[1] / "assets"


def shipped(value):
    """What an option names, "assets/nano" for one, or where that came with the program: so that it is found from any folder, and when installed. Anything
    else, and what is there, stays as it is."""
    if isinstance(value, list):
        return [shipped(v) for v in value]
    path = Path(value) if isinstance(value, str) and value.startswith("assets/") and "\0" not in value else None
    if path is None or path == Path("assets") or ".." in path.parts:
        return value
    if os.path.exists(path) or not os.path.exists(ASSETS / path.relative_to("assets")):
        return value
    return str(ASSETS / path.relative_to("assets"))


class UserError(Exception):
    """Something the user can mend. Scripts print it as one line `error: …` and exit with code 2.

    The library speaks of its arguments, in backticks (`steps`); a script shows them as the flags that set them (--steps)."""


class Stopped(Exception):
    """SIGTERM arrived; raised in the main thread so that `finally` blocks and savers run."""


def nearest(name, known, n=3):
    """The known names closest to `name`, as a phrase for an error message ("" when none is close)."""
    close = difflib.get_close_matches(str(name), [str(k) for k in known], n=n, cutoff=0.5)
    return f"; did you mean {' or '.join(close)}?" if close else ""


def printable(text):
    """`text` with control characters escaped, so that a prompt cannot drive the terminal it is shown on."""
    return "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in str(text))


def short(value, length=80):
    """A value as people are shown it, as it is written in Python: see clipped()."""
    return clipped(repr(value), length)


def clipped(text, length=80):
    """A text as people are shown it: on one line, and not the whole of 80 kB."""
    text = printable(text)
    return text if len(text) <= length else f"{text[: length - 20]}… ({len(text)} characters)"


@functools.cache
def commit():
    """The git commit of this program, or None."""
    try:
        done = subprocess.run(
            ["git", "rev-parse", "HEAD"], cwd=Path(__file__).parent, capture_output=True, text=True, timeout=5
        )
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


def spreadsheet(value):
    """A cell of a CSV: a text that a spreadsheet would take for a formula begins with a quote."""
    # a tab or a carriage return may begin a cell of its own, too
    risky = isinstance(value, str) and (value.lstrip()[:1] in tuple("=+-@") or any(c in value for c in "\t\r"))
    return "'" + re.sub(r"[\t\r]", " ", value) if risky else value


def check_regular(path):
    """Raise UserError for a file that is none, such as a named pipe, which would be waited for without end. A shell's <(…) is read."""
    mode = os.stat(path).st_mode
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode) or str(path).startswith(("/dev/fd/", "/proc/self/fd/"))):
        raise UserError(f"{path}: is a pipe or a device, not a file")


def among_pictures(path, flag, output_dir, option="output_dir", what="figures"):
    """What is wrong when a run's own figures (or `what`) lie among the pictures of a folder that it reads, in words; "" where they do not."""
    if not (
        path and output_dir and Path(path).is_dir() and Path(output_dir).resolve().is_relative_to(Path(path).resolve())
    ):
        return ""
    return f"`{option}` {output_dir} lies in `{flag}` {path}, so the next run would count its {what} as pictures"


def parse_json(text, where):
    """A JSON text as a value. Raises UserError for what is none, and for an object with two values of one name, of which the first would be lost."""

    def unique(pairs):
        found = dict(pairs)
        if twice := next((k for k, v in pairs if found[k] is not v and found[k] != v), None):
            raise UserError(f"{where}: {short(twice)} stands twice in one JSON object; which is meant?")
        return found

    try:
        return json.loads(text, object_pairs_hook=unique)
    except (ValueError, RecursionError) as e:
        raise UserError(f"{where}: not readable as JSON: {e}") from None


def read_json(path):
    """A JSON or TOML file as a dict. Raises UserError naming the file."""
    path = Path(path)
    try:
        check_regular(path)
        if path.stat().st_size > JSON_SIZE_LIMIT:
            raise UserError(f"{path}: {path.stat().st_size >> 20} MB is too large for a configuration file")
        if path.suffix == ".toml":
            import tomllib

            return tomllib.loads(path.read_text(encoding="utf-8-sig"))
        value = parse_json(path.read_text(encoding="utf-8-sig"), path)
    except FileNotFoundError:
        raise UserError(f"{path}: no such file") from None
    except (OSError, ValueError, RecursionError) as e:
        raise UserError(f"{path}: not readable as {path.suffix[1:] or 'JSON'}: {e}") from None
    if not isinstance(value, dict):
        raise UserError(f"{path}: expected a JSON object, found {type(value).__name__}")
    return value


KINDS = {int: "an integer", float: "a number", bool: "true or false", str: "a text", dict: "an object", list: "a list",
         type(None): "null"}  # fmt: skip
BOOKKEEPING = {  # fields of any config.json that change nothing, and what kind of value they have
    "architectures": list | None,
    **dict.fromkeys(("id2label", "label2id", "transformers.js_config"), dict | None),
    # what unsloth leaves in its copies
    "unsloth_fixed": bool,
    "unsloth_version": str | None,
    **dict.fromkeys(("torch_dtype", "dtype", "transformers_version", "model_type", "_name_or_path"), str | None),
    # what diffusers' EMAModel.save_pretrained leaves in the model's config
    **dict.fromkeys(("decay", "min_decay", "inv_gamma", "power"), float),
    **dict.fromkeys(("optimization_step", "update_after_step"), int),
    "use_ema_warmup": bool,
}
SIZES = re.compile(  # fields of a model's config that 0 makes no sense of
    r"channels$|heads$|head_dim$|groups$|_size$|_dim$|num_(hidden_)?layers$|^layers_per_block$|max_position_embeddings$|^d_(model|ff|kv)$|^scaling_factor$"
)


def from_json(cls, raw, fixed, where="config.json"):
    """Build the config dataclass `cls` from a Hub config dict, refusing what we do not implement.

    fixed: {field: allowed values} for the fields that `cls` does not read. A field outside both, or with
    another value than those allowed, raises UserError: ignoring it would hide an unsupported model.
    """
    hints = typing.get_type_hints(cls)
    values = {}
    for key, value in raw.items():
        if key in hints:
            values[key] = typed(value, hints[key], f"{where}: {key}")
        elif key in fixed:
            if value not in fixed[key]:
                allowed = " or ".join(map(repr, fixed[key]))
                raise UserError(f"{where}: {key} = {short(value)} is not supported (only {allowed})")
        elif key in BOOKKEEPING:
            typed(value, BOOKKEEPING[key], f"{where}: {key}")
        elif not key.startswith("_"):
            raise UserError(
                f"{where}: unknown field {short(key)} (value {short(value)}){nearest(key[:80], [*hints, *fixed])}"
            )
        if SIZES.search(key) and key in hints and _has_none(values[key]):
            raise UserError(f"{where}: {key} = {short(value)} is out of range")
    return cls(**values)


def _has_none(size):
    """Is a size 0, or a list of sizes empty or with a 0 in it?"""
    return size == () or any(v == 0 for v in (size if isinstance(size, tuple) else (size,)))


def typed(value, hint, where):
    """`value`, of a JSON file, as the annotated type; lists become tuples where tuples are meant, whole numbers floats.

    The one check of such values: UserError says where, what stands there and what is expected, for another kind of value, for an
    integer outside 0..2²⁴ and for a number that is none (NaN, infinity)."""
    options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
    for option in options:
        if value is None and option is type(None):
            return None
        if typing.get_origin(option) is tuple and isinstance(value, list | tuple):
            return tuple(typed(v, typing.get_args(option)[0], where) for v in value)
        if option in (bool, str, dict, list) and isinstance(value, option):
            if option is str and any("\ud800" <= c <= "\udfff" or c == "\0" for c in value):
                break  # half of a character, or a NUL: no text that anything can be called
            return value
        if option is int and isinstance(value, int) and not isinstance(value, bool):
            if not 0 <= value < 1 << 24:
                raise UserError(f"{where} = {short(value)} is out of range")
            return value
        if option is float and isinstance(value, int | float) and not isinstance(value, bool):
            if not abs(value) <= sys.float_info.max:
                raise UserError(f"{where} = {short(value)} is out of range")
            return float(value)
    expected = " or ".join(KINDS.get(option, "a list") for option in options)
    raise UserError(f"{where} = {short(value)} has the wrong type (expected {expected})")


def read_fields(path, hints):
    """{field: value} of those fields of a JSON file that `hints` {field: type} names, checked by typed(); others are left alone."""
    return {k: typed(v, hints[k], f"{path}: {k}") for k, v in read_json(path).items() if k in hints}
