"""Original single files: names both ways, every family from its header, what is missing or not supported, by name."""

import hashlib
import json
import re

import pytest
import torch
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from util import ROOT, TINY, copy_model, error_line, manifest, max_error, run

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.pipeline import families, single
from nanodiff.pipeline.single import Single
from nanodiff.weights import original_names

NAMES = {
    "sd15": "SD 1",
    "sd21-v": "SD 2",
    "sd-turbo": "SD 2",
    "sdxl": "SDXL",
    "sdxl-turbo": "SDXL",
    "sd35-medium": "SD 3.5 medium",
    "sd35-large-turbo": "SD 3.5 large",
}


@pytest.fixture(scope="module")
def models():
    return {name: pipeline.load(TINY / name) for name in NAMES}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("single")
    for name, family in NAMES.items():
        original_names.export(models[name].models(), family, folder / f"{name}.safetensors")
    return {name: folder / f"{name}.safetensors" for name in NAMES}


# -- the rules, written a second time from the other side: original name -> our name --------------------------

RESNET = {"in_layers.0": "norm1", "in_layers.2": "conv1", "emb_layers.1": "time_emb_proj"}
RESNET |= {"out_layers.0": "norm2", "out_layers.3": "conv2", "skip_connection": "conv_shortcut"}


def unet_name(name, per):
    """One original UNet module name -> ours; per: resnets per level + 1."""
    ends = {"time_embed.0": "time_embedding.linear_1", "time_embed.2": "time_embedding.linear_2"}
    ends |= {"label_emb.0.0": "add_embedding.linear_1", "label_emb.0.2": "add_embedding.linear_2"}
    ends |= {"out.0": "conv_norm_out", "out.2": "conv_out", "input_blocks.0.0": "conv_in"}
    if name in ends:
        return ends[name]
    side, n, *rest = name.split(".")
    n, rest = int(n), list(rest)
    if side == "middle_block":
        if n == 1:
            return ".".join(["mid_block.attentions.0", *rest])
        return f"mid_block.resnets.{n // 2}.{RESNET['.'.join(rest)]}"
    if side == "input_blocks":
        block, layer, way = (n - 1) // per, (n - 1) % per, "down_blocks"
        if rest[1] == "op":
            return f"down_blocks.{block}.downsamplers.0.conv"
    else:
        block, layer, way = n // per, n % per, "up_blocks"
        if rest[1] == "conv":
            return f"up_blocks.{block}.upsamplers.0.conv"
    if rest[0] == "0":
        return f"{way}.{block}.resnets.{layer}.{RESNET['.'.join(rest[1:])]}"
    return ".".join([f"{way}.{block}.attentions.{layer}", *rest[1:]])


