"""IP-Adapters: whole runs against diffusers', from a file and on the command line; the vision tower and its pixels; what is refused."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from util import PIPELINE, TINY, error_line, golden, manifest, max_error, recipe, rms_ratio, run

from nanodiff import pipeline, weights
from nanodiff.config import UserError
from nanodiff.models.clip import CLIPVisionModel
from nanodiff.models.ipadapter import Config, IPAdapter
from nanodiff.output import images
from nanodiff.pipeline import pictures
from nanodiff.pipeline.pictures import ImagePrompt
from nanodiff.weights import hub

TENSORS, FACTS = golden("pictures.pipe")
SAMPLERS = {None: None, "DDIMScheduler": "ddim", "EulerDiscreteScheduler": "euler"}


def tower():
    model = CLIPVisionModel(CLIPVisionModel.Config.from_json(FACTS["vision"])).eval()
    model.load_state_dict(recipe(model, "ip-encoder"))
    return model.requires_grad_(False)


def adapter(sd, name, plus):
    down, middle, _ = sd.net.cross_attentions()
    widths = sd.net.context_widths()
    widths = tuple(widths[:down] + widths[down + middle :] + widths[down : down + middle])
    seen = FACTS["vision"]["hidden_size" if plus else "projection_dim"]
    more = (3, widths, FACTS["inner"], 4) if plus else (4, widths)
    model = IPAdapter(Config(sd.net.cfg.cross_attention_dim, seen, *more)).eval()
    model.load_state_dict(recipe(model, f"ip-{name}-{'plus' if plus else 'plain'}"))
    return model.requires_grad_(False)


def picture(i):
    return Image.fromarray(TENSORS[f"picture/{i}"].numpy())


@pytest.fixture(scope="module")
def models():
    return {name: pipeline.load(TINY / name) for name in ("sd15", "sd21-v", "sdxl", "sd35-medium")}


@pytest.fixture(scope="module")
def files(models, tmp_path_factory):
    """The layout of the published ones: models/*.safetensors and models/image_encoder."""
    folder = tmp_path_factory.mktemp("ip") / "models"
    folder.mkdir()
    for name in ("sd15", "sdxl"):
        for plus in (False, True):
            state = adapter(models[name], name, plus).state_dict()
            weights.save_tensors(folder / f"{name}-{'plus' if plus else 'plain'}.safetensors", state)
    weights.save(tower(), folder / "image_encoder")
    for i in range(3):
        picture(i).save(folder / f"{i}.png")
    return folder


def prompts(sd, name, adapters):
    found = []
    for plus, scale, chosen in adapters:
        model = adapter(sd, name, plus)
        found.append(ImagePrompt(model, *pictures.look(model, tower(), [picture(i) for i in chosen]), scale))
    return tuple(found)


@pytest.mark.parametrize("case", FACTS["args"])
def test_golden(models, case):
    facts = FACTS["args"][case]
    sd, call, (height, width) = models[facts["model"]], facts["call"], facts["size"]
    result = sd.with_scheduler(SAMPLERS[facts["scheduler"]]).generate(
        call["prompt"], call.get("negative_prompt"), steps=call["num_inference_steps"], guidance_scale=call["guidance_scale"], seeds=facts["seed"],
        height=height, width=width, pictures=prompts(sd, facts["model"], facts["adapters"]),
    )  # fmt: skip
    assert max_error(result.latents, TENSORS[f"{case}/latents"]) < PIPELINE


def test_vision_tower():
    pixels = images.clip_pixels(picture(0), 28)[None]
    assert max_error(pixels, TENSORS["pixels"]) < 1e-6
    model = tower()
    assert max_error(model(pixels), TENSORS["vector"]) < 1e-5
    assert max_error(model.states(pixels), TENSORS["states"]) < 1e-5


def test_scale_zero_is_no_adapter_and_pictures_matter(models):
    sd = models["sd15"]
    draw = lambda shown: sd.generate("a cat", steps=2, height=32, width=32, pictures=shown).latents  # noqa: E731
    plain, silent, one, other = (
        draw(p) for p in ((), *(prompts(sd, "sd15", [[True, s, [i]]]) for s, i in ((0.0, 0), (1.0, 0), (1.0, 1))))
    )
    assert max_error(silent, plain) < 1e-6 < 1e-3 < min(max_error(one, plain), max_error(one, other))


def test_with_perturbed_attention_and_two_rows(models):
    """The prompt's pass alone sees the pictures too; every picture of a batch is as if it were alone."""
    sd = models["sdxl"]
    common = {
        "steps": 2,
        "height": 32,
        "width": 32,
        "pictures": prompts(sd, "sdxl", [[False, 0.8, [0, 1]]]),
        "perturbed": pipeline.Perturbed(2.0),
    }
    both = sd.generate(["a cat", "a dog"], "x", seeds=[1, 2], **common).latents
    alone = torch.cat([sd.generate(t, "x", seeds=[s], **common).latents for t, s in (("a cat", 1), ("a dog", 2))])
    assert max_error(both, alone) < 1e-5


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision(models, dtype):
    sd, half = models["sd15"], pipeline.load(TINY / "sd15", dtype)
    shown = prompts(sd, "sd15", [[True, 0.8, [0]]])
    low = ImagePrompt(adapter(sd, "sd15", True).to(dtype), shown[0].shown.to(dtype), shown[0].nothing.to(dtype), 0.8)
    want, got = (
        p.generate("a cat", steps=2, height=32, width=32, pictures=(s,)).latents
        for p, s in ((sd, shown[0]), (half, low))
    )
    assert rms_ratio(got.float(), want) < (0.1 if dtype == torch.bfloat16 else 0.02)


# -- files ---------------------------------------------------------------------------------------------------


def test_published_layouts():
    """Names, shapes and order of the published files for SD 1.5 (16 cross-attentions, the middle's last) and SDXL (70)."""
    for name, context, count, last in (("sd15", 768, 16, 1280), ("sdxl", 2048, 70, 1280)):
        with torch.device("meta"):
            unet = pipeline.BUILDERS["unet"](pipeline.BUILDERS["unet"].Config.from_json(manifest(f"{name}.unet")[0]))
            widths = unet.context_widths()
            down, middle, up = unet.cross_attentions()
            order = tuple(widths[:down] + widths[down + middle :] + widths[down : down + middle])
            plain = IPAdapter(Config(context, 1024, 4, order))
            plus = IPAdapter(Config(context, 1280, 16, order, 768 if name == "sd15" else 1280, 4))
        assert len(widths) == count == down + middle + up and order[-1] == last
        assert list(plain.ip_adapter) == [str(2 * i + 1) for i in range(count)]
        for model in (plain, plus):
            shapes = {k: tuple(v.shape) for k, v in model.state_dict().items()}
            assert Config.from_shapes(shapes, "f") == model.cfg
        keys = set(plus.state_dict())
        assert {
            "image_proj.layers.3.0.to_kv.weight",
            "image_proj.layers.0.1.3.weight",
            "image_proj.proj_out.bias",
            "ip_adapter.1.to_k_ip.weight",
        } <= keys
        assert "image_proj.layers.0.1.1.bias" not in keys and "ip_adapter.1.to_k_ip.bias" not in keys


def test_a_pickle_with_its_two_parts(models, files, tmp_path):
    state = weights.load_weights(files / "sd15-plain.safetensors")
    parts = {
        p: {k.removeprefix(f"{p}."): v for k, v in state.items() if k.startswith(p)}
        for p in ("image_proj", "ip_adapter")
    }
    torch.save(parts, tmp_path / "ip.bin")
    with pytest.raises(UserError, match="can run code"):
        pictures.load(tmp_path / "ip.bin", torch.float32, "cpu")
    loaded, _ = pictures.load(tmp_path / "ip.bin", torch.float32, "cpu", allow_pickle=True)
    assert all(torch.equal(v, state[k]) for k, v in loaded.state_dict().items())


def changed(files, tmp_path, change):
    state = change(weights.load_weights(files / "sd15-plain.safetensors"))
    weights.save_tensors(tmp_path / "x.safetensors", state)
    return tmp_path / "x.safetensors"


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: {k: v for k, v in s.items() if "3.to_v_ip" not in k}, r"misses tensor ip_adapter\.3\.to_v_ip\.weight"),
        (lambda s: s | {"odd": torch.zeros(1)}, "unknown tensor odd"),
        (lambda s: s | {"ip_adapter.0.to_q_lora.down.weight": torch.zeros(1)}, "FaceID"),
        (lambda s: {k: v for k, v in s.items() if "image_proj" not in k} | {"image_proj.proj.0.weight": torch.zeros(2, 2)}, "full-face"),
        (lambda s: {"a": torch.zeros(1)}, "no IP-Adapter among 1 tensors"),
    ],
)  # fmt: skip
def test_refused_files(files, tmp_path, change, says):
    with pytest.raises(UserError, match=says):
        pictures.load(changed(files, tmp_path, change), torch.float32, "cpu")


def test_refused_models(models):
    shown = prompts(models["sd15"], "sd15", [[False, 1.0, [0]]])
    for name, says in (("sdxl", "not of one model"), ("sd35-medium", "for UNets")):
        with pytest.raises(UserError, match=says):
            models[name].generate("x", steps=1, pictures=shown)
    with pytest.raises(UserError, match="not of one model"):
        pictures.look(
            adapter(models["sdxl"], "sdxl", True),
            CLIPVisionModel(CLIPVisionModel.Config(hidden_size=8, num_hidden_layers=1)),
            [picture(0)],
        )


def test_hub_names(tmp_path):
    with pytest.raises(UserError, match="no such file"):
        hub.file("nowhere.safetensors")
    with pytest.raises(UserError, match="no such file"):
        hub.file("org/name/../x.safetensors")
    with pytest.raises(UserError, match=r"h94/IP-Adapter: .*hf download"):
        hub.file("h94/IP-Adapter/models/ip-adapter_sd15.safetensors")
    for text in ("a.safetensors:nan", "a.safetensors:inf", "a.safetensors:x"):
        with pytest.raises(UserError, match="FILE:SCALE"):
            pictures.parse(text)
    assert pictures.parse("a/b.safetensors:0.6") == ("a/b.safetensors", 0.6) and pictures.parse("b.safetensors") == (
        "b.safetensors",
        1.0,
    )


def test_towers_as_they_are_found(files, tmp_path):
    """Files of older programs have a tensor that is no weight; a whole CLIP has a tower in it."""
    state = weights.load_weights(files / "image_encoder" / "model.safetensors")
    (tmp_path / "old").mkdir()
    (tmp_path / "old" / "config.json").write_text((files / "image_encoder" / "config.json").read_text())
    weights.save_tensors(
        tmp_path / "old" / "model.safetensors", state | {"vision_model.embeddings.position_ids": torch.arange(17)[None]}
    )
    old = pictures.load_tower(tmp_path / "old", torch.float32, "cpu")
    assert all(torch.equal(v, state[k]) for k, v in old.state_dict().items())
    whole = pictures.load_tower(TINY / "clip", torch.float32, "cpu")
    assert whole.cfg.projection_dim == whole.visual_projection.weight.shape[0]


def test_a_tower_of_the_hub_is_asked_for_by_its_names(monkeypatch):
    asked = {}
    monkeypatch.setattr(hub, "_snapshot", lambda name, revision, wanted, *more: asked.update({name: wanted}))
    pictures.encoder_folder("laion/CLIP-ViT-H-14", None, None)
    assert "model*.safetensors" in asked["laion/CLIP-ViT-H-14"]


# -- the command line -----------------------------------------------------------------------------------------


def test_command_line(models, files, tmp_path):
    argv = (
        "--model",
        TINY / "sd15",
        "--prompt",
        "red apple",
        "--steps",
        "3",
        "--height",
        "64",
        "--width",
        "64",
        "--seed",
        "3",
        "--guidance-scale",
        "5",
    )
    ip = (
        "--ip-adapter",
        f"{files / 'sd15-plus.safetensors'}:0.7",
        "--ip-adapter-image",
        files / "0.png",
        "--ip-adapter-image",
        files / "1.png",
    )
    done = run("sample.py", *argv, *ip, "--output-dir", tmp_path / "a")
    assert done.returncode == 0 and "image prompt: " in done.stdout, done.stderr
    again = run("sample.py", "--from-image", tmp_path / "a" / "00000.png", "--output-dir", tmp_path / "b")
    assert again.returncode == 0, again.stderr
    a, b = (np.array(Image.open(tmp_path / n / "00000.png")) for n in "ab")
    assert np.array_equal(a, b)
    want = models["sd15"].generate("red apple", steps=3, height=64, width=64, seeds=[3], guidance_scale=5.0,
                                   pictures=prompts(models["sd15"], "sd15", [[True, 0.7, [0, 1]]]))  # fmt: skip
    assert np.abs(np.array(want.images[0]).astype(int) - a).max() <= 1
    dry = run("sample.py", "--model", TINY / "sd15", *ip, "--dry-run")
    assert dry.returncode == 0 and "image prompt 1" in dry.stdout and "image encoder" in dry.stdout, dry.stderr
    whole = ("--image-encoder", TINY / "clip", "--dry-run")  # a whole CLIP has a tower in it
    dry = run("sample.py", "--model", TINY / "sd15", *ip, *whole)
    assert dry.returncode == 0 and "image encoder" in dry.stdout, dry.stderr
    offloaded = run("sample.py", *argv, *ip, "--offload", "model", "--output-dir", tmp_path / "c")
    assert offloaded.returncode == 0, offloaded.stderr
    c = np.array(Image.open(tmp_path / "c" / "00000.png"))
    assert np.abs(c.astype(int) - a).max() <= 1
    assert json.loads((tmp_path / "a" / "run.json").read_text())["config"]["ip_adapter"]


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--ip-adapter", "{plain}"], "--ip-adapter-image"),
        (["--ip-adapter-image", "{pic}"], "--ip-adapter-image does nothing without --ip-adapter"),
        (
            ["--ip-adapter", "{plain}", "--ip-adapter", "{plus}", "--ip-adapter-image", "{pic}"],
            "1 --ip-adapter-image for 2 --ip-adapter",
        ),
        (["--ip-adapter", "{plain}", "--ip-adapter-image", "nowhere.png"], "nowhere.png"),
        (["--ip-adapter", "nowhere.safetensors", "--ip-adapter-image", "{pic}"], "no such file"),
        (["--ip-adapter", "{other}", "--ip-adapter-image", "{pic}"], "not of one model"),
        (["--ip-adapter", "{other}", "--ip-adapter-image", "{pic}", "--dry-run"], "not of one model"),
        (["--ip-adapter", "{plain}", "--ip-adapter-image", "{pic}", "--image-encoder", "{sd15}"], "config.json"),
        (["--ip-adapter", "{plain}", "--ip-adapter-image", "{pic}", "--offload", "sequential"], "sequential"),
        (["--image-encoder", "{sd15}"], "--image-encoder does nothing without --ip-adapter"),
    ],
)
def test_refused_on_the_command_line(files, tmp_path, argv, said):
    names = {"plain": files / "sd15-plain.safetensors", "plus": files / "sd15-plus.safetensors", "other": files / "sdxl-plain.safetensors", "pic": files / "0.png",
             "sd15": TINY / "sd15"}  # fmt: skip
    argv = [a.format(**names) for a in argv]
    line = error_line(
        run("sample.py", "--model", TINY / "sd15", "--prompt", "x", *argv, "--output-dir", tmp_path / "x")
    )
    assert said in line, line
