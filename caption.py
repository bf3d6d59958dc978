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

import dataclasses
import math
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanodiff.config import UserError, arg, printable, script
from nanodiff.options import LR_SCHEDULERS, OPTIMIZERS, Training, least, listed, parse_size

LESS_MEMORY = "try --dtype bf16 (train: --mixed-precision bf16), a smaller --batch-size, --gradient-checkpointing, fewer --max-new-tokens"


@dataclass
class Common:
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = arg(
        "auto", "weights: auto is half precision on a GPU and fp32 on a CPU", choices=("auto", "fp32", "fp16", "bf16")
    )
    kernels: str = arg("auto", "our Triton kernels on a GPU: auto falls back and says why, triton never falls back, torch uses none",
                       choices=("auto", "triton", "torch"))  # fmt: skip
    hf_token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)", "token", "hub-token")


def begin(cfg):
    """(device, Record) of a stage, joined with the other processes if there are any."""
    from nanodiff import dist, engine
    from nanodiff.config import as_dict
    from nanodiff.models import layers

    device = engine.pick_device(cfg.device)
    if hasattr(cfg, "dist_timeout"):
        dist.start(device, cfg.dist_timeout)
        dist.agree(as_dict(cfg), "configuration")
    layers.use_kernels(cfg.kernels)
    return device, engine.Record(cfg, device)


def end(record):
    from nanodiff import dist

    record.write()
    dist.finish()


def language_dtype(cfg, device):
    """torch dtype of a language model: bf16 on a GPU by itself."""
    import torch

    from nanodiff import engine

    if cfg.dtype == "auto":
        return torch.bfloat16 if device.type == "cuda" else torch.float32
    return engine.pick_dtype(cfg.dtype, device)


def language(cfg, device):
    """(CausalLM, TextTokenizer) of --model."""
    from nanodiff import dist, hub, sources

    folder = dist.on_main(hub.resolve, cfg.model, None, cfg.hf_token)
    return dist.together(sources.load_language, folder, language_dtype(cfg, device), device)


# ---------------------------------------------------------------------------------------------------------
# Texts


@dataclass
class Complete(Common):
    model: str = arg("", "folder or Hub id of a LLaMA 3.2 or Gemma 3 text model", "model-name")
    prompt: str = arg("", "the text to go on with")
    chat: bool = arg(False, "the prompt is a request, in Gemma's chat form")
    max_new_tokens: int = arg(128, "at most so many new tokens")
    temperature: float = arg(1.0, "0: the likeliest token each time; larger: more chance")
    top_k: int = arg(0, "only the so many likeliest tokens; 0: all")
    top_p: float = arg(1.0, "only the likeliest tokens that together have this share")
    min_p: float = arg(0.0, "only tokens with at least this share of the likeliest's")
    repetition_penalty: float = arg(1.0, "above 1: tokens that were there are less likely")
    beams: int = arg(1, "texts that are searched at a time, with --temperature 0")
    seed: int = arg(0, "of the draws")
    output_dir: str = arg("out/complete", "run.json")


def complete(cfg):
    """The stage `complete`: see the module docstring."""
    from nanodiff import textgen

    for name in ("model", "prompt"):
        if not getattr(cfg, name):
            raise UserError(f"--{name} is required")
    least(cfg, max_new_tokens=1, beams=1)
    chance = textgen.Chance(cfg.temperature, cfg.top_k, cfg.top_p, cfg.min_p, cfg.repetition_penalty)
    device, record = begin(cfg)
    with record.timed("load"):
        net, tokenizer = language(cfg, device)
    text = textgen.chat([{"role": "user", "content": cfg.prompt}]) if cfg.chat else cfg.prompt
    ids = tokenizer.ids(text, begin=not cfg.chat)
    times = []
    with record.timed("write"):
        (written,) = textgen.generate(net, [ids], cfg.max_new_tokens, chance, net.cfg.eos_token_id, [cfg.seed], cfg.beams,
                                      on_step=lambda i, seconds: times.append(seconds))  # fmt: skip
    record.data["results"] = {"prompt_ids": ids, "ids": written.ids, "ended": written.ended}
    if len(times) > 1:
        rate = (len(times) - 1) / sum(times[1:])
        record.data["results"]["tokens_per_s"] = rate
        print(f"{len(ids)} tokens read in {times[0]:.2f} s, then {rate:.1f} tokens/s", file=sys.stderr)
    record.write()
    print(tokenizer.rest(ids, written.ids))


# ---------------------------------------------------------------------------------------------------------
# New captions


@dataclass
class Augment(Common):
    data_csv: str = arg(
        "data/titles.csv", "captions to vary: Image_Name and Title (a text, or a list of texts)", "captions"
    )
    model: str = arg(
        "google/gemma-3-1b-it", "the language model: folder or Hub id of a Gemma 3 or LLaMA 3.2", "model-name"
    )
    output_dir: str = arg("results/synthetic_data", "augmented_captions.csv, and what synthesize makes of it")
    variations: int = arg(3, "new captions for each")
    start_idx: int = arg(0, "begin at this caption")
    max_samples: int | None = arg(None, "no more captions than so many")
    template: str | None = arg(None, "the request, or a text file of it, with {caption}, {n}, {low}, {high}; with {first}, the caption's first word, which the reply goes on from")  # fmt: skip
    chat: str = arg("auto", "ask in Gemma's chat form; auto: a Gemma is", choices=("auto", "yes", "no"))
    temperature: float = arg(0.7, "0: the likeliest token each time; larger: more chance")
    top_k: int = arg(0, "only the so many likeliest tokens; 0: all")
    top_p: float = arg(0.9, "only the likeliest tokens that together have this share")
    repetition_penalty: float = arg(1.0, "above 1: tokens that were there are less likely")
    max_new_tokens: int = arg(256, "of a reply")
    min_words: int = arg(2, "words of a new caption, at least")
    max_words: int = arg(10, "words of a new caption, at most")
    attempts: int = arg(5, "replies for a caption, after which fewer variations have to do")
    batch_size: int = arg(8, "captions at a time")
    clean: bool = arg(False, "lower case and single spaces, for captions and variations")
    skip_bad: bool = arg(False, "leave out, counted and said, rows without a caption")
    seed: int = arg(42, "of the draws")
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost")


