"""The book's figures and numbers, made by the project's code.      make figures, or: python -m docs.book.figures [--only NAME,…]

A function a figure, named after the chapter. It draws on a matplotlib figure and returns the numbers that the text quotes, as they stand there.
Pictures go to figures/, numbers to numbers.json, and from there into the chapters, between <!--=name.key--> and <!--/-->. Where the answer is
known in closed form the network is one formula (see Mixture), else it is the embedded model.
"""

import argparse
import json
import sys
import tarfile
from functools import partial

import numpy as np
import torch
from PIL import Image, ImageFilter

from docs.book import (
    markdown,
    wrong,  # noqa: F401 (its figures)
)
from docs.book.drawing import (
    BLACK,
    BLUE,
    FIGURES,
    FOLDER,
    GREEN,
    NUMBERS,
    ORANGE,
    PINK,
    PLACE,
    RED,
    ROOT,
    SD,
    Mixture,
    emoji,
    figure,
    guided,
    made,
    nano,
    show,
)
from nanodiff.commandline import tool
from nanodiff.config import UserError, read_json
from nanodiff.diffusion import samplers, schedule
from nanodiff.evaluation import metrics, similarity
from nanodiff.files import out_dir, write_bytes, write_json
from nanodiff.lora import adapters
from nanodiff.models import layers
from nanodiff.output import charts, images
from nanodiff.text import tokenizer

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
        many = made("ddim", 1000, z, bell, prediction_type="v_prediction", **more)[-1] / pixels**0.5
        numbers["zero-1000" if more else "plain-1000"] = f"{many.std():.2f}"
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

    def errors_of(name, spacing):
        off = []
        for n in steps:
            path = made(name, n, z, bell, timestep_spacing=spacing)
            grid = schedule.Schedule.from_config(SD | {"timestep_spacing": spacing}, "EulerDiscreteScheduler")
            sigma = samplers.sigma_grid(grid, n)[1][0]
            first = path[0] * ((1 + sigma**2) ** 0.5 if samplers.SAMPLERS[name].scaled else 1)  # X = x0 + sigma * noise
            exact = mean + width * (first - mean) / (width**2 + sigma**2) ** 0.5
            off.append((path[-1] - exact).abs().max().item())
        key = name if spacing == "linspace" else f"{name}-{spacing}"
        numbers[key], numbers[f"{key}-20"] = f"{np.log2(off[0] / off[2]) / 2:.1f}", f"{off[2]:.3f}"
        return off

    figure, axis = plt.subplots(figsize=(8, 4.4))
    rows = [("ddim", "linspace", RED), ("euler", "linspace", ORANGE), ("dpmpp_2m", "linspace", GREEN), ("heun", "linspace", BLUE),
            ("heun", "trailing", BLACK)]  # fmt: skip
    for (name, spacing, colour), mark in zip(rows, charts.MARKS, strict=False):
        label = name if (name, spacing) != ("heun", "trailing") else "heun, trailing"
        dash = "--" if spacing == "trailing" else "-"
        axis.loglog(steps, errors_of(name, spacing), color=colour, marker=mark, linestyle=dash, label=label)
    for name in ("unipc", "deis", "lms", "kdpm2", "dpmpp_2s"):
        errors_of(name, "linspace")
    for key, kind in (("last", "EulerDiscreteScheduler"), ("last-dpmpp", "DPMSolverMultistepScheduler")):
        sched = schedule.Schedule.from_config(SD | {"timestep_spacing": "linspace"}, kind)
        numbers[key] = f"{samplers.sigma_grid(sched, 20)[1][-2]:.2f}"
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


@figure("04-bells")
def bells(plt):
    """Two bells of which a caption names the right one, and the second is half as often asked for as it is there."""
    every, given = Mixture((-0.4, 0.4), 0.3), Mixture((0.4,), 0.3)
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(8, 3.8))
    numbers = {}
    for scale, colour, dash in zip((0, 1, 3, 7.5), (BLACK, BLUE, ORANGE, RED), charts.DASHES, strict=True):
        x = made("ddim", 100, z, lambda sched, w=scale: guided(w, sched, given, every))[-1].flatten()
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


# -- 5 the UNet ----------------------------------------------------------------------------------------------


@figure("05-times")
def times(plt):
    rows = layers.timestep_embedding(torch.arange(0, 1000, 4), 320)
    alike = rows @ rows.T / (rows.norm(dim=1)[:, None] * rows.norm(dim=1))
    figure, axis = plt.subplots(figsize=(4.6, 3.8))
    drawn = axis.imshow(alike, extent=(0, 1000, 1000, 0), cmap="viridis", vmin=0)
    figure.colorbar(drawn)
    axis.set_xlabel("t")
    axis.set_ylabel("t'")
    return figure, {}


