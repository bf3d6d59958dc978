"""Samplers: from noise to picture, as generators that yield every step.

    for step in ddim(model, x, schedule, n, noise): ...     # step.x, step.x0, step.t

`model(x, t)` is the network's raw prediction at timestep t for the input it was trained on (variance-preserving
scale); `noise()` draws fresh N(0, 1) shaped like x; `start` skips the first steps (image-to-image). History lives in
local variables, so there is no state to reset. Symbols: ᾱ = alphas_cumprod, a = √ᾱ, s = √(1-ᾱ), σ = s/a, λ = ln(a/s).

What replaced what: diffusers has a class of 400-1,300 lines for each of these, with a hidden step index; here the
time grid (schedule.py and `sigma_grid`) and the update are apart, so the update is the paper's formula. Where diffusers
departs from its paper in a way that changes pictures we follow it, because the promise is the same picture; where
it is wrong (the previous timestep of DDIM and PNDM off "leading" spacing) the right formula is the default and
`quirks=True` gives theirs.

Explained in the book (docs/book): chapters 3 and 11.
"""

import itertools
import math
from collections.abc import Callable
from typing import NamedTuple

from nanodiff.config import UserError, nearest, printable, short
from nanodiff.diffusion import solvers
from nanodiff.diffusion.grids import (
    SIGMAS,
    TABLES,
    Step,
    ask,
    clip,
    flow_sigmas,
    flow_times,
    lcm_times,
    pndm_times,
    predict,
    sigma_grid,
    sigma_times,
    spaced_times,
)
from nanodiff.diffusion.schedule import Schedule, split
from nanodiff.diffusion.schedule_config import DEFAULTS, GRID, GRIDS, OWN, SPACES, SPACINGS


def _previous(schedule, timesteps, i, n, quirks=False):
    """The timestep after the i-th: the list's next entry, -1 at the end.

    diffusers takes t - T // n instead, which is the next entry for "leading" spacing only (quirks=True).
    """
    if quirks:
        return timesteps[i] - schedule.T // n
    return timesteps[i + 1] if i + 1 < len(timesteps) else -1


# ---------------------------------------------------------------------------------------------------------
# Variance-preserving samplers


def ddpm(model, x, schedule, n, noise, start=0, timesteps=None):
    """Ancestral sampling (Ho et al. 2020, arXiv 2006.11239 Alg. 2, eq. 6-7), on any sub-sequence of timesteps.

    μ = √ᾱ' β/(1-ᾱ) x0 + √α (1-ᾱ')/(1-ᾱ) x,  α = ᾱ/ᾱ', β = 1-α;   x' = μ + √var · z,
    var = β (1-ᾱ')/(1-ᾱ) ("fixed_small") or β ("fixed_large"). timesteps: a descending list instead of the spacing.
    """
    timesteps = timesteps or schedule.spaced(n).tolist()
    for i in range(start, n):
        t, prev = timesteps[i], _previous(schedule, timesteps, i, n)
        abar, abar_prev = schedule.alpha_bar(t), schedule.alpha_bar(prev)
        x0, _ = predict(schedule, model(x, t), x, abar)
        alpha = abar / abar_prev
        beta = 1 - alpha
        x = (abar_prev**0.5 * beta * x0 + alpha**0.5 * (1 - abar_prev) * x) / (1 - abar)
        if t > 0:
            small = max(beta * (1 - abar_prev) / (1 - abar), 1e-20)
            x = x + (beta if schedule.cfg["variance_type"] == "fixed_large" else small) ** 0.5 * noise()
        yield Step(x, x0, t)


