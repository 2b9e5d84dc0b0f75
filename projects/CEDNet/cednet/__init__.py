"""CEDNet: cascade encoder-decoder networks for dense prediction; importing it registers the
backbone ``CEDNet``, the classifier ``CEDNetClassifier``, timm's models ``cednet_*`` and the sources
``cednet`` and ``cednet_classifier`` of checkpoints.
"""

from d2dense.analyses.fusion import register_fusion_rule
from d2dense.checkpoint import register_source

from . import official, timm_models
from .backbone import CEDNet
from .blocks import BottleneckFamily, CSwinFamily, NextFamily, SwinFamily, block_family
from .classifier import CEDNetClassifier, StageClassifier
from .config import add_cednet_config
from .fusion_time import parts_before_fusion
from .official_names import correspondence
from .pretraining import classifier_correspondence, is_classifier_file
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
    "timm_models",
]

register_source("cednet", correspondence)
register_fusion_rule(CEDNet, parts_before_fusion)
register_source("cednet_classifier", classifier_correspondence, recognise=is_classifier_file)
