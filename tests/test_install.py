"""`pip install .`: the import, the command and the embedded model from a clean folder, and no top-level name but ours."""

import os
import shutil
import subprocess
import sys
import tomllib

import pytest
from util import ROOT


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """A folder with the installed wheel. The tree is copied: building leaves things in it."""
    base = tmp_path_factory.mktemp("install")
    names = (
        "nanodiff",
        "kernels",
        "assets",
        "pyproject.toml",
        "README.md",
        "LICENSE",
        *(p.name for p in ROOT.glob("*.py")),
    )
    for name in names:
        source = ROOT / name
        skip = shutil.ignore_patterns("__pycache__")
        shutil.copytree(source, base / "tree" / name, ignore=skip) if source.is_dir() else shutil.copy(
            source, base / "tree" / name
        )
    pip = [
        sys.executable,
        "-m",
        "pip",
        "install",
        "-q",
        "--no-deps",
        "--no-build-isolation",
        "--no-index",
        "--target",
        base / "site",
    ]
    subprocess.run([*pip, base / "tree"], check=True, capture_output=True, text=True, timeout=300)
    return base / "site"


def python(site, folder, *argv):
    env = os.environ | {"PYTHONPATH": str(site), "OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], cwd=folder, env=env, capture_output=True, text=True, timeout=300)


def test_it_draws_from_any_folder(site, tmp_path):
    done = python(
        site,
        tmp_path,
        "-m",
        "nanodiff",
        "sample",
        "--prompt",
        "fire",
        "--steps",
        "2",
        "--seed",
        "1",
        "--output-dir",
        "out",
    )
    assert done.returncode == 0 and (tmp_path / "out" / "00000.png").exists(), done.stderr
    code = (
        "import nanodiff, sys; from pathlib import Path\n"
        "assert 'torch' not in sys.modules\n"
        "sd = nanodiff.load(); r = sd.generate('fire', steps=2, seeds=[1])\n"
        "assert 'kernels' not in sys.modules and 'nanodiff._kernels' in sys.modules\n"
        "r.to_pil()[0].save('again.png'); print(sd, r)"
    )
    done = python(site, tmp_path, "-c", code)
    assert done.returncode == 0 and "unet" in done.stdout, done.stderr
    assert (tmp_path / "again.png").exists()
    assert "prompt" in python(site, tmp_path, "-m", "nanodiff", "sample", "--help").stdout
    wrong = python(site, tmp_path, "-m", "nanodiff", "samle")
    assert wrong.returncode == 2 and wrong.stderr.startswith("error: ") and "did you mean sample" in wrong.stderr


def test_no_other_top_level_names(site):
    assert {p.name for p in site.iterdir() if not p.name.endswith(".dist-info")} - {"bin", "__pycache__"} == {
        "nanodiff"
    }
    assert (site / "bin" / "nanodiff").exists()


def test_every_room_is_listed():
    listed = set(tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["packages"])
    rooms = {".".join(p.parent.relative_to(ROOT).parts) for p in (ROOT / "nanodiff").rglob("*.py")}
    assert listed - {"nanodiff._kernels", "nanodiff._scripts", "nanodiff._assets"} == rooms
