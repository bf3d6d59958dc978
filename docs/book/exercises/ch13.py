"""Chapter 13, fewer steps. Fill in the functions, then: make exercise N=13

Tensors are [B, C, h, w]; a, s and a1, s1 are numbers: how much picture and noise there is at the beginning and at the end of a jump.
"""


def jump(x, x0, a, s, a1, s1):
    """Where a DDIM step from x with the guess x0 ends."""
    raise NotImplementedError


def target(x, end, a, s, a1, s1):
    """The guess x0 with which one jump from x ends at `end`."""
    raise NotImplementedError


def consistency_loss(student, teacher_jump, x):
    """The mean squared difference between what the student says at x and what it says at teacher_jump(x); no gradient flows through the latter.

    student: x -> x0. Hint: torch.no_grad().
    """
    raise NotImplementedError
