"""safetensors <-> modules. A model is built on the meta device, every tensor read and assigned.

Loading is strict: a missing, unexpected or misshapen tensor is an error that names its nearest relatives, because
a picture also comes out of a half-loaded model — a wrong one. There is no per-model translation: modules carry
the checkpoint's names, and the few historical spellings stand in RENAMES, as data.

File format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes (https://github.com/huggingface/safetensors, README "Format").

    python -m nanodiff.weights inspect FILE             tensors of a file, from its header alone
    python -m nanodiff.weights convert IN OUT           a pickle (--allow-pickle) to safetensors;
                                                        a single-file checkpoint to a Hub folder, or a folder to a file
"""

import contextlib
import ctypes
import functools
import importlib
import json
import mmap
import os
import re
import stat
import struct
import sys
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanodiff.config import UserError, nearest, printable, read_json, tool

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
RENAMES["CLIPModel"] = [(r"^(.*\.)?position_ids$", None)]

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")
ORDER = ("BOOL", "U8", "F16", "BF16", "I32", "F32", "F64", "I64")  # of types in a file, last first
STORED = {  # names of the safetensors format
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


# ---------------------------------------------------------------------------------------------------------
# Reading


def check_file(path):
    """Raise UserError when `path` is plainly not a safetensors file, saying what it is instead."""
    try:
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(512)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a .safetensors file") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    if head.lstrip()[:1] == b"<":
        raise UserError(f"{path}: is an HTML or XML page, not the weights; the download went wrong")
    if (head[:2] == b"PK" or head[:1] == b"\x80") and head[8:].lstrip()[:1] != b"{":
        raise UserError(f"{path}: is a pickle, not safetensors; convert it with `python -m nanodiff.weights convert`")
    if size < 8:
        raise UserError(f"{path}: only {size} bytes; the download is not complete")
    (length,) = struct.unpack("<Q", head[:8])
    if length > 100_000_000:
        raise UserError(f"{path}: not a safetensors file (its header would have {length} bytes)")
    if length + 8 > size:
        raise UserError(f"{path}: truncated inside its header ({size} bytes); download it again")


def open_file(path, device="cpu"):
    """safe_open with errors that name the file and its fault. The tensors stay mapped, not read."""
    check_file(path)
    try:
        return safe_open(path, framework="pt", device=str(device))
    except SafetensorError as e:
        reason = str(e)
        if "not fully covered" in reason:
            size = os.path.getsize(path)
            with open(path, "rb") as f:
                (length,) = struct.unpack("<Q", f.read(8))
                header = json.loads(f.read(length))
            end = max((v["data_offsets"][1] for k, v in header.items() if k != "__metadata__"), default=0)
            want = 8 + length + end
            fault = "truncated" if size < want else "over-long"
            reason = f"{fault}: {size} bytes, its header promises {want}; download it again"
        raise UserError(f"{path}: {reason}") from None


def header(paths):
    """{tensor name: shape} of safetensors files, without reading a tensor."""
    shapes = {}
    for path in paths:
        f = open_file(path)
        shapes |= {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118  (not a dict)
    return shapes


def metadata(path):
    """The `__metadata__` of a safetensors file: {str: str}."""
    return dict(open_file(path).metadata() or {})


def find_files(folder, variant=None):
    """The weight files of a component folder, as a list of paths: one file, or the shards of an index.

    variant: "fp16" prefers `….fp16.safetensors`; a component without it loads the plain file, with a line.
    Raises UserError when there is none, naming a pickle if that is all there is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    for v in [variant, None] if variant else [None]:
        dot = f".{v}" if v else ""
        for stem in STEMS:
            if (single := folder / f"{stem}{dot}.safetensors").exists():
                if variant and not v:
                    print(f"{folder}: no {variant} files, taking the plain ones", file=sys.stderr)
                return [single]
            for index in (f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json"):
                if (folder / index).exists():
                    return _shards(folder / index)
    pickles = sorted(p for p in folder.iterdir() if p.suffix in PICKLES)
    if pickles:
        raise UserError(
            f"{pickles[0]}: only a pickle here, which can run code when read; "
            f"convert it with `python -m nanodiff.weights convert {pickles[0].name} OUT --allow-pickle`"
        )
    raise UserError(f"{folder}: no weights ({STEMS[0]}.safetensors or {STEMS[1]}.safetensors)")


def _shards(index):
    """Paths of a sharded checkpoint; every name is checked before anything is opened."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for name in set(weight_map.values()):
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]+\.safetensors", name) or name.startswith("."):
            raise UserError(f"{index}: {name!r} is not a plain file name")
        if not (index.parent / name).exists():
            raise UserError(f"{index}: names the shard {name}, which is missing; download it")
    found = {}
    for name in sorted(set(weight_map.values())):
        for key in header([index.parent / name]):
            if key in found:
                raise UserError(f"{index}: tensor {key} is in two shards, {found[key]} and {name}")
            found[key] = name
    for key in {*weight_map, *found}:
        if weight_map.get(key) != found.get(key):
            raise UserError(f"{index}: tensor {key} is in {found.get(key)}, the index says {weight_map.get(key)}")
    return [index.parent / name for name in sorted(set(weight_map.values()))]


def renamed(key, class_name):
    """The name under which `class_name` knows a tensor of a file; None when it is to be dropped."""
    for pattern, replacement in RENAMES.get(class_name, ()):
        if re.search(pattern, key):
            if replacement is None:
                return None
            key = re.sub(pattern, replacement, key)
    return key


def check_names(expected, found, where):
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


def skeleton(cls, cfg):
    """The module without weights: on the meta device, built in no time."""
    with torch.device("meta"), WithoutInit():
        return cls(cfg)


def load(cls, folder, dtype=None, device="cpu", variant=None, cfg=None, without=()):
    """The model `cls` of a Hub component folder (config.json + weights), in eval mode.

    dtype: torch dtype, None keeps the stored one. without: parts of the file that are not wanted, by the first word of their
    names. Each tensor goes from the file straight to its final type and device.
    """
    folder = Path(folder)
    if torch.device(device).type == "cpu":
        keep_freed_memory()
    cfg = cfg or cls.Config.from_json(read_json(folder / "config.json"), str(folder / "config.json"))
    paths = find_files(folder, variant)
    shapes = header(paths)
    _check_depth(cfg, shapes, folder)
    model = skeleton(cls, cfg)
    expected = {k: tuple(v.shape) for k, v in model.state_dict().items()}
    names = {k: None if k.split(".")[0] in without else renamed(k, model.class_name) for k in shapes}
    check_names(expected, {v: shapes[k] for k, v in names.items() if v}, folder)
    state = read_all(paths, names, expected, dtype, device)
    model.load_state_dict(state, strict=True, assign=True)
    return model.eval().requires_grad_(False)


def read_all(paths, names, shapes, dtype, device):
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
            if device.type == "cpu" and as_stored:
                state[name] = mapped.get_tensor(key).reshape(shapes[name])
            else:
                first, last = entry["data_offsets"]
                jobs.append((path, start + first, last - first, stored[key], name))
    place = _allocate([(name, shapes[name], dtype or kind) for _, _, _, kind, name in jobs], device)
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


def _table(path):
    """(offset of the first tensor byte, {key: {dtype, shape, data_offsets}}) of a file that open_file() accepted."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        table = json.loads(f.read(length))
    table.pop("__metadata__", None)
    for key, entry in table.items():
        if entry["dtype"] not in STORED:
            raise UserError(f"{path}: {printable(key)} is stored as {entry['dtype']}, which is not supported")
    return 8 + length, table


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


@functools.cache
def keep_freed_memory():
    """Ask glibc to keep freed memory up to 32 MB a piece instead of returning it to the system after every tensor:
    returning it costs a page fault per 4 kB at the next one (5 % of a UNet step on a CPU). Other C libraries: nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL(None).mallopt
        for option, value in ((-1, (1 << 31) - 1), (-2, 64 << 20), (-3, 32 << 20)):  # trim, top pad, mmap threshold
            mallopt(option, value)


def _check_depth(cfg, shapes, folder):
    """A config cannot ask for more layers than its file has tensors (and so cannot make us build for ever)."""
    for name in ("num_hidden_layers", "num_layers", "layers_per_block", "transformer_layers_per_block"):
        value = getattr(cfg, name, 0)
        if max(value if isinstance(value, tuple) else (value,)) > len(shapes):
            raise UserError(f"{folder}/config.json: {name} = {value}, but the file has {len(shapes)} tensors")


def load_pickle(path, inside="state_dict"):
    """Tensors of a .ckpt/.pt/.bin file: {name: tensor}. Only ever with weights_only, and without a fallback.

    inside: the key under which the tensors may be nested.
    """
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        raise UserError("reading pickles needs torch >= 2.10 (CVE-2026-24747)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # UnpicklingError, EOFError, RuntimeError or OSError, by where the file is torn
        raise UserError(f"{path}: not readable with weights_only: {str(e).splitlines()[0]}") from None
    while isinstance(state, dict) and isinstance(state.get(inside), dict):
        state = state[inside]
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


# ---------------------------------------------------------------------------------------------------------
# Writing


def write_bytes(path, data):
    """Write a file of these bytes. See write_file()."""
    write_file(path, lambda f: f.write(data))


def write_file(path, write):
    """write(f) a file so that a reader sees the old one or the new one, never half of it; mode by umask.

    Temporary file, fsync, rename. A destination that exists and is no regular file (a device, a folder) is refused.
    """
    path = Path(path)
    if path.exists() and not stat.S_ISREG(path.resolve().stat().st_mode):
        raise UserError(f"{path}: is not a regular file, not overwritten")
    path = path.resolve()  # a link to a file stays a link
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace"))


def save_tensors(path, tensors, metadata=None):
    """{name: tensor} -> a safetensors file, the bytes that safetensors' own writer makes (metadata sorted), but tensor by tensor, so that the
    file is never in memory as a whole. The new file replaces the old one, so a mapped file stays intact."""
    kinds = {dtype: name for name, dtype in STORED.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise UserError(f"{path}: {printable(name)}: tensors of {tensor.dtype} are not written")
    order = sorted(tensors, key=lambda k: (-ORDER.index(kinds[tensors[k].dtype]), k))
    header, end = {"__metadata__": dict(sorted(({"format": "pt"} | (metadata or {})).items()))}, 0
    for name in order:
        start, end = end, end + tensors[name].numel() * tensors[name].element_size()
        header[name] = {
            "dtype": kinds[tensors[name].dtype],
            "shape": list(tensors[name].shape),
            "data_offsets": [start, end],
        }
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)

    def write(f):
        f.write(struct.pack("<Q", len(text)) + text)
        for name in order:
            flat = tensors[name].detach().to("cpu").contiguous().reshape(-1)
            if flat.numel():
                f.write(flat.view(torch.uint8).numpy().data)

    write_file(path, write)


def load_tensors(path):
    """{name: tensor} of a safetensors file, in memory (the file may be replaced afterwards)."""
    f = open_file(path)
    return {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118


def save(model, folder, dtype=None, state=None):
    """A model as a Hub component folder: config.json and one safetensors file. state: in place of its own state_dict()."""
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    raw = model.cfg.to_json() if hasattr(model.cfg, "to_json") else dict(vars(model.cfg))
    write_json(
        folder / "config.json", {"_class_name": model.class_name, **{k: v for k, v in raw.items() if v is not None}}
    )
    stem = (
        STEMS[1] if model.class_name.startswith(("CLIP", "T5", "ViT", "CausalLM")) else STEMS[0]
    )  # transformers' and diffusers'
    state = {k: v.to(dtype or v.dtype) for k, v in (state or model.state_dict()).items()}
    save_tensors(folder / f"{stem}.safetensors", state)


# ---------------------------------------------------------------------------------------------------------
# Tool


def inspect(path):
    """Print name and shape of every tensor of a file, or of a component folder, from the headers alone."""
    path = Path(path)
    for key, shape in header([path] if path.is_file() else find_files(path)).items():
        print(printable(key), list(shape))


def convert(source, target, allow_pickle=False, components=None, prediction_type=None):
    """A pickle of tensors to a safetensors file; a single-file checkpoint to a Hub folder or back.

    Raises UserError without allow_pickle: reading a pickle can run code.
    """
    if Path(source).is_dir() or Path(target).suffix != ".safetensors":
        # Whole models are the pipeline's business; this tool is only where people look for it.
        pipeline = importlib.import_module("nanodiff.pipeline")
        return pipeline.convert(source, target, allow_pickle, components, prediction_type)
    if Path(source).suffix not in PICKLES:
        raise UserError(f"{source}: expected a pickle ({', '.join(PICKLES)})")
    if not allow_pickle:
        raise UserError(f"{source}: reading a pickle can run code; if you trust it, add --allow-pickle")
    tensors = load_pickle(source)
    save_tensors(target, {k: v.clone() for k, v in tensors.items()})
    print(f"{target}: {len(tensors)} tensors")


def main():
    import argparse

    parser = argparse.ArgumentParser(prog="python -m nanodiff.weights", description=__doc__.split("\n\n")[0])
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("inspect", help="list the tensors of a file or component folder")
    one.add_argument("path")
    two = commands.add_parser("convert", help="pickle to safetensors; single file to Hub folder, and back")
    two.add_argument("source")
    two.add_argument("target")
    two.add_argument("--allow-pickle", action="store_true", help="read a pickle, with weights_only")
    two.add_argument("--components", help="folder for what a single file lacks")
    two.add_argument("--prediction-type", choices=("epsilon", "v_prediction", "sample"), help="of a single file")
    args = parser.parse_args()
    if args.command == "inspect":
        return tool(lambda: inspect(args.path))
    more = args.allow_pickle, args.components, args.prediction_type
    return tool(lambda: convert(args.source, args.target, *more))


if __name__ == "__main__":
    sys.exit(main())
