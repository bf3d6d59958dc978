"""What both training loops of train.py do before, beside and after: data, validation, the figures at the end."""

import math
import re

import numpy as np
import torch

from nanodiff import data
from nanodiff.commandline import flagged
from nanodiff.config import UserError, among_pictures
from nanodiff.device import dist
from nanodiff.output import charts, images
from nanodiff.training import loader
from nanodiff.weights import hub


def spread(dataset, n):
    """Up to n positions, evenly spread over a data set (which may be sorted by class)."""
    return [round(i * (len(dataset) - 1) / max(min(n, len(dataset)) - 1, 1)) for i in range(min(n, len(dataset)))]


def advice_loss(run):
    """A word when the loss of the whole run, whatever it was resumed from, did not fall by more than its noise."""
    dist.on_main(_advice_loss, run)


def _advice_loss(run, least=8):
    log = run.out / "metrics.jsonl"
    rows = charts.logged(log) if log.exists() else []
    losses = np.array([r["loss"] for r in rows if math.isfinite(r.get("loss", math.nan))])
    part = len(losses) // 4
    if part < least or run.step < 100:
        return
    first, last = losses[:part], losses[-part:]
    noise = math.sqrt((first.var(ddof=1) + last.var(ddof=1)) / part)  # of the difference of the two means
    if last.mean() > 0.98 * first.mean() and first.mean() - last.mean() < 2 * noise:
        dist.say(
            f"note: the loss is not decreasing ({first.mean():.4g} in the first quarter, {last.mean():.4g} in the last, give or take "
            f"{noise:.2g}): try twice or half the learning rate, more epochs, and look at the data (python -m nanodiff.data check PATH)"
        )


def load_data(cfg, captions):
    """(training set, held-out set or None), listed by rank 0 for all."""
    if wrong := among_pictures(cfg.data, "data", cfg.output_dir):
        dist.say(f"warning: {flagged(wrong)}")
    dataset = dist.on_main(
        data.load, cfg.data, captions, cfg.image_column, cfg.caption_column, cfg.on_bad_image == "skip"
    )
    if cfg.max_samples and cfg.max_samples < len(dataset):
        dataset = dataset.subset(range(cfg.max_samples))
    dist.say(f"data: {len(dataset)} pictures, {len({t for group in dataset.texts for t in group})} different captions")
    if not cfg.validation:
        return dataset, None
    # by each picture's own name, so that pictures that come or go leave the others where they are
    order = np.argsort([loader.content(cfg.seed, "held out", key) for key in dataset.keys])
    n = max(1, round(cfg.validation * len(dataset)))
    if n >= len(dataset):
        raise UserError(f"--validation {cfg.validation:g} leaves none of {len(dataset)} pictures to train on")
    return dataset.subset(sorted(order[n:])), dataset.subset(sorted(order[:n]))


def say_unjudged(cfg, run):
    """A word on options that look at a model at the end of an epoch, of which this run has none."""
    idle = [n for n in ("validation", "keep_best") if getattr(cfg, n)]
    if run.total < run.per_epoch and idle:
        dist.say(f"note: {run.total} updates are less than an epoch ({run.per_epoch}), at whose end the model is judged: "
                 f"{', '.join('--' + n.replace('_', '-') for n in idle)} will do nothing")  # fmt: skip


def make_feed(cfg, dataset, training=True, multiple=1, check=None, tells=False):
    """The loader of the training set, or of the held-out one, whose pictures are never changed and come in order. check(height, width): raises
    UserError for a size that the model cannot have. tells: is the model told sizes and crops (SDXL)?"""
    change = training and not getattr(cfg, "dry_run", False)
    transform = loader.Transform(
        cfg.resolution, cfg.center_crop or not change, cfg.random_flip and change, cfg.random_jitter * change,
        cfg.random_rotate * change, cfg.interpolation,
    )  # fmt: skip
    buckets = (
        loader.aspect_buckets(dataset, cfg.resolution, max(multiple, 8))
        if getattr(cfg, "aspect_buckets", False)
        else None
    )
    for width, height in buckets or () if check else ():
        check(height, width, "sides of `aspect_buckets`")
    feed = loader.Feed(dataset, transform, cfg.seed, cfg.batch_size, cfg.grad_accum, cfg.num_workers if training else 0,
                       cfg.on_bad_image, cfg.bad_image_limit, buckets, timeout=cfg.dist_timeout)  # fmt: skip
    feed.decoder.tells = tells
    if training and feed.plan.group > len(dataset):
        dist.say(
            f"note: {len(dataset)} pictures are fewer than the {feed.plan.group} of an update: each update sees them all"
        )
    return feed


def validate(run, feed, loss_of):
    """Mean loss over the held-out pictures with the averaged weights; the same draws every time."""
    total = 0.0
    with run.averaged():
        for step in range(feed.per_epoch):
            for batch in feed.update(step):
                with run.autocast(), torch.no_grad():
                    total += loss_of(batch).item() * batch.count
    feed.report_bad(run.out, "bad_images_held_out.jsonl")
    return dist.total([total], run.device)[0] / len(feed.dataset)


def say_size(net, what):
    trained = sum(p.numel() for p in net.parameters() if p.requires_grad)
    frozen = sum(p.numel() for p in net.parameters()) - trained
    dist.say(
        f"{what}: {trained / 1e6:.2f} M parameters to train" + (f", {frozen / 1e6:.2f} M frozen" if frozen else "")
    )


def finish(run, cfg, panels, name, then):
    """What people look at after a run: the loss figure, the sample sheets as one moving picture, and a line that says what came of it.
    then: the next command to type."""

    def figures():
        if (run.out / "metrics.jsonl").exists() and charts.losses(run.out / "metrics.jsonl", run.out / name, panels,
                                                                 target=getattr(cfg, "kl_target", None)):  # fmt: skip
            run.record.file(run.out / name)
        sheets = sorted(
            (p for p in (run.out / "samples").glob("*[0-9].png")), key=lambda p: int(re.search(r"\d+$", p.stem)[0])
        )
        if len(sheets) > 1:
            images.save_gif([images.open_image(p) for p in sheets], run.out / "samples" / "progress.gif")
            run.record.file(run.out / "samples" / "progress.gif")

    dist.on_main(figures)
    run.close()
    if dist.is_main():
        loss = f"last loss {run.numbers['loss']:.4g}; " if run.numbers else ""
        print(f"{loss}the model: {run.out / 'model'}\nnext: {then}")
    if cfg.push_to_hub and dist.is_main():
        print(
            hub.push(run.out / "model", cfg.hub_model_id or run.out.resolve().name, cfg.hub_token, cfg.hub_private_repo)
        )
