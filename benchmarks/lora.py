"""A LoRA training step of Stable Diffusion 1.5's whole UNet beside peft and diffusers:   python benchmarks/lora.py --peer PYTHON

Random weights in the released model's layout, the same for both; rank 16 on to_q, to_k, to_v and to_out.0 of every attention; AdamW on the
adapters alone, the base frozen; ε-loss on random latents and random text states, so that nothing but the step is measured. Both sides take
the base in fp32 (and with --kind bf16 in bf16 under autocast), with and without gradient checkpointing, in processes of their own that
alternate. Seconds: the median step after the first; memory: the process's largest. The loss of both is printed: with B = 0 the
first one is the base model's and must be the same. Results: benchmarks/lora-NAME.json.
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
COMMON = """
import json, statistics, sys, time
import torch, torch.nn.functional as F
folder, side, batch, steps, kind, recompute = sys.argv[1], *map(int, sys.argv[2:5]), sys.argv[5], sys.argv[6] == "1"
device = "cuda" if torch.cuda.is_available() else "cpu"
low = kind == "bf16"
def report(net, params, call):
    opt = torch.optim.AdamW(params, lr=1e-4, fused=True)
    g = torch.Generator().manual_seed(0)
    seconds, losses = [], []
    for i in range(steps):
        x, noise = (torch.randn(batch, 4, side, side, generator=g).to(device) for _ in range(2))
        states = torch.randn(batch, 77, 768, generator=g).to(device); t = torch.randint(0, 1000, (batch,), generator=g).to(device)
        start = time.perf_counter()
        with torch.autocast(device, torch.bfloat16, enabled=low):
            loss = F.mse_loss(call(x, t, states).float(), noise)
        loss.backward(); torch.nn.utils.clip_grad_norm_(params, 1.0); opt.step(); opt.zero_grad()
        losses.append(loss.item()); seconds.append(time.perf_counter() - start)
    peak = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
    if device == "cuda":
        peak = torch.cuda.max_memory_allocated() / 2**20
    print("RESULT" + json.dumps({"seconds": statistics.median(seconds[1:] or seconds), "peak_mb": peak, "losses": losses,
                                 "trained": sum(p.numel() for p in params)}))
"""
OURS = (
    COMMON
    + """
from nanodiff import lora, weights
from nanodiff.device import dist, memory, onednn
from nanodiff.models.unet import UNet2DConditionModel
memory.keep_freed_memory()
net = weights.load(UNet2DConditionModel, folder, torch.bfloat16 if low else torch.float32, device).requires_grad_(True)
torch.manual_seed(0); lora.adapt(net, 16); onednn.learn(net.train().to(memory_format=torch.channels_last).to(device))
if recompute: dist.recompute(net)
report(net, [p for p in net.parameters() if p.requires_grad], lambda x, t, states: net(x, t, states))
"""
)
PEER = (
    COMMON
    + """
from diffusers import UNet2DConditionModel
from peft import LoraConfig
net = UNet2DConditionModel.from_pretrained(folder, torch_dtype=torch.bfloat16 if low else torch.float32).requires_grad_(False).to(device)
net.add_adapter(LoraConfig(r=16, lora_alpha=16, init_lora_weights="gaussian", target_modules=["to_k", "to_q", "to_v", "to_out.0"]))
if low:
    from diffusers.training_utils import cast_training_params
    cast_training_params(net, dtype=torch.float32)
net.train()
if recompute: net.enable_gradient_checkpointing()
report(net, [p for p in net.parameters() if p.requires_grad], lambda x, t, states: net(x, t, states).sample)
"""
)
MAKE = """
import sys, torch
from nanodiff import weights
from nanodiff.pipeline.single import Known
from nanodiff.pipeline.families import BUILDERS
from nanodiff.pipeline.sources import configs
known = configs("stable-diffusion-v1-5/stable-diffusion-v1-5")
torch.manual_seed(0)
net = known.builder("unet")(known.config("unet"))
weights.save(net, sys.argv[1], torch.float32)
"""


def run(python, code, *argv):
    env = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(
        [python, "-c", code, *map(str, argv)], cwd=ROOT, capture_output=True, text=True, env=env, check=False
    )
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), None)
    if done.returncode or (line is None and code != MAKE):
        sys.exit(f"error: failed:\n{done.stderr[-2000:]}")
    return json.loads(line[6:]) if line else None


def main():
    sys.path.insert(0, str(ROOT))
    from nanodiff.commandline import at_least

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--pairs", type=at_least(1), default=2)
    parser.add_argument("--steps", type=at_least(1), default=4)
    parser.add_argument("--side", type=at_least(1), default=64, help="of the latents: 64 is 512 pixels")
    parser.add_argument("--batch", type=at_least(1), default=1)
    parser.add_argument("--kind", action="append", choices=("fp32", "bf16"))
    parser.add_argument("--name", default="cpu")
    args = parser.parse_args()
    results = {"machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores", "python": platform.python_version(),
               "side": args.side, "batch": args.batch, "command": " ".join(sys.argv[:1] + [a for a in sys.argv[1:] if "/" not in a])}  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        run(sys.executable, MAKE, folder)
        for kind in args.kind or ["fp32"]:
            for recompute in (0, 1):
                rows = []
                for pair in range(args.pairs):
                    sides = [("ours", sys.executable, OURS), ("peer", args.peer, PEER)]
                    found = {}
                    for who, python, code in sides if pair % 2 == 0 else reversed(sides):
                        found[who] = run(python, code, folder, args.side, args.batch, args.steps, kind, recompute)
                        print(kind, "recomputed" if recompute else "kept", who, found[who], flush=True)
                    first = [found[who]["losses"][0] for who in ("ours", "peer")]
                    if abs(first[0] - first[1]) > (0.02 if kind == "bf16" else 1e-3) * abs(first[1]):
                        sys.exit(f"error: the first losses differ, so these are not the same step: {first}")
                    rows.append(found)
                name = f"{kind}{', gradient checkpointing' if recompute else ''}"
                ratio = lambda key, a, b, rows=rows: [r[a][key] / r[b][key] for r in rows]  # noqa: E731
                results[name] = {"pairs": rows, "faster": statistics.median(ratio("seconds", "peer", "ours")),
                                 "memory": statistics.median(ratio("peak_mb", "ours", "peer"))}  # fmt: skip
                print(
                    f"{name}: {results[name]['faster']:.2f} times as fast, memory {results[name]['memory']:.2f}",
                    flush=True,
                )
    if args.name:
        target = ROOT / "benchmarks" / f"lora-{args.name}.json"
        target.write_text(json.dumps(results, indent=1) + "\n")
        print(target)


if __name__ == "__main__":
    main()
