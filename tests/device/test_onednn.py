"""Layers by oneDNN: the same numbers, and the way back."""

import copy

import pytest
import torch
from torch import nn
from util import TINY, rms_ratio

from nanodiff import lora, pipeline
from nanodiff.device import onednn
from nanodiff.models.upsample import Upsample

pytestmark = pytest.mark.skipif(bool(onednn.unusable(torch.float32)), reason=str(onednn.unusable(torch.float32)))


@pytest.fixture(autouse=True)
def small_layers_too(monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 0)


def layers(dtype):
    net = nn.Sequential(
        nn.Conv2d(24, 40, 3, padding=1, stride=2), nn.Conv2d(40, 16, 1, bias=False), nn.Flatten(2), nn.Linear(20, 33)
    )
    return net.to(dtype).to(memory_format=torch.channels_last).requires_grad_(False)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_packed_and_back(dtype):
    if reason := onednn.unusable(dtype):
        pytest.skip(reason)  # a CPU without AVX-512 packs no bf16
    net, x = layers(dtype), torch.randn(3, 24, 8, 10).to(dtype)
    weights, want = [p.clone() for p in net.parameters()], net(x)
    onednn.prepare(net, pack=True)
    assert [type(m).__name__ for m in net] == ["PackedConv2d", "PackedConv2d", "Flatten", "PackedLinear"]
    for _ in range(2):
        assert rms_ratio(net(x), want) < (1e-6 if dtype == torch.float32 else 4e-3)
    assert net[0].weight.numel() == 0, "the plain weight was given back"
    onednn.undo(net)
    for a, b in zip(weights, net.parameters(), strict=True):
        assert torch.equal(a, b) and a.stride() == b.stride()
    assert torch.equal(net(x), want)


def test_another_size_after_packing():
    net = layers(torch.float32)[:2]
    sizes = [torch.randn(1, 24, 8, 10), torch.randn(2, 24, 31, 7)]
    want = [net(x) for x in sizes]
    onednn.prepare(net, pack=True)
    for x, y in zip(sizes, want, strict=True):
        torch.testing.assert_close(net(x), y, rtol=1e-4, atol=1e-5)


def test_unpacked():
    net, x = layers(torch.float32), torch.randn(1, 24, 8, 10)
    want = net(x)
    onednn.prepare(net)
    assert [type(m).__name__ for m in net] == ["Conv2d", "Conv2d", "Flatten", "DirectLinear"]
    direct = net(x)
    torch.testing.assert_close(direct, want)
    onednn.prepare(net, pack=True)
    assert type(net[3]).__name__ == "PackedLinear"
    torch.testing.assert_close(net(x), want)
    onednn.prepare(net)  # a shorter run comes: as if there had been no longer one
    assert [type(m).__name__ for m in net] == ["Conv2d", "Conv2d", "Flatten", "DirectLinear"]
    assert torch.equal(net(x), direct)


def test_no_stopwatch_decides(monkeypatch):
    """What multiplies is the same at every start, and named in run.json."""
    monkeypatch.setattr("time.perf_counter", None)
    onednn.unusable.cache_clear()
    net = layers(torch.float32)
    onednn.prepare(net)
    assert type(net[3]) is onednn.DirectLinear
    told = onednn.processor()
    assert told["fp32 linear layers"] == "oneDNN" and told["threads"] == torch.get_num_threads()
    assert told["instructions"].startswith(torch.backends.cpu.get_cpu_capability()) and told["processor"]


def test_trying_the_operators_draws_nothing():
    """When they are tried for the first time must not change what a run draws after."""
    torch.manual_seed(1)
    want = torch.rand(3)
    onednn.unusable.cache_clear()
    torch.manual_seed(1)
    assert onednn.unusable(torch.float32) is None and torch.equal(torch.rand(3), want)


def test_what_is_trained_stays_plain():
    net = layers(torch.float32)
    net[0].weight.requires_grad_(True)
    onednn.prepare(net, pack=True)
    assert type(net[0]) is nn.Conv2d and type(net[1]) is onednn.PackedConv2d


