"""A WordNet's files: synonyms of a word in any of its forms, and METEOR with them."""

import pytest
from util import GOLDEN

from nanodiff.config import UserError
from nanodiff.evaluation import caption_scores, textmetrics
from nanodiff.evaluation.wordnet import ENDINGS, WordNet

SYNSETS = {  # part of speech: words of each synset
    "noun": [
        ["couch", "sofa", "lounge", "love_seat"],
        ["couch", "frame"],
        ["goose", "fathead"],
        ["box", "case"],
        ["sun", "sunlight"],
    ],
    "verb": [["run", "operate"], ["lie", "rest"], ["bake", "cook"]],
    "adj": [["big", "large"], ["handy", "near(p)"]],
    "adv": [["fast", "quickly"]],
}
IRREGULAR = {"noun": "geese goose\n", "verb": "ran run\nlying lie\n", "adj": "", "adv": ""}


@pytest.fixture
def folder(tmp_path):
    for pos, synsets in SYNSETS.items():
        data, offsets = b"  1 the licence\n", {}
        for words in synsets:
            for word in words:
                offsets.setdefault(word.split("(")[0], []).append(len(data))
            cells = " ".join(f"{word} 0" for word in words)
            data += f"{len(data):08d} 03 {pos[0]} {len(words):02x} {cells} 000 | a gloss\n".encode()
        lines = [
            f"{w} {pos[0]} {len(at)} 0 {len(at)} 0 {' '.join(f'{o:08d}' for o in at)}  \n"
            for w, at in sorted(offsets.items())
        ]
        (tmp_path / f"data.{pos}").write_bytes(data)
        (tmp_path / f"index.{pos}").write_text("  1 the licence\n" + "".join(lines))
        (tmp_path / f"{pos}.exc").write_text(IRREGULAR[pos])
    return tmp_path


@pytest.mark.parametrize(
    ("word", "want"),
    [
        ("couch", {"couch", "sofa", "lounge", "frame"}),
        ("couches", {"couch", "sofa", "lounge", "frame"}),
        ("geese", {"goose", "fathead"}),
        ("ran", {"run", "operate"}),
        ("lying", {"lie", "rest"}),
        ("baking", {"bake", "cook"}),
        ("boxes", {"box", "case"}),
        ("bigger", set()),  # "bigg" is no lemma, and no list of irregular forms names it here
        ("handy", {"handy", "near"}),
        ("fast", {"fast", "quickly"}),
        ("zebra", set()),
    ],
)
def test_synonyms(folder, word, want):
    assert WordNet(folder).synonyms(word) == want


def test_meteor_with_them(folder):
    synonyms = WordNet(folder).synonyms
    mine, theirs = ["a sofa in the sun"], [["a couch in the sun"]]
    assert textmetrics.meteor(mine, theirs).value == pytest.approx((1 - 0.5 * (2 / 4) ** 3) * 0.8)
    assert textmetrics.meteor(mine, theirs, synonyms).value == pytest.approx(1 - 0.5 * (1 / 5) ** 3)
    found = [
        caption_scores.captions({"1": mine}, {"1": theirs[0]}, names=("meteor",), resamples=0, wordnet=w)[0]["meteor"]
        for w in (None, folder)
    ]
    assert [("no synonyms" in f["provenance"]["form"], "WordNet" in f["provenance"]["form"]) for f in found] == [
        (True, False),
        (False, True),
    ]


def test_folders_that_are_none(folder, tmp_path):
    (folder / "index.verb").write_text("run v x\n")
    with pytest.raises(UserError, match=r"index\.verb: 'run v x' is no line"):
        WordNet(folder)
    (folder / "adj.exc").unlink()
    (folder / "index.verb").write_text("")
    with pytest.raises(UserError, match=r"`wordnet` .* needs index\.adj, data\.adj and adj\.exc"):
        WordNet(folder)
    with pytest.raises(UserError, match="`wordnet`"):
        WordNet(GOLDEN)
    assert set(ENDINGS) == set(SYNSETS)
