"""Pictures of other programs: what AUTOMATIC1111's `parameters` (infotext.py) and ComfyUI's graph say, in our words.

ComfyUI's PNGs have a chunk `prompt` with the graph that was run, {id: {"class_type", "inputs"}}, where an input is a value or [id of another
node, its output].
"""

import json
import math

from PIL import Image

from nanodiff.config import UserError, short
from nanodiff.output import infotext
from nanodiff.output.images import FAULTS, FORMATS

# (ComfyUI's sampler_name, its schedulers in which it is ours, ours)
COMFYUI = (
    ("euler", ("normal",), "euler"),
    ("euler_ancestral", ("normal",), "euler_a"),
    ("heun", ("normal",), "heun"),
    ("lms", ("normal",), "lms"),
    ("dpm_2", ("normal",), "kdpm2"),
    ("dpm_2_ancestral", ("normal",), "kdpm2_a"),
    ("dpmpp_2m", ("normal",), "dpmpp_2m"),
    ("dpmpp_2m", ("karras",), "dpmpp_2m_karras"),
    ("dpmpp_2m_sde", ("normal",), "dpmpp_2m_sde"),
    ("dpmpp_2m_sde", ("karras",), "dpmpp_2m_sde_karras"),
    ("dpmpp_3m_sde", ("normal",), "dpmpp_3m_sde"),
    ("dpmpp_sde", ("normal",), "dpmpp_sde"),
    ("dpmpp_2s_ancestral", ("normal",), "dpmpp_2s_a"),
    ("ipndm", ("normal",), "ipndm"),
    ("ddim", ("normal", "ddim_uniform"), "ddim"),
    ("uni_pc", ("normal",), "unipc"),
    ("deis", ("normal",), "deis"),
    ("lcm", ("normal", "sgm_uniform"), "lcm"),
)
FLOWS = {"euler": "flow_euler", "heun": "flow_heun"}  # what those names mean where the model is a flow
GRIDS = (
    "karras",
    "exponential",
    "sgm_uniform",
    "beta",
    "simple",
)  # ComfyUI's schedulers that are grids of ours (sample.py --sigmas)
SAMPLING = ("KSampler", "KSamplerAdvanced")
NAMES = ("ckpt_name", "unet_name")  # inputs of the nodes that load a model


def read(path):
    """(program, {our setting: value}, [what is there and not used]) of a picture of A1111's or ComfyUI's; None for a picture of neither.

    "model" is a name, not a file. Raises UserError for what is no readable picture."""
    try:
        with Image.open(path, formats=FORMATS) as image:
            info = {k: v for k, v in image.info.items() if isinstance(v, str)}
            exif = image.getexif().get_ifd(0x8769).get(0x9286)  # UserComment, where A1111's JPEGs have it
    except FAULTS as e:
        raise UserError(f"{path}: not a readable image: {e}") from None
    text = info.get("parameters") or _comment(exif)
    if text and "Steps:" in text:
        return ("AUTOMATIC1111", *infotext.parameters(text))
    if "prompt" in info:
        try:
            graph = json.loads(info["prompt"])
        except (ValueError, RecursionError):
            raise UserError(f"{path}: its `prompt` is no JSON") from None
        return ("ComfyUI", *comfyui(graph, path))
    return None


def _comment(value):
    if not isinstance(value, bytes) or value[:8] not in (b"UNICODE\0", b"ASCII\0\0\0"):
        return None
    return value[8:].decode("utf-16-be" if value[:1] == b"U" else "ascii", "replace")


