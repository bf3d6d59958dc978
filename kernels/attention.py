"""Attention: o = softmax(q kᵀ · scale + bias) v, forward and backward, without ever writing the [L, S] scores.

The mathematics
    s_ij = scale · q_i·k_j + bias_ij  (−∞ where key j is hidden from query i)      lse_i = log Σ_j exp s_ij
    p_ij = exp(s_ij − lse_i)                                                       o_i = Σ_j p_ij v_j

Forward: keys come in blocks. A running maximum m and sum l are corrected by exp(m_old − m_new) whenever a block raises
the maximum (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135, algorithm 1). With m in
units of log 2, exp becomes the hardware's exp2. Up to 128 keys (a prompt of 77) fit on chip at once: then it is the
plain softmax, keys and values are read once for many rows of queries, and nothing is ever corrected.

Backward: only lse is kept; p is computed again (Dao 2023, arXiv 2307.08691, algorithm 2). With do the gradient of o,
    dv_j = Σ_i p_ij do_i        ds_ij = p_ij (do_i·v_j − Δ_i),  Δ_i = do_i·o_i − dlse_i
    dq_i = scale Σ_j ds_ij k_j      dk_j = scale Σ_i ds_ij q_i      dbias_ij = ds_ij, summed over what shares it
One kernel owns blocks of keys (dk, dv), one blocks of queries (dq), one blocks of the bias: every number is added up by
one program in one order, so the result is the same, bit for bit, at every call. Nothing is added atomically.

Head sizes that are no power of two are taken as two parts (40 = 32 + 16 with 8 masked, 80 = 64 + 16, 160 = 128 + 32):
padding to 64, 128, 256 would waste up to 1.6 times the work. Strides are arbitrary, so q, k and v may be views of one
projection [B, L, 3, N, K].

Shapes: q, o [B, L, N, K]; k, v [B, S, M, K] with N a multiple of M (grouped queries: Ainslie et al. 2023, arXiv
2305.13245); bias [1 or B, 1 or N, L, S]; key_mask [B, S], true where a key may be seen; lse [B, N, L] in fp32.

Explained in the book (docs/book): chapter 6.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

from .launch import Launch, kept, planned
from .switch import architecture, cdiv, halves, mode, on_device, power_of_2, span, tl, triton, tuned, use

LOG2E = tl.constexpr(math.log2(math.e))
FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ANY = [*FUSED.values(), SDPBackend.MATH]  # where that one cannot take a tensor
SHORT = 128  # up to so many keys are held on chip whole (16-bit types, heads up to 256)


# 2. The plain reference ------------------------------------------------------------------------------------


def visible(L, S, causal, window, key_mask=None, device=None):
    """[1 or B, 1, L, S] true where query i may see key j, or None where all may see all."""
    if not (causal or window or key_mask is not None):
        return None
    distance = torch.arange(L, device=device)[:, None] + (S - L) - torch.arange(S, device=device)  # j lies so far back
    seen = torch.ones(L, S, dtype=torch.bool, device=device)
    if causal:
        seen = seen & (distance >= 0)
    if window:
        seen = seen & (distance.abs() < window)
    return seen[None, None] if key_mask is None else seen & key_mask[:, None, None]


def attention_reference(q, k, v, causal=False, scale=None, bias=None, key_mask=None, window=0):
    """(o [B, L, N, K], lse [B, N, L]) by the formulas above, one after the other, in the type of the inputs."""
    L, S, groups = q.shape[1], k.shape[1], q.shape[2] // k.shape[2]
    q, k, v = (x.transpose(1, 2) for x in (q, k.repeat_interleave(groups, 2), v.repeat_interleave(groups, 2)))
    s = q @ k.transpose(-1, -2) * (scale or q.shape[-1] ** -0.5)
    s = s if bias is None else s + bias
    seen = visible(L, S, causal, window, key_mask, q.device)
    s = s if seen is None else s.masked_fill(~seen, -torch.inf)
    lse = s.logsumexp(-1)
    p = (s - lse.masked_fill(lse.isneginf(), 0.0)[..., None]).exp()  # a query that sees nothing gives zeros
    return (p @ v).transpose(1, 2), lse


# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _known(s_b, s_row, s_n, ALIGN: tl.constexpr):
    """Three strides that are multiples of ALIGN, in a form from which the compiler sees it: 16 bytes then go at once."""
    if ALIGN > 1:
        s_b, s_row, s_n = s_b // ALIGN * ALIGN, s_row // ALIGN * ALIGN, s_n // ALIGN * ALIGN
    return s_b, s_row, s_n


@triton.jit
def _tile(p, o_row, s_row, o_col, s_col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """p[o_row, o_col]; zeros beyond `rows` and `cols`, checked where ROWS and COLS say that these can be crossed."""
    p += o_row[:, None] * s_row + o_col[None, :] * s_col
    if ROWS and COLS:
        x = tl.load(p, mask=(o_row[:, None] < rows) & (o_col[None, :] < cols), other=0.0)
    elif ROWS:
        x = tl.load(p, mask=o_row[:, None] < rows, other=0.0)
    elif COLS:
        x = tl.load(p, mask=o_col[None, :] < cols, other=0.0)
    else:
        x = tl.load(p)
    return x


@triton.jit
def _heads(p, o_row, s_row, s_col, rows, cols, ROWS: tl.constexpr, K: tl.constexpr, D0: tl.constexpr,
           D1: tl.constexpr):  # fmt: skip
    """Rows of one head as two tiles [rows, D0] and [rows, D1]; the first one twice when one holds all of K."""
    x0 = _tile(p, o_row, s_row, tl.arange(0, D0), s_col, rows, cols, ROWS, D0 > K)
    x1 = x0
    if D1 > 0:
        x1 = _tile(p, o_row, s_row, D0 + tl.arange(0, D1), s_col, rows, cols, ROWS, D0 + D1 > K)
    return x0, x1


@triton.jit
def _store(p, x0, x1, o_row, s_row, rows, cols, D0: tl.constexpr, D1: tl.constexpr):
    """The inverse of _heads() into a tensor whose last axis is contiguous."""
    o_d = tl.arange(0, D0)
    p += o_row[:, None] * s_row
    tl.store(p + o_d[None, :], x0.to(p.dtype.element_ty), mask=(o_row[:, None] < rows) & (o_d[None, :] < cols))
    if D1 > 0:
        o_d = D0 + tl.arange(0, D1)
        tl.store(p + o_d[None, :], x1.to(p.dtype.element_ty), mask=(o_row[:, None] < rows) & (o_d[None, :] < cols))


@triton.jit
def _product(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ over both parts of the head."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def _product_wide(p_a, o_a, s_a, s_ad, rows_a, p_b, o_b, s_b, s_bd, rows_b, K, PRECISION: tl.constexpr):
    """a bᵀ of heads too wide to be held: both come 32 columns at a time."""
    s = tl.zeros([o_a.shape[0], o_b.shape[0]], tl.float32)
    for start in range(0, K, 32):
        o_d = start + tl.arange(0, 32)
        a = _tile(p_a, o_a, s_a, o_d, s_ad, rows_a, K, True, True)
        s = tl.dot(a, tl.trans(_tile(p_b, o_b, s_b, o_d, s_bd, rows_b, K, True, True)), s, input_precision=PRECISION)
    return s


@triton.jit
def _seen(o_l, o_s, L, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """visible() of a tile; the last query sees the last key, so the diagonal is shifted by S − L."""
    ok = o_s < S
    if CAUSAL:
        ok = ok & (o_s <= o_l + S - L)
    if WINDOW > 0:
        ok = ok & (o_s > o_l + S - L - WINDOW) & (o_s < o_l + S - L + WINDOW)
    return ok


@triton.jit
def _keys_range(start, rows, L, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """(lo, full_lo, full_hi, hi): keys that queries start … start + rows − 1 see at all, and between them the whole
    blocks that every one of these queries sees entirely."""
    first, last = start + S - L, start + rows - 1 + S - L  # the diagonal
    lo, full_lo, full_hi, hi = 0, 0, S, S
    if CAUSAL:
        hi = tl.minimum(hi, last + 1)
        full_hi = tl.minimum(full_hi, first + 1)
    if WINDOW > 0:
        lo = tl.maximum(lo, first - WINDOW + 1) // BLOCK * BLOCK
        full_lo = (tl.maximum(0, last - WINDOW + 1) + BLOCK - 1) // BLOCK * BLOCK
        hi = tl.minimum(hi, last + WINDOW)
        full_hi = tl.minimum(full_hi, first + WINDOW)
    full_hi = tl.maximum(full_hi, 0) // BLOCK * BLOCK
    full_lo = tl.minimum(full_lo, tl.maximum(hi, 0) + BLOCK - 1) // BLOCK * BLOCK
    return lo, full_lo, tl.maximum(full_hi, full_lo), hi


@triton.jit
def _forward_blocks(acc0, acc1, m_i, l_i, q0, q1, p_q, s_ql, s_qd, k0_from, k1_from, v0_from, v1_from, s_ks, s_kd, s_vs,
                    s_vd, p_bias, s_bl, s_bs, p_mask, s_ms, lo, hi, o_l, L, S, scale, cols, K: tl.constexpr,
                    HELD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_S: tl.constexpr, BIAS: tl.constexpr,
                    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr,
                    PRECISION: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Keys lo … hi − 1 into the running softmax. EDGE: some of them may be hidden or beyond S."""
    for start in tl.range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        if WIDE:
            s = _product_wide(p_q, o_l, s_ql, s_qd, L, k0_from, o_s, s_ks, s_kd, S, K, PRECISION)
        elif TMA:
            k0 = k0_from.load([start, 0])
            k1 = k0
            if D1 > 0:
                k1 = k1_from.load([start, D0])
            s = _product(q0, q1, k0, k1, D1, PRECISION)
        else:
            k0, k1 = _heads(k0_from, o_s, s_ks, s_kd, S, cols, EDGE, HELD, D0, D1)
            s = _product(q0, q1, k0, k1, D1, PRECISION)
        unit = scale * LOG2E  # of a score, in units of log 2: without a bias, part of the multiply-add before exp2
        if BIAS:
            s = s * unit + LOG2E * _tile(p_bias, o_l, s_bl, o_s, s_bs, L, S, True, EDGE).to(tl.float32)
            unit = 1.0
        if EDGE:
            s = tl.where(_seen(o_l[:, None], o_s[None, :], L, S, CAUSAL, WINDOW), s, -float("inf"))
        if MASK:
            s = tl.where(tl.load(p_mask + o_s * s_ms, mask=o_s < S, other=0)[None, :] != 0, s, -float("inf"))
        m_new = tl.maximum(m_i, tl.max(s, 1) * unit)
        p = tl.exp2(s * unit - m_new[:, None])
        correction = tl.exp2(m_i - m_new)
        m_i = m_new
        l_i = l_i * correction + tl.sum(p, 1)
        if TMA:
            v0 = v0_from.load([start, 0])
            v1 = v0
            if D1 > 0:
                v1 = v1_from.load([start, D0])
        else:
            v0, v1 = _heads(v0_from, o_s, s_vs, s_vd, S, cols, EDGE, HELD, D0, D1)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, acc0 * correction[:, None], input_precision=PRECISION)
        if D1 > 0:
            acc1 = tl.dot(p, v1, acc1 * correction[:, None], input_precision=PRECISION)
    return acc0, acc1, m_i, l_i


