"""GroupNorm, with the shift that comes before it and the SiLU that follows, forward and backward, in one go.

The mathematics (Wu & He 2018, arXiv 1803.08494 eq. 1, 2, 6, 7), for one image b and one group g of C/G channels, n values:
    u = x + t_c            (t: the time embedding of a residual block, one value per channel, or nothing)
    μ = mean u,  σ² = mean (u − μ)²,  r = 1/√(σ² + ε),  û = r (u − μ)
    z = γ_c û + β_c,  y = silu(z) = z·sig(z)   or   y = z

Mean and variance are those of chunks, each counted from a value near its own mean and put together by Chan, Golub & LeVeque
(1979): M₂ = Σ M₂ᵢ + Σ nᵢ (μᵢ − μ)². No sum of squares is ever taken from another, so an offset of 10⁴ standard
deviations costs no digits that fp32 has.

Backward, with dz = dy · sig(z)(1 + z(1 − sig(z))): per image and channel the sums over the n/C·G pixels
    s₁ = Σ dz,   s₂ = Σ dz û,   s₃ = Σ û      give      dγ = Σ_b s₂,   dβ = Σ_b s₁,
and per group A = Σ_c γ_c s₁, B = Σ_c γ_c s₂:
    dx = r (γ dz − (A + û B)/n),      dt_c = Σ dx = r (γ_c s₁ − (P·A + s₃ B)/n),  P pixels.
So dt costs no pass of its own.

A group that fits on chip is read once and written once. A larger one is cut into chunks of pixels: one kernel for the
chunks' statistics, a small one to join them, one that normalises, walking backwards because what was read last is still
in cache. No atomics: every sum is taken in one order. One code serves both memory formats, [B, C, H, W] and channels
last, since only the strides differ; a tile is [pixels, channels].

What it saves, in bytes at two a value: PyTorch adds t (2 read or written), normalises (2 read, 1 written for large groups) and applies
SiLU (2): seven passes over x. Here it is two on chip, three in chunks (read, read, written), and a pass over memory is all that
such an operator costs: at 320 × 64 × 64 in bf16 it is 2.6 MB each, a microsecond on a GPU of 3 TB/s.

Names: p_ a pointer, s_ a stride of x and d_ one of dy in elements, o_ offsets (c channels, p pixels, w channels of a group, k
chunks), m masks. Sums are in fp32 whatever x is.

Explained in the book (docs/book): chapter 7.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Launch, kept, planned
from .switch import cdiv, on_device, power_of_2, tl, triton, tuned, use

# 2. The plain reference ------------------------------------------------------------------------------------


def group_norm_reference(x, groups, weight, bias, eps=1e-5, silu=False, shift=None):
    """The formulas above, one after the other, in the type of the inputs: x [B, C, …] -> [B, C, …]."""
    B, C = x.shape[:2]
    per_channel = (1, C) + (1,) * (x.dim() - 2)
    x = x if shift is None else x + shift.view(B, C, *per_channel[2:])
    u = x.reshape(B, groups, -1)
    mean = u.mean(-1, keepdim=True)
    var = (u - mean).square().mean(-1, keepdim=True)
    z = ((u - mean) * (var + eps).rsqrt()).view(x.shape) * weight.view(per_channel) + bias.view(per_channel)
    return z * torch.sigmoid(z) if silu else z


# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _shifted(p, p_shift, m, SHIFT: tl.constexpr):
    """u = x + t of a tile [pixels, channels] in fp32; 0 where masked."""
    u = tl.load(p, mask=m, other=0.0).to(tl.float32)
    if SHIFT:
        u += tl.load(p_shift).to(tl.float32)[None, :]
    return tl.where(m, u, 0.0)


@triton.jit
def _activated(u, weight, bias, SILU: tl.constexpr):
    """(y, dy/dz) for z = weight·u + bias, of which a forward pass drops the second."""
    z = u * weight + bias
    y, slope = z, tl.full(z.shape, 1.0, tl.float32)
    if SILU:
        sig = 1 / (1 + tl.exp(-z))
        y = z * sig
        slope = sig * (1 + z * (1 - sig))
    return y, slope


@triton.jit
def _channel(p, o_c, m_c):
    """One value a channel, in fp32."""
    return tl.load(p + o_c, mask=m_c, other=0.0).to(tl.float32)


@triton.jit
def _whole_forward(p_x, p_shift, p_weight, p_bias, p_y, p_mean, p_rstd, s_b, s_c, s_p, s_t, C, P, eps,
                   WIDTH: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr,
                   BLOCK_C: tl.constexpr):  # fmt: skip
    """One group of one image on chip: grid [G, B]. WIDTH = C/G channels, P pixels; s_t: from image to image of the shift."""
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)  # which group, which image
    # one tile is the whole group, its sides rounded up to powers of two; what is beyond is masked
    o_p, o_w = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    o_c, m_c = g * WIDTH + o_w, o_w < WIDTH  # [channels] of this group
    m = (o_p < P)[:, None] & m_c[None, :]  # [pixels, channels]
    o = b * s_b + o_p[:, None] * s_p + o_c[None, :] * s_c
    u = _shifted(p_x + o, p_shift + b * s_t + tl.where(m_c, o_c, 0), m, SHIFT)  # the only reading of x
    n = P * WIDTH
    mean = tl.sum(u) / n
    # the variance of what was centred before: as exact as the mean, at no cost but arithmetic, since u is in registers
    u = tl.where(m, u - mean, 0.0)
    rstd = 1 / tl.sqrt(tl.sum(u * u) / n + eps)  # one number for the group
    weight, bias = _channel(p_weight, o_c, m_c), _channel(p_bias, o_c, m_c)  # [channels] each
    y, _ = _activated(u, (rstd * weight)[None, :], bias[None, :], SILU)  # [pixels, channels]
    tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)
    # what the backward pass needs to find û again: two numbers a group
    row = b * tl.num_programs(0) + g
    tl.store(p_mean + row, mean)
    tl.store(p_rstd + row, rstd)


@triton.jit
def _statistics(p_x, p_shift, p_parts, s_b, s_c, s_p, s_t, C, P, per_chunk, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr,
                BLOCK_C: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """Mean and M₂ per channel of a chunk of pixels into p_parts [B, chunks, 2, C]: grid [chunks, blocks of C, B].

    Sums of d and d², d the distance from the mean of the chunk's first block: one pass, whose sums stay in the threads to
    the end, and nothing large is ever taken from something large.
    """
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)  # which pixels, which image
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [channels], of whichever groups
    m_c = o_c < C
    p_shift += b * s_t + tl.where(m_c, o_c, 0)
    p_x += b * s_b + o_c[None, :] * s_c
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, P)  # of the chunk, not included
    o_p = first + tl.arange(0, BLOCK_P)
    m = (o_p < last)[:, None] & m_c[None, :]  # [pixels, channels]
    # `near`, the mean of the first block: d = x − near is small where x is large, so Σ d² and (Σ d)² can be subtracted
    near = tl.sum(tl.load(p_x + o_p[:, None] * s_p, mask=m, other=0.0).to(tl.float32), 0)
    near /= tl.minimum(last - first, BLOCK_P).to(tl.float32)
    # a sum for each place of the tile: threads need not speak to each other before the loop is over
    d1, d2 = tl.zeros([BLOCK_P, BLOCK_C], tl.float32), tl.zeros([BLOCK_P, BLOCK_C], tl.float32)
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        o_p = start + tl.arange(0, BLOCK_P)  # [pixels]
        m = (o_p < last)[:, None] & m_c[None, :]  # [pixels, channels]
        d = tl.load(p_x + o_p[:, None] * s_p, mask=m, other=0.0).to(tl.float32) - near[None, :]
        d = tl.where(m, d, 0.0)
        d1 += d  # Σ d
        d2 += d * d  # Σ d²
    count = (last - first).to(tl.float32)
    s1 = tl.sum(d1, 0)
    mean = near + s1 / count
    # t is the same at all pixels of a channel: it moves the channel's mean and leaves M₂ alone, so it was not added to each of them
    if SHIFT:
        mean += tl.load(p_shift).to(tl.float32)
    o = (b * tl.num_programs(0) + chunk) * 2 * C + o_c
    tl.store(p_parts + o, mean, mask=m_c)
    tl.store(p_parts + o + C, tl.maximum(tl.sum(d2, 0) - s1 * (s1 / count), 0.0), mask=m_c)


@triton.jit
def _join(p_parts, p_mean, p_rstd, C, P, chunks, per_chunk, eps, WIDTH: tl.constexpr, CHUNKS: tl.constexpr,
          BLOCK_C: tl.constexpr):  # fmt: skip
    """The chunks' and channels' statistics into those of the group: grid [G, B]. (Chan, Golub & LeVeque's formula, of all at once.)"""
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)  # which group, which image
    o_k, o_w = tl.arange(0, CHUNKS), tl.arange(0, BLOCK_C)
    m = (o_k < chunks)[:, None] & (o_w < WIDTH)[None, :]
    p_parts += (b * chunks + o_k[:, None]) * 2 * C + g * WIDTH + o_w[None, :]
    count = tl.maximum(tl.minimum(P - o_k * per_chunk, per_chunk), 0).to(tl.float32)[:, None]
    means = tl.load(p_parts, mask=m, other=0.0)  # [chunks, channels]
    n = P * WIDTH
    mean = tl.sum(means * count) / n  # one number for the group
    off = means - mean  # how far each part lies from the whole: its share of M₂ beside its own
    m2 = tl.sum(tl.where(m, tl.load(p_parts + C, mask=m, other=0.0) + off * off * count, 0.0))
    row = b * tl.num_programs(0) + g
    tl.store(p_mean + row, mean)
    tl.store(p_rstd + row, 1 / tl.sqrt(m2 / n + eps))


