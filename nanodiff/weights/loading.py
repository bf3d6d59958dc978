"""Hub folders <-> modules. A model is built on the meta device, every tensor read and assigned.

Loading is strict: a missing, unexpected or misshapen tensor is an error that names its nearest relatives, because
a picture also comes out of a half-loaded model — a wrong one. There is no per-model translation: modules carry
the checkpoint's names, and the few historical spellings stand in RENAMES, as data.

Explained in the book (docs/book): chapter 16.
"""

import contextlib
import mmap
import re
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

from nanodiff.config import UserError, nearest, printable, read_json
from nanodiff.device.memory import keep_freed_memory
from nanodiff.files import sha256, write_json
from nanodiff.weights.safetensors import (
    FLOAT8,
    STEMS,
    STORED,
    _table,
    check_kind,
    find_files,
    header,
    open_file,
    save_tensors,
)

# (pattern, replacement or None to drop), by the class whose files need it.
RENAMES = {
    "AutoencoderKL": [  # diffusers < 0.17
        (r"(attentions\.0)\.query\.", r"\1.to_q."),
        (r"(attentions\.0)\.key\.", r"\1.to_k."),
        (r"(attentions\.0)\.value\.", r"\1.to_v."),
        (r"(attentions\.0)\.proj_attn\.", r"\1.to_out.0."),
    ],
    "CLIPTextModel": [
        (r"^(.*\.)?position_ids$", None),  # a constant 0..76 that old transformers stored
        (r"^(embeddings|encoder|final_layer_norm)\.", r"text_model.\1."),  # transformers >= 5.6
        (r"^(vision_model|visual_projection|logit_scale)\b", None),  # the other tower of a whole CLIP
    ],
}
RENAMES["CausalLM"] = [
    (r"rotary_emb\.inv_freq$", None),  # constants that old transformers stored
    (r"^language_model\.", ""),
]
RENAMES["T5EncoderModel"] = [
    (r"^encoder\.embed_tokens\.", None),  # a second copy of `shared` in some files
    (r"^text_model\.", ""),
]
RENAMES["ViT"] = [(r"^(classifier|pooler)\.", None), (r"^vit\.", "")]  # heads that are not used
RENAMES["CLIPTextModelWithProjection"] = RENAMES["CLIPTextModel"]
RENAMES["CLIPModel"] = RENAMES["CLIPVisionModelWithProjection"] = [(r"^(.*\.)?position_ids$", None)]


def digest(model: str | Path) -> dict[str, str] | None:
    """{file: SHA-256} of the weights of a model folder's components, or of one file; None for what is not here (a Hub id). Variants count
    only where there is nothing else."""
    path, files = Path(model), []
    for part in sorted(config.parent for config in path.glob("*/config.json")):
        there = sorted(part.glob("*.safetensors"))
        files += [f for f in there if f.name.count(".") == 1] or there
    files = [path] if path.is_file() else files
    return {p.relative_to(path).as_posix() if path.is_dir() else p.name: sha256(p) for p in files} or None


def renamed(key: str, class_name: str) -> str | None:
    """The name under which `class_name` knows a tensor of a file; None when it is to be dropped."""
    for pattern, replacement in RENAMES.get(class_name, ()):
        if re.search(pattern, key):
            if replacement is None:
                return None
            key = re.sub(pattern, replacement, key)
    return key


def check_names(expected: Mapping[str, Sequence[int]], found: Mapping[str, Sequence[int]], where: str | Path) -> None:
    """expected, found: {name: shape}. Raises UserError for the first differences, with the nearest names."""
    missing = [k for k in expected if k not in found]
    extra = [k for k in found if k not in expected]
    if missing or extra:
        key, others, what = (missing[0], extra or found, "misses") if missing else (extra[0], expected, "has unknown")
        more = len(missing) + len(extra) - 1
        raise UserError(
            f"{where}: {what} tensor {printable(key)}{nearest(key, others)}" + (f" (and {more} more)" if more else "")
        )
    for key, shape in expected.items():
        if _squeezed(found[key], shape) != tuple(shape):
            raise UserError(f"{where}: {key} has shape {list(found[key])}, the config asks for {list(shape)}")


def _squeezed(shape, wanted):
    """A linear layer that was stored as a 1×1 convolution: its shape without the trailing ones."""
    shape = tuple(shape)
    return shape[:2] if len(wanted) == 2 and len(shape) in (3, 4) and set(shape[2:]) == {1} else shape


