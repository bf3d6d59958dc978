"""What a picture remembers of how it was made, and how that comes back (--from-image)."""

import sys
from pathlib import Path

from nanodiff import weights
from nanodiff.commandline import as_dict, from_mapping, shipped_option
from nanodiff.config import UserError, printable, short
from nanodiff.output import foreign, images
from nanodiff.output.images import read_record
from nanodiff.stories.drawing import MODELS, SHOWN, named_files
from nanodiff.weights import hub

# What a PNG remembers, and what --from-image therefore brings back.
REMEMBERED = ("prompt", "negative_prompt", "model", "variant", "revision", "steps", "guidance_scale", "guidance_rescale",
              "scheduler", "sigmas", "timestep_spacing", "eta", "s_churn", "s_tmin", "s_tmax", "s_noise", "height", "width", "seed", "clip_skip", "resize", "dtype", "diffusers_quirks",
              "vae_checkpoint", "vae_tiling", "components", "prediction_type", "t5", "prompt_2", "prompt_3",
              "negative_prompt_2", "negative_prompt_3", "max_sequence_length", "long_prompts", "prompt_weights", "prompt_syntax", "lora_dir", "embedding",
              "lora", "lora_scale", "lora_fuse", "allow_partial", "skip_layers", "skip_layer_scale", "skip_layer_start",
              "skip_layer_stop", "perturbed_scale", "perturbed_layers", "freeu", "original_size", "target_size", "crop", "negative_original_size", "negative_target_size",
              "negative_crop", "denoising_end", "quantize", "fast_vae", "control", "control_image", "control_guess", "hires", "hires_strength",
              "hires_steps", "hires_latent", "init_image", "strength", "mask", "mask_blur", "mask_padding", "ip_adapter", "ip_adapter_image", "image_encoder", "refiner", "refiner_start", "aesthetic_score", "negative_aesthetic_score")  # fmt: skip


def remembered(cfg, facts, sd, tagged=None):
    """Everything that --from-image needs, as JSON values. tagged: {name: hash} of the picture's own LoRAs."""
    dtype = {"float32": "fp32", "float16": "fp16", "bfloat16": "bf16"}[str(sd.dtype).removeprefix("torch.")]
    values = as_dict(cfg) | facts | {"model": cfg.model or "embedded", "dtype": dtype}
    # for other programs' eyes
    shown = {"lora_hashes": sd.hashes | (tagged or {}), "model_hash": sd.model_hash() if sd.model_hash else None}
    return {k: values[k] for k in REMEMBERED} | {k: v for k, v in shown.items() if v}


def recall(cfg):
    """Fill cfg from the settings inside a picture; flags given on the command line win."""
    if images.recorded(cfg.from_image) is None and (other := foreign.read(cfg.from_image)):
        return adopt(cfg, *other)
    record = read_record(cfg.from_image)
    given = given_in(cfg)
    if isinstance(record.get("init_image"), bool) and record.pop("init_image"):  # of before pictures told which
        if "init_image" not in given:
            raise UserError(
                f"{cfg.from_image}: was made from another picture, which it does not contain; name it with --init-image"
            )
        if "mask" not in given:
            print(
                f"note: {cfg.from_image}: does not tell whether there was a mask; none is taken (--mask)",
                file=sys.stderr,
            )
    known = {k: record[k] for k in REMEMBERED if record.get(k) is not None}
    known["prompt"] = [known.get("prompt")]
    if "model" in given:  # these are of the model that it was made with
        known = {k: v for k, v in known.items() if k not in ("revision", "variant")}
    for key, value in from_mapping(type(cfg), known, cfg.from_image).items():
        if key not in given:
            setattr(cfg, key, shipped_option(key, value) if cfg.base_dir == "." else value)
    if cfg.model == "embedded":
        cfg.model = None
    for name, path in named_files(cfg, (*SHOWN, *MODELS)):
        # of the Hub's only what is here: a picture starts no download
        if (
            name not in given
            and not Path(path).exists()
            and not (name in MODELS and hub.is_cached(path, cfg.revision if name == "model" else None))
        ):
            flag = name.replace("_", "-")
            raise UserError(f"{cfg.from_image}: was made with {printable(path)}; name it with --{flag}")


def given_in(cfg):
    """The settings that the command line names, which win over a picture's."""
    given = getattr(cfg, "given", frozenset())
    return given | ({"steps", "scheduler"} if "ddim_steps" in given else set())


def adopt(cfg, program, found, unused):
    """Fill cfg from what another program's picture says; says what is taken and what is not."""
    given, cfg.adopted = given_in(cfg), True
    model, theirs = found.pop("model", "(it does not say which)"), found.pop("model_hash", None)
    if "model" not in given:
        raise UserError(
            f"{cfg.from_image}: was made by {program} with the model {printable(model)}; name its file with --model"
        )
    for key, value in from_mapping(type(cfg), found, cfg.from_image).items():
        if key not in given:
            setattr(cfg, key, value)
    if theirs and not (file := hub.trained(cfg.model)).is_file():
        unused.append(f"Model hash: {short(theirs)} (--model is no single file)")
    elif theirs and not (own := weights.model_hash(file, len(theirs))).startswith(theirs.lower()):
        print(
            f"note: {cfg.from_image}: was made with a model of the hash {printable(theirs)}, {file} has {own[:10]}: another picture",
            file=sys.stderr,
        )
    taken = ", ".join(f"{k}={short(v, 40)}" for k, v in found.items())
    print(f"{cfg.from_image}: {program}'s: {taken}")
    if unused:
        print(f"note: not used: {'; '.join(unused)}", file=sys.stderr)
