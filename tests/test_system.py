"""macOS and Windows, as far as they can be tried elsewhere: our scripts in a Python that lacks what those systems lack (elsewhere.py)."""

import json
import os
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from PIL import Image
from util import ROOT, TINY, run, start

from nanodiff import system
from nanodiff.config import UserError
from nanodiff.device import choice

PICTURE = (
    "--prompt",
    "a cat",
    "--steps",
    "2",
    "--height",
    "32",
    "--width",
    "32",
    "--seed",
    "1",
    "--guidance-scale",
    "3",
)
TRAIN = ("--data", str(ROOT / "assets" / "emoji" / "emoji.tar"), "--preset", "tiny", "--max-steps", "4", "--batch-size", "4", "--checkpointing-steps", "2",
         "--max-samples", "16", "--num-workers", "1")  # fmt: skip


def elsewhere(other, *argv):
    return run("tests/elsewhere.py", other, *argv, stdin=subprocess.DEVNULL)  # a Python of its own


@pytest.mark.parametrize("other", ["windows", "macos"])
def test_a_picture(tmp_path, other):
    here = run("sample.py", "--model", TINY / "sd15", *PICTURE, "--output-dir", tmp_path / "here")
    there = elsewhere(other, "sample.py", "--model", TINY / "sd15", *PICTURE, "--output-dir", tmp_path / "there")
    assert here.returncode == there.returncode == 0, there.stderr
    a, b = (np.array(Image.open(tmp_path / name / "00000.png")) for name in ("here", "there"))
    assert np.array_equal(a, b)
    assert not (tmp_path / "there" / ".lock").exists()
    assert ("--device mps computes on this machine's GPU" in there.stderr) == (other == "macos")
    facts = json.loads((tmp_path / "there" / "run.json").read_text())
    # the simulated Windows says nothing, and what is counted in bytes on macOS is in kB here
    assert facts["peak_memory_mb"] == 0 if other == "windows" else facts["peak_memory_mb"] < 50


@pytest.mark.parametrize("other", ["windows", "macos"])
def test_a_training_run_that_goes_on(tmp_path, other):
    out = tmp_path / "out"
    first = elsewhere(other, "train.py", "vae", *TRAIN, "--num-workers", "0", "--output-dir", out)
    assert first.returncode == 0, first.stderr
    again = elsewhere(other, "train.py", "vae", *TRAIN, "--max-steps", "6", "--resume", "latest", "--output-dir", out)
    assert again.returncode == 0 and "Traceback" not in again.stderr, again.stderr
    assert json.loads((out / "run.json").read_text())["results"]["steps"] == 6


def test_two_runs_in_one_folder_are_refused_there_too(tmp_path):
    """A lock by another system's call, and its owner named."""
    first = start(
        "tests/elsewhere.py",
        "windows",
        "train.py",
        "vae",
        *TRAIN,
        "--max-steps",
        "100000",
        "--output-dir",
        tmp_path / "out",
    )
    try:
        while not (tmp_path / "out" / ".lock").exists() and first.poll() is None:
            time.sleep(0.1)
        time.sleep(1)
        second = elsewhere("windows", "train.py", "vae", *TRAIN, "--output-dir", tmp_path / "out")
        assert second.returncode == 2 and f"another run is using this folder (process {first.pid} on" in second.stderr
    finally:
        first.kill()
        first.wait()


def test_ctrl_break_saves(monkeypatch):
    assert system.SAVE == signal.SIGUSR1
    monkeypatch.delattr(signal, "SIGUSR1")
    system.ignore("SIGUSR1", "SIGBREAK")  # neither is here: nothing happens


def test_links_where_they_are_not_allowed(tmp_path, monkeypatch):
    def refused(self, *args, **kwargs):
        raise OSError(1314, "not allowed")

    monkeypatch.setattr(type(tmp_path), "symlink_to", refused)
    with pytest.raises(OSError):
        system.symlink(tmp_path / "a", "b")
    monkeypatch.setattr(system, "WINDOWS", True)
    assert system.symlink(tmp_path / "a", "b") is False and not (tmp_path / "a").exists()


def test_memory_is_told():
    assert system.memory() > 1 << 30
    before = system.peak_memory()
    assert 10 << 20 < before < 1 << 40
    if sys.platform == "linux":
        assert system.libc().getpid() == os.getpid()


def test_apples_gpu(monkeypatch, capsys):
    assert choice.pick_device("mps") == torch.device("cpu") and "no GPU of Apple's" in capsys.readouterr().err
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    mps = choice.pick_device("mps")
    assert (
        mps.type == "mps"
        and choice.pick_dtype("auto", mps) == torch.float32
        and choice.pick_precision("auto", mps) is None
    )
    assert choice.pick_dtype("fp16", mps) == torch.float16
    with pytest.raises(UserError, match="CUDA GPU"):
        choice.pick_precision("fp16", mps)
