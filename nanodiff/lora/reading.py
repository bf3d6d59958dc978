"""Reading a LoRA file of any dialect for given models: strict, like all loading here.

alpha: the `.alpha` tensor, else the metadata's or adapter_config.json's, else alpha = rank.

Explained in the book (docs/book): chapter 12.
"""

import json
import math
import re
import sys
from pathlib import Path

import torch

from nanodiff import weights
from nanodiff.config import UserError, nearest, printable, read_json, short, typed
from nanodiff.device import onednn
from nanodiff.lora.format import DIFFUSERS_NAME, DOWN, OTHERS, SUFFIXES, UP, Delta, Lora, check_models, names_of
from nanodiff.weights import original_names


def read(
    path: str | Path, models: dict[str, torch.nn.Module], allow_partial: bool = False, words: bool = False
) -> Lora:
    """A Lora for `models` ({component: module}). words: the caller teaches the text encoders the learned words that come with it.
    Raises UserError for keys that none of the models knows (unless allow_partial, then each is said), for shapes that do not fit,
    for methods that are no LoRA, and for learned words that nobody would learn."""
    check_models(models)
    path = Path(path)
    if inside := _by_component(path):
        there = [file.parent.name for file in inside]
        strange, own = [n for n in there if n not in models], [n for n in models if n in there]
        if strange and not allow_partial:
            raise UserError(
                f"{path}: {printable(strange[0])} is no part of this model, which has {', '.join(models)} (`allow_partial` goes on without it)"
            )
        if strange:
            print(f"warning: {path}: left out: {', '.join(map(printable, strange))}", file=sys.stderr)
        if not own:
            raise UserError(f"{path}: no layer of it is in this model")
        parts = [read(path / n, {n: models[n]}, allow_partial) for n in own]
        return Lora(path.name, [d for p in parts for d in p.deltas], strange + [k for p in parts for k in p.skipped])
    file = file_of(path)
    if weights.is_pickle(file):
        raise UserError(
            f"{file}: is a pickle; convert it by: "
            f"python -m nanodiff.weights convert {file} {file.with_suffix('.safetensors')} --allow-pickle"
        )
    tensors, metadata = weights.load_weights(file), weights.metadata(file)
    for model in models.values():  # their layers' shapes are asked for
        onednn.undo(model)
    bundled = bundled_words(tensors, file)
    if bundled and not words:
        raise UserError(
            f"{file}: carries the learned words {', '.join(map(printable, bundled))}, which would be lost here"
        )
    groups, strange = grouped(tensors, file)
    known, settings = names_of(models), _settings(file, metadata)
    deltas, absent, twice, names = [], list(strange), [], {}  # names: {target: the layer of the file that is for it}
    theirs = lambda name: any(len(t) == 3 for t in known.get(name, ()))  # noqa: E731  # by the original checkpoint's name
    for name, parts in sorted(groups.items(), key=lambda g: theirs(g[0])):
        bare = name.removeprefix("base_model.model.")
        targets = known.get(name) or known.get(bare)
        if targets is None:
            # PEFT's folder of one text encoder does not say whose its layers are: of the one that has them
            there = [known[full] for c in models if (full := f"{c}.{bare}") in known]
            there = [t for t in there if len(there) == 1 or _fits(parts, models[t[0][0]].get_submodule(t[0][1]))]
            targets = there[0] if len(there) == 1 else None
            if len(there) > 1:
                both = " and ".join(t[0][0] for t in there)
                raise UserError(f"{file}: {printable(name)} may be of {both}; put it into a folder of that name")
        if targets is None:
            absent.append(name)
            continue
        if DOWN not in parts or UP not in parts:
            raise UserError(f"{file}: {printable(name)} has only {', '.join(parts)}, a LoRA layer has down and up")
        fused = len(targets[0]) == 3 and targets[0][2] in (0, 1, 2)
        for target in targets if fused else targets[:1]:
            if (first := names.setdefault(target[:2], name)) != name:
                twice.append((first, name))
                continue
            deltas.append(
                _delta(target, parts, models, _scale(f"{file}: {printable(name)}", target, parts, settings), file)
            )
    if wrong := [pair for pair in twice if not theirs(pair[1])]:
        raise UserError(
            f"{file}: {printable(wrong[0][0])} and {printable(wrong[0][1])} are one layer of this model, under two names"
        )
    if twice:  # some mixed files have all layers under both; diffusers leaves these out, too
        print(
            f"note: {file.name}: {len(twice)} layers stand there under two names; taken once, such as {printable(twice[0][0])}",
            file=sys.stderr,
        )
    if absent and not allow_partial:
        few = ", ".join(printable(k) for k in absent[:5])
        more = f" and {len(absent) - 5} more" if len(absent) > 5 else ""
        if len(absent) == len(strange):  # of a model's layers, but no pair of matrices
            raise UserError(
                f"{file}: {len(absent)} tensors are no part of a plain LoRA: {few}{more} (`allow_partial` goes on without them)"
            )
        hint = nearest(absent[0], known) if absent[0] in groups else ""
        raise UserError(
            f"{file}: {len(absent)} of {len(groups) + len(strange)} layers are not in this model, so it is for another family: "
            f"{few}{more}{hint} (`allow_partial` goes on without them)"
        )
    if not deltas:
        raise UserError(f"{file}: no layer of it is in this model")
    if absent:
        print(
            f"warning: {file.name}: {len(absent)} layers left out: {', '.join(map(printable, absent))}", file=sys.stderr
        )
    return Lora(file.name, deltas, absent, bundled)


