"""What stands between two products of a network, in one pass instead of three: residual, gate, bias and the next norm.

The mathematics, for rows x, y, z [B, L, D] and gates g [B, D]:
    s = x + g y + h z,  then  LayerNorm(s) as in norms.py                 (a transformer's residual and the norm after it;
                                                                            gates: Peebles & Xie 2023, arXiv 2212.09748)
and for pictures x, y [B, C, H, W]:
    s = x + y + β_c                            (a residual block: β is the bias of the convolution that made y, which
                                                 PyTorch would add in a pass of its own)
    s[2i + a, 2j + e] = y^{ae}[i + a, j + e] + β_c          (the four phases of a doubled picture, see upsample.Upsample)

For inference: where gradients are asked for, or torch.compile does the fusing, the same is composed of operators that know
them. Everything is computed in fp32; s is rounded to the type of x, and it is the rounded s that is normed.

Counted in passes over [B, L, D], reads and writes together: a residual and its norm take PyTorch 5 (x and y read, s written; s read,
its norm written) and this kernel 4, since s is normed while it is there; with two gated parts 8 and 5. One launch in place of two or three.
"""

import torch

from . import launch
from .launch import Launch, kept
from .norms import WIDEST, _gain, _normed, _per_image, _rows, layer_norm
from .switch import cdiv, on_device, tl, triton, tuned, use

# 2. The plain reference ------------------------------------------------------------------------------------


def residual_reference(x, y, gate=None, z=None, gate_z=None):
    """x + gate·y + gate_z·z by the formula: [B, L, D], gates [B, D] or None."""
    s = x + (y if gate is None else gate[:, None] * y)
    return s if z is None else s + (z if gate_z is None else gate_z[:, None] * z)


def add_bias_reference(y, bias, x=None):
    """x + y + bias: [B, C, …], bias [C]."""
    s = y + bias.view(-1, *[1] * (y.dim() - 2))
    return s if x is None else x + s


def interleave_reference(y, bias=None, last=True):
    """The phases y [B, 4 C, H + 1, W + 1] as one picture [B, C, 2 H, 2 W], plus bias [C]. last: channels last."""
    y = y.unflatten(1, (4, -1))
    (B, _, C), H, W = y.shape[:3], y.shape[3] - 1, y.shape[4] - 1
    out = y.new_empty((B, 2 * H, 2 * W, C)).permute(0, 3, 1, 2) if last else y.new_empty(B, C, 2 * H, 2 * W)
    for a, e in ((0, 0), (0, 1), (1, 0), (1, 1)):
        out[:, :, a::2, e::2] = y[:, 2 * a + e, :, a : a + H, e : e + W]
    return out if bias is None else out + bias.view(-1, 1, 1)


# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _residual_norm(p_x, p_y, p_gate, p_z, p_gate_z, p_gain, p_offset, p_more, p_sum, p_out, s_gate, s_gate_z, s_gain, s_offset, L,
                   D, eps, GATE: tl.constexpr, TWO: tl.constexpr, GATE_Z: tl.constexpr, GAIN: tl.constexpr,
                   OFFSET: tl.constexpr, PLUS_ONE: tl.constexpr, MORE: tl.constexpr, ROWS: tl.constexpr,
                   BLOCK_D: tl.constexpr):  # fmt: skip
    """ROWS rows of one image, contiguous: grid [blocks of L, B]."""
    b = tl.program_id(1).to(tl.int64)  # which image, for its gates
    o_l, o_d = tl.program_id(0) * ROWS + tl.arange(0, ROWS), tl.arange(0, BLOCK_D)
    m_d = o_d < D  # [D]
    m = (o_l < L)[:, None] & m_d[None, :]  # [rows, D]
    o = (b * L + o_l)[:, None] * D + o_d[None, :]  # [rows, D]
    # s = x + g y + h z; a gate that is not there is 1, and is not loaded
    s = tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    s += tl.load(p_y + o, mask=m, other=0.0).to(tl.float32) * _gain(p_gate, s_gate, b, o_d, m_d, GATE, False)
    if TWO:
        s += tl.load(p_z + o, mask=m, other=0.0).to(tl.float32) * _gain(p_gate_z, s_gate_z, b, o_d, m_d, GATE_Z, False)
    # the norm is of s rounded to its type, as it is where s and its norm are operators of their own
    u = s.to(p_sum.dtype.element_ty).to(tl.float32)
    s = u
    # the bias of a product that is to be added to s by the product itself: here, where s is in registers, it costs nothing
    if MORE:
        s += tl.load(p_more + o_d, mask=m_d, other=0.0).to(tl.float32)[None, :]
    tl.store(p_sum + o, s.to(p_sum.dtype.element_ty), mask=m)
    # [rows, D]
    y, _, _ = _normed(u, p_gain, p_offset, s_gain, s_offset, b, o_d, m_d, D, eps, False, GAIN, OFFSET, PLUS_ONE)
    tl.store(p_out + o, y.to(p_out.dtype.element_ty), mask=m)


