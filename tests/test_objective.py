"""Losses and draws."""

import pytest
import torch

from nanodiff import objective
from nanodiff.config import UserError
from nanodiff.schedule import Schedule


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
    uniform, normal = (objective.timesteps(s, 1, range(3000), logit_normal=k) / 1000 for k in (False, True))
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
    want = torch.distributions.kl_divergence(p, torch.distributions.Normal(0.0, 1.0)).sum()
    assert objective.kl(mean, logvar).item() == pytest.approx(want.item(), rel=1e-6)


def test_zero_snr_epsilon_is_refused():
    with pytest.raises(UserError, match="ε"):
        schedule("epsilon", rescale_betas_zero_snr=True)
