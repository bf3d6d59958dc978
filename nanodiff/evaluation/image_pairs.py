"""Pairs of pictures of the same names: before and after, and a teacher; the paired tests of what changed."""

import collections
import concurrent.futures
import sys
from dataclasses import replace
from typing import NamedTuple

import numpy as np
import torch

from nanodiff.config import UserError, printable
from nanodiff.device import dist
from nanodiff.device.memory import keep_freed_memory
from nanodiff.evaluation import similarity
from nanodiff.evaluation.image_sets import images, prompts_for
from nanodiff.output import report
from nanodiff.output.images import Image, bare, to_pixels


class Pair(NamedTuple):
    """One picture in all folders: its name, its category, and {pairing: {metric: number}}."""

    name: str
    category: str
    numbers: dict


def matched(folders):
    """(names, {label: Dataset in that order}) of folders with the same names of pictures. Raises UserError naming what differs."""
    sets = {label: {bare(k): i for i, k in enumerate(d.keys)} for label, d in folders.items()}
    labels = list(sets)
    for label, known in sets.items():
        if len(known) != len(folders[label]):
            raise UserError(f"{folders[label].root}: two pictures have the same name but for the suffix")
        for other in labels:
            missing = sorted(set(known) - set(sets[other]))
            if missing:
                some = ", ".join(map(printable, missing[:5]))
                raise UserError(
                    f"{folders[other].root} ({len(sets[other])} pictures) lacks {len(missing)} of {folders[label].root} ({len(known)}), such as {some}"
                )
    names = sorted(sets[labels[0]])
    return names, {label: d.subset([sets[label][n] for n in names]) for label, d in folders.items()}


