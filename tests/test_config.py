"""Values of files, and words for people."""

import pytest

import sample
from nanodiff import config
from nanodiff.commandline import parse
from nanodiff.config import UserError, printable, read_json


def test_large_json_is_refused(tmp_path):
    path = tmp_path / "big.json"
    with open(path, "wb") as f:
        f.truncate(65 << 20)
    with pytest.raises(UserError, match="too large"):
        read_json(path)


def test_printable():
    assert printable("a\x1b[2J\n") == "a\\x1b[2J\\n" and printable("é日🙂") == "é日🙂"


@pytest.mark.parametrize(("cell", "want"), [
    ("=1+2", "'=1+2"), ("\r=1", "' =1"), ("\t=1", "' =1"), ("  -2", "'  -2"), ("a\tb", "'a b"), ("a red apple", "a red apple"), ("", ""), (3, 3),
])  # fmt: skip
def test_no_cell_is_a_formula(cell, want):
    assert config.spreadsheet(cell) == want


def test_what_comes_with_the_program(tmp_path, monkeypatch):
    """Only what is read is found there, and only by its own name."""
    monkeypatch.chdir(tmp_path)
    nano = str(config.ASSETS / "nano")
    assert config.shipped("assets/nano") == nano and config.shipped(["assets/nano", "x"]) == [nano, "x"]
    for same in ("assets/", "assets", "assets/../docs", "assets/none", "an assets/nano", None, 3):
        assert config.shipped(same) == same
    cfg = parse(
        sample.Config,
        ["--model", "assets/nano", "--output-dir", "assets/nano", "--prompt", "assets/nano", "--output", "assets/nano"],
    )
    assert (cfg.model, cfg.output_dir, cfg.prompt, cfg.output) == (nano, "assets/nano", ["assets/nano"], "assets/nano")
    (tmp_path / "assets" / "nano").mkdir(parents=True)
    assert config.shipped("assets/nano") == "assets/nano"
