"""Chapter 3, samplers. Fill in the functions, then: make exercise N=3"""


def ddim_step(x0, eps, alpha_bar_next):
    """The next x, from the network's x0 and eps and the time's alpha_bar (a number)."""
    raise NotImplementedError


def euler(slope, x, sigmas):
    """x at the end of a list of noise levels (numbers, falling, the last one 0), by Euler's method. slope(x, sigma) is dx/dσ.

    Hint: itertools.pairwise(sigmas).
    """
    raise NotImplementedError


def heun(slope, x, sigmas):
    """The same by Heun's method; the last step, to 0, is Euler's: the slope is not asked at 0."""
    raise NotImplementedError


def ddpm_step(x, x0, alpha_bar, alpha_bar_next, z):
    """A step of DDPM from alpha_bar to alpha_bar_next > alpha_bar (numbers), with fresh noise z of x's shape.

    Hint: Ho et al. 2020, equations 6 and 7. Their α_t is alpha_bar / alpha_bar_next here, and β_t is 1 minus that; the variance is the
    smaller one of the two that they name.
    """
    raise NotImplementedError
