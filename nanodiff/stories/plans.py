"""train.py --dry-run: parameters, memory, FLOPs and time, from configurations alone."""

import torch

from nanodiff import pipeline, weights
from nanodiff.models import controlnet
from nanodiff.models.clip import CLIPTextModel
from nanodiff.pipeline import sources
from nanodiff.stories.diffusion import check_new, check_one_encoder, frozen_text, open_to_training, text_config
from nanodiff.stories.training import load_data
from nanodiff.stories.vae import latent_shape
from nanodiff.training import build, plan
from nanodiff.weights import hub

CLIP_L = "openai/clip-vit-large-patch14"  # is in every SD 1.x: it need not be here to be planned with


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
                                ema=cfg.ema, recompute=cfg.gradient_checkpointing, optimizer=cfg.optimizer), counted(cfg, captions=False))  # fmt: skip


def counted(cfg, captions):
    """Pictures of --data that are trained on, when it is given; else what makes an epoch one update."""
    return len(load_data(cfg, captions)[0]) if cfg.data else 1


def planned_text(cfg):
    """The configuration of --text-encoder, which need not be here."""
    if hub.trained(cfg.text_encoder).exists():
        return sources.text_config(*frozen_text(cfg))[1]
    if cfg.text_encoder == CLIP_L:
        return sources.configs("stable-diffusion-v1-5").config("text_encoder")
    print(
        f"note: --text-encoder {cfg.text_encoder} is not here: planned with one of the size that would be trained along"
    )
    text = text_config(cfg)
    text.vocab_size = cfg.vocab_size
    return text


def plan_diffusion(cfg):
    """Everything on the meta device: no weights are read, none are made."""
    rows, dtype = cfg.batch_size, planned_dtype(cfg)
    name = cfg.model or build.KNOWN.get(cfg.model_size)
    frozen, along, length = {}, {}, cfg.max_length
    if not cfg.model:
        check_new(cfg)
    if name:
        src = sources.configs(name)
        family = pipeline.FAMILIES[src.kind]
        meta = {n: weights.skeleton(src.builder(n), src.config(n)) for n in pipeline.BUILDERS if n in src.parts}
        net = meta.pop(family.denoiser_name)
        if cfg.train_text_encoder:
            check_one_encoder([n for n in meta if n.startswith("text_encoder")])
            along["text_encoder"] = meta.pop("text_encoder")
        frozen, length = meta, family.family.text_length
        if along:
            length = min(length, along["text_encoder"].cfg.max_position_embeddings)
        scale = meta["vae"].cfg.downscale if "vae" in meta else 1
    else:
        vae, encoder = None, cfg.condition == "text" and cfg.text_encoder
        if encoder:
            text = planned_text(cfg)
            length = text.max_position_embeddings
        else:
            text = text_config(cfg)
            text.vocab_size = cfg.vocab_size
        with torch.device("meta"):
            if cfg.vae:
                vae = sources.load_vae(cfg.vae, torch.float32, "cpu")
            net = build.make_denoiser(cfg.model_size, cfg.resolution, text, vae, cfg.model_config)
            if cfg.condition == "text":
                (frozen if encoder else along)["text_encoder"] = CLIPTextModel(text)
        scale = vae.cfg.downscale if vae else 1
        frozen |= {"vae": vae} if vae else {}
    with torch.device("meta"):
        open_to_training(cfg, {"denoiser": net, **along})
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
    say_plan(cfg, estimate, counted(cfg, cfg.condition == "text"))
