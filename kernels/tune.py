"""Write table.json, the configurations that the kernels start with: `make tune`.

    python -m kernels.tune                         # on a GPU: measure the candidates, keep the fastest
    python -m kernels.tune --static sm_80 sm_90    # without one: by the compiler's report alone

A static choice is the largest tile, in the order of CANDIDATES, whose compiled kernel spills nothing and fits into shared
memory. It is a sound start, not a measurement; the table says which of the two each architecture has.

What is chosen for an attention kernel, and what pulls which way:

    BLOCK_L, BLOCK_S   sides of a tile. Larger: each value that is loaded enters more products. Smaller: more programs at once, and
                       accumulators that fit (65,536 registers of 32 bits a multiprocessor, at most 255 a thread)
    num_warps          4 or 8 warps of 32 threads share a tile: 8 halve what each thread must hold, 4 wait less for each other
    num_stages         how many blocks (of keys; for dk and dv of queries) are under way at once: each hides latency, and takes its place in shared memory
    TMA, SPLIT         Hopper's copy engine or loads by the threads; heads of 40 as 32 + 16 or as 64
    TORCH              not a configuration: one of PyTorch's own attentions was faster, and is taken

Rows are found by head size, length and type (attention_tiles.keys_of), for memory-bound kernels by the width of a row, or by memory format and bytes of a value.
"""

import argparse
import concurrent.futures
import contextlib
import functools
import importlib
import itertools
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
    # fp32 values that live through the loop, beside the scores and their gradient; and rows that are loaded in every round
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
    # a thread's share of them: 255 registers are the limit, some are needed for addresses
    values = (sums[kind] + 2 * rows * keys) / (32 * warps)
    return values > 200 or (moving[kind] * stages * D * itemsize > shared and kind != "short")


def candidates(kind, K, itemsize, shared):
    """The configurations to try for one kind of attention kernel."""
    found = []
    kind, D = (
        kind.removesuffix("_masked"),
        sum(importlib.import_module("kernels.attention_tiles").columns(K, itemsize)[:2]),
    )
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
    """{kind: configuration} for one head size, by the compiler's report: the first candidate that spills nothing, or else that which
    spills least."""
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

