"""Samplers: equal to every recording; right where the truth is known in closed form; refusals.

On Gaussian data N(μ, v) the exact network is known (util.gaussian_model). Then a deterministic sampler must carry
the noise quantile z to the data quantile μ + √v·z as steps go up, and a stochastic one must give the variance v.
"""

import itertools
import json
import math

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from util import coefficients, double_noise, gaussian_model, golden, max_error, rounding

from nanodiff.config import UserError
from nanodiff.diffusion import grids, samplers, solvers
from nanodiff.diffusion.samplers import SAMPLERS, begin
from nanodiff.diffusion.schedule import Schedule

SD = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
      "steps_offset": 1, "skip_prk_steps": True, "set_alpha_to_one": True}  # fmt: skip
FLOWS = ("flow_euler", "flow_heun", "flow_lcm")
FAMILIES = [
    "ddim",
    "ddpm",
    "pndm",
    "euler",
    "euler_a",
    "dpmpp2m",
    "lcm",
    "flow",
    "heun",
    "unipc",
    "deis",
    "lms",
    "kdpm2",
    "kdpm2_a",
    "dpmpp2s",
    "tcd",
    "spacings",
    "ipndm",
    "dpmpp_sde",
    "dpmpp_2s_a",
    "dpmpp_3m_sde",
]
TWICE = ("heun", "kdpm2", "kdpm2_a", "dpmpp_sde")  # the reference yields after each network call, we after each step


def cases():
    for family in FAMILIES:
        _, facts = golden(f"schedulers.{family}")
        for case in facts["args"]:
            yield pytest.param(family, case, id=f"{family}-{case}")


def fake(x, t):
    return 0.8 * torch.sin(1.1 * x + 0.003 * t) + 0.1 * x


@pytest.mark.parametrize(("family", "case"), list(cases()))
def test_golden(family, case):
    tensors, facts = golden(f"schedulers.{family}")
    args, data = facts["args"][case], {k[len(case) + 1 :]: v for k, v in tensors.items() if k.startswith(case + "/")}
    schedule = Schedule.from_config(args["config"], args["scheduler"])
    options, settings = dict(args["step_kwargs"]), dict(args["set_timesteps"])
    if "use_clipped_model_output" in options:
        options["clipped_eps"] = options.pop("use_clipped_model_output")
    if family in ("ddim", "pndm"):
        options["quirks"] = True  # the recordings have t - T // n as the previous timestep
    n = settings.pop("num_inference_steps", None) or len(settings.get("timesteps") or settings["sigmas"])
    options |= settings  # mu, timesteps or sigmas
    first = data["init_noise"] * args["init_noise_sigma"]
    if not settings:
        assert max_error(begin(schedule, n, data["init_noise"]), first) < 1e-6
    generator = torch.Generator().manual_seed(args["generator_seed"])
    noise = lambda: torch.randn(first.shape, generator=generator)  # noqa: E731
    sampler = samplers.of(schedule).run
    steps = list(sampler(fake, first, schedule, n, noise, **options))
    generator.manual_seed(args["generator_seed"])
    exact = list(sampler(fake, first.double(), schedule, n, noise, **options))
    want = data["prev_sample"]
    if family in TWICE:
        want = torch.cat([want[1:-1:2], want[-1:]])
    largest = first.abs().max()
    for step, truth, prev in zip(steps, exact, want, strict=True):
        assert max_error(step.x, truth.x) < 5e-6, "fp32 is off the same formula in fp64: it cancels"
        # The recording adds what is as large as x, which at zero SNR is 4096, in fp32, and carries on what that loses.
        assert (step.x - prev).abs().max() < 1e-5 * prev.abs().max() + rounding(largest, 2)
        largest = max(largest, prev.abs().max())
    if family not in TWICE:
        assert [s.t for s in steps] == pytest.approx(data["timesteps"].tolist(), abs=1e-4)


# -- closed forms ---------------------------------------------------------------------------------------------

MEAN, VAR = 0.3, 0.25


def make(name, prediction, spacing, **more):
    _, kind, fields, *_ = SAMPLERS[name]
    if name in FLOWS:
        return Schedule.from_config({"_class_name": kind, "shift": 1.0})
    return Schedule.from_config(
        SD | {"prediction_type": prediction, "timestep_spacing": spacing}, kind, **fields | more
    )


def run(schedule, name, n, z, **options):
    """The samples at the end, for initial noise z (float64), brought to the data's scale."""
    model = gaussian_model(schedule, MEAN, VAR)
    x = begin(schedule, n, z)
    for step in SAMPLERS[name][0](model, x, schedule, n, double_noise(z.shape), **options):
        x = step.x
    return x


