"""Where a sampler stops on its way, and what it asks there: timesteps and noise levels, x0 of a prediction.

Shared by samplers.py and solvers.py. Symbols as there: ᾱ = alphas_cumprod, a = √ᾱ, s = √(1-ᾱ), σ = s/a, λ = ln(a/s).

Explained in the book (docs/book): chapters 3 and 11.
"""

import itertools
import math
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported where they are first used
import torch

from nanodiff.config import UserError
from nanodiff.diffusion.schedule import leading, split
from nanodiff.diffusion.schedule_config import GRID

# classes whose timesteps of Karras's σ lie between the training's
UNROUNDED = ("EulerDiscreteScheduler", "HeunDiscreteScheduler", "LMSDiscreteScheduler", "DPMSolverSDEScheduler")


class Step(NamedTuple):
    x: torch.Tensor  # the sample after this step, in the sampler's own scale
    x0: torch.Tensor  # the network's estimate of the clean sample
    t: float  # the timestep at which the network was asked


def clip(x0, cfg):
    """Static or dynamic thresholding of x0 as the config says (Saharia et al. 2022, arXiv 2205.11487 §2.3)."""
    if cfg.get("thresholding"):
        bound = x0.float().abs().flatten(1).quantile(cfg["dynamic_thresholding_ratio"], dim=1)
        bound = bound.clamp(1, cfg["sample_max_value"]).view(-1, *[1] * (x0.dim() - 1)).to(x0.dtype)
        return torch.minimum(torch.maximum(x0, -bound), bound) / bound
    return x0.clamp(-cfg["clip_sample_range"], cfg["clip_sample_range"]) if cfg.get("clip_sample") else x0


def predict(schedule, out, x, abar):
    """(x0, ε) of a prediction at x = √ᾱ·x0 + √(1-ᾱ)·ε, x0 clipped as the config says."""
    x0, eps = split(schedule.prediction, out, x, abar**0.5, (1 - abar) ** 0.5)
    return clip(x0, schedule.cfg), eps


def sigma_to_t(sigma, log_sigmas):
    """The (fractional) timestep whose σ this is, by linear interpolation in ln σ: networks are asked by timestep, σ-space grids lie between."""
    return np.interp(np.log(np.maximum(sigma, 1e-10)), log_sigmas, np.arange(len(log_sigmas)))


def sigma_grid(schedule, n):
    """(timesteps [n], σ [n+1]) of the σ-space samplers, as Python floats, noisy first.

    σ_i is the training's σ at the config's timesteps; log_linear, exponential: even in ln σ, each step takes away the same share of the noise.

    Other grids between the same ends: respaced(); a grid of TABLES: its own ends.
    """
    cfg, every = schedule.cfg, schedule.all_sigmas()
    multistep = "solver_order" in cfg
    t = _multistep_times(schedule, n) if multistep else schedule.spaced(n, np.float32)
    sigmas = np.interp(t, np.arange(len(every)), every)
    if cfg.get("interpolation_type") == "log_linear":
        sigmas = np.exp(np.linspace(np.log(every[-1]), np.log(every[0]), n + 1, dtype=np.float32))
    span = (every[-1], every[0]) if multistep else (sigmas[0], sigmas[-1])
    # whatever class the file is of, as in diffusers
    stated = cfg if schedule.kind == "LMSDiscreteScheduler" else schedule.raw
    top = stated.get("sigma_max") or float(span[0])
    low = stated.get("sigma_min") or float(span[1])
    other = respaced(cfg, top, low, n)
    if table := schedule.raw.get(GRID):
        other = TABLES[table](schedule, n)
    if converted := other is not None:
        sigmas = other
        t = sigma_to_t(sigmas, np.log(every))
        cosine = schedule.kind.startswith("DPMSolver") and cfg["beta_schedule"] == "squaredcos_cap_v2"
        rounds = (
            (cfg.get("use_karras_sigmas") or cfg.get("use_lu_lambdas"))
            and not cosine
            and schedule.kind not in UNROUNDED
        )
        t = t.round() if rounds or table else t.astype(np.int64) if multistep else t
    ends = schedule.kind == "DEISMultistepScheduler" or cfg.get("final_sigmas_type") == "sigma_min"
    last = (sigmas[-1] if converted and schedule.kind == "UniPCMultistepScheduler" else every[0]) if ends else 0.0
    return t.astype(np.float32).tolist(), np.append(sigmas, last).astype(np.float32).tolist()


