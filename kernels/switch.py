"""One switch for every kernel of this package: "auto" | "triton" | "torch", and the tables the kernels share.

    auto     Triton where a kernel can be used, else PyTorch's own operator, and each reason for that is said once
    triton   a reason not to use a kernel is an error, so a benchmark never measures the fallback unknowingly
    torch    PyTorch's own operators

The start value is that of the variable NANODIFF_KERNELS, read at import; scripts set it from `--kernels`; `backend("torch")`
sets it for a `with` block. Names in kernel code: p_ pointer, s_ stride, o_ offsets, m_ mask, and capitals for what is
known when a kernel is compiled.

Who decides what: a kernel's own file says which tensors it can take (its _why_not()), this one whether it may (mode, device, what the
table says of training), launch.py keeps the decision for calls that are alike, and table.json has the numbers.
"""

import contextlib
import functools
import json
import os
import shutil
import sys
import sysconfig
from pathlib import Path

import torch

KNOWN_AMD = ("gfx942",)
MODES = ("auto", "triton", "torch")
TABLE = Path(__file__).with_name("table.json")


class _Absent:
    """Stands for Triton where there is none or no GPU to use it on: the kernels can be read, not run."""

    @staticmethod
    def constexpr(value):
        return value

    @staticmethod
    def jit(kernel):
        return kernel


def _import_triton():
    """(triton, triton.language, why it cannot be used or None). A tenth of a second, so only where it can be of use."""
    interpret = os.environ.get("TRITON_INTERPRET") == "1"
    if not (interpret or os.environ.get("NANODIFF_KERNELS") == "triton" or torch.cuda.is_available()):
        return _Absent(), _Absent(), "there is no CUDA device"
    try:
        import triton
        import triton.language as tl
    except ImportError as e:
        return _Absent(), _Absent(), f"Triton cannot be imported ({e})"
    if interpret:
        return triton, tl, None
    if not (os.environ.get("CC") or shutil.which("gcc") or shutil.which("clang") or shutil.which("cc")):
        return triton, tl, "Triton needs a C compiler (gcc or clang), and there is none"
    if not Path(sysconfig.get_paths()["include"], "Python.h").exists():
        return triton, tl, "Triton needs Python's header files (the package python3-dev), and there are none"
    return triton, tl, None


triton, tl, UNUSABLE = _import_triton()
INTERPRET = UNUSABLE is None and triton.knobs.runtime.interpret  # kernels run on the CPU, slowly: for tests


def _mode(name):
    """`name`, if it is one of MODES; else ValueError."""
    if name not in MODES:
        raise ValueError(f"kernels: {name!r} is not one of {', '.join(MODES)}")
    return name


_state = {"mode": _mode(os.environ.get("NANODIFF_KERNELS", "auto"))}
_said = set()


def set_backend(mode):
    """Set the switch for the rest of the process. Raises ValueError for another word, and RuntimeError for "triton"
    where no kernel can run at all."""
    if UNUSABLE and mode == "triton":
        raise RuntimeError(f"kernels: no Triton kernels here: {UNUSABLE}")
    _state["mode"] = _mode(mode)
    if UNUSABLE and mode == "auto":
        _say(UNUSABLE)


def mode():
    """What the switch says."""
    return _state["mode"]


@contextlib.contextmanager
def backend(mode):
    """The switch inside a `with` block."""
    before, _state["mode"] = _state["mode"], _mode(mode)
    try:
        yield
    finally:
        _state["mode"] = before


def _say(reason):
    """Tell a reason for PyTorch's operators on standard error, once, by the first process. Returns True, a constant, since that is
    what torch.compile keeps of the call (below)."""
    if reason not in _said and os.environ.get("RANK", "0") == "0":
        print(f"kernels: PyTorch's own operators, since {reason}", file=sys.stderr)
    _said.add(reason)
    return True


# What torch.compiler.assume_constant_result() does, which would import the compiler, a second's work: while
# torch.compile traces, the reason is said then, and the graph does not break.
_say._dynamo_marked_constant = True


@functools.cache
def _old_gpu(device):
    """Why no kernel is for this GPU, or None: older ones than sm_80, and AMD's other than gfx942, were never tried."""
    arch = architecture()
    if torch.version.hip:
        return None if arch in KNOWN_AMD else f"the GPU is {arch}"
    return "the GPU is older than sm_80" if torch.cuda.get_device_capability(device) < (8, 0) else None


