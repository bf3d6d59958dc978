"""CLIP: recorded hidden states, pooled vectors and picture embeddings, manifests, refusals."""

import pytest
import torch
from util import TINY, built, golden, manifest, max_error

from nanodiff import weights
from nanodiff.config import UserError
from nanodiff.models.clip import CLIPModel, CLIPTextModel, Config

ENCODERS = [(n, "text_encoder") for n in ("sd15", "sd21-v", "sd-turbo", "sdxl", "sdxl-turbo")]
ENCODERS += [(n, "text_encoder_2") for n in ("sdxl", "sdxl-turbo")]
ENCODERS += [(n, e) for n in ("sd35-medium", "sd35-large-turbo") for e in ("text_encoder", "text_encoder_2")]


@pytest.mark.parametrize(("name", "encoder"), ENCODERS)
def test_golden(name, encoder):
    model = weights.load(CLIPTextModel, TINY / name / encoder, torch.float32)
    tensors, _ = golden(f"{name}.{encoder}")
    states, pooled = model(tensors["input_ids"])
    assert max_error(model.final_norm(states[-1]), tensors["last_hidden_state"]) < 1e-5
    assert ("text_embeds" in tensors) == model.cfg.with_projection
    assert max_error(pooled, tensors.get("text_embeds", tensors.get("pooler_output"))) < 1e-5
    for j, state in enumerate(states):
        if f"hidden_states.{j}" in tensors:
            assert max_error(state[:1], tensors[f"hidden_states.{j}"]) < 1e-5


@pytest.mark.parametrize(
    "name",
    [
        *(f"{n}.text_encoder" for n in ("sd14", "sd15", "sd21", "sd-turbo", "sdxl", "sdxl-turbo", "sd35-medium")),
        *(f"{n}.text_encoder_2" for n in ("sdxl", "sdxl-turbo", "sd35-medium")),
    ],
)
def test_manifest(name):
    """The real model's config builds exactly its file's parameters."""
    config, parameters = manifest(name)
    names = {weights.renamed(k, "CLIPTextModel"): v for k, v in parameters.items()}
    names.pop(None, None)  # dropped on purpose: position_ids
    weights.check_names(built(CLIPTextModel, config), names, name)


def test_padding_is_attended_to_and_the_future_is_not():
    model = weights.load(CLIPTextModel, TINY / "sd15" / "text_encoder", torch.float32)
    ids = torch.randint(0, 900, (1, 20))
    changed = ids.clone()
    changed[0, 12] += 1
    a, b = (model(i)[0][-1] for i in (ids, changed))
    assert torch.equal(a[:, :12], b[:, :12]) and not torch.equal(a[:, 12:], b[:, 12:])


def test_pooling_finds_the_configured_end_token():
    cfg = Config(
        vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2, eos_token_id=7
    )
    model = CLIPTextModel(cfg)
    ids = torch.tensor([[1, 30, 7, 7]])
    states, pooled = model(ids)
    assert torch.equal(pooled[0], model.final_norm(states[-1])[0, 2])


def test_too_many_tokens():
    model = CLIPTextModel(
        Config(vocab_size=50, hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
    )
    with pytest.raises(ValueError, match="78 tokens"):
        model(torch.zeros(1, 78, dtype=torch.long))


def test_unsupported_activation_is_named():
    with pytest.raises(UserError, match="hidden_act"):
        Config.from_json({"hidden_act": "relu"})


# ---------------------------------------------------------------------------------------------------------
# Both towers


def test_whole_clip_golden():
    tensors, facts = golden("clip.forward")
    model = weights.load(CLIPModel, TINY / "clip")
    pixels = tensors["pixel_values"]
    state, pooled = model.vision_model(pixels)
    assert max_error(state, tensors["vision_last_hidden_state"]) < 1e-5
    assert max_error(pooled, tensors["vision_pooled"]) < 1e-5
    images, texts = model.image(pixels), model.text(tensors["input_ids"])
    assert max_error(images, tensors["image_embeds_normalized"]) < 1e-5
    assert max_error(texts, tensors["text_embeds_normalized"]) < 1e-5
    logits = model.logit_scale.exp() * images @ texts.T
    assert (
        max_error(
            logits * torch.tensor(facts["args"]["logit_scale"]).exp() / model.logit_scale.exp(),
            tensors["logits_per_image"],
        )
        < 1e-4
    )


@pytest.mark.parametrize("name", ["clip-vit-base-patch32", "clip-vit-base-patch16", "clip-vit-large-patch14"])
def test_whole_clip_manifest(name):
    config, shapes = manifest(name)
    assert built(CLIPModel, config) == shapes


def test_a_text_encoder_is_no_whole_clip():
    with pytest.raises(UserError, match="text_config and vision_config"):
        CLIPModel.Config.from_json({"hidden_size": 32})
    with pytest.raises(UserError, match="vision_config: unknown field 'hiden_size'"):
        CLIPModel.Config.from_json({"text_config": {}, "vision_config": {"hiden_size": 3}})


# transformers 5.23: CLIPTextModel(ids, attention_mask=mask).last_hidden_state[:, -1, :6]
MASKED = [
    [-1.403927, -0.931404, -0.193442, 0.367426, -2.070338, 0.552032],
    [-0.44148, -0.186001, 0.090774, 1.461052, -2.802178, 2.204199],
]


def test_attention_mask():
    """With the mask that its config asks for no token sees the padding; states up to the end token are as without."""
    model = weights.load(CLIPTextModel, TINY / "sd15" / "text_encoder", torch.float32)
    ids = torch.tensor([[0, 5, 17, 300, 999, 1, 1, 1], [0, 7, 999, 1, 1, 1, 1, 1]])
    plain, pooled = model(ids)
    model.cfg.use_attention_mask = True
    states, same = model(ids)
    assert max_error(model.final_norm(states[-1])[:, -1, :6], torch.tensor(MASKED)) < 1e-5
    for row, end in ((0, 5), (1, 3)):
        assert max_error(states[-1][row, :end], plain[-1][row, :end]) < 1e-6
    assert max_error(same, pooled) < 1e-6


def test_the_mask_is_written_only_where_there_is_one():
    assert "use_attention_mask" not in Config().to_json()
    assert Config.from_json(Config(use_attention_mask=True).to_json()).use_attention_mask
