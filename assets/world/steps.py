"""Score against steps, guidance and samplers, of the world's model and of its students.

    python -m assets.world.steps --model teacher=out/world/model/model --model consistency=out/student/model:1 --steps 1,2,4,8,50 --output-dir out/steps
    python -m assets.world.steps --model out/world/model/model --guidance 1,2,4 --scheduler flow_euler,flow_heun --output-dir out/guidance

--model NAME=DIR[:GUIDANCE], again for each; a student's guidance is 1, it was built in. Writes steps.json, a table, a figure (a panel for
the captions seen and one for those held out) and a sheet: a caption a row, a number of steps a column, for each model.
"""

import argparse
import itertools
import json
from pathlib import Path

from PIL import Image

from assets.world import score

SHOWN = 3  # captions on the sheet


def variants(args):
    """[(label, folder, sampler or None, settings)] of every line of the figure."""
    out = []
    for spec in args.model:
        name, _, folder = spec.rpartition("=")
        folder, _, own = folder.partition(":")
        scales = [float(own)] if own else args.guidance
        for sampler, scale in itertools.product(args.scheduler, scales):
            parts = (
                [name]
                + ([sampler] if len(args.scheduler) > 1 else [])
                + ([f"guidance {scale:g}"] if len(scales) > 1 and scale else [])
            )
            settings = {} if scale is None else {"guidance_scale": scale}
            out.append((", ".join(filter(None, parts)) or folder, folder, sampler, settings))
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]DIR[:GUIDANCE]")
    parser.add_argument("--steps", default="1,2,4,8,20", help="comma-separated")
    parser.add_argument("--guidance", help="comma-separated; default: the model's own")
    parser.add_argument("--scheduler", help="comma-separated; default: the model's own")
    parser.add_argument("--captions", type=int, default=100, help="of each task, seen and held out")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    args.guidance = [float(g) for g in args.guidance.split(",")] if args.guidance else [None]
    args.scheduler = args.scheduler.split(",") if args.scheduler else [None]
    every = [int(n) for n in args.steps.split(",")]
    from nanodiff import pipeline
    from nanodiff.output import charts, images

    args.output_dir.mkdir(parents=True, exist_ok=True)
    shown = [score.asked(task, True, 1, first=70_000)[0] for task in ("one", "relation", "count")][:SHOWN]
    rows, cells, labels = {}, [], []
    for label, folder, sampler, settings in variants(args):
        sd = pipeline.load(folder, scheduler=sampler)
        for n in every:
            scores = score.score(sd, args.captions, steps=n, **settings)
            rows.setdefault(label, {})[n] = {group: score.mean(tasks) for group, tasks in scores.items()}
            print(f"{label}, {n} steps: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[label][n].items()), flush=True)
            (args.output_dir / "steps.json").write_text(json.dumps(rows, indent=1))
            drawn = score.draw(sd, [s.caption for s in shown], steps=n, **settings)
            cells += [Image.fromarray(p).resize((96, 96), Image.Resampling.NEAREST) for p in drawn]
            labels += [f"{label}, {n}", *[""] * (len(shown) - 1)]
    table = ["| | " + " | ".join(f"{n} steps" for n in every) + " |", "|---|" + "---|" * len(every)]
    for label, line in rows.items():
        table.append(
            f"| {label} | " + " | ".join(f"{line[n]['seen']:.3f} / {line[n]['held-out']:.3f}" for n in every) + " |"
        )
    (args.output_dir / "table.md").write_text("\n".join(table) + "\n")
    panels = {
        f"score, {group}": {label: [line[n][group] for n in every] for label, line in rows.items()}
        for group in ("seen", "held-out")
    }
    charts.lines(args.output_dir / "steps.png", every, panels, "steps")
    images.grid(cells, len(shown) * len(every), labels).save(args.output_dir / "sheet.png")
    print("\n".join(table))


if __name__ == "__main__":
    main()
