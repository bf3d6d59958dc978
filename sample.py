"""Make pictures from words.

    python sample.py --prompt "red apple" --output-dir out                          # the embedded model
    python sample.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a corgi on a beach" --output-dir out
    python sample.py --prompt "red apple" --study "scheduler=ddpm,ddim;guidance_scale=1,3,7.5" --output-dir out
    python sample.py --model stable-diffusion-3.5-medium --dry-run                  # how much memory it would take

The same model, prompt, seed and settings give the picture that diffusers gives with CPU generators.
"""

import dataclasses
import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanodiff.config import UserError, arg, as_dict, from_mapping, printable, script
from nanodiff.options import parse_size

# torch is imported inside main(), so that --help answers at once.

LESS_MEMORY = (
    "try --batch-size 1, a smaller --height and --width, --dtype bf16, --vae-tiling, --offload model or --quantize nf4 "
    "(--dry-run predicts what fits)"
)
LARGE = 1024  # channels of a denoiser from which --dtype auto takes bf16 on a CPU that computes in it
INDIVIDUAL = 16  # up to so many pictures, --output also writes them one by one
EMBEDDED = Path(__file__).parent / "assets" / "nano"
SCHEDULERS = ("ddpm", "ddim", "pndm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "heun", "lcm", "flow_euler",
              "flow_heun")  # fmt: skip


