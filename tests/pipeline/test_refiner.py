"""SDXL's refiner: whole runs of base and refiner against diffusers', from a folder, a single file and the command line; what it refuses."""

import itertools
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from util import PIPELINE, TINY, error_line, golden, in_process, max_error, recipe, run

import sample
from nanodiff import pipeline
from nanodiff.config import UserError
from nanodiff.diffusion import samplers
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.output import images
from nanodiff.output.record import Record
from nanodiff.pipeline import families, loading
from nanodiff.pipeline.sdxl import Refiner
from nanodiff.stories import models as stories
from nanodiff.weights import original_names

TENSORS, FACTS = golden("refiner.pipe")
SAMPLERS = {None: None, "DDIMScheduler": "ddim", "DPMSolverMultistepScheduler": "dpmpp_2m"}


@pytest.fixture(scope="module")
def base():
    return pipeline.load(TINY / "sdxl")


@pytest.fixture(scope="module")
def refiner(base):
    unet = UNet2DConditionModel(UNet2DConditionModel.Config.from_json(FACTS["config"])).eval()
    unet.load_state_dict(recipe(unet, "refiner"))
    sd = Refiner(unet, base.vae, base.encoders[1], base.tokenizers[1], base.schedule)
    sd.index = {"force_zeros_for_empty_prompt": False}
    return sd


@pytest.fixture(scope="module")
def folder(refiner, tmp_path_factory):
    path = tmp_path_factory.mktemp("refiner")
    refiner.save(path)
    return path


@pytest.mark.parametrize("case", FACTS["args"])
def test_golden(base, refiner, case):
    facts = FACTS["args"][case]
    call, (height, width), sampler = facts["call"], facts["size"], SAMPLERS[facts["scheduler"]]
    common = {"steps": call["num_inference_steps"], "guidance_scale": call["guidance_scale"], "seeds": facts["seed"]}
    common |= {"height": height, "width": width}
    texts = call["prompt"], call.get("negative_prompt")
    last = refiner.with_scheduler(sampler)
    if facts["start"] is None:
        image = TENSORS[f"{case}/image"].float() / 127.5 - 1
        result = last.generate(*texts, image=image, strength=call["strength"], **common)
    else:
        first = base.with_scheduler(sampler).generate(
            *texts, denoising_end=facts["start"], output_type="latent", **common
        )
        assert max_error(first.latents, TENSORS[f"{case}/middle"]) < PIPELINE and first.pixels is None
        result = last.generate(
            *texts, latents=first.images, denoising_start=facts["start"], sizes=facts["sizes"], **common
        )
    assert max_error(result.latents, TENSORS[f"{case}/latents"]) < PIPELINE


def test_base_and_refiner_share_the_steps(base, refiner):
    """Every step is taken once, wherever the refiner takes over."""
    for part in (0.2, 0.31, 0.5, 0.77, 0.9):
        seen = []
        see = lambda i, n, step, seen=seen: seen.append(step.t)  # noqa: E731
        first = base.generate("x", steps=7, denoising_end=part, height=16, width=16, on_step=see, output_type="latent")
        refiner.generate("x", steps=7, latents=first.latents, denoising_start=part, height=16, width=16, on_step=see)
        assert seen == list(dict.fromkeys(seen)) and len(seen) == 7


def test_folder_and_single_file(refiner, folder, tmp_path, monkeypatch):
    index = json.loads((folder / "model_index.json").read_text())
    assert index["_class_name"] == "StableDiffusionXLImg2ImgPipeline" and index["requires_aesthetics_score"] is True
    assert index["text_encoder"] == index["tokenizer"] == [None, None]
    again = pipeline.load(folder)
    kind, configs, schedule = families.KNOWN["SDXL refiner"]
    tiny = {name: json.loads((folder / name / "config.json").read_text()) for name in configs}
    monkeypatch.setitem(families.KNOWN, "SDXL refiner", (kind, tiny, schedule))
    loading.convert(folder, tmp_path / "one.safetensors")
    one = pipeline.load(tmp_path / "one.safetensors", components=folder)
    call = {"latents": torch.ones(1, 4, 8, 8), "denoising_start": 0.5, "steps": 4, "height": 64, "width": 64}
    want = refiner.generate("a cat", **call).latents
    assert isinstance(again, Refiner) and isinstance(one, Refiner)
    assert max_error(again.generate("a cat", **call).latents, want) < 1e-5
    assert max_error(one.generate("a cat", **call).latents, want) < 1e-5
    assert one.index == again.index == {"requires_aesthetics_score": True, "force_zeros_for_empty_prompt": False}
    assert set(original_names.prefixes("SDXL refiner")) == {"unet", "vae", "text_encoder_2"}


def test_told_by_its_shapes():
    names = {"input_blocks.0.0.weight": (384, 4, 3, 3), "label_emb.0.0.weight": (1536, 2560)}
    assert original_names.family_of({f"model.diffusion_model.{k}": v for k, v in names.items()}, "f") == "SDXL refiner"


def test_the_released_one_is_known():
    src = pipeline.sources.configs("stabilityai/stable-diffusion-xl-refiner-1.0")
    plan = pipeline.plan(src, torch.float16, None, None, 1, True, None, True, 256, False)
    sizes = {stage.name: round(stage.parameters / 1e6) for stage in plan}
    assert sizes == {"text_encoder_2": 695, "unet": 2260, "vae": 84}


