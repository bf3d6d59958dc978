"""Pipelines: final latents and pictures equal to the recordings; batches; guidance; refusals; saving."""

import dataclasses
import json

import pytest
import torch
from util import GOLDEN, TINY, copy_model, golden, max_error, rms_ratio

import kernels
from nanodiff import pipeline
from nanodiff.config import UserError
from nanodiff.diffusion import samplers
from nanodiff.diffusion.schedule import Schedule
from nanodiff.output.images import to_uint8
from nanodiff.pipeline import guidance, sources

NAMES = ("sd15", "sd21-v", "sd-turbo", "sdxl", "sdxl-turbo", "sd35-medium", "sd35-large-turbo")
SIZES = ("original_size", "crops_coords_top_left", "target_size")
CASES = sorted(p.stem for p in (GOLDEN / "goldens").glob("*.pipe.*.json"))


@pytest.fixture(scope="module")
def models():
    loaded = {name: pipeline.load(TINY / name) for name in NAMES}
    return loaded | {"sd35-medium.no_t5": pipeline.load(TINY / "sd35-medium", no_t5=True)}


def replay(models, case):
    tensors, facts = golden(case)
    args = facts["args"]
    call = dict(args["call"])
    name = args["pipeline"].split("/")[1]
    base = models[f"{name}.no_t5" if "no_t5" in case else name]
    raw = {k: v for k, v in args["scheduler"].items() if k != "class"}
    schedule = Schedule.from_config(raw, args["scheduler"]["class"])
    sd = type(base)(base.net, base.vae, base.encoders, base.tokenizers, schedule)
    prompts = call.pop("prompt")
    prompts = [prompts] if isinstance(prompts, str) else prompts
    prompts = [p for p in prompts for _ in range(call.pop("num_images_per_prompt", 1))]
    seed = call.pop("seed")
    make = lambda s: torch.Generator().manual_seed(s)  # noqa: E731
    call["generators"] = make(seed) if isinstance(seed, int) else [make(s) for s in seed]
    call["steps"] = call.pop("num_inference_steps")
    call.pop("output_type", None)
    call["sizes"] = {k: call.pop(k) for k in list(call) if k.removeprefix("negative_") in SIZES}
    if "skip_guidance_layers" in call:
        layers, parts = tuple(call.pop("skip_guidance_layers")), ("scale", "start", "stop")
        known = {p: call.pop(f"skip_layer_guidance_{p}") for p in parts if f"skip_layer_guidance_{p}" in call}
        call["skip_layers"] = pipeline.SkipLayers(layers, **known)
    if "input_image" in tensors:
        call["image"] = tensors["input_image"].permute(2, 0, 1)[None].float() / 127.5 - 1
    if "input_mask" in tensors:
        call["mask"] = (tensors["input_mask"].float() >= 127.5).float()[None, None]
    return sd.generate(prompts, call.pop("negative_prompt", None), keep_steps=True, **call), tensors


