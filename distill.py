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

few-step: a student that needs 1 to 8 steps where its teacher needs 50 (nanodiff/fewstep.py has the equations).

Everything may be killed at any moment: the same command goes on with what is missing. Under torchrun the same pictures come out.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.config import UserError, arg, as_dict, printable, script
from nanodiff.options import Adapters, Noise, Training, least, listed

LESS_MEMORY = "try --batch-size 1 with --grad-accum, --gradient-checkpointing, a smaller --resolution"


@dataclass
class Recursive(Training, Noise):
    model: str = arg("CompVis/stable-diffusion-v1-4", "model to begin with: folder or Hub id")
    captions: str = arg("data/coco/annotations/captions_train2014.json", "COCO annotations (first caption of each picture), or any data set with captions")  # fmt: skip
    data_root: str = arg("data/coco", "the generations' pictures go here")
    models_root: str = arg("models", "the generations' models go here")
    output_dir: str = arg("out/recursive", "numbers, figures and the report")
    cfg_scale: float = arg(1.0, "guidance, of every generation; 1 is without", "guidance-scale")
    cfg_scales: list[float] = arg([], "several of them, one study each")
    target_gen: int = arg(3, "last generation")
    steps: int = arg(50, "sampling steps", "num-inference-steps")
    num_images: int = arg(100, "pictures of each generation after the first")
    gen0_images: int = arg(100, "pictures of generation 0")
    draw_batch_size: int = arg(4, "pictures drawn at a time")
    resolution: int | None = arg(None, "pixels along one side; default: the model's")
    scheduler: str | None = arg(None, "sampler; default: the model's own")
    baseline: bool = arg(False, "train on generation 0 always")
    finetune: bool = arg(False, "train on --real always")
    real: str | None = arg(None, "real pictures (with captions for --finetune and --real-fraction): FID is taken against them; default: generation 0")  # fmt: skip
    real_fraction: float = arg(0.0, "share of real pictures in the training set")
    accumulate: bool = arg(False, "train on all generations so far")
    evaluate: bool = arg(True, "measure every generation")
    weights_dir: str | None = arg(None, "Inception's and CLIP's weights (see eval.py images)")
    features: str = arg("inception,pixels", "spaces of FID and the like, comma-separated: inception, clip, pixels")
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    nearest_k: int = arg(5, "neighbours of precision, recall, density and coverage")
    epochs: int = arg(5, "passes over the pictures, per generation", "num-epochs", "num-train-epochs")
    batch_size: int = arg(1, "samples of a process in a micro-batch", "train-batch-size")
    lr: float = arg(1e-5, "peak learning rate", "learning-rate")
    lr_warmup_steps: float = arg(0.1, "updates of linear warm-up; below 1: a share of the run")
    adam_beta2: float = arg(0.999, "AdamW's decay of the square")
    ema: bool = arg(False, "average the weights", "use-ema")
    gradient_checkpointing: bool = arg(True, "keep less for the backward pass, compute it again")
    caption_dropout: float = arg(0.0, "share of captions replaced by the empty text, for guidance")
    checkpointing_steps: int = arg(0, "updates between checkpoints; 0: a tenth of a generation's")
    checkpoints_total_limit: int | None = arg(1, "checkpoints to keep")
    save_dtype: str = arg("fp32", "type of the written models", choices=("fp32", "fp16", "bf16"))

    def check(self):
        self.check_ranges()
        least(self, target_gen=0, steps=1, num_images=1, gen0_images=1, draw_batch_size=1, epochs=1)
        if self.baseline and self.finetune:
            raise UserError("--baseline trains on generation 0 and --finetune on real pictures; give one of the two")
        if self.accumulate and (self.baseline or self.finetune):
            raise UserError("--accumulate is for a model's own pictures, not beside --baseline or --finetune")
        if not 0 <= self.real_fraction < 1:
            raise UserError(
                f"--real-fraction {self.real_fraction:g} must be at least 0 and below 1 (all real is --finetune)"
            )
        for name in ("finetune", "real_fraction"):
            if getattr(self, name) and not self.real:
                raise UserError(f"--{name.replace('_', '-')} needs --real PICTURES with captions")


# ---------------------------------------------------------------------------------------------------------
# Generations


def read_captions(path, n):
    """[(id, caption)] of the first n pictures by ascending id: of COCO annotations, or of a data set with captions."""
    from nanodiff import data, textmetrics

    path = Path(path)
    if path.suffix == ".json":
        found = {k: v[0] for k, v in textmetrics.read(path).items()}
        ids = sorted(found, key=lambda k: (not k.isdecimal(), int(k) if k.isdecimal() else 0, k))
    else:
        dataset = data.load(path)
        found, ids = dict(zip(dataset.keys, dataset.captions, strict=True)), sorted(dataset.keys)
    if len(ids) < n:
        raise UserError(f"--captions {path}: {len(ids)} pictures have captions, {n} are wanted")
    return [(i, found[i]) for i in ids[:n]]


def jobs_of(captions):
    """A gallery.Job for each: named as COCO names its pictures, or by number; the seed is the id's last four digits."""
    from nanodiff import gallery

    out = []
    for i, (key, caption) in enumerate(captions):
        number = int(key) if key.isdecimal() else i
        name = f"COCO_train2014_{number:012d}.jpg" if key.isdecimal() else f"{i:05d}.jpg"
        out.append(gallery.Job(name, caption, number % 10_000))
    return out


class Study:
    """One chain of generations: its folders, and what each generation learns from."""

    def __init__(self, cfg, scale):
        self.cfg, self.scale = cfg, scale
        suffix = "_baseline" * cfg.baseline + "_finetune" * cfg.finetune + "_all" * cfg.accumulate
        suffix += f"_real_{cfg.real_fraction:g}" if cfg.real_fraction else ""
        self.suffix, self.base = suffix, f"sd_to_sd_cfg_{scale:g}_steps_{cfg.steps}_gen_"

    def pictures(self, k):
        """Generation 0 is the same for every way of going on."""
        return Path(self.cfg.data_root) / f"{self.base}{k}{self.suffix if k else ''}"

    def model(self, k):
        """What draws generation k."""
        return Path(self.cfg.models_root) / f"{self.base}{k}{self.suffix}" if k else self.cfg.model

    def dataset(self, k):
        """What generation k is trained on."""
        import numpy as np

        from nanodiff import data

        cfg = self.cfg
        if cfg.finetune:
            return data.load(cfg.real)
        which = [0] if cfg.baseline else range(k) if cfg.accumulate else [k - 1]
        parts = [data.load(self.pictures(i)) for i in which]
        items = [
            item._replace(key=f"{i}/{item.key}") for i, part in zip(which, parts, strict=True) for item in part.items
        ]
        if cfg.real_fraction:
            real, rng = data.load(cfg.real), np.random.default_rng([cfg.seed, k])
            n = round(cfg.real_fraction * len(items))
            own = sorted(rng.choice(len(items), len(items) - n, replace=False))
            drawn = sorted(rng.choice(len(real), n, replace=n > len(real)))
            items = [items[i] for i in own] + [
                real.items[i]._replace(key=f"real/{j}/{real.items[i].key}") for j, i in enumerate(drawn)
            ]
        return data.Dataset(items, str(self.pictures(max(which))))


