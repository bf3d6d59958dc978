"""The small world's recipe beside diffusers' at equal compute:   python benchmarks/world.py --peer PYTHON

Both train the embedded model's network with a text encoder from scratch, on the same close-ups of single objects (assets/world/study.py), in the latents of the same
VAE, over the same number of pictures, both in fp32. Ours is train.py's preset `world` (Muon), as in `make world-study`. The peer's loop is that of diffusers'
train_dreambooth_sd3.py with --train_text_encoder and latents kept, without accelerate: AdamW, EMAModel; as that script has it (a constant 1e-4, logit-normal
times of mean 0), and at its best here (1e-3 on a cosine, with our times: of mean -0.5 there, where u is counted from the noise). Every model is then drawn by one sampler and read by the same code: exact scores of
kinds that were in training and of kinds held out. Seconds are of the updates alone, the first ten left out. Sides alternate.
PEER is the interpreter of an environment with diffusers and transformers. Results: benchmarks/world-NAME.json; a run that is in --work is not made again.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent
WORLD = ROOT / "assets" / "world"
PEER = """
import io, json, sys, tarfile, time, warnings
warnings.simplefilter("ignore")
import numpy as np, torch
from PIL import Image
from diffusers import AutoencoderKL, SD3Transformer2DModel
from diffusers.training_utils import EMAModel, compute_density_for_timestep_sampling
from transformers import CLIPTextConfig, CLIPTextModelWithProjection, CLIPTokenizer
world, data, out, updates, batch, seed = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]), int(sys.argv[6])
rate, mean_of_times, cosine = float(sys.argv[7]), float(sys.argv[8]), sys.argv[9] == "cosine"
torch.manual_seed(seed)
net = SD3Transformer2DModel.from_config(SD3Transformer2DModel.load_config(world + "/transformer"))
encoder = CLIPTextModelWithProjection(CLIPTextConfig.from_pretrained(world + "/text_encoder"))
tokenizer, vae = CLIPTokenizer.from_pretrained(world + "/tokenizer"), AutoencoderKL.from_pretrained(world + "/vae").requires_grad_(False)
files = {m.name: tarfile.open(data).extractfile(m).read() for m in tarfile.open(data)}
names = sorted(n[:-4] for n in files if n.endswith(".png"))
pixels = torch.stack([torch.from_numpy(np.asarray(Image.open(io.BytesIO(files[n + ".png"])).convert("RGB"))) for n in names])
with torch.no_grad():
    dist = [vae.encode(p.permute(0, 3, 1, 2).float() / 127.5 - 1).latent_dist for p in pixels.split(64)]
mean, std = torch.cat([d.mean for d in dist]), torch.cat([d.std for d in dist])
ids = lambda texts: tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids
words, nothing = ids([files[n + ".txt"].decode() for n in names]), ids([""])
weights = [*net.parameters(), *encoder.parameters()]
opt = torch.optim.AdamW(weights, lr=rate, betas=(0.9, 0.999), weight_decay=1e-4)
ema = [EMAModel(m.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75) for m in (net, encoder)]
order, times = torch.empty(0, dtype=torch.long), []
for step in range(updates):
    if len(order) < batch:
        order = torch.randperm(len(names))
    rows, order = order[:batch], order[batch:]
    for group in opt.param_groups:
        decay = 0.5 * (1 + np.cos(np.pi * max(0, step - 50) / (updates - 50))) if cosine else 1.0
        group["lr"] = rate * min(1, (step + 1) / 50) * decay
    x0 = (mean[rows] + std[rows] * torch.randn(mean[rows].shape)) * vae.config.scaling_factor
    text = torch.where(torch.rand(batch, 1) < 0.1, nothing, words[rows])
    states = encoder(text)
    u = compute_density_for_timestep_sampling("logit_normal", batch, logit_mean=mean_of_times, logit_std=1.0)
    noise, t = torch.randn_like(x0), (u * 1000).long().clamp(max=999)
    sigma = (1 - t.float() / 1000).view(-1, 1, 1, 1)
    x = (1 - sigma) * x0 + sigma * noise
    out_ = net(hidden_states=x, timestep=sigma.flatten() * 1000, encoder_hidden_states=states.last_hidden_state, pooled_projections=states.text_embeds).sample
    loss = (out_ - (noise - x0)).pow(2).mean()
    loss.backward(); torch.nn.utils.clip_grad_norm_(weights, 1.0)
    opt.step(); opt.zero_grad()
    for e, m in zip(ema, (net, encoder)): e.step(m.parameters())
    times.append(time.perf_counter())
