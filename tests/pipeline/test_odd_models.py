"""Models, LoRAs and arguments that are not as they should be: what other programs would do, or one line that names it."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from util import TINY

import nanodiff
from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.diffusion import schedule
from nanodiff.models.ipadapter import Config as AdapterConfig
from nanodiff.models.unet import UNet2DConditionModel
from nanodiff.pipeline import Perturbed
from nanodiff.weights.__main__ import convert

LAYER = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"


@pytest.fixture(scope="module")
def sd():
    return pipeline.load(TINY / "sd15")


def changed(tmp_path, model, file, **fields):
    """A copy of a tiny model with fields of a JSON file changed; None takes a field away."""
    folder = tmp_path / model
    shutil.copytree(TINY / model, folder)
    path = folder / file
    raw = json.loads(path.read_text()) | fields
    path.write_text(json.dumps({k: v for k, v in raw.items() if v != "gone"}))
    return folder


# -- what generate() and load() are given --------------------------------------------------------------------

SMALL = {"steps": 1, "height": 16, "width": 16}
PICTURE = torch.zeros(1, 3, 16, 16)


@pytest.mark.parametrize(
    ("prompts", "options", "line"),
    [
        ([], {}, "`prompts`"),
        (None, {}, "`prompts`"),
        (["a", None], {}, "`prompts`"),
        ("a", {"seeds": 5}, "`seeds`"),
        ("a", {"seeds": [1.5]}, "`seeds`"),
        ("a", {"seeds": [2**64]}, "`seeds`"),
        ("a", {"guidance_rescale": None}, "`guidance_rescale` None: expected a number"),
        ("a", {"seeds": [0], "generators": [torch.Generator()]}, "`seeds` and `generators`"),
        ("a", {"steps": "2"}, "`steps` '2': expected a whole number"),
        ("a", {"steps": 1.5}, "`steps` 1.5: expected a whole number"),
        ("a", {"height": 16.0}, "`height`"),
        ("a", {"guidance_scale": float("nan")}, "`guidance_scale` nan: expected a number"),
        ("a", {"guidance_scale": "7"}, "`guidance_scale` '7': expected a number"),
        ("a", {"guidance_rescale": 5}, "`guidance_rescale` 5 must be between 0 and 1"),
        ("a", {"strength": 0.1}, "`strength` is how much of `image`"),
        ("a", {"image": torch.rand(1, 3, 8, 8)}, "`image` of .*the size that is drawn"),
        ("a", {"image": PICTURE + 200}, "`image`: values from 200 to 200"),
        ("a", {"image": PICTURE.byte()}, "`image`: expected a tensor of floats"),
        ("a", {"image": Image.new("RGB", (16, 16))}, "`image`: expected a tensor of floats"),
        ("a", {"image": PICTURE, "mask": torch.ones(1, 1, 8, 8)}, "`mask` of .*the size that is drawn"),
        ("a", {"image": PICTURE, "mask": torch.ones(16, 16)}, "`mask` of"),
        ("a", {"image": PICTURE, "mask": torch.full((1, 1, 16, 16), 255.0)}, "`mask`: values from 255"),
        ("a", {"image": PICTURE, "mask": -torch.ones(1, 1, 16, 16)}, "`mask`: values from -1"),
        ("a", {"syntax": "comfyui"}, "`syntax`"),
        ("a", {"weighted": "bogus"}, "`weighted`"),
        ("a", {"freeu": (1, 1, 1, 1)}, "`freeu`.*expected a FreeU"),
        ("a", {"perturbed": 3.0}, "`perturbed` 3.0: expected a Perturbed"),
        ("a", {"sampler": "ddim"}, "`sampler` 'ddim': expected a function"),
    ],
)
def test_arguments_that_make_no_sense(sd, prompts, options, line):
    with pytest.raises(UserError, match=line):
        sd.generate(prompts, **SMALL | options)


def test_arguments_that_do(sd):
    same = [
        sd.generate("a", **SMALL | {"seeds": seeds, "steps": steps}).pixels
        for seeds, steps in (([3], 2), (np.array([3]), np.int64(2)))
    ]
    assert torch.equal(*same)
    drawn = sd.generate("a", **SMALL, seeds=[1]).pixels * 1.5  # a decoder's pictures leave [-1, 1] a little
    sd.generate("a", **SMALL, image=drawn, strength=1.0, churn=None, weighted=None, guidance_scale=torch.tensor(7.5))
    sd.generate(
        np.array(["a", "b"]), **SMALL, image=PICTURE, strength=1.0, mask=torch.ones(2, 1, 16, 16, dtype=torch.bool)
    )
    sd.generate("a", **SMALL, strength=1.0)
    sd.generate("a", **SMALL, image=PICTURE, strength=1.0, mask=torch.ones(1, 1, 16, 16), perturbed=Perturbed())


@pytest.mark.parametrize(
    ("options", "line"),
    [({"dtype": "float16"}, "`dtype` 'float16'"), ({"dtype": torch.int8}, "`dtype` torch.int8"), ({"device": "gpu"}, "`device` 'gpu'")],
)  # fmt: skip
def test_load_says_what_it_takes(options, line):
    with pytest.raises(UserError, match=line):
        nanodiff.load(TINY / "sd15", **options)


def test_a_prompt_for_a_text_encoder_that_was_left_out():
    sd = pipeline.load(TINY / "sd35-medium", no_t5=True)
    with pytest.raises(UserError, match="`prompt_3`: this model has no text encoder 3"):
        sd.generate("a", prompt_3="zebra", steps=1)


# -- models --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("model", "file", "fields", "line"),
    [
        ("sd15", "unet/config.json", {"attention_head_dim": 5}, "channels cannot be divided among 5 heads"),
        ("sd15", "unet/config.json", {"num_attention_heads": 1}, "attention_head_dim .* and num_attention_heads 1 disagree"),
        ("sd15", "unet/config.json", {"attention_head_dim": 2.5}, "attention_head_dim = 2.5 has the wrong type"),
        ("sd15", "unet/config.json", {"block_out_channels": 5}, "block_out_channels = 5 has the wrong type"),
        ("sd15", "text_encoder/config.json", {"num_attention_heads": 5}, "cannot be divided among 5 heads"),
        ("sd35-medium", "text_encoder_3/config.json", {"relative_attention_max_distance": 0}, "relative_attention_max_distance 0"),
        ("sd35-medium", "text_encoder_3/config.json", {"relative_attention_max_distance": 1}, "relative_attention_max_distance 1"),
        ("sd35-medium", "text_encoder_3/config.json", {"relative_attention_max_distance": 8}, "relative_attention_max_distance 8"),
        ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": "yes"}, "force_zeros_for_empty_prompt = 'yes' has the wrong type"),
        ("sdxl", "model_index.json", {"force_zeros_for_empty_prompt": 0}, "force_zeros_for_empty_prompt = 0 has the wrong type"),
    ],
)  # fmt: skip
def test_fields_that_fit_no_network(tmp_path, model, file, fields, line):
    with pytest.raises(UserError, match=line):
        pipeline.load(changed(tmp_path, model, file, **fields))


def test_null_is_false_as_elsewhere(tmp_path):
    drawn = {}
    for value in (None, False, True):
        folder = changed(tmp_path / str(value), "sdxl", "model_index.json", force_zeros_for_empty_prompt=value)
        drawn[value] = pipeline.load(folder).generate("a", seeds=[0], steps=1).latents
    assert torch.equal(drawn[None], drawn[False]) and not torch.equal(drawn[True], drawn[False])


@pytest.mark.parametrize("said", [["CLIPTextModel"], "gone"])
def test_the_index_says_which_class_a_text_encoder_is(tmp_path, said):
    """As in diffusers: config.json's `architectures` is bookkeeping."""
    folder = changed(tmp_path, "sdxl", "text_encoder_2/config.json", architectures=said)
    want = pipeline.load(TINY / "sdxl").generate("a", seeds=[0], steps=1).latents
    assert torch.equal(pipeline.load(folder).generate("a", seeds=[0], steps=1).latents, want)


