"""What train.py's VAE loop needs beside the loop: perceptual loss, sheets, the latents' scale, advice.

Explained in the book (docs/book): chapter 8.
"""

import math

import numpy as np
import torch

from nanodiff import weights
from nanodiff.config import UserError, read_json
from nanodiff.device import choice, dist
from nanodiff.diffusion import objective
from nanodiff.files import write_folder
from nanodiff.models import lpips, patchgan
from nanodiff.output import images
from nanodiff.pipeline import sources
from nanodiff.stories.training import advice_loss, spread
from nanodiff.training import build, loader


def planned(cfg):
    """(fields, the VAE on the meta device): --model's, or a new one's. Settles cfg.resolution, which may be the model's own."""
    if cfg.model:
        for name in ("model_config", "latent_dim"):
            if getattr(cfg, name):
                raise UserError(f"`{name}` is for a new VAE; `model` brings its own")
        raw = read_json(sources.vae_folder(cfg.model) / "config.json")
        cfg.resolution = cfg.resolution or raw.get("sample_size", 64)
    elif cfg.latent_dim:
        raw = {"sample_size": cfg.resolution, "latent_dim": cfg.latent_dim}
    else:
        raw = read_json(cfg.model_config) if cfg.model_config else build.NANO_VAE
    return raw, build.vae_skeleton(raw, cfg.resolution)


def begin(cfg, raw, net):
    """planned()'s VAE with weights: --model's, in fp32, or new ones by PyTorch's defaults."""
    if cfg.model:
        return sources.load_vae(cfg.model, torch.float32, "cpu").requires_grad_(True).train()
    return type(net)(type(net).Config.from_json(raw))


def latent_shape(cfg, net):
    size = cfg.resolution // net.cfg.downscale
    return net.cfg.latent_channels, size, size


def make_perceptual(cfg, device):
    """f(a, b) -> [B], or None. Raises UserError when the weights are not there."""
    if not (cfg.perceptual and cfg.perceptual_weight):
        return None
    if not cfg.vgg_weights:
        raise UserError(
            "the perceptual loss needs VGG16's weights: --vgg-weights FILE (torchvision's vgg16-397923af.pth as safetensors: "
            "python -m nanodiff.weights convert vgg16-397923af.pth vgg16.safetensors --allow-pickle), or --no-perceptual"
        )
    if cfg.lpips_weights:
        return lpips.load_lpips(cfg.vgg_weights, cfg.lpips_weights).to(device)
    return lpips.load_vgg(cfg.vgg_weights).to(device).features_mse


def losses(cfg, net, nets, calls, perceptual, device):
    """f(batch, KL's weight, has the discriminator begun to count?) -> (loss, {part: number}) of a micro-batch. net: the VAE; nets: what
    is trained; calls: what to call in place of each of them; perceptual: make_perceptual()'s."""
    shape = latent_shape(cfg, net)

    def of(batch, kl_weight, gan):
        pixels = batch.pixels.to(device)
        noise = objective.draw(cfg.seed, "posterior", batch.indices, lambda g: torch.randn(shape, generator=g))
        loss, parts, made = objective.vae(calls["vae"], pixels, noise.to(device), kl_weight, cfg.l1, cfg.free_bits)
        if perceptual:
            distance = perceptual(made, pixels).mean()
            loss, parts["perceptual"] = loss + cfg.perceptual_weight * distance, distance
        if cfg.discriminator_weight:
            if gan:
                parts["generator"] = patchgan.generator_loss(nets["discriminator"], made)
                loss = loss + cfg.discriminator_weight * parts["generator"]
            parts["discriminator"] = patchgan.discriminator_loss(calls["discriminator"], pixels, made)
            loss = loss + parts["discriminator"]
        # what epochs are compared by: always the final weight, whatever the warm-up and --kl-target make of it, and no opponent
        parts["judged"] = parts["reconstruction"] + cfg.kl_weight * parts["kl"] / pixels[0].numel()
        parts["judged"] = parts["judged"] + cfg.perceptual_weight * parts.get("perceptual", 0)
        return loss, parts

    return of


