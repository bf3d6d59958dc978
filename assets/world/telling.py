"""Does a captioner read scenes?  And does a caption survive being drawn, told and drawn again?

    python -m assets.world.telling score --model-file out/world-captioner/captioner/checkpoints/last_checkpoint --output-dir out/world-captioner
    python -m assets.world.telling trip --model-file … --output-dir out/world-captioner

score: real scenes of every task, seen and held out; a sentence is right when scenes.parse() understands it and it is true of the scene. Beside
that each part alone: colours, shapes, how many, where. trip: held-out captions are drawn, the pictures told, those sentences drawn again.
"""

import argparse
import sys
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from assets.world import reader, scenes, score
from nanodiff.commandline import at_least, tool
from nanodiff.files import out_dir, write_json
from nanodiff.output import images

TOKENS = 24


def judge(sentence, scene):
    """(None, or what is wrong with a sentence about a scene; {part: is it right?})"""
    told = scenes.parse(sentence)
    if told is None:
        return "grammar", {}
    read = reader.Reading(scene.things, scene.ground)
    return reader.true_of(read, told), reader.parts_of(read, told)


def tell(net, pictures, batch=64):
    """A sentence for each PIL picture."""
    return [t for i in range(0, len(pictures), batch) for t in net.describe(pictures[i : i + batch], TOKENS)]


def scores(net, count, tasks=scenes.TASKS):
    """{"seen" | "held-out": {task: score.share() and "wrong", "parts"}}"""
    out = {}
    for group, held in (("seen", False), ("held-out", True)):
        out[group] = {}
        for task in tasks:
            some = score.asked(task, held, count)
            sentences = tell(net, [s.picture() for s in some])
            judged = [judge(t, s) for t, s in zip(sentences, some, strict=True)]
            parts = {
                n: [p.get(n, False) for _, p in judged if n in p or not p]
                for n in dict.fromkeys(n for _, p in judged for n in p)
            }
            wrong = Counter(w for w, _ in judged if w)
            out[group][task] = score.share(len(some) - sum(wrong.values()), len(some)) | {
                "wrong": dict(wrong), "parts": {n: float(np.mean(v)) for n, v in parts.items()}
            }  # fmt: skip
    return out


@torch.inference_mode()
def sides(net, count, held):
    """{which of the two is named first: share of relation scenes in which the true words between them are likelier than their opposite}.
    What a captioner says by itself shows the order that it was taught; this shows whether it knows both."""
    found = {"left or upper": [], "right or lower": []}
    for scene in score.asked("relation", held, count):
        pixels, things = net.pictures.batch([scene.picture()]), scene.told.objects
        for (a, b), where in ((things, scene.told.relation), (things[::-1], scenes.OPPOSITE[scene.told.relation])):
            losses = []
            for said in (where, scenes.OPPOSITE[where]):
                caption = scenes.caption(scenes.Told("relation", (a, b), scene.ground, said))
                losses.append(net(pixels, torch.tensor([net.caption_ids(caption)])).item())
            found["left or upper" if where in ("left", "above") else "right or lower"].append(losses[0] < losses[1])
    return {k: score.share(sum(v), len(v)) for k, v in found.items()}


def trip(net, sd, count):
    """({what: share}, [(caption, sentence, picture, picture again)]): captions drawn, told, drawn again."""
    some = [scene for scene, _ in score.mixed(count)]
    first = score.draw(sd, [s.caption for s in some])
    sentences = tell(net, [Image.fromarray(p) for p in first])
    again = score.draw(sd, [t or " " for t in sentences])
    read = [reader.read(p) for p in first]
    told = [scenes.parse(t) for t in sentences]
    # a sentence is right of what the reader sees in the picture, whatever the caption was
    sees = [t is not None and reader.true_of(r, t) is None for r, t in zip(read, told, strict=True)]
    kept = [reader.true_of(reader.read(p), s.told) is None for p, s in zip(again, some, strict=True)]
    drawn = [reader.true_of(r, s.told) is None for r, s in zip(read, some, strict=True)]
    shares = {"drawn as asked": drawn, "told as drawn": sees, "drawn again as first asked": kept}
    return {k: float(np.mean(v)) for k, v in shares.items()}, list(
        zip([s.caption for s in some], sentences, first, again, strict=True)
    )


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("score", "trip"))
    parser.add_argument("--model-file", required=True, help="a captioner's checkpoint")
    parser.add_argument(
        "--model", default=str(Path(__file__).parent), help="what draws, for trip; default: the embedded model"
    )
    parser.add_argument(
        "--captions", type=at_least(1), default=200, help="of each task, seen and held out; for trip in all"
    )
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    return tool(lambda: run(args))


def run(args):
    from nanodiff import pipeline
    from nanodiff.stories import captioner_model

    out_dir(args.output_dir)
    net = captioner_model.load(args.model_file, torch.float32, "cpu")
    if args.part == "score":
        found = scores(net, args.captions)
        print(score.table(found))
        for group, tasks in found.items():
            print(f"{group}: " + ", ".join(f"{task} {s['share']:.3f}" for task, s in tasks.items()))
        print(f"captioner: seen {score.mean(found['seen']):.3f} held-out {score.mean(found['held-out']):.3f}")
        found["sides"] = {group: sides(net, args.captions, group == "held-out") for group in found}
        for group, told in found["sides"].items():
            print(
                f"{group}, the relation when the thing named first is "
                + ", ".join(f"{k}: {v['share']:.3f}" for k, v in told.items())
            )
    else:
        found, trips = trip(net, pipeline.load(args.model), args.captions)
        cells, labels = [], []
        for caption, sentence, first, again in trips[:24]:
            cells += [score.shown(first), score.shown(again)]
            labels += [caption, f"told: {sentence}"]
        images.save_png(images.grid(cells, 8, labels), args.output_dir / "trip.png")
        print("\n".join(f"{k}: {v:.3f}" for k, v in found.items()))
    write_json(args.output_dir / f"{args.part}.json", found)


if __name__ == "__main__":
    sys.exit(main())