@dataclass
class Config:
    model: str | None = arg(
        None,
        "folder, single-file checkpoint or Hub id org/name[@revision]; default: the embedded model",
        "model-id",
        "diffusion-checkpoint",
    )
    vae_checkpoint: str | None = arg(None, "folder or file of another VAE")
    components: str | None = arg(None, "folder or Hub id for what a single file or a single component lacks")
    prediction_type: str | None = arg(
        None, "what a single-file model predicts", choices=("epsilon", "v_prediction", "sample")
    )
    allow_pickle: bool = arg(False, "read .ckpt, .pt and .bin files, which may be hostile")
    t5: bool = arg(True, "use SD 3's third text encoder, where the model has it")
    variant: str | None = arg(None, "file variant, such as fp16")
    revision: str | None = arg(None, "branch, tag or commit of a Hub id")
    token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)")
    prompt: list[str] = arg([], "what to draw; repeatable")
    prompts_file: str | None = arg(None, "text file with one prompt a line")
    prompt_2: str | None = arg(None, "for the second text encoder (SDXL, SD 3); default: --prompt")
    prompt_3: str | None = arg(None, "for the third text encoder (SD 3); default: --prompt")
    negative_prompt: str | None = arg(None, "what to keep away from")
    negative_prompt_2: str | None = arg(None, "for the second text encoder; default: --negative-prompt")
    negative_prompt_3: str | None = arg(None, "for the third text encoder; default: --negative-prompt")
    max_sequence_length: int | None = arg(None, "T5's tokens (SD 3), up to 512; default 256")
    long_prompts: bool = arg(False, "no limit of 75 tokens: encode longer prompts in chunks")
    prompt_weights: bool = arg(
        False, "(word:1.2), ((word)) and [word] weigh words; BREAK begins a chunk of --long-prompts"
    )
    embedding: list[str] = arg([], "file of a learned word (textual inversion), used by its name; repeatable")
    lora: list[str] = arg([], "FILE or FILE:SCALE of a LoRA; repeatable")
    lora_scale: float = arg(1.0, "multiplies the scale of every --lora")
    lora_fuse: bool = arg(False, "add LoRAs into the weights: no cost per step, but not for --quantize")
    allow_partial: bool = arg(False, "use a LoRA although layers of it are not in this model")
    steps: int | None = arg(
        None,
        "sampling steps; default 50 (turbo 1 or 4, embedded 25, SD 3.5 40 or 28)",
        "num-inference-steps",
        "number-inference-steps",
    )
    ddim_steps: int | None = arg(None, "short for --scheduler ddim --steps N")
    guidance_scale: float | None = arg(
        None,
        "classifier-free guidance; 1 or less = off; default 7.5 (turbo 0, embedded 3, SD 3.5 4.5 or 3.5)",
        "cfg-scale",
    )
    guidance_rescale: float = arg(0.0, "std correction of the guidance, 0 to 1")
    skip_layers: str | None = arg(None, "skip-layer guidance of SD 3.5 medium: blocks, such as 7,8,9")
    skip_layer_scale: float = arg(2.8, "strength of --skip-layers")
    skip_layer_start: float = arg(0.01, "part of the steps after which --skip-layers begins")
    skip_layer_stop: float = arg(0.2, "part of the steps after which --skip-layers ends")
    original_size: str | None = arg(None, "SDXL: WIDTHxHEIGHT the picture is said to come from; default: its own")
    target_size: str | None = arg(None, "SDXL: WIDTHxHEIGHT the picture is said to be for; default: its own")
    crop: str | None = arg(None, "SDXL: LEFTxTOP corner it is said to be cropped at; default 0x0")
    negative_original_size: str | None = arg(None, "SDXL: the same for the negative prompt")
    negative_target_size: str | None = arg(None, "SDXL: the same for the negative prompt")
    negative_crop: str | None = arg(None, "SDXL: the same for the negative prompt")
    denoising_end: float | None = arg(None, "stop when this part of the noise is gone, between 0 and 1")
    scheduler: str | None = arg(None, "sampler; default: the model's own", choices=SCHEDULERS)
    eta: float = arg(0.0, "DDIM noise, 0 to 1")
    height: int | None = arg(None, "pixels; default: the model's own")
    width: int | None = arg(None, "pixels; default: the model's own")
    num_images: int = arg(1, "pictures per prompt")
    batch_size: int = arg(4, "pictures at a time")
    seed: int | None = arg(None, "picture i uses seed + i; default: random, printed")
    clip_skip: int = arg(0, "leave out the last N layers of the text encoder")
    init_image: str | None = arg(None, "start from this picture (image-to-image)")
    strength: float | None = arg(None, "how much of --init-image is repainted, above 0 to 1; default 0.8")
    mask: str | None = arg(None, "white where --init-image is repainted (inpainting)")
    output_dir: str = arg("out", "folder of the pictures 00000.png, 00001.png, … and run.json")
    output: str | None = arg(
        None, "also write one sheet of all pictures here (and up to 16 of them one by one beside it)"
    )
    base_dir: str = arg(".", "folder that relative --output, --output-dir and model paths start from")
    nrow: int | None = arg(None, "pictures in a row of the sheet")
    named: bool = arg(False, "file names from prompt, model and settings instead of numbers")
    labels: bool = arg(False, "write each prompt above its picture in the sheet")
    save_latents: bool = arg(False, "write latents.safetensors")
    progress_strip: bool = arg(False, "write a strip of the x0 estimates over the steps for each picture")
    resize: str | None = arg(None, "WIDTHxHEIGHT of the written pictures")
    metadata: bool = arg(True, "write the settings into each PNG")
    from_image: str | None = arg(None, "repeat a picture from the settings inside it")
    study: str | None = arg(
        None, 'every combination of settings as a labelled sheet and study.csv: "steps=5,25,50;scheduler=ddpm,ddim"'
    )
    offload: str = arg(
        "none",
        "models on the device: all (none), one at a time, block by block",
        choices=("none", "model", "sequential"),
    )
    quantize: str | None = arg(None, "weights of denoiser and T5 in 8 or 4 bits", choices=("int8", "nf4"))
    vae_tiling: bool = arg(False, "decode in tiles: less memory for large pictures, the same picture")
    fast_vae: str | None = arg(None, "decode drafts with this TAESD decoder (file or folder)")
    preview: str | None = arg(None, "write preview.png after every step with this TAESD decoder (file or folder)")
    dry_run: bool = arg(False, "print parameters, bytes and peak memory, and make nothing (needs no weights)")
    compile: bool = arg(False, "torch.compile the denoiser: slow first step, faster many steps")
    cuda_graph: str = arg(
        "auto",
        "record a denoising step once and replay it; auto: on a GPU, for up to two guided pictures at a time",
        choices=("auto", "on", "off"),
        const="on",
    )
    diffusers_quirks: bool = arg(False, 'repeat diffusers\' DDIM error off "leading" spacing (see samplers.py)')
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = arg(
        "auto",
        "weights: auto is fp16 (SD 3: bf16) on a GPU; on a CPU bf16 for large models where it is fast, else fp32",
        choices=("auto", "fp32", "fp16", "bf16"),
    )
    kernels: str = arg(
        "auto",
        "our Triton kernels on a GPU: auto falls back to PyTorch and says why, triton never falls back, torch uses none",
        choices=("auto", "triton", "torch"),
    )


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
    embedded = cfg.model is None
    steps = cfg.ddim_steps or cfg.steps
    own = sd.sampling("steps") or (25 if embedded else sd.steps)
    steps = steps if steps is not None else sd.turbo_steps if sd.turbo else own
    scale = cfg.guidance_scale
    own = sd.sampling("guidance_scale")
    own = own if own is not None else 3.0 if embedded else sd.guidance
    scale = scale if scale is not None else 0.0 if sd.turbo or sd.unconditional else own
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