def respaced(cfg, top, low, n):
    """σ [n] from `top` down to `low` in the spacing that a config asks for; None where it asks for none.

    Karras: σ_i = (σ_max^⅐ + i/(n-1) (σ_min^⅐ - σ_max^⅐))^7 (Karras et al. 2022, arXiv 2206.00364 eq. 5). Exponential, and Lu's even λ
    (Lu et al. 2022, arXiv 2206.00927): even in ln σ. Beta: σ_min + (σ_max - σ_min) q_i with the quantiles of B(0.6, 0.6), which lie close
    together at both ends (Lee et al. 2024, arXiv 2407.12173).
    """
    share = np.linspace(0, 1, n)
    if cfg.get("use_karras_sigmas"):
        return (top ** (1 / 7) + share * (low ** (1 / 7) - top ** (1 / 7))) ** 7
    if cfg.get("use_exponential_sigmas") or cfg.get("use_lu_lambdas"):
        return np.exp(np.linspace(math.log(top), math.log(low), n))
    if cfg.get("use_beta_sigmas"):
        return low + (top - low) * scipy.special.betaincinv(0.6, 0.6, 1 - share)
    return None


# σ of eleven levels for ten steps and the end, optimised for each model (Sabour et al. 2024, arXiv 2404.14507, "Align Your Steps";
# https://research.nvidia.com/labs/toronto-ai/AlignYourSteps/howto.html)
ALIGNED = {
    "ays": (14.6146412293, 6.4745760956, 3.8636745985, 2.6946151520, 1.8841921177, 1.3943805092, 0.9642583904, 0.6523686016,
            0.3977456272, 0.1515232662, 0.0291671582),
    "ays_xl": (14.6146412293, 6.3184485287, 3.7681790315, 2.1811480769, 1.3405244945, 0.8620721141, 0.5550693289, 0.3798540708,
               0.2332364134, 0.1114188177, 0.0291671582),
}  # fmt: skip


def aligned(name):
    """f(schedule, n) -> the σ of ALIGNED for n steps: between the published levels even in ln σ, as the authors interpolate."""

    def grid(schedule, n):
        levels = np.log(ALIGNED[name])
        return np.exp(np.interp(np.linspace(0, 1, n + 1), np.linspace(0, 1, len(levels)), levels))[:-1]

    return grid


def sgm_uniform(schedule, n):
    """σ at n of n + 1 even times, the clean end left out: Stability's generative-models, as the web UI and ComfyUI name it."""
    every = schedule.all_sigmas()
    return np.interp(np.linspace(schedule.T - 1, 0, n + 1)[:-1], np.arange(len(every)), every)