def test_offsets_beyond_the_last_timestep(tmp_path):
    folder = changed(tmp_path, "sd15", "scheduler/scheduler_config.json", steps_offset=600)
    with pytest.raises(UserError, match="steps_offset 600: leads to timestep 1100 with 2 steps, the model knows 1000"):
        pipeline.load(folder, scheduler="ddim").generate("a", **SMALL | {"steps": 2})
    assert schedule.leading(schedule.np.arange(1000)[::-1], 1, 1000).max() == 999  # the document's 1,000 steps


def test_a_flow_without_a_line_for_its_shift(tmp_path):
    fields = {"use_dynamic_shifting": True, "base_image_seq_len": 4096, "max_image_seq_len": 4096}
    folder = changed(tmp_path, "sd35-medium", "scheduler/scheduler_config.json", **fields)
    with pytest.raises(UserError, match="base_image_seq_len and max_image_seq_len are both 4096"):
        pipeline.load(folder).generate("a", steps=1)


def test_head_counts_as_files_have_them(tmp_path):
    """The same in both fields; and no heads where a level has no attention."""
    raw = json.loads((TINY / "sd15" / "unet" / "config.json").read_text())
    levels, heads = len(raw["block_out_channels"]), raw["attention_head_dim"]
    same = raw | {"num_attention_heads": [heads] * levels if isinstance(heads, int) else heads}
    assert UNet2DConditionModel.Config.from_json(same).num_heads == UNet2DConditionModel.Config.from_json(raw).num_heads
    plain = {
        "down_block_types": ["DownBlock2D"] + ["CrossAttnDownBlock2D"] * (levels - 1),
        "attention_head_dim": [5] + [2] * (levels - 1),
    }
    assert UNet2DConditionModel.Config.from_json(raw | plain).num_heads[0] == 5


