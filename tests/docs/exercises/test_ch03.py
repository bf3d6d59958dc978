"""Samplers."""

import math

import pytest
import torch

D = torch.float64


def drawn(n=2):
    g = torch.Generator().manual_seed(3)
    return torch.randn(n, 4, 3, generator=g, dtype=D)


def test_ddim_step(mine):
    x0, eps = drawn()
    torch.testing.assert_close(mine.ddim_step(x0, eps, 0.64), 0.8 * x0 + 0.6 * eps)


def error(solver, n):
    """Of a solver on dx/dσ = x σ / (1 + σ²), whose solution is x = c √(1 + σ²), over n steps from 5 to 0.02 and one to 0."""
    sigmas = [*(5 * (0.02 / 5) ** (i / n) for i in range(n + 1)), 0.0]
    x = torch.tensor([2.0, -1.0], dtype=D)
    end = solver(lambda x, sigma: x * sigma / (1 + sigma**2), x, sigmas)
    return (end - x / math.sqrt(26)).abs().max().item()


@pytest.mark.parametrize(("name", "order", "tolerance"), [("euler", 1, 0.2), ("heun", 2, 0.35)])
def test_solvers(mine, name, order, tolerance):
    solver = getattr(mine, name)
    few, many = error(solver, 16), error(solver, 32)
    assert many < few < 0.3
    assert math.log2(few / many) == pytest.approx(order, abs=tolerance)


@pytest.mark.parametrize(("name", "times"), [("euler", [3.0, 1.0]), ("heun", [3.0, 1.0, 1.0])])
def test_where_the_slope_is_asked(mine, name, times):
    """At every σ but 0: the last step, to 0, is Euler's for both."""
    asked = []

    def slope(x, sigma):
        asked.append(round(sigma, 9))
        return x / (sigma + 1)

    end = getattr(mine, name)(slope, torch.ones(2, dtype=D), [3.0, 1.0, 0.0])
    assert asked == times
    at_1 = 1 - 2 * (1 / 4 if name == "euler" else (1 / 4 + (1 - 2 / 4) / 2) / 2)
    torch.testing.assert_close(end, torch.full((2,), at_1 - at_1 / 2, dtype=D))


def test_ddpm_step(mine):
    x, x0, z = drawn(3)
    bar, after = 0.3, 0.6
    alpha = bar / after
    mean = (after**0.5 * (1 - alpha) * x0 + alpha**0.5 * (1 - after) * x) / (1 - bar)
    spread = ((1 - alpha) * (1 - after) / (1 - bar)) ** 0.5
    torch.testing.assert_close(mine.ddpm_step(x, x0, bar, after, z), mean + spread * z)
    # the true x0 known, it leads from q(x_t | x0) to q(x_t-1 | x0): mean √ᾱ' x0, variance 1 - ᾱ'
    g = torch.Generator().manual_seed(4)
    noise, z = torch.randn(2, 200_000, generator=g, dtype=D)
    one = torch.full_like(z, 0.7)
    moved = mine.ddpm_step(bar**0.5 * one + (1 - bar) ** 0.5 * noise, one, bar, after, z)
    assert moved.mean().item() == pytest.approx(after**0.5 * 0.7, abs=0.01) and moved.var().item() == pytest.approx(
        1 - after, rel=0.02
    )
