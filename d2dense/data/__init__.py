"""Datasets, augmentations, mappers and loaders.

Importing the package registers the datasets that go by name (:mod:`.builtin`).
"""

from . import builtin
from .classes import dataset_classes
from .datasets import DatasetSpec, register, register_custom
from .loaders import build_test_loader, build_train_loader, get_dataset_dicts
from .mappers import DetectionMapper, SemanticMapper
from .reading import SampleError, read_label_map

__all__ = [
    "DatasetSpec",
    "DetectionMapper",
    "SampleError",
    "SemanticMapper",
    "build_test_loader",
    "build_train_loader",
    "builtin",
    "dataset_classes",
    "get_dataset_dicts",
    "read_label_map",
    "register",
    "register_custom",
]
