"""Detection transformers, in exchangeable parts; importing it registers them."""

from .boxes import BoxEmbedding, BoxPositions, inverse_sigmoid
from .channel_mapper import ChannelMapper
from .conditional_decoder import ConditionalDecoder, ConditionalDecoderLayer
from .criterion import CLASS_LOSSES, DETRCriterion, mean_over_processes
from .decoder import DeformableDecoder, DeformableDecoderLayer
from .deformable_detr import DeformableDETR
from .denoising import ContrastiveDenoising, NoisedQueries
from .encoder import DeformableEncoder, DeformableEncoderLayer
from .heads import BoxHead, PredictionHeads
from .matcher import HungarianMatcher, Matches
from .memory import Memory
from .one_to_many import OneToManyQueries
from .parts import NECKS
from .positions import SinePositions
from .proposals import EncoderPredictions, Proposals, TwoStageQueries
from .queries import LearnedQueries, Queries
from .selection import Selection
from .single_scale_encoder import SingleScaleEncoder, SingleScaleEncoderLayer
from .single_scale_queries import AnchorQueries, PointQueries
from .soft_nms import soft_nms
from .targets import Targets, build_targets

__all__ = [
    "CLASS_LOSSES",
    "NECKS",
    "AnchorQueries",
    "BoxEmbedding",
    "BoxHead",
    "BoxPositions",
    "ChannelMapper",
    "ConditionalDecoder",
    "ConditionalDecoderLayer",
    "ContrastiveDenoising",
    "DETRCriterion",
    "DeformableDETR",
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DeformableEncoderLayer",
    "EncoderPredictions",
    "HungarianMatcher",
    "LearnedQueries",
    "Matches",
    "Memory",
    "NoisedQueries",
    "OneToManyQueries",
    "PointQueries",
    "PredictionHeads",
    "Proposals",
    "Queries",
    "Selection",
    "SinePositions",
    "SingleScaleEncoder",
    "SingleScaleEncoderLayer",
    "Targets",
    "TwoStageQueries",
    "build_targets",
    "inverse_sigmoid",
    "mean_over_processes",
    "soft_nms",
]
