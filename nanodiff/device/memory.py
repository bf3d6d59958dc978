"""Where weights are, and how much memory a run takes.

`Resident` keeps a model's weights at home in host memory, in the type of their file, and brings them to the computing
device and type only while they work: the whole model (`--offload model`) or one block at a time, the next one
already on its way on a second stream (`--offload sequential`). On a CPU the home is the mapped file, so what is not
at work takes memory that the system may reclaim.

`plan` predicts the memory of a run on the meta device, without any weights: bytes of parameters counted, activations by
running each model on shapes alone and following when every tensor is born and dies.
"""

import contextlib
import ctypes
import functools
import mmap
import weakref
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from nanodiff import system
from nanodiff.device import derived

OFFLOADS = ("none", "model", "sequential")  # models on the device: all, one at a time, block by block
# Blocks that move one at a time, by class name: the repeated parts of the UNet, MMDiT, T5, CLIP.
BLOCKS = {"ResnetBlock", "TransformerBlock", "Downsample", "Upsample", "JointBlock", "ImageBlock", "Block", "Layer"}
EXACT = {"absmax"}  # buffers that keep their type: the scales of quantized weights


def count(module):
    """Parameters of a model, quantized ones counted as what they stand for."""
    return sum(p.numel() for p in module.parameters()) + sum(getattr(m, "stands_for", 0) for m in module.modules())


def device_of(module):
    """Where a model computes."""
    return module.resident.device if hasattr(module, "resident") else next(module.parameters()).device


def dtype_of(module):
    """The type in which a model computes."""
    if hasattr(module, "resident"):
        return module.resident.dtype
    return next(p.dtype for p in module.parameters() if p.is_floating_point())


def whole(module):
    """Are all of a model's weights there at once (not moved block by block)?"""
    return not (hasattr(module, "resident") and module.resident.blocks) and not hasattr(module, "reshard")  # FSDP's


@contextlib.contextmanager
def at_work(module, dtype=None):
    """Inside, the model's weights are on its device; `dtype` other than its own: in that type."""
    if module is None:
        yield
    elif hasattr(module, "resident"):
        module.resident.enter(dtype)
        try:
            yield
        finally:
            module.resident.leave()
    else:
        own = dtype_of(module)
        if dtype not in (None, own):
            module.to(dtype)
        try:
            yield
        finally:
            if dtype not in (None, own):
                module.to(own)


