"""The figures and the pages of an evaluation: what stands in its report, beside the numbers of image_sets.py.

document = report.Report("…")
files = pages.sets(out, document, found, sets, real, prompts_of)            # sets of pictures, each against real ones
files = pages.comparison(out, document, found, folders, pairings, …)  # pairs: before, after, teacher
"""

import json
import math
import shutil
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from nanodiff.commandline import flagged
from nanodiff.config import UserError, read_json
from nanodiff.evaluation import image_pairs, similarity
from nanodiff.files import out_dir, write_bytes, write_json
from nanodiff.output import charts, images, report

RADAR = ("ssim", "hist_similarity", "median_hash", "color_similarity", "mse")
TITLES = {"ssim": "SSIM", "mse": "MSE", "hist_similarity": "Histogram Similarity", "median_hash": "Hash Similarity",
          "sharpness_ratio": "Sharpness Ratio (first/second)", "color_similarity": "Color Similarity"}  # the source document's column names  # fmt: skip
NEARER = {True: "nearer", False: "farther", None: "the same"}
KEY_FIGURES = ("radar_chart.png", "improvement_percentage_chart.png", "improvement_table.png", "ssim_comparison.png")
CANNOT = (
    "SSIM, MSE, PSNR, histograms and hashes compare pixels. For two versions of one picture they say how much has changed; for two "
    "pictures of different content, such as two models' answers to one prompt, they say nothing about which is better, and a change in "
    "them is no improvement by itself. Read them beside the CLIP score and FID of the sets, which need weights (--weights-dir)."
)


def distinct(names):
    """{name: a part of file names}, no two alike."""
    found = {}
    for name in dict.fromkeys(names):
        plain = part = images.slug(name)
        n = 1
        while part in found.values():
            n += 1
            part = f"{plain}_{n}"
        found[name] = part
    return found


def sets(out, document, found, of, real, prompts_of, across=()):
    """The pages of sets of pictures. found: {name: image_sets.Found}; of: {name: Dataset}; real: Dataset or None; prompts_of: {name: prompts or
    None}; across: numbers of pictures for the sheet across sets. Returns the files."""
    files, names, parts = [], list(found), distinct(found)
    for name, prompts in prompts_of.items():
        if prompts:
            files.append(out / f"prompts_{parts[name]}.json")
            write_json(files[-1], dict(zip(of[name].keys, prompts, strict=True)))
    if len(names) > 1:
        document.heading("Over the sets")
        common = [m for m in found[names[0]].metrics if all(m in f.metrics for f in found.values())]
        document.table(("metric", *names), [[m, *(found[n].metrics[m]["value"] for n in names)] for m in common])
        panels = {m: {"": [band(found[n].metrics[m]) for n in names]} for m in common}
        path = charts.lines(out / "generations.png", names, panels, "set")
        document.picture(path, "Each number over the sets, with its interval where it has one")
        write_json(out / "generations.json", {n: found[n].metrics for n in names})
        report.write_csv(
            out / "generations.csv",
            ("metric", *names),
            [[m, *(found[n].metrics[m]["value"] for n in names)] for m in common],
        )
        files += [p for p in (path, out / "generations.json", out / "generations.csv") if p]
        files.append(_across(out / "across.png", across, of, prompts_of))
        document.picture(
            files[-1], "The same pictures in each set, by name where the sets have the same names, else by place"
        )
    for name in names:
        document.heading(f"Numbers of {name}" if len(names) > 1 else "Numbers")
        report.metrics_table(document, found[name].metrics)
        if found[name].skipped:
            document.heading("Not computed")
            not_computed(document, found[name].skipped)
        shown = [of[name].image(i) for i in spread(len(of[name]), 24)]
        path = out / f"sheet_{parts[name]}.png"
        images.save_png(images.grid([small(p) for p in shown], 8), path)
        document.picture(path, f"{name}: {len(shown)} of {len(of[name])} pictures")
        files.append(path)
        for space, copies in found[name].copies.items():
            path = out / f"nearest_{space}_{parts[name]}.png"
            _nearest_sheet(path, of[name], real, copies)
            if all(real.captions):  # a caption for each picture, found by its neighbour: `eval.py captions` scores them
                nearest = {k: real.captions[int(i)] for k, i in zip(of[name].keys, copies.nearest, strict=True)}
                write_json(path.with_suffix(".json"), nearest)
                files.append(path.with_suffix(".json"))
            document.picture(path, f"{name}: the generated pictures nearest to a real one by {space} (left), and that one (right); "
                                   "the number is the distance over the real picture's own distance to its nearest neighbour")  # fmt: skip
            files.append(path)
    return files


