"""Gated units, and a linear layer with its cross-entropy whose logits never exist.

The mathematics
    GEGLU, SwiGLU    y = value · act(gate)                                     (Shazeer 2020, arXiv 2002.05202 eq. 5–6)
                     dvalue = dy · act(gate),  dgate = dy · value · act′(gate)
    act              gelu(z) = z Φ(z),  its tanh form,  silu(z) = z sig(z)

    Cross-entropy of logits_tv = x_t·w_v with targets y_t:
                     loss_t = lse_t − x_t·w_y,  lse_t = log Σ_v exp logits_tv
                     G_tv = (exp(logits_tv − lse_t) − [v = y_t]) dloss_t,   dx = G w,   dw = Gᵀ x
A captioner has 128k–262k words: the logits of 8k tokens would take 4 GB in bf16 and as much again for their gradient.
Forward, one kernel multiplies tile by tile and keeps a running log-sum-exp. Backward, G is made for a few thousand
words at a time and at once multiplied away (Wijmans et al. 2024, arXiv 2411.09009, without their atomics).

Names: p_ a pointer, s_ from row to row of it, o_ offsets (t tokens, v words, d columns), m_ masks; T tokens, V words, D width.
"""

import torch
import torch.nn.functional as F
from torch import Tensor

from .attention_tiles import precision
from .launch import Launch, kept, planned
from .switch import cdiv, on_device, power_of_2, tl, triton, tuned, use

ACTIVATIONS = {"gelu": F.gelu, "gelu_tanh": lambda z: F.gelu(z, approximate="tanh"), "silu": F.silu}
WORDS = 8192  # of the vocabulary at a time, in the backward pass

# 2. The plain reference ------------------------------------------------------------------------------------


def gated_reference(value, gate, activation):
    """value · act(gate) in the type of the inputs."""
    if activation == "silu":
        return value * gate / (1 + torch.exp(-gate))
    if activation == "gelu":
        return value * gate * 0.5 * (1 + torch.erf(gate * 0.5**0.5))
    return value * gate * 0.5 * (1 + torch.tanh((2 / torch.pi) ** 0.5 * (gate + 0.044715 * gate**3)))


def linear_cross_entropy_reference(x, weight, target, ignore_index=-100):
    """The losses [T] of logits = x weightᵀ, in the type of the inputs."""
    logits = x @ weight.T
    kept = target != ignore_index
    at_target = logits.gather(1, target.masked_fill(~kept, 0)[:, None])[:, 0]
    return (logits.logsumexp(-1) - at_target) * kept


# 3. The Triton code ----------------------------------------------------------------------------------------


@triton.jit
def _activation(z, KIND: tl.constexpr):
    """(act(z), act′(z)) of fp32 values. Constants: √½, 1/√(2π), 2√(2/π) and 3 · 0.044715."""
    if KIND == "silu":
        sig = 1 / (1 + tl.exp(-z))
        y = z * sig
        slope = sig * (1 + z * (1 - sig))
    elif KIND == "gelu":
        phi = 0.5 * (1 + tl.erf(z * 0.7071067811865476))
        y = z * phi
        slope = phi + z * 0.3989422804014327 * tl.exp(-0.5 * z * z)
    else:  # ½ (1 + tanh s) = sig(2 s)
        sig = 1 / (1 + tl.exp(-1.5957691216057308 * (z + 0.044715 * z * z * z)))
        y = z * sig
        slope = sig + z * sig * (1 - sig) * 1.5957691216057308 * (1 + 0.134145 * z * z)
    return y, slope


