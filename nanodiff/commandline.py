"""From a dataclass to a command line, a preset and a JSON or TOML file, and from an error to one line.

A script describes its options once, as a dataclass whose fields carry a help string:

    @dataclass
    class Config:
        lr: float = arg(1e-4, "peak learning rate; 1e-5 for full fine-tuning")

Strength, from weak to strong: defaults, `--preset NAME`, `--config FILE` (.json or .toml), flags.
`--a-b` and `--a_b` are the same flag. Nothing here imports torch, so `--help` answers at once.
"""

import argparse
import ast
import dataclasses
import importlib
import math
import os
import re
import signal
import sys
import types
import typing
from pathlib import Path

from nanodiff import aliases
from nanodiff.config import Stopped, UserError, check_regular, clipped, nearest, printable, read_json, shipped, short

SHORT = 25  # options of a stage up to which --help shows them all
ELSEWHERE = {  # other programs' words
    "sampler": "scheduler",
    "cfg": "guidance-scale",
    "size": "resolution",
    "out": "output-dir",
    "n": "num-images",
}
DEVICES = ("auto", "cpu", "cuda", "mps")
SEEDS = (1 << 63) - 1  # the largest one
SECRETS = {"token", "hub_token", "hf_token"}
# options that name what is read, which may have come with the program
SHIPPED = {"a", "b", "candidates", "captions", "checkpoint", "clip", "components", "control", "control_image", "data", "data_csv", "embedding",
           "evaluation_prompts", "fast_vae", "finetuned", "from_image", "generated", "image_encoder", "image_path", "infer_image_path", "init_image", "inputs",
           "ip_adapter", "ip_adapter_image", "lora", "lora_dir", "lpips_weights", "mask", "model", "model_config", "model_file", "original", "original_csv",
           "prompt_source", "prompts", "prompts_file", "real", "references", "refiner", "sample_prompts", "student", "teacher", "template", "text_config",
           "text_encoder", "vae", "vae_checkpoint", "vgg_weights", "vision_model", "weights_dir", "wildcards", "wordnet"}  # fmt: skip
secret = set()  # the tokens that this process was given: masked() hides them
CHANGING = ("update", "pop", "popitem", "setdefault", "clear")  # of a dict
CONNECTION = re.compile(
    r"[Gg]loo|[Cc]onnection|Dist(Backend|Network|Store)Error|[Tt]imed out|timeout caused pair closure|NCCL"
)
OUT_OF_MEMORY = re.compile(r"OutOfMemoryError|out of memory|can't allocate memory|Invalid buffer size")
LESS_MEMORY = "try a smaller --batch-size or smaller pictures"
endings = []  # what is to be done when a script ends, however it ends: f()
speaks = None  # of several processes: f(error) -> may this one print its failure? (set by dist.start)


def arg(
    default,
    help="",
    *,
    choices=None,
    const=None,
    low=None,
    high=None,
    group=None,
    often=False,
    unit=None,
    needs=None,
):
    """A dataclass field with its help string.

    choices: allowed values. const: value of the bare flag (`--resume` alone), which makes the flag's value optional. low, high: its
    bounds; needs: the field, or a tuple of fields, without one of which it does nothing (see check_needs).
    group: heading of this option and of those after it in --help. often: shown by --help; of a long list the others by --help-all.
    unit: what may stand behind a number on the command line ("x": 1.5x).
    A field of a derived class keeps the bounds and the group of the one that it replaces.
    """
    metadata = {"help": help, "choices": choices, "const": const, "low": low, "high": high, "group": group,
                "often": often, "unit": unit, "needs": needs}  # fmt: skip
    if isinstance(default, list):
        return dataclasses.field(default_factory=lambda: list(default), metadata=metadata)
    return dataclasses.field(default=default, metadata=metadata)


def _inherited(cls, name, key):
    """What arg() was given as `key` for a field, by the class or by the nearest of its bases that says it."""
    said = (
        base.__dataclass_fields__[name].metadata.get(key)
        for base in cls.__mro__
        if name in getattr(base, "__dataclass_fields__", ())
    )
    return next((value for value in said if value is not None), None)


