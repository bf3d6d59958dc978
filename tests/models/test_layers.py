"""Layers against their formulas in float64."""

import math

import pytest
import torch
from util import TINY, rms_ratio

from nanodiff import pipeline
from nanodiff.models import layers
from nanodiff.models.layers import Downsample, GroupNorm, attend, timestep_embedding
from nanodiff.models.upsample import Upsample


def test_timestep_embedding_is_cos_then_sin():
    got = timestep_embedding(torch.tensor([0.0, 7.5, 999.0]), 8)
    for row, t in zip(got, (0.0, 7.5, 999.0), strict=True):
        frequencies = [math.exp(-math.log(10000) * i / 4) for i in range(4)]
        want = [math.cos(t * f) for f in frequencies] + [math.sin(t * f) for f in frequencies]
        assert torch.allclose(row.double(), torch.tensor(want, dtype=torch.float64), atol=1e-4)


def test_attend():
    q, k, v = torch.randn(2, 5, 12), torch.randn(2, 7, 12), torch.randn(2, 7, 12)
    split = lambda x: x.double().view(2, -1, 3, 4).transpose(1, 2)  # noqa: E731
    scores = split(q) @ split(k).transpose(-1, -2) / 4**0.5
    want = (scores.softmax(-1) @ split(v)).transpose(1, 2).reshape(2, 5, 12)
    assert rms_ratio(attend(q, k, v, heads=3), want) < 1e-6


def test_group_norm_silu():
    norm = GroupNorm(2, 6, 1e-5, silu=True)
    torch.nn.init.normal_(norm.weight)
    torch.nn.init.normal_(norm.bias)
    x = torch.randn(3, 6, 5, 4)
    g = x.double().view(3, 2, -1)
    y = ((g - g.mean(-1, keepdim=True)) / (g.var(-1, unbiased=False, keepdim=True) + 1e-5).sqrt()).view(3, 6, 5, 4)
    y = y * norm.weight.double()[:, None, None] + norm.bias.double()[:, None, None]
    with torch.no_grad():
        assert rms_ratio(norm(x), y * y.sigmoid()) < 1e-6


def test_resampling_sizes():
    assert Downsample(4, padding=1)(torch.zeros(1, 4, 5, 7)).shape == (1, 4, 3, 4)
    assert Downsample(4, padding=0)(torch.zeros(1, 4, 6, 8)).shape == (1, 4, 3, 4)
    assert Upsample(4)(torch.zeros(1, 4, 3, 4)).shape == (1, 4, 6, 8)
    assert Upsample(4)(torch.zeros(1, 4, 3, 4), (5, 7)).shape == (1, 4, 5, 7)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_downsampling_one_pixel(dtype):
    """Only the kernel's middle sees it: all other weights have a gradient of 0, whatever was in memory before."""
    torch.manual_seed(0)
    layer, x = Downsample(32).to(dtype), torch.randn(2, 32, 1, 1, dtype=dtype, requires_grad=True)
    with torch.no_grad():
        want = layer(x)
    for _ in range(20):
        layer.zero_grad(set_to_none=True)
        for n in (1000, 9216, 18432, 40000):
            torch.full((n,), float("nan"))  # memory that is given back
        y = layer(x)
        y.float().square().sum().backward()
        around = layer.conv.weight.grad.clone()
        around[:, :, 1, 1] = 0
        assert torch.equal(around, torch.zeros_like(around)) and layer.conv.weight.grad.isfinite().all()
    assert rms_ratio(y, want) < (1e-6 if dtype == torch.float32 else 1e-2)


# What a GPU is given without gradients: other forms of the same ------------------------------------------------


@pytest.fixture
def lean(monkeypatch):
    """The forms that a GPU is given, on this CPU (by PyTorch's operators: the kernels have tests of their own)."""
    monkeypatch.setattr(layers, "_lean", lambda x: not torch.is_grad_enabled())
    monkeypatch.delattr(torch, "_addmm_activation")  # the tanh form on a GPU alone: on a CPU it is another function


