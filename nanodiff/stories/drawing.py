"""What drawing needs before and after: the model, LoRAs and inputs that the options name, progress, what a picture remembers."""

import itertools
import math
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError, as_dict, from_mapping, printable, read_fields, short
from nanodiff.data import tables
from nanodiff.device import choice, memory, onednn
from nanodiff.diffusion import samplers
from nanodiff.models import layers, taesd
from nanodiff.models.clip import CLIPVisionModel
from nanodiff.models.freeu import FreeU
from nanodiff.output import foreign, images
from nanodiff.output.images import read_record, slug
from nanodiff.pipeline import Perturbed, SkipLayers, Words, control, pictures, single, sources
from nanodiff.pipeline.settings import Churn
from nanodiff.pipeline.sources import EMBEDDED
from nanodiff.training.options import parse_size
from nanodiff.weights import hub

LARGE = 1024  # channels of a denoiser from which --dtype auto takes bf16 on a CPU that computes in it


# What a PNG remembers, and what --from-image therefore brings back.
REMEMBERED = ("prompt", "negative_prompt", "model", "variant", "revision", "steps", "guidance_scale", "guidance_rescale",
              "scheduler", "sigmas", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "height", "width", "seed", "clip_skip", "resize", "dtype", "diffusers_quirks",
              "vae_checkpoint", "vae_tiling", "components", "prediction_type", "t5", "prompt_2", "prompt_3",
              "negative_prompt_2", "negative_prompt_3", "max_sequence_length", "long_prompts", "prompt_weights", "prompt_syntax", "lora_dir", "embedding",
              "lora", "lora_scale", "lora_fuse", "allow_partial", "skip_layers", "skip_layer_scale", "skip_layer_start",
              "skip_layer_stop", "perturbed_scale", "perturbed_layers", "freeu", "original_size", "target_size", "crop", "negative_original_size", "negative_target_size",
              "negative_crop", "denoising_end", "quantize", "fast_vae", "control", "control_image", "control_guess", "hires", "hires_strength",
              "hires_steps", "hires_latent", "ip_adapter", "ip_adapter_image", "image_encoder", "refiner", "refiner_start", "aesthetic_score", "negative_aesthetic_score")  # fmt: skip
PATHS = ("model", "refiner", "vae_checkpoint", "components", "fast_vae", "preview")  # what --base-dir stands before
# Settings that need the model to be loaded again when they change within a study.
LOADING = ("lora_dir", "model", "variant", "revision", "vae_checkpoint", "components", "prediction_type", "allow_pickle", "t5", "dtype",
           "offload", "quantize", "embedding", "lora", "lora_fuse", "allow_partial", "compile", "cuda_graph", "kernels", "fast_vae", "control", "refiner", "ip_adapter", "image_encoder")  # fmt: skip


def prompts_of(cfg, optional=False):
    """The prompts; [] where none is given and they are optional (some models draw without)."""
    prompts = list(cfg.prompt)
    if cfg.prompts_file:
        prompts += tables.lines(cfg.prompts_file)
    if not prompts:
        if optional and cfg.model:
            return []
        raise UserError('--prompt is required, such as --prompt "red apple"')
    return [p.encode("utf-8", "replace").decode() for p in prompts]  # bytes of the command line that are no UTF-8


def defaults(cfg, sd):
    """Fill what was left open from the kind of model. Returns (steps, guidance scale, negative prompt)."""
    steps, scale = sd.settings(cfg.ddim_steps or cfg.steps, cfg.guidance_scale)
    negative = cfg.negative_prompt
    if negative and sd.turbo and scale <= 1:
        print("warning: a turbo model is sampled without guidance; the negative prompt is not used", file=sys.stderr)
        negative = None
    elif negative and scale <= 1:
        print(
            f"warning: guidance is off at --guidance-scale {scale:g}; the negative prompt is not used", file=sys.stderr
        )
        negative = None
    for name in ("guidance_rescale", "skip_layers"):
        if getattr(cfg, name) and scale <= 1:
            flag = name.replace("_", "-")
            print(f"warning: guidance is off at --guidance-scale {scale:g}; --{flag} does nothing", file=sys.stderr)
    return steps, scale, negative


