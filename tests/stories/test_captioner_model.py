"""The captioner: its prompt, its loss, what it tells; adapters written and read back."""

import copy
import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from PIL import Image
from util import TINY, golden, max_error, rms_ratio

from nanodiff import lora, weights
from nanodiff.config import UserError
from nanodiff.device import onednn
from nanodiff.stories import captioner_model
from nanodiff.text import textgen

SETTINGS = captioner_model.Settings(str(TINY / "vit"), str(TINY / "llama"))
NONE = captioner_model.Adapters(0, 1.0, 0.0, ())


def make(language="llama", dtype=torch.float32, **more):
    torch.manual_seed(0)
    settings = captioner_model.Settings(str(TINY / "vit"), str(TINY / language), **more)
    return captioner_model.base(settings, dtype, "cpu").eval()


def pictures(n, seed=0):
    rng = np.random.default_rng(seed)
    return [Image.fromarray(rng.integers(0, 255, (40 + 7 * i, 50, 3), dtype=np.uint8)) for i in range(n)]


def rows(net, texts):
    ids = [net.caption_ids(t) for t in texts]
    return torch.tensor([i + [captioner_model.NO_LABEL] * (max(map(len, ids)) - len(i)) for i in ids])


def test_a_picture_is_prepared_as_the_processor_does():
    tensors, _ = golden("vit.forward")
    how = captioner_model.Pictures.read(TINY / "vit", 32)
    found = how.normalised(how.batch([Image.fromarray(tensors["image"].numpy())]))
    assert max_error(found[0], tensors["pixel_values"][0]) < 1e-6
    other = captioner_model.Pictures(32, (0.4, 0.5, 0.6), (0.2, 0.3, 0.4))
    x = torch.rand(2, 3, 4, 4)
    want = (x - torch.tensor(other.mean).view(3, 1, 1)) / torch.tensor(other.std).view(3, 1, 1)
    torch.testing.assert_close(other.normalised(x * 2 - 1), want)


def test_the_prompt_in_order():
    """S3-27: beginning, "Image:", a token for the class and each patch, ".", "The description of the given image is: "."""
    net = make()
    pixels = net.pictures.batch(pictures(2))
    found = net.see(pixels)
    words = lambda text, begin=False: net.llm.embed(torch.tensor(net.tokenizer.ids(text, begin)))  # noqa: E731
    seen = net.projector(net.vit(net.pictures.normalised(pixels)))
    want = [words("Image:", True), seen[1], words("."), words("The description of the given image is: ")]
    torch.testing.assert_close(found[1], torch.cat(want), rtol=0, atol=0)
    assert seen.shape[1] == net.vit.cfg.tokens == 17 and len(net.prompt) == found.shape[1]
    assert net.prompt[0] == net.llm.cfg.bos_token_id and net.prompt.count(net.llm.cfg.bos_token_id) >= 1


def test_the_projector():
    """S3-27: three linear layers, dropout 0.1 between them while training, no activation: twice the picture, twice the tokens."""
    net = captioner_model.Projector(6, 5, 4, 0.1).eval()
    x, zero = torch.randn(3, 6), torch.zeros(3, 6)
    torch.testing.assert_close(net(2 * x) - net(zero), 2 * (net(x) - net(zero)))
    assert [tuple(p.shape) for p in net.parameters()] == [(5, 6), (5,), (5, 5), (5,), (4, 5), (4,)]
    assert not torch.equal(net.train()(x), net.eval()(x))


@pytest.mark.parametrize("language", ["llama", "gemma3"])
def test_the_loss_is_the_unfused_one(language):
    """Cross-entropy of the caption's tokens and the end alone, each caption as if it were alone."""
    net = make(language)
    texts = ["Fruit Salad", "Grilled Salmon with Lemon and Dill"]
    pixels, ids = net.pictures.batch(pictures(2)), rows(net, texts)
    want = 0.0
    for i, text in enumerate(texts):
        own = net.tokenizer.ids(text, begin=False) + [net.llm.cfg.eos_token_id[0]]
        prompt = net.see(pixels[i : i + 1])
        whole = torch.cat([prompt, net.llm.embed(torch.tensor([own]))], 1)
        logits = net.llm.logits(net.llm(embeds=whole))[0, prompt.shape[1] - 1 : -1]
        want += F.cross_entropy(logits, torch.tensor(own), reduction="sum")
    assert abs(net(pixels, ids) - want) < 1e-4 * want
    changed = ids.clone()
    changed[0, 0] = 7
    assert net(pixels, changed) != net(pixels, ids)


