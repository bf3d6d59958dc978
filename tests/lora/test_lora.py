"""LoRA files: recordings in every dialect, beside the weights and fused; real files; what must be refused."""

import copy
import json
import shutil
import zlib

import pytest
import torch
from util import GOLDEN, PIPELINE, ROOT, TINY, error_line, golden, manifest, max_error, rms_ratio, run

from nanodiff import lora, pipeline, weights
from nanodiff.config import UserError
from nanodiff.device import memory, quantize
from nanodiff.models.unet import UNet2DConditionModel

CASES = sorted(p.stem for p in (GOLDEN / "goldens").glob("*.lora.*.json") if "gradient" not in p.stem)
FILES = GOLDEN / "lora"
REAL = ROOT.parent / "shared" / "real" / "lora"


@pytest.fixture
def sd15():
    return pipeline.load(TINY / "sd15")


def state(models):
    return {f"{n}.{k}": v.clone() for n, m in models.items() for k, v in m.state_dict().items()}


@pytest.mark.parametrize("use", [lora.attach, lora.fuse])
@pytest.mark.parametrize("case", CASES)
def test_golden(case, use):
    tensors, facts = golden(case)
    args = facts["args"]
    sd = pipeline.load(TINY / args["pipeline"].split("/")[1])
    models, before = sd.models(), state(sd.models())
    used = [use(models, lora.read(GOLDEN / f["file"], models), f["scale"]) for f in args["lora"]]
    added = (tensors["text_embeds"], tensors["time_ids"]) if "time_ids" in tensors else None
    got = sd.net(tensors["sample"], tensors["timestep"], tensors["encoder_hidden_states"], added)
    assert max_error(got, tensors["out.unet"]) < 1e-5
    for name, encoder in zip(sd.encoder_names, sd.encoders, strict=True):
        states, _ = encoder(tensors["input_ids"])
        assert max_error(states[-2], tensors[f"out.{name}"]) < 1e-5
        assert max_error(encoder.final_norm(states[-1]), tensors[f"out.{name}.last"]) < 1e-5
    call = args["call"]
    result = sd.generate(
        [call["prompt"]], steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"], seeds=[call["seed"]]
    )
    assert max_error(result.latents, tensors["final_latents"]) < 1e-4
    for one in reversed(used):
        one.remove()
    after = state(models)
    assert all(torch.equal(before[k], after[k]) for k in before), "unfusing is exact"


def test_gradients_are_pefts():
    """adapt() against peft inside diffusers: output and gradients, linear and convolution, one layer of another rank."""
    tensors, facts = golden("sd15.lora.gradient")
    args = facts["args"]

    def drawn(name, shape):
        return 0.1 * torch.randn(shape, generator=torch.Generator().manual_seed(zlib.crc32(name.encode())))

    net = pipeline.load(TINY / "sd15").net
    # peft gives a layer of rank_pattern the same alpha, so another strength
    n = lora.adapt(net, args["rank"], args["alpha"], tuple(args["targets"]), "unet", rank_pattern=args["rank_pattern"])
    assert 2 * n == facts["adapters"]
    mine = {k.removesuffix(".weight"): p for k, p in net.named_parameters() if ".lora_" in k}
    for name, p in mine.items():
        p.data = drawn(name, p.shape)
    x, states = 10 * drawn("x", (2, 4, 8, 8)), 10 * drawn("states", (2, 7, 32))
    got = net.train()(x, torch.tensor([10, 700]), states)
    assert max_error(got, tensors["sample"]) < 1e-5
    got.pow(2).mean().backward()
    kept = {k.removeprefix("grad."): v for k, v in tensors.items() if k.startswith("grad.")}
    assert len(kept) == 8
    for name, gradient in kept.items():
        assert max_error(mine[name].grad, gradient) < 1e-4, name
    others = torch.stack([p.grad.norm() for k, p in mine.items() if k not in kept]).norm()
    assert max_error(others, tensors["norm_of_the_others"]) < 1e-4
    assert all(p.grad is None for k, p in net.named_parameters() if ".lora_" not in k)


def dialect(models, targets, name_of, alpha=None, rank=3, seed=0):
    """(tensors of a LoRA file, {target: what it adds to the weight}) with names from name_of(component, path, part)."""
    g, tensors, deltas = torch.Generator().manual_seed(seed), {}, {}
    for component, path in targets:
        weight = models[component].get_submodule(path).weight
        down = torch.randn(rank, *weight.shape[1:], generator=g)
        up = torch.randn(weight.shape[0], rank, *[1] * (weight.dim() - 2), generator=g)
        tensors[name_of(component, path, "down")] = down
        tensors[name_of(component, path, "up")] = up
        if alpha is not None:
            tensors[name_of(component, path, "alpha")] = torch.tensor(float(alpha))
        scale = 1.0 if alpha is None else alpha / rank
        deltas[component, path] = scale * (up.flatten(1) @ down.flatten(1)).view(weight.shape)
    return tensors, deltas


def peft(component, path, part):
    return f"{component}.{path}." + {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}[part]


def peft_default(component, path, part):
    return f"{component}.{path}." + {"down": "lora_A.default.weight", "up": "lora_B.default.weight"}[part]


def diffusers(component, path, part):
    return f"{component}.{path}.lora.{part}.weight"


def processor(component, path, part):
    head, _, layer = path.removesuffix(".0").rpartition(".")
    return f"{component}.{head}.processor.{layer}_lora.{part}.weight"


