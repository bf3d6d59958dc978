"""The noise schedule: how much noise at which time, and the four things a network can predict.

Diffusion (DDPM, Ho et al. 2020, arXiv 2006.11239 eq. 4), with ᾱ = alphas_cumprod:
    x_t = √ᾱ_t · x0 + √(1-ᾱ_t) · ε                 α = √ᾱ, s = √(1-ᾱ), σ = s/α (k-diffusion's noise level)
    ε-prediction: ε      x0-prediction ("sample"): x0      v-prediction: v = α·ε - s·x0 (Salimans & Ho 2022 App. D)
Flow matching (Lipman et al. 2023; Esser et al. 2024, arXiv 2403.03206 eq. 1-2):
    x_σ = (1-σ) · x0 + σ · ε                        velocity = dx/dσ = ε - x0

Everything comes from a Hub `scheduler_config.json`; its `_class_name` also names the model's own sampler. Fields
that class knows are honoured or refused by name; fields of other classes are left alone, as diffusers does (they
come along when one class is exchanged for another).
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from nanodiff.config import UserError, nearest

MAX_TRAIN_STEPS = 100_000

# Defaults that a class uses when its config does not say (they differ between classes).
_DIFFUSION = {
    "num_train_timesteps": 1000,
    "beta_start": 0.0001,
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "trained_betas": None,
    "prediction_type": "epsilon",
    "timestep_spacing": "leading",
    "steps_offset": 0,
}
_CLIPPING = {
    "clip_sample": True,
    "clip_sample_range": 1.0,
    "thresholding": False,
    "dynamic_thresholding_ratio": 0.995,
    "sample_max_value": 1.0,
    "rescale_betas_zero_snr": False,
}
_SIGMAS = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
DEFAULTS = {
    "DDPMScheduler": _DIFFUSION | _CLIPPING | {"variance_type": "fixed_small"},
    "DDIMScheduler": _DIFFUSION | _CLIPPING | {"set_alpha_to_one": True},
    "PNDMScheduler": _DIFFUSION | {"set_alpha_to_one": False, "skip_prk_steps": False},
    "EulerDiscreteScheduler": _DIFFUSION
    | _SIGMAS
    | {
        "timestep_spacing": "linspace",
        "interpolation_type": "linear",
        "sigma_min": None,
        "sigma_max": None,
        "timestep_type": "discrete",
        "final_sigmas_type": "zero",
        "rescale_betas_zero_snr": False,
    },
    "EulerAncestralDiscreteScheduler": _DIFFUSION | {"timestep_spacing": "linspace", "rescale_betas_zero_snr": False},
    "HeunDiscreteScheduler": _DIFFUSION
    | _SD_BETAS
    | _SIGMAS
    | {"timestep_spacing": "linspace", "clip_sample": False, "clip_sample_range": 1.0},
    "DPMSolverMultistepScheduler": _DIFFUSION
    | _SIGMAS
    | {
        "timestep_spacing": "linspace",
        "solver_order": 2,
        "thresholding": False,
        "dynamic_thresholding_ratio": 0.995,
        "sample_max_value": 1.0,
        "algorithm_type": "dpmsolver++",
        "solver_type": "midpoint",
        "lower_order_final": True,
        "euler_at_final": False,
        "use_lu_lambdas": False,
        "use_flow_sigmas": False,
        "flow_shift": 1.0,
        "final_sigmas_type": "zero",
        "lambda_min_clipped": -math.inf,
        "variance_type": None,
        "rescale_betas_zero_snr": False,
        "use_dynamic_shifting": False,
        "time_shift_type": "exponential",
    },
    "LCMScheduler": _DIFFUSION
    | _SD_BETAS
    | _CLIPPING
    | {
        "beta_schedule": "scaled_linear",
        "clip_sample": False,
        "set_alpha_to_one": True,
        "original_inference_steps": 50,
        "timestep_scaling": 10.0,
    },
    "FlowMatchEulerDiscreteScheduler": {
        "num_train_timesteps": 1000,
        "shift": 1.0,
        "use_dynamic_shifting": False,
        "base_shift": 0.5,
        "max_shift": 1.15,
        "base_image_seq_len": 256,
        "max_image_seq_len": 4096,
        "invert_sigmas": False,
        "shift_terminal": None,
        "use_karras_sigmas": False,
        "use_exponential_sigmas": False,
        "use_beta_sigmas": False,
        "time_shift_type": "exponential",
        "stochastic_sampling": False,
    },
}
DEFAULTS["FlowMatchHeunDiscreteScheduler"] = DEFAULTS["FlowMatchEulerDiscreteScheduler"]
SPACES = {  # what each class counts its steps in: timesteps of the training, noise levels σ = s/α of its ODE, or the σ of a flow
    "DDPMScheduler": "timestep",
    "DDIMScheduler": "timestep",
    "PNDMScheduler": "timestep",
    "LCMScheduler": "timestep",
    "EulerDiscreteScheduler": "sigma",
    "EulerAncestralDiscreteScheduler": "sigma",
    "HeunDiscreteScheduler": "sigma",
    "DPMSolverMultistepScheduler": "sigma",
    "FlowMatchEulerDiscreteScheduler": "flow",
    "FlowMatchHeunDiscreteScheduler": "flow",
}
# Values that a class accepts. "fixed_large_log" is refused because its formula in diffusers gives NaN.
CHOICES = {
    "beta_schedule": ("linear", "scaled_linear", "squaredcos_cap_v2", "sigmoid"),
    "prediction_type": ("epsilon", "sample", "v_prediction", "flow"),
    "timestep_spacing": ("linspace", "leading", "trailing"),
    "variance_type": ("fixed_small", "fixed_small_log", "fixed_large", None),
    "interpolation_type": ("linear", "log_linear"),
    "timestep_type": ("discrete",),
    "final_sigmas_type": ("zero", "sigma_min"),
    "algorithm_type": ("dpmsolver++", "dpmsolver", "sde-dpmsolver++", "sde-dpmsolver"),
    "solver_type": ("midpoint", "heun"),
    "solver_order": (1, 2, 3),
    "time_shift_type": ("exponential", "linear"),
    "lambda_min_clipped": (-math.inf, "-inf"),
    "use_beta_sigmas": (False,),
    "use_lu_lambdas": (False,),
    "use_flow_sigmas": (False,),
    "invert_sigmas": (False,),
}


def betas_of(cfg):
    """β_1..β_T in fp32, from a config dict. The computation follows the files' authors, in fp32."""
    n, start, end, kind = cfg["num_train_timesteps"], cfg["beta_start"], cfg["beta_end"], cfg["beta_schedule"]
    if cfg["trained_betas"] is not None:
        return torch.tensor(cfg["trained_betas"], dtype=torch.float32)
    if kind == "linear":
        return torch.linspace(start, end, n, dtype=torch.float32)
    if kind == "scaled_linear":  # linear in √β: latent diffusion's schedule
        return torch.linspace(start**0.5, end**0.5, n, dtype=torch.float32) ** 2
    if kind == "sigmoid":
        return torch.sigmoid(torch.linspace(-6, 6, n)) * (end - start) + start

    def alpha_bar(u):  # cosine schedule: Nichol & Dhariwal 2021, arXiv 2102.09672 eq. 17
        return math.cos((u + 0.008) / 1.008 * math.pi / 2) ** 2

    return torch.tensor(
        [min(1 - alpha_bar((i + 1) / n) / alpha_bar(i / n), 0.999) for i in range(n)], dtype=torch.float32
    )


