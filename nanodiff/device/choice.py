"""Where to compute and in which type: what `auto` means for --device, --dtype and --mixed-precision."""

import os
import platform
import sys

import torch

from nanodiff.config import UserError
from nanodiff.device import onednn

DTYPES = {"fp32": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


def pick_device(name):
    """torch.device for auto | cpu | cuda | mps (Apple's GPU); asking for one that is not there falls back to the CPU, with a line. auto: CUDA, or
    the CPU, with a line where Apple's GPU could be asked for."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "mps" and torch.backends.mps.is_available():
        return torch.device("mps")
    if name in ("cuda", "mps"):
        what = "CUDA device" if name == "cuda" else "GPU of Apple's"
        print(f"warning: no {what} here, using the CPU", file=sys.stderr)
    elif name == "auto" and torch.backends.mps.is_available():
        print("note: computing on the CPU; --device mps computes on this machine's GPU", file=sys.stderr)
    return torch.device("cpu")


def pick_dtype(name, device):
    """torch dtype for auto | fp32 | fp16 | bf16. auto: fp16 on a CUDA GPU, fp32 elsewhere (exact, and what the tests judge;
    sample.py takes bf16 for large models where onednn.computes_bf16()).

    fp16 on a CPU is refused: without AVX512-FP16 a matrix product is hundreds of times slower than in fp32.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise UserError("`dtype` fp16 does not compute on a CPU at any useful speed; use fp32 or bf16")
    _say_slow(name, device)
    return DTYPES[name]


def _say_slow(name, device):
    """A line for bf16 on an x86 processor without an instruction for it, which has its memory and not its speed."""
    x86 = platform.machine().lower() in ("x86_64", "amd64")
    if (
        name == "bf16"
        and device.type == "cpu"
        and x86
        and not onednn.computes_bf16()
        and not int(os.environ.get("RANK", 0))
    ):
        print(
            "note: this CPU has no instruction for bf16: fp32 takes about a quarter of the time",
            file=sys.stderr,
        )


def pick_precision(name, device):
    """The autocast type of --mixed-precision: None (fp32), torch.float16 or torch.bfloat16.

    auto: bf16 where the device multiplies it (GPUs from sm_80 on, CPUs with AVX512_BF16 or AMX), else fp16 on a GPU and
    fp32 on a CPU.
    """
    if name == "fp16" and device.type != "cuda":
        raise UserError("`mixed_precision` fp16 needs a CUDA GPU; use bf16 or no")
    if name != "auto":
        _say_slow(name, device)
        return DTYPES.get(name)
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.get_device_capability(device) >= (8, 0) else torch.float16
    return torch.bfloat16 if device.type == "cpu" and onednn.computes_bf16() else None
