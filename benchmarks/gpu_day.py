"""Everything that a GPU is wanted for, most important first, in two calls of six minutes: `make gpu-day OUT=folder`.

    python benchmarks/gpu_day.py --out DIR [--resume DIR] [--budget 330] [--only PART …] [--peer PYTHON] [--dry]

A part is a process of its own with a time limit. Each figure is a line of DIR/day.jsonl as soon as it is known, DIR/day.md
is the table of them, which is printed last; parts that are done in the day.jsonl of --resume are left out, and its
cache.tar.gz (compiled kernels) is used. A part that fails does not stop the others; only if `smoke` does, wrong kernels are not timed: the
call ends. Weights are random, in the published shapes, made on the GPU from the names of the tensors, so
that diffusers (benchmarks/gpu_peer.py, in a Python that has it: --peer) computes with the same ones.

`--dry`: the same parts without a GPU, on the test models, and what each would compile.
"""

import argparse
import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tarfile
import time
import zlib
from pathlib import Path

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = {  # what is measured: side in latents, guidance, steps, text tokens
    "sd15": {"side": 64, "steps": 50, "guidance": 7.5},
    "sdxl": {"side": 128, "steps": 30, "guidance": 5.0},
    "sd35-medium": {"side": 128, "steps": 40, "guidance": 4.5},
    "sd-turbo": {"side": 64, "steps": 1, "guidance": 0.0},
}
WARM = (*MODELS, "sd15:float16", "vae", "train")  # what is compiled side by side
SMOKE = ("40", "64", "80", "160", "512", "rest")  # checked side by side: heads of attention, and the other kernels
# name: (seconds it may take, seconds it took on an H200 with 16 cores or None)
PARTS = {"facts": (30, 10), "smoke": (150, 31), "sd15": (60, 23), "profile": (60, 18), "sdxl": (60, 31), "sd35-medium": (60, 35),
         "sd-turbo": (40, 12), "vae": (40, 12), "tests": (150, 83), "tune": (160, 57), "kernels": (80, None), "peer-sd15": (100, 70),
         "peer-sdxl": (100, 58), "peer-sd35-medium": (120, 60), "peer-train": (120, 69), "peer-sd-turbo": (60, 37),
         "small": (80, 52), "compiled-sd15": (240, None)}  # fmt: skip
WORST = {"forward": 1e-2, "again": 1e-2, "gradient": 2e-2}  # relative errors of a bf16 kernel against float64, at most


def emit(out, part, case, **figures):
    """One row: to day.jsonl at once, and to the screen."""
    row = {"part": part, "case": case, "figures": figures}
    with open(Path(out) / "day.jsonl", "a") as file:
        file.write(json.dumps(row) + "\n")
        file.flush()
        os.fsync(file.fileno())
    print(line(row), flush=True)


def line(row):
    def text(value):
        return f"{value:.4g}" if isinstance(value, float) else str(value)

    return f"| {row['part']} | {row['case']} | " + ", ".join(f"{k} {text(v)}" for k, v in row["figures"].items()) + " |"


def rows(out):
    path = Path(out) / "day.jsonl"
    return [json.loads(text) for text in path.read_text().splitlines()] if path.exists() else []


# Models with random weights ---------------------------------------------------------------------------------


def fill(module, device):
    """Give every parameter and buffer of a module on the meta device a place on `device` and a value that follows from its
    name: N(0, 1 / fan-in), 1 for gains, 0 for biases. In fp32, so that every type starts from the same numbers."""
    import torch

    for name, tensor in [*module.named_parameters(), *module.named_buffers()]:
        owner, _, leaf = name.rpartition(".")
        shape = tensor.shape
        if "position_ids" in name:
            value = torch.arange(shape[-1], device=device)[None]
        elif len(shape) == 1:
            value = torch.full(shape, float(leaf == "weight"), device=device)
        else:
            generator = torch.Generator(device).manual_seed(zlib.crc32(name.encode()))
            fan_in = shape[1:].numel() if "pos_embed.pos_embed" not in name else 1
            value = torch.randn(shape, generator=generator, device=device) / fan_in**0.5
        value = value.contiguous(memory_format=torch.channels_last) if len(shape) == 4 else value
        home = module.get_submodule(owner)
        if leaf in home._parameters:
            home._parameters[leaf] = torch.nn.Parameter(value, requires_grad=False)
        else:
            home._buffers[leaf] = value
    return module.eval()