def zero_terminal_snr(betas):
    """β such that ᾱ_T = 0, with ᾱ_1 kept: √ᾱ shifted and stretched (Lin et al. 2024, arXiv 2305.08891 Alg. 1)."""
    root = (1.0 - betas).cumprod(0).sqrt()
    first, last = root[0].clone(), root[-1].clone()
    alphas_cumprod = ((root - last) * (first / (first - last))) ** 2
    return 1 - torch.cat([alphas_cumprod[:1], alphas_cumprod[1:] / alphas_cumprod[:-1]])


@dataclass
class Schedule:
    """One scheduler_config.json. `kind` is its `_class_name`, `cfg` its fields over that class's defaults, and
    `raw` everything the file said (so that another class can be built from it)."""

    kind: str
    cfg: dict
    raw: dict = dataclasses.field(default_factory=dict)

    @classmethod
    def from_config(cls, raw, kind=None, where="scheduler_config.json", **overrides):
        """raw: the JSON dict. kind: another class for the same model. overrides: fields that win over the file."""
        raw = {k: v for k, v in raw.items() if v is not None or k == "trained_betas"} | overrides
        kind = kind or raw.get("_class_name")
        if kind not in DEFAULTS:
            raise UserError(f"{where}: scheduler {kind!r} is not supported{nearest(kind, DEFAULTS)}")
        known = {field for fields in DEFAULTS.values() for field in fields}
        for key in raw:
            if not key.startswith("_") and key not in known:
                raise UserError(f"{where}: unknown field {key!r} (value {raw[key]!r}){nearest(key, known)}")
        cfg = DEFAULTS[kind] | {k: v for k, v in raw.items() if k in DEFAULTS[kind]}
        for key, allowed in CHOICES.items():
            if key in cfg and cfg[key] not in allowed:
                names = ", ".join(str(a) for a in allowed)
                raise UserError(f"{where}: {key} = {cfg[key]!r} is not supported for {kind} (only {names})")
        if not isinstance(cfg["num_train_timesteps"], int) or not 1 <= cfg["num_train_timesteps"] <= MAX_TRAIN_STEPS:
            raise UserError(f"{where}: num_train_timesteps = {cfg['num_train_timesteps']!r} is out of range")
        if sum(bool(cfg.get(f"use_{k}_sigmas")) for k in ("karras", "exponential", "beta")) > 1:
            raise UserError(f"{where}: only one of use_karras_sigmas and use_exponential_sigmas can be set")
        self = cls(kind, cfg, raw)
        if cfg.get("rescale_betas_zero_snr") and cfg["prediction_type"] == "epsilon":
            raise UserError(
                f"{where}: rescale_betas_zero_snr with ε-prediction: at ᾱ = 0 the noise says nothing about x0"
            )
        return self

    def __post_init__(self):
        self.T = self.cfg["num_train_timesteps"]
        self.space = SPACES[self.kind]
        self.flow = self.space == "flow"
        self.prediction = "flow" if self.flow else self.cfg["prediction_type"]
        if self.flow:
            return
        betas = betas_of(self.cfg)
        if self.cfg.get("rescale_betas_zero_snr"):
            betas = zero_terminal_snr(betas)
        self.alphas_cumprod = (1.0 - betas).cumprod(0)  # [T], ᾱ_0 .. ᾱ_{T-1}
        if self.cfg.get("rescale_betas_zero_snr"):
            # σ-space samplers need a finite σ_max: they put the smallest ᾱ that fp16 can hold in place of 0.
            self.alphas_cumprod[-1] = 2**-24 if self.space == "sigma" else 0.0

    def to_json(self):
        """scheduler_config.json, complete (no reader needs to know our defaults)."""
        cfg = {k: v for k, v in self.cfg.items() if v not in (-math.inf, None)}
        return {"_class_name": self.kind, **cfg}

    # -- time ----------------------------------------------------------------------------------------------

    def spaced(self, n, dtype=np.int64):
        """n timesteps from noisy to clean, by the config's spacing (Lin et al. 2024, table 2)."""
        spacing, T = self.cfg["timestep_spacing"], self.T
        if spacing == "linspace":
            t = np.linspace(0, T - 1, n, dtype=np.float32 if dtype != np.int64 else np.float64)[::-1]
            return (t if dtype != np.int64 else t.round()).astype(dtype)
        if spacing == "leading":
            t = leading(np.arange(n)[::-1] * (T // n), self.cfg["steps_offset"], T)
        else:
            t = (T - np.arange(n) * (T / n)).round() - 1  # np.arange(T, 0, -T/n) has n+1 entries for some n
        return t.astype(dtype)

    def alpha_bar(self, t):
        """ᾱ at timestep t as a Python float; 1 before the first (t < 0)."""
        return float(self.alphas_cumprod[int(t)]) if t >= 0 else 1.0

    def final_alpha_bar(self):
        """ᾱ "before" timestep 0 for DDIM and PNDM: 1, or ᾱ_0 when set_alpha_to_one is false."""
        return 1.0 if self.cfg["set_alpha_to_one"] else float(self.alphas_cumprod[0])

    def all_sigmas(self):
        """σ of every training timestep, ascending, in fp32."""
        abar = self.alphas_cumprod
        return (((1 - abar) / abar) ** 0.5).numpy()

    # -- the forward process (training, image-to-image) ------------------------------------------------------

    def coefficients(self, t, like):
        """(signal, noise) coefficients for timesteps t [B], shaped to multiply `like`; flow: t in [0, T] is 1000·σ."""
        shape = (-1,) + (1,) * (like.dim() - 1)
        if self.flow:
            sigma = (t.to(like.device).float() / self.T).view(shape)
            return (1 - sigma).to(like.dtype), sigma.to(like.dtype)
        abar = self.alphas_cumprod.to(like.device)[t.long().to(like.device)].view(shape)
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def add_noise(self, x0, noise, t):
        """A sample of q(x_t | x0), for timesteps t [B]."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * noise

    def target(self, x0, noise, t):
        """What the network should predict at x_t."""
        if self.prediction == "epsilon":
            return noise
        if self.prediction == "sample":
            return x0
        if self.prediction == "flow":
            return noise - x0
        a, s = self.coefficients(t, x0)
        return a * noise - s * x0

    def to_x0_eps(self, prediction, x, t):
        """(x0, ε) that a prediction at x_t, t [B], stands for."""
        a, s = self.coefficients(t, x)
        return split(self.prediction, prediction, x, a, s)

    def snr(self, t):
        """Signal-to-noise ratio ᾱ / (1-ᾱ) of timesteps t [B]."""
        if self.flow:
            sigma = t.float() / self.T
            return ((1 - sigma) / sigma) ** 2
        abar = self.alphas_cumprod.to(t.device)[t.long()]
        return abar / (1 - abar)


def leading(t, offset, T):
    """A "leading" grid with its offset, lowered where that asks for timestep T: no model knows it, diffusers fails."""
    return t + min(offset, T - 1 - int(t.max()))


def split(kind, prediction, x, a, s):
    """(x0, ε) from a network's prediction at x = a·x0 + s·ε. The one place where prediction types differ."""
    if kind == "epsilon":
        return (x - s * prediction) / a, prediction
    if kind == "sample":
        return prediction, (x - a * prediction) / s
    if kind == "v_prediction":
        return a * x - s * prediction, a * prediction + s * x
    if kind == "flow":
        return x - s * prediction, x + (1 - s) * prediction
    raise ValueError(f"unknown prediction type {kind!r}")
