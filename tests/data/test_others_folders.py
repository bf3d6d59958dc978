"""Folders as other programs leave them: the Hub's cache, saved data sets, kohya's, parts for training and testing, names that are no UTF-8."""

import io
import itertools
import json
import os
from pathlib import Path

import pytest
from PIL import Image

from nanodiff import data
from nanodiff.config import UserError
from nanodiff.data import sources
from nanodiff.data.tools import pack
from nanodiff.training import loader

COLOURS = ("red", "blue", "green", "black")


def png(colour="red", size=(8, 8)):
    out = io.BytesIO()
    Image.new("RGB", size, colour).save(out, "PNG")
    return out.getvalue()


def write(path, content):
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())


def test_the_hubs_cache_links_to_its_blobs(tmp_path):
    snapshot = tmp_path / "datasets--a--b" / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for i, colour in enumerate(COLOURS):
        write(tmp_path / "datasets--a--b" / "blobs" / str(i), png(colour))
        (snapshot / f"{i}.png").symlink_to(f"../../blobs/{i}")
    write(
        tmp_path / "datasets--a--b" / "blobs" / "m",
        "file_name,text\n" + "".join(f"{i}.png,{c}\n" for i, c in enumerate(COLOURS)),
    )
    (snapshot / "metadata.csv").symlink_to("../../blobs/m")
    assert data.load(snapshot).captions == list(COLOURS)
    write(tmp_path / "elsewhere.png", png())
    (snapshot / "0.png").unlink()
    (snapshot / "0.png").symlink_to(tmp_path / "elsewhere.png")
    with pytest.raises(UserError, match="is outside the data folder"):
        data.load(snapshot)


def test_captions_that_nobody_asks_for(tmp_path, capsys):
    """Labels in the listing, or a text of another encoding, are no hindrance where pictures alone are wanted."""
    for i in range(2):
        write(tmp_path / "a" / f"{i}.png", png())
        write(tmp_path / "b" / f"{i}.png", png())
    write(tmp_path / "a" / "metadata.csv", "file_name,label\n0.png,3\n1.png,4\n")
    write(tmp_path / "b" / "0.txt", b"caf\xe9")
    assert len(data.load(tmp_path / "a", captions=False)) == 2
    with pytest.raises(UserError, match="no column"):
        data.load(tmp_path / "a")
    assert data.load(tmp_path / "b", captions=False).texts == [(), ()]
    assert "1 .txt or .json beside pictures cannot be read" in capsys.readouterr().err
    with pytest.raises(UserError, match=r"0\.txt"):
        data.load(tmp_path / "b")


def test_what_a_folder_says_is_said(tmp_path, capsys):
    for name, n in (("40_sks dog", 1), ("1_dog", 2)):
        for i in range(n):
            write(tmp_path / "k" / name / f"{i}.png", png())
            write(tmp_path / "k" / name / f"{i}.txt", "one\ntwo\n")
    assert data.load(tmp_path / "k").captions == ["one\ntwo"] * 3
    said = capsys.readouterr().err
    assert (
        "2 folders begin with a number, as kohya's repeats, such as 1_dog" in said
        and "3 .txt have several lines" in said
    )
    write(tmp_path / "c" / "A.PNG", png())
    write(tmp_path / "c" / "A.TXT", "up")
    write(tmp_path / "c" / "captions.csv", "file_name,text\nA.PNG,x\n")
    assert data.load(tmp_path / "c").captions == ["up"]
    assert "captions.csv (name it itself" in capsys.readouterr().err
    for part in ("train", "test", "more"):
        write(tmp_path / "s" / part / "0.png", png())
    assert len(data.load(tmp_path / "s", captions=False)) == 3
    assert "folders more, test, train are read as one set" in capsys.readouterr().err
    assert [sources.split_of(w) for w in ("Train", "val", "dog", "eval")] == ["train", "test", None, "test"]


def test_names_that_are_no_utf8(tmp_path):
    folder = os.fsencode(tmp_path) + b"/caf\xe9"
    try:
        os.makedirs(folder)
    except OSError:
        pytest.skip("the file system takes no such names")
    for i, colour in enumerate(COLOURS):
        with open(folder + b"/%d.png" % i, "wb") as picture, open(folder + b"/%d.txt" % i, "w") as text:
            picture.write(png(colour))
            text.write(colour)
    found = data.load(tmp_path)
    assert loader.content(found.keys[0]) != loader.content(found.keys[1])
    pack(tmp_path, tmp_path / "out.tar")
    assert data.load(tmp_path / "out.tar").labels == ["caf?"] * 4


