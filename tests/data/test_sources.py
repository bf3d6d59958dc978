"""Data sets on disk: layouts, faults, order."""

import gzip
import io
import json
import tarfile

import pytest
from PIL import Image
from util import ROOT, run

from nanodiff import data
from nanodiff.config import UserError
from nanodiff.data import captionset, tables, tools


def png(color="red", size=(6, 6)):
    out = io.BytesIO()
    Image.new("RGB", size, color).save(out, "PNG")
    return out.getvalue()


def folder(root, names=("a.png", "sub/b.png", "c.JPG")):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.new("RGB", (6, 6), "blue").save(path, "JPEG" if name.endswith("JPG") else "PNG")
    return root


def tar(path, members):
    with tarfile.open(path, "w") as t:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            t.addfile(info, io.BytesIO(content))
    return path


def test_metadata_jsonl(tmp_path):
    folder(tmp_path)
    (tmp_path / "metadata.jsonl").write_text(
        '\ufeff{"file_name": "a.png", "text": "A"}\n{"file_name": "c.JPG", "text": "C"}\n', encoding="utf-8"
    )
    (tmp_path / "sub" / "metadata.jsonl").write_text('{"file_name": "b.png", "text": "B"}\n')
    got = data.load(tmp_path)
    assert dict(zip(got.keys, got.captions, strict=True)) == {"a.png": "A", "c.JPG": "C", "sub/b.png": "B"}
    assert got.image(0).size == (6, 6)


def test_captions_json_and_text_files(tmp_path):
    folder(tmp_path)
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "A", "c.JPG": "C"}))
    (tmp_path / "sub" / "b.txt").write_bytes("é caption\r\n".encode())
    assert dict(zip((d := data.load(tmp_path)).keys, d.captions, strict=True))["sub/b.png"] == "é caption"
    for other in ("latin-1", "utf-16"):  # a wrong letter would be learned as well as a right one
        (tmp_path / "sub" / "b.txt").write_bytes("é caption\r\n".encode(other))
        with pytest.raises(UserError, match=r"b\.txt.*UTF-8"):
            data.load(tmp_path)


def test_junk_is_ignored(tmp_path):
    folder(tmp_path, ["a.png"])
    (tmp_path / "._a.png").write_bytes(b"junk")
    (tmp_path / ".DS_Store").write_bytes(b"junk")
    assert data.load(tmp_path, captions=False).keys == ["a.png"]


@pytest.mark.parametrize(
    ("line", "says"),
    [
        ('{"file_name": "../x.png", "text": "a"}', "outside the data folder"),
        ('{"file_name": "/etc/x.png", "text": "a"}', "outside the data folder"),
        ('{"text": "a"}', "no file_name"),
        ('{"file_name": "a.png", "text": "a"}\n{"file_name": "a.png", "text": "b"}', "listed twice"),
        ('{"file_name": "ghost.png", "text": "a"}', "not there: ghost.png"),
        ("{", "metadata.jsonl"),
    ],
)
def test_bad_listings(tmp_path, line, says):
    folder(tmp_path, ["a.png"])
    (tmp_path / "metadata.jsonl").write_text(line)
    with pytest.raises(UserError, match=says):
        data.load(tmp_path)


def test_missing_captions_are_listed(tmp_path):
    with pytest.raises(UserError, match=r"3 of 3 pictures have no caption: a\.png"):
        data.load(folder(tmp_path))


