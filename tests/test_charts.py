"""Charts: written when matplotlib is there, one line when it is not."""

import builtins
import json

import pytest
from PIL import Image

from nanodiff import charts
from nanodiff.config import UserError


def log(tmp_path, rows):
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps(r) + "\n" for r in rows))
    return path


def test_loss_curve(tmp_path):
    pytest.importorskip("matplotlib")
    path = log(tmp_path, [{"step": i, "loss": 1 / (i + 1), "lr": 0.1} for i in range(30)])
    assert charts.loss_curve(path, tmp_path / "loss.png")
    assert len(set(Image.open(tmp_path / "loss.png").convert("L").tobytes())) > 2, "something is drawn"


def test_without_matplotlib(tmp_path, monkeypatch, capsys):
    original = builtins.__import__

    def block(name, *args, **kwargs):
        if name.startswith("matplotlib"):
            raise ImportError(name)
        return original(name, *args, **kwargs)

    monkeypatch.setattr(builtins, "__import__", block)
    assert not charts.loss_curve(log(tmp_path, [{"step": 1, "loss": 1, "lr": 1}]), tmp_path / "x.png")
    assert "extra `report`" in capsys.readouterr().err and not (tmp_path / "x.png").exists()


def test_empty_log(tmp_path):
    with pytest.raises(UserError, match="no losses"):
        charts.loss_curve(log(tmp_path, [{"step": 1}]), tmp_path / "x.png")