@pytest.mark.parametrize("case", CASES)
def test_golden(models, case):
    result, want = replay(models, case)
    assert max_error(result.latents, want["final_latents"]) < 1e-4
    if "image" in want:
        off = (to_uint8(result.pixels).int() - want["image"].int()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
    times, each = want["timesteps"].tolist(), want["step_latents"]
    if case.endswith("heun"):  # the reference calls it a step after each network call, we after both
        times, each = times[:1] + times[1::2], torch.cat([each[1:-1:2], each[-1:]])
    assert [s.t for s in result.history] == pytest.approx(times, abs=1e-3)
    for step, latents in zip(result.history, each, strict=True):
        assert max_error(step.x, latents) < 1e-4


def test_first_call_of_the_denoiser(models):
    """What the UNet gets first: scaled latents, unconditional text before conditional."""
    tensors, _ = golden("sd15.pipe.default_pndm")
    seen = []
    unet = models["sd15"].unet
    original = unet.text_kv
    unet.text_kv = lambda context: seen.append(context) or original(context)
    try:
        replay(models, "sd15.pipe.default_pndm")
    finally:
        del unet.text_kv
    assert len(seen) == 1, "the text's keys and values are computed once per run"
    assert max_error(seen[0], tensors["first.encoder_hidden_states"]) < 1e-5


def test_a_picture_of_a_batch_is_the_picture_alone(models):
    sd = models["sd15"]
    prompts = ["a cat", "a dog", "a house"]
    together = sd.generate(prompts, steps=3, seeds=[5, 6, 7], eta=0.0).pixels
    for i, prompt in enumerate(prompts):
        alone = sd.generate([prompt], steps=3, seeds=[5 + i]).pixels
        assert max_error(together[i : i + 1], alone) < 1e-4


@pytest.mark.parametrize("name", ["ddpm", "euler_a", "lcm"])
def test_batches_agree_for_stochastic_samplers(models, name):
    sd = models["sd15"].with_scheduler(name)
    together = sd.generate(["a", "b"], steps=4, seeds=[1, 2]).latents
    alone = sd.generate(["b"], steps=4, seeds=[2]).latents
    assert max_error(together[1:], alone) < 1e-4


@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_no_unconditional_pass_without_guidance(models, scale):
    """S0-02: at 1 (and 0) the network sees one row per picture, and the negative prompt does not matter."""
    sd, rows = models["sd15"].with_scheduler("ddim"), []
    hook = sd.unet.conv_in.register_forward_hook(lambda m, i, o: rows.append(len(i[0])))
    a = sd.generate(["a cat"], "dog", steps=2, guidance_scale=scale, seeds=[1]).latents
    b = sd.generate(["a cat"], None, steps=2, guidance_scale=scale, seeds=[1]).latents
    hook.remove()
    assert rows == [1] * 4 and torch.equal(a, b)


@pytest.mark.parametrize("scale", [3, 5, 7.5, 10, 15])
def test_guidance_changes_the_picture(models, scale):
    sd = models["sd15"].with_scheduler("ddim")
    base = sd.generate(["a cat"], steps=2, guidance_scale=1.0, seeds=[1]).latents
    assert not torch.allclose(sd.generate(["a cat"], steps=2, guidance_scale=scale, seeds=[1]).latents, base)


def test_negative_prompt_matters_and_repeats(models):
    """S3-18"""
    sd = models["sd15"].with_scheduler("ddim")
    a, b, c = (sd.generate(["a cat"], n, steps=2, seeds=[1]).latents for n in (None, "blurry", "blurry"))
    assert torch.equal(b, c) and not torch.allclose(a, b)


def test_fp16_vae_overflow_is_retried_in_fp32(capsys):
    sd = pipeline.load(TINY / "sd15", torch.bfloat16)
    decode, calls = sd.vae.decode, []

    def overflow(latents):
        calls.append(latents.dtype)
        return decode(latents) * (float("inf") if latents.dtype == torch.bfloat16 else 1)

    sd.vae.decode = overflow
    assert torch.isfinite(sd.generate(["a"], steps=1, seeds=[0]).pixels).all()
    assert calls == [torch.bfloat16, torch.float32] and "again in fp32" in capsys.readouterr().err


def test_no_black_picture_is_made_of_nan(models):
    sd = pipeline.load(TINY / "sd15")
    sd.unet.conv_out.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match="not finite"):
        sd.generate(["a"], steps=1, seeds=[0])


@pytest.mark.parametrize(
    ("part", "change", "says"),
    [
        ("unet", {"in_channels": 8}, "8 channels in and 4 out"),
        ("unet", {"cross_attention_dim": 48}, "text of width 48"),
        ("vae", {"latent_channels": 16}, "latents have 16"),
        ("text_encoder", {"max_position_embeddings": 20}, "77 tokens"),
        ("text_encoder", {"vocab_size": 500}, "of 500"),
    ],
)
def test_parts_of_different_models_are_named(models, part, change, says):
    import copy

    sd = models["sd15"]
    parts = {"unet": sd.unet, "vae": sd.vae, "text_encoder": sd.text_encoder}
    parts[part] = copy.copy(parts[part])
    parts[part].cfg = dataclasses.replace(parts[part].cfg, **change)
    with pytest.raises(UserError, match=says):
        pipeline.Pipeline(*parts.values(), sd.tokenizer, sd.schedule)


