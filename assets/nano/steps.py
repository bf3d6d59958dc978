"""Quality against steps, of the embedded model and of its students.   python -m assets.nano.steps --student NAME=DIR … --output-dir DIR

Each is drawn at 1, 2, 4, 8 (and the teacher at 50) steps and scored in two ways. From captions, by score.py: the share of 100 captions whose
own picture is among the five nearest, the error to that picture, a Fréchet distance; the teacher with guidance 3, the students without,
since theirs is built in. And from no words at all, where one step cannot do: whatever the model makes up, 200 pictures, by the
same Fréchet distance. One line says whether a student's 4 steps keep 90 % of the teacher's score at 50.
"""

import argparse
import json
import sys
from pathlib import Path

import torch

from assets.nano import score
from nanodiff import data, pipeline
from nanodiff.commandline import tool
from nanodiff.output import charts, images

STEPS, OWN, CAPTIONS, FREE = (1, 2, 4, 8), 50, 100, 200


def free(sd, known, basis, steps, guidance):
    """(Fréchet distance of FREE pictures from the empty text, the first eight)"""
    made = []
    for first in range(0, FREE, score.BATCH):
        seeds = range(first, first + score.BATCH)
        made.append(
            sd.generate([""] * score.BATCH, steps=steps, guidance_scale=guidance, seeds=seeds).pixels.clamp(-1, 1)
        )
    made = torch.cat(made)
    return score.frechet(score.embed(made), known, basis), made[:8]


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/nano")
    parser.add_argument("--student", action="append", default=[], metavar="NAME=DIR")
    parser.add_argument("--data", default="assets/emoji/emoji.tar")
    parser.add_argument("--output-dir", required=True)
    args = parser.parse_args()
    if wrong := [s for s in args.student if "=" not in s]:
        parser.error(f"--student {wrong[0]}: expected NAME=DIR")
    return tool(lambda: compare(args))


def compare(args):
    out = Path(args.output_dir)
    out.mkdir(parents=True, exist_ok=True)
    dataset = data.load(args.data)
    known = score.embed(data.Pictures(dataset, 64).batch(range(len(dataset))))
    basis = torch.linalg.svd((known - known.mean(0)).double(), full_matrices=False).Vh[: score.COMPONENTS].T
    models = {"teacher": args.model} | dict(s.split("=", 1) for s in args.student)
    rows, sheet, labels = {}, [], []
    for name, folder in models.items():
        for steps in (*STEPS, *((OWN,) if name == "teacher" else ())):
            sd = pipeline.load(folder)
            guidance = 3.0 if name == "teacher" else 1.0
            sd.index = {**sd.index, pipeline.SAMPLING: {"steps": steps, "guidance_scale": guidance}}
            found = score.score(sd, dataset, CAPTIONS)
            distance, made = free(sd, known, basis, steps, 1.0)
            rows[f"{name}, {steps}"] = {
                "score": found["top5"],
                "error": found["rmse"],
                "frechet": found["frechet"],
                "frechet_no_words": distance,
            }
            print(
                f"{name}, {steps} steps: " + ", ".join(f"{k} {v:.4g}" for k, v in rows[f"{name}, {steps}"].items()),
                flush=True,
            )
            sheet.append(made)
            labels += [f"{name}, {steps}", *[""] * 7]
    (out / "steps.json").write_text(json.dumps(rows, indent=2) + "\n")
    every = (*STEPS, OWN)
    value = lambda name, n, k: rows.get(f"{name}, {n}", {}).get(k, float("nan"))  # noqa: E731
    titles = {"score": "score, %", "error": "error to the caption's picture", "frechet": "Fréchet distance",
              "frechet_no_words": "Fréchet distance, without words"}  # fmt: skip
    charts.lines(
        out / "steps.png",
        every,
        {t: {m: [value(m, n, k) for n in every] for m in models} for k, t in titles.items()},
        "steps",
    )
    images.save_grid(torch.cat(sheet), out / "no_words.png", nrow=8, labels=labels)
    for name in list(models)[1:]:
        share = 100 * rows[f"{name}, 4"]["score"] / rows[f"teacher, {OWN}"]["score"]
        print(f"{name}: at 4 steps {share:.1f}% of the teacher's score at {OWN}")


if __name__ == "__main__":
    sys.exit(main())
