"""Speed and memory beside diffusers, in one run:   python benchmarks/bench.py --peer PYTHON [--peer-ov PYTHON] [--cases import,load,…]

PYTHON is the interpreter of an environment that has diffusers and transformers, of --peer-ov one that has OpenVINO, too (for steps,
decodes and pictures of SD 1.5: openvino_peer.py); without them only our own figures are printed. Every measurement is a fresh process; ours and the peer's alternate (A B A B …) and the figure is the median of
the ratios peer / ours of neighbouring runs, with the smallest and the largest beside it, because on a shared machine
only neighbours can be compared. Weights are random, in the real sizes, made once under --work (2 to 7 GB a model).

Cases: import (the pipeline module), load (process start to a ready SD 1.5 from an fp16 folder), unet16, unet32 and unet64
(one guided step at 128, 256 and 512 px, weights packed as for a run of four steps or more), clip (two prompts), vae (one
decode at 512 px), train (an update of a small UNet, 16 images), error-bf16 (not a time: the relative error of a bf16 step
against fp32), image (process start to a 512 px picture in 2 steps) and default (in 4 steps, each side in the type it takes
by itself), tiny (a denoiser call of the test pipelines), picture-NAME (ten steps of a whole test pipeline), sdxl… and
sd35m… (SDXL and SD 3.5 medium without T5: a guided step, a whole picture), control64 and ip64 (a guided
step at 512 px with a ControlNet, with an IP-Adapter). Results go to benchmarks/NAME.json.
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
STARTED, folder, kind = sys.argv[1], sys.argv[2], sys.argv[3]
"""
OURS = {
    "import": "import nanodiff.pipeline; report()",
    "load": """
import torch; from nanodiff import pipeline
sd = pipeline.load(folder, getattr(torch, kind)); report()""",
    "net": """
import torch; from nanodiff import pipeline, weights; from nanodiff.device import onednn
name = "transformer" if os.path.isdir(folder + "/transformer") else "unet"
size, dtype, eight = int(kind.split("-")[1]), getattr(torch, kind.split("-")[0]), kind.endswith("int8")
net = weights.load(pipeline.BUILDERS[name], folder + "/" + name, None if eight else dtype)
if eight:
    from nanodiff.device import quantize
    quantize.rest(quantize.apply(net, "int8"), dtype, "cpu")
r = lambda *shape: torch.randn(shape, dtype=dtype)
x = r(2, net.cfg.in_channels, size, size)
with torch.no_grad():
    if name == "transformer":
        text, pooled = r(2, 333, net.cfg.joint_attention_dim), r(2, net.cfg.pooled_projection_dim)
        call = lambda: net(x, 500.0, text, pooled)
    else:
        kv, added = net.text_kv(r(2, 77, net.cfg.cross_attention_dim)), None
        if net.cfg.addition_embed_type:
            pooled = net.cfg.projection_class_embeddings_input_dim - 6 * net.cfg.addition_time_embed_dim
            added = r(2, pooled), torch.full((2, 6), 512.0)
        call = lambda: net(x, 500, kv, added)
    onednn.prepare(net, pack=True)  # as sample.py does for a run of 4 steps or more
    start = time.perf_counter(); call(); first = time.perf_counter() - start
    report(seconds=timed(call, int(kind.split("-")[2])), first=first)""",
}
# a guided step with what is added to a UNet: a ControlNet (a copy of it), or an IP-Adapter (plain, four tokens); kind: TYPE-SIDE-RUNS-WHAT
OURS["added"] = """
import torch; from nanodiff import pipeline, weights; from nanodiff.device import onednn
from nanodiff.models.controlnet import Config, ControlNetModel; from nanodiff.models.ipadapter import Config as IPConfig, IPAdapter
from nanodiff.pipeline.pictures import ImagePrompt, with_pictures
dtype, size, runs, what = kind.split("-"); size, dtype = int(size), getattr(torch, dtype)
net = weights.load(pipeline.BUILDERS["unet"], folder + "/unet", dtype)
r = lambda *shape: torch.randn(shape, dtype=dtype)
x, text = r(2, 4, size, size), r(2, 77, net.cfg.cross_attention_dim)
with torch.no_grad():
    kv = net.text_kv(text)
    onednn.prepare(net, pack=True)
    if what == "control":
        other = ControlNetModel(Config.of(net.cfg)).to(dtype, memory_format=torch.channels_last).eval().requires_grad_(False)
        own, seen = other.text_kv(text), other.look(r(1, 3, 8 * size, 8 * size)).repeat(2, 1, 1, 1)
        onednn.prepare(other, pack=True)
        call = lambda: net(x, 500, kv, control=other(x, 500, own, seen))
    else:
        down, middle, up = net.cross_attentions(); widths = net.context_widths()
        order = tuple(widths[:down] + widths[down + middle:] + widths[down : down + middle])
        adapter = IPAdapter(IPConfig(net.cfg.cross_attention_dim, 1024, 4, order)).to(dtype).eval()
        kv = with_pictures(kv, net, [ImagePrompt(adapter, r(1, 1024), r(1, 1024), 0.7)], 2, 2)
        call = lambda: net(x, 500, kv)
    report(seconds=timed(call, int(runs)))"""
