"""Detectron2's mask branch: arguments to add to the roi heads."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.roi_heads import MaskRCNNConvUpsampleHead

mask_branch = {
    "mask_in_features": ["p2", "p3", "p4", "p5"],
    "mask_pooler": L(ROIPooler)(
        output_size=14,
        scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
        sampling_ratio=0,
        pooler_type="ROIAlignV2",
    ),
    "mask_head": L(MaskRCNNConvUpsampleHead)(
        input_shape=L(ShapeSpec)(channels=256, width=14, height=14),
        num_classes="${..num_classes}",
        conv_dims=[256, 256, 256, 256, 256],
    ),
}
