"""sample.py as people type it: files, names, metadata, seeds, and every bad input in one line."""

import dataclasses
import json
import os
import re
import shutil
import signal
import stat
import subprocess
import time

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from util import TINY, copy_model, error_line, golden, recipe, run, start

from nanodiff import files, pipeline, weights
from nanodiff.models.controlnet import ControlNetModel
from nanodiff.output import images
from nanodiff.stories import models
from nanodiff.weights import load_tensors

MODEL = ("--model", str(TINY / "sd15"), "--steps", "2", "--seed", "5")


def sample(out, *argv, model=MODEL):
    return run("sample.py", *model, "--output-dir", out, *argv)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


def test_pictures_record_and_latents(tmp_path):
    done = sample(
        tmp_path, "--prompt", "a cat", "--prompt", "a dog", "--num_images", "2", "--batch-size", "3", "--save-latents"
    )
    assert done.returncode == 0, done.stderr
    assert sorted(p.name for p in tmp_path.glob("*.png")) == [f"{i:05d}.png" for i in range(4)]
    record = json.loads((tmp_path / "run.json").read_text())
    assert [(f["seed"], f["prompt"]) for f in record["files"][:4]] == [
        (5, "a cat"),
        (6, "a cat"),
        (7, "a dog"),
        (8, "a dog"),
    ]
    assert record["config"]["seed"] == 5 and record["results"]["images"] == 4
    assert load_tensors(tmp_path / "latents.safetensors")["latents"].shape == (4, 4, 16, 16)
    assert "unet: " in done.stdout and "scheduler=pndm" in done.stdout  # S3-14


def test_batch_size_does_not_change_the_pictures(tmp_path):
    """S2-37 too: exactly N pictures."""
    for size in (1, 2, 5):
        assert (
            sample(tmp_path / str(size), "--prompt", "a cat", "--num-images", "5", "--batch-size", size).returncode == 0
        )
    for i in range(5):
        a, b, c = (pixels(tmp_path / str(s) / f"{i:05d}.png") for s in (1, 2, 5))
        assert abs(a - b).max() <= 1 and abs(a - c).max() <= 1
    assert len(list((tmp_path / "5").glob("*.png"))) == 5


@pytest.mark.parametrize("spelling", ["--num-inference-steps", "--number_inference_steps", "--num_inference_steps"])
def test_step_spellings(tmp_path, spelling):
    """S3-11"""
    done = run(
        "sample.py", "--model", TINY / "sd15", "--seed", "1", "--prompt", "a", spelling, "1", "--output-dir", tmp_path
    )
    assert "steps=1" in done.stdout, done.stderr


def test_ddim_steps(tmp_path):
    """S2-35"""
    done = run(
        "sample.py",
        "--model",
        TINY / "sd15",
        "--seed",
        "1",
        "--prompt",
        "a",
        "--ddim-steps",
        "3",
        "--output-dir",
        tmp_path,
    )
    assert "scheduler=ddim, steps=3" in done.stdout, done.stderr


def test_sheet_and_individual_pictures(tmp_path):
    """S2-27"""
    done = sample(
        tmp_path, "--prompt", "a", "--num-images", "3", "--nrow", "2", "--output", tmp_path / "sheet.png", "--labels"
    )
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "sheet.png").size == (2 * 132 + 4, 2 * 146 + 4)
    assert len(list((tmp_path / "sheet_individual").glob("image_00?.png"))) == 3


def test_from_image_repeats_exactly(tmp_path):
    sample(
        tmp_path / "a",
        "--prompt",
        'a "cat",\nNegative prompt: no',
        "--negative-prompt",
        "dog",
        "--guidance-scale",
        "4",
        "--scheduler",
        "euler_a",
    )
    first = tmp_path / "a" / "00000.png"
    done = run("sample.py", "--from-image", first, "--output-dir", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(first), pixels(tmp_path / "b" / "00000.png"))
    other = run("sample.py", "--from-image", first, "--seed", "9", "--ddim-steps", "1", "--output-dir", tmp_path / "c")
    assert "scheduler=ddim, steps=1" in other.stdout, other.stderr
    assert other.returncode == 0 and not np.array_equal(pixels(first), pixels(tmp_path / "c" / "00000.png"))


def test_no_metadata_and_resize_and_names(tmp_path):
    """S3-12, S3-13"""
    done = sample(
        tmp_path,
        "--prompt",
        "a cat, on/a mat!",
        "--no-metadata",
        "--resize",
        "274x169",
        "--named",
        "--guidance-scale",
        "7.5",
    )
    assert done.returncode == 0, done.stderr
    (path,) = tmp_path.glob("*.png")
    assert path.name == "a_cat_on_a_mat_sd15_pndm_cfg7_5_steps2_5.png"
    image = Image.open(path)
    assert image.size == (274, 169) and not image.text
    assert "no settings" in error_line(run("sample.py", "--from-image", path, "--output-dir", tmp_path / "x"))


def test_progress_strip(tmp_path):
    """S1-29"""
    assert sample(tmp_path, "--prompt", "a", "--progress-strip", "--steps", "4").returncode == 0
    assert Image.open(tmp_path / "00000_steps.png").width == 5 * 132 + 4  # PNDM: n + 1 calls


def test_image_to_image_and_inpainting(tmp_path):
    Image.new("RGB", (140, 126), "green").save(tmp_path / "in.png")
    mask = Image.new("L", (140, 126), 0)
    mask.paste(255, (0, 0, 64, 128))
    mask.save(tmp_path / "mask.png")
    argv = (
        "--prompt",
        "a",
        "--init-image",
        tmp_path / "in.png",
        "--strength",
        "0.5",
        "--scheduler",
        "ddim",
        "--steps",
        "4",
    )
    assert sample(tmp_path / "a", *argv).returncode == 0
    assert Image.open(tmp_path / "a" / "00000.png").size == (136, 120), "the picture's own size, in steps of 8"
    done = sample(tmp_path / "b", *argv, "--mask", tmp_path / "mask.png")
    assert done.returncode == 0, done.stderr
    b = pixels(tmp_path / "b" / "00000.png")
    assert b.shape == (128, 128, 3), "with a mask: the model's own size"


