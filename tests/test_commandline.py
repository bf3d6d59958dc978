"""Flags, presets, files; strength and errors."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass

import pytest
from util import ROOT, TINY, error_line, run

from nanodiff import aliases, commandline
from nanodiff.commandline import arg, parse
from nanodiff.config import UserError


@dataclass
class Config:
    rate: float = arg(0.5, "a rate")
    max_steps: int = arg(10, "a count")
    name: str | None = arg(None, "a name", choices=("one", "two"))
    tags: list[str] = arg([], "repeatable")
    flip: bool = arg(True, "a switch")
    resume: str | None = arg(None, "bare or with a value", const="auto")


PRESETS = {"fast": {"rate": 9.0, "max_steps": 1}}


@pytest.fixture(autouse=True)
def another_name(monkeypatch):
    monkeypatch.setitem(aliases.OF, "Config", {"max_steps": ("steps-alias",)})


def test_defaults_and_types():
    assert parse(Config, []) == Config(0.5, 10, None, [], True, None)
    cfg = parse(
        Config, ["--rate", "2", "--max_steps=3", "--name", "two", "--tags", "a", "--tags", "b", "--no-flip", "--resume"]
    )
    assert cfg == Config(2.0, 3, "two", ["a", "b"], False, "auto")
    assert parse(Config, ["--resume", "x_y"]).resume == "x_y"


@pytest.mark.parametrize("flag", ["--max-steps", "--max_steps", "--steps-alias", "--steps_alias", "--max-st"])
def test_spellings(flag):
    assert parse(Config, [flag, "7"]).max_steps == 7


def test_strength(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"rate": 3, "max-steps": 33}))
    assert parse(Config, ["--preset", "fast"], presets=PRESETS) == Config(9.0, 1)
    assert parse(Config, ["--preset", "fast", "--config", str(path)], presets=PRESETS) == Config(3.0, 33)
    assert parse(Config, ["--config", str(path), "--rate", "4"], presets=PRESETS) == Config(4.0, 33)
    toml = tmp_path / "c.toml"
    toml.write_text('rate = 0.25\ntags = ["x"]\n')
    assert parse(Config, ["--config", str(toml)]) == Config(rate=0.25, tags=["x"])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--rat", "x"], "invalid float"),
        (["--rates", "1"], "did you mean --rate"),
        (["--name", "three"], "invalid choice"),
        (["--preset", "slow"], "invalid choice"),
        (["positional"], "unknown argument positional"),
        (["--config", "missing.json"], "no such file"),
    ],
)
def test_errors(argv, says):
    with pytest.raises(UserError, match=says):
        parse(Config, argv, presets=PRESETS)


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ('{"rates": 1}', "unknown key 'rates'; did you mean rate"),
        ('{"rate": "fast"}', "wrong type"),
        ('{"flip": 1}', "wrong type"),
        ('{"max_steps": true}', "wrong type"),
        ('{"name": "three"}', "not one of one, two"),
        ("[1]", "expected a JSON object"),
        ("{", "not readable"),
        ("[" * 100_000, "not readable"),
    ],
)
def test_config_file_errors(tmp_path, text, says):
    path = tmp_path / "c.json"
    path.write_text(text)
    with pytest.raises(UserError, match=says) as e:
        parse(Config, ["--config", str(path)])
    assert str(path) in str(e.value)


@pytest.mark.parametrize("argv", [["sample.py"], ["train.py", "vae"], ["train.py", "diffusion"]])
def test_help_lists_defaults_without_torch(argv):
    code = (
        "import runpy, sys; sys.argv = sys.argv[1:] + ['--help']\n"
        "try: runpy.run_path(sys.argv[0], run_name='__main__')\n"
        "except SystemExit as e: assert not e.code, e.code\n"
        "assert 'torch' not in sys.modules and 'numpy' not in sys.modules"
    )
    done = run("-c", code, *argv)
    assert done.returncode == 0, done.stderr
    assert "--seed" in done.stdout and "[" in done.stdout and "python " in done.stdout


def test_stage_word_is_checked():
    assert "vae, diffusion" in error_line(run("train.py", "vaee"))
    assert run("train.py", "--help").returncode == 0


def test_debug_shows_the_traceback():
    done = run("sample.py", "--debug", "--promt", "x")
    assert "Traceback" in done.stderr


def test_scripts_are_importable_without_side_effects():
    done = run("-c", "import sample, train", cwd=ROOT)
    assert done.returncode == 0 and not done.stdout


def test_a_tool_whose_reader_is_gone_ends_quietly():
    """`python -m nanodiff.weights inspect FILE | head`"""
    read, write = os.pipe()
    os.close(read)
    with os.fdopen(write, "w") as nobody:
        argv = [sys.executable, "-m", "nanodiff.weights", "inspect", TINY / "sd15" / "unet"]
        done = subprocess.run(argv, cwd=ROOT, stdout=nobody, stderr=subprocess.PIPE, text=True, timeout=120)
    assert done.returncode == 0 and "BrokenPipe" not in done.stderr, done.stderr


def test_a_python_config_is_read_and_never_run(tmp_path):
    path = tmp_path / "config.py"
    path.write_text(
        'import os\nCONFIG = {\n  "lr": 1e-3,  # a remark\n  "tags": ["a", "b"],\n}\nos.system("touch ran")\n'
    )
    assert commandline.read_settings(path) == {"lr": 1e-3, "tags": ["a", "b"]} and not (tmp_path / "ran").exists()
    for text, says in (
        ("x = 1", "has no CONFIG"),
        ("CONFIG = f()", "more than literals"),
        ("CONFIG = [1]", "no dict"),
        ("CONFIG = {", "not readable"),
    ):
        path.write_text(text)
        with pytest.raises(UserError, match=says):
            commandline.read_settings(path)


def test_a_unit_may_stand_behind_a_number():
    @dataclass
    class Config:
        hires: float | None = arg(None, "how much larger", unit="x", low=1)

    for text, want in (("1.5x", 1.5), ("2", 2.0)):
        assert parse(Config, ["--hires", text], "doc", {}, "prog").hires == want
    for text in ("x", "1.5y", "1.5xx", "0.5x"):
        with pytest.raises(UserError, match="hires"):
            parse(Config, ["--hires", text], "doc", {}, "prog")


def test_an_option_may_need_another():
    """Given means set to another value than the default, 0 too; of several needed ones one is enough."""

    @dataclass
    class Needy:
        mask: str | None = commandline.arg(None)
        lora: list[str] = commandline.arg([])
        padding: int | None = commandline.arg(None, needs="mask")
        scale: float = commandline.arg(1.0, needs=("mask", "lora"))
        fuse: bool = commandline.arg(False, needs="lora")

    for fine in (
        {},
        {"mask": "m", "padding": 0},
        {"lora": ["a"], "scale": 0.0, "fuse": True},
        {"mask": "m", "scale": 2.0},
    ):
        commandline.check_needs(Needy(**fine))
    for wrong, says in (
        ({"padding": 0}, "--padding does nothing without --mask"),
        ({"scale": 0.0}, "--scale does nothing without --mask or --lora"),
        ({"mask": "m", "fuse": True}, "--fuse does nothing without --lora"),
    ):
        with pytest.raises(UserError, match=f"^{says}$"):
            commandline.check_needs(Needy(**wrong))