REQUEST = ('Write {n} different variations of this caption of a picture: "{caption}". Keep the kind of thing, and change its ingredients, its '
           "style or how it is made. Each variation has {low} to {high} words and stands on a line of its own. Write the variations alone.")  # fmt: skip
EXAMPLE = ("Caption: Grilled Salmon with Lemon\nVariations:\n- Smoked salmon with dill and lemon\n- Salmon tartare on rye toast\n- Baked salmon "
           "in a herb crust\n\nCaption: Iced Tea\nVariations:\n- Peach iced tea with mint\n- Green tea over ice with honey\n- Sparkling "
           "hibiscus iced tea\n\nCaption: {caption}\nVariations:\n-")  # fmt: skip
JOURNAL = "augmented"


def augment(cfg):
    """The stage `augment`: new captions for each of a CSV's, by a language model; the same for any number of processes."""
    from nanodiff import captionset, dist, textgen

    least(cfg, variations=1, start_idx=0, max_new_tokens=1, min_words=1, attempts=1, batch_size=1, max_samples=1)
    if cfg.max_words < cfg.min_words:
        raise UserError(f"--max-words {cfg.max_words} is less than --min-words {cfg.min_words}")
    chance = textgen.Chance(cfg.temperature, cfg.top_k, cfg.top_p, 0.0, cfg.repetition_penalty)
    device, record = begin(cfg)
    rows = dist.on_main(captionset.read, cfg.data_csv, cfg.clean, cfg.skip_bad)
    if cfg.start_idx >= len(rows):
        raise UserError(f"--start-idx {cfg.start_idx}: {cfg.data_csv} has {len(rows)} captions")
    template = template_of(cfg)
    with record.timed("load"):
        net, tokenizer = language(cfg, device)
    chat = cfg.chat == "yes" or (cfg.chat == "auto" and net.cfg.gemma)
    template = template or (REQUEST if chat else EXAMPLE)
    settings = {k: getattr(cfg, k) for k in ("model", "variations", "temperature", "top_k", "top_p", "repetition_penalty", "max_new_tokens",
                                             "min_words", "max_words", "attempts", "clean", "seed")}  # fmt: skip
    settings |= {"template": template, "chat": chat, "dtype": str(net.output.dtype).removeprefix("torch.")}
    work = captionset.Journal(record.out, JOURNAL, rows, settings)
    some = range(cfg.start_idx, min(len(rows), cfg.start_idx + (cfg.max_samples or len(rows))))
    groups = [list(some[i : i + cfg.batch_size]) for i in range(0, len(some), cfg.batch_size)]
    todo = [g for g in groups if any(i not in work.done for i in g)]
    if len(todo) < len(groups):
        dist.say(f"{record.out}: {sum(i in work.done for i in some)} of {len(some)} captions are varied already")
    mine, rates = todo[dist.world().rank :: dist.world().size], []

    def enough(ids):
        """Has a reply said what is read of it?"""
        return ("\n" if "{first}" in template else "\n\n") in tokenizer.decode(ids)

    def one(group):
        """{row: (variations, replies)} of a group, whose rows ask again until they have enough."""
        got = {i: ([], 0) for i in group}
        for attempt in range(cfg.attempts if cfg.temperature else 1):  # the likeliest reply is always the same
            lacking = [i for i in group if len(got[i][0]) < cfg.variations]
            if not lacking:
                break
            texts = [asked(cfg, template, rows[i], cfg.variations - len(got[i][0])) for i in lacking]
            ids = [
                tokenizer.ids(textgen.chat([{"role": "user", "content": t}]) if chat else t, begin=not chat)
                for t in texts
            ]
            seeds = [captionset.seed_of(cfg.seed, rows[i].name, attempt) for i in lacking]
            start = time.perf_counter()
            written = textgen.generate(net, ids, cfg.max_new_tokens, chance, net.cfg.eos_token_id, seeds,
                                       until=None if chat else enough)  # fmt: skip
            rates.append((sum(len(w.ids) for w in written), time.perf_counter() - start))
            for i, prompt, w in zip(lacking, ids, written, strict=True):
                reply = tokenizer.rest(prompt, w.ids)
                if "{first}" in template:
                    reply = rows[i].captions[0].split()[0] + reply.split("\n")[0]
                elif not chat:
                    reply = reply.split("\n\n")[0]
                known, _ = got[i]
                fresh = captionset.variations(
                    reply, rows[i].captions[0], cfg.min_words, cfg.max_words, (*known, *rows[i].captions)
                )
                fresh = [captionset.cleaned(t) for t in fresh] if cfg.clean else fresh
                got[i] = ([*known, *fresh][: cfg.variations], attempt + 1)
        return got

    def run():
        for group in dist.progress(mine, len(mine), "captions (batches)"):
            for i, (found, replies) in one(group).items():
                work.add(i, found, replies)

    with record.timed("write"):
        dist.together(run)
    counts = work.finish(cfg.variations)
    tokens, seconds = (sum(column) for column in zip(*rates, strict=True)) if rates else (0, 0.0)
    if seconds:
        dist.say(f"{tokens} tokens in {seconds:.1f} s: {tokens / seconds:.1f} tokens/s in a process")
        record.data["results"]["tokens_per_s"] = tokens / seconds
    for name, value in counts.items():
        record.result(name, value)
    if counts["captions_with_fewer"]:
        dist.say(
            f"warning: {counts['captions_with_fewer']} of {counts['captions']} captions have fewer than {cfg.variations} variations "
            f"after {cfg.attempts} replies; {work.shortfall} names them"
        )
    record.file(work.csv)
    end(record)


