"""Feature pyramids other than Detectron2's FPN, around any backbone."""

from .bifpn import BiFPN
from .nas_fpn import NASFPN

__all__ = ["NASFPN", "BiFPN"]
