"""LoRA files as a whole: translating loses nothing, every program's rule reads the same change, merge, extract, verify."""

import json

import pytest
import torch
from safetensors.torch import load_file
from util import GOLDEN, TINY, copy_model, error_line, run

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.lora import tools, writing
from nanodiff.pipeline.families import BUILDERS
from nanodiff.pipeline.single import Known

FILES = GOLDEN / "lora"


def trained(name="sd15", rank=16, alpha=32, **more):
    """(pipeline, Lora) with random adapters on the denoiser and the first text encoder."""
    sd, g = pipeline.load(TINY / name), torch.Generator().manual_seed(1)
    parts = {sd.denoiser_name: sd.net, "text_encoder": sd.encoders[0]}
    for component, model in parts.items():
        lora.adapt(model, rank, alpha, component=component, **more)
        for k, p in model.named_parameters():
            if ".lora_B." in k:
                p.data = torch.randn(p.shape, generator=g) * 0.1
    return sd, lora.trained(parts)


def changes(found):
    return {k: v.float() for k, v in tools._changes(found).items()}


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_there_and_back(tmp_path, name):
    """Through all three dialects: the same bytes of every matrix, the same alpha."""
    sd, made = trained(name, 3, 5)
    made.deltas[1] = made.deltas[1]._replace(scale=2.5 / 3)
    path, models = lora.write(tmp_path / "0", made, sd.models()), pipeline.load(TINY / name).models()
    first = load_file(path)
    for i, form in enumerate(("diffusers", "peft", "kohya"), 1):
        path = lora.write(tmp_path / str(i), lora.read(path, models), models, form)
    last = load_file(path)
    assert first.keys() == last.keys() and all(torch.equal(first[k], last[k]) for k in first)


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
def test_every_rule_reads_the_same_change(tmp_path, name):
    """alpha 32, rank 16 (the fourth document's): ours, ComfyUI's and A1111's, kohya's, PEFT's."""
    _, made = trained(name)
    want = changes(made)
    models = pipeline.load(TINY / name).models()
    assert all(
        torch.equal(v, want[k]) for k, v in changes(lora.read(lora.write(tmp_path / "k", made, models), models)).items()
    )
    tensors, names = load_file(tmp_path / "k"), {lora.kohya_name(d, models): d[:2] for d in made.deltas}
    assert {k.split(".")[0] for k in tensors} == set(names)
    for key, target in names.items():
        up, down = tensors[f"{key}.lora_up.weight"], tensors[f"{key}.lora_down.weight"]
        alpha = tensors.get(f"{key}.alpha")
        strength = 1.0 if alpha is None else alpha.item() / down.shape[0]  # ComfyUI, A1111, kohya
        assert torch.allclose(strength * up @ down, want[target], atol=1e-6)
    lora.write(tmp_path / "p", made, models, "peft")
    for component in ("unet", "text_encoder"):
        config = json.loads((tmp_path / "p" / component / "adapter_config.json").read_text())
        tensors = load_file(tmp_path / "p" / component / "adapter_model.safetensors")
        for (of, module), change in want.items():
            if of == component:
                a, b = (tensors[f"base_model.model.{module.removeprefix('text_model.')}.lora_{x}.weight"] for x in "AB")
                assert (
                    torch.allclose(config["lora_alpha"] / config["r"] * b @ a, change, atol=1e-6)
                    and module.removeprefix("text_model.") in config["target_modules"]
                )
    lora.write(tmp_path / "d", made, models, "diffusers")
    told = json.loads(weights.metadata(tmp_path / "d")["lora_adapter_metadata"])
    assert told["unet.lora_alpha"] == 32 and told["text_encoder.r"] == 16


def test_names_that_other_programs_look_for(tmp_path):
    sd, made = trained("sdxl", 2)
    lora.write(tmp_path / "x", made, sd.models())
    keys = {k.split(".")[0] for k in load_file(tmp_path / "x")}
    assert all(
        k.startswith(
            ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_", "lora_te1_text_model_")
        )
        for k in keys
    )
    sd, made = trained("sd15", 2)
    lora.write(tmp_path / "y", made, sd.models())
    keys = {k.split(".")[0] for k in load_file(tmp_path / "y")}
    assert "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q" in keys
    assert "lora_te_text_model_encoder_layers_0_self_attn_q_proj" in keys


