"""How alike two pictures are: SSIM, MS-SSIM, MSE, PSNR, histograms, perceptual hashes, sharpness, colours.

Pictures are uint8 RGB arrays [H, W, 3] of one size; floats in [0, 1] are rounded to it (`as_uint8`), so that a file and a tensor
score alike. These numbers compare two versions of one picture. Of two pictures with different content they say how alike their
pixels are, not which is better: read a CLIP score or FID beside them.

- SSIM (Wang et al. 2004, IEEE TIP 13, eq. 13) as scikit-image has it: uniform 7×7 window, sample covariance, or Gaussian 11×11 (σ 1.5);
  mean over the places where the window fits. With the uniform window everything up to the last division is in whole numbers.
- MS-SSIM (Wang et al. 2003, Asilomar, eq. 7): five scales, Gaussian window.
- pHash: imagehash's, bit for bit. `median_hash` is the 32×32 hash of the fourth source document.
- Histogram correlation and Bhattacharyya distance as OpenCV's compareHist; sharpness is the variance of the Laplacian.

Explained in the book (docs/book): chapter 14.
"""

import functools
from collections.abc import Callable
from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported where they are first used
from PIL import Image, ImageFilter

from nanodiff.config import UserError
from nanodiff.output.images import as_uint8

K1, K2 = 0.01, 0.03
SCALES = (0.0448, 0.2856, 0.3001, 0.2363, 0.1333)


def grey(image):
    """uint8 [H, W]: OpenCV's RGB to grey, in whole numbers."""
    r, g, b = (image[..., i].astype(np.int32) for i in range(3))
    return ((9798 * r + 19235 * g + 3735 * b + 16384) >> 15).astype(np.uint8)


# ---------------------------------------------------------------------------------------------------------
# Structure


def _sums(x, window, axis):
    """Sums of `window` neighbours along an axis, where they fit: sums of 2, 4, 8 … neighbours first, then those that make up the window."""
    part = lambda z, first, n: z[first : first + n] if axis == 0 else z[:, first : first + n]  # noqa: E731
    n, total, at, size = x.shape[axis] - window + 1, 0, 0, 1
    while window:
        if window & 1:
            total, at = total + part(x, at, n), at + size
        window >>= 1
        if window:
            x, size = part(x, 0, x.shape[axis] - size) + part(x, size, x.shape[axis] - size), 2 * size
    return total


def _box(x, window):
    """Sums over window × window places [h, w, …]."""
    return _sums(_sums(x, window, 0), window, 1)


def ssim(a, b, window=7):
    """Structural similarity of two uint8 pictures, [H, W] or [H, W, 3] (then the mean over channels), uniform window."""
    if min(a.shape[:2]) < window:
        raise UserError(f"SSIM needs pictures of {window}x{window} pixels or more, here {a.shape[1]}x{a.shape[0]}")
    n = window * window
    # nothing below exceeds 2 (255 n)²
    small, kind = (np.int16, np.int32) if 255 * n < 1 << 15 else (np.int64, np.int64)
    sx, sy = (_box(z.astype(small), window).astype(kind) for z in (a, b))
    x, y = a.astype(kind), b.astype(kind)
    sxy, both = _box(x * y, window), _box(x * x + y * y, window)
    product, squares = sx * sy, sx * sx + sy * sy  # of means: n² times too large; of covariances below: n (n - 1) times
    c1, c2 = (K1 * 255 * n) ** 2, (K2 * 255) ** 2 * n * (n - 1)
    top = (2 * product + c1) * (2 * (n * sxy - product) + c2)
    return float((top / ((squares + c1) * (n * both - squares + c2))).mean())


def _gaussian(x, size=11, sigma=1.5):
    """Filtered [h, w, …], where the window fits."""
    at, half = np.arange(size) - size // 2, size // 2
    k = np.exp(-(at**2) / (2 * sigma**2))
    k /= k.sum()
    x = scipy.ndimage.correlate1d(x, k, axis=0)[half : len(x) - half]
    return scipy.ndimage.correlate1d(x, k, axis=1)[:, half : x.shape[1] - half]