def comfyui(graph, path="the graph"):
    """({our setting: value}, [what is not used]) of ComfyUI's graph. Raises UserError for one without a sampler, or with several."""
    nodes = {str(k): v for k, v in graph.items() if isinstance(v, dict)} if isinstance(graph, dict) else {}
    mine = [k for k, v in nodes.items() if v.get("class_type") in SAMPLING]
    if len(mine) != 1:
        raise UserError(f"{path}: a graph of ComfyUI's with {len(mine)} KSampler nodes; only one can be repeated")
    used = {mine[0]}

    def inputs(key):
        found = nodes.get(key, {}).get("inputs", {})
        return found if isinstance(found, dict) else {}

    def behind(key, name):
        """The id of the node that gives an input, or None."""
        link = inputs(key).get(name)
        return str(link[0]) if isinstance(link, list) and link and str(link[0]) in nodes else None

    def value(key, name):
        """An input's value, also where another node (a primitive, a text) gives it; None where none can be told."""
        got = inputs(key).get(name)
        if isinstance(got, list):
            other = behind(key, name)
            plain = {k: v for k, v in inputs(other).items() if isinstance(v, int | float | str)}
            # a node of one value, or one that is called as what it is for
            named = [
                plain[k] for k in (name, "seed" if "seed" in name else name, "value", "text", "string") if k in plain
            ]
            got = next(iter(plain.values())) if len(plain) == 1 else named[0] if named else None
            if got is not None:
                used.add(other)
        return got

    sampler, found = mine[0], {"prompt_syntax": "comfyui"}
    left = []
    for name, keys, kind in (
        ("steps", ("steps",), int),
        ("guidance_scale", ("cfg",), float),
        ("seed", ("seed", "noise_seed"), int),
    ):
        got = next((v for v in (value(sampler, key) for key in keys) if v is not None), None)
        if isinstance(got, int | float) and not isinstance(got, bool) and math.isfinite(got):
            found[name] = kind(got)
        else:
            left.append(f"{name}, which no node gives as a number")
    for name, key in (("prompt", "positive"), ("negative_prompt", "negative")):
        text = behind(sampler, key)
        said = next(
            (v for v in (value(text, k) for k in ("text", "text_g", "clip_g") if text) if isinstance(v, str)), None
        )
        if said is None:
            left.append(
                f"{name}, which no text node gives" + (f" ({short(nodes[text].get('class_type'))})" if text else "")
            )
            continue
        used.add(text)
        found[name] = [said] if name == "prompt" else said
        second = next((v for v in (value(text, k) for k in ("text_l", "clip_l")) if isinstance(v, str)), said)
        if second != said:  # the two CLIPs' own texts; ours names the first one's first
            first = [second] if name == "prompt" else second
            found |= {name: first, f"{name}_2": said}
    latent = behind(sampler, "latent_image")
    if latent and str(nodes[latent].get("class_type")).startswith("Empty"):
        used.add(latent)
        found |= {side: value(latent, side) for side in ("width", "height") if isinstance(value(latent, side), int)}
        if isinstance(n := value(latent, "batch_size"), int) and n > 1:
            left.append(f"batch_size: {n} (the first picture is drawn; the others' noise follows it)")
    elif latent:
        left.append("the picture that it began with")
    model, behind_it = behind(sampler, "model"), set()
    while model and model not in behind_it and not any(name in inputs(model) for name in NAMES):
        behind_it.add(model)  # LoRAs and what else changes a model on its way; a graph may lead back to itself
        if "lora_name" in inputs(model):
            used.add(model)
            lora = f"{value(model, 'lora_name')} at {value(model, 'strength_model')}"
            left.append(f"LoRA {short(lora)} (give it with --lora)")
        model = behind(model, "model")
    if model and (key := next((name for name in NAMES if name in inputs(model)), None)):
        used.add(model)
        found["model"] = str(value(model, key))
    for name, usual in (
        ("add_noise", "enable"),
        ("start_at_step", 0),
        ("return_with_leftover_noise", "disable"),
        ("end_at_step", 10_000),
    ):
        got = value(sampler, name)
        if got not in (None, usual) and not (
            name == "end_at_step" and isinstance(got, int) and got >= found.get("steps", 0)
        ):
            left.append(f"{name}: {short(got)}")
    pair = value(sampler, "sampler_name"), value(sampler, "scheduler")
    plain = infotext.sampler_of(COMFYUI, pair[0], "normal")
    if ours := infotext.sampler_of(COMFYUI, *pair):
        found["scheduler"] = ours
    elif pair[1] in GRIDS and plain not in (None, *infotext.UNSPACED):
        found |= {"scheduler": plain, "sigmas": pair[1]}
    else:
        left.append(f"sampler {short(pair[0])} with scheduler {short(pair[1])}")
    if (denoise := value(sampler, "denoise")) not in (None, 1, 1.0):
        left.append(f"denoise: {short(denoise)}")
    quiet = ("VAEDecode", "SaveImage", "PreviewImage", "Note")
    left += [
        f"{short(v.get('class_type'))} (node {k})"
        for k, v in nodes.items()
        if k not in used and v.get("class_type") not in quiet
    ]
    return found, left