OURS["clip"] = """
import torch; from nanodiff import weights; from nanodiff.device import onednn; from nanodiff.models.clip import CLIPTextModel
net = weights.load(CLIPTextModel, folder + "/text_encoder", getattr(torch, kind)); ids = torch.randint(0, 49000, (2, 77))
onednn.prepare(net, pack=True)  # as sample.py does
with torch.no_grad():
    report(seconds=timed(lambda: net(ids), 7))"""
TRAIN = """
net.train().requires_grad_(True)
opt = torch.optim.AdamW(net.parameters(), lr=1e-4)
x, t, text = torch.randn(16, 4, 32, 32), torch.randint(0, 1000, (16,)), torch.randn(16, 77, 256)
def step():
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "bfloat16"):
        loss = (call(x, t, text).float() - x).square().mean()
    loss.backward(); opt.step(); opt.zero_grad()
report(seconds=timed(step, 3))"""
SMALL = """dict(block_out_channels=(128, 256, 256), layers_per_block=2, cross_attention_dim=256, attention_head_dim=8,
    down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
    up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"))"""
OURS["train"] = f"""
import torch; from nanodiff import weights; from nanodiff.device import memory, onednn; from nanodiff.models.unet import UNet2DConditionModel as UNet
memory.keep_freed_memory(); torch.manual_seed(0)
net = onednn.learn(UNet(UNet.Config.from_json({SMALL}))); call = lambda x, t, text: net(x, t, text){TRAIN}"""
ERROR = """
x, text = (torch.randn(shape, generator=torch.Generator().manual_seed(0)) for shape in ((2, 4, 64, 64), (2, 77, 768)))
out = {}
for dtype in (torch.float32, torch.bfloat16):
    net = load(dtype)
    with torch.no_grad():
        out[dtype] = run(net, x.to(dtype), text.to(dtype)).double()
    del net
a, b = out.values()
report(seconds=((a - b).pow(2).mean() / a.pow(2).mean()).sqrt().item())"""
OURS["error"] = f"""
import torch; from nanodiff import weights; from nanodiff.device import onednn; from nanodiff.models.unet import UNet2DConditionModel as UNet
def load(dtype):
    net = weights.load(UNet, folder + "/unet", dtype); onednn.prepare(net, pack=True); return net
run = lambda net, x, text: net(x, 500, text){ERROR}"""
OURS["vae"] = """
import torch; from nanodiff import weights; from nanodiff.models.vae import AutoencoderKL
net = weights.load(AutoencoderKL, folder + "/vae", getattr(torch, kind)); z = torch.randn(1, 4, 64, 64).to(getattr(torch, kind))
with torch.no_grad():
    report(seconds=timed(lambda: net.decode_raw(z), 1))"""
