"""The compressed file: `save`, `load`, and what it holds."""

from kit.artifact.file import describe, float32_bytes, load, nbytes, save, tensor_bytes
from kit.artifact.layouts import LAYOUTS, ArtifactError
from kit.artifact.model import without_values

__all__ = ["LAYOUTS", "ArtifactError", "describe", "float32_bytes", "load", "nbytes", "save"]
__all__ += ["tensor_bytes", "without_values"]
