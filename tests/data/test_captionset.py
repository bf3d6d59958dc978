"""Captions in CSVs and logs, variations in replies, splits without leakage."""

import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from nanodiff import data
from nanodiff.config import UserError
from nanodiff.data import captionset
from nanodiff.data.captionset import Row


def csv(path, text):
    path.write_bytes(text.encode("utf-8", "surrogateescape"))
    return path


def picture(folder, name, seed):
    folder.mkdir(parents=True, exist_ok=True)
    array = np.random.default_rng(seed).integers(0, 255, (8, 8, 3), dtype=np.uint8)
    Image.fromarray(array).save(folder / f"{name}.png")


def test_titles_of_every_form(tmp_path):
    path = csv(
        tmp_path / "a.csv",
        '\ufeffImage_Name,Title\r\na,plain text\r\nb.jpg,"[""one"", \'two\']"\r\na,a second\r\nc,"with, comma"\r\n',
    )
    assert captionset.read(path) == [
        Row("a", ("plain text", "a second")),
        Row("b", ("one", "two")),
        Row("c", ("with, comma",)),
    ]
    assert captionset.read(
        csv(tmp_path / "j.csv", 'Image_Name,Title\na,"[""\\ud83c\\udf55 pizza""]"\nb,[Vegan] pizza\n')
    ) == [
        Row("a", ("🍕 pizza",)),
        Row("b", ("[Vegan] pizza",)),
    ]
    assert captionset.read(csv(tmp_path / "b.csv", "image,caption\nX,  Two   Words \n"), clean=True) == [
        Row("X", ("two words",))
    ]
    assert captionset.read(csv(tmp_path / "c.csv", "Image_Name,other\nX,1\n"), captions=False) == [Row("X", ())]


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("Name,Title\na,b\n", r"no column Image_Name \(nor .*; it has Name, Title"),
        ("Image_Name,Text of it\na,b\n", "no column Title"),
        ("", r"no column Image_Name .*; it has none"),
        ("Image_Name,Title\n", "has no rows"),
        ('Image_Name,Title\na,"[""broken"\n', r"a\.csv:2: '\[\"broken' is no list of captions"),
        ("Image_Name,Title\na,ok\nb,\n", r"1 captions are empty: .*a\.csv:3 \(b\) \(`skip_bad` leaves them out\)"),
        ("Image_Name,Title\n,x\n", r"a\.csv:2: no Image_Name"),
        ("Image_Name,Title\n../../etc/passwd,x\n", "is outside the data folder"),
        (f"Image_Name,Title\n{'x' * 300},x\n", "is no file's name"),
        (
            "Image_Name,Title\na,Salmon, grilled\n",
            r"a\.csv:2: has 3 columns, the first line has 2; a text with commas needs double quotes",
        ),
        ("Image_Name,Title\na,cr\udce8me\n", r"a\.csv:2: is not UTF-8"),
    ],
)
def test_mistakes_in_a_csv(tmp_path, text, said):
    with pytest.raises(UserError, match=said):
        captionset.read(csv(tmp_path / "a.csv", text))


def test_empty_captions_may_be_left_out(tmp_path, capsys):
    path = csv(tmp_path / "a.csv", 'Image_Name,Title\na,ok\nb,\nc,"[""""]"\nd,[]\n')
    assert captionset.read(path, skip=True) == [Row("a", ("ok",))]
    assert "3 captions are empty" in capsys.readouterr().err
    with pytest.raises(UserError, match="No such file"):
        captionset.read(tmp_path / "absent.csv")


def test_a_jobs_log(tmp_path, capsys):
    path = csv(
        tmp_path / "job.out",
        "Loading…\nSaved dish_1.jpg: Spicy noodle soup\nresults/x/dish_2.jpg -> 'Cold noodles'\n\n50%|###\n",
    )
    assert captionset.read(path) == [Row("dish_1", ("Spicy noodle soup",)), Row("dish_2", ("Cold noodles",))]
    assert "2 lines name no picture" in capsys.readouterr().err
    path.write_text(
        "my dish 1.jpg: A stew\n[3/9] Generated image: out/other dish.png -> Rice\n2025-03-01 10:00:01 saved x.jpg | Soup\n"
    )
    assert [(r.name, *r.captions) for r in captionset.read(path)] == [
        ("my dish 1", "A stew"), ("other dish", "Rice"), ("x", "Soup")
    ]  # fmt: skip


