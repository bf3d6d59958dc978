"""What every run needs, as a box of verbs: device, precision, record; and for training: update, EMA, save, resume.

The training loop stays visible in the script. `Run` never calls back:

    run = engine.Run(cfg)
    net, opt = run.trainable(net, lr=cfg.lr)
    ema = run.ema(net, cfg.ema_decay)
    run.resume()                               # weights, EMA, optimizer, scaler, step
    for step in run.steps():                   # starts where the last run stopped, saves when due
        run.backward(loss)
        run.update()                           # clip, lr(step), optimizer, EMA
        if run.every(20): run.log(loss=…)
"""

import contextlib
import json
import math
import os
import platform
import resource
import signal
import subprocess
import sys
import time
from pathlib import Path

import torch

from nanodiff import checkpoint
from nanodiff.config import SECRETS, Stopped, UserError, as_dict
from nanodiff.models import layers
from nanodiff.weights import DTYPES, write_bytes, write_json

PATIENCE = 10  # non-finite gradients in a row before a run gives up


def pick_device(name):
    """torch.device for auto | cpu | cuda; asking for CUDA without one falls back to the CPU, with a line."""
    if name in ("auto", "cuda") and torch.cuda.is_available():
        return torch.device("cuda", int(os.environ.get("LOCAL_RANK", 0)))
    if name == "cuda":
        print("warning: no CUDA device here, using the CPU", file=sys.stderr)
    return torch.device("cpu")


def pick_dtype(name, device):
    """torch dtype for auto | fp32 | fp16 | bf16. auto: fp16 on a GPU, fp32 on a CPU (exact, and what the tests judge;
    sample.py takes bf16 for large models where computes_bf16()).

    fp16 on a CPU is refused: without AVX512-FP16 a matrix product is hundreds of times slower than in fp32.
    """
    if name == "auto":
        return torch.float16 if device.type == "cuda" else torch.float32
    if name == "fp16" and device.type == "cpu":
        raise UserError("--dtype fp16 does not compute on a CPU at any useful speed; use fp32 or bf16")
    return DTYPES[name]


def computes_bf16():
    """Whether this CPU multiplies bf16 in hardware (AVX512_BF16 or AMX)."""
    known = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(known.get("avx512_bf16") or known.get("amx_bf16"))


