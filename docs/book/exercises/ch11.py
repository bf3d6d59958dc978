"""Chapter 11, flow matching. Fill in the functions, then: make exercise N=11"""


def mix(x0, noise, sigma):
    """x at sigma [B] between the picture x0 [B, C, H, W] and the noise."""
    raise NotImplementedError


def velocity(x0, noise):
    """What the network learns."""
    raise NotImplementedError


def shifted(sigma, shift):
    """sigma moved towards noise, elementwise."""
    raise NotImplementedError


def unshifted(sigma, shift):
    """The inverse of shifted()."""
    raise NotImplementedError


def logit_normal_density(sigma, mean, std):
    """The density at sigma [N] in (0, 1) of sig(n) with n from N(mean, std²).

    Hint: the density of n at log(σ / (1 - σ)), times how much n changes when σ does.
    """
    raise NotImplementedError
