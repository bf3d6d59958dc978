"""What a denoiser is trained on."""

import pytest
import torch
from PIL import Image
from util import TINY

from nanodiff import data, pipeline
from nanodiff.config import UserError
from nanodiff.models.vae import AutoencoderKL
from nanodiff.training import build, latents, loader, options, teach

VAE = {"block_out_channels": (8, 8), "norm_num_groups": 4, "down_block_types": ("DownEncoderBlock2D",) * 2,
       "up_block_types": ("UpDecoderBlock2D",) * 2, "scaling_factor": 0.5}  # fmt: skip


@pytest.fixture
def pictures(tmp_path):
    root = tmp_path / "pictures"
    root.mkdir()
    for i, colour in enumerate(["red", "lime", "blue", "white", "black"]):
        image = Image.new("RGB", (16, 16), colour)
        image.putpixel((0, 0), (9, 9, 9))
        image.save(root / f"{i}.png")
    return root


def vae(seed=0):
    torch.manual_seed(seed)
    return AutoencoderKL(AutoencoderKL.Config.from_json(VAE)).eval().requires_grad_(False)


def feed(root, flip=True, **more):
    return loader.Feed(data.load(root, captions=False), loader.Transform(16, flip=flip), 1, 3, **more)


def x0s(f, x0_of, n=3):
    return [x0_of(b) for step in range(n) for b in f.update(step)]


def test_cached_latents_are_the_uncached_ones(pictures, tmp_path):
    """Mirrored ones included, posterior noise included."""
    plain, cached = feed(pictures), feed(pictures)
    a = x0s(plain, latents.Latents(vae(), plain, 1, "cpu", cached=False))
    b = x0s(cached, latents.Latents(vae(), cached, 1, "cpu", tmp_path / "c"))
    assert not cached.decoder.pictures and plain.decoder.pictures
    for x, y in zip(a, b, strict=True):
        assert torch.allclose(x, y, atol=1e-5)
    again = feed(pictures)
    c = x0s(again, latents.Latents(vae(), again, 1, "cpu", tmp_path / "c"))
    assert all(torch.equal(x, y) for x, y in zip(b, c, strict=True))


def test_a_changed_picture_or_vae_is_seen(pictures, tmp_path):
    def first(seed=0):
        f = feed(pictures, flip=False)
        made = latents.Latents(vae(seed), f, 1, "cpu", tmp_path / "c")
        return torch.stack([made.cache[made.names[i, False]] for i in range(5)])

    before = first()
    Image.new("RGB", (16, 16), "orange").save(pictures / "2.png")
    after = first()
    assert not torch.equal(before[2], after[2]) and torch.equal(before[[0, 1, 3, 4]], after[[0, 1, 3, 4]])
    assert not torch.equal(first(seed=1), after) and len(list((tmp_path / "c").iterdir())) == 2


def test_random_cuts_are_not_cached(pictures, capsys):
    f = loader.Feed(data.load(pictures, captions=False), loader.Transform(16, jitter=0.2), 1, 3)
    made = latents.Latents(vae(), f, 1, "cpu")
    assert not made.cached and f.decoder.pictures and "not once" in capsys.readouterr().err
    assert x0s(f, made)[0].shape == (3, 4, 8, 8)


def test_bad_pictures_in_the_cache(pictures, tmp_path):
    (pictures / "3.png").write_bytes(b"broken")
    with pytest.raises(UserError, match=r"3\.png"):
        latents.Latents(vae(), feed(pictures), 1, "cpu", tmp_path / "c")
    f = feed(pictures, policy="skip", limit=0.5)
    made = latents.Latents(vae(), f, 1, "cpu", tmp_path / "c")
    batches = [b for step in range(4) for b in f.update(step)]
    assert all(3 not in b.positions for b in batches) and f.bad[3][0] == "3.png"
    assert all(torch.isfinite(made(b)).all() for b in batches)
    with pytest.raises(UserError, match=r"3\.png"):
        latents.Latents(vae(), feed(pictures), 1, "cpu", tmp_path / "c")


def test_nan_latents_name_the_picture(pictures):
    net = vae()
    net.quant_conv.bias.data.fill_(float("nan"))
    with pytest.raises(UserError, match=r"latents of 0\.png are not finite"):
        latents.Latents(net, feed(pictures), 1, "cpu")


