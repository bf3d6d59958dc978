"""What composition needs, measured on close-ups of single objects: short runs of train.py that differ in one thing, three seeds each; and what is learned first.

    python -m assets.world.study runs --output-dir out/world-study [--only adamw,text-3] [--share 1/2]
    python -m assets.world.study emergence --run out/world-study/recipe-0 --output-dir out/world-study

`runs` cuts 32 × 32 pixels around one object out of scenes, trains the embedded model's network on them from scratch in the latents of its VAE, and asks for the
kinds that were in training and for the eight that are held out in every run (held_out.json): results.json, table.md and curves.png; a run that is there is not
made again. In a whole scene an object is so little of the picture that its shape is not learned in 64,000 pictures; in a close-up it is (STUDIES.md). --share 2/3: every
third run, from the second on; three such processes side by side make the study.
`emergence` scores the models that `train.py --save-model-epochs N` left (model-epoch-N), part by part, of close-ups or of any task: emergence.json and emergence.png.
"""

import argparse
import itertools
import json
import math
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np

from assets.nano.captions import said
from assets.world import make, scenes, score
from nanodiff.commandline import at_least, numbers, tool
from nanodiff.config import UserError, read_json
from nanodiff.files import out_dir, settled, write_bytes, write_json

ROOT = Path(__file__).parents[2]
EIGHTH = len(scenes.KINDS) // 8
SIDE = 32  # pixels of a close-up
PARTS = ("count", "ground", "colour", "shape")
RUNS = {  # name: (what it is, kinds held out, flags of train.py, settings of the drawing)
    "recipe": ("the recipe: 8 of 64 kinds held out, flow, logit-normal times, Muon, guidance 4", 8, [], {}),
    "held-24": ("24 kinds held out", 24, [], {}),
    "held-40": ("40 kinds held out", 40, [], {}),
    "data-1000": ("1,000 scenes", 8, ["--max-samples", "1000"], {}),
    "data-200": ("200 scenes", 8, ["--max-samples", "200"], {}),
    "text-3": ("text encoder of 3 layers, not 1", 8, ["--text-config", "{text-3}"], {}),
    "v": ("v-prediction on a noise schedule", 8, ["--prediction-type", "v_prediction", "--timestep-sampling", "uniform"], {}),
    "sample": ("x0-prediction, min-SNR-5", 8, ["--prediction-type", "sample", "--timestep-sampling", "uniform", "--min-snr", "5"], {}),
    "uniform": ("uniform times", 8, ["--timestep-sampling", "uniform"], {}),
    "adamw": ("AdamW in place of Muon, at 1e-3", 8, ["--optimizer", "adamw", "--lr", "1e-3"], {}),
    "no-ema": ("without averaged weights", 8, ["--no-ema"], {}),
    "guidance-1": ("drawn without guidance", 8, None, {"guidance_scale": 1.0}),  # None: the model of `recipe`
    "guidance-2": ("drawn with guidance 2", 8, None, {"guidance_scale": 2.0}),
    "guidance-8": ("drawn with guidance 8", 8, None, {"guidance_scale": 8.0}),
}  # fmt: skip