def _without_last(many, module, given):
    """A module's inputs, the last `many` channels of the first one set to 0."""
    x, *more = given
    return torch.cat([x[:, :-many], torch.zeros_like(x[:, -many:])], 1), *more


@figure("05-skips")
def skips(plt):
    """The skip connections are the last channels of what the blocks of the way up are given."""
    sd = nano()
    blocks = [resnet for stage in sd.net.up_blocks for resnet in stage.resnets]  # coarse to fine
    before, pictures = sd.net.mid_block.resnets[-1].conv2.out_channels, [("all", None)]
    for i, block in enumerate(blocks):
        pictures.append((f"without {len(blocks) - i}", (block, block.norm1.num_channels - before)))
        before = block.conv2.out_channels
    figure, axes = plt.subplots(1, 7, figsize=(11, 1.9))
    for axis, (name, cut) in zip(axes.flat, [pictures[0], *pictures[:0:-1]], strict=False):
        hook = None
        if cut:
            hook = cut[0].register_forward_pre_hook(partial(_without_last, cut[1]))
        show(axis, sd.generate("red apple", seeds=[2], steps=20, guidance_scale=3.0).pixels[0], name)
        if hook:
            hook.remove()
    return figure, {}


# -- 6 attention ---------------------------------------------------------------------------------------------


@figure("06-memory")
def memory(plt):
    sides = np.array([16, 32, 64, 96, 128])
    heads, width, size = 8, 320, 2  # Stable Diffusion 1.x's finest level, in 16 bits
    scores, tensors = heads * sides.astype(float) ** 4 * size / 1e6, 4 * sides.astype(float) ** 2 * width * size / 1e6
    figure, axis = plt.subplots(figsize=(8, 3.6))
    axis.loglog(sides, scores, color=RED, marker="s", linestyle="--", label="the scores")
    axis.loglog(sides, tensors, color=BLUE, marker="o", label="q, k, v and o")
    axis.set_xticks(sides, [f"{s}\u00b2" for s in sides])
    axis.xaxis.set_minor_formatter("")
    axis.set_xlabel("latents of one picture")
    axis.set_ylabel("MB of one layer")
    axis.legend(fontsize=10)
    return figure, {"scores": f"{scores[2]:.0f}", "tensors": f"{tensors[2]:.0f}"}