def test_pictures_are_found(tmp_path, capsys):
    picture(tmp_path / "one", "a", 0)
    picture(tmp_path / "two", "b", 1)
    rows = [Row("a", ("x",)), Row("b", ("y",)), Row("c", ("z",))]
    folders = [tmp_path / "one", tmp_path / "two"]
    with pytest.raises(UserError, match=r"1 of 3 pictures are not in .*: c"):
        captionset.located(rows, folders)
    found = captionset.located(rows, folders, skip=True)
    assert [r.name for r in found] == ["a", "b"] and "1 of 3" in capsys.readouterr().err
    dataset = captionset.pictures(found, "here")
    assert dataset.image(1).size == (8, 8) and dataset.texts == [("x",), ("y",)]
    with pytest.raises(UserError, match="no such folder"):
        captionset.located(rows, [tmp_path / "none"])
    with pytest.raises(UserError, match="3 of 3"):
        captionset.located([Row(f"x{i}", ("t",)) for i in range(3)], folders, skip=True)


def test_written_and_read_again(tmp_path):
    rows = [Row("a", ('say "hi", you',), "", "z"), Row("b", ("línea", "two"), "", "y")]
    captionset.write(tmp_path / "t.csv", rows, {captionset.SOURCE: lambda row: row.source})
    assert captionset.read(tmp_path / "t.csv") == rows
    assert (tmp_path / "t.csv").read_text().startswith("Image_Name,Title,Source_Name\n")
    assert captionset.table(rows) == captionset.table([]) + b"".join(map(captionset.line, rows))


def test_variations_of_a_reply():
    reply = """Here are three variations:

1. **Spicy** Tofu Soup
2) "Cold tofu soup."
- tofu SOUP
* Cold Tofu Soup
- Soup
• a very long line with far too many words in it to be a caption
4. Tofu stew – with ginger
12. 34
"""
    assert captionset.variations(reply, "Tofu soup") == ["Spicy Tofu Soup", "Cold tofu soup", "Tofu stew – with ginger"]
    assert captionset.variations(reply, "Tofu soup", known=("spicy tofu soup",))[0] == "Cold tofu soup"
    assert captionset.variations(reply, "x y", low=1, high=1) == ["Soup"]
    assert captionset.variations("2% milk shake", "x") == ["2% milk shake"]
    assert captionset.variations("**Variation 1:** Grilled fish\n- Option 2: fried fish", "x") == [
        "Grilled fish",
        "fried fish",
    ]


@pytest.mark.parametrize(
    "item, want",
    [
        ("- Pick-me-up tiramisu with rum", "Pick-me-up tiramisu with rum"),
        ("- I-beam shaped chocolate cake", "I-beam shaped chocolate cake"),
        ("- Please-the-crowd pasta bake", "Please-the-crowd pasta bake"),
        ("- Club sandwich 'The Classic'", "Club sandwich 'The Classic'"),
        ("- Fish n' chips 'classic'", "Fish n' chips 'classic'"),
        ("- 'The Classic' burger", "'The Classic' burger"),
        ("- 'Club sandwich'", "Club sandwich"),
        ("- ‘Grandma's soup’", "Grandma's soup"),
        ('- "A neon sign reading "OPEN" at night"', 'A neon sign reading "OPEN" at night'),
        ("- 'A man in the '90s'", "A man in the '90s"),
        ("1. 'A sign saying 'stop' on a road'", "A sign saying 'stop' on a road"),
        ("- 'A red cat',", "A red cat"),
        ("- 'The Classic' with 'more' of it", "'The Classic' with 'more' of it"),
        ('- "Club sandwich', "Club sandwich"),
        ('- Club sandwich"', "Club sandwich"),
        ("- Let me know if you like it", None),
        ("- I hope this helps you", None),
    ],
)
def test_words_and_quotes_of_a_captions_own(item, want):
    assert captionset.variations(item + "\n", "x") == ([want] if want else [])


@given(st.text(max_size=200), st.text(max_size=20), st.integers(1, 4), st.integers(4, 12))
def test_variations_keep_their_promises(reply, original, low, high):
    found = captionset.variations(reply, original, low, high)
    keys = [captionset.cleaned(t) for t in found]
    assert len(set(keys)) == len(keys) and captionset.cleaned(original) not in keys
    assert all(low <= len(t.split()) <= high and t.isprintable() for t in found)


