"""Distillation's equations, judged by Gaussian data, for which the perfect network is known."""

import functools
import itertools

import pytest
import torch
from util import gaussian_model

from nanodiff.config import UserError
from nanodiff.diffusion import fewstep, samplers
from nanodiff.diffusion.schedule import Schedule

KINDS = ("epsilon", "v_prediction", "sample", "flow")
MEAN, VAR = 0.7, 0.3


def schedule(kind, sampler=None, **more):
    if kind == "flow":
        raw = {"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": 3.0}
        return samplers.rescheduled(Schedule.from_config(raw), sampler, **more)
    raw = {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "clip_sample": False,
           "prediction_type": kind, "timestep_spacing": "trailing", "rescale_betas_zero_snr": kind == "v_prediction"}  # fmt: skip
    return samplers.rescheduled(Schedule.from_config(raw), sampler, **more)


def nested(kind):
    """As few_step.few_schedule() has it for progressive: a run of n steps has every other time of one of 2n."""
    return samplers.spaced_by(schedule(kind), "flow_euler", "sgm_uniform") if kind == "flow" else schedule(kind)


def perfect(s, mean=MEAN, var=VAR):
    """gaussian_model for a batch of timesteps."""

    def model(x, t):
        a, n = fewstep.coefficients(s, t, x)
        total = a * a * var + n * n
        x0, eps = mean + a * var / total * (x - a * mean), n / total * (x - a * mean)
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - n * x0, "flow": eps - x0}[s.prediction]

    return model


def draws(n=3, seed=0, shape=(2, 4, 4)):
    g = torch.Generator().manual_seed(seed)
    return (MEAN + VAR**0.5 * torch.randn(n, *shape, generator=g)), torch.randn(n, *shape, generator=g)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("n", (1, 3, 7))
