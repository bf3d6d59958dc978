"""A captioner of one's own: captions are varied, drawn, split; a ViT and a LLaMA learn to tell them; what they tell is judged.

    python caption.py augment --data-csv data/titles.csv --model google/gemma-3-1b-it --output-dir results/synthetic_data
    python caption.py synthesize --model stabilityai/stable-diffusion-2-1 --output-dir results/synthetic_data
    python caption.py split --original-csv data/titles.csv --synthetic-csv results/synthetic_data/synthetic_captions.csv --output-dir data
    python caption.py train --num-epochs 10 --output-dir results/vit_llama3_2_1B
    python caption.py infer --model-file results/vit_llama3_2_1B/checkpoints/best_model.pt --infer-image-path dish.jpg
    python caption.py eval --model-file results/vit_llama3_2_1B/checkpoints/best_model.pt --eval-set test
    python caption.py complete --model FOLDER_OR_HUB_ID --prompt "Once upon a time" --max-new-tokens 60 --temperature 0

augment: each caption gets a few new ones, by a Gemma or LLaMA. synthesize: a picture for each, by any Stable Diffusion. split: train.csv,
val.csv, test.csv. train, infer, eval: the captioner (`-t train` is the same as `train`). complete: go on with a prompt (`--chat`: as an
instruction-tuned Gemma is asked); the continuation alone is printed on stdout, its token ids are in run.json.

augment and synthesize may be killed at any moment: the same command goes on with what is missing. Under torchrun they give the same files.
"""

import sys
from dataclasses import dataclass

from nanodiff.commandline import DEVICES, arg, script
from nanodiff.config import UserError
from nanodiff.training.options import LR_SCHEDULERS, OPTIMIZERS, Training

LESS_MEMORY = "try --dtype bf16 (train: --mixed-precision bf16), a smaller --batch-size, --gradient-checkpointing, fewer --max-new-tokens"


@dataclass
class Stage:
    device: str = arg("auto", "where to compute", choices=DEVICES)
    dtype: str = arg(
        "auto", "weights: auto is half precision on a GPU and fp32 on a CPU", choices=("auto", "fp32", "fp16", "bf16")
    )
    kernels: str = arg("auto", "our Triton kernels on a GPU: auto falls back and says why, triton never falls back, torch uses none",
                       choices=("auto", "triton", "torch"))  # fmt: skip
    hf_token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)")


# ---------------------------------------------------------------------------------------------------------
# Texts


@dataclass
class Complete(Stage):
    model: str = arg("", "folder or Hub id of a LLaMA 3.2 or Gemma 3 text model")
    prompt: str = arg("", "the text to go on with")
    chat: bool = arg(False, "the prompt is a request, in Gemma's chat form")
    max_new_tokens: int = arg(128, "at most so many new tokens", low=1)
    quantize: str | None = arg(
        None, "weights of the language model in 8 or 4 bits (int4: on a CPU)", choices=("int8", "int4")
    )
    temperature: float = arg(1.0, "0: the likeliest token each time; larger: more chance")
    top_k: int = arg(0, "only the so many likeliest tokens; 0: all")
    top_p: float = arg(1.0, "only the likeliest tokens that together have this share")
    min_p: float = arg(0.0, "only tokens with at least this share of the likeliest's")
    repetition_penalty: float = arg(1.0, "above 1: tokens that were there are less likely")
    beams: int = arg(1, "texts that are searched at a time, with --temperature 0", low=1)
    seed: int = arg(0, "of the draws")
    output_dir: str = arg("out/complete", "run.json")


# ---------------------------------------------------------------------------------------------------------
# New captions


