"""What is particular to a family of models, as data: classes, parts, configurations and schedulers of the released ones."""

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

import torch

from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.flatvae import FlatVAE
from nanodiff.models.labels import LabelEncoder
from nanodiff.models.mmdit import SD3Transformer2DModel
from nanodiff.models.t5 import T5EncoderModel
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.models.vae import AutoencoderKL

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
_REFINER_UNET = _XL_UNET | {
    "block_out_channels": [384, 768, 1536, 1536],
    "down_block_types": ["DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"],
    "up_block_types": ["UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"],
    "cross_attention_dim": 1280,
    "attention_head_dim": [6, 12, 24, 24],
    "transformer_layers_per_block": 4,
    "projection_class_embeddings_input_dim": 2560,
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
    "SDXL refiner": (
        "SDXL refiner",
        {"unet": _REFINER_UNET, "vae": _VAE | {"scaling_factor": 0.13025, "force_upcast": True}, "text_encoder_2": _G | _PROJECTED},
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

CLIP = ("CLIPTextModel", "CLIPTextModelWithProjection")
CLIP_TOKENIZER = ("CLIPTokenizer", "CLIPTokenizerFast")
CLASSES = {  # what model_index.json may name; everything else there is optional (safety checker) or unsupported
    "unet": ("UNet2DConditionModel",),
    "transformer": ("SD3Transformer2DModel",),
    "vae": ("AutoencoderKL", "FlatVAE"),
    "text_encoder": (*CLIP, "LabelEncoder"),
    "text_encoder_2": CLIP,
    "text_encoder_3": ("T5EncoderModel",),
    "tokenizer": (*CLIP_TOKENIZER, "LabelTokenizer"),
    "tokenizer_2": CLIP_TOKENIZER,
    "tokenizer_3": ("T5Tokenizer", "T5TokenizerFast"),
}
BUILDERS = {
    "unet": UNet2DConditionModel,
    "transformer": SD3Transformer2DModel,
    "vae": AutoencoderKL,
    "text_encoder": CLIPTextModel,
    "text_encoder_2": CLIPTextModel,
    "text_encoder_3": T5EncoderModel,
}
OWN = {"FlatVAE": FlatVAE, "LabelEncoder": LabelEncoder}  # classes of ours that no Hub model has
RELEASED = {  # Hub ids whose configurations are built in (KNOWN)
    "CompVis/stable-diffusion-v1-4": "SD 1",
    "stable-diffusion-v1-5/stable-diffusion-v1-5": "SD 1",
    "stabilityai/stable-diffusion-2-1": "SD 2",
    "stabilityai/stable-diffusion-2-1-base": "SD 2 base",
    "stable-diffusion-v1-5/stable-diffusion-inpainting": "SD 1 inpainting",
    "stabilityai/stable-diffusion-2-inpainting": "SD 2 base inpainting",
    "diffusers/stable-diffusion-xl-1.0-inpainting-0.1": "SDXL inpainting",
    "stabilityai/sd-turbo": "SD 2 turbo",
    "stabilityai/stable-diffusion-xl-base-1.0": "SDXL",
    "stabilityai/stable-diffusion-xl-refiner-1.0": "SDXL refiner",
    "stabilityai/sdxl-turbo": "SDXL turbo",
    "stabilityai/stable-diffusion-3-medium-diffusers": "SD 3 medium",
    "stabilityai/stable-diffusion-3.5-medium": "SD 3.5 medium",
    "stabilityai/stable-diffusion-3.5-large": "SD 3.5 large",
    "stabilityai/stable-diffusion-3.5-large-turbo": "SD 3.5 large",
}
IGNORED = {"safety_checker", "feature_extractor", "image_encoder", "scheduler", "requires_safety_checker"}


@dataclass(frozen=True)
class Family:
    """What is particular to a family of models, apart from how a prompt becomes its condition (a class beside base.py's)."""

    name: str
    kinds: tuple  # what model_index.json may call a pipeline of it; the first is what we write
    denoiser: str  # the part's name
    encoders: tuple = ("text_encoder",)
    tokenizers: tuple = ("tokenizer",)
    optional: tuple = ("vae",)  # parts that it can do without
    text_length: int = 77  # tokens of text that its denoiser attends to
    settings: Callable = lambda cfg: (50, 7.5)  # its denoiser's configuration -> (steps, guidance scale), its makers'
    turbo_steps: int = 1
    half: torch.dtype = torch.float16  # the half precision it was made for
    keeps_size: bool = True  # image-to-image takes the size of its picture, as in diffusers
    sizes: int = 0  # numbers of SDXL's size condition
    strength: float = 0.8  # how much sample.py's image-to-image repaints, its makers'
    flags: dict = field(default_factory=dict)  # what model_index.json says of it
    skips_layers: bool = False  # SD 3's skip-layer guidance

    @property
    def required(self):
        return tuple(n for n in (self.denoiser, "vae", *self.encoders, *self.tokenizers) if n not in self.optional)


def _sd3_settings(cfg):
    """SD 3.0 medium has no q/k norm, 3.5 medium a second attention in its first blocks, 3.5 large neither."""
    return (40, 4.5) if cfg.dual_attention_layers else (28, 3.5) if cfg.qk_norm else (28, 7.0)


def _sd_settings(cfg):
    """A latent consistency model is told its guidance, and needs few steps."""
    return (4, 8.5) if getattr(cfg, "time_cond_proj_dim", None) else (50, 7.5)


SD = Family("SD", ("StableDiffusionPipeline", "StableDiffusionImg2ImgPipeline", "StableDiffusionInpaintPipeline",
                   "LatentConsistencyModelPipeline"), "unet", settings=_sd_settings)  # fmt: skip
SDXL = Family(
    "SDXL",
    ("StableDiffusionXLPipeline", "StableDiffusionXLImg2ImgPipeline", "StableDiffusionXLInpaintPipeline"),
    "unet",
    ("text_encoder", "text_encoder_2"),
    ("tokenizer", "tokenizer_2"),
    optional=(),
    sizes=6,
    settings=_sd_settings,
)
REFINER = Family(
    "SDXL refiner",
    ("StableDiffusionXLImg2ImgPipeline",),
    "unet",
    ("text_encoder_2",),
    ("tokenizer_2",),
    optional=(),
    sizes=5,
    strength=0.3,
    flags={
        "requires_aesthetics_score": True,
        "force_zeros_for_empty_prompt": False,
        "text_encoder": [None, None],
        "tokenizer": [None, None],
    },
)
SD3 = Family(
    "SD3",
    ("StableDiffusion3Pipeline", "StableDiffusion3Img2ImgPipeline", "StableDiffusion3InpaintPipeline"),
    "transformer",
    ("text_encoder", "text_encoder_2", "text_encoder_3"),
    ("tokenizer", "tokenizer_2", "tokenizer_3"),
    optional=("text_encoder_3", "tokenizer_3"),
    text_length=77 + 256,
    settings=_sd3_settings,
    turbo_steps=4,
    half=torch.bfloat16,
    keeps_size=False,
    skips_layers=True,
)
MMDIT = Family("MMDiT", ("NanodiffMMDiTPipeline",), "transformer", half=torch.bfloat16, keeps_size=False)
# by what model_index.json calls a pipeline
FAMILIES = {kind: family for family in (SD, SDXL, SD3, MMDIT) for kind in family.kinds}
FAMILIES |= {REFINER.name: REFINER}  # which shares its class with SDXL's image-to-image, and is told by its flag
# the field of model_index.json with the steps and guidance that a model of ours was trained to be sampled with
SAMPLING = "_sampling"


def is_turbo(raw: dict, name: str) -> bool:
    """Is this an adversarially distilled model? sd-turbo and sdxl-turbo are told by the scheduler that only they ship:
    Euler, "trailing", ε (v-prediction models with zero terminal SNR are "trailing" too). SD 3.5 large-turbo's files are
    those of large in all but their values, so there the model's name must tell. raw: its scheduler_config.json."""
    kind = raw.get("_class_name", "")
    if kind.startswith("FlowMatch"):
        return "turbo" in Path(name).name.lower()
    plain = raw.get("prediction_type", "epsilon") == "epsilon" and not raw.get("rescale_betas_zero_snr")
    return kind.startswith("Euler") and raw.get("timestep_spacing") == "trailing" and plain
