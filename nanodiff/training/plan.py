"""What a training run will take, before it is started: memory by part, FLOPs, days. Nothing is computed: the models live on
the meta device, an update is traced there, and every tensor's birth and death is followed.

What it leaves out: memory that allocators hold and do not use, the libraries' own, the optimizer's temporaries.
"""

import contextlib
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils.flop_counter import FlopCounterMode

from nanodiff.device import dist, memory
from nanodiff.training import recipe

GPUS = {  # dense bf16 FLOP/s, memory in GB (the makers' data sheets)
    "a100": (312e12, 80), "h100": (989e12, 80), "h200": (989e12, 141), "b200": (2250e12, 192), "l40s": (362e12, 48),
    "rtx4090": (165e12, 24), "rtx3090": (71e12, 24), "mi300x": (1307e12, 192), "v100": (125e12, 32),
}  # fmt: skip


class _Attention(torch.autograd.Function):
    """Attention's shapes and what a fused kernel keeps for its backward pass."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, lse = torch.empty_like(q), torch.empty(q.shape[:-1], dtype=torch.float32, device=q.device)
        ctx.save_for_backward(q, k, v, out, lse)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _Traced(TorchFunctionMode):
    """Stands in for what the meta device lacks: fused attention (counted here), and autocast to `dtype`."""

    LOW, HIGH = (
        (F.linear, F.conv2d, torch.matmul, torch.bmm),
        (F.group_norm, F.layer_norm, torch.nn.functional.rms_norm),
    )

    def __init__(self, dtype):
        super().__init__()
        self.dtype, self.attention, self.casts = dtype, 0, {}

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if self.dtype and func in self.LOW:
            args, kwargs = [self._cast(a) for a in args], {k: self._cast(v) for k, v in kwargs.items()}
        elif self.dtype and func in self.HIGH:
            args = [a.float() if isinstance(a, torch.Tensor) and a.dtype == self.dtype else a for a in args]
        if func is F.scaled_dot_product_attention:
            q, k, v = args[:3]
            B, N, L, K = q.shape
            trained = torch.is_grad_enabled() and (q.requires_grad or k.requires_grad)
            self.attention += 4 * B * N * L * k.shape[2] * K * (3.5 if trained else 1)  # 2 products forward, 5 backward
            return _Attention.apply(q, k, v) if trained else torch.empty_like(q)
        return func(*args, **kwargs)

    def _cast(self, value):
        if not isinstance(value, torch.Tensor) or value.dtype != torch.float32:
            return value
        if not isinstance(value, torch.nn.Parameter):
            return value.to(self.dtype)
        if id(value) not in self.casts:  # autocast keeps a cast weight for the whole forward pass
            self.casts[id(value)] = value.to(self.dtype)
        return self.casts[id(value)]


class Estimate(NamedTuple):
    """Of one process, in bytes, and FLOPs of one of its micro-batches, forward and backward."""

    trained: int  # parameters, of the whole model
    frozen: int
    weights: float
    gradients: float
    optimizer: float
    average: float
    activations: float
    gathered: float  # FSDP's largest unsharded units
    peak: float
    flops: float


def estimate(trained, loss, frozen=(), frozen_bytes=4, dtype=None, world=1, parallel="ddp", ema=True,
             recompute=False, optimizer="adamw"):  # fmt: skip
    """Estimate of a run. trained, frozen: {name: module on the meta device}; loss(): a micro-batch's scalar loss there.

    dtype: autocast's, or None. parallel: "ddp" keeps everything on every process, "fsdp" shards weights, gradients,
    optimizer and average over `world` processes and gathers a unit at a time. recompute: see dist.recompute. optimizer: two numbers a
    parameter, but "muon" one for those that it takes.
    """
    modules = torch.nn.ModuleDict(trained)
    own = [p for p in modules.parameters() if p.requires_grad]
    n, still = sum(p.numel() for p in own), sum(p.numel() for p in modules.parameters() if not p.requires_grad)
    apart = sum(memory.count(m) for m in dict(frozen).values())
    alive, traced = memory._Alive(modules), _Traced(dtype)
    counter, kept, before = FlopCounterMode(display=False), [], {}

    def enter(unit, args):
        before[id(unit)] = alive.now

    def leave(unit, args, out):
        ends = sum(t.untyped_storage().nbytes() for t in (out if isinstance(out, tuple) else (out,)) if t is not None)
        kept.append(alive.now - before[id(unit)] - ends)  # what its backward pass needs beyond its output

    hooks = [
        h for u in dist.units(modules) for h in (u.register_forward_pre_hook(enter), u.register_forward_hook(leave))
    ]
    with contextlib.ExitStack() as stack:
        stack.enter_context(counter)
        stack.enter_context(alive)
        with traced:
            value = loss()
            traced.casts.clear()
        forward, once = alive.peak, counter.get_total_flops() + traced.attention / 3.5
        value.backward()
    for hook in hooks:
        hook.remove()
    one = max(kept, default=0)
    if recompute:  # of all units only one at a time keeps what its backward pass needs; their forward passes run twice
        forward -= sum(kept) - one
    shards = world if parallel == "fsdp" else 1
    sizes = sorted((sum(p.numel() for p in u.parameters()) for u in dist.units(modules)), reverse=True)
    gathered = 4.0 * sum(sizes[:2]) if parallel == "fsdp" else 0.0
    weights = 4.0 * (n + still) / shards + frozen_bytes * apart
    one_number = sum(p.numel() for p in recipe.hidden(modules)) if optimizer == "muon" else 0
    gradients, states, average = 4.0 * n / shards, 4.0 * (2 * n - one_number) / shards, 4.0 * n / shards if ema else 0.0
    # the worst moment: the end of the forward pass, or one of the backward pass, when whole gradients are there already
    working = max(forward, gradients + one if recompute else alive.peak - 4.0 * n + gradients)
    peak = weights + states + average + gathered + working
    flops = counter.get_total_flops() + traced.attention + (once if recompute else 0)
    return Estimate(n, still + apart, weights, gradients, states, average, float(forward), gathered, peak, flops)


def table(e, *, world, parallel, samples, updates, micro, gpu, mfu):
    """Lines for people. samples: of one update in all; updates: of the run; micro: micro-batches of an update."""
    peak_flops, room = GPUS[gpu]
    seconds = e.flops * micro / (peak_flops * mfu)
    days = updates * seconds / 86400
    fits = "fits" if e.peak * 1.1 < room * 1e9 else "does not fit"
    gb = lambda v: f"{v / 1e9:10.3f} GB"  # noqa: E731
    lines = [
        f"parameters: {e.trained / 1e6:.2f} M trained" + (f", {e.frozen / 1e6:.2f} M frozen" if e.frozen else ""),
        f"memory of one of {world} processes ({parallel}):",
        f"  weights     {gb(e.weights)}",
        f"  gradients   {gb(e.gradients)}",
        f"  optimizer   {gb(e.optimizer)}",
        f"  average     {gb(e.average)}",
        f"  activations {gb(e.activations)}",
    ]
    lines += [f"  gathered    {gb(e.gathered)}"] if e.gathered else []
    lines += [
        f"  peak        {gb(e.peak)}   {fits} in a {gpu}'s {room} GB with a tenth to spare",
        f"compute: {e.flops * micro * world / 1e12:.4g} TFLOP an update of {samples} samples",
        f"time: {seconds:.4g} s an update, {days:.3g} days for {updates} updates on {world} x {gpu} at {mfu:.0%} of its peak",
    ]
    return lines
