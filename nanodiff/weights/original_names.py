"""The names of original one-file checkpoints (CompVis: SD 1, 2; sgm: SDXL; SD 3), and where our names stand there.

`original(name, component, …)` says under which original name, and in which form, each of our tensors is stored: a third
of a fused q-k-v, a transposed matrix, a 1×1 convolution, halves exchanged. Reading follows it one way and `export` the
other, so that what is read and written again has the same weights under the same names, bit for bit (what is no weight
of the model, such as schedules, EMA copies and SD 2's unused last OpenCLIP layer, is not carried: LEFT_OUT).
"""

import re

import torch

from nanodiff.config import UserError
from nanodiff.weights import safetensors

DENOISER = "model.diffusion_model."
EMA = "model_ema."
# Kept in checkpoints but no weights: schedules, losses, counters, EMA bookkeeping; SD 2's OpenCLIP parts that SD 2 never uses.
LEFT_OUT = re.compile(
    r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|scale_factor|global_step|lvlb_weights"
    r"|denoiser\.sigmas|model_sampling\..*|model_ema\..*|first_stage_model\.loss\..*|loss\..*|v_pred|ztsnr"
    r"|.*\.position_ids|.*logit_scale|.*embed_tokens\.weight|conditioner\.embedders\..*attn_mask"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.model\."
    r"(visual\..*|text_projection|attn_mask|transformer\.resblocks\.23\..*)"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.transformer\.text_projection(\.weight)?"  # CLIP-L's, which nothing reads
    r"|text_encoders\..*\.text_model\.embeddings\.position_ids)$"
)


# ---------------------------------------------------------------------------------------------------------
# Names


def _unet_module(name, cfg):
    """Our UNet module path -> the original one, without the prefix."""
    step = cfg.layers_per_block + 1
    fixed = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
        "time_embedding.cond_proj": "time_embed.cond_proj",  # the originals have none
        "add_embedding.linear_1": "label_emb.0.0",
        "add_embedding.linear_2": "label_emb.0.2",
        "conv_norm_out": "out.0",
        "conv_out": "out.2",
    }
    if name in fixed:
        return fixed[name]
    side, *path = name.split(".")
    if side == "mid_block":
        kind, j, *rest = path
        block = f"middle_block.{1 if kind == 'attentions' else 2 * int(j)}"
    else:
        i, kind, j, *rest = path
        i, j = int(i), int(j)
        if kind == "downsamplers":
            return f"input_blocks.{(i + 1) * step}.0.op"
        if kind == "upsamplers":
            attends = cfg.up_block_types[i].startswith("CrossAttn")
            return f"output_blocks.{i * step + step - 1}.{2 if attends else 1}.conv"
        at = f"input_blocks.{1 + i * step + j}" if side == "down_blocks" else f"output_blocks.{i * step + j}"
        block = f"{at}.{1 if kind == 'attentions' else 0}"
    inner = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    inner |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    rest = ".".join(rest)
    return f"{block}.{inner[rest] if kind == 'resnets' else rest}"


def _control_module(name, cfg):
    """Our ControlNet module path -> the original one, without the prefix."""
    last = 2 * (2 * len(cfg.conditioning_embedding_out_channels) - 1)
    fixed = {"conv_in": "input_hint_block.0", "conv_out": f"input_hint_block.{last}"}  # in turn with their SiLU
    part, _, path = name.partition(".")
    if part == "controlnet_cond_embedding":
        return fixed.get(path) or f"input_hint_block.{2 * (int(path.removeprefix('blocks.')) + 1)}"
    if part == "controlnet_down_blocks":
        return f"zero_convs.{path}.0"
    return "middle_block_out.0" if part == "controlnet_mid_block" else _unet_module(name, cfg)


def _vae_module(name, cfg):
    """Our VAE module path -> (the original one, is it an attention's 1×1 convolution)."""
    levels = len(cfg.block_out_channels)
    side, *path = name.split(".")
    if side not in ("encoder", "decoder"):
        return name, False
    if path[0] == "conv_norm_out":
        return f"{side}.norm_out", False
    if path[0] == "mid_block":
        _, kind, j, *rest = path
        if kind == "resnets":
            return f"{side}.mid.block_{int(j) + 1}.{'.'.join(rest)}", False
        inner = {"group_norm": "norm", "to_q": "q", "to_k": "k", "to_v": "v", "to_out.0": "proj_out"}
        return f"{side}.mid.attn_1.{inner['.'.join(rest)]}", rest[0] != "group_norm"
    if path[0] in ("down_blocks", "up_blocks"):
        way, i, kind, *rest = path
        at = f"down.{i}" if way == "down_blocks" else f"up.{levels - 1 - int(i)}"
        if kind == "resnets":
            return f"{side}.{at}.block.{'.'.join(rest)}".replace("conv_shortcut", "nin_shortcut"), False
        return f"{side}.{at}.{'downsample' if way == 'down_blocks' else 'upsample'}.conv", False
    return name, False