def not_computed(document, skipped):
    """A table of why metrics are missing; what is to be given is named by its flag, since people who read reports type commands."""
    document.table(("metric", "why"), [(name, flagged(why)) for name, why in skipped.items()])


def _across(path, chosen, sets, prompts_of):
    """A sheet: one row a picture, one column a set."""
    names, first = list(sets), next(iter(sets.values()))
    if all(set(d.keys) == set(first.keys) for d in sets.values()):
        places = {n: {k: i for i, k in enumerate(d.keys)} for n, d in sets.items()}
        find = lambda n, i: places[n][first.keys[i]]  # noqa: E731
    else:
        find = lambda n, i: i  # noqa: E731
    least = min(map(len, sets.values()))
    chosen = list(chosen) or spread(least, 8)
    if max(chosen) >= least:
        raise UserError(f"`across` {max(chosen)}: the smallest set has {least} pictures, counted from 0")
    cells = [small(sets[n].image(find(n, i)), 128) for i in chosen for n in names]
    labels = [n if n != names[0] or not prompts_of[n] else f"{n}: {prompts_of[n][i]}" for i in chosen for n in names]
    images.save_png(images.grid(cells, len(names), labels, size=14), path)
    return path


def band(m):
    low, high = m.get("ci") or (m["value"] - m.get("std", 0), m["value"] + m.get("std", 0))
    return m["value"], low, high


def spread(n, most):
    """Up to `most` positions, evenly spread."""
    k = min(n, most)
    return sorted({round(i * (n - 1) / max(k - 1, 1)) for i in range(k)})


def small(picture, side=112):
    """For a sheet: enlarged or reduced to one size, not distorted."""
    return ImageOps.pad(picture, (side, side), Image.Resampling.LANCZOS, color="white")


def _nearest_sheet(path, generated, real, copies, shown=8):
    order = copies.ratio.argsort(kind="stable")[:shown]
    cells, labels = [], []
    for i in order:
        cells += [small(generated.image(int(i))), small(real.image(int(copies.nearest[i])))]
        labels += [f"{copies.ratio[i]:.3g}", ""]
    images.save_png(images.grid(cells, 8, labels, size=20), path)


def comparison(out, document, found, folders, pairings, metrics, skipped=None, settings=None, panels=12, seed=0):
    """The pages of pairs of pictures, and the fourth document's files. found: [evaluate.Pair]; folders: {label: Dataset}; metrics: {name:
    entry}; skipped: {name: reason}; settings: what stands in the summary. Returns the files."""
    document.text(CANNOT)
    document.text(f"{len(found)} pictures in {len({p.category for p in found})} categories.")
    files = write_pairs(out / "metrics", found)
    drawn = figures_of(panels, out, document, found, folders, pairings, metrics)
    files += drawn
    if len(pairings) == 3:
        tests, path = nearer(out / "metrics", document, found, seed)
        both = image_pairs.shared(found, "original_vs_teacher", "finetuned_vs_teacher")
        files += [path, *research(settings or {}, out / "research_paper_materials", tests, both, metrics, drawn)]
    document.heading("Numbers")
    report.metrics_table(document, metrics)
    if skipped:
        document.heading("Not computed")
        not_computed(document, skipped)
    return files


def nearer(folder, document, found, seed=0, before="original", after="finetuned", name="significance.csv"):
    """Is `after` nearer to the teacher than `before`, number by number, picture by picture? Returns ({metric: evaluate.Change}, the CSV)."""
    document.heading("Nearer to the teacher?")
    names = list(found[0].numbers[f"{before}_vs_teacher"])
    tests = image_pairs.significance(found, f"{before}_vs_teacher", f"{after}_vs_teacher", names, seed)
    header = ("metric", "pairs", "mean difference", "low", "high", "t", "p (t)", "p (t, Holm)", "p (Wilcoxon)", "p (Wilcoxon, Holm)",
              "Cohen's d", f"{after} is")  # fmt: skip
    lines = [
        [n, c.test.n, c.test.mean, c.test.low, c.test.high, c.test.t, c.test.p_t, c.p_t, c.test.p_wilcoxon, c.p_wilcoxon, c.test.d, NEARER[c.nearer]]
        for n, c in tests.items()
    ]  # fmt: skip
    document.text(f"The {after} pictures' number against the teacher, less the {before} ones', over the same pictures (of the sharpness ratio, the first picture's over the second's: its "
                  "distance from 1, as |log|); low and high: 95 % bootstrap interval. A pair where one number is infinite does not count.")  # fmt: skip
    document.table(header, lines)
    report.write_csv(folder / name, header, lines)
    return tests, folder / name


