"""Data as it comes from somewhere: damaged archives, links, listings of other folders, tables by other programs. Right, or one line."""

import gzip
import io
import json
import os
import tarfile

import pytest
from PIL import Image

from nanodiff.commandline import from_mapping, read_settings
from nanodiff.config import UserError, read_json
from nanodiff.data import caption_files, captionset, promptset, sources, tables, tools


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), colour).save(path)
    return path


def shard(path, names, end=True):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for name in names:
            for suffix, content in ((".png", data.getvalue()), (".txt", name.encode())):
                info = tarfile.TarInfo(name + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    return path


def test_a_shard_whose_first_name_begins_as_an_archive_does(tmp_path):
    assert sources.load(shard(tmp_path / "a.tar", ["BZh1", "b"])).keys == ["BZh1", "b"]


def test_what_an_old_program_left_behind_the_end_is_no_archive(tmp_path):
    path = shard(tmp_path / "a.tar", "ab")
    data = path.read_bytes()
    path.write_bytes(data[:-512] + b"junk" * 128)
    assert len(sources.load(path)) == 2


def test_other_names_for_captions_are_said_once_a_shard(tmp_path, capsys):
    data = io.BytesIO()
    Image.new("RGB", (8, 8)).save(data, "PNG")
    with tarfile.open(tmp_path / "a.tar", "w") as tar:
        for name in "abc":
            for suffix, content in ((".png", data.getvalue()), (".json", b'{"caption": "x", "title": "y"}')):
                info = tarfile.TarInfo(name + suffix)
                info.size = len(content)
                tar.addfile(info, io.BytesIO(content))
    assert sources.load(tmp_path / "a.tar").captions == ["x"] * 3
    said = capsys.readouterr()
    assert (said.out + said.err).count("title") == 1


@pytest.mark.parametrize("how", ["header", "cut at a header", "cut in a header", "two in one", "gzip"])
def test_a_damaged_shard_is_no_shorter_set(tmp_path, how):
    """Python's reader takes each of them for the archive's end."""
    path = shard(tmp_path / "a.tar", "abcdef")
    data = path.read_bytes()
    with tarfile.open(path) as tar:
        fourth = tar.getmembers()[6].offset
    assert len(sources.load(path)) == 6
    more = shard(tmp_path / "b.tar", "xyz").read_bytes()
    made = {
        "header": data[: fourth + 1] + b"\xff" + data[fourth + 2 :],
        "cut at a header": data[:fourth],
        "cut in a header": data[: fourth + 200],
        "two in one": data + more,
        "gzip": gzip.compress(data),
    }
    path.write_bytes(made[how])
    with pytest.raises(UserError, match=r"a\.tar: (damaged|cut off|several archives in one|is compressed \(gzip\))"):
        sources.load(path)


def test_links_are_followed_once_and_what_is_no_file_is_said(tmp_path, capsys):
    picture(tmp_path / "elsewhere" / "1.png")
    picture(tmp_path / "data" / "cats" / "1.png", "blue")
    (tmp_path / "data" / "dogs").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "data" / "cats" / "again").symlink_to(tmp_path / "data")
    (tmp_path / "data" / "cats" / "3.png").symlink_to("/nowhere.png")
    os.mkfifo(tmp_path / "data" / "pipe.png")
    data = sources.load(tmp_path / "data", captions=False)
    assert data.keys == ["cats/1.png", "dogs/1.png"] and data.labels == ["cats", "dogs"]
    said = capsys.readouterr()
    assert "3.png" in said.out + said.err and "pipe.png" in said.out + said.err


def test_a_linked_folder_beside_its_target_is_one_folder(tmp_path):
    """The newest run's link, as programs leave it; links to one another; a linked folder with a listing as without."""
    for name in ("run_1/a.png", "z/1.png"):
        picture(tmp_path / name)
    (tmp_path / "latest").symlink_to("run_1")
    (tmp_path / "z" / "back").symlink_to("../run_1")
    (tmp_path / "run_1" / "on").symlink_to("../z")
    data = sources.load(tmp_path, captions=False)
    assert data.keys == ["run_1/a.png", "z/1.png"] and data.labels == ["run_1", "z"]
    root = tmp_path / "other"
    root.mkdir()
    (root / "images").symlink_to(tmp_path / "run_1")
    (root / "metadata.csv").write_text("file_name,text\nimages/a.png,words\n")
    assert sources.load(root, skip=True).captions == ["words"]


