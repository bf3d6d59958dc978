"""A language model and a captioner's step beside transformers and peft:   python benchmarks/captioner.py --peer PYTHON

LLaMA-3.2-1B's layout with random weights in bf16, the same file for both. decode: loading, then greedy texts of --new tokens after a
prompt of 32, one row and eight, in bf16 and with weights in int8 and int4 (`error`: theirs); tokens a second are those after the first token, which is timed for itself (reading the prompt). step: ViT-B/16
and that model as the captioner joins them, adapters of rank 8 on its seven kinds of layers, one picture of 24 caption tokens; forward,
backward, AdamW; gradient checkpointing off. The peer's step scores every position's logits, as such programs do. The two alternate in
processes of their own; medians over the pairs; memory: the process's largest. Results: benchmarks/captioner-NAME.json.
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
start = time.perf_counter()
import torch
folder, vit, new, steps = sys.argv[1], sys.argv[2], int(sys.argv[3]), int(sys.argv[4])
device = "cuda" if torch.cuda.is_available() else "cpu"
out = {}
def now():
    if device == "cuda": torch.cuda.synchronize()
    return time.perf_counter()
def report():
    out["peak_mb"] = int(next(l for l in open("/proc/self/status") if l.startswith("VmHWM")).split()[1]) / 1024
    if device == "cuda": out["peak_mb"] = torch.cuda.max_memory_allocated() / 2**20
    print("RESULT" + json.dumps(out))
def train(net, call):
    params = [p for p in net if p.requires_grad]
    opt = torch.optim.AdamW(params, lr=1e-4, fused=True)
    g = torch.Generator().manual_seed(0)
    pixels, ids = torch.randn(1, 3, 224, 224, generator=g).to(device), torch.randint(5, 400, (1, 24), generator=g).to(device)
    seconds, losses = [], []
    for _ in range(steps):
        start = now()
        loss = call(pixels, ids); loss.backward(); opt.step(); opt.zero_grad()
        losses.append(loss.item()); seconds.append(now() - start)
    out.update(seconds=statistics.median(seconds[1:] or seconds), losses=losses, trained=sum(p.numel() for p in params))
"""
DECODE = {
    "ours": """
from nanodiff import weights
from nanodiff.device import memory, onednn
from nanodiff.text import textgen
from nanodiff.models.llm import CausalLM
memory.keep_freed_memory()
start = now(); net = onednn.widen(weights.load(CausalLM, folder, torch.bfloat16, device)); out["load"] = now() - start
for rows in (1, 8):
    times = []
    got = textgen.generate(net, [list(range(5, 37))] * rows, new, eos=(), on_step=lambda i, s: times.append(s))
    out[f"read_{rows}"], out[f"tokens_per_s_{rows}"], out[f"ids_{rows}"] = times[0], rows * (new - 1) / sum(times[1:]), got[0].ids
report()
""",
    "peer": """
from transformers import AutoModelForCausalLM, LogitsProcessorList
start = now(); net = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device).eval(); out["load"] = now() - start
for rows in (1, 8):
    ids, times = torch.tensor([list(range(5, 37))] * rows, device=device), []
    def watch(ids, scores): times.append(now()); return scores
    start = now()
    with torch.inference_mode():
        got = net.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=new, min_new_tokens=new, do_sample=False,
                           eos_token_id=None, logits_processor=LogitsProcessorList([watch]))
    times.append(now())
    out[f"read_{rows}"], out[f"tokens_per_s_{rows}"], out[f"ids_{rows}"] = times[0] - start, rows * (new - 1) / (times[-1] - times[0]), got[0, 32:].tolist()
report()
""",
}
for _kind in ("int8", "int4"):
    DECODE[_kind] = DECODE["ours"].replace(
        'out["load"] = now() - start',
        f'from nanodiff.device import quantize; out["error"] = quantize.language(net, "{_kind}"); out["load"] = now() - start',
    )
