"""Options that trainings have in common, of whichever script: the library reads these classes, the scripts' own ones inherit from them; and how
the scripts read lists, sizes and bounds."""

import json
from dataclasses import dataclass, fields, replace
from pathlib import Path

from nanodiff.commandline import DEVICES, arg, check_bounds
from nanodiff.config import UserError, printable

LR_SCHEDULERS = ("constant", "constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "cosine_warm_restarts",
                 "polynomial", "plateau", "none")  # fmt: skip
OPTIMIZERS = ("adamw", "schedule_free", "muon")


def listed(text):
    """The parts of a comma-separated option, which may be None."""
    return tuple(part.strip() for part in (text or "").split(",") if part.strip())


def under(base, path):
    """A relative path, from --base-dir on."""
    return path if base == "." or Path(path).is_absolute() else str(Path(base) / path)


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
    """What every training has: training.run.Run and the feeds read it."""

    # no options, and so without a type: scripts may have them as options or constants
    NAMES = {}  # what the files of a run are called, see train.py
    cuda_graph = False
    given = frozenset()  # the options that were said by name

    output_dir: str = arg("", "where everything of this run goes", group="the run", often=True)
    overwrite_output_dir: bool = arg(
        False, "begin again: what an earlier run in --output-dir made, and stands in the way, is deleted"
    )
    batch_size: int = arg(16, "samples of a process in a micro-batch", low=1, high=1 << 20, often=True)
    grad_accum: int = arg(1, "micro-batches per update", low=1, high=1 << 20)
    max_steps: int = arg(0, "updates; 0 = by --epochs", low=0, high=1 << 40, often=True)
    epochs: int = arg(
        1,
        "passes over the data, when --max-steps is 0",
        low=1,
        high=1 << 30,
        often=True,
    )
    lr: float = arg(1e-3, "peak learning rate", low=1e-12, high=1000.0, group="optimisation", often=True)
    lr_scheduler: str = arg("cosine", "learning rate over the run", choices=LR_SCHEDULERS)
    lr_warmup_steps: float = arg(
        100,
        "updates of linear warm-up (--lr-scheduler constant has none); below 1: a share of the run",
        low=0,
        high=1 << 40,
    )
    lr_min: float = arg(0.0, "smallest learning rate after the warm-up", low=0, high=1000.0)
    lr_cycles: int = arg(1, "cosines of cosine_with_restarts", low=1, high=1 << 20)
    lr_power: float = arg(1.0, "exponent of polynomial", low=0, high=100)
    lr_first_cycle: int = arg(
        50, "epochs of the first cosine of cosine_warm_restarts; each next one is twice as long", low=1, high=1 << 20
    )
    optimizer: str = arg("adamw", "schedule_free: a constant rate, and a mean of all weights so far in place of a schedule; muon: "
                         "orthogonal updates for the matrices of the blocks, AdamW for the rest", choices=OPTIMIZERS)  # fmt: skip
    adam_beta1: float = arg(
        0.9,
        "AdamW's decay of the mean; schedule_free: the share of the mean weights in what is trained",
        low=0,
        high=0.999999,
    )
    adam_beta2: float = arg(0.99, "AdamW's decay of the square", low=0, high=0.999999)
    adam_weight_decay: float = arg(0.01, "AdamW's weight decay", low=0, high=1000000.0)
    adam_epsilon: float = arg(1e-8, "AdamW's epsilon", low=1e-30, high=1)
    max_grad_norm: float = arg(1.0, "gradient clipping", low=1e-12, high=1000000000000.0)
    mixed_precision: str = arg("auto", "type of the forward pass; auto: bf16 where the device computes in it",
                               choices=("auto", "no", "fp16", "bf16"), often=True)  # fmt: skip
    gradient_checkpointing: bool = arg(False, "keep less for the backward pass, compute it again")
    ema: bool = arg(True, "average the weights; samples and the final model use the average", group="averaged weights")
    ema_decay: float = arg(0.999, "largest decay of the average", low=0, high=1)
    ema_inv_gamma: float = arg(
        1.0, "the average's warm-up: 1 - (1 + step / this)^-power", low=1e-06, high=1000000000000.0
    )
    ema_power: float = arg(0.75, "see --ema-inv-gamma", low=0, high=10)
    parallel: str = arg(
        "ddp",
        "under torchrun: a copy of everything on every process, or shards",
        choices=("ddp", "fsdp"),
        group="several processes",
    )
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost", low=1, high=1 << 20)
    early_stopping_patience: int = arg(
        0, "stop after so many epochs without a better loss; 0 = never", low=0, high=1 << 30, group="stopping early"
    )
    early_stopping_delta: float = arg(0.0, "how much better counts as better", low=0, high=1000000000.0)
    oscillation_window: int = arg(
        0, "stop when the loss of so many epochs no longer moves; 0 = never", low=0, high=1 << 20
    )
    oscillation_threshold: float = arg(
        0.0005, "standard deviation below which it no longer moves", low=0, high=1000000000.0
    )
    seed: int = arg(
        0, "every random draw is a function of it", low=0, high=(1 << 63) - 1, group="where it computes", often=True
    )
    device: str = arg("auto", "where to compute", choices=DEVICES)
    kernels: str = arg(
        "auto",
        "our Triton kernels on a GPU: auto falls back to PyTorch and says why, triton never falls back, torch uses none",
        choices=("auto", "triton", "torch"),
    )
    resume: str | None = arg(
        None,
        "continue from the newest checkpoint (auto, latest), or from this folder",
        const="auto",
        group="checkpoints and log",
        often=True,
    )
    checkpointing_steps: int = arg(500, "updates between checkpoints; 0 = only at the end", low=0, high=1 << 40)
    checkpoint_epochs: int = arg(0, "epochs between checkpoints; 0 = none", low=0, high=1 << 30)
    checkpoints_total_limit: int | None = arg(2, "checkpoints to keep", low=1, high=1 << 20)
    log_every: int = arg(20, "updates between lines of metrics.jsonl", low=0, high=1 << 40)
    report_to: str = arg("none", "also log to", choices=("none", "tensorboard", "wandb"))
    logging_dir: str | None = arg(None, "TensorBoard's folder; default OUTPUT_DIR/logs")

    def check_ranges(self):
        """Raise UserError for a number that is out of its range."""
        check_bounds(self)
        given, configured = getattr(self, "given", frozenset()), getattr(self, "configured", frozenset())
        if ("epochs" in given and "max_steps" not in given) or (
            "epochs" in configured and "max_steps" not in given | configured
        ):
            self.max_steps = 0  # a preset's or default, which would win over what was said
        if self.lr_min > self.lr:
            raise UserError(f"--lr-min {self.lr_min:g} is above --lr {self.lr:g}: the rate would rise")
        if self.optimizer == "muon" and self.parallel == "fsdp":
            raise UserError("--optimizer muon needs whole matrices: take --parallel ddp, or --optimizer adamw")
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


