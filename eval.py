"""Measure pictures and captions, and write a report that can be sent.

    python eval.py images --generated out/pictures --real PICTURES --weights-dir weights --output-dir out/eval
    python eval.py images --prompts prompts.txt --real PICTURES --features pixels --output-dir out/eval     # draws them first
    python eval.py compare --original A --finetuned B --teacher C --output-dir out/compare                  # or --a A --b B
    python eval.py captions --candidates mine.json --references theirs.json --output-dir out/captions
    python eval.py report --inputs out/eval --inputs out/compare --output-dir out/report

Every number says how it was made: network, hash of its weights, resize rule, number of pictures, seed, versions, command.
Weights are files of yours (--weights-dir); what is absent is named with its source and hash, and nothing stands in for it.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

from nanodiff.config import UserError, arg, printable, script

# torch is imported inside the stages, so that --help answers at once.

LESS_MEMORY = "try a smaller --batch-size"
LEAST = {"batch_size": 1, "num_workers": 0, "panels": 0, "bootstrap": 0, "nearest_k": 1, "kid_subsets": 1, "kid_subset_size": 2,
         "is_splits": 1, "num_images": 1, "steps": 1}  # fmt: skip
EMBEDDED = Path(__file__).parent / "assets" / "nano"
PAIRINGS = (("original", "finetuned"), ("original", "teacher"), ("finetuned", "teacher"))
OF_SETS = ("fid", "clip_score")  # what `compare` takes of a folder as a whole
RADAR = ("ssim", "hist_similarity", "median_hash", "color_similarity", "mse")
TITLES = {"ssim": "SSIM", "mse": "MSE", "hist_similarity": "Histogram Similarity", "median_hash": "Hash Similarity",
          "sharpness_ratio": "Sharpness Ratio", "color_similarity": "Color Similarity"}  # the source document's column names  # fmt: skip
NEARER = {True: "nearer", False: "farther", None: "the same"}
KEY_FIGURES = ("radar_chart.png", "improvement_percentage_chart.png", "improvement_table.png", "ssim_comparison.png")
CANNOT = (
    "SSIM, MSE, PSNR, histograms and hashes compare pixels. For two versions of one picture they say how much has changed; for two "
    "pictures of different content, such as two models' answers to one prompt, they say nothing about which is better, and a change in "
    "them is no improvement by itself. Read them beside the CLIP score and FID of the sets, which need weights (--weights-dir)."
)


@dataclass
class Common:
    output_dir: str = arg("out/eval", "folder of metrics.json, metrics.csv, report.md, report.html and figures")
    dist_timeout: int = arg(600, "seconds after which a process that does not answer is lost")


@dataclass
class Weights(Common):
    seed: int = arg(2020, "of subsets, splits and resamples")
    batch_size: int = arg(16, "pictures at a time through a network")
    num_workers: int = arg(2, "threads that decode pictures")
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    kernels: str = arg("auto", "our Triton kernels on a GPU, for CLIP and for drawing; Inception and VGG are PyTorch's", choices=("auto", "triton", "torch"))  # fmt: skip
    weights_dir: str | None = arg(
        None, "folder with pt_inception-2015-12-05-6726825d, vgg16-397923af, clip-vit-base-patch32/ …"
    )
    allow_pickle: bool = arg(False, "read .pth files, with weights_only")


@dataclass
class Images(Weights):
    generated: list[str] = arg([], "folder or tar shards of generated pictures; repeatable: one set a generation")
    real: str | None = arg(None, "folder or tar shards of real pictures (memorisation: the training pictures)")
    prompts: str | None = arg(None, "the pictures' prompts: a line each, or captions by name (.json, .csv); default: what lies beside or inside the pictures", "prompts-file")  # fmt: skip
    model: str | None = arg(
        None, "draw the pictures first: folder, file or Hub id; default without --generated: the embedded model"
    )
    num_images: int | None = arg(None, "pictures per prompt to draw; default 1")
    steps: int | None = arg(None, "sampling steps; default: the model's own", "num-inference-steps")
    guidance_scale: float | None = arg(None, "classifier-free guidance; default: the model's own", "cfg-scale")
    scheduler: str | None = arg(None, "sampler; default: the model's own")
    draw_seed: int | None = arg(None, "picture i is drawn from this seed + i; default 0")
    dtype: str | None = arg(None, "type of the model that draws; the networks that measure are always fp32", choices=("auto", "fp32", "fp16", "bf16"))  # fmt: skip
    across: str | None = arg(
        None, "numbers of the pictures in the sheet across several sets, comma-separated; default: 8 of them"
    )
    metrics: str | None = arg(None, "comma-separated: fid, kid, is, prdc, memorisation, diversity, clip_score, clip_fid, modality_gap, colours; default: all that can be had")  # fmt: skip
    features: str = arg("inception", "spaces of fid, kid, prdc, memorisation and diversity, comma-separated: inception, clip, pixels (16x16 colours, no weights)")  # fmt: skip
    fid_mode: str = arg("torch-fidelity", "whose resize and scaling to repeat", choices=("torch-fidelity", "pytorch-fid", "clean-fid", "torchmetrics"))  # fmt: skip
    fid_dims: int = arg(2048, "Inception features: 64, 192, 768 or 2048")
    is_network: str = arg(
        "fid", "Inception Score by the FID network (torch-fidelity) or torchvision's", choices=("fid", "torchvision")
    )
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    nearest_k: int = arg(5, "neighbours of precision, recall, density and coverage")
    kid_subsets: int = arg(100, "subsets of KID")
    kid_subset_size: int = arg(1000, "pictures in each of them")
    is_splits: int = arg(10, "parts of the Inception Score")
    bootstrap: int | None = arg(None, "resamples of FID's interval; default 20 below 2048 pictures, else none")
    cache: bool = arg(True, "keep features in OUTPUT_DIR/cache")
    cache_dir: str | None = arg(None, "keep them here instead, to share them between runs")


@dataclass
class Compare(Weights):
    a: str | None = arg(None, "folder of pictures")
    b: str | None = arg(None, "folder with pictures of the same names")
    original: str | None = arg(None, "pictures before; with --finetuned, and perhaps --teacher", "before")
    finetuned: str | None = arg(None, "pictures after", "after")
    teacher: str | None = arg(None, "what they should become")
    metrics: str | None = arg(
        None, "comma-separated; default: all that can be had (lpips, fid and clip_score need weights)"
    )
    prompts: str | None = arg(
        None, "the pictures' prompts, for clip_score; default: captions beside one of the folders", "prompts-file"
    )
    clip: str = arg("clip-vit-base-patch32", "CLIP: a name in --weights-dir, a folder, or a Hub id")
    fid_mode: str = arg("torch-fidelity", "whose resize and scaling to repeat", choices=("torch-fidelity", "pytorch-fid", "clean-fid", "torchmetrics"))  # fmt: skip
    panels: int = arg(12, "pairs of which panels and difference maps are drawn")


@dataclass
class Captions(Common):
    seed: int = arg(2020, "of the resamples")
    candidates: str | None = arg(None, "JSON {id: caption}, COCO results, or CSV (Image_Name, Title)")
    references: str | None = arg(None, "JSON {id: [captions]}, COCO annotations, or CSV")
    tokenize: str = arg("ptb", "ptb: lower case, Penn Treebank words, no punctuation, as COCO; none: split at spaces", choices=("ptb", "none"))  # fmt: skip
    metrics: str | None = arg(None, "comma-separated: bleu1 … bleu4, rouge_l, rouge_l_f1, meteor, cider; default: all")
    bootstrap: int = arg(1000, "resamples of the intervals")


@dataclass
class Summary(Common):
    inputs: list[str] = arg([], "folders of earlier runs; repeatable")
    title: str = arg("Evaluation", "heading of the report")


def begin(cfg):
    """(record, device), after joining the other processes of torchrun."""
    import torch

    from nanodiff import dist, engine
    from nanodiff.models import layers

    for name, least in LEAST.items():
        value = getattr(cfg, name, None)
        if value is not None and value < least:
            raise UserError(f"--{name.replace('_', '-')} must be at least {least}, not {value}")
    if getattr(cfg, "bootstrap", None) == 1:
        raise UserError("--bootstrap 1 has no spread; give 0, or 2 or more")
    if not 0 <= getattr(cfg, "seed", 0) < 1 << 32:
        raise UserError(f"--seed {cfg.seed} must be between 0 and 2^32 - 1")
    device = engine.pick_device(getattr(cfg, "device", "cpu"))
    layers.use_kernels(getattr(cfg, "kernels", "torch"))
    torch.backends.cudnn.allow_tf32 = False  # features are compared with other programs' to four digits
    dist.start(device, cfg.dist_timeout)
    return engine.Record(cfg, device), device


def listed(text):
    return [part.strip() for part in (text or "").split(",") if part.strip()]


def dataset(path, flag, cfg):
    """A Dataset; rank 0 looks, so that all see the same files. Raises UserError where our figures would lie among its pictures."""
    from nanodiff import data, dist

    if Path(path).is_dir() and Path(cfg.output_dir).resolve().is_relative_to(Path(path).resolve()):
        raise UserError(
            f"--output-dir {cfg.output_dir} lies in --{flag} {path}, so the next run would count its figures as pictures"
        )
    return dist.on_main(data.load, path, captions=False)


def finish(record, metrics, make):
    """On rank 0: write the numbers, then make() -> (Report, files) and write it, so that a figure that fails loses no number. Print the
    results, end the record."""
    from nanodiff import dist, report

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


def distinct(names):
    """{name: a part of file names}, no two alike."""
    from nanodiff.images import slug

    found = {}
    for name in dict.fromkeys(names):
        plain = part = slug(name)
        n = 1
        while part in found.values():
            n += 1
            part = f"{plain}_{n}"
        found[name] = part
    return found


# ---------------------------------------------------------------------------------------------------------
# images


def images(cfg):
    from nanodiff import dist, evaluate, report

    wanted = evaluate.wanted(listed(cfg.metrics))
    spaces = tuple(listed(cfg.features)) or ("inception",)
    for space in spaces:
        if space not in evaluate.SPACES:
            raise UserError(f"--features: {printable(space)!r} is none of {', '.join(evaluate.SPACES)}")
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
    record, device = begin(cfg)
    out = record.out
    settings = evaluate.Settings(
        wanted or evaluate.GROUPS, bool(wanted), spaces, cfg.weights_dir, cfg.allow_pickle, cfg.clip, cfg.fid_mode, cfg.fid_dims, cfg.is_network, cfg.nearest_k,
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
    found, sets, told = {}, {}, {}
    reads = given or not wanted or set(wanted) & set(evaluate.NEEDS_PROMPTS)
    for path, name in zip(cfg.generated, names, strict=True):
        sets[name] = dataset(path, "generated", cfg)
        told[name], why = dist.on_main(evaluate.prompts_for, sets[name], given) if reads else (None, "")
        with record.timed("features and metrics"):
            found[name] = evaluate.images(sets[name], settings, real, told[name], name, why)
        for reason in dict.fromkeys(found[name].skipped.values()):
            dist.say(f"note: not computed: {reason}")
    numbers = found[names[0]].metrics
    if len(names) > 1:
        numbers = {f"{name}.{k}": m for name, f in found.items() for k, m in f.metrics.items()}

    def make():
        document = report.Report("Pictures: " + ", ".join(names))
        rows = [["generated", path, len(sets[name])] for path, name in zip(cfg.generated, names, strict=True)]
        document.table(("set", "from", "pictures"), rows + ([["real", cfg.real, len(real)]] if real else []))
        return document, _figures(cfg, out, document, found, sets, real, told)

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


def _figures(cfg, out, document, found, sets, real, told):
    """The body of the report and its figures, on rank 0. Returns the files."""
    from nanodiff import charts, report, weights
    from nanodiff import images as pictures

    files, names, parts = [], list(found), distinct(found)
    for name, prompts in told.items():
        if prompts:
            files.append(out / f"prompts_{parts[name]}.json")
            weights.write_json(files[-1], dict(zip(sets[name].keys, prompts, strict=True)))
    if len(names) > 1:
        document.heading("Over the sets")
        common = [m for m in found[names[0]].metrics if all(m in f.metrics for f in found.values())]
        document.table(("metric", *names), [[m, *(found[n].metrics[m]["value"] for n in names)] for m in common])
        panels = {m: {"": [_band(found[n].metrics[m]) for n in names]} for m in common}
        path = charts.lines(out / "generations.png", names, panels, "set")
        document.picture(path, "Each number over the sets, with its interval where it has one")
        weights.write_json(out / "generations.json", {n: found[n].metrics for n in names})
        report.write_csv(
            out / "generations.csv",
            ("metric", *names),
            [[m, *(found[n].metrics[m]["value"] for n in names)] for m in common],
        )
        files += [p for p in (path, out / "generations.json", out / "generations.csv") if p]
        files.append(_across(out / "across.png", cfg, sets, told))
        document.picture(
            files[-1], "The same pictures in each set, by name where the sets have the same names, else by place"
        )
    for name in names:
        document.heading(f"Numbers of {name}" if len(names) > 1 else "Numbers")
        report.metrics_table(document, found[name].metrics)
        if found[name].skipped:
            document.heading("Not computed")
            document.table(("metric", "why"), found[name].skipped.items())
        shown = [sets[name].image(i) for i in _spread(len(sets[name]), 24)]
        path = out / f"sheet_{parts[name]}.png"
        pictures.save_png(pictures.grid([_small(p) for p in shown], 8), path)
        document.picture(path, f"{name}: {len(shown)} of {len(sets[name])} pictures")
        files.append(path)
        for space, copies in found[name].copies.items():
            path = out / f"nearest_{space}_{parts[name]}.png"
            _nearest_sheet(path, sets[name], real, copies)
            if all(real.captions):  # a caption for each picture, found by its neighbour: `eval.py captions` scores them
                told = {k: real.captions[int(i)] for k, i in zip(sets[name].keys, copies.nearest, strict=True)}
                weights.write_json(path.with_suffix(".json"), told)
                files.append(path.with_suffix(".json"))
            document.picture(path, f"{name}: the generated pictures nearest to a real one by {space} (left), and that one (right); "
                                   "the number is the distance over the real picture's own distance to its nearest neighbour")  # fmt: skip
            files.append(path)
    return files


def _across(path, cfg, sets, told):
    """A sheet: one row a picture, one column a set."""
    from nanodiff import images as pictures

    names, first = list(sets), next(iter(sets.values()))
    if all(set(d.keys) == set(first.keys) for d in sets.values()):
        places = {n: {k: i for i, k in enumerate(d.keys)} for n, d in sets.items()}
        find = lambda n, i: places[n][first.keys[i]]  # noqa: E731
    else:
        find = lambda n, i: i  # noqa: E731
    least = min(map(len, sets.values()))
    chosen = [int(part) for part in listed(cfg.across)] or _spread(least, 8)
    if max(chosen) >= least:
        raise UserError(f"--across {max(chosen)}: the smallest set has {least} pictures, counted from 0")
    cells = [_small(sets[n].image(find(n, i)), 128) for i in chosen for n in names]
    labels = [n if n != names[0] or not told[n] else f"{n}: {told[n][i]}" for i in chosen for n in names]
    pictures.save_png(pictures.grid(cells, len(names), labels, size=14), path)
    return path


def _band(m):
    low, high = m.get("ci") or (m["value"] - m.get("std", 0), m["value"] + m.get("std", 0))
    return m["value"], low, high


def _spread(n, most):
    """Up to `most` positions, evenly spread."""
    k = min(n, most)
    return sorted({round(i * (n - 1) / max(k - 1, 1)) for i in range(k)})


def _small(picture, side=112):
    """For a sheet: enlarged or reduced to one size, not distorted."""
    from PIL import Image, ImageOps

    return ImageOps.pad(picture, (side, side), Image.Resampling.LANCZOS, color="white")


def _nearest_sheet(path, generated, real, copies, shown=8):
    from nanodiff import images as pictures

    order = copies.ratio.argsort(kind="stable")[:shown]
    cells, labels = [], []
    for i in order:
        cells += [_small(generated.image(int(i))), _small(real.image(int(copies.nearest[i])))]
        labels += [f"{copies.ratio[i]:.3g}", ""]
    pictures.save_png(pictures.grid(cells, 8, labels, size=20), path)


def draw(cfg, record, device):
    """Draw the prompts' pictures into OUTPUT_DIR/generated, shared out among the processes; what is there from the same weights and
    settings stays. Returns the folder, and the facts of how they were drawn."""
    import json

    from nanodiff import dist, engine, evaluate, loader, pipeline, samplers
    from nanodiff import images as pictures

    folder = record.out / "generated"
    dist.on_main(engine.out_dir, folder)
    lines = dist.on_main(evaluate.prompts_in, cfg.prompts)
    dtype = engine.pick_dtype(cfg.dtype or "auto", device)
    sd = dist.together(pipeline.load, cfg.model or EMBEDDED, dtype, device).with_scheduler(cfg.scheduler)
    steps = cfg.steps or sd.sampling("steps") or (sd.turbo_steps if sd.turbo else sd.steps)
    scale = cfg.guidance_scale if cfg.guidance_scale is not None else sd.sampling("guidance_scale")
    scale = scale if scale is not None else 0.0 if sd.turbo else 3.0 if cfg.model is None else sd.guidance
    samplers.check_steps(sd.schedule, steps)
    facts = {
        "model": cfg.model or "embedded",
        "steps": steps,
        "guidance_scale": scale,
        "scheduler": samplers.name_of(sd.schedule),
        "dtype": str(dtype).removeprefix("torch."),
        "model_sha256": loader.fingerprint(*(m for m in (sd.net, sd.vae, *sd.encoders) if m is not None)),
    }
    height, width = sd.size
    every = [p for p in lines for _ in range(cfg.num_images or 1)]
    jobs = [(folder / f"{i:05d}.png", facts | {"prompt": p, "seed": (cfg.draw_seed or 0) + i, "width": width, "height": height})
            for i, p in enumerate(every)]  # fmt: skip

    def lacking():
        expected = {path for path, _ in jobs}
        for path in sorted(folder.glob("*.png")):
            if path not in expected:
                raise UserError(f"{path}: is of another run; use another --output-dir")
        return [i for i, (path, of) in enumerate(jobs) if _known(path) != json.loads(json.dumps(of))]

    todo = [jobs[i] for i in dist.on_main(lacking)]
    if len(todo) < len(jobs):
        dist.say(f"{len(jobs) - len(todo)} of {len(jobs)} pictures are there already, from these weights and settings")
    batches = [todo[i : i + cfg.batch_size] for i in range(0, len(todo), cfg.batch_size)]
    mine = batches[dist.world().rank :: dist.world().size]

    def run():
        for batch in dist.progress(mine, len(mine), "drawing (batches)"):
            made = sd.generate(
                [r["prompt"] for _, r in batch],
                None,
                steps,
                scale,
                [r["seed"] for _, r in batch],
                height=height,
                width=width,
            )
            for (path, facts_of), picture in zip(batch, pictures.to_pil(made.pixels), strict=True):
                pictures.save_png(picture, path.with_suffix(".part"), facts_of)
                path.with_suffix(".part").replace(path)

    dist.together(run)
    return folder, {"drawn_with": facts}


def _known(path):
    """The record inside a PNG of ours that is there, or None."""
    from nanodiff import images as pictures

    try:
        return pictures.recorded(path) if path.is_file() else None
    except UserError:  # no picture at all: drawn again
        return None


# ---------------------------------------------------------------------------------------------------------
# compare


def compare(cfg):
    from nanodiff import dist, evaluate, features, report, similarity

    paths = {n: getattr(cfg, n) for n in ("a", "b", "original", "finetuned", "teacher") if getattr(cfg, n)}
    if set(paths) == {"a", "b"}:
        pairings = [("a", "b")]
    elif {"original", "finetuned"} <= set(paths) <= {"original", "finetuned", "teacher"}:
        pairings = [p for p in PAIRINGS if set(p) <= set(paths)]
    else:
        raise UserError("give --a and --b, or --original and --finetuned (and --teacher)")
    known = (*similarity.NAMES, *OF_SETS)
    names = listed(cfg.metrics) or [*known]
    for name in names:
        if name not in known:
            raise UserError(f"--metrics: {printable(name)!r} is none of {', '.join(known)}")
    record, device = begin(cfg)
    folders = {label: dataset(path, label, cfg) for label, path in paths.items()}
    settings = evaluate.Settings(
        tuple(n for n in OF_SETS if n in names), bool(cfg.metrics), ("inception",), cfg.weights_dir, cfg.allow_pickle, cfg.clip,
        cfg.fid_mode, seed=cfg.seed, batch_size=cfg.batch_size, workers=cfg.num_workers, device=device,
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
        found, resized = evaluate.pairs(folders, pairings, settings, names, loss)
    metrics = evaluate.pair_metrics(found, facts, resized, cfg.seed)
    for name in (n for n in similarity.LEAST if n in found[0].numbers["_vs_".join(pairings[0])]):
        if not any(k.split(".")[-1] == name for k in metrics):
            skipped[name] = f"{name}: the pictures are smaller than {similarity.LEAST[name]} pixels"
            if cfg.metrics:
                raise UserError(skipped[name])
            dist.say(f"note: not computed: {skipped[name]}")
    with record.timed("sets"):
        whole, missing = evaluate.of_sets(folders, pairings, settings, cfg.prompts)
    for reason in dict.fromkeys(missing.values()):
        dist.say(f"note: not computed: {reason}")
    metrics, skipped = metrics | whole, skipped | missing

    def make():
        document = report.Report("Pictures compared: " + ", ".join(f"{a} and {b}" for a, b in pairings))
        return document, _comparison(cfg, record.out, document, found, folders, pairings, metrics, skipped)

    finish(record, metrics, make)


def _comparison(cfg, out, document, found, folders, pairings, metrics, skipped):
    """The report, the figures and the documents' files of a comparison, on rank 0. Returns the files."""
    from nanodiff import evaluate, report

    document.text(CANNOT)
    document.text(f"{len(found)} pictures in {len({p.category for p in found})} categories.")
    files = write_pairs(out / "metrics", found)
    drawn = figures_of(cfg.panels, out, document, found, folders, pairings, metrics)
    files += drawn
    if len(pairings) == 3:
        document.heading("Nearer to the teacher?")
        names = list(found[0].numbers["original_vs_teacher"])
        tests = evaluate.significance(found, "original_vs_teacher", "finetuned_vs_teacher", names, cfg.seed)
        header = ("metric", "pairs", "mean difference", "low", "high", "t", "p (t)", "p (t, Holm)", "p (Wilcoxon)", "p (Wilcoxon, Holm)",
                  "Cohen's d", "finetuned is")  # fmt: skip
        lines = [
            [n, c.test.n, c.test.mean, c.test.low, c.test.high, c.test.t, c.test.p_t, c.p_t, c.test.p_wilcoxon, c.p_wilcoxon, c.test.d, NEARER[c.nearer]]
            for n, c in tests.items()
        ]  # fmt: skip
        document.text("The finetuned pictures' number against the teacher, less the original's, over the same pictures (of the sharpness "
                      "ratio: its distance from 1, as |log|); low and high: 95 % bootstrap interval. A pair where one number is infinite "
                      "does not count.")  # fmt: skip
        document.table(header, lines)
        report.write_csv(out / "metrics" / "significance.csv", header, lines)
        files.append(out / "metrics" / "significance.csv")
        files += research(cfg, out / "research_paper_materials", tests, metrics, drawn)
    document.heading("Numbers")
    report.metrics_table(document, metrics)
    if skipped:
        document.heading("Not computed")
        document.table(("metric", "why"), skipped.items())
    return files


