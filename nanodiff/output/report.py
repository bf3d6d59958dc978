"""Numbers that can be sent to somebody: metrics.json, metrics.csv, report.md, and report.html in one file.

Every number carries its provenance: which network, the hash of its weights, the resize rule, how many pictures, the seed, the versions
and the command. `Report` collects headings, text, tables and pictures once, and writes them as Markdown (pictures beside it)
and as HTML that needs nothing else (pictures inside it, no script, no font, no address).

Significance of paired numbers: the paired t test, Wilcoxon's signed-rank test, a percentile bootstrap interval of the mean
difference, Cohen's d of the differences (d_z); p values of one table are corrected together (Holm 1979, Scand. J. Statist. 6).
"""

import base64
import csv
import html
import io
import json
import math
import os
import shlex
import sys
from pathlib import Path
from typing import NamedTuple

import numpy as np
import PIL
import scipy  # its parts are imported where they are first used
import torch

from nanodiff.commandline import masked
from nanodiff.config import UserError, commit, printable, read_json, spreadsheet
from nanodiff.files import write_bytes, write_json

LEVEL = 0.95
RESAMPLES = 10_000
COLUMNS = ("metric", "value", "std", "ci_low", "ci_high", "n", "provenance")


# ---------------------------------------------------------------------------------------------------------
# Numbers


def provenance(**facts):
    """Facts of a number and of the program that made it."""
    versions = {"nanodiff": commit(), "torch": torch.__version__, "numpy": np.__version__, "scipy": scipy.__version__,
                "pillow": PIL.__version__}  # fmt: skip
    command = shlex.join([Path(sys.argv[0]).name, *masked(sys.argv[1:])]) if sys.argv else ""
    return facts | {"versions": versions, "command": printable(command)}


def entry(value, n, facts, std=None, ci=None):
    """What stands in metrics.json under a metric's name."""
    found = {"value": _number(value), "n": n}
    if std is not None:
        found["std"] = _number(std)
    if ci is not None:
        found["ci"] = [_number(v) for v in ci]
    return found | {"provenance": facts}


def _number(value):
    """JSON has no infinities."""
    value = float(value)
    return value if math.isfinite(value) else str(value)


def rows(metrics):
    """[[name, value, std, low, high, n]] of a metrics.json."""
    return [[name, m["value"], m.get("std"), *(m.get("ci") or (None, None)), m["n"]] for name, m in metrics.items()]


def write_csv(path, header, lines):
    """A CSV file; None is an empty cell."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(header)
    writer.writerows([["" if c is None else spreadsheet(c) for c in line] for line in lines])
    write_bytes(path, text.getvalue().encode("utf-8", "replace"))


def read_metrics(folder):
    """The metrics.json in a folder of ours. Raises UserError for anything else."""
    path = Path(folder)
    path = path / "metrics.json" if path.is_dir() else path
    found = read_json(path)
    for name, m in found.items():
        parts = {
            "value": int | float | str,
            "n": int,
            "provenance": dict,
            "ci": list | None,
            "std": int | float | str | None,
        }
        wrong = [k for k, kind in parts.items() if not isinstance(m, dict) or not isinstance(m.get(k), kind)]
        if wrong or (m.get("ci") and len(m["ci"]) != 2):
            raise UserError(
                f"{path}: {printable(name)} lacks a right {(wrong or ['ci'])[0]}, so this is no metrics.json of ours"
            )
    if not found:
        raise UserError(f"{path}: no numbers in it")
    return found


# ---------------------------------------------------------------------------------------------------------
# Significance


class Paired(NamedTuple):
    """The difference b - a of paired numbers."""

    n: int
    mean: float
    std: float
    low: float  # of the 95 % bootstrap interval of the mean
    high: float
    t: float
    p_t: float
    p_wilcoxon: float
    d: float  # Cohen's, of the differences


def paired(a, b, seed=0):
    """Paired of two sequences, without the pairs where one is not finite; None for fewer than 2 pairs."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.shape != b.shape:
        raise UserError(f"{len(a)} and {len(b)} numbers are no pairs")
    finite = np.isfinite(a) & np.isfinite(b)
    difference = b[finite] - a[finite]
    n = len(difference)
    if n < 2:
        return None
    low, high = interval(difference, seed)
    mean, std = difference.mean(), difference.std(ddof=1)
    if std <= 1e-12 * max(abs(mean), 1e-300):  # every pair differs by the same
        p = 1.0 if mean == 0 else 0.0
        return Paired(n, float(mean), 0.0, low, high, math.inf * np.sign(mean) if mean else 0.0, p, _wilcoxon(difference), math.inf * np.sign(mean) if mean else 0.0)  # fmt: skip
    t, p = scipy.stats.ttest_1samp(difference, 0.0)
    return Paired(n, float(mean), float(std), low, high, float(t), float(p), _wilcoxon(difference), float(mean / std))


