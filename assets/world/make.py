"""Draw scenes for training, as a webdataset shard: pictures and captions.

    python -m assets.world.make out/world/scenes.tar --scenes 30000 --seed 1
    for i in 0 1 2 3; do python -m assets.world.make out/world/scenes-$i.tar --scenes 25000 --first $((25000 * i)) & done; wait

The shard is there as a whole or not at all.
"""

import argparse
import io
import sys
import tarfile
from pathlib import Path

import numpy as np
from tqdm import tqdm

from assets.emoji.make import add
from assets.world import scenes
from nanodiff.commandline import at_least, tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, write_file


def write(path, count, seed, task=None, held=False, colour=None, first=0, in_order=0.0):
    """`count` scenes into a tar: 000000.png, .txt. Scene i is drawn from (seed, i), so that a longer set begins as a shorter one, and
    shards with scenes first, first + 1, … are together what one would be."""
    numbers = range(first, first + count)
    drawn = (scenes.random_scene(np.random.default_rng((seed, i)), task, held, colour, in_order) for i in numbers)
    pack(path, drawn, count, first)


def pack(path, drawn, count, first=0):
    """`count` scenes of an iterable into a tar, numbered from `first` on."""

    def fill(file):
        with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
            for i, scene in enumerate(tqdm(drawn, desc="scenes", total=count, disable=None), first):
                data = io.BytesIO()
                scene.picture().save(data, "PNG")
                add(tar, f"{i:06d}.png", data.getvalue())
                add(tar, f"{i:06d}.txt", scene.caption.encode())

    write_file(path, fill)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("target", type=Path)
    parser.add_argument("--scenes", type=at_least(1), default=30_000)
    parser.add_argument(
        "--first", type=at_least(0), default=0, help="number of the first one, where others are in other shards"
    )
    parser.add_argument("--seed", type=at_least(0), default=1)
    parser.add_argument("--task", choices=scenes.TASKS, help="only these")
    parser.add_argument("--colour", choices=scenes.PAINTS, help="of the first object of each scene")
    parser.add_argument("--held-out", action="store_true", help="only what is held out, in place of none of it")
    parser.add_argument(
        "--in-order",
        type=float,
        default=0.0,
        help="share of the captions of two things that name the one on the left, or above, first; the others name either",
    )
    args = parser.parse_args()

    def run():
        if args.held_out and args.colour in scenes.NINTH:
            raise UserError(f"--held-out: nothing of {args.colour} is held out, it is in no scene for training")
        if not 0 <= args.in_order <= 1:
            raise UserError(f"--in-order {args.in_order:g}: a share lies between 0 and 1")
        out_dir(args.target.parent)
        write(args.target, args.scenes, args.seed, args.task, args.held_out, args.colour, args.first, args.in_order)
        print(f"{args.target}: {args.scenes} scenes, {args.target.stat().st_size >> 10} kB")

    return tool(run)


if __name__ == "__main__":
    sys.exit(main())
