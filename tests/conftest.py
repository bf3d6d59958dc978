"""Tests run offline on a CPU. Golden files come from reference libraries, recorded outside this project."""

import gc
import os
from collections import Counter, defaultdict
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"  # before anything imports huggingface_hub
if "PYTEST_XDIST_WORKER" in os.environ:  # before anything imports torch: each of several workers computes on one core
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch

if not torch.cuda.is_available():  # before anything imports kernels: Triton's interpreter runs them on the CPU
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.quicken()


def pytest_collection_finish():
    gc.freeze()  # what is imported and collected stays: the garbage collector need not go through it again and again,
    gc.set_threshold(20_000, 20, 50)  # nor so often through what the tests leave


@pytest.fixture(autouse=True)
def _deterministic():
    torch.manual_seed(0)
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))


def pytest_terminal_summary(terminalreporter):
    """What ran where: seconds of each folder, why tests were skipped, the processor, a count."""
    say = terminalreporter.write_line
    if "EXERCISES" not in os.environ:  # else a reader's own functions are tested (make exercise): the count is enough
        _say_where(terminalreporter, say)
    passed, failed, errors, left = (
        len(terminalreporter.stats.get(k, ())) for k in ("passed", "failed", "error", "skipped")
    )
    say(f"{passed} passed, {failed + errors} failed, {left} skipped")


def _say_where(terminalreporter, say):
    from nanodiff.device import onednn

    seconds, skipped = defaultdict(float), Counter()
    for reports in terminalreporter.stats.values():
        for report in reports:
            if isinstance(report, pytest.TestReport):
                seconds[Path(report.nodeid.split("::")[0]).parent.as_posix()] += report.duration
                if report.skipped and isinstance(report.longrepr, tuple):
                    skipped[report.longrepr[2].removeprefix("Skipped: ")] += 1
    terminalreporter.section("where the time went")
    for folder, taken in sorted(seconds.items()):
        say(f"{folder:<16} {taken:7.0f} s in its tests (all workers together)")
    for reason, times in skipped.most_common():
        say(f"skipped {times}: {reason}")
    workers = getattr(terminalreporter.config.option, "numprocesses", None)
    threads = os.environ.get("OMP_NUM_THREADS") or ("1" if workers else "2")
    facts = onednn.processor() | {"threads": f"{threads} in each of {workers} workers" if workers else threads}
    say(", ".join(f"{k}: {v}" for k, v in facts.items()))
