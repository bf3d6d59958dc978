"""LLaMA 3.2 and Gemma 3 against the reference library's recordings; the cache; what must be refused."""

import json

import pytest
import torch
from util import GOLDEN, ROOT, TINY, built, golden, manifest, max_error

from nanodiff import lora, weights
from nanodiff.config import UserError
from nanodiff.models import llm

MODELS = ("llama", "gemma3")
STORIES = ROOT.parent / "shared" / "data" / "stories260k"


@pytest.fixture(scope="module", params=MODELS)
def model(request):
    return request.param, weights.load(llm.CausalLM, TINY / request.param, torch.float32)


@pytest.mark.parametrize("name", ["llama-3.2-1b", "gemma-3-1b-it"])
def test_parameters_of_the_published_files(name):
    config, parameters = manifest(name)
    assert built(llm.CausalLM, config) == parameters


def test_golden(model):
    name, net = model
    tensors, _ = golden(f"{name}.forward")
    kept = []
    states = net(tensors["input_ids"])
    net(tensors["input_ids"][:1], keep=kept)
    assert max_error(net.logits(states), tensors["logits"]) < 1e-5
    assert len(kept) == net.cfg.num_hidden_layers + 1
    for i, state in enumerate(kept):
        assert max_error(state, tensors[f"hidden_states.{i}"]) < 1e-5, i
    long = net(tensors["long_ids"])[:, -8:]
    assert max_error(net.logits(long), tensors["long_logits_last8"]) < 1e-5
    given = net(embeds=tensors["inputs_embeds"])[:, -8:]
    assert max_error(net.logits(given), tensors["inputs_embeds_logits"]) < 1e-5, "given embeddings are not scaled again"
    left = net(tensors["input_ids"], mask=tensors["left_pad_mask"].bool())[:, -4:]
    assert max_error(net.logits(left), tensors["left_pad_logits_last4"]) < 1e-5
    assert abs(net.loss(states, tensors["labels"]) - tensors["loss"]) < 1e-5


def test_frequencies():
    for name, kinds in (
        ("llama", {"rope.inv_freq": False}),
        ("gemma3", {"rope.full_attention.inv_freq": False, "rope.sliding_attention.inv_freq": True}),
    ):
        tensors, facts = golden(f"{name}.forward")
        cfg = llm.Config.from_json(facts["args"]["config"])
        for key, local in kinds.items():
            torch.testing.assert_close(llm.frequencies(cfg, local), tensors[key], rtol=1e-6, atol=0)


def test_weights_in_bf16(model):
    """Close to fp32; Gemma's factor on the embeddings is rounded as the reference rounds it, and its norms' 1 + w is not."""
    name, _ = model
    tensors, _ = golden(f"{name}.forward")
    low = weights.load(llm.CausalLM, TINY / name, torch.bfloat16)
    got = low.logits(low(tensors["input_ids"])).float()
    error = (got - tensors["logits"]).pow(2).mean().sqrt() / tensors["logits"].pow(2).mean().sqrt()
    assert error < 0.03
    if name == "gemma3":
        factor = low.embed(torch.tensor([[5]])).float() / low.model.embed_tokens.weight[5].float()
        assert abs(factor.nanmedian() - torch.tensor(40**0.5).bfloat16().float()) < 0.05


@pytest.mark.parametrize(
    "chunks", [[120], [100] + [1] * 20, [3] * 40, [1] * 120, [7, 50, 1, 1, 1, 30, 30]], ids=lambda c: f"{c[0]}x{len(c)}"
)
def test_cached_is_uncached(model, chunks):
    name, net = model
    ids = golden(f"{name}.forward")[0]["long_ids"]
    whole = net.logits(net(ids))
    cache, out, i = llm.Cache(net.cfg, 120), [], 0
    for n in chunks:
        out.append(net.logits(net(ids[:, i : i + n], cache=cache)))
        i += n
    assert max_error(torch.cat(out, 1), whole) < 1e-5
    sizes = {kept.size for kept in cache.layers}
    assert sizes == ({120} if name == "llama" else {120, 16}), "a local layer keeps twice its window"


