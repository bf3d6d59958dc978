"""train.py: both stages end to end on a toy set, resume byte for byte, errors."""

import filecmp
import json
import signal
import subprocess
import sys
import time

import pytest
from PIL import Image
from util import ROOT, error_line, run

from nanodiff import pipeline


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    for i, name in enumerate(["red", "green", "blue", "yellow", "black", "white", "orange"]):
        Image.new("RGB", (24, 20 + i), name).save(root / f"{i}.png")
        (root / f"{i}.txt").write_text(f"a {name} square")
    return root


def train(stage, data, out, *argv):
    return run("train.py", stage, "--data", data, "--preset", "tiny", "--output-dir", out, "--seed", "3", *argv)


def same_tree(a, b):
    files = sorted(p.relative_to(a) for p in a.rglob("*") if p.is_file())
    assert files == sorted(p.relative_to(b) for p in b.rglob("*") if p.is_file()) and files
    return all(filecmp.cmp(a / f, b / f, shallow=False) for f in files)


def test_vae_then_diffusion_then_sample(tmp_path, pictures):
    """S2-28 in small: train a VAE, a diffusion model in its latents, and sample from it."""
    done = train("vae", pictures, tmp_path / "vae", "--max-steps", "4", "--sample-every", "2", "--log-every", "1")
    assert done.returncode == 0 and "psnr_db" in done.stdout, done.stderr
    assert (tmp_path / "vae" / "samples" / "000002.png").exists()
    config = json.loads((tmp_path / "vae" / "model" / "config.json").read_text())
    assert config["scaling_factor"] not in (0.18215, 1.0), "measured on the data"
    done = train("diffusion", pictures, tmp_path / "d", "--vae", tmp_path / "vae" / "model", "--resolution", "32",
                 "--max-steps", "4", "--sample-every", "2", "--ema-decay", "0.9")  # fmt: skip
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in (tmp_path / "d" / "metrics.jsonl").read_text().splitlines()]
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
    assert train("diffusion", pictures, tmp_path / "whole", "--max-steps", "60").returncode == 0
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
    child = subprocess.Popen([sys.executable, *map(str, argv)], cwd=ROOT, stderr=subprocess.PIPE, text=True)
    log = tmp_path / "cut" / "metrics.jsonl"
    for _ in range(1200):
        if log.exists() and len(log.read_text().splitlines()) >= 3:
            break
        time.sleep(0.02)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode == 143 and not (tmp_path / "cut" / "model").exists(), err
    done = train("diffusion", pictures, tmp_path / "cut", "--max-steps", "60", "--resume", "auto")
    assert done.returncode == 0 and "resumed at step" in done.stderr, done.stderr
    assert same_tree(tmp_path / "whole" / "model", tmp_path / "cut" / "model")


def test_sampling_and_logging_do_not_change_training(tmp_path, pictures):
    train("diffusion", pictures, tmp_path / "a", "--max-steps", "4", "--sample-every", "2", "--log-every", "1")
    train("diffusion", pictures, tmp_path / "b", "--max-steps", "4", "--log-every", "3")
    assert same_tree(tmp_path / "a" / "model", tmp_path / "b" / "model")


def test_seed_matters(tmp_path, pictures):
    for seed in "34":
        train("diffusion", pictures, tmp_path / seed, "--max-steps", "2", "--seed", seed)
    assert not same_tree(tmp_path / "3" / "model", tmp_path / "4" / "model")


@pytest.mark.parametrize("prediction", ["epsilon", "sample", "v_prediction"])
def test_prediction_types_train_and_sample(tmp_path, pictures, prediction):
    """S1-12"""
    done = train(
        "diffusion", pictures, tmp_path / "o", "--max-steps", "2", "--prediction-type", prediction, "--min-snr", "5"
    )
    assert done.returncode == 0, done.stderr
    sd = pipeline.load(tmp_path / "o" / "model")
    assert sd.schedule.prediction == prediction
    assert sd.generate(["a red square"], steps=2, seeds=[0]).pixels.isfinite().all()


def test_loss_goes_down(tmp_path, pictures):
    done = train("diffusion", pictures, tmp_path / "o", "--max-steps", "150", "--lr", "3e-3", "--batch-size", "8")
    assert done.returncode == 0, done.stderr
    losses = [json.loads(line)["loss"] for line in (tmp_path / "o" / "metrics.jsonl").read_text().splitlines()]
    assert sum(losses[-30:]) < 0.7 * sum(losses[:30])


@pytest.mark.parametrize(
    ("argv", "says"),
    [
        (["--data", "none"], "none: no such folder"),
        (["--batch-size", "0"], "--batch-size"),
        (["--resume", "checkpoint-9"], "checkpoint-9"),
        (["--vae", "no/vae"], "no/vae"),
        (["--mixed-precision", "fp16", "--device", "cpu"], "fp16"),
        (["--lr-scheduler", "x"], "invalid choice: 'x'"),
        (["--max-steps", "-5"], "--max-steps -5"),
        (["--max-length", "1"], "--max-length 1"),
        (["--caption-dropout", "5"], "--caption-dropout 5"),
        (["--batchsize", "3"], "did you mean --batch-size"),
    ],
)
def test_bad_input_is_one_line(tmp_path, pictures, argv, says):
    assert says in error_line(train("diffusion", pictures, tmp_path / "o", *argv))


def test_required_flags(tmp_path):
    assert "--data is required" in error_line(run("train.py", "vae", "--output-dir", tmp_path))
    assert "--output-dir is required" in error_line(run("train.py", "vae", "--data", tmp_path))
