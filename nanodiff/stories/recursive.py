"""distill.py recursive: a model trained on its own pictures, generation after generation."""

import gc
import json
import shutil
from pathlib import Path

import numpy as np

from nanodiff import data, pipeline
from nanodiff.config import UserError, among_pictures, printable, read_json
from nanodiff.data import caption_files, tables
from nanodiff.device import choice, dist
from nanodiff.diffusion.schedule import Schedule
from nanodiff.evaluation import image_sets, pages
from nanodiff.files import apart, out_dir, write_bytes, write_json
from nanodiff.output import images, report
from nanodiff.output.record import Record
from nanodiff.pipeline import sources
from nanodiff.stories import gallery
from nanodiff.training import build, teach
from nanodiff.training.options import decisive, listed


def read_captions(path, n):
    """[(id, caption)] of the first n pictures by ascending id: of COCO annotations, or of a data set with captions."""
    path = Path(path)
    if path.suffix.lower() == ".json":
        found = {k: v[0] for k, v in caption_files.read(path).items()}
    else:
        dataset = data.load(path)
        found = dict(zip(dataset.keys, dataset.captions, strict=True))
    ids = sorted(found, key=tables.by_number)
    if len(ids) < n:
        raise UserError(f"--captions {path}: {len(ids)} pictures have captions, {n} are wanted")
    return [(i, found[i]) for i in ids[:n]]


def jobs_of(captions):
    """A gallery.Job for each: named as COCO names its pictures, or by number; the seed is the id's last four digits."""
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

    def begun(self, k):
        """What generation k's model is, by the pictures that it drew: {fact: JSON value}."""
        how = read_json(self.pictures(k) / gallery.PLAN)["settings"]
        return {"begins with": how["model_sha256"]}

    def check_learned(self, k, count):
        """Raise UserError when generation k is to have another number of pictures than the next one learned from."""
        folder, later = self.pictures(k), self.model(k + 1)
        if self.cfg.overwrite_output_dir or self.cfg.finetune or not (later / "training.json").is_file():
            return
        if (folder / gallery.PLAN).is_file() and (n := len(gallery.planned(folder))) != count:
            raise UserError(
                f"{folder}: holds {n} pictures, {count} are asked for, and {later} learned from those; take other folders (or `overwrite_output_dir`)"
            )

    def dataset(self, k):
        """What generation k is trained on."""
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
            if not n:
                raise UserError(f"`real_fraction` {cfg.real_fraction:g} of {len(items)} pictures is none of them")
            own = sorted(rng.choice(len(items), len(items) - n, replace=False))
            drawn = sorted(rng.choice(len(real), n, replace=n > len(real)))
            items = [items[i] for i in own] + [
                real.items[i]._replace(key=f"real/{j}/{real.items[i].key}") for j, i in enumerate(drawn)
            ]
        return data.Dataset(items, str(self.pictures(max(which))))


def draw(study, k, captions, device):
    """The pictures of generation k, and a listing of them, by which they are a data set."""
    cfg, folder, jobs = study.cfg, study.pictures(k), jobs_of(captions)
    dist.on_main(study.check_learned, k, len(jobs))
    dtype = choice.pick_dtype("auto", device)
    sd = dist.together(pipeline.load, study.model(k), dtype, device, scheduler=cfg.scheduler)
    how = gallery.settings(sd, Path(study.model(k)).name, cfg.steps, study.scale, cfg.resolution, cfg.resolution)
    failed = gallery.draw(
        sd, jobs, folder, how, cfg.draw_batch_size, cfg.overwrite_output_dir, f"generation {k}", exact=True
    )
    lines = [
        json.dumps({"file_name": j.name, "text": j.prompt})
        for j in gallery.planned(folder).values()
        if j.name not in failed
    ]
    dist.on_main(write_bytes, folder / "metadata.jsonl", ("\n".join(lines) + "\n").encode())
    del sd
    gc.collect()


def learn(cfg, model, dataset, folder, facts):
    """Train a model's denoiser on a data set, and write the whole model into `folder`; one that is there and was made with the same
    settings and facts is left as it is. Checkpoints lie in folder.training until then."""
    work = folder.with_name(f"{folder.name}.training")
    facts = facts | {
        "pictures": len(dataset),
        "data": dataset.fingerprint(),
        "sizes": dataset.weight(),
        **decisive(cfg),
    }
    if dist.on_main(teach.settled, folder, facts, cfg.overwrite_output_dir, "models_root"):
        dist.on_main(shutil.rmtree, work, ignore_errors=True)  # of a run that was killed after its last word
        return
    sd, nets = dist.together(teach.student, model)

    def write(run, states):
        teach.save_model(
            sd, folder, cfg.save_dtype, states, loss=run.more.get("epoch_loss"), updates=run.step, settings=facts
        )

    teach.fit(
        cfg, work, sd, nets, dataset, teach.plain(cfg), write, cfg.resolution, caption_dropout=cfg.caption_dropout
    )
    dist.on_main(shutil.rmtree, work, ignore_errors=True)


