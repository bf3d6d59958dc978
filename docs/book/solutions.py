"""The exercises' solutions: the project's own functions, called as the exercises say.

SOLUTIONS[chapter][exercise] = (function, where the project has it)
"""

import json
from types import SimpleNamespace

import numpy as np
import tokenizers
import torch

import kernels
from kernels.attention import attention_reference
from kernels.group_norm import group_norm_reference
from kernels.norms import qk_norm_rope_reference
from nanodiff import files
from nanodiff.diffusion import fewstep, objective, samplers, schedule
from nanodiff.evaluation import metrics
from nanodiff.evaluation.metrics import Moments
from nanodiff.lora import format as lora_format
from nanodiff.lora import reading, running, tools
from nanodiff.models import layers, llm, vae
from nanodiff.pipeline import conditions
from nanodiff.pipeline.guidance import Guidance
from nanodiff.pipeline.sdxl import SDXL
from nanodiff.text import prompt, textgen, tokenizer
from nanodiff.training import loader

SCHEDULE, SAMPLERS, GUIDANCE = (
    "nanodiff/diffusion/schedule.py",
    "nanodiff/diffusion/samplers.py",
    "nanodiff/pipeline/guidance.py",
)
FEWSTEP = "nanodiff/diffusion/fewstep.py"
ATTENTION, FORWARD = "kernels/attention.py", "kernels/attention_forward.py"
GROUP_NORM, TOKENIZER = "kernels/group_norm.py", "nanodiff/text/tokenizer.py"


def _schedule(alpha_bar, **fields):
    """A Schedule with these values of alpha_bar (a tensor [N] in (0, 1))."""
    raw = {"num_train_timesteps": len(alpha_bar), "prediction_type": "epsilon"} | fields
    sched = schedule.Schedule.from_config(raw, "DDPMScheduler")
    sched.alphas_cumprod = alpha_bar
    return sched


def add_noise(x0, noise, alpha_bar):
    return _schedule(alpha_bar).add_noise(x0, noise, torch.arange(len(alpha_bar)))


def scaled_linear(n, start, end):
    cfg = {
        "num_train_timesteps": n,
        "beta_start": start,
        "beta_end": end,
        "beta_schedule": "scaled_linear",
        "trained_betas": None,
    }
    return (1 - schedule.betas_of(cfg)).cumprod(0)


def zero_terminal_snr(alpha_bar):
    before = torch.cat([torch.ones(1, dtype=alpha_bar.dtype), alpha_bar[:-1]])
    return (1 - schedule.zero_terminal_snr(1 - alpha_bar / before)).cumprod(0)


def to_x0_eps(kind, p, x, a, s):
    return schedule.split(kind, p, x, a, s)


def v_target(x0, eps, alpha_bar):
    sched = _schedule(torch.tensor([alpha_bar], dtype=x0.dtype), prediction_type="v_prediction")
    return sched.target(x0[None], eps[None], torch.zeros(1, dtype=torch.long))[0]


def angle(alpha_bar):
    return alpha_bar.sqrt().acos()


def min_snr_weight(kind, alpha_bar, gamma):
    return objective.weight(_schedule(alpha_bar, prediction_type=kind), torch.arange(len(alpha_bar)), gamma)


def _step(name, answer, x, bars, noise, **fields):
    """One step of a sampler from bars[0] to bars[1], where the network's answer is known."""
    sched = _schedule(
        torch.tensor([bars[1], bars[0]], dtype=torch.float64), clip_sample=False, timestep_spacing="linspace", **fields
    )
    run = samplers.SAMPLERS[name].run
    return next(run(lambda x, t: answer, x, sched, 2, noise)).x


def ddim_step(x0, eps, alpha_bar_next):
    here = 0.5 * alpha_bar_next  # any noisier place on the way through x0 and eps
    sched = schedule.Schedule.from_config(
        {"num_train_timesteps": 2, "clip_sample": False, "timestep_spacing": "linspace"}, "DDIMScheduler"
    )
    sched.alphas_cumprod = torch.tensor([alpha_bar_next, here], dtype=torch.float64)
    x = here**0.5 * x0 + (1 - here) ** 0.5 * eps
    return next(samplers.ddim(lambda x, t: eps, x, sched, 2, None)).x


