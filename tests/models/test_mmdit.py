"""MMDiT: recorded outputs and blocks, every key and shape of the real models, refusals."""

import json

import pytest
import torch
from util import TINY, built, golden, manifest, max_error, rms_ratio

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.models.mmdit import Config, SD3Transformer2DModel, positions
from nanodiff.pipeline import guidance

NAMES = ["sd35-medium", "sd35-large-turbo"]
RAW = json.loads((TINY / "sd35-medium" / "transformer" / "config.json").read_text())


@pytest.fixture(scope="module", params=NAMES)
def model(request):
    return request.param, weights.load(SD3Transformer2DModel, TINY / request.param / "transformer", torch.float32)


def run(model, case):
    tensors, facts = golden(case)
    t = tensors.get("timestep", torch.tensor(facts["args"]["timestep"]))
    return model(tensors["hidden_states"], t, tensors["encoder_hidden_states"], tensors["pooled_projections"]), tensors


@pytest.mark.parametrize("case", ["transformer", "transformer_nonsquare"])
def test_golden(model, case):
    got, tensors = run(model[1], f"{model[0]}.{case}")
    assert max_error(got, tensors["output"]) < 1e-5


def test_block_outputs(model):
    """Both streams after every block, so that a wrong block is found where it is."""
    seen, hooks = {}, []
    for i, block in enumerate(model[1].transformer_blocks):
        hooks.append(block.register_forward_hook(lambda m, a, out, i=i: seen.__setitem__(i, out)))
    _, tensors = run(model[1], f"{model[0]}.transformer_nonsquare")
    for hook in hooks:
        hook.remove()
    for i, (image, text) in seen.items():
        assert max_error(image, tensors[f"hook.transformer_blocks.{i}.1"]) < 1e-5
        assert (text is None) == (i == max(seen)) == (f"hook.transformer_blocks.{i}.0" not in tensors)
        if text is not None:
            assert max_error(text, tensors[f"hook.transformer_blocks.{i}.0"]) < 1e-5


@pytest.mark.parametrize("name", ["sd35-medium", "sd35-large"])
def test_manifest(name):
    config, parameters = manifest(f"{name}.transformer")
    assert built(SD3Transformer2DModel, config) == parameters


def test_bf16_is_near(model):
    """The type in which these models are released: the rounding error of bf16, no more."""
    tensors, facts = golden(f"{model[0]}.transformer")
    t = tensors.get("timestep", torch.tensor(facts["args"]["timestep"]))
    half = weights.load(SD3Transformer2DModel, TINY / model[0] / "transformer", torch.bfloat16)
    x, text, pooled = (tensors[k].bfloat16() for k in ("hidden_states", "encoder_hidden_states", "pooled_projections"))
    assert rms_ratio(half(x, t, text, pooled), tensors["output"]) < 0.03


def test_skipped_blocks_are_as_if_absent(model):
    tensors, _ = golden(f"{model[0]}.transformer")
    args = tensors["hidden_states"], 500.0, tensors["encoder_hidden_states"], tensors["pooled_projections"]
    skipped, whole = model[1](*args, skip_layers=(1,)), model[1](*args)
    block = model[1].transformer_blocks[1]
    hook = block.register_forward_hook(lambda m, a, out: (a[0], a[1]))
    assert torch.equal(model[1](*args), skipped) and not torch.allclose(whole, skipped)
    hook.remove()


def test_positions_are_cropped_in_the_middle(model):
    table = model[1].pos_embed
    side, zero = table.side, torch.zeros(1, 16, 4, 6)
    want = table.pos_embed.view(side, side, -1)[side // 2 - 1 : side // 2 + 1, (side - 3) // 2 : (side - 3) // 2 + 3]
    assert torch.allclose(table(zero) - table.proj.bias, want.reshape(1, 6, -1), atol=1e-6)
    with pytest.raises(ValueError, match="position table"):
        table(torch.zeros(1, 16, 2 * side + 2, 4))


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"qk_norm": "layer_norm"}, "qk_norm"),
        ({"caption_projection_dim": 32}, "caption_projection_dim"),
        ({"num_layers": "four"}, "num_layers"),
        ({"guidance_embeds": True}, "guidance_embeds"),
    ],
)
def test_unsupported_configs_are_named(change, says):
    with pytest.raises(UserError, match=says):
        Config.from_json(RAW | change)


def test_without_qk_norm():
    """SD 3 medium: the same network without norms of q and k."""
    with torch.device("meta"):
        keys = SD3Transformer2DModel(Config.from_json(RAW | {"qk_norm": None})).state_dict()
    assert not any(".norm_q." in k or ".norm_added_k." in k for k in keys)


@pytest.mark.parametrize("name", NAMES)
def test_a_new_model_has_the_stored_positions(name):
    """The table in the file (bf16) is what a freshly built model begins with."""
    cfg = Config.from_json(json.loads((TINY / name / "transformer" / "config.json").read_text()))
    stored = weights.load(SD3Transformer2DModel, TINY / name / "transformer", torch.float32).pos_embed.pos_embed
    made = positions(cfg.width, cfg.pos_embed_max_size, cfg.sample_size // cfg.patch_size)
    assert made.shape == stored.shape and (made - stored).abs().max() < 4e-3
    assert torch.equal(SD3Transformer2DModel(cfg).pos_embed.pos_embed, made)


@pytest.mark.parametrize("name", ["sd35-medium", "sd35-large-turbo"])
def test_vectors_made_beforehand(name, monkeypatch):
    """Rows of shifts() in place of the time, for several times and texts at once, are what the time gives; a run takes them."""
    sd = pipeline.load(TINY / name)
    net, g = sd.net, torch.Generator().manual_seed(0)
    x = torch.randn(2, net.cfg.in_channels, 8, 8, generator=g)
    text, pooled = (
        torch.randn(2, 5, net.cfg.joint_attention_dim, generator=g),
        torch.randn(2, net.cfg.pooled_projection_dim, generator=g),
    )
    times = [981.0, 3.0]
    with torch.no_grad():
        made = net.shifts(torch.tensor(times), pooled)
        for t, rows in zip(times, made.chunk(len(times)), strict=True):
            assert max_error(net(x, rows, text, pooled), net(x, t, text, pooled)) < 1e-5
    calls = []
    net.norm_out.linear.register_forward_hook(lambda m, args, out: calls.append(len(out)))
    sd.generate("a cat", steps=3, seeds=[0], height=64, width=64, guidance_scale=3.0)
    assert calls == [2 * 3], "once, for both rows of every step"
    monkeypatch.setattr(guidance, "MOST_SHIFTS", 2 * 3 * sum(net.shift_widths()) * 4)
    assert len(sd.shifts([1.0, 2.0, 3.0], pooled)) == 3 and sd.shifts([1.0, 2.0, 3.0, 4.0], pooled) == {}, (
        "no more memory"
    )
