"""Text to image: `load()` gives a Pipeline (or its SDXL or SD3), whose generate() makes pictures."""

from nanodiff.pipeline.base import Noise, Pipeline, Result
from nanodiff.pipeline.conditions import Text
from nanodiff.pipeline.families import BUILDERS, SAMPLING, is_turbo
from nanodiff.pipeline.footprint import plan
from nanodiff.pipeline.loading import FAMILIES, convert, load
from nanodiff.pipeline.sd3 import SD3, Joint
from nanodiff.pipeline.sdxl import SDXL
from nanodiff.pipeline.settings import Drawing, Perturbed, SkipLayers, Start, Words
from nanodiff.pipeline.sources import Folder, source

__all__ = ["BUILDERS", "FAMILIES", "SAMPLING", "SD3", "SDXL", "Drawing", "Folder", "Joint", "Noise", "Perturbed", "Pipeline", "Result", "SkipLayers", "Start", "Text", "Words", "convert",
           "is_turbo", "load", "plan", "source"]  # fmt: skip
