"""Train a VAE or a text-to-image diffusion model.

    python train.py vae       --data assets/emoji/emoji.tar --preset nano --output-dir out/vae
    python train.py diffusion --data assets/emoji/emoji.tar --preset nano --vae out/vae/model --output-dir out/nano
    python train.py diffusion --data my/pictures --preset tiny --max-steps 100 --output-dir out/tiny

`--resume auto` continues a run that was stopped; on a CPU the result is the same, byte for byte.
"""

import sys
from dataclasses import dataclass

from nanodiff.config import UserError, arg, read_json, script

# torch is imported inside main(), so that --help answers at once.


RANGES = [  # (option, smallest, largest)
    ("resolution", 1, 8192), ("batch_size", 1, 1 << 20), ("grad_accum", 1, 1 << 20), ("max_steps", 0, 1 << 40),
    ("epochs", 1, 1 << 30), ("lr", 1e-12, 1e3), ("lr_warmup_steps", 0, 1 << 40), ("max_grad_norm", 1e-12, 1e12),
    ("ema_decay", 0, 1), ("checkpointing_steps", 0, 1 << 40), ("checkpoints_total_limit", 1, 1 << 20),
    ("sample_every", 0, 1 << 40), ("log_every", 0, 1 << 40), ("kl_weight", 0, 1e6), ("vocab_size", 514, 1 << 20),
    ("max_length", 3, 4096), ("caption_dropout", 0, 1), ("min_snr", 1e-6, 1e6),
]  # fmt: skip


@dataclass
class Common:
    data: str = arg(
        "", "folder or .tar of pictures (and captions)", "train-data-dir", "data-dir", "image-dir", "dataset-name"
    )
    output_dir: str = arg("", "where everything of this run goes")
    resolution: int = arg(64, "pixels along one side")
    batch_size: int = arg(16, "samples per update and micro-batch", "train-batch-size")
    grad_accum: int = arg(1, "micro-batches per update", "gradient-accumulation-steps")
    max_steps: int = arg(0, "updates; 0 = by --epochs")
    epochs: int = arg(1, "passes over the data, when --max-steps is 0", "num-epochs")
    lr: float = arg(1e-3, "peak learning rate", "learning-rate")
    lr_scheduler: str = arg("cosine", "learning rate over the run", choices=("constant", "linear", "cosine"))
    lr_warmup_steps: int = arg(100, "updates of linear warm-up")
    max_grad_norm: float = arg(1.0, "gradient clipping")
    mixed_precision: str = arg("no", "autocast type of the forward pass", choices=("no", "fp16", "bf16"))
    ema: bool = arg(True, "average the weights; samples and the final model use the average")
    ema_decay: float = arg(0.999, "largest decay of the average")
    seed: int = arg(0, "every random draw is a function of it")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    kernels: str = arg(
        "auto",
        "our Triton kernels on a GPU: auto falls back to PyTorch and says why, triton never falls back, torch uses none",
        choices=("auto", "triton", "torch"),
    )
    resume: str | None = arg(None, "continue from the newest checkpoint, or from this folder", const="auto")
    checkpointing_steps: int = arg(500, "updates between checkpoints; 0 = only at the end")
    checkpoints_total_limit: int | None = arg(2, "checkpoints to keep")
    sample_every: int = arg(0, "updates between sample sheets; 0 = none")
    log_every: int = arg(20, "updates between lines of metrics.jsonl")

    def check(self):
        for name in ("data", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is required")
        for name, low, high in RANGES:
            value = getattr(self, name, None)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value:g} must be between {low:g} and {high:g}")


@dataclass
class VAEConfig(Common):
    model_config: str | None = arg(None, "config.json of an AutoencoderKL; default: a small f4 one")
    kl_weight: float = arg(2e-3, "weight of the KL divergence per pixel value")
    l1: bool = arg(True, "mean absolute error; --no-l1 for squared")
    random_flip: bool = arg(False, "mirror half of the pictures")


@dataclass
class DiffusionConfig(Common):
    vae: str | None = arg(None, "folder of a trained VAE: diffusion in its latents; without: in pixels")
    model_config: str | None = arg(None, "config.json of a UNet; default: the preset's")
    text_config: str | None = arg(None, "config.json of the CLIP text encoder that is trained along")
    vocab_size: int = arg(1500, "size of the byte-pair vocabulary learned from the captions")
    max_length: int = arg(24, "text tokens")
    prediction_type: str = arg("v_prediction", "what the UNet predicts", choices=("epsilon", "sample", "v_prediction"))
    beta_schedule: str = arg(
        "scaled_linear", "noise schedule", choices=("linear", "scaled_linear", "squaredcos_cap_v2")
    )
    zero_snr: bool = arg(True, "rescale the betas to zero terminal SNR (not for epsilon)")
    min_snr: float | None = arg(None, "gamma of the min-SNR weighting; none = unweighted")
    caption_dropout: float = arg(0.1, "share of captions replaced by the empty text, for guidance")
    sample_prompts: list[str] = arg([], "prompts of the sample sheets; default: captions of the data")
    model_size: str = arg("tiny", "built-in UNet and text encoder sizes", choices=("tiny", "nano"))


