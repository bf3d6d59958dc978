"""Does synthetic data help a captioner that has few originals?   make world-synthetic, or: python -m assets.world.synthetic --output-dir out/world-synthetic

For each seed: a few hundred scenes of one object with captions, of which nothing is held out. A small captioner learns from them; its language model, which has read
those captions alone, writes new ones; the embedded model draws them. Then captioners learn, for the same number of updates each, from the originals, with
the synthetic pictures beside them, with those alone whose caption the reader finds true, and with as many scenes more as there are synthetic ones (what
real data would have done). All tell --captions scenes of kinds that were seen and as many of kinds held out (telling.py): exact scores, means over the seeds with 95 % intervals (Student's t), and
the differences from the originals alone, seed by seed. The embedded model has seen many more scenes than the captioner: what it knows is what there is to gain.
"""

import argparse
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from assets.nano.captions import VARY, interval, learn, said, step
from assets.world import reader, scenes, score
from nanodiff.commandline import at_least, tool
from nanodiff.files import out_dir, settled, write_bytes, write_json

ARMS = ("originals", "with synthetic", "with synthetic, filtered", "with real ones")
TASK = "one"
TIMES = 3  # synthetic captions for each original
LEARN = ["--model-size", "world", "--mixed-precision", "no", "--projector-dropout", "0", "--batch-size", "32", "--lr", "2e-3", "--adam-beta2", "0.99", "--lr-warmup-steps", "0.1", "--optimizer", "muon", "--lr-scheduler", "cosine",
         "--max-new-tokens", "24", "--save-epochs", "0", "--samples", "3", "--resume", "auto"]  # fmt: skip
DRAW = ["--model", "assets/world", "--template", "{caption}", "--negative-prompt", "", "--steps", "20", "--guidance-scale", "4", "--resize", "none",
        "--format", "png", "--batch-size", "50"]  # fmt: skip


def scenes_of(folder, count, first, seed):
    """A CSV of `count` scenes, from number `first` on, and its folder of pictures."""
    if not (folder / "titles.csv").is_file():
        shard = folder.with_suffix(".tar")
        step("-m", "assets.world.make", shard, "--scenes", count, "--first", first, "--seed", seed, "--task", TASK)
        step("-m", "nanodiff.captionset", "export", shard, folder)
    return folder / "titles.csv", folder / "images"


def judged(rows, folder):
    """[(what is in the picture, what is wrong with its caption)] of synthetic rows: reader.Reading; None, what is not as told, or "grammar"."""
    out = []
    for row in rows:
        told = scenes.parse(row.captions[0])
        with Image.open(folder / f"{row.name}.png") as picture:
            read = reader.read(np.asarray(picture.convert("RGB")))
        out.append((read, "grammar" if told is None else reader.true_of(read, told)))
    return out


def facts(rows, judgements, originals):
    """{what: share} of a synthetic set."""
    known = {text for row in originals for text in row.captions}
    shares = {
        "new captions": [row.captions[0] not in known for row in rows],
        "in the grammar": [wrong != "grammar" for _, wrong in judgements],
        "true": [wrong is None for _, wrong in judgements],
        "true and held out": [
            wrong is None and scenes.held_out().why(read.things) is not None for read, wrong in judgements
        ],
    }
    return {"synthetic": len(rows), **{k: float(np.mean(v)) for k, v in shares.items()}}


def one_seed(home, seed, args):
    """{arm: telling.scores()} and facts() of one seed."""
    import torch

    from assets.world import telling
    from nanodiff.data import captionset
    from nanodiff.stories import captioner_model

    n, number = args.originals, 1000 + seed
    train, images = scenes_of(home / "originals", n, 0, number)
    more, more_images = scenes_of(home / "more", TIMES * n, n, number)
    val, val_images = scenes_of(home / "val", 50, (1 + TIMES) * n, number)
    folders = [images, more_images, val_images]

    def taught(arm, csv):
        return learn(home / f"captioner-{ARMS.index(arm)}", csv, val, folders, seed, args.updates, LEARN)

    made = home / "synthetic"
    step("caption.py", "augment", "--data-csv", train, "--model", taught(ARMS[0], train) / "llm", *VARY, "--max-new-tokens", 24, "--max-words", 16,
         "--variations", TIMES, "--seed", seed, "--output-dir", made)  # fmt: skip
    step("caption.py", "synthesize", *DRAW, "--seed", seed, "--output-dir", made)
    folders.append(made / "images")
    originals, real, synthetic = map(captionset.read, (train, more, made / "synthetic_captions.csv"))
    judgements = judged(synthetic, made / "images")
    true = [row for row, (_, wrong) in zip(synthetic, judgements, strict=True) if wrong is None]
    sets = dict(zip(ARMS, (originals, originals + synthetic, originals + true, originals + real), strict=True))
    found = {}
    for i, (arm, rows) in enumerate(sets.items()):
        csv = home / f"train-{i}.csv" if i else train
        if i:
            captionset.write(csv, rows)
        net = captioner_model.load(taught(arm, csv), torch.float32, "cpu")
        found[arm] = {"pictures": len(rows)} | telling.scores(net, args.captions, (TASK,))
    return found, facts(synthetic, judgements, originals)


def table(results):
    """Markdown: the scores of each arm over the seeds, and what the synthetic sets are like."""
    groups = ("seen", "held-out")
    lines = ["| learned from | pictures | seen | held-out | more than originals alone, seen | held-out |", "|---" * 6 + "|"]  # fmt: skip
    values = {arm: {g: [score.mean(r[0][arm][g]) for r in results] for g in groups} for arm in ARMS}
    for arm in ARMS:
        pictures = np.mean([r[0][arm]["pictures"] for r in results])
        more = [[a - b for a, b in zip(values[arm][g], values[ARMS[0]][g], strict=True)] for g in groups]
        ends = [said(v, "+.3f") for v in more] if arm != ARMS[0] else ["", ""]
        lines.append(f"| {arm} | {pictures:.0f} | " + " | ".join([*(said(values[arm][g]) for g in groups), *ends]) + " |")  # fmt: skip
    shares = [f"{k} {np.mean([r[1][k] for r in results]):.3g}" for k in results[0][1]]
    return "\n".join([*lines, "", "Of the synthetic ones: " + ", ".join(shares) + "."]) + "\n"


def run(args):
    from nanodiff.output import charts

    out = out_dir(args.output_dir.resolve())
    settled(out, {k: getattr(args, k) for k in ("originals", "updates", "captions")})
    results = [one_seed(out / f"seed-{seed}", seed, args) for seed in range(args.seeds)]
    write_json(out / "synthetic.json", [{"arms": found, "synthetic": about} for found, about in results])
    write_bytes(out / "synthetic.md", table(results).encode())
    bands = {}
    for group in ("seen", "held-out"):
        points = [interval([score.mean(found[arm][group]) for found, _ in results]) for arm in ARMS]
        bands[f"score, {group}"] = {"": [(mean, mean - half, mean + half) for mean, half in points]}
    charts.lines(out / "synthetic.png", list(ARMS), bands, "learned from")
    print(table(results))


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--originals", type=at_least(1), default=500, help="scenes of each seed")
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--updates", type=at_least(1), default=700, help="of every captioner")
    parser.add_argument("--captions", type=at_least(1), default=300, help="scenes told, seen and held out")
    parser.add_argument("--output-dir", type=Path, default=Path("out/world-synthetic"))
    args = parser.parse_args()
    return tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
