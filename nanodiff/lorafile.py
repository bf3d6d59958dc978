"""LoRA files as a whole: writing the three dialects, translating, merging, extracting, comparing.

    write("style.safetensors", lora.trained({"unet": unet}), models, "kohya")

    python -m nanodiff.lora inspect FILE
    python -m nanodiff.lora convert IN OUT --to kohya|diffusers|peft
    python -m nanodiff.lora merge --model FOLDER --lora FILE[:SCALE] OUT
    python -m nanodiff.lora extract --model BASE --tuned FOLDER --rank 16 OUT
    python -m nanodiff.lora verify A B

Which module a key stands for is known from the model: --model, or the released model whose layers all fit. Every other program has a
rule of its own for a file that does not say its alpha:

| reader | no `.alpha` tensor | source |
|---|---|---|
| ComfyUI, A1111, kohya | strength 1 | their LoRA loaders |
| diffusers, PEFT | the header's or adapter_config.json's alpha / rank, else 1 | lora_adapter_metadata, LoraConfig |

So `kohya` is what is written unless asked otherwise: its alpha tensor is read alike by all of them. A rank-stabilised strength
(alpha / √rank) is written as the alpha that gives it by the plain rule. What is changed by translating is names, never a number
of a matrix: there and back gives the same bytes in each tensor.
"""

import collections
import hashlib
import json
from pathlib import Path

import torch

from nanodiff import lora, pipeline, singlefile, sources, weights
from nanodiff.config import UserError, printable, tool

FORMS = ("kohya", "diffusers", "peft")
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
BASES = {  # family: (ss_base_model_version, modelspec.architecture): what A1111 and ComfyUI tell a file's base by
    "SD 1": ("sd_v1", "stable-diffusion-v1/lora"),
    "SD 2": ("sd_v2", "stable-diffusion-v2-768-v/lora"),
    "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "SD 3": ("sd3", "stable-diffusion-3/lora"),
}


# ---------------------------------------------------------------------------------------------------------
# Which model


def skeletons(model):
    """{component: module without weights} of a model's networks, by name, folder or file."""
    src = sources.configs(model)
    return {n: weights.skeleton(src.builder(n), src.config(n)) for n in NETWORKS if n in src.parts}


def models_for(path, model=None):
    """({component: module without weights}, Lora) of a file. Without a model, the released one whose layers all fit it."""
    if model:
        models = skeletons(model)
        return models, lora.read(path, models)
    reasons = {}
    for family in singlefile.KNOWN:
        known = singlefile.Known(family, sources.BUILDERS)
        models = {n: weights.skeleton(known.builder(n), known.config(n)) for n in NETWORKS if n in known.parts}
        try:
            return models, lora.read(path, models)
        except UserError as e:
            reasons[family] = str(e)
    if len(set(reasons.values())) == 1:  # the file itself is at fault
        raise UserError(next(iter(reasons.values())))
    raise UserError(
        f"{path}: fits none of {', '.join(reasons)}; name its model with --model (for {next(iter(reasons))}: {next(iter(reasons.values()))})"
    )


def family_of(models):
    """The key of BASES that a pipeline's networks belong to."""
    if "transformer" in models:
        return "SD 3"
    if "unet" in models and models["unet"].cfg.addition_embed_type:
        return "SDXL"
    if "text_encoder_2" in models:
        return "SDXL"
    wide = models["unet"].cfg.cross_attention_dim if "unet" in models else models["text_encoder"].cfg.hidden_size
    return "SD 2" if wide == 1024 else "SD 1"


# ---------------------------------------------------------------------------------------------------------
# Writing


def write(path, found, models, form="kohya", facts=None):
    """Write a Lora. models: {component: module} of its whole pipeline, for the names. facts: {name: text} for kohya's header, such as
    title, steps, epoch, seed, learning_rate, resolution. peft: a folder, with one inside it for each component when there are several.

    Returns the path that was written. Raises UserError for an empty Lora, and one that changes a layer twice."""
    path, deltas = Path(path), found.deltas
    if not deltas:
        raise UserError(f"{path}: no adapters to write")
    twice = [k for k, n in collections.Counter(d[:2] for d in deltas).items() if n > 1]
    if twice:
        raise UserError(
            f"{path}: {'.'.join(twice[0])} is changed twice, which a file cannot say; merge the two instead"
        )
    if form == "peft":
        return _write_peft(path, deltas, models, facts or {})
    if form == "diffusers":
        tensors, settings = {}, {}
        for component in dict.fromkeys(d.component for d in deltas):
            mine = [d for d in deltas if d.component == component]
            settings |= {f"{component}.{k}": v for k, v in settings_of(mine).items()}
            tensors |= {f"{component}.{k}": v for k, v in _peft_tensors(mine).items()}
        weights.save_tensors(path, tensors, {"lora_adapter_metadata": json.dumps(settings, sort_keys=True)})
        return path
    tensors = {}
    for d in deltas:
        name = kohya_name(d, models)
        tensors[f"{name}.lora_down.weight"], tensors[f"{name}.lora_up.weight"] = d.down, d.up
        tensors[f"{name}.alpha"] = torch.tensor(alpha_of(d), dtype=torch.float32)
    _write_hashed(path, tensors, header(deltas, models, facts or {}, path.stem))
    return path