def test_command_line(folder, tmp_path):
    argv = (
        "--prompt",
        "red apple",
        "--steps",
        "6",
        "--height",
        "64",
        "--width",
        "64",
        "--seed",
        "3",
        "--guidance-scale",
        "5",
    )
    done = run("sample.py", "--model", TINY / "sdxl", "--refiner", folder, *argv, "--output-dir", tmp_path / "a")
    assert done.returncode == 0 and "refiner: " in done.stdout, done.stderr
    plain = run("sample.py", "--model", TINY / "sdxl", *argv, "--output-dir", tmp_path / "b")
    again = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "c")
    assert plain.returncode == again.returncode == 0, again.stderr
    a, b, c = (np.array(Image.open(tmp_path / n / "00000.png")) for n in "abc")
    assert np.array_equal(a, c) and not np.array_equal(a, b)
    base, refiner = pipeline.load(TINY / "sdxl"), pipeline.load(folder)
    common = {"steps": 6, "height": 64, "width": 64, "seeds": [3], "guidance_scale": 5.0}
    middle = base.generate("red apple", denoising_end=0.8, output_type="latent", **common).latents
    want = refiner.generate("red apple", latents=middle, denoising_start=0.8, **common)
    assert np.abs(np.array(images.to_pil(want.pixels)[0]).astype(int) - a).max() <= 1
    dry = run("sample.py", "--model", TINY / "sdxl", "--refiner", folder, "--dry-run")
    assert dry.returncode == 0 and "refiner unet" in dry.stdout and "refiner encoder_2" in dry.stdout, dry.stderr
    own = run(
        "sample.py",
        "--model",
        folder,
        "--init-image",
        tmp_path / "a" / "00000.png",
        "--prompt",
        "x",
        "--steps",
        "10",
        "--output-dir",
        tmp_path / "d",
    )
    assert own.returncode == 0, own.stderr
    assert json.loads((tmp_path / "d" / "run.json").read_text())["config"]["strength"] is None


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--refiner-start", "0.5"], "--refiner-start does nothing without --refiner"),
        (["--refiner", "{folder}", "--hires", "2"], "--refiner is not for"),
        (["--refiner", "{folder}", "--denoising-end", "0.5"], "--refiner is not for"),
        (["--refiner", "{sd15}"], "is no refiner of SDXL, but a SD model"),
        (["--refiner", "{folder}", "--model", "{sd15}"], "goes on where a base model of SDXL stops"),
        (["--refiner", "{folder}", "--steps", "1"], "--refiner-start 0.8 leaves the base model no step of 1"),
        (["--refiner", "{folder}", "--refiner-start", "0.01"], "leaves the base model no step"),
        (
            ["--refiner", "{folder}", "--scheduler", "lcm", "--steps", "2", "--refiner-start", "0.99"],
            "leaves the refiner no step of 2",
        ),
        (["--refiner", "{sd15}", "--dry-run"], "is no refiner of SDXL"),
        (["--refiner", "{folder}", "--model", "{sd15}", "--dry-run"], "goes on where a base model of SDXL stops"),
        (["--model", "{folder}"], "this is a refiner, which goes on with a picture"),
        (["--aesthetic-score", "7"], "--aesthetic-score: this model has no such condition"),
    ],
)
def test_refused(folder, tmp_path, argv, said):
    names = {"folder": folder, "sd15": TINY / "sd15"}
    argv = [a.format(**names) for a in argv]
    model = [] if "--model" in argv else ["--model", TINY / "sdxl"]
    line = error_line(run("sample.py", *model, "--prompt", "x", *argv, "--output-dir", tmp_path / "x"))
    assert any(part in line for part in said.split("|")), line


@pytest.mark.parametrize("own", [{"timestep_spacing": "trailing"}, {"use_karras_sigmas": True}])
def test_the_refiner_counts_the_base_models_steps(folder, tmp_path, own, capsys):
    """Whatever the refiner's own file says of spacing and grid."""
    shutil.copytree(TINY / "sdxl", tmp_path / "base")
    path = tmp_path / "base" / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | own))
    cfg = sample.Config(model=str(tmp_path / "base"), refiner=str(folder), output_dir=str(tmp_path / "x"))
    record = Record(cfg, torch.device("cpu"))
    sd = stories.under(cfg, stories.load(cfg, record, torch.device("cpu")))
    assert "by the base model's sampler (euler) and grid" in capsys.readouterr().out
    assert samplers.sigma_grid(sd.schedule, 10) == samplers.sigma_grid(sd.refiner.schedule, 10)


def test_fresh_noise_is_not_the_base_models(folder, tmp_path, monkeypatch):
    """One generator a picture for both models."""
    drawn, plain = [], torch.randn
    monkeypatch.setattr(torch, "randn", lambda *a, **k: (drawn.append(plain(*a, **k)), drawn[-1])[1])
    code, _, err = in_process(sample, "sample.py", "--model", TINY / "sdxl", "--refiner", folder, "--prompt", "x", "--steps", "6", "--height", "64", "--width", "64",
                              "--scheduler", "euler_a", "--seed", "1", "--output-dir", tmp_path / "a")  # fmt: skip
    assert code == 0, err
    same = [z for z in drawn if z.shape == (1, 4, 8, 8)]
    assert len(same) > 5 and all(not torch.equal(a, b) for a, b in itertools.combinations(same, 2))


def test_refused_by_the_library(base, refiner):
    with pytest.raises(UserError, match="`denoising_start` goes on with `latents`"):
        base.generate("x", denoising_start=0.5, image=torch.zeros(1, 3, 64, 64))
    with pytest.raises(UserError, match="`target_size`: this model has no such condition"):
        refiner.generate("x", latents=torch.zeros(1, 4, 16, 16), denoising_start=0.5, sizes={"target_size": (8, 8)})
    with pytest.raises(UserError, match="no text encoder 2"):
        refiner.generate("x", latents=torch.zeros(1, 4, 16, 16), denoising_start=0.5, prompt_2="y")