# (kind, B, L, N, K, S): the attentions that Stable Diffusion's models have, each row of the table decided on one of them.
SHAPES = (
    ("forward", 2, 4096, 8, 40, 4096), ("short", 2, 4096, 8, 40, 77), ("forward", 2, 4096, 10, 64, 4096),
    ("forward", 2, 1024, 8, 80, 1024), ("short", 2, 1024, 8, 80, 77), ("forward", 2, 1024, 20, 64, 1024),
    ("short", 2, 4096, 10, 64, 77), ("short", 2, 1024, 20, 64, 77), ("forward", 2, 4429, 24, 64, 4429),
    ("forward", 2, 256, 8, 160, 256), ("short", 2, 256, 8, 160, 77), ("forward", 1, 4096, 1, 512, 4096),
    ("forward", 1, 16384, 1, 512, 16384),
    ("backward_kv", 8, 4096, 8, 40, 4096), ("backward_q", 8, 4096, 8, 40, 4096),
    ("backward_kv", 8, 1024, 8, 80, 1024), ("backward_q", 8, 1024, 8, 80, 1024),
    ("backward_kv", 2, 4096, 10, 64, 4096), ("backward_q", 2, 4096, 10, 64, 4096),
)  # fmt: skip
TRIED = {  # (BLOCK_L, BLOCK_S, warps, stages) that are worth a measurement on a large GPU
    "forward": [(128, 128, 8, 3), (128, 128, 8, 2), (128, 64, 4, 3), (128, 64, 4, 2), (128, 64, 8, 3), (64, 128, 4, 3), (64, 64, 4, 3),
                (128, 32, 8, 3)],
    "backward_kv": [(64, 128, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (32, 128, 8, 2), (32, 64, 4, 2), (128, 64, 8, 2)],
    "backward_q": [(128, 64, 8, 2), (64, 64, 4, 2), (64, 64, 4, 3), (64, 64, 8, 2), (64, 32, 4, 3), (128, 32, 8, 2), (64, 128, 8, 2)],
    "short": [(128, 4, 1), (128, 8, 1), (64, 4, 1), (64, 8, 1)],
}  # fmt: skip
WIDE_HEADS = [  # the same for heads above 256, the VAE's
    (64, 64, 4, 2),
    (64, 64, 8, 2),
    (64, 32, 4, 2),
    (64, 32, 8, 2),
    (64, 32, 4, 3),
    (32, 64, 4, 2),
    (128, 32, 8, 2),
]
PICTURES = (  # (B, C, side) before a GroupNorm + SiLU: the UNets' largest, then the VAE's
    (2, 320, 64),
    (2, 960, 64),
    (2, 640, 32),
    (2, 1920, 32),
    (2, 320, 128),
    (1, 512, 64),
    (1, 256, 256),
    (1, 128, 512),
)
# (values of a tile, channels of it, programs to aim for, warps, stages, how much larger a group on chip may be): group_norm.plan()
GROUPS = [{"BLOCK": block, "WIDE": wide, "PROGRAMS": 1056, "num_warps": warps, "STAGES": stages, "WHOLE": whole}
          for block, wide, warps, stages in ((2048, 32, 4, 3), (2048, 64, 4, 3), (4096, 64, 4, 1), (4096, 64, 4, 3), (4096, 64, 8, 3),
                                             (8192, 64, 8, 3), (8192, 128, 8, 3)) for whole in (1, 2)]  # fmt: skip


# Kernels that move memory, all of whose calls of one key share a row: {name: ({key: shapes}, configurations)}
WARPS = [
    {"TILE": tile, "num_warps": warps}
    for tile, warps in ((1024, 2), (2048, 2), (2048, 4), (4096, 4), (4096, 8), (8192, 8))
]
MOVERS = {
    "norms.layer": ({"512": [(2, 4096, 320)], "1024": [(2, 1024, 640), (2, 4096, 640)],
                     "2048": [(2, 256, 1280), (2, 1024, 1280), (2, 4096, 1536)]}, WARPS),
    "gated": ({"2048": [(2, 4096, 1280)], "4096": [(2, 1024, 2560), (2, 4096, 2560)], "8192": [(2, 256, 5120), (2, 1024, 5120)]},
              [{"BLOCK": block, "num_warps": warps} for block, warps in
               ((256, 1), (512, 1), (512, 2), (1024, 2), (1024, 4), (2048, 4), (2048, 8))]),
    "add_bias": ({"2": [(2, 320, 64), (2, 640, 32), (2, 1280, 16), (2, 320, 128), (1, 128, 512)]},
                 [{"BLOCK": block, "num_warps": warps} for block, warps in ((512, 2), (1024, 2), (1024, 4), (2048, 4), (4096, 8))]),
}  # fmt: skip


def mover(name, shape):
    """(a function that makes the inputs, the call) of one kernel of MOVERS."""
    import torch

    def r(*shape):
        return torch.randn(shape, dtype=torch.bfloat16, device="cuda")

    if name == "gated":
        gated, (B, L, D) = importlib.import_module("kernels.gated"), shape
        return lambda: (r(B * L, 2 * D),), lambda x: gated.halves_forward(x, "gelu")
    residual = importlib.import_module("kernels.residual")
    if name == "add_bias":
        B, C, side = shape
        bias = r(C)
        return (lambda: tuple(r(B, C, side, side).to(memory_format=torch.channels_last) for _ in range(2))), (
            lambda y, x: residual.bias_forward(y, bias, x)
        )
    gain = r(shape[-1])
    return lambda: (r(*shape), r(*shape)), lambda x, y: residual.residual_forward(
        x, y, None, None, None, gain, gain, None, 1e-5, False
    )


def tried(kind, K, engines=(False, True)):
    """The configurations to measure for one row."""
    found = []
    for *blocks, warps, stages in WIDE_HEADS if K > 256 else TRIED[kind]:
        config = dict(zip(("BLOCK_L", "BLOCK_S"), blocks, strict=False)) | {"num_warps": warps, "num_stages": stages}
        if kind == "short":
            found += [config | {"LOOPS": loops} for loops in (1, 2)]
        elif kind == "forward":
            splits = (True, False) if K == 40 else (True,)
            found += [config | {"TMA": tma, "SPLIT": split} for tma in engines for split in splits]
        else:
            found.append(config)
    return found


def inputs(kind, B, L, N, K, S):
    """A function that makes the inputs of one call, and the call."""
    import torch

    forward = importlib.import_module("kernels.attention_forward").forward
    backward = importlib.import_module("kernels.attention_backward").backward

    def r(length):
        return torch.randn(B, length, N, K, dtype=torch.bfloat16, device="cuda")

    if not kind.startswith("backward"):
        return (lambda: (r(L), r(S), r(S))), lambda q, k, v: forward(q, k, v, None, None, K**-0.5, False, 0)

    def make():
        q, k, v, dout = r(L), r(S), r(S), r(L)
        return q, k, v, *forward(q, k, v, None, None, K**-0.5, False, 0), dout

    def call(q, k, v, out, lse, dout):
        return backward(q, k, v, None, None, out, lse, dout, None, K**-0.5, False, 0, False)

    return make, call


def compile_one(job):
    """Compile one candidate, in a process of its own; what refuses to compile says so when it is measured."""
    kind, shape, config = job
    with contextlib.suppress(Exception):
        if kind == "group_norm":
            make, call = pictures(*shape)
        else:
            make, call = mover(kind, shape) if kind in MOVERS else inputs(kind, *shape)
        with switch.forced(kind if kind in (*MOVERS, "group_norm") else f"attention.{kind}", config):
            call(*make())


def pictures(B, C, side):
    """(a function that makes the input, the call) of GroupNorm + SiLU on channels-last pictures."""
    import torch

    groups = importlib.import_module("kernels.group_norm")
    weight = torch.randn(C, dtype=torch.bfloat16, device="cuda")

    def make():
        x = torch.randn(B, C, side, side, dtype=torch.bfloat16, device="cuda")
        return (x.to(memory_format=torch.channels_last),)

    return make, lambda x: groups.forward(x, weight, weight, None, 32, 1e-5, True)


def theirs(which):
    """One of PyTorch's own attentions (attention.FUSED)."""
    from torch.nn.attention import sdpa_kernel

    import kernels

    def call(q, k, v):
        with kernels.backend("torch"), sdpa_kernel(sys.modules["kernels.attention"].FUSED[which]):
            return kernels.attention(q, k, v)

    return call


def day(path, shapes=SHAPES):
    """Measure every row on this GPU, write the table to `path` after each, and yield what was found.

    Times are those of CUDA graphs over inputs that do not fit in the L2 cache (bench.graphed). Candidates are compiled beforehand by
    up to 14 processor cores: compiling takes a second or more each, measuring some milliseconds.
    """
    import torch
    import triton

    table = json.loads(switch.TABLE.read_text())
    arch = table.setdefault(switch.architecture(), {})
    arch["measured"] = f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {triton.__version__}"
    # from sm_90 on there is a copy engine
    engines = (False, True) if not torch.version.hip and torch.cuda.get_device_capability()[0] >= 9 else (False,)
    jobs = [(kind, shape, config) for kind, *shape in shapes for config in tried(kind, shape[3], engines)]
    jobs += [("group_norm", shape, config) for shape in PICTURES for config in GROUPS]
    jobs += [
        (name, s, c)
        for name, (keys, configs) in MOVERS.items()
        for shapes_ in keys.values()
        for s in shapes_
        for c in configs
    ]
    with concurrent.futures.ProcessPoolExecutor(min(14, os.cpu_count()), multiprocessing.get_context("spawn")) as pool:
        list(pool.map(compile_one, jobs, chunksize=4))
    for row in itertools.chain(attention_day(arch, shapes, engines), movers_day(arch), group_norm_day(arch)):
        path.write_text(_lines(table))
        yield row


def quickest(call, sets, name, configs):
    """[milliseconds of the call under each configuration of the kernel `name`, or None where that was refused]."""
    from kernels import bench

    took = []
    for config in configs:
        with switch.forced(name, config):
            took.append(bench.attempt(functools.partial(bench.graphed, replays=10), call, sets))
    return took


def attention_day(arch, shapes, engines):
    """Fill the attention rows of `arch`, a table's part, and yield what was measured.

    Where one of PyTorch's own attentions is faster, the row says which ("TORCH") beside our fastest, and attention() takes that.
    """
    import torch

    from kernels import bench

    fused = importlib.import_module("kernels.attention").FUSED
    keys_of = importlib.import_module("kernels.attention_tiles").keys_of
    for kind, *shape in shapes:
        B, L, N, K, S = shape
        make, call = inputs(kind, *shape)
        sets, configs = bench.sets(make), tried(kind, K, engines)
        took = {i: t for i, t in enumerate(quickest(call, sets, f"attention.{kind}", configs)) if t}
        row = {"case": f"{kind} {B}x{L}x{N}x{K}, {S} keys"}
        if not took:
            yield row | {"found": "nothing fits"}
            continue
        best = min(took, key=took.get)
        config, ours = dict(configs[best]), took[best]
        row |= {"us": ours * 1e3, "config": str(config)}
        if not kind.startswith("backward"):
            quick = functools.partial(bench.graphed, replays=10)
            peers = {w: t for w in fused if (t := bench.attempt(quick, theirs(w), sets))}
            fastest = min(peers, key=peers.get, default=None)
            row |= {"tflops": 4 * B * N * L * S * K / ours / 1e9}
            if fastest:
                row |= {"best": fastest, "best_us": peers[fastest] * 1e3, "ratio": peers[fastest] / ours}
                if peers[fastest] < 0.97 * ours:  # less is noise
                    config["TORCH"] = fastest
        keys = keys_of(K, S if kind != "short" and not kind.startswith("backward_kv") else L, torch.bfloat16)
        for key in keys:
            for dtype in ("bfloat16", "float16"):  # as wide as each other, so as fast
                arch.setdefault(f"attention.{kind}", {})[key.replace("bfloat16", dtype)] = config
        yield row


def movers_day(arch):
    """Fill the rows of MOVERS, one for all shapes that share it: the configuration that loses least over them."""
    from kernels import bench

    for name, (keys, configs) in MOVERS.items():
        for key, several in keys.items():
            took = {}
            for shape in several:
                make, call = mover(name, shape)
                times = quickest(call, bench.sets(make), name, configs)
                took |= {(shape, i): t or 1e9 for i, t in enumerate(times)}
            chosen, loss = fairest(took, several, len(configs))
            arch.setdefault(name, {})[key] = configs[chosen]
            best = [round(took[s, chosen] * 1e3, 1) for s in several]
            yield {"case": f"{name} {key}", "us": str(best), "config": str(configs[chosen]), "loss": loss}


def group_norm_day(arch):
    """Fill the one row of GroupNorm, and yield for each picture the three fastest with the rate at which memory was moved."""
    from kernels import bench

    took = {}
    for shape in PICTURES:
        make, call = pictures(*shape)
        times = [t or 1e9 for t in quickest(call, bench.sets(make), "group_norm", GROUPS)]
        took |= {(shape, i): t for i, t in enumerate(times)}
        order = sorted(range(len(GROUPS)), key=times.__getitem__)
        moved = 4 * shape[0] * shape[1] * shape[2] ** 2  # bytes: read once and written once, two each
        yield {"case": f"group_norm {shape}", "us": times[order[0]] * 1e3, "gb_s": moved / times[order[0]] / 1e6,
               "first": str([(round(times[i] * 1e3, 1), tuple(GROUPS[i].values())) for i in order[:3]])}  # fmt: skip
    chosen, loss = fairest(took, PICTURES, len(GROUPS))
    arch.setdefault("group_norm", {})["channels_last/2"] = GROUPS[chosen]
    yield {"case": "group_norm", "chosen": str(GROUPS[chosen]), "loss": loss}


def fairest(took, shapes, n):
    """(which of n configurations loses least against each shape's own best, how much on average) for took[shape, i]."""
    best = {s: min(took[s, i] for i in range(n)) for s in shapes}
    loss = [sum(took[s, i] / best[s] for s in shapes) / len(shapes) for i in range(n)]
    return min(range(n), key=loss.__getitem__), min(loss)


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.tune", description=__doc__.split("\n")[0])
    parser.add_argument("--static", nargs="+", metavar="ARCH", choices=TUNED, help="choose without a GPU")
    args = parser.parse_args(argv)
    if args.static:
        os.environ["NANODIFF_KERNELS"] = "triton"
        table = json.loads(switch.TABLE.read_text())
        for arch, rows in static_table(args.static).items():
            table[arch] = rows
        switch.TABLE.write_text(_lines(table))
        return 0
    if switch.UNUSABLE:
        print(f"error: tuning needs a GPU ({switch.UNUSABLE}); --static sm_90 chooses without one", file=sys.stderr)
        return 2
    for row in day(switch.TABLE):
        print(row, flush=True)
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