def test_odd_layers_stay_plain():
    shared = nn.Linear(16, 16).requires_grad_(False)
    twin = nn.Linear(16, 16)
    twin.weight = shared.weight
    piece = nn.Linear(16, 16)
    piece.weight = nn.Parameter(torch.randn(16, 40)[:, :16], requires_grad=False)
    reflected = nn.Conv2d(16, 16, 3, padding=1, padding_mode="reflect").requires_grad_(False)
    net = nn.ModuleList([shared, twin, piece, reflected])
    onednn.prepare(net, pack=True)
    assert [type(m) for m in net] == [nn.Linear, nn.Linear, nn.Linear, nn.Conv2d]


def test_memory_of_packed_weights_is_given_back():
    """Not only to this process: the mapping is private, so its pages are gone."""
    from pathlib import Path

    from nanodiff.weights import loading

    if not Path("/proc/self/maps").exists():
        pytest.skip("Linux only")
    place = loading._allocate([("weight", (4096, 2048), torch.float32)], torch.device("cpu"))["weight"].fill_(1.0)
    layer = nn.Linear(2048, 4096, bias=False).requires_grad_(False)
    layer.weight.data = place
    onednn._release(layer)
    assert place.flatten()[2048:-2048].abs().max() == 0, "the pages are new, empty ones"


def test_a_gradient_is_refused_not_lost():
    net = layers(torch.float32)
    onednn.prepare(net, pack=True)
    with pytest.raises(RuntimeError, match="prepared for inference"):
        net(torch.randn(1, 24, 8, 10, requires_grad=True))


def test_direct_layers_have_a_gradient():
    """A model that was sampled from can go on being trained, around or through its frozen layers."""
    layer, x = nn.Linear(20, 33).requires_grad_(False), torch.randn(3, 20)
    want = torch.autograd.grad(layer(leaf := x.clone().requires_grad_()).square().sum(), leaf)[0]
    onednn.prepare(layer)
    assert type(layer) is onednn.DirectLinear
    got = torch.autograd.grad(layer(leaf := x.clone().requires_grad_()).square().sum(), leaf)[0]
    assert torch.equal(got, want)
    layer.requires_grad_(True)
    layer(x).sum().backward()
    assert layer.weight.grad is not None


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("rows", [1, 7, 300])
def test_wide_layers(monkeypatch, dtype, rows):
    """On a CPU without bf16: half precision kept in memory, computed in fp32, some rows of the weight at a time; with a gradient."""
    monkeypatch.setattr(onednn, "computes_bf16", lambda: False)
    monkeypatch.setattr(onednn, "PIECE", 1000)  # several pieces, the last one smaller
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(64, 130), nn.Linear(130, 20, bias=False)).to(dtype).requires_grad_(False)
    x = torch.randn(2, rows, 64).to(dtype)
    want = net(x)
    assert [type(m) for m in onednn.widen(net)] == [onednn.WideLinear] * 2
    exact = nn.functional.linear(x.float(), net[0].weight.float(), net[0].bias.float())
    if rows >= onednn.FEW_ROWS:
        once = nn.functional.linear(x.float(), net[0].weight.float()).to(dtype) + net[0].bias
        # a product on the edge between two numbers of this type may fall to either, and the sum with it
        unit = torch.finfo(dtype).eps
        torch.testing.assert_close(net[0](x), once, rtol=unit, atol=2 * unit)
        assert (net[0](x) == once).float().mean() > 0.99, "rounded before the bias is added, as PyTorch does"
    assert rms_ratio(net[0](x), exact) < 1e-2 and rms_ratio(net(x), want) < 2e-2
    y = x.clone().requires_grad_()
    net(y).float().square().sum().backward()
    z = x.float().requires_grad_()
    plain = nn.functional.linear(
        nn.functional.linear(z, net[0].weight.float(), net[0].bias.float()), net[1].weight.float()
    )
    plain.square().sum().backward()
    assert rms_ratio(y.grad, z.grad) < 3e-2
    with torch.no_grad():
        assert torch.equal(net[0](x), net[0](y.detach()))
    onednn.undo(net)
    assert [type(m) for m in net] == [nn.Linear] * 2


def test_widen_leaves_what_learns_and_what_is_whole(monkeypatch):
    monkeypatch.setattr(onednn, "computes_bf16", lambda: False)
    net = nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8).bfloat16(), nn.Linear(8, 8).bfloat16().requires_grad_(False)])
    onednn.widen(net)
    assert [type(m) is nn.Linear for m in net] == [True, True, False]
    monkeypatch.setattr(onednn, "computes_bf16", lambda: True)
    fast = nn.Linear(8, 8).bfloat16().requires_grad_(False)
    assert type(onednn.widen(nn.ModuleList([fast]))[0]) is nn.Linear