INDIFFERENT = {  # options that change where and how a training runs, not what comes of it
    "output_dir", "overwrite_output_dir", "device", "kernels", "resume", "checkpointing_steps", "checkpoint_epochs", "checkpoints_total_limit",
    "log_every", "report_to", "logging_dir", "gradient_checkpointing", "cuda_graph", "parallel", "dist_timeout", "lora_format",
}  # fmt: skip


def decisive(cfg: Training):
    """{option: value} of those that decide what is learned, as JSON values; of Noise and Adapters too, where cfg has them."""
    names = [f.name for part in (Training, Noise, Adapters) for f in fields(part) if hasattr(cfg, f.name)]
    return json.loads(json.dumps({name: getattr(cfg, name) for name in names if name not in INDIFFERENT}))


def replaced(cfg: Training, **more):
    """A copy with other values, of which it is still known what was given."""
    made = replace(cfg, **more)
    made.given = cfg.given
    return made


@dataclass
class Noise:
    """What the loss of a denoiser draws and how it weighs."""

    loss: str = arg("mse", "of prediction and target: mse, l1, huber", group="the loss")
    min_snr: float | None = arg(
        None, "gamma of the min-SNR weighting; none = unweighted", low=1e-06, high=1000000000000.0
    )
    snr_weighting: bool = arg(
        False, "with --prediction-type sample: weigh by the SNR, as an epsilon loss does by itself"
    )
    snr_clip: float | None = arg(None, "largest weight of --snr-weighting", low=1e-06, high=1000000000000.0)
    offset_noise: float = arg(0.0, "strength of noise that is the same everywhere in a channel", low=0, high=10)
    timestep_sampling: str = arg("uniform", "how a flow's times are drawn", choices=("uniform", "logit_normal"))
    timestep_mean: float = arg(0.0, "of logit_normal")
    timestep_std: float = arg(1.0, "of logit_normal", low=0, high=100)
    timestep_shift: float | None = arg(
        None,
        "moves a flow's times towards noise, in training and in a new model's sampling; default: 1, or --model's",
        low=0.001,
        high=1000.0,
    )
    caption_dropout: float = arg(
        0.1, "share of captions replaced by the empty text (SDXL: zeros), for guidance", low=0, high=1
    )


@dataclass
class Adapters:
    """Low-rank adapters."""

    lora_rank: int = arg(4, "rank of the adapters", low=1, high=16384, group="LoRA", often=True)
    lora_alpha: float | None = arg(None, "their strength is alpha / rank; default: rank", low=1e-6, high=1e9)
    lora_targets: str = arg(
        "",
        "layers to adapt: ends of names, or patterns with *, comma-separated; default: all attention projections",
    )
    lora_rank_pattern: str = arg("", "another rank for some of them, such as attn2.to_k=8,ff.net.2=2")
    lora_alpha_pattern: str = arg("", "another alpha for some of them")
    lora_dropout: float = arg(0.0, "of the adapters' inputs, while training", low=0, high=0.99)
    lora_rslora: bool = arg(False, "strength alpha / sqrt(rank), which lets high ranks learn")
    lora_format: str = arg("auto", "how they are written: kohya (which every program reads alike), diffusers or peft; auto is kohya, for an MMDiT diffusers", choices=("auto", "kohya", "diffusers", "peft"))  # fmt: skip


def check_adapters(lora, given):
    """Raise UserError for settings of adapters among the names of options that were `given` to a run without them (not `lora`). A file of settings, which is
    not `given`, may hold them all."""
    if not lora and set(given) & {f.name for f in fields(Adapters)}:
        raise UserError("--lora-… are settings of --lora")
