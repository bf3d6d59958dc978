"""Whole evaluations: a set of pictures against another, pairs of pictures, captions; numbers with their provenance.

    found = images(generated, Settings(weights_dir="weights"), real=real, prompts=prompts)
    found.metrics["fid"]          # {"value", "ci", "n", "provenance"}
    found.skipped                 # {"clip_score": "why it could not be computed"}

The scripts make the pictures and write the reports; what is computed here is the same for all of them, and for any number of
processes: features are shared out, and every process ends with the same numbers.
"""

import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch

from nanodiff.config import UserError, nearest, printable
from nanodiff.data import caption_files, tables
from nanodiff.device import dist
from nanodiff.evaluation import features, metrics
from nanodiff.output import report
from nanodiff.output.images import bare, recorded

GROUPS = ("fid", "kid", "is", "prdc", "memorisation", "diversity", "clip_score", "clip_fid", "modality_gap", "colours")
MEMBERS = dict.fromkeys(("precision", "recall", "density", "coverage"), "prdc")  # may be asked for alone
NEEDS_REAL = ("fid", "kid", "prdc", "memorisation", "clip_fid")
NEEDS_PROMPTS = ("clip_score", "modality_gap")
OF_FEATURES = ("fid", "kid", "prdc", "memorisation", "diversity")
SPACES = ("inception", "clip", "pixels")
RESAMPLES = 20  # for FID's interval
# what says how many pictures are needed
FEWER = {"is": " (a number of `is_splits`)", "prdc": " (one more than `nearest_k`)"}


@dataclass
class Settings:
    """How numbers are made. See eval.py's options."""

    groups: tuple = GROUPS
    must: bool = False  # what cannot be computed is an error, not left out
    spaces: tuple = ("inception",)  # of SPACES: features for fid, kid, prdc, memorisation, diversity
    weights_dir: str | None = None
    allow_pickle: bool = False
    clip: str = features.CLIPS[0]
    fid_mode: str = features.MODES[0]
    tap: int = 2048
    is_network: str = "fid"
    nearest_k: int = 5
    kid_subsets: int = 100
    kid_size: int = 1000
    splits: int = 10
    bootstrap: int | None = None  # None: RESAMPLES below metrics.FEW pictures, else none
    seed: int = metrics.SEED
    cache: str | None = None
    batch_size: int = features.BATCH
    workers: int = 2
    device: object = "cpu"
    about: dict = field(default_factory=dict)  # facts of the generated pictures, such as the model that drew them
    networks: dict = field(default_factory=dict)  # loaded so far, by name


class Found(NamedTuple):
    """metrics: {name: entry}; skipped: {name: reason}; copies: {space: metrics.Copies} for figures."""

    metrics: dict
    skipped: dict
    copies: dict


def wanted(names):
    """The groups of a comma-separated list, checked. Raises UserError for an unknown one."""
    found = []
    for name in names:
        group = MEMBERS.get(name, name)
        if group not in GROUPS:
            raise UserError(
                f"`metrics`: {printable(name)!r} is unknown{nearest(name, [*GROUPS, *MEMBERS])} (known: {', '.join(GROUPS)})"
            )
        found.append(group)
    return tuple(dict.fromkeys(found))


def spaces_of(names):
    """`names`, checked to be of SPACES. Raises UserError for an unknown one."""
    if unknown := [n for n in names if n not in SPACES]:
        raise UserError(f"`features`: {printable(unknown[0])!r} is none of {', '.join(SPACES)}")
    return names


def network(settings, name):
    """The Network of a name of SPACES, or "is"; loaded once. Raises features.Absent without its weights."""
    if name not in settings.networks:
        s = settings
        if name == "pixels":
            made = features.colour_pixels()
        elif name == "clip":
            made = features.clip(clip_path(s), s.device)
        elif name not in ("inception", "is"):
            raise ValueError(f"unknown space {name!r}")
        else:
            variant, tap = (s.is_network, 2048) if name == "is" else ("fid", s.tap)
            same = "inception" if name == "is" else "is"
            if (
                variant == "fid"
                and tap == 2048
                and same in s.networks
                and s.networks[same].name == "inception-fid-2048"
            ):
                made = s.networks[same]
            else:
                made = features.inception(s.weights_dir, s.fid_mode, s.device, tap, variant, s.allow_pickle)
        s.networks[name] = made
    return settings.networks[name]


