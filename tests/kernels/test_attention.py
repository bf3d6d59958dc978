"""Attention by Triton's interpreter against float64: output, log-sum-exp and every gradient."""

import importlib
import random

import pytest
import torch
from kernel_cases import TOLERANCE, blocks, compare, normal, strided
from util import rounding

import kernels
from kernels import switch

attention = importlib.import_module("kernels.attention")
attention_backward = importlib.import_module("kernels.attention_backward")

pytestmark = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter; test_gpu.py is for a GPU")
ALL = (
    "forward",
    "forward_masked",
    "backward_kv",
    "backward_kv_masked",
    "backward_q",
    "backward_q_masked",
    "backward_bias",
)
SMALL = {"BLOCK_L": 32, "BLOCK_S": 16}
HEADS = (40, 64, 80, 96, 128, 160, 256, 512)


def run(B, L, S, N, M, K, dtype, causal=False, window=0, bias=None, masked=False, layout="contiguous", scale=None):
    """One case: q, k, v and bias of these shapes; the gradient of the output comes transposed, as it does in models."""
    torch.manual_seed(0)  # a case is the same each time it is run
    q, k, v = (strided(normal(*shape, dtype=dtype), layout) for shape in ((B, L, N, K), (B, S, M, K), (B, S, M, K)))
    bias = None if bias is None else normal(*bias, L, S, dtype=dtype)
    key_mask = None
    if masked:
        key_mask = torch.rand(B, S) > 0.3
        key_mask[:, 0] = True
    options = {"causal": causal, "scale": scale, "key_mask": key_mask, "window": window}
    seen = attention.visible(L, S, causal, window, key_mask)
    alive = torch.ones(B, N, L, dtype=torch.bool) if seen is None else seen.any(-1).expand(B, N, L)

    def kernel(q, k, v, bias):
        out, lse = kernels.attention(q, k, v, bias=bias, return_lse=True, **options)
        assert (lse.isneginf() == ~alive).all()
        return out, lse.masked_fill(~alive, 0.0)

    def reference(q, k, v, bias):
        out, lse = attention.attention_reference(q, k, v, bias=bias, **options)
        return out, lse.masked_fill(~alive, 0.0)

    with blocks(ALL, **SMALL):
        gradients = normal(B, N, L, K).transpose(1, 2), normal(B, N, L)
        # a score is off by its own size's rounding, and so is, relatively, what the exponential makes of it
        scores = torch.einsum("blnk,bsmk->blsnm", q.double(), k.double()).abs().max() * (scale or K**-0.5)
        return compare(kernel, reference, (q, k, v, bias), gradients, TOLERANCE[dtype] + rounding(scores.item(), 4))


@pytest.mark.parametrize("seed", range(16))
def test_drawn(seed):
    """Any shape, mask and layout at once."""
    rng = random.Random(seed)
    B, L, S = rng.randint(1, 2), rng.randint(1, 50), rng.choice([1, 3, 33, 77, 100, 130, 150])
    M, groups = rng.randint(1, 2), rng.randint(1, 2)
    run(
        B,
        L,
        S,
        M * groups,
        M,
        rng.choice([4, 7, 24, 40, 64, 80]),
        rng.choice([torch.float32, torch.float16]),
        causal=rng.random() < 0.5,
        window=rng.choice([0, 0, 1, 20, 64]),
        bias=rng.choice([None, None, (1, 1), (1, M * groups), (B, 1), (B, M * groups)]),
        masked=rng.random() < 0.5,
        layout=rng.choice(["contiguous", "transposed", "padded"]),
        scale=rng.choice([None, 0.05, 1.0]),
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=["fp32", "fp16"])
@pytest.mark.parametrize("keys", [135, 77], ids=["more keys than are held on chip", "a prompt: on chip"])
@pytest.mark.parametrize("K", [K if K < 512 else pytest.param(K, marks=pytest.mark.slow) for K in HEADS])
def test_every_head_size(K, keys, dtype):
    run(1, 9, keys, 1, 1, K, dtype)


@pytest.mark.parametrize("keys", range(136, 152))
def test_the_diagonal_ends_anywhere_in_a_block(keys):
    """Blocks of 16 keys that every query sees are not masked: the last of them must end at the diagonal or before, wherever that is."""
    run(1, 20, keys, 1, 1, 16, torch.float32, causal=True)


def test_views_of_one_projection():
    """q, k, v of [B, L, 3, N, K] need no copy, and the gradient arrives in the projection."""
    x = normal(2, 21, 3, 2, 40)

    def split(f):
        return lambda x: f(*x.unbind(2))

    compare(
        split(kernels.attention), split(lambda q, k, v: attention.attention_reference(q, k, v)[0]), (x,),
        (normal(2, 21, 2, 40),),
    )  # fmt: skip


