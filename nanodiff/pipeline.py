"""Text to image: tokenize, encode, draw noise, denoise, decode.

    sd = pipeline.load("path/or/hub-id")
    pixels = sd.generate(["a red apple"], seeds=[0]).pixels        # [1, 3, H, W] in [-1, 1]

Three classes, one for each family: `Pipeline` (SD 1.x, 2.x, our own), `SDXL` and `SD3`. They differ in how a prompt
becomes a condition and how the denoiser takes it; noise, guidance, sampling and decoding are the same.
The same model, prompt, seed and settings give the picture that diffusers gives with CPU generators: noise is drawn on
the CPU in fp32, one generator per image, in diffusers' order (posterior sample, initial noise, then each step's).
A model without a VAE works in pixels: its "latents" are the picture.
"""

import sys
from collections import OrderedDict
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F

from nanodiff import cudagraph, memory, onednn, prompt, quantize, samplers, singlefile, sources, weights
from nanodiff.config import UserError
from nanodiff.models.clip import CLIPTextModel
from nanodiff.models.labels import LabelEncoder
from nanodiff.models.layers import computed_by, join
from nanodiff.schedule import Schedule
from nanodiff.sources import BUILDERS, Folder, source
from nanodiff.tokenizer import CLIPTokenizer, LabelTokenizer, T5Tokenizer

CACHE_BYTES = 1 << 30  # encoded prompts that are kept, in host memory
SAMPLING = (
    "_sampling"  # in model_index.json: the steps and guidance that a model of ours was trained to be sampled with
)
GROUP = 32  # prompts that are encoded at a time
MOST_TIMES = 128  # steps of a run up to which what they add to the channels is made beforehand
LAUNCH_BOUND = 4  # rows of a batch (two guided pictures) up to which a GPU may wait for the host


def say(message):
    print(message, file=sys.stderr)


@dataclass
class Result:
    pixels: torch.Tensor  # [B, 3, H, W], about [-1, 1]
    latents: torch.Tensor  # [B, C, h, w], final, as the VAE's decode() takes them
    history: list = field(default_factory=list)  # the Steps, when asked for


class Text(NamedTuple):
    """An encoded prompt, or several."""

    states: torch.Tensor  # [B, S, D], what the denoiser attends to
    pooled: torch.Tensor | None = None  # [B, P], SDXL and SD 3


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


# ---------------------------------------------------------------------------------------------------------
# Loading


def load(
    model,
    dtype=torch.float32,
    device="cpu",
    variant=None,
    revision=None,
    token=None,
    scheduler=None,
    offload="none",
    quantized=None,
    no_t5=False,
    components=None,
    prediction_type=None,
    allow_pickle=False,
    name=None,
):
    """A Pipeline from a folder, single file or Hub id (see hub.resolve), or from what source() returned.

    dtype: type in which everything computes. scheduler: name of another sampler than the model's own
    (samplers.SAMPLERS). offload: see memory.Resident. quantized: "int8" or "nf4" for the denoiser and T5. no_t5: leave
    SD 3's third text encoder out. components, prediction_type, allow_pickle: for single files, see source().
    """
    ready = isinstance(model, Folder | singlefile.Single)
    src = model if ready else source(model, variant, revision, token, components, prediction_type, allow_pickle, no_t5)
    family = FAMILIES[src.kind]
    if no_t5 and "text_encoder_3" not in family.encoder_names:
        raise UserError(f"--no-t5: {src.kind} has no third text encoder")
    left_out = {"text_encoder_3", "tokenizer_3"} if no_t5 else set()
    if family is SD3 and "text_encoder_3" not in src.parts | left_out:
        say("note: this model comes without T5; its part of the text is zeros")
        left_out = {"tokenizer_3"}
    wanted = [p for p in BUILDERS if p in src.parts - left_out]
    tokenizers = [src.tokenizer(n) for n in family.tokenizer_names if n in src.parts - left_out]
    modules = {}
    for part in wanted:
        small = quantized and part in ("unet", "transformer", "text_encoder_3")
        home = offload != "none" or small  # stays as stored, in host memory
        modules[part] = src.module(part, None if home else dtype, "cpu" if home else device)
        if small:
            quantize.apply(modules[part], quantized, device, "cpu" if offload != "none" else device)
            if offload == "none":
                quantize.rest(modules[part], dtype, device)
        if offload != "none":  # the VAE is small, and its tiled decode reaches into its blocks
            memory.Resident(modules[part], dtype, device, blocks=offload == "sequential" and part != "vae")
    denoiser = modules.pop(family.denoiser_name)
    vae = modules.pop("vae", None)
    encoders = [modules.get(n) for n in family.encoder_names]
    raw, where = src.scheduler()
    sd = family(denoiser, vae, encoders, tokenizers, Schedule.from_config(raw, where=where), name=str(name or model))
    sd.index = {k: v for k, v in src.index.items() if isinstance(v, bool) or k == SAMPLING}
    return sd.with_scheduler(scheduler)


def convert(model, target, allow_pickle=False, components=None, prediction_type=None):
    """A single-file checkpoint as a Hub folder, or a Hub folder as one file in the original names. Types stay."""
    src = source(model, components=components, prediction_type=prediction_type, allow_pickle=allow_pickle)
    single, target = isinstance(src, singlefile.Single), Path(target)
    if single and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty folder")
    sd = load(src, None)
    if single:
        sd.save(target)
    else:
        family = singlefile.family_of_pipeline(sd.class_name, sd.net)
        singlefile.export(sd.models(), family, target)
    print(f"{target}: {', '.join(sd.models())}")


