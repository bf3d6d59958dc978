"""Does the embedded model draw what it is asked?   python -m assets.nano.score [--model DIR]

For 200 captions, spread evenly over the data set, one picture each (seeds 0-199, the demo's settings). A picture is
right when the picture of its own caption is among the five nearest of the whole data set, by Euclidean distance of
16×16 colour pixels (area average). Chance would give 5 in 536. The last line is the share that is right, in per cent.
"""

import argparse

import torch
import torch.nn.functional as F

from nanodiff import data, pipeline

CAPTIONS, NEAREST, BATCH = 200, 5, 20


def embed(pixels):
    """[B, 3, 64, 64] -> [B, 768]: 16×16 colour pixels."""
    return F.adaptive_avg_pool2d(pixels.clamp(-1, 1), 16).flatten(1)


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--model", default="assets/nano")
    parser.add_argument("--data", default="assets/emoji/emoji.tar")
    parser.add_argument("--captions", type=int, default=CAPTIONS)
    args = parser.parse_args()
    dataset = data.load(args.data)
    known = embed(data.Pictures(dataset, 64).batch(range(len(dataset))))
    asked = [round(i * (len(dataset) - 1) / (args.captions - 1)) for i in range(args.captions)]
    sd = pipeline.load(args.model)
    ranks = []
    for first in range(0, len(asked), BATCH):
        batch = asked[first : first + BATCH]
        made = sd.generate(
            [dataset.captions[i] for i in batch], steps=25, guidance_scale=3.0, seeds=range(first, first + len(batch))
        )
        distance = torch.cdist(embed(made.pixels), known)
        own = distance.gather(1, torch.tensor(batch)[:, None])
        ranks += (distance < own).sum(1).tolist()
    missed = [dataset.captions[i] for i, rank in zip(asked, ranks, strict=True) if rank >= NEAREST]
    print(
        f"captions: {len(asked)}, nearest neighbour right: {sum(r == 0 for r in ranks)}, missed: {', '.join(missed) or 'none'}"
    )
    print(f"{100 * sum(r < NEAREST for r in ranks) / len(ranks):.1f}%")


if __name__ == "__main__":
    main()
