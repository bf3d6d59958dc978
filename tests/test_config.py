"""Values of files, and words for people."""

import pytest

from nanodiff import config
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
