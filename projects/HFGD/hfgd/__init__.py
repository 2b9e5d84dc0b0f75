"""HFGD: high-level feature guided decoder for semantic segmentation; importing it registers
``HFGDHead``.
"""

from .axial_attention import AxialAttention, LineAttention
from .car_losses import CARLosses
from .config import add_hfgd_config
from .encoders import ENCODERS
from .guided import HFGM, ClassKernels
from .head import HFGDHead
from .layers import SelfAttention
from .upsampling import FeaturePyramid

__all__ = [
    "ENCODERS",
    "HFGM",
    "AxialAttention",
    "CARLosses",
    "ClassKernels",
    "FeaturePyramid",
    "HFGDHead",
    "LineAttention",
    "SelfAttention",
    "add_hfgd_config",
]
