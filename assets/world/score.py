"""Does a model draw what it is told, also what it was never shown?   make world-score, or: python -m assets.world.score [--model DIR]

For each task (one object, size, binding, relation, count) captions of combinations that were in training ("seen") and of such that were
held out, a picture of each, read by reader.py; a picture is right when exactly what the caption says is in it. Intervals are Wilson's,
95 %. The last line holds the means over the tasks. Beside it, what was wrong, and a sheet of held-out captions with their pictures.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps
from scipy.stats import binomtest
from tqdm import tqdm

from assets.world import reader, scenes
from nanodiff.commandline import at_least, tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, write_json
from nanodiff.output import images

BATCH = 50
SEED = 1_000_000  # of the first caption; training draws from (1, i)


def asked(task, held, count, first=0, colour=None):
    """`count` scenes whose captions are drawn; no two captions alike. held, colour: see scenes.random_scene. Raises UserError when there are not so many."""
    found = {}
    for i in range(first, first + 50 * count):
        scene = scenes.random_scene(np.random.default_rng((SEED, i)), task, held, colour)
        found.setdefault(scene.caption, scene)
        if len(found) == count:
            return list(found.values())
    raise UserError(f"there are no {count} different captions of {task}; ask for fewer")


def mixed(count, groups=(True,), colour=None):
    """[(Scene, is it held out?)] of all tasks in turn. groups: True, False, or both in turn. colour: see scenes.random_scene."""
    each, n = len(groups), len(scenes.TASKS)
    return [
        (asked(scenes.TASKS[i // each % n], groups[i % each], 1, 10_000 * (i // each + 1), colour)[0], groups[i % each])
        for i in range(count)
    ]


def shown(picture, side=128):
    """A picture [64, 64, 3] as a PIL picture in which its pixels are seen."""
    return Image.fromarray(picture).resize((side, side), Image.Resampling.NEAREST)


def draw(sd, captions, first=0, say="pictures", **settings):
    """uint8 [N, 64, 64, 3], picture i from seed first + i."""
    out = []
    for i in tqdm(range(0, len(captions), BATCH), desc=say, disable=None, leave=False):
        batch = captions[i : i + BATCH]
        made = sd.generate(batch, seeds=range(first + i, first + i + len(batch)), **settings)
        out.append(np.stack([np.asarray(p) for p in images.to_pil(made.pixels)]))
    return np.concatenate(out)


def judge(pictures, told):
    """(what is wrong with each picture, None for what is right; {part: share of the pictures that have it right, whatever else is wrong})"""
    read = [reader.read(p) for p in pictures]
    parts = [reader.parts_of(r, t) for r, t in zip(read, told, strict=True)]
    names = dict.fromkeys(name for p in parts for name in p)
    shares = {name: float(np.mean([p[name] for p in parts if name in p])) for name in names}
    return [reader.true_of(r, t) for r, t in zip(read, told, strict=True)], shares


def share(right, n):
    """{"right", "of", "share", "low", "high"}: Wilson's interval of 95 %."""
    low, high = binomtest(right, n).proportion_ci(0.95, "wilson")
    return {"right": right, "of": n, "share": right / n, "low": float(low), "high": float(high)}


def score(sd, count=500, tasks=scenes.TASKS, colour=None, **settings):
    """{"seen" | "held-out": {task: share() and "wrong": {what: how many}, "parts": see judge()}}; settings: of Pipeline.generate.

    colour: in place of the two groups one, named after it: the captions of scenes with that colour."""
    out = {}
    for group, held in {colour: False}.items() if colour else (("seen", False), ("held-out", True)):
        out[group] = {}
        for task in tasks:
            some = asked(task, held, count, colour=colour)
            pictures = draw(sd, [s.caption for s in some], say=f"{task}, {group}", **settings)
            wrong, parts = judge(pictures, [s.told for s in some])
            out[group][task] = share(wrong.count(None), len(some)) | {
                "wrong": dict(Counter(filter(None, wrong))),
                "parts": parts,
            }
    return out


