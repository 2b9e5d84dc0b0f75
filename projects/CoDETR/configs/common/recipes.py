"""Data, optimizers and schedules of the paper, in parts that the models share. Every call returns
new nodes.
"""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations
from d2dense.data.copy_paste import CopyPaste

IMAGES = 118_287  # of COCO's train2017, those without a box too
PAD_VALUE = 114.0  # of large-scale jitter, before normalisation


def coco(*, batch_size=16, min_sizes=augmentations.DETR_MIN_SIZES, max_size=1333, test_size=None):
    """COCO with the multi-scale crops of the DETR family.

    Args:
        min_sizes, max_size: of training images.
        test_size: (shorter, longest) side of test images; None: 800 and 1333.
    """
    shorter, longest = test_size or (800, 1333)
    return common.detection_loader(
        train="coco_2017_train",
        test="coco_2017_val",
        train_augmentations=L(augmentations.detr)(
            is_train=True, min_size=list(min_sizes), max_size=max_size
        ),
        test_augmentations=L(augmentations.default)(
            is_train=False, min_size=[shorter], max_size=longest
        ),
        batch_size=batch_size,
        image_format="RGB",
        filter_empty=False,
    )


def jittered(*, size, batch_size=16, data=("coco_2017_train", "coco_2017_val")):
    """Squares of large-scale jitter, into which objects of a second image are pasted by their
    shapes.
    """
    return common.detection_loader(
        train=data[0],
        test=data[1],
        train_augmentations=L(augmentations.lsj)(
            is_train=True, image_size=size, min_scale=0.1, max_scale=2.0, pad_value=PAD_VALUE
        ),
        test_augmentations=L(augmentations.default)(is_train=False, min_size=[size], max_size=size),
        masks=True,
        min_box_side=0.01,
        copy_paste=L(CopyPaste)(
            prob=1.0, max_iou=1.0, max_objects=100, corrected=True, any_number=True, min_pixels=300
        ),
        batch_size=batch_size,
        image_format="RGB",
        filter_empty=False,
    )


def adamw(*, lr=2e-4, weight_decay=1e-4, slower=("backbone",)):
    """AdamW whose weight decay spares nothing, norms and biases included.

    Args:
        slower: parts of parameter names whose rate is a tenth.
    """
    optimizer = common.adamw(lr=lr, weight_decay=weight_decay)
    optimizer.params.weight_decay_norm = None
    optimizer.params.lr_multipliers = dict.fromkeys(slower, 0.1)
    return optimizer


def iterations(epochs, *, images=IMAGES, batch_size=16):
    """Epochs in iterations, rounded half up."""
    return (2 * images * epochs + batch_size) // (2 * batch_size)


def schedule(epochs, *drops, warmup_iters=0, warmup_factor=0.01, **epoch):
    """Return ``train`` and ``lr_multiplier``: a tenth of the rate after each epoch of ``drops``,
    and gradients whose norm is at most 0.1.

    Args:
        epoch: ``images`` and ``batch_size`` of :func:`iterations`.
    """
    length = iterations(epochs, **epoch)
    train = common.train(
        max_iter=length,
        clip_gradients={"enabled": True, "clip_type": "full_model", "clip_value": 0.1},
        channels_last=True,
    )
    return train, common.multistep(
        milestones=[iterations(each, **epoch) for each in drops],
        max_iter=length,
        warmup_iters=warmup_iters,
        warmup_factor=warmup_factor,
    )
