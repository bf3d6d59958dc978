"""The README stays true: its commands parse, its targets exist, its pictures are there; the embedded model's run."""

import re
import shlex

import pytest
from PIL import Image
from util import ROOT, run

import caption
import distill
import eval as evaluation
import sample
import train
from nanodiff import commandline

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
README = "\n".join(p.read_text() for p in PAGES)
COMMANDS = [c for c in re.findall(r"`([^`\n]+)`", README) if c.startswith("python ")]
DOCSTRINGS = [
    line.strip().split("  #")[0]
    for m in (sample, train, evaluation, distill, caption)
    for line in m.__doc__.splitlines()
    if line.strip().startswith("python ")
]


@pytest.mark.parametrize("command", [*COMMANDS, *DOCSTRINGS])
def test_commands_parse(command):
    _, script, *argv = shlex.split(command)
    if script == "sample.py":
        stage = argv.pop(0) if argv and argv[0] in sample.STAGES else ""
        commandline.parse(sample.STAGES[stage][0], argv, presets=sample.PRESETS.get(stage))
    elif script == "train.py":
        commandline.parse(train.STAGES[argv[0]][0], argv[1:], presets=train.PRESETS[argv[0]])
    elif script == "eval.py":
        commandline.parse(evaluation.STAGES[argv[0]][0], argv[1:])
    elif script == "distill.py":
        words = 2 if " ".join(argv[:2]) in distill.STAGES else 1
        commandline.parse(distill.STAGES[" ".join(argv[:words])][0], argv[words:])
    elif script == "caption.py":
        commandline.parse(caption.STAGES[argv[0]][0], argv[1:])
    elif script == "-m":
        place = ROOT / argv[0].replace(".", "/")
        assert place.with_suffix(".py").exists() or (place / "__main__.py").exists()
    else:
        assert (ROOT / script).exists() or not script.endswith(".py")


def test_make_targets_exist():
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.M))
    for target in re.findall(r"make ([a-z][a-z-]+)", README):
        if target not in {"sure"}:
            assert target in targets, target
    assert {"help", "setup", "demo", "test", "test-gpu", "lint", "format", "bench", "clean"} <= targets


def test_pictures_exist():
    for page in PAGES:
        for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", page.read_text()):
            Image.open(page.parent / name).load()


def test_the_embedded_model_draws(tmp_path):
    command = next(c for c in COMMANDS if "--num-images 8" in c)
    argv = [re.sub(r"^out(?=/|$)", str(tmp_path), word) for word in shlex.split(command)[1:]]
    done = run(*argv)
    assert done.returncode == 0, done.stderr
    assert len(list(tmp_path.glob("0000?.png"))) == 8 and (tmp_path / "sheet.png").exists()


def test_make_help_lists_targets():
    import subprocess

    done = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0 and "make demo" in done.stdout and "make test" in done.stdout
