"""Charts with matplotlib, the one file that imports it (optional extra `report`).

python -m nanodiff.output.charts loss out/model/metrics.jsonl loss.png
"""

import functools
import io
import math
import sys
from pathlib import Path

from nanodiff.config import UserError, parse_json, printable
from nanodiff.files import write_bytes


@functools.cache
def _say_once(line):
    print(line, file=sys.stderr)


def pyplot():
    """matplotlib.pyplot without a display, or None, with one line, when the extra is not installed."""
    try:
        import matplotlib
    except ImportError:
        _say_once('note: no chart without matplotlib; pip install "matplotlib>=3.8" (extra `report`)')
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def formula(latex):
    """(outline as SVG path data, width, height, depth below the line) of a formula in mathtext's TeX, in units of the text's size, y down.
    Raises UserError for what mathtext does not know, and without matplotlib."""
    if pyplot() is None:
        raise UserError('formulas are drawn by matplotlib: pip install "matplotlib>=3.8"')
    from matplotlib.font_manager import FontProperties
    from matplotlib.textpath import text_to_path

    size = text_to_path.FONT_SCALE  # points come in this size, whatever is asked for
    font, text = FontProperties(size=size), f"${latex}$"
    try:
        points, codes = text_to_path.get_text_path(font, text, ismath=True)
        width, height, depth = text_to_path.get_text_width_height_descent(text, font, ismath=True)
    except ValueError as e:
        raise UserError(f"formula {latex}: {str(e).strip().splitlines()[-1]}") from None
    # matplotlib.path.Path's codes, and how many points each takes
    pens = {1: ("M", 1), 2: ("L", 1), 3: ("Q", 2), 4: ("C", 3), 79: ("Z", 1)}
    out, i = [], 0
    while i < len(codes):
        pen, many = pens[int(codes[i])]
        some = points[i : i + many] if pen != "Z" else ()
        out.append(pen + " ".join(f"{x / size:.3f} {(height - depth - y) / size:.3f}" for x, y in some))
        i += many
    return "".join(out), width / size, height / size, depth / size


