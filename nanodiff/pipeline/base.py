"""Text to image: tokenize, encode, draw noise, denoise, decode.

    sd = pipeline.load("path/or/hub-id")
    pixels = sd.generate("a red apple", seeds=[0]).pixels          # [1, 3, H, W], about [-1, 1]

A class for each family: `Pipeline` (SD 1.x, 2.x, our own), `SDXL` and its `Refiner`, `SD3` and our small `Joint`. They differ in how a prompt
becomes a condition and how the denoiser takes it; noise, guidance, sampling and decoding are the same.
The same model, prompt, seed and settings give the picture that diffusers gives with CPU generators: noise is drawn on
the CPU in fp32, one generator per image, in diffusers' order (posterior sample, initial noise, then each step's).
A model without a VAE works in pixels: its "latents" are the picture.

Explained in the book (docs/book): chapter 10.
"""

import itertools
import operator
import threading
import weakref
from collections import OrderedDict
from collections.abc import Callable, Sequence
from contextlib import ExitStack
from dataclasses import dataclass, field
from operator import attrgetter
from pathlib import Path

import torch

from nanodiff.config import UserError, short
from nanodiff.device import derived, memory, onednn
from nanodiff.diffusion import grids, samplers, solvers
from nanodiff.diffusion.schedule import Schedule
from nanodiff.diffusion.schedule_config import SPACES
from nanodiff.models.unet import UNet2DConditionModel, perturbed
from nanodiff.output import images
from nanodiff.pipeline import control, families, pictures, saving
from nanodiff.pipeline.conditions import Conditions, Extra
from nanodiff.pipeline.families import SAMPLING, is_turbo
from nanodiff.pipeline.guidance import Guidance
from nanodiff.pipeline.settings import Drawing, Start, Words, check_kinds, check_pixels, grouped
from nanodiff.pipeline.space import LatentSpace
from nanodiff.pipeline.spoken import Spoken
from nanodiff.pipeline.start import begin


@dataclass
class Result:
    """What generate() gives back."""

    pixels: torch.Tensor | None  # [B, 3, H, W], about [-1, 1]; None of output_type "latent"
    # [B, C, h, w], final, as the VAE's decode() takes them; of a part of a run with noise in them
    latents: torch.Tensor
    history: list = field(default_factory=list)  # the Steps, when asked for
    output_type: str = "pil"  # of `images`

    def to_pil(self) -> list:
        """The pictures as PIL images. Raises UserError where none were decoded."""
        if self.pixels is None:
            raise UserError('`output_type` "latent" decodes no pictures; Pipeline.decode() makes them of `latents`')
        return images.to_pil(self.pixels)

    @property
    def images(self):
        """The pictures in the form that `output_type` asked for: PIL images, an array [B, H, W, 3] in [0, 1] ("np"), or their latents."""
        if self.output_type == "latent":
            return self.latents
        if self.output_type == "np":
            return (self.pixels.clamp(-1, 1) / 2 + 0.5).permute(0, 2, 3, 1).cpu().numpy()
        return self.to_pil()

    def __repr__(self):
        n, _, height, width = (self.latents if self.pixels is None else self.pixels).shape
        return f"Result({n} {'latents' if self.pixels is None else 'pictures'} of {width}x{height})"


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


class _Of:
    """A fact of a pipeline's family, of the class and of its instances alike."""

    def __init__(self, get):
        self.get = get

    def __get__(self, sd, cls):
        return self.get(cls.family)


