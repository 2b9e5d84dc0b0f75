"""The paper's two recipes, in parts that datasets share: SGD without and AdamW with changes of
contrast and saturation. Every call returns new nodes.
"""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations
from d2dense.data.semantic_augmentations import padded_crops


def crops(*, data, size, color_distortion=False):
    """Batches of 16 random crops from ``<data>_train``; whole images of ``<data>_val``."""
    return common.semantic_loader(
        train=f"{data}_train",
        test=f"{data}_val",
        train_augmentations=L(padded_crops)(
            is_train=True,
            scale_range=[0.5, 2.0],
            scale_step=0.25,
            color_distortion=color_distortion,
            brightness=32.0,
            crop_size=size,
            pad_value=[127.5],
            flip="horizontal",
            image_format="RGB",
        ),
        test_augmentations=L(augmentations.semantic)(is_train=False, min_size=[0], max_size=0),
        batch_size=16,
        image_format="RGB",
    )


def sgd():
    """SGD whose weight decay spares norms and biases."""
    optimizer = common.sgd(lr=0.01, momentum=0.9, weight_decay=1e-4)
    optimizer.params.weight_decay_bias = 0.0
    return optimizer


def adamw():
    """AdamW whose weight decay spares norms, biases and tables of relative positions."""
    optimizer = common.adamw(lr=4e-5, betas=(0.9, 0.999), weight_decay=0.05)
    optimizer.params.weight_decay_bias = 0.0
    optimizer.params.no_decay_names = ["relative_position_bias_table"]
    return optimizer


def schedule(iterations):
    """Return ``train`` and ``lr_multiplier``: mixed precision, and a rate that falls by the power
    0.9 to zero, without a warm-up. Another ``train.max_iter`` stretches it.
    """
    train = common.train(max_iter=iterations, amp={"enabled": True}, channels_last=True)
    return train, common.poly(max_iter=iterations, power=0.9)