def make(name, dtype, device, dry=False):
    """A Pipeline of the published shapes with random weights; dry: the test model of the same family."""
    sys.path.insert(0, str(ROOT))
    import torch

    from nanodiff import pipeline, weights
    from nanodiff.diffusion.schedule import Schedule
    from nanodiff.text.tokenizer import END, clip_from_merges

    if dry:
        return pipeline.load(GOLDEN / "tiny" / name, dtype, device)
    repository = {
        "sd15": "CompVis/stable-diffusion-v1-4",
        "sdxl": "stabilityai/stable-diffusion-xl-base-1.0",
        "sd35-medium": "stabilityai/stable-diffusion-3.5-medium",
        "sd-turbo": "stabilityai/sd-turbo",
    }[name]
    facts = json.loads((GOLDEN / "manifests" / "pipelines.json").read_text())[repository]
    family = pipeline.FAMILIES[facts["model_index.json"]["_class_name"]]
    modules = {}
    for part in (family.denoiser_name, "vae", *family.encoder_names):
        path = GOLDEN / "manifests" / f"{name}.{part}.json"
        if path.exists() and part != "text_encoder_3":
            builder = pipeline.BUILDERS[part]
            cfg = builder.Config.from_json(json.loads(path.read_text())["config"], str(path))
            modules[part] = fill(weights.skeleton(builder, cfg), device).to(dtype)
    tokenizers = [clip_from_merges(END if i == 0 else "!", 77) for i in range(min(2, len(family.encoder_names)))]
    encoders = [modules.get(n) for n in family.encoder_names]
    schedule = Schedule.from_config(facts["scheduler/scheduler_config.json"], where="scheduler")
    torch.manual_seed(0)
    return family(modules[family.denoiser_name], modules["vae"], encoders, tokenizers, schedule, name=name)


def inputs(net, rows_, side, dtype, device):
    """(x, t, *condition) of one call of a denoiser, from fixed seeds on the CPU, so that a peer can make them too."""
    import torch

    generator, cfg = torch.Generator().manual_seed(1), net.cfg if hasattr(net, "cfg") else net.config

    def r(*shape):
        return torch.randn(shape, generator=generator).to(device, dtype)

    x = r(rows_, cfg.in_channels, side, side)
    if hasattr(cfg, "joint_attention_dim"):
        return x, 500.0, r(rows_, 333, cfg.joint_attention_dim), r(rows_, cfg.pooled_projection_dim)
    text = r(rows_, 77, cfg.cross_attention_dim)
    if getattr(cfg, "addition_embed_type", None):
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        return x, 500.0, text, (r(rows_, pooled), torch.full((rows_, 6), 1024.0, device=device))
    return x, 500.0, text


# Timing -----------------------------------------------------------------------------------------------------


def synchronize():
    import torch

    if torch.cuda.is_available():
        torch.cuda.synchronize()


def per_call(call, calls, warm=3):
    """Milliseconds of a call, the median of three runs of `calls` calls, host and device together."""
    for _ in range(warm):
        call()
    taken = []
    for _ in range(3):
        synchronize()
        start = time.perf_counter()
        for _ in range(calls):
            call()
        synchronize()
        taken.append((time.perf_counter() - start) / calls * 1e3)
    return sorted(taken)[1]


def peak():
    """Gigabytes at most since the last call of this function, and a fresh start."""
    import torch

    if not torch.cuda.is_available():
        return 0.0
    most = torch.cuda.max_memory_reserved() / 1e9
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    return most