def out_dir(path):
    """Create an output folder and prove that it can be written, before any work. Raises UserError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: is a file, not a folder") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
    return path


class Record:
    """run.json: what was run, with what, how long, which files came out and which numbers."""

    def __init__(self, cfg, device):
        if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # every process would do the same work into the same files
            raise UserError("running on several processes is not supported yet; start it without torchrun")
        self.out = out_dir(cfg.output_dir)
        self.started = time.perf_counter()
        self.data = {
            "config": as_dict(cfg),
            "argv": _without_secrets(sys.argv, cfg),
            "versions": {"python": platform.python_version(), "torch": torch.__version__},
            "device": torch.cuda.get_device_name(device)
            if device.type == "cuda"
            else f"cpu x {torch.get_num_threads()}",
            "git_commit": _git_commit(),
            "seconds": {},
            "files": [],
            "results": {},
        }

    @contextlib.contextmanager
    def timed(self, stage):
        start = time.perf_counter()
        try:
            yield
        finally:
            seconds = self.data["seconds"]
            seconds[stage] = round(seconds.get(stage, 0.0) + time.perf_counter() - start, 3)

    def file(self, path, **facts):
        self.data["files"].append({"path": str(path), **facts})

    def result(self, name, value):
        """Print a number on stdout and keep it."""
        self.data["results"][name] = value
        print(f"{name}: {value:g}" if isinstance(value, float) else f"{name}: {value}")

    def write(self):
        self.data["seconds"]["total"] = round(time.perf_counter() - self.started, 3)
        self.data["peak_memory_mb"] = _peak_memory_mb()
        if torch.cuda.is_available():
            self.data["peak_gpu_memory_mb"] = torch.cuda.max_memory_allocated() >> 20
        write_json(self.out / "run.json", self.data)


def _without_secrets(argv, cfg):
    """argv with every token masked, however its flag was spelled."""
    values = [v for v in (getattr(cfg, name, None) for name in SECRETS) if v]
    for value in values:
        argv = [word.replace(value, "***") for word in argv]
    return list(argv)


def _peak_memory_mb():
    """Largest resident memory of this process so far (getrusage would count a parent's, too)."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) >> 10 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss >> 10


def _git_commit():
    try:
        here = Path(__file__).parent
        done = subprocess.run(["git", "rev-parse", "HEAD"], cwd=here, capture_output=True, text=True, timeout=5)
        return done.stdout.strip() or None
    except (OSError, subprocess.SubprocessError):
        return None


class EMA:
    """Exponential moving average of the weights, decay 1 - (1 + step)^-power up to `decay` (as in k-diffusion)."""

    def __init__(self, net, decay=0.9999, power=0.75):
        self.decay, self.power = decay, power
        self.shadow = {k: v.detach().clone().float() for k, v in net.state_dict().items()}

    @torch.no_grad()
    def update(self, net, step):
        decay = min(self.decay, 1 - (1 + step) ** -self.power)
        values = [v.detach().float() for v in net.state_dict().values()]
        torch._foreach_lerp_(list(self.shadow.values()), values, 1 - decay)

    @contextlib.contextmanager
    def applied(self, net):
        """Inside, the net has the averaged weights."""
        raw = {k: v.detach().clone() for k, v in net.state_dict().items()}
        net.load_state_dict(self.shadow)
        try:
            yield net
        finally:
            net.load_state_dict(raw)


def learning_rate(step, peak, total, warmup, kind):
    """lr of update number `step` (0-based): linear warm-up, then constant, or cosine or line down to 0."""
    if step < warmup:
        return peak * (step + 1) / warmup
    progress = min((step - warmup) / max(total - warmup, 1), 1.0)
    factor = {"constant": 1.0, "linear": 1 - progress, "cosine": 0.5 * (1 + math.cos(math.pi * progress))}
    return peak * factor[kind]


class Run:
    """One training run. cfg needs: output_dir device seed mixed_precision lr lr_scheduler lr_warmup_steps
    max_grad_norm grad_accum resume checkpointing_steps checkpoints_total_limit kernels."""

    def __init__(self, cfg, total_steps):
        self.cfg, self.total = cfg, total_steps
        self.device = pick_device(cfg.device)
        layers.use_kernels(cfg.kernels)
        self.out = out_dir(cfg.output_dir)
        self.record = Record(cfg, self.device)
        precision = cfg.mixed_precision
        if precision == "fp16" and self.device.type == "cpu":
            raise UserError("--mixed-precision fp16 needs a GPU; use bf16 or no")
        self.precision = DTYPES.get(precision)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=precision == "fp16")
        self.step, self.skipped, self.bad_in_row = 0, 0, 0
        self.stop_signal, self.last_saved = None, None

    def trainable(self, net, lr, betas=(0.9, 0.99), weight_decay=0.01):
        """(net on the device, AdamW over its trainable parameters)."""
        net = net.to(self.device).train().requires_grad_(True)
        self.net = net
        self.opt = torch.optim.AdamW(net.parameters(), lr=lr, betas=betas, weight_decay=weight_decay)
        return net, self.opt

    def ema(self, net, decay):
        self.average = EMA(net, decay) if decay else None
        return self.average

    def autocast(self):
        """Context for the forward pass."""
        return torch.autocast(self.device.type, self.precision or torch.bfloat16, enabled=self.precision is not None)

    def backward(self, loss):
        """Gradients of one micro-batch; the loss is divided by the number of micro-batches."""
        self.scaler.scale(loss / self.cfg.grad_accum).backward()

    def update(self):
        """Clip, set lr(step), step the optimizer and the EMA. Returns (grad norm, lr).

        A non-finite gradient skips the update (weights, EMA and schedule stay) and is counted; PATIENCE in a row stop.
        """
        lr = learning_rate(self.step, self.cfg.lr, self.total, self.cfg.lr_warmup_steps, self.cfg.lr_scheduler)
        for group in self.opt.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.opt)
        norm = torch.nn.utils.clip_grad_norm_(self.net.parameters(), self.cfg.max_grad_norm)
        if torch.isfinite(norm):
            self.scaler.step(self.opt)
            self.bad_in_row = 0
            if self.average:
                self.average.update(self.net, self.step)
        else:
            self.skipped += 1
            self.bad_in_row += 1
            print(f"warning: step {self.step}: gradient is {norm.item()}, update skipped", file=sys.stderr)
            if self.bad_in_row >= PATIENCE:
                raise UserError(
                    f"{PATIENCE} non-finite gradients in a row at step {self.step}; last good checkpoint: {self.last_saved}"
                )
        self.scaler.update()
        self.opt.zero_grad(set_to_none=True)
        return norm.item(), lr

    # -- state -----------------------------------------------------------------------------------------------

    def _tensors(self):
        names = [n for n, _ in self.net.named_parameters()]
        tensors = {f"net/{k}": v for k, v in self.net.state_dict().items()}
        for i, state in self.opt.state_dict()["state"].items():
            tensors |= {f"opt/{names[i]}/{k}": v for k, v in state.items()}
        if self.average:
            tensors |= {f"ema/{k}": v for k, v in self.average.shadow.items()}
        return tensors

    def save(self):
        facts = {
            "step": self.step,
            "skipped": self.skipped,
            "scaler": self.scaler.state_dict(),
            "config": as_dict(self.cfg),
        }
        self.last_saved = checkpoint.save(self.out, self.step, self._tensors(), facts, self.cfg.checkpoints_total_limit)

    def resume(self):
        """Continue from cfg.resume ("auto", a folder, or None); a changed option is named."""
        if not self.cfg.resume:
            if older := checkpoint.found(self.out):
                raise UserError(
                    f"{older[0][1]} is of an earlier run: add --resume to continue it, or take another --output-dir"
                )
            return
        state = checkpoint.load(self.out, self.cfg.resume)
        if state is None:
            print(f"{self.out}: no checkpoint yet, starting from the beginning", file=sys.stderr)
            return
        tensors, facts = state
        moving = {"resume", "output_dir", "max_steps", "epochs", "device", "checkpointing_steps"}
        for key, old in facts["config"].items():
            new = getattr(self.cfg, key, None)
            if key not in moving and new != old:
                print(f"note: {key} was {old!r} in the checkpoint and is {new!r} now", file=sys.stderr)

        def part(prefix):
            return {k[len(prefix) :]: v for k, v in tensors.items() if k.startswith(prefix)}

        try:
            self.net.load_state_dict(part("net/"))
        except RuntimeError as e:
            raise UserError(
                f"the checkpoint in {self.out} is of another model: {str(e).splitlines()[-1].strip()}"
            ) from None
        index = {n: i for i, (n, _) in enumerate(self.net.named_parameters())}
        optimizer = {}
        for key, value in part("opt/").items():
            name, _, field = key.rpartition("/")
            optimizer.setdefault(index[name], {})[field] = value
        self.opt.load_state_dict({"state": optimizer, "param_groups": self.opt.state_dict()["param_groups"]})
        if self.average:
            saved = part("ema/")
            self.average.shadow = {k: saved[k].to(self.device) for k in self.average.shadow}
        self.scaler.load_state_dict(facts["scaler"]) if facts["scaler"] else None
        self.step, self.skipped = facts["step"], facts["skipped"]
        self._cut_log()
        print(f"resumed at step {self.step}", file=sys.stderr)

    def _cut_log(self):
        """Drop lines of metrics.jsonl that are younger than the checkpoint: those steps are taken again."""
        log = self.out / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8").splitlines() if log.exists() else []
        kept = [line for line in lines if line.endswith("}") and json.loads(line)["step"] <= self.step]
        if kept != lines:
            write_bytes(log, "".join(line + "\n" for line in kept).encode())

    # -- loop ------------------------------------------------------------------------------------------------

    def steps(self):
        """Update numbers from where the run stands to the total, with progress; SIGINT and SIGTERM end it after a
        whole step, with a checkpoint (twice: at once)."""
        from tqdm import tqdm

        def request(signum, frame):
            if self.stop_signal:
                raise KeyboardInterrupt
            self.stop_signal = signum

        handlers = {s: signal.signal(s, request) for s in (signal.SIGINT, signal.SIGTERM)}
        quiet = not sys.stderr.isatty()
        bar = tqdm(total=self.total, initial=self.step, desc="steps", disable=quiet, file=sys.stderr)
        started, first = time.monotonic(), self.step
        said = started
        try:
            while self.step < self.total:
                yield self.step
                self.step += 1
                bar.update()
                now = time.monotonic()
                if quiet and now - said > 30:
                    rate = (self.step - first) / (now - started)
                    left = (self.total - self.step) / rate
                    print(
                        f"step {self.step}/{self.total}, {rate:.2f} steps/s, {left / 60:.1f} min left", file=sys.stderr
                    )
                    said = now
                due = self.cfg.checkpointing_steps and self.step % self.cfg.checkpointing_steps == 0
                if due or self.stop_signal:
                    self.save()
                if self.stop_signal:
                    raise KeyboardInterrupt if self.stop_signal == signal.SIGINT else Stopped
        finally:
            bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def every(self, n):
        """True after every n-th update (and never for n = 0), asked inside the loop."""
        return bool(n) and (self.step + 1) % n == 0

    def log(self, **numbers):
        """Append one object to metrics.jsonl."""
        with open(self.out / "metrics.jsonl", "a", encoding="utf-8") as f:
            f.write(json.dumps({"step": self.step + 1, **numbers}) + "\n")
