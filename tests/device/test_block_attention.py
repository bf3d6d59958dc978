"""Attention by blocks of queries: against float64, with gradients; who takes it."""

import pytest
import torch
from torch import nn
from util import TINY, max_error, rms_ratio

from nanodiff import pipeline
from nanodiff.device import block_attention, onednn

pytestmark = pytest.mark.skipif(bool(onednn.unusable(torch.float32)), reason=str(onednn.unusable(torch.float32)))


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 0)


def usable(dtype):
    if reason := onednn.unusable(dtype):
        pytest.skip(reason)  # a CPU without AVX-512 multiplies no bf16


def small_blocks(monkeypatch, scores):
    monkeypatch.setattr(block_attention, "SCORES", scores)
    monkeypatch.setattr(block_attention, "LEAST_ROWS", 1)


def every_shape(test):
    """The test for types, shapes and sizes of block."""
    for names, values in (
        ("dtype", [torch.float32, torch.bfloat16]),
        (("L", "S", "N", "K"), [(37, 37, 3, 40), (50, 77, 2, 64), (33, 9, 1, 24), (1, 1, 1, 8)]),
        ("scores", [1 << 20, 300]),
    ):
        test = pytest.mark.parametrize(names, values)(test)
    return test


@every_shape
def test_attention_by_blocks(monkeypatch, dtype, L, S, N, K, scores):
    """Against fp64, as near as PyTorch's own: heads of any stride, the last block smaller than the others."""
    usable(dtype)
    small_blocks(monkeypatch, scores)
    q, k, v = (3 * torch.randn(2, n, N * K).to(dtype).unflatten(-1, (N, K)) for n in (L, S, S))
    for scale in (None, 0.3):
        theirs, want = (
            nn.functional.scaled_dot_product_attention(*(x.to(kind).transpose(1, 2) for x in (q, k, v)), scale=scale)
            for kind in (dtype, torch.float64)
        )
        got = block_attention.attention(q, k, v, scale)
        assert got.dtype == dtype and got.shape == q.shape
        bound = 1.3 * rms_ratio(theirs, want) + (1e-6 if dtype == torch.float32 else 1e-3)
        assert rms_ratio(got.transpose(1, 2), want) < bound


@every_shape
def test_gradients(monkeypatch, dtype, L, S, N, K, scores):
    usable(dtype)
    small_blocks(monkeypatch, scores)
    leaves = [(2 * torch.randn(2, n, N * K)).to(dtype).requires_grad_() for n in (L, S, S)]
    dout = torch.randn(2, N, L, K).transpose(1, 2).to(dtype)  # of a stride of its own
    for scale in (None, 0.3):
        found = {}
        for kind in (dtype, torch.float64):
            q, k, v = (x.to(kind).unflatten(-1, (N, K)).transpose(1, 2) for x in leaves)
            out = nn.functional.scaled_dot_product_attention(q, k, v, scale=scale).transpose(1, 2)
            found[kind] = torch.autograd.grad(out, leaves, dout.to(kind))
        out = block_attention.attention(*(x.unflatten(-1, (N, K)) for x in leaves), scale)
        got = torch.autograd.grad(out, leaves, dout)
        for mine, theirs, want in zip(got, found[dtype], found[torch.float64], strict=True):
            size = want.double().norm() / want.numel() ** 0.5
            assert mine.dtype == dtype
            if size > 1e-6:  # of one key the scores have no gradient
                assert rms_ratio(mine, want) < 1.3 * rms_ratio(theirs, want) + (
                    3e-6 if dtype == torch.float32 else 3e-3
                )
            else:
                assert mine.abs().max() < (1e-5 if dtype == torch.float32 else 3e-2)


def test_no_second_gradient():
    """It is refused, not left out."""
    x = torch.randn(1, 9, 2, 8, requires_grad=True)
    with pytest.raises(RuntimeError, match="no second gradient"):
        torch.autograd.grad(block_attention.attention(x, x, x).sum(), x, create_graph=True)