def rebase(cfg, names=PATHS):
    """Put --base-dir before relative paths; a model that is no folder there is a Hub id and stays."""
    base = Path(cfg.base_dir)
    names = (*names, "output", "output_dir") if names is PATHS else names
    for name in names:
        value = getattr(cfg, name)
        is_path = value and (name.startswith("output") or hub.trained(base / value).exists())
        if is_path and not Path(value).is_absolute() and base != Path("."):
            setattr(cfg, name, str(base / value))


def sizes(cfg, sd=None):
    """SDXL's size condition as generate() takes it, (height, width); None when nothing is given. sd: whose it is; a refiner beside a base model
    has a score in place of a target size."""
    names = {"original_size": "original_size", "target_size": "target_size", "crop": "crops_coords_top_left"}
    refines = sd is not None and sd.family is pipeline.families.REFINER
    if refines and cfg.refiner:
        del names["target_size"]
    scores = ("aesthetic_score", "negative_aesthetic_score")
    found = {
        name: getattr(cfg, name) for name in scores if getattr(cfg, name) is not None and (refines or not cfg.refiner)
    }
    for flag, name in names.items():
        for sign in ("", "negative_"):
            if text := getattr(cfg, sign + flag):
                left, top = parse_size(text, (sign + flag).replace("_", "-"), 0 if flag == "crop" else 1)
                found[sign + name] = (top, left)
    return found or None


def skip_layers(cfg):
    """--skip-layers as generate() takes it, or None."""
    if not cfg.skip_layers:
        return None
    try:
        layers = tuple(int(i) for i in cfg.skip_layers.split(","))
    except ValueError:
        raise UserError(f"--skip-layers {printable(cfg.skip_layers)!r}: expected numbers, such as 7,8,9") from None
    return SkipLayers(layers, cfg.skip_layer_scale, cfg.skip_layer_start, cfg.skip_layer_stop)


def freeu(cfg):
    """--freeu as generate() takes it, or None."""
    if not cfg.freeu:
        return None
    try:
        b1, b2, s1, s2 = (float(v) for v in cfg.freeu.split(","))
        if not all(map(math.isfinite, (b1, b2, s1, s2))):
            raise ValueError
        return FreeU(b1, b2, s1, s2)
    except ValueError:
        raise UserError(f"--freeu {printable(cfg.freeu)!r}: expected B1,B2,S1,S2, such as 1.5,1.6,0.9,0.2") from None


