"""Flow matching."""

import pytest
import torch

D = torch.float64
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}  # the project counts times in 32 bits


def drawn(*shape, seed=11):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_mix_and_velocity(mine):
    x0, noise = drawn(2, 3, 4, 5), drawn(2, 3, 4, 5, seed=1)
    sigma = torch.tensor([0.25, 1.0], dtype=D)
    x = mine.mix(x0, noise, sigma)
    torch.testing.assert_close(x[0], 0.75 * x0[0] + 0.25 * noise[0])
    torch.testing.assert_close(x[1], noise[1])
    h = 1e-2
    slope = (mine.mix(x0, noise, sigma - h) - x) / -h
    torch.testing.assert_close(mine.velocity(x0, noise), slope, **ROUNDED)


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_shifted(mine, shift):
    sigma = torch.linspace(0.05, 1, 20, dtype=D)
    moved = mine.shifted(sigma, shift)
    inside = sigma < 1
    torch.testing.assert_close((moved / (1 - moved))[inside], shift * (sigma / (1 - sigma))[inside], **ROUNDED)
    assert moved[-1].item() == pytest.approx(1)
    torch.testing.assert_close(mine.unshifted(moved, shift), sigma, **ROUNDED)


@pytest.mark.parametrize(("mean", "std"), [(0.0, 1.0), (0.5, 0.7)])
def test_logit_normal_density(mine, mean, std):
    sigma = torch.linspace(0.0005, 0.9995, 1000, dtype=D)
    density = mine.logit_normal_density(sigma, mean, std)
    assert (density.sum() * 0.001).item() == pytest.approx(1, abs=2e-3)
    times = (mean + std * drawn(400_000, seed=3)).sigmoid()
    for low, high in ((0.2, 0.3), (0.5, 0.6), (0.8, 0.9)):
        share = ((times > low) & (times < high)).double().mean().item()
        assert (density[(sigma > low) & (sigma < high)].sum() * 0.001).item() == pytest.approx(share, abs=4e-3)