@pytest.mark.parametrize(("name", "options"), [("pndm", {"eta": 1.0}), ("euler", {"quirks": True})])
def test_settings_that_do_nothing_are_refused(models, name, options):
    with pytest.raises(UserError, match=next(iter(options))):
        models["sd15"].with_scheduler(name).generate(["a"], steps=1, seeds=[0], **options)


def test_zero_snr_models_refuse_samplers_that_do_not_know_it(models):
    sd = models["sd21-v"]
    schedule = Schedule.from_config(sd.schedule.raw | {"rescale_betas_zero_snr": True})
    for name in ("pndm", "heun"):
        with pytest.raises(UserError, match="zero terminal SNR"):
            samplers.rescheduled(schedule, name)
    assert samplers.rescheduled(schedule, "euler").alphas_cumprod[-1] == 2**-24


def test_vae_encode_overflow_is_retried_too(capsys):
    sd = pipeline.load(TINY / "sd15", torch.bfloat16)
    encode = sd.vae.encode
    sd.vae.encode = lambda p, n: encode(p, n) * (float("inf") if p.dtype == torch.bfloat16 else 1)
    result = sd.generate(["a"], steps=2, seeds=[0], image=torch.zeros(1, 3, 128, 128), strength=0.5)
    assert torch.isfinite(result.pixels).all() and "again in fp32" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", [torch.bfloat16])
def test_half_precision_is_near(models, dtype):
    sd = pipeline.load(TINY / "sd15", dtype).with_scheduler("ddim")
    got = sd.generate(["a cat"], steps=3, seeds=[1], guidance_scale=3.0).latents
    want = models["sd15"].with_scheduler("ddim").generate(["a cat"], steps=3, seeds=[1], guidance_scale=3.0).latents
    assert torch.isfinite(got).all() and max_error(got, want) < 0.2


def test_long_prompts_say_what_is_cut(models, capsys):
    models["sd15"].generate(["word " * 100 + "finish"], steps=1, seeds=[0])
    err = capsys.readouterr().err
    assert "over 75 tokens" in err and "finish" in err


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"steps": 0}, "steps"),
        ({"steps": 5000}, "steps"),
        ({"height": 100}, "height"),
        ({"width": -8}, "width"),
        ({"clip_skip": 9}, "`clip_skip`"),
        ({"mask": torch.ones(1, 1, 8, 8)}, "`mask` needs `image`"),
        ({"image": torch.zeros(1, 3, 128, 128), "strength": 0.0}, "strength"),
        ({"image": torch.zeros(1, 3, 128, 128), "strength": 0.1, "steps": 3}, "no step"),
    ],
)
def test_refusals(models, options, says):
    with pytest.raises(UserError, match=says):
        models["sd15"].generate(["a"], seeds=[0], **({"steps": 2} | options))


@pytest.mark.parametrize("name", [n for n in samplers.SAMPLERS if not n.startswith("flow")])
def test_every_sampler_repaints_inside_the_mask_only(models, name):
    sd = models["sd15"].with_scheduler(name)
    image, mask = torch.rand(1, 3, 128, 128) * 2 - 1, torch.zeros(1, 1, 128, 128)
    mask[..., :64] = 1
    result = sd.generate(["a"], steps=4, seeds=[0], image=image, mask=mask, strength=0.5)
    generator = torch.Generator().manual_seed(0)
    noise = pipeline.Noise([generator], (1, 4, 16, 16), "cpu", torch.float32)
    kept = sd.encode_pixels(image, noise)
    assert torch.equal(result.latents[..., 8:], kept[..., 8:]) and not torch.equal(
        result.latents[..., :8], kept[..., :8]
    )