@triton.jit
def _normalise(p_x, p_shift, p_weight, p_bias, p_mean, p_rstd, p_y, s_b, s_c, s_p, s_t, C, P, G, per_chunk,
               WIDTH: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr,
               BLOCK_C: tl.constexpr, STAGES: tl.constexpr):  # fmt: skip
    """y of a chunk of pixels, from the group's mean and rstd: grid [chunks, blocks of C, B], last chunk first."""
    chunk, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2).to(tl.int64)  # which pixels, which image
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [channels], of whichever groups
    m_c = o_c < C
    # [channels] each: every channel has its group's
    mean, rstd = _channel(p_mean + b * G, o_c // WIDTH, m_c), _channel(p_rstd + b * G, o_c // WIDTH, m_c)
    weight = _channel(p_weight, o_c, m_c) * rstd  # γ r: one product a value, not two
    bias = _channel(p_bias, o_c, m_c)
    p_shift += b * s_t + tl.where(m_c, o_c, 0)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, P)  # of the chunk, not included
    for start in tl.range(first, last, BLOCK_P, num_stages=STAGES):
        o_p = start + tl.arange(0, BLOCK_P)  # [pixels]
        m = (o_p < last)[:, None] & m_c[None, :]  # [pixels, channels]
        o = b * s_b + o_p[:, None] * s_p + o_c[None, :] * s_c
        u = _shifted(p_x + o, p_shift, m, SHIFT) - mean[None, :]
        y, _ = _activated(u, weight[None, :], bias[None, :], SILU)  # [pixels, channels]
        tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _whole_backward(p_x, p_shift, p_weight, p_bias, p_mean, p_rstd, p_dy, p_dx, p_s1, p_s2, p_dshift, s_b, s_c, s_p,
                    d_b, d_c, d_p, C, P, WIDTH: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr,
                    BLOCK_P: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """Everything of one group of one image that fits on chip: grid [G, B]. d_: strides of dy.

    x and dy are read once, dx is written once; z, its sigmoid and û are computed again from x, mean and rstd."""
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)  # which group, which image
    o_p, o_w = tl.arange(0, BLOCK_P), tl.arange(0, BLOCK_C)
    o_c, m_c = g * WIDTH + o_w, o_w < WIDTH  # [channels] of this group
    m = (o_p < P)[:, None] & m_c[None, :]  # [pixels, channels]
    o = b * s_b + o_p[:, None] * s_p + o_c[None, :] * s_c
    row = b * tl.num_programs(0) + g
    mean, rstd = tl.load(p_mean + row), tl.load(p_rstd + row)  # of the group
    weight, bias = _channel(p_weight, o_c, m_c)[None, :], _channel(p_bias, o_c, m_c)[None, :]  # [1, channels] each
    u = _shifted(p_x + o, p_shift + b * C + tl.where(m_c, o_c, 0), m, SHIFT)
    u = tl.where(m, (u - mean) * rstd, 0.0)
    dy = tl.load(p_dy + b * d_b + o_p[:, None] * d_p + o_c[None, :] * d_c, mask=m, other=0.0).to(tl.float32)
    _, slope = _activated(u, weight, bias, SILU)
    dz = dy * slope  # [pixels, channels]
    s1, s2, s3 = tl.sum(dz, 0), tl.sum(dz * u, 0), tl.sum(u, 0)  # [channels], over the pixels
    n = P * WIDTH
    # A/n and B/n: what the mean and the deviation, which depend on every value of the group, send back to each of them
    a, c = tl.sum(s1[None, :] * weight) / n, tl.sum(s2[None, :] * weight) / n
    dx = rstd * (weight * dz - (a + u * c))  # [pixels, channels]
    tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), mask=m)
    # for dβ and dγ, which PyTorch adds over the few images
    tl.store(p_s1 + b * C + o_c, s1, mask=m_c)
    tl.store(p_s2 + b * C + o_c, s2, mask=m_c)
    if SHIFT:
        dshift = rstd * (tl.sum(weight, 0) * s1 - (P * a + s3 * c))
        tl.store(p_dshift + b * C + o_c, dshift.to(p_dshift.dtype.element_ty), mask=m_c)


