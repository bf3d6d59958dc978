"""New models from a few options: VAE, denoiser (UNet or MMDiT), text encoder, noise schedule, and how their weights begin.

`cfg` is train.py's configuration. Sizes are Hub configurations, so what is built here is written, and read again, as any
other model.
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
from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.clip import Config as TextConfig
from nanodiff.models.flatvae import FlatVAE
from nanodiff.models.labels import Config as LabelConfig
from nanodiff.models.labels import LabelEncoder
from nanodiff.models.layers import ResnetBlock
from nanodiff.models.vae import AutoencoderKL
from nanodiff.output import images
from nanodiff.pipeline import control, sources
from nanodiff.text.tokenizer import LabelTokenizer, train_bpe
from nanodiff.weights import hub


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


def make_vae(cfg):
    """(config dict, the VAE on the meta device)"""
    if cfg.model:
        for name in ("model_config", "latent_dim"):
            if getattr(cfg, name):
                raise UserError(f"`{name}` is for a new VAE; `model` brings its own")
        folder = sources.vae_folder(cfg.model)
        raw = read_json(folder / "config.json")
        cfg.resolution = cfg.resolution or raw.get("sample_size", 64)
    elif cfg.latent_dim:
        raw = {"sample_size": cfg.resolution, "latent_dim": cfg.latent_dim}
    else:
        raw = read_json(cfg.model_config) if cfg.model_config else NANO_VAE
    cls = FlatVAE if "latent_dim" in raw else AutoencoderKL
    with torch.device("meta"):
        net = cls(cls.Config.from_json(raw))
    only = getattr(net.cfg, "fixed_size", cfg.resolution)
    if cfg.resolution != only:
        raise UserError(f"`resolution` {cfg.resolution}: this VAE is for {only}")
    if cfg.resolution % net.cfg.downscale:
        raise UserError(f"`resolution` {cfg.resolution} must be a multiple of the VAE's {net.cfg.downscale}")
    return raw, net


def begin_vae(cfg, raw, net):
    """make_vae()'s VAE with weights: cfg.model's, in fp32, or new ones by PyTorch's defaults."""
    if cfg.model:
        return sources.load_vae(cfg.model, torch.float32, "cpu").requires_grad_(True).train()
    return type(net)(type(net).Config.from_json(raw))


def make_model(cfg, dataset, device):
    """(pipeline, {name: module to train}): a new model, or cfg.model's, whole or with adapters."""
    sd, nets = go_on(cfg) if cfg.model else begin(cfg, dataset, device)
    if cfg.resolution % sd.multiple:
        raise UserError(f"`resolution` {cfg.resolution} must be a multiple of {sd.multiple}")
    for module in (sd.vae, sd.net, *sd.encoders):
        if module is not None and module not in nets.values():  # it is frozen
            module.to(device, memory_format=torch.channels_last)
    return sd, nets


def go_on(cfg):
    """See make_model(): cfg.model's weights, in fp32."""
    for name in NEW_ONLY:
        if name in getattr(cfg, "given", ()):
            raise UserError(f"`{name}` is for new models; `model` brings its own")
    memory.keep_freed_memory()
    sd = pipeline.load(cfg.model, torch.float32, "cpu")
    sd.check_trainable()
    if cfg.prediction_type not in (None, sd.schedule.prediction):
        raise UserError(f"`prediction_type` {cfg.prediction_type}: {cfg.model} predicts {sd.schedule.prediction}")
    if getattr(cfg, "conditioning", None):
        return sd, {"controlnet": begin_control(cfg, sd)}
    nets = {sd.denoiser_name: sd.net}
    if cfg.train_text_encoder:
        if len([e for e in sd.encoders if e is not None]) > 1:
            raise UserError("`train_text_encoder` is for models with one text encoder")
        nets["text_encoder"] = sd.text_encoder
    for name, net in nets.items():
        if cfg.lora:
            lora.adapt(net, component=name, **lora_settings(cfg))
        else:
            net.requires_grad_(True)
    return sd, nets