def check_bounds(cfg):
    """Raise UserError for a number outside the bounds of its option, for one that is none, and for an integer or a seed that no generator
    takes."""
    for field in dataclasses.fields(cfg):
        low, high = (_inherited(type(cfg), field.name, key) for key in ("low", "high"))
        if field.name.endswith("seed"):
            low, high = (0, SEEDS) if high is None else (low, high)
        values = getattr(cfg, field.name)
        for value in values if isinstance(values, list) else [values]:
            if isinstance(value, float) and not math.isfinite(value) and high is None:
                raise UserError(f"--{field.name.replace('_', '-')} {value} is no number")
            if isinstance(value, int) and high is None and abs(value) > SEEDS:
                raise UserError(f"--{field.name.replace('_', '-')} {clipped(value)} is out of range")
            if value is None or not isinstance(value, int | float):
                continue
            if (low is None or value >= low) and (high is None or value <= high):
                continue
            flag = f"--{field.name.replace('_', '-')}"
            shown = clipped(value if isinstance(value, int) else f"{value:g}")
            if high is None:
                raise UserError(f"{flag} must be at least {low:g}, not {shown}")
            bits = high.bit_length() if isinstance(high, int) else 0
            most = f"2^{bits} - 1" if bits > 62 and high == (1 << bits) - 1 else f"{high:g}"
            raise UserError(f"{flag} {shown} must be between {low:g} and {most}")


def check_needs(cfg):
    """Raise UserError for an option that was given without the one that it needs. Not a part of parse(): what is needed may come from
    elsewhere, such as the picture whose settings are repeated."""
    for field in dataclasses.fields(cfg):
        values = getattr(cfg, field.name)
        needs = field.metadata.get("needs") or ()
        needs = (needs,) if isinstance(needs, str) else needs
        default = [] if field.default is dataclasses.MISSING else field.default
        given = values is not None and values is not False and values != default  # 0 is a number that was given
        if needs and given and not any(is_given(cfg, name) for name in needs):
            others = " or ".join(f"--{name.replace('_', '-')}" for name in needs)
            raise UserError(f"--{field.name.replace('_', '-')} does nothing without {others}")


def is_given(cfg, name):
    """Whether an option that is off by default, a text, a list, a number or a switch, was set."""
    return getattr(cfg, name) not in (None, [], 0, False)


def read_settings(path):
    """The settings of a --config file: JSON, TOML, or a Python file with `CONFIG = {…}`, whose values are read as literals, never run."""
    if Path(path).suffix != ".py":
        return read_json(path)
    try:
        check_regular(path)
        tree = ast.parse(Path(path).read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, SyntaxError, RecursionError, MemoryError) as e:
        raise UserError(f"{path}: not readable as Python: {e}") from None
    given = {}
    for n in tree.body:
        targets = n.targets if isinstance(n, ast.Assign) else [n.target] if isinstance(n, ast.AnnAssign) else []
        given |= {t.id: n.value for t in targets if isinstance(t, ast.Name) and n.value is not None}
    if "CONFIG" not in given:
        raise UserError(f"{path}: has no CONFIG = {{…}}")
    for node in ast.walk(given["CONFIG"]):
        names = [ast.unparse(k) for k in node.keys if k] if isinstance(node, ast.Dict) else []
        if twice := next((n for n in names if names.count(n) > 1), None):
            raise UserError(f"{path}:{node.lineno}: {twice} stands twice in CONFIG; which is meant?")
    if changed := [n.lineno for n in ast.walk(tree) if _changes(n, "CONFIG")]:
        raise UserError(
            f"{path}:{changed[0]}: CONFIG is changed after it is written; it is read as it is written, never run"
        )
    try:
        value = ast.literal_eval(given["CONFIG"])
    except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError):
        raise UserError(
            f"{path}: CONFIG holds more than literals (numbers, texts, lists); it is read, never run"
        ) from None
    if not isinstance(value, dict) or not all(isinstance(key, str) for key in value):
        raise UserError(f"{path}: CONFIG is no dict of settings")
    return value


def _changes(node, name):
    """Does a part of a Python file change the dict of this name: D[k] = v, D |= …, del D[k], D.update(…)?"""
    if isinstance(node, ast.AugAssign):
        part = node.target
    elif isinstance(node, ast.Subscript) and not isinstance(node.ctx, ast.Load):
        part = node.value
    elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr in CHANGING:
        part = node.func.value
    else:
        return False
    return isinstance(part, ast.Name) and part.id == name


