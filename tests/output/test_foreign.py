"""Other programs' pictures: ComfyUI's graphs, A1111's PNGs and JPEGs, what is neither."""

import json
from types import SimpleNamespace

import numpy as np
import pytest
import scipy.stats
from PIL import Image
from PIL.PngImagePlugin import PngInfo
from util import TINY

from nanodiff.config import UserError
from nanodiff.diffusion import grids, samplers
from nanodiff.output import foreign

GRAPH = {
    "3": {"class_type": "KSampler", "inputs": {"seed": 42, "steps": 20, "cfg": 8, "sampler_name": "dpmpp_2m", "scheduler": "karras", "denoise": 1,
                                               "model": ["10", 0], "positive": ["6", 0], "negative": ["7", 0], "latent_image": ["5", 0]}},
    "4": {"class_type": "CheckpointLoaderSimple", "inputs": {"ckpt_name": "v1-5.safetensors"}},
    "5": {"class_type": "EmptyLatentImage", "inputs": {"width": 512, "height": 384, "batch_size": 1}},
    "6": {"class_type": "CLIPTextEncode", "inputs": {"text": "a (cat:1.2)", "clip": ["10", 1]}},
    "7": {"class_type": "CLIPTextEncode", "inputs": {"text": "blurry", "clip": ["4", 1]}},
    "8": {"class_type": "VAEDecode", "inputs": {"samples": ["3", 0], "vae": ["4", 2]}},
    "9": {"class_type": "SaveImage", "inputs": {"images": ["8", 0]}},
    "10": {"class_type": "LoraLoader", "inputs": {"lora_name": "ink.safetensors", "strength_model": 0.8, "strength_clip": 1, "model": ["4", 0],
                                                  "clip": ["4", 1]}},
}  # fmt: skip


def changed(node, **inputs):
    return GRAPH | {node: GRAPH[node] | {"inputs": GRAPH[node]["inputs"] | inputs}}


def test_a_graph():
    found, unused = foreign.comfyui(GRAPH)
    assert found == {
        "prompt": ["a (cat:1.2)"], "negative_prompt": "blurry", "prompt_syntax": "comfyui", "steps": 20, "guidance_scale": 8.0, "seed": 42,
        "width": 512, "height": 384, "scheduler": "dpmpp_2m_karras", "timestep_spacing": "linspace", "model": "v1-5.safetensors",
    }  # fmt: skip
    assert unused == ["LoRA 'ink.safetensors at 0.8' (give it with --lora)"]


def test_a_model_behind_other_nodes_is_found():
    """ComfyUI's own graph for SD 3 has one between."""
    graph = changed("3", model=["30", 0]) | {
        "30": {"class_type": "ModelSamplingSD3", "inputs": {"shift": 3.0, "model": ["10", 0]}}
    }
    found, unused = foreign.comfyui(graph)
    assert found["model"] == "v1-5.safetensors" and "'ModelSamplingSD3' (node 30)" in unused


def test_two_texts_of_sdxl():
    graph = GRAPH | {
        "6": {
            "class_type": "CLIPTextEncodeSDXL",
            "inputs": {"text_g": "a cat", "text_l": "ink", "width": 2048, "height": 1024, "crop_w": 8, "crop_h": 0,
                       "target_width": 64, "clip": ["4", 1]},
        }
    }  # fmt: skip
    found, _ = foreign.comfyui(graph)
    assert found["prompt"] == ["ink"] and found["prompt_2"] == "a cat"
    # a target of one side is none
    assert found["original_size"] == "2048x1024" and found["crop"] == "8x0" and "target_size" not in found
    assert not {"negative_original_size", "negative_crop"} & set(found)
    graph["6"]["inputs"] |= {"width": 0, "crop_w": 0}
    found, _ = foreign.comfyui(graph)
    assert found["crop"] == "0x0" and "original_size" not in found, "no picture comes from nothing"


def test_a_seed_node():
    graph = changed("3", seed=["20", 0]) | {
        "20": {"class_type": "Seed", "inputs": {"seed": 77, "control_after_generate": "fixed"}}
    }
    assert foreign.comfyui(graph)[0]["seed"] == 77