def test_empty_and_missing(tmp_path):
    with pytest.raises(UserError, match="No images found"):
        data.load(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        data.load(tmp_path / "x")


def test_tar_shards(tmp_path):
    for i in range(3):
        tar(
            tmp_path / f"s-{i:03d}.tar",
            [(f"{i}.png", png()), (f"{i}.txt", f"caption {i}".encode()), (f"{i}.json", b"{}")],
        )
    got = data.load(f"{tmp_path}/s-{{000..002}}.tar")
    assert got.captions == ["caption 0", "caption 1", "caption 2"] and got.image(2).getpixel((0, 0)) == (255, 0, 0)
    with pytest.raises(UserError, match=r"s-003\.tar: no such file"):
        data.load(f"{tmp_path}/s-{{000..003}}.tar")


def test_hostile_tar_members_are_only_keys(tmp_path):
    path = tmp_path / "s.tar"
    tar(
        path,
        [
            ("../../evil.png", png()),
            ("../../evil.txt", b"e"),
            ("/abs.png", png()),
            ("/abs.txt", b"a"),
            ("x.pkl", b"cos\nsystem\n(S'x'\ntR."),
        ],
    )
    with tarfile.open(path, "a") as t:
        link = tarfile.TarInfo("link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        t.addfile(link)
    got = data.load(path)
    assert len(got) == 2 and sorted(p.name for p in tmp_path.iterdir()) == ["s.tar"]


def test_truncated_tar(tmp_path):
    path = tar(tmp_path / "s.tar", [("a.png", png()), ("a.txt", b"a")])
    path.write_bytes(path.read_bytes()[:600])
    with pytest.raises(UserError, match=r"s\.tar"):
        data.load(path)


def test_pictures_are_fitted_and_kept(tmp_path):
    folder(tmp_path, ["a.png"])
    pictures = data.Pictures(data.load(tmp_path, captions=False), 4)
    batch = pictures.batch([0, 0])
    assert batch.shape == (2, 3, 4, 4) and batch.min() >= -1 and 0 in pictures.kept


def test_metadata_csv_and_several_captions(tmp_path):
    folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "metadata.csv").write_text('\ufefffile_name,text\na.png,"one, two"\nb.png,B\n', encoding="utf-8")
    assert data.load(tmp_path).captions == ["one, two", "B"]
    (tmp_path / "metadata.csv").unlink()
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": ["A1", " ", "A2"], "b.png": "B"}))
    assert data.load(tmp_path).texts == [("A1", "A2"), ("B",)]


def test_labels_are_folders(tmp_path):
    folder(tmp_path, ["cat/a.png", "dog/deep/b.png", "c.png"])
    got = data.load(tmp_path, captions=False)
    assert dict(zip(got.keys, got.labels, strict=True)) == {"cat/a.png": "cat", "dog/deep/b.png": "dog", "c.png": None}


def test_columns_by_name(tmp_path):
    """S1-04: both columns are honoured, and a wrong one is named with those that are there."""
    folder(tmp_path, ["a.png", "b.png"])
    rows = [{"picture": f"{n}.png", "file_name": "other.png", "words": n.upper(), "text": "wrong"} for n in "ab"]
    (tmp_path / "metadata.jsonl").write_text("\n".join(map(json.dumps, rows)))
    assert data.load(tmp_path, image_column="picture", caption_column="words").captions == ["A", "B"]
    with pytest.raises(UserError, match=r"no word; it has picture, file_name, words, text \(`caption_column`\)"):
        data.load(tmp_path, image_column="picture", caption_column="word")


def test_a_captions_json_has_no_columns(tmp_path):
    folder(tmp_path, ["a.png"])
    (tmp_path / "captions.json").write_text(json.dumps({"a.png": "A"}))
    assert data.load(tmp_path).captions == ["A"]
    with pytest.raises(UserError, match=r"`caption_column` words: there is no metadata\.jsonl or table"):
        data.load(tmp_path, caption_column="words")


def test_weight_sees_pictures_that_were_replaced(tmp_path):
    folder(tmp_path, ["a.png", "b.png"])
    before = data.load(tmp_path, captions=False).weight()
    assert data.load(tmp_path, captions=False).weight() == before
    (tmp_path / "b.png").write_bytes((tmp_path / "b.png").read_bytes() + b"more")
    assert data.load(tmp_path, captions=False).weight() != before


def test_csv_table_with_names_without_suffix(tmp_path):
    """The food data set's form: Image_Name has no suffix, the pictures are in a folder beside the table."""
    folder(tmp_path / "Food Images", ["green-soup.jpg", "pie.png"])
    (tmp_path / "food.csv").write_text("id,Title,Image_Name\n1,Green soup,green-soup\n2,Apple pie,pie\n")
    got = data.load(tmp_path / "food.csv")
    assert got.captions == ["Green soup", "Apple pie"] and got.image(0).size == (6, 6)
    (tmp_path / "food.csv").write_text("Title,Image_Name\nX,none\nApple pie,pie\n")
    with pytest.raises(UserError, match="1 captions name a picture that is not there: none"):
        data.load(tmp_path / "food.csv")
    assert data.load(tmp_path / "food.csv", skip=True).captions == ["Apple pie"]
    (tmp_path / "food.csv").write_text("Name,Image\nX,pie\n")
    with pytest.raises(UserError, match=r"food.csv: no column .*; it has Name, Image \(`image_column`\)"):
        data.load(tmp_path / "food.csv")


def test_coco_annotations(tmp_path):
    folder(tmp_path / "val", ["1.jpg", "2.jpg"])
    notes = {"images": [{"id": 7, "file_name": "1.jpg"}, {"id": 8, "file_name": "2.jpg"}],
             "annotations": [{"image_id": 7, "caption": "A"}, {"image_id": 8, "caption": "B"}, {"image_id": 7, "caption": "A2"}]}  # fmt: skip
    (tmp_path / "captions_val.json").write_text(json.dumps(notes))
    assert data.load(tmp_path / "captions_val.json").texts == [("A", "A2"), ("B",)]
    notes["annotations"].append({"image_id": 9, "caption": "?"})
    (tmp_path / "captions_val.json").write_text(json.dumps(notes))
    with pytest.raises(UserError, match="1 annotations are of pictures that are not in it"):
        data.load(tmp_path / "captions_val.json")


def test_a_link_out_of_the_data_folder_is_refused(tmp_path):
    folder(tmp_path / "out", ["secret.png"])
    root = folder(tmp_path / "in", ["a.png"])
    (root / "link.png").symlink_to(tmp_path / "out" / "secret.png")
    (root / "metadata.jsonl").write_text(
        '{"file_name": "a.png", "text": "A"}\n{"file_name": "link.png", "text": "B"}\n'
    )
    with pytest.raises(UserError, match="outside the data folder"):
        data.load(root)


def test_pictures_without_captions_may_be_skipped(tmp_path, capsys):
    folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "a.txt").write_text("A")
    assert data.load(tmp_path, skip=True).keys == ["a.png"] and "left out: b.png" in capsys.readouterr().err


