"""Quantized weights: the formats against their definitions, the error each adds, what stays as it is."""

import json

import pytest
import torch
from util import TINY, error_line, rms_ratio, run

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.device import memory, quantize
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