def clip_path(settings):
    """Where the CLIP is: as --clip says, or in --weights-dir under that name, or on the Hub (downloaded when a metric that needs it was asked
    for by name). Raises features.Absent when it is nowhere."""
    name = settings.clip
    if Path(name).expanduser().exists():
        return name
    inside = Path(settings.weights_dir or ".") / name
    if settings.weights_dir and "/" not in name and (inside / "config.json").is_file():
        return inside
    name = f"openai/{name}" if name in features.CLIPS else name
    try:
        dist.on_main(features.hub.whole, name, cached=not settings.must)
    except UserError as e:
        raise features.Absent(f"CLIP: {e}, or put the folder into `weights_dir`") from None
    return name


def images(generated, settings, real=None, prompts=None, what="generated", silent="needs the prompts (--prompts)"):
    """Found of a data set of pictures. What cannot be computed is skipped, with its reason, or raises UserError if it must be.

    silent: why there are no prompts."""
    s, found = settings, Found({}, {}, {})
    for group in s.groups:
        reason = None
        if group in NEEDS_REAL and real is None:
            reason = "needs real pictures (--real)"
        elif group in NEEDS_PROMPTS and prompts is None:
            reason = silent
        spaces = s.spaces if group in OF_FEATURES else (None,)
        for space in spaces:
            name = f"{space}_{group}" if space not in (None, "inception") else group
            try:
                if reason:
                    raise features.Absent(f"{group} {reason}")
                _group(group, space, generated, real, prompts, s, found, what)
            except (features.Absent, metrics.TooFew) as e:
                why = f"{name}: {e}{FEWER.get(group, '')}" if isinstance(e, metrics.TooFew) else str(e)
                if s.must:
                    raise UserError(why) from None
                found.skipped[name] = why
    settings.networks["rows"] = {
        k: v for k, v in settings.networks.get("rows", {}).items() if k[1:] != _named(generated)
    }
    return found


def _named(dataset):
    return dataset.fingerprint(), dataset.weight(), dataset.root


def _group(group, space, generated, real, prompts, s, found, what):
    """Add one group's numbers to `found`."""
    if group == "colours":
        return _colours(generated, s, found)
    name = space or ("is" if group == "is" else "clip")
    net = network(s, name)
    prefix = f"{space}_" if space not in (None, "inception") else ""
    facts = (
        net.facts
        | s.about
        | {
            "n_generated": len(generated),
            "n_real": len(real) if real is not None and group in NEEDS_REAL else None,
        }
    )

    def put(name, value, std=None, ci=None, **more):
        found.metrics[prefix + name] = report.entry(value, len(generated), report.provenance(**facts, **more), std, ci)

    if group == "fid" and s.cache is None and not _resamples(s, generated, real) and len(s.groups) == 1:
        _warn(group, len(generated), len(real))
        a, b = (moments(net, d, s) for d in (real, generated))  # nothing else needs the features themselves
        return put("fid", metrics.frechet(a, b))
    g = _rows(net, generated, s, what)
    r = _rows(net, real, s, "real") if facts["n_real"] is not None else None
    if group in ("fid", "clip_fid"):
        return _fid(group, r, g, s, put)
    if group in (
        "kid",
        "is",
    ):
        # subsets and splits are drawn by position: in the order of names, as other programs read folders
        g, r = _by_name(g, generated), _by_name(r, real)
    if group == "kid":
        value, size = metrics.kid(r, g, s.kid_subsets, s.kid_size, s.seed)
        if size < s.kid_size:
            dist.say(f"note: KID with subsets of {size} pictures in place of {s.kid_size}: there are not more")
        spread = {"std": value.std} if np.isfinite(value.std) else {}  # of two pictures there is none
        put("kid", value.value, **spread, subsets=s.kid_subsets, subset_size=size, seed=s.seed)
    elif group == "is":
        value = metrics.inception_score(net.logits(torch.from_numpy(g)).detach().cpu().numpy(), s.splits, s.seed)
        put("is", value.value, std=value.std, splits=s.splits, seed=s.seed)
    elif group == "prdc":
        for name, value in metrics.prdc(r, g, s.nearest_k).items():
            put(name, value, nearest_k=s.nearest_k)
    elif group == "diversity":
        put("diversity", metrics.diversity(g), distance="cosine")
    elif group == "memorisation":
        found.copies[space] = copies = metrics.memorisation(r, g)
        put("memorisation", copies.share, distance="Euclidean")
    else:
        _text_groups(group, net, g, prompts, s, put)