@pytest.mark.parametrize("kept", [0, 100])
def test_merges_that_are_cut(tmp_path, kept):
    folder = tmp_path / "m"
    shutil.copytree(TINY / "sd15", folder)
    path = folder / "tokenizer" / "merges.txt"
    path.write_text("".join(line + "\n" for line in path.read_text().split("\n")[:kept]))
    with pytest.raises(UserError, match=r"vocab.json and merges.txt do not belong together: no merge makes"):
        pipeline.load(folder)


def test_shards_come_before_a_single_file(tmp_path, capsys):
    folder = tmp_path / "unet"
    shutil.copytree(TINY / "sd15" / "unet", folder)
    single = next(folder.glob("*.safetensors"))
    tensors = weights.load_tensors(single)
    names = sorted(tensors)
    for part, some in (("a", names[::2]), ("b", names[1::2])):
        weights.save_tensors(folder / f"{part}.safetensors", {n: tensors[n] for n in some})
    where = {n: f"{'ab'[i % 2]}.safetensors" for i, n in enumerate(names)}
    (folder / f"{single.name}.index.json").write_text(json.dumps({"weight_map": where}))
    weights.save_tensors(single, {n: t * 0.5 for n, t in tensors.items()})
    assert {p.name for p in weights.find_files(folder)} == {"a.safetensors", "b.safetensors"}
    assert f"{single.name} is not used" in capsys.readouterr().err
    for path in (
        single,
        folder / f"{single.name}.index.json",
    ):
        # the names of transformers' files, which looks the other way round
        path.rename(folder / path.name.replace("diffusion_pytorch_model", "model"))
    assert [p.name for p in weights.find_files(folder)] == ["model.safetensors"]


