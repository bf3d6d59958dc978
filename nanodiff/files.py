"""Files that are there as a whole or not at all, and folders that can be written.

Explained in the book (docs/book): chapter 16.
"""

import contextlib
import errno
import hashlib
import json
import os
import platform
import shutil
import stat
from pathlib import Path

from nanodiff import commandline, system
from nanodiff.config import UserError, read_json


def inside(folder, suffix=""):
    """The files in a folder and its folders, linked ones too (but for a link to a folder around it), whose names end with `suffix`, in capitals or not."""

    def walk(path, around):
        around = {*around, os.path.realpath(path)}
        for entry in os.scandir(path):
            if not entry.is_dir():
                if entry.name.lower().endswith(suffix):
                    yield Path(path) / entry.name
            elif os.path.realpath(entry.path) not in around:
                yield from walk(Path(path) / entry.name, around)

    yield from walk(folder, ()) if os.path.isdir(folder) else ()


def write_bytes(path, data, sync=True):
    """Write a file of these bytes. See write_file()."""
    write_file(path, lambda f: f.write(data), sync)


def write_file(path, write, sync=True):
    """write(f) a file so that a reader sees the old one or the new one, never half of it; mode by umask.

    Temporary file, fsync (unless not `sync`: then only a lost power supply can leave half of it), rename. A destination that exists and is no regular file (a device, a folder) is refused.
    """
    path = Path(path)
    if path.exists() and not stat.S_ISREG(path.resolve().stat().st_mode):
        raise UserError(f"{path}: is not a regular file, not overwritten")
    path = path.resolve()  # a link to a file stays a link
    tmp = path.with_name(f".{path.name}.tmp-{os.getpid()}")
    try:
        with open(tmp, "wb") as f:
            write(f)
            f.flush()
            if sync:
                os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        with contextlib.suppress(NotADirectoryError):  # it was to lie beneath a file
            tmp.unlink(missing_ok=True)


def write_folder(folder, fill):
    """fill(new folder) in place of a folder, so that a reader sees the old one or the new one, never files of both. What else lies in the old one goes with
    it."""
    folder = folder.resolve()  # a link to a folder stays a link
    fresh, old = (folder.with_name(f"{folder.name}.{what}") for what in ("part", "old"))
    shutil.rmtree(fresh, ignore_errors=True)
    try:
        fill(fresh)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)  # on a full disk it would take the room of what comes next
        raise
    if folder.exists():
        shutil.rmtree(old, ignore_errors=True)
        folder.rename(old)
    fresh.rename(folder)
    shutil.rmtree(old, ignore_errors=True)


def sha256(path):
    """Of a file's bytes, in hex."""
    with open(path, "rb") as f:
        return hashlib.file_digest(f, "sha256").hexdigest()


def apart(given, written):
    """Refuse to read what a run writes or deletes. given: {option: path or None}; written: folders. Raises UserError naming the option."""
    for name, path in given.items():
        where = Path(path).resolve() if isinstance(path, str | Path) and str(path) and Path(path).exists() else None
        for folder in map(Path, written):
            if where and where.is_relative_to(folder.resolve()):
                raise UserError(
                    f"`{name}` {path}: this run writes to {folder}, and would replace it; take another `output_dir`"
                )


def settled(folder, settings, begun=False):
    """Keep the settings of a study whose parts are made one by one, in settings.json. begun: results are there already. Raises UserError for a
    folder that was made with others."""
    how = Path(folder) / "settings.json"
    if read_json(how) != settings if how.exists() else begun:
        raise UserError(f"{folder}: was made with other settings ({how.name}); take another --output-dir")
    write_json(how, settings)


def write_json(path, value):
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace"))


def link(path, target):
    """Let the name `path` stand for `target` beside it; a link that is there is replaced, anything else is left; none is made where links are
    not allowed."""
    path = Path(path)
    if path.is_symlink() or not path.exists():
        new = path.with_name(f".{path.name}.tmp-{os.getpid()}")
        new.unlink(missing_ok=True)
        if system.symlink(new, target):
            new.replace(path)


def append(path, data):
    """Add whole lines to a file at once; several processes may. data: text or bytes. Raises UserError."""
    try:
        with open(path, "ab", buffering=0) as f:
            data = data.encode("utf-8", "replace") if isinstance(data, str) else data
            if f.write(data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None


def out_dir(path):
    """Create an output folder and prove that it can be written, before any work. Raises UserError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{platform.node()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        if path.is_symlink() and not path.exists():
            raise UserError(f"{path}: is a link to nothing ({os.readlink(path)})") from None
        raise UserError(f"{path}: is a file, not a folder") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
    return path


held = {}  # {lock file: (the open file, the Claims on it)} of this process


class Claim:
    """A folder that is this process's own until close() or the end of the script: see claim()."""

    def __init__(self, path, user):
        self.path, self.user = path, user
        held[path][1].append(self)

    def close(self):
        lock, claims = held.get(self.path, (None, []))
        if self in claims:
            claims.remove(self)
        if lock and not claims:
            del held[self.path]
            ends = [lambda: self.path.unlink(missing_ok=True), lock.close]
            for end in reversed(ends) if system.WINDOWS else ends:  # Windows deletes no open file
                with contextlib.suppress(OSError):  # what is written there is of no importance
                    end()


def claim(folder, user=None):
    """Make an output folder this process's own: a second run in it would mix its files with the first one's. user: which part of the
    process wants it; parts of several names, and None, share it. Raises UserError naming the process that has it."""
    path = out_dir(folder).resolve() / ".lock"
    if path not in held:
        held[path] = (_locked(path, folder), [])
        if _let_go not in commandline.endings:
            commandline.endings.append(_let_go)
    elif user and user in [other.user for other in held[path][1]]:
        raise UserError(f"{folder}: another run is using this folder (process {os.getpid()})")
    return Claim(path, user)


def _locked(path, folder):
    """The lock file of a folder, open and locked."""
    while True:
        try:
            lock = open(path, "a+", encoding="utf-8")  # noqa: SIM115  held until close()
        except OSError as e:
            raise UserError(f"{path}: cannot be written: {e.strerror}") from None
        try:
            system.lock(lock)
        except OSError:
            lock.seek(0)
            who = lock.read().strip()
            lock.close()
            raise UserError(f"{folder}: another run is using this folder (process {who})") from None
        if path.exists() and os.fstat(lock.fileno()).st_ino == path.stat().st_ino:
            break
        lock.close()  # its owner ended, and took the file away, between the two calls
    system.after_fork(lock.close)  # workers must not keep the folder when this process dies
    with contextlib.suppress(OSError):  # a full disk: the lock holds without its text
        lock.truncate(0)
        lock.write(f"{os.getpid()} on {platform.node()}")
        lock.flush()
    return lock


def _let_go():
    """At the end of a script: everything that it claimed."""
    for _, claims in list(held.values()):
        for one in list(claims):
            one.close()