def ddim(model, x, schedule, n, noise, start=0, eta=0.0, clipped_eps=False, quirks=False):
    """Implicit sampling (Song et al. 2021, arXiv 2010.02502 eq. 12, 16): deterministic at η = 0, ancestral at η = 1.

    x' = √ᾱ' x0 + √(1-ᾱ'-τ²) ε + τ z,   τ² = η² (1-ᾱ')/(1-ᾱ) (1-ᾱ/ᾱ').
    clipped_eps: recompute ε from the clipped x0. quirks: see _previous().
    """
    timesteps = schedule.spaced(n).tolist()
    for i in range(start, n):
        t, prev = timesteps[i], _previous(schedule, timesteps, i, n, quirks)
        abar = schedule.alpha_bar(t)
        abar_prev = schedule.alpha_bar(prev) if prev >= 0 else schedule.final_alpha_bar()
        x0, eps = predict(schedule, model(x, t), x, abar)
        if clipped_eps:
            eps = (x - abar**0.5 * x0) / (1 - abar) ** 0.5
        variance = max((1 - abar_prev) / (1 - abar) * (1 - abar / abar_prev), 0.0)
        tau = eta * variance**0.5
        x = abar_prev**0.5 * x0 + max(1 - abar_prev - tau**2, 0.0) ** 0.5 * eps
        if eta > 0:
            x = x + tau * noise()
        yield Step(x, x0, t)


def pndm(model, x, schedule, n, noise, start=0, quirks=False):
    """Pseudo linear multistep (Liu et al. 2022, arXiv 2202.09778 eq. 11-12): DDIM's transfer with an Adams-Bashforth ε.

    ε' = (55 ε0 - 59 ε1 + 37 ε2 - 9 ε3) / 24, warmed up by lower orders; `skip_prk_steps` false: by three Runge-Kutta
    steps. With the skip, the second timestep is visited twice (n + 1 network calls): the first visit is a guess.
    quirks: the timestep after t is t - T // n, as in diffusers, not the list's next entry.
    """
    ratio, history = schedule.T // n, []
    times = pndm_times(schedule, n) if schedule.cfg["skip_prk_steps"] else schedule.spaced(n).tolist()
    check_start(schedule, n, start)
    if not schedule.cfg["skip_prk_steps"]:
        for step, slope in _runge_kutta(model, x, schedule, times[:4], ratio if quirks else None):
            x, history = step.x, [*history, *([] if slope is None else [slope])]
            yield step
        times = times[3:]
    before = None  # (x, t) of the first step, while its second visit is to come
    for i, t in enumerate(times[start:]):
        prev = t - ratio if quirks else next((u for u in times[start + i :] if u < t), -1)
        out = model(x, t)
        if len(history) == 1 and before is not None:  # second visit: redo the first step with the mean slope
            # of the whole list: a run may begin at its second entry
            above = next((u for u in times[start + i :: -1] if u > t), before[1])
            x, t, prev = before[0], t + ratio if quirks else above, t
            out, before = (out + history[-1]) / 2, None
        else:
            history = [*history[-3:], out]
            before = (x, t) if len(history) == 1 else None
            out = solvers.adams_bashforth(history[::-1])
        x, x0 = _transfer(schedule, x, out, t, prev)
        yield Step(x, x0, times[start + i])


def _runge_kutta(model, x, schedule, times, ratio=None):
    """Three steps of the classical fourth-order method from times[i] to times[i + 1], as (Step, slope at the step's beginning or None).

    Slopes at the beginning, twice in the middle and at the end weigh 1/6, 1/3, 1/3, 1/6. ratio: see pndm's quirks."""
    for t, end in itertools.pairwise(times):
        half = (ratio or t - end) // 2
        middle, total, y = end + half, 0.0, x
        for at, to, w in ((t, t - half, 1), (middle, middle, 2), (middle, end, 2), (end, end, 1)):
            out = model(y, at)
            total = total + w / 6 * out
            y, x0 = _transfer(schedule, x, total if at == end else out, t, to)
            yield Step(y, x0, at), out if at == t else None
        x = y


def _transfer(schedule, x, out, t, prev):
    """DDIM's deterministic step from t to prev, in PNDM's algebra (eq. 11), and the x0 it stands for."""
    abar = schedule.alpha_bar(min(t, schedule.T - 1))
    abar_prev = schedule.alpha_bar(prev) if prev >= 0 else schedule.final_alpha_bar()
    x0, eps = split(schedule.prediction, out, x, abar**0.5, (1 - abar) ** 0.5)
    denominator = abar * (1 - abar_prev) ** 0.5 + (abar * (1 - abar) * abar_prev) ** 0.5
    return (abar_prev / abar) ** 0.5 * x - (abar_prev - abar) / denominator * eps, x0


