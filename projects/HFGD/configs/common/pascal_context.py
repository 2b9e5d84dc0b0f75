"""Pascal Context, 59 classes: SGD, 30,000 iterations of 16 crops of 513 x 513 pixels."""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations

NUM_CLASSES = 59
CROP = [513, 513]
_ITERATIONS = 30_000
_own_size = {"min_size": [0], "max_size": 0}

dataloader = common.semantic_loader(
    train="pascal_context_sem_seg_train",
    test="pascal_context_sem_seg_val",
    train_augmentations=L(augmentations.semantic)(
        is_train=True,
        **_own_size,
        scale_range=[0.5, 2.0],
        scale_step=0.25,
        crop_size=CROP,
        color_distortion=False,
        image_format="RGB",
    ),
    test_augmentations=L(augmentations.semantic)(is_train=False, **_own_size),
    batch_size=16,
    image_format="RGB",
)
optimizer = common.sgd(lr=0.01, weight_decay=1e-4)
optimizer.params.weight_decay_bias = 0.0
lr_multiplier = common.poly(max_iter=_ITERATIONS, power=0.9)
train = common.train(max_iter=_ITERATIONS, amp={"enabled": True}, channels_last=True)