def _gaussian_maps(x, y, peak=255.0):
    """(luminance × structure, structure alone) under Gaussian windows."""
    ux, uy, uxx, uyy, uxy = (_gaussian(z) for z in (x, y, x * x, y * y, x * y))
    c1, c2 = (K1 * peak) ** 2, (K2 * peak) ** 2
    product, squares = ux * uy, ux * ux + uy * uy
    structure = (2 * (uxy - product) + c2) / (uxx + uyy - squares + c2)
    return (2 * product + c1) / (squares + c1) * structure, structure


def ssim_gaussian(a, b):
    """With Wang's Gaussian window and plain covariance, as scikit-image with gaussian_weights=True, use_sample_covariance=False."""
    return float(_gaussian_maps(a.astype(np.float64), b.astype(np.float64))[0].mean())


def ms_ssim(a, b):
    """Multi-scale SSIM of two uint8 pictures [H, W, 3] of at least 161×161; None for smaller ones."""
    if min(a.shape[:2]) < LEAST["ms_ssim"]:
        return None
    x, y, product = a.astype(np.float64), b.astype(np.float64), 1.0
    for i, weight in enumerate(SCALES):
        whole, structure = (m.mean((0, 1)) for m in _gaussian_maps(x, y))
        product = product * (whole if i == len(SCALES) - 1 else structure).clip(min=0) ** weight
        x, y = _halved(x), _halved(y)
    return float(product.mean())