OURS["image"] = """
import torch; from nanodiff import pipeline
dtype, side, steps, offload = kind.split("-")
sd = pipeline.load(folder, getattr(torch, dtype), offload=offload)
sd.packs = True  # as sample.py has it
at = {"height": int(side), "width": int(side)} if int(side) else {}
started = time.time()
sd.generate(["a corgi on a beach"], steps=int(steps), seeds=[0], guidance_scale=5.0, **at)
report(seconds=time.time() - started)"""
OURS["default"] = """
import runpy; sys.argv = ["sample.py", "--model", folder, "--prompt", "a corgi on a beach", "--seed", "0", "--steps", kind,
                          "--output-dir", "out/bench/default"]
try:
    runpy.run_path("sample.py", run_name="__main__")
except SystemExit:
    pass
sys.argv = ["", STARTED]; report()"""
# The peer's side, run by another interpreter: this project itself never imports these packages.
PEER = {
    "import": "from diffusers import StableDiffusionPipeline; report()",
    "load": """
import torch; from diffusers import StableDiffusionPipeline
sd = StableDiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, kind), safety_checker=None); report()""",
    "net": """
import torch; from diffusers import UNet2DConditionModel, SD3Transformer2DModel
name = "transformer" if os.path.isdir(folder + "/transformer") else "unet"
size, dtype = int(kind.split("-")[1]), getattr(torch, kind.split("-")[0])
cls = SD3Transformer2DModel if name == "transformer" else UNet2DConditionModel
net = cls.from_pretrained(folder + "/" + name, torch_dtype=dtype)
r = lambda *shape: torch.randn(shape, dtype=dtype)
x, c = r(2, net.config.in_channels, size, size), net.config
if "cl" in kind.split("-"):
    net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
with torch.no_grad():
    if name == "transformer":
        text, pooled, t = r(2, 333, c.joint_attention_dim), r(2, c.pooled_projection_dim), torch.full((2,), 500.0)
        call = lambda: net(x, encoder_hidden_states=text, pooled_projections=pooled, timestep=t, return_dict=False)
    else:
        text, added = r(2, 77, c.cross_attention_dim), None
        if c.addition_embed_type:
            pooled = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
            added = {"text_embeds": r(2, pooled), "time_ids": torch.full((2, 6), 512.0, dtype=dtype)}
        call = lambda: net(x, 500, text, added_cond_kwargs=added, return_dict=False)
    report(seconds=timed(call, int(kind.split("-")[2])))""",
}
PEER["added"] = """
import torch; from diffusers import ControlNetModel, UNet2DConditionModel
dtype, size, runs, what, *cl = kind.split("-"); size, dtype = int(size), getattr(torch, dtype)
net = UNet2DConditionModel.from_pretrained(folder + "/unet", torch_dtype=dtype)
r = lambda *shape: torch.randn(shape, dtype=dtype)
x, text, c = r(2, 4, size, size), r(2, 77, net.config.cross_attention_dim), net.config
if what == "control":
    other = ControlNetModel.from_unet(net).to(dtype).eval(); picture = r(1, 3, 8 * size, 8 * size).repeat(2, 1, 1, 1)
else:
    D, ip = c.cross_attention_dim, {}
    for i, name in enumerate(net.attn_processors):
        if "attn2" in name:
            wide = net.get_submodule(name.removesuffix(".processor")).to_k.out_features
            ip |= {f"{i}.to_k_ip.weight": r(wide, D), f"{i}.to_v_ip.weight": r(wide, D)}
    proj = {"proj.weight": r(4 * D, 1024), "proj.bias": r(4 * D), "norm.weight": r(D), "norm.bias": r(D)}
    net._load_ip_adapter_weights([{"image_proj": proj, "ip_adapter": ip}], low_cpu_mem_usage=False)
    net, image = net.to(dtype), {"image_embeds": [r(2, 1, 1024)]}
if cl:
    net, x = net.to(memory_format=torch.channels_last), x.to(memory_format=torch.channels_last)
    other = other.to(memory_format=torch.channels_last) if what == "control" else None
def call():
    if what == "control":
        down, middle = other(x, 500, text, picture, return_dict=False)
        return net(x, 500, text, down_block_additional_residuals=down, mid_block_additional_residual=middle, return_dict=False)
    return net(x, 500, text, added_cond_kwargs=image, return_dict=False)
with torch.no_grad():
    report(seconds=timed(call, int(runs)))"""
