"""SDXL."""

import pytest
import torch


def test_sizes(mine):
    assert list(mine.sizes((768, 1024), (8, 16), (512, 640))) == [768, 1024, 8, 16, 512, 640]


def test_added(mine):
    def embed(t):
        return torch.stack([t.float(), 10 * t.float()], 1)

    pooled = torch.randn(2, 5)
    six = torch.tensor([[1, 2, 3, 4, 5, 6], [7, 8, 9, 10, 11, 12]])
    got = mine.added(pooled, six, embed)
    assert got.shape == (2, 17)
    torch.testing.assert_close(got[:, :5], pooled)
    torch.testing.assert_close(got[1, 5:], torch.tensor([7.0, 70, 8, 80, 9, 90, 10, 100, 11, 110, 12, 120]))


@pytest.mark.parametrize("skip", [0, 1])
def test_states(mine, skip):
    first, second = ([torch.randn(2, 7, d) for _ in range(4)] for d in (3, 5))
    got = mine.states(first, second, skip)
    torch.testing.assert_close(got, torch.cat([first[-2 - skip], second[-2 - skip]], -1))
