"""Triton kernels: attention, GroupNorm, row norms, residuals, gated units and linear-cross-entropy, each beside its mathematics.

Each of these files has five parts: the mathematics, a plain reference, the Triton code, autograd, and the public function with
its fallback. `switch.py` says how the fallback is chosen; `python -m kernels.report` compiles everything without a GPU.
"""

from .attention import attention
from .gated import geglu, linear_cross_entropy, swiglu
from .group_norm import group_norm
from .norms import layer_norm, qk_norm_rope, rms_norm
from .residual import add_bias, interleave, lean, residual_norm
from .switch import backend, set_backend

__all__ = ["add_bias", "attention", "backend", "geglu", "group_norm", "interleave", "layer_norm", "lean", "linear_cross_entropy", "qk_norm_rope",
           "residual_norm", "rms_norm", "set_backend", "swiglu"]  # fmt: skip
