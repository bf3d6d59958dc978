"""What the kernels of attention share: tiles of tensors and of scores, what is seen, and how they are started.

A program owns one block of a tensor and walks over the blocks of another; in registers it holds tiles, [BLOCK_L, D] of queries or
[BLOCK_S, D] of keys. Every function below is inlined into the kernel that calls it. Parameters that are tl.constexpr are known when a
kernel is compiled, so an `if` of one leaves no branch: it is how one text serves heads of 40 and of 512, with a bias and without.

Names: p_ a pointer, s_ a stride in elements, o_ offsets (the indices of a tile's rows or columns), b and n the batch and the head of a
program, l queries, s keys, d numbers of a head. (Other letters: attention.py.)

Explained in the book (docs/book): chapter 6.
"""

import math

import torch

from .switch import architecture, cdiv, halves, tl, triton, tuned

LOG2E = tl.constexpr(math.log2(math.e))  # exp(x) = exp2(x · LOG2E)

# 3. The Triton code: what several kernels do -----------------------------------------------------------------


@triton.jit
def known(s_b, s_row, s_n, ALIGN: tl.constexpr):
    """Three strides that are multiples of ALIGN, in a form from which the compiler sees it: 16 bytes then go at once."""
    if ALIGN > 1:
        s_b, s_row, s_n = s_b // ALIGN * ALIGN, s_row // ALIGN * ALIGN, s_n // ALIGN * ALIGN
    return s_b, s_row, s_n


@triton.jit
def tile(p, o_row, s_row, o_col, s_col, rows, cols, ROWS: tl.constexpr, COLS: tl.constexpr):
    """p[o_row, o_col]; zeros beyond `rows` and `cols`, checked where ROWS and COLS say that these can be crossed.

    A check is a comparison an element and, worse, loads that the compiler may not join: blocks in the middle go without."""
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
def heads(p, o_row, s_row, s_col, rows, cols, ROWS: tl.constexpr, K: tl.constexpr, D0: tl.constexpr,
           D1: tl.constexpr):  # fmt: skip
    """Rows of one head as two tiles [rows, D0] and [rows, D1]; the first one twice when one holds all of K.

    A tile's sides are powers of two. 40 numbers are 32 and 16 with 8 masked, not 64: what enters the products grows by 1.2, not 1.6."""
    x0 = tile(p, o_row, s_row, tl.arange(0, D0), s_col, rows, cols, ROWS, D0 > K)
    x1 = x0
    if D1 > 0:
        x1 = tile(p, o_row, s_row, D0 + tl.arange(0, D1), s_col, rows, cols, ROWS, D0 + D1 > K)
    return x0, x1


@triton.jit
def store(p, x0, x1, o_row, s_row, rows, cols, D0: tl.constexpr, D1: tl.constexpr):
    """The inverse of heads() into a tensor whose last axis is contiguous: rounded from fp32 to its type, here and nowhere before."""
    o_d = tl.arange(0, D0)
    p += o_row[:, None] * s_row
    tl.store(p + o_d[None, :], x0.to(p.dtype.element_ty), mask=(o_row[:, None] < rows) & (o_d[None, :] < cols))
    if D1 > 0:
        o_d = D0 + tl.arange(0, D1)
        tl.store(p + o_d[None, :], x1.to(p.dtype.element_ty), mask=(o_row[:, None] < rows) & (o_d[None, :] < cols))


@triton.jit
def product(a0, a1, b0, b1, D1: tl.constexpr, PRECISION: tl.constexpr):
    """a bᵀ over both parts of the head: [rows of a, rows of b] in fp32, whatever the operands are (the tensor cores add in fp32).
    PRECISION: of fp32 operands, see precision()."""
    s = tl.dot(a0, tl.trans(b0), input_precision=PRECISION)
    if D1 > 0:
        s = tl.dot(a1, tl.trans(b1), s, input_precision=PRECISION)
    return s