def vae_name(name, levels):
    name = re.sub(r"\.mid\.block_(\d)", lambda m: f".mid_block.resnets.{int(m[1]) - 1}", name)
    name = name.replace(".mid.attn_1.norm", ".mid_block.attentions.0.group_norm")
    name = name.replace(".mid.attn_1.proj_out", ".mid_block.attentions.0.to_out.0")
    name = re.sub(r"\.mid\.attn_1\.([qkv])$", r".mid_block.attentions.0.to_\1", name)
    name = re.sub(r"\.down\.(\d)\.block", r".down_blocks.\1.resnets", name)
    name = re.sub(r"\.up\.(\d)\.block", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.resnets", name)
    name = re.sub(r"\.down\.(\d)\.downsample", r".down_blocks.\1.downsamplers.0", name)
    name = re.sub(r"\.up\.(\d)\.upsample", lambda m: f".up_blocks.{levels - 1 - int(m[1])}.upsamplers.0", name)
    return name.replace("norm_out", "conv_norm_out").replace("nin_shortcut", "conv_shortcut")


@pytest.mark.parametrize("name", ["sd15", "sd21-v", "sdxl"])
def test_unet_and_vae_names(models, files, name):
    """Every tensor of the exported file is the tensor of the model that the documented rules say."""
    sd, state = models[name], weights.load_tensors(files[name])
    unet, vae = sd.unet.state_dict(), sd.vae.state_dict()
    per, levels = sd.unet.cfg.layers_per_block + 1, len(sd.vae.cfg.block_out_channels)
    seen = 0
    for key, tensor in state.items():
        module, _, kind = key.rpartition(".")
        if key.startswith("model.diffusion_model."):
            ours = unet[f"{unet_name(module.removeprefix('model.diffusion_model.'), per)}.{kind}"]
        elif key.startswith("first_stage_model."):
            ours = vae[f"{vae_name(module.removeprefix('first_stage_model.'), levels)}.{kind}"]
            ours = ours[:, :, None, None] if "attn_1" in key and ours.dim() == 2 else ours
        else:
            continue
        assert torch.equal(tensor, ours), key
        seen += 1
    assert seen == len(unet) + len(vae)


@pytest.mark.parametrize(
    ("name", "prefix", "i"), [("sd21-v", "cond_stage_model.model.", 0), ("sdxl", "conditioner.embedders.1.model.", 1)]
)
def test_openclip_names(models, files, name, prefix, i):
    state, ours = weights.load_tensors(files[name]), models[name].encoders[i].state_dict()
    D = models[name].encoders[i].cfg.hidden_size
    fused = state[f"{prefix}transformer.resblocks.1.attn.in_proj_weight"]
    assert torch.equal(fused[D : 2 * D], ours["text_model.encoder.layers.1.self_attn.k_proj.weight"])
    bias = state[f"{prefix}transformer.resblocks.0.attn.in_proj_bias"]
    assert torch.equal(bias[2 * D :], ours["text_model.encoder.layers.0.self_attn.v_proj.bias"])
    for theirs, mine in (
        ("positional_embedding", "text_model.embeddings.position_embedding.weight"),
        ("token_embedding.weight", "text_model.embeddings.token_embedding.weight"),
        ("ln_final.bias", "text_model.final_layer_norm.bias"),
        ("transformer.resblocks.0.ln_2.weight", "text_model.encoder.layers.0.layer_norm2.weight"),
        ("transformer.resblocks.1.mlp.c_fc.weight", "text_model.encoder.layers.1.mlp.fc1.weight"),
        ("transformer.resblocks.1.mlp.c_proj.bias", "text_model.encoder.layers.1.mlp.fc2.bias"),
        ("transformer.resblocks.1.attn.out_proj.weight", "text_model.encoder.layers.1.self_attn.out_proj.weight"),
    ):
        assert torch.equal(state[prefix + theirs], ours[mine]), theirs
    if i:
        assert torch.equal(state[prefix + "text_projection"], ours["text_projection.weight"].T)


def test_sd3_names(models, files):
    state, ours = weights.load_tensors(files["sd35-medium"]), models["sd35-medium"].net.state_dict()
    p, last, D = "model.diffusion_model.", 3, models["sd35-medium"].net.cfg.width
    qkv = state[f"{p}joint_blocks.0.x_block.attn2.qkv.weight"]
    assert torch.equal(qkv[:D], ours["transformer_blocks.0.attn2.to_q.weight"])
    qkv = state[f"{p}joint_blocks.2.context_block.attn.qkv.bias"]
    assert torch.equal(qkv[2 * D :], ours["transformer_blocks.2.attn.add_v_proj.bias"])
    swapped = state[f"{p}final_layer.adaLN_modulation.1.weight"]
    assert torch.equal(swapped[:D], ours["norm_out.linear.weight"][D:]) and torch.equal(
        swapped[D:], ours["norm_out.linear.weight"][:D]
    )
    swapped = state[f"{p}joint_blocks.{last}.context_block.adaLN_modulation.1.bias"]
    assert torch.equal(swapped[:D], ours[f"transformer_blocks.{last}.norm1_context.linear.bias"][D:])
    for theirs, mine in (
        ("pos_embed", "pos_embed.pos_embed"),
        ("x_embedder.proj.weight", "pos_embed.proj.weight"),
        ("t_embedder.mlp.2.bias", "time_text_embed.timestep_embedder.linear_2.bias"),
        ("y_embedder.mlp.0.weight", "time_text_embed.text_embedder.linear_1.weight"),
        ("joint_blocks.0.x_block.adaLN_modulation.1.weight", "transformer_blocks.0.norm1.linear.weight"),
        ("joint_blocks.0.context_block.adaLN_modulation.1.weight", "transformer_blocks.0.norm1_context.linear.weight"),
        ("joint_blocks.1.x_block.attn.ln_q.weight", "transformer_blocks.1.attn.norm_q.weight"),
        ("joint_blocks.1.context_block.attn.ln_k.weight", "transformer_blocks.1.attn.norm_added_k.weight"),
        ("joint_blocks.1.context_block.attn.proj.weight", "transformer_blocks.1.attn.to_add_out.weight"),
        ("joint_blocks.1.x_block.attn.proj.weight", "transformer_blocks.1.attn.to_out.0.weight"),
        ("joint_blocks.3.x_block.mlp.fc2.weight", "transformer_blocks.3.ff.net.2.weight"),
        ("joint_blocks.0.context_block.mlp.fc1.bias", "transformer_blocks.0.ff_context.net.0.proj.bias"),
        ("final_layer.linear.weight", "proj_out.weight"),
    ):
        assert torch.equal(state[p + theirs], ours[mine]), theirs


@pytest.mark.parametrize("name", ["sd15.unet", "sd21.unet", "sdxl.unet", "sdxl-refiner.unet", "sd35-medium.transformer", "sd35-large.transformer",
                                  "sd15.vae", "sd35-medium.vae", "sdxl.text_encoder_2"])  # fmt: skip
def test_full_size_names_are_distinct_and_known(name):
    """No two tensors of a real model share a place, and the built-in configuration is the manifest's."""
    model, component = name.split(".")
    family = {
        "sd15": "SD 1",
        "sd21": "SD 2",
        "sdxl": "SDXL",
        "sdxl-refiner": "SDXL refiner",
        "sd35-medium": "SD 3.5 medium",
        "sd35-large": "SD 3.5 large",
    }[model]
    config, parameters = manifest(name)
    built_in = families.KNOWN[family][1][component]
    cls = pipeline.BUILDERS[component]
    model = weights.skeleton(cls, cls.Config.from_json(built_in))
    assert {k: tuple(v.shape) for k, v in model.state_dict().items()} == {
        weights.renamed(k, model.class_name): v for k, v in parameters.items()
    }
    for field, value in vars(cls.Config.from_json(config)).items():
        if field not in ("sample_size", "upcast_attention", "bos_token_id", "pad_token_id"):
            assert value == getattr(model.cfg, field), field
    places = [original_names.original(k, component, family, model.cfg) for k in model.state_dict()]
    assert len(set(places)) == len(places)


# -- reading ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_same_picture_from_file_and_folder(models, files, name, capsys):
    again = pipeline.load(files[name], components=TINY / name)
    assert NAMES[name] in capsys.readouterr().err
    a, b = (sd.generate(["a cat"], steps=2, seeds=[3]).latents for sd in (models[name], again))
    assert max_error(b, a) < 1e-5


@pytest.mark.parametrize("name", NAMES)
def test_there_and_back_bit_for_bit(models, files, name, tmp_path):
    """original -> ours -> original, every key."""
    again = pipeline.load(files[name], None, components=TINY / name)
    original_names.export(again.models(), NAMES[name], tmp_path / "again.safetensors")
    a, b = weights.load_tensors(files[name]), weights.load_tensors(tmp_path / "again.safetensors")
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) for k in a)