def template_of(cfg):
    """The request's text, or None. Raises UserError for one that does not name the caption."""
    from nanodiff.promptset import names_in

    if cfg.template is None:
        return None
    path = Path(cfg.template)
    text = path.read_text(encoding="utf-8-sig") if path.suffix == ".txt" and path.is_file() else cfg.template
    names = names_in(text)
    if strange := [n for n in names if n not in ("caption", "n", "low", "high", "first")]:
        raise UserError(
            f"--template: {{{printable(strange[0])}}} is none of {{caption}}, {{n}}, {{low}}, {{high}}, {{first}}"
        )
    if not {"caption", "first"} & set(names):
        raise UserError("--template names neither {caption} nor {first}, so all captions would get the same variations")
    return text


def asked(cfg, template, row, n):
    """The request for one caption."""
    caption = row.captions[0]
    for name, value in (
        ("n", n),
        ("low", cfg.min_words),
        ("high", cfg.max_words),
        ("first", caption.split()[0]),
        ("caption", caption),
    ):
        template = template.replace(f"{{{name}}}", str(value))
    return template


# ---------------------------------------------------------------------------------------------------------
# Pictures of them


@dataclass
class Synthesize(Common):
    data_csv: str | None = arg(
        None, "captions, one picture each; default: OUTPUT_DIR/augmented_captions.csv", "captions"
    )
    model: str = arg("stabilityai/stable-diffusion-2-1", "what draws: folder or Hub id", "model-id")
    output_dir: str = arg("results/synthetic_data", "images/ and synthetic_captions.csv")
    template: str = arg("A professional, realistic photograph of {caption}, appetizing, natural light, sharp focus", "the positive prompt, with {caption}")  # fmt: skip
    negative_prompt: str = arg(
        "blurry, unrealistic, low resolution, overexposed, unnatural colors, text, watermark", "what to keep away from"
    )
    scheduler: str = arg("auto", "sampler; auto: ddpm, or a flow's own")
    steps: int = arg(50, "sampling steps", "num-inference-steps")
    guidance_scale: float = arg(7.5, "guidance")
    height: int | None = arg(None, "pixels drawn; default: the model's own")
    width: int | None = arg(None, "pixels drawn; default: the model's own")
    resize: str = arg("274x169", "WIDTHxHEIGHT of the written pictures; none: as drawn")
    format: str = arg("jpg", "of the pictures", choices=("jpg", "png"))
    batch_size: int = arg(4, "pictures at a time")
    skip_bad: bool = arg(False, "leave out, counted and said, rows without a caption")
    seed: int = arg(42, "a picture's seed is a function of it and of its name")
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost")


def synthesize(cfg):
    """The stage `synthesize`: a picture for each caption; the same for any number of processes."""
    from nanodiff import captionset, dist, engine, gallery, pipeline

    least(cfg, steps=1, batch_size=1)
    if "{caption}" not in cfg.template:
        raise UserError("--template does not name {caption}, so all pictures would be of the same words")
    size = parse_size(cfg.resize, otherwise=", or none") if cfg.resize != "none" else None
    device, record = begin(cfg)
    source = cfg.data_csv or record.out / "augmented_captions.csv"
    rows = dist.on_main(captionset.read, source, False, cfg.skip_bad)
    with record.timed("load"):
        dtype = engine.pick_dtype(cfg.dtype, device)
        sd = dist.together(pipeline.load, cfg.model, dtype, device, token=cfg.hf_token)
        sd = sd.with_scheduler((None if sd.schedule.flow else "ddpm") if cfg.scheduler == "auto" else cfg.scheduler)
    negative, scale = cfg.negative_prompt or None, cfg.guidance_scale
    given = getattr(cfg, "given", frozenset())
    if sd.turbo and "guidance_scale" not in given:
        scale = None
    how = gallery.settings(
        sd, cfg.model, None if sd.turbo and "steps" not in given else cfg.steps, scale, cfg.height, cfg.width
    )
    if negative and how["guidance_scale"] <= 1:
        dist.say(f"warning: guidance is off at {how['guidance_scale']:g}; the negative prompt is not used")
        negative = None
    how |= {"negative_prompt": negative, "resize": size, "template": cfg.template}
    jobs = [
        gallery.Job(
            f"{row.name}.{cfg.format}",
            cfg.template.replace("{caption}", row.captions[0]),
            captionset.seed_of(cfg.seed, row.name),
        )
        for row in rows
    ]
    folder, listing = record.out / "images", record.out / "synthetic_captions.csv"
    by_name = {job.name: row for job, row in zip(jobs, rows, strict=True)}
    columns = {captionset.SOURCE: lambda row: row.source}
    dist.on_main(lambda: listing.exists() or captionset.append(listing, captionset.table([], columns)))
    with record.timed("draw"):
        failed = gallery.draw(sd, jobs, folder, how, cfg.batch_size, on_saved=lambda job: captionset.append(
            listing, captionset.line(by_name[job.name], columns)))  # fmt: skip
    drawn = [row for job, row in zip(jobs, rows, strict=True) if job.name not in failed]
    dist.on_main(captionset.write, listing, drawn, columns)
    record.result("pictures", len(drawn))
    record.result("failed", len(failed))
    for job in jobs:
        if job.name not in failed:
            record.file(folder / job.name, prompt=job.prompt, seed=job.seed)
    record.file(listing)
    end(record)


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


