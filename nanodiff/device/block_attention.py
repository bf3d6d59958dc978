"""Attention on a CPU by blocks of queries, whose products are oneDNN's.

PyTorch's fused kernel (FlashAttention's scheme, Dao et al. 2022, arXiv 2205.14135, a head a thread) multiplies far below the rate of an AMD's cores, which
oneDNN reaches. So a head's scores are made a block of queries at a time, as many as stay in the caches, and given to oneDNN. Scores are multiplied, and
softmax and its gradient taken, in fp32, as in the fused kernel; the probabilities are rounded to the type before they weigh the values, as there.
"""

import functools
import itertools
import platform

import torch

from nanodiff.device import onednn

SCORES = 1 << 20  # of an attention's block, for every two threads: 4 MB in fp32, which stay in the caches
LEAST_ROWS = 64  # of such a block, however many keys there are
LEAST_SCORES = 5 << 20  # multiplications of a head's scores from which blocks pay,
LEAST_LEARNED = 32 << 20  # with gradients,
LEAST_KEYS = 64  # and keys
MOST_THREADS = 8  # a head is one thread's work in the fused kernel, and all threads' here, which was measured with two


@functools.cache
def quicker(dtype):
    """Whether attention() is the quicker way on this processor. A table, never a measurement, on which bytes would hang: heads of 40 over 4,096
    places took 0.6 (bf16) and 0.75 (fp32) of the fused kernel's time on an AMD with AVX-512, and an Intel with AMX has a fast fused kernel."""
    vendor = onednn.cpuinfo().get("vendor_id") or platform.processor()
    if "AuthenticAMD" not in vendor or onednn.unusable(dtype):
        return False
    return dtype == torch.float32 or (dtype == torch.bfloat16 and onednn.computes_bf16())


def attends(q, k, v):
    """Whether attention() may take these, and pays: q [B, L, N, K], k and v [B, S, N, K]."""
    (B, L, N, K), S = q.shape, k.shape[1]
    learns = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad or v.requires_grad)
    if (
        q.device.type != "cpu"
        or any(map(onednn.traced, (q, k, v)))
        or (LEAST_LEARNED if learns else LEAST_SCORES) > L * S * K
        or S < LEAST_KEYS
    ):
        return False
    if not (k.shape == v.shape == (B, S, N, K) and q.dtype == k.dtype == v.dtype):
        return False
    cast = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") != q.dtype
    return not cast and torch.get_num_threads() <= MOST_THREADS and quicker(q.dtype)


def attention(q, k, v, scale=None):
    """softmax(q kᵀ · scale) v, a head and a block of queries after the other: q [B, L, N, K], k v [B, S, N, K], fp32 or bf16 -> [B, L, N, K].
    scale: default 1/√K."""
    return _Attention.apply(q, k, v, q.shape[-1] ** -0.5 if scale is None else scale)


def _blocks(q, S):
    """(picture, head, slice of queries) of all blocks."""
    B, L, N, _ = q.shape
    rows = min(L, max(LEAST_ROWS, SCORES * max(1, torch.get_num_threads() // 2) // S))
    starts = range(0, L, rows)
    return ((b, n, slice(i, i + rows)) for b, n, i in itertools.product(range(B), range(N), starts))


def _exact(x):
    """[B, L, N, K] -> [B, N, L, K] in fp32."""
    return x.transpose(1, 2).float().contiguous()


class _Attention(torch.autograd.Function):
    """attention() and its gradient, of which no more is kept than q, k, v and what came out."""

    @staticmethod
    def forward(ctx, q, k, v, scale):
        out = torch.empty_like(q, memory_format=torch.contiguous_format)
        queries, keys = _exact(q), _exact(k) * scale  # [B, N, L, K], [B, N, S, K]
        values = v.permute(0, 2, 3, 1).contiguous()  # [B, N, K, S]
        for b, n, rows in _blocks(q, k.shape[1]):
            scores = onednn.product(queries[b, n, rows], keys[b, n])  # [rows, S]
            out[b, rows, n] = onednn.product(scores.softmax(-1).to(q.dtype), values[b, n])
        ctx.save_for_backward(q, k, v, out)
        ctx.scale = scale
        return out

    @staticmethod
    def backward(ctx, dout):
        """With P = softmax(S), S = q kᵀ · scale, of a block: dv += Pᵀ dout; dS = P (dout vᵀ - Σ dout · out); dq = dS k · scale; dk += dSᵀ q · scale
        (FlashAttention, appendix B.4). P is made again, as the fused kernel does."""
        if torch.is_grad_enabled():
            raise RuntimeError("attention by blocks (device/block_attention.py) has no second gradient")
        q, k, v, out = ctx.saved_tensors
        queries, keys, values, slopes = _exact(q), _exact(k) * ctx.scale, _exact(v), _exact(dout)  # [B, N, L or S, K]
        mean = (slopes * _exact(out)).sum(-1, keepdim=True)  # [B, N, L, 1]
        q_columns, slope_columns = (x.permute(0, 2, 3, 1).contiguous() for x in (q, dout))  # [B, N, K, L]
        k_columns = keys.transpose(2, 3).to(q.dtype).contiguous()  # [B, N, K, S]
        dq = torch.empty_like(q, memory_format=torch.contiguous_format)
        # [B, N, K, S]
        dk, dv = (torch.zeros_like(keys.transpose(2, 3), memory_format=torch.contiguous_format) for _ in range(2))
        for b, n, rows in _blocks(q, k.shape[1]):
            p = onednn.product(queries[b, n, rows], keys[b, n]).softmax(-1)  # [rows, S]
            ds = onednn.product(slopes[b, n, rows], values[b, n]).sub_(mean[b, n, rows]).mul_(p).to(q.dtype)
            dq[b, rows, n] = onednn.product(ds, k_columns[b, n])
            dk[b, n] += onednn.product(q_columns[b, n][:, rows], ds.t())
            dv[b, n] += onednn.product(slope_columns[b, n][:, rows], p.to(q.dtype).t())
        dk, dv = ((x * s).permute(0, 3, 1, 2).to(q.dtype) for x, s in ((dk, ctx.scale), (dv, 1.0)))  # [B, S, N, K]
        return dq, dk, dv, None
