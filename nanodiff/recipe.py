"""What a run does to its optimizer and when it ends: learning rate, averaged weights, stopping.

Everything here is plain state that fits into JSON (or a dict of tensors), so that a resumed run goes on exactly.
"""

import contextlib
import math
import statistics

import torch

from nanodiff import dist

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_warm_restarts",
                 "polynomial", "plateau", "none")  # fmt: skip


def learning_rate(step, peak, total, warmup, kind, low=0.0, cycles=1, power=1.0, first=0):
    """lr of update number `step` (0-based), between `peak` and `low`.

    Linear warm-up over `warmup` updates (below 1: a share of the run), then by kind: constant; linear; cosine
    (Loshchilov & Hutter 2017, arXiv 1608.03983 eq. 5); cosine_with_restarts: `cycles` equal cosines; cosine_warm_restarts:
    cosines of `first`, 2·first, 4·first … updates (T_mult 2); polynomial: (1 - progress)^power. plateau and none are
    constant here (Plateau lowers the peak).
    """
    warmup = round(warmup * total) if warmup < 1 else int(warmup)
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

    @contextlib.contextmanager
    def applied(self, net):
        """Inside, the net has the averaged weights."""
        for module in net.modules():
            if hasattr(module, "reshard"):
                module.reshard()
        parameters = trainable(net)
        raw = {k: v.detach().clone() for k, v in parameters.items()}
        with torch.no_grad():
            for k, p in parameters.items():
                p.copy_(self.shadow[k])
        try:
            yield net
        finally:
            for module in net.modules():
                if hasattr(module, "reshard"):
                    module.reshard()
            with torch.no_grad():
                for k, p in trainable(net).items():
                    p.copy_(raw[k])


def trainable(net):
    """{name: parameter} of those that learn."""
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