def test_inpainting_at_strength_1_forgets_what_is_under_the_mask(models):
    sd = models["sd15"].with_scheduler("ddim")
    mask, results = torch.ones(1, 1, 128, 128), []
    for seed in (1, 2):
        image = torch.rand(1, 3, 128, 128, generator=torch.Generator().manual_seed(seed)) * 2 - 1
        results.append(sd.generate(["a"], steps=2, seeds=[0], image=image, mask=mask, strength=1.0).latents)
    assert torch.equal(results[0], results[1])
    half = sd.generate(["a"], steps=2, seeds=[0], image=image, mask=mask, strength=0.5).latents
    assert not torch.allclose(half, results[1])


def test_save_and_load_give_the_same_picture(models, tmp_path):
    sd = models["sd21-v"]
    sd.save(tmp_path / "copy")
    again = pipeline.load(tmp_path / "copy")
    a, b = (p.generate(["a cat"], steps=2, seeds=[3]).latents for p in (sd, again))
    assert torch.equal(a, b)
    assert again.tokenizer(["!"]) == sd.tokenizer(["!"])


def test_pixel_space_needs_no_vae(models, tmp_path):
    """S1-32: pictures of a pixel-space model are not divided by a latent scale."""
    from nanodiff.models.unet import Config, UNet2DConditionModel

    base = models["sd15"]
    cfg = Config.from_json(
        json.loads((TINY / "sd15" / "unet" / "config.json").read_text()) | {"in_channels": 3, "out_channels": 3}
    )
    sd = pipeline.Pipeline(UNet2DConditionModel(cfg).eval(), None, base.text_encoder, base.tokenizer, base.schedule)
    sd.save(tmp_path / "pixel")
    again = pipeline.load(tmp_path / "pixel")
    assert again.vae is None and again.downscale == 1
    result = again.generate(["a"], steps=2, seeds=[0])
    assert torch.equal(result.pixels, result.latents) and result.pixels.shape == (1, 3, 16, 16)


def test_turbo_is_recognised(models):
    assert models["sd-turbo"].turbo and not models["sd15"].turbo and not models["sd15"].with_scheduler("euler").turbo


def test_the_safety_checker_is_not_needed(tmp_path):
    """S0-08: SD 1.4's index names one; its folder may be absent."""
    folder = copy_model("sd15", tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    index |= {"safety_checker": ["stable_diffusion", "StableDiffusionSafetyChecker"]}
    index |= {"feature_extractor": ["transformers", "CLIPImageProcessor"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    assert pipeline.load(folder).unet is not None


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-3), (torch.float16, 0.1), (torch.bfloat16, 0.3)])
def test_on_a_gpu(dtype, bound):
    """The same noise, so the same picture, up to the type's rounding."""
    want = (
        pipeline.load(TINY / "sd15").with_scheduler("ddim").generate(["a cat"], steps=3, seeds=[1], guidance_scale=3.0)
    )
    sd = pipeline.load(TINY / "sd15", dtype, "cuda").with_scheduler("ddim")
    got = sd.generate(["a cat"], steps=3, seeds=[1], guidance_scale=3.0)
    assert max_error(got.latents.cpu(), want.latents) < bound


@pytest.mark.parametrize(
    ("change", "says"),
    [
        ({"_class_name": "KandinskyPipeline"}, "KandinskyPipeline"),
        ({"../x": ["diffusers", "AutoencoderKL"]}, "../x"),
        ({"unet": ["evil_module", "Anything"]}, "unet"),
        ({"unet": [None, None]}, "has no unet"),
        ({"controlnet": ["diffusers", "ControlNetModel"]}, "controlnet"),
    ],
)
def test_model_index_is_data(tmp_path, change, says):
    folder = copy_model("sd15", tmp_path / "m")
    index = json.loads((folder / "model_index.json").read_text())
    (folder / "pipeline.py").write_text("raise SystemExit('code of a repository ran')")
    (folder / "model_index.json").write_text(json.dumps(index | change))
    with pytest.raises(UserError, match=says):
        pipeline.load(folder)


