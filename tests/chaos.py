"""A short training run that is killed at random moments and resumed each time: it must end in the bytes of the undisturbed one.

python -m tests.chaos [--kills 50] [--updates 60] [--seed 0] --output-dir out/chaos
"""

import argparse
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(out, updates, data):
    return [sys.executable, "train.py", "diffusion", "--data", str(data), "--preset", "tiny", "--max-steps", str(updates),
            "--checkpointing-steps", "2", "--max-samples", "40", "--batch-size", "4", "--grad-accum", "2", "--random-flip",
            "--seed", "3", "--resume", "auto", "--output-dir", str(out)]  # fmt: skip


def digest(folder):
    """One hash over every file of the final model."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="assets/emoji/emoji.tar")
    parser.add_argument("--output-dir", type=Path, default=Path("out/chaos"))
    args = parser.parse_args()
    env, rng = os.environ | {"OMP_NUM_THREADS": "1"}, random.Random(args.seed)
    whole, cut = args.output_dir.resolve() / "whole", args.output_dir.resolve() / "cut"
    shutil.rmtree(args.output_dir, ignore_errors=True)
    began = time.monotonic()
    subprocess.run(command(whole, args.updates, args.data), cwd=ROOT, env=env, check=True, capture_output=True)
    length = time.monotonic() - began  # of an undisturbed run
    reached, killed = 0, 0
    while killed < args.kills:
        child = subprocess.Popen(command(cut, args.updates, args.data), cwd=ROOT, env=env, stdout=subprocess.DEVNULL,
                                 stderr=subprocess.PIPE)  # fmt: skip
        try:  # no sooner than a run can have begun, so that it gets on from kill to kill
            _, err = child.communicate(timeout=rng.uniform(0.4, 1.1) * length)
        except subprocess.TimeoutExpired:
            child.send_signal(signal.SIGKILL)
            child.communicate()
            killed += 1
        else:
            if child.returncode:
                print(err.decode(), file=sys.stderr)
                print(f"a resumed run failed after {killed} kills")
                return 1
            if digest(cut / "model") != digest(whole / "model"):
                print(f"another model after {killed} kills")
                return 1
            reached += 1
            shutil.rmtree(cut)  # from the beginning again, until all kills are spent
    done = subprocess.run(command(cut, args.updates, args.data), cwd=ROOT, env=env, capture_output=True, text=True)
    if done.returncode or digest(cut / "model") != digest(whole / "model"):
        print(done.stderr, file=sys.stderr)
        print(f"another model after {killed} kills")
        return 1
    print(f"{killed} kills, {reached + 1} runs to the end, each with the same bytes: {digest(whole / 'model')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
