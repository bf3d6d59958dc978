"""What the host does for a kernel, without a GPU: `make bench-host`.

    python benchmarks/host.py [--calls 2000]

Everything from the public function to the driver runs as it does on a GPU; the driver is a stub that launches nothing. The
scale is torch.add of the same tensors' first elements, the cheapest call that PyTorch has. Microseconds per call, median of
five runs; also what a call costs the first time its shapes are seen, compilation aside.
"""

import argparse
import os
import statistics
import sys
import time
import types
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent))
os.environ["NANODIFF_KERNELS"] = "triton"  # import Triton although there is no GPU


def stub():
    """Kernels whose launches do nothing, on CPU tensors that pass for a GPU's."""
    import triton
    from triton.runtime.jit import JITFunction

    from kernels import switch

    code = types.SimpleNamespace(function=0, packed_metadata=(), run=lambda *args: None)
    JITFunction.__getitem__ = lambda kernel, grid: lambda *args, **kwargs: code
    driver = types.SimpleNamespace(get_current_device=lambda: 0, get_current_stream=lambda device: 0)
    triton.runtime.driver.set_active(driver)
    switch.INTERPRET, switch.UNUSABLE = True, None
    switch.set_target("sm_90")


def per_call(call, calls):
    """Median microseconds."""
    taken = []
    for _ in range(5):
        start = time.perf_counter()
        for _ in range(calls):
            call()
        taken.append((time.perf_counter() - start) / calls * 1e6)
    return statistics.median(taken)


def main():
    from nanodiff.commandline import at_least

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--calls", type=at_least(1), default=2000)
    args = parser.parse_args()
    stub()
    import torch

    import kernels
    from kernels import launch

    def r(*shape):
        return torch.empty(shape, dtype=torch.bfloat16)

    q, text, x, rows = r(2, 64, 8, 40), r(2, 77, 8, 40), r(2, 320, 8, 8), r(2, 64, 320)
    x, large = x.to(memory_format=torch.channels_last), r(2, 320, 64, 64).to(memory_format=torch.channels_last)
    w, w320, wide, shift, one = r(320), r(320), r(2, 64, 2560), r(2, 320), r(4)
    calls = {
        "attention, self": lambda: kernels.attention(q, q, q),
        "attention, 77 keys": lambda: kernels.attention(q, text, text),
        "group_norm, one launch": lambda: kernels.group_norm(x, 32, w, w, silu=True, shift=shift),
        "group_norm, three launches": lambda: kernels.group_norm(large, 32, w, w, silu=True, shift=shift),
        "layer_norm": lambda: kernels.layer_norm(rows, w320, w320),
        "residual_norm": lambda: kernels.residual_norm(rows, rows, weight=w320, bias=w320),
        "add_bias": lambda: kernels.add_bias(x, w, x),
        "geglu": lambda: kernels.geglu(wide),
    }
    with torch.no_grad(), kernels.backend("triton"):
        scale = per_call(lambda: torch.add(one, one), args.calls)
        print(f"torch.add {scale:.2f} us a call")
        for name, call in calls.items():
            launch.forget()
            start = time.perf_counter()
            call()
            first = (time.perf_counter() - start) * 1e6
            took = per_call(call, args.calls)
            print(f"{name:28s} {took:6.1f} us, {took / scale:5.1f} x torch.add, first {first:6.0f} us", flush=True)


if __name__ == "__main__":
    main()
