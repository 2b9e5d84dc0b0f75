"""Reading and writing model files: plain types and tensors only, written whole or not at all."""

from .files import read, write
from .folder import CheckpointFolder
from .weights import LoadReport, load_weights

__all__ = ["CheckpointFolder", "LoadReport", "load_weights", "read", "write"]
