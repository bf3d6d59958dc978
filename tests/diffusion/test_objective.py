"""Losses and draws."""

import math

import pytest
import torch

from nanodiff.config import UserError
from nanodiff.diffusion import objective
from nanodiff.diffusion.schedule import Schedule


def schedule(prediction, **more):
    return Schedule.from_config({"_class_name": "DDPMScheduler", "prediction_type": prediction} | more)


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_the_right_answer_has_no_loss(prediction):
    s = schedule(prediction)
    x0, noise, t = torch.randn(4, 3, 5), torch.randn(4, 3, 5), torch.tensor([0, 5, 500, 999])
    loss, plain = objective.diffusion(lambda x, t: s.target(x0, noise, t), s, x0, noise, t)
    assert loss == plain == 0
    off, _ = objective.diffusion(lambda x, t: s.target(x0, noise, t) + 2, s, x0, noise, t)
    assert off.item() == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("gamma", [1.0, 5.0])
def test_min_snr_is_one_weight_on_x0(gamma):
    """Hang et al. eq. 8: whatever is predicted, the error in x0 is weighted by min(SNR, gamma)."""
    t = torch.tensor([1, 100, 400, 800, 990])
    x0, noise = torch.randn(5, 7).double(), torch.randn(5, 7).double()
    wrong = x0 + 0.1
    weighted = {}
    for prediction in ("epsilon", "sample", "v_prediction"):
        s = schedule(prediction)
        x = s.add_noise(x0, noise, t)
        a, n = s.coefficients(t, x0)
        eps = (x - a * wrong) / n
        answer = {"epsilon": eps, "sample": wrong, "v_prediction": a * eps - n * wrong}[prediction]
        error = (answer - s.target(x0, noise, t)).pow(2).mean(1)
        weighted[prediction] = objective.weight(s, t, gamma) * error
    want = torch.minimum(schedule("sample").snr(t), torch.tensor(gamma)) * 0.01
    for got in weighted.values():
        assert torch.allclose(got, want.double(), rtol=1e-3)


def test_timesteps_are_uniform_and_addressed():
    """S2-36: each sample draws its own; the histogram is flat; the same index draws the same."""
    s = schedule("epsilon")
    t = objective.timesteps(s, 1, range(4000))
    counts = torch.histc(t.float(), bins=10, min=0, max=1000)
    assert (counts > 330).all() and (counts < 470).all()
    assert torch.equal(objective.timesteps(s, 1, range(100, 120)), t[100:120])
    assert not torch.equal(objective.timesteps(s, 2, range(20)), t[:20])


def test_flow_timesteps():
    s = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    uniform, normal = (objective.timesteps(s, 1, range(3000), k) / 1000 for k in ("uniform", "logit_normal"))
    assert uniform.mean().item() == pytest.approx(0.5, abs=0.03) and uniform.std().item() == pytest.approx(
        0.289, abs=0.02
    )
    assert normal.mean().item() == pytest.approx(0.5, abs=0.03) and normal.std().item() == pytest.approx(
        0.208, abs=0.02
    )


def test_streams_are_independent():
    a, b = (torch.randn(5, generator=objective.generator(1, s, 3)) for s in ("noise", "posterior"))
    assert not torch.equal(a, b)
    with pytest.raises(ValueError, match="unknown stream"):
        objective.generator(1, "nois", 3)


def test_kl():
    mean, logvar = torch.tensor([[1.0, -2.0]]), torch.tensor([[0.0, 1.0]])
    p = torch.distributions.Normal(mean, (0.5 * logvar).exp())
    want = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0))
    got = objective.kl(mean[..., None, None], logvar[..., None, None])
    assert torch.allclose(got, want, rtol=1e-6)


class Coder(torch.nn.Module):
    """A VAE with given moments, whose reconstruction is the latent's first place everywhere."""

    def __init__(self, mean, logvar):
        super().__init__()
        self.moments = mean, logvar

    def forward(self, pixels, noise):
        mean, logvar = self.moments
        z = mean + (0.5 * logvar).exp() * noise
        return torch.zeros_like(pixels) + z[:, :1, :1, :1], mean, logvar


def test_vae_loss_is_error_and_divergence_per_value():
    pixels, noise = torch.randn(2, 3, 4, 4), torch.zeros(2, 2, 1, 1)
    mean, logvar = torch.tensor([[2.0, 0.0], [0.0, 1.0]])[..., None, None], torch.zeros(2, 2, 1, 1)
    for l1 in (True, False):
        loss, parts, made = objective.vae(Coder(mean, logvar), pixels, noise, 0.7, l1)
        off = (made - pixels).abs() if l1 else (made - pixels).pow(2)
        assert loss.item() == pytest.approx(off.mean().item() + 0.7 * (2.0 + 0.5) / 2 / 48, rel=1e-5)
        assert parts["kl"].item() == pytest.approx(1.25)


