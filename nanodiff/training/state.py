"""The state of a run: what a checkpoint holds, and how a run goes on from one."""

import json
import math
import os
import shutil
from dataclasses import fields
from pathlib import Path

import torch

from nanodiff.commandline import as_dict
from nanodiff.config import UserError
from nanodiff.device import dist
from nanodiff.files import write_bytes
from nanodiff.training import checkpoint, recipe
from nanodiff.training.options import Noise

# folders of a run, beside model-epoch-N and checkpoints
OUTPUTS = ("model", "best_model", "samples", "reconstructions")
NEWEST = ("auto", "latest")  # words of `resume`


class State:
    """What of a Run survives it: trained weights, their average, the optimizer's state, the loss scale, counters. A resumed run is the
    uninterrupted one, bit for bit on a CPU. Needs Run's attributes."""

    def _tensors(self):
        names = list(recipe.trainable(self.net))
        tensors = {f"net/{k}": v.detach() for k, v in recipe.trainable(self.net).items()}
        for name, p in zip(names, self.opt.param_groups[0]["params"], strict=True):
            tensors |= {f"opt/{name}/{k}": v for k, v in self.opt.state[p].items()}
        if self.average:
            tensors |= {f"ema/{k}": v for k, v in self.average.shadow.items()}
        return tensors

    def save(self):
        """Write a checkpoint, if there is none of this update yet."""
        if self.saved_step == self.step:
            return
        facts = {
            "step": self.step, "skipped": self.skipped, "epoch": self.epoch, "best": self.best,
            "per_epoch": self.per_epoch, "reason": self.reason, "plateau": self.plateau.state, "stopper": self.stopper.state, "more": self.more,
            "scaler": self.scaler.state_dict(), "world": self.world, "config": as_dict(self.cfg),
            "versions": self.record.data["versions"], "git_commit": self.record.data["git_commit"],
        }  # fmt: skip
        sharded = self.cfg.parallel == "fsdp"
        # amid losses that are not finite it may be what is beyond help, and takes no older one's place
        limit = None if self.bad_in_row else self.cfg.checkpoints_total_limit
        folder = checkpoint.save(self.out, self.step, self._tensors(), facts, limit, sharded)
        self.last_saved = self.last_saved if self.bad_in_row else folder
        self.saved_step = self.step
        if self.step and self.step % self.per_epoch == 0:
            self.link(f"checkpoint-{self.step}", "checkpoint", self.step // self.per_epoch)

    def resume(self):
        """Continue from cfg.resume ("auto", "latest", a folder, or None); a changed option is named."""
        self.sizes = {}
        if not self.cfg.resume:
            dist.on_main(self._fresh)
            return
        state = checkpoint.load(self.out, self.cfg.resume)
        if state is None:
            dist.say(f"{self.out}: no checkpoint yet, starting from the beginning")
            dist.on_main(self._cut_log)
            return
        folder, facts = state
        # another run's, which goes on here; a link in this folder, or what was put away in it, is its own
        named = [Path(p) for p in (os.path.abspath(self.cfg.resume), folder)]
        if self.cfg.resume not in NEWEST and not any(p.is_relative_to(self.out.resolve()) for p in named):
            dist.on_main(self._fresh)
        moving = {
            "resume",
            "output_dir",
            "max_steps",
            "epochs",
            "device",
            "checkpointing_steps",
            "local_rank",
            "dry_run",
        }
        for key, old in facts["config"].items():
            new = getattr(self.cfg, key, None)
            if key not in moving and new != old:
                dist.say(f"note: {key} was {old!r} in the checkpoint and is {new!r} now")
            falls = self.cfg.lr_scheduler not in (
                "constant",
                "constant_with_warmup",
                "none",
                "plateau",
                "cosine_warm_restarts",
            )
            if key in ("max_steps", "epochs") and new != old and falls:
                kind = self.cfg.lr_scheduler
                dist.say(
                    f"note: {key} was {old} in the checkpoint and is {new} now: the learning rate ({kind}) falls to its end there"
                )
        if (old := facts["config"].get("optimizer", "adamw")) != self.cfg.optimizer:
            raise UserError(f"{folder}: was trained with `optimizer` {old} `lr_scheduler` {facts['config'].get('lr_scheduler')}; give these "
                            f"to go on, {self.cfg.optimizer} cannot")  # fmt: skip
        if old == "schedule_free" and facts["config"]["adam_beta1"] != self.cfg.adam_beta1:
            raise UserError(f"{folder}: its weights are mixed with their mean by `adam_beta1` {facts['config']['adam_beta1']:g}; give that "
                            "to go on")  # fmt: skip
        self._take(folder, checkpoint.read(folder, self._like()))
        self.scaler.load_state_dict(facts["scaler"]) if facts["scaler"] and self.scaler.is_enabled() else None
        self.step, self.skipped = facts["step"], facts["skipped"]
        self.epoch, self.best, self.reason, self.more = facts["epoch"], facts["best"], facts["reason"], facts["more"]
        self.plateau.state, self.stopper.state = facts["plateau"], facts["stopper"]
        limits = ("early_stopping_patience", "early_stopping_delta", "oscillation_window", "oscillation_threshold")
        if any(facts["config"].get(name) != getattr(self.cfg, name) for name in limits):
            self.reason = None  # it may be worth going on under other limits
        measure = ("validation", *(f.name for f in fields(Noise)))
        if any(name in facts["config"] and facts["config"][name] != getattr(self.cfg, name, None) for name in measure):
            self.forget()
            dist.say("note: epochs are judged otherwise now: the best one is looked for anew")
        if self.step >= self.total:
            dist.say(
                f"note: nothing is left to train: {self.step} updates are done, and this run has {self.total} (--max-steps, --epochs)"
            )
        if not self.cfg.max_steps and facts.get("per_epoch", self.per_epoch) != self.per_epoch:
            dist.say(f"note: an epoch was {facts['per_epoch']} updates and is {self.per_epoch} now: of {self.cfg.epochs} epochs "
                     f"{self.step / self.per_epoch:.3g} count as done, where {self.step / facts['per_epoch']:.3g} were")  # fmt: skip
        if facts["world"] != self.world:
            dist.say(
                f"note: the checkpoint is of {facts['world']} processes, this run has {self.world}: mind the global batch"
            )
        self.last_saved = folder
        dist.on_main(self._leave_younger)
        dist.on_main(self._cut_log)
        dist.say(f"resumed at step {self.step}")

    def _leave_younger(self):
        """Checkpoints beyond the one that is continued are another branch now: out of the way of --resume auto."""
        for step, folder in checkpoint.found(self.out):
            if step > self.step:
                aside = folder.with_name(f"{folder.name}.abandoned")
                shutil.rmtree(aside, ignore_errors=True)
                folder.rename(aside)
                dist.say(f"note: {folder.name} is younger than what is continued; it is {aside.name} now")

    def _fresh(self):
        """A new run: refuse a folder with an older run's checkpoints, unless it may be overwritten."""
        for _, older in checkpoint.found(self.out):
            if not self.cfg.overwrite_output_dir:
                how = "`resume` auto would continue it" if self.cfg.resume else "add `resume` to continue it"
                raise UserError(
                    f"{older} is of an earlier run: {how}, or take another `output_dir` (or `overwrite_output_dir`)"
                )
            shutil.rmtree(older)
        if self.cfg.overwrite_output_dir:
            for folder in (*(self.out / name for name in OUTPUTS), *self.out.glob("model-epoch-*")):
                shutil.rmtree(folder, ignore_errors=True)
        (self.out / "metrics.jsonl").unlink(missing_ok=True)

    def _like(self):
        """{name: tensor} of everything a checkpoint of this run holds, before the first update has made it."""
        like = {f"net/{k}": p.detach() for k, p in recipe.trainable(self.net).items()}
        for k, p in recipe.trainable(self.net).items():
            tensors, numbers = recipe.kept(self.opt, p)
            like |= {f"opt/{k}/{field}": p.detach() for field in tensors}
            like |= {f"opt/{k}/{field}": torch.zeros((), dtype=kind) for field, kind in numbers.items()}
        if self.average:
            like |= {f"ema/{k}": v for k, v in self.average.shadow.items()}
        return like

    @torch.no_grad()
    def _take(self, folder, tensors):
        """Put a checkpoint's tensors where they belong. Raises UserError when they are another model's."""
        like = self._like()
        for name, tensor in tensors.items():
            if name not in like and not name.startswith("ema/"):
                raise UserError(f"{folder}: is of another model: it has {name.partition('/')[2]}, this one has not")
            if name in like and tuple(like[name].shape) != tuple(tensor.shape):
                raise UserError(
                    f"{folder}: is of another model: {name} is {list(tensor.shape)}, here {list(like[name].shape)}"
                )
        if absent := [n for n in like if n.startswith("net/") and n not in tensors]:
            raise UserError(f"{folder}: is of another model: it lacks {absent[0].partition('/')[2]}")
        if absent := [
            n for n in like if n not in tensors and any(k.startswith(n.partition("/")[0] + "/") for k in tensors)
        ]:
            raise UserError(f"{folder}: lacks {absent[0]}")
        for name, p in recipe.trainable(self.net).items():
            self._put(p, tensors[f"net/{name}"])
            if f"opt/{name}/step" in tensors:
                fields, numbers = recipe.kept(self.opt, p)
                state = {k: torch.empty_like(p) for k in fields}
                for field, value in state.items():
                    self._put(value, tensors[f"opt/{name}/{field}"])
                fused = "exp_avg" in fields and self.cfg.parallel != "fsdp"  # it counts its steps on the device
                whole = {k: dist.whole(tensors[f"opt/{name}/{k}"]).to(p.device if fused else "cpu") for k in numbers}
                self.opt.state[p] = whole | state
        if self.average and not any(k.startswith("ema/") for k in tensors):
            dist.say("note: the checkpoint has no averaged weights; the average starts from its weights")
            self.average.shadow = {k: p.detach().clone().float() for k, p in recipe.trainable(self.net).items()}
        elif self.average:
            for name, value in self.average.shadow.items():
                self._put(value, tensors[f"ema/{name}"])

    def _put(self, target, value):
        """Copy a tensor of a checkpoint into one of this run's, whole or sharded alike."""
        if hasattr(target, "full_tensor") and not hasattr(value, "full_tensor"):
            from torch.distributed.tensor import distribute_tensor

            value = distribute_tensor(value.to(self.device), target.device_mesh, target.placements)
        target.copy_(value)

    def _cut_log(self):
        """Drop lines of metrics.jsonl that are younger than the checkpoint: those steps are taken again."""
        log = self.out / "metrics.jsonl"
        lines = log.read_text(encoding="utf-8", errors="replace").splitlines() if log.exists() else []
        kept = [line for line in lines if _step(line) <= self.step]
        if kept != lines:
            write_bytes(log, "".join(line + "\n" for line in kept).encode())


def _step(line):
    """The update that a line of metrics.jsonl is about; ∞ of one that a crash has left in pieces."""
    try:
        return int(json.loads(line)["step"])
    except (ValueError, KeyError, TypeError):
        return math.inf
