"""Train a VAE or a text-to-image diffusion model, on a laptop or under torchrun on many GPUs.

    python train.py vae       --data assets/emoji/emoji.tar --preset nano --output-dir out/vae
    python train.py diffusion --data assets/emoji/emoji.tar --preset nano --vae out/vae/model --output-dir out/nano
    python train.py diffusion --data my/pictures --preset tiny --max-steps 100 --output-dir out/tiny
    torchrun --standalone --nproc-per-node 2 train.py diffusion --data my/pictures --preset tiny --output-dir out/two
    python train.py diffusion --model stable-diffusion-v1-5/stable-diffusion-v1-5 --lora --data my/pictures --output-dir out/lora
    python train.py controlnet --model FOLDER --data my/pictures --output-dir out/control      # edges -> picture
    python train.py diffusion --preset sd15 --world-size 1024 --gpu h100 --batch-size 4 --dry-run

`--resume auto` continues a run that was stopped; on a CPU the result is the same, byte for byte.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.commandline import arg, script
from nanodiff.config import UserError
from nanodiff.training.options import Adapters, Noise, Training, check_adapters, under

# torch is imported inside main(), so that --help answers at once.

LESS_MEMORY = (
    "try a smaller --batch-size with more --grad-accum, a smaller --resolution, --gradient-checkpointing, --mixed-precision "
    "bf16, or --parallel fsdp on several GPUs (--dry-run predicts what fits)"
)


@dataclass
class Common(Training):
    data: str = arg(
        "", "folder, .tar shards, .csv, COCO .json or .parquet of pictures (and captions)", group="data", often=True
    )
    dataset_config_name: str | None = arg(None, "folder inside --data to use")
    image_column: str | None = arg(None, "column of the file names or pictures in a listing or table")
    caption_column: str | None = arg(None, "column of the captions")
    max_samples: int | None = arg(None, "use only the first N pictures", low=1, high=1 << 40)
    base_dir: str = arg(".", "folder that relative paths start from")
    cache_dir: str | None = arg(None, "where encoded pictures and captions are kept; default OUTPUT_DIR/cache")
    resolution: int | None = arg(
        None, "pixels along one side; default: 64, or --model's own", low=1, high=8192, often=True
    )
    interpolation: str = arg("lanczos", "how pictures are resized", choices=("lanczos", "bilinear"))
    center_crop: bool = arg(True, "crop the middle; --no-center-crop: anywhere")
    random_flip: bool = arg(False, "mirror half of the pictures")
    random_jitter: float = arg(0.0, "brightness, contrast and saturation times 1 ± this", low=0, high=0.9)
    random_rotate: float = arg(0.0, "turn by up to so many degrees", low=0, high=180)
    num_workers: int = arg(0, "processes that decode pictures", low=0, high=256, group="loading")
    on_bad_image: str = arg("stop", "what a picture that cannot be read does: stop the run, or be replaced and counted",
                            choices=("stop", "skip"))  # fmt: skip
    bad_image_limit: float = arg(0.01, "share of such pictures beyond which the run stops anyway", low=0, high=1)
    validation: float = arg(0.0, "share of the pictures held out; their loss then judges every epoch", low=0, high=0.9)
    no_mixed_precision: bool = arg(False, "the same as --mixed-precision no")
    local_rank: int = arg(-1, "set by launchers; torchrun's LOCAL_RANK is what counts")
    enable_xformers_memory_efficient_attention: bool = arg(
        False, "memory-efficient attention: what --kernels auto has anyway"
    )
    save_model_epochs: int = arg(0, "epochs between model folders model-epoch-N; 0 = only the final one", low=0, high=1 << 30,
                                 group="what is written")  # fmt: skip
    keep_best: bool = arg(False, "write best_model after every epoch whose loss is the best so far")
    save_dtype: str = arg("fp32", "type of the written models", choices=("fp32", "fp16", "bf16"))
    sample_every: int = arg(0, "updates between sample sheets; 0 = none", low=0, high=1 << 40, often=True)
    save_images_epochs: int = arg(0, "epochs between sample sheets; 0 = none", low=0, high=1 << 30)
    push_to_hub: bool = arg(False, "upload the final model", group="the Hub")
    hub_model_id: str | None = arg(None, "its name, org/name; default: the output folder's")
    hub_token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)")
    hub_private_repo: bool = arg(False, "upload it privately")
    dry_run: bool = arg(
        False,
        "print parameters, memory, FLOPs and time, and train nothing (needs no data and no weights)",
        group="planning",
        often=True,
    )
    world_size: int = arg(1, "processes that --dry-run plans for", low=1, high=1 << 24)
    gpu: str = arg("h100", "GPU that --dry-run plans for", choices=(
        "a100", "h100", "h200", "b200", "l40s", "rtx4090", "rtx3090", "mi300x", "v100"))  # fmt: skip
    mfu: float = arg(0.4, "share of the GPU's peak that --dry-run expects", low=0.001, high=1)

    def check(self):
        for name in () if self.dry_run else ("data", "output_dir"):
            if not getattr(self, name):
                raise UserError(f"--{name.replace('_', '-')} is required")
        self.check_ranges()
        if hasattr(self, "lora"):
            check_adapters(self.lora, getattr(self, "given", ()))
        self.resolution = self.resolution or (None if getattr(self, "model", None) else 64)
        for name in PATHS:
            if value := getattr(self, name, None):
                setattr(self, name, under(self.base_dir, value))
        for name in ("model", "text_encoder", "control", "resume"):  # may be Hub ids or words, too
            value = getattr(self, name, None)
            mine = name == "resume" and value not in (None, "auto", "latest")
            if value and (mine or Path(under(self.base_dir, value)).exists()):
                setattr(self, name, under(self.base_dir, value))
        if self.dataset_config_name:
            self.data = str(Path(self.data) / self.dataset_config_name)
        if self.no_mixed_precision:
            self.mixed_precision = "no"
        if self.push_to_hub:
            from nanodiff.weights import hub

            hub.may_push(self.hub_token)

    # what the files of a run are called, under --output-dir; links: further names, by which a document calls its checkpoints
    NAMES = {
        "samples": "samples/{step:06d}.png", "reconstructions": "reconstructions/{step:06d}.png", "loss": "loss.png",
        "vae loss": "training_losses.png", "links": {},
    }  # fmt: skip


@dataclass
class VAEConfig(Common):
    model: str | None = arg(
        None, "a VAE to go on from (folder, or a pipeline's), in place of a new one", group="the VAE", often=True
    )
    model_config: str | None = arg(None, "config.json of an AutoencoderKL or FlatVAE; default: a small f4 one")
    latent_dim: int | None = arg(None, "a VAE whose latent is one vector of this size", low=16, high=65536, often=True)
    kl_weight: float = arg(
        2e-3,
        "final weight of the KL divergence; 1 is the evidence lower bound per pixel value",
        low=0,
        high=1000000.0,
        group="its loss",
        often=True,
    )
    kl_warmup: int = arg(0, "epochs over which the weight grows from 0", low=0, high=1 << 30)
    kl_target: float | None = arg(
        None, "nats of KL per picture that the weight is steered to, after the warm-up", low=1e-06, high=1000000000.0
    )
    free_bits: float = arg(0.0, "nats of each latent channel that cost nothing", low=0, high=1000000.0)
    l1: bool = arg(True, "mean absolute error; --no-l1 for squared")
    perceptual: bool = arg(True, "add the perceptual loss, if its weight is not 0")
    perceptual_weight: float = arg(
        0.0, "weight of the perceptual loss on VGG16's features", low=0, high=1000000.0, often=True
    )
    vgg_weights: str | None = arg(None, "VGG16's weights (torchvision's names, safetensors) for the perceptual loss")
    lpips_weights: str | None = arg(None, "LPIPS's linear layers; without: mean squared difference of features[:16]")
    discriminator_weight: float = arg(0.0, "weight of a patch discriminator's opinion; 0 = none", low=0, high=1000000.0)
    discriminator_start: int = arg(
        0, "update from which the discriminator's opinion counts; it learns from the first on", low=0, high=1 << 40
    )


@dataclass
class DiffusionConfig(Common, Adapters, Noise):
    vae: str | None = arg(
        None, "folder of a trained VAE: diffusion in its latents; without: in pixels", group="the model", often=True
    )
    model: str | None = arg(None, "pipeline to go on from (folder or Hub id), in place of a new one", often=True)
    lora: bool = arg(False, "train low-rank adapters on --model, which stays as it is", often=True)
    model_config: str | None = arg(None, "config.json of a UNet or MMDiT; default: --model-size's")
    model_size: str = arg("tiny", "built-in sizes", choices=("tiny", "nano", "world", "pokemon", "flat", "mmdit-tiny", "mmdit-100m", "sd15",
                                                             "sdxl", "sd35-medium"), often=True)  # fmt: skip
    condition: str = arg("text", "the condition: captions, class labels (folders or .cls), or nothing",
                         choices=("text", "labels", "none"), group="condition")  # fmt: skip
    text_encoder: str | None = arg(
        None, "a frozen CLIP text encoder, folder or Hub id; default: a small one that learns along", often=True
    )
    text_config: str | None = arg(None, "config.json of the CLIP text encoder that is trained along")
    text_mask: bool = arg(
        False, "hide the padding behind a caption from the text encoder, by its attention mask; kept with the model"
    )
    train_text_encoder: bool = arg(False, "with --model: train its text encoder, too")
    vocab_size: int = arg(1500, "size of the byte-pair vocabulary learned from the captions", low=514, high=1 << 20)
    max_length: int = arg(24, "text tokens", low=3, high=4096)
    prediction_type: str | None = arg(None, "what the network predicts; default: v_prediction, or what --model does",
                                      choices=("epsilon", "sample", "v_prediction", "flow"), group="noise schedule", often=True)  # fmt: skip
    beta_schedule: str = arg("scaled_linear", "noise schedule",
                             choices=("linear", "scaled_linear", "squaredcos_cap_v2", "cosine"))  # fmt: skip
    ddpm_num_steps: int = arg(1000, "timesteps of the noise schedule", low=1, high=100000)
    zero_snr: bool = arg(True, "rescale the betas to zero terminal SNR (not for epsilon)")
    cache: bool = arg(True, "encode once what is not random of pictures and captions", group="caching and sheets")
    cuda_graph: bool = arg(False, "start a pass's kernels by one call: where a GPU would wait for the host")
    aspect_buckets: bool = arg(False, "sizes of about resolution² pixels in place of one square crop")
    sample_prompts: list[str] = arg(
        [], "prompts of the sample sheets, or a text file of them; default: captions of the data", often=True
    )
    eval_batch_size: int = arg(16, "pictures on a sample sheet", low=1, high=4096)
    sample_steps: int = arg(25, "steps of the sample sheets", low=1, high=1000)
    sample_guidance: float = arg(3.0, "guidance of the sample sheets")
    conditioning = None  # of a ControlNet


@dataclass
class ControlConfig(DiffusionConfig):
    conditioning: str = arg("canny", "what is shown of a picture", choices=("canny",), group="ControlNet", often=True)
    control: str | None = arg(None, "ControlNet to go on from, in place of a copy of --model's UNet", often=True)
    caption_dropout: float = arg(0.5, "share of captions replaced by the empty text")

    def check(self):
        others = (
            self.lora,
            self.train_text_encoder,
            self.condition != "text",
            self.parallel == "fsdp",
            self.sample_prompts,
        )
        if not self.model or any(others):
            raise UserError(
                "train.py controlnet needs a --model with a UNet and text, which stays as it is: no --lora, "
                "--train-text-encoder, --condition, --parallel fsdp or --sample-prompts (sheets show the data's pictures)"
            )
        super().check()


@dataclass
class CorelVAE(VAEConfig):
    """The first step of the Corel document (S2): its flags, defaults and file names."""

    NAMES = Common.NAMES | {
        "samples": "samples/samples_epoch_{epoch}.png", "reconstructions": "reconstructions/reconstruction_epoch_{epoch}.png",
        "links": {"best_model": "best_model.pt", "checkpoint": "checkpoint_{epoch:04d}.pt"},
    }  # fmt: skip


@dataclass
class CorelDiffusion(DiffusionConfig):
    """Its second step."""

    NAMES = Common.NAMES | {
        "samples": "samples/epoch_{epoch}.png", "loss": "loss_history.png",
        "links": {"best_model": "best_model.pt", "checkpoint": "checkpoint_epoch_{epoch}.pt"},
    }  # fmt: skip

    def check(self):
        if not self.vae and not self.model and not self.dry_run:
            raise UserError(
                "--vae-checkpoint is required: the VAE of the step before (train.py corel-vae writes best_model.pt)"
            )
        super().check()


PATHS = ("data", "output_dir", "cache_dir", "vae", "model_config", "text_config", "vgg_weights", "lpips_weights",
         "logging_dir")  # fmt: skip


_COREL = {"resolution": 128, "batch_size": 16, "lr": 1e-4, "lr_warmup_steps": 0, "random_flip": True, "seed": 42, "num_workers": 4,
          "checkpointing_steps": 0, "save_images_epochs": 10, "keep_best": True, "checkpoints_total_limit": None}  # fmt: skip
PRESETS = {
    "vae": {
        "tiny": {"max_steps": 20, "resolution": 32, "batch_size": 4, "lr_warmup_steps": 0, "mixed_precision": "no", "log_every": 1},
        "nano": {"max_steps": 5000, "random_flip": True, "sample_every": 1000, "save_dtype": "fp16"},
        # from assets/nano's to assets/world's: other colours, sharper edges
        "world": {"max_steps": 1200, "batch_size": 8, "lr": 5e-4, "lr_warmup_steps": 50, "l1": False, "kl_weight": 1e-5, "mixed_precision": "no",
                  "ema_decay": 0.99, "sample_every": 400, "save_dtype": "fp16"},
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
        "world": {"model_size": "world", "prediction_type": "flow", "timestep_sampling": "logit_normal", "timestep_mean": 0.5, "optimizer": "muon", "max_steps": 14200,
                  "batch_size": 64, "lr": 1e-3, "lr_warmup_steps": 200, "max_length": 20, "vocab_size": 700, "sample_every": 1000,
                  "sample_steps": 20, "sample_guidance": 4.0, "mixed_precision": "no", "checkpointing_steps": 500, "save_dtype": "fp16"},
        # S2: the Corel document's diffusion, in the latents of its flat VAE
        "corel": _COREL | {"model_size": "flat", "condition": "none", "epochs": 500, "prediction_type": "epsilon",
                           "beta_schedule": "linear", "zero_snr": False, "ema_decay": 0.995, "lr_min": 1e-5,
                           "lr_scheduler": "cosine_warm_restarts", "early_stopping_patience": 30, "early_stopping_delta": 1e-5,
                           "oscillation_window": 10, "checkpoint_epochs": 10, "sample_steps": 50, "output_dir": "diffusion_models"},
        # S1: the script for the Pokémon captions, with its defaults
        "pokemon": {"model_size": "pokemon", "resolution": 64, "text_encoder": "openai/clip-vit-large-patch14", "text_mask": True, "max_length": 77, "epochs": 100,
                    "lr": 1e-4, "lr_warmup_steps": 500, "adam_beta1": 0.95, "adam_beta2": 0.999, "adam_weight_decay": 1e-6,
                    "ema": False, "ema_decay": 0.9999, "mixed_precision": "no", "prediction_type": "epsilon", "sample_steps": 1000,
                    "beta_schedule": "linear", "zero_snr": False, "snr_weighting": True, "snr_clip": 5.0,
                    "center_crop": False, "interpolation": "bilinear", "save_images_epochs": 50, "save_model_epochs": 150,
                    "checkpointing_steps": 5500, "checkpoints_total_limit": None, "report_to": "tensorboard",
                    "output_dir": "ddpm-model-64", "log_every": 1},
        # S0: fine-tuning of a whole Stable Diffusion 1.x
        "finetune": {"resolution": 512, "batch_size": 1, "lr": 1e-5, "lr_warmup_steps": 0.1, "mixed_precision": "fp16",
                     "gradient_checkpointing": True, "ema": False, "adam_beta2": 0.999, "caption_dropout": 0.0},
        "lora": {"batch_size": 1, "max_steps": 1000, "lr": 1e-4, "lr_warmup_steps": 0.05, "lora": True, "gradient_checkpointing": True,
                 "ema": False, "adam_beta2": 0.999, "caption_dropout": 0.0},
        # S2's second task: adapters on a whole Stable Diffusion, denoiser and text encoder
        "corel-lora": {"resolution": 512, "batch_size": 1, "grad_accum": 4, "epochs": 200, "lr": 1e-4, "lora": True, "lora_rank": 4,
                       "lora_alpha": 4.0, "train_text_encoder": True, "gradient_checkpointing": True, "ema": False, "adam_beta2": 0.999,
                       "caption_dropout": 0.0},
        # plans: 512 px and the real sizes, for --dry-run
        "sd15": {"model_size": "sd15", "resolution": 512, "max_steps": 500_000, "mixed_precision": "bf16"},
        "sd35-medium": {"model_size": "sd35-medium", "resolution": 1024, "max_steps": 500_000, "mixed_precision": "bf16"},
    },
    "controlnet": {"nano": {"max_steps": 1500, "batch_size": 16, "lr": 5e-4, "sample_every": 500, "eval_batch_size": 12}},
}  # fmt: skip


PRESETS |= {  # "": a stage's own defaults
    "corel-vae": {"": PRESETS["vae"]["corel"]},
    "corel-diffusion": {"": PRESETS["diffusion"]["corel"]},
    "pokemon": {"": PRESETS["diffusion"]["pokemon"]},
}

# ---------------------------------------------------------------------------------------------------------
# VAE


def train_vae(cfg):
    import torch

    from nanodiff.device import dist
    from nanodiff.diffusion import objective
    from nanodiff.models import patchgan
    from nanodiff.stories import plans, vae
    from nanodiff.stories.training import finish, load_data, make_feed, say_size, say_unjudged, validate
    from nanodiff.training.run import Run

    cfg.check()
    raw, net = vae.planned(cfg)
    if cfg.dry_run:
        return plans.plan_vae(cfg, net)
    if cfg.parallel == "fsdp":
        raise UserError("--parallel fsdp is for denoisers; a VAE fits on every GPU")
    if cfg.discriminator_weight and cfg.resolution < 32:
        raise UserError(f"--discriminator-weight: its patches need pictures of 32 pixels, not {cfg.resolution}")
    run = Run(cfg)
    dataset, held = load_data(cfg, captions=False)
    torch.manual_seed(cfg.seed)  # initial weights
    net = vae.begin(cfg, raw, net)
    feed = make_feed(cfg, dataset)
    if cfg.kl_warmup and cfg.kl_warmup * feed.per_epoch >= (cfg.max_steps or cfg.epochs * feed.per_epoch):
        raise UserError(
            f"--kl-warmup {cfg.kl_warmup} epochs would not end within the run; the best model is picked after it"
        )
    check_feed = make_feed(cfg, held, training=False) if held else None
    # before resume(): what is refused here loses nothing of an older run
    perceptual = vae.make_perceptual(cfg, run.device)
    nets = {"vae": net} | ({"discriminator": patchgan.PatchDiscriminator()} if cfg.discriminator_weight else {})
    calls = run.trainable(nets)
    run.schedule(feed.per_epoch)
    say_unjudged(cfg, run)
    run.resume()
    run.same("data set", dataset.fingerprint())
    run.same("size of its pictures", dataset.weight())
    feed.serve(run)
    run.more.setdefault("kl_scale", 1.0)  # what --kl-target has made of the weight
    say_size(net, "VAE")
    losses = vae.losses(cfg, net, nets, calls, perceptual, run.device)

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
                dist.on_main(vae.vae_sheets, run, net, dataset, cfg, step + 1)
        if run.epoch_ended():
            feed.report_bad(run.out)
            judged = lambda b: losses(b, cfg.kl_weight, False)[1]["judged"]  # noqa: E731
            best = run.judge(validate(run, check_feed, judged) if held else run.epoch_loss)
            if not final:  # while the weight grows, every epoch is judged by another measure
                run.forget()
            elif best and cfg.keep_best:
                vae.write_vae(run, net, dataset, cfg, "best_model")
        if run.every_epochs(cfg.save_model_epochs):
            vae.write_vae(run, net, dataset, cfg, f"model-epoch-{(step + 1) // feed.per_epoch}")

    run.save()
    feed.report_bad(run.out)
    vae.write_vae(run, net, dataset, cfg, "model")
    with run.averaged():
        psnr = dist.on_main(vae.measure_psnr, net, dataset, cfg, run.device)
    run.record.result("psnr_db", psnr)
    vae.advice_vae(run, cfg)
    finish(
        run,
        cfg,
        ("loss", "reconstruction", "kl", "perceptual"),
        cfg.NAMES["vae loss"],
        f"python train.py diffusion --data {cfg.data} --vae {run.out / 'model'} --output-dir OUT",
    )


# ---------------------------------------------------------------------------------------------------------
# Diffusion


def train_diffusion(cfg):
    import torch

    from nanodiff.device import dist
    from nanodiff.diffusion import objective
    from nanodiff.stories import diffusion, plans
    from nanodiff.stories.training import advice_loss, finish, load_data, make_feed, say_size, say_unjudged, validate
    from nanodiff.training import build, latents
    from nanodiff.training.run import Run

    cfg.check()
    cfg.resolution = cfg.resolution or diffusion.own_size(cfg.model)
    objective.check_loss(cfg.loss)
    if cfg.dry_run:
        return plans.plan_diffusion(cfg)
    run = Run(cfg)
    dataset, held = load_data(cfg, captions=cfg.condition == "text")
    torch.manual_seed(cfg.seed)  # initial weights
    sd, nets = dist.together(diffusion.make_model, cfg, dataset, run.device)
    frozen = dist.on_main(diffusion.frozen_weights, sd, nets)
    feed = make_feed(cfg, dataset, multiple=sd.multiple, check=sd.check_size, tells=sd.family.sizes == 6)
    diffusion.prompts_of(cfg, sd, dataset)  # before resume(): what is refused here loses nothing of an older run
    calls = run.trainable(nets, random="lora_dropout" if cfg.lora_dropout else None)
    run.schedule(feed.per_epoch)
    say_unjudged(cfg, run)
    run.resume()
    run.same("data set", dataset.fingerprint())
    run.same("size of its pictures", dataset.weight())
    run.same("tokenizer", latents.vocabularies(sd), must=True)
    run.same("VAE, text encoder or model beneath", frozen)
    feed.serve(run)
    say_size(run.net, "model")

    x0_of, text_of = diffusion.encoded(cfg, run, sd, calls, dataset, feed, cfg.seed, cfg.caption_dropout)
    if held:
        check_feed = make_feed(cfg, held, training=False, multiple=sd.multiple, tells=feed.decoder.tells)
        held_x0, held_text = diffusion.encoded(cfg, run, sd, calls, held, check_feed, cfg.seed + 1, 0.0)
    losses = build.losses(cfg, sd, calls, run.device, cfg.lora_dropout, cfg.conditioning)

    for step in run.steps():
        for batch in feed.update(step):
            with run.forward(batch):
                loss, plain = losses(batch, x0_of, text_of, cfg.seed)
            run.backward(loss, batch, unweighted_loss=plain)
        run.update()
        if run.every(cfg.sample_every) or run.every_epochs(cfg.save_images_epochs):
            diffusion.sheet(run, sd, cfg, dataset, run.named("samples", step + 1))
        if run.epoch_ended():
            feed.report_bad(run.out)
            score = lambda b: losses(b, held_x0, held_text, cfg.seed + 1)[0]  # noqa: E731
            if run.judge(validate(run, check_feed, score) if held else run.epoch_loss) and cfg.keep_best:
                diffusion.write_model(run, sd, cfg, "best_model", step + 1)
        if run.every_epochs(cfg.save_model_epochs):
            diffusion.write_model(run, sd, cfg, f"model-epoch-{(step + 1) // feed.per_epoch}", step + 1)

    run.save()
    feed.report_bad(run.out)
    diffusion.write_model(run, sd, cfg, "model", run.step)
    if cfg.sample_every or cfg.save_images_epochs:
        diffusion.sheet(run, sd, cfg, dataset, run.out / "samples" / "denoising.png", strip=True)
    advice_loss(run)
    made, kind = run.out / "model", "lora" if cfg.lora else "control" if "controlnet" in nets else None
    drawn_by = f"--model {cfg.model} --{kind} {made}" if kind else f"--model {made}"
    finish(
        run,
        cfg,
        ("loss", "unweighted_loss"),
        cfg.NAMES["loss"],
        f'python sample.py {drawn_by} --prompt "…" --output-dir OUT',
    )


STAGES = {
    "vae": (VAEConfig, train_vae),
    "diffusion": (DiffusionConfig, train_diffusion),
    "controlnet": (ControlConfig, train_diffusion),
    # the source documents' commands, with their flags, defaults and names of files
    "corel-vae": (CorelVAE, train_vae),
    "corel-diffusion": (CorelDiffusion, train_diffusion),
    "pokemon": (DiffusionConfig, train_diffusion),
}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, PRESETS, LESS_MEMORY))