def changed(files, name, tmp_path, change):
    """A copy of an exported file with change(tensors) applied."""
    state = weights.load_tensors(files[name])
    state = change(state) or state
    weights.save_tensors(tmp_path / "changed.safetensors", {k: v.clone() for k, v in state.items()})
    return tmp_path / "changed.safetensors"


def test_ema_weights_are_preferred_and_said(models, files, tmp_path, capsys):
    def add(state):
        for key in [k for k in state if k.startswith("model.diffusion_model.")]:
            state["model_ema." + key.removeprefix("model.").replace(".", "")] = state[key]
            state[key] = torch.zeros_like(state[key])
        state["model_ema.decay"] = torch.tensor(0.99)

    sd = pipeline.load(changed(files, "sd15", tmp_path, add), components=TINY / "sd15")
    assert "EMA" in capsys.readouterr().err
    assert all(torch.equal(a, b) for a, b in zip(sd.unet.parameters(), models["sd15"].unet.parameters(), strict=True))


@pytest.mark.parametrize("prefix", ["", "model.diffusion_model."])
def test_a_denoiser_alone_takes_the_rest_from_components(models, files, tmp_path, prefix):
    start = "model.diffusion_model."
    for name in ("sd15", "sd35-medium"):
        path = changed(
            files,
            name,
            tmp_path,
            lambda s: {prefix + k.removeprefix(start): v for k, v in s.items() if k.startswith(start)},
        )
        sd = pipeline.load(path, components=TINY / name)
        a, b = (p.generate(["a"], steps=1, seeds=[0]).latents for p in (sd, models[name]))
        assert max_error(a, b) < 1e-5
        with pytest.raises(UserError, match=r"has no text_encoder, .*`components`"):
            pipeline.load(path)


