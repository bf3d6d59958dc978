"""Evaluation beside the programs that people use, on the same pictures:   python benchmarks/evaluation.py --peer PYTHON

- fid: process start to the number for two folders of 1,000 pictures each (256 px PNGs, made once under --work), Inception-v3 with the
  same made-up weights: `eval.py images --metrics fid` beside torch-fidelity's and pytorch-fid's own functions as they come.
- pairs: SSIM and pHash of 1,000 pairs, evaluate.pairs beside a loop over scikit-image and imagehash: from process start (which for us
  is importing PyTorch), and without the imports.

Sides alternate, every run is a process of its own, and figures are compared too. PEER is the interpreter of an environment with
torch-fidelity, pytorch-fid, scikit-image and imagehash. Results: benchmarks/evaluation-NAME.json.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parent.parent
TORCHVISION = """
import sys, time, torch
try:
    import torchvision
except RuntimeError:  # built for another torch: its operators are missing, and not needed here
    for name in ("nms", "qnms"):
        torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float iou) -> Tensor")
    for name in [n for n in sys.modules if n.startswith("torchvision")]:
        del sys.modules[name]
a, b, weights = sys.argv[1:4]
"""
PEERS = {
    "torch-fidelity": TORCHVISION
    + """
import torch_fidelity
found = torch_fidelity.calculate_metrics(input1=a, input2=b, fid=True, cuda=False, cache=False, verbose=False,
                                         feature_extractor_weights_path=weights)
print("RESULT", found["frechet_inception_distance"])
""",
    "pytorch-fid": TORCHVISION
    + """
from pytorch_fid import fid_score, inception
inception.load_state_dict_from_url = lambda *a, **k: torch.load(weights)
print("RESULT", fid_score.calculate_fid_given_paths([a, b], 50, "cpu", 2048))
""",
    "scikit-image + imagehash": """
import sys, time, numpy as np, imagehash
from pathlib import Path
from PIL import Image
from skimage.metrics import structural_similarity
a, b, _ = sys.argv[1:4]
start = time.perf_counter()
ssim, phash = [], []
for path in sorted(Path(a).iterdir()):
    x, y = (Image.open(p).convert("RGB") for p in (path, Path(b) / path.name))
    grey = [np.asarray(z).astype(np.int32) @ (9798, 19235, 3735) + 16384 >> 15 for z in (x, y)]
    ssim.append(structural_similarity(*(g.astype(np.uint8) for g in grey), data_range=255))
    phash.append(1 - (imagehash.phash(x) - imagehash.phash(y)) / 64)
print("RESULT", np.mean(ssim), np.mean(phash))
print("WORK", time.perf_counter() - start)
""",
}
PAIRS = """
import sys, time
from statistics import fmean
from nanodiff import data
from nanodiff.evaluation import image_pairs, image_sets
start = time.perf_counter()
folders = {k: data.load(p, captions=False) for k, p in zip("ab", sys.argv[1:3])}
found, _ = image_pairs.pairs(folders, [("a", "b")], image_sets.Settings(), ("ssim", "phash"))
print("RESULT", *(fmean(p.numbers["a_vs_b"][n] for p in found) for n in ("ssim", "phash")))
print("WORK", time.perf_counter() - start)
"""


def make(work, n):
    """Two folders of n pictures, and Inception-v3's made-up weights for both sides."""
    sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
    import torch
    from util import recipe

    from nanodiff.models.inception import InceptionV3
    from nanodiff.output import images
    from nanodiff.weights import save_tensors

    for label, noise in (("a", 0.02), ("b", 0.1)):
        folder = work / f"{label}{n}"
        folder.mkdir(parents=True, exist_ok=True)
        for i in range(len(list(folder.iterdir())), n):
            g = torch.Generator().manual_seed(i)
            x = torch.nn.functional.interpolate(torch.rand(1, 3, 16, 16, generator=g), size=(256, 256), mode="bicubic")
            x = (x + noise * torch.randn(x.shape, generator=g)).clamp(0, 1)
            images.save_png(images.to_pil(2 * x - 1)[0], folder / f"{i:05d}.png")
    weights = work / "weights"
    weights.mkdir(exist_ok=True)
    file = weights / "pt_inception-2015-12-05-6726825d.safetensors"
    if not file.exists():
        state = InceptionV3().state_dict() | recipe(InceptionV3(), "inception")
        torch.save(state, work / "inception.pth")
        save_tensors(file, {k: v for k, v in state.items() if v.is_floating_point()})
    return weights


