"""Checkpoints are complete or not there."""

import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from util import ROOT, start

from nanodiff.config import UserError
from nanodiff.training import checkpoint


def save(root, step, keep=None):
    return checkpoint.save(root, step, {"w": torch.full((50,), float(step))}, {"step": step}, keep)


def test_round_trip_and_pruning_after_the_new_one(tmp_path):
    for step in (1, 2, 10):
        save(tmp_path, step, keep=2)
    assert [s for s, _ in checkpoint.found(tmp_path)] == [10, 2]
    folder, facts = checkpoint.load(tmp_path)
    assert facts["step"] == 10 and (checkpoint.read(folder, {})["w"] == 10).all()
    assert (tmp_path / "latest").read_text() == "checkpoint-10\n"


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

    monkeypatch.setattr("nanodiff.system.sync", full)
    with pytest.raises(UserError, match="No space left"):
        save(tmp_path, 2, keep=1)
    assert (
        sorted(os.listdir(tmp_path)) == ["checkpoint-1", "latest"]
        and checkpoint.verify(tmp_path / "checkpoint-1") is None
    )


@pytest.mark.parametrize(
    "delay", [0.0, 0.013, 0.029, 0.047, *(pytest.param(d, marks=pytest.mark.slow) for d in (0.007, 0.021, 0.038))]
)
def test_killed_at_any_moment(tmp_path, delay):
    """SIGKILL while saving in a loop: what is found afterwards is complete."""
    code = (
        "import sys, torch; sys.path.insert(0, '.'); from nanodiff.training import checkpoint\n"
        "for step in range(1, 10000):\n"
        "    checkpoint.save(sys.argv[1], step, {'w': torch.full((200000,), float(step))}, {'step': step}, 2)\n"
        "    print(step, flush=True)"
    )
    child = start("-c", code, tmp_path, stdout=subprocess.PIPE)
    last = int(child.stdout.readline())
    time.sleep(delay)
    child.send_signal(signal.SIGKILL)
    child.communicate()
    folder, facts = checkpoint.load(tmp_path)
    assert facts["step"] >= last and (checkpoint.read(folder, {})["w"] == facts["step"]).all()


def test_pruned_only_after_the_new_one_was_read_back(tmp_path, monkeypatch):
    save(tmp_path, 1, keep=1)
    monkeypatch.setattr(checkpoint, "verify", lambda folder: f"{folder}: damaged")
    with pytest.raises(UserError, match="read back"):
        save(tmp_path, 2, keep=1)
    assert (tmp_path / "checkpoint-1").exists()


def test_mode_follows_the_umask(tmp_path):
    for mask, mode in ((0o022, 0o644), (0o077, 0o600)):
        old = os.umask(mask)
        try:
            folder = save(tmp_path, mask)
        finally:
            os.umask(old)
        assert (folder / checkpoint.STATE).stat().st_mode & 0o777 == mode


def test_file_size_limit_leaves_the_old_one(tmp_path):
    """A full disk, as RLIMIT_FSIZE plays it: one line, exit code 2, the older checkpoint whole, nothing half left."""
    save(tmp_path, 1)
    code = (
        "import resource, sys, torch; sys.path.insert(0, '.'); from nanodiff import commandline; from nanodiff.training import checkpoint\n"
        "import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); resource.setrlimit(resource.RLIMIT_FSIZE, (50000, 50000))\n"
        "sys.exit(commandline.tool(lambda: checkpoint.save(sys.argv[1], 2, {'w': torch.zeros(50000)}, {}, 1)))"
    )
    done = subprocess.run([sys.executable, "-c", code, tmp_path], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and "cannot be written" in done.stderr and "Traceback" not in done.stderr
    assert checkpoint.verify(tmp_path / "checkpoint-1") is None and sorted(os.listdir(tmp_path)) == [
        "checkpoint-1",
        "latest",
    ]


def test_little_space_is_said_before(tmp_path, monkeypatch, capsys):
    save(tmp_path, 1)
    monkeypatch.setattr("shutil.disk_usage", lambda path: type("Usage", (), {"free": 10})())
    save(tmp_path, 2)
    assert "0 MB free" in capsys.readouterr().err


def test_what_was_just_written_is_never_pruned(tmp_path):
    """A run that went back to an older step must not lose its new checkpoint to younger numbers."""
    for step in (2000, 2500):
        save(tmp_path, step)
    save(tmp_path, 200, keep=2)
    assert [s for s, _ in checkpoint.found(tmp_path)] == [2500, 200]
