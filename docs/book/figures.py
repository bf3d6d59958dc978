"""The book's figures and numbers, made by the project's code.      make figures, or: python -m docs.book.figures [--only NAME,…]

A function a figure, named after the chapter. It draws on a matplotlib figure and returns the numbers that the text quotes, as they stand there.
Pictures go to figures/, numbers to numbers.json, and from there into the chapters, between <!--=name.key--> and <!--/-->. Where the answer is
known in closed form the network is one formula (see Mixture), else it is the embedded model.
"""

import argparse
import json
import re
import sys
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from docs.book import markdown
from nanodiff import pipeline
from nanodiff.config import UserError, read_json, tool
from nanodiff.diffusion import samplers, schedule
from nanodiff.files import out_dir, write_bytes, write_json
from nanodiff.output import charts, images

FOLDER = Path(__file__).parent
ROOT = FOLDER.parents[1]
NUMBERS = FOLDER / "numbers.json"
PLACE = re.compile(r"<!--=([\w.-]+)-->(.*?)<!--/-->")
FIGURES = {}  # name: function(plt) -> (figure, {key: text})
BLUE, ORANGE, GREEN, PINK, RED, SKY, BLACK = charts.PALETTE

SD = {"num_train_timesteps": 1000, "beta_schedule": "scaled_linear", "beta_start": 0.00085, "beta_end": 0.012,
      "clip_sample": False}  # Stable Diffusion's  # fmt: skip


def figure(name):
    """Decorator: the figure `name` of the book."""

    def keep(draw):
        FIGURES[name] = draw
        return draw

    return keep


# -- what is known in closed form ----------------------------------------------------------------------------


class Mixture:
    """Numbers drawn from a few narrow bells: the best possible network for them is a formula (Bayes' rule), in float64.

    mixture(schedule)(x, t) -> the prediction of the schedule's kind, the mean over all data that could have become x.
    """

    def __init__(self, means=(-1.0, 1.0), width=0.15, weights=None):
        self.means = torch.tensor(means, dtype=torch.float64)
        self.width = width
        self.weights = torch.full_like(self.means, 1 / len(means)) if weights is None else torch.tensor(weights)

    def clean(self, x, a, s):
        """E[x0 | x] where x = a x0 + s ε; x [B, 1], a and s numbers."""
        total = a * a * self.width**2 + s * s  # the variance of x around each bell's middle
        likely = (self.weights.log() - (x - a * self.means) ** 2 / (2 * total)).softmax(1)  # [B, bells]
        each = self.means + a * self.width**2 / total * (x - a * self.means)
        return (likely * each).sum(1, keepdim=True)

    def __call__(self, sched):
        def model(x, t):
            like = x if torch.is_tensor(x) else torch.tensor(x)
            if sched.flow:
                a, s = 1 - float(t) / sched.T, float(t) / sched.T
            else:
                abar = float(np.interp(float(t), np.arange(sched.T), sched.alphas_cumprod.double().numpy()))
                a, s = abar**0.5, (1 - abar) ** 0.5
            x0 = self.clean(like, a, s)
            eps = (like - a * x0) / s
            return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[sched.prediction]

        return model


def made(name, n, x, model, raw=SD, **more):
    """What a sampler makes of the noise x [B, 1] in n steps."""
    row = samplers.SAMPLERS[name]
    fields = {"shift": 1.0} if name.startswith("flow") else raw | {"timestep_spacing": "trailing"} | more
    sched = schedule.Schedule.from_config(fields, row.kind, **row.fields)
    g = torch.Generator().manual_seed(0)
    draw = lambda: torch.randn(x.shape, generator=g, dtype=torch.float64)  # noqa: E731
    path = [samplers.begin(sched, n, x)]
    path += [step.x for step in row.run(model(sched), path[0], sched, n, draw)]
    return path


def emoji(name):
    """A picture of the embedded set by its caption's words, [3, 64, 64] in [-1, 1]."""
    with tarfile.open(ROOT / "assets/emoji/emoji.tar") as tar:
        for member in tar:
            if member.name.endswith(".txt") and tar.extractfile(member).read().decode().strip() == name:
                stem = member.name.removesuffix(".txt")
                found = next(
                    m for m in tar.getmembers() if m.name.startswith(stem + ".") and not m.name.endswith(".txt")
                )
                pixels = np.asarray(Image.open(tar.extractfile(found)).convert("RGB"), np.float32)
                return torch.from_numpy(pixels).permute(2, 0, 1) / 127.5 - 1
    raise UserError(f"the embedded set has no {name!r}")