def begin_control(cfg, sd):
    """The ControlNet that is trained for a pipeline's UNet, which is frozen: cfg.control's, or a copy of the UNet's way down.
    What it learns comes from the edges where a caption does not say it: half of the captions are left out (Zhang et al. 2023, arXiv 2302.05543 §3.3)."""
    if not isinstance(sd.net, unet.UNet2DConditionModel):
        raise UserError(f"`model` {cfg.model}: ControlNets are for UNets (SD 1.x, SD 2.x, SDXL)")
    sd.check_trainable()
    if cfg.control:
        net = control.load(cfg.control, sd.net.cfg, torch.float32, "cpu", cfg.hub_token)
        control.check_fit(net, sd)
        return net.requires_grad_(True)
    return controlnet.copy_of(sd.net, sd.downscale).requires_grad_(True)


def shown(conditioning, pixels):
    """What a ControlNet is shown of pictures [B, 3, H, W] in [-1, 1]: [B, 3, H, W] in [0, 1]."""
    if conditioning == "canny":
        drawn = [torch.from_numpy(edges.canny(picture)) for picture in images.to_uint8(pixels).numpy()]
        return torch.stack(drawn)[:, None].expand(-1, 3, -1, -1).float() / 255
    raise ValueError(f"unknown conditioning {conditioning!r}")


NEW_ONLY = ("vae", "text_encoder", "text_config", "model_config", "model_size", "beta_schedule", "zero_snr", "ddpm_num_steps",
            "condition", "vocab_size", "max_length", "text_mask")  # fmt: skip


def lora_settings(cfg):
    """What lora.adapt() takes, from the command line. Raises UserError."""
    patterns, given = {}, [cfg.lora_targets] if isinstance(cfg.lora_targets, str) else cfg.lora_targets
    for name in ("rank", "alpha"):
        patterns[name] = {}
        for part in filter(None, map(str.strip, getattr(cfg, f"lora_{name}_pattern").split(","))):
            target, equals, value = part.rpartition("=")
            try:
                patterns[name][target.strip()] = float(value)
            except ValueError:
                equals = ""
            if not equals or not target.strip():
                raise UserError(f"`lora_{name}_pattern` {printable(part)}: expected TARGET=NUMBER")
    return {
        "rank": cfg.lora_rank, "alpha": cfg.lora_alpha, "dropout": cfg.lora_dropout, "rslora": cfg.lora_rslora,
        "targets": tuple(t.strip() for group in given for t in group.split(",") if t.strip()) or lora.ATTENTION,
        "rank_pattern": patterns["rank"], "alpha_pattern": patterns["alpha"],
    }  # fmt: skip


def student(model):
    """(pipeline, {name: module to train}): all of a model's denoiser."""
    memory.keep_freed_memory()
    sd = pipeline.load(model, torch.float32, "cpu")
    sd.net.requires_grad_(True)
    return sd, {sd.denoiser_name: sd.net}


def reseed(cfg, seed, batch):
    """Before a micro-batch of adapters with dropout: torch's own generator, so that a resumed run draws what the other did."""
    if getattr(cfg, "lora_dropout", 0):
        torch.manual_seed(objective.generator(seed, "adapter", next(iter(batch.indices), 0)).initial_seed())


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


