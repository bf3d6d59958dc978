"""FreeU: the way up of a UNet says more by itself, and less of the coarse by its skips (Si et al. 2023, arXiv 2309.11497).

Explained in the book (docs/book): chapter 5.
"""

from typing import NamedTuple

import torch


class FreeU(NamedTuple):
    """Factors in the first (1) and second (2) stage of the way up; those of SD 1.5, by the authors."""

    b1: float = 1.5  # of the first half of the channels that come from below
    b2: float = 1.6
    s1: float = 0.9  # of the lowest frequencies of the skip
    s2: float = 0.2

    def __call__(self, x, skip, stage):
        """(x, skip) of a residual block in a stage of the way up, both [B, C, h, w]. From the third stage on nothing changes."""
        if stage > 1:
            return x, skip
        b, s = (self.b1, self.s1) if stage == 0 else (self.b2, self.s2)
        half = x.shape[1] // 2
        x = torch.cat([x[:, :half] * b, x[:, half:]], dim=1)  # [B, C, h, w]
        return x, damped(skip, s)


def damped(skip, factor):
    """[B, C, h, w] with its lowest frequencies, the two by two around zero, times `factor`."""
    h, w = skip.shape[-2:]
    spectrum = torch.fft.fftshift(torch.fft.fftn(skip.float(), dim=(-2, -1)), dim=(-2, -1))
    mask = torch.ones(h, w, device=skip.device)
    mask[h // 2 - 1 : h // 2 + 1, w // 2 - 1 : w // 2 + 1] = factor
    return torch.fft.ifftn(torch.fft.ifftshift(spectrum * mask, dim=(-2, -1)), dim=(-2, -1)).real.to(skip.dtype)