def inputs(cfg, side=16):
    """(x, t, *condition) of a denoiser."""
    generator = torch.Generator().manual_seed(0)
    r = lambda *shape: torch.randn(shape, generator=generator)  # noqa: E731
    if hasattr(cfg, "joint_attention_dim"):
        return (
            r(2, cfg.in_channels, side, side),
            500.0,
            r(2, 77, cfg.joint_attention_dim),
            r(2, cfg.pooled_projection_dim),
        )
    if not cfg.addition_embed_type:
        return r(2, cfg.in_channels, side, side), 500.0, r(2, 77, cfg.cross_attention_dim)
    pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
    ids = torch.tensor([[64.0, 64, 0, 0, 64, 64], [32, 64, 1, 2, 64, 64]])
    return r(2, cfg.in_channels, side, side), 500.0, r(2, 77, cfg.cross_attention_dim), (r(2, pooled), ids)


@pytest.mark.parametrize("name", ["sd15", "sd21-v", "sdxl", "sd35-medium", "sd35-large-turbo"])
def test_lean_forms_are_the_same_network(name, lean):
    sd = pipeline.load(TINY / name, torch.float32, "cpu")
    given = inputs(sd.net.cfg)
    for model, args in ((sd.net, given), (sd.vae.decoder, (torch.randn(1, sd.vae.cfg.latent_channels, 9, 7),))):
        want = model(*args)
        kept = {k: v.clone() for k, v in model.state_dict().items()}
        with torch.no_grad():
            torch.testing.assert_close(model(*args), want, rtol=1e-4, atol=1e-5)
            layers.join(model)
            torch.testing.assert_close(model(*args), want, rtol=1e-4, atol=1e-5)
        for key, value in model.state_dict().items():
            assert torch.equal(value, kept[key]), f"{key} is another since join()"


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("hooked", [False, True], ids=["", "with a LoRA on conv1"])
def test_shifts_made_beforehand(name, hooked, lean):
    """A row of shifts() in place of the time, for several times at once, and where conv1 must be called as it is."""
    net = pipeline.load(TINY / name, torch.float32, "cpu").net
    x, _, *condition = inputs(net.cfg)
    if hooked:
        for resnet in net.resnets():
            resnet.conv1.register_forward_hook(lambda m, args, out: out * 1.01)
    times = [981.0, 500.0, 3.0]
    added = condition[1] if len(condition) > 1 else None
    with torch.no_grad():
        made = net.shifts(torch.tensor(times), added)
        for t, rows in zip(times, made.chunk(len(times)), strict=True):
            torch.testing.assert_close(net(x, rows, *condition), net(x, t, *condition), rtol=1e-4, atol=1e-5)


def test_join_keeps_what_it_must(lean):
    """Weights with gradients, of other shapes, or with something on their call stay where they are; joined ones follow each
    other, and a weight that was put in another's place is seen."""
    block = pipeline.load(TINY / "sd15", torch.float32, "cpu").net.mid_block.attentions[0].transformer_blocks[0]
    q, k, v = block.attn1.to_q, block.attn1.to_k, block.attn1.to_v
    q.weight.requires_grad_(True)
    before = q.weight.data_ptr()
    layers.join(block)
    assert q.weight.data_ptr() == before
    q.weight.requires_grad_(False)
    layers.join(block)
    size = q.weight.numel() * 4
    assert [w.weight.data_ptr() - q.weight.data_ptr() for w in (q, k, v)] == [0, size, 2 * size]
    x = torch.randn(2, 5, q.in_features)
    with torch.no_grad():
        k.weight.data = torch.randn_like(k.weight)  # as a fused LoRA does
        for got, layer in zip(layers.project((q, k, v), x), (q, k, v), strict=True):
            torch.testing.assert_close(got, torch.nn.functional.linear(x, layer.weight))
