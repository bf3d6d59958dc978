"""caption.py's stories of a captioner: training, inference, evaluation."""

import functools
import json
import math
import shlex
import shutil
import time
from pathlib import Path

import torch

from nanodiff import data
from nanodiff.config import UserError, printable
from nanodiff.data import captionset, tables
from nanodiff.device import dist
from nanodiff.diffusion import objective
from nanodiff.evaluation import caption_scores, features, image_sets, textmetrics
from nanodiff.files import apart, append, write_bytes
from nanodiff.output import charts, images, report
from nanodiff.stories import captioner_model
from nanodiff.stories.captions import begin, language_dtype, quantized
from nanodiff.training import loader
from nanodiff.training.options import listed, replaced
from nanodiff.training.run import Run


def train(cfg):
    """The stage `train`: validated after every epoch; checkpoints/best_model has the lowest validation loss of all epochs."""
    cfg.check()
    run = Run(cfg)
    rows = {n: dist.on_main(part, cfg, n) for n in ("train", "val")}
    dist.on_main(held_out, cfg, rows)
    dist.on_main(learned_too, cfg, rows)
    torch.manual_seed(cfg.seed)  # what is trained from scratch
    net = dist.together(make, cfg, rows["train"], run)
    if cfg.lora:
        captioner_model.adapt(net, captioner_model.Adapters(cfg.lora_r, cfg.lora_alpha, cfg.lora_dropout, listed(cfg.lora_targets)),
                        captioner_model.Adapters(cfg.vit_lora_r, cfg.vit_lora_alpha, cfg.vit_lora_dropout, captioner_model.VIT_TARGETS))  # fmt: skip
    sets = {n: captionset.pictures(rows[n], cfg.train_csv_path) for n in rows}
    feed, checks = feeds(cfg, sets, net.pictures.transform)
    texts, check_texts = (
        Texts(dist.together(captions_of, net, rows[n], cfg, n), seed, run.device)
        for n, seed in (("train", cfg.seed), ("val", None))
    )
    run.cfg = cfg = replaced(cfg, checkpointing_steps=cfg.checkpointing_steps or feed.per_epoch)
    random = next((name for name in ("lora_dropout", "vit_lora_dropout") if getattr(cfg, name)), None)
    calls = run.trainable({"captioner": net}, random)
    run.schedule(feed.per_epoch)
    run.resume()
    dist.on_main(tidy, run, cfg)
    run.same("data set", [s.fingerprint() for s in sets.values()], must=True)
    run.same("size of its pictures", [s.weight() for s in sets.values()], must=True)
    feed.serve(run)
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    dist.say(f"captioner: {trained / 1e6:.2f} M of {sum(p.numel() for p in net.parameters()) / 1e6:.2f} M parameters learn; "
             f"{len(sets['train'])} training and {len(sets['val'])} validation pictures")  # fmt: skip

    for step in run.steps():
        mean = texts.mean_length(*feed.plan.update(step))
        for batch in feed.update(step):
            torch.manual_seed(objective.generator(cfg.seed, "dropout", next(iter(batch.indices), 0)).initial_seed())
            with run.forward(batch):
                loss = calls["captioner"](batch.pixels.to(run.device), texts.of(batch))  # summed over tokens
                loss = loss / (mean * len(batch.positions))
            run.backward(loss, batch)
        run.update()
        if run.epoch_ended() or step + 1 == run.total:
            feed.report_bad(run.out)
            judge(run, cfg, net, checks, check_texts, sets["val"], rows["val"], -(-(step + 1) // feed.per_epoch))
    finish(run)


def feeds(cfg, sets, transform):
    """(training, validation) Feeds of pictures; only training changes them at random."""
    change = loader.Transform(transform.resolution, True, cfg.random_flip, cfg.random_jitter, cfg.random_rotate,
                              transform.interpolation, True)  # fmt: skip
    policy = {"policy": "skip" if cfg.skip_bad else "stop", "limit": 1.0, "timeout": cfg.dist_timeout}
    feed = loader.Feed(sets["train"], change, cfg.seed, cfg.batch_size, cfg.grad_accum, cfg.num_workers, **policy)
    return feed, loader.Feed(sets["val"], transform, cfg.seed, cfg.batch_size, **policy)


class Texts:
    """The captions of a set as ids: [[ids] of each caption] of each picture. seed: draw one of a picture's by its global sample index;
    None: always the first."""

    def __init__(self, ids, seed, device):
        self.ids, self.seed, self.device = ids, seed, device

    def chosen(self, index, position):
        own = self.ids[position]
        if self.seed is None or len(own) == 1:
            return own[0]
        one = objective.generator(self.seed, "caption", index)
        return own[torch.randint(len(own), (), generator=one).item()]

    def of(self, batch):
        """ids [B, L] of a batch, filled up with NO_LABEL."""
        texts = [self.chosen(i, p) for i, p in zip(batch.indices, batch.positions, strict=True)]
        longest = max(map(len, texts))
        return torch.tensor([t + [captioner_model.NO_LABEL] * (longest - len(t)) for t in texts], device=self.device)

    def mean_length(self, first, positions):
        """Tokens a caption in a whole update, all processes and micro-batches: by it a micro-batch's sum becomes its part of the mean
        over tokens."""
        return sum(len(self.chosen(first + k, int(p))) for k, p in enumerate(positions)) / len(positions)


def judge(run, cfg, net, checks, texts, dataset, rows, epoch):
    """After an epoch: the validation loss, captions to look at, and the captioners that are written."""
    with run.averaged():
        found = validate(run, net, checks, texts.of)
        run.log(val_loss=found)
        captioned = show(run, net, dataset, rows, cfg, epoch)
        best = run.judge(found)
        loss = found if math.isfinite(found) else None
        facts = {"epoch": epoch, "step": run.step + 1, "val_loss": loss, "best_val_loss": run.best}
        names = ["last_checkpoint"] + ["best_model"] * best + [f"epoch_{epoch}"] * run.every_epochs(cfg.save_epochs)
        for name in names:
            write(run, net, name, facts, not cfg.lora)
    beside = " (the best so far)" if best else f" (best: {run.best:.4f})" if run.best is not None else ""
    dist.say("\n".join([f"epoch {epoch}: validation loss {found:.4f}{beside}", *captioned]))


def finish(run):
    """The last checkpoint, run.json, the figure of losses, and what to type next."""
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
    if dist.is_main():
        best = run.out / "checkpoints" / ("best_model" if run.best is not None else "last_checkpoint")
        print(
            f"the captioner: {best}\nnext: python caption.py infer --model-file {shlex.quote(str(best))} --infer-image-path PICTURE"
        )


def learned_too(cfg, rows):
    """A warning when validation pictures are learned from: the best captioner would be the one that knows them by heart."""
    names = {row.name for row in rows["train"]}
    if both := [row.name for row in rows["val"] if row.name in names]:
        dist.say(f"warning: {len(both)} of {len(rows['val'])} validation pictures are also learned from, such as {printable(both[0])}: "
                 "best_model is chosen by them")  # fmt: skip


def held_out(cfg, rows):
    """Raise UserError when a picture of --test-csv-path would be learned from or chosen by; the default one counts where it is of the same
    split, beside the training CSV."""
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
    path = getattr(cfg, f"{name}_csv_path")
    if not Path(path).is_file():
        raise UserError(f"--{name}-csv-path {path}: no such file (caption.py split writes it)")
    return captionset.located(captionset.read(path, skip=cfg.skip_bad), cfg.folders(), cfg.skip_bad)


def make(cfg, rows, run):
    """A Captioner to train, on the run's device."""
    settings = captioner_model.Settings(
        cfg.vision_model, cfg.model_name, hidden=cfg.projector_hidden, dropout=cfg.projector_dropout
    )
    if cfg.model_size != "pretrained":
        texts = [t for row in rows for t in row.captions]
        return captioner_model.fresh(cfg.model_size, texts, settings, cfg.vocab_size).to(run.device)
    low = run.precision if cfg.lora and run.precision else torch.float32
    net = captioner_model.base(settings, low, run.device, cfg.hf_token)
    return net if cfg.lora else net.requires_grad_(True)


def captions_of(net, rows, cfg, name):
    """[[ids with the end token] of each caption] of each row; says how many were cut."""
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
    total = [0.0, 0.0]
    for step in range(feed.per_epoch):
        for batch in feed.update(step):
            if batch.count:
                ids = ids_of(batch)
                with run.autocast():
                    total[0] += net(batch.pixels.to(run.device), ids).item()
                total[1] += (ids != captioner_model.NO_LABEL).sum().item()
    sums, tokens = dist.total(total, run.device)
    return sums / tokens


def show(run, net, dataset, rows, cfg, epoch):
    """Lines with the captions of the first validation pictures as they are now, also in samples.jsonl, and as a sheet."""

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
        append(run.out / "samples.jsonl", "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines))
        images.save_png(sheet_of(some, [x["reference"] for x in lines], texts), run.out / "samples.png")
        return [
            f"  {printable(x['image'])}: {printable(x['prediction'])!r} (reference: {printable(x['reference'])!r})"
            for x in lines
        ]

    return dist.on_main(tell)


def sheet_of(pictures, references, predictions, side=160):
    """One PIL sheet: each picture below its reference (in brackets, if there is one) and what was captioned."""
    labels = [
        f"{p or '(nothing)'} [{r}]" if r else p or "(nothing)" for p, r in zip(predictions, references, strict=True)
    ]
    small = [images.fit(p, side, side) for p in pictures]
    return images.grid(small, min(6, len(small)), labels, size=12)


def write(run, net, name, facts, whole):
    dist.on_main(captioner_model.save, net, run.out / "checkpoints" / name, net.state_dict(), whole, facts)


def trained_captioner(cfg, device):
    """The Captioner of --model-file, for inference."""
    if not cfg.model_file:
        raise UserError("--model-file is required, such as results/vit_llama3_2_1B/checkpoints/best_model.pt")
    dtype = language_dtype(cfg, device, cfg.quantize)
    net = captioner_model.load(
        cfg.model_file, dtype, device, cfg.model_name, cfg.vision_model, cfg.hf_token, bool(cfg.quantize)
    )
    if cfg.quantize:
        quantized(net.llm, cfg.quantize)
    for name, given in (("language_model", cfg.model_name), ("vision_model", cfg.vision_model)):
        if given and not getattr(net.settings, name):
            raise UserError(f"--{name.replace('_', '-')}: {cfg.model_file} brings its own, which was wholly trained")
    return net


def infer_all(cfg, net, pictures, record):
    """Captions of PIL pictures; says the speed."""
    groups = [pictures[i : i + cfg.batch_size] for i in range(0, len(pictures), cfg.batch_size)]
    out, steps = [], []
    with record.timed("tell"):
        for group in dist.progress(groups, len(groups), "captions (batches)"):
            start, taken = time.perf_counter(), []
            out += net.describe(
                [f() for f in group], cfg.max_new_tokens, cfg.beams, on_step=lambda i, s, kept=taken: kept.append(s)
            )
            steps.append((len(taken) * len(group), time.perf_counter() - start))
    if sum(n for n, _ in steps):
        rate = sum(n for n, _ in steps) / sum(s for _, s in steps)
        record.data["results"]["tokens_per_s"] = rate
        dist.say(f"{len(out)} pictures, {rate:.1f} tokens/s with their reading")
    return out


def infer(cfg):
    """The stage `infer`: one picture's caption is printed alone; of several, a line each with the picture's name."""
    if not cfg.infer_image_path:
        raise UserError("--infer-image-path is required: a picture, a folder, or a CSV")
    out, given = Path(cfg.output_dir), Path(cfg.infer_image_path)
    apart({"infer_image_path": given}, [out / "captions.csv", out / "sheet.png"])
    if given.is_dir() and out.resolve() == given.resolve():
        raise UserError(
            f"--output-dir {out}: holds the pictures of --infer-image-path, to which the sheet would be added"
        )
    rows = to_tell(cfg)
    device, record = begin(cfg)
    with record.timed("load"):
        net = trained_captioner(cfg, device)
    rows, shown = readable(rows, cfg.skip_bad)
    texts = infer_all(cfg, net, shown, record)
    captioned = [row._replace(captions=(t,)) for row, t in zip(rows, texts, strict=True)]
    if (record.out / "captions.csv").is_file():
        dist.say(f"note: {record.out / 'captions.csv'}: replaces an earlier run's captions")
    captionset.write(record.out / "captions.csv", captioned)
    sheet = sheet_of(
        [open_picture() for open_picture in shown[:48]],
        [row.captions[0] if row.captions else "" for row in rows[:48]],
        texts[:48],
    )
    images.save_png(sheet, record.out / "sheet.png")
    for path in (record.out / "captions.csv", record.out / "sheet.png"):
        record.file(path)
    record.data["results"]["captions"] = {row.name: row.captions[0] for row in captioned}
    record.write()
    listed = Path(cfg.infer_image_path).suffix.lower() in tables.SUFFIXES
    alone = not listed and len(captioned) == 1
    for row in captioned:
        text = printable(row.captions[0])  # a model may write anything, and this goes to a terminal
        name = Path(row.path).name if Path(cfg.infer_image_path).is_dir() else row.name
        print(text if alone else f"{printable(name)}\t{text}")


def to_tell(cfg):
    """[Row] of --infer-image-path. Raises UserError."""
    path = Path(cfg.infer_image_path)
    if path.is_dir():
        files = sorted(p for p in path.iterdir() if p.suffix.lower() in data.SUFFIXES and tables.is_data(p.name))
        if not files:
            raise UserError(
                f"--infer-image-path {path}: no pictures in it (looked for {', '.join(sorted(data.SUFFIXES))})"
            )
        others = [p.name for p in sorted(path.iterdir()) if p not in files and tables.is_data(p.name)]
        if others:
            dist.say(
                f"note: {path}: {len(others)} other files and folders in it are left out, such as {printable(others[0])}"
            )
        alike = len({p.stem for p in files}) < len(files)  # a.png and a.jpg: their suffixes tell them apart
        return [captionset.Row(p.name if alike else p.stem, (), str(p)) for p in files]
    if not path.is_file():
        raise UserError(f"--infer-image-path {path}: no such file or folder")
    if path.suffix.lower() in tables.SUFFIXES:
        return captionset.located(
            captionset.read(path, captions=False), cfg.image_path or [path.parent / "images"], cfg.skip_bad
        )
    return [captionset.Row(path.stem, (), str(path))]


def readable(rows, skip):
    """(rows, [f() -> PIL picture]) of those that can be read; the others raise UserError, or are said with --skip-bad."""
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


def evaluate(cfg):
    """The stage `eval`: the pictures of a part against all their captions."""
    asked_for = listed(cfg.metrics)
    textmetrics.check_names(asked_for, OWN)
    if cfg.bootstrap == 1:
        raise UserError("--bootstrap 1 has no spread; give 0, or 2 or more")
    parts = {f"{n}_csv_path": getattr(cfg, f"{n}_csv_path") for n in ("train", "val", "test")}
    apart(parts, [Path(cfg.output_dir) / "captions.csv"])
    rows, shown = readable(part(cfg, cfg.eval_set)[: cfg.max_samples], cfg.skip_bad)
    if "cider" in asked_for and len(rows) == 1:
        raise UserError("--metrics cider weighs words by how few pictures have them, and here is one picture")
    device, record = begin(cfg)
    clip = image_sets.Settings(
        groups=("clip_score",),
        must="clip_score" in asked_for,
        weights_dir=cfg.weights_dir,
        clip=cfg.clip,
        seed=cfg.seed,
        device=device,
    )
    if clip.must:
        try:
            image_sets.clip_path(clip)
        except features.Absent as e:
            raise UserError(f"--metrics clip_score: {e}") from None
    with record.timed("load"):
        net = trained_captioner(cfg, device)
    texts = infer_all(cfg, net, shown, record)
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
        document.picture(record.out / "sheet.png", "From the best caption to the worst; in brackets the reference")
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
    skipped = []
    wanted = tuple(n for n in names if n not in OWN) if names else textmetrics.NAMES
    if len(rows) == 1 and "cider" in wanted and not names:
        skipped.append("cider weighs words by how few pictures have them, and here is one picture")
        wanted = tuple(n for n in wanted if n != "cider")
    found, scores = {}, {}
    if wanted:
        found, _, scores = caption_scores.captions({r.name: [t] for r, t in zip(rows, texts, strict=True)}, {r.name: list(r.captions) for r in rows},
                                             cfg.tokenize, wanted, cfg.bootstrap, cfg.seed)  # fmt: skip
    if not names or "perplexity" in names:
        nats, tokens = surprise(net, rows, shown, cfg.batch_size, clip.device)
        facts = report.provenance(
            form="exp of the mean cross-entropy per token of all references, end token included",
            tokenizer="the model's",
        )
        found["perplexity"] = report.entry(math.exp(min(nats / tokens, 700)), tokens, facts)
    if not names or "clip_score" in names:
        scored = image_sets.images(captionset.pictures(rows, cfg.eval_set), clip, None, texts, "captions")
        found |= {k: m for k, m in scored.metrics.items() if k.startswith("clip_score")}
        skipped += dict.fromkeys(scored.skipped.values())
    return found, scores, skipped


def surprise(net, rows, shown, batch_size, device):
    """(summed cross-entropy, tokens) of all references."""
    pairs = [(i, net.caption_ids(t)) for i, row in enumerate(rows) for t in row.captions]
    nats = 0.0
    for k in range(0, len(pairs), batch_size):
        some = pairs[k : k + batch_size]
        longest = max(len(ids) for _, ids in some)
        ids = torch.tensor([t + [captioner_model.NO_LABEL] * (longest - len(t)) for _, t in some], device=device)
        with torch.inference_mode():
            nats += net(net.pictures.batch([shown[i]() for i, _ in some]).to(device), ids).item()
    return nats, sum(len(ids) for _, ids in pairs)