def losses(cfg, sd, calls, device):
    """f(batch, x0_of, text_of, seed) -> (weighted, unweighted) loss of a micro-batch, by options.Noise; everything random is drawn by
    (seed, global sample index). calls: {component: what to call in its place}; x0_of, text_of: latents.Latents and Texts."""
    objective.check_loss(cfg.loss)
    gamma = cfg.min_snr
    if gamma is None and cfg.snr_weighting and sd.schedule.prediction == "sample":
        gamma = cfg.snr_clip or float("inf")
    shift = cfg.timestep_shift or (sd.schedule.cfg["shift"] if sd.schedule.flow else 1.0)

    def of(batch, x0_of, text_of, seed):
        reseed(cfg, seed, batch)
        x0 = x0_of(batch)
        noise = objective.draw(seed, "noise", batch.indices, lambda g: torch.randn(x0.shape[1:], generator=g)).to(x0)
        noise = objective.offset(noise, cfg.offset_noise, seed, batch.indices)
        t = objective.timesteps(sd.schedule, seed, batch.indices, cfg.timestep_sampling, cfg.timestep_mean, cfg.timestep_std,
                                shift).to(device)  # fmt: skip
        states, pooled = text_of(batch)
        net = calls.get(sd.denoiser_name, sd.net)  # it may be frozen, and the text encoder trained
        if "controlnet" in calls:
            net = controlnet.steered(calls["controlnet"], net, shown(cfg.conditioning, batch.pixels).to(x0))
        denoise = lambda x, t: sd.denoise(net, x, t, states, pooled)  # noqa: E731
        return objective.diffusion(denoise, sd.schedule, x0, noise, t, gamma, cfg.loss)

    return of


def begin(cfg, dataset, device):
    """See make_model(): new weights."""
    if cfg.lora or cfg.train_text_encoder:
        raise UserError(f"`{'lora' if cfg.lora else 'train_text_encoder'}` needs a `model` to go on from")
    vae = sources.load_vae(cfg.vae, torch.float32, device) if cfg.vae else None
    encoder, tokenizer, frozen = make_text(cfg, dataset, device)
    net = make_denoiser(cfg, vae, encoder.cfg)
    init(net, encoder if not frozen else None)
    family = pipeline.Joint if isinstance(net, mmdit.SD3Transformer2DModel) else pipeline.Pipeline
    sd = family(net, vae, encoder, tokenizer, make_schedule(cfg))
    guidance = 1.0 if cfg.condition == "none" else cfg.sample_guidance
    sd.index = {pipeline.SAMPLING: {"steps": cfg.sample_steps, "guidance_scale": guidance}}
    return sd, {sd.denoiser_name: net} | ({} if frozen else {"text_encoder": encoder})


def make_schedule(cfg):
    """The noise schedule that cfg names; v-prediction when nothing is said."""
    prediction = cfg.prediction_type or "v_prediction"
    if prediction == "flow":
        return Schedule.from_config({"_class_name": "FlowMatchEulerDiscreteScheduler", "shift": cfg.timestep_shift or 1.0,
                                     "num_train_timesteps": cfg.ddpm_num_steps})  # fmt: skip
    kind = {"cosine": "squaredcos_cap_v2"}.get(cfg.beta_schedule, cfg.beta_schedule)
    first, last = (1e-4, 0.02) if kind == "linear" else (0.00085, 0.012)
    return Schedule.from_config(
        {"_class_name": "DDIMScheduler", "beta_start": first, "beta_end": last, "beta_schedule": kind,
         "prediction_type": prediction, "clip_sample": not cfg.vae, "set_alpha_to_one": True,
         "timestep_spacing": "trailing", "rescale_betas_zero_snr": cfg.zero_snr and prediction != "epsilon",
         "num_train_timesteps": cfg.ddpm_num_steps}
    )  # fmt: skip


def make_text(cfg, dataset, device):
    """(encoder, tokenizer, frozen?) that tell the denoiser what to draw."""
    if cfg.condition != "text":
        if "text_mask" in getattr(cfg, "given", ()):
            raise UserError(f"`text_mask` hides a caption's padding; `condition` {cfg.condition} has no captions")
        conditions(cfg, dataset)
        labels = dataset.known_labels if cfg.condition == "labels" else []
        return LabelEncoder(LabelConfig(tuple(labels), text_config(cfg).hidden_size)), LabelTokenizer(labels), False
    if cfg.text_encoder:
        path = hub.resolve(cfg.text_encoder, None, cfg.hub_token)
        encoder, tokenizer = sources.load_text(path, torch.float32, device, denoiser_config(cfg)[0] == "mmdit")
        encoder.cfg.use_attention_mask |= cfg.text_mask
        return encoder, tokenizer, True
    tokenizer = train_bpe([t for texts in dataset.texts for t in texts], cfg.vocab_size, cfg.max_length)
    return CLIPTextModel(text_config(cfg, tokenizer)), tokenizer, False