ODE = [
    "ddim",
    "pndm",
    "euler",
    "dpmpp_2m",
    "dpmpp_2m_karras",
    "heun",
    "midpoint",
    "dpmpp_2s",
    "unipc",
    "deis",
    "lms",
    "ipndm",
    "kdpm2",
]
TOLERANCE = {
    "ddim": 0.05,
    "pndm": 0.03,
    "euler": 0.05,
    "dpmpp_2m": 0.03,
    "dpmpp_2m_karras": 0.05,
    "heun": 0.03,
    "midpoint": 0.03,
    "dpmpp_2s": 0.03,
    "unipc": 0.03,
    "deis": 0.05,
    "lms": 0.03,
    "ipndm": 0.03,
    "kdpm2": 0.03,
}


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", ODE)
def test_ode_samplers_carry_quantiles(name, spacing, prediction):
    """At 100 steps the map z -> x is within a few per cent of the exact transport from the first timestep on."""
    schedule = make(name, prediction, spacing)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    times = list(run_times(schedule, name, 100))
    a, s = coefficients(schedule, times[0])
    spread = (a * a * VAR + s * s) ** 0.5
    # begin() starts at z (or σ z); the exact flow carries quantile (x - aμ)/spread to the data's.
    x = z if SAMPLERS[name].scaled else begin(schedule, 100, z) * a
    want = MEAN + VAR**0.5 * (x - a * MEAN) / spread
    assert (run(schedule, name, 100, z) - want).abs().max() < TOLERANCE[name]


@pytest.mark.parametrize("n", [61, 103, 150, 333, 501, 998])
@pytest.mark.parametrize("spacing", ["trailing", "linspace"])
@pytest.mark.parametrize("name", ODE)
def test_step_counts_that_do_not_divide_the_timesteps(name, spacing, n):
    """The whole way is covered whatever n is: here the reference's t - T // n is off, and np.arange yields n + 1."""
    schedule = make(name, "v_prediction", spacing)
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    a, s = coefficients(schedule, next(run_times(schedule, name, n)))
    x = z if SAMPLERS[name].scaled else begin(schedule, n, z) * a
    want = MEAN + VAR**0.5 * (x - a * MEAN) / (a * a * VAR + s * s) ** 0.5
    assert (run(schedule, name, n, z) - want).abs().max() < 1.7 * TOLERANCE[name] * 100 / min(n, 100)


def run_times(schedule, name, n):
    z = torch.zeros(1, 1, dtype=torch.float64)
    for step in SAMPLERS[name][0](gaussian_model(schedule, MEAN, VAR), z, schedule, n, double_noise(z.shape)):
        yield step.t


# at least, on these grids
ORDER = {
    "ddim": 0.7,
    "euler": 0.6,
    "pndm": 0.7,
    "dpmpp_2m": 0.9,
    "heun": 0.9,
    "midpoint": 0.9,
    "dpmpp_2s": 0.9,
    "unipc": 0.9,
    "deis": 1.5,
    "lms": 2.5,
    "ipndm": 0.9,
    "kdpm2": 1.5,
}


@pytest.mark.parametrize("name", ORDER)
def test_order_of_convergence(name):
    """Halving the step divides the error by about 2^order: first-order Euler and DDIM, higher the others."""
    schedule = make(name, "epsilon", "linspace" if name in ("lms", "kdpm2") else "trailing")
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    fine = run(schedule, name, 999, z)
    errors = [(run(schedule, name, n, z) - fine).abs().max().item() for n in (10, 20, 40)]
    assert errors[0] > errors[1] > errors[2]
    order = math.log2(errors[0] / errors[2]) / 2
    assert order > ORDER[name], order


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize(("name", "options"), [("ddpm", {}), ("euler_a", {}), ("ddim", {"eta": 1.0}), ("kdpm2_a", {}),
                                              ("dpmpp_2m_sde", {}), ("dpmpp_3m_sde", {}), ("dpmpp_sde", {}), ("dpmpp_2s_a", {})])  # fmt: skip
def test_stochastic_samplers_have_the_data_variance(name, options, prediction):
    schedule = make(name, prediction, "trailing")
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = run(schedule, name, 200, z, **options)
    assert x.mean().item() == pytest.approx(MEAN, abs=0.04)
    assert x.var().item() == pytest.approx(VAR, rel=0.08)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in FLOWS])
