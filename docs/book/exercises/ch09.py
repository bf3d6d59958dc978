"""Chapter 9, words. Fill in the functions, then: make exercise N=9"""


def merge(parts, pair):
    """The list of pieces in which each `pair` of neighbours, from left to right, has become one piece."""
    raise NotImplementedError


def learn(words, n):
    """The first n merges [(a, b), …] learned from {word: how often it occurs}: again and again the most frequent pair of neighbours, the first one in
    alphabetical order among equals. A word is a tuple of pieces, in the beginning its letters; the last one has a mark at its end, "</w>", so that
    an end is not taken for a middle. Fewer than n where nothing is left to merge.

    Hint: collections.Counter, itertools.pairwise, and merge(); a list is no key of a dict, tuple(…) is.
    """
    raise NotImplementedError


def encode(parts, merges):
    """The list of pieces of a word that begins as these: of all neighbours that are a merge, the one that was learned first is merged (everywhere), until none is left."""
    raise NotImplementedError


def row(ids, bos, eos, pad, length):
    """(a row of `length` ids: bos, the ids, eos, then pad; how many ids were lost because they do not fit)"""
    raise NotImplementedError
