"""Files as people have them, after public reports: each gives the picture that the reference gives, or is refused by name.

The recordings (golden/cases) are of diffusers 0.42.1 and transformers 5.23 with the same seed; pictures agree to one level.
"""

import json
import os
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from util import GOLDEN, TINY, copy_model, error_line, run

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.output import images
from nanodiff.text import tokenizer as tokenizers

CASES = GOLDEN / "cases"


def drawn(model, prompt, steps=4, seed=3, **settings):
    return pipeline.load(model).generate(prompt, seeds=[seed], steps=steps, guidance_scale=7.5, **settings).to_pil()[0]


def assert_same(picture, recorded):
    difference = np.abs(np.asarray(picture, int) - np.asarray(Image.open(recorded).convert("RGB"), int)).max()
    assert difference <= 1, difference


def with_case(case, target):
    model = copy_model("sd15", target)
    shutil.copytree(CASES / case, model, dirs_exist_ok=True)
    return model


def set_json(path, **fields):
    path.write_text(json.dumps(json.loads(path.read_text()) | fields))


# -- learned words -----------------------------------------------------------------------------------------


def test_a_word_in_added_tokens_json(tmp_path):
    assert_same(
        drawn(with_case("learned-word", tmp_path / "m"), "a <cat-toy> apple"), CASES / "learned-word" / "reference.png"
    )


def test_a_word_of_two_vectors_in_tokenizer_json(tmp_path):
    model = with_case("multi-vector-word", tmp_path / "m")
    assert_same(drawn(model, "a <two> apple"), CASES / "multi-vector-word" / "reference.png")
    assert pipeline.load(model).tokenizer.pieces("<two>") == [1000, 1001]


@pytest.mark.parametrize("where", ["added_tokens_decoder", "tokenizer.json alone"])
def test_the_other_places_where_words_are_kept(tmp_path, where):
    model = with_case("learned-word", tmp_path / "m")
    (model / "tokenizer" / "added_tokens.json").unlink()
    if where == "added_tokens_decoder":
        set_json(
            model / "tokenizer" / "tokenizer_config.json",
            added_tokens_decoder={"1000": {"content": "<cat-toy>"}, "999": {"content": "<|endoftext|>"}},
        )
    else:
        words = json.loads((CASES / "multi-vector-word" / "tokenizer" / "tokenizer.json").read_text())
        words["added_tokens"] = [t | {"content": "<cat-toy>"} for t in words["added_tokens"] if t["id"] == 1000]
        (model / "tokenizer" / "tokenizer.json").write_text(json.dumps(words))
        for name in ("vocab.json", "merges.txt"):
            (model / "tokenizer" / name).unlink()
    assert_same(drawn(model, "A <Cat-Toy> apple".lower()), CASES / "learned-word" / "reference.png")
    assert pipeline.load(model).tokenizer.pieces("<Cat-Toy>") == [1000]


def test_saved_words_are_kept(tmp_path):
    """By save() and by `lora merge`; a word that is learned from a file is saved under the names of its vectors."""
    model = with_case("learned-word", tmp_path / "m")
    lora.merge(model, [f"{GOLDEN}/lora/sd15.kohya.safetensors:1e-9"], tmp_path / "merged")
    assert_same(drawn(tmp_path / "merged", "a <cat-toy> apple"), CASES / "learned-word" / "reference.png")
    sd = pipeline.load(TINY / "sd15")
    g = torch.Generator().manual_seed(0)
    save_file({"<three>": torch.randn(3, 32, generator=g)}, tmp_path / "three.safetensors")
    sd.learn(tmp_path / "three.safetensors")
    sd.save(tmp_path / "learned")
    again = pipeline.load(tmp_path / "learned")
    assert (
        again.tokenizer.pieces("a <three> b") == sd.tokenizer.pieces("a <three> b") and len(again.tokenizer.words) == 3
    )
    assert again.tokenizer.pieces("<three>_1") == [1001]
    assert torch.equal(again.encode(["a <three>"]).states, sd.encode(["a <three>"]).states)
    with pytest.raises(UserError, match="already has this word"):
        again.learn(tmp_path / "three.safetensors")


