"""Shared by the kernel tests: random inputs of any shape and stride, and the comparison with float64."""

import contextlib

import torch
from util import rms_ratio

import kernels
from kernels import switch

TOLERANCE = {torch.float32: 3e-6, torch.float16: 1.5e-3, torch.bfloat16: 1.2e-2}


def normal(*shape, dtype=torch.float32, device="cpu", seed=None):
    generator = None if seed is None else torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator).to(device=device, dtype=dtype)


def strided(x, layout):
    """x with the same values and other strides: contiguous, transposed (two axes before the last swapped in memory), or
    padded (a slice of something wider)."""
    if layout == "transposed":
        return x.transpose(-3, -2).contiguous().transpose(-3, -2)
    if layout == "padded":
        wide = x.new_full((*x.shape[:-1], x.shape[-1] + 8), torch.nan)
        wide[..., : x.shape[-1]] = x
        return wide[..., : x.shape[-1]]
    return x.contiguous()


@contextlib.contextmanager
def poisoned():
    """New tensors are full of NaN inside: whatever a kernel forgets to write is seen."""
    before = torch.are_deterministic_algorithms_enabled()
    torch.use_deterministic_algorithms(True, warn_only=True)
    torch.utils.deterministic.fill_uninitialized_memory = True
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(before)


@contextlib.contextmanager
def blocks(kinds, **config):
    """Small tiles of attention, so that small tensors are many of them."""
    with contextlib.ExitStack() as stack:
        for kind in kinds:
            stack.enter_context(switch.forced(f"attention.{kind}", config))
        yield


def compare(kernel, reference, tensors, gradients, tolerance=None):
    """Run kernel(*tensors) by Triton and reference(*tensors) in float64; every result and every gradient must agree.

    tensors: inputs, None where there is none. gradients: those of the outputs, in the outputs' order.
    """
    ours = [None if t is None else t.detach().requires_grad_() for t in tensors]
    exact = [None if t is None else t.detach().double().requires_grad_() for t in tensors]
    with kernels.backend("triton"), poisoned():
        outputs = kernel(*ours)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        torch.autograd.backward(outputs, [g.to(o.dtype) for g, o in zip(gradients, outputs, strict=True)])
    wanted = reference(*exact)
    wanted = wanted if isinstance(wanted, tuple) else (wanted,)
    torch.autograd.backward(wanted, [g.to(o.dtype).double() for g, o in zip(gradients, outputs, strict=True)])
    dtype = next(t.dtype for t in tensors if t is not None)
    limit = tolerance or TOLERANCE[dtype]
    for i, (got, want) in enumerate(zip(outputs, wanted, strict=True)):
        assert torch.isfinite(got).all(), f"output {i} is not finite"
        check(got, want, limit, f"output {i}")
    for i, (a, b) in enumerate(zip(ours, exact, strict=True)):
        if a is not None:
            check(a.grad, b.grad, limit, f"gradient of input {i}")
    return outputs


def check(got, want, limit, name):
    """Relative RMS error; where the truth is nothing but cancelled terms, absolute."""
    if want.double().pow(2).mean().sqrt() < 1e-6:
        assert got.double().abs().max() < 1e3 * limit, name
    else:
        error = rms_ratio(got, want)
        assert error < limit, f"{name}: {error:.2e}"
