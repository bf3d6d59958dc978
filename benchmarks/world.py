"""The small world's recipe beside diffusers' at equal compute:   python benchmarks/world.py --peer PYTHON

Both train the embedded model's network with a text encoder from scratch, on the same scenes of single objects, in the latents of the same VAE, over the same
number of pictures, both in fp32. Ours is train.py's preset `world` (Muon). The peer's loop is that of diffusers' train_dreambooth_sd3.py with --train_text_encoder
and latents kept, without accelerate: AdamW, logit-normal times, EMAModel; at the learning rate of that script and at the one at which AdamW is best here.
Every model is then drawn and read by the same code (assets/world/study.py): exact scores of kinds that were in training and of kinds held out. Seconds are of
the updates alone, the first ten left out. Sides alternate. PEER is the interpreter of an environment with diffusers and transformers. Results: benchmarks/world-NAME.json.
"""

import argparse
import itertools
import json
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
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
world, data, out, updates, batch, rate, seed = *sys.argv[1:4], int(sys.argv[4]), int(sys.argv[5]), float(sys.argv[6]), int(sys.argv[7])
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
        group["lr"] = rate * min(1, (step + 1) / 50)
    x0 = (mean[rows] + std[rows] * torch.randn(mean[rows].shape)) * vae.config.scaling_factor
    text = torch.where(torch.rand(batch, 1) < 0.1, nothing, words[rows])
    states = encoder(text, output_hidden_states=True)
    u = compute_density_for_timestep_sampling("logit_normal", batch, logit_mean=0.0, logit_std=1.0)
    noise, t = torch.randn_like(x0), (u * 1000).long().clamp(max=999)
    sigma = (1 - t.float() / 1000).view(-1, 1, 1, 1)
    x = (1 - sigma) * x0 + sigma * noise
    out_ = net(hidden_states=x, timestep=sigma.flatten() * 1000, encoder_hidden_states=states.hidden_states[-2], pooled_projections=states.text_embeds).sample
    loss = (out_ - (noise - x0)).pow(2).mean()
    loss.backward(); torch.nn.utils.clip_grad_norm_(weights, 1.0)
    opt.step(); opt.zero_grad()
    for e, m in zip(ema, (net, encoder)): e.step(m.parameters())
    times.append(time.perf_counter())
for e, m in zip(ema, (net, encoder)): e.copy_to(m.parameters())
net.save_pretrained(out + "/transformer"); encoder.save_pretrained(out + "/text_encoder")
print("RESULT" + json.dumps({"images_per_s": batch * (len(times) - 11) / (times[-1] - times[10])}))
"""


def peer(args, shard, out, rate, seed):
    argv = [args.peer, "-c", PEER, WORLD, shard, out, args.updates, args.batch_size, rate, seed]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    if line is None:
        sys.exit(f"error: the peer failed:\n{done.stderr[-2000:]}")
    for part in ("model_index.json", "scheduler", "vae", "tokenizer"):
        (shutil.copytree if (WORLD / part).is_dir() else shutil.copy)(WORLD / part, out / part)
    return json.loads(line[6:])


def ours(args, shard, out, seed):
    argv = [sys.executable, "train.py", "diffusion", "--preset", "world", "--model-config", WORLD / "transformer/config.json", "--text-config", WORLD / "text_encoder/config.json",
            "--vae", WORLD, "--data", shard, "--max-steps", args.updates, "--batch-size", args.batch_size, "--lr", 2e-3, "--lr-warmup-steps", 50, "--sample-every", 0,
            "--checkpointing-steps", 0, "--log-every", 1, "--seed", seed, "--overwrite-output-dir", "--output-dir", out]  # fmt: skip
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: train.py failed:\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][11:]
    rates = [r["images_per_s"] for r in rows if r.get("images_per_s")]
    return {"images_per_s": len(rates) / sum(1 / r for r in rates)}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--scenes", type=int, default=5000)
    parser.add_argument("--updates", type=int, default=600)
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--captions", type=int, default=200, help="of each group")
    parser.add_argument("--name", default="cpu")
    args = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    from assets.world import make, scenes, study
    from nanodiff import pipeline

    sides = {"ours": ours, "peer, its rate": lambda *a: peer(*a[:-1], 1e-4, a[-1]), "peer, 1e-3": lambda *a: peer(*a[:-1], 1e-3, a[-1])}  # fmt: skip
    results = {name: [] for name in sides}
    with tempfile.TemporaryDirectory() as work:
        shard = Path(work) / "scenes.tar"
        kinds = set(scenes.KINDS) - set(study.held(8))
        make.pack(shard, itertools.islice(study.singles(kinds, 1), args.scenes), args.scenes)
        for seed in range(args.seeds):
            for name, side in sides.items():
                out = Path(work) / f"{name.replace(', ', '-').replace(' ', '-')}-{seed}"
                row = side(args, shard, out, seed)
                row |= study.summary(pipeline.load(out / "model" if name == "ours" else out), "recipe", args.captions)
                results[name].append(row)
                print(name, seed, {k: round(v, 3) for k, v in row.items()}, flush=True)
    ratios = {name: [a["images_per_s"] / b["images_per_s"] for a, b in zip(results["ours"], results[name], strict=True)]
              for name in sides if name != "ours"}  # fmt: skip
    facts = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "updates": args.updates, "batch_size": args.batch_size,
             "results": results, "speed": {name: statistics.median(r) for name, r in ratios.items()}}  # fmt: skip
    target = ROOT / "benchmarks" / f"world-{args.name}.json"
    target.write_text(json.dumps(facts, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
