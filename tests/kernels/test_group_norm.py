"""GroupNorm by Triton's interpreter against float64: both memory formats, on chip and in chunks, every gradient."""

import importlib
import random

import pytest
import torch
import torch.nn.functional as F
from kernel_cases import compare, normal

import kernels
from kernels import switch

group_norm = importlib.import_module("kernels.group_norm")

pytestmark = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter; test_gpu.py is for a GPU")


@pytest.fixture
def in_chunks(monkeypatch):
    """No group fits on chip, and tiles are small."""
    monkeypatch.setattr(group_norm, "ON_CHIP", 0)
    monkeypatch.setattr(group_norm, "ON_CHIP_BACKWARD", 0)
    with switch.forced("group_norm", {"BLOCK": 256, "PROGRAMS": 16}):
        yield


def run(shape, groups, dtype=torch.float32, silu=True, shift=True, last=False, tolerance=None, offset=0.0, spread=1.0):
    B, C = shape[:2]
    x = normal(*shape, dtype=torch.float64) * spread + offset
    x = x.to(dtype).to(memory_format=torch.channels_last) if last else x.to(dtype)
    weight, bias = normal(C, dtype=dtype), normal(C, dtype=dtype)
    shift = normal(B, C, dtype=dtype) if shift else None
    (y,) = compare(
        lambda x, w, b, t: kernels.group_norm(x, groups, w, b, 1e-5, silu, t),
        lambda x, w, b, t: group_norm.group_norm_reference(x, groups, w, b, 1e-5, silu, t),
        (x, weight, bias, shift),
        (normal(*shape),),
        tolerance,
    )
    assert y.stride() == x.stride()


def drawn(seed):
    """Any shape, type and format at once."""
    rng = random.Random(seed)
    torch.manual_seed(seed)
    groups, width = rng.choice([1, 2, 4]), rng.choice([1, 3, 8, 10])
    shape = (rng.randint(1, 2), groups * width, rng.randint(3, 19), rng.randint(3, 19))
    dtype = rng.choice([torch.float32, torch.float16])
    # a group of one channel loses its shift again: the gradient is rounding alone
    shift = rng.random() < 0.7 and width > 1
    run(shape, groups, dtype, rng.random() < 0.5, shift, rng.random() < 0.5, 2e-5 if dtype == torch.float32 else 3e-3)


@pytest.mark.parametrize("seed", range(20))
def test_drawn_on_chip(seed):
    drawn(seed)


@pytest.mark.parametrize("seed", range(20))
def test_drawn_in_chunks(in_chunks, seed):
    drawn(100 + seed)


@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("C", "side"), [(32, 33), (320, 9), (2560, 3)])
def test_channels(C, side, last):
    run((1, C, side, side), 32, last=last)


def test_other_ranks():
    run((2, 16, 37), 4)
    run((1, 8, 3, 4, 5), 2)


def test_eps_counts_where_the_variance_is_as_small():
    run((2, 8, 5, 7), 2, shift=False, silu=False, spread=0.003)


def test_eps_counts_in_chunks_too(in_chunks):
    run((2, 8, 5, 7), 2, shift=False, silu=False, spread=0.003, last=True)
    run((2, 8, 5, 7), 2, shift=False, silu=False, spread=0.003)


def test_a_large_offset_costs_no_digits(in_chunks):
    """Mean and variance are never differences of large sums: 1000 standard deviations off, fp32 still has its digits."""
    run((1, 8, 33, 31), 2, shift=False, silu=False, offset=1000.0, tolerance=2e-4)
    x = normal(1, 8, 33, 31) + 1000
    with kernels.backend("triton"):
        y = kernels.group_norm(x, 2, torch.ones(8), torch.zeros(8))
    assert abs(y.view(2, -1).var(correction=0).item() - 1) < 1e-3


def test_gradients_of_other_formats():
    """A gradient that is laid out otherwise than x, or that is one number everywhere."""
    x, weight, bias = normal(2, 8, 5, 7).requires_grad_(), normal(8), normal(8)
    for g in (normal(2, 8, 5, 7).to(memory_format=torch.channels_last), normal(2, 8, 7, 5).transpose(2, 3),
              torch.ones(()).expand(2, 8, 5, 7)):  # fmt: skip
        with kernels.backend("triton"):
            (got,) = torch.autograd.grad(kernels.group_norm(x, 2, weight, bias, silu=True), x, g)
        (want,) = torch.autograd.grad(F.silu(F.group_norm(x, 2, weight, bias)), x, g)
        torch.testing.assert_close(got, want)


def test_strided_weights():
    x, w = normal(1, 8, 4, 4), normal(8, 2)
    with kernels.backend("triton"):
        got = kernels.group_norm(x, 2, w[:, 0], w[:, 1])
    torch.testing.assert_close(got, F.group_norm(x, 2, w[:, 0], w[:, 1]))


def test_many_channels_in_a_group(in_chunks):
    """Joining chunks of wide groups must fit one program."""
    run((1, 600, 4, 10), 1)


def test_reasons():
    x, w = normal(1, 8, 4, 4), normal(8)
    with kernels.backend("triton"):
        for bad, said in (
            (x.double(), "float64"),
            (normal(1, 8, 4, 8)[..., ::2], "neither contiguous nor channels last"),
            (normal(1, 16, 4, 4).to(memory_format=torch.channels_last)[:, :8], "neither contiguous nor channels last"),
            (normal(1, 8, 5, 4)[:, :, :4].transpose(2, 3), "no single stride"),
            (normal(0, 8, 4, 4), "no or of more"),
        ):
            with pytest.raises(RuntimeError, match=said):
                kernels.group_norm(bad, 2, w.to(bad.dtype), w.to(bad.dtype))
        with pytest.raises(ValueError, match="3 groups"):
            kernels.group_norm(x, 3, w, w)
        with pytest.raises(ValueError, match="do not fit"):
            kernels.group_norm(x, 2, w, w, shift=normal(2, 8))
