"""ControlNets of SD 3: whole runs against diffusers', from a folder and on the command line; what does not fit."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from util import PIPELINE, TINY, error_line, golden, max_error, recipe, run

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.models.control_mmdit import Config, Residuals, SD3ControlNetModel
from nanodiff.models.controlnet import ControlNetModel
from nanodiff.pipeline import control
from nanodiff.pipeline.control import Control

TENSORS, FACTS = golden("control3.pipe")


def net_of(model, kind):
    net = SD3ControlNetModel(Config.from_json(FACTS["configs"][f"{model}-{kind}"])).eval()
    net.load_state_dict(recipe(net, f"control3-{model}-{kind}"))
    return net.requires_grad_(False)


@pytest.fixture(scope="module")
def models():
    return {name: pipeline.load(TINY / name) for name in ("sd35-medium", "sd35-large-turbo", "sd15")}


@pytest.mark.parametrize("case", FACTS["args"])
def test_golden(models, case):
    facts = FACTS["args"][case]
    call, (height, width) = facts["call"], facts["size"]
    controls = tuple(
        Control(net_of(facts["model"], kind), TENSORS[f"{case}/picture{i}"].permute(2, 0, 1)[None] / 255, *how)
        for i, (kind, *how, _) in enumerate(facts["nets"])
    )
    result = models[facts["model"]].generate(
        call["prompt"], call["negative_prompt"], steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"],
        seeds=facts["seed"], height=height, width=width, controls=controls,
    )  # fmt: skip
    assert max_error(result.latents, TENSORS[f"{case}/latents"]) < PIPELINE


def test_residuals_of_different_lengths_add_up():
    one, two = (Residuals([[torch.full((1,), float(i)) for i in range(n)]]) for n in (2, 3))
    both = (one + two).map(lambda x: 10 * x)
    assert [one.behind(i, 5).item() for i in range(5)] == [0.0, 0.0, 0.0, 1.0, 1.0]
    assert [both.behind(i, 6).item() for i in range(6)] == [0.0, 0.0, 10.0, 20.0, 30.0, 30.0]


def test_folder_and_command_line(models, tmp_path):
    net = net_of("sd35-medium", "joint")
    weights.save(net, tmp_path / "net")
    loaded = control.load(tmp_path / "net", models["sd35-medium"].net.cfg, torch.float32, "cpu")
    assert isinstance(loaded, SD3ControlNetModel) and all(
        torch.equal(v, net.state_dict()[k]) for k, v in loaded.state_dict().items()
    )
    Image.fromarray(TENSORS["joint/picture0"].numpy()).save(tmp_path / "p.png")
    argv = (
        "--model",
        TINY / "sd35-medium",
        "--control",
        f"{tmp_path / 'net'}:0.7",
        "--control-image",
        tmp_path / "p.png",
        "--prompt",
        "x",
        "--steps",
        "2",
        "--seed",
        "0",
        "--height",
        "64",
        "--width",
        "64",
    )
    done = run("sample.py", *argv, "--output-dir", tmp_path / "a")
    assert done.returncode == 0, done.stderr
    want = models["sd35-medium"].generate("x", steps=2, seeds=[0], height=64, width=64,
                                          controls=(Control(net, TENSORS["joint/picture0"].permute(2, 0, 1)[None] / 255, 0.7),))  # fmt: skip
    made = np.array(Image.open(tmp_path / "a" / "00000.png")).astype(int)
    assert np.abs(np.array(want.images[0]) - made).max() <= 1
    dry = run("sample.py", *argv, "--dry-run")
    assert dry.returncode == 0 and "control 1" in dry.stdout, dry.stderr
    assert "no guess mode" in error_line(run("sample.py", *argv, "--control-guess", "--output-dir", tmp_path / "b"))


def test_found_edges_have_the_cards_range(models):
    """Those for SD 3.5 large want edges as the model card makes them; a prepared picture is taken as it is."""
    net, picture = net_of("sd35-large-turbo", "image"), torch.zeros(1, 3, 64, 64)
    picture[..., 16:48] = 1
    plain, found = (
        models["sd35-large-turbo"]
        .generate("x", steps=1, height=64, width=64, controls=(Control(net, picture, edges=e),))
        .latents
        for e in (False, True)
    )
    assert max_error(found, plain) > 1e-3


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"extra_conditioning_channels": 1}, "extra_conditioning_channels"),
        ({"pos_embed_type": None}, "pos_embed_type"),
        ({"pos_embed_max_size": None}, "pos_embed_max_size"),
        ({"qk_norm": "layer_norm"}, "qk_norm"),
    ],
)
def test_refused_configs(change, says):
    with pytest.raises(UserError, match=says):
        Config.from_json(FACTS["configs"]["sd35-medium-joint"] | change)


def test_the_published_layout_for_sd35_large():
    """The fields of Stability's config.json (as diffusers' converter writes them), and what is written is read again."""
    raw = {"_class_name": "SD3ControlNetModel", "attention_head_dim": 64, "caption_projection_dim": 2048, "dual_attention_layers": [], "extra_conditioning_channels": 0,
           "force_zeros_for_pooled_projection": False, "in_channels": 16, "joint_attention_dim": None, "num_attention_heads": 38, "num_layers": 19, "out_channels": 16,
           "patch_size": 2, "pooled_projection_dim": 2048, "pos_embed_max_size": None, "pos_embed_type": None, "qk_norm": None, "sample_size": 128,
           "use_pos_embed": False}  # fmt: skip
    with torch.device("meta"):
        shapes = {k: tuple(v.shape) for k, v in SD3ControlNetModel(Config.from_json(raw)).state_dict().items()}
    assert not any(k.startswith(("pos_embed.", "context_embedder")) for k in shapes) and shapes[
        "pos_embed_input.proj.weight"
    ] == (2432, 16, 2, 2)
    assert (
        shapes["transformer_blocks.18.norm1.linear.weight"] == (6 * 2432, 2432)
        and len([k for k in shapes if k.startswith("controlnet_blocks")]) == 38
    )


def test_a_net_without_a_text_is_written_and_read(models, tmp_path):
    net = net_of("sd35-large-turbo", "image")
    weights.save(net, tmp_path / "net")
    loaded = control.load(tmp_path / "net", models["sd35-large-turbo"].net.cfg, torch.float32, "cpu")
    assert loaded.cfg == net.cfg and loaded.cfg.joint_attention_dim is None


def test_skip_layers_see_the_control_too(models, monkeypatch):
    seen, sd = [], models["sd35-medium"]
    forward = sd.net.forward
    monkeypatch.setattr(
        sd.net,
        "forward",
        lambda *args, control=None, **more: (seen.append(control is not None), forward(*args, control=control, **more))[
            1
        ],
    )
    shown = Control(net_of("sd35-medium", "joint"), torch.zeros(1, 3, 64, 64))
    sd.generate(
        "x", steps=3, height=64, width=64, controls=(shown,), skip_layers=pipeline.SkipLayers((1,), start=0.0, stop=1.0)
    )
    assert len(seen) > 3 and all(seen)


def test_positions_that_are_not_there(models):
    small = FACTS["configs"]["sd35-medium-joint"] | {"pos_embed_max_size": 4}
    net = SD3ControlNetModel(Config.from_json(small)).eval()
    with pytest.raises(UserError, match="at most 64 with this ControlNet"):
        models["sd35-medium"].generate(
            "x", steps=1, height=80, width=64, controls=(Control(net, torch.zeros(1, 3, 80, 64)),)
        )


def test_what_does_not_fit(models, tmp_path):
    net = net_of("sd35-medium", "joint")

    def draw(sd, net, **more):
        shown = Control(net, torch.zeros(1, 3, 64, 64), **more)
        return sd.generate("x", steps=1, height=64, width=64, controls=(shown,))

    with pytest.raises(UserError, match="for SD 3, this model has a UNet"):
        draw(models["sd15"], net)
    wider = FACTS["configs"]["sd35-medium-joint"]
    wider = wider | {
        "num_attention_heads": 2 * wider["num_attention_heads"],
        "caption_projection_dim": 2 * wider["caption_projection_dim"],
    }
    with pytest.raises(UserError, match="not of one model"):
        draw(models["sd35-medium"], SD3ControlNetModel(Config.from_json(wider)))
    with pytest.raises(UserError, match="no guess mode"):
        draw(models["sd35-medium"], net, guess=True)
    other = ControlNetModel(ControlNetModel.Config.of(models["sd15"].net.cfg))
    with pytest.raises(UserError, match="this model has a transformer"):
        draw(models["sd35-medium"], other)
    weights.save_tensors(tmp_path / "one.safetensors", net.state_dict())
    with pytest.raises(UserError, match="come as folders"):
        control.load(tmp_path / "one.safetensors", models["sd35-medium"].net.cfg, torch.float32, "cpu")
    weights.save(net, tmp_path / "net")
    raw = json.loads((tmp_path / "net" / "config.json").read_text())
    (tmp_path / "net" / "config.json").write_text(json.dumps(raw | {"_class_name": "FluxControlNetModel"}))
    with pytest.raises(UserError, match="FluxControlNetModel is no ControlNet"):
        control.load(tmp_path / "net", models["sd35-medium"].net.cfg, torch.float32, "cpu")