@triton.jit
def _sums(p_x, p_shift, p_weight, p_bias, p_mean, p_rstd, p_dy, p_sums, s_b, s_c, s_p, d_b, d_c, d_p, C, P, G,
          per_chunk, WIDTH: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr,
          BLOCK_C: tl.constexpr):  # fmt: skip
    """s₁, s₂, s₃ of a chunk of pixels: grid [chunks, blocks of C, B]. The first of two passes over x and dy."""
    chunk, b = tl.program_id(0), tl.program_id(2).to(tl.int64)  # which pixels, which image
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [channels], of whichever groups
    m_c = o_c < C
    # [channels] each: every channel has its group's
    mean, rstd = _channel(p_mean + b * G, o_c // WIDTH, m_c), _channel(p_rstd + b * G, o_c // WIDTH, m_c)
    weight, bias = _channel(p_weight, o_c, m_c)[None, :], _channel(p_bias, o_c, m_c)[None, :]  # [1, channels] each
    p_shift += b * C + tl.where(m_c, o_c, 0)
    s1, s2, s3 = tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32), tl.zeros([BLOCK_C], tl.float32)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, P)  # of the chunk, not included
    for start in tl.range(first, last, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)  # [pixels]
        m = (o_p < last)[:, None] & m_c[None, :]  # [pixels, channels]
        u = _shifted(p_x + b * s_b + o_p[:, None] * s_p + o_c[None, :] * s_c, p_shift, m, SHIFT)
        u = tl.where(m, (u - mean[None, :]) * rstd[None, :], 0.0)
        dy = tl.load(p_dy + b * d_b + o_p[:, None] * d_p + o_c[None, :] * d_c, mask=m, other=0.0).to(tl.float32)
        _, slope = _activated(u, weight, bias, SILU)
        dz = dy * slope  # [pixels, channels]
        s1 += tl.sum(dz, 0)  # [channels], as the other two
        s2 += tl.sum(dz * u, 0)
        s3 += tl.sum(u, 0)
    o = ((b * tl.num_programs(0) + chunk) * 3) * C + o_c
    tl.store(p_sums + o, s1, mask=m_c)
    tl.store(p_sums + o + C, s2, mask=m_c)
    tl.store(p_sums + o + 2 * C, s3, mask=m_c)


