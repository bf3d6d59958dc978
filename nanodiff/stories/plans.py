"""train.py --dry-run: parameters, memory, FLOPs and time, from configurations alone."""

import torch

from nanodiff import data, lora, pipeline, weights
from nanodiff.models import controlnet
from nanodiff.models.clip import CLIPTextModel
from nanodiff.pipeline import sources
from nanodiff.stories.diffusion import text_config
from nanodiff.stories.vae import latent_shape
from nanodiff.training import build, plan


def say_plan(cfg, estimate, n):
    """Print a dry run's lines."""
    samples = cfg.batch_size * cfg.grad_accum * cfg.world_size
    updates = cfg.max_steps or cfg.epochs * max(1, -(-n // samples))
    lines = plan.table(estimate, world=cfg.world_size, parallel=cfg.parallel, samples=samples, updates=updates,
                       micro=cfg.grad_accum, gpu=cfg.gpu, mfu=cfg.mfu)  # fmt: skip
    print("\n".join(lines))


def planned_dtype(cfg):
    return {"bf16": torch.bfloat16, "auto": torch.bfloat16, "fp16": torch.float16}.get(cfg.mixed_precision)


def plan_vae(cfg, net):
    pixels = torch.empty(cfg.batch_size, 3, cfg.resolution, cfg.resolution, device="meta")
    noise = torch.empty(cfg.batch_size, *latent_shape(cfg, net), device="meta")
    loss = lambda: net(pixels, noise)[0].float().pow(2).mean()  # noqa: E731
    say_plan(cfg, plan.estimate({"vae": net}, loss, dtype=planned_dtype(cfg), world=cfg.world_size, parallel=cfg.parallel,
                                ema=cfg.ema, recompute=cfg.gradient_checkpointing, optimizer=cfg.optimizer), counted(cfg))  # fmt: skip


def counted(cfg):
    """Pictures in --data, when it is given; else what makes an epoch one update."""
    return len(data.load(cfg.data, captions=False)) if cfg.data else 1


def plan_diffusion(cfg):
    """Everything on the meta device: no weights are read, none are made."""
    rows, dtype = cfg.batch_size, planned_dtype(cfg)
    name = cfg.model or build.KNOWN.get(cfg.model_size)
    frozen, along, length = {}, {}, cfg.max_length
    if name:
        src = sources.configs(name)
        family = pipeline.FAMILIES[src.kind]
        meta = {n: weights.skeleton(src.builder(n), src.config(n)) for n in pipeline.BUILDERS if n in src.parts}
        net = meta.pop(family.denoiser_name)
        frozen, length = meta, family.family.text_length
        scale = meta["vae"].cfg.downscale if "vae" in meta else 1
    else:
        text = text_config(cfg)
        text.vocab_size, vae = cfg.vocab_size, None
        with torch.device("meta"):
            if cfg.vae:
                vae = sources.load_vae(cfg.vae, torch.float32, "cpu")
            net = build.make_denoiser(cfg.model_size, cfg.resolution, text, vae, cfg.model_config)
            if cfg.condition == "text" and not cfg.text_encoder:
                along["text_encoder"] = CLIPTextModel(text)
        scale = vae.cfg.downscale if vae else 1
        frozen = {"vae": vae} if vae else {}
    net.requires_grad_(True)
    if cfg.lora:
        with torch.device("meta"):
            lora.adapt(net, **build.lora_settings(cfg))
    x, t, given = build.outline(net, rows, cfg.resolution // scale, length)
    trained, call = {"denoiser": net}, net
    if cfg.conditioning:
        steering = controlnet.copy_of(net, scale).requires_grad_(True)
        picture = torch.empty(rows, 3, cfg.resolution, cfg.resolution, device="meta")
        trained, call = {"controlnet": steering}, controlnet.steered(steering, net.requires_grad_(False), picture)
        frozen["denoiser"] = net
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")

    def loss():
        condition = given
        if encoder := along.get("text_encoder"):
            states, pooled = encoder(ids)
            condition = (encoder.final_norm(states[-1]), pooled)[: len(given)]
        return call(x, t, *condition).float().pow(2).mean()

    estimate = plan.estimate(trained | along, loss, frozen, 4, dtype, cfg.world_size, cfg.parallel, cfg.ema,
                             cfg.gradient_checkpointing, cfg.optimizer)  # fmt: skip
    say_plan(cfg, estimate, counted(cfg))
