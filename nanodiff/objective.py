"""Training losses: what is drawn, what is predicted, how it is weighted.

Diffusion: E_{x0, t, ε} w(t) ‖ f(x_t, t) - target ‖²  (Ho et al. 2020 eq. 14, w = 1). min-SNR-γ: w = min(SNR, γ)
divided by what the target's own scale already gives (Hang et al. 2023, arXiv 2303.09556 eq. 8-9).
VAE: reconstruction + KL weight · KL(q(z|x) ‖ N(0, I))  (Kingma & Welling 2014 eq. 10).

Every random draw is a function of (seed, global index of the sample), so the same samples are drawn in every run,
on any number of processes, and a resumed run continues the stream exactly.
"""

import hashlib

import torch

STREAMS = ("timestep", "noise", "dropout", "posterior", "order", "flip", "sample")


def generator(seed, stream, index):
    """A CPU generator for one draw: a function of the run's seed, the purpose and the global sample index."""
    if stream not in STREAMS:
        raise ValueError(f"unknown stream {stream!r}")
    digest = hashlib.blake2b(f"{seed}/{stream}/{index}".encode(), digest_size=8).digest()
    return torch.Generator().manual_seed(int.from_bytes(digest, "little") >> 1)


def draw(seed, stream, indices, make):
    """make(generator) for each global sample index, stacked: [B, …]."""
    return torch.stack([make(generator(seed, stream, i)) for i in indices])


def timesteps(schedule, seed, indices, logit_normal=False):
    """One timestep per sample [B]: uniform, or for flow matching σ = sigmoid(N(0, 1)) (Esser et al. 2024 eq. 19)."""
    if schedule.flow:
        u = draw(
            seed,
            "timestep",
            indices,
            lambda g: torch.randn((), generator=g).sigmoid() if logit_normal else torch.rand((), generator=g),
        )
        return u * schedule.T
    return draw(seed, "timestep", indices, lambda g: torch.randint(schedule.T, (), generator=g))


def weight(schedule, t, min_snr=None):
    """w(t) [B]; 1 without min_snr, else min-SNR-γ with γ = min_snr for the schedule's prediction type."""
    if min_snr is None:
        return torch.ones(len(t), device=t.device)
    snr = schedule.snr(t)
    clipped = snr.clamp(max=min_snr)
    # The target's own weight in terms of an x0 loss: ε 1/SNR, x0 1, v 1/(SNR+1), flow 1/(√SNR+1)² · …
    if schedule.prediction == "epsilon":
        return clipped / snr
    if schedule.prediction == "sample":
        return clipped
    if schedule.prediction == "v_prediction":
        return clipped / (snr + 1)
    return clipped / (snr.sqrt() + 1) ** 2  # ‖ε-x0‖² error = (1+1/√SNR)² ‖x0‖² error · SNR-free


def diffusion(model, schedule, x0, noise, t, min_snr=None):
    """(weighted loss, unweighted loss), both scalars. model(x_t, t) -> prediction; x0, noise [B, …], t [B]."""
    prediction = model(schedule.add_noise(x0, noise, t), t)
    error = (prediction.float() - schedule.target(x0, noise, t).float()).pow(2).flatten(1).mean(1)
    return (weight(schedule, t, min_snr) * error).mean(), error.detach().mean()


def kl(mean, logvar):
    """KL(N(mean, exp(logvar)) ‖ N(0, I)) of each sample, summed over its dimensions: [B]."""
    return 0.5 * (mean.pow(2) + logvar.exp() - 1 - logvar).flatten(1).sum(1)


def vae(model, pixels, noise, kl_weight, l1=True):
    """(loss, parts) of an AutoencoderKL: mean absolute (or squared) error per value + kl_weight · KL per value."""
    mean, logvar = model.encode_moments(pixels)
    reconstruction = model.decode_raw(mean + (0.5 * logvar).exp() * noise)
    error = (reconstruction.float() - pixels.float()).abs() if l1 else (reconstruction.float() - pixels.float()).pow(2)
    divergence = kl(mean.float(), logvar.float()).mean() / pixels[0].numel()
    loss = error.mean() + kl_weight * divergence
    return loss, {"reconstruction": error.detach().mean(), "kl": divergence.detach()}
