"""What is trained: new models from a few settings (VAE, denoiser, text encoder, noise schedule) and how their weights begin; the loss of a denoiser.

Sizes are Hub configurations, so what is built here is written, and read again, as any other model.
"""

import dataclasses

import torch
from torch import nn

from nanodiff import lora, pipeline
from nanodiff.config import UserError, printable, read_json
from nanodiff.data import edges
from nanodiff.device import memory
from nanodiff.diffusion import objective
from nanodiff.diffusion.schedule import Schedule
from nanodiff.models import controlnet, mmdit, unet
from nanodiff.models.clip import Config as TextConfig
from nanodiff.models.flatvae import FlatVAE
from nanodiff.models.layers import ResnetBlock
from nanodiff.models.vae import AutoencoderKL
from nanodiff.output import images
from nanodiff.pipeline import sources
from nanodiff.training.options import Adapters, Noise


def _unet(widths, layers, heads, groups, context, **more):
    """A UNet with cross-attention everywhere but at the top."""
    n = len(widths) - 1
    return {"block_out_channels": widths, "layers_per_block": layers, "num_heads": heads, "norm_num_groups": groups,
            "cross_attention_dim": context, "use_linear_projection": True,
            "down_block_types": ("DownBlock2D",) + ("CrossAttnDownBlock2D",) * n,
            "up_block_types": ("CrossAttnUpBlock2D",) * n + ("UpBlock2D",), **more}  # fmt: skip


def _text(width, layers, heads):
    return {
        "hidden_size": width,
        "intermediate_size": 4 * width,
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
    }


SIZES = {  # (denoiser, text encoder) configurations of --model-size
    "tiny": (_unet((16, 32), 1, 2, 8, 32), _text(32, 1, 2) | {"intermediate_size": 64}),
    "nano": (_unet((64, 96, 128), 1, (1, 2, 2), 16, 128), _text(128, 3, 2)),
    # assets/world's: a small MMDiT, whose captions have some seventy words
    "world": ({"num_layers": 4, "num_attention_heads": 5, "attention_head_dim": 32, "patch_size": 2, "qk_norm": "rms_norm"}, _text(128, 1, 2)),
    # S1's pixel UNet: eight levels, 59.5 M parameters, with CLIP ViT-L/14's text
    "pokemon": (_unet((32, 32, 64, 64, 128, 128, 256, 256), 3, 8, 32, 768, use_linear_projection=False,
                      down_block_types=("CrossAttnDownBlock2D",) * 7 + ("DownBlock2D",),
                      up_block_types=("UpBlock2D",) + ("CrossAttnUpBlock2D",) * 7), _text(768, 4, 12)),
    "flat": (_unet((256, 384), 2, 8, 32, 128), _text(128, 2, 2)),
    "mmdit-tiny": ({"num_layers": 2, "num_attention_heads": 2, "attention_head_dim": 16, "patch_size": 2}, _text(32, 1, 2)),
    "mmdit-100m": ({"num_layers": 8, "num_attention_heads": 9, "attention_head_dim": 64, "patch_size": 2, "qk_norm": "rms_norm"},
                   _text(512, 6, 8)),
}  # fmt: skip

KNOWN = {
    "sd15": "stable-diffusion-v1-5",
    "sdxl": "stable-diffusion-xl-base-1.0",
    "sd35-medium": "stable-diffusion-3.5-medium",
}

