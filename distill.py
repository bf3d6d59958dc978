"""Models that learn from models.

    python distill.py recursive --cfg_scale 7.5 --target_gen 3        # a model trained on its own pictures, again and again
    python distill.py transfer all --config assets/prompts/transfer.json  # SDXL teaches SD 1.5, by its pictures
    python distill.py few-step --model assets/nano --data assets/emoji/emoji.tar --method consistency --output-dir out/four

recursive: generation 0 are pictures of --model from the captions; generation k is generation k-1's model trained on the pictures of
generation k-1, and pictures of it from the same captions and seeds. Every generation is measured; the report shows what is lost
on the way (Shumailov et al. 2024, Nature 631: model collapse). --baseline trains on generation 0 always, --finetune on real
pictures, --real-fraction mixes some in, --accumulate keeps all generations: what slows the loss (Gerstgrasser et al. 2024, arXiv 2404.01413).

transfer: a teacher draws, a smaller student learns from it by adapters, and both are compared, before and after: generate, train, evaluate,
visualize, or all of them.

few-step: a student that needs 1 to 8 steps where its teacher needs 50 (nanodiff/diffusion/fewstep.py has the equations).

Everything may be killed at any moment: the same command goes on with what is missing. Under torchrun the same pictures come out.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.commandline import arg, script
from nanodiff.config import UserError
from nanodiff.training.options import Adapters, Noise, Training, check_adapters

LESS_MEMORY = "try --batch-size 1 with --grad-accum, --gradient-checkpointing, a smaller --resolution"


@dataclass
class Recursive(Training, Noise):
    model: str = arg(
        "CompVis/stable-diffusion-v1-4", "model to begin with: folder or Hub id", group="generations", often=True
    )
    captions: str = arg("data/coco/annotations/captions_train2014.json", "COCO annotations (first caption of each picture), or any data set with captions", often=True)  # fmt: skip
    data_root: str = arg("data/coco", "the generations' pictures go here")
    models_root: str = arg("models", "the generations' models go here")
    output_dir: str = arg("out/recursive", "numbers, figures and the report")
    cfg_scale: float = arg(1.0, "guidance, of every generation; 1 is without", low=0, high=100, often=True)
    cfg_scales: list[float] = arg([], "several of them, one study each", low=0, high=100)
    target_gen: int = arg(3, "last generation", low=0, often=True)
    steps: int = arg(50, "sampling steps", low=1, often=True)
    num_images: int = arg(100, "pictures of each generation after the first", low=1, often=True)
    gen0_images: int = arg(100, "pictures of generation 0", low=1, often=True)
    draw_batch_size: int = arg(4, "pictures drawn at a time", low=1)
    resolution: int | None = arg(None, "pixels along one side; default: the model's", low=1, high=8192)
    scheduler: str | None = arg(None, "sampler; default: the model's own")
    baseline: bool = arg(False, "train on generation 0 always")
    finetune: bool = arg(False, "train on --real always")
    real: str | None = arg(None, "real pictures (with captions for --finetune and --real-fraction): FID is taken against them; default: generation 0", often=True)  # fmt: skip
    real_fraction: float = arg(0.0, "share of real pictures in the training set")
    accumulate: bool = arg(False, "train on all generations so far")
    evaluate: bool = arg(True, "measure every generation", group="measuring")
    weights_dir: str | None = arg(None, "Inception's and CLIP's weights (see eval.py images)")
    features: str = arg("inception,pixels", "spaces of FID and the like, comma-separated: inception, clip, pixels")
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    nearest_k: int = arg(5, "neighbours of precision, recall, density and coverage")
    epochs: int = arg(5, "passes over the pictures, per generation", low=1, group="the run")
    batch_size: int = arg(1, "samples of a process in a micro-batch")
    lr: float = arg(1e-5, "peak learning rate")
    lr_warmup_steps: float = arg(
        0.1, "updates of linear warm-up (--lr-scheduler constant has none); below 1: a share of the run"
    )
    adam_beta2: float = arg(0.999, "AdamW's decay of the square")
    ema: bool = arg(False, "average the weights")
    gradient_checkpointing: bool = arg(True, "keep less for the backward pass, compute it again")
    caption_dropout: float = arg(0.0, "share of captions replaced by the empty text (SDXL: zeros), for guidance")
    checkpointing_steps: int = arg(0, "updates between checkpoints; 0: a tenth of a generation's")
    checkpoints_total_limit: int | None = arg(1, "checkpoints to keep")
    save_dtype: str = arg("fp32", "type of the written models", choices=("fp32", "fp16", "bf16"))

    def check(self):
        self.check_ranges()
        if self.baseline and self.finetune:
            raise UserError("--baseline trains on generation 0 and --finetune on real pictures; give one of the two")
        if self.accumulate and (self.baseline or self.finetune):
            raise UserError("--accumulate is for a model's own pictures, not beside --baseline or --finetune")
        if self.finetune and self.real_fraction:
            raise UserError(
                "--finetune trains on real pictures alone, --real-fraction on some of them; give one of the two"
            )
        if self.cfg_scales and "cfg_scale" in getattr(self, "given", ()):
            raise UserError(
                "--cfg-scale is one study's guidance, --cfg-scales are several studies'; give one of the two"
            )
        if not 0 <= self.real_fraction < 1:
            raise UserError(
                f"--real-fraction {self.real_fraction:g} must be at least 0 and below 1 (all real is --finetune)"
            )
        for name in ("finetune", "real_fraction"):
            if getattr(self, name) and not self.real:
                raise UserError(f"--{name.replace('_', '-')} needs --real PICTURES with captions")


@dataclass
class Grid(Recursive):
    index: list[int] = arg([], "numbers of pictures, by ascending id")
    prompt: str | None = arg(None, "a caption of your own, drawn by every generation's model")
    prompt_seed: int = arg(0, "its seed")
    output_dir: str = arg("out/grid", "run.json, and the sheet unless --output names it")
    output: str | None = arg(None, "the sheet; default: OUTPUT_DIR/generations.png")

    def check(self):
        super().check()
        if bool(self.index) == (self.prompt is not None):
            raise UserError("give --index N …, or --prompt TEXT")


# ---------------------------------------------------------------------------------------------------------
# Teacher to student


@dataclass
class Transfer(Training, Noise, Adapters):
    model: str = arg(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "the student: folder or Hub id",
        group="teacher and student",
        often=True,
    )
    teacher: str = arg("stabilityai/stable-diffusion-xl-base-1.0", "the teacher", often=True)
    prompt_source: str = arg(
        "assets/prompts/dogs.json",
        "words and templates (JSON, to be edited), .csv, .txt, or pictures with captions",
        often=True,
    )
    prompt_column: str | None = arg(None, "column of the prompts in a table")
    num_images: int = arg(1000, "the teacher's pictures to learn from", low=1, often=True)
    sdxl_image_dir: str | None = arg(None, "where they are; default OUTPUT_DIR/sdxl_images")
    output_dir: str = arg("output", "everything goes here (visualize with --metrics-dir: the figures)")
    method: str = arg("data", "learn from the teacher's pictures, from its denoiser's output on them, or both, one after the other, compared", choices=("data", "online", "both"), often=True)  # fmt: skip
    feature_weight: float = arg(0.0, "online: weight of the difference between both UNets' attention maps", low=0)
    steps: int = arg(50, "sampling steps", low=1, often=True)
    guidance_scale: float = arg(7.5, "guidance", low=0, high=100, often=True)
    teacher_steps: int | None = arg(None, "the teacher's; default --steps")
    teacher_guidance_scale: float | None = arg(None, "the teacher's; default --guidance-scale", low=0, high=100)
    teacher_resolution: int | None = arg(None, "pixels along one side of the teacher's pictures; default: its own")
    resolution: int | None = arg(
        None, "pixels along one side of the student's pictures; default: its own (SD 1.5: 512)", low=1, high=8192
    )
    eval_batch_size: int = arg(1, "pictures drawn at a time", low=1, high=4096)
    evaluation_prompts: str | None = arg(
        None,
        "as --prompt-source, with a column `category`; default: other prompts of --prompt-source",
        group="the comparison",
    )
    num_evaluation_prompts: int = arg(100, "pictures that are compared", low=2)
    checkpoint: str | None = arg(
        None, "evaluate: the adapters (or the whole model) after training; default: what train wrote"
    )
    metrics_dir: str | None = arg(None, "visualize: numbers of an evaluation; default OUTPUT_DIR/metrics")
    panels: int = arg(12, "pictures of which panels and difference maps are drawn", low=0)
    weights_dir: str | None = arg(None, "Inception's and CLIP's weights, for FID and CLIP score (see eval.py)")
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    lora: bool = arg(True, "train adapters; --no-lora: the whole denoiser", group="LoRA", often=True)
    lora_rank: int = arg(16, "rank of the adapters")
    lora_alpha: float | None = arg(32.0, "their strength is alpha / rank")
    lora_dropout: float = arg(0.1, "of the adapters' inputs, while training")
    lora_format: str = arg("auto", "the file beside PEFT's folder: kohya's or diffusers' form; auto is kohya, for an MMDiT diffusers; peft: none", choices=("auto", "kohya", "diffusers", "peft"))  # fmt: skip
    lora_targets: list[str] = arg(
        [],
        "layers to adapt, of the denoiser (to_q …) or the text encoder (q_proj, fc1 …); default: the denoiser's attention",
    )
    seed: int = arg(42, "every random draw is a function of it")
    batch_size: int = arg(4, "samples of a process in a micro-batch")
    epochs: int = arg(10, "passes over the pictures")
    lr: float = arg(1e-4, "peak learning rate")
    lr_warmup_steps: float = arg(
        0, "updates of linear warm-up (--lr-scheduler constant has none); below 1: a share of the run"
    )
    adam_beta2: float = arg(0.999, "AdamW's decay of the square")
    ema: bool = arg(False, "average the weights")
    gradient_checkpointing: bool = arg(True, "keep less for the backward pass, compute it again")
    caption_dropout: float = arg(0.0, "share of captions replaced by the empty text (SDXL: zeros), for guidance")
    checkpointing_steps: int = arg(0, "updates between checkpoints; 0: a tenth of the run's")
    sample_every: int = arg(0, "updates between sheets of pictures; 0 = none", low=0, high=1 << 40)
    save_dtype: str = arg("fp32", "type of the written weights", choices=("fp32", "fp16", "bf16"))
    dry_run: bool = arg(False, "print the memory of every stage, and make nothing (needs no weights)", often=True)

    def check(self):
        self.check_ranges()
        check_adapters(self.lora, getattr(self, "given", ()))
        if self.feature_weight and self.method == "data":
            raise UserError("--feature-weight is for --method online or both")
        if self.method != "data" and (self.min_snr is not None or self.snr_weighting or self.loss != "mse"):
            raise UserError(
                "--loss, --min-snr and --snr-weighting are for --method data: online's error is weighed as v-prediction's"
            )

    @property
    def methods(self):
        return ("data", "online") if self.method == "both" else (self.method,)

    @property
    def root(self):
        return Path(self.output_dir)

    @property
    def teacher_images(self):
        return Path(self.sdxl_image_dir) if self.sdxl_image_dir else self.root / "sdxl_images"

    def work(self, method):
        """Where a student is trained."""
        return self.root / "checkpoints" / ("online" if method == "online" else "")


# ---------------------------------------------------------------------------------------------------------
# Fewer steps


@dataclass
class FewStep(Training, Adapters):
    model: str = arg(
        "stable-diffusion-v1-5/stable-diffusion-v1-5",
        "the teacher: folder or Hub id",
        group="teacher and student",
        often=True,
    )
    student: str | None = arg(None, "what the student begins as; default: the teacher", often=True)
    data: str = arg("", "pictures with captions, as train.py takes them", often=True)
    method: str = arg(
        "consistency", "how the student learns", choices=("progressive", "consistency", "dmd", "guidance"), often=True
    )
    student_steps: int = arg(4, "steps that the student is to need (guidance keeps the teacher's)", low=1, often=True)
    guidance_scale: float | None = arg(
        None,
        "the teacher's guidance, which the student then has by itself; default: the model's",
        low=0,
        high=100,
        often=True,
    )
    teacher_steps: int | None = arg(None, "the teacher's steps, in the comparison; default: the model's", low=1)
    first_steps: int | None = arg(
        None, "steps of the first round of progressive, halved in every other; default: four times --student-steps"
    )
    substeps: int = arg(
        2, "the teacher's steps in one of the student's, in the first round of progressive (in the others two)", low=2
    )
    known_steps: int = arg(50, "times that a latent consistency student knows", low=2)
    critic_steps: int = arg(5, "updates of dmd's critic for one of the student", low=1)
    lora: bool = arg(
        False, "train adapters in place of the whole denoiser (LCM-LoRA; consistency and guidance)", often=True
    )
    resolution: int | None = arg(None, "pixels along one side; default: the model's", low=1, high=8192)
    evaluate: bool = arg(True, "draw with teacher and student at --check-steps, and measure", group="the comparison")
    check_steps: list[int] = arg([1, 2, 4, 8], "steps at which both draw, beside the teacher's own")
    num_images: int = arg(64, "pictures of each such comparison", low=2)
    draw_batch_size: int = arg(16, "pictures drawn at a time", low=1)
    weights_dir: str | None = arg(None, "Inception's weights (see eval.py images)")
    features: str = arg("pixels", "spaces of the distances, comma-separated: inception, clip, pixels")
    output_dir: str = arg("out/few-step", "checkpoints, the student, figures")
    batch_size: int = arg(4, "samples of a process in a micro-batch")
    lr: float = arg(1e-5, "peak learning rate")
    max_steps: int = arg(1000, "updates (of each round); 0 = by --epochs")
    ema: bool = arg(True, "average the weights; the student is the average")
    ema_decay: float = arg(0.99, "largest decay of the average")
    sample_every: int = arg(0, "updates between sample sheets; 0 = none", low=0, high=1 << 40)
    caption_dropout: float = arg(0.0, "share of captions replaced by the empty text (SDXL: zeros)", low=0, high=1)
    checkpointing_steps: int = arg(0, "updates between checkpoints; 0: a tenth of the run's")
    checkpoints_total_limit: int | None = arg(1, "checkpoints to keep")
    save_dtype: str = arg("fp32", "type of the written model", choices=("fp32", "fp16", "bf16"))

    def check(self):
        from nanodiff.stories.few_step import OF_METHODS

        self.check_ranges()
        if not self.data:
            raise UserError("--data is required")
        if self.lora and self.method in ("progressive", "dmd"):
            raise UserError(
                f"--lora: {self.method} trains the whole network; adapters are for consistency and guidance"
            )
        if self.lora and self.student:
            raise UserError(
                "--lora: adapters belong to the --model they were trained on, so there is no other --student"
            )
        check_adapters(self.lora, getattr(self, "given", ()))
        given = set(getattr(self, "given", ()))
        for name, methods in OF_METHODS.items():
            if name in given and self.method not in methods:
                raise UserError(f"--{name.replace('_', '-')} is {' and '.join(methods)}'s, not {self.method}'s")
        if self.method in ("consistency", "dmd") and self.student_steps > self.known_steps:
            raise UserError(
                f"--student-steps {self.student_steps}: the student knows --known-steps {self.known_steps} times"
            )
        if self.first_steps not in [None, *(self.student_steps << i for i in range(31))]:
            raise UserError(
                f"--first-steps {self.first_steps} halved again and again must give --student-steps {self.student_steps}"
            )
        if any(n < 1 for n in self.check_steps):
            raise UserError("--check-steps must be at least 1")


STAGES = {
    "recursive": (Recursive, "nanodiff.stories.recursive:recursive"),
    "recursive grid": (Grid, "nanodiff.stories.recursive:grid"),
    **{
        f"transfer {part}": (Transfer, f"nanodiff.stories.transfer:{part}")
        for part in ("generate", "train", "evaluate", "visualize", "all")
    },
    "few-step": (FewStep, "nanodiff.stories.few_step:few_step"),
}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, less_memory=LESS_MEMORY))
