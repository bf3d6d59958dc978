"""Compile every kernel without a GPU and say what each takes: `make kernels-report`.

    python -m kernels.report [--arch sm_80 sm_90 gfx942] [--dtype bfloat16] [--head 40 64] [--json FILE] [--check]

The public launch code runs on meta tensors while Triton believes in a GPU of the named architecture, so what is
compiled is what a user's GPU would be given: the same configurations, specialisations and flags. Registers, shared
memory and spilled bytes are read from the cubin (cuobjdump, which comes with Triton), on AMD from the assembly.
`--check` fails when a kernel spills that SPILLS does not justify, or asks for more shared memory than its GPU has.

How to read a row. registers: of a thread; above 128 with 8 warps a multiprocessor holds one such program at a time.
shared: bytes of a program, of which the stages of its loop take most. spilled: bytes a thread keeps in memory for want of registers,
which every round of a loop pays for. narrow: loads of two bytes where sixteen would go at once; ahead: copies that run while the
products do. None of it is a time: a GPU has the last word (kernels.bench), this one finds what cannot be right.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import re
import subprocess
import sys
import tempfile
import time

# Bytes of shared memory of one block, at most. sm_86 stands for the GPUs that table.json does not know: what they are
# given must run, and may spill.
SHARED = {"sm_80": 163 << 10, "sm_86": 99 << 10, "sm_90": 227 << 10, "gfx942": 64 << 10}
DTYPES = ("bfloat16", "float16", "float32")
HEAD_SIZES = (40, 64, 80, 96, 128, 160, 256, 512)


def collect(arch, calls, only=None):
    """Run each of `calls` for `arch`, launching nothing: [(kernel, options, CompiledKernel)]. only: one kernel's name."""
    import triton
    from triton.backends.compiler import GPUTarget
    from triton.runtime.jit import JITFunction

    from kernels import switch

    # what Triton asks of a GPU, answered without one
    class Driver:
        def get_current_target(self):
            return GPUTarget("cuda", int(arch[3:]), 32) if arch.startswith("sm_") else GPUTarget("hip", arch, 64)

        def get_current_device(self):  # a number for each, because a kernel remembers the target of its device
            return sorted(SHARED).index(arch)

        def get_current_stream(self, device):
            return 0

    found = []

    def launch(kernel, grid):
        def compiled(*args, **kwargs):
            if only and kernel.__name__.lstrip("_") != only:
                return
            binary = kernel.run(*args, grid=grid, warmup=True, **kwargs)
            found.append((kernel.__name__.lstrip("_"), kwargs, binary))

        return compiled

    triton.runtime.driver.set_active(Driver())
    JITFunction.__getitem__ = launch
    switch.set_target(arch)
    for call in calls:
        call()
    return found


@functools.cache
def _cuobjdump():
    import triton

    return os.path.join(os.path.dirname(triton.__file__), "backends", "nvidia", "bin", "cuobjdump")


