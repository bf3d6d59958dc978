"""Score against steps, guidance and samplers, of the world's model and of its students.

    python -m assets.world.steps --model teacher=assets/world --model consistency=out/student/model:1 --steps 1,2,4,8,50 --output-dir out/steps
    python -m assets.world.steps --model assets/world --guidance 1,2,4 --scheduler flow_euler,flow_heun --output-dir out/guidance

--model NAME=DIR[:GUIDANCE], again for each; a student's guidance is 1, it was built in. Writes steps.json, a table, a figure (a panel for
the captions seen and one for those held out) and a sheet: a caption a row, a number of steps a column, for each model.
"""

import argparse
import itertools
import sys
from collections import Counter
from pathlib import Path

from assets.world import score
from nanodiff.commandline import at_least, numbers, tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, write_bytes, write_json
from nanodiff.output import images


def variants(args):
    """[(label, folder, sampler or None, settings)] of every line of the figure."""
    out = []
    for spec in args.model:
        name, _, folder = spec.rpartition("=")
        folder, _, own = folder.partition(":")
        try:
            scales = [float(own)] if own else args.guidance
        except ValueError:
            raise UserError(f"--model {spec}: {own!r} is no guidance scale") from None
        for sampler, scale in itertools.product(args.scheduler, scales):
            own_scale = scale is not None and (len(scales) > 1 or bool(own))
            parts = [
                name or (folder if own else ""),
                sampler if len(args.scheduler) > 1 else "",
                f"guidance {scale:g}" if own_scale else "",
            ]
            settings = {} if scale is None else {"guidance_scale": scale}
            out.append((", ".join(filter(None, parts)) or folder, folder, sampler, settings))
    if twice := [label for label, times in Counter(label for label, *_ in out).items() if times > 1]:
        raise UserError(f"--model {twice[0]}: two of one name; give each its own (NAME=DIR)")
    return out


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", action="append", required=True, metavar="[NAME=]DIR[:GUIDANCE]")
    parser.add_argument("--steps", type=numbers(int), default=[1, 2, 4, 8, 20], help="comma-separated")
    parser.add_argument(
        "--guidance", type=numbers(float), default=[None], help="comma-separated; default: the model's own"
    )
    parser.add_argument(
        "--scheduler", type=numbers(str), default=[None], help="comma-separated; default: the model's own"
    )
    parser.add_argument("--captions", type=at_least(1), default=100, help="of each task, seen and held out")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    return tool(lambda: run(args))


def run(args):
    from nanodiff import pipeline
    from nanodiff.output import charts

    out, every = out_dir(args.output_dir), list(dict.fromkeys(args.steps))
    captions = [score.asked(task, True, 1, first=70_000)[0].caption for task in ("one", "relation", "count")]
    rows, cells, labels = {}, [], []
    for label, folder, sampler, settings in variants(args):
        sd = pipeline.load(folder, scheduler=sampler)
        for n in every:
            scores = score.score(sd, args.captions, steps=n, **settings)
            rows.setdefault(label, {})[n] = {group: score.mean(tasks) for group, tasks in scores.items()}
            print(f"{label}, {n} steps: " + ", ".join(f"{k} {v:.3f}" for k, v in rows[label][n].items()), flush=True)
            write_json(out / "steps.json", rows)
            cells += [score.shown(p, 96) for p in score.draw(sd, captions, steps=n, **settings)]
            labels += [f"{label}, {n}", *[""] * (len(captions) - 1)]
    table = ["| | " + " | ".join(f"{n} steps" for n in every) + " |", "|---|" + "---|" * len(every)]
    for label, line in rows.items():
        table.append(
            f"| {label} | " + " | ".join(f"{line[n]['seen']:.3f} / {line[n]['held-out']:.3f}" for n in every) + " |"
        )
    write_bytes(out / "table.md", ("\n".join(table) + "\n").encode())
    panels = {
        f"score, {group}": {label: [line[n][group] for n in every] for label, line in rows.items()}
        for group in ("seen", "held-out")
    }
    charts.lines(out / "steps.png", every, panels, "steps")
    images.save_png(images.grid(cells, len(captions) * len(every), labels), out / "sheet.png")
    print("\n".join(table))


if __name__ == "__main__":
    sys.exit(main())
