"""Chapter 1, noise and its schedule. Fill in the three functions, then: make exercise N=1"""

import torch


def add_noise(x0, noise, alpha_bar):
    """The picture x0 [B, C, H, W] mixed with noise of the same shape, for one number alpha_bar [B] a picture, in [0, 1].

    Hint: alpha_bar[:, None, None, None] has a shape that multiplies a picture.
    """
    raise NotImplementedError


def scaled_linear(n, start, end):
    """alpha_bar [n] of Stable Diffusion's schedule: the square roots of beta go in even steps from √start to √end.

    Hint: torch.linspace, and torch.Tensor.cumprod.
    """
    raise NotImplementedError


def zero_terminal_snr(alpha_bar):
    """Another alpha_bar [n], whose last value is 0 and whose first is what it was: √alpha_bar shifted and stretched."""
    raise NotImplementedError


if __name__ == "__main__":  # a place to try things out
    print(scaled_linear(1000, 0.00085, 0.012)[-1])
    print(torch.__version__)