def text_linear(component, path, part):
    return f"{component}.{path}.lora_linear_layer.{part}.weight"


def kohya(component, path, part):
    prefix = {"unet": "lora_unet_", "text_encoder": "lora_te_", "transformer": "lora_unet_"}[component]
    return (
        prefix
        + path.replace(".", "_")
        + {"down": ".lora_down.weight", "up": ".lora_up.weight", "alpha": ".alpha"}[part]
    )


BLOCK = "down_blocks.0.attentions.0.transformer_blocks.0"
ATTENTION = [("unet", f"{BLOCK}.attn1.to_q"), ("unet", f"{BLOCK}.attn2.to_out.0")]
ALL = [
    *ATTENTION,
    ("unet", f"{BLOCK}.ff.net.0.proj"),
    ("unet", "down_blocks.0.attentions.0.proj_in"),  # 1×1 convolution
    ("unet", "down_blocks.0.resnets.0.conv1"),  # 3×3
    ("unet", "down_blocks.0.downsamplers.0.conv"),  # 3×3 with stride
    ("unet", "mid_block.resnets.0.time_emb_proj"),
    ("text_encoder", "text_model.encoder.layers.1.mlp.fc1"),
]
TEXT = [("text_encoder", "text_model.encoder.layers.0.self_attn.q_proj")]


@pytest.mark.parametrize(
    ("name_of", "targets", "alpha"),
    [
        (peft, ALL, None),
        (peft_default, ALL, None),
        (diffusers, ALL, None),
        (processor, ATTENTION, None),
        (text_linear, TEXT, None),
        (kohya, ALL, 1.0),
        (kohya, ALL, 6.0),
    ],
)
def test_dialects_change_exactly_their_weights(sd15, tmp_path, name_of, targets, alpha):
    models = sd15.models()
    tensors, deltas = dialect(models, targets, name_of, alpha)
    weights.save_tensors(tmp_path / "lora.safetensors", tensors)
    before, found = state(models), lora.read(tmp_path / "lora.safetensors", models)
    lora.fuse(models, found, 0.5)
    after = state(models)
    for key in before:
        component, _, rest = key.partition(".")
        delta = deltas.get((component, rest.removesuffix(".weight"))) if rest.endswith(".weight") else None
        if delta is None:
            assert torch.equal(before[key], after[key]), key
        else:
            assert max_error(after[key], before[key] + 0.5 * delta) < 1e-6, key


def test_attached_is_fused_also_for_convolutions(sd15, tmp_path):
    models = sd15.models()
    tensors, _ = dialect(models, ALL, kohya, 2.0)
    weights.save_tensors(tmp_path / "lora.safetensors", tensors)
    found = lora.read(tmp_path / "lora.safetensors", models)
    x, text = torch.randn(2, 4, 11, 8), torch.randn(2, 77, 32)  # an odd size: strides and borders matter
    plain = sd15.net(x, 5, text)
    attached = lora.attach(models, found, 0.3)
    beside = sd15.net(x, 5, text)
    with pytest.raises(UserError, match="a LoRA runs beside the model's weights"):
        sd15.save(tmp_path / "saved")
    assert not (tmp_path / "saved").exists()
    attached.scale = 0.0
    sd15.save(tmp_path / "saved")  # a silent one changes nothing
    assert max_error(sd15.net(x, 5, text), plain) < 1e-6
    attached.remove()
    lora.fuse(models, found, 0.3)
    assert max_error(beside, sd15.net(x, 5, text)) < 1e-5 and not torch.allclose(beside, plain, atol=1e-3)


def test_prompts_that_are_kept_notice_a_lora_of_the_text_encoder(sd15, tmp_path):
    """Beside the weights, at another scale, taken away, fused, and taken out again; and weights that were written. What is the same is encoded once."""
    models, encoder = sd15.models(), sd15.text_encoder
    tensors, _ = dialect(models, ALL[-1:], kohya, 2.0)
    weights.save_tensors(tmp_path / "lora.safetensors", tensors)
    found = lora.read(tmp_path / "lora.safetensors", models)
    calls = []
    encoder.register_forward_hook(lambda *_: calls.append(1))
    said = lambda: sd15.encode(["a fox"]).states  # noqa: E731
    plain = said()
    assert torch.equal(said(), plain) and len(calls) == 1
    attached = lora.attach(models, found, 0.5)
    half = said()
    assert not torch.allclose(half, plain, atol=1e-3) and torch.equal(said(), half) and len(calls) == 2
    attached.scale = 1.0
    whole = said()
    assert not torch.allclose(whole, half, atol=1e-3)
    attached.remove()
    assert torch.equal(said(), plain)
    fused = lora.fuse(models, found, 0.5)
    assert max_error(said(), half) < 1e-5
    fused.remove()
    assert torch.equal(said(), plain)
    with torch.no_grad():
        encoder.text_model.final_layer_norm.weight.mul_(2)
    assert not torch.allclose(said(), plain, atol=1e-3)