def test_a_folder_that_is_named_is_the_one(tmp_path):
    for name in ("dogs/1.png", "dogs/2.png"):
        picture(tmp_path / name)
    table = tmp_path / "t.csv"
    table.write_text("file_name,text\ncats/1.png,a cat\ndogs/1.png,a dog\ndogs/2.png,two dogs\n")
    with pytest.raises(UserError, match=r"1 captions name a picture that is not there: cats/1\.png"):
        sources.load(table)
    table.write_text("file_name,text\nx/dogs/1.png,a dog\n1.png,a dog again\n")
    with pytest.raises(UserError, match=r"x/dogs/1\.png and 1\.png would both be"):
        sources.load(table)
    table.write_text("file_name,text\n1,a dog\nset/dogs/2,two dogs\n./set/dogs/2,again\n")
    assert sources.load(table).keys == ["dogs/1.png", "dogs/2.png"]


def test_a_listing_counts_before_other_texts_and_says_so(tmp_path, capsys):
    picture(tmp_path / "a.png")
    (tmp_path / "a.txt").write_text("other words")
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,words\n")
    assert sources.load(tmp_path).captions == ["words"]
    said = capsys.readouterr()
    assert "1 .txt beside pictures say something else" in said.out + said.err


@pytest.mark.parametrize(
    ("table", "line"),
    [
        ("file_name\ttext\na.png\t\"big dog\nb.png\tsmall dog\"\nc.png\tcat\n", "swallows what looks like rows"),
        ("file_name,text\na,['a red thing 1' 'a thing']\n", "is no list of captions"),
        (f"file_name,text\n{'/'.join(['x' * 190] * 30)},a\n", "is no file's name"),
    ],
    ids=["tsv", "an array as numpy prints it", "a path of 5,700 letters"],
)  # fmt: skip
def test_tables_that_would_be_read_as_something_else(tmp_path, table, line):
    path = tmp_path / ("t.tsv" if "\t" in table else "t.csv")
    path.write_text(table)
    with pytest.raises(UserError, match=line):
        captionset.read(path)


def test_a_line_that_may_be_a_row_is_said(tmp_path, capsys):
    """It may as well be a caption of several lines: nobody can tell."""
    path = tmp_path / "t.csv"
    path.write_text('file_name,text\ncat,"big dog\ndog,small dog"\n')
    assert captionset.read(path)[0].captions == ("big dog\ndog,small dog",)
    said = capsys.readouterr()
    assert "of which one may be a row ('dog,small dog')" in said.out + said.err


