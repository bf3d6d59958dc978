"""Train a VAE or a text-to-image diffusion model, on a laptop or under torchrun on many GPUs.

    python train.py vae       --data assets/emoji/emoji.tar --preset nano --output-dir out/vae
    python train.py diffusion --data assets/emoji/emoji.tar --preset nano --vae out/vae/model --output-dir out/nano
    python train.py diffusion --data my/pictures --preset tiny --max-steps 100 --output-dir out/tiny
    torchrun --standalone --nproc-per-node 2 train.py diffusion --data my/pictures --preset tiny --output-dir out/two
    python train.py diffusion --model stable-diffusion-v1-5/stable-diffusion-v1-5 --lora --data my/pictures --output-dir out/lora
    python train.py diffusion --preset sd15 --world-size 1024 --gpu h100 --batch-size 4 --dry-run

`--resume auto` continues a run that was stopped; on a CPU the result is the same, byte for byte.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.config import UserError, arg, script
from nanodiff.options import Adapters, Noise, Training

# torch is imported inside main(), so that --help answers at once.

LESS_MEMORY = (
    "try a smaller --batch-size with more --grad-accum, a smaller --resolution, --gradient-checkpointing, --mixed-precision "
    "bf16, or --parallel fsdp on several GPUs (--dry-run predicts what fits)"
)


@dataclass
class Common(Training):
    data: str = arg("", "folder, .tar shards, .csv, COCO .json or .parquet of pictures (and captions)",
                    "train-data-dir", "data-dir", "image-dir", "dataset-name")  # fmt: skip
    dataset_config_name: str | None = arg(None, "folder inside --data to use")
    image_column: str | None = arg(None, "column of the file names or pictures in a listing or table")
    caption_column: str | None = arg(None, "column of the captions")
    max_samples: int | None = arg(None, "use only the first N pictures", "max-train-samples")
    base_dir: str = arg(".", "folder that relative paths start from")
    cache_dir: str | None = arg(None, "where encoded pictures and captions are kept; default OUTPUT_DIR/cache")
    resolution: int = arg(64, "pixels along one side", "image-size")
    interpolation: str = arg("lanczos", "how pictures are resized", choices=("lanczos", "bilinear"))
    center_crop: bool = arg(True, "crop the middle; --no-center-crop: anywhere")
    random_flip: bool = arg(False, "mirror half of the pictures")
    random_jitter: float = arg(0.0, "brightness, contrast and saturation times 1 ± this", "color-jitter")
    random_rotate: float = arg(0.0, "turn by up to so many degrees")
    num_workers: int = arg(0, "processes that decode pictures", "dataloader-num-workers")
    on_bad_image: str = arg("stop", "what a picture that cannot be read does: stop the run, or be replaced and counted",
                            choices=("stop", "skip"))  # fmt: skip
    bad_image_limit: float = arg(0.01, "share of such pictures beyond which the run stops anyway")
    validation: float = arg(0.0, "share of the pictures held out; their loss then judges every epoch")
    no_mixed_precision: bool = arg(False, "the same as --mixed-precision no")
    local_rank: int = arg(-1, "set by launchers; torchrun's LOCAL_RANK is what counts")
    enable_xformers_memory_efficient_attention: bool = arg(
        False, "memory-efficient attention: what --kernels auto has anyway"
    )
    save_model_epochs: int = arg(0, "epochs between model folders model-epoch-N; 0 = only the final one")
    keep_best: bool = arg(False, "write best_model after every epoch whose loss is the best so far")
    save_dtype: str = arg("fp32", "type of the written models", choices=("fp32", "fp16", "bf16"))
    sample_every: int = arg(0, "updates between sample sheets; 0 = none")
    save_images_epochs: int = arg(0, "epochs between sample sheets; 0 = none", "sample-epochs")
    push_to_hub: bool = arg(False, "upload the final model")
    hub_model_id: str | None = arg(None, "its name, org/name; default: the output folder's")
    hub_token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)")
    hub_private_repo: bool = arg(False, "upload it privately")
    dry_run: bool = arg(
        False, "print parameters, memory, FLOPs and time, and train nothing (needs no data and no weights)"
    )
    world_size: int = arg(1, "processes that --dry-run plans for")
    gpu: str = arg("h100", "GPU that --dry-run plans for", choices=(
        "a100", "h100", "h200", "b200", "l40s", "rtx4090", "rtx3090", "mi300x", "v100"))  # fmt: skip
    mfu: float = arg(0.4, "share of the GPU's peak that --dry-run expects")

    def check(self):
        for name in ("output_dir",) if self.dry_run else ("data", "output_dir"):
            if not getattr(self, name):
                if name == "output_dir" and self.dry_run:
                    continue
                raise UserError(f"--{name.replace('_', '-')} is required")
        self.check_ranges()
        for name in PATHS:
            if value := getattr(self, name, None):
                setattr(self, name, under(self.base_dir, value))
        for name in ("model", "text_encoder", "resume"):  # may be Hub ids or words, too
            value = getattr(self, name, None)
            if value and Path(under(self.base_dir, value)).exists():
                setattr(self, name, under(self.base_dir, value))
        if getattr(self, "snr_clip", None) and not self.snr_weighting:
            raise UserError("--snr-clip is for --snr-weighting; the clipped weighting of every prediction is --min-snr")
        if self.dataset_config_name:
            self.data = str(Path(self.data) / self.dataset_config_name)
        if self.no_mixed_precision:
            self.mixed_precision = "no"
        if self.push_to_hub:
            from nanodiff import hub

            hub.may_push(self.hub_token)


@dataclass
class VAEConfig(Common):
    model_config: str | None = arg(None, "config.json of an AutoencoderKL or FlatVAE; default: a small f4 one")
    latent_dim: int | None = arg(None, "a VAE whose latent is one vector of this size")
    kl_weight: float = arg(2e-3, "final weight of the KL divergence; 1 is the evidence lower bound per pixel value")
    kl_warmup: int = arg(0, "epochs over which the weight grows from 0")
    kl_target: float | None = arg(None, "nats of KL per picture that the weight is steered to, after the warm-up")
    free_bits: float = arg(0.0, "nats of each latent channel that cost nothing")
    l1: bool = arg(True, "mean absolute error; --no-l1 for squared")
    perceptual: bool = arg(True, "add the perceptual loss, if its weight is not 0")
    perceptual_weight: float = arg(0.0, "weight of the perceptual loss on VGG16's features")
    vgg_weights: str | None = arg(None, "VGG16's weights (torchvision's names, safetensors) for the perceptual loss")
    lpips_weights: str | None = arg(None, "LPIPS's linear layers; without: mean squared difference of features[:16]")
    discriminator_weight: float = arg(0.0, "weight of a patch discriminator's opinion; 0 = none")
    discriminator_start: int = arg(
        0, "update from which the discriminator's opinion counts; it learns from the first on"
    )


@dataclass
class DiffusionConfig(Common, Adapters, Noise):
    vae: str | None = arg(
        None, "folder of a trained VAE: diffusion in its latents; without: in pixels", "vae-checkpoint"
    )
    model: str | None = arg(
        None, "pipeline to go on from (folder or Hub id), in place of a new one", "pretrained-model-name-or-path"
    )
    lora: bool = arg(False, "train low-rank adapters on --model, which stays as it is")
    model_config: str | None = arg(
        None, "config.json of a UNet or MMDiT; default: --model-size's", "model-config-name-or-path"
    )
    model_size: str = arg("tiny", "built-in sizes", choices=("tiny", "nano", "pokemon", "flat", "mmdit-tiny", "mmdit-100m", "sd15",
                                                             "sdxl", "sd35-medium"))  # fmt: skip
    condition: str = arg("text", "what it is told: captions, class labels (folders or .cls), or nothing",
                         choices=("text", "labels", "none"))  # fmt: skip
    text_encoder: str | None = arg(
        None, "a frozen CLIP text encoder, folder or Hub id; default: a small one that learns along"
    )
    text_config: str | None = arg(None, "config.json of the CLIP text encoder that is trained along")
    train_text_encoder: bool = arg(False, "with --model: train its text encoder, too")
    vocab_size: int = arg(1500, "size of the byte-pair vocabulary learned from the captions")
    max_length: int = arg(24, "text tokens")
    prediction_type: str | None = arg(None, "what the network predicts; default: v_prediction, or what --model does",
                                      choices=("epsilon", "sample", "v_prediction", "flow"))  # fmt: skip
    beta_schedule: str = arg("scaled_linear", "noise schedule", "ddpm-beta-schedule", "schedule",
                             choices=("linear", "scaled_linear", "squaredcos_cap_v2", "cosine"))  # fmt: skip
    ddpm_num_steps: int = arg(1000, "timesteps of the noise schedule")
    zero_snr: bool = arg(True, "rescale the betas to zero terminal SNR (not for epsilon)")
    cache: bool = arg(True, "encode pictures and captions once, where nothing about them is random")
    aspect_buckets: bool = arg(False, "sizes of about resolution² pixels in place of one square crop")
    sample_prompts: list[str] = arg(
        [], "prompts of the sample sheets, or a text file of them; default: captions of the data"
    )
    eval_batch_size: int = arg(16, "pictures on a sample sheet")
    sample_steps: int = arg(25, "steps of the sample sheets", "ddpm-num-inference-steps")
    sample_guidance: float = arg(3.0, "guidance of the sample sheets")


PATHS = (
    "data",
    "output_dir",
    "cache_dir",
    "vae",
    "model_config",
    "text_config",
    "vgg_weights",
    "lpips_weights",
    "logging_dir",
)


def under(base, path):
    """A relative path, from --base-dir on."""
    return path if base == "." or Path(path).is_absolute() else str(Path(base) / path)


_COREL = {"resolution": 128, "batch_size": 16, "lr": 1e-4, "lr_warmup_steps": 0, "random_flip": True, "seed": 42, "num_workers": 4,
          "checkpointing_steps": 0, "save_images_epochs": 10, "keep_best": True, "checkpoints_total_limit": None}  # fmt: skip
PRESETS = {
    "vae": {
        "tiny": {"max_steps": 20, "resolution": 32, "batch_size": 4, "lr_warmup_steps": 0, "mixed_precision": "no", "log_every": 1},
        "nano": {"max_steps": 5000, "random_flip": True, "sample_every": 1000, "save_dtype": "fp16"},
        # S2: the Corel document's VAE
        "corel": _COREL | {"latent_dim": 128, "epochs": 300, "kl_weight": 1.0, "kl_warmup": 150, "kl_target": 25.0,
                           "perceptual_weight": 0.03, "random_jitter": 0.1, "adam_weight_decay": 1e-5, "adam_beta2": 0.999,
                           "checkpoint_epochs": 20, "ema": False, "lr_scheduler": "constant", "output_dir": "vae_models"},
    },
    "diffusion": {
        "tiny": {"max_steps": 20, "resolution": 16, "batch_size": 4, "lr_warmup_steps": 0, "max_length": 16,
                 "vocab_size": 600, "checkpointing_steps": 10, "log_every": 1, "mixed_precision": "no"},
        "nano": {"model_size": "nano", "max_steps": 13000, "batch_size": 32, "sample_every": 2000, "lr": 1e-3,
                 "lr_warmup_steps": 500, "max_length": 24, "checkpointing_steps": 1000, "save_dtype": "fp16"},
        # S2: the Corel document's diffusion, in the latents of its flat VAE
        "corel": _COREL | {"model_size": "flat", "condition": "none", "epochs": 500, "prediction_type": "epsilon",
                           "beta_schedule": "linear", "zero_snr": False, "ema_decay": 0.995, "lr_min": 1e-5,
                           "lr_scheduler": "cosine_warm_restarts", "early_stopping_patience": 30, "early_stopping_delta": 1e-5,
                           "oscillation_window": 10, "checkpoint_epochs": 10, "sample_steps": 50, "output_dir": "diffusion_models"},
        # S1: the script for the Pokémon captions, with its defaults
        "pokemon": {"model_size": "pokemon", "text_encoder": "openai/clip-vit-large-patch14", "max_length": 77, "epochs": 100,
                    "lr": 1e-4, "lr_warmup_steps": 500, "adam_beta1": 0.95, "adam_beta2": 0.999, "adam_weight_decay": 1e-6,
                    "ema": False, "ema_decay": 0.9999, "mixed_precision": "no", "prediction_type": "epsilon", "sample_steps": 1000,
                    "beta_schedule": "linear", "zero_snr": False, "snr_weighting": True, "snr_clip": 5.0,
                    "center_crop": False, "interpolation": "bilinear", "save_images_epochs": 50, "save_model_epochs": 150,
                    "checkpointing_steps": 5500, "checkpoints_total_limit": None, "report_to": "tensorboard",
                    "output_dir": "ddpm-model-64", "log_every": 1},
        # S0: fine-tuning of a whole Stable Diffusion 1.x
        "finetune": {"resolution": 512, "batch_size": 1, "lr": 1e-5, "lr_warmup_steps": 0.1, "mixed_precision": "fp16",
                     "gradient_checkpointing": True, "ema": False, "adam_beta2": 0.999, "caption_dropout": 0.0},
        "lora": {"resolution": 512, "batch_size": 1, "lr": 1e-4, "lora": True, "gradient_checkpointing": True, "ema": False,
                 "adam_beta2": 0.999, "caption_dropout": 0.0},
        # S2's second task: adapters on a whole Stable Diffusion, denoiser and text encoder
        "corel-lora": {"resolution": 512, "batch_size": 1, "grad_accum": 4, "epochs": 200, "lr": 1e-4, "lora": True, "lora_rank": 4,
                       "lora_alpha": 4.0, "train_text_encoder": True, "gradient_checkpointing": True, "ema": False, "adam_beta2": 0.999,
                       "caption_dropout": 0.0},
        # plans: 512 px and the real sizes, for --dry-run
        "sd15": {"model_size": "sd15", "resolution": 512, "max_steps": 500_000, "mixed_precision": "bf16"},
        "sd35-medium": {"model_size": "sd35-medium", "resolution": 1024, "max_steps": 500_000, "mixed_precision": "bf16"},
    },
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# VAE


def train_vae(cfg):
    import torch

    from nanodiff import build, dist, engine, objective
    from nanodiff.models import patchgan

    cfg.check()
    raw, net = build.make_vae(cfg)
    if cfg.dry_run:
        return plan_vae(cfg, net)
    if cfg.parallel == "fsdp":
        raise UserError("--parallel fsdp is for denoisers; a VAE fits on every GPU")
    if cfg.discriminator_weight and cfg.resolution < 32:
        raise UserError(f"--discriminator-weight: its patches need pictures of 32 pixels, not {cfg.resolution}")
    run = engine.Run(cfg)
    dataset, held = load_data(cfg, captions=False)
    torch.manual_seed(cfg.seed)  # initial weights
    net = type(net)(type(net).Config.from_json(raw))
    feed = make_feed(cfg, dataset)
    if cfg.kl_warmup and cfg.kl_warmup * feed.per_epoch >= (cfg.max_steps or cfg.epochs * feed.per_epoch):
        raise UserError(
            f"--kl-warmup {cfg.kl_warmup} epochs would not end within the run; the best model is picked after it"
        )
    check_feed = make_feed(cfg, held, training=False) if held else None
    perceptual = make_perceptual(cfg, run.device)
    nets = {"vae": net} | ({"discriminator": patchgan.PatchDiscriminator()} if cfg.discriminator_weight else {})
    calls = run.trainable(nets)
    run.schedule(feed.per_epoch)
    run.resume()
    run.same("data set", dataset.fingerprint())
    feed.interrupted = run.interrupted
    run.more.setdefault("kl_scale", 1.0)  # what --kl-target has made of the weight
    say_size(net, "VAE")
    shape = latent_shape(cfg, net)

    def losses(batch, kl_weight, gan):
        pixels = batch.pixels.to(run.device)
        noise = objective.draw(cfg.seed, "posterior", batch.indices, lambda g: torch.randn(shape, generator=g))
        loss, parts, made = objective.vae(calls["vae"], pixels, noise.to(run.device), kl_weight, cfg.l1, cfg.free_bits)
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

    for step in run.steps():
        final = step >= cfg.kl_warmup * feed.per_epoch  # is the warm-up over?
        kl_weight = cfg.kl_weight * run.more["kl_scale"] * (1 if final else step / (cfg.kl_warmup * feed.per_epoch))
        for batch in feed.update(step):
            with run.forward(batch):
                loss, parts = losses(batch, kl_weight, step >= cfg.discriminator_start)
            run.backward(loss, batch, **parts, kl_weight=torch.tensor(kl_weight))
        numbers = run.update()
        if cfg.kl_target and final:
            run.more["kl_scale"] = objective.steered(run.more["kl_scale"], numbers["kl"], cfg.kl_target)
        if run.every(cfg.sample_every) or run.every_epochs(cfg.save_images_epochs):
            with run.averaged():
                dist.on_main(vae_sheets, run, net, dataset, cfg, step + 1)
        if run.epoch_ended():
            feed.report_bad(run.out)
            loss = (
                validate(run, check_feed, lambda b: losses(b, cfg.kl_weight, False)[1]["judged"])
                if held
                else run.epoch_loss
            )
            best = run.judge(loss) and final  # while the weight grows, every epoch is judged by another measure
            if not final:
                run.best, run.reason = None, None
                run.plateau.state |= {"best": None, "bad": 0}
                run.stopper.state |= {"best": None, "bad": 0, "losses": []}
            if best and cfg.keep_best:
                write_vae(run, net, dataset, cfg, "best_model")
        if run.every_epochs(cfg.save_model_epochs):
            write_vae(run, net, dataset, cfg, f"model-epoch-{(step + 1) // feed.per_epoch}")

    run.save()
    feed.report_bad(run.out)
    write_vae(run, net, dataset, cfg, "model")
    with run.averaged():
        psnr = dist.on_main(measure_psnr, net, dataset, cfg, run.device)
    run.record.result("psnr_db", psnr)
    advice_vae(run, cfg)
    finish(run, cfg, ("loss", "reconstruction", "kl", "perceptual"), "training_losses.png")


def latent_shape(cfg, net):
    size = cfg.resolution // net.cfg.downscale
    return net.cfg.latent_channels, size, size


def make_perceptual(cfg, device):
    """f(a, b) -> [B], or None. Raises UserError when the weights are not there."""
    from nanodiff.models import lpips

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


def pictures_of(dataset, cfg):
    """f(positions) -> pixels [B, 3, R, R] as they are, unreadable ones replaced where --on-bad-image says so."""
    import numpy as np
    import torch

    from nanodiff import loader

    transform = loader.Transform(cfg.resolution, interpolation=cfg.interpolation)
    decoder = loader.Decoder(dataset, transform, cfg.seed, cfg.on_bad_image)

    def batch(positions):
        arrays = [decoder.some(p, None, {}, decoder.size(p))[1] for p in positions]
        return torch.from_numpy(np.stack(arrays)).float() / 127.5 - 1

    return batch


def spread(dataset, n):
    """Up to n positions, evenly spread over a data set (which may be sorted by class)."""
    return [round(i * (len(dataset) - 1) / max(min(n, len(dataset)) - 1, 1)) for i in range(min(n, len(dataset)))]


def vae_sheets(run, net, dataset, cfg, step):
    """Pictures above their reconstructions, and pictures decoded from pure noise."""
    import torch

    from nanodiff import images

    shown = pictures_of(dataset, cfg)(spread(dataset, 16)).to(run.device)
    noise = torch.randn((16, *latent_shape(cfg, net)), generator=torch.Generator().manual_seed(0)).to(run.device)
    pair = torch.cat([shown, net.decode_raw(net.encode_moments(shown)[0])])
    for name, pixels, nrow in (("reconstructions", pair, len(shown)), ("samples", net.decode_raw(noise), 8)):
        path = run.out / name / f"{step:06d}.png"
        images.save_grid(pixels, path, nrow=nrow)
        run.watch.picture(step, name, images.open_image(path))


def write_vae(run, net, dataset, cfg, name):
    """The averaged VAE as a Hub component folder, with the latents' scale measured on the data."""
    from nanodiff import dist, weights

    with run.averaged():

        def write():
            net.cfg.scaling_factor = latent_scale(net, dataset, cfg, run.device)
            weights.save(net, run.out / name, weights.DTYPES[cfg.save_dtype])

        dist.on_main(write)
        run.record.file(run.out / name)


