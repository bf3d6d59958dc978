"""sample.py with SDXL, SD 3.5, LoRAs, learned words, small memory, TAESD; bad input of each in one line."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from util import GOLDEN, TINY, copy_model, error_line, run

import sample
from nanodiff import commandline, weights
from nanodiff.config import UserError
from nanodiff.models import taesd
from nanodiff.output import images
from nanodiff.stories import sampling

SD15, XL, MEDIUM, TURBO = (TINY / n for n in ("sd15", "sdxl", "sd35-medium", "sd35-large-turbo"))
LORA = GOLDEN / "lora"


def make(out, model, *argv, prompt="a cat"):
    argv = ["--model", model, "--prompt", prompt, "--seed", 1, "--output-dir", out, *argv]
    sampling.main(commandline.parse(sample.Config, [str(a) for a in argv]))
    return Image.open(out / "00000.png")


def refused(out, model, *argv):
    with pytest.raises(UserError) as caught:
        make(out, model, "--steps", 1, *argv)
    return commandline.flagged(caught.value)


def test_defaults_of_the_families(tmp_path, capsys):
    """S3-10, S3-15, S3-16: each family's own sampler, steps and guidance when nothing is said."""
    for model, want in (
        (XL, "scheduler=euler, steps=50, guidance_scale=7.5"),
        (TINY / "sdxl-turbo", "scheduler=euler_a, steps=1, guidance_scale=0.0"),
        (MEDIUM, "scheduler=flow_euler, steps=40, guidance_scale=4.5"),
        (TURBO, "scheduler=flow_euler, steps=4, guidance_scale=0.0"),
    ):
        make(tmp_path / model.name, model)
        out = capsys.readouterr().out
        assert want in out and "text_encoder_2: " in out, out


@pytest.mark.parametrize("name", ["ddpm", "ddim"])
def test_sd35_is_a_flow(tmp_path, name):
    assert "uses flow-match Euler" in refused(tmp_path, MEDIUM, "--scheduler", name)


@pytest.mark.parametrize("model", [TINY / "sdxl-turbo", TURBO])
def test_turbo_models_have_no_negative_prompt(tmp_path, model, capsys):
    plain = make(tmp_path / "a", model).tobytes()
    assert make(tmp_path / "b", model, "--negative-prompt", "blurry").tobytes() == plain
    assert "negative prompt is not used" in capsys.readouterr().err


@pytest.mark.parametrize("scale", [1, 3, 5, 7.5, 10, 15])
def test_guidance_study_values_run_on_sd35(tmp_path, scale):
    make(tmp_path, MEDIUM, "--guidance-scale", scale, "--steps", 2, "--max-sequence-length", 16)


@pytest.mark.parametrize("steps", [5, 25, 50, 75, 100, 150])
def test_step_study_values_run_on_turbo(tmp_path, steps):
    make(tmp_path, TURBO, "--number_inference_steps", steps, "--max-sequence-length", 16)


def test_names_of_flows_leave_the_scheduler_out(tmp_path):
    """S3-13"""
    with pytest.raises(FileNotFoundError):
        make(tmp_path, MEDIUM, "--named", "--steps", 2, "--guidance-scale", 4.5, prompt="Fruit, Salad!")
    assert (tmp_path / "Fruit_Salad_sd35_medium_cfg4_5_steps2_1.png").exists()


def test_without_t5(tmp_path):
    """Its folder may be missing; --no-t5 goes on without it, and the picture is another one."""
    folder = copy_model("sd35-medium", tmp_path / "m")
    full = make(tmp_path / "a", folder, "--steps", 2).tobytes()
    shutil.rmtree(folder / "text_encoder_3")
    shutil.rmtree(folder / "tokenizer_3")
    assert "--no-t5" in refused(tmp_path / "b", folder)
    assert make(tmp_path / "c", folder, "--steps", 2, "--no-t5").tobytes() != full
    assert "no third text encoder" in refused(tmp_path / "d", SD15, "--no-t5")


