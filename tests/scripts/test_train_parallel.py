"""train.py on two processes (gloo, CPU): the same run as one, and what happens when one of them fails."""

import filecmp
import json
import os
import signal
import subprocess
import time

import numpy as np
import pytest
import torch
from PIL import Image
from util import TINY, launch, run, start

from nanodiff.training import checkpoint
from nanodiff.weights import load_tensors


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    for i in range(11):
        Image.fromarray(rng.integers(0, 256, (20, 20, 3), np.uint8)).save(root / f"{i:02d}.png")
        (root / f"{i:02d}.txt").write_text(f"noise number {i}")
    return root


def command(data, out, *argv, fault=None, answer=20):
    script = ["tests/scripts/faulty.py", *fault] if fault else ["train.py"]
    return [*script, "diffusion", "--data", data, "--preset", "tiny", "--max-steps", 8, "--checkpointing-steps", 4, "--seed", 3,
            "--dist-timeout", answer, "--output-dir", out, *argv]  # fmt: skip


def train(n, data, out, *argv, fault=None, answer=20, **options):
    """fault: see faulty.py. answer: seconds that a process waits for the others'."""
    return launch(n, *command(data, out, *argv, fault=fault, answer=answer), **options)


def losses(out):
    return [json.loads(line)["loss"] for line in (out / "metrics.jsonl").read_text().splitlines()]


def weights(out):
    return load_tensors(out / "model" / "unet" / "diffusion_pytorch_model.safetensors")


@pytest.fixture(scope="module")
def alone(pictures, tmp_path_factory):
    out = tmp_path_factory.mktemp("alone") / "o"
    done = train(1, pictures, out, "--batch-size", 4, "--grad-accum", 2)
    assert done.returncode == 0, done.stderr
    return out


def test_two_processes_train_what_one_does(pictures, alone, tmp_path):
    """S1-30: the same curve at the same global batch, with accumulation and a smaller last update; only rank 0 writes."""
    new = os.environ | {"OMP_NUM_THREADS": "1"}  # here by torchrun as people start it, with new Pythons
    done = train(2, pictures, tmp_path / "o", "--batch-size", 2, "--grad-accum", 2, env=new)
    assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "o") == pytest.approx(losses(alone), rel=1e-5)
    a, b = weights(alone), weights(tmp_path / "o")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4
    assert done.stdout.count("steps: 8") == 1 and done.stderr.count("device:") == 1
    assert sorted(p.name for p in (tmp_path / "o").iterdir()) == sorted(p.name for p in alone.iterdir())


@pytest.mark.slow
def test_schedule_free_over_shards(pictures, tmp_path):
    """What is written is the mean of all weights so far, the same from one process and from two that share the weights and resume."""
    more = ["--optimizer", "schedule_free", "--no-ema", "--lr-scheduler", "constant_with_warmup", "--max-steps"]
    for n, batch, how, steps in ((1, 8, "ddp", 8), (2, 4, "fsdp", 4), (2, 4, "fsdp", 8)):
        done = train(n, pictures, tmp_path / how, "--batch-size", batch, "--parallel", how, "--resume", *more, steps)
        assert done.returncode == 0, done.stderr
    assert "resumed at step 4" in done.stderr
    trained = load_tensors(tmp_path / "ddp" / "checkpoint-8" / "state.safetensors")
    assert losses(tmp_path / "fsdp") == pytest.approx(losses(tmp_path / "ddp"), rel=1e-5)
    a, b = weights(tmp_path / "ddp"), weights(tmp_path / "fsdp")
    assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4
    last = {k.split(".", 1)[1]: v for k, v in trained.items() if k.startswith("net/")}
    assert max((a[k] - last[k]).abs().max().item() for k in a.keys() & last.keys()) > 1e-4, (
        "not what the last update left"
    )


def test_a_rank_without_a_share_joins_in(pictures, tmp_path):
    """Nine pictures in groups of eight: the epoch's last update has one sample, and rank 1 none of it."""
    more = ["--max-samples", 9, "--max-steps", 4, "--grad-accum", 2]
    for n, batch in ((1, 4), (2, 2)):
        done = train(n, pictures, tmp_path / str(n), "--batch-size", batch, *more)
        assert done.returncode == 0, done.stderr
    assert losses(tmp_path / "2") == pytest.approx(losses(tmp_path / "1"), rel=1e-5)


def test_a_loaded_model_is_sharded_on_one_process_too(pictures, tmp_path):
    """Weights come channels-last from a file, which FSDP2 does not take; under torchrun one process is a group."""
    common = ["--model", TINY / "sd15", "--resolution", 16, "--batch-size", 2, "--max-steps", 2]
    done = train(1, pictures, tmp_path / "alone", *common)
    assert done.returncode == 0, done.stderr
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 1, "--run-path", "--start-method", "fork",
               *command(pictures, tmp_path / "sharded", *common, "--parallel", "fsdp"))  # fmt: skip
    assert done.returncode == 0, done.stderr
    a, b = losses(tmp_path / "alone"), losses(tmp_path / "sharded")
    assert b[0] == pytest.approx(a[0], rel=1e-5)
    assert b[1] == pytest.approx(a[1], rel=1e-3), (
        "AdamW's first step goes by the gradient's sign, which rounding decides near zero"
    )