class _Parser(argparse.ArgumentParser):
    def error(self, message):
        raise UserError(message)


class _Help(argparse.RawDescriptionHelpFormatter):
    """Each option by its own name: `--lr X`, `--[no-]ema`; other programs' names for it are accepted, and left to --help-all."""

    def _format_action_invocation(self, action):
        if isinstance(action, argparse.BooleanOptionalAction):
            return f"--[no-]{action.option_strings[0].removeprefix('--')}"
        value = self._format_args(action, action.metavar) if action.nargs != 0 and action.metavar else ""
        return (
            f"{action.option_strings[0]} {value}".strip() if action.dest != "help" else ", ".join(action.option_strings)
        )


def parse(cls, argv, doc="", presets=None, prog=None):
    """An instance of the dataclass `cls` from a command line (see the module docstring for the order)."""
    spelled = frozenset(a.partition("=")[0].lstrip("-") for a in argv if a.startswith("--"))
    argv = [_dashed(a) for a in argv]
    presets = presets or {}
    parser = _Parser(prog=prog, usage=f"{prog} [options]", description=doc, formatter_class=_Help, add_help=False)
    fields, whole, group = dataclasses.fields(cls), "--help-all" in argv, parser
    whole = whole or len(fields) <= SHORT or not any(_inherited(cls, f.name, "often") for f in fields)
    parser.add_argument("-h", "--help", action="help", help="this")
    if not whole:
        often = sum(bool(_inherited(cls, f.name, "often")) for f in fields)
        parser.epilog = f"{len(fields) - often} more options, in groups: --help-all"
    parser.add_argument("--help-all", action="help", help=argparse.SUPPRESS if len(fields) <= SHORT else "every option")
    parser.add_argument(
        "--config", metavar="FILE", help="JSON, TOML or Python (CONFIG = {…}) file with any of the options below"
    )
    if any(presets):
        names = sorted(name for name in presets if name)  # "": the stage's own defaults
        parser.add_argument("--preset", choices=names, metavar="NAME", help=f"a set of defaults: {', '.join(names)}")
    parser.add_argument("--debug", action="store_true", help="show tracebacks")
    hints = typing.get_type_hints(cls)
    for field in fields:
        if whole and (heading := _inherited(cls, field.name, "group")):
            group = next((g for g in parser._action_groups if g.title == heading), None) or parser.add_argument_group(
                heading
            )
        shown = whole or _inherited(cls, field.name, "often")
        _add(
            group, field, names_of(cls, field.name), hints[field.name], shown, "--help-all" in argv, presets.get("", {})
        )
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        flags = [o for a in parser._actions for o in a.option_strings]
        asked = unknown[0].split("=")[0]
        other = ELSEWHERE.get(asked.lstrip("-"))
        hint = f"; did you mean --{other}?" if other and f"--{other}" in flags else nearest(asked, flags)
        if not asked.startswith("-") and any(a.startswith("--") for a in argv):
            hint += " (a text with spaces needs quotes; an option that takes several is given once for each)"
        raise UserError(f"unknown argument {clipped(unknown[0], 200)}{hint}")
    given = vars(given)
    values, configured = dict(presets.get(given.pop("preset", None) or "", {})), {}
    if path := shipped(given.pop("config")):
        settings = read_settings(path)
        if isinstance(settings.get("config"), dict) and "config" not in by_names(cls):
            # a run's own record (output/record.py)
            settings = settings["config"]
        values |= (configured := from_mapping(cls, settings, path))
    given.pop("debug")
    given = {k: v for k, v in given.items() if v is not None}
    # a prompt may be empty, what names a file may not
    named = {k: v if isinstance(v, list) else [v] for k, v in given.items() if k in SHIPPED - {"sample_prompts"}}
    if empty := [name for name, values in named.items() if "" in values]:
        raise UserError(
            f"--{empty[0].replace('_', '-')} is given an empty name (a shell's variable that is not set?); leave it out to have none"
        )
    cfg = cls(**(values | given))
    if getattr(cfg, "base_dir", ".") == ".":
        for f in fields:
            setattr(cfg, f.name, shipped_option(f.name, getattr(cfg, f.name)))
    hide(cfg)
    check_bounds(cfg)
    cfg.given = frozenset(given)  # the flags that were typed: they win over what a picture or checkpoint remembers
    cfg.spelled = spelled  # and as they were typed
    cfg.configured = frozenset(configured)  # what a file of settings said
    return cfg


