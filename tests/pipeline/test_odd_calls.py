"""A pipeline as people call it in Python: under autocast, cast, taught, fused, from threads, with values of another kind."""

import json
import pickle
import shutil
import threading

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from util import TINY, max_error

import nanodiff
from nanodiff import lora, pipeline
from nanodiff.config import ASSETS, UserError
from nanodiff.device import quantize
from nanodiff.models.freeu import FreeU
from nanodiff.output import images
from nanodiff.pipeline.settings import Churn, SkipLayers
from nanodiff.weights import load_tensors

FAMILIES = ("sd15", "sdxl", "sd35-medium")


def tiny(name="sd15", **options):
    return nanodiff.load(TINY / name, **options)


def drawn(sd, prompt="a cat", **settings):
    return sd.generate(prompt, **{"seeds": [1], "steps": 2, "guidance_scale": 3.0} | settings).pixels


@pytest.mark.parametrize("name", [*FAMILIES, ASSETS / "nano", ASSETS / "world"])
@pytest.mark.parametrize("packs", [False, True])
def test_autocast_is_obeyed_and_leaves_nothing_behind(name, packs):
    sd = tiny(name)
    plain, sd.packs = drawn(sd), packs
    sd.kept.clear()
    with torch.autocast("cpu", torch.bfloat16):
        rounded = drawn(sd)
    assert torch.isfinite(rounded).all() and (rounded - plain).square().mean() < 0.1 * plain.square().mean()
    sd.packs = False
    assert torch.equal(drawn(sd), plain), "what was encoded under it is not kept for other runs"


@pytest.mark.parametrize("name", FAMILIES)
def test_a_model_that_is_cast_after_it_has_drawn(name):
    sd, fresh = tiny(name), tiny(name, dtype=torch.bfloat16)
    exact = drawn(sd)
    for model in sd.models().values():
        model.to(torch.bfloat16)
    x, y = drawn(sd), drawn(fresh)
    assert (x - y).norm() <= 1.5 * (y - exact).norm(), (
        "other products are oneDNN's (DirectLinear), so it may be rounded elsewhere"
    )


def test_a_denoiser_that_is_cast_alone():
    sd = tiny("sdxl")
    drawn(sd)
    sd.net.to(torch.bfloat16)
    assert torch.isfinite(drawn(sd)).all()


def test_types_of_the_files_can_be_drawn_with():
    for options in ({}, {"offload": "model"}, {"offload": "sequential"}):
        assert torch.isfinite(drawn(tiny("sd35-medium", dtype=None, **options))).all()


@pytest.mark.parametrize("part", ["text_encoder", "net"])
def test_weights_that_are_written_behind_pytorchs_back(part):
    """As averages of weights are copied: `p.data.copy_(…)`."""
    sd, other = tiny(), tiny()
    before = drawn(sd)
    for model in (getattr(sd, part), getattr(other, part)):
        for p in model.parameters():
            p.data.mul_(1.2)
    assert not torch.equal(before, drawn(sd)) and torch.equal(drawn(sd), drawn(other))


def test_loaded_in_inference_mode_and_drawn_outside():
    with torch.inference_mode():
        sd = nanodiff.load()
    assert torch.equal(drawn(sd, "red apple"), drawn(nanodiff.load(), "red apple"))


def test_a_pipeline_can_be_pickled():
    sd = tiny()
    assert torch.equal(drawn(pickle.loads(pickle.dumps(sd))), drawn(sd))


def test_threads_do_not_draw_with_each_others_settings():
    sd, found = tiny(), {}
    twin = sd.with_scheduler("euler")
    alone = drawn(sd, steps=6)
    settings = {"plain": (sd, {}), "free": (twin, {"freeu": FreeU(1.2, 1.4, 0.9, 0.2)})}
    threads = [threading.Thread(target=lambda n=n, s=s, k=k: found.update({n: drawn(s, steps=6, **k)})) for n, (s, k) in settings.items()]  # fmt: skip
    for t in threads:
        t.start()
    for t in threads:
        t.join()
    assert torch.equal(found["plain"], alone)


def test_skip_layers_need_guidance():
    """As in diffusers, which has them only beside it."""
    sd, skip = tiny("sd35-medium"), SkipLayers((0,), 2.8, 0.0, 1.0)
    off = drawn(sd, steps=4, guidance_scale=1.0, skip_layers=skip)
    assert torch.equal(off, drawn(sd, steps=4, guidance_scale=1.0))
    assert not torch.equal(drawn(sd, steps=4, skip_layers=skip), drawn(sd, steps=4))


# -- LoRAs and learned words ----------------------------------------------------------------------------------


def made(sd, seed, metadata=None, prefix="unet."):
    """A Lora's tensors for the first attention."""
    g = torch.Generator().manual_seed(seed)
    layers = [n for n, m in sd.net.named_modules() if n.endswith(("attn1.to_q", "attn2.to_k"))]
    out = {}
    for n in layers:
        layer = sd.net.get_submodule(n)
        out[f"{prefix}{n}.lora_A.weight"] = torch.randn(4, layer.in_features, generator=g) / 4
        out[f"{prefix}{n}.lora_B.weight"] = torch.randn(layer.out_features, 4, generator=g) / 4
    return out


