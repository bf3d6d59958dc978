"""What every run needs, as a box of verbs: device, precision, record; and for training: update, EMA, save, resume.

The training loop stays visible in the script. `Run` never calls back:

    run = Run(cfg)
    nets = run.trainable({"net": net})         # DDP, FSDP and recomputation here, and nowhere else
    run.schedule(updates_per_epoch)
    run.resume()                               # weights, EMA, optimizer, scaler, step
    for step in run.steps():                   # starts where the last run stopped, saves when due
        for batch in feed.update(step):        # its micro-batches on this rank
            with run.forward(batch):
                loss = nets["net"](batch.x).mean()
            run.backward(loss, batch)
        run.update()                           # clip, lr(step), optimizer, EMA, metrics.jsonl
        if run.epoch_ended(): run.judge(run.epoch_loss)
"""

import contextlib
import json
import math
import os
import re
import signal
import sys
import time
from pathlib import Path

import torch
from tqdm import tqdm

from nanodiff import system
from nanodiff.commandline import as_dict
from nanodiff.config import Stopped, UserError, printable, short
from nanodiff.device import choice, cudagraph, dist, onednn
from nanodiff.device.memory import keep_freed_memory
from nanodiff.files import apart, append, claim, link, out_dir, write_bytes
from nanodiff.models import layers
from nanodiff.output.record import Record
from nanodiff.training import recipe
from nanodiff.training.options import Training
from nanodiff.training.state import OUTPUTS, State
from nanodiff.training.watch import Watch

TELL = 5  # seconds between the lines of epochs that are shorter
SIGNALS = tuple(s for s in (signal.SIGINT, signal.SIGTERM, system.SAVE) if s)
INPUTS = ("model", "vae", "text_encoder", "control", "student", "teacher")  # options that name models to begin from
PATIENCE = 10  # non-finite gradients in a row before a run gives up


def report(device, precision):
    """Lines about where a run computes."""
    if device.type == "cuda":
        facts = torch.cuda.get_device_properties(device)
        where = f"{facts.name}, {facts.total_memory >> 30} GB, CUDA {torch.version.cuda}"
    else:
        where = f"{device.type.upper()}, {torch.get_num_threads()} threads, {system.memory() >> 30} GB"
    kind = str(precision or torch.float32).removeprefix("torch.")
    processes = f", {dist.world().size} processes" if dist.world().size > 1 else ""
    return f"device: {where}; torch {torch.__version__}; computing in {kind}{processes}"