def nano():
    return pipeline.load(str(ROOT / "assets/nano"))


def show(axis, picture, title=""):
    """A picture [3, H, W] in [-1, 1]."""
    axis.imshow(np.asarray(images.to_pil(picture[None].float())[0]), interpolation="nearest")
    axis.set_title(title, fontsize=11)
    axis.axis("off")


# -- 1 noise -------------------------------------------------------------------------------------------------


@figure("01-noising")
def noising(plt):
    sched = schedule.Schedule.from_config(SD, "DDIMScheduler")
    x0 = emoji("red apple")[None]
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(0))
    times = (0, 100, 250, 500, 750, 999)
    figure, axes = plt.subplots(1, len(times), figsize=(11, 2.3))
    for axis, t in zip(axes, times, strict=True):
        show(axis, sched.add_noise(x0, noise, torch.tensor([t]))[0], f"t = {t}\nᾱ = {sched.alpha_bar(t):.3f}")
    return figure, {"half": str(int((sched.alphas_cumprod < 0.5).nonzero()[0])), "last": f"{sched.alpha_bar(999):.4f}"}


@figure("01-schedules")
def schedules(plt):
    figure, axis = plt.subplots(figsize=(8, 4))
    kinds = {"linear": {"beta_schedule": "linear", "beta_start": 1e-4, "beta_end": 0.02}, "scaled_linear": SD,
             "squaredcos_cap_v2": {"beta_schedule": "squaredcos_cap_v2"}}  # fmt: skip
    numbers = {}
    for (name, raw), colour, dash in zip(kinds.items(), (BLUE, ORANGE, GREEN), charts.DASHES, strict=False):
        sched = schedule.Schedule.from_config(SD | raw, "DDIMScheduler")
        axis.plot(sched.alphas_cumprod.sqrt(), color=colour, linestyle=dash, label=name)
        numbers[f"{name}-half"] = str(int((sched.alphas_cumprod < 0.5).nonzero()[0]))
    axis.plot(1 - torch.arange(1000) / 1000, color=PINK, linestyle="-.", label="flow matching")
    axis.set_xlabel("timestep t")
    axis.set_ylabel("how much picture is left, a")
    axis.legend(fontsize=10)
    return figure, numbers


@figure("01-brightness")
def brightness(plt):
    """Pictures that are one grey each, of brightness N(0, ½²). Along the direction "all pixels alike" such a set is a bell of standard deviation
    ½·√pixels, and so is what a perfect network makes of noise."""
    pixels = 64 * 64
    spread = 0.5 * pixels**0.5
    bell = Mixture((0.0,), spread)
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(8, 3.6))
    numbers = {}
    cases = {"as Stable Diffusion 1.5": {}, "with zero terminal SNR": {"rescale_betas_zero_snr": True}}
    for (name, more), colour, dash in zip(cases.items(), (RED, BLUE), ("--", "-"), strict=True):
        grey = (made("ddim", 50, z, bell, prediction_type="v_prediction", **more)[-1] / pixels**0.5).flatten()
        axis.hist(
            grey,
            bins=60,
            range=(-2, 2),
            histtype="step",
            color=colour,
            linestyle=dash,
            linewidth=2,
            label=f"drawn {name}",
        )
        numbers["zero" if more else "plain"] = f"{grey.std():.2f}"
    x = np.linspace(-2, 2, 200)
    axis.plot(
        x, 4000 * 4 / 60 * np.exp(-2 * x**2) / (0.5 * (2 * np.pi) ** 0.5), color=BLACK, linewidth=1, label="the data"
    )
    axis.set_xlabel("brightness of the picture, 0 is medium grey")
    axis.set_yticks([])
    axis.legend(fontsize=9)
    sched = schedule.Schedule.from_config(SD, "DDIMScheduler")
    return figure, numbers | {"left": f"{sched.alpha_bar(999) ** 0.5:.3f}"}


# -- 2 what the network predicts -----------------------------------------------------------------------------


@figure("02-errors")
def errors(plt):
    sched = schedule.Schedule.from_config(SD, "DDIMScheduler")
    a, s = sched.alphas_cumprod.sqrt(), (1 - sched.alphas_cumprod).sqrt()
    one, zero = torch.ones(1000), torch.zeros(1000)
    figure, axis = plt.subplots(figsize=(8, 4))
    for kind, colour, dash in zip(
        ("epsilon", "sample", "v_prediction"), (RED, BLUE, GREEN), charts.DASHES, strict=False
    ):
        moved = schedule.split(kind, one, zero, a, s)[0].abs()  # the map is linear: what an error of 1 does to x0
        axis.semilogy(moved, color=colour, linestyle=dash, label=f"{kind}: error of x0 for an error of 1")
    axis.set_xlabel("timestep t")
    axis.legend(fontsize=10)
    worst = (s / a)[-1].item()
    return figure, {"worst": f"{worst:.1f}", "middle": f"{(s / a)[500].item():.1f}"}