PEER["vae"] = """
import torch; from diffusers import AutoencoderKL
kind, cl, _ = (kind + "--").split("-", 2); dtype = getattr(torch, kind)
net = AutoencoderKL.from_pretrained(folder + "/vae", torch_dtype=dtype); z = torch.randn(1, 4, 64, 64).to(dtype)
if cl:
    net, z = net.to(memory_format=torch.channels_last), z.to(memory_format=torch.channels_last)
with torch.no_grad():
    report(seconds=timed(lambda: net.decode(z, return_dict=False), 1))"""
PEER["image"] = """
import torch; from diffusers import DiffusionPipeline
dtype, side, steps, offload = kind.split("-")
absent = [n for n in ("text_encoder_3", "tokenizer_3") if "sd35" in folder and not os.path.isdir(folder + "/" + n)]
sd = DiffusionPipeline.from_pretrained(folder, torch_dtype=getattr(torch, dtype), **dict.fromkeys(absent))
at = {"height": int(side), "width": int(side)} if int(side) else {}
started = time.time()
sd("a corgi on a beach", num_inference_steps=int(steps), generator=torch.Generator().manual_seed(0), guidance_scale=5.0, **at)
report(seconds=time.time() - started)"""
PEER["default"] = """
import torch; from diffusers import StableDiffusionPipeline
sd = StableDiffusionPipeline.from_pretrained(folder, safety_checker=None)
sd("a corgi on a beach", num_inference_steps=int(kind), generator=torch.Generator().manual_seed(0)).images[0].save("/dev/null", "PNG")
report()"""
PEER["clip"] = """
import torch; from transformers import CLIPTextModel
net = CLIPTextModel.from_pretrained(folder + "/text_encoder", torch_dtype=getattr(torch, kind)); ids = torch.randint(0, 49000, (2, 77))
with torch.no_grad():
    report(seconds=timed(lambda: net(ids), 7))"""
