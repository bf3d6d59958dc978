"""FreeU and perturbed-attention guidance: whole runs against diffusers', what they do in closed form, what they refuse."""

import pytest
import torch
from util import PIPELINE, TINY, golden, max_error

from nanodiff import pipeline
from nanodiff.config import UserError
from nanodiff.models.freeu import FreeU, damped
from nanodiff.pipeline import Perturbed

TENSORS, FACTS = golden("guided.pipe")


@pytest.fixture(scope="module")
def models():
    return {name: pipeline.load(TINY / name).with_scheduler("ddim") for name in ("sd15", "sdxl")}


@pytest.mark.parametrize("case", FACTS["args"])
def test_golden(models, case):
    facts = FACTS["args"][case]
    call, (height, width) = facts["call"], facts["call"]["size"]
    result = models[facts["model"]].generate(
        call["prompt"], call.get("negative_prompt"), steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"],
        guidance_rescale=call.get("guidance_rescale", 0.0), height=height, width=width, seeds=[call["seed"]],
        freeu=facts["freeu"] and FreeU(*facts["freeu"]),
        perturbed=Perturbed(call["pag_scale"], tuple(facts["layers"])) if facts["layers"] else None,
    )  # fmt: skip
    assert max_error(result.latents, TENSORS[f"{case}/latents"]) < PIPELINE


def drawn(sd, **more):
    return sd.generate("a", **{"steps": 2, "seeds": [0], "height": 64, "width": 64} | more).latents


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_without_strength_they_are_nothing_and_leave_nothing(models, name):
    sd = models[name]
    plain = drawn(sd)
    assert max_error(drawn(sd, freeu=FreeU(1, 1, 1, 1)), plain) < PIPELINE
    assert torch.equal(drawn(sd, perturbed=Perturbed(0.0)), plain)
    assert not torch.equal(drawn(sd, freeu=FreeU()), plain) and not torch.equal(
        drawn(sd, perturbed=Perturbed(3.0)), plain
    )
    assert torch.equal(drawn(sd), plain)  # and the next run is as before


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_with_times_made_beforehand(models, name, monkeypatch):
    """As on a GPU, where what times add is computed once: also for the perturbed pass, which has half of the rows."""
    sd = models[name]
    plain = drawn(sd, perturbed=Perturbed(2.0), guidance_scale=5.0)

    def shifts(times, added=None):
        times = sorted({float(t) for t in times})
        made = sd.net.shifts(torch.tensor(times), added)
        return dict(zip(times, made.split(len(made) // len(times)), strict=True))

    monkeypatch.setattr(sd, "shifts", shifts, raising=False)
    assert max_error(drawn(sd, perturbed=Perturbed(2.0), guidance_scale=5.0), plain) < PIPELINE


def test_the_lowest_frequencies_are_damped():
    """A constant goes down by the factor; what changes from pixel to pixel stays."""
    flat, checks = torch.ones(1, 1, 8, 8), (-1.0) ** (torch.arange(8)[:, None] + torch.arange(8))[None, None]
    assert max_error(damped(flat + checks, 0.25), 0.25 * flat + checks) < 1e-6
    assert damped(torch.randn(1, 2, 5, 7), 1.0).shape == (1, 2, 5, 7)
    assert damped(flat.bfloat16(), 0.5).dtype == torch.bfloat16


@pytest.mark.parametrize(
    ("more", "says"),
    [
        (
            {"perturbed": Perturbed(1.0, ("nowhere",))},
            "no self-attention's name has 'nowhere' in it; they are down_blocks",
        ),
        ({"perturbed": Perturbed(1.0, ("mid", ""))}, "no self-attention's name has ''"),
        ({"perturbed": Perturbed(1.0, ("(mid",))}, r"'\(mid' is no pattern"),
        ({"perturbed": Perturbed(1.0), "syntax": True}, "AND in a prompt is not for"),
    ],
)
def test_refusals(models, more, says):
    with pytest.raises(UserError, match=says):
        models["sd15"].generate("a AND b", steps=1, seeds=[0], height=64, width=64, **more)


@pytest.mark.parametrize("more", [{"perturbed": Perturbed(1.0)}, {"freeu": FreeU()}])
def test_transformers_have_neither(more):
    with pytest.raises(UserError, match="is for UNets"):
        drawn(pipeline.load(TINY / "sd35-medium"), **more)
