"""A1111's text: its own examples read, ours written and read back, what is not ours named."""

import pytest

from nanodiff.diffusion import samplers
from nanodiff.output import infotext

REAL = """masterpiece, (a cat:1.2), <lora:ink:0.6>
on two lines
Negative prompt: blurry,
low quality
Steps: 28, Sampler: DPM++ 2M, Schedule type: Karras, CFG scale: 6.5, Seed: 1234567890, Size: 512x768, Model hash: 6ce0161689, Model: v1-5-pruned, \
VAE: "a, b.pt", Clip skip: 2, Denoising strength: 0.45, Hires upscale: 1.5, Hires steps: 12, Hires upscaler: Latent, Lora hashes: "ink: 0123456789ab", \
Version: v1.9.4"""


def test_a_real_one():
    found, unused = infotext.parameters(REAL)
    assert found == {
        "prompt": ["masterpiece, (a cat:1.2), <lora:ink:0.6>\non two lines"], "prompt_syntax": "a1111",
        "negative_prompt": "blurry,\nlow quality", "steps": 28, "guidance_scale": 6.5, "seed": 1234567890, "width": 512, "height": 768,
        "scheduler": "dpmpp_2m_karras", "clip_skip": 1, "model": "v1-5-pruned", "model_hash": "6ce0161689", "hires": 1.5, "hires_strength": 12.5 / 26, "hires_steps": 26, "timestep_spacing": "linspace",
        "hires_latent": True,
    }  # fmt: skip
    assert int(26 * found["hires_strength"]) == 12, "as many steps as it says"
    assert [u.split(":")[0] for u in unused] == ["VAE", "Hires upscaler", "Lora hashes", "RNG"]
    assert "another picture" in unused[-1]


@pytest.mark.parametrize(
    ("sampler", "kind", "ours"),
    [
        ("Euler a", None, "euler_a"),
        ("DPM++ 2M", None, "dpmpp_2m"),  # before 1.9 there was no schedule type
        ("DPM++ 2M Karras", None, "dpmpp_2m_karras"),
        ("DPM++ 2M", "Automatic", "dpmpp_2m_karras"),
        ("DPM++ 2M SDE", "Karras", "dpmpp_2m_sde_karras"),
        ("DPM++ SDE", "Karras", "dpmpp_sde"),
        ("DPM++ SDE Karras", None, "dpmpp_sde"),
        ("DPM++ 2S a", "Automatic", "dpmpp_2s_a"),
        ("DPM++ 2M SDE", "Automatic", "dpmpp_2m_sde"),
        ("DPM++ 3M SDE", "Automatic", "dpmpp_3m_sde"),
        ("Restart", "Karras", None),
        ("Euler", "Karras", "euler"),
        ("Euler a", "Karras", None),
        ("DPM2", "Align Your Steps", "kdpm2"),
        ("Euler", "KL Optimal", None),
        ("UniPC", "Automatic", "unipc"),
        ("DPM++ 2M", "Normal", "dpmpp_2m"),
        ("LCM", "Normal", "lcm"),
    ],
)
def test_samplers(sampler, kind, ours):
    more = f", Schedule type: {kind}" if kind else ""
    found, unused = infotext.parameters(
        f"x\nSteps: 5, Sampler: {sampler}{more}, CFG scale: 7, Seed: 1, Size: 64x64, RNG: CPU"
    )
    assert found.get("scheduler") == ours
    left = [u.split(":")[0] for u in unused]
    if ours and kind in infotext.KINDS:
        assert any(u.startswith("Schedule type: ") and "another picture" in u for u in unused)
        left.remove("Schedule type")
    if ours and sampler.split(" Karras")[0] in infotext.OTHERWISE:
        assert left == ["Sampler"] and "another picture" in unused[0]
    else:
        assert left == ([] if ours else ["Sampler", *(["Schedule type"] if kind else [])])


@pytest.mark.parametrize(
    "said",
    [
        "Sampler: Euler a, Sigma noise: 1.02",
        "Sampler: Heun, Sigma churn: 2, Sigma tmax: 5000",
        "Sampler: Euler, Sigma noise: 1.02",
    ],
)
def test_churn_that_is_not_eulers_is_left(said):
    found, unused = infotext.parameters(f"x\nSteps: 5, {said}, Seed: 1, RNG: CPU")
    assert not set(infotext.CHURN) & set(found) and any("Sigma noise" in u or "Sigma churn" in u for u in unused)


