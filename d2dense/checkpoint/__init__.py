"""Reading, writing and renaming model files: plain types and tensors only, written whole or not at
all.
"""

from .conversion import (
    Correspondence,
    convert,
    convert_back,
    convert_with_report,
    register_source,
    sources,
)
from .files import DamagedError, read, write
from .folder import CheckpointFolder
from .rows import KeptRows
from .weights import LoadReport, load_weights

__all__ = [
    "CheckpointFolder",
    "Correspondence",
    "DamagedError",
    "KeptRows",
    "LoadReport",
    "convert",
    "convert_back",
    "convert_with_report",
    "load_weights",
    "read",
    "register_source",
    "sources",
    "write",
]
