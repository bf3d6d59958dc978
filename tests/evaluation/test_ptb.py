"""Words as COCO's Java program counts them, against recordings of it."""

import json

import pytest
from util import GOLDEN

from nanodiff.evaluation import ptb, textmetrics


def pairs(name):
    return json.loads((GOLDEN / "captions" / f"{name}.json").read_text(encoding="utf-8"))["pairs"]


@pytest.mark.parametrize("name", ["ptb_odd", "ptb_pairs_tricky", "ptb_pairs_coco"])
def test_as_recorded(name):
    different = {raw: (ptb.tokenize(raw), want) for raw, want in pairs(name) if ptb.tokenize(raw) != want}
    assert not different


def test_of_the_metrics_recording():
    recorded = json.loads((GOLDEN / "goldens" / "metrics.text.json").read_text())["values"]["ptb_tokenizer"]
    assert all(textmetrics.tokenize(pair["in"]) == pair["out"] for pair in recorded)


@pytest.mark.parametrize(
    ("raw", "want"),
    [
        ("", ""),
        ("... -- ' “ ”", ""),
        ("Children sit in the sun.", "children sit in the sun"),  # "sun." is no abbreviation there, "mon." is
        ("Open Mon. to Sun.", "open mon. to sun"),
        ("wow!! really?!", "wow !! really ?!"),
        ("½ cup for €5 \N{SLICE OF PIZZA}", "1/2 cup for $ 5"),
        ("a dog’s ball, don’t", "a dog 's ball do n't"),
        ("😀" * 10_000, ""),
    ],
)
def test_by_hand(raw, want):
    assert ptb.tokenize(raw) == want