def control_folder(path):
    """A ControlNet for the tiny sd15 with made-up weights, and a picture to show it."""
    facts = golden("control.pipe")[1]["args"]["sd15_pndm"]
    net = ControlNetModel(ControlNetModel.Config.from_json(facts["config"]))
    net.load_state_dict(recipe(net, facts["tags"][0]))
    weights.save(net, path / "net")
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (6, 5, 3), dtype=np.uint8)).resize((50, 66))
    picture.save(path / "photo.png")
    return path / "net", path / "photo.png"


def test_control(tmp_path):
    """The first picture sets the size; edges are made here; the settings come back out of the picture."""
    net, photo = control_folder(tmp_path)
    shown = ("--prompt", "a cat", "--control-image")
    done = sample(tmp_path / "a", *shown, f"canny:{photo}", "--control", f"{net}:0.7:0-0.9")
    assert done.returncode == 0, done.stderr
    assert f"control: {net}:0.7:0-0.9, " in done.stdout
    a = pixels(tmp_path / "a" / "00000.png")
    assert a.shape == (64, 48, 3)
    plain = sample(tmp_path / "b", *shown, photo, "--control", f"{net}:0.7:0-0.9")
    off = sample(tmp_path / "c", *shown, photo, "--control", f"{net}:0")
    bare = sample(tmp_path / "d", "--prompt", "a cat", "--height", "64", "--width", "48")
    assert plain.returncode == off.returncode == bare.returncode == 0, plain.stderr + off.stderr + bare.stderr
    b, c, d = (pixels(tmp_path / name / "00000.png") for name in "bcd")
    assert (a != b).any() and (b != c).any() and abs(c - d).max() <= 1
    again = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "e")
    assert again.returncode == 0, again.stderr
    assert np.array_equal(pixels(tmp_path / "e" / "00000.png"), a)
    photo.unlink()
    lost = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "f")
    assert f"was made with {photo}; name it with --control-image" in error_line(lost)


def test_two_controls_guess_without_a_prompt_and_are_counted(tmp_path):
    net, photo = control_folder(tmp_path)
    two = ("--control", net, "--control-image", photo, "--control", f"{net}:0.5", "--control-image", f"canny:{photo}")
    done = sample(tmp_path / "a", *two, "--control-guess", "--offload", "model")
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "a" / "00000.png").std() > 0
    plan = sample(tmp_path / "b", *two, "--dry-run", "--prompt", "x")
    bare = sample(tmp_path / "b", "--dry-run", "--prompt", "x")
    larger = sample(tmp_path / "b", "--dry-run", "--prompt", "x", "--hires", "2")
    assert larger.returncode == 0 and larger.stdout != bare.stdout, larger.stderr
    assert plan.returncode == 0 and "control 1" in plan.stdout and "control 2" in plan.stdout, plan.stderr
    peaks = [{k: float(v) for k, v in re.findall(r"--offload (\w+): +([\d.]+)", d.stdout)} for d in (plan, bare)]
    assert peaks[0].keys() == peaks[1].keys() and len(peaks[0]) == 3


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--control", "NET"], "1 --control and 0 --control-image"),
        (["--control-guess"], "--control-guess does nothing without --control"),
        (["--control", "NET:strong", "--control-image", "PHOTO"], "use FILE_OR_ID"),
        (["--control", "NET", "--control-image", "canny:nowhere.png"], "nowhere.png"),
        (["--control", "PHOTO", "--control-image", "PHOTO"], "photo.png"),
        (["--control", "NET:1:0.5-0.2", "--control-image", "PHOTO"], "from 0.5 to 0.2 of the steps"),
        (["--control", "NET", "--control-image", "PHOTO", "--model", "TINY/sdxl"], "they are not of one model"),
        (["--control", "NET", "--control-image", "PHOTO", "--model", "TINY/sd35-medium"], "has a transformer"),
    ],
)
def test_controls_that_cannot_be(tmp_path, argv, says):
    net, photo = control_folder(tmp_path)
    argv = [a.replace("NET", str(net)).replace("PHOTO", str(photo)).replace("TINY", str(TINY)) for a in argv]
    assert says in error_line(sample(tmp_path / "out", "--prompt", "x", *argv))


def test_a_picture_of_another_program_is_repeated(tmp_path):
    info = PngInfo()
    info.add_itxt(
        "parameters",
        "a (cat:1.2)\nNegative prompt: dog\nSteps: 3, Sampler: Euler, CFG scale: 5, Seed: 9, Size: 64x48, Model: sd, ENSD: 31337",
    )
    Image.new("RGB", (4, 4)).save(tmp_path / "theirs.png", pnginfo=info)
    unnamed = run("sample.py", "--from-image", tmp_path / "theirs.png", "--output-dir", tmp_path / "x")
    assert "was made by AUTOMATIC1111 with the model sd; name its file with --model" in error_line(unnamed)
    info = PngInfo()
    info.add_itxt("parameters", "a\nSteps: 3, Sampler: Euler, Seed: 9, Size: 64x48")
    Image.new("RGB", (4, 4)).save(tmp_path / "nameless.png", pnginfo=info)
    assert "it does not say which" in error_line(
        run("sample.py", "--from-image", tmp_path / "nameless.png", "--output-dir", tmp_path / "x")
    )
    done = run(
        "sample.py", "--from-image", tmp_path / "theirs.png", "--model", TINY / "sd15", "--output-dir", tmp_path / "a"
    )
    assert done.returncode == 0 and "not used: ENSD: '31337'; RNG: 'GPU" in done.stderr, done.stderr
    same = run("sample.py", "--model", TINY / "sd15", "--prompt", "a (cat:1.2)", "--negative-prompt", "dog", "--steps", "3", "--scheduler", "euler",
               "--guidance-scale", "5", "--seed", "9", "--width", "64", "--height", "48", "--prompt-syntax", "a1111", "--output-dir", tmp_path / "b")  # fmt: skip
    assert same.returncode == 0, same.stderr
    assert np.array_equal(pixels(tmp_path / "a" / "00000.png"), pixels(tmp_path / "b" / "00000.png"))
    info = PngInfo()
    info.add_text("parameters", "hello")
    Image.new("RGB", (4, 4)).save(tmp_path / "no.png", pnginfo=info)
    assert "carries no settings of ours" in error_line(
        run("sample.py", "--from-image", tmp_path / "no.png", "--output-dir", tmp_path / "c")
    )