def _halved(x):
    """Means of 2 × 2 places; an odd side gets zeros around it first, as pytorch-msssim's pooling does."""
    x = np.pad(x, [(s % 2, s % 2) for s in x.shape[:2]] + [(0, 0)] * (x.ndim - 2))
    h, w = (s // 2 * 2 for s in x.shape[:2])
    x = x[:h, :w]
    return (x[::2, ::2] + x[1::2, ::2] + x[::2, 1::2] + x[1::2, 1::2]) / 4


# ---------------------------------------------------------------------------------------------------------
# Pixels, histograms, colours


def mse(a, b):
    """Mean squared difference of values 0-255."""
    d = a.astype(np.int32) - b
    return float((d * d).mean())


def psnr(error):
    """Decibels of a mean squared error at a peak of 255; infinite for none."""
    return float("inf") if error == 0 else float(10 * np.log10(255**2 / error))


def histogram(image, bins=16):
    """Counts of colours in bins × bins × bins boxes, flat."""
    x = image.astype(np.int64) * bins // 256
    return np.bincount(((x[..., 0] * bins + x[..., 1]) * bins + x[..., 2]).ravel(), minlength=bins**3).astype(
        np.float64
    )


def hist_correlation(h, g):
    """Pearson's correlation of two histograms; 1 when both are constant."""
    h, g = h - h.mean(), g - g.mean()
    norm = np.sqrt((h @ h) * (g @ g))
    return float(h @ g / norm) if norm > 0 else 1.0


def hist_bhattacharyya(h, g):
    """OpenCV's Bhattacharyya distance, 0 for equal histograms, 1 for disjoint ones."""
    return float(np.sqrt(max(0.0, 1 - np.sqrt(h * g).sum() / np.sqrt(h.sum() * g.sum()))))


def hist_similarity(g, h):
    """(correlation + 1 - Bhattacharyya distance) / 2."""
    return (hist_correlation(g, h) + 1 - hist_bhattacharyya(g, h)) / 2


def sharpness(image, edge="reflect"):
    """Variance of the Laplacian of the grey picture. edge "reflect" repeats the border as scikit-image does, "mirror" does not, as
    OpenCV."""
    return float(scipy.ndimage.laplace(grey(image).astype(np.float64), mode=edge).var())


def ratio(a, b):
    """a / b where b may be 0: then infinite, or 1 when both are."""
    return a / b if b else 1.0 if not a else float("inf")


def _cosine(a, b):
    norm = np.linalg.norm(a) * np.linalg.norm(b)
    return float(a @ b / norm) if norm > 0 else float(np.array_equal(a, b))


def moments(image):
    """(means, deviations) of the channels."""
    counts, at = [np.bincount(image[..., i].ravel(), minlength=256) for i in range(3)], np.arange(256)
    n = image.size // 3
    means = [c @ at / n for c in counts]
    return np.array(means), np.sqrt([c @ (at - m) ** 2 / n for c, m in zip(counts, means, strict=True)])


def color_similarity(a, b):
    """Mean of the cosines of two pictures' channel means and of their deviations (see `moments`)."""
    return (_cosine(a[0], b[0]) + _cosine(a[1], b[1])) / 2


# ---------------------------------------------------------------------------------------------------------
# Hashes


def phash(image, size=8, factor=4):
    """bool [size, size]: signs, against their median, of the lowest frequencies (imagehash.phash's bits)."""
    small = Image.fromarray(image).convert("L").resize((size * factor,) * 2, Image.Resampling.LANCZOS)
    waves = scipy.fft.dct(scipy.fft.dct(np.asarray(small, np.float64), axis=0), axis=1)[:size, :size]
    return waves > np.median(waves)


def median_hash(image, size=32):
    """bool [size, size]: brighter than the median, after a Gaussian blur of radius 1."""
    small = Image.fromarray(grey(image)).resize((size, size), Image.Resampling.LANCZOS)
    x = np.asarray(small.filter(ImageFilter.GaussianBlur(1)), np.float64)
    return x > np.median(x)


def hash_similarity(a, b):
    """1 - share of differing bits."""
    return float(1 - (a != b).mean())


def hexadecimal(bits):
    """Bits row by row as imagehash writes them."""
    return f"{int(''.join('01'[int(b)] for b in bits.ravel()), 2):0{bits.size // 4}x}"


# ---------------------------------------------------------------------------------------------------------
# All of them


class Facts:
    """What is needed of one picture, each computed at most once, however many others it is compared with."""

    def __init__(self, image):
        self.image = as_uint8(image)

    grey = functools.cached_property(lambda self: grey(self.image))
    histogram = functools.cached_property(lambda self: histogram(self.image))
    phash = functools.cached_property(lambda self: phash(self.image))
    median_hash = functools.cached_property(lambda self: median_hash(self.image))
    sharpness = functools.cached_property(lambda self: sharpness(self.image))
    moments = functools.cached_property(lambda self: moments(self.image))


class Metric(NamedTuple):
    """A number of two pictures as a row: everything that is to be said of it in one place."""

    of: Callable | None  # (Facts, Facts) -> number; None: a network's, which image_pairs.py has
    higher_is_nearer: bool | None = True  # None: neither
    least: int = 1  # the smallest side of a picture that it is defined for


METRICS = {
    "ssim": Metric(lambda a, b: ssim(a.grey, b.grey), least=7),  # of a window
    "ms_ssim": Metric(lambda a, b: ms_ssim(a.image, b.image), least=161),  # of a window in the fifth scale
    "mse": Metric(lambda a, b: mse(a.image, b.image), higher_is_nearer=False),
    "psnr": Metric(lambda a, b: psnr(mse(a.image, b.image))),
    "lpips": Metric(None, higher_is_nearer=False, least=16),  # of VGG16's four pools
    "hist_correlation": Metric(lambda a, b: hist_correlation(a.histogram, b.histogram)),
    "hist_bhattacharyya": Metric(lambda a, b: hist_bhattacharyya(a.histogram, b.histogram), higher_is_nearer=False),
    "hist_similarity": Metric(lambda a, b: hist_similarity(a.histogram, b.histogram)),
    "phash": Metric(lambda a, b: hash_similarity(a.phash, b.phash)),
    "median_hash": Metric(lambda a, b: hash_similarity(a.median_hash, b.median_hash)),
    "sharpness_ratio": Metric(lambda a, b: ratio(a.sharpness, b.sharpness), higher_is_nearer=None),
    "color_similarity": Metric(lambda a, b: color_similarity(a.moments, b.moments)),
}
NAMES = tuple(METRICS)
HIGHER_IS_NEARER = {name: row.higher_is_nearer for name, row in METRICS.items()}
LEAST = {name: row.least for name, row in METRICS.items() if row.least > 1}


def compare(a, b, names=NAMES):
    """{name: number, or None where the pictures are too small} of two Facts. lpips is left to the network that gives it.

    sharpness_ratio is the first's over the second's, as in the source document; phash, median_hash and the rest are 1 for equal pictures."""
    if a.image.shape != b.image.shape:
        raise UserError(
            f"pictures of {a.image.shape[1]}x{a.image.shape[0]} and {b.image.shape[1]}x{b.image.shape[0]} pixels"
        )
    rows = {name: METRICS[name] for name in names if name in METRICS and METRICS[name].of}
    return {name: row.of(a, b) if min(a.image.shape[:2]) >= row.least else None for name, row in rows.items()}
