"""Rarely walked corners of sample.py: cells of a study, what a record repeats, what a dry run knows, what stands beside a picture."""

import json
import shutil

import numpy as np
import pytest
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from util import TINY, copy_model, error_line, run

from nanodiff.diffusion.samplers import SAMPLERS
from nanodiff.weights import hub

SMALL = ("--model", TINY / "sd15", "--prompt", "cat", "--steps", 2, "--height", 32, "--width", 32, "--seed", 5)


def sample(out, *argv, small=SMALL):
    return run("sample.py", *small, *argv, "--output-dir", out)


def pixels(path):
    return np.asarray(Image.open(path)).astype(int)


@pytest.mark.parametrize("first", ("ddpm", "euler"))
def test_a_cell_without_a_sampler_has_the_models_own(tmp_path, first):
    """Whatever the cell before it was loaded with."""
    done = sample(tmp_path / "study", "--study", f"scheduler={first},none")
    assert done.returncode == 0, done.stderr
    assert sample(tmp_path / "own").returncode == 0
    assert np.array_equal(pixels(tmp_path / "study" / "00001.png"), pixels(tmp_path / "own" / "00000.png"))
    assert not np.array_equal(pixels(tmp_path / "study" / "00000.png"), pixels(tmp_path / "study" / "00001.png"))


def test_a_study_knows_its_own_pictures(tmp_path):
    study = ("--study", "guidance_scale=1,3")
    assert sample(tmp_path, *study).returncode == 0
    want = pixels(tmp_path / "00000.png")
    assert sample(tmp_path, "--prompt", "dog", "--overwrite").returncode == 0
    assert not np.array_equal(pixels(tmp_path / "00000.png"), want)
    done = sample(tmp_path, *study)
    assert done.returncode == 0 and "00000.png: is not the study's picture any more" in done.stderr, done.stderr
    row = next(
        r for r in json.loads((tmp_path / "study.json").read_text())["pictures"].values() if r["guidance_scale"] == 1
    )
    assert np.array_equal(pixels(tmp_path / row["file"]), want)
    again = sample(tmp_path, *study)
    assert "2 of them finished before" in again.stdout


def test_a_cell_is_refused_what_a_run_is(tmp_path):
    error = error_line(sample(tmp_path, "--scheduler", "dpmpp_2s", "--study", "timestep_spacing=leading,trailing"))
    assert "does nothing to dpmpp_2s" in error


@pytest.mark.parametrize(
    "axis, more, model",
    [("refiner=none", ("--aesthetic-score", 7), "sdxl"), ("prompt_syntax=none", ("--lora-dir", TINY), "sd15")],
)
def test_what_an_axis_that_is_off_needs_is_off(tmp_path, axis, more, model):
    done = sample(tmp_path, *more, "--study", axis, "--model", TINY / model)
    assert done.returncode == 0, done.stderr


def test_a_second_pass_is_repeated(tmp_path):
    """A turbo takes more steps in it than in the first; the record says how many."""
    small = ("--model", TINY / "sd-turbo", "--prompt", "cat", "--height", 32, "--width", 32, "--seed", 5)
    assert sample(tmp_path / "a", "--hires", 2, small=small).returncode == 0
    want = pixels(tmp_path / "a" / "00000.png")
    done = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "b")
    assert done.returncode == 0 and np.array_equal(pixels(tmp_path / "b" / "00000.png"), want), done.stderr
    done = run("sample.py", "--config", tmp_path / "a" / "run.json", "--output-dir", tmp_path / "c")
    assert done.returncode == 0 and np.array_equal(pixels(tmp_path / "c" / "00000.png"), want), done.stderr
    # where both passes take as many, other --steps are both's
    assert sample(tmp_path / "d", "--hires", 2).returncode == 0
    assert json.loads((tmp_path / "d" / "run.json").read_text())["config"]["hires_steps"] is None


def test_a_record_of_ddim_steps_is_a_config(tmp_path):
    small = ("--model", TINY / "sd15", "--prompt", "cat", "--height", 32, "--width", 32, "--seed", 5)
    assert sample(tmp_path / "a", "--ddim-steps", 3, small=small).returncode == 0
    done = run("sample.py", "--config", tmp_path / "a" / "run.json", "--output-dir", tmp_path / "b")
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(tmp_path / "a" / "00000.png"), pixels(tmp_path / "b" / "00000.png"))