def test_free_bits_cost_nothing():
    pixels, noise = torch.zeros(1, 3, 2, 2), torch.zeros(1, 2, 1, 1)
    mean = torch.tensor([[2.0, 0.5]])[..., None, None].requires_grad_()  # 2 and 0.125 nats
    loss, _, _ = objective.vae(Coder(mean, torch.zeros(1, 2, 1, 1)), pixels, noise, 1.0, free_bits=1.0)
    only_kl = loss - 2.0  # the reconstruction is 2 everywhere
    assert only_kl.item() == pytest.approx(3.0 / 12)
    loss.backward()
    assert mean.grad[0, 1].item() == 0, "the channel below its free bits feels nothing"


def test_kl_target_steers():
    scale = 1.0
    for _ in range(400):  # a world in which the KL is 100 / weight
        scale = objective.steered(scale, 100 / scale, 25.0)
    assert 100 / scale == pytest.approx(25, rel=0.02)


def test_the_kl_weight_moves_both_ways():
    """It falls below the target as it grows above it, by the share that is lacking and at most by `speed`."""
    assert objective.steered(1.0, 10.0, 25.0) == pytest.approx(math.exp(-0.02 * 0.6))
    assert objective.steered(2.0, 30.0, 25.0) == pytest.approx(2 * math.exp(0.02 * 0.2))
    assert (
        objective.steered(1.0, 1000.0, 25.0) == pytest.approx(math.exp(0.02))
        and objective.steered(1.0, 25.0, 25.0) == 1
    )


def test_snr_weighting_without_a_clip_is_the_epsilon_loss():
    s, t = schedule("sample"), torch.tensor([3, 400, 900])
    assert torch.allclose(objective.weight(s, t, float("inf")), s.snr(t))
    v = schedule("v_prediction", rescale_betas_zero_snr=True)
    assert torch.isfinite(objective.weight(v, torch.tensor([0, 999]), float("inf"))).all()


def test_flow_weight_and_shift():
    s = Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler"})
    plain, shifted = (objective.timesteps(s, 1, range(2000), shift=k) / 1000 for k in (1.0, 3.0))
    assert torch.allclose(shifted, 3 * plain / (1 + 2 * plain), atol=1e-5)
    x0, noise, wrong = torch.randn(3, 5), torch.randn(3, 5), 0.1
    t = torch.tensor([100.0, 500.0, 900.0])
    x, sigma = s.add_noise(x0, noise, t), (t / 1000)[:, None]
    velocity = (x - (x0 + wrong)) / sigma  # of the flow whose end is off by 0.1
    error = (velocity - s.target(x0, noise, t)).pow(2).mean(1)
    want = torch.minimum(s.snr(t), torch.tensor(5.0)) * wrong**2
    assert torch.allclose(objective.weight(s, t, 5.0) * error, want, rtol=1e-2), "min-SNR on x0, as for the others"


def test_offset_noise_is_one_number_a_channel():
    noise = torch.randn(4, 3, 8, 8)
    moved = objective.offset(noise, 0.5, 7, range(4)) - noise
    assert torch.allclose(moved, moved[:, :, :1, :1].expand_as(moved), atol=1e-6) and moved.std() > 0.1
    assert objective.offset(noise, 0.0, 7, range(4)) is noise


def test_zero_snr_epsilon_is_refused():
    with pytest.raises(UserError, match="ε"):
        schedule("epsilon", rescale_betas_zero_snr=True)


@pytest.mark.parametrize("name", objective.LOSSES)
def test_losses(name):
    """Zero for no error, the same for errors of either sign, growing, with the gradient of finite differences."""
    loss = objective.LOSSES[name]
    e = torch.linspace(-3, 3, 61, dtype=torch.float64) + 0.01  # not at the corner of |e|
    e.requires_grad_()
    value = loss(e)
    assert loss(torch.zeros(3, dtype=torch.float64)).abs().max() < 1e-12 and torch.allclose(loss(-e), value)
    assert (loss(e.detach().abs().sort().values).diff() >= 0).all()
    (slope,) = torch.autograd.grad(value.sum(), e)
    h = 1e-6
    assert torch.allclose(slope, (loss(e.detach() + h) - loss(e.detach() - h)) / (2 * h), atol=1e-7)


def test_pseudo_huber_is_between():
    """e² near 0 and 2c|e| far out."""
    e = torch.tensor([1e-4, 1e4], dtype=torch.float64)
    near, far = objective.pseudo_huber(e)
    assert near == pytest.approx(1e-8, rel=1e-3) and far == pytest.approx(0.2 * 1e4, rel=1e-3)


def test_an_unknown_loss_is_named():
    with pytest.raises(UserError, match="`loss` mze: is none of mse, l1, huber; did you mean mse"):
        objective.check_loss("mze")
