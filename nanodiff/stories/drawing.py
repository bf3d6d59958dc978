"""What drawing needs before and after: prompts and settings as the library takes them, progress, the folder and the names of what is made."""

import hashlib
import itertools
import math
import re
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanodiff import lora, pipeline
from nanodiff.config import UserError, printable, read_fields, short
from nanodiff.data import promptset, tables
from nanodiff.files import inside as inside_of
from nanodiff.models.freeu import FreeU
from nanodiff.output import images
from nanodiff.output.images import slug
from nanodiff.pipeline import Perturbed, SkipLayers, Words, control, pictures
from nanodiff.pipeline.settings import Churn
from nanodiff.training.options import parse_size
from nanodiff.weights import hub

PATHS = ("model", "refiner", "vae_checkpoint", "components", "fast_vae", "preview")  # what --base-dir stands before


def prompts_of(cfg, optional=False):
    """The prompts; [] where none is given and they are optional (some models draw without)."""
    prompts = list(cfg.prompt)
    if cfg.prompts_file:
        kind = Path(cfg.prompts_file).suffix.lower()
        if kind in (".json", ".jsonl", ".parquet", ".arrow"):
            raise UserError(
                f"--prompts-file {cfg.prompts_file}: is no text with a prompt a line, nor a .csv or .tsv with a column of them"
            )
        if kind in tables.SUFFIXES:
            listed = column_of(cfg.prompts_file)
        else:
            listed = tables.lines(cfg.prompts_file)
        if not listed:
            raise UserError(f"--prompts-file {cfg.prompts_file}: has no prompts")
        if strange := [line for line in listed if "\0" in line]:
            raise UserError(f"--prompts-file {cfg.prompts_file}: {short(strange[0])} is no text")
        prompts += listed
    if not prompts:
        if optional and cfg.model:
            return []
        raise UserError('--prompt is required, such as --prompt "red apple"')
    return [p.encode("utf-8", "replace").decode() for p in prompts]  # bytes of the command line that are no UTF-8


def column_of(path):
    """The prompts of a table with a header."""
    header, rows = tables.rows(path)
    name = next((c for c in promptset.COLUMNS if c in header), None)
    if name is None:
        raise UserError(
            f"--prompts-file {path}: its first line names no column {' or '.join(promptset.COLUMNS)}; a file with a prompt a line is a .txt"
        )
    return [row[name] for _, row in rows if row[name].strip()]


def defaults(cfg, sd):
    """Fill what was left open from the kind of model. Returns (steps, guidance scale, negative prompt)."""
    steps, scale = sd.settings(cfg.steps, cfg.guidance_scale)
    if cfg.init_image and not cfg.steps:
        steps = least_steps(sd, steps, strength_of(cfg, sd))
    negative, why = cfg.negative_prompt, None
    if sd.is_told:
        why = "the model is told its guidance (time_cond_proj_dim)"
    elif scale <= 1:
        why = (
            "a turbo model is sampled without guidance"
            if sd.turbo
            else f"guidance is off at --guidance-scale {scale:g}"
        )
    if why and any((negative, cfg.negative_prompt_2, cfg.negative_prompt_3)):
        print(f"warning: {why}; the negative prompt is not used", file=sys.stderr)
        negative = negative if sd.is_told and getattr(sd, "refiner", None) else None
    for name in ("guidance_rescale", "skip_layers"):
        if getattr(cfg, name) and why:
            print(f"warning: {why}; --{name.replace('_', '-')} does nothing", file=sys.stderr)
    return steps, scale, negative


def strength_of(cfg, sd):
    """How much of --init-image is repainted."""
    own = 1.0 if sd.inpaints else sd.family.strength
    return own if cfg.strength is None else cfg.strength


def least_steps(sd, steps, strength):
    """`steps`, or as few more as leave a step to take from a picture: a turbo's single one at strength 0.8 would be none."""
    enough = (n for n in range(steps, sd.schedule.T + 1) if sd.first_step(n, strength) < n)
    return next(enough, steps)  # none: too low a strength, which is refused as such


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


