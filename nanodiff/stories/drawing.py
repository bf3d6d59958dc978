"""sample.py's story: a model, prompts and settings in; pictures, a sheet, a study out."""

import dataclasses
import gc
import json
import secrets
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError, as_dict, from_mapping, printable
from nanodiff.device import choice, memory, onednn
from nanodiff.diffusion import samplers
from nanodiff.files import out_dir
from nanodiff.models import layers, taesd
from nanodiff.output import images
from nanodiff.output.images import read_record, slug
from nanodiff.output.record import Record
from nanodiff.pipeline import SkipLayers, Words, single, sources
from nanodiff.pipeline.sources import EMBEDDED
from nanodiff.stories import study as grid
from nanodiff.training.options import parse_size
from nanodiff.weights import hub

LARGE = 1024  # channels of a denoiser from which --dtype auto takes bf16 on a CPU that computes in it
INDIVIDUAL = 16  # up to so many pictures, --output also writes them one by one


# What a PNG remembers, and what --from-image therefore brings back.
REMEMBERED = ("prompt", "negative_prompt", "model", "variant", "revision", "steps", "guidance_scale", "guidance_rescale",
              "scheduler", "eta", "height", "width", "seed", "clip_skip", "resize", "dtype", "diffusers_quirks",
              "vae_checkpoint", "vae_tiling", "components", "prediction_type", "t5", "prompt_2", "prompt_3",
              "negative_prompt_2", "negative_prompt_3", "max_sequence_length", "long_prompts", "prompt_weights", "embedding",
              "lora", "lora_scale", "lora_fuse", "allow_partial", "skip_layers", "skip_layer_scale", "skip_layer_start",
              "skip_layer_stop", "original_size", "target_size", "crop", "negative_original_size", "negative_target_size",
              "negative_crop", "denoising_end", "quantize", "fast_vae")  # fmt: skip
PATHS = ("model", "vae_checkpoint", "components", "fast_vae", "preview")  # what --base-dir stands before
# Settings that need the model to be loaded again when they change within a study.
LOADING = ("model", "variant", "revision", "vae_checkpoint", "components", "prediction_type", "allow_pickle", "t5", "dtype",
           "offload", "quantize", "embedding", "lora", "lora_fuse", "allow_partial", "compile", "cuda_graph", "kernels", "fast_vae")  # fmt: skip