@triton.jit
def _add_bias(p_y, p_x, p_bias, n, C, INNER: tl.constexpr, ADD: tl.constexpr, BLOCK: tl.constexpr):
    """y += bias (+ x) in place; INNER: values that share a channel lie together so many at a time. Grid [blocks of n]."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n  # [BLOCK]
    s = tl.load(p_y + o, mask=m, other=0.0).to(tl.float32)
    # the channel of a value: every value its own in channels last (INNER = 1), H·W of them together else
    s += tl.load(p_bias + o // INNER % C, mask=m, other=0.0).to(tl.float32)
    if ADD:
        s += tl.load(p_x + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + o, s.to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _interleave(p_y, p_bias, p_out, n, C, H, W, BLOCK: tl.constexpr):
    """Phases to a picture, channels last: grid [blocks of n = 4 B H W C]."""
    o = tl.program_id(0).to(tl.int64) * BLOCK + tl.arange(0, BLOCK)
    m = o < n  # [BLOCK]
    # from the place in the picture to the phase (a, e) that made it, and to its place there
    c, pixel = o % C, o // C
    column, row = pixel % (2 * W), pixel // (2 * W) % (2 * H)
    a, e = row % 2, column % 2
    here = (pixel // (4 * H * W) * (H + 1) + row // 2 + a) * (W + 1) + column // 2 + e
    s = tl.load(p_y + (here * 4 + 2 * a + e) * C + c, mask=m, other=0.0).to(tl.float32)
    s += tl.load(p_bias + c, mask=m, other=0.0).to(tl.float32)
    tl.store(p_out + o, s.to(p_out.dtype.element_ty), mask=m)


# 4. No autograd: see above --------------------------------------------------------------------------------


def _residual_launch(x, gate, z, gate_z, gain, offset, more, eps, plus_one):
    """The Launch of residual_forward() for tensors like these."""
    B, L, D = x.shape
    rows, block, warps = _rows("layer", D)
    strides = (_per_image(t) for t in (gate, gate_z, gain, offset))
    return Launch(_residual_norm, (cdiv(L, rows), B), *strides, L, D, eps, GATE=gate is not None, TWO=z is not None,
                  GATE_Z=gate_z is not None, GAIN=gain is not None, OFFSET=offset is not None, PLUS_ONE=plus_one, MORE=more is not None,
                  ROWS=rows, BLOCK_D=block, num_warps=warps)  # fmt: skip


@on_device
def residual_forward(x, y, gate, z, gate_z, gain, offset, more, eps, plus_one):
    """(s, its norm) by the kernel: x, y, z [B, L, D] contiguous."""
    total, out = torch.empty_like(x), torch.empty_like(x)
    started = kept(_residual_launch, x, gate, z, gate_z, gain, offset, more, eps, plus_one, also=(y,))
    started(x, y, *(x if t is None else t for t in (gate, z, gate_z, gain, offset, more)), total, out)
    return total, out


def _bias_launch(y, x):
    """The Launch of bias_forward() for tensors like these."""
    cfg = tuned("add_bias", (str(y.element_size()),), {"BLOCK": 2048, "num_warps": 4})
    inner = 1 if y.stride(1) == 1 else y.shape[2:].numel()
    return Launch(
        _add_bias, (cdiv(y.numel(), cfg["BLOCK"]),), y.numel(), y.shape[1], INNER=inner, ADD=x is not None, **cfg
    )


@on_device
def bias_forward(y, bias, x):
    """y + bias (+ x) by the kernel, in place."""
    kept(_bias_launch, y, x, also=(bias,))(y, y if x is None else x, bias)
    return y


def _interleave_launch(y, n):
    """The Launch of interleave_forward() for phases like these, n values together."""
    cfg = tuned("add_bias", (str(y.element_size()),), {"BLOCK": 2048, "num_warps": 4})
    return Launch(_interleave, (cdiv(n, cfg["BLOCK"]),), n, y.shape[1] // 4, y.shape[2] - 1, y.shape[3] - 1, **cfg)


@on_device
def interleave_forward(y, bias):
    """The picture that the phases y (channels last) make, by the kernel."""
    B, C, H, W = y.shape
    out = y.new_empty(B, 2 * H - 2, 2 * W - 2, C // 4)
    kept(_interleave_launch, y, out.numel(), also=(bias,))(y, bias, out)
    return out.permute(0, 3, 1, 2)


# 5. The public functions -----------------------------------------------------------------------------------


def lean(x):
    """Whether other forms may take the place of operators that autograd, autocast or torch.compile know: nobody of them is there,
    and x is a plain tensor."""
    if torch.is_grad_enabled() or torch.compiler.is_compiling() or x.is_meta:
        return False
    return launch.real(x) and not torch.is_autocast_enabled(x.device.type)


def _why_not(name, x, *tensors):
    """Why the kernel cannot take these, or None."""
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"{name} is in {x.dtype}"
    if any(t is not None and t.stride(-1) != 1 for t in tensors) or not x.is_contiguous():
        return f"{name}'s tensors are not contiguous"
    if x.shape[-1] > WIDEST:
        return f"{name} has rows of {x.shape[-1]} values, more than {WIDEST}"
    return "a tensor is empty" if x.numel() == 0 else None


def residual_norm(x, y, gate=None, z=None, gate_z=None, weight=None, bias=None, eps=1e-5, scale=None, shift=None,
                  more=None):  # fmt: skip
    """(s, LayerNorm(s)) for s = x + gate·y + gate_z·z: x, y, z [B, L, D], gates [B, D] or None (1).

    weight and bias [D], or AdaLN's scale and shift [B, D], as in layer_norm(). more [D] is added to s once it was normed: the
    bias of a product that will be added to s. Raises as layer_norm() does.
    """
    adaptive = scale is not None
    gain, offset = (scale, shift) if adaptive else (weight, bias)
    alike = all(t is None or (t.shape == x.shape and t.is_contiguous()) for t in (y, z))
    if lean(x) and alike and use("residual_norm", x, _why_not, "residual_norm", x, gate, gate_z, gain, offset, more):
        return residual_forward(x, y, gate, z, gate_z, gain, offset, more, eps, adaptive)
    s = x + y if gate is None else torch.addcmul(x, gate[:, None], y)
    if z is not None:
        s = s + z if gate_z is None else torch.addcmul(s, gate_z[:, None], z)
    return s if more is None else s + more, layer_norm(s, weight, bias, eps, scale, shift)


def _why_no_bias(y):
    """Why add_bias() cannot take y, or None."""
    if y.dtype not in (torch.float32, torch.float16, torch.bfloat16):
        return f"add_bias is in {y.dtype}"
    return "a tensor is empty" if y.numel() == 0 else None


def add_bias(y, bias, x=None):
    """y + bias (+ x), in place where nobody needs gradients: y, x [B, C, …] of one memory format, bias [C]."""
    dense = y.is_contiguous() or y.movedim(1, -1).is_contiguous()
    alike = x is None or (x.stride() == y.stride() and x.dtype == y.dtype)
    if lean(y) and dense and alike and use("add_bias", y, _why_no_bias, y):
        return bias_forward(y, bias, x)
    s = y + bias.to(y.dtype).view(-1, *[1] * (y.dim() - 2))
    return s if x is None else x + s


def _why_not_interleave(y):
    """Why interleave() cannot take y, or None."""
    return _why_no_bias(y) or (
        None if y.movedim(1, -1).is_contiguous() else "interleave's phases are not channels last"
    )


def interleave(y, bias=None, last=True):
    """The phases y [B, 4 C, H + 1, W + 1] of a doubled picture, (0, 0), (0, 1), (1, 0), (1, 1) after each other, as one picture
    [B, C, 2 H, 2 W], plus bias [C]. last: the picture's channels last. Without gradients."""
    if bias is not None and last and lean(y) and use("interleave", y, _why_not_interleave, y):
        return interleave_forward(y, bias)
    return interleave_reference(y, bias, last)