@triton.jit
def _gated_forward(p_value, p_gate, p_y, s_value, s_gate, D, KIND: tl.constexpr, BLOCK: tl.constexpr):
    """BLOCK columns of one row: grid [rows, blocks of D]. Two values read and one written, in place of three read and two written by
    act() and the product after each other."""
    row, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < D  # [columns]
    value = tl.load(p_value + row * s_value + o, mask=m, other=0.0).to(tl.float32)  # [columns]
    y, _ = _activation(tl.load(p_gate + row * s_gate + o, mask=m, other=0.0).to(tl.float32), KIND)
    tl.store(p_y + row * D + o, (value * y).to(p_y.dtype.element_ty), mask=m)


@triton.jit
def _gated_backward(p_value, p_gate, p_dy, p_dvalue, p_dgate, s_value, s_gate, s_dy, s_dvalue, s_dgate, D,
                    KIND: tl.constexpr, BLOCK: tl.constexpr):  # fmt: skip
    """Both gradients of BLOCK columns of one row: grid [rows, blocks of D]. act is computed again, not kept."""
    row, o = tl.program_id(0).to(tl.int64), tl.program_id(1) * BLOCK + tl.arange(0, BLOCK)
    m = o < D  # [columns]
    value = tl.load(p_value + row * s_value + o, mask=m, other=0.0).to(tl.float32)  # [columns]
    dy = tl.load(p_dy + row * s_dy + o, mask=m, other=0.0).to(tl.float32)  # [columns]
    y, slope = _activation(tl.load(p_gate + row * s_gate + o, mask=m, other=0.0).to(tl.float32), KIND)
    tl.store(p_dvalue + row * s_dvalue + o, (dy * y).to(p_dvalue.dtype.element_ty), mask=m)
    tl.store(p_dgate + row * s_dgate + o, (dy * value * slope).to(p_dgate.dtype.element_ty), mask=m)


@triton.jit
def _logits(p_x, p_w, s_x, s_w, o_t, o_v, T, V, D, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
            BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """x_t·w_v of one tile, −∞ beyond the vocabulary: [BLOCK_T, BLOCK_V] in fp32, added up over D by BLOCK_D columns at a time."""
    s = tl.zeros([BLOCK_T, BLOCK_V], tl.float32)
    for start in range(0, D, BLOCK_D):
        o_d = start + tl.arange(0, BLOCK_D)  # [columns]
        m_d = (o_d < D)[None, :]
        x = tl.load(p_x + o_t.to(tl.int64)[:, None] * s_x + o_d[None, :], mask=(o_t < T)[:, None] & m_d, other=0.0)
        w = tl.load(p_w + o_v.to(tl.int64)[:, None] * s_w + o_d[None, :], mask=(o_v < V)[:, None] & m_d, other=0.0)
        s = tl.dot(x, tl.trans(w), s, input_precision=PRECISION)  # [tokens, words]
    return tl.where((o_v < V)[None, :], s, -float("inf"))


@triton.jit
def _losses(p_x, p_w, p_target, p_lse, p_at, s_x, s_w, T, V, D, per_split, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr,
            BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """Log-sum-exp over per_split words, and the target's logit where it is among them: grid [blocks of T, splits]."""
    o_t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)  # [tokens]
    target = tl.load(p_target + o_t, mask=o_t < T, other=-1)
    m_i, l_i = tl.full([BLOCK_T], -1e30, tl.float32), tl.zeros([BLOCK_T], tl.float32)
    at = tl.zeros([BLOCK_T], tl.float32)
    first = tl.program_id(1) * per_split  # word of this split
    for start in range(first, tl.minimum(first + per_split, V), BLOCK_V):
        o_v = start + tl.arange(0, BLOCK_V)  # [words]
        s = _logits(p_x, p_w, s_x, s_w, o_t, o_v, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION)  # [tokens, words]
        # the target's logit comes by in exactly one tile, of all splits together
        at += tl.sum(tl.where(o_v[None, :] == target[:, None], s, 0.0), 1)
        # the online softmax's sum, as in attention.py
        m_new = tl.maximum(m_i, tl.max(s, 1))  # [tokens]
        l_i = l_i * tl.exp(m_i - m_new) + tl.sum(tl.exp(s - m_new[:, None]), 1)
        m_i = m_new
    # a line for each split; their log-sum-exp is that of all words
    o = tl.program_id(1) * T + o_t
    tl.store(p_lse + o, m_i + tl.log(l_i), mask=o_t < T)
    tl.store(p_at + o, at, mask=o_t < T)


@triton.jit
def _gradient(p_x, p_w, p_target, p_lse, p_dloss, p_g, s_x, s_w, first, T, V, D, BLOCK_T: tl.constexpr,
              BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, PRECISION: tl.constexpr):  # fmt: skip
    """G [T, V] for V words from `first` on, to which p_w points: grid [blocks of V, blocks of T]."""
    o_v = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)  # [words]
    o_t = tl.program_id(1) * BLOCK_T + tl.arange(0, BLOCK_T)  # [tokens]
    m_t = o_t < T
    s = _logits(p_x, p_w, s_x, s_w, o_t, o_v, T, V, D, BLOCK_T, BLOCK_V, BLOCK_D, PRECISION)  # [tokens, words]
    # the softmax itself, from the kept lse; an ignored token has dloss 0, so its row is 0
    p = tl.exp(s - tl.load(p_lse + o_t, mask=m_t, other=0.0)[:, None])
    hit = (o_v + first)[None, :] == tl.load(p_target + o_t, mask=m_t, other=-1)[:, None]  # [tokens, words]
    g = (p - tl.where(hit, 1.0, 0.0)) * tl.load(p_dloss + o_t, mask=m_t, other=0.0)[:, None]
    p_g += o_t.to(tl.int64)[:, None] * V + o_v[None, :]
    tl.store(p_g, g.to(p_g.dtype.element_ty), mask=m_t[:, None] & (o_v < V)[None, :])