def run(argv, label):
    """(seconds from start to end, numbers, seconds of work or None) of a process."""
    start = time.perf_counter()
    done = subprocess.run(list(map(str, argv)), cwd=ROOT, capture_output=True, text=True, check=False,
                          env=os.environ | {"PYTHONPATH": str(ROOT) if argv[0] == sys.executable else ""})  # fmt: skip
    seconds = time.perf_counter() - start
    if done.returncode:
        sys.exit(f"error: {label} failed:\n{done.stderr[-2000:]}")
    line = next((x for x in done.stdout.splitlines() if x.startswith("RESULT")), "RESULT")
    work = next((float(x.split()[1]) for x in done.stdout.splitlines() if x.startswith("WORK")), None)
    return seconds, [float(v) for v in line.split()[1:]], work


def row(ours, theirs):
    ratios = [t[0] / o[0] for o, t in zip(ours, theirs, strict=True)]
    apart = max(abs(a - b) / abs(b) for a, b in zip(ours[0][1], theirs[0][1], strict=True))
    work = [t[2] / o[2] for o, t in zip(ours, theirs, strict=True) if o[2]]
    return ({"work_ratio": statistics.median(work), "work_ratio_min": min(work)} if work else {}) | {
        "ours_s": statistics.median(o[0] for o in ours), "peer_s": statistics.median(t[0] for t in theirs),
        "ratio": statistics.median(ratios), "ratio_min": min(ratios), "ratio_max": max(ratios), "pairs": len(ratios),
        "ours": ours[0][1], "peer": theirs[0][1], "relative_difference": apart,
    }  # fmt: skip


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", required=True)
    parser.add_argument("--work", type=Path, default=Path("out/bench-eval"))
    parser.add_argument("--pictures", type=int, default=1000, help="in each folder")
    parser.add_argument("--pairs", type=int, default=1, help="runs of each side for fid; three times as many for pairs")
    parser.add_argument("--only", choices=("fid", "pairs"))
    parser.add_argument("--name", default="cpu")
    args = parser.parse_args()
    work = args.work.resolve()
    weights = make(work, args.pictures)
    import torch

    folders = [work / f"{label}{args.pictures}" for label in "ab"]
    target = ROOT / "benchmarks" / f"evaluation-{args.name}.json"
    results = json.loads(target.read_text()) if target.exists() else {}
    name = next(
        (x.split(":")[1].strip() for x in Path("/proc/cpuinfo").read_text().splitlines() if x.startswith("model name")),
        "",
    )
    results["machine"] = f"{name or platform.machine()}, {os.cpu_count()} cores, torch {torch.__version__}"

    def fid(mode):
        out = work / "eval"
        argv = ["eval.py", "images", "--generated", folders[1], "--real", folders[0], "--weights-dir", weights, "--metrics", "fid",
                "--fid-mode", mode, "--bootstrap", 0, "--no-cache", "--output-dir", out]  # fmt: skip
        seconds, *_ = run([sys.executable, *argv], "eval.py")
        return seconds, [json.loads((out / "metrics.json").read_text())["fid"]["value"]], None

    for name, code in PEERS.items():
        of_pairs = "image" in name
        if args.only and of_pairs != (args.only == "pairs"):
            continue
        ours, theirs = [], []
        for _ in range(args.pairs * (3 if of_pairs else 1)):
            ours.append(run([sys.executable, "-c", PAIRS, *folders], "ours") if of_pairs else fid(name))
            theirs.append(run([args.peer, "-c", code, *folders, work / "inception.pth"], name))
        results[name] = row(ours, theirs) | {"pictures": 2 * args.pictures}
        print(name, results[name], flush=True)
    if args.name:
        target.write_text(json.dumps(results, indent=1) + "\n")
        print(target)


if __name__ == "__main__":
    main()
