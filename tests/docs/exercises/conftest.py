"""Whose functions are tested: the project's, or those of a file (EXERCISES names its folder), as `make exercise N=3` does."""

import importlib.util
import os
import re
from pathlib import Path
from types import SimpleNamespace

import pytest


@pytest.fixture
def mine(request):
    """The functions of the chapter that a test file is about."""
    number = int(re.search(r"ch(\d+)", request.path.name)[1])
    if folder := os.environ.get("EXERCISES"):
        path = Path(folder) / f"ch{number:02}.py"
        spec = importlib.util.spec_from_file_location(path.stem, path)
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        return module
    from docs.book.solutions import SOLUTIONS

    return SimpleNamespace(**{name: function for name, (function, _) in SOLUTIONS[number].items()})