def draw(study, k, captions, device):
    """The pictures of generation k, and a listing of them, by which they are a data set."""
    import gc
    import json

    from nanodiff import dist, engine, gallery, pipeline
    from nanodiff.weights import write_bytes

    cfg, folder, jobs = study.cfg, study.pictures(k), jobs_of(captions)
    sd = dist.together(pipeline.load, study.model(k), engine.pick_dtype("auto", device), device).with_scheduler(
        cfg.scheduler
    )
    how = gallery.settings(sd, Path(study.model(k)).name, cfg.steps, study.scale, cfg.resolution, cfg.resolution)
    failed = gallery.draw(sd, jobs, folder, how, cfg.draw_batch_size, what=f"generation {k}")
    lines = [
        json.dumps({"file_name": j.name, "text": j.prompt})
        for j in gallery.planned(folder).values()
        if j.name not in failed
    ]
    dist.on_main(write_bytes, folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    del sd
    gc.collect()


def learn(cfg, model, dataset, folder):
    """Train a model's denoiser on a data set, and write the whole model into `folder`; one that is there is left as it is. Checkpoints
    lie in folder.training until then."""
    import shutil

    from nanodiff import dist, teach

    work = folder.with_name(f"{folder.name}.training")
    if dist.on_main((folder / "model_index.json").is_file):
        dist.on_main(shutil.rmtree, work, ignore_errors=True)  # of a run that was killed after its last word
        return
    sd, nets = dist.together(teach.student, model)

    def write(run, states):
        facts = {"loss": run.more.get("epoch_loss"), "updates": run.step, "pictures": len(dataset)}
        teach.save_model(sd, folder, cfg.save_dtype, states, **facts)

    teach.fit(cfg, work, sd, nets, dataset, teach.plain(cfg), write, cfg.resolution)
    dist.on_main(shutil.rmtree, work, ignore_errors=True)


def recursive(cfg):
    """The stage `recursive`: see the module docstring."""
    from nanodiff import dist, engine

    cfg.check()
    scales = cfg.cfg_scales or [cfg.cfg_scale]
    device = engine.pick_device(cfg.device)
    dist.start(device, cfg.dist_timeout)
    for name in ("target_gen", "steps", "num_images", "epochs"):
        dist.say(f"{name}: {getattr(cfg, name)}")
    dist.say(f"cfg_scale: {', '.join(f'{s:g}' for s in scales)}")
    captions = dist.on_main(read_captions, cfg.captions, max(cfg.gen0_images, cfg.num_images if cfg.target_gen else 0))
    record = engine.Record(cfg, device)
    for scale in scales:
        study = Study(cfg, scale)
        for k in range(cfg.target_gen + 1):
            if k:
                dataset = dist.on_main(study.dataset, k)
                with record.timed("train"):
                    learn(cfg, study.model(k - 1), dataset, study.model(k))
            with record.timed("draw"):
                draw(study, k, captions[: cfg.num_images if k else cfg.gen0_images], device)
        with record.timed("evaluate"):
            results = summary(study, record, device)
        for name, value in results.items():
            record.result(f"cfg_{scale:g}.{name}" if len(scales) > 1 else name, value)
    record.write()
    dist.finish()


def summary(study, record, device):
    """Measure the generations; the table, figures and report. Returns {gen_k.metric: value}."""
    from nanodiff import data, dist, evaluate, pages, report
    from nanodiff.config import read_json

    cfg, generations = study.cfg, range(study.cfg.target_gen + 1)
    out = record.out / f"cfg_{study.scale:g}{study.suffix}"
    sets = {f"gen_{k}": dist.on_main(data.load, study.pictures(k)) for k in generations}
    real = dist.on_main(data.load, cfg.real, captions=False) if cfg.real else sets["gen_0"]
    settings = evaluate.Settings(spaces=listed(cfg.features), weights_dir=cfg.weights_dir, clip=cfg.clip, nearest_k=cfg.nearest_k,
                                 cache=str(record.out / "cache"), seed=cfg.seed, device=device)  # fmt: skip
    found = {n: evaluate.images(d, settings, real, d.captions, n) for n, d in sets.items()} if cfg.evaluate else {}
    losses = {
        f"gen_{k}": dist.on_main(read_json, study.model(k) / "training.json")["loss"] if k else None
        for k in generations
    }
    header = ("generation", "cfg", "steps", "loss", "FID", "IS", "CLIP")
    value = lambda n, m: found[n].metrics[m]["value"] if n in found and m in found[n].metrics else None  # noqa: E731
    fid = "fid" if value("gen_0", "fid") is not None else "pixels_fid"
    rows = [
        [k, study.scale, cfg.steps, losses[n], value(n, fid), value(n, "is"), value(n, "clip_score")]
        for k, n in enumerate(sets)
    ]

    def write():
        from nanodiff import engine, weights

        engine.out_dir(out)
        report.write_csv(out / "table.csv", header, rows)
        weights.write_json(out / "table.json", [dict(zip(header, row, strict=True)) for row in rows])
        document = report.Report(f"Generations at guidance {study.scale:g}{study.suffix.replace('_', ' ')}")
        document.text(
            f"Each generation's pictures, from the same captions and seeds, against {cfg.real or 'generation 0'}."
        )
        document.table(header, rows)
        files = [out / "table.csv", out / "table.json"]
        if found:
            numbers = {f"{n}.{k}": m for n, f in found.items() for k, m in f.metrics.items()}
            files += [
                *report.write_metrics(out, numbers),
                *pages.sets(out, document, found, sets, real, {n: d.captions for n, d in sets.items()}),
            ]
        return [*files, *document.write(out)]

    for path in dist.on_main(write):
        record.file(path)
    if dist.is_main():
        print("\t".join(header))
        for row in rows:
            print("\t".join(report.shown(c) for c in row))
        print(f"report: {out / 'report.html'}")
    reasons = {r for f in found.values() for r in f.skipped.values()}
    for reason in sorted(reasons):
        dist.say(f"note: not computed: {printable(reason)}")
    return {
        f"{n}.{m}": found[n].metrics[m]["value"]
        for n in found
        for m in (fid, "diversity", "pixels_diversity", "clip_score")
        if m in found[n].metrics
    }


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


def grid(cfg):
    """One sheet: a row a picture (or the caption), a column a generation."""
    from nanodiff import dist, engine, gallery, images, pages, pipeline

    cfg.check()
    device = engine.pick_device(cfg.device)
    dist.start(device, cfg.dist_timeout)
    record = engine.Record(cfg, device)
    study = Study(cfg, (cfg.cfg_scales or [cfg.cfg_scale])[0])
    generations, rows = range(cfg.target_gen + 1), []
    if cfg.prompt is not None:
        row = []
        for k in generations:
            if k and not (study.model(k) / "model_index.json").is_file():
                raise UserError(f"{study.model(k)}: is not there, so generation {k} cannot draw")
            # generation k's pictures are drawn by its model: of generation 0 the one that all begin with
            sd = dist.together(pipeline.load, study.model(k), engine.pick_dtype("auto", device), device).with_scheduler(
                cfg.scheduler
            )
            made = sd.generate(
                [cfg.prompt], None, cfg.steps, study.scale, [cfg.prompt_seed], cfg.resolution, cfg.resolution
            )
            row += images.to_pil(made.pixels)
        rows.append((cfg.prompt, row))
    for i in cfg.index:
        row = []
        for k in generations:
            planned = sorted(gallery.planned(study.pictures(k)))
            if not 0 <= i < len(planned):
                raise UserError(f"--index {i}: {study.pictures(k)} has {len(planned)} pictures")
            row.append(images.open_image(study.pictures(k) / planned[i]))
        rows.append((gallery.planned(study.pictures(0))[planned[i]].prompt, row))
    target = Path(cfg.output) if cfg.output else record.out / "generations.png"
    labels = [f"{k}: {text}" if k == 0 else str(k) for text, row in rows for k in range(len(row))]

    def write():
        engine.out_dir(target.parent)
        sheet = images.grid([pages.small(p, 192) for _, row in rows for p in row], len(generations), labels, size=12)
        images.save_png(sheet, target)

    dist.on_main(write)
    record.file(target)
    record.write()
    if dist.is_main():
        print(f"the sheet: {target}")
    dist.finish()


# ---------------------------------------------------------------------------------------------------------
# Teacher to student


@dataclass
class Transfer(Training, Noise, Adapters):
    model: str = arg(
        "stable-diffusion-v1-5/stable-diffusion-v1-5", "the student: folder or Hub id", "base-model-id", "student"
    )
    teacher: str = arg("stabilityai/stable-diffusion-xl-base-1.0", "the teacher", "teacher-model-id")
    prompt_source: str = arg("assets/prompts/dogs.json", "words and templates (JSON, to be edited), .csv, .txt, or pictures with captions", "prompts")  # fmt: skip
    prompt_column: str | None = arg(None, "column of the prompts in a table")
    num_images: int = arg(1000, "the teacher's pictures to learn from", "num-images-to-generate")
    sdxl_image_dir: str | None = arg(None, "where they are; default OUTPUT_DIR/sdxl_images", "teacher-image-dir")
    output_dir: str = arg("output", "everything goes here (visualize with --metrics-dir: the figures)")
    method: str = arg("data", "learn from the teacher's pictures, from its denoiser's output on them, or both, one after the other, compared", choices=("data", "online", "both"))  # fmt: skip
    feature_weight: float = arg(0.0, "online: weight of the difference between both UNets' attention maps")
    steps: int = arg(50, "sampling steps", "num-inference-steps")
    guidance_scale: float = arg(7.5, "guidance")
    teacher_steps: int | None = arg(None, "the teacher's; default --steps")
    teacher_guidance_scale: float | None = arg(None, "the teacher's; default --guidance-scale")
    teacher_resolution: int | None = arg(None, "pixels along one side of the teacher's pictures; default: its own")
    resolution: int | None = arg(
        None, "pixels along one side of the student's pictures; default: its own (SD 1.5: 512)"
    )
    eval_batch_size: int = arg(1, "pictures drawn at a time", "draw-batch-size")
    evaluation_prompts: str | None = arg(
        None, "as --prompt-source, with a column `category`; default: other prompts of --prompt-source"
    )
    num_evaluation_prompts: int = arg(100, "pictures that are compared")
    checkpoint: str | None = arg(
        None, "evaluate: the adapters (or the whole model) after training; default: what train wrote"
    )
    metrics_dir: str | None = arg(None, "visualize: numbers of an evaluation; default OUTPUT_DIR/metrics")
    panels: int = arg(12, "pictures of which panels and difference maps are drawn")
    weights_dir: str | None = arg(None, "Inception's and CLIP's weights, for FID and CLIP score (see eval.py)")
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    lora: bool = arg(True, "train adapters; --no-lora: the whole denoiser", "use-lora")
    lora_rank: int = arg(16, "rank of the adapters", "lora-r", "rank")
    lora_alpha: float | None = arg(32.0, "their strength is alpha / rank")
    lora_dropout: float = arg(0.1, "of the adapters' inputs, while training")
    lora_format: str = arg("auto", "the file beside PEFT's folder: kohya's or diffusers' form; auto is kohya, for an MMDiT diffusers; peft: none", choices=("auto", "kohya", "diffusers", "peft"))  # fmt: skip
    lora_targets: list[str] = arg([], "layers to adapt, of the denoiser (to_q …) or the text encoder (q_proj, fc1 …); default: the denoiser's attention", "lora-target-modules")  # fmt: skip
    seed: int = arg(42, "every random draw is a function of it")
    batch_size: int = arg(4, "samples of a process in a micro-batch", "train-batch-size")
    epochs: int = arg(10, "passes over the pictures", "num-epochs", "num-train-epochs")
    lr: float = arg(1e-4, "peak learning rate", "learning-rate")
    lr_warmup_steps: float = arg(0, "updates of linear warm-up; below 1: a share of the run")
    adam_beta2: float = arg(0.999, "AdamW's decay of the square")
    ema: bool = arg(False, "average the weights", "use-ema")
    gradient_checkpointing: bool = arg(True, "keep less for the backward pass, compute it again")
    caption_dropout: float = arg(0.0, "share of captions replaced by the empty text, for guidance")
    checkpointing_steps: int = arg(0, "updates between checkpoints; 0: a tenth of the run's")
    sample_every: int = arg(0, "updates between sheets of pictures; 0 = none")
    save_dtype: str = arg("fp32", "type of the written weights", choices=("fp32", "fp16", "bf16"))
    dry_run: bool = arg(False, "print the memory of every stage, and make nothing (needs no weights)")

    def check(self):
        self.check_ranges()
        least(self, num_images=1, num_evaluation_prompts=2, steps=1, eval_batch_size=1, panels=0, feature_weight=0)
        if not self.lora and set(getattr(self, "given", ())) & {f.name for f in dataclasses.fields(Adapters)}:
            raise UserError("--lora-… are settings of --lora")
        if self.feature_weight and self.method == "data":
            raise UserError("--feature-weight is for --method online or both")
        if self.method != "data" and (self.min_snr is not None or self.snr_weighting):
            raise UserError(
                "--min-snr and --snr-weighting are for --method data: online's error is weighed as v-prediction's"
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


ARMS = {"original": "weakmodel_images", "finetuned": "comparison_output/finetuned", "online": "comparison_output/online",
        "teacher": "comparison_output/teacher"}  # fmt: skip
PAIRINGS = [("original", "finetuned"), ("original", "teacher"), ("finetuned", "teacher")]


def transfer(*stages):
    """The main of `transfer` and some of its parts, one after the other."""

    def main(cfg):
        import shutil

        from nanodiff import dist, engine

        cfg.check()
        if cfg.dry_run:
            return transfer_plan(cfg)
        device = engine.pick_device(cfg.device)
        dist.start(device, cfg.dist_timeout)
        dist.agree(as_dict(cfg), "configuration")
        record = engine.Record(cfg, device)
        dist.on_main(preflight, cfg, stages)
        for stage in stages:
            with record.timed(stage.__name__.removeprefix("transfer_")):
                stage(cfg, record, device)
        record.write()
        if len(stages) == 1:  # the next part's run.json takes this one's place
            name = stages[0].__name__.removeprefix("transfer_")
            dist.on_main(lambda: shutil.copy(record.out / "run.json", record.out / f"run-{name}.json"))
        dist.finish()

    return main


def preflight(cfg, stages):
    """What can be known to be wrong before hours of work. Raises UserError."""
    from nanodiff import fewstep, lora, lorafile, sources
    from nanodiff.schedule import Schedule

    if transfer_generate in stages or transfer_evaluate in stages:
        learning_prompts(cfg)
    if transfer_evaluate in stages:
        evaluation_prompts(cfg)
    if cfg.method != "data" and (transfer_generate in stages or transfer_train in stages):
        both = [sources.configs(m) for m in (cfg.model, cfg.teacher)]
        a, b = (src.config("vae") if "vae" in src.parts else None for src in both)
        if a != b:
            raise UserError(
                f"--method {cfg.method}: {cfg.teacher} has another VAE than {cfg.model}, so they do not share latents; use --method data"
            )
        if not fewstep.same_schedule(*(Schedule.from_config(src.scheduler()[0]) for src in both)):
            raise UserError(
                f"--method {cfg.method}: {cfg.teacher} has another noise schedule than {cfg.model}; use --method data"
            )
    if transfer_evaluate in stages and transfer_train not in stages:
        for method in cfg.methods:
            path = taught(cfg, method)
            if not (path / "model_index.json").is_file():
                lora.read(path, lorafile.skeletons(cfg.model))


def learning_prompts(cfg):
    """[(category, prompt)] of the teacher's pictures."""
    from nanodiff import promptset

    return promptset.read(cfg.prompt_source, cfg.prompt_column).draw(cfg.num_images, cfg.seed)


def evaluation_prompts(cfg, say=False):
    """[(category, prompt)] of the comparison: none that is learned from, where there are others. say: what weakens it."""
    from nanodiff import dist, promptset

    learned = [p for _, p in learning_prompts(cfg)]
    source = promptset.read(cfg.evaluation_prompts or cfg.prompt_source, cfg.prompt_column)
    categories = list(source.templates) if isinstance(source, promptset.Words) else None
    chosen = source.draw(cfg.num_evaluation_prompts, cfg.seed + 1, categories, learned)
    texts = [p for _, p in chosen]
    if say and (again := set(learned) & set(texts)):
        dist.say(f"note: {len(again)} of the compared prompts are learned from, too: there are no others")
    if say and len(set(texts)) < len(texts):
        dist.say(
            f"warning: {len(texts)} pictures of {len(set(texts))} different prompts: the tests take them for independent ones"
        )
    return chosen


def painter(model, device, adapters=None):
    """A pipeline that draws; adapters: a LoRA's file or folder, which is merged into its weights."""
    from nanodiff import dist, engine, lora, pipeline

    sd = dist.together(pipeline.load, model, engine.pick_dtype("auto", device), device)
    if adapters:
        dist.together(lambda: lora.fuse(sd.models(), lora.read(adapters, sd.models()), keep=False))
    return sd


def transfer_generate(cfg, record, device):
    """The teacher's pictures, each with its prompt beside it."""
    from nanodiff import dist, gallery, teach

    prompts = dist.on_main(learning_prompts, cfg)
    jobs = [gallery.Job(f"{i:05d}.png", prompt, cfg.seed + i) for i, (_, prompt) in enumerate(prompts)]
    sd = painter(cfg.teacher, device)
    how = teacher_settings(cfg, sd)
    failed = gallery.draw(sd, jobs, cfg.teacher_images, how, cfg.eval_batch_size, what="teacher", captions=True)
    teach.free(sd)  # before the student is there: 16 GB are enough for one of them
    record.result("teacher_images", len(jobs) - len(failed))
    record.result("teacher_images_dropped", len(failed))


def teacher_settings(cfg, sd):
    """gallery.settings of the teacher's pictures."""
    from nanodiff import gallery

    scale = cfg.guidance_scale if cfg.teacher_guidance_scale is None else cfg.teacher_guidance_scale
    return gallery.settings(
        sd,
        Path(cfg.teacher).name,
        cfg.teacher_steps or cfg.steps,
        scale,
        cfg.teacher_resolution,
        cfg.teacher_resolution,
    )


def teacher_data(cfg):
    """The pictures to learn from. Raises UserError for a folder that is not complete."""
    from nanodiff import data, gallery

    folder = cfg.teacher_images
    if not folder.is_dir():
        raise UserError(f"{folder}: is not there; `transfer generate` makes it")
    if (folder / gallery.PLAN).is_file():
        lacking, _ = gallery.lacking(folder)
        lacking = [n for n in lacking if n in {f"{i:05d}.png" for i in range(cfg.num_images)}]
        if lacking:
            raise UserError(f"{folder}: {len(lacking)} of {len(gallery.planned(folder))} pictures are not there, such as {lacking[0]}; "
                            "`transfer generate` goes on with them")  # fmt: skip
        names = {f"{i:05d}.png" for i in range(cfg.num_images)}  # an earlier run may have made more
        every = data.load(folder)
        return every.subset([i for i, key in enumerate(every.keys) if key in names])
    return data.load(folder)


def transfer_train(cfg, record, device):
    """The student, once for every method."""
    import torch

    from nanodiff import build, dist, fewstep, lorafile, pipeline, teach

    dataset = dist.on_main(teacher_data, cfg)
    for method in cfg.methods:
        torch.manual_seed(cfg.seed)  # the adapters' beginnings
        sd, nets = dist.together(teach.student, cfg.model, build.lora_settings(cfg) if cfg.lora else None)
        make = teach.plain(cfg)
        if method == "online":
            master = dist.together(pipeline.load, cfg.teacher, torch.float32, "cpu")
            dist.together(fewstep.same_space, sd, master)
            make = teach.online(cfg, master, dataset.texts)
        else:
            master = None
        work = cfg.work(method)
        dist.say(f"{method}: {len(dataset)} pictures of {Path(cfg.teacher).name} teach {Path(cfg.model).name}")

        def write(run, states, sd=sd, work=work):
            if not cfg.lora:
                return teach.save_model(
                    sd, work / "model", cfg.save_dtype, states, loss=run.more.get("epoch_loss"), updates=run.step
                )
            form = lorafile.form_for(cfg.lora_format, sd.models())
            targets = {"peft": work / "lora_weights"} | (
                {} if form == "peft" else {form: work / f"lora_{form}.safetensors"}
            )
            names = {"title": f"{Path(cfg.teacher).name} to {Path(cfg.model).name}", "base_model": cfg.model}
            return teach.save_adapters(sd, run, states, targets, cfg.save_dtype, **names)

        shown = [p for _, p in dist.on_main(evaluation_prompts, cfg)[:8]] if cfg.sample_every else ()
        teach.fit(cfg, work, sd, nets, dataset, make, write, cfg.resolution, shown, (cfg.steps, cfg.guidance_scale),
                  (method, str(cfg.teacher), str(cfg.model), cfg.feature_weight if method == "online" else 0))  # fmt: skip
        record.file(work / ("lora_weights" if cfg.lora else "model"))
        teach.free(sd, *([master] if master else []))


def transfer_evaluate(cfg, record, device):
    """Before, after and teacher: the same prompts, and the same initial latents for the student's two."""
    from nanodiff import data, dist, evaluate, gallery, pages, report, teach, weights

    prompts, counts, jobs = dist.on_main(evaluation_prompts, cfg, True), {}, []
    for i, (category, prompt) in enumerate(prompts):
        k = counts[category] = counts.get(category, -1) + 1
        jobs.append(gallery.Job(f"{category}/{k:04d}.png", prompt, cfg.seed + 1_000_000 + i))
    arms = ["original", "finetuned", *(["online"] if cfg.method == "both" else []), "teacher"]
    failed = {}
    for arm in arms:
        trained = (
            None if arm in ("original", "teacher") else taught(cfg, "online" if arm == "online" else cfg.methods[0])
        )
        if arm == "teacher":
            sd = painter(cfg.teacher, device)
            how = teacher_settings(cfg, sd)
        else:
            whole = trained is not None and (trained / "model_index.json").is_file()
            sd = painter(trained if whole else cfg.model, device, None if whole else trained)
            how = gallery.settings(sd, arm, cfg.steps, cfg.guidance_scale, cfg.resolution, cfg.resolution)
        failed |= gallery.draw(
            sd, jobs, cfg.root / ARMS[arm], how, cfg.eval_batch_size, anew=True, what=arm, captions=True
        )
        teach.free(sd)
    names = [j.name for j in jobs if j.name not in failed]
    if len(names) < 2:
        raise UserError("fewer than two pictures could be drawn by all models, so nothing can be compared")
    folders = {}
    for arm in arms:
        every = dist.on_main(data.load, cfg.root / ARMS[arm])
        folders[arm] = every.subset([i for i, key in enumerate(every.keys) if key in set(names)])
    settings = evaluate.Settings(("fid", "clip_score"), weights_dir=cfg.weights_dir, clip=cfg.clip, seed=cfg.seed, device=device,
                                 cache=str(cfg.root / "cache"))  # fmt: skip
    three = {k: v for k, v in folders.items() if k != "online"}
    found, resized = evaluate.pairs(three, PAIRINGS, settings)
    metrics = evaluate.pair_metrics(found, {}, resized, cfg.seed)
    whole, skipped = evaluate.of_sets(three, PAIRINGS, settings)
    metrics |= whole
    if "online" in folders:
        both = {k: folders[k] for k in ("finetuned", "online", "teacher")}
        second, resized = evaluate.pairs(both, [("online", "teacher")], settings)
        metrics |= {
            f"online_vs_teacher.{k}": m for k, m in evaluate.pair_metrics(second, {}, resized, cfg.seed).items()
        }
        whole, _ = evaluate.of_sets({k: folders[k] for k in ("online", "teacher")}, [("online", "teacher")], settings)
        metrics |= {
            k if k.startswith(("online.", "teacher.")) else f"online_vs_teacher.{k}": m for k, m in whole.items()
        }
        found = [p._replace(numbers=p.numbers | q.numbers) for p, q in zip(found, second, strict=True)]
    for reason in dict.fromkeys(skipped.values()):
        dist.say(f"note: not computed: {printable(reason)}")

    def write():
        from nanodiff import engine

        folder, side, maps = (
            engine.out_dir(cfg.root / n) for n in ("metrics", "comparison_output", "research_comparisons")
        )
        # this one is written last: without it nothing was evaluated to the end
        (folder / "evaluation.json").unlink(missing_ok=True)
        for old in folder.glob("metrics_*"):
            old.unlink()
        files = [*pages.write_pairs(folder, found), *report.write_metrics(folder, metrics)]
        facts = {k: str(v) for k, v in as_dict(cfg).items() if v not in (None, "", [])}
        for old in (*side.glob("comparison_all_*"), *maps.glob("difference_*")):
            old.unlink()
        files += pages.pictures_of(cfg.panels, side, maps, report.Report(""), found, folders, PAIRINGS)
        weights.write_json(folder / "evaluation.json", {"settings": facts, "skipped": skipped, "dropped": failed})
        return files

    for path in dist.on_main(write):
        record.file(path)
    for name in ("original_vs_teacher.mse", "finetuned_vs_teacher.mse", "online_vs_teacher.mse", "original_vs_teacher.ssim",
                 "finetuned_vs_teacher.ssim", "online_vs_teacher.ssim"):  # fmt: skip
        if name in metrics:
            record.result(name, metrics[name]["value"])
    record.result("pictures_compared", len(names))


def taught(cfg, method):
    """What train wrote, or --checkpoint: a LoRA's file or folder, or a model's folder."""
    if cfg.checkpoint and method == cfg.methods[0]:
        path = Path(cfg.checkpoint)
        if not path.exists():
            raise UserError(f"--checkpoint {path}: no such file or folder")
        return path
    path = cfg.work(method) / ("lora_weights" if cfg.lora else "model")
    if not path.is_dir():
        raise UserError(f"{path}: is not there; `transfer train` makes it, or --checkpoint names another")
    return path


def transfer_visualize(cfg, record, device):
    """Figures, tests and the report, from the numbers of evaluate alone."""
    from nanodiff import dist

    for path in dist.on_main(_visualize, cfg):
        record.file(path)


def _visualize(cfg):
    from nanodiff import engine, pages, report
    from nanodiff.config import read_json

    numbers = Path(cfg.metrics_dir) if cfg.metrics_dir else cfg.root / "metrics"
    if not (numbers / "evaluation.json").is_file():
        raise UserError(f"{numbers}: is not there, or not complete; `transfer evaluate` makes it")
    root = numbers.resolve().parent
    look = engine.out_dir(cfg.root if cfg.metrics_dir else root / "visualization")
    found, metrics, facts = (
        pages.read_pairs(numbers),
        report.read_metrics(numbers),
        read_json(numbers / "evaluation.json"),
    )
    settings = facts["settings"]
    document = report.Report(f"From {Path(settings['teacher']).name} to {Path(settings['model']).name}")
    document.text(pages.CANNOT)
    document.text(f"{len(found)} prompts in {len({p.category for p in found})} categories. The student before and after training began from the "
                  f"same latents. {len(facts['dropped'])} pictures could not be drawn and are left out.")  # fmt: skip
    for path in sorted((root / "comparison_output").glob("comparison_all_*.png"))[:6]:
        document.picture(path, path.stem)
    tests, path = pages.nearer(look, document, found, int(settings["seed"]))
    files = [path]
    if "online_vs_teacher" in found[0].numbers:
        document.heading("Two ways to learn")
        document.text("Finetuned: trained on the teacher's pictures. Online: trained on the output of the teacher's denoiser on the same pictures, "
                      "with as many updates. The test asks whether online's pictures are nearer to the teacher's than finetuned's.")  # fmt: skip
        files.append(pages.nearer(look, document, found, int(settings["seed"]), "finetuned", "online", "online.csv")[1])
    drawn = pages.charts_of(look, document, found, PAIRINGS, metrics)
    for curve in sorted((root / "checkpoints").rglob("loss.png")):
        document.picture(curve, f"loss: {curve.parent.name}")
    panels = sorted((root / "comparison_output").glob("comparison_all_*.png"))
    files += [*drawn, *pages.research(settings, root / "research_paper_materials", tests, metrics, [*drawn, *panels])]
    document.heading("Numbers")
    report.metrics_table(document, metrics)
    if facts["skipped"]:
        document.heading("Not computed")
        document.table(("metric", "why"), facts["skipped"].items())
    for name in ("ssim", "mse"):
        if name in tests:
            p = tests[name].p_t
            sure = "" if p < 0.05 else ", so it may be chance"
            print(f"{name}: finetuned is {pages.NEARER[tests[name].nearer]}, p = {p:.2g} (paired t test, Holm){sure}")
    print(f"report: {look / 'report.html'}")
    return [*files, *document.write(look)]


def transfer_plan(cfg):
    """Memory of each stage on a GPU, from configurations alone."""
    import torch

    from nanodiff import build, memory, pipeline, sources, teach

    low = {"fp16": torch.float16, "no": None}.get(cfg.mixed_precision, torch.bfloat16)
    peaks, teacher = {}, 0
    for name, model, side in (
        ("generate (teacher)", cfg.teacher, cfg.teacher_resolution),
        ("evaluate (student)", cfg.model, cfg.resolution),
    ):
        stages = pipeline.plan(
            sources.configs(model), torch.float16, side, side, cfg.eval_batch_size, True, None, True, 256, False
        )
        print(f"{name}: {model}")
        print("\n".join(memory.table(stages, None)))
        peaks[name] = memory.peaks(stages)["none"]
        teacher = teacher or sum(s.parameters for s in stages)
    found = teach.estimate(cfg, cfg.model, build.lora_settings(cfg) if cfg.lora else None, cfg.resolution, low)
    print(
        f"train (student): {found.trained / 1e6:.2f} M trained, {found.frozen / 1e6:.2f} M frozen, activations {found.activations / 1e9:.3f} GB"
    )
    peaks["train (student)"] = found.peak + (4 * teacher if cfg.method != "data" else 0)
    for name, peak in peaks.items():
        print(
            f"{name}: peak {peak / 1e9:.2f} GB: {'fits' if peak * 1.1 < 16e9 else 'does not fit'} in 16 GB with a tenth to spare"
        )
    print("the teacher is freed before the student trains, so the largest of these counts" if cfg.method == "data" else
          "--method online trains with the teacher beside the student")  # fmt: skip


# ---------------------------------------------------------------------------------------------------------
# Fewer steps


@dataclass
class FewStep(Training, Adapters):
    model: str = arg("stable-diffusion-v1-5/stable-diffusion-v1-5", "the teacher: folder or Hub id", "teacher")
    student: str | None = arg(None, "what the student begins as; default: the teacher")
    data: str = arg("", "pictures with captions, as train.py takes them")
    method: str = arg(
        "consistency", "how the student learns", choices=("progressive", "consistency", "dmd", "guidance")
    )
    student_steps: int = arg(4, "steps that the student is to need (guidance keeps the teacher's)")
    guidance_scale: float | None = arg(
        None, "the teacher's guidance, which the student then has by itself; default: the model's"
    )
    teacher_steps: int | None = arg(None, "the teacher's steps, in the comparison; default: the model's")
    first_steps: int | None = arg(
        None, "steps of the first round of progressive, halved in every other; default: four times --student-steps"
    )
    substeps: int = arg(2, "the teacher's steps in one of the student's, in every round of progressive")
    known_steps: int = arg(50, "times that a latent consistency student knows", "original-inference-steps")
    critic_steps: int = arg(5, "updates of dmd's critic for one of the student")
    lora: bool = arg(False, "train adapters in place of the whole denoiser (LCM-LoRA; consistency and guidance)")
    resolution: int | None = arg(None, "pixels along one side; default: the model's")
    evaluate: bool = arg(True, "draw with teacher and student at --check-steps, and measure")
    check_steps: list[int] = arg([1, 2, 4, 8], "steps at which both draw, beside the teacher's own")
    num_images: int = arg(64, "pictures of each such comparison")
    draw_batch_size: int = arg(16, "pictures drawn at a time")
    weights_dir: str | None = arg(None, "Inception's weights (see eval.py images)")
    features: str = arg("pixels", "spaces of the distances, comma-separated: inception, clip, pixels")
    output_dir: str = arg("out/few-step", "checkpoints, the student, figures")
    batch_size: int = arg(4, "samples of a process in a micro-batch", "train-batch-size")
    lr: float = arg(1e-5, "peak learning rate", "learning-rate")
    max_steps: int = arg(1000, "updates (of each round); 0 = by --epochs", "max-train-steps")
    ema: bool = arg(True, "average the weights; the student is the average", "use-ema")
    ema_decay: float = arg(0.99, "largest decay of the average", "ema-max-decay")
    sample_every: int = arg(0, "updates between sample sheets; 0 = none")
    caption_dropout: float = arg(0.0, "share of captions replaced by the empty text")
    checkpointing_steps: int = arg(0, "updates between checkpoints; 0: a tenth of the run's")
    checkpoints_total_limit: int | None = arg(1, "checkpoints to keep")
    save_dtype: str = arg("fp32", "type of the written model", choices=("fp32", "fp16", "bf16"))

    def check(self):
        self.check_ranges()
        least(self, student_steps=1, substeps=2, known_steps=2, critic_steps=1, num_images=2, draw_batch_size=1)
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
        given = set(getattr(self, "given", ()))
        if not self.lora and given & {f.name for f in dataclasses.fields(Adapters)}:
            raise UserError("--lora-… are settings of --lora")
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


OF_METHODS = {
    "first_steps": ("progressive",),
    "substeps": ("progressive",),
    "known_steps": ("consistency", "dmd"),
    "critic_steps": ("dmd",),
}


def few_schedule(cfg, sd):
    """The student's pipeline as it will draw: its sampler."""
    flow = sd.schedule.flow
    if cfg.method == "guidance":
        return sd.with_scheduler(None)
    if cfg.method == "progressive":  # the last jump ends at x̂0 itself
        return (
            sd.with_scheduler("flow_euler")
            if flow
            else sd.with_scheduler("ddim", timestep_spacing="trailing", set_alpha_to_one=True)
        )
    if flow:
        return sd.with_scheduler("flow_euler", stochastic_sampling=True)
    return sd.with_scheduler("lcm", original_inference_steps=cfg.known_steps)


def few_step(cfg):
    """The stage `few-step`: see the module docstring."""
    import torch

    from nanodiff import build, data, dist, engine, fewstep, loader, pipeline, samplers, teach

    cfg.check()
    device = engine.pick_device(cfg.device)
    dist.start(device, cfg.dist_timeout)
    record = engine.Record(cfg, device)
    dataset, target = dist.on_main(data.load, cfg.data), record.out / "model"
    torch.manual_seed(cfg.seed)
    rounds = [cfg.student_steps]
    if cfg.method == "progressive":
        first = cfg.first_steps or 4 * cfg.student_steps
        rounds = [first >> i for i in range(first.bit_length()) if first >> i >= cfg.student_steps]
    settings, last = build.lora_settings(cfg) if cfg.lora else None, cfg.model
    for i, n in enumerate(rounds):
        folder = target if n == rounds[-1] else record.out / f"steps-{n}"
        work = folder.with_name(f"{folder.name}.training")
        facts = {"method": cfg.method, "steps": n, "teacher": cfg.model, "student": cfg.student, "guidance": cfg.guidance_scale,
                 "data": dataset.fingerprint(), "lr": cfg.lr, "seed": cfg.seed, "lora": settings}  # fmt: skip
        if not dist.on_main(teach.settled, folder, facts, cfg.overwrite_output_dir):
            begins = cfg.student if cfg.student and i == 0 else last
            sd, nets = dist.together(teach.student, begins, settings)
            if cfg.lora and set(nets) != {sd.denoiser_name}:
                raise UserError("--lora-targets: few steps are the denoiser's business; name its layers")
            master = None if cfg.lora else fewstep.frozen(sd.net)
            teacher = sd
            if begins != last:
                teacher = dist.together(pipeline.load, last, torch.float32, "cpu")
                fewstep.same_space(sd, teacher)
                if sd.schedule.prediction != teacher.schedule.prediction:
                    raise UserError(
                        f"--student {begins} predicts {sd.schedule.prediction}, its teacher {teacher.schedule.prediction}"
                    )
                if loader.fingerprint(*sd.encoders) != loader.fingerprint(*teacher.encoders):
                    raise UserError(f"--student {begins} has another text encoder than its teacher")
                master = teacher.net.requires_grad_(False).eval()
            scale, steps = (
                guidance_of(cfg, teacher) if i == 0 else 1.0,
                guided_steps(cfg, teacher) if cfg.method == "guidance" else n,
            )
            sd = few_schedule(cfg, sd)
            for count in (steps, *(cfg.check_steps if cfg.evaluate else ())):  # known now, not after the training
                samplers.check_steps(sd.schedule, count)
            if cfg.method == "dmd":
                nets["critic"] = fewstep.frozen(master).requires_grad_(True)
            sd.index = {**sd.index, pipeline.SAMPLING: {"steps": steps, "guidance_scale": 1.0}}
            if i == 0:
                dist.say(f"{cfg.method}: guidance {scale:g}, {' → '.join(map(str, rounds))} steps")
            with record.timed("train"):
                teach.fit(cfg, work, sd, nets, dataset, teach.few_step(cfg, n, scale, master), few_writer(cfg, sd, folder, facts), cfg.resolution,
                          dataset.captions[:8], (steps, 1.0), (cfg.method, str(last), n, scale))  # fmt: skip
            teach.free(sd, teacher, *(m for m in (master, nets.get("critic")) if m is not None))
        dist.on_main(few_tidy, folder, work)
        last = str(folder)
    record.file(target)
    if cfg.evaluate:
        with record.timed("evaluate"):
            few_quality(cfg, record, dataset, device)
    record.write()
    if dist.is_main():
        print(f"student: {target}")
    dist.finish()


def few_tidy(folder, work):
    """Of a student that is there, keep of its training what people look at; the rest is for going on."""
    import shutil

    for name in ("metrics.jsonl", "loss.png", "samples"):
        if (work / name).exists():
            shutil.rmtree(folder / name) if (folder / name).is_dir() else None
            (work / name).replace(folder / name)
    shutil.rmtree(work, ignore_errors=True)


def guidance_of(cfg, sd):
    """The teacher's guidance: --guidance-scale, or what its folder or family has."""
    own = sd.sampling("guidance_scale")
    return cfg.guidance_scale if cfg.guidance_scale is not None else own if own is not None else sd.guidance


def guided_steps(cfg, sd):
    """The teacher's own steps: --teacher-steps, or what its folder or family has."""
    return cfg.teacher_steps or sd.sampling("steps") or sd.steps


def few_writer(cfg, sd, folder, facts):
    """write() of teach.fit()."""
    from nanodiff import lorafile, teach, weights

    def write(run, states):
        loss = run.more.get("epoch_loss") or (run.numbers or {}).get("loss")
        told = facts | {"loss": loss, "updates": run.step}
        states.pop("critic", None)
        if not cfg.lora:
            return teach.save_model(sd, folder, cfg.save_dtype, states, **told)
        form = lorafile.form_for(cfg.lora_format, sd.models())
        folder.mkdir(exist_ok=True)
        path = folder / ("lora_weights" if form == "peft" else "pytorch_lora_weights.safetensors")
        teach.save_adapters(
            sd,
            run,
            states,
            {form: path},
            cfg.save_dtype,
            title=f"{cfg.method}-{cfg.student_steps}",
            base_model=cfg.model,
        )
        return weights.write_json(folder / "training.json", told)

    return write


def few_quality(cfg, record, dataset, device):
    """Draw with teacher and student at several steps, measure, and show quality against steps."""
    from nanodiff import charts, data, dist, engine, evaluate, gallery, images, lora, pages, pipeline, report, teach

    out, found, sets = record.out, {}, {}
    chosen = pages.spread(len(dataset), min(cfg.num_images, len(dataset)))
    jobs = [gallery.Job(f"{i:05d}.png", dataset.captions[p], i) for i, p in enumerate(chosen)]
    settings = evaluate.Settings(groups=("fid", "kid"), spaces=listed(cfg.features), weights_dir=cfg.weights_dir, cache=str(out / "cache"),
                                 seed=cfg.seed, device=device)  # fmt: skip
    dtype = engine.pick_dtype("auto", device)
    for who in ("teacher", "student"):
        taught = who == "student"
        sd = dist.together(pipeline.load, cfg.model if cfg.lora or not taught else out / "model", dtype, device)
        if taught and cfg.lora:
            files = out / "model" / "lora_weights"
            lora.fuse(sd.models(), lora.read(files if files.is_dir() else out / "model", sd.models()), keep=False)
            sd = few_schedule(cfg, sd)
        own = guided_steps(cfg, sd) if not taught or cfg.method == "guidance" else cfg.student_steps
        for steps in sorted({*cfg.check_steps, own}):
            folder = out / "check" / f"{who}-{steps}"
            how = gallery.settings(
                sd, who, steps, 1.0 if taught else guidance_of(cfg, sd), cfg.resolution, cfg.resolution
            )
            gallery.draw(sd, jobs, folder, how, cfg.draw_batch_size, anew=True, what=f"{who}, {steps} steps")
            sets[who, steps] = dist.on_main(data.load, folder, captions=False)
            found[who, steps] = evaluate.images(sets[who, steps], settings, dataset, what=f"{who}-{steps}")
        teach.free(sd)
    numbers = {f"{who}.steps_{n}.{k}": m for (who, n), f in found.items() for k, m in f.metrics.items()}

    def write():
        document = report.Report(f"{cfg.method.capitalize()}: a student of {cfg.student_steps} steps")
        document.text(f"{len(jobs)} pictures at each number of steps, the same prompts and seeds, against the {len(dataset)} of {cfg.data}. "
                      "The teacher's steps with guidance are two passes of the network, the student's one.")  # fmt: skip
        steps = sorted({n for _, n in found})
        names = list(dict.fromkeys(k for f in found.values() for k in f.metrics))
        nothing = (float("nan"),) * 3
        panels = {k: {who: [pages.band(found[who, n].metrics[k]) if (who, n) in found and k in found[who, n].metrics else nothing for n in steps]
                      for who in ("teacher", "student")} for k in names}  # fmt: skip
        chart = charts.lines(out / "quality.png", steps, panels, "steps", "less is better")
        document.picture(chart, "Distance to the real pictures against steps")
        document.table(
            ("who", "steps", *names),
            [[who, n, *(f.metrics[k]["value"] for k in names)] for (who, n), f in found.items()],
        )
        labels, cells = [], []
        for (who, n), d in sets.items():
            cells += [pages.small(d.image(i), 96) for i in range(min(8, len(d)))]
            labels += [f"{who}, {n}", *[""] * (min(8, len(d)) - 1)]
        images.save_png(images.grid(cells, min(8, len(jobs)), labels), out / "pictures.png")
        document.picture(out / "pictures.png", "The same prompts and seeds")
        return [
            *report.write_metrics(out, numbers),
            *(p for p in (chart, out / "pictures.png") if p),
            *document.write(out),
        ]

    for path in dist.on_main(write):
        record.file(path)
    for k, m in numbers.items():
        record.result(k, m["value"])


PARTS = {"generate": (transfer_generate,), "train": (transfer_train,), "evaluate": (transfer_evaluate,), "visualize": (transfer_visualize,),
         "all": (transfer_generate, transfer_train, transfer_evaluate, transfer_visualize)}  # fmt: skip
STAGES = {
    "recursive": (Recursive, recursive),
    "recursive grid": (Grid, grid),
    **{f"transfer {name}": (Transfer, transfer(*parts)) for name, parts in PARTS.items()},
    "few-step": (FewStep, few_step),
}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, less_memory=LESS_MEMORY))
