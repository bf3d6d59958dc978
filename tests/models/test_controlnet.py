"""ControlNets against diffusers' outputs and layouts; their beginning at zero; what their config may say."""

import pytest
import torch
from util import TINY, built, golden, manifest, max_error, recipe

from nanodiff import pipeline
from nanodiff.config import UserError
from nanodiff.models import controlnet
from nanodiff.models.controlnet import ControlNetModel, Residuals, guessed

TENSORS, FACTS = golden("control.forward")
LAYOUTS = ["control-sd15", "control-sd21", "control-sdxl", "control-sdxl-small"]


def net_of(facts):
    net = ControlNetModel(ControlNetModel.Config.from_json(facts["config"])).eval()
    net.load_state_dict(recipe(net, facts["tag"]))
    return net


@pytest.mark.parametrize("case", FACTS["args"])
@torch.no_grad()
def test_golden(case):
    facts, data = FACTS["args"][case], {k.split("/")[1]: v for k, v in TENSORS.items() if k.startswith(f"{case}/")}
    net = net_of(facts)
    added = (data["pooled"], data["ids"]) if "pooled" in data else None
    found = net(data["x"], data["t"], data["text"], net.look(data["cond"] / 255), added)
    guess = found if net.cfg.global_pool_conditions else guessed(found)
    seen = 0
    for kind, residuals in (("plain", found), ("guess", guess)):
        names = [*map(str, range(len(residuals.skips))), "mid"]
        for name, got in zip(names, (*residuals.skips, residuals.middle), strict=True):
            if (key := f"{kind}.{name}") in data:
                assert max_error(facts["scale"] * got, data[key]) < 1e-4
                seen += 1
    assert seen >= 5


@torch.no_grad()
def test_the_order_of_colours():
    facts = FACTS["args"]["sd15_0_16x16"]
    picture = torch.rand(1, 3, 32, 32, generator=torch.Generator().manual_seed(0))
    rgb, bgr = (
        net_of(facts | {"config": facts["config"] | {"controlnet_conditioning_channel_order": o}})
        for o in ("rgb", "bgr")
    )
    assert torch.equal(rgb.look(picture), bgr.look(picture.flip(1))) and not torch.equal(
        rgb.look(picture), bgr.look(picture)
    )


@pytest.mark.parametrize("name", LAYOUTS)
def test_manifest(name):
    config, shapes = manifest(f"{name}.controlnet")
    assert built(ControlNetModel, config) == shapes


@torch.no_grad()
def test_a_copy_begins_as_nothing_and_its_way_down_is_the_unets():
    unet = pipeline.load(TINY / "sdxl").net
    torch.manual_seed(0)
    net = controlnet.copy_of(unet, conditioning_embedding_out_channels=(4, 8, 8, 16))
    x, text = torch.randn(2, 4, 8, 12), torch.randn(2, 77, 80)
    added = torch.randn(2, 48), torch.rand(2, 6) * 64
    found = net(x, 500, text, net.look(torch.rand(1, 3, 64, 96)), added)
    assert all(not r.any() for r in (*found.skips, found.middle))
    plain, steered = unet(x, 500, text, added), unet(x, 500, text, added, control=found)
    assert torch.equal(plain, steered)
    own = unet.state_dict()
    assert all(torch.equal(v, own[k]) for k, v in net.state_dict().items() if not k.startswith("controlnet"))
    eye = net.controlnet_cond_embedding
    assert eye.conv_in.weight.any() and not eye.conv_out.weight.any()


@torch.no_grad()
def test_text_kv_and_shifts_are_the_same_as_text_and_time():
    facts = FACTS["args"]["sd15_0_16x16"]
    net, data = net_of(facts), {k.split("/")[1]: v for k, v in TENSORS.items() if k.startswith("sd15_0_16x16/")}
    seen = net.look(data["cond"] / 255)
    plain = net(data["x"], 431, data["text"], seen)
    known = net(data["x"], net.shifts(torch.tensor([431.0])), net.text_kv(data["text"]), seen)
    for a, b in zip((*plain.skips, plain.middle), (*known.skips, known.middle), strict=True):
        assert max_error(b, a) < 1e-5


def test_two_speak_together():
    one = Residuals([torch.ones(1, 2, 3, 3), torch.ones(1, 4, 2, 2)], torch.ones(1, 4, 2, 2))
    both = one + one.map(lambda r: 3 * r)
    assert all((r == 4).all() for r in (*both.skips, both.middle))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"controlnet_conditioning_channel_order": "rbg"}, "'rbg' is none of rgb, bgr"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type: 'UNetMidBlock2DSimpleCrossAttn' is not"),
        ({"class_embed_type": "timestep"}, "class_embed_type = 'timestep'"),
        ({"conditioning_channels": 0}, "conditioning_channels = 0 is out of range"),
        ({"union": True}, "unknown field 'union'"),
    ],
)
def test_configs_that_are_no_controlnet_of_ours(change, says):
    with pytest.raises(UserError, match=says):
        ControlNetModel.Config.from_json(FACTS["args"]["sd15_0_16x16"]["config"] | change)
