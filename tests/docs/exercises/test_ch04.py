"""Guidance."""

import pytest
import torch

D = torch.float64


def drawn(n=2):
    g = torch.Generator().manual_seed(4)
    return torch.randn(n, 2, 3, 4, 5, generator=g, dtype=D)


@pytest.mark.parametrize("scale", [0.0, 1.0, 7.5])
def test_guided(mine, scale):
    without, told = drawn().float()
    torch.testing.assert_close(
        mine.guided(without, told, scale), (1 - scale) * without + scale * told, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("part", [0.3, 1.0])
def test_rescaled(mine, part):
    out, told = drawn().float()
    out = 3 * out
    got = mine.rescaled(out, told, part)
    for row, before, like in zip(got, out, told, strict=True):
        factor = part * like.std() / before.std() + 1 - part
        torch.testing.assert_close(row, factor * before, rtol=1e-5, atol=1e-5)


def test_guided_bell(mine):
    x = torch.linspace(-3, 3, 7, dtype=D)
    means, width, sigma = torch.tensor([-1.0, 0.5, 2.0], dtype=D), 0.4, 0.8
    # by summing over a fine grid of x0, no formula
    x0 = torch.linspace(-8, 8, 40001, dtype=D)
    bells = (-((x0 - means[:, None]) ** 2) / (2 * width**2)).exp()  # [K, grid]
    seen = (-((x[:, None] - x0) ** 2) / (2 * sigma**2)).exp()  # [N, grid]
    guess = lambda density: (seen * density * x0).sum(1) / (seen * density).sum(1)  # noqa: E731
    for scale in (0.0, 1.0, 4.0):
        want = guess(bells.sum(0)) + scale * (guess(bells[1]) - guess(bells.sum(0)))
        torch.testing.assert_close(mine.guided_bell(x, sigma, means, width, 1, scale), want, rtol=1e-6, atol=1e-6)
