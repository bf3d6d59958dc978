"""Distances between sets of pictures, on the features of a network: FID, KID, Inception Score, precision and recall, and others.

Everything here takes numbers, not pictures: features [N, D] (float32 or float64 arrays, one row a picture), in float64 inside. Where
they come from, and with which resize, is features.py's business, and stands beside every result, because it moves the result.

- FID (Heusel et al. 2017, arXiv 1706.08500 eq. 6): Fréchet distance of two Gaussians, ‖μ₁ - μ₂‖² + tr(Σ₁ + Σ₂ - 2 (Σ₁Σ₂)^½).
  tr (Σ₁Σ₂)^½ is the sum of the singular values of Σ₁^½ Σ₂^½: no matrix square root that could fail or turn complex, and with
  fewer pictures than features those of the small matrix X₁X₂ᵀ of the centred features. Biased upwards by about 1/N.
- KID (Bińkowski et al. 2018, arXiv 1801.01401 eq. 4): unbiased squared MMD with the kernel (x·y/D + 1)³.
- Inception Score (Salimans et al. 2016, arXiv 1606.03498): exp E KL(p(y|x) ‖ p(y)).
- Precision, recall (Kynkäänniemi et al. 2019, arXiv 1904.06991 eq. 2), density, coverage (Naeem et al. 2020, arXiv 2002.09797 eq. 3-4).
- CLIP score (Hessel et al. 2021, arXiv 2104.08718 eq. 1), the modality gap (Liang et al. 2022, arXiv 2203.02053; its relative form,
  Schrodi et al. 2024, arXiv 2404.07983).
- Authenticity (Alaa et al. 2022, arXiv 2102.08921 §3.3): whether generated pictures are copies of training pictures.
- Colours: Hasler and Süsstrunk 2003 (SPIE 5007, eq. 6), and plain statistics.

Explained in the book (docs/book): chapter 14.
"""

from typing import NamedTuple

import numpy as np
import scipy  # its parts are imported where they are first used

from nanodiff.config import UserError

FEW = 2048  # pictures below which FID says little, and its covariance of 2048 features is singular
WHOLE = 4096  # rows up to which a matrix of all pairs is made at once
BLOCK = 1 << 24  # numbers of such a matrix that are made at a time: 128 MB
SEED = 2020  # torch-fidelity's, for subsets and splits


class TooFew(UserError):
    """Not enough pictures for a metric."""


def checked(features, what, least=2):
    """features as float64 [N, D]. Raises TooFew when there are too few rows, UserError when one is not finite."""
    x = np.asarray(features, np.float64)
    if x.ndim != 2 or len(x) < least:
        raise TooFew(f"{what}: {len(x)} pictures, at least {least} are needed")
    bad = np.flatnonzero(~np.isfinite(x).all(1))
    if len(bad):
        raise UserError(f"{what}: the features of {len(bad)} pictures are not finite, such as number {bad[0]}")
    return x


# ---------------------------------------------------------------------------------------------------------
# FID


class Moments:
    """Count, mean and covariance of rows that come in batches; parts from several processes can be merged.

    The sums are of rows less the first batch's mean, so that no digits are lost in the difference of large numbers.
    """

    def __init__(self):
        self.n, self.shift, self.sum, self.outer = 0, None, None, None

    def add(self, rows):
        x = checked(rows, "features", 1)
        if self.shift is None:
            self.shift = x.mean(0)
            self.sum, self.outer = np.zeros_like(self.shift), np.zeros((x.shape[1],) * 2)
        x = x - self.shift
        self.n += len(x)
        self.sum += x.sum(0)
        self.outer += x.T @ x
        return self

    def merge(self, other):
        """Take in the rows of another one (Chan et al. 1979, eq. 2.1)."""
        if not other.n:
            return self
        if not self.n:
            self.n, self.shift, self.sum, self.outer = other.n, other.shift, other.sum.copy(), other.outer.copy()
            return self
        d = other.shift - self.shift
        self.outer += other.outer + np.outer(other.sum, d) + np.outer(d, other.sum) + other.n * np.outer(d, d)
        self.sum += other.sum + other.n * d
        self.n += other.n
        return self

    @property
    def mean(self):
        return self.shift + self.sum / self.n

    @property
    def covariance(self):
        """With N - 1 in the denominator, as all FID programs have it."""
        if self.n < 2:
            raise UserError(f"a covariance needs at least 2 pictures, here is {self.n}")
        return (self.outer - np.outer(self.sum, self.sum) / self.n) / (self.n - 1)