def test_old_files_without_text_model_and_with_schedules(models, files, tmp_path):
    def old(state):
        state = {k.replace("text_model.", ""): v for k, v in state.items()}
        return state | {"betas": torch.zeros(3), "alphas_cumprod": torch.zeros(3), "model_ema.decay": torch.zeros(1)}

    sd = pipeline.load(changed(files, "sd15", tmp_path, old), components=TINY / "sd15")
    assert torch.equal(sd.text_encoder.final_norm.__self__.text_model.final_layer_norm.weight,
                       models["sd15"].text_encoder.text_model.final_layer_norm.weight)  # fmt: skip


def test_position_ids_as_floats(files, tmp_path):
    key = "cond_stage_model.transformer.text_model.embeddings.position_ids"
    path = changed(files, "sd15", tmp_path, lambda s: s | {key: s[key].float()})
    assert pipeline.load(path, components=TINY / "sd15").unet is not None


def test_sd2_epsilon_or_v(files, tmp_path, capsys):
    """With components their scheduler says; a flag wins; else the spread of one bias tells, and it is said which."""
    assert pipeline.load(files["sd21-v"], components=TINY / "sd21-v").schedule.prediction == "v_prediction"
    sd = pipeline.load(files["sd21-v"], components=TINY / "sd21-v", prediction_type="epsilon")
    assert sd.schedule.prediction == "epsilon" and "epsilon" in capsys.readouterr().err
    key = "model.diffusion_model.output_blocks.11.1.transformer_blocks.0.norm1.bias"
    for spread, want in ((0.2, "v_prediction"), (0.01, "epsilon")):
        bias = torch.randn(320) * spread
        path = changed(files, "sd21-v", tmp_path, lambda s, bias=bias: s | {key: bias})
        single = Single.__new__(Single)
        single.path, single.family, single.rest, single.state = path, "SD 2", None, None
        single.rest = None if spread > 0.1 else pipeline.Folder(TINY / "sd21-v")  # the file itself wins over components
        single.shapes, single.prefixes = weights.header([path]), original_names.prefixes("SD 2")
        assert single._prediction(None) == want and single._prediction("sample") == "sample"
    del single.shapes[key]
    assert single._prediction(None) == "v_prediction", "components tell when the file cannot"
    single.rest = None
    with pytest.raises(UserError, match="`prediction_type`"):
        single._prediction(None)


def test_v_prediction_markers_of_sdxl_finetunes(files, tmp_path):
    path = changed(files, "sdxl", tmp_path, lambda s: s | {"v_pred": torch.zeros(0), "ztsnr": torch.zeros(0)})
    sd = pipeline.load(path, components=TINY / "sdxl")
    schedule = sd.schedule
    assert not sd.turbo, "trailing spacing alone is no turbo"
    assert schedule.prediction == "v_prediction" and schedule.cfg["rescale_betas_zero_snr"]
    assert schedule.cfg["timestep_spacing"] == "trailing"


def test_sd3_without_t5(models, files, tmp_path, capsys):
    path = changed(files, "sd35-medium", tmp_path, lambda s: {k: v for k, v in s.items() if "t5xxl" not in k})
    sd = pipeline.load(path, components=TINY / "sd35-medium", no_t5=True)
    assert sd.encoders[2] is None
    want = pipeline.load(TINY / "sd35-medium", no_t5=True)
    a, b = (p.generate(["a"], steps=1, seeds=[0]).latents for p in (sd, want))
    assert max_error(a, b) < 1e-5


# -- refusals -----------------------------------------------------------------------------------------------

IN = "model.diffusion_model.input_blocks.0.0.weight"


@pytest.mark.parametrize(
    ("name", "change", "says"),
    [
        ("sd15", lambda s: s | {IN: torch.zeros(16, 8, 3, 3)}, "pix2pix"),
        ("sd15", lambda s: s | {IN: torch.zeros(256, 7, 3, 3)}, "upscaler"),
        ("sdxl", lambda s: s | {"edm_mean": torch.zeros(1)}, "Playground"),
        ("sd15", lambda s: {"double_blocks.0.x": torch.zeros(1)}, "Flux"),
        ("sd15", lambda s: {"lora_unet_x.lora_down.weight": torch.zeros(1)}, "`lora`"),
        ("sd15", lambda s: {k: v for k, v in s.items() if k.startswith("first_stage")}, "`vae_checkpoint`"),
        ("sd15", lambda s: {"something": torch.zeros(1)}, "no Stable Diffusion"),
        ("sd15", lambda s: s | {"first_stage_model.odd": torch.zeros(1)}, r"unknown tensor first_stage_model\.odd"),
        (
            "sd15",
            lambda s: {k: v for k, v in s.items() if k != "first_stage_model.decoder.conv_in.bias"},
            r"misses tensor first_stage_model\.decoder\.conv_in",
        ),
        ("sd15", lambda s: s | {"first_stage_model.decoder.conv_in.bias": torch.zeros(7)}, "has shape"),
    ],
)
def test_refused_by_name(files, tmp_path, name, change, says):
    path = changed(files, name, tmp_path, change)
    with pytest.raises(UserError, match=says):
        pipeline.load(path, components=TINY / name)