def test_values_that_other_nodes_give():
    graph = changed("3", seed=["20", 0]) | changed("6", text=["21", 0]) | {
        "20": {"class_type": "PrimitiveNode", "inputs": {"value": 7}}, "21": {"class_type": "Text", "inputs": {"text": "a dog"}},
    }  # fmt: skip
    graph["3"] = changed("3", seed=["20", 0])["3"]
    found, _ = foreign.comfyui(graph)
    assert found["seed"] == 7 and found["prompt"] == ["a dog"]


@pytest.mark.parametrize(("sampler", "ours"), [("dpmpp_sde", "dpmpp_sde"), ("euler", "euler"), ("heun", "heun")])
@pytest.mark.parametrize("grid", ["exponential", "sgm_uniform", "beta", "simple"])
def test_grids(sampler, ours, grid):
    found, _ = foreign.comfyui(changed("3", sampler_name=sampler, scheduler=grid))
    # ComfyUI's are quantiles of times, the web UI's and diffusers' of σ
    theirs = "beta_times" if grid == "beta" else grid
    assert (found["scheduler"], found["sigmas"], found["timestep_spacing"]) == (ours, theirs, "linspace")


@pytest.mark.parametrize(("sampler", "noise"), [("euler_ancestral", "a generator of its own"), ("dpmpp_sde", "a Brownian tree"),
                                                ("euler", ""), ("dpmpp_2m", "")])  # fmt: skip
def test_noise_that_is_drawn_otherwise_is_said(sampler, noise):
    found, left = foreign.comfyui(changed("3", sampler_name=sampler, scheduler="normal"))
    assert "scheduler" in found and any("another picture" in x and noise in x for x in left) == bool(noise), left


def test_what_comfyui_does_otherwise_is_said():
    for sampler, scheduler, other in (
        ("dpm_2", "normal", True),
        ("uni_pc", "karras", True),
        ("uni_pc", "normal", False),
        ("euler", "normal", False),
    ):
        found, left = foreign.comfyui(changed("3", sampler_name=sampler, scheduler=scheduler))
        assert "scheduler" in found and any("without the last level but one" in x for x in left) == other, (
            sampler,
            scheduler,
        )


def test_the_plain_grids_are_those_of_the_training():
    """Whatever the model's own spacing is: SDXL's is another (leading), which would begin at 5.1 of 14.6."""
    grid = lambda sampler, scheduler: {k: v for k, v in foreign.comfyui(changed("3", sampler_name=sampler, scheduler=scheduler))[0].items()  # noqa: E731
                                       if k in ("scheduler", "sigmas", "timestep_spacing")}  # fmt: skip
    assert grid("euler", "normal") == {"scheduler": "euler", "timestep_spacing": "linspace"}
    assert grid("dpmpp_2m", "normal") == {"scheduler": "dpmpp_2m", "sigmas": "normal", "timestep_spacing": "linspace"}
    assert grid("ddim", "normal") == {"scheduler": "euler", "timestep_spacing": "linspace"}
    assert grid("ddim", "ddim_uniform") == {"scheduler": "ddim"}
    raw = json.loads((TINY / "sdxl" / "scheduler" / "scheduler_config.json").read_text())
    base = samplers.schedule_of(raw, "here")
    assert base.cfg["timestep_spacing"] == "leading"
    every = base.all_sigmas()
    want = [*np.exp(np.interp(np.linspace(999, 0, 5), np.arange(1000), np.log(every))), 0]
    for found in (
        grid("euler", "normal"),
        grid("heun", "normal"),
        grid("lms", "normal"),
        grid("dpmpp_2m", "normal"),
    ):
        name, sigmas = found["scheduler"], found.get("sigmas")
        schedule = samplers.rescheduled(base, name, timestep_spacing="linspace")
        schedule = samplers.spaced_by(schedule, name, sigmas) if sigmas else schedule
        assert grids.sigma_grid(schedule, 5)[1][:5] == pytest.approx(want[:5], rel=2e-3), name
    karras = samplers.spaced_by(samplers.rescheduled(base, "euler", timestep_spacing="linspace"), "euler", "karras")
    levels = grids.sigma_grid(karras, 5)[1]
    assert levels[0] == pytest.approx(every[-1], rel=1e-5) and levels[4] == pytest.approx(every[0], rel=1e-5)
    comfyui = samplers.spaced_by(base, "euler", "beta_times")
    times = [round(999 * float(scipy.stats.beta.ppf(1 - i / 5, 0.6, 0.6))) for i in range(5)]
    assert grids.sigma_grid(comfyui, 5)[1][:5] == pytest.approx([every[t] for t in times], rel=1e-6)
    with pytest.raises(UserError, match="has no 900 different times"):
        grids.sigma_grid(comfyui, 900)