@figure("02-guesses")
def guesses(plt):
    sd = nano()
    pixels = emoji("red apple")[None]
    x0 = sd.encode_pixels(pixels, torch.zeros)
    noise = torch.randn(x0.shape, generator=torch.Generator().manual_seed(3))
    times = (100, 400, 700, 900, 999)
    text = sd.encode(["red apple"])
    model = sd.denoiser(text, None, 1.0)
    figure, axes = plt.subplots(2, len(times), figsize=(10, 4.4))
    with torch.no_grad():
        for (above, below), t in zip(axes.T, times, strict=True):
            x = sd.schedule.add_noise(x0, noise, torch.tensor([t]))
            guess, _ = sd.schedule.to_x0_eps(model(x, t), x, torch.tensor([t]))
            show(above, sd.decode(x)[0], f"t = {t}")
            show(below, sd.decode(guess)[0])
    return figure, {}


# -- 3 samplers ----------------------------------------------------------------------------------------------


@figure("03-orders")
def orders(plt):
    """A single bell: the exact way from noise to data is a straight scaling around the mean, so every error is known."""
    mean, width, z = 0.3, 0.5, torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    bell, steps, numbers = Mixture((mean,), width), (5, 10, 20, 40), {}
    figure, axis = plt.subplots(figsize=(8, 4.4))
    rows = [("ddim", "linspace", RED), ("euler", "linspace", ORANGE), ("dpmpp_2m", "linspace", GREEN), ("heun", "linspace", BLUE),
            ("heun", "trailing", BLACK)]  # fmt: skip
    for (name, spacing, colour), mark in zip(rows, charts.MARKS, strict=False):
        off = []
        for n in steps:
            path = made(name, n, z, bell, timestep_spacing=spacing)
            row = samplers.SAMPLERS[name]
            sigma = samplers.sigma_grid(
                schedule.Schedule.from_config(SD | {"timestep_spacing": spacing}, "EulerDiscreteScheduler"), n
            )[1][0]
            first = path[0] * ((1 + sigma**2) ** 0.5 if row.scaled else 1)  # X = x0 + sigma * noise
            exact = mean + width * (first - mean) / (width**2 + sigma**2) ** 0.5
            off.append((path[-1] - exact).abs().max().item())
        label = name if (name, spacing) != ("heun", "trailing") else "heun, trailing"
        axis.loglog(
            steps, off, color=colour, marker=mark, linestyle="--" if spacing == "trailing" else "-", label=label
        )
        key = name if spacing == "linspace" else f"{name}-{spacing}"
        numbers[key], numbers[f"{key}-20"] = f"{np.log2(off[0] / off[2]) / 2:.1f}", f"{off[2]:.3f}"
    axis.set_xticks(steps, [str(n) for n in steps])
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("steps")
    axis.set_ylabel("largest error at the end")
    axis.legend(fontsize=10)
    return figure, numbers


@figure("03-paths")
def paths(plt):
    data, z = Mixture(), torch.linspace(-2, 2, 13, dtype=torch.float64)[:, None]
    figure, axes = plt.subplots(1, 3, figsize=(11, 3.4), sharey=True)
    for axis, (name, n) in zip(axes, (("ddim", 200), ("ddim", 5), ("ddpm", 200)), strict=True):
        path = torch.cat(made(name, n, z, data), 1)
        axis.plot(np.linspace(0, 1, n + 1), path.T, color=BLUE, linewidth=0.8)
        axis.set_title(f"{name}, {n} steps", fontsize=11)
        axis.set_xlabel("from noise to data")
    return figure, {}