def rms(a, b):
    return ((a.double() - b.double()).pow(2).mean() / b.double().pow(2).mean()).sqrt().item()


# The parts --------------------------------------------------------------------------------------------------


def facts(out, device, dry):
    import platform

    import torch

    sys.path.insert(0, str(ROOT))
    import triton

    found = {"python": platform.python_version(), "torch": torch.__version__, "triton": triton.__version__, "cores": os.cpu_count()}  # fmt: skip
    if not dry:
        from kernels import bench

        flops, copy = bench.ceilings()
        found |= {"gpu": torch.cuda.get_device_name(), "capability": str(torch.cuda.get_device_capability()),
                  "memory_gb": torch.cuda.get_device_properties(0).total_memory / 1e9, "bf16_tflops": flops, "copy_gb_s": copy}  # fmt: skip
    start = time.perf_counter()
    import nanodiff.pipeline  # noqa: F401

    emit(out, "facts", "machine", **found, import_s=time.perf_counter() - start)


def smoke(out, device, dry):
    """Every kernel at real sizes against float64, then a picture; beside them, everything that the later parts would compile."""
    jobs = [f"smoke-{which}" for which in SMOKE] + [f"warm-{name}" for name in WARM]
    command = [sys.executable, __file__, "--out", str(out), *(["--dry"] if dry else []), "--part"]
    running = {
        job: subprocess.Popen([*command, job], cwd=ROOT, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
        for job in jobs
    }
    said = {job: process.communicate()[0].decode(errors="replace").strip() for job, process in running.items()}
    for job, process in running.items():
        if process.returncode:
            emit(out, "smoke", job, rc=process.returncode, said=said[job][-600:])
    found = [row["figures"] for row in rows(out) if row["part"] == "smoke"]
    bad = [f for f in found for name, most in WORST.items() if name in f and not f[name] < most]
    if bad or any(running[f"smoke-{which}"].returncode for which in SMOKE):
        sys.exit(1)


def smoke_one(which):
    def part(out, device, dry):
        """One forward and backward pass of some kernels."""
        import torch

        sys.path.insert(0, str(ROOT))
        import kernels

        attention, norms, gated, groups = (
            sys.modules[f"kernels.{n}"] for n in ("attention", "norms", "gated", "group_norm")
        )
        dtype, mode = (torch.float32, "torch") if dry else (torch.bfloat16, "triton")
        n = 64 if dry else 1024

        def r(*shape):
            return torch.randn(shape, device=device).to(dtype)

        def check(case, ours, exact, *tensors):
            leaves = [t.detach().requires_grad_() for t in tensors]
            truth = [t.detach().double().requires_grad_() for t in tensors]
            with kernels.backend(mode):
                got = ours(*leaves)
            want = exact(*truth)
            gradient = torch.randn_like(want)
            got.backward(gradient.to(got.dtype))
            want.backward(gradient)
            with kernels.backend(mode), torch.no_grad():  # past the dispatcher, twice: compiled, then as it was kept
                ours(*tensors)
                again = ours(*tensors)
            errors = [rms(a.grad, b.grad) for a, b in zip(leaves, truth, strict=True)]
            emit(out, "smoke", case, forward=rms(got, want), again=rms(again, want), gradient=max(errors))

        def attend(case, *tensors):
            check(case, lambda q, k, v: kernels.attention(q, k, v),
                  lambda q, k, v: attention.attention_reference(q, k, v)[0], *tensors)  # fmt: skip

        if which == "512":
            attend("attention 512", *(r(1, n, 1, 512) for _ in range(3)))
        elif which != "rest":
            K = int(which)
            attend(f"attention {K}", *(r(2, n, 8, K) for _ in range(3)))
            attend(f"attention {K}, 77 keys", r(2, n, 8, K), r(2, 77, 8, K), r(2, 77, 8, K))
        else:
            for C, side in ((320, 64), (1280, 16), (2560, 8), (128, 256)):
                side = 8 if dry else side
                x = r(2, C, side, side).to(memory_format=torch.channels_last)
                check(f"group_norm {C} {side}", lambda x, w, b, t: kernels.group_norm(x, 32, w, b, silu=True, shift=t),
                      lambda x, w, b, t: groups.group_norm_reference(x, 32, w, b, silu=True, shift=t), x, r(C), r(C), r(2, C))  # fmt: skip
            check("layer_norm 1280", lambda x, w, b: kernels.layer_norm(x, w, b), lambda x, w, b: norms.norm_reference(x, w, b, 1e-5),
                  r(2, n, 1280), r(1280), r(1280))  # fmt: skip
            check("adaLN 1536", lambda x, s, t: kernels.layer_norm(x, scale=s, shift=t),
                  lambda x, s, t: norms.norm_reference(x, s, t, 1e-5, plus_one=True), r(2, n, 1536), r(2, 1536), r(2, 1536))  # fmt: skip
            check(
                "geglu 1280",
                lambda x: kernels.geglu(x),
                lambda x: gated.gated_reference(*x.chunk(2, -1), "gelu"),
                r(2, n, 2560),
            )
            if not dry:
                done = subprocess.run(
                    [sys.executable, "sample.py", "--prompt", "red apple", "--kernels", "triton", "--seed", "1", "--output-dir", f"{out}/smoke"],
                    cwd=ROOT, capture_output=True, text=True, timeout=100,
                )  # fmt: skip
                emit(out, "smoke", "sample.py --kernels triton", rc=done.returncode, said=done.stderr.strip()[-300:])

    return part


def denoise(sd, settings, dry):
    """call(): one guided step of the pipeline on noise, as generate() makes it."""
    import torch

    from nanodiff.pipeline.conditions import Extra

    side = 8 if dry else settings["side"]
    with torch.no_grad():
        guided = settings["guidance"] > 1
        text, negative = sd.conditions(["a corgi on a beach"], None, guided=guided)
        px = side * sd.downscale
        model = sd.denoiser(text, negative, settings["guidance"], extra=Extra(sd.size_ids(1, px, px, None)))
    x = torch.randn(1, sd.net.cfg.in_channels, side, side, device=sd.device)

    @torch.no_grad()
    def call():
        return model(x, 500.0)

    return call, side


def family(name):
    def part(out, device, dry):
        """Steps and pictures of one model: eager and replayed, by our kernels and by PyTorch's."""
        import torch

        sys.path.insert(0, str(ROOT))
        import kernels

        settings, calls = MODELS[name], 2 if dry else 20
        dtype = torch.float32 if dry else torch.bfloat16
        ours = "torch" if dry else "triton"
        sd = make(name, dtype, device, dry)
        exact = None
        for mode, replays in ((ours, "auto"), (ours, False), ("torch", False), ("torch", "auto")):
            with kernels.backend(mode):
                sd.replays = replays
                sd.recorded.clear()
                peak()
                call, side = denoise(sd, settings, dry)
                took = per_call(call, calls)
                label = f"{'graph' if replays else 'eager'}, {'our kernels' if mode == 'triton' else 'PyTorch'}"
                emit(out, name, label, ms_step=took, it_s=1e3 / took, peak_gb=peak())
            if mode == ours and replays:
                px, steps = side * sd.downscale, 2 if dry else settings["steps"]
                with kernels.backend(mode):

                    def picture(px=px, steps=steps):
                        return sd.generate(["a corgi on a beach"], steps=steps, guidance_scale=settings["guidance"], seeds=[0],
                                           height=px, width=px)  # fmt: skip

                    took = per_call(picture, 1, warm=1 if steps > 4 else 4)
                    replayed = next(iter(sd.recorded.values()), None)
                    emit(out, name, f"picture of {px} px, {steps} steps", seconds=took / 1e3, peak_gb=peak(),
                         graph_gb=(replayed.memory() if replayed and not dry else 0) / 1e9,
                         finite=bool(torch.isfinite(picture().latents).all()))  # fmt: skip
        with torch.no_grad():
            exact = None
            kinds = [(torch.float32, "torch"), (torch.bfloat16, ours), (torch.bfloat16, "torch")]
            kinds += [(torch.float16, ours), (torch.float16, "torch")] if name == "sd15" else []
            for kind, mode in kinds[:1] if dry else kinds:
                net = make(name, kind, device, dry).net
                with kernels.backend(mode):
                    got = net(*inputs(net, 2, side, kind, device)).float()
                exact = got if exact is None else exact
                emit(out, name, f"error of one call, {str(kind)[6:]}, {mode}", rms=rms(got, exact))

    return part


def profile(out, device, dry):
    """Where a replayed step's time goes, by kernel."""
    import torch
    from torch.profiler import ProfilerActivity
    from torch.profiler import profile as profiler

    for name in ("sd15", "sdxl", "sd35-medium"):
        sd = make(name, torch.float32 if dry else torch.bfloat16, device, dry)
        sd.replays = "auto"
        call, _ = denoise(sd, MODELS[name], dry)
        if not dry:
            emit(out, "profile", f"{name}, step", ms=per_call(call, 20))
            # what would be gained by it; its choices are a stopwatch's, so it stays off
            torch.backends.cudnn.benchmark = True
            sd.recorded.clear()
            emit(out, "profile", f"{name}, step with cudnn.benchmark", ms=per_call(call, 20))
            torch.backends.cudnn.benchmark = False
            sd.recorded.clear()
            call, _ = denoise(sd, MODELS[name], dry)
        for _ in range(3):
            call()
        synchronize()
        with profiler(activities=[ProfilerActivity.CUDA if not dry else ProfilerActivity.CPU]) as found:
            for _ in range(3):
                call()
            synchronize()
        key = "self_device_time_total" if not dry else "self_cpu_time_total"
        events = sorted(found.key_averages(), key=lambda e: -getattr(e, key))
        total, launches = sum(getattr(e, key) for e in events) / 3, sum(e.count for e in events) / 3
        emit(out, "profile", name, ms_step=total / 1e3, launches=launches)
        for e in events[:25]:
            emit(out, "profile", f"{name}: {e.key[:90]}", us_step=getattr(e, key) / 3, calls=e.count / 3)


def vae(out, device, dry):
    import torch

    sys.path.insert(0, str(ROOT))
    import kernels

    for name, sides in (("sd15", (64, 128)), ("sdxl", (128,))):
        sd = make(name, torch.float32 if dry else torch.bfloat16, device, dry)
        for side in (8,) if dry else sides:
            z = torch.randn(1, sd.vae.cfg.latent_channels, side, side, device=device).to(sd.dtype)
            for mode in ("torch",) if dry else ("triton", "torch"):
                with kernels.backend(mode), torch.no_grad():
                    peak()
                    took = per_call(lambda z=z, vae=sd.vae: vae.decode(z), 5)
                    emit(out, "vae", f"{name} decode {side * sd.downscale} px, {mode}", ms=took, peak_gb=peak())


def warm_one(name):
    def part(out, device, dry):
        import torch

        sys.path.insert(0, str(ROOT))
        import kernels

        if name == "vae":
            for which, sides in (("sd15", (64, 128)), ("sdxl", (128,))):
                sd = make(which, torch.float32 if dry else torch.bfloat16, device, dry)
                for side in (8,) if dry else sides:
                    z = torch.randn(1, sd.vae.cfg.latent_channels, side, side, device=device).to(sd.dtype)
                    with torch.no_grad(), kernels.backend("torch" if dry else "triton"):
                        got = sd.vae.decode(z)
                    if side == 64:
                        with torch.no_grad(), kernels.backend("torch"):
                            exact = make(which, torch.float32, device, dry).vae.decode(z.float())
                        emit(out, "smoke", "VAE decode, bf16", error=rms(got, exact))
            return
        if name == "train":
            _training(device, dry)[0]()
            return
        model, _, kind = name.partition(":")
        kind = torch.float32 if dry else getattr(torch, kind or "bfloat16")
        sd = make(model, kind, device, dry)
        call, side = denoise(sd, MODELS[model], dry)
        call()
        with torch.no_grad():
            sd.net(*inputs(sd.net, 2, side, kind, device))

    return part


def _training(device, dry, batch=16):
    """(step(), pictures of a step) of SD 1.5's whole UNet at 512 px: fp32 weights under autocast to bf16, fused AdamW."""
    import torch

    net = make("sd15", torch.float32, device, dry).net.train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=not dry)
    side, batch = (8, 2) if dry else (64, batch)
    x, text = (
        torch.randn(batch, 4, side, side, device=device),
        torch.randn(batch, 77, net.cfg.cross_attention_dim, device=device),
    )
    t = torch.randint(0, 1000, (batch,), device=device)
    if not dry:
        x = x.to(memory_format=torch.channels_last)

    def step():
        with torch.autocast(x.device.type, torch.bfloat16):
            loss = (net(x, t, text).float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, batch


def train(out, device, dry):
    import torch  # noqa: F401

    sys.path.insert(0, str(ROOT))
    import kernels

    for mode in ("torch",) if dry else ("triton", "torch"):
        with kernels.backend(mode):
            peak()
            step, batch = _training(device, dry)
            took = per_call(step, 1 if dry else 3, warm=2)
            emit(out, "peer-train", f"ours, {mode}", ms_step=took, images_s=batch * 1e3 / took, peak_gb=peak())


def small(out, device, dry):
    """Weights in 8 and 4 bits, and weights that come and go: seconds a step, memory."""
    import torch

    sys.path.insert(0, str(ROOT))
    import tempfile

    from nanodiff import pipeline

    folder = GOLDEN / "tiny" / "sd15"
    with tempfile.TemporaryDirectory() as place:
        if not dry:
            folder = Path(place) / "sd15"
            make("sd15", torch.bfloat16, "cpu").save(folder)
        for label, options in (("whole", {}), ("--quantize int8", {"quantized": "int8"}), ("--quantize nf4", {"quantized": "nf4"}),
                               ("--offload model", {"offload": "model"}), ("--offload sequential", {"offload": "sequential"})):  # fmt: skip
            peak()
            sd = pipeline.load(folder, torch.float32 if dry else torch.bfloat16, device, **options)
            px = 64 if dry else 512

            def picture(steps, sd=sd, px=px):
                synchronize()
                start = time.perf_counter()
                sd.generate(["a corgi"], steps=steps, seeds=[0], height=px, width=px)
                synchronize()
                return time.perf_counter() - start

            picture(2)
            few, many = picture(2), picture(2 if dry else 10)
            emit(out, "small", label, ms_step=(many - few) / 8 * 1e3, picture_2_steps_s=few, peak_gb=peak())
            del sd, picture  # which holds it, too


def tune(out, device, dry):
    """Tiles of the kernels, measured; table.json to the folder."""
    if dry:
        return
    sys.path.insert(0, str(ROOT))
    from kernels import tune as tuning

    for row in tuning.day(Path(out) / "table.json"):
        emit(out, "tune", row.pop("case"), **row)
    shutil.copy(Path(out) / "table.json", tuning.switch.TABLE)  # what is measured from here on


def bench(out, device, dry):
    """Our kernels beside PyTorch's; a row each."""
    if dry:
        return
    sys.path.insert(0, str(ROOT))
    from kernels import bench as measuring

    for row in measuring.day():
        emit(out, "kernels", row.pop("case"), **row)


def peer(name, how="eager"):
    def part(out, device, dry):
        """Ours and diffusers', one after the other in fresh processes."""
        python = os.environ.get("GPU_DAY_PEER")
        if not python:
            emit(out, f"peer-{name}", "skipped", reason="no --peer")
            return
        from gpu_peer import PROGRAM

        train(out, device, dry) if name == "train" else _ours(out, name, device, dry)
        argv = [python, "-c", PROGRAM, name, "dry" if dry else "gpu", how]
        done = subprocess.run(argv, capture_output=True, text=True, cwd=ROOT)
        for text in done.stdout.splitlines():
            if text.startswith("ROW"):
                row = json.loads(text[3:])
                emit(out, f"peer-{name}", row.pop("case"), **row)
        if done.returncode:
            emit(out, f"peer-{name}", "diffusers failed", said=done.stderr.strip()[-400:])

    return part


def _ours(out, name, device, dry):
    import torch

    settings = MODELS[name]
    sd = make(name, torch.float32 if dry else torch.bfloat16, device, dry)
    sd.replays = "auto"
    call, side = denoise(sd, settings, dry)
    took = per_call(call, 2 if dry else 20)
    px, steps = side * sd.downscale, 2 if dry else settings["steps"]
    picture = per_call(
        lambda: sd.generate(["a corgi on a beach"], steps=steps, guidance_scale=settings["guidance"], seeds=[0], height=px, width=px), 1,
        warm=1 if steps > 4 else 4,  # a recording begins at the third call
    )  # fmt: skip
    emit(out, f"peer-{name}", "ours", ms_step=took, picture_s=picture / 1e3, peak_gb=peak())
    emit(out, f"peer-{name}", "ours, one call against fp32", **error(sd, name, side, device, dry))


def error(sd, name, side, device, dry):
    """{"error": of one call in bf16 against PyTorch's operators in fp32, "error_torch": theirs in bf16}"""
    import torch

    import kernels

    with torch.no_grad():
        got = sd.net(*inputs(sd.net, 2, side, sd.dtype, device)).float()
        with kernels.backend("torch"):
            theirs = sd.net(*inputs(sd.net, 2, side, sd.dtype, device)).float()
            exact = make(name, torch.float32, device, dry).net
            exact = exact(*inputs(exact, 2, side, torch.float32, device))
    return {"error": rms(got, exact), "error_torch": rms(theirs, exact)}


def tests(out, device, dry):
    """tests/kernels/test_gpu.py in as many processes as there are cores."""
    argv = [sys.executable, "-m", "pytest", "tests/kernels/test_gpu.py", "-q", "--no-header", "-p", "no:cacheprovider",
            f"--junitxml={out}/tests.xml", "-m", "gpu", "--durations=5"]  # fmt: skip
    # of fp32, heads that are held whole: the others take minutes to compile
    argv += ["-k", "not (fp32 and (96 or 128 or 160 or 256))"]
    argv += ["--collect-only"] if dry else ["-n", str(min(14, os.cpu_count()))]
    done = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True)
    (Path(out) / "tests.log").write_text(done.stdout[-200000:] + done.stderr[-20000:])
    lines = [text for text in done.stdout.splitlines() if text.startswith(("FAILED", "ERROR"))]
    emit(out, "tests", "test_gpu.py", rc=done.returncode, summary=(done.stdout.strip().splitlines() or ["–"])[-1])
    for text in lines[:20]:
        emit(out, "tests", "failed", what=text[:300])
    sys.exit(done.returncode)