@pytest.mark.parametrize(
    ("words", "says"),
    [
        ({"<a>": 1000, "<b>": 1000}, "the added tokens <a>, <b> have one id, 1000"),
        ({"<a>": 5}, "<a> has id 5, which the vocabulary contradicts"),
        ({"<a>": "x"}, "added token '<a>' has the id 'x'"),
        ({"<a>": -1}, "has the id -1"),
        ({"<a>": 1 << 40}, "has the id"),
        ({"": 1000}, "added token"),
        ({"<a>": 1001}, "they are not of one model"),
    ],
)
def test_words_that_cannot_be(tmp_path, words, says):
    model = with_case("learned-word", tmp_path / "m")
    (model / "tokenizer" / "added_tokens.json").write_text(json.dumps(words))
    with pytest.raises(UserError, match=says):
        pipeline.load(model)


@pytest.mark.parametrize("length", [None, 1e30, 1000000000000000019884624838656])
def test_no_limit_of_tokens_is_the_text_encoders(tmp_path, length):
    shutil.copytree(TINY / "sd15" / "tokenizer", tmp_path / "t")
    set_json(tmp_path / "t" / "tokenizer_config.json", model_max_length=length)
    assert tokenizers.CLIPTokenizer.load(tmp_path / "t", 40).length == 40


# -- schedulers ----------------------------------------------------------------------------------------------


def test_model_index_names_the_schedulers_class(tmp_path, capsys):
    model = with_case("scheduler-class", tmp_path / "m")
    assert_same(drawn(model, "a red apple"), CASES / "scheduler-class" / "reference_ddim.png")
    assert (
        "model_index.json names DDIMScheduler, which is taken; scheduler_config.json is of 'PNDMScheduler'"
        in capsys.readouterr().err
    )


def test_a_class_that_we_lack_is_no_hindrance_to_another(tmp_path):
    model = copy_model("sd15", tmp_path / "m")
    want = pipeline.load(TINY / "sd15", scheduler="ddim")
    (model / "scheduler" / "scheduler_config.json").write_text((CASES / "unipc_exchanged_for_ddim.json").read_text())
    index = json.loads((model / "model_index.json").read_text())
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "DDIMScheduler"]}))
    got = pipeline.load(model)
    assert (
        torch.equal(got.schedule.alphas_cumprod, want.schedule.alphas_cumprod) and got.schedule.prediction == "epsilon"
    )
    (model / "model_index.json").write_text(json.dumps(index | {"scheduler": ["diffusers", "IPNDMScheduler"]}))
    with pytest.raises(UserError, match=r"'IPNDMScheduler' is not supported.*`scheduler` names another"):
        pipeline.load(model)
    for name in ("ddim", "dpmpp_2m", "dpmpp_2m_karras", "euler"):
        assert torch.equal(pipeline.load(model, scheduler=name).schedule.alphas_cumprod, want.schedule.alphas_cumprod)
    with pytest.raises(UserError, match=r"not of|another space|not a flow"):
        pipeline.load(model, scheduler="flow_euler")


def test_a_samplers_own_fields_do_not_stay():
    karras = pipeline.load(TINY / "sd15", scheduler="dpmpp_2m_karras")
    assert (
        karras.schedule.cfg["use_karras_sigmas"]
        and karras.with_scheduler(None, timestep_spacing="trailing").schedule.cfg["use_karras_sigmas"]
    )
    assert not karras.with_scheduler("euler").schedule.cfg["use_karras_sigmas"]


# -- configs -------------------------------------------------------------------------------------------------

EMA = {
    "decay": 0.9999,
    "inv_gamma": 1.0,
    "min_decay": 0.0,
    "optimization_step": 15000,
    "power": 0.6667,
    "update_after_step": 0,
    "use_ema_warmup": False,
}


def test_fields_that_change_nothing(tmp_path):
    model = copy_model("sd15", tmp_path / "m")
    set_json(model / "unet" / "config.json", **EMA)
    scheduler = model / "scheduler" / "scheduler_config.json"
    set_json(scheduler, tensor_format="pt", predict_epsilon=True)
    assert np.array_equal(drawn(model, "apple", 1), drawn(TINY / "sd15", "apple", 1))
    set_json(scheduler, predict_epsilon=False)
    with pytest.raises(UserError, match="predict_epsilon = False is not supported"):
        pipeline.load(model)


