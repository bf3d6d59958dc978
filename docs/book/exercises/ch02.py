"""Chapter 2, what the network predicts. Fill in the functions, then: make exercise N=2

Kinds: "epsilon", "sample", "v_prediction", "flow". Tensors have any shape; a and s are numbers or tensors that multiply them.
"""

import torch


def to_x0_eps(kind, p, x, a, s):
    """(x0, eps) from the network's answer p at x = a x0 + s eps; a² + s² = 1, for "flow" a = 1 - s. ValueError for another kind.

    Hint: the chapter's table. Solve the last row yourself.
    """
    raise NotImplementedError


def v_target(x0, eps, alpha_bar):
    """What a v-prediction model should answer; alpha_bar: one number."""
    raise NotImplementedError


def angle(alpha_bar):
    """The angle in radians, 0 to π/2, by which x has turned from the picture to the noise; alpha_bar [N]."""
    raise NotImplementedError


def min_snr_weight(kind, alpha_bar, gamma):
    """The weight [N] of the squared error of p, so that a squared error of x0 weighs min(SNR, gamma); alpha_bar [N] in (0, 1).

    kind: "epsilon", "sample" or "v_prediction". Hint: by how much is x0 off when p is off by e?
    """
    raise NotImplementedError


if __name__ == "__main__":
    print(angle(torch.tensor([1.0, 0.5, 0.0])))
