"""Chapter 5, the UNet. Fill in the functions, then: make exercise N=5"""


def time_embedding(t, dim):
    """[B, dim] for times t [B] and an even dim: first dim/2 cosines, then dim/2 sines, of t · 10000^(-i / (dim/2)), i = 0, 1, …

    Hint: torch.arange, torch.exp, torch.cat.
    """
    raise NotImplementedError


def resnet(x, shift, norm1, conv1, norm2, conv2, shortcut=None):
    """A residual block on x [B, C, H, W]: norm1, conv1, then the time's shift [B, C'] on every pixel, norm2, conv2, and the input added.

    norm1 and norm2 include their SiLU. shortcut: what brings the input to the output's channels, or None where they agree.
    """
    raise NotImplementedError


def u(x, down, middle, up):
    """The U. down: [functions of one level, …], each level a list; x goes through them in order, and what each function returns is kept. Then middle(x).
    up: as many functions in all, a flat list; each is called as f(x, kept) with the newest kept entry that is not used yet. Returns x."""
    raise NotImplementedError
