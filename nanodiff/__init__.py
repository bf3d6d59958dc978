"""Stable Diffusion, whole and readable, in raw PyTorch.

    import nanodiff

    sd = nanodiff.load("path/or/hub-id")                       # without an argument: the embedded model
    sd.generate("a red apple", seeds=[0]).to_pil()[0].save("apple.png")

Nothing is imported before it is asked for: scripts that only read a command line need no torch.
"""

import importlib

from nanodiff.config import UserError

__version__ = "0.2.0"
__all__ = ["Pipeline", "UserError", "load"]
FRONT = {"load": "nanodiff.pipeline", "Pipeline": "nanodiff.pipeline"}  # what is offered here: where it is


def __dir__():
    return sorted({*globals(), *FRONT})


def __getattr__(name):
    if name in FRONT:
        return getattr(importlib.import_module(FRONT[name]), name)
    raise AttributeError(f"module 'nanodiff' has no attribute {name!r}")
