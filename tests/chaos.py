"""A short training run that is killed at random moments and resumed each time: it must end in the bytes of the undisturbed one.

python -m tests.chaos [--kills 50] [--updates 60] [--seed 0] --output-dir out/chaos
"""

import argparse
import hashlib
import os
import random
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent


def command(out, updates, data):
    return ["train.py", "diffusion", "--data", str(data), "--preset", "tiny", "--max-steps", str(updates),
            "--checkpointing-steps", "2", "--max-samples", "40", "--batch-size", "4", "--grad-accum", "2", "--random-flip",
            "--seed", "3", "--resume", "auto", "--output-dir", str(out)]  # fmt: skip


def python(*argv, timeout=None):
    """The finished process of a new Python; after `timeout` seconds it is killed, and subprocess.TimeoutExpired raised."""
    env = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run([sys.executable, *argv], cwd=ROOT, env=env, capture_output=True, text=True, timeout=timeout)


def digest(folder):
    """One hash over every file of the final model."""
    total = hashlib.sha256()
    for path in sorted(p for p in folder.rglob("*") if p.is_file()):
        total.update(f"{path.relative_to(folder)} {hashlib.sha256(path.read_bytes()).hexdigest()}\n".encode())
    return total.hexdigest()


def main(argv=None, run=python):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=50)
    parser.add_argument("--updates", type=int, default=60)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--data", default="assets/emoji/emoji.tar")
    parser.add_argument("--output-dir", type=Path, default=Path("out/chaos"))
    args = parser.parse_args(argv)
    rng, (whole, cut) = random.Random(args.seed), (args.output_dir.resolve() / name for name in ("whole", "cut"))
    shutil.rmtree(args.output_dir, ignore_errors=True)
    began = time.monotonic()
    done = run(*command(whole, args.updates, args.data), timeout=600)
    if done.returncode:
        print(f"{done.stderr}the undisturbed run failed")
        return 1
    length = time.monotonic() - began  # of an undisturbed run
    reached, killed = 0, 0
    while True:
        # no sooner than a run can have begun, so that it gets on from kill to kill; the last one is left alone
        limit = rng.uniform(0.4, 1.1) * length if killed < args.kills else 600
        try:
            done = run(*command(cut, args.updates, args.data), timeout=limit)
        except subprocess.TimeoutExpired:
            if killed == args.kills:
                raise
            killed += 1
            continue
        if done.returncode or digest(cut / "model") != digest(whole / "model"):
            print(f"{done.stderr}{'a resumed run failed' if done.returncode else 'another model'} after {killed} kills")
            return 1
        reached += 1
        if killed == args.kills:
            break
        shutil.rmtree(cut)  # from the beginning again, until all kills are spent
    print(f"{killed} kills, {reached} runs to the end, each with the same bytes: {digest(whole / 'model')}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