def research(settings, folder, tests, both, metrics, drawn):
    """research_summary.md: settings, findings in sentences, numbers, and the key figures copied beside it. both: of image_pairs.shared(). Returns the files."""
    document, files = report.Report("Summary of the comparison"), [out_dir(folder) / "research_summary.md"]
    document.heading("Settings")
    document.table(("setting", "value"), [[k, str(v)] for k, v in settings.items() if v is not None])
    document.heading("Findings")
    for name, (t, p, _, nearer) in tests.items():
        before, after = both[name]
        document.text(
            f"{name.replace('_', ' ')} against the teacher: {report.shown(before)} before, {report.shown(after)} after: {NEARER[nearer]}; mean "
            f"difference {t.mean:+.3g} (95 % interval {t.low:.3g} to {t.high:.3g}, d = {t.d:.2f}), "
            + (f"significant at 5 % (Holm's p = {p:.2g})." if p < 0.05 else f"not significant (Holm's p = {p:.2g}).")
        )
    document.text(CANNOT)
    document.heading("The sets as wholes")
    document.table(
        ("metric", "value", "n"),
        [[k, m["value"], m["n"]] for k, m in metrics.items() if k.split(".")[-1] in ("fid", "clip_score")],
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
    """metrics_{category}_{i}.json and .csv of each picture, category_averages.json, overall_metrics.json. Returns the files; older ones make room."""
    _clear(out_dir(folder), "metrics_*")
    files, counts, parts = [], {}, distinct(p.category for p in found)
    columns = [n for n in TITLES if n in next(iter(found[0].numbers.values()))]
    for pair in found:
        i = counts[pair.category] = counts.get(pair.category, -1) + 1
        stem = folder / f"metrics_{parts[pair.category]}_{i}"
        text = json.dumps({"name": pair.name} | _finite(pair.numbers), indent=2)
        write_bytes(stem.with_suffix(".json"), f"{text}\n".encode(), sync=False)  # there may be thousands
        lines = [[k.replace("_", " "), *(v[c] for c in columns)] for k, v in pair.numbers.items()]
        report.write_csv(stem.with_suffix(".csv"), ("Comparison", *(TITLES[c] for c in columns)), lines)
        files += [stem.with_suffix(".json"), stem.with_suffix(".csv")]
    categories = list(counts)
    write_json(folder / "category_averages.json", {c: image_pairs.average(found, c) for c in categories})
    write_json(folder / "overall_metrics.json", image_pairs.average(found))
    return [*files, folder / "category_averages.json", folder / "overall_metrics.json"]


def read_pairs(folder):
    """[evaluate.Pair] of a folder that write_pairs() wrote, in the order of their names. Raises UserError."""
    found = []
    for path in sorted(Path(folder).glob("metrics_*.json")):
        raw = read_json(path)
        if not isinstance(raw, dict) or not isinstance(raw.get("name"), str):
            raise UserError(f"{path}: is no file of a picture's numbers")
        numbers = {
            k: {n: float(v) if isinstance(v, str) else v for n, v in row.items()}
            for k, row in raw.items()
            if k != "name"
        }
        found.append(image_pairs.Pair(raw["name"], raw["name"].split("/")[0] if "/" in raw["name"] else "all", numbers))
    if not found:
        raise UserError(f"{folder}: has no metrics_….json, so nothing was evaluated there")
    return sorted(found)


def _finite(numbers):
    return {
        k: {n: v if v is None or math.isfinite(v) else str(v) for n, v in row.items()} for k, row in numbers.items()
    }


def figures_of(panels, out, document, found, folders, pairings, metrics):
    """Panels, difference maps, radar, bars, improvement; each into the report. Returns the files."""
    look, side = out_dir(out / "visualization"), out_dir(out / "comparison_output")
    files = pictures_of(panels, side, look, document, found, folders, pairings)
    return files + charts_of(look, document, found, pairings, metrics)


def _clear(folder, names):
    """Delete an older comparison's files: a run never mixes with another's results."""
    for old in folder.glob(names):
        old.unlink()


def pictures_of(panels, side, maps, document, found, folders, pairings):
    """Of some of the pictures: a panel of all folders' in `side`, and difference maps of the pairings in `maps`. Returns the files; older ones make
    room."""
    _clear(side, "comparison_all_*")
    _clear(maps, "difference_*")
    _, sets = image_pairs.matched(folders)
    files, counts, chosen = [], {}, set(spread(len(found), panels) if panels else ())
    parts = distinct(p.category for p in found)
    labels = [k for k in ("a", "b", "original", "finetuned", "online", "teacher") if k in folders]
    document.heading("Pictures")
    for k, pair in enumerate(found):
        i = counts[pair.category] = counts.get(pair.category, -1) + 1
        if k not in chosen:
            continue
        shown = {n: sets[n].image(k) for n in labels}
        name = f"{parts[pair.category]}_{i}"
        path = side / f"comparison_all_{name}.png"
        images.save_png(images.grid([small(p, 256) for p in shown.values()], len(labels), labels, size=20), path)
        document.picture(path, f"{pair.name}: {', '.join(labels)}")
        files.append(path)
        for a, b in pairings:
            least = min(shown[a].size, shown[b].size, key=lambda s: s[0] * s[1])
            x, y = (np.asarray(shown[n].resize(least, Image.Resampling.LANCZOS)) for n in (a, b))
            path = charts.difference(
                maps / f"difference_{a}_vs_{b}_{name}.png", x, y, (a, b), pair.numbers[f"{a}_vs_{b}"]
            )
            if path:
                files.append(path)
                document.picture(path if len(chosen) <= 3 or k == min(chosen) else None, f"{pair.name}: {a} and {b}")
    return files


def charts_of(look, document, found, pairings, metrics):
    """What needs the numbers alone: radar, bars by category, improvement. Returns the files."""
    files = []
    document.heading("Figures")
    means, categories = image_pairs.average(found), sorted({p.category for p in found})
    radar = {f"{a} and {b}": [_unit(n, means[f"{a}_vs_{b}"].get(n)) for n in RADAR] for a, b in pairings}
    if all(n in means[f"{a}_vs_{b}"] for n in RADAR for a, b in pairings):
        axes = [TITLES[n].replace(" Similarity", "") if n != "mse" else "inverted MSE" for n in RADAR]
        path = charts.radar(look / "radar_chart.png", axes, radar)
        document.picture(path, "Means over all pictures; inverted MSE is max(0, 1 - MSE / 10000)")
        files.append(path)
    by_category = {c: image_pairs.average(found, c) for c in categories}
    for name, mean in means[f"{pairings[0][0]}_vs_{pairings[0][1]}"].items():
        if mean is None:
            continue
        series = {f"{a} and {b}": [by_category[c][f"{a}_vs_{b}"][name] for c in categories] for a, b in pairings}
        path = charts.bars(look / f"{name}_comparison.png", categories, series, name.replace("_", " "))
        document.picture(path, f"{name.replace('_', ' ')} by category")
        files.append(path)
    if len(pairings) == 3:
        pair = "original_vs_teacher", "finetuned_vs_teacher"
        both = image_pairs.shared(found, *pair)
        if all(f"{k}.fid" in metrics for k in pair):
            both["fid"] = tuple(metrics[f"{k}.fid"]["value"] for k in pair)
        files += _improvement(look, document, both)
    return [f for f in files if f]


def _unit(name, value):
    """A number on the radar's axis from 0 to 1."""
    if value is None:
        return 0.0
    return min(max(1 - value / 10000 if name == "mse" else value, 0.0), 1.0)


def _improvement(look, document, both):
    """By how much the finetuned pictures are nearer to the teacher than the original ones: (ft - orig) / orig, the other way round where
    less is nearer. both: {metric: (before, after)} over the same pictures."""
    rows = []
    for name, direction in (similarity.HIGHER_IS_NEARER | {"fid": False}).items():
        before, after = both.get(name, (None, None))
        if direction is None or not before or after is None:
            continue
        change = 100 * (after - before) / abs(before)
        rows.append((name.replace("_", " "), before, after, change if direction else -change))
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