@triton.jit
def _join_sums(p_sums, p_weight, p_rstd, p_s1, p_s2, p_a, p_dshift, C, P, chunks, WIDTH: tl.constexpr,
               SHIFT: tl.constexpr, CHUNKS: tl.constexpr, BLOCK_C: tl.constexpr):  # fmt: skip
    """The chunks' sums into s₁, s₂ per channel, A/n and B/n per group (p_a: [B, G, 2]), and dt: grid [G, B]."""
    g, b = tl.program_id(0), tl.program_id(1).to(tl.int64)  # which group, which image
    o_k, o_w = tl.arange(0, CHUNKS), tl.arange(0, BLOCK_C)
    o_c, m_c = g * WIDTH + o_w, o_w < WIDTH  # [channels] of this group
    m = (o_k < chunks)[:, None] & m_c[None, :]
    p = p_sums + (b * chunks + o_k[:, None]) * 3 * C + o_c[None, :]
    s1, s2 = tl.sum(tl.load(p, mask=m, other=0.0), 0), tl.sum(tl.load(p + C, mask=m, other=0.0), 0)
    weight = _channel(p_weight, o_c, m_c)
    n = P * WIDTH
    a, c = tl.sum(s1 * weight) / n, tl.sum(s2 * weight) / n
    row = b * tl.num_programs(0) + g
    tl.store(p_a + 2 * row, a)
    tl.store(p_a + 2 * row + 1, c)
    tl.store(p_s1 + b * C + o_c, s1, mask=m_c)
    tl.store(p_s2 + b * C + o_c, s2, mask=m_c)
    if SHIFT:
        s3 = tl.sum(tl.load(p + 2 * C, mask=m, other=0.0), 0)
        dshift = tl.load(p_rstd + row) * (weight * s1 - (P * a + s3 * c))
        tl.store(p_dshift + b * C + o_c, dshift.to(p_dshift.dtype.element_ty), mask=m_c)


