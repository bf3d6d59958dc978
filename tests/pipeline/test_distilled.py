"""Models made small or quick by others: told their guidance (latent consistency models), without a middle (BK-SDM), with other depths on the way up (SSD-1B)."""

import json
import shutil

import pytest
import torch
from PIL import Image
from util import TINY, error_line, recipe, run

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.models import controlnet
from nanodiff.models.unet import Config, UNet2DConditionModel
from nanodiff.pipeline import control


def distilled(target, base="sd15", kind=None, **fields):
    """A tiny pipeline with another UNet."""
    folder = shutil.copytree(TINY / base, target)
    raw = json.loads((folder / "unet" / "config.json").read_text()) | fields
    model = UNet2DConditionModel(Config.from_json(raw))
    shutil.rmtree(folder / "unet")
    weights.save(model, folder / "unet", state=recipe(model, "distilled"))
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "model_index.json").write_text(json.dumps(index | ({"_class_name": kind} if kind else {})))
    return folder


@pytest.fixture(scope="module")
def told(tmp_path_factory):
    return distilled(
        tmp_path_factory.mktemp("told") / "lcm", kind="LatentConsistencyModelPipeline", time_cond_proj_dim=32
    )


def test_guidance_is_told_and_nothing_is_asked_twice(told):
    sd = pipeline.load(told, torch.float32)
    assert sd.settings() == (4, 8.5)
    rows, net = [], sd.net.forward
    sd.net.forward = lambda x, *args, **more: rows.append(len(x)) or net(x, *args, **more)

    def draw(**more):
        return sd.generate("a cat", seeds=[1], steps=2, height=64, width=64, output_type="latent", **more).latents

    weak, strong = draw(guidance_scale=1.0), draw(guidance_scale=8.5)
    assert set(rows) == {1} and (weak - strong).norm() > 1e-3 * weak.norm()
    assert torch.equal(draw(guidance_scale=8.5, negative_prompt="a dog"), strong)
    assert sd.net.guidance == 1.0  # of the run alone
    rest = pipeline.load(told, torch.float32)
    rest.net.time_embedding.cond_proj.weight.zero_()
    sd = rest
    assert torch.equal(draw(guidance_scale=8.5), draw(guidance_scale=1.0))


def test_sdxl_that_is_told(tmp_path):
    sd = pipeline.load(distilled(tmp_path / "xl", "sdxl", time_cond_proj_dim=32), torch.float32)
    assert sd.is_told and sd.settings() == (4, 8.5)


def test_loras_and_files_of_what_is_told(told, tmp_path):
    """Its one layer more has a name in every form."""
    sd = pipeline.load(told, torch.float32)
    lora.adapt(sd.net, rank=2, component="unet")
    made = lora.trained({"unet": sd.net})
    for form in ("diffusers", "kohya"):
        lora.write(tmp_path / f"{form}.safetensors", made, sd.models(), form)
        fresh = pipeline.load(told, torch.float32)
        lora.fuse(fresh.models(), lora.read(tmp_path / f"{form}.safetensors", fresh.models()))
    pipeline.convert(told, tmp_path / "one.safetensors")
    names = weights.header([tmp_path / "one.safetensors"])
    assert "model.diffusion_model.time_embed.cond_proj.weight" in names


def test_a_teacher_that_is_told_is_refused_before_the_training(told, tmp_path):
    (tmp_path / "d").mkdir()
    for i in range(2):
        Image.new("RGB", (64, 64), (i, 0, 0)).save(tmp_path / "d" / f"{i}.png")
        (tmp_path / "d" / f"{i}.txt").write_text("a")
    argv = [
        "distill.py",
        "few-step",
        "--method",
        "dmd",
        "--data",
        tmp_path / "d",
        "--max-steps",
        1,
        "--batch-size",
        1,
        "--no-evaluate",
    ]
    for student in ([], ["--student", TINY / "sd15"]):
        done = run(*argv, "--model", told, *student, "--output-dir", tmp_path / f"o{len(student)}")
        assert "told its guidance" in error_line(done) and not list(tmp_path.glob("o*/model*/checkpoint*"))


def test_a_controlnet_for_a_model_without_a_middle_has_one(tmp_path):
    sd = pipeline.load(distilled(tmp_path / "m", mid_block_type=None), torch.float32)
    net = controlnet.copy_of(sd.net, sd.downscale)
    weights.save(net, tmp_path / "c")
    again = control.load(str(tmp_path / "c"), sd.net.cfg, torch.float32, "cpu")
    assert again.cfg == net.cfg and len(again.middle()) == 1


