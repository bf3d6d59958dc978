"""Speed and memory beside diffusers, in one run:   python benchmarks/bench.py --peer PYTHON [--cases import,load,…]

PYTHON is the interpreter of an environment that has diffusers and transformers; without it only our own figures are
printed. Every measurement is a fresh process; ours and the peer's alternate (A B A B …) and the figure is the median of
the ratios peer / ours of neighbouring runs, with the smallest and the largest beside it, because on a shared machine
only neighbours can be compared. Weights are random, in the real sizes, made once under --work (2.1 GB).

Cases: import (the pipeline module), load (process start to a ready SD 1.5 from an fp16 folder), unet32 and unet64 (one
guided step at 256 and 512 px), vae (one decode at 512 px), image (process start to a 512 px picture in 2 steps), tiny (a
UNet call of the test pipeline). Results go to benchmarks/NAME.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent

COMMON = """
import json, os, sys, time
def report(**facts):
    status = dict(line.split(":", 1) for line in open("/proc/self/status"))
    peak = int(status["VmHWM"].split()[0]) / 1024  # ru_maxrss would inherit the parent's
    print("RESULT" + json.dumps(dict(facts, total_s=time.time() - float(sys.argv[1]), peak_mb=peak)))
def timed(call, n):
    call()
    times = []
    for _ in range(n):
        start = time.perf_counter(); call(); times.append(time.perf_counter() - start)
    return min(times)
folder, kind = sys.argv[2], sys.argv[3]
"""
OURS = {
    "import": "import nanodiff.pipeline; report()",
    "load": """
import torch; from nanodiff import pipeline
sd = pipeline.load(folder, getattr(torch, kind)); report()""",
    "unet": """
import torch; from nanodiff import weights; from nanodiff.models.unet import UNet2DConditionModel
size = int(kind.split("-")[1]); dtype = getattr(torch, kind.split("-")[0])
net = weights.load(UNet2DConditionModel, folder + "/unet", dtype)
x, text = torch.randn(2, 4, size, size, dtype=dtype), torch.randn(2, 77, net.cfg.cross_attention_dim, dtype=dtype)
with torch.no_grad():
    kv = net.text_kv(text)
    report(seconds=timed(lambda: net(x, 500, kv), int(kind.split("-")[2])))""",
}
OURS["vae"] = """
import torch; from nanodiff import weights; from nanodiff.models.vae import AutoencoderKL
net = weights.load(AutoencoderKL, folder + "/vae", getattr(torch, kind)); z = torch.randn(1, 4, 64, 64).to(getattr(torch, kind))
with torch.no_grad():
    report(seconds=timed(lambda: net.decode_raw(z), 1))"""
OURS["image"] = """
import torch; from nanodiff import pipeline
sd = pipeline.load(folder, getattr(torch, kind))
sd.generate(["a corgi on a beach"], steps=2, seeds=[0]); report()"""
# The peer's side, run by another interpreter: this project itself never imports these packages.
PEER = {
    "import": "from diffusers import StableDiffusionPipeline; report()",
    "load": """
import torch; from diffusers import StableDiffusionPipeline
sd = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, kind), safety_checker=None); report()""",
    "unet": """
import torch; from diffusers import UNet2DConditionModel
size = int(kind.split("-")[1]); dtype = getattr(torch, kind.split("-")[0])
net = UNet2DConditionModel.from_pretrained(folder + "/unet", torch_dtype=dtype)
x, text = torch.randn(2, 4, size, size, dtype=dtype), torch.randn(2, 77, net.config.cross_attention_dim, dtype=dtype)
if "cl" in kind.split("-"):
    net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