# 4. Autograd -----------------------------------------------------------------------------------------------


def _gated_tile(D):
    """(columns, warps) of a program over rows of D values."""
    cfg = tuned("gated", (str(power_of_2(D)),), {"BLOCK": min(1024, power_of_2(D)), "num_warps": 4})
    return cfg["BLOCK"], cfg["num_warps"]


def _gated_launch(value, gate, activation):
    """The Launch of gated_forward() for tensors like these."""
    rows, D = value.shape
    block, warps = _gated_tile(D)
    return Launch(_gated_forward, (rows, cdiv(D, block)), value.stride(0), gate.stride(0), D, KIND=activation, BLOCK=block,
                  num_warps=warps)  # fmt: skip


@on_device
def gated_forward(value: Tensor, gate: Tensor, activation: str) -> Tensor:
    """value · act(gate) of [rows, D] by the kernel."""
    y = value.new_empty(value.shape)
    kept(_gated_launch, value, gate, activation)(value, gate, y)
    return y


gated_op = torch.library.custom_op("nanodiff::gated", gated_forward, mutates_args=())
gated_op.register_fake(lambda value, gate, activation: value.new_empty(value.shape))


@on_device
def gated_backward(dy: Tensor, value: Tensor, gate: Tensor, activation: str) -> Tensor:
    """[rows, 2, D]: dvalue and dgate side by side by the kernel, so that the halves of one projection need no joining."""
    rows, D = value.shape
    dy = dy if dy.stride(-1) == 1 else dy.contiguous()
    both = value.new_empty(rows, 2, D)
    block, warps = _gated_tile(D)
    _gated_backward[(rows, cdiv(D, block))](value, gate, dy, both, both[:, 1], value.stride(0), gate.stride(0),
                                            dy.stride(0), 2 * D, 2 * D, D, KIND=activation, BLOCK=block,
                                            num_warps=warps)  # fmt: skip
    return both


gated_backward_op = torch.library.custom_op("nanodiff::gated_backward", gated_backward, mutates_args=())
gated_backward_op.register_fake(lambda dy, value, gate, activation: value.new_empty(len(value), 2, value.shape[1]))


