"""train.py: both stages end to end on a toy set, resume byte for byte, errors."""

import dataclasses
import filecmp
import json
import re
import shlex
import shutil
import signal
import subprocess
import time

import chaos
import numpy as np
import pytest
import torch
from PIL import Image
from util import ROOT, TINY, error_line, in_process, recipe, run, start

import train
from nanodiff import commandline, data, lora, pipeline, weights
from nanodiff.pipeline import control
from nanodiff.stories import training, vae
from nanodiff.training import build, loader


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(["red", "green", "blue", "yellow", "black", "white", "orange"]):
        Image.new("RGB", (24, 20 + i), name).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a {name} square")
    return root


def train_(stage, data, out, *argv):
    return run("train.py", stage, "--data", data, "--preset", "tiny", "--output-dir", out, "--seed", "3", *argv)


def metrics(out):
    return [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]


def same_tree(a, b):
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()) and files
    return all(filecmp.cmp(a / f, b / f, shallow=False) for f in files)


def test_vae_then_diffusion_then_sample(tmp_path, pictures):
    """S2-28 in small: train a VAE, a diffusion model in its latents, and sample from it."""
    done = train_("vae", pictures, tmp_path / "vae", "--max-steps", "4", "--sample-every", "2", "--log-every", "1")
    assert done.returncode == 0 and "psnr_db" in done.stdout, done.stderr
    assert (tmp_path / "vae" / "samples" / "000002.png").exists()
    assert (tmp_path / "vae" / "reconstructions" / "000002.png").exists()
    assert Image.open(tmp_path / "vae" / "training_losses.png").width > 300
    config = json.loads((tmp_path / "vae" / "model" / "config.json").read_text())
    assert config["scaling_factor"] not in (0.18215, 1.0), "measured on the data"
    done = train_("diffusion", pictures, tmp_path / "d", "--vae", tmp_path / "vae" / "model", "--resolution", "32",
                 "--max-steps", "4", "--sample-every", "2", "--ema-decay", "0.9")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = metrics(tmp_path / "d")
    assert Image.open(tmp_path / "d" / "loss.png").width > 300
    assert [line["step"] for line in lines] == [1, 2, 3, 4] and {"loss", "lr", "grad_norm"} <= lines[0].keys()
    assert (tmp_path / "d" / "samples" / "000004.png").exists()
    assert Image.open(tmp_path / "d" / "samples" / "progress.gif").n_frames == 2  # S1-29
    done = run(
        "sample.py",
        "--model",
        tmp_path / "d" / "model",
        "--prompt",
        "a red square",
        "--steps",
        "3",
        "--output-dir",
        tmp_path / "s",
    )
    assert done.returncode == 0 and Image.open(tmp_path / "s" / "00000.png").size == (32, 32), done.stderr


def test_pixel_space_resume_is_byte_equal(tmp_path, pictures):
    """Interrupted by SIGTERM at some step, resumed: the same files, byte for byte."""
    assert train_("diffusion", pictures, tmp_path / "whole", "--max-steps", "60").returncode == 0
    argv = [
        "train.py",
        "diffusion",
        "--data",
        pictures,
        "--preset",
        "tiny",
        "--output-dir",
        tmp_path / "cut",
        "--seed",
        "3",
        "--max-steps",
        "60",
    ]
    child = start(*argv, stderr=subprocess.PIPE)
    log = tmp_path / "cut" / "metrics.jsonl"
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143 and not (tmp_path / "cut" / "model").exists(), err
    done = train_("diffusion", pictures, tmp_path / "cut", "--max-steps", "60", "--resume", "auto")
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    assert same_tree(tmp_path / "whole" / "model", tmp_path / "cut" / "model")


def test_sampling_and_logging_do_not_change_training(tmp_path, pictures):
    train_("diffusion", pictures, tmp_path / "a", "--max-steps", "4", "--sample-every", "2", "--log-every", "1")
    train_("diffusion", pictures, tmp_path / "b", "--max-steps", "4", "--log-every", "3")
    assert same_tree(tmp_path / "a" / "model", tmp_path / "b" / "model")


def test_seed_matters(tmp_path, pictures):
    for seed in "34":
        train_("diffusion", pictures, tmp_path / seed, "--max-steps", "2", "--seed", seed)
    assert not same_tree(tmp_path / "3" / "model", tmp_path / "4" / "model")


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_prediction_types_train_and_sample(tmp_path, pictures, prediction):
    """S1-12"""
    done = train_(
        "diffusion", pictures, tmp_path / "o", "--max-steps", "2", "--prediction-type", prediction, "--min-snr", "5"
    )
    assert done.returncode == 0, done.stderr
    sd = pipeline.load(tmp_path / "o" / "model")
    assert sd.schedule.prediction == prediction
    assert sd.generate(["a red square"], steps=2, seeds=[0]).pixels.isfinite().all()


