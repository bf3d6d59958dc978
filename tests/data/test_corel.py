"""The Corel layout (S2-01, S2-02)."""

import json

import pytest
from PIL import Image
from util import error_line, run

from nanodiff import data
from nanodiff.config import UserError
from nanodiff.data import corel


def test_prepare(tmp_path, capsys):
    corel.stand_in(tmp_path / "data" / "corel", classes=3, each=2, size=16)
    done = run("-m", "nanodiff.data", "prepare-corel", "--data-dir", "data/corel", "--base_dir", tmp_path)
    assert done.returncode == 0, done.stderr
    out = tmp_path / "training_data" / "corel"
    assert sorted(p.name for p in out.iterdir()) == ["class_0001", "class_0002", "class_0003", "corel_all"]
    assert json.loads((out / "class_0002" / "captions.json").read_text()) == {
        "0002_0000.png": "a photo of a meadow", "0002_0001.png": "a photo of a meadow"}  # fmt: skip
    assert len(data.load(out / "corel_all")) == 6 and len(data.load(out / "class_0001")) == 2
    assert Image.open(tmp_path / "figs" / "corel_dataset_samples.png").width > 300


def test_missing_classes_are_made_up_loudly(tmp_path, capsys):
    corel.stand_in(tmp_path, classes=2, each=1, size=8)
    (tmp_path / "classes.txt").unlink()
    corel.prepare(tmp_path, output_dir=tmp_path / "out", visualize=False)
    assert (
        "WARNING" in capsys.readouterr().err
        and (tmp_path / "classes.txt").read_text() == "0001 class 0001\n0002 class 0002\n"
    )


def test_plain_names_and_too_few(tmp_path):
    corel.stand_in(tmp_path, classes=2, each=1, size=8)
    (tmp_path / "classes.txt").write_text("lions\nroses\n")
    corel.prepare(tmp_path, output_dir=tmp_path / "out", visualize=False)
    assert "a photo of a roses" in (tmp_path / "out" / "class_0002" / "captions.json").read_text()
    (tmp_path / "classes.txt").write_text("lions\nroses\nhorses\n")
    with pytest.raises(UserError, match="3 names for 2 classes"):
        corel.prepare(tmp_path, output_dir=tmp_path / "out", visualize=False)
    (tmp_path / "classes.txt").write_text("0001 lions\n")
    with pytest.raises(UserError, match="no name for class 0002"):
        corel.prepare(tmp_path, output_dir=tmp_path / "out", visualize=False)


def test_faults_are_one_line(tmp_path):
    assert "no such folder" in error_line(run("-m", "nanodiff.data", "prepare-corel", "--data-dir", tmp_path / "none"))
    (tmp_path / "x.png").write_bytes(b"")
    assert "No images found" in error_line(run("-m", "nanodiff.data", "prepare-corel", "--data-dir", tmp_path))
    (tmp_path / "0001_0001.png").write_bytes(b"no")
    assert "0001_0001.png" in error_line(run("-m", "nanodiff.data", "prepare-corel", "--data-dir", tmp_path))