@figure("06-looks")
def looks(plt):
    """The shares of the cross-attention, taken at the layers as the embedded model draws: mean over heads, at half of the way."""
    sd, kept = nano(), {}
    words = "red apple"
    layer = [m for n, m in sd.net.named_modules() if n.endswith("attn2")][-1]

    def watch(module, given):
        x, kv = given
        q, k = module.to_q(x), kv[0]
        q, k = (t.unflatten(-1, (module.heads, -1)).transpose(1, 2) for t in (q, k))
        # [L, S] of the guided half
        kept["shares"] = (q @ k.transpose(-1, -2) / q.shape[-1] ** 0.5).softmax(-1)[-1].mean(0)

    hook, shares = layer.register_forward_pre_hook(watch), []
    picture = sd.generate(
        words, seeds=[2], steps=20, guidance_scale=3.0, on_step=lambda i, n, step: shares.append(kept["shares"])
    ).pixels[0]
    hook.remove()
    at = shares[len(shares) // 2]
    side = int(len(at) ** 0.5)
    figure, axes = plt.subplots(1, 3, figsize=(8, 2.9))
    show(axes[0], picture, words)
    for axis, place, word in zip(axes[1:], (1, 2), words.split(), strict=True):
        axis.imshow(at[:, place].reshape(side, side), cmap="viridis")
        axis.set_title(f"\u201c{word}\u201d", fontsize=11)
        axis.axis("off")
    return figure, {}


@figure("06-online")
def online(plt):
    """Softmax of rows in blocks, the sums corrected when the maximum grows, or not; the error of what is known so far."""
    g = torch.Generator().manual_seed(6)
    scores, values, block = (
        3 * torch.randn(64, 256, generator=g, dtype=torch.float64),
        torch.randn(256, 8, generator=g, dtype=torch.float64),
        16,
    )
    figure, axis = plt.subplots(figsize=(8, 3.6))
    numbers = {}
    for corrected, colour, dash in ((True, BLUE, "-"), (False, RED, "--")):
        m, total, out, errors = torch.full((64, 1), -torch.inf, dtype=torch.float64), 0.0, 0.0, []
        for start in range(0, 256, block):
            s, v = scores[:, start : start + block], values[start : start + block]
            after = torch.maximum(m, s.amax(1, keepdim=True))
            old, p = (m - after).exp() if corrected else torch.ones_like(m), (s - after).exp()
            total, out, m = old * total + p.sum(1, keepdim=True), old * out + p @ v, after
            right = scores[:, : start + block].softmax(1) @ values[: start + block]
            errors.append(((out / total - right).norm() / right.norm()).item())
        axis.semilogy(
            np.arange(1, 17) * block,
            np.maximum(errors, 1e-17),
            color=colour,
            linestyle=dash,
            label=("with" if corrected else "without") + " the correction",
        )
        numbers["right" if corrected else "wrong"] = f"{100 * errors[-1]:.0f}"
    axis.set_xlabel("keys seen")
    axis.set_ylabel("relative error")
    axis.legend(fontsize=10)
    return figure, numbers


# -- 7 GroupNorm ---------------------------------------------------------------------------------------------


@figure("07-variance")
def variance(plt):
    draws = torch.randn(51, 4096, generator=torch.Generator().manual_seed(7), dtype=torch.float64)
    away = np.logspace(0, 5, 11)
    short, chunks = [], []
    for mean in away:  # the median error of the draws: a single one may be lucky
        y = (draws + mean).float()
        right = y.double().var(1, unbiased=False)
        short.append(((y.square().mean(1) - y.mean(1).square()).double() / right - 1).abs().median().item())
        parts = y.unflatten(1, (8, 512))
        near = parts[:, :, :32].mean(2)  # a value near each part's own mean
        d = parts - near[:, :, None]
        means, m2 = near + d.mean(2), d.square().sum(2) - d.sum(2).square() / 512
        joined = (m2.sum(1) + 512 * (means - means.mean(1, keepdim=True)).square().sum(1)) / 4096
        chunks.append((joined.double() / right - 1).abs().median().item())
    figure, axis = plt.subplots(figsize=(8, 3.8))
    axis.loglog(
        away,
        np.maximum(short, 1e-9),
        color=RED,
        marker="s",
        linestyle="--",
        label="mean of squares minus square of the mean",
    )
    axis.loglog(away, np.maximum(chunks, 1e-9), color=BLUE, marker="o", label="chunks around their own means, joined")
    axis.set_xlabel("mean, in standard deviations")
    axis.set_ylabel("relative error (median of 51)")
    axis.legend(fontsize=10)
    return figure, {"percent": f"{100 * short[6]:.0f}"}  # at 1,000


@figure("07-wrong")
def wrong_gradient(plt):
    g = torch.Generator().manual_seed(8)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    figure, axis = plt.subplots(figsize=(5.6, 4.6))
    angles, step = [], 1e-4
    for i in range(60):
        x, weight, dz = draw(16), draw(16), draw(16)
        z = lambda u, w=weight, d=dz: (w * torch.nn.functional.layer_norm(u, u.shape) * d).sum()  # noqa: E731
        u = x.clone().requires_grad_()
        (right,) = torch.autograd.grad(z(u), u)
        naive = weight * dz / x.std(unbiased=False)
        angles.append(torch.rad2deg((right @ naive / right.norm() / naive.norm()).acos()).item())
        for grad, colour, mark in ((naive, RED, "x"), (right, BLUE, "o")):
            promised = step * (grad @ grad).item()
            measured = (z(x + step * grad) - z(x)).item()
            axis.loglog(promised, max(measured, 1e-9), mark, color=colour, markersize=5,
                        label=("mean and deviation held" if mark == "x" else "the whole gradient") if i == 0 else None)  # fmt: skip
    low, high = 3e-4, 3e-2
    axis.plot([low, high], [low, high], color=BLACK, linewidth=0.8)
    axis.set_xlabel("change that the gradient promises")
    axis.set_ylabel("change measured")
    axis.legend(fontsize=10)
    return figure, {"angle": f"{np.mean(angles):.0f}"}


# -- 8 the VAE ----------------------------------------------------------------------------------------------


@figure("08-latents")
def latents(plt):
    sd, pixels = nano(), emoji("red apple")[None]
    with torch.no_grad():
        z = sd.encode_pixels(pixels, torch.zeros)
        back = sd.decode(z)
    figure, axes = plt.subplots(1, 6, figsize=(11, 2.1))
    show(axes[0], pixels[0], "the picture")
    show(axes[1], back[0], "back again")
    for i, axis in enumerate(axes[2:]):
        axis.imshow(z[0, i], cmap="gray")
        axis.set_title(f"channel {i + 1}", fontsize=11)
        axis.axis("off")
    return figure, {}


@figure("08-unscaled")
def unscaled(plt):
    sd, pixels = nano(), emoji("red apple")[None]
    figure, axes = plt.subplots(1, 3, figsize=(6.6, 2.4))
    with torch.no_grad():
        z = sd.encode_pixels(pixels, torch.zeros)
        for axis, factor, name in zip(
            axes, (1.0, 0.18215, 5.49), ("right", "not divided by the scale", "divided twice"), strict=True
        ):
            show(axis, sd.decode(z * factor)[0], name)
    return figure, {}


# -- 9 words -------------------------------------------------------------------------------------------------


@figure("09-pieces")
def pieces(plt):
    with tarfile.open(ROOT / "assets/emoji/emoji.tar") as tar:
        captions = [tar.extractfile(m).read().decode().strip() for m in tar if m.name.endswith(".txt")]
    sizes, means = (520, 600, 700, 900, 1200, 1500), []
    for size in sizes:
        tok = tokenizer.train_bpe(captions, size, 77)
        means.append(float(np.mean([len(tok.pieces(c)) for c in captions])))
    figure, axis = plt.subplots(figsize=(7, 3.4))
    axis.plot(sizes, means, color=BLUE, marker="o")
    axis.set_xlabel("pieces in the vocabulary")
    axis.set_ylabel("pieces of a caption, mean")
    axis.set_ylim(0)
    return figure, {
        "small": str(sizes[0]),
        "large": str(sizes[-1]),
        "small-pieces": f"{means[0]:.1f}",
        "large-pieces": f"{means[-1]:.1f}",
    }


# -- 10 SDXL -------------------------------------------------------------------------------------------------


@figure("10-sizes")
def sizes(plt):
    rows = layers.timestep_embedding(torch.arange(128, 2049, 16), 256)
    alike = rows @ rows.T / (rows.norm(dim=1)[:, None] * rows.norm(dim=1))
    figure, axis = plt.subplots(figsize=(4.6, 3.8))
    figure.colorbar(axis.imshow(alike, extent=(128, 2048, 2048, 128), cmap="viridis", vmin=0))
    axis.set_xlabel("height")
    axis.set_ylabel("another height")
    six = layers.timestep_embedding(torch.tensor([1024, 1024, 0, 0, 1024, 1024]), 256)
    right, exchanged = six.flatten(), six.view(6, 2, 128).transpose(0, 1).flatten()  # all cosines, then all sines
    return figure, {"moved": f"{100 * (right != exchanged).float().mean():.0f}"}


# -- 11 flow matching ----------------------------------------------------------------------------------------


@figure("11-ways")
def ways(plt):
    data, z = Mixture(), torch.linspace(-2, 2, 13, dtype=torch.float64)[:, None]
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.4), sharey=True)
    for axis, (name, title) in zip(axes, (("flow_euler", "the line"), ("ddim", "the circle")), strict=True):
        path = torch.cat(made(name, 50, z, data), 1)
        axis.plot(np.linspace(0, 1, 51), path.T, color=BLUE, linewidth=0.8)
        axis.set_title(title, fontsize=11)
        axis.set_xlabel("from noise to data")
    return figure, {}


