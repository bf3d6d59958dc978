"""Chapter 16, systems. Fill in the functions, then: make exercise N=16"""


def write_whole(path, data):
    """Write bytes to a file (a pathlib.Path) so that whoever looks sees the old file or the new one, whenever the program dies; leaves no other files
    behind when writing fails.

    Hint: another name in the same folder, flush, then os.fsync, then os.replace (called by these names, which the test puts something else in place of).
    """
    raise NotImplementedError


def noise(seed, indices, shape):
    """N(0, 1) [len(indices), *shape], where the noise of a sample depends on the seed and its index alone.

    Hint: torch.Generator().manual_seed; hash() differs from run to run, hashlib does not.
    """
    raise NotImplementedError


def shares(n, processes):
    """[(first, count, weight)] of each process for an update of n samples: in order, each at most ⌈n / processes⌉, so that the last ones may have fewer
    or none; the sum of weight · (mean of a process's samples) is the mean of all; a process without samples has weight 0."""
    raise NotImplementedError
