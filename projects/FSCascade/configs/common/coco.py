"""Data, optimizer and schedule of the paper: COCO, 8 x 2 images, 20 epochs ("1x")."""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations

_IMAGES = 117_266  # images of train2017 that have at least one box
_BATCH = 16


def _iterations(epochs):
    """Epochs in iterations, rounded half up."""
    return (2 * _IMAGES * epochs + _BATCH) // (2 * _BATCH)


def schedule(epochs):
    """Iterations, and the lr: one epoch at a tenth, divided by 10 after 10/20 and 16/20 of all."""
    return _iterations(epochs), common.multistep(
        milestones=[_iterations(epochs * 10 // 20), _iterations(epochs * 16 // 20)],
        max_iter=_iterations(epochs),
        warmup_iters=_iterations(1),
        warmup_factor=0.1,
        warmup_method="constant",
    )


dataloader = common.detection_loader(
    train="coco_2017_train",
    test="coco_2017_val",
    train_augmentations=L(augmentations.default)(is_train=True, min_size=[800], max_size=1200),
    test_augmentations=L(augmentations.default)(is_train=False, min_size=[800], max_size=1200),
    batch_size=_BATCH,
)
optimizer = common.sgd(lr=0.02, momentum=0.9, weight_decay=1e-4)
_max_iter, lr_multiplier = schedule(20)
train = common.train(
    max_iter=_max_iter, init_checkpoint="detectron2://ImageNetPretrained/MSRA/R-50.pkl"
)