@pytest.mark.parametrize("chunks", [[24], [20, 1, 1, 1, 1], [9, 15]], ids=str)
def test_cached_is_uncached_with_padding(model, chunks):
    name, net = model
    tensors, _ = golden(f"{name}.forward")
    ids, mask = tensors["input_ids"], tensors["left_pad_mask"].bool()
    want = net.logits(net(ids, mask=mask))
    cache, out, i = llm.Cache(net.cfg, 24), [], 0
    for n in chunks:
        out.append(net.logits(net(ids[:, i : i + n], mask=mask[:, i : i + n], cache=cache)))
        i += n
    got = torch.cat(out, 1)
    assert torch.isfinite(got).all() and max_error(got[mask], want[mask]) < 1e-5
    alone = net.logits(net(ids[:1, mask[0].logical_not().sum() :]))
    assert max_error(want[:1][:, -alone.shape[1] :], alone) < 1e-5, "a row is what it is without its padding"


def test_a_wrong_mask_shows(model, monkeypatch):
    """The tests above can fail: with a window, or a causal mask, that is one off."""
    name, net = model
    tensors, _ = golden(f"{name}.forward")
    right = llm.attention

    def wrong(q, k, v, causal=False, window=0, **more):
        return right(q, k, v, causal=causal and name != "llama", window=window + bool(window), **more)

    monkeypatch.setattr(llm, "attention", wrong)
    assert max_error(net.logits(net(tensors["input_ids"])), tensors["logits"]) > 1e-3


def test_lora_golden():
    """PEFT's folder for a LLaMA: merged, and beside the weights."""
    tensors, _ = golden("llama.lora")
    net = weights.load(llm.CausalLM, TINY / "llama", torch.float32)
    found = lora.read(GOLDEN / "lora" / "llama-peft", {"llm": net})
    assert len(found.deltas) == 9
    beside = lora.attach({"llm": net}, found)
    assert max_error(net.logits(net(tensors["input_ids"])), tensors["logits"]) < 1e-5
    beside.remove()
    lora.fuse({"llm": net}, found)
    assert max_error(net.logits(net(tensors["input_ids"])), tensors["logits"]) < 1e-5
    assert max_error(net.model.layers[1].self_attn.v_proj.weight, tensors["merged_layers.1.v_proj"]) < 1e-6


def config(name, **more):
    return json.loads((TINY / name / "config.json").read_text()) | more


def test_configs_of_newer_files():
    """transformers 5 writes rope_parameters and layer_types."""
    raw = config("gemma3")
    raw.pop("sliding_window_pattern")
    types = ["full_attention" if (i + 1) % 3 == 0 else "sliding_attention" for i in range(7)]
    cfg = llm.Config.from_json(raw | {"layer_types": types})
    assert [cfg.window(i) for i in range(7)] == [0 if t == "full_attention" else 8 for t in types]
    raw = config("llama")
    raw["rope_parameters"] = raw.pop("rope_scaling") | {"rope_theta": raw.pop("rope_theta")}
    assert llm.Config.from_json(raw) == llm.Config.from_json(config("llama"))
    assert llm.Config.from_json(config("llama", eos_token_id=[5, 6])).eos_token_id == (5, 6)
    raw = config("gemma3")
    kinds = {"full_attention": raw.pop("rope_theta"), "sliding_attention": raw.pop("rope_local_base_freq")}
    raw["rope_parameters"] = {k: {"rope_theta": v, "rope_type": "default"} for k, v in kinds.items()}
    assert llm.Config.from_json(raw) == llm.Config.from_json(config("gemma3"))
    raw["rope_parameters"]["sliding_attention"]["rope_type"] = "yarn"
    with pytest.raises(UserError, match="sliding_attention are of no type that is supported"):
        llm.Config.from_json(raw)


def test_fields_that_say_nothing_of_the_network():
    """Of the copies that unsloth and transformers.js keep of gated models, and of trainings."""
    more = {"unsloth_fixed": True, "unsloth_version": "2025.1.5", "id2label": {"0": "LABEL_0"}, "label2id": {"LABEL_0": 0},
            "transformers.js_config": {"dtype": "q4"}, "initializer_range": 0.01}  # fmt: skip
    assert llm.Config.from_json(config("llama", **more)) == llm.Config.from_json(config("llama"))
    raw = config("llama")
    heads = raw["num_attention_heads"]
    assert llm.Config.from_json(raw | {"num_key_value_heads": None, "head_dim": None}).num_key_value_heads == heads