def test_loss_goes_down(tmp_path, pictures):
    done = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "150", "--lr", "3e-3", "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data", "none"], "none: no such folder"),
        (["--batch-size", "0"], "--batch-size"),
        (["--resume", "checkpoint-9"], "checkpoint-9"),
        (["--vae", "no/vae"], "no/vae: VAE checkpoint not found"),
        (["--mixed-precision", "fp16", "--device", "cpu"], "fp16"),
        (["--lr-scheduler", "x"], "invalid choice: 'x'"),
        (["--max-steps", "-5"], "--max-steps -5"),
        (["--max-length", "1"], "--max-length 1"),
        (["--caption-dropout", "5"], "--caption-dropout 5"),
        (["--batchsize", "3"], "did you mean --batch-size"),
        (["--vae", "assets/nano/unet"], "is no VAE"),
        (["--vae", "assets/nano/vae", "--resolution", "18"], "--resolution 18 must be a multiple of 4"),
        (["--lora"], "--lora needs a --model"),
        (["--model", "assets/nano", "--prediction-type", "epsilon"], "predicts v_prediction"),
        (
            ["--model", "assets/nano", "--resolution", "64", "--lora", "--lora-targets", "to_x"],
            "no layer of assets/nano has such a name",
        ),
        (["--condition", "labels"], "7 pictures have no label"),
        (
            ["--model", "assets/nano", "--resolution", "64", "--lora", "--lora-targets", "attn2.to_k,qq_proj"],
            "qq_proj: no layer of",
        ),
        (
            [
                "--model",
                "assets/nano",
                "--resolution",
                "64",
                "--lora",
                "--train-text-encoder",
                "--lora-targets",
                "attn2.to_k",
            ],
            "none of them is in the text_encoder",
        ),
        (["--model", "assets/nano", "--resolution", "64", "--lora", "--lora-alpha", "0"], "--lora-alpha"),
        (["--model", "assets/nano", "--resolution", "64", "--lora", "--lora-alpha-pattern", "to_k=0"], "is no alpha"),
        (["--parallel", "fsdp"], "needs torchrun"),
        (["--text-encoder", "no/such"], "no/such: it is not in the cache"),
        (["--report-to", "wandb"], "--report-to wandb"),
        (["--push-to-hub"], "--push-to-hub: HF_HUB_OFFLINE"),
        (["--model-config", "assets/nano/unet/config.json"], "in_channels 4, but the pictures have 3"),
        (["--caption-column", "words"], "--caption-column words"),
        (["--seed", "-1"], "--seed -1"),
        (["--snr-clip", "5"], "--snr-clip is for --snr-weighting"),
        (["--sample-prompts", "none.txt"], "--sample-prompts none.txt: no such file"),
        (["--model", "assets/nano", "--resolution", "64", "--vae", "assets/nano/vae"], "--vae is for new models"),
        (["--model", "assets/nano", "--lora-rank", "8"], "--lora-… are settings of --lora"),
        (["--timestep-sampling", "logit_normal"], "--timestep-sampling is for flows; this model predicts v_prediction"),
        (["--snr-weighting"], "--snr-weighting is for --prediction-type sample"),
        (["--prediction-type", "sample", "--snr-weighting", "--min-snr", "5"], "are two weightings of one loss"),
        (["--prediction-type", "flow", "--zero-snr"], "--zero-snr: a flow has no betas"),
        (["--prediction-type", "flow", "--beta-schedule", "linear"], "--beta-schedule: a flow has no betas"),
        (["--prediction-type", "epsilon", "--zero-snr"], "--zero-snr: at the last timestep"),
        (
            ["--prediction-type", "flow", "--timestep-mean", "1"],
            "--timestep-mean is for --timestep-sampling logit_normal",
        ),
        (["--text-encoder", TINY / "sd15", "--max-length", "9"], "has its own (77)"),
        (["--condition", "none", "--max-length", "9"], "--max-length is for captions"),
        (["--condition", "none", "--text-encoder", "/nowhere"], "--text-encoder is for captions"),
        (
            ["--ddpm-num-steps", "10", "--sample-every", "2"],
            "--sample-steps 25: must be between 1 and the 10 timesteps",
        ),
        (["--model", "assets/world", "--resolution", "256"], "--resolution can be at most 128"),
    ],
)
def test_bad_input_is_one_line(tmp_path, pictures, argv, says):
    assert says in error_line(train_("diffusion", pictures, tmp_path / "o", *argv))


def test_what_is_off_is_no_mistake(tmp_path, pictures):
    """Settings that ask for nothing, also where another prediction type has them; a preset's adapters, switched off."""
    off = ["--timestep-sampling", "uniform", "--timestep-shift", "1", "--no-snr-weighting"]
    assert train_("diffusion", pictures, tmp_path / "a", "--max-steps", "1", *off).returncode == 0
    off = ["--prediction-type", "flow", "--no-zero-snr", "--text-encoder", TINY / "sd15", "--max-length", "77"]
    empty = ["--sample-every", "1", "--sample-prompts", "", "--sample-prompts", "a red square"]
    assert train_("diffusion", pictures, tmp_path / "b", "--max-steps", "1", *off, *empty).returncode == 0
    cfg = commandline.parse(train.DiffusionConfig, ["--preset", "corel-lora", "--no-lora", "--data", str(pictures), "--output-dir", "x"],
                            presets=train.PRESETS["diffusion"])  # fmt: skip
    cfg.check()


def test_a_mistake_loses_nothing_of_an_older_run(tmp_path, pictures):
    done = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "2")
    assert done.returncode == 0, done.stderr
    before = sorted(p.relative_to(tmp_path) for p in (tmp_path / "o").rglob("*"))
    for argv in (["--sample-prompts", "nofile.txt"], ["--ddpm-num-steps", "10"]):
        again = train_("diffusion", pictures, tmp_path / "o", "--overwrite-output-dir", "--sample-every", "1", *argv)
        error_line(again)
    assert sorted(p.relative_to(tmp_path) for p in (tmp_path / "o").rglob("*")) == before


def test_what_lies_beneath_and_is_another_is_said(tmp_path, pictures):
    """A run that goes on with another VAE or text encoder than it began with says so, whatever their paths say."""
    for part in ("vae", "text_encoder", "tokenizer"):
        shutil.copytree(ROOT / "assets" / "nano" / part, tmp_path / "beneath" / part)
    shutil.copy(ROOT / "assets" / "nano" / "model_index.json", tmp_path / "beneath")
    argv = ["--vae", tmp_path / "beneath" / "vae", "--text-encoder", tmp_path / "beneath", "--checkpointing-steps", "1"]
    first = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "1", *argv)
    again = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "2", "--resume", *argv)
    assert first.returncode == again.returncode == 0, first.stderr + again.stderr
    assert "is not what it was" not in again.stderr
    for part in ("vae/diffusion_pytorch_model", "text_encoder/model"):
        path = tmp_path / "beneath" / f"{part}.safetensors"
        before = path.read_bytes()
        weights.save_tensors(path, {k: v * 1.01 for k, v in weights.load_tensors(path).items()})
        other = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "2", "--resume", *argv)
        assert other.returncode == 0 and "the VAE, text encoder or model beneath is not what it was" in other.stderr
        path.write_bytes(before)


def test_a_constant_rate_has_no_warm_up_and_says_so(tmp_path, pictures):
    argv = ["--max-steps", "1", "--log-every", "1", "--lr", "1e-3", "--lr-warmup-steps", "9", "--lr-scheduler"]
    rates = {}
    for kind in ("constant", "constant_with_warmup"):
        done = train_("diffusion", pictures, tmp_path / kind, *argv, kind)
        rates[kind] = metrics(tmp_path / kind)[0]["lr"]
        assert done.returncode == 0 and ("--lr-warmup-steps does nothing" in done.stderr) == (kind == "constant")
    assert rates == {"constant": 1e-3, "constant_with_warmup": pytest.approx(1e-3 / 9)}