def test_a_pickle_is_written_whole_or_not(tmp_path):
    torch.save(
        {"unet": {"w": torch.ones(2)}, "logit_scale": torch.ones(1), "parts": [torch.zeros(3)]}, tmp_path / "p.pt"
    )
    convert(tmp_path / "p.pt", tmp_path / "p.safetensors", allow_pickle=True)
    assert sorted(weights.load_tensors(tmp_path / "p.safetensors")) == ["logit_scale", "parts.0", "unet.w"]
    for value, line in ((torch.ones(2), "a tensor without a name"), ({"string_to_param": {"*": torch.ones(1, 4)}}, "a learned word"),
                        ({"model": {"w": torch.ones(1)}, "optimizer": {"state": {0: torch.ones(1)}}}, "an optimizer's state")):  # fmt: skip
        torch.save(value, tmp_path / "r.pt")
        with pytest.raises(UserError, match=line):
            convert(tmp_path / "r.pt", tmp_path / "r.safetensors", allow_pickle=True)
    torch.save({"a": {"b": torch.ones(2)}, "a.b": torch.ones(1)}, tmp_path / "q.pt")
    with pytest.raises(UserError, match="two of its tensors would have one name"):
        convert(tmp_path / "q.pt", tmp_path / "q.safetensors", allow_pickle=True)
    with pytest.raises(UserError, match=r"s\.ckpt: what is written is safetensors"):
        convert(TINY / "sd15", tmp_path / "s.ckpt")


# -- LoRAs and learned words ---------------------------------------------------------------------------------


@pytest.mark.parametrize("scale", ["nan", "inf", "-inf"])
def test_scales_are_numbers(scale):
    with pytest.raises(UserError, match=f"'{scale}' is no scale"):
        lora.parse(f"style.safetensors:{scale}")


def test_weights_that_overflow_are_not_merged(tmp_path):
    half = pipeline.load(TINY / "sd15", torch.float16)
    parts = {f"{LAYER}.lora_A.weight": torch.ones(1, 16) * 300, f"{LAYER}.lora_B.weight": torch.ones(16, 1) * 300}
    weights.save_tensors(tmp_path / "big.safetensors", parts)
    parts |= {k.replace("to_q", "to_k"): v / 300 for k, v in parts.items()}
    weights.save_tensors(tmp_path / "big.safetensors", parts)
    before = {k: v.clone() for k, v in half.net.state_dict().items()}
    with pytest.raises(UserError, match=r"to_q is not finite in float16 with it; is the scale 1 meant\?"):
        lora.fuse(half.models(), lora.read(tmp_path / "big.safetensors", half.models()))
    assert all(torch.equal(v, before[k]) for k, v in half.net.state_dict().items())  # none of its layers


def test_the_first_pattern_that_fits_counts(sd, tmp_path):
    """As in PEFT's get_pattern_key."""
    parts = {f"{LAYER}.lora_A.weight": torch.ones(4, 16), f"{LAYER}.lora_B.weight": torch.ones(16, 4)}
    for patterns, want in (({"to_q": 1, "attn1.to_q": 50}, 1 / 4), ({"attn1.to_q": 50, "to_q": 1}, 50 / 4)):
        about = {"lora_adapter_metadata": json.dumps({"unet.lora_alpha": 8, "unet.alpha_pattern": patterns})}
        weights.save_tensors(tmp_path / "a.safetensors", parts, about)
        assert lora.read(tmp_path / "a.safetensors", sd.models()).deltas[0].scale == want


def test_a_lora_is_no_adapter():
    with pytest.raises(UserError, match="x: is a LoRA, no IP-Adapter"):
        AdapterConfig.from_shapes({"lora_unet_down.lora_down.weight": (4, 16)}, "x")


@pytest.mark.parametrize(
    ("name", "vectors", "line"), [("<w>", torch.ones(0, 32), "has no vectors"), (" ", torch.ones(1, 32), "has no name")]
)
def test_words_need_a_name_and_vectors(sd, name, vectors, line):
    with pytest.raises(UserError, match=line):
        sd.learn_word(name, {"": vectors}, "w.safetensors")