def frechet(a, b, exact=True):
    """FID's formula of two Moments. exact: singular values of the product of roots, right to the last digits; else, in a third of
    the time, the roots of its eigenvalues, in which rounding of the small ones shows at about 1e-8."""
    s, t = a.covariance, b.covariance
    if exact:
        singular = scipy.linalg.svdvals(_root(s).T @ _root(t)).sum()
    else:
        root = _root(s)  # root rootᵀ = Σ₁; (Σ₁Σ₂)^½ has the eigenvalues of rootᵀ Σ₂ root, rooted
        singular = np.sqrt(scipy.linalg.eigvalsh(root.T @ t @ root).clip(min=0)).sum()
    return float(((a.mean - b.mean) ** 2).sum() + s.trace() + t.trace() - 2 * singular)


def _root(s):
    """A matrix R with R Rᵀ = s. Negative eigenvalues of a covariance can only be rounding."""
    values, vectors = scipy.linalg.eigh(s)
    if values[0] < -1e-6 * abs(values[-1]):
        raise UserError(
            f"FID: a covariance has the eigenvalue {values[0]:.3g}, which is more than rounding; check the features"
        )
    return vectors * np.sqrt(values.clip(min=0))


def fid(a, b):
    """FID of two sets of features [N, D]; with fewer rows than columns by way of the small matrix (see above)."""
    a, b = checked(a, "the first set"), checked(b, "the second set")
    if _small(a, b):
        return _Gram(a, b).fid(np.arange(len(a)), np.arange(len(b)), exact=True)
    return frechet(Moments().add(a), Moments().add(b))


def _small(a, b):
    """Is the matrix of inner products of rows the smaller way?"""
    return min(len(a), len(b)) < a.shape[1] and max(len(a), len(b)) <= 2 * a.shape[1]


class _Gram:
    """FID of subsets of two sets of rows, from their inner products alone."""

    def __init__(self, a, b):
        shift = (a.mean(0) + b.mean(0)) / 2  # any will do; near the data it keeps the numbers small
        a, b = a - shift, b - shift
        self.a, self.b, self.cross = a, b, a @ b.T
        self.squares = (a * a).sum(1), (b * b).sum(1)

    def fid(self, i, j, exact=False):
        ma, mb = self.a[i].mean(0), self.b[j].mean(0)
        n, m = len(i), len(j)
        va = (self.squares[0][i].sum() - n * ma @ ma) / (n - 1)
        vb = (self.squares[1][j].sum() - m * mb @ mb) / (m - 1)
        k = self.cross[np.ix_(i, j)]
        k = k - k.mean(0) - k.mean(1)[:, None] + k.mean()
        if exact:
            singular = scipy.linalg.svdvals(k).sum()
        else:
            small = k @ k.T if n <= m else k.T @ k  # its eigenvalues are the squared singular values
            singular = np.sqrt(scipy.linalg.eigvalsh(small).clip(min=0)).sum()
        return float(((ma - mb) ** 2).sum() + va + vb - 2 * singular / np.sqrt((n - 1) * (m - 1)))


def fid_interval(a, b, resamples=20, seed=0, level=0.95):
    """(low, high) of FID under resampling of both sets: the value ± a normal quantile of the resamples' deviation.

    Percentiles would be wrong: a resample has fewer different pictures, and FID grows when there are fewer.
    """
    a, b = checked(a, "the first set"), checked(b, "the second set")
    rng = np.random.default_rng(seed)
    if _small(a, b):
        gram = _Gram(a, b)
        value = gram.fid
    else:

        def value(i, j):
            return frechet(Moments().add(a[i]), Moments().add(b[j]), exact=False)

    drawn = [value(rng.integers(len(a), size=len(a)), rng.integers(len(b), size=len(b))) for _ in range(resamples)]
    half = scipy.special.ndtri(0.5 + level / 2) * np.std(drawn, ddof=1)
    middle = fid(a, b)
    return float(middle - half), float(middle + half)


# ---------------------------------------------------------------------------------------------------------
# Others


class Value(NamedTuple):
    """A number and its spread (a standard deviation)."""

    value: float
    std: float


