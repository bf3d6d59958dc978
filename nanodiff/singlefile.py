"""Original one-file checkpoints: the names of CompVis (SD 1, 2), sgm (SDXL) and SD 3, and where our names stand there.

    single = Single("v1-5-pruned.safetensors", builders)       # family and parts, from the header alone
    unet = single.module("unet", torch.float16, "cpu")

`original(name, component, …)` says under which original name, and in which form, each of our tensors is stored: a third
of a fused q-k-v, a transposed matrix, a 1×1 convolution, halves exchanged. Reading follows it one way and `export` the
other, so that what is read and written again has the same weights under the same names, bit for bit (what is no weight
of the model, such as schedules, EMA copies and SD 2's unused last OpenCLIP layer, is not carried: LEFT_OUT).
What a file does not hold (tokenizers always, often text encoders and VAE) comes from a folder in Hub form, or where
possible from the configurations and the CLIP vocabulary that are built in.
"""

import re
import sys
from pathlib import Path

import torch

from nanodiff import weights
from nanodiff.config import UserError, nearest, printable
from nanodiff.tokenizer import END, clip_from_merges

DENOISER = "model.diffusion_model."
EMA = "model_ema."
V_STD = 0.09  # SD 2: the last attention's norm biases spread more than this in v-prediction models (seen by ComfyUI)
# Kept in checkpoints but no weights: schedules, losses, counters, EMA bookkeeping; SD 2's OpenCLIP parts that SD 2 never uses.
LEFT_OUT = re.compile(
    r"^(betas|alphas_cumprod.*|sqrt_.*|log_one_minus.*|posterior_.*|logvar|scale_factor|global_step|lvlb_weights"
    r"|denoiser\.sigmas|model_sampling\..*|model_ema\..*|first_stage_model\.loss\..*|loss\..*|v_pred|ztsnr"
    r"|.*\.position_ids|.*logit_scale|.*embed_tokens\.weight|conditioner\.embedders\..*attn_mask"
    r"|(cond_stage_model|conditioner\.embedders\.0)\.model\."
    r"(visual\..*|text_projection|attn_mask|transformer\.resblocks\.23\..*)"
    r"|text_encoders\..*\.text_model\.embeddings\.position_ids)$"
)