def test_jumps_are_the_samplers_steps(kind, n):
    s = schedule(kind)
    _, x = draws()
    sampler = samplers.of(s).run
    want = list(sampler(gaussian_model(s, MEAN, VAR), x.double(), s, n, None))[-1].x
    times = fewstep.grid(s, n)
    assert times[-1] == -1 and len(times) == n + 1
    for t, u in itertools.pairwise(times):
        x = fewstep.jump(s, perfect(s), x, t.expand(3).float(), u.expand(3).float())
    assert torch.allclose(x.double(), want, atol=2e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("substeps", (2, 5))
def test_progressive_asks_for_the_one_jump_that_ends_where_the_teacher_ends(kind, substeps):
    s, n = nested(kind), 4
    x0, noise = draws()
    i = torch.tensor([0, 2, 3])
    times, finer = fewstep.grid(s, n), fewstep.grid(s, n * substeps)
    t, u = times[i].float(), times[i + 1].float()
    x = end = s.add_noise(x0, noise, t)
    stops = [finer[i * substeps + j].float() for j in range(substeps + 1)]
    assert torch.allclose(stops[0], t, atol=1e-3) and torch.allclose(stops[-1], u, atol=1e-3)
    for here, there in itertools.pairwise(stops):
        end = fewstep.jump(s, perfect(s), end, here, there)
    answer = x.clone().requires_grad_()  # any prediction: gradient descent finds the one that the loss wants

    def student(x, t):
        return answer

    for _ in range(60):
        loss = fewstep.progressive(student, perfect(s), s, x0, noise, i, n, substeps)
        (gradient,) = torch.autograd.grad(loss, answer)
        a, b = fewstep.coefficients(s, t, x)
        # of the loss, which is a parabola
        factor = {"epsilon": a**-2, "sample": b**-2, "v_prediction": 1.0, "flow": 1.0}[kind]
        answer.data -= 0.5 * gradient * answer.numel() / factor
    got = fewstep.jump(s, student, x, t, u)
    assert loss < 1e-6 and torch.allclose(got, end, atol=1e-3)
    plain = fewstep.progressive(perfect(s), perfect(s), s, x0, noise, i, n, substeps)
    assert plain > 1e-4, "one big step of the teacher itself ends elsewhere"


@pytest.mark.parametrize("kind", KINDS)
def test_a_round_asks_its_teacher_at_the_times_that_it_has_learned(kind):
    """Salimans & Ho 2022 Alg. 2: the student of 2n steps teaches that of n on its own grid, down to one step."""
    s = nested(kind)
    x0, noise = draws()
    for n in (8, 4, 2, 1):
        asked = set()

        def teacher(x, t, asked=asked):
            asked.update(t.tolist())
            return perfect(s)(x, t)

        for i in range(n):
            fewstep.progressive(perfect(s), teacher, s, x0, noise, torch.full((3,), i), n)
        assert sorted(asked) == pytest.approx(sorted(samplers.times(s, 2 * n)), abs=1e-3), n


@pytest.mark.parametrize("kind", KINDS)
def test_the_end_of_the_ode_is_consistent(kind):
    """f(x, t) = where the teacher's ODE ends: the loss goes with the size of the teacher's jumps; another f is not consistent."""
    s = schedule(kind, None if kind == "flow" else "lcm")
    x0, noise = draws(64)

    def solved(x, t):
        a, n = fewstep.coefficients(s, t, x)
        end = MEAN + (x - a * MEAN) * (VAR / (a * a * VAR + n * n)) ** 0.5
        if kind == "sample":
            return end
        eps = (x - a * end) / n.clamp(min=1e-6)
        return {"epsilon": eps, "v_prediction": a * eps - n * end, "flow": eps - end}[kind]

    def loss(f, known):
        g = torch.Generator().manual_seed(1)
        i = torch.randint(known, (64,), generator=g)
        return fewstep.consistency(f, f, perfect(s), s, x0, noise, i, known).item()

    coarse, fine = loss(solved, 20), loss(solved, 200)
    assert fine < coarse / 3, (coarse, fine)
    assert loss(perfect(s), 20) > 3 * coarse, "the teacher's own estimate changes along its path"


@pytest.mark.parametrize("kind", KINDS)
def test_consistency_has_no_gradient_through_its_target(kind):
    s = schedule(kind, None if kind == "flow" else "lcm")
    x0, noise = draws()
    w = torch.ones((), requires_grad=True)
    student = lambda x, t: w * perfect(s)(x, t)  # noqa: E731
    now = lambda x, t: pytest.fail("gradients are on") if torch.is_grad_enabled() else perfect(s)(x, t)  # noqa: E731
    loss = fewstep.consistency(student, now, perfect(s), s, x0, noise, torch.tensor([0, 3, 9]), 10)
    assert torch.autograd.grad(loss, w)[0].abs() > 0


def test_times_of_consistency_are_the_samplers():
    s = schedule("epsilon", "lcm", original_inference_steps=50)
    t, u = fewstep.consistency_times(s, 50)
    assert t.tolist() == samplers.lcm_times(s, 50) and u[-1] == 0 and torch.equal(u[:-1], t[1:])
    assert set(samplers.lcm_times(s, 4)) <= set(t.tolist())
    assert torch.equal(
        fewstep.consistent(s, torch.ones(1, 1, 1, 1), torch.zeros(1, 1, 1, 1), torch.zeros(1)), torch.zeros(1, 1, 1, 1)
    )


@pytest.mark.parametrize("kind", KINDS)
def test_a_drawn_picture_is_the_samplers(kind):
    more = {"stochastic_sampling": True} if kind == "flow" else {}
    s, n = schedule(kind, None if kind == "flow" else "lcm", **more), 3
    noises = [draws(seed=i)[1] for i in range(n)]
    later = iter(noises[1:])
    want = list(
        samplers.of(s).run(
            gaussian_model(s, MEAN, VAR), noises[0].double(), s, n, lambda: next(later, torch.zeros(1)).double()
        )
    )
    asked = []
    last = lambda x, t: asked.append(t) or perfect(s)(x, t)  # noqa: E731
    got = fewstep.drawn(perfect(s), s, noises, n, n - 1, last)
    assert torch.allclose(got.double(), want[-1].x, atol=1e-4) and len(asked) == 1
    first = fewstep.drawn(perfect(s), s, noises, n, 0)
    assert torch.allclose(first.double(), want[0].x0, atol=1e-3)


@pytest.mark.parametrize("kind", KINDS)
def test_matching_distributions(kind):
    """The gradient is the scores' difference: none where critic and teacher agree; downhill is towards the teacher's mean."""
    s = schedule(kind)
    _, noise = draws()
    t = fewstep.matched_times(s, torch.tensor([0.1, 0.5, 0.9]))
    assert t.min() > 0 and t.max() < s.T
    x0 = torch.zeros(3, 2, 4, 4, requires_grad=True)
    same = fewstep.distribution(x0, perfect(s), perfect(s), s, noise, t)
    assert torch.autograd.grad(same, x0)[0].abs().max() == 0
    loss = fewstep.distribution(x0, perfect(s, mean=1.0), perfect(s, mean=0.0), s, noise, t)
    (gradient,) = torch.autograd.grad(loss, x0)
    assert (gradient < 0).all(), "down this gradient x0 rises from the critic's 0 to the teacher's 1"
    x = s.add_noise(x0.detach(), noise, t)
    real, fake = (fewstep.split(s, perfect(s, mean=m)(x, t), x, t)[0] for m in (1.0, 0.0))
    want = (fake - real) / (x0 - real).abs().flatten(1).mean(1).view(-1, 1, 1, 1) / x0.numel()
    assert torch.allclose(gradient, want, rtol=1e-4, atol=1e-8)


@pytest.mark.parametrize("kind", KINDS)
def test_errors_weigh_as_v_or_velocity(kind):
    s = schedule(kind)
    x0, noise = draws()
    t = torch.tensor([100.0, 500.0, 900.0]) if s.flow else torch.tensor([100, 500, 900])
    x = s.add_noise(x0, noise, t)
    other = x0 + 0.1 * noise
    a, b = fewstep.coefficients(s, t, x)
    v = lambda z: ((x - a * z) / b - z) if s.flow else a * (x - a * z) / b - b * z  # noqa: E731
    want = (v(other) - v(x0)).pow(2).mean()
    assert torch.allclose(fewstep.mean_error(s, other, x0, t, x), want, rtol=1e-4)
    assert fewstep.denoising(perfect(s, x0.mean(), 1e9), s, x0, noise, t) > fewstep.denoising(
        perfect(s), s, x0, noise, t
    )


def test_guidance():
    one, two = (lambda x, t: x, lambda x, t: 2 * x)
    assert fewstep.guided(two, one, 1.0) is two
    assert fewstep.guided(two, one, 3.0)(torch.ones(1), None).item() == 1 + 3 * (2 - 1)
    s = schedule("v_prediction")
    x0, noise = draws()
    t = torch.tensor([10, 500, 999])
    x = s.add_noise(x0, noise, t)
    teach = fewstep.guided(perfect(s, 1.0), perfect(s, 0.0), 3.0)
    assert fewstep.guidance(teach, teach, s, x, t) == 0 < fewstep.guidance(perfect(s), teach, s, x, t)


class Tiny(torch.nn.Module):
    """The stages of a UNet."""

    def __init__(self, width):
        super().__init__()
        stage = lambda: torch.nn.ModuleDict({"resnets": torch.nn.ModuleList([torch.nn.Conv2d(3, width, 1)])})  # noqa: E731
        self.down_blocks, self.up_blocks = torch.nn.ModuleList([stage()]), torch.nn.ModuleList([stage()])
        self.mid_block = stage()
        for part in (*self.down_blocks, *self.up_blocks, self.mid_block):
            part.resnets = part["resnets"]

    def forward(self, x):
        return [s.resnets[0](x).mean() for s in (*self.down_blocks, self.mid_block, *self.up_blocks)]


def test_features_of_other_widths():
    torch.manual_seed(0)
    small, big, x = Tiny(2), Tiny(5), torch.randn(2, 3, 4, 4)
    with fewstep.Features(small) as mine, fewstep.Features(big) as theirs:
        small(x), big(x)
        assert set(mine.seen) == {"down_blocks.0", "mid_block", "up_blocks.0"}
        loss = fewstep.features(mine.seen, theirs.seen)
        assert 0 < loss < 2 and torch.autograd.grad(loss, small.mid_block.resnets[0].weight)[0].abs().sum() > 0
        assert fewstep.features(mine.seen, {k: 7 * v for k, v in mine.seen.items()}) < 1e-12, (
            "strength alone does not count"
        )
        with pytest.raises(UserError, match="no stage of the student"):
            fewstep.features(mine.seen, {"mid_block": torch.zeros(2, 5, 3, 3)})
    before = dict(mine.seen)
    small(x + 1)
    assert all(mine.seen[k] is before[k] for k in before), "outside, nothing is kept"
    with pytest.raises(UserError, match="is for UNets"):
        fewstep.Features(torch.nn.Linear(2, 2))


def test_a_teacher_of_another_space():
    class SD:
        def __init__(self, s, vae):
            self.schedule, self.vae = s, vae

    make = functools.partial(torch.nn.Linear, 2, 2)
    vae = make()
    fewstep.same_space(SD(schedule("epsilon"), vae), SD(schedule("v_prediction", rescale_betas_zero_snr=False), vae))
    with pytest.raises(UserError, match="another noise schedule"):
        fewstep.same_space(SD(schedule("epsilon"), vae), SD(schedule("flow"), vae))
    with pytest.raises(UserError, match="another VAE"):
        fewstep.same_space(SD(schedule("epsilon"), vae), SD(schedule("epsilon"), make()))
    with pytest.raises(UserError, match="another VAE"):
        fewstep.same_space(SD(schedule("epsilon"), vae), SD(schedule("epsilon"), None))