@pytest.mark.parametrize("n", [1, 2, 3, 4, 7, 30, 333, 501, 999, 1000])
def test_every_step_count_is_finite_or_refused(name, spacing, prediction, n):
    schedule = make(name, prediction, spacing)
    z = torch.randn(3, 1, dtype=torch.float64)
    try:
        samplers.check_steps(schedule, n)
        x = run(schedule, name, n, z)
    except UserError as e:
        assert "step" in str(e)
        return
    assert torch.isfinite(x).all() and x.abs().max() < 50


@pytest.mark.parametrize("n", [3, 6, 30, 70, 333])
@pytest.mark.parametrize("spacing", ["leading", "trailing", "linspace"])
def test_ddim_is_its_closed_form(n, spacing):
    """DDIM is linear on Gaussian data: each step multiplies the deviation by a known factor (eq. 12 by hand)."""
    schedule = make("ddim", "epsilon", spacing)
    times = [int(t) for t in schedule.spaced(n)]
    bars = [schedule.alpha_bar(t) for t in times] + [1.0]
    z = torch.tensor([[0.7]], dtype=torch.float64)
    x = z.clone()
    for bar, after in itertools.pairwise(bars):
        total = bar * VAR + 1 - bar
        x0 = MEAN + bar**0.5 * VAR / total * (x - bar**0.5 * MEAN)
        eps = (1 - bar) ** 0.5 / total * (x - bar**0.5 * MEAN)
        x = after**0.5 * x0 + (1 - after) ** 0.5 * eps
    assert max_error(run(schedule, "ddim", n, z), x) < 1e-9
    if spacing != "leading" and 1000 % n:  # the reference's previous timestep is another one there
        assert max_error(run(schedule, "ddim", n, z, quirks=True), x) > 1e-6


def test_ddim_with_eta_1_is_ddpm():
    ddim, ddpm = make("ddim", "epsilon", "leading"), make("ddpm", "epsilon", "leading")
    z = torch.randn(5, 1, dtype=torch.float64)
    a = [s.x for s in samplers.ddim(gaussian_model(ddim, MEAN, VAR), z, ddim, 20, double_noise(z.shape), eta=1.0)]
    b = [s.x for s in samplers.ddpm(gaussian_model(ddpm, MEAN, VAR), z, ddpm, 20, double_noise(z.shape))]
    for x, y in zip(a[:-1], b[:-1], strict=True):
        assert max_error(x, y) < 1e-9


@pytest.mark.parametrize("name", [n for n in SAMPLERS if n not in (*FLOWS, "pndm")])
def test_prediction_types_give_one_picture(name):
    """Not PNDM: as in the reference, its history mixes raw network outputs, before they are converted."""
    z = torch.randn(4, 1, dtype=torch.float64)
    results = [run(make(name, p, "trailing"), name, 12, z) for p in ("epsilon", "sample", "v_prediction")]
    # karras's timesteps are rounded and midpoint's lie between those of the table, so t and σ disagree a little
    bound = {
        "dpmpp_2m_karras": 1e-3,
        "dpmpp_2m_sde_karras": 1e-3,
        "midpoint": 1e-5,
        "kdpm2": 1e-5,
        "kdpm2_a": 1e-5,
    }.get(name, 1e-6)
    assert max_error(results[0], results[1]) < bound and max_error(results[0], results[2]) < bound


@pytest.mark.parametrize(("name", "n", "bound"), [("flow_euler", 400, 0.02), ("flow_heun", 40, 0.005)])
def test_flows_carry_quantiles(name, n, bound):
    z = torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    assert (run(make(name, None, None), name, n, z) - (MEAN + VAR**0.5 * z)).abs().max() < bound


@pytest.mark.parametrize("case", golden("schedulers.flow_heun")[1]["args"])
def test_flow_heun_golden(case):
    """The reference yields after each network call, we after each step."""
    tensors, facts = golden("schedulers.flow_heun")
    args = facts["args"][case]
    schedule = Schedule.from_config(args["config"], args["class"])
    x, n = tensors[f"{case}/x"], args["steps"]
    asked = []

    def model(x, t):
        asked.append(t)
        return fake(x, t)

    steps = list(samplers.flow_heun(model, x, schedule, n, None))
    assert len(steps) == n and max_error(steps[-1].x, tensors[f"{case}/final"]) < 1e-5
    assert asked == pytest.approx(tensors[f"{case}/timesteps"].tolist(), abs=1e-3)


