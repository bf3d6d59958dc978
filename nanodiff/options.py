"""Options that every training run has, of whichever script: what engine.Run reads; and how the scripts read lists, sizes and bounds."""

from dataclasses import dataclass

from nanodiff.config import UserError, arg, printable

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_warm_restarts",
                 "polynomial", "plateau", "none")  # fmt: skip
OPTIMIZERS = ("adamw", "schedule_free")
RANGES = [  # (option, smallest, largest)
    ("resolution", 1, 8192), ("batch_size", 1, 1 << 20), ("grad_accum", 1, 1 << 20), ("max_steps", 0, 1 << 40),
    ("epochs", 1, 1 << 30), ("lr", 1e-12, 1e3), ("lr_warmup_steps", 0, 1 << 40), ("max_grad_norm", 1e-12, 1e12),
    ("ema_decay", 0, 1), ("checkpointing_steps", 0, 1 << 40), ("checkpoints_total_limit", 1, 1 << 20),
    ("sample_every", 0, 1 << 40), ("log_every", 0, 1 << 40), ("kl_weight", 0, 1e6), ("vocab_size", 514, 1 << 20),
    ("max_length", 3, 4096), ("caption_dropout", 0, 1), ("min_snr", 1e-6, 1e12), ("snr_clip", 1e-6, 1e12),
    ("num_workers", 0, 256), ("validation", 0, 0.9), ("random_jitter", 0, 0.9), ("random_rotate", 0, 180),
    ("bad_image_limit", 0, 1), ("offset_noise", 0, 10), ("timestep_shift", 1e-3, 1e3), ("lora_rank", 1, 1 << 14), ("lora_dropout", 0, 0.99),
    ("sample_steps", 1, 1000), ("ddpm_num_steps", 1, 100_000), ("eval_batch_size", 1, 1 << 12), ("world_size", 1, 1 << 24),
    ("mfu", 1e-3, 1), ("free_bits", 0, 1e6), ("kl_target", 1e-6, 1e9), ("latent_dim", 16, 1 << 16), ("dist_timeout", 1, 1 << 20),
    ("lr_min", 0, 1e3), ("ema_inv_gamma", 1e-6, 1e12), ("ema_power", 0, 10), ("kl_warmup", 0, 1 << 30),
    ("early_stopping_patience", 0, 1 << 30), ("oscillation_window", 0, 1 << 20), ("max_samples", 1, 1 << 40),
    ("seed", 0, (1 << 63) - 1), ("adam_beta1", 0, 0.999999), ("adam_beta2", 0, 0.999999), ("adam_weight_decay", 0, 1e6),
    ("adam_epsilon", 1e-30, 1), ("lr_cycles", 1, 1 << 20), ("lr_first_cycle", 1, 1 << 20), ("lr_power", 0, 100),
    ("early_stopping_delta", 0, 1e9), ("oscillation_threshold", 0, 1e9), ("checkpoint_epochs", 0, 1 << 30),
    ("save_model_epochs", 0, 1 << 30), ("save_images_epochs", 0, 1 << 30), ("perceptual_weight", 0, 1e6),
    ("discriminator_weight", 0, 1e6), ("discriminator_start", 0, 1 << 40), ("timestep_std", 0, 100),
]  # fmt: skip


def least(cfg, **bounds):
    """Raise UserError for an option below its bound; None has none."""
    for name, bound in bounds.items():
        if getattr(cfg, name) is not None and getattr(cfg, name) < bound:
            raise UserError(f"--{name.replace('_', '-')} must be at least {bound}, not {getattr(cfg, name)}")


