"""Quantized weights: the formats against their definitions, the error each adds, what stays as it is."""

import copy
import json

import pytest
import torch
from torch import nn
from util import TINY, error_line, rms_ratio, run

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.device import memory, onednn, quantize
from nanodiff.models.llm import CausalLM
from nanodiff.models.mmdit import SD3Transformer2DModel
from nanodiff.models.unet import UNet2DConditionModel


def test_int8_is_within_half_a_step():
    w = torch.randn(7, 33) * torch.logspace(-3, 1, 7)[:, None]
    codes, absmax = quantize.to_int8(w)
    error = (quantize.from_int8(codes, absmax, torch.float32) - w).abs()
    assert codes.dtype == torch.int8 and (error <= absmax / 254 * 1.001).all()
    assert (codes.abs().amax(dim=1) == 127).all()


def test_nf4_takes_the_nearest_level():
    w = torch.randn(5, 192)
    codes, absmax = quantize.to_nf4(w)
    assert codes.shape == (5, 96) and codes.dtype == torch.uint8 and absmax.shape == (5, 3)
    levels = torch.tensor(quantize.NF4)
    scaled = w.view(5, 3, 64) / absmax[..., None]
    nearest = levels[(scaled[..., None] - levels).abs().argmin(-1)] * absmax[..., None]
    assert torch.allclose(quantize.from_nf4(codes, absmax, torch.float32), nearest.view(5, 192), atol=1e-6)


def test_nf4_levels_are_quantiles_of_the_normal():
    """QLoRA appendix E: 8 and 9 evenly spaced quantiles for the two signs, scaled to ±1."""
    from scipy.stats import norm

    offset = 0.9677083
    top = [norm.ppf(offset + i / 8 * (0.5 - offset)) for i in range(8)]
    low = [-norm.ppf(offset + i / 7 * (0.5 - offset)) for i in range(7)]
    values = sorted([*top, 0.0, *low])
    assert [v / max(values) for v in values] == pytest.approx(list(quantize.NF4), abs=1e-4)


def test_errors_of_normal_weights():
    """What a normally distributed layer loses: int8 about 1 %, nf4 about 9 % of its size."""
    w, x = torch.randn(512, 512), torch.randn(64, 512)
    linear = torch.nn.Linear(512, 512)
    linear.weight.data = w
    for kind, low, high in (("int8", 0.004, 0.02), ("nf4", 0.06, 0.12)):
        got = quantize.QuantizedLinear(linear, kind)
        assert low < rms_ratio(got.weight, w) < high
        assert rms_ratio(got(x), linear(x)) < high


@pytest.mark.parametrize(("kind", "bound"), [("int8", 0.03), ("nf4", 0.3)])
def test_transformer(kind, bound):
    x, text, pooled = torch.randn(1, 16, 16, 16), torch.randn(1, 20, 96), torch.randn(1, 80)
    whole = weights.load(SD3Transformer2DModel, TINY / "sd35-medium" / "transformer", torch.float32)
    small = weights.load(SD3Transformer2DModel, TINY / "sd35-medium" / "transformer", torch.float32)
    quantize.apply(small, kind)
    kinds = {type(m).__name__ for m in small.transformer_blocks.modules()}
    assert "QuantizedLinear" in kinds and isinstance(small.proj_out, torch.nn.Linear)
    assert memory.count(small) == memory.count(whole), "quantized weights count as what they stand for"
    error = rms_ratio(small(x, 500, text, pooled), whole(x, 500, text, pooled))
    assert 1e-4 < error < bound


def test_half_precision_inputs():
    linear = torch.nn.Linear(128, 32)
    for kind in quantize.KINDS:
        small = quantize.QuantizedLinear(linear, kind)
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            x = torch.randn(3, 128, dtype=dtype)
            out = small(x)
            assert out.dtype == dtype and rms_ratio(out, linear(x.float())) < 0.15


@pytest.mark.parametrize("width", [8, 24, 40, 64, 72, 100])
def test_a_few_rows_of_any_width(width):
    """PyTorch's kernel for a few rows reads past the end of widths that are no multiple of 16: other numbers, or the end of the process."""
    linear = torch.nn.Linear(width, 48)
    small = quantize.QuantizedLinear(linear, "int8")
    for rows in (1, 4, 8):
        x = torch.randn(rows, width)
        assert rms_ratio(small(x.bfloat16()), linear(x)) < 0.02


def test_the_loss_of_a_quantized_language_model_is_of_its_own_output_layer():
    from nanodiff.pipeline import sources

    net, _ = sources.load_language(TINY / "llama", torch.float32, "cpu")
    ids = torch.randint(5, 200, (2, 30))
    quantize.language(net, "int8")
    states = net(ids)
    labels = ids.clone()
    labels[0, :7] = -100
    want = torch.nn.functional.cross_entropy(net.logits(states)[:, :-1].flatten(0, 1).float(), labels[:, 1:].flatten())
    assert abs(net.loss(states, labels) - want) < 1e-5


