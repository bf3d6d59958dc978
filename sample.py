"""Make pictures from words.

    python sample.py --prompt "red apple" --output-dir out                          # the embedded model
    python sample.py --model stable-diffusion-v1-5/stable-diffusion-v1-5 --prompt "a corgi on a beach" --output-dir out
    python sample.py --prompt "red apple" --prompt "fire" --num-images 8 --output sheet.png --nrow 8 --output-dir out

The same model, prompt, seed and settings give the picture that diffusers gives with CPU generators.
"""

import secrets
import sys
import time
from dataclasses import dataclass
from pathlib import Path

from nanodiff.config import UserError, arg, as_dict, from_mapping, printable, script

# torch is imported inside main(), so that --help answers at once.

INDIVIDUAL = 16  # up to so many pictures, --output also writes them one by one
EMBEDDED = Path(__file__).parent / "assets" / "nano"
SCHEDULERS = ("ddpm", "ddim", "pndm", "euler", "euler_a", "dpmpp_2m", "dpmpp_2m_karras", "heun", "lcm", "flow_euler")


@dataclass
class Config:
    model: str | None = arg(
        None, "folder or Hub id org/name[@revision]; default: the embedded model", "model-id", "diffusion-checkpoint"
    )
    vae_checkpoint: str | None = arg(None, "folder of another VAE")
    variant: str | None = arg(None, "file variant, such as fp16")
    revision: str | None = arg(None, "branch, tag or commit of a Hub id")
    token: str | None = arg(None, "Hub token (better: the variable HF_TOKEN)")
    prompt: list[str] = arg([], "what to draw; repeatable")
    prompts_file: str | None = arg(None, "text file with one prompt a line")
    negative_prompt: str | None = arg(None, "what to keep away from")
    steps: int | None = arg(
        None, "sampling steps; default 50 (turbo 1, embedded 25)", "num-inference-steps", "number-inference-steps"
    )
    ddim_steps: int | None = arg(None, "short for --scheduler ddim --steps N")
    guidance_scale: float | None = arg(
        None, "classifier-free guidance; 1 or less = off; default 7.5 (turbo 0, embedded 3)", "cfg-scale"
    )
    guidance_rescale: float = arg(0.0, "std correction of the guidance, 0 to 1")
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
    base_dir: str = arg(".", "folder that relative --output, --output-dir, --model and --vae-checkpoint start from")
    nrow: int | None = arg(None, "pictures in a row of the sheet")
    named: bool = arg(False, "file names from prompt, model and settings instead of numbers")
    labels: bool = arg(False, "write each prompt above its picture in the sheet")
    save_latents: bool = arg(False, "write latents.safetensors")
    progress_strip: bool = arg(False, "write a strip of the x0 estimates over the steps for each picture")
    resize: str | None = arg(None, "WIDTHxHEIGHT of the written pictures")
    metadata: bool = arg(True, "write the settings into each PNG")
    from_image: str | None = arg(None, "repeat a picture from the settings inside it")
    vae_tiling: bool = arg(False, "decode in tiles: less memory for large pictures")
    compile: bool = arg(False, "torch.compile the UNet: slow first step, faster many steps")
    diffusers_quirks: bool = arg(False, 'repeat diffusers\' DDIM error off "leading" spacing (see samplers.py)')
    device: str = arg("auto", "where to compute", choices=("auto", "cpu", "cuda"))
    dtype: str = arg("auto", "weights: auto is fp16 on a GPU, fp32 on a CPU", choices=("auto", "fp32", "fp16", "bf16"))


# What a PNG remembers, and what --from-image therefore brings back.
REMEMBERED = ("prompt", "negative_prompt", "model", "variant", "revision", "steps", "guidance_scale", "guidance_rescale",
              "scheduler", "eta", "height", "width", "seed", "clip_skip", "resize", "dtype", "diffusers_quirks",
              "vae_checkpoint", "vae_tiling")  # fmt: skip


