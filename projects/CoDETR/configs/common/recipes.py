"""Data, optimizers and schedules of the paper, in parts that the models share. Every call returns
new nodes.
"""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations
from d2dense.data.builtin import dataset_root
from d2dense.data.copy_paste import CopyPaste
from d2dense.modeling.detr.federated import federated_classes

IMAGES = 118_287  # of COCO's train2017, those without a box too
LVIS_IMAGES = 100_170
OBJECTS365_IMAGES = 1_742_289
RESNET50 = "detectron2://ImageNetPretrained/torchvision/R-50.pkl"
_PAD_VALUE = 114.0  # of large-scale jitter, before normalisation


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


def jittered(*, size, data=("coco_2017_train", "coco_2017_val")):
    """Squares of large-scale jitter, into which objects of a second image are pasted by their
    shapes. For data without masks set ``dataloader.train.mapper.use_instance_mask=false``: nothing
    is pasted then.
    """
    return common.detection_loader(
        train=data[0],
        test=data[1],
        train_augmentations=L(augmentations.lsj)(
            is_train=True, image_size=size, min_scale=0.1, max_scale=2.0, pad_value=[_PAD_VALUE] * 3
        ),
        test_augmentations=L(augmentations.default)(is_train=False, min_size=[size], max_size=size),
        masks=True,
        min_box_side=0.01,
        copy_paste=L(CopyPaste)(
            prob=1.0,
            max_iou=1.0,
            max_objects=100,
            corrected=True,
            any_number=True,
            min_pixels=300,
            masks_only=True,
            into_empty=True,
        ),
        image_format="RGB",
        filter_empty=False,
    )


def lvis(*, size):
    """LVIS in :func:`jittered` squares; images of rare classes come more often."""
    dataloader = jittered(size=size, data=("lvis_v1_train", "lvis_v1_val"))
    dataloader.train.sampler = "repeat_factor"
    dataloader.train.repeat_threshold = 0.001
    return dataloader


def objects365():
    """Return where the files of Objects365 are (boxes of 365 classes in COCO's format)."""
    root = dataset_root() / "objects365"
    return {
        split: {"json": str(root / f"{split}.json"), "images": str(root / "images")}
        for split in ("train", "val")
    }


def squares(model, size):
    """Let a model of :func:`jittered` squares see their padding, in tests too; return it."""
    model.update(mask_padding=False, square=size, pad_value=_PAD_VALUE)
    return model


def federated(model):
    """Let only some classes of LVIS count in a batch's classification losses; return the model."""
    model.num_classes = 1203
    model.criterion.federated = L(federated_classes)(
        dataset="${dataloader.train.dataset.names}",
        number=50,
        power=0.5,
        num_classes="${..num_classes}",
    )
    return model


def adamw(*, lr=2e-4, weight_decay=1e-4, slower=("backbone",)):
    """AdamW whose weight decay spares nothing, norms and biases included.

    Args:
        slower: parts of parameter names whose rate is a tenth.
    """
    optimizer = common.adamw(lr=lr, weight_decay=weight_decay)
    optimizer.params.weight_decay_norm = None
    optimizer.params.lr_multipliers = dict.fromkeys(slower, 0.1)
    return optimizer


def adamw_vit():
    """AdamW of the ViT-L: rates fall from block to block, and one-dimensional tensors have no
    weight decay.
    """
    return common.adamw(lr=5e-5, weight_decay=0.01, weight_decay_1d=0.0, layer_decay=0.8)


def iterations(epochs, *, images=IMAGES, batch_size=16):
    """Epochs in iterations, rounded half up."""
    return (2 * images * epochs + batch_size) // (2 * batch_size)


def schedule(epochs, *drops, init=RESNET50, warmup_iters=0, warmup_factor=0.01, **epoch):
    """Return ``train`` and ``lr_multiplier``: a tenth of the rate after each epoch of ``drops``,
    and gradients whose norm is at most 0.1.

    Args:
        init: initial weights.
        epoch: ``images`` and ``batch_size`` of :func:`iterations`.
    """
    length = iterations(epochs, **epoch)
    train = common.train(
        max_iter=length,
        init_checkpoint=init,
        clip_gradients={"enabled": True, "clip_type": "full_model", "clip_value": 0.1},
        channels_last=True,
    )
    return train, common.multistep(
        milestones=[iterations(each, **epoch) for each in drops],
        max_iter=length,
        warmup_iters=warmup_iters,
        warmup_factor=warmup_factor,
    )
