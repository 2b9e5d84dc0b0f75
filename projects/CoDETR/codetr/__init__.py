"""Co-DETR: detection transformers trained with collaborative hybrid assignments; importing it
registers ``CoDETR``.
"""

from .auxiliary import AuxiliaryHead, Candidates

__all__ = ["AuxiliaryHead", "Candidates"]