PEER["train"] = f"""
import torch; from diffusers import UNet2DConditionModel
torch.manual_seed(0); net = UNet2DConditionModel(**{SMALL}); call = lambda x, t, text: net(x, t, text).sample{TRAIN}"""
PEER["error"] = f"""
import torch; from diffusers import UNet2DConditionModel
load = lambda dtype: UNet2DConditionModel.from_pretrained(folder + "/unet", torch_dtype=dtype)
run = lambda net, x, text: net(x, 500, text).sample{ERROR}"""
OPENVINO = ("net", "vae", "error", "image")  # of openvino_peer.py
# diffusers' modules of a Stable Diffusion 1.x folder into folder/openvino; weights in fp16, which is OpenVINO's habit and what the folder has
CONVERT = """
import openvino as ov, torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from transformers import CLIPTextModel
class Call(torch.nn.Module):
    def __init__(self, net, call):
        super().__init__(); self.net, self.call = net, call
    def forward(self, *args):
        return self.call(self.net, *args)
def write(cls, part, call, name, *example):
    net = cls.from_pretrained(folder + "/" + part, torch_dtype=torch.float32).eval()
    with torch.no_grad():
        model = ov.convert_model(Call(net, call), example_input=example)
    ov.save_model(model, folder + "/openvino/" + name + ".xml")
r = torch.randn
write(UNet2DConditionModel, "unet", lambda net, x, t, text: net(x, t, text, return_dict=False)[0], "unet",
      r(2, 4, 64, 64), torch.tensor(500), r(2, 77, 768))
write(AutoencoderKL, "vae", lambda net, z: net.decode(z, return_dict=False)[0], "vae", r(1, 4, 64, 64))
write(CLIPTextModel, "text_encoder", lambda net, ids: net(ids)[0], "text", torch.randint(0, 49000, (2, 77)))
report()"""
CASES = {  # name: (program, model, our kind, the peer's kinds, pairs, figure)
    "import": ("import", "sd15", "-", ["-"], 7, "total_s"),
    "load-fp16": ("load", "sd15", "float16", ["float16"], 5, "total_s"),
    "load-fp32": ("load", "sd15", "float32", ["float32"], 5, "total_s"),
    "load-bf16": ("load", "sd15", "bfloat16", ["bfloat16"], 5, "total_s"),
    "tiny": ("net", "tiny/sd15", "float32-16-20", ["float32-16-20"], 5, "seconds"),
    "tiny-sdxl": ("net", "tiny/sdxl", "float32-16-20", ["float32-16-20"], 5, "seconds"),
    "tiny-sd35": ("net", "tiny/sd35-medium", "float32-16-20", ["float32-16-20"], 5, "seconds"),
    "unet16-fp32": ("net", "sd15", "float32-16-3", ["float32-16-3", "float32-16-3-cl"], 3, "seconds"),
    "unet16-bf16": ("net", "sd15", "bfloat16-16-3", ["bfloat16-16-3", "bfloat16-16-3-cl"], 3, "seconds"),
    "unet32-bf16": ("net", "sd15", "bfloat16-32-3", ["bfloat16-32-3", "bfloat16-32-3-cl"], 5, "seconds"),
    "clip-fp32": ("clip", "sd15", "float32", ["float32"], 5, "seconds"),
    "clip-bf16": ("clip", "sd15", "bfloat16", ["bfloat16"], 5, "seconds"),
    "train-fp32": ("train", "sd15", "float32", ["float32"], 5, "seconds"),
    "train-bf16": ("train", "sd15", "bfloat16", ["bfloat16"], 5, "seconds"),
    "vae-fp32": ("vae", "sd15", "float32", ["float32", "float32-cl"], 3, "seconds"),
    "error-bf16": ("error", "sd15", "-", ["-"], 1, "seconds"),
    "unet32-fp32": ("net", "sd15", "float32-32-3", ["float32-32-3", "float32-32-3-cl"], 5, "seconds"),
    "unet64-fp32": ("net", "sd15", "float32-64-1", ["float32-64-1", "float32-64-1-cl"], 3, "seconds"),
    "vae-bf16": ("vae", "sd15", "bfloat16", ["bfloat16", "bfloat16-cl"], 3, "seconds"),
    "image-bf16": ("image", "sd15", "bfloat16-512-2-none", ["bfloat16-512-2-none"], 3, "total_s"),
    "default": ("default", "sd15", "4", ["4"], 1, "total_s"),
    "unet64-bf16": ("net", "sd15", "bfloat16-64-1", ["bfloat16-64-1", "bfloat16-64-1-cl"], 3, "seconds"),
    "unet64-int8": ("net", "sd15", "bfloat16-64-1-int8", ["bfloat16-64-1", "bfloat16-64-1-cl"], 3, "seconds"),
    "image8-bf16": ("image", "sd15", "bfloat16-512-8-none", ["bfloat16-512-8-none"], 2, "total_s"),
    "control64-fp32": (
        "added",
        "sd15",
        "float32-64-1-control",
        ["float32-64-1-control", "float32-64-1-control-cl"],
        3,
        "seconds",
    ),
    "control64-bf16": (
        "added",
        "sd15",
        "bfloat16-64-1-control",
        ["bfloat16-64-1-control", "bfloat16-64-1-control-cl"],
        3,
        "seconds",
    ),
    "ip64-fp32": ("added", "sd15", "float32-64-1-ip", ["float32-64-1-ip", "float32-64-1-ip-cl"], 3, "seconds"),
    "ip64-bf16": ("added", "sd15", "bfloat16-64-1-ip", ["bfloat16-64-1-ip", "bfloat16-64-1-ip-cl"], 3, "seconds"),
    "sdxl64-bf16": ("net", "sdxl", "bfloat16-64-1", ["bfloat16-64-1", "bfloat16-64-1-cl"], 3, "seconds"),
    "sd35m64-bf16": ("net", "sd35-medium", "bfloat16-64-1", ["bfloat16-64-1"], 3, "seconds"),
    "sdxl64-int8": ("net", "sdxl", "bfloat16-64-1-int8", ["bfloat16-64-1", "bfloat16-64-1-cl"], 3, "seconds"),
    "sd35m64-int8": ("net", "sd35-medium", "bfloat16-64-1-int8", ["bfloat16-64-1"], 3, "seconds"),
    "sdxl-image-bf16": ("image", "sdxl", "bfloat16-512-2-none", ["bfloat16-512-2-none"], 2, "total_s"),
    "sdxl-image-offload": ("image", "sdxl", "bfloat16-512-2-model", ["bfloat16-512-2-none"], 1, "total_s"),
    "sd35m-image-bf16": ("image", "sd35-medium", "bfloat16-512-2-none", ["bfloat16-512-2-none"], 2, "total_s"),
}
for _name in ("sd15", "sd21-v", "sd-turbo", "sdxl", "sdxl-turbo", "sd35-medium", "sd35-large-turbo"):
    CASES[f"picture-{_name}"] = ("image", f"tiny/{_name}", "float32-0-10-none", ["float32-0-10-none"], 3, "seconds")