def recursive(cfg):
    """The stage `recursive`: see the module docstring."""
    cfg.check()
    build.check_noise(cfg, Schedule.from_config(sources.configs(cfg.model).scheduler()[0]), getattr(cfg, "given", ()))
    image_sets.spaces_of(listed(cfg.features))  # what cannot be shows now
    scales = list(dict.fromkeys(cfg.cfg_scales)) or [cfg.cfg_scale]
    device = choice.pick_device(cfg.device)
    dist.start(device, cfg.dist_timeout)
    for name in ("target_gen", "steps", "num_images", "epochs"):
        dist.say(f"{name}: {getattr(cfg, name)}")
    dist.say(f"cfg_scale: {', '.join(f'{s:g}' for s in scales)}")
    captions = dist.on_main(read_captions, cfg.captions, max(cfg.gen0_images, cfg.num_images if cfg.target_gen else 0))
    record = Record(cfg, device)
    for scale in scales:
        study = Study(cfg, scale)
        dist.on_main(apart, {"model": cfg.model}, [study.model(k) for k in range(1, cfg.target_gen + 1)])
        for flag in ("real", "captions"):
            among = among_pictures(getattr(cfg, flag), flag, study.pictures(0), "data_root", "generated pictures")
            if among:
                raise UserError(among)
        for k in range(cfg.target_gen + 1):
            if k:
                dataset = dist.on_main(study.dataset, k)
                with record.timed("train"):
                    learn(cfg, study.model(k - 1), dataset, study.model(k), dist.on_main(study.begun, k - 1))
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
    cfg, generations = study.cfg, range(study.cfg.target_gen + 1)
    out = record.out / f"cfg_{study.scale:g}{study.suffix}"
    sets = {f"gen_{k}": dist.on_main(data.load, study.pictures(k)) for k in generations}
    real = dist.on_main(data.load, cfg.real, captions=False) if cfg.real else sets["gen_0"]
    settings = image_sets.Settings(spaces=listed(cfg.features), weights_dir=cfg.weights_dir, clip=cfg.clip, nearest_k=cfg.nearest_k,
                                 cache=str(record.out / "cache"), seed=cfg.seed, device=device)  # fmt: skip
    found = {n: image_sets.images(d, settings, real, d.captions, n) for n, d in sets.items()} if cfg.evaluate else {}
    losses = {
        f"gen_{k}": dist.on_main(read_json, study.model(k) / "training.json")["loss"] if k else None
        for k in generations
    }
    value = lambda n, m: found[n].metrics[m]["value"] if n in found and m in found[n].metrics else None  # noqa: E731
    fid = "fid" if value("gen_0", "fid") is not None else "pixels_fid"
    # the same formula on pixels, where there are no Inception weights, is no FID
    header = ("generation", "cfg", "steps", "loss", "FID" if fid == "fid" else "pixels_fid", "IS", "CLIP")
    rows = [
        [k, study.scale, cfg.steps, losses[n], value(n, fid), value(n, "is"), value(n, "clip_score")]
        for k, n in enumerate(sets)
    ]

    def write():
        out_dir(out)
        report.write_csv(out / "table.csv", header, rows)
        write_json(out / "table.json", [dict(zip(header, row, strict=True)) for row in rows])
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


def grid(cfg):
    """One sheet: a row a picture (or the caption), a column a generation."""
    cfg.check()
    device = choice.pick_device(cfg.device)
    dist.start(device, cfg.dist_timeout)
    record = Record(cfg, device)
    study = Study(cfg, (cfg.cfg_scales or [cfg.cfg_scale])[0])
    generations, rows = range(cfg.target_gen + 1), []
    if cfg.prompt is not None:
        row = []
        for k in generations:
            if k and not (study.model(k) / "model_index.json").is_file():
                raise UserError(f"{study.model(k)}: is not there, so generation {k} cannot draw")
            # generation k's pictures are drawn by its model: of generation 0 the one that all begin with
            dtype = choice.pick_dtype("auto", device)
            sd = dist.together(pipeline.load, study.model(k), dtype, device, scheduler=cfg.scheduler)
            made = sd.generate(
                cfg.prompt,
                seeds=[cfg.prompt_seed],
                steps=cfg.steps,
                guidance_scale=study.scale,
                height=cfg.resolution,
                width=cfg.resolution,
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
        out_dir(target.parent)
        sheet = images.grid([pages.small(p, 192) for _, row in rows for p in row], len(generations), labels, size=12)
        images.save_png(sheet, target)

    dist.on_main(write)
    record.file(target)
    record.write()
    if dist.is_main():
        print(f"the sheet: {target}")
    dist.finish()