def test_a_short_schedule_draws_by_its_own_number_of_steps(tmp_path, pictures):
    done = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "1", "--ddpm-num-steps", "10")
    assert done.returncode == 0, done.stderr
    assert pipeline.load(tmp_path / "o" / "model").generate(["a"], seeds=[0]).pixels.isfinite().all()


def test_a_model_is_never_half_of_two_updates(tmp_path, pictures, monkeypatch):
    """The process ends amid the second best_model: what is there is the first one, whole."""
    from nanodiff.pipeline import base

    save, calls = base.Pipeline.save, []
    written = lambda folder: {p.name: p.stat().st_mtime_ns for p in folder.rglob("*.safetensors")}  # noqa: E731

    def ends(self, folder, *args):
        save(self, folder, *args)
        calls.append(written(folder))
        if len(calls) == 2:
            raise KeyboardInterrupt

    monkeypatch.setattr(base.Pipeline, "save", ends)
    argv = [
        "diffusion",
        "--data",
        pictures,
        "--preset",
        "tiny",
        "--epochs",
        "9",
        "--max-steps",
        "8",
        "--keep-best",
        "--output-dir",
        tmp_path / "o",
    ]
    code, _, err = in_process(train, "train.py", *argv)
    assert code == 130 and len(calls) == 2, err
    first, second = written(tmp_path / "o" / "best_model"), calls[1]
    assert len(first) == len(second) == 2 and max(first.values()) < min(second.values())
    assert not list((tmp_path / "o").glob("best_model.*"))  # nor does its half take room


def test_captions_that_are_cut_are_said_where_the_text_encoder_learns(tmp_path, pictures):
    long = tmp_path / "long"
    shutil.copytree(pictures, long)
    for path in long.glob("*.txt"):
        path.write_text("red square " * 30)
    done = train_("diffusion", long, tmp_path / "o", "--max-steps", "2")
    assert done.returncode == 0 and done.stderr.count("captions of more than 14 tokens are cut, such as") == 1, (
        done.stderr
    )
    done = train_("diffusion", pictures, tmp_path / "p", "--max-steps", "2")
    assert "are cut" not in done.stderr


def test_held_out_pictures_that_cannot_be_read_are_said(tmp_path, pictures):
    bad = tmp_path / "bad"
    shutil.copytree(pictures, bad)
    files = sorted(bad.glob("*.png"))
    for path in files:
        path.write_bytes(b"no picture")
    good = sorted(pictures.glob("*.png"))
    order = np.argsort([loader.content(3, "held out", path.name) for path in files])
    for i in order[2:]:  # all but those held out
        shutil.copy(good[i], files[i])
    shutil.copy(good[order[0]], files[order[0]])
    done = train_("diffusion", bad, tmp_path / "o", "--max-steps", "2", "--validation", str(2 / len(files)), "--on-bad-image", "skip", "--bad-image-limit", "0.9")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert "1 pictures cannot be read and were replaced; see bad_images_held_out.jsonl" in done.stderr
    assert (tmp_path / "o" / "bad_images_held_out.jsonl").exists() and not (
        tmp_path / "o" / "bad_images.jsonl"
    ).exists()


def test_held_out_pictures_stay_so_when_others_come(tmp_path, pictures):
    """Else a run that goes on would judge itself by what it has learned."""
    cfg = train.DiffusionConfig(data=str(pictures), output_dir=str(tmp_path / "o"), validation=0.3)
    _, before = training.load_data(cfg, True)
    more = shutil.copytree(pictures, tmp_path / "more")
    first = sorted(more.glob("*.png"))[0]
    shutil.copy(first, more / "aaa.png")
    shutil.copy(first.with_suffix(".txt"), more / "aaa.txt")
    _, after = training.load_data(dataclasses.replace(cfg, data=str(more)), True)
    assert len(before) == len(after) == 2 and len(set(before.keys) - set(after.keys)) <= 1
    kept, _ = training.load_data(dataclasses.replace(cfg, data=str(more)), True)
    assert set(kept.keys) | set(after.keys) == {*data.load(more).keys}


def test_a_picture_that_breaks_amid_a_run_costs_no_update(tmp_path, pictures):
    bad = shutil.copytree(pictures, tmp_path / "bad")
    sorted(bad.glob("*.png"))[3].write_bytes(b"")
    done = train_(
        "diffusion", bad, tmp_path / "o", "--max-steps", "9", "--batch-size", "1", "--no-cache", "--seed", "4"
    )
    assert done.returncode == 2 and "the updates so far are in" in done.stderr, done.stderr
    kept = [p for p in (tmp_path / "o").glob("checkpoint-*") if p.is_dir()]
    rows = (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()
    assert [p.name for p in kept] == [f"checkpoint-{len(rows)}"] and 0 < len(rows) < 8


def test_settings_of_a_file_count_as_said(tmp_path, pictures):
    """Its epochs win over a preset's or the default updates; what a flag may not say, it may not either."""
    file = tmp_path / "c.json"
    parsed = lambda text, *argv: (file.write_text(text), commandline.parse(train.DiffusionConfig, ["--preset", "tiny", "--config", str(file), *argv],  # noqa: E731
                                                                          presets=train.PRESETS["diffusion"]))[1]  # fmt: skip
    for text, argv, want in (
        ('{"epochs": 1}', (), (1, 0)),
        ('{"epochs": 1, "max_steps": 7}', (), (1, 7)),
        ('{"epochs": 1}', ("--max-steps", "5"), (1, 5)),
        ('{"max_steps": 7}', ("--epochs", "3"), (3, 0)),
    ):
        cfg = parsed(text, *argv)
        cfg.check_ranges()
        assert (cfg.epochs, cfg.max_steps) == want, (text, argv)
    file.write_text('{"condition": "none"}')
    done = train_(
        "diffusion",
        pictures,
        tmp_path / "o",
        "--max-steps",
        "1",
        "--model",
        TINY / "sd15",
        "--resolution",
        "32",
        "--config",
        file,
    )
    assert "--condition none" in error_line(done) and "told by captions" in done.stderr
    done = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "1", "--model", TINY / "sd15", "--resolution", "32", "--config", file,
                  "--condition", "text")  # fmt: skip
    assert done.returncode == 0, done.stderr


