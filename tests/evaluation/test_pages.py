"""Numbers of pictures in files, and back."""

import json
import math

from nanodiff.evaluation import image_pairs, pages


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
