"""Checkpoints that are either complete or not there.

Protocol: everything is written into `checkpoint-<step>.tmp-<pid>/`, each file fsynced, then MANIFEST.json with sizes
and SHA-256, then one rename; only afterwards are old checkpoints pruned. The loader takes the newest folder whose
manifest verifies and says so when it had to step back. Tensors are safetensors, facts are JSON: no pickle.
"""

import hashlib
import os
import re
import shutil
import sys
from pathlib import Path

from nanodiff.config import UserError, read_json
from nanodiff.weights import load_tensors, save_tensors, write_json

MANIFEST = "MANIFEST.json"
NAME = re.compile(r"checkpoint-(\d+)")


def save(root, step, tensors, facts, keep=None):
    """Write `root/checkpoint-<step>/` with state.safetensors and state.json; keep the newest `keep` checkpoints."""
    root = Path(root)
    final, tmp = root / f"checkpoint-{step}", root / f"checkpoint-{step}.tmp-{os.getpid()}"
    try:
        if tmp.exists():
            shutil.rmtree(tmp)
        tmp.mkdir(parents=True)
        save_tensors(tmp / "state.safetensors", tensors)
        write_json(tmp / "state.json", facts)
        files = {p.name: {"size": p.stat().st_size, "sha256": _sha256(p)} for p in sorted(tmp.iterdir())}
        write_json(tmp / MANIFEST, {"step": step, "files": files})
        _fsync(tmp)
        aside = root / f"{tmp.name}.old"
        if final.exists():  # the same step again: the old one goes aside, never away, until the new one stands
            final.rename(aside)
        tmp.rename(final)
        _fsync(root)
        shutil.rmtree(aside, ignore_errors=True)
    except OSError as e:
        raise UserError(f"{final}: cannot be written: {e.strerror}") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)
    for _, old in found(root)[keep:] if keep else []:
        shutil.rmtree(old)
    return final


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
        if not path.is_file() or path.stat().st_size != facts["size"] or _sha256(path) != facts["sha256"]:
            return f"{path}: is missing or damaged"
    return None


def load(root, which="auto"):
    """(tensors, facts) of the newest complete checkpoint under root, or of the folder `which`; None if there is none.

    Raises UserError when `which` names a folder that is missing or damaged.
    """
    if which not in ("auto", "latest"):
        if not Path(which).is_dir():
            raise UserError(f"{which}: no such checkpoint")
        if fault := verify(which):
            raise UserError(fault)
        folder = Path(which)
    else:
        for _, folder in found(root):
            fault = verify(folder)
            if not fault:
                break
            print(f"warning: {fault}; trying the checkpoint before it", file=sys.stderr)
        else:
            return None
    return load_tensors(folder / "state.safetensors"), read_json(folder / "state.json")


def _sha256(path):
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def _fsync(folder):
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)