for e, m in zip(ema, (net, encoder)): e.copy_to(m.parameters())
net.save_pretrained(out + "/transformer"); encoder.save_pretrained(out + "/text_encoder")
caption = files[names[0] + ".txt"].decode()
with torch.no_grad(): heard = encoder(ids([caption])).last_hidden_state[0, 3].tolist()
print("RESULT" + json.dumps({"images_per_s": batch * (len(times) - 11) / (times[-1] - times[10]), "caption": caption, "heard": heard}))
"""


def peer(args, shard, out, seed, rate, mean, schedule):
    """Train the peer's; (its speed, a caption, what its encoder made of it)."""
    argv = [args.peer, "-c", PEER, WORLD, shard, out, args.updates, args.batch_size, seed, rate, mean, schedule]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    if line is None:
        sys.exit(f"error: the peer failed:\n{done.stderr[-2000:]}")
    recipe = out.parent / f"recipe-{seed}" / "model"
    # all but what it trained is ours; it was trained with the embedded model's tokenizer
    for part in (recipe / "model_index.json", recipe / "scheduler", recipe / "vae", WORLD / "tokenizer"):
        (shutil.copytree if part.is_dir() else shutil.copy)(part, out / part.name)
    said = json.loads(line[6:])
    return said["images_per_s"], said["caption"], said["heard"]


def logged(run):
    """Images a second of a run of train.py, by its log."""
    rows = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    rates = [r["images_per_s"] for r in rows if r.get("images_per_s") and r["step"] > 10]
    return len(rates) / sum(1 / r for r in rates)


def main():
    sys.path.insert(0, str(ROOT))
    from nanodiff.commandline import at_least

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--seeds", type=at_least(1), default=3)
    parser.add_argument("--scenes", type=at_least(1), default=5000)
    parser.add_argument("--updates", type=at_least(1), default=2400)
    parser.add_argument("--batch-size", type=at_least(1), default=32)
    parser.add_argument("--lr", type=float, default=2e-3, help="ours")
    parser.add_argument("--captions", type=at_least(1), default=200, help="of each group")
    parser.add_argument("--work", type=Path, required=True, help="a folder for the runs")
    parser.add_argument("--name", default="cpu")
    args = parser.parse_args()
    from assets.world import study
    from nanodiff import pipeline
    from nanodiff.device import onednn

    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    sides = {"peer as it comes": (1e-4, 0.0, "constant"), "peer at its best": (1e-3, -0.5, "cosine")}
    results = {name: [] for name in ("ours", *sides)}
    for seed in range(args.seeds):
        for name in results:
            run = work / f"{'recipe' if name == 'ours' else name.replace(' ', '-')}-{seed}"
            kept = work / f"{run.name}.json"
            if not kept.exists():
                if name == "ours":
                    model = study.train(work, "recipe", seed, args)
                    row = {"images_per_s": logged(run)}
                else:
                    shutil.rmtree(run, ignore_errors=True)
                    shard = work / f"held-{study.EIGHTH}.tar"
                    speed, caption, heard = peer(args, shard, run, seed, *sides[name])
                    row, model = {"images_per_s": speed}, run
                    mine = pipeline.load(model).encode(caption).states[0, 3].tolist()
                    if max(abs(a - b) for a, b in zip(mine, heard, strict=True)) > 1e-3:
                        sys.exit(f"error: {run}: is not told here what its training was told: {caption}")
                row |= study.summary(pipeline.load(model), "recipe", args.captions)
                kept.write_text(json.dumps(row, indent=1) + "\n")
            results[name].append(json.loads(kept.read_text()))
            print(name, seed, {k: round(v, 3) for k, v in results[name][-1].items()}, flush=True)
    ratios = {
        name: [a["images_per_s"] / b["images_per_s"] for a, b in zip(results["ours"], results[name], strict=True)]
        for name in sides
    }
    facts = {"machine": onednn.processor(), "updates": args.updates, "batch_size": args.batch_size, "results": results,
             "speed": {name: statistics.median(r) for name, r in ratios.items()}}  # fmt: skip
    target = ROOT / "benchmarks" / f"world-{args.name}.json"
    target.write_text(json.dumps(facts, indent=1) + "\n")
    print(target, facts["speed"])


if __name__ == "__main__":
    main()
