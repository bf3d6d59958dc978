"""A script of ours in a Python that lacks what another system lacks: python tests/elsewhere.py windows|macos sample.py …

Modules, signals and functions are taken away, and the other system's put in their place, before anything of ours is imported.
"""

import builtins
import fcntl
import io
import mmap
import os
import runpy
import signal
import sys
import types
from pathlib import Path

import torch  # which has its own ways there, and is not what is tried

ROOT = Path(__file__).resolve().parents[1]


def hide_proc():
    """No /proc."""
    real = io.open

    def opened(file, *args, **kwargs):
        if str(file).startswith("/proc/"):
            raise FileNotFoundError(2, "No such file or directory", str(file))
        return real(file, *args, **kwargs)

    io.open = builtins.open = opened
    exists = Path.exists
    Path.exists = lambda self, **more: not str(self).startswith("/proc/") and exists(self, **more)


def locking(fd, mode, count):
    """msvcrt's, of the byte at the file's place."""
    assert mode == 2 and os.lseek(fd, 0, os.SEEK_CUR) >= 1 << 30, "the text that others read must not be locked"
    fcntl_lock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)


def refused(*args, **kwargs):
    raise OSError(1314, "A required privilege is not held by the client")


def macos():
    hide_proc()
    from nanodiff import system

    system.sys = types.SimpleNamespace(platform="darwin")
    torch.backends.mps.is_available = lambda: True


def windows():
    hide_proc()
    for name in ("fcntl", "resource", "pwd", "grp", "termios"):
        sys.modules[name] = None
    sys.modules["msvcrt"] = types.SimpleNamespace(LK_NBLCK=2, locking=locking)
    for name in ("SIGUSR1", "SIGUSR2", "SIGCHLD", "SIGHUP", "SIGALRM", "SIGKILL"):
        delattr(signal, name)
    torch.utils.data._utils.signal_handling.IS_WINDOWS = True
    signal.SIGBREAK = signal.SIGCONT  # some signal that this system has
    del mmap.MADV_DONTNEED
    for name in ("register_at_fork", "sysconf", "getuid", "sched_getaffinity"):
        delattr(os, name)
    os.symlink = Path.symlink_to = refused
    from nanodiff import system

    system.WINDOWS = True
    kernel = types.SimpleNamespace(
        GetCurrentProcess=lambda: 0, K32GetProcessMemoryInfo=lambda process, counters, size: 0
    )
    kernel.GetCurrentProcess = type("F", (), {"__call__": lambda self: 0})()
    system.ctypes.windll = types.SimpleNamespace(kernel32=kernel)


fcntl_lock = fcntl.flock
if __name__ == "__main__":  # its own workers import this file
    sys.path.insert(0, str(ROOT))
    torch.multiprocessing.set_start_method("spawn")  # as both have it: nothing is inherited but what can be pickled
    sys.modules["triton"] = None  # its wheels are for Linux
    {"windows": windows, "macos": macos}[sys.argv[1]]()
    sys.argv = sys.argv[2:]
    runpy.run_path(str(ROOT / sys.argv[0]), run_name="__main__")
