"""The smallest kernel, in the five parts that every file of this package has: y = x · gain, row by row.

The mathematics
    y_nd = x_nd g_d,      dx_nd = dy_nd g_d,      dg_d = Σ_n dy_nd x_nd
A row is read once, multiplied in fp32 and written once: two bytes in and two out for each value, which is all that such a kernel can be fast by.
"""

import torch

from .switch import cdiv, on_device, power_of_2, tl, triton, use

# 2. The plain reference ------------------------------------------------------------------------------------


def scaled_reference(x, gain):
    """x [.., D] times gain [D], in the type of the inputs."""
    return x * gain


# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _scaled(p_x, p_gain, p_y, D, BLOCK: tl.constexpr):
    """BLOCK columns of one row: grid [rows, blocks of D]. p_ pointer, o offset, m mask, b block."""
    row, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < D
    b_x = tl.load(p_x + row * D + o, mask=m, other=0.0).to(tl.float32)
    b_gain = tl.load(p_gain + o, mask=m, other=0.0).to(tl.float32)
    tl.store(p_y + row * D + o, (b_x * b_gain).to(p_y.dtype.element_ty), mask=m)


@on_device
def _launch(x, gain):
    """A program for each piece of up to 1,024 columns of each row: x contiguous."""
    y, D = torch.empty_like(x), x.shape[-1]
    block = min(power_of_2(D), 1024)
    _scaled[(x.numel() // D, cdiv(D, block))](x, gain, y, D, BLOCK=block)
    return y


# 4. Autograd -----------------------------------------------------------------------------------------------


class _Scaled(torch.autograd.Function):
    """The kernel and its gradients: dx is the same kernel over dy; dg, a sum over all rows, is left to PyTorch."""

    @staticmethod
    def forward(ctx, x, gain):
        ctx.save_for_backward(x, gain)
        return _launch(x, gain)

    @staticmethod
    def backward(ctx, dy):
        x, gain = ctx.saved_tensors
        dgain = (dy.float() * x.float()).flatten(0, -2).sum(0).to(gain.dtype)
        return _launch(dy.contiguous(), gain), dgain


# 5. The public function, and why it may fall back ------------------------------------------------------------


def _why_not(x, gain):
    """None where the kernel can serve, else the reason in words."""
    if not x.is_contiguous() or not gain.is_contiguous():
        return "a tensor is not contiguous"
    return None if gain.shape == x.shape[-1:] else "the gain has another width"


def scaled(x, gain):
    """x [.., D] · gain [D], any floating type, sums in fp32. Falls back to PyTorch as `--kernels` says (switch.py)."""
    if use("template", x, _why_not, x, gain):
        return _Scaled.apply(x, gain)
    return scaled_reference(x, gain)