with torch.no_grad():
    report(seconds=timed(lambda: net(x, 500, text, return_dict=False), int(kind.split("-")[2])))""",
}
PEER["vae"] = """
import torch; from diffusers import AutoencoderKL
net = AutoencoderKL.from_pretrained(folder + "/vae", torch_dtype=getattr(torch, kind)); z = torch.randn(1, 4, 64, 64).to(getattr(torch, kind))
with torch.no_grad():
    report(seconds=timed(lambda: net.decode(z, return_dict=False), 1))"""
PEER["image"] = """
import torch; from diffusers import StableDiffusionPipeline
sd = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, kind), safety_checker=None)
sd("a corgi on a beach", num_inference_steps=2, generator=torch.Generator().manual_seed(0)); report()"""
CASES = {  # name: (program, our kind, the peer's kinds, pairs, figure)
    "import": ("import", "-", ["-"], 7, "total_s"),
    "load-fp16": ("load", "float16", ["float16"], 5, "total_s"),
    "load-fp32": ("load", "float32", ["float32"], 5, "total_s"),
    "load-bf16": ("load", "bfloat16", ["bfloat16"], 5, "total_s"),
    "tiny": ("unet", "float32-16-20", ["float32-16-20"], 5, "seconds"),
    "unet32-fp32": ("unet", "float32-32-2", ["float32-32-2", "float32-32-2-cl"], 3, "seconds"),
    "unet64-fp32": ("unet", "float32-64-1", ["float32-64-1", "float32-64-1-cl"], 3, "seconds"),
    "vae-bf16": ("vae", "bfloat16", ["bfloat16"], 3, "seconds"),
    "image-bf16": ("image", "bfloat16", ["bfloat16"], 3, "total_s"),
    "unet64-bf16": ("unet", "bfloat16-64-1", ["bfloat16-64-1", "bfloat16-64-1-cl"], 3, "seconds"),
}


def measure(python, program, folder, kind):
    import time

    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    argv = [python, "-c", COMMON + program, str(time.time()), str(folder), kind]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=ROOT, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        sys.exit(f"error: {python} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1][6:])


def make_sd15(folder):
    """A full-size SD 1.5 folder with random fp16 weights of sane scale, from the published configs and shapes."""
    sys.path.insert(0, str(ROOT))
    import torch

    from nanodiff.weights import save_tensors, write_json

    golden = ROOT / "tests" / "golden"
    for name, stem in (
        ("unet", "diffusion_pytorch_model"),
        ("vae", "diffusion_pytorch_model"),
        ("text_encoder", "model"),
    ):
        manifest = json.loads((golden / "manifests" / f"sd15.{name}.json").read_text())
        shapes = manifest["parameters"]
        generator, tensors = torch.Generator().manual_seed(0), {}
        for key, shape in shapes.items():
            if "position_ids" in key:
                tensors[key] = torch.arange(77)[None]
            elif len(shape) == 1:
                tensors[key] = torch.full(shape, float(key.endswith("weight")), dtype=torch.float16)
            else:
                fan_in = torch.Size(shape[1:]).numel()
                tensors[key] = (torch.randn(shape, generator=generator) / fan_in**0.5).half()
        (folder / name).mkdir(parents=True)
        write_json(folder / name / "config.json", manifest["config"])
        save_tensors(folder / name / f"{stem}.safetensors", tensors)
    facts = json.loads((golden / "manifests" / "pipelines.json").read_text())["CompVis/stable-diffusion-v1-4"]
    index = facts["model_index.json"] | {"safety_checker": [None, None], "feature_extractor": [None, None]}
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", facts["scheduler/scheduler_config.json"])
    (folder / "tokenizer").mkdir()
    merges = (golden / "tokenizers" / "clip_merges.txt").read_text(encoding="utf-8").splitlines()
    merges = [line for line in merges if line and not line.startswith("#version")]
    from nanodiff.tokenizer import END, START, _byte_characters

    letters = list(_byte_characters().values())
    pieces = [*letters, *(c + "</w>" for c in letters), *("".join(m.split()) for m in merges), START, END]
    write_json(folder / "tokenizer" / "vocab.json", {p: i for i, p in enumerate(pieces)})
    (folder / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + "\n".join(merges) + "\n", encoding="utf-8")
    for name in ("tokenizer_config.json", "special_tokens_map.json"):
        write_json(folder / "tokenizer" / name, facts[f"tokenizer/{name}"])
    write_json(folder / "model_index.json", index)


def cpu_name():
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":")[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor()


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="python of an environment with diffusers")
    parser.add_argument("--cases", default=",".join(CASES), help="comma-separated")
    parser.add_argument("--pairs", type=int, default=0, help="pairs a case; 0 = each case's own number")
    parser.add_argument("--work", default="out/bench", help="where the random full-size model is made")
    parser.add_argument("--name", default="cpu", help="benchmarks/NAME.json")
    args = parser.parse_args()
    full, tiny = ROOT / args.work / "sd15", ROOT / "tests" / "golden" / "tiny" / "sd15"
    if not (full / "model_index.json").exists():
        make_sd15(full)
    results = {}
    for name in args.cases.split(","):
        program, kind, peer_kinds, pairs, figure = CASES[name]
        pairs = args.pairs or pairs
        folder = tiny if name == "tiny" else full
        ours, peers = [], {k: [] for k in peer_kinds}
        for _ in range(pairs):
            ours.append(measure(sys.executable, OURS[program], folder, kind))
            for k in peer_kinds if args.peer else ():
                peers[k].append(measure(args.peer, PEER[program], folder, k))
        row = {
            "ours_s": statistics.median(r[figure] for r in ours),
            "ours_peak_mb": max(r["peak_mb"] for r in ours),
            "pairs": pairs,
        }
        best = min(
            (k for k in peers if peers[k]), key=lambda k: statistics.median(r[figure] for r in peers[k]), default=None
        )
        if best:
            ratios = [p[figure] / o[figure] for o, p in zip(ours, peers[best], strict=True)]
            row |= {"peer": best, "peer_s": statistics.median(r[figure] for r in peers[best]),
                    "peer_peak_mb": max(r["peak_mb"] for r in peers[best]), "ratio": statistics.median(ratios),
                    "ratio_min": min(ratios), "ratio_max": max(ratios)}  # fmt: skip
        results[name] = {k: round(v, 3) if isinstance(v, float) else v for k, v in row.items()}
        print(f"{name:12s}", " ".join(f"{k}={v}" for k, v in results[name].items()), flush=True)
    import torch

    machine = f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    target = ROOT / "benchmarks" / f"{args.name}.json"
    known = json.loads(target.read_text())["results"] if target.exists() else {}
    facts = {"machine": machine, "command": "python benchmarks/bench.py --peer PYTHON", "results": known | results}
    target.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