def resources(arch, binary):
    """(registers, bytes of shared memory, bytes spilled) of one compiled kernel."""
    if not arch.startswith("sm_"):
        text = binary.asm["amdgcn"]

        def field(name):
            return int(re.search(rf"\.{name}:\s+(\d+)", text)[1])

        return field("vgpr_count"), binary.metadata.shared, 4 * (field("vgpr_spill_count") + field("sgpr_spill_count"))
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(binary.asm["cubin"])
        file.flush()
        text = subprocess.run(
            [_cuobjdump(), "-res-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    registers, stack = (int(re.search(rf"{name}:(\d+)", text)[1]) for name in ("REG", "STACK"))
    return registers, binary.metadata.shared, stack


def loads(arch, binary):
    """{"narrow": loads of two bytes at a time, "ahead": copies that run ahead of the computation} in the code of an NVIDIA GPU:
    strides of which the compiler does not know that they are multiples of 16 bytes cost both."""
    if not arch.startswith("sm_"):
        return {}
    text = binary.asm["ptx"]
    ahead = re.findall(r"cp\.async\.c[ga]|cp\.async\.bulk", text)
    return {"narrow": len(re.findall(r"ld\.global\S*\.b16", text)), "ahead": len(ahead)}


def _empty(*shape, dtype):
    """A tensor of which the launch code sees everything and which has no memory."""
    import torch

    return torch.empty(shape, dtype=dtype, device="meta")


def attention_calls(K, dtype, forward_only=False):
    """{label: call} of every attention kernel for one head size: plain and with everything that masks.

    Lengths that are multiples of a block and odd ones: without edges to check, the same kernel is other code."""
    import importlib

    import torch

    forward = importlib.import_module("kernels.attention_forward").forward
    backward = importlib.import_module("kernels.attention_backward").backward
    B, L, N = 2, 4096, 8
    q, k, v, out, dout = (_empty(B, L, N, K, dtype=dtype) for _ in range(5))
    lse = _empty(B, N, L, dtype=torch.float32)
    # SD 3.5: image and text
    odd, odd_lse = _empty(2, 4429, 24, K, dtype=dtype), _empty(2, 24, 4429, dtype=torch.float32)
    short_k, short_v = (_empty(B, 77, N, K, dtype=dtype) for _ in range(2))
    bias, mask = _empty(1, N, L, L, dtype=dtype), _empty(B, L, dtype=torch.bool)
    calls = {
        "plain": lambda: forward(q, k, v, None, None, 0.1, False, 0),
        "masked": lambda: forward(q, k, v, bias, mask, 0.1, True, 0),
        "odd length": lambda: forward(odd, odd, odd, None, None, 0.1, False, 0),
        "77 keys": lambda: forward(q, short_k, short_v, None, None, 0.1, False, 0),
    }
    if not forward_only:
        calls["backward"] = lambda: backward(q, k, v, None, None, out, lse, dout, None, 0.1, False, 0, False)
        calls["backward odd"] = lambda: backward(
            odd, odd, odd, None, None, odd, odd_lse, odd, None, 0.1, False, 0, False
        )
        calls["backward masked"] = lambda: backward(q, k, v, bias, mask, out, lse, dout, None, 0.1, True, 0, True)
    return calls


def other_calls(dtype, forward_only=False):
    """{label: call} of every other kernel, at sizes that real models have."""
    import importlib

    import torch

    groups, norms, gated, residual = (
        importlib.import_module(f"kernels.{n}") for n in ("group_norm", "norms", "gated", "residual")
    )
    calls = {}
    for layout in ("contiguous", "channels last"):
        for C, side in ((2560, 8), (1280, 16), (320, 64), (128, 512)):
            fmt = torch.channels_last if layout == "channels last" else torch.contiguous_format
            x = _empty(2, C, side, side, dtype=dtype).to(memory_format=fmt)
            w, t = _empty(C, dtype=dtype), _empty(2, C, dtype=dtype)
            s = _empty(2, 32, dtype=torch.float32)
            label = f"{C}x{side}x{side} {layout}"
            calls[label] = lambda x=x, w=w, t=t: groups.forward(x, w, w, t, 32, 1e-5, True)
            calls[f"{label} bias"] = lambda x=x, w=w: residual.bias_forward(x, w, x)
            if not forward_only:
                calls[f"{label} backward"] = lambda x=x, w=w, t=t, s=s: groups.backward(x, x, w, w, t, s, s, 32, True)
    for D in (320, 1280, 4096, 8192):
        x, w, m = _empty(2, 4096, D, dtype=dtype), _empty(D, dtype=dtype), _empty(2, D, dtype=dtype)
        s = _empty(2, 4096, dtype=torch.float32)
        calls[f"layer {D}"] = lambda x=x, w=w: norms.norm_forward(x, w, w, 1e-5, False, False)
        calls[f"adaLN {D}"] = lambda x=x, m=m: norms.norm_forward(x, m, m, 1e-6, False, True)
        calls[f"rms {D}"] = lambda x=x, w=w: norms.norm_forward(x, w, None, 1e-6, True, False)
        calls[f"residual {D}"] = lambda x=x, w=w: residual.residual_forward(
            x, x, None, None, None, w, w, w, 1e-5, False
        )
        calls[f"gates {D}"] = lambda x=x, m=m: residual.residual_forward(x, x, m, x, m, m, m, None, 1e-6, True)
        if not forward_only:
            calls[f"layer {D} backward"] = lambda x=x, w=w, s=s: norms.norm_backward(x, x, w, w, s, s, False, False)
            calls[f"rms {D} backward"] = lambda x=x, w=w, s=s: norms.norm_backward(x, x, w, None, s, s, True, False)
    for K in (64, 128, 256):
        x, w, c = _empty(2, 512, 8, K, dtype=dtype), _empty(K, dtype=dtype), _empty(1, 512, K // 2, dtype=dtype)
        s = _empty(2, 512, 8, dtype=torch.float32)
        calls[f"q k {K}"] = lambda x=x, w=w, c=c: norms.rope_forward(x, w, c, c, 1e-6, False)
        if not forward_only:
            calls[f"q k {K} backward"] = lambda x=x, w=w, c=c, s=s: norms.rope_backward(x, x, w, c, c, s, False)
    x, w = _empty(2, 4 * 320, 33, 33, dtype=dtype).to(memory_format=torch.channels_last), _empty(320, dtype=dtype)
    calls["phases"] = lambda x=x, w=w: residual.interleave_forward(x, w)
    x, w, target = _empty(4096, 2048, dtype=dtype), _empty(128256, 2048, dtype=dtype), _empty(4096, dtype=torch.int64)
    loss = _empty(4096, dtype=torch.float32)
    for kind in gated.ACTIVATIONS:
        calls[kind] = lambda kind=kind: gated.halves_forward(x, kind)
        if not forward_only:
            calls[f"{kind} backward"] = lambda kind=kind: gated.gated_backward(x, x, x, kind)
    calls["128k words"] = lambda: gated.losses(x, w, target, -100, True)
    if not forward_only:
        calls["128k words backward"] = lambda: gated.losses_backward(loss, x, w[:8192], target, loss, -100, True)
    return calls


def rows(arch, dtype, K):
    """One part of the report, in a process of its own: a row for every kernel of head size K (0: all the others).

    Two calls that end in the same code are one row: most of what a kernel is called with does not change it."""
    import torch

    kind = getattr(torch, dtype)
    calls = (attention_calls(K, kind, arch == "gfx942") if K else other_calls(kind, arch == "gfx942")).items()
    found, seen = [], set()
    for label, call in calls:
        for kernel, options, binary in collect(arch, [call]):
            if binary.hash in seen:
                continue
            seen.add(binary.hash)
            registers, shared, spilled = resources(arch, binary)
            tile = "x".join(str(options[k]) for k in ("BLOCK_L", "BLOCK_P", "BLOCK_T", "ROWS") if k in options)
            wide = next(
                (options[k] for k in ("BLOCK_S", "S0", "BLOCK_C", "BLOCK_V", "BLOCK_D", "BLOCK") if k in options), ""
            )
            found.append(
                {"kernel": kernel, "case": label, "arch": arch, "dtype": dtype, "head": K or "", "tile": f"{tile}x{wide}".strip("x"),
                 "warps": binary.metadata.num_warps, "stages": binary.metadata.num_stages, "registers": registers,
                 "shared": shared, "spilled": spilled, **loads(arch, binary)}
            )  # fmt: skip
    return found


# Spills that are accepted, beside those of by_time(): (kernel, dtype, head sizes) -> bytes a thread.
SPILLS = {
    # A few registers for strides that are known to be multiples of 16 bytes but not of 16 elements, and in fp32 for every kind of
    # mask at once; smaller tiles spill as much.
    ("backward_kv", "float32", (40,)): 24,
    ("backward_kv", "bfloat16", (40,)): 8,
    ("backward_kv", "float16", (40,)): 16,
    ("backward_q", "float32", (40,)): 8,
    # Two registers on sm_80, and for heads of 64 under Triton 3.6, since the scale is part of the multiply-add before exp2.
    ("forward", "float32", (64, 96, 128, 160, 256, 512)): 8,
    # Two registers under Triton 3.6.
    ("delta", "float32", (64, 80, 128)): 8,
    # 77 keys have no strides that are multiples of 16, which costs four registers; no model has such heads for a prompt.
    ("forward", "bfloat16", (512,)): 16,
    ("forward", "float16", (512,)): 16,
    # Two registers on sm_80, for a group of 80 channels on 8×8 pixels; twice the warps move the spill to another size.
    ("whole_forward", "float16", ("",)): 8,
}


def by_time(row):
    """Was this tile chosen on a GPU, by time? Then what it spills has been weighed."""
    rows = _table().get(row["arch"], {}).get(f"attention.{row['kernel']}", {})
    mine = (k for k in rows if k.startswith(f"{row['head']}/") and k.endswith(row["dtype"]) and k.count("/") == 2)
    return any(mine) and "masked" not in row.get("case", "")


@functools.cache
def _table():
    from kernels import switch

    return json.loads(switch.TABLE.read_text())


def justified(row):
    """Bytes that a row may spill. sm_86 stands for GPUs without a row in the table: what they get must run, and may be slow."""
    if row["arch"] == "sm_86" or by_time(row):
        return row["spilled"]
    return next(
        (most for (kernel, dtype, heads), most in SPILLS.items()
         if row["kernel"] == kernel and row["dtype"] == dtype and row["head"] in heads), 0
    )  # fmt: skip


def faults(rows):
    """Rows that spill without a justification, or cannot be launched."""
    return [r for r in rows if r["spilled"] > justified(r) or r["shared"] > SHARED[r["arch"]]]


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.report", description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=sorted(SHARED), default=("sm_80", "sm_90", "gfx942"))
    parser.add_argument("--dtype", nargs="+", choices=DTYPES, default=DTYPES)
    parser.add_argument(
        "--head", nargs="+", type=int, default=[*HEAD_SIZES, 0], help="head sizes; 0: the other kernels"
    )
    parser.add_argument("--json", help="write the rows to this file")
    parser.add_argument("--check", action="store_true", help="exit 1 on unjustified spills or too much shared memory")
    args = parser.parse_args(argv)
    os.environ.pop("TRITON_INTERPRET", None)
    os.environ["NANODIFF_KERNELS"] = "triton"  # in the processes below: import Triton although there is no GPU
    began, everything = time.time(), []
    jobs = [(a, d, k) for k in sorted(args.head, key=lambda k: (k == 0, -k)) for a in args.arch for d in args.dtype]
    header = ("kernel", "case", "arch", "dtype", "head", "tile", "warps", "stages", "registers", "shared", "spilled")
    print(" ".join(f"{h:<{w}}" for h, w in zip(header, WIDTHS, strict=True)))
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), context) as pool:
        for part in pool.map(rows, *zip(*jobs, strict=True)):
            for row in part:
                print(" ".join(f"{row[h]!s:<{w}}" for h, w in zip(header, WIDTHS, strict=True)), flush=True)
            everything += part
    bad = faults(everything)
    print(f"{len(everything)} kernels compiled in {time.time() - began:.0f} s; {len(bad)} with a fault")
    for row in bad:
        print(f"fault: {row['kernel']} ({row['case']}) {row['arch']} {row['dtype']} head {row['head']}: "
              f"{row['spilled']} bytes spilled, {row['shared']} bytes of shared memory")  # fmt: skip
    if args.json:
        with open(args.json, "w") as file:
            json.dump(everything, file, indent=1)
    return 1 if bad and args.check else 0


WIDTHS = (14, 36, 6, 8, 4, 9, 5, 6, 9, 7, 7)

if __name__ == "__main__":
    sys.exit(main())