def research(cfg, folder, tests, metrics, drawn):
    """research_summary.md: settings, findings in sentences, numbers, and the key figures copied beside it. Returns the files."""
    import shutil

    from nanodiff import engine, report
    from nanodiff.weights import write_bytes

    document, files = report.Report("Summary of the comparison"), [engine.out_dir(folder) / "research_summary.md"]
    document.heading("Settings")
    document.table(("setting", "value"), [[k, str(v)] for k, v in engine.as_dict(cfg).items() if v is not None])
    document.heading("Findings")
    for name, (t, p, _, nearer) in tests.items():
        before, after = (metrics[f"{k}_vs_teacher.{name}"]["value"] for k in ("original", "finetuned"))
        document.text(
            f"{name.replace('_', ' ')} against the teacher: {report.shown(before)} before, {report.shown(after)} after: {NEARER[nearer]}; mean "
            f"difference {t.mean:+.3g} (95 % interval {t.low:.3g} to {t.high:.3g}, d = {t.d:.2f}), "
            + (f"significant at 5 % (Holm's p = {p:.2g})." if p < 0.05 else f"not significant (Holm's p = {p:.2g}).")
        )
    document.text(CANNOT)
    document.heading("The sets as wholes")
    document.table(
        ("metric", "value", "n"), [[k, m["value"], m["n"]] for k, m in metrics.items() if k.split(".")[1] in OF_SETS]
    )
    document.heading("Figures")
    for path in [p for p in drawn if p.name in KEY_FIGURES] + [
        p for p in drawn if p.name.startswith("comparison_all_")
    ][:3]:
        files.append(shutil.copy(path, folder / path.name))
        document.picture(files[-1], path.stem.replace("_", " "))
    write_bytes(files[0], document.markdown(folder).encode("utf-8", "replace"))
    return files


