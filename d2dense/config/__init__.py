"""Configs of both kinds: Detectron2's yaml (yacs) and lazy Python, opened, changed, printed and
saved alike.
"""

from .class_counts import CLASS_COUNT_KEYS, resolve_class_counts
from .defaults import add_d2dense_config, get_cfg
from .loading import apply, build_model, check_device, dump, kind_of, load, resolve_device, save
from .multi_scale import for_tests, is_multi_scale

__all__ = [
    "CLASS_COUNT_KEYS",
    "add_d2dense_config",
    "apply",
    "build_model",
    "check_device",
    "dump",
    "for_tests",
    "get_cfg",
    "is_multi_scale",
    "kind_of",
    "load",
    "resolve_class_counts",
    "resolve_device",
    "save",
]