class Run(State):
    """One training run, by the options that all trainings have."""

    def __init__(self, cfg: Training):
        self.cfg = cfg
        self.device = choice.pick_device(cfg.device)
        dist.start(self.device, cfg.dist_timeout)
        self.rank, self.world = dist.world().rank, dist.world().size
        dist.agree({k: v for k, v in as_dict(cfg).items() if k != "local_rank"}, "configuration")
        layers.use_kernels(cfg.kernels)
        self.out = Path(cfg.output_dir)
        self.lock = None  # rank 0's
        dist.on_main(self._claim)
        dist.on_main(self._check_folders)
        self.record = Record(cfg, self.device)
        if self.device.type == "cpu":
            keep_freed_memory()
        self.precision = choice.pick_precision(cfg.mixed_precision, self.device)
        if cfg.parallel == "fsdp" and self.precision == torch.float16:
            raise UserError("`parallel` fsdp computes in bf16 or fp32; use `mixed_precision` bf16 or no")
        self.watch = dist.together(Watch, cfg.report_to, cfg)
        self.scaler = torch.amp.GradScaler(self.device.type, enabled=self.precision == torch.float16)
        if self.device.type == "cuda":
            torch.backends.cudnn.benchmark = True
        dist.say(report(self.device, self.precision))
        self.plateau = recipe.Plateau()
        self.stopper = recipe.Stopper(
            cfg.early_stopping_patience, cfg.early_stopping_delta, cfg.oscillation_window, cfg.oscillation_threshold
        )
        self.step = self.skipped = self.bad_in_row = 0
        self.epoch, self.best, self.reason = {"sum": 0.0, "n": 0}, None, None
        self.numbers = None  # of the last update
        self.more = {}  # what else the script wants to survive: JSON values
        # what this process got, and what all processes know of, on which alone they act: else one would save without the others
        self.received, self.signals = set(), set()
        self.last_saved, self.saved_step = None, None
        system.ignore("SIGUSR1", "SIGBREAK")  # until there is something to save
        self._begin_update()

    def _claim(self):
        """Make the output folder this run's own: a second run in it is refused while this process lives."""
        self.lock = claim(self.out, "training")
        (self.out / "PREEMPTED").unlink(missing_ok=True)

    def _check_folders(self):
        """Raise UserError where a run would write over what it begins from, or could not write its pictures."""
        folders = [*(self.out / n for n in OUTPUTS), *self.out.glob("model-epoch-*")]
        apart({n: getattr(self.cfg, n, None) for n in INPUTS}, folders)
        for name in ("samples", "reconstructions"):
            if (self.out / name).exists() or (self.out / name).is_symlink():
                out_dir(self.out / name)

    # -- what is trained ---------------------------------------------------------------------------------------

    def trainable(self, nets, random=None):
        """{name: what to call in its place} for {name: module}; parameters that require gradients are trained. random: the option by which the
        modules' blocks draw random numbers (dropout), if they do.

        Sets `net` (all of them, unwrapped), `opt` and `average` (the EMA, or None).
        """
        cfg = self.cfg
        self.net = torch.nn.ModuleDict(nets).train()
        if cfg.parallel == "fsdp":
            # which brings unit after unit itself (the whole may not fit), and shards plain layouts only
            self.net.to(memory_format=torch.contiguous_format)
        else:  # convolutions are faster in channels_last
            onednn.learn(self.net.to(self.device, memory_format=torch.channels_last))
        if not recipe.trainable(self.net):
            raise UserError("nothing to train: every parameter is frozen")
        if cfg.gradient_checkpointing:
            dist.recompute(self.net, random=bool(random))
        self.calls = {k: dist.parallelize(m, cfg.parallel, self.device, self.precision) for k, m in nets.items()}
        if cfg.cuda_graph:
            self.calls = self._graphed(random)
        self.opt = recipe.optimizer(cfg, self.net)
        self.average = recipe.EMA(self.net, cfg.ema_decay, cfg.ema_inv_gamma, cfg.ema_power) if cfg.ema else None
        return self.calls

    def _graphed(self, random):
        """What to call in place of each net where the passes are CUDA graphs."""
        cfg = self.cfg
        if cfg.gradient_checkpointing or random:
            what = "gradient_checkpointing" if cfg.gradient_checkpointing else random
            raise UserError(f"`cuda_graph` records a pass as it is: not with `{what}`")
        if cfg.grad_accum > 1 or cfg.parallel == "fsdp":
            raise UserError("`cuda_graph` needs one batch an update and whole weights: not with `grad_accum` or fsdp")
        if self.device.type != "cuda" or self.world > 1:
            dist.say("note: --cuda-graph is for one process and a CUDA device; kernels are started one by one")
            return self.calls
        return {name: cudagraph.Learning(call) for name, call in self.calls.items()}

    def averaged(self):
        """Inside, the nets have the averaged weights (or their own, if none are kept), in evaluation mode, without gradients."""
        stack = contextlib.ExitStack()
        stack.enter_context(torch.no_grad())
        average = self.opt if isinstance(self.opt, recipe.ScheduleFree) else self.average
        if average:
            stack.enter_context(average.applied(self.net))
        self.net.eval()
        stack.callback(self.net.train)
        return stack

    def schedule(self, per_epoch):
        """Fix the length of the run: cfg.max_steps updates, or cfg.epochs of `per_epoch` updates each."""
        self.per_epoch = per_epoch
        self.total = self.cfg.max_steps or self.cfg.epochs * per_epoch
        if self.cfg.lr_scheduler == "constant":
            if self.cfg.lr_warmup_steps and "lr_warmup_steps" in self.cfg.given:
                dist.say(
                    "note: `lr_scheduler` constant has no warm-up, so `lr_warmup_steps` does nothing (constant_with_warmup has one)"
                )
        elif self.total <= self.cfg.lr_warmup_steps:
            dist.say(f"note: {self.total} updates are no more than the warm-up's {self.cfg.lr_warmup_steps:g}: the learning rate only rises "
                     "(--lr-warmup-steps, --max-steps, --epochs)")  # fmt: skip

    def interrupted(self):
        """Has a signal asked this process to end?"""
        return bool(self.received - {system.SAVE})

    def keep(self):
        """Save the whole updates so far, before an error in the data ends the run. One process alone: several save together, and
        the others know nothing of it."""
        if self.world == 1 and self.step > self.first_step:
            self.save()
            dist.say(f"the updates so far are in {self.out / f'checkpoint-{self.step}'}: --resume goes on from there")

    def same(self, name, value, must=False):
        """Remember what the run was begun with, and say when it is another now; must: raise UserError."""
        if self.more.setdefault(name, value) != value:
            if must:
                before, now = short(self.more[name], 40), short(value, 40)
                raise UserError(
                    f"{self.out}: the {name} is not what it was when this run began ({before} then, {now} now), so it cannot go on; take "
                    "another output folder, or start from scratch (`overwrite_output_dir`)"
                )
            dist.say(f"note: the {name} is not what it was when this run began")
            self.more[name] = value

    # -- one update --------------------------------------------------------------------------------------------

    def _begin_update(self):
        self.sums, self.seen, self.samples, self.waited = {}, [], 0, 0.0

    def autocast(self):
        return torch.autocast(self.device.type, self.precision or torch.bfloat16, enabled=self.precision is not None)

    def forward(self, batch):
        """Context of a micro-batch's forward pass: precision, and gradients that are exchanged on the last one only."""
        for module in self.calls.values():
            dist.synchronise(module, batch.last)
        return self.autocast()

    def backward(self, loss, batch, **parts):
        """Gradients of one micro-batch. batch.weight: its share of the update's samples, times the number of ranks (whose
        gradients are averaged). loss, parts: means over the micro-batch; they are summed up for the log."""
        self.scaler.scale(loss * batch.weight).backward()
        self.seen.append((loss.detach(), batch.keys))
        self.samples += batch.count
        self.waited += batch.waited
        for name, value in {"loss": loss, **parts}.items():
            part = value.detach() * (batch.weight / self.world) if batch.weight else 0.0  # the same names on every rank
            self.sums[name] = self.sums.get(name, 0.0) + part

    def update(self):
        """Clip, set lr, step the optimizer and the EMA, log; returns {name: number} of the update, the same on every rank.

        A non-finite loss or gradient skips the update (weights, EMA and learning rate stay) and is counted; PATIENCE in a
        row stop the run, naming samples.
        """
        cfg, taken = self.cfg, self.step - self.skipped
        peak = cfg.lr * self.plateau.state["scale"] if cfg.lr_scheduler == "plateau" else cfg.lr
        lr = recipe.learning_rate(taken, peak, self.total, cfg.lr_warmup_steps, cfg.lr_scheduler, cfg.lr_min,
                                  cfg.lr_cycles, cfg.lr_power, cfg.lr_first_cycle * self.per_epoch)  # fmt: skip
        lr = max(lr, cfg.lr_min) if cfg.lr_scheduler == "plateau" else lr
        for group in self.opt.param_groups:
            group["lr"] = lr
        self.scaler.unscale_(self.opt)
        norm = torch.nn.utils.clip_grad_norm_(list(recipe.trainable(self.net).values()), cfg.max_grad_norm)
        norm = dist.whole(norm).item()
        names = list(self.sums)
        summed = [float(self.sums[n]) for n in names] + [s in self.received for s in SIGNALS]
        summed = dist.total([*summed, self.samples], self.device)
        numbers = dict(zip(names, summed, strict=False))
        self.signals |= {s for s, n in zip(SIGNALS, summed[len(names) :], strict=False) if n}
        if math.isfinite(norm) and math.isfinite(numbers["loss"]):
            self.scaler.step(self.opt)
            # the fused AdamW does not tell that it changed them, and upsample.Upsample keeps what it made of its weights
            if cfg.parallel != "fsdp":
                torch.autograd.graph.increment_version(list(recipe.trainable(self.net).values()))
            self.bad_in_row = 0
            if parts := {n: numbers[n] for n in names if n != "loss" and math.isfinite(numbers[n])}:
                self.more["parts"] = self.more.get("parts", {}) | parts
            if self.average:
                self.average.update(self.net, taken)
            self.epoch["sum"] += numbers.get("judged", numbers["loss"])
            self.epoch["n"] += 1
        else:
            self._skip(norm, numbers["loss"])
        self.scaler.update()
        self.opt.zero_grad(set_to_none=True)
        numbers |= {"lr": lr, "grad_norm": norm, "samples": int(summed[-1])}
        if self.average:
            numbers["ema_decay"] = self.average.at(taken)
        if self.scaler.is_enabled():
            numbers["loss_scale"] = self.scaler.get_scale()
        self._report(numbers)
        self._begin_update()
        self.numbers = numbers
        return numbers

    def _skip(self, norm, loss):
        self.skipped += 1
        self.bad_in_row += 1
        bad = [key for value, keys in self.seen if not torch.isfinite(value) for key in keys]
        bad = [key for keys in dist.gathered(bad) for key in keys]
        among = [key for keys in dist.gathered([k for _, keys in self.seen for k in keys]) for key in keys]
        named = f"samples with a non-finite loss: {_few(bad)}" if bad else f"one of the samples {_few(among)}"
        dist.say(f"warning: step {self.step}: loss {loss:g}, gradient {norm:g}: update skipped; {named}")
        if self.bad_in_row >= PATIENCE:
            raise UserError(
                f"{PATIENCE} non-finite losses or gradients in a row at step {self.step}; {named}; "
                f"last good checkpoint: {self.last_saved or 'none'}"
            )

    def _report(self, numbers):
        """The progress bar, and a line of metrics.jsonl when it is due."""
        now = time.monotonic()
        seconds = max(now - self.clock, 1e-9)
        self.clock = now
        numbers["images_per_s"] = numbers["samples"] / seconds
        numbers["data_wait"] = min(self.waited / seconds, 1.0)  # share of the time in which the loader was waited for
        self.bar.set_postfix(loss=f"{numbers['loss']:.4g}", images_s=f"{numbers['images_per_s']:.1f}", refresh=False)
        self.rates = [*self.rates[-49:], numbers["images_per_s"]]
        if self.every(self.cfg.log_every) or (self.cfg.log_every and self.epoch_ended()):
            # a part that not every update has (dmd's student) is told as it was last
            self.log(**self.more.get("parts", {}) | {k: v for k, v in numbers.items() if k != "samples"})

    def log(self, **numbers):
        """Append one object to metrics.jsonl, and to what --report-to names."""
        if not dist.is_main():
            return
        numbers = {k: (float(f"{v:.7g}") if isinstance(v, float) else v) for k, v in numbers.items()}
        line = {"step": self.step + 1, "epoch": self.step // self.per_epoch + 1, **numbers}
        append(self.out / "metrics.jsonl", json.dumps(line) + "\n")
        self.watch.numbers(self.step + 1, numbers)

    # -- names ---------------------------------------------------------------------------------------------------

    def named(self, what, step):
        """The file of a sheet of pictures after `step` updates, as the stage names it."""
        return self.out / self.cfg.NAMES[what].format(step=step, epoch=-(-step // self.per_epoch))

    def link(self, name, what=None, epoch=0):
        """Give a folder that this run wrote the further name that a document has for such a thing, if it has one."""
        if form := self.cfg.NAMES.get("links", {}).get(what or name):
            dist.on_main(link, self.out / form.format(epoch=epoch), name)
            dist.on_main(self._drop_links)

    def _drop_links(self):
        """Names of checkpoints that were deleted since."""
        for path in self.out.iterdir():
            if path.is_symlink() and not path.exists() and re.fullmatch(r"checkpoint-\d+", os.readlink(path)):
                path.unlink()

    # -- epochs ------------------------------------------------------------------------------------------------

    def epoch_ended(self):
        """Asked inside the loop: was this update the last one of an epoch?"""
        return (self.step + 1) % self.per_epoch == 0

    def every(self, n):
        """True after every n-th update (and never for n = 0), asked inside the loop."""
        return bool(n) and (self.step + 1) % n == 0

    def every_epochs(self, n):
        """True after every n-th epoch (and never for n = 0), asked inside the loop."""
        return bool(n) and self.epoch_ended() and ((self.step + 1) // self.per_epoch) % n == 0

    @property
    def epoch_loss(self):
        """The mean over the updates of this epoch so far of the loss (or of `judged`, if backward() was given one); NaN when
        all of them were skipped."""
        return self.epoch["sum"] / self.epoch["n"] if self.epoch["n"] else math.nan

    def judge(self, loss):
        """At the end of an epoch, with its loss (training's or validation's): lower the rate on a plateau, stop early.
        Returns whether this is the best epoch so far."""
        self.epoch = {"sum": 0.0, "n": 0}
        self._tell_epoch(loss)
        if not math.isfinite(loss):
            return False
        if self.cfg.lr_scheduler == "plateau":
            self.plateau.epoch(loss)
        self.reason = self.stopper.epoch(loss)
        better = self.best is None or loss < self.best
        self.best = loss if better else self.best
        return better

    def forget(self):
        """Judge anew: the epochs so far were measured otherwise than those to come."""
        self.best, self.reason = None, None
        self.plateau.state |= {"best": None, "bad": 0}
        self.stopper.state |= {"best": None, "bad": 0, "losses": []}

    def _tell_epoch(self, loss):
        """A line at the end of an epoch: its loss, the largest memory so far, the time that is left; of short epochs not every one."""
        now, done = time.monotonic(), self.step + 1 - self.first_step
        if now - self.told < TELL and self.step + 1 < self.total:
            return
        self.told = now
        left = (now - self.began) / max(done, 1) * (self.total - self.step - 1)
        peak = torch.cuda.max_memory_allocated() if self.device.type == "cuda" else system.peak_memory()
        epoch, of = (self.step + 1) // self.per_epoch, -(-self.total // self.per_epoch)
        dist.say(f"epoch {epoch} of {of}: loss {loss:.4g}, memory {peak >> 20} MB, {tqdm.format_interval(left)} left")

    # -- loop --------------------------------------------------------------------------------------------------

    def steps(self):
        """Update numbers from where the run stands to the total, or to an early stop, with progress.

        SIGINT and SIGTERM, to any process, end it after a whole update with a checkpoint (twice: at once); SIGUSR1 (on Windows Ctrl-Break)
        saves and goes on.
        """

        def request(signum, frame):
            if signum in self.received and signum != system.SAVE:
                raise KeyboardInterrupt
            self.received.add(signum)

        handlers = {s: signal.signal(s, request) for s in SIGNALS}
        quiet = not (sys.stderr.isatty() and dist.is_main())
        self.bar = tqdm(total=self.total, initial=self.step, desc="updates", disable=quiet, file=sys.stderr)
        self.clock = said = started = self.began = time.monotonic()
        self.told, self.first_step = 0.0, self.step  # when _tell_epoch() spoke last, and where this process began
        self.rates, first, due = [], self.step, False
        try:
            while self.step < self.total and not self.reason:
                self.clock = time.monotonic()  # sheets, validation and checkpoints are no part of an update
                yield self.step
                self.step += 1
                self.bar.update()
                now = time.monotonic()
                if quiet and dist.is_main() and now - said > 30:
                    rate = (self.step - first) / (now - started)
                    left = (self.total - self.step) / rate
                    loss = f"epoch's mean loss {self.epoch_loss:.4g}, " if self.epoch["n"] else ""
                    images = sum(self.rates) / max(len(self.rates), 1)
                    dist.say(f"step {self.step}/{self.total}, {loss}{images:.1f} images/s, {left / 60:.1f} min left")
                    said = now
                epochs = self.cfg.checkpoint_epochs
                due |= bool(self.cfg.checkpointing_steps) and self.step % self.cfg.checkpointing_steps == 0
                due |= bool(epochs) and self.step % (epochs * self.per_epoch) == 0
                if (due and not self.bad_in_row) or self.signals:  # amid losses that are not finite it waits
                    self.save()
                    due = False
                if system.SAVE in self.signals:  # one that came since the update, amid a sheet, is the next one's
                    self.signals.discard(system.SAVE)
                    self.received.discard(system.SAVE)
                if self.signals:
                    dist.on_main(write_bytes, self.out / "PREEMPTED", f"checkpoint-{self.step}\n".encode())
                    raise Stopped if signal.SIGTERM in self.signals else KeyboardInterrupt
            if self.reason:
                dist.say(f"{self.reason}; stopped after update {self.step}")
                self.record.data["results"]["stopped"] = self.reason
        finally:
            self.bar.close()
            for s, handler in handlers.items():
                signal.signal(s, handler)

    def close(self, leave=True):
        """Write run.json and leave the other processes; leave=False: another run follows."""
        self.record.result("steps", self.step)
        if self.skipped:
            self.record.result("skipped_updates", self.skipped)
        self.record.write()
        self.watch.close()
        if self.lock:
            self.lock.close()
        if leave:
            dist.finish()


def _few(keys):
    return ", ".join(map(printable, keys[:8])) + (f" and {len(keys) - 8} more" if len(keys) > 8 else "")