def form_for(form, models):
    """--lora-format with `auto` decided: kohya, or diffusers for an MMDiT, of which kohya's form has no names."""
    return form if form != "auto" else "diffusers" if "transformer" in models else "kohya"


def alpha_of(delta):
    """The alpha that gives a layer its strength by the plain rule, alpha / rank."""
    alpha = delta.scale * delta.down.shape[0]
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(abs(alpha), 1) else alpha


def kohya_name(delta, models):
    """lora_unet_… (SDXL's in the names of its original file), lora_te_… (lora_te1_, lora_te2_ where there are two encoders),
    lora_transformer_…"""
    component, path = delta.component, delta.module
    first = "lora_te1_" if "text_encoder_2" in models else "lora_te_"
    prefix = {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder": first, "text_encoder_2": "lora_te2_",
              "text_encoder_3": "lora_te3_"}[component]  # fmt: skip
    if component == "unet" and family_of(models) == "SDXL":
        path = singlefile.original(f"{path}.weight", component, "SDXL", models[component].cfg)[0].removesuffix(
            ".weight"
        )
    return prefix + path.replace(".", "_")


def header(deltas, models, facts, title):
    """kohya's metadata and the modelspec's, as texts: what A1111 and ComfyUI read, and nothing about the machine or the pictures."""
    family = family_of(models)
    version, architecture = BASES[family]
    ranks, alphas = ({f(d) for d in deltas} for f in (lambda d: d.down.shape[0], alpha_of))
    one = lambda values: f"{values.pop():g}" if len(values) == 1 else "Dynamic"  # noqa: E731
    made = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": one(ranks),
        "ss_network_alpha": one(alphas),
        "ss_base_model_version": version,
        "ss_v2": str(family == "SD 2"),
        "ss_output_name": str(facts.get("title", title)),
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": architecture,
        "modelspec.implementation": "diffusers",
        "modelspec.title": str(facts.get("title", title)),
        "modelspec.resolution": str(facts.get("resolution", "1024x1024" if family in ("SDXL", "SD 3") else "512x512")),
    }
    if "prediction_type" in facts:
        made["modelspec.prediction_type"] = {"v_prediction": "v"}.get(
            facts["prediction_type"], str(facts["prediction_type"])
        )
    return made | {
        f"ss_{k}": str(facts[k])
        for k in ("steps", "epoch", "seed", "learning_rate", "num_train_images", "clip_skip")
        if k in facts
    }


def _write_hashed(path, tensors, metadata):
    """A file whose header holds the hash of its tensors, by which A1111 knows it again whatever its header says."""
    weights.save_tensors(path, tensors, metadata)
    with open(path, "rb") as f:
        f.seek(int.from_bytes(f.read(8), "little") + 8)
        digest = hashlib.file_digest(f, "sha256").hexdigest()
    weights.save_tensors(path, tensors, metadata | {"sshs_model_hash": digest})


def settings_of(deltas):
    """LoraConfig's fields for one component's layers: the commonest rank and alpha, the others by their names.

    Names are matched by their ends, and are without `text_model.`, which the newer transformers do not have in memory."""
    short = {d.module: d.module.removeprefix("text_model.") for d in deltas}
    ranks, alphas = {short[d.module]: d.down.shape[0] for d in deltas}, {short[d.module]: alpha_of(d) for d in deltas}
    rank, alpha = (collections.Counter(v.values()).most_common(1)[0][0] for v in (ranks, alphas))
    return {
        "r": rank, "lora_alpha": alpha, "target_modules": sorted(ranks),
        "rank_pattern": {k: v for k, v in ranks.items() if v != rank}, "alpha_pattern": {k: v for k, v in alphas.items() if v != alpha},
        "lora_dropout": 0.0, "use_rslora": False, "bias": "none",
    }  # fmt: skip


def _peft_tensors(deltas):
    return {f"{d.module}.{part}.weight": v for d in deltas for part, v in (("lora_A", d.down), ("lora_B", d.up))}