@pytest.mark.parametrize(
    ("sampler", "grid"), [("DPM++ SDE", "karras"), ("DPM++ 2M SDE", "exponential"), ("DPM++ 2S a", "karras")]
)
def test_automatic_is_the_samplers_own_grid(sampler, grid):
    found, _ = infotext.parameters(f"x\nSteps: 5, Sampler: {sampler}, Schedule type: Automatic, Seed: 1")
    assert found["sigmas"] == grid


@pytest.mark.parametrize(
    ("text", "prompt"),
    [("just words", "just words"), ("a\nb: c, d", "a\nb: c, d"), ("Steps: 1, Sampler: Euler, Seed: 2", "")],
)
def test_texts_without_settings(text, prompt):
    assert infotext.parameters(text)[0]["prompt"] == [prompt]


RECORD = {"prompt": "a cat", "negative_prompt": "dog", "steps": 5, "scheduler": "ddim", "guidance_scale": 7.5, "seed": 3, "width": 8, "height": 16,
          "model": "some, model"}  # fmt: skip


@pytest.mark.parametrize(
    "more",
    [{}, {"clip_skip": 2}, {"hires": 2.0, "hires_strength": 0.5, "hires_steps": 8, "hires_latent": False}, {"eta": 0.5},
     {"scheduler": "dpmpp_2m_karras"}, {"scheduler": "euler", "sigmas": "beta"},
     {"scheduler": "euler", "s_churn": 10.0, "s_tmin": 0.5, "s_noise": 1.003}, {"scheduler": "euler_a", "negative_prompt": None}],
)  # fmt: skip
def test_what_is_written_is_read_back(more):
    record = RECORD | more
    found, unused = infotext.parameters(infotext.written(record))
    assert not unused
    found["prompt"] = found["prompt"][0]
    assert {k: v for k, v in found.items() if k not in ("prompt_syntax", "timestep_spacing")} == {
        k: v for k, v in record.items() if v is not None
    }
    assert found.get("timestep_spacing") == (None if record["scheduler"] == "ddim" else "linspace")


def test_every_name_in_the_menu_is_a_sampler():
    assert {ours for _, _, ours in infotext.MENU} <= set(samplers.SAMPLERS)
    for _, kinds, ours in infotext.MENU:
        name, kind = infotext.named(ours)
        assert kind in kinds and infotext.sampler_of(infotext.MENU, name, kind) == ours
    assert infotext.named("tcd") == ("tcd", "")


def test_hashes_and_image_to_image_are_shown():
    text = infotext.written(RECORD | {"lora_hashes": {"ink": "0123456789ab"}, "strength": 0.7, "mask_blur": 4,
                                      "model_hash": "6ce0161689", "refiner": "xl.safetensors", "refiner_start": 0.8})  # fmt: skip
    assert 'Lora hashes: "ink: 0123456789ab"' in text and "Denoising strength: 0.7, Mask blur: 4" in text
    assert "Model hash: 6ce0161689, Model: " in text and "Refiner: xl.safetensors, Refiner switch at: 0.8" in text


@pytest.mark.parametrize(
    "last",
    [
        'Steps: 5, TI hashes: "a\\_b: 12", Seed: 1, Size: 64x64',
        "Steps: 5, CFG scale: inf, Hires upscale: nan, Seed: 1e999",
    ],
)
def test_odd_values_are_left(last):
    found, unused = infotext.parameters(f"x\n{last}")
    assert found["steps"] == 5 and "hires" not in found and "guidance_scale" not in found and len(unused) >= 2


def test_denoising_of_zero_is_told():
    text = "a\nSteps: 4, Sampler: Euler, CFG scale: 7, Seed: 5, Size: 64x64, Denoising strength: 0, Hires upscale: 2, Hires upscaler: Lanczos"
    found, left = infotext.parameters(text)
    assert "hires_strength" not in found and any("Denoising strength" in what for what in left)
