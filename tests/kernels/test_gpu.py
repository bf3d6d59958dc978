"""On a GPU: every kernel in bf16, fp16 and fp32 against float64, poisoned outputs, repetitions, whole networks.

`make test-gpu`. Nothing here runs in the interpreter, whose bf16 is wrong.
"""

import importlib

import pytest
import torch
from kernel_cases import compare, normal, poisoned
from util import ROOT, TINY, rms_ratio

import kernels

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]
attention = importlib.import_module("kernels.attention")
gated = importlib.import_module("kernels.gated")
group_norm = importlib.import_module("kernels.group_norm")
norms = importlib.import_module("kernels.norms")
DTYPES = [torch.bfloat16, torch.float16, torch.float32]
IDS = ["bf16", "fp16", "fp32"]
LIMIT = {torch.bfloat16: 1e-2, torch.float16: 1.5e-3, torch.float32: 2e-5}


def cuda(*shape, dtype):
    return normal(*shape, dtype=dtype, device="cuda")


def attend(B, L, S, N, M, K, dtype, bias=None, masked=False, **options):
    q, k, v = cuda(B, L, N, K, dtype=dtype), cuda(B, S, M, K, dtype=dtype), cuda(B, S, M, K, dtype=dtype)
    bias = None if bias is None else cuda(*bias, L, S, dtype=dtype)
    if masked:
        options["key_mask"] = torch.rand(B, S, device="cuda") > 0.3
        options["key_mask"][:, 0] = True
    compare(
        lambda q, k, v, b: kernels.attention(q, k, v, bias=b, return_lse=True, **options),
        lambda q, k, v, b: attention.attention_reference(q, k, v, bias=b, **options),
        (q, k, v, bias),
        (normal(B, N, L, K, device="cuda").transpose(1, 2), normal(B, N, L, device="cuda")),
        LIMIT[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("K", [40, 64, 80, 96, 128, 160, 256, 512])
@pytest.mark.parametrize(("L", "S"), [(77, 77), (333, 77), (130, 1030), (1030, 1030)])
def test_attention(K, L, S, dtype):
    attend(2, L, S, 2, 2, K, dtype)


def test_one_query_and_one_key():
    attend(1, 1, 1, 1, 1, 64, torch.bfloat16)
    attend(1, 1, 300, 2, 1, 64, torch.bfloat16, causal=True)  # a step of a language model


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize(
    "options",
    [{"causal": True}, {"causal": True, "window": 100}, {"window": 33}, {"bias": (1, 4)}, {"bias": (2, 1)},
     {"masked": True}, {"masked": True, "causal": True, "bias": (1, 1)}],
    ids=lambda o: "-".join(o),
)  # fmt: skip
@pytest.mark.parametrize("K", [64, 256])
def test_attention_masks_and_groups(K, options, dtype):
    attend(2, 333, 333, 4, 2, K, dtype, **options)


@pytest.mark.parametrize("K", [40, 64, 80, 128, 256])
def test_the_copy_engine(K):
    """Tensor descriptors give what pointers give."""
    from kernels import switch

    q, k, v = (cuda(2, 1030, 4, K, dtype=torch.bfloat16) for _ in range(3))
    with (
        kernels.backend("triton"),
        switch.forced("attention.forward", {"BLOCK_L": 64, "BLOCK_S": 32, "num_warps": 4, "num_stages": 2}),
    ):
        want = kernels.attention(q, k, v)
        with switch.forced(
            "attention.forward", {"BLOCK_L": 64, "BLOCK_S": 32, "num_warps": 4, "num_stages": 2, "TMA": True}
        ):
            got = kernels.attention(q, k, v)
    assert rms_ratio(got, want) < 1e-3


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("last", [False, True], ids=["contiguous", "channels last"])
@pytest.mark.parametrize(("C", "side"), [(32, 7), (320, 64), (1280, 8), (2560, 16), (128, 257)])
def test_group_norm(C, side, last, dtype):
    x = cuda(2, C, side, side, dtype=dtype)
    x = x.to(memory_format=torch.channels_last) if last else x
    compare(
        lambda x, w, b, t: kernels.group_norm(x, 32, w, b, 1e-5, True, t),
        lambda x, w, b, t: group_norm.group_norm_reference(x, 32, w, b, 1e-5, True, t),
        (x, cuda(C, dtype=dtype), cuda(C, dtype=dtype), cuda(2, C, dtype=dtype) if C > 32 else None),
        (normal(2, C, side, side, device="cuda"),),
        LIMIT[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("D", [320, 1280, 1536, 4096, 8192])
def test_norms(D, dtype):
    x, w, m, g = (
        cuda(2, 77, D, dtype=dtype),
        cuda(D, dtype=dtype),
        cuda(2, D, dtype=dtype),
        normal(2, 77, D, device="cuda"),
    )
    limit = LIMIT[dtype]
    compare(
        lambda x, w, b: kernels.layer_norm(x, w, b),
        lambda x, w, b: norms.norm_reference(x, w, b, 1e-5),
        (x, w, w.clone()),
        (g,),
        limit,
    )
    compare(
        lambda x, s, t: kernels.layer_norm(x, scale=s, shift=t),
        lambda x, s, t: norms.norm_reference(x, s, t, 1e-5, plus_one=True), (x, m, m.clone()), (g,), limit,
    )  # fmt: skip
    compare(lambda x, w: kernels.rms_norm(x, w), lambda x, w: norms.norm_reference(x, w, rms=True), (x, w), (g,), limit)


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("K", [64, 128, 256])
def test_queries_and_keys(K, dtype):
    angle = normal(1, 99, K // 2, device="cuda")
    cos, sin = angle.cos().to(dtype), angle.sin().to(dtype)
    compare(
        lambda x, w: kernels.qk_norm_rope(x, w, cos, sin),
        lambda x, w: norms.qk_norm_rope_reference(x, w, cos.double(), sin.double()),
        (cuda(2, 99, 8, K, dtype=dtype), cuda(K, dtype=dtype)),
        (normal(2, 99, 8, K, device="cuda"),),
        LIMIT[dtype],
    )


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("activation", sorted(gated.ACTIVATIONS))
def test_gates(activation, dtype):
    compare(
        lambda x: kernels.geglu(x, activation), lambda x: gated.gated_reference(*x.chunk(2, -1), activation),
        (cuda(2, 77, 5120, dtype=dtype),), (normal(2, 77, 2560, device="cuda"),), LIMIT[dtype],
    )  # fmt: skip


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
def test_losses(dtype):
    T, D, V = 300, 512, 20000
    target = torch.randint(0, V, (T,), device="cuda")
    target[::7] = -100
    compare(
        lambda x, w: kernels.linear_cross_entropy(x, w, target, reduction="none"),
        lambda x, w: gated.linear_cross_entropy_reference(x, w, target),
        (cuda(T, D, dtype=dtype), cuda(V, D, dtype=dtype) * D**-0.5), (normal(T, device="cuda"),), LIMIT[dtype],
    )  # fmt: skip


def test_a_hundred_repetitions_are_bit_equal():
    """No atomics, no race: the same numbers at every call."""
    q, k, v = (cuda(2, 1030, 4, 80, dtype=torch.bfloat16).requires_grad_() for _ in range(3))
    x = cuda(2, 320, 64, 64, dtype=torch.bfloat16).requires_grad_()
    w = cuda(320, dtype=torch.bfloat16).requires_grad_()
    g, h = torch.randn_like(q), torch.randn_like(x)
    first = None
    with kernels.backend("triton"), poisoned():
        for _ in range(100):
            a, b = kernels.attention(q, k, v), kernels.group_norm(x, 32, w, w, silu=True)
            now = [a, b, *torch.autograd.grad(a, (q, k, v), g), *torch.autograd.grad(b, (x, w), h)]
            first = first or now
            assert all(torch.equal(p, r) for p, r in zip(now, first, strict=True))


@pytest.mark.parametrize("dtype", DTYPES, ids=IDS)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_whole_networks(name, dtype):
    """Forward and backward with our kernels are as near to fp64 as PyTorch's are."""
    from nanodiff import pipeline

    net = pipeline.load(TINY / name, torch.float32, "cpu").net.cuda().requires_grad_()
    cfg = net.cfg
    x, t = normal(2, cfg.in_channels, 16, 16), torch.tensor([300, 700], device="cuda")
    if name == "sd35-medium":
        more = (normal(2, 77, cfg.joint_attention_dim), normal(2, cfg.pooled_projection_dim))
    else:
        more = (normal(2, 77, cfg.cross_attention_dim),)
        if cfg.addition_embed_type:
            ids = torch.tensor([[64, 64, 0, 0, 64, 64]] * 2, device="cuda")
            pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
            more += ((normal(2, pooled), ids),)

    def moved(value, dtype):
        if isinstance(value, tuple):
            return tuple(moved(v, dtype) for v in value)
        return value.to("cuda", dtype if value.is_floating_point() else None)

    def run(dtype, mode):
        net.to(dtype).zero_grad()
        with kernels.backend(mode):
            out = net(moved(x, dtype), t, *moved(more, dtype))
            out.float().square().sum().backward()
        return out.detach().double(), torch.cat(
            [p.grad.double().flatten() for p in net.parameters() if p.grad is not None]
        )

    exact = run(torch.float64, "torch")
    with poisoned():
        ours = run(dtype, "triton")
    theirs = run(dtype, "torch")
    for mine, peer, truth in zip(ours, theirs, exact, strict=True):
        assert rms_ratio(mine, truth) < 1.3 * rms_ratio(peer, truth) + 1e-6


def test_compile_without_graph_breaks():
    from nanodiff import pipeline

    net = pipeline.load(TINY / "sd15", torch.float32, "cpu").net.cuda().to(torch.bfloat16)
    inputs = (cuda(1, 4, 16, 16, dtype=torch.bfloat16), torch.tensor([300], device="cuda"),
              cuda(1, 77, net.cfg.cross_attention_dim, dtype=torch.bfloat16))  # fmt: skip
    with kernels.backend("triton"), torch.no_grad():
        want = net(*inputs)
        assert rms_ratio(torch.compile(net, fullgraph=True)(*inputs), want) < 2e-2


def test_in_a_cuda_graph():
    q = cuda(2, 1030, 4, 40, dtype=torch.float16)
    with kernels.backend("triton"):
        want = kernels.attention(q, q, q)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            got = kernels.attention(q, q, q)
        graph.replay()
    torch.cuda.synchronize()
    assert torch.equal(got, want)


@pytest.mark.parametrize("name", ["sd15", "sd35-medium"])
def test_recorded_steps_make_the_same_picture(name):
    """`--cuda-graph`: latents of a run with and without."""
    from nanodiff import pipeline

    sd = pipeline.load(TINY / name, torch.float32, "cuda")
    with kernels.backend("auto"):
        want = [sd.generate([p], steps=8, seeds=[1]).latents for p in ("a corgi", "a cat on a roof")]
        sd.replays = "auto"
        for _ in range(2):  # recorded in the first run, kept for the others
            got = [sd.generate([p], steps=8, seeds=[1]).latents for p in ("a corgi", "a cat on a roof")]
        (replayed,) = sd.recorded.values()
    assert len(replayed.recordings) == 1 and replayed.memory() > 0
    for a, b in zip(got, want, strict=True):
        assert rms_ratio(a, b) < 1e-4


@pytest.mark.parametrize("name", ["sd15", "sd21-v", "sdxl", "sd35-medium"])
def test_loaded_on_a_gpu(name):
    """From a folder straight to the GPU, as everybody does: convolutions channels last, every kernel serves."""
    from nanodiff import pipeline

    sd = pipeline.load(TINY / name, torch.float32, "cuda")
    outputs = []
    for module in (*sd.net.modules(), *sd.vae.modules()):
        if isinstance(module, torch.nn.Conv2d):
            assert module.weight.is_contiguous(memory_format=torch.channels_last)
            module.register_forward_hook(lambda m, args, out: outputs.append(out.movedim(1, -1).is_contiguous()))
    with kernels.backend("triton"):
        got = sd.generate(["a corgi"], steps=2, seeds=[1])
    assert outputs and all(outputs) and torch.isfinite(got.pixels).all()


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_lean_forms(name):
    """What surrounds the products takes other forms without gradients: the same network."""
    from nanodiff import pipeline
    from nanodiff.models import layers

    sd = pipeline.load(TINY / name, torch.float32, "cuda")
    with kernels.backend("triton"):
        got = sd.generate(["a corgi"], steps=3, seeds=[1])
        layers._lean, kept = (lambda x: False), layers._lean
        try:
            want = sd.generate(["a corgi"], steps=3, seeds=[1])
        finally:
            layers._lean = kept
    assert rms_ratio(got.latents, want.latents) < 1e-4 and rms_ratio(got.pixels, want.pixels) < 1e-4


def test_channel_slices_fall_back():
    """A tensor that is not dense is PyTorch's, with a reason, and right."""
    x = cuda(2, 64, 8, 8, dtype=torch.float16).to(memory_format=torch.channels_last)[:, :32]
    w = cuda(32, dtype=torch.float16)
    with kernels.backend("auto"):
        got = kernels.group_norm(x, 4, w, w)
    torch.testing.assert_close(got, torch.nn.functional.group_norm(x, 4, w, w))


@pytest.mark.parametrize("precision", [None, torch.bfloat16], ids=["fp32", "bf16"])
def test_passes_as_graphs_learn_the_same(precision):
    """A text encoder and a denoiser that learn together, started kernel by kernel and as graphs: gradients and weights of four updates, the averaged
    weights looked at in between, the last batch smaller."""
    from nanodiff import pipeline
    from nanodiff.device.cudagraph import Learning

    def learned(wrap):
        sd = pipeline.load(ROOT / "assets/world", device="cuda")
        nets = torch.nn.ModuleDict({"net": sd.net, "text": sd.encoders[0]}).train().requires_grad_(True)
        net, text = wrap(nets["net"]), wrap(nets["text"])
        optimizer = torch.optim.SGD(nets.parameters(), lr=1e-2)
        g, seen = torch.Generator("cuda").manual_seed(0), []
        for n in (8, 8, 8, 3):
            x, ids = (
                torch.randn(n, 4, 16, 16, generator=g, device="cuda"),
                torch.randint(500, (n, 20), generator=g, device="cuda"),
            )
            with torch.autocast("cuda", precision or torch.bfloat16, enabled=precision is not None):
                states, pooled = text(ids)
                loss = (net(x, torch.full((n,), 400.0, device="cuda"), states[-1], pooled).float() - x).square().mean()
            loss.backward()
            seen += [loss.detach(), nets["net"].pos_embed.proj.weight.grad.clone()]
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            with torch.no_grad():
                nets.eval()
                seen.append(net(x, torch.full((n,), 10.0, device="cuda"), states[-1].detach(), pooled.detach()).float())
                nets.train()
        return seen, net

    want, _ = learned(lambda module: module)
    got, net = learned(Learning)
    assert any(net.kinds.values()), "nothing was recorded"
    for a, b in zip(got, want, strict=True):
        assert rms_ratio(a, b) < (1e-4 if precision is None else 2e-2)
