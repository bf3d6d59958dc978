"""Attention: o = softmax(q kᵀ · scale + bias) v, forward and backward, without ever writing the [L, S] scores.

The mathematics
    s_ij = scale · q_i·k_j + bias_ij  (−∞ where key j is hidden from query i)      lse_i = log Σ_j exp s_ij
    p_ij = exp(s_ij − lse_i)                                                       o_i = Σ_j p_ij v_j

Forward: keys come in blocks. A running maximum m and sum l are corrected by exp(m_old − m_new) whenever a block raises
the maximum (Milakov & Gimelshein 2018, arXiv 1805.02867; Dao et al. 2022, arXiv 2205.14135, algorithm 1). With m in
units of log 2, exp becomes the hardware's exp2. Up to 128 keys (a prompt of 77) fit on chip at once: then it is the
plain softmax, keys and values are read once for many rows of queries, and nothing is ever corrected.
    What it saves: at 4096 places, 8 heads of 40 and 16 bits the scores of one picture are 268 MB, written and read again;
    q, k, v and o together are 10 MB. The products themselves are the same.

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

Part 3, the Triton code, is in three files: attention_tiles.py (what the kernels share), attention_forward.py,
attention_backward.py.

Explained in the book (docs/book): chapter 6.
"""

import math

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from .attention_backward import backward_op
from .attention_forward import SHORT, forward_launch, op, run, starts_in_step
from .attention_tiles import keys_of
from .launch import planned
from .switch import mode, on_device, span, tuned, use

FUSED = {
    "flash": SDPBackend.FLASH_ATTENTION,
    "cudnn": SDPBackend.CUDNN_ATTENTION,
    "efficient": SDPBackend.EFFICIENT_ATTENTION,
}
ANY = [*FUSED.values(), SDPBackend.MATH]  # where that one cannot take a tensor


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


# 4. Autograd


def _setup(ctx, inputs, output):
    """What the backward pass keeps: inputs and outputs, no scores."""
    q, k, v, bias, key_mask, *ctx.options = inputs
    ctx.save_for_backward(q, k, v, bias, key_mask, *output)


def _backward(ctx, dout, dlse):
    """Gradients of q, k, v and bias; dout [B, L, N, K] of o, dlse [B, N, L] of lse, each None where nothing depends on it."""
    q, k, v, bias, key_mask, out, lse = ctx.saved_tensors
    dout = torch.zeros_like(out) if dout is None else dout
    want_bias = ctx.needs_input_grad[3]
    dq, dk, dv, dbias = backward_op(q, k, v, bias, key_mask, out, lse, dout, dlse, *ctx.options, want_bias)
    return dq, dk, dv, dbias if want_bias else None, None, None, None, None


# one node for autograd and for torch.compile, whatever the kernels do inside; without gradients, attention() goes past it (launch.py)
op.register_autograd(_backward, setup_context=_setup)


def _faster(q, k, masked):
    """Which of PyTorch's own attentions the table of this GPU says to be faster for tensors like these (FUSED), or None."""
    short = k.shape[1] <= SHORT and q.shape[3] <= 256 and q.element_size() == 2
    if short and masked:  # of which nothing was measured
        return None
    kind, length = ("short", q.shape[1]) if short else ("forward_masked" if masked else "forward", k.shape[1])
    return tuned(f"attention.{kind}", keys_of(q.shape[3], length, q.dtype), {}).get("TORCH")


# 5. The public function, and why it may fall back ------------------------------------------------------------


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
    """Raise ValueError for shapes that do not fit."""
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
    launch = forward_launch(q, k, v, bias, key_mask, number, causal, window, starts_in_step(k, v), None)

    # everything that depends on shapes, strides and types alone is decided by now
    @on_device
    def ours(q, k, v, bias, key_mask, return_lse):
        return run(launch, q, k, v, bias, key_mask)

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
