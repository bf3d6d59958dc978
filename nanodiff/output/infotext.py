"""A picture's settings as AUTOMATIC1111 writes and reads them (modules/infotext_utils.py): the prompt, "Negative prompt: …", and a last line
"Steps: 20, Sampler: Euler a, Schedule type: Automatic, …"."""

import json
import math
import re

from nanodiff.config import printable, short

# (A1111's menu, its schedule types in which it is ours, ours)
MENU = (
    ("Euler", ("", "Automatic", "Uniform"), "euler"),
    ("Euler a", ("", "Automatic", "Uniform"), "euler_a"),
    ("Heun", ("", "Automatic", "Uniform"), "heun"),
    ("LMS", ("", "Automatic", "Uniform"), "lms"),
    ("DPM2", ("Uniform",), "kdpm2"),
    ("DPM2 a", ("Uniform",), "kdpm2_a"),
    ("DPM++ 2M", ("Uniform",), "dpmpp_2m"),
    ("DPM++ 2M", ("", "Automatic", "Karras"), "dpmpp_2m_karras"),
    ("DPM++ 2M SDE", ("Uniform",), "dpmpp_2m_sde"),
    ("DPM++ 2M SDE", ("Karras",), "dpmpp_2m_sde_karras"),
    ("DPM++ 3M SDE", ("Uniform",), "dpmpp_3m_sde"),
    ("DPM++ SDE", ("Uniform",), "dpmpp_sde"),
    ("DPM++ 2S a", ("Uniform",), "dpmpp_2s_a"),
    ("DDIM", ("", "Automatic", "Uniform"), "ddim"),
    ("PLMS", ("", "Automatic", "Uniform"), "pndm"),
    ("UniPC", ("", "Automatic", "Uniform"), "unipc"),
    ("LCM", ("", "Automatic", "Uniform"), "lcm"),
)
# A1111's schedule types that are grids of ours (sample.py --sigmas), for the samplers that can have them
SPACINGS = {
    "Karras": "karras",
    "Exponential": "exponential",
    "SGM Uniform": "sgm_uniform",
    "Simple": "simple",
    "Beta": "beta",
    "Align Your Steps": "ays",
}
# what "Automatic" means where it is no grid of the sampler's own (its samplers_k_diffusion)
AUTOMATIC = {"DPM++ SDE": "Karras", "DPM++ 2S a": "Karras", "DPM2": "Karras", "DPM2 a": "Karras", "DPM++ 2M SDE": "Exponential",
             "DPM++ 3M SDE": "Exponential"}  # fmt: skip
# what theirs do otherwise (the same table): the last noise level but one is left out; noise comes from a Brownian tree
OTHERWISE = dict.fromkeys(("DPM2", "DPM2 a"), "without the last level but one")
OTHERWISE |= dict.fromkeys(("DPM++ SDE", "DPM++ 2M SDE"), "noise of a Brownian tree")
OTHERWISE["LCM"] = "the last step is spent at the clean end"
# schedule types of theirs that are other levels than our grid of the name
KINDS = {"Align Your Steps": "n levels down to 0.029, not n + 1"}
OTHERWISE["DPM++ 3M SDE"] = "without the last level but one, noise of a Brownian tree"
CHURN = {"s_churn": "Sigma churn", "s_tmin": "Sigma tmin", "s_tmax": "Sigma tmax", "s_noise": "Sigma noise"}
UPSCALERS = {False: "Lanczos", True: "Latent (bicubic)"}  # A1111's names of what the second pass of --hires begins with
UNSPACED = ("euler_a", "ddim", "pndm", "lcm")
# samplers that have a grid of their own here where A1111's is even in time
EVEN = ("dpmpp_2m", "dpmpp_2m_sde", "dpmpp_3m_sde")


def spaced(sampler, sigmas=None):
    """{timestep_spacing, sigmas} with which a sampler of ours has the levels of the web UI and of ComfyUI, whatever the model's own spacing: from the
    noisiest to the cleanest of the training."""
    if sampler in ("ddim", "pndm", "lcm"):
        return {}
    sigmas = sigmas or ("normal" if sampler in EVEN else None)
    return {"timestep_spacing": "linspace"} | ({"sigmas": sigmas} if sigmas else {})