def held(count):
    """The first `count` kinds to hold out, a multiple of eight: those of held_out.json, then others, so that each colour and each shape is lost as often as any other."""
    first = [next(k for k in scenes.held_out().kinds if k.colour == colour) for colour in scenes.COLOURS]
    n = len(scenes.SHAPES)
    return [
        scenes.Kind(kind.colour, scenes.SHAPES[(scenes.SHAPES.index(kind.shape) + turn) % n])
        for turn in range(count // n)
        for kind in first
    ]


def singles(kinds, seed):
    """Scenes of one object of these kinds, without end; the i-th draw is from (seed, i)."""
    drawn = (scenes.random_scene(np.random.default_rng((seed, i)), "one", None) for i in itertools.count())
    return (scene for scene in drawn if scene.things[0].kind in kinds)


class CloseUp(NamedTuple):
    """A scene of one object seen through a window of SIDE × SIDE pixels, whose corner is at (x, y)."""

    scene: scenes.Scene
    x: int
    y: int
    caption = property(lambda self: self.scene.caption)

    def picture(self):
        """A PIL picture, RGB."""
        return self.scene.picture().crop((self.x, self.y, self.x + SIDE, self.y + SIDE))


def close_up(scene, rng):
    """A CloseUp with the whole object in it, anywhere."""
    (thing,) = scene.things
    reach = thing.radius * scenes.REACH
    corner = (rng.integers(max(0, math.ceil(at + reach) - SIDE), int(at - reach) + 1) for at in (thing.x, thing.y))
    return CloseUp(scene, *(min(int(at), scenes.SIDE - SIDE) for at in corner))


def close_ups(kinds, seed):
    """Close-ups of these kinds, without end."""
    return (close_up(scene, np.random.default_rng((seed, i, SIDE))) for i, scene in enumerate(singles(kinds, seed)))


def draw(sd, captions, **settings):
    """Close-ups of captions as the reader takes them, uint8 [N, 64, 64, 3]: what is at their edges goes on."""
    pictures = score.draw(sd, captions, height=SIDE, width=SIDE, **settings)
    high, wide = ((scenes.SIDE - n) // 2 for n in pictures.shape[1:3])
    return np.pad(pictures, ((0, 0), (high, high), (wide, wide), (0, 0)), mode="edge")


def asked(kinds, count):
    """`count` scenes of one object of these kinds, no two captions alike."""
    found = {}
    for scene in itertools.islice(singles(kinds, score.SEED), 50 * count):
        found.setdefault(scene.caption, scene)
        if len(found) == count:
            return list(found.values())
    raise UserError(f"there are no {count} different captions of {len(kinds)} kinds; ask for fewer")


def train(out, name, seed, args):
    """The folder of a run's model, trained unless it is there."""
    _, count, flags, _ = RUNS[name]
    run = out / f"{'recipe' if flags is None else name}-{seed}"
    if not (run / "model" / "model_index.json").exists():
        shard = out / f"held-{count}.tar"
        if not shard.exists():
            kinds = set(scenes.KINDS) - set(held(count))
            make.pack(shard, itertools.islice(close_ups(kinds, 1), args.scenes), args.scenes)
        flags = [f.replace("{text-3}", str(out / "text-3.json")) for f in flags or []]
        common = ["--preset", "world", "--resolution", SIDE, "--model-config", "assets/world/transformer/config.json", "--vae", "assets/world", "--data", shard, "--max-steps", args.updates,
                  "--batch-size", args.batch_size, "--lr", args.lr, "--lr-warmup-steps", 50, "--sample-every", 0, "--save-model-epochs", 1 if name == "recipe" and not seed else 0,
                  "--seed", seed, "--cache-dir", out / "cache", "--checkpoints-total-limit", 1, "--resume", "auto", "--output-dir", run]  # fmt: skip
        if code := subprocess.run(
            [sys.executable, "train.py", "diffusion", *map(str, common), *flags], cwd=ROOT
        ).returncode:
            raise UserError(f"the run {run.name} ended with {code}")
    return run / "model"


def summary(sd, name, count):
    """{name: number} of one run: the share of pictures that are right, of kinds seen and held out, and of their parts, whatever else is wrong."""
    _, out, _, settings = RUNS[name]
    found = {}
    for group, kinds in (("seen", set(scenes.KINDS) - set(held(out))), ("held-out", set(held(EIGHTH)))):
        some = asked(kinds, count)
        wrong, parts = score.judge(draw(sd, [s.caption for s in some], say=group, **settings), [s.told for s in some])
        found[group] = wrong.count(None) / count
        found |= {f"{group} {part}": parts[part] for part in PARTS if part in parts}
    return found


def runs(args):
    from nanodiff import pipeline
    from nanodiff.output import charts

    out = out_dir(args.output_dir.resolve())
    text = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2, "hidden_act": "gelu",
            "max_position_embeddings": 20, "projection_dim": 128, "architectures": ["CLIPTextModelWithProjection"]}  # fmt: skip
    write_json(out / "text-3.json", text)
    names = args.only.split(",") if args.only else list(RUNS)
    if unknown := [n for n in names if n not in RUNS]:
        raise UserError(f"--only {unknown[0]}: is none of {', '.join(RUNS)}")
    for group in (held(EIGHTH), set(scenes.KINDS) - set(held(EIGHTH))):  # known now, not after the first training
        asked(set(group), args.captions)
    kept = out / "results.json"
    settings = {k: getattr(args, k) for k in ("scenes", "updates", "batch_size", "lr", "captions")} | {"side": SIDE}
    settled(out, settings, kept.exists())
    (out / "scores").mkdir(exist_ok=True)
    models = {}  # what is trained, and what is drawn with it
    for name in names:
        models.setdefault("recipe" if RUNS[name][2] is None else name, []).append(name)
    first, of = args.share
    for seed, same in list(itertools.product(range(args.seeds), models.values()))[first - 1 :: of]:
        for name in same:
            score_of = out / "scores" / f"{name}-{seed}.json"
            if not score_of.exists():
                found = summary(pipeline.load(train(out, name, seed, args)), name, args.captions)
                write_json(score_of, found)
                print(f"{name}, seed {seed}: {found}", flush=True)
    scored = sorted(
        (out / "scores").glob("*.json"), key=lambda p: (list(RUNS).index(p.stem.rpartition("-")[0]), p.stem)
    )
    results = {p.stem: read_json(p) for p in scored}
    write_json(kept, results)
    write_bytes(out / "table.md", (table(results) + "\n").encode())
    logs = {RUNS[n][0]: out / f"{n}-0" / "metrics.jsonl" for n in RUNS if (out / f"{n}-0" / "metrics.jsonl").exists()}
    charts.curves(logs, out / "curves.png")
    print(table(results))


def table(results):
    """Markdown: means over the seeds with 95 % intervals."""
    columns = [f"{group}{part}" for group in ("seen", "held-out") for part in ("", " colour", " shape")]
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name in RUNS:
        if some := [r for key, r in results.items() if key.rpartition("-")[0] == name]:
            shown = [said([r[c] for r in some]) for c in columns]
            lines.append(f"| {RUNS[name][0]} | {len(some)} | " + " | ".join(shown) + " |")
    return "\n".join(lines)


def emergence(args):
    from nanodiff import pipeline
    from nanodiff.output import charts

    out = out_dir(args.output_dir.resolve())
    tasks = ("close-up", *scenes.TASKS)
    if unknown := [t for t in args.tasks if t not in tasks]:
        raise UserError(f"--tasks {unknown[0]}: is none of {', '.join(tasks)}")
    found = sorted(args.run.glob("model-epoch-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    if not found:
        raise UserError(f"{args.run}: has no model-epoch-N (train.py --save-model-epochs)")
    if not (args.run / "metrics.jsonl").is_file():
        raise UserError(f"{args.run}: has no metrics.jsonl, by which the epochs' updates are known")
    log = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    last = {line["epoch"]: line["step"] for line in log}  # an epoch's last line is its last update's
    rows = {}
    for folder in found:
        updates = last[int(folder.name.rpartition("-")[2])]
        sd, rows[updates] = pipeline.load(folder), {}
        if "close-up" in args.tasks:
            for name, share in summary(sd, "recipe", args.captions).items():
                group, _, part = name.partition(" ")
                rows[updates][f"{part or 'all'} of a close-up, {group}"] = share
        scores = score.score(sd, args.captions, [t for t in args.tasks if t != "close-up"])
        rows[updates] |= {
            f"{task}, {group}": s["share"] for group, tasks in scores.items() for task, s in tasks.items()
        }
        for group, tasks in scores.items():
            for task, found_in in tasks.items():
                rows[updates] |= {f"{part} of {task}, {group}": share for part, share in found_in["parts"].items()}
        print(updates, {k: round(v, 3) for k, v in rows[updates].items()}, flush=True)
        write_json(out / "emergence.json", rows)
    names = list(next(iter(rows.values())))
    if len(args.tasks) > 1:  # of several the wholes; the parts are in emergence.json
        names = [name for name in names if " of " not in name or name.startswith("all of ")]
    series = lambda group: {k.removesuffix(group): [r[k] for r in rows.values()] for k in names if k.endswith(group)}  # noqa: E731
    panels = {"seen in training": series(", seen"), "held out": series(", held-out")}
    charts.lines(out / "emergence.png", list(rows), panels, "updates")


def share(text):
    """argparse's type of "2/3": (2, 3)."""
    part, _, of = text.partition("/")
    if not (part.isdigit() and of.isdigit() and 0 < int(part) <= int(of)):
        raise argparse.ArgumentTypeError(f"{text} is no share such as 1/2")
    return int(part), int(of)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    a = stages.add_parser("runs")
    a.add_argument("--scenes", type=at_least(1), default=5000, help="in training")
    a.add_argument("--updates", type=at_least(1), default=2400)
    a.add_argument("--batch-size", type=at_least(1), default=32)
    a.add_argument("--lr", type=float, default=2e-3)
    a.add_argument("--seeds", type=at_least(1), default=3)
    a.add_argument("--only", help="comma-separated names of runs: " + ", ".join(RUNS))
    a.add_argument("--share", type=share, default=(1, 1), help="1/2: every second run, another process the others")
    b = stages.add_parser("emergence")
    b.add_argument("--run", type=Path, required=True)
    b.add_argument(
        "--tasks",
        type=numbers(str),
        default=["close-up"],
        help=f"comma-separated: close-up, {', '.join(scenes.TASKS)}",
    )
    for stage, what in ((a, runs), (b, emergence)):
        stage.add_argument("--captions", type=at_least(1), default=200, help="of each group (and task)")
        stage.add_argument("--output-dir", type=Path, default=Path("out/world-study"))
        stage.set_defaults(what=what)
    args = parser.parse_args()
    return tool(lambda: args.what(args))


if __name__ == "__main__":
    sys.exit(main())
