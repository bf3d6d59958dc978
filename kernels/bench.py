"""Our kernels beside PyTorch's, on a GPU: `make bench-gpu`.

    python -m kernels.bench [--only attention] [--output benchmarks]

Every shape is one that a model really has. Columns: ours; the best of PyTorch's fused attentions (flash, cuDNN,
efficient), with its name; PyTorch as written (eager); torch.compile. Each is captured into a CUDA graph over several sets
of inputs, together four times as large as the L2 cache, and the median of many replays is taken; backward passes, which
autograd launches itself, are timed by events. The ceilings (a large bf16 matrix product, a large copy) are measured in
the same run. Writes GPU.json and GPU.md, GPU being the device's name.

Why so: a call that takes ten microseconds is launched in longer than that, so calls are captured and replayed, or the host would be
measured; inputs that were used before lie in the L2 cache, where no model would find them; a single time says little, since clocks
move. Operations are counted as the mathematics has them, 4 B N L S K for an attention's forward pass (half of that if causal, 2.5 times that backward), bytes as what must be
read and written once: the rate is that of useful work, and can be held against the ceiling.
"""

import argparse
import contextlib
import json
import statistics
import sys
import time
from pathlib import Path
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch._dynamo import config as dynamo_config
from torch._functorch import config as functorch_config
from torch.nn.attention import sdpa_kernel

import kernels
from kernels import switch

functorch_config.donated_buffer = False  # a backward pass is timed many times over one forward
dynamo_config.fail_on_recompile_limit_hit = True  # or eager PyTorch would be timed as "compiled"
FUSED = sys.modules["kernels.attention"].FUSED
COMPILED_SCORES = 1 << 28  # eager attention writes its scores: above so many it is not tried


class Attention(NamedTuple):
    """One attention of a model. M: heads of k and v; S: keys, L of them when None."""

    where: str
    B: int
    L: int
    N: int
    K: int
    S: int | None = None
    M: int | None = None
    causal: bool = False
    bias: bool = False
    window: int = 0
    train: bool = True


# Lengths L are those of the latents a model's levels have: 64 × 64 = 4,096 at 512 px, a quarter of it a level below, and so on; text is
# 77 tokens for CLIP, 77 + 256 more beside the picture's in SD 3.5 (4,096 + 333 = 4,429). Batches of 2 are one guided picture.
ATTENTION = [
    *(Attention(f"SD 1.5 {s} px self", 2, L, 8, K) for s, L, K in ((512, 4096, 40), (512, 1024, 80), (512, 256, 160), (512, 64, 160))),
    *(Attention(f"SD 1.5 {s} px text", 2, L, 8, K, S=77) for s, L, K in ((512, 4096, 40), (512, 1024, 80), (512, 256, 160))),
    *(Attention(f"SD 2.1 {s} px self", 2, L, N, 64) for s, L, N in ((768, 9216, 5), (768, 2304, 10), (768, 576, 20))),
    Attention("SD 2.1 768 px text", 2, 9216, 5, 64, S=77),
    *(Attention(f"SDXL {s} px self", 2, L, N, 64) for s, L, N in ((1024, 4096, 10), (1024, 1024, 20))),
    *(Attention(f"SDXL {s} px text", 2, L, N, 64, S=77) for s, L, N in ((1024, 4096, 10), (1024, 1024, 20))),
    Attention("SD 3.5 medium 1024 px joint", 2, 4429, 24, 64),
    Attention("SD 3.5 medium 1024 px second", 2, 4096, 24, 64),
    Attention("SD 3.5 large 1024 px joint", 2, 4429, 38, 64),
    Attention("VAE 512 px", 1, 4096, 1, 512, train=False),
    Attention("VAE 1024 px", 1, 16384, 1, 512, train=False),
    Attention("T5-XXL 256 tokens", 2, 256, 64, 64, bias=True, train=False),
    Attention("CLIP bigG", 2, 77, 20, 64, causal=True),
    Attention("LLaMA 1B 1024 tokens", 8, 1024, 32, 64, M=8, causal=True),
    Attention("LLaMA 3B 1024 tokens", 8, 1024, 24, 128, M=8, causal=True),
    Attention("Gemma 3 1B local", 8, 1024, 4, 256, M=1, causal=True, window=512),
    Attention("ViT-B/16", 8, 197, 12, 64),
]  # fmt: skip
PICTURES = [  # [B, C, H, W] before a GroupNorm + SiLU, 32 groups
    ("SD 1.5 512 px", 2, 320, 64), ("SD 1.5 512 px", 2, 960, 64), ("SD 1.5 512 px", 2, 640, 32),
    ("SD 1.5 512 px", 2, 1280, 16), ("SD 1.5 512 px", 2, 2560, 8), ("SDXL 1024 px", 2, 320, 128),
    ("SDXL 1024 px", 2, 1920, 32), ("VAE 512 px", 1, 512, 64), ("VAE 512 px", 1, 256, 256), ("VAE 512 px", 1, 128, 512),
    ("VAE 1024 px", 1, 256, 1024), ("VAE 1024 px", 1, 128, 1024), ("training, 16 images", 16, 320, 64),
]  # fmt: skip
# [B, L, D] before a LayerNorm, and before a gate (D of each half)
ROWS = [("SD 1.5", 2, 4096, 320), ("SDXL", 2, 1024, 1280), ("SD 3.5 medium", 2, 4096, 1536), ("SD 3.5 large", 2, 4096, 2432),
        ("T5-XXL", 2, 512, 4096), ("LLaMA 1B", 8, 1024, 2048)]  # fmt: skip