NANO_VAE = {"block_out_channels": (32, 48, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 16,
            "sample_size": 64, "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3, "force_upcast": False}  # fmt: skip


def vae_skeleton(raw, side):
    """The VAE of a config.json's fields on the meta device, for square pictures of `side` pixels, which it must be able to take."""
    cls = FlatVAE if "latent_dim" in raw else AutoencoderKL
    with torch.device("meta"):
        net = cls(cls.Config.from_json(raw))
    only = getattr(net.cfg, "fixed_size", side)
    if side != only:
        raise UserError(f"`resolution` {side}: this VAE is for {only}")
    if side % net.cfg.downscale:
        raise UserError(f"`resolution` {side} must be a multiple of the VAE's {net.cfg.downscale}")
    return net


def denoiser_config(size, file=None):
    """("unet" or "mmdit", fields): of a built-in size, what does not depend on data, VAE and text; of a config.json, all."""
    raw = read_json(file) if file else SIZES.get(size, ({},))[0]
    kind = "mmdit" if raw.get("_class_name") == "SD3Transformer2DModel" or "patch_size" in raw else "unet"
    return kind, raw


def text_config(size, length, file=None, tokenizer=None, projected=False, mask=False):
    """The configuration of a CLIP text encoder that is trained along: of a built-in size, or of a config.json `file`.

    length: tokens of a text; tokenizer: whose words it reads; projected: with the pooled vector that an MMDiT wants; mask: does it hide
    the padding? Raises UserError for a file with fewer positions than `length`.
    """
    words = {} if tokenizer is None else {
        "vocab_size": len(tokenizer.backend.get_vocab()), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }  # fmt: skip
    if file:  # the words are those of the tokenizer, which is learned from these captions
        text = TextConfig.from_json(read_json(file), file)
        if length > text.max_position_embeddings:
            raise UserError(f"`text_config`: {text.max_position_embeddings} positions for `max_length` {length}")
        return dataclasses.replace(
            text, **words, with_projection=projected, use_attention_mask=text.use_attention_mask or mask
        )
    raw = SIZES.get(size, SIZES["nano"])[1]
    return TextConfig(**raw, **words, max_position_embeddings=length, hidden_act="gelu", projection_dim=raw["hidden_size"],
                      with_projection=projected, use_attention_mask=mask)  # fmt: skip


def make_denoiser(size, side, text, vae=None, file=None):
    """A freshly built UNet or MMDiT whose ends fit the VAE's latents (or pixels) and the text.

    size: of SIZES or KNOWN; file: a config.json in its place; side: of the pictures; text: the text encoder's configuration. Raises
    UserError for a file that does not fit.
    """
    if size in KNOWN and not file:
        known = sources.configs(KNOWN[size])
        part = "unet" if "unet" in known.parts else "transformer"
        return known.builder(part)(known.config(part))
    channels, scale = (vae.cfg.latent_channels, vae.cfg.downscale) if vae else (3, 1)
    ends = {"in_channels": channels, "out_channels": channels, "sample_size": side // scale}
    kind, raw = denoiser_config(size, file)
    if kind == "mmdit":
        if not file:
            raw = raw | ends | {
                "joint_attention_dim": text.hidden_size, "pooled_projection_dim": text.projection_dim,
                "caption_projection_dim": raw["num_attention_heads"] * raw["attention_head_dim"],
                "pos_embed_max_size": max(2 * (side // scale) // raw["patch_size"], 1),
            }  # fmt: skip
        config, build = mmdit.Config.from_json(raw), mmdit.SD3Transformer2DModel
        wanted = config.joint_attention_dim
    else:
        own = raw | ends | {"cross_attention_dim": text.hidden_size}
        config = unet.Config.from_json(raw) if file else unet.Config(**own)
        build, wanted = unet.UNet2DConditionModel, config.cross_attention_dim
    if config.in_channels != channels:
        raise UserError(f"`model_config`: in_channels {config.in_channels}, but the pictures have {channels} channels")
    if wanted != text.hidden_size:
        raise UserError(f"`model_config`: wants text of width {wanted}, the text encoder gives {text.hidden_size}")
    return build(config)


def make_schedule(prediction, betas="scaled_linear", timesteps=1000, zero_snr=True, shift=1.0, pixels=False):
    """The noise schedule of a new model. prediction: what its network predicts; "flow" alone has a shift, the others betas. zero_snr: at the last
    timestep nothing of the picture is left (Lin et al. 2024, arXiv 2305.08891; not for epsilon). pixels: no VAE, so samples are clipped to [-1, 1]."""
    if prediction == "flow":
        return Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": shift, "num_train_timesteps": timesteps})  # fmt: skip
    kind = {"cosine": "squaredcos_cap_v2"}.get(betas, betas)
    first, last = (1e-4, 0.02) if kind == "linear" else (0.00085, 0.012)
    return Schedule.from_config(
        {"_class_name": "DDIMScheduler", "beta_start": first, "beta_end": last, "beta_schedule": kind,
         "prediction_type": prediction, "clip_sample": pixels, "set_alpha_to_one": True,
         "timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_snr and prediction != "epsilon",
         "num_train_timesteps": timesteps}
    )  # fmt: skip


def conditions(kind, dataset):
    """The texts that may be a picture's condition: its captions ("text"), its label ("labels"), or nothing ("none")."""
    if kind == "text":
        return dataset.texts
    if kind == "none":
        return [("",)] * len(dataset)
    if missing := [k for k, label in zip(dataset.keys, dataset.labels, strict=True) if not label]:
        raise UserError(
            f"`condition` labels: {len(missing)} pictures have no label (a folder or .cls), such as {missing[0]}"
        )
    return [(label,) for label in dataset.labels]


def init(net, text):
    """PyTorch's defaults, but residual branches and the output begin at zero (Ho et al. 2020's code; Goyal et al.
    2017 §5.1; adaLN-Zero in an MMDiT), and text embeddings have standard deviation 0.02 as in CLIP."""
    last = {ResnetBlock: "conv2", unet.Transformer2D: "proj_out", mmdit.AdaLN: "linear"}
    ends = [getattr(m, last[type(m)]) for m in net.modules() if type(m) in last]
    for layer in [*ends, net.conv_out if hasattr(net, "conv_out") else net.proj_out]:
        nn.init.zeros_(layer.weight)
        nn.init.zeros_(layer.bias)
    for table in (m for m in text.modules() if isinstance(m, nn.Embedding)) if text is not None else ():
        nn.init.normal_(table.weight, std=0.02)


def lora_settings(adapters: Adapters):
    """What lora.adapt() takes. Raises UserError for a pattern that cannot be read."""
    given = [adapters.lora_targets] if isinstance(adapters.lora_targets, str) else adapters.lora_targets
    patterns = {}
    for name in ("rank", "alpha"):
        patterns[name] = {}
        for part in filter(None, map(str.strip, getattr(adapters, f"lora_{name}_pattern").split(","))):
            target, equals, value = part.rpartition("=")
            try:
                patterns[name][target.strip()] = float(value)
            except ValueError:
                equals = ""
            if not equals or not target.strip():
                raise UserError(f"`lora_{name}_pattern` {printable(part)}: expected TARGET=NUMBER")
    return {
        "rank": adapters.lora_rank, "alpha": adapters.lora_alpha, "dropout": adapters.lora_dropout, "rslora": adapters.lora_rslora,
        "targets": tuple(t.strip() for group in given for t in group.split(",") if t.strip()) or lora.ATTENTION,
        "rank_pattern": patterns["rank"], "alpha_pattern": patterns["alpha"],
    }  # fmt: skip


def student(model):
    """(pipeline, {name: module to train}): all of a model's denoiser."""
    memory.keep_freed_memory()
    sd = pipeline.load(model, torch.float32, "cpu")
    sd.check_trainable()
    sd.net.requires_grad_(True)
    return sd, {sd.denoiser_name: sd.net}


def outline(net, rows, side, length):
    """(x, t, (states, pooled)) on the meta device: what a denoiser is called with in training. side: of the latents; length: text tokens."""
    c, empty = net.cfg, lambda *shape: torch.empty(shape, device="meta")
    x, t = empty(rows, c.in_channels, side, side), empty(rows)
    if hasattr(c, "joint_attention_dim"):
        return x, t, (empty(rows, length, c.joint_attention_dim), empty(rows, c.pooled_projection_dim))
    given = (empty(rows, length, c.cross_attention_dim),)
    if c.addition_embed_type:
        wide = c.projection_class_embeddings_input_dim - 6 * c.addition_time_embed_dim
        given += ((empty(rows, wide), empty(rows, 6)),)
    return x, t, given


# -- the loss ------------------------------------------------------------------------------------------------

FOR_FLOWS = ("timestep_sampling", "timestep_mean", "timestep_std", "timestep_shift")
FOR_SAMPLE = ("snr_weighting", "snr_clip")
OFF = {"timestep_sampling": "uniform", "timestep_mean": 0.0, "timestep_std": 1.0, "timestep_shift": 1.0, "snr_weighting": False,
       "snr_clip": None}  # what asks for nothing  # fmt: skip


def check_noise(noise: Noise, schedule, given=()):
    """Raise UserError for an unknown loss, and for a setting among the names `given` that does nothing to a model of this schedule."""
    objective.check_loss(noise.loss)
    if noise.snr_clip and not noise.snr_weighting:
        raise UserError("`snr_clip` is for `snr_weighting`; the clipped weighting of every prediction is `min_snr`")
    if noise.min_snr and noise.snr_weighting and {"min_snr", "snr_weighting"} <= set(given):
        raise UserError("`min_snr` and `snr_weighting` are two weightings of one loss; give one of them")
    for name in ("timestep_mean", "timestep_std"):
        if name in given and getattr(noise, name) != OFF[name] and noise.timestep_sampling != "logit_normal":
            raise UserError(f"`{name}` is for `timestep_sampling` logit_normal")
    flow, sample = schedule.flow, schedule.prediction == "sample"
    for names, fits, what in ((FOR_FLOWS, flow, "flows"), (FOR_SAMPLE, sample, "`prediction_type` sample")):
        for name in names:
            if name in given and getattr(noise, name) != OFF[name] and not fits:
                raise UserError(f"`{name}` is for {what}; this model predicts {schedule.prediction}")


def shown(conditioning, pixels):
    """What a ControlNet is shown of pictures [B, 3, H, W] in [-1, 1]: [B, 3, H, W] in [0, 1]."""
    if conditioning == "canny":
        drawn = [torch.from_numpy(edges.canny(picture)) for picture in images.to_uint8(pixels).numpy()]
        return torch.stack(drawn)[:, None].expand(-1, 3, -1, -1).float() / 255
    raise ValueError(f"unknown conditioning {conditioning!r}")


def reseed(dropout, seed, batch):
    """Before a micro-batch of adapters with dropout: torch's own generator, so that a resumed run draws what the other did."""
    if dropout:
        torch.manual_seed(objective.generator(seed, "adapter", next(iter(batch.indices), 0)).initial_seed())


def losses(noise: Noise, sd, calls, device, dropout=0.0, conditioning=None):
    """f(batch, x0_of, text_of, seed) -> (weighted, unweighted) loss of a micro-batch; everything random is drawn by (seed, global sample
    index).

    noise: how times and noise are drawn, and how the loss weighs; calls: {component: what to call in its place}; x0_of, text_of:
    latents.Latents and Texts; dropout: of the adapters; conditioning: what a ControlNet is shown, see shown().
    """
    objective.check_loss(noise.loss)
    gamma = noise.min_snr
    if gamma is None and noise.snr_weighting and sd.schedule.prediction == "sample":
        gamma = noise.snr_clip or float("inf")
    shift = noise.timestep_shift or (sd.schedule.cfg["shift"] if sd.schedule.flow else 1.0)

    def of(batch, x0_of, text_of, seed):
        reseed(dropout, seed, batch)
        x0 = x0_of(batch)
        eps = objective.draw(seed, "noise", batch.indices, lambda g: torch.randn(x0.shape[1:], generator=g)).to(x0)
        eps = objective.offset(eps, noise.offset_noise, seed, batch.indices)
        t = objective.timesteps(sd.schedule, seed, batch.indices, noise.timestep_sampling, noise.timestep_mean,
                                noise.timestep_std, shift).to(device)  # fmt: skip
        states, pooled = text_of(batch)
        net = calls.get(sd.denoiser_name, sd.net)  # it may be frozen, and the text encoder trained
        if "controlnet" in calls:
            net = controlnet.steered(calls["controlnet"], net, shown(conditioning, batch.pixels).to(x0))
        denoise = lambda x, t: sd.denoise(net, x, t, states, pooled, batch.told)  # noqa: E731
        return objective.diffusion(denoise, sd.schedule, x0, eps, t, gamma, noise.loss)

    return of
