"""ControlNets beside the denoiser: whole runs against diffusers', files in every form, what does not fit, by name."""

import dataclasses

import pytest
import torch
from util import PIPELINE, TINY, golden, manifest, max_error, recipe

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.device import memory
from nanodiff.models.controlnet import ControlNetModel
from nanodiff.pipeline import control
from nanodiff.pipeline.control import Control
from nanodiff.weights import original_names

TENSORS, FACTS = golden("control.pipe")
SAMPLERS = {"DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler", "HeunDiscreteScheduler": "heun", None: None}


def net_of(config, tag):
    net = ControlNetModel(ControlNetModel.Config.from_json(config)).eval()
    net.load_state_dict(recipe(net, tag))
    return net


@pytest.fixture(scope="module")
def models():
    return {name: pipeline.load(TINY / name) for name in ("sd15", "sd21-v", "sdxl", "sd35-medium")}


@pytest.fixture(scope="module")
def net():
    facts = FACTS["args"]["sd15_pndm"]
    return net_of(facts["config"], facts["tags"][0])


@pytest.mark.parametrize("case", FACTS["args"])
def test_golden(models, case):
    facts, data = FACTS["args"][case], {k.split("/")[1]: v for k, v in TENSORS.items() if k.startswith(f"{case}/")}
    call, n, (height, width) = facts["call"], len(facts["tags"]), facts["size"]

    def each(name, default):
        value = call.get(name, default)
        return value if isinstance(value, list) else [value] * n

    how = zip(
        each("controlnet_conditioning_scale", 1.0),
        each("control_guidance_start", 0.0),
        each("control_guidance_end", 1.0),
        strict=True,
    )
    controls = tuple(
        Control(net_of(facts["config"], tag), data[f"cond.{i}"].permute(2, 0, 1)[None] / 255, *some, call.get("guess_mode", False))
        for i, (tag, some) in enumerate(zip(facts["tags"], how, strict=True))
    )  # fmt: skip
    start = {}
    if "init" in data:
        start = {"image": data["init"].permute(2, 0, 1)[None] / 127.5 - 1, "strength": call["strength"]}
    if "mask" in data:
        start["mask"] = (data["mask"][None, None] >= 128).float()
    sd = models[facts["model"]].with_scheduler(SAMPLERS[facts["scheduler"]])
    result = sd.generate(
        call["prompt"], call.get("negative_prompt"), steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"],
        height=height, width=width, seeds=call["seed"], controls=controls, **start,
    )  # fmt: skip
    assert max_error(result.latents, data["latents"]) < PIPELINE


def picture(height=64, width=64):
    return torch.rand(1, 3, height, width, generator=torch.Generator().manual_seed(0))


def drawn(sd, *controls, **more):
    settings = {"steps": 2, "seeds": [0], "height": 64, "width": 64, "controls": controls} | more
    return sd.generate("red apple", **settings).latents


def test_a_silent_one_changes_nothing(models, net):
    sd = models["sd15"]
    plain = drawn(sd)
    assert torch.equal(plain, drawn(sd, Control(net, picture(), scale=0.0)))
    assert not torch.equal(plain, drawn(sd, Control(net, picture())))
    assert torch.equal(plain, drawn(sd, Control(net, picture(), start=0.6, end=0.9)))  # no whole step is in it


def test_it_is_not_asked_when_it_is_silent(models, net):
    asked = []
    hook = net.register_forward_hook(lambda *_: asked.append(1))
    try:
        drawn(models["sd15"].with_scheduler("ddim"), Control(net, picture(), end=0.5))
    finally:
        hook.remove()
    assert len(asked) == 1


def test_a_picture_of_a_batch_is_the_picture_alone(models, net):
    shown = torch.cat([picture(), 1 - picture()])
    sd = models["sd15"]
    both = sd.generate(["a", "b"], steps=2, seeds=[0, 1], height=64, width=64, controls=(Control(net, shown),)).latents
    alone = sd.generate("b", steps=2, seeds=[1], height=64, width=64, controls=(Control(net, shown[1:]),)).latents
    assert max_error(both[1:], alone) < PIPELINE


# -- files ---------------------------------------------------------------------------------------------------


def theirs(net, prefix="control_model."):
    return {prefix + original_names.original(k, "controlnet", "", net.cfg)[0]: v for k, v in net.state_dict().items()}


def test_original_names():
    """Those of lllyasviel/ControlNet's files, from the other side."""
    config, shapes = manifest("control-sd15.controlnet")
    cfg = ControlNetModel.Config.from_json(config)
    names = {original_names.original(k, "controlnet", "", cfg)[0]: k for k in shapes}
    assert len(names) == len(shapes) == 340
    hints = ["conv_in", *(f"blocks.{i}" for i in range(6)), "conv_out"]
    assert [names[f"input_hint_block.{2 * i}.weight"] for i in range(8)] == [
        f"controlnet_cond_embedding.{h}.weight" for h in hints
    ]
    assert [names[f"zero_convs.{i}.0.bias"] for i in range(12)] == [
        f"controlnet_down_blocks.{i}.bias" for i in range(12)
    ]
    assert names["middle_block_out.0.weight"] == "controlnet_mid_block.weight"
    assert names["input_blocks.3.0.op.weight"] == "down_blocks.0.downsamplers.0.conv.weight"
    assert names["time_embed.2.bias"] == "time_embedding.linear_2.bias"
    assert names["middle_block.1.proj_in.weight"] == "mid_block.attentions.0.proj_in.weight"