def test_one_component_stands_in_for_a_pipelines_own(models, tmp_path):
    """A UNet trained alone (`--model unet_folder --components pipeline`), and what is no such component."""
    import shutil

    from nanodiff import weights

    shutil.copytree(TINY / "sd15" / "unet", tmp_path / "unet")
    file = tmp_path / "unet" / "diffusion_pytorch_model.safetensors"
    state = weights.load_tensors(file)
    state["conv_out.bias"] += 1.0
    weights.save_tensors(file, state)
    sd = pipeline.load(tmp_path / "unet", components=TINY / "sd15")
    assert torch.equal(sd.unet.conv_out.bias, state["conv_out.bias"].float())
    assert torch.equal(sd.vae.decoder.conv_in.weight, models["sd15"].vae.decoder.conv_in.weight)
    with pytest.raises(UserError, match="`components`"):
        pipeline.load(tmp_path / "unet")
    with pytest.raises(UserError, match="belongs to SDXL"):
        pipeline.load(TINY / "sdxl" / "unet", components=TINY / "sd15")
    with pytest.raises(UserError, match="has none"):
        pipeline.load(TINY / "sd35-medium" / "transformer", components=TINY / "sd15")
    with pytest.raises(UserError, match="stand in place"):
        pipeline.load(TINY / "sd15" / "text_encoder", components=TINY / "sd15")


def test_kept_prompts_wait_on_the_cpu(models):
    sd = models["sdxl"]
    sd.encode(["a kept prompt"])
    assert all(t.states.device.type == "cpu" for t in sd.kept.values())


def test_saved_text_encoders_have_the_names_of_transformers(models, tmp_path):
    models["sd35-medium"].save(tmp_path / "m")
    for name in ("text_encoder", "text_encoder_2", "text_encoder_3"):
        assert (tmp_path / "m" / name / "model.safetensors").exists()
    again = pipeline.load(tmp_path / "m")
    a, b = (sd.generate(["a cat"], steps=1, seeds=[0]).latents for sd in (models["sd35-medium"], again))
    assert max_error(b, a) < 1e-5


def test_a_tokenizer_too_large_for_t5_is_named(models):
    import copy

    sd = models["sd35-medium"]
    encoders = [*sd.encoders[:2], copy.copy(sd.encoders[2])]
    encoders[2].cfg = dataclasses.replace(encoders[2].cfg, vocab_size=100)
    with pytest.raises(UserError, match="tokenizer_3"):
        pipeline.SD3(sd.net, sd.vae, encoders, sd.tokenizers, sd.schedule)


@pytest.mark.parametrize(("name", "part"), [("sd35-medium", "transformer"), ("sd35-medium", "text_encoder_3")])
def test_absurd_depths_are_refused_at_once(name, part, tmp_path):
    folder = copy_model(name, tmp_path / "m")
    path = folder / part / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"num_layers": 10_000_000}))
    with pytest.raises(UserError, match="num_layers"):
        pipeline.load(folder)


def test_skip_layers_follow_the_steps_whatever_the_sampler_asks(models):
    """Heun asks twice a step: the window of skip-layer guidance is still one of steps."""
    sd, asked = models["sd35-medium"], {}
    for name in ("flow_euler", "flow_heun"):
        asked[name] = []

        def blind(m, args, out, name=name):
            if len(args) > 4:  # the pass without some blocks
                asked[name].append(round(float(args[1]), 3))

        hook = sd.net.register_forward_hook(blind)
        skip = pipeline.SkipLayers((1,), start=0.1, stop=0.5)
        options = {"guidance_scale": 4.0, "skip_layers": skip, "max_sequence_length": 16}
        sd.with_scheduler(name).generate(["a"], steps=8, seeds=[0], **options)
        hook.remove()
    assert len(set(asked["flow_euler"])) == len(asked["flow_euler"]) == 3  # steps 1, 2, 3 of 8
    assert set(asked["flow_heun"]) == set(asked["flow_euler"])


