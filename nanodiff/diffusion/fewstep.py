"""Losses by which a student learns from a teacher's denoiser: to need fewer steps, or to be smaller.

f(x, t) is a network's prediction, x̂0(x, t) the clean sample it stands for, x_t = a·x0 + s·ε (schedule.py). A jump from t to u along the
line that the prediction points out is DDIM's, and for a flow Euler's: x_u = a_u·x̂0 + s_u·ε̂ (Song et al. 2021, arXiv 2010.02502 eq. 12).

| method | the student at x_t learns | source |
|---|---|---|
| guidance | the guided prediction, in one pass of the network | Meng et al. 2023, arXiv 2210.03142 eq. 4, at one scale |
| progressive | x0 whose one jump ends where the teacher's two (or more) end | Salimans & Ho 2022, arXiv 2202.00512 Alg. 2 |
| consistency | what it says itself at the point where the teacher's jump ends | Luo et al. 2023, arXiv 2310.04378 Alg. 1 |
| dmd | to draw what the teacher finds as likely as its own critic does | Yin et al. 2024, arXiv 2311.18828 eq. 7; arXiv 2405.14867 |
| output | the teacher's prediction | Kim et al. 2023, arXiv 2305.15798 eq. 2 |
| features | where the teacher's features are strong | Zagoruyko & Komodakis 2017, arXiv 1612.03928 eq. 2 |

An error in x̂0 weighs 1/s² unless said otherwise: of v-prediction this is the plain error of the prediction, of a flow, too; Salimans & Ho's
"SNR+1" (their eq. 10). Everything is computed in fp32, whatever the networks compute in.

Shapes: x, x0, noise and predictions [B, C, h, w]; t, u, i [B]; student, teacher, now and critic are functions (x, t) -> prediction; losses
are scalars.

Explained in the book (docs/book): chapter 13.
"""

import contextlib
import copy
import itertools

import numpy as np
import torch

from nanodiff.config import UserError
from nanodiff.diffusion import samplers

METHODS = ("progressive", "consistency", "dmd", "guidance")
HUBER = 0.00054  # of the pseudo-Huber loss, times √dimensions (Song & Dhariwal 2023, arXiv 2310.14189 §3.3)
NEAR, FAR = 0.02, 0.98  # of the times at which a distribution is matched (Yin et al. 2024 §A)


# ---------------------------------------------------------------------------------------------------------
# Times and jumps


def coefficients(schedule, t, like):
    """(a, s) of timesteps t [B], shaped to multiply `like`. Below 0 is the end of a run: a = 1, s = 0."""
    a, s = schedule.coefficients(t.clamp(min=0), like)
    over = (t < 0).to(like.device).view(-1, *(1,) * (like.dim() - 1))
    return torch.where(over, torch.ones_like(a), a), torch.where(over, torch.zeros_like(s), s)


def grid(schedule, n):
    """[n + 1] times of a run of n steps, noisy first; -1: the end."""
    return torch.tensor([*samplers.times(schedule, n), -1.0])


def split(schedule, prediction, x, t):
    """(x̂0, ε̂) in fp32 of a prediction at x_t."""
    return schedule.to_x0_eps(prediction.float(), x.float(), t)


def jump(schedule, predict, x, t, u):
    """x_u by one step of DDIM (Euler, for a flow) from x_t."""
    x0, eps = split(schedule, predict(x, t), x, t)
    a, s = coefficients(schedule, u, x0)
    return a * x0 + s * eps


def guided(with_text, without, scale):
    """f + (w - 1)(f - f_∅) as a function of (x, t): classifier-free guidance (Ho & Salimans 2022 eq. 6). scale <= 1: f alone."""
    if scale <= 1:
        return with_text

    def predict(x, t):
        nothing = without(x, t)
        return nothing + scale * (with_text(x, t) - nothing)

    return predict


def mean_error(schedule, got, want, t, like):
    """Mean of ‖x̂0 - x0‖² / s² over samples and values."""
    _, s = coefficients(schedule, t, like.float())
    return ((got - want) / s.clamp(min=1e-3)).pow(2).mean()


# ---------------------------------------------------------------------------------------------------------
# To fewer steps