def kid(a, b, subsets=100, size=1000, seed=SEED, degree=3, gamma=None, coef0=1.0):
    """(Value, size used): mean and deviation over subsets of both sets, drawn as torch-fidelity draws them. A set that is no larger than a subset is
    the same in all of them: what its pictures' choice would make of the value is then the jackknife's variance, and is added."""
    a, b = checked(a, "the first set"), checked(b, "the second set")
    size = min(size, len(a), len(b))
    gamma = 1 / a.shape[1] if gamma is None else gamma
    rng = np.random.RandomState(seed)
    picks = [(rng.choice(len(a), size, replace=False), rng.choice(len(b), size, replace=False)) for _ in range(subsets)]

    def kernel(x, y):
        return (gamma * (x @ y.T) + coef0) ** degree

    if max(len(a), len(b)) <= WHOLE:  # all inner products once; the subsets choose from them
        xx, yy, xy = kernel(a, a), kernel(b, b), kernel(a, b)
        values = [mmd(xx[np.ix_(i, i)], yy[np.ix_(j, j)], xy[np.ix_(i, j)]) for i, j in picks]
    else:
        values = [mmd(kernel(a[i], a[i]), kernel(b[j], b[j]), kernel(a[i], b[j])) for i, j in picks]
    variance, (i, j) = np.var(values), picks[0]
    if size == min(len(a), len(b)):
        xx, yy, xy = kernel(a[i], a[i]), kernel(b[j], b[j]), kernel(a[i], b[j])
        variance += _jackknife(xx, yy, xy) * (len(a) == size) + _jackknife(yy, xx, xy.T) * (len(b) == size)
    return Value(float(np.mean(values)), float(np.sqrt(variance))), size


def _jackknife(xx, yy, xy):
    """The variance of mmd() that the choice of x makes, by leaving out each of its n rows in turn (Efron & Stein 1981); NaN of fewer than three."""
    n, m = xy.shape
    if n < 3:
        return np.nan
    others = (xx.sum() - xx.trace()) - 2 * (xx.sum(1) - xx.diagonal())  # of pairs without row i, both ways round
    values = others / ((n - 1) * (n - 2)) - 2 * (xy.sum() - xy.sum(1)) / ((n - 1) * m)
    return (n - 1) / n * ((values - values.mean()) ** 2).sum()


def mmd(xx, yy, xy):
    """The unbiased squared maximum mean discrepancy of three kernel matrices."""
    n, m = len(xx), len(yy)
    return (xx.sum() - xx.trace()) / (n * (n - 1)) + (yy.sum() - yy.trace()) / (m * (m - 1)) - 2 * xy.mean()


