"""Data sets: sources.py finds pictures and captions in every common layout; captionset.py and promptset.py read tables of texts."""

from nanodiff.data.sources import SUFFIXES, Dataset, Item, Pictures, load

__all__ = ["SUFFIXES", "Dataset", "Item", "Pictures", "load"]