def test_flow_heun_refuses_fresh_noise():
    config = {"_class_name": "FlowMatchHeunDiscreteScheduler", "stochastic_sampling": True}
    with pytest.raises(UserError, match="flow_lcm"):
        next(samplers.flow_heun(fake, torch.zeros(1, 1), Schedule.from_config(config), 3, None))


@pytest.mark.parametrize("name", SAMPLERS)
def test_times_are_the_steps(name):
    schedule = make(name, "epsilon", "leading")
    z = torch.randn(2, 1, dtype=torch.float64)
    steps = SAMPLERS[name][0](
        gaussian_model(schedule, MEAN, VAR), begin(schedule, 6, z), schedule, 6, double_noise(z.shape)
    )
    assert [s.t for s in steps] == pytest.approx(samplers.times(schedule, 6), abs=1e-3)


@pytest.mark.parametrize("name", ["ddim", "euler", "dpmpp_2m", "euler_a", "heun", "ddpm", "kdpm2", "kdpm2_a"])
def test_starting_in_the_middle_is_the_rest_of_the_whole(name):
    """Image-to-image: from step k on, a sampler without history continues as the whole run would."""
    schedule = make(name, "epsilon", "leading")
    model, z = gaussian_model(schedule, MEAN, VAR), torch.randn(3, 1, dtype=torch.float64)
    x = begin(schedule, 10, z, torch.full_like(z, 0.4), start=6)
    steps = list(SAMPLERS[name][0](model, x, schedule, 10, double_noise(z.shape), start=6))
    assert len(steps) == 4 and torch.isfinite(steps[-1].x).all()
    a, s = coefficients(schedule, steps[0].t)
    vp = x if SAMPLERS[name].scaled else x * a
    assert max_error(vp, a * 0.4 + s * z) < 1e-6


@pytest.mark.parametrize("order", [2, 3])
@pytest.mark.parametrize("sde", [False, True])
def test_higher_orders_near_the_integral(order, sde):
    """The terms of DPM-Solver++ against ∫ e^-(λ'-u) m(u) du, of the SDE ∫ 2 e^-2(λ'-u) m(u) du: exact for a straight m at order 2, an error of
    h³ for a curved one at order 3. The reference's SDE of third order has another sign before its ½: h²."""
    m, k = np.polynomial.Polynomial([0.7, -0.4, 0.9][:order]), 2 if sde else 1

    def error(h):
        lam, after = [0.3, 0.3 - 0.9 * h, 0.3 - 2.1 * h], 0.3 + h
        e1 = 1 - math.exp(-k * h)
        known = [torch.tensor(m(u), dtype=torch.float64) for u in lam]
        cfg = {"solver_order": order, "solver_type": "heun"}
        got = e1 * known[0] + solvers.higher_orders(cfg, known, [after, *lam], order, e1, 1.0, 0.5, True, sde)
        return abs(got.item() - quad(lambda u: k * math.exp(-k * (after - u)) * m(u), lam[0], after)[0])

    if order == 2:
        assert error(0.8) < 1e-12
    else:
        assert math.log2(error(0.02) / error(0.01)) > 2.8


@pytest.mark.parametrize("log", [False, True])
def test_adams_weights_integrate_polynomials(log):
    known, after, m = [3.0, 4.5, 7.0], 1.8, np.polynomial.Polynomial([0.7, -0.4, 0.9])
    u = math.log if log else float
    want = quad(lambda s: m(u(s)), known[0], after)[0]
    weights = solvers.adams_weights(known, after, log)
    assert sum(w * m(u(s)) for w, s in zip(weights, known, strict=True)) == pytest.approx(want, rel=1e-9)
    near = [3.003, 3.006, 3.009, 3.013]  # as with a thousand steps: nothing may cancel
    assert sum(solvers.adams_weights(near, 3.0, log)) == pytest.approx(3.0 - 3.003, rel=1e-12)


def test_tcd_without_noise_is_ddim_on_its_times():
    tcd, ddim = make("tcd", "epsilon", "leading"), make("ddim", "epsilon", "leading")
    z, x = torch.randn(5, 1, dtype=torch.float64), None
    *way, last = samplers.times(tcd, 5)
    x = z
    for t, after in itertools.pairwise([*way, last, 0]):
        bar, bar_after = ddim.alpha_bar(t), ddim.alpha_bar(after)
        x0, eps = samplers.predict(ddim, gaussian_model(ddim, MEAN, VAR)(x, t), x, bar)
        x = bar_after**0.5 * x0 + (1 - bar_after) ** 0.5 * eps
    assert max_error(run(tcd, "tcd", 5, z, eta=0.0), x) < 1e-9


