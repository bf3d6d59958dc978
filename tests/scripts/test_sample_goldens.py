"""sample.py on every tiny pipeline: the recordings, reached through the command line as a user types it."""

import json

import pytest
from PIL import Image
from util import GOLDEN, TINY, copy_model, golden, max_error

import sample
from nanodiff import commandline, weights
from nanodiff.diffusion import samplers
from nanodiff.diffusion.schedule import Schedule
from nanodiff.files import write_json
from nanodiff.output.images import to_pixels
from nanodiff.stories import sampling

CASES = sorted(p.stem for p in (GOLDEN / "goldens").glob("*.pipe.*.json"))
SIZES = {"original_size": "--original-size", "target_size": "--target-size", "crops_coords_top_left": "--crop"}
PLAIN = ("guidance_scale", "guidance_rescale", "eta", "clip_skip", "height", "width", "strength", "negative_prompt",
         "prompt_2", "prompt_3", "negative_prompt_2", "negative_prompt_3", "max_sequence_length", "denoising_end")  # fmt: skip


# One generator for two pictures; seeds that do not follow each other; a negative prompt for each picture.
UNREACHABLE = {"sd15.pipe.two_images_one_generator", "sd15.pipe.batch2", "sd35-medium.pipe.batch2"}


def same(a, b):
    """Are two scheduler configurations one (`-inf` is a string in some recordings)?"""
    return {k: str(v) for k, v in a.items()} == {k: str(v) for k, v in b.items()}


def argv_of(case, tmp_path):
    """The command line of a recording; None when no command line can ask for it."""
    tensors, facts = golden(case)
    args, call = facts["args"], dict(facts["args"]["call"])
    model = TINY / args["pipeline"].split("/")[1]
    argv = ["--model", model, "--steps", call.pop("num_inference_steps"), "--save-latents", "--output-dir", tmp_path]
    own = Schedule.from_config(json.loads((model / "scheduler" / "scheduler_config.json").read_text()))
    wanted = Schedule.from_config(
        {k: v for k, v in args["scheduler"].items() if k != "class"}, args["scheduler"]["class"]
    )
    if (own.kind, own.cfg) != (wanted.kind, wanted.cfg):
        names = [n for n in samplers.SAMPLERS if samplers.SAMPLERS[n][1] == wanted.kind]
        names = [n for n in names if same(samplers.rescheduled(own, n).cfg, wanted.cfg)]
        if names:
            argv += ["--scheduler", names[0]]
        else:  # a hand-made configuration: as a model that brings it
            argv[1] = copy_model(model.name, tmp_path / model.name)
            write_json(argv[1] / "scheduler" / "scheduler_config.json", wanted.to_json())
            index = json.loads((argv[1] / "model_index.json").read_text())
            write_json(argv[1] / "model_index.json", index | {"scheduler": ["diffusers", wanted.kind]})
            names = [samplers.name_of(wanted)]
        if names[0] in ("ddim", "pndm") and wanted.cfg["timestep_spacing"] != "leading":
            argv += ["--diffusers-quirks"]
    prompts = call.pop("prompt")
    for prompt in [prompts] if isinstance(prompts, str) else prompts:
        argv += ["--prompt", prompt]
    n = call.pop("num_images_per_prompt", 1)
    seeds = call.pop("seed")
    if isinstance(seeds, list):
        if seeds != list(range(seeds[0], seeds[0] + len(seeds))):
            return None
        argv += ["--num-images", n]
    elif n > 1 or isinstance(prompts, list):
        return None
    argv += ["--seed", seeds[0] if isinstance(seeds, list) else seeds]
    for key in list(call):
        sign, name = ("negative-", key.removeprefix("negative_")) if key.startswith("negative_") else ("", key)
        if name in SIZES:
            first, second = call.pop(key)
            argv += [SIZES[name].replace("--", f"--{sign}"), f"{second}x{first}"]
        elif key in PLAIN:
            value = call.pop(key)
            if isinstance(value, list):
                if len(set(value)) > 1:
                    return None
                value = value[0]
            argv += ["--" + key.replace("_", "-"), value]
    if "skip_guidance_layers" in call:
        argv += ["--skip-layers", ",".join(map(str, call.pop("skip_guidance_layers")))]
        for part in ("scale", "start", "stop"):
            if f"skip_layer_guidance_{part}" in call:
                argv += [f"--skip-layer-{part}", call.pop(f"skip_layer_guidance_{part}")]
    call.pop("output_type", None)
    assert not call, f"{case}: arguments that this test does not pass on: {call}"
    for name, flag in (("input_image", "--init-image"), ("input_mask", "--mask")):
        if name in tensors:
            Image.fromarray(tensors[name].numpy()).save(tmp_path / f"{name}.png")
            argv += [flag, tmp_path / f"{name}.png"]
    return [str(a) for a in argv] + (["--no-t5"] if "no_t5" in case else [])


@pytest.mark.parametrize("case", CASES)
def test_golden_through_the_command_line(case, tmp_path):
    argv = argv_of(case, tmp_path)
    if argv is None:
        assert case in UNREACHABLE, case
        return
    assert case not in UNREACHABLE
    sampling.main(commandline.parse(sample.Config, argv))
    want, _ = golden(case)
    got = weights.load_tensors(tmp_path / "latents.safetensors")["latents"]
    assert max_error(got, want["final_latents"]) < 1e-4
    for i, image in enumerate(want.get("image", ())):
        pixels = to_pixels(Image.open(tmp_path / f"{i:05d}.png")) * 127.5 + 127.5
        off = (pixels.permute(1, 2, 0).round() - image.float()).abs()
        assert off.max() <= 1 and (off > 0).float().mean() < 1e-3
    if "--init-image" not in argv:  # what stands in the picture makes it again
        picture, again = tmp_path / "00000.png", tmp_path / "again"
        sampling.main(commandline.parse(sample.Config, ["--from-image", str(picture), "--output-dir", str(again)]))
        first, second = (to_pixels(Image.open(p)) * 127.5 for p in (picture, again / "00000.png"))
        assert (first - second).abs().max() <= 1.01
