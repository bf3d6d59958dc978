"""LayerNorm and RMSNorm with their gain and offset (AdaLN's too), and the norm of q and k with its rotary embedding.

The mathematics, for one row x of D values:
    LayerNorm   μ = mean x,  r = 1/√(mean (x − μ)² + ε),  û = r (x − μ)            (Ba et al. 2016, arXiv 1607.06450)
    RMSNorm     r = 1/√(mean x² + ε),  û = r x                                 (Zhang & Sennrich 2019, arXiv 1910.07467)
    y = a û + c, where the gain a is a weight [D] or 1 + scale [B, D] (AdaLN: Peebles & Xie 2023, arXiv 2212.09748 §3.2;
    Gemma's RMSNorm has 1 + weight), the offset c a bias [D], a shift [B, D] or nothing.
    Backward, with g = a dy:  dx = r (g − mean g − û mean(g û)), for RMSNorm without `mean g`;
    da = Σ dy û and dc = Σ dy over the rows that share them, added up by blocks of rows in one order.

    Rotary embedding (Su et al. 2021, arXiv 2104.09864 eq. 34, halves as in LLaMA): with x = (x₁, x₂),
    y₁ = x₁ cos − x₂ sin,  y₂ = x₂ cos + x₁ sin. Backward is the rotation by the opposite angle.

A row lies in the registers of one program: it is read once and written once. Everything is computed in fp32.

Short rows come several to a program (ROWS), or a program of four warps would have ten values a thread: table.json says how many for
each width. What a gain and an offset need backward is a sum over all rows. A program adds up those of its rows in registers and
writes one line; PyTorch adds the lines, some 512 of them, in one order.

Names: p_ a pointer, s_ a stride of x and d_ one of dy in elements, o_ offsets (l rows, d columns, h columns of half a head, r heads
counted through), m_ masks.

Explained in the book (docs/book): chapter 15.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .launch import Launch, kept, planned
from .switch import cdiv, on_device, power_of_2, tl, triton, tuned, use

WIDEST = 8192  # values of a row that one program can hold

# 2. The plain reference ------------------------------------------------------------------------------------


def norm_reference(x, gain=None, offset=None, eps=1e-6, rms=False, plus_one=False):
    """The formulas above in the type of the inputs: x [B, L, D], gain and offset [D] or [B, D]."""
    u = x if rms else x - x.mean(-1, keepdim=True)
    u = u * (u.square().mean(-1, keepdim=True) + eps).rsqrt()
    gain, offset = (t[:, None] if t is not None and t.dim() == 2 else t for t in (gain, offset))
    u = u if gain is None else u * (gain + 1 if plus_one else gain)
    return u if offset is None else u + offset


def qk_norm_rope_reference(x, weight=None, cos=None, sin=None, eps=1e-6, plus_one=False):
    """x [B, L, N, K], weight [K] or None, cos sin [1 or B, L, K/2] or None -> [B, L, N, K]."""
    if weight is not None:
        x = x * (x.square().mean(-1, keepdim=True) + eps).rsqrt() * (weight + 1 if plus_one else weight)
    if cos is None:
        return x
    (a, b), cos, sin = x.chunk(2, dim=-1), cos[:, :, None], sin[:, :, None]
    return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)


# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _gain(p_gain, s_gain, b, o_d, m_d, GAIN: tl.constexpr, PLUS_ONE: tl.constexpr):
    """The gain of image b, [1, D]."""
    a = tl.full(o_d.shape, 1.0, tl.float32)
    if GAIN:
        a = tl.load(p_gain + b * s_gain + o_d, mask=m_d, other=0.0).to(tl.float32)
        if PLUS_ONE:
            a += 1
    return a[None, :]


@triton.jit
def _normed(u, p_gain, p_offset, s_gain, s_offset, b, o_d, m_d, D, eps, RMS: tl.constexpr, GAIN: tl.constexpr,
            OFFSET: tl.constexpr, PLUS_ONE: tl.constexpr):  # fmt: skip
    """(y, mean, rstd) of rows u of image b, in fp32; the mean is 0 for RMSNorm."""
    mean = tl.zeros([u.shape[0]], tl.float32)
    if not RMS:
        mean = tl.sum(u, 1) / D  # [rows]
        u = tl.where(m_d[None, :], u - mean[:, None], 0.0)
    rstd = 1 / tl.sqrt(tl.sum(u * u, 1) / D + eps)  # [rows]
    y = u * rstd[:, None] * _gain(p_gain, s_gain, b, o_d, m_d, GAIN, PLUS_ONE)  # [rows, D]
    if OFFSET:
        y += tl.load(p_offset + b * s_offset + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    return y, mean, rstd


@triton.jit
def _norm_forward(p_x, p_gain, p_offset, p_y, p_mean, p_rstd, s_b, s_l, s_gain, s_offset, L, D, eps, RMS: tl.constexpr,
                  GAIN: tl.constexpr, OFFSET: tl.constexpr, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK_D: tl.constexpr):  # fmt: skip
    """ROWS rows of one image: grid [blocks of L, B]."""
    b = tl.program_id(1).to(tl.int64)  # which image
    o_l, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_d = o_d < D  # [D]
    m = (o_l < L)[:, None] & m_d[None, :]  # [rows, D]
    # rows may lie apart (s_l), their values may not: a view of a joint projection is read without a copy
    u = tl.load(p_x + b * s_b + o_l.to(tl.int64)[:, None] * s_l + o_d[None, :], mask=m, other=0.0).to(tl.float32)
    y, mean, rstd = _normed(u, p_gain, p_offset, s_gain, s_offset, b, o_d, m_d, D, eps, RMS, GAIN, OFFSET, PLUS_ONE)
    if not RMS:
        tl.store(p_mean + b * L + o_l, mean, mask=o_l < L)
    tl.store(p_rstd + b * L + o_l, rstd, mask=o_l < L)
    o = (b * L + o_l)[:, None] * D + o_d[None, :]
    tl.store(p_y + o, y.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _norm_backward(p_x, p_gain, p_mean, p_rstd, p_dy, p_dx, p_sums, s_b, s_l, d_b, d_l, s_gain, L, D, per_program,
                   RMS: tl.constexpr, GAIN: tl.constexpr, PLUS_ONE: tl.constexpr, SUMS: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK_D: tl.constexpr):  # fmt: skip
    """dx of per_program rows, and their sums for the gain and the offset: grid [programs, B]. d_: strides of dy."""
    b = tl.program_id(1).to(tl.int64)  # which image
    o_d = tl.arange(0, BLOCK_D)
    m_d = o_d < D  # [D]
    a = _gain(p_gain, s_gain, b, o_d, m_d, GAIN, PLUS_ONE)  # [1, D]
    da, dc = tl.zeros([BLOCK_D], tl.float32), tl.zeros([BLOCK_D], tl.float32)
    first = tl.program_id(0) * per_program  # of the rows that this program adds up
    for start in range(first, tl.minimum(first + per_program, L), ROWS):
        o_l = start + tl.arange(0, ROWS)  # [rows]
        m_l = o_l < tl.minimum(first + per_program, L)
        m = m_l[:, None] & m_d[None, :]  # [rows, D]
        rows = o_l.to(tl.int64)[:, None]
        u = tl.load(p_x + b * s_b + rows * s_l + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        dy = tl.load(p_dy + b * d_b + rows * d_l + o_d[None, :], mask=m, other=0.0).to(tl.float32)
        rstd = tl.load(p_rstd + b * L + o_l, mask=m_l, other=0.0)[:, None]
        if not RMS:
            u -= tl.load(p_mean + b * L + o_l, mask=m_l, other=0.0)[:, None]
        u = tl.where(m, u * rstd, 0.0)  # û, from x and the two numbers that the forward pass kept
        g = dy * a  # [rows, D]
        # less what goes through r: its part along û; and through μ: its mean
        dx = g - u * (tl.sum(g * u, 1) / D)[:, None]
        if not RMS:
            dx -= (tl.sum(g, 1) / D)[:, None]
        tl.store(p_dx + (b * L + rows) * D + o_d[None, :], (dx * rstd).to(p_dx.dtype.element_ty), mask=m)
        if SUMS:
            da += tl.sum(dy * u, 0)  # [D]
            dc += tl.sum(dy, 0)  # [D]
    if SUMS:
        p_sums += (b * tl.num_programs(0) + tl.program_id(0)) * 2 * D + o_d
        tl.store(p_sums, da, mask=m_d)
        tl.store(p_sums + D, dc, mask=m_d)


@triton.jit
def _halves(p, rows, o_h, m, HALF: tl.constexpr):
    """The two halves of some heads, in fp32."""
    p += rows + o_h[None, :]
    return tl.load(p, mask=m, other=0.0).to(tl.float32), tl.load(p + HALF, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _angles(p_cos, p_sin, s_rope, b, o_l, o_h, m, HALF: tl.constexpr):
    """(cos, sin) of some tokens [rows, K/2]; 1 and 0, no rotation, where masked. s_rope: 0 where all images share them."""
    o = b * s_rope + o_l[:, None] * HALF + o_h[None, :]
    return tl.load(p_cos + o, mask=m, other=1.0).to(tl.float32), tl.load(p_sin + o, mask=m, other=0.0).to(tl.float32)


@triton.jit
def _rope_forward(p_x, p_weight, p_cos, p_sin, p_y, p_rstd, s_b, s_l, s_n, s_rope, L, N, eps, HALF: tl.constexpr,
                  NORM: tl.constexpr, ROPE: tl.constexpr, PLUS_ONE: tl.constexpr, ROWS: tl.constexpr,
                  BLOCK: tl.constexpr):  # fmt: skip
    """ROWS heads, counted through L·N of one image: grid [blocks of L·N, B]. Norm and rotation of q, or of k, in one pass: each half
    of a head is a tile, so the rotation is four products and no shuffling of values."""
    b = tl.program_id(1).to(tl.int64)  # which image
    o_r, o_h = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK)
    m_h = o_h < HALF  # [K/2]
    o_l, o_n = o_r // N, o_r % N  # token and head of each row
    m = (o_r < L * N)[:, None] & m_h[None, :]  # [rows, K/2]
    rows = (b * s_b + o_l.to(tl.int64) * s_l + o_n * s_n)[:, None]
    x1, x2 = _halves(p_x, rows, o_h, m, HALF)  # [rows, K/2] each
    if NORM:
        rstd = 1 / tl.sqrt((tl.sum(x1 * x1, 1) + tl.sum(x2 * x2, 1)) / (2 * HALF) + eps)  # [rows]
        tl.store(p_rstd + b * L * N + o_r, rstd, mask=o_r < L * N)
        a1, a2 = _gain(p_weight, 0, 0, o_h, m_h, True, PLUS_ONE), _gain(p_weight + HALF, 0, 0, o_h, m_h, True, PLUS_ONE)
        x1 *= rstd[:, None] * a1
        x2 *= rstd[:, None] * a2
    y1, y2 = x1, x2
    # the pair (x₁ᵢ, x₂ᵢ) is turned by the angle of its token and frequency; the product of two heads then depends on their distance alone
    if ROPE:
        cos, sin = _angles(p_cos, p_sin, s_rope, b, o_l, o_h, m, HALF)  # [rows, K/2] each
        y1, y2 = x1 * cos - x2 * sin, x2 * cos + x1 * sin
    p_y += (b * L * N + o_r)[:, None] * (2 * HALF) + o_h[None, :]
    tl.store(p_y, y1.to(p_y.dtype.element_ty), mask=m)
    tl.store(p_y + HALF, y2.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _rope_backward(p_x, p_weight, p_cos, p_sin, p_rstd, p_dy, p_dx, p_sums, s_b, s_l, s_n, d_b, d_l, d_n, s_rope, L, N,
                   per_program, HALF: tl.constexpr, NORM: tl.constexpr, ROPE: tl.constexpr, PLUS_ONE: tl.constexpr,
                   ROWS: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """dx of per_program heads and their sum for the weight: grid [programs, B]. d_: strides of dy."""
    b = tl.program_id(1).to(tl.int64)  # which image
    o_h = tl.arange(0, BLOCK)
    m_h = o_h < HALF  # [K/2]
    da1, da2 = tl.zeros([BLOCK], tl.float32), tl.zeros([BLOCK], tl.float32)
    if NORM:
        a1, a2 = _gain(p_weight, 0, 0, o_h, m_h, True, PLUS_ONE), _gain(p_weight + HALF, 0, 0, o_h, m_h, True, PLUS_ONE)
    first = tl.program_id(0) * per_program  # of the rows that this program adds up
    last = tl.minimum(first + per_program, L * N)
    for start in range(first, last, ROWS):
        o_r = start + tl.arange(0, ROWS)
        o_l, o_n = o_r // N, o_r % N  # token and head of each row
        m = (o_r < last)[:, None] & m_h[None, :]  # [rows, K/2]
        # [rows, K/2] each
        g1, g2 = _halves(p_dy, (b * d_b + o_l.to(tl.int64) * d_l + o_n * d_n)[:, None], o_h, m, HALF)
        dx1, dx2 = g1, g2
        # in the opposite order: first turned back, then through the norm
        if ROPE:
            cos, sin = _angles(p_cos, p_sin, s_rope, b, o_l, o_h, m, HALF)  # [rows, K/2] each
            dx1, dx2 = g1 * cos + g2 * sin, g2 * cos - g1 * sin
        if NORM:
            rstd = tl.load(p_rstd + b * L * N + o_r, mask=o_r < last, other=0.0)[:, None]
            # [rows, K/2] each
            x1, x2 = _halves(p_x, (b * s_b + o_l.to(tl.int64) * s_l + o_n * s_n)[:, None], o_h, m, HALF)
            x1, x2 = x1 * rstd, x2 * rstd
            da1 += tl.sum(dx1 * x1, 0)
            da2 += tl.sum(dx2 * x2, 0)
            dx1, dx2 = dx1 * a1, dx2 * a2
            # the part along û over both halves, which are one row of the norm
            both = ((tl.sum(dx1 * x1, 1) + tl.sum(dx2 * x2, 1)) / (2 * HALF))[:, None]
            dx1, dx2 = (dx1 - x1 * both) * rstd, (dx2 - x2 * both) * rstd  # [rows, K/2] each
        p = p_dx + (b * L * N + o_r)[:, None] * (2 * HALF) + o_h[None, :]
        tl.store(p, dx1.to(p_dx.dtype.element_ty), mask=m)
        tl.store(p + HALF, dx2.to(p_dx.dtype.element_ty), mask=m)
    if NORM:
        p_sums += (b * tl.num_programs(0) + tl.program_id(0)) * 2 * HALF + o_h
        tl.store(p_sums, da1, mask=m_h)
        tl.store(p_sums + HALF, da2, mask=m_h)


# 4. Autograd -----------------------------------------------------------------------------------------------


def _rows(kernel, width):
    """(rows, columns, warps) of a tile over rows of `width` values."""
    block = power_of_2(width)
    default = {"TILE": 2048 if "backward" in kernel else 4096, "num_warps": max(4, min(16, block // 512))}
    cfg = tuned(f"norms.{kernel}", (str(block),), default)
    return max(1, cfg["TILE"] // block), block, cfg["num_warps"]


def _programs(B, rows, each):
    """(programs, rows of each): about 512 programs, a rule of the shapes, the same at every call."""
    per_program = cdiv(cdiv(rows, max(1, 512 // B)), each) * each
    return cdiv(rows, per_program), per_program


def _per_image(t):
    """How far apart the images' gains lie: 0 for one weight [D], D for [B, D]."""
    return t.stride(0) if t is not None and t.dim() == 2 else 0