def inception_score(logits, splits=10, seed=SEED):
    """Value over `splits` parts of the shuffled rows (seed None: as they are). logits [N, classes]."""
    x = checked(logits, "the generated set", splits)
    if seed is not None:
        x = x[np.random.RandomState(seed).permutation(len(x))]
    x = x - x.max(1, keepdims=True)
    log_p = x - np.log(np.exp(x).sum(1, keepdims=True))
    scores = []
    for i in range(splits):
        part = log_p[i * len(x) // splits : (i + 1) * len(x) // splits]
        p = np.exp(part)
        scores.append(np.exp((p * (part - np.log(p.mean(0, keepdims=True)))).sum(1).mean()))
    return Value(float(np.mean(scores)), float(np.std(scores)))


def distances(a, b):
    """Euclidean distances [N, M] of rows, by inner products; never negative under the root."""
    squares = (a * a).sum(1)[:, None] + (b * b).sum(1) - 2 * a @ b.T
    return np.sqrt(squares.clip(min=0))


def _blocks(x, other):
    """(first row, rows) of x in parts, so that their distances to the other rows stay within BLOCK."""
    step = max(BLOCK // max(len(other), 1), 1)
    return ((first, x[first : first + step]) for first in range(0, len(x), step))


def _radii(x, k):
    """Distance of each row to its k-th nearest other row."""
    found = []
    for first, part in _blocks(x, x):
        d = distances(part, x)
        d[np.arange(len(d)), np.arange(first, first + len(d))] = 0.0  # itself, but for rounding
        found.append(np.partition(d, k, axis=1)[:, k])
    return np.concatenate(found)


def prdc(real, generated, k=5):
    """{"precision", "recall", "density", "coverage"} with balls that reach to the k-th nearest neighbour."""
    real, generated = checked(real, "the real set", k + 1), checked(generated, "the generated set", k + 1)
    r, g = _radii(real, k), _radii(generated, k)
    balls, recalled, covered = np.zeros(len(generated)), 0, 0
    for first, part in _blocks(real, generated):
        d, radius = distances(part, generated), r[first : first + len(part)]
        balls += (d < radius[:, None]).sum(0)  # of real pictures, around each generated one
        recalled += (d < g).any(1).sum()
        covered += (d.min(1) < radius).sum()
    return {
        "precision": float((balls > 0).mean()),
        "recall": float(recalled / len(real)),
        "density": float(balls.mean() / k),
        "coverage": float(covered / len(real)),
    }


def diversity(features):
    """Mean cosine distance of two different pictures of a set: 0 all alike, 1 unrelated."""
    x = checked(features, "the set")
    x = x / np.linalg.norm(x, axis=1, keepdims=True).clip(min=1e-12)
    n = len(x)
    return float(1 - ((x.sum(0) ** 2).sum() - n) / (n * (n - 1)))


class Copies(NamedTuple):
    """How near generated pictures are to training pictures."""

    share: float  # of generated pictures that are nearer to a training picture than that one's own nearest neighbour is
    nearest: np.ndarray  # [N] the nearest training picture
    distance: np.ndarray  # [N] its distance
    ratio: np.ndarray  # [N] that distance over the training picture's own distance to its nearest neighbour


def memorisation(training, generated):
    """Copies: 1 - authenticity. Training data itself, drawn anew, gives about a half; copies give 1.

    Of equal training pictures one is looked at: beside its double a picture would have no distance to be nearer than."""
    training, generated = checked(training, "the training set"), checked(generated, "the generated set", 1)
    different, first_of = np.unique(training, axis=0, return_index=True)
    different = checked(different, "the different pictures of the training set")
    nearest, distance = [], []
    for _, part in _blocks(generated, different):
        d = distances(part, different)
        nearest.append(d.argmin(1))
        distance.append(d.min(1))
    nearest, distance = np.concatenate(nearest), np.concatenate(distance)
    own = _radii(different, 1)[nearest]
    return Copies(float((distance < own).mean()), first_of[nearest], distance, distance / own.clip(min=1e-12))


def clip_score(images, texts):
    """[N] cosines of unit rows that belong together."""
    images, texts = checked(images, "the pictures", 1), checked(texts, "the captions", 1)
    if len(images) != len(texts):
        raise UserError(f"{len(images)} pictures and {len(texts)} captions")
    return (images * texts).sum(1)


def modality_gap(images, texts):
    """{"cosd", "l2m", "var_images", "var_texts", "rmg"} of paired unit rows of CLIP.

    cosd: mean of 1 - cos of pairs. l2m: distance of the two means. var: mean squared distance of a modality's rows to their mean.
    rmg: mean d of pairs over (mean d within the two modalities + mean d of pairs), d = (1 - cos) / 2.
    """
    x, y = checked(images, "the pictures"), checked(texts, "the captions")
    pairs = clip_score(x, y)
    n = len(x)
    within = [(n * n - (z.sum(0) ** 2).sum()) / (n * (n - 1)) / 2 for z in (x, y)]  # diagonal: d = 0
    between = float((1 - pairs).mean() / 2)
    return {
        "cosd": float((1 - pairs).mean()),
        "l2m": float(np.linalg.norm(x.mean(0) - y.mean(0))),
        "var_images": float(((x - x.mean(0)) ** 2).sum(1).mean()),
        "var_texts": float(((y - y.mean(0)) ** 2).sum(1).mean()),
        "rmg": float(between / (sum(within) / 2 + between)) if between or any(within) else np.nan,
    }


COLOURS = ("brightness", "contrast", "saturation", "colourfulness", "colour_std")


def colours(image):
    """{name: number} of one picture, uint8 [H, W, 3]: brightness and contrast (mean and deviation of grey, 0-255), saturation (mean
    of HSV's, 0-1), colourfulness (Hasler), colour_std (mean deviation of the channels, 0-255)."""
    x = np.asarray(image, np.float64)
    r, g, b = x[..., 0], x[..., 1], x[..., 2]
    grey = 0.299 * r + 0.587 * g + 0.114 * b
    most, least = x.max(-1), x.min(-1)
    rg, yb = r - g, (r + g) / 2 - b
    spread, middle = np.hypot(rg.std(), yb.std()), np.hypot(rg.mean(), yb.mean())
    return {
        "brightness": float(grey.mean()),
        "contrast": float(grey.std()),
        "saturation": float(np.divide(most - least, most, out=np.zeros_like(most), where=most > 0).mean()),
        "colourfulness": float(spread + 0.3 * middle),
        "colour_std": float(x.reshape(-1, 3).std(0).mean()),
    }
