"""Inception-v3 against the recordings of torch-fidelity's (metrics.inception, recipe weights), and folded against plain."""

import json

import pytest
import torch
from util import GOLDEN, golden, manifest, max_error, recipe, rms_ratio

from nanodiff.evaluation.features import tf1_bilinear
from nanodiff.models import inception


@pytest.fixture(scope="module")
def model():
    made = inception.InceptionV3()
    made.load_state_dict(recipe(made, "inception"), strict=False)
    return made.eval().requires_grad_(False)


def test_names_and_shapes_are_the_published_files():
    _, want = manifest("inception-v3-fid")
    assert {k: tuple(v.shape) for k, v in inception.InceptionV3().state_dict().items()} == want


@pytest.mark.parametrize("folded", [False, True])
def test_features_and_logits(model, folded):
    tensors, _ = golden("metrics.inception")
    x = torch.stack([(tf1_bilinear(i.float()) - 128) / 128 for i in tensors["images"]])
    if folded:
        again = inception.InceptionV3()
        again.load_state_dict(model.state_dict())
        model, x = inception.fold(again.eval().requires_grad_(False)), x.contiguous(memory_format=torch.channels_last)
    for tap in inception.TAPS:
        assert max_error(model(x, tap), tensors[str(tap)]) < 1e-4
    assert max_error(model.logits(model(x)), tensors["logits_unbiased"]) < 1e-4


def test_folded_takes_any_batch(model):
    again = inception.InceptionV3()
    again.load_state_dict(model.state_dict())
    folded = inception.fold(again.eval().requires_grad_(False))
    for n in (1, 3, 1):
        x = torch.randn(n, 3, 299, 299)
        assert rms_ratio(folded(x, 192), model(x, 192)) < 1e-5


def test_torchvisions_network():
    want = json.loads((GOLDEN / "goldens" / "metrics.more.json").read_text())["inception_torchvision"]
    other = inception.InceptionV3("torchvision")
    other.load_state_dict(recipe(other, "inception"), strict=False)
    x = torch.rand(2, 3, 299, 299, generator=torch.Generator().manual_seed(0)) * 2 - 1
    with torch.no_grad():
        features = other.eval()(x)
        logits = other.logits(features)
    for got, name in ((features, "feature"), (logits, "logit")):
        assert max_error(got[:, :24], torch.tensor(want[f"{name}s"])) < 1e-4
        assert max_error(got.mean(1), torch.tensor(want[f"{name}_means"])) < 1e-5


def test_torchvisions_network_differs_in_its_pools():
    fid, other = inception.InceptionV3(), inception.InceptionV3("torchvision")
    assert other.fc.weight.shape == (1000, 2048) and set(fid.state_dict()) == set(other.state_dict())
    x = torch.ones(1, 8, 5, 5)
    assert fid.Mixed_5b.pool(x).eq(1).all() and other.Mixed_5b.pool(x)[0, 0, 0, 0] == pytest.approx(4 / 9)
    spike = torch.zeros(1, 8, 5, 5)
    spike[..., 2, 2] = 9
    assert fid.Mixed_7c.pool(spike)[0, 0, 1, 1] == 9 and other.Mixed_7c.pool(spike)[0, 0, 1, 1] == 1
    assert fid.Mixed_7b.pool(spike)[0, 0, 1, 1] == 1