def _norm_launch(x, gain, offset, eps, rms, plus_one):
    """The Launch of norm_forward() for tensors like these."""
    B, L, D = x.shape
    rows, block, warps = _rows("layer", D)
    return Launch(_norm_forward, (cdiv(L, rows), B), *x.stride()[:2], _per_image(gain), _per_image(offset), L, D, eps,
                  RMS=rms, GAIN=gain is not None, OFFSET=offset is not None, PLUS_ONE=plus_one, ROWS=rows, BLOCK_D=block,
                  num_warps=warps)  # fmt: skip


def _run(launch, x, gain, offset):
    """(y, mean, rstd) by that Launch."""
    B, L, D = x.shape
    y, mean, rstd = x.new_empty((B, L, D)), *(x.new_empty((B, L), dtype=torch.float32) for _ in range(2))
    launch(x, gain if gain is not None else x, offset if offset is not None else x, y, mean, rstd)
    return y, mean, rstd


@on_device
def norm_forward(
    x: Tensor, gain: Tensor | None, offset: Tensor | None, eps: float, rms: bool, plus_one: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(y, mean, rstd) by the kernel: x [B, L, D]; mean and rstd [B, L]."""
    return _run(kept(_norm_launch, x, gain, offset, eps, rms, plus_one), x, gain, offset)


norm_op = torch.library.custom_op("nanodiff::norm", norm_forward, mutates_args=())


@norm_op.register_fake
def _(x, gain, offset, eps, rms, plus_one):
    return x.new_empty(x.shape), *(x.new_empty(x.shape[:2], dtype=torch.float32) for _ in range(2))


def _norm_backward_launch(x, dy, gain, offset, rms, plus_one):
    """(programs, the Launch of norm_backward()) for tensors like these."""
    B, L, D = x.shape
    rows, block, warps = _rows("layer_backward", D)
    programs, per_program = _programs(B, L, rows)
    return programs, Launch(_norm_backward, (programs, B), *x.stride()[:2], *dy.stride()[:2], _per_image(gain), L, D,
                            per_program, RMS=rms, GAIN=gain is not None, PLUS_ONE=plus_one,
                            SUMS=gain is not None or offset is not None, ROWS=rows, BLOCK_D=block,
                            num_warps=warps)  # fmt: skip


@on_device
def norm_backward(
    dy: Tensor, x: Tensor, gain: Tensor | None, offset: Tensor | None, mean: Tensor, rstd: Tensor, rms: bool,
    plus_one: bool,
) -> tuple[Tensor, Tensor, Tensor]:  # fmt: skip
    """(dx, dgain, doffset) by the kernel; the last two are empty where there is none."""
    B, L, D = x.shape
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx = x.new_empty(B, L, D)
    programs, launch = kept(_norm_backward_launch, x, dy, gain, offset, rms, plus_one)
    sums = x.new_empty(B, programs, 2, D, dtype=torch.float32)
    launch(x, gain if gain is not None else x, mean, rstd, dy, dx, sums)

    def of(t, i):
        if t is None:
            return x.new_empty(0)
        return sums[:, :, i].sum(1 if t.dim() == 2 else (0, 1)).to(t.dtype)

    return dx, of(gain, 0), of(offset, 1)


norm_backward_op = torch.library.custom_op("nanodiff::norm_backward", norm_backward, mutates_args=())


@norm_backward_op.register_fake
def _(dy, x, gain, offset, mean, rstd, rms, plus_one):
    return x.new_empty(x.shape), *(x.new_empty(0) if t is None else t.new_empty(t.shape) for t in (gain, offset))


def _norm_setup(ctx, inputs, output):
    """What the backward pass keeps: x, mean and rstd, not û."""
    x, gain, offset, _, ctx.rms, ctx.plus_one = inputs
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x, gain, offset, *output[1:])


def _norm_gradients(ctx, dy, *_):
    """dx, dgain, doffset; mean and rstd have no gradients of their own."""
    saved = ctx.saved_tensors  # once: with checkpointing, this is what computes them again
    dx, dgain, doffset = norm_backward_op(dy, *saved, ctx.rms, ctx.plus_one)
    return dx, None if saved[1] is None else dgain, None if saved[2] is None else doffset, None, None, None


norm_op.register_autograd(_norm_gradients, setup_context=_norm_setup)


def _rope_launch(x, weight, cos, eps, plus_one):
    """The Launch of rope_forward() for tensors like these."""
    B, L, N, K = x.shape
    rows, block, warps = _rows("rope", K // 2)
    return Launch(_rope_forward, (cdiv(L * N, rows), B), *x.stride()[:3],
                  0 if cos is None or len(cos) == 1 else cos.stride(0), L, N, eps, HALF=K // 2, NORM=weight is not None,
                  ROPE=cos is not None, PLUS_ONE=plus_one, ROWS=rows, BLOCK=block, num_warps=warps)  # fmt: skip


@on_device
def rope_forward(
    x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, eps: float, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """(y, rstd) by the kernel: x [B, L, N, K]; rstd [B, L, N], empty without a weight."""
    B, L, N, K = x.shape
    y = x.new_empty(B, L, N, K)
    rstd = x.new_empty((B, L, N) if weight is not None else 0, dtype=torch.float32)
    launch = kept(_rope_launch, x, weight, cos, eps, plus_one, also=() if sin is None else (sin,))
    launch(x, weight if weight is not None else x, *((cos, sin) if cos is not None else (x, x)), y, rstd)
    return y, rstd


rope_op = torch.library.custom_op("nanodiff::qk_norm_rope", rope_forward, mutates_args=())


@rope_op.register_fake
def _(x, weight, cos, sin, eps, plus_one):
    return x.new_empty(x.shape), x.new_empty(x.shape[:3] if weight is not None else 0, dtype=torch.float32)


def _rope_backward_launch(x, dy, weight, cos, plus_one):
    """(programs, the Launch of rope_backward()) for tensors like these."""
    B, L, N, K = x.shape
    rows, block, warps = _rows("rope_backward", K // 2)
    programs, per_program = _programs(B, L * N, rows)
    return programs, Launch(_rope_backward, (programs, B), *x.stride()[:3], *dy.stride()[:3],
                            0 if cos is None or len(cos) == 1 else cos.stride(0), L, N, per_program, HALF=K // 2,
                            NORM=weight is not None, ROPE=cos is not None, PLUS_ONE=plus_one, ROWS=rows, BLOCK=block,
                            num_warps=warps)  # fmt: skip


@on_device
def rope_backward(
    dy: Tensor, x: Tensor, weight: Tensor | None, cos: Tensor | None, sin: Tensor | None, rstd: Tensor, plus_one: bool
) -> tuple[Tensor, Tensor]:
    """(dx, dweight) by the kernel; dweight is empty without a weight."""
    B, L, N, K = x.shape
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    dx = x.new_empty(B, L, N, K)
    programs, launch = kept(_rope_backward_launch, x, dy, weight, cos, plus_one, also=() if sin is None else (sin,))
    sums = x.new_empty(B, programs, K, dtype=torch.float32)
    launch(x, weight if weight is not None else x, *((cos, sin) if cos is not None else (x, x)), rstd, dy, dx, sums)
    return dx, x.new_empty(0) if weight is None else sums.sum((0, 1)).to(weight.dtype)


rope_backward_op = torch.library.custom_op("nanodiff::qk_norm_rope_backward", rope_backward, mutates_args=())


@rope_backward_op.register_fake
def _(dy, x, weight, cos, sin, rstd, plus_one):
    return x.new_empty(x.shape), x.new_empty(0) if weight is None else weight.new_empty(weight.shape)


def _rope_setup(ctx, inputs, output):
    """What the backward pass keeps: x and rstd, neither the normed nor the turned."""
    x, weight, cos, sin, _, ctx.plus_one = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, cos, sin, output[1])


def _rope_gradients(ctx, dy, _):
    saved = ctx.saved_tensors
    dx, dweight = rope_backward_op(dy, *saved, ctx.plus_one)
    return dx, None if saved[1] is None else dweight, None, None, None, None


rope_op.register_autograd(_rope_gradients, setup_context=_rope_setup)


# 5. The public functions -----------------------------------------------------------------------------------


def _why_not(x, name, *more):
    """Why the kernel cannot take these, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{name} is in {x.dtype}"
    if x.shape[-1] > WIDEST:
        return f"{name} has rows of {x.shape[-1]} values, more than {WIDEST}"
    if any(t is not None and t.stride(-1) != 1 for t in (x, *more)):
        return f"{name}'s last axis is not contiguous"
    if name == "qk_norm_rope" and x.shape[-1] % 2:
        return "a head has an odd size"
    if x.shape[0] > 65535:
        return f"{name} has more than 65535 images"
    return "a tensor is empty" if x.numel() == 0 else None


def _why_not_rows(name, x, gain, offset):
    """_why_not() of a row norm; raises ValueError for a gain or an offset that does not fit."""
    for t in (gain, offset):
        if t is not None and t.shape not in ((x.shape[-1],), (x.shape[0], x.shape[-1])):
            raise ValueError(f"{name}: gain or offset {tuple(t.shape)} does not fit x {tuple(x.shape)}")
    return _why_not(x, name, gain, offset)


def _plan(x, gain, offset, name, eps, rms, plus_one):
    """f(x, gain, offset) -> y for tensors like these without gradients, or None: see planned()."""
    if not use(name, x, _why_not_rows, name, x, gain, offset):
        return None
    of_image = gain is not None and gain.dim() == 2
    if x.dim() != 3:
        images = x.shape[0] if of_image else 1
        return lambda x, gain, offset: norm_forward(
            x.reshape(images, -1, x.shape[-1]), gain, offset, eps, rms, plus_one
        )[0].view(x.shape)
    launch = _norm_launch(x, gain, offset, eps, rms, plus_one)
    return on_device(lambda x, gain, offset: _run(launch, x, gain, offset)[0])


def _norm(name, x, gain, offset, eps, rms, plus_one=False):
    """y in the shape of x by the kernel, or None where PyTorch must."""
    if (plan := planned(_plan, x, gain, offset, name, eps, rms, plus_one)) is not None:
        return plan(x, gain, offset)
    if not use(name, x, _why_not_rows, name, x, gain, offset):
        return None
    rows = x if x.dim() == 3 else x.reshape(x.shape[0] if gain is not None and gain.dim() == 2 else 1, -1, x.shape[-1])
    return norm_op(rows, gain, offset, eps, rms, plus_one)[0].view(x.shape)


def layer_norm(x, weight=None, bias=None, eps=1e-5, scale=None, shift=None):
    """LayerNorm over the last axis: x [B, …, D] -> the same shape and type.

    Either weight and bias [D] (or neither), or AdaLN's scale and shift [B, D]: û (1 + scale) + shift. Differentiable
    in all of them. Raises ValueError for shapes that do not fit (the fallback: PyTorch's own errors), RuntimeError as the
    switch says.
    """
    if (scale is None) != (shift is None) or (scale is not None and (weight is not None or bias is not None)):
        raise ValueError("layer_norm: either weight and bias, or scale and shift, both of them")
    adaptive = scale is not None
    y = _norm("layer_norm", x, *((scale, shift) if adaptive else (weight, bias)), eps, rms=False, plus_one=adaptive)
    if y is not None:
        return y
    if not adaptive:
        return F.layer_norm(x, x.shape[-1:], weight, bias, eps)
    scale, shift = (t.view(len(t), *[1] * (x.dim() - 2), -1) for t in (scale, shift))
    return F.layer_norm(x, x.shape[-1:], eps=eps) * (1 + scale) + shift


def rms_norm(x, weight=None, eps=1e-6, plus_one=False):
    """RMSNorm over the last axis: x [B, …, D], weight [D] or None -> the same shape and type. plus_one: Gemma's gain
    1 + weight. Raises as layer_norm() does."""
    y = _norm("rms_norm", x, weight, None, eps, rms=True, plus_one=plus_one)
    return y if y is not None else _rms(x, weight, eps, plus_one)


def _rms(x, weight, eps, plus_one):
    """By PyTorch; in fp32 where it would warn of two types (fp32 weights under autocast), and for 1 + weight, since bf16 has 8 bits for it."""
    half = x.dtype in (torch.bfloat16, torch.float16)
    if weight is None or not half or (weight.dtype == x.dtype and not plus_one):
        return F.rms_norm(x, x.shape[-1:], 1 + weight if plus_one else weight, eps)
    return F.rms_norm(x.float(), x.shape[-1:], 1 + weight.float() if plus_one else weight.float(), eps).to(x.dtype)


def _rope_plan(x, weight, cos, sin, eps, plus_one):
    """f(x, weight, cos, sin) -> y for tensors like these without gradients, or None: see planned()."""
    if not use("qk_norm_rope", x, _why_not, x, "qk_norm_rope", weight, cos, sin):
        return None
    if cos is not None and not (cos.is_contiguous() and sin.is_contiguous()):
        return lambda x, weight, cos, sin: rope_forward(x, weight, cos.contiguous(), sin.contiguous(), eps, plus_one)[0]
    return lambda x, weight, cos, sin: rope_forward(x, weight, cos, sin, eps, plus_one)[0]


def qk_norm_rope(x, weight=None, cos=None, sin=None, eps=1e-6, plus_one=False):
    """RMSNorm of each head (with a weight [K]), then the rotary embedding (with cos and sin [1 or B, L, K/2]):
    x [B, L, N, K], any strides but a contiguous last axis -> [B, L, N, K]. Differentiable in x and weight.

    Raises ValueError for shapes that do not fit, RuntimeError as the switch says.
    """
    B, L, _, K = x.shape
    if cos is not None and (K % 2 or cos.shape[1:] != (L, K // 2) or len(cos) not in (1, B) or sin.shape != cos.shape):
        raise ValueError(f"qk_norm_rope: cos {tuple(cos.shape)} does not fit x {tuple(x.shape)}")
    if (plan := planned(_rope_plan, x, weight, cos, sin, eps, plus_one)) is not None:
        return plan(x, weight, cos, sin)
    if use("qk_norm_rope", x, _why_not, x, "qk_norm_rope", weight, cos, sin):
        cos, sin = (None, None) if cos is None else (cos.contiguous(), sin.contiguous())
        return rope_op(x, weight, cos, sin, eps, plus_one)[0]
    if weight is not None:
        x = _rms(x, weight, eps, plus_one)
    return qk_norm_rope_reference(x, cos=cos, sin=sin).to(x.dtype)