def shipped_option(name, value):
    """An option's value, or where what it names came with the program."""
    return shipped(value) if name in SHIPPED else value


def as_dict(cfg):
    """{field: value} of a config dataclass, without tokens."""
    return {f.name: getattr(cfg, f.name) for f in dataclasses.fields(cfg) if f.name not in SECRETS}


def hide(cfg):
    """Remember the tokens in a config dataclass, for masked()."""
    secret.update(v for v in (getattr(cfg, name, None) for name in SECRETS) if v)


def masked(argv):
    """The words of a command line with every token hidden, however its flag was spelled."""
    for value in secret:
        argv = [word.replace(value, "***") for word in argv]
    return list(argv)


def _dashed(token):
    """--a_b=x_y -> --a-b=x_y"""
    if not token.startswith("--"):
        return token
    flag, eq, value = token.partition("=")
    return flag.replace("_", "-") + eq + value


def _add(parser, field, names, hint, shown_in_help=True, whole=True, defaults=types.MappingProxyType({})):
    m = field.metadata
    default = field.default if field.default is not dataclasses.MISSING else field.default_factory()
    default = defaults.get(field.name, default)
    options = [t for t in typing.get_args(hint) if t is not type(None)]
    kind = options[0] if typing.get_origin(hint) in (typing.Union, types.UnionType) else hint
    names = ["--" + n.replace("_", "-") for n in names]
    shown = "" if default in (None, [], "") else f" [{default}]"
    also = f"; also {', '.join(names[1:])}" if names[1:] and whole else ""
    text = (m["help"] + shown + also).replace("%", "%%") if shown_in_help else argparse.SUPPRESS
    kwargs = {"dest": field.name, "help": text, "default": None}
    if kind is bool:
        parser.add_argument(*names, action=argparse.BooleanOptionalAction, **kwargs)
        return
    if typing.get_origin(kind) is list:
        (one,) = typing.get_args(kind)  # numbers may follow one flag; of texts, which may lack quotes, each has its own
        kwargs |= {"action": "append", "type": one} if one is str else {"action": "extend", "nargs": "+", "type": one}
    else:
        kwargs |= {"type": kind, "choices": m["choices"]}
    if unit := m["unit"]:
        kwargs["type"] = lambda text: kind(text.removesuffix(unit))
        kwargs["type"].__name__ = kind.__name__  # as it is called in an error
    if m["const"] is not None:
        kwargs |= {"nargs": "?", "const": m["const"]}
    metavar = (
        "{" + ",".join(m["choices"]) + "}"
        if m["choices"]
        else _metavar(field.name, kind if m["unit"] else kwargs["type"])
    )
    parser.add_argument(*names, metavar=metavar, **kwargs)


def _metavar(name, kind):
    """What stands for an option's value in --help."""
    if kind is not str:
        return {int: "N", float: "X"}.get(kind, kind.__name__.upper())
    last = name.rpartition("_")[2]
    if last in ("dir", "root", "folder"):
        return "DIR"
    if last in ("file", "csv", "path", "config", "image", "mask", "output"):
        return "FILE"
    return "MODEL" if last in ("model", "teacher", "student", "encoder") else "TEXT"


def names_of(cls, name):
    """A field's names: its own, and other programs'."""
    return (name, *aliases.of(cls, name))


def by_names(cls):
    """{each name of a field, with underscores: the field's own}"""
    return {n.replace("-", "_"): f.name for f in dataclasses.fields(cls) for n in names_of(cls, f.name)}


