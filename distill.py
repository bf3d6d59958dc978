"""Models that learn from models.

    python distill.py recursive --cfg_scale 7.5 --target_gen 3        # a model trained on its own pictures, again and again

recursive: generation 0 are pictures of --model from the captions; generation k is generation k-1's model trained on the pictures of
generation k-1, and pictures of it from the same captions and seeds. Every generation is measured; the report shows what is lost
on the way (Shumailov et al. 2024, Nature 631: model collapse). --baseline trains on generation 0 always, --finetune on real
pictures, --real-fraction mixes some in, --accumulate keeps all generations: what slows the loss (Gerstgrasser et al. 2024, arXiv 2404.01413).

Everything may be killed at any moment: the same command goes on with what is missing. Under torchrun the same pictures come out.
"""

import dataclasses
import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.config import UserError, arg, printable, script
from nanodiff.options import Noise, Training

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
        for name, least in (
            ("target_gen", 0),
            ("steps", 1),
            ("num_images", 1),
            ("gen0_images", 1),
            ("draw_batch_size", 1),
            ("epochs", 1),
        ):
            if getattr(self, name) < least:
                raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {getattr(self, name)}")
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
# Training a student


def train(cfg, model, dataset, folder):
    """Train `model`'s denoiser on a data set, and write the whole model into `folder`, all at once when it is done. Checkpoints lie in
    folder.training until then. Returns nothing; a folder that is there is left as it is."""
    import json
    import shutil

    import torch

    from nanodiff import build, dist, engine, latents, loader, weights

    if dist.on_main((folder / "model_index.json").is_file):
        return
    work = folder.with_name(f"{folder.name}.training")
    group = cfg.batch_size * cfg.grad_accum * dist.world().size
    updates = cfg.max_steps or cfg.epochs * max(1, -(-len(dataset) // group))
    part = dataclasses.replace(
        cfg, output_dir=str(work), resume="auto", checkpointing_steps=cfg.checkpointing_steps or max(1, updates // 10)
    )
    run = engine.Run(part)
    sd, nets = dist.together(build.student, model)
    for frozen in (sd.vae, *sd.encoders):
        if frozen is not None:
            frozen.to(run.device)
    side = cfg.resolution or sd.size[0]
    feed = loader.Feed(
        dataset, loader.Transform(side, True), cfg.seed, cfg.batch_size, cfg.grad_accum, timeout=cfg.dist_timeout
    )
    calls = run.trainable(nets)
    run.schedule(feed.per_epoch)
    run.resume()
    run.same("data set", dataset.fingerprint(), must=True)
    feed.interrupted = run.interrupted
    x0_of = latents.Latents(sd.vae, feed, cfg.seed, run.device, work / "cache")
    text_of = latents.Texts(sd, dataset.texts, cfg.seed, run.device, cfg.caption_dropout, folder=work / "cache",
                            dtype=run.precision or torch.float32)  # fmt: skip
    losses = build.losses(cfg, sd, calls, run.device)
    for _ in run.steps():
        for batch in feed.update(run.step):
            with run.forward(batch):
                loss, plain = losses(batch, x0_of, text_of, cfg.seed)
            run.backward(loss, batch, unweighted_loss=plain)
        run.update()
        if run.epoch_ended():
            run.more["epoch_loss"] = run.epoch_loss
            run.judge(run.epoch_loss)
    run.save()
    with run.averaged():
        states = {k: dist.whole_state(m) for k, m in run.net.items()}

        def write():
            fresh = folder.with_name(f"{folder.name}.part")
            shutil.rmtree(fresh, ignore_errors=True)
            sd.save(fresh, weights.DTYPES[cfg.save_dtype], states)
            (fresh / "training.json").write_text(
                json.dumps({"loss": run.more.get("epoch_loss"), "updates": run.step, "pictures": len(dataset)})
            )
            fresh.rename(folder)

        dist.on_main(write)
    run.close(leave=False)
    dist.on_main(shutil.rmtree, work, ignore_errors=True)


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


def recursive(cfg):
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
                    train(cfg, study.model(k - 1), dataset, study.model(k))
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
    spaces = tuple(part.strip() for part in cfg.features.split(",") if part.strip())
    settings = evaluate.Settings(spaces=spaces, weights_dir=cfg.weights_dir, clip=cfg.clip, nearest_k=cfg.nearest_k,
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


STAGES = {"recursive": (Recursive, recursive)}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, less_memory=LESS_MEMORY))