def test_a_runs_own_record_is_a_config(tmp_path, pictures):
    """run.json names every setting of a run; flags win over it."""
    done = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "1", "--lr", "3e-3")
    assert done.returncode == 0, done.stderr
    cfg = commandline.parse(train.DiffusionConfig, ["--config", str(tmp_path / "o" / "run.json"), "--max-steps", "3"], presets=train.PRESETS["diffusion"])  # fmt: skip
    assert (cfg.lr, cfg.max_steps, cfg.data, cfg.vocab_size) == (3e-3, 3, str(pictures), 600)
    # what was none stays none, whatever a preset says now
    record = json.loads((tmp_path / "o" / "run.json").read_text())
    record["config"]["checkpoints_total_limit"] = None
    (tmp_path / "none.json").write_text(json.dumps(record))
    cfg = commandline.parse(train.DiffusionConfig, ["--config", str(tmp_path / "none.json")], presets=train.PRESETS["diffusion"])  # fmt: skip
    assert cfg.checkpoints_total_limit is None


def test_required_flags(tmp_path):
    assert "--data is required" in error_line(run("train.py", "vae", "--output-dir", tmp_path))
    assert "--output-dir is required" in error_line(run("train.py", "vae", "--data", tmp_path))


S1 = (  # the document's command, as it stands (its data set as a local copy)
    '--dataset_name="DATA" --resolution=32 --output_dir=OUT --train_batch_size=3 --dataloader_num_workers=4 '
    "--eval_batch_size=1 --num_epochs=20000000 --use_ema --gradient_accumulation_steps=4 --learning_rate=1e-4 "
    '--lr_warmup_steps=1000 --mixed_precision="no" --save_images_epoch=7 --ddpm_beta_schedule="squaredcos_cap_v2" '
    '--checkpointing_steps=2000 --resume_from_checkpoint="latest" --prediction_type="sample" --logger="wandb" '
    '--image_column="image" --caption_column="text"'
)


def test_the_s1_command_parses_unchanged():
    """S1-01"""
    cfg = commandline.parse(
        train.DiffusionConfig, ["--preset", "pokemon", *shlex.split(S1)], presets=train.PRESETS["diffusion"]
    )
    assert (cfg.data, cfg.output_dir, cfg.resolution, cfg.batch_size, cfg.grad_accum) == ("DATA", "OUT", 32, 3, 4)
    assert (cfg.ema, cfg.ema_decay, cfg.save_images_epochs, cfg.beta_schedule) == (True, 0.9999, 7, "squaredcos_cap_v2")
    assert (cfg.resume, cfg.prediction_type, cfg.report_to, cfg.snr_weighting) == ("latest", "sample", "wandb", True)
    assert (cfg.image_column, cfg.caption_column, cfg.num_workers, cfg.eval_batch_size) == ("image", "text", 4, 1)


def test_the_s1_defaults():
    """S1-05 to S1-18"""
    cfg = commandline.parse(train.DiffusionConfig, ["--preset", "pokemon"], presets=train.PRESETS["diffusion"])
    got = (
        cfg.output_dir,
        cfg.resolution,
        cfg.batch_size,
        cfg.eval_batch_size,
        cfg.num_workers,
        cfg.epochs,
        cfg.grad_accum,
    )
    assert got == ("ddpm-model-64", 64, 16, 16, 0, 100, 1)
    got = (
        cfg.lr,
        cfg.lr_warmup_steps,
        cfg.lr_scheduler,
        cfg.adam_beta1,
        cfg.adam_beta2,
        cfg.adam_weight_decay,
        cfg.adam_epsilon,
    )
    assert got == (1e-4, 500, "cosine", 0.95, 0.999, 1e-6, 1e-8)
    got = (cfg.ema_inv_gamma, cfg.ema_power, cfg.ema_decay, cfg.mixed_precision, cfg.prediction_type, cfg.beta_schedule)
    assert got == (1.0, 0.75, 0.9999, "no", "epsilon", "linear")
    got = (
        cfg.ddpm_num_steps,
        cfg.save_images_epochs,
        cfg.save_model_epochs,
        cfg.checkpointing_steps,
        cfg.max_grad_norm,
    )
    assert got == (1000, 50, 150, 5500, 1.0)
    assert cfg.checkpoints_total_limit is None and not cfg.center_crop and not cfg.random_flip


def test_the_s2_defaults():
    """S2-04 to S2-09, S2-14 to S2-21"""
    cfg = commandline.parse(train.VAEConfig, ["--preset", "corel"], presets=train.PRESETS["vae"])
    got = (cfg.output_dir, cfg.epochs, cfg.batch_size, cfg.lr, cfg.num_workers, cfg.seed, cfg.latent_dim)
    assert got == ("vae_models", 300, 16, 1e-4, 4, 42, 128)
    got = (
        cfg.kl_weight,
        cfg.kl_warmup,
        cfg.kl_target,
        cfg.perceptual,
        cfg.perceptual_weight,
        cfg.resolution,
        cfg.max_grad_norm,
    )
    assert got == (1.0, 150, 25.0, True, 0.03, 128, 1.0)
    assert (cfg.random_flip, cfg.random_jitter, cfg.adam_weight_decay, cfg.checkpoint_epochs) == (True, 0.1, 1e-5, 20)
    cfg = commandline.parse(train.DiffusionConfig, ["--preset", "corel"], presets=train.PRESETS["diffusion"])
    got = (
        cfg.output_dir,
        cfg.epochs,
        cfg.batch_size,
        cfg.grad_accum,
        cfg.lr,
        cfg.resolution,
        cfg.num_workers,
        cfg.ema_decay,
    )
    assert got == ("diffusion_models", 500, 16, 1, 1e-4, 128, 4, 0.995)
    got = (cfg.beta_schedule, cfg.lr_scheduler, cfg.lr_min, cfg.lr_first_cycle, cfg.early_stopping_patience)
    assert got == ("linear", "cosine_warm_restarts", 1e-5, 50, 30)
    got = (
        cfg.early_stopping_delta,
        cfg.oscillation_window,
        cfg.oscillation_threshold,
        cfg.save_images_epochs,
        cfg.checkpoint_epochs,
    )
    assert got == (1e-5, 10, 0.0005, 10, 10)


