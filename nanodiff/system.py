"""What Linux has and macOS or Windows has not, each with its counterpart there."""

import ctypes
import os
import signal
import sys
from pathlib import Path

try:
    import fcntl
    import resource
except ImportError:  # Windows
    fcntl = resource = None

WINDOWS = os.name == "nt"
# asks a training run for a checkpoint, and to go on: kill -USR1; on Windows Ctrl-Break
SAVE = getattr(signal, "SIGUSR1", None) or getattr(signal, "SIGBREAK", None)
FAR = 1 << 30  # the byte of a lock file that stands for all of it on Windows, behind the text that others read


def ignore(*names):
    """Ignore the signals of these names that there are here."""
    for name in names:
        if hasattr(signal, name):
            signal.signal(getattr(signal, name), signal.SIG_IGN)


def lock(file):
    """Lock an open file for this process alone, until it is closed. Raises OSError where another process has it."""
    if fcntl:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return
    import msvcrt

    os.lseek(file.fileno(), FAR, os.SEEK_SET)
    msvcrt.locking(file.fileno(), msvcrt.LK_NBLCK, 1)
    os.lseek(file.fileno(), 0, os.SEEK_SET)


def after_fork(f):
    """Call f in every process that is forked from this one; where nothing forks (Windows), never."""
    if hasattr(os, "register_at_fork"):
        os.register_at_fork(after_in_child=f)


def sync(folder):
    """Have the names of the files in a folder on the disk. Windows opens no folders, and writes names with their files."""
    if WINDOWS:
        return
    fd = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(fd)
    finally:
        os.close(fd)


def symlink(path, target):
    """Let the new name `path` stand for the file or folder `target` beside it. Without the right to links (Windows has them for developers) nothing
    is made, and False returned."""
    try:
        path.symlink_to(target, target_is_directory=(path.parent / target).is_dir())
    except OSError:
        if not WINDOWS:
            raise
        return False
    return True


def libc():
    """The process's own C library, or None where it cannot be asked (Windows)."""
    return None if WINDOWS else ctypes.CDLL(None, use_errno=True)


class _Windows(ctypes.Structure):
    """PROCESS_MEMORY_COUNTERS (psapi.h)."""

    _fields_ = (("cb", ctypes.c_uint32), ("PageFaultCount", ctypes.c_uint32), *((name, ctypes.c_size_t) for name in (
        "PeakWorkingSetSize", "WorkingSetSize", "QuotaPeakPagedPoolUsage", "QuotaPagedPoolUsage", "QuotaPeakNonPagedPoolUsage",
        "QuotaNonPagedPoolUsage", "PagefileUsage", "PeakPagefileUsage")))  # fmt: skip


def peak_memory():
    """Bytes of the largest resident memory of this process so far."""
    status = Path("/proc/self/status")  # getrusage would count a parent's, too
    lines = status.read_text(encoding="utf-8").splitlines() if status.exists() else []
    if known := [int(line.split()[1]) << 10 for line in lines if line.startswith("VmHWM")]:
        return known[0]
    if resource:
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        return peak if sys.platform == "darwin" else peak << 10
    counters = _Windows(ctypes.sizeof(_Windows))
    kernel = ctypes.windll.kernel32
    kernel.GetCurrentProcess.restype = ctypes.c_void_p
    asked = kernel.K32GetProcessMemoryInfo(
        ctypes.c_void_p(kernel.GetCurrentProcess()), ctypes.byref(counters), counters.cb
    )
    return counters.PeakWorkingSetSize if asked else 0


def memory():
    """Bytes of memory of this machine; 0 where it does not say."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0
