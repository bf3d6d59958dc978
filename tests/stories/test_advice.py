"""S2-31: what a training run says of its own numbers."""

import json
from types import SimpleNamespace

import numpy as np
import pytest

from nanodiff.stories import training, vae


def run_of(tmp_path, losses, numbers=None):
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps({"loss": float(x)}) + "\n" for x in losses))
    return SimpleNamespace(out=tmp_path, step=len(losses), numbers=numbers)


@pytest.mark.parametrize(("slope", "said"), [(0.0, True), (0.002, True), (-0.002, False)])
def test_a_loss_that_does_not_fall(tmp_path, capsys, slope, said):
    """By more than its noise, of whose size a diffusion loss has much."""
    noise = np.random.default_rng(0).normal(0, 0.05, 400)
    training.advice_loss(run_of(tmp_path, 1 + slope * np.arange(400) + noise))
    out = capsys.readouterr()
    assert ("the loss is not decreasing" in out.out + out.err) == said


def test_a_short_run_is_not_judged(tmp_path, capsys):
    training.advice_loss(run_of(tmp_path, np.ones(99)))
    out = capsys.readouterr()
    assert "not decreasing" not in out.out + out.err


@pytest.mark.parametrize(
    ("kl", "words"),
    [(5.0, ("is too low", "lower --kl-weight")), (90.0, ("is too high", "raise --kl-weight")), (20.0, ()), (49.0, ())],
)
def test_a_kl_far_from_its_target(tmp_path, capsys, kl, words):
    """The document's target is 25 nats; within a factor of two nothing is said. A smaller weight lets the KL grow."""
    cfg = SimpleNamespace(kl_target=25.0, kl_weight=1e-3, model=None)
    vae.advice_vae(run_of(tmp_path, [1.0], {"kl": kl}), cfg)
    out = capsys.readouterr()
    text = out.out + out.err
    assert all(w in text for w in words) and bool(words) == ("for --kl-target 25" in text)
