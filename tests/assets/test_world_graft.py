"""A text encoder in another network: what is fitted, what stays the same, and that it learns."""

import copy

import pytest
import torch
from util import TINY, error_line, max_error, rms_ratio, run

from assets.world import graft, make
from nanodiff import pipeline


@pytest.fixture(scope="module")
def world():
    return pipeline.load("assets/world")


CAPTIONS = [
    "a red heart",
    "a small blue star above a large red heart",
    "three yellow moons",
    "a red heart below a blue star",
] * 16


def test_a_layer_says_what_it_said():
    """What is read is turned and moved: nothing is lost, so nothing changes."""
    torch.manual_seed(0)
    old = torch.randn(500, 12)
    new = old @ torch.linalg.qr(torch.randn(12, 12))[0] * 3 + torch.randn(12)
    layer = torch.nn.Linear(12, 7)
    before = layer(old).detach()
    assert graft.fit(layer, new, layer(old)) < 1e-3
    assert max_error(layer(new), before) < 0.02


def test_what_is_not_there_is_left():
    torch.manual_seed(0)
    old = torch.randn(800, 6)
    layer = torch.nn.Linear(6, 4, bias=False)
    layer.bias = torch.nn.Parameter(torch.zeros(4))
    left = graft.fit(layer, torch.randn(800, 6), layer(old))
    assert 0.9 < left < 1.1


def test_its_own_encoder_changes_nearly_nothing(world):
    sd, ids = copy.deepcopy(world), torch.tensor(world.tokenizer(CAPTIONS))
    x, t = torch.randn(len(ids), 4, 16, 16), torch.rand(len(ids)) * 1000
    with torch.no_grad():
        plain = world.denoise(world.net, x, t, *graft.read(world, ids))
    assert max(graft.graft(sd, world, ids)) < 0.05
    assert sd.text_encoder is not world.text_encoder
    with torch.no_grad():  # of a run guidance and twenty steps would make more
        off = rms_ratio(sd.denoise(sd.net, x, t, *graft.read(sd, ids)), plain)
        other = rms_ratio(world.denoise(world.net, x, t, *graft.read(world, ids.roll(1, 0))), plain)
    assert off < 2e-3 < 0.1 < other


def test_it_learns_what_the_teacher_says(world):
    sd, ids = copy.deepcopy(world), torch.tensor(world.tokenizer(CAPTIONS))
    with torch.no_grad():
        sd.net.proj_out.weight.mul_(0.5)
    latents = torch.randn(len(ids), 4, 16, 16, generator=torch.Generator().manual_seed(0))
    first = graft.learn(copy.deepcopy(sd), world, latents, ids, 1, 8, 1e-3)
    last = graft.learn(sd, world, latents, ids, 13, 8, 8e-3)
    assert last < 0.9 * first
    assert not sd.net.training and not any(p.requires_grad for p in sd.net.parameters())


def test_the_command(tmp_path):
    make.write(tmp_path / "s.tar", 8, 1, "relation")
    argv = (
        "-m",
        "assets.world.graft",
        "--model",
        "assets/world",
        "--data",
        tmp_path / "s.tar",
        "--updates",
        "1",
        "--batch-size",
        "4",
    )
    done = run(*argv, "--teacher", "assets/world", "--output-dir", tmp_path / "out")
    assert done.returncode == 0 and "refitted: " in done.stdout, done.stderr
    pipeline.load(tmp_path / "out")
    other = run(*argv, "--teacher", TINY / "sd15", "--output-dir", tmp_path / "other")
    assert "have different tokenizers" in error_line(other)


def test_half_the_depth_keeps_every_other_block_and_both_ends(tmp_path, monkeypatch):
    from assets.world import halve

    monkeypatch.setattr("sys.argv", ["halve", "--output-dir", str(tmp_path)])
    assert halve.main() == 0
    whole, half = pipeline.load("assets/world"), pipeline.load(tmp_path)
    assert half.net.cfg.num_layers == 3 and whole.net.cfg.num_layers == 6
    mine, theirs = half.net.state_dict(), whole.net.state_dict()
    for k, i in enumerate((0, 2, 5)):
        names = [n for n in mine if n.startswith(f"transformer_blocks.{k}.")]
        assert names and all(torch.equal(mine[n], theirs[n.replace(f".{k}.", f".{i}.", 1)]) for n in names)
    assert all(torch.equal(v, theirs[n]) for n, v in mine.items() if not n.startswith("transformer_blocks."))
    assert half.schedule.to_json() == whole.schedule.to_json()
    assert half.generate("a red star", seeds=[0], steps=1).pixels.shape == (1, 3, 64, 64)
    monkeypatch.setattr("sys.argv", ["halve", "--model", "assets/nano", "--output-dir", str(tmp_path / "nano")])
    assert halve.main() == 2 and not (tmp_path / "nano").exists(), "a UNet has none"
    half.net = halve.halved(half.net)
    half.save(tmp_path / "two")
    monkeypatch.setattr("sys.argv", ["halve", "--model", str(tmp_path / "two"), "--output-dir", str(tmp_path / "one")])
    assert halve.main() == 2 and not (tmp_path / "one").exists(), "both ends are all there is"
