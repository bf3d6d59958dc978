"""Captions and pictures of the embedded data: does synthetic data help a captioner, and does a caption survive being drawn?

    python -m assets.nano.captions study --output-dir out/caption-study        # make caption-study: half an hour on two cores
    python -m assets.nano.captions trip --model-file out/caption-demo/captioner/checkpoints/last_checkpoint --output-dir out/caption-demo

study: for each seed a tenth of the pictures is held out. A small captioner learns from the others; its language model, which has read the
training captions alone, varies them (from a caption's first word on); the embedded model draws the variations; captioners with one and with
three synthetic pictures to each original learn for the same number of updates. All tell the held-out pictures. The table has the means over
the seeds with 95 % intervals (Student's t). The embedded model itself has seen all the pictures, which favours its synthetic ones.

trip: a caption is drawn by the embedded model, the picture told by a captioner, that caption drawn again.
"""

import argparse
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
from scipy import stats

from nanodiff.commandline import at_least, tool
from nanodiff.config import UserError
from nanodiff.files import out_dir, settled, write_json

ROOT = Path(__file__).parent.parent.parent
ARMS = {"original": 0, "original + synthetic 1:1": 1, "original + synthetic 1:3": 3}
METRICS = ("bleu1", "bleu2", "bleu3", "bleu4", "rouge_l", "meteor", "cider", "perplexity")
LEARN = ["--model-size", "nano", "--batch-size", "32", "--lr", "2e-3", "--adam-beta2", "0.99", "--lr-warmup-steps", "0.05", "--optimizer", "adamw", "--lr-scheduler", "cosine", "--random-flip", "--random-jitter", "0.1",
         "--max-new-tokens", "16", "--save-epochs", "0", "--samples", "3", "--resume", "auto"]  # fmt: skip
VARY = ["--template", "Image:.The description of the given image is: {first}", "--chat", "no", "--temperature", "1.0", "--top-p", "0.95",
        "--max-new-tokens", "12", "--min-words", "1", "--attempts", "12", "--batch-size", "32"]  # fmt: skip
DRAW = ["--model", "assets/nano", "--template", "{caption}", "--negative-prompt", "", "--scheduler", "ddim", "--steps", "12", "--guidance-scale", "3",
        "--resize", "none", "--format", "png", "--batch-size", "32"]  # fmt: skip


def step(*words):
    """One command of the project, which goes on where it was stopped."""
    print("$", *words, file=sys.stderr, flush=True)
    if code := subprocess.run([sys.executable, *map(str, words)], cwd=ROOT, stdout=sys.stderr, check=False).returncode:
        raise UserError(f"{' '.join(map(str, words[:2]))} ended with {code}")


def learn(out, train, val, images, seed, updates, flags=LEARN):
    """Train a captioner, if there is none; returns its last checkpoint (by validation loss the best one is an early one that has no words yet)."""
    if not (out / "run.json").is_file():
        paths = [word for folder in images for word in ("--image-path", folder)]
        step("caption.py", "train", *flags, "--train-csv-path", train, "--val-csv-path", val, *paths, "--seed", seed, "--max-steps", updates,
             "--output-dir", out)  # fmt: skip
    return out / "checkpoints" / "last_checkpoint"


def study(cfg):
    from nanodiff.data import captionset

    out = out_dir(Path(cfg.output_dir).resolve())
    settled(out, {"updates": cfg.updates}, (out / "study.json").exists())
    images = out / "emoji" / "images"
    if not (out / "emoji" / "titles.csv").is_file():
        step("-m", "nanodiff.captionset", "export", "assets/emoji/emoji.tar", out / "emoji")
    found = {arm: {m: [] for m in METRICS} for arm in ARMS}
    for seed in range(cfg.seeds):
        home = out / f"seed-{seed}"
        step("caption.py", "split", "--original-csv", out / "emoji" / "titles.csv", "--image-path", images, "--seed", seed,
             "--output-dir", home / "data")  # fmt: skip
        data = home / "data"
        teller = learn(home / "ratio-0", data / "train.csv", data / "val.csv", [images], seed, cfg.updates)
        made = home / "synthetic"
        step("caption.py", "augment", "--data-csv", data / "train.csv", "--model", teller / "llm", *VARY, "--variations", 3, "--seed", seed,
             "--output-dir", made)  # fmt: skip
        apart(captionset, made / "augmented_captions.csv", made / "wanted.csv", out / "emoji" / "titles.csv")
        step("caption.py", "synthesize", "--data-csv", made / "wanted.csv", *DRAW, "--seed", seed, "--output-dir", made)
        original, synthetic = captionset.read(data / "train.csv"), captionset.read(made / "synthetic_captions.csv")
        for arm, ratio in ARMS.items():
            train = data / f"train-{ratio}.csv"
            some = [row for row in synthetic if int(row.name.rpartition("_v")[2]) <= ratio]
            captionset.write(train, original + some)
            taught = learn(
                home / f"ratio-{ratio}",
                train if ratio else data / "train.csv",
                data / "val.csv",
                [images, made / "images"],
                seed,
                cfg.updates,
            )
            told = home / f"eval-{ratio}"
            step("caption.py", "eval", "--model-file", taught, "--test-csv-path", data / "test.csv", "--image-path", images, "--max-new-tokens", 16,
                 "--metrics", ",".join(METRICS), "--output-dir", told)  # fmt: skip
            numbers = json.loads((told / "metrics.json").read_text())
            for m in METRICS:
                found[arm][m].append(numbers[m]["value"])
            found[arm].setdefault("pictures", []).append(len(original) + len(some))
    tell(out, found, cfg)