def _openclip(name):
    """Our CLIP tensor name -> (OpenCLIP's, form)."""
    fixed = {
        "text_projection.weight": ("text_projection", "transposed"),
        "text_model.embeddings.token_embedding.weight": ("token_embedding.weight", None),
        "text_model.embeddings.position_embedding.weight": ("positional_embedding", None),
    }
    if name in fixed:
        return fixed[name]
    name = name.removeprefix("text_model.").replace("final_layer_norm", "ln_final")
    name = name.replace("encoder.layers.", "transformer.resblocks.")
    for ours, theirs in (
        ("layer_norm", "ln_"),
        ("mlp.fc1", "mlp.c_fc"),
        ("mlp.fc2", "mlp.c_proj"),
        ("self_attn.out", "attn.out"),
    ):
        name = name.replace(ours, theirs)
    if match := re.fullmatch(r"(.*)\.self_attn\.([qkv])_proj\.(weight|bias)", name):
        return f"{match[1]}.attn.in_proj_{match[3]}", "qkv".index(match[2])
    return name, None


def _mmdit(name, cfg):
    """Our SD 3 tensor name -> (the original one, form)."""
    fixed = {
        "pos_embed.pos_embed": "pos_embed",
        "pos_embed.proj": "x_embedder.proj",
        "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
        "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
        "context_embedder": "context_embedder",
        "proj_out": "final_layer.linear",
        "norm_out.linear": "final_layer.adaLN_modulation.1",
    }
    module, _, kind = name.rpartition(".")
    if name in fixed:
        return fixed[name], None
    if module in fixed:
        return f"{fixed[module]}.{kind}", "swapped" if module == "norm_out.linear" else None
    _, i, path = module.split(".", 2)
    last = int(i) == cfg.num_layers - 1
    stream = "context_block" if re.search(r"context|add", path) else "x_block"
    base = f"joint_blocks.{i}.{stream}"
    attn = path.split(".")[0]
    if path.startswith("norm1"):
        return f"{base}.adaLN_modulation.1.{kind}", "swapped" if last and stream == "context_block" else None
    if path.startswith("ff"):
        return f"{base}.mlp.{'fc1' if 'net.0' in path else 'fc2'}.{kind}", None
    if "norm" in path:
        return f"{base}.{attn}.ln_{path[-1]}.{kind}", None
    if "out" in path:
        return f"{base}.{attn}.proj.{kind}", None
    return f"{base}.{attn}.qkv.{kind}", "qkv".index(re.search(r"(?:to|add)_([qkv])", path)[1])


def prefixes(family):
    """{component: prefix of its original names}"""
    denoiser = "transformer" if family.startswith("SD 3") else "unet"
    found = {denoiser: DENOISER, "vae": "first_stage_model."}
    if family == "SD 1":
        found["text_encoder"] = "cond_stage_model.transformer."
    elif family == "SD 2":
        found["text_encoder"] = "cond_stage_model.model."
    elif family == "SDXL refiner":
        found["text_encoder_2"] = "conditioner.embedders.0.model."
    elif family == "SDXL":
        found["text_encoder"] = "conditioner.embedders.0.transformer."
        found["text_encoder_2"] = "conditioner.embedders.1.model."
    else:
        names = {"text_encoder": "clip_l", "text_encoder_2": "clip_g", "text_encoder_3": "t5xxl"}
        found |= {k: f"text_encoders.{v}.transformer." for k, v in names.items()}
    return found


def original(name, component, family, cfg):
    """(original name without prefix, form) of our tensor `name`. form: None, 0 1 2 (which third of a fused q-k-v),
    "transposed", "swapped" (halves exchanged) or "conv" (a linear layer stored as a 1×1 convolution)."""
    module, _, kind = name.rpartition(".")
    if component in ("unet", "controlnet"):
        return f"{(_unet_module if component == 'unet' else _control_module)(module, cfg)}.{kind}", None
    if component == "transformer":
        return _mmdit(name, cfg)
    if component == "vae":
        module, conv = _vae_module(module, cfg)
        return f"{module}.{kind}", "conv" if conv and kind == "weight" else None
    if (family, component) in (
        ("SD 2", "text_encoder"),
        ("SDXL", "text_encoder_2"),
        ("SDXL refiner", "text_encoder_2"),
    ):
        return _openclip(name)
    return name, None


