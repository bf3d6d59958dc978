"""How the layers of a model compute on a CPU: by oneDNN, with weights in its own layout where that pays.

PyTorch hands oneDNN plain weights, and oneDNN reorders them at every call of a layer; with a 3×3 convolution of 1280
channels on an 8×8 picture that takes twice as long as the convolution. A packed layer does it once (a convolution at its first
call, when the size of its input, on which the layout depends, is known), and gives the plain weight back to the system. That
costs seconds for a large UNet, so it pays from about four steps on. And PyTorch multiplies fp32 matrices by MKL, which is
half as fast as oneDNN on an AMD and no faster on an Intel, so here it is oneDNN. The two differ in the last bits of a sum:
which one it is may never hang on a measurement, so that the same command gives the same bytes at every start.

A processor without an instruction for bf16 multiplies a bf16 matrix one row of x at a time, so that 200 rows take 200 times as
long as one. A wide layer brings its weight to fp32 a few rows at a time, which stay in the cache, and multiplies there: as exact
as fp32, with the memory of bf16.

These are the operators that torch.compile uses on a CPU (torch._inductor's mkldnn passes). They are private to PyTorch,
so `unusable()` tries them on small layers first and gives the reason when they cannot be had. They have no gradient: where
one is wanted a direct layer takes PyTorch's way, and a packed one, which has no plain weight left, says so.
"""

import ctypes
import functools
import mmap
import os
import platform
import sys
from collections import Counter
from pathlib import Path

import torch
from torch import nn

from nanodiff import system

EIGHT_BITS = ("avx512_vnni", "avx_vnni", "amx_int8")  # instructions that multiply 8-bit numbers (int8.py)
FEWEST_STEPS = 4  # of a run for which packing pays
LEAST = 1 << 14  # weights of a layer below which nothing is gained
FEW_ROWS = 6  # of x, below which PyTorch's way is as fast as a wide layer's
PIECE = 1 << 20  # weights that are in fp32 at a time: 4 MB


@functools.cache
def computes_bf16():
    """Whether this CPU multiplies bf16 in hardware (AVX512_BF16 or AMX)."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


@functools.cache
def cpuinfo():
    """{field: value} of the first processor in /proc/cpuinfo; empty where there is none (macOS, Windows)."""
    try:
        first = Path("/proc/cpuinfo").read_text(encoding="utf-8").split("\n\n")[0]
    except OSError:
        return {}
    return {k.strip(): v.strip() for k, _, v in (line.partition(":") for line in first.splitlines())}


@functools.cache
def learns_by_onednn():
    """Whether learn() changes anything: by a table, never a measurement. On an AMD MKL takes 1.6 to 2.6 times as long."""
    vendor = cpuinfo().get("vendor_id") or platform.processor()
    return "AuthenticAMD" in vendor and unusable(torch.float32) is None


def processor():
    """What the bytes of a CPU's results depend on, for run.json: its name, instructions, threads, and what multiplies in fp32 linear layers,
    in inference and in training."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    instructions = [
        torch.backends.cpu.get_cpu_capability(),
        *(k for k in ("avx512_bf16", "amx_bf16", "amx_fp16", *EIGHT_BITS) if known.get(k)),
    ]
    limits = [
        f"{k}={os.environ[k]}"
        for k in ("ATEN_CPU_CAPABILITY", "ONEDNN_MAX_CPU_ISA", "MKL_ENABLE_INSTRUCTIONS")
        if k in os.environ
    ]
    name = cpuinfo().get("model name") or platform.processor() or platform.machine()
    products = "PyTorch" if unusable(torch.float32) else "oneDNN"
    return {
        "processor": name,
        "instructions": " ".join([*instructions, *limits]),
        "threads": torch.get_num_threads(),
        "fp32 linear layers": products,
        "fp32 linear layers in training": "oneDNN" if learns_by_onednn() else "PyTorch",
    }