def test_a_controlnets_file_beside_an_uneven_model(tmp_path):
    """Its depths are its own."""
    even = pipeline.load(TINY / "sdxl", torch.float32)
    net = controlnet.copy_of(even.net, even.downscale)
    weights.save(net, tmp_path / "c")
    uneven = {
        "transformer_layers_per_block": [1, [2, 1], [1, 2]],
        "reverse_transformer_layers_per_block": [[1, 2, 1], [2, 1, 1], 1],
    }
    sd = pipeline.load(distilled(tmp_path / "m", "sdxl", **uneven), torch.float32)
    again = control.load(str(tmp_path / "c" / "diffusion_pytorch_model.safetensors"), sd.net.cfg, torch.float32, "cpu")
    assert again.cfg.transformer_layers_per_block == even.net.cfg.transformer_layers_per_block
    mine = controlnet.copy_of(sd.net, sd.downscale)
    weights.save(mine, tmp_path / "u")
    again = control.load(str(tmp_path / "u" / "diffusion_pytorch_model.safetensors"), sd.net.cfg, torch.float32, "cpu")
    assert again.cfg.transformer_layers_per_block[1:] == ((2, 1), (1, 2))


def test_what_is_told_its_guidance_on_the_command_line(told, tmp_path):
    draw = [
        "sample.py",
        "--model",
        told,
        "--prompt",
        "a",
        "--height",
        64,
        "--width",
        64,
        "--steps",
        1,
        "--output-dir",
        tmp_path / "o",
    ]
    done = run(*draw, "--negative-prompt", "b", "--guidance-rescale", 0.5)  # the model's own guidance
    assert done.returncode == 0, done.stderr
    assert "told its guidance (time_cond_proj_dim); the negative prompt is not used" in done.stderr
    assert "--guidance-rescale does nothing" in done.stderr
    done = run(
        "train.py",
        "diffusion",
        "--preset",
        "tiny",
        "--data",
        "assets/emoji/emoji.tar",
        "--model",
        told,
        "--output-dir",
        tmp_path / "t",
    )
    assert "told its guidance" in error_line(done)


@pytest.mark.parametrize(
    ("base", "fields"),
    [
        ("sd15", {"mid_block_type": None, "layers_per_block": 1}),
        ("sd15", {"mid_block_type": "UNetMidBlock2D"}),
        (
            "sdxl",
            {
                "transformer_layers_per_block": [1, [2, 1], [1, 2]],
                "reverse_transformer_layers_per_block": [[1, 2, 1], [2, 1, 1], 1],
            },
        ),
    ],
    ids=["no middle", "plain middle", "uneven"],
)
def test_other_shapes_draw_save_and_take_loras(base, fields, tmp_path):
    folder = distilled(tmp_path / "m", base, **fields)
    sd = pipeline.load(folder, torch.float32)
    settings = {"seeds": [1], "steps": 2, "height": 64, "width": 64, "output_type": "latent"}
    before = sd.generate("a cat", **settings).latents
    sd.save(tmp_path / "again")
    again = pipeline.load(tmp_path / "again", torch.float32)
    assert again.net.cfg == sd.net.cfg
    assert (again.generate("a cat", **settings).latents - before).norm() < 1e-5 * before.norm()
    done = run("sample.py", "--model", folder, "--dry-run", "--prompt", "a")
    assert done.returncode == 0, done.stderr
    done = run("train.py", "diffusion", "--preset", "tiny", "--data", "assets/emoji/emoji.tar", "--model", folder, "--lora", "--resolution", 64,
               "--max-steps", 1, "--batch-size", 1, "--max-samples", 4, "--output-dir", tmp_path / "l")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_negative_sizes_from_a_picture():
    """As in diffusers: from a picture either size is enough, and the corner is the positive one's."""
    sd = pipeline.load(TINY / "sdxl", torch.float32)
    some = {"crops_coords_top_left": (3, 5), "negative_original_size": (50, 60)}
    both = some | {"negative_target_size": (70, 80)}
    assert sd.size_ids(1, 64, 72, both)[0].tolist() == [50, 60, 0, 0, 70, 80]
    assert sd.size_ids(1, 64, 72, both, begun=True)[0].tolist() == [50, 60, 3, 5, 70, 80]
    assert sd.size_ids(1, 64, 72, some, begun=True)[0].tolist() == [50, 60, 3, 5, 64, 72]
    said = both | {"negative_crops_coords_top_left": (1, 2)}
    assert all(sd.size_ids(1, 64, 72, said, begun=b)[0].tolist() == [50, 60, 1, 2, 70, 80] for b in (False, True))
    with pytest.raises(UserError, match="together"):
        sd.size_ids(1, 64, 72, some)


@pytest.mark.parametrize("name", ["negative_prompt_2", "negative_prompt_3"])
def test_a_negative_prompt_of_one_encoder(name):
    sd = pipeline.load(TINY / "sd35-medium", torch.float32)
    settings = {
        "seeds": [1],
        "steps": 2,
        "guidance_scale": 4.0,
        "height": 64,
        "width": 64,
        "output_type": "latent",
        name: "a dog",
    }
    alone = sd.generate("a cat", **settings).latents
    assert torch.equal(alone, sd.generate("a cat", negative_prompt="", **settings).latents)
    assert not torch.equal(alone, sd.generate("a cat", **settings | {name: None}).latents)
    if name == "negative_prompt_2":  # zeros stand against SDXL's prompt
        with pytest.raises(UserError, match="`negative_prompt_2` does nothing without `negative_prompt`"):
            pipeline.load(TINY / "sdxl", torch.float32).generate("a cat", **settings)
