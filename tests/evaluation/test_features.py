"""Features: the resize rule of each program, the weights' names and hashes, the cache, order and batches."""

import hashlib
import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image
from util import TINY, golden, max_error, recipe

from nanodiff import data
from nanodiff.config import UserError
from nanodiff.evaluation import features
from nanodiff.models.inception import InceptionV3
from nanodiff.models.lpips import VGG16
from nanodiff.weights import load_tensors, save_tensors

NAME = "pt_inception-2015-12-05-6726825d"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("weights")
    save_tensors(path / f"{NAME}.safetensors", recipe(InceptionV3(), "inception"))
    return path


@pytest.fixture(scope="module")
def pictures(tmp_path_factory):
    root, rng = tmp_path_factory.mktemp("pictures"), np.random.default_rng(0)
    for i in range(9):
        Image.fromarray(rng.integers(0, 256, (20 + i, 31 - i, 3), np.uint8)).save(root / f"{i}.png")
    return root


@pytest.mark.parametrize("mode", features.MODES)
def test_each_programs_features(mode, folder):
    """Three pictures, one of them reduced, through the network as each program would."""
    tensors, _ = golden("metrics.modes")
    images = [Image.fromarray(i.permute(1, 2, 0).numpy()) for i in golden("metrics.inception")[0]["images"]]
    images.append(Image.fromarray(tensors["image"].numpy()))
    net = features.inception(folder, mode)
    got = net.encode(torch.stack([net.prepare(i) for i in images]))
    assert max_error(got, tensors[f"features.{mode}"]) < 1e-4
    others = [m for m in features.MODES if m != mode]
    assert all(max_error(got, tensors[f"features.{m}"]) > 1e-3 for m in others), "the rules are told apart"
    assert net.facts["resize"] == mode


def test_provenance(folder):
    net = features.inception(folder)
    path = folder / f"{NAME}.safetensors"
    assert net.facts["weights_sha256"] == hashlib.sha256(path.read_bytes()).hexdigest()
    assert net.facts["weights"] == path.name and net.facts["published"] is None
    keys = {n.key() for n in (net, features.inception(folder, "clean-fid"), features.inception(folder, tap=192))}
    assert len(keys) == 3, "another rule or tap is another feature"


def test_absent_weights_say_where_they_are(tmp_path):
    for make, said in ((features.inception, "6726825d"), (features.perceptual, "397923af")):
        for where in (None, tmp_path):
            with pytest.raises(features.Absent, match=f"https://.*SHA-256 begins {said}"):
                make(where)
    with pytest.raises(UserError, match="no such folder"):
        features.inception(tmp_path / "absent")


def test_pickles_only_when_allowed(tmp_path, capsys):
    torch.save(recipe(InceptionV3(), "inception"), tmp_path / f"{NAME}.pth")
    with pytest.raises(UserError, match="a pickle; add `allow_pickle`"):
        features.inception(tmp_path)
    net = features.inception(tmp_path, allow_pickle=True)
    assert net.facts["published"] is False and "other weights, other numbers" in capsys.readouterr().err


def test_another_networks_file(tmp_path):
    state = recipe(InceptionV3(), "inception")
    del state["Mixed_6c.branch7x7_2.conv.weight"]
    save_tensors(tmp_path / f"{NAME}.safetensors", state)
    with pytest.raises(UserError, match=r"misses tensor Mixed_6c.branch7x7_2.conv.weight"):
        features.inception(tmp_path)


def test_torchvisions_file_has_another_head(tmp_path):
    state = recipe(InceptionV3("torchvision"), "x") | {"AuxLogits.fc.weight": torch.zeros(3)}
    save_tensors(tmp_path / "inception_v3_google-0cc3c7bd.safetensors", state)
    net = features.inception(tmp_path, variant="torchvision")
    assert net.logits(torch.zeros(2, 2048)).shape == (2, 1000)


def test_clip_prepares_as_recorded():
    tensors, _ = golden("clip.forward")
    net = features.clip(TINY / "clip")
    pixels = torch.stack([net.prepare(Image.fromarray(tensors[f"image.{i}"].numpy())) for i in range(3)])
    assert max_error(pixels, tensors["pixel_values"]) < 1e-5
    texts = ["a photo of a corgi puppy running on the beach at sunset, highly detailed", "Fruit Salad with Fennel, Watercress, and Smoked Salt",
             "It's a dog's life: 3 cats & 12 birds!"]  # fmt: skip
    assert max_error(torch.from_numpy(net.texts(texts)), tensors["text_embeds_normalized"]) < 1e-4


def test_lpips_from_the_weights_folder(tmp_path):
    save_tensors(tmp_path / "vgg16-397923af.safetensors", recipe(VGG16(), "vgg16"))
    model, facts = features.perceptual(tmp_path)
    tensors, want = golden("metrics.lpips")
    a, b = (tensors[f"image.{i}"].permute(2, 0, 1)[None].float() / 127.5 - 1 for i in (0, 1))
    assert model(a, b).item() == pytest.approx(want["distance"]["0-1"], rel=1e-4) and facts["weights_sha256"]


