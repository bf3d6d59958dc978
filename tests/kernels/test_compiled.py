"""Every kernel compiles for the GPUs we name, and none spills without a reason: proven without a GPU.

All 1,227 take ten minutes and more, so they are slow tests; what models ship with on the GPU that is planned for (bf16 on sm_90) is
compiled each time.
"""

import importlib
import itertools
import json
import os
import subprocess
import sys

import pytest
import torch
from util import ROOT

from kernels import report, switch, tune


def module(name, *argv, **kwargs):
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANODIFF_KERNELS")}
    return subprocess.run(
        [sys.executable, "-m", f"kernels.{name}", *argv],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env=env,
        timeout=800,
        **kwargs,
    )


TRAINED = {"backward_kv", "backward_q", "backward_bias", "delta", "whole_backward", "sums", "backward_x", "norm_backward", "rope_backward",
           "gated_backward", "gradient"}  # fmt: skip


@pytest.mark.parametrize("heads", [(0, 40, 64), (80, 160), (256, 512)], ids=str)
def test_what_is_shipped_compiles(tmp_path, heads):
    """In bf16 for sm_90; the other kernels with the first part."""
    heads = [str(k) for k in heads]
    done = module(
        "report",
        "--check",
        "--arch",
        "sm_90",
        "--dtype",
        "bfloat16",
        "--head",
        *heads,
        "--json",
        str(tmp_path / "rows.json"),
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    for row in rows:
        # whole heads, their strides multiples of 16 bytes: 40 values are no multiple of 16, which the compiler must be told
        if row["head"] and row["case"] in ("plain", "odd length", "77 keys", "backward", "backward odd"):
            assert row["narrow"] <= 2, row
            if row["kernel"] in ("forward", "backward_kv", "backward_q") and row["head"] <= 80:
                assert row["ahead"], row
    found = {r["kernel"] for r in rows}
    attention = {"forward", "forward_short", "backward_kv", "backward_q", "backward_bias", "delta"}
    assert attention <= found and ("0" not in heads or found >= TRAINED)


@pytest.mark.slow
def test_every_kernel_compiles(tmp_path):
    """Every kernel × dtype × head size for sm_80 and sm_90, every forward one for gfx942; `make kernels-report`."""
    done = module("report", "--check", "--json", str(tmp_path / "rows.json"))
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = json.loads((tmp_path / "rows.json").read_text())
    compiled = {(r["arch"], r["dtype"], r["head"]) for r in rows if r["kernel"] == "forward"}
    assert compiled == {(a, d, k) for a in tune.TUNED for d in report.DTYPES for k in report.HEAD_SIZES}
    trained = {(r["arch"], r["kernel"]) for r in rows if r["dtype"] == "bfloat16"}
    for kernel in (*TRAINED, "forward_short"):
        assert {("sm_80", kernel), ("sm_90", kernel)} <= trained
    # what the compiler's targets really are: another one gives other code
    sizes = {
        a: [r["registers"] for r in rows if r["arch"] == a and r["kernel"] == "forward"] for a in ("sm_80", "sm_90")
    }
    assert sizes["sm_80"] != sizes["sm_90"]


@pytest.mark.slow
def test_gpus_that_the_table_does_not_know():
    """The default configurations fit the 99 KB of a consumer GPU."""
    assert "sm_86" not in json.loads((ROOT / "kernels" / "table.json").read_text())
    done = module("report", "--check", "--arch", "sm_86", "--dtype", "float16", "--head", "0", "40", "80", "128", "512")
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]


def test_the_table_knows_what_the_issue_names():
    table = json.loads((ROOT / "kernels" / "table.json").read_text())
    for arch in ("sm_80", "sm_90"):
        assert table[arch]["chosen"]
        for kind in ("forward", "forward_masked", "backward_kv", "backward_q", "backward_bias"):
            for K in report.HEAD_SIZES:
                for dtype in report.DTYPES:
                    assert table[arch][f"attention.{kind}"][f"{K}/{dtype}"]["num_warps"] in (4, 8)