@pytest.mark.parametrize(
    "argv",
    [["--lora", "nowhere.safetensors"], ["--perturbed-scale", "2", "--perturbed-layers", "nowhere"], ["--eta", "0.5"], ["--height", "12"],
     ["--freeu", "1,2"], ["--freeu", "1,2,nan,1"], ["--sigmas", "ays"], ["--s-churn", "5"], ["--s-noise", "1.1"], ["--clip-skip", "9"],
     ["--prompt", "a AND b", "--prompt-syntax", "a1111", "--guidance-scale", "1"]],
)  # fmt: skip
def test_what_cannot_be_drawn_deletes_nothing(tmp_path, argv):
    """--overwrite makes room when drawing begins, not before."""
    done = sample(tmp_path, "--prompt", "a cat")
    assert done.returncode == 0, done.stderr
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()}
    assert error_line(sample(tmp_path, "--prompt", "a dog", "--overwrite", *argv))
    assert error_line(sample(tmp_path, "--prompt", "a dog", *argv))
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir() if p.is_file()} == before


def test_a_study_that_cannot_be_drawn_anew_is_kept(tmp_path):
    study = ("--prompt", "a cat", "--study", "steps=1,2")
    assert sample(tmp_path, *study).returncode == 0
    before = {
        p.name: p.read_bytes()
        for p in tmp_path.iterdir()
        if p.suffix in (".png", ".json", ".csv") and p.name != "run.json"
    }
    assert error_line(sample(tmp_path, "--prompt", "a cat", "--study", "height=100", "--overwrite"))
    assert {name: (tmp_path / name).read_bytes() for name in before} == before
    assert sample(tmp_path, "--prompt", "a dog", "--study", "steps=1", "--overwrite").returncode == 0
    assert sorted(p.name for p in tmp_path.glob("0*.png")) == ["00000.png"]
    assert (tmp_path / "00000.png").read_bytes() != before["00000.png"]


def test_timestep_spacing(tmp_path):
    """diffusers' field; it comes back out of the picture, and a flow has none."""
    argv = ("--prompt", "a cat", "--scheduler", "euler", "--steps", "3", "--seed", "1")
    drawn = {}
    for spacing in ("linspace", "trailing", "leading"):
        assert (
            sample(
                tmp_path / spacing, *argv, "--timestep-spacing", spacing, model=("--model", TINY / "sdxl")
            ).returncode
            == 0
        )
        drawn[spacing] = pixels(tmp_path / spacing / "00000.png")
    assert not np.array_equal(drawn["linspace"], drawn["trailing"])
    plain = sample(tmp_path / "plain", *argv, model=("--model", TINY / "sdxl"))
    assert plain.returncode == 0 and np.array_equal(pixels(tmp_path / "plain" / "00000.png"), drawn["leading"])
    again = run("sample.py", "--from-image", tmp_path / "trailing" / "00000.png", "--output-dir", tmp_path / "again")
    assert again.returncode == 0 and np.array_equal(pixels(tmp_path / "again" / "00000.png"), drawn["trailing"])
    plain = pipeline.load(TINY / "sdxl").with_scheduler("euler", timestep_spacing="trailing")
    assert not plain.turbo and plain.settings(None, None)[0] > 10, "spacing makes no turbo of a model"
    turbo = pipeline.load(TINY / "sdxl-turbo").with_scheduler("euler", timestep_spacing="linspace")
    assert turbo.turbo and turbo.with_scheduler("ddim").turbo
    idle = sample(tmp_path / "idle", *argv, "--sigmas", "sgm_uniform", "--timestep-spacing", "leading")
    assert "--timestep-spacing does nothing to euler with --sigmas sgm_uniform" in error_line(idle)
    flow = sample(
        tmp_path / "flow", "--prompt", "a", "--timestep-spacing", "linspace", model=("--model", TINY / "sd35-medium")
    )
    assert "--timestep-spacing is for models of a noise schedule" in error_line(flow)


def test_what_a_picture_of_the_web_ui_chose_is_chosen(tmp_path):
    """Braces and wildcards were resolved before it wrote its text: here they are plain."""
    info = PngInfo()
    info.add_itxt(
        "parameters", "{a|b} snake_case__name__\nSteps: 2, Sampler: Euler, CFG scale: 5, Seed: 9, Size: 64x48, RNG: CPU"
    )
    Image.new("RGB", (4, 4)).save(tmp_path / "theirs.png", pnginfo=info)
    done = run(
        "sample.py", "--from-image", tmp_path / "theirs.png", "--model", TINY / "sd15", "--output-dir", tmp_path / "a"
    )
    assert done.returncode == 0, done.stderr
    assert images.read_record(tmp_path / "a" / "00000.png")["prompt"] == "{a|b} snake_case__name__"
    typed = ("--prompt", "{cat|cat}", "--negative-prompt", "{dog|dog}")
    done = run(
        "sample.py",
        "--from-image",
        tmp_path / "theirs.png",
        "--model",
        TINY / "sd15",
        *typed,
        "--output-dir",
        tmp_path / "b",
    )
    assert done.returncode == 0, done.stderr
    record = images.read_record(tmp_path / "b" / "00000.png")
    assert (record["prompt"], record["negative_prompt"]) == ("cat", "dog"), "what is typed is chosen from"


