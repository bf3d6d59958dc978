"""Learning rates, averaged weights, stopping."""

import math

import pytest
import torch
from torch import nn
from util import max_error

from nanodiff.config import UserError
from nanodiff.training import options, recipe


def lr(step, kind, **more):
    return recipe.learning_rate(step, 1.0, 110, 10, kind, **more)


def test_warm_up_and_ends():
    for kind in options.LR_SCHEDULERS:
        assert (
            lr(0, kind, first=50) == (1.0 if kind == "constant" else 0.1)
            and lr(9, kind, first=50) == 1.0
            and lr(10, kind, first=50) == 1.0
        )
    assert lr(109, "constant") == lr(109, "none") == lr(109, "plateau") == 1.0
    assert lr(0, "constant") == 1.0 > lr(0, "constant_with_warmup")
    assert recipe.learning_rate(9, 1.0, 100, 0.1, "linear") == 1.0, "below 1: a share of the run"
    assert recipe.learning_rate(0, 1.0, 100, 0, "linear") == 1.0


def test_shapes_of_the_schedules():
    """Closed forms, as PyTorch's and diffusers' schedulers of the same names have them."""
    assert lr(60, "cosine") == pytest.approx(0.5) and lr(110, "cosine") == pytest.approx(0)
    assert lr(60, "linear") == 0.5 and lr(60, "linear", low=0.2) == pytest.approx(0.6)
    assert lr(60, "polynomial", power=2.0) == 0.25
    assert (
        lr(35, "cosine_with_restarts", cycles=2) == pytest.approx(0.5)
        and lr(60, "cosine_with_restarts", cycles=2) == 1.0
    )
    torch_lr = torch.optim.lr_scheduler.CosineAnnealingWarmRestarts(
        torch.optim.SGD([torch.zeros(1, requires_grad=True)], 1.0), T_0=7, T_mult=2, eta_min=0.1
    )
    for step in range(60):
        want = torch_lr.get_last_lr()[0]
        assert recipe.learning_rate(step, 1.0, 60, 0, "cosine_warm_restarts", low=0.1, first=7) == pytest.approx(want)
        torch_lr.optimizer.step()
        torch_lr.step()


def test_ema_decay_warms_up_and_restores():
    net = nn.Linear(1, 1, bias=False)
    net.weight.data.fill_(0.0)
    ema = recipe.EMA(net, decay=0.9)
    net.weight.data.fill_(1.0)
    ema.update(net, 0)
    assert ema.shadow["weight"].item() == 1.0, "decay 0 at the first update"
    net.weight.data.fill_(2.0)
    ema.update(net, 10**6)
    assert ema.shadow["weight"].item() == pytest.approx(1.1)
    with ema.applied(net):
        assert net.weight.item() == pytest.approx(1.1)
    assert net.weight.item() == 2.0


def test_schedule_free_is_its_authors():
    """Recorded from AdamWScheduleFree of schedulefree 1.4.1: what is trained and its mean, after 1, 3 and 7 updates of which 3 warm up."""
    net = nn.Linear(4, 1, bias=False).double()
    net.weight.data = torch.tensor([[1.0, -2.0, 0.5, 3.0]], dtype=torch.float64)
    opt = recipe.ScheduleFree(net.parameters(), 1.0, (0.9, 0.99), 1e-8, 0.05)
    want = {
        0: ([0.965000000396, -2.02999999982, 0.465833334121, 3.02833333322],) * 2,
        2: ([0.880849527623, -1.95559726074, 0.640447561722, 3.10389404208],
            [0.882230049038, -1.95983854489, 0.635085301526, 3.10260646613]),
        6: ([1.00446009529, -1.86719837293, 0.566091470964, 2.93305460436],
            [1.00244025006, -1.85872191109, 0.582744750522, 2.94176607579]),
    }  # fmt: skip
    with opt.applied(net):
        assert net.weight[0].tolist() == [1.0, -2.0, 0.5, 3.0], "before the first update"
    for i in range(7):
        opt.param_groups[0]["lr"] = 0.1 * min(1, (i + 1) / 3)
        net.weight.grad = torch.tensor([[math.sin(i + 1.0 + k) * (k + 1) for k in range(4)]], dtype=torch.float64)
        opt.step()
        if i in want:
            assert net.weight[0].tolist() == pytest.approx(want[i][0], rel=1e-10)
            with opt.applied(net):
                assert net.weight[0].tolist() == pytest.approx(want[i][1], rel=1e-10)
            assert net.weight[0].tolist() == pytest.approx(want[i][0], rel=1e-10)


