"""Dense prediction for Detectron2: what the four projects share."""

import importlib

__version__ = "0.1.0"

_SUBMODULES = (
    "checkpoint",
    "config",
    "data",
    "engine",
    "evaluation",
    "export",
    "inference",
    "layers",
    "model_zoo",
    "modeling",
)


def __getattr__(name: str):
    # Submodules import torch and detectron2; loading them on first use keeps `import d2dense`
    # light.
    if name in _SUBMODULES:
        return importlib.import_module(f"d2dense.{name}")
    raise AttributeError(f"module 'd2dense' has no attribute {name!r}")
