"""More samplers of other programs' menus: linear multistep methods, second-order steps, a predictor with its corrector.

The same kind of generators as samplers.py's, where they have their names. In σ-space, with X = x/a = x0 + σ ε, the path is
dX/dσ = ε, and the methods differ in how they fill the gap between two σ: by what they saw before (lms, deis, unipc), or by a look
into its middle (kdpm2, dpmpp_2s).

Explained in the book (docs/book): chapter 3.
"""

import functools
import math

import numpy as np

from nanodiff.config import UserError
from nanodiff.diffusion.grids import Step, ask, clip, lcm_times, sigma_grid, sigma_to_t
from nanodiff.diffusion.schedule import split


def _levels(sigmas):
    """[(a, s, λ)] of σ: the signal's and the noise's part of x, and λ = ln(a/s)."""
    return [
        (1 / (s * s + 1) ** 0.5, s / (s * s + 1) ** 0.5, -math.log(s) if s else math.inf) for s in map(float, sigmas)
    ]


def _both(model, x, schedule, t, a, s):
    """(x0, ε) from the network at x = a x0 + s ε; with thresholding ε is what leads from x to the new x0."""
    x0, eps = split(schedule.prediction, model(x, t), x, a, s)
    if schedule.cfg["thresholding"]:
        x0 = clip(x0, schedule.cfg)
        eps = (x - a * x0) / s
    return x0, eps


# -- linear multistep ----------------------------------------------------------------------------------------


@functools.cache
def _gauss():
    """Gauss's points and weights on [-1, 1]: exact for polynomials of degree 23; times eᵘ to 1e-12 over the longest step."""
    return np.polynomial.legendre.leggauss(12)


def adams_weights(known, after, log=False):
    """Weights of the slopes at the σ `known`, newest first, for the way from known[0] to `after`:

    w_j = ∫ Π_{k≠j} (u - u_k) / (u_j - u_k) dσ  with u = σ, or ln σ with `log`: the integral of the polynomial through all slopes, by Gauss's rule.
    """
    first = known[0]
    # u is counted from the newest, in whose neighbourhood the integral lies
    *at, end = [math.log(s / first) if log else s - first for s in map(float, (*known, after))]
    points, weights = _gauss()
    u = end / 2 * (points + 1)  # from 0 to the end
    dsigma = end / 2 * weights * (first * np.exp(u) if log else 1.0)  # σ = σ₀ eᵘ: dσ = σ₀ eᵘ du
    return [
        float(np.sum(dsigma * math.prod((u - other) / (here - other) for k, other in enumerate(at) if k != j)))
        for j, here in enumerate(at)
    ]


def lms(model, x, schedule, n, noise, start=0, order=4):
    """Linear multistep (Katherine Crowson's k-diffusion, sample_lms): X' = X + Σ w_j ε_j, the slope a polynomial in σ through the last four.

    Adams and Bashforth's method on steps of any length. One network call a step.
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    history = []
    for i in range(start, n):
        x0 = ask(model, x, schedule, timesteps[i], sigmas[i])
        history = [(x - x0) / sigmas[i], *history[: order - 1]]
        weights = adams_weights(sigmas[i::-1][: len(history)], sigmas[i + 1])
        x = x + sum(w * slope for w, slope in zip(weights, history, strict=True))
        yield Step(x, x0, timesteps[i])


# by slopes known, newest first: the weights of equal steps, and what they are divided by
ADAMS_BASHFORTH = {1: ((1,), 1), 2: ((3, -1), 2), 3: ((23, -16, 5), 12), 4: ((55, -59, 37, -9), 24)}


def adams_bashforth(slopes):
    """The mean slope of the next step from the last ones, newest first, as if all steps were equally long."""
    weights, divisor = ADAMS_BASHFORTH[len(slopes)]
    weighted = [w * e for w, e in zip(weights, slopes, strict=True)]
    return sum(weighted[1:], weighted[0]) / divisor if divisor > 1 else weighted[0]


def ipndm(model, x, schedule, n, noise, start=0):
    """Improved PNDM (Zhang & Chen 2022, arXiv 2204.13902, "iPNDM"): as lms, with the weights of equal steps and lower orders at the beginning.

    X' = X + (σ' - σ) (55 ε - 59 ε_1 + 37 ε_2 - 9 ε_3)/24. The steps are not equally long, and so lms is of a higher order; with few steps this one
    can look better. One network call a step; the last one (σ' = 0) goes to x0, as the first, by one slope.
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    history = []
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, timesteps[i], sigma)
        history = [(x - x0) / sigma, *history[:3]]
        x = x + (after - sigma) * adams_bashforth(history) if after else x0
        yield Step(x, x0, timesteps[i])