@pytest.mark.slow
def test_shards_train_the_same_and_move_between_process_counts(pictures, alone, tmp_path):
    """FSDP2: the same curve; its checkpoint goes on in one process, and one process's in FSDP."""
    out = tmp_path / "o"
    done = train(2, pictures, out, "--batch-size", 2, "--grad-accum", 2, "--parallel", "fsdp", "--sample-every", 8,
                  "--sample-steps", 2, "--eval-batch-size", 2)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert losses(out) == pytest.approx(losses(alone), rel=1e-5)
    assert len(list((out / "checkpoint-4" / "shards").iterdir())) == 2 and (out / "samples" / "000008.png").exists()
    for source, target, n, batch, how in ((out, "to-one", 1, 4, "ddp"), (alone, "to-two", 2, 2, "fsdp")):
        argv = ["--resume", source / "checkpoint-4", "--batch-size", batch, "--grad-accum", 2, "--parallel", how]
        done = train(n, pictures, tmp_path / target, *argv)
        assert done.returncode == 0 and "resumed at step 4" in done.stderr, done.stderr
        assert losses(tmp_path / target) == pytest.approx(losses(alone)[4:], rel=1e-5)
        a, b = weights(alone), weights(tmp_path / target)
        assert max((a[k] - b[k]).abs().max().item() for k in a) < 1e-4


def test_two_processes_resume_bit_for_bit(pictures, tmp_path):
    """Mid-epoch, with EMA, accumulation and workers; SIGTERM reaches one rank only, and counts for both."""
    argv = ["--batch-size", 2, "--grad-accum", 2, "--num-workers", 1]
    done = train(2, pictures, tmp_path / "whole", *argv)
    assert done.returncode == 0, done.stderr
    cut = train(2, pictures, tmp_path / "cut", *argv, fault=("term", 1))
    assert cut.returncode != 0 and (tmp_path / "cut" / "PREEMPTED").read_text() == "checkpoint-2\n", cut.stderr
    assert [s for s, _ in checkpoint.found(tmp_path / "cut")] == [2] and not (tmp_path / "cut" / "model").exists()
    assert cut.stderr.splitlines().count("terminated") == 1
    done = train(2, pictures, tmp_path / "cut", *argv, "--resume", "latest")
    assert done.returncode == 0 and not (tmp_path / "cut" / "PREEMPTED").exists(), done.stderr
    for part in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert filecmp.cmp(tmp_path / "whole" / "model" / part, tmp_path / "cut" / "model" / part, shallow=False)
    assert losses(tmp_path / "whole") == losses(tmp_path / "cut")


@pytest.mark.parametrize(
    ("fault", "rank", "says"),
    [
        ("forward", 1, "error: the fault of this test"),
        pytest.param("data", 1, "error: the fault of this test", marks=pytest.mark.slow),
        ("save", 0, "error: the fault of this test"),
        ("config", 1, "error: rank 1 was started with another configuration than rank 0"),
        ("kill", 1, "error: another process was lost"),
        ("sleep", 1, "error: another process was lost, or did not answer in time"),
        pytest.param("bug", 1, "ZeroDivisionError: a bug of ours", marks=pytest.mark.slow),
        ("oom", 1, "error: out of memory (CUDA out of memory"),
    ],
)
def test_one_failure_ends_all_and_is_said_once(pictures, tmp_path, fault, rank, says):
    began = time.monotonic()
    # a bug leaves the script as an exception: of ranks that are forked torchrun repeats its traceback, of new Pythons it does not
    new = {"env": os.environ | {"OMP_NUM_THREADS": "1"}} if fault == "bug" else {}
    answer = 5 if fault == "sleep" else 20
    done = train(2, pictures, tmp_path / "o", "--batch-size", 2, fault=(fault, rank), answer=answer, **new)
    assert done.returncode != 0 and time.monotonic() - began < 75
    assert done.stderr.count(says) == 1, done.stderr
    assert sum(line.startswith("error:") for line in done.stderr.splitlines()) == (fault != "bug"), done.stderr


def test_only_rank_0_lists_the_data(pictures, tmp_path):
    done = train(2, pictures, tmp_path / "o", "--batch-size", 2, "--max-steps", 2, fault=("listing", 1))
    assert done.returncode == 0, done.stderr


def test_nan_on_one_rank_skips_the_update_on_all(pictures, tmp_path):
    done = train(2, pictures, tmp_path / "o", "--batch-size", 2, fault=("nan", 1))
    assert done.returncode == 0 and "skipped_updates: 1" in done.stdout, done.stderr
    assert done.stderr.count("step 2: loss nan") == 1 and "samples with a non-finite loss: " in done.stderr
    assert all(torch.isfinite(v).all() for v in weights(tmp_path / "o").values())


def test_vae_on_two_processes(pictures, tmp_path):
    outs = []
    for n, batch in ((1, 4), (2, 2)):
        out = tmp_path / str(n)
        argv = ["train.py", "vae", "--data", pictures, "--preset", "tiny", "--max-steps", 4, "--batch-size", batch,
                "--discriminator-weight", 0.1, "--output-dir", out]  # fmt: skip
        done = launch(n, *argv)
        assert done.returncode == 0, done.stderr
        outs.append(out)
    assert losses(outs[0]) == pytest.approx(losses(outs[1]), rel=1e-3), "GAN training magnifies rounding"


def test_torchrun_forwards_sigterm(pictures, tmp_path):
    argv = command(pictures, tmp_path / "o", "--batch-size", 2, "--max-steps", 100000)
    child = start("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", 2, *argv, stderr=subprocess.PIPE,
                  stdout=subprocess.DEVNULL, env=os.environ | {"OMP_NUM_THREADS": "1"})  # fmt: skip
    log = tmp_path / "o" / "metrics.jsonl"
    for _ in range(600):
        if log.exists() and log.read_text().count("\n") >= 3:
            break
        time.sleep(0.05)
    child.send_signal(signal.SIGTERM)
    _, err = child.communicate(timeout=60)
    assert child.returncode != 0 and (tmp_path / "o" / "PREEMPTED").exists(), err
    (step, folder), *_ = checkpoint.found(tmp_path / "o")
    assert step >= 3 and checkpoint.verify(folder) is None