def text_config(cfg, tokenizer=None):
    """The configuration of the text encoder that is trained along."""
    projected = denoiser_config(cfg)[0] == "mmdit"
    raw = SIZES.get(cfg.model_size, SIZES["nano"])[1]
    words = {} if tokenizer is None else {
        "vocab_size": len(tokenizer.backend.get_vocab()), "bos_token_id": tokenizer.bos, "eos_token_id": tokenizer.eos,
        "pad_token_id": tokenizer.pad,
    }  # fmt: skip
    if cfg.text_config:  # the words are those of the tokenizer, which is learned from these captions
        text = TextConfig.from_json(read_json(cfg.text_config), cfg.text_config)
        if cfg.max_length > text.max_position_embeddings:
            raise UserError(
                f"`text_config`: {text.max_position_embeddings} positions for `max_length` {cfg.max_length}"
            )
        return dataclasses.replace(
            text, **words, with_projection=projected, use_attention_mask=text.use_attention_mask or cfg.text_mask
        )
    return TextConfig(**raw, **words, max_position_embeddings=cfg.max_length, hidden_act="gelu",
                      projection_dim=raw["hidden_size"], with_projection=projected, use_attention_mask=cfg.text_mask)  # fmt: skip


def conditions(cfg, dataset):
    """The texts that may be a picture's condition: its captions, its label, or nothing."""
    if cfg.condition == "text":
        return dataset.texts
    if cfg.condition == "none":
        return [("",)] * len(dataset)
    if missing := [k for k, label in zip(dataset.keys, dataset.labels, strict=True) if not label]:
        raise UserError(
            f"`condition` labels: {len(missing)} pictures have no label (a folder or .cls), such as {missing[0]}"
        )
    return [(label,) for label in dataset.labels]


def denoiser_config(cfg):
    """("unet" or "mmdit", the fields that do not depend on data, VAE and text)"""
    raw = read_json(cfg.model_config) if cfg.model_config else SIZES.get(cfg.model_size, ({},))[0]
    kind = "mmdit" if raw.get("_class_name") == "SD3Transformer2DModel" or "patch_size" in raw else "unet"
    return kind, raw


def make_denoiser(cfg, vae, text):
    """A freshly built UNet or MMDiT whose ends fit the VAE's latents (or pixels) and the text."""
    if cfg.model_size in KNOWN and not cfg.model_config:
        known = sources.configs(KNOWN[cfg.model_size])
        part = "unet" if "unet" in known.parts else "transformer"
        return known.builder(part)(known.config(part))
    channels, scale = (vae.cfg.latent_channels, vae.cfg.downscale) if vae else (3, 1)
    size = cfg.resolution // scale
    ends = {"in_channels": channels, "out_channels": channels, "sample_size": size}
    kind, raw = denoiser_config(cfg)
    if kind == "mmdit":
        if not cfg.model_config:
            raw = raw | ends | {
                "joint_attention_dim": text.hidden_size, "pooled_projection_dim": text.projection_dim,
                "caption_projection_dim": raw["num_attention_heads"] * raw["attention_head_dim"],
                "pos_embed_max_size": max(2 * size // raw["patch_size"], 1),
            }  # fmt: skip
        config, build = mmdit.Config.from_json(raw), mmdit.SD3Transformer2DModel
        wanted = config.joint_attention_dim
    else:
        own = raw | ends | {"cross_attention_dim": text.hidden_size}
        config = unet.Config.from_json(raw) if cfg.model_config else unet.Config(**own)
        build, wanted = unet.UNet2DConditionModel, config.cross_attention_dim
    if config.in_channels != channels:
        raise UserError(f"`model_config`: in_channels {config.in_channels}, but the pictures have {channels} channels")
    if wanted != text.hidden_size:
        raise UserError(f"`model_config`: wants text of width {wanted}, the text encoder gives {text.hidden_size}")
    return build(config)


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