def test_other_sizes_need_their_configuration(files):
    with pytest.raises(UserError, match=r"unknown tensor|give its configs with `components`"):
        pipeline.load(files["sd15"])


def test_components_of_another_family(files):
    with pytest.raises(UserError, match="StableDiffusionPipeline"):
        pipeline.load(files["sdxl"], components=TINY / "sd15")
    with pytest.raises(UserError, match="`components` is for single"):
        pipeline.load(TINY / "sd15", components=TINY / "sd15")


def test_pickles_need_a_word(models, tmp_path):
    state = original_names.export(models["sd15"].models(), "SD 1", tmp_path / "x.safetensors")
    torch.save({"state_dict": {k: v.clone() for k, v in state.items()}, "global_step": 7}, tmp_path / "x.ckpt")
    with pytest.raises(UserError, match="`allow_pickle`"):
        pipeline.load(tmp_path / "x.ckpt", components=TINY / "sd15")
    sd = pipeline.load(tmp_path / "x.ckpt", components=TINY / "sd15", allow_pickle=True)
    assert all(torch.equal(a, b) for a, b in zip(sd.unet.parameters(), models["sd15"].unet.parameters(), strict=True))


def test_a_vae_of_its_own(models, files, tmp_path):
    """In original names with and without prefix, and in ours."""
    vae, state = models["sd15"].vae, weights.load_tensors(files["sd15"])
    only = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
    for tensors in (only, {k.removeprefix("first_stage_model."): v for k, v in only.items()}, vae.state_dict()):
        weights.save_tensors(tmp_path / "vae.safetensors", {k: v.clone() for k, v in tensors.items()})
        got = single.load_vae(tmp_path / "vae.safetensors", vae.cfg, type(vae), torch.float32, "cpu")
        assert all(torch.equal(a, b) for a, b in zip(got.parameters(), vae.parameters(), strict=True))
    with pytest.raises(UserError, match=r"no VAE of this model|has shape"):
        other = models["sd35-medium"].vae
        single.load_vae(tmp_path / "vae.safetensors", other.cfg, type(other), torch.float32, "cpu")


# -- the tool -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["sd21-v", "sd35-medium"])
def test_convert_both_ways(name, tmp_path):
    one, folder, two = tmp_path / "one.safetensors", tmp_path / "folder", tmp_path / "two.safetensors"
    done = run("-m", "nanodiff.weights", "convert", TINY / name, one)
    assert done.returncode == 0, done.stderr
    done = run("-m", "nanodiff.weights", "convert", one, folder, "--components", TINY / name)
    assert done.returncode == 0, done.stderr
    assert run("-m", "nanodiff.weights", "convert", folder, two).returncode == 0
    a, b = weights.load_tensors(one), weights.load_tensors(two)
    assert a.keys() == b.keys() and all(torch.equal(a[k], b[k]) and a[k].dtype == b[k].dtype for k in a)
    first, second = (pipeline.load(f).generate(["a cat"], steps=1, seeds=[0]).latents for f in (TINY / name, folder))
    assert max_error(second, first) < 1e-5
    done = run("-m", "nanodiff.weights", "convert", one, folder, "--components", TINY / name)
    assert "not an empty folder" in error_line(done)
    (tmp_path / "file").touch()
    done = run("-m", "nanodiff.weights", "convert", one, tmp_path / "file", "--components", TINY / name)
    assert "not an empty folder" in error_line(done)