def dual(*tensors):
    """Does one of them carry a tangent (forward-mode AD, torch.func.jvp)? oneDNN's products would lose it in silence."""
    if torch.autograd.forward_ad._current_level < 0:  # outside of it, which is nearly always
        return False
    return any(torch.autograd.forward_ad.unpack_dual(t).tangent is not None for t in tensors if t is not None)


def _differentiated(module, x):
    learns = torch.is_grad_enabled() and (x.requires_grad or module.weight.requires_grad)
    return learns or dual(x, module.weight, module.bias)


def _otherwise(module, x):
    """Must a direct layer take PyTorch's way: for a gradient, or since autocast says in which type it computes?"""
    return _differentiated(module, x) or x.dtype != module.weight.dtype or torch.is_autocast_enabled("cpu")


def _for_inference(module, x):
    """x in the type of a packed layer, which has no other, whatever autocast says."""
    if _differentiated(module, x):
        raise RuntimeError("this model was prepared for inference on a CPU; call nanodiff.device.onednn.undo(model) to "
                           "train or differentiate it")  # fmt: skip
    return x.to(module.weight.dtype)


def _geglu(y):
    value, gate = y.chunk(2, dim=-1)
    return value * nn.functional.gelu(gate)


_gelu = functools.partial(nn.functional.gelu, approximate="tanh")


def traced(x):
    """Is x looked at by torch.compile, torch.export, forward-mode AD or a transform of torch.func (vmap, grad, jvp), or no real tensor? A product that
    ends in a multiplication, and a gradient written by hand, have no form for those."""
    if torch.compiler.is_compiling() or type(x) not in (torch.Tensor, nn.Parameter):
        return True
    return dual(x) or torch._C._functorch.peek_interpreter_stack() is not None


def _gated(x, value, gate, bias):
    """value(x) · gelu(gate(x)) of a projection's two halves: the gate's product ends in the GELU, the value's in the multiplication, so that none of the
    three is a pass over memory of its own, or rounded in between."""
    bias = (None, None) if bias is None else bias.chunk(2)
    gate = torch.ops.mkldnn._linear_pointwise(x, gate, bias[1], "gelu", [], "none")
    return torch.ops.mkldnn._linear_pointwise.binary(x, gate, value, bias[0], "mul")


def product(x, weight, bias=None):
    """x wᵀ + bias by oneDNN: x [..., D], weight [O, D], of whatever strides."""
    return torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")


class _Learned(torch.autograd.Function):
    """product() of fp32 with its gradients, those too by oneDNN."""

    @staticmethod
    def forward(ctx, x, weight, bias):
        ctx.save_for_backward(x if weight.requires_grad else None, weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx, dy):
        x, weight = ctx.saved_tensors
        # PyTorch's where the gradient's gradient is wanted
        times = nn.functional.linear if torch.is_grad_enabled() else product
        rows = dy.flatten(0, -2)
        for_x, for_weight, for_bias = ctx.needs_input_grad
        dx = times(dy, weight.t()) if for_x else None
        dw = times(rows.t(), x.flatten(0, -2).t()) if for_weight else None
        return dx, dw, rows.sum(0) if for_bias else None


class LearnedLinear(nn.Linear):
    """A linear layer of a model in training by oneDNN instead of MKL: see learn()."""

    def forward(self, x):
        few = x.numel() < FEW_ROWS * x.shape[-1] or x.device.type != "cpu"  # an empty or a flat x, too
        other = torch.is_autocast_enabled("cpu") or not x.dtype == self.weight.dtype == torch.float32
        if few or other or traced(x) or dual(self.weight, self.bias):
            return super().forward(x)
        return _Learned.apply(x, self.weight, self.bias)


def learn(model):
    """Let the fp32 linear layers of a model in training, frozen ones too, take their products and gradients from oneDNN, where that is
    the quicker way. They stay so: prepare() packs them for inference as others, and undo() brings them back."""
    for m in model.modules() if learns_by_onednn() else ():
        fits = type(m) is nn.Linear and m.weight.device.type == "cpu" and m.weight.numel() >= LEAST
        if fits and m.weight.dtype == torch.float32:
            m.__class__ = LearnedLinear
    return model


