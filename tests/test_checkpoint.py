"""Checkpoints are complete or not there."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from util import ROOT

from nanodiff import checkpoint
from nanodiff.config import UserError


def save(root, step, keep=None):
    return checkpoint.save(root, step, {"w": torch.full((50,), float(step))}, {"step": step}, keep)


def test_round_trip_and_pruning_after_the_new_one(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert [s for s, _ in checkpoint.found(tmp_path)] == [10, 2]
    tensors, facts = checkpoint.load(tmp_path)
    assert facts["step"] == 10 and (tensors["w"] == 10).all()


def test_other_names_are_ignored(tmp_path):
    save(tmp_path, 3)
    for name in ("checkpoint-abc", "checkpoint-10-old", "checkpoint-99.tmp-1"):
        (tmp_path / name).mkdir()
    assert [s for s, _ in checkpoint.found(tmp_path)] == [3]


@pytest.mark.parametrize("fault", ["cut", "flip", "gone", "manifest"])
def test_a_damaged_checkpoint_is_stepped_over_loudly(tmp_path, fault, capsys):
    save(tmp_path, 1)
    broken = save(tmp_path, 2)
    state = broken / "state.safetensors"
    data = bytearray(state.read_bytes())
    if fault == "cut":
        state.write_bytes(data[:-1])
    elif fault == "flip":
        data[-1] ^= 1
        state.write_bytes(data)
    elif fault == "gone":
        state.unlink()
    else:
        (broken / checkpoint.MANIFEST).write_text("{")
    assert checkpoint.load(tmp_path)[1]["step"] == 1
    assert "checkpoint-2" in capsys.readouterr().err
    with pytest.raises(UserError, match="checkpoint-2"):
        checkpoint.load(tmp_path, str(broken))


def test_none_and_missing(tmp_path):
    assert checkpoint.load(tmp_path) is None
    with pytest.raises(UserError, match="no such checkpoint"):
        checkpoint.load(tmp_path, str(tmp_path / "checkpoint-7"))


def test_a_failed_save_keeps_the_last_good_one(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)

    def full(*args):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("nanodiff.checkpoint._fsync", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert os.listdir(tmp_path) == ["checkpoint-1"] and checkpoint.verify(tmp_path / "checkpoint-1") is None


def test_killed_at_any_moment(tmp_path):
    """SIGKILL while saving in a loop: what is found afterwards is complete."""
    code = (
        "import sys, torch; sys.path.insert(0, '.'); from nanodiff import checkpoint\n"
        "for step in range(1, 10000):\n"
        "    checkpoint.save(sys.argv[1], step, {'w': torch.full((200000,), float(step))}, {'step': step}, 2)\n"
        "    print(step, flush=True)"
    )
    for delay in (0.0, 0.013, 0.029, 0.047):
        child = subprocess.Popen([sys.executable, "-c", code, tmp_path], cwd=ROOT, stdout=subprocess.PIPE, text=True)
        last = int(child.stdout.readline())
        time.sleep(delay)
        child.send_signal(signal.SIGKILL)
        child.wait()
        tensors, facts = checkpoint.load(tmp_path)
        assert facts["step"] >= last and (tensors["w"] == facts["step"]).all()
        child.stdout.close()
        for _, folder in checkpoint.found(tmp_path):
            __import__("shutil").rmtree(folder)