@pytest.mark.parametrize("form", ["folder", "original", "bare", "own names", "pickle"])
def test_every_form_of_file(models, net, tmp_path, form):
    if form == "folder":
        path = tmp_path / "net"
        weights.save(net, path)
    elif form == "pickle":
        path = tmp_path / "net.pth"
        torch.save(theirs(net), path)
    else:
        path = tmp_path / "net.safetensors"
        state = {"original": theirs(net), "bare": theirs(net, ""), "own names": net.state_dict()}[form]
        weights.save_tensors(path, state)
    unet = models["sd15"].net.cfg
    if form == "pickle":
        with pytest.raises(UserError, match="a pickle can run code"):
            control.load(path, unet, torch.float32, "cpu")
    got = control.load(path, unet, torch.float32, "cpu", allow_pickle=True)
    assert got.cfg.conditioning_embedding_out_channels == (4, 8, 8, 16) and not got.training
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in got.state_dict().items())
    planned = control.plan(path, unet, allow_pickle=True)
    assert {k: v.shape for k, v in planned.state_dict().items()} == {k: v.shape for k, v in got.state_dict().items()}


@pytest.mark.parametrize("form", ["original", "own names"])
def test_beside_an_inpainting_unet(models, net, tmp_path, form):
    """Whose nine channels are not the ControlNet's."""
    weights.save_tensors(tmp_path / "net.safetensors", theirs(net) if form == "original" else net.state_dict())
    unet = dataclasses.replace(models["sd15"].net.cfg, in_channels=9)
    for got in (
        control.load(tmp_path / "net.safetensors", unet, torch.float32, "cpu"),
        control.plan(tmp_path / "net.safetensors", unet),
    ):
        assert got.cfg.in_channels == 4


def one(name, value=None):
    return {name: torch.zeros(2, 2) if value is None else value}


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: one("lora_controlnet"), "is a Control-LoRA"),
        (lambda s: one("lllite_unet_input_blocks_4.weight"), "a ControlNet-LLLite"),
        (lambda s: one("body.0.block1.weight"), "a T2I-Adapter"),
        (lambda s: s | one("task_embedding"), "a ControlNet Union"),
        (lambda s: one("transformer_blocks.0.attn.to_q.weight"), r"a ControlNet for SD 3 without"),
        (lambda s: one("model.weight"), "is no ControlNet"),
        (lambda s: s | one("surplus.weight"), "has unknown tensor surplus.weight"),
        (lambda s: {k: v for k, v in s.items() if "zero_convs.3.0.bias" not in k}, "misses tensor control_model.zero_convs.3.0.bias"),
        (lambda s: s | one("control_model.time_embed.0.weight"), r"time_embed.0.weight has shape \[2, 2\].*not of one model"),
    ],
)  # fmt: skip
def test_other_files_are_named(models, net, tmp_path, change, says):
    path = tmp_path / "net.safetensors"
    weights.save_tensors(path, change(theirs(net)))
    with pytest.raises(UserError, match=says):
        control.load(path, models["sd15"].net.cfg, torch.float32, "cpu")


def test_a_folder_of_another_class(models, tmp_path):
    weights.save(models["sd15"].net, tmp_path / "net")
    with pytest.raises(UserError, match="UNet2DConditionModel is no ControlNet"):
        control.load(tmp_path / "net", models["sd15"].net.cfg, torch.float32, "cpu")
    with pytest.raises(UserError, match=r"without config\.json"):
        control.load(tmp_path, models["sd15"].net.cfg, torch.float32, "cpu")


# -- what does not fit ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("sd35-medium", {}, "this model has a transformer"),
        ("sd21-v", {}, "not of one model"),
        ("sdxl", {}, "not of one model"),
        ("sd15", {"picture": picture(64, 32)}, "a picture of 32x64 for one of 64x64"),
        ("sd15", {"start": 0.5, "end": 0.5}, "from 0.5 to 0.5 of the steps"),
        ("sd15", {"end": 1.5}, "from 0 to 1.5"),
        ("sd15", {"picture": picture().expand(2, -1, -1, -1)}, "2 pictures of 3 channels for 1"),
        ("sd15", {"picture": picture()[:, :1]}, "1 pictures of 1 channels for 1"),
    ],
)
def test_refusals(models, net, name, change, says):
    with pytest.raises(UserError, match=says):
        drawn(models[name], dataclasses.replace(Control(net, picture()), **change))


def test_an_eye_for_other_latents_is_refused(models):
    config = FACTS["args"]["sd15_pndm"]["config"] | {"conditioning_embedding_out_channels": [4, 8, 8]}
    with pytest.raises(UserError, match="for pixels a latent 4, the UNet has 8"):
        drawn(models["sd15"], Control(net_of(config, "x"), picture()))


