"""The switch, and what torch.library makes of the kernels: compile, FakeTensor, checkpoint, DDP and FSDP."""

import importlib
import os
import subprocess
import sys
import warnings

import pytest
import torch
import torch.distributed as dist
from kernel_cases import normal
from torch import nn
from util import ROOT, rms_ratio

import kernels
from kernels import launch, switch
from nanodiff.device.dist import finish

interpreter = pytest.mark.skipif(not switch.INTERPRET, reason="for the interpreter; test_gpu.py is for a GPU")


def python(code, **env):
    """Run code in a fresh process without the interpreter; (stdout, stderr)."""
    env = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "NANODIFF_KERNELS")} | env
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=env, timeout=120)
    assert done.returncode == 0, done.stderr
    return done.stdout, done.stderr


def test_ours_is_the_package_called_kernels():
    """A public package has the same name; it must never be the one that is imported."""
    assert str(ROOT) in kernels.__file__


ATTEND = "import torch, kernels; x = torch.randn(1, 5, 1, 16); "


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_auto_says_each_reason_once():
    out, err = python(ATTEND + "kernels.attention(x, x, x); kernels.attention(x, x, x); kernels.geglu(x)")
    assert err.splitlines() == ["kernels: PyTorch's own operators, since there is no CUDA device"]
    assert out == ""


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_only_rank_0_speaks():
    assert python(ATTEND + "kernels.attention(x, x, x)", RANK="1")[1] == ""


def test_torch_is_silent():
    assert python(ATTEND + "kernels.attention(x, x, x)", NANODIFF_KERNELS="torch")[1] == ""


def test_a_missing_triton_is_a_reason():
    """`import triton` blocked: everything still computes, and says why."""
    code = "import sys, os; sys.modules['triton'] = None; os.environ['NANODIFF_KERNELS'] = 'triton'; " + ATTEND
    code += "kernels.set_backend('auto'); print(kernels.attention(x, x, x).shape, kernels.switch.UNUSABLE)"
    out, err = python(code)
    assert "[1, 5, 1, 16]" in out and "Triton cannot be imported" in out and "Triton cannot be imported" in err


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_no_gpu_no_triton_import():
    """Tenths of a second that nobody on a laptop should wait for: neither for Triton, nor for what few pictures need."""
    slow = {"triton", "scipy.special", "scipy.linalg", "scipy.ndimage", "matplotlib", "numpy.polynomial", "sympy"}
    code = "import sys, torch, nanodiff.stories.sampling as script; from nanodiff.device import onednn; "
    code += f"onednn.unusable(torch.float32); print({slow} & set(sys.modules))"
    assert python(code)[0].strip() == "set()"


def test_an_unknown_word_is_refused():
    with pytest.raises(ValueError, match="cuda"):
        kernels.set_backend("cuda")
    done = subprocess.run(
        [sys.executable, "-c", "import kernels"], cwd=ROOT, capture_output=True, text=True,
        env=os.environ | {"NANODIFF_KERNELS": "fast"},
    )  # fmt: skip
    assert "'fast' is not one of auto, triton, torch" in done.stderr


@pytest.mark.skipif(torch.cuda.is_available(), reason="without a GPU")
def test_demanding_triton_without_a_gpu_is_an_error():
    code = "import kernels\ntry: kernels.set_backend('triton')\nexcept RuntimeError as e: print(e)"
    assert "no CUDA device" in python(code)[0]


def test_meta_tensors_need_no_kernel(capsys):
    x = torch.empty(1, 8, 4, 4, device="meta")
    with kernels.backend("triton"):
        assert kernels.group_norm(x, 2, x.new_empty(8), x.new_empty(8)).is_meta
    assert capsys.readouterr().err == ""


def test_old_gpus_have_a_reason(monkeypatch):
    """Kernels are compiled for sm_80 and later, and AMD's gfx942: others are told, not tried."""
    switch._old_gpu.cache_clear()
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (7, 5))
    assert "older than sm_80" in switch._old_gpu(torch.device("cuda", 0))
    switch._old_gpu.cache_clear()
    monkeypatch.setattr(torch.version, "hip", "6.4")
    monkeypatch.setattr(switch, "architecture", lambda: "gfx1100")
    assert "gfx1100" in switch._old_gpu(torch.device("cuda", 0))
    switch._old_gpu.cache_clear()