def folder_of(tmp_path, n, m, seed=0):
    """n originals, m synthetic pictures of each."""
    original, synthetic = [], []
    for i in range(n):
        picture(tmp_path / "o", f"o{i}", (seed, i))
        original.append(Row(f"o{i}", (f"dish {i}",), str(tmp_path / "o" / f"o{i}.png")))
        for k in range(m):
            picture(tmp_path / "s", f"o{i}_v{k}", (seed, i, k + 1))
            synthetic.append(
                Row(f"o{i}_v{k}", (f"dish {i} style {k}",), str(tmp_path / "s" / f"o{i}_v{k}.png"), f"o{i}")
            )
    return original, synthetic


def test_the_rules_of_a_split(tmp_path):
    """S3-24: of the total 80 %, 10 % (half original, half synthetic) and 10 % original alone; nothing twice; by the seed, not by the order."""
    original, synthetic = folder_of(tmp_path, 50, 3)
    parts, counts = captionset.split(original, synthetic, 42)
    sizes = {k: len(v) for k, v in parts.items()}
    assert sizes == {"train": 160, "val": 20, "test": 20}
    assert counts["val original"] == counts["val synthetic"] == 10 and counts["test synthetic"] == 0
    names = [row.name for rows in parts.values() for row in rows]
    assert len(set(names)) == len(names) == 200
    again, _ = captionset.split(original[::-1], synthetic[::-1], 42)
    assert again == parts != captionset.split(original, synthetic, 43)[0]
    held = {row.name for row in parts["test"]}
    assert counts["training pictures whose source is tested"] == sum(row.source in held for row in parts["train"]) > 0


def test_apart(tmp_path):
    original, synthetic = folder_of(tmp_path, 40, 2)
    parts, counts = captionset.split(original, synthetic, 1, apart=True)
    named = {row.name for rows in (parts["test"], parts["val"]) for row in rows if not row.source}
    assert not [row for row in parts["train"] if row.source in named]
    assert not {row.name for row in parts["test"]} & {row.source for row in parts["val"]}
    learned = {row.name for row in parts["train"]}
    judged = [row for row in parts["val"] if row.source]
    assert judged and not [row for row in judged if row.source in learned], "no picture of what is learned from judges"
    assert counts["training pictures whose source is tested"] == 0 and counts["left out for their source"] > 0


def test_duplicates(tmp_path):
    """By pixels, whatever the file; by caption, however written."""
    original, synthetic = folder_of(tmp_path, 20, 1)
    copy = tmp_path / "o" / "copy.bmp"
    Image.open(original[0].path).save(copy)
    original.append(Row("copy", ("another view",), str(copy)))  # the same picture, with its own caption
    synthetic.append(Row("stolen", ("brand new",), original[1].path, "o1"))  # an original's picture
    picture(tmp_path / "s", "known", 99)
    known = str(tmp_path / "s" / "known.png")
    synthetic.append(Row("known", ("  DISH   3 ",), known, "o3"))  # an original's caption
    picture(tmp_path / "s", "again", 98)
    # one that is there already
    synthetic.append(Row("zz", ("Dish 4 style 0", "dish 4 new"), str(tmp_path / "s" / "again.png"), "o4"))
    parts, counts = captionset.split(original, synthetic, 0)
    every = {row.name: row for rows in parts.values() for row in rows}
    assert not {"stolen", "known"} & set(every)
    merged = every.get("copy") or every["o0"]
    assert set(merged.captions) == {"another view", "dish 0"} and not {"copy", "o0"} <= set(every)
    assert every["zz"].captions == ("dish 4 new",)
    assert counts["original copies merged"] == 1 and counts["synthetic captions dropped"] == 2
    assert counts["synthetic pictures that are originals"] == 1


def test_splits_that_cannot_be(tmp_path, capsys):
    original, synthetic = folder_of(tmp_path, 4, 12)
    with pytest.raises(UserError, match="4 different originals are too few"):
        captionset.split(original, synthetic)
    (tmp_path / "o" / "o1.png").write_bytes(b"no picture")
    with pytest.raises(UserError, match=r"o1\.png: not a readable image.*`skip_bad`"):
        captionset.split(original, [])
    captionset.split(original, [], skip=True)
    assert "1 pictures cannot be read" in capsys.readouterr().err
    two, _ = folder_of(tmp_path / "more", 12, 0)
    with pytest.raises(UserError, match="`apart` needs to know what 1 synthetic pictures vary"):
        captionset.split(two, [Row("x", ("other words",), two[0].path)], apart=True)
    picture(tmp_path / "same", "o3", 1234)
    with pytest.raises(UserError, match="two different pictures are called o3"):
        captionset.split(two, [Row("o3", ("other words",), str(tmp_path / "same" / "o3.png"), "o5")])