def deis(model, x, schedule, n, noise, start=0):
    """Exponential integrator (Zhang & Chen 2022, arXiv 2204.13902): as lms, the slope a polynomial in ln σ (diffusers' "logrho"), `solver_order` long.

    It ends at the smallest σ of the training, not at 0: ln 0 is no place.
    """
    cfg = schedule.cfg
    timesteps, sigmas = sigma_grid(schedule, n)
    levels, history = _levels(sigmas), []
    for i in range(start, n):
        (a, s, _), (a1, _, _) = levels[i], levels[i + 1]
        x0, eps = _both(model, x, schedule, timesteps[i], a, s)
        history = [eps, *history[: cfg["solver_order"] - 1]]
        order = min(len(history), n - i) if cfg["lower_order_final"] and n < 15 else len(history)
        if sigmas[i + 1] < sigmas[i]:  # karras's last two are one
            weights = adams_weights(sigmas[i::-1][:order], sigmas[i + 1], log=True)
            x = a1 * (x / a + sum(w * e for w, e in zip(weights, history, strict=False)))
        yield Step(x, x0, timesteps[i])


# -- a look into the middle ----------------------------------------------------------------------------------


def _across(model, x, x0, schedule, sigma, middle, after, log_sigmas):
    """X at σ' from X at σ and its x0, by the slope at `middle` between them.

    With r = σ'/σ and xm the estimate there:  X' = r X + (1 - r) (σ/σm) (xm - (1 - σm/σ) x0), which is X + (σ' - σ) εm.
    """
    halfway = x0 + middle / sigma * (x - x0)
    there = ask(model, halfway, schedule, float(sigma_to_t(middle, log_sigmas)), middle)
    r = after / sigma
    return r * x + (1 - r) * sigma / middle * (there - (1 - middle / sigma) * x0)


def midpoint(model, x, schedule, n, noise, start=0):
    """The midpoint method (Karras et al. 2022, arXiv 2206.00364 Alg. 3 with α = ½): an Euler step to the middle, whose slope serves for the whole.

    X' = X + (σ' - σ) ε(σm), σm = (σ + σ')/2. Two network calls a step, one in the last (σ' = 0), whose middle would be below every σ that
    the network knows.
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    log_sigmas = np.log(schedule.all_sigmas())
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, timesteps[i], sigma)
        x = _across(model, x, x0, schedule, sigma, (sigma + after) / 2, after, log_sigmas) if after else x0
        yield Step(x, x0, timesteps[i])


def kdpm2(model, x, schedule, n, noise, start=0):
    """DPM-Solver-2 in σ-space (k-diffusion, sample_dpm_2; Lu et al. 2022, arXiv 2206.00927 Alg. 1): as midpoint, with the middle in ln σ.

    σm = √(σ σ'). Two network calls a step, one in the last (σ' = 0).
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    log_sigmas = np.log(schedule.all_sigmas())
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, timesteps[i], sigma)
        x = _across(model, x, x0, schedule, sigma, (sigma * after) ** 0.5, after, log_sigmas) if after else x0
        yield Step(x, x0, timesteps[i])


def kdpm2_a(model, x, schedule, n, noise, start=0):
    """The same with ancestral noise (k-diffusion, sample_dpm_2_ancestral): down to σ_down = σ'²/σ, then up by fresh noise, as euler_a."""
    timesteps, sigmas = sigma_grid(schedule, n)
    log_sigmas = np.log(schedule.all_sigmas())
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, timesteps[i], sigma)
        if after:
            down = after**2 / sigma
            x = _across(model, x, x0, schedule, sigma, (sigma * down) ** 0.5, down, log_sigmas)
            x = x + (after**2 - down**2) ** 0.5 * noise()
        else:
            x = x0
        yield Step(x, x0, timesteps[i])


def dpmpp_sde(model, x, schedule, n, noise, start=0):
    """DPM-Solver++'s SDE in single steps of second order (k-diffusion, sample_dpmpp_sde): the estimate in the middle serves for the whole step.

    X' = xm + σ_down/σ (X - xm) + σ_up z, σ_down = σ'²/σ, σ_up² = σ'² - σ_down², as euler_a's; xm is asked at σm = √(σ σ'), where the same step of
    length σ → σm leads. Both noises are of one path of Brownian motion over σ, as k-diffusion's and diffusers' are (by torchsde's tree, from
    another seed: the law is the same, the picture is another). Two network calls a step, one in the last (σ' = 0).
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    log_sigmas = np.log(schedule.all_sigmas())
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, timesteps[i], sigma)
        if after:
            middle = (sigma * after) ** 0.5
            first, second = noise(), noise()
            halfway = _ancestral(x, x0, sigma, middle, first)
            x0 = ask(model, halfway, schedule, float(sigma_to_t(middle, log_sigmas)), middle)
            whole = ((sigma - middle) ** 0.5 * first + (middle - after) ** 0.5 * second) / (sigma - after) ** 0.5
            x = _ancestral(x, x0, sigma, after, whole)
        else:
            x = x0
        yield Step(x, x0, timesteps[i])


def _ancestral(x, x0, sigma, after, z):
    """X at σ' by way of σ_down = σ'²/σ, z the noise that leads up again: DDPM's posterior in σ-space."""
    down = after**2 / sigma
    return x0 + down / sigma * (x - x0) + (after**2 - down**2) ** 0.5 * z