def test_schedule_free_counts_each_parameter_alone():
    """A critic learns more often than its generator: each goes as it would by itself, whichever stands first."""
    slopes = torch.randn(6, 2, 3, generator=torch.Generator().manual_seed(0))
    together, alone = ([nn.Parameter(torch.ones(3)) for _ in range(2)] for _ in range(2))
    opt, own = recipe.ScheduleFree(together, 0.1), [recipe.ScheduleFree([p], 0.1) for p in alone]
    for i in range(6):
        for k in (0, 1):
            some = k == 1 or i % 3 == 2
            together[k].grad = slopes[i, k].clone() if some else None
            alone[k].grad = slopes[i, k].clone()
            if some:
                own[k].step()
        opt.step()
        assert all(torch.equal(a, b) for a, b in zip(together, alone, strict=True))
    assert [int(opt.state[p]["step"]) for p in together] == [2, 6]


@pytest.mark.parametrize(
    "wrong", [{"ema": True}, {"lr_scheduler": "cosine"}, {"adam_beta1": 0.0}], ids=lambda w: next(iter(w))
)
def test_schedule_free_takes_no_schedule(wrong):
    good = {"optimizer": "schedule_free", "ema": False, "lr_scheduler": "constant_with_warmup"}
    options.Training(**good).check_ranges()
    with pytest.raises(UserError, match="schedule_free"):
        options.Training(**good | wrong).check_ranges()


def test_ema_warm_up_is_diffusers():
    """1 - (1 + step / inv_gamma)^-power, recorded from EMAModel.get_decay of diffusers 0.42.1 (whose step counts from 1)."""
    ema = recipe.EMA(nn.Linear(1, 1), 0.9999, inv_gamma=1.0, power=0.75)
    for step, want in ((1, 0.4053964425), (10, 0.8344399739238298), (1000, 0.9943808006210502), (10**7, 0.9999)):
        assert ema.at(step) == pytest.approx(want, rel=1e-8)
    assert recipe.EMA(nn.Linear(1, 1), 0.9999, 20.0, 0.5).at(60) == pytest.approx(1 - 1 / math.sqrt(4))


def test_ema_keeps_to_what_is_trained():
    net = nn.Sequential(nn.Linear(2, 2).requires_grad_(False), nn.Linear(2, 1))
    assert set(recipe.EMA(net).shadow) == {"1.weight", "1.bias"}


def test_oscillation_stop():
    """S2-21: the standard deviation of the window below the threshold, and the last one near the mean."""
    stopper = recipe.Stopper(window=4, threshold=0.01)
    assert [stopper.epoch(x) for x in (1.0, 0.5, 0.501, 0.499)] == [None] * 4
    assert "oscillation stop: over 4 epochs" in stopper.epoch(0.5)
    moving = recipe.Stopper(window=4, threshold=0.01)
    assert all(moving.epoch(1 - 0.02 * i) is None for i in range(20))


def test_early_stopping_counts_only_real_progress():
    stopper = recipe.Stopper(patience=3, delta=0.1)
    assert [stopper.epoch(x) for x in (1.0, 0.95, 0.92, 0.85, 0.84, 0.83)] == [None] * 6
    assert "early stopping: 3 epochs" in stopper.epoch(0.80)
    assert recipe.Stopper().epoch(1.0) is None