def test_sd3_fused_qkv_of_kohya(tmp_path):
    """`joint_blocks_0_x_block_attn_qkv` is three of our layers with one `down`; dotted names work too."""
    sd = pipeline.load(TINY / "sd35-medium")
    models, D, r = sd.models(), sd.net.cfg.width, 4
    down, up = torch.randn(r, D), torch.randn(3 * D, r)
    tensors = {
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_down.weight": down,
        "lora_unet_joint_blocks_0_x_block_attn_qkv.lora_up.weight": up,
        "lora_unet_joint_blocks_1_context_block_mlp_fc1.lora_down.weight": torch.randn(r, D),
        "lora_unet_joint_blocks_1_context_block_mlp_fc1.lora_up.weight": torch.randn(4 * D, r),
        "transformer.transformer_blocks.2.attn.to_k.lora_A.weight": torch.randn(r, D),
        "transformer.transformer_blocks.2.attn.to_k.lora_B.weight": torch.randn(D, r),
    }
    weights.save_tensors(tmp_path / "lora.safetensors", tensors)
    before = state(models)
    lora.fuse(models, lora.read(tmp_path / "lora.safetensors", models))
    after = state(models)
    for i, name in enumerate(("to_q", "to_k", "to_v")):
        key = f"transformer.transformer_blocks.0.attn.{name}.weight"
        assert max_error(after[key] - before[key], up.chunk(3)[i] @ down) < 1e-5
    changed = {k for k in before if not torch.equal(before[k], after[k])}
    assert len(changed) == 5 and "transformer.transformer_blocks.1.ff_context.net.0.proj.weight" in changed


def test_alpha_of_an_adapter_folder(sd15, tmp_path):
    """PEFT's folder form: alpha, its patterns and rank-stabilised scaling stand in adapter_config.json."""
    models = sd15.models()
    tensors, deltas = dialect(
        models, ATTENTION, lambda c, p, part: "base_model.model." + peft(c, p, part).partition(".")[2], rank=4
    )
    weights.save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    for config, scales in (
        ({"r": 4, "lora_alpha": 32}, (8.0, 8.0)),
        ({"r": 4, "lora_alpha": 32, "use_rslora": True}, (16.0, 16.0)),
        ({"r": 4, "lora_alpha": 4, "alpha_pattern": {"attn1.to_q": 2}}, (0.5, 1.0)),
    ):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config))
        found = lora.read(tmp_path, models)
        assert tuple(d.scale for d in sorted(found.deltas, key=lambda d: d.module)) == scales
        for d in found.deltas:
            want = deltas[d.component, d.module] * d.scale
            assert max_error(d.matrix(want.shape), want) < 1e-6


def test_beside_quantized_weights_and_one_block_at_a_time(sd15):
    """Attached LoRAs do not touch the weights, so those may be quantized or elsewhere; fusing is refused."""
    path, prompt = FILES / "sd15.kohya.safetensors", ["a cat"]
    small = pipeline.load(TINY / "sd15", quantized="int8")
    found = lora.read(path, small.models())
    with pytest.raises(UserError, match="quantized"):
        lora.fuse(small.models(), found)
    lora.attach(sd15.models(), found, 0.7)
    lora.attach(small.models(), found, 0.7)
    x, text = torch.randn(2, 4, 16, 16), torch.randn(2, 77, 32)
    assert rms_ratio(small.net(x, 500, text), sd15.net(x, 500, text)) < 0.05
    want = sd15.generate(prompt, steps=2, seeds=[0], guidance_scale=3.0).latents
    away = pipeline.load(TINY / "sd15", offload="sequential")
    lora.attach(away.models(), found, 0.7)
    assert max_error(away.generate(prompt, steps=2, seeds=[0], guidance_scale=3.0).latents, want) < 1e-5
    assert memory.whole(sd15.net) and not memory.whole(away.net)


@pytest.mark.parametrize("offload", ["model", "sequential"])
def test_fused_into_weights_that_are_at_home(sd15, offload):
    away = pipeline.load(TINY / "sd15", offload=offload)
    for sd in (sd15, away):
        lora.fuse(sd.models(), lora.read(FILES / "sd15.peft.safetensors", sd.models()), 0.7)
    a, b = (sd.generate(["a cat"], steps=2, seeds=[0]).latents for sd in (sd15, away))
    assert max_error(b, a) < 1e-5


# -- refusals -------------------------------------------------------------------------------------------------


def refuse(models, tmp_path, tensors, says, **options):
    weights.save_tensors(tmp_path / "x.safetensors", {k: v.clone() for k, v in tensors.items()})
    with pytest.raises(UserError, match=says):
        lora.read(tmp_path / "x.safetensors", models, **options)


@pytest.mark.parametrize(
    ("key", "says"),
    [
        ("unet.x.dora_scale", "DoRA"),
        ("unet.x.lora_magnitude_vector", "DoRA"),
        ("lora_unet_x.hada_w1_a", "LoHa"),
        ("lora_unet_x.lokr_w1", "LoKr"),
        ("lora_unet_x.oft_blocks", "OFT"),
        ("lora_unet_x.lora_mid.weight", "Tucker"),
        ("lora_unet_x.diff", "full weight"),
        ("unet:0:down", "cloneofsimo"),
    ],
)
def test_other_methods_are_refused_by_name(sd15, tmp_path, key, says):
    good = weights.load_tensors(FILES / "sd15.peft.safetensors")
    refuse(sd15.models(), tmp_path, good | {key: torch.zeros(2)}, says)


