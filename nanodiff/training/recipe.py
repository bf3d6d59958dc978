"""What a run does to its optimizer and when it ends: learning rate, schedule-free AdamW, Muon, averaged weights, stopping.

Everything here is plain state that fits into JSON (or a dict of tensors), so that a resumed run goes on exactly.
"""

import collections
import contextlib
import math
import statistics

import torch

from nanodiff.device import dist, onednn
from nanodiff.training.options import Training


def learning_rate(step, peak, total, warmup, kind, low=0.0, cycles=1, power=1.0, first=0):
    """lr of update number `step` (0-based), between `peak` and `low`.

    Linear warm-up over `warmup` updates (below 1: a share of the run; constant has none, as in diffusers), then by kind: constant,
    constant_with_warmup; linear; cosine
    (Loshchilov & Hutter 2017, arXiv 1608.03983 eq. 5); cosine_with_restarts: `cycles` equal cosines; cosine_warm_restarts:
    cosines of `first`, 2·first, 4·first … updates (T_mult 2); polynomial: (1 - progress)^power. plateau and none are
    constant here (Plateau lowers the peak).
    """
    warmup = 0 if kind == "constant" else round(warmup * total) if warmup < 1 else int(warmup)
    if step < warmup:
        return peak * (step + 1) / warmup
    done = step - warmup
    progress = min(done / max(total - warmup, 1), 1.0)
    factor = 1.0
    if kind == "linear":
        factor = 1 - progress
    elif kind == "cosine":
        factor = 0.5 * (1 + math.cos(math.pi * progress))
    elif kind == "cosine_with_restarts":
        factor = 0.0 if progress >= 1 else 0.5 * (1 + math.cos(math.pi * ((cycles * progress) % 1.0)))
    elif kind == "cosine_warm_restarts":
        length = max(first, 1)
        while done >= length:
            done, length = done - length, 2 * length
        factor = 0.5 * (1 + math.cos(math.pi * done / length))
    elif kind == "polynomial":
        factor = (1 - progress) ** power
    return low + (peak - low) * factor


class EMA:
    """Exponential moving average of the trainable weights, in fp32, with the warm-up
    decay(step) = min(`decay`, 1 - (1 + step / inv_gamma)^-power)  (@crowsonkb's, as diffusers has it)."""

    def __init__(self, net, decay=0.9999, inv_gamma=1.0, power=0.75):
        self.decay, self.inv_gamma, self.power = decay, inv_gamma, power
        self.shadow = {k: v.detach().clone().float() for k, v in trainable(net).items()}

    def at(self, step):
        """The decay of update number `step`."""
        return min(self.decay, 1 - (1 + step / self.inv_gamma) ** -self.power)

    @torch.no_grad()
    def update(self, net, step):
        values = [v.detach().float() for v in trainable(net).values()]
        torch._foreach_lerp_(list(self.shadow.values()), values, 1 - self.at(step))

    def applied(self, net):
        """Inside, the net has the averaged weights."""
        return _instead(net, lambda name, p: self.shadow[name])