PAIR = re.compile(r'\s*(\w[\w \-/]+):\s*("(?:\\.|[^\\"])+"|[^,]*)(?:,|$)')


def written(record):
    """The text that A1111, Civitai and others show for a record of ours. Display only: the truth is images.CHUNK."""

    def quote(value):
        text = printable(value)
        return json.dumps(text, ensure_ascii=False) if re.search(r'[,:\n"]', text) else text

    lines = [record["prompt"]]
    if record.get("negative_prompt"):
        lines.append(f"Negative prompt: {record['negative_prompt']}")
    sampler, kind = named(record["scheduler"])
    kind = next(
        (theirs for theirs, ours in SPACINGS.items() if ours == record.get("sigmas")), record.get("sigmas") or kind
    )
    hires = record.get("hires")
    taken = int((record.get("hires_steps") or record["steps"]) * record.get("hires_strength", 0)) if hires else ""
    strength = record.get("strength") or (record.get("hires_strength") if hires else None)
    last = {
        "Steps": record["steps"],
        "Sampler": sampler,
        "Schedule type": kind,
        "CFG scale": f"{record['guidance_scale']:g}",
        "Seed": record["seed"],
        "Size": f"{record['width']}x{record['height']}",
        "Model hash": record.get("model_hash") or "",
        "Model": record["model"],
        "Clip skip": record["clip_skip"] + 1 if record.get("clip_skip") else "",
        "Denoising strength": "" if strength is None else f"{strength:g}",
        "Mask blur": record.get("mask_blur") or "",
        "Hires upscale": f"{hires:g}" if hires else "",
        "Hires steps": taken,
        "Hires upscaler": UPSCALERS[bool(record.get("hires_latent"))] if hires else "",
        "Lora hashes": ", ".join(f"{k}: {v}" for k, v in (record.get("lora_hashes") or {}).items()),
        "Eta DDIM": f"{record['eta']:g}" if record.get("eta") else "",
        **{
            theirs: f"{record[ours]:g}"
            for ours, theirs in CHURN.items()
            if record.get("s_churn") and record.get(ours) is not None
        },
        "Refiner": record.get("refiner") or "",
        "Refiner switch at": f"{record['refiner_start']:g}" if record.get("refiner") else "",
        "RNG": "CPU",
    }
    return "\n".join([*lines, ", ".join(f"{k}: {quote(v)}" for k, v in last.items() if v != "")])


def parameters(text):
    """({our setting: value}, [what is not used]) of A1111's text."""
    *lines, last = text.strip().split("\n")
    pairs = PAIR.findall(last)
    if len(pairs) < 3:  # a picture's text without settings
        lines, pairs = [*lines, last], []
    facts = {}
    for key, value in pairs:
        facts[key.strip()] = _unquoted(value.strip())
    negative = next((i for i, line in enumerate(lines) if line.startswith("Negative prompt:")), len(lines))
    found = {"prompt": ["\n".join(lines[:negative]).strip()], "prompt_syntax": "a1111"}
    if negative < len(lines):
        found["negative_prompt"] = "\n".join([lines[negative][16:], *lines[negative + 1 :]]).strip()
    for name, key, kind in (
        ("steps", "Steps", int),
        ("guidance_scale", "CFG scale", float),
        ("seed", "Seed", int),
        ("eta", "Eta DDIM", float),
    ):
        if (value := _number(facts.get(key), kind)) is not None:
            found[name] = value
            del facts[key]
    if size := re.fullmatch(r"(\d+)x(\d+)", facts.get("Size", "")):
        found["width"], found["height"] = map(int, size.groups())
        del facts["Size"]
    found |= _sampling(facts) | _hires(facts, found.get("steps"))
    if (skip := _number(facts.get("Clip skip"), int)) is not None:
        found["clip_skip"] = max(skip - 1, 0)  # 1 leaves out none
        del facts["Clip skip"]
    for name, key in (("model", "Model"), ("model_hash", "Model hash")):
        if key in facts:
            found[name] = facts.pop(key)
    if facts.get("RNG") == "CPU":
        del facts["RNG"]
    elif pairs:  # its default is the graphics card's, which draws other numbers
        facts["RNG"] = facts.get("RNG", "GPU") + " (noise is drawn on the CPU here: another picture)"
    facts.pop("Version", None)
    return found, [f"{k}: {short(v)}" for k, v in facts.items()]