@pytest.mark.parametrize("name", ["lms", "deis", "unipc", "dpmpp_2s", "dpmpp_2m"])
def test_a_history_that_begins_in_the_middle(name):
    """Image-to-image, from 40 % of the way: the exact way from there is a scaling round the mean, and errors fall with the steps."""
    errors = []
    for n in (10, 40):
        schedule, z = make(name, "epsilon", "linspace"), torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
        start = round(0.4 * n) | 1  # odd: in the middle of dpmpp_2s's pair
        x = begin(schedule, n, z, torch.full_like(z, 0.4), start=start)
        *_, last = SAMPLERS[name].run(
            gaussian_model(schedule, MEAN, VAR), x, schedule, n, double_noise(z.shape), start=start
        )
        sigma = samplers.sigma_grid(schedule, n)[1][start]
        X = 0.4 + sigma * z
        want = MEAN + VAR**0.5 * (X - MEAN) / (VAR + sigma**2) ** 0.5
        errors.append((last.x - want).abs().max().item())
    assert errors[1] < min(0.06, 0.7 * errors[0]), errors


@pytest.mark.parametrize("n", [6, 20, 25])
@pytest.mark.parametrize("name", ["dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde", "unipc", "deis", "dpmpp_2s"])
def test_an_end_that_comes_twice(name, n):
    """Karras's last σ is the training's smallest, which final_sigmas_type sigma_min adds once more: a step of no length."""
    more = {} if name in ("deis", "dpmpp_2s") else {"lower_order_final": False}
    schedule = make(name, "epsilon", "linspace", use_karras_sigmas=True, final_sigmas_type="sigma_min", **more)
    x = run(schedule, name, n, torch.randn(3, 1, dtype=torch.float64))
    assert torch.isfinite(x).all() and x.abs().max() < 5


@pytest.mark.parametrize(
    "own",
    [
        {"algorithm_type": "sde-dpmsolver++"},
        {"solver_order": 3},
        {"solver_order": 3, "algorithm_type": "sde-dpmsolver++"},
    ],
    ids=str,
)
def test_a_name_says_the_method_whatever_the_file_says(own):
    raw = SD | own | {"_class_name": "DPMSolverMultistepScheduler"}
    # without a name it is the file's
    assert samplers.schedule_of(raw, "f").cfg | own == samplers.schedule_of(raw, "f").cfg
    again = samplers.rescheduled(samplers.schedule_of(raw, "f"), None)
    assert again.cfg | own == again.cfg
    for name in SAMPLERS:
        if name not in FLOWS:
            assert samplers.name_of(samplers.schedule_of(raw, "f", name)) == name
    for name, order, kind in (
        ("dpmpp_2m", 2, "dpmsolver++"),
        ("dpmpp_2m_sde", 2, "sde-dpmsolver++"),
        ("dpmpp_3m_sde", 3, "sde-dpmsolver++"),
    ):
        cfg = samplers.schedule_of(raw, "f", name).cfg
        assert (cfg["solver_order"], cfg["algorithm_type"]) == (order, kind)


