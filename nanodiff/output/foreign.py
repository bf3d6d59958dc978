"""Pictures of other programs: what AUTOMATIC1111's `parameters` (infotext.py) and ComfyUI's graph say, in our words.

ComfyUI's PNGs have a chunk `prompt` with the graph that was run, {id: {"class_type", "inputs"}}, where an input is a value or [id of another
node, its output].
"""

import json
import math
import re

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
    ("ddim", ("ddim_uniform",), "ddim"),
    ("uni_pc", ("normal",), "unipc"),
    ("deis", ("normal",), "deis"),
    ("lcm", ("normal", "sgm_uniform"), "lcm"),
)
# what those names mean where the model is a flow
FLOWS = {"euler": "flow_euler", "heun": "flow_heun", "lcm": "flow_lcm"}
# ComfyUI's schedulers that are grids of ours (sample.py --sigmas)
GRIDS = ("karras", "exponential", "sgm_uniform", "beta", "simple")
SHORT = ("dpm_2", "dpm_2_ancestral")  # which leave a noise level out
# inputs that are no value of a node
CONTROLS = ("control_after_generate", "speak_and_recognation", "multiline", "strip_newlines")
SHOWS = ("showtext", "showanything")  # classes of nodes that show a text that they are given, and keep it
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
            raise UserError(f"{path}: its text chunk named prompt is no JSON") from None
        return ("ComfyUI", *comfyui(graph, path))
    return None


def _comment(value):
    if not isinstance(value, bytes) or value[:8] not in (b"UNICODE\0", b"ASCII\0\0\0"):
        return None
    return value[8:].decode("utf-16-be" if value[:1] == b"U" else "ascii", "replace")


class Graph:
    """ComfyUI's graph as a way backwards from its sampler: which node gives an input, and with what value.

    used: ids of the nodes whose values were taken; the others are told to the user."""

    def __init__(self, nodes, sampler):
        self.nodes, self.sampler, self.used = nodes, sampler, {sampler}

    def inputs(self, key):
        """{name: value or [id, output]} of a node; {} for what is none."""
        found = self.nodes.get(key, {}).get("inputs", {})
        return found if isinstance(found, dict) else {}

    def behind(self, key, name):
        """The id of the node that gives an input, or None."""
        link = self.inputs(key).get(name)
        return str(link[0]) if isinstance(link, list) and link and str(link[0]) in self.nodes else None

    def value(self, key, name):
        """An input's value, also where another node (a primitive, a text) gives it; None where none can be told."""
        got = self.inputs(key).get(name)
        if not isinstance(got, list):
            return got
        other = self.behind(key, name)
        given = {k: v for k, v in self.inputs(other).items() if k not in CONTROLS}
        if other and any(word in re.sub(r"\W", "", self.kind(other)).lower() for word in SHOWS):
            given = {k: v for k, v in given.items() if k in ("text_0", "text") and isinstance(v, str)}
        if len(given) != 1:  # it makes something of several: what, only ComfyUI knows
            return None
        (got,) = given.values()
        if not isinstance(got, int | float | str):
            return None
        self.used.add(other)
        return got

    def kind(self, key):
        """The class of a node, as people are shown it."""
        return short(self.nodes[key].get("class_type"))


def comfyui(graph, path="the graph"):
    """({our setting: value}, [what is not used]) of ComfyUI's graph. Raises UserError for one without a sampler, or with several."""
    nodes = {str(k): v for k, v in graph.items() if isinstance(v, dict)} if isinstance(graph, dict) else {}
    mine = [k for k, v in nodes.items() if v.get("class_type") in SAMPLING]
    if len(mine) != 1:
        raise UserError(f"{path}: a graph of ComfyUI's with {len(mine)} KSampler nodes; only one can be repeated")
    g = Graph(nodes, mine[0])
    found, left = {"prompt_syntax": "comfyui"}, []
    for part in (_numbers, _texts, _beginning, _model, _stages, _grid):
        settings, rest = part(g, found)
        found |= settings
        left += rest
    quiet = ("VAEDecode", "SaveImage", "PreviewImage", "Note")
    others = [k for k, v in nodes.items() if k not in g.used and v.get("class_type") not in quiet]
    return found, [*left, *(f"{g.kind(k)} (node {k})" for k in others)]


# Each: (settings, [what is not used]) of one part of a graph; found: the settings so far.


def _numbers(g, found):
    """Steps, guidance and seed."""
    settings, left = {}, []
    for name, keys, kind in (
        ("steps", ("steps",), int),
        ("guidance_scale", ("cfg",), float),
        ("seed", ("seed", "noise_seed"), int),
    ):
        got = next((v for v in (g.value(g.sampler, key) for key in keys) if v is not None), None)
        if isinstance(got, int | float) and not isinstance(got, bool) and math.isfinite(got):
            settings[name] = kind(got)
        else:
            left.append(f"{name}, which no node gives as a number")
    return settings, left


