"""The smallest kernel, in Triton's interpreter against float64: the test that a new one begins with."""

import pytest
import torch
from kernel_cases import TOLERANCE, check, normal, poisoned

import kernels
from kernels import switch
from kernels.template import scaled, scaled_reference

pytestmark = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter; test_gpu.py is for a GPU")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("shape", [(1, 1), (3, 5, 17), (2, 1030)])
def test_values_and_gradients(shape, dtype):
    x, gain = (normal(*s, dtype=dtype).requires_grad_() for s in (shape, shape[-1:]))
    dy = normal(*shape, dtype=dtype)
    with kernels.backend("triton"), poisoned():
        y = scaled(x, gain)
        got = torch.autograd.grad(y, (x, gain), dy)
    exact = [t.detach().double().requires_grad_() for t in (x, gain)]
    want = scaled_reference(*exact)
    check(y, want, TOLERANCE[dtype], "y")
    for name, a, b in zip(("dx", "dgain"), got, torch.autograd.grad(want, exact, dy.double()), strict=True):
        check(a, b, TOLERANCE[dtype], name)


def test_it_says_why_not():
    x, gain = normal(4, 8).T, normal(4)
    with kernels.backend("triton"), pytest.raises(RuntimeError, match="not contiguous"):
        scaled(x, gain)
    with kernels.backend("torch"):
        assert torch.equal(scaled(x, gain), x * gain)