def test_unknown_layers_are_listed_and_can_be_left_out(sd15, tmp_path, capsys):
    good = weights.load_tensors(FILES / "sd15.peft.safetensors")
    odd = {
        "unet.down_blocks.9.nowhere.lora_A.weight": torch.zeros(4, 4),
        "unet.down_blocks.9.nowhere.lora_B.weight": torch.zeros(4, 4),
    }
    refuse(sd15.models(), tmp_path, good | odd, r"down_blocks\.9\.nowhere")
    refuse(sd15.models(), tmp_path, good | {"strange": torch.zeros(1)}, "strange")
    found = lora.read(tmp_path / "x.safetensors", sd15.models(), allow_partial=True)
    assert found.skipped == ["strange"] and "strange" in capsys.readouterr().err
    refuse(sd15.models(), tmp_path, odd, "no layer", allow_partial=True)


def test_a_lora_of_another_family(sd15):
    with pytest.raises(UserError, match="another family"):
        lora.read(FILES / "sdxl.kohya.safetensors", sd15.models())
    sdxl = pipeline.load(TINY / "sdxl")
    with pytest.raises(UserError, match="another family"):
        lora.read(FILES / "sd15.peft.safetensors", sdxl.models())


def test_broken_layers(sd15, tmp_path):
    models, name = sd15.models(), f"unet.{BLOCK}.attn1.to_q"
    down, up = torch.zeros(4, 16), torch.zeros(16, 4)
    refuse(models, tmp_path, {f"{name}.lora_A.weight": down}, "has only down")
    refuse(models, tmp_path, {f"{name}.lora_A.weight": down, f"{name}.lora_B.weight": torch.zeros(16, 3)}, "do not fit")
    refuse(models, tmp_path, {f"{name}.lora_A.weight": down * float("nan"), f"{name}.lora_B.weight": up}, "not finite")


def test_scales_on_the_command_line(tmp_path):
    assert lora.parse("a.safetensors") == ("a.safetensors", 1.0)
    assert lora.parse("a.safetensors:0.7") == ("a.safetensors", 0.7)
    assert lora.parse("a:b.safetensors:-1") == ("a:b.safetensors", -1.0)
    (tmp_path / "x:1").touch()
    assert lora.parse(str(tmp_path / "x:1"))[1] == 1.0, "a file of that very name"
    with pytest.raises(UserError, match="no scale"):
        lora.parse("a.safetensors:strong")


def test_inspect(tmp_path):
    done = run("-m", "nanodiff.lora", "inspect", FILES / "sd15.kohya.safetensors")
    assert done.returncode == 0 and "alpha 2" in done.stdout and "lora_unet_mid_block" in done.stdout
    (tmp_path / "x.safetensors").write_bytes(b"<html>")
    assert "HTML" in error_line(run("-m", "nanodiff.lora", "inspect", tmp_path / "x.safetensors"))


# -- real files -----------------------------------------------------------------------------------------------


@pytest.fixture
def real_unet():
    if not REAL.exists():
        pytest.skip("the real LoRA files are not here")
    with torch.device("meta"):
        return UNet2DConditionModel(UNet2DConditionModel.Config.from_json(manifest("sd15.unet")[0]))


def test_a_real_lora(real_unet):
    found = lora.read(REAL / "sd15_weapons_attnprocs.safetensors", {"unet": real_unet})
    want = json.loads((REAL / "sd15_weapons_deltas.json").read_text())["targets"]
    assert {f"{d.module}.weight" for d in found.deltas} == set(want) and len(want) == 128
    for d in found.deltas:
        facts = want[f"{d.module}.weight"]
        delta = d.matrix(facts["shape"]).double()
        assert delta.norm().item() == pytest.approx(facts["fro"], rel=1e-4)
        assert delta.sum().item() == pytest.approx(facts["sum"], abs=2e-3)


def test_a_real_file_in_a_layout_that_names_no_layers(real_unet):
    with pytest.raises(UserError, match="cloneofsimo"):
        lora.read(REAL / "sd15_analog_rank4_cloneofsimo.safetensors", {"unet": real_unet})


def test_layers_whose_halves_the_original_exchanges(tmp_path):
    """kohya names SD 3's layers as the original does; there the last block's text norm has shift and scale exchanged."""
    sd = pipeline.load(TINY / "sd35-medium")
    models, D, r, last = sd.models(), sd.net.cfg.width, 4, sd.net.cfg.num_layers - 1
    down, up = torch.randn(r, D), torch.randn(2 * D, r)
    key = f"lora_unet_joint_blocks_{last}_context_block_adaLN_modulation_1"
    weights.save_tensors(tmp_path / "x.safetensors", {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up})
    layer = sd.net.transformer_blocks[last].norm1_context.linear
    before = layer.weight.clone()
    lora.fuse(models, lora.read(tmp_path / "x.safetensors", models))
    delta = up @ down
    assert max_error(layer.weight - before, torch.cat([delta[D:], delta[:D]])) < 1e-5


def test_comfyui_names(tmp_path):
    sd = pipeline.load(TINY / "sdxl")
    down, up = torch.randn(4, 16), torch.randn(16, 4)
    key = "diffusion_model.input_blocks.1.0.in_layers.2"
    weight = sd.unet.down_blocks[0].resnets[0].conv1.weight
    down = torch.randn(4, *weight.shape[1:])
    up = torch.randn(weight.shape[0], 4, 1, 1)
    weights.save_tensors(tmp_path / "x.safetensors", {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up})
    (delta,) = lora.read(tmp_path / "x.safetensors", sd.models()).deltas
    assert delta.module == "down_blocks.0.resnets.0.conv1"


def test_fused_for_good_keeps_no_second_copy(sd15):
    fused = lora.fuse(sd15.models(), lora.read(FILES / "sd15.peft.safetensors", sd15.models()), keep=False)
    assert fused.before == []