def _sigma_space(name, slope, x, sigmas):
    """A σ-space sampler on any slope: a network whose guess is X - σ·slope, on a schedule with these σ."""
    row = samplers.SAMPLERS[name]
    bars = torch.tensor([1 / (s * s + 1) for s in reversed(sigmas[:-1])], dtype=torch.float64)
    sched = schedule.Schedule.from_config({"num_train_timesteps": len(bars), "timestep_spacing": "linspace"}, row.kind)
    sched.alphas_cumprod = bars
    model = lambda x, t: slope(x * (1 + sigmas[-2 - round(t)] ** 2) ** 0.5, sigmas[-2 - round(t)])  # noqa: E731
    return [step.x for step in row.run(model, x, sched, len(bars), None)][-1]


def euler(slope, x, sigmas):
    return _sigma_space("euler", slope, x, sigmas)


def heun(slope, x, sigmas):
    return _sigma_space("heun", slope, x, sigmas)


def ddpm_step(x, x0, alpha_bar, alpha_bar_next, z):
    return _step("ddpm", x0, x, (alpha_bar, alpha_bar_next), lambda: z, prediction_type="sample")


class _Answers(Guidance):
    """A pipeline whose network is known: the two answers, whatever it is asked."""

    packs = replays = False
    device, dtype = torch.device("cpu"), torch.float64
    net = torch.nn.Identity()

    def __init__(self, without, with_text):
        self.both = torch.cat([without, with_text])

    def joined(self, texts):
        return type("Text", (), {"states": self.both, "pooled": None})

    def condition(self, text, sizes, guided):
        return ()

    def shifts(self, times, added=None):
        return {}

    def replayed(self, rows):
        return lambda x, t: self.both


def _answer(without, with_text, scale, rescale=0.0):
    model = _Answers(without, with_text).denoiser(None, "", scale, rescale)
    return model(torch.zeros_like(without), 0).to(without.dtype)


def guided(without, with_text, scale):
    return _answer(without, with_text, scale)


def rescaled(out, with_text, rescale):
    return _answer(out, with_text, 0.0, rescale)  # at scale 0 what is guided is `out`


def guided_bell(x, sigma, means, width, wanted, scale):
    from docs.book.drawing import Mixture

    guess = lambda some: Mixture(some, width).clean(x[:, None], 1.0, sigma)[:, 0]  # noqa: E731
    without, told = guess(tuple(means.tolist())), guess((means[wanted].item(),))
    return without + scale * (told - without)


def time_embedding(t, dim):
    return layers.timestep_embedding(t, dim)


def resnet(x, shift, norm1, conv1, norm2, conv2, shortcut=None):
    block = layers.ResnetBlock(conv1.in_channels, conv1.out_channels, 1, 1e-5)
    block.norm1, block.conv1, block.conv2, block.conv_shortcut = norm1, conv1, conv2, shortcut
    shifted = lambda h, t: norm2(h if t is None else h + t[:, :, None, None])  # noqa: E731
    block.norm2 = _Called(shifted)
    return block(x, shift=shift + conv1.bias)


class _Called(torch.nn.Module):
    def __init__(self, function):
        super().__init__()
        self.forward = function


def u(x, down, middle, up):
    """The order of UNet2DConditionModel.forward, without its tensors."""
    kept = []
    for level in down:
        for block in level:
            x = block(x)
            kept.append(x)
    x = middle(x)
    for block in up:
        x = block(x, kept.pop())
    return x


def attention(q, k, v):
    return attention_reference(q[:, :, None], k[:, :, None], v[:, :, None])[0][:, :, 0]


def _kernel(function, *tensors, **options):
    """A kernel of the project on these tensors in 32 bits, by Triton's interpreter where there is no GPU; back in their type."""
    with kernels.backend("triton"):
        out = function(*(t.float() for t in tensors), **options)
    return out.to(tensors[0].dtype)


def _shares(rows, values):
    """softmax(rows) @ values by the attention kernel: the queries are the rows, the keys the unit vectors."""
    S = rows.shape[1]
    wide = torch.nn.functional.pad(values, (0, S - values.shape[1]))  # values as wide as the queries
    q, k, v = (t[None, :, None].contiguous() for t in (rows, torch.eye(S, dtype=rows.dtype), wide))
    return _kernel(kernels.attention, q, k, v, scale=1.0)[0, :, 0, : values.shape[1]]


def online_softmax(scores, values, block):
    return _shares(scores, values)


def softmax_rows(x):
    return _shares(x, torch.eye(x.shape[1], dtype=x.dtype))


def group_norm(x, groups, weight, bias, eps):
    return group_norm_reference(x, groups, weight, bias, eps)