@pytest.mark.parametrize("fault", ["missing", "double", "outside", "unknown"])
def test_faulty_shards_of_t5(tmp_path, fault):
    folder = copy_model("sd35-medium", tmp_path / "m") / "text_encoder_3"
    index = folder / "model.safetensors.index.json"
    raw = json.loads(index.read_text())
    if fault == "missing":
        (folder / "model-00002-of-00002.safetensors").unlink()
    elif fault == "double":
        first = folder / "model-00001-of-00002.safetensors"
        key = next(iter(weights.header([first])))
        second = folder / "model-00002-of-00002.safetensors"
        weights.save_tensors(second, weights.load_tensors(second) | {key: torch.zeros(1)})
    elif fault == "outside":
        raw["weight_map"]["shared.weight"] = "../../x.safetensors"
    else:
        raw["weight_map"]["nobody"] = "model-00001-of-00002.safetensors"
    index.write_text(json.dumps(raw))
    line = error_line(
        run("sample.py", "--model", folder.parent, "--prompt", "a", "--steps", 1, "--output-dir", tmp_path / "o")
    )
    says = {
        "missing": "00002-of-00002",
        "double": "two shards",
        "outside": "not a plain file name",
        "unknown": "nobody",
    }
    assert says[fault] in line


# -- LoRA, learned words ------------------------------------------------------------------------------------


def test_loras_beside_and_fused(tmp_path, capsys):
    argv = (
        "--lora",
        f"{LORA / 'sd15.peft.safetensors'}:0.7",
        "--lora",
        f"{LORA / 'sd15.kohya.safetensors'}:0.3",
        "--steps",
        2,
    )
    beside = make(tmp_path / "a", SD15, *argv).tobytes()
    assert "layers, scale 0.7" in capsys.readouterr().out
    fused = make(tmp_path / "b", SD15, *argv, "--lora-fuse").tobytes()
    away = make(tmp_path / "c", SD15, *argv, "--offload", "model", "--lora-fuse").tobytes()
    none = make(tmp_path / "d", SD15, "--steps", 2).tobytes()
    assert none not in (beside, fused)
    for other in (fused, away):
        assert max(abs(a - b) for a, b in zip(beside, other, strict=True)) <= 1
    again = tmp_path / "again"
    sampling.main(
        commandline.parse(
            sample.Config, ["--from-image", str(tmp_path / "a" / "00000.png"), "--output-dir", str(again)]
        )
    )
    assert Image.open(again / "00000.png").tobytes() == beside


def test_a_moved_lora_is_asked_for(tmp_path):
    shutil.copy(LORA / "sd15.peft.safetensors", tmp_path / "x.safetensors")
    make(tmp_path / "a", SD15, "--lora", f"{tmp_path / 'x.safetensors'}:0.5", "--steps", 1)
    (tmp_path / "x.safetensors").unlink()
    done = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "b")
    assert "--lora" in error_line(done)


def test_a_lora_of_another_family_is_one_line(tmp_path):
    line = error_line(
        run(
            "sample.py",
            "--model",
            SD15,
            "--prompt",
            "a",
            "--lora",
            LORA / "sdxl.kohya.safetensors",
            "--output-dir",
            tmp_path,
        )
    )
    assert "another family" in line
    assert "does nothing without --lora" in refused(tmp_path, SD15, "--lora-fuse")
    assert "no such file" in refused(tmp_path, SD15, "--lora", "nowhere.safetensors").lower()


def test_a_learned_word(tmp_path, capsys):
    plain = make(tmp_path / "a", SD15, "--steps", 2, prompt="a photo of <corgi>").tobytes()
    word = LORA / "sd15.embedding.safetensors"
    learned = make(tmp_path / "b", SD15, "--steps", 2, "--embedding", word, prompt="a photo of <corgi>").tobytes()
    assert learned != plain and "learned word: <corgi>" in capsys.readouterr().out
    assert "one text encoder" in refused(tmp_path / "c", XL, "--embedding", word)