def check(cfg):
    """Settings that make no sense are refused before anything is loaded."""
    if cfg.ddim_steps is not None:
        if cfg.steps is not None or cfg.scheduler not in (None, "ddim"):
            raise UserError("--ddim-steps is --scheduler ddim --steps N; do not give them together")
        cfg.scheduler = "ddim"
    if cfg.steps == 0 or cfg.ddim_steps == 0:
        raise UserError("--steps 0 makes no picture; use 1 or more")
    for name in ("num_images", "batch_size", "height", "width", "nrow"):
        if getattr(cfg, name) is not None and getattr(cfg, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} must be at least 1, not {getattr(cfg, name)}")
    if cfg.guidance_scale is not None and not 0 <= cfg.guidance_scale <= 100:
        raise UserError(f"--guidance-scale {cfg.guidance_scale:g} must be between 0 and 100")
    if not 0 <= cfg.eta <= 1 or not 0 <= cfg.guidance_rescale <= 1:
        raise UserError("--eta and --guidance-rescale must be between 0 and 1")
    if cfg.mask and not cfg.init_image:
        raise UserError("--mask needs --init-image")
    if cfg.strength is not None and not 0 < cfg.strength <= 1:
        raise UserError(f"--strength {cfg.strength:g} must be above 0 and at most 1")
    needed = (("strength", "init_image"), ("nrow", "output"), ("labels", "output"), ("lora_fuse", "lora"))
    needed += (
        ("allow_partial", "lora"),
        ("negative_prompt_2", "negative_prompt"),
        ("negative_prompt_3", "negative_prompt"),
    )
    defaults = {f.name: f.default for f in dataclasses.fields(Config)}
    needed += tuple((f"skip_layer_{part}", "skip_layers") for part in ("scale", "start", "stop"))
    for name, needs in (*needed, ("lora_scale", "lora")):
        if getattr(cfg, name) not in (None, False, defaults[name]) and getattr(cfg, needs) in (None, []):
            raise UserError(f"--{name.replace('_', '-')} does nothing without --{needs.replace('_', '-')}")
    if cfg.cuda_graph == "on" and (cfg.offload != "none" or cfg.quantize):
        raise UserError("--cuda-graph is not for --offload or --quantize")
    if cfg.compile and cfg.offload == "sequential":
        raise UserError("--compile needs the whole model in one place; use --offload model or none")
    if cfg.fast_vae and cfg.vae_tiling:
        raise UserError("--fast-vae decodes instead of the VAE; --vae-tiling has nothing to do")
    if cfg.denoising_end is not None and not 0 < cfg.denoising_end < 1:
        raise UserError(f"--denoising-end {cfg.denoising_end:g} must be between 0 and 1")
    if cfg.seed is not None and not 0 <= cfg.seed < 1 << 63:
        raise UserError(f"--seed {cfg.seed} must be between 0 and 2^63 - 1")


def rebase(cfg, names=PATHS):
    """Put --base-dir before relative paths; a model that is no folder there is a Hub id and stays."""
    from nanodiff import hub

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
    from nanodiff.pipeline import SkipLayers

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
    import torch

    from nanodiff import images

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
    from nanodiff import hub, lora, memory, pipeline, singlefile, sources
    from nanodiff.models import layers

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
                sd.vae = singlefile.load_vae(path, sd.vae.cfg, cls, *home)
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
    from nanodiff import engine, onednn, pipeline

    family = pipeline.FAMILIES[src.kind]
    if cfg.dtype == "auto" and device.type == "cuda":
        return family.half
    if cfg.dtype == "auto" and onednn.computes_bf16():
        net = src.config(family.denoiser_name)
        widest = net.width if hasattr(net, "width") else max(net.block_out_channels)
        if widest >= LARGE:
            print("note: computing in bf16, which is twice as fast here; --dtype fp32 is exact", file=sys.stderr)
            return engine.DTYPES["bf16"]
    return engine.pick_dtype(cfg.dtype, device)