def from_mapping(cls, mapping, where):
    """{a name of a field: value} checked against the dataclass `cls`: {field: value}. Raises UserError naming the key."""
    fields = {f.name: f for f in dataclasses.fields(cls)}
    by_name = by_names(cls)
    values, said = {}, {}
    for key, value in mapping.items():
        name = by_name.get(key.replace("-", "_"))
        if name is None:
            raise UserError(f"{where}: unknown key {short(key)}{nearest(key[:80], by_name)}")
        if name in said:
            raise UserError(f"{where}: {said[name]} and {key} are one option; which is meant?")
        said[name] = key
        hint = typing.get_type_hints(cls)[name]
        options = typing.get_args(hint) if typing.get_origin(hint) in (typing.Union, types.UnionType) else (hint,)
        kinds = tuple(typing.get_origin(t) or t for t in options)
        if float in kinds and isinstance(value, int) and not isinstance(value, bool):
            try:
                value = float(value)
            except OverflowError:
                raise UserError(f"{where}: {key} = {short(value)} is out of range") from None
        for text in value if isinstance(value, list) else [value]:
            if isinstance(text, str) and any("\ud800" <= c <= "\udfff" or c == "\0" for c in text):
                raise UserError(f"{where}: {key} = {short(text)} is no text")
        if isinstance(value, list) and list in kinds:
            element = typing.get_args(next(t for t in options if typing.get_origin(t) is list))[0]
            if element is float:
                value = [
                    float(v) if isinstance(v, int) and not isinstance(v, bool) and abs(v) < 1 << 63 else v
                    for v in value
                ]
            if not all(isinstance(v, element) for v in value):
                raise UserError(f"{where}: {key} = {value!r} has the wrong type (expected {hint})")
        if not isinstance(value, kinds) or (isinstance(value, bool) and bool not in kinds):
            raise UserError(f"{where}: {key} = {value!r} has the wrong type (expected {hint})")
        choices = fields[name].metadata["choices"]
        if choices and value is not None and value not in choices:
            raise UserError(f"{where}: {key} = {value!r} is not one of {', '.join(choices)}{nearest(value, choices)}")
        values[name] = value
    return values


def numbers(kind):
    """argparse's type of a list with commas between."""

    def read(text):
        return [kind(part) for part in text.split(",")]

    read.__name__ = f"list of {kind.__name__}"  # as argparse calls it when it is none
    return read


def at_least(low):
    """argparse's type of whole numbers from `low` on."""

    def read(text):
        try:
            value = int(text)
        except ValueError:
            value = low - 1
        if value < low:
            raise argparse.ArgumentTypeError(f"{text} is no whole number of at least {low}")
        return value

    return read


def tool(run):
    """The exit code of a `python -m nanodiff.…` tool: what run() returns (None = 0), or 2 with one line for a mistake."""
    try:
        code = run() or 0
        sys.stdout.flush()
        return code
    except BrokenPipeError:  # `… inspect FILE | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except UserError as e:
        print(f"error: {printable(flagged(e))}", file=sys.stderr)
        return 2
    except (
        FileExistsError,
        NotADirectoryError,
        IsADirectoryError,
        PermissionError,
    ) as e:  # a target that is a file, or beneath one
        if e.filename is None:
            raise
        print(f"error: {printable(e.filename)}: {e.strerror}", file=sys.stderr)
        return 2


