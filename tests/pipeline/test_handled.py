"""What people do to a pipeline in a notebook: save turbos and tokenizers over others, pass texts and pictures of another kind."""

import copy
import json
import pickle
import re
import shutil
import tempfile
from pathlib import Path

import pytest
import torch
from PIL import Image
from util import TINY, rms_ratio, run

import nanodiff
from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.device import onednn
from nanodiff.diffusion import samplers
from nanodiff.models import controlnet
from nanodiff.output import images
from nanodiff.pipeline.control import Control
from nanodiff.pipeline.settings import Churn, Perturbed, SkipLayers

DRAW = {"seeds": [1], "steps": 2, "height": 64, "width": 64, "output_type": "latent"}


@pytest.fixture(scope="module")
def sd():
    return pipeline.load(TINY / "sd15", torch.float32)


def test_a_turbo_stays_one_under_another_name(tmp_path):
    """Its name was all that told, or a scheduler that it has no more."""
    large = pipeline.load(TINY / "sd35-large-turbo", torch.float32)
    large.save(tmp_path / "x")
    assert pipeline.load(tmp_path / "x").settings() == large.settings() == (4, 0.0)
    xl = pipeline.load(TINY / "sdxl-turbo", torch.float32).with_scheduler("ddim")
    xl.save(tmp_path / "y")
    assert pipeline.load(tmp_path / "y").settings() == xl.settings() == (1, 0.0)
    plain = pipeline.load(TINY / "sd15", torch.float32)
    plain.save(tmp_path / "z")
    assert "_sampling" not in json.loads((tmp_path / "z" / "model_index.json").read_text())


def test_saved_over_another_model(tmp_path, capsys):
    """Nothing of the older one is read: its words, its tokenizer.json, its variants."""
    folder = shutil.copytree(TINY / "sd15", tmp_path / "d")
    (folder / "tokenizer" / "added_tokens.json").write_text('{"sks": 1000}')
    (folder / "tokenizer" / "tokenizer.json").write_text("{}")
    old = folder / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(folder / "unet" / "diffusion_pytorch_model.safetensors", old)
    sd = pipeline.load(TINY / "sd15", torch.float32)
    for p in sd.net.parameters():
        p.data = p.data * 1.5
    sd.save(folder)
    assert "is removed, since" in capsys.readouterr().err and not old.exists()
    again = pipeline.load(folder, torch.float32, variant="fp16")
    assert torch.equal(again.generate("a cat", **DRAW).latents, sd.generate("a cat", **DRAW).latents)


def test_what_cannot_be_saved(sd, tmp_path):
    for dtype in (torch.int8, "fp16"):
        with pytest.raises(UserError, match="`dtype`"):
            sd.save(tmp_path / "a", dtype)
    with pytest.raises(UserError, match="metadata n is no text"):
        weights.save_tensors(tmp_path / "x.safetensors", {"a": torch.zeros(1)}, {"n": 3})
    made = lora.Lora("", [lora.Delta("unet", "conv_in", torch.zeros(1, 4, 3, 3), torch.zeros(32, 1, 1, 1), 1.0)], [])
    with pytest.raises(UserError, match="is none of kohya, diffusers, peft"):
        lora.write(tmp_path / "l.safetensors", made, sd.models(), "khoya")
    assert not (tmp_path / "x.safetensors").exists() and not (tmp_path / "l.safetensors").exists()


def test_one_text_is_one_text(sd):
    assert sd.encode("abc").states.shape == sd.encode(["abc"]).states.shape
    text, negative = sd.conditions("abc")
    assert len(text.states) == len(negative.states) == 1
    sd.kept.clear()
    sd.prepare("abc")
    assert {k[0] for k in sd.kept} == {"abc", ""}


def test_a_pattern_may_be_a_text(sd):
    both = [
        sd.generate("a cat", guidance_scale=1.0, perturbed=Perturbed(3.0, layers), **DRAW).latents
        for layers in ("mid", ("mid",))
    ]
    assert torch.equal(*both)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"eta": 1000.0}, "`eta` 1000 must be between"),
        ({"eta": -1.0}, "`eta`"),
        ({"churn": Churn(-1.0)}, "`churn`"),
        ({"churn": Churn("a")}, "`churn`"),
        ({"skip_layers": SkipLayers(0)}, "`skip_layers`"),
        ({"skip_layers": SkipLayers((0,), "a")}, "`skip_layers`"),
        ({"controls": ("x",)}, "expected a Control"),
        ({"pictures": ("x",)}, "expected an ImagePrompt"),
        ({"sampler": samplers.euler}, "`sampler` euler: does not fit"),
    ],
)
def test_settings_out_of_their_range(sd, settings, says):
    with pytest.raises(UserError, match=says):
        sd.generate("a cat", **DRAW | settings)


def test_what_a_controlnet_is_shown(sd):
    net = controlnet.copy_of(sd.net, sd.downscale).requires_grad_(False)
    good = torch.rand(1, 3, 64, 64)
    sd.generate("a cat", controls=(Control(net, good),), **DRAW)
    for bad, says in ((good * 255, "values from"), (good * 2 - 1, "values from"), (good[0], "tensor of floats"), ((good * 255).byte(), "tensor of floats"),
                      (good.numpy(), "tensor of floats")):  # fmt: skip
        with pytest.raises(UserError, match=says):
            sd.generate("a cat", controls=(Control(net, bad),), **DRAW)