@pytest.mark.parametrize(("dtype", "rounding"), [(torch.float32, 1e-3), (torch.bfloat16, 0.05)])
def test_orthogonal_is_the_polar_factor(dtype, rounding):
    """U Vᵀ of U S Vᵀ, but for singular values between 0.68 and 1.14; wide, tall, and of any size. In bf16 a value may be off by as much as a step's
    slope there (3.4) times a sum of its rounding."""
    for shape in ((3, 40, 100), (2, 70, 30), (1, 1, 9)):
        x = torch.randn(shape) * 10.0 ** torch.randint(-8, 9, (shape[0], 1, 1))
        got = recipe.orthogonal(x, dtype=dtype).double()
        u, _, vh = torch.linalg.svd(x.double(), full_matrices=False)
        assert torch.linalg.svdvals(got).min() > 0.67 - rounding and torch.linalg.svdvals(got).max() < 1.15 + rounding
        inner = u.mT @ got @ vh.mT  # in the singular vectors' own axes it is diagonal, with those values
        off = inner - torch.diag_embed(torch.diagonal(inner, dim1=1, dim2=2))
        assert off.abs().max() < rounding and torch.diagonal(inner, dim1=1, dim2=2).min() > 0.67 - rounding
    assert torch.equal(recipe.orthogonal(torch.zeros(1, 4, 5), dtype=dtype).float(), torch.zeros(1, 4, 5))


def test_orthogonal_keeps_its_bounds():
    """Those of its docstring, for singular values from 1.6e-3 of the norm on; below they stay small."""
    singular = torch.cat([torch.logspace(math.log10(1.6e-3), math.log10(0.5), 63, dtype=torch.float64), torch.ones(1)])
    singular /= singular.norm()
    singular = singular[singular >= 1.6e-3]
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=torch.Generator().manual_seed(n)))[0] for n in (64, 96))
    x = u[:, : len(singular)] * singular.float() @ v[: len(singular)]
    found = torch.linalg.svdvals(recipe.orthogonal(x[None], dtype=torch.float32)[0])[: len(singular)]
    assert found.min() > 0.68 and 1.19 < found.max() < 1.21


def test_a_rate_that_would_rise_is_refused():
    with pytest.raises(UserError, match=r"--lr-min 0\.01 is above --lr 0\.0001"):
        options.Training(lr=1e-4, lr_min=1e-2).check_ranges()


def test_muon_is_pytorchs_for_matrices_and_adamw_for_the_rest():
    """PyTorch's iterates in bf16, whose rounding is what is allowed."""
    mine = [torch.randn(s, requires_grad=True) for s in ((30, 50), (50, 30), (30, 50), (20,), (7, 8))]
    theirs = [p.detach().clone().requires_grad_() for p in mine]
    start = [p.detach().clone() for p in mine]
    opt = recipe.Muon(mine, mine[:3], lr=1e-2, weight_decay=0.1)
    muon = torch.optim.Muon(theirs[:3], lr=2e-2, weight_decay=0.1, momentum=0.95, adjust_lr_fn="match_rms_adamw")
    adam = torch.optim.AdamW(theirs[3:], lr=1e-2, weight_decay=0.1, betas=(0.9, 0.999))
    for _ in range(5):
        for p, q in zip(mine, theirs, strict=True):
            p.grad = torch.randn_like(p)
            q.grad = p.grad.clone()
        for o in (opt, muon, adam):
            o.step()
    for p, q, p0 in zip(mine[:3], theirs[:3], start[:3], strict=True):
        assert (p - q).norm() / (q - p0).norm() < 4 * torch.finfo(torch.bfloat16).eps
    for p, q in zip(mine[3:], theirs[3:], strict=True):
        assert max_error(p, q) < 1e-6


def test_muon_leaves_what_has_no_gradient():
    pair = [torch.randn(4, 6, requires_grad=True), torch.randn(4, 6, requires_grad=True)]
    before = pair[1].detach().clone()
    opt = recipe.Muon(pair, pair, lr=0.1, weight_decay=0.5)
    pair[0].grad = torch.randn(4, 6)
    opt.step()
    assert torch.equal(pair[1], before) and not opt.state[pair[1]]


def test_what_is_hidden():
    """The linear layers inside the blocks; not the ends, embeddings, norms, convolutions or what is frozen."""
    net = nn.ModuleDict({
        "embedder": nn.Linear(3, 3), "blocks": nn.ModuleList([nn.ModuleDict({"a": nn.Linear(3, 4), "n": nn.LayerNorm(3)}), nn.Conv2d(3, 3, 3)]),
        "words": nn.ModuleList([nn.Embedding(5, 3)]), "proj_out": nn.Linear(3, 3), "frozen": nn.ModuleList([nn.Linear(3, 3)]),
    })  # fmt: skip
    net["frozen"].requires_grad_(False)
    assert [p is net["blocks"][0]["a"].weight for p in recipe.hidden(net)] == [True]
