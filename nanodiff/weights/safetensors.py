"""safetensors files: read with suspicion, written whole.

File format: 8 bytes little-endian header length, a JSON header {name: {dtype, shape, data_offsets}}, then the
tensors' bytes (https://github.com/huggingface/safetensors, README "Format").
"""

import hashlib
import json
import os
import re
import struct
import sys
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open

from nanodiff.config import UserError, check_regular, printable, read_json, short
from nanodiff.files import write_file

STEMS = ("diffusion_pytorch_model", "model")
PICKLES = (".bin", ".ckpt", ".pt", ".pth")


def is_pickle(path: str | Path) -> bool:
    """Is it one by its suffix, in capitals or not?"""
    return Path(path).suffix.lower() in PICKLES


FLOAT8 = (torch.float8_e4m3fn, torch.float8_e5m2)
# of types in a file, last first
ORDER = ("BOOL", "U8", "I8", "F8_E5M2", "F8_E4M3", "F16", "BF16", "I32", "F32", "F64", "I64")
STORED = {  # names of the safetensors format
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def check_file(path: str | Path) -> None:
    """Raise UserError when `path` is plainly not a safetensors file, saying what it is instead."""
    try:
        check_regular(path)
        with open(path, "rb") as f:
            size = os.fstat(f.fileno()).st_size
            head = f.read(512)
    except IsADirectoryError:
        raise UserError(f"{path}: is a folder, expected a .safetensors file") from None
    except OSError as e:
        raise UserError(f"{path}: {e.strerror}") from None
    if head.startswith(b"version https://git-lfs"):
        raise UserError(f"{path}: is a Git LFS pointer, not the weights; run `git lfs pull` in its repository")
    header = head[8:].lstrip()[:1] == b"{"  # whatever its length's bytes, in front of it, look like
    if head.lstrip()[:1] == b"<" and not header:
        raise UserError(f"{path}: is an HTML or XML page, not the weights; the download went wrong")
    if (head[:2] == b"PK" or head[:1] == b"\x80") and not header:
        raise UserError(f"{path}: is a pickle, not safetensors; convert it with `python -m nanodiff.weights convert`")
    if head[:4] == b"GGUF":
        raise UserError(
            f"{path}: is GGUF, quantized for other programs, which is not read here; take the model's safetensors"
        )
    if size < 8:
        raise UserError(f"{path}: only {size} bytes; the download is not complete")
    (length,) = struct.unpack("<Q", head[:8])
    if length > 100_000_000:
        raise UserError(f"{path}: not a safetensors file (its header would have {length} bytes)")
    if length + 8 > size:
        raise UserError(f"{path}: truncated inside its header ({size} bytes); download it again")


def open_file(path: str | Path, device: str | torch.device = "cpu") -> safe_open:
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


def header(paths: Iterable[str | Path]) -> dict[str, tuple[int, ...]]:
    """{tensor name: shape} of safetensors files, without reading a tensor."""
    shapes = {}
    for path in paths:
        f = open_file(path)
        shapes |= {k: tuple(f.get_slice(k).get_shape()) for k in f.keys()}  # noqa: SIM118  (not a dict)
    return shapes


def metadata(path: str | Path) -> dict[str, str]:
    """The `__metadata__` of a safetensors file: {str: str}."""
    return dict(open_file(path).metadata() or {})


def find_files(folder: str | Path, variant: str | None = None) -> list[Path]:
    """The weight files of a component folder, as a list of paths: one file, or the shards of an index.

    variant: "fp16" prefers `….fp16.safetensors`; a component without it loads the plain file, with a line, and one that has
    nothing but a variant loads that, with a line. Raises UserError when there is none, naming a pickle if that is all there is.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UserError(f"{folder}: no such folder")
    there = variants(p.name for p in folder.iterdir())
    if variant not in there and None not in there and there:
        if len(there) > 1:
            raise UserError(f"{folder}: only the variants {', '.join(sorted(there))}; choose one with `variant`")
        (only,) = there
        print(f"note: {folder}: only {only} files, taking these", file=sys.stderr)
        variant = only
    for v in [variant, None] if variant else [None]:
        dot = f".{v}" if v else ""
        for stem in STEMS:
            single = folder / f"{stem}{dot}.safetensors"
            names = (f"{stem}.safetensors.index{dot}.json", f"{stem}.safetensors{dot}.index.json")
            index = next((folder / n for n in names if (folder / n).exists()), None)
            # of both, diffusers takes the index, transformers (whose files are model.*) the single file
            if single.exists() and (index is None or stem == "model"):
                if variant and not v:
                    print(f"{folder}: no {variant} files, taking the plain ones", file=sys.stderr)
                return [single]
            if index is not None:
                if single.exists():
                    print(
                        f"note: {folder}: {single.name} is not used, since {index.name} names shards", file=sys.stderr
                    )
                return _shards(index)
    pickles = sorted(p for p in folder.iterdir() if is_pickle(p))
    if pickles:
        raise UserError(
            f"{pickles[0]}: only a pickle here, which can run code when read; convert it by: "
            f"python -m nanodiff.weights convert {pickles[0]} {pickles[0].with_suffix('.safetensors')} --allow-pickle"
        )
    raise UserError(f"{folder}: no weights ({STEMS[0]}.safetensors or {STEMS[1]}.safetensors)")


def variants(names):
    """The variants of which a component's file names hold weights (or their index), None for the plain ones, as a set."""
    patterns = (rf"({'|'.join(STEMS)})(?:\.(?P<v>\w+))?(-\d{{5}}-of-\d{{5}})?\.safetensors",
                rf"({'|'.join(STEMS)})-\d{{5}}-of-\d{{5}}\.(?P<v>\w+)\.safetensors",
                rf"({'|'.join(STEMS)})\.safetensors\.index(?:\.(?P<v>\w+))?\.json",
                rf"({'|'.join(STEMS)})\.safetensors\.(?P<v>\w+)\.index\.json")  # fmt: skip
    found = (re.fullmatch(pattern, name) for name in names for pattern in patterns)
    return {match["v"] for match in found if match}


def _shards(index):
    """Paths of a sharded checkpoint; every name is checked before anything is opened."""
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise UserError(f"{index}: has no weight_map")
    for name in weight_map.values():
        if not isinstance(name, str) or not re.fullmatch(r"[\w.-]{1,200}\.safetensors", name) or name.startswith("."):
            raise UserError(f"{index}: {short(name)} is not a plain file name")
    for name in sorted(set(weight_map.values())):
        if not (index.parent / name).exists():
            raise UserError(f"{index}: names the shard {name}, which is missing; download it")
        _check_inside(index, name)
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


def _check_inside(index, name):
    """Raise UserError for a shard that is a link out of the model's folder; the Hub's cache keeps its files in `blobs` beside `snapshots`."""
    real, folder = (index.parent / name).resolve(), index.parent.absolute()
    blobs = real.parent.name == "blobs" and real.parent.parent in [p.resolve() for p in folder.parents]
    beside = index.parent.resolve() == real.parent  # the component's folder may be a link itself
    if not blobs and not beside and folder.parent.resolve() not in real.parents:
        raise UserError(f"{index}: the shard {name} is a link out of the model's folder, to {printable(real)}")


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


def tensor_hash(path: str | Path) -> str:
    """The SHA-256 of a file's tensors, whatever its metadata say: what A1111 and Civitai call AutoV3, and kohya sshs_model_hash."""
    with open(path, "rb") as f:
        (length,) = struct.unpack("<Q", f.read(8))
        f.seek(8 + length)
        return hashlib.file_digest(f, "sha256").hexdigest()


def model_hash(path: str | Path, digits: int = 10) -> str:
    """A1111's "Model hash" of a file: ten digits of its SHA-256 (Civitai's AutoV2); eight digits, as before 2023, of that of 64 kB from the first
    megabyte on."""
    with open(path, "rb") as f:
        if digits == 8:
            f.seek(1 << 20)
            return hashlib.sha256(f.read(1 << 16)).hexdigest()[:8]
        return hashlib.file_digest(f, "sha256").hexdigest()[:10]


def check_kind(wanted, stored, key, path):
    """Raise UserError where numbers of one kind (floating-point, or whole) stand for those of the other: a quantized file, or a header that
    calls its data what they are not, would be taken for weights. wanted, stored: torch dtypes."""
    if wanted.is_floating_point != stored.is_floating_point:
        kind, what = str(stored).removeprefix("torch."), "weights" if wanted.is_floating_point else "whole numbers"
        hint = " (a quantized file?)" if wanted.is_floating_point else ""
        raise UserError(f"{path}: {printable(key)} is stored as {kind}, which cannot be {what}{hint}")


def as_weight(tensor: torch.Tensor, key: str, path: str | Path) -> torch.Tensor:
    """A tensor of a file as a weight: 8-bit floating-point numbers as fp32, as nothing computes with them; whole numbers are refused, but for
    a single one (a counter, an alpha). Raises UserError naming file, tensor and type."""
    if tensor.numel() != 1:
        check_kind(torch.float32, tensor.dtype, key, path)
    return tensor.float() if tensor.dtype in FLOAT8 else tensor


def as_weights(tensors: dict[str, torch.Tensor], path: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a file of weights, each by as_weight()."""
    return {key: as_weight(tensor, key, path) for key, tensor in tensors.items()}


def load_pickle(path: str | Path, inside: str = "state_dict", nested: bool = False) -> dict[str, torch.Tensor]:
    """Tensors of a .ckpt/.pt/.bin file: {name: tensor}. Only ever with weights_only, and without a fallback.

    inside: the key under which the tensors may be nested. nested: dicts and lists in it are parts, whose names stand before those of their
    tensors; otherwise only tensors that stand there by themselves are read.
    """
    if tuple(int(x) for x in torch.__version__.split(".")[:2]) < (2, 10):
        raise UserError("reading pickles needs torch >= 2.10 (CVE-2026-24747)")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as e:  # UnpicklingError, EOFError, RuntimeError or OSError, by where the file is torn
        strange, cause = re.search(r"GLOBAL ([\w.]+)", str(e)), re.search(r"WeightsUnpickler error: (.*)", str(e))
        why = f"it holds a {strange[1]}" if strange else cause[1] if cause else str(e).splitlines()[0]
        raise UserError(f"{path}: not readable with weights_only: {why}") from None
    while isinstance(state, dict) and isinstance(state.get(inside), dict):
        state = state[inside]
    if nested:
        found = list(_flat(state, ""))
        state = dict(found)
        if len(state) < len(found):
            raise UserError(f"{path}: two of its tensors would have one name")
    tensors = {k: v for k, v in state.items() if isinstance(v, torch.Tensor)} if isinstance(state, dict) else {}
    if not tensors:
        raise UserError(f"{path}: holds no tensors")
    return tensors


def _flat(value, name):
    """(joined name, value) of everything in nested dicts and lists."""
    parts = value.items() if isinstance(value, dict) else enumerate(value) if isinstance(value, list | tuple) else None
    if parts is None:
        yield name, value
        return
    for key, part in parts:
        yield from _flat(part, f"{name}.{key}" if name else str(key))


def opened(
    path: Path, allow_pickle: bool = False, nested: bool = False
) -> tuple[dict[str, tuple[int, ...]], Callable[[str], torch.Tensor]]:
    """({name: shape}, name -> tensor) of a file, of a pickle only where that is allowed. nested: see load_pickle(). Raises UserError."""
    if not is_pickle(path):
        return header([path]), open_file(path).get_tensor
    if not allow_pickle:
        raise UserError(f"{path}: reading a pickle can run code; if you trust it, add `allow_pickle`")
    state = load_pickle(path, nested=nested)
    return {k: tuple(v.shape) for k, v in state.items()}, state.__getitem__


def save_tensors(path: str | Path, tensors: dict[str, torch.Tensor], metadata: dict[str, str] | None = None) -> None:
    """{name: tensor} -> a safetensors file, the bytes that safetensors' own writer makes (metadata sorted), but tensor by tensor, so that the
    file is never in memory as a whole. The new file replaces the old one, so a mapped file stays intact."""
    kinds = {dtype: name for name, dtype in STORED.items()}
    for name, tensor in tensors.items():
        if tensor.dtype not in kinds:
            raise UserError(f"{path}: {printable(name)}: tensors of {tensor.dtype} are not written")
        if tensor.layout != torch.strided or tensor.is_meta:
            what = "without numbers (meta)" if tensor.is_meta else f"of the layout {tensor.layout}"
            raise UserError(f"{path}: {printable(name)}: tensors {what} are not written")
    if strange := [k for k, v in (metadata or {}).items() if not isinstance(v, str)]:
        raise UserError(f"{path}: metadata {printable(strange[0])} is no text, which is all that a header can hold")
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


def load_weights(path: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a safetensors file of weights, in memory. See as_weights()."""
    return as_weights(load_tensors(path), path)


def load_tensors(path: str | Path) -> dict[str, torch.Tensor]:
    """{name: tensor} of a safetensors file, in memory (the file may be replaced afterwards)."""
    f = open_file(path)
    return {k: f.get_tensor(k).clone() for k in f.keys()}  # noqa: SIM118