def latent_scale(net, dataset, cfg, device):
    """1 / standard deviation of the posterior mean over up to 1,024 pictures (Rombach et al. 2022, appendix G)."""
    import torch

    pictures, some = pictures_of(dataset, cfg), spread(dataset, 1024)
    parts = [some[i : i + cfg.batch_size] for i in range(0, len(some), cfg.batch_size)]
    means = [net.encode_moments(pictures(part).to(device))[0] for part in parts]
    return round(1 / torch.cat(means).std().item(), 5)


def measure_psnr(net, dataset, cfg, device):
    """Mean squared error of up to 64 reconstructions in decibels, values of a picture spanning 2."""
    import math

    pictures, some, total = pictures_of(dataset, cfg), spread(dataset, 64), 0.0
    for i in range(0, len(some), cfg.batch_size):
        shown = pictures(some[i : i + cfg.batch_size]).to(device)
        made = net.decode_raw(net.encode_moments(shown)[0]).clamp(-1, 1)
        total += (made - shown).pow(2).flatten(1).mean(1).sum().item() / 4
    return -10 * math.log10(max(total / len(some), 1e-12))


def advice_vae(run, cfg):
    """What the numbers say about the settings (S2's table of troubles)."""
    from nanodiff import dist

    last = run.numbers or {}
    if cfg.kl_target and last and not 0.5 < last["kl"] / cfg.kl_target < 2:
        low = last["kl"] < cfg.kl_target
        dist.say(
            f"note: KL {last['kl']:.3g} nats is too {'low' if low else 'high'} for --kl-target {cfg.kl_target:g}: train longer, or "
            f"{'lower' if low else 'raise'} --kl-weight (now {cfg.kl_weight:g}); a longer --kl-warmup makes it steadier"
        )
    advice_loss(run)