def split(cfg):
    """The stage `split`: see captionset.split()."""
    from nanodiff import captionset, engine

    for name in ("val_share", "test_share"):
        if not 0 < getattr(cfg, name) < 0.5:
            raise UserError(f"--{name.replace('_', '-')} {getattr(cfg, name):g} must be above 0 and below 0.5")
    record = engine.Record(cfg, engine.pick_device("cpu"))

    def rows_of(path):
        beside = Path(path).parent / "images"
        folders = cfg.image_path or ([beside] if beside.is_dir() else ["data/images"])
        return captionset.located(captionset.read(path, cfg.clean, cfg.skip_bad), folders, cfg.skip_bad)

    with record.timed("read"):
        original, synthetic = rows_of(cfg.original_csv), []
        for path in cfg.synthetic_csv:
            synthetic += rows_of(path)
    with record.timed("split"):
        shares = (1 - cfg.val_share - cfg.test_share, cfg.val_share, cfg.test_share)
        parts, counts = captionset.split(original, synthetic, cfg.seed, shares, cfg.apart, cfg.skip_bad)
    for name, rows in parts.items():
        path = Path(getattr(cfg, f"{name}_csv_path") or record.out / f"{name}.csv")
        engine.out_dir(path.parent)
        captionset.write(path, rows)
        record.file(path)
    for name, value in counts.items():
        record.result(name.replace(" ", "_"), value)
    record.write()


# ---------------------------------------------------------------------------------------------------------
# The captioner


@dataclass
class Files:
    train_csv_path: str = arg("data/train.csv", "Image_Name and Title of the training pictures")
    val_csv_path: str = arg("data/val.csv", "of the validation pictures")
    test_csv_path: str = arg("data/test.csv", "of the test pictures; train only sees that none of them is learned")
    image_path: list[str] = arg([], "folder of the pictures, {Image_Name}.jpg or .png; may be repeated [data/images]")
    skip_bad: bool = arg(False, "leave out, counted and said, rows without a caption or a picture")

    def folders(self):
        return self.image_path or ["data/images"]


@dataclass
class Train(Training, Files):
    model_name: str = arg(
        "meta-llama/Llama-3.2-1B",
        "the language model: folder or Hub id of a LLaMA 3.2 (1B, 3B) or Gemma 3",
        "language-model",
    )
    vision_model: str = arg("google/vit-base-patch16-224", "the ViT: folder or Hub id")
    model_size: str = arg("pretrained", "pretrained: those two; else a small ViT and LLaMA that begin anew, wholly trained", choices=("pretrained", "tiny", "nano"))  # fmt: skip
    lora: bool = arg(True, "train adapters beside resting models; --no-lora: all of both")
    lora_r: int = arg(8, "rank of the language model's adapters", "lora-rank")
    lora_alpha: float = arg(32.0, "their strength is alpha / rank")
    lora_dropout: float = arg(0.5, "of the adapters' inputs, while training")
    lora_targets: str = arg("q_proj,k_proj,v_proj,o_proj,gate_proj,up_proj,down_proj", "layers of the language model")
    vit_lora_r: int = arg(16, "rank of the ViT's adapters; 0: it rests")
    vit_lora_alpha: float = arg(32.0, "their strength is alpha / rank")
    vit_lora_dropout: float = arg(0.1, "of the adapters' inputs, while training")
    projector_hidden: int = arg(0, "width between picture and language; 0: the language model's")
    projector_dropout: float = arg(0.1, "in the projector, while training")
    vocab_size: int = arg(800, "words of a model that begins anew")
    max_length: int = arg(120, "tokens of a caption; what is longer is cut, and said")
    max_new_tokens: int = arg(120, "of the sample captions")
    samples: int = arg(5, "sample captions printed after each epoch")
    save_epochs: int = arg(5, "epochs between checkpoints/epoch_N; 0: none")
    output_dir: str = arg("results/vit_llama3_2_1B", "checkpoints/, metrics.jsonl, samples.jsonl, loss.png")
    epochs: int = arg(10, "passes over the training pictures", "num-epochs", "num-train-epochs")
    batch_size: int = arg(12, "pictures of a process in a micro-batch", "train-batch-size")
    lr: float = arg(3e-4, "peak learning rate", "learning-rate")
    lr_scheduler: str = arg("constant_with_warmup", "learning rate over the run", choices=LR_SCHEDULERS)
    lr_warmup_steps: float = arg(0.03, "updates of linear warm-up; below 1: a share of the run")
    optimizer: str = arg("schedule_free", "schedule_free: a constant rate, and a mean of all weights so far in place of a schedule",
                         choices=OPTIMIZERS)  # fmt: skip
    adam_beta2: float = arg(0.999, "AdamW's decay of the square")
    ema: bool = arg(False, "average the weights", "use-ema")
    checkpointing_steps: int = arg(0, "updates between states to resume from; 0: an epoch's")
    checkpoints_total_limit: int | None = arg(1, "such states to keep")
    random_flip: bool = arg(False, "mirror half of the pictures")
    random_jitter: float = arg(0.0, "brightness, contrast and saturation times 1 ± this", "color-jitter")
    random_rotate: float = arg(0.0, "turn by up to so many degrees")
    num_workers: int = arg(0, "processes that decode pictures", "dataloader-num-workers")
    hf_token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)", "token", "hub-token")

    def check(self):
        self.check_ranges()
        least(self, lora_r=1, vit_lora_r=0, samples=0, save_epochs=0, max_new_tokens=1, projector_hidden=0)
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