def pairs(folders, pairings, settings, names=similarity.NAMES, loss=None):
    """([Pair], {pairing: pairs of different sizes}) of matched data sets. pairings: [(label, label)]; loss: LPIPS, or None without. The
    larger of two pictures of different sizes is brought to the smaller (Lanczos), which is said."""
    order, sets = matched(folders)
    keep_freed_memory()

    def one(i):
        pictures = {label: d.image(i) for label, d in sets.items()}
        facts, numbers, uneven = {}, {}, []
        for a, b in pairings:
            size = min(pictures[a].size, pictures[b].size, key=lambda s: s[0] * s[1])
            for k in (a, b):
                if (k, size) not in facts:
                    same = pictures[k].size == size
                    picture = pictures[k] if same else pictures[k].resize(size, Image.Resampling.LANCZOS)
                    facts[k, size] = similarity.Facts(np.asarray(picture))
            if pictures[a].size != pictures[b].size:
                uneven.append(f"{a}_vs_{b}")
            x, y = facts[a, size], facts[b, size]
            numbers[f"{a}_vs_{b}"] = similarity.compare(x, y, names)
            if loss is not None and min(size) >= similarity.LEAST["lpips"]:
                with torch.inference_mode():
                    distance = loss(*(to_pixels(z.image)[None].to(settings.device) for z in (x, y)))
                    numbers[f"{a}_vs_{b}"]["lpips"] = float(distance)
            elif loss is not None:
                numbers[f"{a}_vs_{b}"]["lpips"] = None
        category = order[i].split("/")[0] if "/" in order[i] else "all"
        return Pair(order[i], category, numbers), uneven

    rank, size = dist.world().rank, dist.world().size
    mine = list(range(len(order)))[rank::size]

    def run():
        before = sys.getswitchinterval()
        # a thread that comes back from Pillow or NumPy need not wait 5 ms for Python's lock: a third less time
        sys.setswitchinterval(1e-4)
        try:
            with concurrent.futures.ThreadPoolExecutor(max(settings.workers, 1)) as pool:
                return list(dist.progress(pool.map(one, mine), len(mine), "pairs"))
        finally:
            sys.setswitchinterval(before)

    parts = dist.gathered(dist.together(run))
    found = [parts[i % size][i // size] for i in range(len(order))]
    resized = collections.Counter(pairing for _, uneven in found for pairing in uneven)
    for pairing, n in resized.items():
        dist.say(
            f"note: {pairing}: {n} pairs differ in size; the larger picture was brought to the smaller one (Lanczos)"
        )
    return [pair for pair, _ in found], resized


def average(found, category=None):
    """{pairing: {metric: mean of the finite numbers, or None}} of Pairs."""
    chosen = [p for p in found if category in (None, p.category)]
    out = {}
    for pairing, first in chosen[0].numbers.items():
        out[pairing] = {}
        for name in first:
            values = [p.numbers[pairing][name] for p in chosen]
            finite = [v for v in values if v is not None and np.isfinite(v)]
            out[pairing][name] = float(np.mean(finite)) if finite else None
    return out


def shared(found, before, after):
    """{metric: (mean of the pairing `before`, of `after`)} over the same pictures of Pairs: those whose number is finite in both, as in significance()."""
    out = {}
    for name in found[0].numbers[before]:
        both = [(p.numbers[before][name], p.numbers[after].get(name)) for p in found]
        if finite := [pair for pair in both if None not in pair and np.isfinite(pair).all()]:
            out[name] = tuple(np.mean(finite, axis=0).tolist())
    return out


def pair_metrics(found, provenance, resized, seed=0):
    """{metric or pairing.metric: entry} over all Pairs, with bootstrap intervals of the means. provenance: the facts of LPIPS."""
    out = {}
    for pairing in found[0].numbers:
        prefix = "" if len(found[0].numbers) == 1 else f"{pairing}."
        for name in found[0].numbers[pairing]:
            values = np.array([p.numbers[pairing][name] for p in found], dtype=np.float64)  # None becomes NaN
            finite = values[np.isfinite(values)]
            if len(finite):
                ci = report.interval(finite, seed) if len(finite) > 1 else None
                more = {"infinite": int(np.isinf(values).sum())} if np.isinf(values).any() else {}
                drawn = {"bootstrap": report.RESAMPLES, "seed": seed} if ci else {}
                facts = report.provenance(
                    **(provenance if name == "lpips" else {}), **_pixels(pairing, resized), **drawn, **more
                )
                out[prefix + name] = report.entry(finite.mean(), len(finite), facts, finite.std(), ci)
            elif np.isinf(values).any():
                facts = report.provenance(**_pixels(pairing, resized), note="infinite for all pairs")
                out[prefix + name] = report.entry(np.inf, len(values), facts)
    return out


def of_sets(folders, pairings, settings, prompts=None):
    """({pairing.fid, label.clip_score…: entry}, {metric: reason}) of folders with the same names, each taken as a set: what pairs cannot say.

    prompts: file, or None: the captions beside one of the folders' pictures."""
    order, sets = matched(folders)
    metrics_of, skipped = {}, {}
    if "fid" in settings.groups:
        for a, b in pairings:
            found = images(sets[a], replace(settings, groups=("fid",)), real=sets[b], what=a)
            metrics_of |= {("" if len(pairings) == 1 else f"{a}_vs_{b}.") + k: v for k, v in found.metrics.items()}
            skipped |= found.skipped
    if "clip_score" in settings.groups:
        candidates = []
        for d in folders.values():  # as they are listed: a file's lines stand for the pictures in that order
            texts, why = dist.on_main(prompts_for, d, prompts)
            at = {bare(k): i for i, k in enumerate(d.keys)}
            candidates.append(([texts[at[name]] for name in order] if texts else None, why))
        texts = next((t for t, _ in candidates if t), None)
        for label, pictures in sets.items():
            found = images(pictures, replace(settings, groups=("clip_score",)), None, texts, label, candidates[0][1])
            metrics_of |= {f"{label}.{k}": v for k, v in found.metrics.items()}
            skipped |= found.skipped
    return metrics_of, skipped


def _pixels(pairing, resized):
    """Facts of numbers of pairs."""
    n = resized[pairing]
    return {"pictures": "uint8 RGB", "resized": f"{n} pairs to the smaller picture (Lanczos)" if n else "none"}


class Change(NamedTuple):
    """What a metric says of a change: the test of after - before, corrected p values, and whether after is nearer (None: the same)."""

    test: report.Paired
    p_t: float  # after Holm
    p_wilcoxon: float  # after Holm
    nearer: bool | None


def significance(found, before, after, names, seed=0):
    """{metric: Change} of two pairings' numbers over the same pictures. Of sharpness_ratio the distance from 1 counts: |log ratio|."""
    tests = {}
    for name in names:
        a, b = ([p.numbers[k].get(name) for p in found] for k in (before, after))
        if any(v is None for v in (*a, *b)):
            continue
        if name == "sharpness_ratio":
            with np.errstate(divide="ignore"):
                a, b = np.abs(np.log(a)), np.abs(np.log(b))
        if test := report.paired(a, b, seed):
            tests[name] = test
    p_t, p_w = (report.holm([getattr(t, k) for t in tests.values()]) for k in ("p_t", "p_wilcoxon"))
    out = {}
    for (name, test), pt, pw in zip(tests.items(), p_t, p_w, strict=True):
        up = bool(similarity.HIGHER_IS_NEARER[name])
        out[name] = Change(test, pt, pw, None if test.mean == 0 else (test.mean > 0) == up)
    return out