@pytest.mark.parametrize(
    ("graph", "says"),
    [
        (changed("3", sampler_name="dpm_adaptive"), "sampler 'dpm_adaptive' with scheduler 'karras'"),
        (
            changed("3", sampler_name="dpmpp_sde", scheduler="kl_optimal"),
            "sampler 'dpmpp_sde' with scheduler 'kl_optimal'",
        ),
        (changed("3", denoise=0.5), "denoise: 0.5"),
        (changed("3", start_at_step=10, add_noise="disable"), "start_at_step: 10"),
        (changed("3", end_at_step=5), "end_at_step: 5"),
        (changed("5", batch_size=4), "batch_size: 4"),
        (
            GRAPH | {"5": {"class_type": "LatentUpscale", "inputs": {"width": 64, "height": 64}}},
            "the picture that it began with",
        ),
        (
            changed("3", seed=["20", 0]) | {"20": {"class_type": "X", "inputs": {"a": 1, "b": 2}}},
            "seed, which no node gives",
        ),
        (GRAPH | {"6": {"class_type": "Odd", "inputs": {}}}, "prompt, which no text node gives ('Odd')"),
        (GRAPH | {"30": {"class_type": "ControlNetApply", "inputs": {}}}, "'ControlNetApply' (node 30)"),
    ],
)
def test_what_is_not_used_is_named(graph, says):
    assert any(says in one for one in foreign.comfyui(graph)[1])


@pytest.mark.parametrize("graph", [{}, [], {"1": 5}, GRAPH | {"40": GRAPH["3"]}, {"3": {"class_type": "Note"}}])
def test_graphs_that_are_none(graph):
    with pytest.raises(UserError, match="only one can be repeated"):
        foreign.comfyui(graph)


def test_broken_inputs_are_no_fault():
    """Links to nowhere and to themselves, inputs of other kinds: what is left is read."""
    graph = {"3": {"class_type": "KSampler", "inputs": {"seed": True, "steps": "x", "positive": ["3", 0], "negative": ["99", 0], "model": [],
                                                        "latent_image": 5, "cfg": 2}}}  # fmt: skip
    found, _ = foreign.comfyui(graph)
    assert found == {"prompt_syntax": "comfyui", "guidance_scale": 2.0}
    assert not foreign.comfyui({"3": {"class_type": "KSampler", "inputs": {"steps": 1e999, "seed": 1e999}}})[
        0
    ].keys() & {"steps", "seed"}
    loop = {
        "3": {"class_type": "KSampler", "inputs": {"model": ["4", 0]}},
        "4": {"class_type": "LoraLoader", "inputs": {"lora_name": "x", "model": ["4", 0]}},
    }
    assert len(foreign.comfyui(loop)[1]) >= 1


def test_every_sampler_is_ours():
    assert {ours for _, _, ours in foreign.COMFYUI} <= set(samplers.SAMPLERS)


