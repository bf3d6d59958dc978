"""eval.py's stories: pictures against pictures, pairs, captions against references; the reports of them."""

from pathlib import Path

import torch

from nanodiff import data, pipeline
from nanodiff.commandline import as_dict
from nanodiff.config import UserError, among_pictures, printable
from nanodiff.data import caption_files
from nanodiff.device import choice, dist
from nanodiff.evaluation import caption_scores, features, image_pairs, image_sets, pages, similarity, textmetrics
from nanodiff.files import apart
from nanodiff.models import layers
from nanodiff.output import charts, report
from nanodiff.output.record import Record
from nanodiff.pipeline.sources import EMBEDDED
from nanodiff.stories import gallery
from nanodiff.training.options import listed

PAIRINGS = (("original", "finetuned"), ("original", "teacher"), ("finetuned", "teacher"))
WRITTEN = ("metrics.json", "metrics.csv", "captions.csv")  # what a later run might be given to read
OF_SETS = ("fid", "clip_score")  # what `compare` takes of a folder as a whole


def begin(cfg):
    """(record, device), after joining the other processes of torchrun."""
    if getattr(cfg, "bootstrap", None) == 1:
        raise UserError("--bootstrap 1 has no spread; give 0, or 2 or more")
    device = choice.pick_device(getattr(cfg, "device", "cpu"))
    layers.use_kernels(getattr(cfg, "kernels", "torch"))
    torch.backends.cudnn.allow_tf32 = False  # features are compared with other programs' to four digits
    dist.start(device, cfg.dist_timeout)
    out = Path(cfg.output_dir)
    if any(Path(p).resolve() == out.resolve() for p in getattr(cfg, "inputs", ())):
        raise UserError(f"--output-dir {out}: is one of --inputs, whose numbers would be replaced")
    read = [(name, getattr(cfg, name, None)) for name in ("candidates", "references", "prompts")]
    for name, path in (*read, *(("inputs", path) for path in getattr(cfg, "inputs", ()))):
        apart({name: path}, [out / file for file in WRITTEN])
    record = Record(cfg, device)
    if (record.out / "metrics.json").is_file():
        dist.say(f"note: {record.out}: the numbers of an earlier run in it are replaced")
    return record, device


def dataset(path, flag, cfg):
    """A Dataset; rank 0 looks, so that all see the same files. Raises UserError where our figures would lie among its pictures."""
    if wrong := among_pictures(path, flag, cfg.output_dir):
        raise UserError(wrong)
    return dist.on_main(data.load, path, captions=False)


def finish(record, metrics, make):
    """On rank 0: write the numbers, then make() -> (Report, files) and write it, so that a figure that fails loses no number. Print the
    results, end the record."""

    def write():
        numbers = report.write_metrics(record.out, metrics)
        document, files = make()
        return [*numbers, *files, *document.write(record.out)]

    for path in dist.on_main(write):
        record.file(path)
    for name, m in metrics.items():
        record.result(name, m["value"])
    record.write()
    if dist.is_main():
        print(f"report: {record.out / 'report.html'}")
    dist.finish()


def images_of(cfg):
    wanted = image_sets.wanted(listed(cfg.metrics))
    spaces = image_sets.spaces_of(listed(cfg.features)) or ("inception",)
    if cfg.fid_dims not in (64, 192, 768, 2048):
        raise UserError(f"--fid-dims {cfg.fid_dims} is none of 64, 192, 768, 2048")
    if cfg.generated and cfg.model:
        raise UserError("--generated are pictures, --model draws them; give one of the two")
    if not cfg.generated and not cfg.prompts:
        raise UserError("--generated FOLDER is required, or --prompts FILE to draw pictures first")
    for name in ("num_images", "steps", "guidance_scale", "scheduler", "draw_seed", "dtype") if cfg.generated else ():
        if getattr(cfg, name) is not None:
            raise UserError(f"--{name.replace('_', '-')} is for drawing, but --generated are pictures")
    if cfg.across and not all(part.isdecimal() for part in listed(cfg.across)):
        raise UserError(f"--across {printable(cfg.across)}: expected numbers of pictures, such as 0,5,9")
    if cfg.across and len(cfg.generated) < 2:
        raise UserError("--across is for a sheet across several --generated")
    record, device = begin(cfg)
    out = record.out
    settings = image_sets.Settings(
        wanted or image_sets.GROUPS, bool(wanted), spaces, cfg.weights_dir, cfg.allow_pickle, cfg.clip, cfg.fid_mode, cfg.fid_dims, cfg.is_network, cfg.nearest_k,
        cfg.kid_subsets, cfg.kid_subset_size, cfg.is_splits, cfg.bootstrap, cfg.seed,
        (cfg.cache_dir or str(out / "cache")) if cfg.cache else None, cfg.batch_size, cfg.num_workers, device,
    )  # fmt: skip
    real = dataset(cfg.real, "real", cfg) if cfg.real else None
    given = cfg.prompts
    if not cfg.generated:
        with record.timed("draw"):
            folder, settings.about = draw(cfg, record, device)
            cfg.generated, given = [str(folder)], None
    names = _names(cfg.generated, "generated")
    found, sets, prompts_of = {}, {}, {}
    if cfg.across:
        across = max(map(int, listed(cfg.across)))
        for path, name in zip(cfg.generated, names, strict=True):  # known now, not after the features
            sets[name] = dataset(path, "generated", cfg)
            if across >= (count := len(sets[name])):
                raise UserError(f"--across {across}: {path} has {count} pictures, counted from 0")
    reads = given or not wanted or set(wanted) & set(image_sets.NEEDS_PROMPTS)
    for path, name in zip(cfg.generated, names, strict=True):
        sets[name] = sets.get(name) or dataset(path, "generated", cfg)
        prompts_of[name], why = dist.on_main(image_sets.prompts_for, sets[name], given) if reads else (None, "")
        with record.timed("features and metrics"):
            found[name] = image_sets.images(sets[name], settings, real, prompts_of[name], name, why)
        for reason in dict.fromkeys(found[name].skipped.values()):
            dist.say(f"note: not computed: {reason}")
    numbers = found[names[0]].metrics
    if len(names) > 1:
        numbers = {f"{name}.{k}": m for name, f in found.items() for k, m in f.metrics.items()}

    def make():
        document = report.Report("Pictures: " + ", ".join(names))
        rows = [["generated", path, len(sets[name])] for path, name in zip(cfg.generated, names, strict=True)]
        document.table(("set", "from", "pictures"), rows + ([["real", cfg.real, len(real)]] if real else []))
        return document, pages.sets(
            out, document, found, sets, real, prompts_of, [int(part) for part in listed(cfg.across)]
        )

    finish(record, numbers, make)