@figure("11-shift")
def shift(plt):
    figure, axis = plt.subplots(figsize=(8, 2.6))
    row, numbers = samplers.SAMPLERS["flow_euler"], {}
    for i, (amount, colour) in enumerate(zip((1.0, 3.0, 6.0), (BLUE, ORANGE, RED), strict=True)):
        sched = schedule.Schedule.from_config({"shift": amount}, row.kind)
        sigmas = samplers.flow_sigmas(sched, 20)
        axis.plot(sigmas, [-i] * len(sigmas), "|", color=colour, markersize=18, markeredgewidth=2)
    axis.set_yticks([0, -1, -2], ["shift 1", "shift 3", "shift 6"])
    axis.set_ylim(-2.6, 0.6)
    axis.invert_xaxis()
    axis.set_xlabel("σ, from noise to picture")
    bell, z = Mixture((0.3,), 0.5), torch.linspace(-2, 2, 9, dtype=torch.float64)[:, None]
    for name, amount in (("even", 1.0), ("shifted", 3.0)):
        sched = schedule.Schedule.from_config({"shift": amount}, row.kind)
        end = [step.x for step in row.run(bell(sched), z, sched, 6, None)][-1]
        # the exact way: noise of variance 1 to the bell
        numbers[name] = f"{(end - (0.3 + 0.5 * z)).abs().max().item():.2f}"
    return figure, numbers


