"""Canny's edges, as what ControlNets were trained on: those of OpenCV's Canny(), to the pixel.

J. Canny, A Computational Approach to Edge Detection (1986): slopes, the ridges of their size, and of these what is strong or hangs
together with something strong.
"""

import numpy as np
import scipy  # its parts are imported where they are first used

LOW, HIGH = 100, 200  # lllyasviel/ControlNet's thresholds
TAN = 13573  # tan 22.5° · 2¹⁵, OpenCV's


def canny(picture, low=LOW, high=HIGH):
    """uint8 [H, W, 3] or [H, W] -> uint8 [H, W], 255 on edges and 0 elsewhere.

    Slopes are Sobel's (3×3, the border repeated), their size |dx| + |dy|, of the channel in which it is largest. A pixel is a ridge's where its
    size is above `low` and no smaller than its two neighbours' along the slope; ridges above `high` are edges, and so is every
    ridge that touches an edge, by a side or a corner.
    """
    pixels = np.asarray(picture).astype(np.int32)
    pixels = pixels[..., None] if pixels.ndim == 2 else pixels
    across, smooth = np.array([-1, 0, 1]), np.array([1, 2, 1])
    slopes = []
    for one, other in ((1, 0), (0, 1)):  # dx, dy
        d = scipy.ndimage.correlate1d(pixels, across, axis=one, mode="nearest")
        slopes.append(scipy.ndimage.correlate1d(d, smooth, axis=other, mode="nearest"))
    best = (np.abs(slopes[0]) + np.abs(slopes[1])).argmax(-1)[..., None]
    dx, dy = (np.take_along_axis(d, best, -1)[..., 0] for d in slopes)
    size = np.abs(dx) + np.abs(dy)
    padded = np.pad(size, 1)

    def beside(down, right):
        return padded[1 + down : 1 + down + len(size), 1 + right : 1 + right + size.shape[1]]

    x, y = np.abs(dx).astype(np.int64), np.abs(dy).astype(np.int64) << 15
    flat, steep = y < x * TAN, y > x * TAN + (x << 16)  # below 22.5°, above 67.5°
    falls = (dx < 0) != (dy < 0)
    ridge = np.where(
        flat,
        (size > beside(0, -1)) & (size >= beside(0, 1)),
        np.where(
            steep,
            (size > beside(-1, 0)) & (size >= beside(1, 0)),
            np.where(
                falls,
                (size > beside(-1, 1)) & (size > beside(1, -1)),
                (size > beside(-1, -1)) & (size > beside(1, 1)),
            ),
        ),
    )
    ridge &= size > low
    labels, _ = scipy.ndimage.label(ridge, np.ones((3, 3)))
    strong = np.unique(labels[ridge & (size > high)])
    return np.where(np.isin(labels, strong[strong > 0]), 255, 0).astype(np.uint8)
