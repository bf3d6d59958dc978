"""Learning from one's own mistakes: of two pictures of a caption the right one is to become likelier, the wrong one less.

    python -m assets.world.prefer --output-dir out/preferred

Nobody has to say which of them is right: reader.py does, exactly. Captions of scenes that training may see are drawn twice; where one of the
two pictures is right and the other is not, they are a pair to learn from by Diffusion-DPO (Wallace et al. 2023, arXiv 2311.12908 eq. 14), in
the form of a flow. Then the new model draws, for the next round. What is held out stays so, and the text encoder and the VAE stay as they are.
"""

import argparse
import copy
import itertools
import math
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import ImageOps
from tqdm import tqdm

from assets.world import reader, scenes, score
from assets.world.graft import read
from nanodiff import pipeline
from nanodiff.commandline import at_least, tool
from nanodiff.config import UserError
from nanodiff.files import apart, out_dir, write_json
from nanodiff.output import images
from nanodiff.training import recipe

SEED = 2_000_000  # of the first caption; training draws from (1, i), score.py from (1_000_000, i)
TOGETHER = 25  # captions drawn at a time, twice each
# captions of each task in a round: most where most goes wrong
SHARES = {"one": 0.03, "size": 0.03, "binding": 0.46, "relation": 0.14, "count": 0.34}


def pairs(sd, tasks, first=0, **settings):
    """(right latents [N, C, h, w], wrong ones, captions, {task: {"captions", "right" pictures of two each, "pairs"}}) of `tasks`: {task: captions}.

    Caption i is the scene of seed (SEED, first + i), its pictures are from seeds of their own; settings: of Pipeline.generate. Raises UserError
    where there is no pair."""
    told = [
        scenes.random_scene(np.random.default_rng((SEED, first + i)), task, False)
        for i, task in enumerate(t for t, n in tasks.items() for _ in range(n))
    ]
    right, wrong, captions = [], [], []
    counted = {task: {"captions": n, "right": 0, "pairs": 0} for task, n in tasks.items()}
    with tqdm(range(0, len(told), TOGETHER), desc="drawing twice", disable=None) as parts:
        for i in parts:
            some = told[i : i + TOGETHER]
            seeds = range(SEED + 2 * (first + i), SEED + 2 * (first + i + len(some)))
            made = sd.generate([s.caption for s in some for _ in range(2)], seeds=seeds, **settings)
            drawn = [np.asarray(p) for p in images.to_pil(made.pixels)]
            for j, scene in enumerate(some):
                good = [reader.true_of(reader.read(p), scene.told) is None for p in drawn[2 * j : 2 * j + 2]]
                counted[scene.told.task]["right"] += sum(good)
                if good[0] != good[1]:
                    right.append(made.latents[2 * j + good[1]].clone())
                    wrong.append(made.latents[2 * j + good[0]].clone())
                    captions.append(scene.caption)
                    counted[scene.told.task]["pairs"] += 1
            parts.set_postfix(pairs=len(captions))
            if parts.disable and i // TOGETHER % 20 == 0:
                print(f"{i} of {len(told)} captions drawn: {len(captions)} pairs", file=sys.stderr)
    if not captions:
        raise UserError(f"of {len(told)} captions none was drawn right once and wrong once; ask for more (`captions`)")
    return torch.stack(right), torch.stack(wrong), captions, counted


def errors(sd, net, x0, noise, t, told):
    """Mean square [B] of what a network's prediction of x0's flow is off."""
    off = sd.denoise(net, sd.schedule.add_noise(x0, noise, t), t, *told) - sd.schedule.target(x0, noise, t)
    return off.pow(2).flatten(1).mean(1)


