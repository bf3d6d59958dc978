"""What a GPU would be given, without one: memory formats, kernels that serve, launches of a step, nothing to wait for."""

import pytest
import torch
from fake_gpu import empty, gpu, network  # noqa: F401  the fixture

from nanodiff.device import memory
from nanodiff.pipeline import single
from nanodiff.weights import loading

SIDES = {"sd15": 64, "sd21": 96, "sdxl": 128}
# Launches of one guided step with what a run makes beforehand (times, the text's keys and values), counted; before there were
# forms for a GPU it was 690 for SD 1.5 and 1,500 for SDXL.
MOST = {"sd15": 450, "sd21": 510, "sdxl": 1100, "sd35-medium": 800}


def step(net, side):
    """(x, t, *condition) of a guided step, as a pipeline prepares it."""
    cfg = net.cfg
    x = empty(2, cfg.in_channels, side, side)
    if hasattr(cfg, "joint_attention_dim"):
        return (
            x,
            torch.full((1,), 500.0, device="cuda"),
            empty(2, 333, cfg.joint_attention_dim),
            empty(2, cfg.pooled_projection_dim),
        )
    added = None
    if cfg.addition_embed_type:
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        added = empty(2, pooled), torch.empty(2, 6, device="cuda")
    kvs = net.text_kv(empty(2, 77, cfg.cross_attention_dim))
    return x, net.shifts(torch.empty(1, device="cuda"), added), kvs, added


@pytest.mark.parametrize("name", ["sd15", "sd21", "sdxl"])
def test_a_step_of_a_unet(name, gpu):  # noqa: F811
    """Every convolution's output is channels last, every kernel serves ("triton" would raise), few launches, no waiting."""
    wrong = []

    def watch(module, args, out):
        if out.dim() == 4 and not out.movedim(1, -1).is_contiguous():
            wrong.append((module, out.stride()))

    with gpu() as before:
        net = network(name, "unet")
        for module in net.modules():
            if isinstance(module, torch.nn.Conv2d | torch.nn.GroupNorm):
                module.register_forward_hook(watch)
        given = step(net, SIDES[name])
        out = net(*given)
    assert out.shape == given[0].shape and not wrong, wrong[:3]
    with gpu() as launches:
        net = network(name, "unet")
        given = step(net, SIDES[name])
        prepared = launches.total
        net(*given)
    assert launches.total - prepared <= MOST[name], launches.found.most_common()
    assert before.total > launches.total, "hooks on a layer's call take the forms away that go past it"
    assert launches.copies == [], "the host would wait for the GPU"


def test_a_step_of_an_mmdit(gpu):  # noqa: F811
    with gpu() as launches:
        net = network("sd35-medium", "transformer")
        given = step(net, 128)
        prepared = launches.total
        net(*given)
    assert launches.total - prepared <= MOST["sd35-medium"], launches.found.most_common()
    assert launches.copies == []


def test_a_number_as_a_time_costs_no_wait(gpu):  # noqa: F811
    for name, part in (("sd15", "unet"), ("sd35-medium", "transformer")):
        with gpu() as launches:
            net = network(name, part)
            x, _, *condition = step(net, 16)
            net(x, 500, *condition)
        assert launches.copies == [], name


def test_decoders_are_channels_last(gpu):  # noqa: F811
    for name in ("sd15", "sdxl", "sd35-medium"):
        with gpu():
            out = network(name, "vae").decoder(empty(1, 16 if name.startswith("sd35") else 4, 64, 64))
        assert out.shape == (1, 3, 512, 512) and out.movedim(1, -1).is_contiguous()


# Wherever weights land ------------------------------------------------------------------------------------------


def last(t):
    return t.is_contiguous(memory_format=torch.channels_last) and t.stride(1) == 1


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_weights_are_allocated_channels_last(device):
    place = loading._allocate([("conv", (8, 4, 3, 3), torch.float32), ("linear", (8, 4), torch.float32)], device)
    assert last(place["conv"]) and place["linear"].is_contiguous()


def test_weights_of_a_single_file_are_placed_channels_last():
    assert last(single.placed(torch.randn(8, 4, 3, 3), "cpu", None))
    assert last(single.placed(torch.randn(8, 4, 3, 3), "cpu", torch.bfloat16))
    assert single.placed(torch.randn(8, 4).t(), "cpu", None).is_contiguous()


class Stream:
    """Stands for a CUDA stream: that there is one."""


def test_weights_that_come_and_go_arrive_channels_last(monkeypatch):
    """`--offload`: from a mapped file (contiguous) and from pinned memory."""
    net = torch.nn.Conv2d(4, 8, 3)
    resident = memory.Resident(net, torch.bfloat16, "cpu")
    resident.stream = Stream()
    assert last(resident._target("weight", net.weight.data))
    pinned = torch.empty
    monkeypatch.setattr(torch, "empty", lambda *a, pin_memory=False, **k: pinned(*a, **k))
    before = net.weight.detach().clone()
    memory._pin({"weight": net.weight, "bias": net.bias})
    assert last(net.weight.data) and torch.equal(net.weight, before) and net.bias.is_contiguous()
