"""Data, optimizer and schedule of the official Mask2Formers: COCO with masks, 368750 iterations of
16 images, large-scale jitter at 1024 pixels without copy-paste.
"""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations

_ITERATIONS = 368_750

dataloader = common.detection_loader(
    train="coco_2017_train",
    test="coco_2017_val",
    train_augmentations=L(augmentations.lsj)(
        is_train=True, image_size=1024, min_scale=0.1, max_scale=2.0, pad_value=128.0
    ),
    test_augmentations=L(augmentations.default)(is_train=False, min_size=[800], max_size=1333),
    masks=True,
    mask_format="bitmask",
    recompute_boxes=True,
    batch_size=16,
    image_format="RGB",
)
optimizer = common.adamw(lr=1e-4, weight_decay=0.05)
optimizer.params.lr_multipliers = {"backbone": 0.1}
optimizer.params.no_decay_names = [
    "level_embedding",
    "decoder.content",
    "decoder.position",
    "decoder.level",
]
lr_multiplier = common.multistep(
    milestones=[327_778, 355_092], max_iter=_ITERATIONS, warmup_iters=0
)
train = common.train(
    max_iter=_ITERATIONS,
    channels_last=True,
    clip_gradients={"enabled": True, "clip_type": "full_model", "clip_value": 0.01},
)