@pytest.mark.parametrize(
    ("change", "metadata", "says"),
    [
        ({"alpha": torch.zeros(2)}, {}, "alpha"),
        ({"alpha": torch.tensor(float("nan"))}, {}, "alpha"),
        ({"down": torch.zeros(0, 16), "up": torch.zeros(16, 0)}, {}, "rank 0"),
        ({"up": torch.zeros(16)}, {}, "no matrices"),
        ({}, {"lora_adapter_metadata": "[1]"}, "no JSON object"),
        ({}, {"lora_adapter_metadata": "[" * 100_000}, "no JSON"),
        (
            {},
            {"lora_adapter_metadata": '{"unet.lora_alpha": "x"}'},
            r"x\.safetensors: unet.lora_alpha = 'x' has the wrong type",
        ),
        ({}, {"lora_adapter_metadata": '{"unet.alpha_pattern": [1]}'}, r"alpha_pattern = \[1\] has the wrong type"),
        ({}, {"lora_adapter_metadata": '{"unet.use_rslora": "false"}'}, "use_rslora = 'false' has the wrong type"),
        ({}, {"lora_adapter_metadata": '{"unet.lora_alpha": true}'}, "lora_alpha = True has the wrong type"),
        ({}, {"lora_adapter_metadata": '{"unet.use_dora": true}'}, "is DoRA; only plain LoRA is supported"),
        ({}, {"lora_adapter_metadata": '{"unet.peft_type": "LOHA"}'}, "is 'LOHA'; only plain LoRA is supported"),
        ({}, {"lora_adapter_metadata": '{"unet.alpha_pattern": {"^down.*q$": 2}}'}, "regular expression"),
    ],
)
def test_malformed_files_are_one_line(sd15, tmp_path, change, metadata, says):
    name = f"unet.{BLOCK}.attn1.to_q"
    parts = {"down": torch.zeros(4, 16), "up": torch.zeros(16, 4)} | change
    keys = {"down": "lora_A.weight", "up": "lora_B.weight", "alpha": "alpha"}
    tensors = {f"{name}.{keys[k]}": v for k, v in parts.items()}
    weights.save_tensors(tmp_path / "x.safetensors", tensors, metadata)
    with pytest.raises(UserError, match=says):
        lora.read(tmp_path / "x.safetensors", sd15.models())


# -- training ---------------------------------------------------------------------------------------------


def test_adapters_begin_as_nothing_and_train_alone():
    sd = pipeline.load(TINY / "sd15")
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, sd.net.cfg.cross_attention_dim)
    before, keys = sd.net(x, t, text), set(sd.net.state_dict())
    n = lora.adapt(sd.net, rank=2, alpha=6)
    assert torch.equal(sd.net(x, t, text), before) and keys <= set(sd.net.state_dict())
    trained = {k: p for k, p in sd.net.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * n and all(".lora_" in k and p.dtype == torch.float32 for k, p in trained.items())
    sd.net(x, t, text).sum().backward()
    assert all(p.grad is not None for p in trained.values())


@pytest.mark.parametrize("form", lora.FORMS)
@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_what_is_written_is_what_was_trained(tmp_path, name, form):
    """adapt, change, save; read into a fresh model beside the weights and fused: the same outputs, in every family."""
    sd, fresh = pipeline.load(TINY / name), pipeline.load(TINY / name)
    lora.adapt(sd.net, rank=3, alpha=5)
    torch.manual_seed(0)
    for k, p in sd.net.named_parameters():
        if ".lora_B." in k:
            torch.nn.init.normal_(p, std=0.2)
    path = lora.write(tmp_path / "l.safetensors", lora.trained({sd.denoiser_name: sd.net}), sd.models(), form)
    made = lambda s: s.generate(["a cat"], steps=2, seeds=[1], height=32, width=32).latents  # noqa: E731
    with torch.no_grad():
        want, plain = made(sd), made(fresh)
        assert rms_ratio(plain, want) > 1e-3
        read = lora.read(path, fresh.models())
        attached = lora.attach(fresh.models(), read)
        assert rms_ratio(made(fresh), want) < 1e-5
        attached.remove()
        lora.fuse(fresh.models(), read)
        assert rms_ratio(made(fresh), want) < PIPELINE


def test_convolutions_are_adapted_too(tmp_path):
    sd, fresh = pipeline.load(TINY / "sd15"), pipeline.load(TINY / "sd15")
    lora.adapt(sd.net, rank=2, targets=("conv1", "proj_in"))
    for k, p in sd.net.named_parameters():
        if ".lora_B." in k:
            torch.nn.init.normal_(p, std=0.2)
    lora.write(tmp_path / "l.safetensors", lora.trained({"unet": sd.net}), sd.models())
    lora.attach(fresh.models(), lora.read(tmp_path / "l.safetensors", fresh.models()))
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, sd.net.cfg.cross_attention_dim)
    assert rms_ratio(fresh.net(x, t, text), sd.net(x, t, text)) < 1e-5


def test_no_match_is_an_error():
    sd = pipeline.load(TINY / "sd15")
    with pytest.raises(UserError, match=r"no layer of the unet has such a name; it has .*to_q"):
        lora.adapt(sd.net, targets=("to_x",), component="unet")
    with pytest.raises(UserError, match="`lora_rank` 0"):
        lora.adapt(sd.net, rank=0)
    with pytest.raises(UserError, match="`lora_rank_pattern` ff: matches none of the"):
        lora.adapt(sd.net, rank_pattern={"ff": 2})
    with pytest.raises(UserError, match=r"`lora_rank_pattern`: 0\.5 is no rank"):
        lora.adapt(sd.net, rank_pattern={"to_q": 0.5})


