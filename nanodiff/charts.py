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


def loss_curve(log, target, window=50):
    """metrics.jsonl -> a picture of the loss: every logged value, its running mean, the learning rate below.

    Returns True when it was written. Raises UserError when the log has no losses.
    """
    try:
        rows = [json.loads(line) for line in Path(log).read_text(encoding="utf-8").splitlines()]
    except (OSError, ValueError) as e:
        raise UserError(f"{log}: {e}") from None
    rows = [r for r in rows if "loss" in r and "lr" in r]
    if not rows:
        raise UserError(f"{log}: no losses in it")
    plt = pyplot()
    if plt is None:
        return False
    steps, losses = [r["step"] for r in rows], [r["loss"] for r in rows]
    means = [
        sum(losses[max(0, i - window + 1) : i + 1]) / len(losses[max(0, i - window + 1) : i + 1])
        for i in range(len(losses))
    ]
    figure, (top, low) = plt.subplots(2, 1, figsize=(7, 4.5), sharex=True, height_ratios=(3, 1))
    top.plot(steps, losses, color="0.8", linewidth=0.6, label="logged loss")
    top.plot(steps, means, color="tab:blue", label=f"mean of {window}")
    top.set_ylabel("loss")
    top.legend()
    low.plot(steps, [r["lr"] for r in rows], color="tab:orange")
    low.set_ylabel("learning rate")
    low.set_xlabel("update")
    figure.tight_layout()
    figure.savefig(target, dpi=100)
    plt.close(figure)
    return True


if __name__ == "__main__":
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nanodiff.charts", description=__doc__.split("\n\n")[0])
    parser.add_argument("chart", choices=["loss"])
    parser.add_argument("log")
    parser.add_argument("target")
    args = parser.parse_args()
    try:
        loss_curve(args.log, args.target)
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