def test_settings_without_a_prefix_are_the_denoisers(tmp_path):
    """As diffusers' save_lora_adapter() of a UNet writes them."""
    sd, how = tiny(), {"r": 4, "lora_alpha": 16, "use_rslora": False}
    for name, prefix in (("alone", ""), ("whole", "unet.")):
        said = {"lora_adapter_metadata": json.dumps({f"{prefix}{k}": v for k, v in how.items()})}
        save_file(made(sd, 0, prefix=prefix), tmp_path / f"{name}.safetensors", said)
        assert {d.scale for d in lora.read(tmp_path / f"{name}.safetensors", sd.models()).deltas} == {4.0}
    said = {"lora_adapter_metadata": json.dumps({"umet.lora_alpha": 16})}
    save_file(made(sd, 0), tmp_path / "odd.safetensors", said)
    with pytest.raises(UserError, match="lora_adapter_metadata is of 'umet'"):
        lora.read(tmp_path / "odd.safetensors", sd.models())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_fused_loras_leave_in_any_order(tmp_path, dtype):
    sd = tiny(dtype=dtype)
    for i in range(2):
        save_file(made(sd, i), tmp_path / f"{i}.safetensors")
    a, b = (lora.read(tmp_path / f"{i}.safetensors", sd.models()) for i in range(2))
    before = {k: v.clone() for k, v in sd.net.state_dict().items()}
    with_b = tiny(dtype=dtype)
    lora.fuse(with_b.models(), b, 0.7)
    near = lambda x, y: all((x[k].float() - y[k].float()).abs().max() <= 4 * torch.finfo(dtype).eps * 8 for k in x)  # noqa: E731
    first, second = lora.fuse(sd.models(), a), lora.fuse(sd.models(), b, 0.7)
    first.remove()
    assert near(sd.net.state_dict(), with_b.net.state_dict())
    first.remove()  # there is nothing more to take
    assert near(sd.net.state_dict(), with_b.net.state_dict())
    second.remove()
    assert near(sd.net.state_dict(), before)
    sd = tiny(dtype=dtype)
    first, second = lora.fuse(sd.models(), a), lora.fuse(sd.models(), b, 0.7)
    second.remove(), first.remove()
    assert all(torch.equal(v, before[k]) for k, v in sd.net.state_dict().items()), "last in, first out: to the bit"


def test_fused_then_cast():
    sd = tiny()
    fused = lora.fuse(sd.models(), lora.read(TINY.parent / "lora" / "sd15.kohya.safetensors", sd.models()))
    for model in sd.models().values():
        model.to(torch.bfloat16)
    fused.remove()
    assert {p.dtype for p in sd.net.parameters()} == {torch.bfloat16}


def test_adapters_once_and_not_in_a_models_file(tmp_path):
    sd = tiny()
    lora.adapt(sd.net, 4)
    with pytest.raises(UserError, match="has an adapter already"):
        lora.adapt(sd.net, 4)
    with pytest.raises(UserError, match="adapters of a LoRA in training"):
        sd.save(tmp_path / "m")


def test_a_refused_word_teaches_nothing(tmp_path):
    sd = tiny("sdxl")
    before = drawn(sd, "one red star")
    save_file({"emb_params": torch.ones(2, sd.encoders[0].cfg.hidden_size)}, tmp_path / "one.safetensors")
    with pytest.raises(UserError, match="vectors for one text encoder, this model has two"):
        sd.learn(tmp_path / "one.safetensors")
    assert torch.equal(drawn(sd, "one red star"), before)
    both = {"clip_l": torch.ones(2, sd.encoders[0].cfg.hidden_size), "clip_g": torch.ones(2, 3)}
    (tmp_path / "both").mkdir()
    save_file(both, tmp_path / "both" / "one.safetensors")
    with pytest.raises(UserError, match="vectors of width 3"):
        sd.learn(tmp_path / "both" / "one.safetensors")
    assert torch.equal(drawn(sd, "one red star"), before)
    save_file(both | {"clip_g": torch.ones(2, sd.encoders[1].cfg.hidden_size)}, tmp_path / "both" / "one.safetensors")
    assert sd.learn(tmp_path / "both" / "one.safetensors") == "one" and not torch.equal(
        drawn(sd, "one red star"), before
    )


# -- files ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "part"), [("sd15", "unet"), ("sdxl", "unet"), ("sd35-medium", "transformer")])
def test_a_denoiser_in_one_file_of_a_folders_names(tmp_path, name, part):
    file = tmp_path / "lightning_unet.safetensors"
    (source,) = (TINY / name / part).glob("*.safetensors")
    shutil.copy(source, file)
    sd = nanodiff.load(file, components=str(TINY / name))
    assert torch.equal(drawn(sd), drawn(tiny(name)))
    with pytest.raises(UserError, match=f"a {part} alone, not a pipeline"):
        nanodiff.load(file)
    tensors = load_tensors(file)
    tensors.pop(sorted(tensors)[-1])
    save_file(tensors, tmp_path / "cut.safetensors")
    with pytest.raises(UserError, match=r"cut\.safetensors"):
        nanodiff.load(tmp_path / "cut.safetensors", components=str(TINY / name))