def test_a_caption_may_have_lines_and_commas(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text('file_name,text\na,"A dog,\nhappy, on grass"\n')
    assert captionset.read(path)[0].captions == ("A dog,\nhappy, on grass",)
    assert tables.titles("['a', \"it's\"]", "x") == ["a", "it's"]


@pytest.mark.parametrize(
    ("rows", "line"),
    [
        ("Image_Name,Title\na.png,red\na.jpg,a dog\n", "a is a .png in an earlier row and a .jpg here"),
        ("Image_Name,Title,Source_Name\ns.png,a,0.png\ns.png,b,7.png\n", "s varies '7', an earlier row says '0'"),
    ],
)
def test_one_name_is_one_picture_of_one_source(tmp_path, rows, line):
    path = tmp_path / "t.csv"
    path.write_text(rows)
    with pytest.raises(UserError, match=line):
        captionset.read(path)


def test_a_source_may_have_a_suffix_and_is_counted_when_it_is_no_original(tmp_path):
    path = tmp_path / "t.csv"
    path.write_text("Image_Name,Title,Source_Name\ns0.png,a,0.png\n")
    assert captionset.read(path)[0].source == "0"
    rows = [captionset.Row(f"{i}", (f"a {i}",), str(picture(tmp_path / f"{i}.png", (i, 0, 0)))) for i in range(20)]
    made = [captionset.Row("m", ("made",), str(picture(tmp_path / "m.png", (0, 9, 0))), "stranger")]
    assert captionset.split(rows, made)[1]["synthetic pictures of no original here"] == 1
    made = [made[0]._replace(source="3")]
    assert "synthetic pictures of no original here" not in captionset.split(rows, made)[1]


def test_export_keeps_every_picture_and_its_source(tmp_path, capsys):
    for name, colour in (("a b 2", "red"), ("a b", "green"), ("a_b", "blue")):
        picture(tmp_path / "in" / f"{name}.png", colour)
        (tmp_path / "in" / f"{name}.txt").write_text(colour)
    captionset.export(tmp_path / "in", tmp_path / "out")
    rows = captionset.located(captionset.read(tmp_path / "out" / "titles.csv"), [tmp_path / "out" / "images"])
    found = {row.captions[0]: Image.open(row.path).convert("RGB").getpixel((0, 0)) for row in rows}
    assert found == {"red": (255, 0, 0), "green": (0, 128, 0), "blue": (0, 0, 255)}
    before = (tmp_path / "out" / "titles.csv").read_bytes()
    with pytest.raises(UserError, match="would replace what is read"):
        captionset.export(tmp_path / "out" / "titles.csv", tmp_path / "out")
    assert (tmp_path / "out" / "titles.csv").read_bytes() == before
    with pytest.raises(UserError, match="is a part of what is packed"):
        tools.pack(tmp_path / "in", tmp_path / "in" / "a b.png")
    assert Image.open(tmp_path / "in" / "a b.png").format == "PNG"


@pytest.mark.parametrize(
    ("value", "line"),
    [
        ({"images": [{"id": 1, "file_name": "b"}, {"id": 1, "file_name": "a"}]}, "two images have the id 1"),
    ],
)
def test_coco_ids(tmp_path, value, line):
    path = tmp_path / "c.json"
    path.write_text(json.dumps(value | {"annotations": [{"image_id": 1, "caption": "a"}]}))
    with pytest.raises(UserError, match=line):
        caption_files.read(path, by_file=True)


def test_coco_as_it_comes(tmp_path, capsys):
    """An image that is listed twice, and annotations of images that a trimmed list lacks."""
    path, image = tmp_path / "c.json", {"id": 1, "file_name": "b"}
    notes = [{"image_id": 1, "caption": "a"}, {"image_id": 7, "caption": "c"}]
    path.write_text(json.dumps({"images": [image, image], "annotations": notes}))
    assert caption_files.read(path, by_file=True) == {"b": ["a"], "7": ["c"]}
    said = capsys.readouterr()
    assert "1 annotated pictures are not in its list of images, such as '7'" in said.out + said.err


def test_a_list_written_as_text_is_a_list(tmp_path):
    path = tmp_path / "c.json"
    path.write_text(json.dumps({"a": '["x y z", "w"]', "b": ["c d e"], "c": "", "d": "['Sic'] said the sign"}))
    assert caption_files.read(path) == {"a": ["x y z", "w"], "b": ["c d e"], "c": [""], "d": ["['Sic'] said the sign"]}


def test_settings_files_mean_one_thing(tmp_path):
    from train import DiffusionConfig

    twice = tmp_path / "t.json"
    twice.write_text('{"lr": 0.001, "lr": 5}')
    with pytest.raises(UserError, match="'lr' stands twice"):
        read_json(twice)
    twice.write_text('{"lr": 5, "lr": 5}')
    assert read_json(twice) == {"lr": 5}
    twice.write_bytes(b"\xef\xbb\xbf" + b'{"lr": 0.001}')
    assert read_json(twice) == {"lr": 0.001}
    for values, line in (
        ({"batch_size": 1, "train-batch-size": 2}, "batch_size and train-batch-size are one option"),
        ({"lr": 10**400}, "lr = 1000.* is out of range"),
        ({"output_dir": "a\0b"}, "output_dir = .* is no text"),
        ({"output_dir": "a\ud800"}, "output_dir = .* is no text"),
    ):
        with pytest.raises(UserError, match=line):
            from_mapping(DiffusionConfig, values, "x.json")
    script = tmp_path / "c.py"
    for more in ('CONFIG["lr"] = 5', "CONFIG.update(lr=5)", "CONFIG |= {}", 'del CONFIG["lr"]', '_ = CONFIG.pop("lr")', 'CONFIG["a"], b = 1, 2',
                 'if True: CONFIG["lr"] = 5'):  # fmt: skip
        script.write_text(f'CONFIG = {{"lr": 0.001}}\n{more}\n')
        with pytest.raises(UserError, match=r"c\.py:2: CONFIG is changed"):
            read_settings(script)
    script.write_text('CONFIG = {"lr": 1, "lr": 2}\n')
    with pytest.raises(UserError, match="'lr' stands twice in CONFIG"):
        read_settings(script)
    script.write_text('CONFIG: dict = {"lr": 0.001}\nother = CONFIG.copy()\n')
    assert read_settings(script) == {"lr": 0.001}
    script.write_text('import json\nCONFIG = {"lr": 0.001}\nprint(CONFIG)\n')
    assert read_settings(script) == {"lr": 0.001}


@pytest.mark.parametrize(
    ("raw", "line"),
    [
        ({"templates": {"c": "a {0} dog"}, "words": {"0": ["red"]}}, r"\{0\} is no name"),
    ],
)
def test_words_of_prompts(tmp_path, raw, line):
    path = tmp_path / "w.json"
    path.write_text(json.dumps(raw))
    with pytest.raises(UserError, match=line):
        promptset.read(path)


@pytest.mark.parametrize(
    ("reply", "captions"),
    [
        ("<think>\nThe user wants apples and so on\nIt should be short\n</think>\nA red apple on wood", ["A red apple on wood"]),
        ("<think>\nThe user wants apples and", []),
        ("<ul><li>A red apple on wood</li><li>Green apple slices</li></ul>", ["A red apple on wood", "Green apple slices"]),
        ("A red apple on wood<br>Green apple slices", ["A red apple on wood", "Green apple slices"]),
        ("1、 red apple on wood\n2、green apple slices", ["red apple on wood", "green apple slices"]),
        ("1. A red apple on wood (more detail)\n2. Green apple slices - this changes the setting", ["A red apple on wood", "Green apple slices"]),
        ("1. A cat [simplified drawing] beside a dog\n2. A robot (uses tracks to move)", ["A cat [simplified drawing] beside a dog", "A robot (uses tracks to move)"]),
        ("1. A pizza — simple and fresh\n2. Two signs (more or less)", ["A pizza — simple and fresh", "Two signs (more or less)"]),
        ("1. A red apple (organic)\n2. Apples - pears - plums", ["A red apple (organic)", "Apples - pears - plums"]),
    ],
)  # fmt: skip
def test_replies_of_language_models(reply, captions):
    assert captionset.variations(reply, "an apple") == captions


def test_two_comes_before_ten():
    names = ["10.png", "2.png", "a 1", "(3).png", "1.png"]
    assert sorted(names, key=tables.by_number) == ["(3).png", "1.png", "2.png", "10.png", "a 1"]


def test_suffixes_in_any_case_and_a_phones_jpeg(tmp_path, capsys):
    pictures = tmp_path / "in"
    picture(pictures / "q.png").rename(pictures / "q.Png")
    assert captionset.find("q", [pictures]) == pictures / "q.Png"
    picture(pictures / "late.png")  # the folder has changed since
    assert captionset.find("late", [pictures]) == pictures / "late.png" and captionset.find("none", [pictures]) is None
    two = Image.new("RGB", (8, 8), "blue")
    two.save(pictures / "phone.jpg", "MPO", save_all=True, append_images=[two])
    for name in ("q", "late", "phone"):
        (pictures / f"{name}.txt").write_text(f"a {name}")
    captionset.export(pictures, tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out" / "images").iterdir()) == ["late.png", "phone.jpg", "q.png"]
    rows = captionset.located(captionset.read(tmp_path / "out" / "titles.csv"), [tmp_path / "out" / "images"])
    assert len(rows) == 3
    Image.new("RGB", (8, 8)).save(pictures / "still.gif")
    (pictures / "still.txt").write_text("a gif")
    tools.pack(pictures, tmp_path / "out.tar")
    with tarfile.open(tmp_path / "out.tar") as tar:
        assert {n.rpartition(".")[2] for n in tar.getnames()} == {"png", "jpg", "gif", "txt"}