def script(stages, doc, presets=None, less_memory=LESS_MEMORY):
    """Run a script: parse sys.argv, call its main(cfg), turn every expected failure into one line.

    stages: {name: (Config, main)}, main a function or where it is, "package.module:name", to be imported after parsing; the
    single name "" means a script without a stage word.
    presets: {stage: {preset: {field: value}}}. less_memory: what to try when memory runs out.
    Exit codes: 0 done, 2 the user's mistake, 130 Ctrl-C, 143 SIGTERM.
    """
    argv, prog = sys.argv[1:], Path(sys.argv[0]).name
    debug = "--debug" in argv
    try:
        if "" in stages and not (argv and argv[0] in stages):
            stage = ""
        elif " ".join(argv[:2]) in stages:  # a stage of parts: `distill.py transfer train`
            stage, argv = " ".join(argv[:2]), argv[2:]
        elif argv and argv[0] in stages:
            stage, argv = argv[0], argv[1:]
        elif argv and argv[0] in ("-h", "--help"):
            print(f"{doc}\n\nstages: {', '.join(stages)} (`{prog} STAGE --help` lists a stage's options)")
            return 0
        elif len(argv) == 2 and argv[1] in ("-h", "--help") and any(s.startswith(f"{argv[0]} ") for s in stages):
            print(f"{doc}\n\nstages: {', '.join(s for s in stages if s.startswith(f'{argv[0]} '))}")
            return 0
        elif argv and (parts := [s.split(" ")[1] for s in stages if s.startswith(f"{argv[0]} ")]):
            second = printable(argv[1]) if len(argv) > 1 else "nothing"
            raise UserError(f"after {argv[0]} comes one of {', '.join(parts)}, not {second}{nearest(second, parts)}")
        else:
            first, words = (
                printable(argv[0]) if argv else "nothing",
                list(dict.fromkeys(s.split(" ")[0] for s in stages)),
            )
            raise UserError(f"the first word must be one of {', '.join(words)}, not {first}{nearest(first, words)}")
        cls, story = stages[stage]
        cfg = parse(cls, argv, doc, (presets or {}).get(stage), f"{prog} {stage}".strip())
        signal.signal(signal.SIGTERM, _stop)
        if isinstance(story, str):
            # imported now: nothing that a mistake on the command line, or --help, would have to wait for
            module, _, name = story.partition(":")
            story = getattr(importlib.import_module(module), name)
        story(cfg)
        sys.stdout.flush()
        return 0
    except (Exception, KeyboardInterrupt) as e:
        # it is ending already: torchrun sends a SIGTERM when a process is lost, and PyTorch raises, wherever we are, for a lost data worker
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        if hasattr(signal, "SIGCHLD"):
            signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        code, line = _verdict(e, less_memory)
        first = speaks is None or speaks(e)  # of several processes one says what happened
        if code is None or (debug and code == 2):
            if first:
                raise
            return code or 1
        if line and first:
            print(line, file=sys.stderr)
        return code
    finally:
        for end in endings:
            end()


def _verdict(e, less_memory):
    """(exit code, line for people) of what ended a script; (None, None) for a fault of our own, which is a traceback."""
    cause = e  # a compiler may have wrapped what interrupted it
    while cause is not None and not isinstance(cause, Stopped | KeyboardInterrupt | UserError):
        cause = cause.__cause__ or cause.__context__
    e = cause if isinstance(cause, Stopped | KeyboardInterrupt) else e
    if isinstance(e, UserError):
        return 2, f"error: {printable(flagged(e))}"
    if isinstance(e, KeyboardInterrupt):
        return 130, "interrupted"
    if isinstance(e, Stopped):
        return 143, "terminated"
    if isinstance(e, BrokenPipeError):  # `sample.py … | head`: nobody reads our stdout any more
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0, None
    text = f"{type(e).__name__}: {e}"
    if isinstance(e, RuntimeError) and str(e).startswith("kernels: "):
        # --kernels triton, and a kernel that cannot serve
        return 2, f"error: {printable(e)}"
    if isinstance(e, MemoryError) or (isinstance(e, RuntimeError) and OUT_OF_MEMORY.search(text)):
        return 2, f"error: out of memory ({printable(str(e).splitlines()[0] if str(e) else text)}); {less_memory}"
    if isinstance(e, RuntimeError) and "DataLoader worker" in text:  # told by a signal, wherever the main process was
        return 2, f"error: a data worker was lost ({printable(text.splitlines()[0])}); try --num-workers 0"
    if speaks is not None and isinstance(e, RuntimeError) and CONNECTION.search(text):
        return 1, f"error: another process was lost, or did not answer in time: {printable(text.splitlines()[0])}"
    return None, None


# {a library's setting: its flag}, where that is not the same word
FLAGS = {
    "quirks": "diffusers-quirks",
    "image": "init-image",
    "tiled": "vae-tiling",
    "churn": "s-churn",
    "perturbed": "perturbed-scale",
    "crops_coords_top_left": "crop",
    "controls": "control",
}


def flagged(text):
    """A message of the library with the flags of the command line in place of its arguments."""

    def flag(m):
        name = m[1].removeprefix("negative_")
        if name in FLAGS:
            return f"--{'negative-' * (name != m[1])}{FLAGS[name]}"
        return "--" + m[1].replace("_", "-")

    return re.sub(r"(?<!extra )`([a-z][a-z0-9_]*)`", flag, str(text))


def _stop(signum, frame):
    raise Stopped
