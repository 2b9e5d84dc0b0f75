"""Small models for the generated shapes: they learn from scratch in minutes on a CPU."""

from detectron2.config import LazyCall as L

from cednet import CEDNet, CEDNetTrunk, NextFamily
from d2dense.config import common
from d2dense.data import augmentations

width = 32  # channels of the levels
num_classes = 10
_fc_width = 128
_steps, _batch = 800, 8
_resize = {"min_size": [160], "max_size": 160}

backbone = L(CEDNet)(
    trunk=L(CEDNetTrunk)(
        family=L(NextFamily)(layer_scale=1.0),
        widths=[24, 32, 48, 64],
        first_blocks=1,
        blocks=[1, 2, 1],
        num_stages=2,
        drop_path=0.0,
    ),
    out_channels=width,
)
dataloader = common.detection_loader(
    train="shapes_train",
    test="shapes_val",
    train_augmentations=L(augmentations.default)(is_train=True, **_resize),
    test_augmentations=L(augmentations.default)(is_train=False, **_resize),
    batch_size=_batch,
    workers=0,
    image_format="RGB",
)
optimizer = common.adamw(lr=0.002, weight_decay=0.05, weight_decay_1d=0.0)
lr_multiplier = common.cosine(max_iter=_steps, warmup_iters=50, warmup_factor=0.1)
train = common.train(
    max_iter=_steps, eval_period=_steps // 2, seed=0, device="cpu", channels_last=True
)


def shrink_two_stage(model):
    """Make anchors, proposals, samples and heads of an R-CNN small."""
    proposals, regions = model.proposal_generator, model.roi_heads
    proposals.anchor_generator.sizes = [[4 * stride] for stride in (4, 8, 16, 32, 64)]
    proposals.pre_nms_topk = [500, 250]
    proposals.post_nms_topk = [200, 100]
    regions.batch_size_per_image = 64
    if "box_heads" in regions:
        heads, predictors = regions.box_heads, regions.box_predictors
        masks = regions.mask_head.modules
    else:
        heads, predictors, masks = [regions.box_head], [regions.box_predictor], [regions.mask_head]
    for head, predictor, mask in zip(heads, predictors, masks):
        head.conv_dims = head.conv_dims[:1]
        head.fc_dims = [_fc_width] * len(head.fc_dims)
        predictor.input_shape.channels = _fc_width
        mask.conv_dims = mask.conv_dims[:3]
