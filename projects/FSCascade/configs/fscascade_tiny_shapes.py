"""A small FSCascade that learns the generated shapes from scratch in minutes on a CPU."""

from detectron2.config import LazyCall as L
from detectron2.layers import ShapeSpec

from d2dense.config import common
from d2dense.data import augmentations
from fscascade.backbone import basic_stages

from .common.fscascade_r50_fpn import model

_STEM, _RES2 = 32, 32  # channels of the backbone
_WIDTH, _FC = 32, 128  # channels of the pyramid, size of the class feature
_pooled = L(ShapeSpec)(channels=_WIDTH, width=7, height=7)

_resnet = model.backbone.bottom_up
_resnet.freeze_at = 0
_resnet.stem.merge_with({"out_channels": _STEM, "norm": "BN"})
_resnet.stages = L(basic_stages)(depth=10, stem_channels=_STEM, res2_channels=_RES2, norm="BN")
model.backbone.out_channels = _WIDTH
model.backbone.norm = "BN"

_rpn = model.proposal_generator
_rpn.in_features = ["p2", "p3", "p4", "p5"]
_rpn.head.in_channels = _WIDTH
_rpn.anchor_generator.sizes = [[10], [20], [40], [80]]
_rpn.anchor_generator.strides = [4, 8, 16, 32]
_rpn.batch_size_per_image = 64
_rpn.pre_nms_topk = [200, 200]
_rpn.post_nms_topk = [100, 100]

_heads = model.roi_heads
_heads.num_classes = 10
_heads.batch_size_per_image = 32
_heads.positive_fraction = 0.5  # more objects to learn classes from
_heads.box_pooler.sampling_ratio = 1
for _head in _heads.box_heads:
    _head.input_shape = _pooled
    _head.fc_dims = [_FC, _FC]
for _predictor in _heads.box_predictors:
    _predictor.input_shape.channels = _FC
    _predictor.box_input_shape = _pooled
_heads.loc_head.channels = _WIDTH

_steps, _batch = 800, 8
_resize = {"min_size": [160], "max_size": 160}
dataloader = common.detection_loader(
    train="shapes_train",
    test="shapes_val",
    train_augmentations=L(augmentations.default)(is_train=True, **_resize),
    test_augmentations=L(augmentations.default)(is_train=False, **_resize),
    batch_size=_batch,
    workers=0,
)
optimizer = common.adamw(lr=0.002, weight_decay=0.05)
lr_multiplier = common.cosine(max_iter=_steps, warmup_iters=50, warmup_factor=0.1)
train = common.train(
    max_iter=_steps, eval_period=_steps // 2, seed=0, device="cpu", channels_last=True
)