@dataclass
class Augment(Stage):
    data_csv: str = arg("data/titles.csv", "captions to vary: Image_Name and Title (a text, or a list of texts)")
    model: str = arg("google/gemma-3-1b-it", "the language model: folder or Hub id of a Gemma 3 or LLaMA 3.2")
    output_dir: str = arg("results/synthetic_data", "augmented_captions.csv, and what synthesize makes of it")
    overwrite_output_dir: bool = arg(False, "begin again: what an earlier run there made by other settings is deleted")
    variations: int = arg(3, "new captions for each", low=1)
    start_idx: int = arg(0, "begin at this caption", low=0)
    max_samples: int | None = arg(None, "no more captions than so many", low=1)
    template: str | None = arg(None, "the request, or a text file of it, with {caption}, {n}, {low}, {high}; with {first}, the caption's first word, which the reply goes on from")  # fmt: skip
    chat: str = arg("auto", "ask in Gemma's chat form; auto: a Gemma is", choices=("auto", "yes", "no"))
    quantize: str | None = arg(
        None, "weights of the language model in 8 or 4 bits (int4: on a CPU)", choices=("int8", "int4")
    )
    temperature: float = arg(0.7, "0: the likeliest token each time; larger: more chance")
    top_k: int = arg(0, "only the so many likeliest tokens; 0: all")
    top_p: float = arg(0.9, "only the likeliest tokens that together have this share")
    repetition_penalty: float = arg(1.0, "above 1: tokens that were there are less likely")
    max_new_tokens: int = arg(256, "of a reply", low=1)
    min_words: int = arg(2, "words of a new caption, at least", low=1)
    max_words: int = arg(10, "words of a new caption, at most")
    attempts: int = arg(5, "replies for a caption, after which fewer variations have to do", low=1)
    batch_size: int = arg(8, "captions at a time", low=1)
    clean: bool = arg(False, "lower case and single spaces, for captions and variations")
    skip_bad: bool = arg(False, "leave out, counted and said, rows without a caption")
    seed: int = arg(42, "of the draws")
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost")


# ---------------------------------------------------------------------------------------------------------
# Pictures of them


@dataclass
class Synthesize(Stage):
    data_csv: str | None = arg(None, "captions, one picture each; default: OUTPUT_DIR/augmented_captions.csv")
    model: str = arg("stabilityai/stable-diffusion-2-1", "what draws: folder or Hub id")
    output_dir: str = arg("results/synthetic_data", "images/ and synthetic_captions.csv")
    overwrite_output_dir: bool = arg(False, "begin again: what an earlier run there made by other settings is deleted")
    template: str = arg("A professional, realistic photograph of {caption}, appetizing, natural light, sharp focus", "the positive prompt, with {caption}")  # fmt: skip
    negative_prompt: str = arg(
        "blurry, unrealistic, low resolution, overexposed, unnatural colors, text, watermark", "what to keep away from"
    )
    scheduler: str = arg("auto", "sampler; auto: ddpm, or a flow's own")
    steps: int = arg(50, "sampling steps", low=1)
    guidance_scale: float = arg(7.5, "guidance", low=0, high=100)
    height: int | None = arg(None, "pixels drawn; default: the model's own")
    width: int | None = arg(None, "pixels drawn; default: the model's own")
    resize: str = arg("274x169", "WIDTHxHEIGHT of the written pictures; none: as drawn")
    format: str = arg("jpg", "of the pictures", choices=("jpg", "png"))
    batch_size: int = arg(4, "pictures at a time", low=1)
    skip_bad: bool = arg(False, "leave out, counted and said, rows without a caption")
    seed: int = arg(42, "a picture's seed is a function of it and of its name")
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost")


# ---------------------------------------------------------------------------------------------------------
# Training, validation and test


@dataclass
class Split:
    original_csv: str = arg("data/titles.csv", "the real pictures' captions: Image_Name and Title")
    synthetic_csv: list[str] = arg(
        [], "synthetic_captions.csv, or a job's .out log with lines `name.jpg: caption`; may be repeated"
    )
    image_path: list[str] = arg(
        [], "folder of the pictures, without subfolders; may be repeated [images/ beside each CSV, or data/images]"
    )
    output_dir: str = arg("data", "train.csv, val.csv, test.csv, and run.json with the counts")
    train_csv_path: str | None = arg(None, "where train.csv goes; default: OUTPUT_DIR")
    val_csv_path: str | None = arg(None, "where val.csv goes")
    test_csv_path: str | None = arg(None, "where test.csv goes")
    val_share: float = arg(0.1, "of all pictures; half of them original, half synthetic")
    test_share: float = arg(0.1, "of all pictures; original alone")
    apart: bool = arg(
        False,
        "no synthetic picture where its source's part would know it: not in training when that is tested or validated",
    )
    clean: bool = arg(False, "lower case and single spaces")
    skip_bad: bool = arg(False, "leave out, counted and said, rows without a caption or a readable picture")
    seed: int = arg(42, "of the shuffle")


