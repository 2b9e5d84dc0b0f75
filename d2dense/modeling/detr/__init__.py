"""Detection transformers, in exchangeable parts; importing it registers them."""

from .channel_mapper import ChannelMapper
from .criterion import DETRCriterion
from .decoder import DeformableDecoder, DeformableDecoderLayer
from .deformable_detr import NECKS, DeformableDETR
from .encoder import DeformableEncoder, DeformableEncoderLayer
from .heads import BoxHead, PredictionHeads
from .matcher import HungarianMatcher, Matches
from .memory import Memory
from .positions import SinePositions
from .queries import LearnedQueries, Queries
from .targets import Targets, build_targets

__all__ = [
    "NECKS",
    "BoxHead",
    "ChannelMapper",
    "DETRCriterion",
    "DeformableDETR",
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DeformableEncoderLayer",
    "HungarianMatcher",
    "LearnedQueries",
    "Matches",
    "Memory",
    "PredictionHeads",
    "Queries",
    "SinePositions",
    "Targets",
    "build_targets",
]
