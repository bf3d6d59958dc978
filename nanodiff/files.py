"""Files that are there as a whole or not at all, and folders that can be written."""

import json
import os
import platform
import stat
from pathlib import Path

from nanodiff.config import UserError

ASSETS = Path(__file__).parent / "_assets"  # what comes with the program: installed, it is inside the package
ASSETS = ASSETS if ASSETS.is_dir() else Path(__file__).parents[1] / "assets"


def write_bytes(path, data):
    """Write a file of these bytes. See write_file()."""
    write_file(path, lambda f: f.write(data))


def write_file(path, write):
    """write(f) a file so that a reader sees the old one or the new one, never half of it; mode by umask.

    Temporary file, fsync, rename. A destination that exists and is no regular file (a device, a folder) is refused.
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
            os.fsync(f.fileno())
        os.replace(tmp, path)
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
    finally:
        tmp.unlink(missing_ok=True)


def write_json(path, value):
    write_bytes(path, (json.dumps(value, indent=2, ensure_ascii=False, default=str) + "\n").encode("utf-8", "replace"))


def out_dir(path):
    """Create an output folder and prove that it can be written, before any work. Raises UserError."""
    path = Path(path)
    try:
        path.mkdir(parents=True, exist_ok=True)
        probe = path / f".probe-{platform.node()}-{os.getpid()}"
        probe.touch()
        probe.unlink()
    except (FileExistsError, NotADirectoryError):
        raise UserError(f"{path}: is a file, not a folder") from None
    except OSError as e:
        raise UserError(f"{path}: cannot be written: {e.strerror}") from None
    return path