WRONG = [
    ("model_index.json", "_class_name", ["StableDiffusionPipeline"]),
    ("model_index.json", "scheduler", "DDIMScheduler"),
    ("model_index.json", "scheduler", [1, 2]),
    ("model_index.json", "unet", [["x"], "y"]),
    ("scheduler/scheduler_config.json", "_class_name", ["PNDMScheduler"]),
    ("scheduler/scheduler_config.json", "beta_start", "0.00085"),
    ("scheduler/scheduler_config.json", "beta_start", -0.1),
    ("scheduler/scheduler_config.json", "beta_start", 0.5),  # larger than beta_end
    ("scheduler/scheduler_config.json", "beta_end", 1.5),
    ("scheduler/scheduler_config.json", "trained_betas", "linear"),
    ("scheduler/scheduler_config.json", "trained_betas", [0.1, "x"]),
    ("scheduler/scheduler_config.json", "trained_betas", [0.1]),
    ("scheduler/scheduler_config.json", "num_train_timesteps", True),
    ("scheduler/scheduler_config.json", "num_train_timesteps", 1e3),
    ("scheduler/scheduler_config.json", "steps_offset", "1"),
    ("scheduler/scheduler_config.json", "prediction_type", ["epsilon"]),
    ("scheduler/scheduler_config.json", "skip_prk_steps", 1),
    ("text_encoder/config.json", "architectures", 5),
    ("text_encoder/config.json", "hidden_act", ["gelu"]),
    ("text_encoder/config.json", "num_attention_heads", 0),
    ("unet/config.json", "norm_num_groups", 0),
    ("unet/config.json", "norm_num_groups", 5),
    ("unet/config.json", "act_fn", ["silu"]),
    ("unet/config.json", "attention_head_dim", 0),
    ("unet/config.json", "norm_eps", "1e-5"),
    ("unet/config.json", "block_out_channels", []),
    ("unet/config.json", "block_out_channels", [0, 0, 0, 0]),
    ("unet/config.json", "decay", "x"),
    ("unet/config.json", "x" * 5000, "y" * 80_000),
    ("vae/config.json", "norm_num_groups", 0),
    ("vae/config.json", "scaling_factor", 0),
    ("vae/config.json", "scaling_factor", float("nan")),
    ("vae/config.json", "block_out_channels", [7]),
    ("vae/config.json", "latent_channels", 0),
    ("tokenizer/tokenizer_config.json", "model_max_length", "77"),
    ("tokenizer/tokenizer_config.json", "model_max_length", 1),
    ("tokenizer/special_tokens_map.json", "pad_token", ["!"]),
    ("tokenizer/special_tokens_map.json", "pad_token", {"content": 5}),
]


@pytest.mark.parametrize(("file", "field", "value"), WRONG, ids=[f"{f}-{k[:20]}-{str(v)[:20]}" for f, k, v in WRONG])
def test_values_of_the_wrong_kind_are_one_line(tmp_path, file, field, value):
    model = copy_model("sd15", tmp_path / "m")
    set_json(model / file, **{field: value})
    with pytest.raises(UserError) as e:
        pipeline.load(model)
    assert "\n" not in str(e.value) and len(str(e.value)) < 700


# -- weights -------------------------------------------------------------------------------------------------


def test_only_fp16_files_are_taken_with_a_line(tmp_path, capsys):
    model = copy_model("sd15", tmp_path / "m")
    for path in model.rglob("*.safetensors"):
        path.rename(path.with_name(f"{path.stem}.fp16.safetensors"))
    assert np.array_equal(drawn(model, "apple", 1), drawn(TINY / "sd15", "apple", 1))
    assert capsys.readouterr().err.count("only fp16 files, taking these") == 3
    shutil.copy(
        next((model / "unet").glob("*.safetensors")), model / "unet" / "diffusion_pytorch_model.bf16.safetensors"
    )
    with pytest.raises(UserError, match="only the variants bf16, fp16; choose one"):
        pipeline.load(model)
    assert pipeline.load(model, variant="bf16")


@pytest.mark.parametrize("kind", [torch.int32, torch.int8, torch.uint8, torch.bool])
def test_whole_numbers_are_no_weights(tmp_path, kind):
    model = copy_model("sd15", tmp_path / "m")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    state = load_file(path)
    weights.save_tensors(path, state | {"conv_in.bias": state["conv_in.bias"].to(kind)})
    with pytest.raises(UserError, match=r"conv_in\.bias is stored as \w+, which cannot be weights"):
        pipeline.load(model)


def test_float8_weights_are_read(tmp_path):
    model = copy_model("sd15", tmp_path / "m")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    small = {k: v.to(torch.float8_e4m3fn) for k, v in load_file(path).items()}
    weights.save_tensors(path, small)
    for dtype in (None, torch.float32):
        got = pipeline.load(model, dtype).net.state_dict()
        assert all(v.dtype == torch.float32 and torch.equal(v, small[k].float()) for k, v in got.items())