def test_faults_are_found():
    row = {"kernel": "forward", "dtype": "bfloat16", "head": 64, "arch": "sm_80", "spilled": 0, "shared": 1000}
    assert report.faults([row]) == []
    assert report.faults([row | {"spilled": 8}]) and report.faults([row | {"shared": 200 << 10}])
    assert not report.faults([row | {"shared": 200 << 10, "arch": "sm_90"}])
    timed = row | {"arch": "sm_90", "kernel": "backward_kv", "spilled": 8, "case": "backward"}
    assert not report.faults([timed]), "chosen by time on a GPU"
    assert report.faults([timed | {"head": 128}]) and report.faults([timed | {"case": "backward masked"}])


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_without_a_gpu_tuning_and_timing_say_so():
    for name in ("tune", "bench"):
        done = module(name)
        assert done.returncode == 2 and done.stderr.splitlines()[-1].startswith("error: "), done.stderr
        assert "no CUDA device" in done.stderr and "Traceback" not in done.stderr


def test_candidates_go_from_large_to_small():
    for kind in tune.KINDS:
        for K in report.HEAD_SIZES:
            found = tune.candidates(kind, K, 2, 163 << 10)
            assert found and all(c["num_warps"] in (4, 8) for c in found)
    largest = {"BLOCK_L": 128, "BLOCK_S": 128, "num_warps": 8, "num_stages": 3}
    assert largest in tune.candidates("forward", 64, 2, 163 << 10)
    assert largest not in tune.candidates("forward", 512, 2, 163 << 10)


def test_a_table_has_a_line_for_each_kernel_and_reads_back():
    table = json.loads((ROOT / "kernels" / "table.json").read_text())
    assert json.loads(tune._lines(table)) == table


def test_measured_rows_are_the_fastest(monkeypatch):
    """The choices of a tuning day with the GPU's times replaced by known ones: a tile's, one of PyTorch's own, one that is refused."""
    bench = importlib.import_module("kernels.bench")

    def took(run, call, sets):
        (name,) = [k for k, v in switch._forced.items() if v] or [None]
        if name is None:  # one of PyTorch's own
            return 0.9 if next(fused) == peer else None
        config = switch._forced[name]
        if config.get("num_warps") == 8:
            return None
        return 1.0 if wanted.items() <= config.items() else 2.0

    monkeypatch.setattr(bench, "attempt", took)
    monkeypatch.setattr(bench, "sets", lambda make: None)
    monkeypatch.setattr(tune, "mover", lambda name, shape: (None, None))
    monkeypatch.setattr(tune, "pictures", lambda *shape: (None, None))
    arch, wanted = {}, {"BLOCK_L": 64, "BLOCK_S": 64}
    shapes = [("forward", 2, 4096, 10, 64, 4096), ("backward_q", 2, 4096, 10, 64, 4096)]
    for peer, ratio in (("cudnn", 0.9), ("flash", 0.9), (None, None)):
        fused = itertools.cycle(("flash", "cudnn", "efficient"))
        rows = list(tune.attention_day(arch, shapes, (False,)))
        assert [r.get("ratio") for r in rows] == [ratio, None] and [r["us"] for r in rows] == [1e3, 1e3]
        for kind in ("forward", "backward_q"):
            for key in ("64/4096/bfloat16", "64/float16"):
                row = arch[f"attention.{kind}"][key]
                assert row.items() >= wanted.items() and row["num_warps"] == 4
                assert row.get("TORCH") == (peer if kind == "forward" else None)
    wanted = {"num_warps": 9}  # in none: everything takes the same but what is refused
    first, *_ = tune.movers_day(arch)
    assert first["case"] == "norms.layer 512"
    assert arch["norms.layer"]["512"] == tune.WARPS[0] and arch["add_bias"]["2"]["num_warps"] == 2
    wanted = {"WIDE": 64, "STAGES": 1}
    *_, last = tune.group_norm_day(arch)
    assert last["loss"] == 1.0 and arch["group_norm"]["channels_last/2"].items() >= wanted.items()
    assert not switch._forced or not any(switch._forced.values())
