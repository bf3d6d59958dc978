"""What is in folders of drawn scenes?   python -m assets.world.look DATA … [--output-dir DIR]

DATA: captioned pictures of the world in any layout that nanodiff.data reads: a generation of distill.py recursive, what sample.py drew, a
shard. Of each: how many captions are true of their picture; how many pictures can be read; and how different they are, over all objects read:
the spread of their places (pixels, root mean square from the mean place), of their radii (relative, within a size), and the entropy of colours
and of kinds in bits (3 and 6 for eight colours and all kinds alike).
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from assets.world import reader, scenes, score
from nanodiff.config import tool
from nanodiff.files import out_dir, write_json


def entropy(names):
    """Of the names' frequencies, in bits."""
    p = np.array(list(Counter(names).values()), float) / max(len(names), 1)
    return float(-(p * np.log2(p)).sum())


def spread(values):
    """Root-mean-square distance of rows from their mean."""
    values = np.asarray(values, float).reshape(len(values), -1)
    return float(np.sqrt(((values - values.mean(0)) ** 2).sum(1).mean())) if len(values) else float("nan")


def look(dataset):
    """{what: number} of a data set, see the module docstring."""
    read = [reader.read(np.asarray(dataset.image(i).convert("RGB"))) for i in range(len(dataset))]
    told = [scenes.parse(dataset.captions[i]) for i in range(len(dataset))]
    known = [(r, t) for r, t in zip(read, told, strict=True) if t]
    right = sum(reader.true_of(r, t) is None for r, t in known)
    clear = [r for r in read if not r.why]
    things = [t for r in clear for t in r.things]
    radii = [t.radius / np.mean([o.radius for o in things if o.size == t.size]) for t in things]
    return {
        "pictures": len(dataset), **{k: v for k, v in score.share(right, max(len(known), 1)).items() if k in ("share", "low", "high")},
        "read": len(clear) / max(len(dataset), 1), "places": spread([(t.x, t.y) for t in things]), "radii": spread(radii),
        "colours": entropy([t.kind.colour for t in things]), "kinds": entropy([t.kind for t in things]),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="+")
    parser.add_argument("--output-dir", type=Path, help="also write look.json and look.png there")
    args = parser.parse_args()
    return tool(lambda: run(args))


def run(args):
    from nanodiff import data
    from nanodiff.output import charts

    if args.output_dir:
        out_dir(args.output_dir)
    rows = {name: look(data.load(name)) for name in args.data}
    columns = ("pictures", "share", "read", "places", "radii", "colours", "kinds")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in rows.items():
        print(
            f"| {name} | "
            + " | ".join(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
            + " |"
        )
    if args.output_dir:
        write_json(args.output_dir / "look.json", rows)
        panels = {"captions true": {"": [(r["share"], r["low"], r["high"]) for r in rows.values()]}}
        panels |= {c: {"": [r[c] for r in rows.values()]} for c in columns[3:]}
        charts.lines(args.output_dir / "look.png", [Path(n).name for n in rows], panels, "data")


if __name__ == "__main__":
    sys.exit(main())