def pictures_of(dataset, cfg):
    """f(positions) -> pixels [B, 3, R, R] as they are, unreadable ones replaced where --on-bad-image says so."""
    transform = loader.Transform(cfg.resolution, interpolation=cfg.interpolation)
    decoder = loader.Decoder(dataset, transform, cfg.seed, cfg.on_bad_image)

    def batch(positions):
        arrays = [decoder.some(p, None, {}, decoder.size(p))[1] for p in positions]
        return torch.from_numpy(np.stack(arrays)).float() / 127.5 - 1

    return batch


def vae_sheets(run, net, dataset, cfg, step):
    """Pictures above their reconstructions, and pictures decoded from pure noise."""
    shown = pictures_of(dataset, cfg)(spread(dataset, 16)).to(run.device)
    noise = torch.randn((16, *latent_shape(cfg, net)), generator=torch.Generator().manual_seed(0)).to(run.device)
    pair = torch.cat([shown, net.decode_raw(net.encode_moments(shown)[0])])
    for name, pixels, nrow in (("reconstructions", pair, len(shown)), ("samples", net.decode_raw(noise), 8)):
        path = run.named(name, step)
        images.save_grid(pixels, path, nrow=nrow)
        run.watch.picture(step, name, images.open_image(path))


def write_vae(run, net, dataset, cfg, name):
    """The averaged VAE as a Hub component folder, with the latents' scale measured on the data."""
    with run.averaged():

        def write():
            net.cfg.scaling_factor = latent_scale(net, dataset, cfg, run.device)
            write_folder(run.out / name, lambda folder: weights.save(net, folder, choice.DTYPES[cfg.save_dtype]))

        dist.on_main(write)
        run.link(name)
        run.record.file(run.out / name)


def latent_scale(net, dataset, cfg, device):
    """1 / standard deviation of the posterior mean over up to 1,024 pictures (Rombach et al. 2022, appendix G)."""
    pictures, some = pictures_of(dataset, cfg), spread(dataset, 1024)
    parts = [some[i : i + cfg.batch_size] for i in range(0, len(some), cfg.batch_size)]
    means = [net.encode_moments(pictures(part).to(device))[0] for part in parts]
    return round(1 / torch.cat(means).std().item(), 5)


def measure_psnr(net, dataset, cfg, device):
    """Mean squared error of up to 64 reconstructions in decibels, values of a picture spanning 2."""
    pictures, some, total = pictures_of(dataset, cfg), spread(dataset, 64), 0.0
    for i in range(0, len(some), cfg.batch_size):
        shown = pictures(some[i : i + cfg.batch_size]).to(device)
        made = net.decode_raw(net.encode_moments(shown)[0]).clamp(-1, 1)
        total += (made - shown).pow(2).flatten(1).mean(1).sum().item() / 4
    return -10 * math.log10(max(total / len(some), 1e-12))


def advice_vae(run, cfg):
    """What the numbers say about the settings (S2's table of troubles)."""
    last = run.numbers or {}
    if cfg.model:
        old, new = (
            read_json(folder / "config.json").get("scaling_factor", 0.18215)
            for folder in (sources.vae_folder(cfg.model), run.out / "model")
        )
        if old != new:
            dist.say(
                f"note: scaling_factor is {new:g} on these pictures, {old:g} in {cfg.model}: a denoiser that was trained with the older VAE "
                f"wants the older number (model/config.json)"
            )
    if cfg.kl_target and last and not 0.5 < last["kl"] / cfg.kl_target < 2:
        low = last["kl"] < cfg.kl_target
        dist.say(
            f"note: KL {last['kl']:.3g} nats is too {'low' if low else 'high'} for --kl-target {cfg.kl_target:g}: train longer, or "
            f"{'lower' if low else 'raise'} --kl-weight (now {cfg.kl_weight:g}); a longer --kl-warmup makes it steadier"
        )
    advice_loss(run)