def test_churn(tmp_path):
    """Euler's extra noise changes the picture, only where its sigmas are, and comes back out of the picture."""
    argv = ("--prompt", "a cat", "--scheduler", "euler", "--seed", "3")
    for name, more in (
        ("plain", ()),
        ("churned", ("--s-churn", "8", "--s-noise", "1.01")),
        ("nowhere", ("--s-churn", "8", "--s-tmin", "1e6")),
    ):
        done = sample(tmp_path / name, *argv, *more)
        assert done.returncode == 0, done.stderr
    again = run("sample.py", "--from-image", tmp_path / "churned" / "00000.png", "--output-dir", tmp_path / "again")
    assert again.returncode == 0, again.stderr
    plain, churned, nowhere, repeated = (
        pixels(tmp_path / name / "00000.png") for name in ("plain", "churned", "nowhere", "again")
    )
    assert np.array_equal(plain, nowhere) and np.array_equal(churned, repeated) and not np.array_equal(plain, churned)


def test_churn_at_no_step_is_said(tmp_path):
    for low, idle in (("50", True), ("1", False)):
        done = sample(
            tmp_path / low, "--prompt", "a", "--scheduler", "euler", "--steps", "2", "--s-churn", "5", "--s-tmin", low
        )
        assert (
            done.returncode == 0 and ("churn (--s-churn) at σ from 50 to inf: does nothing" in done.stderr) == idle
        ), done.stderr


def test_prompts_of_a_table(tmp_path):
    (tmp_path / "prompts.csv").write_text('number,prompt\n1,"a cat, ink"\n2,a dog\n')
    done = sample(tmp_path / "a", "--prompts-file", tmp_path / "prompts.csv", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert [f["prompt"] for f in json.loads((tmp_path / "a" / "run.json").read_text())["files"]] == [
        "a cat, ink",
        "a dog",
    ]


def test_many_prompts_are_encoded_before(tmp_path):
    """More than are encoded at a time, with a negative prompt, offloaded."""
    (tmp_path / "prompts.txt").write_text("\n".join(f"cat {i}" for i in range(33)))
    done = sample(tmp_path / "a", "--prompts-file", tmp_path / "prompts.txt", "--negative-prompt", "blue", "--offload", "model", "--steps", "1",
                  "--height", "16", "--width", "16", "--batch-size", "33")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_drawn_again_larger(tmp_path):
    """The second pass is image-to-image over the first picture, from the same seed; settings come back out of the picture."""
    plain = sample(tmp_path / "a", "--prompt", "a cat", "--height", "64", "--width", "48")
    twice = sample(
        tmp_path / "b",
        "--prompt",
        "a cat",
        "--height",
        "64",
        "--width",
        "48",
        "--hires",
        "1.5x",
        "--hires-strength",
        "0.5",
    )
    byhand = sample(tmp_path / "c", "--prompt", "a cat", "--height", "96", "--width", "72", "--init-image", tmp_path / "a" / "00000.png",
                    "--strength", "0.5")  # fmt: skip
    assert plain.returncode == twice.returncode == byhand.returncode == 0, plain.stderr + twice.stderr + byhand.stderr
    b = pixels(tmp_path / "b" / "00000.png")
    assert b.shape == (96, 72, 3) and np.array_equal(b, pixels(tmp_path / "c" / "00000.png"))
    # what an option needs may come from the picture
    other = run(
        "sample.py", "--from-image", tmp_path / "b" / "00000.png", "--hires-steps", "2", "--output-dir", tmp_path / "d2"
    )
    assert other.returncode == 0 and (tmp_path / "d2" / "00000.png").exists(), other.stderr
    again = run("sample.py", "--from-image", tmp_path / "b" / "00000.png", "--output-dir", tmp_path / "d")
    assert again.returncode == 0 and np.array_equal(pixels(tmp_path / "d" / "00000.png"), b), again.stderr
    # what changes on the way has changed when the second pass begins
    changing = (
        "--prompt",
        "[a cat:a dog:0.5]",
        "--prompt-syntax",
        "a1111",
        "--height",
        "64",
        "--width",
        "48",
        "--steps",
        "4",
    )
    hires = sample(tmp_path / "f", *changing, "--hires", "1.5", "--hires-strength", "0.5")
    first = sample(tmp_path / "g", *changing)
    second = sample(tmp_path / "h", "--prompt", "a dog", "--prompt-syntax", "a1111", "--height", "96", "--width", "72", "--steps", "4",
                    "--init-image", tmp_path / "g" / "00000.png", "--strength", "0.5")  # fmt: skip
    assert hires.returncode == first.returncode == second.returncode == 0, hires.stderr + first.stderr + second.stderr
    assert np.array_equal(pixels(tmp_path / "f" / "00000.png"), pixels(tmp_path / "h" / "00000.png"))
    latent = sample(tmp_path / "e", "--prompt", "a cat", "--height", "64", "--width", "48", "--hires", "1.5", "--hires-strength", "0.5",
                    "--hires-latent", "--hires-steps", "4")  # fmt: skip
    assert latent.returncode == 0, latent.stderr
    e = pixels(tmp_path / "e" / "00000.png")
    assert e.shape == b.shape and (e != b).any()


def test_hires_with_a_controlnet(tmp_path):
    net, photo = control_folder(tmp_path)
    done = sample(tmp_path / "a", "--prompt", "a cat", "--control", net, "--control-image", photo, "--hires", "2")
    assert done.returncode == 0, done.stderr
    assert pixels(tmp_path / "a" / "00000.png").shape == (128, 96, 3)
    assert "--hires is not for --mask" in error_line(
        sample(tmp_path / "b", "--prompt", "x", "--hires", "2", "--init-image", photo, "--mask", photo)
    )
    assert "--hires-steps does nothing without --hires" in error_line(
        sample(tmp_path / "c", "--prompt", "x", "--hires-steps", "2")
    )


def test_an_inpainting_model_and_only_the_masked_part(tmp_path):
    sd = pipeline.load(TINY / "sd15")
    unet = type(sd.net)(dataclasses.replace(sd.net.cfg, in_channels=9))
    unet.load_state_dict(recipe(unet, "inpaint-sd15"))
    type(sd)(unet, sd.vae, sd.encoders, sd.tokenizers, sd.schedule).save(tmp_path / "model")
    picture = np.random.default_rng(0).integers(0, 256, (90, 120, 3), dtype=np.uint8)
    Image.fromarray(picture).save(tmp_path / "in.png")
    mask = np.zeros((90, 120), np.uint8)
    mask[20:50, 30:60] = 255
    Image.fromarray(mask).save(tmp_path / "mask.png")
    given = (
        "--prompt",
        "a cat",
        "--init-image",
        tmp_path / "in.png",
        "--mask",
        tmp_path / "mask.png",
        "--height",
        "64",
        "--width",
        "64",
    )
    model = ("--model", tmp_path / "model", "--steps", "2", "--seed", "5")
    for name, more in (
        ("a", ("--mask-padding", "8")),
        ("b", ("--mask-padding", "8", "--mask-blur", "3")),
        ("c", ("--mask-blur", "2")),
    ):
        done = sample(tmp_path / name, *given, *more, model=model)
        assert done.returncode == 0, done.stderr
    a, b, c = (pixels(tmp_path / name / "00000.png") for name in "abc")
    assert a.shape == b.shape == (90, 120, 3) and c.shape == (64, 64, 3)
    assert np.array_equal(a[mask == 0], picture[mask == 0]) and (a[mask > 0] != picture[mask > 0]).any()
    soft = (b != picture).any(-1) & (mask == 0)
    assert soft.any() and not soft[:10].any()  # beyond the mask, but not far
    for name in ("--mask-padding", "--mask-blur"):
        assert f"{name} does nothing without --mask" in error_line(
            sample(tmp_path / "d", "--prompt", "x", name, "0" if "pad" in name else "3")
        )
    assert "inpainting model" in error_line(sample(tmp_path / "e", "--prompt", "x", model=model))


LORAS = TINY.parent / "lora"


def test_prompts_as_other_programs_write_them(tmp_path):
    """A tag is --lora, and only for its own prompt; a choice is the seed's; what was chosen is remembered and repeats."""
    syntax = ("--prompt-syntax", "a1111", "--lora-dir", LORAS)
    done = sample(
        tmp_path / "a", *syntax, "--prompt", "a {cat|cat} <lora:sd15.kohya:0.7>", "--prompt", "a [cat:cat:0.5]"
    )
    assert done.returncode == 0, done.stderr
    plain = sample(tmp_path / "b", "--prompt", "a cat", "--lora", f"{LORAS / 'sd15.kohya.safetensors'}:0.7")
    bare = sample(tmp_path / "c", "--prompt", "a cat", "--num-images", "2")
    assert plain.returncode == bare.returncode == 0, plain.stderr + bare.stderr
    tagged, untagged = (pixels(tmp_path / "a" / f"0000{i}.png") for i in range(2))
    assert abs(tagged - pixels(tmp_path / "b" / "00000.png")).max() <= 1
    assert abs(untagged - pixels(tmp_path / "c" / "00001.png")).max() <= 1
    assert (tagged != pixels(tmp_path / "c" / "00000.png")).any()
    again = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "d")
    assert again.returncode == 0, again.stderr
    assert np.array_equal(pixels(tmp_path / "d" / "00000.png"), tagged)


