"""What the embedded model's recipe owes to its parts: short runs that differ in one thing.

    python -m assets.nano.ablate --output-dir out/ablate [--updates 1200] [--only v,flow]

Every run: the nano sizes, the embedded VAE, batch 32, the same seed, so the same pictures, noise and times in the same order.
Writes results.json, a table (table.md) and curves.png; a run that is already there is not made again.
"""

import argparse
import json
import shutil
import sys
from pathlib import Path

from assets.nano.captions import step
from nanodiff.commandline import at_least, tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, settled

ROOT = Path(__file__).parents[2]
RUNS = {  # name: (what it is, flags)
    "v": ("v-prediction (the recipe)", ["--prediction-type", "v_prediction"]),
    "epsilon": ("ε-prediction", ["--prediction-type", "epsilon"]),
    "sample": ("x0-prediction", ["--prediction-type", "sample"]),
    "flow": ("flow matching, uniform times", ["--prediction-type", "flow"]),
    "flow-logit": (
        "flow matching, logit-normal times",
        ["--prediction-type", "flow", "--timestep-sampling", "logit_normal"],
    ),
    "v-minsnr": ("v-prediction, min-SNR-5", ["--prediction-type", "v_prediction", "--min-snr", "5"]),
    "text-1": ("text encoder of 1 layer, not 3", ["--text-config", "{text-1}"]),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output-dir", type=Path, default=Path("out/ablate"))
    parser.add_argument("--updates", type=at_least(1), default=1200)
    parser.add_argument("--only", help="comma-separated names of runs")
    args = parser.parse_args()
    return tool(lambda: ablate(args))


def ablate(args):
    out = out_dir(args.output_dir.resolve())
    names = args.only.split(",") if args.only else list(RUNS)
    if unknown := [name for name in names if name not in RUNS]:
        raise UserError(f"--only {unknown[0]}: is none of {', '.join(RUNS)}")
    settled(out, {"updates": args.updates}, (out / "results.json").exists())
    text = json.loads((ROOT / "assets/nano/text_encoder/config.json").read_text())
    (out / "text-1.json").write_text(json.dumps(text | {"num_hidden_layers": 1}))
    for name in names:
        flags = [f.replace("{text-1}", str(out / "text-1.json")) for f in RUNS[name][1]]
        run, result = out / name, out / name / "score.json"
        if result.exists():
            continue
        common = ["--data", "assets/emoji/emoji.tar", "--preset", "nano", "--vae", "assets/nano/vae", "--max-steps", args.updates,
                  "--lr-warmup-steps", 200, "--sample-every", 0, "--cache-dir", out / "cache", "--output-dir", run]  # fmt: skip
        resume = ["--resume", "auto"]
        step("train.py", "diffusion", *map(str, common), *flags, *resume)
        step("-m", "assets.nano.score", "--model", run / "model", "--json", result)
    for part in ("net", "ema"):
        averaged(out, part)
    report(out, args.updates)


def averaged(out, part):
    """Score run v's own ("net") or averaged ("ema") weights at its last checkpoint before the end, while it is still moving."""
    from nanodiff.training import checkpoint
    from nanodiff.weights import load_tensors, save_tensors

    target, found = out / f"v-{part}", checkpoint.found(out / "v")
    if (target / "score.json").exists() or len(found) < 2:
        return
    shutil.copytree(out / "v" / "model", target / "model", dirs_exist_ok=True)
    tensors = checkpoint.read(found[1][1], {})
    for component in ("unet", "text_encoder"):
        (path,) = (target / "model" / component).glob("*.safetensors")
        save_tensors(path, load_tensors(path) | {k.split("/", 1)[1].split(".", 1)[1]: v for k, v in tensors.items()
                                                 if k.startswith(f"{part}/{component}.")})  # fmt: skip
    step("-m", "assets.nano.score", "--model", target / "model", "--json", target / "score.json")


def report(out, updates):
    """table.md, results.json and curves.png of the runs that are there."""
    from nanodiff.output import charts

    names = {n: told for n, (told, _) in RUNS.items()} | {
        "v-net": "v, before the end: its own weights",
        "v-ema": "… the averaged ones",
    }
    done = {n: json.loads((out / n / "score.json").read_text()) for n in names if (out / n / "score.json").exists()}
    lines = ["| run | top 5 | top 1 | error | Fréchet |", "|---|---|---|---|---|"]
    for name, s in done.items():
        lines.append(
            f"| {names[name]} | {s['top5']:.1f} % | {s['top1']:.1f} % | {s['rmse']:.4f} | {s['frechet']:.2f} |"
        )
    (out / "table.md").write_text("\n".join(lines) + "\n")
    (out / "results.json").write_text(json.dumps({"updates": updates, "runs": done}, indent=1))
    charts.curves({names[n]: out / n / "metrics.jsonl" for n in done if n in RUNS}, out / "curves.png")
    print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
