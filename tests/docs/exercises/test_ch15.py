"""A captioner."""

import pytest
import torch


def drawn(*shape, seed=15):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def test_rope(mine):
    x = drawn(2, 5, 3, 8)
    places = torch.tensor([0, 1, 2, 7, 100])
    pairs = torch.complex(x[..., :4], x[..., 4:])
    angles = places[:, None] * 10000.0 ** (-torch.arange(4) / 4)
    turned = pairs * torch.polar(torch.ones(5, 4), angles)[:, None]
    got = mine.rope(x, places)
    torch.testing.assert_close(got, torch.cat([turned.real, turned.imag], -1), rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(got[:, 0], x[:, 0])  # place 0 is not turned


def test_cache(mine):
    q, k, v = (drawn(2, 9, 3, 8, seed=s) for s in range(3))
    want = torch.nn.functional.scaled_dot_product_attention(
        *(t.transpose(1, 2) for t in (q, k, v)), is_causal=True
    ).transpose(1, 2)
    for cuts in ([9], [4, 5], [1] * 9, [5, 1, 3]):
        cache, out, at = mine.Cache(), [], 0
        for n in cuts:
            out.append(cache.attend(*(t[:, at : at + n] for t in (q, k, v))))
            at += n
        torch.testing.assert_close(torch.cat(out, 1), want, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(("p", "stay"), [(0.5, 1), (0.65, 2), (0.9, 3), (0.99, 4), (0.01, 1)])
def test_nucleus(mine, p, stay):
    shares = torch.tensor([[0.1, 0.6, 0.05, 0.25], [0.25, 0.05, 0.6, 0.1]])
    got = mine.nucleus(shares.log(), p)
    want = torch.where(shares >= shares.sort(descending=True).values[:, stay - 1 : stay], shares.log(), -torch.inf)
    torch.testing.assert_close(got, want)