def joined(counts, means, m2s):
    total = Moments()
    for count, mean, m2 in zip(counts.tolist(), means.tolist(), m2s.tolist(), strict=True):
        part = Moments()
        part.n, part.shift, part.sum, part.outer = count, np.array([mean]), np.zeros(1), np.array([[m2]])
        total.merge(part)
    m2 = total.covariance.item() * (total.n - 1)
    return torch.tensor(total.mean.item(), dtype=means.dtype), torch.tensor(m2, dtype=means.dtype)


def backward(x, weight, dz, eps):
    """By the kernel's backward pass: one picture, one group, a pixel a channel."""
    given = [t.detach().float().requires_grad_() for t in (x, weight, torch.zeros_like(weight))]
    with kernels.backend("triton"):
        z = kernels.group_norm(given[0][None, :, None, None], 1, given[1], given[2], eps)
        found = torch.autograd.grad(z, given, dz.float()[None, :, None, None])
    return tuple(g.to(x.dtype) for g in found)


def rows_kernel(x, eps):
    return _kernel(kernels.layer_norm, x[None], eps=eps)[0]


def kl(mean, logvar):
    return objective.kl(mean, logvar).sum(1)


class _Vae(vae.AutoencoderKL):
    """A VAE whose encoder is known: the moments, whatever the pixels; its decoder hands back what it is given."""

    def __init__(self, moments=None, scale=1.0, shift=0.0):
        torch.nn.Module.__init__(self)
        self.moments = moments
        self.cfg = SimpleNamespace(scaling_factor=scale, shift_factor=shift, latent_channels=4)

    def encode_moments(self, pixels):
        return self.moments if self.moments else (pixels, torch.zeros_like(pixels))

    def decode_raw(self, z):
        return z


def sample(mean, logvar, noise):
    return _Vae((mean, logvar)).encode(None, noise)


def to_latents(z, scale, shift=0.0):
    return _Vae(None, scale, shift).encode(z)


def to_z(latents, scale, shift=0.0):
    return _Vae(None, scale, shift).decode(latents)


def measured_scale(parts):
    """By chapter 7's merging."""
    total = Moments()
    for part in parts:
        total.merge(Moments().add(part.reshape(-1, 1).numpy()))
    return total.covariance.item() ** -0.5


def merge(parts, pair):
    return tokenizer._merge(parts, pair)


END = "</w>"


def learn(words, n):
    texts = ["".join(parts).removesuffix(END) for parts, many in words.items() for _ in range(many)]
    tok = tokenizer.train_bpe(texts, 514 + n, 77)
    merges = json.loads(tok.backend.to_str())["model"]["merges"]
    return [tuple(pair if isinstance(pair, list) else pair.split()) for pair in merges]


def encode(parts, merges):
    """By the tokenizers library, whose merges rank by place."""
    known = dict.fromkeys([*parts, *(piece for pair in merges for piece in (*pair, "".join(pair)))])
    names = dict(enumerate(known))
    model = tokenizers.models.BPE({piece: i for i, piece in names.items()}, [tuple(m) for m in merges],
                                  **({"end_of_word_suffix": END} if parts[-1].endswith(END) else {}))  # fmt: skip
    return [names[t.id] for t in model.tokenize("".join(parts).removesuffix(END))]


class _Row:
    """As much of a CLIPTokenizer as chunks() asks for; its text is a list of ids."""

    def __init__(self, bos, eos, pad, length):
        self.bos, self.eos, self.pad, self.length = bos, eos, pad, length

    def pieces(self, text):
        return [-1] if text == "," else text


def row(ids, bos, eos, pad, length):
    filled, _ = prompt.chunks(_Row(bos, eos, pad, length), ids)[0]
    return filled, max(0, len(ids) - (length - 2))


def _flow(shift=1.0):
    return schedule.Schedule.from_config({"shift": shift}, "FlowMatchEulerDiscreteScheduler")


def mix(x0, noise, sigma):
    return _flow().add_noise(x0, noise, sigma * 1000)


def velocity(x0, noise):
    return _flow().target(x0, noise, None)


def shifted(sigma, shift):
    values = samplers.flow_sigmas(_flow(shift), len(sigma), grid=sigma.tolist())[:-1]
    return torch.tensor(values, dtype=sigma.dtype)


def unshifted(sigma, shift):
    """Shifting by the inverse factor."""
    return shifted(sigma, 1 / shift)


def logit_normal_density(sigma, mean, std):
    normal = torch.distributions.Normal(torch.tensor(mean, dtype=sigma.dtype), std)
    moved = torch.distributions.TransformedDistribution(normal, [torch.distributions.SigmoidTransform()])
    return moved.log_prob(sigma).exp()