@pytest.mark.parametrize("prepared", [onednn.learn, onednn.prepare, lambda net: onednn.prepare(net, pack=True)])
@pytest.mark.parametrize("kind", quantize.KINDS)
def test_a_model_that_is_prepared_is_quantized_whole(kind, prepared, monkeypatch):
    monkeypatch.setattr(onednn, "LEAST", 1)
    nets = [weights.load(SD3Transformer2DModel, TINY / "sd35-medium" / "transformer", torch.float32) for _ in range(2)]
    prepared(nets[1].requires_grad_(False))
    found = [
        [(n, type(m).__name__) for n, m in quantize.apply(net, kind).named_modules() if hasattr(m, "codes")]
        for net in nets
    ]
    assert found[0] == found[1]


@pytest.mark.parametrize("kind", quantize.KINDS)
@pytest.mark.parametrize("offload", ["none", "model", "sequential"])
def test_pipelines(kind, offload):
    """Every way of keeping quantized weights gives the same picture."""
    a, b = (pipeline.load(TINY / "sd35-medium", quantized=kind, offload=o) for o in ("none", offload))
    a, b = (sd.generate(["a cat"], steps=2, seeds=[0]).latents for sd in (a, b))
    assert torch.isfinite(a).all() and rms_ratio(b, a) < 1e-5
    plain = pipeline.load(TINY / "sd35-medium").generate(["a cat"], steps=2, seeds=[0]).latents
    assert rms_ratio(a, plain) > 1e-4, "it is quantized"


def test_nothing_to_quantize(tmp_path):
    """Widths that are no multiple of 64 cannot be held in nf4: none at all is an error, not a silent nothing."""
    raw = json.loads((TINY / "sd15" / "unet" / "config.json").read_text()) | {
        "block_out_channels": [8, 8, 8, 8],
        "attention_head_dim": 2,
    }
    model = UNet2DConditionModel(UNet2DConditionModel.Config.from_json(raw))
    with pytest.raises(UserError, match="`quantize` nf4"):
        quantize.apply(model, "nf4")
    done = run("sample.py", "--prompt", "a", "--quantize", "int3", "--output-dir", tmp_path / "o")
    assert "nf4" in error_line(done)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("kind", ["int8", "int4"])
def test_a_language_model_reads_codes(kind, tied):
    """One row, a few and many rows are what the codes stand for, in bf16's precision; the last layer is quantized too, the embedding is not."""
    cfg = CausalLM.Config(vocab_size=512, hidden_size=128, intermediate_size=256, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=32,
                          tie_word_embeddings=tied)  # fmt: skip
    torch.manual_seed(0)
    net = CausalLM(cfg).to(torch.bfloat16).eval().requires_grad_(False)
    plain = copy.deepcopy(net)
    embedding = net.model.embed_tokens.weight.clone()
    error = quantize.language(net, kind)
    assert (0.002 < error < 0.01) if kind == "int8" else (0.05 < error < 0.12)
    assert torch.equal(net.model.embed_tokens.weight, embedding)
    for (parent, name, layer), made in zip(layers_of(plain), layers_of(net, nn.Module), strict=True):
        kept = (
            made[2].weight if kind == "int8" else made[2](torch.eye(layer.in_features, dtype=torch.bfloat16)).T.float()
        )
        assert rms_ratio(kept, layer.weight.float()) < (0.01 if kind == "int8" else 0.12), (parent, name)
        for rows in (1, 3, 8, 9, 40):
            x = torch.randn(2, rows, layer.in_features, dtype=torch.bfloat16)
            assert made[2](x).shape == (2, rows, layer.out_features)
            assert torch.equal(made[2](x[:, -1]), made[2](x[:, -1].contiguous()))
            assert rms_ratio(made[2](x).float(), x.float() @ kept.T) < 0.01
    ids = torch.randint(0, 512, (1, 7))
    for keep in (ids, ids[:, :1]):
        a, b = (m.logits(m(keep)).float() for m in (plain, net))
        assert rms_ratio(b, a) < (0.05 if kind == "int8" else 0.4) and not torch.equal(a, b)


def layers_of(model, kind=nn.Linear):
    return [
        (p, n, c)
        for p in model.model.layers.modules()
        for n, c in p.named_children()
        if n.endswith("_proj") and isinstance(c, kind)
    ]


def test_a_width_that_int4_cannot_hold():
    net = CausalLM(
        CausalLM.Config(
            vocab_size=64,
            hidden_size=48,
            intermediate_size=64,
            num_hidden_layers=1,
            num_attention_heads=2,
            num_key_value_heads=2,
            head_dim=24,
        )
    )
    with pytest.raises(UserError, match="take int8"):
        quantize.language(net, "int4")