class Pipeline(Conditions, Guidance, LatentSpace):
    """Stable Diffusion 1.x, 2.x and turbo; our own small models, in latents or in pixels."""

    family = families.SD
    class_name = _Of(lambda family: family.kinds[0])
    denoiser_name, encoder_names, tokenizer_names = (_Of(attrgetter(n)) for n in ("denoiser", "encoders", "tokenizers"))
    half, keeps_size = _Of(attrgetter("half")), _Of(attrgetter("keeps_size"))

    def __init__(self, denoiser, vae, encoders, tokenizers, schedule, name=""):
        self.net, self.vae = denoiser, vae
        self.encoders = encoders if isinstance(encoders, list) else [encoders]
        self.tokenizers = tokenizers if isinstance(tokenizers, list) else [tokenizers]
        self.schedule, self.name, self.index = schedule, name, {}
        self.kept = OrderedDict()  # encoded prompts
        self.recorded = {}  # {what the denoiser is: its Replayed}, at most one
        # is it a turbo? None: its scheduler tells; of a loaded model its own, whatever sampler it is under
        self.distilled = None
        self.check_fit()

    def __repr__(self):
        parts = ", ".join(f"{k} {v:g} M" for k, v in self.parameters().items())
        where = f"{str(self.dtype).removeprefix('torch.')} on {self.device}"
        return f"{type(self).__name__}({self.name or 'unnamed'}: {parts}; {samplers.name_of(self.schedule)}, {where})"

    unet = property(lambda self: self.net)

    def check_fit(self) -> None:
        """Raise UserError when the parts are not of one model, naming the two that disagree."""
        self.check_latents()
        unet = self.net.cfg
        if unet.addition_embed_type:
            raise UserError(f"unet: addition_embed_type {unet.addition_embed_type!r} belongs to SDXL")
        self.check_text(unet.cross_attention_dim, self.encoders[0].cfg.hidden_size)
        self.check_tokenizers()

    # -- what the model is ---------------------------------------------------------------------------------

    @property
    def turbo(self) -> bool:
        """Adversarially distilled (sd-turbo, sdxl-turbo): to be sampled in one to four steps without guidance."""
        return is_turbo(self.schedule.raw, self.name) if self.distilled is None else self.distilled

    def sampling(self, name: str) -> float | None:
        """ "steps" or "guidance_scale" that the model's folder asks for, or None."""
        value = (self.index.get(SAMPLING) or {}).get(name)
        return value if isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value <= 1e5 else None

    def settings(self, steps: int | None = None, guidance_scale: float | None = None) -> tuple[int, float]:
        """(steps, guidance scale) of a picture: what is given; else what the model's folder says; else what its family was made
        for, a turbo or a model without words without guidance."""
        makers = self.family.settings(self.net.cfg)
        if steps is None:
            steps = self.sampling("steps") or (self.family.turbo_steps if self.turbo else makers[0])
        if guidance_scale is None:
            own = self.sampling("guidance_scale")
            guidance_scale = 0.0 if self.turbo or self.unconditional else makers[1]
            guidance_scale = guidance_scale if own is None or self.unconditional else own
        return steps, guidance_scale

    def models(self) -> dict:
        """{component name: module} of everything that is loaded."""
        named = {self.denoiser_name: self.net, "vae": self.vae}
        named |= zip(self.encoder_names, self.encoders, strict=True)
        return {k: m for k, m in named.items() if m is not None}

    def parameters(self) -> dict:
        """{component: millions of parameters}"""
        return {k: round(memory.count(m) / 1e6, 2) for k, m in self.models().items()}

    def with_scheduler(self, name: str | None, sigmas: str | None = None, **fields: object) -> "Pipeline":
        """The same models under another sampler; None keeps the model's own. sigmas: of another grid (grids.SIGMAS). fields: of
        scheduler_config.json. Raises UserError for a field that the sampler does not look at."""
        if name is None and not fields and sigmas is None:
            return self
        schedule = samplers.rescheduled(self.schedule, name, **fields)
        if idle := [field for field in fields if not schedule.knows(field)]:
            raise UserError(f"`{idle[0]}` does nothing to {samplers.name_of(schedule)}, which has no such setting")
        if sigmas is not None:
            schedule = samplers.spaced_by(schedule, name, sigmas, large=self.family.sizes > 0)
        return self.with_schedule(schedule)

    def with_schedule(self, schedule: Schedule) -> "Pipeline":
        """The same models under another Schedule."""
        other = type(self)(self.net, self.vae, self.encoders, self.tokenizers, schedule, self.name)
        other.index, other.kept, other.recorded = self.index, self.kept, self.recorded
        other.packs, other.replays, other.distilled = self.packs, self.replays, self.turbo
        return other

    def save(
        self,
        folder: str | Path,
        dtype: torch.dtype | None = None,
        states: dict[str, dict[str, torch.Tensor]] | None = None,
    ) -> None:
        """Write a Hub pipeline folder: model_index.json, components, tokenizers, scheduler. states: {component: state_dict} in
        place of the components' own."""
        saving.save(self, folder, dtype, states)

    # -- pictures ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def generate(
        self,
        prompts: str | Sequence[str],
        negative_prompt: str | list[str] | None = None,
        drawing: Drawing | None = None,
        start: Start | None = None,
        words: Words | None = None,
        *,
        seeds: Sequence[int] | None = None,
        generators: torch.Generator | list[torch.Generator] | None = None,
        sampler: Callable | None = None,
        keep_steps: bool = False,
        on_step: Callable | None = None,
        decode: Callable | None = None,
        output_type: str = "pil",
        **settings: object,
    ) -> Result:
        """One batch of pictures, one per prompt; a single text is a batch of one.

        drawing, start, words, and in `settings` single fields of theirs by name (`steps=25`, `image=…`, `prompt_2=…`): see
        settings.py. Threads that draw with one denoiser wait for each other. seeds: one per prompt (default 0, 1, …), or `generators`, CPU ones. sampler: a function in place of the
        schedule's own sampler, called as samplers.py says. on_step(i, n, Step) is called after each step. decode(latents):
        in place of the VAE's. output_type: of Result.images, "pil" or "np"; "latent": nothing is decoded. Raises UserError for settings that make no sense.
        """
        if output_type not in ("pil", "np", "latent"):
            raise UserError(f"`output_type` {output_type}: is none of pil, np, latent")
        if sampler is not None and not callable(sampler):
            raise UserError(f"`sampler` {short(sampler)}: expected a function; with_scheduler() takes a name")
        prompts, generators = _counted(prompts, seeds, generators)
        drawing, start, words = grouped(settings, drawing or Drawing(), start or Start(), words or Words())
        negative_prompt = _negative(negative_prompt)
        steps, scale, height, width = self.checked(len(prompts), drawing, start, words)
        with _one_at_a_time(self.net):
            return self._generate(prompts, negative_prompt, drawing, start, words, generators, (steps, scale, height, width), sampler,
                                  keep_steps, on_step, decode, output_type)  # fmt: skip

    def _generate(
        self,
        prompts,
        negative_prompt,
        drawing,
        start,
        words,
        generators,
        resolved,
        sampler,
        keep_steps,
        on_step,
        decode,
        output_type,
    ):
        """generate() of what has been checked; resolved: (steps, guidance scale, height, width)."""
        steps, scale, height, width = resolved
        for model in self.models().values():
            derived.noticed(model)
        run, options, shift = self._sampler(sampler, drawing, height, width)
        shape = (len(prompts), self.channels, height // self.downscale, width // self.downscale)
        noise = Noise(generators, shape, self.device, torch.float32)
        extra = Extra(self.size_ids(len(prompts), height, width, drawing.sizes, start.begun), drawing.pictures)

        guided = scale > 1 and not self.is_told
        texts = None if words.syntax else self.conditions(prompts, negative_prompt, words, guided)
        x, first, known, beside = begin(self, start, steps, noise, shift)
        times = samplers.times(self.schedule, steps, **shift)
        total = self._until(drawing.denoising_end, times, first)
        controls = [control.shown(c, self) for c in drawing.controls]
        nets = [self.net, *(c.net for c in controls)]
        # parts of the steps are of all of them, also where `denoising_end` leaves some out
        asked = samplers.asked(self.schedule, len(times) - first)
        steered = (controls, asked, itertools.count()) if controls else None

        def make(text, negative):
            weaker = (drawing.skip_layers if guided else None) or drawing.perturbed  # as in diffusers
            return self.denoiser(text, negative, scale, drawing.guidance_rescale, extra, weaker, times, steered, beside)

        if words.syntax:
            begun = words.first if start.denoising_start is not None else first
            texts = Spoken(self, prompts, negative_prompt, words, guided, times[begun:])
        step, history = None, []
        with ExitStack() as working:
            if self.is_told:
                self.net.guidance = scale
                working.callback(setattr, self.net, "guidance", 1.0)
            if drawing.freeu:
                self.net.freeu = drawing.freeu
                working.callback(setattr, self.net, "freeu", None)
            for net in nets:
                self.ready(net, self.packs and total >= onednn.FEWEST_STEPS)
                working.enter_context(memory.at_work(net))
            model = texts.model(make) if words.syntax else make(*texts)
            for done, step in enumerate(run(model, x, self.schedule, steps, noise, first, **options), 1):
                if known:  # inpainting, in place: the sampler continues from what is written here
                    step.x.copy_(known(step.x, first + done))
                if keep_steps:
                    history.append(step)
                if on_step:
                    on_step(done, total, step)
                if done == total:
                    break
        latents = step.x
        if not torch.isfinite(latents).all():
            raise UserError("the latents are not finite (NaN or infinity): check the model's weights, or use fp32")
        if output_type == "latent":
            return Result(None, latents, history, output_type)
        pixels = decode(latents) if decode else self.decode(latents, drawing.tiled)
        return Result(pixels.float(), latents, history, output_type)

    def checked(self, rows: int, drawing: Drawing, start: Start, words: Words) -> tuple[int, float, int, int]:
        """(steps, guidance scale, height, width) of a run, what was left open filled in. Raises UserError for settings that make no sense."""
        check_kinds(drawing, start, words)
        steps, scale = self.settings(drawing.steps, drawing.guidance_scale)
        steps = operator.index(steps)
        height, width = (
            own if given is None else operator.index(given)
            for given, own in zip((drawing.height, drawing.width), self.size, strict=True)
        )
        for name, side in (("height", height), ("width", width)):
            if side <= 0 or side % self.multiple:
                raise UserError(f"`{name}` {side} must be a positive multiple of {self.multiple}")
        self.check_size(height, width)
        self.check_options(drawing, start, words)
        check_pixels(start, rows, height, width)
        for one in drawing.controls:
            control.check(one, self, rows, height, width)
        for one in drawing.pictures:
            pictures.check(one, self)
        self.size_ids(1, height, width, drawing.sizes, start.begun)
        samplers.check_steps(self.schedule, steps)
        times, first = samplers.times(self.schedule, steps, **self._sampler(None, drawing, height, width)[2]), 0
        if start.denoising_start is not None:
            first = self.first_after(start.denoising_start, times)
        elif start.begun:
            if not 0 < start.strength <= 1:
                raise UserError(f"`strength` {start.strength} must be above 0 and at most 1")
            first = self.first_step(steps, start.strength)
            if first >= steps:
                raise UserError(
                    f"`strength` {start.strength} with {steps} steps leaves no step to take; raise one of them"
                )
        samplers.check_start(self.schedule, steps, first)
        self._until(drawing.denoising_end, times, first)
        return steps, scale, height, width

    def _sampler(self, given, drawing, height, width):
        """(sampler, its options, the shift of a flow's times) of a run. Raises UserError for a setting, or a sampler, that is not for the schedule."""
        row = samplers.of(self.schedule)
        own = row.run
        rows = [other for other in samplers.SAMPLERS.values() if other.run is given]
        if rows and not any((SPACES[other.kind], other.scaled) == (self.schedule.space, row.scaled) for other in rows):
            raise UserError(
                f"`sampler` {given.__name__}: does not fit this schedule ({self.schedule.kind}); take with_scheduler() for it"
            )
        if drawing.eta and own not in (samplers.ddim, solvers.tcd):
            raise UserError(f"`eta` is DDIM's and TCD's; {samplers.name_of(self.schedule)} has no such setting")
        if drawing.churn and own is not samplers.euler:
            raise UserError(f"`churn` is Euler's; {samplers.name_of(self.schedule)} has no such setting")
        if drawing.quirks and own not in (samplers.ddim, samplers.pndm):
            raise UserError(f"`quirks` is for ddim and pndm; {samplers.name_of(self.schedule)} has none")
        options = ({"eta": drawing.eta} if drawing.eta else {}) | ({"quirks": True} if drawing.quirks else {})
        if drawing.churn:
            options |= zip(("s_churn", "s_tmin", "s_tmax", "s_noise"), drawing.churn, strict=True)
        if self.schedule.flow and self.schedule.cfg["use_dynamic_shifting"]:
            options["mu"] = grids.flow_mu(self.schedule, height * width // self.multiple**2)
        shift = {"mu": options.get("mu")} if self.schedule.flow else {}
        return given or own, options, shift

    def _until(self, denoising_end, times, first):
        """Steps from `first` on, until the part `denoising_end` of the timesteps is behind."""
        if denoising_end is None:
            return len(times) - first
        total = self.steps_before(denoising_end, times[first:])
        if not total or not 0 < denoising_end < 1:
            raise UserError(f"`denoising_end` {denoising_end:g} leaves no step to take; it is between 0 and 1")
        return total

    def steps_before(self, part: float, times: list) -> int:
        """How many steps of a run over `times` are taken until this part of the noise is gone."""
        return sum(t >= round(self.schedule.T * (1 - part)) for t in times)

    def first_after(self, denoising_start: float, times: list) -> int:
        """The step at which a run goes on that another model's `denoising_end` left."""
        first = self.steps_before(denoising_start, times)
        if first == len(times) or not 0 < denoising_start < 1:
            raise UserError(f"`denoising_start` {denoising_start:g} leaves no step to take; it is between 0 and 1")
        return first

    def first_step(self, steps: int, strength: float) -> int:
        """The step at which image-to-image starts."""
        return max(steps - min(int(steps * strength), steps), 0)

    def idle(self, steps: int, drawing: Drawing, first: int = 0) -> list[str]:
        """What of a run of so many steps from step `first` on is at work at none of them, in words: parts of the steps may be too small to hold one."""
        calls = samplers.asked(self.schedule, steps - first)
        found = [
            f"a ControlNet from {c.start:g} to {c.end:g} of the steps"
            for c in drawing.controls
            if not any(c.active(i, calls) for i in range(calls))
        ]
        skip = drawing.skip_layers
        if skip and not any(skip.active(i, steps) for i in range(first, steps)):
            found.append(f"skip-layer guidance from {skip.start:g} to {skip.stop:g} of the steps")
        churn = drawing.churn
        if churn and churn.amount and samplers.name_of(self.schedule) == "euler":
            taken = samplers.sigma_grid(self.schedule, steps)[1][first:steps]
            if not any(churn.low <= sigma <= churn.high for sigma in taken):
                found.append(f"churn (`s_churn`) at σ from {churn.low:g} to {churn.high:g}")
        return found

    def check_options(self, drawing: Drawing, start: Start, words: Words) -> None:
        """Raise UserError for settings of another family, and for those that need another."""
        for name in ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "max_sequence_length"):
            needs = int(name[-1] if name[-1] in "23" else "3")
            there = needs <= len(self.encoder_names) and (self.encoders[needs - 1] is not None or "prompt" not in name)
            if getattr(words, name) is not None and not there:
                raise UserError(f"`{name}`: this model has no text encoder {needs}")
        if words.max_sequence_length is not None and not 1 <= words.max_sequence_length <= 512:
            raise UserError(f"`max_sequence_length` {words.max_sequence_length} must be between 1 and 512")
        if drawing.sizes and not self.family.sizes:
            name = next(iter(drawing.sizes))
            raise UserError(f"`{name}`: only SDXL takes sizes as a condition")
        if drawing.skip_layers and not self.family.skips_layers:
            raise UserError("`skip_layers`: only SD 3 models take it")
        if drawing.skip_layers and not drawing.skip_layers.start < drawing.skip_layers.stop:
            raise UserError(
                f"`skip_layers`: from {drawing.skip_layers.start:g} to {drawing.skip_layers.stop:g} of the steps is no part of them"
            )
        if drawing.skip_layers and not set(drawing.skip_layers.layers) <= set(range(self.net.cfg.num_layers)):
            raise UserError(f"`skip_layers`: the model has the blocks 0 to {self.net.cfg.num_layers - 1}")
        for name in ("perturbed", "freeu"):
            if getattr(drawing, name) and not isinstance(self.net, UNet2DConditionModel):
                raise UserError(f"`{name}` is for UNets (SD 1.x, SD 2.x, SDXL)")
        if drawing.perturbed:
            with perturbed(self.net, drawing.perturbed.layers):  # names that are none show now
                pass
        if start.mask is not None and start.image is None:
            raise UserError("`mask` needs `image`")
        if start.latents is not None and start.image is not None:
            raise UserError("`latents` stand in place of `image`: give one of them")
        if start.denoising_start is not None and start.latents is None:
            raise UserError("`denoising_start` goes on with `latents`")
        if self.inpaints and start.mask is None:
            raise UserError(
                "this is an inpainting model, which repaints a picture under a mask: give `image` and `mask`"
            )

    def size_ids(self, n: int, height: int, width: int, sizes: object, begun: bool = False) -> torch.Tensor | None:
        """SDXL's size condition; None for the others."""


_locks, _making = weakref.WeakKeyDictionary(), threading.Lock()  # {denoiser: its RLock}


def _one_at_a_time(net):
    """Settings such as FreeU, and weights that come and go, are the network's while it draws."""
    with _making:
        return _locks.setdefault(net, threading.RLock())


def _negative(given):
    """A negative prompt as text, list of texts or None. Raises UserError."""
    if given is None or isinstance(given, str):
        return given
    try:
        given = list(given)
    except TypeError:
        given = [given]
    if not all(isinstance(p, str) for p in given):
        raise UserError(f"`negative_prompt` {short(given)}: expected a text, or a list of some")
    return given


def _counted(prompts, seeds, generators):
    """([prompt], generators), as many of each. Raises UserError where they do not agree: a picture of another's noise is nobody's."""
    try:
        prompts = [prompts] if isinstance(prompts, str) else list(prompts)
    except TypeError:
        prompts = [prompts]
    if not prompts or not all(isinstance(p, str) for p in prompts):
        raise UserError(f"`prompts` {short(prompts)}: expected a text, or a list of some")
    if generators is not None and seeds is not None:
        raise UserError("`seeds` and `generators` both say what the noise is: give one of them")
    if generators is None:
        try:
            seeds = list(range(len(prompts)) if seeds is None else map(operator.index, seeds))
            generators = [torch.Generator().manual_seed(s) for s in seeds]
        except (TypeError, ValueError, RuntimeError, OverflowError):
            raise UserError(
                f"`seeds` {short(seeds)}: expected whole numbers up to 2^64 - 1, one for each prompt"
            ) from None
    if not isinstance(generators, torch.Generator):
        generators = list(generators) if hasattr(generators, "__iter__") else [generators]
        if odd := [g for g in generators if not isinstance(g, torch.Generator)]:
            raise UserError(
                f"`generators` {short(odd[0])}: expected torch.Generators, one for each prompt or one for all"
            )
    if not isinstance(generators, torch.Generator) and len(generators) != len(prompts):
        raise UserError(f"{len(prompts)} prompts and {len(generators)} seeds: one of each makes a picture")
    return prompts, generators
