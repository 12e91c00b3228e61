"""The compressed file."""

from kit.artifact.file import ArtifactError, describe, float32_bytes, load, nbytes, save

__all__ = ["ArtifactError", "describe", "float32_bytes", "load", "nbytes", "save"]