def test_wildcards_are_drawn_by_seed(tmp_path):
    (tmp_path / "words").mkdir()
    (tmp_path / "words" / "colour.txt").write_text("\n".join(f"colour{i}" for i in range(50)))
    more = (
        "--prompt-syntax",
        "a1111",
        "--wildcards",
        tmp_path / "words",
        "--prompt",
        "a __colour__ cup",
        "--num-images",
        "3",
        "--txt",
    )
    found = []
    for name in "ab":
        done = sample(tmp_path / name, *more, "--negative-prompt", "{red|blue}", "--offload", "model")
        assert done.returncode == 0, done.stderr
        found.append(
            [f["prompt"] for f in json.loads((tmp_path / name / "run.json").read_text())["files"] if "prompt" in f]
        )
    assert found[0] == found[1] and len(set(found[0])) == 3 and all(p.startswith("a colour") for p in found[0])
    assert (tmp_path / "a" / "00000.txt").read_text().startswith(found[0][0])


def test_marks_without_the_flag_are_said(tmp_path):
    done = sample(tmp_path, "--prompt", "a (cat:1.2) <lora:x:1>", "--prompt", "a cat")
    lines = [line for line in done.stderr.splitlines() if "plain words" in line]
    assert done.returncode == 0 and len(lines) == 1 and "a LoRA's tag, a weight (a:1.2)" in lines[0], done.stderr


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--prompt", "<lora:nobody:1>", "--prompt-syntax", "a1111", "--lora-dir", str(LORAS)], "has no LoRA nobody"),
        (["--prompt", "<lora:nobody:1>", "--prompt-syntax", "a1111"], "needs --lora-dir"),
        (["--prompt", "x", "--allow-partial"], "--allow-partial does nothing without --lora or --lora-dir"),
        (
            ["--prompt", "x", "--negative-prompt", "<lora:a:1>", "--prompt-syntax", "a1111"],
            "<lora:a:1> in a negative prompt",
        ),
        (
            ["--prompt", "x", "--prompt-2", "y", "--prompt-syntax", "a1111"],
            "--prompt-2 is not for --prompt-syntax a1111",
        ),
        (
            ["--prompt", "x", "--hires", "1.5", "--hires-strength", "0.02"],
            "--hires-strength 0.02 of 2 steps leaves none",
        ),
        (["--prompt", "x", "--study", "hires=0.01,2"], "--hires 0.01 must be between 1 and 8"),
        (["--prompt", "x", "--lora-dir", str(LORAS)], "--lora-dir does nothing without --prompt-syntax a1111"),
        (["--prompt", "x", "--wildcards", ".", "--prompt-syntax", "comfyui"], "--wildcards does nothing without"),
        (["--prompt", "__x__", "--prompt-syntax", "a1111"], "needs a folder of wildcards (--wildcards)"),
        (
            ["--prompt", "x", "--prompt-weights", "--prompt-syntax", "a1111"],
            "--prompt-weights is part of --prompt-syntax",
        ),
        (
            ["--prompt", "a AND b", "--prompt-syntax", "a1111", "--guidance-scale", "1"],
            "AND in a prompt needs guidance",
        ),
    ],
)
def test_prompts_that_cannot_be(tmp_path, argv, says):
    assert says in error_line(sample(tmp_path / "out", *argv))