@triton.jit
def _backward_x(p_x, p_shift, p_weight, p_bias, p_mean, p_rstd, p_a, p_dy, p_dx, s_b, s_c, s_p, d_b, d_c, d_p, C, P, G,
                per_chunk, WIDTH: tl.constexpr, SILU: tl.constexpr, SHIFT: tl.constexpr, BLOCK_P: tl.constexpr,
                BLOCK_C: tl.constexpr):  # fmt: skip
    """dx of a chunk of pixels: grid [chunks, blocks of C, B], last chunk first. The second pass, once A and B are known."""
    chunk, b = tl.num_programs(0) - 1 - tl.program_id(0), tl.program_id(2).to(tl.int64)  # which pixels, which image
    o_c = tl.program_id(1) * BLOCK_C + tl.arange(0, BLOCK_C)  # [channels], of whichever groups
    m_c = o_c < C
    o_g = b * G + o_c // WIDTH
    mean, rstd = _channel(p_mean, o_g, m_c)[None, :], _channel(p_rstd, o_g, m_c)[None, :]
    a, c = _channel(p_a, 2 * o_g, m_c)[None, :], _channel(p_a, 2 * o_g + 1, m_c)[None, :]
    weight, bias = _channel(p_weight, o_c, m_c)[None, :], _channel(p_bias, o_c, m_c)[None, :]  # [1, channels] each
    p_shift += b * C + tl.where(m_c, o_c, 0)
    first = chunk * per_chunk
    last = tl.minimum(first + per_chunk, P)  # of the chunk, not included
    for start in tl.range(first, last, BLOCK_P):
        o_p = start + tl.arange(0, BLOCK_P)  # [pixels]
        m = (o_p < last)[:, None] & m_c[None, :]  # [pixels, channels]
        o = b * s_b + o_p[:, None] * s_p + o_c[None, :] * s_c
        u = (_shifted(p_x + o, p_shift, m, SHIFT) - mean) * rstd
        dy = tl.load(p_dy + b * d_b + o_p[:, None] * d_p + o_c[None, :] * d_c, mask=m, other=0.0).to(tl.float32)
        _, slope = _activated(u, weight, bias, SILU)
        dx = rstd * (weight * dy * slope - (a + u * c))  # [pixels, channels]
        tl.store(p_dx + o, dx.to(p_dx.dtype.element_ty), mask=m)


# 4. Autograd -----------------------------------------------------------------------------------------------

ON_CHIP = 16384  # values of a group that one program holds in registers: 64 fp32 each for 256 threads
ON_CHIP_BACKWARD = 8192  # … of two tensors
CHUNKS = 128  # at most so many chunks of an image
JOINED = 65536  # values that a program which joins chunks can hold


