"""Charts: written when matplotlib is there, one line when it is not."""

import builtins
import json

import numpy as np
import pytest
from PIL import Image

from nanodiff.config import UserError
from nanodiff.output import charts


def log(tmp_path, rows):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_losses(tmp_path):
    pytest.importorskip("matplotlib")
    path = log(tmp_path, [{"step": i, "loss": 1 / (i + 1), "lr": 0.1} for i in range(30)])
    assert charts.losses(path, tmp_path / "loss.png")
    assert len(set(Image.open(tmp_path / "loss.png").convert("L").tobytes())) > 2, "something is drawn"


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def block(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", block)
    assert not charts.losses(log(tmp_path, [{"step": 1, "loss": 1, "lr": 1}]), tmp_path / "x.png")
    assert "extra `report`" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_empty_log(tmp_path):
    with pytest.raises(UserError, match="no losses"):
        charts.losses(log(tmp_path, [{"step": 1}]), tmp_path / "x.png")


def test_panels_and_target(tmp_path):
    pytest.importorskip("matplotlib")
    rows = [
        {"step": i, "loss": 100 / (i + 1) ** 2, "kl": 30 - i, "lr": 0.1} | ({"perceptual": 1} if i > 5 else {})
        for i in range(30)
    ]
    path, sizes = log(tmp_path, rows), []
    for panels in (("loss",), ("loss", "reconstruction", "kl", "perceptual")):
        assert charts.losses(path, tmp_path / "x.png", panels, target=25.0)
        sizes.append(Image.open(tmp_path / "x.png").size)
    assert sizes[1][0] > sizes[0][0], "two columns: panels that are not in the log take no place"
    rgb = np.asarray(Image.open(tmp_path / "x.png").convert("RGB")).reshape(-1, 3)
    red = ((rgb[:, 0] > 180) & (rgb[:, 1] < 90) & (rgb[:, 2] < 90)).any()
    assert red, "the target is a red line"


def test_curves_of_several_runs(tmp_path):
    pytest.importorskip("matplotlib")
    logs = {}
    for name in "ab":
        (tmp_path / name).mkdir()
        logs[name] = log(tmp_path / name, [{"step": i, "unweighted_loss": 1 / (i + 1), "lr": 1} for i in range(9)])
    assert charts.curves(logs, tmp_path / "c.png") and Image.open(tmp_path / "c.png").width > 300
