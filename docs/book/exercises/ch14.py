"""Chapter 14, measuring. Fill in the functions, then: make exercise N=14

Features are numpy arrays [N, D] of 64-bit numbers.
"""


def fid(a, b):
    """FID of two sets, with N - 1 in the covariances.

    Hint: numpy.cov(a, rowvar=False). The trace of the root of a product is the sum of the square roots of its eigenvalues, which are real and not
    negative but for rounding.
    """
    raise NotImplementedError


def kid(a, b):
    """The unbiased squared distance with the kernel (x · y / D + 1)³ over the whole sets: the mean over pairs of two different rows of a, plus that
    of b, minus twice the mean over pairs of a row of a and one of b."""
    raise NotImplementedError


def precision(real, generated, k):
    """The share of generated rows that lie inside (nearer than the radius of) the ball of some real row, which reaches to its k-th nearest other real row.

    Hint: all distances at once are fine here.
    """
    raise NotImplementedError
