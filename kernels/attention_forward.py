"""The forward kernels of attention: one for any number of keys, one for few. The mathematics is in attention.py.

How often is what read? A program of _forward() reads its BLOCK_L queries once and all keys and values once, so every key is read
L / BLOCK_L times over all programs of its head, from the L2 cache after the first: 64 times 2 · S · K numbers at 4096 places with blocks
of 64, which is why a larger block is faster until its accumulator no longer fits in registers. Between two blocks only m, l and the
accumulator live. The scores exist as tiles of BLOCK_L × BLOCK_S and are gone after the second product.

Against 77 keys (cross-attention) the work is small and the reading is all: _forward_short() holds keys and values on chip and lets
queries pass by, each read once and each answered by one softmax.

Explained in the book (docs/book): chapter 6.
"""

import torch
from torch import Tensor

from .attention_tiles import (
    LOG2E,
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
    steps_of,
    store,
    strides_of,
    tile,
)
from .launch import Launch, kept
from .switch import cdiv, halves, on_device, power_of_2, tl, triton

SHORT = 128  # up to so many keys are held on chip whole (16-bit types, heads up to 256)

# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _forward_blocks(acc0, acc1, m_i, l_i, q0, q1, p_q, s_ql, s_qd, k0_from, k1_from, v0_from, v1_from, s_ks, s_kd, s_vs,
                    s_vd, p_bias, s_bl, s_bs, p_mask, s_ms, lo, hi, o_l, L, S, scale, cols, K: tl.constexpr,
                    HELD: tl.constexpr, D0: tl.constexpr, D1: tl.constexpr, BLOCK_S: tl.constexpr, BIAS: tl.constexpr,
                    MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, EDGE: tl.constexpr,
                    PRECISION: tl.constexpr, TMA: tl.constexpr, WIDE: tl.constexpr):  # fmt: skip
    """Keys lo … hi − 1 into the running softmax. EDGE: some of them may be hidden or beyond S.

    State, a row each: m_i the largest score so far (in units of log 2), l_i = Σ_j 2^(s_j − m_i), and acc = Σ_j 2^(s_j − m_i) v_j in two
    parts. It is true after every block, of the keys seen so far."""
    for start in tl.range(lo, hi, BLOCK_S):
        o_s = start + tl.arange(0, BLOCK_S)  # [keys]
        # s = q kᵀ [BLOCK_L, BLOCK_S]: the first of the two products
        if WIDE:
            s = product_wide(p_q, o_l, s_ql, s_qd, L, k0_from, o_s, s_ks, s_kd, S, K, PRECISION)
        elif TMA:
            k0 = k0_from.load([start, 0])
            k1 = k0
            if D1 > 0:
                k1 = k1_from.load([start, D0])
            s = product(q0, q1, k0, k1, D1, PRECISION)  # [queries, keys]
        else:
            k0, k1 = heads(k0_from, o_s, s_ks, s_kd, S, cols, EDGE, HELD, D0, D1)  # [keys, D0], [keys, D1]
            s = product(q0, q1, k0, k1, D1, PRECISION)  # [queries, keys]
        unit = scale * LOG2E  # of a score, in units of log 2: without a bias, part of the multiply-add before exp2
        if BIAS:
            s = s * unit + LOG2E * tile(p_bias, o_l, s_bl, o_s, s_bs, L, S, True, EDGE).to(tl.float32)
            unit = 1.0
        # what must not be seen: −∞, so that its exp2 is 0
        if EDGE:
            s = tl.where(seen(o_l[:, None], o_s[None, :], L, S, CAUSAL, WINDOW), s, -float("inf"))
        if MASK:
            s = tl.where(tl.load(p_mask + o_s * s_ms, mask=o_s < S, other=0)[None, :] != 0, s, -float("inf"))
        # the online softmax: all sums so far were of 2^(s − m_i), so they are brought to the new maximum
        m_new = tl.maximum(m_i, tl.max(s, 1) * unit)  # [queries]
        p = tl.exp2(s * unit - m_new[:, None])  # [queries, keys]
        correction = tl.exp2(m_i - m_new)  # [queries]
        m_i = m_new
        l_i = l_i * correction + tl.sum(p, 1)
        if TMA:
            v0 = v0_from.load([start, 0])
            v1 = v0
            if D1 > 0:
                v1 = v1_from.load([start, D0])
        else:
            v0, v1 = heads(v0_from, o_s, s_vs, s_vd, S, cols, EDGE, HELD, D0, D1)  # [keys, D0], [keys, D1]
        # o = p v: p is rounded to the type of v for the tensor cores, each p ≤ 1, and added up in fp32
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
    s_qb, s_ql, s_qn = known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = known(s_vb, s_vs, s_vn, ALIGN)
    HELD: tl.constexpr = 0 if WIDE else K  # columns that need no check: none when a program has but a part of them
    first = tl.program_id(2) * D0  # column of o that this program begins with: 0 but for WIDE
    cols = K - first
    block = tl.program_id(0)
    if CAUSAL:  # the longest rows first, so that the last programs to start are short ones
        block = tl.num_programs(0) - 1 - block
    # offsets of whole tensors in 64 bits, those within one head in 32 (_why_not() sees to it): 64-bit sums cost twice the instructions
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    n_k = (n // (N // M)).to(tl.int64)  # grouped queries: N / M heads of q look at the same keys
    o_l = block * BLOCK_L + tl.arange(0, BLOCK_L)  # [queries]
    p_k += b * s_kb + n_k * s_kn
    p_v += b * s_vb + n_k * s_vn + first * s_vd
    p_bias += b * s_bb + n.to(tl.int64) * s_bn
    p_mask += b * s_mb
    p_q += b * s_qb + n.to(tl.int64) * s_qn
    q0, q1 = heads(p_q, o_l, s_ql, s_qd, L, cols, True, HELD, D0, D1)  # [queries, D0], [queries, D1]
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

    acc0 = tl.zeros([BLOCK_L, D0], tl.float32)  # the output before it is divided by l
    acc1 = tl.zeros([BLOCK_L, D1 if D1 > 0 else 16], tl.float32)
    # Finite, so that nothing needs a guard against ∞ − ∞; what lies below it counts as hidden.
    m_i, l_i = tl.full([BLOCK_L], -1e30, tl.float32), tl.zeros([BLOCK_L], tl.float32)
    lo, full_lo, full_hi, hi = keys_range(block * BLOCK_L, BLOCK_L, L, S, CAUSAL, WINDOW, BLOCK_S)
    for part in tl.static_range(3):  # keys that are partly seen, wholly seen, partly seen
        start = lo if part == 0 else full_lo if part == 1 else full_hi
        stop = tl.minimum(full_lo, hi) if part == 0 else full_hi if part == 1 else hi
        if part == 1 or (part == 2 and EDGE) or (part == 0 and WINDOW > 0):
            acc0, acc1, m_i, l_i = _forward_blocks(
                acc0, acc1, m_i, l_i, q0, q1, p_q, s_ql, s_qd, k0_from, k1_from, v0_from, v1_from, s_ks, s_kd, s_vs,
                s_vd, p_bias, s_bl, s_bs, p_mask, s_ms, start, stop, o_l, L, S, scale, cols, K, HELD, D0, D1, BLOCK_S,
                BIAS, MASK, CAUSAL, WINDOW, part != 1, PRECISION, TMA, WIDE)  # fmt: skip

    # Once at the end: o = acc / l, and lse, all that the backward pass needs to find every p again
    row = 1 / tl.where(l_i == 0, 1.0, l_i)[:, None]  # a query that sees nothing: 0 / 1
    store(p_out + (b * L * N + n) * K + first, acc0 * row, acc1 * row, o_l, N * K, L, cols, D0, D1)
    lse = tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) / LOG2E)  # [queries], in units of e again
    tl.store(p_lse + (b * N + n) * L + o_l, lse, mask=o_l < L)


