"""What composition needs, measured: short runs of train.py that differ in one thing, three seeds each, and one run looked at as it learns.

    python -m assets.world.study runs --data out/world/scenes.tar --vae out/world/vae/model --output-dir out/world-study [--only adamw,text-3]
    python -m assets.world.study emergence --run out/world/model --output-dir out/world-study

`runs` writes results.json, table.md and curves.png; a run that is there is not made again. `emergence` scores the models that
`train.py --save-model-epochs N` left (model-epoch-N), task by task: emergence.json and emergence.png.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

from assets.nano.captions import interval
from assets.world import score
from nanodiff.config import UserError, read_json, tool
from nanodiff.files import out_dir, write_bytes, write_json

ROOT = Path(__file__).parents[2]
RUNS = {  # name: (what it is, flags of train.py, settings of the drawing)
    "recipe": ("the recipe: flow, logit-normal times, Muon", [], {}),
    "adamw": ("AdamW in place of Muon", ["--optimizer", "adamw"], {}),
    "uniform": ("uniform times", ["--timestep-sampling", "uniform"], {}),
    "v": (
        "v-prediction on a noise schedule",
        ["--prediction-type", "v_prediction", "--timestep-sampling", "uniform"],
        {},
    ),
    "sample": (
        "x0-prediction, min-SNR-5",
        ["--prediction-type", "sample", "--timestep-sampling", "uniform", "--min-snr", "5"],
        {},
    ),
    "text-3": ("text encoder of 3 layers, not 1", ["--text-config", "{text-3}"], {}),
    "data-1000": ("1,000 scenes", ["--max-samples", "1000"], {}),
    "data-5000": ("5,000 scenes", ["--max-samples", "5000"], {}),
    "no-ema": ("without averaged weights", ["--no-ema"], {}),
    "guidance-1": ("drawn without guidance", None, {"guidance_scale": 1.0}),  # None: the model of `recipe`
    "guidance-4": ("drawn with guidance 4", None, {"guidance_scale": 4.0}),
}


def train(out, name, seed, args):
    """The folder of a run's model, trained unless it is there."""
    flags = RUNS[name][1]
    run = out / f"{'recipe' if flags is None else name}-{seed}"
    if not (run / "model" / "model_index.json").exists():
        flags = [f.replace("{text-3}", str(out / "text-3.json")) for f in flags or []]
        common = ["--preset", "world", "--data", args.data, "--vae", args.vae, "--max-steps", args.updates, "--sample-every", 0, "--seed", seed,
                  "--cache-dir", out / "cache", "--checkpoints-total-limit", 1, "--resume", "auto", "--output-dir", run]  # fmt: skip
        if code := subprocess.run(
            [sys.executable, "train.py", "diffusion", *map(str, common), *flags], cwd=ROOT
        ).returncode:
            raise UserError(f"the run {run.name} ended with {code}")
    return run / "model"


def summary(scores):
    """{name: number} of one run: the two means, and single objects by attribute."""
    both = {g: scores[g]["one"]["parts"] for g in scores}
    return {
        "seen": score.mean(scores["seen"]),
        "held-out": score.mean(scores["held-out"]),
        **{name: both["seen"][name] for name in ("ground", "colour", "shape", "count")},
        "held-out shape": both["held-out"]["shape"],
    }


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
    kept = out / "results.json"
    results = read_json(kept) if kept.exists() else {}
    for seed in range(args.seeds):
        for name in names:
            if f"{name}-{seed}" in results:
                continue
            sd = pipeline.load(train(out, name, seed, args))
            results[f"{name}-{seed}"] = summary(score.score(sd, args.captions, **RUNS[name][2]))
            write_json(kept, results)
            print(f"{name}, seed {seed}: {results[f'{name}-{seed}']}", flush=True)
    columns = list(next(iter(results.values())))
    lines = ["| run | seeds | " + " | ".join(columns) + " |", "|---|---|" + "---|" * len(columns)]
    for name in RUNS:
        if some := [r for key, r in results.items() if key.rpartition("-")[0] == name]:
            cells = [interval([r[c] for r in some]) for c in columns]
            shown = [f"{m:.3f}" + (f" ± {h:.3f}" if h == h else "") for m, h in cells]
            lines.append(f"| {RUNS[name][0]} | {len(some)} | " + " | ".join(shown) + " |")
    write_bytes(out / "table.md", ("\n".join(lines) + "\n").encode())
    logs = {RUNS[n][0]: out / f"{n}-0" / "metrics.jsonl" for n in RUNS if (out / f"{n}-0" / "metrics.jsonl").exists()}
    charts.curves(logs, out / "curves.png")
    print("\n".join(lines))


def emergence(args):
    from nanodiff import pipeline
    from nanodiff.output import charts

    out = out_dir(args.output_dir.resolve())
    found = sorted(args.run.glob("model-epoch-*"), key=lambda p: int(p.name.rpartition("-")[2]))
    if not found:
        raise UserError(f"{args.run}: has no model-epoch-N (train.py --save-model-epochs)")
    log = [json.loads(line) for line in (args.run / "metrics.jsonl").read_text().splitlines()]
    last = {line["epoch"]: line["step"] for line in log}  # an epoch's last line is its last update's
    rows = {}
    for folder in found:
        updates = last[int(folder.name.rpartition("-")[2])]
        scores = score.score(pipeline.load(folder), args.captions)
        rows[updates] = {f"{task}, {group}": s["share"] for group, tasks in scores.items() for task, s in tasks.items()}
        rows[updates] |= {f"{part} of one": share for part, share in scores["seen"]["one"]["parts"].items()}
        print(updates, {k: round(v, 3) for k, v in rows[updates].items()}, flush=True)
        write_json(out / "emergence.json", rows)
    series = lambda end: {k: [r[k] for r in rows.values()] for k in next(iter(rows.values())) if k.endswith(end)}  # noqa: E731
    panels = {
        "seen in training": series(", seen"),
        "held out": series(", held-out"),
        "single objects, by part": series(" of one"),
    }
    charts.lines(out / "emergence.png", list(rows), panels, "updates")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    stages = parser.add_subparsers(required=True)
    a = stages.add_parser("runs")
    a.add_argument("--data", required=True)
    a.add_argument("--vae", required=True)
    a.add_argument("--updates", type=int, default=1500)
    a.add_argument("--seeds", type=int, default=3)
    a.add_argument("--only", help="comma-separated names of runs: " + ", ".join(RUNS))
    b = stages.add_parser("emergence")
    b.add_argument("--run", type=Path, required=True)
    for stage, what in ((a, runs), (b, emergence)):
        stage.add_argument("--captions", type=int, default=100, help="of each task, seen and held out")
        stage.add_argument("--output-dir", type=Path, default=Path("out/world-study"))
        stage.set_defaults(what=what)
    args = parser.parse_args()
    return tool(lambda: args.what(args))


if __name__ == "__main__":
    sys.exit(main())