def test_the_reason_is_said(monkeypatch, capsys):
    monkeypatch.setattr(onednn, "unusable", lambda dtype: "the moon is full")
    net = layers(torch.float32)
    onednn.prepare(net, pack=True)
    assert type(net[0]) is nn.Conv2d and "the moon is full" in capsys.readouterr().err


def test_unusable_names_what_fails(monkeypatch):
    onednn.unusable.cache_clear()
    monkeypatch.setattr(torch.ops.mkldnn, "_linear_pointwise", None)
    assert "refuses" in onednn.unusable(torch.float32)
    onednn.unusable.cache_clear()


# Attention by blocks --------------------------------------------------------------------------------------------


def usable(dtype):
    if reason := onednn.unusable(dtype):
        pytest.skip(reason)


@pytest.mark.parametrize(
    ("pack", "dtype"),
    [(False, torch.float32), (True, torch.float32), (True, torch.bfloat16)],  # unpacked, bf16 layers stay plain
    ids=["direct", "packed", "packed bf16"],
)
@pytest.mark.parametrize("bias", [False, True])
def test_products_that_end_in_a_gelu(dtype, pack, bias):
    from nanodiff.models.layers import linear_geglu, linear_gelu

    usable(dtype)
    for call in (linear_geglu, linear_gelu):
        net, x = nn.Sequential(nn.Linear(40, 66, bias)).to(dtype).requires_grad_(False), torch.randn(3, 7, 40).to(dtype)
        net[0].halves = 2 if call is linear_geglu else 1
        weight, plain = net[0].weight.clone(), call(net[0], x)
        double = nn.Linear(40, 66, bias).double().requires_grad_(False)
        double.load_state_dict({n: p.double() for n, p in net[0].state_dict().items()})
        want = call(double, x.double())
        onednn.prepare(net, pack)
        assert type(net[0]) is (onednn.PackedLinear if pack else onednn.DirectLinear)
        for _ in range(2):
            assert rms_ratio(call(net[0], x), want) < 1.1 * rms_ratio(plain, want) + 1e-7
        onednn.undo(net)
        assert torch.equal(net[0].weight, weight)


def test_an_adapter_on_a_projection_is_heard():
    """Its hook is on the layer's call; when it has gone, or comes later, the packed layer gives what it gives without a past."""
    from nanodiff.models.layers import linear_geglu

    x, fresh = torch.randn(5, 16), []
    for hooked_first in (True, False):
        torch.manual_seed(0)
        net = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False)
        net[0].halves = 2
        plain = linear_geglu(net[0], x)
        with_hook = net[0].register_forward_hook(lambda m, a, y: y + 1)
        heard = linear_geglu(net[0], x)
        onednn.prepare(net, pack=True)
        if not hooked_first:
            with_hook.remove()
            assert rms_ratio(linear_geglu(net[0], x), plain) < 1e-6
            with_hook = net[0].register_forward_hook(lambda m, a, y: y + 1)
        assert rms_ratio(linear_geglu(net[0], x), heard) < 1e-6
        with_hook.remove()
        fresh.append(linear_geglu(net[0], x))
        assert rms_ratio(fresh[-1], plain) < 1e-6
    assert torch.equal(*fresh)