@triton.jit
def _short_scores(q0, q1, k0, k1, p_bias, s_bl, s_bs, p_mask, s_ms, o_l, o_s, L, S, scale, D1: tl.constexpr,
                  BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr, WINDOW: tl.constexpr,
                  PRECISION: tl.constexpr):  # fmt: skip
    """Scores of some queries and some keys in units of log 2, −∞ where a key is hidden: [queries, keys]."""
    s = product(q0, q1, k0, k1, D1, PRECISION) * (scale * LOG2E)
    if BIAS:
        s += LOG2E * tile(p_bias, o_l, s_bl, o_s, s_bs, L, S, True, True).to(tl.float32)
    if MASK:
        s = tl.where(tl.load(p_mask + o_s * s_ms, mask=o_s < S, other=0)[None, :] != 0, s, -float("inf"))
    return tl.where(seen(o_l[:, None], o_s[None, :], L, S, CAUSAL, WINDOW), s, -float("inf"))


@triton.jit
def _forward_short(p_q, p_k, p_v, p_bias, p_mask, p_out, p_lse, s_qb, s_ql, s_qn, s_qd, s_kb, s_ks, s_kn, s_kd, s_vb,
                   s_vs, s_vn, s_vd, s_bb, s_bn, s_bl, s_bs, s_mb, s_ms, N, M, L, S, scale, K: tl.constexpr,
                   D0: tl.constexpr, D1: tl.constexpr, BIAS: tl.constexpr, MASK: tl.constexpr, CAUSAL: tl.constexpr,
                   WINDOW: tl.constexpr, PRECISION: tl.constexpr, BLOCK_L: tl.constexpr, S0: tl.constexpr,
                   S1: tl.constexpr, LOOPS: tl.constexpr, ALIGN: tl.constexpr):  # fmt: skip
    """All S ≤ S0 + S1 keys on chip, for LOOPS blocks of queries: grid [blocks of L / LOOPS, B·N]. 77 keys = 64 + 16."""
    s_qb, s_ql, s_qn = known(s_qb, s_ql, s_qn, ALIGN)
    s_kb, s_ks, s_kn = known(s_kb, s_ks, s_kn, ALIGN)
    s_vb, s_vs, s_vn = known(s_vb, s_vs, s_vn, ALIGN)
    b, n = (tl.program_id(1) // N).to(tl.int64), tl.program_id(1) % N
    n_k = (n // (N // M)).to(tl.int64)
    p_q += b * s_qb + n.to(tl.int64) * s_qn
    p_k += b * s_kb + n_k * s_kn
    p_v += b * s_vb + n_k * s_vn
    p_bias += b * s_bb + n.to(tl.int64) * s_bn
    p_mask += b * s_mb
    # all keys and values, in a large part and a small one as heads are: 77 = 64 + 13 of 16, not 128
    o_s = tl.arange(0, S0)
    k0, k1 = heads(p_k, o_s, s_ks, s_kd, S, K, True, K, D0, D1)  # [keys, D0], [keys, D1]
    v0, v1 = heads(p_v, o_s, s_vs, s_vd, S, K, True, K, D0, D1)  # [keys, D0], [keys, D1]
    if S1 > 0:
        o_t = S0 + tl.arange(0, S1)
        kt0, kt1 = heads(p_k, o_t, s_ks, s_kd, S, K, True, K, D0, D1)  # [S1, D0], [S1, D1]
        vt0, vt1 = heads(p_v, o_t, s_vs, s_vd, S, K, True, K, D0, D1)  # [S1, D0], [S1, D1]
    for i in range(LOOPS):
        o_l = (tl.program_id(0) * LOOPS + i) * BLOCK_L + tl.arange(0, BLOCK_L)  # [queries]
        q0, q1 = heads(p_q, o_l, s_ql, s_qd, L, K, True, K, D0, D1)  # [queries, D0], [queries, D1]
        s = _short_scores(q0, q1, k0, k1, p_bias, s_bl, s_bs, p_mask, s_ms, o_l, o_s, L, S, scale, D1, BIAS, MASK,
                          CAUSAL, WINDOW, PRECISION)  # fmt: skip
        m_i = tl.maximum(tl.max(s, 1), -1e30)  # [queries]
        if S1 > 0:
            t = _short_scores(q0, q1, kt0, kt1, p_bias, s_bl, s_bs, p_mask, s_ms, o_l, o_t, L, S, scale, D1, BIAS,
                              MASK, CAUSAL, WINDOW, PRECISION)  # fmt: skip
            m_i = tl.maximum(m_i, tl.max(t, 1))  # [queries]
        # the plain softmax: the maximum is known before the first exp2
        p = tl.exp2(s - m_i[:, None])  # [queries, keys]
        l_i = tl.sum(p, 1)
        p = p.to(v0.dtype)
        acc0 = tl.dot(p, v0, input_precision=PRECISION)
        acc1 = acc0
        if D1 > 0:
            acc1 = tl.dot(p, v1, input_precision=PRECISION)
        if S1 > 0:
            p = tl.exp2(t - m_i[:, None])  # [queries, keys]
            l_i += tl.sum(p, 1)
            p = p.to(v0.dtype)
            acc0 = tl.dot(p, vt0, acc0, input_precision=PRECISION)
            if D1 > 0:
                acc1 = tl.dot(p, vt1, acc1, input_precision=PRECISION)
        row = 1 / tl.where(l_i == 0, 1.0, l_i)[:, None]  # a query that sees nothing: 0 / 1
        store(p_out + (b * L * N + n) * K, acc0 * row, acc1 * row, o_l, N * K, L, K, D0, D1)
        lse = tl.where(l_i == 0, -float("inf"), (m_i + tl.log2(l_i)) / LOG2E)  # [queries], in units of e again
        tl.store(p_lse + (b * N + n) * L + o_l, lse, mask=o_l < L)


# 4. How they are started -------------------------------------------------------------------------------------


def starts_in_step(k, v):
    """Do both start at multiples of 16 bytes?"""
    return (k.data_ptr() | v.data_ptr()) & 15 == 0


def forward_launch(q, k, v, bias, key_mask, scale, causal, window, in_step, _):
    """The Launch of forward() for tensors like these. in_step: k and v start at multiples of 16 bytes."""
    (B, L, N, K), (S, M) = q.shape, k.shape[1:3]
    flags = flags_of(q, bias, key_mask, causal, window, k, v)
    numbers = (*q.stride(), *k.stride(), *v.stride(), *strides_of(bias, key_mask), N, M, L, S, scale)
    if S <= SHORT and K <= 256 and q.element_size() == 2:
        del flags["WIDE"]
        cfg = configured("short", q, k)
        S0, S1 = halves(S)
        rows = min(cfg["BLOCK_L"], power_of_2(L))
        grid = (cdiv(L, rows * cfg["LOOPS"]), B * N)
        return Launch(_forward_short, grid, *numbers, **flags, **cfg | {"BLOCK_L": rows}, S0=S0, S1=S1)
    cfg = configured("forward", q, k, causal or window > 0 or bias is not None or key_mask is not None)
    if not cfg.pop("SPLIT", True) and not flags["WIDE"]:
        flags |= {"D0": power_of_2(K), "D1": 0}
    # Whether the copy engine can read these: last axis contiguous, everything else in steps of 16 bytes.
    if cfg["TMA"]:
        even = all(s * k.element_size() % 16 == 0 for s in steps_of(k, v))
        cfg["TMA"] = in_step and even and k.stride(3) == v.stride(3) == 1 and not flags["WIDE"]
    edge = causal or window > 0 or S % cfg["BLOCK_S"] != 0
    parts = columns(K, q.element_size())[2]
    return Launch(_forward, (cdiv(L, cfg["BLOCK_L"]), B * N, parts), *numbers, **flags, **cfg, EDGE=edge)


def _scratch(size, align, stream):
    """Memory on the GPU for Triton's tensor descriptors."""
    return torch.empty(size, dtype=torch.int8, device="cuda")


def run(launch, q, k, v, bias, key_mask):
    """(o, lse) by that Launch."""
    B, L, N, K = q.shape
    out, lse = q.new_empty((B, L, N, K)), q.new_empty((B, N, L), dtype=torch.float32)
    if launch.constants.get("TMA"):  # descriptors lie in scratch memory; Triton forgets the allocator in another thread
        triton.set_allocator(_scratch)
    if bias is None and key_mask is None:
        launch(q, k, v, q, q, out, lse)
    else:
        launch(q, k, v, *given(bias, key_mask, q), out, lse)
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
    settings = scale, causal, window, starts_in_step(k, v), one_tf32(q.dtype)
    return run(kept(forward_launch, q, k, v, bias, key_mask, *settings), q, k, v, bias, key_mask)


op = torch.library.custom_op("nanodiff::attention", forward, mutates_args=())


# what it gives, in shape and type, for tensors without memory (torch.compile, meta)
@op.register_fake
def _(q, k, v, bias, key_mask, scale, causal, window):
    B, L, N, K = q.shape
    return q.new_empty(B, L, N, K), q.new_empty(B, N, L, dtype=torch.float32)