def _texts(g, found):
    """Prompt and negative prompt; of SDXL's node also the two CLIPs' own, of which ours names the first one's first."""
    settings, left = {}, []
    for name, key in (("prompt", "positive"), ("negative_prompt", "negative")):
        text = g.behind(g.sampler, key)
        values = (g.value(text, k) for k in ("text", "text_g", "clip_g") if text)
        said = next((v for v in values if isinstance(v, str)), None)
        if said is None:
            left.append(f"{name}, which no text node gives" + (f" ({g.kind(text)})" if text else ""))
            continue
        g.used.add(text)
        second = next((v for v in (g.value(text, k) for k in ("text_l", "clip_l")) if isinstance(v, str)), said)
        settings[name] = [second] if name == "prompt" else second
        if second != said:
            settings[f"{name}_2"] = said
        settings |= _said_sizes(g, text, "" if name == "prompt" else "negative_")
    return settings, left


def _said_sizes(g, node, sign):
    """What SDXL's text node says of the picture's size, WIDTHxHEIGHT; {} of a node that says none, or one that cannot be."""
    settings = {}
    for ours, across, down, least in (
        ("original_size", "width", "height", 1),
        ("crop", "crop_w", "crop_h", 0),
        ("target_size", "target_width", "target_height", 1),
    ):
        sides = [_whole(g.value(node, side)) for side in (across, down)]
        if None not in sides and min(sides) >= least:
            settings[sign + ours] = "x".join(map(str, sides))
    return settings


def _beginning(g, found):
    """The size of empty latents; a picture that was begun with is named."""
    latent = g.behind(g.sampler, "latent_image")
    if latent is None:
        return {}, []
    if not str(g.nodes[latent].get("class_type")).startswith("Empty"):
        return {}, ["the picture that it began with"]
    g.used.add(latent)
    sides = {side: _whole(g.value(latent, side)) for side in ("width", "height")}
    n = g.value(latent, "batch_size")
    several = isinstance(n, int) and n > 1
    left = [f"batch_size: {n} (the first picture is drawn; the others' noise follows it)"] if several else []
    if None in sides.values():
        return {}, [*left, "the size, which no node gives as two numbers"]
    return sides, left


def _whole(value):
    """A whole number, also as 64.0 or "64"; None for anything else."""
    try:
        number = float(value) if isinstance(value, int | float | str) and not isinstance(value, bool) else math.nan
    except (ValueError, OverflowError):
        return None
    return int(number) if number.is_integer() else None


def _model(g, found):
    """The name of the file that was loaded, behind the LoRAs and what else changes a model on its way."""
    settings, left, passed = {}, [], set()
    node = g.behind(g.sampler, "model")
    while node and node not in passed and not any(name in g.inputs(node) for name in NAMES):
        passed.add(node)  # a graph may lead back to itself
        if "lora_name" in g.inputs(node):
            g.used.add(node)
            lora = f"{g.value(node, 'lora_name')} at {g.value(node, 'strength_model')}"
            left.append(f"LoRA {short(lora)} (give it with --lora)")
        node = g.behind(node, "model")
    if node and (key := next((name for name in NAMES if name in g.inputs(node)), None)):
        g.used.add(node)
        settings["model"] = str(g.value(node, key))
    return settings, left


def _stages(g, found):
    """What KSamplerAdvanced and `denoise` do otherwise than a whole run: named, not repeated."""
    left = []
    for name, usual in (
        ("add_noise", "enable"),
        ("start_at_step", 0),
        ("return_with_leftover_noise", "disable"),
        ("end_at_step", 10_000),
        ("denoise", 1),
    ):
        got = g.value(g.sampler, name)
        to_the_end = name == "end_at_step" and isinstance(got, int) and got >= found.get("steps", 0)
        if got not in (None, usual) and not to_the_end:
            left.append(f"{name}: {short(got)}")
    return {}, left


def _grid(g, found):
    """Sampler and scheduler: one of ours that is both, or a sampler with --sigmas."""
    sampler, scheduler = g.value(g.sampler, "sampler_name"), g.value(g.sampler, "scheduler")
    settings, left = _spaced(sampler, scheduler)
    if settings and (sampler in SHORT or (sampler == "uni_pc" and scheduler != "normal")):
        left = [f"sampler {sampler} (another picture: there without the last level but one)"]
    elif settings and sampler == "deis":
        left = ["sampler deis (another picture: there of third order in t)"]
    elif settings and re.search("sde|ancestral|lcm", str(sampler)):
        noise = "of a Brownian tree" if "sde" in sampler else "from a generator of its own"
        left = [f"sampler {sampler} (another picture: there its steps have noise {noise})"]
    return settings, left


def _spaced(sampler, scheduler):
    if ours := infotext.sampler_of(COMFYUI, sampler, scheduler):
        return {"scheduler": ours} | infotext.spaced(ours), []
    if (sampler, scheduler) in (("ddim", "normal"), ("ddim", "karras")):  # in σ, from x0 and ε, it is Euler's
        return {"scheduler": "euler"} | infotext.spaced("euler", {"karras": "karras"}.get(scheduler)), []
    plain = infotext.sampler_of(COMFYUI, sampler, "normal")
    if scheduler in GRIDS and plain not in (None, *infotext.UNSPACED):
        return {"scheduler": plain} | infotext.spaced(plain, {"beta": "beta_times"}.get(scheduler, scheduler)), []
    return {}, [f"sampler {short(sampler)} with scheduler {short(scheduler)}"]