MODELS = {  # full-size random models: repository of the small files, components from manifests, stored type
    "sd15": ("CompVis/stable-diffusion-v1-4", ("unet", "vae", "text_encoder"), "float16"),
    "sdxl": ("stabilityai/stable-diffusion-xl-base-1.0", ("unet", "vae", "text_encoder", "text_encoder_2"), "bfloat16"),
    "sd35-medium": ("stabilityai/stable-diffusion-3.5-medium", ("transformer", "vae", "text_encoder", "text_encoder_2"), "bfloat16"),
}  # fmt: skip


def measure(python, program, folder, kind):
    """Facts of a program of OURS or PEER, or of a name of openvino_peer.py's, in a process of its own."""
    import time

    env = os.environ | {"PYTHONPATH": str(ROOT), "HF_HUB_OFFLINE": "1", "TQDM_DISABLE": "1"}
    argv = [python, "-c", COMMON + program, str(time.time()), str(folder), kind]
    if program in OPENVINO:
        argv = [python, str(ROOT / "benchmarks" / "openvino_peer.py"), str(time.time()), program, str(folder), kind]
    done = subprocess.run(argv, capture_output=True, text=True, env=env, cwd=ROOT, timeout=900)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT")]
    if not lines:
        sys.exit(f"error: {python} failed:\n{done.stderr[-2000:]}")
    return json.loads(lines[-1][6:])