def test_shards_with_json_and_labels(tmp_path):
    tar(tmp_path / "s.tar", [("1.png", png()), ("1.json", b'{"caption": ["A", "B"]}'), ("1.cls", b"cat\n"),
                             ("2.png", png()), ("2.txt", b"C")])  # fmt: skip
    got = data.load(tmp_path / "s.tar")
    assert got.texts == [("A", "B"), ("C",)] and got.labels == ["cat", None]


def test_tables(tmp_path):
    """A Hub data set's parquet and arrow files: rows of encoded pictures and captions."""
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    rows = [{"bytes": png(c), "path": None} for c in ("red", "blue", "lime")]
    table = pa.table({"image": rows, "text": ["R", "B", "L"]})
    pq.write_table(table, tmp_path / "data-00000.parquet", row_group_size=2)
    with pa.OSFile(str(tmp_path / "data.arrow"), "wb") as f, pa.ipc.new_stream(f, table.schema) as writer:
        writer.write_table(table)
    for path in (tmp_path / "data-00000.parquet", tmp_path / "data.arrow"):
        got = data.load(path)
        assert got.captions == ["R", "B", "L"] and got.image(2).getpixel((0, 0)) == (0, 255, 0)
    (tmp_path / "data.arrow").unlink()
    assert len(data.load(tmp_path)) == 3


def test_tables_without_pyarrow_are_one_line(tmp_path, monkeypatch):
    (tmp_path / "x.parquet").write_bytes(b"PAR1")
    monkeypatch.setitem(__import__("sys").modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"needs pyarrow; pip install .*extra `parquet`"):
        data.load(tmp_path / "x.parquet")


def test_pack_round_trip(tmp_path):
    root = folder(tmp_path / "in", ["cat/a.png", "dog/b.jpg"])
    (root / "captions.json").write_text(json.dumps({"cat/a.png": ["A", "A2"], "dog/b.jpg": "B"}))
    done = run("-m", "nanodiff.data", "pack", root, tmp_path / "x.tar")
    assert done.returncode == 0, done.stderr
    before, after = data.load(root), data.load(tmp_path / "x.tar")
    assert after.texts == before.texts and after.labels == before.labels
    assert [after.data(i) for i in range(2)] == [before.data(i) for i in range(2)], "the encoded bytes, not made again"


