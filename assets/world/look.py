"""What is in folders of drawn scenes?

    python -m assets.world.look DATA …
    python -m assets.world.look --series alone GEN_0 GEN_1 GEN_2 --series "half real" GEN_0 GEN_1_real_0.5 GEN_2_real_0.5 --output-dir out/look

DATA: captioned pictures of the world in any layout that nanodiff.data reads: a generation of distill.py recursive, what sample.py drew, a
shard. A series' are a line of the figure. Of each: how many captions are true of their picture, of those that are the grammar's (`told`); how many pictures can be read; and how different they are, over all objects read:
the spread of their places (pixels, root mean square from the mean place), of their radii (relative, within a size), and the entropy of colours
and of kinds in bits (3 and 6 for eight colours and all kinds alike).
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np

from assets.world import reader, scenes, score
from nanodiff.commandline import tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, write_json


def entropy(names):
    """Of the names' frequencies, in bits."""
    p = np.array(list(Counter(names).values()), float) / max(len(names), 1)
    return float(-(p * np.log2(p)).sum())


def spread(values):
    """Root-mean-square distance of rows from their mean."""
    if not len(values):
        return float("nan")
    values = np.asarray(values, float).reshape(len(values), -1)
    return float(np.sqrt(((values - values.mean(0)) ** 2).sum(1).mean()))


def look(dataset):
    """{what: number} of a data set, see the module docstring."""
    pictures = [dataset.image(i).convert("RGB") for i in range(len(dataset))]
    for key, picture in zip(dataset.keys, pictures, strict=True):
        if picture.size != (scenes.SIDE, scenes.SIDE):
            raise UserError(
                f"{dataset.root}: {key} is of {picture.width}x{picture.height} pixels, the world's are of {scenes.SIDE}x{scenes.SIDE}"
            )
    read = [reader.read(np.asarray(picture)) for picture in pictures]
    told = [scenes.parse(dataset.captions[i]) for i in range(len(dataset))]
    known = [(r, t) for r, t in zip(read, told, strict=True) if t]
    right = sum(reader.true_of(r, t) is None for r, t in known)
    nothing = dict.fromkeys(("share", "low", "high"), float("nan"))
    shares = score.share(right, len(known)) if known else nothing
    clear = [r for r in read if not r.why]
    things = [t for r in clear for t in r.things]
    radii = [t.radius / np.mean([o.radius for o in things if o.size == t.size]) for t in things]
    return {
        "pictures": len(dataset), "told": len(known), **{k: v for k, v in shares.items() if k in ("share", "low", "high")},
        "read": len(clear) / max(len(dataset), 1), "places": spread([(t.x, t.y) for t in things]), "radii": spread(radii),
        "colours": entropy([t.kind.colour for t in things]), "kinds": entropy([t.kind for t in things]),
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("data", nargs="*")
    parser.add_argument(
        "--series", nargs="+", action="append", default=[], metavar=("NAME", "DATA"), help="again for each"
    )
    parser.add_argument("--output-dir", type=Path, help="also write look.json and look.png there")
    args = parser.parse_args()
    return tool(lambda: run(args))


def run(args):
    from nanodiff import data
    from nanodiff.output import charts

    if args.output_dir:
        out_dir(args.output_dir)
    series = ([("", args.data)] if args.data else []) + [(name, folders) for name, *folders in args.series]
    if not all(folders for _, folders in series) or not series:
        raise UserError("name the data: DATA …, or --series NAME DATA …")
    if len({name for name, _ in series}) < len(series):
        raise UserError("--series: two of one name")
    seen = {folder: look(data.load(folder)) for _, folders in series for folder in folders}
    columns = ("pictures", "told", "share", "read", "places", "radii", "colours", "kinds")
    print("| | " + " | ".join(columns) + " |\n|---|" + "---|" * len(columns))
    for name, row in ((f"{s}, {Path(f).name}" if s else f, seen[f]) for s, folders in series for f in folders):
        print(
            f"| {name} | "
            + " | ".join(f"{row[c]:.3f}" if isinstance(row[c], float) else str(row[c]) for c in columns)
            + " |"
        )
    if args.output_dir:
        write_json(args.output_dir / "look.json", seen)
        length = max(len(folders) for _, folders in series)
        lines = {s: [seen[f] for f in folders] for s, folders in series}
        line = lambda rows, cell: [cell(r) for r in rows] + [float("nan")] * (length - len(rows))  # noqa: E731
        panels = {
            "captions true": {s: line(rows, lambda r: (r["share"], r["low"], r["high"])) for s, rows in lines.items()}
        }
        panels |= {c: {s: line(rows, lambda r, c=c: r[c]) for s, rows in lines.items()} for c in columns[4:]}
        x = [Path(f).name for f in series[0][1]] if len(series) == 1 else list(range(length))
        charts.lines(args.output_dir / "look.png", x, panels, "data" if len(series) == 1 else "generation")


if __name__ == "__main__":
    sys.exit(main())
