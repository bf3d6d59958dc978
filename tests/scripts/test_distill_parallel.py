"""distill.py on two processes (gloo, CPU): the same pictures and the same students as on one."""

import json
import tarfile

import numpy as np
import pytest
import torch
from PIL import Image
from util import ROOT, launch, rms_ratio, run

from nanodiff.weights import load_tensors

NANO = ROOT / "assets" / "nano"


def distill(n, *argv):
    done = launch(n, "distill.py", *argv)
    assert done.returncode == 0, done.stderr
    return done


def close(a, b):
    """Adapters after a few updates. AdamW's first steps go by the gradient's sign, so single values near zero differ by more than rounding."""
    one, two = (load_tensors(p) for p in (a, b))
    assert one.keys() == two.keys()
    for part in ("lora_up", "lora_down"):
        x, y = (torch.cat([t.flatten() for k, t in some.items() if part in k]) for some in (one, two))
        assert rms_ratio(y, x) < 5e-3, part


def test_transfer_on_two_processes(tmp_path):
    """Pictures shared out by prompt; a micro-batch of two on one process, of one on each of two."""
    words = tmp_path / "prompts.txt"
    words.write_text("fire\nred apple\ncat face\n")
    for n in (1, 2):
        common = ["--model", NANO, "--teacher", NANO, "--prompt-source", words, "--num-images", 3, "--steps", 2, "--guidance-scale", 3, "--epochs", 1,
                  "--batch-size", 2 // n, "--lr", 1e-3, "--lora-rank", 2, "--lora-dropout", 0, "--eval-batch-size", 1, "--mixed-precision", "no",
                  "--num-evaluation-prompts", 2, "--panels", 0, "--lr-scheduler", "constant", "--output-dir", tmp_path / str(n)]  # fmt: skip
        done = distill(n, "transfer", "all", *common)
        assert done.stdout.count("teacher_images: 3") == 1 and "report: " in done.stdout
    for name in ("sdxl_images/00002.png", "weakmodel_images/standard/0001.png"):
        a, b = (np.asarray(Image.open(tmp_path / n / name), dtype=int) for n in ("1", "2"))
        assert abs(a - b).max() <= 1, name
    close(*(tmp_path / n / "checkpoints" / "lora_kohya.safetensors" for n in ("1", "2")))
    one, two = (
        json.loads((tmp_path / n / "metrics" / "metrics.json").read_text())["finetuned_vs_teacher.ssim"]["value"]
        for n in ("1", "2")
    )
    assert abs(one - two) < 1e-3


def eight(folder):
    """A folder with the first pictures of the emoji."""
    with tarfile.open(ROOT / "assets" / "emoji" / "emoji.tar") as tar:
        for name in tar.getnames()[:8]:
            (folder / name).parent.mkdir(exist_ok=True, parents=True)
            (folder / name).write_bytes(tar.extractfile(name).read())
    return folder


@pytest.mark.slow
@pytest.mark.parametrize(("size", "how"), [(2, "ddp"), (1, "fsdp"), (2, "fsdp")])
def test_a_critic_on_several_processes(size, how, tmp_path):
    """dmd: two networks of which one rests at most updates. Sharded, one process has a group of its own."""
    data = eight(tmp_path / "data")
    common = ["few-step", "--model", NANO, "--data", data, "--method", "dmd", "--student-steps", 2, "--critic-steps", 2, "--max-steps", 3,
              "--guidance-scale", 3, "--lr", 1e-4, "--no-evaluate", "--mixed-precision", "no", "--log-every", 1, "--lr-warmup-steps", 0]  # fmt: skip
    distill(1, *common, "--batch-size", 2, "--output-dir", tmp_path / "alone")
    many = ["--batch-size", 2 // size, "--parallel", how, "--output-dir", tmp_path / "many"]
    done = run("-m", "torch.distributed.run", "--standalone", "--nproc-per-node", size, "--run-path", "--start-method", "fork",
               "distill.py", *common, *many)  # fmt: skip
    assert done.returncode == 0, done.stderr
    logs = [
        [json.loads(x) for x in (tmp_path / n / "model" / "metrics.jsonl").read_text().splitlines()]
        for n in ("alone", "many")
    ]
    for a, b in zip(*logs, strict=True):
        for part in ("critic", "student"):
            assert (part in a) == (part in b) and abs(a.get(part, 0) - b.get(part, 0)) < 2e-3 * abs(a.get(part, 1)), (
                part,
                a,
                b,
            )
    assert torch.isfinite(torch.tensor([x["loss"] for x in logs[1]])).all()