def test_captions_of_strange_bytes(tmp_path):
    folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "a.txt").write_bytes(b"\xef\xbb\xbfBOM\0 here\r\n")
    (tmp_path / "b.txt").write_bytes(b"x" * tables.CAPTION_LIMIT)
    got = data.load(tmp_path)
    assert got.captions[0] == "BOM here" and len(got.captions[1]) == tables.CAPTION_LIMIT
    (tmp_path / "b.txt").write_bytes(b"x" * (1 << 20))
    with pytest.raises(UserError, match=r"b\.txt: a caption of 1048576 characters"):
        data.load(tmp_path)


def test_check_tool(tmp_path):
    folder(tmp_path, ["a.png", "b.png"])
    (tmp_path / "bad.png").write_bytes(b"no")
    (tmp_path / "a.txt").write_text("A")
    done = run("-m", "nanodiff.data", "check", tmp_path)
    assert done.returncode == 1 and "pictures: 3" in done.stdout and "captions: 1" in done.stdout
    assert "unreadable" in done.stdout and "duplicate: b.png" in done.stdout and "no caption: b.png" in done.stdout
    assert run("-m", "nanodiff.data", "check", tmp_path / "none").returncode == 2


def test_the_embedded_data_set():
    got = data.load(ROOT / "assets" / "emoji" / "emoji.tar")
    assert len(got) == len(set(got.captions)) == 536
    assert got.captions[got.keys.index("1f34e")] == "red apple" and got.image(0).size == (64, 64)


def test_what_is_not_read_is_said(tmp_path, capsys):
    folder(tmp_path, ["a.png"])
    for suffix, kind in ((".gif", "GIF"), (".tif", "TIFF"), (".jfif", "JPEG"), (".ppm", "PPM")):
        Image.new("RGB", (6, 6), "red").save(tmp_path / f"x{suffix}", kind)
        (tmp_path / f"x{suffix}").rename(tmp_path / f"{kind}{suffix}")
    (tmp_path / "b.HEIC").write_bytes(b"x")
    (tmp_path / "b.txt").write_text("a caption")
    for stray in (".ipynb_checkpoints", "__MACOSX", "@eaDir"):
        (tmp_path / stray).mkdir()
        (tmp_path / stray / "a-checkpoint.png").write_bytes(png())
    dataset = data.load(tmp_path, captions=False)
    assert sorted(dataset.keys) == ["GIF.gif", "JPEG.jfif", "PPM.ppm", "TIFF.tif", "a.png"] and not any(dataset.labels)
    assert all(dataset.image(i).size == (6, 6) for i in range(5))
    assert "not read: 1 .heic, 1 .txt of no picture" in capsys.readouterr().err


def test_a_tar_loses_no_picture(tmp_path, capsys):
    def shard(*members):
        with tarfile.open(tmp_path / "s.tar", "w") as t:
            for name, content in members:
                info = tarfile.TarInfo(name)
                info.size = len(content)
                t.addfile(info, io.BytesIO(content))
        return data.load(tmp_path / "s.tar", captions=False)

    with pytest.raises(UserError, match=r"s\.tar: two pictures are called 000: 000\.png and 000\.jpg"):
        shard(("000.png", png()), ("000.jpg", png()), ("000.txt", b"a cat"))
    with pytest.raises(UserError, match=r"two \.txt members are called 000"):
        shard(("000.png", png()), ("000.txt", b"a cat"), ("000.txt", b"a dog"))
    with pytest.raises(UserError, match=r"s\.tar: 000\.txt:1: is not UTF-8"):
        shard(("000.png", png()), ("000.txt", b"cr\xe8me"))
    got = shard(
        ("./000.png", png()), ("./._000.png", b"x"), ("__MACOSX/000.png", b"x"), ("001.txt", b"a dog"), ("x.heic", b"")
    )
    assert got.keys == ["./000"]
    assert "not read: 1 .heic, 1 captions or labels without a picture (001)" in capsys.readouterr().err


