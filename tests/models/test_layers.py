"""Layers against their formulas in float64."""

import math

import torch
from util import rms_ratio

from nanodiff.models.layers import Downsample, GroupNorm, Upsample, attend, timestep_embedding


def test_timestep_embedding_is_cos_then_sin():
    got = timestep_embedding(torch.tensor([0.0, 7.5, 999.0]), 8)
    for row, t in zip(got, (0.0, 7.5, 999.0), strict=True):
        frequencies = [math.exp(-math.log(10000) * i / 4) for i in range(4)]
        want = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
        assert torch.allclose(row.double(), torch.tensor(want, dtype=torch.float64), atol=1e-4)


def test_attend():
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    split = lambda x: x.double().view(2, -1, 3, 4).transpose(1, 2)  # noqa: E731
    scores = split(q) @ split(k).transpose(-1, -2) / 4**0.5
    want = (scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(2, 5, 12)
    assert rms_ratio(attend(q, k, v, heads=3), want) < 1e-6


def test_group_norm_silu():
    norm = GroupNorm(2, 6, 1e-5, silu=True)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 5, 4)
    g = x.double().view(3, 2, -1)
    y = ((g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()).view(3, 6, 5, 4)
    y = y * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    with torch.no_grad():
        assert rms_ratio(norm(x), y * y.sigmoid()) < 1e-6


def test_resampling_sizes():
    assert Downsample(4, padding=1)(torch.zeros(1, 4, 5, 7)).shape == (1, 4, 3, 4)
    assert Downsample(4, padding=0)(torch.zeros(1, 4, 6, 8)).shape == (1, 4, 3, 4)
    assert Upsample(4)(torch.zeros(1, 4, 3, 4)).shape == (1, 4, 6, 8)
    assert Upsample(4)(torch.zeros(1, 4, 3, 4), (5, 7)).shape == (1, 4, 5, 7)