@pytest.mark.parametrize(
    ("text", "want"),
    [
        ("a/b", ("a/b", 1.0, 0.0, 1.0)),
        ("a/b@main:0.8", ("a/b@main", 0.8, 0.0, 1.0)),
        ("x.safetensors:.5:0.1-0.75", ("x.safetensors", 0.5, 0.1, 0.75)),
        (r"C:\nets\x.safetensors:2", (r"C:\nets\x.safetensors", 2.0, 0.0, 1.0)),
        ("x:-1", ("x", -1.0, 0.0, 1.0)),
    ],
)
def test_as_written_on_a_command_line(text, want):
    assert control.parse(text) == want


@pytest.mark.parametrize("text", ["x:strong", "x:1:0.5", "x:1:0-1:2", "x:"])
def test_what_is_no_control(text):
    with pytest.raises(UserError, match="use FILE_OR_ID"):
        control.parse(text)


def test_a_file_with_a_colon_in_its_name(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "x:2").write_text("")
    assert control.parse("x:2")[:2] == ("x:2", 1.0)


@pytest.mark.parametrize("blocks", [False, True])
def test_offloaded(models, net, blocks):
    """The same picture with weights that come and go."""
    sd, want = models["sd15"], drawn(models["sd15"], Control(net, picture()))
    other = net_of(FACTS["args"]["sd15_pndm"]["config"], "control-sd15")
    memory.Resident(other, torch.float32, "cpu", blocks=blocks)
    assert max_error(drawn(sd, Control(other, picture())), want) < PIPELINE


def test_another_type_is_refused(models):
    half = net_of(FACTS["args"]["sd15_pndm"]["config"], "control-sd15").half()
    with pytest.raises(UserError, match=r"in torch\.float16 beside a denoiser in torch\.float32"):
        drawn(models["sd15"], Control(half, picture()))


def test_parts_are_of_all_steps_where_a_run_ends_early(models, net):
    """Heun asks twice a step; with half of the noise left the last call is none of the second half's."""
    asked = []
    hook = net.register_forward_hook(lambda *_: asked.append(1))
    try:
        drawn(
            models["sd15"].with_scheduler("heun"),
            Control(net, picture()),
            steps=6,
            denoising_end=0.5,
            guidance_scale=1.0,
        )
    finally:
        hook.remove()
    calls = []
    hook = models["sd15"].net.register_forward_hook(lambda *_: calls.append(1))
    drawn(models["sd15"].with_scheduler("heun"), steps=6, denoising_end=0.5, guidance_scale=1.0)
    hook.remove()
    assert len(asked) == len(calls) > 3


def test_a_whole_checkpoint_around_it(models, net, tmp_path, capsys):
    """The first releases hold the Stable Diffusion, too."""
    more = {
        "model.diffusion_model.out.2.bias": torch.zeros(4),
        "cond_stage_model.x": torch.zeros(1),
        "first_stage_model.y": torch.zeros(1),
    }
    weights.save_tensors(tmp_path / "whole.safetensors", theirs(net) | more)
    got = control.load(tmp_path / "whole.safetensors", models["sd15"].net.cfg, torch.float32, "cpu")
    assert all(torch.equal(v, net.state_dict()[k]) for k, v in got.state_dict().items())
    assert "of this whole checkpoint the ControlNet alone is taken" in capsys.readouterr().err
    weights.save_tensors(tmp_path / "whole.safetensors", theirs(net) | more | {"junk": torch.zeros(1)})
    with pytest.raises(UserError, match="has unknown tensor junk"):
        control.load(tmp_path / "whole.safetensors", models["sd15"].net.cfg, torch.float32, "cpu")


def test_one_that_attends_at_fewer_places_than_its_unet(tmp_path):
    """SDXL's "small", as a file in diffusers' names."""
    unet = pipeline.load(TINY / "sdxl").net.cfg
    n = len(unet.block_out_channels)
    small = ControlNetModel(dataclasses.replace(
        ControlNetModel.Config.of(unet), down_block_types=("DownBlock2D",) * n, mid_block_type="UNetMidBlock2D",
        conditioning_embedding_out_channels=(4, 8),
    ))  # fmt: skip
    weights.save_tensors(tmp_path / "small.safetensors", {k: v.clone() for k, v in small.state_dict().items()})
    got = control.load(tmp_path / "small.safetensors", unet, torch.float32, "cpu")
    assert got.cfg.down_block_types == ("DownBlock2D",) * n and got.cfg.mid_block_type == "UNetMidBlock2D"


def test_a_key_says_not_how_deep_a_network_is_built(models, net, tmp_path):
    deep = {"down_blocks.0.attentions.0.transformer_blocks.100000000.norm1.weight": torch.zeros(1)}
    weights.save_tensors(tmp_path / "x.safetensors", {k: v.clone() for k, v in net.state_dict().items()} | deep)
    with pytest.raises(UserError, match="misses tensor down_blocks"):
        control.load(tmp_path / "x.safetensors", models["sd15"].net.cfg, torch.float32, "cpu")