def test_training_by_torch_where_the_table_says_so(monkeypatch, capsys):
    """On a GPU where it was faster, under "auto" and with gradients only, and it is said."""
    x = torch.empty(1, 5, 2, 16, device="meta")
    monkeypatch.setattr(switch, "UNUSABLE", None)
    monkeypatch.setattr(switch, "_old_gpu", lambda device: None)
    monkeypatch.setattr(switch, "_table", lambda: {"sm_00": {"training": {"torch": ["attention"]}}, "sm_90": {}})
    gpu = type("OnAGpu", (), {"is_meta": False, "is_cuda": True, "device": torch.device("cuda", 0)})()
    monkeypatch.setattr(switch, "_said", set())

    def used(mode, arch, name="attention"):
        switch.set_target(arch)
        with kernels.backend(mode):
            return switch.use(name, gpu, lambda *args: None, x)

    try:
        assert used("auto", "sm_90") and used("triton", "sm_00") and used("auto", "sm_00", "rms_norm")
        assert not used("auto", "sm_00")
        with torch.no_grad():
            assert used("auto", "sm_00")
    finally:
        switch.set_target(None)
    assert "a training step is faster so on this GPU" in capsys.readouterr().err


@interpreter
def test_the_table_is_asked_special_rows_first(monkeypatch):
    table = {"sm_90": {"k": {"64/256/bfloat16": {"BLOCK_L": 1}, "64/bfloat16": {"BLOCK_L": 2}}}}
    monkeypatch.setattr(switch, "_table", lambda: table)
    keys_of = importlib.import_module("kernels.attention_tiles").keys_of
    switch.set_target("sm_90")
    try:
        default = {"BLOCK_L": 3, "num_warps": 4}
        assert switch.tuned("k", keys_of(64, 100, torch.bfloat16), default) == {"BLOCK_L": 1, "num_warps": 4}
        assert switch.tuned("k", keys_of(64, 5000, torch.bfloat16), default)["BLOCK_L"] == 2
        assert switch.tuned("k", keys_of(80, 100, torch.bfloat16), default) == default
        switch.set_target("sm_00")
        assert switch.tuned("k", keys_of(64, 100, torch.bfloat16), default) == default
    finally:
        switch.set_target(None)


# What torch.library makes of it -------------------------------------------------------------------------------


def operators():
    """{name: (operator, inputs)} with gradients wanted wherever they exist."""
    a, g, n, u = (importlib.import_module(f"kernels.{m}") for m in ("attention", "group_norm", "norms", "gated"))
    x, w, m = normal(2, 5, 24), normal(24), normal(2, 24)
    q, bias, picture, words = normal(1, 20, 2, 16), normal(1, 2, 20, 20), normal(1, 8, 4, 4), normal(30, 24)
    angle = normal(1, 20, 8)
    for t in (x, w, m, q, bias, picture, words):
        t.requires_grad_()
    return {
        "attention": (a.op, (q, q.detach(), q.detach(), bias, None, 0.25, True, 0)),
        "group_norm": (g.op, (picture, normal(8), normal(8), normal(1, 8), 2, 1e-5, True)),
        "norm": (n.norm_op, (x, w, w, 1e-5, False, False)),
        "adaLN": (n.norm_op, (x, m, m, 1e-5, False, True)),
        "rope": (n.rope_op, (q, normal(16), angle.cos(), angle.sin(), 1e-6, False)),
        "gated": (u.gated_op, (x[0], x[1], "silu")),
        "halves": (u.halves_op, (x[0], "gelu")),
        "losses": (u.losses_op, (x[0], words, torch.randint(0, 30, (5,)), -100, True)),
    }


@interpreter
@pytest.mark.parametrize("name", operators() if switch.INTERPRET else [])
def test_registration(name):
    """PyTorch's own check of an operator: schema, fake results, autograd, and all of it under AOT dispatch."""
    operator, inputs = operators()[name]
    tests = ("test_schema", "test_autograd_registration", "test_faketensor", "test_aot_dispatch_static")
    torch.library.opcheck(operator, inputs, test_utils=tests, atol=1e-4, rtol=1e-3)