def guidance(student, teacher, schedule, x, t):
    """‖x̂0 of the student - x̂0 of the (guided) teacher‖² / s² at x_t."""
    with torch.no_grad():
        want, _ = split(schedule, teacher(x, t), x, t)
    return mean_error(schedule, split(schedule, student(x, t), x, t)[0], want, t, x)


def progressive(student, teacher, schedule, x0, noise, i, n, substeps=2):
    """One jump of the student, of n, ends where `substeps` of the teacher's end, at x_u: its x̂0 is to be
    (x_u - s_u/s_t · x_t) / (a_u - s_u/s_t · a_t). i: which of the n steps. The teacher passes the times of its own run of n · substeps, which are those that
    it has learned where it was the student of the round before; the schedule's grid must have every substeps-th of them in its run of n."""
    times, finer = (grid(schedule, steps).to(x0.device) for steps in (n, n * substeps))
    t, u = times[i].float(), times[i + 1].float()
    x = schedule.add_noise(x0, noise, t)
    with torch.no_grad():
        end = x.float()
        stops = [t, *(finer[i * substeps + j].float() for j in range(1, substeps)), u]
        for here, there in itertools.pairwise(stops):
            end = jump(schedule, teacher, end, here, there)
        (a, s), (a1, s1) = coefficients(schedule, t, end), coefficients(schedule, u, end)
        want = (end - s1 / s * x) / (a1 - s1 / s * a)  # the x0 for which a1·x0 + s1·(x - a·x0)/s is `end`
    return mean_error(schedule, split(schedule, student(x, t), x, t)[0], want, t, x)


def consistent(schedule, x0, x, t):
    """c_skip·x + c_out·x̂0, which is x itself at the last time (Luo et al. 2023 eq. 9; of a flow x̂0 is it already). The
    coefficients are LCMScheduler's."""
    if schedule.flow:
        return x0
    tau = (schedule.cfg.get("timestep_scaling", 10.0) * t.to(x.device).float()).view(-1, *(1,) * (x.dim() - 1))
    return tau / (tau**2 + 0.25) ** 0.5 * x0 + 0.25 / (tau**2 + 0.25) * x


