"""Shared by the tests: where the recordings are, how to compare, how to run a script."""

import contextlib
import io
import json
import shutil
import signal
import subprocess
import sys
import zlib
from pathlib import Path

import forks
import pytest
import torch
from safetensors.torch import load_file
from torch.utils.data._utils import signal_handling

from nanodiff import commandline

ROOT = Path(__file__).parent.parent
GOLDEN = Path(__file__).parent / "golden"
TINY = GOLDEN / "tiny"


# Relative error of a tiny pipeline's final latents, computed in fp32. In fp64 the reference moves them by 4e-6 of the largest, other orders of
# the same sums (another processor, weights with a LoRA merged in) by some times that.
PIPELINE = 1e-4


def golden(case):
    """(tensors, facts) of one recording."""
    base = GOLDEN / "goldens" / case
    return load_file(f"{base}.safetensors"), json.loads(Path(f"{base}.json").read_text())


def manifest(name):
    """(config, {parameter: shape}) of a real checkpoint's component; one that has another's parameters says its name in their place."""
    facts = json.loads((GOLDEN / "manifests" / f"{name}.json").read_text())
    if isinstance(facts["parameters"], str):
        return facts["config"], manifest(facts["parameters"])[1]
    return facts["config"], {k: tuple(v) for k, v in facts["parameters"].items()}


def built(cls, config):
    """{parameter: shape} of the model that a Hub config builds, on the meta device."""
    with torch.device("meta"):
        return {k: tuple(v.shape) for k, v in cls(cls.Config.from_json(config)).state_dict().items()}


def recipe(model, tag):
    """Made-up weights that anyone can rebuild, by the rule of the recordings: {name: tensor}."""
    made = {}
    for name, value in model.state_dict().items():
        if not value.is_floating_point():
            continue
        g = torch.randn(value.shape, generator=torch.Generator().manual_seed(zlib.crc32(f"{tag}/{name}".encode())))
        if name.endswith("running_var"):
            made[name] = 1 + 0.1 * g.abs()
        elif value.dim() == 1:
            made[name] = 1 + 0.1 * g if name.endswith("weight") else 0.1 * g
        else:
            made[name] = g * (2 / value[0].numel()) ** 0.5
    return made


def max_error(got, want):
    """Largest difference over the largest value."""
    assert got.shape == want.shape, f"{tuple(got.shape)} is not {tuple(want.shape)}"
    return ((got.double() - want.double()).abs().max() / want.double().abs().max()).item()


def rounding(largest, additions=1, dtype=torch.float32):
    """The most by which `additions` sums of numbers up to `largest` may be off in `dtype`: each rounds to half a unit in the last place."""
    return additions * largest * torch.finfo(dtype).eps / 2


def rms_ratio(got, want):
    """Relative root-mean-square error."""
    return ((got.double() - want.double()).pow(2).mean().sqrt() / want.double().pow(2).mean().sqrt()).item()


def run(*argv, cwd=ROOT, timeout=300, **new):
    """Run a script, or "-m" and a module, as a user does; the finished process, text captured.

    It is forked from a process that has imported everything (forks.py), unless what is tested is a start: "-c", another environment
    than the tests', or anything else that is given for subprocess.run() in `new`.
    """
    argv = [str(a) for a in argv]
    if not new and forks.may_serve(argv):
        return forks.run(argv, cwd, timeout)
    return subprocess.run([sys.executable, *argv], cwd=cwd, capture_output=True, text=True, timeout=timeout, **new)


def launch(n, *argv, **options):
    """run(), by torchrun on n processes (n = 1: without it)."""
    if n == 1:
        return run(*argv, **options)
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", n]
    if "env" in options:
        return run(*torchrun, *argv, **options)
    return run(*torchrun, "--run-path", "--start-method", "fork", *argv, **options)


def start(*argv, **more):
    """A new Python that runs argv, to send signals to. Pytest may ignore SIGINT, when it runs in the background, and its children with it: not
    this one."""
    return subprocess.Popen(
        [sys.executable, *map(str, argv)],
        cwd=ROOT,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
        **more,
    )


def error_line(done):
    """The one line of a failed run; asserts that it is one line, exit code 2, no traceback."""
    assert done.returncode == 2, (done.returncode, done.stderr)
    lines = [line for line in done.stderr.splitlines() if line.startswith("error:")]
    assert len(lines) == 1 and "Traceback" not in done.stderr, done.stderr
    return lines[0]


def copy_model(name, target):
    """A writable copy of a tiny pipeline."""
    return Path(shutil.copytree(TINY / name, target))


def gaussian_model(schedule, mean, var):
    """The exact network for data ~ N(mean, var): E[target | x_t], in the schedule's own prediction type."""

    def model(x, t):
        a, s = coefficients(schedule, t)
        total = a * a * var + s * s
        x0 = mean + a * var / total * (x - a * mean)
        eps = s / total * (x - a * mean)
        return {"epsilon": eps, "sample": x0, "v_prediction": a * eps - s * x0, "flow": eps - x0}[schedule.prediction]

    return model


def coefficients(schedule, t):
    """(a, s) at a possibly fractional timestep, interpolated as the σ-space samplers do."""
    import numpy as np

    if schedule.flow:
        return 1 - t / schedule.T, t / schedule.T
    if float(t).is_integer():
        abar = schedule.alpha_bar(int(t))
        return abar**0.5, (1 - abar) ** 0.5
    sigmas = schedule.all_sigmas()
    sigma = float(np.interp(t, np.arange(len(sigmas)), sigmas))
    return 1 / (1 + sigma**2) ** 0.5, sigma / (1 + sigma**2) ** 0.5


def double_noise(shape, seed=0):
    g = torch.Generator().manual_seed(seed)
    return lambda: torch.randn(shape, generator=g, dtype=torch.float64)


def in_process(module, name, *argv):
    """A script in this process, which has imported everything: (exit code, stdout, stderr). module: with STAGES, such as eval.py."""
    out, err, before = io.StringIO(), io.StringIO(), signal.getsignal(signal.SIGTERM)
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
        patch.setattr(sys, "argv", [name, *map(str, argv)])
        try:
            code = commandline.script(module.STAGES, module.__doc__, getattr(module, "PRESETS", None))
        finally:
            signal.signal(signal.SIGTERM, before)
            signal_handling._SIGCHLD_handler_set = False  # a script that fails takes PyTorch's away
    return code, out.getvalue(), err.getvalue()


def stop_at_step(patch, step):
    """Let a training run of this process end by Ctrl-C within update `step`. patch: a MonkeyPatch."""
    from nanodiff.training.run import Run

    update = Run.update

    def stop(self):
        if self.step == step:
            self.lock.close()  # as the end of a process does
            raise KeyboardInterrupt
        return update(self)

    patch.setattr(Run, "update", stop)