def bundled_words(tensors, file):
    """{word: {"clip_l", "clip_g" or "": vectors [n, D]}} of the learned words in a LoRA file, taken out of its tensors: keys
    `bundle_emb.WORD.clip_l` (OneTrainer, kohya) and `bundle_emb.WORD.string_to_param.*` (A1111). Raises UserError."""
    words = {}
    for key in [k for k in tensors if k.startswith("bundle_emb.")]:
        match = re.fullmatch(r"bundle_emb\.(.+)\.(clip_l|clip_g|string_to_param\.\*|emb_params)", key)
        vectors = tensors.pop(key)
        vectors = vectors[None] if vectors.dim() == 1 else vectors
        if not match or vectors.dim() != 2 or not torch.isfinite(vectors).all():
            raise UserError(
                f"{file}: {printable(key)} {list(vectors.shape)} is no learned word (finite vectors [n, width])"
            )
        words.setdefault(match[1], {})[match[2] if match[2].startswith("clip") else ""] = vectors
    return words


def _by_component(path):
    """The files of a folder that has a PEFT folder for each component (beside which others may lie, such as checkpoints)."""
    found = sorted(path.glob("*/adapter_model.safetensors")) if path.is_dir() else []
    return [file for file in found if file.parent.name in WHOSE]


def files_of(path: str | Path) -> list[Path]:
    """file_of(), or the files of a folder with a PEFT folder for each component."""
    return _by_component(Path(path)) or [file_of(path)]


def file_of(path: str | Path) -> Path:
    """The safetensors file that a path means: itself, or the one in PEFT's, diffusers' or our training's folder, or the only one. Raises UserError."""
    path = Path(path)
    if not path.is_dir():
        return path
    for name in ("adapter_model.safetensors", DIFFUSERS_NAME):
        if (path / name).exists():
            return path / name
    there = sorted(p for p in path.iterdir() if p.suffix.lower() == ".safetensors")
    if len(there) != 1:
        found = (
            f"has {len(there)} safetensors files, such as {there[0].name}; name one"
            if there
            else "has no safetensors file"
        )
        raise UserError(f"{path}: {found}")
    return there[0]


def grouped(tensors: dict[str, torch.Tensor], file: str | Path) -> tuple[dict[str, dict[str, torch.Tensor]], list[str]]:
    """({layer name: {"down", "up", "alpha"}}, keys of no known form)"""
    groups, strange = {}, []
    adapters = {m[1] for key in tensors if (m := NAMED.search(key))}  # PEFT's own names of them
    if len(adapters) > 1:
        raise UserError(f"{file}: holds the adapters {', '.join(map(printable, sorted(adapters)))}; save one alone")
    for key, tensor in tensors.items():
        for mark, method in OTHERS.items():
            if re.search(mark, key):
                raise UserError(f"{file}: {printable(key)}: {method} is not supported (only plain LoRA)")
        if re.fullmatch(r"(unet|text_encoder):\d+:(up|down)", key):
            raise UserError(
                f"{file}: is in the layout of cloneofsimo/lora, which numbers layers instead of naming them; not supported"
            )
        key = NAMED.sub(lambda m: m[0].replace(f".{m[1]}.", "."), key)
        suffix = next((s for s in SUFFIXES if key.endswith(s)), None)
        if suffix is None:
            strange.append(key)
        else:
            parts = groups.setdefault(key.removesuffix(suffix), {})
            if SUFFIXES[suffix] in parts:
                raise UserError(
                    f"{file}: {printable(key.removesuffix(suffix))} has two matrices for {SUFFIXES[suffix]}"
                )
            parts[SUFFIXES[suffix]] = tensor
    return groups, strange


NAMED = re.compile(r"\.lora_[AB]\.([\w-]+)\.weight$")
WHOSE = ("unet", "transformer", "text_encoder", "text_encoder_2", "text_encoder_3")  # lora_adapter_metadata speaks of
# PEFT's beginnings that take a part out of the model's weights
REPLACED = ("pissa", "olora", "corda", "loftq", "lora_ga")
# of adapter_config.json
ADAPTER = {"use_rslora": bool, "use_dora": bool, "lora_alpha": float, "alpha_pattern": dict, "peft_type": str}


