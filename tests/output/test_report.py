"""Significance against scipy and by hand; documents that are self-contained and show what is given as text."""

import csv
import json
import re

import numpy as np
import pytest
import scipy.stats
from PIL import Image

import caption
from nanodiff import commandline
from nanodiff.config import UserError
from nanodiff.output import report


def test_paired():
    rng = np.random.default_rng(0)
    a = rng.normal(size=40)
    b = a + 0.3 + 0.5 * rng.normal(size=40)
    got = report.paired(a, b)
    assert (got.t, got.p_t) == pytest.approx(tuple(scipy.stats.ttest_rel(b, a)))
    assert got.p_wilcoxon == pytest.approx(scipy.stats.wilcoxon(b - a).pvalue)
    assert got.d == pytest.approx((b - a).mean() / (b - a).std(ddof=1)) and got.low < got.mean < got.high
    assert got.low == pytest.approx(got.mean - 1.96 * got.std / 40**0.5, abs=0.03)
    back = report.paired(b, a)
    assert back.mean == -got.mean and back.p_t == pytest.approx(got.p_t)


def test_paired_at_the_edges():
    assert report.paired([1], [2]) is None
    same = report.paired([1, 2, 3], [1, 2, 3])
    assert same.p_t == same.p_wilcoxon == 1 and same.d == same.mean == 0
    shifted = report.paired([1, 2, 3], [2, 3, 4])
    assert shifted.p_t == 0 and shifted.d == np.inf
    assert report.paired([1, np.inf, 3, 4], [2, 3, np.nan, 6]).n == 2
    with pytest.raises(UserError, match="3 and 2 numbers"):
        report.paired([1, 2, 3], [1, 2])


def test_holm():
    assert report.holm([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert report.holm([0.9, 0.8]) == [1, 1]


def test_interval_covers():
    rng, hits = np.random.default_rng(1), 0
    for seed in range(100):
        low, high = report.interval(rng.normal(size=30), seed, resamples=300)
        hits += low < 0 < high
    assert 85 <= hits <= 100


def example():
    facts = report.provenance(network="none", weights_sha256="ab", resize="none", seed=3)
    return {
        "fid": report.entry(3.5, 10, facts, ci=(3, 4)),
        "psnr": report.entry(np.inf, 10, facts),
        "is": report.entry(2.0, 10, facts, std=0.1),
    }


def test_files(tmp_path):
    report.write_metrics(tmp_path, example())
    found = json.loads((tmp_path / "metrics.json").read_text())
    assert found["fid"]["ci"] == [3, 4] and found["psnr"]["value"] == "inf" and found["is"]["std"] == 0.1
    assert found["fid"]["provenance"].keys() >= {"network", "weights_sha256", "resize", "seed", "versions", "command"}
    assert report.read_metrics(tmp_path) == found
    with open(tmp_path / "metrics.csv") as f:
        row = next(csv.DictReader(f))
    assert list(row.values())[:-1] == ["fid", "3.5", "", "3.0", "4.0", "10"] and list(row) == list(report.COLUMNS)
    assert json.loads(row["provenance"]) == found["fid"]["provenance"]
    (tmp_path / "other.json").write_text('{"a": 3}')
    with pytest.raises(UserError, match=r"no metrics\.json of ours"):
        report.read_metrics(tmp_path / "other.json")


def test_documents(tmp_path):
    Image.new("RGB", (8, 8), "red").save(tmp_path / "a b.png")
    document = report.Report("Title & more")
    document.heading("Numbers")
    document.text("<script>alert(1)</script> *bold* \x1b[2J")
    document.heading("\x1b[2J")
    document.table(("name", "value"), [["a|b <i>", 0.123456], ["=1+2", None], [True, float("inf")]])
    document.picture(tmp_path / "a b.png", 'a "picture"')
    document.picture(None, "a figure that could not be drawn")
    report.metrics_table(document, example())
    document.write(tmp_path)
    page = (tmp_path / "report.html").read_text()
    assert "<script" not in page and "&lt;script&gt;" in page and "\x1b" not in page
    assert not re.search(r"""(?:src|href)=["'](?!data:)""", page) and "http" not in page, "nothing from elsewhere"
    assert page.count("<img") == 1 and "data:image/png;base64," in page and "0.1235" in page
    text = (tmp_path / "report.md").read_text()
    assert (
        '![a "picture"](a%20b.png)' in text
        and r"a\|b" in text
        and "&lt;script&gt;" in text
        and "<script" not in text
        and "# Title & more" in text
    )


def test_csv_cells_are_no_formulas(tmp_path):
    report.write_csv(tmp_path / "x.csv", ("a",), [["=cmd()"], ["@x"], ["plain"], [-3.5], [None]])
    assert (tmp_path / "x.csv").read_text().splitlines() == ["a", "'=cmd()", "'@x", "plain", "-3.5", '""']


@pytest.mark.parametrize("flag", (["--hf-token", "hf_SECRET"], ["--hf_token=hf_SECRET"]))
def test_a_command_is_told_without_its_token(monkeypatch, tmp_path, flag):
    monkeypatch.setattr("sys.argv", ["caption.py", "eval", *flag])
    commandline.parse(caption.STAGES["eval"][0], flag)
    told = report.provenance()["command"]
    assert "hf_SECRET" not in told and "***" in told, told


def test_paired_infinities_are_no_warning():
    with np.errstate(all="raise"):
        assert report.paired([np.inf, 1.0, 2.0], [np.inf, 2.0, 4.0]).mean == 1.5
