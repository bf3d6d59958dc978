"""Numbers of pictures in files, and back."""

import json
import math

import pytest

from nanodiff.evaluation import image_pairs, pages
from nanodiff.output import report


def refuse(word):
    raise ValueError(f"{word} is not JSON")


def test_infinities_are_strict_json_and_come_back(tmp_path):
    """The PSNR of two equal pictures is infinite, and SSIM of a small one does not exist."""
    numbers = {
        "a_vs_b": {"psnr": math.inf, "ssim": None, "mse": 0.0},
        "a_vs_c": {"psnr": 20.5, "ssim": 0.5, "mse": 0.25},
    }
    found = [image_pairs.Pair(f"cats/{i}", "cats", numbers) for i in range(2)]
    files = pages.write_pairs(tmp_path, found)
    for path in (p for p in files if p.suffix == ".json"):
        json.loads(path.read_text(), parse_constant=refuse)
    assert pages.read_pairs(tmp_path) == found
    overall = json.loads((tmp_path / "overall_metrics.json").read_text())
    assert overall["a_vs_c"]["psnr"] == 20.5


def test_the_change_is_over_the_same_pictures(tmp_path):
    """A picture that became the teacher's own has an infinite PSNR after, and counts on neither side."""
    rows = [(42.1, math.inf), (11.0, 13.0), (11.2, 13.4)]
    found = [
        image_pairs.Pair(
            str(i),
            "cats",
            {"original_vs_teacher": {"psnr": a, "mse": None}, "finetuned_vs_teacher": {"psnr": b, "mse": 1.0}},
        )
        for i, (a, b) in enumerate(rows)
    ]
    both = image_pairs.shared(found, "original_vs_teacher", "finetuned_vs_teacher")
    assert set(both) == {"psnr"} and both["psnr"] == pytest.approx((11.1, 13.2))
    document = report.Report("x")
    pages._improvement(tmp_path, document, both)
    assert "18.9" in document.markdown(tmp_path)