# options that name files or folders whose content is in the picture; those of SUFFIXED with more behind a colon
SHOWN = ("init_image", "mask", "control_image", "ip_adapter_image")
MODELS = ("model", "refiner", "vae_checkpoint", "components", "fast_vae", "lora", "embedding", "control", "ip_adapter", "image_encoder")  # fmt: skip
NAMED = (*SHOWN, *MODELS, "wildcards", "lora_dir")
SUFFIXED = {"lora": lora.parse, "control": control.parse, "ip_adapter": pictures.parse}
INSIDE = {"wildcards": ".txt", "lora_dir": ".safetensors"}  # what is read of a folder, where it is not all
HASHED = 1 << 20  # bytes up to which a file is known by its content, a larger one by its size and time
OWN = re.compile(r"study\.\w+|run(-\d+)?\.json|\d{5,9}\.png|\..*")  # what a study writes
SINGLE = re.compile(r"image_\d{3}\.png")  # the pictures of a sheet (--output), in a folder beside it
NUMBERED = re.compile(r"(\d{5,7})(_steps)?\.\w+")  # eight digits are a date


def named_files(cfg, names=NAMED):
    """(option, file, folder or Hub id that it names), one by one, without what stands behind."""
    for name in names:
        value = getattr(cfg, name)
        for text in value if isinstance(value, list) else [value] if value else []:
            if name == "control_image" and not Path(text).exists():
                text = text.removeprefix("canny:")
            yield name, SUFFIXED[name](text)[0] if name in SUFFIXED else text


class Marks:
    """What the files and folders hold that pictures are made of: of small ones their content, of large ones size and time; nothing of a Hub id, nor,
    where a folder around `out` is named, of what a study writes there. What is named is looked at once."""

    def __init__(self, out):
        self.out, self.known = Path(out).resolve(), {}

    def of(self, cfg):
        """{path: what it holds} for one Config: two that are alike have the same."""
        found = {}
        for text, kind in dict.fromkeys((text, INSIDE.get(name, "")) for name, text in named_files(cfg)):
            if (text, kind) not in self.known:
                path = hub.trained(text)
                inside = [path]
                if path.is_dir():
                    inside = [
                        p
                        for p in sorted(inside_of(path, kind))
                        if not (OWN.fullmatch(p.name) and p.resolve().parent == self.out)
                    ]
                self.known[text, kind] = [_mark(p) for p in inside if p.is_file()]
            found[text] = found.get(text, []) + self.known[text, kind]
        return {text: held for text, held in found.items() if held}


def _mark(path):
    if path.stat().st_size > HASHED:
        return [path.stat().st_size, path.stat().st_mtime_ns]
    return hashlib.blake2b(path.read_bytes(), digest_size=8).hexdigest()


def begun(cfg, out):
    """(number of a run's first picture in the folder `out`, f()): the one after those that are there, of whatever run and kind; with --overwrite 0.
    f(), called when drawing begins: the run before makes room, with --overwrite what it wrote is deleted. Raises UserError for what cannot."""
    there = {int(m[1]): p for p in out.iterdir() if (m := NUMBERED.fullmatch(p.name))}
    latents = out / "latents.safetensors"
    if cfg.overwrite:
        names = listed(out)
        old = [p for p in out.iterdir() if p.name in names and (NUMBERED.fullmatch(p.name) or p == latents)]

        def delete():
            for path in old:
                path.unlink(missing_ok=True)
            if pngs := [p for p in old if p.suffix == ".png"]:
                print(f"note: {out}: {len(pngs)} pictures of the run before are deleted", file=sys.stderr)
            if rest := [p for p in there.values() if p not in old]:
                print(
                    f"note: {out}: {len(rest)} pictures of earlier runs stay, but for those whose numbers are drawn again",
                    file=sys.stderr,
                )

        return 0, delete
    if cfg.save_latents and latents.exists():
        raise UserError(f"{latents}: is of an earlier run; take another `output_dir` (or `overwrite`)")

    return max(there, default=-1) + 1, lambda: keep_record(out)