@pytest.mark.parametrize(
    ("kind", "own"),
    [
        ("UniPCMultistepScheduler", {"use_flow_sigmas": True}),
        ("UniPCMultistepScheduler", {"solver_order": 4}),
        ("DPMSolverSinglestepScheduler", {"lambda_min_clipped": -5.1}),
        ("DDPMScheduler", {"variance_type": "learned_range"}),
        ("DEISMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    ],
)
def test_what_a_class_cannot_is_no_hindrance_to_another(kind, own):
    raw = SD | own | {"_class_name": kind}
    with pytest.raises(UserError, match=next(iter(own))):
        samplers.schedule_of(raw, "f")
    assert samplers.schedule_of(raw, "f", "ddim").kind == "DDIMScheduler"


def test_a_corrector_that_is_off_for_some_steps():
    z = torch.linspace(-2, 2, 5, dtype=torch.float64)[:, None]
    whole, some, none = (
        run(make("unipc", "epsilon", "linspace", disable_corrector=off), "unipc", 8, z)
        for off in ([], [0], list(range(8)))
    )
    predictor = run(make("dpmpp_2m", "epsilon", "linspace"), "dpmpp_2m", 8, z)
    assert max_error(whole, some) > 1e-4 and max_error(some, none) > 1e-4
    assert max_error(none, predictor) < 1e-9  # without it bh2 of second order is DPM-Solver++'s


def test_unipc_of_noise_is_not_thresholded():
    z = torch.linspace(-3, 3, 32, dtype=torch.float64)[None]  # one sample: its quantile is of many values
    made = {}
    for x0 in (True, False):
        for cut in (True, False):
            cfg = {"predict_x0": x0, "thresholding": cut, "sample_max_value": 1.0, "final_sigmas_type": "sigma_min"}
            made[x0, cut] = run(make("unipc", "epsilon", "linspace", **cfg), "unipc", 8, z)
    assert made[False, True].equal(made[False, False])  # diffusers' convert_model_output gives ε back as it is
    assert max_error(made[True, True], made[True, False]) > 1e-2


def test_refusals():
    schedule = make("ddim", "epsilon", "leading")
    for n in (0, -1, 1001, 5000):
        with pytest.raises(UserError, match="`steps`"):
            samplers.check_steps(schedule, n)
    with pytest.raises(UserError, match="distilled on 50 timesteps"):
        samplers.check_steps(make("lcm", "epsilon", "leading"), 51)
    with pytest.raises(UserError, match="second order"):
        run(make("dpmpp_2s", "epsilon", None, solver_order=3), "dpmpp_2s", 6, torch.zeros(1, 1))
    with pytest.raises(UserError, match="sigma_min"):
        run(make("unipc", "epsilon", "linspace", predict_x0=False), "unipc", 6, torch.zeros(1, 1))
    with pytest.raises(UserError, match="third order"):
        run(make("dpmpp_2m", "epsilon", "linspace", algorithm_type="sde-dpmsolver", solver_order=3, final_sigmas_type="sigma_min"), "dpmpp_2m",
            6, torch.zeros(1, 1))  # fmt: skip
    with pytest.raises(UserError, match="flow"):
        samplers.rescheduled(make("flow_euler", None, None), "ddim")
    with pytest.raises(UserError, match="euler"):
        samplers.rescheduled(schedule, "eular")
    with pytest.raises(UserError, match="sigma_min"):
        s = make("dpmpp_2m", "epsilon", "linspace", algorithm_type="dpmsolver")
        next(samplers.dpmpp_2m(fake, torch.zeros(1, 1), s, 5, None))
    with pytest.raises(UserError, match="mu"):
        samplers.flow_sigmas(
            Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "use_dynamic_shifting": True}), 4
        )


def test_names_round_trip():
    for name in SAMPLERS:
        own = make("flow_euler" if name in FLOWS else "ddim", "epsilon", "leading")
        assert samplers.name_of(samplers.rescheduled(own, name)) == name


def test_karras_grid():
    schedule = make("dpmpp_2m_karras", "epsilon", "linspace")
    _, sigmas = samplers.sigma_grid(schedule, 7)
    every = schedule.all_sigmas()
    ends = every[-1] ** (1 / 7), every[0] ** (1 / 7)
    want = [(ends[0] + i / 6 * (ends[1] - ends[0])) ** 7 for i in range(7)]
    assert np.allclose(sigmas[:-1], want, rtol=1e-6) and sigmas[-1] == 0


# -- grids of σ ----------------------------------------------------------------------------------------------


def ordinary(kind="EulerDiscreteScheduler", **more):
    return Schedule.from_config(
        {"_class_name": kind, "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear"} | more
    )


@pytest.mark.parametrize("name", grids.SIGMAS)
@pytest.mark.parametrize("sampler", ["euler", "heun", "dpmpp_2m", "unipc", "kdpm2"])
def test_grids_go_down_and_the_exact_network_ends_at_its_data(name, sampler):
    """However a grid is spaced, more steps bring the sample nearer to the closed form; and it goes from noise to 0."""
    if name == "lu" and sampler != "dpmpp_2m":
        with pytest.raises(UserError, match=f"`sigmas` lu: {sampler} has no such grid"):
            samplers.spaced_by(ordinary(), sampler, name)
        return
    schedule = samplers.spaced_by(ordinary(), sampler, name)
    errors = []
    for n in (8, 32):
        times, sigmas = grids.sigma_grid(schedule, n)
        assert len(times) == n and len(sigmas) == n + 1 and sigmas[-1] == 0
        assert all(a > b for a, b in itertools.pairwise(sigmas)) and all(a >= b for a, b in itertools.pairwise(times))
        first = begin(schedule, n, torch.linspace(-2, 2, 9, dtype=torch.float64))
        *_, last = samplers.of(schedule).run(gaussian_model(schedule, MEAN, VAR), first, schedule, n, None)
        scaled = first / (1 if not samplers.of(schedule).scaled else (1 / (sigmas[0] ** 2 + 1)) ** 0.5)
        want = MEAN + (scaled - MEAN) * (VAR / (VAR + sigmas[0] ** 2)) ** 0.5
        errors.append((last.x - want).abs().max().item())
    # beta's levels lie far apart where there is little noise left, and multistep samplers take its times as whole numbers
    assert errors[1] < max((0.95 if name == "beta" else 0.5) * errors[0], 2e-3)


