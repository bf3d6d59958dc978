"""What the network predicts."""

import math

import pytest
import torch

D = torch.float64


def drawn():
    g = torch.Generator().manual_seed(2)
    return torch.randn(2, 4, 3, 5, generator=g, dtype=D)


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction", "flow"])
def test_to_x0_eps(mine, kind):
    x0, eps = drawn()
    s = 0.4
    a = 1 - s if kind == "flow" else (1 - s * s) ** 0.5
    p = {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[kind]
    got = mine.to_x0_eps(kind, p, a * x0 + s * eps, a, s)
    torch.testing.assert_close(got[0], x0)
    torch.testing.assert_close(got[1], eps)


def test_another_kind(mine):
    x0, eps = drawn()
    with pytest.raises(ValueError):
        mine.to_x0_eps("colour", x0, eps, 0.8, 0.6)


def test_v_target(mine):
    x0, eps = drawn()
    torch.testing.assert_close(mine.v_target(x0, eps, 0.36), 0.6 * eps - 0.8 * x0)


def test_angle(mine):
    bars = torch.tensor([1.0, 0.75, 0.5, 0.0], dtype=D)
    torch.testing.assert_close(mine.angle(bars), torch.tensor([0, math.pi / 6, math.pi / 4, math.pi / 2], dtype=D))


@pytest.mark.parametrize("kind", ["epsilon", "sample", "v_prediction"])
def test_min_snr_weight(mine, kind):
    bars = torch.linspace(0.02, 0.98, 9, dtype=D)
    a, s = bars.sqrt(), (1 - bars).sqrt()
    snr = (a / s) ** 2
    moved = {"epsilon": s / a, "sample": torch.ones_like(a), "v_prediction": s}[kind]  # of x0, for an error of 1 in p
    torch.testing.assert_close(mine.min_snr_weight(kind, bars, 5.0), snr.clamp(max=5.0) * moved**2)
