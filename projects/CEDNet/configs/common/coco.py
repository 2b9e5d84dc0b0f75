"""Data, optimizer and schedule of the official RetinaNets: COCO, 36 epochs of 16 images,
large-scale jitter at 1024 pixels with copy-paste of boxes.
"""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations
from d2dense.data.copy_paste import CopyPaste

_IMAGES = 117_266  # images of train2017 that have at least one box
_BATCH = 16


def iterations(epochs):
    """Epochs in iterations, rounded half up."""
    return (2 * _IMAGES * epochs + _BATCH) // (2 * _BATCH)


def schedule(*, epochs, steps):
    """Divide the learning rate by ten after each epoch of ``steps``."""
    return common.multistep(
        milestones=[iterations(each) for each in steps],
        max_iter=iterations(epochs),
        warmup_iters=500,
        warmup_factor=0.001,
    )


dataloader = common.detection_loader(
    train="coco_2017_train",
    test="coco_2017_val",
    train_augmentations=L(augmentations.lsj)(
        is_train=True,
        image_size=1024,
        min_scale=0.1,
        max_scale=2.0,
        pad_value=[123.675, 116.28, 103.53],
    ),
    test_augmentations=L(augmentations.default)(is_train=False, min_size=[800], max_size=1333),
    copy_paste=L(CopyPaste)(),
    min_box_side=0.01,
    reject_emptied=True,
    batch_size=_BATCH,
    image_format="RGB",
)
optimizer = common.adamw(
    lr=1e-4, weight_decay=0.05, weight_decay_1d=0.0, weight_decay_heads=1e-4, layer_decay=0.95
)
lr_multiplier = schedule(epochs=36, steps=(27, 33))
train = common.train(max_iter=iterations(36), amp={"enabled": True}, channels_last=True)
