"""LoRA."""

import pytest
import torch

D = torch.float64


def drawn(*shape, seed=12):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@pytest.mark.parametrize("alpha", [4.0, 16.0, 1.0])
def test_beside_and_inside(mine, alpha):
    W, A, B, x = drawn(7, 9), drawn(4, 9, seed=1), drawn(7, 4, seed=2), drawn(2, 3, 9, seed=3)
    want = x @ (W + alpha / 4 * B @ A).T
    torch.testing.assert_close(mine.forward(x, W, A, B, alpha), want, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mine.fused(W, A, B, alpha), W + alpha / 4 * B @ A, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("r", [1, 3, 6])
def test_best(mine, r):
    delta = drawn(8, 6)
    A, B = mine.best(delta, r)
    assert A.shape == (r, 6) and B.shape == (8, r)
    missing = torch.linalg.svdvals(delta)[r:].norm()
    torch.testing.assert_close((B @ A - delta).norm(), missing, rtol=1e-4, atol=1e-4)


def test_strength(mine):
    assert mine.strength(8.0, 32.0, 4) == 2 and mine.strength(None, 32.0, 4) == 8 and mine.strength(None, None, 4) == 1
    assert mine.strength(0.5, None, 1) == 0.5 and mine.strength(0.0, 32.0, 4) == 0  # 0 is an alpha
