"""LayerNorm, RMSNorm, AdaLN, and q/k norm with rotary embedding, by the interpreter against float64."""

import importlib

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from kernel_cases import compare, normal, strided

import kernels
from kernels import switch

norms = importlib.import_module("kernels.norms")

pytestmark = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter; test_gpu.py is for a GPU")
DTYPES = st.sampled_from([torch.float32, torch.float16])
LAYOUTS = st.sampled_from(["contiguous", "transposed", "padded"])


@settings(max_examples=25, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 3), st.integers(1, 40), st.sampled_from([9, 40, 130]), DTYPES, LAYOUTS,
       st.sampled_from(["weight", "both", "none", "adaptive"]), st.booleans())  # fmt: skip
def test_rows(B, L, D, dtype, layout, gain, rms):
    shape = (B, D) if gain == "adaptive" else (D,)
    x = strided(normal(B, L, D, dtype=dtype), layout)
    a = None if gain == "none" else normal(*shape, dtype=dtype)
    c = normal(*shape, dtype=dtype) if gain in ("both", "adaptive") and not rms else None
    adaptive = gain == "adaptive"

    def kernel(x, a, c):
        if rms and not adaptive:
            return kernels.rms_norm(x, a)
        if adaptive and rms:
            return norms.norm_op(x, a, c, 1e-6, True, True)[0]
        return kernels.layer_norm(x, eps=1e-6, **({"scale": a, "shift": c} if adaptive else {"weight": a, "bias": c}))

    compare(
        kernel, lambda x, a, c: norms.norm_reference(x, a, c, 1e-6, rms, adaptive), (x, a, c), (normal(B, L, D),),
        1e-5 if dtype == torch.float32 else 2.5e-3,
    )  # fmt: skip


def test_gemmas_gain():
    compare(
        lambda x, w: kernels.rms_norm(x, w, plus_one=True),
        lambda x, w: norms.norm_reference(x.flatten(0, 1), w, rms=True, plus_one=True).view(x.shape),
        (normal(2, 3, 4, 24), normal(24)),
        (normal(2, 3, 4, 24),),
        1e-5,
    )


def test_many_rows_for_one_program():
    """More rows than programs: the sums for the gain run over loops and programs."""
    compare(
        lambda x, w, b: kernels.layer_norm(x, w, b),
        lambda x, w, b: norms.norm_reference(x, w, b, 1e-5),
        (normal(1, 1300, 16), normal(16), normal(16)),
        (normal(1, 1300, 16),),
        1e-5,
    )


@settings(max_examples=20, deadline=None, derandomize=True, suppress_health_check=list(HealthCheck))
@given(st.integers(1, 2), st.integers(1, 20), st.integers(1, 3), st.sampled_from([6, 40, 64]), DTYPES, LAYOUTS,
       st.sampled_from(["norm", "rope", "both", "each its own"]), st.booleans())  # fmt: skip
def test_queries_and_keys(B, L, N, K, dtype, layout, what, plus_one):
    x = strided(normal(B, L, N, K, dtype=dtype), layout)
    weight = normal(K, dtype=dtype) if what != "rope" else None
    angle = normal(B if what == "each its own" else 1, L, K // 2)
    cos, sin = (None, None) if what == "norm" else (angle.cos().to(dtype), angle.sin().to(dtype))
    exact = [None if t is None else t.double() for t in (cos, sin)]
    compare(
        lambda x, w: kernels.qk_norm_rope(x, w, cos, sin, plus_one=plus_one),
        lambda x, w: norms.qk_norm_rope_reference(x, w, *exact, plus_one=plus_one),
        (x, weight),
        (normal(B, L, N, K),),
        1e-5 if dtype == torch.float32 else 2.5e-3,
    )


def test_rotation_keeps_length_and_sees_only_distance():
    """The two properties that rotary embeddings exist for."""
    q, k = normal(1, 1, 1, 16).expand(1, 9, 1, 16), normal(1, 1, 1, 16).expand(1, 9, 1, 16)
    angle = torch.arange(9.0)[:, None] * 100.0 ** (-torch.arange(8) / 8)
    with kernels.backend("triton"):
        q, k = (kernels.qk_norm_rope(x.contiguous(), None, angle.cos()[None], angle.sin()[None]) for x in (q, k))
    torch.testing.assert_close(q.norm(dim=-1)[0, :, 0], q[0, 0, 0].norm().expand(9))
    scores = q[0, :, 0] @ k[0, :, 0].T
    for distance in range(9):
        diagonal = scores.diagonal(distance)
        torch.testing.assert_close(diagonal, diagonal[:1].expand_as(diagonal), rtol=1e-4, atol=1e-5)


def test_the_fallback_is_the_same_function():
    x, w, m = normal(2, 5, 24), normal(24), normal(2, 24)
    angle = normal(1, 5, 4)
    calls = (
        lambda: kernels.layer_norm(x, w, w),
        lambda: kernels.layer_norm(x, scale=m, shift=m),
        lambda: kernels.rms_norm(x, w),
        lambda: kernels.rms_norm(x, w, plus_one=True),
        lambda: kernels.qk_norm_rope(x.view(2, 5, 3, 8), w[:8], angle.cos(), angle.sin()),
    )
    for call in calls:
        with kernels.backend("triton"):
            got = call()
        with kernels.backend("torch"):
            torch.testing.assert_close(got, call(), rtol=1e-5, atol=1e-5)


def test_reasons():
    x, w = normal(1, 4, 8), normal(8)
    with kernels.backend("triton"):
        for bad, said in ((x.double(), "float64"), (normal(1, 8, 4).transpose(1, 2), "not contiguous"),
                          (normal(1, 0, 8), "empty"), (normal(1, 1, 20000), "more than 8192")):  # fmt: skip
            with pytest.raises(RuntimeError, match=said):
                kernels.rms_norm(bad)
        with pytest.raises(RuntimeError, match="odd size"):
            kernels.qk_norm_rope(normal(1, 4, 1, 7), normal(7))
        with pytest.raises(ValueError, match="does not fit"):
            kernels.layer_norm(x, normal(9))
    with pytest.raises(ValueError, match="either"):
        kernels.layer_norm(x, w, scale=normal(1, 8), shift=normal(1, 8))
    for half in ({"scale": normal(1, 8)}, {"shift": normal(1, 8)}):
        with pytest.raises(ValueError, match="both of them"):
            kernels.layer_norm(x, **half)
    with pytest.raises(ValueError, match="does not fit"):
        kernels.qk_norm_rope(normal(1, 4, 1, 8), None, normal(1, 5, 4), normal(1, 5, 4))
