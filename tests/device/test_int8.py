"""Layers in 8 bits: the codes against their definition, products against float64, which layers they are, and what they may not do."""

import collections
import copy
import math
import re

import pytest
import torch
from torch import nn
from util import TINY, rms_ratio

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.device import int8, memory, onednn, quantize
from nanodiff.models.mmdit import AdaLN

needs_instruction = pytest.mark.skipif(not int8.usable(), reason="this CPU multiplies no 8-bit numbers")
NETS = {"sd15": "unet", "sdxl": "unet", "sd35-medium": "transformer"}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("low", "high"), [(-1, 1), (-0.28, 6), (2, 3), (-3, -2), (0, 0), (-1e-5, 3e-5), (-500, 1)])
def test_codes_are_within_half_a_step(low, high, dtype):
    x = torch.empty(3, 5, 7).uniform_(low, high).to(dtype)
    before = x.clone()
    codes, scale, zero = int8.coded(x)
    assert codes.dtype == torch.uint8 and codes.shape == x.shape and torch.equal(x, before) and 0 <= zero <= 255
    assert (scale * (codes.double() - zero) - x.double()).abs().max() <= scale * 0.5 * (1 + 1e-4)
    again = int8.coded(torch.cat([x.flatten(), torch.zeros(1, dtype=dtype)]))
    assert again[0][-1] == again[2], "zero is met exactly, for a convolution is padded with it"


def test_the_ends_of_the_range_are_no_step_too_far():
    """Whatever the zero is rounded to, the largest number has a code of at most 255 and the smallest of at least 0."""
    for low in torch.linspace(-10, 0, 401).tolist():
        x = torch.tensor([low, 0.0, 7.0])
        codes, scale, zero = int8.coded(x)
        assert (scale * (codes.double() - zero) - x).abs().max() <= scale * 0.5 * (1 + 1e-4), low


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
@needs_instruction
def test_what_is_not_finite_is_not_hidden(bad):
    layer = made(nn.Linear(128, 160))
    x = torch.randn(2, 3, 128)
    x[1, 1, 5] = bad
    y = layer(x)
    assert torch.isfinite(y[0]).all() and torch.isnan(y[1]).all()


def made(layer):
    layer.requires_grad_(False)
    codes, absmax = quantize.to_int8(layer.weight.data.flatten(1))
    layer.meant = codes.double().view(layer.weight.shape) * (absmax.double() / 127).view(
        -1, *[1] * (layer.weight.dim() - 1)
    )
    return int8.pack(layer, codes.view(layer.weight.shape), absmax[:, 0], torch.ones(layer.weight.shape[1]))


def of_codes(x):
    """What the codes of each picture of x stand for, in float64."""
    return torch.cat([(c.double() - zero) * scale for c, scale, zero in map(int8.coded, x.split(1))])


@needs_instruction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("rows", "widths", "bias"), [(1, (64, 256), True), (77, (100, 165), False), (300, (129, 320), True)]
)
def test_linear_layers(rows, widths, bias, dtype):
    torch.manual_seed(0)
    layer = made(nn.Linear(*widths, bias=bias)).to(dtype)
    x = (torch.randn(3, rows, widths[0]) * torch.tensor([1.0, 30.0, 0.01])[:, None, None]).to(dtype)
    want = of_codes(x) @ layer.meant.T + (layer.bias.double() if bias else 0)
    y = layer(x)
    assert y.dtype == dtype and rms_ratio(y, want) < 2 * torch.finfo(dtype).eps
    for i in range(3):
        assert torch.equal(y[i], layer(x[i : i + 1])[0]), "a picture does not depend on those beside it"


@needs_instruction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(
    ("channels", "kernel", "stride", "padding"),
    [((32, 64), 3, 1, 1), ((40, 56), 3, 2, 1), ((129, 131), 1, 1, 0), ((64, 128), 3, 1, 0)],
)
def test_convolutions(channels, kernel, stride, padding, dtype):
    torch.manual_seed(0)
    layer = made(nn.Conv2d(*channels, kernel, stride, padding)).to(dtype)
    x = (torch.randn(2, channels[0], 9, 7) * torch.tensor([1.0, 30.0])[:, None, None, None]).to(dtype) + 0.7
    want = nn.functional.conv2d(of_codes(x), layer.meant, layer.bias.double(), stride, padding)
    for given in (x, x.contiguous(memory_format=torch.channels_last)):
        y = layer(given)
        assert y.dtype == dtype and rms_ratio(y, want) < 2 * torch.finfo(dtype).eps
        assert torch.equal(y[1], layer(given[1:])[0])


def loaded(name, quantized=True, dtype=torch.float32):
    net = weights.load(pipeline.BUILDERS[NETS[name]], TINY / name / NETS[name], dtype)
    return quantize.apply(net, "int8") if quantized else net