SIZES = {  # (UNet, text encoder) configurations of --model-size
    "tiny": (
        {"block_out_channels": (16, 32), "layers_per_block": 1, "num_heads": (2, 2), "norm_num_groups": 8,
         "cross_attention_dim": 32, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True},
        {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 2},
    ),
    "nano": (
        {"block_out_channels": (64, 96, 128), "layers_per_block": 1, "num_heads": (1, 2, 2), "norm_num_groups": 16,
         "cross_attention_dim": 128, "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
         "up_block_types": ("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"), "use_linear_projection": True},
        {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 3, "num_attention_heads": 2},
    ),
}  # fmt: skip
NANO_VAE = {"block_out_channels": (32, 48, 64), "layers_per_block": 1, "latent_channels": 4, "norm_num_groups": 16,
            "sample_size": 64, "down_block_types": ("DownEncoderBlock2D",) * 3,
            "up_block_types": ("UpDecoderBlock2D",) * 3, "force_upcast": False}  # fmt: skip

PRESETS = {
    "vae": {
        "tiny": {"max_steps": 20, "resolution": 32, "batch_size": 4, "lr_warmup_steps": 0},
        "nano": {"max_steps": 5000, "random_flip": True, "sample_every": 1000, "mixed_precision": "bf16"},
    },
    "diffusion": {
        "tiny": {"max_steps": 20, "resolution": 16, "batch_size": 4, "lr_warmup_steps": 0, "max_length": 16,
                 "vocab_size": 600, "checkpointing_steps": 10, "log_every": 1},
        "nano": {"model_size": "nano", "max_steps": 13000, "batch_size": 32, "sample_every": 2000, "lr": 1e-3,
                 "lr_warmup_steps": 500, "max_length": 24, "checkpointing_steps": 1000, "mixed_precision": "bf16"},
    },
}  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# VAE