@pytest.mark.parametrize(
    "name, file, said",
    [("sd-turbo", "one", ["EulerDiscreteScheduler", "trailing", "turbo; a name"]), ("sd-turbo", "a-Turbo", []), ("sdxl", "one", []),
     ("sdxl", "turbo", ["EulerDiscreteScheduler", "leading"]), ("sd35-medium", "one", [])],
)  # fmt: skip
def test_what_one_file_cannot_say_is_said(name, file, said, tmp_path, capsys):
    pipeline.convert(TINY / name, tmp_path / f"{file}.safetensors")
    err = capsys.readouterr().err
    assert all(word in err for word in said) and ("note:" in err) == bool(said)


def test_a_flow_model_may_be_a_turbo_by_its_name_alone(tmp_path, capsys):
    folder = copy_model("sd35-medium", tmp_path / "large-turbo")
    pipeline.convert(folder, tmp_path / "one.safetensors")
    assert 'nothing in it says that it is a turbo; a name with "turbo" does' in capsys.readouterr().err


def test_what_a_model_predicts_stands_in_its_one_file(tmp_path):
    """ε or v, and the noise at the end: by the empty tensors that other programs look for. Back in a folder, and in a file again."""
    folder = copy_model("sdxl", tmp_path / "v")
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(
        json.dumps(json.loads(path.read_text()) | {"prediction_type": "v_prediction", "rescale_betas_zero_snr": True})
    )
    one, back, two = tmp_path / "one.safetensors", tmp_path / "back", tmp_path / "two.safetensors"
    pipeline.convert(folder, one)
    assert {"v_pred", "ztsnr"} <= weights.load_tensors(one).keys()
    pipeline.convert(one, back, components=str(TINY / "sdxl"))
    schedule = pipeline.load(back).schedule
    assert schedule.prediction == "v_prediction" and schedule.cfg["rescale_betas_zero_snr"]
    pipeline.convert(back, two)
    assert weights.load_tensors(two).keys() == weights.load_tensors(one).keys()
    pipeline.convert(TINY / "sdxl", tmp_path / "plain.safetensors")
    assert not {"v_pred", "ztsnr"} & weights.load_tensors(tmp_path / "plain.safetensors").keys()
    with pytest.raises(UserError, match="has no form as one file"):
        pipeline.convert(ROOT / "assets" / "world", tmp_path / "w.safetensors")


def test_sample_from_a_file(files, tmp_path):
    argv = ("--prompt", "a cat", "--steps", "1", "--seed", "0", "--output-dir")
    done = run("sample.py", "--model", files["sdxl"], "--components", TINY / "sdxl", *argv, tmp_path / "a")
    assert done.returncode == 0 and "SDXL checkpoint" in done.stderr, done.stderr
    assert run("sample.py", "--model", TINY / "sdxl", *argv, tmp_path / "b").returncode == 0
    assert (tmp_path / "a" / "00000.png").exists()
    a, b = (Image.open(tmp_path / d / "00000.png").tobytes() for d in "ab")
    own = hashlib.sha256(files["sdxl"].read_bytes()).hexdigest()[:10]
    said = Image.open(tmp_path / "a" / "00000.png").text["parameters"]
    assert f"Model hash: {own}, Model: " in said
    assert "Model hash" not in Image.open(tmp_path / "b" / "00000.png").text["parameters"]
    for name, theirs in (("same", own), ("other", "0" * 10)):
        info = PngInfo()
        info.add_itxt(
            "parameters", f"a\nSteps: 1, Sampler: Euler, Seed: 9, Size: 64x64, Model hash: {theirs}, Model: x, RNG: CPU"
        )
        Image.new("RGB", (4, 4)).save(tmp_path / f"{name}.png", pnginfo=info)
        done = run(
            "sample.py",
            "--from-image",
            tmp_path / f"{name}.png",
            "--model",
            files["sdxl"],
            "--components",
            TINY / "sdxl",
            "--output-dir",
            tmp_path / name,
        )
        assert done.returncode == 0 and (f"has {own}: another picture" in done.stderr) == (name == "other"), done.stderr
    assert max(abs(x - y) for x, y in zip(a, b, strict=True)) <= 1
    done = run("sample.py", "--model", files["sdxl"], *argv, tmp_path / "c")
    assert "error:" in error_line(done)


def test_copy_of_a_variant_is_not_needed(tmp_path):
    """A Hub folder with the single-file copy beside model_index.json is still the folder."""
    folder = copy_model("sd15", tmp_path / "m")
    (folder / "v1-5.safetensors").write_bytes(b"not read")
    assert pipeline.load(folder).unet is not None


def test_a_flow_has_no_prediction_type(files):
    with pytest.raises(UserError, match="velocity"):
        pipeline.load(files["sd35-medium"], components=TINY / "sd35-medium", prediction_type="epsilon")