@pytest.mark.slow
def test_compile(tmp_path):
    for name, argv in (("a", ()), ("b", ("--compile",))):
        done = sample(tmp_path / name, "--prompt", "a", *argv)
        assert done.returncode == 0, done.stderr
    assert abs(pixels(tmp_path / "a" / "00000.png") - pixels(tmp_path / "b" / "00000.png")).max() <= 1


def test_turbo_defaults_and_warning(tmp_path):
    """S3-16"""
    done = run(
        "sample.py",
        "--model",
        TINY / "sd-turbo",
        "--seed",
        "1",
        "--prompt",
        "a",
        "--negative-prompt",
        "b",
        "--output-dir",
        tmp_path,
    )
    assert done.returncode == 0 and "steps=1, guidance_scale=0.0" in done.stdout
    assert "negative prompt is not used" in done.stderr


def test_random_seed_is_printed(tmp_path):
    done = run("sample.py", "--model", TINY / "sd15", "--prompt", "a", "--steps", "1", "--output-dir", tmp_path)
    seed = int(next(line for line in done.stdout.splitlines() if line.startswith("seed:")).split()[1])
    record = json.loads((tmp_path / "run.json").read_text())
    assert record["files"][0]["seed"] == record["config"]["seed"] == seed


def test_base_dir(tmp_path):
    """S2-29: of relative paths alone."""
    copy_model("sd15", tmp_path / "m")
    done = run(
        "sample.py", "--base-dir", tmp_path, "--model", "m", "--prompt", "a", "--steps", "1", "--output-dir", "o"
    )
    assert done.returncode == 0 and (tmp_path / "o" / "00000.png").exists(), done.stderr
    argv = [
        "--base-dir",
        tmp_path / "none",
        "--model",
        tmp_path / "m",
        "--prompt",
        "a",
        "--steps",
        1,
        "--output-dir",
        tmp_path / "p",
    ]
    assert run("sample.py", *argv).returncode == 0 and (tmp_path / "p" / "00000.png").exists()


def test_token_is_nowhere(tmp_path):
    done = sample(tmp_path, "--prompt", "a", "--token", "hf_secret")
    assert done.returncode == 0 and "hf_secret" not in done.stdout + done.stderr
    assert not [p for p in tmp_path.rglob("*") if p.is_file() and b"hf_secret" in p.read_bytes()]


@pytest.mark.parametrize("prompt", ["../../x", "\x1b[2J red", "a/b", "-rf", "CON", "é日🙂" * 50])
def test_awkward_prompts(tmp_path, prompt):
    done = sample(tmp_path / "o", f"--prompt={prompt}", "--named", "--steps", "1")
    assert done.returncode == 0, done.stderr
    assert "\x1b" not in done.stdout + done.stderr
    assert sorted(p.name for p in tmp_path.iterdir()) == ["o"]
    (picture,) = (tmp_path / "o").glob("*.png")
    assert len(picture.name.encode()) <= 255