def _gated_setup(ctx, inputs, output):
    """What the backward pass keeps: both inputs, not act(gate)."""
    value, gate, ctx.activation = inputs
    ctx.save_for_backward(value, gate)


def _gated_gradients(ctx, dy):
    """dvalue and dgate of one kernel."""
    dvalue, dgate = gated_backward_op(dy, *ctx.saved_tensors, ctx.activation).unbind(1)
    return dvalue, dgate, None


gated_op.register_autograd(_gated_gradients, setup_context=_gated_setup)


# The two halves of one projection: the same kernels, and a gradient that is one tensor.


@on_device
def halves_forward(x: Tensor, activation: str) -> Tensor:
    """value · act(gate) of x [rows, 2 D] = (value, gate) by the kernel."""
    return gated_forward(*x.chunk(2, dim=-1), activation)


halves_op = torch.library.custom_op("nanodiff::gated_halves", halves_forward, mutates_args=())
halves_op.register_fake(lambda x, activation: x.new_empty(len(x), x.shape[1] // 2))


def _halves_setup(ctx, inputs, output):
    """What the backward pass keeps: the projection as it came."""
    x, ctx.activation = inputs
    ctx.save_for_backward(x)


def _halves_gradients(ctx, dy):
    return gated_backward_op(dy, *ctx.saved_tensors[0].chunk(2, dim=-1), ctx.activation).flatten(1), None


halves_op.register_autograd(_halves_gradients, setup_context=_halves_setup)


def _product_tile(x):
    """The tile of the matrix products here; table.json may know better."""
    small = {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_D": 32} if x.element_size() == 4 else {}
    default = {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_D": 64, "num_warps": 8, "num_stages": 3} | small
    return tuned("linear_cross_entropy", (str(x.dtype).removeprefix("torch."),), default)


def _exact(x):
    """Half precision as fp32 on a CPU, which multiplies it slowly and would round the logits to it."""
    return x if x.is_cuda or x.element_size() >= 4 else x.float()


@on_device
def losses(x: Tensor, weight: Tensor, target: Tensor, ignore_index: int, fused: bool) -> tuple[Tensor, Tensor]:
    """(losses [T], lse [T]) in fp32: by the kernel, or with `fused` false by PyTorch, WORDS words at a time."""
    (T, D), V = x.shape, len(weight)
    if fused:
        tile = _product_tile(x)
        # enough programs to fill a GPU also where there are few tokens: each takes a part of the words
        splits = max(1, min(32, 512 // cdiv(T, tile["BLOCK_T"])))
        per_split = cdiv(cdiv(V, splits), tile["BLOCK_V"]) * tile["BLOCK_V"]
        splits = cdiv(V, per_split)
        lse, at = (x.new_empty(splits, T, dtype=torch.float32) for _ in range(2))
        _losses[(cdiv(T, tile["BLOCK_T"]), splits)](x, weight, target, lse, at, x.stride(0), weight.stride(0), T, V, D,
                                                    per_split, PRECISION=precision(), **tile)  # fmt: skip
        lse, at = lse.logsumexp(0), at.sum(0)
    else:
        parts = [(_exact(x) @ _exact(w).T).float().logsumexp(-1) for w in weight.split(WORDS)]
        lse = torch.stack(parts).logsumexp(0)
        at = (x.float() * weight[target.clamp(0, V - 1)].float()).sum(-1)
    return (lse - at).masked_fill(target == ignore_index, 0.0), lse


losses_op = torch.library.custom_op("nanodiff::linear_cross_entropy", losses, mutates_args=())
losses_op.register_fake(
    lambda x, weight, target, ignore_index, fused: tuple(x.new_empty(len(x), dtype=torch.float32) for _ in range(2))
)


@on_device
def losses_backward(
    dloss: Tensor,
    x: Tensor,
    weight: Tensor,
    target: Tensor,
    lse: Tensor,
    ignore_index: int,
    fused: bool,
    learns: bool = True,
) -> tuple[Tensor, Tensor]:
    """(dx, dweight), with G for WORDS words at a time. learns: else dweight is empty, and costs nothing."""
    (T, D), V = x.shape, len(weight)
    dloss = dloss.masked_fill(target == ignore_index, 0.0).float().contiguous()
    dx, dweight = x.new_zeros(T, D, dtype=torch.float32), weight.new_empty(V if learns else 0, D)
    # G [T, WORDS] lives for one round: 8,192 tokens of 8,192 words are 128 MiB in bf16, of a vocabulary of 128,256 they would be 2 GB
    for first in range(0, V, WORDS):
        w = weight[first : first + WORDS]
        if fused:
            g = x.new_empty(T, len(w))
            tile = _product_tile(x)
            _gradient[(cdiv(len(w), tile["BLOCK_V"]), cdiv(T, tile["BLOCK_T"]))](
                x, w, target, lse, dloss, g, x.stride(0), w.stride(0), first, T, len(w), D, PRECISION=precision(),
                **tile)  # fmt: skip
        else:
            p = ((_exact(x) @ _exact(w).T).float() - lse[:, None]).exp()
            hit = target[:, None] - first == torch.arange(len(w), device=x.device)  # [tokens, words]
            g = ((p - hit.float()) * dloss[:, None]).to(x.dtype)
        dx += _exact(g) @ _exact(w)
        if learns:
            torch.mm(g.T, x, out=dweight[first : first + WORDS])
    return dx.to(x.dtype), dweight


losses_backward_op = torch.library.custom_op(
    "nanodiff::linear_cross_entropy_backward", losses_backward, mutates_args=()
)
losses_backward_op.register_fake(
    lambda dloss, x, weight, target, lse, ignore_index, fused, learns=True: (
        x.new_empty(x.shape),
        weight.new_empty(len(weight) if learns else 0, weight.shape[1]),
    )
)


def _losses_setup(ctx, inputs, output):
    """What the backward pass keeps: the inputs and one number a token."""
    x, weight, target, ctx.ignore_index, ctx.fused = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.save_for_backward(x, weight, target, output[1])


def _losses_gradients(ctx, dloss, _):
    """dx, and dweight where the weight learns (under LoRA it does not, and costs nothing); lse itself has no gradient."""
    learns = ctx.needs_input_grad[1]
    dx, dweight = losses_backward_op(dloss, *ctx.saved_tensors, ctx.ignore_index, ctx.fused, learns)
    return dx, dweight if learns else None, None, None, None


losses_op.register_autograd(_losses_gradients, setup_context=_losses_setup)


# 5. The public functions -----------------------------------------------------------------------------------


def _why_not(name, *tensors):
    """Why the kernel cannot take these, or None."""
    x = tensors[0]
    if x.dtype not in (torch.float32, torch.float16, torch.bfloat16) or any(t.dtype != x.dtype for t in tensors):
        return f"{name} is in {', '.join(sorted({str(t.dtype) for t in tensors}))}"
    if any(t.stride(-1) != 1 for t in tensors):
        return f"{name}'s last axis is not contiguous"
    return "a tensor is empty" if any(t.numel() == 0 for t in tensors) else None


def _gated_plan(value, gate, name, activation):
    """f(value, gate) -> y for tensors like these without gradients, or None: see planned()."""
    if not use(name, value, _why_not, name, value, gate):
        return None
    D = value.shape[-1]
    return lambda value, gate: gated_forward(value.reshape(-1, D), gate.reshape(-1, D), activation).view(value.shape)


def _halves_plan(x, activation):
    """f(x) -> y of a projection like this without gradients, or None: see planned()."""
    if not use("geglu", x, _why_not, "geglu", x):
        return None
    if not x.is_contiguous():
        return lambda x: halves_forward(x.reshape(-1, x.shape[-1]), activation).view(*x.shape[:-1], -1)
    D = x.shape[-1] // 2
    flat = x.view(-1, 2 * D)
    launch = _gated_launch(*flat.chunk(2, dim=-1), activation)

    @on_device
    def plan(x):
        y = x.new_empty((*x.shape[:-1], D))
        launch(x, x.as_strided((1,), (1,), x.storage_offset() + D), y)
        return y

    return plan


def _gated(name, value, gate, activation):
    """value · act(gate) of two tensors by the kernel or PyTorch; `name` for errors and the switch."""
    if activation not in ACTIVATIONS:
        raise ValueError(f"{name}: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if value.shape != gate.shape:
        raise ValueError(f"{name}: value {tuple(value.shape)}, gate {tuple(gate.shape)}")
    if (plan := planned(_gated_plan, value, gate, name, activation)) is not None:
        return plan(value, gate)
    if use(name, value, _why_not, name, value, gate):
        D = value.shape[-1]
        return gated_op(value.reshape(-1, D), gate.reshape(-1, D), activation).view(value.shape)
    return value * ACTIVATIONS[activation](gate)


def geglu(x, activation="gelu"):
    """value · gelu(gate) of x [..., 2 D] = (value, gate) -> [..., D]. activation: gelu, gelu_tanh or silu.

    Raises ValueError for another activation, RuntimeError as the switch says.
    """
    if activation not in ACTIVATIONS:
        raise ValueError(f"geglu: {activation!r} is not one of {', '.join(ACTIVATIONS)}")
    if x.shape[-1] % 2:
        raise ValueError(f"geglu: the last axis has {x.shape[-1]} values, no two halves")
    if (plan := planned(_halves_plan, x, activation)) is not None:
        return plan(x)
    if use("geglu", x, _why_not, "geglu", x):
        return halves_op(x.reshape(-1, x.shape[-1]), activation).view(*x.shape[:-1], -1)
    value, gate = x.chunk(2, dim=-1)
    return value * ACTIVATIONS[activation](gate)


def swiglu(gate, value, activation="silu"):
    """act(gate) · value of two projections [..., D] (LLaMA: silu; T5 and Gemma: gelu_tanh). Raises as geglu() does."""
    return _gated("swiglu", value, gate, activation)


def linear_cross_entropy(x, weight, target, ignore_index=-100, reduction="mean"):
    """Cross-entropy of the logits x weightᵀ, which are never stored: x [T, D], weight [V, D], target [T] -> a number, or
    [T] with reduction "none", in fp32. Targets equal to ignore_index count neither in the sum nor in the mean; others must
    lie in [0, V), which is not checked. Under autocast both operands are cast, as a linear layer's are.

    Differentiable in x and weight. Raises ValueError for shapes that do not fit, RuntimeError as the switch says.
    """
    if x.dim() != 2 or weight.dim() != 2 or x.shape[1] != weight.shape[1] or target.shape != x.shape[:1]:
        shapes = f"x {tuple(x.shape)}, weight {tuple(weight.shape)}, target {tuple(target.shape)}"
        raise ValueError(f"linear_cross_entropy: {shapes} do not fit")
    if reduction not in ("mean", "sum", "none"):
        raise ValueError(f"linear_cross_entropy: reduction {reduction!r} is not one of mean, sum, none")
    if torch.is_autocast_enabled(x.device.type):
        kind = torch.get_autocast_dtype(x.device.type)
        x, weight = x.to(kind), weight.to(kind)
    if x.dtype != weight.dtype:
        raise ValueError(f"linear_cross_entropy: x is {x.dtype}, weight {weight.dtype}")
    target = target.contiguous()
    fused = use("linear_cross_entropy", x, _why_not, "linear_cross_entropy", x, weight)
    loss = losses_op(x, weight, target, ignore_index, fused)[0]
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / (target != ignore_index).sum()