class DirectLinear(nn.Linear):
    """A linear layer by oneDNN instead of MKL, unless a gradient is wanted (a LoRA trained around frozen weights)."""

    def forward(self, x):
        if _otherwise(self, x):
            return super().forward(x)
        return product(x, self.weight, self.bias)

    def geglu(self, x):
        """value · gelu(gate) of the two halves of what forward() gives."""
        if _otherwise(self, x) or traced(x):
            return _geglu(self.forward(x))
        return _gated(x, *self.weight.chunk(2), self.bias)

    def gelu(self, x):
        """gelu(forward(x)) in its tanh form."""
        if _otherwise(self, x):
            return _gelu(super().forward(x))
        return torch.ops.mkldnn._linear_pointwise(x, self.weight, self.bias, "gelu", [], "tanh")


class _Packed:
    """A layer whose weight is in oneDNN's layout, in `packed`; None before it is."""

    packed = None

    def __reduce_ex__(self, protocol):
        if self.packed is None:
            return super().__reduce_ex__(protocol)
        raise TypeError(
            "a model packed for oneDNN cannot be copied or pickled; onednn.undo(model) brings its weights back"
        )


class PackedLinear(_Packed, nn.Linear):
    """A linear layer whose weight is in oneDNN's layout, by halves where it is geglu()'s. It is packed at once: the layout hangs on the weight
    alone, and packed amid a model's first run it would leave holes between what comes and goes there (0.6 GB of SDXL)."""

    def pack(self):
        if self.packed is None:
            parts = self.weight.detach().chunk(getattr(self, "halves", 1))
            self.packed = [torch.ops.mkldnn._reorder_linear_weight(part, None) for part in parts]
            _release(self)

    def _product(self, x, end, form):
        x, parts = _for_inference(self, x), self.packed
        biases = [None] * len(parts) if self.bias is None else self.bias.chunk(len(parts))
        made = [
            torch.ops.mkldnn._linear_pointwise(x, part, bias, end, [], form)
            for part, bias in zip(parts, biases, strict=True)
        ]
        return made[0] if len(made) == 1 else torch.cat(made, dim=-1)

    def forward(self, x):
        return self._product(x, "none", "")

    def geglu(self, x):
        """value · gelu(gate) of the two halves of what forward() gives; for a layer whose module has said `halves = 2` of it, so that how it is
        packed does not hang on who called it first (an adapter calls forward())."""
        return _geglu(self.forward(x)) if traced(x) else _gated(_for_inference(self, x), *self.packed, self.bias)

    def gelu(self, x):
        """gelu(forward(x)) in its tanh form."""
        return self._product(x, "gelu", "tanh")


class PackedConv2d(_Packed, nn.Conv2d):
    """A convolution whose weight is in oneDNN's layout after the first call."""

    def forward(self, x):
        x = _for_inference(self, x)
        where = (self.padding, self.stride, self.dilation, self.groups)
        if self.packed is None:
            self.packed = [torch.ops.mkldnn._reorder_convolution_weight(self.weight.detach(), *where, tuple(x.shape))]
            _release(self)
        return torch.ops.mkldnn._convolution_pointwise(x, *self.packed, self.bias, *where, "none", [], "")


