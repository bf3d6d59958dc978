"""The UNet."""

import math

import pytest
import torch
from torch import nn

D = torch.float64


@pytest.mark.parametrize("dim", [2, 8, 320])
def test_time_embedding(mine, dim):
    t = torch.tensor([0.0, 1.0, 7.0, 999.0])
    got = mine.time_embedding(t, dim)
    assert got.shape == (4, dim)
    for row, time in zip(got, t.tolist(), strict=True):
        angles = [time * 10000 ** (-i / (dim // 2)) for i in range(dim // 2)]
        want = torch.tensor([math.cos(a) for a in angles] + [math.sin(a) for a in angles])
        torch.testing.assert_close(row.float(), want, rtol=1e-4, atol=2e-4)


@pytest.mark.parametrize("widths", [(8, 8), (4, 12)])
def test_resnet(mine, widths):
    c_in, c_out = widths
    norm1, norm2 = (nn.Sequential(nn.GroupNorm(2, c), nn.SiLU()) for c in widths)
    conv1, conv2 = nn.Conv2d(c_in, c_out, 3, padding=1), nn.Conv2d(c_out, c_out, 3, padding=1)
    shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else None
    x, shift = torch.randn(2, c_in, 6, 5), torch.randn(2, c_out)
    with torch.no_grad():
        inside = conv1(norm1(x)) + shift[:, :, None, None]
        want = (shortcut(x) if shortcut else x) + conv2(norm2(inside))
        torch.testing.assert_close(
            mine.resnet(x, shift, norm1, conv1, norm2, conv2, shortcut), want, rtol=1e-4, atol=1e-5
        )


def test_u(mine):
    order = []

    def step(name):
        def f(x, kept=None):
            order.append((name, kept))
            return f"{x}{name}"

        return f

    out = mine.u("x", [[step("a"), step("b")], [step("c")]], step("m"), [step("d"), step("e"), step("f")])
    assert out == "xabcmdef"
    assert order == [("a", None), ("b", None), ("c", None), ("m", None), ("d", "xabc"), ("e", "xab"), ("f", "xa")]