def _delta(A, B, alpha):
    return lora_format.Delta("unet", "0", A, B, alpha / len(A))


def forward(x, W, A, B, alpha):
    layer = torch.nn.Linear(W.shape[1], W.shape[0], bias=False).to(W.dtype)
    layer.weight.data = W
    running.attach({"unet": torch.nn.Sequential(layer)}, lora_format.Lora("", [_delta(A, B, alpha)], []))
    return layer(x).detach()


def fused(W, A, B, alpha):
    return W + _delta(A, B, alpha).matrix(W.shape).to(W.dtype)


def best(delta, r):
    found = tools._nearest("unet", "0", delta, r)
    return found.down, found.up


def strength(layer_alpha, header_alpha, rank):
    parts = {lora_format.DOWN: torch.zeros(rank, 1)} | (
        {} if layer_alpha is None else {"alpha": torch.tensor(layer_alpha)}
    )
    return reading._scale("", ("unet", "0"), parts, {} if header_alpha is None else {"": {"lora_alpha": header_alpha}})


def sizes(original, crop, target):
    given = {"original_size": original, "crops_coords_top_left": crop, "target_size": target}
    return SDXL.size_ids(SimpleNamespace(device="cpu"), 1, *target, given)[1].tolist()


def added(pooled, six, embed):
    """Downward.embed's lines."""
    return torch.cat([pooled, embed(six.flatten()).view(len(pooled), -1)], dim=-1)


def states(first, second, clip_skip=0):
    pick = conditions._penultimate(clip_skip)
    return torch.cat([pick(first), pick(second)], -1)


def _between(a, s, a1, s1):
    """A Schedule whose times 1 and 0 have these coefficients."""
    return _schedule(torch.tensor([a1 * a1, a * a], dtype=torch.float64), prediction_type="sample")


def jump(x, x0, a, s, a1, s1):
    there, here = torch.zeros(len(x)), torch.ones(len(x))
    return fewstep.jump(_between(a, s, a1, s1), lambda x, t: x0, x, here, there)


def target(x, end, a, s, a1, s1):
    """A line of progressive()."""
    return (end - s1 / s * x) / (a1 - s1 / s * a)


def consistency_loss(student, teacher_jump, x):
    got = student(x)
    with torch.no_grad():
        want = student(teacher_jump(x))
    return (got - want).square().mean()


def fid(a, b):
    return metrics.fid(a, b)


def kid(a, b):
    kernel = lambda x, y: (x @ y.T / x.shape[1] + 1) ** 3  # noqa: E731
    return metrics.mmd(kernel(a, a), kernel(b, b), kernel(a, b))


def precision(real, generated, k):
    return metrics.prdc(real, generated, k)["precision"]


