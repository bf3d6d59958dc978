"""Distances between sets against torch-fidelity and prdc (recorded) and closed forms."""

import json

import numpy as np
import pytest
import scipy.linalg
from hypothesis import given, settings
from hypothesis import strategies as st
from util import GOLDEN, golden

from nanodiff.config import UserError
from nanodiff.evaluation import metrics


@pytest.fixture(scope="module")
def recorded():
    tensors, facts = golden("metrics.distribution")
    return tensors["features_1"].numpy(), tensors["features_2"].numpy(), tensors["logits"].numpy(), facts["values"]


def test_fid(recorded):
    a, b, _, want = recorded
    assert metrics.fid(a, b) == pytest.approx(want["fid_scipy_sqrtm"], rel=1e-8)
    assert metrics.fid(a, b) == pytest.approx(want["fid_torch_fidelity"], rel=1e-6)
    assert abs(metrics.fid(a, a)) < 1e-10 and abs(metrics.fid(a[:20], a[:20][::-1])) < 1e-10
    assert metrics.fid(a[:20], b) == pytest.approx(want["fid_rank_deficient"], rel=1e-6)


@settings(max_examples=30, deadline=None)
@given(st.integers(3, 40), st.integers(3, 40), st.integers(2, 12), st.integers(0, 1000))
def test_both_ways_to_fid_agree(n, m, d, seed):
    """By eigenvalues of D x D, by singular values of N x M, and by scipy's matrix root."""
    rng = np.random.default_rng(seed)
    a, b = rng.normal(size=(n, d)) * 3 + 100, rng.normal(size=(m, d)) @ rng.normal(size=(d, d)) + 101
    wide = metrics.frechet(metrics.Moments().add(a), metrics.Moments().add(b))
    small = metrics._Gram(a, b).fid(np.arange(n), np.arange(m), exact=True)
    quick = metrics._Gram(a, b).fid(np.arange(n), np.arange(m))
    assert quick == pytest.approx(small, rel=1e-5, abs=1e-4)
    assert wide == pytest.approx(small, rel=1e-6, abs=1e-6)
    s, t = np.cov(a.T), np.cov(b.T)
    if min(n, m) > d + 1:
        root = scipy.linalg.sqrtm(s @ t).real
        exact = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
        assert wide == pytest.approx(exact, rel=1e-6, abs=1e-6)


def test_fid_of_gaussians_is_its_closed_form():
    """N(0, 1) and N(3, 4) in each of 8 independent directions: 8 (9 + (1 - 2)^2) = 80."""
    rng = np.random.default_rng(0)
    a, b = rng.normal(size=(200_000, 8)), 3 + 2 * rng.normal(size=(200_000, 8))
    assert metrics.fid(a, b) == pytest.approx(80, rel=5e-3)


def test_fid_grows_with_noise_and_mixing():
    rng = np.random.default_rng(1)
    real, other = rng.normal(size=(600, 16)), 2 + rng.normal(size=(600, 16))
    noisy = [metrics.fid(real, real + s * rng.normal(size=real.shape)) for s in (0, 0.5, 1, 2, 4)]
    mixed = [metrics.fid(real, np.concatenate([real[k:], other[:k]])) for k in (0, 100, 300, 600)]
    assert noisy == sorted(noisy) and mixed == sorted(mixed)


def test_moments_come_in_parts():
    rng = np.random.default_rng(2)
    x = rng.normal(size=(97, 11)) * 1e-3 + 1000  # a large mean, small spread: what naive sums lose
    whole, parts, other = metrics.Moments(), metrics.Moments(), metrics.Moments()
    for i in range(0, 97, 13):
        whole.add(x[i : i + 13])
        (parts if i % 2 else other).add(x[i : i + 13])
    parts.merge(other)
    for m in (whole, parts, metrics.Moments().merge(parts)):
        assert m.n == 97
        assert np.allclose(m.mean, x.mean(0), rtol=1e-12) and np.allclose(
            m.covariance, np.cov(x.T), rtol=1e-6, atol=1e-14
        )


def test_fid_interval_holds_the_value_and_shrinks(recorded):
    a, b, _, _ = recorded
    low, high = metrics.fid_interval(a, b, 20)
    assert low < metrics.fid(a, b) < high
    rng = np.random.default_rng(3)
    a, b = rng.normal(size=(800, 6)), rng.normal(size=(800, 6))
    widths = [np.subtract(*metrics.fid_interval(a[:n], b[:n], 20)[::-1]) for n in (50, 800)]
    assert widths[1] < widths[0]


def test_kid(recorded):
    a, b, _, want = recorded
    value, size = metrics.kid(a, b, 10, 50)
    assert size == 50
    assert value.value == pytest.approx(want["kid_torch_fidelity"]["mean"], rel=1e-5)  # torch-fidelity's is in float32
    assert value.std == pytest.approx(want["kid_torch_fidelity"]["std"], rel=1e-5)
    whole, size = metrics.kid(a[:140], b, 1, 1000)
    assert size == 140 and whole.value == pytest.approx(want["kid_full_unbiased"], rel=1e-8)


@pytest.mark.parametrize(("n", "m", "shift"), [(50, 64, 0.0), (40, 40, 0.5), (200, 30, 0.3)])
def test_kid_of_small_sets_says_how_sure_it_is(n, m, shift):
    """Subsets as large as a set are that set, again and again: the spread is that of the choice of its pictures."""
    found = []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        a, b = rng.standard_normal((n, 32)), rng.standard_normal((m, 32)) + shift
        found.append(metrics.kid(a, b, subsets=10)[0])
    true = np.std([v.value for v in found])
    assert 0.7 * true < np.mean([v.std for v in found]) < 2 * true