# -- small memory -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("model", [SD15, XL, MEDIUM])
def test_every_way_to_save_memory_gives_the_picture(tmp_path, model):
    plain = make(tmp_path / "plain", model, "--steps", 2)
    for argv in (
        ["--offload", "model"],
        ["--offload", "sequential"],
        ["--vae-tiling"],
        ["--offload", "sequential", "--vae-tiling"],
    ):
        got = make(tmp_path / "_".join(argv).replace("-", ""), model, "--steps", 2, *argv)
        assert max(abs(a - b) for a, b in zip(got.tobytes(), plain.tobytes(), strict=True)) <= 1, argv


def test_offload_with_many_prompts_and_a_vae_of_another_model(tmp_path):
    argv = ["--prompt", "a dog", "--num-images", 2, "--batch-size", 3, "--steps", 2, "--negative-prompt", "blurry"]
    make(tmp_path / "a", SD15, *argv)
    make(tmp_path / "b", SD15, *argv, "--offload", "model", "--vae-checkpoint", SD15 / "vae")
    for i in range(4):
        a, b = (Image.open(tmp_path / d / f"{i:05d}.png").tobytes() for d in "ab")
        assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1


# -- TAESD --------------------------------------------------------------------------------------------------


@pytest.fixture
def tiny_decoder(tmp_path):
    torch.manual_seed(0)
    weights.save_tensors(tmp_path / "taesd.safetensors", taesd.decoder(4).state_dict())
    return tmp_path / "taesd.safetensors"


def test_drafts_and_previews(tmp_path, tiny_decoder):
    plain = make(tmp_path / "a", SD15, "--steps", 3)
    assert make(tmp_path / "b", SD15, "--steps", 3, "--preview", tiny_decoder).tobytes() == plain.tobytes()
    preview = Image.open(tmp_path / "b" / "preview.png")
    assert preview.width >= plain.width
    draft = make(tmp_path / "c", SD15, "--steps", 3, "--fast-vae", tiny_decoder)
    assert draft.size == plain.size and draft.tobytes() != plain.tobytes()


def test_a_decoder_for_other_latents(tmp_path, tiny_decoder):
    assert "4 channels" in refused(tmp_path, MEDIUM, "--fast-vae", tiny_decoder)
    assert "--vae-tiling has nothing to do" in refused(tmp_path, SD15, "--fast-vae", tiny_decoder, "--vae-tiling")
    assert "no TAESD decoder" in refused(tmp_path, SD15, "--preview", LORA / "sd15.peft.safetensors")


# -- settings of other families -----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "argv", "says"),
    [
        (SD15, ["--prompt-2", "x"], "--prompt-2"),
        (XL, ["--prompt-3", "x"], "--prompt-3"),
        (XL, ["--negative-prompt", "x", "--negative-prompt-3", "x"], "--negative-prompt-3"),
        (XL, ["--max-sequence-length", 64], "--max-sequence-length"),
        (MEDIUM, ["--max-sequence-length", 600], "between 1 and 512"),
        (SD15, ["--original-size", "64x64"], "SDXL"),
        (XL, ["--original-size", "64"], "WIDTHxHEIGHT"),
        (XL, ["--negative-original-size", "64x64"], "together"),
        (XL, ["--skip-layers", "1"], "SD 3"),
        (MEDIUM, ["--skip-layers", "1,77"], "0 to 3"),
        (MEDIUM, ["--skip-layers", "a"], "numbers"),
        (XL, ["--denoising-end", 1.5], "between 0 and 1"),
        (XL, ["--negative-prompt-2", "x"], "does nothing without --negative-prompt"),
        (MEDIUM, ["--height", 136], "multiple of 16"),
        (MEDIUM, ["--height", 400], "at most 384"),
        (SD15, ["--lora-scale", 0.5], "--lora-scale does nothing"),
        (MEDIUM, ["--skip-layer-scale", 3.0], "--skip-layer-scale does nothing"),
        (SD15, ["--compile", "--offload", "sequential"], "--compile"),
        (SD15, ["--components", XL], "--components is for single"),
        (SD15, ["--prediction-type", "epsilon"], "--prediction-type is for single"),
    ],
)
def test_settings_of_other_families_are_named(tmp_path, model, argv, says):
    assert says in refused(tmp_path, model, *argv)


