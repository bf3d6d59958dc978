"""Text to image: tokenize, encode, draw noise, denoise, decode.

    sd = pipeline.load("path/or/hub-id")
    pixels = sd.generate(["a red apple"], seeds=[0]).pixels        # [1, 3, H, W] in [-1, 1]

The same model, prompt, seed and settings give the picture that diffusers gives with CPU generators: noise is drawn on
the CPU in fp32, one generator per image, in diffusers' order (posterior sample, initial noise, then each step's).
A model without a VAE works in pixels: its "latents" are the picture.
"""

import sys
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.nn.functional as F

from nanodiff import hub, samplers, weights
from nanodiff.config import UserError, printable, read_json
from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.models.vae import AutoencoderKL
from nanodiff.schedule import Schedule
from nanodiff.tokenizer import CLIPTokenizer

CLASSES = {  # what model_index.json may name; everything else there is optional (safety checker) or unsupported
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "tokenizer": ("CLIPTokenizer", "CLIPTokenizerFast"),
}
PIPELINES = (
    "StableDiffusionPipeline",
    "StableDiffusionImg2ImgPipeline",
    "StableDiffusionInpaintPipeline",
    "LatentConsistencyModelPipeline",
)
IGNORED = {"safety_checker", "feature_extractor", "image_encoder", "scheduler", "requires_safety_checker"}


def say(message):
    print(message, file=sys.stderr)


@dataclass
class Result:
    pixels: torch.Tensor  # [B, 3, H, W], about [-1, 1]
    latents: torch.Tensor  # [B, C, h, w], final, as the VAE's decode() takes them
    history: list = field(default_factory=list)  # the Steps, when asked for


class Noise:
    """Draws N(0, 1) on the CPU in fp32: one generator per image, or one generator for the whole batch."""

    def __init__(self, generators, shape, device, dtype):
        self.generators, self.shape, self.device, self.dtype = generators, shape, device, dtype

    def __call__(self, shape=None):
        shape = shape or self.shape
        if isinstance(self.generators, torch.Generator):
            drawn = torch.randn(shape, generator=self.generators)
        else:
            drawn = torch.cat([torch.randn((1, *shape[1:]), generator=g) for g in self.generators])
        return drawn.to(self.device, self.dtype)


def load(model, dtype=torch.float32, device="cpu", variant=None, revision=None, token=None, scheduler=None):
    """A Pipeline from a folder or Hub id (see hub.resolve).

    dtype: type of all weights. scheduler: name of another sampler than the model's own (samplers.SAMPLERS).
    """
    folder = hub.resolve(model, revision, token, variant)
    if folder.is_file():
        raise UserError(f"{folder}: single-file checkpoints are not supported yet; give a folder with model_index.json")
    if not (folder / "model_index.json").exists():
        raise UserError(f"{folder}: one component, not a pipeline (no model_index.json)")
    parts = check_index(read_json(folder / "model_index.json"), folder)

    def component(cls, name):
        return weights.load(cls, folder / name, dtype, device, variant)

    raw = read_json(folder / "scheduler" / "scheduler_config.json")
    schedule = Schedule.from_config(raw, where=str(folder / "scheduler" / "scheduler_config.json"))
    tokenizer = CLIPTokenizer.load(folder / "tokenizer")
    unet = component(UNet2DConditionModel, "unet")
    vae = component(AutoencoderKL, "vae") if "vae" in parts else None
    text_encoder = component(CLIPTextModel, "text_encoder")
    return Pipeline(unet, vae, text_encoder, tokenizer, schedule, name=str(model)).with_scheduler(scheduler)


def check_index(index, folder):
    """The component names of a model_index.json, all of classes that we have. Names are data, never paths."""
    kind = index.get("_class_name")
    if kind not in PIPELINES:
        raise UserError(f"{folder}/model_index.json: pipeline {kind!r} is not supported (only {', '.join(PIPELINES)})")
    present = set()
    for name, entry in index.items():
        if name.startswith("_") or name in IGNORED or not isinstance(entry, list):
            continue
        if entry == [None, None]:
            continue
        if name not in CLASSES or len(entry) != 2 or entry[1] not in CLASSES[name]:
            raise UserError(f"{folder}/model_index.json: component {printable(name)}: {entry!r} is not supported")
        present.add(name)
    for name in ("unet", "text_encoder", "tokenizer"):
        if name not in present:
            raise UserError(f"{folder}/model_index.json: has no {name}")
    return present