def test_sgm_resaves_of_sd2(models, files, tmp_path):
    """`conditioner.embedders.0.model.` for SD 2's text encoder, with the layer and projection that SD 2 never uses."""

    def resave(state):
        old, new = "cond_stage_model.model.", "conditioner.embedders.0.model."
        state = {k.replace(old, new): v for k, v in state.items()}
        return state | {
            f"{new}text_projection": torch.zeros(3),
            f"{new}transformer.resblocks.23.ln_1.bias": torch.zeros(3),
        }

    sd = pipeline.load(changed(files, "sd21-v", tmp_path, resave), components=TINY / "sd21-v")
    got, want = (p.text_encoder.state_dict() for p in (sd, models["sd21-v"]))
    assert all(torch.equal(got[k], want[k]) for k in want)


@pytest.mark.parametrize(
    ("name", "kind"), [("sd-turbo", "EulerDiscreteScheduler"), ("sdxl-turbo", "EulerAncestralDiscreteScheduler")]
)
def test_turbos_are_told_by_their_name(files, name, kind, tmp_path, capsys, monkeypatch):
    """Their keys are the base model's. Without components the scheduler that the turbo ships is taken, and it is said."""
    singlefile_path = files[name]
    assert pipeline.load(singlefile_path, components=TINY / name).turbo
    assert "a turbo by its name" in capsys.readouterr().err
    monkeypatch.setattr(Single, "_check_leftovers", lambda self: None)
    single = Single(singlefile_path, pipeline.BUILDERS, prediction_type="epsilon")
    raw, _ = single.scheduler()
    assert raw["_class_name"] == kind and raw["timestep_spacing"] == "trailing" and pipeline.is_turbo(raw, name)
    assert single.config("unet").sample_size == 64


def test_v_that_stands_in_the_header_alone(files, tmp_path, capsys):
    path = tmp_path / "v.safetensors"
    for stated, want in (("v", "v_prediction"), ("epsilon", "epsilon"), ("", "epsilon")):
        weights.save_tensors(path, weights.load_tensors(files["sdxl"]), {"modelspec.prediction_type": stated})
        assert pipeline.load(path, components=TINY / "sdxl").schedule.prediction == want
        assert ("by its header's modelspec.prediction_type" in capsys.readouterr().err) == (stated == "v")


def test_an_inpainting_model_of_sd2_predicts_noise(files, tmp_path):
    """And its own nine channels are its configuration's, whatever the components say."""
    first = "model.diffusion_model.input_blocks.0.0.weight"
    wide = lambda s: s | {first: torch.cat([s[first], s[first], s[first][:, :1]], dim=1)}  # noqa: E731
    path = changed(files, "sd21-v", tmp_path, wide)
    sd = pipeline.load(path, components=TINY / "sd21-v")
    assert sd.schedule.prediction == "epsilon" and sd.unet.cfg.in_channels == 9 and sd.inpaints
    assert pipeline.load(changed(files, "sd15", tmp_path, wide), components=TINY / "sd15").unet.cfg.in_channels == 9


def test_clips_projection_that_nothing_reads(files, models, tmp_path):
    for name, prefix in (("sd15", "cond_stage_model."), ("sdxl", "conditioner.embedders.0.")):
        path = changed(
            files, name, tmp_path, lambda s, p=prefix: s | {f"{p}transformer.text_projection.weight": torch.zeros(8, 8)}
        )
        assert pipeline.load(path, components=TINY / name).unet is not None
    folder = copy_model("sd15", tmp_path / "folder")
    file = folder / "text_encoder" / "model.safetensors"
    weights.save_tensors(
        file,
        {**{k: v.clone() for k, v in weights.load_tensors(file).items()}, "text_projection.weight": torch.zeros(8, 8)},
    )
    assert max_error(pipeline.load(folder).encode(["a"]).states, models["sd15"].encode(["a"]).states) == 0


def test_learned_words_have_no_place_in_one_file(tmp_path):
    sd = pipeline.load(TINY / "sd15")
    weights.save_tensors(tmp_path / "quux.safetensors", {"quux": torch.ones(1, sd.text_encoder.cfg.hidden_size)})
    sd.learn(tmp_path / "quux.safetensors")
    sd.save(tmp_path / "model")
    with pytest.raises(UserError, match="has the learned words quux, for which one file has no place"):
        pipeline.convert(tmp_path / "model", tmp_path / "one.safetensors")
    assert not (tmp_path / "one.safetensors").exists()


