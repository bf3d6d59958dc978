"""Weights and files: safetensors.py reads and writes them, loading.py makes modules of them, original_names.py and hub.py
know other people's names."""

from nanodiff.weights.loading import RENAMES, check_names, digest, load, read_all, renamed, save, skeleton
from nanodiff.weights.safetensors import (
    PICKLES,
    as_weight,
    as_weights,
    check_file,
    find_files,
    header,
    is_pickle,
    load_pickle,
    load_tensors,
    load_weights,
    metadata,
    model_hash,
    open_file,
    opened,
    save_tensors,
    tensor_hash,
)

__all__ = ["PICKLES", "RENAMES", "as_weight", "as_weights", "check_file", "check_names", "digest", "find_files", "header", "is_pickle", "load", "load_pickle", "load_tensors", "load_weights", "metadata", "model_hash",
           "open_file", "opened", "read_all", "renamed", "save", "save_tensors", "skeleton", "tensor_hash"]  # fmt: skip
