"""The source documents' commands, line by line, with only script and stage word changed, on small data: what is written is what they say."""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from util import TINY, error_line, run

from nanodiff import commandline
from nanodiff.data import corel

# VGG's weights are not here, and neither 150 epochs nor 128 pixels are wanted
SMALL_VAE = ["--no-perceptual", "--num-workers", "0", "--kl-warmup", "1", "--image-size", "32"]


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """The Corel document up to its diffusion model: data, VAE, diffusion, each by its own command."""
    folder = tmp_path_factory.mktemp("corel")
    corel.stand_in(folder / "data" / "corel", 2, 4, 32)
    at = ["--base-dir", folder]
    lines = [
        ["-m", "nanodiff.data", "prepare-corel", "--data-dir", "data/corel", *at],
        ["train.py", "corel-vae", "--data-dir", "training_data/corel/corel_all", "--output-dir", "vae_models", *at, "--epochs", 3,
         "--latent-dim", 16, *SMALL_VAE, "--save-images-epochs", 1, "--checkpoint-epochs", 1],
        ["train.py", "corel-diffusion", "--vae-checkpoint", "vae_models/best_model.pt", "--image-dir", "training_data/corel/corel_all",
         "--output-dir", "diffusion_models", *at, "--epochs", 3, "--grad-accum", 2, "--num-workers", 0, "--image-size", 32, "--model-size", "tiny", "--save-images-epochs", 2,
         "--checkpoint-epochs", 1, "--sample-steps", 2],
    ]  # fmt: skip
    said = []
    for line in lines:
        done = run(*line)
        assert done.returncode == 0, (line, done.stderr)
        said.append(done.stderr)
    return folder, said


def names(folder):
    return {p.name for p in folder.iterdir()}


def test_s2_vae(base):
    """S2-04, S2-10, S2-11: names, defaults, memory of each epoch."""
    folder, said = base
    made = folder / "vae_models"
    assert {"best_model.pt", "checkpoint_0001.pt", "checkpoint_0003.pt", "training_losses.png"} <= names(made)
    assert {"samples_epoch_1.png", "samples_epoch_3.png"} <= names(made / "samples")
    assert {"reconstruction_epoch_1.png", "reconstruction_epoch_3.png"} <= names(made / "reconstructions")
    assert "epoch 3 of 3: loss" in said[1] and "memory" in said[1]
    asked = json.loads((made / "run.json").read_text())["config"]
    assert {k: asked[k] for k in ("batch_size", "lr", "kl_weight", "kl_target", "seed", "perceptual_weight")} == {
        "batch_size": 16, "lr": 1e-4, "kl_weight": 1.0, "kl_target": 25.0, "seed": 42, "perceptual_weight": 0.03
    }  # fmt: skip
    done = run("train.py", "corel-vae", "--data-dir", "training_data/corel/corel_all", "--output-dir", "vae_models", "--base-dir", folder, "--epochs", 4,
               "--latent-dim", 16, *SMALL_VAE, "--resume", "vae_models/checkpoint_0002.pt")  # fmt: skip
    assert done.returncode == 0 and "resumed at step 2" in done.stderr, done.stderr


def test_s2_diffusion(base):
    """S2-14, S2-22, S2-23."""
    folder, said = base
    made = folder / "diffusion_models"
    assert {"best_model.pt", "checkpoint_epoch_1.pt", "checkpoint_epoch_3.pt", "loss_history.png"} <= names(made)
    assert "epoch_2.png" in names(made / "samples") and "epoch 3 of 3" in said[2]
    asked = json.loads((made / "run.json").read_text())["config"]
    assert {k: asked[k] for k in ("batch_size", "lr", "ema_decay", "beta_schedule", "lr_scheduler", "lr_min")} == {
        "batch_size": 16, "lr": 1e-4, "ema_decay": 0.995, "beta_schedule": "linear",
        "lr_scheduler": "cosine_warm_restarts", "lr_min": 1e-5,
    }  # fmt: skip
    line = ["train.py", "corel-diffusion", "--vae-checkpoint", "vae_models/best_model.pt", "--image-dir", "training_data/corel/corel_all", "--output-dir",
            "diffusion_models", "--base-dir", folder, "--num-workers", 0, "--grad-accum", 2, "--image-size", 32, "--model-size", "tiny"]  # fmt: skip
    done = run(*line, "--epochs", 4, "--resume", "diffusion_models/checkpoint_epoch_3.pt")
    assert done.returncode == 0 and "resumed at step 3" in done.stderr, done.stderr
    assert "checkpoint_epoch_7.pt: no such checkpoint; there are" in error_line(
        run(*line, "--resume", "diffusion_models/checkpoint_epoch_7.pt")
    )
    line[line.index("vae_models/best_model.pt")] = "vae_models/other.pt"
    assert "VAE checkpoint not found" in error_line(run(*line)) and "train it first" in error_line(run(*line))
    del line[2:4]
    assert "--vae-checkpoint is required" in error_line(run(*line))