def in_8_bits(net):
    return {name for name, m in net.named_modules() if isinstance(m, int8.Int8Linear | int8.Int8Conv2d)}


BEHIND = {
    "unet": r"(resnets\.\d+\.conv[12]|attentions\.\d+\.proj_in|attn1\.to_[qkv]|attn2\.to_q|ff\.net\.0\.proj)$",
    "transformer": r"(attn\.(to_[qkv]|add_[qkv]_proj)|attn2\.to_[qkv]|ff(_context)?\.net\.0\.proj)$",
}


@needs_instruction
@pytest.mark.parametrize("name", NETS)
def test_layers_behind_a_norm_and_no_others(name, monkeypatch):
    monkeypatch.setattr(int8, "LEAST", 1)
    whole, net = loaded(name, False), loaded(name)
    layers = {n for n, m in whole.named_modules() if isinstance(m, nn.Linear | nn.Conv2d)}
    assert in_8_bits(net) == {n for n in layers if re.search(BEHIND[NETS[name]], n)}
    assert memory.count(net) == memory.count(whole)


@pytest.mark.parametrize("name", NETS)
def test_the_sizes_that_are_named_are_those_that_come(name, monkeypatch):
    """With one channel of every norm thirty times as large as the others, it is that one that the layer is told of, and sees (unless a SiLU takes it, where it
    happens to be negative)."""
    monkeypatch.setattr(int8, "LEAST", 1)
    torch.manual_seed(0)
    net = loaded(name, False)
    for m in net.modules():
        if isinstance(m, nn.GroupNorm | nn.LayerNorm) and m.weight is not None:
            m.weight.data = torch.ones_like(m.weight)
            m.weight.data[torch.randint(len(m.weight), ())] = 30
            m.bias.data.zero_()
        if isinstance(m, AdaLN):
            m.linear.weight.data.zero_()
            m.linear.bias.data.zero_()
            D = m.linear.in_features
            for i in (0,) if m.n == 2 else (1, 4, 7)[: m.n // 3]:  # the scales; of two the first
                m.linear.bias.data[i * D + torch.randint(D, ())] = 29
    seen = {}
    pairs = quantize.after_norm(net)
    for layer, _ in pairs:
        layer.register_forward_pre_hook(lambda m, args: seen.__setitem__(m, args[0]))
    called(net)
    names, right = {m: n for n, m in net.named_modules()}, collections.defaultdict(list)
    for layer, size in pairs:
        x = seen[layer]
        channels = (x if isinstance(layer, nn.Conv2d) else x.movedim(-1, 1)).transpose(0, 1).flatten(1)
        assert size.shape == (len(channels),)
        kind = ".".join(part for part in names[layer].split(".")[-3:] if not part.isdigit())
        right[kind].append(bool(size.argmax() == channels.pow(2).mean(1).argmax()))
    for kind, found in right.items():
        assert sum(found) >= (0.7 if "conv" in kind else 1) * len(found), (kind, found)


@needs_instruction
@pytest.mark.parametrize("gain", [1, 20, 150])
@pytest.mark.parametrize("kind", ["linear", "convolution"])
def test_a_large_channel_does_not_take_the_range(kind, gain):
    torch.manual_seed(0)
    layer = nn.Linear(320, 200) if kind == "linear" else nn.Conv2d(320, 200, 3, padding=1)
    size = torch.ones(320)
    size[7] = gain
    layer.weight.data[:, 7] /= gain
    x = torch.randn(2, 64, 320) if kind == "linear" else torch.randn(2, 320, 8, 8)
    x = x * (size if kind == "linear" else size.view(-1, 1, 1))
    with torch.no_grad():
        want = layer(x)
        shares = int8.balance(layer.weight, size)
        assert shares[7] / shares[8] == pytest.approx(gain, rel=0.2)
        codes, absmax = quantize.to_int8((layer.weight * shares.view(-1, *[1] * (layer.weight.dim() - 2))).flatten(1))
        assert rms_ratio(int8.pack(layer, codes.view(layer.weight.shape), absmax[:, 0], shares)(x), want) < 0.02


def test_unused_channels_do_not_count():
    weight, size = torch.randn(8, 6), torch.ones(6)
    weight[:, 2], size[4] = 0, 0
    shares = int8.balance(weight, size)
    assert torch.isfinite(shares).all() and (shares > 0).all()


@needs_instruction
def test_compiled():
    layer = made(nn.Linear(128, 160))
    x = torch.randn(2, 3, 128)
    want = layer(x)
    with torch.no_grad():
        assert torch.equal(torch.compile(nn.Sequential(layer, nn.ReLU()), backend="aot_eager")(x), want.relu())


@needs_instruction
def test_a_copy_is_refused_by_name():
    with pytest.raises(TypeError, match="layers in 8 bits"):
        copy.deepcopy(made(nn.Linear(128, 160)))


@needs_instruction
def test_float64():
    layer = made(nn.Linear(128, 160))
    x = torch.randn(2, 3, 128)
    assert layer(x.double()).dtype == torch.float64 and rms_ratio(layer(x.double()), layer(x)) < 1e-6
    int8.usable.cache_clear()
    torch.set_default_dtype(torch.float64)
    try:
        assert int8.usable()
    finally:
        torch.set_default_dtype(torch.float32)


def called(net, dtype=torch.float32):
    g = torch.Generator().manual_seed(3)
    r = lambda *shape: torch.randn(shape, generator=g).to(dtype)  # noqa: E731
    x, cfg = r(2, net.cfg.in_channels, 16, 16), net.cfg
    if hasattr(cfg, "joint_attention_dim"):
        return net(x, 500.0, r(2, 20, cfg.joint_attention_dim), r(2, cfg.pooled_projection_dim))
    added = None
    if cfg.addition_embed_type:
        pooled = cfg.projection_class_embeddings_input_dim - 6 * cfg.addition_time_embed_dim
        added = r(2, pooled), torch.full((2, 6), 64.0)
    return net(x, 500, r(2, 9, cfg.cross_attention_dim), added)


@needs_instruction
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", NETS)
def test_models(name, dtype, monkeypatch):
    """A few per cent off, packed around it or not."""
    monkeypatch.setattr(int8, "LEAST", 1)
    want = called(loaded(name, False))
    net = loaded(name)
    quantize.rest(net, dtype, "cpu")
    with torch.no_grad():
        got = called(net, dtype)
        assert got.dtype == dtype and 1e-3 < rms_ratio(got, want) < 0.06
        onednn.prepare(net, pack=True)
        assert rms_ratio(called(net, dtype), want) < 0.06
        onednn.undo(net)
        assert in_8_bits(net)


@needs_instruction
def test_a_lora_runs_beside_them_and_is_not_fused(tmp_path, monkeypatch):
    monkeypatch.setattr(int8, "LEAST", 1)
    plain = loaded("sd15", False)
    lora.adapt(plain, 2, targets=("to_q", "conv1", "proj_in", "net.0.proj"), component="unet")
    for name, p in plain.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(p, std=0.3)
    adapters = lora.trained({"unet": plain})
    net = loaded("sd15")
    without, base = called(net), called(loaded("sd15", False))
    attached = lora.attach({"unet": net}, adapters)
    assert rms_ratio(called(net) - without, called(plain) - base) < 0.2
    attached.remove()
    assert torch.equal(called(net), without)
    with pytest.raises(UserError, match="cannot be fused into quantized"):
        lora.fuse({"unet": net}, adapters)


@needs_instruction
def test_no_gradient():
    layer = made(nn.Linear(128, 160))
    with pytest.raises(RuntimeError, match="no gradient"):
        layer(torch.randn(1, 2, 128, requires_grad=True))
    with torch.no_grad():
        layer(torch.randn(1, 2, 128, requires_grad=True))


def test_without_the_instruction_weights_only(monkeypatch):
    """Codes would be multiplied wrongly (sums cut at 16 bits) or slowly: there activations stay as they are."""
    monkeypatch.setattr(int8, "usable", lambda: False)
    monkeypatch.setattr(int8, "LEAST", 1)
    net = loaded("sd35-medium")
    assert not in_8_bits(net) and any(type(m) is quantize.QuantizedLinear for m in net.modules())
    assert 1e-4 < rms_ratio(called(net), called(loaded("sd35-medium", False))) < 0.03


@pytest.mark.parametrize("missing", ["instruction", "operator"])
def test_usable_tries_it(missing, monkeypatch):
    int8.usable.cache_clear()
    if missing == "instruction":
        monkeypatch.setattr(torch.cpu, "get_capabilities", dict, raising=False)
    else:
        monkeypatch.setattr(torch.cpu, "get_capabilities", lambda: {"avx512_vnni": True}, raising=False)
        kept = int8.pack
        cut = lambda layer, codes, *more: kept(layer, codes.clamp(-64, 63), *more)  # noqa: E731
        monkeypatch.setattr(int8, "pack", cut)
    assert not int8.usable()
    monkeypatch.undo()
    int8.usable.cache_clear()


@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_quantized_model_is_not_saved(kind, tmp_path):
    sd = pipeline.load(TINY / "sd35-medium", quantized=kind)
    with pytest.raises(UserError, match="quantized model cannot be saved"):
        sd.save(tmp_path / "out")
    assert not list(tmp_path.rglob("*.*"))