_UNET = {"in_channels": 4, "out_channels": 4, "layers_per_block": 2}
_SD_UNET = _UNET | {
    "block_out_channels": [320, 640, 1280, 1280],
    "down_block_types": ["CrossAttnDownBlock2D"] * 3 + ["DownBlock2D"],
    "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
}
_SD2_UNET = _SD_UNET | {
    "cross_attention_dim": 1024,
    "attention_head_dim": [5, 10, 20, 20],
    "use_linear_projection": True,
    "sample_size": 64,
}
_XL_UNET = _UNET | {
    "block_out_channels": [320, 640, 1280],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"],
    "up_block_types": ["CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 2048,
    "attention_head_dim": [5, 10, 20],
    "transformer_layers_per_block": [1, 2, 10],
    "use_linear_projection": True,
    "addition_embed_type": "text_time",
    "addition_time_embed_dim": 256,
    "projection_class_embeddings_input_dim": 2816,
    "sample_size": 128,
}
_VAE = {
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
    "layers_per_block": 2,
    "latent_channels": 4,
}
_SD3_VAE = _VAE | {"latent_channels": 16, "scaling_factor": 1.5305, "shift_factor": 0.0609}
_SD3_VAE |= {"use_quant_conv": False, "use_post_quant_conv": False}
_L = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_L |= {"projection_dim": 768, "hidden_act": "quick_gelu", "eos_token_id": 2}
_H = {"hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 23, "num_attention_heads": 16}
_H |= {"hidden_act": "gelu", "eos_token_id": 2}
_G = {"hidden_size": 1280, "intermediate_size": 5120, "num_hidden_layers": 32, "num_attention_heads": 20}
_G |= {"projection_dim": 1280, "hidden_act": "gelu", "eos_token_id": 2}
_PROJECTED = {"architectures": ["CLIPTextModelWithProjection"]}
_T5 = {"d_model": 4096, "d_ff": 10240, "num_layers": 24, "num_heads": 64}
_MMDIT = {"attention_head_dim": 64, "qk_norm": "rms_norm", "sample_size": 128}
_MEDIUM = _MMDIT | {"num_attention_heads": 24, "num_layers": 24, "caption_projection_dim": 1536}
_LARGE = _MMDIT | {
    "num_attention_heads": 38,
    "num_layers": 38,
    "caption_projection_dim": 2432,
    "pos_embed_max_size": 192,
}
_SD3_TEXT = {"text_encoder": _L | _PROJECTED, "text_encoder_2": _G | _PROJECTED, "text_encoder_3": _T5}
_BETAS = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
_BETAS |= {"num_train_timesteps": 1000, "clip_sample": False, "set_alpha_to_one": False, "skip_prk_steps": True}
_FLOW = {"_class_name": "FlowMatchEulerDiscreteScheduler", "num_train_timesteps": 1000, "shift": 3.0}

# The released models: pipeline class, configurations of the parts, scheduler.
KNOWN = {
    "SD 1": (
        "StableDiffusionPipeline",
        {"unet": _SD_UNET | {"cross_attention_dim": 768, "attention_head_dim": 8, "sample_size": 64}, "vae": _VAE, "text_encoder": _L},
        {"_class_name": "PNDMScheduler"} | _BETAS,
    ),
    "SD 2": (
        "StableDiffusionPipeline",
        {"unet": _SD2_UNET, "vae": _VAE, "text_encoder": _H},
        {"_class_name": "DDIMScheduler"} | _BETAS,
    ),
    "SDXL": (
        "StableDiffusionXLPipeline",
        {"unet": _XL_UNET, "vae": _VAE | {"scaling_factor": 0.13025, "force_upcast": True}, "text_encoder": _L, "text_encoder_2": _G | _PROJECTED},
        {"_class_name": "EulerDiscreteScheduler", "timestep_spacing": "leading"} | _BETAS,
    ),
    "SD 3 medium": (
        "StableDiffusion3Pipeline",
        {"transformer": _MEDIUM | {"qk_norm": None, "pos_embed_max_size": 192}, "vae": _SD3_VAE, **_SD3_TEXT},
        _FLOW,
    ),
    "SD 3.5 medium": (
        "StableDiffusion3Pipeline",
        {"transformer": _MEDIUM | {"dual_attention_layers": list(range(13)), "pos_embed_max_size": 384}, "vae": _SD3_VAE, **_SD3_TEXT},
        _FLOW,
    ),
    "SD 3.5 large": ("StableDiffusion3Pipeline", {"transformer": _LARGE, "vae": _SD3_VAE, **_SD3_TEXT}, _FLOW),
}  # fmt: skip
CLIP_LENGTH = 77
TURBO_SCHEDULERS = {"SD 2": "EulerDiscreteScheduler", "SDXL": "EulerAncestralDiscreteScheduler"}


# ---------------------------------------------------------------------------------------------------------
# Names


def _unet_module(name, cfg):
    """Our UNet module path -> the original one, without the prefix."""
    step = cfg.layers_per_block + 1
    fixed = {
        "conv_in": "input_blocks.0.0",
        "time_embedding.linear_1": "time_embed.0",
        "time_embedding.linear_2": "time_embed.2",
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
    if component == "unet":
        return f"{_unet_module(module, cfg)}.{kind}", None
    if component == "transformer":
        return _mmdit(name, cfg)
    if component == "vae":
        module, conv = _vae_module(module, cfg)
        return f"{module}.{kind}", "conv" if conv and kind == "weight" else None
    if (family, component) in (("SD 2", "text_encoder"), ("SDXL", "text_encoder_2")):
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
        raise UserError(f"{where}: is a LoRA, not a model; give it with --lora")
    if "joint_blocks.0.x_block.attn.qkv.weight" in short:
        if not any(".ln_q." in k for k in short):
            return "SD 3 medium"
        return "SD 3.5 medium" if any(".attn2." in k for k in short) else "SD 3.5 large"
    if any(k.startswith("double_blocks.") for k in short):
        refuse("a Flux model")
    if first is None:
        if any(k.removeprefix("first_stage_model.").startswith("decoder.") for k in shapes):
            raise UserError(f"{where}: is a VAE alone, not a model; give it with --vae-checkpoint")
        raise UserError(
            f"{where}: no Stable Diffusion checkpoint (no input_blocks and no joint_blocks among {len(shapes)} tensors)"
        )
    if "edm_mean" in short or "edm_vpred.sigma_max" in short:
        refuse("an EDM model (Playground 2.5)")
    kinds = {9: "an inpainting model (9 input channels)", 8: "an instruct-pix2pix model (8 input channels)"}
    if first[1] in kinds:
        refuse(kinds[first[1]])
    if first[1] == 7 or first[0] == 256:
        refuse("an upscaler")
    vector = short.get("label_emb.0.0.weight")
    if vector is not None:
        refiner = vector[1] == 2560 or first[0] == 384 or "conditioner.embedders.0.model.ln_final.weight" in shapes
        if refiner:
            refuse("the SDXL refiner")
        return "SDXL"
    projections = [v for k, v in short.items() if k.endswith(".proj_in.weight")]
    if not projections:
        refuse("a UNet without attention")
    return "SD 1" if len(projections[0]) == 4 else "SD 2"


class Known:
    """The configurations of a released model, without its files. family: a key of KNOWN, "SD 2 base", "SD 2 turbo" or "SDXL turbo"."""

    def __init__(self, family, builders):
        base = family.removesuffix(" base").removesuffix(" turbo")
        self.kind, self.configs, self.defaults = KNOWN[base]
        if family.endswith(" turbo"):
            self.defaults = self.defaults | {"_class_name": TURBO_SCHEDULERS[base], "timestep_spacing": "trailing"}
        self.builders, self.parts = builders, set(self.configs)
        self.side = {"SD 2": 96, "SDXL turbo": 64}.get(family)

    def scheduler(self):
        return self.defaults, self.kind

    def config(self, name):
        raw = self.configs[name] | ({"sample_size": self.side} if self.side and name == "unet" else {})
        return self.builders[name].Config.from_json(raw, name)

    def builder(self, name):
        return self.builders[name]


class Single:
    """A single-file checkpoint as a source of parts, like a Hub folder. `rest`: a source for what the file lacks."""

    def __init__(self, path, builders, rest=None, prediction_type=None, allow_pickle=False):
        self.path, self.builders, self.rest, self.builder = Path(path), builders, rest, builders.__getitem__
        self.state = None
        if self.path.suffix in weights.PICKLES:
            if not allow_pickle:
                raise UserError(f"{path}: reading a pickle can run code; if you trust it, add --allow-pickle")
            self.state = weights.load_pickle(path)
            self.shapes = {k: tuple(v.shape) for k, v in self.state.items()}
        else:
            self.shapes = weights.header([self.path])
        self.family = family_of(self.shapes, self.path)
        self.kind, self.configs, self.defaults = KNOWN[self.family]
        self.index = {}
        self.prefixes = prefixes(self.family)
        denoiser = next(iter(self.prefixes))
        bare = not any(k.startswith(DENOISER) for k in self.shapes)
        if bare:  # the denoiser alone, without its prefix
            self.prefixes = {denoiser: ""}
        for part, other in (
            ("vae", "vae."),
            ("text_encoder", "conditioner.embedders.0.model."),
        ):  # other tools' re-saves
            here = any(k.startswith(self.prefixes.get(part, other)) for k in self.shapes)
            if not here and any(k.startswith(other) for k in self.shapes):
                self.prefixes[part] = other
        self.turbo = "turbo" in self.path.name.lower() and self.family in ("SD 2", "SDXL")
        self.ema = sum(k.startswith(EMA) for k in self.shapes) > 100
        said = [f"{self.family} checkpoint"] + (["its EMA weights"] if self.ema else [])
        said += ["a turbo by its name"] if self.turbo else []
        here = {c for c, p in self.prefixes.items() if any(k.startswith(p) for k in self.shapes)}
        self.here = here
        self.prediction = self._prediction(prediction_type)
        if self.prediction:
            said.append(self.prediction)
        print(f"{self.path.name}: {', '.join(said)}", file=sys.stderr)
        self.parts = self._parts()
        self._check_leftovers()

    def _parts(self):
        """Names of all parts, from the file or from `rest`. Raises UserError for what neither has."""
        wanted = set(self.configs)
        missing = wanted - self.here
        if self.rest is not None:
            if self.rest.kind != self.kind:
                raise UserError(f"--components: {self.rest.kind}, but {self.path} is a {self.kind}")
            found = self.here | (missing & self.rest.parts)
            return found | {p for p in self.rest.parts if p.startswith("tokenizer")}
        lost = sorted(missing - {"text_encoder_3"})
        if lost:
            raise UserError(
                f"{self.path}: has no {', '.join(lost)}; give a folder or Hub id of the same family with --components"
            )
        if "text_encoder_3" in wanted:
            reason = "is not in the file" if "text_encoder_3" in missing else "has no tokenizer here"
            print(f"note: T5 {reason}, going on without it (--components FOLDER supplies it)", file=sys.stderr)
        tokenizers = {p.replace("text_encoder", "tokenizer") for p in wanted if p in ("text_encoder", "text_encoder_2")}
        return (self.here - {"text_encoder_3"}) | tokenizers

    def _prediction(self, given):
        """What the network predicts, where the family leaves it open; None elsewhere."""
        if self.family.startswith("SD 3"):
            if given:
                raise UserError(f"--prediction-type: {self.path} is a {self.family} model, which predicts a velocity")
            return None
        if given:
            return given
        if "v_pred" in self.shapes:
            return "v_prediction"
        if self.family != "SD 2":
            return None
        key = f"{DENOISER if DENOISER in self.prefixes.values() else ''}output_blocks.11.1.transformer_blocks.0.norm1.bias"
        if key not in self.shapes and self.rest is not None:
            return self.rest.scheduler()[0].get("prediction_type", "epsilon")
        if key not in self.shapes:
            raise UserError(
                f"{self.path}: ε or v? Nothing in this file tells; say --prediction-type epsilon or v_prediction"
            )
        return "v_prediction" if self._tensor(key).float().std(correction=0) > V_STD else "epsilon"

    def scheduler(self):
        """(scheduler_config.json as a dict, where it is from): of `rest`, or the family's own; told predictions win."""
        base = self.rest.scheduler()[0] if self.rest is not None else self.defaults
        if self.rest is None and self.turbo:  # as sd-turbo and sdxl-turbo ship it
            base = base | {"_class_name": TURBO_SCHEDULERS[self.family], "timestep_spacing": "trailing"}
        more = {"prediction_type": self.prediction} if self.prediction else {}
        if "ztsnr" in self.shapes:
            more |= {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}
        return base | more, str(self.path)

    def config(self, name):
        if self.rest is not None and name in self.rest.parts:
            return self.rest.config(name)
        raw = self.configs[name]
        if name == "unet" and self.family == "SD 2" and self.prediction == "v_prediction":
            raw = raw | {"sample_size": 96}
        if name == "unet" and self.turbo:
            raw = raw | {"sample_size": 64}
        return self.builders[name].Config.from_json(raw, self.family)

    def tokenizer(self, name):
        if self.rest is not None and name in self.rest.parts:
            return self.rest.tokenizer(name)
        own = self.family == "SD 1" or (name == "tokenizer" and self.family != "SD 2")
        return clip_from_merges(END if own else "!", CLIP_LENGTH)

    def _where(self, name, component, cfg):
        """(key in this file, form) of our tensor."""
        key, form = original(name, component, self.family, cfg)
        full = self.prefixes[component] + key
        if component in ("unet", "transformer") and self.ema:
            return EMA + full.removeprefix("model.").replace(".", ""), form
        if full not in self.shapes and "text_model." in full:
            return full.replace("text_model.", "", 1), form  # old files
        return full, form

    def _tensor(self, key):
        if self.state is not None:
            return self.state[key]
        if not hasattr(self, "file"):
            self.file = weights.open_file(self.path)
        return self.file.get_tensor(key)

    def module(self, name, dtype, device):
        """A part as a module in eval mode; dtype None keeps the stored types."""
        if name not in self.here:
            return self.rest.module(name, dtype, device)
        cls, cfg = self.builders[name], self.config(name)
        model = weights.skeleton(cls, cfg)
        state = {}
        for key, want in model.state_dict().items():
            where, form = self._where(key, name, cfg)
            if where not in self.shapes:
                raise UserError(f"{self.path}: misses tensor {where}{nearest(where, self.shapes)}")
            tensor = ours(self._tensor(where), form)
            if tensor.shape != want.shape:
                raise UserError(
                    f"{self.path}: {where} has shape {list(self.shapes[where])}, a {self.family} model has another "
                    f"({list(want.shape)}); if it is a model of another size, give its configs with --components"
                )
            state[key] = placed(tensor, device, dtype)
        model.load_state_dict(state, strict=True, assign=True)
        return model.eval().requires_grad_(False)

    def _check_leftovers(self):
        """Every key of the file must be somebody's. Raises UserError naming the first that is not."""
        known = set()
        for name in self.here & self.parts if self.here else ():
            cfg = self.config(name)
            for key in weights.skeleton(self.builders[name], cfg).state_dict():
                known.add(self._where(key, name, cfg)[0])
        unused = tuple(self.prefixes[n] for n in self.here - self.parts)
        denoiser = next(iter(self.prefixes.values()))
        for key in self.shapes:
            twin = self.ema and key.startswith(denoiser)
            if not (key in known or twin or LEFT_OUT.match(key) or (unused and key.startswith(unused))):
                raise UserError(f"{self.path}: has unknown tensor {printable(key)}{nearest(key, known)}")


def placed(tensor, device, dtype):
    """A weight where and in the type in which it computes (None: as stored); convolutions' channels last, where they are fastest."""
    tensor = tensor.to(device, dtype or tensor.dtype)
    return tensor.contiguous(memory_format=torch.channels_last if tensor.dim() == 4 else torch.contiguous_format)


def load_vae(path, cfg, cls, dtype, device):
    """A VAE from a file of its own, in original names (with or without prefix) or in ours; cfg: its configuration."""
    shapes, file = weights.header([path]), weights.open_file(path)
    model = weights.skeleton(cls, cfg)
    prefix = next((p for p in ("first_stage_model.", "vae.") if any(k.startswith(p) for k in shapes)), "")
    state, names = {}, {weights.renamed(k, "AutoencoderKL"): k for k in shapes}
    for key, want in model.state_dict().items():
        theirs, form = original(key, "vae", "", cfg)
        where = prefix + theirs if prefix + theirs in shapes else names.get(key)
        if where is None:
            raise UserError(
                f"{path}: misses tensor {prefix}{theirs}; it is no VAE of this model{nearest(theirs, shapes)}"
            )
        tensor = ours(file.get_tensor(where), form)
        if tensor.shape != want.shape:
            raise UserError(f"{path}: {where} has shape {list(shapes[where])}, this model's VAE has {list(want.shape)}")
        state[key] = placed(tensor, device, dtype)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


# ---------------------------------------------------------------------------------------------------------
# Writing


def export(models, family, path):
    """Write {component: module} as one file in the original names of `family`."""
    out, thirds = {}, {}
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
    weights.save_tensors(path, out)
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
    if kind == "StableDiffusion3Pipeline":
        cfg = denoiser.cfg
        return "SD 3 medium" if not cfg.qk_norm else "SD 3.5 medium" if cfg.dual_attention_layers else "SD 3.5 large"
    return "SD 2" if denoiser.cfg.use_linear_projection else "SD 1"