def test_help_lists_every_option_with_its_default():
    """S1-24: --help-all; --help is what people use first, and says where the rest is."""
    done = run("train.py", "diffusion", "--help-all")
    assert done.returncode == 0
    for field in dataclasses.fields(train.DiffusionConfig):
        name = field.name.replace("_", "-")
        assert f"  --{name}" in done.stdout or f"  --[no-]{name}" in done.stdout, field.name
    short = run("train.py", "diffusion", "--help").stdout
    assert (
        "--help-all" in short and len(short.splitlines()) <= 120 and "--lr X" in short and "--adam-epsilon" not in short
    )
    assert "[0.0005]" in done.stdout and "[scaled_linear]" in done.stdout


def test_the_pokemon_unet_is_the_documents():
    """S1-26: eight levels, 59.5 M parameters, runs at 32 px although 2^7 > 32."""
    cfg = commandline.parse(
        train.DiffusionConfig, ["--preset", "pokemon", "--resolution", "32"], presets=train.PRESETS["diffusion"]
    )
    text = type("Text", (), {"hidden_size": 768, "projection_dim": 768})
    with torch.device("meta"):
        net = build.make_denoiser(cfg.model_size, cfg.resolution, text)
        out = net(torch.empty(1, 3, 32, 32), torch.zeros(1), torch.empty(1, 77, 768))
    assert out.shape == (1, 3, 32, 32) and round(sum(p.numel() for p in net.parameters()) / 1e6, 1) == 59.5


def test_new_models_predict_nothing(tmp_path):
    """Residual ends and the output begin at zero."""
    for size in ("tiny", "mmdit-tiny"):
        cfg = commandline.parse(train.DiffusionConfig, ["--model-size", size, "--resolution", "16"])
        text = type("Text", (), {"hidden_size": 32, "projection_dim": 32})
        net = build.make_denoiser(cfg.model_size, cfg.resolution, text)
        build.init(net, None)
        told = (torch.randn(2, 7, 32), torch.randn(2, 32))[: 1 if size == "tiny" else 2]
        assert net(torch.randn(2, 3, 16, 16), torch.tensor([1, 500]), *told).abs().max() == 0


@pytest.mark.parametrize(
    ("name", "argv", "prompt"),
    [
        ("mmdit flow", ["--model-size", "mmdit-tiny", "--prediction-type", "flow", "--timestep-sampling", "logit_normal",
                        "--timestep-shift", "3"], "a red square"),
        ("unet flow", ["--prediction-type", "flow"], "a red square"),
        ("unconditional", ["--condition", "none"], None),
        ("mmdit unconditional", ["--condition", "none", "--model-size", "mmdit-tiny"], None),
        ("frozen CLIP", ["--text-encoder", "tests/golden/tiny/sd15"], "a red square"),
        ("everything", ["--offset-noise", "0.1", "--gradient-checkpointing", "--random-flip", "--random-jitter", "0.1",
                        "--random-rotate", "5", "--no-center-crop", "--num-workers", "2", "--snr-weighting", "--snr-clip", "5",
                        "--prediction-type", "sample", "--lr-scheduler", "cosine_with_restarts", "--mixed-precision", "bf16"],
         "a red square"),
    ],
)  # fmt: skip
def test_kinds_of_models_train_and_draw(tmp_path, pictures, name, argv, prompt):
    done = train_("diffusion", pictures, tmp_path / "o", "--max-steps", "3", "--sample-every", "3", "--sample-steps", "2",
                  "--eval-batch-size", "2", *argv)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "o" / "samples" / "denoising.png").exists(), "S1-29"
    asked = ["--prompt", prompt] if prompt else ["--num-images", "2"]
    done = run(
        "sample.py",
        "--model",
        tmp_path / "o" / "model",
        *asked,
        "--steps",
        "2",
        "--seed",
        "1",
        "--output-dir",
        tmp_path / "s",
    )
    assert done.returncode == 0 and Image.open(tmp_path / "s" / "00000.png").size == (16, 16), done.stderr


def test_class_labels(tmp_path):
    for label, colour in (("cat", "orange"), ("dog", "brown")):
        (tmp_path / "d" / label).mkdir(parents=True)
        Image.new("RGB", (16, 16), colour).save(tmp_path / "d" / label / "0.png")
    done = train_("diffusion", tmp_path / "d", tmp_path / "o", "--max-steps", "2", "--condition", "labels")
    assert done.returncode == 0, done.stderr
    argv = [
        "sample.py",
        "--model",
        tmp_path / "o" / "model",
        "--steps",
        "2",
        "--seed",
        "1",
        "--output-dir",
        tmp_path / "s",
    ]
    assert run(*argv, "--prompt", "cat").returncode == 0
    assert "'cats' is no label of this model; it knows cat, dog; did you mean cat" in error_line(
        run(*argv, "--prompt", "cats")
    )
    assert "--prompt is required" in error_line(run(*argv))