class WithoutInit(torch.overrides.TorchFunctionMode):
    """Inside, torch.nn.init does nothing: weights that a file will replace need none (and on the meta device the
    normal distribution alone costs a second, for the compiler that it imports)."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        if getattr(func, "__module__", "") == "torch.nn.init":
            return kwargs.get("tensor", args[0] if args else None)
        return func(*args, **kwargs)


def skeleton(cls: type, cfg: object) -> torch.nn.Module:
    """The module without weights: on the meta device, built in no time. Raises UserError for sizes that make no model."""
    try:
        with torch.device("meta"), WithoutInit():
            return cls(cfg)
    except (ValueError, TypeError, IndexError, ArithmeticError, RuntimeError) as e:
        raise UserError(f"config.json of a {cls.__name__}: its sizes make no model: {str(e).splitlines()[0]}") from e


def load(
    cls: type,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    device: str | torch.device = "cpu",
    variant: str | None = None,
    cfg: object = None,
    without: Sequence[str] = (),
) -> torch.nn.Module:
    """The model `cls` of a Hub component folder (config.json + weights), or of one file of weights in its names (then cfg says what it is), in eval mode.

    dtype: torch dtype, None keeps the stored one. without: parts of the file that are not wanted, by the first word of their
    names. Each tensor goes from the file straight to its final type and device.
    """
    folder = Path(folder)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    cfg = cfg or cls.Config.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    paths = [folder] if folder.is_file() else find_files(folder, variant)
    shapes = header(paths)
    _check_depth(cfg, shapes, folder)
    model = skeleton(cls, cfg)
    empty = model.state_dict()
    expected = {k: tuple(v.shape) for k, v in empty.items()}
    names = {k: None if k.split(".")[0] in without else renamed(k, model.class_name) for k in shapes}
    check_names(expected, {v: shapes[k] for k, v in names.items() if v}, folder)
    for path in paths:
        for key, entry in _table(path)[1].items():
            if names[key]:
                check_kind(empty[names[key]].dtype, STORED[entry["dtype"]], key, path)
    state = read_all(paths, names, expected, dtype, device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def read_all(
    paths: Sequence[str | Path],
    names: dict[str, str | None],
    shapes: Mapping[str, Sequence[int]],
    dtype: torch.dtype | None,
    device: str | torch.device,
) -> dict[str, torch.Tensor]:
    """{model's name: tensor} for the files' tensors with a name in `names` (None = dropped), in one pass.

    dtype None, or the stored one, on a CPU: tensors stay mapped (nothing is read before it is used; write_bytes() never
    writes into a mapped file). Otherwise each is cast from the mapped file straight into its place, and its pages are
    let go at once, so that a file and its cast are never both in memory. So are convolutions that are to compute,
    which need another layout.
    """
    device = torch.device(device)
    state, jobs = {}, []  # jobs: (path, offset in the file, bytes, stored dtype, name)
    for path in paths:
        start, table = _table(path)
        stored = {k: STORED[entry["dtype"]] for k, entry in table.items()}
        mapped = open_file(path)
        for key, entry in table.items():
            name = names[key]
            if not name:
                continue
            # fp16 is only stored on a CPU, so it needs no layout to compute in
            as_stored = dtype is None or (dtype == stored[key] and (len(shapes[name]) != 4 or dtype == torch.float16))
            as_stored = as_stored and stored[key] not in FLOAT8  # which only a cast makes usable
            if device.type == "cpu" and as_stored:
                state[name] = mapped.get_tensor(key).reshape(shapes[name])
            else:
                first, last = entry["data_offsets"]
                jobs.append((path, start + first, last - first, stored[key], name))
    types = {name: dtype or (torch.float32 if kind in FLOAT8 else kind) for _, _, _, kind, name in jobs}
    place = _allocate([(name, shapes[name], types[name]) for *_, name in jobs], device)
    for path in paths:
        with open(path, "rb") as f, mmap.mmap(f.fileno(), 0, access=mmap.ACCESS_COPY) as region:
            for _, offset, size, kind, name in (job for job in jobs if job[0] == path and job[2]):
                source = torch.frombuffer(region, dtype=kind, count=size // kind.itemsize, offset=offset)
                place[name].copy_(source.view(place[name].shape))
                del source  # a mapping cannot be closed while a tensor looks into it
                page = offset // mmap.PAGESIZE * mmap.PAGESIZE
                if hasattr(mmap, "MADV_DONTNEED"):
                    region.madvise(mmap.MADV_DONTNEED, page, offset + size - page)
    return state | place


def _allocate(wanted, device):
    """{name: empty tensor}, convolution weights channels last: the layout in which convolutions are fastest everywhere and
    which their outputs take from them. On a CPU all in one region of huge pages, which takes a fraction of the page faults."""
    if torch.device(device).type != "cpu":
        return {
            name: torch.empty(
                shape,
                dtype=dtype,
                device=device,
                memory_format=torch.channels_last if len(shape) == 4 else torch.contiguous_format,
            )
            for name, shape, dtype in wanted
        }
    align = 64
    sizes = [-(-torch.Size(shape).numel() * dtype.itemsize // align) * align for _, shape, dtype in wanted]
    private = {"flags": mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS} if hasattr(mmap, "MAP_PRIVATE") else {}
    region = mmap.mmap(-1, max(sum(sizes), align), **private)  # private: pages can be given back (onednn.py)
    if hasattr(mmap, "MADV_HUGEPAGE"):
        with contextlib.suppress(OSError):  # a kernel without huge pages: the same, slower
            region.madvise(mmap.MADV_HUGEPAGE)
    whole, place, offset = torch.frombuffer(region, dtype=torch.uint8), {}, 0
    for (name, shape, dtype), size in zip(wanted, sizes, strict=True):
        count = torch.Size(shape).numel() * dtype.itemsize
        flat = whole[offset : offset + count].view(dtype)
        if len(shape) == 4:
            o, i, h, w = shape
            place[name] = flat.view(o, h, w, i).permute(0, 3, 1, 2)
        else:
            place[name] = flat.view(shape)
        offset += size
    return place


def _check_depth(cfg, shapes, folder):
    """A config cannot ask for more layers than its file has tensors (and so cannot make us build for ever)."""
    for name in (
        "num_hidden_layers",
        "num_layers",
        "layers_per_block",
        "transformer_layers_per_block",
        "reverse_transformer_layers_per_block",
    ):
        value = getattr(cfg, name, None) or 0
        levels = value if isinstance(value, tuple) else (value,)
        if max(max(level, default=0) if isinstance(level, tuple) else level for level in levels) > len(shapes):
            raise UserError(f"{folder}/config.json: {name} = {value}, but the file has {len(shapes)} tensors")


def save(
    model: torch.nn.Module,
    folder: str | Path,
    dtype: torch.dtype | None = None,
    state: dict[str, torch.Tensor] | None = None,
) -> None:
    """A model as a Hub component folder: config.json and one safetensors file. state: in place of its own state_dict(). Raises UserError for a
    quantized model, whose weights are codes that no reader knows, and for one beside whose weights a LoRA runs (lora.attach)."""
    folder = Path(folder)
    if state is None and any(hasattr(m, "stands_for") for m in model.modules()):
        raise UserError(f"{folder}: a quantized model cannot be saved; save it as it was before")
    if state is None and any(hasattr(m, "lora_scale") for m in model.modules()):
        raise UserError(
            f"{folder}: the model has adapters of a LoRA in training, which no reader knows; lora.trained() gives them"
        )
    hooks = [hook for m in model.modules() for hook in m._forward_hooks.values()]
    if state is None and any(hasattr(hook, "silent") and not hook.silent() for hook in hooks):
        raise UserError(
            f"{folder}: a LoRA runs beside the model's weights, which would be saved without it; fuse() it, or remove() it before"
        )
    if dtype is not None and not (isinstance(dtype, torch.dtype) and dtype.is_floating_point):
        raise UserError(f"`dtype` {dtype!r}: expected a torch dtype of floats, or None for the model's own")
    folder.mkdir(parents=True, exist_ok=True)
    raw = model.cfg.to_json() if hasattr(model.cfg, "to_json") else dict(vars(model.cfg))
    # None is left out where a reader has it by itself
    said = {k: v for k, v in raw.items() if v is not None or getattr(type(model.cfg), k, None) is not None}
    write_json(folder / "config.json", {"_class_name": model.class_name, **said})
    # transformers' and diffusers'
    stem = STEMS[1] if model.class_name.startswith(("CLIP", "T5", "ViT", "CausalLM")) else STEMS[0]
    state = {k: v.to(dtype or v.dtype) for k, v in (state or model.state_dict()).items()}
    save_tensors(folder / f"{stem}.safetensors", state)
    for older in folder.glob(f"{stem}.*.safetensors"):
        # variants of what was here: `variant` would take them in place of this file
        print(f"note: {older}: is removed, since {folder} holds other weights now", file=sys.stderr)
        older.unlink()
    index = folder / f"{stem}.safetensors.index.json"
    if index.is_file():  # of a sharded model that was here, which a reader would take in place of this file
        for part in set(read_json(index).get("weight_map", {}).values()):
            (folder / Path(part).name).unlink(missing_ok=True)
        index.unlink()
