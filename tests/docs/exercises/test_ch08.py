"""The VAE."""

import pytest
import torch

D = torch.float64


def drawn(*shape, seed=8):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_kl(mine):
    mean, logvar = drawn(3, 4, 2, 5), drawn(3, 4, 2, 5, seed=1)
    normal = torch.distributions.Normal
    want = (
        torch.distributions.kl_divergence(normal(mean, (logvar / 2).exp()), normal(torch.zeros_like(mean), 1.0))
        .flatten(1)
        .sum(1)
    )
    torch.testing.assert_close(mine.kl(mean, logvar), want)
    assert (mine.kl(torch.zeros(2, 1, 1, 1), torch.zeros(2, 1, 1, 1)) == 0).all()


def test_sample(mine):
    mean, logvar = drawn(2, 1, 1, 1).expand(2, 4, 50, 50).contiguous(), torch.full((2, 4, 50, 50), -1.5, dtype=D)
    mean.requires_grad_(), logvar.requires_grad_()
    noise = drawn(2, 4, 50, 50, seed=2)
    z = mine.sample(mean, logvar, noise)
    torch.testing.assert_close(z, mean + 0.4723665527410147 * noise)
    z.sum().backward()
    assert (mean.grad == 1).all() and logvar.grad.abs().sum() > 0


@pytest.mark.parametrize("shift", [0.0, 0.0609])
def test_scale_and_shift(mine, shift):
    z = 5.5 * drawn(2, 4, 8, 8) + shift
    latents = mine.to_latents(z, 1 / 5.5, shift)
    assert latents.std().item() == pytest.approx(1, abs=0.1) and latents.mean().item() == pytest.approx(0, abs=0.1)
    torch.testing.assert_close(latents, (z - shift) / 5.5)
    torch.testing.assert_close(mine.to_z(latents, 1 / 5.5, shift), z)


def test_measured_scale(mine):
    parts = [3 * drawn(2, 4, 6, 6) + 1, 3 * drawn(1, 4, 9, 3, seed=1), 5 * drawn(7, 4, 2, 2, seed=2)]
    whole = torch.cat([p.flatten() for p in parts])
    assert float(mine.measured_scale(parts)) == pytest.approx(1 / whole.std().item(), rel=2e-3)