def _wilcoxon(difference):
    return float(scipy.stats.wilcoxon(difference).pvalue) if np.any(difference) else 1.0


def interval(values, seed=0, resamples=RESAMPLES, level=LEVEL):
    """(low, high): percentile bootstrap interval of the mean."""
    values = np.asarray(values, np.float64)
    rng, n = np.random.default_rng(seed), len(values)
    step = max(1, (1 << 24) // max(n, 1))  # resamples at a time, so that memory stays small
    means = np.concatenate(
        [values[rng.integers(n, size=(min(step, resamples - i), n))].mean(1) for i in range(0, resamples, step)]
    )
    low, high = np.percentile(means, [50 * (1 - level), 100 - 50 * (1 - level)])
    return float(low), float(high)


def holm(p):
    """Holm's corrected p values, in the same order."""
    order = np.argsort(p)
    corrected, most = np.empty(len(p)), 0.0
    for rank, i in enumerate(order):
        most = max(most, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = most
    return corrected.tolist()


# ---------------------------------------------------------------------------------------------------------
# Documents


def shown(value):
    """A cell for people."""
    if value is None:
        return ""
    if isinstance(value, bool | str):
        return printable(value)
    if isinstance(value, int):
        return str(value)
    return f"{value:.4g}" if math.isfinite(value) else str(value)


STYLE = """:root{color-scheme:light dark;--ink:#111;--paper:#fff;--line:#bbb;--head:#eee}
@media(prefers-color-scheme:dark){:root{--ink:#ddd;--paper:#161616;--line:#555;--head:#2a2a2a}}
body{font:16px/1.5 sans-serif;max-width:1000px;margin:2em auto;padding:0 1em;color:var(--ink);background:var(--paper);overflow-wrap:break-word}
div.table{overflow-x:auto}table{border-collapse:collapse;margin:1em 0;font-size:14px;overflow-wrap:normal}
th,td{border:1px solid var(--line);padding:.3em .6em;text-align:left}
th{background:var(--head)}td.number{text-align:right;font-variant-numeric:tabular-nums}
img{max-width:100%;border:1px solid var(--line);background:#fff}figure{margin:1em 0}
figcaption{font-size:14px}pre{background:var(--head);padding:.6em;overflow-x:auto;font-size:13px}"""
KINDS = {".png": "image/png", ".gif": "image/gif", ".jpg": "image/jpeg"}


class Report:
    """See the module docstring. Text is plain: what looks like markup in a caption stays text."""

    def __init__(self, title):
        self.blocks = [("h1", title)]

    def heading(self, text):
        self.blocks.append(("h2", text))

    def text(self, text):
        self.blocks.append(("p", text))

    def code(self, text):
        self.blocks.append(("pre", text))

    def table(self, header, lines):
        self.blocks.append(("table", (list(header), [list(line) for line in lines])))

    def picture(self, path, caption):
        if path is not None:
            self.blocks.append(("img", (Path(path), caption)))

    def markdown(self, folder):
        parts = []
        for kind, what in self.blocks:
            if kind in ("h1", "h2"):
                parts.append("#" * int(kind[1]) + f" {_plain(what)}")
            elif kind == "p":
                parts.append(_plain(what))
            elif kind == "pre":
                parts.append("```\n" + what.replace("```", "'''") + "\n```")
            elif kind == "img":
                parts.append(
                    f"![{_plain(what[1])}]({os.path.relpath(what[0], folder).replace(' ', '%20')})\n\n*{_plain(what[1])}*"
                )
            else:
                header, lines = what
                table = [header, ["---"] * len(header), *[[shown(c) for c in line] for line in lines]]
                parts.append(
                    "\n".join("| " + " | ".join(_plain(c).replace("|", "\\|") for c in line) + " |" for line in table)
                )
        return "\n\n".join(parts) + "\n"

    def html(self):
        parts = []
        for kind, what in self.blocks:
            if kind in ("h1", "h2", "p", "pre"):
                text = what if kind == "pre" else printable(what)
                parts.append(f"<{kind}>{html.escape(text)}</{kind}>")
            elif kind == "img":
                data = base64.b64encode(what[0].read_bytes()).decode()
                address = f"data:{KINDS[what[0].suffix]};base64,{data}"
                alt = html.escape(printable(what[1]), quote=True)
                parts.append(
                    f'<figure><img src="{address}" alt="{alt}"><figcaption>{html.escape(printable(what[1]))}</figcaption></figure>'
                )
            else:
                header, lines = what
                head = "".join(f"<th>{html.escape(shown(c))}</th>" for c in header)
                body = "".join("<tr>" + "".join(map(_cell, line)) + "</tr>" for line in lines)
                parts.append(f'<div class="table"><table><tr>{head}</tr>{body}</table></div>')
        title = html.escape(printable(self.blocks[0][1]))
        return (
            f'<!doctype html><html lang="en"><meta charset="utf-8"><meta name="viewport" content="width=device-width, initial-scale=1"><title>{title}</title><style>{STYLE}</style>\n'
            + "\n".join(parts)
            + "</html>\n"
        )

    def write(self, folder):
        """report.md and report.html; returns their paths."""
        folder = Path(folder)
        write_bytes(folder / "report.md", self.markdown(folder).encode("utf-8", "replace"))
        write_bytes(folder / "report.html", self.html().encode("utf-8", "replace"))
        return [folder / "report.md", folder / "report.html"]


def _plain(text):
    """A line of text in which Markdown sees no markup."""
    text = printable(text)
    marks = {"<": "&lt;", ">": "&gt;"}  # a reader that lets HTML through finds none
    return "".join(marks.get(c) or (f"\\{c}" if c in "*_`[]#" else c) for c in text)


def _cell(value):
    kind = ' class="number"' if isinstance(value, int | float) and not isinstance(value, bool) else ""
    return f"<td{kind}>{html.escape(shown(value))}</td>"


def metrics_table(report, metrics):
    """The table of a metrics.json, and below it how the numbers were made, each way once."""
    if not metrics:
        return report.text("None.")
    report.table(("metric", "value", "std", "95 % interval", "n"),
                 [[n, v, s, f"{shown(lo)} to {shown(hi)}" if lo is not None else None, k] for n, v, s, lo, hi, k in rows(metrics)])  # fmt: skip
    made = {}
    for name, m in metrics.items():
        facts = {k: v for k, v in m["provenance"].items() if k not in ("versions", "command") and v is not None}
        made.setdefault(
            "; ".join(f"{k} {shown(v) if not isinstance(v, dict | list) else v}" for k, v in facts.items()), []
        ).append(name)
    report.heading("How these numbers were made")
    report.table(("metrics", "made with"), [[", ".join(names), facts] for facts, names in made.items()])
    for command in dict.fromkeys(
        (m["provenance"].get("command", ""), *m["provenance"].get("versions", {}).items()) for m in metrics.values()
    ):
        report.code(f"{command[0]}\n" + ", ".join(f"{k} {v}" for k, v in command[1:]))


def write_metrics(folder, metrics):
    """metrics.json and metrics.csv; returns their paths."""
    folder = Path(folder)
    write_json(folder / "metrics.json", metrics)
    lines = [[*row, json.dumps(m["provenance"])] for row, m in zip(rows(metrics), metrics.values(), strict=True)]
    write_csv(folder / "metrics.csv", COLUMNS, lines)
    return [folder / "metrics.json", folder / "metrics.csv"]
