"""Inpainting models (9 input channels): whole runs against diffusers', from a folder and a single file, and what they refuse."""

import dataclasses

import numpy as np
import pytest
import torch
from PIL import Image
from util import PIPELINE, TINY, golden, max_error, recipe

from nanodiff import pipeline
from nanodiff.config import UserError, read_json
from nanodiff.models.controlnet import ControlNetModel
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.output import images, repaint
from nanodiff.pipeline import sources
from nanodiff.pipeline.control import Control
from nanodiff.weights import original_names

TENSORS, FACTS = golden("inpaint.pipe")
SAMPLERS = {
    "DDIMScheduler": "ddim",
    "EulerDiscreteScheduler": "euler",
    "EulerAncestralDiscreteScheduler": "euler_a",
    None: None,
}


def inpainting(name):
    """A tiny model with a UNet of 9 input channels and made-up weights."""
    sd = pipeline.load(TINY / name)
    unet = UNet2DConditionModel(dataclasses.replace(sd.net.cfg, in_channels=9)).eval()
    unet.load_state_dict(recipe(unet, f"inpaint-{name}"))
    return type(sd)(unet, sd.vae, sd.encoders, sd.tokenizers, sd.schedule)


@pytest.fixture(scope="module")
def models():
    return {name: inpainting(name) for name in ("sd15", "sd21-v", "sdxl")}


def pil(tensor):
    return Image.fromarray(tensor.numpy())


@pytest.mark.parametrize("case", FACTS["args"])
def test_golden(models, case):
    facts, data = FACTS["args"][case], {k.split("/")[1]: v for k, v in TENSORS.items() if k.startswith(f"{case}/")}
    call, (height, width) = facts["call"], facts["size"]
    picture, mask, box = pil(data["init"]), pil(data["mask"]), None
    if "padding_mask_crop" in call:
        box = repaint.region(mask, width, height, call["padding_mask_crop"])
        picture, mask = (repaint.enlarged(p, box, width, height) for p in (picture, mask))
    more = {}
    if "cond" in data:
        more["controls"] = (Control(control_net(), data["cond"].permute(2, 0, 1)[None] / 255),)
    result = models[facts["model"]].with_scheduler(SAMPLERS[facts["scheduler"]]).generate(
        call["prompt"], call.get("negative_prompt"), steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"],
        height=height, width=width, seeds=call["seed"], strength=call["strength"], image=images.to_pixels(picture)[None],
        mask=torch.from_numpy(np.array(mask) >= 128)[None, None].float(), **more,
    )  # fmt: skip
    if box is None:
        assert max_error(result.latents, data["latents"]) < PIPELINE
    else:
        made = repaint.pasted(images.to_pil(result.pixels)[0], pil(data["init"]), pil(data["mask"]), box)
        assert np.abs(np.array(made).astype(int) - data["image"].numpy()).max() <= 1


def control_net():
    facts = golden("control.pipe")[1]["args"]["sd15_pndm"]
    net = ControlNetModel(ControlNetModel.Config.from_json(facts["config"])).eval()
    net.load_state_dict(recipe(net, facts["tags"][0]))
    return net


def drawn(sd, **more):
    image = torch.linspace(-1, 1, 64).expand(1, 3, 64, 64)
    mask = torch.zeros(1, 1, 64, 64)
    mask[..., 16:40, 8:32] = 1
    return sd.generate(
        "x", steps=2, seeds=[0], height=64, width=64, **{"image": image, "mask": mask, "strength": 1.0} | more
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_saved_and_as_a_single_file(models, tmp_path, name):
    sd = models[name]
    want = drawn(sd).latents
    sd.save(tmp_path / "model")
    assert "Inpaint" in read_json(tmp_path / "model" / "model_index.json")["_class_name"]
    assert max_error(drawn(pipeline.load(tmp_path / "model")).latents, want) < PIPELINE
    path = tmp_path / "model.safetensors"
    original_names.export(sd.models(), {"sd15": "SD 1", "sdxl": "SDXL"}[name], path)
    again = pipeline.load(path, components=tmp_path / "model")
    assert again.inpaints and max_error(drawn(again).latents, want) < PIPELINE


def test_a_single_files_own_channels(models, tmp_path):
    """Without a folder beside it, the number of input channels is the file's."""
    path = tmp_path / "model.safetensors"
    original_names.export(models["sd15"].models(), "SD 1", path)
    src = sources.source(path)
    assert src.config("unet").in_channels == 9


@pytest.mark.parametrize("name", ["stable-diffusion-v1-5/stable-diffusion-inpainting", "stabilityai/stable-diffusion-2-inpainting",
                                  "diffusers/stable-diffusion-xl-1.0-inpainting-0.1"])  # fmt: skip
def test_released_ones_are_known(name):
    src = sources.configs(name)
    assert src.config("unet").in_channels == 9 and src.config("unet").out_channels == 4


@pytest.mark.parametrize("more", [{"mask": None}, {"mask": None, "image": None}])
def test_it_needs_a_mask(models, more):
    with pytest.raises(UserError, match=r"inpainting model.*give `image` and `mask`"):
        drawn(models["sd15"], **more)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_it_is_not_trained(models, name):
    sd = models[name]
    x = torch.zeros(1, 4, 8, 8)
    with pytest.raises(UserError, match="only drawn with"):
        sd.denoise(sd.net, x, torch.tensor([1]), torch.zeros(1, 77, sd.net.cfg.cross_attention_dim), torch.zeros(1, 48))