def test_patterns_of_targets_ranks_and_alphas():
    sd = pipeline.load(TINY / "sd15")
    n = lora.adapt(sd.net, 4, 8, ("down_blocks.*.conv1", "attn2.to_k", "attn1.to_q"), rank_pattern={"attn2.to_k": 2},
                   alpha_pattern={"mid_block.*": 1})  # fmt: skip
    found = {d.module: d for d in lora.trained({"unet": sd.net}).deltas}
    assert len(found) == n and {p.rpartition(".")[2] for p in found} == {"conv1", "to_k", "to_q"}
    assert all(p.startswith("down_blocks.") for p in found if p.endswith("conv1"))
    for path, d in found.items():
        rank = 2 if path.endswith("to_k") else 4
        assert d.down.shape[0] == rank and d.scale == (1 if path.startswith("mid_block.") else 8) / rank, path


def test_rank_stabilised_strength(tmp_path):
    """alpha / √rank while training, and in every dialect's file."""
    sd = pipeline.load(TINY / "sd15")
    lora.adapt(sd.net, 4, 6, rslora=True)
    made = lora.trained({"unet": sd.net})
    assert {d.scale for d in made.deltas} == {3.0}
    for form in lora.FORMS:
        path = lora.write(tmp_path / form, made, sd.models(), form)
        assert {d.scale for d in lora.read(path, pipeline.load(TINY / "sd15").models()).deltas} == {3.0}


def test_dropout_is_of_training_alone():
    sd = pipeline.load(TINY / "sd15")
    lora.adapt(sd.net, 4, dropout=0.5)
    for k, p in sd.net.named_parameters():
        if ".lora_B." in k:
            torch.nn.init.normal_(p, std=0.2)
    x, t, text = torch.randn(1, 4, 8, 8), torch.tensor([3]), torch.randn(1, 7, sd.net.cfg.cross_attention_dim)
    with torch.no_grad():
        assert torch.equal(sd.net(x, t, text), sd.net(x, t, text))
        sd.net.train()
        seeded = [torch.manual_seed(s) and sd.net(x, t, text) for s in (0, 0, 1)]
    assert torch.equal(seeded[0], seeded[1]) and not torch.equal(seeded[0], seeded[2])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_adapters_of_a_half_precision_model_are_fp32(dtype):
    """GradScaler refuses fp16 gradients; ours are never that."""
    sd = pipeline.load(TINY / "sd15", dtype)
    lora.adapt(sd.net)
    x, t, text = (torch.randn(s, dtype=dtype) for s in ((1, 4, 8, 8), (1,), (1, 7, sd.net.cfg.cross_attention_dim)))
    out = sd.net(x, t.abs(), text)
    out.float().sum().backward()
    grads = [p.grad for p in sd.net.parameters() if p.requires_grad]
    assert out.dtype == dtype and grads and all(g.dtype == torch.float32 for g in grads)


def test_a_layer_under_two_names_counts_once(tmp_path, capsys):
    """Some mixed files have all layers under the original's names and diffusers' (its #11062); two of one kind are a mistake."""
    models = pipeline.load(TINY / "sdxl").models()
    path = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"
    tensors, deltas = dialect({"unet": models["unet"]}, [("unet", path)], kohya)
    own = {
        k.replace(path.replace(".", "_"), "input_blocks_4_1_transformer_blocks_0_attn1_to_q"): 2 * v
        for k, v in tensors.items()
    }
    weights.save_tensors(tmp_path / "both.safetensors", own | tensors)
    (found,) = lora.read(tmp_path / "both.safetensors", models).deltas
    assert max_error(found.matrix(deltas["unet", path].shape), deltas["unet", path]) < 1e-5
    assert "1 layers stand there under two names" in capsys.readouterr().err
    again = {k.replace("lora_unet_" + path.replace(".", "_"), f"unet.{path}"): v for k, v in tensors.items()}
    refuse(models, tmp_path, tensors | again, "are one layer of this model, under two names")


@pytest.mark.parametrize("init", ["pissa", "pissa_niter_4", "olora", "corda", "loftq"])
def test_adapters_that_changed_the_model_itself(sd15, tmp_path, init):
    tensors, _ = dialect(
        sd15.models(), ATTENTION, lambda c, p, part: "base_model.model." + peft(c, p, part).removeprefix("unet.")
    )
    weights.save_tensors(tmp_path / "adapter_model.safetensors", tensors)
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 3, "init_lora_weights": init}
    (tmp_path / "adapter_config.json").write_text(json.dumps(config))
    with pytest.raises(UserError, match=f"init_lora_weights is '{init}', with which the model's own weights change"):
        lora.read(tmp_path, sd15.models())
    for plain in (True, "gaussian", None, "orthogonal"):
        (tmp_path / "adapter_config.json").write_text(json.dumps(config | {"init_lora_weights": plain}))
        assert len(lora.read(tmp_path, sd15.models()).deltas) == 2


