"""FSCascade on ResNet-50-FPN for 80 classes; every other model is a few changes to this one."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.backbone.fpn import FPN, LastLevelMaxPool
from detectron2.modeling.backbone.resnet import BasicStem, ResNet
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.meta_arch import GeneralizedRCNN
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN, StandardRPNHead
from detectron2.modeling.roi_heads import FastRCNNConvFCHead

from fscascade import FSCascadeROIHeads, LocalizationHead, StagePredictor, box_transform

_pooled = L(ShapeSpec)(channels=256, width=7, height=7)

model = L(GeneralizedRCNN)(
    backbone=L(FPN)(
        bottom_up=L(ResNet)(
            stem=L(BasicStem)(in_channels=3, out_channels=64, norm="FrozenBN"),
            stages=L(ResNet.make_default_stages)(depth=50, stride_in_1x1=True, norm="FrozenBN"),
            out_features=["res2", "res3", "res4", "res5"],
            freeze_at=2,
        ),
        in_features=["res2", "res3", "res4", "res5"],
        out_channels=256,
        top_block=L(LastLevelMaxPool)(),
    ),
    proposal_generator=L(RPN)(
        in_features=["p2", "p3", "p4", "p5", "p6"],
        head=L(StandardRPNHead)(in_channels=256, num_anchors=3),
        anchor_generator=L(DefaultAnchorGenerator)(
            sizes=[[32], [64], [128], [256], [512]],
            aspect_ratios=[0.5, 1.0, 2.0],
            strides=[4, 8, 16, 32, 64],
            offset=0.0,
        ),
        anchor_matcher=L(Matcher)(
            thresholds=[0.3, 0.7], labels=[0, -1, 1], allow_low_quality_matches=True
        ),
        box2box_transform=L(box_transform)(weights=[1.0, 1.0, 1.0, 1.0]),
        batch_size_per_image=256,
        positive_fraction=0.5,
        pre_nms_topk=[2000, 1000],
        post_nms_topk=[2000, 1000],
        nms_thresh=0.7,
        smooth_l1_beta=1 / 9,
    ),
    roi_heads=L(FSCascadeROIHeads)(
        num_classes=80,
        batch_size_per_image=512,
        positive_fraction=0.25,
        box_in_features=["p2", "p3", "p4", "p5"],
        box_pooler=L(ROIPooler)(
            output_size=7,
            scales=[1 / 4, 1 / 8, 1 / 16, 1 / 32],
            sampling_ratio=0,
            pooler_type="ROIAlignV2",
        ),
        box_heads=[
            L(FastRCNNConvFCHead)(input_shape=_pooled, conv_dims=[], fc_dims=[1024, 1024])
            for _ in range(3)
        ],
        box_predictors=[
            L(StagePredictor)(
                input_shape=L(ShapeSpec)(channels=1024),
                box_input_shape=_pooled,
                box2box_transform=L(box_transform)(weights=[10.0 * k, 10.0 * k, 5.0 * k, 5.0 * k]),
                num_classes="${...num_classes}",
                cls_agnostic_bbox_reg=True,
                smooth_l1_beta=1.0,
                test_score_thresh=0.05,
                test_nms_thresh=0.5,
                test_topk_per_image=100,
            )
            for k in (1, 2, 3)
        ],
        iou_thresholds=[0.5, 0.6, 0.7],
        cfs=True,
        loc_head=L(LocalizationHead)(channels=256, num_stages=3, sharing=True),
        stage_loss_weights=[1.0, 0.5, 0.25],
        test_scores="last",
    ),
    pixel_mean=[103.530, 116.280, 123.675],
    pixel_std=[1.0, 1.0, 1.0],
    input_format="BGR",
)
