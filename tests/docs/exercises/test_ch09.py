"""Words."""

import pytest


def test_merge(mine):
    assert mine.merge(["a", "p", "p", "l", "e"], ("p", "l")) == ["a", "p", "pl", "e"]
    assert mine.merge(["a", "a", "a"], ("a", "a")) == ["aa", "a"]
    assert mine.merge(["a", "b"], ("b", "a")) == ["a", "b"] and mine.merge([], ("a", "b")) == []


def spelled(words):
    return {(*word[:-1], word[-1] + "</w>"): many for word, many in words.items()}


def test_learn(mine):
    words = spelled({"low": 5, "lower": 2, "newest": 6, "widest": 3})  # Sennrich et al.'s
    assert mine.learn(words, 4) == [("e", "s"), ("es", "t</w>"), ("l", "o"), ("e", "w")]
    assert mine.learn(spelled({"ab": 1}), 5) == [("a", "b</w>")]


@pytest.mark.parametrize(
    ("word", "pieces"), [("apples", ["apple", "s"]), ("ale", ["a", "le"]), ("pap", ["p", "ap"]), ("x", ["x"])]
)
def test_encode(mine, word, pieces):
    assert mine.encode(list(word), [("a", "p"), ("l", "e"), ("p", "le"), ("ap", "ple")]) == pieces


def test_encode_what_was_learned(mine):
    words = spelled({"banana": 3, "bandana": 2, "ananas": 4, "cabana": 1})
    merges = mine.learn(words, 6)
    assert len(merges) == 6
    for word in words:
        parts = list(word)
        for pair in merges:
            parts = mine.merge(parts, pair)
        assert mine.encode(list(word), merges) == parts


def test_row(mine):
    assert mine.row([5, 6], 1, 2, 0, 6) == ([1, 5, 6, 2, 0, 0], 0)
    assert mine.row([5, 6, 7, 8], 1, 2, 2, 4) == ([1, 5, 6, 2], 2)
    assert mine.row([], 1, 2, 0, 3) == ([1, 2, 0], 0)