def _write_peft(path, deltas, models, facts):
    """A CLIP without projection has no `text_model.` in memory in transformers 5, one with it has; PEFT goes by the names in memory."""
    components = list(dict.fromkeys(d.component for d in deltas))
    for component in components:
        folder = path / component if len(components) > 1 else path
        folder.mkdir(parents=True, exist_ok=True)
        mine = [d for d in deltas if d.component == component]
        config = {
            "peft_type": "LORA", "task_type": None, "base_model_name_or_path": facts.get("base_model"), "inference_mode": True,
            "fan_in_fan_out": False, "init_lora_weights": True, "modules_to_save": None,
        } | settings_of(mine)  # fmt: skip
        weights.write_json(folder / "adapter_config.json", config)
        plain = component.startswith("text") and not getattr(models[component].cfg, "with_projection", True)
        tensors = {
            f"base_model.model.{k.removeprefix('text_model.') if plain else k}": v
            for k, v in _peft_tensors(mine).items()
        }
        weights.save_tensors(folder / "adapter_model.safetensors", tensors)
    return path


# ---------------------------------------------------------------------------------------------------------
# Tools


def inspect(path, model=None):
    """Print every layer with its shapes, rank and alpha, and how strong other programs take the file to be."""
    file = lora.file_of(path)
    groups, strange = lora.grouped(weights.load_tensors(file), file)
    for name, parts in groups.items():
        facts = [f"{k} {list(parts[k].shape)}" for k in (lora.DOWN, lora.UP) if k in parts]
        facts += [f"alpha {float(parts['alpha']):g}"] if "alpha" in parts else []
        print(printable(name), ", ".join(facts))
    for key in strange:
        print(f"unknown: {printable(key)}")
    try:
        models, found = models_for(path, model)
    except UserError as e:
        if model:
            raise
        return print(f"{len(groups)} layers; {e}")
    ranks = sorted({d.down.shape[0] for d in found.deltas})
    strengths = sorted({round(d.scale, 9) for d in found.deltas})
    shown = lambda values: ", ".join(f"{v:g}" for v in values[:6]) + (" …" if len(values) > 6 else "")  # noqa: E731
    print(f"{family_of(models)}: {len(found.deltas)} layers of {', '.join(dict.fromkeys(d.component for d in found.deltas))}; rank {shown(ranks)}; "
          f"strength {shown(strengths)}")  # fmt: skip
    if any("alpha" not in parts for parts in groups.values()) and strengths != [1.0]:
        print("note: without alpha tensors ComfyUI and A1111 take strength 1; `convert --to kohya` writes them")
    return None


def convert(source, target, form, model=None):
    """Translate a file. Names change, numbers do not."""
    models, found = models_for(source, model)
    kept = weights.metadata(lora.file_of(source))
    facts = {
        k.removeprefix("ss_"): v
        for k, v in kept.items()
        if k.removeprefix("ss_") in ("steps", "epoch", "seed", "learning_rate", "num_train_images", "clip_skip")
    }
    facts |= {"title": kept["ss_output_name"]} if "ss_output_name" in kept else {}
    facts |= {"resolution": kept["modelspec.resolution"]} if "modelspec.resolution" in kept else {}
    written = write(target, found, models, form, facts)
    print(f"{written}: {len(found.deltas)} layers, {form}, {family_of(models)}")


def merge(model, loras, target):
    """Add LoRAs into a model's weights for good, and write it as a Hub folder, in the types that it was stored in."""
    sd = pipeline.load(model, None)
    for text in loras:
        path, scale = lora.parse(text)
        found = lora.read(path, sd.models())
        lora.fuse(sd.models(), found, scale, keep=False)
        print(f"{found.name}: {len(found.deltas)} layers, scale {scale:g}")
    sd.save(target)
    print(target)