_old_gpu._dynamo_marked_constant = True


@functools.cache
def _trained_by_torch():
    """The kernels that the table of this GPU leaves to PyTorch's own operators where gradients are computed, since a training
    step was faster so."""
    return frozenset(_table().get(architecture(), {}).get("training", {}).get("torch", ()))


_trained_by_torch._dynamo_marked_constant = True
TORCH_TRAINS = "a training step is faster so on this GPU (kernels/table.json; --kernels triton takes less memory)"


def use(name, x, why_not, *args):
    """Whether the kernel `name` computes on tensor x now. why_not(*args): the kernel's own reason against it, or None.

    Raises RuntimeError with the reason when the switch says "triton".
    """
    mode = _state["mode"]
    if mode == "torch" or x.is_meta:  # on meta tensors nothing is computed
        return False
    if UNUSABLE is not None:
        reason = UNUSABLE
    elif not x.is_cuda and not (INTERPRET and mode == "triton"):
        reason = f"tensors are on the {x.device.type}"
    else:
        reason = (_old_gpu(x.device) if x.is_cuda else None) or why_not(*args)
        if reason is None and mode == "auto" and torch.is_grad_enabled() and name in _trained_by_torch():
            reason = TORCH_TRAINS
    if reason is None:
        return True
    if mode == "triton":
        raise RuntimeError(f"kernels: no Triton kernel for {name}: {reason}")
    _say(reason)
    return False


_target = None
changed = []  # called when what the kernels' configurations rest on changes


def set_target(arch):
    """Choose configurations for the architecture `arch` (such as sm_80) whatever this machine has; None undoes it."""
    global _target
    _target = arch
    _change()


def _change():
    """Forget every decision that rested on the configurations."""
    _trained_by_torch.cache_clear()
    for forget in changed:
        forget()


def architecture():
    """What the table calls the present GPU: sm_90, gfx942; "cpu" in the interpreter."""
    if _target is not None:
        return _target
    if not torch.cuda.is_available():
        return "cpu"
    if torch.version.hip:
        return torch.cuda.get_device_properties().gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability())


@functools.cache
def _table():
    """{architecture: {kernel: {key: configuration}}}, see tune.py."""
    return json.loads(TABLE.read_text())


_forced = {}


@contextlib.contextmanager
def forced(kernel, config):
    """Launch `kernel` with `config` inside a `with` block, whatever the table says: for tuning and tests."""
    before = _forced.get(kernel, {})
    _forced[kernel] = config
    _change()
    try:
        yield
    finally:
        _forced[kernel] = before
        _change()


def tuned(kernel, keys, default):
    """The configuration of `kernel`: `default` (a dict) with what table.json has for this GPU under the first of `keys`
    that it knows."""
    known = _table().get(architecture(), {}).get(kernel, {})
    return default | next((known[key] for key in keys if key in known), {}) | _forced.get(kernel, {})


def on_device(launch):
    """Make the GPU of the first argument the current one while `launch` runs: Triton launches on the current one."""

    @functools.wraps(launch)
    def launched(first, *args):
        if not first.is_cuda or first.device.index == torch.cuda.current_device():
            return launch(first, *args)
        with torch.cuda.device(first.device):
            return launch(first, *args)

    return launched


def span(x, *dims):
    """How many elements lie between the first and the last one along some axes: what an offset must be able to hold."""
    return sum((x.shape[d] - 1) * abs(x.stride(d)) for d in dims) + 1


def power_of_2(n, least=16):
    """The smallest power of two that is at least n and `least`."""
    return max(least, 1 << (n - 1).bit_length())


def cdiv(a, b):
    """a / b, rounded up."""
    return -(-a // b)


def halves(size):
    """(a, b): powers of two whose sum covers `size` with little waste, as `tl.arange` wants: 40 = 32 + 16, 80 = 64 + 16,
    77 = 64 + 16. b is 0 where one serves alone."""
    a = max(16, 1 << (size.bit_length() - 1))
    rest = size - a
    b = power_of_2(rest) if rest > 0 else 0
    return (2 * a, 0) if b == a else (a, b)