@pytest.mark.parametrize("pack", [False, True], ids=["direct", "packed"])
def test_products_that_end_in_a_gelu_are_compiled_and_faked(pack):
    """PyTorch has no form of a product that ends in a multiplication for either."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    from nanodiff.models.layers import linear_geglu

    net, x = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False), torch.randn(5, 16)
    net[0].halves = 2
    want = linear_geglu(net[0], x)
    onednn.prepare(net, pack)
    linear_geglu(net[0], x)
    made = torch.compile(lambda x: linear_geglu(net[0], x), backend="eager", fullgraph=not pack)(x)
    assert rms_ratio(made, want) < 1e-6
    if not pack:  # a packed weight is a real one
        with FakeTensorMode(allow_non_fake_inputs=True) as mode:
            assert linear_geglu(net[0], mode.from_tensor(x)).shape == (5, 12)


def test_direct_products_that_end_in_a_gelu_have_a_gradient():
    from nanodiff.models.layers import linear_geglu, linear_gelu

    for call in (linear_geglu, linear_gelu):
        net, x = nn.Sequential(nn.Linear(16, 24)).requires_grad_(False), torch.randn(5, 16, requires_grad=True)
        (want,) = torch.autograd.grad(call(net[0], x).sum(), x)
        onednn.prepare(net)
        (got,) = torch.autograd.grad(call(net[0], x).sum(), x)
        assert rms_ratio(got, want) < 1e-6


def test_a_silent_lora_leaves_the_bytes(monkeypatch):
    """At scale 0, before and after it was heard, and when it is gone: as if it had never been there."""
    from util import GOLDEN

    draw = lambda sd: sd.generate(["a corgi"], steps=4, seeds=[1]).latents  # noqa: E731
    fresh, sd = pipeline.load(TINY / "sd15"), pipeline.load(TINY / "sd15")
    fresh.packs = sd.packs = True
    want = draw(fresh)
    found = lora.read(next((GOLDEN / "lora").glob("sd15.kohya*.safetensors")), sd.models(), allow_partial=True)
    assert any("ff.net.0.proj" in d.module for d in found.deltas), "a GEGLU's, too"
    attached = lora.attach(sd.models(), found, 0.8)
    assert not torch.equal(draw(sd), want)
    for attached.scale in (0.0, 0.8, 0.0):
        sd.kept.clear()  # what the text encoders said with it
        assert torch.equal(draw(sd), want) == (attached.scale == 0)
    attached.remove()
    assert torch.equal(draw(sd), want)


def test_another_scheduler_keeps_the_choice():
    sd = pipeline.load(TINY / "sd15")
    sd.packs = sd.replays = True
    other = sd.with_scheduler("euler")
    assert other.packs and other.replays


def test_saving_and_loras_see_plain_weights(tmp_path):
    from util import GOLDEN

    sd = pipeline.load(TINY / "sd15")
    before = {k: v.clone() for k, v in sd.net.state_dict().items()}
    sd.packs = True
    sd.generate(["a corgi"], steps=4, seeds=[1])
    sd.save(tmp_path / "saved")
    again = pipeline.load(tmp_path / "saved").net.state_dict()
    assert all(torch.equal(before[k], again[k]) for k in before)
    sd.generate(["a corgi"], steps=4, seeds=[1])
    found = lora.read(next((GOLDEN / "lora").glob("sd15.kohya*.safetensors")), sd.models(), allow_partial=True)
    lora.fuse(sd.models(), found).remove()
    assert all(torch.equal(v, before[k]) for k, v in sd.net.state_dict().items())


# Upsampling by phases -------------------------------------------------------------------------------------------


def enlarged(up, x, size=None):
    x = torch.nn.functional.interpolate(x, size=size, scale_factor=None if size else 2.0, mode="nearest")
    return up.conv(x)


@pytest.mark.parametrize("fmt", [torch.contiguous_format, torch.channels_last], ids=["contiguous", "channels last"])
@pytest.mark.parametrize("size", [(1, 2), (5, 7), (8, 8)])
def test_four_small_convolutions_are_the_large_one(size, fmt):
    up = Upsample(12).double().requires_grad_(False)
    x = torch.randn(2, 12, *size, dtype=torch.float64).to(memory_format=fmt)
    with torch.no_grad():
        got = up(x)
        torch.testing.assert_close(got, enlarged(up, x), rtol=1e-12, atol=1e-12)
        assert up.phases and got.is_contiguous(memory_format=fmt)
        torch.testing.assert_close(up(x, (2 * size[0], 2 * size[1])), enlarged(up, x), rtol=1e-12, atol=1e-12)
        odd = (2 * size[0] - 1, 2 * size[1])
        torch.testing.assert_close(up(x, odd), enlarged(up, x, odd), rtol=1e-12, atol=1e-12)


def test_phases_of_a_packed_convolution():
    """Packed, doubled, an odd size, doubled again: always the same numbers."""
    up, x = Upsample(16).requires_grad_(False), torch.randn(1, 16, 4, 4)
    with torch.no_grad():
        want, odd = enlarged(up, x), enlarged(up, x, (7, 8))
        onednn.prepare(up, pack=True)
        for got, exact in ((up(x), want), (up(x, (7, 8)), odd), (up(x), want), (up(x, (7, 8)), odd)):
            torch.testing.assert_close(got, exact, rtol=1e-4, atol=1e-5)
        assert type(up.phases[1][0]) is onednn.PackedConv2d
        onednn.undo(up)
        torch.testing.assert_close(up(x), want, rtol=1e-4, atol=1e-5)


def test_phases_follow_the_weights():
    up, x = Upsample(8).requires_grad_(False), torch.randn(1, 8, 4, 4)
    with torch.no_grad():
        up(x)
        up.conv.weight.mul_(2)
        torch.testing.assert_close(up(x), enlarged(up, x))
        up.conv.weight.data = torch.randn(8, 8, 3, 3)
        torch.testing.assert_close(up(x), enlarged(up, x))
        up.conv.bias.add_(1)
        torch.testing.assert_close(up(x), enlarged(up, x))
    assert [k for k, _ in up.named_parameters()] == ["conv.weight", "conv.bias"], "phases are not in a checkpoint"


def test_phases_stand_aside_for_hooks_and_gradients():
    up, x = Upsample(8), torch.randn(1, 8, 4, 4)
    up(x).sum().backward()
    assert up.conv.weight.grad is not None and not up.phases
    up.requires_grad_(False)
    handle = up.conv.register_forward_hook(lambda m, args, out: out + 1)
    with torch.no_grad():
        torch.testing.assert_close(up(x), enlarged(up, x))
        handle.remove()
        torch.testing.assert_close(up(x), enlarged(up, x))
    assert up.phases


LEARNING = [((9, 20), 20, 33, True), ((2, 7, 48), 48, 96, False), ((1, 1, 130), 130, 64, True), ((0, 20), 20, 33, True), ((2, 0, 20), 20, 33, False),
            ((20,), 20, 33, True), ((2, 3, 2, 20), 20, 33, True)]  # fmt: skip


@pytest.fixture
def learning(monkeypatch):
    """As on a processor whose table says so."""
    monkeypatch.setattr(onednn, "learns_by_onednn", lambda: True)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize(("shape", "D", "O", "bias"), LEARNING)
def test_learned_layers(learning, shape, D, O, bias, frozen):
    torch.manual_seed(0)
    layer = onednn.learn(nn.Linear(D, O, bias=bias).requires_grad_(not frozen))
    assert type(layer) is onednn.LearnedLinear
    x = torch.randn(shape, requires_grad=True)
    dy = torch.randn(*shape[:-1], O)
    exact = [t.detach().double().requires_grad_(t.requires_grad) for t in (x, *layer.parameters())]
    want = nn.functional.linear(*exact)
    wanted = [t for t in (x, *layer.parameters()) if t.requires_grad]
    got = torch.autograd.grad(layer(x), wanted, dy)
    meant = torch.autograd.grad(want, [t for t in exact if t.requires_grad], dy.double())
    near = lambda a, b: a.shape == b.shape and ((not b.any() and not a.any()) or rms_ratio(a, b) < 1e-6)  # noqa: E731
    assert near(layer(x), want)
    assert all(near(a, b) for a, b in zip(got, meant, strict=True))
    with torch.no_grad():
        assert torch.equal(layer(x), layer(x.detach()))


@pytest.mark.parametrize("frozen", [False, True])
def test_learned_layers_are_onednns(learning, monkeypatch, frozen):
    """Forward and gradients; and a frozen layer keeps nothing of its input."""
    called, product, kept = [], onednn.product, []
    monkeypatch.setattr(onednn, "product", lambda *a: called.append(1) or product(*a))
    layer = onednn.learn(nn.Linear(20, 33).requires_grad_(not frozen))
    x = torch.randn(9, 20, requires_grad=True)
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = layer(x)
    assert len(called) == 1 and (x.shape in kept) == (not frozen)
    y.sum().backward()
    assert len(called) == (2 if frozen else 3)


def test_the_gradient_of_a_learned_gradient(learning):
    layer = onednn.learn(nn.Linear(20, 33))
    plain = nn.Linear(20, 33)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(9, 20, requires_grad=True)
    found = []
    for net in (layer, plain):
        (slope,) = torch.autograd.grad(net(x).sin().sum(), x, create_graph=True)
        found.append(torch.autograd.grad(slope.square().sum(), [x, *net.parameters()]))
    assert all(rms_ratio(a, b) < 1e-5 for a, b in zip(*found, strict=True))


def test_where_learned_layers_are_plain_ones(learning):
    layer, plain = onednn.learn(nn.Linear(20, 33)), nn.Linear(20, 33)
    plain.load_state_dict(layer.state_dict())
    x = torch.randn(9, 20)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(layer(x), plain(x)) and layer(x).dtype == torch.bfloat16
    assert rms_ratio(torch.compile(layer, backend="eager")(x), plain(x)) < 1e-6
    assert layer.double()(x.double()).dtype == torch.float64
    assert type(onednn.learn(nn.Linear(20, 33).bfloat16())) is nn.Linear


def test_tangents_and_transforms_pass_through_learned_layers(learning):
    """Forward-mode AD and torch.func: the same as plain layers, where oneDNN's own product would lose a tangent in silence."""
    plain = nn.Sequential(nn.Linear(40, 64), nn.Tanh(), nn.Linear(64, 24))
    net = onednn.learn(copy.deepcopy(plain))
    assert type(net[0]) is onednn.LearnedLinear
    x, along = torch.randn(2, 20, 40), torch.randn(2, 20, 40)
    want = torch.func.jvp(plain, (x,), (along,))
    for a, b in zip(torch.func.jvp(net, (x,), (along,)), want, strict=True):
        assert rms_ratio(a, b) < 1e-5
    with torch.autograd.forward_ad.dual_level():
        made = net(torch.autograd.forward_ad.make_dual(x, along))
        assert rms_ratio(torch.autograd.forward_ad.unpack_dual(made).tangent, want[1]) < 1e-5

    def slopes(net):  # of every sample alone
        loss = lambda weights, x: torch.func.functional_call(net, weights, (x,)).pow(2).mean()  # noqa: E731
        return torch.func.vmap(torch.func.grad(loss), (None, 0))(dict(net.named_parameters()), x)

    a, b = slopes(net), slopes(plain)
    assert a["0.weight"].shape == (2, 64, 40) and max(rms_ratio(a[k], b[k]) for k in b) < 1e-5