# -- 12 LoRA -------------------------------------------------------------------------------------------------


def _learned_change():
    """(the change [64, 64] that a layer has learned from inputs of few directions, one of random numbers of the same length)"""
    g = torch.Generator().manual_seed(12)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)  # noqa: E731
    # data: a few strong directions, many weak ones
    directions = draw(64, 64) * 0.7 ** torch.arange(64, dtype=torch.float64)
    x, goal, change = draw(2000, 64) @ directions.T / 4, draw(64, 64) / 8, torch.zeros(64, 64, dtype=torch.float64)
    for _ in range(100):  # gradient descent towards the goal's outputs
        change -= 0.05 * (x @ (change - goal).T).T @ x / len(x)
    random = draw(64, 64)
    return change, random * change.norm() / random.norm()


@figure("12-rank")
def rank(plt):
    figure, axis = plt.subplots(figsize=(7, 3.6))
    numbers = {}
    for name, change, colour, dash in zip(
        ("learned", "random"), _learned_change(), (BLUE, RED), ("-", "--"), strict=True
    ):
        values = torch.linalg.svdvals(change)
        missing = [(values[r:].norm() / values.norm()).item() for r in range(65)]
        axis.plot(missing, color=colour, linestyle=dash, label=name)
        numbers[name] = f"{100 * missing[8]:.0f}"
    axis.set_xlabel("rank kept, of 64")
    axis.set_ylabel("missing, of its length")
    axis.legend(fontsize=10)
    return figure, numbers


@figure("12-begin")
def begin(plt):
    figure, axis = plt.subplots(figsize=(7, 3.4))
    for name, spread, colour, dash in (("zero", 0.0, BLUE, "-"), ("random", 1.0, RED, "--")):
        torch.manual_seed(3)
        net = torch.nn.Linear(64, 64, bias=False).double()
        x = torch.randn(512, 64, dtype=torch.float64)
        goal = (
            x
            @ (
                net.weight.detach()
                + torch.randn(64, 4, dtype=torch.float64) @ torch.randn(4, 64, dtype=torch.float64) / 32
            ).T
        )
        adapters.adapt(net_ := torch.nn.ModuleDict({"to_q": net}), rank=4)
        net_.double()
        if spread:
            torch.nn.init.normal_(net.lora_B.weight, std=spread)
        optimizer, errors = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=3e-3), []
        for _ in range(300):
            loss = (net(x) - goal).square().mean()
            errors.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        axis.semilogy(errors, color=colour, linestyle=dash, label=f"B begins at {name}")
    axis.set_xlabel("update")
    axis.set_ylabel("squared error")
    axis.legend(fontsize=10)
    return figure, {}


# -- 13 fewer steps ------------------------------------------------------------------------------------------


@figure("13-few")
def few(plt):
    data, z = Mixture(), torch.randn(4000, 1, generator=torch.Generator().manual_seed(13), dtype=torch.float64)
    figure, axes = plt.subplots(1, 4, figsize=(11, 2.4), sharey=True)
    for axis, n in zip(axes, (1, 2, 4, 16), strict=True):
        axis.hist(made("ddim", n, z, data)[-1].flatten(), bins=60, range=(-1.8, 1.8), color=BLUE)
        axis.set_title(f"{n} step{'s' * (n > 1)}", fontsize=11)
        axis.set_yticks([])
    return figure, {}


# -- 14 measuring --------------------------------------------------------------------------------------------


@figure("14-bias")
def bias(plt):
    rng = np.random.default_rng(14)
    counts, fids, kids = (100, 200, 400, 800, 1600, 3200), [], []
    for n in counts:
        a, b = rng.normal(size=(2, n, 64))
        fids.append(metrics.fid(a, b))
        kids.append(metrics.kid(a, b, subsets=20, size=min(n, 800))[0].value)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.4))
    for axis, values, name, colour in zip(axes, (fids, kids), ("FID", "KID"), (RED, BLUE), strict=True):
        axis.semilogx(counts, values, color=colour, marker="o")
        axis.axhline(0, color=BLACK, linewidth=0.8)
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("pictures in each set")
        axis.xaxis.set_minor_formatter("")
        axis.set_xticks(counts, [str(n) for n in counts])
    axes[1].set_ylim(-0.2, 0.2)
    return figure, {"fid-100": f"{fids[0]:.0f}", "fid-3200": f"{fids[-1]:.1f}"}