@triton.jit
def product_wide(p_a, o_a, s_a, s_ad, rows_a, p_b, o_b, s_b, s_bd, rows_b, K, PRECISION: tl.constexpr):
    """a bᵀ of heads too wide to be held: both come 32 columns at a time. A block of 64 × 512 in fp32 would be 128 KB, half of all the
    registers of a multiprocessor."""
    s = tl.zeros([o_a.shape[0], o_b.shape[0]], tl.float32)
    for start in range(0, K, 32):
        o_d = start + tl.arange(0, 32)
        a = tile(p_a, o_a, s_a, o_d, s_ad, rows_a, K, True, True)
        s = tl.dot(a, tl.trans(tile(p_b, o_b, s_b, o_d, s_bd, rows_b, K, True, True)), s, input_precision=PRECISION)
    return s


@triton.jit
def seen(o_l, o_s, L, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr):
    """visible() of a tile; the last query sees the last key, so the diagonal is shifted by S − L."""
    ok = o_s < S  # rows beyond L need none: they are computed from zeros and not stored
    if CAUSAL:
        ok = ok & (o_s <= o_l + S - L)
    if WINDOW > 0:
        ok = ok & (o_s > o_l + S - L - WINDOW) & (o_s < o_l + S - L + WINDOW)
    return ok


@triton.jit
def keys_range(start, rows, L, S, CAUSAL: tl.constexpr, WINDOW: tl.constexpr, BLOCK: tl.constexpr):
    """(lo, full_lo, full_hi, hi): keys that queries start … start + rows − 1 see at all, and between them the whole
    blocks that every one of these queries sees entirely.

    So of a causal square half of the blocks are never loaded, and the forward pass masks none but those on the diagonal."""
    # the diagonal: the keys at the place of the first and of the last query
    first, last = start + S - L, start + rows - 1 + S - L
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


# 4. How they are started -------------------------------------------------------------------------------------


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
    # the wider a head, the fewer rows of it fit: five levels by its padded width
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


def configured(kind, q, k, masked=False):
    (L, _, K), S = q.shape[1:], k.shape[1]
    kind = f"{kind}_masked" if masked else kind
    keys = keys_of(K, S if kind.startswith(("forward", "backward_q")) else L, q.dtype)
    found = tuned(f"attention.{kind}", keys, config(kind, K, q.element_size()))
    found.pop("TORCH", None)
    return found


def precision():
    """How fp32 products are taken: exactly to fp32, by three tf32 products where the GPU has them, unless PyTorch has
    been told that one is enough."""
    if not architecture().startswith("sm_"):
        return "ieee"
    return "tf32" if torch.backends.cuda.matmul.fp32_precision == "tf32" else "tf32x3"


def one_tf32(dtype):
    """What precision() rests on, as a part of a call's signature."""
    return dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision


def steps_of(*tensors):
    """Strides of the batches, rows and heads that there are."""
    return [s for t in tensors for s, n in zip(t.stride()[:3], t.shape[:3], strict=True) if n > 1]


def alignment(*tensors):
    """What the kernels must be told of these strides: that all are multiples of 16 bytes (in elements), or 1, nothing. Of
    multiples of 16 elements Triton knows itself. AMD's compiler makes spills of it, and nothing was measured there."""
    if architecture().startswith("gfx"):
        return 1
    steps, size = steps_of(*tensors), 16 // tensors[0].element_size()
    return size if any(s % 16 for s in steps) and all(s % size == 0 for s in steps) else 1


def strides_of(bias, key_mask):
    """The four strides of the bias and the two of the mask: 0 where one value serves all, and where there is none."""
    of_bias = (0, 0, 0, 0)
    if bias is not None:
        shared = (0 if n == 1 else s for n, s in zip(bias.shape[:2], bias.stride()[:2], strict=True))
        of_bias = (*shared, *bias.stride()[2:])
    return (*of_bias, *((0, 0) if key_mask is None else key_mask.stride()))


def given(bias, key_mask, like):
    """(bias, mask) as pointers: a dummy where there is none."""
    return like if bias is None else bias, like if key_mask is None else key_mask.view(torch.uint8)


def flags_of(q, bias, key_mask, causal, window, *aligned):
    """Constants that the kernels share."""
    D0, D1, _, wide = columns(q.shape[-1], q.element_size())
    return {"K": q.shape[-1], "D0": D0, "D1": D1, "BIAS": bias is not None, "MASK": key_mask is not None, "CAUSAL": causal,
            "WINDOW": window, "PRECISION": precision(), "WIDE": wide, "ALIGN": alignment(q, *aligned)}  # fmt: skip