def make_model(name, folder):
    """A full-size model folder with random weights of sane scale, from the published configs and shapes; SD 3.5 without
    T5, which would not fit beside the rest."""
    sys.path.insert(0, str(ROOT))
    import torch

    from nanodiff.files import write_json
    from nanodiff.text.tokenizer import END, clip_from_merges
    from nanodiff.weights import save_tensors

    repository, components, stored = MODELS[name]
    golden = ROOT / "tests" / "golden"
    for part in components:
        manifest = json.loads((golden / "manifests" / f"{name}.{part}.json").read_text())
        shapes = manifest["parameters"]
        if isinstance(shapes, str):  # another's
            shapes = json.loads((golden / "manifests" / f"{shapes}.json").read_text())["parameters"]
        generator, tensors = torch.Generator().manual_seed(0), {}
        for key, shape in shapes.items():
            if "position_ids" in key:
                tensors[key] = torch.arange(77)[None]
            elif len(shape) == 1:
                tensors[key] = torch.full(shape, float(key.endswith("weight")), dtype=getattr(torch, stored))
            else:
                fan_in = torch.Size(shape[1:]).numel() if key != "pos_embed.pos_embed" else 1
                tensors[key] = (torch.randn(shape, generator=generator) / fan_in**0.5).to(getattr(torch, stored))
        (folder / part).mkdir(parents=True)
        write_json(folder / part / "config.json", manifest["config"])
        stem = "model" if part.startswith("text") else "diffusion_pytorch_model"
        save_tensors(folder / part / f"{stem}.safetensors", tensors)
    facts = json.loads((golden / "manifests" / "pipelines.json").read_text())[repository]
    index = facts["model_index.json"]
    index |= {
        k: [None, None]
        for k in ("safety_checker", "feature_extractor", "image_encoder", "text_encoder_3", "tokenizer_3")
        if k in index
    }
    (folder / "scheduler").mkdir()
    write_json(folder / "scheduler" / "scheduler_config.json", facts["scheduler/scheduler_config.json"])
    for tokenizer in [k for k in index if k.startswith("tokenizer") and index[k] != [None, None]]:
        clip_from_merges(END if tokenizer == "tokenizer" else "!", 77).save(folder / tokenizer)
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
    parser.add_argument("--peer-ov", default="", help="python of an environment with OpenVINO and diffusers")
    usual = ",".join(name for name in CASES if not name.startswith(("sdxl", "sd35m")))
    parser.add_argument("--cases", default=usual, help="comma-separated; all = also the large models")
    parser.add_argument("--pairs", type=int, default=0, help="pairs a case; 0 = each case's own number")
    parser.add_argument("--work", default="out/bench", help="where the random full-size model is made")
    parser.add_argument("--name", default="cpu", help="benchmarks/NAME.json; empty: print only")
    args = parser.parse_args()
    results = {}
    for name in CASES if args.cases == "all" else args.cases.split(","):
        if name not in CASES:
            parser.error(f"--cases {name}: is none of {', '.join(CASES)}")
        program, model, kind, peer_kinds, pairs, figure = CASES[name]
        pairs = args.pairs or pairs
        folder = ROOT / "tests" / "golden" / model if model.startswith("tiny/") else ROOT / args.work / model
        if not (folder / "model_index.json").exists():
            make_model(model, folder)
        ours, peers, other = [], {k: [] for k in peer_kinds}, []
        with_ov = args.peer_ov and program in OPENVINO and model == "sd15"
        if with_ov and not (folder / "openvino" / "text.xml").exists():
            measure(args.peer_ov, CONVERT, folder, kind)
        for _ in range(pairs):
            ours.append(measure(sys.executable, OURS[program], folder, kind))
            for k in peer_kinds if args.peer else ():
                peers[k].append(measure(args.peer, PEER[program], folder, k))
            if with_ov:
                other.append(measure(args.peer_ov, program, folder, kind))
        row = {
            "ours_s": statistics.median(r[figure] for r in ours),
            "ours_peak_mb": max(r["peak_mb"] for r in ours),
            "pairs": pairs,
        }
        if other:
            ratios = [p[figure] / o[figure] for o, p in zip(ours, other, strict=True)]
            row |= {"openvino_s": statistics.median(r[figure] for r in other), "openvino_peak_mb": max(r["peak_mb"] for r in other),
                    "openvino_ratio": statistics.median(ratios), "openvino_ratio_min": min(ratios),
                    "openvino_ratio_max": max(ratios), "openvino": other[0]["version"]}  # fmt: skip
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
        if args.name:
            write(args.name, results)


def write(name, results):
    """Results of this run over those that are known, in benchmarks/NAME.json."""
    import torch

    machine = f"{cpu_name()}, {os.cpu_count()} cores, torch {torch.__version__}, Python {platform.python_version()}"
    target = ROOT / "benchmarks" / f"{name}.json"
    known = json.loads(target.read_text())["results"] if target.exists() else {}
    facts = {"machine": machine, "command": "python benchmarks/bench.py --peer PYTHON", "results": known | results}
    target.write_text(json.dumps(facts, indent=2) + "\n")


if __name__ == "__main__":
    main()
