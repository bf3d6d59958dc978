"""The noise schedule: how much noise at which time, and the four things a network can predict.

Diffusion (DDPM, Ho et al. 2020, arXiv 2006.11239 eq. 4), with ᾱ = alphas_cumprod:
    x_t = √ᾱ_t · x0 + √(1-ᾱ_t) · ε                 α = √ᾱ, s = √(1-ᾱ), σ = s/α (k-diffusion's noise level)
    ε-prediction: ε      x0-prediction ("sample"): x0      v-prediction: v = α·ε - s·x0 (Salimans & Ho 2022 App. D)
Flow matching (Lipman et al. 2023; Esser et al. 2024, arXiv 2403.03206 eq. 1-2):
    x_σ = (1-σ) · x0 + σ · ε                        velocity = dx/dσ = ε - x0

Everything comes from a Hub `scheduler_config.json`; its `_class_name` also names the model's own sampler. Fields
that class knows are honoured or refused by name; fields of other classes are left alone, as diffusers does (they
come along when one class is exchanged for another).

Explained in the book (docs/book): chapters 1, 2 and 3.
"""

import dataclasses
import math
from dataclasses import dataclass

import numpy as np
import torch

from nanodiff.config import UserError, nearest, short, typed
from nanodiff.diffusion.schedule_config import (
    CHOICES,
    DEFAULTS,
    FOREIGN,
    FORMER,
    GRID,
    GRIDS,
    NUMBERS,
    OWN,
    OWN_CHOICES,
    SAME,
    SPACES,
    SPACINGS,
)

OF_ANY = {field for fields in DEFAULTS.values() for field in fields}  # fields that one class or another looks at


def betas_of(cfg):
    """β_1..β_T in fp32, from a config dict. The computation follows the files' authors, in fp32.

    linear          β even from start to end (Ho et al. 2020 §4)
    scaled_linear   √β even: less noise at first, so that latents keep their structure longer (Rombach et al. 2022, their code)
    squaredcos      ᾱ(u) = cos²(π/2 (u + 0.008)/1.008), β = 1 - ᾱ(u')/ᾱ(u): ᾱ falls evenly in the middle (Nichol & Dhariwal 2021 eq. 17)
    """
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
    """β such that ᾱ_T = 0, with ᾱ_1 kept: √ᾱ shifted and stretched (Lin et al. 2024, arXiv 2305.08891 Alg. 1).

    √ᾱ'_t = (√ᾱ_t - √ᾱ_T) √ᾱ_1 / (√ᾱ_1 - √ᾱ_T).  Stable Diffusion's own ᾱ_T is 0.0047: the last step of training still shows the picture's mean
    brightness, sampling begins from none, and so its pictures are all of medium brightness.
    """
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
        if not isinstance(kind, str) or kind not in DEFAULTS:
            raise UserError(
                f"{where}: scheduler {short(kind)} is not supported{nearest(kind, DEFAULTS)} (`scheduler` names another)"
            )
        for key, value in raw.items():
            if key in FORMER and value not in FORMER[key]:
                raise UserError(f"{where}: {key} = {short(value)} is not supported (only {FORMER[key][0]!r})")
            if not key.startswith("_") and key not in OF_ANY | FOREIGN | set(FORMER):
                raise UserError(f"{where}: unknown field {key!r} (value {short(value)}){nearest(key, OF_ANY)}")
        cfg = DEFAULTS[kind] | {k: v for k, v in raw.items() if k in DEFAULTS[kind]}
        for key, values in SAME.get(kind, {}).items():
            cfg[key] = values.get(cfg[key], cfg[key]) if isinstance(cfg[key], str) else cfg[key]
        # see grids.sigma_grid
        _check_values(cfg | {k: raw[k] for k in ("sigma_min", "sigma_max") if k in raw}, kind, where)
        spacings = [k for k in SPACINGS if cfg.get(k)]
        if len(spacings) > 1:
            raise UserError(f"{where}: only one of {' and '.join(spacings)} can be set")
        if (grid := raw.get(GRID)) is not None:
            known = GRIDS["flow"] if SPACES[kind] == "flow" else GRIDS["sigma"]
            if not isinstance(grid, str) or grid not in known:
                raise UserError(f"{where}: {GRID} = {short(grid)} is none of {', '.join(known)}")
            if spacings and SPACES[kind] != "timestep":
                raise UserError(f"{where}: only one of {GRID} and {spacings[0]} can be set")
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

    def knows(self, field):
        """Does its class look at a field of scheduler_config.json? (Ends of σ count for other grids than a class's own, see grids.sigma_grid.)"""
        ends = ("sigma_min", "sigma_max") if self.space == "sigma" else ()
        return field in (*DEFAULTS[self.kind], *ends, OWN, GRID)

    def to_json(self):
        """scheduler_config.json, complete (no reader needs to know our defaults), with what its file said to other classes (`clip_sample` of a PNDM that may
        be drawn by DDIM) and the fields that are ours alone."""
        # diffusers warns of such fields in these, which belong to a student
        alone = self.kind in ("LCMScheduler", "TCDScheduler")
        said = {k: v for k, v in self.raw.items() if k in OF_ANY and not alone} | self.cfg
        ours = {k: self.raw[k] for k in (OWN, GRID) if self.raw.get(k)}
        return {"_class_name": self.kind, **{k: v for k, v in said.items() if v not in (-math.inf, None)}, **ours}

    # -- time ----------------------------------------------------------------------------------------------

    def spaced(self, n, dtype=np.int64):
        """n timesteps from noisy to clean, by the config's spacing (Lin et al. 2024, table 2).

        linspace    round(i (T-1)/(n-1)): both ends, 0 and T - 1
        leading     i ⌊T/n⌋ + steps_offset: the clean end, and hardly ever T - 1, the noisiest
        trailing    T - i T/n - 1: the noisy end, which zero terminal SNR and turbo models need
        """
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
        """(signal, noise) coefficients for timesteps t [B], shaped to multiply `like`; flow: t in [0, T] is 1000·σ.

        Diffusion: (√ᾱ_t, √(1-ᾱ_t)), whose squares add up to 1, so that x_t has the variance of the data; flow: (1-σ, σ), a straight line.
        """
        shape = (-1,) + (1,) * (like.dim() - 1)
        if self.flow:
            sigma = (t.to(like.device).float() / self.T).view(shape)
            return (1 - sigma).to(like.dtype), sigma.to(like.dtype)
        abar = self.alphas_cumprod.to(like.device)[t.long().to(like.device)].view(shape)
        return abar.sqrt().to(like.dtype), (1 - abar).sqrt().to(like.dtype)

    def add_noise(self, x0, noise, t):
        """A sample of q(x_t | x0) = N(√ᾱ_t x0, 1-ᾱ_t), for timesteps t [B]: all steps of the forward process at once (Ho et al. 2020 eq. 4)."""
        a, s = self.coefficients(t, x0)
        return a * x0 + s * noise

    def target(self, x0, noise, t):
        """What the network should predict at x_t; see split() for how each stands for (x0, ε).

        ε is hard where there is little noise to see, x0 where there is little picture; v is ε at one end and -x0 at the other.
        """
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
        """Signal-to-noise ratio ᾱ / (1-ᾱ) of timesteps t [B]; of a flow ((1-σ)/σ)²."""
        if self.flow:
            sigma = t.float() / self.T
            return ((1 - sigma) / sigma) ** 2
        abar = self.alphas_cumprod.to(t.device)[t.long()]
        return abar / (1 - abar)