def lcm(model, x, schedule, n, noise, start=0):
    """Latent consistency (Luo et al. 2023, arXiv 2310.04378 Alg. 3): jump to x0, noise back to the next timestep.

    f(x, t) = c_skip x + c_out x0,  c_skip = ¼ / (τ² + ¼),  c_out = τ / √(τ² + ¼),  τ = timestep_scaling · t.
    """
    timesteps = lcm_times(schedule, n)
    for i in range(start, n):
        t = timesteps[i]
        x0, _ = predict(schedule, model(x, t), x, schedule.alpha_bar(t))
        tau = schedule.cfg["timestep_scaling"] * t
        x = tau / (tau**2 + 0.25) ** 0.5 * x0 + 0.25 / (tau**2 + 0.25) * x
        if i + 1 < n:
            abar = schedule.alpha_bar(timesteps[i + 1])
            x = abar**0.5 * x + (1 - abar) ** 0.5 * noise()
        yield Step(x, x0, t)


def dpmpp_2m(model, x, schedule, n, noise, start=0):
    """DPM-Solver and DPM-Solver++, multistep, orders 1-3, ODE and SDE (Lu et al. 2022, arXiv 2211.01095 Alg. 2, App. D).

    With h = λ' - λ and data prediction m:  x' = (s'/s) x - a' (e^-h - 1) (m + ½ D1),  D1 = (m - m_1) h / h_1.
    Noise prediction ("dpmsolver") exchanges a and s and the sign of h. The SDE's third order is k-diffusion's (sample_dpmpp_3m_sde): diffusers has
    the wrong sign before a ½ there, which leaves an error that does not fall with the step.
    """
    cfg = schedule.cfg
    data, sde = cfg["algorithm_type"].endswith("++"), cfg["algorithm_type"].startswith("sde")
    if not data and cfg["final_sigmas_type"] == "zero":
        raise UserError(f"{cfg['algorithm_type']} cannot end at sigma 0; set final_sigmas_type to sigma_min")
    if sde and not data and cfg["solver_order"] == 3:
        raise UserError("the SDE of noise prediction (sde-dpmsolver) has no third order; set solver_order to 2")
    timesteps, sigmas = sigma_grid(schedule, n)
    points = [(1 / (s * s + 1) ** 0.5, s / (s * s + 1) ** 0.5) for s in sigmas]
    lam = [math.log(a) - math.log(s) if s else math.inf for a, s in points]
    history = []
    for i in range(start, n):
        t, (a, s), (a1, s1) = timesteps[i], points[i], points[i + 1]
        x0, eps = split(schedule.prediction, model(x, t), x, a, s)
        if cfg["thresholding"]:
            x0 = clip(x0, cfg)
            eps = (x - a * x0) / s
        history = [x0 if data else eps, *history[:2]]
        order = min(cfg["solver_order"], len(history))
        few = cfg["lower_order_final"] and n < 15
        if i == n - 1 and (cfg["euler_at_final"] or few or cfg["final_sigmas_type"] == "zero"):
            order = 1
        elif i == n - 2 and few:
            order = min(order, 2)
        h = lam[i + 1] - lam[i]
        order = order if h else 1  # karras's end at σ_min comes twice
        z = noise() if sde else None
        # e1: the factor of D0; data prediction runs on e^-h, noise prediction on e^h; an SDE doubles the exponent.
        sign = -1.0 if data else 1.0
        grow = math.exp(sign * h) - 1
        if not sde:
            x = (s1 / s if data else a1 / a) * x
            e1 = -(a1 if data else s1) * grow
        elif data:
            x = s1 / s * math.exp(-h) * x + s1 * (1 - math.exp(-2 * h)) ** 0.5 * z
            e1 = a1 * (1 - math.exp(-2 * h))
        else:
            x = a1 / a * x + s1 * (math.exp(2 * h) - 1) ** 0.5 * z
            e1 = -2 * s1 * grow
        x = x + e1 * history[0]
        if order >= 2:
            x = x + solvers.higher_orders(cfg, history, [lam[i + 1], *lam[i::-1][:3]], order, e1, a1, s1, data, sde)
        yield Step(x, x0, t)


# ---------------------------------------------------------------------------------------------------------
# σ-space samplers: X = x / a = x0 + σ ε; the network sees x = X / √(σ²+1)
#
# Steps are written from x0, not from X: X' = x0 + σ'/σ (X - x0) and X' = X + (σ' - σ) (X - x0)/σ are equal, but the second is the
# difference of two numbers of size σ, and σ is 4096 at zero terminal SNR: in fp32 it keeps three digits less.


