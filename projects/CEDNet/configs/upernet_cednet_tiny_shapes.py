"""A small CEDNet UperNet that learns the generated shapes from scratch in a minute on a CPU."""

from detectron2.config import LazyCall as L

from cednet import CEDNet
from d2dense.config import common, segmenters
from d2dense.data import augmentations

from .common.tiny_shapes import backbone as _backbone

_shapes = {"c2": (24, 4), "c3": (32, 8), "c4": (48, 16), "c5": (64, 32), "stage1_c3": (32, 8)}
model = segmenters.upernet(
    backbone=L(CEDNet)(trunk=_backbone.trunk, out_features=list(_shapes)),
    shapes=_shapes,
    auxiliary_feature="stage1_c3",
    num_classes=15,
    channels=32,
    auxiliary_channels=16,
    norm="BN",
    crop=[128, 128],
)

_steps = 300
_frame = {"min_size": [128], "max_size": 512}
dataloader = common.semantic_loader(
    train="shapes_train_sem_seg",
    test="shapes_val_sem_seg",
    train_augmentations=L(augmentations.semantic)(
        is_train=True,
        **_frame,
        scale_range=[0.75, 1.5],
        crop_size=[128, 128],
        color_distortion=False,
        image_format="RGB",
    ),
    test_augmentations=L(augmentations.semantic)(is_train=False, **_frame),
    batch_size=8,
    workers=0,
    image_format="RGB",
)
optimizer = common.adamw(lr=0.002, weight_decay=0.05, weight_decay_1d=0.0)
lr_multiplier = common.poly(max_iter=_steps, power=1.0, warmup_iters=20, warmup_factor=0.01)
train = common.train(max_iter=_steps, seed=0, device="cpu", channels_last=True)
