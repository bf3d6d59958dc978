"""The studies of the embedded model: what they refuse before anything is trained."""

import json
import sys

import pytest

from assets.nano import ablate, captions


@pytest.mark.parametrize(
    ("tool", "argv", "line"),
    [
        (ablate, ["--only", "foo"], "error: --only foo: is none of v, epsilon"),
        (ablate, ["--updates", "7"], "was made with other settings (settings.json); take another --output-dir"),
        (captions, ["study", "--updates", "7"], "was made with other settings (settings.json); take another --output-dir"),
    ],
)  # fmt: skip
def test_a_study_is_of_one_setting(tool, argv, line, tmp_path, monkeypatch, capsys):
    """What is there was made with it, and is not made again."""
    usual = {ablate: 1200, captions: 400}[tool]
    (tmp_path / "settings.json").write_text(json.dumps({"updates": usual}))
    monkeypatch.setattr(sys, "argv", ["tool", *argv, "--output-dir", str(tmp_path)])
    assert tool.main() == 2 and line in capsys.readouterr().err
    assert json.loads((tmp_path / "settings.json").read_text()) == {"updates": usual}


@pytest.mark.parametrize(("tool", "argv"), [(ablate, ["--updates", "0"]), (captions, ["study", "--seeds", "0"])])
def test_numbers_below_one(tool, argv, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["tool", *argv])
    with pytest.raises(SystemExit):
        tool.main()
    assert "at least 1" in capsys.readouterr().err


def test_results_without_settings_are_of_others(tmp_path, monkeypatch, capsys):
    (tmp_path / "results.json").write_text("{}")
    monkeypatch.setattr(sys, "argv", ["tool", "--only", "v", "--output-dir", str(tmp_path)])
    assert ablate.main() == 2 and "was made with other settings" in capsys.readouterr().err