def prompts_of(cfg):
    prompts = list(cfg.prompt)
    if cfg.prompts_file:
        try:
            text = Path(cfg.prompts_file).read_text(encoding="utf-8-sig")
        except (OSError, UnicodeDecodeError) as e:
            raise UserError(f"--prompts-file {cfg.prompts_file}: {e}") from None
        prompts += [line.strip() for line in text.splitlines() if line.strip()]
    if not prompts:
        raise UserError('--prompt is required, such as --prompt "red apple"')
    for prompt in prompts:
        if not prompt.strip():
            raise UserError("--prompt is empty")
    return [p.encode("utf-8", "replace").decode() for p in prompts]  # bytes of the command line that are no UTF-8


def defaults(cfg, sd):
    """Fill what was left open from the kind of model. Returns (steps, guidance scale, negative prompt)."""
    embedded = cfg.model is None
    steps = cfg.ddim_steps or cfg.steps
    steps = steps if steps is not None else 1 if sd.turbo else 25 if embedded else 50
    scale = cfg.guidance_scale
    scale = scale if scale is not None else 0.0 if sd.turbo else 3.0 if embedded else 7.5
    negative = cfg.negative_prompt
    if negative and sd.turbo and scale <= 1:
        print("warning: a turbo model is sampled without guidance; the negative prompt is not used", file=sys.stderr)
        negative = None
    elif negative and scale <= 1:
        print(
            f"warning: guidance is off at --guidance-scale {scale:g}; the negative prompt is not used", file=sys.stderr
        )
        negative = None
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
    for name, needs in (("strength", "init_image"), ("nrow", "output"), ("labels", "output")):
        if getattr(cfg, name) and not getattr(cfg, needs):
            raise UserError(f"--{name} does nothing without --{needs.replace('_', '-')}")
    if cfg.seed is not None and not 0 <= cfg.seed < 1 << 63:
        raise UserError(f"--seed {cfg.seed} must be between 0 and 2^63 - 1")


def rebase(cfg):
    """Put --base-dir before relative paths; a model that is no folder there is a Hub id and stays."""
    base = Path(cfg.base_dir)
    for name in ("output", "output_dir", "model", "vae_checkpoint"):
        value = getattr(cfg, name)
        is_path = value and (name.startswith("output") or (base / value).exists())
        if is_path and not Path(value).is_absolute() and base != Path("."):
            setattr(cfg, name, str(base / value))


def parse_size(text):
    width, x, height = text.partition("x")
    if not (x and width.isdigit() and height.isdigit() and 0 < int(width) <= 16384 and 0 < int(height) <= 16384):
        raise UserError(f"--resize {printable(text)!r}: expected WIDTHxHEIGHT, such as 274x169")
    return int(width), int(height)