def _rows(net, dataset, s, what):
    """features.extract, kept for the groups that follow."""
    key = (net.key(), *_named(dataset))
    kept = s.networks.setdefault("rows", {})
    if key not in kept:
        kept[key] = features.extract(net, dataset, s.cache, s.batch_size, s.workers, f"{what} pictures")
    return kept[key]


def _by_name(rows, dataset):
    return rows if rows is None else rows[sorted(range(len(rows)), key=lambda i: dataset.keys[i])]


def _warn(group, n, m):
    if min(n, m) < metrics.FEW:
        dist.say(
            f"warning: {group} of {n} and {m} pictures is biased upwards and spreads; {metrics.FEW} or more are usual"
        )


def _resamples(s, generated, real):
    few = min(len(generated), len(real)) < metrics.FEW
    return s.bootstrap if s.bootstrap is not None else RESAMPLES if few else 0


def _fid(group, r, g, s, put):
    _warn(group, len(g), len(r))
    n = _resamples(s, g, r)
    ci = metrics.fid_interval(r, g, n, s.seed) if n else None
    put(group, metrics.fid(r, g), ci=ci, bootstrap=n or None, seed=s.seed if n else None)


def moments(net, dataset, s):
    """metrics.Moments of a data set's features, batch by batch: they are never in memory together."""
    found, rank, size = metrics.Moments(), dist.world().rank, dist.world().size

    @torch.inference_mode()
    def run():
        firsts = range(rank * s.batch_size, len(dataset), size * s.batch_size)
        for first in dist.progress(firsts, len(firsts), "features, batches"):
            positions = range(first, min(first + s.batch_size, len(dataset)))
            batch = torch.stack(features.each(net.prepare, dataset, positions, s.workers))
            found.add(net.encode(batch).float().cpu().numpy())

    dist.together(run)
    whole = metrics.Moments()
    for part in dist.gathered(found):
        whole.merge(part)
    return whole


def _text_groups(group, net, g, prompts, s, put):
    kept = s.networks.setdefault("texts", {})
    key = (net.key(), tuple(prompts))
    if key not in kept:
        kept[key] = net.texts(list(prompts))
    t = kept[key]
    if group == "modality_gap":
        for name, value in metrics.modality_gap(g, t).items():
            put(name, value)
        return
    cosines = metrics.clip_score(g, t)
    low, high = report.interval(cosines, s.seed)
    drawn = {"bootstrap": report.RESAMPLES, "seed": s.seed}
    put("clip_score", cosines.mean(), cosines.std(), (low, high), scale="mean cosine", **drawn)
    value, ci = max(100 * cosines.mean(), 0), (max(100 * low, 0), max(100 * high, 0))
    put("clip_score_100", value, 100 * cosines.std(), ci, scale="max(100 x mean cosine, 0), as torchmetrics", **drawn)
    scaled = (2.5 * cosines).clip(min=0)
    how = "mean of 2.5 max(cosine, 0), Hessel et al. eq. 1, without their words before the caption"
    put("clip_score_2.5", scaled.mean(), scaled.std(), report.interval(scaled, s.seed), scale=how, **drawn)


