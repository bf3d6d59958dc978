"""Pairs of pictures against scikit-image, OpenCV and imagehash (recorded), and what must hold for any pair."""

import json

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from util import GOLDEN, golden

from nanodiff.config import UserError
from nanodiff.evaluation import similarity as s

MORE = json.loads((GOLDEN / "goldens" / "metrics.more.json").read_text())


@pytest.fixture(scope="module")
def recorded():
    tensors, facts = golden("metrics.image")
    return [tensors[f"image.{i}"].numpy() for i in range(6)], facts


def smooth(seed, h, w):
    """A picture of the recording metrics.more."""
    rng = np.random.default_rng(seed)
    small = Image.fromarray(rng.integers(0, 256, (h // 12, w // 12, 3), np.uint8)).resize(
        (w, h), Image.Resampling.BICUBIC
    )
    return (np.asarray(small).astype(int) + rng.integers(-9, 10, (h, w, 3))).clip(0, 255).astype(np.uint8)


def test_one_picture(recorded):
    images, facts = recorded
    for image, want in zip(images, facts["single"], strict=True):
        assert s.hexadecimal(s.phash(image)) == want["phash"]
        assert s.sharpness(image, "mirror") == pytest.approx(want["laplacian_variance"], rel=1e-8)
        assert s.grey(image).mean() == pytest.approx(want["gray_mean"], rel=1e-8)


def test_pairs(recorded):
    images, facts = recorded
    for want in facts["pairs"]:
        a, b = (images[i] for i in want["pair"])
        assert s.ssim(a, b) == pytest.approx(want["ssim_color"], rel=1e-6)
        assert s.ssim(s.grey(a), s.grey(b)) == pytest.approx(want["ssim_gray"], rel=1e-6)
        assert s.ssim_gaussian(a, b) == pytest.approx(want["ssim_color_gaussian"], rel=1e-6)
        assert s.mse(a, b) == pytest.approx(want["mse"], rel=1e-8)
        assert s.psnr(s.mse(a, b)) == (pytest.approx(want["psnr"], rel=1e-8) if want["psnr"] is not None else np.inf)
        assert (s.phash(a) != s.phash(b)).sum() == want["phash_distance"]
        h, g, wanted = s.histogram(a, 8), s.histogram(b, 8), want["hist3d8"]
        assert s.hist_correlation(h, g) == pytest.approx(wanted["correlation"], rel=1e-6)
        assert s.hist_bhattacharyya(h, g) == pytest.approx(wanted["bhattacharyya"], rel=1e-6, abs=1e-7)
        sharp = s.ratio(s.sharpness(b, "mirror"), s.sharpness(a, "mirror"))
        assert sharp == pytest.approx(want["sharpness_ratio"], rel=1e-6)  # recorded as second over first


def test_against_scikit_image_and_ms_ssim():
    a = smooth(1, 176, 203)
    b = (a.astype(int) + np.random.default_rng(2).integers(-25, 26, a.shape)).clip(0, 255).astype(np.uint8)
    assert s.ms_ssim(a, b) == pytest.approx(MORE["ms_ssim"], rel=1e-6)
    assert [s.sharpness(x) for x in (a, b)] == pytest.approx(MORE["laplace_variance_skimage"], rel=1e-9)
    assert s.ssim(s.grey(a), s.grey(b)) == pytest.approx(MORE["ssim_gray"], rel=1e-9)
    assert s.ms_ssim(a[:160], b[:160]) is None


def test_phash_bits_are_imagehashs():
    """60 pictures, flat, striped, noisy and smooth ones: where a median ties, rounding decides, and must be the same."""
    rng, found = np.random.default_rng(9), []
    for i in range(60):
        h, w = int(rng.integers(9, 90)), int(rng.integers(9, 90))
        if i % 6 == 0:
            x = np.full((h, w, 3), rng.integers(0, 256), np.uint8)
        elif i % 6 == 1:
            x = rng.integers(0, 256, (h, w, 3)).astype(np.uint8)
        elif i % 6 == 2:
            x = np.broadcast_to(np.linspace(0, 255, w).astype(np.uint8)[None, :, None], (h, w, 3)).copy()
        elif i % 6 == 3:
            x = np.zeros((h, w, 3), np.uint8)
            x[h // 2 :] = 255
        elif i % 6 == 4:
            x = np.asarray(Image.fromarray(rng.integers(0, 256, (5, 5, 3)).astype(np.uint8)).resize((w, h)))
        else:
            small = Image.fromarray(rng.integers(0, 256, (3, 4, 3)).astype(np.uint8))
            x = np.asarray(small.resize((w, h), Image.Resampling.BICUBIC))
        found.append(s.hexadecimal(s.phash(x)))
    assert found == MORE["phash"]


def test_the_histogram_counts_boxes_of_sixteen_levels():
    """S4's histogram: against numpy's own count, and where a level falls."""
    image = smooth(5, 48, 60)
    want, _ = np.histogramdd(image.reshape(-1, 3).astype(float), bins=[np.arange(0, 257, 16)] * 3)
    assert np.array_equal(s.histogram(image), want.ravel())
    at = [int(s.histogram(np.full((1, 1, 3), v, np.uint8)).argmax()) for v in (0, 15, 16, 240, 255)]
    assert at == [0, 0, 16 * 16 + 16 + 1, 4095, 4095]
    assert s.histogram(np.array([[[255, 0, 16]]], np.uint8)).argmax() == (15 * 16 + 0) * 16 + 1, "red, green, blue"


def test_colours_are_compared_by_means_and_deviations():
    a, b = smooth(6, 40, 52), smooth(7, 33, 21)
    cosine = lambda x, y: (x * y).sum() / np.sqrt((x * x).sum() * (y * y).sum())  # noqa: E731
    means, spreads = ([f(x.reshape(-1, 3).astype(float), axis=0) for x in (a, b)] for f in (np.mean, np.std))
    want = (cosine(*means) + cosine(*spreads)) / 2
    assert s.color_similarity(s.moments(a), s.moments(b)) == pytest.approx(want, rel=1e-12) and want < 0.999
    red, green = (np.zeros((8, 8, 3), np.uint8) + np.array(c, np.uint8) for c in ((200, 0, 0), (0, 90, 0)))
    assert s.color_similarity(s.moments(red), s.moments(green)) == 0.5, "other colours, the same flatness"
    found = s.compare(s.Facts(red), s.Facts(green), ("color_similarity", "median_hash"))
    assert found == {"color_similarity": 0.5, "median_hash": 1.0}


def test_the_median_hash_is_brighter_than_the_median():
    """Of a ramp's square the brighter half (not what is above the mean); a dot is blurred; bits are rows of columns."""
    ramp = np.broadcast_to((np.arange(32) ** 2 // 4).astype(np.uint8)[None, :, None], (32, 32, 3))
    assert np.array_equal(s.median_hash(ramp), np.broadcast_to(np.arange(32) >= 16, (32, 32)))
    assert np.array_equal(s.median_hash(ramp.transpose(1, 0, 2)), s.median_hash(ramp).T)
    assert np.array_equal(
        s.median_hash(np.repeat(np.repeat(ramp, 3, 0), 3, 1))[:, [0, 14, 17, 31]],
        s.median_hash(ramp)[:, [0, 14, 17, 31]],
    )
    dot = np.zeros((32, 32, 3), np.uint8)
    dot[10, 20] = 255
    bits = s.median_hash(dot)
    assert bits[9:12, 19:22].all() and not bits[[6, 14]].any() and not bits[:, [16, 24]].any()
    green, blue = (np.zeros((32, 32, 3), np.uint8) for _ in range(2))
    green[:, 16:] = (0, 100, 0)
    blue[:, 16:] = (0, 0, 100)
    both = np.where(np.arange(32)[:, None, None] < 16, green, blue).astype(np.uint8)
    assert s.median_hash(both)[:14, 18:].all() and not s.median_hash(both)[:, :14].any()
    assert s.hash_similarity(s.median_hash(ramp), ~s.median_hash(ramp)) == 0
    half = s.median_hash(ramp) ^ (np.arange(32) < 16)[:, None]
    assert s.hash_similarity(s.median_hash(ramp), half) == 0.5


pictures = st.builds(
    lambda h, w, seed: np.random.default_rng(seed).integers(0, 256, (h, w, 3)).astype(np.uint8),
    st.integers(8, 40), st.integers(8, 40), st.integers(0, 999),
)  # fmt: skip


@settings(max_examples=25, deadline=None)
@given(pictures)
def test_a_picture_and_itself(a):
    got = s.compare(s.Facts(a), s.Facts(a.copy()))
    want = {"ssim": 1, "mse": 0, "hist_correlation": 1, "hist_bhattacharyya": 0, "hist_similarity": 1, "phash": 1, "median_hash": 1,
            "sharpness_ratio": 1, "color_similarity": 1}  # fmt: skip
    for name, value in want.items():
        assert got[name] == pytest.approx(value, abs=1e-6), name
    assert got["psnr"] == np.inf and got["ms_ssim"] is None and "lpips" not in got


@settings(max_examples=25, deadline=None)
@given(pictures, st.integers(1, 60))
def test_symmetry_and_order(a, strength):
    rng = np.random.default_rng(strength)
    b = (a.astype(int) + rng.integers(-strength, strength + 1, a.shape)).clip(0, 255).astype(np.uint8)
    ab, ba = s.compare(s.Facts(a), s.Facts(b)), s.compare(s.Facts(b), s.Facts(a))
    for name in ("ssim", "mse", "phash", "hist_similarity", "color_similarity"):
        assert ab[name] == pytest.approx(ba[name], rel=1e-9)
    assert ab["sharpness_ratio"] * ba["sharpness_ratio"] == pytest.approx(1)
    sharp, soft = np.tile(np.array([[0, 255], [255, 0]], np.uint8), (8, 8)), np.full((16, 16), 128, np.uint8)
    soft[::4] = 140
    sharp, soft = (s.Facts(np.repeat(x[:, :, None], 3, 2)) for x in (sharp, soft))
    assert s.compare(sharp, soft, ("sharpness_ratio",))["sharpness_ratio"] > 10, "the first over the second"
    assert -1 <= ab["ssim"] <= 1 and 0 <= ab["phash"] <= 1 and ab["mse"] > 0


def test_mse_does_not_overflow():
    """S4-12: differences of uint8 wrap; ours do not."""
    a, b = np.zeros((9, 9, 3), np.uint8), np.full((9, 9, 3), 255, np.uint8)
    assert s.mse(a, b) == 255**2 and s.psnr(s.mse(a, b)) == 0


def test_files_and_tensors_score_alike():
    """S0-28: uint8, floats in [0, 1], PIL and tensors are the same picture."""
    a, b = smooth(3, 40, 50), smooth(4, 40, 50)
    want = s.compare(s.Facts(a), s.Facts(b))
    for form in (lambda x: x / 255, lambda x: Image.fromarray(x), lambda x: torch.from_numpy(x).permute(2, 0, 1) / 255,
                 lambda x: (x / 255).astype(np.float32)):  # fmt: skip
        assert s.compare(s.Facts(form(a)), s.Facts(form(b))) == want


@pytest.mark.parametrize("bad", [np.full((9, 9, 3), 1.5), np.full((9, 9, 3), -0.1), np.full((9, 9, 3), np.nan)])
def test_other_scales_are_refused(bad):
    with pytest.raises(UserError, match=r"must lie in \[0, 1\]"):
        s.Facts(bad)


def test_shapes_that_do_not_fit():
    with pytest.raises(UserError, match="20x10 and 10x20 pixels"):
        s.compare(s.Facts(np.zeros((10, 20, 3), np.uint8)), s.Facts(np.zeros((20, 10, 3), np.uint8)))
    with pytest.raises(UserError, match="expected"):
        s.Facts(np.zeros((10, 20), np.uint8))
    with pytest.raises(UserError, match="7x7"):
        s.ssim(np.zeros((6, 9), np.uint8), np.zeros((6, 9), np.uint8))