def test_s2_generation(base, tmp_path):
    """S2-24 to S2-27: a sheet of 16 in rows of 4, beside it each alone; DDIM with --ddim-steps; more than 16 are not written alone."""
    folder, _ = base
    models = [
        "--diffusion-checkpoint",
        "diffusion_models/best_model.pt",
        "--vae-checkpoint",
        "vae_models/best_model.pt",
        "--base-dir",
        folder,
    ]
    done = run("sample.py", "corel", *models, "--ddim-steps", 2, "--output", "generated_images.png", "--device", "cuda")
    assert done.returncode == 0 and "seed:" in done.stdout, done.stderr
    assert "no CUDA device here" in done.stderr or torch.cuda.is_available()
    sheet = Image.open(folder / "generated_images.png")
    assert sheet.size == (4 * 36 + 4, 4 * 36 + 4)
    assert names(folder / "generated_images_individual") == {f"image_{i:03d}.png" for i in range(16)}
    done = run(
        "sample.py",
        "corel",
        *models,
        "--num-images",
        18,
        "--ddim-steps",
        1,
        "--output",
        "corel_18_images.png",
        "--nrow",
        6,
    )
    assert done.returncode == 0 and Image.open(folder / "corel_18_images.png").size == (6 * 36 + 4, 3 * 36 + 4)
    assert not (folder / "corel_18_images_individual").exists()
    assert "--vae-checkpoint is required" in error_line(run("sample.py", "corel", *models[:2], "--base-dir", folder))


def test_s2_generation_by_default_takes_all_of_ddpms_steps():
    """S2-26, as the settings say it: a thousand steps are not taken here."""
    import sample

    cfg = commandline.parse(
        sample.Corel, ["--diffusion-checkpoint", "d", "--vae-checkpoint", "v"], presets=sample.PRESETS["corel"]
    )
    cfg.check()
    assert (cfg.scheduler, cfg.steps, cfg.num_images, cfg.batch_size, cfg.nrow, cfg.output) == (
        "ddpm",
        1000,
        16,
        16,
        4,
        "generated_images.png",
    )
    cfg = commandline.parse(
        sample.Corel,
        ["--diffusion-checkpoint", "d", "--vae-checkpoint", "v", "--ddim-steps", "50"],
        presets=sample.PRESETS["corel"],
    )
    cfg.check()
    assert (cfg.scheduler, cfg.ddim_steps, cfg.steps) == ("ddim", None, 50)


def test_s1_the_pokemon_command_as_it_stands(tmp_path):
    """S1-01, S1-20: every flag of the document, but for the numbers that would take for ever and a text encoder that is here."""
    Image.fromarray(np.zeros((8, 8, 3), np.uint8)).save(tmp_path / "a.png")
    (tmp_path / "metadata.jsonl").write_text(json.dumps({"image": "a.png", "text": "a cheerful Koffing"}))
    encoder = tmp_path / "clip"
    shutil.copytree(TINY / "sd15" / "text_encoder", encoder)
    shutil.copytree(TINY / "sd15" / "tokenizer", encoder, dirs_exist_ok=True)
    argv = f"""--dataset_name={tmp_path} --resolution=32 --output_dir={tmp_path}/nouns_models --train_batch_size=3 --dataloader_num_workers=0
        --eval_batch_size=1 --num_epochs=2 --use_ema --gradient_accumulation_steps=4 --learning_rate=1e-4 --lr_warmup_steps=1000
        --mixed_precision=no --save_images_epoch=7 --ddpm_beta_schedule=squaredcos_cap_v2 --checkpointing_steps=2000
        --resume_from_checkpoint=latest --prediction_type=sample --logger=tensorboard --ddpm_num_inference_steps=2 --image_column=image --caption_column=text"""
    # TensorBoard's threads want a process of their own
    done = run("train.py", "pokemon", *argv.split(), "--text-encoder", encoder, env=os.environ)
    assert done.returncode == 0, done.stderr
    asked = json.loads((tmp_path / "nouns_models" / "run.json").read_text())["config"]
    assert (asked["beta_schedule"], asked["prediction_type"], asked["snr_weighting"], asked["adam_beta1"]) == (
        "squaredcos_cap_v2",
        "sample",
        True,
        0.95,
    )
    # S1-25: the caption's attention mask, kept with the model, so that sampling hides the padding too
    kept = json.loads((tmp_path / "nouns_models" / "model" / "text_encoder" / "config.json").read_text())
    assert kept["use_attention_mask"] is True
    events = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    log = events.EventAccumulator(str(next((tmp_path / "nouns_models" / "logs").rglob("events*")).parent)).Reload()
    assert {"loss", "lr"} <= set(log.Tags()["scalars"]) and len(log.Scalars("loss")) == 2