STEP = {
    "ours": """
from nanodiff.stories import captioner_model as captioner
torch.manual_seed(0)
start = now(); net = captioner.base(captioner.Settings(vit, folder, dropout=0.0), torch.bfloat16, device); out["load"] = now() - start
captioner.adapt(net, captioner.Adapters(8, 32.0, 0.0, captioner.LLM_TARGETS), captioner.Adapters(0, 1.0, 0.0, ()))
for m in (net.projector.first, net.projector.hidden, net.projector.last):
    torch.nn.init.constant_(m.weight, 1e-3); torch.nn.init.zeros_(m.bias)
net.train()
train(list(net.parameters()), lambda pixels, ids: net(pixels, ids) / ids.numel())
report()
""",
    "peer": """
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, ViTModel
torch.manual_seed(0)
start = now()
eye = ViTModel.from_pretrained(vit, dtype=torch.bfloat16, add_pooling_layer=False).to(device).requires_grad_(False)
llm = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.bfloat16).to(device)
out["load"] = now() - start
names = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
llm = get_peft_model(llm, LoraConfig(r=8, lora_alpha=32, lora_dropout=0.0, target_modules=names))
for p in llm.parameters():
    if p.requires_grad: p.data = p.data.float()
d = llm.config.hidden_size
projector = torch.nn.Sequential(*(torch.nn.Linear(a, d) for a in (eye.config.hidden_size, d, d))).to(device)
for m in projector: torch.nn.init.constant_(m.weight, 1e-3); torch.nn.init.zeros_(m.bias)
from tokenizers import Tokenizer
tok = Tokenizer.from_file(folder + "/tokenizer.json")
words = lambda t: tok.encode(t, add_special_tokens=False).ids
before, after = [llm.config.bos_token_id, *words("Image:")], words(".") + words("The description of the given image is: ")
embed = llm.get_input_embeddings()
def call(pixels, ids):
    seen = projector(eye(pixels.to(torch.bfloat16)).last_hidden_state.float()).to(torch.bfloat16)
    text = [embed(torch.tensor([w], device=device)) for w in (before, after)]
    x = torch.cat([text[0], seen, text[1], embed(ids)], 1)
    labels = torch.cat([torch.full((1, x.shape[1] - ids.shape[1]), -100, device=device), ids], 1)
    return llm(inputs_embeds=x, labels=labels).loss
llm.train()
train([*llm.parameters(), *projector.parameters()], call)
report()
""",
}
MAKE = """
import json, shutil, sys, torch
from pathlib import Path
from nanodiff import weights
for name, folder in (("llama-3.2-1b", sys.argv[1]), ("vit-base-patch16-224", sys.argv[2])):
    facts = json.loads(Path(f"tests/golden/manifests/{name}.json").read_text())
    Path(folder).mkdir(parents=True)
    (Path(folder) / "config.json").write_text(json.dumps(facts["config"]))
    g, tensors = torch.Generator().manual_seed(0), {}
    for key, shape in facts["parameters"].items():
        x = torch.empty(shape, dtype=torch.bfloat16)
        tensors[key] = x.fill_(1) if "norm" in key and key.endswith("weight") else x.normal_(0, 0.02, generator=g)
    weights.save_tensors(Path(folder) / "model.safetensors", tensors, {"format": "pt"})
shutil.copy("tests/golden/tiny/llama/tokenizer.json", sys.argv[1])
"""


def once(python, code, *args):
    """A side's numbers, from a process of its own."""
    env = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{os.environ.get('PYTHONPATH', '')}", "HF_HUB_OFFLINE": "1"}
    done = subprocess.run([python, "-c", code, *map(str, args)], cwd=ROOT, env=env, capture_output=True, text=True)
    found = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if done.returncode or not found:
        sys.exit(done.stderr[-3000:])
    return json.loads(found[-1][6:])


def agreed(a, b):
    """How many tokens two texts have in common before they part: with random weights in bf16 a rounding decides between two words sooner or later."""
    return next((i for i, (x, y) in enumerate(zip(a, b, strict=True)) if x != y), len(a))


def main():
    sys.path.insert(0, str(ROOT))
    from nanodiff.commandline import at_least

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--peer", default="", help="python of an environment with transformers and peft")
    parser.add_argument("--parts", default="decode,step")
    parser.add_argument("--pairs", type=at_least(1), default=2)
    parser.add_argument("--new", type=at_least(1), default=24)
    parser.add_argument("--steps", type=at_least(1), default=2)
    parser.add_argument("--folder", help="where the weights are made, or are already (4 GB); default: a temporary one")
    parser.add_argument("--name", default="cpu", help='of the results\' file; "": printed only')
    cfg = parser.parse_args()
    if unknown := [part for part in cfg.parts.split(",") if part not in ("decode", "step")]:
        parser.error(f"--parts {unknown[0]}: is none of decode, step")
    results = {
        "machine": {
            "cpu": platform.processor() or platform.machine(),
            "threads": os.cpu_count(),
            "python": platform.python_version(),
        }
    }
    with tempfile.TemporaryDirectory() as temporary:
        home = Path(cfg.folder or temporary)
        llm, vit = home / "llama", home / "vit"
        if not (llm / "tokenizer.json").is_file():
            subprocess.run(
                [sys.executable, "-c", MAKE, llm, vit], cwd=ROOT, env=os.environ | {"PYTHONPATH": str(ROOT)}, check=True
            )
        for part in cfg.parts.split(","):
            codes = {"decode": DECODE, "step": STEP}[part]
            sides = {side: sys.executable for side in codes if side != "peer"} | (
                {"peer": cfg.peer} if cfg.peer else {}
            )
            found = {side: [] for side in sides}
            for _ in range(cfg.pairs):
                for side, python in sides.items():
                    found[side].append(once(python, COMMON + codes[side], llm, vit, cfg.new, cfg.steps))
                    print(part, side, {k: v for k, v in found[side][-1].items() if not isinstance(v, list)}, flush=True)
            keys = [k for k, v in found["ours"][0].items() if isinstance(v, float)]
            table = {k: {side: statistics.median(r[k] for r in rows) for side, rows in found.items()} for k in keys}
            for k in [k for k in keys if k.startswith("tokens")]:
                table[k] |= {
                    f"{side} over ours": table[k][side] / table[k]["ours"] for side in codes if side.startswith("int")
                }
            for k, row in table.items():
                if "peer" in row:  # how many times as good: tokens/s up, everything else down
                    row["ratio"] = row["ours"] / row["peer"] if k.startswith("tokens") else row["peer"] / row["ours"]
                print(f"{part} {k}: " + ", ".join(f"{n} {v:.4g}" for n, v in row.items()), flush=True)
            if cfg.peer:
                same = {
                    k: agreed(found["ours"][0][k], found["peer"][0][k]) for k in found["ours"][0] if k.startswith("ids")
                }
                losses = {side: rows[0].get("losses") for side, rows in found.items()}
                print(f"{part}: tokens until the two differ: {same}; losses: {losses}")
                table |= {"tokens_agreed": same, "losses": losses}
            results[part] = {"pairs": found, "table": table}
            if cfg.name:
                (ROOT / "benchmarks" / f"captioner-{cfg.name}.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
