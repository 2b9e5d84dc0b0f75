"""Feature pyramids around any backbone."""

from .bifpn import BiFPN
from .fpn import PaddedFPN
from .hrfpn import HRFPN
from .nas_fpn import NASFPN
from .simple_pyramid import SimplePyramid
from .vit_pyramid import ViTPyramid

__all__ = ["HRFPN", "NASFPN", "BiFPN", "PaddedFPN", "SimplePyramid", "ViTPyramid"]
