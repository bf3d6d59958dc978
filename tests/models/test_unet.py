"""UNet: recorded outputs, every key and shape of the real models, text computed once, refusals."""

import json

import pytest
import torch
from util import TINY, built, golden, manifest, max_error, recipe

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models.unet import Config, UNet2DConditionModel

PIPELINES = ["sd15", "sd21-v", "sd-turbo", "sdxl", "sdxl-turbo"]


@pytest.fixture(scope="module", params=PIPELINES)
def unet(request):
    return request.param, weights.load(UNet2DConditionModel, TINY / request.param / "unet", torch.float32)


def added(tensors):
    """SDXL's vector condition in a recording, None for the others."""
    return (tensors["text_embeds"], tensors["time_ids"]) if "text_embeds" in tensors else None


@pytest.mark.parametrize("case", ["unet", "unet_odd", "unet_float_t"])
def test_golden(unet, case):
    name, model = unet
    tensors, facts = golden(f"{name}.{case}")
    t = tensors.get("timestep", torch.tensor(facts["args"]["timestep"]))
    got = model(tensors["sample"], t, tensors["encoder_hidden_states"], added(tensors))
    assert max_error(got, tensors["output"]) < 1e-5


@pytest.mark.parametrize("case", ["told", "no-middle", "plain-middle", "uneven"])
def test_distilled_models(case, tmp_path):
    """Latent consistency models that are told their guidance, BK-SDM and tiny-sd without a middle, Vega with a plain one, SSD-1B with other depths on the way up."""
    tensors, facts = golden("distilled.forward")
    mine = facts["args"]["cases"][case]
    model = UNet2DConditionModel(Config.from_json(mine["config"])).requires_grad_(False)
    model.load_state_dict(recipe(model, mine["tag"]))
    model.guidance = facts["args"]["scale"]
    x, text, t = tensors[f"{case}.sample"], tensors[f"{case}.text"], torch.tensor(facts["args"]["timestep"])
    assert max_error(model(x, t, text), tensors[case]) < 1e-5
    assert max_error(model(x, model.shifts(t), model.text_kv(text)), tensors[case]) < 1e-5
    model.guidance = 1.0
    assert (max_error(model(x, t, text), tensors[case]) > 1e-3) == (case == "told")
    weights.save(model, tmp_path)  # and its config.json says all of it
    again = weights.load(UNet2DConditionModel, tmp_path, torch.float32)
    assert again.cfg == model.cfg and max_error(again(x, t, text), model(x, t, text)) < 1e-5


@pytest.mark.parametrize("name", ["unet", "unet_odd"])
def test_block_outputs(unet, name):
    """Every recorded sub-module, so that a wrong block is found where it is."""
    tensors, facts = golden(f"{unet[0]}.{name}")
    seen = {}
    hooks = [
        module.register_forward_hook(lambda m, i, o, key=key: seen.setdefault(key, o))
        for key, module in unet[1].named_modules()
        if key in ("conv_in", "conv_norm_out", "mid_block", "time_embedding")
    ]
    t = tensors.get("timestep", torch.tensor(facts["args"]["timestep"]))
    unet[1](tensors["sample"], t, tensors["encoder_hidden_states"], added(tensors))
    for hook in hooks:
        hook.remove()
    compared = 0
    for key, got in seen.items():
        if key != "conv_norm_out" and f"hook.{key}" in tensors:  # ours includes the SiLU that follows the norm
            assert max_error(got, tensors[f"hook.{key}"]) < 1e-5, key
            compared += 1
    assert compared >= 3 or name == "unet"


def test_text_kv_is_the_same_as_the_text(unet):
    x, text = torch.randn(2, 4, 8, 8), torch.randn(2, 77, unet[1].cfg.cross_attention_dim)
    more = None
    if unet[1].cfg.addition_embed_type:
        width = unet[1].cfg.projection_class_embeddings_input_dim - 6 * unet[1].cfg.addition_time_embed_dim
        more = torch.randn(2, width), torch.full((2, 6), 128.0)
    assert torch.equal(unet[1](x, 5, text, more), unet[1](x, 5, unet[1].text_kv(text), more))


@pytest.mark.parametrize("name", ["sd14", "sd15", "sd21", "sd21base", "sd-turbo", "sdxl", "sdxl-turbo", "sdxl-refiner"])
def test_manifest(name):
    """The real model's config builds exactly its file's parameters."""
    config, parameters = manifest(f"{name}.unet")
    assert built(UNet2DConditionModel, config) == parameters


RAW = json.loads((TINY / "sd15" / "unet" / "config.json").read_text())


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"act_fn": "gelu"}, "act_fn"),
        ({"dual_cross_attention": True}, "dual_cross_attention"),
        ({"down_block_types": ["AttnDownBlock2D"] * 4}, "AttnDownBlock2D"),
        ({"block_out_channels": [16, 16]}, "entries for 2 levels"),
        ({"block_out_channelz": [16]}, "block_out_channels"),
        ({"layers_per_block": "2"}, "layers_per_block"),
        ({"layers_per_block": -1}, "layers_per_block"),
        ({"layers_per_block": 10**9}, "layers_per_block"),
        ({"norm_eps": None}, "norm_eps"),
        ({"time_embedding_dim": 256}, "time_embedding_dim"),
        ({"transformer_layers_per_block": [1, [1, 1], 1, 1]}, "needs a reverse_transformer_layers_per_block"),
        (
            {"transformer_layers_per_block": [1, [1, 1], 1, 1], "reverse_transformer_layers_per_block": [1, [1], 1, 1]},
            "1 entries for 3 blocks",
        ),
        ({"reverse_transformer_layers_per_block": [1]}, "1 entries for 4 levels"),
        ({"time_cond_proj_dim": 3}, "time_cond_proj_dim = 3 is out of range"),
        ({"mid_block_type": "UNetMidBlock2DSimpleCrossAttn"}, "mid_block_type"),
        ({"addition_embed_type": "image"}, "addition_embed_type"),
    ],
)
def test_unsupported_config_is_named(change, says):
    with pytest.raises(UserError, match=says):
        Config.from_json(RAW | change)


def test_config_round_trip():
    cfg = Config.from_json(RAW)
    assert Config.from_json(cfg.to_json()) == cfg


def test_gradients_reach_every_parameter():
    torch.manual_seed(0)
    model = UNet2DConditionModel(Config.from_json(RAW)).double()
    text = torch.randn(1, 7, 32, dtype=torch.float64)
    model(torch.randn(1, 4, 16, 16, dtype=torch.float64), 3, text).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in model.parameters())