def test_published_levels_are_met():
    """Ten steps of Align Your Steps are the table's; more lie between, even in ln σ."""
    for large, name in ((False, "ays"), (True, "ays_xl")):
        schedule = samplers.spaced_by(ordinary(), None, "ays", large)
        _, ten = grids.sigma_grid(schedule, 10)
        assert ten[:-1] == pytest.approx(grids.ALIGNED[name][:-1], rel=1e-6)
        _, twenty = grids.sigma_grid(schedule, 20)
        assert twenty[:-1:2] == pytest.approx(ten[:-1], rel=1e-6)
        assert twenty[1] == pytest.approx((ten[0] * ten[1]) ** 0.5, rel=1e-6)


@pytest.mark.parametrize("name", [n for n, s in samplers.SAMPLERS.items() if samplers.SPACES[s.kind] != "flow"])
def test_a_saved_schedule_draws_as_it_did(name):
    """Also what only our names say of it: a student that is saved between two rounds of distill.py had lost its grid."""
    for sigmas in (None, *samplers.SIGMAS):
        try:
            schedule = (
                samplers.spaced_by(ordinary(), name, sigmas) if sigmas else samplers.rescheduled(ordinary(), name)
            )
        except UserError:
            continue
        again = Schedule.from_config(json.loads(json.dumps(schedule.to_json())))
        assert samplers.name_of(again) == samplers.name_of(schedule)
        assert samplers.of(again) == samplers.of(schedule) and samplers.times(again, 7) == samplers.times(schedule, 7)