def test_files(tmp_path):
    info = PngInfo()
    info.add_text("prompt", json.dumps(GRAPH))
    Image.new("RGB", (4, 4)).save(tmp_path / "comfy.png", pnginfo=info)
    assert foreign.read(tmp_path / "comfy.png")[0] == "ComfyUI"
    text = "a cat\nSteps: 5, Sampler: Euler, CFG scale: 7, Seed: 1, Size: 64x64"
    info = PngInfo()
    info.add_itxt("parameters", text)
    Image.new("RGB", (4, 4)).save(tmp_path / "a.png", pnginfo=info)
    exif = Image.Exif()
    exif.get_ifd(0x8769)[0x9286] = b"UNICODE\0" + text.encode("utf-16-be")
    Image.new("RGB", (4, 4)).save(tmp_path / "a.jpg", exif=exif)
    png, jpeg = (foreign.read(tmp_path / f"a.{kind}") for kind in ("png", "jpg"))
    assert png == jpeg and png[0] == "AUTOMATIC1111" and png[1]["seed"] == 1
    Image.new("RGB", (4, 4)).save(tmp_path / "bare.png")
    assert foreign.read(tmp_path / "bare.png") is None
    (tmp_path / "text.png").write_text("x")
    with pytest.raises(UserError, match="not a readable image"):
        foreign.read(tmp_path / "text.png")
    info = PngInfo()
    info.add_text("prompt", "{" * 100_000)
    Image.new("RGB", (4, 4)).save(tmp_path / "deep.png", pnginfo=info)
    with pytest.raises(UserError, match="is no JSON"):
        foreign.read(tmp_path / "deep.png")


@pytest.mark.parametrize(("name", "ours"), [("euler", "flow_euler"), ("heun", "flow_heun"), ("dpmpp_2m", "dpmpp_2m")])
@pytest.mark.parametrize("adopted", [True, False])
def test_whose_sampler_it_is_the_model_tells(name, ours, adopted):
    """Of a flow "euler" is another one than of noise schedules, whose grid it keeps: SD 3.5 in ComfyUI is euler with sgm_uniform. What is typed is left as it is."""
    from nanodiff.stories import models

    found, _ = foreign.comfyui(changed("3", sampler_name=name, scheduler="sgm_uniform"))
    for kind in ("FlowMatchEulerDiscreteScheduler", "DDIMScheduler"):
        cfg = SimpleNamespace(adopted=adopted, **found)
        models.told(cfg, ({"_class_name": kind}, "a file"))
        assert cfg.scheduler == (ours if adopted and kind.startswith("Flow") else name) and cfg.sigmas == "sgm_uniform"


def test_sizes_of_a_graph():
    for sides in ((64.0, "64"), ("64", 64)):
        found, _ = foreign.comfyui(changed("5", width=sides[0], height=sides[1]))
        assert (found["width"], found["height"]) == (64, 64) and all(type(found[s]) is int for s in ("width", "height"))
    for side in ("x", 64.5, None, True):
        found, left = foreign.comfyui(changed("5", width=side))
        assert "width" not in found and "height" not in found and any("the size" in what for what in left)


@pytest.mark.parametrize(
    ("node", "said"),
    [
        ({"kind": "StringReplace", "string": "a red apple", "find": "red", "replace": "green"}, None),
        ({"kind": "CaseConverter", "string": "a red apple", "mode": "UPPERCASE"}, None),
        ({"kind": "Joined", "text": "hello", "text2": "world"}, None),
        ({"kind": "PrimitiveString", "value": "a pear"}, "a pear"),
        ({"kind": "StringConstantMultiline", "string": "a pear", "strip_newlines": True}, "a pear"),
        ({"kind": "ShowText|pysssss", "text": ["6", 0], "text_0": "a pear"}, "a pear"),
        ({"kind": "easy showAnything", "text": "a pear", "anything": ["6", 0]}, "a pear"),
        ({"kind": "PrimitiveString", "value": "a pear", "control_after_generate": "fixed"}, "a pear"),
    ],
)
def test_only_a_node_of_one_value_says_what_it_gives(node, said):
    kind, inputs = node["kind"], {k: v for k, v in node.items() if k != "kind"}
    graph = changed("6", text=["11", 0]) | {"11": {"class_type": kind, "inputs": inputs}}
    found, left = foreign.comfyui(graph)
    assert (found.get("prompt") or [None])[0] == said
    assert (said is None) == any("prompt, which no text node gives" in what for what in left)