def test_unknown_words_are_an_error(models):
    with pytest.raises(TypeError, match="promt_2"):
        models["sdxl"].generate(["a"], steps=1, seeds=[0], promt_2="b")


def test_a_text_encoder_out_of_a_whole_clip(tmp_path):
    """The Hub's CLIP repositories hold both towers in one file, and the text's settings inside the config."""
    import json
    import shutil

    from nanodiff.weights import load_tensors, save_tensors

    source = TINY / "sd15"
    raw = json.loads((source / "text_encoder" / "config.json").read_text())
    (file,) = (source / "text_encoder").glob("*.safetensors")
    tensors = load_tensors(file)
    width = raw["hidden_size"]
    more = {"vision_model.embeddings.class_embedding": torch.zeros(3), "visual_projection.weight": torch.zeros(2, 3),
            "logit_scale": torch.tensor(4.6), "text_projection.weight": torch.randn(7, width)}  # fmt: skip
    shutil.copytree(source / "tokenizer", tmp_path, dirs_exist_ok=True)
    save_tensors(tmp_path / "model.safetensors", tensors | more)
    (tmp_path / "config.json").write_text(json.dumps({"text_config": raw, "vision_config": {}, "projection_dim": 7}))
    ids = torch.tensor([[998, 5, 9, 999]])
    want, _ = sources.load_text(source, torch.float32, "cpu")
    got, tokenizer = sources.load_text(tmp_path, torch.float32, "cpu")
    assert torch.equal(got(ids)[0][-1], want(ids)[0][-1])
    assert tokenizer(["a cat"])[0][0] == 998
    projected, _ = sources.load_text(tmp_path, torch.float32, "cpu", projection=True)
    assert projected(ids)[1].shape == (1, 7)
    with pytest.raises(UserError, match="has no text_projection"):
        sources.load_text(source, torch.float32, "cpu", projection=True)


# Replayed steps --------------------------------------------------------------------------------------------


def test_when_steps_are_replayed(monkeypatch):
    """Never unless asked; "auto" on a GPU for small batches; anew where the weights lie elsewhere or a LoRA's scale changed."""
    sd = pipeline.load(TINY / "sd15", torch.float32, "cpu")
    assert sd.replayed(2) is None
    sd.replays = "auto"
    assert sd.replayed(2) is None, "there is no GPU"
    monkeypatch.setattr(pipeline.Pipeline, "device", torch.device("cuda"))
    first = sd.replayed(2)
    assert (
        first is not None
        and sd.replayed(guidance.LAUNCH_BOUND) is first
        and sd.replayed(guidance.LAUNCH_BOUND + 1) is None
    )
    assert sd.with_scheduler("ddim").recorded is sd.recorded
    sd.net.conv_in.weight.data = sd.net.conv_in.weight.data.clone()
    second = sd.replayed(2)
    assert second is not first and len(sd.recorded) == 1
    with torch.no_grad():
        sd.net.conv_in.weight.mul_(1.01)  # as EMA does: what was derived from it is another
    assert sd.replayed(2) is not second
    with kernels.backend("torch"):
        other = sd.replayed(2)
    assert sd.replayed(2) is not other, "a recording is of one kind of kernel"
    second = sd.replayed(2)

    class Beside:
        scale = 1.0

        def add(self, module, args, out):
            return out * self.scale

    beside = Beside()
    sd.net.conv_in.register_forward_hook(beside.add)
    third = sd.replayed(2)
    assert third is not second and sd.replayed(2) is third
    beside.scale = 0.5
    assert sd.replayed(2) is not third
    assert any(beside is owner for _, (*_, owners), *_ in sd.recorded for owner, _ in owners), (
        "held, so that no other gets its address"
    )
    sd.net.resident = object()
    assert sd.replayed(2) is None, "weights that come and go"