@figure("03-no-noise")
def no_noise(plt):
    """DDPM as it is, and with the line that adds fresh noise left out."""
    bell, z = (
        Mixture((0.3,), 0.5),
        torch.randn(4000, 1, generator=torch.Generator().manual_seed(4), dtype=torch.float64),
    )
    row = samplers.SAMPLERS["ddpm"]
    sched = schedule.Schedule.from_config(SD | {"timestep_spacing": "trailing"}, row.kind)
    figure, axis = plt.subplots(figsize=(8, 3.4))
    numbers = {}
    g = torch.Generator().manual_seed(5)
    fresh = lambda: torch.randn(z.shape, generator=g, dtype=torch.float64)  # noqa: E731
    for name, noise, colour, dash in (("with", fresh, BLUE, "-"), ("without", lambda: torch.zeros_like(z), RED, "--")):
        x = [step.x for step in row.run(bell(sched), z, sched, 200, noise)][-1].flatten()
        axis.hist(
            x,
            bins=80,
            range=(-1.5, 2),
            histtype="step",
            color=colour,
            linestyle=dash,
            linewidth=2,
            label=f"{name} fresh noise",
        )
        numbers[name] = f"{x.std():.2f}"
    axis.set_yticks([])
    axis.set_xlabel("what is drawn; the data have standard deviation 0.5")
    axis.legend(fontsize=10)
    return figure, numbers


# -- 4 guidance ----------------------------------------------------------------------------------------------


def _guided(scale, sched, given, every):
    def model(x, t):
        without, told = every(sched)(x, t), given(sched)(x, t)
        return without + scale * (told - without)

    return model


@figure("04-bells")
def bells(plt):
    """Two bells of which a caption names the right one, and the second is half as often asked for as it is there."""
    every, given = Mixture((-0.4, 0.4), 0.3), Mixture((0.4,), 0.3)
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(8, 3.8))
    numbers = {}
    for scale, colour, dash in zip((0, 1, 3, 7.5), (BLACK, BLUE, ORANGE, RED), charts.DASHES, strict=True):
        x = made("ddim", 100, z, lambda sched, w=scale: _guided(w, sched, given, every))[-1].flatten()
        axis.hist(
            x,
            bins=80,
            range=(-1.5, 2),
            histtype="step",
            color=colour,
            linestyle=dash,
            linewidth=2,
            label=f"w = {scale:g}",
        )
        numbers[f"mean-{scale:g}"], numbers[f"std-{scale:g}"] = f"{x.mean():.2f}", f"{x.std():.2f}"
    axis.set_yticks([])
    axis.set_xlabel("what is drawn")
    axis.legend(fontsize=10)
    return figure, numbers


@figure("04-scales")
def scales(plt):
    sd, numbers = nano(), {}
    figure, axes = plt.subplots(2, 5, figsize=(10, 4.3))
    for row, words in zip(axes, ("red apple", "crescent moon"), strict=True):
        for axis, scale in zip(row, (1, 2, 4, 8, 16), strict=True):
            pixels = sd.generate(words, seeds=[2], steps=25, guidance_scale=float(scale)).pixels[0]
            show(axis, pixels, f"w = {scale}")
            if words == "red apple":
                numbers[f"std-{scale}"] = f"{pixels.std():.2f}"
    return figure, numbers


# -- what came of it -----------------------------------------------------------------------------------------


def fill(text, numbers):
    """A chapter's text with its quoted numbers as they are in {figure: {key: text}}. Raises UserError for one that is not there."""

    def now(m):
        name, _, key = m[1].partition(".")
        if key not in numbers.get(name, {}):
            raise UserError(f"{m[1]}: no such number")
        return f"<!--={m[1]}-->{numbers[name][key]}<!--/-->"

    return PLACE.sub(now, text)


def run(args):
    names = args.only.split(",") if args.only else list(FIGURES)
    if unknown := [n for n in names if n not in FIGURES]:
        raise UserError(f"--only {unknown[0]}: is none of {', '.join(FIGURES)}")
    plt = charts.pyplot()
    if plt is None:
        return 1
    plt.rcParams.update({"font.size": 12, "axes.spines.top": False, "axes.spines.right": False})
    numbers = read_json(NUMBERS) if NUMBERS.exists() else {}
    for name in names:
        drawn, numbers[name] = FIGURES[name](plt)
        charts.saved(plt, drawn, out_dir(FOLDER / "figures") / f"{name}.png")
        print(f"{name}: {json.dumps(numbers[name], ensure_ascii=False)}", flush=True)
    write_json(NUMBERS, {name: numbers[name] for name in FIGURES if name in numbers})
    for chapter in markdown.chapters(FOLDER):
        text = chapter.read_text(encoding="utf-8")
        if (filled := fill(text, numbers)) != text:
            write_bytes(chapter, filled.encode())
    return 0


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", help="comma-separated names of figures: " + ", ".join(FIGURES))
    args = parser.parse_args()
    return tool(lambda: run(args))


if __name__ == "__main__":
    sys.exit(main())