def rope(x, places):
    angles = places[:, None] * 10000.0 ** (-2 * torch.arange(x.shape[-1] // 2) / x.shape[-1])
    return qk_norm_rope_reference(x, cos=angles.cos()[None], sin=angles.sin()[None])


class Cache:
    def __init__(self):
        self.kept = llm.KeyValues(0, 64)

    def attend(self, q, k, v):
        keys, values = self.kept.add(k, v)
        return kernels.attention(q, keys, values, causal=True)


def nucleus(logits, p):
    return textgen.adjusted(logits, textgen.Chance(top_p=p))


def write_whole(path, data):
    files.write_bytes(path, data)


def noise(seed, indices, shape):
    return objective.draw(seed, "noise", indices, lambda g: torch.randn(shape, generator=g))


def shares(n, processes):
    plan = SimpleNamespace(update=lambda step: (0, list(range(n))))
    found = [loader.Plan.shares(plan, 0, 1, processes, rank)[0] for rank in range(processes)]
    return [(indices.start, len(indices), len(indices) / total) for indices, _, total in found]


SOLUTIONS = {
    1: {
        "add_noise": (add_noise, f"{SCHEDULE}: Schedule.add_noise"),
        "scaled_linear": (scaled_linear, f"{SCHEDULE}: betas_of"),
        "zero_terminal_snr": (zero_terminal_snr, f"{SCHEDULE}: zero_terminal_snr"),
    },
    2: {
        "to_x0_eps": (to_x0_eps, f"{SCHEDULE}: split"),
        "v_target": (v_target, f"{SCHEDULE}: Schedule.target"),
        "angle": (angle, f"{SCHEDULE}: Schedule.coefficients"),
        "min_snr_weight": (min_snr_weight, "nanodiff/diffusion/objective.py: weight"),
    },
    3: {
        "ddim_step": (ddim_step, f"{SAMPLERS}: ddim"),
        "euler": (euler, f"{SAMPLERS}: euler"),
        "heun": (heun, f"{SAMPLERS}: heun"),
        "ddpm_step": (ddpm_step, f"{SAMPLERS}: ddpm"),
    },
    4: {
        "guided": (guided, f"{GUIDANCE}: Guidance.denoiser"),
        "rescaled": (rescaled, f"{GUIDANCE}: Guidance.denoiser"),
        "guided_bell": (guided_bell, "docs/book/drawing.py: Mixture"),
    },
    5: {
        "time_embedding": (time_embedding, "nanodiff/models/layers.py: timestep_embedding"),
        "resnet": (resnet, "nanodiff/models/layers.py: ResnetBlock.forward"),
        "u": (u, "nanodiff/models/unet.py: UNet2DConditionModel.forward"),
    },
    6: {
        "attention": (attention, f"{ATTENTION}: attention_reference"),
        "online_softmax": (online_softmax, f"{FORWARD}: _forward_blocks"),
        "softmax_rows": (softmax_rows, f"{FORWARD}: _forward_short"),
    },
    7: {
        "group_norm": (group_norm, f"{GROUP_NORM}: group_norm_reference"),
        "joined": (joined, f"{GROUP_NORM}: _join"),
        "backward": (backward, f"{GROUP_NORM}: _whole_backward"),
        "rows_kernel": (rows_kernel, "kernels/norms.py: _norm_forward"),
    },
    8: {
        "kl": (kl, "nanodiff/diffusion/objective.py: kl"),
        "sample": (sample, "nanodiff/models/vae.py: AutoencoderKL.encode"),
        "to_latents": (to_latents, "nanodiff/models/vae.py: AutoencoderKL.encode"),
        "to_z": (to_z, "nanodiff/models/vae.py: AutoencoderKL.decode"),
        "measured_scale": (measured_scale, "nanodiff/evaluation/metrics.py: Moments.merge"),
    },
    9: {
        "merge": (merge, f"{TOKENIZER}: _merge"),
        "learn": (learn, f"{TOKENIZER}: train_bpe"),
        "encode": (encode, f"{TOKENIZER}: _bpe"),
        "row": (row, "nanodiff/text/prompt.py: chunks"),
    },
    11: {
        "mix": (mix, f"{SCHEDULE}: Schedule.add_noise"),
        "velocity": (velocity, f"{SCHEDULE}: Schedule.target"),
        "shifted": (shifted, "nanodiff/diffusion/grids.py: flow_sigmas"),
        "unshifted": (unshifted, "nanodiff/diffusion/grids.py: flow_sigmas"),
        "logit_normal_density": (logit_normal_density, "nanodiff/diffusion/objective.py: timesteps"),
    },
    12: {
        "forward": (forward, "nanodiff/lora/running.py: Attached"),
        "fused": (fused, "nanodiff/lora/running.py: Fused"),
        "best": (best, "nanodiff/lora/tools.py: extract"),
        "strength": (strength, "nanodiff/lora/reading.py: _scale"),
    },
    10: {
        "sizes": (sizes, "nanodiff/pipeline/sdxl.py: SDXL.size_ids"),
        "added": (added, "nanodiff/models/unet.py: Downward.embed"),
        "states": (states, "nanodiff/pipeline/sdxl.py: SDXL.encode_uniques"),
    },
    13: {
        "jump": (jump, f"{FEWSTEP}: jump"),
        "target": (target, f"{FEWSTEP}: progressive"),
        "consistency_loss": (consistency_loss, f"{FEWSTEP}: consistency"),
    },
    14: {
        "fid": (fid, "nanodiff/evaluation/metrics.py: fid"),
        "kid": (kid, "nanodiff/evaluation/metrics.py: mmd"),
        "precision": (precision, "nanodiff/evaluation/metrics.py: prdc"),
    },
    15: {
        "rope": (rope, "kernels/norms.py: qk_norm_rope_reference"),
        "Cache": (Cache, "nanodiff/models/llm.py: KeyValues"),
        "nucleus": (nucleus, "nanodiff/text/textgen.py: adjusted"),
    },
    16: {
        "write_whole": (write_whole, "nanodiff/files.py: write_file"),
        "noise": (noise, "nanodiff/diffusion/objective.py: draw"),
        "shares": (shares, "nanodiff/training/loader.py: Plan.shares"),
    },
}
SOLUTIONS = dict(sorted(SOLUTIONS.items()))
