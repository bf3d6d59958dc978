"""ViT against the reference library's recording; the published file's names; what must be refused."""

import json

import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file
from util import TINY, built, golden, manifest, max_error, rms_ratio

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models import vit

HEADS = ("classifier.", "pooler.")


def test_parameters_of_the_published_file():
    config, parameters = manifest("vit-base-patch16-224")
    names = {k.removeprefix("vit."): v for k, v in parameters.items() if not k.startswith(HEADS)}
    assert built(vit.ViT, config) == names


def test_golden():
    tensors, _ = golden("vit.forward")
    net, kept = weights.load(vit.ViT, TINY / "vit", torch.float32), []
    out = net(tensors["pixel_values"], keep=kept)
    assert max_error(out, tensors["encoder_last_hidden_state"]) < 1e-5
    for i, state in enumerate(kept):
        assert max_error(state, tensors[f"hidden_states.{i}"]) < 1e-5, i
    head = load_file(TINY / "vit" / "model.safetensors")
    logits = F.linear(out[:, 0], head["classifier.weight"], head["classifier.bias"])
    assert max_error(logits, tensors["logits"]) < 1e-5


def test_half_precision():
    tensors, _ = golden("vit.forward")
    net = weights.load(vit.ViT, TINY / "vit", torch.bfloat16)
    assert rms_ratio(net(tensors["pixel_values"]), tensors["encoder_last_hidden_state"]) < 3e-2


def test_saved_and_loaded(tmp_path):
    net = weights.load(vit.ViT, TINY / "vit", torch.float32)
    weights.save(net, tmp_path)
    again, x = weights.load(vit.ViT, tmp_path), torch.randn(1, 3, 32, 32)
    assert again.cfg == net.cfg and max_error(again(x), net(x)) < 1e-6
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["model_type"] == "vit" and raw["hidden_act"] == "gelu"


def test_mistakes():
    for more, said in (
        ({"model_type": "llama"}, "is no ViT"),
        ({"hidden_act": "relu"}, "hidden_act = 'relu' is not supported"),
        ({"image_size": 30}, "no whole number of patches"),
        ({"depth": 3}, "unknown field 'depth'"),
    ):
        with pytest.raises(UserError, match=said):
            vit.Config.from_json(json.loads((TINY / "vit" / "config.json").read_text()) | more)
    with pytest.raises(ValueError, match="the ViT sees 32x32"):
        weights.load(vit.ViT, TINY / "vit")(torch.zeros(1, 3, 40, 32))