def _names(paths, flag):
    """A short name for each path: its last part, or more of it where that is not unique."""
    parts = [Path(p).expanduser().resolve().parts for p in paths]
    parts = [(*p[:-1], p[-1].removesuffix(".tar").removesuffix(".json").removesuffix(".csv")) for p in parts]
    for n in range(1, max(map(len, parts)) + 1):
        names = ["/".join(p[-n:]) for p in parts]
        if len(set(names)) == len(names):
            return names
    twice = next(p for i, p in enumerate(paths) if parts[i] in parts[:i])
    raise UserError(f"--{flag}: {printable(twice)} is given twice")


def draw(cfg, record, device):
    """Draw the prompts' pictures into OUTPUT_DIR/generated. Returns the folder, and the facts of how they were drawn."""
    lines = dist.on_main(image_sets.prompts_in, cfg.prompts)
    dtype = choice.pick_dtype(cfg.dtype or "auto", device)
    sd = dist.together(pipeline.load, cfg.model or EMBEDDED, dtype, device, scheduler=cfg.scheduler)
    how = gallery.settings(sd, cfg.model or "embedded", cfg.steps, cfg.guidance_scale)
    every = [prompt for prompt in lines for _ in range(cfg.num_images or 1)]
    jobs = [gallery.Job(f"{i:05d}.png", prompt, (cfg.draw_seed or 0) + i) for i, prompt in enumerate(every)]
    folder = record.out / "generated"
    gallery.draw(sd, jobs, folder, how, cfg.batch_size, anew=True)
    return folder, {"drawn_with": how}


def compare(cfg):
    paths = {n: getattr(cfg, n) for n in ("a", "b", "original", "finetuned", "teacher") if getattr(cfg, n)}
    if set(paths) == {"a", "b"}:
        pairings = [("a", "b")]
    elif {"original", "finetuned"} <= set(paths) <= {"original", "finetuned", "teacher"}:
        pairings = [p for p in PAIRINGS if set(p) <= set(paths)]
    else:
        raise UserError("give --a and --b, or --original and --finetuned (and --teacher)")
    known = (*similarity.NAMES, *OF_SETS)
    names = listed(cfg.metrics) or known
    for name in names:
        if name not in known:
            raise UserError(f"--metrics: {printable(name)!r} is none of {', '.join(known)}")
    record, device = begin(cfg)
    folders = {label: dataset(path, label, cfg) for label, path in paths.items()}
    settings = image_sets.Settings(
        tuple(n for n in OF_SETS if n in names), bool(cfg.metrics), ("inception",), cfg.weights_dir, cfg.allow_pickle, cfg.clip,
        cfg.fid_mode, cache=str(record.out / "cache"), seed=cfg.seed, batch_size=cfg.batch_size, workers=cfg.num_workers, device=device,
    )  # fmt: skip
    loss, facts, skipped = None, {}, {}
    if "lpips" in names:
        try:
            loss, facts = features.perceptual(cfg.weights_dir, device, cfg.allow_pickle)
        except features.Absent as e:
            if cfg.metrics:
                raise UserError(str(e)) from None
            dist.say(f"note: not computed: lpips: {e}")
            skipped["lpips"] = str(e)
    with record.timed("pairs"):
        found, resized = image_pairs.pairs(folders, pairings, settings, names, loss)
    metrics = image_pairs.pair_metrics(found, facts, resized, cfg.seed)
    for name in (n for n in similarity.LEAST if n in found[0].numbers["_vs_".join(pairings[0])]):
        if not any(k.split(".")[-1] == name for k in metrics):
            skipped[name] = f"{name}: the pictures are smaller than {similarity.LEAST[name]} pixels"
            if cfg.metrics:
                raise UserError(skipped[name])
            dist.say(f"note: not computed: {skipped[name]}")
    with record.timed("sets"):
        whole, missing = image_pairs.of_sets(folders, pairings, settings, cfg.prompts)
    for reason in dict.fromkeys(missing.values()):
        dist.say(f"note: not computed: {reason}")
    metrics, skipped = metrics | whole, skipped | missing

    def make():
        document = report.Report("Pictures compared: " + ", ".join(f"{a} and {b}" for a, b in pairings))
        return document, pages.comparison(
            record.out, document, found, folders, pairings, metrics, skipped, as_dict(cfg), cfg.panels, cfg.seed
        )

    finish(record, metrics, make)