def load(cfg, record, device, src=None):
    """The pipeline that cfg asks for, LoRAs and learned words included."""
    layers.use_kernels(cfg.kernels)
    if cfg.cuda_graph == "on" and device.type != "cuda":
        raise UserError("--cuda-graph needs a CUDA device")
    with record.timed("load"):
        src = src or pipeline.source(
            cfg.model or EMBEDDED, cfg.variant, cfg.revision, cfg.token, cfg.components, cfg.prediction_type,
            cfg.allow_pickle, not cfg.t5,
        )  # fmt: skip
        dtype = pick_dtype(cfg, device, src)
        sd = pipeline.load(
            src,
            dtype,
            device,
            offload=cfg.offload,
            quantized=cfg.quantize,
            no_t5=not cfg.t5,
            scheduler=cfg.scheduler,
            name=cfg.model or EMBEDDED,
        )
        if cfg.vae_checkpoint:
            path, cls = hub.trained(cfg.vae_checkpoint), pipeline.BUILDERS["vae"]
            if sd.vae is None:
                raise UserError(f"--vae-checkpoint {path}: this model works in pixels and has no VAE")
            home = (dtype, device) if cfg.offload == "none" else (None, "cpu")
            if path.is_file():
                sd.vae = single.load_vae(path, sd.vae.cfg, cls, *home)
            else:
                sd.vae = sources.load_vae(path, *home)
            if cfg.offload != "none":
                memory.Resident(sd.vae, dtype, device)
            sd.check_fit()
        for path in cfg.embedding:
            print(f"learned word: {printable(sd.learn(path, cfg.allow_pickle))}")
        sd.loras, sd.hashes = [], {}
        for text in cfg.lora:
            path, scale = lora.parse(text)
            sd.hashes |= hashes(path)
            found = lora.read(path, sd.models(), cfg.allow_partial, words=True)
            for word, vectors in found.words.items():
                print(f"learned word: {printable(sd.learn_word(word, vectors, path))}")
            if cfg.lora_fuse:
                lora.fuse(sd.models(), found, scale * cfg.lora_scale, keep=False)
            else:
                sd.loras.append((lora.attach(sd.models(), found, scale), scale))
            print(f"lora: {found.name}, {len(found.deltas)} layers, scale {scale:g}")
        sd.refiner = load_refiner(cfg, sd, dtype, device) if cfg.refiner else None
        sd.adapters = [load_adapter(text, cfg, dtype, device) for text in cfg.ip_adapter]
        sd.controls = [load_control(text, cfg, sd, dtype, device) for text in cfg.control]
        sd.decoder = tiny_decoder(cfg.fast_vae, sd, device) if cfg.fast_vae else None
        sd.preview = tiny_decoder(cfg.preview, sd, device) if cfg.preview else None
    moves = cfg.offload != "none" or cfg.quantize  # weights that come and go, or are made again at every call
    sd.replays = {"on": True, "off": False, "auto": False if moves else "auto"}[cfg.cuda_graph]
    sd.packs = True  # nothing but pictures is asked of this pipeline
    if cfg.compile:
        sd.net.compile()
    return sd


def hashes(path):
    """{name: hash} of a LoRA's file as A1111 writes it: the SHA-256 of its tensors' bytes, 12 digits; nothing for what is no safetensors file."""
    path = Path(path)
    return {path.stem: weights.tensor_hash(path)[:12]} if path.suffix == ".safetensors" and path.is_file() else {}


def load_refiner(cfg, sd, dtype, device):
    """The model of --refiner, under the base model's sampler, where and as it computes."""
    src = pipeline.source(cfg.refiner, cfg.variant, None, cfg.token, None, None, cfg.allow_pickle)
    if pipeline.FAMILIES[src.kind].family is not pipeline.families.REFINER:
        raise UserError(
            f"--refiner {printable(cfg.refiner)}: is no refiner of SDXL, but a {pipeline.FAMILIES[src.kind].family.name} model"
        )
    found = pipeline.load(
        src,
        dtype,
        device,
        offload=cfg.offload,
        quantized=cfg.quantize,
        scheduler=samplers.name_of(sd.schedule),
        name=cfg.refiner,
    )
    if cfg.vae_checkpoint:
        found.vae = sd.vae
    print(f"refiner: {printable(cfg.refiner)}, from {cfg.refiner_start:g} of the noise on")
    return found


def load_adapter(text, cfg, dtype, device):
    """(IPAdapter, vision tower) of an --ip-adapter, where and as the denoiser computes; with --offload the tower stays in host memory."""
    adapter, path = pictures.load(pictures.parse(text)[0], dtype, device, cfg.token, cfg.allow_pickle)
    folder = pictures.encoder_folder(cfg.image_encoder, path, adapter.cfg, cfg.token)
    tower = weights.load(CLIPVisionModel, folder, dtype, device if cfg.offload == "none" else "cpu")
    print(f"image prompt: {printable(text)}, {memory.count(adapter) / 1e6:g} M parameters, seen by {printable(folder)}")
    return adapter, tower


