"""Noise and its schedule."""

import pytest
import torch

D = torch.float64


def test_add_noise(mine):
    g = torch.Generator().manual_seed(1)
    x0, noise = torch.randn(2, 3, 3, 5, 7, generator=g, dtype=D)
    alpha_bar = torch.tensor([1.0, 0.3, 0.0], dtype=D)
    x = mine.add_noise(x0, noise, alpha_bar)
    torch.testing.assert_close(x[0], x0[0])
    torch.testing.assert_close(x[1], 0.3**0.5 * x0[1] + 0.7**0.5 * noise[1])
    torch.testing.assert_close(x[2], noise[2])
    wide = torch.randn(2, 1, 1, 300, 300, generator=g, dtype=D)
    assert mine.add_noise(wide[0], wide[1], torch.tensor([0.6], dtype=D)).var().item() == pytest.approx(1, abs=0.02)


def test_scaled_linear(mine):
    bars = mine.scaled_linear(1000, 0.00085, 0.012)
    assert bars.shape == (1000,) and (bars[1:] < bars[:-1]).all()
    assert bars[0].item() == pytest.approx(1 - 0.00085, abs=1e-6)
    assert bars[-1].item() == pytest.approx(0.00466, abs=2e-5)
    few = mine.scaled_linear(3, 0.04, 0.16)  # √β: 0.2, 0.3, 0.4
    torch.testing.assert_close(
        few.double(), torch.tensor([0.96, 0.96 * 0.91, 0.96 * 0.91 * 0.84], dtype=D), rtol=1e-6, atol=0
    )


def test_zero_terminal_snr(mine):
    before = torch.linspace(0.95, 0.1, 12, dtype=D)
    after = mine.zero_terminal_snr(before)
    assert after[-1].item() == pytest.approx(0, abs=1e-12) and after[0].item() == pytest.approx(0.95)
    root, new = before.sqrt(), after.clamp(min=0).sqrt()
    ratio = (new[1:] - new[:-1]) / (root[1:] - root[:-1])
    torch.testing.assert_close(ratio, ratio[:1].expand_as(ratio))  # shifted and stretched, no more
