"""Learning from pairs of right and wrong pictures: what a pair is, who gains, what stays as it was."""

import copy
import json

import numpy as np
import pytest
import torch
from util import error_line, run

from assets.world import prefer, reader, scenes
from nanodiff import pipeline
from nanodiff.config import UserError
from nanodiff.output import images


@pytest.fixture(scope="module")
def world():
    return pipeline.load("assets/world")


@pytest.fixture(scope="module")
def found(world):
    """Few steps, so that many are wrong."""
    return prefer.pairs(world, {"count": 12, "one": 2}, first=7, steps=4)


def test_a_pair_is_right_and_wrong_of_one_caption(world, found):
    right, wrong, captions, counted = found
    told = {}
    for i, task in enumerate(["count"] * 12 + ["one"] * 2):
        scene = scenes.random_scene(np.random.default_rng((prefer.SEED, 7 + i)), task, False)
        told[scene.caption] = scene.told
    assert len(right) == len(wrong) == len(captions) == sum(c["pairs"] for c in counted.values()) > 0
    assert {task: c["captions"] for task, c in counted.items()} == {"count": 12, "one": 2}
    for good, bad, caption in zip(right, wrong, captions, strict=True):
        for latent, is_right in ((good, True), (bad, False)):
            (picture,) = images.to_pil(world.decode(latent[None]))
            assert (reader.true_of(reader.read(np.asarray(picture)), told[caption]) is None) == is_right
    assert prefer.sheet(world, right, wrong, captions).width > 500


def test_captions_are_none_of_the_scores():
    """Nor held out: the score is of other scenes than those that were learned from."""
    from assets.world import score

    some = [scenes.random_scene(np.random.default_rng((prefer.SEED, i)), "count", False) for i in range(50)]
    assert not any(scenes.held_out().why(s.things) for s in some)
    assert prefer.SEED != score.SEED


def test_the_right_one_gains(world, found):
    """On the wrong one, and by itself; the text encoder stays, and beta holds it back."""
    right, wrong, captions, _ = found
    ids, moved = torch.tensor(world.tokenizer(captions)), {}
    for beta, hold in ((30.0, 0.5), (30.0, 0.0), (0.0, 0.0)):
        sd = copy.deepcopy(world)
        text = copy.deepcopy(sd.text_encoder.state_dict())
        loss, _ = prefer.learn(sd, right, wrong, ids, 12, 8, 3e-4, beta, hold)
        assert np.isfinite(loss) and all(torch.equal(v, text[k]) for k, v in sd.text_encoder.state_dict().items())
        assert not any(p.requires_grad for p in sd.net.parameters())
        t, noise = torch.full((len(ids),), 700.0), torch.randn(right.shape, generator=torch.Generator().manual_seed(1))
        with torch.no_grad():
            gain = [
                (prefer.errors(world, world.net, x, noise, t, prefer.read(world, ids))
                 - prefer.errors(sd, sd.net, x, noise, t, prefer.read(sd, ids))).mean().item()
                for x in (right, wrong)
            ]  # fmt: skip
        moved[beta, hold] = gain
    assert moved[30.0, 0.5][0] > moved[30.0, 0.5][1], moved
    assert moved[30.0, 0.0][0] > moved[30.0, 0.0][1] and moved[30.0, 0.5][0] > moved[30.0, 0.0][0], moved
    assert moved[0.0, 0.0] == pytest.approx([0, 0], abs=1e-7), "no preference, no change"


def test_the_command(tmp_path, world):
    # in three steps most is wrong
    world.save(tmp_path / "poor")
    index = json.loads((tmp_path / "poor" / "model_index.json").read_text())
    index[pipeline.SAMPLING]["steps"] = 3
    (tmp_path / "poor" / "model_index.json").write_text(json.dumps(index))
    argv = (
        "-m",
        "assets.world.prefer",
        "--model",
        tmp_path / "poor",
        "--captions",
        24,
        "--rounds",
        2,
        "--updates",
        1,
        "--batch-size",
        2,
    )
    done = run(*argv, "--output-dir", tmp_path / "out")
    assert done.returncode == 0 and "world-score MODEL=" in done.stdout, done.stderr
    made = pipeline.load(tmp_path / "out" / "model")
    gone = [(a - b).abs().max().item() for a, b in zip(made.net.parameters(), world.net.parameters(), strict=True)]
    assert 0 < max(gone) < 0.01
    first, second = json.loads((tmp_path / "out" / "rounds.json").read_text())
    assert first["drawn"]["count"]["captions"] == second["drawn"]["count"]["captions"] == 8
    assert (tmp_path / "out" / "pairs-1.png").is_file() and (tmp_path / "out" / "pairs-2.png").is_file()


def test_refused(tmp_path, world, monkeypatch):
    monkeypatch.setattr(reader, "true_of", lambda read, told: None)
    with pytest.raises(UserError, match="of 1 captions none was drawn right once and wrong once"):
        prefer.pairs(world, {"one": 1}, steps=1)
    line = error_line(run("-m", "assets.world.prefer", "--model", "assets/nano", "--output-dir", tmp_path / "a"))
    assert "is no model of the small world" in line
    line = error_line(run("-m", "assets.world.prefer", "--output-dir", "assets/world"))
    assert "--model" in line