def test_suffixes_in_capitals(models, tmp_path):
    path = tmp_path / "MODEL.CKPT"
    torch.save({"state_dict": {"a": torch.zeros(2)}}, path)
    from nanodiff.weights.__main__ import convert

    convert(path, tmp_path / "out.safetensors", allow_pickle=True)
    assert list(weights.load_tensors(tmp_path / "out.safetensors")) == ["a"]
    (tmp_path / "m.safetensors").write_bytes(b"GGUF" + bytes(60))
    with pytest.raises(UserError, match="is GGUF, quantized for other programs"):
        weights.load_weights(tmp_path / "m.safetensors")


@pytest.mark.parametrize(
    ("file", "field", "value", "said"),
    [
        ("scheduler/scheduler_config.json", "prediction_type", "sample", "scheduler's prediction_type 'sample'"),
        ("scheduler/scheduler_config.json", "beta_schedule", "squaredcos_cap_v2", "scheduler's beta_schedule"),
        ("vae/config.json", "scaling_factor", 0.5, "VAE's scaling_factor 0.5"),
        (
            "model_index.json",
            "_sampling",
            {"steps": 4, "guidance_scale": 1.0},
            "steps and guidance that it was trained for",
        ),
    ],
)
def test_what_a_folder_says_and_one_file_does_not(file, field, value, said, tmp_path, capsys):
    """Said when it is written, and there again with the folder."""
    folder = copy_model("sd15", tmp_path / "m")
    raw = json.loads((folder / file).read_text()) | {field: value}
    (folder / file).write_text(json.dumps(raw))
    pipeline.convert(folder, tmp_path / "one.safetensors")
    assert said in capsys.readouterr().err
    one, whole = pipeline.load(tmp_path / "one.safetensors", components=folder), pipeline.load(folder)
    assert one.schedule == whole.schedule and one.vae.cfg == whole.vae.cfg and one.settings() == whole.settings()


def test_zeros_for_an_empty_prompt_are_the_folders(tmp_path):
    folder = copy_model("sdxl", tmp_path / "m")
    raw = json.loads((folder / "model_index.json").read_text()) | {"force_zeros_for_empty_prompt": False}
    (folder / "model_index.json").write_text(json.dumps(raw))
    pipeline.convert(folder, tmp_path / "one.safetensors")
    draw = lambda sd: sd.generate("a", seeds=[0], steps=1, height=64, width=64, output_type="latent").latents  # noqa: E731
    one = draw(pipeline.load(tmp_path / "one.safetensors", components=folder))
    assert max_error(one, draw(pipeline.load(folder))) < 1e-5
    assert max_error(one, draw(pipeline.load(TINY / "sdxl"))) > 1e-2


def test_sd3_without_clip_ls_projection(files, tmp_path, capsys):
    """The identity, as diffusers' from_single_file() takes it."""
    state = weights.load_tensors(files["sd35-medium"])
    del state["text_encoders.clip_l.transformer.text_projection.weight"]
    weights.save_tensors(tmp_path / "x.safetensors", state)
    encoder = pipeline.load(tmp_path / "x.safetensors", components=TINY / "sd35-medium").encoders[0]
    assert torch.equal(encoder.text_projection.weight, torch.eye(len(encoder.text_projection.weight)))
    assert "text_projection.weight is absent, taken for the identity" in capsys.readouterr().err


def test_a_vae_file_with_what_is_nobodys(models, files, tmp_path):
    vae, state = models["sd15"].vae, weights.load_tensors(files["sd15"])
    only = {k: v for k, v in state.items() if k.startswith("first_stage_model.")}
    for more in (
        "first_stage_model.decoder.conv_in.scale_weight",
        "first_stage_model.decoder.up.0.block.9.conv1.weight",
    ):
        weights.save_tensors(tmp_path / "v.safetensors", only | {more: torch.ones(1)})
        with pytest.raises(UserError, match=f"has unknown tensor {more}"):
            single.load_vae(tmp_path / "v.safetensors", vae.cfg, type(vae), torch.float32, "cpu")
    left_out = {"first_stage_model.loss.discriminator.weight": torch.ones(1), "model.diffusion_model.x": torch.ones(1)}
    weights.save_tensors(tmp_path / "v.safetensors", only | left_out)
    single.load_vae(tmp_path / "v.safetensors", vae.cfg, type(vae), torch.float32, "cpu")
