"""Draw scenes for training, as a webdataset shard: pictures, captions, and what each caption says.

python -m assets.world.make out/world.tar --scenes 60000 --seed 1
"""

import argparse
import io
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from assets.emoji.make import add
from assets.world import scenes


def write(path, count, seed, task=None, held=False):
    """`count` scenes into a tar: 000000.png, .txt. Scene i is drawn from (seed, i), so that a longer set begins as a shorter one."""
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as tar:
        for i in tqdm(range(count), desc="scenes", disable=None):
            scene = scenes.random_scene(np.random.default_rng((seed, i)), task, held)
            data = io.BytesIO()
            scene.picture().save(data, "PNG")
            add(tar, f"{i:06d}.png", data.getvalue())
            add(tar, f"{i:06d}.txt", scene.caption.encode())


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--scenes", type=int, default=60_000)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--task", choices=scenes.TASKS, help="only these")
    parser.add_argument("--held-out", action="store_true", help="only what is held out, in place of none of it")
    args = parser.parse_args()
    args.target.parent.mkdir(parents=True, exist_ok=True)
    write(args.target, args.scenes, args.seed, args.task, args.held_out)
    print(f"{args.target}: {args.scenes} scenes, {args.target.stat().st_size >> 10} kB")


if __name__ == "__main__":
    main()