def test_gradients_reach_what_learns_alone():
    net = make()
    captioner_model.adapt(
        net,
        captioner_model.Adapters(4, 8.0, 0.0, captioner_model.LLM_TARGETS),
        captioner_model.Adapters(2, 2.0, 0.0, ("dense",)),
    )
    names = {
        k.rpartition(".lora_")[0].rpartition(".")[2]
        for k, p in net.named_parameters()
        if p.requires_grad and "lora_" in k
    }
    assert names == {*captioner_model.LLM_TARGETS, "dense"}
    net.train()(net.pictures.batch(pictures(1)), rows(net, ["Fruit Salad"])).backward()
    for name, p in net.named_parameters():
        assert (p.grad is not None) == ("lora_" in name or name.startswith("projector.")), name
    assert all(
        p.grad.abs().sum() > 0 for n, p in net.named_parameters() if n.startswith("projector.") or ".lora_B." in n
    )


def test_telling_changes_nothing_and_does_not_depend_on_the_batch():
    """S3-37: the source's `generate` changed its input."""
    net = make()
    some = pictures(3)
    pixels = net.pictures.batch(some)
    before, prompt = pixels.clone(), list(net.prompt)
    whole = net.describe(pixels, 12)
    assert torch.equal(pixels, before) and net.prompt == prompt
    assert whole == [net.describe([p], 12)[0] for p in some] == net.describe(some, 12)
    assert net.describe(some, 12, beams=1) == whole
    (row,) = textgen.generate(net.llm, [net.prompt], 12, eos=(), embeds=net.see(pixels[:1]))
    cut = next((i for i, t in enumerate(row.ids) if t in net.llm.cfg.eos_token_id), 12)
    assert whole[0] == net.tokenizer.decode(row.ids[:cut]).strip()


def test_beams_of_a_picture():
    net = make()
    pixels = net.pictures.batch(pictures(1))
    greedy = textgen.generate(net.llm, [net.prompt], 5, eos=net.llm.cfg.eos_token_id, embeds=net.see(pixels))[0]
    wide = textgen.generate(net.llm, [net.prompt], 5, eos=net.llm.cfg.eos_token_id, beams=4, embeds=net.see(pixels))[0]
    one = textgen.beam(net.llm, net.prompt, 5, 1, net.llm.cfg.eos_token_id, embeds=net.see(pixels))
    assert one.ids == greedy.ids
    assert wide.score / (len(wide.ids) + wide.ended) >= greedy.score / (len(greedy.ids) + greedy.ended) - 1e-5


def learned(net, steps=150):
    """Train on three pictures until it knows them."""
    texts = ["Fruit Salad", "Iced Tea", "Onion Soup"]
    pixels, ids = net.pictures.batch(pictures(3)), rows(net, texts)
    opt = torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], lr=5e-3)
    for _ in range(steps):
        opt.zero_grad()
        loss = net(pixels, ids) / (ids != captioner_model.NO_LABEL).sum()
        loss.backward()
        opt.step()
    return texts, loss.item()


def test_it_learns_captions_and_their_end():
    torch.manual_seed(0)
    net = captioner_model.fresh(
        "tiny", ["Fruit Salad", "Iced Tea", "Onion Soup"], captioner_model.Settings(dropout=0.0), 600
    )
    texts, loss = learned(net)
    assert loss < 0.05, loss
    assert net.eval().describe(pictures(3), 40) == [t.lower() for t in texts]
    ids = textgen.generate(
        net.llm, [net.prompt], 40, eos=net.llm.cfg.eos_token_id, embeds=net.see(net.pictures.batch(pictures(1)))
    )
    assert ids[0].ended, "the end token is learned"


