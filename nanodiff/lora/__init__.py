"""LoRA: format.py has the names of every dialect; reading, running beside the weights, adapters that are trained, writing; tools.py
handles files as a whole."""

from nanodiff.lora.adapters import ATTENTION, adapt, matches, trained, without
from nanodiff.lora.format import DIFFUSERS_NAME, Delta, Lora, names_of
from nanodiff.lora.reading import file_of, grouped, parse, read
from nanodiff.lora.running import Attached, Fused, attach, fuse
from nanodiff.lora.tools import convert, extract, inspect, merge, models_for, skeletons, verify
from nanodiff.lora.writing import FORMS, alpha_of, form_for, header, kohya_name, settings_of, write

__all__ = ["ATTENTION", "DIFFUSERS_NAME", "FORMS", "Attached", "Delta", "Fused", "Lora", "adapt", "alpha_of", "attach", "convert", "extract", "file_of",
           "form_for", "fuse", "grouped", "header", "inspect", "kohya_name", "matches", "merge", "models_for", "names_of", "parse", "read",
           "settings_of", "skeletons", "trained", "verify", "without", "write"]  # fmt: skip
