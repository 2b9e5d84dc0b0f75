"""CEDNet: cascade encoder-decoder networks for dense prediction; importing it registers the
backbone ``CEDNet`` and the source ``cednet`` of checkpoints.
"""

from d2dense.analyses.fusion import register_fusion_rule
from d2dense.checkpoint import register_source

from . import official
from .backbone import CEDNet
from .blocks import BottleneckFamily, CSwinFamily, NextFamily, SwinFamily, block_family
from .classifier import CEDNetClassifier, StageClassifier
from .config import add_cednet_config
from .fusion_time import parts_before_fusion
from .official_names import correspondence
from .trunk import CEDNetTrunk

__all__ = [
    "BottleneckFamily",
    "CEDNet",
    "CEDNetClassifier",
    "CEDNetTrunk",
    "CSwinFamily",
    "NextFamily",
    "StageClassifier",
    "SwinFamily",
    "add_cednet_config",
    "block_family",
    "official",
]

register_source("cednet", correspondence)
register_fusion_rule(CEDNet, parts_before_fusion)