def apart(captionset, source, target, titles):
    """Leave out variations that are some original's caption: the held-out ones among them would be known."""
    known = {captionset.cleaned(t) for row in captionset.read(titles) for t in row.captions}
    rows = [row for row in captionset.read(source) if captionset.cleaned(row.captions[0]) not in known]
    captionset.write(target, rows, {captionset.SOURCE: lambda row: row.source})


def interval(values):
    """(mean, half of the 95 % interval) of a few numbers, by Student's t."""
    if len(values) < 2:
        return float(np.mean(values)), float("nan")
    return float(np.mean(values)), float(
        stats.t.ppf(0.975, len(values) - 1) * np.std(values, ddof=1) / len(values) ** 0.5
    )


def said(values, form=".3f"):
    """A mean as text, with half of its interval where there are several values."""
    mean, half = interval(values)
    return f"{mean:{form}}" + (f" ± {half:.3f}" if half == half else "")


def tell(out, found, cfg):
    """The table and the figure."""
    from nanodiff.output import charts

    lines = ["| trained on | pictures | " + " | ".join(METRICS) + " |", "|---" * (len(METRICS) + 2) + "|"]
    for arm, numbers in found.items():
        cells = [f"{mean:.3g} ± {half:.2g}" for mean, half in (interval(numbers[m]) for m in METRICS)]
        lines.append(f"| {arm} | {np.mean(numbers['pictures']):.0f} | " + " | ".join(cells) + " |")
    base = found["original"]
    lines += [
        "",
        "Differences from the originals alone, seed by seed (mean ± half of the 95 % interval, paired t; p):",
        "",
    ]
    for arm in list(found)[1:]:
        for m in METRICS:
            d = np.array(found[arm][m]) - np.array(base[m])
            mean, half = interval(d)
            p = stats.ttest_1samp(d, 0).pvalue if len(d) > 1 and d.std() else float("nan")
            lines.append(f"- {arm}, {m}: {mean:+.3g} ± {half:.2g} (p = {p:.2g})")
    text = "\n".join(lines) + "\n"
    (out / "study.md").write_text(text, encoding="utf-8")
    write_json(out / "study.json", {"updates": cfg.updates, "seeds": cfg.seeds, "results": found})
    bands = {
        m: {"": [(mean, mean - half, mean + half) for mean, half in (interval(n[m]) for n in found.values())]}
        for m in METRICS
    }
    charts.lines(out / "study.png", list(found), bands, "trained on")
    print(text)


def trip(cfg):
    """Captions drawn, told, drawn again: a sheet, and how many come back."""
    import torch

    from nanodiff import data, pipeline
    from nanodiff.evaluation import caption_scores
    from nanodiff.output import images
    from nanodiff.stories import captioner_model

    out = Path(cfg.output_dir)
    net = captioner_model.load(cfg.model_file, torch.float32, "cpu")
    sd = pipeline.load(ROOT / "assets" / "nano", torch.float32, "cpu").with_scheduler("ddim")
    captions = list(dict.fromkeys(data.load(str(ROOT / "assets/emoji/emoji.tar")).captions))
    captions = [captions[i] for i in np.random.default_rng(cfg.seed).permutation(len(captions))[: cfg.captions]]

    def draw(texts):
        seeds = [cfg.seed + i for i in range(len(texts))]
        return images.to_pil(sd.generate(texts, seeds=seeds).pixels)

    first = draw(captions)
    told = net.describe(first, 16)
    again = draw([t or " " for t in told])
    cells, labels = [], []
    for i in range(min(cfg.shown, len(captions))):
        cells += [first[i].resize((128, 128)), again[i].resize((128, 128))]
        labels += [captions[i], f"told: {told[i]}"]
    images.save_png(images.grid(cells, 8, labels, size=11), out / "trip.png")
    metrics, _, _ = caption_scores.captions(
        {str(i): [t] for i, t in enumerate(told)}, {str(i): [t] for i, t in enumerate(captions)}, resamples=0
    )
    numbers = {k: m["value"] for k, m in metrics.items()} | {
        "exact": float(np.mean([a == b for a, b in zip(captions, told, strict=True)]))
    }
    write_json(out / "trip.json", {"captions": len(captions), **numbers})
    for name in ("exact", "bleu1", "bleu4", "cider"):
        print(f"{name}: {numbers[name]:.3f}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parts = parser.add_subparsers(dest="part", required=True)
    one = parts.add_parser("study")
    one.add_argument("--seeds", type=at_least(1), default=3)
    one.add_argument("--updates", type=at_least(1), default=400)
    one.add_argument("--output-dir", default="out/caption-study")
    two = parts.add_parser("trip")
    two.add_argument("--model-file", required=True)
    two.add_argument("--captions", type=at_least(1), default=64)
    two.add_argument("--shown", type=at_least(1), default=24)
    two.add_argument("--seed", type=int, default=0)
    two.add_argument("--output-dir", default="out/caption-demo")
    cfg = parser.parse_args()
    return tool(lambda: {"study": study, "trip": trip}[cfg.part](cfg))


if __name__ == "__main__":
    sys.exit(main())
