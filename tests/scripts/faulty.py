"""train.py with a fault put into one of its processes: torchrun faulty.py FAULT RANK diffusion …"""

import os
import signal
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[2]))

import train
from nanodiff import commandline, config, data, pipeline
from nanodiff.training import checkpoint, loader


def main():
    fault, rank = sys.argv[1], int(sys.argv[2])
    del sys.argv[1:3]
    sys.argv[0] = "train.py"
    here, calls = int(os.environ.get("RANK", 0)) == rank, [0]

    def at(n, original, act):
        """`original`, but its n-th call acts first, on the one rank."""

        def changed(*args, **kwargs):
            calls[0] += 1
            if here and calls[0] == n:
                act()
            return original(*args, **kwargs)

        return changed

    def fail():
        raise config.UserError("the fault of this test")

    def sleep():
        signal.signal(signal.SIGTERM, signal.SIG_DFL)  # or torchrun would wait for it half a minute before it kills it
        time.sleep(1000)

    def crash():
        raise ZeroDivisionError("a bug of ours")

    if fault == "forward":
        pipeline.Pipeline.denoise = at(3, pipeline.Pipeline.denoise, fail)
    elif fault == "bug":
        pipeline.Pipeline.denoise = at(3, pipeline.Pipeline.denoise, crash)
    elif fault == "kill":
        pipeline.Pipeline.denoise = at(3, pipeline.Pipeline.denoise, lambda: os.kill(os.getpid(), 9))
    elif fault == "sleep":
        pipeline.Pipeline.denoise = at(3, pipeline.Pipeline.denoise, sleep)
    elif fault == "term":
        pipeline.Pipeline.denoise = at(3, pipeline.Pipeline.denoise, lambda: os.kill(os.getpid(), 15))
    elif fault == "data":
        loader.Decoder.one = at(5, loader.Decoder.one, fail)
    elif fault == "save":
        checkpoint.save_tensors = at(1, checkpoint.save_tensors, fail)
    elif fault == "listing" and here:
        data.load = lambda *args, **kwargs: crash()
    elif fault == "nan":
        pipeline.Pipeline.denoise = poisoned(pipeline.Pipeline.denoise, calls, here)
    elif fault == "config" and here:
        sys.argv += ["--lr", "0.5"]
    elif fault == "oom":
        pipeline.Pipeline.denoise = at(3, pipeline.Pipeline.denoise, out_of_memory)
    return commandline.script(train.STAGES, train.__doc__, train.PRESETS, train.LESS_MEMORY)


def out_of_memory():
    import torch

    raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20 GiB")


def poisoned(original, calls, here):
    """The denoiser gives NaN at one rank's third call."""

    def changed(*args):
        calls[0] += 1
        out = original(*args)
        return out * float("nan") if here and calls[0] == 3 else out

    return changed


if __name__ == "__main__":
    sys.exit(main())
