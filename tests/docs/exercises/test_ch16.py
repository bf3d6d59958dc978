"""Systems."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from util import ROOT


@pytest.mark.parametrize("at", ["fsync", "replace"])
def test_write_whole(mine, tmp_path, monkeypatch, at):
    path = tmp_path / "a.bin"
    mine.write_whole(path, b"old")
    assert path.read_bytes() == b"old"

    written, real_sync = [], os.fsync

    def synced(fd):
        written.append(os.fstat(fd).st_size)
        real_sync(fd)

    with monkeypatch.context() as m:
        m.setattr(os, "fsync", synced)
        mine.write_whole(path, b"old")
    assert written and written[0] == 3, "flush before fsync: what Python holds back is not brought to the disk"

    def broken(*args):
        raise OSError(5, "the disk")

    with monkeypatch.context() as m:
        m.setattr(os, at, broken)
        with pytest.raises(Exception, match="the disk"):
            mine.write_whole(path, b"new")
    assert path.read_bytes() == b"old" and os.listdir(tmp_path) == ["a.bin"]
    seen = []
    real = os.replace
    monkeypatch.setattr(
        os, "replace", lambda a, b: (seen.append((Path(a).read_bytes(), path.read_bytes())), real(a, b))
    )
    mine.write_whole(path, b"new")
    assert path.read_bytes() == b"new" and seen == [(b"new", b"old")]


def test_noise(mine):
    one = mine.noise(3, [0, 1, 2, 3], (2, 5))
    assert one.shape == (4, 2, 5) and not torch.equal(one[0], one[1])
    torch.testing.assert_close(
        torch.cat([mine.noise(3, [0, 1], (2, 5)), mine.noise(3, [2, 3], (2, 5))]), one, rtol=0, atol=0
    )
    torch.testing.assert_close(mine.noise(3, [2], (2, 5))[0], one[2], rtol=0, atol=0)
    assert not torch.equal(mine.noise(4, [0], (2, 5))[0], one[0])
    assert not torch.equal(mine.noise(4, [0], (2, 5))[0], one[1])  # seed and index are two things, not their sum
    many = mine.noise(0, range(2000), (8,))
    assert many.mean().item() == pytest.approx(0, abs=0.03) and many.std().item() == pytest.approx(1, abs=0.03)


def test_noise_is_the_same_in_another_process(mine):
    code = (
        "import sys; from pathlib import Path; exec(Path(sys.argv[1]).read_text()); print(noise(3, [5], (1,)).item())"
    )
    path = getattr(mine, "__file__", ROOT / "docs/book/solutions.py")

    def run(h):
        env = os.environ | {"PYTHONHASHSEED": h}
        return subprocess.run([sys.executable, "-c", code, path], capture_output=True, text=True, env=env)

    done = [run(h) for h in "12"]
    assert not any(d.returncode for d in done), done[0].stderr
    said = [d.stdout for d in done]
    assert said[0] == said[1] and float(said[0]) == mine.noise(3, [5], (1,)).item()


@pytest.mark.parametrize(("n", "processes"), [(8, 2), (10, 4), (3, 4), (7, 1)])
def test_shares(mine, n, processes):
    got = mine.shares(n, processes)
    size = -(-n // processes)
    assert len(got) == processes and [i for first, count, _ in got for i in range(first, first + count)] == list(
        range(n)
    )
    assert all(count <= size for _, count, _ in got)
    x = torch.randn(n)
    total = sum(weight * x[first : first + count].mean().item() for first, count, weight in got if count)
    assert total == pytest.approx(x.mean().item(), abs=1e-6)
    assert all(weight == 0 for _, count, weight in got if not count)