def extract(model, tuned, rank, target, form="kohya"):
    """The LoRA that comes nearest to tuned - model: the largest singular values of each layer's difference (Eckart and Young 1936)."""
    from tqdm import tqdm

    if rank < 1:
        raise UserError(f"--rank {rank} must be at least 1")
    a, b = sources.source(model), sources.source(tuned)
    deltas, models, left_out, lost, whole = [], {}, [], 0.0, 0.0
    for component in (n for n in NETWORKS if n in a.parts and n in b.parts):
        base, other = (s.module(component, None, "cpu") for s in (a, b))
        models[component] = base
        mine, theirs = base.state_dict(), other.state_dict()
        for key in [k for k in mine if k not in theirs or mine[k].shape != theirs[k].shape]:
            raise UserError(
                f"{tuned}: {component}.{printable(key)}: is not of this shape in {model}; it is for another family"
            )
        layers = {f"{n}.weight" for n, m in base.named_modules() if isinstance(m, torch.nn.Linear | torch.nn.Conv2d)}
        for key in tqdm(mine, desc=component, disable=None):
            difference = theirs[key].float() - mine[key].float()
            if not difference.any():
                continue
            if key not in layers:
                left_out.append(f"{component}.{key}")
                continue
            delta = _nearest(component, key.removesuffix(".weight"), difference, rank)
            deltas.append(delta)
            whole += difference.square().sum().item()
            lost += (difference - delta.matrix(difference.shape)).square().sum().item()
    if not deltas:
        raise UserError(f"{tuned}: no layer differs from {model}")
    if left_out:
        print(
            f"note: {len(left_out)} tensors that are no layer's weight differ too, and are left out, such as {printable(left_out[0])}"
        )
    written = write(target, lora.Lora("extracted", deltas, []), models, form)
    print(f"{written}: {len(deltas)} layers, {100 * (1 - lost / whole):.2f} % of the squared difference")


def _nearest(component, module, difference, rank):
    u, s, v = torch.linalg.svd(difference.flatten(1), full_matrices=False)
    r = min(rank, int((s > s[0] * 1e-7).sum()))
    root = s[:r].sqrt()
    up, down = u[:, :r] * root, root[:, None] * v[:r]
    if difference.dim() == 4:
        up, down = up[:, :, None, None], down.view(r, *difference.shape[1:])
    return lora.Delta(component, module, down.contiguous(), up.contiguous(), 1.0)


def verify(a, b, model=None, tolerance=1e-6):
    """Compare what two files add to each layer. Prints the largest relative difference; the exit code is 1 above the tolerance."""
    models, first = models_for(a, model)
    changes = [_changes(found) for found in (first, lora.read(b, models))]
    worst, where = 0.0, None
    for target in dict.fromkeys(k for c in changes for k in c):
        x, y = (c.get(target) for c in changes)
        x, y = (torch.zeros_like(other) if one is None else one for one, other in ((x, y), (y, x)))
        error = ((x - y).norm() / torch.maximum(x.norm(), y.norm()).clamp(min=1e-30)).item()
        if error > worst or where is None:
            worst, where = error, target
    print(
        f"largest relative difference {worst:.3g}, in {'.'.join(where)}, of {len(changes[0])} and {len(changes[1])} layers"
    )
    return int(worst > tolerance)


def _changes(found):
    """{(component, module): what is added to the weight [out, …]} in fp64."""
    out = {}
    for d in found.deltas:
        change = (d.up.double().flatten(1) @ d.down.double().flatten(1)) * d.scale
        out[d[:2]] = out[d[:2]] + change if d[:2] in out else change
    return out


def main():
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nanodiff.lora", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    add = lambda name, help: commands.add_parser(name, help=help)  # noqa: E731
    one = add("inspect", "list the layers of a file, and its strength")
    one.add_argument("path")
    two = add("convert", "translate a file")
    two.add_argument("source")
    two.add_argument("target", help="a file; for peft a folder")
    two.add_argument("--to", choices=FORMS, required=True)
    three = add("merge", "add LoRAs into a model's weights")
    three.add_argument("--lora", action="append", required=True, help="FILE or FILE:SCALE; repeatable")
    three.add_argument("target", help="folder of the new model")
    four = add("extract", "the LoRA nearest to the difference of two models")
    four.add_argument("--tuned", required=True, help="the changed model")
    four.add_argument("--rank", type=int, default=16)
    four.add_argument("--to", choices=FORMS, default="kohya")
    four.add_argument("target")
    five = add("verify", "do two files change the same by the same?")
    five.add_argument("a")
    five.add_argument("b")
    five.add_argument("--tolerance", type=float, default=1e-6, help="of the relative difference of a layer's change")
    for command in (one, two, five):
        command.add_argument("--model", help="whose layers they are; default: the released model that they fit")
    for command in (three, four):
        command.add_argument("--model", required=True, help="the model to start from")
    args = parser.parse_args()
    return tool(
        {
            "inspect": lambda: inspect(args.path, args.model),
            "convert": lambda: convert(args.source, args.target, args.to, args.model),
            "merge": lambda: merge(args.model, args.lora, args.target),
            "extract": lambda: extract(args.model, args.tuned, args.rank, args.target, args.to),
            "verify": lambda: verify(args.a, args.b, args.model, args.tolerance),
        }[args.command]
    )