@pytest.mark.parametrize("name", ["sd15", "sdxl"])
@pytest.mark.parametrize("scheduler", ["ddim", "heun", "ddpm"])
def test_shifts_of_a_run(name, scheduler, monkeypatch):
    """What a GPU takes in place of the time gives the same picture, whatever times a sampler asks for."""
    sd = pipeline.load(TINY / name, torch.float32, "cpu").with_scheduler(scheduler)
    assert sd.shifts([1.0, 2.0]) == {}, "a GPU's alone"
    want, used = sd.generate(["a corgi"], steps=4, seeds=[1], height=64, width=64).latents, []

    def shifts(self, times, added=None):
        times = sorted({float(t) for t in times})
        made = self.net.shifts(torch.tensor(times), added).chunk(len(times))
        used.extend(times)
        return dict(zip(times, made, strict=True))

    monkeypatch.setattr(pipeline.Pipeline, "shifts", shifts)
    got = sd.generate(["a corgi"], steps=4, seeds=[1], height=64, width=64).latents
    assert len(used) >= 4 and rms_ratio(got, want) < 1e-4


# The library as a library ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("prompts", "more", "says"),
    [
        (["a", "b"], {"seeds": [0]}, "2 prompts and 1 seeds"),
        ("a", {"seeds": [0, 1]}, "1 prompts and 2 seeds"),
        (["a", "b"], {"negative_prompt": ["x", "y", "z"], "guidance_scale": 3.0}, "3 texts for 2 pictures"),
        (["a", "b"], {"generators": [torch.Generator()]}, "2 prompts and 1 seeds"),
    ],
)
def test_unequal_numbers_are_refused(models, prompts, more, says):
    """They gave blends that are nobody's picture."""
    with pytest.raises(UserError, match=says):
        models["sd15"].generate(prompts, steps=1, **more)


def test_a_text_is_a_batch_of_one_and_settings_come_either_way(models):
    sd = models["sd15"]
    want = sd.generate(["a cat"], steps=2, seeds=[0], guidance_scale=3.0).latents
    given = pipeline.Drawing(steps=2, guidance_scale=3.0)
    for made in (sd.generate("a cat", None, given), sd.generate("a cat", num_inference_steps=2, cfg_scale=3.0)):
        assert torch.equal(made.latents, want)
    assert "unet" in repr(sd) and "1 pictures of 128x128" in repr(made)


def test_forms_of_a_result(models):
    made = models["sd15"].generate(["a", "b"], steps=1, output_type="np")
    assert made.images.shape == (2, 128, 128, 3) and 0 <= made.images.min() <= made.images.max() <= 1
    assert [p.size for p in made.to_pil()] == [(128, 128)] * 2
    with pytest.raises(UserError, match="`output_type` jpeg"):
        models["sd15"].generate("a", steps=1, output_type="jpeg")


def test_a_sampler_of_ones_own(models):
    """A function in place of the schedule's sampler: here its own, counted."""
    sd, asked = models["sd15"].with_scheduler("ddim"), []

    def mine(model, x, schedule, n, noise, start=0):
        for step in samplers.ddim(model, x, schedule, n, noise, start):
            asked.append(step.t)
            yield step

    made = sd.generate("a cat", steps=3, sampler=mine)
    assert len(asked) == 3 and torch.equal(made.latents, sd.generate("a cat", steps=3).latents)


def test_steps_and_guidance_have_one_answer(models):
    """What is given, else what the folder says, else what the family was made for; a turbo without guidance."""
    embedded = pipeline.load()
    assert (
        embedded.settings() == (25, 3.0)
        and embedded.settings(7, 1.5) == (7, 1.5)
        and embedded.settings(None, 0.0) == (25, 0.0)
    )
    assert models["sd15"].settings() == (50, 7.5) and models["sd-turbo"].settings() == (1, 0.0)
    assert models["sd35-medium"].settings() == (40, 4.5) and models["sdxl-turbo"].settings() == (1, 0.0)