def inputs(cfg, sd):
    """({height, width}, {image, strength, mask} for generate()), resized as diffusers does: an --init-image alone sets
    the size (down to a multiple of the VAE's), a mask brings the model's own size; --height and --width win."""
    import torch

    from nanodiff import images

    picture = images.open_image(cfg.init_image) if cfg.init_image else None
    if picture and not cfg.mask:
        height, width = (max(side // sd.downscale, 1) * sd.downscale for side in (picture.height, picture.width))
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


def main(cfg):
    if cfg.from_image:
        recall(cfg)
    check(cfg)
    rebase(cfg)
    prompts, resize = prompts_of(cfg), parse_size(cfg.resize) if cfg.resize else None

    import torch

    from nanodiff import engine, images, pipeline, samplers, weights

    device = engine.pick_device(cfg.device)
    dtype = engine.pick_dtype(cfg.dtype, device)
    record = engine.Record(cfg, device)
    out = record.out
    if cfg.output and (Path(cfg.output).is_dir() or not Path(cfg.output).absolute().parent.is_dir()):
        raise UserError(f"--output {cfg.output}: not a file name in an existing folder")
    if cfg.seed is None:
        cfg.seed = secrets.randbelow(1 << 32)
        print(f"seed: {cfg.seed}")
    with record.timed("load"):
        sd = pipeline.load(cfg.model or EMBEDDED, dtype, device, cfg.variant, cfg.revision, cfg.token, cfg.scheduler)
        if cfg.vae_checkpoint:
            sd.vae = weights.load(pipeline.AutoencoderKL, cfg.vae_checkpoint, dtype, device)
            sd.check_fit()
    if cfg.compile:
        sd.unet.compile()
    steps, scale, negative = defaults(cfg, sd)
    samplers.check_steps(sd.schedule, steps)
    name = samplers.name_of(sd.schedule)
    for part, millions in sd.parameters().items():
        print(f"{part}: {millions} M parameters")
    settings = {"scheduler": name, "steps": steps, "guidance_scale": scale, "negative_prompt": negative}
    print("settings: " + ", ".join(f"{k}={printable(v)}" for k, v in settings.items()))

    size, start = inputs(cfg, sd)
    record.data["config"] = as_dict(cfg) | settings | size  # resolved
    jobs = [(prompt, i) for prompt in prompts for i in range(cfg.num_images)]
    sheet, latents, made = [], [], 0
    try:
        with Progress(len(jobs), cfg.batch_size) as progress:
            for first in range(0, len(jobs), cfg.batch_size):
                batch = jobs[first : first + cfg.batch_size]
                seeds = [cfg.seed + first + k for k in range(len(batch))]
                with record.timed("sample"):
                    result = sd.generate(
                        [prompt for prompt, _ in batch], negative, steps, scale, seeds, **size, eta=cfg.eta,
                        clip_skip=cfg.clip_skip, guidance_rescale=cfg.guidance_rescale, tiled=cfg.vae_tiling,
                        quirks=cfg.diffusers_quirks, keep_steps=cfg.progress_strip, on_step=progress.step, **start,
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
                        strip(sd, result.history, k, path.with_name(path.stem + "_steps.png"))
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
        record.write()
    print(f"{made} pictures in {out}" + (f", sheet {cfg.output}" if cfg.output else ""))


class Progress:
    """One bar over all steps of all batches, with steps per second; when nobody watches, a line every half minute."""

    def __init__(self, pictures, batch_size):
        self.batches, self.done = -(-pictures // batch_size), 0
        self.started = self.said = time.monotonic()

    def __enter__(self):
        from tqdm import tqdm

        self.bar = tqdm(desc="sampling", unit="it", disable=not sys.stderr.isatty(), file=sys.stderr)
        return self

    def step(self, i, n, step):
        self.done += 1
        self.bar.total = n * self.batches
        self.bar.update()
        now = time.monotonic()
        if self.bar.disable and now - self.said > 30:
            rate = self.done / (now - self.started)
            print(f"sampling: step {self.done} of {n * self.batches}, {rate:.2f} it/s", file=sys.stderr)
            self.said = now

    def __exit__(self, *exc):
        self.bar.close()


def strip(sd, history, k, path, shown=8):
    """The estimates of the finished picture at up to `shown` evenly chosen steps, left to right."""
    from nanodiff import images

    picked = sorted({round(i * (len(history) - 1) / max(shown - 1, 1)) for i in range(shown)})
    import torch

    with torch.no_grad():
        pixels = [sd.decode(history[i].x0[k : k + 1].to(sd.dtype)).float() for i in picked]
    images.save_grid(torch.cat(pixels), path, nrow=len(picked), labels=[f"t={history[i].t:.0f}" for i in picked])


def file_name(cfg, facts, sd):
    """{prompt}_{model}_{scheduler}_cfg7_5_steps50_{seed}.png, of letters, digits and _ only."""
    from nanodiff.images import slug

    model = slug(Path(str(cfg.model or "nano")).name)
    scale = f"{facts['guidance_scale']:g}".replace(".", "_")
    return f"{slug(facts['prompt'])}_{model}_{facts['scheduler']}_cfg{scale}_steps{facts['steps']}_{facts['seed']}.png"


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
    for name in ("model", "vae_checkpoint"):
        value = getattr(cfg, name)
        if value and name not in given and not Path(value).exists():
            raise UserError(
                f"{cfg.from_image}: was made with {printable(value)}; name it with --{name.replace('_', '-')}"
            )


if __name__ == "__main__":
    sys.exit(script({"": (Config, main)}, __doc__))
