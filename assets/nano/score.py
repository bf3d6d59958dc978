"""Does the embedded model draw what it is asked?   python -m assets.nano.score [--model DIR]

For 200 captions, spread evenly over the data set, one picture each (seeds 0-199, the demo's settings). A picture is
right when the picture of its own caption is among the five nearest of the whole data set, by Euclidean distance of
16×16 colour pixels (area average). Chance would give 5 in 536. The last line is the share that is right, in per cent.

Beside it, two figures that go on where the score ends: the root-mean-square error to the caption's own picture (values of a
picture span 2), and a Fréchet distance between drawn and real pictures (FID's formula, Heusel et al. 2017 eq. 6, on the first
64 principal components of those colour pixels: fixed features of this data set, comparable with nothing else).
"""

import argparse
import sys

import torch
import torch.nn.functional as F

from nanodiff import data, pipeline
from nanodiff.commandline import at_least, tool
from nanodiff.files import write_json

CAPTIONS, NEAREST, BATCH, COMPONENTS = 200, 5, 20, 64


def embed(pixels):
    """[B, 3, 64, 64] -> [B, 768]: 16×16 colour pixels."""
    return F.adaptive_avg_pool2d(pixels.clamp(-1, 1), 16).flatten(1)


def frechet(a, b, basis):
    """‖μa - μb‖² + tr(Σa + Σb - 2 (Σa Σb)^½) of the rows of a and b along `basis` [D, K], in fp64."""
    (ma, sa), (mb, sb) = ((x.mean(0), torch.cov(x.T)) for x in (a.double() @ basis, b.double() @ basis))
    values, vectors = torch.linalg.eigh(sa)
    root = vectors * values.clamp(min=0).sqrt() @ vectors.T  # tr (Σa Σb)^½ = tr (Σa^½ Σb Σa^½)^½, which is symmetric
    cross = torch.linalg.eigvalsh(root @ sb @ root).clamp(min=0).sqrt().sum()
    return ((ma - mb).pow(2).sum() + sa.trace() + sb.trace() - 2 * cross).item()


def score(sd, dataset, captions=CAPTIONS):
    """{"top5": per cent, "top1": per cent, "rmse", "frechet", "missed": captions}"""
    real = data.Pictures(dataset, 64).batch(range(len(dataset)))
    known = embed(real)
    centred = (known - known.mean(0)).double()
    basis = torch.linalg.svd(centred, full_matrices=False).Vh[:COMPONENTS].T
    asked = [round(i * (len(dataset) - 1) / (captions - 1)) for i in range(captions)]
    ranks, errors, drawn = [], [], []
    for first in range(0, len(asked), BATCH):
        batch = asked[first : first + BATCH]
        made = sd.generate([dataset.captions[i] for i in batch], seeds=range(first, first + len(batch))).pixels.clamp(
            -1, 1
        )
        drawn.append(embed(made))
        distance = torch.cdist(drawn[-1], known)
        ranks += (distance < distance.gather(1, torch.tensor(batch)[:, None])).sum(1).tolist()
        errors += (made - real[batch]).pow(2).flatten(1).mean(1).tolist()
    missed = [dataset.captions[i] for i, rank in zip(asked, ranks, strict=True) if rank >= NEAREST]
    share = lambda n: 100 * sum(r < n for r in ranks) / len(ranks)  # noqa: E731
    return {"top5": share(NEAREST), "top1": share(1), "rmse": (sum(errors) / len(errors)) ** 0.5,
            "frechet": frechet(torch.cat(drawn), known, basis), "missed": missed}  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="assets/nano")
    parser.add_argument("--data", default="assets/emoji/emoji.tar")
    parser.add_argument("--captions", type=at_least(2), default=CAPTIONS)
    parser.add_argument("--json", help="also write the figures here")
    args = parser.parse_args()

    def run():
        dataset = data.load(args.data)
        got = score(pipeline.load(args.model), dataset, args.captions)
        if args.json:
            write_json(args.json, got)
        print(
            f"captions: {args.captions}, nearest neighbour right: {got['top1']:.1f}%, missed: {', '.join(got['missed']) or 'none'}"
        )
        print(f"error to the caption's own picture: {got['rmse']:.4f}, Fréchet distance: {got['frechet']:.3f}")
        print(f"{got['top5']:.1f}%")

    return tool(run)


if __name__ == "__main__":
    sys.exit(main())