def train(cfg):
    """The stage `train`: validated after every epoch; checkpoints/best_model has the lowest validation loss of all epochs."""
    import torch

    from nanodiff import captioner, captionset, charts, dist, engine, loader, objective

    cfg.check()
    run = engine.Run(cfg)
    rows = {n: dist.on_main(part, cfg, n) for n in ("train", "val")}
    dist.on_main(held_out, cfg, rows)
    torch.manual_seed(cfg.seed)  # what begins anew
    net = dist.together(make, cfg, rows["train"], run)
    if cfg.lora:
        captioner.adapt(net, captioner.Adapters(cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, listed(cfg.lora_targets)),
                        captioner.Adapters(cfg.vit_lora_r, cfg.vit_lora_alpha, cfg.vit_lora_dropout, captioner.VIT_TARGETS))  # fmt: skip
    ids = {n: dist.together(captions_of, net, rows[n], cfg, n) for n in rows}
    sets = {n: captionset.pictures(rows[n], cfg.train_csv_path) for n in rows}
    how = net.pictures.transform
    change = loader.Transform(
        how.resolution, True, cfg.random_flip, cfg.random_jitter, cfg.random_rotate, how.interpolation, True
    )
    policy = {"policy": "skip" if cfg.skip_bad else "stop", "limit": 1.0, "timeout": cfg.dist_timeout}
    feed = loader.Feed(sets["train"], change, cfg.seed, cfg.batch_size, cfg.grad_accum, cfg.num_workers, **policy)
    checks = loader.Feed(sets["val"], how, cfg.seed, cfg.batch_size, **policy)
    run.cfg = cfg = dataclasses.replace(cfg, checkpointing_steps=cfg.checkpointing_steps or feed.per_epoch)
    calls = run.trainable({"captioner": net})
    run.schedule(feed.per_epoch)
    run.resume()
    dist.on_main(tidy, run, cfg)
    run.same("data set", [s.fingerprint() for s in sets.values()], must=True)
    feed.interrupted = run.interrupted
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    dist.say(f"captioner: {trained / 1e6:.2f} M of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters learn; "
             f"{len(sets['train'])} training and {len(sets['val'])} validation pictures")  # fmt: skip

    def chosen(part, index, position):
        """One of a picture's captions: for training drawn by its global sample index, else the first."""
        own = ids[part][position]
        one = objective.generator(cfg.seed, "caption", index) if part == "train" and len(own) > 1 else None
        return own[torch.randint(len(own), (), generator=one).item() if one else 0]

    def rows_of(part, batch):
        texts = [chosen(part, i, p) for i, p in zip(batch.indices, batch.positions, strict=True)]
        longest = max(map(len, texts))
        return torch.tensor([t + [captioner.NO_LABEL] * (longest - len(t)) for t in texts], device=run.device)

    def tokens(step):
        """Caption tokens of a whole update over its pictures: by it a micro-batch's sum becomes its part of the mean over tokens."""
        first, positions = feed.plan.update(step)
        return sum(len(chosen("train", first + k, int(p))) for k, p in enumerate(positions)) / len(positions)

    for step in run.steps():
        mean = tokens(step)
        for batch in feed.update(step):
            torch.manual_seed(objective.generator(cfg.seed, "dropout", next(iter(batch.indices), 0)).initial_seed())
            with run.forward(batch):
                loss = calls["captioner"](batch.pixels.to(run.device), rows_of("train", batch)) / (
                    mean * len(batch.positions)
                )
            run.backward(loss, batch)
        run.update()
        if run.epoch_ended() or step + 1 == run.total:
            epoch = -(-(step + 1) // feed.per_epoch)
            feed.report_bad(run.out)
            with run.averaged():
                found = validate(run, net, checks, lambda b: rows_of("val", b))
                run.log(val_loss=found)
                told = show(run, net, sets["val"], rows["val"], cfg, epoch)
                best = run.judge(found)
                facts = {
                    "epoch": epoch,
                    "step": step + 1,
                    "val_loss": found if math.isfinite(found) else None,
                    "best_val_loss": run.best,
                }
                names = (
                    ["last_checkpoint"] + ["best_model"] * best + [f"epoch_{epoch}"] * run.every_epochs(cfg.save_epochs)
                )
                for name in names:
                    write(run, net, name, facts, not cfg.lora)
            dist.say(
                f"epoch {epoch}: validation loss {found:.4f}"
                + (" (the best so far)" if best else f" (best: {run.best:.4f})" if run.best is not None else "")
            )
            for line in told:
                dist.say(line)
    run.save()
    if run.best is not None:
        run.record.result("best_val_loss", run.best)
    for name in ("best_model", "last_checkpoint"):
        if dist.on_main((run.out / "checkpoints" / name).is_dir):
            run.record.file(run.out / "checkpoints" / name)
    log = run.out / "metrics.jsonl"
    if dist.on_main(lambda: log.exists() and bool(charts.losses(log, run.out / "loss.png", ("loss", "val_loss")))):
        run.record.file(run.out / "loss.png")
    run.close()


def held_out(cfg, rows):
    """Raise UserError when a picture of --test-csv-path would be learned from or chosen by; the default one counts where it is of the same
    split, beside the training CSV."""
    from nanodiff import captionset

    typed = "test_csv_path" in getattr(cfg, "given", ())
    if not Path(cfg.test_csv_path).is_file():
        if typed:
            raise UserError(f"--test-csv-path {cfg.test_csv_path}: no such file")
        return
    if not typed and Path(cfg.test_csv_path).parent.resolve() != Path(cfg.train_csv_path).parent.resolve():
        return
    tested = {row.name for row in captionset.read(cfg.test_csv_path, captions=False)}
    for name, some in rows.items():
        if known := [row.name for row in some if row.name in tested]:
            raise UserError(f"{len(known)} pictures of {cfg.test_csv_path} are also in {getattr(cfg, f'{name}_csv_path')}, such as {printable(known[0])}: "
                            "they could not be tested")  # fmt: skip


def tidy(run, cfg):
    """A new run does not mix its captioners with an older one's; a resumed one takes its last epoch's samples again."""
    import json
    import shutil

    from nanodiff.weights import write_bytes

    if not run.step and not cfg.resume and (run.out / "checkpoints").exists():
        if not cfg.overwrite_output_dir:
            raise UserError(
                f"{run.out}: has captioners of an earlier run; take another --output-dir, or --overwrite-output-dir"
            )
        shutil.rmtree(run.out / "checkpoints")
    samples = run.out / "samples.jsonl"
    if samples.exists():
        kept = [
            x
            for x in samples.read_text(encoding="utf-8").split("\n")[:-1]
            if json.loads(x)["epoch"] * run.per_epoch <= run.step
        ]
        write_bytes(samples, "".join(f"{x}\n" for x in kept).encode())


def part(cfg, name):
    """The located rows of a part: "train", "val", "test"."""
    from nanodiff import captionset

    path = getattr(cfg, f"{name}_csv_path")
    if not Path(path).is_file():
        raise UserError(f"--{name}-csv-path {path}: no such file (caption.py split writes it)")
    return captionset.located(captionset.read(path, skip=cfg.skip_bad), cfg.folders(), cfg.skip_bad)


def make(cfg, rows, run):
    """A Captioner to train, on the run's device."""
    import torch

    from nanodiff import captioner

    settings = captioner.Settings(
        cfg.vision_model, cfg.model_name, hidden=cfg.projector_hidden, dropout=cfg.projector_dropout
    )
    if cfg.model_size != "pretrained":
        texts = [t for row in rows for t in row.captions]
        return captioner.fresh(cfg.model_size, texts, settings, cfg.vocab_size).to(run.device)
    low = run.precision if cfg.lora and run.precision else torch.float32
    net = captioner.base(settings, low, run.device, cfg.hf_token)
    return net if cfg.lora else net.requires_grad_(True)


def captions_of(net, rows, cfg, name):
    """[[ids with the end token] of each caption] of each row; says how many were cut."""
    from nanodiff import dist

    out, cut = [], 0
    for row in rows:
        out.append([net.caption_ids(t, cfg.max_length) for t in row.captions])
        cut += sum(
            len(net.tokenizer.ids(t.strip(), begin=False)) >= min(cfg.max_length, net.room) for t in row.captions
        )
    if cut:
        dist.say(
            f"warning: {cut} captions of {getattr(cfg, f'{name}_csv_path')} are longer than --max-length {cfg.max_length} tokens, and cut"
        )
    return out


def validate(run, net, feed, ids_of):
    """Mean cross-entropy per caption token of the validation pictures, in nats."""
    from nanodiff import captioner, dist

    total = [0.0, 0.0]
    for step in range(feed.per_epoch):
        for batch in feed.update(step):
            if batch.count:
                ids = ids_of(batch)
                with run.autocast():
                    total[0] += net(batch.pixels.to(run.device), ids).item()
                total[1] += (ids != captioner.NO_LABEL).sum().item()
    sums, tokens = dist.total(total, run.device)
    return sums / tokens


def show(run, net, dataset, rows, cfg, epoch):
    """Lines with what is told of the first validation pictures now, also in samples.jsonl, and as a sheet."""
    import json

    from nanodiff import dist, images

    def tell():
        if not cfg.samples:
            return []
        kept, some = readable(rows[: cfg.samples], cfg.skip_bad)
        some = [open_picture() for open_picture in some]
        texts = net.describe(some, cfg.max_new_tokens)
        lines = [
            {"epoch": epoch, "image": row.name, "reference": row.captions[0], "prediction": t}
            for row, t in zip(kept, texts, strict=True)
        ]
        with open(run.out / "samples.jsonl", "a", encoding="utf-8") as f:
            f.writelines(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
        images.save_png(sheet_of(some, [x["reference"] for x in lines], texts), run.out / "samples.png")
        return [
            f"  {printable(x['image'])}: {printable(x['prediction'])!r} (reference: {printable(x['reference'])!r})"
            for x in lines
        ]

    return dist.on_main(tell)


def sheet_of(pictures, references, predictions, side=160):
    """One PIL sheet: each picture below its reference (in brackets, if there is one) and what was told."""
    from nanodiff import images

    labels = [
        f"{p or '(nothing)'} [{r}]" if r else p or "(nothing)" for p, r in zip(predictions, references, strict=True)
    ]
    small = [images.fit(p, side, side) for p in pictures]
    return images.grid(small, min(6, len(small)), labels, size=12)


def write(run, net, name, facts, whole):
    from nanodiff import captioner, dist

    dist.on_main(captioner.save, net, run.out / "checkpoints" / name, net.state_dict(), whole, facts)


# ---------------------------------------------------------------------------------------------------------
# What it tells


@dataclass
class Telling(Common):
    model_file: str = arg("", "a captioner: OUTPUT_DIR/checkpoints/best_model (.pt), last_checkpoint, epoch_N")
    model_name: str | None = arg(None, "the language model, where it lies elsewhere than in training", "language-model")
    vision_model: str | None = arg(None, "the ViT, where it lies elsewhere than in training")
    max_new_tokens: int = arg(120, "of a caption")
    beams: int = arg(1, "captions that are searched at a time; 1: the likeliest token each time")
    batch_size: int = arg(12, "pictures at a time")

    def load(self, device):
        from nanodiff import captioner

        if not self.model_file:
            raise UserError("--model-file is required, such as results/vit_llama3_2_1B/checkpoints/best_model.pt")
        least(self, max_new_tokens=1, beams=1, batch_size=1)
        net = captioner.load(
            self.model_file, language_dtype(self, device), device, self.model_name, self.vision_model, self.hf_token
        )
        for name, given in (("language_model", self.model_name), ("vision_model", self.vision_model)):
            if given and not getattr(net.settings, name):
                raise UserError(
                    f"--{name.replace('_', '-')}: {self.model_file} brings its own, which was wholly trained"
                )
        return net

    def tell(self, net, pictures, record):
        """Captions of PIL pictures; says the speed."""
        from nanodiff import dist

        groups = [pictures[i : i + self.batch_size] for i in range(0, len(pictures), self.batch_size)]
        out, steps = [], []
        with record.timed("tell"):
            for group in dist.progress(groups, len(groups), "captions (batches)"):
                start, taken = time.perf_counter(), []
                out += net.describe(
                    [f() for f in group],
                    self.max_new_tokens,
                    self.beams,
                    on_step=lambda i, s, kept=taken: kept.append(s),
                )
                steps.append((len(taken) * len(group), time.perf_counter() - start))
        if sum(n for n, _ in steps):
            rate = sum(n for n, _ in steps) / sum(s for _, s in steps)
            record.data["results"]["tokens_per_s"] = rate
            dist.say(f"{len(out)} pictures, {rate:.1f} tokens/s with their reading")
        return out


@dataclass
class Infer(Telling):
    infer_image_path: str = arg("", "a picture, a folder of pictures, or a CSV with Image_Name", "image")
    image_path: list[str] = arg([], "folder of a CSV's pictures; may be repeated [images/ beside the CSV]")
    skip_bad: bool = arg(False, "leave out, counted and said, pictures that cannot be read")
    output_dir: str = arg("out/infer", "captions.csv, sheet.png")


def infer(cfg):
    """The stage `infer`: one picture's caption is printed alone; of several, a line each with the picture's name."""
    from nanodiff import captionset, images

    if not cfg.infer_image_path:
        raise UserError("--infer-image-path is required: a picture, a folder, or a CSV")
    rows = to_tell(cfg)
    device, record = begin(cfg)
    with record.timed("load"):
        net = cfg.load(device)
    rows, shown = readable(rows, cfg.skip_bad)
    texts = cfg.tell(net, shown, record)
    told = [row._replace(captions=(t,)) for row, t in zip(rows, texts, strict=True)]
    captionset.write(record.out / "captions.csv", told)
    sheet = sheet_of(
        [open_picture() for open_picture in shown[:48]],
        [row.captions[0] if row.captions else "" for row in rows[:48]],
        texts[:48],
    )
    images.save_png(sheet, record.out / "sheet.png")
    for path in (record.out / "captions.csv", record.out / "sheet.png"):
        record.file(path)
    record.data["results"]["captions"] = {row.name: row.captions[0] for row in told}
    record.write()
    alone = Path(cfg.infer_image_path).suffix.lower() != ".csv" and len(told) == 1
    for row in told:
        text = printable(row.captions[0])  # a model may write anything, and this goes to a terminal
        print(text if alone else f"{printable(row.name)}\t{text}")


def to_tell(cfg):
    """[Row] of --infer-image-path. Raises UserError."""
    from nanodiff import captionset, data

    path = Path(cfg.infer_image_path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in data.SUFFIXES)
        if not files:
            raise UserError(
                f"--infer-image-path {path}: no pictures in it (looked for {', '.join(sorted(data.SUFFIXES))})"
            )
        return [captionset.Row(p.name, (), str(p)) for p in files]
    if not path.is_file():
        raise UserError(f"--infer-image-path {path}: no such file or folder")
    if path.suffix.lower() == ".csv":
        return captionset.located(
            captionset.read(path, captions=False), cfg.image_path or [path.parent / "images"], cfg.skip_bad
        )
    return [captionset.Row(path.stem, (), str(path))]


def readable(rows, skip):
    """(rows, [f() -> PIL picture]) of those that can be read; the others raise UserError, or are said with --skip-bad."""
    import functools

    from nanodiff import dist, images

    kept, bad = [], []
    for row in rows:
        try:
            images.open_image(row.path)
            kept.append(row)
        except UserError as e:
            if not skip or len(rows) == 1:
                raise
            bad.append(str(e))
    if bad:
        dist.say(f"warning: {len(bad)} of {len(rows)} pictures cannot be read and are left out, such as {bad[0]}")
    if not kept:
        raise UserError(f"none of {len(rows)} pictures can be read: {bad[0] if bad else 'there are none'}")
    return kept, [functools.partial(images.open_image, row.path) for row in kept]


@dataclass
class Eval(Telling, Files):
    eval_set: str = arg("test", "which of the three CSVs", choices=("train", "val", "test"))
    metrics: str = arg("", "some of bleu1, bleu2, bleu3, bleu4, rouge_l, rouge_l_f1, meteor, cider, perplexity, clip_score; default: all that can be had")  # fmt: skip
    tokenize: str = arg("ptb", "how captions become words: COCO's way, or at spaces", choices=("ptb", "none"))
    max_samples: int | None = arg(None, "only the first N pictures")
    weights_dir: str | None = arg(None, "folder of CLIP's weights, for the CLIP score (see eval.py images)")
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    bootstrap: int = arg(1000, "resamples of the intervals; 0: none")
    sheet: int = arg(24, "pictures on the sheet")
    seed: int = arg(0, "of the resampling")
    output_dir: str = arg("out/caption-eval", "metrics.json, captions.csv, sheet.png, report.html")


def evaluate(cfg):
    """The stage `eval`: the pictures of a part against all their captions."""
    from nanodiff import charts, dist, features, images, report, textmetrics
    from nanodiff import evaluate as library

    asked_for = listed(cfg.metrics)
    least(cfg, max_samples=1, sheet=0, bootstrap=0)
    textmetrics.check_names([n for n in asked_for if n not in OWN])
    rows, shown = readable(part(cfg, cfg.eval_set)[: cfg.max_samples], cfg.skip_bad)
    if "cider" in asked_for and len(rows) == 1:
        raise UserError("--metrics cider weighs words by how few pictures have them, and here is one picture")
    device, record = begin(cfg)
    clip = library.Settings(
        groups=("clip_score",),
        must="clip_score" in asked_for,
        weights_dir=cfg.weights_dir,
        clip=cfg.clip,
        seed=cfg.seed,
        device=device,
    )
    if clip.must:
        try:
            library.clip_path(clip)
        except features.Absent as e:
            raise UserError(f"--metrics clip_score: {e}") from None
    with record.timed("load"):
        net = cfg.load(device)
    texts = cfg.tell(net, shown, record)
    found, scores, skipped = judged(cfg, net, rows, shown, texts, asked_for, clip)
    for reason in skipped:
        dist.say(f"note: not computed: {printable(reason)}")
    document = report.Report(f"Captions of {len(rows)} pictures ({cfg.eval_set})")
    document.text(
        f"Told by {cfg.model_file}. BLEU is the corpus's; the mean of single captions' BLEU, another number, is bleuN_mean. METEOR is without synonyms."
    )
    for path in report.write_metrics(record.out, found):
        record.file(path)
    report.metrics_table(document, found)
    header = ("Image_Name", "prediction", "references", *scores)
    lines = [
        [row.name, t, " | ".join(row.captions), *(s.each[i] for s in scores.values())]
        for i, (row, t) in enumerate(zip(rows, texts, strict=True))
    ]
    report.write_csv(record.out / "captions.csv", header, lines)
    series = {"": [(found[n]["value"], *(found[n].get("ci") or (found[n]["value"],) * 2)) for n in scores]}
    chart = charts.bars(record.out / "scores.png", list(scores), series, "with 95 % intervals") if scores else None
    document.picture(chart, "The set's scores")
    rank = next((s.each for n, s in scores.items() if n in ("cider", "meteor")), None) or [0.0] * len(rows)
    order = sorted(range(len(rows)), key=lambda i: -rank[i])
    some = sorted(
        {order[round(k * (len(order) - 1) / max(cfg.sheet - 1, 1))] for k in range(min(cfg.sheet, len(order)))},
        key=order.index,
    )
    if some:
        sheet = sheet_of([shown[i]() for i in some], [rows[i].captions[0] for i in some], [texts[i] for i in some])
        images.save_png(sheet, record.out / "sheet.png")
        document.picture(record.out / "sheet.png", "From the best told to the worst; in brackets the reference")
        record.file(record.out / "sheet.png")
    for path in (record.out / "captions.csv", *([chart] if chart else []), *document.write(record.out)):
        record.file(path)
    for name, m in found.items():
        record.result(name, m["value"])
    record.write()
    print(f"report: {record.out / 'report.html'}")


OWN = ("perplexity", "clip_score")  # metrics that are not of the words alone


def judged(cfg, net, rows, shown, texts, names, clip):
    """({metric: entry}, {metric: textmetrics.Score}, [why something is missing])."""
    from nanodiff import captionset, evaluate, report, textmetrics

    skipped = []
    wanted = tuple(n for n in names if n not in OWN) if names else textmetrics.NAMES
    if len(rows) == 1 and "cider" in wanted and not names:
        skipped.append("cider weighs words by how few pictures have them, and here is one picture")
        wanted = tuple(n for n in wanted if n != "cider")
    found, scores = {}, {}
    if wanted:
        found, _, scores = evaluate.captions({r.name: [t] for r, t in zip(rows, texts, strict=True)}, {r.name: list(r.captions) for r in rows},
                                             cfg.tokenize, wanted, cfg.bootstrap, cfg.seed)  # fmt: skip
    if not names or "perplexity" in names:
        nats, tokens = surprise(net, rows, shown, cfg.batch_size, clip.device)
        facts = report.provenance(
            form="exp of the mean cross-entropy per token of all references, end token included",
            tokenizer="the model's",
        )
        found["perplexity"] = report.entry(math.exp(min(nats / tokens, 700)), tokens, facts)
    if not names or "clip_score" in names:
        scored = evaluate.images(captionset.pictures(rows, cfg.eval_set), clip, None, texts, "captions")
        found |= {k: m for k, m in scored.metrics.items() if k.startswith("clip_score")}
        skipped += dict.fromkeys(scored.skipped.values())
    return found, scores, skipped


def surprise(net, rows, shown, batch_size, device):
    """(summed cross-entropy, tokens) of all references."""
    import torch

    from nanodiff import captioner

    pairs = [(i, net.caption_ids(t)) for i, row in enumerate(rows) for t in row.captions]
    nats = 0.0
    for k in range(0, len(pairs), batch_size):
        some = pairs[k : k + batch_size]
        longest = max(len(ids) for _, ids in some)
        ids = torch.tensor([t + [captioner.NO_LABEL] * (longest - len(t)) for _, t in some], device=device)
        with torch.inference_mode():
            nats += net(net.pictures.batch([shown[i]() for i, _ in some]).to(device), ids).item()
    return nats, sum(len(ids) for _, ids in pairs)


STAGES = {
    "augment": (Augment, augment),
    "synthesize": (Synthesize, synthesize),
    "split": (Split, split),
    "train": (Train, train),
    "infer": (Infer, infer),
    "eval": (Eval, evaluate),
    "complete": (Complete, complete),
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