GATES = [("SD 1.5", 2, 4096, 1280), ("SDXL", 2, 1024, 5120), ("T5-XXL", 2, 512, 10240), ("LLaMA 1B", 8, 1024, 8192)]


# Timing ------------------------------------------------------------------------------------------------------


def sets(make, at_least=4):
    """Several sets of inputs, together four times as large as the L2 cache."""
    first = make()
    size = sum(t.numel() * t.element_size() for t in first if t is not None)
    cache = torch.cuda.get_device_properties().L2_cache_size
    return [first] + [make() for _ in range(min(64, max(at_least, -(-4 * cache // size))) - 1)]


def graphed(call, inputs, replays=20):
    """Median milliseconds of call(*one set), from a CUDA graph that goes through all of them."""
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        for one in inputs[:2]:
            call(*one)
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph, stream=stream):
        for one in inputs:
            call(*one)
    return median(graph.replay, replays) / len(inputs)


def median(run, repeats):
    """Median milliseconds of run(), by events, after a warm-up."""
    for _ in range(3):
        run()
    taken = []
    for _ in range(repeats):
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        run()
        after.record()
        after.synchronize()
        taken.append(before.elapsed_time(after))
    return statistics.median(taken)


def backward(call, inputs, repeats=20):
    """Median milliseconds of the backward pass of call(*one set)."""
    tapes = []
    for one in inputs[:8]:
        leaves = [t.detach().requires_grad_() for t in one]
        out = call(*leaves)
        tapes.append((out, leaves, torch.randn_like(out)))

    def run():
        for out, leaves, g in tapes:
            torch.autograd.grad(out, leaves, g, retain_graph=True)

    return median(run, repeats) / len(tapes)


def ceilings():
    """(TFLOP/s of a large bf16 matrix product, GB/s of a large copy, read and written)."""
    a, b = (torch.randn(8192, 8192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    flops = 2 * 8192**3 / median(lambda: a @ b, 20) / 1e9
    source = torch.randn(1 << 28, device="cuda")
    target = torch.empty_like(source)
    return flops, 2 * source.numel() * 4 / median(lambda: target.copy_(source), 20) / 1e6


def compiled(call):
    """torch.compile(call), for one shape."""
    torch._dynamo.reset()
    return torch.compile(call, dynamic=False)


def attempt(timed, run, inputs):
    """Milliseconds of run, or None with a line where this GPU or PyTorch refuses."""
    try:
        return timed(run, inputs)
    except (RuntimeError, switch.triton.errors.TritonError) as e:
        print(f"    refused: {str(e).splitlines()[0][:100]}")
        return None


# The three families ------------------------------------------------------------------------------------------


# Each yields rows: what it is, `work` (operations or bytes) and its unit, and milliseconds of ours and of each peer


def attention_rows(dtype):
    """Every attention of ATTENTION, forward and backward, beside each of PyTorch's fused ones and the formula as written."""
    for a in ATTENTION:
        S, M = a.S or a.L, a.M or a.N

        def make(a=a, S=S, M=M):
            q, k, v = (torch.randn(a.B, n, h, a.K, device="cuda", dtype=dtype) for n, h in ((a.L, a.N), (S, M), (S, M)))
            return q, k, v

        inputs = sets(make)
        bias = torch.randn(1, a.N, a.L, S, device="cuda", dtype=dtype) if a.bias else None
        seen = a.L * S / 2 if a.causal else a.L * S
        flops = 4 * a.B * a.N * a.K * (min(seen, a.L * a.window) if a.window else seen)

        def ours(q, k, v, a=a, bias=bias):
            with kernels.backend("triton"):
                return kernels.attention(q, k, v, causal=a.causal, bias=bias, window=a.window)

        def plain(q, k, v, a=a, bias=bias):
            with kernels.backend("torch"):
                return kernels.attention(q, k, v, causal=a.causal, bias=bias, window=a.window)

        def fused(which, plain=plain):
            def call(q, k, v):
                with sdpa_kernel(FUSED[which]):
                    return plain(q, k, v)

            return call

        def eager(q, k, v, a=a, bias=bias):
            reference = sys.modules["kernels.attention"].attention_reference
            return reference(q, k, v, a.causal, bias=bias, window=a.window)[0]

        small = a.B * a.N * a.L * S <= COMPILED_SCORES
        for direction, timed, times in (("forward", graphed, 1), ("backward", backward, 2.5)):
            if direction == "backward" and not a.train:
                continue
            peers = {n: t for n in FUSED if (t := attempt(timed, fused(n), inputs))}
            best = min(peers, key=peers.get, default=None)
            yield {
                "kernel": "attention", "direction": direction, "where": a.where, "dtype": str(dtype)[6:],
                "shape": f"{a.B}x{a.L}x{a.N}x{a.K}" + (f", {S} keys" if a.S else ""), "work": flops * times, "unit": "TFLOP/s",
                "ours": attempt(timed, ours, inputs), "best": peers.get(best), "best_is": best, "fused": peers,
                "eager": attempt(timed, eager, inputs) if small else None,
                "compiled": attempt(timed, compiled(eager), inputs) if small else None,
            }  # fmt: skip


def elementwise(kernel, where, shape, make, call, forward_bytes, backward_bytes, dtype):
    """Rows of one memory-bound operator: call(*inputs) under the switch, forward and backward. forward_bytes, backward_bytes: what must
    be moved at least, each tensor once."""

    def under(mode):
        def run(*one):
            with kernels.backend(mode):
                return call(*one)

        return run

    inputs = sets(make)
    with_compiler = compiled(under("torch"))
    for direction, timed, moved in (("forward", graphed, forward_bytes), ("backward", backward, backward_bytes)):
        row = {"kernel": kernel, "direction": direction, "where": where, "shape": shape, "dtype": str(dtype)[6:],
               "work": moved, "unit": "GB/s", "best": None, "best_is": None}  # fmt: skip
        for name, run in (("ours", under("triton")), ("eager", under("torch")), ("compiled", with_compiler)):
            row[name] = attempt(timed, run, inputs)
        yield row


def group_norm_rows(dtype):
    """GroupNorm + SiLU of every picture in both memory formats: 2 passes over it forward, 3 backward."""
    for where, B, C, side in PICTURES:
        weight, bias = (torch.randn(C, device="cuda", dtype=dtype) for _ in range(2))
        for layout, fmt in (("channels last", torch.channels_last), ("contiguous", torch.contiguous_format)):

            def make(B=B, C=C, side=side, fmt=fmt):
                return (torch.randn(B, C, side, side, device="cuda", dtype=dtype).to(memory_format=fmt),)

            def call(x, weight=weight, bias=bias):
                return kernels.group_norm(x, 32, weight, bias, 1e-5, silu=True)

            size = B * C * side * side * dtype.itemsize
            yield from elementwise("group_norm", f"{where}, {layout}", f"{B}x{C}x{side}x{side}", make, call, 2 * size,
                                   3 * size, dtype)  # fmt: skip


def row_rows(dtype):
    """The row norms, and the gated units."""
    for where, B, L, D in ROWS:
        weight, shift = torch.randn(D, device="cuda", dtype=dtype), torch.randn(B, D, device="cuda", dtype=dtype)
        size = B * L * D * dtype.itemsize

        def make(B=B, L=L, D=D):
            return (torch.randn(B, L, D, device="cuda", dtype=dtype),)

        for kernel, call in (
            ("layer_norm", lambda x, w=weight: kernels.layer_norm(x, w, w)),
            ("adaLN", lambda x, s=shift: kernels.layer_norm(x, scale=s, shift=s)),
            ("rms_norm", lambda x, w=weight: kernels.rms_norm(x, w)),
        ):
            yield from elementwise(kernel, where, f"{B}x{L}x{D}", make, call, 2 * size, 3 * size, dtype)
    for where, B, L, D in GATES:
        size = B * L * D * dtype.itemsize

        def make(B=B, L=L, D=D):
            return (torch.randn(B, L, 2 * D, device="cuda", dtype=dtype),)

        yield from elementwise("geglu", where, f"{B}x{L}x{2 * D}", make, kernels.geglu, 3 * size, 5 * size, dtype)


def loss_rows(dtype):
    """Linear layer and cross-entropy of a captioner's vocabulary, with the peak of memory, which is what it is for."""
    T, D, V = 4096, 2048, 128256
    weight, target = torch.randn(V, D, device="cuda", dtype=dtype) * D**-0.5, torch.randint(0, V, (T,), device="cuda")

    def make():
        return torch.randn(T, D, device="cuda", dtype=dtype), weight

    def ours(x, weight):
        with kernels.backend("triton"):
            return kernels.linear_cross_entropy(x, weight, target)

    def eager(x, weight):
        return F.cross_entropy((x @ weight.T).float(), target)

    inputs = sets(make, at_least=2)[:2]
    for direction, timed, products in (("forward", graphed, 1), ("backward", backward, 2)):
        torch.cuda.reset_peak_memory_stats()
        took = attempt(timed, ours, inputs)
        peak = torch.cuda.max_memory_allocated()
        yield {
            "kernel": "linear_cross_entropy", "direction": direction, "where": "LLaMA 1B", "shape": f"{T}x{D}, {V} words",
            "dtype": str(dtype)[6:], "work": 2 * T * D * V * products, "unit": "TFLOP/s", "ours": took, "best": None,
            "best_is": None, "eager": attempt(timed, eager, inputs), "peak_memory": peak,
            "compiled": attempt(timed, compiled(eager), inputs),
        }  # fmt: skip


FAMILIES = {"attention": attention_rows, "group_norm": group_norm_rows, "rows": row_rows, "loss": loss_rows}


# The table ---------------------------------------------------------------------------------------------------


def line(row, ceiling):
    """One row of the Markdown table."""

    def ms(value):
        return "–" if value is None else f"{value * 1e3:.0f}"

    rate = row["work"] / row["ours"] / (1e9 if row["unit"] == "TFLOP/s" else 1e6) if row["ours"] else 0.0
    best = ms(row["best"]) + (f" {row['best_is']}" if row["best_is"] else "")
    peer = min((t for t in (row["best"], row["eager"] if row["best"] is None else None) if t), default=None)
    ratio = f"{peer / row['ours']:.2f}" if peer and row["ours"] else "–"
    return (
        f"| {row['kernel']} {row['direction']} | {row['where']} | {row['shape']} | {ms(row['ours'])} | {best} | "
        f"{ms(row['eager'])} | {ms(row['compiled'])} | {ratio} | {rate:.0f} {row['unit']} | {100 * rate / ceiling:.0f} % |"
    )


def main(argv=None):
    parser = argparse.ArgumentParser(prog="python -m kernels.bench", description=__doc__.split("\n")[0])
    parser.add_argument("--only", nargs="+", choices=FAMILIES, default=list(FAMILIES))
    parser.add_argument("--dtype", choices=("bfloat16", "float16", "float32"), default="bfloat16")
    parser.add_argument("--output", default="benchmarks", help="folder for GPU.json and GPU.md")
    args = parser.parse_args(argv)
    if switch.UNUSABLE or not torch.cuda.is_available():
        print(f"error: the benchmark needs a GPU ({switch.UNUSABLE or 'no CUDA device'})", file=sys.stderr)
        return 2
    gpu = torch.cuda.get_device_name().removeprefix("NVIDIA ").lower().replace(" ", "-")
    flops, bandwidth = ceilings()
    head = (
        f"{torch.cuda.get_device_name()}, torch {torch.__version__}, Triton {switch.triton.__version__}, {args.dtype}. Ceilings "
        f"of this run: {flops:.0f} TFLOP/s, copy {bandwidth:.0f} GB/s. Times in µs; the ratio is to the best fused attention, "
        "else to eager PyTorch (above 1: ours is faster)."
    )
    lines = [head, "", "| kernel | where | shape | ours | best fused | eager | compiled | ratio | ours' rate | of ceiling |",
             "|---|---|---|---|---|---|---|---|---|---|"]  # fmt: skip
    print("\n".join(lines))
    everything, began = [], time.time()
    folder = Path(args.output)
    folder.mkdir(parents=True, exist_ok=True)
    for family in args.only:
        for row in FAMILIES[family](getattr(torch, args.dtype)):
            everything.append(row)
            lines.append(line(row, flops if row["unit"] == "TFLOP/s" else bandwidth))
            print(lines[-1], flush=True)
        write(folder / gpu, lines, everything, flops, bandwidth, argv or sys.argv[1:], time.time() - began)
    print(f"{folder / gpu}.json and .md, {time.time() - began:.0f} s")
    return 0


def day(seconds=70):
    """The rows that say most, one after the other until the time is up: our forward passes beside the fastest of PyTorch's, and
    a few backward passes."""
    began, dtype = time.time(), torch.bfloat16
    wanted = {"SD 1.5 512 px self", "SD 1.5 512 px text", "SDXL 1024 px self", "SDXL 1024 px text", "SD 3.5 medium 1024 px joint",
              "VAE 512 px", "VAE 1024 px"}  # fmt: skip
    for a in (a for a in ATTENTION if a.where in wanted):
        S = a.S or a.L
        inputs = sets(
            lambda a=a, S=S: tuple(torch.randn(a.B, n, a.N, a.K, device="cuda", dtype=dtype) for n in (a.L, S, S))
        )

        def call(mode, which=None):
            def run(q, k, v):
                with kernels.backend(mode), sdpa_kernel(FUSED[which]) if which else contextlib.nullcontext():
                    return kernels.attention(q, k, v)

            return run

        with torch.no_grad():
            ours = attempt(graphed, call("triton"), inputs)
            peers = {n: t for n in FUSED if (t := attempt(graphed, call("torch", n), inputs))}
        best = min(peers, key=peers.get, default=None)
        yield {"case": f"attention {a.where} {a.L}x{a.N}x{a.K}" + (f", {S} keys" if a.S else ""), "us": (ours or 0) * 1e3,
               "tflops": 4 * a.B * a.N * a.K * a.L * S / (ours or 1e9) / 1e9, "best": best, "best_us": (peers.get(best) or 0) * 1e3,
               "ratio": (peers.get(best) or 0) / (ours or 1e9)}  # fmt: skip
        if time.time() - began > seconds:
            return
    rows = [("group_norm", f"{w} {B}x{C}x{s}x{s}", (lambda B=B, C=C, s=s: (torch.randn(B, C, s, s, device="cuda", dtype=dtype)
             .to(memory_format=torch.channels_last),)), C, 4 * B * C * s * s) for w, B, C, s in PICTURES[:12]]  # fmt: skip
    for kernel, shape, make, C, moved in rows:
        weight = torch.randn(C, device="cuda", dtype=dtype)
        yield _beside(f"{kernel} {shape}", make, lambda x, w=weight: kernels.group_norm(x, 32, w, w, silu=True), moved)
        if time.time() - began > seconds:
            return
    for where, B, L, D in ROWS[:4]:
        weight, make = (
            torch.randn(D, device="cuda", dtype=dtype),
            lambda B=B, L=L, D=D: (torch.randn(B, L, D, device="cuda", dtype=dtype),),
        )
        yield _beside(
            f"layer_norm {where} {B}x{L}x{D}", make, lambda x, w=weight: kernels.layer_norm(x, w, w), 4 * B * L * D
        )
    for where, B, L, D in GATES[:2]:
        make = lambda B=B, L=L, D=D: (torch.randn(B, L, 2 * D, device="cuda", dtype=dtype),)  # noqa: E731
        yield _beside(f"geglu {where} {B}x{L}x{2 * D}", make, kernels.geglu, 6 * B * L * D)


def _beside(case, make, call, moved):
    """A row of a memory-bound operator: ours and PyTorch's as written."""
    inputs = sets(make)

    def under(mode):
        def run(*one):
            with kernels.backend(mode):
                return call(*one)

        return run

    with torch.no_grad():
        ours, eager = (attempt(graphed, under(mode), inputs) for mode in ("triton", "torch"))
    return {"case": case, "us": (ours or 0) * 1e3, "gb_s": moved / (ours or 1e9) / 1e6, "torch_us": (eager or 0) * 1e3,
            "ratio": (eager or 0) / (ours or 1e9)}  # fmt: skip


def write(stem, lines, rows, flops, bandwidth, argv, seconds):
    """What is known so far, as JSON and as a table: after every family, so that a run which is cut off leaves what it found."""
    facts = {"device": torch.cuda.get_device_name(), "torch": torch.__version__, "triton": switch.triton.__version__,
             "command": " ".join(["python -m kernels.bench", *argv]), "tflops": flops, "copy_gb_s": bandwidth,
             "seconds": round(seconds), "rows": rows}  # fmt: skip
    Path(f"{stem}.json").write_text(json.dumps(facts, indent=1) + "\n")
    Path(f"{stem}.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    sys.exit(main())
