"""Chapter 4, guidance. Fill in the functions, then: make exercise N=4"""


def guided(without, with_text, scale):
    """Classifier-free guidance of two answers of the network, any shape."""
    raise NotImplementedError


def rescaled(out, with_text, rescale):
    """The guided answer `out` [B, C, H, W] with its contrast mended: `rescale` (0 to 1) parts of it brought to the standard deviation of with_text
    (over everything but the batch), the rest as it is.

    Hint: Tensor.std takes a list of dimensions and keepdim=True.
    """
    raise NotImplementedError


def guided_bell(x, sigma, means, width, wanted, scale):
    """The guided guess of x0 at x = x0 + sigma ε, x [N], for data of equally likely bells with middles `means` [K] and standard deviation `width`,
    where the caption says that it is bell number `wanted`.

    Hint: for one bell the guess is μ + width²/(width² + σ²) (x - μ), and how likely x is follows a bell of variance width² + σ². For all of
    them together it is the mean of the guesses, weighted by these likelihoods. Guiding x0 and guiding ε come to the same.
    """
    raise NotImplementedError