def euler(model, x, schedule, n, noise, start=0, s_churn=0.0, s_tmin=0.0, s_tmax=math.inf, s_noise=1.0):
    """Euler's method on dX/dσ = (X - x0) / σ (Karras et al. 2022, arXiv 2206.00364 Alg. 2 without its correction):

    X' = x0 + σ'/σ (X - x0).
    s_churn … s_noise: the stochastic steps of Alg. 2. As in diffusers, the network is asked before the extra noise.
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    for i in range(start, n):
        t, sigma = timesteps[i], sigmas[i]
        gamma = min(s_churn / (len(sigmas) - 1), 2**0.5 - 1) if s_tmin <= sigma <= s_tmax else 0.0
        hat = sigma * (gamma + 1)
        x_in = x / (sigma**2 + 1) ** 0.5
        out = model(x_in, t)
        if gamma > 0:
            x = x + s_noise * (hat**2 - sigma**2) ** 0.5 * noise()
        a = 1 / (hat**2 + 1) ** 0.5
        x0, _ = split(schedule.prediction, out, x * a, a, hat * a)
        x = x0 + sigmas[i + 1] / hat * (x - x0)
        yield Step(x, x0, t)


def euler_a(model, x, schedule, n, noise, start=0):
    """Euler with ancestral noise (k-diffusion sample_euler_ancestral): down to σ_down, then up by fresh noise.

    X' = x0 + σ_down/σ (X - x0) + σ_up z,  σ_up² = σ'² (σ² - σ'²) / σ²,  σ_down² = σ'² - σ_up² = (σ'²/σ)²: DDPM's posterior in σ-space.
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    for i in range(start, n):
        t, sigma, after = timesteps[i], sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, t, sigma)
        up = (after**2 * max(sigma**2 - after**2, 0.0) / sigma**2) ** 0.5
        down = max(after**2 - up**2, 0.0) ** 0.5
        x = x0 + down / sigma * (x - x0) + up * noise()
        yield Step(x, x0, t)


def heun(model, x, schedule, n, noise, start=0):
    """Heun's second-order method (Karras et al. 2022 Alg. 1): an Euler step, then the mean of both slopes.

    With r = σ'/σ and x0' the estimate at the Euler step's end:  X' = x0 + r (X - x0) + ½ (1/r - 1) (x0' - x0).
    Two network calls a step, one in the last (σ' = 0).
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    for i in range(start, n):
        t, sigma, after = timesteps[i], sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, t, sigma)
        x = x0 + after / sigma * (x - x0)
        if after > 0:
            x = x + (sigma / after - 1) / 2 * (ask(model, x, schedule, timesteps[i + 1], after) - x0)
        yield Step(x, x0, t)


def flow_euler(model, x, schedule, n, noise, start=0, mu=None, sigmas=None):
    """Euler's method on the flow's ODE: x' = x + (σ' - σ) v (Esser et al. 2024, arXiv 2403.03206 eq. 1).

    mu: the size-dependent shift of use_dynamic_shifting. sigmas: a descending list (before the shift) instead of the even grid.
    """
    sigmas = flow_sigmas(schedule, n, mu, sigmas)
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        v = model(x, sigma * schedule.T)
        x0 = x - sigma * v
        x = x + (after - sigma) * v
        yield Step(x, x0, sigma * schedule.T)


def flow_lcm(model, x, schedule, n, noise, start=0, mu=None, sigmas=None):
    """Consistency sampling of a flow: x' = (1-σ') x0 + σ' z (Song et al. 2023, arXiv 2303.01469 Alg. 1, at a flow's levels).

    x0 = x - σ v, z is fresh. What `stochastic_sampling` in the file means, and few-step students learn; mu and sigmas as in flow_euler.
    """
    sigmas = flow_sigmas(schedule, n, mu, sigmas)
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        x0 = x - sigma * model(x, sigma * schedule.T)
        x = (1 - after) * x0 + after * noise()
        yield Step(x, x0, sigma * schedule.T)


def flow_heun(model, x, schedule, n, noise, start=0, mu=None, sigmas=None):
    """Heun's second-order method on the flow's ODE (Karras et al. 2022 Alg. 1 with the velocity as slope):

    y = x + (σ' - σ) v(x, σ),   x' = x + (σ' - σ) (v(x, σ) + v(y, σ'))/2.
    A flow's path is nearly straight, so the correction is small; it pays where steps are few. Two network calls a step, one in the last.
    """
    if schedule.cfg["stochastic_sampling"]:
        raise UserError("`scheduler` flow_heun: the model is to be sampled with fresh noise, which flow_lcm does")
    sigmas = flow_sigmas(schedule, n, mu, sigmas)
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        v = model(x, sigma * schedule.T)
        x0, guess = x - sigma * v, x + (after - sigma) * v
        if after > 0:
            v = (v + model(guess, after * schedule.T)) / 2
            guess = x + (after - sigma) * v
        x = guess
        yield Step(x, x0, sigma * schedule.T)


# ---------------------------------------------------------------------------------------------------------
# Names


class Sampler(NamedTuple):
    """A sampler as a row: everything that is to be said of it in one place."""

    run: Callable  # the generator: run(model, x, schedule, n, noise, start, …)
    kind: str  # the scheduler class of the Hub whose fields it reads; schedule.SPACES says in what that counts
    fields: dict = {}  # what it sets of them
    times: Callable = spaced_times  # (schedule, n, mu) -> the timestep of every step that it yields, noisy first
    scaled: bool = True  # x at the variance-preserving scale; False: at σ-space's, x / √ᾱ
    twice: bool = False  # two network calls a step, but one in the last


ODE, SDE, KARRAS = ({"algorithm_type": "dpmsolver++", "solver_order": 2}, {"algorithm_type": "sde-dpmsolver++", "solver_order": 2},
                    {"use_karras_sigmas": True})  # fmt: skip
# k-diffusion's third order: its second step like Heun's, and no lower order before the end
THIRD = {"solver_order": 3, "solver_type": "heun", "lower_order_final": False}
SAMPLERS = {  # by the name on the command line
    "ddpm": Sampler(ddpm, "DDPMScheduler"),
    "ddim": Sampler(ddim, "DDIMScheduler"),
    "pndm": Sampler(pndm, "PNDMScheduler", times=pndm_times),
    "euler": Sampler(euler, "EulerDiscreteScheduler", times=sigma_times, scaled=False),
    "euler_a": Sampler(euler_a, "EulerAncestralDiscreteScheduler", times=sigma_times, scaled=False),
    "dpmpp_2m": Sampler(dpmpp_2m, "DPMSolverMultistepScheduler", ODE, sigma_times),
    "dpmpp_2m_karras": Sampler(dpmpp_2m, "DPMSolverMultistepScheduler", ODE | KARRAS, sigma_times),
    "dpmpp_2m_sde": Sampler(dpmpp_2m, "DPMSolverMultistepScheduler", SDE, sigma_times),
    "dpmpp_2m_sde_karras": Sampler(dpmpp_2m, "DPMSolverMultistepScheduler", SDE | KARRAS, sigma_times),
    "dpmpp_3m_sde": Sampler(dpmpp_2m, "DPMSolverMultistepScheduler", SDE | THIRD, sigma_times),
    "dpmpp_2s": Sampler(
        solvers.dpmpp_2s, "DPMSolverSinglestepScheduler", ODE | {"solver_type": "midpoint"}, sigma_times
    ),
    "unipc": Sampler(solvers.unipc, "UniPCMultistepScheduler", times=sigma_times),
    "deis": Sampler(solvers.deis, "DEISMultistepScheduler", {"algorithm_type": "deis"}, sigma_times),
    "lms": Sampler(solvers.lms, "LMSDiscreteScheduler", times=sigma_times, scaled=False),
    "kdpm2": Sampler(solvers.kdpm2, "KDPM2DiscreteScheduler", times=sigma_times, scaled=False, twice=True),
    "kdpm2_a": Sampler(solvers.kdpm2_a, "KDPM2AncestralDiscreteScheduler", times=sigma_times, scaled=False, twice=True),
    "ipndm": Sampler(solvers.ipndm, "LMSDiscreteScheduler", {OWN: "ipndm"}, sigma_times, scaled=False),
    "dpmpp_sde": Sampler(solvers.dpmpp_sde, "DPMSolverSDEScheduler", times=sigma_times, scaled=False, twice=True),
    "dpmpp_2s_a": Sampler(
        solvers.dpmpp_2s_a,
        "KDPM2AncestralDiscreteScheduler",
        {OWN: "dpmpp_2s_a"},
        sigma_times,
        scaled=False,
        twice=True,
    ),
    "heun": Sampler(heun, "HeunDiscreteScheduler", times=sigma_times, scaled=False, twice=True),
    "midpoint": Sampler(
        solvers.midpoint, "HeunDiscreteScheduler", {OWN: "midpoint"}, sigma_times, scaled=False, twice=True
    ),
    "lcm": Sampler(lcm, "LCMScheduler", times=lcm_times),
    "tcd": Sampler(solvers.tcd, "TCDScheduler", times=lcm_times),
    "flow_euler": Sampler(flow_euler, "FlowMatchEulerDiscreteScheduler", times=flow_times),
    "flow_lcm": Sampler(flow_lcm, "FlowMatchEulerDiscreteScheduler", {"stochastic_sampling": True}, times=flow_times),
    "flow_heun": Sampler(flow_heun, "FlowMatchHeunDiscreteScheduler", times=flow_times, twice=True),
}


def rescheduled(schedule, name, **more):
    """The model's schedule under another sampler (None: its own) and with `more` fields changed: its betas and
    prediction type stay (see Schedule.from_config)."""
    given = schedule.raw
    if any(more.get(k) or (name in SAMPLERS and SAMPLERS[name].fields.get(k)) for k in SPACINGS):
        given = {k: v for k, v in given.items() if k != GRID}  # a grid takes the place of the model's
    if name is None:
        fields = of(schedule).fields if _fits(schedule, of(schedule)) else {}
        return Schedule.from_config(given, schedule.kind, **fields | more)
    check_name(name)
    kind, fields = SAMPLERS[name].kind, SAMPLERS[name].fields
    if schedule.flow != (SPACES[kind] == "flow"):
        raise UserError(f"`scheduler` {name}: this is {_own(schedule.flow)}")
    if schedule.raw.get("rescale_betas_zero_snr") and "rescale_betas_zero_snr" not in DEFAULTS[kind]:
        raise UserError(f"`scheduler` {name}: the model was trained with zero terminal SNR, which {kind} does not know")
    raw = {k: v for k, v in given.items() if k != OWN}
    found = Schedule.from_config(raw, kind, **fields | more)
    # what a sampler sets is its own: the next one has other fields
    found.raw = raw | more | {k: v for k, v in fields.items() if k == OWN}
    return found


def spaced_by(schedule, name, sigmas, large=False):
    """rescheduled() with the grid of σ that `sigmas` names (grids.SIGMAS). large: of SDXL, for which some are others. Raises UserError for a
    sampler that cannot have it."""
    if sigmas not in SIGMAS:
        raise UserError(f"`sigmas` {printable(sigmas)}: is none of {', '.join(SIGMAS)}{nearest(sigmas, SIGMAS)}")
    found = rescheduled(schedule, name)
    (field, value), *_ = SIGMAS[sigmas].items()
    if value not in GRIDS[found.space] if field == GRID else field not in DEFAULTS[found.kind]:
        raise UserError(f"`sigmas` {sigmas}: {name_of(found)} has no such grid")
    if name is not None and any(SAMPLERS[name].fields.get(k) for k in SPACINGS if k != field):
        raise UserError(f"`sigmas` {sigmas}: `scheduler` {name} is that of another grid; name it without")
    value = f"{value}_xl" if large and f"{value}_xl" in TABLES else value
    none = {k: False for k in SPACINGS if k in DEFAULTS[found.kind]} | {GRID: None}  # the model's own makes room
    return rescheduled(schedule, name, **none | {field: value})


def schedule_of(raw, where, name=None):
    """The Schedule of a scheduler_config.json's dict, under the sampler `name` (None: its own). A class or a value that we do not have
    is no hindrance when another sampler is asked for: the betas and the prediction type are the model's, not the class's."""
    check_name(name)
    kind = raw.get("_class_name")
    if name is None or not isinstance(kind, str):
        if (own := raw.get(OWN)) is not None and (not isinstance(own, str) or own not in SAMPLERS):
            raise UserError(f"{where}: {OWN} = {short(own)} is no sampler of ours{nearest(own, SAMPLERS)}")
        return rescheduled(Schedule.from_config(raw, where=where), name)
    other = SAMPLERS[name].kind
    if kind.startswith("FlowMatch") != (SPACES[other] == "flow"):
        raise UserError(
            f"`scheduler` {name}: {where} has {printable(kind)}, which is of another space: {_own(kind.startswith('FlowMatch'))}"
        )
    rest = {k: v for k, v in raw.items() if k not in SAMPLERS[name].fields}  # what the sampler sets is not looked at
    return rescheduled(Schedule.from_config(rest | {"_class_name": other}, where=where), name)


def _own(flow):
    """Words for errors: what kind of model this is."""
    return "a flow-matching model and uses flow-match Euler" if flow else "not a flow-matching model"


def check_name(name):
    """Raise UserError for a name that is no sampler's; None is the model's own."""
    if name is not None and name not in SAMPLERS:
        raise UserError(f"`scheduler` {printable(name)}: is none of {', '.join(SAMPLERS)}{nearest(name, SAMPLERS)}")


def _fits(schedule, row):
    """Does a schedule say what a sampler's row says? Its file's fields count where its class does not know them."""
    said = schedule.raw | schedule.cfg
    return row.kind == schedule.kind and all(said.get(k) == v for k, v in row.fields.items())


def name_of(schedule):
    """The command-line name of a schedule's sampler: of those of its class the last one whose fields are set, or the first one."""
    own = [name for name, row in SAMPLERS.items() if row.kind == schedule.kind]
    return next((name for name in reversed(own) if _fits(schedule, SAMPLERS[name])), own[0])