def test_a_journal_goes_on(tmp_path):
    rows = [Row("a/b", ("one two",)), Row("a b", ("three four",)), Row("c", ("five six",))]
    settings = {"model": "x", "variations": 2}
    work = captionset.Journal(tmp_path, "augmented", rows, settings)
    assert work.done == {} and len(set(work.names)) == 3 and not any("/" in n for n in work.names), (
        "names are those of files"
    )
    work.add(0, ["n one", "n two"], 1)
    work.add(2, ["only this"], 5)
    assert len(captionset.read(work.csv)) == 3, "the table grows with it"
    with open(tmp_path / "augmented-0.jsonl", "a") as f:
        f.write('{"row": 1, "varia')  # killed while writing
    (tmp_path / "augmented-notes.jsonl").write_text("of a reader\n")
    with pytest.raises(UserError, match="another run is using this folder"):
        captionset.Journal(tmp_path, "augmented", rows, settings)
    work.close()
    again = captionset.Journal(tmp_path, "augmented", rows, settings)
    assert again.done == {0: (["n one", "n two"], 1), 2: (["only this"], 5)}
    again.add(1, ["x y", "y z"], 2)
    counts = again.finish(2)
    assert counts == {"captions": 3, "variations": 5, "captions_with_fewer": 1}
    assert (tmp_path / "augmented-notes.jsonl").read_text() == "of a reader\n"
    found = captionset.read(work.csv)
    assert [r.source for r in found] == ["a/b", "a/b", "a b", "a b", "c"] and found[0].name.endswith("_v1")
    assert "c,five six,1,5" in work.shortfall.read_text()
    with pytest.raises(UserError, match="was begun with another variations"):
        captionset.Journal(tmp_path, "augmented", rows, settings | {"variations": 3})
    (tmp_path / "augmented.jsonl").rename(tmp_path / "augmented-5.jsonl")  # of a process that was killed
    with pytest.raises(UserError, match="was begun with another captions"):
        captionset.Journal(tmp_path, "augmented", rows[:2], settings)


def test_apart_knows_copies(tmp_path):
    """A source that was merged into its copy is that copy."""
    original, synthetic = folder_of(tmp_path, 12, 0)
    copy = tmp_path / "o" / "a_copy.png"
    Image.open(original[5].path).save(copy)
    original.append(Row("zz_copy", ("the same",), str(copy)))
    for k in range(6):
        picture(tmp_path / "s", f"c{k}", (7, k))
        synthetic.append(Row(f"c{k}", (f"of the copy {k}",), str(tmp_path / "s" / f"c{k}.png"), "zz_copy"))
    for seed in range(12):
        parts, _ = captionset.split(original, synthetic, seed, apart=True)
        if "o5" in {row.name for row in parts["test"]}:
            assert not any(row.source for row in parts["train"] + parts["val"])
            return
    raise AssertionError("no seed tested it")


def test_one_name_in_two_folders(tmp_path):
    picture(tmp_path / "one", "a", 0)
    picture(tmp_path / "two", "a", 1)
    with pytest.raises(UserError, match="different pictures of one name"):
        captionset.located([Row("a", ("x",))], [tmp_path / "one", tmp_path / "two"])
    (tmp_path / "one" / "a.png").rename(tmp_path / "one" / "b.PNG")
    assert captionset.find("b", [tmp_path / "one"]).name == "b.PNG"


def test_names_on_disk_differ(tmp_path):
    rows = [Row(n, (f"caption {i}",)) for i, n in enumerate(("a b", "a:b", "a_b_1", "a_b"))]
    work = captionset.Journal(tmp_path, "augmented", rows, {})
    assert len(set(work.names)) == 4
    work.close()


def test_export(tmp_path):
    picture(tmp_path / "in" / "cats", "x", 0)
    picture(tmp_path / "in" / "dogs", "x", 1)
    (tmp_path / "in" / "captions.json").write_text(
        json.dumps({"cats/x.png": "a cat", "dogs/x.png": ["a dog", "a hound"]})
    )
    captionset.export(str(tmp_path / "in"), tmp_path / "out")
    rows = captionset.located(captionset.read(tmp_path / "out" / "titles.csv"), [tmp_path / "out" / "images"])
    assert sorted(r.captions for r in rows) == [("a cat",), ("a dog", "a hound")]
    before = data.load(str(tmp_path / "in"))
    assert sorted(captionset.content(r.path) for r in rows) == sorted(
        captionset.content(before.items[i].path) for i in range(2)
    )