class Resident:
    """Moves the weights of `module`, which is given with its weights in host memory. See the module docstring.

    Attributes: device and dtype in which it computes; blocks: one block at a time.
    """

    def __init__(self, module, dtype, device, blocks=False):
        self.module, self.dtype, self.device = module, dtype, torch.device(device)
        self.inside, self.working = 0, dtype
        units = [m for m in module.modules() if type(m).__name__ in BLOCKS] if blocks else []
        self.blocks = bool(units)
        taken = {id(t) for u in units for t in _slots(u).values()}
        self.rest = {k: t for k, t in _slots(module).items() if id(t) not in taken}
        self.units = {id(u): _slots(u) for u in units}
        self.home = {}  # id of a tensor that is away: what it was at home
        self.order, self.coming, self.done = [], {}, []
        self.stream = torch.cuda.Stream(self.device) if self.device.type == "cuda" else None
        for u in units:
            u.register_forward_pre_hook(self._before)
            u.register_forward_hook(self._after)
        if self.stream is not None:
            for u in self.units.values():
                _pin(u)
        derived.keep_none(module)  # it would stay where the weights leave
        module.resident = self

    def __reduce_ex__(self, protocol):
        if self.blocks:
            raise TypeError(
                "a model with `offload` sequential cannot be copied or pickled: its hooks are the original's; load it again"
            )
        return super().__reduce_ex__(protocol)

    def enter(self, dtype=None):
        self.inside += 1
        if self.inside == 1:
            self.working = dtype or self.dtype
            self._come(self.rest)

    def leave(self):
        self.inside -= 1
        if self.inside == 0:
            self.coming.clear()
            self._go(self.rest)

    def _target(self, key, home):
        """The tensor as it computes. Integers (codes) and scales keep their type."""
        keep = not home.is_floating_point() or key.rpartition(".")[2] in EXACT
        dtype = home.dtype if keep else self.working
        if self.stream is not None:  # cast there: a cast on the way would wait for the host
            home = home.to(self.device, non_blocking=True)
        return home.to(dtype, memory_format=torch.channels_last) if home.dim() == 4 else home.to(dtype)

    def _come(self, slots, ready=None):
        for key, tensor in slots.items():
            if id(tensor) not in self.home:
                self.home[id(tensor)] = tensor.data
                tensor.data = ready[key] if ready else self._target(key, tensor.data)

    def _go(self, slots):
        for tensor in slots.values():
            if id(tensor) in self.home:
                tensor.data = self.home.pop(id(tensor))
        let_go([tensor.data for tensor in slots.values()])

    def _before(self, block, args):
        self._arrive(id(block))

    def _after(self, block, args, out):
        self._depart(id(block))

    def _depart(self, unit):
        """Send a block home. Its device memory may be used again when the device has passed it."""
        self._go(self.units[unit])
        if self.stream is not None:
            self.done = [*self.done[-1:], torch.cuda.current_stream(self.device).record_event()]

    def _arrive(self, unit):
        """Bring a block in before it runs, and start the copy of the one that ran after it in the pass before."""
        ready = self.coming.pop(unit, None)
        if ready is not None:
            torch.cuda.current_stream(self.device).wait_stream(self.stream)
            for tensor in ready.values():
                tensor.record_stream(torch.cuda.current_stream(self.device))
        self._come(self.units[unit], ready)
        if self.stream is None:
            return
        following = None
        if unit in self.order:
            i = self.order.index(unit)
            following = self.order[(i + 1) % len(self.order)]
        else:
            self.order.append(unit)
        if following is not None and following not in self.coming and following != unit:
            if len(self.done) == 2:  # the host must not run ahead: no more than two blocks are ever on the device
                self.done[0].synchronize()
            self.stream.wait_stream(torch.cuda.current_stream(self.device))
            with torch.cuda.stream(self.stream):
                slots = self.units[following]
                away = {k: self.home.get(id(t), t.data) for k, t in slots.items()}
                self.coming[following] = {k: self._target(k, home) for k, home in away.items()}


