"""GroupNorm."""

import pytest
import torch

from kernels import switch

D = torch.float64
interpreted = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter")
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}  # of 32 bits, in which the project's kernels compute


def drawn(*shape, seed=7):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


@pytest.mark.parametrize("groups", [1, 3, 6])
def test_group_norm(mine, groups):
    x, weight, bias = 3 * drawn(2, 6, 5, 4) + 10, drawn(6, seed=1), drawn(6, seed=2)
    want = torch.nn.functional.group_norm(x, groups, weight, bias, 1e-5)
    torch.testing.assert_close(mine.group_norm(x, groups, weight, bias, 1e-5), want)


def test_group_norm_far_from_zero(mine):
    """Where the digits of E[u²] - E[u]² are gone."""
    x, ones = drawn(2, 6, 5, 4) + 1e6, torch.ones(6, dtype=D)
    rows = x.reshape(2, 3, -1)
    away = rows - rows.mean(2, keepdim=True)
    want = away * (away.pow(2).mean(2, keepdim=True) + 1e-5).rsqrt()
    torch.testing.assert_close(mine.group_norm(x, 3, ones, 0 * ones, 1e-5), want.view(x.shape))


def test_joined(mine):
    x = drawn(60) + 1e6
    parts = x.split([7, 1, 30, 22])
    counts = torch.tensor([len(p) for p in parts], dtype=D)
    means = torch.stack([p.mean() for p in parts])
    m2s = torch.stack([((p - p.mean()) ** 2).sum() for p in parts])
    mean, m2 = mine.joined(counts, means, m2s)
    torch.testing.assert_close(mean, x.mean())
    torch.testing.assert_close(m2, ((x - x.mean()) ** 2).sum(), rtol=1e-7, atol=0)


@interpreted
@pytest.mark.parametrize("eps", [1e-6, 0.3])
def test_backward(mine, eps):
    x, weight, bias = (drawn(40, seed=s).requires_grad_() for s in (3, 4, 5))
    dz = drawn(40, seed=6)
    mean = x.mean()
    z = weight * (x - mean) * ((x - mean).pow(2).mean() + eps).rsqrt() + bias
    want = torch.autograd.grad(z, (x, weight, bias), dz)
    for got, right in zip(mine.backward(x.detach(), weight.detach(), dz, eps), want, strict=True):
        torch.testing.assert_close(got, right, **ROUNDED)


@interpreted
@pytest.mark.parametrize("shape", [(1, 2), (3, 64), (4, 100)])
def test_rows_kernel(mine, shape):
    x = 2 * drawn(*shape).float() + 5
    want = torch.nn.functional.layer_norm(x, shape[1:], eps=1e-3)
    torch.testing.assert_close(mine.rows_kernel(x, 1e-3), want, **ROUNDED)


@interpreted
def test_rows_kernel_far_from_zero(mine):
    """In 32 bits a mean of 1000 is known to 1e-4, and E[u²] - E[u]² to a tenth."""
    x = drawn(3, 64).float() + 1000
    want = torch.nn.functional.layer_norm(x.double(), (64,), eps=1e-3).float()
    torch.testing.assert_close(mine.rows_kernel(x, 1e-3), want, rtol=1e-3, atol=1e-3)
