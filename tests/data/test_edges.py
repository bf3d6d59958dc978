"""Canny's edges: OpenCV's on a picture (edges-opencv.png: its Canny(picture, 100, 200), version 5.0.0), and cases whose edges are known."""

import numpy as np
from PIL import Image
from util import GOLDEN

from nanodiff.data.edges import canny


def test_as_opencv():
    picture, want = (np.array(Image.open(GOLDEN / "cases" / name)) for name in ("edges.png", "edges-opencv.png"))
    got = canny(picture)
    assert 0.01 < (got > 0).mean() < 0.5  # there is something to compare
    assert np.array_equal(got, want)


def test_a_step_is_one_line():
    picture = np.zeros((9, 12), np.uint8)
    picture[:, 6:] = 255
    edges = canny(picture)
    assert (edges[:, 5] == 255).all() and edges.sum() == 9 * 255  # of the two pixels beside the step, the first
    assert np.array_equal(canny(picture.T), edges.T)


def test_the_weak_hang_on_the_strong():
    """Steps of 30 have slopes of 120, between the thresholds: edges only where they touch one of 255."""
    weak = np.zeros((11, 16), np.uint8)
    weak[:, 8:] = 30
    assert not canny(weak).any()
    both = weak.copy()
    both[5:, 8:] = 255
    edges = canny(both)
    assert edges[:4, 7].all()  # the weak part above, along the whole side
    apart = weak.copy()
    apart[7:, :3] = 255
    assert not canny(apart)[:4].any()


def test_the_channel_that_changes_most_counts():
    picture = np.zeros((8, 10, 3), np.uint8)
    picture[:, 5:, 1] = 255
    picture[:, 2:, 0] = 20
    assert np.array_equal(canny(picture), canny(picture[..., 1]))


def test_odd_sizes():
    assert canny(np.zeros((1, 1), np.uint8)).shape == (1, 1)
    assert not canny(np.full((3, 1, 3), 77, np.uint8)).any()