def test_header(tmp_path):
    """Texts only, the hash is of the tensors, and nothing of this machine is in it."""
    sd, made = trained("sdxl", 2, 4)
    facts = {"title": "corgi", "steps": 7, "resolution": "64x64", "prediction_type": "v_prediction"}
    lora.write(tmp_path / "x", made, sd.models(), facts=facts)
    told = weights.metadata(tmp_path / "x")
    assert (
        told["ss_base_model_version"].startswith("sdxl_")
        and told["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    )
    assert (told["ss_network_dim"], told["ss_network_alpha"], told["ss_steps"], told["ss_output_name"]) == (
        "2",
        "4",
        "7",
        "corgi",
    )
    assert (
        told["modelspec.prediction_type"] == "v"
        and len(told["sshs_model_hash"]) == 64
        and str(tmp_path) not in str(told)
    )
    lora.write(tmp_path / "y", made, sd.models(), facts=facts | {"title": "other"})
    assert weights.metadata(tmp_path / "y")["sshs_model_hash"] == told["sshs_model_hash"]
    other = trained("sd15", 2)
    lora.write(tmp_path / "z", other[1], other[0].models())
    assert weights.metadata(tmp_path / "z")["ss_base_model_version"] == "sd_v1"


def test_what_cannot_be_written(tmp_path):
    sd, made = trained("sd15", 2)
    with pytest.raises(UserError, match="no adapters to write"):
        lora.write(tmp_path / "x", lora.Lora("none", [], []), sd.models())
    with pytest.raises(UserError, match="is changed twice"):
        lora.write(tmp_path / "x", lora.Lora("two", made.deltas * 2, []), sd.models())


def tool(*argv):
    return run("-m", "nanodiff.lora", *argv)


def test_convert_and_verify(tmp_path):
    model = ("--model", TINY / "sd15")
    source = FILES / "sd15.peft_metadata.safetensors"  # alpha 10, rank 4, in the header alone
    done = tool("convert", source, tmp_path / "k.safetensors", "--to", "kohya", *model)
    assert done.returncode == 0 and "kohya, SD 1" in done.stdout, done.stderr
    done = tool("verify", source, tmp_path / "k.safetensors", *model)
    assert done.returncode == 0 and "largest relative difference" in done.stdout, done.stderr
    done = tool("inspect", source, *model)
    assert "strength 2.5" in done.stdout and "ComfyUI and A1111 take strength 1" in done.stdout
    assert "take strength 1" not in tool("inspect", tmp_path / "k.safetensors", *model).stdout
    tensors = load_file(tmp_path / "k.safetensors")
    key = next(k for k in tensors if k.endswith("lora_up.weight"))
    weights.save_tensors(tmp_path / "other.safetensors", tensors | {key: tensors[key] * 1.01})
    done = tool("verify", source, tmp_path / "other.safetensors", *model)
    assert done.returncode == 1 and "0.0099" in done.stdout
    assert "fits none of SD 1, SD 2, SDXL" in error_line(tool("convert", source, tmp_path / "x", "--to", "peft"))
    assert "no such" in error_line(tool("convert", tmp_path / "gone", tmp_path / "x", "--to", "peft", *model)).lower()


def test_a_released_models_file_needs_no_model(tmp_path):
    """Whose layers a file's are is found among the released models."""
    known = Known("SDXL", BUILDERS)
    models = {
        n: weights.skeleton(known.builder(n), known.config(n)) for n in ("unet", "text_encoder", "text_encoder_2")
    }
    layer = "down_blocks.1.attentions.0.transformer_blocks.0.attn2.to_k"
    width = models["unet"].get_submodule(layer)
    delta = lora.Delta("unet", layer, torch.randn(2, width.in_features), torch.randn(width.out_features, 2), 1.5)
    lora.write(tmp_path / "x.safetensors", lora.Lora("x", [delta], []), models)
    found, read = lora.models_for(tmp_path / "x.safetensors")
    assert writing.family_of(found) == "SDXL" and read.deltas[0].module == layer and read.deltas[0].scale == 1.5


def test_merge_is_fusing(tmp_path):
    sd, made = trained("sd15", 4)
    lora.write(tmp_path / "l.safetensors", made, sd.models())
    done = tool("merge", "--model", TINY / "sd15", "--lora", f"{tmp_path / 'l.safetensors'}:0.5", tmp_path / "merged")
    assert done.returncode == 0, done.stderr
    want = pipeline.load(TINY / "sd15")
    lora.fuse(want.models(), lora.read(tmp_path / "l.safetensors", want.models()), 0.5)
    got = pipeline.load(tmp_path / "merged")
    for name, model in want.models().items():
        state = got.models()[name].state_dict()
        assert all(torch.equal(v, state[k]) for k, v in model.state_dict().items()), name


def test_a_target_that_cannot_be_is_one_line(tmp_path):
    """A model that is there is never mixed with a merged one; a file is no folder; NaN is no difference."""
    sd, made = trained("sd15", 2)
    lora.write(tmp_path / "l.safetensors", made, sd.models())
    (tmp_path / "file").touch()
    one = tmp_path / "l.safetensors"
    done = tool("merge", "--model", TINY / "sd15", "--lora", one, copy_model("sd15", tmp_path / "model"))
    assert "exists and is not an empty folder" in error_line(done)
    assert "not an empty folder" in error_line(
        tool("merge", "--model", TINY / "sd15", "--lora", one, tmp_path / "file")
    )
    model = ("--model", TINY / "sd15")
    for target, form in (("file/k.safetensors", "kohya"), ("file/peft", "peft"), ("file", "peft")):
        assert str(tmp_path / "file") in error_line(tool("convert", one, tmp_path / target, "--to", form, *model))
    broken = copy_model("sd15", tmp_path / "nan")
    path = broken / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = weights.load_tensors(path)
    next(v for k, v in sorted(tensors.items()) if k.endswith("to_q.weight"))[0, 0] = float("nan")
    weights.save_tensors(path, tensors)
    done = tool("extract", "--model", TINY / "sd15", "--tuned", broken, "--rank", 2, tmp_path / "x.safetensors")
    assert "to_q.weight: is not finite" in error_line(done)
    alphas = weights.load_tensors(one)
    alphas = {k: (torch.zeros(2) if k.endswith("alpha") else v) for k, v in alphas.items()}
    weights.save_tensors(tmp_path / "two.safetensors", alphas)
    done = tool("inspect", tmp_path / "two.safetensors")
    assert "alpha 0, 0" in done.stdout and "Traceback" not in done.stderr, done.stderr


def test_extract_finds_what_was_merged(tmp_path):
    """The difference of a merge has the rank of the LoRA, so extraction at that rank is exact; at a lower rank it says what is lost."""
    sd, made = trained("sd15", 4, targets=("to_q", "conv1", "q_proj"))
    lora.write(tmp_path / "l.safetensors", made, sd.models())
    lora.merge(TINY / "sd15", [str(tmp_path / "l.safetensors")], tmp_path / "merged")
    for rank, exact in ((4, True), (2, False)):
        done = tool(
            "extract",
            "--model",
            TINY / "sd15",
            "--tuned",
            tmp_path / "merged",
            "--rank",
            rank,
            tmp_path / f"{rank}.safetensors",
        )
        assert done.returncode == 0 and ("100.00 % of" in done.stdout) == exact, done.stderr + done.stdout
    models = pipeline.load(TINY / "sd15").models()
    want, got = (changes(lora.read(tmp_path / f"{n}.safetensors", models)) for n in ("l", "4"))
    assert want.keys() == got.keys() and all(torch.allclose(got[k], v, atol=1e-5) for k, v in want.items())
    assert "no layer differs" in error_line(
        tool("extract", "--model", TINY / "sd15", "--tuned", TINY / "sd15", tmp_path / "x")
    )
    assert "for another family" in error_line(
        tool("extract", "--model", TINY / "sd15", "--tuned", TINY / "sd21-v", tmp_path / "x")
    )
    assert "--rank 0" in error_line(
        tool("extract", "--model", TINY / "sd15", "--tuned", tmp_path / "merged", "--rank", 0, tmp_path / "x")
    )