def advice_loss(run):
    from nanodiff import dist

    if run.first_loss and run.numbers and run.numbers["loss"] > 0.98 * run.first_loss and run.step >= 100:
        dist.say(
            f"note: the loss is not decreasing ({run.first_loss:.4g} at first, {run.numbers['loss']:.4g} now): try twice or half the "
            "learning rate, more epochs, and look at the data (python -m nanodiff.data check PATH)"
        )


# ---------------------------------------------------------------------------------------------------------
# Diffusion


def train_diffusion(cfg):
    import torch

    from nanodiff import build, dist, engine, latents

    cfg.check()
    if cfg.dry_run:
        return plan_diffusion(cfg)
    run = engine.Run(cfg)
    dataset, held = load_data(cfg, captions=cfg.condition == "text")
    torch.manual_seed(cfg.seed)  # initial weights
    sd, nets = dist.together(build.make_model, cfg, dataset, run.device)
    feed = make_feed(cfg, dataset, multiple=sd.multiple)
    calls = run.trainable(nets)
    run.schedule(feed.per_epoch)
    run.resume()
    run.same("data set", dataset.fingerprint())
    run.same("tokenizer", latents.vocabularies(sd), must=True)
    feed.interrupted = run.interrupted
    prompts_of(cfg, sd, dataset)  # a mistake in them shows now, not at the first sheet
    say_size(run.net, "model")

    folder = cfg.cache_dir or run.out / "cache"
    texts_of = lambda some: build.conditions(cfg, some)  # noqa: E731
    kept = {"folder": folder, "cached": cfg.cache}
    low = run.precision or torch.float32
    x0_of = latents.Latents(sd.vae, feed, cfg.seed, run.device, **kept)
    text_of = latents.Texts(sd, texts_of(dataset), cfg.seed, run.device, cfg.caption_dropout, calls.get("text_encoder"),
                            dtype=low, **kept)  # fmt: skip
    if held:
        check_feed = make_feed(cfg, held, training=False, multiple=sd.multiple)
        held_x0 = latents.Latents(sd.vae, check_feed, cfg.seed + 1, run.device, **kept)
        held_text = latents.Texts(
            sd, texts_of(held), cfg.seed + 1, run.device, 0.0, calls.get("text_encoder"), dtype=low, **kept
        )
    losses = build.losses(cfg, sd, calls, run.device)

    for step in run.steps():
        for batch in feed.update(step):
            with run.forward(batch):
                loss, plain = losses(batch, x0_of, text_of, cfg.seed)
            run.backward(loss, batch, unweighted_loss=plain)
        run.update()
        if run.every(cfg.sample_every) or run.every_epochs(cfg.save_images_epochs):
            sheet(run, sd, cfg, dataset, run.out / "samples" / f"{step + 1:06d}.png")
        if run.epoch_ended():
            feed.report_bad(run.out)
            score = lambda b: losses(b, held_x0, held_text, cfg.seed + 1)[0]  # noqa: E731
            if run.judge(validate(run, check_feed, score) if held else run.epoch_loss) and cfg.keep_best:
                write_model(run, sd, cfg, "best_model")
        if run.every_epochs(cfg.save_model_epochs):
            write_model(run, sd, cfg, f"model-epoch-{(step + 1) // feed.per_epoch}")

    run.save()
    feed.report_bad(run.out)
    write_model(run, sd, cfg, "model")
    if cfg.sample_every or cfg.save_images_epochs:
        sheet(run, sd, cfg, dataset, run.out / "samples" / "denoising.png", strip=True)
    advice_loss(run)
    finish(run, cfg, ("loss", "unweighted_loss"), "loss.png")


