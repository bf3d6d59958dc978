"""One model's text encoder in another, which then learns from it what it did not know.

    python -m assets.world.graft --model out/deep/model --teacher out/four/model --data more/s-001.tar --output-dir out/grafted

Of two networks one may draw things better and the other know who stands where (TRAINING.md: the rate decides it). The first takes the second's
text encoder; the layers that read from it are fitted to it by least squares, so that they say what they said; then all of it learns
to predict what the second predicts of the same noisy latents (Hinton et al. 2015, arXiv 1503.02531): a target without the noise
of the data, in which one bit of a caption is easily heard. Both have the same tokenizer and VAE.
"""

import argparse
import copy
import math
import sys
from pathlib import Path

import torch
import torch.nn.functional as F
from tqdm import tqdm

from nanodiff import data, pipeline
from nanodiff.commandline import at_least, tool
from nanodiff.config import UserError
from nanodiff.files import apart, out_dir
from nanodiff.output import images
from nanodiff.training import recipe

TOGETHER = 256  # captions, or pictures, encoded at a time
RIDGE = 1e-3  # of the mean square of what is read: directions in which nothing differs stay small


def read(sd, ids):
    """What a pipeline's text encoder gives its denoiser: (states [B, S, D], pooled [B, P])."""
    states, pooled = sd.text_encoder(ids)
    return sd.pick(0, 0)(states), pooled


@torch.no_grad()
def fit(layer, x, y):
    """Give a linear layer the weights with which it says nearly y [..., E] of x [..., D] (ridge regression).

    Returns the mean square of what is left, relative to the variance of y."""
    x, y = x.flatten(0, -2).double(), y.flatten(0, -2).double()
    mean_x, mean_y = x.mean(0), y.mean(0)
    x, y = x - mean_x, y - mean_y
    square = x.T @ x
    square += RIDGE * square.diagonal().mean() * torch.eye(len(square), dtype=torch.double)
    weight = torch.linalg.solve(square, x.T @ y)
    layer.weight.copy_(weight.T)
    layer.bias.copy_(mean_y - mean_x @ weight)
    return ((x @ weight - y).pow(2).mean() / y.pow(2).mean()).item()


@torch.no_grad()
def graft(sd, teacher, ids):
    """Put the teacher's text encoder into `sd`; ids: tokens of captions [N, S] to fit by. Returns what fit() leaves, of states and pooled."""
    some = [ids[i : i + TOGETHER] for i in range(0, len(ids), TOGETHER)]
    (own, own_pooled), (new, new_pooled) = (
        (torch.cat(part) for part in zip(*(read(one, batch) for batch in some), strict=True)) for one in (sd, teacher)
    )
    of_states, of_pooled = sd.net.context_embedder, sd.net.time_text_embed.text_embedder.linear_1
    left = fit(of_states, new, of_states(own)), fit(of_pooled, new_pooled, of_pooled(own_pooled))
    sd.encoders[0] = copy.deepcopy(teacher.text_encoder)
    return left


def learn(sd, teacher, latents, ids, updates, batch, lr, seed=0):
    """Let the denoiser and text encoder of `sd` predict what the teacher predicts, at logit-normal times with mean 1: who stands where is decided
    in the noise. latents [N, C, h, w] and their captions' ids [N, S]."""
    net = torch.nn.ModuleDict({"denoiser": sd.net, "text_encoder": sd.text_encoder}).train().requires_grad_(True)
    opt = recipe.Muon(list(net.parameters()), recipe.hidden(net), lr, betas=(0.9, 0.99), weight_decay=0.01)
    draw, mean = torch.Generator().manual_seed(seed), None
    with tqdm(range(updates), desc="learning", disable=None) as steps:
        for step in steps:
            for group in opt.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / updates)) / 2
            rows = torch.randint(len(latents), (batch,), generator=draw)
            t = torch.sigmoid(1 + torch.randn(batch, generator=draw)) * sd.schedule.T
            noise = torch.randn(latents[rows].shape, generator=draw)
            x = sd.schedule.add_noise(latents[rows], noise, t)
            with torch.no_grad():
                want = teacher.denoise(teacher.net, x, t, *read(teacher, ids[rows]))
            loss = F.mse_loss(sd.denoise(sd.net, x, t, *read(sd, ids[rows])), want)
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            mean = loss.item() if mean is None else 0.98 * mean + 0.02 * loss.item()
            steps.set_postfix(loss=f"{mean:.4f}")
            if steps.disable and step % 50 == 0:
                print(f"update {step}/{updates}: loss {mean:.4f}", file=sys.stderr)
    net.eval().requires_grad_(False)
    return mean


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--model", required=True, help="the pipeline that learns")
    parser.add_argument(
        "--teacher", required=True, help="the pipeline whose text encoder it takes and which it learns from"
    )
    parser.add_argument(
        "--data", required=True, help="pictures with captions, such as a shard of make.py --task relation"
    )
    parser.add_argument("--scenes", type=at_least(1), default=12_000, help="of the data, the first so many")
    parser.add_argument("--updates", type=at_least(1), default=450)
    parser.add_argument("--batch-size", type=at_least(1), default=128)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    return tool(lambda: run(args))


def run(args):
    apart({"model": args.model, "teacher": args.teacher, "data": args.data}, [args.output_dir])
    sd, teacher = (pipeline.load(name) for name in (args.model, args.teacher))
    some = data.load(args.data)
    captions = some.captions[: args.scenes]
    if sd.tokenizer(captions[:50]) != teacher.tokenizer(captions[:50]):
        raise UserError(f"{args.model} and {args.teacher} have different tokenizers")
    ids = torch.tensor(sd.tokenizer(captions))
    latents, drawn = [], torch.Generator().manual_seed(0)
    with torch.no_grad():
        for i in tqdm(range(0, len(ids), TOGETHER), desc="encoding pictures", disable=None):
            pixels = torch.stack([images.to_pixels(some.image(j)) for j in range(i, min(i + TOGETHER, len(ids)))])
            latents.append(teacher.encode_pixels(pixels, lambda shape: torch.randn(shape, generator=drawn)))
    states, pooled = graft(sd, teacher, ids[:4000])
    print(f"refitted: {states:.4f} of the states' variance is left, {pooled:.4f} of the pooled ones'")
    loss = learn(sd, teacher, torch.cat(latents), ids, args.updates, args.batch_size, args.lr)
    sd.save(out_dir(args.output_dir))
    print(f"last loss {loss:.4f}; the model: {args.output_dir}")


if __name__ == "__main__":
    sys.exit(main())
