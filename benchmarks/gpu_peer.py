"""What benchmarks/gpu_day.py measures, by diffusers: run by a Python that has it, beside ours in the same call.

    PYTHON -c PROGRAM sd15|sdxl|sd35-medium|sd-turbo|train dry|gpu eager|compiled        (in the repository's root)

Needs what gpu_needs.txt lists. Prints a line "ROW{…}" for each figure. Weights and inputs are
those of gpu_day.py, made from the same names.
"""

# The peer's side, run by another interpreter: this project itself never imports these packages.
PROGRAM = r"""
import json
import sys
import time

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    FlowMatchEulerDiscreteScheduler,
    SD3Transformer2DModel,
    StableDiffusion3Pipeline,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)

sys.path.insert(0, "benchmarks")
from gpu_day import GOLDEN, MODELS, fill, inputs, peak, per_call, rms, synchronize

name, where, how = sys.argv[1:4]
dry = where == "dry"
device, half = ("cpu", torch.float32) if dry else ("cuda", torch.bfloat16)


def row(case, **figures):
    print("ROW" + json.dumps({"case": f"diffusers {case}", **figures}), flush=True)


def module(cls, part, dtype=half, model=name):
    manifest = json.loads((GOLDEN / "manifests" / f"{model}.{part}.json").read_text())
    config = json.loads((GOLDEN / "tiny" / model / part / "config.json").read_text()) if dry else manifest["config"]
    with torch.device("meta"):
        net = cls.from_config(config)
    return fill(net, device).to(dtype).to(memory_format=torch.channels_last)


def call_of(net, x, t, text, *more):
    # as the pipelines make it
    if name == "sd35-medium":
        t = torch.full((len(x),), t, device=x.device)
        return net(x, encoder_hidden_states=text, pooled_projections=more[0], timestep=t, return_dict=False)[0]
    added = {"text_embeds": more[0][0], "time_ids": more[0][1].to(text.dtype)} if more else None
    return net(
        x, torch.tensor(int(t), device=x.device), encoder_hidden_states=text, added_cond_kwargs=added, return_dict=False
    )[0]


def training():
    net = module(UNet2DConditionModel, "unet", torch.float32, "sd15").train().requires_grad_(True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-5, fused=not dry)
    side, batch = (8, 2) if dry else (64, 16)
    x = torch.randn(batch, 4, side, side, device=device).to(memory_format=torch.channels_last)
    text, t = (
        torch.randn(batch, 77, net.config.cross_attention_dim, device=device),
        torch.randint(0, 1000, (batch,), device=device),
    )

    def step():
        with torch.autocast(device, torch.bfloat16):
            loss = (net(x, t, text, return_dict=False)[0].float() - x).square().mean()
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()

    took = per_call(step, 1 if dry else 3, warm=2)
    row(f"{how}, channels last", ms_step=took, images_s=batch * 1e3 / took, peak_gb=peak())


@torch.no_grad()
def drawing():
    settings = MODELS[name]
    side, steps = (8, 2) if dry else (settings["side"], settings["steps"])
    part = "transformer" if name == "sd35-medium" else "unet"
    cls = SD3Transformer2DModel if part == "transformer" else UNet2DConditionModel
    if how == "eager" and not dry:
        exact = call_of(net := module(cls, part, torch.float32), *inputs(net, 2, side, torch.float32, device)).float()
        del net
        net = module(cls, part)
        row("error of one call, bfloat16", rms=rms(call_of(net, *inputs(net, 2, side, half, device)).float(), exact))
        torch.save(exact.cpu(), f"/tmp/peer-{name}.pt")
    net, vae = module(cls, part), module(AutoencoderKL, "vae")
    one = inputs(net, 2 if settings["guidance"] > 1 else 1, side, half, device)
    first = time.perf_counter()
    if how == "compiled":
        net = torch.compile(net, mode="reduce-overhead", fullgraph=True)
    call_of(net, *one)
    synchronize()
    row(f"{how}, one call of the net", ms=per_call(lambda: call_of(net, *one), 2 if dry else 20), first_s=time.perf_counter() - first,
        peak_gb=peak())  # fmt: skip
    guided = settings["guidance"] > 1
    text, px = one[2], side * 8
    common = {"num_inference_steps": steps, "guidance_scale": settings["guidance"], "height": px, "width": px, "output_type": "pt",
              "prompt_embeds": text[:1], "negative_prompt_embeds": text[-1:] if guided else None}  # fmt: skip
    if name in ("sd15", "sd-turbo"):
        pipe = StableDiffusionPipeline(vae, None, None, net, DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear",
                                       clip_sample=False, steps_offset=1), None, None, requires_safety_checker=False)  # fmt: skip
    elif name == "sdxl":
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False, steps_offset=1
        )
        pipe = StableDiffusionXLPipeline(vae, None, None, None, None, net, scheduler)
        pooled = torch.randn(1, 1280, device=device, dtype=half) if not dry else one[3][0][:1]
        common |= {"pooled_prompt_embeds": pooled, "negative_pooled_prompt_embeds": pooled}
    else:
        pipe = StableDiffusion3Pipeline(
            net, FlowMatchEulerDiscreteScheduler(shift=3.0), vae, None, None, None, None, None, None
        )
        common |= {"pooled_prompt_embeds": one[3][:1], "negative_pooled_prompt_embeds": one[3][-1:]}
    pipe.set_progress_bar_config(disable=True)
    took = per_call(lambda: pipe(**common), 1, warm=1)
    row(f"{how}, picture of {px} px, {steps} steps", seconds=took / 1e3, peak_gb=peak())


if __name__ == "__main__":
    training() if name == "train" else drawing()
"""
