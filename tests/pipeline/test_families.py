"""The records of the families agree with each other and with what is built from them."""

import pytest

from nanodiff import pipeline, weights
from nanodiff.pipeline import families, sources
from nanodiff.weights import hub

SETTINGS = {
    "SD 1": (50, 7.5),
    "SD 2": (50, 7.5),
    "SDXL": (50, 7.5),
    "SDXL refiner": (50, 7.5),
    "SD 3 medium": (28, 7.0),
    "SD 3.5 medium": (40, 4.5),
    "SD 3.5 large": (28, 3.5),
}


@pytest.mark.parametrize("family", families.KNOWN)
def test_released_models(family):
    """Each released configuration builds, is of a family, and is sampled as its makers say."""
    kind, configs, _ = families.KNOWN[family]
    record = families.FAMILIES[kind]
    assert kind in (record.kinds[0], record.name) and record.denoiser in configs
    assert {p for p in record.required if not p.startswith("tokenizer")} <= set(configs)
    cfg = families.BUILDERS[record.denoiser].Config.from_json(configs[record.denoiser], family)
    assert record.settings(cfg) == SETTINGS[family]


def test_stable_diffusion_3_medium_is_known_by_name():
    src = sources.configs("stable-diffusion-3-medium")
    net = weights.skeleton(src.builder("transformer"), src.config("transformer"))
    assert sum(p.numel() for p in net.parameters()) == pytest.approx(2.03e9, rel=0.01)  # "2B"
    assert hub.ALIASES["stable-diffusion-3-medium"] in families.RELEASED


def test_every_family_has_its_class():
    assert {k: c.family.name for k, c in pipeline.FAMILIES.items()} == {k: f.name for k, f in families.FAMILIES.items()}
    assert {f.removesuffix(" inpainting") for f in families.RELEASED.values()} <= {
        *families.KNOWN,
        "SD 2 base",
        "SD 2 turbo",
        "SDXL turbo",
    }