def sheet(run, sd, cfg, dataset, path, strip=False):
    """Sample pictures with the averaged weights and fixed noise. strip: x_t at some of the steps instead, a row a prompt."""
    from nanodiff import teach

    prompts = prompts_of(cfg, sd, dataset)[: 4 if strip else cfg.eval_batch_size]
    guidance = 1.0 if sd.unconditional else cfg.sample_guidance
    teach.sheet(
        run,
        sd,
        prompts,
        path,
        cfg.sample_steps,
        guidance,
        (cfg.resolution, cfg.resolution),
        strip,
        not sd.unconditional,
    )


def prompts_of(cfg, sd, dataset):
    """What the sample sheets show: the prompts given, or texts spread over the data."""
    from nanodiff import build

    if sd.unconditional:
        return [""] * cfg.eval_batch_size
    given = []
    for prompt in cfg.sample_prompts:
        if prompt.endswith(".txt"):
            path = Path(under(cfg.base_dir, prompt))
            if not path.is_file():
                raise UserError(f"--sample-prompts {prompt}: no such file")
            given += [line.strip() for line in path.read_text(encoding="utf-8-sig").splitlines() if line.strip()]
        else:
            given.append(prompt)
    if cfg.condition == "labels":
        sd.tokenizer(given)
    texts = [group[0] for group in build.conditions(cfg, dataset)]
    spread = list(dict.fromkeys(texts))
    return given or spread[:: max(1, len(spread) // cfg.eval_batch_size)][: cfg.eval_batch_size]


def write_model(run, sd, cfg, name):
    """The averaged model as a Hub folder; of adapters, their file alone."""
    from nanodiff import dist, lora, lorafile, weights

    with run.averaged():
        states = {k: dist.whole_state(m) for k, m in run.net.items()}
        kind = weights.DTYPES[cfg.save_dtype]
        if cfg.lora:
            form = lorafile.form_for(cfg.lora_format, sd.models())
            folder = run.out / name
            path = folder if form == "peft" else folder / lora.DIFFUSERS_NAME  # the name that diffusers looks for
            facts = {"title": run.out.resolve().name, "steps": run.step + 1, "seed": cfg.seed, "learning_rate": cfg.lr,
                     "resolution": f"{cfg.resolution}x{cfg.resolution}", "prediction_type": sd.schedule.prediction}  # fmt: skip
            dist.on_main(folder.mkdir, exist_ok=True)
            made = lora.trained(dict(run.net.items()), states, kind) if dist.is_main() else None
            dist.on_main(lorafile.write, path, made, sd.models(), form, facts)
        else:
            dist.on_main(sd.save, run.out / name, kind, states)
    run.record.file(run.out / name)


# ---------------------------------------------------------------------------------------------------------
# Plans


def say_plan(cfg, estimate, n):
    """Print a dry run's lines and write them into run.json, if there is an --output-dir."""
    from nanodiff import plan

    samples = cfg.batch_size * cfg.grad_accum * cfg.world_size
    updates = cfg.max_steps or cfg.epochs * max(1, -(-n // samples))
    lines = plan.table(estimate, world=cfg.world_size, parallel=cfg.parallel, samples=samples, updates=updates,
                       micro=cfg.grad_accum, gpu=cfg.gpu, mfu=cfg.mfu)  # fmt: skip
    print("\n".join(lines))


def planned_dtype(cfg):
    import torch

    return {"bf16": torch.bfloat16, "auto": torch.bfloat16, "fp16": torch.float16}.get(cfg.mixed_precision)


def plan_vae(cfg, net):
    import torch

    from nanodiff import plan

    pixels = torch.empty(cfg.batch_size, 3, cfg.resolution, cfg.resolution, device="meta")
    noise = torch.empty(cfg.batch_size, *latent_shape(cfg, net), device="meta")
    loss = lambda: net(pixels, noise)[0].float().pow(2).mean()  # noqa: E731
    say_plan(cfg, plan.estimate({"vae": net}, loss, dtype=planned_dtype(cfg), world=cfg.world_size, parallel=cfg.parallel,
                                ema=cfg.ema, recompute=cfg.gradient_checkpointing), counted(cfg))  # fmt: skip


def counted(cfg):
    """Pictures in --data, when it is given; else what makes an epoch one update."""
    from nanodiff import data

    return len(data.load(cfg.data, captions=False)) if cfg.data else 1


def plan_diffusion(cfg):
    """Everything on the meta device: no weights are read, none are made."""
    import torch

    from nanodiff import build, lora, pipeline, plan, sources, weights
    from nanodiff.models.clip import CLIPTextModel

    rows, dtype = cfg.batch_size, planned_dtype(cfg)
    name = cfg.model or build.KNOWN.get(cfg.model_size)
    frozen, along, length = {}, {}, cfg.max_length
    if name:
        src = sources.configs(name)
        family = pipeline.FAMILIES[src.kind]
        meta = {n: weights.skeleton(src.builder(n), src.config(n)) for n in pipeline.BUILDERS if n in src.parts}
        net = meta.pop(family.denoiser_name)
        frozen, length = meta, 333 if family is pipeline.SD3 else 77
        scale = meta["vae"].cfg.downscale if "vae" in meta else 1
    else:
        text = build.text_config(cfg)
        text.vocab_size, vae = cfg.vocab_size, None
        with torch.device("meta"):
            if cfg.vae:
                vae = sources.load_vae(cfg.vae, torch.float32, "cpu")
            net = build.make_denoiser(cfg, vae, text)
            if cfg.condition == "text" and not cfg.text_encoder:
                along["text_encoder"] = CLIPTextModel(text)
        scale = vae.cfg.downscale if vae else 1
        frozen = {"vae": vae} if vae else {}
    net.requires_grad_(True)
    if cfg.lora:
        with torch.device("meta"):
            lora.adapt(net, **build.lora_settings(cfg))
    x, t, given = build.outline(net, rows, cfg.resolution // scale, length)
    ids = torch.zeros(rows, length, dtype=torch.long, device="meta")

    def loss():
        told = given
        if encoder := along.get("text_encoder"):
            states, pooled = encoder(ids)
            told = (encoder.final_norm(states[-1]), pooled)[: len(given)]
        return net(x, t, *told).float().pow(2).mean()

    estimate = plan.estimate({"denoiser": net, **along}, loss, frozen, 4, dtype, cfg.world_size, cfg.parallel, cfg.ema,
                             cfg.gradient_checkpointing)  # fmt: skip
    say_plan(cfg, estimate, counted(cfg))


# ---------------------------------------------------------------------------------------------------------
# Both


def load_data(cfg, captions):
    """(training set, held-out set or None), listed by rank 0 for all."""
    import numpy as np

    from nanodiff import data, dist

    dataset = dist.on_main(
        data.load, cfg.data, captions, cfg.image_column, cfg.caption_column, cfg.on_bad_image == "skip"
    )
    if cfg.max_samples and cfg.max_samples < len(dataset):
        dataset = dataset.subset(range(cfg.max_samples))
    dist.say(f"data: {len(dataset)} pictures, {len({t for group in dataset.texts for t in group})} different captions")
    if not cfg.validation:
        return dataset, None
    order = np.random.default_rng([cfg.seed, 0x5EED]).permutation(len(dataset))
    n = max(1, round(cfg.validation * len(dataset)))
    if n >= len(dataset):
        raise UserError(f"--validation {cfg.validation:g} leaves none of {len(dataset)} pictures to train on")
    return dataset.subset(sorted(order[n:])), dataset.subset(sorted(order[:n]))


def make_feed(cfg, dataset, training=True, multiple=1):
    """The loader of the training set, or of the held-out one, whose pictures are never changed and come in order."""
    from nanodiff import loader

    change = training and not getattr(cfg, "dry_run", False)
    transform = loader.Transform(
        cfg.resolution, cfg.center_crop or not change, cfg.random_flip and change, cfg.random_jitter * change,
        cfg.random_rotate * change, cfg.interpolation,
    )  # fmt: skip
    buckets = (
        loader.aspect_buckets(dataset, cfg.resolution, max(multiple, 8))
        if getattr(cfg, "aspect_buckets", False)
        else None
    )
    feed = loader.Feed(dataset, transform, cfg.seed, cfg.batch_size, cfg.grad_accum, cfg.num_workers if training else 0,
                       cfg.on_bad_image, cfg.bad_image_limit, buckets, timeout=cfg.dist_timeout)  # fmt: skip
    if training and feed.plan.group > len(dataset):
        from nanodiff import dist

        dist.say(
            f"note: {len(dataset)} pictures are fewer than the {feed.plan.group} of an update: each update sees them all"
        )
    return feed


def validate(run, feed, loss_of):
    """Mean loss over the held-out pictures with the averaged weights; the same draws every time."""
    import torch

    from nanodiff import dist

    total = 0.0
    with run.averaged():
        for step in range(feed.per_epoch):
            for batch in feed.update(step):
                with run.autocast(), torch.no_grad():
                    total += loss_of(batch).item() * batch.count
    return dist.total([total], run.device)[0] / len(feed.dataset)


def say_size(net, what):
    from nanodiff import dist

    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters()) - trained
    dist.say(
        f"{what}: {trained / 1e6:.2f} M parameters to train" + (f", {frozen / 1e6:.2f} M frozen" if frozen else "")
    )


def finish(run, cfg, panels, name):
    """What people look at after a run: the loss figure, and the sample sheets as one moving picture."""
    from nanodiff import charts, dist, hub, images

    def figures():
        if (run.out / "metrics.jsonl").exists() and charts.losses(run.out / "metrics.jsonl", run.out / name, panels,
                                                                 target=getattr(cfg, "kl_target", None)):  # fmt: skip
            run.record.file(run.out / name)
        sheets = sorted((run.out / "samples").glob("[0-9]*.png"))
        if len(sheets) > 1:
            images.save_gif([images.open_image(p) for p in sheets], run.out / "samples" / "progress.gif")
            run.record.file(run.out / "samples" / "progress.gif")

    dist.on_main(figures)
    run.close()
    if cfg.push_to_hub and dist.is_main():
        print(
            hub.push(run.out / "model", cfg.hub_model_id or run.out.resolve().name, cfg.hub_token, cfg.hub_private_repo)
        )


STAGES = {"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion)}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, PRESETS, LESS_MEMORY))
