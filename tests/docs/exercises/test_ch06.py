"""Attention."""

import pytest
import torch

from kernels import switch

D = torch.float64
interpreted = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter")
ROUNDED = {"rtol": 1e-4, "atol": 1e-4}  # of 32 bits, in which the project's kernels compute


def drawn(*shape, seed=6):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed), dtype=D)


def test_attention(mine):
    q, k, v = drawn(2, 5, 8), drawn(2, 7, 8, seed=7), drawn(2, 7, 8, seed=8)
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v)
    torch.testing.assert_close(mine.attention(q, k, v), want)


@interpreted
@pytest.mark.parametrize("block", [1, 4, 7, 30])
def test_online_softmax(mine, block):
    scores, values = 5 * drawn(9, 23), drawn(23, 6, seed=9)
    scores[0] += 800  # exp of it overflows
    scores[1, 20] += 50  # the largest comes late
    scores[2, 0] += 50  # and early
    got = mine.online_softmax(scores, values, block)
    torch.testing.assert_close(got, scores.softmax(1) @ values, **ROUNDED)


@interpreted
def test_online_softmax_takes_a_block_at_a_time(mine):
    """Nothing is computed of more keys than a block has. (The project's kernel is no PyTorch function, and nothing is seen of it.)"""
    computing = {"matmul", "__matmul__", "mm", "einsum", "softmax", "logsumexp", "exp", "max", "amax", "sum", "maximum"}
    seen = []

    class Watch(torch.overrides.TorchFunctionMode):
        def __torch_function__(self, func, types, args=(), kwargs=None):
            if getattr(func, "__name__", "") in computing:
                seen.extend(side for t in args if torch.is_tensor(t) for side in t.shape)
            return func(*args, **(kwargs or {}))

    with Watch():
        mine.online_softmax(drawn(9, 64), drawn(64, 6, seed=9), 16)
    assert all(width <= 16 for width in seen), "more than one block at a time"


@interpreted
def test_online_softmax_reads_every_block(mine):
    """A value that is NaN in the last block makes every answer NaN: none is left out."""
    scores, values = drawn(3, 12), drawn(12, 2, seed=9)
    values[11] = float("nan")
    assert mine.online_softmax(scores, values, 4).isnan().all()


@interpreted
@pytest.mark.parametrize("shape", [(1, 1), (3, 16), (5, 77), (2, 300)])
def test_softmax_rows(mine, shape):
    x = 4 * drawn(*shape).float()
    x[0] += 100
    torch.testing.assert_close(mine.softmax_rows(x), x.softmax(1), rtol=1e-5, atol=1e-6)
