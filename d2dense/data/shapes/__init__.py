"""The generated set ``shapes``: cluttered, photograph-like scenes with exact labels.

Masks are stored as polygons along the pixel edges, not as run-length codes: Detectron2 takes
polygons for both of its mask formats (``polygon`` and ``bitmask``) but run-length codes for
``bitmask`` only, and polygons of this kind, without holes, are rasterised by pycocotools to exactly
the pixels that they came from.
"""

from .crops import ensure_crops
from .outlines import CLASSES
from .polygons import mask_to_polygons
from .textures import STUFF_CLASSES
from .writer import DEFAULT_COUNTS, SEMANTIC_CLASSES, ensure, generate

__all__ = [
    "CLASSES",
    "DEFAULT_COUNTS",
    "SEMANTIC_CLASSES",
    "STUFF_CLASSES",
    "ensure",
    "ensure_crops",
    "generate",
    "mask_to_polygons",
]