def test_all_sizes_of_sdxl_matter(tmp_path):
    argv = ("--steps", 1, "--guidance-scale", 3)
    pictures = {make(tmp_path / "0", XL, *argv).tobytes()}
    for i, more in enumerate(
        (
            ["--original-size", "512x300"],
            ["--target-size", "512x300"],
            ["--crop", "0x64"],
            ["--negative-original-size", "64x64", "--negative-target-size", "64x64"],
            ["--negative-original-size", "64x64", "--negative-target-size", "64x64", "--negative-crop", "9x0"],
        ),
        1,
    ):
        pictures.add(make(tmp_path / str(i), XL, *argv, *more).tobytes())
    assert len(pictures) == 6


def test_a_missing_third_encoder_recommends_going_without(tmp_path):
    folder = copy_model("sd35-medium", tmp_path / "m")
    shutil.rmtree(folder / "text_encoder_3")
    assert "--no-t5" in refused(tmp_path, folder)
    index = json.loads((folder / "model_index.json").read_text()) | {
        "text_encoder_3": [None, None],
        "tokenizer_3": [None, None],
    }
    (folder / "model_index.json").write_text(json.dumps(index))
    make(tmp_path / "o", folder, "--steps", 1)


def test_an_empty_negative_prompt_is_one(tmp_path):
    """SDXL: none at all is zeros, "" is encoded, and a second one may stand beside it."""
    argv = ("--steps", 1, "--guidance-scale", 5)
    pictures = {
        make(tmp_path / "a", XL, *argv).tobytes(),
        make(tmp_path / "b", XL, *argv, "--negative-prompt", "").tobytes(),
    }
    pictures.add(make(tmp_path / "c", XL, *argv, "--negative-prompt", "", "--negative-prompt-2", "blurry").tobytes())
    assert len(pictures) == 3


@pytest.mark.parametrize("model", [SD15, XL, MEDIUM])
def test_long_neighbours_change_nothing(tmp_path, model):
    """interface: the same pictures for every --batch-size, also when a prompt beside takes more chunks."""
    argv = ("--prompt", "a dog", "--prompt", "a red house, " * 40, "--prompt", "a bird", "--steps", 2, "--long-prompts")
    make(tmp_path / "1", model, *argv, "--batch-size", 1)
    for more in (["--batch-size", 4], ["--batch-size", 4, "--offload", "model"]):
        out = tmp_path / "_".join(map(str, more)).replace("-", "")
        make(out, model, *argv, *more)
        for i in range(4):
            a, b = (Image.open(d / f"{i:05d}.png").tobytes() for d in (tmp_path / "1", out))
            assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1


def test_weights_are_not_counted_as_words(tmp_path, capsys):
    words = " ".join(["cat"] * 30)
    make(tmp_path, SD15, "--prompt-weights", "--steps", 1, prompt=f"(({words})) (red:1.25)")
    assert "cut off" not in capsys.readouterr().err


def test_no_picture_of_nan_by_any_decoder(tmp_path, tiny_decoder, monkeypatch):
    from nanodiff import pipeline

    original = pipeline.load

    def broken(*args, **kwargs):
        sd = original(*args, **kwargs)
        sd.net.conv_out.bias.data.fill_(float("nan"))
        return sd

    monkeypatch.setattr(pipeline, "load", broken)
    assert "not finite" in refused(tmp_path, SD15, "--fast-vae", tiny_decoder)
    assert not (tmp_path / "00000.png").exists()