def test_the_copy_engine_path_is_the_same():
    """Tensor descriptors instead of pointers, over a length and a head size that both leave a rest."""
    q, k, v = (normal(1, 150, 2, 40) for _ in range(3))
    with kernels.backend("triton"), blocks(("forward",), **SMALL):
        plain = kernels.attention(q, k, v)
        with switch.forced("attention.forward", SMALL | {"TMA": True}):
            assert torch.equal(kernels.attention(q, k, v), plain)


def test_infinite_bias_hides():
    bias = normal(1, 1, 9, 140)
    bias[..., 20:] = -torch.inf
    q, k, v = normal(1, 9, 1, 16), normal(1, 140, 1, 16), normal(1, 140, 1, 16)
    with kernels.backend("triton"), blocks(ALL, **SMALL):
        got = kernels.attention(q, k, v, bias=bias)
        want = kernels.attention(q, k[:, :20], v[:, :20], bias=bias[..., :20])
    torch.testing.assert_close(got, want)


def test_large_scores_do_not_overflow():
    q, k, v = normal(1, 33, 1, 64) * 40, normal(1, 150, 1, 64) * 40, normal(1, 150, 1, 64)
    with kernels.backend("triton"):
        got = kernels.attention(q, k, v)
    want = attention.attention_reference(q.double(), k.double(), v.double())[0]
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.double(), want, rtol=1e-3, atol=1e-3)


def test_two_runs_are_bit_equal():
    def once():
        q, k, v = (normal(1, 90, 1, 40, seed=i).requires_grad_() for i in range(3))
        with kernels.backend("triton"), blocks(ALL, **SMALL):
            out = kernels.attention(q, k, v)
            out.backward(normal(1, 90, 1, 40, seed=9))
        return out, q.grad, k.grad, v.grad

    for a, b in zip(once(), once(), strict=True):
        assert torch.equal(a, b)


def test_few_keys_cut_the_queries_the_same_sums():
    """dk and dv of a prompt come from several programs' parts."""
    assert attention_backward.splits(4096, 77, 64, 64, 16) > 1
    with blocks(ALL, BLOCK_L=16, BLOCK_S=16):
        run(1, 130, 33, 1, 1, 16, torch.float32)


def test_it_is_pytorchs_attention():
    """The fallback and the kernel are the same function, causal masks of other lengths and grouped heads included."""
    for L, S, M, causal, window in ((20, 33, 1, True, 0), (33, 33, 2, True, 9), (17, 50, 2, False, 0)):
        q, k, v = normal(1, L, 2, 16), normal(1, S, M, 16), normal(1, S, M, 16)
        with kernels.backend("torch"):
            want = kernels.attention(q, k, v, causal=causal, window=window)
        with kernels.backend("triton"):
            torch.testing.assert_close(kernels.attention(q, k, v, causal=causal, window=window), want)


def test_empty():
    with kernels.backend("triton"):
        assert kernels.attention(normal(0, 3, 1, 16), normal(0, 5, 1, 16), normal(0, 5, 1, 16)).shape == (0, 3, 1, 16)
        assert kernels.attention(normal(2, 0, 1, 16), normal(2, 5, 1, 16), normal(2, 5, 1, 16)).shape == (2, 0, 1, 16)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (dict.fromkeys("qkv", normal(1, 4, 1, 520)), "head size is 520"),
        ({"q": normal(1, 4, 1, 16).double()}, "float64"),
        ({"k": normal(1, 4, 1, 16).half()}, "mixes types"),
        ({"scale": -1.0}, "negative scale"),
        ({"k": normal(1, 0, 1, 16), "v": normal(1, 0, 1, 16)}, "no keys"),
        (dict.fromkeys("qkv", torch.empty(1).expand(1, 1 << 22, 1, 512)), "2³¹"),
        (dict.fromkeys("qkv", torch.empty(1).expand(70000, 1, 1, 16)), "65535"),
    ],
)
def test_reasons(change, said):
    """What the kernel cannot take is an error when it is demanded."""
    given = {"q": normal(1, 4, 1, 16), "k": normal(1, 4, 1, 16), "v": normal(1, 4, 1, 16)} | change
    with kernels.backend("triton"), pytest.raises(RuntimeError, match=said):
        kernels.attention(**given)


@pytest.mark.parametrize(
    "change",
    [
        {"k": normal(1, 4, 1, 24)},
        {"v": normal(1, 5, 1, 16)},
        {"bias": normal(1, 1, 4, 5)},
        {"bias": torch.ones(1, 1, 4, 4, dtype=torch.bool)},
        {"key_mask": torch.ones(1, 4)},
        {"key_mask": torch.ones(1, 5, dtype=torch.bool)},
    ],
)
def test_shapes_that_do_not_fit(change):
    given = {"q": normal(1, 4, 1, 16), "k": normal(1, 4, 1, 16), "v": normal(1, 4, 1, 16)} | change
    with kernels.backend("triton"), pytest.raises(ValueError, match="attention:"):
        kernels.attention(**given)
