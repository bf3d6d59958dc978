"""Tables, listings and lists of lines: what is ambiguous is refused with its line."""

import csv
import io
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nanodiff.config import UserError, parse_json
from nanodiff.data import tables


def put(folder, name, content):
    path = folder / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


def read(path):
    header, rows = tables.rows(path)
    return header, [tuple(row.values()) for _, row in rows]


def test_an_ordinary_table(tmp_path):
    text = '\ufeffImage_Name, Title\r\n0,"a cow, brown"\r\n\r\n1,"a ""big"" dog"\r\n2,a 9" pan\r\n3,"two\nlines, one caption"\r\n'
    header, rows = read(put(tmp_path, "t.csv", text))
    assert header == ["Image_Name", "Title"]
    assert rows == [("0", "a cow, brown"), ("1", 'a "big" dog'), ("2", 'a 9" pan'), ("3", "two\nlines, one caption")]
    assert read(put(tmp_path, "t.TSV", "a\tb\n1\tx, y\n"))[1] == [("1", "x, y")]


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("n,t\n0,a cow, brown\n", r"t\.csv:2: has 3 columns, the first line has 2; a text with commas"),
        ("n,t\n0,a\n1\n", r"t\.csv:3: has 1 columns"),
        ('n,t\n0,a\n1,"an 8 inch\n2,b\n3,"a ""big"" dog"\n', r"t\.csv:3: .* \(read up to line 5\)"),
        (
            'n,t\n0,a\n1,"an 8 inch\n2,b\n3,c 7"\n',
            r"t\.csv:3: a quote that is opened here swallows what looks like rows \('2,b'\)",
        ),
        ('n,t\na.png,"x\nb.png,y"\n', r"t\.csv:2: .*swallows"),
        ('n,t\na,"x\n4k,y"\n', r"t\.csv:2: .*swallows"),
        ('n,t\n0,"a\n', r"t\.csv:2: unexpected end of data"),
        ('n,t\n0,"a" b\n', r"t\.csv:2: ',' expected after '\"'"),
        ("n,t,t\n0,a,b\n", r"two columns t"),
        ("n,t\n0," + "x" * (1 << 24) + "y\n", r"t\.csv:2: field larger"),
        ("n" * ((1 << 24) + 1) + ",t\n0,a\n", r"t\.csv:1: field larger"),
    ],
)
def test_what_is_ambiguous_is_refused_with_its_line(tmp_path, text, says):
    with pytest.raises(UserError, match=says):
        read(put(tmp_path, "t.csv", text))


def test_a_line_of_a_caption_may_begin_with_a_number(tmp_path):
    text = 'n,t\na,"a render\n4k, highly detailed, sharp"\nb,"one\n3D, blue"\n'
    assert read(put(tmp_path, "t.csv", text))[1] == [
        ("a", "a render\n4k, highly detailed, sharp"),
        ("b", "one\n3D, blue"),
    ]


@given(
    st.lists(st.tuples(st.integers(0, 99), st.text("ab ,\"'[é\u2028", min_size=1, max_size=12)), min_size=1, max_size=6)
)
def test_what_a_csv_writer_wrote_is_read(rows):
    out = io.StringIO()
    csv.writer(out, lineterminator="\n").writerows([("n", "t"), *rows])
    import tempfile
    from pathlib import Path

    with tempfile.TemporaryDirectory() as folder:
        found = read(put(Path(folder), "t.csv", out.getvalue()))[1]
    assert found == [(str(n), text) for n, text in rows]


def test_only_line_ends_divide_lines(tmp_path):
    path = put(tmp_path, "p.txt", "\ufeffa red\u2028apple\r\nfirst\x0bsecond\n\n pear\x85green \r\n")
    assert tables.lines(path) == ["a red\u2028apple", "first\x0bsecond", "pear\x85green"]
    for encoding, says in (("utf-16", "is UTF-16; save the file as UTF-8"), ("cp1252", r"p\.txt:2: is not UTF-8")):
        put(tmp_path, "p.txt", "a\ncrème\n".encode(encoding))
        with pytest.raises(UserError, match=says):
            tables.lines(path)


def test_a_name_stands_once_in_an_object():
    assert parse_json('{"1": "a", "2": {"1": "b"}}', "k.json") == {"1": "a", "2": {"1": "b"}}
    with pytest.raises(UserError, match=r"k.json: '1' stands twice"):
        parse_json('{"1": "first", "1": "second"}', "k.json")
    with pytest.raises(UserError, match="not readable as JSON"):
        parse_json("[" * 100_000, "k.json")


def test_captions_of_a_cell():
    read = tables.captions_in
    assert read('["cyclone"]', "t") == ("cyclone",) and read("['a', \"b's\"]", "t") == ("a", "b's")
    assert (
        read("[close-up] a red apple", "t") == ("[close-up] a red apple",) and read("[]", "t") == read(None, "t") == ()
    )
    assert read(["a", " ", "b"], "t") == ("a", "b")
    for value, says in (
        ('["broken"', "no list of captions"),
        ({"a": 1}, "no caption"),
        ([["a"]], "no caption"),
        (4, "4 is no caption"),
    ):
        with pytest.raises(UserError, match=says):
            read(value, "t")
    with pytest.raises(UserError, match="a caption of 16385 characters"):
        read("x" * (tables.CAPTION_LIMIT + 1), "t")


@pytest.mark.parametrize(
    "name", ["a\0.png", "\ud800.png", "/etc/passwd", "../a.png", "a/../../b.png", "", "x" * 256, 7, None]
)
def test_names_that_are_no_files(name):
    with pytest.raises(UserError):
        tables.name_in(name, "t.csv:3")


def test_what_is_no_data():
    for stray in (
        ".ipynb_checkpoints/a.png",
        "cat/._a.png",
        "__MACOSX/a.png",
        "cat/@eaDir/a.png",
        "Thumbs.db",
        "a/.hidden/b.png",
    ):
        assert not tables.is_data(stray), stray
    for own in ("a.png", "./a.png", "cat/a.b.png", "a..b/c.png", "../x.png"):
        assert tables.is_data(own), own


def test_columns_are_said(capsys):
    assert tables.column(None, tables.CAPTIONS, ["id", "caption", "Title"], "t.csv") == "caption"
    assert "t.csv: reading the column caption, not Title" in capsys.readouterr().err
    assert tables.column("Title", tables.CAPTIONS, ["id", "caption", "Title"], "t.csv") == "Title"
    assert not capsys.readouterr().err
    with pytest.raises(
        UserError, match=r"t\.csv: no column Titel; it has id, Title \(`caption_column`\); did you mean Title"
    ):
        tables.column("Titel", tables.CAPTIONS, ["id", "Title"], "t.csv", "caption_column")
    with pytest.raises(UserError) as e:
        tables.column(None, tables.NAMES, ["x" * 80_000], "t.csv")
    assert len(str(e.value)) < 400


def test_json_and_tables_are_read_alike(tmp_path):
    """The captions of one export, from its table and from JSON, for evaluation, training and the captioner."""
    from nanodiff.data import caption_files, captionset

    put(
        tmp_path,
        "titles.csv",
        captionset.table([captionset.Row("a", ("cyclone", "storm")), captionset.Row("b", ("[x] y",))]),
    )
    put(tmp_path, "titles.json", json.dumps({"a": ["cyclone", "storm"], "b": "[x] y"}))
    assert caption_files.read(tmp_path / "titles.csv") == caption_files.read(tmp_path / "titles.json")
    assert [r.captions for r in captionset.read(tmp_path / "titles.csv")] == [("cyclone", "storm"), ("[x] y",)]
