"""The backward kernels of attention: Δ, then dk and dv, dq, and dbias where it is wanted. The mathematics is in attention.py.

p is computed again, twice: once by the kernel that owns keys and once by that which owns queries. One kernel for both would have to
add either dq or dk and dv into memory from many programs at once, in an order that changes from run to run; five products in place of
seven, but the same seed would no longer give the same weights. So: _backward_kv() four products, _backward_q() three.

Explained in the book (docs/book): chapter 6.
"""

import torch
from torch import Tensor

from .attention_tiles import (
    LOG2E,
    alignment,
    columns,
    configured,
    flags_of,
    given,
    heads,
    keys_range,
    known,
    one_tf32,
    product,
    product_wide,
    seen,
    store,
    strides_of,
    tile,
)
from .launch import Launch, kept
from .switch import cdiv, halves, on_device, power_of_2, tl, triton

# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _delta(p_out, p_dout, p_dlse, p_delta, s_gb, s_gl, s_gn, s_gd, N, L, K: tl.constexpr, D0: tl.constexpr,
           D1: tl.constexpr, BLOCK_L: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """Δ = Σ_d do·o − dlse: grid [blocks of L, B·N].

    Σ_j p_ij (do_i·v_j), the mean that the softmax's gradient subtracts, without a look at any key: Σ_j p_ij v_j is o_i. A gradient of
    lse itself enters here too, since ∂lse_i/∂s_ij is p_ij."""
    s_gb, s_gl, s_gn = known(s_gb, s_gl, s_gn, ALIGN)
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)  # [queries]
    o0, o1 = heads(p_out + (b * L * N + n) * K, o_l, N * K, 1, L, K, True, K, D0, D1)  # [queries, D0], [queries, D1]
    g0, g1 = heads(p_dout + b * s_gb + n.to(tl.int64) * s_gn, o_l, s_gl, s_gd, L, K, True, K, D0, D1)  # do, as q
    delta = tl.sum(o0.to(tl.float32) * g0.to(tl.float32), 1)  # [queries]
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
    s_qb, s_ql, s_qn = known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = known(s_vb, s_vs, s_vn, ALIGN)
    s_gb, s_gl, s_gn = known(s_gb, s_gl, s_gn, ALIGN)
    HELD: tl.constexpr = 0 if WIDE else K
    col = tl.program_id(0) % parts * D0
    cols = K - col
    b, n_k = (tl.program_id(1) // M).to(tl.int64), tl.program_id(1) % M
    first = tl.program_id(0) // parts * BLOCK_S
    o_s = first + tl.arange(0, BLOCK_S)  # [keys]
    p_k += b * s_kb + n_k.to(tl.int64) * s_kn
    p_v += b * s_vb + n_k.to(tl.int64) * s_vn
    if not WIDE:
        k0, k1 = heads(p_k, o_s, s_ks, s_kd, S, cols, EDGE, K, D0, D1)  # [keys, D0], [keys, D1]
        v0, v1 = heads(p_v, o_s, s_vs, s_vd, S, cols, EDGE, K, D0, D1)  # [keys, D0], [keys, D1]
    # for all queries the same, so it is kept in registers like the keys
    if MASK:
        kept = tl.load(p_mask + b * s_mb + o_s * s_ms, mask=o_s < S, other=0) != 0
    dk0, dv0 = tl.zeros([BLOCK_S, D0], tl.float32), tl.zeros([BLOCK_S, D0], tl.float32)
    dk1 = tl.zeros([BLOCK_S, D1 if D1 > 0 else 16], tl.float32)
    dv1 = tl.zeros([BLOCK_S, D1 if D1 > 0 else 16], tl.float32)
    # which queries: this program's share of them, less those that see none of these keys
    lo = tl.program_id(2) * per_split
    hi = tl.minimum(L, lo + per_split)
    if CAUSAL:
        lo = tl.maximum(lo, (first - (S - L)) // BLOCK_L * BLOCK_L)
    if WINDOW > 0:
        lo = tl.maximum(lo, (first - WINDOW + 1 - (S - L)) // BLOCK_L * BLOCK_L)
        hi = tl.minimum(hi, first + BLOCK_S - 1 + WINDOW - (S - L))
    # grouped queries: all heads that look at these keys, one after the other into the same sums
    for member in range(N // M):
        n = (n_k * (N // M) + member).to(tl.int64)
        p_qn, p_gn = p_q + b * s_qb + n * s_qn, p_dout + b * s_gb + n * s_gn
        p_ln, p_dn = p_lse + (b * N + n) * L, p_delta + (b * N + n) * L
        for start in tl.range(lo, hi, BLOCK_L):
            o_l = start + tl.arange(0, BLOCK_L)  # [queries]
            # [queries, D0], [queries, D1]
            q0, q1 = heads(p_qn + col * s_qd, o_l, s_ql, s_qd, L, cols, True, HELD, D0, D1)
            g0, g1 = heads(p_gn + col * s_gd, o_l, s_gl, s_gd, L, cols, True, HELD, D0, D1)  # do, as q
            lse, delta = _row_terms(p_ln, p_dn, o_l, L)  # [queries] each
            if WIDE:
                s = product_wide(p_k, o_s, s_ks, s_kd, S, p_qn, o_l, s_ql, s_qd, L, K, PRECISION)
                dp = product_wide(p_v, o_s, s_vs, s_vd, S, p_gn, o_l, s_gl, s_gd, L, K, PRECISION)
            else:
                s = product(k0, k1, q0, q1, D1, PRECISION)  # [keys, queries]
                dp = product(v0, v1, g0, g1, D1, PRECISION)  # [keys, queries]: v_j·do_i
            # p as it was in the forward pass: no maximum is needed, lse has the whole denominator
            s *= scale * LOG2E
            if BIAS:
                p_b = p_bias + b * s_bb + n * s_bn
                s += LOG2E * tile(p_b, o_s, s_bs, o_l, s_bl, S, L, True, True).to(tl.float32)
            p = tl.exp2(s - lse[None, :])  # [keys, queries]
            if CAUSAL or WINDOW > 0:
                p = tl.where(seen(o_l[None, :], o_s[:, None], L, S, CAUSAL, WINDOW), p, 0.0)
            if MASK:
                p = tl.where(kept[:, None], p, 0.0)
            # the softmax's gradient, then dv += pᵀ do and dk += dsᵀ q, [BLOCK_S, BLOCK_L] times [BLOCK_L, D]
            ds = p * (dp - delta[None, :])
            p, ds = p.to(g0.dtype), ds.to(q0.dtype)
            dv0 = tl.dot(p, g0, dv0, input_precision=PRECISION)  # [keys, D0]
            dk0 = tl.dot(ds, q0, dk0, input_precision=PRECISION)  # [keys, D0]
            if D1 > 0:
                dv1 = tl.dot(p, g1, dv1, input_precision=PRECISION)
                dk1 = tl.dot(ds, q1, dk1, input_precision=PRECISION)
    # each split of the queries into a tensor of its own; they are added in order afterwards
    base = ((tl.program_id(2) * B + b) * S * M + n_k) * K + col
    store(p_dk + base, dk0 * scale, dk1 * scale, o_s, M * K, S, cols, D0, D1)
    store(p_dv + base, dv0, dv1, o_s, M * K, S, cols, D0, D1)


@triton.jit
def _gradient(p_q, s_ql, s_qd, p_k, s_ks, s_kd, p_v, s_vs, s_vd, p_dout, s_gl, s_gd, lse, delta, p_bias, s_bl, s_bs,
              p_mask, s_ms, o_l, o_s, L, S, scale, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
              BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr,
              PRECISION: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """ds [queries, keys] of one tile. (What does not change from tile to tile, the compiler loads once.)"""
    if WIDE:
        s = product_wide(p_q, o_l, s_ql, s_qd, L, p_k, o_s, s_ks, s_kd, S, K, PRECISION)
        dp = product_wide(p_dout, o_l, s_gl, s_gd, L, p_v, o_s, s_vs, s_vd, S, K, PRECISION)
    else:
        q0, q1 = heads(p_q, o_l, s_ql, s_qd, L, K, True, K, D0, D1)  # [queries, D0], [queries, D1]
        g0, g1 = heads(p_dout, o_l, s_gl, s_gd, L, K, True, K, D0, D1)  # do, as q
        k0, k1 = heads(p_k, o_s, s_ks, s_kd, S, K, EDGE, K, D0, D1)  # [keys, D0], [keys, D1]
        v0, v1 = heads(p_v, o_s, s_vs, s_vd, S, K, EDGE, K, D0, D1)  # [keys, D0], [keys, D1]
        s = product(q0, q1, k0, k1, D1, PRECISION)  # [queries, keys]
        dp = product(g0, g1, v0, v1, D1, PRECISION)  # [queries, keys]: do_i·v_j
    s *= scale * LOG2E
    if BIAS:
        s += LOG2E * tile(p_bias, o_l, s_bl, o_s, s_bs, L, S, True, True).to(tl.float32)
    p = tl.exp2(s - lse[:, None])  # [queries, keys]
    if CAUSAL or WINDOW > 0 or EDGE:
        p = tl.where(seen(o_l[:, None], o_s[None, :], L, S, CAUSAL, WINDOW), p, 0.0)
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
    s_qb, s_ql, s_qn = known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = known(s_vb, s_vs, s_vn, ALIGN)
    s_gb, s_gl, s_gn = known(s_gb, s_gl, s_gn, ALIGN)
    HELD: tl.constexpr = 0 if WIDE else K
    col = tl.program_id(2) * D0
    cols = K - col
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    n_k = (n // (N // M)).to(tl.int64)  # the head of k and v that it looks at
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)  # [queries]
    lse, delta = _row_terms(p_lse + (b * N + n) * L, p_delta + (b * N + n) * L, o_l, L)  # [queries] each
    p_q += b * s_qb + n.to(tl.int64) * s_qn
    p_dout += b * s_gb + n.to(tl.int64) * s_gn
    p_k += b * s_kb + n_k * s_kn
    p_v += b * s_vb + n_k * s_vn
    dq0 = tl.zeros([BLOCK_L, D0], tl.float32)
    dq1 = tl.zeros([BLOCK_L, D1 if D1 > 0 else 16], tl.float32)
    lo, _, _, hi = keys_range(tl.program_id(0) * BLOCK_L, BLOCK_L, L, S, CAUSAL, WINDOW, BLOCK_S)
    for start in tl.range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)  # [keys]
        ds = _gradient(p_q, s_ql, s_qd, p_k, s_ks, s_kd, p_v, s_vs, s_vd, p_dout, s_gl, s_gd, lse, delta,
                       p_bias + b * s_bb + n.to(tl.int64) * s_bn, s_bl, s_bs, p_mask + b * s_mb, s_ms, o_l, o_s, L, S, scale, K, D0,
                       D1, BIAS, MASK, CAUSAL, WINDOW, EDGE, PRECISION, WIDE)  # fmt: skip
        # dq += ds k; of heads in parts, this program's columns of k
        k0, k1 = heads(p_k + col * s_kd, o_s, s_ks, s_kd, S, cols, EDGE, HELD, D0, D1)  # [keys, D0], [keys, D1]
        ds = ds.to(k0.dtype)
        dq0 = tl.dot(ds, k0, dq0, input_precision=PRECISION)  # [queries, D0]
        if D1 > 0:
            dq1 = tl.dot(ds, k1, dq1, input_precision=PRECISION)
    store(p_dq + (b * L * N + n) * K + col, dq0 * scale, dq1 * scale, o_l, N * K, L, cols, D0, D1)


@triton.jit
def _backward_bias(p_q, p_k, p_v, p_bias, p_mask, p_dout, p_lse, p_delta, p_dbias, s_qb, s_ql, s_qn, s_qd, s_kb, s_ks,
                   s_kn, s_kd, s_vb, s_vs, s_vn, s_vd, s_bb, s_bn, s_bl, s_bs, s_mb, s_ms, s_gb, s_gl, s_gn, s_gd, N,
                   M, L, S, scale, rows, heads, bias_heads, K: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr,
                   MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, PRECISION: tl.constexpr,
                   BLOCK_L: tl.constexpr, BLOCK_S: tl.constexpr, WIDE: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """dbias of one tile, summed over the `rows` of the batch and the `heads` that share it:
    grid [blocks of L, blocks of S, members of the bias]."""
    s_qb, s_ql, s_qn = known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = known(s_vb, s_vs, s_vn, ALIGN)
    s_gb, s_gl, s_gn = known(s_gb, s_gl, s_gn, ALIGN)
    b0 = tl.program_id(2) // bias_heads * rows  # the first picture that shares this member of the bias
    n0 = tl.program_id(2) % bias_heads * heads  # the first head that does
    o_l = tl.program_id(0) * BLOCK_L + tl.arange(0, BLOCK_L)  # [queries]
    o_s = tl.program_id(1) * BLOCK_S + tl.arange(0, BLOCK_S)  # [keys]
    # ds itself is the gradient of what was added to the scores; where pictures or heads share a bias, the sum of theirs
    total = tl.zeros([BLOCK_L, BLOCK_S], tl.float32)
    for member in range(rows * heads):
        b, n = (b0 + member // heads).to(tl.int64), (n0 + member % heads).to(tl.int64)
        n_k = n // (N // M)  # the head of k and v that it looks at
        lse, delta = _row_terms(p_lse + (b * N + n) * L, p_delta + (b * N + n) * L, o_l, L)  # [queries] each
        total += _gradient(p_q + b * s_qb + n * s_qn, s_ql, s_qd, p_k + b * s_kb + n_k * s_kn, s_ks, s_kd,
                           p_v + b * s_vb + n_k * s_vn, s_vs, s_vd, p_dout + b * s_gb + n * s_gn, s_gl, s_gd, lse,
                           delta, p_bias + b * s_bb + n * s_bn, s_bl, s_bs, p_mask + b * s_mb, s_ms, o_l, o_s, L, S,
                           scale, K, D0, D1, True, MASK, CAUSAL, WINDOW, True, PRECISION, WIDE)  # fmt: skip
    p_dbias += tl.program_id(2).to(tl.int64) * L * S + o_l[:, None] * S + o_s[None, :]
    tl.store(p_dbias, total.to(p_dbias.dtype.element_ty), mask=(o_l[:, None] < L) & (o_s[None, :] < S))


# 4. How they are started -------------------------------------------------------------------------------------


def splits(L, S, BLOCK_L, BLOCK_S, members):
    """Into how many parts the queries are cut for dk and dv, so that few keys (a prompt's 77) still fill a GPU: a rule of
    shapes and tiles alone, so the sums keep their order from call to call."""
    programs = cdiv(S, BLOCK_S) * members
    return max(1, min(256 // programs, cdiv(L, 4 * BLOCK_L)))


def _backward_launches(q, k, v, bias, key_mask, dout, scale, causal, window, want_bias, _):
    """(Δ, dk and dv, dq, dbias or None, parts into which the queries are cut) for tensors like these."""
    (B, L, N, K), (S, M) = q.shape, k.shape[1:3]
    flags = flags_of(q, bias, key_mask, causal, window, k, v, dout)
    parts = columns(K, q.element_size())[2]
    strides = (*q.stride(), *k.stride(), *v.stride(), *strides_of(bias, key_mask), *dout.stride())
    H0, H1 = halves(K)
    rows = min(power_of_2(L), max(16, 2048 // H0))
    delta = Launch(_delta, (cdiv(L, rows), B * N), *dout.stride(), N, L, K=K, D0=H0, D1=H1, BLOCK_L=rows,
                   ALIGN=alignment(dout))  # fmt: skip
    masked = causal or window > 0 or bias is not None or key_mask is not None

    cfg = configured("backward_kv", q, k, masked)
    # dk and dv: as many programs as there are blocks of keys, times the parts into which the queries are cut
    cuts = splits(L, S, cfg["BLOCK_L"], cfg["BLOCK_S"], B * M * parts)
    per_split = cdiv(cdiv(L, cuts), cfg["BLOCK_L"]) * cfg["BLOCK_L"]
    cuts = cdiv(L, per_split)
    kv = Launch(_backward_kv, (cdiv(S, cfg["BLOCK_S"]) * parts, B * M, cuts), *strides, B, N, M, L, S, scale, per_split,
                parts, **flags, **cfg, EDGE=S % cfg["BLOCK_S"] != 0)  # fmt: skip

    # dq: as the forward pass, a program a block of queries
    cfg = configured("backward_q", q, k, masked)
    of_q = Launch(_backward_q, (cdiv(L, cfg["BLOCK_L"]), B * N, parts), *strides, N, M, L, S, scale, **flags, **cfg,
                  EDGE=S % cfg["BLOCK_S"] != 0)  # fmt: skip

    of_bias = None
    if want_bias:
        cfg = configured("backward_bias", q, k)
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
                                                want_bias, one_tf32(q.dtype))  # fmt: skip
    # three kernels, or four: Δ first, which the others read
    delta = torch.empty_like(lse)
    of_delta(out, dout, torch.zeros_like(lse) if dlse is None else dlse.contiguous(), delta)
    inputs = (q, k, v, *given(bias, key_mask, q), dout, lse, delta)
    dk, dv = (x.new_empty(cuts, B, S, M, K, dtype=x.dtype if cuts == 1 else torch.float32) for x in (k, v))
    of_kv(*inputs, dk, dv)
    # sums of the splits, in one order
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
