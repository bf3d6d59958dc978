"""Figures of what goes wrong, a chapter's each: the right way beside the wrong one."""

import itertools

import numpy as np
import torch
from torch import nn

from docs.book.drawing import BLACK, BLUE, ORANGE, RED, ROOT, Mixture, figure, guided, made, nano, show
from nanodiff.diffusion.schedule import Schedule
from nanodiff.models import layers, llm
from nanodiff.output import charts


@figure("02-row")
def row(plt):
    """The embedded model predicts v; the same weights, read as noise, which at zero SNR would say nothing: so without it, too."""
    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    right, wrong = nano(), nano()
    wrong.schedule = Schedule.from_config(
        wrong.schedule.cfg | {"prediction_type": "epsilon", "rescale_betas_zero_snr": False}, "DDIMScheduler"
    )
    for axes_of, words in zip(axes.reshape(2, 2), ("red apple", "crescent moon"), strict=True):
        for axis, sd, read in zip(axes_of, (right, wrong), ("read as v", "as noise"), strict=True):
            show(axis, sd.generate(words, seeds=[2], steps=25, guidance_scale=3.0).pixels[0].clamp(-1, 1), read)
    return figure, {}


@figure("04-dropout")
def dropout(plt):
    """The bells of 04-bells at the same scales; what stands for the empty caption was never trained: it answers as to some other words."""
    told = Mixture((0.4,), 0.3)
    z = torch.randn(4000, 1, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2), sharey=True)
    numbers = {}
    for axis, name, empty in zip(
        axes, ("trained", "never"), (Mixture((-0.4, 0.4), 0.3), Mixture((0.9,), 0.3)), strict=True
    ):
        for scale, colour, dash in zip((1, 3, 7.5), (BLUE, ORANGE, RED), charts.DASHES, strict=False):
            x = made("ddim", 100, z, lambda sched, w=scale, empty=empty: guided(w, sched, told, empty))[-1].flatten()
            axis.hist(
                x,
                bins=90,
                range=(-4, 2),
                histtype="step",
                color=colour,
                linestyle=dash,
                linewidth=2,
                label=f"w = {scale:g}",
            )
            numbers[f"{name}-{scale:g}"] = f"{x.mean():.1f}"
        axis.axvline(0.4, color=BLACK, linewidth=0.8)
        axis.set_title(f"the empty caption {'was trained' if name == 'trained' else 'was never seen'}", fontsize=11)
        axis.set_yticks([])
        axis.legend(fontsize=9)
    return figure, numbers


@figure("05-order")
def order(plt):
    """The two skips of the finest level, whose sizes and channels are equal, in each other's place."""
    sd = nano()
    first, second = sd.net.up_blocks[-1].resnets
    width, kept = sd.net.conv_in.out_channels, {}

    def turned(module, given):
        x, *more = given
        mine = x[:, -width:]
        kept[module] = mine
        return torch.cat([x[:, :-width], kept["in"] if module is first else kept[first]], 1), *more

    figure, axes = plt.subplots(1, 4, figsize=(9, 2.6))
    for axes_of, words in zip(axes.reshape(2, 2), ("red apple", "crescent moon"), strict=True):
        show(axes_of[0], sd.generate(words, seeds=[2], steps=25, guidance_scale=3.0).pixels[0], "last in, first out")
        hooks = [m.register_forward_pre_hook(turned) for m in (first, second)]
        hooks.append(sd.net.conv_in.register_forward_hook(lambda _, __, out: kept.update({"in": out})))
        show(axes_of[1], sd.generate(words, seeds=[2], steps=25, guidance_scale=3.0).pixels[0], "one level turned")
        for hook in hooks:
            hook.remove()
    return figure, {}


def merged(word, ranks, by_rank=True):
    """The pieces of a word by a table of merges {pair: rank}: the earliest merge of the table first, or from left to right."""
    parts = [*word[:-1], word[-1] + "</w>"]
    while found := [
        (ranks[pair] if by_rank else i, i) for i, pair in enumerate(itertools.pairwise(parts)) if pair in ranks
    ]:
        i = min(found)[1]
        parts[i : i + 2] = [parts[i] + parts[i + 1]]
    return [p.removesuffix("</w>") for p in parts]


@figure("09-order")
def merge_order(plt):
    lines = (ROOT / "assets/clip/merges.txt").read_text(encoding="utf-8").splitlines()
    pairs = [tuple(line.split()) for line in lines if len(line.split()) == 2 and not line.startswith("#")]
    ranks = {pair: i for i, pair in enumerate(pairs)}
    words = ("apples", "banana", "butterfly", "mountain", "telescope")
    figure, axis = plt.subplots(figsize=(9, 3.2))
    for y, word in enumerate(words):
        for x, by_rank in ((0, True), (11, False)):
            at = x
            for piece in merged(word, ranks, by_rank):
                axis.add_patch(
                    plt.Rectangle(
                        (at + 0.05, -y - 0.36), len(piece) - 0.1, 0.72, fill=False, edgecolor=BLUE if by_rank else RED
                    )
                )
                axis.text(at + len(piece) / 2, -y, piece, ha="center", va="center", fontsize=11, family="monospace")
                at += len(piece)
    axis.text(0, 0.75, "in the order in which they were learned", fontsize=11)
    axis.text(11, 0.75, "from left to right", fontsize=11)
    axis.set_xlim(-0.2, 21)
    axis.set_ylim(-len(words) + 0.4, 1.2)
    axis.axis("off")
    last = ["".join(pair) for pair in pairs[-20_000:]]
    whole = [p.removesuffix("</w>") for p in last if p.endswith("</w>") and p.removesuffix("</w>").isalpha()][:4000]
    other = sum(merged(w, ranks) != merged(w, ranks, False) for w in whole)
    return figure, {"share": f"{100 * other / len(whole):.0f}", "words": f"{len(whole):,}"}


