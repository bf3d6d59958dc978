"""Fewer steps."""

import pytest
import torch

A, S, A1, S1 = 0.3, (1 - 0.09) ** 0.5, 0.8, 0.6


def drawn(seed=13):
    return torch.randn(3, 2, 4, 5, generator=torch.Generator().manual_seed(seed))


def test_jump(mine):
    x0, eps = drawn(), drawn(1)
    torch.testing.assert_close(mine.jump(A * x0 + S * eps, x0, A, S, A1, S1), A1 * x0 + S1 * eps, rtol=1e-4, atol=1e-5)


def test_target(mine):
    x, end = drawn(), drawn(1)
    x0 = mine.target(x, end, A, S, A1, S1)
    eps = (x - A * x0) / S
    torch.testing.assert_close(A1 * x0 + S1 * eps, end, rtol=1e-4, atol=1e-4)


def test_consistency_loss(mine):
    factor = torch.tensor(2.0, requires_grad=True)
    x = drawn()
    loss = mine.consistency_loss(lambda y: factor * y, lambda y: 0.5 * y + 1, x)
    want = (2 * x - 2 * (0.5 * x + 1)).square().mean()
    torch.testing.assert_close(loss.detach(), want)
    loss.backward()
    slope = (2 * (2 * x - 2 * (0.5 * x + 1)) * x).mean()  # of the first answer alone
    assert factor.grad.item() == pytest.approx(slope.item(), rel=1e-4)