# ---------------------------------------------------------------------------------------------------------
# The captioner


@dataclass
class Files:
    train_csv_path: str = arg(
        "data/train.csv", "Image_Name and Title of the training pictures", group="data", often=True
    )
    val_csv_path: str = arg("data/val.csv", "of the validation pictures", often=True)
    test_csv_path: str = arg("data/test.csv", "of the test pictures; train only sees that none of them is learned")
    image_path: list[str] = arg(
        [], "folder of the pictures, {Image_Name}.jpg or .png; may be repeated [data/images]", often=True
    )
    skip_bad: bool = arg(False, "leave out, counted and said, rows without a caption or a picture")

    def folders(self):
        return self.image_path or ["data/images"]


@dataclass
class Train(Training, Files):
    model_name: str = arg(
        "meta-llama/Llama-3.2-1B",
        "the language model: folder or Hub id of a LLaMA 3.2 (1B, 3B) or Gemma 3",
        group="the models",
        often=True,
    )
    vision_model: str = arg("google/vit-base-patch16-224", "the ViT: folder or Hub id", often=True)
    model_size: str = arg("pretrained", "pretrained: those two; else a small ViT and LLaMA from scratch, wholly trained", choices=("pretrained", "tiny", "nano", "world"), often=True)  # fmt: skip
    lora: bool = arg(True, "train adapters beside frozen models; --no-lora: all of both", group="adapters", often=True)
    lora_r: int = arg(8, "rank of the language model's adapters", low=1, often=True)
    lora_alpha: float = arg(32.0, "their strength is alpha / rank")
    lora_dropout: float = arg(0.5, "of the adapters' inputs, while training", low=0, high=0.99)
    lora_targets: str = arg("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers of the language model")
    vit_lora_r: int = arg(16, "rank of the ViT's adapters; 0: it is frozen", low=0)
    vit_lora_alpha: float = arg(32.0, "their strength is alpha / rank")
    vit_lora_dropout: float = arg(0.1, "of the adapters' inputs, while training")
    projector_hidden: int = arg(0, "width between picture and language; 0: the language model's", low=0)
    projector_dropout: float = arg(0.1, "in the projector, while training")
    vocab_size: int = arg(800, "words of a model trained from scratch", low=514, high=1 << 20)
    max_length: int = arg(
        120, "tokens of a caption; what is longer is cut, and said", low=3, high=4096, group="captions"
    )
    max_new_tokens: int = arg(120, "of the sample captions", low=1)
    samples: int = arg(5, "sample captions printed after each epoch", low=0)
    save_epochs: int = arg(5, "epochs between checkpoints/epoch_N; 0: none", low=0)
    output_dir: str = arg("results/vit_llama3_2_1B", "checkpoints/, metrics.jsonl, samples.jsonl, loss.png")
    epochs: int = arg(10, "passes over the training pictures")
    batch_size: int = arg(12, "pictures of a process in a micro-batch")
    lr: float = arg(3e-4, "peak learning rate")
    lr_scheduler: str = arg("constant_with_warmup", "learning rate over the run", choices=LR_SCHEDULERS)
    lr_warmup_steps: float = arg(
        0.03, "updates of linear warm-up (--lr-scheduler constant has none); below 1: a share of the run"
    )
    optimizer: str = arg("schedule_free", "schedule_free: a constant rate, and a mean of all weights so far in place of a schedule; muon: "
                         "orthogonal updates for the matrices of the blocks, AdamW for the rest", choices=OPTIMIZERS)  # fmt: skip
    adam_beta2: float = arg(0.999, "AdamW's decay of the square")
    ema: bool = arg(False, "average the weights")
    checkpointing_steps: int = arg(0, "updates between states to resume from; 0: an epoch's")
    checkpoints_total_limit: int | None = arg(1, "such states to keep")
    random_flip: bool = arg(False, "mirror half of the pictures", group="pictures")
    random_jitter: float = arg(0.0, "brightness, contrast and saturation times 1 ± this", low=0, high=0.9)
    random_rotate: float = arg(0.0, "turn by up to so many degrees", low=0, high=180)
    num_workers: int = arg(0, "processes that decode pictures", low=0, high=256)
    hf_token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)")

    def check(self):
        self.check_ranges()
        if self.parallel == "fsdp":
            raise UserError("--parallel fsdp: adapters in fp32 beside frozen weights in half precision cannot be sharded together; a copy "
                            "of the frozen model fits on each GPU (--parallel ddp)")  # fmt: skip
        for name in ("projector_dropout", "vit_lora_dropout"):
            if not 0 <= getattr(self, name) < 1:
                raise UserError(f"--{name.replace('_', '-')} {getattr(self, name):g} must be at least 0 and below 1")
        typed = sorted(n for n in getattr(self, "given", ()) if n.startswith(("lora_", "vit_lora_")))
        if self.model_size != "pretrained":
            typed += [n for n in ("model_name", "vision_model", "lora") if n in getattr(self, "given", ())]
            self.lora = False
        if typed and not self.lora:
            raise UserError(
                f"--{typed[0].replace('_', '-')} is for adapters on pretrained models (--model-size pretrained, --lora)"
            )