def train_vae(cfg):
    import torch

    from nanodiff import data, engine, images, objective, weights
    from nanodiff.models.vae import AutoencoderKL
    from nanodiff.models.vae import Config as ModelConfig

    cfg.check()
    torch.manual_seed(cfg.seed)  # initial weights
    dataset = data.load(cfg.data, captions=False)
    pictures = data.Pictures(dataset, cfg.resolution)
    raw = read_json(cfg.model_config) if cfg.model_config else NANO_VAE
    net = AutoencoderKL(ModelConfig.from_json(raw))
    if cfg.resolution % net.cfg.downscale:
        raise UserError(f"--resolution {cfg.resolution} is not a multiple of the VAE's {net.cfg.downscale}")
    run = engine.Run(cfg, total_updates(cfg, len(dataset)))
    net, _ = run.trainable(net, cfg.lr)
    ema = run.ema(net, cfg.ema_decay if cfg.ema else 0)
    run.resume()

    size = cfg.resolution // net.cfg.downscale
    shape = (net.cfg.latent_channels, size, size)

    def batch(indices):
        flips = [bool(torch.rand((), generator=objective.generator(cfg.seed, "flip", i)) < 0.5) for i in indices]
        positions = data.order(len(dataset), cfg.seed, indices[0], len(indices))
        pixels = pictures.batch(positions, flips if cfg.random_flip else None)
        noise = objective.draw(cfg.seed, "posterior", indices, lambda g: torch.randn(shape, generator=g))
        return pixels.to(run.device), noise.to(run.device)

    for step in run.steps():
        for indices in micro_batches(cfg, step):
            pixels, noise = batch(indices)
            with run.autocast():
                loss, parts = objective.vae(net, pixels, noise, cfg.kl_weight, cfg.l1)
            run.backward(loss)
        norm, lr = run.update()
        if run.every(cfg.log_every):
            run.log(loss=loss.item(), grad_norm=norm, lr=lr, **{k: v.item() for k, v in parts.items()})
        if run.every(cfg.sample_every):
            with averaged(ema, net), torch.no_grad():
                shown = pictures.batch(range(min(16, len(dataset)))).to(run.device)
                pair = torch.cat([shown, net.decode(net.encode(shown))])
            images.save_grid(pair, run.out / "samples" / f"{step + 1:06d}.png", nrow=len(shown))

    with averaged(ema, net), torch.no_grad():
        net.cfg.scaling_factor = latent_scale(net, pictures, len(dataset), run.device)
        weights.save(net, run.out / "model", torch.float16)
        shown = pictures.batch(range(len(dataset))[:: max(1, len(dataset) // 64)]).to(run.device)
        mse = (net.decode(net.encode(shown)).clamp(-1, 1) - shown).pow(2).mean().item() / 4
    run.save()
    finish(run)
    run.record.file(run.out / "model")
    run.record.result("psnr_db", -10 * torch.log10(torch.tensor(max(mse, 1e-12))).item())
    run.record.write()


def latent_scale(net, pictures, n, device):
    """1 / standard deviation of the posterior mean over the data (Rombach et al. 2022, appendix G)."""
    import torch

    means = [net.encode_moments(pictures.batch(range(n)[i : i + 64]).to(device))[0] for i in range(0, min(n, 1024), 64)]
    return round(1 / torch.cat(means).std().item(), 5)


# ---------------------------------------------------------------------------------------------------------
# Diffusion


def train_diffusion(cfg):
    import torch
    from torch import nn

    from nanodiff import data, engine, images, objective, pipeline, weights
    from nanodiff.models.vae import AutoencoderKL
    from nanodiff.tokenizer import train_bpe

    cfg.check()
    dataset = data.load(cfg.data)
    pictures = data.Pictures(dataset, cfg.resolution)
    run = engine.Run(cfg, total_updates(cfg, len(dataset)))
    vae = weights.load(AutoencoderKL, cfg.vae, torch.float32, run.device) if cfg.vae else None
    tokenizer = train_bpe(dataset.captions, cfg.vocab_size, cfg.max_length)
    schedule = make_schedule(cfg)

    torch.manual_seed(cfg.seed)  # initial weights
    net = nn.ModuleDict(build(cfg, vae, tokenizer))
    net, _ = run.trainable(net, cfg.lr)
    ema = run.ema(net, cfg.ema_decay if cfg.ema else 0)
    run.resume()
    sd = pipeline.Pipeline(net["unet"], vae, net["text_encoder"], tokenizer, schedule)
    print(f"parameters: {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M", file=sys.stderr)

    moments = encode_all(vae, pictures, len(dataset), run.device) if vae else None
    ids = torch.tensor(tokenizer(dataset.captions))
    empty = torch.tensor(tokenizer([""]))[0]

    def batch(indices):
        """(x0, noise, t, token ids) of global sample indices."""
        positions = data.order(len(dataset), cfg.seed, indices[0], len(indices))
        if vae:
            mean, std = (m[positions] for m in moments)
            x0 = mean + std * objective.draw(
                cfg.seed, "posterior", indices, lambda g: torch.randn(mean.shape[1:], generator=g)
            )
            x0 = (x0 - (vae.cfg.shift_factor or 0)) * vae.cfg.scaling_factor
        else:
            x0 = pictures.batch(positions)
        noise = objective.draw(cfg.seed, "noise", indices, lambda g: torch.randn(x0.shape[1:], generator=g))
        t = objective.timesteps(schedule, cfg.seed, indices)
        drop = objective.draw(cfg.seed, "dropout", indices, lambda g: torch.rand((), generator=g)) < cfg.caption_dropout
        text = torch.where(drop[:, None], empty, ids[positions])
        return [v.to(run.device) for v in (x0, noise, t, text)]

    def sheet(path):
        prompts = cfg.sample_prompts or dataset.captions[:: max(1, len(dataset) // 16)][:16]
        with averaged(ema, net):
            net.eval()
            pixels = sd.generate(prompts, steps=25, guidance_scale=3.0, seeds=range(len(prompts))).pixels
            net.train()
        images.save_grid(pixels, path, labels=prompts)

    for step in run.steps():
        for indices in micro_batches(cfg, step):
            x0, noise, t, text = batch(indices)
            with run.autocast():
                context = sd.encode_ids(text)
                loss, plain = objective.diffusion(
                    lambda x, t, c=context: net["unet"](x, t, c), schedule, x0, noise, t, cfg.min_snr
                )
            run.backward(loss)
        norm, lr = run.update()
        if run.every(cfg.log_every):
            run.log(loss=loss.item(), unweighted_loss=plain.item(), grad_norm=norm, lr=lr)
        if run.every(cfg.sample_every):
            sheet(run.out / "samples" / f"{step + 1:06d}.png")

    with averaged(ema, net):
        sd.save(run.out / "model", torch.float16 if cfg.model_size == "nano" else None)
    run.save()
    finish(run)
    run.record.file(run.out / "model")
    run.record.result("steps", run.step)
    run.record.write()


def make_schedule(cfg):
    from nanodiff.schedule import Schedule

    zero_snr = cfg.zero_snr and cfg.prediction_type != "epsilon"
    return Schedule.from_config(
        {"_class_name": "DDIMScheduler", "beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": cfg.beta_schedule,
         "prediction_type": cfg.prediction_type, "clip_sample": False, "set_alpha_to_one": True,
         "timestep_spacing": "trailing", "rescale_betas_zero_snr": zero_snr}
    )  # fmt: skip


def build(cfg, vae, tokenizer):
    """{"unet": …, "text_encoder": …}, freshly initialised; the last convolution and every residual end start at 0."""
    from nanodiff.models.clip import CLIPTextModel
    from nanodiff.models.clip import Config as TextConfig
    from nanodiff.models.unet import Config as UNetConfig
    from nanodiff.models.unet import UNet2DConditionModel

    unet_raw, text_raw = SIZES[cfg.model_size]
    channels = vae.cfg.latent_channels if vae else 3
    size = cfg.resolution // (vae.cfg.downscale if vae else 1)
    unet_cfg = UNetConfig.from_json(read_json(cfg.model_config)) if cfg.model_config else UNetConfig(
        **unet_raw, in_channels=channels, out_channels=channels, sample_size=size
    )  # fmt: skip
    if unet_cfg.in_channels != channels:
        raise UserError(
            f"--model-config: in_channels {unet_cfg.in_channels}, but the pictures have {channels} channels"
        )
    text_cfg = TextConfig.from_json(read_json(cfg.text_config)) if cfg.text_config else TextConfig(
        **text_raw, vocab_size=len(tokenizer.backend.get_vocab()), max_position_embeddings=cfg.max_length,
        hidden_act="gelu", projection_dim=text_raw["hidden_size"], bos_token_id=tokenizer.bos,
        eos_token_id=tokenizer.eos, pad_token_id=tokenizer.pad,
    )  # fmt: skip
    unet, text = UNet2DConditionModel(unet_cfg), CLIPTextModel(text_cfg)
    init(unet, text)
    return {"unet": unet, "text_encoder": text}


def init(unet, text):
    """PyTorch's defaults, but residual branches and the output begin at zero (Ho et al. 2020's code; Goyal et al.
    2017 §5.1), and text embeddings have standard deviation 0.02 as in CLIP."""
    from torch import nn

    from nanodiff.models.layers import ResnetBlock
    from nanodiff.models.unet import Transformer2D

    for module in unet.modules():
        last = {ResnetBlock: "conv2", Transformer2D: "proj_out"}.get(type(module))
        if last:
            nn.init.zeros_(getattr(module, last).weight)
            nn.init.zeros_(getattr(module, last).bias)
    nn.init.zeros_(unet.conv_out.weight)
    nn.init.zeros_(unet.conv_out.bias)
    for table in (text.text_model.embeddings.token_embedding, text.text_model.embeddings.position_embedding):
        nn.init.normal_(table.weight, std=0.02)


def encode_all(vae, pictures, n, device):
    """(mean, standard deviation) of the VAE posterior of every picture, unscaled: encoded once, not every epoch."""
    import torch

    parts = []
    with torch.no_grad():
        for i in range(0, n, 64):
            mean, logvar = vae.encode_moments(pictures.batch(range(n)[i : i + 64]).to(device))
            parts.append((mean.cpu(), (0.5 * logvar).exp().cpu()))
    return torch.cat([m for m, _ in parts]), torch.cat([s for _, s in parts])


# ---------------------------------------------------------------------------------------------------------
# Both


def total_updates(cfg, n):
    """Updates of the run; the last, smaller group of an epoch counts as one."""
    return cfg.max_steps or cfg.epochs * -(-n // (cfg.batch_size * cfg.grad_accum))


def micro_batches(cfg, step):
    """Global sample indices of each micro-batch of an update."""
    first = step * cfg.batch_size * cfg.grad_accum
    return [range(first + i * cfg.batch_size, first + (i + 1) * cfg.batch_size) for i in range(cfg.grad_accum)]


def finish(run):
    """What people look at after a run: the loss curve, and the sample sheets as one moving picture."""
    from nanodiff import charts, images

    if (run.out / "metrics.jsonl").exists() and charts.loss_curve(run.out / "metrics.jsonl", run.out / "loss.png"):
        run.record.file(run.out / "loss.png")
    sheets = sorted((run.out / "samples").glob("[0-9]*.png"))
    if len(sheets) > 1:
        images.save_gif([images.open_image(p) for p in sheets], run.out / "samples" / "progress.gif")
        run.record.file(run.out / "samples" / "progress.gif")


def averaged(ema, net):
    import contextlib

    return ema.applied(net) if ema else contextlib.nullcontext()


if __name__ == "__main__":
    sys.exit(script({"vae": (VAEConfig, train_vae), "diffusion": (DiffusionConfig, train_diffusion)}, __doc__, PRESETS))
