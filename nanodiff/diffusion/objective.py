"""Training losses: what is drawn, what is predicted, how it is weighted.

Diffusion: E_{x0, t, ε} w(t) ‖ f(x_t, t) - target ‖²  (Ho et al. 2020 eq. 14, w = 1). min-SNR-γ: w = min(SNR, γ)
divided by what the target's own scale already gives (Hang et al. 2023, arXiv 2303.09556 eq. 8-9).
VAE: reconstruction + KL weight · KL(q(z|x) ‖ N(0, I))  (Kingma & Welling 2014 eq. 10).

Generalised SNR weighting (`min_snr`): whatever is predicted, the error in x0 weighs min(SNR, γ); γ = ∞ is plain ε-loss.

Every random draw is a function of (seed, global index of the sample), so the same samples are drawn in every run,
on any number of processes, and a resumed run continues the stream exactly.

Explained in the book (docs/book): chapters 2, 8, 11 and 16.
"""

import hashlib
import math

import torch

from nanodiff.config import UserError, nearest

STREAMS = ("timestep", "noise", "dropout", "posterior", "offset", "caption", "sample", "adapter")


def generator(seed, stream, index):
    """A CPU generator for one draw: a function of the run's seed, the purpose and the global sample index."""
    if stream not in STREAMS:
        raise ValueError(f"unknown stream {stream!r}")
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(seed, stream, indices, make):
    """make(generator) for each global sample index, stacked: [B, …]."""
    return torch.stack([make(generator(seed, stream, i)) for i in indices])


def timesteps(schedule, seed, indices, sampling="uniform", mean=0.0, std=1.0, shift=1.0):
    """One timestep per sample [B]: uniform; for flow matching t = 1000·σ, with σ uniform or sigmoid(N(mean, std²))
    (Esser et al. 2024 eq. 19), then shifted towards noise, σ' = shift·σ / (1 + (shift-1)·σ) (eq. 23)."""
    if not schedule.flow:
        return draw(seed, "timestep", indices, lambda g: torch.randint(schedule.T, (), generator=g))
    if sampling == "logit_normal":
        u = draw(seed, "timestep", indices, lambda g: (mean + std * torch.randn((), generator=g)).sigmoid())
    else:
        u = draw(seed, "timestep", indices, lambda g: torch.rand((), generator=g))
    u = shift * u / (1 + (shift - 1) * u)
    return u.clamp(1e-5, 1 - 1e-5) * schedule.T  # at exactly 0 or 1 the ratio of signal and noise has no value


def offset(noise, strength, seed, indices):
    """Noise with a part that is the same for all places of a channel, so that a model learns to change the overall
    brightness (Guttenberg 2023, "Diffusion with offset noise"): noise + strength · N(0, 1) of shape [B, C, 1, 1]."""
    if not strength:
        return noise
    return noise + strength * draw(
        seed, "offset", indices, lambda g: torch.randn((noise.shape[1], 1, 1), generator=g)
    ).to(noise)


def weight(schedule, t, min_snr=None):
    """w(t) [B]; 1 without min_snr, else min-SNR-γ with γ = min_snr for the schedule's prediction type.

    Steps with little noise have a large SNR and pull hardest at x0, though there is nothing left to learn there: γ caps their weight.
    """
    if min_snr is None:
        return torch.ones(len(t), device=t.device)
    snr = schedule.snr(t)
    clipped = snr.clamp(max=min_snr)
    # x0's squared error in terms of the target's: ε 1/SNR, x0 1, v 1/(SNR+1), flow 1/(√SNR+1)²
    if schedule.prediction == "epsilon":
        return clipped / snr
    if schedule.prediction == "sample":
        return clipped
    if schedule.prediction == "v_prediction":
        return clipped / (snr + 1)
    # x0 = x - σ (ε - x0) and 1/σ = 1 + √SNR: its squared error is (1 + √SNR)² times x0's
    return clipped / (snr.sqrt() + 1) ** 2


def squared(error):
    """e²: the bound on the likelihood, simplified (Ho et al. 2020, arXiv 2006.11239 eq. 14)."""
    return error.pow(2)


def absolute(error):
    """|e|."""
    return error.abs()


def pseudo_huber(error, c=0.1):
    """2c (√(e² + c²) - c): e² near 0, 2c |e| far out, so that single bad samples pull less (Khrapov et al. 2024, arXiv 2403.16728)."""
    return 2 * c * ((error.pow(2) + c * c).sqrt() - c)


# of the error, elementwise, by the name on the command line
LOSSES = {"mse": squared, "l1": absolute, "huber": pseudo_huber}


def diffusion(model, schedule, x0, noise, t, min_snr=None, loss="mse"):
    """(weighted loss, unweighted loss), both scalars. model(x_t, t) -> prediction; x0, noise [B, …], t [B]. loss: a name of LOSSES."""
    prediction = model(schedule.add_noise(x0, noise, t), t)
    error = LOSSES[loss](prediction.float() - schedule.target(x0, noise, t).float()).flatten(1).mean(1)
    return (weight(schedule, t, min_snr) * error).mean(), error.detach().mean()


def check_loss(name):
    """Raise UserError for a loss that is none of LOSSES."""
    if name not in LOSSES:
        raise UserError(f"`loss` {name}: is none of {', '.join(LOSSES)}{nearest(name, LOSSES)}")


def kl(mean, logvar):
    """KL(N(mean, exp(logvar)) ‖ N(0, I)) of each sample and channel in nats, summed over places: [B, C]."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).flatten(2).sum(2)


def vae(model, pixels, noise, kl_weight, l1=True, free_bits=0.0):
    """(loss, parts, reconstruction): mean absolute (or squared) error per value + kl_weight · KL in nats per value, so
    that kl_weight 1 is the evidence lower bound of a Laplace (Gaussian) likelihood up to constants.

    model(pixels, noise) -> (reconstruction, mean, logvar). free_bits: nats of each channel that cost nothing (Kingma et al.
    2016, arXiv 1606.04934 eq. 15, per sample). parts: reconstruction, kl (nats a picture, without the gift).
    """
    reconstruction, mean, logvar = model(pixels, noise)
    error = reconstruction.float() - pixels.float()
    error = error.abs() if l1 else error.pow(2)
    nats = kl(mean.float(), logvar.float())
    charged = nats.clamp(min=free_bits) if free_bits else nats
    loss = error.mean() + kl_weight * charged.sum(1).mean() / pixels[0].numel()
    return loss, {"reconstruction": error.mean().detach(), "kl": nats.sum(1).mean().detach()}, reconstruction


def steered(scale, nats, target, speed=0.02):
    """The next factor on the KL weight: it grows while the KL is above `target` nats and falls while it is below, by at
    most `speed` an update (a proportional controller in the log, as in Shao et al. 2020, ControlVAE, arXiv 2004.05988)."""
    push = max(-1.0, min(1.0, nats / target - 1))
    return min(max(scale * math.exp(speed * push), 1e-6), 1e6)