def _pin(slots):
    """Move a block's home into one pinned piece of host memory, the only kind that is copied beside the computation (one
    piece, because the allocator rounds each up to a power of two)."""
    sizes = {k: -(-t.numel() * t.element_size() // 64) * 64 for k, t in slots.items()}
    flat, offset = torch.empty(sum(sizes.values()), dtype=torch.uint8, pin_memory=True), 0
    for key, tensor in slots.items():
        place = flat[offset : offset + tensor.numel() * tensor.element_size()].view(tensor.dtype)
        if tensor.dim() == 4:
            # convolution weights, channels last: here once, so that it need not be done at each arrival
            o, i, h, w = tensor.shape
            place = place.view(o, h, w, i).permute(0, 3, 1, 2)
        tensor.data = place.view(tensor.shape).copy_(tensor.data)
        offset += sizes[key]


def let_go(tensors):
    """Tell the system that the pages of mapped files under these tensors are not needed for now: they are read again
    when they are. Memory that is not a file's is left alone. Linux; elsewhere nothing."""
    if not hasattr(mmap, "MADV_DONTNEED") or not Path("/proc/self/maps").exists():
        return
    mapped = []  # (start, end) of the mappings of safetensors files; in the Hub's cache those are called blobs/HASH
    for line in Path("/proc/self/maps").read_text(encoding="utf-8").splitlines():
        if line.endswith(".safetensors") or "/blobs/" in line:
            first, _, last = line.split()[0].partition("-")
            mapped.append((int(first, 16), int(last, 16)))
    madvise, page = system.libc().madvise, mmap.PAGESIZE
    for tensor in tensors:
        if tensor.device.type != "cpu" or not tensor.is_contiguous():
            continue
        start = -(-tensor.data_ptr() // page) * page  # whole pages inside the tensor only
        end = (tensor.data_ptr() + tensor.numel() * tensor.element_size()) // page * page
        if end > start and any(a <= start and end <= b for a, b in mapped):
            madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)


def _slots(module):
    """{name: parameter or buffer} of a module."""
    return dict(module.named_parameters()) | dict(module.named_buffers())


# ---------------------------------------------------------------------------------------------------------
# Prediction


class _Fused(TorchFunctionMode):
    """On the meta device attention would fall back to its textbook form, whose score matrix no real backend keeps."""

    def __torch_function__(self, func, types, args=(), kwargs=None):
        if func is F.scaled_dot_product_attention:
            return torch.empty_like(args[0])
        return func(*args, **(kwargs or {}))


class _Alive(TorchDispatchMode):
    """Follows the bytes of all tensors made inside: `peak` is the most that were alive at once. Those of `module`, of
    which a linear layer makes transposed views, are not counted."""

    def __init__(self, module):
        super().__init__()
        self.now = self.peak = 0
        self.seen = {t.untyped_storage()._cdata for t in _slots(module).values()}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for t in out if isinstance(out, tuple | list) else (out,):
            if isinstance(t, torch.Tensor):
                storage = t.untyped_storage()
                if storage._cdata not in self.seen:
                    self.seen.add(storage._cdata)
                    self.now += storage.nbytes()
                    self.peak = max(self.peak, self.now)
                    weakref.finalize(storage, self._died, storage._cdata, storage.nbytes())
        return out

    def _died(self, key, size):
        self.seen.discard(key)
        self.now -= size


def activations(module, run):
    """The most bytes of inputs and intermediate results that run(), a forward pass of `module`, keeps alive."""
    alive = _Alive(module)
    with torch.no_grad(), _Fused(), alive:
        run()
    return alive.peak


class Stage(NamedTuple):
    """What one model takes while it works, in bytes."""

    name: str
    parameters: int
    weights: float
    block: float  # the largest block
    outside: float  # what is outside blocks
    activations: float
    beside: tuple = ()  # the Stages of models that are at work with it, one after the other


def stage(name, model, run, dtype, sizes):
    """A Stage of a model on the meta device. run(): its forward pass there. sizes: see weight_bytes()."""
    total, block, outside = weight_bytes(model, dtype, sizes)
    return Stage(name, count(model), total, block, outside, activations(model, run))


def peaks(stages):
    """{offload mode: bytes on the device at the worst moment}"""

    def whole(s):
        return s.weights

    def in_blocks(s):
        return min(s.outside + 2 * s.block if s.block else s.weights, s.weights)

    def worst(size):
        return max(sum(map(size, (s, *s.beside))) + s.activations for s in stages)

    everything = sum(s.weights for s in stages)
    return {
        "none": everything + max(s.activations for s in stages),
        "model": worst(whole),
        "sequential": worst(in_blocks),
    }


def table(stages, offload):
    """Lines for people: a row a model, then the peak under each offload mode (* is the one asked for)."""
    lines = [f"{'':16}{'parameters':>13}{'weights':>12}{'largest block':>15}{'activations':>13}"]
    for s in stages:
        sizes = f"{s.weights / 1e9:9.2f} GB{s.block / 1e9:12.2f} GB{s.activations / 1e9:10.2f} GB"
        lines.append(f"{s.name:16}{s.parameters / 1e6:11.1f} M{sizes}")
    for mode, size in peaks(stages).items():
        lines.append(f"peak with --offload {mode + ':':12}{size / 1e9:7.2f} GB{' *' if mode == offload else ''}")
    return lines


def weight_bytes(module, dtype, sizes):
    """(all bytes, bytes of the largest block, bytes outside blocks) of a model on the meta device in `dtype`.

    sizes: {id of a parameter: bytes} for those that are kept in another form (quantize.sizes).
    """
    itemsize = dtype.itemsize
    blocks = [m for m in module.modules() if type(m).__name__ in BLOCKS]

    def size(part):
        return sum(sizes.get(id(p), p.numel() * itemsize) for p in _slots(part).values())

    inside = [size(b) for b in blocks]
    return size(module), max(inside, default=0), size(module) - sum(inside)


@functools.cache
def keep_freed_memory():
    """Ask glibc to keep freed memory up to 32 MB a piece instead of returning it to the system after every tensor:
    returning it costs a page fault per 4 kB at the next one (5 % of a UNet step on a CPU). Other C libraries: nothing."""
    with contextlib.suppress(OSError, AttributeError):
        mallopt = system.libc().mallopt
        for option, value in ((-1, (1 << 31) - 1), (-2, 64 << 20), (-3, 32 << 20)):  # trim, top pad, mmap threshold
            mallopt(option, value)
