"""GEGLU, SwiGLU, and linear + cross-entropy, by the interpreter against float64."""

import importlib

import pytest
import torch
import torch.nn.functional as F
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import compare, normal

import kernels
from kernels import switch

gated = importlib.import_module("kernels.gated")

pytestmark = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter; test_gpu.py is for a GPU")
DTYPES = st.sampled_from([torch.float32, torch.float16])


@settings(max_examples=15, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 3), st.integers(1, 9), st.sampled_from([1, 7, 64, 1300]), DTYPES,
       st.sampled_from(sorted(gated.ACTIVATIONS)))  # fmt: skip
def test_gates(B, L, D, dtype, activation):
    limit = 1e-5 if dtype == torch.float32 else 2.5e-3
    compare(
        lambda x: kernels.geglu(x, activation), lambda x: gated.gated_reference(*x.chunk(2, dim=-1), activation),
        (normal(B, L, 2 * D, dtype=dtype),), (normal(B, L, D),), limit,
    )  # fmt: skip
    compare(
        lambda g, v: kernels.swiglu(g, v, activation), lambda g, v: gated.gated_reference(v, g, activation),
        (normal(B, L, D, dtype=dtype), normal(B, L, D, dtype=dtype)), (normal(B, L, D),), limit,
    )  # fmt: skip


def test_extreme_gates():
    """Where e^z overflows, the activations are still 0 or the gate itself."""
    gate = torch.tensor([[-1000.0, -90.0, 0.0, 90.0, 1000.0]])
    for activation in gated.ACTIVATIONS:
        with kernels.backend("triton"):
            got = kernels.swiglu(gate, torch.ones_like(gate), activation)
        torch.testing.assert_close(got, gate.clamp(min=0))


@settings(max_examples=12, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 70), st.integers(2, 300), st.sampled_from([8, 40, 70]), DTYPES, st.booleans())
def test_losses(T, V, D, dtype, fused):
    """Kernel and chunked PyTorch, with words taken 128 at a time and some targets left out."""
    target = torch.randint(0, V, (T,))
    target[::3] = -100
    target[0] = V - 1
    limit = 2e-5 if dtype == torch.float32 else 3e-3

    def ours(x, w):
        with kernels.backend("triton" if fused else "torch"):
            return kernels.linear_cross_entropy(x, w, target, reduction="none")

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(gated, "WORDS", 128)
        compare(
            ours, lambda x, w: gated.linear_cross_entropy_reference(x, w, target),
            (normal(T, D, dtype=dtype), normal(V, D, dtype=dtype)), (normal(T),), limit,
        )  # fmt: skip


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_it_is_cross_entropy(mode):
    x, w, target = normal(30, 16), normal(50, 16), torch.randint(0, 50, (30,))
    target[4] = -100
    with kernels.backend(mode):
        for reduction in ("mean", "sum", "none"):
            got = kernels.linear_cross_entropy(x, w, target, reduction=reduction)
            torch.testing.assert_close(got, F.cross_entropy(x @ w.T, target, reduction=reduction))


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_strided_targets_and_autocast(mode):
    """A column of labels; and under autocast, fp32 weights with bf16 activations."""
    x, w, labels = normal(30, 16).requires_grad_(), normal(50, 16).requires_grad_(), torch.randint(0, 50, (30, 2))
    with kernels.backend(mode):
        torch.testing.assert_close(
            kernels.linear_cross_entropy(x, w, labels[:, 1]), F.cross_entropy(x @ w.T, labels[:, 1])
        )
    with kernels.backend("torch"), torch.autocast("cpu", torch.bfloat16):
        loss = kernels.linear_cross_entropy(x.bfloat16(), w, labels[:, 0])
        loss.backward()
    assert w.grad.dtype == torch.float32 and x.grad is not None
    with pytest.raises(ValueError, match=r"weight torch\.float32"):
        kernels.linear_cross_entropy(x.detach().half(), w, labels[:, 0])


@pytest.mark.parametrize("mode", ["triton", "torch"])
def test_a_resting_weight_costs_nothing(mode):
    """Its gradient, as large as the vocabulary, is not made; that of x is the same."""
    x, w, target = normal(30, 16).requires_grad_(), normal(50, 16), torch.randint(0, 50, (30,))
    with kernels.backend(mode):
        kernels.linear_cross_entropy(x, w, target).backward()
        _, dweight = gated.losses_backward(
            torch.ones(30), x.detach(), w, target, torch.zeros(30), -100, mode == "triton", False
        )
    y = x.detach().clone().requires_grad_()
    F.cross_entropy(y @ w.T, target).backward()
    torch.testing.assert_close(x.grad, y.grad)
    assert dweight.numel() == 0


def test_half_precision_on_a_cpu_is_not_rounded_to():
    """Logits of bf16 operands in fp32: the loss is that of the same numbers in fp32."""
    x, w, target = normal(30, 64).bfloat16(), normal(500, 64).bfloat16(), torch.randint(0, 500, (30,))
    with kernels.backend("torch"):
        got = kernels.linear_cross_entropy(x, w, target, reduction="none")
    torch.testing.assert_close(got, F.cross_entropy(x.float() @ w.float().T, target, reduction="none"))


def test_logits_never_exist():
    """Neither forward nor backward holds a tensor as large as the logits: 4,000 tokens by 50,000 words would be 800 MB."""
    x, w = normal(64, 16), normal(50000, 16)
    biggest = 0

    class Watch(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            nonlocal biggest
            out = func(*args, **(kwargs or {}))
            for t in torch.utils._pytree.tree_leaves(out):
                if isinstance(t, torch.Tensor):
                    biggest = max(biggest, t.numel())
            return out

    target = torch.randint(0, 50000, (64,))
    with kernels.backend("torch"), Watch():
        loss, lse = gated.losses(x, w, target, -100, False)
        gated.losses_backward(torch.ones(64), x, w, target, lse, -100, False)
    assert 0 < biggest <= max(w.numel(), 64 * gated.WORDS) < 64 * 50000
    assert torch.isfinite(loss).all()


def test_reasons():
    with kernels.backend("triton"):
        with pytest.raises(RuntimeError, match="float64"):
            kernels.geglu(normal(2, 4).double())
        with pytest.raises(RuntimeError, match="not contiguous"):
            kernels.geglu(normal(4, 2).T)
        with pytest.raises(RuntimeError, match=r"float16.*float32"):
            kernels.swiglu(normal(2, 4).half(), normal(2, 4))
        with pytest.raises(RuntimeError, match="empty"):
            kernels.geglu(normal(0, 4))
    with pytest.raises(ValueError, match="relu"):
        kernels.geglu(normal(2, 4), "relu")
    with pytest.raises(ValueError, match="no two halves"):
        kernels.geglu(normal(2, 5))
    with pytest.raises(ValueError, match="swiglu: value"):
        kernels.swiglu(normal(2, 4), normal(2, 5))
    with pytest.raises(ValueError, match="do not fit"):
        kernels.linear_cross_entropy(normal(2, 4), normal(9, 5), torch.zeros(2, dtype=torch.long))
    with pytest.raises(ValueError, match="reduction"):
        kernels.linear_cross_entropy(normal(2, 4), normal(9, 4), torch.zeros(2, dtype=torch.long), reduction="max")