@triton.jit
def _forward(p_q, p_k, p_v, p_bias, p_mask, p_out, p_lse, s_qb, s_ql, s_qn, s_qd, s_kb, s_ks, s_kn, s_kd, s_vb, s_vs,
             s_vn, s_vd, s_bb, s_bn, s_bl, s_bs, s_mb, s_ms, N, M, L, S, scale, K: tl.constexpr, D0: tl.constexpr,
             D1: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
             EDGE: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr,
             TMA: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """One block of queries of one head: grid [blocks of L, B·N, parts of K]. WIDE: D0 columns of o a program."""
    s_qb, s_ql, s_qn = _known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = _known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = _known(s_vb, s_vs, s_vn, ALIGN)
    HELD: tl.constexpr = 0 if WIDE else K  # columns that need no check: none when a program has but a part of them
    first = tl.program_id(2) * D0
    cols = K - first
    block = tl.program_id(0)
    if CAUSAL:  # the longest rows first, so that the last programs to start are short ones
        block = tl.num_programs(0) - 1 - block
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    n_k = (n // (N // M)).to(tl.int64)
    o_l = block * BLOCK_L + tl.arange(0, BLOCK_L)
    p_k += b * s_kb + n_k * s_kn
    p_v += b * s_vb + n_k * s_vn + first * s_vd
    p_bias += b * s_bb + n.to(tl.int64) * s_bn
    p_mask += b * s_mb
    p_q += b * s_qb + n.to(tl.int64) * s_qn
    q0, q1 = _heads(p_q, o_l, s_ql, s_qd, L, cols, True, HELD, D0, D1)
    k0_from, k1_from, v0_from, v1_from = p_k, p_k, p_v, p_v
    # Hopper's copy engine, which also fills with zeros beyond S and K. (Its companion, warp specialisation, is no option
    # here: Triton 3.7 refuses this loop with 4 warps on sm_90 and with 8 makes the same code as without.)
    if TMA:
        k0_from = tl.make_tensor_descriptor(p_k, [S, K], [s_ks, 1], [BLOCK_S, D0])
        v0_from = tl.make_tensor_descriptor(p_v, [S, K], [s_vs, 1], [BLOCK_S, D0])
        if D1 > 0:
            k1_from = tl.make_tensor_descriptor(p_k, [S, K], [s_ks, 1], [BLOCK_S, D1])
            v1_from = tl.make_tensor_descriptor(p_v, [S, K], [s_vs, 1], [BLOCK_S, D1])
        else:
            k1_from, v1_from = k0_from, v0_from

    acc0 = tl.zeros([BLOCK_L, D0], tl.float32)
    acc1 = tl.zeros([BLOCK_L, D1 if D1 > 0 else 16], tl.float32)
    # Finite, so that nothing needs a guard against ∞ − ∞; what lies below it counts as hidden.
    m_i, l_i = tl.full([BLOCK_L], -1e30, tl.float32), tl.zeros([BLOCK_L], tl.float32)
    lo, full_lo, full_hi, hi = _keys_range(block * BLOCK_L, BLOCK_L, L, S, CAUSAL, WINDOW, BLOCK_S)
    for part in tl.static_range(3):  # keys that are partly seen, wholly seen, partly seen
        start = lo if part == 0 else full_lo if part == 1 else full_hi
        stop = tl.minimum(full_lo, hi) if part == 0 else full_hi if part == 1 else hi
        if part == 1 or (part == 2 and EDGE) or (part == 0 and WINDOW > 0):
            acc0, acc1, m_i, l_i = _forward_blocks(
                acc0, acc1, m_i, l_i, q0, q1, p_q, s_ql, s_qd, k0_from, k1_from, v0_from, v1_from, s_ks, s_kd, s_vs,
                s_vd, p_bias, s_bl, s_bs, p_mask, s_ms, start, stop, o_l, L, S, scale, cols, K, HELD, D0, D1, BLOCK_S,
                BIAS, MASK, CAUSAL, WINDOW, part != 1, PRECISION, TMA, WIDE)  # fmt: skip

    row = 1 / tl.where(l_i == 0, 1.0, l_i)[:, None]
    _store(p_out + (b * L * N + n) * K + first, acc0 * row, acc1 * row, o_l, N * K, L, cols, D0, D1)
    lse = tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) / LOG2E)
    tl.store(p_lse + (b * N + n) * L + o_l, lse, mask=o_l < L)