@pytest.mark.slow
def test_the_corel_workflow(tmp_path):
    """S2-28, S2-29: the document's four steps with its file names, relative paths from --base-dir; absolute ones as they are."""
    base = tmp_path / "elsewhere"
    assert run("-m", "nanodiff.corel", "stand-in", base / "data" / "corel").returncode == 0
    assert run("-m", "nanodiff.data", "prepare-corel", "--data-dir", "data/corel", "--base-dir", base).returncode == 0
    small = ["--num-workers", "0", "--save-images-epochs", "1", "--resolution", "32", "--max-samples", "12", "--batch-size", "4",
             "--base-dir", base]  # fmt: skip
    done = run("train.py", "vae", "--preset", "corel", "--data-dir", "training_data/corel/corel_all", "--output-dir", "vae_models",
               "--epochs", "2", "--kl-warmup", "1", "--latent-dim", "32", "--no-perceptual", *small)  # fmt: skip
    assert done.returncode == 0, done.stderr
    vae = base / "vae_models"
    for path in (
        "best_model/config.json",
        "training_losses.png",
        "samples/000003.png",
        "reconstructions/000006.png",
        "model",
    ):
        assert (vae / path).exists(), path
    assert json.loads((vae / "best_model" / "config.json").read_text())["latent_dim"] == 32
    done = run("train.py", "diffusion", "--preset", "corel", "--vae-checkpoint", "vae_models/best_model.pt", "--image-dir",
               "training_data/corel/corel_all", "--output-dir", "diffusion_models", "--epochs", "2", "--sample-steps", "3",
               "--eval-batch-size", "4", "--no-mixed-precision", *small)  # fmt: skip
    assert done.returncode == 0, done.stderr
    for path in ("best_model/model_index.json", "loss.png", "samples/000003.png", "checkpoint-6"):
        assert (base / "diffusion_models" / path).exists(), path
    done = run("sample.py", "--diffusion-checkpoint", "diffusion_models/best_model.pt", "--vae-checkpoint", "vae_models/best_model.pt",
               "--num-images", "5", "--batch-size", "4", "--ddim-steps", "2", "--output", "corel.png", "--seed", "1", "--base-dir", base,
               "--output-dir", "generated")  # fmt: skip
    assert done.returncode == 0 and (base / "corel.png").exists(), done.stderr
    assert len(list((base / "corel_individual").glob("image_*.png"))) == 5, "S2-37: as many as were asked for"
    done = run("sample.py", "--diffusion-checkpoint", base / "diffusion_models" / "best_model.pt", "--vae-checkpoint",
               base / "vae_models" / "best_model.pt", "--num-images", "5", "--batch-size", "4", "--ddim-steps", "2", "--output",
               tmp_path / "cloud.png", "--seed", "1", "--base-dir", tmp_path / "another", "--output-dir", tmp_path / "cloud")  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert Image.open(tmp_path / "cloud.png").tobytes() == Image.open(base / "corel.png").tobytes()
    assert not (tmp_path / "another").exists(), "absolute paths are not under --base-dir"


def test_s2_faults_are_one_line(tmp_path, pictures):
    """S2-03, S2-09, S2-14"""
    assert "No images found" in error_line(
        run("train.py", "vae", "--data-dir", tmp_path, "--output-dir", tmp_path / "o")
    )
    corel = ["train.py", "vae", "--preset", "corel", "--data-dir", pictures, "--output-dir", tmp_path / "o"]
    assert "--vgg-weights FILE" in error_line(run(*corel)) and "--no-perceptual" in error_line(run(*corel))
    warm = ["train.py", "vae", "--preset", "corel", "--no-perceptual", "--epochs", "100", "--data-dir", pictures]
    assert "--kl-warmup 150 epochs would not end" in error_line(run(*warm, "--output-dir", tmp_path / "o"))
    gone = error_line(train_("diffusion", pictures, tmp_path / "o", "--vae-checkpoint", tmp_path / "best_model.pt"))
    assert "VAE checkpoint not found" in gone


def test_perceptual_loss_from_local_weights(tmp_path, pictures):
    from nanodiff.models.lpips import VGG16
    from nanodiff.weights import save_tensors

    save_tensors(tmp_path / "vgg.safetensors", recipe(VGG16(), "vgg16"))
    lins = ROOT / "assets" / "lpips" / "vgg_lin_v0.1.safetensors"
    for more in ([], ["--lpips-weights", lins]):
        out = tmp_path / f"o{len(more)}"
        done = train_("vae", pictures, out, "--max-steps", "2", "--perceptual-weight", "0.5", "--vgg-weights",
                      tmp_path / "vgg.safetensors", *more)  # fmt: skip
        assert done.returncode == 0 and metrics(out)[0]["perceptual"] > 0, done.stderr
    # what is refused takes nothing of an older run with it
    kept = sorted(p.name for p in out.iterdir())
    again = train_("vae", pictures, out, "--max-steps", "2", "--perceptual-weight", "0.5", "--overwrite-output-dir")
    assert "--vgg-weights" in error_line(again) and sorted(p.name for p in out.iterdir()) == kept and "model" in kept


def test_kl_weight_and_best_model(tmp_path, pictures):
    """S2-07, S2-08: linear warm-up; then the weight moves towards the target."""
    out = tmp_path / "o"
    done = train_("vae", pictures, out, "--epochs", "6", "--max-steps", "0", "--batch-size", "7", "--kl-weight", "0.5", "--kl-warmup",
                  "4", "--kl-target", "5", "--keep-best")  # fmt: skip
    assert done.returncode == 0, done.stderr
    weights = [line["kl_weight"] for line in metrics(out)]
    assert weights[:5] == pytest.approx([0, 0.125, 0.25, 0.375, 0.5]) and weights[5] != weights[4]


def test_a_vae_goes_on_from_another(tmp_path, pictures):
    """--model: its weights, size and config are the beginning; a pipeline's folder will do; what only a new one can be given is refused."""
    done = train_(
        "vae",
        pictures,
        tmp_path / "a",
        "--model",
        ROOT / "assets" / "nano",
        "--max-steps",
        "1",
        "--lr",
        "1e-9",
        "--no-ema",
    )
    assert done.returncode == 0, done.stderr
    config = json.loads((tmp_path / "a" / "model" / "config.json").read_text())
    given = json.loads((ROOT / "assets" / "nano" / "vae" / "config.json").read_text())
    assert {k for k in given if given[k] != config[k]} == {"scaling_factor"}
    numbers = f"scaling_factor is {config['scaling_factor']:g} on these pictures, {given['scaling_factor']:g} in "
    assert numbers in done.stdout + done.stderr
    own = weights.load_tensors(tmp_path / "a" / "model" / "diffusion_pytorch_model.safetensors")
    for name, value in weights.load_tensors(
        ROOT / "assets" / "nano" / "vae" / "diffusion_pytorch_model.safetensors"
    ).items():
        assert torch.allclose(own[name], value.float(), atol=1e-7), name
    for flags, line in (
        (("--latent-dim", "32"), "--latent-dim is for a new VAE; --model brings its own"),
        (("--resolution", "48"), None),
    ):
        done = train_("vae", pictures, tmp_path / "b", "--model", ROOT / "assets" / "nano", "--max-steps", "1", *flags)
        assert done.returncode == (2 if line else 0) and (line or "") in done.stderr, done.stderr
    done = train_("vae", pictures, tmp_path / "c", "--model", tmp_path / "nothing", "--max-steps", "1")
    assert done.returncode == 2 and "VAE checkpoint not found" in done.stderr