# -- values of another kind -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"quantized": "int4"}, "`quantized` 'int4': is none of None, 'int8', 'nf4'"),
        ({"offload": "modle"}, "`offload` 'modle': is none of 'none', 'model', 'sequential'"),
        ({"dtype": torch.float8_e4m3fn}, "`dtype`"),
        *([] if torch.cuda.is_available() else [({"device": "cuda"}, "`device` cuda: there is none here")]),
    ],
)
def test_options_of_load_that_are_none(options, says):
    with pytest.raises(UserError, match=says):
        tiny(**options)


def test_no_offload_is_none():
    assert not hasattr(tiny(offload=None).net, "resident")
    with pytest.raises(UserError, match="is none of int8, nf4"):
        quantize.apply(tiny().net, "bogus")


PIXELS = torch.zeros(1, 3, 64, 64)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        ({"clip_skip": "1"}, "`clip_skip` '1': expected a whole number"),
        ({"clip_skip": None}, "`clip_skip` None"),
        ({"max_sequence_length": 77.0}, "`max_sequence_length` 77.0"),
        ({"negative_prompt": 5}, "`negative_prompt`"),
        ({"churn": 0.5}, "`churn` 0.5: expected a Churn"),
        ({"controls": None}, "`controls` None"),
        ({"seeds": None, "generators": [None]}, "`generators` None: expected torch.Generators"),
        ({"seeds": None, "generators": [5]}, "`generators` 5"),
        ({"image": Image.new("RGB", (128, 128))}, r"to_pixels\(picture\)\[None\]"),
        ({"image": PIXELS, "height": 64, "width": 64, "mask": Image.new("L", (64, 64))}, "1 where it is repainted"),
    ],
)
def test_settings_of_another_kind(settings, says):
    with pytest.raises(UserError, match=says):
        drawn(tiny(), **settings)


def test_sizes_of_another_kind():
    for bad in (5, (1,), ("a", "b")):
        with pytest.raises(UserError, match=r"`original_size` .*: expected a pair of numbers"):
            drawn(tiny("sdxl"), sizes={"original_size": bad})


def test_what_is_of_the_right_kind():
    sd = tiny()
    assert torch.equal(drawn(sd, negative_prompt=np.array(["a dog"])), drawn(sd, negative_prompt="a dog"))
    generators = (torch.Generator().manual_seed(1) for _ in range(1))
    assert torch.equal(drawn(sd, seeds=None, generators=generators), drawn(sd))
    assert (
        images.to_pixels(Image.new("RGBA", (4, 5))).shape == images.to_pixels(Image.new("L", (4, 5))).shape == (3, 5, 4)
    )
    assert torch.isfinite(drawn(sd.with_scheduler("euler"), churn=Churn(0.5))).all()
    with pytest.raises(UserError, match="decodes no pictures"):
        sd.generate("a", seeds=[1], steps=1, output_type="latent").to_pil()


def test_sizes_of_numpy():
    sd, sizes = tiny("sdxl"), {"original_size": (64, 48)}
    for same in ((np.int64(64), np.float32(48)), np.array([64, 48]), [64, 48.0]):
        assert torch.equal(drawn(sd, sizes={"original_size": same}), drawn(sd, sizes=sizes))


def test_a_prompt_that_was_encoded_before_its_encoder_was_rewritten():
    sd = tiny()
    before = sd.encode(["a"]).states
    for p in sd.text_encoder.parameters():
        p.data.mul_(1.2)
    assert not torch.equal(before, sd.encode(["a"]).states)


@pytest.mark.parametrize(
    ("steps", "strength", "want"),
    [  # every 32nd of diffusers 0.42.1's latents (StableDiffusionImg2ImgPipeline, guidance 5, seed 3)
        (5, 0.8, [-7.64276, 5.69741, -5.90739, 2.98856, -4.93087, -11.8945, -0.91169, 2.75592]),
        (20, 0.95, [-19.02304, 16.34599, -16.06464, 10.03613, -11.57121, -31.66488, -6.44412, 7.21845]),
    ],
)
def test_pndm_from_a_picture_at_its_second_step(steps, strength, want):
    """The guess at the second timestep is made good from the first one, which such a run leaves out."""
    y, x = torch.meshgrid(torch.linspace(-1, 1, 64), torch.linspace(-1, 1, 64), indexing="ij")
    sd = pipeline.load(TINY / "sd15")
    made = sd.generate(
        "a red apple",
        image=torch.stack([x, y, x * y])[None],
        strength=strength,
        steps=steps,
        guidance_scale=5.0,
        seeds=[3],
        height=64,
        width=64,
    )
    assert max_error(made.latents.flatten()[::32], torch.tensor(want)) < 1e-4 * max(map(abs, want))