class Block(nn.Module):
    """One of everything."""

    def __init__(self):
        super().__init__()
        self.gn = nn.GroupNorm(2, 16)
        self.ln = nn.LayerNorm(16)
        self.qkv, self.ff = nn.Linear(16, 48), nn.Linear(16, 32)

    def forward(self, x):
        h = kernels.group_norm(x, 2, self.gn.weight, self.gn.bias, silu=True).flatten(2).transpose(1, 2)
        h = kernels.layer_norm(h.contiguous(), self.ln.weight, self.ln.bias)
        q, k, v = self.qkv(h).view(len(x), -1, 3, 1, 16).unbind(2)
        h = kernels.attention(kernels.qk_norm_rope(q, self.ln.weight), k, v).flatten(2)
        return kernels.geglu(self.ff(h))


def gradients(module, x):
    module.zero_grad()
    module(x).square().sum().backward()
    return [p.grad.clone() for p in module.parameters()]


@interpreter
def test_compile_has_no_graph_break():
    torch.manual_seed(0)
    block, x = Block(), normal(2, 16, 3, 4)
    with kernels.backend("triton"):
        want, grads = block(x), gradients(block, x)
        compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
        torch.testing.assert_close(compiled(x), want)
        for got, grad in zip(gradients(compiled, x), grads, strict=True):
            torch.testing.assert_close(got, grad)


def test_compile_follows_the_switch(capfd):
    """The fallback has no graph break either, and the reason is told while it is traced."""
    switch._said.clear()
    block, x = Block(), normal(2, 16, 3, 4)
    torch._dynamo.reset()
    compiled = torch.compile(block, fullgraph=True, backend="aot_eager")
    with kernels.backend("auto"):
        compiled(x)
    assert capfd.readouterr().err.count("PyTorch's own operators") == 1
    with kernels.backend("torch"):  # traced again, for this mode
        compiled(x)
    assert capfd.readouterr().err == ""


@interpreter
def test_fake_tensors():
    """Shapes, strides and types are known without computing."""
    from torch._subclasses import FakeTensorMode

    block, x = Block(), normal(2, 16, 3, 4)
    with kernels.backend("triton"):
        want = block(x)
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            got = block(mode.from_tensor(x))
    assert got.shape == want.shape and got.dtype == want.dtype and got.stride() == want.stride()


@interpreter
def test_checkpointing():
    from torch.utils.checkpoint import checkpoint

    torch.manual_seed(0)
    block, x = Block(), normal(2, 16, 3, 4)
    with kernels.backend("triton"):
        want = gradients(block, x)
        block.zero_grad()
        checkpoint(block, x, use_reentrant=False).square().sum().backward()
    for p, grad in zip(block.parameters(), want, strict=True):
        assert torch.equal(p.grad, grad)


@interpreter
@pytest.mark.parametrize("kind", ["ddp", "fsdp"])
def test_parallel_wrappers(kind, tmp_path):
    torch.manual_seed(0)
    block, x = Block(), normal(2, 16, 3, 4)
    with kernels.backend("triton"):
        want = gradients(block, x)
        block.zero_grad()
        dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
        try:
            if kind == "ddp":
                wrapped = nn.parallel.DistributedDataParallel(block)
            else:
                from torch.distributed.device_mesh import init_device_mesh
                from torch.distributed.fsdp import fully_shard

                wrapped = fully_shard(block, mesh=init_device_mesh("cpu", (1,)))
            wrapped(x).square().sum().backward()
            got = [p.grad.full_tensor() if kind == "fsdp" else p.grad for p in wrapped.parameters()]
        finally:
            finish()
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b)


@interpreter
@pytest.mark.parametrize(
    "name", ["sd35-medium", *(pytest.param(n, marks=pytest.mark.slow) for n in ("sd-turbo", "sd15"))]
)
def test_whole_denoisers(name):
    """A UNet and an MMDiT, forward and backward, with kernels and without."""
    from util import TINY

    from nanodiff import pipeline

    net = pipeline.load(TINY / name, torch.float32, "cpu").net.train().requires_grad_()
    x = normal(1, net.cfg.in_channels, 8, 8)
    if name != "sd35-medium":
        inputs = (x, torch.tensor([300]), normal(1, 7, net.cfg.cross_attention_dim))
    else:
        inputs = (x, torch.tensor([300.0]), normal(1, 7, net.cfg.joint_attention_dim),
                  normal(1, net.cfg.pooled_projection_dim))  # fmt: skip
    results = {}
    for mode in ("torch", "triton"):
        net.zero_grad()
        with kernels.backend(mode):
            out = net(*inputs)
            out.square().sum().backward()
        results[mode] = [out.detach()] + [p.grad.clone() for p in net.parameters() if p.grad is not None]
    assert rms_ratio(results["triton"][0], results["torch"][0]) < 1e-5
    whole = [torch.cat([t.flatten() for t in results[mode][1:]]) for mode in ("triton", "torch")]
    assert rms_ratio(*whole) < 1e-4


