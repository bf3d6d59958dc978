"""Learning rates, averaged weights, stopping."""

import math

import pytest
import torch
from torch import nn

from nanodiff import recipe


def lr(step, kind, **more):
    return recipe.learning_rate(step, 1.0, 110, 10, kind, **more)


def test_warm_up_and_ends():
    for kind in recipe.LR_SCHEDULERS:
        assert lr(0, kind, first=50) == 0.1 and lr(9, kind, first=50) == 1.0 and lr(10, kind, first=50) == 1.0
    assert lr(109, "constant") == lr(109, "none") == lr(109, "plateau") == 1.0
    assert recipe.learning_rate(9, 1.0, 100, 0.1, "linear") == 1.0, "below 1: a share of the run"
    assert recipe.learning_rate(0, 1.0, 100, 0, "linear") == 1.0


def test_shapes_of_the_schedules():
    """Closed forms, as PyTorch's and diffusers' schedulers of the same names have them."""
    assert lr(60, "cosine") == pytest.approx(0.5) and lr(110, "cosine") == pytest.approx(0)
    assert lr(60, "linear") == 0.5 and lr(60, "linear", low=0.2) == pytest.approx(0.6)
    assert lr(60, "polynomial", power=2.0) == 0.25
    assert (
        lr(35, "cosine_with_restarts", cycles=2) == pytest.approx(0.5)
        and lr(60, "cosine_with_restarts", cycles=2) == 1.0
    )
    torch_lr = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), T_0=7, T_mult=2, eta_min=0.1
    )
    for step in range(60):
        want = torch_lr.get_last_lr()[0]
        assert recipe.learning_rate(step, 1.0, 60, 0, "cosine_warm_restarts", low=0.1, first=7) == pytest.approx(want)
        torch_lr.optimizer.step()
        torch_lr.step()


def test_ema_decay_warms_up_and_restores():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = recipe.EMA(net, decay=0.9)
    net.weight.data.fill_(1.0)
    ema.update(net, 0)
    assert ema.shadow["weight"].item() == 1.0, "decay 0 at the first update"
    net.weight.data.fill_(2.0)
    ema.update(net, 10**6)
    assert ema.shadow["weight"].item() == pytest.approx(1.1)
    with ema.applied(net):
        assert net.weight.item() == pytest.approx(1.1)
    assert net.weight.item() == 2.0


def test_ema_warm_up_is_diffusers():
    """1 - (1 + step / inv_gamma)^-power, recorded from EMAModel.get_decay of diffusers 0.42.1 (whose step counts from 1)."""
    ema = recipe.EMA(nn.Linear(1, 1), 0.9999, inv_gamma=1.0, power=0.75)
    for step, want in ((1, 0.4053964425), (10, 0.8344399739238298), (1000, 0.9943808006210502), (10**7, 0.9999)):
        assert ema.at(step) == pytest.approx(want, rel=1e-8)
    assert recipe.EMA(nn.Linear(1, 1), 0.9999, 20.0, 0.5).at(60) == pytest.approx(1 - 1 / math.sqrt(4))


def test_ema_keeps_to_what_is_trained():
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    assert set(recipe.EMA(net).shadow) == {"1.weight", "1.bias"}


def test_oscillation_stop():
    """S2-21: the standard deviation of the window below the threshold, and the last one near the mean."""
    stopper = recipe.Stopper(window=4, threshold=0.01)
    assert [stopper.epoch(x) for x in (1.0, 0.5, 0.501, 0.499)] == [None] * 4
    assert "oscillation stop: over 4 epochs" in stopper.epoch(0.5)
    moving = recipe.Stopper(window=4, threshold=0.01)
    assert all(moving.epoch(1 - 0.02 * i) is None for i in range(20))


def test_early_stopping_counts_only_real_progress():
    stopper = recipe.Stopper(patience=3, delta=0.1)
    assert [stopper.epoch(x) for x in (1.0, 0.95, 0.92, 0.85, 0.84, 0.83)] == [None] * 6
    assert "early stopping: 3 epochs" in stopper.epoch(0.80)
    assert recipe.Stopper().epoch(1.0) is None
