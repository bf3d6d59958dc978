"""Starting a kernel: everything but its tensors is decided once for each signature of a call, and kept.

Triton's `kernel[grid](…)` looks at all forty arguments of every call, PyTorch's dispatcher at everything that autograd or
torch.compile might want: together a hundred microseconds, where a large GPU computes for ten. So a call without
gradients goes past the dispatcher, by a plan that is looked up by shapes, strides and types (`planned`), and a kernel
that was compiled before is handed straight to the driver (`Launch`).
"""

import torch

from . import switch
from .switch import changed, triton

MOST = 4096  # plans that are kept: a language model's keys have another length at every token
_kept = {}


def forget():
    """Decide everything again, because what decisions rest on has changed."""
    _kept.clear()


changed.append(forget)


def signature(args):
    """What decides how a call is computed: shapes, strides, types and device of tensors; everything else as it is."""
    return tuple([(a.shape, a.stride(), a.dtype, a.device) if isinstance(a, torch.Tensor) else a for a in args])


def kept(make, *args, also=()):
    """make(*args), made once for each signature of the arguments. also: further tensors that are given to what is made, whose
    types matter."""
    key = (make, signature(args), tuple([t.dtype for t in also]))
    found = _kept.get(key)
    if found is None:
        if len(_kept) >= MOST:
            _kept.clear()
        found = _kept[key] = make(*args)
    return found


def real(x):
    """Has this tensor memory of its own kind (and is no FakeTensor, DTensor …, whose class must see what is computed)?"""
    return type(x) in (torch.Tensor, torch.nn.Parameter)


def planned(decide, *args):
    """decide(*args), the function that computes a call without gradients, decided once for each signature and setting of the
    switch; None where the ordinary way must be taken: where autograd or torch.compile look on, where a tensor is of a class
    that must see what is computed (FakeTensor, DTensor), on a CPU, and where decide() says so."""
    if not (args[0].is_cuda or switch.INTERPRET) or torch.compiler.is_compiling():
        return None
    recording = torch.is_grad_enabled()
    key = [decide, switch.mode(), recording, args[0].device]
    for a in args:
        if isinstance(a, torch.Tensor):
            if (recording and a.requires_grad) or not real(a):
                return None
            key.append((a.shape, a.stride(), a.dtype, a.data_ptr() & 15 == 0))
        else:
            key.append(a)
    # the one setting of PyTorch's that changes what an fp32 kernel does
    if args[0].dtype == torch.float32:
        key.append(torch.backends.cuda.matmul.fp32_precision)
    key = tuple(key)
    found = _kept.get(key, 0)
    if found == 0:
        if len(_kept) >= MOST:
            _kept.clear()
        found = _kept[key] = decide(*args)
    return found


class Launch:
    """A kernel with everything fixed but its tensors, which come first among its parameters.

    grid: up to three numbers. numbers: the parameters that follow the tensors, in order. constants: the constexpr ones and
    the compiler's options by name. Compiled code is specialised on which tensors start at a multiple of 16 bytes, so it
    is kept for each such pattern.
    """

    def __init__(self, kernel, grid, *numbers, **constants):
        self.kernel, self.grid, self.numbers, self.constants = kernel, (*grid, 1, 1)[:3], numbers, constants
        self.ready = {}

    def __call__(self, *tensors):
        """Start it on the current stream. The first call of each pattern of alignment compiles, the others go straight to the driver."""
        aligned = 1
        for t in tensors:
            aligned = aligned << 1 | (t.data_ptr() & 15 == 0)
        ready = self.ready.get(aligned)
        if ready is not None:
            run, stream_of, device, head, tail = ready
            run(*self.grid, stream_of(device), *head, *tensors, *tail)
            return
        compiled = self.kernel[self.grid](*tensors, *self.numbers, **self.constants)
        # what the next call hands to the driver: the code, and all that does not change
        if compiled is not None:  # the interpreter, which has run it, gives nothing
            names = self.kernel.arg_names[len(tensors) + len(self.numbers) :]
            tail = (*self.numbers, *(self.constants[name] for name in names))
            driver = triton.runtime.driver.active
            device = driver.get_current_device()
            head = (compiled.function, compiled.packed_metadata, None, None, None)
            self.ready[aligned] = (compiled.run, driver.get_current_stream, device, head, tail)