def test_a_pipe_and_a_link_out_of_the_model(tmp_path):
    model = copy_model("sd15", tmp_path / "m")
    path = model / "unet" / "diffusion_pytorch_model.safetensors"
    shard = "diffusion_pytorch_model-00001-of-00001.safetensors"
    keys = list(load_file(path))
    shutil.move(path, tmp_path / "elsewhere.safetensors")
    (model / "unet" / shard).symlink_to(tmp_path / "elsewhere.safetensors")
    index = model / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(keys, shard)}))
    with pytest.raises(UserError, match="is a link out of the model's folder"):
        pipeline.load(model)
    for value in (["x"], {"a": 1}, "x" * 5000 + ".safetensors", 5):
        index.write_text(json.dumps({"weight_map": {keys[0]: value}}))
        with pytest.raises(UserError, match="is not a plain file name"):
            pipeline.load(model)
    index.unlink()
    os.mkfifo(path)
    with pytest.raises(UserError, match="is a pipe or a device"):
        pipeline.load(model)


# -- LoRA ----------------------------------------------------------------------------------------------------


def test_lora_of_other_types():
    models = pipeline.load(TINY / "sd15").models()
    with pytest.raises(UserError, match=r"int8\.safetensors: \S+lora_down\.weight is stored as int8"):
        lora.read(CASES / "lora" / "int8.safetensors", models)
    found = lora.read(CASES / "lora" / "fp8.safetensors", models)
    stored = load_file(CASES / "lora" / "fp8.safetensors")
    assert {d.down.dtype for d in found.deltas} == {torch.float32} and len(found.deltas) == sum(
        "lora_down" in k for k in stored
    )


def test_words_that_come_with_a_lora(tmp_path):
    """They are learned where a picture is drawn and merged; where they would be lost, they are refused by their name."""
    bundle, model = CASES / "lora" / "bundle.safetensors", str(TINY / "sd15")
    done = run(
        "sample.py",
        "--model",
        model,
        "--prompt",
        "mychar",
        "--steps",
        1,
        "--lora",
        bundle,
        "--output-dir",
        tmp_path / "o",
    )
    assert done.returncode == 0 and "learned word: mychar" in done.stdout
    lora.merge(model, [str(bundle)], tmp_path / "merged")
    vectors = load_file(bundle)["bundle_emb.mychar.clip_l"]
    merged = pipeline.load(tmp_path / "merged")
    assert merged.tokenizer.pieces("mychar") == [1000, 1001]
    assert torch.equal(
        merged.text_encoder.text_model.embeddings.token_embedding.weight[1000:],
        vectors.to(merged.text_encoder.text_model.embeddings.token_embedding.weight.dtype),
    )
    line = error_line(
        run("-m", "nanodiff.lora", "convert", bundle, tmp_path / "k.safetensors", "--to", "peft", "--model", model)
    )
    assert "carries the learned words mychar" in line
    shown = run("-m", "nanodiff.lora", "inspect", bundle, "--model", model).stdout
    assert "learned word: mychar, clip_l [2, 32]" in shown


# -- pictures and prompts --------------------------------------------------------------------------------------


@pytest.mark.parametrize("mask", ["mask_L", "mask_rgba"])
def test_what_is_transparent_is_not_masked(tmp_path, mask):
    done = run("sample.py", "--model", TINY / "sd15", "--init-image", CASES / "mask" / "in.png", "--mask", CASES / "mask" / f"{mask}.png",
               "--strength", 0.7, "--steps", 6, "--seed", 3, "--prompt", "apple", "--output-dir", tmp_path)  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert_same(Image.open(tmp_path / "00000.png"), CASES / "mask" / "reference.png")


def test_16_bits_with_a_transparent_value():
    ramp, clear = (np.asarray(images.open_image(CASES / f"{n}.png").convert("L"), int) for n in ("g16", "g16trns"))
    assert len(set(ramp.flat)) > 60 and (ramp == 0).any() and np.array_equal(np.where(ramp == 0, 255, ramp), clear)


def test_no_words_are_a_prompt(tmp_path):
    assert (
        run("sample.py", "--model", TINY / "sd15", "--prompt", "", "--steps", 1, "--output-dir", tmp_path).returncode
        == 0
    )