def plan(src, dtype, height, width, batch, guided, quantized, with_t5, length, tiled):
    """[memory.Stage] of a run, predicted on the meta device."""
    family, stages = FAMILIES[src.kind], []
    meta = {n: weights.skeleton(src.builder(n), src.config(n)) for n in BUILDERS if n in src.parts}
    if not with_t5:
        meta.pop("text_encoder_3", None)
    vae, net = meta.get("vae"), meta[family.denoiser_name]
    scale = vae.cfg.downscale if vae else 1
    side = net.cfg.sample_size or 64
    h, w = (side, side) if isinstance(side, int) else side
    h, w = (height or h * scale) // scale, (width or w * scale) // scale
    rows = batch * (2 if guided else 1)

    def empty(*shape, of=dtype):
        return torch.empty(shape, dtype=of, device="meta")

    def run(name, model, own):
        if name == "text_encoder_3":
            return lambda: model(empty(rows, length, of=torch.long))
        if name.startswith("text_encoder"):
            return lambda: model(empty(rows, model.cfg.max_position_embeddings, of=torch.long))
        if name == "vae":
            size = (min(h, 64), min(w, 64)) if tiled else (h, w)
            return lambda: model.decode(empty(batch, model.cfg.latent_channels, *size, of=own))
        x, t = empty(rows, model.cfg.in_channels, h, w), empty(rows, of=torch.float32)
        if name == "transformer":
            text = empty(rows, 77 + length, model.cfg.joint_attention_dim)
            return lambda: model(x, t, text, empty(rows, model.cfg.pooled_projection_dim))
        text, added = empty(rows, 77, model.cfg.cross_attention_dim), None
        if model.cfg.addition_embed_type:
            pooled = model.cfg.projection_class_embeddings_input_dim - 6 * model.cfg.addition_time_embed_dim
            added = empty(rows, pooled), empty(rows, 6, of=torch.float32)
        return lambda: model(x, t, model.text_kv(text), added)

    for name in (*family.encoder_names, family.denoiser_name, "vae"):
        if model := meta.get(name):
            own = dtype
            if name == "vae" and family is SDXL and dtype == torch.float16 and model.cfg.force_upcast:
                own = torch.float32
            small = quantized if name in ("unet", "transformer", "text_encoder_3") else None
            sizes = quantize.sizes(model, small) if small else {}
            stage = memory.stage(name, model.to(own), run(name, model, own), own, sizes)
            stages.append(stage._replace(block=0.0) if name == "vae" else stage)  # it moves as a whole
    return stages


# ---------------------------------------------------------------------------------------------------------
# The families