def load_control(text, cfg, sd, dtype, device):
    """The ControlNet that a --control names, where and as the denoiser computes."""
    stays = cfg.offload == "none"
    net = control.load(
        control.parse(text)[0],
        sd.net.cfg,
        dtype if stays else None,
        device if stays else "cpu",
        cfg.token,
        cfg.allow_pickle,
    )
    if not stays:
        memory.Resident(net, dtype, device, blocks=cfg.offload == "sequential")
    print(f"control: {printable(text)}, {memory.count(net) / 1e6:g} M parameters")
    return net


def pick_dtype(cfg, device, src):
    """The torch dtype of --dtype for a source of a model."""
    family = pipeline.FAMILIES[src.kind]
    if cfg.dtype == "auto" and device.type == "cuda":
        return family.half
    if cfg.dtype == "auto" and onednn.computes_bf16():
        net = src.config(family.denoiser_name)
        widest = net.width if hasattr(net, "width") else max(net.block_out_channels)
        if widest >= LARGE:
            print("note: computing in bf16, which is twice as fast here; --dtype fp32 is exact", file=sys.stderr)
            return choice.DTYPES["bf16"]
    return choice.pick_dtype(cfg.dtype, device)


def tiny_decoder(path, sd, device):
    """f(latents) -> pixels of a TAESD decoder for this model's latents."""
    path = Path(path)
    file = weights.find_files(path)[0] if path.is_dir() else path
    model = taesd.from_state(weights.load_weights(file), "decoder", file)
    channels, wanted = model[1].in_channels, sd.channels
    if channels != wanted:
        raise UserError(f"{file}: TAESD for latents of {channels} channels, this model's have {wanted}")
    model = model.to(device).float()
    return lambda latents: model(latents.float()) * 2 - 1


def under(cfg, base):
    """The loaded pipeline under the sampler and LoRA scale that cfg asks for."""
    sd = base.with_scheduler(cfg.scheduler, cfg.sigmas)
    for attached, scale in base.loras:
        if attached.scale != scale * cfg.lora_scale:
            attached.scale = scale * cfg.lora_scale
            base.kept.clear()  # the text encoders may have changed
    for name in ("loras", "hashes", "decoder", "preview", "controls", "refiner", "adapters"):
        setattr(sd, name, getattr(base, name))
    if sd.refiner:
        sd.refiner = base.refiner.with_scheduler(samplers.name_of(sd.schedule), cfg.sigmas)
        sd.refiner.replays, sd.refiner.packs = sd.replays, sd.packs
    return sd


def words(cfg):
    """pipeline.Words as it stands on the command line."""
    names = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "max_sequence_length", "clip_skip")
    return Words(
        **{name: getattr(cfg, name) for name in names},
        long_prompts=cfg.long_prompts or cfg.prompt_syntax is not None,  # as those programs do
        weighted="comfyui" if cfg.prompt_syntax == "comfyui" else cfg.prompt_weights or cfg.prompt_syntax == "a1111",
        syntax=cfg.prompt_syntax == "a1111",
    )


def options(cfg, sd=None):
    """{words, and fields of pipeline.Drawing} as they stand on the command line, for a base model, or for `sd`."""
    return {
        "words": words(cfg),
        "eta": cfg.eta,
        "churn": Churn(cfg.s_churn, cfg.s_tmin, math.inf if cfg.s_tmax is None else cfg.s_tmax, cfg.s_noise)
        if cfg.s_churn
        else None,
        "guidance_rescale": cfg.guidance_rescale,
        "denoising_end": cfg.denoising_end,
        "sizes": sizes(cfg, sd),
        "skip_layers": skip_layers(cfg),
        "perturbed": Perturbed(cfg.perturbed_scale, tuple(cfg.perturbed_layers.split(",")))
        if cfg.perturbed_scale
        else None,
        "freeu": freeu(cfg),
        "tiled": cfg.vae_tiling,
        "quirks": cfg.diffusers_quirks,
    }