@pytest.mark.parametrize("pack", [False, True])
def test_a_tangent_is_never_lost_in_a_prepared_layer(pack):
    net, x = nn.Sequential(nn.Linear(40, 64), nn.Linear(64, 24)).requires_grad_(False), torch.randn(20, 40)
    want = torch.func.jvp(net, (x,), (x,))[1]
    onednn.prepare(net, pack=pack)
    if pack:
        with pytest.raises(RuntimeError, match="to train or differentiate it"):
            torch.func.jvp(net, (x,), (x,))
        onednn.undo(net)
    assert rms_ratio(torch.func.jvp(net, (x,), (x,))[1], want) < 1e-5


def test_learned_layers_stay_so(learning):
    """A preview in training prepares the model and undoes that: the updates after it compute as those before, to the bit."""
    net = onednn.learn(nn.Sequential(nn.Linear(20, 33), nn.Conv2d(3, 8, 3), nn.Linear(33, 20).requires_grad_(False)))
    onednn.prepare(net.requires_grad_(False), pack=True)
    assert [type(m) for m in net] == [onednn.PackedLinear, onednn.PackedConv2d, onednn.PackedLinear]
    onednn.prepare(net, pack=True)
    onednn.undo(net)
    assert [type(m) for m in net] == [onednn.LearnedLinear, nn.Conv2d, onednn.LearnedLinear]
    onednn.prepare(net)
    assert [type(m) for m in net] == [onednn.LearnedLinear, nn.Conv2d, onednn.LearnedLinear]
    assert [type(m) for m in onednn.learn(net)] == [type(m) for m in net]


@pytest.mark.parametrize(("vendor", "want"), [("AuthenticAMD", True), ("GenuineIntel", False), ("", False)])
def test_who_learns_by_onednn(monkeypatch, vendor, want):
    monkeypatch.setattr(onednn, "cpuinfo", lambda: {"vendor_id": vendor})
    assert onednn.learns_by_onednn.__wrapped__() is want
    monkeypatch.setattr(onednn, "learns_by_onednn", lambda: want)
    assert (type(onednn.learn(nn.Linear(20, 33))) is onednn.LearnedLinear) is want