def consistency_times(schedule, known):
    """(t, u) [known]: the times that a latent consistency model knows, noisy first, and the next one of each; the last is 0."""
    if schedule.flow:
        t = grid(schedule, known)[:-1]
        return t, torch.cat([t[1:], torch.zeros(1, dtype=t.dtype)])
    t = torch.from_numpy((np.arange(1, known + 1) * (schedule.T // known) - 1)[::-1].copy()).float()
    return t, (t - schedule.T // known).clamp(min=0)


def consistency(student, now, teacher, schedule, x0, noise, i, known):
    """f(x_t, t) is to be f(x_u, u), where the teacher's jump from x_t ends at x_u and f = consistent(x̂0): √(‖difference‖² + c²) - c. The target is the student as it
    is now, without a gradient (Song & Dhariwal 2023 §3.2: an average of the past is worse): `now`. i [B]: which of the `known` times."""
    t, u = (times.to(x0.device)[i] for times in consistency_times(schedule, known))
    x = schedule.add_noise(x0, noise, t).float()
    got = consistent(schedule, split(schedule, student(x, t), x, t)[0], x, t)
    with torch.no_grad():
        near = jump(schedule, teacher, x, t, u)
        want = consistent(schedule, split(schedule, now(near, u), near, u)[0], near, u)
    c = HUBER * got[0].numel() ** 0.5
    return ((got - want).flatten(1).pow(2).sum(1) + c**2).sqrt().sub(c).mean() / got[0].numel() ** 0.5


def drawn(student, schedule, noises, n, k, last=None):
    """x̂0 of step k of the student's own run of n steps from pure noise, as the LCM and the stochastic flow sampler run: jump to x̂0,
    noise back. noises: [k + 1] of x's shape. Without gradients but for the last call; last: what is asked there."""
    times = grid(schedule, n).to(noises[0].device)
    x = noises[0].float()
    for j in range(k + 1):
        t = times[j].expand(len(x)).float()
        with torch.set_grad_enabled(j == k and torch.is_grad_enabled()):
            predict = last if last is not None and j == k else student
            x0 = consistent(schedule, split(schedule, predict(x, t), x, t)[0], x, t)
        if j == k:
            return x0
        x = schedule.add_noise(x0, noises[j + 1].float(), times[j + 1].expand(len(x)))


def matched_times(schedule, u):
    """Timesteps [B] between NEAR and FAR of the run, from u in [0, 1]."""
    t = (NEAR + (FAR - NEAR) * u) * schedule.T
    return t if schedule.flow else t.long()


def distribution(x0, teacher, critic, schedule, noise, t):
    """A loss whose gradient to the drawn x0 is (x̂0 of the critic - x̂0 of the teacher) / mean|x0 - x̂0 of the teacher|: how the
    logarithms of both densities differ at x_t (Yin et al. 2024 eq. 7 and 8)."""
    with torch.no_grad():
        x = schedule.add_noise(x0, noise.to(x0), t)
        real, fake = (split(schedule, f(x, t), x, t)[0] for f in (teacher, critic))
        size = (x0 - real).abs().flatten(1).mean(1).clamp(min=1e-6)
        gradient = (fake - real) / size.view(-1, *(1,) * (x0.dim() - 1))
        want = x0 - gradient
    return 0.5 * (x0 - want).pow(2).mean()


def denoising(predict, schedule, x0, noise, t):
    """What the critic learns by: ‖x̂0 - x0‖² / s² for x0 that the student drew."""
    x0 = x0.detach()
    x = schedule.add_noise(x0, noise.to(x0), t)
    return mean_error(schedule, split(schedule, predict(x, t), x, t)[0], x0, t, x)


# ---------------------------------------------------------------------------------------------------------
# To a smaller network


class Features(contextlib.AbstractContextManager):
    """Inside, `seen` has what the last layer of each of a UNet's stages gave last: {name: [B, C, H, W]}."""

    def __init__(self, unet):
        self.seen, self.handles = {}, []
        if not hasattr(unet, "down_blocks"):
            raise UserError("`feature_weight` is for UNets: the stages of another network have no places to compare")
        stages = [(f"down_blocks.{i}", s) for i, s in enumerate(unet.down_blocks)]
        stages += [("mid_block", unet.mid_block)] * (unet.mid_block is not None) + [
            (f"up_blocks.{i}", s) for i, s in enumerate(unet.up_blocks)
        ]
        for name, stage in stages:
            layer = (
                stage.attentions[-1]
                if name != "mid_block" and len(getattr(stage, "attentions", ()))
                else stage.resnets[-1]
            )
            self.handles.append(
                layer.register_forward_hook(lambda m, a, out, name=name: self.seen.__setitem__(name, out))
            )

    def __exit__(self, *error):
        for handle in self.handles:
            handle.remove()


def attention_map(features):
    """[B, C, H, W] -> [B, H·W]: the mean square over channels, of length 1."""
    flat = features.float().pow(2).mean(1).flatten(1)
    return flat / flat.norm(dim=1, keepdim=True).clamp(min=1e-12)


def features(mine, theirs):
    """Mean over stages and samples of ‖difference of the attention maps‖². Whatever the widths; raises UserError when no stage of the same
    name has the same places."""
    common = [n for n in mine if n in theirs and mine[n].shape[2:] == theirs[n].shape[2:]]
    if not common:
        raise UserError("`feature_weight`: no stage of the student has the size of the teacher's")
    errors = [(attention_map(mine[n]) - attention_map(theirs[n].detach())).pow(2).sum(1).mean() for n in common]
    return torch.stack(errors).mean()


def same_schedule(a, b):
    """Does a time mean the same amount of noise in both?"""
    return a.flow == b.flow and (a.flow or torch.equal(a.alphas_cumprod, b.alphas_cumprod))


def same_space(student, teacher):
    """Raise UserError unless two pipelines denoise the same latents by the same schedule, so that one's output is a target for the other."""
    if not same_schedule(student.schedule, teacher.schedule):
        raise UserError(
            "the teacher has another noise schedule than the student, so its output is no target; use `method` data"
        )
    vaes = [sd.vae.state_dict() if sd.vae is not None else {} for sd in (student, teacher)]
    if vaes[0].keys() != vaes[1].keys() or any(v.shape != vaes[1][k].shape or not torch.allclose(v.float(), vaes[1][k].float(), atol=1e-3)
                                               for k, v in vaes[0].items()):  # fmt: skip
        raise UserError("the teacher has another VAE than the student, so they do not share latents; use `method` data")


def frozen(net):
    """A copy that is never trained."""
    return copy.deepcopy(net).requires_grad_(False).eval()
