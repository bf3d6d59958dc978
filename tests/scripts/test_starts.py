"""The same command gives the same bytes at every start: new Pythons in a row, each with its own hash seed."""

import hashlib
import json
import os

import pytest
from util import ROOT, TINY, run

NANO = ROOT / "assets" / "nano"


def captions(folder):
    rows = [{"image_id": 10_009 + i, "caption": text} for i, text in enumerate(("red apple", "fire", "crescent moon"))]
    (folder / "captions.json").write_text(json.dumps({"images": [], "annotations": rows}))
    (folder / "words.txt").write_text("fire\nred apple\n")


COMMANDS = {
    "sample": ["sample.py", "--model", TINY / "sd15", "--prompt", "a", "--steps", 3, "--num-images", 2, "--seed", 5, "--output-dir", "out"],
    "recursive": ["distill.py", "recursive", "--model", NANO, "--captions", "captions.json", "--data-root", "out/data", "--models-root",
                  "out/models", "--output-dir", "out/study", "--target-gen", 1, "--steps", 3, "--num-images", 3, "--gen0-images", 3,
                  "--epochs", 1, "--lr", 1e-4, "--no-evaluate", "--mixed-precision", "no", "--cfg-scale", 1.5],
    "transfer": ["distill.py", "transfer", "all", "--model", NANO, "--teacher", NANO, "--prompt-source", "words.txt", "--num-images", 2,
                 "--steps", 2, "--guidance-scale", 3, "--epochs", 1, "--batch-size", 2, "--lr", 1e-3, "--lora-rank", 2, "--mixed-precision",
                 "no", "--num-evaluation-prompts", 2, "--panels", 0, "--output-dir", "out"],
    "few-step": ["distill.py", "few-step", "--model", NANO, "--data", ROOT / "assets" / "emoji" / "emoji.tar", "--method", "consistency",
                 "--student-steps", 2, "--max-steps", 2, "--batch-size", 2, "--guidance-scale", 3, "--check-steps", 2, "--teacher-steps", 3,
                 "--num-images", 2, "--seed", 3, "--mixed-precision", "no", "--output-dir", "out"],
}  # fmt: skip


def digests(folder):
    """{file: hash} of the pictures and weights that a run leaves."""
    found = {
        p.relative_to(folder).as_posix(): p for p in folder.rglob("*") if p.suffix in (".png", ".jpg", ".safetensors")
    }
    return {name: hashlib.sha256(path.read_bytes()).hexdigest() for name, path in sorted(found.items())}


SLOW = [pytest.param(name, 20, marks=pytest.mark.slow) for name in COMMANDS]


@pytest.mark.parametrize(("name", "starts"), [("sample", 2), *SLOW])
def test_every_start_gives_the_same_bytes(tmp_path, name, starts):
    found = []
    for i in range(starts):
        folder = tmp_path / str(i)
        folder.mkdir()
        captions(folder)
        script, *argv = COMMANDS[name]
        argv = [folder / a if str(a).startswith(("out", "captions.json", "words.txt")) else a for a in argv]
        done = run(script, *argv, env=os.environ | {"OMP_NUM_THREADS": "2"})
        assert done.returncode == 0, done.stderr
        found.append(digests(folder / "out"))
    assert found[0]
    assert [sorted(k for k in {*found[0], *f} if f.get(k) != found[0].get(k)) for f in found] == [[]] * starts