RUN = {"facts": facts, "smoke": smoke, "profile": profile, "vae": vae, "tune": tune, "kernels": bench,
       "small": small, "tests": tests, "compiled-sd15": peer("sd15", "compiled"), **{f"peer-{n}": peer(n) for n in (*MODELS, "train")}, **{f"smoke-{n}": smoke_one(n) for n in SMOKE},
       **{name: family(name) for name in MODELS}, **{f"warm-{n}": warm_one(n) for n in WARM}}  # fmt: skip


def forecast():
    """What the parts would take on a GPU: seconds as they were on an H200, else their limit."""
    sys.path.insert(0, str(ROOT))
    from kernels import tune as tuning

    tiles = sum(len(tuning.tried(kind, shape[3])) for kind, *shape in tuning.SHAPES)
    tiles += len(tuning.PICTURES) * len(tuning.GROUPS)
    tiles += sum(len(shapes) * len(found) for keys, found in tuning.MOVERS.values() for shapes in keys.values())
    seconds = {part: took or limit for part, (limit, took) in PARTS.items()}
    print(
        f"\non a GPU: tune compiles and times {tiles} tiles; " + ", ".join(f"{p} {s:.0f} s" for p, s in seconds.items())
    )
    calls, left = 1, 330
    for took in seconds.values():
        calls, left = (calls, left - took) if took <= left else (calls + 1, 330 - took)
    print(f"{sum(seconds.values()):.0f} s together: {calls} calls of 330 s with --resume, most important first")