def dpmpp_2s_a(model, x, schedule, n, noise, start=0):
    """DPM-Solver++ in single steps of second order with ancestral noise (k-diffusion, sample_dpmpp_2s_ancestral): down to σ_down = σ'²/σ by an
    estimate xm in the middle, up by fresh noise.

    xm is asked in the middle of ln σ, √(σ σ_down) = σ', where the first estimate leads:  X' = xm + σ_down/σ (X - xm) + σ_up z. Two network calls
    a step, one in the last (σ' = 0).
    """
    timesteps, sigmas = sigma_grid(schedule, n)
    log_sigmas = np.log(schedule.all_sigmas())
    for i in range(start, n):
        sigma, after = sigmas[i], sigmas[i + 1]
        x0 = ask(model, x, schedule, timesteps[i], sigma)
        if after:
            halfway = x0 + after / sigma * (x - x0)
            x0 = ask(model, halfway, schedule, float(sigma_to_t(after, log_sigmas)), after)
            x = _ancestral(x, x0, sigma, after, noise())
        else:
            x = x0
        yield Step(x, x0, timesteps[i])


def dpmpp_2s(model, x, schedule, n, noise, start=0):
    """DPM-Solver++, single steps of second order (Lu et al. 2022, arXiv 2211.01095 Alg. 1): every second step goes again from where the one
    before began, with what that one found on its way.

    From λ over λm to λ', h = λ' - λ, m and mm the estimates of x0:  x' = (s'/s) x - a' (e^-h - 1) (m + (mm - m) h / (2 (λm - λ))).
    n network calls. The last step is a single one (with an even n the last two) if the end is at σ = 0, `lower_order_final` says so, or n is odd.
    """
    cfg = schedule.cfg
    if cfg["solver_order"] == 3 or cfg["solver_type"] != "midpoint" or cfg["algorithm_type"] != "dpmsolver++":
        raise UserError(
            "`scheduler` dpmpp_2s: is of second order, by the midpoint, of x0 (solver_order 2, midpoint, dpmsolver++)"
        )
    timesteps, sigmas = sigma_grid(schedule, n)
    levels, before = _levels(sigmas), None  # where the pair began: (x, its level, its x0)
    apart = cfg["lower_order_final"] or sigmas[-1] == 0 or n % 2  # the last step by itself
    alone = n - 2 + n % 2 if apart else n
    for i in range(start, n):
        a, s, lam = levels[i]
        x0, _ = _both(model, x, schedule, timesteps[i], a, s)
        second = cfg["solver_order"] == 2 and i % 2 == 1 and i < alone and before is not None
        begun, (_, s0, lam0), m = before if second else (x, levels[i], x0)
        a1, s1, lam1 = levels[i + 1]
        h = lam1 - lam0
        slope = (x0 - m) * h / (2 * (lam - lam0)) if second else 0.0
        before = (x, levels[i], x0)
        x = s1 / s0 * begun - a1 * math.expm1(-h) * (m + slope)
        yield Step(x, x0, timesteps[i])


# -- predictor and corrector ---------------------------------------------------------------------------------


def _united(cfg, x, m, here, there, known, new=None):
    """UniPC's step (Zhao et al. 2023, arXiv 2302.04867) from `here` to `there`, both (a, s, λ), x and m at `here`.

    known: [(λ_k, m_k)] before; new: m at `there` itself, for the corrector. With h = λ' - λ, r_k = (λ_k - λ)/h and D_k = m_k - m:
    x' = (s'/s) x - a' (e^-h - 1) m - a' B Σ ρ_k D_k / r_k, where Σ_k ρ_k r_k^{i-1} = b_i makes it exact for polynomials.
    """
    (a, s, lam), (a1, s1, lam1) = here, there
    h, data = lam1 - lam, cfg["predict_x0"]
    if not h:  # karras's end at σ_min comes twice
        return x
    k = -h if data else h
    grow = math.expm1(k)
    own, other = (s1 / s, a1) if data else (a1 / a, s1)
    out = own * x - other * grow * m
    points = [*known, *([] if new is None else [(lam1, new)])]
    if not points:
        return out
    order, scale = len(points) + (new is None), k if cfg["solver_type"] == "bh1" else grow
    b, phi, factorial = [], grow / k - 1, 1
    for i in range(1, order + 1):
        b.append(phi * factorial / scale)
        factorial *= i + 1
        phi = phi / k - 1 / factorial
    r = [(at - lam) / h for at, _ in points]
    if order == (2 if new is None else 1):
        rho = [0.5]  # as the paper's code has it, for any B
    else:
        rho = np.linalg.solve(np.vander(r, increasing=True).T, b[: len(r)])
    for w, r_k, (_, m_k) in zip(rho, r, points, strict=True):
        out = out - other * scale * float(w) / r_k * (m_k - m)
    return out