class ScheduleFree(torch.optim.Optimizer):
    """Schedule-free AdamW (Defazio et al. 2024, arXiv 2405.15682, Algorithm 1): a constant learning rate after its warm-up, and a mean of
    all weights so far in place of the schedule's end.

    While training a parameter is y = (1 - β1) z + β1 x, where the gradient is taken: z are AdamW's weights without momentum, x their mean,
    weighted by lr². What is wanted in the end is x (applied()). State of a parameter: z, exp_avg_sq, and on the CPU step and weights = Σ lr².
    """

    def __init__(self, params, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0):
        super().__init__(params, {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self):
        """One update by the gradients, which are used up. Parameters without one stay, and their counts with them."""
        for group in self.param_groups:
            alike = collections.defaultdict(list)  # those that have been updated together so far
            for p in group["params"]:
                if p.grad is not None:
                    if not self.state[p]:
                        self.state[p] = {"step": torch.zeros(()), "weights": torch.zeros((), dtype=torch.float64),
                                         "z": p.detach().clone(), "exp_avg_sq": torch.zeros_like(p)}  # fmt: skip
                    alike[self.state[p]["step"].item(), self.state[p]["weights"].item()].append(p)
            for (step, weights), parameters in alike.items():
                self._step(parameters, step + 1, weights + group["lr"] ** 2, **group)

    def _step(self, y, step, weights, lr, betas, eps, weight_decay, **_):
        states = [self.state[p] for p in y]
        for state in states:
            state["step"].fill_(step)
            state["weights"].fill_(weights)
        z, squares, slopes = [s["z"] for s in states], [s["exp_avg_sq"] for s in states], [p.grad for p in y]
        torch._foreach_mul_(squares, betas[1])
        torch._foreach_addcmul_(squares, slopes, slopes, 1 - betas[1])
        roots = torch._foreach_div(squares, 1 - betas[1] ** step)
        torch._foreach_sqrt_(roots)
        torch._foreach_add_(roots, eps)
        torch._foreach_div_(slopes, roots)
        if weight_decay:
            torch._foreach_add_(slopes, y, alpha=weight_decay)
        # with c = lr² / Σ lr² and z' = z - lr·slope, x' = (1 - c) x + c z' makes y' = (1 - c) y + c z - lr (1 - β1 (1 - c)) slope
        c = lr**2 / weights
        torch._foreach_lerp_(y, z, c)
        torch._foreach_add_(y, slopes, alpha=-lr * (1 - betas[0] * (1 - c)))
        torch._foreach_add_(z, slopes, alpha=-lr)

    def applied(self, net):
        """Inside, the net has the mean weights x = y + (z - y) (1 - 1 / β1)."""
        share = 1 - 1 / self.param_groups[0]["betas"][0]
        return _instead(net, lambda name, p: torch.lerp(p, self.state[p]["z"], share) if self.state[p] else p)


class Muon(torch.optim.Optimizer):
    """Muon (Jordan et al. 2024, "Muon: an optimizer for hidden layers in neural networks") for `matrices`, AdamW for all other parameters.

    A matrix goes along the half-orthogonal matrix nearest to its momentum, U Vᵀ of U S Vᵀ: every direction by as much, so that what few
    samples speak of is learned as soon as what all do. Scaled by 0.2 √max(rows, columns) it is as long as AdamW's step (Liu et al. 2025,
    arXiv 2502.16982 eq. 4), and here goes `speed` times as far: its length is no measure of how sure the gradient is, as AdamW's is. State of a
    matrix: momentum_buffer and, on the CPU, step; of another parameter AdamW's.
    """

    def __init__(self, params, matrices, lr, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.0, momentum=0.95, speed=2.0):
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay, "momentum": momentum, "speed": speed})
        self.matrices = dict.fromkeys(matrices)
        rest = [p for p in self.param_groups[0]["params"] if p not in self.matrices]
        self.rest = (
            torch.optim.AdamW(rest, lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, fused=True)
            if rest
            else None
        )
        if rest:
            self.rest.state = self.state  # one place for what a checkpoint holds

    @torch.no_grad()
    def step(self):
        """One update by the gradients. Parameters without one stay."""
        group = self.param_groups[0]
        if self.rest:
            self.rest.param_groups[0]["lr"] = group["lr"]
            self.rest.step()
        alike = collections.defaultdict(list)  # those of one shape are made orthogonal together
        for p in self.matrices:
            if p.grad is not None:
                if not self.state[p]:
                    self.state[p] = {"step": torch.zeros(()), "momentum_buffer": torch.zeros_like(p)}
                self.state[p]["step"] += 1
                alike[p.shape].append(p)
        for shape, parameters in alike.items():
            momenta = [self.state[p]["momentum_buffer"] for p in parameters]
            slopes = [p.grad for p in parameters]
            torch._foreach_lerp_(momenta, slopes, 1 - group["momentum"])
            ahead = torch.stack(torch._foreach_lerp(slopes, momenta, group["momentum"]))  # Nesterov's
            length = group["speed"] * group["lr"] * 0.2 * max(shape) ** 0.5
            torch._foreach_mul_(parameters, 1 - group["speed"] * group["lr"] * group["weight_decay"])
            torch._foreach_add_(parameters, list(orthogonal(ahead).to(parameters[0].dtype)), alpha=-length)


def orthogonal(x, steps=5, dtype=None):
    """About U Vᵀ of each matrix U S Vᵀ of x [N, A, B]: a Newton-Schulz iteration (Jordan et al. 2024) that brings every singular value above
    1.6e-3 of the norm to between 0.68 and 1.21, which is near enough, and so is bf16's rounding.

    dtype: in which it multiplies; default: bf16 where the device does so in hardware (on an AMD in 45 ms what takes 206 in fp32), else fp32."""
    if dtype is None:
        dtype = torch.bfloat16 if x.is_cuda or (x.device.type == "cpu" and onednn.computes_bf16()) else torch.float32
    tall = x.shape[1] > x.shape[2]
    x = (x.mT if tall else x).float()
    x = (x / (x.norm(dim=(1, 2), keepdim=True) + 1e-7)).to(dtype)
    a, b, c = 3.4445, -4.7750, 2.0315  # of a x + b x³ + c x⁵, the steepest at 0 that stays about 1
    for _ in range(steps):
        square = x @ x.mT  # [N, a, a] with a the shorter side
        x = torch.baddbmm(x, torch.baddbmm(square, square, square, beta=b, alpha=c), x, beta=a)
    return x.mT if tall else x