BAD = {
    "no prompt": ([], "--prompt is required"),
    "unknown scheduler": (["--prompt", "a", "--scheduler", "eular"], "is none of ddpm"),
    "unknown flag": (["--prompt", "a", "--guidence-scale", "3"], "did you mean --guidance-scale"),
    "steps 0": (["--prompt", "a", "--steps", "0"], "--steps 0"),
    "steps -1": (["--prompt", "a", "--steps", "-1"], "--steps -1"),
    "steps 5000": (["--prompt", "a", "--steps", "5000"], "--steps 5000"),
    "height 100": (["--prompt", "a", "--height", "100"], "--height 100"),
    "width -8": (["--prompt", "a", "--width", "-8"], "--width"),
    "width 0": (["--prompt", "a", "--width", "0"], "--width"),
    "nrow -2": (["--prompt", "a", "--nrow", "-2", "--output", "x.png"], "--nrow"),
    "nrow alone": (["--prompt", "a", "--nrow", "2"], "--output"),
    "strength alone": (["--prompt", "a", "--strength", "0.5"], "--init-image"),
    "eta for pndm": (["--prompt", "a", "--steps", "1", "--eta", "1"], "--eta is DDIM's"),
    "negative guidance": (["--prompt", "a", "--guidance-scale", "-1"], "--guidance-scale -1"),
    "huge guidance": (["--prompt", "a", "--guidance-scale", "1e9"], "--guidance-scale 1e"),
    "fp16 on a CPU": (["--prompt", "a", "--device", "cpu", "--dtype", "fp16"], "fp16"),
    "strength 0": (["--prompt", "a", "--init-image", "x.png", "--strength", "0"], "--strength 0"),
    "no such picture": (["--prompt", "a", "--init-image", "x.png"], "x.png"),
    "mask alone": (["--prompt", "a", "--mask", "x.png"], "--init-image"),
    "resize": (["--prompt", "a", "--resize", "10by10"], "--resize"),
    "two spellings of steps": (["--prompt", "a", "--ddim-steps", "3", "--steps", "2"], "--ddim-steps"),
    "prompts file": (["--prompts-file", "none.txt"], "none.txt"),
    "flow on sd15": (["--prompt", "a", "--scheduler", "flow_euler"], "not a flow-matching"),
    "config key": (["--prompt", "a", "--config", "c.json"], "unknown key 'step_count'"),
    "sheet nowhere": (["--prompt", "a", "--output", "no/such/folder/x.png"], "--output"),
    "no images": (["--prompt", "a", "--num-images", "0"], "--num-images"),
    "unknown kernels": (["--prompt", "a", "--kernels", "cuda"], "--kernels"),
    "graph on a CPU": (["--prompt", "a", "--device", "cpu", "--cuda-graph"], "--cuda-graph needs a CUDA device"),
    "graph and offload": (["--prompt", "a", "--cuda-graph", "--offload", "model"], "--cuda-graph is not for --offload"),
    "graph and quantize": (
        ["--prompt", "a", "--cuda-graph", "on", "--quantize", "int8"],
        "--cuda-graph is not for --offload or --quantize",
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_input_is_one_line(tmp_path, name):
    argv, says = BAD[name]
    if "--config" in argv:
        (tmp_path / "c.json").write_text('{"step_count": 3}')
        argv = [str(tmp_path / a) if a == "c.json" else a for a in argv]
    assert says in error_line(sample(tmp_path / "o", *argv, model=("--model", str(TINY / "sd15"))))


def test_kernels_say_why_not_or_nothing(tmp_path):
    """One line in auto mode, none with torch, the same picture."""
    said = {}
    for mode in ("auto", "torch"):
        env = {k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"}
        done = run(
            "sample.py",
            *MODEL,
            "--output-dir",
            tmp_path / mode,
            "--prompt",
            "a",
            "--device",
            "cpu",
            "--kernels",
            mode,
            env=env,
        )
        assert done.returncode == 0, done.stderr
        said[mode] = [line for line in done.stderr.splitlines() if line.startswith("kernels:")]
    done = run(
        "sample.py",
        *MODEL,
        "--output-dir",
        tmp_path / "o",
        "--prompt",
        "a",
        "--device",
        "cpu",
        "--kernels",
        "triton",
        env=env,
    )
    assert "kernels: " in error_line(done)
    assert len(said["auto"]) == 1 and "PyTorch's own operators" in said["auto"][0] and said["torch"] == []
    assert (pixels(tmp_path / "auto" / "00000.png") == pixels(tmp_path / "torch" / "00000.png")).all()


def test_large_models_compute_in_bf16_where_the_cpu_does(monkeypatch, capsys):
    """--dtype auto: by the width of the denoiser and the CPU; small models, and other CPUs, stay exact."""
    import torch

    import sample as script
    from nanodiff.device import onednn
    from nanodiff.pipeline import sources

    cpu, cfg = torch.device("cpu"), script.Config()
    large = sources.configs("stable-diffusion-v1-5/stable-diffusion-v1-5")
    flow = sources.configs("stable-diffusion-3.5-medium")
    small = sources.configs(TINY / "sd15")
    monkeypatch.setattr(onednn, "computes_bf16", lambda: True)
    assert models.pick_dtype(cfg, cpu, large) == models.pick_dtype(cfg, cpu, flow) == torch.bfloat16
    assert "--dtype fp32 is exact" in capsys.readouterr().err
    assert models.pick_dtype(cfg, cpu, small) == torch.float32
    assert models.pick_dtype(script.Config(dtype="fp32"), cpu, large) == torch.float32
    monkeypatch.setattr(onednn, "computes_bf16", lambda: False)
    assert models.pick_dtype(cfg, cpu, large) == torch.float32


def test_vae_of_another_model(tmp_path):
    from nanodiff import weights
    from nanodiff.models.vae import AutoencoderKL

    raw = json.loads((TINY / "sd15" / "vae" / "config.json").read_text()) | {"latent_channels": 16}
    weights.save(AutoencoderKL(AutoencoderKL.Config.from_json(raw)), tmp_path / "vae")
    line = error_line(sample(tmp_path / "o", "--prompt", "a", "--vae-checkpoint", tmp_path / "vae"))
    assert "the VAE's latents have 16" in line


def test_several_processes_are_refused(tmp_path):
    done = run("sample.py", "--prompt", "a", "--output-dir", tmp_path, env=os.environ | {"WORLD_SIZE": "2"})
    assert "without torchrun" in error_line(done)


def test_mask_of_another_size(tmp_path):
    Image.new("RGB", (128, 128)).save(tmp_path / "a.png")
    Image.new("L", (64, 64)).save(tmp_path / "m.png")
    line = error_line(
        sample(tmp_path / "o", "--prompt", "a", "--init-image", tmp_path / "a.png", "--mask", tmp_path / "m.png")
    )
    assert "64x64" in line


def test_output_is_a_file_or_read_only(tmp_path):
    (tmp_path / "f").write_text("")
    assert "is a file" in error_line(sample(tmp_path / "f", "--prompt", "a"))
    if os.getuid():  # root may write anywhere
        (tmp_path / "ro").mkdir()
        (tmp_path / "ro").chmod(stat.S_IRUSR | stat.S_IXUSR)
        assert "cannot be written" in error_line(sample(tmp_path / "ro", "--prompt", "a"))


def test_half_downloaded_model(tmp_path):
    folder = copy_model("sd15", tmp_path / "m")
    path = folder / "unet" / "diffusion_pytorch_model.safetensors"
    path.write_bytes(path.read_bytes()[:100_000])
    line = error_line(run("sample.py", "--model", folder, "--prompt", "a", "--output-dir", tmp_path / "o"))
    assert "truncated" in line and "unet" in line


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_interrupted_runs_keep_what_they_made(tmp_path, number, code):
    argv = ["--prompt", "a", "--num-images", 500, "--batch-size", 1, "--output-dir", tmp_path]
    child = start("sample.py", *MODEL, *argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    for _ in range(600):
        if len(list(tmp_path.glob("*.png"))) >= 3:  # the last one may be half written
            break
        time.sleep(0.1)
    child.send_signal(number)
    _, err = child.communicate(timeout=60)
    assert child.returncode == code and "Traceback" not in err, err
    record = json.loads((tmp_path / "run.json").read_text())
    assert 2 <= record["results"]["images"] < 500
    for entry in record["files"]:
        Image.open(entry["path"]).load()


def test_reader_that_stops_reading(tmp_path):
    """`sample.py … | head -0` ends quietly."""
    argv = ["sample.py", *MODEL, "--prompt", "a", "--output-dir", tmp_path]
    child = start(*argv, stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    child.stdout.close()
    err = child.stderr.read()
    assert child.wait(timeout=120) == 0 and "Traceback" not in err, err


def test_a_folder_with_pictures_is_counted_on(tmp_path):
    """Nothing is lost silently: further runs count on, and keep the records before; --overwrite begins again."""
    model = ("--model", str(TINY / "sd15"))
    first = ["--prompt", "a", "--steps", 1, "--seed", 1, "--num-images", 2]
    assert sample(tmp_path, *first, model=model).returncode == 0
    before = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    done = sample(tmp_path, "--prompt", "b", "--steps", 1, "--seed", 1, model=model)
    assert done.returncode == 0 and "counting on, its run.json is run-1.json now" in done.stderr
    after = {p.name: p.read_bytes() for p in tmp_path.iterdir()}
    assert set(after) == {"00000.png", "00001.png", "00002.png", "run.json", "run-1.json"}
    assert {n: after[n] for n in ("00000.png", "00001.png", "run-1.json")} == {
        "00000.png": before["00000.png"], "00001.png": before["00001.png"], "run-1.json": before["run.json"]
    }  # fmt: skip
    assert sample(tmp_path, "--study", "steps=1", "--prompt", "c", "--seed", 1, model=model).returncode == 0
    assert (tmp_path / "00003.png").exists() and (tmp_path / "00002.png").read_bytes() == after["00002.png"]
    again = ("--study", "steps=1,2", "--prompt", "d", "--seed", 1)
    assert sample(tmp_path, *again, "--overwrite", model=model).returncode == 0
    assert (
        set(json.loads((tmp_path / "study.json").read_text())["pictures"])
        and (tmp_path / "00002.png").read_bytes() == after["00002.png"]
    )
    assert {r["prompt"] for r in json.loads((tmp_path / "study.json").read_text())["pictures"].values()} == {"d"}
    done = sample(tmp_path, *first, "--overwrite", model=model)
    assert done.returncode == 0 and (tmp_path / "00000.png").read_bytes() == before["00000.png"]
    done = sample(tmp_path, "--prompt", "b", "--steps", 1, "--overwrite", model=model)
    assert "2 pictures of the run before are deleted" in done.stderr and not (tmp_path / "00001.png").exists()
    assert sample(tmp_path, "--prompt", "b", "--steps", 1, "--save-latents", "--overwrite", model=model).returncode == 0
    assert "latents.safetensors: is of an earlier run" in error_line(
        sample(tmp_path, "--prompt", "b", "--save-latents", "--steps", 1, model=model)
    )


def test_the_documents_series_shares_a_folder(tmp_path):
    """S3-13: its names come without a flag when its flags are used, and its second command of one name loses nothing."""
    series = [
        "--scheduler ddpm",
        "--scheduler ddim",
        "--scheduler ddpm --negative_prompt blurry",
        "--scheduler ddim --guidance_scale 1",
    ]
    for more in series:
        argv = ["sample.py", "--prompt", "Fruit Salad, with Salt", *more.split(), "--model_id", TINY / "sd15", "--output_dir", tmp_path,
                "--number_inference_steps", 2]  # fmt: skip
        assert run(*argv).returncode == 0
    base = "Fruit_Salad_with_Salt_sd15"
    assert {p.name for p in tmp_path.glob("*.png")} == {
        f"{base}_ddpm_cfg7_5_steps2.png", f"{base}_ddim_cfg7_5_steps2.png", f"{base}_ddpm_cfg7_5_steps2_2.png", f"{base}_ddim_cfg1_steps2.png"
    }  # fmt: skip


def test_two_runs_at_once_in_one_folder(tmp_path):
    claimed = files.claim(tmp_path)
    assert "another run is using this folder" in error_line(
        sample(tmp_path, "--prompt", "a", "--steps", 1, model=("--model", str(TINY / "sd15")))
    )
    claimed.close()
    assert not (tmp_path / ".lock").exists()


def test_a_full_disk_leaves_no_half_picture(tmp_path):
    """A file size limit stands for the full disk: one line that names the file, and nothing under its final name."""
    limit = f"import resource, sys; resource.setrlimit(resource.RLIMIT_FSIZE, (600, 600)); import signal; signal.signal(signal.SIGXFSZ, signal.SIG_IGN); import sample; from nanodiff.commandline import script; sys.argv = {['sample.py', '--model', str(TINY / 'sd15'), '--prompt', 'a', '--steps', '1', '--output-dir', str(tmp_path)]!r}; sys.exit(script(sample.STAGES, sample.__doc__))"
    done = run("-c", limit)
    assert "cannot be written" in error_line(done) and not list(tmp_path.glob("*.png"))


def test_what_a_run_reads_is_not_replaced_by_it(tmp_path):
    """The pictures beside a sheet, those that --overwrite deletes, and the preview; elsewhere they are read."""
    common = ("--prompt", "a cat", "--steps", "2", "--seed", "1", "--height", "64", "--width", "64")
    assert sample(tmp_path / "o", *common, "--num-images", "2", "--output", tmp_path / "s.png").returncode == 0
    inside, single, preview = (
        tmp_path / "o" / "00000.png",
        tmp_path / "s_individual" / "image_001.png",
        tmp_path / "o" / "preview.png",
    )
    shutil.copy(inside, preview)
    for flags, image in (
        (("--output", tmp_path / "s.png"), single),
        (("--overwrite",), inside),
        (("--preview", tmp_path / "taesd.safetensors"), preview),
    ):
        before = image.read_bytes()
        done = sample(tmp_path / "o", *common, *flags, "--init-image", image)
        assert (
            f"--init-image {image}: would be replaced by this run" in error_line(done) and image.read_bytes() == before
        )
    done = sample(tmp_path / "o", *common, "--study", "scheduler=ddim,euler", "--overwrite", "--init-image", inside)
    assert f"--init-image {inside}: would be replaced by this run" in error_line(done) and inside.exists()
    again = sample(tmp_path / "p", *common, "--output", tmp_path / "s.png", "--init-image", inside)
    assert again.returncode == 0 and "s_individual: 2 pictures of an earlier sheet are replaced" in again.stderr
    assert len(list(single.parent.iterdir())) == 1