def _pieces(weight):
    """[(rows, the rows in fp32)] of a weight [O, D], one after the other."""
    n = max(1, PIECE // weight.shape[1])
    return ((slice(i, i + n), weight[i : i + n].float()) for i in range(0, len(weight), n))


def _wide(x, weight, direct):
    """x wᵀ in x's type, computed in fp32. direct: by oneDNN, which has no gradient."""
    rows = x.reshape(-1, x.shape[-1]).float()
    y = x.new_empty(len(rows), len(weight))
    with torch.autocast("cpu", enabled=False):
        for part, w in _pieces(weight):
            y[:, part] = torch.ops.mkldnn._linear_pointwise(rows, w, None, "none", [], "") if direct else rows @ w.T
    return y.view(*x.shape[:-1], -1)


class _Wide(torch.autograd.Function):
    """_wide() with the gradient of x; the weight has none."""

    @staticmethod
    def forward(ctx, x, weight):
        ctx.save_for_backward(weight)
        return _wide(x, weight, False)

    @staticmethod
    def backward(ctx, dy):
        (weight,) = ctx.saved_tensors
        rows = dy.reshape(-1, dy.shape[-1]).float()
        dx = rows.new_zeros(len(rows), weight.shape[1])
        for part, w in _pieces(weight):
            dx.addmm_(rows[:, part], w)
        return dx.to(dy.dtype).view(*dy.shape[:-1], -1), None


def linear(x, weight):
    """x wᵀ: x [..., D], weight [O, D], of one type. Half-precision weights are computed in fp32, piece by piece, on a CPU that has no
    instruction for them, unless they learn or x has few rows."""
    half = weight.dtype in (torch.bfloat16, torch.float16) and weight.device.type == "cpu"
    auto = torch.is_autocast_enabled("cpu") and torch.get_autocast_dtype("cpu") == weight.dtype
    few = x.numel() < FEW_ROWS * x.shape[-1]
    if not half or few or weight.requires_grad or computes_bf16() or (x.dtype != weight.dtype and not auto):
        return nn.functional.linear(x, weight)
    x = x.to(weight.dtype)  # as autocast would
    if torch.is_grad_enabled() and x.requires_grad:
        return _Wide.apply(x, weight)
    return _wide(x, weight, unusable(torch.float32) is None)


class WideLinear(nn.Linear):
    """A half-precision linear layer on a CPU without bf16: see linear()."""

    def forward(self, x):
        y = linear(x, self.weight)
        return y if self.bias is None else y + self.bias


def widen(model):
    """Let the frozen half-precision linear layers of a model compute as WideLinear, where the CPU has no instruction for bf16."""
    for m in model.modules():
        frozen = type(m) is nn.Linear and m.weight.device.type == "cpu" and not m.weight.requires_grad
        if frozen and m.weight.dtype in (torch.bfloat16, torch.float16) and not computes_bf16():
            m.__class__ = WideLinear
    return model


# ways to call a layer, and what it does with its product [..., O] then
ENDS = {"forward": lambda y: y, "geglu": _geglu, "gelu": _gelu}
PLAIN = {DirectLinear: nn.Linear, PackedLinear: nn.Linear, PackedConv2d: nn.Conv2d, WideLinear: nn.Linear}


def _release(module):
    """Give the memory of a plain weight that has been packed back to the system; an empty tensor stays in its place.

    Weights of a model lie in one large mapping, of which pieces cannot be freed, but their pages can.
    """
    weight = module.weight.data
    module.shape, module.layout = weight.shape, weight.stride()
    start = -(-weight.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE  # whole pages inside the weight only
    end = (weight.data_ptr() + weight.numel() * weight.element_size()) // mmap.PAGESIZE * mmap.PAGESIZE
    if end > start and hasattr(mmap, "MADV_DONTNEED"):
        system.libc().madvise(ctypes.c_void_p(start), ctypes.c_size_t(end - start), mmap.MADV_DONTNEED)
    module.weight.data = weight.new_empty(0)


@functools.cache
def unusable(dtype):
    """None where these operators work as meant, else the reason why not: tried on one layer of each kind."""
    if not torch.backends.mkldnn.is_available():
        return "this PyTorch has no oneDNN"
    try:
        for kind, plain in PLAIN.items():
            for way, end in ENDS.items():
                if not hasattr(kind, way):
                    continue
                shape = (16, 32, 3) if plain is nn.Conv2d else (16, 32)
                # without numbers of its own: none may be drawn
                layer = plain(*shape, **({"padding": 1} if plain is nn.Conv2d else {}), device="meta")
                with torch.device("cpu"):  # whatever device is usual where it is tried
                    x = torch.arange(800 if plain is nn.Conv2d else 96).sin().to(dtype)
                    x = x.view((2, 16, 5, 5) if plain is nn.Conv2d else (2, 3, 16))
                    for name, p in list(layer.named_parameters()):
                        numbers = torch.arange(p.numel()).cos().view(p.shape) / 8
                        setattr(layer, name, nn.Parameter(numbers.to(dtype), requires_grad=False))
                layer.halves = 2 if way == "geglu" else 1
                want = end(layer(x).float())
                layer.__class__ = kind
                if kind is PackedLinear:
                    layer.pack()
                if not torch.allclose(getattr(layer, way)(x).float(), want, rtol=2e-2, atol=2e-2):
                    return f"{kind.__name__} gives other numbers than {plain.__name__}"
    except (AttributeError, RuntimeError, TypeError) as e:
        return f"this PyTorch refuses ({str(e).splitlines()[0][:100]})"
    return None


def _ordinary(module):
    """Whether a layer is padded with zeros by numbers, and its weight lies in one piece of memory."""
    weight = module.weight
    dense = weight.is_contiguous() or (weight.dim() == 4 and weight.is_contiguous(memory_format=torch.channels_last))
    return (
        dense
        and not isinstance(getattr(module, "padding", 0), str)
        and getattr(module, "padding_mode", "zeros") == "zeros"
    )


@functools.cache
def _note(text):
    print(text, file=sys.stderr)


def prepare(model, pack=False):
    """Let the plain layers of `model` compute by oneDNN, for inference on a CPU in fp32 or bf16: all of them packed, or
    only the fp32 linear layers, which need no packing.

    Layers that are being trained (whose weights require a gradient), and those of other kinds, such as quantized ones,
    stay as they are. undo() makes plain layers again; until then packed weights are empty, and so is what shared their
    memory, such as a state_dict() taken before. Says why when oneDNN cannot be used; then nothing changes.
    """
    if not pack and any(isinstance(m, PackedLinear | PackedConv2d) for m in model.modules()):
        undo(model)  # so that what a picture looks like, to the last bit, depends on its own settings alone
    owners = Counter(id(w) for m in model.modules() if (w := m._parameters.get("weight")) is not None)
    for m in model.modules():
        learned = pack and type(m) is LearnedLinear
        plain = nn.Linear if learned else PLAIN.get(type(m), type(m))
        if plain not in (nn.Linear, nn.Conv2d) or m.weight.device.type != "cpu" or m.weight.numel() < LEAST:
            continue
        dtype = m.weight.dtype
        if m.weight.requires_grad or owners[id(m.weight)] > 1:  # it is being trained, or another module's too
            continue
        if dtype not in (torch.float32, torch.bfloat16) or not _ordinary(m):
            continue
        if reason := unusable(dtype):
            _note(f"note: the CPU computes with PyTorch's plain layers: {reason}")
            return
        if pack:
            m.__class__ = PackedConv2d if plain is nn.Conv2d else PackedLinear
            m.learned = learned or getattr(m, "learned", False)
            if plain is nn.Linear:
                m.pack()
        elif type(m) is nn.Linear and dtype == torch.float32:
            m.__class__ = DirectLinear


def undo(model):
    """Layers with their weights, as they were before prepare()."""
    for m in model.modules():
        if type(m) not in PLAIN:
            continue
        packed = m.__dict__.pop("packed", None)
        if packed is not None:
            dense = torch.cat([part.to_dense() for part in packed]).view(m.shape)
            m.weight.data = torch.empty_strided(m.shape, m.layout, dtype=dense.dtype).copy_(dense)
        m.__class__ = LearnedLinear if m.__dict__.pop("learned", False) else PLAIN[type(m)]
