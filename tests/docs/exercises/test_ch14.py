"""Measuring."""

import numpy as np
import pytest
import scipy.linalg


def drawn(n, d=6, seed=14, move=0.0):
    rng = np.random.default_rng(seed)
    return rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) + move


def test_fid(mine):
    a, b = drawn(200), drawn(150, seed=3, move=0.7)
    s, t = (np.cov(x, rowvar=False) for x in (a, b))
    root = scipy.linalg.sqrtm(s @ t).real
    want = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(s + t - 2 * root)
    assert mine.fid(a, b) == pytest.approx(want, rel=1e-6) and mine.fid(a, a) == pytest.approx(0, abs=1e-6)


def test_kid(mine):
    a, b = drawn(12), drawn(9, seed=3)
    kernel = lambda x, y: (x @ y / 6 + 1) ** 3  # noqa: E731
    same = lambda x: np.mean([kernel(x[i], x[j]) for i in range(len(x)) for j in range(len(x)) if i != j])  # noqa: E731
    want = same(a) + same(b) - 2 * np.mean([kernel(x, y) for x in a for y in b])
    assert mine.kid(a, b) == pytest.approx(want, rel=1e-9)
    from_one = [mine.kid(drawn(60, seed=s)[:30], drawn(60, seed=s)[30:]) for s in range(40)]
    assert min(from_one) < 0 < max(from_one)  # without bias it wavers around 0


@pytest.mark.parametrize("k", [1, 3])
def test_precision(mine, k):
    real, generated = drawn(40), drawn(30, seed=3, move=0.5)
    inside = 0
    for g in generated:
        for r in real:
            others = sorted(np.linalg.norm(real - r, axis=1))  # itself first
            if np.linalg.norm(g - r) < others[k]:
                inside += 1
                break
    assert mine.precision(real, generated, k) == pytest.approx(inside / 30) and 0 < inside < 30