def hidden(net):
    """The weights of the linear layers in a network's repeated blocks: what Muon is for. Its ends (embeddings, the first and last layer) are not."""
    for name, module in net.named_modules():
        inside = any(part.isdigit() for part in name.split(".")) and "embedder" not in name
        if inside and isinstance(module, torch.nn.Linear) and module.weight.requires_grad:
            yield module.weight


@contextlib.contextmanager
def _instead(net, value):
    """Inside, the weights that learn are value(name, parameter)."""
    parameters = trainable(net)
    raw = {k: v.detach().clone() for k, v in parameters.items()}
    with torch.no_grad():
        for k, p in parameters.items():
            p.copy_(value(k, p))
    try:
        yield net
    finally:
        with torch.no_grad():
            for k, p in trainable(net).items():
                p.copy_(raw[k])


def optimizer(cfg: Training, net):
    """What `optimizer` names, for the parameters of `net` that learn."""
    parameters = trainable(net).values()
    given = {
        "lr": cfg.lr,
        "betas": (cfg.adam_beta1, cfg.adam_beta2),
        "eps": cfg.adam_epsilon,
        "weight_decay": cfg.adam_weight_decay,
    }
    if cfg.optimizer == "schedule_free":
        return ScheduleFree(parameters, **given)
    if cfg.optimizer == "muon":
        return Muon(parameters, hidden(net), **given)
    return torch.optim.AdamW(parameters, **given, **({} if cfg.parallel == "fsdp" else {"fused": True}))


def kept(opt, p):
    """What an optimizer keeps of a parameter: (names of tensors of its shape, {name of a number: its type})."""
    if isinstance(opt, ScheduleFree):
        return ("z", "exp_avg_sq"), {"step": torch.float32, "weights": torch.float64}
    if isinstance(opt, Muon) and p in opt.matrices:
        return ("momentum_buffer",), {"step": torch.float32}
    return ("exp_avg", "exp_avg_sq"), {"step": torch.float32}


def trainable(net):
    """{name: parameter} of those that learn; of a sharded net its shards, also after a pass without gradients, which leaves some whole."""
    for module in net.modules():
        if hasattr(module, "reshard"):
            module.reshard()
    return {k: p for k, p in net.named_parameters() if p.requires_grad}


class Plateau:
    """Halves the learning rate when the epoch's loss has not improved for `patience` epochs (PyTorch's rule: better
    means below best · (1 - 1e-4))."""

    def __init__(self, factor=0.5, patience=10):
        self.factor, self.patience = factor, patience
        self.state = {"best": None, "bad": 0, "scale": 1.0}

    def epoch(self, loss):
        s = self.state
        if s["best"] is None or loss < s["best"] * (1 - 1e-4):
            s["best"], s["bad"] = loss, 0
        else:
            s["bad"] += 1
        if s["bad"] > self.patience:
            s["scale"], s["bad"] = s["scale"] * self.factor, 0
            dist.say(f"plateau: no better epoch for {self.patience + 1}; learning rate times {s['scale']:g}")


class Stopper:
    """Ends a run early, and says why.

    patience, delta: stop when the loss of `patience` epochs in a row was not below the best by more than delta (0: never).
    window, threshold: stop when the standard deviation of the last `window` epochs is below the threshold and the last of
    them is within it of their mean, so that nothing moves any more (0: never).
    """

    def __init__(self, patience=0, delta=0.0, window=0, threshold=0.0):
        self.patience, self.delta, self.window, self.threshold = patience, delta, window, threshold
        self.state = {"best": None, "bad": 0, "losses": []}

    def epoch(self, loss):
        """The reason to stop after an epoch of this mean loss, or None."""
        s = self.state
        s["losses"] = [*s["losses"], loss][-max(self.window, 1) :]
        if s["best"] is None or loss < s["best"] - self.delta:
            s["best"], s["bad"] = loss, 0
        else:
            s["bad"] += 1
        if self.patience and s["bad"] >= self.patience:
            return f"early stopping: {s['bad']} epochs without a loss below {s['best']:.6g} - {self.delta:g}"
        if self.window and len(s["losses"]) == self.window:
            spread, mean = statistics.pstdev(s["losses"]), statistics.fmean(s["losses"])
            if spread < self.threshold and abs(loss - mean) < self.threshold:
                return (
                    f"oscillation stop: over {self.window} epochs the loss stays at {mean:.6g} with a standard deviation "
                    f"of {spread:.2g}, below {self.threshold:g}"
                )
        return None