def _settings(file, metadata):
    """{prefix: {"r", "lora_alpha", …}} of `lora_adapter_metadata` (JSON in the header), or of adapter_config.json."""
    settings = {}
    if text := metadata.get("lora_adapter_metadata"):
        try:
            flat = json.loads(text)
        except (ValueError, RecursionError) as e:
            raise UserError(f"{file}: lora_adapter_metadata is no JSON: {e}") from None
        if not isinstance(flat, dict):
            raise UserError(f"{file}: lora_adapter_metadata is no JSON object")
        for key, value in flat.items():
            # without one of the denoiser alone, as its save_lora_adapter() writes it
            prefix, _, name = key.rpartition(".")
            if prefix not in ("", *WHOSE):
                raise UserError(
                    f"{file}: lora_adapter_metadata is of {printable(prefix)!r}, none of {', '.join(WHOSE)}"
                )
            settings.setdefault(prefix, {})[name] = value
    config = file.parent / "adapter_config.json"
    alone = [p for p in file.parent.iterdir() if p.suffix.lower() == ".safetensors"] == [file]
    if config.exists() and (alone or file.name == "adapter_model.safetensors"):
        settings[""] = read_json(config)
    for prefix, adapter in settings.items():
        where = f"{file}: {prefix}." if prefix else f"{file}: "
        for name, hint in ADAPTER.items():
            adapter[name] = typed(adapter.get(name), hint | None, f"{where}{name}")
        if adapter["use_dora"] or (adapter["peft_type"] or "LORA").rpartition(".")[2].upper() != "LORA":
            kind = "DoRA" if adapter["use_dora"] else short(adapter["peft_type"])
            raise UserError(f"{where}is {kind}; only plain LoRA is supported")
        init = adapter.get("init_lora_weights")
        if isinstance(init, str) and init.lower().startswith(REPLACED):
            raise UserError(
                f"{where}init_lora_weights is {short(init)}, with which the model's own weights change, too; save it by PEFT's "
                "`path_initial_model_for_weight_conversion`, as a plain LoRA"
            )
    return settings


def _scale(name, target, parts, settings):
    """alpha / rank of a layer (rank-stabilised: alpha / √rank). name: of file and layer, for errors."""
    rank = parts[DOWN].shape[0] if parts[DOWN].dim() else 0
    adapter = settings.get(target[0], settings.get("", {}))
    alpha = rank if adapter.get("lora_alpha") is None else adapter["lora_alpha"]
    patterns = adapter.get("alpha_pattern") or {}
    for pattern, value in patterns.items():
        if target[1] == pattern or target[1].endswith(f".{pattern}"):
            alpha = value  # the first that fits counts, as in PEFT
            break
        if not re.fullmatch(r"[\w.]+", pattern):
            raise UserError(
                f"{name}: alpha_pattern {printable(pattern)!r} is a regular expression; only names are supported"
            )
    stabilised = adapter.get("use_rslora") and "alpha" not in parts
    alpha = parts["alpha"].float() if "alpha" in parts else alpha
    if isinstance(alpha, torch.Tensor):
        alpha = alpha.item() if alpha.numel() == 1 else None
    if isinstance(alpha, bool) or not isinstance(alpha, int | float) or not math.isfinite(alpha) or rank < 1:
        raise UserError(f"{name}: alpha {alpha!r} with rank {rank} gives no strength")
    return alpha / rank**0.5 if stabilised else alpha / rank


def _shape(layer):
    return (layer.out_features, layer.in_features) if hasattr(layer, "in_features") else tuple(layer.weight.shape)


def _fits(parts, layer):
    """Are the matrices of a layer of this shape?"""
    if DOWN not in parts or UP not in parts or min(parts[DOWN].dim(), parts[UP].dim()) < 2:
        return False
    down, up = parts[DOWN], parts[UP]
    shapes = _shape(layer), (up.shape[0], *down.shape[1:])
    flat = [shape[:2] if set(shape[2:]) <= {1} else shape for shape in shapes]  # a 1×1 convolution is linear
    return flat[0] == flat[1] and up.shape[1] == down.shape[0] and set(up.shape[2:]) <= {1}


def _delta(target, parts, models, scale, file):
    component, module = target[:2]
    down, up = parts[DOWN], parts[UP]
    layer = models[component].get_submodule(module)
    if min(down.dim(), up.dim()) < 2:
        raise UserError(
            f"{file}: {component}.{module}: down {list(down.shape)} and up {list(up.shape)} are no matrices"
        )
    if len(target) == 3:
        up = original_names.ours(up, target[2])
    if not _fits(parts | {UP: up}, layer):
        raise UserError(
            f"{file}: {component}.{module}: down {list(down.shape)} and up {list(up.shape)} do not fit a layer of shape "
            f"{list(_shape(layer))}; it is for another family, or damaged"
        )
    if not (torch.isfinite(down).all() and torch.isfinite(up).all()):
        raise UserError(f"{file}: {component}.{module}: not finite (NaN or infinity)")
    return Delta(component, module, down, up, scale)


def parse(text: str) -> tuple[str, float]:
    """ "FILE" or "FILE:SCALE" of the command line -> (path, scale)."""
    path, colon, scale = text.rpartition(":")
    if colon and not Path(text).exists():
        try:
            if not math.isfinite(float(scale)):
                raise ValueError(scale)
            return path, float(scale)
        except ValueError:
            raise UserError(
                f"`lora` {printable(text)}: {printable(scale)!r} is no scale; use FILE or FILE:SCALE"
            ) from None
    return text, 1.0