def unipc(model, x, schedule, n, noise, start=0):
    """A predictor and a corrector that ask the network once a step (Zhao et al. 2023, arXiv 2302.04867 Alg. 1-2), of order `solver_order`.

    What the network says at the predicted point is used twice: to correct that point, without asking again there, and to predict the next.
    """
    cfg = schedule.cfg
    if not cfg["predict_x0"] and cfg["final_sigmas_type"] == "zero":
        raise UserError("`scheduler` unipc: predicting ε it cannot end at sigma 0; set final_sigmas_type to sigma_min")
    timesteps, sigmas = sigma_grid(schedule, n)
    levels, history, before = _levels(sigmas), [], None
    for i in range(start, n):
        if cfg["predict_x0"]:
            m = x0 = _both(model, x, schedule, timesteps[i], *levels[i][:2])[0]
        else:  # ε as the network says it, as in diffusers: thresholding is of x0 alone
            x0, m = split(schedule.prediction, model(x, timesteps[i]), x, *levels[i][:2])
        if before is not None and i - 1 not in cfg["disable_corrector"]:
            began, order = before
            x = _united(cfg, began, history[0][1], levels[i - 1], levels[i], history[1:order], new=m)
        history = [(levels[i][2], m), *history[: cfg["solver_order"] - 1]]
        # the last step is of the first order in any case where it ends at λ = ∞
        final = cfg["lower_order_final"] or (i == n - 1 and not sigmas[-1])
        order = min(len(history), n - i if final else len(history))
        before = (x, order)
        x = _united(cfg, x, m, levels[i], levels[i + 1], history[1:order])
        yield Step(x, x0, timesteps[i])


# -- trajectory consistency ----------------------------------------------------------------------------------


def tcd(model, x, schedule, n, noise, start=0, eta=0.0):
    """Trajectory consistency (Zheng et al. 2024, arXiv 2402.19159, strategic stochastic sampling): jump to s = (1-η) t', short of the next time t', noise up to it.

    x_s = √ᾱ_s x0 + √(1-ᾱ_s) ε,   x' = √(ᾱ'/ᾱ_s) x_s + √(1 - ᾱ'/ᾱ_s) z. η = 0 is DDIM (with `set_alpha_to_one` false), η = 1 all but LCM; the paper has 0.3. For
    models and LoRAs distilled by it.
    """
    timesteps = lcm_times(schedule, n)
    for i in range(start, n):
        t, after = timesteps[i], timesteps[i + 1] if i + 1 < n else 0
        abar = schedule.alpha_bar(t)
        x0, eps = split(schedule.prediction, model(x, t), x, abar**0.5, (1 - abar) ** 0.5)
        short = schedule.alpha_bar(math.floor((1 - eta) * after))
        x = short**0.5 * x0 + (1 - short) ** 0.5 * eps
        if eta and i + 1 < n:
            ratio = schedule.alpha_bar(after) / short
            x = ratio**0.5 * x + (1 - ratio) ** 0.5 * noise()
        yield Step(x, x0, t)


# -- DPM-Solver's terms ---------------------------------------------------------------------------------------


def higher_orders(cfg, m, lam, order, e1, a1, s1, data, sde):
    """The D1 (and D2) terms of DPM-Solver(++): lam = [λ', λ, λ_1, λ_2], m = [m, m_1, m_2]."""
    h, r0 = lam[0] - lam[1], (lam[1] - lam[2]) / (lam[0] - lam[1])
    d1 = (m[0] - m[1]) / r0
    if order == 2 and cfg["solver_type"] == "midpoint":
        return 0.5 * e1 * d1
    k = -h * (2 if sde else 1) if data else h  # the exponential integrator's exponent
    scale = -(a1 if data else s1 * (2 if sde else 1))
    phi1 = (math.exp(k) - 1) / k - 1
    if order == 2:
        return scale * phi1 * d1
    r1 = (lam[2] - lam[3]) / h
    d11 = (m[1] - m[2]) / r1
    d2 = (d1 - d11) / (r0 + r1)
    phi2 = (math.exp(k) - 1 - k) / k**2 - 0.5
    return scale * phi1 * (d1 + r0 * d2) + scale * phi2 * d2
