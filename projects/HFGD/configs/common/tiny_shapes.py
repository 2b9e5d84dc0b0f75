"""Small networks for the generated shapes: they learn from scratch in a minute on a CPU."""

from detectron2.config import LazyCall as L

from d2dense.config import common
from d2dense.data import augmentations
from d2dense.modeling import LateStrideResNet

from .models import FEATURES, segmenter

_STEPS = 300
_CROP = [129, 129]
_MOMENTUM = 0.1  # of batch norms: with the paper's, so few steps leave running statistics at 0
_frame = {"min_size": [129], "max_size": 513}

dataloader = common.semantic_loader(
    train="shapes_train_sem_seg",
    test="shapes_val_sem_seg",
    train_augmentations=L(augmentations.semantic)(
        is_train=True,
        **_frame,
        scale_range=[0.75, 1.5],
        crop_size=_CROP,
        color_distortion=False,
        image_format="RGB",
    ),
    test_augmentations=L(augmentations.semantic)(is_train=False, **_frame),
    batch_size=8,
    workers=0,
    image_format="RGB",
)
optimizer = common.adamw(lr=0.002, weight_decay=0.05, weight_decay_1d=0.0)
lr_multiplier = common.poly(max_iter=_STEPS, power=0.9, warmup_iters=20, warmup_factor=0.01)
train = common.train(max_iter=_STEPS, seed=0, device="cpu", channels_last=True)


def tiny(**head):
    """A late-stride ResNet of 15 convolutions under a narrow head."""
    backbone = L(LateStrideResNet)(
        name="resnet50s",
        options={"layers": [2, 2, 2, 1], "channels": [8, 12, 16, 24], "stem_width": 8},
        multi_grid=[1],
        out_features=FEATURES,
        norm_momentum=_MOMENTUM,
        size_divisibility=0,
    )
    return segmenter(
        num_classes=15,
        crop=_CROP,
        backbone=backbone,
        shapes={"res2": (32, 4), "res3": (48, 8), "res4": (64, 16), "res5": (96, 32)},
        channels=32,
        encoder_channels=48,
        key_channels=16,
        norm="BN",
        norm_momentum=_MOMENTUM,
        **head,
    )