def ours(tensor, form):
    """An original tensor in our form (see original())."""
    if form in (0, 1, 2):
        return tensor.chunk(3)[form]
    if form == "transposed":
        return tensor.T
    if form == "swapped":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor.flatten(1) if form == "conv" and tensor.dim() > 2 else tensor


# ---------------------------------------------------------------------------------------------------------
# Reading


def family_of(shapes, where):
    """The family of a checkpoint from its header {name: shape}. Raises UserError naming what it is instead."""
    short = {k.removeprefix(DENOISER): v for k, v in shapes.items()}
    first = short.get("input_blocks.0.0.weight")

    def refuse(what):
        raise UserError(f"{where}: is {what}, which is not supported")

    if any("lora" in k or "lokr" in k or "hada" in k for k in shapes):
        raise UserError(f"{where}: is a LoRA, not a model; give it with `lora`")
    if "joint_blocks.0.x_block.attn.qkv.weight" in short:
        if not any(".ln_q." in k for k in short):
            return "SD 3 medium"
        return "SD 3.5 medium" if any(".attn2." in k for k in short) else "SD 3.5 large"
    if any(k.startswith("double_blocks.") for k in short):
        refuse("a Flux model")
    if first is None:
        if any(k.removeprefix("first_stage_model.").startswith("decoder.") for k in shapes):
            raise UserError(f"{where}: is a VAE alone, not a model; give it with `vae_checkpoint`")
        raise UserError(
            f"{where}: no Stable Diffusion checkpoint (no input_blocks and no joint_blocks among {len(shapes)} tensors)"
        )
    if "edm_mean" in short or "edm_vpred.sigma_max" in short:
        refuse("an EDM model (Playground 2.5)")
    if first[1] == 8:
        refuse("an instruct-pix2pix model (8 input channels)")
    if first[1] == 7 or first[0] == 256:
        refuse("an upscaler")
    vector = short.get("label_emb.0.0.weight")
    if vector is not None:
        refiner = vector[1] == 2560 or first[0] == 384 or "conditioner.embedders.0.model.ln_final.weight" in shapes
        return "SDXL refiner" if refiner else "SDXL"
    projections = [v for k, v in short.items() if k.endswith(".proj_in.weight")]
    if not projections:
        refuse("a UNet without attention")
    return "SD 1" if len(projections[0]) == 4 else "SD 2"


# ---------------------------------------------------------------------------------------------------------
# Writing


def export(models, family, path, says=()):
    """Write {component: module} as one file in the original names of `family`. says: names of empty tensors by which others tell what the model
    predicts, "v_pred" and "ztsnr"."""
    out, thirds = {name: torch.zeros(0) for name in says}, {}
    for component, prefix in prefixes(family).items():
        model = models.get(component)
        if model is None:
            continue
        for key, tensor in model.state_dict().items():
            name, form = original(key, component, family, model.cfg)
            if form in (0, 1, 2):
                thirds.setdefault(prefix + name, {})[form] = tensor
            else:
                out[prefix + name] = _theirs(tensor, form)
        if component == "text_encoder" and family in ("SD 1", "SDXL"):
            out[f"{prefix}text_model.embeddings.position_ids"] = torch.arange(model.cfg.max_position_embeddings)[None]
    out |= {name: torch.cat([parts[i] for i in range(3)]) for name, parts in thirds.items()}
    safetensors.save_tensors(path, out)
    return out


def _theirs(tensor, form):
    """One of our tensors in the original form."""
    if form == "transposed":
        return tensor.T
    if form == "swapped":
        return torch.cat(tensor.chunk(2)[::-1])
    return tensor[:, :, None, None] if form == "conv" else tensor


def family_of_pipeline(kind, denoiser):
    """The family under whose names a pipeline can be exported."""
    if kind == "StableDiffusionXLPipeline":
        return "SDXL"
    if kind == "StableDiffusionXLImg2ImgPipeline":  # what we write of one is a refiner
        return "SDXL refiner"
    if kind == "StableDiffusion3Pipeline":
        cfg = denoiser.cfg
        return "SD 3 medium" if not cfg.qk_norm else "SD 3.5 medium" if cfg.dual_attention_layers else "SD 3.5 large"
    if not hasattr(denoiser.cfg, "use_linear_projection"):
        raise UserError(f"{denoiser.class_name} of a {kind} has no form as one file; SD 1, SD 2, SDXL and SD 3 have")
    return "SD 2" if denoiser.cfg.use_linear_projection else "SD 1"