def losses(log, target_file, panels=("loss",), target=None):
    """metrics.jsonl -> a figure with a panel for each of the logged numbers that is there (with their running mean over a tenth
    of the lines, 50 at most) and one for the learning rate. target: a line in the panel of the KL divergence. Returns True when it was written."""
    rows = logged(log)
    there = [p for p in panels if any(p in r for r in rows)]
    if not there or not all("step" in r for r in rows):
        raise UserError(f"{log}: no losses in it" if not there else f"{log}: a line has no `step`")
    plt = pyplot()
    if plt is None:
        return False
    names = [*there, *(["lr"] if any("lr" in r for r in rows) else [])]
    across = 2 if len(names) > 2 else 1
    figure, axes = plt.subplots(
        -(-len(names) // across), across, figsize=(5.5 * across, 2.9 * -(-len(names) // across)), squeeze=False
    )
    for axis, name in zip(axes.flat, names, strict=False):
        points = [(r["step"], r[name]) for r in rows if name in r]
        steps, values = zip(*points, strict=True)
        dots, window = name != "lr", min(max(len(values) // 10, 1), 50)
        axis.plot(steps, values, color="0.75" if dots else "tab:orange", linewidth=0.7)
        if dots:
            axis.plot(steps, _running(values, window), color="tab:blue", label=f"mean of {window}")
        if name == "kl" and target:
            axis.axhline(target, color="tab:red", linestyle="--", label=f"target {target:g}")
        axis.set_title(
            {"kl": "KL divergence (nats a picture)", "lr": "learning rate"}.get(name, name.replace("_", " ")),
            fontsize=10,
        )
        axis.set_xlabel("update")
        if dots:
            axis.legend(fontsize=8)
            if min(values) > 0 and max(values) > 50 * min(values):
                axis.set_yscale("log")
    for axis in axes.flat[len(names) :]:
        axis.axis("off")
    saved(plt, figure, target_file, None)
    return True


def curves(logs, target_file, name="unweighted_loss", window=50):
    """{label: metrics.jsonl} -> one figure: the running mean of a number of each run, each relative to its own first mean
    (losses of different targets have different scales). Returns True when it was written."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, (label, log) in enumerate(logs.items()):
        rows = [r for r in logged(log) if name in r]
        means = _running([r[name] for r in rows], window)
        axis.plot(
            [r["step"] for r in rows], [m / means[0] for m in means], label=label, linestyle=("-", "--", ":")[i % 3]
        )
    axis.set_xlabel("update")
    axis.set_ylabel(f"{name.replace('_', ' ')}, of its first value")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    saved(plt, figure, target_file, None)
    return True


def _running(values, window):
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]


def logged(log):
    """The lines of a metrics.jsonl as dicts. Raises UserError."""
    try:
        lines = Path(log).read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as e:
        raise UserError(f"{log}: {e}") from None
    rows = [parse_json(line, f"{log}:{n}") for n, line in enumerate(lines, 1) if line.strip()]
    if not all(isinstance(row, dict) for row in rows):
        raise UserError(f"{log}: is no metrics.jsonl, whose lines are objects")
    return rows


# ---------------------------------------------------------------------------------------------------------
# Evaluation. Colours that are told apart without red and green (Okabe and Ito 2008), and by marks and dashes too; every function
# returns the file's path, or None without matplotlib.

PALETTE = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#D55E00", "#56B4E9", "#000000")
DASHES, MARKS, HATCHES = ("-", "--", ":", "-."), "os^Dv<>", ("", "//", "..", "xx")
WIDEST = 60  # inches, of 100 dots
MOST_TICKS = 8  # along an axis
FONT = 13  # points in the 100 dpi files: legible when they are shown at half their size


def saved(plt, figure, path, box="tight"):
    figure.tight_layout()
    data = io.BytesIO()
    figure.savefig(data, dpi=100, bbox_inches=box)
    plt.close(figure)
    write_bytes(path, data.getbuffer())
    return Path(path)


def _plt():
    plt = pyplot()
    if plt is not None:
        plt.rcParams.update({"font.size": FONT, "axes.spines.top": False, "axes.spines.right": False})
    return plt


def bars(path, groups, series, title="", ylabel=""):
    """Grouped bars. series: {label: [value or (value, low, high) for each group]}; None leaves a place empty."""
    plt = _plt()
    if plt is None:
        return None
    figure, axis = plt.subplots(
        figsize=(min(max(6.5, 1.3 * len(groups) * max(len(series), 1) ** 0.5 + 2), WIDEST), 4.5)
    )
    width = 0.8 / max(len(series), 1)
    for k, (label, values) in enumerate(series.items()):
        for i, value in enumerate(values):
            if value is None:
                continue
            middle, low, high = value if isinstance(value, tuple) else (value, None, None)
            error = None if low is None else [[max(middle - low, 0)], [max(high - middle, 0)]]
            axis.bar(
                i + (k - (len(series) - 1) / 2) * width,
                middle,
                width * 0.95,
                yerr=error,
                capsize=4,
                edgecolor="black",
                linewidth=0.6,
                color=PALETTE[k % len(PALETTE)],
                hatch=HATCHES[k % len(HATCHES)],
                label=label,
            )
            label = None  # once in the legend  # fmt: skip
    axis.axhline(0, color="black", linewidth=0.8)
    turned = len(groups) * max(map(len, groups)) > 60
    axis.set_xticks(
        range(len(groups)),
        list(map(printable, groups)),
        rotation=30 if turned else 0,
        ha="right" if turned else "center",
    )
    axis.set_ylabel(ylabel)
    axis.set_title(title)
    if len(series) > 1:
        axis.legend(loc="lower left", bbox_to_anchor=(0, 1.08), ncol=len(series), frameon=False, fontsize=FONT - 2)
    return saved(plt, figure, path)


def radar(path, axes, series, title=""):
    """Polygons over axes that run from 0 to 1. series: {label: [value of each axis]}."""
    plt = _plt()
    if plt is None:
        return None
    figure, axis = plt.subplots(figsize=(7.5, 6), subplot_kw={"projection": "polar"})
    angles = [2 * math.pi * i / len(axes) for i in range(len(axes))]
    for k, (label, values) in enumerate(series.items()):
        closed = [*values, values[0]]
        axis.plot([*angles, angles[0]], closed, color=PALETTE[k % len(PALETTE)], linestyle=DASHES[k % len(DASHES)],
                  marker=MARKS[k % len(MARKS)], linewidth=2, label=label)  # fmt: skip
        axis.fill([*angles, angles[0]], closed, color=PALETTE[k % len(PALETTE)], alpha=0.12)
    axis.set_xticks(angles, axes)
    axis.tick_params(axis="x", pad=12)
    axis.set_ylim(0, 1)
    axis.set_title(title, pad=24)
    axis.legend(loc="upper left", bbox_to_anchor=(1.02, 1.1), frameon=False, fontsize=FONT - 2)
    return saved(plt, figure, path)


def lines(path, x, panels, xlabel, title=""):
    """A panel a number. panels: {name: {label: [value or (value, low, high) for each x]}}; x: numbers or words."""
    plt = _plt() if panels else None
    if plt is None:
        return None
    across = min(len(panels), 3)
    down = -(-len(panels) // across)
    figure, axes = plt.subplots(down, across, figsize=(4.6 * across, 3.4 * down), squeeze=False)
    for axis, (name, series) in zip(axes.flat, panels.items(), strict=False):
        for k, (label, values) in enumerate(series.items()):
            triples = [v if isinstance(v, tuple) else (v, v, v) for v in values]
            colour = PALETTE[k % len(PALETTE)]
            axis.plot(range(len(x)), [t[0] for t in triples], color=colour, linestyle=DASHES[k % len(DASHES)],
                      marker=MARKS[k % len(MARKS)], label=label)  # fmt: skip
            axis.fill_between(range(len(x)), [t[1] for t in triples], [t[2] for t in triples], color=colour, alpha=0.15)
        every = -(-len(x) // MOST_TICKS)  # of many numbers some are written
        shown = [str(v) for v in x][::every]
        axis.set_xticks(range(0, len(x), every), shown, rotation=30 if max(map(len, shown)) > 6 else 0)
        axis.set_xlabel(xlabel)
        axis.set_title(name.replace("_", " "))
        if len(series) > 1:
            axis.legend(frameon=False, fontsize=FONT - 3)
    for axis in axes.flat[len(panels) :]:
        axis.axis("off")
    if title:
        figure.suptitle(title)
    return saved(plt, figure, path)


def difference(path, a, b, labels, numbers):
    """Two pictures (uint8 [H, W, 3]), where they differ (mean over channels), their brightness and the differences as histograms,
    and numbers {name: value} as text."""
    plt = _plt()
    if plt is None:
        return None
    import numpy as np

    gap = np.abs(a.astype(np.int32) - b).mean(-1)
    figure, axes = plt.subplots(2, 3, figsize=(13, 7.6), height_ratios=(3, 2))
    for axis, picture, label in zip(axes[0], (a, b), labels, strict=False):
        axis.imshow(picture, interpolation="nearest")
        axis.set_title(label)
        axis.axis("off")
    heat = axes[0, 2].imshow(gap, cmap="cividis", vmin=0, vmax=max(float(gap.max()), 1.0), interpolation="nearest")
    axes[0, 2].set_title("absolute difference")
    axes[0, 2].axis("off")
    figure.colorbar(heat, ax=axes[0, 2], fraction=0.046)
    for k, (picture, label) in enumerate(zip((a, b), labels, strict=True)):
        axes[1, 0].hist(picture.mean(-1).ravel(), bins=64, range=(0, 255), histtype="step", linewidth=2, color=PALETTE[k],
                        linestyle=DASHES[k], label=label)  # fmt: skip
    axes[1, 0].set_title("brightness")
    axes[1, 0].legend(frameon=False, fontsize=FONT - 3)
    axes[1, 1].hist(gap.ravel(), bins=64, color=PALETTE[4])
    axes[1, 1].set_yscale("log")
    axes[1, 1].set_title("differences (places, log)")
    axes[1, 2].axis("off")
    text = "\n".join(f"{n.replace('_', ' ')}: {v:.4g}" for n, v in numbers.items() if v is not None)
    axes[1, 2].text(0, 1, text, va="top", fontsize=FONT - 1)
    return saved(plt, figure, path)


def table(path, header, rows, title=""):
    """A table as a picture."""
    plt = _plt()
    if plt is None:
        return None
    widths = [max(len(str(r[i])) for r in [header, *rows]) for i in range(len(header))]
    figure, axis = plt.subplots(figsize=(max(6, 0.13 * sum(widths) + 0.4 * len(header)), 0.45 * (len(rows) + 2) + 0.4))
    axis.axis("off")
    made = axis.table(
        [[str(c) for c in r] for r in rows], colLabels=header, colWidths=[w / sum(widths) for w in widths], loc="center"
    )
    made.auto_set_font_size(False)
    made.set_fontsize(FONT - 1)
    made.scale(1, 1.7)
    axis.set_title(title)
    return saved(plt, figure, path)


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nanodiff.output.charts", description=__doc__.split("\n\n")[0])
    parser.add_argument("chart", choices=["loss"])
    parser.add_argument("log")
    parser.add_argument("target")
    args = parser.parse_args()
    try:
        if not losses(args.log, args.target):
            sys.exit(1)  # pyplot() has said why
        print(args.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