def tiny_decoder(path, sd, device):
    """f(latents) -> pixels of a TAESD decoder for this model's latents."""
    from nanodiff import weights
    from nanodiff.models import taesd

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
    """What Pipeline.conditions() takes as it stands on the command line."""
    names = ("prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "long_prompts", "max_sequence_length")
    return {name: getattr(cfg, name) for name in (*names, "clip_skip")} | {"weighted": cfg.prompt_weights}


def options(cfg):
    """What generate() takes as it stands on the command line."""
    return words(cfg) | {
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
    check(cfg)
    rebase(cfg)
    from nanodiff import engine

    device = engine.pick_device(cfg.device)
    if cfg.dry_run:
        return dry_run(cfg, device)
    if cfg.study:
        return study(cfg, device)
    prompts, resize = prompts_of(cfg, optional=True), parse_size(cfg.resize) if cfg.resize else None
    more = options(cfg)

    import torch

    from nanodiff import images, samplers, weights

    record = engine.Record(cfg, device)
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
            sd.prepare(prompts, negative, guided=scale > 1, **words(cfg))
    sheet, latents, made = [], [], 0
    try:
        batches = batches_of(jobs, cfg, sd)
        with Progress(len(batches), sd.preview and (sd.preview, out / "preview.png")) as progress:
            for first, batch in batches:
                seeds = [cfg.seed + first + k for k in range(len(batch))]
                with record.timed("sample"):
                    result = sd.generate(
                        [prompt for prompt, _ in batch], negative, steps, scale, seeds, **size, **start, **more,
                        keep_steps=cfg.progress_strip, on_step=progress.step, decoder=sd.decoder,
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
                folder = engine.out_dir(Path(cfg.output).with_suffix("").as_posix() + "_individual")
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
    from nanodiff import samplers

    for part, millions in sd.parameters().items():
        print(f"{part}: {millions} M parameters")
    name = samplers.name_of(sd.schedule)
    settings = {"scheduler": name, "steps": steps, "guidance_scale": scale, "negative_prompt": negative}
    print("settings: " + ", ".join(f"{k}={printable(v)}" for k, v in settings.items()))
    return settings


def study(cfg, device):
    """Every combination of --study's settings on the same prompts and noise. See nanodiff/study.py."""
    import gc
    import json

    import torch

    from nanodiff import engine, images
    from nanodiff import study as grid

    for name in ("output", "from_image", "save_latents", "progress_strip", "named", "preview"):
        if getattr(cfg, name):
            raise UserError(f"--{name.replace('_', '-')} is not for --study, which writes its own sheet")
    axes = grid.parse(cfg.study, Config)
    cells = grid.cells(axes)
    variants = [dataclasses.replace(cfg, **cell) for cell in cells]
    for cell, variant in zip(cells, variants, strict=True):
        rebase(variant, [name for name in PATHS if name in cell])
    for variant in variants:  # all of them, before any work
        check(variant)
        prompts_of(variant)
        options(variant)
    record = engine.Record(cfg, device)
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
    from nanodiff import images, samplers

    steps, scale, negative = defaults(cfg, sd)
    size, start = inputs(cfg, sd)
    result = sd.generate(
        [prompt], negative, steps, scale, [seed], **size, **start, **options(cfg), on_step=progress.step,
        decoder=sd.decoder,
    )  # fmt: skip
    (picture,) = images.to_pil(result.pixels)
    if cfg.resize:
        picture = picture.resize(parse_size(cfg.resize), images.Image.Resampling.LANCZOS)
    facts = {"scheduler": samplers.name_of(sd.schedule), "steps": steps, "guidance_scale": scale} | size
    facts |= {"negative_prompt": negative, "prompt": prompt, "seed": seed}
    images.save_png(picture, path, remembered(cfg, facts, sd) if cfg.metadata else None)


def dry_run(cfg, device):
    """Print what a run would take, from configurations alone."""
    from nanodiff import memory, pipeline, sources

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
        from tqdm import tqdm

        self.bar = tqdm(desc="sampling", unit="it", disable=not sys.stderr.isatty(), file=sys.stderr)
        return self

    def step(self, i, n, step):
        if self.preview:
            from nanodiff import images

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
    from nanodiff import images

    picked = sorted({round(i * (len(history) - 1) / max(shown - 1, 1)) for i in range(shown)})
    import torch

    with torch.no_grad():
        decode = sd.decoder or (lambda x0: sd.decode(x0.to(sd.dtype), cfg.vae_tiling))
        pixels = [decode(history[i].x0[k : k + 1]).float() for i in picked]
    images.save_grid(torch.cat(pixels), path, nrow=len(picked), labels=[f"t={history[i].t:.0f}" for i in picked])


def file_name(cfg, facts, sd):
    """{prompt}_{model}_{scheduler}_cfg7_5_steps50_{seed}.png, of letters, digits and _ only; flows have one scheduler,
    which is not named (requirement S3-13)."""
    from nanodiff.images import slug

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
    from nanodiff.images import read_record

    record = read_record(cfg.from_image)
    if record.get("init_image"):
        raise UserError(f"{cfg.from_image}: was made from another picture, which it does not contain")
    given = getattr(cfg, "given", frozenset())
    given |= {"steps", "scheduler"} if "ddim_steps" in given else set()
    known = {k: record[k] for k in REMEMBERED if record.get(k) is not None}
    known["prompt"] = [known.get("prompt")]
    for key, value in from_mapping(Config, known, cfg.from_image).items():
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


if __name__ == "__main__":
    sys.exit(script({"": (Config, main)}, __doc__, less_memory=LESS_MEMORY))