def test_names_of_adapters_and_comfyuis_own(sd15, tmp_path):
    models = sd15.models()
    layer = ("unet", ATTENTION[0][1])
    named = lambda c, p, part: peft(c, p, part).replace(".weight", ".style_0.weight")  # noqa: E731
    for name_of, target in (
        (named, layer),
        (lambda c, p, part: f"diffusion_model.{p}.lora_{part}.weight", layer),
        (lambda c, p, part: f"text_encoders.clip_l.transformer.{p}.lora_{part}.weight", TEXT[0]),
    ):
        tensors, deltas = dialect(models, [target], name_of)
        weights.save_tensors(tmp_path / "x.safetensors", tensors)
        (found,) = lora.read(tmp_path / "x.safetensors", models).deltas
        assert (found.component, found.module) == target
        assert max_error(found.matrix(deltas[target].shape), deltas[target]) < 1e-5
    two = dialect(models, [layer], named)[0] | dialect(models, [layer], peft_default)[0]
    refuse(models, tmp_path, two, "holds the adapters default, style_0; save one alone")
    bias = dialect(models, [layer], peft)[0] | {f"unet.{layer[1]}.lora_B.bias": torch.zeros(4)}
    refuse(models, tmp_path, bias, "1 tensors are no part of a plain LoRA")


def test_a_folder_with_one_file(sd15, tmp_path):
    tensors, _ = dialect(sd15.models(), ATTENTION, peft)
    with pytest.raises(UserError, match="has no safetensors file"):
        lora.read(tmp_path, sd15.models())
    weights.save_tensors(tmp_path / "style.safetensors", tensors)
    assert len(lora.read(tmp_path, sd15.models()).deltas) == 2
    weights.save_tensors(tmp_path / "other.safetensors", tensors)
    with pytest.raises(UserError, match=r"has 2 safetensors files, such as other\.safetensors; name one"):
        lora.read(tmp_path, sd15.models())


def test_layers_outside_the_blocks_under_two_names(tmp_path, capsys):
    models = pipeline.load(TINY / "sdxl").models()
    tensors, _ = dialect({"unet": models["unet"]}, [("unet", "time_embedding.linear_1")], kohya)
    own = {k.replace("time_embedding_linear_1", "time_embed_0"): 2 * v for k, v in tensors.items()}
    weights.save_tensors(tmp_path / "both.safetensors", own | tensors)
    (found,) = lora.read(tmp_path / "both.safetensors", models).deltas
    assert torch.equal(found.down, tensors["lora_unet_time_embedding_linear_1.lora_down.weight"])
    assert "under two names" in capsys.readouterr().err


def few(sd, tmp_path):
    tensors, _ = dialect(sd.models(), ALL, kohya, 2.0)
    weights.save_tensors(tmp_path / "few.safetensors", tensors)
    return lora.read(tmp_path / "few.safetensors", sd.models())


def test_quantizing_loses_no_lora(sd15, tmp_path):
    """Beside the weights, silent or in training, it would go with the layers; what was fused into them could not be taken out."""
    found = few(sd15, tmp_path)
    attached = lora.attach(sd15.models(), found, 0.0)
    with pytest.raises(
        UserError, match="a LoRA runs beside the weights of this UNet2DConditionModel; quantize it first"
    ):
        quantize.apply(sd15.net, "int8")
    attached.remove()
    fused = lora.fuse(sd15.models(), found)
    quantize.apply(sd15.net, "int8")
    with pytest.raises(UserError, match="cannot be taken out of weights that were quantized"):
        fused.remove()
    other = pipeline.load(TINY / "sd15").net
    lora.adapt(other, 4)
    with pytest.raises(UserError, match="a LoRA runs beside"):
        quantize.apply(other, "int8")


def test_fused_into_a_model_that_was_loaded_in_inference_mode(tmp_path):
    with torch.inference_mode():
        sd = pipeline.load(TINY / "sd15")
    draw = lambda: sd.generate("a", steps=2, height=64, width=64, output_type="latent").latents  # noqa: E731
    plain = draw()
    fused = lora.fuse(sd.models(), few(sd, tmp_path))
    assert not torch.allclose(draw(), plain, atol=1e-3)
    fused.remove()
    assert torch.equal(draw(), plain)


