"""What the book's figures are drawn with: where they are kept, a network that is a formula, the embedded pictures and model."""

import re
import tarfile
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from nanodiff import pipeline
from nanodiff.config import UserError
from nanodiff.diffusion import samplers, schedule
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


def guided(scale, sched, given, every):
    """model(x, t) with classifier-free guidance: `given` answers to the caption, `every` to the empty one; both like Mixture."""
    told, without = given(sched), every(sched)
    return lambda x, t: without(x, t) + scale * (told(x, t) - without(x, t))


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