def _sampling(facts):
    """{scheduler, sigmas, Karras's churn} by the menu's names; what is used is taken from `facts`, what means another picture is told
    there."""
    found = {}
    name, kind = _spoken(facts)
    kind = "Uniform" if kind == "Normal" else kind  # two names of one
    sampler = sampler_of(MENU, name, kind)
    if sampler is None and kind in SPACINGS and (plain := sampler_of(MENU, name, "Uniform")) not in (None, *UNSPACED):
        sampler, found["sigmas"] = plain, SPACINGS[kind]
    if sampler == "euler" and _number(facts.get("Sigma churn"), float):  # the others' and what needs it are left
        for ours, theirs in CHURN.items():
            if (value := _number(facts.get(theirs), float)) is not None:
                found[ours] = value
                del facts[theirs]
    if sampler:
        found |= {"scheduler": sampler} | spaced(sampler, found.get("sigmas"))
        del facts["Sampler"]
        if name in OTHERWISE:
            facts["Sampler"] = f"{name} (another picture: there {OTHERWISE[name]})"
        facts.pop("Schedule type", None)
        if kind in KINDS:
            facts["Schedule type"] = f"{kind} (another picture: there {KINDS[kind]})"
    return found


def _hires(facts, steps):
    """Settings of the second, larger pass, taken from `facts`; {} without one."""
    if (times := _number(facts.get("Hires upscale"), float)) is None:
        return {}
    strength, upscaler = _number(facts.get("Denoising strength"), float), facts.get("Hires upscaler", "")
    found = {"hires": times, "hires_latent": upscaler.startswith("Latent")}
    if strength:
        found["hires_strength"] = strength
        # there all steps of the second pass are taken, here the part `hires_strength` of them
        if taken := _number(facts.get("Hires steps"), int) or steps:
            found["hires_steps"] = whole = int(taken / min(strength, 0.999))
            if int(whole * strength) != taken:  # as many of these, rounding aside
                found["hires_strength"] = min((taken + 0.5) / whole, 1.0)
    for key in ("Hires upscale", "Hires steps", *(["Denoising strength"] if strength else [])):
        facts.pop(key, None)
    if upscaler in UPSCALERS.values():
        del facts["Hires upscaler"]
    elif upscaler:
        facts["Hires upscaler"] += f" ({UPSCALERS[found['hires_latent']]} is used)"
    return found


def _number(text, kind):
    """A text as a number; None for what is none, and for what is not finite."""
    try:
        return kind(text) if math.isfinite(float(text)) else None
    except (TypeError, ValueError):
        return None


def _unquoted(value):
    try:
        found = json.loads(value) if value.startswith('"') else value
    except ValueError:
        return value
    return found if isinstance(found, str) else value


def _spoken(facts):
    """(sampler, schedule type); before version 1.9 they were one name."""
    name, kind = facts.get("Sampler", ""), facts.get("Schedule type", "")
    for old in ("Karras", "Exponential"):
        if not kind and name.endswith(f" {old}"):
            return name.removesuffix(f" {old}"), old
    if kind == "Automatic":
        kind = AUTOMATIC.get(name, kind)
    # a sampler without a schedule type in a text without "Schedule type" is of a version that had none
    return name, kind or ("Uniform" if name.startswith("DPM") and "Schedule type" not in facts else "")


def sampler_of(table, name, kind):
    """Our name of a sampler and schedule in a table such as MENU, or None."""
    return next((ours for theirs, kinds, ours in table if theirs == name and kind in kinds), None)


def named(scheduler):
    """(sampler, schedule type) in A1111's menus of a sampler of ours; its own name and "" where A1111 has none."""
    for name, kinds, ours in MENU:
        if ours == scheduler:
            return name, next((k for k in kinds if k not in ("", "Automatic")), "")
    return scheduler, ""