@figure("14-ssim")
def what_ssim_says(plt):
    picture = np.asarray(images.to_pil(emoji("red apple")[None])[0])
    shifted = np.roll(picture, 2, axis=1)
    blurred = np.asarray(Image.fromarray(picture).filter(ImageFilter.GaussianBlur(1.5)))
    figure, axes = plt.subplots(1, 3, figsize=(7, 2.5))
    numbers = {}
    for axis, name, shown in zip(axes, ("the picture", "shifted", "blurred"), (picture, shifted, blurred), strict=True):
        value = similarity.ssim(similarity.grey(picture), similarity.grey(shown))
        axis.imshow(shown, interpolation="nearest")
        axis.set_title(f"{name}: {value:.2f}", fontsize=11)
        axis.axis("off")
        numbers[name.split()[-1]] = f"{value:.2f}"
    return figure, numbers


# -- 15 a captioner ------------------------------------------------------------------------------------------


@figure("15-cache")
def cache(plt):
    words, before = np.arange(1, 61), 200
    without = np.cumsum(before + words - 1)  # places that go through the network
    kept = before + words - 1
    figure, axis = plt.subplots(figsize=(7, 3.2))
    axis.semilogy(words, without, color=RED, linestyle="--", label="without a cache")
    axis.semilogy(words, kept, color=BLUE, label="with it")
    axis.set_xlabel("words written")
    axis.set_ylabel("places computed")
    axis.legend(fontsize=10)
    return figure, {"words": "60", "ratio": f"{without[-1] / kept[-1]:.0f}"}


# -- 16 systems ----------------------------------------------------------------------------------------------


@figure("16-formats")
def formats(plt):
    x = torch.logspace(-9, 6, 400, dtype=torch.float64)
    figure, axis = plt.subplots(figsize=(8, 3.6))
    for dtype, name, colour, dash in zip(
        (torch.float16, torch.bfloat16, torch.float32),
        ("fp16", "bf16", "fp32"),
        (RED, ORANGE, BLUE),
        charts.DASHES,
        strict=False,
    ):
        info = torch.finfo(dtype)
        gap = (
            torch.maximum(
                info.eps * 2.0 ** x.log2().floor(), torch.tensor(info.smallest_normal * info.eps, dtype=torch.float64)
            )
            / x
        )
        gap[x > info.max] = torch.nan
        axis.loglog(x, gap, color=colour, linestyle=dash, label=name)
    axis.set_xlabel("a number")
    axis.set_ylabel("gap to the next, relative")
    axis.legend(fontsize=10)
    return figure, {"bf16": f"{100 * torch.finfo(torch.bfloat16).eps:.2f}"}


@figure("16-resume")
def resume(plt):
    """The same run three times: through, stopped and resumed whole, stopped and resumed without the optimizer's state."""
    g = torch.Generator().manual_seed(16)
    x = torch.randn(4096, 32, generator=g)
    goal = torch.tanh(x @ torch.randn(32, 8, generator=g) / 4)
    figure, axis = plt.subplots(figsize=(8, 3.4))
    for name, forget, colour, dash in (
        ("never stopped, or resumed whole", False, BLUE, "-"),
        ("without the optimizer's state", True, RED, "--"),
    ):
        torch.manual_seed(0)
        net = torch.nn.Sequential(torch.nn.Linear(32, 64), torch.nn.SiLU(), torch.nn.Linear(64, 8))
        new = lambda n=net: torch.optim.Adam(n.parameters(), lr=1e-2, betas=(0.9, 0.999))  # noqa: E731
        optimizer, errors = new(), []
        for step in range(300):
            if step == 200 and forget:
                optimizer = new()
            rows = torch.from_numpy(np.random.default_rng((16, step)).integers(0, 4096, 256))
            loss = (net(x[rows]) - goal[rows]).square().mean()
            errors.append(loss.item())
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        axis.semilogy(range(150, 300), errors[150:], color=colour, linestyle=dash, label=name)
    axis.set_xlabel("update")
    axis.set_ylabel("loss")
    axis.legend(fontsize=10)
    return figure, {}


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
        write_json(NUMBERS, {known: numbers[known] for known in FIGURES if known in numbers})
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
