"""Triton's interpreter without looking through its own language at every call of a function."""

import functools
import inspect

from triton import language
from triton.runtime import interpreter


@functools.cache
def _builtins(package):
    return [(name, member) for name, member in inspect.getmembers(package) if language.core.is_builtin(member)]


def _patch_builtin(package, builder, scope):
    """What the interpreter's own does: each builtin of the language is replaced while a kernel runs. A function that a kernel calls finds them
    replaced already."""
    members = _builtins(package)
    if members and getattr(package, members[0][0]) is members[0][1]:
        for name, member in members:
            interpreter._patch_attr(package, name, member, builder, scope)


def quicken():
    """Half of the time of small kernels; of another Triton, which has no such function, nothing changes."""
    if hasattr(interpreter, "_patch_builtin") and hasattr(interpreter, "_patch_attr"):
        interpreter._patch_builtin = _patch_builtin
