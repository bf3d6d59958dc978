"""A whole training run beside diffusers' own UNet and loop, on the same pictures:   python benchmarks/recipe.py --peer PYTHON

Both train a UNet in pixel space at 32 px with a frozen CLIP text encoder (the small one of the tests), AdamW, clipping and
EMA, on the embedded emoji. The peer's loop is that of diffusers' training examples, without accelerate: decode, resize,
encode the captions at every step, EMAModel. Ours is train.py. Two questions, each in one run, sides alternating:

- speed: images a second and peak memory of a UNet of 35 M parameters, batch 16, both in fp32, both in bf16, and each as it
  comes (--mixed-precision auto here, "no" there); the share of the time in which our loader was waited for.
- quality at equal compute: a small UNet, the same number of images. Both final (averaged) UNets are then judged by the same
  code: loss on the same pictures, noise and times, and the Fréchet distance of assets/nano/score.py.

PEER is the interpreter of an environment with diffusers and transformers. Results: benchmarks/recipe-NAME.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

ROOT = Path(__file__).parent.parent
DATA, TEXT = ROOT / "assets/emoji/emoji.tar", ROOT / "tests/golden/tiny/sd15"
LARGE = {"block_out_channels": [128, 256, 256], "layers_per_block": 2, "attention_head_dim": 8}
SMALL = {"block_out_channels": [32, 64, 96], "layers_per_block": 1, "attention_head_dim": 2, "norm_num_groups": 16}
SHARED = {"in_channels": 3, "out_channels": 3, "sample_size": 32, "cross_attention_dim": 32,
          "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
          "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"]}  # fmt: skip
PEER = """
import io, json, random, sys, tarfile, time, warnings
warnings.simplefilter("ignore")
import torch, torch.nn.functional as F, numpy as np
from PIL import Image
from diffusers import DDPMScheduler, UNet2DConditionModel
from diffusers.training_utils import EMAModel
from transformers import CLIPTextModel, CLIPTokenizer
raw, text, data, out, updates, batch, kind = json.loads(sys.argv[1]), *sys.argv[2:5], int(sys.argv[5]), int(sys.argv[6]), sys.argv[7]
torch.manual_seed(0)
unet = UNet2DConditionModel(**raw); tokenizer = CLIPTokenizer.from_pretrained(text + "/tokenizer")
encoder = CLIPTextModel.from_pretrained(text + "/text_encoder").requires_grad_(False)
files = {m.name: tarfile.open(data).extractfile(m).read() for m in tarfile.open(data)}
names = sorted(n[:-4] for n in files if n.endswith(".png"))
class Data(torch.utils.data.Dataset):
    def __len__(self): return len(names)
    def __getitem__(self, i):
        image = Image.open(io.BytesIO(files[names[i] + ".png"])).convert("RGB").resize((32, 32), Image.BILINEAR)
        pixels = torch.from_numpy(np.asarray(image)).permute(2, 0, 1).float() / 127.5 - 1
        ids = tokenizer(files[names[i] + ".txt"].decode(), padding="max_length", truncation=True, return_tensors="pt").input_ids[0]
        return pixels, ids
loader = torch.utils.data.DataLoader(Data(), batch_size=batch, shuffle=True)
noise_scheduler = DDPMScheduler(prediction_type="epsilon", beta_schedule="linear")
opt = torch.optim.AdamW(unet.parameters(), lr=5e-4, betas=(0.9, 0.99), weight_decay=0.01)
ema = EMAModel(unet.parameters(), decay=0.999, use_ema_warmup=True, inv_gamma=1.0, power=0.75)
def epochs():
    while True:
        yield from loader
times, done = [], 0
for pixels, ids in epochs():
    start = time.perf_counter()
    for group in opt.param_groups:
        group["lr"] = 5e-4 * min(1, (done + 1) / 50)
    noise = torch.randn_like(pixels); t = torch.randint(0, 1000, (len(pixels),))
    noisy = noise_scheduler.add_noise(pixels, noise, t)
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bf16"):
        states = encoder(ids).last_hidden_state
        loss = F.mse_loss(unet(noisy, t, states).sample.float(), noise)
    loss.backward(); torch.nn.utils.clip_grad_norm_(unet.parameters(), 1.0)
    opt.step(); opt.zero_grad(); ema.step(unet.parameters()); done += 1
    times.append((len(pixels), time.perf_counter()))
    if done >= updates: break
