"""Chapter 8, the VAE. Fill in the functions, then: make exercise N=8"""


def kl(mean, logvar):
    """Nats [B] of each picture: KL(N(mean, exp(logvar)) ‖ N(0, 1)) summed over its latents; mean, logvar [B, C, h, w].

    Hint: logvar is log σ².
    """
    raise NotImplementedError


def sample(mean, logvar, noise):
    """A point of each cloud, from noise of N(0, 1), so that gradients reach mean and logvar."""
    raise NotImplementedError


def to_latents(z, scale, shift=0.0):
    """Latents of about variance 1 from what the encoder gives."""
    raise NotImplementedError


def to_z(latents, scale, shift=0.0):
    """The way back."""
    raise NotImplementedError


def measured_scale(parts):
    """1 / the standard deviation of all numbers in a list of tensors of any shapes, which come one after another (do not join them).

    Hint: chapter 7's joined(), or two sums in float64.
    """
    raise NotImplementedError
