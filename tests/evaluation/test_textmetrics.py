"""Caption scores against pycocoevalcap, nltk, rouge-score (recorded) and published values; the tokenizer against Stanford's."""

import json

import pytest
from util import GOLDEN

from nanodiff.config import UserError
from nanodiff.data import caption_files
from nanodiff.evaluation import textmetrics


def read(name):
    return json.loads((GOLDEN / "captions" / f"{name}.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    facts = json.loads((GOLDEN / "goldens" / "metrics.text.json").read_text())
    return [p["hyp"] for p in facts["pairs"]], [p["refs"] for p in facts["pairs"]], facts["values"]


def test_recordings(recorded):
    candidates, references, want = recorded
    found = textmetrics.scores(candidates, references)
    for n in range(4):
        assert found[f"bleu{n + 1}"].value == pytest.approx(want["coco_bleu"][n], rel=1e-9)
        assert found[f"bleu{n + 1}"].each == pytest.approx(want["coco_bleu_each"][n], rel=1e-6, abs=1e-12)
    assert found["rouge_l"].value == pytest.approx(want["coco_rouge_l"], rel=1e-9)
    assert found["rouge_l"].each == pytest.approx(want["coco_rouge_l_each"], rel=1e-8)
    assert found["rouge_l_f1"].each == pytest.approx(want["rouge_score_rougeL_each"], rel=1e-8)
    assert found["cider"].each == pytest.approx(want["coco_cider_each"], rel=1e-8)
    assert found["cider"].value == pytest.approx(want["coco_cider"], rel=1e-9)
    assert found["meteor"].each == pytest.approx(want["meteor_exact_stem_each"], rel=1e-8)


def test_published_values():
    """The coco-caption demo: BLEU .579/.404/.279/.191, ROUGE-L .396, CIDEr .600."""
    facts = read("coco_fakecap_1000")
    ids, candidates, references = textmetrics.paired(facts["hyps"], facts["refs"])
    found = textmetrics.scores(candidates, references, ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "cider"))
    assert [round(s.value, 3) for s in found.values()] == [0.579, 0.404, 0.279, 0.191, 0.396, 0.600]
    for name, key in (("bleu4", "Bleu_4"), ("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        assert found[name].value == pytest.approx(facts["exact"][key], rel=1e-9)
        for i, want in facts["per_item"].items():
            assert found[name].each[ids.index(i)] == pytest.approx(want[key], rel=1e-8, abs=1e-15)


@pytest.mark.parametrize("case", read("small_published"), ids=lambda c: c["name"])
def test_small_published(case):
    words = (lambda s: " ".join(s.split())) if case["tokenise"] == "whitespace" else textmetrics.tokenize
    ids = list(case["refs"])
    found = textmetrics.scores(
        [words(case["hyps"][i][0]) for i in ids], [[words(r) for r in case["refs"][i]] for i in ids]
    )
    for name, key in (("bleu1", "Bleu_1"), ("bleu4", "Bleu_4"), ("rouge_l", "ROUGE_L"), ("cider", "CIDEr")):
        assert found[name].value == pytest.approx(case["exact"][key], rel=1e-8, abs=1e-15)


def test_stems():
    stems = json.loads((GOLDEN / "goldens" / "metrics.more.json").read_text())["stems"]
    assert {w: textmetrics.stem(w) for w in stems} == stems


def test_single_and_corpus_bleu_differ():
    """S3-38: the mean of single captions' BLEU is another number than the corpus's."""
    candidates, references = ["a b c d e", "x"], [["a b c d e"], ["y z"]]
    score = textmetrics.bleu(candidates, references)[0]
    assert score.value == pytest.approx(5 / 6 * 2.718281828 ** (1 - 7 / 6)) and sum(score.each) / 2 == pytest.approx(
        0.5, abs=1e-6
    )


def test_identical_captions_are_perfect_and_unrelated_ones_are_not():
    references = [["a red car on the road", "one red car"], ["two dogs play in snow", "dogs in the snow"]]
    best = textmetrics.scores([r[0] for r in references], references)
    for name in ("bleu1", "bleu4", "rouge_l", "rouge_l_f1"):
        assert best[name].value == pytest.approx(1, rel=1e-6)
    assert best["meteor"].value > 0.99
    worst = textmetrics.scores(["q w", "z"], references)
    assert all(s.value < 1e-4 for s in worst.values())
    empty = textmetrics.scores(["", ""], references)
    assert all(s.value < 1e-4 for s in empty.values())


def test_intervals_hold_the_value_and_shrink():
    facts = read("coco_fakecap_1000")
    _, candidates, references = textmetrics.paired(facts["hyps"], facts["refs"])
    wide, narrow = (
        textmetrics.bootstrap(
            candidates[:n],
            references[:n],
            textmetrics.scores(candidates[:n], references[:n], ("bleu4", "rouge_l")),
            resamples=200,
        )
        for n in (100, 1000)
    )
    for name in ("bleu4", "rouge_l"):
        value = textmetrics.scores(candidates, references, (name,))[name].value
        assert narrow[name][0] < value < narrow[name][1]
        assert narrow[name][1] - narrow[name][0] < wide[name][1] - wide[name][0]


def test_files(tmp_path):
    def file(name, text):
        (tmp_path / name).write_text(text)
        return caption_files.read(tmp_path / name)

    assert file("a.json", '{"1": "x", "2": "y"}') == {"1": ["x"], "2": ["y"]}
    assert file("b.json", '[{"image_id": 1, "caption": "x"}, {"image_id": 1, "caption": "z"}]') == {"1": ["x", "z"]}
    assert file("c.json", '{"images": [], "annotations": [{"image_id": 7, "id": 1, "caption": "x"}]}') == {"7": ["x"]}
    assert file("d.jsonl", '{"image_id": 7, "caption": "x"}\n{"image_id": 8, "caption": "y"}\n') == {
        "7": ["x"],
        "8": ["y"],
    }
    assert file("d.csv", "Image_Name,Title\np1,\"['a, b', 'c']\"\np2,plain\n") == {"p1": ["a, b", "c"], "p2": ["plain"]}
    for name, text, said in (
        ("e.json", "{", "not readable as JSON"), ("f.json", "{}", "no captions"), ("g.json", "[3]", "entry 0"),
        ("h.json", '{"1": 4}', "1: expected a caption"), ("i.csv", "Name,Text\n", "no column"),
        ("j.csv", "Image_Name,Title\np,['a\n", "j.csv:2"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=said):
            file(name, text)
    with pytest.raises(UserError, match="No such file"):
        caption_files.read(tmp_path / "absent.json")


def test_ids_that_differ_are_an_error():
    with pytest.raises(UserError, match="1 of 2 ids of --candidates are not in --references, such as b"):
        textmetrics.paired({"a": ["x"], "b": ["y"]}, {"a": ["x"]})
    with pytest.raises(UserError, match="1 of 2 ids of --references"):
        textmetrics.paired({"a": ["x"]}, {"a": ["x"], "b": ["y"]})
    with pytest.raises(UserError, match="a has 2 captions"):
        textmetrics.paired({"a": ["x", "y"]}, {"a": ["x"]})


@pytest.mark.parametrize(
    "name, said", [("spice", "Java"), ("perplexity", "language model"), ("bleu5", "none of bleu1")]
)
def test_what_we_do_not_have_is_said(name, said):
    with pytest.raises(UserError, match=said):
        textmetrics.scores(["a"], [["a"]], (name,))