def mean(scores):
    """The mean of the tasks' shares."""
    return sum(s["share"] for s in scores.values()) / len(scores)


def table(scores):
    """Markdown."""
    *_, last = scores
    lines = [f"| task | {' | '.join(scores)} | wrong in {last} |", "|---|---|" + "---|" * len(scores)]
    cell = lambda s: f"{s['share']:.3f} ({s['low']:.3f}–{s['high']:.3f})"  # noqa: E731
    for task, asked_last in scores[last].items():
        wrong = ", ".join(f"{n} {what}" for what, n in sorted(asked_last["wrong"].items(), key=lambda kv: -kv[1]))
        lines.append(f"| {task} | {' | '.join(cell(tasks[task]) for tasks in scores.values())} | {wrong or 'none'} |")
    return "\n".join(lines)


def sheet(sd, count=64, groups=(True,), colour=None, **settings):
    """(pictures framed green where right and red where wrong; [(caption, what is wrong)]). groups: of captions that are held out or not, in turn;
    with both, those held out are marked."""
    some = mixed(count, groups, colour)
    pictures = draw(sd, [s.caption for s, _ in some], say="sheet", **settings)
    wrong, _ = judge(pictures, [s.told for s, _ in some])
    framed = [ImageOps.expand(shown(p), 4, "#c0392b" if w else "#27ae60") for p, w in zip(pictures, wrong, strict=True)]
    labels = [s.caption + (" (held out)" if held and len(groups) > 1 else "") for s, held in some]
    return images.grid(framed, 8, labels), [(s.caption, w) for (s, _), w in zip(some, wrong, strict=True)]


def run(args):
    from nanodiff import lora, pipeline
    from nanodiff.device import choice

    if args.demo and args.demo.suffix.lower() != ".png":
        raise UserError(f"--demo {args.demo}: is no name of a PNG")
    if args.output_dir:
        out_dir(args.output_dir)
    sd = pipeline.load(args.model, device=choice.pick_device(args.device))
    if args.lora:
        lora.attach(sd.models(), lora.read(args.lora, sd.models()))
    settings = {k: v for k, v in (("steps", args.steps), ("guidance_scale", args.guidance_scale)) if v is not None}
    if args.demo:
        picture, wrong = sheet(sd, 32, (False,) if args.colour else (False, True), args.colour, **settings)
        images.save_png(picture, args.demo)
        print(f"the small world's sheet: {args.demo} ({sum(w is None for _, w in wrong)} of {len(wrong)} right)")
        return
    scores = score(sd, args.captions, colour=args.colour, **settings)
    print(table(scores))
    if args.output_dir:
        write_json(args.output_dir / "score.json", scores)
        picture, wrong = sheet(sd, 64, (not args.colour,), args.colour, **settings)
        images.save_png(picture, args.output_dir / "sheet.png")
        print(
            f"the sheet: {args.output_dir / 'sheet.png'}; wrong in it:",
            *(f"{c} ({w})" for c, w in wrong if w),
            sep="\n  ",
        )
    print("world-score:", *(f"{group} {mean(tasks):.3f}" for group, tasks in scores.items()))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(Path(__file__).parent), help="default: the embedded one")
    parser.add_argument("--captions", type=at_least(1), default=500, help="of each task, seen and held out")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--guidance-scale", type=float)
    parser.add_argument("--device", choices=("auto", "cpu", "cuda", "mps"), default="auto")
    parser.add_argument("--lora", help="a LoRA's file, drawn with")
    parser.add_argument(
        "--colour", choices=scenes.PAINTS, help="captions of scenes with it, in place of those seen and held out"
    )
    parser.add_argument("--output-dir", type=Path, help="also write score.json and sheet.png there")
    parser.add_argument(
        "--demo",
        type=Path,
        help="draw only this PNG: 16 captions seen, 16 held out, which are marked (with --colour: 32 of it)",
    )
    args = parser.parse_args()
    return tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