class Progress:
    """One bar over all steps of all batches, with steps per second; when nobody watches, a line every half minute.

    preview: (decoder, file), to show the estimate of the finished picture after every step.
    """

    def __init__(self, batches, preview=None):
        self.batches, self.done, self.preview = batches, 0, preview
        self.started = self.said = time.monotonic()

    def __enter__(self):
        self.bar = tqdm(desc="sampling", unit="it", disable=not sys.stderr.isatty(), file=sys.stderr)
        return self

    def step(self, i, n, step):
        if self.preview:
            images.save_grid(self.preview[0](step.x0), self.preview[1])
        self.done += 1
        self.bar.total = n * self.batches
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.said > 30:
            rate = self.done / (now - self.started)
            print(f"sampling: step {self.done} of {n * self.batches}, {rate:.2f} it/s", file=sys.stderr)
            self.said = now

    def skip(self, passes=1):
        """A batch of so many passes less to do."""
        self.batches -= passes

    def __exit__(self, *exc):
        self.bar.close()


def strip(cfg, sd, history, k, path, shown=8):
    """The estimates of the finished picture at up to `shown` evenly chosen steps, left to right."""
    picked = sorted({round(i * (len(history) - 1) / max(shown - 1, 1)) for i in range(shown)})

    with torch.no_grad():
        decode = sd.decoder or (lambda x0: sd.decode(x0.to(sd.dtype), cfg.vae_tiling))
        pixels = [decode(history[i].x0[k : k + 1]).float() for i in picked]
    images.save_grid(torch.cat(pixels), path, nrow=len(picked), labels=[f"t={history[i].t:.0f}" for i in picked])


NUMBERED = re.compile(r"(\d{5,})(_steps)?\.png")


def begun(cfg, out):
    """(number of a run's first picture in the folder `out`, f()): the one after those that are there, of whatever run; with --overwrite 0.
    f(), called when drawing begins: the run before makes room, with --overwrite its pictures are deleted. Raises UserError for what cannot."""
    there = {int(m[1]): p for p in out.iterdir() if (m := NUMBERED.fullmatch(p.name))}
    record, latents = out / "run.json", out / "latents.safetensors"
    if cfg.overwrite:
        listed = read_fields(record, {"files": list}).get("files", []) if record.is_file() else []
        names = {Path(str(f["path"])).name for f in listed if isinstance(f, dict) and "path" in f}
        old = [p for p in out.iterdir() if p.name in names and NUMBERED.fullmatch(p.name)]

        def delete():
            for path in old:
                path.unlink(missing_ok=True)
            if old:
                print(f"note: {out}: {len(old)} pictures of the run before are deleted", file=sys.stderr)

        return 0, delete
    if cfg.save_latents and latents.exists():
        raise UserError(f"{latents}: is of an earlier run; take another `output_dir` (or `overwrite`)")

    def keep():
        if record.is_file():
            kept = next(p for n in itertools.count(1) if not (p := out / f"run-{n}.json").exists())
            record.rename(kept)
            print(
                f"note: {out}: holds an earlier run's pictures; counting on, its run.json is {kept.name} now",
                file=sys.stderr,
            )

    return max(there, default=-1) + 1, keep


def documented(cfg):
    """Were the flags those of the document whose pictures are named by their settings (S3-13), `--model_id … --output_dir …` as it spells
    them?"""
    spelled = getattr(cfg, "spelled", frozenset())
    its = "output_dir" in spelled and bool(spelled & {"model_id", "number_inference_steps"})
    return its and "named" not in getattr(cfg, "given", ())


def unused(path, cfg):
    """`path`, or the first of path_2, path_3, … that is not there, unless it may be overwritten."""
    others = (path.with_name(f"{path.stem}_{n}{path.suffix}") for n in itertools.count(2))
    return path if cfg.overwrite or not path.exists() else next(p for p in others if not p.exists())