# Plans that are kept --------------------------------------------------------------------------------------------


class Code:
    """Stands for a compiled kernel: that it was asked for."""

    function, packed_metadata = 0, ()

    def __init__(self):
        self.runs = 0

    def run(self, *args):
        self.runs += 1


@pytest.fixture
def started(monkeypatch):
    """[(kernel's name, its tensors' types)] of every kernel that would be compiled; launches do nothing."""
    found = []

    class Kernel:
        def __init__(self, kernel):
            self.kernel, self.arg_names = kernel, kernel.arg_names

        def __getitem__(self, grid):
            def compiled(*args, **constants):
                found.append((self.kernel.__name__, tuple(a.dtype for a in args if isinstance(a, torch.Tensor))))
                return Code()

            return compiled

    class Driver:
        get_current_device = staticmethod(lambda: 0)
        get_current_stream = staticmethod(lambda device: 0)

    make = launch.Launch.__init__
    monkeypatch.setattr(launch.Launch, "__init__", lambda self, kernel, *a, **k: make(self, Kernel(kernel), *a, **k))
    monkeypatch.setattr(launch.triton.runtime.driver, "_active", Driver(), raising=False)
    launch.forget()
    yield found
    launch.forget()


@interpreter
def test_a_plan_is_made_once_for_a_signature(started):
    x, w = torch.randn(2, 32, 4, 4), torch.randn(32)
    with kernels.backend("triton"), torch.no_grad():
        for _ in range(3):
            kernels.group_norm(x, 4, w, w)
        assert len(started) == 1
        kernels.group_norm(x.half(), 4, w, w)  # another type, another shape, other strides, another address
        kernels.group_norm(x[:1], 4, w, w)
        kernels.group_norm(x.to(memory_format=torch.channels_last), 4, w, w)
        assert len(started) == 4
        wide = torch.randn(33)
        kernels.group_norm(x, 4, w, wide[1:])
        assert len(started) == 5
        with switch.forced("group_norm", {"num_warps": 8}):
            kernels.group_norm(x, 4, w, w)
        assert len(started) == 6


@interpreter
def test_types_of_every_tensor_are_part_of_a_plan(started):
    """Code compiled for one type of pointer is never given another, with gradients either."""
    x, w = torch.randn(2, 32, 4, 4), torch.randn(32)
    rows, gain = torch.randn(2, 3, 16), torch.randn(16)
    with kernels.backend("triton"):
        for kind in (torch.float32, torch.float16):
            kernels.group_norm(x.half().requires_grad_(), 4, w.to(kind), w.to(kind))
            with torch.no_grad():
                kernels.add_bias(x.half(), w.to(kind))
                kernels.residual_norm(rows.half(), rows.to(kind), weight=gain, bias=gain)
    assert len(started) == len(set(started)) == 6, started


@interpreter
def test_gradients_are_part_of_a_plan(started):
    """Whether a plan was made with or without gradients in the air decides nothing for the other."""
    x = torch.randn(1, 4, 2, 16)
    with kernels.backend("triton"):
        kernels.attention(x, x, x)
        with torch.no_grad():
            kernels.attention(x, x, x)
    assert len(started) == 2


def test_rms_norm_under_autocast_is_exact_and_quiet():
    """bf16 values with fp32 weights, as autocast leaves them: in fp32, and PyTorch has nothing to warn of."""
    torch.manual_seed(0)
    x = torch.randn(2, 7, 32).bfloat16().requires_grad_()
    weight = torch.rand(32).requires_grad_()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        y = kernels.rms_norm(x, weight, 1e-6)
        y.sum().backward()
    h = x.detach().double()
    want = h * (h.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight.detach().double()
    assert y.dtype == torch.bfloat16 and ((y - want).abs() <= 2**-8 * want.abs()).all()
    assert x.grad.dtype == torch.bfloat16 and weight.grad.dtype == torch.float32