# The day ----------------------------------------------------------------------------------------------------


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", required=True, help="folder for day.jsonl, day.md and what the parts write")
    parser.add_argument("--resume", help="folder of an earlier call")
    parser.add_argument("--budget", type=float, default=330, help="seconds after which no further part begins")
    parser.add_argument("--only", nargs="+", choices=PARTS, help="these parts alone, in this order")
    parser.add_argument("--peer", help="python of an environment with diffusers")
    parser.add_argument("--dry", action="store_true", help="without a GPU, on small models")
    parser.add_argument("--part", choices=RUN, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    out = Path(args.out).resolve()
    if args.part:
        RUN[args.part](out, "cpu" if args.dry else "cuda", args.dry)
        return 0
    began = time.time()
    import torch

    if not args.dry and not torch.cuda.is_available():
        print("error: no CUDA device; --dry runs the same parts on small models", file=sys.stderr)
        return 2
    if args.resume and not (Path(args.resume) / "day.jsonl").exists():
        print(f"error: --resume {args.resume}: there is no day.jsonl", file=sys.stderr)
        return 2
    out.mkdir(parents=True, exist_ok=True)
    cache = Path(os.environ.setdefault("TRITON_CACHE_DIR", "/tmp/nanodiff-triton"))
    if args.peer:
        os.environ["GPU_DAY_PEER"] = args.peer
    done = {}
    if args.resume:
        done = {row["part"] for row in rows(args.resume) if row["case"] == "done"}
        with contextlib.suppress(FileNotFoundError), tarfile.open(Path(args.resume) / "cache.tar.gz") as tar:
            tar.extractall(cache, filter="data")
    failed = []
    for part in args.only or [part for part in PARTS if part not in done]:
        limit, left = PARTS[part][0], (1e6 if args.dry else args.budget) - (time.time() - began)
        if left < 10:
            emit(out, part, "left out", reason="no time left")
            continue
        start = time.time()
        job = [sys.executable, __file__, "--part", part, "--out", str(out), *(["--dry"] if args.dry else [])]
        process = subprocess.Popen(job, cwd=ROOT, start_new_session=True)
        try:
            rc = process.wait(min(limit, left))
        except subprocess.TimeoutExpired:
            rc = "out of time"
            os.killpg(process.pid, signal.SIGKILL)  # with what it has started
            process.wait()
        emit(out, part, "done" if rc == 0 else "FAILED", rc=rc, seconds=time.time() - start)
        if rc:
            failed.append(part)
            if part == "smoke":
                break
    if cache.exists() and not args.dry:
        with tarfile.open(out / "cache.tar.gz", "w:gz", compresslevel=3) as tar:
            tar.add(
                cache,
                ".",
                filter=lambda i: None if i.name.endswith((".ttir", ".ttgir", ".llir", ".ptx", ".source")) else i,
            )
    shutil.rmtree(out / "smoke", ignore_errors=True)
    table = ["| part | case | figures |", "|---|---|---|", *(line(row) for row in rows(out))]
    (out / "day.md").write_text("\n".join(table) + "\n")
    print(f"\n{time.time() - began:.0f} s\n" + "\n".join(table))
    if args.dry:
        forecast()
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