def of(schedule):
    """The Sampler of a schedule."""
    return SAMPLERS[name_of(schedule)]


def check_steps(schedule, n):
    """Raise UserError when a schedule cannot take n steps."""
    if not 1 <= n <= schedule.T:
        raise UserError(f"`steps` {n}: must be between 1 and the {schedule.T} timesteps the model was trained on")
    if schedule.kind in ("LCMScheduler", "TCDScheduler"):
        lcm_times(schedule, n)


def check_start(schedule, n, start):
    """Raise UserError when a run of n steps cannot begin at step `start`."""
    if schedule.kind == "PNDMScheduler" and not schedule.cfg["skip_prk_steps"] and (n < 4 or start):
        raise UserError("PNDM with Runge-Kutta steps needs at least 4 steps and cannot start in the middle")


def times(schedule, n, mu=None):
    """The timestep of every step that a sampler yields, noisy first."""
    return of(schedule).times(schedule, n, mu)


def calls(schedule, n):
    """Steps that a sampler yields: n, and one more for PNDM, which visits its second timestep twice."""
    return len(times(schedule, n, 1.0))  # their number depends on no mu


def asked(schedule, steps):
    """Network calls in the last `steps` steps of a run."""
    return 2 * steps - 1 if of(schedule).twice else steps


def begin(schedule, n, noise, image=None, start=0, mu=None):
    """The first x of a run: pure noise at the sampler's scale, or `image` noised to the level of step `start`.

    Pure noise is N(0, 1) at the variance-preserving scale; in σ-space N(0, σ_max²), or with leading spacing N(0, σ_max² + 1), the variance of
    data and noise together.
    """
    if schedule.space == "flow":
        if image is None:
            return noise
        sigma = flow_sigmas(schedule, n, mu)[start]
        return (1 - sigma) * image + sigma * noise
    if schedule.space == "sigma":
        _, sigmas = sigma_grid(schedule, n)
        scaled = of(schedule).scaled
        if image is None:
            top = max(sigmas)
            leading = schedule.cfg.get("timestep_spacing") == "leading"
            return noise if scaled else noise * ((top**2 + 1) ** 0.5 if leading else top)
        scale = 1 / (sigmas[start] ** 2 + 1) ** 0.5 if scaled else 1.0
        return (image + sigmas[start] * noise) * scale
    if image is None:
        return noise
    abar = schedule.alpha_bar(times(schedule, n)[start])
    return abar**0.5 * image + (1 - abar) ** 0.5 * noise