def test_sd3_starts_from_a_picture_at_its_own_size(tmp_path):
    """As in diffusers: SD 1, 2 and XL take the picture's size, SD 3 the model's, unless --height and --width say."""
    Image.new("RGB", (96, 160), "red").save(tmp_path / "in.png")
    argv = ("--init-image", tmp_path / "in.png", "--steps", 3, "--guidance-scale", 1)
    assert make(tmp_path / "a", SD15, *argv).size == make(tmp_path / "b", XL, *argv).size == (96, 160)
    assert make(tmp_path / "c", MEDIUM, *argv).size == (128, 128)
    assert make(tmp_path / "d", MEDIUM, *argv, "--height", 160, "--width", 96).size == (96, 160)


def test_strips_use_the_chosen_decoder(tmp_path, tiny_decoder):
    make(tmp_path / "a", SD15, "--steps", 3, "--progress-strip")
    make(tmp_path / "b", SD15, "--steps", 3, "--progress-strip", "--fast-vae", tiny_decoder)
    a, b = (Image.open(tmp_path / d / "00000_steps.png").tobytes() for d in "ab")
    assert a != b


def test_guidance_settings_without_guidance_are_said(tmp_path, capsys):
    make(tmp_path, SD15, "--steps", 1, "--guidance-scale", 1, "--guidance-rescale", 0.5)
    assert "--guidance-rescale does nothing" in capsys.readouterr().err


def test_make_study_targets_know_flows():
    import subprocess

    from util import ROOT

    lines = {}
    for model in ("", "stabilityai/stable-diffusion-3.5-medium", "stabilityai/stable-diffusion-2-1"):
        for target in ("study-schedulers", "study-steps", "study-negative", "study-guidance"):
            done = subprocess.run(
                ["make", "-n", target, f"MODEL={model}", "STAMP="], cwd=ROOT, capture_output=True, text=True, timeout=60
            )
            lines[model, target] = next(line for line in done.stdout.splitlines() if "sample.py" in line) + done.stdout
    flow = "stabilityai/stable-diffusion-3.5-medium"
    assert "scheduler=flow_euler,flow_heun" in lines[flow, "study-schedulers"]
    assert "ddpm" not in lines[flow, "study-steps"] + lines[flow, "study-negative"] + lines[flow, "study-guidance"]
    for model in ("", "stabilityai/stable-diffusion-2-1"):
        assert (
            'scheduler=ddpm,ddim"' in lines[model, "study-schedulers"]
            and "scheduler=ddpm;steps=5,25" in lines[model, "study-steps"]
        )


def test_choices_in_the_second_encoders_text(tmp_path):
    """ComfyUI's {a|b} is chosen in --prompt-2 too, by each picture's seed, encoded beforehand or not, and kept in the picture."""
    argv = ("--model", XL, "--prompt", "a cat", "--prompt-2", "{red|green|blue}", "--prompt-syntax", "comfyui", "--steps", "2", "--height", "64", "--width", "64",
            "--num-images", "3", "--seed", "1")  # fmt: skip
    for name, more in (("a", ()), ("b", ("--offload", "model"))):
        done = run("sample.py", *argv, *more, "--output-dir", tmp_path / name)
        assert done.returncode == 0, done.stderr
    texts = []
    for i in range(3):
        a, b = (images.read_record(tmp_path / name / f"0000{i}.png") for name in "ab")
        assert a["prompt_2"] == b["prompt_2"] and a["prompt_2"] in ("red", "green", "blue")
        texts.append(a["prompt_2"])
        want = run(
            "sample.py",
            *argv[:4],
            "--prompt-2",
            texts[-1],
            *argv[6:14],
            "--seed",
            a["seed"],
            "--output-dir",
            tmp_path / f"w{i}",
        )
        assert want.returncode == 0, want.stderr
        drawn = [
            np.array(Image.open(f)).astype(int)
            for f in (tmp_path / "a" / f"0000{i}.png", tmp_path / f"w{i}" / "00000.png")
        ]
        assert np.abs(drawn[0] - drawn[1]).max() <= 1
    assert len(set(texts)) > 1
