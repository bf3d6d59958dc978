"""Write table.json, the configurations that the kernels start with: `make tune`.

    python -m kernels.tune                         # on a GPU: measure the candidates, keep the fastest
    python -m kernels.tune --static sm_80 sm_90    # without one: by the compiler's report alone

A static choice is the largest tile, in the order of CANDIDATES, whose compiled kernel spills nothing and fits into shared
memory. It is a sound start, not a measurement; the table says which of the two each architecture has.
"""

import argparse
import concurrent.futures
import importlib
import json
import multiprocessing
import os
import sys

from kernels import report, switch

# (BLOCK_L, BLOCK_S, warps, stages) from the tile that reuses most to the one that always fits.
CANDIDATES = {
    "forward": [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 8, 3), (128, 64, 8, 2), (128, 64, 4, 2),
                (128, 32, 4, 3), (128, 32, 8, 2), (64, 64, 4, 2), (64, 64, 8, 2), (64, 64, 8, 1), (64, 32, 4, 2),
                (64, 32, 8, 2), (64, 32, 8, 1), (32, 64, 8, 1), (32, 32, 8, 1), (32, 32, 4, 1), (32, 16, 8, 1),
                (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    "backward_kv": [(64, 128, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (32, 64, 4, 2), (32, 64, 8, 2),
                    (32, 128, 8, 2), (32, 64, 8, 1), (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 1), (16, 32, 8, 1),
                    (16, 32, 4, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    "backward_q": [(128, 64, 8, 2), (64, 64, 4, 3), (64, 64, 4, 2), (64, 64, 8, 2), (64, 32, 4, 2), (64, 32, 8, 2),
                   (32, 64, 8, 2), (32, 32, 4, 2), (32, 32, 8, 2), (32, 32, 8, 1), (32, 16, 8, 1), (16, 32, 8, 1),
                   (16, 16, 8, 1), (16, 16, 4, 1)],
    "backward_bias": [(64, 64, 4, 2), (64, 64, 8, 1), (64, 32, 4, 1), (64, 32, 8, 1), (32, 32, 4, 1), (32, 32, 8, 1),
                      (16, 32, 8, 1), (16, 16, 8, 1), (16, 16, 4, 1)],
    "short": [(128, 4, 1), (128, 8, 1), (64, 4, 1), (64, 8, 1), (32, 4, 1), (32, 8, 1), (16, 8, 1), (16, 4, 1)],
}  # fmt: skip
KINDS = ("forward", "forward_masked", "short", "backward_kv", "backward_kv_masked", "backward_q", "backward_q_masked",
         "backward_bias")  # fmt: skip
TUNED = ("sm_80", "sm_90", "gfx942")  # what can be chosen without a GPU
LOOPS = 2  # blocks of queries that share keys on chip


def hopeless(kind, D, itemsize, rows, keys, warps, stages, shared):
    """Whether a tile cannot fit: its sums alone overflow the registers, or what it loads the shared memory. Compiling
    such a kernel takes minutes."""
    sums = {
        "forward": rows * D,
        "short": rows * D,
        "backward_kv": 2 * keys * D,
        "backward_q": rows * D,
        "backward_bias": 0,
    }
    moving = {
        "forward": 2 * keys,
        "short": 2 * keys,
        "backward_kv": 2 * rows,
        "backward_q": 2 * keys,
        "backward_bias": 0,
    }
    values = (sums[kind] + 2 * rows * keys) / (32 * warps)
    return values > 200 or (moving[kind] * stages * D * itemsize > shared and kind != "short")


def candidates(kind, K, itemsize, shared):
    """The configurations to try for one kind of attention kernel."""
    found = []
    kind, D = kind.removesuffix("_masked"), sum(importlib.import_module("kernels.attention").columns(K, itemsize)[:2])
    for *blocks, warps, stages in CANDIDATES[kind]:
        if hopeless(kind, D, itemsize, blocks[0], blocks[1] if len(blocks) > 1 else 80, warps, stages, shared):
            continue
        names = ("BLOCK_L", "BLOCK_S") if kind != "short" else ("BLOCK_L",)
        config = dict(zip(names, blocks, strict=True)) | {"num_warps": warps, "num_stages": stages}
        found.append(config | ({"LOOPS": LOOPS} if kind == "short" else {}))
    return found


def calls_of(kind, calls):
    """Those of report.attention_calls() that launch the kernels of `kind`, and the name of that kernel."""
    masked = kind.endswith("_masked") or kind == "backward_bias"
    name = kind.removesuffix("_masked")
    if name == "short":
        return [calls["77 keys"]], "forward_short"
    if name == "forward":
        return [calls[c] for c in (("masked",) if masked else ("plain", "odd length"))], "forward"
    return [calls[c] for c in (("backward masked",) if masked else ("backward", "backward odd"))], name


def static(arch, dtype, K):
    """{kind: configuration} for one head size, by the compiler's report."""
    import torch

    forward_only = not arch.startswith("sm_")
    types = ("bfloat16", "float16") if dtype == "bfloat16" else (dtype,)
    calls = [report.attention_calls(K, getattr(torch, t), forward_only) for t in types]
    chosen = {}
    for kind in KINDS[:3] if forward_only else KINDS:
        sames, name = [call for c in calls for call in calls_of(kind, c)[0]], calls_of(kind, calls[0])[1]
        best = None
        tried = candidates(kind, K, 4 if dtype == "float32" else 2, report.SHARED[arch])
        plain = chosen.get(kind.removesuffix("_masked"))
        for config in tried[tried.index(plain) if plain else 0 :]:  # what masks takes no larger a tile
            shared = spilled = 0
            for call in sames:
                with switch.forced(f"attention.{kind}", config):
                    compiled = report.collect(arch, [call], only=name)
                used = report.resources(arch, compiled[0][2]) if compiled else (0, 0, 0)
                shared, spilled = max(shared, used[1]), max(spilled, used[2])
                if spilled:
                    break
            if not compiled:  # heads of this type and size take another kernel
                break
            if shared > report.SHARED[arch]:
                continue
            if best is None or spilled < best[0]:
                best = (spilled, config)
            if spilled == 0:
                break
        if best:
            chosen[kind] = best[1]
    return chosen


def static_table(archs):
    """The static choice for every head size and type; bf16 and fp16 take the same."""
    jobs = [(a, d, K) for K in reversed(report.HEAD_SIZES) for a in archs for d in ("bfloat16", "float32")]
    table = {arch: {"chosen": "by the compiler's report, not measured"} for arch in archs}
    with concurrent.futures.ProcessPoolExecutor(os.cpu_count(), multiprocessing.get_context("spawn")) as pool:
        for (arch, dtype, K), chosen in zip(jobs, pool.map(static, *zip(*jobs, strict=True)), strict=True):
            print(f"{arch} {dtype} {K}: {chosen}", flush=True)
            for kind, config in chosen.items():
                rows = table[arch].setdefault(f"attention.{kind}", {})
                for name in (dtype, "float16") if dtype == "bfloat16" else (dtype,):
                    rows[f"{K}/{name}"] = config
    return table


# On a GPU ----------------------------------------------------------------------------------------------------


def measured(table, heads, lengths, dtypes):
    """Put the fastest candidates on this GPU, for each head size, length and type, into its part of the table, in place;
    yields after each, so that what was found can be saved."""
    import torch
    import triton

    attention = importlib.import_module("kernels.attention")
    table["measured"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    for dtype in dtypes:
        for K in heads:
            for length in lengths:
                calls = timed_calls(attention, K, length, getattr(torch, dtype))
                for kind in KINDS:
                    if kind in calls:
                        config, took = fastest(kind, calls[kind], attention, K, dtype)
                        keys = attention.keys_of(K, length, getattr(torch, dtype))
                        table.setdefault(f"attention.{kind}", {})[keys[0]] = config
                        table[f"attention.{kind}"][keys[1]] = config  # the longest length serves the unknown ones
                        print(f"{keys[0]} {kind}: {config} {took * 1e3:.0f} µs", flush=True)
                yield


def timed_calls(attention, K, length, dtype):
    """{kind: call} with about as much work for every length."""
    import torch

    N = 8
    B = max(1, 16384 // length)
    q, k, v, dout = (torch.randn(B, length, N, K, dtype=dtype, device="cuda") for _ in range(4))
    out, lse = attention.forward(q, k, v, None, None, K**-0.5, False, 0)
    back = (q, k, v, None, None, out, lse, dout, None, K**-0.5)
    short = [torch.randn(B, 77, N, K, dtype=dtype, device="cuda") for _ in range(2)]
    calls = {
        "forward": lambda: attention.forward(q, k, v, None, None, K**-0.5, False, 0),
        "forward_masked": lambda: attention.forward(q, k, v, None, None, K**-0.5, True, 0),
        "short": lambda: attention.forward(q, *short, None, None, K**-0.5, False, 0),
        "backward_kv": lambda: attention.backward(*back, False, 0, False),
        "backward_q": lambda: attention.backward(*back, False, 0, False),
        "backward_kv_masked": lambda: attention.backward(*back, True, 0, False),
        "backward_q_masked": lambda: attention.backward(*back, True, 0, False),
    }
    if K > 256 or dtype == torch.float32:  # such heads are never held on chip
        calls.pop("short")
    return calls


def fastest(kind, call, attention, K, dtype):
    """(configuration, milliseconds) of the fastest candidate; those that do not fit this GPU are left out."""
    import torch
    import triton

    tried = candidates(kind, K, 4 if dtype == "float32" else 2, 227 << 10)
    if kind.startswith("forward"):  # the copy engine is Hopper's and its successors'
        engines = (False, True) if not torch.version.hip and torch.cuda.get_device_capability()[0] >= 9 else (False,)
        tried = [config | {"TMA": tma} for config in tried for tma in engines]
    best = None
    for config in tried:
        try:
            with switch.forced(f"attention.{kind}", config):
                took = triton.testing.do_bench(call, warmup=5, rep=30, return_mode="median")
        except (triton.errors.TritonError, RuntimeError) as e:  # too large a tile, or one that the compiler refuses
            print(f"  {kind} {config}: {str(e).splitlines()[0]}")
            continue
        if best is None or took < best[1]:
            best = (config, took)
    if best is None:
        raise RuntimeError(f"tune: no configuration of attention.{kind} fits this GPU for head size {K} in {dtype}")
    return best


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--static", nargs="+", metavar="ARCH", choices=TUNED, help="choose without a GPU")
    parser.add_argument("--head", nargs="+", type=int, default=report.HEAD_SIZES, help="head sizes (on a GPU)")
    parser.add_argument("--length", nargs="+", type=int, default=(256, 1024, 4096), help="lengths (on a GPU)")
    parser.add_argument("--dtype", nargs="+", choices=report.DTYPES, default=report.DTYPES[:2], help="types (on a GPU)")
    args = parser.parse_args(argv)
    table = json.loads(switch.TABLE.read_text())
    if args.static:
        os.environ["NANODIFF_KERNELS"] = "triton"
        for arch, rows in static_table(args.static).items():
            table[arch] = rows
    else:
        if switch.UNUSABLE:
            print(f"error: tuning needs a GPU ({switch.UNUSABLE}); --static sm_90 chooses without one", file=sys.stderr)
            return 2
        for _ in measured(table.setdefault(switch.architecture(), {}), args.head, sorted(args.length), args.dtype):
            switch.TABLE.write_text(_lines(table))
    switch.TABLE.write_text(_lines(table))
    return 0


def _lines(table):
    """JSON with a line for each configuration."""
    text = json.dumps(table, indent=1)
    parts, depth = [], 0
    for line in text.splitlines():
        depth += line.count("{") - line.count("}")
        parts.append(line.strip() if depth >= 4 or (depth == 3 and line.strip().startswith("}")) else f"\n{line}")
    return "".join(parts).strip() + "\n"


if __name__ == "__main__":
    sys.exit(main())