def test_a_sampler_of_the_same_space_is_taken(sd):
    assert torch.isfinite(sd.generate("a cat", sampler=samplers.ddim, **DRAW).latents).all()
    with pytest.raises(TypeError, match="did you mean seeds"):
        sd.generate("a cat", seed=1)
    assert {"load", "Pipeline"} <= set(dir(nanodiff))


def test_pictures_for_clip():
    for mode in ("L", "RGBA", "P"):
        assert images.clip_pixels(Image.new(mode, (40, 30)), 16).shape == (3, 16, 16)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["-m", "nanodiff.data", "pack", "assets/emoji/emoji.tar", "{tmp}/p.zip"], "ends in .tar"),
        (["-m", "nanodiff.lora", "convert", "{tmp}/l", "{tmp}/l", "--to", "kohya"], "is what is converted"),
        (["-m", "assets.world.halve", "--model", "{tmp}", "--output-dir", "{tmp}"], "this run writes to"),
        (["-m", "nanodiff.output.charts", "loss", "{tmp}/log", "{tmp}/x.png"], "log:2: "),
        (["benchmarks/bench.py", "--cases", "nope"], "--cases nope: is none of"),
        (["benchmarks/quantization.py", "/nope"], "/nope: no such folder"),
    ],
)
def test_tools_that_said_nothing(tmp_path, argv, says):
    (tmp_path / "log").write_text('{"step": 1, "loss": 1}\n\0{"step"')
    done = run(*(a.format(tmp=tmp_path) for a in argv))
    assert done.returncode == 2 and re.search(says, done.stderr), done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(
    ("name", "fields"),
    [
        ("dpmpp_2s", {"timestep_spacing": "trailing"}),
        ("ddim", {"use_karras_sigmas": True}),
        ("unipc", {"euler_at_final": True}),
        ("heun", {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}),
        (None, {"shift": 3.0}),
    ],
)
def test_a_field_that_does_nothing_to_a_sampler(sd, name, fields):
    with pytest.raises(UserError, match=f"`{next(iter(fields))}` does nothing to {name or 'pndm'}"):
        sd.with_scheduler(name, **fields)
    assert sd.with_scheduler("dpmpp_2m", use_karras_sigmas=True, sigma_min=0.1).schedule.raw["sigma_min"] == 0.1


def test_a_grey_mask_is_black_or_white(sd):
    """As diffusers' pipelines take it."""
    image, half = torch.rand(1, 3, 64, 64) * 2 - 1, (torch.arange(64) < 32).float().expand(1, 1, 64, 64)
    want = sd.generate("a", image=image, mask=half, **DRAW).latents
    assert torch.equal(sd.generate("a", image=image, mask=half * 0.5, **DRAW).latents, want)
    assert torch.equal(sd.generate("a", image=image, mask=half * 0.55 + 0.45, **DRAW).latents, want)


def test_numbers_as_tensors_and_latents_that_are_none(sd):
    want = sd.generate("a", **DRAW).latents
    assert torch.equal(sd.generate("a", **DRAW | {"steps": torch.tensor(2), "height": torch.tensor(64)}).latents, want)
    for bad in ([1, 2], torch.zeros(1, 4, 8, 8).numpy(), torch.zeros(1, 4, 8, 8, dtype=torch.int64)):
        with pytest.raises(UserError, match=r"`latents` .*expected a tensor of floats"):
            sd.generate("a", latents=bad, **DRAW)
    with pytest.raises(UserError, match="`latents` are not finite"):
        sd.generate("a", latents=torch.full((1, 4, 8, 8), torch.nan), **DRAW)


def test_what_was_encoded_goes_when_the_encoder_changes(sd, tmp_path):
    delta = lora.Delta(
        "text_encoder", "text_model.encoder.layers.0.self_attn.q_proj", torch.ones(1, 32), torch.ones(32, 1), 1.0
    )
    found = lora.Lora("x", [delta], [])
    for _ in range(3):
        attached = lora.attach(sd.models(), found)
        sd.generate("a", **DRAW)
        attached.remove()
        sd.generate("a", **DRAW)
        assert len(sd.kept) <= 2  # "a" and "", of one state of the encoder


def test_models_that_cannot_be_copied_say_so():
    away = pipeline.load(TINY / "sd15", offload="sequential")
    for copy_ in (copy.deepcopy, pickle.dumps):
        with pytest.raises(TypeError, match="`offload` sequential cannot be copied"):
            copy_(away.net)
    layer = torch.nn.Linear(8, 8)
    layer.__class__ = onednn.PackedLinear
    assert torch.equal(copy.deepcopy(layer).weight, layer.weight)
    layer.packed = [layer.weight]
    with pytest.raises(TypeError, match="packed for oneDNN cannot be copied"):
        copy.deepcopy(layer)


def test_a_write_behind_pytorchs_back_is_noticed():
    """Of a whole layer that something is derived from, and of one column of all of an encoder's weights."""
    sd = pipeline.load(TINY / "sd15")
    sd.generate("a", **DRAW)
    sd.net.up_blocks[0].upsamplers[0].conv.weight.data.mul_(3)
    for p in sd.text_encoder.parameters():
        p.data[..., -1:].mul_(2)
    got = sd.generate("a", **DRAW).latents
    sd.save(folder := Path(tempfile.mkdtemp()))
    want = pipeline.load(folder).generate("a", **DRAW).latents
    shutil.rmtree(folder)
    assert rms_ratio(got, want) < 1e-5