class Pipeline:
    """Stable Diffusion 1.x, 2.x and turbo; our own small models, in latents or in pixels."""

    class_name = "StableDiffusionPipeline"
    denoiser_name = "unet"
    encoder_names = ("text_encoder",)
    tokenizer_names = ("tokenizer",)
    steps, guidance = 50, 7.5  # what sample.py takes when nothing is said
    half = torch.float16  # the half precision it was made for
    replays = False  # record denoising steps as CUDA graphs (cudagraph.Replayed)? "auto": where launches bound them
    packs = False  # may weights be packed for a CPU (onednn.prepare), which empties the plain ones?
    keeps_size = True  # image-to-image takes the size of its picture, as in diffusers

    def __init__(self, denoiser, vae, encoders, tokenizers, schedule, name=""):
        self.net, self.vae = denoiser, vae
        self.encoders = encoders if isinstance(encoders, list) else [encoders]
        self.tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers]
        self.schedule, self.name, self.index = schedule, name, {}
        self.kept = OrderedDict()  # encoded prompts
        self.recorded = {}  # {what the denoiser is: its Replayed}, at most one
        self.check_fit()

    unet = property(lambda self: self.net)
    text_encoder = property(lambda self: self.encoders[0])
    tokenizer = property(lambda self: self.tokenizers[0])

    def check_fit(self):
        """Raise UserError when the parts are not of one model, naming the two that disagree."""
        self.check_latents()
        unet = self.net.cfg
        if unet.addition_embed_type:
            raise UserError(f"unet: addition_embed_type {unet.addition_embed_type!r} belongs to SDXL")
        self.check_text(unet.cross_attention_dim, self.encoders[0].cfg.hidden_size)
        self.check_tokenizers()

    def check_latents(self):
        net, name = self.net.cfg, self.denoiser_name
        channels = self.vae.cfg.latent_channels if self.vae else net.out_channels
        if net.in_channels == 9:
            raise UserError(
                "unet: 9 input channels: inpainting models are not supported; use an ordinary one with --mask"
            )
        if (net.in_channels, net.out_channels) != (channels, channels):
            got = f"{net.in_channels} channels in and {net.out_channels} out"
            raise UserError(f"{name} has {got}, the VAE's latents have {channels}: they are not of one model")

    def check_text(self, wanted, given, what="text", givers="text_encoder"):
        if wanted != given:
            raise UserError(
                f"{self.denoiser_name} wants {what} of width {wanted}, {givers} gives {given}: they are not of one model"
            )

    def check_tokenizers(self):
        pairs = [(t, e) for t, e in zip(self.tokenizers, self.encoders, strict=False) if isinstance(t, CLIPTokenizer)]
        for tokenizer, encoder in pairs:
            text, vocabulary = encoder.cfg, tokenizer.backend.get_vocab_size()
            if tokenizer.length > text.max_position_embeddings or vocabulary > text.vocab_size:
                sizes = f"{tokenizer.length} tokens of {vocabulary}, text_encoder {text.max_position_embeddings} of {text.vocab_size}"
                raise UserError(f"tokenizer has {sizes}: they are not of one model")

    # -- what the model is ---------------------------------------------------------------------------------

    @property
    def device(self):
        return memory.device_of(self.net)

    @property
    def dtype(self):
        """The type in which the denoiser computes."""
        return memory.dtype_of(self.net)

    @property
    def downscale(self):
        """Pixels per latent along one side."""
        return self.vae.cfg.downscale if self.vae else 1

    @property
    def multiple(self):
        """Heights and widths are multiples of this many pixels."""
        return self.downscale

    @property
    def size(self):
        """(height, width) in pixels that the model was made for."""
        size = self.net.cfg.sample_size or 64
        h, w = (size, size) if isinstance(size, int) else size
        return h * self.downscale, w * self.downscale

    @property
    def turbo(self):
        """Adversarially distilled (sd-turbo, sdxl-turbo): to be sampled in one to four steps without guidance."""
        return is_turbo(self.schedule.raw, self.name)

    turbo_steps = 1

    @property
    def unconditional(self):
        """Does it draw without being told what?"""
        encoder = self.encoders[0]
        return isinstance(encoder, LabelEncoder) and not encoder.cfg.labels

    def sampling(self, name):
        """ "steps" or "guidance_scale" that the model's folder asks for, or None."""
        value = (self.index.get(SAMPLING) or {}).get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e5 else None

    def models(self):
        """{component name: module} of everything that is loaded."""
        named = {
            self.denoiser_name: self.net,
            "vae": self.vae,
            **dict(zip(self.encoder_names, self.encoders, strict=True)),
        }
        return {k: m for k, m in named.items() if m is not None}

    def parameters(self):
        """{component: millions of parameters}"""
        return {k: round(memory.count(m) / 1e6, 2) for k, m in self.models().items()}

    def with_scheduler(self, name, **fields):
        """The same models under another sampler; None keeps the model's own. fields: of scheduler_config.json."""
        if name is None and not fields:
            return self
        schedule = samplers.rescheduled(self.schedule, name, **fields)
        other = type(self)(self.net, self.vae, self.encoders, self.tokenizers, schedule, self.name)
        other.index, other.kept, other.recorded = self.index, self.kept, self.recorded
        other.packs, other.replays = self.packs, self.replays
        return other

    def save(self, folder, dtype=None, states=None):
        """Write a Hub pipeline folder: model_index.json, components, tokenizers, scheduler. states: {component: state_dict} in
        place of the components' own."""
        folder = Path(folder)
        index = {"_class_name": self.class_name, "_diffusers_version": "0.31.0", **self.index}
        if self.class_name == "StableDiffusionPipeline":
            index |= {
                "feature_extractor": [None, None],
                "safety_checker": [None, None],
                "requires_safety_checker": False,
            }
        index["scheduler"] = ["diffusers", self.schedule.kind]
        for name in (self.denoiser_name, "vae", *self.encoder_names):
            module = self.models().get(name)
            index[name] = [None, None]
            if module is not None:
                onednn.undo(module)
                library = "transformers" if name.startswith("text") else "diffusers"
                index[name] = [library, module.class_name]
                weights.save(module, folder / name, dtype, (states or {}).get(name))
        index |= {name: [None, None] for name in self.tokenizer_names[len(self.tokenizers) :]}
        for name, tokenizer in zip(self.tokenizer_names, self.tokenizers, strict=False):
            kind = {T5Tokenizer: "T5TokenizerFast", LabelTokenizer: "LabelTokenizer"}.get(
                type(tokenizer), "CLIPTokenizer"
            )
            index[name] = ["transformers", kind]
            tokenizer.save(folder / name)
        (folder / "scheduler").mkdir(exist_ok=True)
        weights.write_json(folder / "scheduler" / "scheduler_config.json", self.schedule.to_json())
        weights.write_json(folder / "model_index.json", index)

    def _for_cpu(self, module, pack):
        """Prepare a module for a CPU, if that is where it stays and it is not compiled."""
        stays = (
            module is not None
            and self.device.type == "cpu"
            and memory.whole(module)
            and not hasattr(module, "resident")
        )
        if stays and module._compiled_call_impl is None:
            onednn.prepare(module, pack)

    # -- text ------------------------------------------------------------------------------------------------

    def encode_ids(self, ids, clip_skip=0):
        """Token ids [B, S] -> the text that the UNet attends to [B, S, D]: the last layer but `clip_skip`, normed."""
        return self.pick(0, clip_skip)(self.encoders[0](ids)[0])

    def pick(self, i, clip_skip):
        """states -> the hidden state of encoder i that the denoiser was trained with."""
        encoder = self.encoders[i]

        def picked(states):
            if not 0 <= clip_skip < len(states):
                raise UserError(f"--clip-skip {clip_skip}: the text encoder has {len(states) - 1} layers")
            return encoder.final_norm(states[-1 - clip_skip])

        return picked

    def encode(self, texts, clip_skip=0, long_prompts=False, weighted=False, length=256):
        """Prompts -> Text. A prompt is a text, or a tuple with one for each encoder (None: the first one's).

        Each different prompt is encoded once and kept. What does not fit is said. length: tokens of T5.
        """
        how = (clip_skip, long_prompts, weighted, length)
        keys = [(*_per_encoder(t, len(self.encoder_names)), *how) for t in texts]
        missing, fresh = {}, {}  # those of one length together: none is filled because of its neighbours
        for k in dict.fromkeys(keys):
            if k not in self.kept:
                missing.setdefault(self.chunks(k[: len(self.encoder_names)], long_prompts, weighted), []).append(k)
        for group in [ks[i : i + GROUP] for ks in missing.values() for i in range(0, len(ks), GROUP)]:
            encoded = self.encode_uniques([k[: len(self.encoder_names)] for k in group], *how)
            for i, k in enumerate(group):
                fresh[k] = Text(*(None if part is None else part[i : i + 1].cpu() for part in encoded))
        found = fresh | {k: self.kept[k] for k in keys if k in self.kept}
        self.kept |= fresh
        while len(self.kept) > 1 and sum(_bytes(t) for t in self.kept.values()) > CACHE_BYTES:
            self.kept.popitem(last=False)
        return self.joined(
            [Text(*(None if p is None else p.to(self.device) for p in found[k])) for k in keys], clip_skip
        )

    def chunks(self, texts, long_prompts, weighted):
        """How many chunks of 77 tokens a prompt takes (a text, or a tuple with one for each encoder)."""
        if not long_prompts:
            return 1
        clips = [t for t in self.tokenizers if isinstance(t, CLIPTokenizer)]
        if not clips:
            return 1
        texts = _per_encoder(texts, len(self.encoder_names))
        return max(len(prompt.chunks(t, text, True, weighted)) for t, text in zip(clips, texts, strict=False))

    def joined(self, texts, clip_skip=0):
        """Several Texts as one batch. Shorter ones (--long-prompts) are filled with chunks of the empty prompt, or of
        zeros where they are zeros; in SD 3 the order of the text's tokens means nothing, so they may come last."""
        longest = max(t.states.shape[1] for t in texts)
        pooled = None if texts[0].pooled is None else torch.cat([t.pooled for t in texts])
        return Text(torch.cat([self.filled(t, longest, clip_skip).states for t in texts]), pooled)

    def filled(self, text, length, clip_skip):
        """A Text with `length` tokens: see joined()."""
        missing = (length - text.states.shape[1]) // self.tokenizer.length
        if not missing:
            return text
        empty = self.encode([""], clip_skip).states[:, : self.tokenizer.length]
        empty = empty.repeat(len(text.states), missing, 1) * (1 if text.states.any() else 0)
        return text._replace(states=torch.cat([text.states, empty], dim=1))

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        """Tuples of texts, one for each encoder -> Text."""
        states, _ = self.clip(0, [t[0] for t in texts], clip_skip, long_prompts, weighted)
        return Text(states)

    def clip(self, i, texts, clip_skip, long_prompts, weighted):
        """What CLIP encoder i makes of texts: (states [B, S, D], pooled [B, P])."""
        tokenizer = self.tokenizers[i]
        if isinstance(tokenizer, LabelTokenizer):
            states, pooled = self.encoders[i](torch.tensor(tokenizer(texts), device=self.device))
            return self.pick(i, clip_skip)(states), pooled
        if not long_prompts:
            for text in dict.fromkeys(texts):
                prompt.warn_cut(tokenizer, text, tokenizer.length - 2, f"{tokenizer.length - 2} tokens", weighted)
        with memory.at_work(self.encoders[i]):
            return prompt.encode_clip(
                tokenizer, self.encoders[i], texts, self.pick(i, clip_skip), long_prompts, weighted
            )

    def nothing(self, text, how):
        """What stands against `text` when there is no negative prompt: the empty one."""
        return self.encode([""] * len(text.states), **how)

    def conditions(
        self,
        prompts,
        negative_prompt=None,
        prompt_2=None,
        prompt_3=None,
        negative_prompt_2=None,
        negative_prompt_3=None,
        long_prompts=False,
        weighted=False,
        max_sequence_length=None,
        clip_skip=0,
        guided=True,
    ):
        """(text, negative) of a batch; negative is None without guidance.

        prompts: n texts. negative_prompt, prompt_2 … negative_prompt_3 (for the further text encoders): one text for
        all, or n. long_prompts, weighted: see prompt.py. max_sequence_length: tokens of T5. clip_skip: see pick().
        """
        for encoder in self.encoders:
            self._for_cpu(encoder, self.packs)
        n, how = len(prompts), {"long_prompts": long_prompts, "weighted": weighted}
        how["length"] = max_sequence_length or 256
        text = self.encode(_rows(n, list(prompts), prompt_2, prompt_3), clip_skip, **how)
        if not guided:
            return text, None
        if negative_prompt is None:
            negative = self.nothing(text, how)
        else:  # as in diffusers, clip_skip is the prompt's alone
            negative = self.encode(_rows(n, negative_prompt, negative_prompt_2, negative_prompt_3), **how)
        longest = max(text.states.shape[1], negative.states.shape[1])  # fill each with its own clip_skip
        return self.filled(text, longest, clip_skip), self.filled(negative, longest, 0)

    @torch.no_grad()
    def prepare(self, prompts, *args, **options):
        """Encode what generate() will need and keep it, so that the text encoders work once. Arguments of conditions()."""
        for i in range(0, len(prompts), GROUP):
            self.conditions(prompts[i : i + GROUP], *args, **options)

    def learn(self, path, allow_pickle=False):
        """Teach the text encoders the word of a textual-inversion file; returns the word. Raises UserError."""
        name, vectors = prompt.load_embedding(path, allow_pickle)
        clips = {"clip_l": 0, "clip_g": 1, "": 0}
        for key, value in vectors.items():
            i = clips[key]
            if i >= len(self.encoders) or not isinstance(self.encoders[i], CLIPTextModel):
                raise UserError(f"{path}: has {key} vectors, this model has one text encoder; it is for SDXL or SD 3")
            prompt.add_embedding(self.tokenizers[i], self.encoders[i], name, value)
        if len([e for e in self.encoders if isinstance(e, CLIPTextModel)]) > len(vectors):
            raise UserError(f"{path}: has vectors for one text encoder, this model has two; it is for SD 1 or 2")
        self.kept.clear()
        return name

    # -- the denoiser ----------------------------------------------------------------------------------------

    def condition(self, text, sizes, guided):
        """What the denoiser takes after x and t for `text`; its keys and values are computed here, once a run."""
        return (self.net.text_kv(text.states) if memory.whole(self.net) else text.states,)

    def denoise(self, net, x, t, states, pooled):
        """One call of the denoiser, or of what training put in its place, without guidance."""
        return net(x, t, states)

    def denoiser(self, text, negative, scale, rescale=0.0, sizes=None, skip=None, times=()):
        """model(x, t) with classifier-free guidance (Ho & Salimans 2022, arXiv 2207.12598 eq. 6).

        text, negative: Text; negative None = no guidance, one pass. One batch of 2B, unconditional first. rescale: std
        correction (Lin et al. 2024 §3.4). skip: a SkipLayers or None, on a run over the timesteps `times`.
        """
        if self.device.type == "cuda" and memory.whole(self.net):
            join(self.net)
        both = text if negative is None else self.joined([negative, text])
        condition = self.condition(both, sizes, negative is not None)
        net = self.replayed(len(both.states)) or self.net
        known = self.shifts(times, *condition[1:])

        def predict(x, t):
            return net(x, known.get(float(t), t), *condition)

        def model(x, t):
            x = x.to(self.dtype)
            if negative is None:
                return predict(x, t).float()
            without, with_text = predict(torch.cat([x, x]), t).float().chunk(2)
            out = without + scale * (with_text - without)
            if skip and skip.active(sum(u > t for u in times), len(times)):
                blind = self.net(x, t, text.states, text.pooled, skip.layers).float()
                out = out + skip.scale * (with_text - blind)
            if rescale:
                dims = list(range(1, out.dim()))
                matched = out * (with_text.std(dims, keepdim=True) / out.std(dims, keepdim=True))
                out = rescale * matched + (1 - rescale) * out
            return out

        return model

    def shifts(self, times, added=None):
        """{time: what the UNet takes in its place} for a run over `times` on a GPU, where the products that make these are too
        small to be worth a start at every step; else nothing."""
        if self.device.type != "cuda" or not memory.whole(self.net) or not hasattr(self.net, "shifts"):
            return {}
        times = sorted({float(t) for t in times})
        if not 0 < len(times) <= MOST_TIMES:
            return {}
        made = self.net.shifts(torch.tensor(times).to(self.device), added)
        return dict(zip(times, made.split(len(made) // len(times)), strict=True))

    def replayed(self, rows):
        """The denoiser for batches of `rows`, recorded and replayed as a CUDA graph, or None: see `replays`."""
        if not self.replays or (self.replays == "auto" and (self.device.type != "cuda" or rows > LAUNCH_BOUND)):
            return None
        if hasattr(self.net, "resident"):  # weights that come and go have no place that could be recorded
            return None
        hooks = [h for m in self.net.modules() for h in m._forward_hooks.values()]
        owners = [getattr(getattr(h, "func", h), "__self__", h) for h in hooks]  # such as a LoRA beside the weights
        weights = tuple((t.data_ptr(), t._version) for t in (*self.net.parameters(), *self.net.buffers()))
        state = (weights, tuple((o, getattr(o, "scale", None)) for o in owners), computed_by())
        if state not in self.recorded:  # what was recorded before reads other weights
            self.recorded.clear()
            self.recorded[state] = cudagraph.Replayed(self.net)
        return self.recorded[state]

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
            if tiled:
                raise UserError("--vae-tiling: this model works in pixels and has no VAE")
            return latents
        run = self.vae.decode_tiled if tiled else self.vae.decode
        return self._finite(lambda dtype: run(latents.to(dtype)))

    def vae_dtype(self):
        """The type in which the VAE is tried first."""
        return memory.dtype_of(self.vae)

    def _finite(self, run):
        """run(dtype of the VAE), again in fp32 when a half-precision result is not finite."""
        dtype = self.vae_dtype()
        with memory.at_work(self.vae, dtype):
            out = run(dtype)
        if not torch.isfinite(out).all() and dtype != torch.float32:
            say(f"note: the VAE overflowed in {dtype}; running it again in fp32")
            with memory.at_work(self.vae, torch.float32):
                out = run(torch.float32)
        if not torch.isfinite(out).all():
            raise UserError("the VAE's result is not finite (NaN or infinity): check its weights")
        return out

    def first_step(self, steps, strength):
        """The step at which image-to-image starts."""
        return max(steps - min(int(steps * strength), steps), 0)

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
        guidance_rescale=0.0,
        image=None,
        strength=0.8,
        mask=None,
        tiled=False,
        quirks=False,
        keep_steps=False,
        on_step=None,
        generators=None,
        sizes=None,
        skip_layers=None,
        denoising_end=None,
        decoder=None,
        **words,
    ):
        """One batch of pictures, one per prompt; returns a Result.

        prompts, negative_prompt, words: see conditions(), which takes them. seeds: one per prompt (or `generators`, CPU
        ones). Guidance is on when guidance_scale > 1.
        image [B or 1, 3, H, W] in [-1, 1]: start from it, noised by `strength` in (0, 1]; mask [1, 1, H, W] in {0, 1}:
        repaint where 1. quirks: see samplers.ddim. sizes: SDXL's, see SDXL.size_ids. skip_layers: SD 3's, a SkipLayers.
        denoising_end: stop when this part of the noise is gone. on_step(i, n, Step) is called after each step. decoder:
        in place of decode(). Raises UserError for settings that make no sense.
        """
        height, width = height or self.size[0], width or self.size[1]
        for name, value in (("height", height), ("width", width)):
            if value <= 0 or value % self.multiple:
                raise UserError(f"--{name} {value} must be a positive multiple of {self.multiple}")
        self.check_size(height, width)
        samplers.check_steps(self.schedule, steps)
        self.check_options(words, sizes, skip_layers)
        if mask is not None and image is None:
            raise UserError("--mask needs --init-image")
        n = len(prompts)
        if generators is None:
            seeds = range(n) if seeds is None else seeds
            generators = [torch.Generator().manual_seed(int(s)) for s in seeds]
        shape = (n, self.net.cfg.in_channels, height // self.downscale, width // self.downscale)
        noise = Noise(generators, shape, self.device, torch.float32)

        text, negative = self.conditions(prompts, negative_prompt, guided=guidance_scale > 1, **words)
        sizes = self.size_ids(n, height, width, sizes)

        start, known = 0, None
        options = {"eta": eta} if eta else {}
        if self.schedule.flow and self.schedule.cfg["use_dynamic_shifting"]:
            options["mu"] = samplers.flow_mu(self.schedule, height * width // self.multiple**2)
        shift = {"mu": options.get("mu")} if self.schedule.flow else {}
        if image is None:
            x = samplers.begin(self.schedule, steps, noise(), **shift)
        else:
            x, start, known = self._begin_from(image.expand(n, *image.shape[1:]), steps, strength, mask, noise, shift)
        sampler = samplers.BY_CLASS[self.schedule.kind]
        if eta and sampler is not samplers.ddim:
            raise UserError(f"--eta is DDIM's; {samplers.name_of(self.schedule)} has no such setting")
        if quirks and sampler not in (samplers.ddim, samplers.pndm):
            raise UserError(f"--diffusers-quirks is for ddim and pndm; {samplers.name_of(self.schedule)} has none")
        options |= {"quirks": True} if quirks else {}
        total = samplers.calls(self.schedule, steps) - start
        if denoising_end is not None:
            cutoff = round(self.schedule.T * (1 - denoising_end))
            total = sum(t >= cutoff for t in samplers.times(self.schedule, steps, **shift)[start:])
            if not total or not 0 < denoising_end < 1:
                raise UserError(f"--denoising-end {denoising_end:g} leaves no step to take; it is between 0 and 1")
        result, kept = None, []
        self._for_cpu(self.net, self.packs and total >= onednn.FEWEST_STEPS)
        with memory.at_work(self.net):
            times = samplers.times(self.schedule, steps, **shift)
            model = self.denoiser(text, negative, guidance_scale, guidance_rescale, sizes, skip_layers, times)
            for done, result in enumerate(sampler(model, x, self.schedule, steps, noise, start, **options), 1):
                if mask is not None:  # in place: the sampler continues from what is written here
                    result.x.copy_(known(result.x, start + done))
                if keep_steps:
                    kept.append(result)
                if on_step:
                    on_step(done, total, result)
                if done == total:
                    break
        latents = result.x
        if not torch.isfinite(latents).all():
            raise UserError(
                "the latents are not finite (NaN or infinity): check the model's weights, or use --dtype fp32"
            )
        pixels = decoder(latents) if decoder else self.decode(latents, tiled)
        return Result(pixels.float(), latents, kept)

    def check_options(self, words, sizes, skip_layers):
        """Raise UserError for settings of another family."""
        for name in ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "max_sequence_length"):
            needs = name[-1] if name[-1] in "23" else "3"
            if words.get(name) is not None and f"text_encoder_{needs}" not in self.encoder_names:
                raise UserError(f"--{name.replace('_', '-')}: this model has no text encoder {needs}")
        length = words.get("max_sequence_length")
        if length is not None and not 1 <= length <= 512:
            raise UserError(f"--max-sequence-length {length} must be between 1 and 512")
        if sizes and not isinstance(self, SDXL):
            raise UserError(f"--{next(iter(sizes)).replace('_', '-')}: only SDXL takes sizes as a condition")
        if skip_layers and not isinstance(self, SD3):
            raise UserError("--skip-layers: only SD 3 models take it")
        if skip_layers and not set(skip_layers.layers) <= set(range(self.net.cfg.num_layers)):
            raise UserError(f"--skip-layers: the model has the blocks 0 to {self.net.cfg.num_layers - 1}")

    def check_size(self, height, width):
        """Raise UserError for pictures that are too large for the model, or not of its only size."""
        only = getattr(self.vae.cfg, "fixed_size", None) if self.vae else None
        if only and (height, width) != (only, only):
            raise UserError(f"--height and --width: this model's VAE makes {only}x{only} pictures only")

    def size_ids(self, n, height, width, sizes):
        """SDXL's size condition; None for the others."""

    def _begin_from(self, image, steps, strength, mask, noise, shift):
        """(first x, first step, known) of image-to-image. known(x, i): x before step i with everything outside the mask
        replaced by the original at that noise level, which is inpainting with an ordinary model."""
        if not 0 < strength <= 1:
            raise UserError(f"--strength {strength} must be above 0 and at most 1")
        start = self.first_step(steps, strength)
        if start >= steps:
            raise UserError(f"--strength {strength} with {steps} steps leaves no step to take; raise one of them")
        clean = self.encode_pixels(image, noise).float()
        first = noise()
        if mask is None:
            return samplers.begin(self.schedule, steps, first, clean, start, **shift), start, None
        if self.vae is not None:
            # diffusers samples the posterior of the masked picture here; a 4-channel UNet does not use it, but the
            # generator moves on, and with it every later draw.
            noise()
        mask = F.interpolate(mask.to(self.device, torch.float32), size=clean.shape[-2:])

        def known(x, i):
            done = i >= samplers.calls(self.schedule, steps)
            original = clean if done else samplers.begin(self.schedule, steps, first, clean, i, **shift)
            return (1 - mask) * original + mask * x

        # at full strength nothing of the picture is kept under the mask
        begun = samplers.begin(self.schedule, steps, first, None if strength == 1 else clean, start, **shift)
        return begun, start, known


class Joint(Pipeline):
    """An MMDiT of ours with one text encoder, as train.py makes it: the parts are those of SD 3, the text is one CLIP's
    (or a label), its last layer normed, with its pooled projection."""

    class_name = "NanodiffMMDiTPipeline"
    denoiser_name = "transformer"
    half, keeps_size = torch.bfloat16, False
    multiple = property(lambda self: self.downscale * self.net.cfg.patch_size)

    def check_fit(self):
        self.check_latents()
        text = self.encoders[0].cfg
        if not text.with_projection:
            raise UserError("text_encoder: has no text_projection, which an MMDiT needs")
        self.check_text(self.net.cfg.joint_attention_dim, text.hidden_size)
        self.check_text(self.net.cfg.pooled_projection_dim, text.projection_dim, "pooled text")
        self.check_tokenizers()

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        return Text(*self.clip(0, [t[0] for t in texts], clip_skip, long_prompts, weighted))

    def condition(self, text, sizes, guided):
        return text.states, text.pooled

    def denoise(self, net, x, t, states, pooled):
        return net(x, t, states, pooled)


class SDXL(Pipeline):
    """Stable Diffusion XL and its turbo: two text encoders, a pooled text and six sizes (Podell et al. 2023, arXiv
    2307.01952 §2.2)."""

    class_name = "StableDiffusionXLPipeline"
    encoder_names = ("text_encoder", "text_encoder_2")
    tokenizer_names = ("tokenizer", "tokenizer_2")

    def check_fit(self):
        self.check_latents()
        unet, (first, second) = self.net.cfg, (e.cfg for e in self.encoders)
        if unet.addition_embed_type != "text_time":
            raise UserError("unet: has no text_time condition, so it is not SDXL's")
        if not second.with_projection:
            raise UserError("text_encoder_2: has no text_projection, so it is not SDXL's")
        self.check_text(unet.cross_attention_dim, first.hidden_size + second.hidden_size, givers="the text encoders")
        vector = second.projection_dim + 6 * unet.addition_time_embed_dim
        if unet.projection_class_embeddings_input_dim == 2560:
            raise UserError("unet: 2560 inputs of its add_embedding: the SDXL refiner is not supported")
        self.check_text(unet.projection_class_embeddings_input_dim, vector, "a vector", "text_encoder_2")
        self.check_tokenizers()

    def pick(self, i, clip_skip):
        return _penultimate(clip_skip)

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        pairs = [self.clip(i, [t[i] for t in texts], clip_skip, long_prompts, weighted) for i in range(2)]
        return Text(torch.cat(_same_length(self, pairs, clip_skip), dim=-1), pairs[1][1])

    def nothing(self, text, how):
        if not self.index.get("force_zeros_for_empty_prompt", True):
            return super().nothing(text, how)
        return Text(torch.zeros_like(text.states), torch.zeros_like(text.pooled))

    def size_ids(self, n, height, width, sizes):
        """[2, 6]: the six sizes of the negative and of the positive condition, heights first.

        sizes: {"original_size": (h, w), "crops_coords_top_left": (top, left), "target_size": (h, w)} and the same with
        "negative_", which need original and target together and otherwise are the positive ones.
        """
        sizes = {k: tuple(v) for k, v in (sizes or {}).items() if v is not None}
        known = ("original_size", "crops_coords_top_left", "target_size")
        for key in sizes:
            if key.removeprefix("negative_") not in known:
                raise ValueError(f"unknown size {key!r}")
        defaults = ((height, width), (0, 0), (height, width))
        ids = [v for k, d in zip(known, defaults, strict=True) for v in sizes.get(k, d)]
        if "negative_original_size" in sizes and "negative_target_size" in sizes:
            negative = (*sizes["negative_original_size"], *sizes.get("negative_crops_coords_top_left", (0, 0)))
            negative = [*negative, *sizes["negative_target_size"]]
        elif any(k.startswith("negative_") for k in sizes):
            raise UserError("--negative-original-size and --negative-target-size must be given together")
        else:
            negative = ids
        return torch.tensor([negative, ids], dtype=torch.float32, device=self.device)

    def condition(self, text, sizes, guided):
        n = len(text.states) // (2 if guided else 1)
        ids = sizes.repeat_interleave(n, dim=0) if guided else sizes[1:].repeat(n, 1)
        return *super().condition(text, sizes, guided), (text.pooled, ids)

    def denoise(self, net, x, t, states, pooled):
        """The sizes are the picture's own, uncropped."""
        height, width = (s * self.downscale for s in x.shape[-2:])
        return net(x, t, states, (pooled, self.size_ids(1, height, width, None)[1:].expand(len(x), -1)))

    def vae_dtype(self):
        """SDXL's own VAE overflows in fp16 (`force_upcast`), so it is not even tried there."""
        dtype = memory.dtype_of(self.vae)
        return torch.float32 if dtype == torch.float16 and self.vae.cfg.force_upcast else dtype


class SD3(Pipeline):
    """Stable Diffusion 3 and 3.5: flow matching by an MMDiT; two CLIPs and T5, which may be missing (its part of the
    text is then zeros; Esser et al. 2024, arXiv 2403.03206 §4, §5.3)."""

    class_name = "StableDiffusion3Pipeline"
    denoiser_name = "transformer"
    encoder_names = ("text_encoder", "text_encoder_2", "text_encoder_3")
    tokenizer_names = ("tokenizer", "tokenizer_2", "tokenizer_3")
    turbo_steps, half, keeps_size = 4, torch.bfloat16, False

    # Its makers' settings; medium is the one with dual attention.
    steps = property(lambda self: 40 if self.net.cfg.dual_attention_layers else 28)
    guidance = property(lambda self: 4.5 if self.net.cfg.dual_attention_layers else 3.5)

    def check_fit(self):
        self.check_latents()
        if not self.schedule.flow:
            raise UserError(f"scheduler {self.schedule.kind}: an SD 3 model is a flow and uses flow-match Euler")
        net, clips, t5 = self.net.cfg, [e.cfg for e in self.encoders[:2]], self.encoders[2]
        if not all(c.with_projection for c in clips):
            raise UserError("text_encoder: has no text_projection, so it is not SD 3's")
        self.check_text(net.pooled_projection_dim, sum(c.projection_dim for c in clips), "pooled text", "the CLIPs")
        if t5 is not None:
            self.check_text(net.joint_attention_dim, t5.cfg.d_model, givers="text_encoder_3")
            if len(self.tokenizers) < 3:
                raise UserError("text_encoder_3 is there, tokenizer_3 is missing; leave it out with --no-t5")
            if (words := self.tokenizers[2].backend.get_vocab_size()) > t5.cfg.vocab_size:
                raise UserError(
                    f"tokenizer_3 has {words} tokens, text_encoder_3 {t5.cfg.vocab_size}: they are not of one model"
                )
        if sum(c.hidden_size for c in clips) > net.joint_attention_dim:
            raise UserError("the CLIPs' text is wider than the transformer's: they are not of one model")
        self.check_tokenizers()

    @property
    def multiple(self):
        return self.downscale * self.net.cfg.patch_size

    def pick(self, i, clip_skip):
        return _penultimate(clip_skip)

    def encode_uniques(self, texts, clip_skip, long_prompts, weighted, length):
        pairs = [self.clip(i, [t[i] for t in texts], clip_skip, long_prompts, weighted) for i in range(2)]
        states, pooled = (
            torch.cat(_same_length(self, pairs, clip_skip), dim=-1),
            torch.cat([p for _, p in pairs], dim=-1),
        )
        wide = self.net.cfg.joint_attention_dim
        states = F.pad(states, (0, wide - states.shape[-1]))
        encoder = self.encoders[2]
        if encoder is None:
            return Text(torch.cat([states, states.new_zeros(len(texts), length, wide)], dim=1), pooled)
        for text in dict.fromkeys(t[2] for t in texts):
            prompt.warn_cut(
                self.tokenizers[2], text, length - 1, f"T5's {length} tokens (--max-sequence-length)", weighted
            )
        with memory.at_work(encoder):
            words = prompt.encode_t5(self.tokenizers[2], encoder, [t[2] for t in texts], length, weighted)
        return Text(torch.cat([states, words.to(states.dtype)], dim=1), pooled)

    def check_size(self, height, width):
        most = self.net.cfg.pos_embed_max_size * self.multiple
        if max(height, width) > most:
            raise UserError(f"--height and --width can be at most {most}: the model has no positions for more")

    def condition(self, text, sizes, guided):
        return text.states, text.pooled

    def denoise(self, net, x, t, states, pooled):
        return net(x, t, states, pooled)

    def first_step(self, steps, strength):
        return int(max(steps - min(steps * strength, steps), 0))  # without SD 1's inner int(), as in diffusers


class SkipLayers(NamedTuple):
    """Skip-layer guidance, for SD 3.5 medium: out += scale · (out with text - out of the model without `layers`), from
    `start` to `stop` of the steps (the model card's settings: layers 7, 8, 9, scale 2.8, 0.01 to 0.2)."""

    layers: tuple
    scale: float = 2.8
    start: float = 0.01
    stop: float = 0.2

    def active(self, i, n):
        return n * self.start < i < n * self.stop


FAMILIES = {
    kind: {"SD": Pipeline, "SDXL": SDXL, "SD3": SD3, "MMDiT": Joint}[family]
    for kind, family in sources.FAMILIES.items()
}


def is_turbo(raw, name):
    """Is this an adversarially distilled model? sd-turbo and sdxl-turbo are told by the scheduler that only they ship:
    Euler, "trailing", ε (v-prediction models with zero terminal SNR are "trailing" too). SD 3.5 large-turbo's files are
    those of large in all but their values, so there the model's name must tell. raw: its scheduler_config.json."""
    kind = raw.get("_class_name", "")
    if kind.startswith("FlowMatch"):
        return "turbo" in Path(name).name.lower()
    plain = raw.get("prediction_type", "epsilon") == "epsilon" and not raw.get("rescale_betas_zero_snr")
    return kind.startswith("Euler") and raw.get("timestep_spacing") == "trailing" and plain


def _penultimate(clip_skip):
    """SDXL and SD 3 take the last layer but one, not normed; clip_skip counts from there."""

    def picked(states):
        if not 0 <= clip_skip < len(states) - 1:
            raise UserError(f"--clip-skip {clip_skip}: the text encoder has {len(states) - 1} layers")
        return states[-2 - clip_skip]

    return picked


def _rows(n, first, second=None, third=None):
    """n tuples of a prompt's texts; each argument is one text for all, a list of n, or None."""
    columns = [c if isinstance(c, list) else [c] * n for c in (first, second, third)]
    return list(zip(*columns, strict=True))


def _per_encoder(text, n):
    """The n texts of a prompt: what is not given is the first one's."""
    texts = (text,) if isinstance(text, str) else tuple(text)
    first = texts[0] or ""
    return tuple((texts[i] if i < len(texts) else None) or first for i in range(n))


def _bytes(text):
    return sum(part.numel() * part.element_size() for part in text if part is not None)


def _same_length(sd, pairs, clip_skip):
    """The two CLIPs' states with as many chunks: the shorter one filled with those of the empty prompt."""
    longest = max(states.shape[1] for states, _ in pairs)
    filled = []
    for i, (states, _) in enumerate(pairs):
        missing = (longest - states.shape[1]) // sd.tokenizers[i].length
        if missing:
            empty, _ = sd.clip(i, [""], clip_skip, False, False)
            states = torch.cat([states, empty.repeat(len(states), missing, 1)], dim=1)
        filled.append(states)
    return filled