def test_the_best_vae_is_one_after_the_warm_up(tmp_path, pictures, monkeypatch):
    """S2-39: epochs of the warm-up, though judged better, are not it; of those after it the best is."""
    judged, kept, write = iter([0.4, 0.1, 0.2, 5.0, 4.0, 6.0]), [], vae.write_vae
    monkeypatch.setattr(training, "validate", lambda *args: next(judged))
    monkeypatch.setattr(vae, "write_vae", lambda run, *args: (kept.append((args[-1], run.step)), write(run, *args)))
    code, _, err = in_process(
        train, "train.py", "vae", "--data", pictures, "--preset", "tiny", "--epochs", 6, "--max-steps", 0, "--batch-size", 9,
        "--validation", 0.3, "--kl-warmup", 3, "--keep-best", "--output-dir", tmp_path / "o",
    )  # fmt: skip
    assert code == 0, err
    assert kept == [("best_model", 3), ("best_model", 4), ("model", 6)]
    assert (tmp_path / "o" / "best_model" / "config.json").exists()


def test_validation_plateau_and_early_stop(tmp_path, pictures):
    done = train_("diffusion", pictures, tmp_path / "o", "--validation", "0.3", "--epochs", "9", "--max-steps", "0", "--keep-best",
                  "--lr-scheduler", "plateau", "--early-stopping-patience", "2", "--early-stopping-delta", "10")  # fmt: skip
    assert done.returncode == 0 and "early stopping: 2 epochs" in done.stderr, done.stderr
    assert (tmp_path / "o" / "best_model" / "model_index.json").exists() and metrics(tmp_path / "o")[-1]["epoch"] == 3


def test_epochs_are_counted_by_the_data(tmp_path, pictures):
    """S0-31, S2-38, S2-41: 7 pictures in groups of 4 are two updates an epoch; fewer pictures than a batch are one."""
    done = train_(
        "diffusion",
        pictures,
        tmp_path / "a",
        "--epochs",
        "3",
        "--max-steps",
        "0",
        "--batch-size",
        "2",
        "--grad-accum",
        "2",
    )
    assert done.returncode == 0 and [m["epoch"] for m in metrics(tmp_path / "a")] == [1, 1, 2, 2, 3, 3], done.stderr
    done = train_("diffusion", pictures, tmp_path / "b", "--epochs", "3", "--max-steps", "0", "--batch-size", "100")
    assert done.returncode == 0 and len(metrics(tmp_path / "b")) == 3 and "7 pictures are fewer" in done.stderr


def test_lora_and_full_fine_tuning(tmp_path, pictures):
    argv = ["--model", "assets/nano", "--resolution", "64", "--max-steps", "2", "--lr", "1e-2"]
    done = train_("diffusion", pictures, tmp_path / "l", *argv, "--lora", "--lora-rank", "3", "--train-text-encoder")
    assert done.returncode == 0 and "M frozen" in done.stderr, done.stderr
    file = tmp_path / "l" / "model" / "pytorch_lora_weights.safetensors"
    sd = pipeline.load("assets/nano")
    read = lora.read(file, sd.models())
    assert {d.component for d in read.deltas} == {"unet", "text_encoder"} and all(
        d.down.shape[0] == 3 for d in read.deltas
    )
    before = sd.generate(["fire"], steps=2, seeds=[0]).pixels
    lora.attach(sd.models(), read)
    sd.kept.clear()
    assert not torch.equal(before, sd.generate(["fire"], steps=2, seeds=[0]).pixels)
    done = train_("diffusion", pictures, tmp_path / "f", *argv)
    assert done.returncode == 0 and pipeline.load(tmp_path / "f" / "model").schedule.prediction == "v_prediction", (
        done.stderr
    )


def test_extras_log_where_they_should(tmp_path, pictures, monkeypatch):
    pytest.importorskip("tensorboard")
    done = train_("diffusion", pictures, tmp_path / "o", "--report-to", "tensorboard", "--max-steps", "2")
    assert done.returncode == 0 and list((tmp_path / "o" / "logs").glob("events*")), done.stderr
    (tmp_path / "file").write_text("")
    done = train_(
        "diffusion", pictures, tmp_path / "p", "--report-to", "tensorboard", "--logging-dir", tmp_path / "file" / "logs"
    )
    assert "logs: TensorBoard's log cannot be written" in error_line(done)


@pytest.mark.parametrize("argv", [
    ["vae", "--preset", "corel"],
    ["diffusion", "--preset", "sd15", "--world-size", "1024", "--batch-size", "4"],
    ["diffusion", "--preset", "sd35-medium", "--parallel", "fsdp", "--world-size", "64", "--gradient-checkpointing"],
    ["diffusion", "--preset", "pokemon", "--resolution", "32", "--gpu", "rtx4090"],
    ["diffusion", "--preset", "lora", "--model", "stable-diffusion-v1-5"],
])  # fmt: skip
def test_dry_runs_need_nothing(argv):
    done = run("train.py", *argv, "--dry-run")
    assert done.returncode == 0 and "peak" in done.stdout and "days" in done.stdout, done.stderr


def test_a_dry_run_counts_what_learns():
    """The text encoder that is trained, the one that is there already, and the pictures that are left to train on."""

    def plan(*argv):
        done = run("train.py", "diffusion", "--dry-run", *argv)
        assert done.returncode == 0, done.stderr
        return done.stdout

    lora = ("--preset", "lora", "--model", TINY / "sd15")
    alone, both = (
        float(re.search(r"parameters: ([\d.]+) M trained", plan(*lora, *more))[1])
        for more in ((), ("--train-text-encoder",))
    )
    assert both > alone
    frozen = sum(p.numel() for p in pipeline.load(TINY / "sd15", torch.float32).text_encoder.parameters()) / 1e6
    assert f"trained, {frozen:.2f} M frozen" in plan("--text-encoder", TINY / "sd15")
    data = ("--data", ROOT / "assets" / "emoji" / "emoji.tar", "--batch-size", "8", "--epochs", "3")
    assert "for 30 updates" in plan(*data, "--max-samples", "100", "--validation", "0.2")
    assert " trained, " in plan("--model", ROOT / "assets" / "nano", "--train-text-encoder")
    assert "no/such is not here: planned with one" in plan("--text-encoder", "no/such")
    for argv, says in (
        (("--model", TINY / "sdxl", "--train-text-encoder"), "with one text encoder"),
        (("--lora",), "--lora needs a --model"),
        (("--preset", "sd15", "--lora"), "--lora needs a --model"),
        (("--prediction-type", "flow", "--zero-snr"), "a flow has no betas"),
    ):
        assert says in error_line(run("train.py", "diffusion", "--dry-run", *argv))