def test_a_copy_listens_to_its_own_scale(sd15, tmp_path):
    found = few(sd15, tmp_path)
    attached = lora.attach(sd15.models(), found)
    twin = copy.deepcopy(sd15.net)
    attached.scale = 0.0
    hooks = [hook for net in (sd15.net, twin) for m in net.modules() for hook in m._forward_hooks.values()]
    assert [hook.silent() for hook in hooks] == [True] * (len(hooks) // 2) + [False] * (len(hooks) // 2)


def test_a_folder_for_each_component(sd15, tmp_path, capsys):
    """What `convert --to peft` writes: read, listed and converted; a part that the model lacks is an error."""
    found = few(sd15, tmp_path)
    lora.write(tmp_path / "both", found, sd15.models(), "peft")
    assert len(lora.read(tmp_path / "both", sd15.models()).deltas) == len(found.deltas)
    lora.inspect(tmp_path / "both", str(TINY / "sd15"))
    assert f"{len(found.deltas)} layers of unet, text_encoder" in capsys.readouterr().out
    lora.convert(tmp_path / "both", tmp_path / "one.safetensors", "kohya", str(TINY / "sd15"))
    one = {
        d[:2]: d.matrix((d.up.shape[0], d.down[0].numel()))
        for d in lora.read(tmp_path / "one.safetensors", sd15.models()).deltas
    }
    for d in found.deltas:
        assert max_error(one[d[:2]], d.matrix((d.up.shape[0], d.down[0].numel()))) < 1e-6
    (tmp_path / "both" / "text_encoder").rename(tmp_path / "both" / "text_encoder_2")
    with pytest.raises(UserError, match="text_encoder_2 is no part of this model, which has unet"):
        lora.read(tmp_path / "both", sd15.models())
    partial = lora.read(tmp_path / "both", sd15.models(), allow_partial=True)
    assert {d.component for d in partial.deltas} == {"unet"} and "left out: text_encoder_2" in capsys.readouterr().err


def test_settings_beside_a_file_of_any_name(sd15, tmp_path):
    """As long as it is the folder's only one."""
    for folder, name in (("a", "adapter_model"), ("b", "mine")):
        (tmp_path / folder).mkdir()
        key = f"base_model.model.{BLOCK}.attn1.to_q"
        tensors = {f"{key}.lora_A.weight": torch.ones(4, 16), f"{key}.lora_B.weight": torch.ones(16, 4)}
        weights.save_tensors(tmp_path / folder / f"{name}.safetensors", tensors)
        (tmp_path / folder / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 32, "use_rslora": true}')
        for path in (tmp_path / folder, tmp_path / folder / f"{name}.safetensors"):
            assert [d.scale for d in lora.read(path, {"unet": sd15.net}).deltas] == [16.0]
    shutil.copytree(tmp_path / "a", tmp_path / "a" / "checkpoint-500")  # as PEFT's trainers leave them
    assert len(lora.read(tmp_path / "a", {"unet": sd15.net}).deltas) == 1
    shutil.copy(tmp_path / "b" / "mine.safetensors", tmp_path / "b" / "other.safetensors")
    assert [d.scale for d in lora.read(tmp_path / "b" / "mine.safetensors", {"unet": sd15.net}).deltas] == [1.0]


def test_matrices_that_are_two_or_no_matrices(sd15, tmp_path):
    key = f"unet.{BLOCK}.attn1.to_q"
    good = {f"{key}.lora_A.weight": torch.ones(4, 16), f"{key}.lora_B.weight": torch.ones(16, 4)}
    for more, said in (
        ({f"{key}.lora.down.weight": torch.ones(4, 16)}, "has two matrices for"),
        ({f"{key}.lora_B.weight": torch.ones(16, 4, 3, 3)}, "do not fit a layer of shape"),
    ):
        weights.save_tensors(tmp_path / "x.safetensors", good | more)
        with pytest.raises(UserError, match=said):
            lora.read(tmp_path / "x.safetensors", sd15.models())


def test_an_encoder_is_told_by_its_width(tmp_path):
    """PEFT's folder of one text encoder does not say of which."""
    models = pipeline.load(TINY / "sdxl").models()
    key = "base_model.model.encoder.layers.0.self_attn.q_proj"
    for component in ("text_encoder", "text_encoder_2"):
        width = models[component].cfg.hidden_size
        tensors = {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(width, 2)}
        weights.save_tensors(tmp_path / "x.safetensors", tensors)
        assert [d.component for d in lora.read(tmp_path / "x.safetensors", models).deltas] == [component]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["merge", "--model", TINY / "sd15", "--lora", "{odd}", "{tmp}/m", "--allow-partial"], "1 layers left out"),
        (["convert", "{odd}", "{tmp}/c.safetensors", "--to", "diffusers", "--model", TINY / "sd15", "--allow-partial"], "1 layers left out"),
        (["merge", "--model", "{tmp}/no3", "--lora", "{three}", "{tmp}/n", "--no-t5"], ""),
    ],
)  # fmt: skip
def test_the_options_that_errors_name_are_there(sd15, tmp_path, argv, said):
    tensors, _ = dialect(sd15.models(), ALL[:2], kohya, 2.0)
    extra = {
        "lora_unet_nowhere.lora_down.weight": torch.ones(2, 4),
        "lora_unet_nowhere.lora_up.weight": torch.ones(4, 2),
    }
    weights.save_tensors(tmp_path / "odd.safetensors", tensors | extra)
    if "{three}" in argv:
        folder = shutil.copytree(TINY / "sd35-medium", tmp_path / "no3")
        shutil.rmtree(folder / "text_encoder_3")
        key = "transformer.transformer_blocks.0.attn.to_q"
        width = pipeline.load(TINY / "sd35-medium", no_t5=True).net.cfg.width
        three = {f"{key}.lora_A.weight": torch.ones(2, width), f"{key}.lora_B.weight": torch.ones(width, 2)}
        weights.save_tensors(tmp_path / "three.safetensors", three)
    names = {"tmp": tmp_path, "odd": tmp_path / "odd.safetensors", "three": tmp_path / "three.safetensors"}
    done = run("-m", "nanodiff.lora", *(str(a).format(**names) for a in argv))
    assert done.returncode == 0 and said in done.stderr, done.stderr


def test_networks_are_given_by_name(sd15, tmp_path):
    """A pipeline, or a network alone, is what is passed by mistake."""
    found = few(sd15, tmp_path)
    for wrong in (sd15, sd15.net):
        for call in (
            lambda m: lora.read(tmp_path / "few.safetensors", m),
            lambda m: lora.attach(m, found),
            lambda m: lora.fuse(m, found),
        ):
            with pytest.raises(UserError, match=r"`models` .*as Pipeline.models\(\) gives"):
                call(wrong)
