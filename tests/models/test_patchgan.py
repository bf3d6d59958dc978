"""The patch discriminator and its losses."""

import pytest
import torch
import torch.nn.functional as F

from nanodiff.models import patchgan


def test_a_patch_is_70_pixels():
    """Isola et al.: the receptive field of one logit."""
    torch.manual_seed(0)
    net = patchgan.PatchDiscriminator(width=16, groups=16).double()
    x = torch.randn(1, 3, 160, 160, dtype=torch.float64, requires_grad=True)
    # GroupNorm sees the whole picture, so the field is that of the convolutions alone
    for m in net.modules():
        if isinstance(m, torch.nn.GroupNorm):
            m.forward = lambda h, *a: h
    out = net(x)
    out[0, 0, out.shape[2] // 2, out.shape[3] // 2].backward()
    rows = x.grad.abs().sum((0, 1, 3)).nonzero()
    assert (rows.max() - rows.min() + 1).item() == 70


def test_losses():
    net = patchgan.PatchDiscriminator(width=16, groups=16)
    real, fake = torch.randn(2, 3, 64, 64), torch.randn(2, 3, 64, 64, requires_grad=True)
    loss = patchgan.generator_loss(net, fake)
    assert loss.item() == pytest.approx(-net(fake).mean().item(), rel=1e-4)
    loss.backward()
    assert fake.grad.abs().sum() > 0 and all(p.grad is None for p in net.parameters()), "the discriminator stands still"
    fake.grad = None
    loss = patchgan.discriminator_loss(net, real, fake)
    want = 0.5 * (F.relu(1 - net(real)).mean() + F.relu(1 + net(fake)).mean())
    assert loss.item() == pytest.approx(want.item(), rel=1e-4)
    loss.backward()
    assert fake.grad is None and all(p.grad is not None for p in net.parameters()), "the picture stands still"


def test_it_learns_to_tell():
    torch.manual_seed(0)
    net = patchgan.PatchDiscriminator(width=16, levels=2, groups=16)
    opt = torch.optim.Adam(net.parameters(), 1e-3)
    for _ in range(25):
        real, fake = torch.rand(4, 3, 32, 32), -torch.rand(4, 3, 32, 32)
        opt.zero_grad()
        patchgan.discriminator_loss(net, real, fake).backward()
        opt.step()
    assert net(torch.rand(2, 3, 32, 32)).mean() > net(-torch.rand(2, 3, 32, 32)).mean() + 1