def test_adapters_saved_and_loaded(tmp_path):
    """The same captions, to the last bit of the loss, and PEFT's form beside the bases' names."""
    net = make()
    captioner_model.adapt(
        net,
        captioner_model.Adapters(4, 32.0, 0.0, captioner_model.LLM_TARGETS),
        captioner_model.Adapters(2, 32.0, 0.0, ("dense",)),
    )
    learned(net, 8)
    net.eval()
    captioner_model.save(net, tmp_path / "one", net.state_dict(), False, {"epoch": 3})
    again = captioner_model.load(tmp_path / "one.pt", torch.float32, "cpu")
    pixels, ids = net.pictures.batch(pictures(3)), rows(net, ["Fruit Salad", "Iced Tea", "Onion Soup"])
    assert abs(again(pixels, ids) - net(pixels, ids)) < 1e-4
    assert again.describe(pictures(3), 20) == net.describe(pictures(3), 20) != make().describe(pictures(3), 20)
    config = json.loads((tmp_path / "one" / "llm_adapter" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 32.0) and config["base_model_name_or_path"] == str(TINY / "llama")
    assert {name.rpartition(".")[2] for name in config["target_modules"]} == set(captioner_model.LLM_TARGETS)
    tensors = weights.load_tensors(tmp_path / "one" / "llm_adapter" / "adapter_model.safetensors")
    assert "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight" in tensors
    assert json.loads((tmp_path / "one" / "captioner.json").read_text())["training"] == {"epoch": 3}
    assert again.settings.adapters == ["llm", "vit"]
    with (
        lora.without(net.llm),
        lora.without(net.vit),
    ):
        # S3-37: the source left alpha out on loading, and added its adapters twice
        plain = net(pixels, ids)
    twice = copy.deepcopy(net)
    for m in twice.modules():
        if hasattr(m, "lora_scale"):
            m.lora_scale = 1.0
    assert abs(plain - net(pixels, ids)) > 1e-2 and abs(twice(pixels, ids) - net(pixels, ids)) > 1e-3


def test_a_whole_captioner_saved_and_loaded(tmp_path):
    torch.manual_seed(0)
    net = captioner_model.fresh(
        "tiny", ["Fruit Salad", "Piñata", "Onion Soup"], captioner_model.Settings(dropout=0.0), 600
    )
    captioner_model.save(net, tmp_path / "one", net.state_dict(), True, {})
    captioner_model.save(net, tmp_path / "one", net.state_dict(), True, {"epoch": 2})  # over the older one
    again = captioner_model.load(tmp_path / "one", torch.float32, "cpu")
    pixels, ids = net.pictures.batch(pictures(2)), rows(net, ["Fruit Salad", "Piñata"])
    assert torch.equal(again(pixels, ids), net.eval()(pixels, ids))
    assert again.tokenizer.decode(again.caption_ids("piñata")).strip() == "piñata"
    assert {p.name for p in tmp_path.iterdir()} == {"one"}, "no leftovers"
    assert again.llm.cfg == net.llm.cfg


def test_mistakes(tmp_path):
    for more, said in (
        ({"vision_model": str(TINY / "llama")}, "is no ViT"),
        ({"language_model": str(TINY / "vit")}, "model_type 'vit' is not supported"),
        ({"vision_model": "somewhere/else"}, "somewhere/else"),
    ):
        with pytest.raises(UserError, match=said):
            captioner_model.base(
                captioner_model.Settings(
                    **{"vision_model": str(TINY / "vit"), "language_model": str(TINY / "llama")} | more
                ),
                torch.float32,
                "cpu",
            )
    net = make()
    with pytest.raises(UserError, match="a caption is empty"):
        net.caption_ids("  ")
    assert len(net.caption_ids("salad " * 3000)) == net.room, "what a model has no room for is cut"
    assert (
        net.caption_ids("salad " * 30, 7)[:6] == net.caption_ids("salad " * 30)[:6]
        and len(net.caption_ids("salad " * 30, 7)) == 7
    )
    net.llm.cfg.max_position_embeddings = 20
    with pytest.raises(UserError, match="a picture takes"):
        captioner_model.Captioner(net.vit, net.llm, net.tokenizer, net.pictures, net.settings)
    net = make()
    with pytest.raises(UserError, match="is not there"):
        captioner_model.load(tmp_path / "absent", torch.float32, "cpu")
    with pytest.raises(UserError, match="is no captioner's folder"):
        captioner_model.load(TINY / "llama", torch.float32, "cpu")
    captioner_model.adapt(net, captioner_model.Adapters(2, 2.0, 0.0, ("q_proj",)), NONE)
    captioner_model.save(net, tmp_path / "one", net.state_dict(), False, {})
    assert not (tmp_path / "one" / "vit_adapter").exists()
    shutil.copytree(tmp_path / "one", tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "llm_adapter")
    with pytest.raises(UserError, match="llm_adapter is missing"):
        captioner_model.load(tmp_path / "half", torch.float32, "cpu")
    record = tmp_path / "one" / "captioner.json"
    record.write_text(json.dumps(json.loads(record.read_text()) | {"colour": 3}))
    with pytest.raises(UserError, match="unknown key 'colour'"):
        captioner_model.load(tmp_path / "one", torch.float32, "cpu")
    (tmp_path / "pre").mkdir()
    for raw, said in (
        ({"size": 64}, "is not the model's 32x32"),
        ({"resample": 0}, "resample = 0"),
        ({"image_std": [1, 1, 0]}, "no std 0"),
        ({"image_mean": "grey"}, "must be three numbers"),
    ):
        (tmp_path / "pre" / "preprocessor_config.json").write_text(json.dumps(raw))
        with pytest.raises(UserError, match=said):
            captioner_model.Pictures.read(tmp_path / "pre", 32)


def test_a_kill_between_two_renames_loses_nothing(tmp_path):
    torch.manual_seed(0)
    net = captioner_model.fresh("tiny", ["Fruit Salad", "Onion Soup"], captioner_model.Settings(), 600)
    captioner_model.save(net, tmp_path / "one", net.state_dict(), True, {"epoch": 1})
    (tmp_path / "one").rename(tmp_path / ".one.old")
    assert captioner_model.load(tmp_path / "one.pt", torch.float32, "cpu").llm.cfg == net.llm.cfg
    assert (tmp_path / "one").is_dir()


def test_half_precision_stays_wide_when_loaded(tmp_path, monkeypatch):
    """Reading adapters undoes what layers were; a loaded captioner computes as the trained one did."""
    monkeypatch.setattr(onednn, "computes_bf16", lambda: False)
    net = make(dtype=torch.bfloat16)
    wide = sum(isinstance(m, onednn.WideLinear) for m in net.modules())
    captioner_model.adapt(
        net, captioner_model.Adapters(2, 2.0, 0.0, ("q_proj",)), captioner_model.Adapters(2, 2.0, 0.0, ("dense",))
    )
    captioner_model.save(net, tmp_path / "one", net.state_dict(), False, {})
    again = captioner_model.load(tmp_path / "one", torch.bfloat16, "cpu")
    assert sum(isinstance(m, onednn.WideLinear) for m in again.modules()) == wide > 20


@pytest.mark.parametrize("hardware", [False, True])
def test_a_step_in_bf16(monkeypatch, hardware):
    """Frozen bf16 models beneath fp32 adapters under autocast: the loss and the gradients of the fp32 ones, roughly."""
    monkeypatch.setattr(onednn, "computes_bf16", lambda: hardware)
    found = []
    for dtype in (torch.float32, torch.bfloat16):
        net = make(dtype=dtype)
        torch.manual_seed(1)
        captioner_model.adapt(
            net,
            captioner_model.Adapters(4, 8.0, 0.0, captioner_model.LLM_TARGETS),
            captioner_model.Adapters(2, 2.0, 0.0, ("dense",)),
        )
        with torch.autocast("cpu", torch.bfloat16, enabled=dtype != torch.float32):
            loss = net(net.pictures.batch(pictures(2)), rows(net, ["Fruit Salad", "Onion Soup"]))
        loss.backward()
        grads = torch.cat([p.grad.flatten() for p in net.parameters() if p.grad is not None])
        assert all(p.dtype == torch.float32 for p in net.parameters() if p.requires_grad)
        found.append((loss.item(), grads))
    assert found[0][0] == pytest.approx(found[1][0], rel=2e-2) and rms_ratio(found[1][1], found[0][1]) < 0.15