class Pipeline:
    """Stable Diffusion 1.x, 2.x and turbo; our own small models, in latents or in pixels."""

    def __init__(self, unet, vae, text_encoder, tokenizer, schedule, name=""):
        self.unet, self.vae, self.text_encoder = unet, vae, text_encoder
        self.tokenizer, self.schedule, self.name = tokenizer, schedule, name
        self.check_fit()

    def check_fit(self):
        """Raise UserError when the parts are not of one model, naming the two that disagree."""
        unet, text = self.unet.cfg, self.text_encoder.cfg
        channels = self.vae.cfg.latent_channels if self.vae else unet.out_channels
        if unet.in_channels == 9:
            raise UserError(
                "unet: 9 input channels: inpainting models are not supported; use an ordinary one with --mask"
            )
        if (unet.in_channels, unet.out_channels) != (channels, channels):
            got = f"{unet.in_channels} channels in and {unet.out_channels} out"
            raise UserError(f"unet has {got}, the VAE's latents have {channels}: they are not of one model")
        if unet.cross_attention_dim != text.hidden_size:
            wants = f"text of width {unet.cross_attention_dim}"
            raise UserError(f"unet wants {wants}, text_encoder gives {text.hidden_size}: they are not of one model")
        if unet.addition_embed_type:
            raise UserError(
                f"unet: addition_embed_type {unet.addition_embed_type!r} needs a pipeline that is not supported"
            )
        vocabulary = max(self.tokenizer.eos, self.tokenizer.pad, self.tokenizer.bos) + 1
        if self.tokenizer.length > text.max_position_embeddings or vocabulary > text.vocab_size:
            sizes = f"{self.tokenizer.length} tokens of {vocabulary}, text_encoder {text.max_position_embeddings} of {text.vocab_size}"
            raise UserError(f"tokenizer has {sizes}: they are not of one model")

    # -- what the model is ---------------------------------------------------------------------------------

    @property
    def device(self):
        return self.unet.conv_in.weight.device

    @property
    def dtype(self):
        return self.unet.conv_in.weight.dtype

    @property
    def downscale(self):
        """Pixels per latent along one side."""
        return self.vae.cfg.downscale if self.vae else 1

    @property
    def size(self):
        """(height, width) in pixels that the model was made for."""
        size = self.unet.cfg.sample_size or 64
        h, w = (size, size) if isinstance(size, int) else size
        return h * self.downscale, w * self.downscale

    @property
    def turbo(self):
        """Adversarially distilled (sd-turbo): told by the scheduler that only those models ship, Euler "trailing"."""
        euler = self.schedule.raw.get("_class_name") in ("EulerDiscreteScheduler", "EulerAncestralDiscreteScheduler")
        return euler and self.schedule.raw.get("timestep_spacing") == "trailing"

    def parameters(self):
        """{component: millions of parameters}"""
        parts = {"unet": self.unet, "vae": self.vae, "text_encoder": self.text_encoder}
        return {k: round(sum(p.numel() for p in m.parameters()) / 1e6, 2) for k, m in parts.items() if m is not None}

    def with_scheduler(self, name):
        """The same models under another sampler; None keeps the model's own."""
        if name is None:
            return self
        schedule = samplers.rescheduled(self.schedule, name)
        return Pipeline(self.unet, self.vae, self.text_encoder, self.tokenizer, schedule, self.name)

    def save(self, folder, dtype=None):
        """Write a Hub pipeline folder: model_index.json, components, tokenizer, scheduler."""
        folder = Path(folder)
        index = {
            "_class_name": "StableDiffusionPipeline",
            "_diffusers_version": "0.31.0",
            "feature_extractor": [None, None],
            "requires_safety_checker": False,
            "safety_checker": [None, None],
            "scheduler": ["diffusers", self.schedule.kind],
            "text_encoder": ["transformers", "CLIPTextModel"],
            "tokenizer": ["transformers", "CLIPTokenizer"],
            "unet": ["diffusers", "UNet2DConditionModel"],
            "vae": ["diffusers", "AutoencoderKL"] if self.vae else [None, None],
        }
        for name in ("unet", "vae", "text_encoder"):
            if getattr(self, name) is not None:
                weights.save(getattr(self, name), folder / name, dtype)
        (folder / "scheduler").mkdir(exist_ok=True)
        weights.write_json(folder / "scheduler" / "scheduler_config.json", self.schedule.to_json())
        self.tokenizer.save(folder / "tokenizer")
        weights.write_json(folder / "model_index.json", index)

    # -- text ------------------------------------------------------------------------------------------------

    def encode_ids(self, ids, clip_skip=0):
        """Token ids [B, S] -> the text that the UNet attends to [B, S, D]: the last layer but `clip_skip`, normed."""
        states, _ = self.text_encoder(ids)
        if not 0 <= clip_skip < len(states):
            raise UserError(f"--clip-skip {clip_skip}: the text encoder has {len(states) - 1} layers")
        return self.text_encoder.final_norm(states[-1 - clip_skip])

    def encode(self, texts, clip_skip=0):
        """Texts -> [B, S, D]; each different text is encoded once. What does not fit is said."""
        unique = list(dict.fromkeys(texts))
        for text in unique:
            if cut := self.tokenizer.overflow(text):
                say(f"warning: the prompt is over {self.tokenizer.length - 2} tokens; cut off: {printable(cut)!r}")
        ids = torch.tensor(self.tokenizer(unique), device=self.device)
        states = self.encode_ids(ids, clip_skip)
        return states[[unique.index(t) for t in texts]]

    # -- pictures --------------------------------------------------------------------------------------------

    def encode_pixels(self, pixels, noise):
        """[B, 3, H, W] in [-1, 1] -> latents: a posterior sample, as image-to-image starts from."""
        if self.vae is None:
            return pixels
        shape = (len(pixels), self.vae.cfg.latent_channels, *(s // self.downscale for s in pixels.shape[-2:]))
        drawn = noise(shape)
        return self._finite(lambda dtype: self.vae.encode(pixels.to(self.device, dtype), drawn.to(dtype)))

    def decode(self, latents, tiled=False):
        """latents -> pixels. A half-precision VAE that overflows is run again in fp32, with a line."""
        if self.vae is None:
            return latents
        run = self.vae.decode_tiled if tiled else self.vae.decode
        if not torch.isfinite(latents).all():
            raise UserError(
                "the latents are not finite (NaN or infinity): check the model's weights, or use --dtype fp32"
            )
        return self._finite(lambda dtype: run(latents.to(dtype)))

    def _finite(self, run):
        """run(dtype of the VAE), again in fp32 when a half-precision result is not finite."""
        dtype = self.vae.decoder.conv_in.weight.dtype
        out = run(dtype)
        if not torch.isfinite(out).all() and dtype != torch.float32:
            say(f"note: the VAE overflowed in {dtype}; running it again in fp32")
            self.vae.float()
            out = run(torch.float32)
            self.vae.to(dtype)
        if not torch.isfinite(out).all():
            raise UserError("the VAE's result is not finite (NaN or infinity): check its weights")
        return out

    def denoiser(self, text, negative, scale, rescale=0.0):
        """model(x, t) with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598 eq. 6).

        text, negative: [B, S, D]; negative None = no guidance, one pass. One batch of 2B, unconditional first; keys
        and values of the text are computed here, once. rescale: std correction (Lin et al. 2024 §3.4).
        """
        kvs = self.unet.text_kv(text if negative is None else torch.cat([negative, text]))

        def model(x, t):
            x = x.to(self.dtype)
            if negative is None:
                return self.unet(x, t, kvs).float()
            without, with_text = self.unet(torch.cat([x, x]), t, kvs).float().chunk(2)
            out = without + scale * (with_text - without)
            if rescale:
                dims = list(range(1, out.dim()))
                matched = out * (with_text.std(dims, keepdim=True) / out.std(dims, keepdim=True))
                out = rescale * matched + (1 - rescale) * out
            return out

        return model

    @torch.no_grad()
    def generate(
        self,
        prompts,
        negative_prompt=None,
        steps=50,
        guidance_scale=7.5,
        seeds=None,
        height=None,
        width=None,
        eta=0.0,
        clip_skip=0,
        guidance_rescale=0.0,
        image=None,
        strength=0.8,
        mask=None,
        tiled=False,
        quirks=False,
        keep_steps=False,
        on_step=None,
        generators=None,
    ):
        """One batch of pictures, one per prompt; returns a Result.

        negative_prompt: one text, or a list of one per prompt. seeds: one per prompt (or `generators`, CPU ones).
        Guidance is on when guidance_scale > 1. image [B or 1, 3, H, W] in [-1, 1]: start from it, noised by `strength`
        in (0, 1]; mask [1, 1, H, W] in {0, 1}: repaint where 1. quirks: see samplers.ddim. on_step(i, n, Step) is
        called after each step. Raises UserError for settings that make no sense.
        """
        height, width = height or self.size[0], width or self.size[1]
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % self.downscale:
                raise UserError(f"--{name} {value} must be a positive multiple of {self.downscale}")
        samplers.check_steps(self.schedule, steps)
        if mask is not None and image is None:
            raise UserError("--mask needs --init-image")
        n = len(prompts)
        if generators is None:
            seeds = range(n) if seeds is None else seeds
            generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        shape = (n, self.unet.cfg.in_channels, height // self.downscale, width // self.downscale)
        noise = Noise(generators, shape, self.device, torch.float32)

        text, negative = self.encode(prompts, clip_skip), None
        if guidance_scale > 1:  # as in diffusers, clip_skip is the prompt's alone
            negatives = negative_prompt if isinstance(negative_prompt, list) else [negative_prompt or ""] * n
            negative = self.encode(negatives)
        model = self.denoiser(text, negative, guidance_scale, guidance_rescale)

        start, known = 0, None
        if image is None:
            x = samplers.begin(self.schedule, steps, noise())
        else:
            x, start, known = self._begin_from(image.expand(n, *image.shape[1:]), steps, strength, mask, noise)
        sampler = samplers.BY_CLASS[self.schedule.kind]
        options = {"eta": eta} if eta else {}
        if eta and sampler is not samplers.ddim:
            raise UserError(f"--eta is DDIM's; {samplers.name_of(self.schedule)} has no such setting")
        if quirks and sampler not in (samplers.ddim, samplers.pndm):
            raise UserError(f"--diffusers-quirks is for ddim and pndm; {samplers.name_of(self.schedule)} has none")
        options |= {"quirks": True} if quirks else {}
        result, kept = None, []
        for done, result in enumerate(sampler(model, x, self.schedule, steps, noise, start, **options), 1):
            if mask is not None:  # in place: the sampler continues from what is written here
                result.x.copy_(known(result.x, start + done))
            if keep_steps:
                kept.append(result)
            if on_step:
                on_step(done, samplers.calls(self.schedule, steps) - start, result)
        latents = result.x
        return Result(self.decode(latents, tiled).float(), latents, kept)

    def _begin_from(self, image, steps, strength, mask, noise):
        """(first x, first step, known) of image-to-image. known(x, i): x before step i with everything outside the mask
        replaced by the original at that noise level, which is inpainting with an ordinary model."""
        if not 0 < strength <= 1:
            raise UserError(f"--strength {strength} must be above 0 and at most 1")
        start = max(steps - min(int(steps * strength), steps), 0)
        if start >= steps:
            raise UserError(f"--strength {strength} with {steps} steps leaves no step to take; raise one of them")
        clean = self.encode_pixels(image, noise).float()
        first = noise()
        if mask is None:
            return samplers.begin(self.schedule, steps, first, clean, start), start, None
        if self.vae is not None:
            # diffusers samples the posterior of the masked picture here; a 4-channel UNet does not use it, but the
            # generator moves on, and with it every later draw.
            noise()
        mask = F.interpolate(mask.to(self.device, torch.float32), size=clean.shape[-2:])

        def known(x, i):
            done = i >= samplers.calls(self.schedule, steps)
            original = clean if done else samplers.begin(self.schedule, steps, first, clean, i)
            return (1 - mask) * original + mask * x

        # at full strength nothing of the picture is kept under the mask
        return samplers.begin(self.schedule, steps, first, None if strength == 1 else clean, start), start, known