def batch(indices, positions):
    return loader.Batch(
        indices, positions, torch.zeros(len(indices), dtype=torch.bool), None, None, len(indices), 1.0, True, [], 0.0
    )


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
def test_cached_texts_are_the_pipelines(name, tmp_path):
    sd = pipeline.load(TINY / name)
    texts = [("a red apple",), ("the moon", "a moon")]
    made = latents.Texts(sd, texts, 0, "cpu", folder=tmp_path)
    states, pooled = made(batch([0, 1], [0, 1]), ["a red apple", ""])
    want = sd.encode(["a red apple", ""])
    assert torch.allclose(states, want.states, atol=1e-6)
    assert (pooled is None) == (want.pooled is None) and (
        pooled is None or torch.allclose(pooled, want.pooled, atol=1e-6)
    )


def test_captions_are_drawn_by_index():
    sd = pipeline.load(TINY / "sd15")
    made = latents.Texts(sd, [("a", "b", "c"), ("d",)], 3, "cpu", dropout=0.25)
    drawn = made.chosen(batch(list(range(2000)), [0, 1] * 1000))
    again = made.chosen(batch(list(range(100, 140)), [0, 1] * 20))
    assert drawn[100:140] == again
    counts = {t: drawn.count(t) for t in ("a", "b", "c", "d", None)}
    assert 430 < counts[None] < 570 and all(200 < counts[t] < 300 for t in "abc") and 680 < counts["d"] < 820


@pytest.mark.parametrize("name", ["sd15", "sdxl", "sd35-medium"])
@pytest.mark.parametrize("cached", [True, False])
def test_a_dropped_caption_is_what_guidance_draws_against(name, cached):
    """SDXL's is zeros, not the empty text, which stays a caption like any other."""
    sd = pipeline.load(TINY / name)
    made = latents.Texts(sd, [("a red apple",)], 0, "cpu", dropout=1.0, cached=cached)
    states, pooled = made(batch([0, 1], [0, 0]))
    _, nothing = sd.conditions(["a red apple"] * 2, None)
    assert torch.allclose(states, nothing.states, atol=1e-6)
    assert pooled is None or torch.allclose(pooled, nothing.pooled, atol=1e-6)
    states, _ = made(batch([0], [0]), [""])
    assert torch.allclose(states, sd.encode([""]).states, atol=1e-6)
    states, _ = made(batch([0, 1], [0, 0]), [None, "a red apple"])
    assert torch.allclose(states[1], sd.encode(["a red apple"]).states[0], atol=1e-6)


def test_sdxl_is_told_the_pictures_own_size():
    sd, told = pipeline.load(TINY / "sdxl"), torch.tensor([[120.0, 40.0, 7.0, 0.0, 64.0, 64.0]])
    seen = []

    def net(x, t, states, added):
        seen.append(added[1])
        return x

    x0, text = torch.zeros(1, 4, 32, 32), sd.encode(["a"])
    made = build.losses(options.Noise(), sd, {sd.denoiser_name: net}, "cpu")
    for given in (told, None):
        made(batch([0], [0])._replace(told=given), lambda b: x0, lambda b: (text.states, text.pooled), 0)
    assert seen[0].tolist() == told.tolist()
    assert seen[1].tolist() == [[32.0 * sd.downscale, 32.0 * sd.downscale, 0.0, 0.0] + 2 * [32.0 * sd.downscale]]


def test_a_dropped_caption_of_an_sdxl_that_has_no_zeros():
    sd = pipeline.load(TINY / "sdxl")
    sd.index = {**sd.index, "force_zeros_for_empty_prompt": False}
    made = latents.Texts(sd, [("a red apple",)], 0, "cpu", dropout=1.0)
    calls = []
    sd.encode_uniques, own = lambda *a: calls.append(a) or own(*a), sd.encode_uniques
    with torch.autocast("cpu", torch.bfloat16):
        states, _ = made(batch([0], [0]))
    assert not calls, "the empty text is in the cache"
    assert torch.equal(states, made([], [""])[0]) and states.any()


@pytest.mark.parametrize("zeros", [True, False])
def test_a_few_step_students_guidance_is_the_models(zeros):
    """Against zeros or the empty text, as the SDXL at hand is drawn with."""
    sd = pipeline.load(TINY / "sdxl")
    sd.index = {**sd.index, "force_zeros_for_empty_prompt": zeros}
    texts = latents.Texts(sd, [("a red apple",)], 0, "cpu")
    lesson = teach.Lesson(sd, None, {}, None, texts, 0, 0.0)
    states, pooled = lesson.nothing(texts(batch([0], [0])), batch([0], [0]))
    _, nothing = sd.conditions(["a red apple"], None)
    assert torch.allclose(states, nothing.states, atol=1e-6) and torch.allclose(pooled, nothing.pooled, atol=1e-6)
    assert states.any() != zeros
