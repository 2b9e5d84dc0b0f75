"""Data, optimizer and schedule of the official Deformable DETRs: COCO with images that have no box,
50 epochs of 32 images, and the "existing" multi-scale augmentation.
"""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations

_IMAGES = 118_287  # images of train2017
_BATCH = 32


def iterations(epochs):
    """Epochs in iterations, rounded half up."""
    return (2 * _IMAGES * epochs + _BATCH) // (2 * _BATCH)


dataloader = common.detection_loader(
    train="coco_2017_train",
    test="coco_2017_val",
    train_augmentations=L(augmentations.detr)(is_train=True),
    test_augmentations=L(augmentations.default)(is_train=False, min_size=[800], max_size=1333),
    batch_size=_BATCH,
    image_format="RGB",
    filter_empty=False,
)
# of CEDNet-NeXt-T and S; their weight decay is that of the layers of the backbone
optimizer = common.adamw(
    lr=2e-4, weight_decay=0.05, weight_decay_1d=0.0, weight_decay_heads=1e-4, layer_decay=0.5
)
optimizer.params.lr_multipliers = {"sampling_offsets": 0.1, "reference_points": 0.1}
lr_multiplier = common.multistep(
    milestones=[iterations(40)], max_iter=iterations(50), warmup_iters=0
)
train = common.train(
    max_iter=iterations(50),
    channels_last=True,
    clip_gradients={"enabled": True, "clip_type": "full_model", "clip_value": 0.1},
)


def plain_adamw():
    """Return the optimizer of all other backbones: one weight decay for everything."""
    plain = common.adamw(lr=2e-4, weight_decay=1e-4)
    plain.params.weight_decay_norm = None
    names = ("backbone", "sampling_offsets", "reference_points")
    plain.params.lr_multipliers = dict.fromkeys(names, 0.1)
    return plain
