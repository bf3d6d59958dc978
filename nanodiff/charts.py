"""Charts with matplotlib, the one file that imports it (optional extra `report`).

python -m nanodiff.charts loss out/model/metrics.jsonl loss.png
"""

import json
import sys
from pathlib import Path

from nanodiff.config import UserError


def pyplot():
    """matplotlib.pyplot without a display, or None, with one line, when the extra is not installed."""
    try:
        import matplotlib
    except ImportError:
        print('note: no chart without matplotlib; pip install "matplotlib>=3.8" (extra `report`)', file=sys.stderr)
        return None
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    return plt


def losses(log, target_file, panels=("loss",), target=None):
    """metrics.jsonl -> a figure with a panel for each of the logged numbers that is there (with their running mean over a tenth
    of the lines, 50 at most) and one for the learning rate. target: a line in the panel of the KL divergence. Returns True when it was written."""
    rows = _rows(log)
    there = [p for p in panels if any(p in r for r in rows)]
    if not there:
        raise UserError(f"{log}: no losses in it")
    plt = pyplot()
    if plt is None:
        return False
    names = [*there, "lr"]
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
    figure.tight_layout()
    figure.savefig(target_file, dpi=100)
    plt.close(figure)
    return True


def curves(logs, target_file, name="unweighted_loss", window=50):
    """{label: metrics.jsonl} -> one figure: the running mean of a number of each run, each relative to its own first mean
    (losses of different targets have different scales). Returns True when it was written."""
    plt = pyplot()
    if plt is None:
        return False
    figure, axis = plt.subplots(figsize=(7, 4))
    for i, (label, log) in enumerate(logs.items()):
        rows = [r for r in _rows(log) if name in r]
        means = _running([r[name] for r in rows], window)
        axis.plot(
            [r["step"] for r in rows], [m / means[0] for m in means], label=label, linestyle=("-", "--", ":")[i % 3]
        )
    axis.set_xlabel("update")
    axis.set_ylabel(f"{name.replace('_', ' ')}, of its first value")
    axis.set_yscale("log")
    axis.legend(fontsize=8)
    figure.tight_layout()
    figure.savefig(target_file, dpi=100)
    plt.close(figure)
    return True


def _running(values, window):
    return [
        sum(values[max(0, i - window + 1) : i + 1]) / len(values[max(0, i - window + 1) : i + 1])
        for i in range(len(values))
    ]


def _rows(log):
    try:
        return [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"{log}: {e}") from None


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nanodiff.charts", description=__doc__.split("\n\n")[0])
    parser.add_argument("chart", choices=["loss"])
    parser.add_argument("log")
    parser.add_argument("target")
    args = parser.parse_args()
    try:
        losses(args.log, args.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
