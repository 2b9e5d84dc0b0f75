"""A small CEDNet RetinaNet that learns the generated shapes from scratch in minutes on a CPU."""

from detectron2.config import LazyCall as L

from cednet import CEDNet, CEDNetTrunk, NextFamily
from d2dense.config import common, detectors
from d2dense.data import augmentations

_WIDTH = 32  # channels of the levels
model = detectors.retinanet(
    backbone=L(CEDNet)(
        trunk=L(CEDNetTrunk)(
            family=L(NextFamily)(layer_scale=1.0),
            widths=[24, 32, 48, 64],
            first_blocks=1,
            blocks=[1, 2, 1],
            num_stages=2,
            drop_path=0.0,
        ),
        out_channels=_WIDTH,
    ),
    num_classes=10,
    channels=_WIDTH,
)
model.head.conv_dims = [_WIDTH, _WIDTH]
model.anchor_generator.sizes = [[2 * stride, 3 * stride] for stride in (8, 16, 32, 64, 128)]
model.head.num_anchors = 6

_steps, _batch = 800, 8
_resize = {"min_size": [160], "max_size": 160}
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