def prompts_of(cfg, optional=False):
    """The prompts; [] where none is given and they are optional (some models draw without)."""
    prompts = list(cfg.prompt)
    if cfg.prompts_file:
        try:
            text = Path(cfg.prompts_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--prompts-file {cfg.prompts_file}: {e}") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        if optional and cfg.model:
            return []
        raise UserError('--prompt is required, such as --prompt "red apple"')
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("--prompt is empty")
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


def sizes(cfg):
    """SDXL's size condition as generate() takes it, (height, width); None when nothing is given."""
    names = {"original_size": "original_size", "target_size": "target_size", "crop": "crops_coords_top_left"}
    found = {}
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


def inputs(cfg, sd):
    """({height, width}, {image, strength, mask} for generate()), resized as diffusers does: an --init-image alone sets
    the size (down to a multiple of the VAE's), a mask or SD 3 brings the model's own size; --height and --width win."""

    picture = images.open_image(cfg.init_image) if cfg.init_image else None
    if picture and not cfg.mask and sd.keeps_size:
        height, width = (max(side // sd.multiple, 1) * sd.multiple for side in (picture.height, picture.width))
    else:
        height, width = sd.size
    height, width = cfg.height or height, cfg.width or width
    start = {}
    if picture:
        resized = picture.resize((width, height), images.Image.Resampling.LANCZOS)
        start = {
            "image": images.to_pixels(resized)[None].to(sd.device),
            "strength": 0.8 if cfg.strength is None else cfg.strength,
        }
    if cfg.mask:
        mask = images.open_image(cfg.mask).convert("L")
        if mask.size != picture.size:
            raise UserError(
                f"--mask {cfg.mask} is {mask.width}x{mask.height}, --init-image is {picture.width}x{picture.height}"
            )
        mask = mask.resize((width, height), images.Image.Resampling.LANCZOS)
        start["mask"] = (
            torch.frombuffer(bytearray(mask.tobytes()), dtype=torch.uint8).view(1, 1, height, width) >= 128
        ).float()
    return {"height": height, "width": width}, start


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
        sd.loras = []
        for text in cfg.lora:
            path, scale = lora.parse(text)
            found = lora.read(path, sd.models(), cfg.allow_partial)
            if cfg.lora_fuse:
                lora.fuse(sd.models(), found, scale * cfg.lora_scale, keep=False)
            else:
                sd.loras.append((lora.attach(sd.models(), found, scale), scale))
            print(f"lora: {found.name}, {len(found.deltas)} layers, scale {scale:g}")
        sd.decoder = tiny_decoder(cfg.fast_vae, sd, device) if cfg.fast_vae else None
        sd.preview = tiny_decoder(cfg.preview, sd, device) if cfg.preview else None
    moves = cfg.offload != "none" or cfg.quantize  # weights that come and go, or are made again at every call
    sd.replays = {"on": True, "off": False, "auto": False if moves else "auto"}[cfg.cuda_graph]
    sd.packs = True  # nothing but pictures is asked of this pipeline
    if cfg.compile:
        sd.net.compile()
    return sd


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
    model = taesd.from_state(weights.load_tensors(file), "decoder", file)
    channels, wanted = model[1].in_channels, sd.net.cfg.in_channels
    if channels != wanted:
        raise UserError(f"{file}: TAESD for latents of {channels} channels, this model's have {wanted}")
    model = model.to(device).float()
    return lambda latents: model(latents.float()) * 2 - 1


def under(cfg, base):
    """The loaded pipeline under the sampler and LoRA scale that cfg asks for."""
    sd = base.with_scheduler(cfg.scheduler)
    for attached, scale in base.loras:
        if attached.scale != scale * cfg.lora_scale:
            attached.scale = scale * cfg.lora_scale
            base.kept.clear()  # the text encoders may have changed
    sd.loras, sd.decoder, sd.preview = base.loras, base.decoder, base.preview
    return sd


def words(cfg):
    """pipeline.Words as it stands on the command line."""

    names = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "long_prompts", "max_sequence_length")
    return Words(**{name: getattr(cfg, name) for name in (*names, "clip_skip")}, weighted=cfg.prompt_weights)


def options(cfg):
    """{words, and fields of pipeline.Drawing} as they stand on the command line."""
    return {
        "words": words(cfg),
        "eta": cfg.eta,
        "guidance_rescale": cfg.guidance_rescale,
        "denoising_end": cfg.denoising_end,
        "sizes": sizes(cfg),
        "skip_layers": skip_layers(cfg),
        "tiled": cfg.vae_tiling,
        "quirks": cfg.diffusers_quirks,
    }


def main(cfg):
    if cfg.from_image:
        recall(cfg)
    cfg.check()
    samplers.check_name(cfg.scheduler)
    rebase(cfg)

    device = choice.pick_device(cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, device)
    if cfg.study:
        return study(cfg, device)
    prompts, resize = prompts_of(cfg, optional=True), parse_size(cfg.resize) if cfg.resize else None
    more = options(cfg)

    record = Record(cfg, device)
    out = record.out
    if cfg.output and (Path(cfg.output).is_dir() or not Path(cfg.output).absolute().parent.is_dir()):
        raise UserError(f"--output {cfg.output}: not a file name in an existing folder")
    if cfg.seed is None:
        cfg.seed = secrets.randbelow(1 << 32)
        print(f"seed: {cfg.seed}")
    sd = under(cfg, load(cfg, record, device))
    if not prompts and not sd.unconditional:
        raise UserError('--prompt is required, such as --prompt "red apple"')
    prompts = prompts or [""]
    steps, scale, negative = defaults(cfg, sd)
    samplers.check_steps(sd.schedule, steps)
    settings = described(sd, steps, scale, negative)

    size, start = inputs(cfg, sd)
    record.data["config"] = as_dict(cfg) | settings | size  # resolved
    jobs = [(prompt, i) for prompt in prompts for i in range(cfg.num_images)]
    if cfg.offload != "none":  # the text encoders come once, for all prompts, and leave before the denoiser
        with record.timed("encode"):
            sd.prepare(prompts, negative, words(cfg), guided=scale > 1)
    sheet, latents, made = [], [], 0
    try:
        batches = batches_of(jobs, cfg, sd)
        with Progress(len(batches), sd.preview and (sd.preview, out / "preview.png")) as progress:
            for first, batch in batches:
                seeds = [cfg.seed + first + k for k in range(len(batch))]
                with record.timed("sample"):
                    result = sd.generate(
                        [prompt for prompt, _ in batch], negative, steps=steps, guidance_scale=scale, seeds=seeds, **size, **start, **more,
                        keep_steps=cfg.progress_strip, on_step=progress.step, decode=sd.decoder,
                    )  # fmt: skip
                if cfg.save_latents:
                    latents.append(result.latents.cpu().float())
                for k, picture in enumerate(images.to_pil(result.pixels)):
                    picture = picture.resize(resize, images.Image.Resampling.LANCZOS) if resize else picture
                    facts = settings | size | {"prompt": batch[k][0], "seed": seeds[k]}
                    path = out / (file_name(cfg, facts, sd) if cfg.named else f"{first + k:05d}.png")
                    images.save_png(picture, path, remembered(cfg, facts, sd) if cfg.metadata else None)
                    record.file(path, seed=seeds[k], prompt=batch[k][0])
                    made += 1
                    if cfg.output:
                        sheet.append((picture, batch[k][0]))
                    if cfg.progress_strip:
                        strip(cfg, sd, result.history, k, path.with_name(path.stem + "_steps.png"))
                        record.file(path.with_name(path.stem + "_steps.png"), seed=seeds[k], prompt=batch[k][0])
    finally:  # what was finished is kept and listed, also after Ctrl-C
        if sheet and cfg.output:
            pictures, labels = zip(*sheet, strict=True)
            images.save_png(images.grid(pictures, cfg.nrow, labels if cfg.labels else None), cfg.output)
            record.file(cfg.output)
            if len(pictures) <= INDIVIDUAL:
                folder = out_dir(Path(cfg.output).with_suffix("").as_posix() + "_individual")
                for i, picture in enumerate(pictures):
                    images.save_png(picture, folder / f"image_{i:03d}.png")
                    record.file(folder / f"image_{i:03d}.png")
        if latents and cfg.save_latents:
            weights.save_tensors(out / "latents.safetensors", {"latents": torch.cat(latents)})
            record.file(out / "latents.safetensors")
        record.data["results"]["images"] = made
        for replayed in sd.recorded.values():
            graphs = {"recorded": len(replayed.recordings), "megabytes": replayed.memory() >> 20}
            record.data["results"]["cuda_graph"] = graphs
        record.write()
    print(f"{made} pictures in {out}" + (f", sheet {cfg.output}" if cfg.output else ""))


def batches_of(jobs, cfg, sd):
    """[(index of the first, jobs)] of up to --batch-size neighbours whose prompts have one length in chunks: a longer
    neighbour (--long-prompts) would change what a picture attends to."""
    batches = []
    for i, job in enumerate(jobs):
        words = (job[0], cfg.prompt_2, cfg.prompt_3)[: len(sd.encoder_names)]
        length = sd.chunks(words, cfg.long_prompts, cfg.prompt_weights)
        if not batches or len(batches[-1][1]) == cfg.batch_size or length != batches[-1][2]:
            batches.append((i, [], length))
        batches[-1][1].append(job)
    return [(first, batch) for first, batch, _ in batches]


def described(sd, steps, scale, negative):
    """Print what the model is and how it will be sampled; returns the latter."""

    for part, millions in sd.parameters().items():
        print(f"{part}: {millions} M parameters")
    name = samplers.name_of(sd.schedule)
    settings = {"scheduler": name, "steps": steps, "guidance_scale": scale, "negative_prompt": negative}
    print("settings: " + ", ".join(f"{k}={printable(v)}" for k, v in settings.items()))
    return settings


def study(cfg, device):
    """Every combination of --study's settings on the same prompts and noise. See nanodiff/study.py."""

    for name in ("output", "from_image", "save_latents", "progress_strip", "named", "preview"):
        if getattr(cfg, name):
            raise UserError(f"--{name.replace('_', '-')} is not for --study, which writes its own sheet")
    axes = grid.parse(cfg.study, type(cfg))
    cells = grid.cells(axes)
    variants = [dataclasses.replace(cfg, **cell) for cell in cells]
    for cell, variant in zip(cells, variants, strict=True):
        rebase(variant, [name for name in PATHS if name in cell])
    for variant in variants:  # all of them, before any work
        variant.check()
        prompts_of(variant)
        options(variant)
    record = Record(cfg, device)
    finished = grid.Finished(record.out, cfg.seed)
    if finished.seed is None:
        finished.seed = secrets.randbelow(1 << 32)
    print(f"seed: {finished.seed}")
    cfg.seed = finished.seed
    rows, base, sd, loaded, skipped = {}, None, None, None, 0  # rows: {(cell, picture): row of study.csv}
    total = sum(len(prompts_of(variant)) * cfg.num_images for variant in variants)
    try:
        with Progress(total) as progress:
            for c, (cell, variant) in enumerate(zip(cells, variants, strict=True)):
                jobs = [(prompt, i) for prompt in prompts_of(variant) for i in range(cfg.num_images)]
                for j, (prompt, _) in enumerate(jobs):
                    seed = (cfg.seed if variant.seed is None else variant.seed) + j
                    facts = {k: v for k, v in as_dict(variant).items() if k not in grid.FIXED | grid.SAME} | {
                        "prompt": prompt,
                        "seed": seed,
                    }
                    key = json.dumps(facts, sort_keys=True)
                    if row := finished.get(key):
                        rows[c, j] = row | cell
                        skipped += 1
                        progress.skip()
                        continue
                    wanted = [getattr(variant, k) for k in LOADING] + [variant.lora_scale] * variant.lora_fuse
                    if loaded != wanted:
                        base = sd = None  # the old one leaves before the new one comes
                        gc.collect()
                        if device.type == "cuda":
                            torch.cuda.empty_cache()
                        base, loaded = load(variant, record, device), wanted
                    path, began = record.out / finished.name(key), time.perf_counter()
                    sd = under(variant, base)
                    with record.timed("sample"):
                        one_picture(variant, sd, prompt, seed, path, progress)
                    seconds = round(time.perf_counter() - began, 3)
                    rows[c, j] = cell | {"file": path.name, "prompt": prompt, "seed": seed, "seconds": seconds}
                    finished.add(key, rows[c, j])
    finally:  # what was finished is kept, listed and shown, also after Ctrl-C
        if rows:
            finished.write_csv(rows.values(), dict(axes))
            images.save_png(grid.sheet(rows, axes, record.out, cfg.nrow), record.out / "study.png")
        for row in rows.values():
            record.file(record.out / row["file"], seed=row["seed"], prompt=row["prompt"])
        record.data["results"] |= {"images": len(rows), "cells": len(cells), "taken_over": skipped}
        record.write()
    again = f" ({skipped} of them finished before)" if skipped else ""
    print(f"{len(rows)} pictures{again}, sheet {record.out / 'study.png'}, table {record.out / 'study.csv'}")


def one_picture(cfg, sd, prompt, seed, path, progress):
    """Make and write one picture of a study."""

    steps, scale, negative = defaults(cfg, sd)
    size, start = inputs(cfg, sd)
    result = sd.generate(
        [prompt], negative, steps=steps, guidance_scale=scale, seeds=[seed], **size, **start, **options(cfg), on_step=progress.step,
        decode=sd.decoder,
    )  # fmt: skip
    (picture,) = images.to_pil(result.pixels)
    if cfg.resize:
        picture = picture.resize(parse_size(cfg.resize), images.Image.Resampling.LANCZOS)
    facts = {"scheduler": samplers.name_of(sd.schedule), "steps": steps, "guidance_scale": scale} | size
    facts |= {"negative_prompt": negative, "prompt": prompt, "seed": seed}
    images.save_png(picture, path, remembered(cfg, facts, sd) if cfg.metadata else None)


def dry_run(cfg, device):
    """Print what a run would take, from configurations alone."""

    src = sources.configs(
        cfg.model or EMBEDDED, cfg.variant, cfg.revision, cfg.token, cfg.components, cfg.prediction_type,
        cfg.allow_pickle, not cfg.t5,
    )  # fmt: skip
    dtype = pick_dtype(cfg, device, src)
    turbo = pipeline.is_turbo(src.scheduler()[0], str(cfg.model))
    guided = not turbo if cfg.guidance_scale is None else cfg.guidance_scale > 1
    prompts = len(prompts_of(cfg)) if cfg.prompt or cfg.prompts_file else 1
    plan = pipeline.plan(
        src, dtype, cfg.height, cfg.width, min(cfg.batch_size, cfg.num_images * prompts), guided,
        cfg.quantize, cfg.t5, cfg.max_sequence_length or 256, cfg.vae_tiling,
    )  # fmt: skip
    for line in memory.table(plan, cfg.offload):
        print(line)
    print("without what the libraries take for themselves (a CUDA context: about 0.5 GB)")


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

    def skip(self):
        """One batch less to do."""
        self.batches -= 1

    def __exit__(self, *exc):
        self.bar.close()


def strip(cfg, sd, history, k, path, shown=8):
    """The estimates of the finished picture at up to `shown` evenly chosen steps, left to right."""

    picked = sorted({round(i * (len(history) - 1) / max(shown - 1, 1)) for i in range(shown)})

    with torch.no_grad():
        decode = sd.decoder or (lambda x0: sd.decode(x0.to(sd.dtype), cfg.vae_tiling))
        pixels = [decode(history[i].x0[k : k + 1]).float() for i in picked]
    images.save_grid(torch.cat(pixels), path, nrow=len(picked), labels=[f"t={history[i].t:.0f}" for i in picked])


def file_name(cfg, facts, sd):
    """{prompt}_{model}_{scheduler}_cfg7_5_steps50_{seed}.png, of letters, digits and _ only; flows have one scheduler,
    which is not named (requirement S3-13)."""

    model = slug(Path(str(cfg.model or "nano")).name)
    scale = f"{facts['guidance_scale']:g}".replace(".", "_")
    scheduler = "" if sd.schedule.flow else f"_{facts['scheduler']}"
    return f"{slug(facts['prompt'])}_{model}{scheduler}_cfg{scale}_steps{facts['steps']}_{facts['seed']}.png"


def remembered(cfg, facts, sd):
    """Everything that --from-image needs, as JSON values."""
    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(sd.dtype).removeprefix("torch.")]
    values = as_dict(cfg) | facts | {"model": cfg.model or "embedded", "dtype": dtype}
    return {k: values[k] for k in REMEMBERED} | {"init_image": bool(cfg.init_image)}


def recall(cfg):
    """Fill cfg from the settings inside a picture; flags given on the command line win."""

    record = read_record(cfg.from_image)
    if record.get("init_image"):
        raise UserError(f"{cfg.from_image}: was made from another picture, which it does not contain")
    given = getattr(cfg, "given", frozenset())
    given |= {"steps", "scheduler"} if "ddim_steps" in given else set()
    known = {k: record[k] for k in REMEMBERED if record.get(k) is not None}
    known["prompt"] = [known.get("prompt")]
    for key, value in from_mapping(type(cfg), known, cfg.from_image).items():
        if key not in given:
            setattr(cfg, key, value)
    if cfg.model == "embedded":
        cfg.model = None
    for name in ("model", "vae_checkpoint", "components", "fast_vae", "lora", "embedding"):
        value = getattr(cfg, name)
        for path in value if isinstance(value, list) else [value]:
            path = path.rpartition(":")[0] or path if name == "lora" and path and not Path(path).exists() else path
            if path and name not in given and not Path(path).exists():
                flag = name.replace("_", "-")
                raise UserError(f"{cfg.from_image}: was made with {printable(path)}; name it with --{flag}")