def test_a_picture_that_cannot_be_read_goes_where_most_are(tmp_path):
    for i in range(5):
        write(tmp_path / f"{i}.png", png(size=(12, 8)))
    write(tmp_path / "square.png", png())
    write(tmp_path / "bad.png", "junk")
    dataset = data.load(tmp_path, captions=False)
    found = loader.aspect_buckets(dataset, 64, 8)
    (wide,) = (size for size, positions in found.items() if 0 in positions)
    assert dataset.keys.index("bad.png") in found[wide] and sorted(itertools.chain(*found.values())) == list(range(7))


# -- tables --------------------------------------------------------------------------------------------------


def tables(tmp_path, **columns):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    pictures = [{"bytes": png(c), "path": None} for c in COLOURS]
    return pa, pq, pa.table({k: pictures if v is None else v for k, v in columns.items()})


def test_the_column_with_the_pictures_is_read_and_said_once(tmp_path, capsys):
    _, pq, table = tables(tmp_path, file_name=list(COLOURS), image_id=[1, 2, 3, 4], image=None, text=list(COLOURS))
    for i in range(3):
        pq.write_table(table, tmp_path / f"{i}.parquet")
    found = data.load(tmp_path)
    assert [found.image(i).getpixel((0, 0)) for i in (0, 1, 4)] == [(255, 0, 0), (0, 0, 255), (255, 0, 0)]
    assert "reading the column" not in capsys.readouterr().err
    _, pq, table = tables(tmp_path, image=None, file=None, text=list(COLOURS))
    (tmp_path / "two").mkdir()
    for i in range(3):
        pq.write_table(table, tmp_path / "two" / f"{i}.parquet")
    found = data.load(tmp_path / "two")
    for i in range(12):
        found.image(i)
    assert capsys.readouterr().err.count("reading the column") == 1


def test_the_part_for_training_is_read(tmp_path, capsys):
    _, pq, table = tables(tmp_path, image=None, text=list(COLOURS))
    for name in ("train-00000-of-00001", "test-00000-of-00001", "validation-00000-of-00001"):
        pq.write_table(table, tmp_path / f"{name}.parquet")
    assert len(data.load(tmp_path)) == 4
    assert "the part for training is read; not 2 files of others" in capsys.readouterr().err
    (tmp_path / "train-00000-of-00001.parquet").unlink()
    assert len(data.load(tmp_path)) == 8


@pytest.mark.parametrize("listed", (True, False))
def test_a_saved_set_is_what_it_lists(tmp_path, listed):
    pa, _, table = tables(tmp_path, image=None, text=list(COLOURS))
    index = pa.table({"indices": pa.array([3, 1], pa.uint64())})
    for name, one in (("data-00000-of-00001", table), ("cache-0123456789abcdef", table), ("cache-01", index)):
        with pa.OSFile(str(tmp_path / f"{name}.arrow"), "wb") as file, pa.ipc.new_stream(file, one.schema) as out:
            out.write_table(one)
    if listed:
        write(tmp_path / "state.json", json.dumps({"_data_files": [{"filename": "data-00000-of-00001.arrow"}]}))
    assert data.load(tmp_path).captions == list(COLOURS)


def test_row_groups_are_kept_by_their_bytes(tmp_path, monkeypatch):
    _, pq, table = tables(tmp_path, image=None, text=list(COLOURS))
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=1)
    found, reads = data.load(tmp_path / "a.parquet"), []
    read = sources._read_group
    monkeypatch.setattr(sources, "_groups", {})
    monkeypatch.setattr(sources, "_read_group", lambda *a: reads.append(a) or read(*a))
    for _ in range(3):
        for i in range(4):
            found.data(i)
    assert len(reads) == 4
    monkeypatch.setattr(sources, "GROUPS", 1)
    sources._groups.clear()
    for _ in range(2):
        found.data(0)
        found.data(1)
    assert len(sources._groups) == 1