# ---------------------------------------------------------------------------------------------------------
# Inference


@dataclass
class Inference(Stage):
    model_file: str = arg("", "a captioner: OUTPUT_DIR/checkpoints/best_model (.pt), last_checkpoint, epoch_N")
    model_name: str | None = arg(None, "the language model, where it lies elsewhere than in training")
    vision_model: str | None = arg(None, "the ViT, where it lies elsewhere than in training")
    max_new_tokens: int = arg(120, "of a caption", low=1)
    beams: int = arg(1, "captions that are searched at a time; 1: the likeliest token each time", low=1)
    batch_size: int = arg(12, "pictures at a time", low=1)
    quantize: str | None = arg(
        None, "weights of the language model in 8 or 4 bits (int4: on a CPU)", choices=("int8", "int4")
    )


@dataclass
class Infer(Inference):
    infer_image_path: str = arg("", "a picture, a folder of pictures, or a CSV with Image_Name")
    image_path: list[str] = arg([], "folder of a CSV's pictures; may be repeated [images/ beside the CSV]")
    skip_bad: bool = arg(False, "leave out, counted and said, pictures that cannot be read")
    output_dir: str = arg("out/infer", "captions.csv, sheet.png")


@dataclass
class Eval(Inference, Files):
    eval_set: str = arg("test", "which of the three CSVs", choices=("train", "val", "test"))
    metrics: str = arg("", "some of bleu1, bleu2, bleu3, bleu4, rouge_l, rouge_l_f1, meteor, cider, perplexity, clip_score; default: all that can be had")  # fmt: skip
    tokenize: str = arg("ptb", "how captions become words: COCO's way, or at spaces", choices=("ptb", "none"))
    max_samples: int | None = arg(None, "only the first N pictures", low=1)
    weights_dir: str | None = arg(None, "folder of CLIP's weights, for the CLIP score (see eval.py images)")
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    bootstrap: int = arg(1000, "resamples of the intervals; 0: none", low=0)
    sheet: int = arg(24, "pictures on the sheet", low=0)
    seed: int = arg(0, "of the resampling")
    output_dir: str = arg("out/caption-eval", "metrics.json, captions.csv, sheet.png, report.html")


STAGES = {
    "augment": (Augment, "nanodiff.stories.captions:augment"),
    "synthesize": (Synthesize, "nanodiff.stories.captions:synthesize"),
    "split": (Split, "nanodiff.stories.captions:split"),
    "train": (Train, "nanodiff.stories.captioner:train"),
    "infer": (Infer, "nanodiff.stories.captioner:infer"),
    "eval": (Eval, "nanodiff.stories.captioner:evaluate"),
    "complete": (Complete, "nanodiff.stories.captions:complete"),
}


def worded(argv):
    """The document's `-t train …` (or --task) as `train …`."""
    for i, word in enumerate(argv):
        flag, eq, value = word.partition("=")
        if flag in ("-t", "--task"):
            rest = argv[:i] + argv[i + 1 + (not eq) :]
            return [value if eq else (argv[i + 1] if i + 1 < len(argv) else ""), *rest]
    return argv


if __name__ == "__main__":
    # not where prompts and templates are the user's own words
    if sys.argv[1:2] not in (["complete"], ["augment"], ["synthesize"]):
        sys.argv[1:] = worded(sys.argv[1:])
    sys.exit(script(STAGES, __doc__, less_memory=LESS_MEMORY))
