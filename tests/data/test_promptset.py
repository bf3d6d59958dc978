"""Prompts: words in templates, tables, lists."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st
from util import ROOT

from nanodiff.config import UserError
from nanodiff.data import promptset

WORDS = {"templates": {"standard": "a {breed} dog {pose}", "closeup": "the {part} of a {breed}"}, "training": ["standard"],
         "words": {"breed": ["red", "blue", "green"], "pose": ["sitting", "running"], "part": ["nose"]}}  # fmt: skip


def put(folder, name, what):
    path = folder / name
    path.write_text(what if isinstance(what, str) else json.dumps(what), encoding="utf-8")
    return path


def test_every_combination_once(tmp_path):
    words = promptset.read(put(tmp_path, "w.json", WORDS))
    drawn = words.draw(6, 0)
    assert words.count("standard") == 6 and {c for c, _ in drawn} == {"standard"}
    assert sorted(p for _, p in drawn) == sorted(
        f"a {b} dog {p}" for b in WORDS["words"]["breed"] for p in WORDS["words"]["pose"]
    )
    assert [words.one("standard", i) for i in range(3)] == [
        "a red dog sitting",
        "a red dog running",
        "a blue dog sitting",
    ]
    assert words.draw(6, 0) == drawn != words.draw(6, 1), "a function of the seed"
    assert len(words.draw(10, 0)) == 10, "more than there are: again"


def test_categories_and_what_is_left_out(tmp_path):
    words = promptset.read(put(tmp_path, "w.json", WORDS))
    learned = [p for _, p in words.draw(3, 0)]
    both = words.draw(5, 1, ["standard", "closeup"], learned)
    assert [c for c, _ in both] == ["standard"] * 3 + ["closeup"] * 2
    assert not {p for _, p in both} & set(learned)


@given(st.integers(1, 60), st.integers(0, 5))
def test_as_many_as_are_asked_for(n, seed):
    words = promptset.Words(WORDS["templates"], WORDS["words"], ["standard"])
    drawn = words.draw(n, seed, ["standard", "closeup"])
    assert len(drawn) == n and len({p for c, p in drawn if c == "standard"}) == min(-(-n // 2), 6)


def test_the_dogs():
    dogs = promptset.read(ROOT / "assets" / "prompts" / "dogs.json")
    drawn = dogs.draw(1000, 42)
    assert (
        len(set(drawn)) == 1000
        and dogs.training == ["standard"]
        and set(dogs.templates) == {"standard", "challenging", "closeup"}
    )
    assert all(
        p.startswith("A high resolution photograph of a ") and p.endswith(", 4k, detailed, realistic") for _, p in drawn
    )
    assert {"breed", "pose", "environment", "lighting"} <= set(dogs.words)


def test_lists(tmp_path):
    csv = put(tmp_path, "p.csv", 'id,prompt,category\n1,"a cat, sitting",closeup\n2,a dog,\n3,a fox, \n')
    assert promptset.read(csv).pairs == [("closeup", "a cat, sitting"), ("standard", "a dog"), ("standard", "a fox")]
    # caption.py's
    csv = put(tmp_path, "t.csv", 'Image_Name,Title\n1,"[""a cat, sitting"", ""a tabby""]"\n2,a [red] dog\n')
    assert [text for _, text in promptset.read(csv).pairs] == ["a cat, sitting", "a tabby", "a [red] dog"]
    assert promptset.read(put(tmp_path, "p.tsv", "what\tn\na fox\t1\n"), "what").pairs == [("standard", "a fox")]
    text = promptset.read(put(tmp_path, "p.txt", "﻿# mine\na cat\n\n a dog \na fox\n"))
    assert [p for _, p in text.draw(2, 0)] == ["a cat", "a dog"]
    assert [p for _, p in text.draw(2, 0, without=["a cat"])] == ["a dog", "a fox"]
    assert [p for _, p in text.draw(4, 0)] == ["a cat", "a dog", "a fox", "a cat"]
    assert len(promptset.read(ROOT / "assets" / "emoji" / "emoji.tar").pairs) == 536


BAD = {
    "no column": ("p.csv", "id,what\n1,a\n", r"no column prompt \(nor .*; it has id, what"),
    "no rows": ("p.csv", "prompt\n", "has no rows"),
    "an empty prompt": ("p.csv", "prompt\na\n \n", "p.csv:3: no prompt"),
    "a folder": ("p.csv", "prompt,category\na,../x\n", "p.csv:2: category '../x' cannot name a folder"),
    "a long folder": ("p.csv", f"prompt,category\na,{'x' * 99}\n", "cannot name a folder"),
    "no folder": (
        "w.json",
        WORDS | {"templates": {"": "a"}, "training": [""]},
        "category '' cannot name a folder|training is no list",
    ),
    "nothing": ("p.txt", "\n# x\n", "has no prompts"),
    "another key": ("w.json", WORDS | {"wordz": {}}, "unknown key 'wordz'; did you mean words"),
    "no word": (
        "w.json",
        WORDS | {"templates": {"s": "a {bred} dog"}, "training": ["s"]},
        "wants 'bred', which words has not; did you mean breed",
    ),
    "a brace": ("w.json", WORDS | {"templates": {"s": "a {breed dog"}, "training": ["s"]}, "a brace that is no"),
    "training": (
        "w.json",
        WORDS | {"training": ["standart"]},
        "names 'standart', which templates has not; did you mean standard",
    ),
    "an empty list": ("w.json", WORDS | {"words": {"breed": []}}, "words is no object of lists"),
    "templates": ("w.json", {"templates": []}, "templates is no object"),
}


@pytest.mark.parametrize("case", BAD)
def test_mistakes_are_named(tmp_path, case):
    name, what, words = BAD[case]
    path = put(tmp_path, name, what)
    with pytest.raises(UserError, match=words) as e:
        promptset.read(path)
    assert str(path) in str(e.value)


def test_columns_and_files_that_are_not_there(tmp_path):
    path = put(tmp_path, "p.csv", "id,what\n1,a\n")
    with pytest.raises(UserError, match="no column prompt; it has id, what"):
        promptset.read(path, "prompt")
    with pytest.raises(UserError, match="`prompt_column` is for tables"):
        promptset.read(put(tmp_path, "p.txt", "a\n"), "prompt")
    with pytest.raises(UserError, match="no such file"):
        promptset.read(tmp_path / "absent.csv")