def listed(out):
    """Names of the files that the run before wrote into the folder `out`, as its record lists them."""
    record = Path(out) / "run.json"
    files = read_fields(record, {"files": list}).get("files", []) if record.is_file() else []
    return {Path(str(f["path"])).name for f in files if isinstance(f, dict) and "path" in f}


def keep_record(out, what="counting on"):
    """What an earlier run wrote down of itself gets a name of its own. what: is done beside it, for the note."""
    if (out / "run.json").is_file():
        kept = next(p for n in itertools.count(1) if not (p := out / f"run-{n}.json").exists())
        (out / "run.json").rename(kept)
        print(
            f"note: {out}: holds an earlier run's pictures; {what}, its run.json is {kept.name} now",
            file=sys.stderr,
        )


def check_output(cfg, out):
    """Raise UserError for a sheet (--output) in the place of what this run reads, or of a file that it writes itself into the folder `out`."""
    path = Path(cfg.output)
    if path.is_dir() or not path.absolute().parent.is_dir():
        raise UserError(f"--output {cfg.output}: not a file name in an existing folder")
    for name, text in named_files(cfg, (*NAMED, "from_image", "prompts_file")) if path.is_file() else ():
        if _same_file(path, text):
            raise UserError(f"--output {cfg.output}: is what --{name.replace('_', '-')} reads")
    inside = path.resolve().parent == out.resolve()
    ours = path.suffix == ".png" and NUMBERED.fullmatch(path.name)
    if inside and (ours or path.suffix in (".json", ".safetensors", ".txt")):
        raise UserError(f"--output {cfg.output}: is a name of the run's own files; take another")


def check_inputs(cfg, out):
    """Raise UserError for a file that this run is to read and would replace or delete: its --preview, the single pictures beside --output, and with
    --overwrite what the run before left in the folder `out`."""
    single = Path(cfg.output).with_suffix("").as_posix() + "_individual" if cfg.output else None
    for name, text in named_files(cfg):
        path = Path(text).resolve()
        lost = cfg.preview and path == (out / "preview.png").resolve()
        lost = lost or (single and path.parent == Path(single).resolve() and SINGLE.fullmatch(path.name))
        lost = lost or (cfg.overwrite and path.parent == out.resolve() and NUMBERED.fullmatch(path.name))
        if lost and path.is_file():
            raise UserError(
                f"--{name.replace('_', '-')} {text}: would be replaced by this run; take another output folder or name"
            )


def _same_file(path, text):
    try:
        return path.samefile(text)
    except (OSError, ValueError):
        return False


def documented(cfg):
    """Were the flags those of the document whose pictures are named by their settings (S3-13), `--model_id … --output_dir …` as it spells
    them?"""
    spelled = getattr(cfg, "spelled", frozenset())
    its = "output_dir" in spelled and bool(spelled & {"model_id", "number_inference_steps"})
    return its and "named" not in getattr(cfg, "given", ())


def unused(path, overwrite, written=()):
    """`path`, or the first of path_2, path_3, … that is not there; with `overwrite` the first that is not among the names this run has written."""
    taken = (lambda p: p.name in written) if overwrite else Path.exists
    others = (path.with_name(f"{path.stem}_{n}{path.suffix}") for n in itertools.count(2))
    return next(p for p in itertools.chain((path,), others) if not taken(p))


def file_name(cfg, facts, sd):
    """{prompt}_{model}_{scheduler}_cfg7_5_steps50_{seed}.png, of letters, digits and _ only; flows have one scheduler,
    which is not named (requirement S3-13); the document's own names have no seed."""
    model = slug(Path(str(cfg.model or "nano")).name)
    scale = f"{facts['guidance_scale']:g}".replace(".", "_")
    scheduler = "" if sd.schedule.flow else f"_{facts['scheduler']}"
    seed = "" if documented(cfg) else f"_{facts['seed']}"
    return f"{slug(facts['prompt'])}_{model}{scheduler}_cfg{scale}_steps{facts['steps']}{seed}.png"
