"""Residual, gate, bias and norm in one pass, in Triton's interpreter against float64."""

import pytest
import torch
from kernel_cases import TOLERANCE, check, normal, poisoned

import kernels
from kernels import switch
from kernels.norms import norm_reference
from kernels.residual import add_bias_reference, interleave_reference, residual_reference

pytestmark = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter; test_gpu.py is for a GPU")
DTYPES = [torch.float32, torch.float16]


def exact(*tensors):
    return [None if t is None else t.double() for t in tensors]


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize(("B", "L", "D"), [(1, 1, 16), (2, 7, 40), (3, 33, 320)])
@pytest.mark.parametrize("gates", ["none", "one", "two", "second without"])
def test_residual_norm(B, L, D, gates, dtype):
    x, y, z = (normal(B, L, D, dtype=dtype) for _ in range(3))
    wide = normal(B, 3 * D, dtype=dtype)  # gates are slices of one projection
    gate = None if gates == "none" else wide[:, :D]
    z = z if gates in ("two", "second without") else None
    gate_z = wide[:, D : 2 * D] if gates == "two" else None
    weight, bias = (normal(D, dtype=dtype) for _ in range(2))
    with kernels.backend("triton"), torch.no_grad(), poisoned():
        total, out = kernels.residual_norm(x, y, gate, z, gate_z, weight=weight, bias=bias)
        biased, _ = kernels.residual_norm(x, y, gate, z, gate_z, weight=weight, bias=bias, more=bias)
        scale = wide[:, 2 * D :]
        _, adaptive = kernels.residual_norm(x, y, gate, z, gate_z, eps=1e-6, scale=scale, shift=scale)
    want = residual_reference(*exact(x, y, gate, z, gate_z))
    check(total, want, TOLERANCE[dtype], "sum")
    check(biased, total.double() + bias.double(), TOLERANCE[dtype], "sum and bias")
    rounded = total.double()  # the norm is that of the rounded sum
    check(out, norm_reference(rounded, *exact(weight, bias), 1e-5), TOLERANCE[dtype], "norm")
    check(
        adaptive, norm_reference(rounded, *exact(scale, scale), 1e-6, plus_one=True), TOLERANCE[dtype], "adaptive norm"
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("shape", [(1, 3, 1, 1), (2, 40, 9, 7), (2, 33, 5)], ids=str)
def test_add_bias(shape, last, dtype):
    y, x, bias = normal(*shape, dtype=dtype), normal(*shape, dtype=dtype), normal(shape[1], dtype=dtype)
    if last and len(shape) == 4:
        y, x = (t.to(memory_format=torch.channels_last) for t in (y, x))
    want, alone = add_bias_reference(*exact(y, bias, x)), add_bias_reference(*exact(y, bias))
    with kernels.backend("triton"), torch.no_grad():
        check(kernels.add_bias(y.clone(), bias), alone, TOLERANCE[dtype], "bias")
        given = y.clone()
        got = kernels.add_bias(given, bias, x)
    assert got.data_ptr() == given.data_ptr() and got.stride() == y.stride()
    check(got, want, TOLERANCE[dtype], "bias and residual")


def test_with_gradients_the_same_is_composed():
    x, y = (normal(2, 5, 16).requires_grad_() for _ in range(2))
    gate, weights = normal(2, 16).requires_grad_(), normal(16)
    with kernels.backend("triton"):
        total, out = kernels.residual_norm(x, y, gate, eps=1e-6)
        (total + out * weights).square().sum().backward()
    want = [t.detach().double().requires_grad_() for t in (x, y, gate)]
    s = residual_reference(*want)
    (s + norm_reference(s, eps=1e-6) * weights).square().sum().backward()
    for a, b in zip((x, y, gate), want, strict=True):
        check(a.grad, b.grad, 1e-5, "gradient")
    given = normal(2, 4, 3)
    with kernels.backend("triton"):
        assert kernels.add_bias(given, normal(4)).data_ptr() != given.data_ptr(), "not in place where autograd may look"


@pytest.mark.parametrize("dtype", DTYPES, ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 4, 2, 2), (2, 12, 4, 6), (3, 160, 3, 5)], ids=str)
def test_interleave(shape, dtype):
    y = normal(*shape, dtype=dtype).to(memory_format=torch.channels_last)
    bias = normal(shape[1] // 4, dtype=dtype)
    with kernels.backend("triton"), torch.no_grad(), poisoned():
        got = kernels.interleave(y, bias)
    assert got.movedim(1, -1).is_contiguous()
    check(got, interleave_reference(*exact(y, bias)), TOLERANCE[dtype], "picture")


def test_lean_forms_are_for_plain_inference():
    x = normal(2, 3)
    with torch.no_grad():
        assert kernels.lean(x) and kernels.lean(torch.nn.Parameter(x))
        with torch.autocast("cpu", torch.bfloat16):
            assert not kernels.lean(x)
        assert not kernels.lean(x.to("meta"))
    assert not kernels.lean(x), "gradients may be asked for"
