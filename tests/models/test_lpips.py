"""VGG16 and LPIPS against the recordings (metrics.lpips; weights by the recipe of the recordings)."""

import pytest
import torch
from util import ROOT, golden, max_error, recipe

from nanodiff.config import UserError
from nanodiff.models import lpips
from nanodiff.weights import save_tensors

LINS = ROOT / "assets" / "lpips" / "vgg_lin_v0.1.safetensors"


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    path = tmp_path_factory.mktemp("vgg") / "vgg.safetensors"
    save_tensors(path, recipe(lpips.VGG16(), "vgg16"))
    return lpips.load_lpips(path, LINS)


def test_distances_and_features(model):
    tensors, facts = golden("metrics.lpips")
    pixels = [tensors[f"image.{i}"].permute(2, 0, 1)[None].float() / 127.5 - 1 for i in range(4)]
    with torch.no_grad():
        for pair, want in (
            facts["args"]["distance"].items() if "distance" in facts["args"] else facts["distance"].items()
        ):
            a, b = map(int, pair.split("-"))
            assert model(pixels[a], pixels[b]).item() == pytest.approx(want, rel=1e-4, abs=1e-9)
        for i, feature in enumerate(model.vgg(pixels[0])):
            assert max_error(feature.mean((2, 3)), tensors[f"feature_mean.{i}"]) < 1e-4


def test_the_head_alone(model):
    tensors, facts = golden("metrics.lpips")
    fa, fb = ([tensors[f"head.feat{k}.{i}"].float() for i in range(5)] for k in (1, 2))
    want = facts.get("head_only_distance") or facts["args"]["head_only_distance"]
    assert model.distance(fa, fb).item() == pytest.approx(want, rel=1e-4)


def test_features_mse_is_zero_at_home_and_has_a_gradient(model):
    x = torch.rand(2, 3, 32, 32) * 2 - 1
    y = (x + 0.1).requires_grad_()
    assert model.vgg.features_mse(x, x).tolist() == [0, 0]
    model.vgg.features_mse(x, y).sum().backward()
    assert y.grad.abs().sum() > 0 and all(p.grad is None for p in model.parameters())


def test_other_files_are_refused(tmp_path):
    save_tensors(tmp_path / "x.safetensors", {"features.0.weight": torch.zeros(3)})
    with pytest.raises(
        UserError, match=r"x\.safetensors: 26 tensors are missing or of another shape, such as features\.0\.weight"
    ):
        lpips.load_vgg(tmp_path / "x.safetensors")
