"""Data sets on disk: layouts, faults, order."""

import io
import json
import tarfile

import pytest
from PIL import Image
from util import ROOT, run

from nanodiff import data
from nanodiff.config import UserError


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
    (tmp_path / "sub" / "b.txt").write_bytes(b"\xff caption\r\n")
    assert dict(zip((d := data.load(tmp_path)).keys, d.captions, strict=True))["sub/b.png"] == "\ufffd caption"


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


def test_order_is_a_function_of_seed_and_index():
    whole = data.order(10, 7, 0, 35)
    assert sorted(whole[:10]) == sorted(whole[10:20]) == list(range(10)) and whole[:10] != whole[10:20]
    assert data.order(10, 7, 12, 9) == whole[12:21]
    assert data.order(10, 8, 0, 10) != whole[:10]


def test_pictures_are_fitted_and_kept(tmp_path):
    folder(tmp_path, ["a.png"])
    pictures = data.Pictures(data.load(tmp_path, captions=False), 4)
    batch = pictures.batch([0, 0], [False, True])
    assert batch.shape == (2, 3, 4, 4) and batch.min() >= -1 and 0 in pictures.kept


def test_flip_mirrors_left_to_right(tmp_path):
    image = Image.new("RGB", (4, 4), "black")
    image.putpixel((0, 0), (255, 255, 255))
    image.save(tmp_path / "a.png")
    plain, flipped = data.Pictures(data.load(tmp_path, captions=False), 4).batch([0, 0], [False, True])
    assert plain[0, 0, 0] == 1 and flipped[0, 0, 3] == 1 and flipped[0, 0, 0] == -1


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