def test_s2_sizes_and_lengths_by_default():
    import train

    for stage, epochs in (("corel-vae", 300), ("corel-diffusion", 500)):
        cfg = commandline.parse(train.STAGES[stage][0], ["--data-dir", "d", "--vae-checkpoint", "v"][: 4 if stage == "corel-diffusion" else 2],
                           presets=train.PRESETS[stage])  # fmt: skip
        assert (cfg.resolution, cfg.epochs, cfg.batch_size, cfg.num_workers) == (128, epochs, 16, 4)


def test_help_of_a_documents_stage_shows_its_defaults():
    out = run("train.py", "corel-vae", "--help-all").stdout
    assert "[300]" in out and "[vae_models]" in out and "--preset NAME" not in out


def test_s4_the_documents_own_config(tmp_path):
    """Its adapters are the text encoder's: `transfer all` ends, and sample.py and `lora inspect` read PEFT's folder."""
    out, (student, teacher) = tmp_path / "output", (str(TINY / n) for n in ("sd15", "sdxl"))
    settings = {"prompt_source": "assets/prompts/dogs.json", "num_images_to_generate": 4, "base_model_id": student, "teacher_model_id": teacher,
                "sdxl_image_dir": f"{out}/sdxl_images/", "output_dir": f"{out}/", "seed": 42, "resolution": 64, "train_batch_size": 4,
                "num_train_epochs": 1, "learning_rate": 1e-4, "lr_scheduler": "cosine", "mixed_precision": "no", "gradient_accumulation_steps": 1,
                "use_lora": True, "lora_r": 16, "lora_alpha": 32, "lora_dropout": 0.1,
                "lora_target_modules": ["q_proj", "v_proj", "k_proj", "out_proj", "fc1", "fc2"], "eval_batch_size": 1, "num_inference_steps": 1,
                "guidance_scale": 7.5, "num_evaluation_prompts": 3}  # fmt: skip
    (tmp_path / "config.py").write_text(f"CONFIG = {settings!r}\n")
    done = run("distill.py", "transfer", "all", "--config", tmp_path / "config.py", "--teacher-resolution", 64)
    assert done.returncode == 0, done.stderr
    weights = out / "checkpoints" / "lora_weights"
    shown = run("-m", "nanodiff.lora", "inspect", weights, "--model", student)
    assert shown.returncode == 0 and "18 layers of text_encoder; rank 16; strength 2" in shown.stdout, shown.stdout[
        -500:
    ]
    done = run(
        "sample.py",
        "--model",
        student,
        "--lora",
        weights,
        "--prompt",
        "a",
        "--steps",
        1,
        "--output-dir",
        tmp_path / "s",
    )
    assert done.returncode == 0 and "18 layers" in done.stdout
    page = (out / "visualization" / "report.html").read_text()
    prompts = json.loads((out / "metrics" / "evaluation.json").read_text())["prompts"]
    assert (
        len(prompts) == 3
        and all(p in page for p in prompts.values())
        and "where finetuned differs from the teacher" in page
    )
    assert 'name="viewport"' in page and "prefers-color-scheme:dark" in page and '<div class="table">' in page
    assert page.index("<td>teacher</td>") < page.index("<td>seed</td>") < page.index("<td>kernels</td>")