def learn(sd, right, wrong, ids, updates, batch, lr, beta, hold, seed=0):
    """Train the denoiser of `sd` on pairs of latents [N, C, h, w] and their captions' ids [N, S]; returns (mean loss, share of the pairs
    whose right picture has gained on the wrong one, against the weights it began with) of the last updates.

    beta: how strongly those weights hold it; hold: how much the right picture counts by itself, beside the difference (the likelihood of what is
    preferred, as in Pang et al. 2024, arXiv 2404.19733 eq. 1): without it both become worse, the wrong one faster. Times are logit-normal with mean
    1: what is in a picture is decided in the noise."""
    net, before = sd.net.train().requires_grad_(True), copy.deepcopy(sd.net).eval().requires_grad_(False)
    opt = torch.optim.AdamW(net.parameters(), lr, betas=(0.9, 0.99), weight_decay=0.0)
    average, draw, mean = recipe.EMA(net, 0.99), torch.Generator().manual_seed(seed), None
    with torch.no_grad():
        states, pooled = (torch.cat(part) for part in zip(*(read(sd, some) for some in ids.split(256)), strict=True))
    with tqdm(range(updates), desc="learning", disable=None) as steps:
        for step in steps:
            for group in opt.param_groups:
                group["lr"] = lr * min(1, (step + 1) / 30) * (1 + math.cos(math.pi * step / updates)) / 2
            rows = torch.randint(len(ids), (batch,), generator=draw)
            t = (torch.sigmoid(1 + torch.randn(batch, generator=draw)) * sd.schedule.T).repeat(2)
            # both pictures of a pair get the same noise
            noise = torch.randn(right[rows].shape, generator=draw).repeat(2, 1, 1, 1)
            x0 = torch.cat([right[rows], wrong[rows]])
            told = states[rows].repeat(2, 1, 1), pooled[rows].repeat(2, 1)
            with torch.no_grad():
                was = errors(sd, before, x0, noise, t, told)
            better, worse = (was - errors(sd, net, x0, noise, t, told)).chunk(2)
            loss = -F.logsigmoid(beta / 2 * (better - worse)).mean() - hold * beta / 4 * better.mean()
            opt.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
            opt.step()
            average.update(net, step + 1)
            now = torch.tensor([loss.item(), (better > worse).float().mean().item(), better.mean().item()])
            mean = now if mean is None else 0.98 * mean + 0.02 * now
            steps.set_postfix(loss=f"{mean[0]:.4f}", gained=f"{mean[1]:.3f}")
            if steps.disable and step % 25 == 0:
                print(
                    f"update {step}/{updates}: loss {mean[0]:.4f}, {mean[1]:.3f} of the pairs gained, right pictures' error {-mean[2]:+.5f}",
                    file=sys.stderr,
                )
    with torch.no_grad():
        for name, value in average.shadow.items():
            net.get_parameter(name).copy_(value)
    net.eval().requires_grad_(False)
    return mean[0].item(), mean[1].item()


def sheet(sd, right, wrong, captions):
    """Pairs side by side: what is right framed green, what is wrong red, a caption below each."""
    framed, labels = [], []
    for good, bad, caption in zip(right, wrong, captions, strict=True):
        for picture, colour in zip(
            images.to_pil(sd.decode(torch.stack([good, bad]))), ("#27ae60", "#c0392b"), strict=True
        ):
            framed.append(ImageOps.expand(score.shown(np.asarray(picture)), 4, colour))
            labels.append(caption)
    return images.grid(framed, 8, labels)


def run(args):
    apart({"model": args.model}, [args.output_dir])
    out = out_dir(args.output_dir)
    sd = pipeline.load(args.model)
    if not isinstance(sd, pipeline.Joint) or len(sd.encoders) != 1:
        raise UserError(f"--model {args.model}: is no model of the small world (an MMDiT with one text encoder)")
    tasks = {task: max(1, round(args.captions * part)) for task, part in SHARES.items()}
    rounds, known = [], []
    for i in range(args.rounds):
        right, wrong, captions, counted = pairs(sd, tasks, first=i * sum(tasks.values()))
        known.append((right, wrong, captions))
        images.save_png(sheet(sd, right[:16], wrong[:16], captions[:16]), out / f"pairs-{i + 1}.png")
        found = ", ".join(f"{task} {c['right'] / c['captions'] / 2:.3f} right" for task, c in counted.items())
        print(f"round {i + 1}: {found}; {len(captions)} pairs, some of them: {out / f'pairs-{i + 1}.png'}")
        # those of the rounds before, too: a round has few
        right, wrong, captions = (list(itertools.chain(*part)) for part in zip(*known, strict=True))
        few = torch.stack(right), torch.stack(wrong), torch.tensor(sd.tokenizer(captions))
        loss, gained = learn(sd, *few, args.updates, args.batch_size, args.lr, args.beta, args.hold, seed=i)
        rounds.append({"drawn": counted, "loss": loss, "gained": gained})
        print(
            f"round {i + 1}: last loss {loss:.4f}; of {gained:.3f} of the pairs the right picture has gained on the wrong one"
        )
        sd.kept.clear()
        sd.save(out / "model")
        write_json(out / "rounds.json", rounds)
    print(f"the model: {out / 'model'}\nnext: make world-score MODEL={out / 'model'}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--model", default=str(Path(__file__).parent), help="the pipeline that learns; default: the embedded one"
    )
    parser.add_argument("--rounds", type=at_least(1), default=2)
    parser.add_argument("--captions", type=at_least(1), default=6600, help="that are drawn twice in a round")
    parser.add_argument("--updates", type=at_least(1), default=160, help="of a round")
    parser.add_argument("--batch-size", type=at_least(1), default=64, help="pairs of an update")
    parser.add_argument("--lr", type=float, default=2e-4)
    parser.add_argument("--beta", type=float, default=300.0, help="how strongly it is held to what it was (DPO)")
    parser.add_argument("--hold", type=float, default=0.5, help="how much a right picture counts by itself")
    parser.add_argument("--output-dir", type=Path, required=True)
    args = parser.parse_args()
    return tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