def test_a_bad_picture_by_policy(tmp_path, pictures):
    import shutil

    shutil.copytree(pictures, tmp_path / "d")
    (tmp_path / "d" / "3.png").write_bytes(b"half a picture")
    assert "3.png: not a readable image" in error_line(
        train_("diffusion", tmp_path / "d", tmp_path / "a", "--max-steps", "3")
    )
    done = train_(
        "diffusion",
        tmp_path / "d",
        tmp_path / "b",
        "--max-steps",
        "3",
        "--on-bad-image",
        "skip",
        "--bad-image-limit",
        "0.5",
    )
    assert done.returncode == 0 and "3.png" in (tmp_path / "b" / "bad_images.jsonl").read_text(), done.stderr


def test_timestep_draws_are_uniform_over_a_run():
    """S2-36: a histogram of the timesteps that 300 updates draw."""
    from nanodiff.diffusion import objective
    from nanodiff.diffusion.schedule import Schedule

    schedule = Schedule.from_config({"_class_name": "DDPMScheduler"})
    t = torch.cat([objective.timesteps(schedule, 3, range(i * 16, i * 16 + 16)) for i in range(300)])
    counts = torch.histc(t.float(), bins=8, min=0, max=1000)
    assert (counts - 600).abs().max() < 100 and len(set(t[:16].tolist())) > 10


@pytest.mark.slow
def test_killed_again_and_again(tmp_path):
    """`make chaos`: SIGKILL at random moments, resumed each time, ends in the same bytes."""
    done = run("-m", "tests.chaos", "--kills", "10", "--output-dir", tmp_path)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.mark.slow
def test_killed_at_three_moments(tmp_path, capsys):
    assert chaos.main(["--kills", "3", "--updates", "40", "--output-dir", str(tmp_path / "o")], run) == 0
    assert "3 kills" in (out := capsys.readouterr().out) and "the same bytes" in out


# -- ControlNets ---------------------------------------------------------------------------------------------


def control_(data, out, *argv, model=TINY / "sd15"):
    return run("train.py", "controlnet", "--model", model, "--data", data, "--resolution", "32", "--batch-size", "3", "--lr-warmup-steps", "0",
               "--output-dir", out, "--seed", "3", "--mixed-precision", "no", *argv)  # fmt: skip


def test_a_controlnet_is_trained_resumed_and_drawn_with(tmp_path, pictures):
    """It begins as a copy that says nothing; the UNet stays as it is; a run that was stopped ends as the whole one."""
    whole = control_(pictures, tmp_path / "whole", "--max-steps", "4", "--sample-every", "4", "--eval-batch-size", "2",
                     "--sample-steps", "2", "--checkpointing-steps", "2")  # fmt: skip
    assert whole.returncode == 0, whole.stderr
    assert f"--control {tmp_path / 'whole' / 'model'}" in whole.stdout
    sheet = Image.open(tmp_path / "whole" / "samples" / "000004.png")
    assert sheet.width < sheet.height * 2  # edges above, pictures below
    half = control_(
        pictures, tmp_path / "half", "--max-steps", "2", "--checkpointing-steps", "2", "--lr-scheduler", "constant"
    )
    again = control_(pictures, tmp_path / "half", "--max-steps", "4", "--checkpointing-steps", "2", "--lr-scheduler", "constant",
                     "--resume", "auto")  # fmt: skip
    straight = control_(pictures, tmp_path / "straight", "--max-steps", "4", "--lr-scheduler", "constant")
    assert half.returncode == again.returncode == straight.returncode == 0, half.stderr + again.stderr
    assert same_tree(tmp_path / "half" / "model", tmp_path / "straight" / "model")
    unet = pipeline.load(TINY / "sd15").net
    net = control.load(tmp_path / "whole" / "model", unet.cfg, torch.float32, "cpu")
    assert net.cfg.downscale == 8 and net.controlnet_mid_block.weight.any()  # it has begun to speak
    shown = next(pictures.glob("*.png"))
    drawn = run("sample.py", "--model", TINY / "sd15", "--control", tmp_path / "whole" / "model", "--control-image", f"canny:{shown}",
                "--height", "32", "--width", "32", "--prompt", "a red square", "--steps", "2", "--output-dir", tmp_path / "drawn")  # fmt: skip
    assert drawn.returncode == 0, drawn.stderr


def test_a_controlnet_goes_on_from_a_controlnet(tmp_path, pictures):
    first = control_(pictures, tmp_path / "a", "--max-steps", "1")
    second = control_(
        pictures, tmp_path / "b", "--max-steps", "1", "--control", tmp_path / "a" / "model", "--lr", "1e-12"
    )
    assert first.returncode == second.returncode == 0, first.stderr + second.stderr
    a, b = (weights.load_tensors(tmp_path / n / "model" / "diffusion_pytorch_model.safetensors") for n in "ab")
    assert all(torch.allclose(a[k], b[k], atol=1e-9) for k in a)


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--lora"], "needs a --model with a UNet and text"),
        (["--condition", "none"], "needs a --model with a UNet and text"),
        (["--parallel", "fsdp"], "needs a --model with a UNet and text"),
        (["--control", "nowhere"], "nowhere"),
        (["--model", TINY / "sd35-medium"], "ControlNets are for UNets"),
    ],
)
def test_controlnets_that_cannot_be_trained(tmp_path, pictures, argv, says):
    assert says in error_line(control_(pictures, tmp_path / "x", "--max-steps", "1", *argv))


def test_a_controlnet_is_planned(tmp_path):
    done = run(
        "train.py",
        "controlnet",
        "--model",
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "--dry-run",
        "--resolution",
        "512",
    )
    assert done.returncode == 0, done.stderr
    assert "361.28 M trained, 1066.24 M frozen" in done.stdout, done.stdout


def test_less_than_an_epoch_is_not_judged_and_said(tmp_path, pictures):
    done = train_(
        "diffusion",
        pictures,
        tmp_path / "o",
        "--max-steps",
        "1",
        "--batch-size",
        "2",
        "--keep-best",
        "--validation",
        "0.2",
    )
    assert done.returncode == 0, done.stderr
    assert (
        "less than an epoch (3), at whose end the model is judged: --validation, --keep-best will do nothing"
        in done.stderr
    )
