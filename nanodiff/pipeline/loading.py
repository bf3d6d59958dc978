"""A pipeline from a folder, a single file or the Hub; and a single file as a folder, and back."""

from pathlib import Path

import torch

from nanodiff.config import UserError, printable, short
from nanodiff.device import memory, quantize
from nanodiff.diffusion import samplers
from nanodiff.pipeline import families
from nanodiff.pipeline.base import Pipeline
from nanodiff.pipeline.families import BUILDERS, KNOWN, SAMPLING, is_turbo
from nanodiff.pipeline.sd3 import SD3, Joint
from nanodiff.pipeline.sdxl import SDXL, Refiner
from nanodiff.pipeline.single import Single, stated
from nanodiff.pipeline.sources import EMBEDDED, Folder, source
from nanodiff.pipeline.space import say
from nanodiff.weights import original_names


def load(
    model: str | Path | Folder | Single | None = None,
    dtype: torch.dtype | None = torch.float32,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    revision: str | None = None,
    token: str | None = None,
    scheduler: str | None = None,
    offload: str | None = "none",
    quantized: str | None = None,
    no_t5: bool = False,
    components: str | None = None,
    prediction_type: str | None = None,
    allow_pickle: bool = False,
    name: str | None = None,
) -> Pipeline:
    """A Pipeline from a folder, single file or Hub id (see hub.resolve), from what source() returned, or the embedded model.

    dtype: type in which everything computes; None leaves each part in its file's, to be saved again or, where these are of two bytes or more, drawn with.
    scheduler: name of another sampler than the model's own
    (samplers.SAMPLERS). offload: see memory.Resident. quantized: "int8" or "nf4" for the denoiser and T5. no_t5: leave
    SD 3's third text encoder out. components, prediction_type, allow_pickle: for single files, see source().
    """
    model = EMBEDDED if model is None else model
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point and dtype.itemsize > 1):
        raise UserError(f"`dtype` {short(dtype)}: expected a floating-point torch.dtype, such as torch.bfloat16")
    try:
        device = torch.device(device)
    except (RuntimeError, TypeError):
        raise UserError(f"`device` {short(device)}: is no device of torch's, such as 'cpu' or 'cuda'") from None
    if device.type == "cuda" and not torch.cuda.is_available():
        raise UserError("`device` cuda: there is none here, or this PyTorch was built without it")
    offload = "none" if offload is None else offload
    for field, value, known in (
        ("offload", offload, memory.OFFLOADS),
        ("quantized", quantized, (None, *quantize.KINDS)),
    ):
        if value not in known:
            raise UserError(f"`{field}` {short(value)}: is none of {', '.join(map(repr, known))}")
    ready = isinstance(model, Folder | Single)
    src = model if ready else source(model, variant, revision, token, components, prediction_type, allow_pickle, no_t5)
    family = FAMILIES[src.kind]
    if no_t5 and "text_encoder_3" not in family.encoder_names:
        raise UserError(f"`no_t5`: {src.kind} has no third text encoder")
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
            own = dtype or memory.dtype_of(modules[part])
            memory.Resident(modules[part], own, device, blocks=offload == "sequential" and part != "vae")
    denoiser = modules.pop(family.denoiser_name)
    vae = modules.pop("vae", None)
    encoders = [modules.get(n) for n in family.encoder_names]
    raw, where = src.scheduler()
    schedule = samplers.schedule_of(raw, where, scheduler)
    sd = family(denoiser, vae, encoders, tokenizers, schedule, name=str(name or model))
    sd.distilled = is_turbo(raw, sd.name)
    sd.index = {k: v for k, v in src.index.items() if isinstance(v, bool) or k == SAMPLING}
    return sd


def convert(
    model: str | Path,
    target: str | Path,
    allow_pickle: bool = False,
    components: str | None = None,
    prediction_type: str | None = None,
    no_t5: bool = False,
) -> None:
    """A single-file checkpoint as a Hub folder, or a Hub folder as one file in the original names. Types stay."""
    src = source(model, None, None, None, components, prediction_type, allow_pickle, no_t5)
    single, target = isinstance(src, Single), Path(target)
    if single and target.exists() and (not target.is_dir() or any(target.iterdir())):
        raise UserError(f"{target}: exists and is not an empty folder")
    sd = load(src, None, no_t5=no_t5, name=str(model))
    if single:
        sd.save(target)
    else:
        family = original_names.family_of_pipeline(sd.class_name, sd.net)
        if words := sorted({word for t in sd.tokenizers for word in getattr(t, "words", ())}):
            raise UserError(
                f"{model}: has the learned words {', '.join(map(printable, words))}, for which one file has no place; keep it as a folder"
            )
        schedule = sd.schedule
        v, ztsnr = schedule.prediction == "v_prediction", bool(schedule.cfg.get("rescale_betas_zero_snr"))
        marks = {"v_pred": v, "ztsnr": ztsnr} if not schedule.flow else {}
        original_names.export(sd.models(), family, target, [name for name, so in marks.items() if so])
        # ε or v is told by the marks
        raw = stated(
            family, target, schedule.prediction if schedule.prediction in ("epsilon", "v_prediction") else None, ztsnr
        )
        if lost := _unsaid(sd, samplers.schedule_of(raw, target), KNOWN[family][1]):
            say(f"note: {target}: does not say its {', '.join(lost)}: give `components` {model} with it")
        if sd.turbo and not is_turbo(raw, target):
            say(f'note: {target}: nothing in it says that it is a turbo; a name with "turbo" does')
    print(f"{target}: {', '.join(sd.models())}")


def _unsaid(sd, told, configs):
    """What a pipeline has otherwise than one file of it will be read, in words. told: the schedule, configs: {part: config.json} that stand for a
    file of its family."""

    def facts(schedule, vae):
        out = {"scheduler's class": schedule.kind} | {f"scheduler's {k}": v for k, v in schedule.cfg.items()}
        return out | {f"VAE's {k}": getattr(vae, k) for k in ("scaling_factor", "shift_factor") if vae}

    known = sd.vae.cfg.from_json(configs["vae"]) if sd.vae is not None and "vae" in configs else None
    theirs = facts(told, known)
    lost = [f"{k} {short(v)}" for k, v in facts(sd.schedule, known and sd.vae.cfg).items() if v != theirs.get(k, v)]
    return lost + (["steps and guidance that it was trained for"] if SAMPLING in sd.index else [])


CLASSES = {"SD": Pipeline, "SDXL": SDXL, "SDXL refiner": Refiner, "SD3": SD3, "MMDiT": Joint}  # of the families
FAMILIES = {kind: CLASSES[family.name] for kind, family in families.FAMILIES.items()}