def file_name(cfg, facts, sd):
    """{prompt}_{model}_{scheduler}_cfg7_5_steps50_{seed}.png, of letters, digits and _ only; flows have one scheduler,
    which is not named (requirement S3-13); the document's own names have no seed."""
    model = slug(Path(str(cfg.model or "nano")).name)
    scale = f"{facts['guidance_scale']:g}".replace(".", "_")
    scheduler = "" if sd.schedule.flow else f"_{facts['scheduler']}"
    seed = "" if documented(cfg) else f"_{facts['seed']}"
    return f"{slug(facts['prompt'])}_{model}{scheduler}_cfg{scale}_steps{facts['steps']}{seed}.png"


def remembered(cfg, facts, sd, tagged=None):
    """Everything that --from-image needs, as JSON values. tagged: {name: hash} of the picture's own LoRAs."""
    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(sd.dtype).removeprefix("torch.")]
    values = as_dict(cfg) | facts | {"model": cfg.model or "embedded", "dtype": dtype}
    shown = {
        "lora_hashes": sd.hashes | (tagged or {}),
        "strength": cfg.strength,
        "mask_blur": cfg.mask_blur,
    }  # for other programs' eyes
    return (
        {k: values[k] for k in REMEMBERED}
        | {"init_image": bool(cfg.init_image)}
        | {k: v for k, v in shown.items() if v}
    )


def recall(cfg):
    """Fill cfg from the settings inside a picture; flags given on the command line win."""
    if images.recorded(cfg.from_image) is None and (other := foreign.read(cfg.from_image)):
        return adopt(cfg, *other)
    record = read_record(cfg.from_image)
    if record.get("init_image"):
        raise UserError(f"{cfg.from_image}: was made from another picture, which it does not contain")
    given = given_in(cfg)
    known = {k: record[k] for k in REMEMBERED if record.get(k) is not None}
    known["prompt"] = [known.get("prompt")]
    for key, value in from_mapping(type(cfg), known, cfg.from_image).items():
        if key not in given:
            setattr(cfg, key, value)
    if cfg.model == "embedded":
        cfg.model = None
    for name in (
        "model",
        "refiner",
        "vae_checkpoint",
        "components",
        "fast_vae",
        "lora",
        "embedding",
        "control",
        "control_image",
        "ip_adapter",
        "ip_adapter_image",
        "image_encoder",
    ):
        value = getattr(cfg, name)
        for path in value if isinstance(value, list) else [value]:
            path = path.rpartition(":")[0] or path if name == "lora" and path and not Path(path).exists() else path
            path = (
                {"control": control.parse, "ip_adapter": pictures.parse}.get(name, lambda p: (p,))(path)[0]
                if path
                else path
            )
            path = path.removeprefix("canny:") if name == "control_image" and not Path(path).exists() else path
            if path and name not in given and not Path(path).exists():
                flag = name.replace("_", "-")
                raise UserError(f"{cfg.from_image}: was made with {printable(path)}; name it with --{flag}")


def given_in(cfg):
    """The settings that the command line names, which win over a picture's."""
    given = getattr(cfg, "given", frozenset())
    return given | ({"steps", "scheduler"} if "ddim_steps" in given else set())


def adopt(cfg, program, found, unused):
    """Fill cfg from what another program's picture says; says what is taken and what is not."""
    given, cfg.adopted = given_in(cfg), True
    model = found.pop("model", "(it does not say which)")
    if "model" not in given:
        raise UserError(
            f"{cfg.from_image}: was made by {program} with the model {printable(model)}; name its file with --model"
        )
    for key, value in from_mapping(type(cfg), found, cfg.from_image).items():
        if key not in given:
            setattr(cfg, key, value)
    taken = ", ".join(f"{k}={short(v, 40)}" for k, v in found.items())
    print(f"{cfg.from_image}: {program}'s: {taken}")
    if unused:
        print(f"note: not used: {'; '.join(unused)}", file=sys.stderr)