def _colours(generated, s, found):
    kept = features.shared(lambda i: metrics.colours(generated.image(i)), range(len(generated)), "colours")
    for name in metrics.COLOURS:
        values = [k[name] for k in kept]
        ci = report.interval(values, s.seed) if len(values) > 1 else None
        facts = report.provenance(
            **s.about, network="none: pixels", n_generated=len(generated), bootstrap=report.RESAMPLES, seed=s.seed
        )
        found.metrics[name] = report.entry(np.mean(values), len(values), facts, np.std(values), ci)


def prompts_for(dataset, path=None):
    """(prompts, None) of pictures: from a file (a line each in order, or captions by file name), from captions beside the pictures,
    or from what our PNGs carry. (None, why not) when there are none; UserError when those of a file do not belong to these pictures."""
    if path:
        return _prompts_from(dataset, Path(path)), None
    if all(dataset.captions):
        return list(dataset.captions), None
    if any(dataset.captions):
        silent = [k for k, c in zip(dataset.keys, dataset.captions, strict=True) if not c]
        return (
            None,
            f"needs a caption of each picture; {len(silent)} of {len(dataset)} have none, such as {printable(silent[0])}",
        )
    if any(item.offset or not item.path.endswith(".png") for item in dataset.items):
        return None, "needs the prompts (--prompts)"
    found = []
    for item in dataset.items:
        found.append((recorded(item.path) or {}).get("prompt"))
        if not isinstance(found[-1], str) or not found[-1]:
            return None, f"needs the prompts (--prompts); {printable(item.key)} carries none"
    return found, None


def prompts_in(path):
    """The prompts of a file, in its order: lines of text, or the first captions of a .json, .jsonl or .csv. Raises UserError."""
    path = Path(path)
    if path.suffix.lower() in caption_files.SUFFIXES:
        return [texts[0] for texts in caption_files.read(path).values()]
    lines = tables.lines(path)
    if not lines:
        raise UserError(f"`prompts` {path}: no prompts in it")
    return lines


def _prompts_from(dataset, path):
    if path.suffix.lower() not in caption_files.SUFFIXES:
        lines = prompts_in(path)
        if len(lines) != len(dataset):
            raise UserError(f"`prompts` {path}: {len(lines)} lines for {len(dataset)} pictures of {dataset.root}")
        keys = dataset.keys
        # texts and numbers in turn: the pictures are numbered where numbers are all that differs
        parts = [re.split(r"(\d+)", bare(k)) for k in keys]
        numbered = len({tuple(p[::2]) for p in parts}) == 1
        if numbered and sorted(keys) == keys != sorted(keys, key=tables.by_number):
            raise UserError(
                f"`prompts` {path}: lines cannot tell their pictures: {dataset.root} is in the order of {', '.join(map(printable, keys[:3]))}, …, not of their "
                "numbers; give captions by file name (.csv, .json, .jsonl)"
            )
        return lines
    known, stems = {k: v[0] for k, v in caption_files.read(path, by_file=True).items()}, {}
    for key in dataset.keys:
        stems.setdefault(bare(key), []).append(key)
    of_stem = {bare(k): v for k, v in known.items()}
    twice = [v for s, v in stems.items() if len(v) > 1 and not all(k in known for k in v)]
    if twice:
        raise UserError(
            f"{dataset.root}: {' and '.join(map(printable, twice[0]))} differ by suffix only; {path} must name them with it"
        )
    missing = [k for k in dataset.keys if k not in known and bare(k) not in of_stem]
    if missing:
        raise UserError(
            f"{path}: has no caption for {len(missing)} of {len(dataset)} pictures, such as {printable(missing[0])}"
        )
    if len(known) > len(dataset):
        dist.say(f"note: {path}: {len(known)} captions for {len(dataset)} pictures; the others are of other pictures")
    return [known.get(k, of_stem.get(bare(k))) for k in dataset.keys]