def test_a_picture_of_a_model_in_the_cache_is_repeated(tmp_path, monkeypatch):
    """What is not in it is not downloaded for a picture's sake."""
    home = tmp_path / "hf" / "hub"
    snapshot = home / "models--org--tiny" / "snapshots" / "abc"
    copy_model("sd15", snapshot)
    (home / "models--org--tiny" / "refs").mkdir()
    (home / "models--org--tiny" / "refs" / "main").write_text("abc")
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(home))
    assert hub.is_cached("org/tiny") and hub.is_cached("org/tiny/unet/config.json") and hub.is_cached("org/tiny@main")
    assert not hub.is_cached("org/tiny/unet/absent.safetensors") and not hub.is_cached("org/tiny", "v2")
    assert not hub.is_cached("org/other") and not hub.is_cached("../tiny") and not hub.is_cached("tiny")
    environment = {"HF_HUB_CACHE": str(home), "HF_HUB_OFFLINE": "1"}
    import os

    own = os.environ | environment
    small = ("--prompt", "cat", "--steps", 2, "--height", 32, "--width", 32, "--seed", 5)
    done = run("sample.py", "--model", "org/tiny", *small, "--output-dir", tmp_path / "a", env=own)
    assert done.returncode == 0, done.stderr
    done = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "b", env=own)
    assert done.returncode == 0, done.stderr
    assert np.array_equal(pixels(tmp_path / "a" / "00000.png"), pixels(tmp_path / "b" / "00000.png"))
    for path in (snapshot / "unet").glob("*.safetensors"):
        path.unlink()
    assert not hub.is_cached("org/tiny"), "a part of it is not enough: the rest would be downloaded"
    shutil.rmtree(home / "models--org--tiny")
    done = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "c", env=own)
    assert "was made with org/tiny; name it with --model" in error_line(done)


@pytest.mark.parametrize(
    "more, says",
    [
        (("--freeu", "abc"), "--freeu"),
        (("--resize", "abc"), "--resize"),
        (("--sigmas", "nope"), "--sigmas nope: is none of"),
        (("--sigmas", "ays", "--scheduler", "ddim"), "ddim has no such grid"),
        (("--scheduler", "flow_euler"), "not a flow-matching model"),
        (("--eta", 0.5), "pndm has no such setting"),
        (("--denoising-end", 0.01), "leaves no step"),
        (("--target-size", "8x8"), "only SDXL"),
        (("--skip-layers", 1), "only SD 3"),
        (("--prompt-2", "x"), "no text encoder 2"),
        (("--hires", 2, "--hires-strength", 0.1), "leaves none to take"),
    ],
)
def test_a_dry_run_refuses_what_the_run_refuses(tmp_path, more, says):
    want = error_line(sample(tmp_path / "run", *more))
    assert says in want
    assert error_line(sample(tmp_path / "dry", *more, "--dry-run")) == want


@pytest.mark.parametrize("name", ("sd15", "sd-turbo", "sdxl", "sd35-medium"))
def test_a_dry_run_knows_no_fault_where_there_is_none(tmp_path, name):
    small = ("--model", TINY / name, "--prompt", "cat", "--hires", 1.1)
    done = sample(tmp_path, "--dry-run", small=small)
    assert done.returncode == 0, done.stderr


def test_a_dry_run_refuses_the_cells_that_the_study_refuses(tmp_path):
    """Also those that take as much memory as one that can be drawn."""
    error = error_line(sample(tmp_path, "--study", "scheduler=pndm,flow_euler", "--dry-run"))
    assert "1 of 2 cells cannot be drawn, such as scheduler flow_euler" in error


def test_a_dry_run_of_another_programs_picture(tmp_path):
    """Whose sampler's name means a flow's where the model is one."""
    graph = {"1": {"class_type": "KSampler", "inputs": {"seed": 1, "steps": 3, "cfg": 2.0, "sampler_name": "euler", "scheduler": "normal", "denoise": 1.0,
                                                        "positive": ["2", 0], "negative": ["2", 0]}},
             "2": {"class_type": "CLIPTextEncode", "inputs": {"text": "cat"}}}  # fmt: skip
    told = PngInfo()
    told.add_text("prompt", json.dumps(graph))
    Image.new("RGB", (16, 16)).save(tmp_path / "c.png", pnginfo=told)
    done = run(
        "sample.py",
        "--model",
        TINY / "sd35-medium",
        "--from-image",
        tmp_path / "c.png",
        "--dry-run",
        "--output-dir",
        tmp_path / "o",
    )
    assert done.returncode == 0, done.stderr


def test_a_dry_run_of_a_model_that_is_not_square(tmp_path):
    model = copy_model("sd15", tmp_path / "model")
    config = json.loads((model / "unet" / "config.json").read_text()) | {"sample_size": [16, 24]}
    (model / "unet" / "config.json").write_text(json.dumps(config))
    done = sample(tmp_path / "out", "--dry-run", small=("--model", model, "--prompt", "x"))
    assert done.returncode == 0, done.stderr


def test_what_stands_beside_a_replaced_picture_goes_with_it(tmp_path):
    assert sample(tmp_path, "--txt", "--named", "--progress-strip").returncode == 0
    (text,) = tmp_path.glob("*.txt")
    assert len(list(tmp_path.glob("*.png"))) == 2
    assert sample(tmp_path, "--named", "--overwrite").returncode == 0
    assert not text.exists() and len(list(tmp_path.glob("*.png"))) == 1
    text.write_text("mine")
    assert sample(tmp_path, "--named", "--overwrite").returncode == 0
    assert text.read_text() == "mine", "nobody's but the user's"


def test_a_flow_with_fresh_noise_has_a_name():
    """What a few-step student of a flow draws with (LCM's sampler, for velocities)."""
    assert SAMPLERS["flow_lcm"].fields == {"stochastic_sampling": True}
    assert not SAMPLERS["flow_euler"].fields, (
        "of a student that is drawn so it means what its file says, as before it had a name"
    )