@figure("10-joined")
def joined(plt):
    six = layers.timestep_embedding(torch.tensor([1024, 1024, 0, 0, 1024, 1024]), 256)
    right, wrong = six.flatten(), six.view(6, 2, 128).transpose(0, 1).flatten()
    figure, axes = plt.subplots(1, 2, figsize=(10, 2.6), sharey=True)
    for axis, values, name in zip(
        axes, (right, wrong), ("number by number", "all cosines, then all sines"), strict=True
    ):
        axis.imshow(values.view(6, 256), aspect="auto", cmap="RdBu", vmin=-1, vmax=1, interpolation="nearest")
        axis.set_title(name, fontsize=11)
        axis.set_xlabel("value of 256")
    axes[1].tick_params(labelleft=False)  # its rows are of all six together
    axes[0].set_yticks(range(6), ["height", "width", "top", "left", "to height", "to width"])
    return figure, {}


def _student(held, stopped=True, updates=600):
    """(loss of every update, what it draws in one step from 2,000 noises) of a consistency student on the two bells. held: its answer at the last
    time is the point itself. stopped: the target has no gradient."""
    torch.manual_seed(13)
    data = Mixture()
    net = nn.Sequential(nn.Linear(2, 64), nn.Tanh(), nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 1)).double()
    optimizer = torch.optim.Adam(net.parameters(), lr=2e-3)

    def answer(x, s):
        out = net(torch.cat([x, s], 1))
        return x - s * out if held else out

    times, losses = torch.linspace(1, 0, 19, dtype=torch.float64), []
    for _ in range(updates):
        x0 = data.means[torch.randint(2, (256,))][:, None] + data.width * torch.randn(256, 1, dtype=torch.float64)
        i = torch.randint(18, (256,))
        s, u = times[i][:, None].clamp(max=1 - 1e-4), times[i + 1][:, None]
        x = (1 - s) * x0 + s * torch.randn_like(x0)
        clean = _clean(data, x, s)
        near = x + (u - s) * (x - clean) / s  # the teacher's step: along its velocity
        want = answer(near, u)
        want = want.detach() if stopped else want
        loss = (answer(x, s) - want).square().mean()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    z = torch.randn(2000, 1, dtype=torch.float64)
    with torch.no_grad():
        return losses, answer(z, torch.ones_like(z)).flatten()


def _clean(data, x, s):
    """Mixture.clean with a time for every row."""
    a = 1 - s
    total = a * a * data.width**2 + s * s
    likely = (data.weights.log() - (x - a * data.means) ** 2 / (2 * total)).softmax(1)
    return (likely * (data.means + a * data.width**2 / total * (x - a * data.means))).sum(1, keepdim=True)


@figure("13-held")
def held(plt):
    figure, axes = plt.subplots(1, 2, figsize=(10, 3.2))
    numbers = {}
    for name, how, colour, label in (
        ("held", (True,), BLUE, "the end is held"),
        ("free", (False, False), RED, "nothing is"),
    ):
        losses, drawn = _student(*how)
        smooth = np.convolve(losses, np.ones(20) / 20, "valid")
        axes[0].semilogy(smooth, color=colour, label=label)
        axes[1].hist(drawn, bins=80, range=(-1.8, 1.8), color=colour, alpha=0.7, label=label)
        numbers[f"{name}-loss"] = f"{smooth[-1]:.0e}".replace("e-0", "e-")
        numbers[f"{name}-std"] = f"{drawn.std():.2f}"
    numbers["drifts"] = f"{_student(False)[1].std():.0f}"
    axes[0].set_xlabel("updates")
    axes[0].set_title("loss", fontsize=11)
    axes[0].legend(fontsize=9)
    axes[1].set_title("what is drawn in one step", fontsize=11)
    axes[1].set_yticks([])
    return figure, numbers


class _Forgetful(llm.Cache):
    """A cache whose new words all stand at place 0."""

    def read(self, B, L, mask, device):
        mask, places = super().read(B, L, mask, device)
        return mask, places * (L > 1)


@figure("15-place")
def place(plt):
    torch.manual_seed(15)
    cfg = llm.Config(
        vocab_size=300,
        hidden_size=64,
        intermediate_size=128,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=16,
    )
    net, text, prompt = llm.CausalLM(cfg).eval(), torch.randint(300, (1, 28)), 8
    figure, axis = plt.subplots(figsize=(7, 3.2))
    numbers = {}
    for name, p in net.named_parameters():
        if "q_proj" in name or "k_proj" in name:
            p.data *= 4  # as a trained one, it looks at some words more than at others
    with torch.no_grad():
        whole = net(text)[0, prompt - 1 :].double()
        for name, kind, colour, dash in (("right", llm.Cache, BLUE, "-"), ("again", _Forgetful, RED, "--")):
            cache = kind(cfg, 28)
            rows = [net(text[:, :prompt], cache=cache)[0, -1]]
            rows += [net(text[:, i : i + 1], cache=cache)[0, -1] for i in range(prompt, 28)]
            error = (torch.stack(rows).double() - whole).norm(dim=1) / whole.norm(dim=1)
            axis.semilogy(range(1, len(error) + 1), error.clamp(min=1e-9), color=colour, linestyle=dash, marker="o", markersize=3,
                          label="at its place" if name == "right" else "counted from 0 again")  # fmt: skip
            numbers[f"{name}-2"] = f"{100 * error[1]:.0f}"
    axis.set_xlabel("word")
    axis.set_ylabel("relative error of its scores")
    axis.legend(fontsize=10)
    return figure, numbers