def test_json_beside_pictures(tmp_path, capsys):
    """As in a tar: where there is no .txt and no listing; what another program keeps there is no caption."""
    for i in range(4):
        Image.new("RGB", (8, 8), (i, 0, 0)).save(tmp_path / f"{i}.png")
    (tmp_path / "0.json").write_text('{"caption": "from json", "width": 8}')
    (tmp_path / "1.json").write_text('{"caption": "from json"}')
    (tmp_path / "1.txt").write_text("from text")
    (tmp_path / "2.json").write_text('{"shapes": []}')
    (tmp_path / "3.json").write_text("{broken")
    found = data.load(tmp_path, captions=False)
    assert found.captions == ["from json", "from text", None, None]
    err = capsys.readouterr().err
    assert "1 .txt or .json beside pictures cannot be read" in err and "not read: 0" not in err
    with pytest.raises(UserError, match=r"2 of 4 pictures have no caption: 2\.png, 3\.png"):
        data.load(tmp_path)


def test_layouts_that_are_nearly_right(tmp_path):
    (tmp_path / "d").mkdir()
    (tmp_path / "d" / "x-000.tar").write_bytes(b"\0" * 1024)
    with pytest.raises(UserError, match=r"no pictures but 1 \.tar, such as x-000\.tar"):
        data.load(tmp_path / "d")
    (tmp_path / "x.tar.gz").write_bytes(gzip.compress(b"x" * 2000))
    with pytest.raises(UserError, match=r"compressed \(gzip\); unpack"):
        data.load(tmp_path / "x.tar.gz")
    (tmp_path / "x.zip").write_bytes(b"PK")
    with pytest.raises(UserError, match=r"x\.zip: is no \.tar, \.csv"):
        data.load(tmp_path / "x.zip")
    (tmp_path / "t.csv").write_text("Image_Name;Title\na.png;b\n")
    with pytest.raises(UserError, match=r"parted by ';', where a comma"):
        data.load(tmp_path / "t.csv")


def test_a_range_of_shards_ends_at_the_first_that_is_missing(tmp_path):
    with pytest.raises(UserError, match=r"s-00000000\.tar: no such file"):
        data.load(f"{tmp_path}/s-{{00000000..99999999}}.tar")


def test_pictures_of_other_shapes_are_no_copies(tmp_path):
    (tmp_path / "a.png").write_bytes(png(size=(4, 8)))
    (tmp_path / "b.png").write_bytes(png(size=(8, 4)))
    assert not [line for line in tools.check(tmp_path)[0] if "duplicate" in line]


@pytest.mark.parametrize("name", ["a\0b.png", "\ud800.png"])
def test_names_that_no_file_can_have(tmp_path, name):
    folder(tmp_path, ["a.png"])
    for listing, text in (
        ("metadata.jsonl", json.dumps({"file_name": name, "text": "x"})),
        ("captions.json", json.dumps({name: "x"})),
    ):
        (tmp_path / listing).write_text(text)
        with pytest.raises(UserError, match="is no file's name"):
            data.load(tmp_path)
        (tmp_path / listing).unlink()
    coco = tmp_path / "coco.json"
    coco.write_text(
        json.dumps({"images": [{"id": 1, "file_name": name}], "annotations": [{"image_id": 1, "caption": "x"}]})
    )
    with pytest.raises(UserError, match="is no file's name"):
        data.load(coco)


def test_capital_suffixes(tmp_path):
    folder(tmp_path, ["a.png"])
    (tmp_path / "T.CSV").write_text("file_name,text\na.png,red\n")
    assert data.load(tmp_path / "T.CSV").captions == ["red"]


def test_an_export_is_trained_on_as_it_was(tmp_path):
    folder(tmp_path / "in", ["a.png", "b.png"])
    (tmp_path / "in" / "captions.json").write_text(json.dumps({"a.png": ["cyclone", "storm"], "b.png": "[close-up] x"}))
    captionset.export(tmp_path / "in", tmp_path / "out")
    assert data.load(tmp_path / "out" / "titles.csv").texts == [("cyclone", "storm"), ("[close-up] x",)]