skip = min(2, len(times) - 2)
rate = sum(n for n, _ in times[skip + 1 :]) / (times[-1][1] - times[skip][1])
ema.copy_to(unet.parameters()); unet.save_pretrained(out)
peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
print("RESULT" + json.dumps({"images_per_s": rate, "peak_mb": peak}))
"""


def peer(python, raw, out, updates, batch, kind):
    argv = [python, "-c", PEER, json.dumps(raw | SHARED), TEXT, DATA, out, updates, batch, kind]
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, check=False)
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    if line is None:
        sys.exit(f"error: the peer failed:\n{done.stderr[-2000:]}")
    return json.loads(line[6:])


def ours(raw, out, updates, batch, kind):
    config = Path(out).with_suffix(".json")
    config.write_text(json.dumps(raw | SHARED))
    argv = [sys.executable, "train.py", "diffusion", "--data", DATA, "--model-config", config, "--text-encoder", TEXT,
            "--resolution", 32, "--interpolation", "bilinear", "--batch-size", batch, "--max-steps", updates, "--lr", 5e-4,
            "--lr-scheduler", "constant_with_warmup", "--lr-warmup-steps", 50, "--prediction-type", "epsilon", "--beta-schedule", "linear",
            "--caption-dropout", 0, "--checkpointing-steps", 0, "--log-every", 1, "--overwrite-output-dir",
            *([] if kind == "default" else ["--mixed-precision", kind]), "--output-dir", out]  # fmt: skip
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"error: train.py failed:\n{done.stderr[-2000:]}")
    rows = [json.loads(line) for line in (Path(out) / "metrics.jsonl").read_text().splitlines()][2:]
    full = [r for r in rows if r["images_per_s"]]
    seconds = sum(batch / r["images_per_s"] for r in full)
    facts = json.loads((Path(out) / "run.json").read_text())
    return {"images_per_s": batch * len(full) / seconds, "peak_mb": facts["peak_memory_mb"],
            "data_wait": statistics.fmean(r["data_wait"] for r in full)}  # fmt: skip


def speed(args, work):
    """{kind: figures of both and the ratios}"""
    found = {}
    for name, mine, theirs in (("fp32", "no", "no"), ("bf16", "bf16", "bf16"), ("default", "default", "no")):
        rows = []
        for i in range(args.pairs):
            a = ours(LARGE, work / f"s{i}{name}", args.updates, 16, mine)
            b = peer(args.peer, LARGE, work / f"p{i}{name}", args.updates, 16, theirs)
            rows.append((a, b))
            print(name, {k: round(v, 3) for k, v in a.items()}, {k: round(v, 3) for k, v in b.items()}, flush=True)
        ratio = [a["images_per_s"] / b["images_per_s"] for a, b in rows]
        found[name] = {"ours": rows[-1][0], "peer": rows[-1][1], "ratio": statistics.median(ratio), "ratios": ratio,
                       "memory": statistics.median(a["peak_mb"] / b["peak_mb"] for a, b in rows)}  # fmt: skip
    return found


def quality(args, work):
    """Loss and Fréchet distance of both final UNets, judged alike."""
    ours(SMALL, work / "q", args.quality_updates, 16, "no")
    peer(args.peer, SMALL, work / "qp" / "unet", args.quality_updates, 16, "no")
    sys.path.insert(0, str(ROOT))
    import shutil

    import torch

    from assets.nano import score
    from nanodiff import data, pipeline
    from nanodiff.diffusion import objective

    for part in ("model_index.json", "scheduler", "text_encoder", "tokenizer"):
        source = work / "q" / "model" / part
        (shutil.copytree if source.is_dir() else shutil.copy)(source, work / "qp" / part)
    dataset = data.load(DATA)
    pixels = data.Pictures(dataset, 32).batch(range(256))
    real = score.embed(data.Pictures(dataset, 32).batch(range(len(dataset))))
    basis = torch.linalg.svd((real - real.mean(0)).double(), full_matrices=False).Vh[:64].T
    found = {}
    for name, folder in (("ours", work / "q" / "model"), ("peer", work / "qp")):
        sd = pipeline.load(folder)
        losses = []
        with torch.no_grad():
            for i in range(0, 256, 32):
                noise = objective.draw(9, "noise", range(i, i + 32), lambda g: torch.randn(3, 32, 32, generator=g))
                t = objective.timesteps(sd.schedule, 9, range(i, i + 32))
                states = sd.encode(dataset.captions[i : i + 32]).states
                denoise = lambda x, t, s=states, n=sd.net: n(x, t, s)  # noqa: E731
                losses.append(objective.diffusion(denoise, sd.schedule, pixels[i : i + 32], noise, t)[1].item())
            drawn = [score.embed(sd.generate(dataset.captions[i : i + 32], steps=25, guidance_scale=1.0, seeds=range(i, i + 32)).pixels)
                     for i in range(0, 256, 32)]  # fmt: skip
        found[name] = {"loss": statistics.fmean(losses), "frechet": score.frechet(torch.cat(drawn), real, basis)}
        print(name, found[name], flush=True)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--updates", type=int, default=8)
    parser.add_argument("--quality-updates", type=int, default=600)
    parser.add_argument("--only", choices=("speed", "quality"))
    parser.add_argument("--name", default="cpu")
    args = parser.parse_args()
    target = ROOT / "benchmarks" / f"recipe-{args.name}.json"
    results = json.loads(target.read_text()) if target.exists() else {}
    results |= {
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "python": platform.python_version(),
    }
    with tempfile.TemporaryDirectory() as work:
        if args.only != "quality":
            results["speed"] = speed(args, Path(work))
        if args.only != "speed":
            results["quality"] = quality(args, Path(work)) | {"updates": args.quality_updates}
    target.write_text(json.dumps(results, indent=1) + "\n")
    print(target)


if __name__ == "__main__":
    main()