@triton.jit
def _short_scores(q0, q1, k0, k1, p_bias, s_bl, s_bs, p_mask, s_ms, o_l, o_s, L, S, scale, D1: tl.constexpr,
                  BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    s = _product(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
    if BIAS:
        s += LOG2E * _tile(p_bias, o_l, s_bl, o_s, s_bs, L, S, True, True).to(tl.float32)
    if MASK:
        s = tl.where(tl.load(p_mask + o_s * s_ms, mask=o_s < S, other=0)[None, :] != 0, s, -float("inf"))
    return tl.where(_seen(o_l[:, None], o_s[None, :], L, S, CAUSAL, WINDOW), s, -float("inf"))


@triton.jit
def _forward_short(p_q, p_k, p_v, p_bias, p_mask, p_out, p_lse, s_qb, s_ql, s_qn, s_qd, s_kb, s_ks, s_kn, s_kd, s_vb,
                   s_vs, s_vn, s_vd, s_bb, s_bn, s_bl, s_bs, s_mb, s_ms, N, M, L, S, scale, K: tl.constexpr,
                   D0: tl.constexpr, D1: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
                   WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, S0: tl.constexpr,
                   S1: tl.constexpr, LOOPS: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """All S ≤ S0 + S1 keys on chip, for LOOPS blocks of queries: grid [blocks of L / LOOPS, B·N]. 77 keys = 64 + 16."""
    s_qb, s_ql, s_qn = _known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = _known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = _known(s_vb, s_vs, s_vn, ALIGN)
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    n_k = (n // (N // M)).to(tl.int64)
    p_q += b * s_qb + n.to(tl.int64) * s_qn
    p_k += b * s_kb + n_k * s_kn
    p_v += b * s_vb + n_k * s_vn
    p_bias += b * s_bb + n.to(tl.int64) * s_bn
    p_mask += b * s_mb
    o_s = tl.arange(0, S0)
    k0, k1 = _heads(p_k, o_s, s_ks, s_kd, S, K, True, K, D0, D1)
    v0, v1 = _heads(p_v, o_s, s_vs, s_vd, S, K, True, K, D0, D1)
    if S1 > 0:
        o_t = S0 + tl.arange(0, S1)
        kt0, kt1 = _heads(p_k, o_t, s_ks, s_kd, S, K, True, K, D0, D1)
        vt0, vt1 = _heads(p_v, o_t, s_vs, s_vd, S, K, True, K, D0, D1)
    for i in range(LOOPS):
        o_l = (tl.program_id(0) * LOOPS + i) * BLOCK_L + tl.arange(0, BLOCK_L)
        q0, q1 = _heads(p_q, o_l, s_ql, s_qd, L, K, True, K, D0, D1)
        s = _short_scores(q0, q1, k0, k1, p_bias, s_bl, s_bs, p_mask, s_ms, o_l, o_s, L, S, scale, D1, BIAS, MASK,
                          CAUSAL, WINDOW, PRECISION)  # fmt: skip
        m_i = tl.maximum(tl.max(s, 1), -1e30)
        if S1 > 0:
            t = _short_scores(q0, q1, kt0, kt1, p_bias, s_bl, s_bs, p_mask, s_ms, o_l, o_t, L, S, scale, D1, BIAS,
                              MASK, CAUSAL, WINDOW, PRECISION)  # fmt: skip
            m_i = tl.maximum(m_i, tl.max(t, 1))
        p = tl.exp2(s - m_i[:, None])
        l_i = tl.sum(p, 1)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, input_precision=PRECISION)
        acc1 = acc0
        if D1 > 0:
            acc1 = tl.dot(p, v1, input_precision=PRECISION)
        if S1 > 0:
            p = tl.exp2(t - m_i[:, None])
            l_i += tl.sum(p, 1)
            p = p.to(v0.dtype)
            acc0 = tl.dot(p, vt0, acc0, input_precision=PRECISION)
            if D1 > 0:
                acc1 = tl.dot(p, vt1, acc1, input_precision=PRECISION)
        row = 1 / tl.where(l_i == 0, 1.0, l_i)[:, None]
        _store(p_out + (b * L * N + n) * K, acc0 * row, acc1 * row, o_l, N * K, L, K, D0, D1)
        lse = tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) / LOG2E)
        tl.store(p_lse + (b * N + n) * L + o_l, lse, mask=o_l < L)


@triton.jit
def _delta(p_out, p_dout, p_dlse, p_delta, s_gb, s_gl, s_gn, s_gd, N, L, K: tl.constexpr, D0: tl.constexpr,
           D1: tl.constexpr, BLOCK_L: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Δ = Σ_d do·o − dlse: grid [blocks of L, B·N]."""
    s_gb, s_gl, s_gn = _known(s_gb, s_gl, s_gn, ALIGN)
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    o0, o1 = _heads(p_out + (b * L * N + n) * K, o_l, N * K, 1, L, K, True, K, D0, D1)
    g0, g1 = _heads(p_dout + b * s_gb + n.to(tl.int64) * s_gn, o_l, s_gl, s_gd, L, K, True, K, D0, D1)
    delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)
    if D1 > 0:
        delta += tl.sum(o1.to(tl.float32) * g1.to(tl.float32), 1)
    p_row = (b * N + n) * L + o_l
    delta -= tl.load(p_dlse + p_row, mask=o_l < L, other=0.0)
    tl.store(p_delta + p_row, delta, mask=o_l < L)


@triton.jit
def _row_terms(p_lse, p_delta, o_l, L):
    """(lse in units of log 2, Δ) of some queries. +∞ where a query sees nothing or does not exist: then p = 0."""
    lse = tl.load(p_lse + o_l, mask=o_l < L, other=-float("inf"))
    return tl.where(lse == -float("inf"), float("inf"), lse * LOG2E), tl.load(p_delta + o_l, mask=o_l < L, other=0.0)


@triton.jit
def _backward_kv(p_q, p_k, p_v, p_bias, p_mask, p_dout, p_lse, p_delta, p_dk, p_dv, s_qb, s_ql, s_qn, s_qd, s_kb, s_ks,
                 s_kn, s_kd, s_vb, s_vs, s_vn, s_vd, s_bb, s_bn, s_bl, s_bs, s_mb, s_ms, s_gb, s_gl, s_gn, s_gd, B, N,
                 M, L, S, scale, per_split, parts, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
                 BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr,
                 PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr,
                 ALIGN: tl.constexpr):  # fmt: skip
    """dk and dv of one block of keys, from `per_split` queries: grid [blocks of S × parts of K, B·M, splits of L].

    Scores are held transposed [keys, queries], so that p and ds are left operands of the products they enter.
    """
    s_qb, s_ql, s_qn = _known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = _known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = _known(s_vb, s_vs, s_vn, ALIGN)
    s_gb, s_gl, s_gn = _known(s_gb, s_gl, s_gn, ALIGN)
    HELD: tl.constexpr = 0 if WIDE else K
    col = tl.program_id(0) % parts * D0
    cols = K - col
    b, n_k = (tl.program_id(1) // M).to(tl.int64), tl.program_id(1) % M
    first = tl.program_id(0) // parts * BLOCK_S
    o_s = first + tl.arange(0, BLOCK_S)
    p_k += b * s_kb + n_k.to(tl.int64) * s_kn
    p_v += b * s_vb + n_k.to(tl.int64) * s_vn
    if not WIDE:
        k0, k1 = _heads(p_k, o_s, s_ks, s_kd, S, cols, EDGE, K, D0, D1)
        v0, v1 = _heads(p_v, o_s, s_vs, s_vd, S, cols, EDGE, K, D0, D1)
    if MASK:
        kept = tl.load(p_mask + b * s_mb + o_s * s_ms, mask=o_s < S, other=0) != 0
    dk0, dv0 = tl.zeros([BLOCK_S, D0], tl.float32), tl.zeros([BLOCK_S, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_S, D1 if D1 > 0 else 16], tl.float32)
    dv1 = tl.zeros([BLOCK_S, D1 if D1 > 0 else 16], tl.float32)
    lo = tl.program_id(2) * per_split
    hi = tl.minimum(L, lo + per_split)
    if CAUSAL:
        lo = tl.maximum(lo, (first - (S - L)) // BLOCK_L * BLOCK_L)
    if WINDOW > 0:
        lo = tl.maximum(lo, (first - WINDOW + 1 - (S - L)) // BLOCK_L * BLOCK_L)
        hi = tl.minimum(hi, first + BLOCK_S - 1 + WINDOW - (S - L))
    for member in range(N // M):
        n = (n_k * (N // M) + member).to(tl.int64)
        p_qn, p_gn = p_q + b * s_qb + n * s_qn, p_dout + b * s_gb + n * s_gn
        p_ln, p_dn = p_lse + (b * N + n) * L, p_delta + (b * N + n) * L
        for start in tl.range(lo, hi, BLOCK_L):
            o_l = start + tl.arange(0, BLOCK_L)
            q0, q1 = _heads(p_qn + col * s_qd, o_l, s_ql, s_qd, L, cols, True, HELD, D0, D1)
            g0, g1 = _heads(p_gn + col * s_gd, o_l, s_gl, s_gd, L, cols, True, HELD, D0, D1)
            lse, delta = _row_terms(p_ln, p_dn, o_l, L)
            if WIDE:
                s = _product_wide(p_k, o_s, s_ks, s_kd, S, p_qn, o_l, s_ql, s_qd, L, K, PRECISION)
                dp = _product_wide(p_v, o_s, s_vs, s_vd, S, p_gn, o_l, s_gl, s_gd, L, K, PRECISION)
            else:
                s = _product(k0, k1, q0, q1, D1, PRECISION)
                dp = _product(v0, v1, g0, g1, D1, PRECISION)
            s *= scale * LOG2E
            if BIAS:
                p_b = p_bias + b * s_bb + n * s_bn
                s += LOG2E * _tile(p_b, o_s, s_bs, o_l, s_bl, S, L, True, True).to(tl.float32)
            p = tl.exp2(s - lse[None, :])
            if CAUSAL or WINDOW > 0:
                p = tl.where(_seen(o_l[None, :], o_s[:, None], L, S, CAUSAL, WINDOW), p, 0.0)
            if MASK:
                p = tl.where(kept[:, None], p, 0.0)
            ds = p * (dp - delta[None, :])
            p, ds = p.to(g0.dtype), ds.to(q0.dtype)
            dv0 = tl.dot(p, g0, dv0, input_precision=PRECISION)
            dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)
            if D1 > 0:
                dv1 = tl.dot(p, g1, dv1, input_precision=PRECISION)
                dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    base = ((tl.program_id(2) * B + b) * S * M + n_k) * K + col
    _store(p_dk + base, dk0 * scale, dk1 * scale, o_s, M * K, S, cols, D0, D1)
    _store(p_dv + base, dv0, dv1, o_s, M * K, S, cols, D0, D1)


@triton.jit
def _gradient(p_q, s_ql, s_qd, p_k, s_ks, s_kd, p_v, s_vs, s_vd, p_dout, s_gl, s_gd, lse, delta, p_bias, s_bl, s_bs,
              p_mask, s_ms, o_l, o_s, L, S, scale, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
              BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr,
              PRECISION: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """ds [queries, keys] of one tile. (What does not change from tile to tile, the compiler loads once.)"""
    if WIDE:
        s = _product_wide(p_q, o_l, s_ql, s_qd, L, p_k, o_s, s_ks, s_kd, S, K, PRECISION)
        dp = _product_wide(p_dout, o_l, s_gl, s_gd, L, p_v, o_s, s_vs, s_vd, S, K, PRECISION)
    else:
        q0, q1 = _heads(p_q, o_l, s_ql, s_qd, L, K, True, K, D0, D1)
        g0, g1 = _heads(p_dout, o_l, s_gl, s_gd, L, K, True, K, D0, D1)
        k0, k1 = _heads(p_k, o_s, s_ks, s_kd, S, K, EDGE, K, D0, D1)
        v0, v1 = _heads(p_v, o_s, s_vs, s_vd, S, K, EDGE, K, D0, D1)
        s = _product(q0, q1, k0, k1, D1, PRECISION)
        dp = _product(g0, g1, v0, v1, D1, PRECISION)
    s *= scale * LOG2E
    if BIAS:
        s += LOG2E * _tile(p_bias, o_l, s_bl, o_s, s_bs, L, S, True, True).to(tl.float32)
    p = tl.exp2(s - lse[:, None])
    if CAUSAL or WINDOW > 0 or EDGE:
        p = tl.where(_seen(o_l[:, None], o_s[None, :], L, S, CAUSAL, WINDOW), p, 0.0)
    if MASK:
        p = tl.where(tl.load(p_mask + o_s * s_ms, mask=o_s < S, other=0)[None, :] != 0, p, 0.0)
    return p * (dp - delta[:, None])


@triton.jit
def _backward_q(p_q, p_k, p_v, p_bias, p_mask, p_dout, p_lse, p_delta, p_dq, s_qb, s_ql, s_qn, s_qd, s_kb, s_ks, s_kn,
                s_kd, s_vb, s_vs, s_vn, s_vd, s_bb, s_bn, s_bl, s_bs, s_mb, s_ms, s_gb, s_gl, s_gn, s_gd, N, M, L, S,
                scale, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr,
                CAUSAL: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr, PRECISION: tl.constexpr,
                BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """dq of one block of queries: grid [blocks of L, B·N, parts of K]."""
    s_qb, s_ql, s_qn = _known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = _known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = _known(s_vb, s_vs, s_vn, ALIGN)
    s_gb, s_gl, s_gn = _known(s_gb, s_gl, s_gn, ALIGN)
    HELD: tl.constexpr = 0 if WIDE else K
    col = tl.program_id(2) * D0
    cols = K - col
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    n_k = (n // (N // M)).to(tl.int64)
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    lse, delta = _row_terms(p_lse + (b * N + n) * L, p_delta + (b * N + n) * L, o_l, L)
    p_q += b * s_qb + n.to(tl.int64) * s_qn
    p_dout += b * s_gb + n.to(tl.int64) * s_gn
    p_k += b * s_kb + n_k * s_kn
    p_v += b * s_vb + n_k * s_vn
    dq0 = tl.zeros([BLOCK_L, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_L, D1 if D1 > 0 else 16], tl.float32)
    lo, _, _, hi = _keys_range(tl.program_id(0) * BLOCK_L, BLOCK_L, L, S, CAUSAL, WINDOW, BLOCK_S)
    for start in tl.range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)
        ds = _gradient(p_q, s_ql, s_qd, p_k, s_ks, s_kd, p_v, s_vs, s_vd, p_dout, s_gl, s_gd, lse, delta,
                       p_bias + b * s_bb + n.to(tl.int64) * s_bn, s_bl, s_bs, p_mask + b * s_mb, s_ms, o_l, o_s, L, S, scale, K, D0,
                       D1, BIAS, MASK, CAUSAL, WINDOW, EDGE, PRECISION, WIDE)  # fmt: skip
        k0, k1 = _heads(p_k + col * s_kd, o_s, s_ks, s_kd, S, cols, EDGE, HELD, D0, D1)
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    _store(p_dq + (b * L * N + n) * K + col, dq0 * scale, dq1 * scale, o_l, N * K, L, cols, D0, D1)


@triton.jit
def _backward_bias(p_q, p_k, p_v, p_bias, p_mask, p_dout, p_lse, p_delta, p_dbias, s_qb, s_ql, s_qn, s_qd, s_kb, s_ks,
                   s_kn, s_kd, s_vb, s_vs, s_vn, s_vd, s_bb, s_bn, s_bl, s_bs, s_mb, s_ms, s_gb, s_gl, s_gn, s_gd, N,
                   M, L, S, scale, rows, heads, bias_heads, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
                   MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """dbias of one tile, summed over the `rows` of the batch and the `heads` that share it:
    grid [blocks of L, blocks of S, members of the bias]."""
    s_qb, s_ql, s_qn = _known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = _known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = _known(s_vb, s_vs, s_vn, ALIGN)
    s_gb, s_gl, s_gn = _known(s_gb, s_gl, s_gn, ALIGN)
    b0 = tl.program_id(2) // bias_heads * rows
    n0 = tl.program_id(2) % bias_heads * heads
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)
    total = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for member in range(rows * heads):
        b, n = (b0 + member // heads).to(tl.int64), (n0 + member % heads).to(tl.int64)
        n_k = n // (N // M)
        lse, delta = _row_terms(p_lse + (b * N + n) * L, p_delta + (b * N + n) * L, o_l, L)
        total += _gradient(p_q + b * s_qb + n * s_qn, s_ql, s_qd, p_k + b * s_kb + n_k * s_kn, s_ks, s_kd,
                           p_v + b * s_vb + n_k * s_vn, s_vs, s_vd, p_dout + b * s_gb + n * s_gn, s_gl, s_gd, lse,
                           delta, p_bias + b * s_bb + n * s_bn, s_bl, s_bs, p_mask + b * s_mb, s_ms, o_l, o_s, L, S,
                           scale, K, D0, D1, True, MASK, CAUSAL, WINDOW, True, PRECISION, WIDE)  # fmt: skip
    p_dbias += tl.program_id(2).to(tl.int64) * L * S + o_l[:, None] * S + o_s[None, :]
    tl.store(p_dbias, total.to(p_dbias.dtype.element_ty), mask=(o_l[:, None] < L) & (o_s[None, :] < S))


# 4. Autograd -----------------------------------------------------------------------------------------------


def columns(K, itemsize):
    """(D0, D1, parts, wide): how a head is held. fp32 heads above 64 are too wide for the registers: scores take their
    operands 32 columns at a time, and above 128 the result comes in parts of 128 columns, a program for each, which
    computes the scores again."""
    return (128, 0, cdiv(K, 128), True) if itemsize == 4 and K > 64 else (*halves(K), 1, False)


def config(kind, K, itemsize):
    """A configuration for GPUs that table.json does not know: at most 96 KB of shared memory.

    kind: forward, short, backward_kv, backward_q or backward_bias; forward, backward_kv and backward_q also with "_masked"
    (causal, window, bias or key mask). itemsize: bytes of an element.
    """
    D = sum(columns(K, itemsize)[:2])
    level = next(i for i, most in enumerate((64, 96, 128, 256, 512)) if most >= D)
    if kind == "short":
        rows = (128, 64, 64, 32, 16)[level] // (itemsize // 2)
        return {"BLOCK_L": max(16, rows), "LOOPS": 2, "num_warps": 4 if level == 0 else 8, "num_stages": 1}
    if kind.startswith("forward"):
        rows, keys = ((128, 64), (128, 32), (128, 32), (64, 32), (32, 16))[level]
    else:
        rows, keys = ((64, 64), (64, 32), (32, 32), (32, 32), (16, 16))[level]
        rows, keys = (keys, rows) if kind.startswith("backward_kv") else (rows, keys)
    if itemsize == 4:
        rows, keys = max(16, rows // 2), max(16, keys // 2)
    blocks = {"BLOCK_L": rows, "BLOCK_S": keys, "num_warps": 4 if level < 2 else 8, "num_stages": 2 if level < 3 else 1}
    return blocks | ({"TMA": False} if kind.startswith("forward") else {})


def keys_of(K, length, dtype):
    """Rows of table.json from special to general: head size, length up to 256, 1024, 4096 or more, dtype."""
    dtype = str(dtype).removeprefix("torch.")
    length = next((n for n in (256, 1024, 4096) if length <= n), 16384)
    return f"{K}/{length}/{dtype}", f"{K}/{dtype}"


def _config(kind, q, k, masked=False):
    (L, _, K), S = q.shape[1:], k.shape[1]
    kind = f"{kind}_masked" if masked else kind
    keys = keys_of(K, S if kind.startswith(("forward", "backward_q")) else L, q.dtype)
    found = tuned(f"attention.{kind}", keys, config(kind, K, q.element_size()))
    found.pop("TORCH", None)
    return found


def _faster(q, k, masked):
    """Which of PyTorch's own attentions the table of this GPU says to be faster for tensors like these (FUSED), or None."""
    short = k.shape[1] <= SHORT and q.shape[3] <= 256 and q.element_size() == 2
    if short and masked:  # of which nothing was measured
        return None
    kind, length = ("short", q.shape[1]) if short else ("forward_masked" if masked else "forward", k.shape[1])
    return tuned(f"attention.{kind}", keys_of(q.shape[3], length, q.dtype), {}).get("TORCH")


def precision():
    """How fp32 products are taken: exactly to fp32, by three tf32 products where the GPU has them, unless PyTorch has
    been told that one is enough."""
    if not architecture().startswith("sm_"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def _one_tf32(dtype):
    """What precision() rests on, as a part of a call's signature."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision


def _steps(*tensors):
    """Strides of the batches, rows and heads that there are."""
    return [s for t in tensors for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]


def _alignment(*tensors):
    """What the kernels must be told of these strides: that all are multiples of 16 bytes (in elements), or 1, nothing. Of
    multiples of 16 elements Triton knows itself. AMD's compiler makes spills of it, and nothing was measured there."""
    if architecture().startswith("gfx"):
        return 1
    steps, size = _steps(*tensors), 16 // tensors[0].element_size()
    return size if any(s % 16 for s in steps) and all(s % size == 0 for s in steps) else 1


def _in_step(k, v):
    """Do both start at multiples of 16 bytes?"""
    return (k.data_ptr() | v.data_ptr()) & 15 == 0


def _strides(bias, key_mask):
    """The four strides of the bias and the two of the mask: 0 where one value serves all, and where there is none."""
    of_bias = (0, 0, 0, 0)
    if bias is not None:
        shared = (0 if n == 1 else s for n, s in zip(bias.shape[:2], bias.stride()[:2], strict=True))
        of_bias = (*shared, *bias.stride()[2:])
    return (*of_bias, *((0, 0) if key_mask is None else key_mask.stride()))


def _given(bias, key_mask, like):
    """(bias, mask) as pointers: a dummy where there is none."""
    return like if bias is None else bias, like if key_mask is None else key_mask.view(torch.uint8)


def _flags(q, bias, key_mask, causal, window, *aligned):
    """Constants that the kernels share."""
    D0, D1, _, wide = columns(q.shape[-1], q.element_size())
    return {"K": q.shape[-1], "D0": D0, "D1": D1, "BIAS": bias is not None, "MASK": key_mask is not None, "CAUSAL": causal,
            "WINDOW": window, "PRECISION": precision(), "WIDE": wide, "ALIGN": _alignment(q, *aligned)}  # fmt: skip


def _forward_launch(q, k, v, bias, key_mask, scale, causal, window, in_step, _):
    """The Launch of forward() for tensors like these. in_step: k and v start at multiples of 16 bytes."""
    (B, L, N, K), (S, M) = q.shape, k.shape[1:3]
    flags = _flags(q, bias, key_mask, causal, window, k, v)
    numbers = (*q.stride(), *k.stride(), *v.stride(), *_strides(bias, key_mask), N, M, L, S, scale)
    if S <= SHORT and K <= 256 and q.element_size() == 2:
        del flags["WIDE"]
        cfg = _config("short", q, k)
        S0, S1 = halves(S)
        rows = min(cfg["BLOCK_L"], power_of_2(L))
        grid = (cdiv(L, rows * cfg["LOOPS"]), B * N)
        return Launch(_forward_short, grid, *numbers, **flags, **cfg | {"BLOCK_L": rows}, S0=S0, S1=S1)
    cfg = _config("forward", q, k, causal or window > 0 or bias is not None or key_mask is not None)
    if not cfg.pop("SPLIT", True) and not flags["WIDE"]:
        flags |= {"D0": power_of_2(K), "D1": 0}
    # Whether the copy engine can read these: last axis contiguous, everything else in steps of 16 bytes.
    if cfg["TMA"]:
        even = all(s * k.element_size() % 16 == 0 for s in _steps(k, v))
        cfg["TMA"] = in_step and even and k.stride(3) == v.stride(3) == 1 and not flags["WIDE"]
    edge = causal or window > 0 or S % cfg["BLOCK_S"] != 0
    parts = columns(K, q.element_size())[2]
    return Launch(_forward, (cdiv(L, cfg["BLOCK_L"]), B * N, parts), *numbers, **flags, **cfg, EDGE=edge)


def _scratch(size, align, stream):
    return torch.empty(size, dtype=torch.int8, device="cuda")


def _run(launch, q, k, v, bias, key_mask):
    """(o, lse) by that Launch."""
    B, L, N, K = q.shape
    out, lse = q.new_empty((B, L, N, K)), q.new_empty((B, N, L), dtype=torch.float32)
    if launch.constants.get("TMA"):  # descriptors lie in scratch memory; Triton forgets the allocator in another thread
        triton.set_allocator(_scratch)
    if bias is None and key_mask is None:
        launch(q, k, v, q, q, out, lse)
    else:
        launch(q, k, v, *_given(bias, key_mask, q), out, lse)
    return out, lse


@on_device
def forward(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    bias: Tensor | None,
    key_mask: Tensor | None,
    scale: float,
    causal: bool,
    window: int,
) -> tuple[Tensor, Tensor]:
    """(o, lse) by the kernels."""
    B, L, N, K = q.shape
    if L == 0 or B == 0:
        return q.new_empty(B, L, N, K), q.new_empty(B, N, L, dtype=torch.float32)
    settings = scale, causal, window, _in_step(k, v), _one_tf32(q.dtype)
    return _run(kept(_forward_launch, q, k, v, bias, key_mask, *settings), q, k, v, bias, key_mask)


op = torch.library.custom_op("nanodiff::attention", forward, mutates_args=())


@op.register_fake
def _(q, k, v, bias, key_mask, scale, causal, window):
    B, L, N, K = q.shape
    return q.new_empty(B, L, N, K), q.new_empty(B, N, L, dtype=torch.float32)


def splits(L, S, BLOCK_L, BLOCK_S, members):
    """Into how many parts the queries are cut for dk and dv, so that few keys (a prompt's 77) still fill a GPU: a rule of
    shapes and tiles alone, so the sums keep their order from call to call."""
    programs = cdiv(S, BLOCK_S) * members
    return max(1, min(256 // programs, cdiv(L, 4 * BLOCK_L)))


def _backward_launches(q, k, v, bias, key_mask, dout, scale, causal, window, want_bias, _):
    """(Δ, dk and dv, dq, dbias or None, parts into which the queries are cut) for tensors like these."""
    (B, L, N, K), (S, M) = q.shape, k.shape[1:3]
    flags = _flags(q, bias, key_mask, causal, window, k, v, dout)
    parts = columns(K, q.element_size())[2]
    strides = (*q.stride(), *k.stride(), *v.stride(), *_strides(bias, key_mask), *dout.stride())
    H0, H1 = halves(K)
    rows = min(power_of_2(L), max(16, 2048 // H0))
    delta = Launch(_delta, (cdiv(L, rows), B * N), *dout.stride(), N, L, K=K, D0=H0, D1=H1, BLOCK_L=rows,
                   ALIGN=_alignment(dout))  # fmt: skip
    masked = causal or window > 0 or bias is not None or key_mask is not None

    cfg = _config("backward_kv", q, k, masked)
    cuts = splits(L, S, cfg["BLOCK_L"], cfg["BLOCK_S"], B * M * parts)
    per_split = cdiv(cdiv(L, cuts), cfg["BLOCK_L"]) * cfg["BLOCK_L"]
    cuts = cdiv(L, per_split)
    kv = Launch(_backward_kv, (cdiv(S, cfg["BLOCK_S"]) * parts, B * M, cuts), *strides, B, N, M, L, S, scale, per_split,
                parts, **flags, **cfg, EDGE=S % cfg["BLOCK_S"] != 0)  # fmt: skip

    cfg = _config("backward_q", q, k, masked)
    of_q = Launch(_backward_q, (cdiv(L, cfg["BLOCK_L"]), B * N, parts), *strides, N, M, L, S, scale, **flags, **cfg,
                  EDGE=S % cfg["BLOCK_S"] != 0)  # fmt: skip

    of_bias = None
    if want_bias:
        cfg = _config("backward_bias", q, k)
        members, heads = bias.shape[:2]
        flags = {n: f for n, f in flags.items() if n != "BIAS"} | {"WIDE": flags["WIDE"] or K > 128}
        grid = (cdiv(L, cfg["BLOCK_L"]), cdiv(S, cfg["BLOCK_S"]), members * heads)
        of_bias = Launch(
            _backward_bias, grid, *strides, N, M, L, S, scale, B // members, N // heads, heads, **flags, **cfg
        )
    return delta, kv, of_q, of_bias, cuts


@on_device
def backward(
    q: Tensor, k: Tensor, v: Tensor, bias: Tensor | None, key_mask: Tensor | None, out: Tensor, lse: Tensor, dout: Tensor,
    dlse: Tensor | None, scale: float, causal: bool, window: int, want_bias: bool
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dq, dk, dv, dbias) by the kernels; dbias is empty unless `want_bias`."""
    (B, L, N, K), (S, M) = q.shape, k.shape[1:3]
    dq = q.new_empty(B, L, N, K)
    dbias = bias.new_empty(bias.shape) if want_bias else q.new_empty(0)
    if L == 0 or B == 0:
        return dq, k.new_zeros(B, S, M, K), v.new_zeros(B, S, M, K), dbias.zero_()
    of_delta, of_kv, of_q, of_bias, cuts = kept(_backward_launches, q, k, v, bias, key_mask, dout, scale, causal, window,
                                                want_bias, _one_tf32(q.dtype))  # fmt: skip
    delta = torch.empty_like(lse)
    of_delta(out, dout, torch.zeros_like(lse) if dlse is None else dlse.contiguous(), delta)
    inputs = (q, k, v, *_given(bias, key_mask, q), dout, lse, delta)
    dk, dv = (x.new_empty(cuts, B, S, M, K, dtype=x.dtype if cuts == 1 else torch.float32) for x in (k, v))
    of_kv(*inputs, dk, dv)
    dk, dv = (x[0] if cuts == 1 else x.sum(0).to(k.dtype) for x in (dk, dv))
    of_q(*inputs, dq)
    if want_bias:
        of_bias(*inputs, dbias)
    return dq, dk, dv, dbias


backward_op = torch.library.custom_op("nanodiff::attention_backward", backward, mutates_args=())


@backward_op.register_fake
def _(q, k, v, bias, key_mask, out, lse, dout, dlse, scale, causal, window, want_bias):
    dbias = bias.new_empty(bias.shape) if want_bias else q.new_empty(0)
    return q.new_empty(q.shape), k.new_empty(k.shape), v.new_empty(v.shape), dbias


def _setup(ctx, inputs, output):
    q, k, v, bias, key_mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, bias, key_mask, *output)


def _backward(ctx, dout, dlse):
    q, k, v, bias, key_mask, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    want_bias = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = backward_op(q, k, v, bias, key_mask, out, lse, dout, dlse, *ctx.options, want_bias)
    return dq, dk, dv, dbias if want_bias else None, None, None, None, None


op.register_autograd(_backward, setup_context=_setup)


# 5. The public function ------------------------------------------------------------------------------------


def _why_not(q, k, v, scale, bias, key_mask):
    """Why the kernel cannot take these, or None. Raises ValueError for what nobody can take."""
    _check(q, k, v, bias, key_mask)
    K = q.shape[-1]
    if q.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"attention is in {q.dtype}"
    if not q.dtype == k.dtype == v.dtype:
        return "attention mixes types"
    if not 1 <= K <= 512:
        return f"the head size is {K}, more than 512"
    if scale is not None and scale <= 0:
        return "attention has a negative scale"
    if k.shape[1] == 0:
        return "attention has no keys"
    if any(span(x, 1, 3) >= 2**31 for x in (q, k, v)) or math.prod(q.shape[1:]) >= 2**31:
        return "one head spans more than 2³¹ elements"
    if bias is not None and max(span(bias, 2, 3), bias.shape[2] * bias.shape[3]) >= 2**31:
        return "the bias spans more than 2³¹ elements"
    if q.shape[0] * q.shape[2] > 65535:
        return "there are more than 65535 heads, batch included"
    return None


def _check(q, k, v, bias, key_mask):
    B, L, N, K = q.shape
    _, S, M, _ = k.shape
    if k.shape != (B, S, M, K) or v.shape != k.shape or N % M:
        raise ValueError(f"attention: q {tuple(q.shape)}, k {tuple(k.shape)}, v {tuple(v.shape)} do not fit")
    if bias is not None and (bias.shape[0] not in (1, B) or bias.shape[1] not in (1, N) or bias.shape[2:] != (L, S)):
        raise ValueError(f"attention: bias {tuple(bias.shape)}, expected [1 or {B}, 1 or {N}, {L}, {S}]")
    if key_mask is not None and (key_mask.shape != (B, S) or key_mask.dtype != torch.bool):
        raise ValueError(f"attention: key_mask {tuple(key_mask.shape)} {key_mask.dtype}, expected bool [{B}, {S}]")


def _plain(q, k, v, causal, scale, bias, key_mask, window):
    """PyTorch's own fused attention, with as little around it as can be: small models wait for Python."""
    own_mask = window or key_mask is not None or (causal and (bias is not None or q.shape[1] != k.shape[1]))
    if own_mask:  # PyTorch knows causal masks of squares, alone
        seen = visible(q.shape[1], k.shape[1], causal, window, key_mask, q.device)
        bias = seen if bias is None else bias.masked_fill(~seen, -torch.inf)
        causal = False
    grouped = {"enable_gqa": True} if q.shape[2] != k.shape[2] else {}
    q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)
    out = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal, scale=scale, **grouped)
    return out.transpose(1, 2)


def _plan(q, k, v, bias, key_mask, causal, scale, window):
    """f(q, k, v, bias, key_mask, return_lse) -> (o, lse) for tensors like these without gradients, or None: see planned()."""
    if q.numel() == 0 or not use("attention", q, _why_not, q, k, v, scale, bias, key_mask):
        return None
    masked = causal or window > 0 or bias is not None or key_mask is not None
    number = q.shape[-1] ** -0.5 if scale is None else float(scale)
    launch = _forward_launch(q, k, v, bias, key_mask, number, causal, window, _in_step(k, v), None)

    @on_device
    def ours(q, k, v, bias, key_mask, return_lse):
        return _run(launch, q, k, v, bias, key_mask)

    theirs = _faster(q, k, masked) if mode() == "auto" else None
    if theirs is None:
        return ours

    def plan(q, k, v, bias, key_mask, return_lse):
        if return_lse:
            return ours(q, k, v, bias, key_mask, return_lse)
        with sdpa_kernel([FUSED[theirs], *ANY], set_priority=True):
            return _plain(q, k, v, causal, scale, bias, key_mask, window), None

    return plan


def attention(q, k, v, causal=False, scale=None, bias=None, key_mask=None, window=0, return_lse=False):
    """softmax(q kᵀ · scale + bias) v -> [B, L, N, K], and lse [B, N, L] in fp32 with `return_lse`.

    q [B, L, N, K], k v [B, S, M, K], N a multiple of M; fp32, fp16 or bf16, any strides. Differentiable in q, k, v and
    bias, and through lse. causal: query i sees key j ≤ i + S − L. scale: default 1/√K. bias: [1 or B, 1 or N, L, S],
    −∞ hides. key_mask: bool [B, S], true where a key may be seen. window: |i + S − L − j| < window; 0 is no window.
    A query that sees no key (or only scores below −1e30 / log 2, as a bias of finfo.min makes them) gives zeros and lse
    −∞ in the kernel; PyTorch's fallback leaves that case undefined.

    Raises ValueError for shapes that do not fit (the fallback: PyTorch's own errors) and for a bias that is no number,
    RuntimeError when the switch demands a kernel that cannot serve.
    """
    if bias is not None and not bias.is_floating_point():
        raise ValueError(f"attention: bias is {bias.dtype}; a boolean mask is no bias (key_mask, or 0 and -inf)")
    if (plan := planned(_plan, q, k, v, bias, key_mask, causal, scale, window)) is not None:
        out, lse = plan(q, k, v, bias, key_mask, return_lse)
    elif use("attention", q, _why_not, q, k, v, scale, bias, key_mask):
        scale = q.shape[-1] ** -0.5 if scale is None else float(scale)
        out, lse = op(q, k, v, bias, key_mask, scale, causal, window)
    elif return_lse:
        out, lse = attention_reference(q, k, v, causal, scale, bias, key_mask, window)
        lse = lse.float()
    else:
        out = _plain(q, k, v, causal, scale, bias, key_mask, window)
    return (out, lse) if return_lse else out