def counted(net):
    """The network, counting what it encodes."""
    calls, encode = [], net.encode
    net.encode = lambda batch: calls.append(len(batch)) or encode(batch)
    return calls


def test_cache_order_batches_and_workers(pictures, tmp_path):
    dataset, net = data.load(pictures, captions=False), features.colour_pixels()
    calls = counted(net)
    want = features.extract(net, dataset, batch_size=4)
    assert want.shape == (9, 768) and sum(calls) == 9
    for size, workers in ((1, 1), (9, 3)):
        assert np.array_equal(features.extract(net, dataset, batch_size=size, workers=workers), want)
    shuffled = dataset.subset([3, 1, 8, 8, 0])
    assert np.array_equal(features.extract(net, shuffled), want[[3, 1, 8, 8, 0]])
    features.extract(net, dataset, tmp_path)
    calls.clear()
    assert np.array_equal(features.extract(net, dataset, tmp_path), want) and not calls, "from the cache"
    Image.new("RGB", (9, 9), "red").save(pictures / "4.png")
    again = features.extract(net, data.load(pictures, captions=False), tmp_path)
    assert sum(calls) == 1 and not np.array_equal(again[4], want[4]), "a changed picture is another one"


def test_pixels_in_memory_count_as_their_file(folder):
    """uint8 and floats, arrays and tensors, give what the PNG gives; another scale is refused, not cut."""
    net, rng = features.inception(folder, tap=64), np.random.default_rng(1)
    pixels = rng.integers(0, 256, (3, 40, 30, 3), np.uint8)
    want = net.encode(torch.stack([net.prepare(Image.fromarray(p)) for p in pixels])).numpy()
    forms = (
        pixels,
        pixels / 255,
        torch.from_numpy(pixels).permute(0, 3, 1, 2),
        torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255,
    )
    for form in forms:
        np.testing.assert_allclose(features.of_pixels(net, form, 2), want, rtol=1e-4, atol=1e-5)
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        features.of_pixels(net, pixels / 127.5 - 1)


def test_what_was_computed_before_a_fault_is_kept(pictures, tmp_path):
    broken = tmp_path / "pictures"
    shutil.copytree(pictures, broken)
    (broken / "8.png").write_bytes(b"not a picture")
    net = features.colour_pixels()
    with pytest.raises(UserError, match=r"8.png: not a readable image"):
        features.extract(net, data.load(broken, captions=False), tmp_path / "cache", batch_size=2)
    (file,) = (tmp_path / "cache").iterdir()
    assert len(load_tensors(file)) == 8


def test_a_clips_key_sees_its_settings(tmp_path):
    folder = tmp_path / "clip"
    shutil.copytree(TINY / "clip", folder)
    keys = [features.clip(folder).key()]
    for name, old, new in (("config.json", "quick_gelu", "gelu"), ("preprocessor_config.json", "0.48145466", "0.5")):
        (folder / name).write_text((folder / name).read_text().replace(old, new))
        keys.append(features.clip(folder).key())
    assert len(set(keys)) == 3
    for old, new, said in (
        ('"resample": 3', '"resample": 2', "resample 2"),
        ("0.5,", '"x",', "image_mean"),
        ('"size": 32', '"size": 64', "size 64"),
        ('"size": 32', '"size": {"height": 32, "width": 32}', "size .*height"),
        ('"do_center_crop": true', '"do_center_crop": false', "do_center_crop False"),
        ('"resample": 3', '"resample": 3, "rescale_factor": 0.007', "rescale_factor 0.007"),
    ):
        text = (folder / "preprocessor_config.json").read_text()
        (folder / "preprocessor_config.json").write_text(text.replace(old, new))
        with pytest.raises(UserError, match=said):
            features.clip(folder)
        (folder / "preprocessor_config.json").write_text(text)
    picture = Image.new("RGB", (40, 36), (200, 30, 90))
    want, key = features.clip(folder).prepare(picture), features.clip(folder).key()
    (folder / "preprocessor_config.json").unlink()
    assert not np.array_equal(features.clip(folder).prepare(picture), want), "its mean and std are CLIP's own again"
    # as transformers 5 writes it
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads(text), "processor_class": "CLIPProcessor"})
    )
    assert np.array_equal(features.clip(folder).prepare(picture), want) and features.clip(folder).key() != key
    (folder / "processor_config.json").write_text(
        json.dumps({"image_processor": json.loads(text) | {"do_center_crop": False}})
    )
    with pytest.raises(UserError, match=r"processor_config\.json: do_center_crop False"):
        features.clip(folder)


def test_features_that_are_not_finite(pictures):
    net = features.colour_pixels()
    net.encode = lambda batch: torch.full((len(batch), 3), torch.nan)
    with pytest.raises(UserError, match=r"0.png: its features by .* are not finite"):
        features.extract(net, data.load(pictures, captions=False))


def test_unreadable_picture_is_named(pictures):
    broken = pictures / "5.png"
    broken.write_bytes(broken.read_bytes()[:60])
    with pytest.raises(UserError, match=r"5.png: not a readable image"):
        features.extract(features.colour_pixels(), data.load(pictures, captions=False))
