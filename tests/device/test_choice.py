"""Where it computes. Apple's GPUs have no float64, so nothing of that type may be moved or made on a device."""

import importlib

import pytest
import torch
from util import ROOT, TINY, in_process

from nanodiff import pipeline
from nanodiff.diffusion import fewstep
from nanodiff.diffusion.samplers import SAMPLERS
from nanodiff.models.controlnet import Config, ControlNetModel
from nanodiff.pipeline.control import Control


@pytest.fixture
def single(monkeypatch):
    """Where a tensor of doubles goes to a device, or is made there, the test fails, as on an Apple GPU."""

    def on_a_device(args, more):
        named = [*args, *more.values()]
        return any(isinstance(a, torch.device) for a in named), any(
            a in (torch.float32, torch.float16, torch.bfloat16) for a in named if isinstance(a, torch.dtype)
        )

    plain_to = torch.Tensor.to

    def to(self, *args, **more):
        moved, cast = on_a_device(args, more)
        other = next((a for a in args if isinstance(a, torch.Tensor)), None)
        assert not (self.dtype == torch.float64 and moved and not cast) and not (
            other is not None and other.dtype == torch.float64
        ), "doubles on a device"
        return plain_to(self, *args, **more)

    monkeypatch.setattr(torch.Tensor, "to", to)
    for name in ("tensor", "zeros", "ones", "empty", "full", "arange", "linspace", "as_tensor"):
        plain = getattr(torch, name)

        def made(*args, plain=plain, **more):
            out = plain(*args, **more)
            assert not (out.dtype == torch.float64 and isinstance(more.get("device"), torch.device)), (
                "doubles on a device"
            )
            return out

        monkeypatch.setattr(torch, name, made)


@pytest.mark.parametrize("name", SAMPLERS)
def test_pictures_have_no_doubles(single, name):
    sd = pipeline.load(TINY / ("sd35-medium" if name.startswith("flow") else "sd15")).with_scheduler(name)
    sd.generate(
        ["a", "b"], "c", steps=3, height=64, width=64, seeds=[0, 1], image=torch.zeros(1, 3, 64, 64), strength=0.9
    )
    sd.generate("a", steps=2, height=64, width=64)


def test_what_is_added_has_no_doubles(single):
    sd = pipeline.load(TINY / "sdxl")
    net = ControlNetModel(Config.of(sd.net.cfg)).eval()
    sd.generate(
        "a",
        steps=2,
        height=64,
        width=64,
        controls=(Control(net, torch.zeros(1, 3, 64, 64)),),
        perturbed=pipeline.Perturbed(),
        guidance_rescale=0.5,
    )


def begun(script, tmp_path, *argv):
    code, _, err = in_process(importlib.import_module(script), f"{script}.py", *argv, "--output-dir", tmp_path / "out")
    assert code == 0, err


EMOJI = (
    "--data",
    ROOT / "assets" / "emoji" / "emoji.tar",
    "--max-steps",
    "2",
    "--batch-size",
    "2",
    "--max-samples",
    "4",
)


def test_training_has_no_doubles(single, tmp_path):
    begun("train", tmp_path / "a", "vae", *EMOJI, "--preset", "nano")
    begun("train", tmp_path / "b", "diffusion", *EMOJI, "--preset", "nano", "--model", ROOT / "assets" / "nano")


@pytest.mark.parametrize("name", ["ddim", "flow_euler"])
def test_fewer_steps_have_no_doubles(single, name):
    schedule = (
        pipeline.load(TINY / ("sd35-medium" if name.startswith("flow") else "sd15")).with_scheduler(name).schedule
    )
    x, noise, i, net = torch.randn(2, 4, 4, 4), torch.randn(2, 4, 4, 4), torch.tensor([0, 1]), lambda x, t: 0.3 * x
    fewstep.progressive(net, net, schedule, x, noise, i, 4)
    fewstep.consistency(net, net, net, schedule, x, noise, i, 4)
    fewstep.drawn(net, schedule, [noise] * 3, 4, 2)
    fewstep.guidance(net, net, schedule, x, torch.tensor([5.0, 500.0]))
