"""Chapter 12, LoRA. Fill in the functions, then: make exercise N=12"""


def forward(x, W, A, B, alpha):
    """A linear layer W [out, in] with a LoRA A [r, in], B [out, r] beside it: x [..., in] -> [..., out]."""
    raise NotImplementedError


def fused(W, A, B, alpha):
    """The weight that does the same alone."""
    raise NotImplementedError


def best(delta, r):
    """(A [r, in], B [out, r]) whose product B A is the nearest of rank r to delta [out, in].

    Hint: torch.linalg.svd.
    """
    raise NotImplementedError


def strength(layer_alpha, header_alpha, rank):
    """alpha / rank. The layer's own alpha counts; if it has none (None) the header's; if that has none either, alpha is the rank."""
    raise NotImplementedError