def listed(text):
    """The parts of a comma-separated option, which may be None."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def parse_size(text, flag="resize", smallest=1, otherwise=""):
    """(width, height) of WIDTHxHEIGHT, each from `smallest` to 16384. otherwise: what else the error line says may stand there. Raises
    UserError."""
    width, x, height = text.partition("x")
    digits = x and width.isdecimal() and height.isdecimal()
    if not (digits and smallest <= int(width) <= 16384 and smallest <= int(height) <= 16384):
        raise UserError(f"--{flag} {printable(text)!r}: expected WIDTHxHEIGHT, such as 274x169{otherwise}")
    return int(width), int(height)


@dataclass
class Training:
    output_dir: str = arg("", "where everything of this run goes")
    overwrite_output_dir: bool = arg(False, "delete the checkpoints of an earlier run in --output-dir")
    batch_size: int = arg(16, "samples of a process in a micro-batch", "train-batch-size")
    grad_accum: int = arg(1, "micro-batches per update", "gradient-accumulation-steps")
    max_steps: int = arg(0, "updates; 0 = by --epochs", "max-train-steps")
    epochs: int = arg(1, "passes over the data, when --max-steps is 0", "num-epochs", "num-train-epochs")
    lr: float = arg(1e-3, "peak learning rate", "learning-rate")
    lr_scheduler: str = arg("cosine", "learning rate over the run", choices=LR_SCHEDULERS)
    lr_warmup_steps: float = arg(100, "updates of linear warm-up; below 1: a share of the run")
    lr_min: float = arg(0.0, "smallest learning rate after the warm-up")
    lr_cycles: int = arg(1, "cosines of cosine_with_restarts")
    lr_power: float = arg(1.0, "exponent of polynomial")
    lr_first_cycle: int = arg(50, "epochs of the first cosine of cosine_warm_restarts; each next one is twice as long")
    optimizer: str = arg("adamw", "schedule_free: a constant rate, and a mean of all weights so far in place of a schedule",
                         choices=OPTIMIZERS)  # fmt: skip
    adam_beta1: float = arg(
        0.9, "AdamW's decay of the mean; schedule_free: the share of the mean weights in what is trained"
    )
    adam_beta2: float = arg(0.99, "AdamW's decay of the square")
    adam_weight_decay: float = arg(0.01, "AdamW's weight decay")
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon")
    max_grad_norm: float = arg(1.0, "gradient clipping")
    mixed_precision: str = arg("auto", "type of the forward pass; auto: bf16 where the device computes in it",
                               choices=("auto", "no", "fp16", "bf16"))  # fmt: skip
    gradient_checkpointing: bool = arg(False, "keep less for the backward pass, compute it again")
    ema: bool = arg(True, "average the weights; samples and the final model use the average", "use-ema")
    ema_decay: float = arg(0.999, "largest decay of the average", "ema-max-decay")
    ema_inv_gamma: float = arg(1.0, "the average's warm-up: 1 - (1 + step / this)^-power")
    ema_power: float = arg(0.75, "see --ema-inv-gamma")
    parallel: str = arg(
        "ddp", "under torchrun: a copy of everything on every process, or shards", choices=("ddp", "fsdp")
    )
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost")
    early_stopping_patience: int = arg(0, "stop after so many epochs without a better loss; 0 = never")
    early_stopping_delta: float = arg(0.0, "how much better counts as better")
    oscillation_window: int = arg(0, "stop when the loss of so many epochs no longer moves; 0 = never")
    oscillation_threshold: float = arg(0.0005, "standard deviation below which it no longer moves")
    seed: int = arg(0, "every random draw is a function of it")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    kernels: str = arg(
        "auto",
        "our Triton kernels on a GPU: auto falls back to PyTorch and says why, triton never falls back, torch uses none",
        choices=("auto", "triton", "torch"),
    )
    resume: str | None = arg(None, "continue from the newest checkpoint (auto, latest), or from this folder",
                             "resume-from-checkpoint", const="auto")  # fmt: skip
    checkpointing_steps: int = arg(500, "updates between checkpoints; 0 = only at the end")
    checkpoint_epochs: int = arg(0, "epochs between checkpoints; 0 = none", "save-checkpoint-epochs")
    checkpoints_total_limit: int | None = arg(2, "checkpoints to keep")
    log_every: int = arg(20, "updates between lines of metrics.jsonl")
    report_to: str = arg("none", "also log to", "logger", choices=("none", "tensorboard", "wandb"))
    logging_dir: str | None = arg(None, "TensorBoard's folder; default OUTPUT_DIR/logs")

    def check_ranges(self):
        """Raise UserError for a number that is out of its range."""
        for name, low, high in RANGES:
            value = getattr(self, name, None)
            if value is not None and not low <= value <= high:
                raise UserError(f"--{name.replace('_', '-')} {value:g} must be between {low:g} and {high:g}")
        if self.optimizer == "schedule_free":
            if self.ema or self.lr_scheduler not in ("constant", "constant_with_warmup", "none"):
                raise UserError("--optimizer schedule_free averages the weights itself, in place of a schedule: add --no-ema and "
                                "--lr-scheduler constant_with_warmup to it, or train by --optimizer adamw")  # fmt: skip
            if not self.adam_beta1:
                raise UserError(
                    "--adam-beta1 0: schedule_free needs one above 0, the share of the mean weights in what is trained"
                )
        if self.oscillation_window == 1:
            raise UserError("--oscillation-window 1: one epoch alone does not move; it is 0 (never) or at least 2")


@dataclass
class Noise:
    """What the loss of a denoiser draws and how it weighs."""

    min_snr: float | None = arg(None, "gamma of the min-SNR weighting; none = unweighted", "snr-gamma")
    snr_weighting: bool = arg(
        False, "with --prediction-type sample: weigh by the SNR, as an epsilon loss does by itself"
    )
    snr_clip: float | None = arg(None, "largest weight of --snr-weighting")
    offset_noise: float = arg(0.0, "strength of noise that is the same everywhere in a channel", "noise-offset")
    timestep_sampling: str = arg("uniform", "how a flow's times are drawn", choices=("uniform", "logit_normal"))
    timestep_mean: float = arg(0.0, "of logit_normal")
    timestep_std: float = arg(1.0, "of logit_normal")
    timestep_shift: float | None = arg(
        None, "moves a flow's times towards noise, in training and in a new model's sampling; default: 1, or --model's"
    )
    caption_dropout: float = arg(0.1, "share of captions replaced by the empty text, for guidance")


@dataclass
class Adapters:
    """Low-rank adapters."""

    lora_rank: int = arg(4, "rank of the adapters", "rank")
    lora_alpha: float | None = arg(None, "their strength is alpha / rank; default: rank")
    lora_targets: str = arg(
        "", "layers to adapt: ends of names, or patterns with *, comma-separated; default: all attention projections"
    )
    lora_rank_pattern: str = arg("", "another rank for some of them, such as attn2.to_k=8,ff.net.2=2")
    lora_alpha_pattern: str = arg("", "another alpha for some of them")
    lora_dropout: float = arg(0.0, "of the adapters' inputs, while training")
    lora_rslora: bool = arg(False, "strength alpha / sqrt(rank), which lets high ranks learn", "use-rslora")
    lora_format: str = arg("auto", "how they are written: kohya (which every program reads alike), diffusers or peft; auto is kohya, for an MMDiT diffusers", choices=("auto", "kohya", "diffusers", "peft"))  # fmt: skip
