"""T5 encoder: recorded outputs, the real XXL's keys and shapes, relative buckets, half precision."""

import json
import math

import pytest
import torch
from util import TINY, built, copy_model, golden, manifest, max_error, rms_ratio

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models.t5 import Config, T5EncoderModel, buckets

NAMES = ["sd35-medium", "sd35-large-turbo"]


@pytest.mark.parametrize("name", NAMES)
def test_golden(name):
    model = weights.load(T5EncoderModel, TINY / name / "text_encoder_3", torch.float32)
    tensors, _ = golden(f"{name}.text_encoder_3")
    assert max_error(model(tensors["input_ids"]), tensors["last_hidden_state"]) < 1e-5


def test_manifest():
    config, parameters = manifest("sd35-medium.text_encoder_3")
    assert built(T5EncoderModel, config) == parameters


def test_buckets_are_the_papers():
    """§2.1, written out: half for each direction; 8 exact; then logarithmic up to 128."""
    got = buckets(300, 32, 128)
    for query, key in ((0, 0), (0, 5), (5, 0), (0, 20), (290, 3), (3, 290), (100, 107), (100, 109)):
        distance = key - query
        size, half = abs(distance), 16 if distance > 0 else 0
        far = 8 + int(math.log(size / 8) / math.log(128 / 8) * 8) if size >= 8 else 0
        assert got[query, key] == half + (size if size < 8 else min(far, 15))


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_is_near(dtype):
    tensors, _ = golden("sd35-medium.text_encoder_3")
    model = weights.load(T5EncoderModel, TINY / "sd35-medium" / "text_encoder_3", dtype)
    got = model(tensors["input_ids"])
    assert got.dtype == dtype and rms_ratio(got, tensors["last_hidden_state"]) < 0.02


def test_fp16_survives_what_overflows_it():
    """XXL's feed-forward exceeds 65504: with such weights the fp16 model must stay finite and near fp32."""
    tensors, _ = golden("sd35-medium.text_encoder_3")
    full = weights.load(T5EncoderModel, TINY / "sd35-medium" / "text_encoder_3", torch.float32)
    half = weights.load(T5EncoderModel, TINY / "sd35-medium" / "text_encoder_3", torch.float16)
    for model in (full, half):
        for block in model.encoder.block:
            block.layer[1].DenseReluDense.wo.weight.data.mul_(40_000)
    ids = tensors["input_ids"][:2]
    raw = full.encoder.block[0].layer[1]
    hook = raw.register_forward_hook(lambda m, a, out: seen.append(out.abs().max().item()))
    seen = []
    want, got = full(ids), half(ids)
    hook.remove()
    assert max(seen) > 65504 and torch.isfinite(got).all() and rms_ratio(got, want) < 0.02


def test_files_with_a_second_copy_of_the_embedding(tmp_path):
    """Some T5 files store `encoder.embed_tokens` beside `shared`; here as a single unsharded file."""
    folder = copy_model("sd35-medium", tmp_path / "m") / "text_encoder_3"
    state = {}
    for shard in folder.glob("*.safetensors"):
        state |= weights.load_tensors(shard)
        shard.unlink()
    (folder / "model.safetensors.index.json").unlink()
    weights.save_tensors(
        folder / "model.safetensors", state | {"encoder.embed_tokens.weight": state["shared.weight"].clone()}
    )
    tensors, _ = golden("sd35-medium.text_encoder_3")
    model = weights.load(T5EncoderModel, folder, torch.float32)
    assert max_error(model(tensors["input_ids"]), tensors["last_hidden_state"]) < 1e-5


def test_other_t5s_are_refused():
    raw = json.loads((TINY / "sd35-medium" / "text_encoder_3" / "config.json").read_text())
    with pytest.raises(UserError, match="feed_forward_proj"):
        Config.from_json(raw | {"feed_forward_proj": "relu"})