def simple(schedule, n):
    """σ at every T/n-th time from the noisy end on, rounded down: ComfyUI's "simple"."""
    return schedule.all_sigmas()[[schedule.T - 1 - i * schedule.T // n for i in range(n)]]


def normal(schedule, n):
    """σ at n even times from the noisiest to the cleanest: k-diffusion's get_sigmas(), which the web UI calls "Uniform" and ComfyUI "normal". Between
    two times even in ln σ."""
    every = np.log(schedule.all_sigmas())
    return np.exp(np.interp(np.linspace(schedule.T - 1, 0, n), np.arange(len(every)), every))


def beta_times(schedule, n):
    """σ at the times that are quantiles of B(0.6, 0.6), whole and noisy first, the clean end left out: ComfyUI's "beta" (Lee et al. 2024, arXiv 2407.12173)."""
    share = scipy.special.betaincinv(0.6, 0.6, 1 - np.linspace(0, 1, n, endpoint=False))
    times = np.rint(share * (schedule.T - 1)).astype(np.int64)
    if len(set(times)) < n:
        raise UserError(f"`sigmas` beta_times has no {n} different times of {schedule.T}; use fewer steps")
    return schedule.all_sigmas()[times]


TABLES = {
    "normal": normal,
    "beta_times": beta_times,
    "ays": aligned("ays"),
    "ays_xl": aligned("ays_xl"),
    "sgm_uniform": sgm_uniform,
    "simple": simple,
}
# by the name on the command line: fields of scheduler_config.json
SIGMAS = {
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "beta": {"use_beta_sigmas": True},
    "lu": {"use_lu_lambdas": True},
    "sgm_uniform": {GRID: "sgm_uniform"},
    "simple": {GRID: "simple"},
    "normal": {GRID: "normal"},
    "beta_times": {GRID: "beta_times"},
    "ays": {GRID: "ays"},
}


def _multistep_times(schedule, n):
    """Multistep samplers count their steps differently: n intervals, the clean end left out."""
    T, spacing = schedule.T, schedule.cfg.get("timestep_spacing", "linspace")
    if n >= T and spacing != "trailing":
        raise UserError(
            f"a multistep sampler has no {n} distinct steps on {T} timesteps with {spacing} spacing; use fewer than {T}"
        )
    if spacing == "linspace":
        return np.linspace(0, T - 1, n + 1).round()[::-1][:-1].astype(np.int64)
    if spacing == "leading":
        return leading((np.arange(n + 1) * (T // (n + 1)))[::-1][:-1], schedule.cfg["steps_offset"], T)
    return schedule.spaced(n)


def spaced_times(schedule, n, mu=None):
    """n of the training's timesteps, by the config's spacing."""
    return schedule.spaced(n).tolist()


def pndm_times(schedule, n, mu=None):
    """The same, the second one twice where PNDM begins without Runge-Kutta steps; with them, four for each of the first three."""
    t = schedule.spaced(n).tolist()
    if schedule.cfg["skip_prk_steps"]:
        return t[:2] + t[1:] if n > 1 else t
    begun = [[u, v + (u - v) // 2, v + (u - v) // 2, v] for u, v in itertools.pairwise(t[:4])]
    return [*itertools.chain.from_iterable(begun), *t[3:]]


def sigma_times(schedule, n, mu=None):
    return sigma_grid(schedule, n)[0]


def flow_times(schedule, n, mu=None):
    return [sigma * schedule.T for sigma in flow_sigmas(schedule, n, mu)[:-1]]


def flow_sigmas(schedule, n, mu=None, grid=None):
    """σ [n+1] of flow matching from 1 to 0, shifted towards noise for large pictures (Esser et al. 2024 eq. 23).

    The shift is applied to the grid's lower end first and then to the whole grid, as the reference does: with shift 3
    and 4 steps the last σ before 0 is 0.0089. That last step does next to nothing, and ComfyUI's grids leave it out: sgm_uniform takes the first
    n of n + 1 even levels, simple every T/n-th of the training's. Nothing stretches these to `shift_terminal`.
    """
    cfg, shift = schedule.cfg, schedule.cfg["shift"]

    def shifted(s):
        if not cfg["use_dynamic_shifting"]:
            return shift * s / (1 + (shift - 1) * s)
        power = math.exp(mu) if cfg["time_shift_type"] == "exponential" else mu
        return power / (power + (1 / s - 1))

    if cfg["use_dynamic_shifting"] and mu is None:
        raise UserError("this scheduler shifts by picture size (use_dynamic_shifting): mu is needed")
    low = 1 / schedule.T if cfg["use_dynamic_shifting"] else shifted(1 / schedule.T)
    table = schedule.raw.get(GRID)
    if table == "sgm_uniform":
        even = np.linspace(1.0, low, n + 1)[:-1]
    elif table == "simple":
        even = np.array([(schedule.T - i * schedule.T // n) / schedule.T for i in range(n)])
    else:
        even = np.linspace(1.0, low, n)
    sigmas = shifted(even if grid is None else np.array(grid))
    if cfg["shift_terminal"] and not table:
        if sigmas[-1] >= 1:
            raise UserError(
                f"`steps` {n}: this scheduler stretches its last level to {cfg['shift_terminal']:g} (shift_terminal), and the only one is all noise; take 2 or more"
            )
        sigmas = 1 - (1 - sigmas) * (1 - cfg["shift_terminal"]) / (1 - sigmas[-1])
    top, low = float(sigmas[0]), float(sigmas[-1])
    other = respaced(cfg, top, low, n)
    return np.append(sigmas if other is None else other, 0.0).astype(np.float32).tolist()


def flow_mu(schedule, patches):
    """The shift by picture size of use_dynamic_shifting: linear in the number of patches of the picture.

    A large picture has more pixels that say the same, so more noise is needed to hide it (Esser et al. 2024 §5.3.2).
    """
    cfg = schedule.cfg
    if cfg["max_image_seq_len"] == cfg["base_image_seq_len"]:
        raise UserError(
            f"base_image_seq_len and max_image_seq_len are both {cfg['base_image_seq_len']}: no line goes through them"
        )
    slope = (cfg["max_shift"] - cfg["base_shift"]) / (cfg["max_image_seq_len"] - cfg["base_image_seq_len"])
    return cfg["base_shift"] + slope * (patches - cfg["base_image_seq_len"])


def ask(model, X, schedule, t, sigma):
    """x0 from the network at X = x0 + σ ε."""
    abar = 1 / (sigma**2 + 1)
    x = X * abar**0.5
    return clip(split(schedule.prediction, model(x, t), x, abar**0.5, (1 - abar) ** 0.5)[0], schedule.cfg)


def lcm_times(schedule, n, mu=None):
    """n of the timesteps that a latent consistency model was distilled on, noisy first: it has only learned to jump from these."""
    known = schedule.cfg["original_inference_steps"]
    if n > known:
        raise UserError(f"the model was distilled on {known} timesteps and cannot take {n} steps")
    grid = (np.arange(1, known + 1) * (schedule.T // known) - 1)[::-1]
    return grid[np.floor(np.linspace(0, known, n, endpoint=False)).astype(np.int64)].tolist()