ABSENT = [  # what transformers 5.23's LlamaConfig and Gemma3TextConfig take where a file says nothing
    ("llama", "tie_word_embeddings", False),
    ("llama", "rms_norm_eps", 1e-6),
    ("llama", "num_key_value_heads", 4),
    ("llama", "head_dim", 12),
    ("gemma3", "tie_word_embeddings", True),
    ("gemma3", "rms_norm_eps", 1e-6),
    ("gemma3", "query_pre_attn_scalar", 256),
    ("gemma3", "head_dim", 256),
    ("gemma3", "rope_theta", 1e6),
    ("gemma3", "rope_local_base_freq", 1e4),
    ("gemma3", "sliding_window", 4096),
    ("gemma3", "sliding_window_pattern", 6),
]


@pytest.mark.parametrize(("name", "field", "value"), ABSENT)
def test_what_a_config_leaves_out(name, field, value):
    raw = config(name)
    raw.pop(field, None)
    assert getattr(llm.Config.from_json(raw), field) == value


BAD = {
    "another model": ("llama", {"model_type": "mistral"}, "model_type 'mistral' is not supported"),
    "a vision tower": ("gemma3", {"model_type": "gemma3", "text_config": {}}, "with a vision tower"),
    "another rope": ("llama", {"rope_scaling": {"rope_type": "yarn", "factor": 2}}, "type 'yarn' is not supported"),
    "soft caps": ("gemma3", {"final_logit_softcapping": 30.0}, "final_logit_softcapping = 30.0 is not supported"),
    "biases": ("llama", {"attention_bias": True}, "attention_bias = True is not supported"),
    "heads": ("llama", {"num_key_value_heads": 3}, "4 heads of 16 do not share 3 keys"),
    "no pattern": (
        "gemma3",
        {"layer_types": ["full_attention"] * 2 + ["sliding_attention"] * 5},
        "layer_types is no pattern",
    ),
    "half a rope": (
        "llama",
        {"rope_scaling": {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0}},
        "of type 'llama3' lacks factor and original_max_position_embeddings",
    ),
    "a field": ("llama", {"rope_thetas": 1.0}, "unknown field 'rope_thetas'"),
}


@pytest.mark.parametrize("case", BAD)
def test_configs_that_are_refused(case):
    name, more, words = BAD[case]
    with pytest.raises(UserError, match=words):
        llm.Config.from_json(config(name, **more))


def test_too_long_a_text(model):
    _, net = model
    cache = llm.Cache(net.cfg, 4)
    with pytest.raises(UserError, match="longer than the 4 tokens"):
        net(torch.ones(1, 5, dtype=torch.long), cache=cache)
    with pytest.raises(UserError, match="more than the 2048 that the model reads"):
        net(torch.ones(1, 2049, dtype=torch.long))


@pytest.mark.skipif(not STORIES.exists(), reason="the trained LLaMA is not in the clone")
def test_a_trained_model_tells_its_story():
    net = weights.load(llm.CausalLM, STORIES, torch.float32)
    for case in json.loads((STORIES / "goldens.json").read_text())["cases"]:
        out, cache = torch.tensor([case["prompt_ids"]]), llm.Cache(net.cfg, 512)
        x = out
        while out.shape[1] < len(case["output_ids"]):
            x = net.logits(net(x, cache=cache)[:, -1:]).argmax(-1)
            out = torch.cat([out, x], 1)
        assert out[0].tolist() == case["output_ids"]


@pytest.mark.parametrize("name", MODELS)
def test_saved_and_loaded(name, tmp_path):
    """config.json in the Hub's fields, from which the same model is built."""
    net = weights.load(llm.CausalLM, TINY / name, torch.float32)
    weights.save(net, tmp_path)
    again = weights.load(llm.CausalLM, tmp_path)
    assert again.cfg == net.cfg
    ids = torch.tensor([[1, 5, 9, 30]])
    assert max_error(again(ids), net(ids)) < 1e-6
    raw = json.loads((tmp_path / "config.json").read_text())
    assert raw["architectures"][0].endswith("ForCausalLM") and ("rope_scaling" in raw) == (
        net.cfg.rope_type == "llama3"
    )
