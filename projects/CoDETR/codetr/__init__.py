"""Co-DETR: detection transformers trained with collaborative hybrid assignments; importing it
registers ``CoDETR`` and the source ``codetr`` of checkpoints.
"""

from d2dense.checkpoint import register_source

from . import nodes, official
from .adapter import MultiScaleAdapter
from .auxiliary import AuxiliaryHead, Candidates
from .config import add_codetr_config
from .heads import HEADS, ATSSHead, FasterRCNNHead
from .meta_arch import CoDETR
from .official_names import correspondence
from .positive_queries import PositiveQueries
from .single_scale_adapter import SingleScaleAdapter

__all__ = [
    "HEADS",
    "ATSSHead",
    "AuxiliaryHead",
    "Candidates",
    "CoDETR",
    "FasterRCNNHead",
    "MultiScaleAdapter",
    "PositiveQueries",
    "SingleScaleAdapter",
    "add_codetr_config",
    "nodes",
    "official",
]

register_source("codetr", correspondence)
