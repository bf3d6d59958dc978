"""Scripts run as a user runs them, without the seconds that importing torch takes: a process that has imported everything forks for each.

    done = forks.run(["sample.py", "--prompt", "a"])     # what subprocess.run([sys.executable, …], capture_output=True, text=True) gives

Such a run is a process of its own: its memory, locks, signals and exit are its alone. From a new Python it differs in this: everything is
imported before it begins, the repository is on its path, all runs have one hash seed, and Python's own end is skipped. So what is about a
start or an end (an import, another environment, a signal to a child) is tested with a new Python: util.run(…, env=…), util.start().
"""

import atexit
import contextlib
import functools
import gc
import importlib
import json
import os
import pkgutil
import random
import runpy
import select
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import traceback
from pathlib import Path

import numpy

ROOT = Path(__file__).parent.parent
IMPORTED = (
    "torch._dynamo",
    "torch.distributed.run",
    "torch.utils.data",
    "matplotlib.pyplot",
    "scipy.linalg",
    "tokenizers",
    "huggingface_hub",
)
PASSING = {"PYTEST_CURRENT_TEST", "TORCHINDUCTOR_CACHE_DIR"}  # variables that come and go, of no consequence to a run
LATE = "late"


def run(argv, cwd=ROOT, timeout=300):
    """The finished process of `python ARGV`, its text captured. argv: a script and its words, or "-m", a module and its words.

    Raises subprocess.TimeoutExpired after `timeout` seconds; then the process, and what it has started, is killed.
    """
    server = _server()
    with tempfile.TemporaryFile("w+", encoding="utf-8") as out, tempfile.TemporaryFile("w+", encoding="utf-8") as err:
        request = json.dumps({"argv": argv, "cwd": str(cwd), "timeout": timeout}).encode()
        socket.send_fds(server, [request], [out.fileno(), err.fileno()])
        code = server.recv(64).decode()
        if not code:
            raise RuntimeError("the process that forks the tests' runs is gone")
        if code == LATE:
            raise subprocess.TimeoutExpired(argv, timeout)
        texts = []
        for file in (out, err):
            file.seek(0)
            texts.append(file.read())
    return subprocess.CompletedProcess(argv, int(code), *texts)


def may_serve(argv):
    """Whether a forked run is what a new Python would be: a script or a module, in the environment in which the server was started."""
    known = sys.platform == "linux" and (argv[0].endswith(".py") or argv[0] == "-m")
    return known and _environment() == _started_in()


def _environment():
    return {k: v for k, v in os.environ.items() if k not in PASSING}


@functools.cache
def _started_in():
    _server()
    return _environment()


@functools.cache
def _server():
    """A socket to the server of this process, which ends with it."""
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    with theirs:
        child = subprocess.Popen(
            [sys.executable, "-m", "tests.forks", str(theirs.fileno())],
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            pass_fds=[theirs.fileno()],
        )
    atexit.register(child.wait)
    atexit.register(ours.close)  # the last registered is the first called
    return ours


def _serve(connection):
    """Answer requests until the tests end, each with an exit code or LATE. Returns in each child, with what it is to run."""
    while True:
        message, files, *_ = socket.recv_fds(connection, 1 << 20, 2)
        if not message:  # the other end is closed
            sys.exit()
        request = json.loads(message)
        timeout = request.pop("timeout")
        pid = os.fork()
        if pid == 0:
            os.setpgid(0, 0)
            connection.close()
            for file, standard in zip(files, (1, 2), strict=True):
                os.dup2(file, standard)
                os.close(file)
            return request
        for file in files:
            os.close(file)
        watched = os.pidfd_open(pid)
        late = not select.select([watched], [], [], timeout)[0]
        os.close(watched)
        if late:
            os.kill(pid, signal.SIGKILL)
        code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        with contextlib.suppress(ProcessLookupError):
            os.killpg(pid, signal.SIGKILL)  # what it may have left behind
        connection.send((LATE if late else str(code)).encode())


def _become(argv, cwd):
    """Run argv in this process, and end it."""
    random.seed()  # a new Python has another state each time
    numpy.random.seed()
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(cwd)
    code = 1
    try:
        if argv[0] == "-m":
            sys.argv = argv[1:]
            sys.modules.pop(argv[1], None)  # runpy warns of a module that is there before it is run
            runpy.run_module(argv[1], run_name="__main__", alter_sys=True)
        else:
            sys.argv = argv
            runpy.run_path(argv[0], run_name="__main__")
        code = 0
    except SystemExit as e:
        code = e.code if isinstance(e.code, int) else int(e.code is not None)
        if e.code is not None and not isinstance(e.code, int):
            print(e.code, file=sys.stderr)
    except BaseException:  # as a Python ends that nobody caught it in
        traceback.print_exc()
    finally:
        threading._shutdown()
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)  # not by the interpreter's own end, which takes half a second to free what is imported


if __name__ == "__main__":
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C ends the tests, and they this
    for module in (*IMPORTED, *(m.name for m in pkgutil.walk_packages([str(ROOT / "nanodiff")], "nanodiff."))):
        with contextlib.suppress(ModuleNotFoundError):  # an optional package
            importlib.import_module(module)
    gc.collect()
    gc.freeze()  # what is imported stays in pages that all runs share
    _become(**_serve(socket.socket(fileno=int(sys.argv[1]))))
