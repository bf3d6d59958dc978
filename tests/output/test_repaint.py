"""Only the masked part: regions, edges and pasting in cases that can be said in words (whole runs: tests/pipeline/test_inpaint.py)."""

import numpy as np
import pytest
from PIL import Image

from nanodiff.config import UserError
from nanodiff.output import repaint


def mask_of(size, box):
    mask = Image.new("L", size)
    mask.paste(255, box)
    return mask


@pytest.mark.parametrize(
    ("size", "box", "shape", "pad", "want"),
    [
        ((100, 80), (40, 30, 50, 40), (64, 64), 0, (40, 30, 50, 40)),  # square already
        ((100, 80), (40, 30, 50, 40), (64, 64), 5, (35, 25, 55, 45)),
        ((100, 80), (40, 30, 60, 40), (64, 64), 0, (40, 25, 60, 45)),  # made higher, as much above as below
        ((100, 80), (40, 0, 60, 10), (64, 64), 0, (40, 0, 60, 20)),  # moved inside the picture
        ((100, 80), (40, 70, 60, 80), (64, 64), 0, (40, 60, 60, 80)),
        ((100, 80), (90, 30, 100, 50), (128, 64), 0, (60, 30, 100, 50)),
        ((100, 20), (0, 0, 100, 20), (64, 64), 9, (0, 0, 100, 20)),  # the picture is no higher
    ],
)
def test_regions(size, box, shape, pad, want):
    assert repaint.region(mask_of(size, box), *shape, pad) == want


def test_a_black_mask():
    with pytest.raises(UserError, match="the mask is black"):
        repaint.region(Image.new("L", (8, 8)), 64, 64, 3)


def test_what_is_free_is_filled_with_the_edge():
    """A wide part in a square: the rows above and below are its first and last one."""
    part = np.zeros((16, 64, 3), np.uint8)
    part[8:] = 200
    out = np.asarray(repaint.enlarged(Image.fromarray(part), (0, 0, 64, 16), 64, 64))
    assert (out[:24] == 0).all() and (out[40:] == 200).all()


def test_outside_the_mask_nothing_changes():
    picture = Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 50, 3), dtype=np.uint8))
    mask = mask_of((50, 40), (10, 10, 30, 30))
    drawn = Image.new("RGB", (64, 64), (10, 20, 30))
    out = np.asarray(repaint.pasted(drawn, picture, mask, (5, 5, 35, 35)))
    inside = np.asarray(mask) > 0
    assert (out[inside] == (10, 20, 30)).all() and (out[~inside] == np.asarray(picture)[~inside]).all()


def test_a_soft_edge_mixes():
    picture, drawn = Image.new("RGB", (40, 40)), Image.new("RGB", (40, 40), (200, 200, 200))
    soft = repaint.blurred(mask_of((40, 40), (0, 0, 20, 40)), 3)
    row = np.asarray(repaint.pasted(drawn, picture, soft, (0, 0, 40, 40)))[20, :, 0].astype(int)
    assert row[0] == 200 and row[-1] == 0 and (np.diff(row) <= 0).all() and 60 < row[20] < 140
