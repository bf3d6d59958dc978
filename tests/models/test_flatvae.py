"""The VAE with a flat latent."""

import pytest
import torch

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models.flatvae import Config, FlatVAE
from nanodiff.pipeline import sources

SMALL = {"sample_size": 32, "latent_dim": 32, "block_out_channels": [8, 16], "norm_num_groups": 4}


def make(**more):
    torch.manual_seed(0)
    return FlatVAE(Config.from_json(SMALL | more))


def test_shapes_and_a_round_trip_through_files(tmp_path):
    net, pixels = make().eval(), torch.rand(2, 3, 32, 32) * 2 - 1
    mean, logvar = net.encode_moments(pixels)
    assert mean.shape == logvar.shape == (2, 2, 4, 4) and (net.cfg.latent_channels, net.cfg.downscale) == (2, 8)
    assert net.decode(net.encode(pixels)).shape == pixels.shape
    weights.save(net, tmp_path)
    again = sources.load_vae(tmp_path, torch.float32, "cpu")
    assert isinstance(again, FlatVAE) and torch.allclose(again.encode(pixels), net.encode(pixels), atol=1e-6)


def test_the_documents_size():
    """S2-06, S2-13: 128 px, 64-128-256-512, 128 numbers; logvar begins at -3."""
    with torch.device("meta"):
        net = FlatVAE(Config())
    assert (net.cfg.latent_dim, net.side) == (128, 8)
    assert net.encode_moments(torch.empty(1, 3, 128, 128, device="meta"))[0].shape == (1, 8, 4, 4)
    assert make().encode_moments(torch.zeros(1, 3, 32, 32))[1].mean().item() == pytest.approx(-3, abs=0.5)


def test_logvar_is_clamped():
    net = make()
    net.moments.bias.data[32:] = 50
    assert net.encode_moments(torch.zeros(1, 3, 32, 32))[1].max().item() == 2.0


def test_it_learns_a_picture():
    net, x = make(), torch.rand(4, 3, 32, 32) * 2 - 1
    opt = torch.optim.Adam(net.parameters(), 3e-3)
    losses = []
    for _ in range(60):
        loss = (net(x, torch.zeros(4, 2, 4, 4))[0] - x).abs().mean()
        losses.append(loss.item())
        opt.zero_grad()
        loss.backward()
        opt.step()
    assert losses[-1] < 0.6 * losses[0]


def test_wrong_sizes():
    with pytest.raises(UserError, match="takes 32x32 pixels, not 40x32"):
        make().encode_moments(torch.zeros(1, 3, 32, 40))
    with pytest.raises(UserError, match="latent_dim = 100 must be a multiple of 16"):
        make(latent_dim=100)
    with pytest.raises(UserError, match="sample_size = 30"):
        make(sample_size=30)