def write_pairs(folder, found):
    """metrics_{category}_{i}.json and .csv of each picture, category_averages.json, overall_metrics.json. Returns the files."""
    import json

    from nanodiff import engine, evaluate, report, weights

    engine.out_dir(folder)
    files, counts, parts = [], {}, distinct(p.category for p in found)
    columns = [n for n in TITLES if n in next(iter(found[0].numbers.values()))]
    for pair in found:
        i = counts[pair.category] = counts.get(pair.category, -1) + 1
        stem = folder / f"metrics_{parts[pair.category]}_{i}"
        text = json.dumps({"name": pair.name} | _finite(pair.numbers), indent=2)
        stem.with_suffix(".json").write_text(
            text + "\n", encoding="utf-8"
        )  # not through the disk one by one: there may be thousands
        lines = [[k.replace("_", " "), *(v[c] for c in columns)] for k, v in pair.numbers.items()]
        report.write_csv(stem.with_suffix(".csv"), ("Comparison", *(TITLES[c] for c in columns)), lines)
        files += [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    categories = list(counts)
    weights.write_json(folder / "category_averages.json", {c: evaluate.average(found, c) for c in categories})
    weights.write_json(folder / "overall_metrics.json", evaluate.average(found))
    return [*files, folder / "category_averages.json", folder / "overall_metrics.json"]


def _finite(numbers):
    import math

    return {
        k: {n: v if v is None or math.isfinite(v) else str(v) for n, v in row.items()} for k, row in numbers.items()
    }


def figures_of(panels, out, document, found, folders, pairings, metrics):
    """Panels, difference maps, radar, bars, improvement; each into the report. Returns the files."""
    import numpy as np
    from PIL import Image

    from nanodiff import charts, engine, evaluate
    from nanodiff import images as pictures

    look, side = engine.out_dir(out / "visualization"), engine.out_dir(out / "comparison_output")
    _, sets = evaluate.matched(folders)
    files, counts, chosen = [], {}, set(_spread(len(found), panels) if panels else ())
    parts = distinct(p.category for p in found)
    labels = [k for k in ("a", "b", "original", "finetuned", "teacher") if k in folders]
    document.heading("Pictures")
    for k, pair in enumerate(found):
        i = counts[pair.category] = counts.get(pair.category, -1) + 1
        if k not in chosen:
            continue
        shown = {n: sets[n].image(k) for n in labels}
        name = f"{parts[pair.category]}_{i}"
        path = side / f"comparison_all_{name}.png"
        pictures.save_png(pictures.grid([_small(p, 256) for p in shown.values()], len(labels), labels, size=20), path)
        document.picture(path, f"{pair.name}: {', '.join(labels)}")
        files.append(path)
        for a, b in pairings:
            least = min(shown[a].size, shown[b].size, key=lambda s: s[0] * s[1])
            x, y = (np.asarray(shown[n].resize(least, Image.Resampling.LANCZOS)) for n in (a, b))
            path = charts.difference(
                look / f"difference_{a}_vs_{b}_{name}.png", x, y, (a, b), pair.numbers[f"{a}_vs_{b}"]
            )
            if path:
                files.append(path)
                document.picture(path if len(chosen) <= 3 or k == min(chosen) else None, f"{pair.name}: {a} and {b}")
    document.heading("Figures")
    means, categories = evaluate.average(found), sorted(counts)
    radar = {f"{a} and {b}": [_unit(n, means[f"{a}_vs_{b}"].get(n)) for n in RADAR] for a, b in pairings}
    if all(n in means[f"{a}_vs_{b}"] for n in RADAR for a, b in pairings):
        axes = [TITLES[n].replace(" Similarity", "") if n != "mse" else "inverted MSE" for n in RADAR]
        path = charts.radar(look / "radar_chart.png", axes, radar)
        document.picture(path, "Means over all pictures; inverted MSE is max(0, 1 - MSE / 10000)")
        files.append(path)
    by_category = {c: evaluate.average(found, c) for c in categories}
    for name, mean in means[f"{pairings[0][0]}_vs_{pairings[0][1]}"].items():
        if mean is None:
            continue
        series = {f"{a} and {b}": [by_category[c][f"{a}_vs_{b}"][name] for c in categories] for a, b in pairings}
        path = charts.bars(look / f"{name}_comparison.png", categories, series, name.replace("_", " "))
        document.picture(path, f"{name.replace('_', ' ')} by category")
        files.append(path)
    if len(pairings) == 3:
        for k in means:
            means[k] |= {n: metrics[f"{k}.{n}"]["value"] for n in ("fid",) if f"{k}.{n}" in metrics}
        files += _improvement(look, document, means)
    return [f for f in files if f]


def _unit(name, value):
    """A number on the radar's axis from 0 to 1."""
    if value is None:
        return 0.0
    return min(max(1 - value / 10000 if name == "mse" else value, 0.0), 1.0)


def _improvement(look, document, means):
    """By how much the finetuned pictures are nearer to the teacher than the original ones: (ft - orig) / orig, the other way round where
    less is nearer."""
    from nanodiff import charts, similarity

    before, after, rows = means["original_vs_teacher"], means["finetuned_vs_teacher"], []
    for name, direction in (similarity.HIGHER_IS_NEARER | {"fid": False}).items():
        if direction is None or not before.get(name) or after.get(name) is None:
            continue
        change = 100 * (after[name] - before[name]) / abs(before[name])
        rows.append((name.replace("_", " "), before[name], after[name], change if direction else -change))
    if not rows:
        return []
    document.heading("Change towards the teacher")
    document.table(("metric", "original", "finetuned", "nearer by %"), rows)
    chart = charts.bars(
        look / "improvement_percentage_chart.png",
        [r[0] for r in rows],
        {"": [r[3] for r in rows]},
        "nearer to the teacher",
        "%",
    )
    table = charts.table(look / "improvement_table.png", ("metric", "original", "finetuned", "nearer by"),
                         [(n, f"{a:.4g}", f"{b:.4g}", f"{c:+.1f} %") for n, a, b, c in rows])  # fmt: skip
    document.picture(
        chart, "Per cent by which the finetuned pictures' mean is nearer to the teacher's; see the note above"
    )
    return [chart, table]


# ---------------------------------------------------------------------------------------------------------
# captions, report


def captions(cfg):
    from nanodiff import charts, dist, evaluate, report, textmetrics

    for flag in ("candidates", "references"):
        if getattr(cfg, flag) is None:
            raise UserError(f"--{flag} FILE is required")
    record, _ = begin(cfg)
    mine, theirs = (dist.on_main(textmetrics.read, path) for path in (cfg.candidates, cfg.references))
    names = tuple(listed(cfg.metrics))
    if not names and len(mine) == 1:
        dist.say("note: not computed: cider weighs words by how few pictures have them, and here is one picture")
        names = tuple(n for n in textmetrics.NAMES if n != "cider")
    with record.timed("scores"):
        found = dist.on_main(
            evaluate.captions, mine, theirs, cfg.tokenize, names or textmetrics.NAMES, cfg.bootstrap, cfg.seed
        )
    metrics, ids, scores = found

    def make():
        document = report.Report("Captions")
        document.text(f"{len(ids)} captions of {printable(cfg.candidates)} against {printable(cfg.references)}. Corpus BLEU and the mean of "
                      "single captions' BLEU are different numbers; METEOR is without synonyms.")  # fmt: skip
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
    from nanodiff import charts, dist, report

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
            document.text(CANNOT)
        document.heading("Side by side")
        document.table(
            ("metric", *names), [[m, *(f[m]["value"] if m in f else None for f in found.values())] for m in every]
        )
        drawable = lambda f, m: m in f and not isinstance(f[m]["value"], str)  # noqa: E731
        common = [m for m in every if sum(drawable(f, m) for f in found.values()) > 1]
        if common:
            nothing = (float("nan"),) * 3
            panels = {m: {"": [_band(f[m]) if drawable(f, m) else nothing for f in found.values()]} for m in common}
            chart = charts.lines(record.out / "runs.png", names, panels, "run")
            document.picture(chart, "Numbers that more than one run has")
            files += [chart] if chart else []
        for name, f in found.items():
            document.heading(name)
            report.metrics_table(document, f)
        return document, files

    finish(record, metrics, make)


STAGES = {
    "images": (Images, images),
    "compare": (Compare, compare),
    "captions": (Captions, captions),
    "report": (Summary, summary),
}

if __name__ == "__main__":
    sys.exit(script(STAGES, __doc__, less_memory=LESS_MEMORY))