def _check_values(cfg, kind, where):
    """Every value of a class's fields against its kind and range, in place; UserError says which is wrong."""
    for key, value in cfg.items():
        if key in CHOICES:
            if value not in (known := OWN_CHOICES.get((kind, key), CHOICES[key])):
                names = ", ".join(str(a) for a in known)
                raise UserError(f"{where}: {key} = {short(value)} is not supported for {kind} (only {names})")
        elif key == "trained_betas":
            betas = typed(value, tuple[float, ...] | None, f"{where}: {key}")
            if betas is not None and (len(betas) != cfg["num_train_timesteps"] or not all(0 < b < 1 for b in betas)):
                n = cfg["num_train_timesteps"]
                raise UserError(f"{where}: trained_betas are {len(betas)} numbers; expected {n} between 0 and 1")
            cfg[key] = betas and list(betas)
        elif key == "disable_corrector":
            cfg[key] = list(typed(value, tuple[int, ...], f"{where}: {key}"))
        elif key in NUMBERS:
            hint, low, high = NUMBERS[key]
            cfg[key] = typed(value, hint, f"{where}: {key}")
            if cfg[key] is not None and not low <= cfg[key] <= high:
                raise UserError(f"{where}: {key} = {short(value)} is out of range ({low:g} to {high:g})")
        else:
            cfg[key] = typed(value, bool, f"{where}: {key}")
    if cfg.get("beta_start", 0) > cfg.get("beta_end", 0):
        raise UserError(f"{where}: beta_start = {cfg['beta_start']:g} is larger than beta_end = {cfg['beta_end']:g}")


def leading(t, offset, T):
    """A "leading" grid with its offset, one less where that asks for timestep T: no model knows it, diffusers fails. Raises UserError for an
    offset that leads further out."""
    room = T - 1 - int(t.max())
    if offset > room + 1:
        raise UserError(
            f"steps_offset {offset}: leads to timestep {int(t.max()) + offset} with {len(t)} steps, the model knows {T}"
        )
    return t + min(offset, room)


def split(kind, prediction, x, a, s):
    """(x0, ε) from a network's prediction at x = a·x0 + s·ε. The one place where prediction types differ.

    Each is one more linear equation for the two unknowns, solved with the first:
    epsilon        p = ε                  x0 = (x - s p)/a
    sample         p = x0                 ε = (x - a p)/s
    v_prediction   p = a ε - s x0         x0 = a x - s p,   ε = a p + s x         (as a² + s² = 1)
    flow           p = ε - x0             x0 = x - s p,     ε = x + (1-s) p       (as a = 1 - s)
    """
    if kind == "epsilon":
        return (x - s * prediction) / a, prediction
    if kind == "sample":
        return prediction, (x - a * prediction) / s
    if kind == "v_prediction":
        return a * x - s * prediction, a * prediction + s * x
    if kind == "flow":
        return x - s * prediction, x + (1 - s) * prediction
    raise ValueError(f"unknown prediction type {kind!r}")