def test_who_attends_by_blocks(monkeypatch):
    monkeypatch.setattr(block_attention, "LEAST_SCORES", 8 * 8 * 16)
    monkeypatch.setattr(block_attention, "LEAST_KEYS", 8)
    monkeypatch.setattr(block_attention, "quicker", lambda dtype: dtype == torch.float32)
    q = torch.randn(1, 8, 2, 16)
    assert block_attention.attends(q, q, q)
    assert not block_attention.attends(q[:, 1:], q, q), "fewer than pay"
    assert not block_attention.attends(q, q[:, :1].expand(2, 8, 2, 16), q) and not block_attention.attends(
        q.repeat(2, 1, 1, 1), q, q
    )
    with torch.autocast("cpu", torch.bfloat16):
        assert not block_attention.attends(q, q, q), "PyTorch's own would compute in bf16"
    assert not block_attention.attends(q, q, q.double()) and not block_attention.attends(
        q, q, q[..., :8].repeat(1, 1, 1, 1)
    )
    monkeypatch.setattr(block_attention, "LEAST_SCORES", 0)
    assert not block_attention.attends(q, q[:, :7], q[:, :7]), "few keys"
    monkeypatch.setattr(block_attention, "LEAST_SCORES", 8 * 8 * 16)
    with monkeypatch.context() as m:
        m.setattr(torch, "get_num_threads", lambda: block_attention.MOST_THREADS + 1)
        assert not block_attention.attends(q, q, q)
    assert not block_attention.attends(*[q.bfloat16()] * 3) and not block_attention.attends(q, q.bfloat16(), q)
    assert not block_attention.attends(*[q.to("meta")] * 3)
    learns = q.clone().requires_grad_()
    for i in range(3):
        given = [learns if i == j else q for j in range(3)]
        assert not block_attention.attends(*given), "fewer than pay with gradients"
    with torch.no_grad():
        assert block_attention.attends(q, q, learns)
    monkeypatch.setattr(block_attention, "LEAST_LEARNED", 8 * 8 * 16)
    assert block_attention.attends(q, q, learns)


@pytest.mark.parametrize(("vendor", "computes", "want"), [("AuthenticAMD", True, "both"), ("AuthenticAMD", False, "fp32"), ("GenuineIntel", True, "none")])  # fmt: skip
def test_the_table_of_processors(monkeypatch, vendor, computes, want):
    monkeypatch.setattr(onednn, "cpuinfo", lambda: {"vendor_id": vendor})
    monkeypatch.setattr(onednn, "computes_bf16", lambda: computes)
    monkeypatch.setattr(onednn, "unusable", lambda dtype: None)
    got = [block_attention.quicker.__wrapped__(d) for d in (torch.float32, torch.bfloat16, torch.float16)]
    assert got == [want in ("both", "fp32"), want == "both", False]


def test_models_attend_by_blocks_where_nothing_is_hidden(monkeypatch):
    from nanodiff.models.layers import attend

    called = []
    real = block_attention.attention
    monkeypatch.setattr(block_attention, "attends", lambda q, k, v: True)
    monkeypatch.setattr(block_attention, "attention", lambda *a: called.append(1) or real(*a))
    q, k, v = torch.randn(2, 5, 32), torch.randn(2, 7, 32), torch.randn(2, 7, 32)
    heads = [x.double().unflatten(-1, (4, 8)).transpose(1, 2) for x in (q, k, v)]
    want = nn.functional.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
    assert rms_ratio(attend(q, k, v, 4), want) < 1e-6 and called == [1]
    attend(q, k, v, 4, key_mask=torch.ones(2, 7, dtype=torch.bool))
    attend(q, k, v, 4, bias=torch.zeros(1, 4, 5, 7))
    attend(q, q, q, 4, causal=True)
    assert called == [1]


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
@pytest.mark.parametrize("blocks", [False, True])
def test_pictures_are_the_same(monkeypatch, name, blocks):
    """A pipeline that may pack, and may attend by blocks, gives the picture of one that may not, twice, and can still be saved."""
    called, attention = [], block_attention.attention
    monkeypatch.setattr(block_attention, "attention", lambda *a: called.append(1) or attention(*a))
    monkeypatch.setattr(block_attention, "LEAST_SCORES", 0)
    monkeypatch.setattr(block_attention, "LEAST_KEYS", 0)
    monkeypatch.setattr(block_attention, "quicker", lambda dtype: False)
    plain, packing = pipeline.load(TINY / name), pipeline.load(TINY / name)
    packing.packs = True
    want = plain.generate(["a corgi"], steps=4, seeds=[1], height=64, width=64)
    monkeypatch.setattr(block_attention, "quicker", lambda dtype: blocks)
    for _ in range(2):
        got = packing.generate(["a corgi"], steps=4, seeds=[1], height=64, width=64)
        assert max_error(got.latents, want.latents) < 1e-4
    assert bool(called) == blocks
    assert any(type(m) in (onednn.PackedConv2d, onednn.PackedLinear) for m in packing.net.modules())
    assert not any(type(m) in onednn.PLAIN and type(m) is not onednn.DirectLinear for m in plain.net.modules())