def captions(cfg):
    for flag in ("candidates", "references"):
        if getattr(cfg, flag) is None:
            raise UserError(f"--{flag} FILE is required")
    record, _ = begin(cfg)
    mine, theirs = (dist.on_main(caption_files.read, path) for path in (cfg.candidates, cfg.references))
    names = listed(cfg.metrics)
    if cfg.wordnet and names and "meteor" not in names:
        raise UserError("--wordnet is for meteor, which --metrics leaves out")
    if not names and len(mine) == 1:
        dist.say("note: not computed: cider weighs words by how few pictures have them, and here is one picture")
        names = tuple(n for n in textmetrics.NAMES if n != "cider")
    with record.timed("scores"):
        found = dist.on_main(
            caption_scores.captions,
            mine,
            theirs,
            cfg.tokenize,
            names or textmetrics.NAMES,
            cfg.bootstrap,
            cfg.seed,
            cfg.wordnet,
        )
    metrics, ids, scores = found

    def make():
        document = report.Report("Captions")
        document.text(f"{len(ids)} captions of {printable(cfg.candidates)} against {printable(cfg.references)}. Corpus BLEU and the mean of "
                      f"single captions' BLEU are different numbers; METEOR is with{'' if cfg.wordnet else 'out'} synonyms.")  # fmt: skip
        report.metrics_table(document, metrics)
        header = ("id", "candidate", *scores)
        lines = [[k, mine[k][0], *(s.each[i] for s in scores.values())] for i, k in enumerate(ids)]
        report.write_csv(record.out / "captions.csv", header, lines)
        series = {"": [(m["value"], *(m.get("ci") or (m["value"],) * 2)) for n, m in metrics.items() if n in scores]}
        chart = charts.bars(record.out / "captions.png", list(scores), series, "with 95 % intervals")
        document.picture(chart, "The set's scores")
        by = next(iter(scores))
        order = sorted(range(len(ids)), key=lambda i: scores[by].each[i])
        for title, chosen in (("Lowest", order[:5]), ("Highest", order[-5:][::-1])):
            document.heading(f"{title} by {by}")
            document.table(
                ("id", "candidate", "references", by),
                [[ids[i], mine[ids[i]][0], " | ".join(theirs[ids[i]]), scores[by].each[i]] for i in chosen],
            )
        return document, [p for p in (record.out / "captions.csv", chart) if p]

    finish(record, metrics, make)


def summary(cfg):
    if not cfg.inputs:
        raise UserError("--inputs FOLDER is required")
    record, _ = begin(cfg)
    names = _names(cfg.inputs, "inputs")
    found = {n: dist.on_main(report.read_metrics, p) for n, p in zip(names, cfg.inputs, strict=True)}
    every = list(dict.fromkeys(m for f in found.values() for m in f))
    metrics = found[names[0]] if len(found) == 1 else {f"{n}.{m}": v for n, f in found.items() for m, v in f.items()}

    def make():
        document, files = report.Report(cfg.title), []
        if any(m.split(".")[-1] in ("ssim", "mse", "psnr") for m in every):
            document.text(pages.CANNOT)
        document.heading("Side by side")
        document.table(
            ("metric", *names), [[m, *(f[m]["value"] if m in f else None for f in found.values())] for m in every]
        )
        drawable = lambda f, m: m in f and not isinstance(f[m]["value"], str)  # noqa: E731
        common = [m for m in every if sum(drawable(f, m) for f in found.values()) > 1]
        if common:
            nothing = (float("nan"),) * 3
            panels = {
                m: {"": [pages.band(f[m]) if drawable(f, m) else nothing for f in found.values()]} for m in common
            }
            chart = charts.lines(record.out / "runs.png", names, panels, "run")
            document.picture(chart, "Numbers that more than one run has")
            files += [chart] if chart else []
        for name, path in zip(names, cfg.inputs, strict=True):
            document.heading(name)
            for picture in sorted(Path(path).glob("*.png"))[:12] if Path(path).is_dir() else ():
                document.picture(picture, f"{name}: {picture.stem.replace('_', ' ')}")
            report.metrics_table(document, found[name])
        return document, files

    finish(record, metrics, make)
