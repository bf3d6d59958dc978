"""Writing LoRA files in the three dialects.

    write("style.safetensors", trained({"unet": unet}), models, "kohya")

Every other program has a rule of its own for a file that does not say its alpha:

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
from collections.abc import Sequence
from pathlib import Path

import torch

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.files import write_json
from nanodiff.lora.format import Delta, Lora
from nanodiff.weights import original_names

FORMS = ("kohya", "diffusers", "peft")
NETWORKS = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")
BASES = {  # family: (ss_base_model_version, modelspec.architecture): what A1111 and ComfyUI tell a file's base by
    "SD 1": ("sd_v1", "stable-diffusion-v1/lora"),
    "SD 2": ("sd_v2", "stable-diffusion-v2-768-v/lora"),
    "SDXL": ("sdxl_base_v1-0", "stable-diffusion-xl-v1-base/lora"),
    "SD 3": ("sd3", "stable-diffusion-3/lora"),
}


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


def write(
    path: str | Path,
    found: Lora,
    models: dict[str, torch.nn.Module],
    form: str = "kohya",
    facts: dict[str, object] | None = None,
) -> Path:
    """Write a Lora. models: {component: module} of its whole pipeline, for the names. facts: {name: text} for kohya's header, such as
    title, steps, epoch, seed, learning_rate, resolution. peft: a folder, with one inside it for each component when there are several.

    Returns the path that was written. Raises UserError for an empty Lora, and one that changes a layer twice."""
    path, deltas = Path(path), found.deltas
    if form not in FORMS:
        raise UserError(f"`form` {form!r}: is none of {', '.join(FORMS)}")
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


def form_for(form: str, models: dict[str, torch.nn.Module]) -> str:
    """--lora-format with `auto` decided: kohya, or diffusers for an MMDiT, of which kohya's form has no names."""
    return form if form != "auto" else "diffusers" if "transformer" in models else "kohya"


def alpha_of(delta: Delta) -> float:
    """The alpha that gives a layer its strength by the plain rule, alpha / rank."""
    alpha = delta.scale * delta.down.shape[0]
    return round(alpha) if abs(alpha - round(alpha)) < 1e-9 * max(abs(alpha), 1) else alpha


def kohya_name(delta: Delta, models: dict[str, torch.nn.Module]) -> str:
    """lora_unet_… (SDXL's in the names of its original file), lora_te_… (lora_te1_, lora_te2_ where there are two encoders),
    lora_transformer_…"""
    component, path = delta.component, delta.module
    first = "lora_te1_" if "text_encoder_2" in models else "lora_te_"
    prefix = {"unet": "lora_unet_", "transformer": "lora_transformer_", "text_encoder": first, "text_encoder_2": "lora_te2_",
              "text_encoder_3": "lora_te3_"}[component]  # fmt: skip
    if component == "unet" and family_of(models) == "SDXL":
        path = original_names.original(f"{path}.weight", component, "SDXL", models[component].cfg)[0].removesuffix(
            ".weight"
        )
    return prefix + path.replace(".", "_")


def header(
    deltas: Sequence[Delta], models: dict[str, torch.nn.Module], facts: dict[str, object], title: str
) -> dict[str, str]:
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


def settings_of(deltas: Sequence[Delta]) -> dict[str, object]:
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
        write_json(folder / "adapter_config.json", config)
        plain = component.startswith("text") and not getattr(models[component].cfg, "with_projection", True)
        tensors = {
            f"base_model.model.{k.removeprefix('text_model.') if plain else k}": v
            for k, v in _peft_tensors(mine).items()
        }
        weights.save_tensors(folder / "adapter_model.safetensors", tensors)
    return path