def test_large_sets_give_the_same(recorded, monkeypatch):
    a, b, _, _ = recorded
    before = metrics.kid(a, b, 10, 50), metrics.prdc(a, b), metrics.memorisation(a, b)
    monkeypatch.setattr(metrics, "WHOLE", 37)
    monkeypatch.setattr(metrics, "BLOCK", 500)
    after = metrics.kid(a, b, 10, 50), metrics.prdc(a, b), metrics.memorisation(a, b)
    assert after[0][0] == pytest.approx(before[0][0]) and after[1] == pytest.approx(before[1])
    assert after[2].share == before[2].share and (after[2].nearest == before[2].nearest).all()


def test_inception_score(recorded):
    _, _, logits, want = recorded
    for splits, seed, key in (
        (10, 2020, "is_10_splits_shuffled_2020"),
        (1, 2020, "is_1_split"),
        (5, None, "is_5_splits_unshuffled"),
    ):
        value = metrics.inception_score(logits, splits, seed)
        assert value == pytest.approx((want[key]["mean"], want[key]["std"]), rel=1e-8, abs=1e-12)
    sure = np.where(np.eye(10)[np.arange(100) % 10] > 0, 1e4, 0.0)  # certain and even over 10 classes
    assert metrics.inception_score(sure, 1).value == pytest.approx(10)


def test_prdc(recorded):
    a, b, _, _ = recorded
    want = json.loads((GOLDEN / "goldens" / "metrics.more.json").read_text())
    for k in (3, 5):
        assert metrics.prdc(a, b, k) == pytest.approx(want[f"prdc_k{k}"])
    far = metrics.prdc(a, b + 100)
    assert far == {"precision": 0, "recall": 0, "density": 0, "coverage": 0}
    assert metrics.prdc(a, a)["precision"] == metrics.prdc(a, a)["coverage"] == 1


def test_diversity():
    assert metrics.diversity(np.ones((5, 3))) == pytest.approx(0)
    assert metrics.diversity(np.eye(6)) == pytest.approx(1)
    x = np.random.default_rng(0).normal(size=(9, 4))
    u = x / np.linalg.norm(x, axis=1, keepdims=True)
    assert metrics.diversity(x) == pytest.approx(
        np.mean([1 - u[i] @ u[j] for i in range(9) for j in range(9) if i != j])
    )


def test_memorisation():
    rng = np.random.default_rng(4)
    train = rng.normal(size=(300, 5))
    assert metrics.memorisation(train, train[:50] + 1e-6).share == 1
    assert 0.3 < metrics.memorisation(train, rng.normal(size=(300, 5))).share < 0.7
    copies = metrics.memorisation(train, train[7:8] + 1e-9)
    assert copies.nearest.tolist() == [7] and copies.ratio[0] < 1e-6
    # a picture with a double in the training set is copied most easily of all
    twice = np.concatenate([train, train[7:8]])
    copies = metrics.memorisation(twice, train[7:8] + 1e-9)
    assert copies.share == 1 and copies.nearest.tolist() == [7] and copies.ratio[0] < 1e-6
    with pytest.raises(UserError, match="different pictures of the training set: 1 pictures"):
        metrics.memorisation(train[[3, 3, 3]], train)


def test_modality_gap():
    rng = np.random.default_rng(5)
    x, y = (
        v / np.linalg.norm(v, axis=1, keepdims=True) for v in (rng.normal(size=(20, 7)), rng.normal(size=(20, 7)) + 1)
    )
    got = metrics.modality_gap(x, y)
    assert got["cosd"] == pytest.approx(np.mean([1 - x[i] @ y[i] for i in range(20)]))
    assert got["l2m"] == pytest.approx(np.linalg.norm(x.mean(0) - y.mean(0)))
    assert got["var_images"] == pytest.approx(x.var(0).sum())
    d = lambda a, b: (1 - a @ b) / 2  # noqa: E731
    within = [sum(d(z[i], z[j]) for i in range(20) for j in range(20) if i != j) for z in (x, y)]
    pairs = np.mean([d(x[i], y[i]) for i in range(20)])
    assert got["rmg"] == pytest.approx(pairs / (sum(within) / (2 * 20 * 19) + pairs))
    assert metrics.modality_gap(x, x)["rmg"] == pytest.approx(0, abs=1e-12)


def test_clip_score_recording():
    tensors, _ = golden("clip.forward")
    cosines = metrics.clip_score(tensors["image_embeds_normalized"].numpy(), tensors["text_embeds_normalized"].numpy())
    assert (100 * cosines).clip(min=0) == pytest.approx(tensors["clip_score_per_pair"].numpy().clip(min=0), rel=1e-4)
    with pytest.raises(UserError, match="3 pictures and 2 captions"):
        metrics.clip_score(np.eye(3), np.eye(3)[:2])


def test_colours():
    grey = np.full((4, 5, 3), 100, np.uint8)
    assert metrics.colours(grey) == pytest.approx(dict(zip(metrics.COLOURS, (100, 0, 0, 0, 0), strict=True)))
    red = np.zeros((4, 4, 3), np.uint8)
    red[..., 0] = 255
    got = metrics.colours(red)
    assert got["saturation"] == 1 and got["colourfulness"] == pytest.approx(0.3 * np.hypot(255, 127.5))
    assert got["brightness"] == pytest.approx(0.299 * 255)


@pytest.mark.parametrize(
    "x, said",
    [(np.ones((1, 3)), "1 pictures, at least 2"), (np.array([[1.0], [np.nan]]), "not finite, such as number 1")],
)
def test_bad_features(x, said):
    with pytest.raises(UserError, match=said):
        metrics.fid(x, np.ones((3, x.shape[1])))