def plan(x, groups, on_chip):
    """How the pixels of x [B, C, P] are cut: {"whole": …} for a group on chip, or chunks and tiles (table.json).

    Tiles follow memory: a run of channels where channels are last, else a run of pixels.
    """
    B, C, P = x.shape
    width = C // groups
    block_c = power_of_2(width, 1)
    last = x.stride(1) == 1
    key = f"{'channels_last' if last else 'contiguous'}/{x.element_size()}"
    default = {"BLOCK": 4096, "WIDE": 64 if last else 4, "PROGRAMS": 1024, "num_warps": 4, "STAGES": 3, "WHOLE": 1}
    cfg = tuned("group_norm", (key,), default)
    # WHOLE was measured for forward passes alone
    size, times = power_of_2(P) * block_c, cfg["WHOLE"] if on_chip == ON_CHIP else 1
    if size <= on_chip * times:
        tile = {"BLOCK_P": power_of_2(P), "BLOCK_C": block_c}
        return {"whole": True, **tile, "num_warps": max(1, min(8 * times, size // 1024))}
    wide = min(cfg["WIDE"], power_of_2(C))
    tile = {"BLOCK_P": cfg["BLOCK"] // wide, "BLOCK_C": wide}
    # enough programs to fill a GPU, but no more chunks than _join() can hold; a rule of the shapes, the same at every call
    chunks = max(1, min(CHUNKS, JOINED // block_c, cdiv(cfg["PROGRAMS"], B * cdiv(C, wide)), cdiv(P, tile["BLOCK_P"])))
    per_chunk = cdiv(cdiv(P, chunks), tile["BLOCK_P"]) * tile["BLOCK_P"]
    return {"whole": False, **tile, "chunks": cdiv(P, per_chunk), "per_chunk": per_chunk, "num_warps": cfg["num_warps"],
            "STAGES": cfg["STAGES"]}  # fmt: skip


def _join_warps(chunks, width):
    """Warps of a program that joins chunks: 64 values a thread, up to 128."""
    return max(1, min(16, power_of_2(chunks, 1) * power_of_2(width, 1) // 2048))


def _flat(x):
    """x [B, C, …] as [B, C, P], a view."""
    return x.view(*x.shape[:2], -1) if x.is_contiguous() else x.flatten(2)


def _forward_launches(x, shift, groups, eps, silu):
    """(chunks, Launches) for an x [B, C, …] like this: one that does everything (0 chunks), or three."""
    x = _flat(x)
    (B, C, P), width = x.shape, x.shape[1] // groups
    flags = {"WIDTH": width, "SILU": silu, "SHIFT": shift is not None}
    strides = (*x.stride(), 0 if shift is None else shift.stride(0))
    cfg = plan(x, groups, ON_CHIP)
    tile = {k: cfg[k] for k in ("BLOCK_P", "BLOCK_C", "num_warps")}
    if cfg["whole"]:
        return 0, [Launch(_whole_forward, (groups, B), *strides, C, P, eps, **flags, **tile)]
    chunks, per_chunk = cfg["chunks"], cfg["per_chunk"]
    grid = (chunks, cdiv(C, cfg["BLOCK_C"]), B)
    return chunks, [
        Launch(_statistics, grid, *strides, C, P, per_chunk, SHIFT=flags["SHIFT"], **tile, STAGES=cfg["STAGES"]),
        Launch(_join, (groups, B), C, P, chunks, per_chunk, eps, WIDTH=width, CHUNKS=power_of_2(chunks, 1),
               BLOCK_C=power_of_2(width, 1), num_warps=_join_warps(chunks, width)),
        Launch(_normalise, grid, *strides, C, P, groups, per_chunk, **flags, **tile, STAGES=cfg["STAGES"]),
    ]  # fmt: skip


def _run(chunks, launches, x, weight, bias, shift, groups):
    """(y, mean, rstd) by these Launches: weight and bias contiguous, the shift's last axis too."""
    y = torch.empty_like(x)
    B, C = x.shape[:2]
    mean, rstd = x.new_empty((B, groups), dtype=torch.float32), x.new_empty((B, groups), dtype=torch.float32)
    shift = x if shift is None else shift
    if not chunks:
        launches[0](x, shift, weight, bias, y, mean, rstd)
        return y, mean, rstd
    # three kernels: numbers of each chunk and channel, numbers of each group, and y
    statistics, join, normalise = launches
    parts = x.new_empty((B, chunks, 2, C), dtype=torch.float32)
    statistics(x, shift, parts)
    join(parts, mean, rstd)
    normalise(x, shift, weight, bias, mean, rstd, y)
    return y, mean, rstd


@on_device
def forward(
    x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, groups: int, eps: float, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean [B, G], rstd [B, G]) by the kernels; y in the memory format of x."""
    shift = shift if shift is None or shift.stride(1) == 1 else shift.contiguous()
    chunks, launches = kept(_forward_launches, x, shift, groups, eps, silu, also=(weight, bias))
    return _run(chunks, launches, x, weight.contiguous(), bias.contiguous(), shift, groups)


op = torch.library.custom_op("nanodiff::group_norm", forward, mutates_args=())


@op.register_fake
def _(x, weight, bias, shift, groups, eps, silu):
    stats = (x.new_empty(len(x), groups, dtype=torch.float32) for _ in range(2))
    return torch.empty_like(x), *stats


def _backward_launches(x, dy, shift, groups, silu):
    """(chunks, Launches) for an x and dy [B, C, P] like these, as _forward_launches()."""
    (B, C, P), width = x.shape, x.shape[1] // groups
    flags = {"WIDTH": width, "SILU": silu, "SHIFT": shift is not None}
    cfg, strides = plan(x, groups, ON_CHIP_BACKWARD), (*x.stride(), *dy.stride())
    tile = {k: cfg[k] for k in ("BLOCK_P", "BLOCK_C", "num_warps")}
    if cfg["whole"]:
        return 0, [Launch(_whole_backward, (groups, B), *strides, C, P, **flags, **tile)]
    chunks, per_chunk = cfg["chunks"], cfg["per_chunk"]
    grid = (chunks, cdiv(C, cfg["BLOCK_C"]), B)
    return chunks, [
        Launch(_sums, grid, *strides, C, P, groups, per_chunk, **flags, **tile),
        Launch(_join_sums, (groups, B), C, P, chunks, WIDTH=width, SHIFT=flags["SHIFT"], CHUNKS=power_of_2(chunks, 1),
               BLOCK_C=power_of_2(width, 1), num_warps=_join_warps(chunks, width)),
        Launch(_backward_x, grid, *strides, C, P, groups, per_chunk, **flags, **tile),
    ]  # fmt: skip


@on_device
def backward(
    dy: Tensor, x: Tensor, weight: Tensor, bias: Tensor, shift: Tensor | None, mean: Tensor, rstd: Tensor, groups: int,
    silu: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dweight, dbias, dshift) by the kernels; dshift is empty where there was no shift."""
    dx = torch.empty_like(x)
    if not _flattens(dy):
        dy = dy.contiguous()
    x, dy, out = _flat(x), _flat(dy), _flat(dx)
    B, C, _ = x.shape
    weight, bias = weight.contiguous(), bias.contiguous()
    chunks, launches = kept(_backward_launches, x, dy, shift, groups, silu, also=(weight, bias))
    dshift = x.new_empty(0) if shift is None else torch.empty_like(shift, memory_format=torch.contiguous_format)
    shift = x if shift is None else shift.contiguous()
    s1, s2 = (x.new_empty(B, C, dtype=torch.float32) for _ in range(2))
    inputs = (x, shift, weight, bias, mean, rstd)
    if not chunks:
        launches[0](*inputs, dy, out, s1, s2, dshift)
    else:
        # three again: sums of each chunk, sums of each group, and dx
        sums, join, gradient = launches
        parts = x.new_empty(B, chunks, 3, C, dtype=torch.float32)
        a = x.new_empty(B, groups, 2, dtype=torch.float32)
        sums(*inputs, dy, parts)
        join(parts, weight, rstd, s1, s2, a, dshift)
        gradient(*inputs, a, dy, out)
    return dx, s2.sum(0).to(weight.dtype), s1.sum(0).to(bias.dtype), dshift


backward_op = torch.library.custom_op("nanodiff::group_norm_backward", backward, mutates_args=())


@backward_op.register_fake
def _(dy, x, weight, bias, shift, mean, rstd, groups, silu):
    dshift = x.new_empty(0) if shift is None else shift.new_empty(shift.shape)
    return torch.empty_like(x), weight.new_empty(weight.shape), bias.new_empty(bias.shape), dshift


def _setup(ctx, inputs, output):
    """What the backward pass keeps: x, mean and rstd, neither û nor z."""
    x, weight, bias, shift, ctx.groups, _, ctx.silu = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, weight, bias, shift, *output[1:])


def _backward(ctx, dy, *_):
    """dx, dweight, dbias, dshift; mean and rstd have no gradients of their own."""
    saved = ctx.saved_tensors  # once: with checkpointing, this is what computes them again
    dx, dweight, dbias, dshift = backward_op(dy, *saved, ctx.groups, ctx.silu)
    return dx, dweight, dbias, None if saved[3] is None else dshift, None, None, None


op.register_autograd(_backward, setup_context=_setup)


# 5. The public function ------------------------------------------------------------------------------------


def _flattens(x):
    """Whether [B, C, H, W, …] can be seen as [B, C, H·W·…]."""
    shape, stride = x.shape[2:], x.stride()[2:]
    return all(s == n * t for s, n, t in zip(stride, shape[1:], stride[1:], strict=False))


def _why_not(x, groups, weight, bias, shift):
    """Why the kernel cannot take these, or None. Raises ValueError for what nobody can take."""
    B, C = x.shape[:2]
    if C % groups or weight.shape != (C,) or bias.shape != (C,) or (shift is not None and shift.shape != (B, C)):
        raise ValueError(f"group_norm: {groups} groups, x {tuple(x.shape)}, weight {tuple(weight.shape)} do not fit")
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"group_norm is in {x.dtype}"
    if x.dim() < 3 or not _flattens(x):
        return "group_norm's pixels are no single stride"
    if x.numel() == 0 or x.numel() // B >= 2**31:
        return "group_norm has an image of no or of more than 2³¹ values"
    if not (x.is_contiguous() or x.movedim(1, -1).is_contiguous()):
        return "group_norm's memory format is neither contiguous nor channels last"
    return "group_norm has more than 65535 images" if len(x) > 65535 else None


def _plan(x, weight, bias, shift, groups, eps, silu):
    """f(x, weight, bias, shift) -> y for tensors like these without gradients, or None: see planned()."""
    if not use("group_norm", x, _why_not, x, groups, weight, bias, shift):
        return None
    if not (weight.is_contiguous() and bias.is_contiguous() and (shift is None or shift.stride(1) == 1)):
        return lambda x, weight, bias, shift: forward(x, weight, bias, shift, groups, eps, silu)[0]
    chunks, launches = _forward_launches(x, shift, groups, eps, silu)
    return on_device(lambda x, weight, bias, shift: _run(chunks, launches, x, weight, bias, shift, groups)[0])


def group_norm(x, groups, weight, bias, eps=1e-5, silu=False, shift=None):
    """silu(GroupNorm(x + shift)), or without SiLU: x [B, C, …] -> the same shape, type and memory format.

    weight, bias: [C]. shift: [B, C] or None. Statistics in fp32 whatever the type. Differentiable in x, weight, bias
    and shift.

    Raises ValueError for shapes that do not fit (the fallback: PyTorch's own errors), RuntimeError when the switch
    demands a kernel that cannot serve.
    """
    if (plan := planned(_plan, x, weight, bias, shift, groups, eps, silu)) is not None:
        return plan(x, weight, bias, shift)
    if use("group_norm", x, _why_not, x, groups, weight, bias, shift):
        return op(x, weight, bias, shift, groups, eps, silu)[0]
    x = x if shift is None else x + shift.view(*shift.shape, *[1] * (x.dim() - 2))
    x = torch.group_norm(x, groups, weight, bias, eps)
    return F.silu(x, inplace=not torch.is_grad_enabled()) if silu else x