def test_the_simple_grid():
    """ComfyUI's, of a noise schedule: σ at every T/n-th time from the top, asked at just these times."""
    schedule = samplers.spaced_by(ordinary(), "euler", "simple")
    times, sigmas = samplers.sigma_grid(schedule, 6)
    assert times == [999 - 1000 * i // 6 for i in range(6)] and sigmas[-1] == 0
    np.testing.assert_allclose(sigmas[:-1], schedule.all_sigmas()[np.array(times, int)], rtol=1e-6)


def test_a_grid_is_lost_with_another_and_refused_where_it_cannot_be():
    with pytest.raises(UserError, match="is none of karras"):
        samplers.spaced_by(ordinary(), None, "even")
    for name, sigmas in (("ddim", "ays"), ("euler_a", "karras"), ("ddim", "beta")):
        with pytest.raises(UserError, match=f"{name} has no such grid"):
            samplers.spaced_by(ordinary(), name, sigmas)
    with pytest.raises(UserError, match="dpmpp_2m_karras is that of another grid"):
        samplers.spaced_by(ordinary(), "dpmpp_2m_karras", "beta")
    with pytest.raises(UserError, match="only one of use_karras_sigmas and use_beta_sigmas"):
        ordinary(use_karras_sigmas=True, use_beta_sigmas=True)
    flow = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    assert samplers.spaced_by(flow, None, "beta").cfg["use_beta_sigmas"]
    with pytest.raises(UserError, match="has no such grid"):
        samplers.spaced_by(flow, None, "ays")
    for grid in ("ays", "even", ["ays"], 1):
        with pytest.raises(UserError, match=r"_grid = .* is none of sgm_uniform, simple"):
            Schedule.from_config({**flow.raw, "_grid": grid})
    with pytest.raises(UserError, match="only one of _grid and use_karras_sigmas"):
        Schedule.from_config({**flow.raw, "_grid": "simple", "use_karras_sigmas": True})
    for own in ("bogus", ["heun"]):
        with pytest.raises(UserError, match=r"_sampler = .* is no sampler of ours"):
            samplers.schedule_of({**ordinary().raw, "_sampler": own}, "scheduler_config.json")
    kept = samplers.spaced_by(ordinary(), "dpmpp_2m", "sgm_uniform")  # a sampler with a grid in its name has that one
    for name in ("dpmpp_2m_karras", "dpmpp_2m_sde_karras"):
        assert samplers.times(samplers.rescheduled(kept, name), 6) == samplers.times(
            samplers.rescheduled(ordinary(), name), 6
        )
    alone = samplers.rescheduled(samplers.spaced_by(flow, None, "simple"), None, use_karras_sigmas=True)
    assert samplers.flow_sigmas(alone, 4) == samplers.flow_sigmas(samplers.spaced_by(flow, None, "karras"), 4)
    for shift in (
        1.0,
        3.0,
    ):
        # ComfyUI's: even times from 1 down to the training's lowest level, the last left out, then shifted
        other = samplers.spaced_by(Schedule.from_config({**flow.raw, "shift": shift}), None, "sgm_uniform")
        bend = lambda s, shift=shift: shift * s / (1 + (shift - 1) * s)  # noqa: E731
        low = bend(0.001)
        want = [bend(1 - i * (1 - low) / 4) for i in range(4)] + [0]
        np.testing.assert_allclose(samplers.flow_sigmas(other, 4), want, rtol=1e-6)
        assert samplers.flow_sigmas(other, 4)[3] > 0.24 and samplers.flow_sigmas(other, 1) == [1, 0]
        assert samplers.times(other, 4) == [s * 1000 for s in samplers.flow_sigmas(other, 4)[:-1]]
        # every T/n-th of the training's levels from the top, rounded down
        simple = samplers.spaced_by(other, None, "simple")
        np.testing.assert_allclose(
            samplers.flow_sigmas(simple, 7), [bend(1 - (1000 * i // 7) / 1000) for i in range(7)] + [0], rtol=1e-6
        )
        stretched = samplers.spaced_by(Schedule.from_config({**other.raw, "shift_terminal": 0.1}), None, "simple")
        assert samplers.flow_sigmas(stretched, 7) == samplers.flow_sigmas(simple, 7)
        assert samplers.flow_sigmas(Schedule.from_config(other.to_json()), 4) == samplers.flow_sigmas(other, 4)
        assert samplers.spaced_by(other, None, "beta").raw["_grid"] is None, "another grid takes its place"


def test_a_models_own_grid_makes_room():
    own = ordinary(use_karras_sigmas=True)
    assert samplers.spaced_by(own, None, "beta").cfg["use_karras_sigmas"] is False
    aligned = samplers.spaced_by(own, None, "ays")
    assert grids.sigma_grid(aligned, 10)[1][:-1] == pytest.approx(grids.ALIGNED["ays"][:-1], rel=1e-6)
    again = samplers.spaced_by(aligned, None, "karras")
    assert grids.sigma_grid(again, 10) == grids.sigma_grid(own, 10)
    with pytest.raises(UserError, match="_grid = 'even' is none of ays"):
        grids.sigma_grid(ordinary(_grid="even"), 10)


@pytest.mark.parametrize("n", [4, 10, 50])
@pytest.mark.parametrize("skip", [True, False])
def test_pndm_says_all_its_times(n, skip):
    """Also with Runge-Kutta steps, of which each asks four times: a run that is counted by them ends at its end."""
    schedule = ordinary("PNDMScheduler", skip_prk_steps=skip)
    steps = list(samplers.pndm(fake, torch.ones(1, 1), schedule, n, None))
    assert [step.t for step in steps] == samplers.times(schedule, n)


def test_the_ends_of_a_grid_are_the_files_whatever_its_class():
    """diffusers asks the config for them, not the class; its LMS does not ask."""
    raw = {"_class_name": "EulerDiscreteScheduler", "use_karras_sigmas": True, "sigma_min": 0.05, "sigma_max": 10.0}
    for kind in (
        "EulerDiscreteScheduler",
        "DPMSolverMultistepScheduler",
        "HeunDiscreteScheduler",
        "KDPM2DiscreteScheduler",
    ):
        _, sigmas = grids.sigma_grid(Schedule.from_config(raw, kind, use_karras_sigmas=True), 10)
        assert sigmas[0] == pytest.approx(10) and sigmas[9] == pytest.approx(0.05), kind
    _, sigmas = grids.sigma_grid(Schedule.from_config(raw, "LMSDiscreteScheduler"), 10)
    assert sigmas[0] != pytest.approx(10, abs=0.1)


def test_one_step_has_no_last_level_to_stretch():
    schedule = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift_terminal": 0.02})
    with pytest.raises(UserError, match=r"`steps` 1: this scheduler stretches its last level to 0\.02"):
        grids.flow_sigmas(schedule, 1)
    assert grids.flow_sigmas(schedule, 2)[1] == pytest.approx(0.02)
