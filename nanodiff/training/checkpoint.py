"""Checkpoints that are either complete or not there.

Protocol: everything is written into `checkpoint-<step>.tmp/`, each file fsynced, then MANIFEST.json with sizes
and SHA-256, then one rename; the new folder is read back and verified, and only then are old checkpoints pruned. The
loader takes the newest folder whose manifest verifies and says so when it had to step back. Tensors are safetensors,
facts are JSON: no pickle. A model that is sharded over processes is written by all of them, a file each
(torch.distributed.checkpoint's safetensors form), and can be read by any number of processes.

Explained in the book (docs/book): chapter 16.
"""

import re
import shutil
from pathlib import Path

from nanodiff import system
from nanodiff.config import UserError, read_json
from nanodiff.device import dist
from nanodiff.files import sha256, write_bytes, write_json
from nanodiff.weights import load_tensors, save_tensors

MANIFEST, STATE, FACTS, SHARDS, LATEST = "MANIFEST.json", "state.safetensors", "state.json", "shards", "latest"
NAME = re.compile(r"checkpoint-(\d+)")
MARGIN = 1.1  # free space wanted for a new checkpoint, in sizes of the last one


def save(root, step, tensors, facts, keep=None, sharded=False):
    """Write `root/checkpoint-<step>/`; keep the newest `keep` checkpoints. Every rank must call it.

    tensors: {name: tensor} (sharded: DTensors, written by all ranks; else rank 0's are written). facts: JSON values.
    Raises UserError when it cannot be written; what was there before is then untouched.
    """
    root = Path(root)
    final, tmp = root / f"checkpoint-{step}", root / f"checkpoint-{step}.tmp"
    dist.on_main(_begin, root, tmp)
    if sharded:
        dist.together(_write_shards, tmp / SHARDS, tensors)
    dist.on_main(_complete, root, final, tmp, step, {} if sharded else tensors, facts, keep)
    return final


def _begin(root, tmp):
    try:
        shutil.rmtree(tmp, ignore_errors=True)
        last = next((p for _, p in found(root)), None)
        root.mkdir(parents=True, exist_ok=True)
        if last is not None:
            needed, free = MARGIN * sum(p.stat().st_size for p in _files(last)), shutil.disk_usage(root).free
            if free < needed:
                dist.say(
                    f"warning: {root}: {free >> 20} MB free, the next checkpoint takes about {int(needed) >> 20} MB"
                )
        tmp.mkdir()
    except OSError as e:
        raise UserError(f"{tmp}: cannot be written: {e.strerror}") from None


def _write_shards(folder, tensors):
    import torch.distributed.checkpoint as dcp

    try:
        dcp.save(tensors, storage_writer=dcp.HuggingFaceStorageWriter(path=str(folder), save_distributed=True))
    except (OSError, dcp.api.CheckpointException) as e:
        raise UserError(f"{folder}: cannot be written: {str(e).splitlines()[0]}") from None


def _complete(root, final, tmp, step, tensors, facts, keep):
    try:
        if tensors:
            save_tensors(tmp / STATE, tensors)
        write_json(tmp / FACTS, facts)
        for folder in {p.parent for p in _files(tmp)}:
            system.sync(folder)
        files = {str(p.relative_to(tmp)): {"size": p.stat().st_size, "sha256": sha256(p)} for p in _files(tmp)}
        write_json(tmp / MANIFEST, {"step": step, "files": files})
        system.sync(tmp)
        aside = root / f"{final.name}.old.tmp"
        shutil.rmtree(aside, ignore_errors=True)
        if final.exists():  # the same step again: the old one goes aside, never away, until the new one stands
            final.rename(aside)
        tmp.rename(final)
        system.sync(root)
        if fault := verify(final):
            raise UserError(f"{fault} (read back after it was written; older checkpoints are kept)")
        shutil.rmtree(aside, ignore_errors=True)
        write_bytes(root / LATEST, f"{final.name}\n".encode())
    except OSError as e:
        raise UserError(f"{final}: cannot be written: {e.strerror}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    others = [folder for _, folder in found(root) if folder != final]
    for old in others[keep - 1 :] if keep else []:
        shutil.rmtree(old)


def _files(folder):
    return sorted(p for p in folder.rglob("*") if p.is_file())


def found(root):
    """[(step, folder)] of the checkpoints under root, newest first; other names are ignored."""
    folders = [(NAME.fullmatch(p.name), p) for p in Path(root).glob("checkpoint-*") if p.is_dir()]
    return sorted(((int(m[1]), p) for m, p in folders if m), reverse=True)


def verify(folder):
    """None when the checkpoint is complete, else what is wrong with it."""
    try:
        files = read_json(Path(folder) / MANIFEST)["files"]
    except (UserError, KeyError):
        return f"{folder}: has no readable {MANIFEST}"
    for name, facts in files.items():
        path = Path(folder) / name
        if not path.is_file() or path.stat().st_size != facts["size"] or sha256(path) != facts["sha256"]:
            return f"{path}: is missing or damaged"
    return None


def load(root, which="auto"):
    """(folder, facts) of the newest complete checkpoint under root, or of the folder `which`; None if there is none.

    Raises UserError when `which` names a folder that is missing or damaged. Every rank must call it.
    """
    folder = dist.on_main(_choose, root, which)
    return folder and (folder, read_json(folder / FACTS))


def _choose(root, which):
    if which not in ("auto", "latest"):
        folder = Path(which).resolve()  # checkpoint_epoch_3.pt may be another name of it
        if not folder.is_dir():
            others = ", ".join(sorted(p.name for p in Path(which).parent.glob("checkpoint*"))[-5:])
            raise UserError(f"{which}: no such checkpoint" + (f"; there are {others}" if others else ""))
        if fault := verify(folder):
            raise UserError(fault)
        return folder
    for _, folder in found(root):
        fault = verify(folder)
        if not fault:
            return folder
        dist.say(f"warning: {fault}; trying the checkpoint before it")
    return None


def read(folder, like):
    """{name: tensor} of a checkpoint, for the names of `like` (which may hold more or fewer: see the caller).

    like: {name: tensor}; where those are shards (DTensors), so are the results. A file of shards is read into whole
    tensors and the other way round.
    """
    if not (folder / SHARDS).is_dir():
        return load_tensors(folder / STATE)
    import torch
    import torch.distributed.checkpoint as dcp

    reader = dcp.HuggingFaceStorageReader(str(folder / SHARDS))
    stored = reader.read_metadata().state_dict_metadata
    into = {}
    for name, facts in stored.items():
        known = like.get(name)
        fits = known is not None and tuple(known.shape) == tuple(facts.size)
        into[name] = torch.empty_like(known) if fits else torch.empty(facts.size, dtype=facts.properties.dtype)
    dcp.load(into, storage_reader=reader, no_dist=not torch.distributed.is_initialized())
    return into
